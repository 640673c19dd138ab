// A model in a process of its own, asked for generations one at a time: what the streaming benchmarks compare. Several
// stay loaded side by side and are asked in turns, so that what the machine does meanwhile meets all of them. Run as a
// program it is that process: a plan as its argument, questions on stdin, one line of figures each on stdout.

import { mkdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { type Engine, openEngine } from "../../src/engine";
import { peakMemoryBytes } from "../../src/machine";
import type { Plan } from "../../src/plan";
import { countersSince, type StreamingCounters } from "../../src/streaming";
import { traceHeader } from "../../src/trace";

export interface Question {
  readonly promptTokens: number;
  readonly tokens: number;
  readonly seed: number;
}

export interface Figures {
  readonly promptSeconds: number;
  readonly decodeTokensPerSecond: number;
  /** While the prompt was processed, and from its first token on; null where everything is resident. */
  readonly prompt: StreamingCounters | null;
  readonly decode: StreamingCounters | null;
  /** The most that the process ever held, and what it wrote to disk since it was opened, by the kernel's count. */
  readonly peakBytes: number;
  readonly writtenBytes: number;
  /** When each token came, in milliseconds since 1970. */
  readonly tokenMs: readonly number[];
}

export interface Subject<Asked = Question, Told = Figures> extends AsyncDisposable {
  readonly name: string;
  readonly openSeconds: number;
  ask(question: Asked): Promise<Told>;
  /** Stops the process where it stands, and lets it go on. */
  pause(): void;
  resume(): void;
  /** Times that the group's limit was hit, and the most it held; null outside a group. */
  groupFigures(): { readonly limitHits: number; readonly peakBytes: number } | null;
}

const group = "/sys/fs/cgroup/memory/hypura-bench";

/** Whether a version 1 memory control group can be made here. */
export function canLimit(): boolean {
  try {
    mkdirSync(group, { recursive: true });
    return true;
  } catch {
    return false;
  }
}

export interface SubjectOptions {
  /** The module that is run as the process; this one by default. */
  readonly program?: string;
  /** Where a routing trace goes. */
  readonly tracePath?: string;
}

/** Opens `plan` in a process of its own, under a memory limit where one is given. */
export async function openSubject<Asked = Question, Told = Figures>(
  name: string,
  plan: Plan,
  limitBytes: number | null,
  { program = import.meta.path, tracePath }: SubjectOptions = {},
): Promise<Subject<Asked, Told>> {
  const folder = `${group}/${process.pid}-${name.replace(/\W+/g, "-")}`;
  if (limitBytes !== null) {
    mkdirSync(folder);
    writeFileSync(`${folder}/memory.limit_in_bytes`, String(limitBytes));
  }
  const planPath = `/tmp/hypura-bench-${process.pid}-${name.replace(/\W+/g, "-")}.json`;
  writeFileSync(planPath, JSON.stringify(plan));
  const enter = limitBytes === null ? "" : `echo $$ > ${folder}/cgroup.procs && `;
  const words = [process.execPath, program, planPath, ...(tracePath === undefined ? [] : [tracePath])];
  const child = Bun.spawn(["sh", "-c", `${enter}exec "$0" "$@"`, ...words], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "inherit",
  });
  const lines = linesOf(child.stdout);
  const next = async <Value>(): Promise<Value> => {
    const { value, done } = await lines.next();
    if (done === true) {
      throw new Error(`${name} ended with ${child.signalCode ?? (await child.exited)}`);
    }
    return JSON.parse(value) as Value;
  };
  const { openSeconds } = await next<{ readonly openSeconds: number }>();
  const count = (file: string): number => Number(readFileSync(`${folder}/${file}`, "utf8"));
  return {
    name,
    openSeconds,
    async ask(question) {
      child.stdin.write(`${JSON.stringify(question)}\n`);
      return next<Told>();
    },
    pause: () => child.kill("SIGSTOP"),
    resume: () => child.kill("SIGCONT"),
    groupFigures: () =>
      limitBytes === null
        ? null
        : { limitHits: count("memory.failcnt"), peakBytes: count("memory.max_usage_in_bytes") },
    async [Symbol.asyncDispose]() {
      child.stdin.end();
      await child.exited;
      if (limitBytes !== null) {
        rmdirSync(folder);
      }
    },
  };
}

export async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of stream) {
    const parts = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = parts.pop() ?? "";
    yield* parts;
  }
}

async function answer(engine: Engine, { promptTokens, tokens, seed }: Question): Promise<Figures> {
  const before = await engine.streaming();
  let between: StreamingCounters | null = null;
  const tokenMs: number[] = [];
  let timings = { prompt_ms: 0, predicted_per_second: 0 };
  const body = {
    prompt: Array.from({ length: promptTokens }, (_, i) => 5 + ((i * 7919 + seed * 104_729) % 200)),
    n_predict: tokens,
    // At such a temperature every token is as likely as any: the routing is that of no loop.
    temperature: 100,
    samplers: ["temperature"],
    seed,
    ignore_eos: true,
    cache_prompt: false,
    stream: true,
  };
  for await (const { data } of engine.request("POST /completion", body)) {
    between = tokenMs.length === 0 ? await engine.streaming() : between;
    tokenMs.push(performance.timeOrigin + performance.now());
    timings = { ...timings, ...(data as { readonly timings?: typeof timings }).timings };
  }
  const after = await engine.streaming();
  const written = /^write_bytes: (\d+)$/m.exec(readFileSync("/proc/self/io", "utf8"))?.[1] ?? "0";
  return {
    promptSeconds: timings.prompt_ms / 1000,
    decodeTokensPerSecond: timings.predicted_per_second,
    prompt: before !== null && between !== null ? countersSince(before, between) : null,
    decode: between !== null && after !== null ? countersSince(between, after) : null,
    peakBytes: peakMemoryBytes(),
    writtenBytes: Number(written),
    tokenMs,
  };
}

if (import.meta.main) {
  const [, , planPath = "", tracePath] = process.argv;
  const plan = JSON.parse(readFileSync(planPath, "utf8")) as Plan;
  const started = performance.now();
  const trace =
    tracePath === undefined || plan.streaming === null
      ? {}
      : { trace: { path: tracePath, header: JSON.stringify(traceHeader(plan, plan.streaming)) } };
  const engine = await openEngine(plan, trace);
  console.log(JSON.stringify({ openSeconds: (performance.now() - started) / 1000 }));
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await answer(engine, JSON.parse(line) as Question)));
  }
  await engine.close();
}

// One run of a benchmark, in a process of its own: a fresh process has a peak, a page cache account and a crash of its
// own. It owns both ends: the child that opens the plan, decodes and measures, and the parent that starts it, inside a
// control group where one is given. What the figures mean is bench.ts's.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { RunEvent, RunOrder, RunReport } from "./bench";
import { type Engine, openEngine } from "./engine";
import { HypuraError } from "./errors";
import { peakMemoryBytes } from "./machine";
import type { MemoryGroup } from "./memory-group";
import { countersSince, type StreamingCounters } from "./streaming";

/** The hidden command of the child; main.ts knows it too. */
export const benchRunCommand = "__bench-run";

// ---- the child ---------------------------------------------------------------------------------------------------

/** Obeys the order on stdin; what it has to say goes to stdout, a line of JSON each. */
export async function obeyRunOrder(say: (line: string) => Promise<void>): Promise<void> {
  const event = (one: RunEvent): Promise<void> => say(`${JSON.stringify(one)}\n`);
  try {
    const order = (await Bun.stdin.json()) as RunOrder;
    await event({ type: "report", report: await measure(order, event) });
  } catch (error) {
    const { code, message } =
      error instanceof HypuraError ? error : { code: "internal", message: (error as Error).message };
    await event({ type: "error", code, message });
    process.exitCode = 1;
  }
}

async function measure(order: RunOrder, event: (one: RunEvent) => Promise<void>): Promise<RunReport> {
  const started = performance.now();
  const options = order.trace === null ? {} : { trace: order.trace };
  await using engine = await openEngine(order.plan, options);
  const loadSeconds = (performance.now() - started) / 1000;
  await event({ type: "loaded", seconds: loadSeconds });
  const atLoad = storageRead();
  const decoded = await decode(engine, order, event);
  return {
    ...decoded,
    loadSeconds,
    storageBytes:
      atLoad === null || decoded.atFirst === null || decoded.atEnd === null
        ? null
        : {
            load: atLoad,
            prompt: decoded.atFirst - atLoad,
            decode: decoded.atEnd - decoded.atFirst,
          },
    peakBytes: peakMemoryBytes(),
  };
}

interface CompletionChunk {
  readonly tokens?: readonly number[];
  readonly timings?: { readonly prompt_n: number; readonly prompt_ms: number; readonly predicted_n: number };
}

async function decode(engine: Engine, order: RunOrder, event: (one: RunEvent) => Promise<void>) {
  const stop = new AbortController();
  const body = {
    prompt: order.prompt,
    n_predict: order.maxTokens,
    temperature: 1,
    seed: order.seed,
    // The whole vocabulary, as it is: a loop of the likeliest tokens would route alike at each step.
    top_k: 0,
    top_p: 1,
    min_p: 0,
    ignore_eos: true,
    cache_prompt: false,
    return_tokens: true,
    timings_per_token: true,
    stream: true,
  };
  const seen = new Set<number>();
  const tokenSeconds: number[] = [];
  let seenTokens = 0;
  let counted = 0;
  let decodedMs = 0;
  let last = 0;
  let timings: CompletionChunk["timings"];
  let first: Awaited<ReturnType<typeof snapshot>> | undefined;
  let firstTokenSeconds = 0;
  const started = performance.now();
  try {
    for await (const chunk of engine.request("POST /completion", body, stop.signal)) {
      const now = performance.now();
      const data = chunk.data as CompletionChunk;
      const count = data.timings?.predicted_n ?? counted;
      timings = data.timings ?? timings;
      for (const token of data.tokens ?? []) {
        seen.add(token);
        seenTokens++;
      }
      if (count === counted) {
        continue; // the last chunk only sums up
      }
      if (first === undefined) {
        firstTokenSeconds = (now - started) / 1000;
        first = await snapshot(engine);
        last = now;
      } else {
        // Tokens whose bytes were no whole character come with the one that completes it.
        const share = (now - last) / 1000 / (count - counted);
        tokenSeconds.push(...Array.from({ length: count - counted }, () => share));
        decodedMs += now - last;
        last = now;
      }
      counted = count;
      await event({ type: "token", count });
      if (decodedMs > order.seconds * 1000) {
        stop.abort();
      }
    }
  } catch (error) {
    if (!(error instanceof HypuraError && error.code === "cancelled" && stop.signal.aborted)) {
      throw error;
    }
  }
  const end = await snapshot(engine);
  const counters =
    first?.counters === null || first === undefined || end.counters === null
      ? null
      : countersSince(first.counters, end.counters);
  return {
    firstTokenSeconds,
    promptTokens: timings?.prompt_n ?? 0,
    promptSeconds: (timings?.prompt_ms ?? 0) / 1000,
    tokenSeconds,
    distinctTokens: seen.size,
    seenTokens,
    isCutShort: stop.signal.aborted,
    streaming: counters,
    majorFaults: end.majorFaults - (first?.majorFaults ?? 0),
    processorSeconds: end.processorSeconds - (first?.processorSeconds ?? 0),
    atFirst: first?.storageBytes ?? null,
    atEnd: end.storageBytes,
  };
}

async function snapshot(engine: Engine): Promise<{
  readonly counters: StreamingCounters | null;
  readonly storageBytes: number | null;
  readonly majorFaults: number;
  readonly processorSeconds: number;
}> {
  const { majorPageFault, userCPUTime, systemCPUTime } = process.resourceUsage();
  return {
    storageBytes: storageRead(),
    majorFaults: majorPageFault,
    processorSeconds: (userCPUTime + systemCPUTime) / 1e6,
    counters: engine.plan.streaming === null ? null : await engine.streaming(),
  };
}

/** Bytes that the kernel fetched from storage for this process. */
function storageRead(): number | null {
  try {
    const bytes = /^read_bytes: (\d+)$/m.exec(readFileSync("/proc/self/io", "utf8"))?.[1];
    return bytes === undefined ? null : Number(bytes);
  } catch {
    return null; // not on this system
  }
}

// ---- the parent --------------------------------------------------------------------------------------------------

export interface RunWatch {
  readonly signal?: AbortSignal;
  readonly group: MemoryGroup | null;
  readonly onLoaded?: () => void;
  readonly onToken?: (count: number) => void;
}

export type RunEnd =
  | { readonly status: "reported"; readonly report: RunReport }
  | { readonly status: "killed"; readonly reason: string }
  | { readonly status: "failed"; readonly reason: string };

function childWords(): readonly string[] {
  return Bun.isStandaloneExecutable
    ? [process.execPath, benchRunCommand]
    : [process.execPath, join(import.meta.dir, "main.ts"), benchRunCommand];
}

/** Runs the order in a child to its end. Throws `cancelled` where the signal ended it. */
export async function runOrder(order: RunOrder, watch: RunWatch): Promise<RunEnd> {
  const { group, signal } = watch;
  const killsBefore = group?.killCount() ?? 0;
  const child = Bun.spawn([...(group?.wrap(childWords()) ?? childWords())], {
    stdin: new Blob([JSON.stringify(order)]),
    stdout: "pipe",
    stderr: "pipe",
  });
  const kill = (): void => child.kill("SIGKILL");
  signal?.addEventListener("abort", kill, { once: true });
  if (signal?.aborted) {
    kill();
  }
  const stderr = new Response(child.stderr).text();
  let end: RunEnd | undefined;
  try {
    for await (const event of linesOf(child.stdout)) {
      end = follow(event, watch) ?? end;
    }
    await child.exited;
  } finally {
    signal?.removeEventListener("abort", kill);
    kill();
  }
  if (signal?.aborted) {
    throw new HypuraError("cancelled", "the benchmark was stopped");
  }
  if (end !== undefined) {
    return end;
  }
  if (group !== null && group.killCount() > killsBefore) {
    return { status: "killed", reason: "the kernel killed it: it needed more memory than the limit" };
  }
  if (child.signalCode === "SIGKILL") {
    return { status: "killed", reason: "it was killed, most likely by the kernel for want of memory" };
  }
  const said = (await stderr).trim().split("\n").at(-1) ?? "";
  return {
    status: "failed",
    reason: `its process ended with ${child.signalCode ?? `status ${child.exitCode}`}${said === "" ? "" : `: ${said}`}`,
  };
}

function follow(event: RunEvent, watch: RunWatch): RunEnd | undefined {
  switch (event.type) {
    case "loaded":
      watch.onLoaded?.();
      return undefined;
    case "token":
      watch.onToken?.(event.count);
      return undefined;
    case "report":
      return { status: "reported", report: event.report };
    case "error":
      return { status: "failed", reason: event.message };
  }
}

async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<RunEvent> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of stream) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      yield JSON.parse(line) as RunEvent;
    }
  }
}

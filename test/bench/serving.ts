// What serving costs beside the engine alone: time per token of one stream, and the throughput of eight. The same
// model under one thread, in many short turns: the engine in this process, and the program `hypura serve` with this
// process as its client. Each turn of one is compared with the turn of the other beside it, in alternating order, and
// the median of all pairs is what counts: a disturbance of a second spoils a pair or two and not the figure. Prints
// both and ends with 1 below a bar.
//
//   bun test/bench/serving.ts [pairs]
//
// Wants a quiet machine with two processors: one computes, the other has the server, the pipe and the client.

import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, openEngine } from "../../src/engine";
import { environment, program } from "../cli/program";
import { planOf } from "../engine/tiny";
import { makeFixture } from "../fixtures";
import { median, verdict } from "./measure";

/** Of the engine's own throughput, with eight streams. */
const leastShare = 0.9;
/** More per token than the engine alone, at the 99th percentile of all gaps between two tokens. */
const mostOverheadMs = 0.3;
const pairCount = Number(process.argv[2] ?? 30);
const contextTokens = 1024;
/** Some 0.3 s of a turn: the 99th percentile of its gaps is all but the two longest. */
const tokenCount = 200;
/** Some 600 tokens a second under one thread of 2020's server cores. */
const size = { layers: 6, embd: 512, ff: 1536, context: 4096 };

interface Figures {
  readonly tokensPerSecond: number;
  readonly p99GapMs: number;
}

/** Runs `count` streams at once; each calls back at every token. */
async function measure(count: number, stream: (onToken: () => void) => Promise<void>): Promise<Figures> {
  const gaps: number[] = [];
  let tokens = 0;
  const started = performance.now();
  await Promise.all(
    Array.from({ length: count }, async () => {
      let last: number | undefined;
      await stream(() => {
        const now = performance.now();
        if (last !== undefined) {
          gaps.push(now - last);
        }
        last = now;
        tokens++;
      });
    }),
  );
  const seconds = (performance.now() - started) / 1000;
  gaps.sort((a, b) => a - b);
  return { tokensPerSecond: tokens / seconds, p99GapMs: gaps[Math.floor(gaps.length * 0.99)] ?? 0 };
}

// The schema keeps both from ending: an array of numbers has no end before its thousandth.
const schema = { type: "array", items: { type: "integer" }, minItems: 1000 };
const messages = [{ role: "user", content: "Count." }];

async function engineStream(engine: Engine, onToken: () => void): Promise<void> {
  const body = {
    messages,
    max_tokens: tokenCount,
    temperature: 0,
    stream: true,
    cache_prompt: false,
    response_format: { type: "json_schema", json_schema: { schema } },
  };
  for await (const _ of engine.request("POST /v1/chat/completions", body)) {
    onToken();
  }
}

async function httpStream(url: string, onToken: () => void): Promise<void> {
  const body = {
    model: "bench",
    messages,
    format: schema,
    options: { num_predict: tokenCount, temperature: 0 },
  };
  const response = await fetch(`${url}/api/chat`, { method: "POST", body: JSON.stringify(body) });
  for await (const bytes of response.body as ReadableStream<Uint8Array>) {
    for (const byte of bytes) {
      if (byte === 10) {
        onToken();
      }
    }
  }
}

async function startServer(path: string, parallel: number) {
  const words = ["serve", path, "--name", "bench", "--port", "0", "--json", "--threads", "1"];
  const sizes = ["--parallel", String(parallel), "--context", String(contextTokens)];
  const child = Bun.spawn([...program, ...words, ...sizes], {
    env: { ...environment },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "ignore",
  });
  const { value } = await child.stdout.getReader().read();
  return {
    child,
    url: (JSON.parse(new TextDecoder().decode(value)) as { readonly endpoint: string }).endpoint,
  };
}

/** Of the process, its children left out; Linux only, else not a number. */
function cpuSeconds(processId: number): number {
  const path = `/proc/${processId}/stat`;
  if (!existsSync(path)) {
    return Number.NaN;
  }
  // proc(5): utime and stime, in hundredths of a second, are the 12th and 13th behind the name.
  const fields = readFileSync(path, "utf8").split(") ")[1]?.split(" ") ?? [];
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

const folder = mkdtempSync(join(tmpdir(), "hypura-serving-"));
try {
  const path = join(folder, "bench.gguf");
  await makeFixture("tiny-llama", path, size);
  for (const count of [1, 8]) {
    const plan = planOf(path, { slotCount: count, contextTokens });
    const engine = await openEngine(plan);
    const { child, url } = await startServer(path, count);
    const alone: Figures[] = [];
    const served: Figures[] = [];
    const turns = [
      async () => alone.push(await measure(count, (onToken) => engineStream(engine, onToken))),
      async () => served.push(await measure(count, (onToken) => httpStream(url, onToken))),
    ];
    for (const turn of turns) {
      await turn(); // loads, and fills what is filled once
    }
    alone.length = 0;
    served.length = 0;
    const cpuBefore = cpuSeconds(child.pid);
    for (let pair = 0; pair < pairCount; pair++) {
      for (const turn of pair % 2 === 0 ? turns : turns.toReversed()) {
        await turn();
      }
    }
    const cpu = cpuSeconds(child.pid) - cpuBefore;
    child.kill();
    await child.exited;
    await engine.close();
    const speed = (of: readonly Figures[]): number => median(of.map((one) => one.tokensPerSecond));
    const gap = (of: readonly Figures[]): number => median(of.map((one) => one.p99GapMs));
    console.log(
      `${count} streams: engine ${speed(alone).toFixed(0)} tok/s, p99 gap ${gap(alone).toFixed(2)} ms`,
    );
    console.log(
      `${count} streams: served ${speed(served).toFixed(0)} tok/s, p99 gap ${gap(served).toFixed(2)} ms, ` +
        `${((1e6 * cpu) / (pairCount * count * tokenCount)).toFixed(0)} us of processor a token beside its engine's process`,
    );
    if (count === 1) {
      const more = median(served.map((one, i) => one.p99GapMs - (alone[i]?.p99GapMs ?? 0)));
      verdict(
        more <= mostOverheadMs,
        `one stream: ${more.toFixed(3)} ms more a token at p99 (at most ${mostOverheadMs})`,
      );
    } else {
      const share = median(served.map((one, i) => one.tokensPerSecond / (alone[i]?.tokensPerSecond ?? 1)));
      verdict(
        share >= leastShare,
        `${count} streams: ${(100 * share).toFixed(1)} % of the engine's throughput (at least ${100 * leastShare} %)`,
      );
    }
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}

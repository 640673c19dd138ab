// What serving costs beside the engine alone: time per token of one stream, and the throughput of eight. The same
// model under one thread, in turns: the engine in this process, then the program `hypura serve` with this process as
// its client. Prints both and ends with 1 below a bar.
//
//   bun test/bench/serving.ts [rounds]
//
// Wants a quiet machine with two processors: one computes, the other has the server, the pipe and the client.

import { mkdtempSync, rmSync } from "node:fs";
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
const rounds = Number(process.argv[2] ?? 5);
const contextTokens = 1024;
const tokenCount = 400;
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
    for (let round = -1; round < rounds; round++) {
      const one = await measure(count, (onToken) => engineStream(engine, onToken));
      const other = await measure(count, (onToken) => httpStream(url, onToken));
      if (round >= 0) {
        alone.push(one);
        served.push(other);
      }
    }
    child.kill();
    await child.exited;
    await engine.close();
    const speed = (of: readonly Figures[]): number => median(of.map((one) => one.tokensPerSecond));
    const gap = (of: readonly Figures[]): number => median(of.map((one) => one.p99GapMs));
    console.log(
      `${count} streams: engine ${speed(alone).toFixed(0)} tok/s, p99 gap ${gap(alone).toFixed(2)} ms`,
    );
    console.log(
      `${count} streams: served ${speed(served).toFixed(0)} tok/s, p99 gap ${gap(served).toFixed(2)} ms`,
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

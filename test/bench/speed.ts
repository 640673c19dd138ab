// Decode speed of hypura's engine against llama-server of the same pin, on SmolLM2: the same threads, context and
// batches, one request at a time, in turns. Prints both medians and their ratio; ends with 1 below the bar.
//
//   bun test/bench/speed.ts [runs] [threads]
//
// Wants a quiet machine: threads wait for each other by spinning, so on cores that others use a token of two threads
// takes a second where it takes 15 ms.

import { existsSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { type Engine, openEngine } from "../../src/engine";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { makePlan, noLimits, type Plan } from "../../src/plan";
import { smolLm2OrSkip } from "../models";
import { median, verdict } from "./measure";

const bar = 0.97;
const runCount = Number(process.argv[2] ?? 10);
const body = {
  prompt: "The history of the city begins with",
  n_predict: 64,
  temperature: 0,
  ignore_eos: true,
  cache_prompt: false,
  stream: true,
};

interface LastChunk {
  readonly timings?: { readonly predicted_per_second: number };
}

async function engineSpeed(engine: Engine): Promise<number> {
  let last: LastChunk = {};
  for await (const { data } of engine.request("POST /completion", body)) {
    last = data as LastChunk;
  }
  return speedIn(last);
}

async function serverSpeed(address: string): Promise<number> {
  const response = await fetch(`${address}/completion`, {
    method: "POST",
    body: JSON.stringify(body),
    keepalive: false, // the server closes idle connections while the other one has its turn
  });
  const frames = (await response.text()).split("\n").filter((line) => line.startsWith("data: {"));
  return speedIn(JSON.parse((frames.at(-1) ?? "data: {}").slice("data: ".length)) as LastChunk);
}

/** As the server core of both measures it: tokens after the first by the time that they took. */
function speedIn(last: LastChunk): number {
  if (last.timings === undefined) {
    throw new Error("an answer without timings");
  }
  return last.timings.predicted_per_second;
}

/** A port that nobody listens on just now. */
function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      server.close(() => resolve(typeof address === "object" && address !== null ? address.port : 0));
    });
  });
}

async function startServer(plan: Plan, program: string) {
  const address = `http://127.0.0.1:${await freePort()}`;
  const child = Bun.spawn(
    [
      ...[
        program,
        "--model",
        plan.files[0]?.path ?? "",
        "--host",
        "127.0.0.1",
        "--port",
        new URL(address).port,
      ],
      ...["--ctx-size", String(plan.contextTokens), "--parallel", "1", "--no-warmup", "--cache-ram", "0"],
      ...["--batch-size", String(plan.batchTokens), "--ubatch-size", String(plan.ubatchTokens)],
      ...["--threads", String(plan.decodeThreads), "--threads-batch", String(plan.prefillThreads)],
      ...["--poll", String(plan.pollPercent), plan.repack ? "--repack" : "--no-repack"],
    ],
    { stdin: "ignore", stdout: "ignore", stderr: "ignore" },
  );
  const deadline = performance.now() + 60_000;
  while (
    !(await fetch(`${address}/health`).then(
      (response) => response.ok,
      () => false,
    ))
  ) {
    if (child.exitCode !== null || performance.now() > deadline) {
      child.kill();
      throw new Error(`llama-server did not start (${child.exitCode})`);
    }
    await Bun.sleep(50);
  }
  return { address, child };
}

const program = join(import.meta.dir, "..", "..", "build", "native", "bin", "llama-server");
const path = await smolLm2OrSkip();
if (path === null || !existsSync(program)) {
  console.error(
    `!!! SKIPPED: no model, or ${program} is not built (bun ffi/build.ts --native-only --reference)`,
  );
  process.exit(0);
}
const file = openModelFile(path);
const plan = makePlan({ name: "smollm2", files: file.files, model: file.model }, readMachine(), {
  ...noLimits,
  mode: "resident",
  threads: process.argv[3] === undefined ? null : Number(process.argv[3]),
});
const { address, child } = await startServer(plan, program);
try {
  await using engine = await openEngine(plan);
  await engineSpeed(engine); // both are warm: pages, threads, graphs
  await serverSpeed(address);
  const ours: number[] = [];
  const theirs: number[] = [];
  for (let i = 0; i < runCount; i++) {
    // The one that begins changes, so that a machine that slows down or speeds up favours none.
    for (const isOurs of i % 2 === 0 ? [true, false] : [false, true]) {
      (isOurs ? ours : theirs).push(isOurs ? await engineSpeed(engine) : await serverSpeed(address));
    }
    console.log(
      `${i + 1}: hypura ${ours.at(-1)?.toFixed(1)}, llama-server ${theirs.at(-1)?.toFixed(1)} tok/s`,
    );
  }
  const ratio = median(ours) / median(theirs);
  verdict(
    ratio >= bar,
    `decode on SmolLM2: hypura ${median(ours).toFixed(1)}, llama-server ${median(theirs).toFixed(1)} tok/s, ` +
      `ratio ${ratio.toFixed(3)} (bar ${bar}; ${plan.decodeThreads} threads, median of ${runCount})`,
  );
} finally {
  child.kill();
  await child.exited;
}

// The engine in a child process behind the interface of the engine in this one: same answers, same errors, and what a
// process adds: it can be killed, it dies with its parent, and it leaves nothing behind.

import { beforeAll, expect, test } from "bun:test";
import { truncateSync } from "node:fs";
import { join } from "node:path";
import { type ChildEngine, openChildEngine } from "../../src/child";
import { openEngine, RequestError } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import { held, residentBytes, until, untilHeldAtMost } from "../engine/process";
import { answerOf, endlessBody, planOf } from "../engine/tiny";
import { makeFixture } from "../fixtures";
import { scratchFolder } from "./served";

const folder = scratchFolder();
const experts = join(folder, "experts.gguf");

beforeAll(async () => {
  await makeFixture("tiny-qwen3moe", experts);
});

async function failure(promise: Promise<unknown>): Promise<HypuraError> {
  const error = await promise.then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(HypuraError);
  return error as HypuraError;
}

function isAlive(processId: number): boolean {
  try {
    process.kill(processId, 0);
    return true;
  } catch {
    return false;
  }
}

async function read(iterator: AsyncIterable<unknown>): Promise<number> {
  let count = 0;
  for await (const _ of iterator) {
    count++;
  }
  return count;
}

test.each(["resident", "stream"] as const)("a %s model answers as it does in this process", async (mode) => {
  const plan = planOf(experts, { mode });
  await using here = await openEngine(plan);
  await using there = await openChildEngine(plan);
  expect(there.info).toEqual(here.info);
  expect(await answerOf(there, 40)).toEqual(await answerOf(here, 40));
  const counters = await there.streaming();
  expect(counters === null).toBe(mode === "resident");
});

test("answers that run together are not mixed up", async () => {
  const plan = planOf(experts, { slotCount: 4 });
  await using engine = await openChildEngine(plan);
  const alone = await answerOf(engine, 60);
  const together = await Promise.all(Array.from({ length: 12 }, () => answerOf(engine, 60)));
  expect(together).toEqual(Array.from({ length: 12 }, () => alone));
});

test("refusals keep their status, and a body of megabytes arrives whole", async () => {
  await using engine = await openChildEngine(planOf(experts));
  const refusal = await failure(read(engine.request("POST /completion", { prompt: 5 })));
  expect(refusal).toBeInstanceOf(RequestError);
  expect((refusal as RequestError).status).toBe(400);
  const long = `${"a\tb\n".repeat(500_000)}end`;
  let tokens: readonly number[] = [];
  for await (const { data } of engine.request("POST /tokenize", { content: long })) {
    tokens = (data as { readonly tokens: readonly number[] }).tokens;
  }
  let text = "";
  for await (const { data } of engine.request("POST /detokenize", { tokens })) {
    text = (data as { readonly content: string }).content;
  }
  expect(text.trim()).toBe(long);
});

test("a request that is left frees its slot, and says when", async () => {
  let left = 0;
  await using engine = await openChildEngine(planOf(experts), { onRequestLeft: () => left++ });
  const request = engine.request("POST /completion", endlessBody(100_000));
  await request.next();
  expect(engine.activeRequests()).toBe(1);
  await request.return?.();
  await until(
    () => left === 1,
    () => "the slot stays busy",
  );
  expect(engine.activeRequests()).toBe(0);
  expect((await answerOf(engine, 5)).tokens.length).toBe(5);
});

test("an aborted signal ends the iteration at once", async () => {
  await using engine = await openChildEngine(planOf(experts));
  const stop = new AbortController();
  const request = engine.request("POST /completion", endlessBody(100_000), stop.signal);
  await request.next();
  stop.abort();
  expect((await failure(read(request))).code).toBe("cancelled");
});

test("killed while it answers: every request ends with the reason, and it is said that it is gone", async () => {
  let gone = false;
  const engine = await openChildEngine(planOf(experts, { slotCount: 2 }), {
    onGone: () => {
      gone = true;
    },
  });
  const requests = [0, 1].map(() => engine.request("POST /completion", endlessBody(100_000)));
  await Promise.all(requests.map((request) => request.next()));
  process.kill(engine.processId, "SIGKILL");
  for (const request of requests) {
    const error = await failure(read(request));
    expect(error.code).toBe("engine");
    expect(error.message).toContain("SIGKILL");
  }
  expect(gone).toBe(true);
  expect(() => engine.request("POST /completion", endlessBody(1))).toThrow("SIGKILL");
  await engine.close();
});

test("a model that cannot be loaded is one sentence, and its process ends", async () => {
  const damaged = join(folder, "damaged.gguf");
  await makeFixture("tiny-llama", damaged);
  const plan = planOf(damaged);
  truncateSync(damaged, 200_000);
  const before = held();
  const error = await failure(openChildEngine(plan));
  expect(["corrupt-model", "engine"]).toContain(error.code);
  await untilHeldAtMost(before);
});

test("loading is ended by its signal", async () => {
  const stop = new AbortController();
  const opening = openChildEngine(planOf(experts), { signal: stop.signal });
  stop.abort();
  expect((await failure(opening)).code).toBe("engine");
});

test("the child does not outlive its parent", async () => {
  const script = join(folder, "parent.ts");
  const source = (name: string): string => JSON.stringify(join(import.meta.dir, "..", "..", "src", name));
  await Bun.write(
    script,
    `import { openChildEngine } from ${source("child.ts")};
     const engine = await openChildEngine(${JSON.stringify(planOf(experts))});
     const request = engine.request("POST /completion", ${JSON.stringify(endlessBody(100_000))});
     await request.next();
     console.log(engine.processId);
     await Bun.sleep(60_000);`,
  );
  const parent = Bun.spawn([process.execPath, script], { stdout: "pipe", stderr: "inherit" });
  const [text] = await new Response(parent.stdout.pipeThrough(firstLine()))
    .text()
    .then((all) => all.split("\n"));
  const child = Number(text);
  expect(isAlive(child)).toBe(true);
  parent.kill("SIGKILL");
  await parent.exited;
  await until(
    () => !isAlive(child),
    () => `the engine ${child} runs on`,
    10,
  );
});

function firstLine(): TransformStream<Uint8Array, Uint8Array> {
  return new TransformStream({
    transform(bytes, controller) {
      controller.enqueue(bytes);
      controller.terminate();
    },
  });
}

test("twenty lives leave no process, no descriptor and no memory", async () => {
  const plan = planOf(experts);
  const ids: number[] = [];
  const live = async (): Promise<void> => {
    const engine: ChildEngine = await openChildEngine(plan);
    ids.push(engine.processId);
    await answerOf(engine, 3);
    await engine.close();
  };
  for (let i = 0; i < 5; i++) {
    await live();
  }
  const before = held();
  const beforeBytes = residentBytes();
  for (let i = 0; i < 15; i++) {
    await live();
  }
  await untilHeldAtMost(before);
  expect(ids.filter(isAlive)).toEqual([]);
  expect(residentBytes() - beforeBytes).toBeLessThan(30_000_000);
});

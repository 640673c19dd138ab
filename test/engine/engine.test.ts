// The engine behind its interface, over models of a few hundred kilobytes: what a good plan gives, how each wrong one
// is refused, how requests end, and that nothing stays behind.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFileSync, mkdtempSync, rmSync, statSync, truncateSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, openEngine, RequestError } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import type { Plan } from "../../src/plan";
import { fixtureKinds, makeFixture } from "../fixtures";
import { smolLm2OrSkip } from "../models";
import { held, residentBytes, until, untilHeldAtMost } from "./process";
import { answerOf, endlessBody, planOf } from "./tiny";

let folder = "";
let dense = "";
let experts = "";
const open: Engine[] = [];

async function opened(plan: Plan): Promise<Engine> {
  const engine = await openEngine(plan);
  open.push(engine);
  return engine;
}

/** What the promise is rejected with, which is to be one of ours. */
async function failure(promise: Promise<unknown>): Promise<HypuraError> {
  const error = await promise.then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(HypuraError);
  return error as HypuraError;
}

async function read(iterator: AsyncIterable<unknown>): Promise<number> {
  let count = 0;
  for await (const _ of iterator) {
    count++;
  }
  return count;
}

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "hypura-engine-"));
  dense = join(folder, "dense.gguf");
  experts = join(folder, "experts.gguf");
  await makeFixture("tiny-llama", dense);
  await makeFixture("tiny-qwen3moe", experts);
});

afterAll(async () => {
  await Promise.all(open.map((engine) => engine.close()));
  rmSync(folder, { recursive: true, force: true });
});

describe("opening", () => {
  test.each(["resident", "stream"] as const)("a %s plan says what it opened", async (mode) => {
    const plan = planOf(experts, { mode, slotCount: 2 });
    const fractions: number[] = [];
    const engine = await openEngine(plan, { onProgress: (fraction) => fractions.push(fraction) });
    open.push(engine);
    expect(engine.plan).toBe(plan);
    expect(engine.info).toMatchObject({ contextTokens: 1024, slotCount: 2, vocabTokens: 512 });
    expect(engine.info.parameters).toBeGreaterThan(100_000);
    expect(engine.info.memory.length).toBeGreaterThan(0);
    expect(fractions.every((fraction) => fraction >= 0 && fraction <= 1)).toBe(true);
    expect(engine.activeRequests()).toBe(0);
    expect((await answerOf(engine)).tokens).toHaveLength(12);
    await engine.close();
  });

  test("streamed and resident weights give one answer", async () => {
    const resident = await opened({ ...planOf(experts, { mode: "resident" }), repack: false });
    const streamed = await opened(planOf(experts, { mode: "stream" }));
    expect(await answerOf(streamed, 40)).toEqual(await answerOf(resident, 40));
  });

  test("two engines are open at once, and each answers for its own model", async () => {
    const one = await opened(planOf(dense));
    const two = await opened(planOf(experts));
    const alone = [await answerOf(one, 40), await answerOf(two, 40)];
    expect(alone[0]).not.toEqual(alone[1]);
    expect(await Promise.all([answerOf(one, 40), answerOf(two, 40)])).toEqual(
      alone as [Awaited<ReturnType<typeof answerOf>>, Awaited<ReturnType<typeof answerOf>>],
    );
    await one.close();
    expect(await answerOf(two, 40)).toEqual(alone[1]!);
    await two.close();
  });
});

describe("a plan that is not true is refused, and leaves nothing behind", () => {
  function changed(plan: Plan, index: number, change: Partial<Plan["tensors"][number]>): Plan {
    return { ...plan, tensors: plan.tensors.map((one, i) => (i === index ? { ...one, ...change } : one)) };
  }

  const wrong: readonly (readonly [string, (plan: Plan) => Plan, RegExp])[] = [
    [
      "an offset",
      (plan) => changed(plan, 2, { offsetBytes: (plan.tensors[2]?.offsetBytes ?? 0) + 32 }),
      /disagree at tensor \S+ \(\d+ bytes at \d+\)/,
    ],
    [
      "a size",
      (plan) => changed(plan, 2, { sizeBytes: (plan.tensors[2]?.sizeBytes ?? 0) - 1 }),
      /disagree at tensor \S+/,
    ],
    ["a name", (plan) => changed(plan, 2, { name: "blk.0.nothing" }), /disagree at tensor \S+/],
    ["a file index", (plan) => changed(plan, 2, { fileIndex: 1 }), /disagree at tensor \S+/],
    [
      "a tensor that is missing",
      (plan) => ({ ...plan, tensors: plan.tensors.slice(0, -1) }),
      /disagree at tensor \S+/,
    ],
    [
      "a tensor too many",
      (plan) => ({
        ...plan,
        tensors: [...plan.tensors, { ...(plan.tensors[0] as Plan["tensors"][number]), name: "extra" }],
      }),
      /names tensor extra, which the model files lack/,
    ],
    [
      "a file that is not there",
      (plan) => ({ ...plan, files: [{ path: join(folder, "nowhere.gguf"), sizeBytes: 1 }] }),
      /cannot read .*nowhere\.gguf/,
    ],
  ];

  test.each(wrong)("%s", async (_, change, sentence) => {
    const plan = planOf(experts, { mode: "stream" });
    await (await opened(plan)).close(); // what is started once is started
    const before = held();
    for (let i = 0; i < 3; i++) {
      const error = await failure(openEngine(change(plan)));
      expect(error.code).toBe("corrupt-model");
      expect(error.message).toMatch(sentence);
      expect(error.message).not.toContain("\n");
    }
    await untilHeldAtMost(before);
  });

  test("fields that are missing or out of range", async () => {
    const plan = planOf(dense);
    const { slotCount: _, ...lacking } = plan;
    for (const bad of [
      lacking,
      { ...plan, slotCount: 0 },
      { ...plan, ubatchTokens: 0 },
      { ...plan, ubatchTokens: plan.batchTokens + 1 },
      { ...plan, decodeThreads: -1 },
      { ...plan, kvTypeK: "q9_9" },
      { ...plan, loadMode: "telepathy" },
      { ...plan, files: [] },
      null,
      [],
    ]) {
      // The call itself refuses: a plan that cannot be read is a mistake of the caller, not an event.
      const error = await failure((async () => openEngine(bad as unknown as Plan))());
      expect(error.code).toBe("engine");
      expect(error.message).toContain("cannot read");
    }
  });

  test("a pool without a slot, a streamed tensor that is not whole, a class of the wrong size", async () => {
    const plan = planOf(experts, { mode: "stream" });
    const streaming = plan.streaming!;
    const [first, ...rest] = streaming.classes;
    const [tensor, ...tensors] = streaming.tensors;
    for (const bad of [
      { ...streaming, classes: [{ ...first!, slotCount: 0 }, ...rest] },
      { ...streaming, tensors: [{ ...tensor!, strideCount: tensor!.strideCount - 1 }, ...tensors] },
      { ...streaming, classes: [{ ...first!, strideBytes: first!.strideBytes + 1 }, ...rest] },
      { ...streaming, classes: [{ ...first!, slotBytes: first!.strideBytes - 1 }, ...rest] },
      { ...streaming, reader: { ...streaming.reader, threads: 0 } },
      { ...streaming, reader: { ...streaming.reader, pieceBytes: 1000 } },
    ]) {
      const error = await failure(openEngine({ ...plan, streaming: bad }));
      expect(["engine", "io", "internal"]).toContain(error.code);
      expect(error.message.length).toBeGreaterThan(20);
    }
  });

  test.each(["resident", "stream"] as const)(
    "a model that was truncated after it was planned, %s",
    async (mode) => {
      const path = join(folder, `truncated-${mode}.gguf`);
      copyFileSync(dense, path);
      const plan = planOf(path, { mode });
      truncateSync(path, Math.floor(statSync(path).size / 2));
      const before = held();
      const error = await failure(openEngine(plan));
      expect(["corrupt-model", "engine", "io"]).toContain(error.code);
      expect(error.message).toMatch(/truncated|incomplete|bytes|changed/);
      await untilHeldAtMost(before);
    },
  );
});

describe("requests", () => {
  let engine: Engine;
  beforeAll(async () => {
    engine = await openEngine(planOf(dense, { slotCount: 2 }));
  });
  afterAll(() => engine.close());

  async function refusal(route: string, body: object): Promise<RequestError> {
    const error = await failure(read(engine.request(route, body)));
    expect(error).toBeInstanceOf(RequestError);
    expect(error.message.length).toBeGreaterThan(8);
    return error as RequestError;
  }

  test("of an unknown route: 404", async () => {
    for (const route of ["POST /nowhere", "GET /completion", "", "POST", "DELETE /completion"]) {
      expect((await refusal(route, {})).status).toBe(404);
    }
  });

  test("with a malformed body: 400", async () => {
    for (const [route, body] of [
      ["POST /completion", {}],
      ["POST /completion", { prompt: 7 }],
      ["POST /completion", { prompt: [1, 1_000_000] }],
      ["POST /completion", { prompt: [-1] }],
      ["POST /completion", { prompt: "a", n_predict: "many" }],
      ["POST /completion", { prompt: "a", grammar: "root ::= (" }],
      ["POST /completion", []],
      ["POST /v1/chat/completions", {}],
      ["POST /v1/chat/completions", { messages: "hello" }],
      ["POST /v1/chat/completions", { messages: [{ role: 3 }] }],
      ["POST /completion", { ...endlessBody(4), prompt: Array.from({ length: 5000 }, () => 5) }],
    ] as const) {
      expect([route, JSON.stringify(body).slice(0, 80), (await refusal(route, body)).status]).toEqual([
        route,
        JSON.stringify(body).slice(0, 80),
        400,
      ]);
    }
    expect((await answerOf(engine)).tokens).toHaveLength(12);
  });

  test("that is left by break ends in native code", async () => {
    for await (const _ of engine.request("POST /completion", endlessBody(900))) {
      break;
    }
    await until(
      () => engine.activeRequests() === 0,
      () => `${engine.activeRequests()} are active`,
    );
    expect((await answerOf(engine)).tokens).toHaveLength(12);
  });

  test("that is aborted ends with `cancelled`: before it starts, while it waits, between chunks", async () => {
    expect(
      (await failure(read(engine.request("POST /completion", endlessBody(900), AbortSignal.abort())))).code,
    ).toBe("cancelled");

    const waiting = new AbortController();
    const promise = read(engine.request("POST /completion", endlessBody(900), waiting.signal));
    queueMicrotask(() => waiting.abort());
    expect((await failure(promise)).code).toBe("cancelled");

    const between = new AbortController();
    const chunks = engine.request("POST /completion", endlessBody(900), between.signal);
    await chunks.next();
    between.abort();
    expect((await failure(read(chunks))).code).toBe("cancelled");
    expect(await chunks.next()).toEqual({ done: true, value: undefined });
    await until(
      () => engine.activeRequests() === 0,
      () => `${engine.activeRequests()} are active`,
    );
  });

  test("that waits for a free slot is answered in its turn", async () => {
    const alone = await answerOf(engine, 20);
    const together = await Promise.all(Array.from({ length: 7 }, () => answerOf(engine, 20)));
    expect(together.map((answer) => answer.tokens.length)).toEqual(Array(7).fill(20));
    expect(await answerOf(engine, 20)).toEqual(alone);
  });
});

describe("closing", () => {
  test("ends the requests that run, and refuses the next", async () => {
    for (const mode of ["resident", "stream"] as const) {
      const engine = await openEngine(planOf(dense, { mode, slotCount: 2 }));
      const running = Array.from({ length: 5 }, () => engine.request("POST /completion", endlessBody(1000)));
      await running[0]?.next();
      const ends = running.map((chunks) => failure(read(chunks)));
      await engine.close();
      for (const error of await Promise.all(ends)) {
        expect(["request", "engine"]).toContain(error.code);
      }
      expect(engine.activeRequests()).toBe(0);
      expect(() => engine.request("POST /completion", endlessBody(1))).toThrow("closed");
      await engine.close(); // again is allowed
    }
  });

  test("twenty times, nothing stays: descriptors, threads, memory", async () => {
    const plans = [planOf(dense), planOf(experts, { mode: "stream" })];
    async function once(): Promise<void> {
      for (const plan of plans) {
        const engine = await openEngine(plan);
        await answerOf(engine, 2);
        await engine.close();
      }
    }
    for (let i = 0; i < 5; i++) {
      await once(); // what is started once is started, and the allocator has seen it all
    }
    const before = held();
    const bytesBefore = residentBytes();
    for (let i = 0; i < 20; i++) {
      await once();
    }
    await untilHeldAtMost(before);
    expect(residentBytes()).toBeLessThan(bytesBefore * 1.1);
  });
});

describe("the plan's memory is llama.cpp's", () => {
  async function expectMemory(path: string, name: string): Promise<void> {
    const ratios: string[] = [];
    for (const [contextTokens, slotCount, mode] of [
      [2048, 1, "resident"],
      [512, 4, "resident"],
      [512, 4, "stream"],
    ] as const) {
      const plan = planOf(path, { contextTokens, slotCount, mode });
      const engine = await openEngine(plan);
      await engine.close();
      const actual = (key: "kvBytes" | "computeBytes"): number =>
        engine.info.memory.reduce((sum, buffer) => sum + buffer[key], 0);
      expect(plan.memory.kvBytes + plan.memory.stateBytes).toBe(actual("kvBytes"));
      const compute = actual("computeBytes");
      ratios.push((plan.memory.computeBytes / compute).toFixed(2));
      expect(plan.memory.computeBytes).toBeGreaterThanOrEqual(compute * 0.98);
      expect(plan.memory.computeBytes).toBeLessThanOrEqual(compute * 1.6 + 1e6);
    }
    console.error(`compute buffers, estimated / allocated: ${ratios.join(" ")} ${name}`);
  }

  test.each([...fixtureKinds.keys()].filter((kind) => kind.startsWith("tiny-")))("%s", async (kind) => {
    const path = join(folder, `memory-${kind}.gguf`);
    await makeFixture(kind, path);
    await expectMemory(path, kind);
  });

  test("SmolLM2-135M-Instruct", async () => {
    const path = await smolLm2OrSkip();
    if (path !== null) {
      await expectMemory(path, "SmolLM2");
    }
  });
});

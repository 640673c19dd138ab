// The tasks of native code as TypeScript starts them: what each answers, on next to no time, and what it refuses.

import { expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type EngineChunk, engineLibrary, runTask } from "../../src/engine";
import { HypuraError } from "../../src/errors";

async function answers(name: string, body: object): Promise<readonly EngineChunk[]> {
  return Array.fromAsync(runTask(name, body));
}

function inScratch<Result>(work: (folder: string) => Promise<Result>): Promise<Result> {
  const folder = mkdtempSync(join(tmpdir(), "hypura-tasks-"));
  return work(folder).finally(() => rmSync(folder, { recursive: true, force: true }));
}

const smallCase = {
  typeName: "q4_0",
  rowElements: 1024,
  rowCount: 256,
  tokens: 1,
  experts: 0,
  products: 100,
  repacked: false,
};
const smallProducts = {
  threads: 2,
  pollPercent: 0,
  weightBytes: 2_097_152,
  durationNs: 0,
  cases: [smallCase],
};

test("devices: the processor is one, and no streaming device", async () => {
  const [chunk] = await answers("devices", {});
  const devices =
    (chunk?.data as { devices?: readonly Record<string, unknown>[] } | undefined)?.devices ?? [];
  const processor = devices.find((one) => one["type"] === "cpu");
  expect(processor).toMatchObject({ name: "CPU", isUnified: true });
  expect(processor?.["totalBytes"]).toBeGreaterThan(1e8);
  expect(devices.map((one) => one["name"])).not.toContain("Streamed");
  const { gpuBackends } = (chunk?.data ?? {}) as { readonly gpuBackends?: readonly string[] };
  expect(gpuBackends).toEqual([...engineLibrary().gpuBackends]);
});

test.each(["copy", "scan"])("%s: at least one pass", async (name) => {
  const [chunk] = await answers(name, { threads: 2, bufferBytes: 8_388_608, durationNs: 0 });
  expect(chunk?.data).toEqual({ bytes: 8_388_608, ns: expect.any(Number), threadNs: expect.any(Number) });
});

test("products: every type of weights that there is, plain and of experts, in the order that was asked", async () => {
  const types =
    "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_K q3_K q4_K q5_K q6_K iq1_s iq2_xxs iq4_nl iq4_xs mxfp4".split(
      " ",
    );
  const cases = types.flatMap((typeName) => [
    { ...smallCase, typeName },
    { ...smallCase, typeName, rowCount: 32, experts: 4 },
    { ...smallCase, typeName, rowCount: 64, tokens: 32, products: 1 },
  ]);
  const chunks = await answers("products", { ...smallProducts, cases });
  expect(chunks.map(({ name }) => name)).toEqual(cases.map(() => "product"));
  for (const [index, { data }] of chunks.entries()) {
    const { rowCount, tokens, experts } = cases[index] as typeof smallCase;
    const { bytes, flops, products, ns, passes, isAbsent } = data as Record<string, number>;
    expect(flops).toBe(2 * 1024 * rowCount * Math.max(1, experts) * tokens * (products as number));
    expect(bytes).toBeLessThanOrEqual(smallProducts.weightBytes);
    expect(bytes).toBeGreaterThan(products === 1 ? 0 : 1_000_000);
    expect({ passes, isAbsent, isTimed: (ns as number) > 0 }).toEqual({
      ...{ passes: 1, isAbsent: false, isTimed: true },
    } as never);
  }
});

test("products: rearranged where llama.cpp has such a form, plain and of experts", async () => {
  const cases = ["q4_0", "f16"].flatMap((typeName) => [
    { ...smallCase, typeName, repacked: true },
    { ...smallCase, typeName, repacked: true, rowCount: 32, experts: 4 },
  ]);
  const chunks = await answers("products", { ...smallProducts, cases });
  const absent = chunks.map(({ data }) => (data as { isAbsent: boolean }).isAbsent);
  // Every processor that is built for has a form of q4_0, and none has one of f16.
  expect(absent).toEqual([false, false, true, true]);
  const figures = chunks.map(({ data }) => data as { bytes: number; products: number });
  expect((figures[1]?.bytes ?? 0) / (figures[1]?.products ?? 1)).toBe((1024 / 32) * 18 * 32 * 4);
});

test("steps: each kind of what a layer does beside its products", async () => {
  const sizes = { width: 64, heads: 6, keyHeads: 2, parts: 4, steps: 3 };
  const cases = ["attention", "mixing", "plain"].map((kind) => ({ kind, ...sizes }));
  const chunks = await answers("steps", { threads: 2, pollPercent: 0, durationNs: 0, cases });
  expect(chunks.map(({ name, data }) => [name, data])).toEqual(
    cases.map(() => ["steps", { ns: expect.any(Number), passes: 1 }]),
  );
});

test("scratch and reads: what was written is read, every place once", () =>
  inScratch(async (folder) => {
    const path = join(folder, "file");
    const [written] = await answers("scratch", {
      path,
      sizeBytes: 8_388_608,
      chunkBytes: 1_048_576,
      durationNs: 60e9,
    });
    expect(written?.data).toEqual({ bytes: 8_388_608, direct: expect.any(Boolean) });
    expect(statSync(path).size).toBe(8_388_608);
    const cell = { readBytes: 65_536, skewBytes: 0, depth: 4, direct: true, durationNs: 60e9, seed: 1 };
    const body = {
      ...{
        files: [{ path, sizeBytes: 8_388_608 }],
        hugePages: true,
        retryCount: 8,
        retryWaitNs: 1e6,
        pollNs: 1e5,
      },
      cells: [cell, { ...cell, direct: false, skewBytes: 100, depth: 1 }],
    };
    const cells = await answers("reads", body);
    expect(cells.map(({ data }) => data)).toMatchObject([
      { readCount: 128, bytes: 8_388_608, isExhausted: true },
      { readCount: 127, bytes: 127 * 65_536, isExhausted: true, direct: false },
    ]);
    expect(runTask("reads", { ...body, files: [{ path, sizeBytes: 5 }] }).next()).rejects.toThrow(
      "the plan was made for 5",
    );
  }));

test.each([
  ["no such task", "flight", {}],
  ["no field", "copy", {}],
  ["a count of none", "copy", { threads: 0, bufferBytes: 4096, durationNs: 1 }],
  ["a negative time", "copy", { threads: 1, bufferBytes: 4096, durationNs: -1 }],
  ["a fraction", "copy", { threads: 1.5, bufferBytes: 4096, durationNs: 1 }],
  ["a type that ggml has not", "products", { ...smallProducts, cases: [{ ...smallCase, typeName: "q4_9" }] }],
  [
    "a type that weights have not",
    "products",
    { ...smallProducts, cases: [{ ...smallCase, typeName: "i32" }] },
  ],
  ["a type for activations", "products", { ...smallProducts, cases: [{ ...smallCase, typeName: "q8_K" }] }],
  [
    "a step that layers have not",
    "steps",
    {
      ...{ threads: 1, pollPercent: 0, durationNs: 0 },
      cases: [{ kind: "dancing", width: 64, heads: 1, keyHeads: 1, parts: 1, steps: 1 }],
    },
  ],
  ["no products", "products", { ...smallProducts, cases: [] }],
  [
    "no files",
    "reads",
    { files: [], hugePages: true, retryCount: 8, retryWaitNs: 1, pollNs: 1, cells: [{}] },
  ],
  ["chunks that are no pages", "scratch", { path: "x", sizeBytes: 10_000, chunkBytes: 5000, durationNs: 1 }],
])("%s is refused before there is a descriptor", (_, name, body) => {
  expect(() => runTask(name, body)).toThrow(HypuraError);
  expect(existsSync("x")).toBe(false);
});

test("a failure is one sentence", () =>
  inScratch(async (folder) => {
    const path = join(folder, "there");
    writeFileSync(path, "before");
    const body = { path, sizeBytes: 65_536, chunkBytes: 4096, durationNs: 1e9 };
    expect(answers("scratch", body)).rejects.toThrow(`cannot write ${path}: File exists`);
    const fits = { ...smallProducts, cases: [{ ...smallCase, typeName: "f32", rowCount: 10_000 }] };
    expect(answers("products", fits)).rejects.toThrow("do not fit its memory");
  }));

test("is cancelled by its signal, and takes its scratch file along", () =>
  inScratch(async (folder) => {
    const stop = new AbortController();
    const path = join(folder, "file");
    const endless = { path, sizeBytes: 2 ** 40, chunkBytes: 65_536, durationNs: 600e9 };
    const task = runTask("scratch", { ...endless, path: `${path}.2` }, stop.signal);
    const cancelled = task.next();
    const copy = runTask(
      "copy",
      { threads: 1, bufferBytes: 4_194_304, durationNs: 600e9 },
      stop.signal,
    ).next();
    await Bun.sleep(50);
    expect(existsSync(`${path}.2`)).toBe(true);
    stop.abort();
    for (const one of [cancelled, copy]) {
      expect(await one.catch((error: HypuraError) => error.code)).toBe("cancelled");
    }
    for (let tries = 0; existsSync(`${path}.2`) && tries < 400; tries++) {
      await Bun.sleep(25);
    }
    expect(existsSync(`${path}.2`)).toBe(false);
  }));

// The plan is pure: the same values give the same plan, it fits its budget, places every byte once, and refuses with
// a sentence where it cannot.

import { describe, expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import { parseGguf } from "../../src/gguf";
import type { Machine } from "../../src/machine";
import { describeModel, type Model } from "../../src/model";
import { gpuBudgetOf, makePlan, noLimits, type Plan, type PlanLimits, totalBytes } from "../../src/plan";
import { prefetchDepthOf, usualReader } from "../../src/plan-task";
import { ggufBytes } from "../fixtures/gguf-writer";
import { tinyDeepseek2, tinyGptOss, tinyLlama, tinyMixed, tinyMixtral, tinyQwen3Moe } from "../fixtures/tiny";
import { describeShape, machineOf, machines, type ShapeName, shapeModel } from "./plan-family";

function machine(availableBytes: number): Machine {
  return {
    computeCores: 4,
    hasDirectLoad: true,
    memory: { totalBytes: 64e9, availableBytes, limitedBy: null },
    devices: [],
    gpuBackends: [],
    profile: null,
  };
}

const makers = {
  "tiny-llama": tinyLlama,
  "tiny-mixtral": tinyMixtral,
  "tiny-qwen3moe": tinyQwen3Moe,
  "tiny-gpt-oss": tinyGptOss,
  "tiny-mixed": tinyMixed,
  "tiny-deepseek2": tinyDeepseek2,
} as const;
const kinds = Object.keys(makers) as (keyof typeof makers)[];

function modelOf(kind: keyof typeof makers): Model {
  const bytes = ggufBytes(makers[kind]({}));
  const read = (offset: number, length: number): Uint8Array => bytes.subarray(offset, offset + length);
  return describeModel(parseGguf([{ name: kind, source: { sizeBytes: bytes.byteLength, read } }]));
}

function plan(model: Model, availableBytes: number, limits: Partial<PlanLimits> = {}): Plan {
  const files = [{ path: "m.gguf", sizeBytes: 1 }];
  return makePlan({ name: "m", files, model }, machine(availableBytes), { ...noLimits, ...limits });
}

describe.each(kinds)("%s", (kind) => {
  test("is resident where it fits, with every byte on ram once", () => {
    const model = modelOf(kind);
    const made = plan(model, 8e9);
    expect(made.mode).toBe("full-resident");
    expect(made.streaming).toBeNull();
    expect(made.tensors.every((tensor) => tensor.tier === "ram")).toBe(true);
    expect(made.tensors.reduce((sum, tensor) => sum + tensor.sizeBytes, 0)).toBe(made.memory.weightBytes);
  });

  test("streams on request: resident and streamed bytes are the model, strides are whole tensors", () => {
    const model = modelOf(kind);
    const made = plan(model, 8e9, { mode: "stream" });
    const streamed = made.tensors.filter((tensor) => tensor.tier === "nvme");
    const streamedBytes = streamed.reduce((sum, tensor) => sum + tensor.sizeBytes, 0);
    expect(streamedBytes).toBeGreaterThan(0);
    expect(streamedBytes + made.memory.weightBytes).toBe(model.tensorBytes);
    expect(made.streaming?.tensors.length).toBe(streamed.length);
    for (const { tensorIndex, strideCount, classIndex } of made.streaming?.tensors ?? []) {
      const strideBytes = made.streaming?.classes[classIndex]?.strideBytes ?? 0;
      expect(strideBytes * strideCount).toBe(made.tensors[tensorIndex]?.sizeBytes ?? -1);
    }
    expect(made.repack).toBe(false);
    expect(made.batchTokens).toBe(made.ubatchTokens);
  });

  test("fits every budget that it accepts, and more memory never means fewer slots", () => {
    const model = modelOf(kind);
    let slotsBefore = 0;
    for (let budget = 110e6; budget < 260e6; budget += 2.5e6) {
      let made: Plan;
      try {
        made = plan(model, budget, { contextTokens: 256, mode: "stream" });
      } catch (error) {
        expect((error as HypuraError).code).toBe("not-enough-memory");
        expect(slotsBefore).toBe(0);
        continue;
      }
      expect(totalBytes(made.memory)).toBeLessThanOrEqual(budget);
      // Scratch grows with the micro-batch, so slots are compared at the same one.
      if (made.ubatchTokens === 512) {
        const slots = (made.streaming?.classes ?? []).reduce((sum, one) => sum + one.slotCount, 0);
        expect(slots).toBeGreaterThanOrEqual(slotsBefore);
        slotsBefore = slots;
      }
      for (const one of made.streaming?.classes ?? []) {
        expect(one.policy.pinnedSlots).toBeLessThan(one.slotCount);
        expect(one.slotBytes).toBeGreaterThanOrEqual(one.strideBytes);
      }
    }
    expect(slotsBefore).toBeGreaterThan(0);
  });

  test("refuses with the bytes that are missing", () => {
    const model = modelOf(kind);
    expect(() => plan(model, 50e6)).toThrow(/too few: close programs/);
    expect(() => plan(model, 100.2e6, { mode: "resident" })).toThrow(/let it stream/);
    try {
      plan(model, 50e6);
    } catch (error) {
      expect(error).toBeInstanceOf(HypuraError);
      expect((error as HypuraError).code).toBe("not-enough-memory");
    }
  });
});

test("a plan survives JSON, and the same values give the same plan", () => {
  const model = modelOf("tiny-mixtral");
  const one = plan(model, 8e9, { mode: "stream" });
  expect(JSON.parse(JSON.stringify(one))).toEqual(one);
  expect(plan(model, 8e9, { mode: "stream" })).toEqual(one);
});

test("context: asked for, clamped to the training, halved where memory is short", () => {
  const model = modelOf("tiny-llama");
  const trained = model.trainedContextTokens;
  expect(plan(model, 8e9, { contextTokens: 300 }).contextTokens).toBe(300);
  expect(plan(model, 8e9, { contextTokens: trained * 2 }).contextTokens).toBe(trained);
  expect(plan(model, 8e9).contextTokens).toBe(Math.min(trained, 4096));
});

// ---- the page cache -----------------------------------------------------------------------------------------------

/** Most of this model is a table of which a token reads one row. */
const tableModel = describeShape({
  architecture: "llama",
  layers: 8,
  embd: 1024,
  heads: 8,
  kvHeads: 2,
  ff: 4096,
  vocab: 2_000_000,
});

describe("what tokens hardly touch may stay in the file", () => {
  const table = tableModel.tensors.find((tensor) => tensor.name === "token_embd.weight");
  const tableBytes = table?.sizeBytes ?? 0;
  const needed = totalBytes(plan(tableModel, 64e9).memory);
  /** Half of the table does not fit. */
  const availableBytes = ((needed - tableBytes / 2) * 16) / 15;

  test("mapped, with nothing read again, instead of streamed", () => {
    const made = plan(tableModel, availableBytes);
    expect(made).toMatchObject({ mode: "mmap", loadMode: "mmap", streaming: null, repack: false });
    expect(made.tensors.filter((tensor) => tensor.tier === "nvme").map((tensor) => tensor.name)).toEqual([
      "token_embd.weight",
    ]);
    expect(totalBytes(made.memory)).toBe(needed - tableBytes);
    expect(made.estimate.tokenBytes.read).toBe(0);
  });

  test("not under --memory, whose limit mapped pages would pass, and not when all of it fits", () => {
    expect(() => plan(tableModel, 64e9, { memoryBytes: needed - tableBytes / 2 })).toThrow(/too few/);
    expect(plan(tableModel, 64e9).mode).toBe("full-resident");
  });

  test("not when what tokens compute on does not fit", () => {
    expect(() => plan(tableModel, ((needed - tableBytes) * 16) / 15)).toThrow(/too few/);
  });
});

// ---- what a person asks for ---------------------------------------------------------------------------------------

test("every choice has a reason, and sizes that were asked for say so", () => {
  const model = modelOf("tiny-mixtral");
  const made = plan(model, 8e9, { mode: "stream", threads: 3, contextTokens: 500, kvType: "q8_0" });
  const said = Object.fromEntries(made.choices.map((choice) => [choice.name, choice]));
  expect(made.choices.every((choice) => choice.reason !== "" && choice.value !== "")).toBe(true);
  for (const name of ["mode", "threads", "context", "context type"]) {
    expect([name, said[name]?.reason]).toEqual([name, "asked for"]);
  }
  expect(Object.keys(said)).toEqual(
    expect.arrayContaining(["pool", "slots", "lookahead", "reader", "ubatch"]),
  );
});

test("a KV type that a head does not fit is refused", () => {
  const model = describeShape({
    architecture: "llama",
    layers: 2,
    embd: 512,
    heads: 16,
    kvHeads: 16,
    headLength: 80,
    ff: 512,
    vocab: 512,
  });
  expect(() => plan(model, 8e9, { kvType: "q8_0" })).toThrow(
    /packs 32 numbers and the heads of this model have 80/,
  );
  expect(plan(model, 8e9, { kvType: "bf16" }).kvTypeK).toBe("bf16");
});

test("another shape of reads is taken only where this disk was measured to give a twentieth more", () => {
  const model = shapeModel("llama-70b");
  const box = machineOf(machines["ci-24g"]);
  const storage = box.profile?.storage[0];
  if (box.profile === null || storage === undefined) throw new Error("the machine has a profile");
  const withBest = (bytesPerSecond: number): Machine => ({
    ...box,
    profile: {
      ...(box.profile as NonNullable<Machine["profile"]>),
      storage: [
        {
          ...storage,
          reads: [
            ...storage.reads,
            { readBytes: 4_194_304, depth: 16, bytesPerSecond, latencySeconds: { p50: 1e-3, p99: 1e-2 } },
          ],
          bestBytesPerSecond: bytesPerSecond,
          best: { readBytes: 4_194_304, depth: 16 },
        },
      ],
    },
  });
  const reader = (machine: Machine) => makePlan({ name: "m", files: [], model }, machine).streaming?.reader;
  expect(reader(box)).toMatchObject({ threads: 8, pieceBytes: 1_048_576 });
  expect(reader(withBest(1.04 * 1.6e9))).toMatchObject({ threads: 8, pieceBytes: 1_048_576 });
  expect(reader(withBest(1.5 * 1.6e9))).toMatchObject({ threads: 16, pieceBytes: 4_194_304 });
});

test("a stride of not much more than a piece is read in one go", () => {
  expect(usualReader(900_000)).toEqual({ threads: 8, pieceBytes: 1_048_576 });
  // Wherever in a page it begins: 1152 KiB and a page.
  expect(usualReader(1_179_648)).toEqual({ threads: 8, pieceBytes: 1_183_744 });
  expect(usualReader(2_097_152)).toEqual({ threads: 8, pieceBytes: 1_048_576 });
  expect(usualReader(33_000_000)).toEqual({ threads: 8, pieceBytes: 1_048_576 });
});

test("as few reads are done early as keep the disk busy", () => {
  const withDisk = (bytesPerSecond: readonly number[]): Machine => {
    const reads = bytesPerSecond.map((speed, i) => ({
      readBytes: 1_048_576,
      depth: 2 ** i,
      bytesPerSecond: speed,
      latencySeconds: { p50: 1e-3, p99: 2e-3 },
    }));
    const profile = { storage: [{ reads, bestBytesPerSecond: Math.max(...bytesPerSecond) }] };
    return { ...machine(8e9), profile } as unknown as Machine;
  };
  const depth = (bytesPerSecond: readonly number[], threads = 8): number =>
    prefetchDepthOf(withDisk(bytesPerSecond), { threads, pieceBytes: 1_048_576 }, 1_048_576);
  expect(depth([2.5e9, 2.6e9, 2.6e9, 2.6e9])).toBe(2); // one is enough, but for the moment between two
  expect(depth([0.5e9, 1e9, 2e9, 2.1e9])).toBe(4);
  expect(depth([0.5e9, 1e9, 2e9, 4e9])).toBe(7); // between the depths that were measured
  expect(depth([0.5e9, 1e9, 2e9, 4e9], 1)).toBe(1);
  expect(prefetchDepthOf(machine(8e9), { threads: 8, pieceBytes: 1_048_576 }, 1_048_576)).toBe(2);
});

test("what nobody waits for yet is bounded where experts are predicted, and nowhere else", () => {
  const streaming = (shape: ShapeName) =>
    makePlan({ name: shape, files: [], model: shapeModel(shape) }, machineOf(machines["laptop-8g"]))
      .streaming;
  const moe = streaming("qwen3-30b");
  expect(moe?.prediction).not.toBeNull();
  expect(moe?.reader.prefetchDepth).toBeWithin(2, 9);
  const dense = streaming("qwen2.5-14b");
  expect(dense?.lookaheadStrides).toBeGreaterThan(0);
  expect(dense?.reader.prefetchDepth).toBe(0);
});

test("a plan that was made before is followed as it is, with the paths of the files at hand", () => {
  const model = modelOf("tiny-mixtral");
  const made = plan(model, 8e9, { mode: "stream", contextTokens: 333 });
  const files = [{ path: "elsewhere.gguf", sizeBytes: 1 }];
  const again = makePlan({ name: "m", files, model }, machine(1e6), { ...noLimits, plan: made });
  expect(again).toEqual({ ...made, files });
  expect(() =>
    makePlan({ name: "m", files, model: modelOf("tiny-llama") }, machine(8e9), { ...noLimits, plan: made }),
  ).toThrow(/made for another model/);
});

describe("GPUs", () => {
  const model = shapeModel("llama-8b");
  const files = [{ path: "m.gguf", sizeBytes: 1 }];
  const box = machineOf(machines["cuda-24g-64g"]);
  const on = (limits: Partial<PlanLimits>, on: Machine = box) =>
    makePlan({ name: "m", files, model }, on, { ...noLimits, ...limits });

  test("take whole layers from the end, and --gpu-memory says how much of them", () => {
    const whole = on({});
    expect([whole.mode, whole.gpuLayers]).toEqual(["full-resident", 33]);
    const part = on({ gpuMemoryBytes: 3e9 });
    expect(part.mode).toBe("partial-gpu");
    expect(part.gpuLayers).toBeGreaterThan(5);
    const first = 33 - part.gpuLayers;
    for (const tensor of model.tensors) {
      if (tensor.layer !== null) {
        expect([tensor.name, part.tensors[tensor.index]?.tier]).toEqual([
          tensor.name,
          tensor.layer >= first ? "gpu" : "ram",
        ]);
      }
    }
    expect(on({ gpuMemoryBytes: 0 })).toMatchObject({ gpuLayers: 0, gpuMemory: null, repack: true });
  });

  test("inside a processor count only where there is no other", () => {
    const [gpu] = box.devices;
    if (gpu === undefined) throw new Error("the machine has a GPU");
    const igpu = { ...gpu, type: "igpu" as const, isUnified: true, freeBytes: 8e9 };
    expect(gpuBudgetOf({ ...box, devices: [gpu, igpu] }, noLimits)).toEqual(gpuBudgetOf(box, noLimits));
    expect(gpuBudgetOf({ ...box, devices: [igpu] }, noLimits)).toEqual({ bytes: 7.5e9, isUnified: true });
    expect(gpuBudgetOf({ ...box, devices: [{ ...gpu, type: "cpu" }] }, noLimits)).toBeNull();
  });
});

// The plan is pure: the same values give the same plan, it fits its budget, places every byte once, and refuses with
// a sentence where it cannot.

import { describe, expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import { parseGguf } from "../../src/gguf";
import type { Machine } from "../../src/machine";
import { describeModel, type Model } from "../../src/model";
import { makePlan, noLimits, type Plan, type PlanLimits, totalBytes } from "../../src/plan";
import { ggufBytes } from "../fixtures/gguf-writer";
import { tinyDeepseek2, tinyGptOss, tinyLlama, tinyMixed, tinyMixtral, tinyQwen3Moe } from "../fixtures/tiny";

function machine(availableBytes: number): Machine {
  return {
    computeCores: 4,
    hasDirectLoad: true,
    memory: { totalBytes: 64e9, availableBytes, limitedBy: null },
    devices: [],
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

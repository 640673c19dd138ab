// Which routers may be asked early, and when that is worth it.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Model } from "../../src/model";
import { openModelFile } from "../../src/modelfile";
import type { SlotClass, Streaming } from "../../src/plan";
import { choosePrediction, earlyShareOf, predictionBytes, predictionOf } from "../../src/plan-prediction";
import { makeFixture } from "../fixtures";

const folder = mkdtempSync(join(tmpdir(), "hypura-prediction-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

async function modelOf(kind: string): Promise<Model> {
  const [path = ""] = await makeFixture(kind, join(folder, `${kind}.gguf`));
  return openModelFile(path).model;
}

/** Every expert streams, in one class. */
function streamedOf(model: Model): Streaming["tensors"] {
  return model.strides.map(({ tensorIndex, strideCount }) => ({ tensorIndex, strideCount, classIndex: 0 }));
}

function pool(slotCount: number): readonly SlotClass[] {
  return [{ slotCount } as SlotClass];
}

describe("prediction", () => {
  test("asks each router but the first layer's, by what it computes and what it asks for", async () => {
    const model = await modelOf("tiny-qwen3moe");
    const streamed = streamedOf(model);
    const prediction = predictionOf(model, streamed);
    const name = (tensorIndex = -1): string => model.tensors[tensorIndex]?.name ?? "";
    expect(prediction?.experts).toBe(model.expertUsedCount);
    expect(prediction?.routers.length).toBe(model.layerCount - 1);
    for (const [i, router] of (prediction?.routers ?? []).entries()) {
      const layer = i + 1;
      expect(name(router.tensorIndex)).toBe(`blk.${layer}.ffn_gate_inp.weight`);
      expect(name(router.normIndex)).toBe(`blk.${layer}.ffn_norm.weight`);
      expect(name(router.normBeforeIndex)).toBe(`blk.${layer - 1}.ffn_norm.weight`);
      expect(name(streamed[router.after]?.tensorIndex)).toMatch(
        new RegExp(`^blk\\.${layer - 1}\\.ffn_(gate|up)_exps\\.weight$`),
      );
      expect(router.asked.map((place) => name(streamed[place]?.tensorIndex)).sort()).toEqual(
        ["down", "gate", "up"].map((one) => `blk.${layer}.ffn_${one}_exps.weight`),
      );
    }
  });

  test.each(["tiny-gpt-oss", "tiny-lfm2moe"])(
    "%s: a bias decides too, so nothing is predicted",
    async (kind) => {
      const model = await modelOf(kind);
      const { prediction, choice } = choosePrediction(model, streamedOf(model), pool(1_000_000_000));
      expect(predictionOf(model, streamedOf(model))).toBeNull();
      expect(prediction).toBeNull();
      expect(choice).toMatchObject({ value: "off" });
    },
  );

  test("dense models have no routers, and no choice", async () => {
    const model = await modelOf("tiny-llama");
    expect(choosePrediction(model, streamedOf(model), pool(4))).toEqual({ prediction: null, choice: null });
    expect(predictionBytes(model)).toBe(0);
  });

  test("not where the pool holds everything, nor where it holds little more than a layer asks for", async () => {
    const model = await modelOf("tiny-qwen3moe");
    const streamed = streamedOf(model);
    const all = streamed.reduce((sum, one) => sum + one.strideCount, 0);
    const ofLayer = 3 * model.expertUsedCount;
    expect(choosePrediction(model, streamed, pool(all)).choice?.reason).toContain("every expert");
    expect(choosePrediction(model, streamed, pool(all - 1)).prediction).not.toBeNull();
    expect(choosePrediction(model, streamed, pool(4 * ofLayer)).prediction).not.toBeNull();
    expect(choosePrediction(model, streamed, pool(4 * ofLayer - 1)).choice?.reason).toContain("little more");
  });

  test("only where routers can be asked early is less waited for", async () => {
    expect(earlyShareOf(await modelOf("tiny-qwen3moe"))).toBeWithin(0.5, 1);
    expect(earlyShareOf(await modelOf("tiny-gpt-oss"))).toBe(0);
    expect(earlyShareOf(await modelOf("tiny-llama"))).toBe(0);
  });

  test("the copies are half of the routers", async () => {
    const model = await modelOf("tiny-qwen3moe");
    const routers = model.tensors.filter(({ name }) => name.endsWith("ffn_gate_inp.weight"));
    expect(predictionBytes(model)).toBe(routers.reduce((sum, one) => sum + one.sizeBytes, 0) / 2);
    expect(predictionBytes(model)).toBeGreaterThan(0);
  });
});

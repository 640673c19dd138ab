// Experts that are read before their router has chosen them: the answer is the same, most predictions are right where the
// routers are the right ones, and predictions that are wrong stop.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openEngine } from "../../src/engine";
import { openModelFile } from "../../src/modelfile";
import type { Plan, Prediction } from "../../src/plan";
import type { StreamingCounters } from "../../src/streaming";
import { makeFixture } from "../fixtures";
import { planFor, someTokens, withPool, withPrediction } from "../golden/compare";

const folder = mkdtempSync(join(tmpdir(), "hypura-prediction-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let path = "";
beforeAll(async () => {
  [path = ""] = await makeFixture("tiny-qwen3moe", join(folder, "model.gguf"));
});

function planned(prediction: (all: Prediction) => Prediction | null): Plan {
  const plan = withPrediction(
    withPool(planFor(path, { mode: "stream", threads: 1 }), "quarter", "lfu-decay"),
  );
  const streaming = plan.streaming as NonNullable<Plan["streaming"]>;
  return {
    ...plan,
    streaming: { ...streaming, prediction: prediction(streaming.prediction as Prediction) },
  };
}

interface Told {
  readonly tokens: readonly number[];
  readonly counters: StreamingCounters;
}

async function tell(plan: Plan, count: number): Promise<Told> {
  await using engine = await openEngine(plan);
  const body = {
    prompt: someTokens(5),
    n_predict: count,
    temperature: 1,
    seed: 3,
    ignore_eos: true,
    return_tokens: true,
    stream: false,
  };
  let tokens: readonly number[] = [];
  for await (const { data } of engine.request("POST /completion", body)) {
    tokens = (data as { readonly tokens: readonly number[] }).tokens;
  }
  return { tokens, counters: (await engine.streaming()) as StreamingCounters };
}

test("predicted experts are read early, and the answer is the same", async () => {
  const { expertUsedCount, expertCount } = openModelFile(path).model;
  const waited = await tell(
    planned(() => null),
    60,
  );
  const predicted = await tell(
    planned((all) => all),
    60,
  );
  expect(waited.tokens.length).toBe(60);
  expect(predicted.tokens).toEqual(waited.tokens);
  expect([waited.counters.predictedExperts, waited.counters.prefetchReads]).toEqual([0, 0]);
  const { predictedExperts, rightExperts, prefetchReads, misses } = predicted.counters;
  expect(prefetchReads).toBeGreaterThan(0);
  expect(misses).toBeLessThan(waited.counters.misses);
  // Far better than guessing without looking.
  expect(rightExperts / predictedExperts).toBeGreaterThan((2 * expertUsedCount) / expertCount);
  expect(rightExperts).toBeLessThanOrEqual(predictedExperts);
});

test("where most predictions are wrong they end, and the answer is still the same", async () => {
  // Each layer is given the router of another one.
  const wrong = planned((all) => ({
    ...all,
    routers: all.routers.map((router, i) => ({
      ...router,
      tensorIndex: all.routers.at(-1 - i)?.tensorIndex ?? router.tensorIndex,
    })),
  }));
  const waited = await tell(
    planned(() => null),
    400,
  );
  const { tokens, counters } = await tell(wrong, 400);
  expect(tokens).toEqual(waited.tokens);
  expect(2 * counters.rightExperts).toBeLessThan(counters.predictedExperts);
  const { expertUsedCount, layerCount } = openModelFile(path).model;
  expect(counters.predictedExperts).toBeLessThan(0.5 * 400 * expertUsedCount * (layerCount - 1));
});

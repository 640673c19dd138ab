// Streamed weights compute bit for bit what resident ones do: every fixture, every size of pool, every cache policy,
// short and long prompts, threads and micro-batches. A seeded sample in the normal run (each fixture meets each pool
// and each policy once), the whole matrix when HYPURA_SOAK is "1" (2,112 cases, 12 minutes on two cores).

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Plan } from "../../src/plan";
import { type FixtureOptions, makeFixture } from "../fixtures";
import { openRandom } from "../fixtures/random";
import {
  compareLogits,
  hasLogits,
  type PolicyKind,
  type PoolSize,
  planFor,
  policyKinds,
  poolSizes,
  someTokens,
  withPool,
  withPrediction,
} from "./compare";

const subjects: readonly {
  readonly name: string;
  readonly kind: string;
  readonly options?: FixtureOptions;
}[] = [
  { name: "dense llama", kind: "tiny-llama" },
  { name: "dense llama, split in three", kind: "tiny-llama", options: { split: 3, seed: 2 } },
  { name: "mixtral", kind: "tiny-mixtral" },
  { name: "qwen3moe", kind: "tiny-qwen3moe" },
  { name: "qwen3moe, split in four", kind: "tiny-qwen3moe", options: { split: 4, seed: 3 } },
  { name: "fused gate and up", kind: "tiny-fused" },
  { name: "gpt-oss", kind: "tiny-gpt-oss" },
  { name: "deepseek2", kind: "tiny-deepseek2" },
  { name: "lfm2moe", kind: "tiny-lfm2moe" },
  { name: "mixed types, nothing at a page", kind: "tiny-mixed" },
  { name: "experts with a kernel that wants them whole", kind: "tiny-mixtral", options: { type: "iq4_xs" } },
];
const promptLengths = [1, 17, 300] as const;
const threadCounts = [1, 2] as const;
const ubatches = [32, 512] as const;

/** Threads wait for each other by spinning: where others want the cores, a step of two of them takes a second. */
function stepsOf(threads: number): number {
  return threads === 1 ? 6 : 3;
}

interface Case {
  readonly subject: number;
  readonly pool: PoolSize;
  readonly policy: PolicyKind;
  readonly promptTokens: number;
  readonly threads: number;
  readonly ubatch: number;
  /** Experts are read before their router has chosen them. */
  readonly predicts: boolean;
}

function wholeMatrix(): readonly Case[] {
  return subjects.flatMap((_, subject) =>
    poolSizes.flatMap((pool) =>
      policyKinds.flatMap((policy) =>
        promptLengths.flatMap((promptTokens) =>
          threadCounts.flatMap((threads) =>
            ubatches.map((ubatch) => ({
              subject,
              pool,
              policy,
              promptTokens,
              threads,
              ubatch,
              predicts: (threads + ubatch + promptTokens) % 4 < 2,
            })),
          ),
        ),
      ),
    ),
  );
}

/** Each fixture with each pool, with each policy, and once with two threads; what else varies is drawn. */
function sample(seed: number): readonly Case[] {
  const random = openRandom(seed);
  return subjects.flatMap((_, subject) => {
    const policies = random.permutation(policyKinds.length);
    return poolSizes.map((pool, i) => ({
      subject,
      pool,
      policy: policyKinds[policies[i] as number] as PolicyKind,
      promptTokens: random.pick(promptLengths),
      threads: i === subject % poolSizes.length ? 2 : 1,
      ubatch: random.pick(ubatches),
      predicts: i !== subject % poolSizes.length,
    }));
  });
}

const cases = process.env["HYPURA_SOAK"] === "1" ? wholeMatrix() : sample(20_251_121);

function titleOf({ subject, pool, policy, promptTokens, threads, ubatch, predicts }: Case): string {
  return `${predicts ? "predicted, " : ""}${subjects[subject]?.name}: pool ${pool}, ${policy}, prompt ${promptTokens}, threads ${threads}, ubatch ${ubatch}`;
}

describe.skipIf(!hasLogits())("logits of streamed weights equal those of resident ones", () => {
  const plans: Plan[] = [];
  let folder = "";

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), "hypura-golden-"));
    for (const [i, { kind, options }] of subjects.entries()) {
      const [first = ""] = await makeFixture(kind, join(folder, `${i}.gguf`), options ?? {});
      plans.push(planFor(first, { mode: "stream" }));
    }
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test.each(cases.map((one) => [titleOf(one), one] as const))("%s", async (_, one) => {
    const pooled = withPool(plans[one.subject] as Plan, one.pool, one.policy);
    const plan: Plan = {
      ...(one.predicts ? withPrediction(pooled) : pooled),
      decodeThreads: one.threads,
      prefillThreads: one.threads,
      ubatchTokens: one.ubatch,
      batchTokens: one.ubatch,
    };
    const steps = stepsOf(one.threads);
    const verdict = await compareLogits(plan, someTokens(one.promptTokens), steps);
    expect(verdict).toEqual({ ...verdict, steps, engineSteps: steps, equalSteps: steps });
  });
});

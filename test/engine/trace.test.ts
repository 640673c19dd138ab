// Replay equals reality: what a traced engine counted is what the replay of its trace gives, each count of each class,
// for every policy, sizes of pool from one slot up, prompts that go in waves, and reads ahead. And a trace that cannot
// be finished leaves the answer alone.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, openEngine } from "../../src/engine";
import type { Plan } from "../../src/plan";
import { judge, openTrace, parseCandidate, policyNames, replayRecorded } from "../../src/replay";
import { traceHeader } from "../../src/trace";
import { makeFixture } from "../fixtures";
import {
  type PolicyKind,
  planFor,
  policyKinds,
  someTokens,
  withPool,
  withPrediction,
} from "../golden/compare";

const kinds = ["tiny-llama", "tiny-mixtral", "tiny-qwen3moe", "tiny-mixed"] as const;
const sizes = ["minimum", "quarter", "half"] as const;

const folder = mkdtempSync(join(tmpdir(), "hypura-trace-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const models = new Map<string, string>();
beforeAll(async () => {
  for (const kind of kinds) {
    const [path = ""] = await makeFixture(kind, join(folder, `${kind}.gguf`));
    models.set(kind, path);
  }
});

function tracedPlan(kind: string, size: (typeof sizes)[number], policy: PolicyKind): Plan {
  const pooled = withPool(planFor(models.get(kind) ?? "", { mode: "stream", threads: 1 }), size, policy);
  const plan = policy === "lru" || policy === "lfu-decay" ? withPrediction(pooled) : pooled;
  const streaming = plan.streaming as NonNullable<Plan["streaming"]>;
  return {
    ...plan,
    ubatchTokens: 64,
    batchTokens: 64,
    streaming: { ...streaming, lookaheadStrides: policy === "pinned-cyclic" ? 4 : 0 },
  };
}

async function generate(engine: Engine, promptTokens: number, seed: number): Promise<void> {
  const body = {
    prompt: someTokens(promptTokens).map((token) => token + seed),
    n_predict: 10,
    temperature: 1,
    seed,
    ignore_eos: true,
    cache_prompt: false,
    stream: false,
  };
  for await (const _ of engine.request("POST /completion", body)) {
    // only the reads matter
  }
}

/** Runs two requests with a trace; gives what the engine counted at its end. */
async function record(plan: Plan, path: string) {
  const streaming = plan.streaming as NonNullable<Plan["streaming"]>;
  await using engine = await openEngine(plan, {
    trace: { path, header: JSON.stringify(traceHeader(plan, streaming)) },
    onWarning: (text) => {
      throw new Error(text);
    },
  });
  await generate(engine, 200, 1);
  await generate(engine, 3, 2);
  const counters = await engine.streaming();
  if (counters === null) {
    throw new Error("nothing streams");
  }
  return counters;
}

const cases = kinds.flatMap((kind) =>
  sizes.flatMap((size) => policyKinds.map((policy) => [kind, size, policy] as const)),
);

describe("the replay gives the engine's own counts", () => {
  let waves = 0;
  let late = 0;
  test.each(cases)("%s, pool %s, %s", async (kind, size, policy) => {
    const path = join(folder, "exact.trace");
    const counters = await record(tracedPlan(kind, size, policy), path);
    expect(existsSync(`${path}.part`)).toBe(false);
    const { outcome, isExact } = await replayRecorded(openTrace(path));
    const sum = (key: "hits" | "lateHits" | "misses" | "evictions") =>
      outcome.classes.reduce((total, one) => total + one[key], 0);
    expect(isExact).toBe(true);
    expect([sum("hits"), sum("misses")]).not.toEqual([0, 0]);
    // At close reads ahead may still end, so what is counted then may be more than just before.
    const isAhead = policy === "pinned-cyclic";
    expect([sum("hits"), sum("lateHits"), sum("misses"), isAhead ? 0 : sum("evictions")]).toEqual([
      counters.hits,
      counters.lateHits,
      counters.misses,
      isAhead ? 0 : counters.evictions,
    ]);
    expect(outcome.passes.length).toBe(counters.passes);
    waves += counters.waves;
    late += counters.lateHits;
  });

  test("the cases had waves and reads ahead", () => {
    expect(waves).toBeGreaterThan(100);
    expect(late).toBeGreaterThan(100);
  });
});

describe("judging", () => {
  test("no policy reads less than the optimum, and a pool for all reads nothing more", async () => {
    const path = join(folder, "judge.trace");
    await record(tracedPlan("tiny-qwen3moe", "quarter", "lfu-decay"), path);
    const trace = openTrace(path);
    const all = trace.header.classes.reduce((sum, one) => sum + one.slotBytes * 10_000, 0);
    const small = trace.header.classes.reduce((sum, one) => sum + one.slotBytes * one.slotCount, 0);
    const candidates = [...policyNames, "lfu-decay:16"].map((name) => {
      const candidate = parseCandidate(name);
      if (candidate === null) throw new Error(name);
      return candidate;
    });
    const recorded = await replayRecorded(trace);
    const judgement = await judge(trace, recorded, { candidates, poolBytes: [small, all] });
    expect(judgement.steps).toBeGreaterThan(5);
    expect(judgement.rows.map((row) => row.candidate.label)).toEqual([...policyNames, "lfu-decay:16"]);
    const [optimum] = judgement.rows;
    for (const row of judgement.rows) {
      expect(row.cells[0]?.hitRate).toBeLessThanOrEqual((optimum?.cells[0]?.hitRate ?? 0) + 1e-12);
      expect(row.cells[1]?.readBytesPerStep).toBe(optimum?.cells[1]?.readBytesPerStep ?? -1);
    }
    expect(judgement.choice?.policy).not.toBe("belady");
  });

  test("a trace that was cut off has no counts to compare, and is judged all the same", async () => {
    const path = join(folder, "cut.trace");
    await record(tracedPlan("tiny-mixtral", "half", "lru"), path);
    truncateSync(path, readFileSync(path).byteLength - 40);
    const { outcome, isExact } = await replayRecorded(openTrace(path));
    expect([isExact, outcome.cutOff, outcome.recorded]).toEqual([null, true, null]);
    expect(outcome.passes.length).toBeGreaterThan(5);
  });

  test("what is no trace, or a damaged one, is said", async () => {
    const path = join(folder, "damaged.trace");
    await record(tracedPlan("tiny-mixtral", "half", "lru"), path);
    const bytes = readFileSync(path);
    bytes.fill(0xff, bytes.byteLength - 200, bytes.byteLength - 100);
    writeFileSync(path, bytes);
    await expect(replayRecorded(openTrace(path))).rejects.toThrow(/damaged near byte|contradicts this cache/);
    bytes[20] = 0;
    writeFileSync(path, bytes);
    expect(() => openTrace(path)).toThrow(/damaged/);
    writeFileSync(path, "GGUF and more");
    expect(() => openTrace(path)).toThrow(/is no trace/);
    expect(() => openTrace(join(folder, "none.trace"))).toThrow(/there is no trace/);
  });
});

describe("a trace that cannot be written", () => {
  test("is refused before anything is loaded", async () => {
    const path = join(folder, "no", "such", "folder", "x.trace");
    await expect(record(tracedPlan("tiny-mixtral", "half", "lru"), path)).rejects.toThrow(
      /--trace another path/,
    );
  });
});

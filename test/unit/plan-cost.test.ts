// The cost model by hand: curves, bandwidths and seconds against figures worked out beside it, no number where nothing
// was measured, and what earlier runs change.

import { describe, expect, test } from "bun:test";
import type { Machine, StorageSpeed } from "../../src/machine";
import { type MeasuredRun, makePlan, noLimits, type Plan, type PlanLimits, runOf } from "../../src/plan";
import {
  bandwidthAt,
  betweenPassesSeconds,
  type HitCurve,
  hitRateAt,
  notMeasured,
  publishedHitCurve,
  speedsOf,
} from "../../src/plan-cost";
import { hitCurveOf, modelKeyOf } from "../../src/plan-history";
import { describeShape, machineOf, machines, shapeModel } from "./plan-family";

function plan(
  name: Parameters<typeof shapeModel>[0],
  machine: Machine,
  limits: Partial<PlanLimits> = {},
): Plan {
  const model = shapeModel(name);
  return makePlan({ name, files: [], model }, machine, { ...noLimits, ...limits });
}

describe("the curve of hits", () => {
  test("the published one goes through what was published, within what it varies", () => {
    for (const [share, low, high] of [
      [0.125, 0.5, 0.6],
      [0.17, 0.55, 0.71],
      [0.25, 0.6, 0.75],
    ] as const) {
      expect(hitRateAt(publishedHitCurve, share)).toBeGreaterThan(low);
      expect(hitRateAt(publishedHitCurve, share)).toBeLessThan(high);
    }
  });

  test("goes through its points, rises, and never hits less than random routing", () => {
    const curve: HitCurve = {
      kind: "recorded",
      points: [
        { share: 0.11, hitRate: 0.624 },
        { share: 0.24, hitRate: 0.871 },
      ],
    };
    expect(hitRateAt(curve, 0.11)).toBeCloseTo(0.624, 6);
    expect(hitRateAt(curve, 0.24)).toBeCloseTo(0.871, 6);
    let before = 0;
    for (let share = 0; share <= 1.001; share += 0.01) {
      const rate = hitRateAt(curve, share);
      expect(rate).toBeGreaterThanOrEqual(Math.max(before, Math.min(1, share)) - 1e-12);
      expect(rate).toBeLessThanOrEqual(1);
      before = rate;
    }
    expect([hitRateAt(curve, 0), hitRateAt(curve, 1), hitRateAt(curve, 2)]).toEqual([0, 1, 1]);
  });

  test("without a point it is the share: random routing", () => {
    expect(hitRateAt({ kind: "assumed", points: [] }, 0.3)).toBeCloseTo(0.3, 9);
  });
});

test("bandwidth is that of the nearest size, between depths", () => {
  const read = (readBytes: number, depth: number, bytesPerSecond: number) => ({
    readBytes,
    depth,
    bytesPerSecond,
    latencySeconds: { p50: 1e-4, p99: 1e-3 },
  });
  const storage: StorageSpeed = {
    volume: "x",
    measuredAt: "2026-11-01T00:00:00Z",
    direct: true,
    reads: [read(65_536, 1, 100), read(65_536, 16, 400), read(1_048_576, 1, 1000), read(1_048_576, 16, 2000)],
    bestBytesPerSecond: 2000,
    best: { readBytes: 1_048_576, depth: 16 },
  };
  expect(bandwidthAt(storage, 1_000_000, 1)).toBe(1000);
  expect(bandwidthAt(storage, 1_000_000, 4)).toBe(1500);
  expect(bandwidthAt(storage, 1_000_000, 99)).toBe(2000);
  expect(bandwidthAt(storage, 50_000, 16)).toBe(400);
});

describe("seconds of a token", () => {
  test("resident: its bytes at the speed of their products", () => {
    const model = shapeModel("llama-8b");
    const made = plan("llama-8b", machineOf(machines["ci-24g"]));
    expect(made.mode).toBe("full-resident");
    const bytes = model.touchedBytesPerToken;
    // 256 tokens of context are read besides.
    const seconds = (bytes + 256 * 131_072) / 9e9 + betweenPassesSeconds;
    expect(1 / (made.estimate.decodeTokensPerSecond ?? 0)).toBeCloseTo(seconds, 3);
  });

  test("a dense model on a slow disk: what is not pinned, at the disk's speed", () => {
    const made = plan("llama-70b", machineOf(machines["ci-24g"]));
    const { tokenBytes, decodeTokensPerSecond: rate, bound } = made.estimate;
    const nvme = made.tensors.reduce((sum, one) => sum + (one.tier === "nvme" ? one.sizeBytes : 0), 0);
    const pinned = (made.streaming?.classes ?? []).reduce(
      (sum, one) => sum + one.policy.pinnedSlots * one.strideBytes,
      0,
    );
    expect(tokenBytes.read).toBeCloseTo(nvme - pinned, -1);
    expect(1 / (rate ?? 0)).toBeCloseTo(tokenBytes.read / 1.6e9, 3);
    expect(bound).toMatchObject({ by: "storage" });
  });

  test("experts: reading hides behind computing only within a layer, and the bound is not passed", () => {
    const made = plan("qwen3-30b", machineOf(machines["laptop-8g"]));
    const { tokenBytes, decodeTokensPerSecond: rate, bound } = made.estimate;
    const reading = tokenBytes.read / 2.2e9;
    const computing = tokenBytes.touched / 25e9;
    expect(1 / (rate ?? 0)).toBeGreaterThanOrEqual(Math.max(reading, computing) * 0.999_999);
    // Depth-limited reads of a layer or two may be slower than the best, but not by half.
    expect(1 / (rate ?? 0)).toBeLessThan(1.6 * (reading + computing));
    expect(bound?.tokensPerSecond).toBeCloseTo(1 / reading, 1);
  });

  test("fewer threads than were measured compute their share", () => {
    const all = plan("llama-8b", machineOf(machines["workstation-512g"]));
    const half = plan("llama-8b", machineOf(machines["workstation-512g"]), { threads: 16 });
    const ratio = (all.estimate.decodeTokensPerSecond ?? 0) / (half.estimate.decodeTokensPerSecond ?? 1);
    expect(ratio).toBeGreaterThan(1.9);
    expect(ratio).toBeLessThan(2.01);
  });

  test("types that were not measured take the median, and the note says which", () => {
    const model = describeShape({
      architecture: "llama",
      layers: 2,
      embd: 256,
      heads: 4,
      kvHeads: 2,
      ff: 1024,
      vocab: 512,
      mix: { base: "iq4_xs", better: "q4_K", output: "q6_K" },
    });
    expect(speedsOf(model, machineOf(machines["ci-24g"]), 2)?.missingTypes).toEqual(["iq4_xs"]);
    const made = makePlan({ name: "m", files: [], model }, machineOf(machines["ci-24g"]));
    expect(made.estimate.note).toMatch(/products of iq4_xs were not measured/);
  });
});

describe("rows", () => {
  const machine = machineOf(machines["ci-24g"]);
  type Product = NonNullable<Machine["profile"]>["products"][number];
  const withProducts = (change: (one: Product) => Partial<Product>): Machine =>
    machine.profile === null
      ? machine
      : {
          ...machine,
          profile: {
            ...machine.profile,
            products: machine.profile.products.map((one) => ({ ...one, ...change(one) })),
          },
        };
  const q8 = (rowElements: number, rowCount: number, form: "plain" | "repacked" | "experts" = "plain") => ({
    bytes: (rowElements * rowCount * 34) / 32,
    elements: rowElements * rowCount,
    ...{ rowElements, form },
  });

  test("of the measured lengths take what was measured, others lie on the line through the two", () => {
    const slow = withProducts(() => ({ decodeBytesPerSecond: 8e9, shortRowBytesPerSecond: 2e9 }));
    const speeds = speedsOf(shapeModel("llama-8b"), slow, machine.computeCores);
    const seconds = (rowElements: number): number =>
      speeds?.productSeconds("q8_0", q8(rowElements, 1000)) ?? 0;
    expect(seconds(512)).toBeCloseTo((512_000 * 34) / 32 / 2e9, 9);
    expect(seconds(4096)).toBeCloseTo((4_096_000 * 34) / 32 / 8e9, 9);
    expect(seconds(2304)).toBeCloseTo((seconds(512) + seconds(4096)) / 2, 9);
    expect(seconds(256)).toBeLessThan(seconds(512));
    expect(seconds(256)).toBeGreaterThan(seconds(512) / 2);
  });

  test("that were found faster than long ones cost what long ones do", () => {
    const noisy = withProducts(() => ({ decodeBytesPerSecond: 2e9, shortRowBytesPerSecond: 8e9 }));
    const speeds = speedsOf(shapeModel("llama-8b"), noisy, machine.computeCores);
    for (const rowElements of [256, 512, 1024, 14_336]) {
      const matrix = q8(rowElements, 100);
      expect(speeds?.productSeconds("q8_0", matrix)).toBeCloseTo(matrix.bytes / 2e9, 12);
    }
  });

  test("rearranged count where the plan rearranges and the type can be", () => {
    const fast = { decodeBytesPerSecond: 90e9, shortRowBytesPerSecond: 90e9 };
    const experts = { decodeBytesPerSecond: 180e9, shortRowBytesPerSecond: 180e9 };
    const repacked = { ...fast, prefillFlopsPerSecond: 1e13, experts };
    const changed = withProducts(({ typeName }) => ({ repacked: typeName === "q8_0" ? repacked : null }));
    const speeds = speedsOf(shapeModel("llama-8b"), changed, machine.computeCores);
    const seconds = (typeName: string, form: "plain" | "repacked" | "experts"): number =>
      speeds?.productSeconds(typeName, q8(1024, 1000, form)) ?? 0;
    expect(seconds("q8_0", "plain")).toBeCloseTo(10 * seconds("q8_0", "repacked"), 9);
    expect(seconds("q8_0", "repacked")).toBeCloseTo(2 * seconds("q8_0", "experts"), 9);
    expect(seconds("q4_0", "repacked")).toBe(seconds("q4_0", "plain"));

    const every = withProducts(() => ({ repacked }));
    const resident = plan("llama-8b", every);
    expect(resident.repack).toBe(true);
    const rate = (made: Plan): number => made.estimate.decodeTokensPerSecond ?? 0;
    expect(rate(resident)).toBeGreaterThan(5 * rate(plan("llama-8b", machine)));
    expect(resident.estimate.prefillTokensPerSecond).toBeGreaterThan(
      5 * (plan("llama-8b", machine).estimate.prefillTokensPerSecond ?? 0),
    );
    // What streams is computed as it lies in the file.
    const limits = { mode: "stream" } as const;
    expect(rate(plan("llama-8b", every, limits))).toBe(rate(plan("llama-8b", machine, limits)));
  });
});

describe("steps beside the products", () => {
  const slowSteps = (steps: Partial<NonNullable<Machine["profile"]>["steps"]>): Machine => {
    const machine = machineOf(machines["ci-24g"]);
    return machine.profile === null
      ? machine
      : { ...machine, profile: { ...machine.profile, steps: { ...machine.profile.steps, ...steps } } };
  };
  const more = (name: Parameters<typeof shapeModel>[0], machine: Machine): number => {
    const seconds = (on: Machine): number => plan(name, on).estimate.modelSeconds ?? 0;
    return seconds(machine) - seconds(machineOf(machines["ci-24g"]));
  };

  test("attention over 256 positions counts where it takes longer than reading them", () => {
    const { headCount, keyLength, layerCount } = shapeModel("llama-8b");
    const elements = headCount * keyLength * layerCount * 256;
    const reading = (256 * 131_072) / 9e9;
    expect(more("llama-8b", slowSteps({ attention: 1e-9 }))).toBeCloseTo(elements * 1e-9 - reading, 6);
    expect(more("llama-8b", slowSteps({ attention: reading / elements / 2 }))).toBeCloseTo(0, 9);
  });

  test("experts' answers are mixed in mixtures alone, rows are normed and added in all", () => {
    expect(more("llama-8b", slowSteps({ mixing: 1e-6 }))).toBe(0);
    const { embeddingLength, layerCount } = shapeModel("llama-8b");
    const rows = layerCount * 10 * embeddingLength;
    expect(more("llama-8b", slowSteps({ plain: 1e-9 }))).toBeCloseTo(rows * 1e-9, 6);
    const facts = shapeModel("qwen3-30b");
    const answers = facts.layerCount * facts.expertUsedCount * facts.embeddingLength;
    expect(more("qwen3-30b", slowSteps({ mixing: 1e-9 }))).toBeCloseTo(answers * 1e-9, 6);
  });
});

test("nothing measured: no number, and what to do", () => {
  for (const name of ["llama-8b", "llama-70b", "qwen3-30b"] as const) {
    const made = plan(name, {
      ...machineOf(machines["laptop-8g"]),
      profile: null,
      memory: machineOf(machines["ci-24g"]).memory,
    });
    const { decodeTokensPerSecond, prefillTokensPerSecond, bound, basis, note } = made.estimate;
    expect({ decodeTokensPerSecond, prefillTokensPerSecond, bound, basis, note }).toEqual({
      decodeTokensPerSecond: null,
      prefillTokensPerSecond: null,
      bound: null,
      basis: "none",
      note: notMeasured,
    });
  }
});

test("the disk not measured: a streamed plan has no number, a resident one has", () => {
  const machine = machineOf(machines["ci-24g"]);
  const { profile } = machine;
  const diskless = { ...machine, profile: profile === null ? null : { ...profile, storage: [] } };
  expect(plan("llama-70b", diskless).estimate).toMatchObject({ decodeTokensPerSecond: null, basis: "none" });
  expect(plan("llama-70b", diskless).estimate.note).toMatch(/the disk was not measured/);
  expect(plan("llama-8b", diskless).estimate.decodeTokensPerSecond).toBeGreaterThan(0);
});

// ---- history ------------------------------------------------------------------------------------------------------

const box = machineOf(machines["laptop-8g"]);

function withHistory(history: readonly MeasuredRun[], limits: Partial<PlanLimits> = {}): Plan {
  const model = shapeModel("qwen3-30b");
  return makePlan({ name: "m", files: [], model }, box, { ...noLimits, ...limits }, { history });
}

function run(made: Plan, secondsEach: number, hitRate: number | null, tokens = 100): MeasuredRun {
  const figures = {
    at: "2026-11-02T00:00:00Z",
    decodeTokens: tokens,
    decodeSeconds: tokens * secondsEach,
    hitRate,
  };
  const kept = runOf(made, { model: shapeModel("qwen3-30b") }, box, figures);
  if (kept === null) throw new Error("a run on a measured machine is kept");
  return kept;
}

describe("earlier runs", () => {
  const first = withHistory([]);
  const at = (made: Plan) => made.estimate.decodeTokensPerSecond ?? 0;

  test("of the same plan give what they measured", () => {
    const runs = [0.5, 0.4, 0.45].map((seconds) => run(first, seconds, null));
    const made = withHistory(runs);
    expect(made.estimate.basis).toBe("measured");
    expect(at(made)).toBeCloseTo(1 / 0.45, 6);
    expect(made.estimate.modelSeconds).toBe(first.estimate.modelSeconds);
  });

  test("of this model with another pool scale what is computed", () => {
    const other = withHistory([], { memoryBytes: 3e9 });
    const slow = run(other, 2 * (other.estimate.modelSeconds ?? 0), null);
    const made = withHistory([slow]);
    expect(made.estimate.basis).toBe("corrected");
    expect(at(made)).toBeCloseTo(at(first) / 2, 6);
  });

  test("replace the published curve by the model's own, on any machine", () => {
    const runs = [run(first, 0.3, 0.9)];
    const made = withHistory(runs, { memoryBytes: 3.5e9 });
    expect(made.estimate.hits?.curve).toBe("recorded");
    const curve = hitCurveOf(shapeModel("qwen3-30b"), runs);
    const share = curve?.points[0]?.share ?? 0;
    expect(curve?.points[0]?.hitRate).toBe(0.9);
    expect(hitRateAt(curve ?? publishedHitCurve, share / 2)).toBeGreaterThan(
      hitRateAt(publishedHitCurve, share / 2),
    );
  });

  test("of other models say what a layer costs beside its weights", () => {
    const small = shapeModel("llama-1b");
    const resident = makePlan({ name: "s", files: [], model: small }, box);
    const model = resident.estimate.modelSeconds ?? 0;
    const figures = {
      at: "2026-11-02T00:00:00Z",
      decodeTokens: 50,
      decodeSeconds: 50 * (model + 16 * 1e-3),
      hitRate: null,
    };
    const kept = runOf(resident, { model: small }, box, figures);
    const made = withHistory(kept === null ? [] : [kept]);
    expect(made.estimate.basis).toBe("corrected");
    expect(1 / at(made)).toBeCloseTo(1 / at(first) + 48 * 1e-3, 6);
  });

  test("of another machine, other threads or a few tokens say nothing of speed", () => {
    const good = run(first, 0.5, null);
    for (const other of [
      { ...good, machineKey: "another" },
      { ...good, threads: good.threads + 1 },
      { ...good, decodeTokens: 3 },
      { ...good, modelKey: "another", streams: true },
    ]) {
      expect(withHistory([other]).estimate).toEqual(first.estimate);
    }
  });

  test("a machine without a profile keeps nothing", () => {
    const figures = { at: "2026-11-02T00:00:00Z", decodeTokens: 50, decodeSeconds: 1, hitRate: null };
    expect(runOf(first, { model: shapeModel("qwen3-30b") }, { ...box, profile: null }, figures)).toBeNull();
  });

  test("models are told apart by what is in them", () => {
    const keys = (["llama-1b", "llama-8b", "qwen3-30b"] as const).map((name) => modelKeyOf(shapeModel(name)));
    expect(new Set(keys).size).toBe(3);
  });
});

// The placement solvers against the truth: brute force over every placement of reduced cases, HiGHS on the same
// programs, and what must come out by itself.

import { beforeAll, describe, expect, test } from "bun:test";
import loadHighs, { type Highs } from "highs";
import type { Model, ModelTensor } from "../../src/model";
import { type HitCurve, type Placement, publishedHitCurve } from "../../src/plan-cost";
import {
  type Group,
  groupsOf,
  type PlaceTask,
  type Program,
  place,
  placementOf,
  programOf,
  type Room,
  roughSeconds,
  type Share,
  streamedSets,
  takenBytes,
  yalps,
} from "../../src/plan-place";
import { openRandom, type Random } from "../fixtures/random";
import { describeShape, shapeModel } from "./plan-family";

/** Small enough that every placement can be tried: a few groups of a few tensors. */
function reducedModel(random: Random, kind: "dense" | "experts" | "both"): Model {
  const experts = random.pick([4, 6, 8]);
  return describeShape({
    architecture: "llama",
    layers: 3 + random.below(3),
    embd: 256,
    heads: 4,
    kvHeads: 2,
    ff: random.pick([2048, 4096]),
    vocab: 512,
    ...(kind === "dense"
      ? {}
      : {
          experts,
          used: 1 + random.below(2),
          expertFf: random.pick([512, 1024]),
          denseLayers: kind === "both" ? 1 : 0,
        }),
  });
}

function taskOf(random: Random, model: Model, hasGpu: boolean): PlaceTask {
  const streamable = model.strides.reduce((sum, set) => sum + set.strideBytes * set.strideCount, 0);
  const gpuLayers = hasGpu ? model.layerCount + 1 - random.below(3) : 0;
  const first = model.layerCount + 1 - gpuLayers;
  const ramBytes = streamable * (0.25 + random.unit() * 0.6);
  const gpuBytes = hasGpu ? streamable * random.unit() * 0.6 : 0;
  const isUnified = hasGpu && random.below(2) === 0;
  const curve: HitCurve = {
    kind: "assumed",
    points: [{ share: 0.5, hitRate: 0.5 ** (0.15 + random.unit() * 0.85) }],
  };
  const rates = {
    gpu: 50e9 + random.unit() * 500e9,
    ram: 5e9 + random.unit() * 50e9,
    read: 0.3e9 + random.unit() * 8e9,
  };
  const seconds = {
    gpu: (_: string, bytes: number) => bytes / rates.gpu,
    ram: (_: string, bytes: number) => bytes / rates.ram,
    read: (bytes: number) => bytes / rates.read,
  };
  const task: PlaceTask = {
    model,
    gpuLayers,
    homes: model.tensors.map((one) => (hasGpu && (one.layer ?? 0) >= first ? "gpu" : "ram")),
    room: { ramBytes, gpuBytes, totalBytes: isUnified ? ramBytes : null },
    mustStream: false,
    curve,
    seconds,
    judge: (placement) => costOf(groupsOf({ model, homes: task.homes }), placement, task),
  };
  return task;
}

/** What a placement costs by the solvers' own sums: read back from the placement, not from what they decided. */
function costOf(groups: readonly Group[], placement: Placement, task: PlaceTask): number {
  const shares = groups.map((group): Share => {
    const tierOf = (index: number) => placement.tiers[index];
    const streamed = [...group.gpuSets, ...group.ramSets].filter((set) => tierOf(set.tensorIndex) === "nvme");
    const slots =
      placement.classes.find((one) => one.sets.some((set) => streamed.includes(set)))?.slotCount ?? 0;
    return {
      gpuCount: group.gpuSets.filter((set) => tierOf(set.tensorIndex) === "gpu").length,
      ramResident:
        group.ramSets.length === 0 || group.ramSets.every((set) => tierOf(set.tensorIndex) === "ram"),
      slotCount: slots,
    };
  });
  return roughSeconds(groups, shares, task);
}

function fits(groups: readonly Group[], shares: readonly Share[], room: Room): boolean {
  const { ram, gpu } = takenBytes(groups, shares);
  return (
    ram <= room.ramBytes && gpu <= room.gpuBytes && (room.totalBytes === null || ram + gpu <= room.totalBytes)
  );
}

/** The best of all placements, tried one by one. */
function bruteForce(groups: readonly Group[], task: PlaceTask): number {
  let best = Number.POSITIVE_INFINITY;
  const shares: Share[] = [];
  const visit = (index: number): void => {
    const group = groups[index];
    if (group === undefined) {
      if (fits(groups, shares, task.room)) best = Math.min(best, roughSeconds(groups, shares, task));
      return;
    }
    for (let gpuCount = 0; gpuCount <= group.gpuSets.length; gpuCount++) {
      for (const ramResident of group.ramSets.length === 0 ? [true] : [false, true]) {
        const most = streamedSets(group, { gpuCount, ramResident }) * group.strideCount;
        const least = Math.min(most, group.kind === "expert" ? 2 * group.touchedCount : 6);
        for (let slotCount = least; slotCount <= most; slotCount++) {
          shares[index] = { gpuCount, ramResident, slotCount };
          visit(index + 1);
        }
      }
    }
  };
  visit(0);
  return best;
}

describe("within 1 % of brute force", () => {
  const kinds = ["dense", "experts", "both"] as const;
  for (const kind of kinds) {
    for (const hasGpu of [false, true]) {
      test(`${kind}${hasGpu ? ", with a GPU" : ""}: 40 reduced cases`, () => {
        let compared = 0;
        for (let seed = 0; seed < 40; seed++) {
          const random = openRandom(1000 * kinds.indexOf(kind) + 100 * Number(hasGpu) + seed);
          const model = reducedModel(random, kind);
          const task = taskOf(random, model, hasGpu);
          const groups = groupsOf(task);
          const tries = groups.reduce(
            (product, group) =>
              product *
              (group.gpuSets.length + 1) *
              (group.ramSets.length === 0 ? 1 : 2) *
              (group.gpuSets.length + group.ramSets.length) *
              group.strideCount,
            1,
          );
          if (tries > 3e6) continue; // too many to try them all
          const best = bruteForce(groups, task);
          const found = place(task);
          if (best === Number.POSITIVE_INFINITY) {
            expect(found).toBeNull();
            continue;
          }
          compared++;
          expect([seed, (found?.seconds ?? Number.POSITIVE_INFINITY) <= best * 1.01]).toEqual([seed, true]);
          expect([seed, (found?.seconds ?? 0) >= best * (1 - 1e-9)]).toEqual([seed, true]);
        }
        expect(compared).toBeGreaterThanOrEqual(8);
      });
    }
  }
});

// ---- HiGHS --------------------------------------------------------------------------------------------------------

/** The program in CPLEX's LP format. */
function lpText({ rows, columns, integers }: Program): string {
  const names = new Map([...columns.keys()].map((name) => [name, name] as const));
  const terms = (row: string): string =>
    [...columns]
      .flatMap(([name, cells]) => {
        const value = cells.get(row) ?? 0;
        return value === 0
          ? []
          : [`${value < 0 ? "-" : "+"} ${Math.abs(value).toPrecision(15)} ${names.get(name)}`];
      })
      .join(" ");
  const lines = [...rows].flatMap(([row, { min, max }], index) => {
    const left = terms(row);
    return [
      ...(max === undefined ? [] : [` m${index}: ${left} <= ${max}`]),
      ...(min === undefined ? [] : [` l${index}: ${left} >= ${min}`]),
    ];
  });
  return `Minimize\n cost: ${terms("cost")}\nSubject To\n${lines.join("\n")}\nGenerals\n ${[...integers].join(" ")}\nEnd\n`;
}

function objective({ columns }: Program, values: ReadonlyMap<string, number>): number {
  return [...values].reduce((sum, [name, value]) => sum + value * (columns.get(name)?.get("cost") ?? 0), 0);
}

describe("HiGHS and YALPS find the same optimum", () => {
  let highs: Highs;
  beforeAll(async () => {
    highs = await loadHighs();
  });

  function compare(program: Program): void {
    const answer = highs.solve(lpText(program), { output_flag: false, mip_rel_gap: 1e-6 });
    const values = yalps(program);
    if (answer.Status !== "Optimal") {
      expect(values).toBeNull();
      return;
    }
    expect(values).not.toBeNull();
    const ours = objective(program, values ?? new Map());
    expect(Math.abs(ours - answer.ObjectiveValue) / Math.max(1e-9, answer.ObjectiveValue)).toBeLessThan(2e-3);
  }

  test("on reduced cases", () => {
    for (let seed = 0; seed < 40; seed++) {
      const random = openRandom(seed);
      const model = reducedModel(random, random.pick(["dense", "experts", "both"]));
      const task = taskOf(random, model, seed % 2 === 0);
      compare(programOf(groupsOf(task), task));
    }
  });

  test.each(["llama-70b", "mixtral-8x7b", "qwen3-235b", "deepseek-v3"] as const)("on %s", (shape) => {
    for (let seed = 0; seed < 6; seed++) {
      const task = taskOf(openRandom(seed), shapeModel(shape), seed % 2 === 0);
      compare(programOf(groupsOf(task), task));
    }
  });
});

// ---- what comes out by itself -------------------------------------------------------------------------------------

test("were everything allowed to stream, attention, norms, routers and output would stay resident", () => {
  const real = shapeModel("qwen3-30b");
  // Every matrix as a stride of its own, named a dense FFN so that the planner may stream it.
  const tensors = real.tensors.map((one): ModelTensor => {
    if (one.strides !== null || one.layer === null) return one;
    const strides = { tensorIndex: one.index, strideCount: 1, strideBytes: one.sizeBytes, touchedCount: 1 };
    return { ...one, role: "dense-ffn", strides };
  });
  const model = {
    ...real,
    tensors,
    strides: tensors.flatMap((one) => (one.strides === null ? [] : [one.strides])),
  };
  const experts = real.strides.reduce((sum, set) => sum + set.strideBytes * set.strideCount, 0);
  const rest = model.strides.reduce((sum, set) => sum + set.strideBytes * set.strideCount, 0) - experts;
  const task: PlaceTask = {
    model,
    gpuLayers: 0,
    homes: model.tensors.map(() => "ram"),
    room: { ramBytes: rest + 0.3 * experts, gpuBytes: 0, totalBytes: null },
    mustStream: false,
    curve: publishedHitCurve,
    seconds: { gpu: () => 0, ram: (_, bytes) => bytes / 20e9, read: (bytes) => bytes / 2e9 },
    judge: (placement) => costOf(groupsOf(task), placement, task),
  };
  const found = place(task);
  const streamed = real.tensors.filter((one) => found?.placement.tiers[one.index] === "nvme");
  expect(streamed.length).toBeGreaterThan(100);
  expect(new Set(streamed.map((one) => one.role))).toEqual(new Set(["expert"]));
});

test("what streams of a dense model is spread over the pass, not piled up at its end", () => {
  const model = shapeModel("llama-70b");
  const task: PlaceTask = {
    model,
    gpuLayers: 81,
    homes: model.tensors.map((one) => (one.layer === null ? "ram" : "gpu")),
    room: { ramBytes: 3e9, gpuBytes: 12e9, totalBytes: null },
    mustStream: false,
    curve: publishedHitCurve,
    seconds: { gpu: () => 0, ram: (_, bytes) => bytes / 50e9, read: (bytes) => bytes / 5e9 },
    judge: (placement) => costOf(groupsOf(task), placement, task),
  };
  const placement = place(task)?.placement;
  const tiers = model.strides.map((set) => placement?.tiers[set.tensorIndex]);
  expect(tiers.filter((tier) => tier === "gpu").length).toBeGreaterThan(40);
  let longest = 0;
  let run = 0;
  for (const tier of tiers) {
    run = tier === "nvme" ? run + 1 : 0;
    longest = Math.max(longest, run);
  }
  expect(longest).toBeLessThan(12);
});

test("placementOf names every tensor of a group once", () => {
  const random = openRandom(7);
  const model = reducedModel(random, "both");
  const task = taskOf(random, model, true);
  const groups = groupsOf(task);
  const shares = groups.map(
    (group): Share => ({
      gpuCount: Math.floor(group.gpuSets.length / 2),
      ramResident: false,
      slotCount: 6,
    }),
  );
  const { tiers, classes } = placementOf(groups, shares, { ...task, mustStream: true });
  const streamed = classes.flatMap((one) => one.sets.map((set) => set.tensorIndex));
  expect(new Set(streamed).size).toBe(streamed.length);
  expect([...streamed].sort((a, b) => a - b)).toEqual(
    tiers.flatMap((tier, i) => (tier === "nvme" ? [i] : [])),
  );
});

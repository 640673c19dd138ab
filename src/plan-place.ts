// Where the streamable weights go: tensor -> tier and slots for each class of strides, so that a token takes the least
// time in the memory there is. It owns the optimisation problem and its two solvers, a greedy one and a mixed-integer
// program; it must not know how room is reckoned (plan-memory.ts) or what a plan says of it (plan.ts). Pure.
//
// Tensors of one kind, type and size are alike, so that the problem is about counts: of each group how many tensors are
// resident on the GPU, whether those on the processor's side are resident, and how many slots the rest gets. A model of
// a thousand tensors has two to six groups. What cannot stream is placed before, by llama.cpp's own rule of layers.
//
// The program is solved by YALPS (a simplex with branch and bound, 15 KB of JavaScript, some milliseconds for these
// sizes). HiGHS solves it too and gives the same answers (test/unit/plan-place.test.ts), but as a part of the
// executable it would cost more than the problem is worth: 80 to 125 ms to start, 100 ms more for its first answer,
// and 60 MB of the memory that is being divided.

import { type Coefficients, type Constraint, solve } from "yalps";
import type { Model, StrideSet } from "./model";
import { type HitCurve, hitRateAt, type PlacedClass, type Placement } from "./plan-cost";
import { slotBytesOf } from "./plan-memory";

/** Seconds by which tiers are weighed against each other; without a profile their order alone counts. */
export interface TierSeconds {
  gpu(typeName: string, bytes: number): number;
  ram(typeName: string, bytes: number): number;
  read(bytes: number): number;
}

/**
 * For a machine that was not measured: reading costs more than the processor, the processor more than a GPU. Orders,
 * not speeds; no figure that a person sees is made of them.
 */
export const orderOfTiers: TierSeconds = {
  gpu: (_, bytes) => bytes * 1e-12,
  ram: (_, bytes) => bytes * 1e-10,
  read: (bytes) => bytes * 1e-9,
};

/** Bytes that streamable weights and the pool may take. */
export interface Room {
  readonly ramBytes: number;
  readonly gpuBytes: number;
  /** Set on unified memory: both together may not be more. */
  readonly totalBytes: number | null;
}

export interface PlaceTask {
  readonly model: Model;
  readonly gpuLayers: number;
  /** By index of the tensor: where what cannot stream is, and what streams would be if it were resident. */
  readonly homes: readonly ("gpu" | "ram")[];
  readonly room: Room;
  /** Everything that can stream does. */
  readonly mustStream: boolean;
  readonly curve: HitCurve;
  readonly seconds: TierSeconds;
  /** What a placement really costs; the solvers' own costs are sums of straight lines. */
  readonly judge: (placement: Placement) => number;
}

export interface Solution {
  readonly placement: Placement;
  readonly seconds: number;
  readonly by: "greedy" | "program";
  readonly greedySeconds: number | null;
  readonly programSeconds: number | null;
}

/** A block's gate and up are in use while the next ones are read: more depth than this gained nothing. */
export const ringSlots = 6;

/** Sets of one kind, type and size. */
export interface Group {
  readonly kind: "dense" | "expert";
  readonly typeName: string;
  readonly strideBytes: number;
  readonly slotBytes: number;
  /** Of each set. */
  readonly strideCount: number;
  readonly touchedCount: number;
  readonly gpuSets: readonly StrideSet[];
  readonly ramSets: readonly StrideSet[];
}

/** What a solver decides of a group. */
export interface Share {
  /** Of `gpuSets`, resident there. */
  readonly gpuCount: number;
  /** All of `ramSets` are resident. */
  readonly ramResident: boolean;
  readonly slotCount: number;
}

export function groupsOf(task: Pick<PlaceTask, "model" | "homes">): readonly Group[] {
  const groups = new Map<string, Group>();
  for (const set of orderOfPass(task.model)) {
    const tensor = task.model.tensors[set.tensorIndex];
    const kind = tensor?.role === "dense-ffn" ? "dense" : "expert";
    const key = [kind, tensor?.typeName, set.strideBytes, set.strideCount, set.touchedCount].join(" ");
    const group = groups.get(key) ?? {
      kind,
      typeName: tensor?.typeName ?? "",
      strideBytes: set.strideBytes,
      slotBytes: slotBytesOf(set.strideBytes),
      strideCount: set.strideCount,
      touchedCount: set.touchedCount,
      gpuSets: [],
      ramSets: [],
    };
    const isOnGpu = task.homes[set.tensorIndex] === "gpu";
    groups.set(key, {
      ...group,
      gpuSets: isOnGpu ? [...group.gpuSets, set] : group.gpuSets,
      ramSets: isOnGpu ? group.ramSets : [...group.ramSets, set],
    });
  }
  return [...groups.values()];
}

/** By layer, and within a layer in the order llama.cpp's graph uses them: up and gate before down. */
export function orderOfPass(model: Model): readonly StrideSet[] {
  const rank = (set: StrideSet): number => {
    const tensor = model.tensors[set.tensorIndex];
    return (tensor?.layer ?? 0) * 2 + (tensor?.name.includes("down") ? 1 : 0);
  };
  return [...model.strides].sort((a, b) => rank(a) - rank(b) || a.tensorIndex - b.tensorIndex);
}

export function streamedSets(group: Group, share: Pick<Share, "gpuCount" | "ramResident">): number {
  return group.gpuSets.length - share.gpuCount + (share.ramResident ? 0 : group.ramSets.length);
}

/** The fewest slots with which decoding is not absurd: the strides of one op twice, or a ring. */
function leastSlots(group: Group, streamedCount: number): number {
  const wanted = group.kind === "expert" ? 2 * group.touchedCount : ringSlots;
  return Math.min(streamedCount * group.strideCount, wanted);
}

/** The smallest pool with which everything can stream. */
export function leastPoolBytes(groups: readonly Group[]): number {
  return groups.reduce((sum, group) => {
    const count = group.gpuSets.length + group.ramSets.length;
    return sum + leastSlots(group, count) * group.slotBytes;
  }, 0);
}

/** Strides of a dense class that never leave: a whole class that fits, else all but the ring. */
export function pinnedCount(slotCount: number, strideCount: number): number {
  return slotCount >= strideCount ? Math.max(0, slotCount - 1) : Math.max(0, slotCount - ringSlots);
}

// ---- costs --------------------------------------------------------------------------------------------------------

function setBytes(group: Group): number {
  return group.strideBytes * group.strideCount;
}

function touchedBytes(group: Group): number {
  return group.strideBytes * group.touchedCount;
}

/** Bytes that a token reads of a group. */
function readBytes(group: Group, share: Share, curve: HitCurve): number {
  const streamed = streamedSets(group, share);
  const strides = streamed * group.strideCount;
  if (share.slotCount >= strides) return 0;
  return group.kind === "dense"
    ? (strides - pinnedCount(share.slotCount, strides)) * group.strideBytes
    : streamed * touchedBytes(group) * (1 - hitRateAt(curve, share.slotCount / strides));
}

/**
 * Straight sums of what plan-cost.ts says: missing experts are read while the others of their layer are computed; missing
 * matrices of a dense model while anything is, those beside experts never.
 */
export function roughSeconds(groups: readonly Group[], shares: readonly Share[], task: PlaceTask): number {
  const compute = { any: 0, experts: 0 };
  const read = { dense: 0, expert: 0 };
  for (const [index, group] of groups.entries()) {
    const share = shares[index] as Share;
    const count = group.gpuSets.length + group.ramSets.length;
    const streaming = streamedSets(group, share);
    const each = touchedBytes(group);
    const overlaps = group.kind === "expert" ? streaming : 0;
    compute.any += task.seconds.gpu(group.typeName, share.gpuCount * each);
    compute.any += task.seconds.ram(group.typeName, (count - share.gpuCount - overlaps) * each);
    compute.experts += task.seconds.ram(group.typeName, overlaps * each);
    read[group.kind] += task.seconds.read(readBytes(group, share, task.curve));
  }
  const ties = tieWeight * (read.dense + read.expert);
  return hasExperts(groups)
    ? compute.any + read.dense + Math.max(compute.experts, read.expert) + ties
    : Math.max(compute.any, read.dense) + ties;
}

function hasExperts(groups: readonly Group[]): boolean {
  return groups.some((group) => group.kind === "expert");
}

/** What is not the bottleneck counts a little, so that of two equal placements the one that reads less is taken. */
const tieWeight = 1e-3;

export function takenBytes(groups: readonly Group[], shares: readonly Share[]): { ram: number; gpu: number } {
  let ram = 0;
  let gpu = 0;
  for (const [index, group] of groups.entries()) {
    const share = shares[index] as Share;
    gpu += share.gpuCount * setBytes(group);
    ram +=
      (share.ramResident ? group.ramSets.length * setBytes(group) : 0) + share.slotCount * group.slotBytes;
  }
  return { ram, gpu };
}

function fits(groups: readonly Group[], shares: readonly Share[], room: Room): boolean {
  const { ram, gpu } = takenBytes(groups, shares);
  return (
    ram <= room.ramBytes && gpu <= room.gpuBytes && (room.totalBytes === null || ram + gpu <= room.totalBytes)
  );
}

// ---- greedy -------------------------------------------------------------------------------------------------------

/** Slots for what is not resident: everyone's least, and the rest in proportion to the bytes that stream. */
function withSlots(groups: readonly Group[], shares: readonly Share[], room: Room): readonly Share[] | null {
  const least = groups.map((group, i) => ({
    ...(shares[i] as Share),
    slotCount: leastSlots(group, streamedSets(group, shares[i] as Share)),
  }));
  if (!fits(groups, least, room)) {
    return null;
  }
  let current: readonly Share[] = least;
  // A class that is full leaves its part to the others, so a few rounds.
  for (let round = 0; round < groups.length; round++) {
    const { ram, gpu } = takenBytes(groups, current);
    const free = Math.min(room.ramBytes - ram, (room.totalBytes ?? Number.POSITIVE_INFINITY) - ram - gpu);
    const open = groups.map((group, i) => {
      const share = current[i] as Share;
      return streamedSets(group, share) * group.strideCount - share.slotCount;
    });
    const weight = groups.map((group, i) =>
      (open[i] as number) > 0 ? streamedSets(group, current[i] as Share) * setBytes(group) : 0,
    );
    const all = weight.reduce((sum, one) => sum + one, 0);
    if (all === 0) break;
    const before = current;
    current = groups.map((group, i) => {
      const share = before[i] as Share;
      const more = Math.floor((free * (weight[i] as number)) / all / group.slotBytes);
      return { ...share, slotCount: share.slotCount + Math.min(more, open[i] as number) };
    });
  }
  return current;
}

/** Takes the change that saves most per byte made resident, as long as one saves anything. */
function greedy(groups: readonly Group[], task: PlaceTask): readonly Share[] | null {
  const nothing = groups.map(() => ({ gpuCount: 0, ramResident: false, slotCount: 0 }));
  let current = withSlots(groups, nothing, task.room);
  if (task.mustStream) return current;
  for (;;) {
    const now = current === null ? Number.POSITIVE_INFINITY : roughSeconds(groups, current, task);
    let best: { readonly shares: readonly Share[]; readonly density: number } | null = null;
    for (const [index, group] of groups.entries()) {
      const share = (current ?? nothing)[index] as Share;
      const changes: Share[] = [];
      // By a sixteenth of what is left and by one: large models in few steps, and the last tensor that fits.
      const left = group.gpuSets.length - share.gpuCount;
      for (const step of new Set([1, Math.ceil(left / 16)])) {
        if (step <= left) changes.push({ ...share, gpuCount: share.gpuCount + step });
      }
      if (!share.ramResident && group.ramSets.length > 0) changes.push({ ...share, ramResident: true });
      for (const change of changes) {
        const tried = withSlots(
          groups,
          (current ?? nothing).map((one, i) => (i === index ? change : one)),
          task.room,
        );
        if (tried === null) continue;
        const saved = now - roughSeconds(groups, tried, task);
        const bytes =
          (change.gpuCount - share.gpuCount) * setBytes(group) +
          (change.ramResident === share.ramResident ? 0 : group.ramSets.length * setBytes(group));
        if (saved > 0 && (best === null || saved / bytes > best.density)) {
          best = { shares: tried, density: saved / bytes };
        }
      }
    }
    if (best === null) return current;
    current = best.shares;
  }
}

// ---- the mixed-integer program ------------------------------------------------------------------------------------

/** A linear program as values: rows and columns by name. Minimised: the column sums of "cost". */
export interface Program {
  readonly rows: ReadonlyMap<string, Constraint>;
  readonly columns: ReadonlyMap<string, ReadonlyMap<string, number>>;
  readonly integers: ReadonlySet<string>;
}

/** Shares of a class between which the curve of hits is taken as straight. */
const curveSteps = [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1] as const;

/**
 * Columns of a group g: x tensors resident on the GPU; y 1 if those of the processor's side are; z 1 if any stream; w 1
 * if the pool holds all that stream; n slots; r bytes read a token. Two more for all: e, seconds of the streamed experts, and t, seconds of a token. Bytes
 * count in thousandths of all that can stream, seconds in what reading one of them takes, so that the figures of a
 * simplex stay near one another.
 *
 *   minimise  t + a little of the reading (so that ties take less)
 *   e >= computing of streamed experts;  e >= their reading
 *   t >= computing of all else + e + reading of dense matrices         where there are experts
 *   t >= computing;  t >= reading                                      where there are none
 *   slots and resident tensors fit the ram, the GPU and, on unified memory, both together
 *   all of a group that is not resident streams:    x + R y + N z >= N
 *   slots:         least (z - w) <= n <= E (N - x - R y)
 *   held whole:    n >= E (N - x - R y) - E N (1 - w)
 *   read, dense:   r >= s ((N - x - R y) - n + ring (z - w))
 *   read, experts: r >= k s (a (N - x - R y) - b n / E) for each straight part 1 - hits = a - b share
 */
export function programOf(groups: readonly Group[], task: PlaceTask): Program {
  const all = groups.reduce((sum, one) => sum + (one.gpuSets.length + one.ramSets.length) * setBytes(one), 0);
  const unit = all / 1000;
  const rows = new Map<string, Constraint>();
  const columns = new Map<string, Map<string, number>>();
  const integers = new Set<string>();
  const put = (column: string, row: string, value: number): void => {
    const cells = columns.get(column) ?? new Map<string, number>();
    cells.set(row, (cells.get(row) ?? 0) + value);
    columns.set(column, cells);
  };
  const { room, curve } = task;
  const tick = task.seconds.read(unit);
  const seconds = {
    gpu: (typeName: string, bytes: number): number => task.seconds.gpu(typeName, bytes) / tick,
    ram: (typeName: string, bytes: number): number => task.seconds.ram(typeName, bytes) / tick,
    read: (bytes: number): number => task.seconds.read(bytes) / tick,
  };
  rows.set("ram", { max: room.ramBytes / unit });
  rows.set("gpu", { max: room.gpuBytes / unit });
  if (room.totalBytes !== null) rows.set("all", { max: room.totalBytes / unit });
  let allSeconds = 0;
  let expertSeconds = 0;
  put("t", "cost", 1);
  put("t", "chain", 1);
  put("t", "reading", 1);
  put("e", "chain", -1);
  put("e", "experts", 1);
  put("e", "reading of experts", 1);
  rows.set("reading", { min: 0 });
  rows.set("reading of experts", { min: 0 });
  for (const [g, group] of groups.entries()) {
    const count = group.gpuSets.length + group.ramSets.length;
    const onRam = group.ramSets.length;
    const [x, y, z, w, n, r] = [`x${g}`, `y${g}`, `z${g}`, `w${g}`, `n${g}`, `r${g}`];
    for (const whole of [x, y, z, w]) integers.add(whole);
    const ramSeconds = seconds.ram(group.typeName, touchedBytes(group));
    const bytes = setBytes(group) / unit;
    put(x, "gpu", bytes);
    put(y, "ram", bytes * onRam);
    put(n, "ram", group.slotBytes / unit);
    if (room.totalBytes !== null) {
      for (const [column, value] of [
        [x, bytes],
        [y, bytes * onRam],
        [n, group.slotBytes / unit],
      ] as const) {
        put(column, "all", value);
      }
    }
    rows.set(`x${g} most`, { max: task.mustStream ? 0 : group.gpuSets.length });
    put(x, `x${g} most`, 1);
    rows.set(`y${g} most`, { max: task.mustStream || onRam === 0 ? 0 : 1 });
    put(y, `y${g} most`, 1);
    rows.set(`z${g} most`, { max: 1 });
    put(z, `z${g} most`, 1);
    rows.set(`stream ${g}`, { min: count });
    put(x, `stream ${g}`, 1);
    put(y, `stream ${g}`, onRam);
    put(z, `stream ${g}`, count);
    rows.set(`least ${g}`, { min: 0 });
    put(n, `least ${g}`, 1);
    put(z, `least ${g}`, -leastSlots(group, count));
    put(w, `least ${g}`, leastSlots(group, count));
    rows.set(`w${g} most`, { max: 1 });
    put(w, `w${g} most`, 1);
    rows.set(`whole ${g}`, { min: 0 });
    put(n, `whole ${g}`, 1);
    put(x, `whole ${g}`, group.strideCount);
    put(y, `whole ${g}`, group.strideCount * onRam);
    put(w, `whole ${g}`, -group.strideCount * count);
    rows.set(`most ${g}`, { max: count * group.strideCount });
    put(n, `most ${g}`, 1);
    put(x, `most ${g}`, group.strideCount);
    put(y, `most ${g}`, group.strideCount * onRam);
    const gpuSeconds = seconds.gpu(group.typeName, touchedBytes(group));
    if (group.kind === "expert") {
      // What streams is behind e: resident ones leave it for the chain.
      expertSeconds += count * ramSeconds;
      put(x, "experts", ramSeconds);
      put(y, "experts", onRam * ramSeconds);
      put(x, "chain", -gpuSeconds);
      put(y, "chain", -onRam * ramSeconds);
      put(r, "reading of experts", -seconds.read(unit));
    } else {
      allSeconds += count * ramSeconds;
      put(x, "chain", ramSeconds - gpuSeconds);
    }
    if (group.kind === "dense") put(r, hasExperts(groups) ? "chain" : "reading", -seconds.read(unit));
    put(r, "cost", tieWeight * seconds.read(unit));
    if (group.kind === "dense") {
      const stride = group.strideBytes / unit;
      rows.set(`read ${g}`, { min: stride * count });
      put(r, `read ${g}`, 1);
      put(x, `read ${g}`, stride);
      put(y, `read ${g}`, stride * onRam);
      put(n, `read ${g}`, stride);
      put(z, `read ${g}`, -stride * ringSlots);
      put(w, `read ${g}`, stride * ringSlots);
      continue;
    }
    const each = touchedBytes(group) / unit;
    for (let step = 1; step < curveSteps.length; step++) {
      const from = curveSteps[step - 1] as number;
      const to = curveSteps[step] as number;
      const slope = (hitRateAt(curve, to) - hitRateAt(curve, from)) / (to - from);
      const missAtZero = 1 - (hitRateAt(curve, from) - slope * from);
      const row = `read ${g} ${step}`;
      rows.set(row, { min: each * missAtZero * count });
      put(r, row, 1);
      put(x, row, each * missAtZero);
      put(y, row, each * missAtZero * onRam);
      put(n, row, (each * slope) / group.strideCount);
    }
  }
  rows.set("chain", { min: allSeconds });
  rows.set("experts", { min: expertSeconds });
  return { rows, columns, integers };
}

/** The values of the columns; null where there is no solution, or none was found in time. */
export type ProgramSolver = (program: Program) => ReadonlyMap<string, number> | null;

export const yalps: ProgramSolver = ({ rows, columns, integers }) => {
  const variables = [...columns].map(([name, cells]) => [name, cells as Coefficients<string>] as const);
  const solution = solve(
    { direction: "minimize", objective: "cost", constraints: rows, variables, integers },
    { tolerance: 1e-4, maxIterations: 4096 },
  );
  return solution.status === "optimal" || solution.status === "timedout"
    ? Number.isFinite(solution.result)
      ? new Map(solution.variables)
      : null
    : null;
};

/** Every way in which the program's answer can be made whole, to be judged. */
function sharesOf(
  groups: readonly Group[],
  values: ReadonlyMap<string, number>,
  room: Room,
): readonly (readonly Share[])[] {
  const chosen = groups.map((group, g) => {
    const gpuCount = Math.min(group.gpuSets.length, Math.round(values.get(`x${g}`) ?? 0));
    const ramResident = group.ramSets.length === 0 || Math.round(values.get(`y${g}`) ?? 0) === 1;
    const streamed = streamedSets(group, { gpuCount, ramResident });
    const slots = Math.floor((values.get(`n${g}`) ?? 0) + 1e-6);
    const slotCount = Math.max(leastSlots(group, streamed), Math.min(slots, streamed * group.strideCount));
    return { gpuCount, ramResident, slotCount };
  });
  const even = withSlots(groups, chosen, room);
  return [...(fits(groups, chosen, room) ? [chosen] : []), ...(even === null ? [] : [even])];
}

// ---- the last step ------------------------------------------------------------------------------------------------

/** Rounds of small changes; each takes some thousand cheap sums at most. */
const mostRounds = 24;

/**
 * Small changes to an answer as long as one shortens a token: a tensor more or less on the GPU, one for another, the
 * processor's side of a group resident or not, slots from one group to another. The program rounds and takes curves as
 * straight lines; on models of few tensors that is worth some percent.
 */
function improved(groups: readonly Group[], start: readonly Share[], task: PlaceTask): readonly Share[] {
  let current = withSlotsMoved(groups, start, task);
  let cost = roughSeconds(groups, current, task);
  for (let round = 0; round < mostRounds; round++) {
    let best: readonly Share[] | null = null;
    for (const change of changesOf(groups, current)) {
      const filled = withSlots(groups, change, task.room);
      if (filled === null) continue;
      const tried = withSlotsMoved(groups, filled, task);
      const seconds = roughSeconds(groups, tried, task);
      if (seconds < cost * (1 - 1e-9)) {
        best = tried;
        cost = seconds;
      }
    }
    if (best === null) break;
    current = best;
  }
  return current;
}

/** All answers one change away. */
function changesOf(groups: readonly Group[], shares: readonly Share[]): readonly (readonly Share[])[] {
  const changed = (...changes: readonly (readonly [number, Partial<Share>])[]): readonly Share[] =>
    shares.map((share, i) => ({ ...share, ...changes.find(([index]) => index === i)?.[1] }));
  const changes: (readonly Share[])[] = [];
  for (const [a, group] of groups.entries()) {
    const { gpuCount, ramResident } = shares[a] as Share;
    if (group.ramSets.length > 0) changes.push(changed([a, { ramResident: !ramResident }]));
    if (gpuCount < group.gpuSets.length) changes.push(changed([a, { gpuCount: gpuCount + 1 }]));
    if (gpuCount === 0) continue;
    changes.push(changed([a, { gpuCount: gpuCount - 1 }]));
    for (const [b, other] of groups.entries()) {
      const { gpuCount: otherCount } = shares[b] as Share;
      if (b !== a && otherCount < other.gpuSets.length) {
        changes.push(changed([a, { gpuCount: gpuCount - 1 }], [b, { gpuCount: otherCount + 1 }]));
      }
    }
  }
  return changes;
}

/** The same residents with slots moved between groups, and free bytes used, as long as it helps. */
function withSlotsMoved(
  groups: readonly Group[],
  start: readonly Share[],
  task: PlaceTask,
): readonly Share[] {
  let current = start;
  let cost = roughSeconds(groups, current, task);
  for (let round = 0; round < mostRounds; round++) {
    let best: readonly Share[] | null = null;
    for (const to of groups.keys()) {
      for (const from of [null, ...groups.keys()]) {
        for (const given of from === to ? [] : portions(groups, current, from)) {
          const tried = moved(groups, current, task.room, { from, to, given });
          const seconds = tried === null ? cost : roughSeconds(groups, tried, task);
          if (seconds < cost * (1 - 1e-9)) {
            best = tried;
            cost = seconds;
          }
        }
      }
    }
    if (best === null) break;
    current = best;
  }
  return current;
}

/** Slots that a group could give: all, halves of that, one. From nobody: what is free. */
function portions(
  groups: readonly Group[],
  shares: readonly Share[],
  from: number | null,
): readonly number[] {
  if (from === null) return [0];
  const group = groups[from] as Group;
  const share = shares[from] as Share;
  const spare = share.slotCount - leastSlots(group, streamedSets(group, share));
  const counts: number[] = [];
  for (let count = spare; count >= 1; count = Math.floor(count / 2)) counts.push(count);
  return counts;
}

function moved(
  groups: readonly Group[],
  shares: readonly Share[],
  room: Room,
  move: { readonly from: number | null; readonly to: number; readonly given: number },
): readonly Share[] | null {
  const { from, to, given } = move;
  const less = shares.map((share, i) =>
    i === from ? { ...share, slotCount: share.slotCount - given } : share,
  );
  const { ram, gpu } = takenBytes(groups, less);
  const free = Math.min(room.ramBytes - ram, (room.totalBytes ?? Number.POSITIVE_INFINITY) - ram - gpu);
  const group = groups[to] as Group;
  const share = less[to] as Share;
  const open = streamedSets(group, share) * group.strideCount - share.slotCount;
  const more = Math.min(open, Math.floor(free / group.slotBytes));
  if (more <= 0) return null;
  return less.map((one, i) => (i === to ? { ...one, slotCount: one.slotCount + more } : one));
}

// ---- placements ---------------------------------------------------------------------------------------------------

/** Every `of`-th of a list, so that what streams is spread over the pass. */
function spread<Item>(items: readonly Item[], count: number): ReadonlySet<Item> {
  return new Set(
    items.filter(
      (_, i) => Math.floor(((i + 1) * count) / items.length) > Math.floor((i * count) / items.length),
    ),
  );
}

/** A dense group of the processor's side that the pool holds whole is resident without a pool, in fewer bytes. */
function settled(group: Group, share: Share): Share {
  const isWhole = share.slotCount >= group.ramSets.length * group.strideCount;
  const isAllThere = share.gpuCount === group.gpuSets.length && !share.ramResident;
  return group.kind === "dense" && isWhole && isAllThere
    ? { ...share, ramResident: true, slotCount: 0 }
    : share;
}

export function placementOf(groups: readonly Group[], shares: readonly Share[], task: PlaceTask): Placement {
  const tiers: ("gpu" | "ram" | "nvme")[] = [...task.homes];
  const classes: PlacedClass[] = [];
  for (const [index, group] of groups.entries()) {
    const given = shares[index] as Share;
    const share = task.mustStream ? given : settled(group, given);
    const onGpu = spread(group.gpuSets, share.gpuCount);
    const sets = [...group.ramSets, ...group.gpuSets].filter(
      (set) => !onGpu.has(set) && !(share.ramResident && group.ramSets.includes(set)),
    );
    for (const set of sets) tiers[set.tensorIndex] = "nvme";
    if (sets.length > 0) {
      const strideCount = sets.length * group.strideCount;
      classes.push({
        kind: group.kind,
        strideBytes: group.strideBytes,
        strideCount,
        slotCount: share.slotCount,
        pinnedCount: group.kind === "dense" ? pinnedCount(share.slotCount, strideCount) : 0,
        sets,
      });
    }
  }
  return { gpuLayers: task.gpuLayers, tiers, classes };
}

/** The best placement that the two ways find, improved by small changes; null where not even the smallest pool fits. */
export function place(task: PlaceTask, solver: ProgramSolver = yalps): Solution | null {
  const groups = groupsOf(task);
  const judged = (shares: readonly Share[], by: Solution["by"]) => {
    const placement = placementOf(groups, shares, task);
    return { shares, placement, by, seconds: task.judge(placement) };
  };
  type Judged = ReturnType<typeof judged>;
  const better = (one: Judged | null, other: Judged | null): Judged | null =>
    one === null || (other !== null && other.seconds < one.seconds) ? other : one;
  const first = greedy(groups, task);
  const byGreedy = first === null ? null : judged(first, "greedy");
  const values = task.mustStream ? null : solver(programOf(groups, task));
  const byProgram = (values === null ? [] : sharesOf(groups, values, task.room))
    .map((shares) => judged(shares, "program"))
    .reduce<Judged | null>(better, null);
  const chosen = better(byGreedy, byProgram);
  if (chosen === null) {
    return null;
  }
  const starts = task.mustStream ? [] : [byGreedy, byProgram].filter((one) => one !== null);
  const best = starts
    .map((one) => judged(improved(groups, one.shares, task), one.by))
    .reduce<Judged>((one, other) => better(one, other) ?? one, chosen);
  return {
    placement: best.placement,
    by: best.by,
    seconds: best.seconds,
    greedySeconds: byGreedy?.seconds ?? null,
    programSeconds: byProgram?.seconds ?? null,
  };
}

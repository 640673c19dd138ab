// What every kind of plan is made of: the question with all that answers share (a Task), what the machine leaves to use,
// how a context is chosen, and the fields that all plans have. It owns no decision between kinds of plans (plan.ts). Pure.

import { HypuraError } from "./errors";
import type { Machine } from "./machine";
import { kvBytesPerToken, type Model, type ModelTensor } from "./model";
import type { Choice, Knowledge, ModelFiles, PlanLimits, PlannedTensor } from "./plan";
import {
  bandwidthAt,
  type CostFacts,
  estimateOf,
  type HitCurve,
  type Placement,
  publishedHitCurve,
  type ReaderShape,
  type Speeds,
  speedsOf,
} from "./plan-cost";
import { adjust, guessExperienceOf, guessKeyOf, hitCurveOf, type PlanFacts } from "./plan-history";
import {
  allGpuLayers,
  copiedOutputBytes,
  type GpuMemoryUse,
  isOnGpu,
  kvTypes,
  type MemoryUse,
  memoryOf,
  processBytesWith,
  slotBytesOf,
  sumOf,
  type Use,
} from "./plan-memory";
import { groupsOf, leastPoolBytes } from "./plan-place";
import { earlyShareOf } from "./plan-prediction";
import type { Draft, SpeculationFacts } from "./plan-speculation";
import { bandwidthText, bytesText, countText } from "./text";

/** llama.cpp's own defaults (common.h: n_batch, n_ubatch): what its server runs with is what a resident model gets. */
export const residentBatchTokens = 2048;
export const usualUbatchTokens = 512;
/** Fewer make a prompt absurdly slow. */
export const leastUbatchTokens = 32;
/** cpuparams.poll of common.h. */
export const residentPollPercent = 50;
/** A conversation of a few pages; more is a flag away, and costs memory from the start. */
export const usualContextTokens = 4096;
/** What common.h and llama.cpp's server use: another type changes the answer. */
const usualKvType = "f16";
/** What llama.cpp leaves free on each device when it fits a model itself (fit_params_target of common.h). */
const gpuMarginBytes = 1_073_741_824;

/** What is free now is not ours alone: a sixteenth of it is left for what other programs ask for meanwhile. */
const freeShare = 15 / 16;

/** Bytes that a plan may use in all: what a person allows, else the free memory less a reserve. */
export function budgetOf(machine: Machine, limits: PlanLimits): number {
  const { availableBytes } = machine.memory;
  return limits.memoryBytes === null
    ? Math.floor(availableBytes * freeShare)
    : Math.min(availableBytes, limits.memoryBytes);
}

/** GPU memory that a plan may use; null where there is none. */
export function gpuBudgetOf(
  machine: Machine,
  limits: PlanLimits,
): { readonly bytes: number; readonly isUnified: boolean } | null {
  const discrete = machine.devices.filter((device) => device.type === "gpu");
  // As llama.cpp does: a GPU inside the processor counts only where there is no other.
  const devices = discrete.length > 0 ? discrete : machine.devices.filter((device) => device.type === "igpu");
  const free = devices.reduce((sum, device) => {
    const left = device.isUnified ? device.freeBytes * freeShare : device.freeBytes - gpuMarginBytes;
    return sum + Math.max(0, Math.floor(left));
  }, 0);
  const bytes = Math.min(free, limits.gpuMemoryBytes ?? free);
  return bytes > 0 ? { bytes, isUnified: devices.every((device) => device.isUnified) } : null;
}

// ---- the task -----------------------------------------------------------------------------------------------------

/** Everything that the questions below share. */
export interface Task {
  readonly subject: ModelFiles;
  readonly model: Model;
  readonly machine: Machine;
  readonly limits: PlanLimits;
  readonly knowledge: Knowledge;
  readonly budget: number;
  readonly gpu: { readonly bytes: number; readonly isUnified: boolean } | null;
  readonly threads: number;
  readonly kvType: string;
  readonly speeds: Speeds | null;
  readonly curve: HitCurve;
  readonly reader: ReaderShape & { readonly reason: string };
  readonly earlyShare: number;
  /** Its bytes are out of the budget already. */
  readonly draft: Draft | null;
  /** Of a context for the model's own MTP layers; 0: they do not guess. */
  readonly mtpBytes: number;
}

export function taskOf(
  subject: ModelFiles,
  machine: Machine,
  limits: PlanLimits,
  knowledge: Knowledge,
): Task {
  const { model } = subject;
  const threads = limits.threads ?? machine.computeCores;
  const budget = budgetOf(machine, limits) - (limits.projector?.memoryBytes ?? 0);
  return {
    subject,
    model,
    machine,
    limits,
    knowledge,
    budget,
    gpu: gpuBudgetOf(machine, limits),
    threads,
    kvType: kvTypeOf(model, limits),
    speeds: speedsOf(model, machine, threads),
    curve: knowledge.hitCurve ?? hitCurveOf(model, knowledge.history ?? []) ?? publishedHitCurve,
    reader: readerOf(model, machine, budget),
    earlyShare: earlyShareOf(model),
    draft: null,
    mtpBytes: 0,
  };
}

function kvTypeOf(model: Model, limits: PlanLimits): string {
  const type = limits.kvType ?? usualKvType;
  const isKnown = kvTypes.some((one) => one === type);
  // llama_init_from_model: blocks of 32 must divide a head's row.
  const isPacked = !["f32", "f16", "bf16"].includes(type);
  const fits = !isPacked || (model.keyLength % 32 === 0 && model.valueLength % 32 === 0);
  if (isKnown && fits) {
    return type;
  }
  throw new HypuraError(
    "usage",
    isKnown
      ? `the KV type ${type} packs 32 numbers and the heads of this model have ${model.keyLength}: give f16, bf16 or f32`
      : `there is no KV type ${JSON.stringify(type)}: give one of ${kvTypes.join(", ")}`,
  );
}

/**
 * Reads of 1 MiB and less by eight threads reach what the disk gives, and no single one holds a thread for long
 * (test/bench/NOTES.md); another shape is taken where this very disk was measured to give a quarter more.
 */
const usualThreads = 8;
const usualPieceBytes = 1_048_576;
/** A stride that is not much longer is one read all the same: two cost the processor twice. */
const longestPieceBytes = 2_097_152;

export function usualReader(longestStrideBytes: number): ReaderShape {
  const whole = slotBytesOf(longestStrideBytes);
  const isOneRead = whole > usualPieceBytes && whole <= longestPieceBytes;
  return { threads: usualThreads, pieceBytes: isOneRead ? whole : usualPieceBytes };
}

/** Each thread has a buffer of a piece: no more of the budget than this goes there. */
const readerShare = 1 / 32;

/**
 * The best of many short measurements is partly luck, and two readers that gave a fifth more there made tokens 5 % longer
 * (test/bench/NOTES.md): another shape has to promise this much.
 */
const shapeGain = 1.25;

function readerOf(model: Model, machine: Machine, budget: number): Task["reader"] {
  const storage = machine.profile?.storage[0];
  // No read is longer than the stride that it is a piece of.
  const longest = model.strides.reduce((most, set) => Math.max(most, set.strideBytes), 1);
  const usual = usualReader(longest);
  if (storage === undefined) {
    return { ...usual, reason: "the disk was not measured" };
  }
  const bandwidth = ({ threads, pieceBytes }: ReaderShape): number =>
    bandwidthAt(storage, Math.min(pieceBytes, longest), threads);
  const pieceBytes = Math.min(storage.best.readBytes, Math.ceil(longest / 4096) * 4096);
  const measured: ReaderShape = { threads: storage.best.depth, pieceBytes };
  const isUsable =
    pieceBytes % 4096 === 0 &&
    measured.threads <= 64 &&
    measured.threads * pieceBytes <= Math.max(readerShare * budget, usual.threads * usual.pieceBytes);
  return isUsable && bandwidth(measured) > shapeGain * bandwidth(usual)
    ? { ...measured, reason: `measured: ${bandwidthText(bandwidth(measured))}` }
    : {
        ...usual,
        reason: `measured: ${bandwidthText(bandwidth(usual))}, and no other shape gives more`,
      };
}

/** Of the best bandwidth, what reads that are done early have to reach. */
const prefetchShare = 0.9;
/** One after the other, the disk would rest between them. */
const leastPrefetchReads = 2;

/**
 * How many reads that nobody waits for yet are under way at once: the fewest that keep the disk busy, since one that is
 * waited for shares it with them.
 */
export function prefetchDepthOf(machine: Machine, reader: ReaderShape, strideBytes: number): number {
  const storage = machine.profile?.storage[0];
  if (storage === undefined) return Math.min(leastPrefetchReads, reader.threads);
  const depths = Array.from({ length: reader.threads }, (_, i) => i + 1);
  const bandwidths = depths.map((depth) =>
    bandwidthAt(storage, Math.min(reader.pieceBytes, strideBytes), depth),
  );
  const enough = prefetchShare * Math.max(...bandwidths);
  const fewest = depths.find((_, i) => (bandwidths[i] ?? 0) >= enough) ?? reader.threads;
  return Math.min(reader.threads, Math.max(leastPrefetchReads, fewest));
}

export function useOf(
  task: Task,
  wanted: { readonly contextTokens: number; readonly ubatchTokens: number; readonly gpuLayers: number },
): Use {
  const { limits, kvType, machine } = task;
  const processBytes = processBytesWith(machine.gpuBackends);
  return { ...wanted, slotCount: limits.slotCount ?? 1, kvType, processBytes };
}

/** By tensor: where it is when it is resident. */
export function homesOf(model: Model, gpuLayers: number): readonly ("gpu" | "ram")[] {
  return model.tensors.map((tensor) => (isOnGpu(model, tensor, gpuLayers) ? "gpu" : "ram"));
}

interface Fixed {
  readonly ramBytes: number;
  readonly gpuBytes: number;
}

/** Bytes of the tensors that `counts` names, by home. */
export function bytesAt(model: Model, gpuLayers: number, counts: (tensor: ModelTensor) => boolean): Fixed {
  let ramBytes = 0;
  let gpuBytes = copiedOutputBytes(model, gpuLayers);
  for (const tensor of model.tensors) {
    if (!counts(tensor)) continue;
    if (isOnGpu(model, tensor, gpuLayers)) gpuBytes += tensor.sizeBytes;
    else ramBytes += tensor.sizeBytes;
  }
  return { ramBytes, gpuBytes };
}

export interface Sides {
  readonly ram: MemoryUse;
  readonly gpu: GpuMemoryUse;
}

export function withWeights({ ram, gpu }: Sides, fixed: Fixed): Sides {
  return {
    ram: { ...ram, weightBytes: ram.weightBytes + fixed.ramBytes },
    gpu: { ...gpu, weightBytes: gpu.weightBytes + fixed.gpuBytes },
  };
}

/** What is left for streamable weights; negative where not even this fits. */
export function roomOf(task: Task, { ram, gpu }: Sides) {
  const free = task.budget - sumOf(ram);
  const isUnified = task.gpu?.isUnified === true;
  return {
    ramBytes: free,
    gpuBytes: (task.gpu?.bytes ?? 0) - sumOf(gpu),
    totalBytes: isUnified ? free - sumOf(gpu) : null,
  };
}

export function fits(task: Task, sides: Sides): boolean {
  const { ramBytes, gpuBytes, totalBytes } = roomOf(task, sides);
  return ramBytes >= 0 && gpuBytes >= 0 && (totalBytes ?? 0) >= 0;
}

export const noGpu: GpuMemoryUse = { weightBytes: 0, kvBytes: 0, stateBytes: 0, computeBytes: 0 };

// ---- what all plans share -------------------------------------------------------------------------------------

interface Settled {
  readonly context: ContextChoice;
  readonly sides: Sides;
  readonly ubatchTokens: number;
  readonly repack?: boolean;
}

export function commonPart(
  task: Task,
  placement: Placement,
  { context, sides, ubatchTokens, repack = false }: Settled,
) {
  const { subject, model, limits, threads } = task;
  const projector = limits.projector ?? null;
  const facts = factsOf(task, placement, ubatchTokens, repack);
  const part = {
    version: 1,
    model: { name: subject.name, architecture: model.architecture },
    files: subject.files,
    tensors: model.tensors.map(
      ({ name, fileIndex, offsetBytes, sizeBytes }, index): PlannedTensor => ({
        name,
        fileIndex,
        offsetBytes,
        sizeBytes,
        tier: placement.tiers[index] ?? "ram",
      }),
    ),
    contextTokens: context.tokens,
    slotCount: limits.slotCount ?? 1,
    ubatchTokens,
    decodeThreads: threads,
    prefillThreads: threads,
    gpuLayers: placement.gpuLayers,
    kvTypeK: task.kvType,
    kvTypeV: task.kvType,
    embeddings: limits.embeddings === true,
    slotFolder: null,
    contextShift: limits.contextShift === true,
    projector: projector === null ? null : { path: projector.path, sizeBytes: projector.sizeBytes },
    memory: {
      ...sides.ram,
      draftBytes: (task.draft?.bytes ?? 0) + task.mtpBytes,
      projectorBytes: projector?.memoryBytes ?? 0,
    },
    gpuMemory: placement.gpuLayers === 0 ? null : sides.gpu,
    longestContextTokens: longestContext(task, placement, ubatchTokens),
  } as const;
  const estimate = adjust(
    estimateOf(facts, task.speeds),
    historyFacts(model, task.machine, threads, poolShareOf(placement.classes)),
    task.knowledge.history ?? [],
  );
  return { ...part, estimate };
}

/** What the choice of guesses asks. */
export function speculationFacts(task: Task, placement: Placement): SpeculationFacts {
  const { model, machine, threads, limits, speeds, draft, knowledge } = task;
  const facts = historyFacts(model, machine, threads, poolShareOf(placement.classes));
  const mtp = task.mtpBytes > 0;
  const draftKey = guessKeyOf(draft?.model ?? null, mtp);
  const experience = guessExperienceOf(facts, knowledge.history ?? [], draftKey);
  return { model, limits, placement, speeds, experience, draft, mtp };
}

export function historyFacts(
  model: Model,
  machine: Machine,
  threads: number,
  poolShare: number | null,
): PlanFacts {
  const machineKey = machine.profile?.fingerprint ?? null;
  return { machineKey, model, threads, poolShare, streams: poolShare !== null };
}

/** Of the streamed bytes, the share that the pool holds; null where nothing streams. */
export function poolShareOf(
  classes: readonly {
    readonly strideBytes: number;
    readonly strideCount: number;
    readonly slotCount: number;
  }[],
): number | null {
  const sum = (pick: (one: (typeof classes)[number]) => number): number =>
    classes.reduce((all, one) => all + pick(one) * one.strideBytes, 0);
  return classes.length === 0 ? null : sum((one) => one.slotCount) / sum((one) => one.strideCount);
}

export function factsOf(task: Task, placement: Placement, ubatchTokens: number, repack = false): CostFacts {
  const { model, kvType, curve, reader } = task;
  const onGpu = placement.gpuLayers >= allGpuLayers(model);
  return {
    model,
    placement,
    curve,
    reader,
    ubatchTokens,
    repack,
    earlyShare: task.earlyShare,
    kvBytesPerToken: onGpu ? 0 : kvBytesPerToken(model, { keyType: kvType, valueType: kvType }),
  };
}

/** The most context with which the placement's kind of plan still fits, as a multiple of 256 (or what was trained). */
function longestContext(task: Task, placement: Placement, ubatchTokens: number): number {
  const { model } = task;
  const trained = model.trainedContextTokens || usualContextTokens;
  const streams = placement.classes.length > 0;
  const cold = (tensor: ModelTensor): boolean => placement.tiers[tensor.index] !== "nvme";
  const counts = streams ? (tensor: ModelTensor): boolean => tensor.strides === null : cold;
  const fixed = bytesAt(model, placement.gpuLayers, counts);
  const pool = streams ? leastPoolBytes(groupsOf({ model, homes: homesOf(model, placement.gpuLayers) })) : 0;
  const holds = (contextTokens: number): boolean => {
    const least = streams ? leastUbatchTokens : ubatchTokens;
    const use = useOf(task, { contextTokens, ubatchTokens: least, gpuLayers: placement.gpuLayers });
    const sides = withWeights(memoryOf(model, use, streams), fixed);
    const withPool = { ...sides, ram: { ...sides.ram, poolBytes: pool } };
    return fits(task, placement.gpuLayers === 0 ? { ...withPool, gpu: noGpu } : withPool);
  };
  if (holds(trained)) {
    return trained;
  }
  let low = 0;
  let high = Math.ceil(trained / 256);
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (holds(middle * 256)) low = middle;
    else high = middle;
  }
  return low * 256;
}

export function gpuChoices(task: Task, gpuLayers: number, { gpu }: Sides): readonly Choice[] {
  if (task.gpu === null) {
    return [];
  }
  const all = allGpuLayers(task.model);
  return [
    {
      name: "gpu",
      value: `${countText(gpuLayers)} of ${countText(all)} layers`,
      reason:
        gpuLayers === all
          ? `${bytesText(sumOf(gpu))} fit in ${bytesText(task.gpu.bytes)}`
          : `the most that ${bytesText(task.gpu.bytes)} hold`,
    },
  ];
}

export function kvChoices({ kvType, limits }: Task): readonly Choice[] {
  const reason =
    limits.kvType === undefined || limits.kvType === null
      ? "llama.cpp's own; smaller ones change answers"
      : "asked for";
  return [{ name: "context type", value: kvType, reason }];
}

export function threadChoice(machine: Machine, limits: PlanLimits): Choice {
  return {
    name: "threads",
    value: String(limits.threads ?? machine.computeCores),
    reason: limits.threads === null ? "one for each core that computes" : "asked for",
  };
}

// ---- context --------------------------------------------------------------------------------------------------

export interface ContextChoice {
  readonly tokens: number;
  readonly reason: string;
}

/** What to try, best first. */
export function contextChoices({ model, limits }: Pick<Task, "model" | "limits">): readonly ContextChoice[] {
  const trained = model.trainedContextTokens || usualContextTokens;
  if (limits.contextTokens !== null) {
    // The core uses no more than the model was trained for (n_ctx_slot); more would be memory for nothing.
    return limits.contextTokens > trained
      ? [{ tokens: trained, reason: "all that the model was trained for" }]
      : [{ tokens: limits.contextTokens, reason: "asked for" }];
  }
  const usual = Math.min(trained, usualContextTokens);
  const choices = [
    { tokens: usual, reason: usual === trained ? "what the model was trained for" : "the default" },
  ];
  for (let tokens = Math.floor(usual / 2); tokens >= 512; tokens = Math.floor(tokens / 2)) {
    choices.push({ tokens, reason: "the most that fits" });
  }
  return choices;
}

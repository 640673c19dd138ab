// (Model, Machine, limits) -> Plan: where every byte goes and every number that native code needs. The brain, and
// pure: it takes values and gives a value, so that `inspect` shows exactly what `run` does. Native code chooses
// nothing that is not written here. This file owns the plan's shape and the order of the questions; what memory is
// needed answers plan-memory.ts, where weights go plan-place.ts, what a token costs plan-cost.ts.

import { HypuraError } from "./errors";
import type { Machine } from "./machine";
import { kvBytesPerToken, type Model, type ModelTensor } from "./model";
import {
  bandwidthAt,
  batchReads,
  bytesOfToken,
  type CostFacts,
  type Estimate,
  estimateOf,
  type HitCurve,
  type PlacedClass,
  type Placement,
  publishedHitCurve,
  type Speeds,
  secondsOfBatch,
  secondsOfToken,
  speedsOf,
} from "./plan-cost";
import {
  adjust,
  hitCurveOf,
  type MeasuredRun,
  measuredRun,
  type PlanFacts,
  type RunFigures,
} from "./plan-history";
import {
  allGpuLayers,
  copiedOutputBytes,
  type GpuMemoryUse,
  isOnGpu,
  kvTypes,
  type MemoryUse,
  memoryOf,
  type ReaderShape,
  slotBytesOf,
  spanWorkBytes,
  sumOf,
  type Use,
} from "./plan-memory";
import {
  groupsOf,
  leastPoolBytes,
  orderOfPass,
  orderOfTiers,
  type ProgramSolver,
  pinnedCount,
  place,
  ringSlots,
  type Solution,
  type TierSeconds,
} from "./plan-place";
import { bandwidthText, bytesText, countText } from "./text";

export type { Estimate, HitCurve } from "./plan-cost";
export type { MeasuredRun, RunFigures } from "./plan-history";
export { type GpuMemoryUse, kvTypes, type MemoryUse } from "./plan-memory";

export type Tier = "gpu" | "ram" | "nvme";
/**
 * A name of what the plan says, never a branch elsewhere. `partial-gpu`: all resident, some layers on a GPU. `mmap`: the
 * page cache serves what is hardly ever touched. `mixed-streaming`: experts and dense FFN matrices both stream.
 */
export type Mode =
  | "full-resident"
  | "partial-gpu"
  | "mmap"
  | "expert-streaming"
  | "dense-ffn-streaming"
  | "mixed-streaming";

export interface PlannedTensor {
  readonly name: string;
  readonly fileIndex: number;
  readonly offsetBytes: number;
  readonly sizeBytes: number;
  readonly tier: Tier;
}

/** A number of the plan that a person may ask about, with its reason in a few words. */
export interface Choice {
  readonly name: string;
  readonly value: string;
  readonly reason: string;
}

/** ffi/native/neuron_cache.h, CachePolicy: which stride gives its slot up. */
export interface CachePolicy {
  readonly kind: "lru" | "lfu-decay" | "least-stale" | "pinned-cyclic";
  readonly halfLifeTokens: number;
  readonly staleAfterPasses: number;
  readonly pinnedSlots: number;
  readonly workingSetStrides: number;
  readonly guardRingSlots: number;
}

/** Strides of equal type and size, and their slots. */
export interface SlotClass {
  readonly strideBytes: number;
  /** Distance of two slots: room for a stride at any page phase. */
  readonly slotBytes: number;
  readonly slotCount: number;
  /** What the largest single op needs at once; 1 where the op can run in waves. */
  readonly opSlots: number;
  readonly policy: CachePolicy;
}

export interface Streaming {
  /** In the order of a pass. */
  readonly tensors: readonly {
    readonly tensorIndex: number;
    readonly strideCount: number;
    readonly classIndex: number;
  }[];
  readonly classes: readonly SlotClass[];
  readonly reader: {
    readonly threads: number;
    readonly pieceBytes: number;
    readonly direct: boolean;
    readonly dropBuffered: boolean;
    readonly retryCount: number;
    readonly retryWaitNs: number;
  };
  readonly lookaheadStrides: number;
  readonly hugePages: boolean;
  readonly touchThreads: number;
  /** Bound of the work memory of one product over several slots. */
  readonly spanWorkBytes: number;
  /** Of streamed strides: what a token would read without a pool. */
  readonly touchedBytesPerToken: number;
}

/** Tokens that are guessed and verified in one pass. ffi/native/engine.h, PlanSpeculation. */
export interface Speculation {
  /** Guessed at once, at most. */
  readonly maxTokens: number;
  /** Guesses what followed the last `matchTokens` tokens before, in prompt and answer. */
  readonly fromContext: boolean;
  readonly matchTokens: number;
  /** A small model with the same vocabulary that guesses where the context gives nothing. */
  readonly draftPath: string | null;
  /** A draft ends before a token that the draft model holds less likely, 0 to 1. */
  readonly draftProbability: number;
}

/** Everything native code needs, as one value that survives JSON. ffi/native/engine.h, OpenPlan, reads it. */
export interface Plan {
  readonly version: 1;
  readonly mode: Mode;
  readonly model: { readonly name: string; readonly architecture: string };
  readonly files: readonly { readonly path: string; readonly sizeBytes: number }[];
  readonly tensors: readonly PlannedTensor[];
  /** Tokens of context that each slot has. */
  readonly contextTokens: number;
  /** Requests that decode together. */
  readonly slotCount: number;
  readonly batchTokens: number;
  readonly ubatchTokens: number;
  readonly decodeThreads: number;
  readonly prefillThreads: number;
  /** How long an idle compute thread spins before it sleeps, 0 to 100. */
  readonly pollPercent: number;
  readonly gpuLayers: number;
  readonly kvTypeK: string;
  readonly kvTypeV: string;
  /** Weights rearranged at load for faster kernels: changes last bits, and takes their memory once more. */
  readonly repack: boolean;
  readonly loadMode: "mmap" | "direct" | "read";
  /** Null: everything is resident, and the streaming device is never registered. */
  readonly streaming: Streaming | null;
  /** Null: one token a pass. */
  readonly speculation: Speculation | null;
  /** Where the KV of slots may be kept (prefix-store.ts); null: inference writes nothing. */
  readonly slotFolder: string | null;
  readonly memory: MemoryUse;
  /** Null where no GPU is used. */
  readonly gpuMemory: GpuMemoryUse | null;
  /** The most context of one slot that this model can have here, as this plan is. */
  readonly longestContextTokens: number;
  readonly estimate: Estimate;
  /** How the placement was found; null where everything fits and there was nothing to solve. */
  readonly solved: Solved | null;
  readonly choices: readonly Choice[];
}

/** Which solver found the placement, and how far the other one's was from it. */
export interface Solved {
  readonly by: Solution["by"];
  /** Time of a token by each, where it found a placement: in seconds, or in no unit where nothing was measured. */
  readonly greedyCost: number | null;
  readonly programCost: number | null;
}

/** What a person asked for; null means: decide. */
export interface PlanLimits {
  readonly contextTokens: number | null;
  readonly slotCount: number | null;
  readonly threads: number | null;
  /** Bytes that this process may use in all. */
  readonly memoryBytes: number | null;
  /** `auto` streams when the model does not fit. */
  readonly mode?: "auto" | "resident" | "stream";
  /** Bytes of GPU memory that may be used; 0: no GPU. */
  readonly gpuMemoryBytes?: number | null;
  readonly kvType?: string | null;
  /** A plan that was made before: it is followed as it is, if it is one of this model. */
  readonly plan?: Plan | null;
}

export const noLimits: PlanLimits = {
  contextTokens: null,
  slotCount: null,
  threads: null,
  memoryBytes: null,
};

export interface ModelFiles {
  readonly name: string;
  readonly files: readonly { readonly path: string; readonly sizeBytes: number }[];
  readonly model: Model;
}

/** What earlier runs taught. */
export interface Knowledge {
  readonly history?: readonly MeasuredRun[];
  /** Instead of the one from the history, or the published one. */
  readonly hitCurve?: HitCurve;
  /** Instead of YALPS: a test's. */
  readonly solver?: ProgramSolver;
}

/** llama.cpp's own defaults (common.h: n_batch, n_ubatch): what its server runs with is what a resident model gets. */
const residentBatchTokens = 2048;
const usualUbatchTokens = 512;
/** cpuparams.poll of common.h. */
const residentPollPercent = 50;
/** A conversation of a few pages; more is a flag away, and costs memory from the start. */
const usualContextTokens = 4096;
/** What common.h and llama.cpp's server use: another type changes the answer. */
const usualKvType = "f16";
/** What llama.cpp leaves free on each device when it fits a model itself (fit_params_target of common.h). */
const gpuMarginBytes = 1_073_741_824;

/** The plan for this model on this machine. Throws `not-enough-memory` where it does not fit. */
export function makePlan(
  subject: ModelFiles,
  machine: Machine,
  limits: PlanLimits = noLimits,
  knowledge: Knowledge = {},
): Plan {
  if (limits.plan !== undefined && limits.plan !== null) {
    return followed(subject, limits.plan);
  }
  const task = taskOf(subject, machine, limits, knowledge);
  const plan =
    (limits.mode === "stream" ? null : makeResident(task)) ??
    (limits.mode === "resident" ? null : (makeMapped(task) ?? makeStreaming(task)));
  if (plan === null) {
    throw refusal(task);
  }
  return plan;
}

/** What is free now is not ours alone: a sixteenth of it is left for what other programs ask for meanwhile. */
const freeShare = 15 / 16;

/** Bytes that a plan may use in all: what a person allows, else the free memory less a reserve. */
export function budgetOf(machine: Machine, limits: PlanLimits): number {
  const { availableBytes } = machine.memory;
  return limits.memoryBytes === null
    ? Math.floor(availableBytes * freeShare)
    : Math.min(availableBytes, limits.memoryBytes);
}

export function totalBytes(memory: MemoryUse): number {
  return sumOf(memory);
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
interface Task {
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
}

function taskOf(subject: ModelFiles, machine: Machine, limits: PlanLimits, knowledge: Knowledge): Task {
  const { model } = subject;
  const threads = limits.threads ?? machine.computeCores;
  return {
    subject,
    model,
    machine,
    limits,
    knowledge,
    budget: budgetOf(machine, limits),
    gpu: gpuBudgetOf(machine, limits),
    threads,
    kvType: kvTypeOf(model, limits),
    speeds: speedsOf(model, machine, threads),
    curve: knowledge.hitCurve ?? hitCurveOf(model, knowledge.history ?? []) ?? publishedHitCurve,
    reader: readerOf(machine),
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
 * (test/bench/NOTES.md); another shape is taken where this very disk was measured to give a twentieth more.
 */
const usualReader: ReaderShape = { threads: 8, pieceBytes: 1_048_576 };

function readerOf(machine: Machine): Task["reader"] {
  const storage = machine.profile?.storage[0];
  if (storage === undefined) {
    return { ...usualReader, reason: "what disks of several kinds gave most with" };
  }
  const usual = bandwidthAt(storage, usualReader.pieceBytes, usualReader.threads);
  const { readBytes, depth } = storage.best;
  const isWhole = readBytes % 4096 === 0 && readBytes <= 16_777_216 && depth <= 64;
  const best = bandwidthAt(storage, readBytes, depth);
  return isWhole && best > 1.05 * usual
    ? { threads: depth, pieceBytes: readBytes, reason: `measured: ${bandwidthText(best)}` }
    : { ...usualReader, reason: `measured: ${bandwidthText(usual)}, and no other shape gives more` };
}

function useOf(
  task: Task,
  wanted: { readonly contextTokens: number; readonly ubatchTokens: number; readonly gpuLayers: number },
): Use {
  return { ...wanted, slotCount: task.limits.slotCount ?? 1, kvType: task.kvType, reader: task.reader };
}

/** By tensor: where it is when it is resident. */
function homesOf(model: Model, gpuLayers: number): readonly ("gpu" | "ram")[] {
  return model.tensors.map((tensor) => (isOnGpu(model, tensor, gpuLayers) ? "gpu" : "ram"));
}

interface Fixed {
  readonly ramBytes: number;
  readonly gpuBytes: number;
}

/** Bytes of the tensors that `counts` names, by home. */
function bytesAt(model: Model, gpuLayers: number, counts: (tensor: ModelTensor) => boolean): Fixed {
  let ramBytes = 0;
  let gpuBytes = copiedOutputBytes(model, gpuLayers);
  for (const tensor of model.tensors) {
    if (!counts(tensor)) continue;
    if (isOnGpu(model, tensor, gpuLayers)) gpuBytes += tensor.sizeBytes;
    else ramBytes += tensor.sizeBytes;
  }
  return { ramBytes, gpuBytes };
}

interface Sides {
  readonly ram: MemoryUse;
  readonly gpu: GpuMemoryUse;
}

function withWeights({ ram, gpu }: Sides, fixed: Fixed): Sides {
  return {
    ram: { ...ram, weightBytes: ram.weightBytes + fixed.ramBytes },
    gpu: { ...gpu, weightBytes: gpu.weightBytes + fixed.gpuBytes },
  };
}

/** What is left for streamable weights; negative where not even this fits. */
function roomOf(task: Task, { ram, gpu }: Sides) {
  const free = task.budget - sumOf(ram);
  const isUnified = task.gpu?.isUnified === true;
  return {
    ramBytes: free,
    gpuBytes: (task.gpu?.bytes ?? 0) - sumOf(gpu),
    totalBytes: isUnified ? free - sumOf(gpu) : null,
  };
}

function fits(task: Task, sides: Sides): boolean {
  const { ramBytes, gpuBytes, totalBytes } = roomOf(task, sides);
  return ramBytes >= 0 && gpuBytes >= 0 && (totalBytes ?? 0) >= 0;
}

// ---- everything resident --------------------------------------------------------------------------------------

/** With as many layers on the GPU as it holds; null where the rest is too much for the ram. */
function residentSides(
  task: Task,
  contextTokens: number,
  counts: (tensor: ModelTensor) => boolean = () => true,
): { readonly sides: Sides; readonly gpuLayers: number } | null {
  const { model } = task;
  const most = task.gpu === null ? 0 : allGpuLayers(model);
  for (let gpuLayers = most; gpuLayers >= 0; gpuLayers--) {
    const use = useOf(task, { contextTokens, ubatchTokens: usualUbatchTokens, gpuLayers });
    const sides = withWeights(memoryOf(model, use, false), bytesAt(model, gpuLayers, counts));
    if (fits(task, gpuLayers === 0 ? { ...sides, gpu: noGpu } : sides)) {
      return { sides, gpuLayers };
    }
  }
  return null;
}

const noGpu: GpuMemoryUse = { weightBytes: 0, kvBytes: 0, stateBytes: 0, computeBytes: 0 };

function makeResident(task: Task): Plan | null {
  for (const context of contextChoices(task)) {
    const found = residentSides(task, context.tokens);
    if (found !== null) return residentPlan(task, context, found);
  }
  return null;
}

function residentPlan(
  task: Task,
  context: ContextChoice,
  { sides, gpuLayers }: { readonly sides: Sides; readonly gpuLayers: number },
): Plan {
  const { model, machine, limits, budget } = task;
  const { ram, gpu } = sides;
  const needed = sumOf(ram) + (task.gpu?.isUnified === true ? sumOf(gpu) : 0);
  const repack = ram.weightBytes > 0 && gpuLayers === 0 && needed + ram.weightBytes <= budget;
  const isPartial = gpuLayers > 0 && gpuLayers < allGpuLayers(model);
  const mode = isPartial ? "partial-gpu" : "full-resident";
  const placement: Placement = { gpuLayers, tiers: homesOf(model, gpuLayers), classes: [] };
  return {
    ...commonPart(task, placement, { context, sides, ubatchTokens: usualUbatchTokens }),
    mode,
    batchTokens: residentBatchTokens,
    pollPercent: residentPollPercent,
    repack,
    loadMode: isAligned(model) ? "mmap" : "read",
    streaming: null,
    solved: null,
    choices: [
      {
        name: "mode",
        value: mode,
        reason: `${bytesText(needed)} fit in ${bytesText(budget)}`,
      },
      ...gpuChoices(task, gpuLayers, sides),
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      threadChoice(machine, limits),
      {
        name: "repacking",
        value: repack ? "on" : "off",
        reason: repack
          ? "resident, and there is room for the rearranged copy"
          : gpuLayers > 0
            ? "layers on a GPU are computed as they lie in the file"
            : "no room for a second copy of the weights",
      },
    ],
  };
}

/** ggml computes on tensors at multiples of this (TENSOR_ALIGNMENT of ggml-impl.h); a file may hold them closer. */
const tensorAlignBytes = 32;

/** Whether the file can be computed on where it is mapped. */
function isAligned(model: Model): boolean {
  return model.tensors.every((tensor) => tensor.offsetBytes % tensorAlignBytes === 0);
}

// ---- the page cache -------------------------------------------------------------------------------------------

/**
 * The file mapped, and the kernel drops what nobody touches. Chosen only where everything that a token computes on fits
 * (all experts counted), so that the overflow is rows of tables, of which a token reads one, and layers that decoding
 * leaves out: then nothing is read again and again, and no streaming can be faster. Never where a person set a limit,
 * because mapped pages count as this process's until the kernel takes them.
 */
function makeMapped(task: Task): Plan | null {
  const { model, limits, budget } = task;
  if (limits.memoryBytes !== null || limits.mode === "stream" || !isAligned(model)) {
    return null;
  }
  const isHot = (tensor: ModelTensor): boolean =>
    tensor.touchedBytesPerToken >= tensor.sizeBytes || tensor.strides !== null;
  const cold = new Set(model.tensors.filter((tensor) => !isHot(tensor)).map((tensor) => tensor.index));
  const context = contextChoices(task)[0];
  if (context === undefined || cold.size === 0) {
    return null;
  }
  const use = useOf(task, { contextTokens: context.tokens, ubatchTokens: usualUbatchTokens, gpuLayers: 0 });
  const sides = withWeights(memoryOf(model, use, false), bytesAt(model, 0, isHot));
  // Rows in use: a sixteenth of the tables is far more than a text has different words.
  const coldBytes = model.tensors.reduce((sum, one) => sum + (cold.has(one.index) ? one.sizeBytes : 0), 0);
  if (sumOf(sides.ram) + coldBytes / 16 > budget) {
    return null;
  }
  const tiers = model.tensors.map((tensor) => (cold.has(tensor.index) ? "nvme" : "ram") as Tier);
  const placement: Placement = { gpuLayers: 0, tiers, classes: [] };
  return {
    ...commonPart(task, placement, { context, sides, ubatchTokens: usualUbatchTokens }),
    mode: "mmap",
    batchTokens: residentBatchTokens,
    pollPercent: residentPollPercent,
    repack: false,
    loadMode: "mmap",
    streaming: null,
    solved: null,
    choices: [
      {
        name: "mode",
        value: "mmap",
        reason: `all that tokens compute on fits; ${bytesText(coldBytes)} that they hardly touch stay in the file`,
      },
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      threadChoice(task.machine, limits),
      { name: "repacking", value: "off", reason: "no room for a second copy of the weights" },
    ],
  };
}

// ---- what all plans share -------------------------------------------------------------------------------------

interface Settled {
  readonly context: ContextChoice;
  readonly sides: Sides;
  readonly ubatchTokens: number;
}

function commonPart(task: Task, placement: Placement, { context, sides, ubatchTokens }: Settled) {
  const { subject, model, limits, threads } = task;
  const facts = factsOf(task, placement, ubatchTokens);
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
    speculation: null,
    slotFolder: null,
    gpuLayers: placement.gpuLayers,
    kvTypeK: task.kvType,
    kvTypeV: task.kvType,
    memory: sides.ram,
    gpuMemory: placement.gpuLayers === 0 ? null : sides.gpu,
    longestContextTokens: longestContext(task, placement),
  } as const;
  const estimate = adjust(
    estimateOf(facts, task.speeds),
    historyFacts(model, task.machine, threads, poolShareOf(placement.classes)),
    task.knowledge.history ?? [],
  );
  return { ...part, estimate };
}

function historyFacts(model: Model, machine: Machine, threads: number, poolShare: number | null): PlanFacts {
  const machineKey = machine.profile?.fingerprint ?? null;
  return { machineKey, model, threads, poolShare, streams: poolShare !== null };
}

/** Of the streamed bytes, the share that the pool holds; null where nothing streams. */
function poolShareOf(
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

/** What a run of this plan did, to be kept for the next plan; null where there is nothing to compare it with. */
export function runOf(
  plan: Plan,
  subject: Pick<ModelFiles, "model">,
  machine: Machine,
  figures: RunFigures,
): MeasuredRun | null {
  const { streaming } = plan;
  const share =
    streaming === null
      ? null
      : poolShareOf(
          streaming.classes.map((one, classIndex) => ({
            ...one,
            strideCount: streaming.tensors.reduce(
              (sum, set) => sum + (set.classIndex === classIndex ? set.strideCount : 0),
              0,
            ),
          })),
        );
  const facts = historyFacts(subject.model, machine, plan.decodeThreads, share);
  return measuredRun(facts, plan.estimate, figures);
}

function factsOf(task: Task, placement: Placement, ubatchTokens: number): CostFacts {
  const { model, kvType, curve, reader } = task;
  const onGpu = placement.gpuLayers >= allGpuLayers(model);
  return {
    model,
    placement,
    curve,
    reader,
    ubatchTokens,
    kvBytesPerToken: onGpu ? 0 : kvBytesPerToken(model, { keyType: kvType, valueType: kvType }),
  };
}

/** The most context with which the placement's kind of plan still fits, as a multiple of 256 (or what was trained). */
function longestContext(task: Task, placement: Placement): number {
  const { model } = task;
  const trained = model.trainedContextTokens || usualContextTokens;
  const streams = placement.classes.length > 0;
  const cold = (tensor: ModelTensor): boolean => placement.tiers[tensor.index] !== "nvme";
  const counts = streams ? (tensor: ModelTensor): boolean => tensor.strides === null : cold;
  const fixed = bytesAt(model, placement.gpuLayers, counts);
  const pool = streams ? leastPoolBytes(groupsOf({ model, homes: homesOf(model, placement.gpuLayers) })) : 0;
  const holds = (contextTokens: number): boolean => {
    const ubatchTokens = streams ? leastUbatchTokens : usualUbatchTokens;
    const use = useOf(task, { contextTokens, ubatchTokens, gpuLayers: placement.gpuLayers });
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

function gpuChoices(task: Task, gpuLayers: number, { gpu }: Sides): readonly Choice[] {
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

function kvChoices({ kvType, limits }: Task): readonly Choice[] {
  const reason =
    limits.kvType === undefined || limits.kvType === null
      ? "llama.cpp's own; smaller ones change answers"
      : "asked for";
  return [{ name: "context type", value: kvType, reason }];
}

function threadChoice(machine: Machine, limits: PlanLimits): Choice {
  return {
    name: "threads",
    value: String(limits.threads ?? machine.computeCores),
    reason: limits.threads === null ? "one for each core that computes" : "asked for",
  };
}

// ---- streaming ------------------------------------------------------------------------------------------------

const retryCount = 8;
const retryWaitNs = 1_000_000;
/**
 * Experts come in several small graphs a layer, and waking a sleeping thread for each costs more than its spinning:
 * 10 % more tokens a second (test/bench/NOTES.md). A dense model waits for the disk, where spinning is waste.
 */
const streamingPollPercent = 20;
/** Routing drifts with the text; a few thousand tokens of memory keep the hot experts through a change of topic. */
const halfLifeTokens = 4096;
const leastUbatchTokens = 32;

interface Streamed {
  readonly context: ContextChoice;
  readonly ubatchTokens: number;
  readonly sides: Sides;
  readonly solution: Solution;
}

function makeStreaming(task: Task): Plan | null {
  if (task.model.strides.length === 0) {
    return null;
  }
  for (const context of contextChoices(task)) {
    const found = streamWith(task, context);
    if (found !== null) return streamingPlan(task, found);
  }
  return null;
}

/**
 * Products on a GPU are not measured, so that a smaller share of the GPU has to promise this much of a shorter token
 * before it is taken.
 */
const gpuWorth = 0.95;

/** The best layers on the GPU, and then the best micro-batch, for this context; null where it does not fit. */
function streamWith(task: Task, context: ContextChoice): Streamed | null {
  const { solver } = task.knowledge;
  const candidates = gpuCandidates(task, context);
  let best: Streamed | null = null;
  for (const gpuLayers of candidates) {
    const found = firstUbatch(task, { context, gpuLayers }, greedyOnly);
    if (found !== null && (best === null || found.solution.seconds < gpuWorth * best.solution.seconds)) {
      best = found;
    }
  }
  for (const gpuLayers of best === null ? candidates : [best.solution.placement.gpuLayers]) {
    const found = firstUbatch(task, { context, gpuLayers }, solver);
    if (found !== null) return withBestUbatch(task, found);
  }
  return null;
}

/** For questions that do not need the last percent. */
const greedyOnly: ProgramSolver = () => null;

/** All that hold what cannot stream, in five steps from the most to none: fewer layers leave room for whole ones. */
function gpuCandidates(task: Task, context: ContextChoice): readonly number[] {
  if (task.gpu === null) {
    return [0];
  }
  let most = allGpuLayers(task.model);
  while (most > 0 && attempt(task, { context, ubatchTokens: leastUbatchTokens, gpuLayers: most }) === null) {
    most--;
  }
  return [...new Set([1, 0.75, 0.5, 0.25, 0].map((part) => Math.round(most * part)))];
}

interface Shape {
  readonly context: ContextChoice;
  readonly ubatchTokens: number;
  readonly gpuLayers: number;
}

/** The memory of a shape with everything streamed, if the smallest pool fits too. */
function attempt(task: Task, { context, ubatchTokens, gpuLayers }: Shape): Sides | null {
  const { model } = task;
  const use = useOf(task, { contextTokens: context.tokens, ubatchTokens, gpuLayers });
  const fixed = bytesAt(model, gpuLayers, (tensor) => tensor.strides === null);
  const made = withWeights(memoryOf(model, use, true), fixed);
  const sides = gpuLayers === 0 ? { ...made, gpu: noGpu } : made;
  const pool = leastPoolBytes(groupsOf({ model, homes: homesOf(model, gpuLayers) }));
  return fits(task, { ...sides, ram: { ...sides.ram, poolBytes: pool } }) ? sides : null;
}

function firstUbatch(
  task: Task,
  shape: Omit<Shape, "ubatchTokens">,
  solver: ProgramSolver | undefined,
): Streamed | null {
  for (let ubatchTokens = usualUbatchTokens; ubatchTokens >= leastUbatchTokens; ubatchTokens /= 2) {
    const found = solved(task, { ...shape, ubatchTokens }, solver);
    if (found !== null) return found;
  }
  return null;
}

function solved(task: Task, shape: Shape, solver: ProgramSolver | undefined): Streamed | null {
  const { model, speeds, curve, limits } = task;
  const sides = attempt(task, shape);
  if (sides === null) {
    return null;
  }
  const seconds = tierSeconds(speeds);
  const solution = place(
    {
      model,
      gpuLayers: shape.gpuLayers,
      homes: homesOf(model, shape.gpuLayers),
      room: roomOf(task, sides),
      mustStream: limits.mode === "stream",
      curve,
      seconds,
      judge: (placement) => judged(factsOf(task, placement, shape.ubatchTokens), speeds, seconds),
    },
    solver,
  );
  return solution === null ? null : { ...shape, sides, solution };
}

function tierSeconds(speeds: Speeds | null): TierSeconds {
  const storage = speeds?.storage;
  return speeds === null || storage === null || storage === undefined
    ? orderOfTiers
    : {
        // No product on a GPU was measured: it is only known to be the better place.
        gpu: () => 0,
        ram: speeds.decodeSeconds,
        read: (bytes) => bytes / storage.bestBytesPerSecond,
      };
}

function judged(facts: CostFacts, speeds: Speeds | null, seconds: TierSeconds): number {
  const measured = speeds === null ? null : secondsOfToken(facts, speeds);
  if (measured !== null) {
    return measured.total;
  }
  const { gpu, ram, pool, read } = bytesOfToken(facts);
  return seconds.gpu("", gpu) + seconds.ram("", ram + pool + read) + seconds.read(read);
}

/** A page of prompt and a page of answer: what the micro-batch is chosen for. */
const nominal = { promptTokens: 512, answerTokens: 256 } as const;

/**
 * A smaller micro-batch leaves room for slots and reads the streamed weights more often: the one with which a page is
 * answered soonest. Not where a GPU computes: it was not measured, and is known to want wide batches.
 */
function withBestUbatch(task: Task, first: Streamed): Streamed {
  const { gpuLayers } = first.solution.placement;
  if (gpuLayers > 0) {
    return first;
  }
  let best = first;
  let bestSeconds = nominalSeconds(task, first);
  for (let ubatchTokens = first.ubatchTokens / 2; ubatchTokens >= leastUbatchTokens; ubatchTokens /= 2) {
    const found = solved(task, { context: first.context, ubatchTokens, gpuLayers }, greedyOnly);
    if (found === null) continue;
    const seconds = nominalSeconds(task, found);
    if (seconds < bestSeconds) {
      best = found;
      bestSeconds = seconds;
    }
  }
  return best === first ? first : (solved(task, { ...best, gpuLayers }, task.knowledge.solver) ?? best);
}

function nominalSeconds(task: Task, { solution, ubatchTokens }: Streamed): number {
  const facts = factsOf(task, solution.placement, ubatchTokens);
  const read = solution.placement.classes.reduce(
    (sum, one) =>
      sum + one.sets.reduce((all, set) => all + batchReads(one, set, ubatchTokens) * set.strideBytes, 0),
    0,
  );
  const measured = task.speeds === null ? null : secondsOfBatch(facts, task.speeds);
  const batch = measured ?? tierSeconds(task.speeds).read(read);
  return Math.ceil(nominal.promptTokens / ubatchTokens) * batch + nominal.answerTokens * solution.seconds;
}

function streamingPlan(task: Task, { context, ubatchTokens, sides, solution }: Streamed): Plan {
  const { model, machine, limits, budget, reader } = task;
  const { placement } = solution;
  const classes = placement.classes.map((one) => slotClass(one));
  const poolBytes = classes.reduce((sum, one) => sum + one.slotBytes * one.slotCount, 0);
  const more = bytesAt(
    model,
    placement.gpuLayers,
    (tensor) => tensor.strides !== null && placement.tiers[tensor.index] !== "nvme",
  );
  const withResident = withWeights(sides, {
    ramBytes: more.ramBytes,
    gpuBytes: more.gpuBytes - copiedOutputBytes(model, placement.gpuLayers),
  });
  const full = { ...withResident, ram: { ...withResident.ram, poolBytes } };
  const hasExperts = placement.classes.some((one) => one.kind === "expert");
  const hasDense = placement.classes.some((one) => one.kind === "dense");
  const mode = hasExperts ? (hasDense ? "mixed-streaming" : "expert-streaming") : "dense-ffn-streaming";
  const streamedBytes = placement.classes.reduce((sum, one) => sum + one.strideBytes * one.strideCount, 0);
  const residentBytes = more.ramBytes + more.gpuBytes - copiedOutputBytes(model, placement.gpuLayers);
  const lookahead = hasDense ? ringSlots : 0;
  return {
    ...commonPart(task, placement, { context, sides: full, ubatchTokens }),
    mode,
    batchTokens: Math.max(ubatchTokens, limits.slotCount ?? 1, 2),
    pollPercent: hasExperts ? streamingPollPercent : 0,
    repack: false,
    loadMode: machine.hasDirectLoad ? "direct" : "read",
    streaming: {
      tensors: streamedTensors(model, placement),
      classes,
      reader: {
        threads: reader.threads,
        pieceBytes: reader.pieceBytes,
        direct: true,
        dropBuffered: true,
        retryCount,
        retryWaitNs,
      },
      lookaheadStrides: lookahead,
      hugePages: true,
      touchThreads: machine.computeCores,
      spanWorkBytes,
      touchedBytesPerToken: placement.classes.reduce(
        (sum, one) => sum + one.sets.reduce((all, set) => all + set.touchedCount * set.strideBytes, 0),
        0,
      ),
    },
    solved: {
      by: solution.by,
      greedyCost: solution.greedySeconds,
      programCost: solution.programSeconds,
    },
    choices: [
      {
        name: "mode",
        value: mode,
        reason:
          limits.mode === "stream"
            ? "asked for"
            : `${bytesText(model.tensorBytes)} of weights do not fit in ${bytesText(budget + (task.gpu?.isUnified === false ? task.gpu.bytes : 0))}`,
      },
      ...gpuChoices(task, placement.gpuLayers, full),
      {
        name: "pool",
        value: bytesText(poolBytes),
        reason: `what the budget leaves, for ${bytesText(streamedBytes)} of streamed weights`,
      },
      ...(residentBytes === 0
        ? []
        : [
            {
              name: "resident too",
              value: bytesText(residentBytes),
              reason: "streamable weights that save more in memory than slots would",
            },
          ]),
      {
        name: "slots",
        value: classes.map((one) => countText(one.slotCount)).join(" + "),
        reason: classes.map((one) => `${bytesText(one.strideBytes)} each`).join(" and "),
      },
      {
        name: "lookahead",
        value: countText(lookahead),
        reason: hasDense
          ? "matrices in a ring, read ahead in the order of use"
          : "experts are known when the router has chosen",
      },
      {
        name: "reader",
        value: `${countText(reader.threads)} threads, pieces of ${bytesText(reader.pieceBytes)}`,
        reason: reader.reason,
      },
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      {
        name: "ubatch",
        value: `${countText(ubatchTokens)} tokens`,
        reason: "each reads the streamed weights once",
      },
      threadChoice(machine, limits),
      { name: "repacking", value: "off", reason: "streamed weights are computed as they lie in the file" },
    ],
  };
}

function streamedTensors(model: Model, { classes }: Placement): Streaming["tensors"] {
  const classOf = new Map(
    classes.flatMap((one, classIndex) => one.sets.map((set) => [set.tensorIndex, classIndex] as const)),
  );
  return orderOfPass(model).flatMap(({ tensorIndex, strideCount }) => {
    const classIndex = classOf.get(tensorIndex);
    return classIndex === undefined ? [] : [{ tensorIndex, strideCount, classIndex }];
  });
}

function slotClass(one: PlacedClass): SlotClass {
  const touched = one.sets.reduce((sum, set) => sum + set.touchedCount, 0);
  const ofOp = one.sets.reduce((most, set) => Math.max(most, set.touchedCount), 1);
  return {
    strideBytes: one.strideBytes,
    slotBytes: slotBytesOf(one.strideBytes),
    slotCount: one.slotCount,
    opSlots: 1,
    policy: {
      // A cyclic order defeats every policy but a fixed subset; experts come by use.
      kind: one.kind === "expert" ? "lfu-decay" : "pinned-cyclic",
      halfLifeTokens,
      staleAfterPasses: 1,
      pinnedSlots: one.kind === "expert" ? 0 : pinnedCount(one.slotCount, one.strideCount),
      workingSetStrides: touched,
      guardRingSlots: Math.max(1, Math.min(one.slotCount, 2 * ofOp)),
    },
  };
}

// ---- context --------------------------------------------------------------------------------------------------

interface ContextChoice {
  readonly tokens: number;
  readonly reason: string;
}

/** What to try, best first. */
function contextChoices({ model, limits }: Pick<Task, "model" | "limits">): readonly ContextChoice[] {
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

// ---- a plan from a file ---------------------------------------------------------------------------------------

/** The given plan, for the files of this model. Throws where it was made for another one. */
function followed(subject: ModelFiles, plan: Plan): Plan {
  const { tensors } = subject.model;
  const other = plan.tensors.findIndex((planned, index) => {
    const tensor = tensors[index];
    return (
      tensor === undefined ||
      tensor.name !== planned.name ||
      tensor.fileIndex !== planned.fileIndex ||
      tensor.offsetBytes !== planned.offsetBytes ||
      tensor.sizeBytes !== planned.sizeBytes
    );
  });
  if (plan.tensors.length === tensors.length && other < 0 && plan.files.length === subject.files.length) {
    return { ...plan, files: subject.files };
  }
  const where =
    other < 0
      ? `it has ${countText(plan.tensors.length)} tensors in ${plan.files.length} files, the model ${countText(tensors.length)} in ${subject.files.length}`
      : `its tensor ${JSON.stringify(plan.tensors[other]?.name)} is not the model's`;
  throw new HypuraError(
    "usage",
    `the plan was made for another model (${where}): make one with \`hypura inspect MODEL --json\``,
  );
}

// ---- refusal --------------------------------------------------------------------------------------------------

function refusal(task: Task): HypuraError {
  const { model, budget, machine, limits } = task;
  const where =
    limits.memoryBytes !== null && limits.memoryBytes <= machine.memory.availableBytes
      ? "allowed by --memory"
      : machine.memory.limitedBy === null
        ? "free for it"
        : `left under the control group ${machine.memory.limitedBy}`;
  const tokens = contextChoices(task).at(-1)?.tokens ?? usualContextTokens;
  const mayStream = limits.mode !== "resident" && model.strides.length > 0;
  const ubatchTokens = mayStream ? leastUbatchTokens : usualUbatchTokens;
  const use = useOf(task, { contextTokens: tokens, ubatchTokens, gpuLayers: 0 });
  const counts = mayStream ? (tensor: ModelTensor) => tensor.strides === null : () => true;
  const least = withWeights(memoryOf(model, use, mayStream), bytesAt(model, 0, counts)).ram;
  const pool = mayStream ? leastPoolBytes(groupsOf({ model, homes: homesOf(model, 0) })) : 0;
  const total = sumOf(least) + pool;
  const parts = [
    `${mayStream ? "weights that cannot stream" : "weights"} ${bytesText(least.weightBytes)}`,
    ...(mayStream ? [`the smallest pool for the rest ${bytesText(pool)}`] : []),
    `${countText(tokens)} tokens of context ${bytesText(least.kvBytes + least.stateBytes)}`,
    `scratch ${bytesText(least.computeBytes + least.streamingBytes)}`,
    `hypura itself ${bytesText(least.processBytes)}`,
  ];
  return new HypuraError(
    "not-enough-memory",
    `the model needs ${bytesText(total)} (${parts.join(", ")}), ${bytesText(budget)} are ${where}, ` +
      `${bytesText(total - budget)} too few: ${advice(task, least, total - budget)}`,
  );
}

/** The nearest thing that would make it fit. */
function advice({ model, limits, kvType }: Task, least: MemoryUse, missingBytes: number): string {
  if (limits.mode === "resident" && model.strides.length > 0) {
    return "let it stream (--mode auto)";
  }
  const halfKv =
    kvType === "f16" && least.kvBytes * (1 - 17 / 32) > missingBytes && model.keyLength % 32 === 0;
  if (limits.contextTokens !== null && limits.contextTokens > 512) {
    return halfKv ? "lower --context, or give --kv-type q8_0 (answers change a little)" : "lower --context";
  }
  return limits.memoryBytes === null
    ? "close programs, or take a smaller or more quantised model"
    : "close programs and allow more, or take a smaller or more quantised model";
}

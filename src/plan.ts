// (Model, Machine, limits) -> Plan: where every byte goes and every number that native code needs. The brain, and
// pure: it takes values and gives a value, so that `inspect` shows exactly what `run` does. Native code chooses
// nothing that is not written here.

import { HypuraError } from "./errors";
import type { Machine } from "./machine";
import { type Model, memoryBytes, type StrideSet } from "./model";
import { bytesText, countText } from "./text";

export type Tier = "gpu" | "ram" | "nvme";
/** A name of what the plan says, never a branch elsewhere. */
export type Mode = "full-resident" | "expert-streaming" | "dense-ffn-streaming";

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

/** Bytes by purpose; their sum is what the process should need at its peak. */
export interface MemoryUse {
  readonly weightBytes: number;
  readonly kvBytes: number;
  readonly stateBytes: number;
  readonly computeBytes: number;
  /** Slots for streamed weights, and what streaming needs beside them. */
  readonly poolBytes: number;
  readonly streamingBytes: number;
  readonly processBytes: number;
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
  /** The model turns text into vectors: each input is evaluated in one micro-batch, as large as the context. */
  readonly embeddings: boolean;
  /** Weights rearranged at load for faster kernels: changes last bits, and takes their memory once more. */
  readonly repack: boolean;
  readonly loadMode: "mmap" | "direct" | "read";
  /** Null: everything is resident, and the streaming device is never registered. */
  readonly streaming: Streaming | null;
  readonly memory: MemoryUse;
  readonly choices: readonly Choice[];
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
  /** For a model that turns text into vectors; it is resident. */
  readonly embeddings?: boolean;
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

/** llama.cpp's own defaults (common.h: n_batch, n_ubatch): what its server runs with is what a resident model gets. */
const residentBatchTokens = 2048;
const usualUbatchTokens = 512;
/** cpuparams.poll of common.h. */
const residentPollPercent = 50;
/** A conversation of a few pages; more is a flag away, and costs memory from the start. */
const usualContextTokens = 4096;
/** Resident memory of the executable with libhypura loaded and no model: 95 MB measured on Linux x86-64. */
const processBytes = 100_000_000;

/** The plan for this model on this machine. Throws `not-enough-memory` where it does not fit. */
export function makePlan(subject: ModelFiles, machine: Machine, limits: PlanLimits = noLimits): Plan {
  const budget = budgetOf(machine, limits);
  const resident = limits.mode === "stream" ? null : makeResident(subject, machine, limits, budget);
  const mayStream = limits.mode !== "resident" && limits.embeddings !== true;
  const plan = resident ?? (mayStream ? makeStreaming(subject, machine, limits, budget) : null);
  if (plan === null) {
    throw refusal(subject.model, budget, machine, limits);
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
  return Object.values(memory).reduce((sum: number, bytes: number) => sum + bytes, 0);
}

// ---- everything resident --------------------------------------------------------------------------------------

function makeResident(
  subject: ModelFiles,
  machine: Machine,
  limits: PlanLimits,
  budget: number,
): Plan | null {
  const { model } = subject;
  const embeddings = limits.embeddings === true;
  for (const context of contextChoices(model, limits)) {
    // Attention that looks both ways sees an input whole or not at all.
    const ubatch = embeddings ? context.tokens : usualUbatchTokens;
    const memory = memoryOf(model, { context: context.tokens, slots: limits.slotCount ?? 1, ubatch });
    if (totalBytes(memory) > budget) {
      continue;
    }
    const repack = totalBytes(memory) + memory.weightBytes <= budget;
    return {
      ...commonPart(subject, machine, limits, new Set()),
      mode: "full-resident",
      contextTokens: context.tokens,
      batchTokens: embeddings ? Math.max(ubatch, 2) : residentBatchTokens,
      ubatchTokens: ubatch,
      pollPercent: residentPollPercent,
      repack,
      loadMode: isAligned(model) ? "mmap" : "read",
      streaming: null,
      memory,
      choices: [
        {
          name: "mode",
          value: "full-resident",
          reason: `${bytesText(totalBytes(memory))} fit in ${bytesText(budget)}`,
        },
        { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
        threadChoice(machine, limits),
        {
          name: "repacking",
          value: repack ? "on" : "off",
          reason: repack
            ? "resident, and there is room for the rearranged copy"
            : "no room for a second copy of the weights",
        },
      ],
    };
  }
  return null;
}

/** ggml computes on tensors at multiples of this (TENSOR_ALIGNMENT of ggml-impl.h); a file may hold them closer. */
const tensorAlignBytes = 32;

/** Whether the file can be computed on where it is mapped. */
function isAligned(model: Model): boolean {
  return model.tensors.every((tensor) => tensor.offsetBytes % tensorAlignBytes === 0);
}

function commonPart(
  subject: ModelFiles,
  machine: Machine,
  limits: PlanLimits,
  streamed: ReadonlySet<number>,
) {
  const threads = limits.threads ?? machine.computeCores;
  return {
    version: 1,
    model: { name: subject.name, architecture: subject.model.architecture },
    files: subject.files,
    tensors: subject.model.tensors.map(
      ({ name, fileIndex, offsetBytes, sizeBytes }, index): PlannedTensor => ({
        name,
        fileIndex,
        offsetBytes,
        sizeBytes,
        tier: streamed.has(index) ? "nvme" : "ram",
      }),
    ),
    slotCount: limits.slotCount ?? 1,
    decodeThreads: threads,
    prefillThreads: threads,
    gpuLayers: 0,
    embeddings: limits.embeddings === true,
    kvTypeK: "f16",
    kvTypeV: "f16",
  } as const;
}

function threadChoice(machine: Machine, limits: PlanLimits): Choice {
  return {
    name: "threads",
    value: String(limits.threads ?? machine.computeCores),
    reason: limits.threads === null ? "one for each core that computes" : "asked for",
  };
}

// ---- streaming ------------------------------------------------------------------------------------------------

/** Direct reads are aligned to this (kDirectAlign of ffi/native/platform.h). */
const directAlignBytes = 4096;
/**
 * Reads of 1 MiB and less by eight threads reach what the disk gives, and no single one holds a thread for long
 * (reference measurements in test/bench/NOTES.md).
 */
const readerThreads = 8;
const pieceBytes = 1_048_576;
const retryCount = 8;
const retryWaitNs = 1_000_000;
/** A block's gate and up are in use while the next ones are read: more depth than this gained nothing. */
const ringSlots = 6;
const spanWorkBytes = 16_777_216;
/**
 * Experts come in several small graphs a layer, and waking a sleeping thread for each costs more than its spinning:
 * 10 % more tokens a second (test/bench/NOTES.md). A dense model waits for the disk, where spinning is waste.
 */
const streamingPollPercent = 20;
/** Routing drifts with the text; a few thousand tokens of memory keep the hot experts through a change of topic. */
const halfLifeTokens = 4096;

interface StreamShape {
  readonly ubatch: number;
  readonly context: { readonly tokens: number; readonly reason: string };
  readonly memory: MemoryUse;
}

function makeStreaming(
  subject: ModelFiles,
  machine: Machine,
  limits: PlanLimits,
  budget: number,
): Plan | null {
  const { model } = subject;
  if (model.strides.length === 0) {
    return null;
  }
  const groups = classesOf(model);
  const shape = chooseShape(model, groups, limits, budget);
  if (shape === null) {
    return null;
  }
  const poolBudget = budget - totalBytes(shape.memory);
  const classes = sizeClasses(model, groups, poolBudget);
  const poolBytes = classes.reduce((sum, one) => sum + one.slotBytes * one.slotCount, 0);
  const memory = { ...shape.memory, poolBytes };
  const isMoe = model.kind === "mixture-of-experts";
  const streamedBytes = streamedBytesOf(model);
  return {
    ...commonPart(subject, machine, limits, new Set(model.strides.map((set) => set.tensorIndex))),
    mode: isMoe ? "expert-streaming" : "dense-ffn-streaming",
    contextTokens: shape.context.tokens,
    batchTokens: Math.max(shape.ubatch, limits.slotCount ?? 1, 2),
    ubatchTokens: shape.ubatch,
    pollPercent: isMoe ? streamingPollPercent : 0,
    repack: false,
    loadMode: machine.hasDirectLoad ? "direct" : "read",
    streaming: {
      tensors: orderOfPass(model).map((set) => ({
        tensorIndex: set.tensorIndex,
        strideCount: set.strideCount,
        classIndex: groups.findIndex((group) => group.key === classKey(model, set)),
      })),
      classes,
      reader: {
        threads: readerThreads,
        pieceBytes,
        direct: true,
        dropBuffered: true,
        retryCount,
        retryWaitNs,
      },
      lookaheadStrides: isMoe ? 0 : ringSlots,
      hugePages: true,
      touchThreads: machine.computeCores,
      spanWorkBytes,
      touchedBytesPerToken: model.strides.reduce((sum, set) => sum + set.touchedCount * set.strideBytes, 0),
    },
    memory,
    choices: [
      {
        name: "mode",
        value: isMoe ? "expert-streaming" : "dense-ffn-streaming",
        reason: `${bytesText(model.tensorBytes)} of weights do not fit in ${bytesText(budget)}`,
      },
      {
        name: "pool",
        value: bytesText(poolBytes),
        reason: `what the budget leaves, for ${bytesText(streamedBytes)} of streamed weights`,
      },
      { name: "context", value: `${countText(shape.context.tokens)} tokens`, reason: shape.context.reason },
      {
        name: "ubatch",
        value: `${countText(shape.ubatch)} tokens`,
        reason: "each reads the streamed weights once",
      },
      threadChoice(machine, limits),
      { name: "repacking", value: "off", reason: "streamed weights are computed as they lie in the file" },
    ],
  };
}

interface ClassGroup {
  readonly key: string;
  readonly strideBytes: number;
  readonly strideCount: number;
  /** Strides of this class that one token touches. */
  readonly touchedCount: number;
  /** The most that one op touches for one token. */
  readonly opTouchedCount: number;
}

function classKey(model: Model, set: StrideSet): string {
  return `${model.tensors[set.tensorIndex]?.typeName} ${set.strideBytes}`;
}

function classesOf(model: Model): readonly ClassGroup[] {
  const groups = new Map<string, ClassGroup>();
  for (const set of model.strides) {
    const key = classKey(model, set);
    const group = groups.get(key);
    groups.set(key, {
      key,
      strideBytes: set.strideBytes,
      strideCount: (group?.strideCount ?? 0) + set.strideCount,
      touchedCount: (group?.touchedCount ?? 0) + set.touchedCount,
      opTouchedCount: Math.max(group?.opTouchedCount ?? 0, set.touchedCount),
    });
  }
  return [...groups.values()];
}

/** By layer, and within a layer in the order llama.cpp's graph uses them: up and gate before down. */
function orderOfPass(model: Model): readonly StrideSet[] {
  const rank = (set: StrideSet): number => {
    const tensor = model.tensors[set.tensorIndex];
    return (tensor?.layer ?? 0) * 2 + (tensor?.name.includes("down") ? 1 : 0);
  };
  return [...model.strides].sort((a, b) => rank(a) - rank(b) || a.tensorIndex - b.tensorIndex);
}

function slotBytesOf(strideBytes: number): number {
  return Math.floor((strideBytes + 2 * directAlignBytes - 2) / directAlignBytes) * directAlignBytes;
}

/** The fewest slots with which decoding is not absurd: the strides of one op twice, or a ring. */
function leastSlots(model: Model, group: ClassGroup): number {
  const wanted = model.kind === "mixture-of-experts" ? 2 * group.opTouchedCount : ringSlots;
  return Math.min(group.strideCount, wanted);
}

function chooseShape(
  model: Model,
  groups: readonly ClassGroup[],
  limits: PlanLimits,
  budget: number,
): StreamShape | null {
  const leastPool = groups.reduce(
    (sum, one) => sum + leastSlots(model, one) * slotBytesOf(one.strideBytes),
    0,
  );
  for (const context of contextChoices(model, limits)) {
    for (let ubatch = usualUbatchTokens; ubatch >= 32; ubatch /= 2) {
      const memory = streamingMemory(model, context.tokens, limits.slotCount ?? 1, ubatch);
      if (totalBytes(memory) + leastPool <= budget) {
        return { ubatch, context, memory };
      }
    }
  }
  return null;
}

/** All but the pool. */
function streamingMemory(model: Model, contextTokens: number, slots: number, ubatch: number): MemoryUse {
  const memory = memoryOf(model, { context: contextTokens, slots, ubatch });
  let widest = 0;
  for (const set of model.strides) {
    const [columns = 0, rows = 0] = model.tensors[set.tensorIndex]?.shape ?? [];
    widest = Math.max(widest, columns + rows);
  }
  // ffi/native/backend.cpp, Computer: rows gathered for two experts at a time, ids and indices; the delegate's work
  // memory for a product over a span of slots; and a bounce buffer for each reader thread.
  const scratch = 2 * 4 * ubatch * widest + 20 * ubatch * Math.max(1, model.expertCount) + 1_048_576;
  return {
    ...memory,
    weightBytes: model.tensorBytes - streamedBytesOf(model),
    streamingBytes: scratch + spanWorkBytes + readerThreads * (pieceBytes + 2 * directAlignBytes),
  };
}

function streamedBytesOf(model: Model): number {
  return model.strides.reduce((sum, set) => sum + set.strideBytes * set.strideCount, 0);
}

/** Slots by class: everyone's least, and the rest in proportion to the bytes that each class holds. */
function sizeClasses(model: Model, groups: readonly ClassGroup[], poolBudget: number): readonly SlotClass[] {
  const least = groups.map((one) => leastSlots(model, one));
  const leastBytes = groups.reduce((sum, one, i) => sum + (least[i] ?? 0) * slotBytesOf(one.strideBytes), 0);
  const allBytes = groups.reduce((sum, one) => sum + one.strideCount * one.strideBytes, 0);
  return groups.map((one, i) => {
    const slotBytes = slotBytesOf(one.strideBytes);
    const share = ((poolBudget - leastBytes) * (one.strideCount * one.strideBytes)) / allBytes;
    const slotCount = Math.min(one.strideCount, (least[i] ?? 0) + Math.floor(share / slotBytes));
    return {
      strideBytes: one.strideBytes,
      slotBytes,
      slotCount,
      opSlots: 1,
      policy: policyFor(model, one, slotCount),
    };
  });
}

function policyFor(model: Model, group: ClassGroup, slotCount: number): CachePolicy {
  const isMoe = model.kind === "mixture-of-experts";
  return {
    kind: isMoe ? "lfu-decay" : "pinned-cyclic",
    halfLifeTokens,
    staleAfterPasses: 1,
    // A whole class that fits stays; else all but the ring is a fixed subset (a cyclic order defeats any other).
    pinnedSlots: isMoe
      ? 0
      : slotCount >= group.strideCount
        ? slotCount - 1
        : Math.max(0, slotCount - ringSlots),
    workingSetStrides: group.touchedCount,
    guardRingSlots: Math.max(1, Math.min(slotCount, 2 * group.opTouchedCount)),
  };
}

// ---- memory ---------------------------------------------------------------------------------------------------

interface Use {
  readonly context: number;
  readonly slots: number;
  readonly ubatch: number;
}

function memoryOf(model: Model, use: Use): MemoryUse {
  const kv = memoryBytes(model, {
    keyType: "f16",
    valueType: "f16",
    contextTokens: use.context * use.slots,
    batchTokens: use.ubatch,
    sequenceCount: use.slots,
  });
  return {
    weightBytes: model.tensorBytes,
    ...kv,
    computeBytes: computeBytes(model, use),
    poolBytes: 0,
    streamingBytes: 0,
    processBytes,
  };
}

/**
 * Bytes of the graph's scratch for one micro-batch of u tokens over the n cells of KV of one slot:
 * u * (4 * (7 * embd + ffn) + 2 * n) + 4 * vocab * outputs. Per token a block keeps about seven rows of the
 * embedding's width at once, the widest FFN product twice (gate and up; with experts, for each one used, and its
 * output), and one row of the attention mask in f16. Checked against llama.cpp's own allocation by a test.
 */
function computeBytes(model: Model, use: Use): number {
  const dense = 2 * model.feedForwardLength;
  const experts = model.expertUsedCount * (3 * model.expertFeedForwardLength + model.embeddingLength);
  const floats = 7 * model.embeddingLength + Math.max(dense, experts);
  return use.ubatch * (4 * floats + 2 * use.context) + 4 * model.vocabularySize * use.slots;
}

interface ContextChoice {
  readonly tokens: number;
  readonly reason: string;
}

/** What to try, best first. */
function contextChoices(model: Model, limits: PlanLimits): readonly ContextChoice[] {
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

function refusal(model: Model, budget: number, machine: Machine, limits: PlanLimits): HypuraError {
  const where =
    limits.memoryBytes !== null && limits.memoryBytes <= machine.memory.availableBytes
      ? "allowed by --memory"
      : machine.memory.limitedBy === null
        ? "free for it"
        : `left under the control group ${machine.memory.limitedBy}`;
  const slots = limits.slotCount ?? 1;
  const tokens = contextChoices(model, limits).at(-1)?.tokens ?? usualContextTokens;
  const mayStream = limits.mode !== "resident" && limits.embeddings !== true && model.strides.length > 0;
  const least = mayStream
    ? streamingMemory(model, tokens, slots, 32)
    : memoryOf(model, { context: tokens, slots, ubatch: usualUbatchTokens });
  const pool = mayStream
    ? classesOf(model).reduce((sum, one) => sum + leastSlots(model, one) * slotBytesOf(one.strideBytes), 0)
    : 0;
  const total = totalBytes(least) + pool;
  const parts = [
    `${mayStream ? "weights that cannot stream" : "weights"} ${bytesText(least.weightBytes)}`,
    ...(mayStream ? [`the smallest pool for the rest ${bytesText(pool)}`] : []),
    `${countText(tokens)} tokens of context ${bytesText(least.kvBytes + least.stateBytes)}`,
    `scratch ${bytesText(least.computeBytes + least.streamingBytes)}`,
    `hypura itself ${bytesText(least.processBytes)}`,
  ];
  const advice =
    limits.contextTokens !== null && limits.contextTokens > 512
      ? "lower --context"
      : limits.mode === "resident" && model.strides.length > 0
        ? "let it stream (--mode auto)"
        : "close programs, or take a smaller or more quantised model";
  return new HypuraError(
    "not-enough-memory",
    `the model needs ${bytesText(total)} (${parts.join(", ")}), ${bytesText(budget)} are ${where}, ` +
      `${bytesText(total - budget)} too few: ${advice}`,
  );
}

// (Model, Machine, limits) -> Plan: where every byte goes and every number that native code needs. The brain, and
// pure: it takes values and gives a value, so that `inspect` shows exactly what `run` does. Native code chooses
// nothing that is not written here. This file owns the plan's shape, the order of the questions and the refusal;
// plan-resident.ts and plan-stream.ts make the two kinds of plans out of a question (plan-task.ts), plan-memory.ts says
// what memory is needed, plan-place.ts where weights go, plan-cost.ts what a token costs, plan-history.ts what earlier
// runs say about that, and plan-json.ts takes a plan back.

import { HypuraError } from "./errors";
import type { Machine } from "./machine";
import type { Model, ModelTensor } from "./model";
import type { Estimate, HitCurve } from "./plan-cost";
import { withDraft } from "./plan-draft";
import { type MeasuredRun, measuredRun, type RunFigures } from "./plan-history";
import { type GpuMemoryUse, type MemoryUse, memoryOf, sumOf } from "./plan-memory";
import { withMtp } from "./plan-mtp";
import { groupsOf, leastPoolBytes, type ProgramSolver, type Solution } from "./plan-place";
import { makeMapped, makeResident } from "./plan-resident";
import { makeStreaming } from "./plan-stream";
import {
  bytesAt,
  contextChoices,
  historyFacts,
  homesOf,
  leastUbatchTokens,
  poolShareOf,
  type Task,
  taskOf,
  useOf,
  usualContextTokens,
  usualUbatchTokens,
  withWeights,
} from "./plan-task";
import { bytesText, countText } from "./text";

export type { Estimate, HitCurve } from "./plan-cost";
export type { GuessFigures, MeasuredRun, RunFigures } from "./plan-history";
export { type GpuMemoryUse, kvTypes, type MemoryUse } from "./plan-memory";
export { budgetOf, gpuBudgetOf } from "./plan-task";

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
  /** A pass of more tokens counts as so many; 0: as it is. */
  readonly mostPassTokens: number;
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

/** Experts that are read before their router has chosen them. ffi/native/predictor.h. Places are in `Streaming.tensors`. */
export interface Prediction {
  /** For each token. */
  readonly experts: number;
  readonly routers: readonly {
    /** Place of a product on the input of the layer before. */
    readonly after: number;
    /** Places of the layer's experts. */
    readonly asked: readonly number[];
    /** The router, its norm and the norm of the layer before, all f32. */
    readonly tensorIndex: number;
    readonly normIndex: number;
    readonly normBeforeIndex: number;
  }[];
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
    /** Reads under way beyond which none begins that nobody waits for; 0: no bound. */
    readonly prefetchDepth: number;
    /** In passes of at most so many tokens the system reads in the background, where it can; 0: threads always do. */
    readonly backgroundTokens: number;
    /** Of those reads, under way at once. */
    readonly backgroundDepth: number;
  };
  readonly lookaheadStrides: number;
  /** Null: routers are waited for. */
  readonly prediction: Prediction | null;
  readonly hugePages: boolean;
  readonly touchThreads: number;
  /** Bound of the work memory of one product over several slots. */
  readonly spanWorkBytes: number;
  /** Of streamed strides: what a token would read without a pool. */
  readonly touchedBytesPerToken: number;
}

/** How guesses come from what was written before. ffi/native/guesser.h, GuessRule. */
export interface ContextRule {
  /** Last tokens that have to stand elsewhere. */
  readonly leastMatchTokens: number;
  /** Guesses in a row that go on at the place before, a word further, where fewer do. */
  readonly mostCarries: number;
  /** Of requests before, in all. */
  readonly memoryTokens: number;
  /** Guessed at once, and so many more for each that was right before, in the mean in which the newest counts a share. */
  readonly leastTokens: number;
  readonly tokensPerRight: number;
  readonly newestPercent: number;
}

/** Tokens that are guessed and verified in one pass. ffi/native/engine.h, PlanSpeculation. */
export interface Speculation {
  /** Guessed at once, at most. */
  readonly maxTokens: number;
  /** Guesses what followed the last tokens before, in prompt and answer and in requests before; null: does not. */
  readonly context: ContextRule | null;
  /** A small model with the same vocabulary that guesses where the context gives nothing. */
  readonly draftPath: string | null;
  /** What guesses beside the context, whatever its file is called (guessKeyOf); native code does not ask. */
  readonly draftKey: string | null;
  /** The model's own layers for the tokens after the next guess where the context gives nothing; not beside a draft model. */
  readonly mtp: boolean;
  /** A draft ends before a token that the draft model, or the MTP layer, holds less likely, 0 to 1. */
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
  /** The model turns text into vectors: each input is evaluated in one micro-batch, as large as the context. */
  readonly embeddings: boolean;
  /** Weights rearranged at load for faster kernels: changes last bits, and takes their memory once more. */
  readonly repack: boolean;
  readonly loadMode: "mmap" | "direct" | "read";
  /** Null: everything is resident, and the streaming device is never registered. */
  readonly streaming: Streaming | null;
  /** Null: one token a pass. */
  readonly speculation: Speculation | null;
  /** Where the KV of slots may be kept (prefix-store.ts); null: inference writes nothing. */
  readonly slotFolder: string | null;
  /** A context that is full loses its older half and generation goes on; else it ends. */
  readonly contextShift: boolean;
  /** What turns images into what the model reads; null: it sees none. */
  readonly projector: { readonly path: string; readonly sizeBytes: number } | null;
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
  /** For a model that turns text into vectors; it is resident. */
  readonly embeddings?: boolean;
  /** Tokens guessed and verified in one pass, at most; `auto` guesses where a pass does not take longer for it. */
  readonly speculation?: "off" | "auto" | number;
  readonly contextShift?: boolean;
  readonly projector?: {
    readonly path: string;
    readonly sizeBytes: number;
    readonly memoryBytes: number;
  } | null;
  /** The file of a small model with the same vocabulary; draft.ts opens it and puts it into `draft`. */
  readonly draftPath?: string | null;
  /** Taken where it pays; always where `speculation` is a number. */
  readonly draft?: DraftModel | null;
  /** A plan that was made before: it is followed as it is, if it is one of this model. */
  readonly plan?: Plan | null;
}

/** A small model with the vocabulary of the large one. */
export interface DraftModel {
  readonly path: string;
  readonly model: Model;
  /** A person named it; else it lay beside the model. */
  readonly isAskedFor: boolean;
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
  const plan = planned(task);
  if (plan === null) {
    throw refusal(task);
  }
  const drafted =
    limits.draft === undefined || limits.draft === null || limits.speculation === "off"
      ? plan
      : withDraft(task, plan, limits.draft, planned);
  return withMtp(task, drafted, planned);
}

function planned(task: Task): Plan | null {
  const { limits } = task;
  return (
    (limits.mode === "stream" ? null : makeResident(task)) ??
    (limits.mode === "resident" ? null : (makeMapped(task) ?? makeStreaming(task)))
  );
}

export function totalBytes(memory: MemoryUse): number {
  return sumOf(memory);
}

/** On all GPUs together; 0 where none is used. */
export function gpuTotalBytes({ gpuMemory }: Pick<Plan, "gpuMemory">): number {
  return gpuMemory === null ? 0 : sumOf(gpuMemory);
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
  const { budget, machine, limits } = task;
  const where =
    limits.memoryBytes !== null && limits.memoryBytes <= machine.memory.availableBytes
      ? "allowed by --memory"
      : machine.memory.limitedBy === null
        ? "free for it"
        : `left under the control group ${machine.memory.limitedBy}`;
  const tokens = contextChoices(task).at(-1)?.tokens ?? usualContextTokens;
  const { streams, least, pool, total } = leastMemory(task, tokens);
  const parts = [
    `${streams ? "weights that cannot stream" : "weights"} ${bytesText(least.weightBytes)}`,
    ...(streams ? [`the smallest pool for the rest ${bytesText(pool)}`] : []),
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

interface Least {
  readonly streams: boolean;
  readonly least: MemoryUse;
  readonly pool: number;
  readonly total: number;
}

/** What would do, of the modes that are allowed: a tiny model needs less in memory than streaming it would. */
function leastMemory(task: Task, contextTokens: number): Least {
  const { model, limits } = task;
  const of = (streams: boolean): Least => {
    const ubatchTokens = streams ? leastUbatchTokens : usualUbatchTokens;
    const use = useOf(task, { contextTokens, ubatchTokens, gpuLayers: 0 });
    const counts = streams ? (tensor: ModelTensor) => tensor.strides === null : () => true;
    const least = withWeights(memoryOf(model, use, streams), bytesAt(model, 0, counts)).ram;
    const pool = streams ? leastPoolBytes(groupsOf({ model, homes: homesOf(model, 0) })) : 0;
    return { streams, least, pool, total: sumOf(least) + pool };
  };
  if (limits.mode === "resident" || model.strides.length === 0) return of(false);
  const streamed = of(true);
  const resident = of(false);
  return limits.mode === "stream" || streamed.total <= resident.total ? streamed : resident;
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
    : "allow more with --memory, or take a smaller or more quantised model";
}

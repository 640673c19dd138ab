// What earlier runs say about the next one: measured runs -> a corrected estimate and the model's own curve of hits. Pure:
// where runs are kept is history.ts's matter. A figure that was measured beats one that was computed, the nearer the
// run was to the plan at hand the more.

import type { Model } from "./model";
import type { Estimate, HitCurve } from "./plan-cost";

/** One run, as it is kept. */
export interface MeasuredRun {
  readonly version: 1;
  /** ISO 8601. */
  readonly at: string;
  /** `fingerprint` of the machine's profile. */
  readonly machineKey: string;
  readonly modelKey: string;
  readonly streams: boolean;
  readonly threads: number;
  /** Of the streamed strides, the share that the pool held; null where nothing streamed. */
  readonly poolShare: number | null;
  readonly layerCount: number;
  /** `modelSeconds` of the plan's estimate: what was computed before any correction; null without a profile. */
  readonly modelSeconds: number | null;
  readonly decodeTokens: number;
  readonly decodeSeconds: number;
  /** Of the streamed experts that tokens touched, the share that was in the pool; null for dense models. */
  readonly hitRate: number | null;
  /** What `modelSeconds` was computed with; runs of before it was kept have none. */
  readonly modelHitRate?: number | null;
  /** What was guessed; left out by runs that were kept before guesses were, and by plans that guess nothing. */
  readonly guesses?: GuessFigures;
}

/** Guesses of one run. */
export interface GuessFigures {
  /** Guessed at once, at most. */
  readonly maxTokens: number;
  /** `guessKeyOf` what guessed beside the context; null: nothing did. */
  readonly draftKey: string | null;
  readonly passes: number;
  readonly drafted: number;
  readonly accepted: number;
}

/** What identifies a model whatever its file is called: the same tensors at the same places. */
export function modelKeyOf(model: Model): string {
  let hash = 0x811c9dc5; // FNV-1a
  const add = (text: string): void => {
    for (let i = 0; i < text.length; i++) {
      hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193) >>> 0;
    }
  };
  for (const tensor of model.tensors) add(`${tensor.name} ${tensor.typeName} ${tensor.sizeBytes};`);
  return `${model.architecture}-${model.tensorBytes}-${hash.toString(16).padStart(8, "0")}`;
}

/** What a run of a plan did. */
export interface RunFigures {
  /** ISO 8601. */
  readonly at: string;
  readonly decodeTokens: number;
  readonly decodeSeconds: number;
  /** Hits of the streaming counters in those tokens, 0 to 1; null where nothing streamed. */
  readonly hitRate: number | null;
  readonly guesses?: GuessFigures;
}

/** The run as it is kept; null where it cannot be compared with another: the machine was not measured. */
export function measuredRun(facts: PlanFacts, estimate: Estimate, figures: RunFigures): MeasuredRun | null {
  const { machineKey, model, threads, poolShare, streams } = facts;
  if (machineKey === null || !(figures.decodeTokens > 0) || !(figures.decodeSeconds > 0)) {
    return null;
  }
  return {
    version: 1,
    ...figures,
    // A ring hits by its share and nothing is learned from it.
    hitRate: model.kind === "mixture-of-experts" ? figures.hitRate : null,
    machineKey,
    modelKey: modelKeyOf(model),
    streams,
    threads,
    poolShare,
    layerCount: model.layerCount,
    modelSeconds: estimate.modelSeconds,
    modelHitRate: estimate.hits?.rate ?? null,
  };
}

/** Computed with other hits than there were, the time says nothing of the rest: hits are corrected by their own curve. */
const sameHits = 0.03;

function knewItsHits({ hitRate, modelHitRate }: MeasuredRun): boolean {
  return (
    hitRate === null ||
    (modelHitRate !== undefined && modelHitRate !== null && Math.abs(hitRate - modelHitRate) <= sameHits)
  );
}

/** Fewer tokens say little: the first ones are slow, and a pause weighs much. */
const leastTokens = 8;

function usable(run: MeasuredRun): boolean {
  return run.decodeTokens >= leastTokens && run.decodeSeconds > 0;
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length / 2;
  return Number.isInteger(half)
    ? ((sorted[half - 1] ?? 0) + (sorted[half] ?? 0)) / 2
    : (sorted[Math.floor(half)] ?? 0);
}

/** How often the pool had what a token needed, in runs of this very model on any machine; null where there were none. */
export function hitCurveOf(model: Model, history: readonly MeasuredRun[]): HitCurve | null {
  if (history.length === 0) return null;
  const key = modelKeyOf(model);
  const byShare = new Map<number, number[]>();
  for (const run of history) {
    const { poolShare, hitRate } = run;
    if (run.modelKey !== key || !usable(run) || poolShare === null || hitRate === null) continue;
    if (poolShare <= 0 || poolShare >= 1 || hitRate <= 0) continue;
    const share = Number(poolShare.toPrecision(2));
    byShare.set(share, [...(byShare.get(share) ?? []), hitRate]);
  }
  let most = 0;
  const points = [...byShare]
    .sort(([one], [other]) => one - other)
    .map(([share, rates]) => {
      // More slots never hit less; where two runs say so it is chance.
      most = Math.max(most, median(rates));
      return { share, hitRate: most };
    });
  return points.length === 0 ? null : { kind: "recorded", points };
}

export interface PlanFacts {
  /** Null: the machine was not measured. */
  readonly machineKey: string | null;
  readonly model: Model;
  readonly threads: number;
  readonly poolShare: number | null;
  readonly streams: boolean;
}

/** Its speed is that of its text, which repeated itself, and not that of a pass for each token. */
function isCarriedByGuesses({ guesses, decodeTokens }: MeasuredRun): boolean {
  return guesses !== undefined && guesses.accepted > decodeTokens / 20;
}

// ---- guesses ------------------------------------------------------------------------------------------------------

/** What guesses beside the context, as runs are told apart by it. */
export function guessKeyOf(draft: Model | null, mtp: boolean): string | null {
  return draft !== null ? modelKeyOf(draft) : mtp ? "mtp" : null;
}

/** What this model's own runs say about guessing, in the median of the newest. */
export interface GuessExperience {
  /** Of a token, in runs that guessed nothing; null where there were none. */
  readonly plainSeconds: number | null;
  /** By how many were guessed at once. */
  readonly guessed: readonly {
    readonly maxTokens: number;
    /** Of a token. */
    readonly seconds: number;
    readonly tokensPerPass: number;
  }[];
}

/** Another pool changes what a pass costs, but not which of two ways is the better one until it is quite another. */
const likePool = 0.25;
const newestRuns = 5;

/** Own runs with this draft (`null`: from the context alone) and without guesses; null where there were none of either. */
export function guessExperienceOf(
  facts: PlanFacts,
  history: readonly MeasuredRun[],
  draftKey: string | null,
): GuessExperience | null {
  const key = modelKeyOf(facts.model);
  const { machineKey, threads, streams, poolShare } = facts;
  const isOwn = (run: MeasuredRun): boolean =>
    run.machineKey === machineKey &&
    run.modelKey === key &&
    run.threads === threads &&
    run.streams === streams;
  const isLike = (run: MeasuredRun): boolean =>
    Math.abs((run.poolShare ?? 0) - (poolShare ?? 0)) <= likePool * Math.max(poolShare ?? 0, 0.01);
  const own = machineKey === null ? [] : history.filter((run) => isOwn(run) && isLike(run) && usable(run));
  const plain = own.filter((run) => run.guesses === undefined).slice(-newestRuns);
  const byMost = new Map<number, MeasuredRun[]>();
  for (const run of own) {
    if (run.guesses === undefined || run.guesses.draftKey !== draftKey || run.guesses.passes === 0) continue;
    byMost.set(run.guesses.maxTokens, [...(byMost.get(run.guesses.maxTokens) ?? []), run]);
  }
  const seconds = (runs: readonly MeasuredRun[]): number =>
    median(runs.map((run) => run.decodeSeconds / run.decodeTokens));
  const guessed = [...byMost].map(([maxTokens, all]) => {
    const runs = all.slice(-newestRuns);
    const perPass = runs.map((run) => run.decodeTokens / (run.guesses?.passes ?? run.decodeTokens));
    return { maxTokens, seconds: seconds(runs), tokensPerPass: median(perPass) };
  });
  return plain.length + guessed.length === 0
    ? null
    : { plainSeconds: plain.length === 0 ? null : seconds(plain), guessed };
}

// ---- estimates ----------------------------------------------------------------------------------------------------

/** Pools that differ by less than this are the same plan: free memory is never twice the same. */
const samePool = 0.03;

/**
 * The estimate with what was measured put in its place: runs of this plan give their median; runs of this model with
 * another pool scale the computed time; resident runs of other models say what a layer costs beside its weights
 * (threads that wait for each other at every operation), which the products of the profile do not contain.
 */
export function adjust(estimate: Estimate, facts: PlanFacts, history: readonly MeasuredRun[]): Estimate {
  const { machineKey, threads } = facts;
  if (machineKey === null || history.length === 0) return estimate;
  const here = history.filter(
    (run) =>
      run.machineKey === machineKey && run.threads === threads && usable(run) && !isCarriedByGuesses(run),
  );
  if (here.length === 0) return estimate;
  const key = modelKeyOf(facts.model);
  const ofModel = here.filter((run) => run.modelKey === key && run.streams === facts.streams);
  const distance = (run: MeasuredRun): number => Math.abs((run.poolShare ?? 0) - (facts.poolShare ?? 0));
  const same = ofModel.filter((run) => distance(run) <= samePool * Math.max(facts.poolShare ?? 0, 0.01));
  if (same.length > 0) {
    const seconds = median(same.slice(-5).map((run) => run.decodeSeconds / run.decodeTokens));
    return {
      ...estimate,
      decodeTokensPerSecond: 1 / seconds,
      basis: "measured",
      note: `measured in ${same.length === 1 ? "an earlier run" : `${same.length} earlier runs`} of this plan`,
    };
  }
  const { modelSeconds } = estimate;
  if (modelSeconds === null) return estimate;
  const near = ofModel
    .filter((run) => run.modelSeconds !== null && run.modelSeconds > 0 && knewItsHits(run))
    .sort((one, other) => distance(one) - distance(other))
    .slice(0, 5);
  if (near.length > 0) {
    const ratio = median(near.map((run) => run.decodeSeconds / run.decodeTokens / (run.modelSeconds ?? 1)));
    return {
      ...estimate,
      decodeTokensPerSecond: 1 / (modelSeconds * ratio),
      basis: "corrected",
      note: `corrected by ${near.length === 1 ? "an earlier run" : `${near.length} earlier runs`} of this model`,
    };
  }
  const overheads = here
    .filter((run) => !run.streams && run.modelSeconds !== null)
    .map((run) => (run.decodeSeconds / run.decodeTokens - (run.modelSeconds ?? 0)) / run.layerCount);
  if (overheads.length === 0) return estimate;
  const each = Math.max(0, median(overheads));
  return {
    ...estimate,
    decodeTokensPerSecond: 1 / (modelSeconds + each * facts.model.layerCount),
    basis: "corrected",
    note: "corrected by what layers cost in runs of other models here",
  };
}

// Whether tokens are guessed and verified several in one pass, from what, and how many. A pass over streamed weights
// reads the same bytes for a few tokens as for one, so guesses cost next to nothing while the disk is what a pass waits
// for; a mixture of experts reads other experts for every guess; and a draft model takes memory that would hold weights.
// It owns these decisions and their numbers; which draft model there is, is draft.ts's matter. Pure.

import type { Model } from "./model";
import type { Choice, ContextRule, Plan, PlanLimits, Speculation } from "./plan";
import { matrixOf, type Placement, type Speeds } from "./plan-cost";
import { type GuessExperience, guessKeyOf } from "./plan-history";
import { bytesText, countText, durationText, rateText } from "./text";

/**
 * What followed the longest match of the last tokens, and where not even the last one stands elsewhere, three times in a
 * row what follows a word further at the place before (replayed, test/bench/NOTES.md). Of a mixture of experts a guess on so little costs reads, and a draft model, which is asked last,
 * is right more often than it: there more has to match. In prose, where few are right, two or three at once leave a pass
 * short that is not as flat as it was planned to be. Requests before are searched for each pass: 65,536 tokens take
 * some 50 us.
 */
const memoryTokens = 65_536;
function contextRule({ model, draft, mtp }: SpeculationFacts): ContextRule {
  const depth = { leastTokens: 2, tokensPerRight: 4, newestPercent: 30 };
  const usual = { memoryTokens, ...depth };
  if (draft !== null || mtp) return { leastMatchTokens: 3, mostCarries: 0, ...usual };
  return model.kind === "mixture-of-experts"
    ? { leastMatchTokens: 2, mostCarries: 0, ...usual }
    : { leastMatchTokens: 1, mostCarries: 3, ...usual };
}
/** Where nothing was measured: on two cores a pass over a streamed 6 GB model took as long for 8 tokens as for 1. */
const usualPassTokens = 8;
const mostTokens = 15;
/** A pass with guesses may take so much longer than one without (the bar of a pass of eight tokens). */
const flatness = 1.1;
/** Computing of no more than this share of the reading hides behind it: readers and their system calls want the cores too. */
const hiddenShare = 0.75;
/** A pass that has room for one guess alone is at the edge of what it hides (test/bench/NOTES.md, SmolLM2). */
const leastGuesses = 2;
/** What own runs have to show before they are believed: the same run twice differs by as much. */
const worthwhile = 1.03;
/**
 * Where this model's own runs say nothing: a small model of the same family is right about so often, given that it was
 * right before. Qwen2.5-Coder 0.5B was right in 64 of 67 guesses for 1.5B in code and JSON (test/bench/NOTES.md); prose is
 * harder, and a draft that is taken in vain costs memory.
 */
const usualAcceptance = 0.7;
/** A draft ends before a token that the draft model itself holds less likely than this. */
const draftProbability = 0.4;

/** A draft model as the plan sees it. */
export interface Draft {
  readonly path: string;
  /** In words for people. */
  readonly name: string;
  readonly model: Model;
  /** Weights, context and scratch. */
  readonly bytes: number;
}

export interface SpeculationFacts {
  readonly model: Model;
  readonly limits: PlanLimits;
  readonly placement: Placement;
  readonly speeds: Speeds | null;
  /** What own runs with this draft, or without one, showed. */
  readonly experience: GuessExperience | null;
  readonly draft: Draft | null;
  /** Whether the model's own MTP layers guess. */
  readonly mtp: boolean;
}

export interface SpeculationChoice {
  readonly speculation: Speculation | null;
  readonly choice: Choice;
}

/** `placement` and `speeds` as of the plan; `batchTokens` is what one pass may hold over all slots. */
export function chooseSpeculation(facts: SpeculationFacts, batchTokens: number): SpeculationChoice {
  const { limits, model, placement, experience } = facts;
  const wish = limits.speculation ?? "auto";
  const room = Math.floor(batchTokens / (limits.slotCount ?? 1)) - 1;
  if (wish === "off" || room < 1) {
    return off(wish === "off" ? "asked for" : "a pass has no room for guesses");
  }
  if (wish !== "auto") {
    return on(facts, Math.min(wish, room), "asked for");
  }
  if (placement.classes.length === 0) {
    return off("no weights are read for a pass: a guess costs as much as a token");
  }
  if (model.memoryLayers.some(({ stateElements }) => stateElements > 0)) {
    return off("a wrong guess cannot be taken back from a recurrent state without a copy of it");
  }
  const own = ownRuns(experience);
  if (own !== null) {
    return own.isFaster ? on(facts, Math.min(own.maxTokens, room), own.reason) : off(own.reason);
  }
  if (model.kind === "mixture-of-experts") {
    return off("each guess reads experts of its own, and no own run showed a gain: try --speculation 4");
  }
  const slotCount = limits.slotCount ?? 1;
  const depth = Math.min(room, flatTokens(facts));
  if (slotCount * depth >= leastGuesses) {
    const tokens = countText(slotCount * (depth + 1));
    return on(facts, depth, `a pass of ${tokens} tokens reads what a pass of one reads`);
  }
  return slotCount === 1
    ? off("computing, not the disk, is what a pass takes")
    : off(`${countText(slotCount)} requests share each pass already: more tokens in it would make it longer`);
}

function off(reason: string): SpeculationChoice {
  return { speculation: null, choice: { name: "speculation", value: "off", reason } };
}

function on(facts: SpeculationFacts, maxTokens: number, reason: string): SpeculationChoice {
  const { draft, mtp } = facts;
  const other = draft !== null ? draft.name : mtp ? "the model's MTP layers" : null;
  const source = `guessed from the context${other === null ? "" : ` and by ${other}`}`;
  return {
    speculation: {
      maxTokens,
      context: contextRule(facts),
      draftPath: draft?.path ?? null,
      draftKey: guessKeyOf(draft?.model ?? null, mtp),
      mtp,
      draftProbability: other === null ? 0 : draftProbability,
    },
    choice: { name: "speculation", value: `up to ${countText(maxTokens)} tokens, ${source}`, reason },
  };
}

/** What runs with guesses and without say, where there are both. */
function ownRuns(
  experience: GuessExperience | null,
): { readonly isFaster: boolean; readonly maxTokens: number; readonly reason: string } | null {
  if (experience === null || experience.plainSeconds === null) {
    return null;
  }
  const best = experience.guessed.toSorted((a, b) => a.seconds - b.seconds)[0];
  if (best === undefined) {
    return null;
  }
  const figures = `own runs: ${rateText(1 / best.seconds)} with ${best.tokensPerPass.toFixed(2)} tokens a pass, ${rateText(1 / experience.plainSeconds)} without guesses`;
  return {
    isFaster: worthwhile * best.seconds < experience.plainSeconds,
    maxTokens: best.maxTokens,
    reason: figures,
  };
}

/** The plan as it guesses without what requests before left: where the same is asked again, they would say the answer. */
export function withoutMemory(plan: Plan): Plan {
  const { speculation } = plan;
  if (speculation === null || speculation.context === null) {
    return plan;
  }
  return { ...plan, speculation: { ...speculation, context: { ...speculation.context, memoryTokens: 0 } } };
}

// ---- what a pass takes --------------------------------------------------------------------------------------------

/** Bytes that a pass reads of what the pool does not keep. */
function readBytes(placement: Placement): number {
  return placement.classes.reduce((sum, one) => {
    const strides = one.sets.reduce((all, set) => all + set.strideCount, 0);
    return sum + Math.max(0, strides - one.slotCount) * one.strideBytes;
  }, 0);
}

function computeSeconds(model: Model, speeds: Speeds, tokens: number): number {
  return model.tensors.reduce((sum, tensor) => {
    const { typeName, shape, touchedBytesPerToken, role } = tensor;
    const counts = shape.length >= 2 && touchedBytesPerToken > 0 && role !== "embedding";
    if (!counts) return sum;
    return sum + speeds.batchSeconds(typeName, matrixOf(tensor, touchedBytesPerToken, false), tokens);
  }, 0);
}

/** Guesses of each slot with which a pass of all slots still takes about as long as without any. */
function flatTokens({ model, placement, speeds, limits }: SpeculationFacts): number {
  const slotCount = limits.slotCount ?? 1;
  if (speeds === null || speeds.storage === null) {
    return Math.max(0, Math.floor(usualPassTokens / slotCount) - 1);
  }
  const readSeconds = readBytes(placement) / speeds.storage.bestBytesPerSecond;
  const passSeconds = (guesses: number): number =>
    Math.max(readSeconds, computeSeconds(model, speeds, slotCount * (1 + guesses)) / hiddenShare);
  let depth = 0;
  while (depth < mostTokens && passSeconds(depth + 1) <= flatness * passSeconds(0)) {
    depth++;
  }
  return depth;
}

// ---- a draft model ------------------------------------------------------------------------------------------------

/** Tokens that a pass of `guesses` gives where each is right with this probability, given that those before it were. */
export function tokensPerPass(acceptance: number, guesses: number): number {
  let sum = 0;
  for (let i = 0, share = 1; i <= guesses; i++, share *= acceptance) sum += share;
  return sum;
}

export interface DraftFacts {
  readonly draft: Draft;
  readonly model: Model;
  /** Where weights go without the draft, and with it. */
  readonly alone: Placement;
  readonly together: Placement;
  readonly guesses: number;
  readonly speeds: Speeds | null;
  /** Of own runs without the draft and with it; null where there were none. */
  readonly experienceAlone: GuessExperience | null;
  readonly experienceTogether: GuessExperience | null;
}

export interface DraftVerdict {
  readonly pays: boolean;
  /** The numbers, as a sentence. */
  readonly reason: string;
}

/**
 * A draft of d bytes takes the place of weights, so that a pass reads W - R + d instead of W - R, and a pass waits for
 * its guesses. It pays where it brings more tokens a pass than that costs: A(d) > (W - R + d) / (W - R) while nothing
 * else brings any and guessing takes no time.
 */
export function judgeDraft(facts: DraftFacts): DraftVerdict {
  const { draft, model, alone, together, guesses, speeds } = facts;
  const readAlone = readBytes(alone);
  const readTogether = readBytes(together);
  if (readAlone === 0) {
    return { pays: false, reason: "no weights are read for a pass: a guess costs as much as a token" };
  }
  const [meanAlone, meanTogether] = [facts.experienceAlone, facts.experienceTogether].map(bestTokensPerPass);
  const brings = (meanTogether ?? tokensPerPass(usualAcceptance, guesses)) / (meanAlone ?? 1);
  const source = meanTogether === null ? "assumed, as of models of one family" : "as own runs had it";
  const bandwidth = speeds?.storage?.bestBytesPerSecond ?? null;
  let costs = readTogether / readAlone;
  let guessing = "";
  if (speeds !== null && bandwidth !== null) {
    const compute = computeSeconds(model, speeds, 1 + guesses);
    const guessSeconds = guesses * computeSeconds(draft.model, speeds, 1);
    const before = Math.max(readAlone / bandwidth, computeSeconds(model, speeds, 1));
    costs = (Math.max(readTogether / bandwidth, compute) + guessSeconds) / before;
    guessing = ` and waits ${durationText(guessSeconds)} for ${countText(guesses)} guesses`;
  }
  return {
    pays: brings > costs,
    reason:
      `with its ${bytesText(draft.bytes)} a pass reads ${bytesText(readTogether)} instead of ${bytesText(readAlone)}${guessing}: ` +
      `it has to bring ${costs.toFixed(2)} tokens for each one without it, and brings ${brings.toFixed(2)} (${source})`,
  };
}

function bestTokensPerPass(experience: GuessExperience | null): number | null {
  const best = experience?.guessed.toSorted((a, b) => a.seconds - b.seconds)[0];
  return best?.tokensPerPass ?? null;
}

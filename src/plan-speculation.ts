// Whether tokens are guessed and verified several in one pass, and how many. A pass over streamed weights reads the same
// bytes for a few tokens as for one, so guesses cost next to nothing while the disk is what a pass waits for; a mixture
// of experts reads other experts for every guess. Pure.

import type { Model } from "./model";
import type { Choice, PlanLimits, Speculation } from "./plan";
import type { Placement, Speeds } from "./plan-cost";
import { countText } from "./text";

/**
 * What followed the last two tokens before: with it the most was accepted of the sources that need no second model
 * (test/bench/NOTES.md).
 */
const matchTokens = 2;
/** Guesses where nothing was measured: on two cores a pass over a streamed 6 GB model took as long for 8 tokens as for 1. */
const usualMaxTokens = 7;
const mostTokens = 15;
/** A pass with guesses may take so much longer than one without (the bar of a pass of eight tokens). */
const flatness = 1.1;

export interface SpeculationChoice {
  readonly speculation: Speculation | null;
  readonly choice: Choice;
}

/** `placement` and `speeds` as of the plan; `batchTokens` is what one pass may hold over all slots. */
export function chooseSpeculation(
  facts: {
    readonly model: Model;
    readonly limits: PlanLimits;
    readonly placement: Placement;
    readonly speeds: Speeds | null;
  },
  batchTokens: number,
): SpeculationChoice {
  const { limits, model, placement } = facts;
  const wish = limits.speculation ?? "auto";
  const room = Math.floor(batchTokens / (limits.slotCount ?? 1)) - 1;
  if (wish === "off" || room < 1) {
    return off(wish === "off" ? "asked for" : "a pass has no room for guesses");
  }
  if (wish !== "auto") {
    return on(Math.min(wish, room), "asked for");
  }
  if (placement.classes.length === 0) {
    return off("no weights are read for a pass: a guess costs as much as a token");
  }
  if (model.kind === "mixture-of-experts") {
    return off("each guess reads experts of its own");
  }
  const depth = Math.min(room, flatTokens(facts));
  return depth < 1
    ? off("computing, not the disk, is what a pass takes")
    : on(depth, `a pass of ${depth + 1} tokens reads what a pass of one reads`);
}

function off(reason: string): SpeculationChoice {
  return { speculation: null, choice: { name: "speculation", value: "off", reason } };
}

function on(maxTokens: number, reason: string): SpeculationChoice {
  return {
    speculation: { maxTokens, fromContext: true, matchTokens, draftPath: null, draftProbability: 0 },
    choice: {
      name: "speculation",
      value: `up to ${countText(maxTokens)} tokens, guessed from the context`,
      reason,
    },
  };
}

/** Guesses with which a pass still takes about as long as without, by the measured speeds. */
function flatTokens(facts: {
  readonly placement: Placement;
  readonly speeds: Speeds | null;
  readonly model: Model;
}): number {
  const { model, placement, speeds } = facts;
  if (speeds === null || speeds.storage === null) {
    return usualMaxTokens;
  }
  const read = placement.classes.reduce((sum, one) => {
    const strides = one.sets.reduce((all, set) => all + set.strideCount, 0);
    return sum + Math.max(0, strides - one.slotCount) * one.strideBytes;
  }, 0);
  const readSeconds = read / speeds.storage.bestBytesPerSecond;
  const computeSeconds = (tokens: number): number =>
    model.tensors.reduce((sum, { typeName, shape, touchedBytesPerToken, role }) => {
      const [columns = 0, rows = 0] = shape;
      const counts = shape.length >= 2 && touchedBytesPerToken > 0 && role !== "embedding";
      const matrix = { bytes: touchedBytesPerToken, elements: columns * rows };
      return counts ? sum + speeds.batchSeconds(typeName, matrix, tokens) : sum;
    }, 0);
  const one = Math.max(readSeconds, computeSeconds(1));
  let depth = 0;
  while (depth < mostTokens && Math.max(readSeconds, computeSeconds(depth + 2)) <= flatness * one) {
    depth++;
  }
  return depth;
}

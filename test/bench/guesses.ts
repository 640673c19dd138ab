// Guessing replayed over texts that are known: how many passes a text would have taken under another rule, and what they
// would have cost. Greedy guessing changes no text, so the answer without guesses is all that is needed, and a rule can be
// judged before anyone builds it. Pure.

import type { ContextRule } from "../../src/plan";

/** Seconds of a pass by its tokens, as a multiple of a pass of one. */
export type PassCost = (tokens: number) => number;

/** The measured points of a streamed 6 GB model on two cores: 2.03, 2.04, 2.05 and 2.8 s for 1, 4, 8 and 16 tokens. */
export const densePassCost: PassCost = (tokens) =>
  tokens <= 8 ? 1 + (0.01 * (tokens - 1)) / 7 : 1.01 + (0.37 * (tokens - 8)) / 8;

export interface Guesser {
  /** Told once, before the first guess. */
  begin?(promptTokens: number): void;
  /** What may follow `seen`, whose last token was just drawn. */
  guess(seen: readonly number[]): readonly number[];
  /** So many of the last guess were right. */
  learn(accepted: number): void;
}

function endsAlike(seen: readonly number[], at: number, length: number): boolean {
  for (let i = 0; i < length; i++) {
    if (seen[at + i] !== seen[seen.length - length + i]) return false;
  }
  return true;
}

/**
 * llama.cpp's map of keys (common_ngram_map_draft): a place with the same last `match` tokens, not nearer than a whole
 * guess; the newest when it was first looked for, and that place ever after. A key never guesses more than was right the
 * last time it did, so that one that was wholly wrong is silent for good.
 */
export function mapOfKeys(match: number, most: number): Guesser {
  const right = new Map<string, number>();
  const places = new Map<string, number>();
  let known = 0;
  let promptEnd = 0;
  let last = "";
  const keyAt = (seen: readonly number[], at: number): string => seen.slice(at, at + match).join(" ");
  return {
    begin(promptTokens) {
      promptEnd = promptTokens;
    },
    guess(seen) {
      const length = seen.length - 1; // the core keeps the last token apart
      if (length < 2 * match + most) return [];
      last = keyAt(seen, seen.length - match);
      const fresh: number[] = [];
      for (let at = promptEnd - match - most - 1; at > known; at--) fresh.push(at);
      for (let at = length - match - most - 1; at > promptEnd && at > known; at--) fresh.push(at);
      const old = places.get(last);
      const place =
        old !== undefined && old < length - match - most - 1
          ? old
          : fresh.find((at) => endsAlike(seen, at, match));
      for (const at of fresh) {
        const key = keyAt(seen, at);
        if (!places.has(key)) places.set(key, at);
      }
      known = Math.max(known, length - match - most - 1);
      const count = Math.min(most, right.get(last) ?? most);
      return place === undefined ? [] : seen.slice(place + match, place + match + count);
    },
    learn: (accepted) => right.set(last, accepted),
  };
}

/**
 * llama.cpp's simple rule (common_ngram_simple_draft): the newest earlier place with the same last `match` tokens and at
 * least as many after it; it holds nothing against a place.
 */
export function newestPlace(match: number, most: number): Guesser {
  return {
    guess(seen) {
      if (seen.length - 1 <= match + most + 1) return [];
      for (let at = seen.length - match - 2; at > 0; at--) {
        if (!endsAlike(seen, at, match)) continue;
        const count = Math.min(most, seen.length - 1 - (at + match));
        return count < match ? [] : seen.slice(at + match, at + match + count);
      }
      return [];
    },
    learn() {},
  };
}

/** As llama.cpp joins its sources: the first that has something to say; only it learns. */
export function firstOf(...guessers: readonly Guesser[]): Guesser {
  let last: Guesser | undefined;
  return {
    begin(promptTokens) {
      for (const guesser of guessers) guesser.begin?.(promptTokens);
    },
    guess(seen) {
      for (const guesser of guessers) {
        const guessed = guesser.guess(seen);
        last = guesser;
        if (guessed.length > 0) return guessed;
      }
      return [];
    },
    learn: (accepted) => last?.learn(accepted),
  };
}

/** Steered at each pass: the longest match decides where to look and how much to dare; nothing is held against a key. */
export function longestMatch(least: number, most: (matched: number) => number): Guesser {
  return {
    guess(seen) {
      let best = { at: -1, length: least - 1 };
      for (let end = seen.length - 1; end > 0; end--) {
        let length = 0;
        while (length < 16 && end - length > 0 && seen[end - 1 - length] === seen[seen.length - 1 - length]) {
          length++;
        }
        if (length > best.length) best = { at: end, length };
        if (length >= 16) break;
      }
      return best.at < 0 ? [] : seen.slice(best.at, best.at + most(best.length));
    },
    learn() {},
  };
}

/** The plan's rule; `memoryTokens` is the caller's matter. */
export type ReplayedRule = Omit<ContextRule, "memoryTokens"> & {
  readonly maxTokens: number;
  /** So many where so many match: what steering the depth would bring. */
  readonly sure?: { readonly matchTokens: number; readonly maxTokens: number };
};

const longestCompared = 16;
/** Where a text goes on that was changed here and there: a word was put in, or one was left out. */
const resyncSteps = [1, -1, 2, -2, 3, 4];

interface Place {
  readonly text: readonly number[];
  readonly at: number;
}

/**
 * What the engine guesses from the context (ffi/native/guesser.cpp), for one request; `memory` is what requests before
 * it left, a negative number between two of them.
 */
export function contextGuesses(rule: ReplayedRule, memory: readonly number[] = []): Guesser {
  let source: Place | null = null;
  let carries = 0;
  let seenTokens = 0;
  let rightThousandths = 1000 * rule.maxTokens;
  const longestMatchIn = (text: readonly number[], end: number, seen: readonly number[], best: number) => {
    let found = { at: -1, length: best };
    for (let at = end; at > 0 && found.length < longestCompared; at--) {
      let length = 0;
      while (
        length < longestCompared &&
        length < at &&
        length < seen.length &&
        text[at - 1 - length] === seen[seen.length - 1 - length]
      ) {
        length++;
      }
      if (length > found.length) found = { at, length };
    }
    return found;
  };
  const resync = ({ text, at }: Place, last: number): Place => {
    if (text[at - 1] === last) return { text, at };
    const step = resyncSteps.find(
      (one) => at - 1 + one >= 0 && at + one < text.length && text[at - 1 + one] === last,
    );
    return { text, at: at + (step ?? 0) };
  };
  return {
    guess(seen) {
      const own = longestMatchIn(seen, seen.length - 1, seen, 0);
      const older = longestMatchIn(memory, memory.length - 1, seen, own.length);
      const match = older.at >= 0 ? { text: memory, ...older } : { text: seen, ...own };
      const carriedAt = source === null ? -1 : source.at + seen.length - seenTokens;
      // What was taken from this very text is found in it as it has become.
      const carriedText: readonly number[] = source === null || source.text !== memory ? seen : memory;
      const canCarry = source !== null && carries < rule.mostCarries && carriedAt < carriedText.length;
      seenTokens = seen.length;
      if (match.length >= rule.leastMatchTokens) {
        source = { text: match.text, at: match.at };
        carries = 0;
      } else if (canCarry) {
        source = resync({ text: carriedText, at: carriedAt }, seen.at(-1) ?? -1);
        carries++;
      } else {
        source = null;
        return [];
      }
      const isSure = rule.sure !== undefined && match.length >= rule.sure.matchTokens;
      const now = Math.min(
        rule.maxTokens,
        rule.leastTokens + Math.ceil((rule.tokensPerRight * rightThousandths) / 1000),
      );
      const most = isSure ? (rule.sure?.maxTokens ?? 0) : now;
      const guessed: number[] = [];
      for (let at = source.at; guessed.length < most; at++) {
        const end = source.text.length;
        const token = at < end ? source.text[at] : source.text === memory ? undefined : guessed[at - end];
        if (token === undefined || token < 0) break;
        guessed.push(token);
      }
      return guessed;
    },
    learn(right) {
      const percent = rule.newestPercent;
      rightThousandths = Math.floor((rightThousandths * (100 - percent) + 1000 * right * percent) / 100);
    },
  };
}

export interface Replayed {
  readonly tokens: number;
  readonly passes: number;
  readonly drafted: number;
  readonly accepted: number;
  /** Passes of one token that would take as long. */
  readonly cost: number;
}

/** The passes for `answer` after `prompt`; its first token comes with the prompt. */
export function replayGuesses(
  prompt: readonly number[],
  answer: readonly number[],
  guesser: Guesser,
  cost: PassCost,
): Replayed {
  const seen = [...prompt, ...answer.slice(0, 1)];
  guesser.begin?.(prompt.length);
  let [passes, drafted, accepted, seconds] = [0, 0, 0, 0];
  for (let at = 1; at < answer.length; ) {
    const guessed = guesser.guess(seen).slice(0, answer.length - at - 1);
    let right = 0;
    while (right < guessed.length && guessed[right] === answer[at + right]) right++;
    if (guessed.length > 0) guesser.learn(right);
    seen.push(...answer.slice(at, at + right + 1));
    at += right + 1;
    passes++;
    drafted += guessed.length;
    accepted += right;
    seconds += cost(1 + guessed.length);
  }
  return { tokens: Math.max(0, answer.length - 1), passes, drafted, accepted, cost: seconds };
}

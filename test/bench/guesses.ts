// Guessing replayed over texts that are known: how many passes a text would have taken under another rule, and what they
// would have cost. Greedy guessing changes no text, so the answer without guesses is all that is needed, and a rule can be
// judged before anyone builds it. Pure.

/** Seconds of a pass by its tokens, as a multiple of a pass of one. */
export type PassCost = (tokens: number) => number;

/** The measured points of a streamed 6 GB model on two cores: 2.03, 2.04, 2.05 and 2.8 s for 1, 4, 8 and 16 tokens. */
export const densePassCost: PassCost = (tokens) =>
  tokens <= 8 ? 1 + (0.01 * (tokens - 1)) / 7 : 1.01 + (0.37 * (tokens - 8)) / 8;

export interface Guesser {
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
 * llama.cpp's map of keys (common/ngram-map.cpp): the newest earlier place with the same last `match` tokens, not nearer
 * than a whole guess; a key never guesses more than was right the last time it did, so that one that was wholly wrong
 * is silent ever after.
 */
export function mapOfKeys(match: number, most: number): Guesser {
  const right = new Map<string, number>();
  let last = "";
  return {
    guess(seen) {
      last = seen.slice(-match).join(" ");
      const count = Math.min(most, right.get(last) ?? most);
      for (let at = seen.length - match - most - 1; at > 0; at--) {
        if (endsAlike(seen, at, match)) return seen.slice(at + match, at + match + count);
      }
      return [];
    },
    learn: (accepted) => right.set(last, accepted),
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

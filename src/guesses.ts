// What was guessed and what of it was right, by where the guesses came from: counters of the engine, what happened
// between two readings of them, and the words for people. It knows no rule of guessing; plan-speculation.ts chooses. Pure.

import { type StreamingCounters, shareOf } from "./streaming";
import { rateText } from "./text";

/** Tokens that were guessed, and those of them that were right. */
export interface GuessCount {
  readonly drafted: number;
  readonly accepted: number;
}

/** As the engine tells them (ffi/native/speculation.h), since it opened. */
export interface GuessCounters {
  /** What followed before, in the prompt, the answer and the requests before. */
  readonly context: GuessCount;
  readonly draft: GuessCount;
  /** The model's own layers for the tokens after the next. */
  readonly mtp: GuessCount;
}

export type GuessSource = keyof GuessCounters;

const sourceNames: Readonly<Record<GuessSource, string>> = {
  context: "the context",
  draft: "the draft model",
  mtp: "the model's MTP layers",
};

const sources = Object.keys(sourceNames) as readonly GuessSource[];

export function guessesSince(before: GuessCounters, after: GuessCounters): GuessCounters {
  const since = (source: GuessSource): GuessCount => ({
    drafted: after[source].drafted - before[source].drafted,
    accepted: after[source].accepted - before[source].accepted,
  });
  return { context: since("context"), draft: since("draft"), mtp: since("mtp") };
}

/** Guesses of one answer. */
export interface GuessSummary {
  /** After the first token, which comes with the prompt. */
  readonly passes: number;
  readonly tokensPerPass: number;
  readonly drafted: number;
  readonly accepted: number;
  readonly sources: GuessCounters;
  /** What the disk allows at the bandwidth it gave, with these guesses and without any; null where nothing was read. */
  readonly bound: {
    readonly tokensPerSecond: number;
    readonly tokensPerSecondWithout: number;
  } | null;
}

/** `tokens` after the first; `streaming` null in a full-resident plan. */
export function guessSummary(
  counters: GuessCounters,
  tokens: number,
  streaming: StreamingCounters | null,
): GuessSummary {
  const sum = (field: keyof GuessCount) => sources.reduce((all, source) => all + counters[source][field], 0);
  const accepted = sum("accepted");
  const passes = Math.max(1, streaming?.passes ?? tokens - accepted);
  return {
    passes,
    tokensPerPass: tokens / passes,
    drafted: sum("drafted"),
    accepted,
    sources: counters,
    bound: boundOf(streaming, { tokens, passes }),
  };
}

function boundOf(
  streaming: StreamingCounters | null,
  { tokens, passes }: { readonly tokens: number; readonly passes: number },
): GuessSummary["bound"] {
  if (streaming === null || streaming.readBytes === 0 || tokens === 0) return null;
  const perSecond = shareOf(streaming).readBytesPerSecond / streaming.readBytes;
  return { tokensPerSecond: perSecond * tokens, tokensPerSecondWithout: perSecond * passes };
}

/** "9 passes of 3.44 tokens, 20 of 31 guesses right (the context 14 of 22, the draft model 6 of 9), bound without ...". */
export function guessesText({
  passes,
  tokensPerPass,
  drafted,
  accepted,
  sources: told,
  bound,
}: GuessSummary): string {
  const active = sources.filter((source) => told[source].drafted > 0);
  const each = active.map(
    (source) => `${sourceNames[source]} ${told[source].accepted} of ${told[source].drafted}`,
  );
  const right =
    drafted === 0
      ? "nothing was guessed"
      : active.length === 1
        ? `${accepted} of ${drafted} guesses from ${sourceNames[active[0] as GuessSource]} right`
        : `${accepted} of ${drafted} guesses right (${each.join(", ")})`;
  const without = bound === null ? "" : `, bound without guesses ${rateText(bound.tokensPerSecondWithout)}`;
  return `${passes} passes of ${tokensPerPass.toFixed(2)} tokens, ${right}${without}`;
}

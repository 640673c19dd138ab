// Showing an answer as it comes, for `run` and for the chat: text on stdout, thinking dimmed on stderr, Ctrl-C as
// the end of this answer, and the line of numbers after it.

import { consola } from "consola";
import type { Prepared } from "../api";
import type { Engine } from "../engine";
import { HypuraError } from "../errors";
import { type Answer, type Piece, PromptTooLongError } from "../generate";
import { type GuessCounters, guessesSince } from "../guesses";
import type { Plan } from "../plan";
import { countersSince, type StreamingCounters } from "../streaming";
import { rememberRun } from "../surroundings";
import { countText, rateText } from "../text";
import { printAnswer, stderr, stdout, tell } from "./terminal";

/** Prints the pieces as they come and gives the answer. stdout then stands where the model's text ended. */
export async function showAnswer(pieces: AsyncIterable<Piece>): Promise<Answer> {
  let hasText = false;
  try {
    return await showPieces(pieces, () => {
      hasText = true;
    });
  } catch (error) {
    if (hasText && stdout.isTerminal) {
      tell("\n"); // what is said about the error begins its own line
    }
    throw error;
  }
}

async function showPieces(pieces: AsyncIterable<Piece>, onText: () => void): Promise<Answer> {
  let isThinking = false;
  for await (const piece of pieces) {
    switch (piece.type) {
      case "thinking":
        // For a person who watches; a pipe gets the answer alone, and --json has the thinking too.
        if (stderr.isTerminal) {
          tell(stderr.paint("dim", piece.text));
          isThinking = true;
        }
        break;
      case "text":
        if (isThinking) {
          tell("\n");
          isThinking = false;
        }
        onText();
        await printAnswer(piece.text);
        break;
      case "end":
        return piece.answer;
    }
  }
  throw new HypuraError("internal", "the answer ended without its end");
}

/** Runs `work` with a signal that Ctrl-C aborts; a second Ctrl-C ends the process as it would anywhere. */
export async function interruptible<Result>(work: (signal: AbortSignal) => Promise<Result>): Promise<Result> {
  const interrupt = new AbortController();
  const onInterrupt = (): void => interrupt.abort();
  process.once("SIGINT", onInterrupt);
  try {
    return await work(interrupt.signal);
  } finally {
    process.off("SIGINT", onInterrupt);
  }
}

/** Counts what streaming and guessing do while tokens are generated, the prompt left out. */
export class StreamingWatch {
  readonly #engine: Engine;
  #before: StreamingCounters | null = null;
  #guessesBefore: GuessCounters | null = null;

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  async *follow(pieces: AsyncIterable<Piece>): AsyncGenerator<Piece> {
    if (this.#engine.plan.speculation !== null) {
      this.#guessesBefore = await this.#engine.guesses();
    }
    for await (const piece of pieces) {
      if (this.#engine.plan.streaming !== null) {
        this.#before ??= await this.#engine.streaming();
      }
      yield piece;
    }
  }

  /** Since the first piece; null in a full-resident plan. */
  async counters(): Promise<StreamingCounters | null> {
    const after = this.#before === null ? null : await this.#engine.streaming();
    return this.#before === null || after === null ? null : countersSince(this.#before, after);
  }

  /** Since it began to follow; null where the plan guesses nothing. */
  async guesses(): Promise<GuessCounters | null> {
    const after = this.#guessesBefore === null ? null : await this.#engine.guesses();
    return this.#guessesBefore === null || after === null ? null : guessesSince(this.#guessesBefore, after);
  }
}

/** The next plan knows what this answer took. */
export function rememberAnswer(
  { plan, file, machine }: Prepared,
  { timings }: Answer,
  streaming: StreamingCounters | null,
): void {
  const decoded = {
    tokens: timings.generatedTokens - 1,
    seconds: timings.generatedSeconds,
    drafted: timings.draftedTokens,
    accepted: timings.acceptedTokens,
  };
  rememberRun(plan, file, machine, decoded, streaming, (note) => consola.warn(note));
}

/** The speed of an answer: "12 tokens at 34.1 tok/s (33.0 tok/s predicted), prompt 20 at 80.3 tok/s". */
export function speedText({ timings }: Answer, { estimate }: Plan): string {
  const { generatedTokens, generatedSeconds, promptTokens, promptSeconds, cachedTokens } = timings;
  const known = cachedTokens === 0 ? "" : ` (${countText(cachedTokens)} known)`;
  const rate = estimate.decodeTokensPerSecond;
  const predicted = rate === null || generatedTokens === 0 ? "" : ` (${rateText(rate)} predicted)`;
  return (
    `${withRate(`${countText(generatedTokens)} ${generatedTokens === 1 ? "token" : "tokens"}`, generatedTokens, generatedSeconds)}${predicted}, ` +
    `prompt ${withRate(countText(promptTokens), promptTokens, promptSeconds)}${known}`
  );
}

/** Less is no measurement: the engine's clock for a lone token starts after it. */
const leastSeconds = 1e-4;

function withRate(what: string, tokens: number, seconds: number): string {
  return tokens === 0 || seconds < leastSeconds ? what : `${what} at ${rateText(tokens / seconds)}`;
}

/** A prompt that is too long, in the words of the command line. */
export function withAdvice(error: unknown, trainedContextTokens: number): unknown {
  if (!(error instanceof PromptTooLongError)) {
    return error;
  }
  // Room for the prompt and an answer, rounded to what a person would type.
  const wanted = Math.ceil((error.promptTokens + 512) / 1024) * 1024;
  const advice =
    error.promptTokens >= trainedContextTokens
      ? "shorten it: the model was trained for no more"
      : `shorten it, or give --context ${Math.min(wanted, trainedContextTokens)}`;
  return new HypuraError("request", `${error.message}: ${advice}`, { cause: error });
}

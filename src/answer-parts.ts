// The engine's chunks -> parts of an answer: text, thoughts, tool calls, log-probabilities, its end. It owns the shapes
// of the two generating routes (chat and plain) and what must be gathered before it can be told: whole tool calls,
// tags in running text. It knows no dialect of a client. Pure.

import type { EngineChunk } from "./engine";
import type { Prepared } from "./ollama-prepare";
import { isObject } from "./wire-body";
import { WireError } from "./wire-error";

/** timings of server_slot_stats in the engine's core. */
export interface Timings {
  /** Prompt tokens that were in the KV cache already. */
  readonly cache_n: number;
  /** Prompt tokens that were evaluated. */
  readonly prompt_n: number;
  readonly prompt_ms: number;
  readonly predicted_n: number;
  readonly predicted_ms: number;
}

export interface TokenProbability {
  readonly token: string;
  readonly bytes: readonly number[];
  readonly logprob: number;
}

/** One generated token. */
export interface TokenChoice extends TokenProbability {
  /** The likeliest tokens in its place, more of them than anybody asked for. */
  readonly alternatives: readonly TokenProbability[];
}

export interface CallDelta {
  readonly index: number;
  readonly name: string;
  readonly arguments: string;
}

export interface Part {
  readonly text: string;
  readonly thinking: string;
  readonly calls: readonly CallDelta[];
  readonly choices: readonly TokenChoice[];
  /** Why the answer ended; null while it goes on. */
  readonly finish: "stop" | "length" | null;
  readonly timings: Timings | null;
}

// ---- chunks ---------------------------------------------------------------------------------------------------

interface CoreProbability {
  readonly id: number;
  readonly token: string;
  readonly bytes: readonly number[];
  readonly logprob: number;
  readonly top_logprobs?: readonly Omit<CoreProbability, "top_logprobs">[];
}

interface ChatChunk {
  readonly choices: readonly {
    readonly finish_reason: string | null;
    readonly delta: {
      readonly content?: string | null;
      readonly reasoning_content?: string | null;
      readonly tool_calls?: readonly {
        readonly index: number;
        readonly function?: { readonly name?: string; readonly arguments?: string };
      }[];
    };
    readonly logprobs?: { readonly content: readonly CoreProbability[] } | null;
  }[];
  readonly timings?: Timings;
}

interface PlainChunk {
  readonly content: string;
  readonly stop: boolean;
  readonly stop_type?: string;
  readonly completion_probabilities?: readonly CoreProbability[];
  readonly timings?: Timings;
}

/** A chunk of POST /v1/chat/completions with `stream: true`. */
export function chatPart(chunk: EngineChunk): Part {
  const data = chunk.data as ChatChunk;
  const choice = data.choices[0];
  const reason = choice?.finish_reason ?? null;
  return {
    text: choice?.delta.content ?? "",
    thinking: choice?.delta.reasoning_content ?? "",
    calls: (choice?.delta.tool_calls ?? []).map((call) => ({
      index: call.index,
      name: call.function?.name ?? "",
      arguments: call.function?.arguments ?? "",
    })),
    choices: (choice?.logprobs?.content ?? []).flatMap(choiceOf),
    finish: reason === null ? null : reason === "length" ? "length" : "stop",
    timings: data.timings ?? null,
  };
}

/** A chunk of POST /completion with `stream: true`. */
export function plainPart(chunk: EngineChunk): Part {
  const data = chunk.data as PlainChunk;
  return {
    text: data.content,
    thinking: "",
    calls: [],
    choices: (data.completion_probabilities ?? []).flatMap(choiceOf),
    finish: !data.stop ? null : data.stop_type === "limit" ? "length" : "stop",
    timings: data.timings ?? null,
  };
}

/**
 * The core names a token by the text that it lets go with it: nothing while text is held back for a stop string, and
 * all of it afterwards. The token's own text is among its alternatives. The token that ends the answer has none.
 */
function choiceOf(core: CoreProbability): readonly TokenChoice[] {
  const alternatives = core.top_logprobs ?? [];
  const own = alternatives.find((one) => one.id === core.id) ?? core;
  if (own !== core && own.token === "" && own.bytes.length === 0) return [];
  return [
    { token: own.token, bytes: own.bytes, logprob: core.logprob, alternatives: alternatives.map(withoutId) },
  ];
}

function withoutId({ token, bytes, logprob }: TokenProbability): TokenProbability {
  return { token, bytes, logprob };
}

/** As clients of both dialects know it. */
export function logprobEntry(choice: TokenChoice, alternativeCount: number): object {
  const { token, logprob, bytes } = choice;
  return {
    token,
    logprob,
    bytes,
    ...(alternativeCount > 0 && { top_logprobs: choice.alternatives.slice(0, alternativeCount) }),
  };
}

// ---- tool calls -----------------------------------------------------------------------------------------------

export interface WholeCall {
  readonly name: string;
  /** The text of a JSON object. */
  readonly arguments: string;
}

/** Gathers calls from their pieces; a call is whole when the next one begins or the answer ends. */
export class CallGatherer {
  readonly #open = new Map<number, { name: string; text: string }>();

  /** The calls that these pieces complete. */
  add(deltas: readonly CallDelta[]): readonly WholeCall[] {
    const whole: WholeCall[] = [];
    for (const delta of deltas) {
      for (const index of [...this.#open.keys()].filter((open) => open < delta.index)) {
        whole.push(this.#close(index));
      }
      const call = this.#open.get(delta.index) ?? { name: "", text: "" };
      this.#open.set(delta.index, { name: call.name + delta.name, text: call.text + delta.arguments });
    }
    return whole;
  }

  /** The calls that remain. One that the length limit cut is nobody's call and left out. */
  finish(reason: "stop" | "length"): readonly WholeCall[] {
    const indexes = [...this.#open.keys()].sort((one, other) => one - other);
    return indexes.flatMap((index) => {
      const text = this.#open.get(index)?.text ?? "";
      return reason === "length" && argumentsOf(text) === null ? [] : [this.#close(index)];
    });
  }

  #close(index: number): WholeCall {
    const { name, text } = this.#open.get(index) ?? { name: "", text: "" };
    this.#open.delete(index);
    if (argumentsOf(text) === null) {
      throw new WireError(
        500,
        `the model's call of ${JSON.stringify(name)} has arguments that are no JSON object`,
      );
    }
    return { name, arguments: text === "" ? "{}" : text };
  }
}

/** The arguments as an object; null when the text is none. No text at all is no arguments. */
export function argumentsOf(text: string): Readonly<Record<string, unknown>> | null {
  if (text.trim() === "") return {};
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : null;
  } catch {
    return null;
  }
}

// ---- thoughts -------------------------------------------------------------------------------------------------

const openTag = "<think>";
const closeTag = "</think>";

/**
 * Tells thoughts from text where the engine's route does not: `<think>` at the beginning opens them (or the prompt has
 * opened them already), `</think>` closes them, white space beside the tags goes with them.
 */
export class ThoughtSplitter {
  #state: "before" | "thinking" | "gap" | "text";
  #held = "";
  #isFirst = true;

  constructor(isOpen: boolean) {
    this.#state = isOpen ? "thinking" : "before";
  }

  add(text: string): { readonly thinking: string; readonly text: string } {
    this.#held += text;
    let thinking = "";
    if (this.#state === "before") this.#begin();
    if (this.#state === "thinking") thinking = this.#think();
    if (this.#state === "gap") {
      this.#held = this.#held.trimStart();
      if (this.#held !== "") this.#state = "text";
    }
    return { thinking, text: this.#state === "text" ? this.#take(this.#held.length) : "" };
  }

  /** What was held back. */
  finish(): { readonly thinking: string; readonly text: string } {
    const rest = this.#take(this.#held.length);
    return this.#state === "thinking" ? { thinking: rest.trimEnd(), text: "" } : { thinking: "", text: rest };
  }

  #take(length: number): string {
    const taken = this.#held.slice(0, length);
    this.#held = this.#held.slice(length);
    return taken;
  }

  #begin(): void {
    const seen = this.#held.trimStart();
    if (seen.startsWith(openTag)) {
      this.#held = seen.slice(openTag.length);
      this.#state = "thinking";
    } else if (!openTag.startsWith(seen)) {
      this.#state = "text";
    }
  }

  #think(): string {
    if (this.#isFirst) {
      this.#held = this.#held.trimStart();
      if (this.#held === "") return "";
      this.#isFirst = false;
    }
    const end = this.#held.indexOf(closeTag);
    if (end !== -1) {
      const thinking = this.#take(end).trimEnd();
      this.#take(closeTag.length);
      this.#state = "gap";
      return thinking;
    }
    return this.#take(this.#held.length - heldBack(this.#held));
  }
}

/** Characters at the end that may be the beginning of the closing tag, and the white space before them. */
function heldBack(text: string): number {
  let tag = 0;
  for (let length = Math.min(text.length, closeTag.length - 1); length > 0 && tag === 0; length--) {
    if (closeTag.startsWith(text.slice(text.length - length))) tag = length;
  }
  const before = text.slice(0, text.length - tag);
  return text.length - before.trimEnd().length;
}

// ---- all of it ------------------------------------------------------------------------------------------------

/** What a part of the answer tells a client, whatever its dialect. */
export interface Told {
  readonly thinking: string;
  readonly text: string;
  readonly calls: readonly WholeCall[];
  readonly choices: readonly TokenChoice[];
}

export interface Ending {
  readonly finish: "stop" | "length";
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly promptMilliseconds: number;
  readonly generatedTokens: number;
  readonly generatedMilliseconds: number;
}

/** Reads one answer from its first chunk to its end. */
export class AnswerReader {
  readonly #prepared: Prepared;
  readonly #calls = new CallGatherer();
  readonly #splitter: ThoughtSplitter | null;
  #finish: "stop" | "length" | null = null;
  #timings: Timings | null = null;

  constructor(prepared: Prepared) {
    this.#prepared = prepared;
    this.#splitter =
      prepared.splitThoughts === "no" ? null : new ThoughtSplitter(prepared.splitThoughts === "open");
  }

  add(chunk: EngineChunk): Told {
    const part = this.#prepared.route === "POST /completion" ? plainPart(chunk) : chatPart(chunk);
    this.#finish = part.finish ?? this.#finish;
    this.#timings = part.timings ?? this.#timings;
    const { text, thinking } = this.#splitter?.add(part.text) ?? part;
    return { text, thinking, calls: this.#calls.add(part.calls), choices: part.choices };
  }

  /** What was held back until the end. */
  rest(): Told {
    const held = this.#splitter?.finish() ?? { text: "", thinking: "" };
    return { ...held, calls: this.#calls.finish(this.#reason()), choices: [] };
  }

  ending(): Ending {
    const timings = this.#timings;
    return {
      finish: this.#reason(),
      // All of the prompt, also what came from the cache.
      promptTokens: timings === null ? this.#prepared.promptTokens : timings.cache_n + timings.prompt_n,
      cachedTokens: timings?.cache_n ?? 0,
      promptMilliseconds: timings?.prompt_ms ?? 0,
      generatedTokens: timings?.predicted_n ?? 0,
      generatedMilliseconds: timings?.predicted_ms ?? 0,
    };
  }

  #reason(): "stop" | "length" {
    if (this.#finish === null) throw new WireError(500, "the engine ended in the middle of the answer");
    return this.#finish;
  }
}

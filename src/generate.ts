// One way to generate for everybody: a conversation or a bare prompt goes in, pieces of text come out, the last
// piece says how it went. It owns the translation between hypura's own words and the engine's two routes (chat
// with the model's template, completion without); it knows no terminal, no HTTP and no file.

import { type Engine, type EngineChunk, RequestError } from "./engine";
import { HypuraError } from "./errors";
import { countText } from "./text";

export interface Message {
  readonly role: "system" | "user" | "assistant";
  readonly content: string;
}

/** A conversation, put into the model's own template; or text that the model continues as it stands. */
export type Prompt = { readonly messages: readonly Message[] } | { readonly text: string };

/** What is left out is the model's or llama.cpp's default. */
export interface GenerateOptions {
  readonly maxTokens?: number;
  /** 0 takes the likeliest token each time. */
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly seed?: number;
  /** Generation ends before any of these. */
  readonly stop?: readonly string[];
  /** Aborting it ends the answer where it is: the last piece comes at once, with the finish `cancelled`. */
  readonly signal?: AbortSignal;
}

/** Tokens and seconds of one answer, as the engine measured them. */
export interface Timings {
  /** Prompt tokens that were already in the KV cache. */
  readonly cachedTokens: number;
  /** Prompt tokens that had to be evaluated. */
  readonly promptTokens: number;
  readonly promptSeconds: number;
  readonly generatedTokens: number;
  readonly generatedSeconds: number;
  /** Tokens that were guessed, and those of them that were right. */
  readonly draftedTokens: number;
  readonly acceptedTokens: number;
}

export interface Answer {
  readonly text: string;
  /** What a reasoning model thought before it answered. */
  readonly thinking: string;
  readonly finish: Finish;
  readonly timings: Timings;
}

/**
 * Why an answer ended. `stop`: the model was done, or a stop text came; `length`: `maxTokens` were generated;
 * `context`: the context is full; `cancelled`: the signal was aborted.
 */
export type Finish = "stop" | "length" | "context" | "cancelled";

/** The prompt alone does not fit the context. */
export class PromptTooLongError extends RequestError {
  readonly promptTokens: number;
  readonly contextTokens: number;

  constructor(promptTokens: number, contextTokens: number) {
    const message = `the prompt has ${countText(promptTokens)} tokens and the context holds ${countText(contextTokens)}`;
    super(400, "exceed_context_size_error", message);
    this.name = "PromptTooLongError";
    this.promptTokens = promptTokens;
    this.contextTokens = contextTokens;
  }
}

export type Piece =
  | { readonly type: "text"; readonly text: string }
  | { readonly type: "thinking"; readonly text: string }
  | { readonly type: "end"; readonly answer: Answer };

/** Generates; the last piece is `end`. Throws RequestError or HypuraError; breaking off the loop cancels. */
export async function* generate(
  engine: Engine,
  prompt: Prompt,
  options: GenerateOptions = {},
): AsyncGenerator<Piece> {
  const { route, body, read } = requestOf(prompt, options);
  let text = "";
  let thinking = "";
  let finish: Finish = "stop";
  let timings = noTimings;
  try {
    for await (const chunk of engine.request(route, body, options.signal)) {
      const part = read(chunk);
      timings = part.timings ?? timings;
      // The core calls both ends of room by one name.
      const isFull =
        part.finish === "length" && timings.generatedTokens < (options.maxTokens ?? Number.POSITIVE_INFINITY);
      finish = isFull ? "context" : (part.finish ?? finish);
      if (part.thinking !== "") {
        thinking += part.thinking;
        yield { type: "thinking", text: part.thinking };
      }
      if (part.text !== "") {
        text += part.text;
        yield { type: "text", text: part.text };
      }
    }
  } catch (error) {
    if (!(error instanceof HypuraError && error.code === "cancelled" && options.signal?.aborted === true)) {
      throw inOurWords(error);
    }
    finish = "cancelled";
  }
  yield { type: "end", answer: { text, thinking, finish, timings } };
}

interface RouteRequest {
  readonly route: string;
  readonly body: object;
  readonly read: (chunk: EngineChunk) => ChunkPart;
}

function requestOf(prompt: Prompt, options: GenerateOptions): RouteRequest {
  // With its timings in every chunk, an answer that is cut off has them too.
  const common = { ...sampling(options), stream: true, cache_prompt: true, timings_per_token: true };
  return "messages" in prompt
    ? {
        route: "POST /v1/chat/completions",
        body: { messages: prompt.messages, max_tokens: options.maxTokens, ...common },
        read: readChatChunk,
      }
    : {
        route: "POST /completion",
        body: { prompt: prompt.text, n_predict: options.maxTokens, ...common },
        read: readCompletionChunk,
      };
}

function inOurWords(error: unknown): unknown {
  if (error instanceof RequestError && error.type === "exceed_context_size_error") {
    const { n_prompt_tokens: promptTokens, n_ctx: contextTokens } = error.details;
    if (typeof promptTokens === "number" && typeof contextTokens === "number") {
      return new PromptTooLongError(promptTokens, contextTokens);
    }
  }
  return error;
}

const noTimings: Timings = {
  cachedTokens: 0,
  promptTokens: 0,
  promptSeconds: 0,
  generatedTokens: 0,
  generatedSeconds: 0,
  draftedTokens: 0,
  acceptedTokens: 0,
};

/** The answer of `generate`, without looking at its pieces. */
export async function answerOf(pieces: AsyncIterable<Piece>): Promise<Answer> {
  let answer: Answer | undefined;
  for await (const piece of pieces) {
    if (piece.type === "end") {
      answer = piece.answer;
    }
  }
  return answer as Answer; // generate ends with `end` or throws
}

function sampling(options: GenerateOptions): object {
  return {
    temperature: options.temperature,
    top_k: options.topK,
    top_p: options.topP,
    min_p: options.minP,
    seed: options.seed,
    stop: options.stop,
  }; // JSON drops what is undefined, and the engine's default holds
}

interface ChunkPart {
  readonly text: string;
  readonly thinking: string;
  readonly finish?: "stop" | "length" | undefined;
  readonly timings?: Timings | undefined;
}

/** timings of server-task.cpp (result_timings). */
interface CoreTimings {
  readonly cache_n: number;
  readonly prompt_n: number;
  readonly prompt_ms: number;
  readonly predicted_n: number;
  readonly predicted_ms: number;
  readonly draft_n?: number;
  readonly draft_n_accepted?: number;
}

interface ChatChunk {
  readonly choices: readonly {
    readonly finish_reason: string | null;
    readonly delta: { readonly content?: string | null; readonly reasoning_content?: string | null };
  }[];
  readonly timings?: CoreTimings;
}

interface CompletionChunk {
  readonly content: string;
  readonly stop: boolean;
  readonly stop_type?: string;
  readonly timings?: CoreTimings;
}

function readChatChunk(chunk: EngineChunk): ChunkPart {
  const data = chunk.data as ChatChunk;
  const choice = data.choices[0];
  const reason = choice?.finish_reason;
  return {
    text: choice?.delta.content ?? "",
    thinking: choice?.delta.reasoning_content ?? "",
    finish: reason === "length" ? "length" : reason === "stop" ? "stop" : undefined,
    timings: data.timings === undefined ? undefined : toTimings(data.timings),
  };
}

function readCompletionChunk(chunk: EngineChunk): ChunkPart {
  const data = chunk.data as CompletionChunk;
  return {
    text: data.content,
    thinking: "",
    finish: data.stop ? (data.stop_type === "limit" ? "length" : "stop") : undefined,
    timings: data.timings === undefined ? undefined : toTimings(data.timings),
  };
}

function toTimings(core: CoreTimings): Timings {
  return {
    cachedTokens: core.cache_n,
    promptTokens: core.prompt_n,
    promptSeconds: core.prompt_ms / 1e3,
    generatedTokens: core.predicted_n,
    generatedSeconds: core.predicted_ms / 1e3,
    draftedTokens: core.draft_n ?? 0,
    acceptedTokens: core.draft_n_accepted ?? 0,
  };
}

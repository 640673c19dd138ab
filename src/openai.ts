// The dialects under /v1: OpenAI's chat, completions, responses, embeddings and models, and Anthropic's messages. It
// owns what the engine's own handlers lack of them (defaults, refusals, names, framing); it knows no socket, no
// clock and no engine. Pure.

import type { EngineChunk } from "./engine";
import type { ServedModel } from "./ollama-model";
import type { EngineCall } from "./ollama-prepare";
import type { Fields } from "./wire-body";
import type { WireError } from "./wire-error";

export type V1Endpoint =
  | "chat/completions"
  | "completions"
  | "embeddings"
  | "responses"
  | "messages"
  | "messages/count_tokens";

/** The name as sent. Throws WireError 400 when there is none. */
export declare function v1ModelAsked(endpoint: V1Endpoint, body: Fields): string;
export declare function v1ModelMissing(asked: string): WireError;

export interface V1Work {
  readonly endpoint: V1Endpoint;
  readonly asked: string;
  readonly stream: boolean;
  /** To the engine as it stands. */
  readonly call: EngineCall;
}
export declare function parseV1(endpoint: V1Endpoint, body: Fields, model: ServedModel): V1Work;

export interface V1Reply {
  /** The text of zero or more frames. */
  onChunk(chunk: EngineChunk): string;
  /** After the last chunk of a stream: what remains, with `[DONE]` where the dialect has one. */
  end(): string;
  /** The one object of a reply that does not stream; instead of `end`. */
  whole(): object;
  /** A frame that says nothing, legal at any time before the end. */
  heartbeat(): string;
  /** The last frames of a stream that failed. */
  error(error: WireError): string;
}
export declare function v1ReplyFor(
  work: V1Work,
  context: {
    readonly nowUnixSeconds: number;
    /** Eight of [a-z0-9], another each time. */
    readonly newId: () => string;
  },
): V1Reply;

/** The body of an error before the first frame. */
export declare function v1Error(endpoint: V1Endpoint | "models", error: WireError, requestId: string): object;
export declare function v1ModelList(models: readonly ServedModel[]): object;
export declare function v1ModelEntry(model: ServedModel, asked: string): object;

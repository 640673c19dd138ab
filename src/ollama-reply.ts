// The engine's chunks -> lines of Ollama's dialect. It owns the shape of every line, what is held back until it is
// whole (tool calls), and the counts of the last line; it knows no socket and no clock: times and ids come in. Pure.

import type { EngineChunk } from "./engine";
import type { GenerateWork, Prepared, ResidenceWork, Steps } from "./ollama-request";
import type { WireError } from "./wire-error";

export interface ReplyContext {
  /** Now, as RFC 3339 in UTC with a `Z`. */
  readonly stamp: () => string;
  /** Monotonic. */
  readonly nowNs: () => number;
  /** When the request was received. */
  readonly receivedNs: number;
  /** Eight of [a-z0-9], another each time. */
  readonly newId: () => string;
}

export interface Reply {
  /** An empty line, legal at any time before the end. */
  heartbeat(): object;
  /** The model is loaded and the request is about to run. */
  begin(prepared: Prepared): void;
  /** Zero or more lines. */
  onChunk(chunk: EngineChunk): readonly object[];
  /** After the last chunk: the lines that remain, the `done: true` line last. */
  end(): Steps<readonly object[]>;
  /** The same as one object, for `stream: false`; instead of `end`. */
  whole(): Steps<object>;
}

export declare function replyFor(work: GenerateWork, context: ReplyContext): Reply;
/** The one object of an empty prompt. */
export declare function residenceReply(work: ResidenceWork, stamp: string): object;
/** The one object of `_debug_render_only`. */
export declare function renderReply(prepared: Prepared, stamp: string): object;
/** `{"error": ...}`, as body and as last line. */
export declare function errorReply(error: WireError): object;

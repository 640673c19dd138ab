// Requests of Ollama's dialect -> what to do, in the engine's words. It owns the fields of each endpoint, their
// defaults, their checks and the sentences of their refusals; it knows no socket, no queue and no engine: what must
// be asked of the engine before a request can run is yielded as calls (`prepare`), and the caller asks. Pure.

import type { ServedModel } from "./ollama-model";
import type { WireError } from "./wire-error";

/** A JSON object with the keys as sent; `readBody` has checked that it is one. */
export type Fields = Readonly<Record<string, unknown>>;

/** Throws WireError 400 (`missing request body`, the decoder's sentence, an object nested too deep). */
export declare function readBody(text: string): Fields;

/** A question to the engine; its answer is the `data` of the one chunk. */
export interface EngineCall {
  readonly route: string;
  readonly body: object;
}

/** Pure steps that need the engine in between. */
export type Steps<Result> = Generator<EngineCall, Result, unknown>;

/** Runs them: `ask` sends a call to the engine and gives the chunk's data, or throws what the engine threw. */
export declare function drive<Result>(
  steps: Steps<Result>,
  ask: (call: EngineCall) => Promise<unknown>,
): Promise<Result>;

export type Endpoint = "chat" | "generate" | "show" | "embed" | "embeddings" | "pull";

/** The name as sent. Throws the refusal of this endpoint when there is none or it is no name. */
export declare function modelAsked(endpoint: Endpoint, body: Fields): string;
/** The refusal of this endpoint for a name that is not served. */
export declare function modelMissing(endpoint: Endpoint, asked: string): WireError;

interface Asked {
  readonly dialect: "chat" | "generate";
  /** The model as the client named it; replies echo it. */
  readonly asked: string;
  /** null: not said; Infinity: for ever. */
  readonly keepAliveSeconds: number | null;
}

/** Empty prompt: only load the model, or unload it. */
export interface ResidenceWork extends Asked {
  readonly kind: "load" | "unload";
}

export interface GenerateWork extends Asked {
  /** `debug-render`: prepare, answer with `renderReply`, generate nothing. */
  readonly kind: "generate" | "debug-render";
  readonly stream: boolean;
  /** min(num_ctx, served): prompt and answer together stay within. */
  readonly contextTokens: number;
}

export type Work = ResidenceWork | GenerateWork;

export declare function parseChat(body: Fields, model: ServedModel): Work;
export declare function parseGenerate(body: Fields, model: ServedModel): Work;

/** A request that the engine can run as it stands: its prompt is rendered, counted and fits. */
export interface Prepared {
  readonly work: GenerateWork;
  readonly route: string;
  /** Always `stream: true`: the reply gathers it where the client wants one object. */
  readonly body: object;
  readonly promptTokens: number;
}

/** Renders, counts, drops or cuts. Throws WireError 400 when the prompt does not fit or cannot be rendered. */
export declare function prepare(work: GenerateWork, model: ServedModel): Steps<Prepared>;

export interface EmbedWork {
  readonly kind: "embed";
  readonly dialect: "embed" | "embeddings";
  readonly asked: string;
  readonly keepAliveSeconds: number | null;
  /** None: only load. */
  readonly inputs: readonly string[];
}
export declare function parseEmbed(body: Fields, model: ServedModel): EmbedWork;
export declare function parseEmbeddings(body: Fields, model: ServedModel): EmbedWork;
/** Asks the engine for the vectors and gives the reply's own fields. */
export declare function embed(
  work: EmbedWork,
  model: ServedModel,
  times: { readonly receivedNs: number; readonly loadedNs: number; readonly nowNs: () => number },
): Steps<object>;

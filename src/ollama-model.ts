// A served model as clients see it: its name, and its entries in /api/tags, /api/show, /api/ps and /v1/models. It
// owns names and their matching, capabilities and the texts that describe a model; it knows no file, no engine and
// no clock: what must be looked up (times, digests, long arrays of the file) comes in as values. Pure.

import type { GgufScalar, GgufValue } from "./gguf";
import type { Model } from "./model";

export type Capability = "completion" | "tools" | "insert" | "vision" | "embedding" | "thinking" | "audio";

/** What an Ollama store keeps beside a model's weights; a bare GGUF has none of it. */
export interface StoredSettings {
  readonly system: string;
  /** Options by their names of the wire (`temperature`, `stop`, ...). They stand between default and request. */
  readonly parameters: Readonly<Record<string, unknown>>;
  readonly messages: readonly { readonly role: string; readonly content: string }[];
  readonly licenses: readonly string[];
}

export const noSettings: StoredSettings = { system: "", parameters: {}, messages: [], licenses: [] };

export interface ServedModel {
  /** Canonical "name:tag", see `nameOf`. */
  readonly name: string;
  readonly files: readonly { readonly path: string; readonly sizeBytes: number }[];
  /** 64 lower-case hex digits that change with the model. */
  readonly digest: string;
  /** RFC 3339. */
  readonly modifiedAt: string;
  readonly modifiedUnixSeconds: number;
  readonly model: Model;
  /** Of the GGUF (`gguf.metadata`). */
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** The projector's metadata when one is loaded with the model. */
  readonly projector: ReadonlyMap<string, GgufValue> | null;
  /** From `capabilitiesOf`. */
  readonly capabilities: readonly Capability[];
  /** What a request may use: the plan's context, at most the trained one. */
  readonly contextTokens: number;
  readonly trainedContextTokens: number;
  /** The engine can discard the older half of a full window (`ctx_shift`). */
  readonly canShift: boolean;
  readonly settings: StoredSettings;
}

/** "dir/Qwen3-8B-Q4_K_M.gguf" -> "qwen3-8b:q4_k_m". */
export declare function nameOf(fileName: string): string;
/** Does `asked` (as the client wrote it) mean the served "name:tag"? */
export declare function matchesName(asked: string, served: string): boolean;
export declare function tagsEntry(model: ServedModel): object;
/** How the model is loaded just now. */
export interface Residence {
  readonly residentBytes: number;
  readonly gpuBytes: number;
  /** RFC 3339; null: it stays for ever. */
  readonly expiresAt: string | null;
  readonly contextTokens: number;
}
export declare function psEntry(model: ServedModel, residence: Residence): object;
export interface ShowRequest {
  /** As the client wrote it. */
  readonly asked: string;
  readonly verbose: boolean;
  readonly system: string | null;
  readonly options: Readonly<Record<string, unknown>>;
}
export declare function showReply(
  model: ServedModel,
  request: ShowRequest,
  seen: {
    readonly userAgent: string;
    /** The values of an array that the metadata only points at; asked for with `verbose` only. */
    readonly readArray: (key: string) => readonly GgufScalar[] | null;
  },
): object;
export declare function capabilitiesOf(facts: {
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly model: Model;
  /** `tokenizer.ggml.tokens`, null when not at hand. */
  readonly vocabulary: readonly GgufScalar[] | null;
  readonly hasProjector: boolean;
  /** The engine answers POST /embeddings for this model. */
  readonly canEmbed: boolean;
}): readonly Capability[];

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

/** The tokens around the two parts of a text with a hole. */
export interface FimTokens {
  readonly prefix: number;
  readonly suffix: number;
  readonly middle: number;
}

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
  /** From `fimTokensOf`. */
  readonly fim: FimTokens | null;
  /** From `capabilitiesOf`. */
  readonly capabilities: readonly Capability[];
  /** What a request may use: the plan's context, at most the trained one. */
  readonly contextTokens: number;
  readonly trainedContextTokens: number;
  /** The engine can discard the older half of a full window (`ctx_shift`). */
  readonly canShift: boolean;
  readonly settings: StoredSettings;
}

// ---- names ----------------------------------------------------------------------------------------------------

export interface ModelName {
  readonly host: string;
  readonly namespace: string;
  readonly model: string;
  /** null where the text has none. */
  readonly tag: string | null;
}

const defaultHost = "registry.ollama.ai";
const defaultNamespace = "library";
const defaultTag = "latest";

const modelPart = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$/;
const namespacePart = /^[A-Za-z0-9_][A-Za-z0-9_-]{0,79}$/;
const hostPart = /^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}$/;

/** "[host/][namespace/]model[:tag]"; null when it is no name. */
export function parseName(text: string): ModelName | null {
  // ":local" only says that no cloud model is meant.
  const trimmed = text.trim().replace(/:local$/, "");
  const slash = trimmed.lastIndexOf("/");
  const colon = trimmed.indexOf(":", slash + 1);
  const tag = colon === -1 ? null : trimmed.slice(colon + 1);
  const parts = (colon === -1 ? trimmed : trimmed.slice(0, colon)).split("/");
  const model = parts.pop() ?? "";
  const namespace = parts.pop() ?? defaultNamespace;
  const host = parts.length === 0 ? defaultHost : parts.join("/");
  const isName =
    modelPart.test(model) &&
    namespacePart.test(namespace) &&
    hostPart.test(host) &&
    (tag === null || modelPart.test(tag));
  return isName ? { host, namespace, model, tag } : null;
}

/** Without what is the default, the tag always said: "name:tag". */
export function shortName(name: ModelName): string {
  const namespace =
    name.host !== defaultHost
      ? `${name.host}/${name.namespace}/`
      : name.namespace !== defaultNamespace
        ? `${name.namespace}/`
        : "";
  return `${namespace}${name.model}:${name.tag ?? defaultTag}`;
}

/** With everything said, as Ollama names a model in some refusals: "registry.ollama.ai/library/name:tag". */
export function longName(served: string): string {
  const name = parseName(served);
  return name === null ? served : `${name.host}/${name.namespace}/${name.model}:${name.tag ?? defaultTag}`;
}

/** Does `asked` (as the client wrote it) mean the served "name:tag"? No tag and "latest" mean any tag. */
export function matchesName(asked: string, served: string): boolean {
  const one = parseName(asked);
  const other = parseName(served);
  if (one === null || other === null) return false;
  const same = (a: string, b: string): boolean => a.toLowerCase() === b.toLowerCase();
  return (
    same(one.host, other.host) &&
    same(one.namespace, other.namespace) &&
    same(one.model, other.model) &&
    (one.tag === null || same(one.tag, defaultTag) || same(one.tag, other.tag ?? defaultTag))
  );
}

/** The quantisation at the end of a file's name: "-Q4_K_M", ".i1-IQ2_XS", "-UD-Q4_K_XL", "_f16", "-MXFP4_MOE". */
const quantSuffix =
  /[-._](?:(?:ud|i1)[-._])?(i?q\d+(?:_[a-z0-9]+)*|tq\d_\d|b?f16|f32|(?:mx|nv)fp4(?:_[a-z0-9]+)*)$/i;

/** "dir/Qwen3-8B-Q4_K_M.gguf" -> "qwen3-8b:q4_k_m"; characters that a name may not have become "-". */
export function nameOf(fileName: string): string {
  const base = fileName
    .slice(Math.max(fileName.lastIndexOf("/"), fileName.lastIndexOf("\\")) + 1)
    .replace(/\.gguf$/i, "")
    .replace(/-\d{5}-of-\d{5}$/, "");
  const quant = quantSuffix.exec(base);
  const model = namePart(quant === null ? base : base.slice(0, quant.index));
  const tag = quant === null ? defaultTag : namePart(quant[1] ?? "");
  return `${model === "" ? "model" : model}:${tag}`;
}

/** A name that a person gave (`--name`), made canonical; null when it is no name. */
export function nameGiven(text: string): string | null {
  const name = parseName(text);
  return name === null ? null : shortName(name);
}

function namePart(text: string): string {
  return text
    .toLowerCase()
    .replace(/[^a-z0-9_.-]+/g, "-")
    .replace(/^[^a-z0-9_]+|[.-]+$/g, "")
    .slice(0, 80);
}

// ---- what it can do -------------------------------------------------------------------------------------------

/** The names that llama.cpp knows where the file names no ids (src/llama-vocab.cpp). */
const fimNames: Readonly<Record<keyof FimTokens, readonly string[]>> = {
  prefix: [
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
  ],
  suffix: [
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
  ],
  middle: [
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
  ],
};

/** The keys of the ids, and their older names. */
const fimKeys: Readonly<Record<keyof FimTokens, readonly string[]>> = {
  prefix: ["tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"],
  suffix: ["tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"],
  middle: ["tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"],
};

/** `vocabulary` is `tokenizer.ggml.tokens`. Null when the model cannot fill in a middle. */
export function fimTokensOf(
  metadata: ReadonlyMap<string, GgufValue>,
  vocabulary: readonly GgufScalar[] | null,
): FimTokens | null {
  const idOf = (part: keyof FimTokens): number | null => {
    for (const key of fimKeys[part]) {
      const id = metadata.get(key);
      if (typeof id === "number" && id >= 0) return id;
    }
    const id = vocabulary?.findIndex((token) => fimNames[part].includes(String(token))) ?? -1;
    return id === -1 ? null : id;
  };
  const prefix = idOf("prefix");
  const suffix = idOf("suffix");
  const middle = idOf("middle");
  return prefix === null || suffix === null || middle === null ? null : { prefix, suffix, middle };
}

/** The chat template of the file; null where it has none (or one of megabytes, which is no template). */
export function chatTemplateOf(metadata: ReadonlyMap<string, GgufValue>): string | null {
  const template = metadata.get("tokenizer.chat_template");
  return typeof template === "string" ? template : null;
}

function thinks(architecture: string, template: string): boolean {
  if (architecture === "gpt-oss") return true;
  if (template.includes("<think>") && template.includes("</think>")) return true;
  // Templates that cut the thoughts of earlier turns, but take none as a field of the message.
  return /split\(\s*['"]<\/think>['"]\s*\)/.test(template) && !template.includes("reasoning_content");
}

export function capabilitiesOf(facts: {
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly model: Model;
  readonly fim: FimTokens | null;
  readonly hasProjector: boolean;
  /** The engine answers POST /embeddings for this model. */
  readonly canEmbed: boolean;
}): readonly Capability[] {
  const { metadata, model } = facts;
  const found: Capability[] = [];
  const pools = metadata.has(`${model.architecture}.pooling_type`) || !model.generatesText;
  if (!pools) found.push("completion");
  if (facts.canEmbed) found.push("embedding");
  if (pools) return found;
  const template = chatTemplateOf(metadata) ?? "";
  if (/\btools\b|tool_call/.test(template)) found.push("tools");
  if (facts.fim !== null) found.push("insert");
  if (facts.hasProjector) found.push("vision");
  if (thinks(model.architecture, template)) found.push("thinking");
  return found;
}

// ---- entries --------------------------------------------------------------------------------------------------

/** 134_515_008 -> "134.52M", 7_241_732_096 -> "7.2B", as Ollama writes it. */
export function parameterSize(count: number): string {
  const round = (value: number, digits: number): string =>
    value === Math.floor(value) ? value.toFixed(0) : value.toFixed(digits);
  if (count >= 1e9) return `${round(count / 1e9, 1)}B`;
  if (count >= 1e6) return `${round(count / 1e6, 2)}M`;
  return count >= 1e3 ? `${(count / 1e3).toFixed(0)}K` : String(count);
}

function detailsOf(model: ServedModel): object {
  const families = [model.model.architecture];
  if (model.projector !== null) families.push("clip");
  return {
    parent_model: "",
    format: "gguf",
    family: model.model.architecture,
    families,
    parameter_size: parameterSize(model.model.parameterCount),
    quantization_level: model.model.fileTypeName ?? "unknown",
  };
}

/** What a client may plan for: OpenClaw and others size their prompts by it, so it is what is really served. */
function usableContext(model: ServedModel): number {
  return Math.min(model.contextTokens, model.trainedContextTokens);
}

export function sizeBytesOf(model: ServedModel): number {
  return model.files.reduce((sum, file) => sum + file.sizeBytes, 0);
}

export function tagsEntry(model: ServedModel): object {
  return {
    name: model.name,
    model: model.name,
    modified_at: model.modifiedAt,
    size: sizeBytesOf(model),
    digest: model.digest,
    details: {
      ...detailsOf(model),
      context_length: usableContext(model),
      embedding_length: model.model.embeddingLength,
    },
    capabilities: model.capabilities,
  };
}

/** How the model is loaded just now. */
export interface Residence {
  readonly residentBytes: number;
  readonly gpuBytes: number;
  /** RFC 3339; null: it stays for ever. */
  readonly expiresAt: string | null;
  readonly contextTokens: number;
}

/** Far enough for every client's clock, and within four digits of the year. */
const never = "2318-01-01T00:00:00Z";

export function psEntry(model: ServedModel, residence: Residence): object {
  return {
    name: model.name,
    model: model.name,
    size: residence.residentBytes,
    digest: model.digest,
    details: detailsOf(model),
    expires_at: residence.expiresAt ?? never,
    size_vram: residence.gpuBytes,
    context_length: residence.contextTokens,
  };
}

// ---- /api/show ------------------------------------------------------------------------------------------------

export interface ShowRequest {
  /** As the client wrote it. */
  readonly asked: string;
  readonly verbose: boolean;
  readonly system: string | null;
  readonly options: Readonly<Record<string, unknown>>;
}

/** Arrays longer than this are emptied unless `verbose`. */
const shownArrayCount = 5;

function jsonValue(value: GgufScalar): unknown {
  return typeof value === "bigint" ? Number(value) : value;
}

function infoOf(
  metadata: ReadonlyMap<string, GgufValue>,
  arrays: ((key: string) => readonly GgufScalar[] | null) | null,
): Record<string, unknown> {
  const info: Record<string, unknown> = {};
  for (const [key, value] of metadata) {
    if (key === "general.name" || key === "tokenizer.chat_template") continue;
    if (typeof value !== "object") {
      info[key] = jsonValue(value);
    } else if (arrays === null && value.count > shownArrayCount) {
      info[key] = [];
    } else {
      info[key] = (value.values ?? arrays?.(key) ?? []).map(jsonValue);
    }
  }
  return info;
}

function modelInfo(
  model: ServedModel,
  request: ShowRequest,
  seen: Parameters<typeof showReply>[2],
): Record<string, unknown> {
  const { architecture } = model.model;
  const info = infoOf(model.metadata, request.verbose ? seen.readArray : null);
  info["general.architecture"] = architecture;
  info["general.parameter_count"] = model.model.parameterCount;
  info[`${architecture}.context_length`] = usableContext(model);
  // No client may mistake this key for the one above: some take the first that ends in ".context_length".
  info["hypura.trained_context_tokens"] = model.trainedContextTokens;
  if (seen.userAgent.startsWith("GitHubCopilotChat/")) info["general.basename"] = request.asked;
  return info;
}

/** One line for each value, the key padded to 30 columns; text in quotes. */
function parameterLines(parameters: Readonly<Record<string, unknown>>): readonly string[] {
  return Object.entries(parameters).flatMap(([key, value]) =>
    (Array.isArray(value) ? value : [value])
      .filter((one) => one !== null && one !== undefined)
      .map((one) => `${key.padEnd(30)} ${typeof one === "string" ? JSON.stringify(one) : String(one)}`),
  );
}

function modelfileOf(
  model: ServedModel,
  texts: { readonly template: string; readonly system: string; readonly lines: readonly string[] },
): string {
  const quoted = (word: string, text: string): string[] => (text === "" ? [] : [`${word} """${text}"""`]);
  return [
    '# Modelfile generated by "hypura serve"',
    `# To build on it with Ollama, put the path of the file, or a name such as ${model.name}, after FROM`,
    "",
    `FROM ${model.files[0]?.path ?? model.name}`,
    ...quoted("TEMPLATE", texts.template),
    ...quoted("SYSTEM", texts.system),
    ...texts.lines.map((line) => `PARAMETER ${line.replace(/ +/, " ")}`),
    ...model.settings.licenses.flatMap((license) => quoted("LICENSE", license)),
    "",
  ].join("\n");
}

export function showReply(
  model: ServedModel,
  request: ShowRequest,
  seen: {
    readonly userAgent: string;
    /** The values of an array that the metadata only points at; asked for with `verbose` only. */
    readonly readArray: (key: string) => readonly GgufScalar[] | null;
  },
): object {
  const { settings } = model;
  const template = chatTemplateOf(model.metadata) ?? "";
  const system = request.system ?? settings.system;
  const parameters: Record<string, unknown> = { num_ctx: 0, ...settings.parameters, ...request.options };
  // Whatever was stored or asked: clients plan by the larger of this and the context length.
  parameters["num_ctx"] = usableContext(model);
  const lines = parameterLines(parameters);
  return {
    ...(settings.licenses.length > 0 && { license: settings.licenses.join("\n") }),
    modelfile: modelfileOf(model, { template, system, lines }),
    parameters: lines.join("\n"),
    template,
    ...(system !== "" && { system }),
    details: detailsOf(model),
    ...(settings.messages.length > 0 && { messages: settings.messages }),
    model_info: modelInfo(model, request, seen),
    ...(model.projector !== null && { projector_info: infoOf(model.projector, null) }),
    ...(request.verbose && {
      tensors: model.model.tensors.map(({ name, typeName, shape }) => ({
        name,
        type: typeName.toUpperCase(),
        shape,
      })),
    }),
    capabilities: model.capabilities,
    modified_at: model.modifiedAt,
  };
}

// ---- /v1/models -----------------------------------------------------------------------------------------------

/** `id` is the model's own name in the list, and the name as asked for a single one. */
export function v1ModelEntry(model: ServedModel, id: string): object {
  const owner = parseName(model.name)?.namespace ?? defaultNamespace;
  return { id, object: "model", created: model.modifiedUnixSeconds, owned_by: owner };
}

export function v1ModelList(models: readonly ServedModel[]): object {
  return { object: "list", data: models.map((model) => v1ModelEntry(model, model.name)) };
}

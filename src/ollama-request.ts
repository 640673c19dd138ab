// Requests of Ollama's dialect -> what to do. It owns the fields of each endpoint, their defaults, their checks and
// the sentences of their refusals; it knows no socket, no queue and no engine (what must be asked of the engine
// before a request can run is in ollama-prepare.ts). Pure.

import {
  chatTemplateOf,
  longName,
  parseName,
  type ServedModel,
  type ShowRequest,
  shortName,
} from "./ollama-model";
import { type Options, optionsOf, readOptions } from "./ollama-options";
import { checkedSchema, durationSeconds, type Fields, isObject, type Reader, readerOf } from "./wire-body";
import { WireError } from "./wire-error";

// ---- names ----------------------------------------------------------------------------------------------------

export type Endpoint = "chat" | "generate" | "show" | "embed" | "embeddings" | "pull";

/** The name as sent. Throws the refusal of this endpoint when there is none or it is no name. */
export function modelAsked(endpoint: Endpoint, body: Fields): string {
  const reader = readerOf(body, structOf(endpoint));
  const older = endpoint === "show" || endpoint === "pull" ? reader.text("name") : undefined;
  const asked = [reader.text("model"), older].find((name) => name !== undefined && name.trim() !== "") ?? "";
  if (asked === "") {
    throw endpoint === "generate" || endpoint === "embed"
      ? new WireError(404, "model '' not found")
      : new WireError(400, "model is required");
  }
  if (parseName(asked) === null) throw new WireError(400, "invalid model name");
  return asked;
}

/** The refusal of this endpoint for a name that is not served. */
export function modelMissing(endpoint: Endpoint, asked: string): WireError {
  switch (endpoint) {
    case "chat":
    case "generate":
      return new WireError(404, `model '${asked}' not found`);
    case "show": {
      const name = parseName(asked);
      return new WireError(404, `model '${name === null ? asked : shortName(name)}' not found`);
    }
    case "embed":
    case "embeddings":
      return new WireError(404, `model ${JSON.stringify(asked)} not found, try pulling it first`);
    case "pull":
      return new WireError(400, "this server serves one local model; pulling models is not supported");
  }
}

function structOf(endpoint: Endpoint): string {
  switch (endpoint) {
    case "chat":
      return "ChatRequest";
    case "generate":
      return "GenerateRequest";
    case "show":
      return "ShowRequest";
    case "embed":
      return "EmbedRequest";
    case "embeddings":
      return "EmbeddingRequest";
    case "pull":
      return "PullRequest";
  }
}

// ---- what a request asks for ----------------------------------------------------------------------------------

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

/** A message in the engine's form. */
export interface EngineMessage {
  readonly role: string;
  readonly content: string | readonly object[];
  readonly [field: string]: unknown;
}

/** Where the prompt comes from. */
export type Source =
  | {
      readonly kind: "messages";
      readonly messages: readonly EngineMessage[];
      readonly tools: readonly Fields[];
      /** `context` of /api/generate: tokens that stand before the rendered messages. */
      readonly before: readonly number[];
    }
  /** The prompt as it stands. */
  | { readonly kind: "text"; readonly text: string }
  /** Fill in what is between. */
  | { readonly kind: "hole"; readonly prefix: string; readonly suffix: string };

export interface GenerateWork extends Asked {
  /** `debug-render`: prepare, answer with `renderReply`, generate nothing. */
  readonly kind: "generate" | "debug-render";
  readonly stream: boolean;
  /** min(num_ctx, served): prompt and answer together stay within. */
  readonly contextTokens: number;
  readonly source: Source;
  readonly imageCount: number;
  readonly options: Options;
  /** A JSON schema for the answer. */
  readonly format: Fields | null;
  /** null on a model that does not think. */
  readonly think: Think | null;
  readonly truncate: boolean;
  readonly shift: boolean;
  readonly logprobs: boolean;
  readonly topLogprobs: number;
  /** What else the engine is told, by its own names; Ollama's dialect has nothing of the kind. */
  readonly engineFields: Fields;
}

export interface Think {
  readonly on: boolean;
  readonly level: "low" | "medium" | "high" | "max" | null;
}

export type Work = ResidenceWork | GenerateWork;

/** An image is counted as so many tokens: how many it becomes is known only when it has been encoded. */
export const imageTokens = 768;

/** The least that can be asked for, and with an image. */
const minContextTokens = 4;
const minImageContextTokens = 2048;

export function contextOf(options: Options, model: ServedModel, imageCount: number): number {
  const least = imageCount > 0 ? minImageContextTokens : minContextTokens;
  const served = Math.min(model.contextTokens, model.trainedContextTokens);
  return Math.min(served, Math.max(least, options.contextTokens ?? served));
}

// ---- fields that both endpoints have --------------------------------------------------------------------------

interface Common {
  readonly asked: string;
  readonly stream: boolean;
  readonly keepAliveSeconds: number | null;
  readonly options: Options;
  readonly format: Fields | null;
  readonly think: Think | null;
  readonly truncate: boolean;
  readonly shift: boolean;
  readonly logprobs: boolean;
  readonly topLogprobs: number;
  readonly debugRender: boolean;
}

function readCommon(reader: Reader, dialect: "chat" | "generate", model: ServedModel): Common {
  const asked = modelAsked(dialect, reader.fields);
  const topLogprobs = reader.whole("top_logprobs") ?? 0;
  if (topLogprobs < 0 || topLogprobs > 20) {
    throw new WireError(400, "top_logprobs must be between 0 and 20");
  }
  if (!model.capabilities.includes("completion")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support ${dialect}`);
  }
  return {
    asked,
    stream: reader.flag("stream") ?? true,
    keepAliveSeconds: readKeepAlive(reader),
    options: readOptions(model.settings.parameters, optionsOf(reader.raw("options"))),
    format: readFormat(reader.raw("format")),
    think: readThink(reader.raw("think"), asked, model),
    truncate: reader.flag("truncate") ?? true,
    shift: reader.flag("shift") ?? model.model.architecture !== "deepseek2",
    logprobs: reader.flag("logprobs") ?? false,
    topLogprobs,
    debugRender: reader.flag("_debug_render_only") ?? false,
  };
}

function readKeepAlive(reader: Reader): number | null {
  const value = reader.raw("keep_alive");
  if (value === undefined) return null;
  const seconds = durationSeconds(value);
  if (seconds !== null) return seconds;
  throw new WireError(
    400,
    typeof value === "string"
      ? `time: invalid duration ${JSON.stringify(value)}`
      : `keep_alive must be a number of seconds or a duration such as "5m", not ${JSON.stringify(value)}`,
  );
}

function readFormat(value: unknown): Fields | null {
  if (value === undefined || value === "") return null;
  if (value === "json") return { type: "object" };
  if (isObject(value)) return checkedSchema(value);
  // As Go quotes a JSON text.
  const shown = JSON.stringify(JSON.stringify(value));
  throw new WireError(400, `invalid format: ${shown}; expected "json" or a valid JSON Schema object`);
}

function readThink(value: unknown, asked: string, model: ServedModel): Think | null {
  const thinks = model.capabilities.includes("thinking");
  const refuse = (): WireError =>
    new WireError(
      400,
      `invalid think value: ${JSON.stringify(value)} (must be "high", "medium", "low", "max", true, or false)`,
    );
  const think = ((): Think => {
    switch (value) {
      case undefined:
        return { on: thinks, level: null };
      case true:
      case false:
        return { on: value, level: null };
      case "low":
      case "medium":
      case "high":
      case "max":
        return { on: true, level: value };
      default:
        throw refuse();
    }
  })();
  if (thinks) return think;
  if (think.on) throw new WireError(400, `${JSON.stringify(asked)} does not support thinking`);
  return null;
}

/** What the engine is told: `thinking` is the name some templates use for `enable_thinking`. */
export function thinkFields(think: Think | null, model: ServedModel): object {
  if (think === null) return {};
  const kwargs = { enable_thinking: think.on, thinking: think.on };
  if (model.model.architecture === "gpt-oss") {
    // It cannot be told not to think, and knows three levels.
    const level = !think.on ? "low" : think.level === "max" ? "high" : think.level;
    return { chat_template_kwargs: kwargs, ...(level !== null && { reasoning_effort: level }) };
  }
  return {
    chat_template_kwargs: kwargs,
    ...(think.on && think.level !== null && { reasoning_effort: think.level }),
  };
}

// ---- images ---------------------------------------------------------------------------------------------------

const base64Text = /^[A-Za-z0-9+/]+={0,2}$/;

/** The part of a message for an image; its type is in its first bytes. */
function imagePart(data: string): object {
  const text = data.replace(/\s+/g, "");
  if (!base64Text.test(text) || text.length % 4 === 1) {
    throw new WireError(400, "illegal base64 data in images");
  }
  const type = text.startsWith("iVBOR") ? "png" : text.startsWith("UklGR") ? "webp" : "jpeg";
  return { type: "image_url", image_url: { url: `data:image/${type};base64,${text}` } };
}

function readImages(reader: Reader, asked: string, model: ServedModel): readonly object[] {
  const images = reader.texts("images") ?? [];
  if (images.length > 0 && !model.capabilities.includes("vision")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support images`);
  }
  return images.map(imagePart);
}

/** Text with images: at their marks `[img]`, those without a mark first. */
function contentOf(text: string, images: readonly object[]): string | readonly object[] {
  if (images.length === 0) return text;
  const pieces = text.split("[img]");
  const marked = Math.min(images.length, pieces.length - 1);
  const parts: object[] = images.slice(marked);
  const say = (words: string): void => {
    if (words !== "") parts.push({ type: "text", text: words });
  };
  pieces.forEach((piece, index) => {
    say(piece);
    const image = images[index];
    if (index < marked && image !== undefined) parts.push(image);
    else if (index < pieces.length - 1) say("[img]");
  });
  return parts;
}

// ---- messages -------------------------------------------------------------------------------------------------

interface CallSeen {
  readonly id: string | null;
  readonly name: string;
}

/** Messages as the engine wants them. Calls are remembered, so that results find their function's name. */
function readMessages(
  list: readonly Fields[],
  asked: string,
  model: ServedModel,
): { readonly messages: readonly EngineMessage[]; readonly imageCount: number } {
  const messages: EngineMessage[] = [];
  let imageCount = 0;
  let calls: CallSeen[] = [];
  for (const fields of list) {
    const reader = readerOf(fields, "ChatRequest.messages");
    const role = (reader.text("role") ?? "").toLowerCase();
    const images = readImages(reader, asked, model);
    imageCount += images.length;
    const content = contentOf(readContent(reader), images);
    const thinking = reader.text("thinking");
    const toolCalls = (reader.objects("tool_calls") ?? []).map(readCall);
    if (toolCalls.length > 0) {
      calls = toolCalls.map((call) => ({ id: call.id ?? null, name: call.function.name }));
    }
    messages.push({
      role,
      content,
      ...(thinking !== undefined && thinking !== "" && { reasoning_content: thinking }),
      ...(toolCalls.length > 0 && { tool_calls: toolCalls }),
      ...(role === "tool" && readResult(reader, calls)),
    });
  }
  return { messages, imageCount };
}

/** Ollama wants a string; a list of text parts means the same and several clients send it. */
function readContent(reader: Reader): string {
  const value = reader.raw("content");
  if (!Array.isArray(value)) return reader.text("content") ?? "";
  const texts = value.map((part: unknown) =>
    isObject(part) && part["type"] === "text" && typeof part["text"] === "string" ? part["text"] : null,
  );
  if (texts.includes(null)) return reader.text("content") ?? ""; // throws
  return texts.join("");
}

interface EngineToolCall {
  readonly id?: string;
  readonly type: "function";
  readonly function: { readonly name: string; readonly arguments: string };
}

function readCall(fields: Fields): EngineToolCall {
  const reader = readerOf(fields, "ToolCall");
  const id = reader.text("id");
  const called = readerOf(reader.object("function") ?? {}, "ToolCallFunction");
  const given = called.raw("arguments");
  const parsed = typeof given === "string" ? parsedObject(given) : given;
  const args = parsed === undefined ? {} : isObject(parsed) ? parsed : called.object("arguments");
  return {
    ...(id !== undefined && id !== "" && { id }),
    type: "function",
    function: { name: called.text("name") ?? "", arguments: JSON.stringify(args) },
  };
}

/** Some clients send the arguments as OpenAI does, as text. What is no object there is refused as text. */
function parsedObject(text: string): unknown {
  try {
    const value: unknown = JSON.parse(text);
    return isObject(value) ? value : text;
  } catch {
    return text;
  }
}

/** A result names its call by id or by function, or answers the next call that has no answer yet. */
function readResult(reader: Reader, calls: CallSeen[]): object {
  const id = reader.text("tool_call_id");
  const name = reader.text("tool_name") ?? reader.text("name");
  const at = calls.findIndex((call) =>
    id !== undefined ? call.id === id : name === undefined || call.name === name,
  );
  const [call] = at === -1 ? [undefined] : calls.splice(at, 1);
  const foundId = id ?? call?.id ?? undefined;
  const foundName = name ?? call?.name;
  return {
    ...(foundId !== undefined && { tool_call_id: foundId }),
    ...(foundName !== undefined && { name: foundName }),
  };
}

/** The model's own messages first, its system text before a conversation that has none of its own. */
function withStored(messages: readonly EngineMessage[], model: ServedModel): readonly EngineMessage[] {
  const { settings } = model;
  const all: EngineMessage[] = [
    ...settings.messages.map(({ role, content }) => ({ role, content })),
    ...messages,
  ];
  if (settings.system !== "" && all[0]?.role !== "system") {
    all.unshift({ role: "system", content: settings.system });
  }
  return all;
}

/** Models that were trained without their earlier thoughts in sight; their clients often send them along. */
function withoutOldThoughts(
  messages: readonly EngineMessage[],
  model: ServedModel,
): readonly EngineMessage[] {
  const forgets =
    model.model.architecture.startsWith("qwen3") ||
    /deepseek-r1/i.test(`${model.model.name ?? ""} ${model.name}`);
  if (!forgets) return messages;
  const lastUser = messages.findLastIndex((message) => message.role === "user");
  return messages.map((message, index) =>
    index < lastUser && message.role === "assistant" && typeof message.content === "string"
      ? { ...message, content: message.content.replace(/^\s*<think>[\s\S]*?<\/think>\s*/, "") }
      : message,
  );
}

// ---- tools ----------------------------------------------------------------------------------------------------

/** As for names in schemas (wire-body.ts). */
const maxNameLength = 256;

function readTools(reader: Reader, model: ServedModel): readonly Fields[] {
  const tools = readToolSchemas(reader);
  if (tools.length > 0 && !model.capabilities.includes("tools")) {
    throw new WireError(400, `${longName(model.name)} does not support tools`);
  }
  return tools;
}

/** `tools` of this dialect and of OpenAI's. The schemas go on as they came; the names around them are the engine's. */
export function readToolSchemas(reader: Reader): readonly Fields[] {
  return (reader.objects("tools") ?? []).map((tool) => {
    const called = readerOf(readerOf(tool, "Tool").object("function") ?? {}, "ToolFunction");
    const name = called.text("name") ?? "";
    if (name === "" || name.length > maxNameLength) {
      throw new WireError(400, `a tool's function needs a name of 1 to ${maxNameLength} characters`);
    }
    return {
      type: "function",
      function: {
        name,
        description: called.text("description") ?? "",
        parameters: checkedSchema(called.object("parameters") ?? { type: "object", properties: {} }),
      },
    };
  });
}

// ---- the endpoints --------------------------------------------------------------------------------------------

function residence(common: Common, dialect: "chat" | "generate"): ResidenceWork {
  return {
    kind: common.keepAliveSeconds === 0 ? "unload" : "load",
    dialect,
    asked: common.asked,
    keepAliveSeconds: common.keepAliveSeconds,
  };
}

function generation(
  common: Common,
  dialect: "chat" | "generate",
  model: ServedModel,
  prompt: { readonly source: Source; readonly imageCount: number },
): GenerateWork {
  const { debugRender, ...rest } = common;
  return {
    ...rest,
    kind: debugRender ? "debug-render" : "generate",
    dialect,
    contextTokens: contextOf(common.options, model, prompt.imageCount),
    engineFields: {},
    ...prompt,
  };
}

export function parseChat(body: Fields, model: ServedModel): Work {
  const reader = readerOf(body, "ChatRequest");
  const common = readCommon(reader, "chat", model);
  const list = reader.objects("messages") ?? [];
  const tools = readTools(reader, model);
  const read = readMessages(list, common.asked, model);
  if (list.length === 0) return residence(common, "chat");
  const messages = withoutOldThoughts(withStored(read.messages, model), model);
  return generation(common, "chat", model, {
    source: { kind: "messages", messages, tools, before: [] },
    imageCount: read.imageCount,
  });
}

export function parseGenerate(body: Fields, model: ServedModel): Work {
  const reader = readerOf(body, "GenerateRequest");
  const common = readCommon(reader, "generate", model);
  const prompt = reader.text("prompt") ?? "";
  const raw = reader.flag("raw") ?? false;
  const system = reader.text("system");
  const template = reader.text("template") ?? "";
  const before = readContext(reader, model);
  const images = readImages(reader, common.asked, model);
  if (raw && (template !== "" || (system ?? "") !== "" || before.length > 0)) {
    throw new WireError(400, "raw mode does not support template, system, or context");
  }
  if (template !== "") {
    throw new WireError(
      400,
      "template is not supported: this server renders the model's own chat template; send raw to use another",
    );
  }
  const suffix = reader.text("suffix") ?? "";
  if (suffix !== "" && model.fim === null) {
    throw new WireError(400, `${longName(model.name)} does not support insert`);
  }
  if (images.length > 0 && (before.length > 0 || suffix !== "")) {
    throw new WireError(400, "images go neither with context nor with suffix: leave one of them out");
  }
  if (prompt === "") return residence(common, "generate");
  const source = ((): Source => {
    if (suffix !== "") return { kind: "hole", prefix: prompt, suffix };
    if (raw && images.length === 0) return { kind: "text", text: prompt };
    if (raw) throw new WireError(400, "raw mode does not support images: leave raw out");
    const user: EngineMessage = { role: "user", content: contentOf(prompt, images) };
    return { kind: "messages", messages: framed(user, system, before, model), tools: [], before };
  })();
  return generation(common, "generate", model, { source, imageCount: images.length });
}

/** One user message, with the system text asked for or stored; with `context` the stored examples stay out. */
function framed(
  user: EngineMessage,
  system: string | undefined,
  before: readonly number[],
  model: ServedModel,
): readonly EngineMessage[] {
  const { settings } = model;
  const text = system ?? (before.length === 0 ? settings.system : "");
  const examples = before.length === 0 ? settings.messages : [];
  return [
    ...(text !== "" ? [{ role: "system", content: text }] : []),
    ...examples.map(({ role, content }) => ({ role, content })),
    user,
  ];
}

function readContext(reader: Reader, model: ServedModel): readonly number[] {
  const ids = reader.array("context") ?? [];
  const isId = (id: unknown): id is number =>
    typeof id === "number" && Number.isInteger(id) && id >= 0 && id < model.model.vocabularySize;
  if (!ids.every(isId)) {
    throw new WireError(400, "context must be a list of this model's token ids, as an earlier reply gave it");
  }
  if (ids.length > 0 && model.capabilities.includes("thinking") && !hasThinkTags(model)) {
    throw new WireError(400, "context is not supported with this model: send the messages to /api/chat");
  }
  return ids;
}

/** The template marks thoughts with the tags that ollama-reply.ts can tell apart by itself. */
export function hasThinkTags(model: ServedModel): boolean {
  return (chatTemplateOf(model.metadata) ?? "").includes("</think>");
}

export function parseShow(body: Fields): ShowRequest {
  const reader = readerOf(body, "ShowRequest");
  return {
    asked: modelAsked("show", body),
    verbose: reader.flag("verbose") ?? false,
    system: reader.text("system") ?? null,
    options: optionsOf(reader.raw("options")),
  };
}

export interface PullWork {
  readonly asked: string;
  readonly stream: boolean;
}

export function parsePull(body: Fields): PullWork {
  return {
    asked: modelAsked("pull", body),
    stream: readerOf(body, "PullRequest").flag("stream") ?? true,
  };
}

/** The lines for a model that is here already; the last one alone where the client wants one object. */
export function pullReply(work: PullWork): readonly object[] {
  const last = { status: "success" };
  return work.stream ? [{ status: "pulling manifest" }, last] : [last];
}

// ---- embeddings -----------------------------------------------------------------------------------------------

export interface EmbedWork {
  readonly kind: "embed";
  readonly dialect: "embed" | "embeddings";
  readonly asked: string;
  readonly keepAliveSeconds: number | null;
  /** None: only load. */
  readonly inputs: readonly string[];
  readonly truncate: boolean;
  /** null: all. */
  readonly dimensions: number | null;
  readonly contextTokens: number;
}

function embedding(
  reader: Reader,
  dialect: "embed" | "embeddings",
  model: ServedModel,
): Omit<EmbedWork, "inputs" | "dimensions"> {
  const asked = modelAsked(dialect, reader.fields);
  if (!model.capabilities.includes("embedding")) {
    throw new WireError(501, `model ${JSON.stringify(asked)} does not support embeddings`);
  }
  const options = readOptions(model.settings.parameters, optionsOf(reader.raw("options")));
  return {
    kind: "embed",
    dialect,
    asked,
    keepAliveSeconds: readKeepAlive(reader),
    truncate: reader.flag("truncate") ?? true,
    contextTokens: contextOf(options, model, 0),
  };
}

export function parseEmbed(body: Fields, model: ServedModel): EmbedWork {
  const reader = readerOf(body, "EmbedRequest");
  const common = embedding(reader, "embed", model);
  const input = reader.raw("input");
  const list = input === undefined || input === "" ? [] : Array.isArray(input) ? input : [input];
  if (!list.every((one): one is string => typeof one === "string")) {
    throw new WireError(400, "invalid input type");
  }
  const dimensions = reader.whole("dimensions") ?? 0;
  if (dimensions < 0) throw new WireError(400, "dimensions must not be negative");
  return { ...common, inputs: list, dimensions: dimensions === 0 ? null : dimensions };
}

export function parseEmbeddings(body: Fields, model: ServedModel): EmbedWork {
  const reader = readerOf(body, "EmbeddingRequest");
  const common = embedding(reader, "embeddings", model);
  const prompt = reader.text("prompt") ?? "";
  return { ...common, inputs: prompt === "" ? [] : [prompt], dimensions: null };
}

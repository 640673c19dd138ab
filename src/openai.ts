// The dialects under /v1. It owns OpenAI's chat, completions, embeddings and errors: their fields, defaults and
// refusals, and the shape of their replies; responses and messages, which the engine's core speaks by itself, are
// mended in v1-pass.ts. Chat and completions become the same work that Ollama's endpoints become, so that templates,
// limits and log-probabilities are one thing. It knows no socket, no clock and no engine. Pure.

import {
  AnswerReader,
  type Ending,
  logprobEntry,
  type TokenChoice,
  type Told,
  type WholeCall,
} from "./answer-parts";
import type { EngineChunk } from "./engine";
import { HypuraError } from "./errors";
import { longName, parseName, type ServedModel } from "./ollama-model";
import { readOptions } from "./ollama-options";
import { type EngineCall, type Prepared, prepare, type Steps, vectorsOf } from "./ollama-prepare";
import {
  contextOf,
  type EmbedWork,
  type EngineMessage,
  type GenerateWork,
  modelMissing,
  parseEmbed,
  readToolSchemas,
} from "./ollama-request";
import {
  checkedImage,
  type EventMender,
  frameOf,
  messagesCall,
  messagesMender,
  readEffort,
  responsesCall,
  responsesMender,
  thinkOf,
} from "./v1-pass";
import { checkedSchema, type Fields, isObject, type Reader, readerOf } from "./wire-body";
import { WireError } from "./wire-error";

export type V1Endpoint =
  | "chat/completions"
  | "completions"
  | "embeddings"
  | "responses"
  | "messages"
  | "messages/count_tokens";

/** The name as sent. Throws WireError 400 when there is none. */
export function v1ModelAsked(_endpoint: V1Endpoint, body: Fields): string {
  const asked = readerOf(body, "Request").text("model") ?? "";
  if (asked.trim() === "") throw new WireError(400, "model is required");
  if (parseName(asked) === null) throw new WireError(400, "invalid model name");
  return asked;
}

export function v1ModelMissing(asked: string): WireError {
  return modelMissing("chat", asked);
}

// ---- work -----------------------------------------------------------------------------------------------------

interface V1Asked {
  readonly asked: string;
  readonly stream: boolean;
}

export type V1Work =
  | (V1Asked & {
      readonly kind: "generate";
      readonly endpoint: "chat/completions" | "completions";
      readonly work: GenerateWork;
      readonly includeUsage: boolean;
    })
  | (V1Asked & {
      readonly kind: "embed";
      readonly endpoint: "embeddings";
      readonly work: EmbedWork;
      readonly base64: boolean;
    })
  | (V1Asked & {
      readonly kind: "pass";
      readonly endpoint: "responses" | "messages" | "messages/count_tokens";
      readonly call: EngineCall;
      readonly maxTokens: number | null;
    });

/** What is to be sent to the engine; or the reply itself, when there is nothing more to ask. */
export type V1Prepared =
  | {
      readonly kind: "run";
      readonly route: string;
      readonly body: object;
      readonly prepared: Prepared | null;
      /** null: the engine will count. */
      readonly promptTokens: number | null;
    }
  | { readonly kind: "answer"; readonly reply: object };

export function parseV1(endpoint: V1Endpoint, body: Fields, model: ServedModel): V1Work {
  const asked = v1ModelAsked(endpoint, body);
  if (endpoint !== "embeddings" && !model.capabilities.includes("completion")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support chat`);
  }
  const reader = readerOf(body, "Request");
  switch (endpoint) {
    case "chat/completions":
      return generationWork("chat/completions", asked, reader, chatWork(reader, asked, model));
    case "completions":
      return generationWork("completions", asked, reader, completionWork(reader, asked, model));
    case "embeddings":
      return embeddingWork(body, asked, model);
    case "responses":
      return {
        kind: "pass",
        endpoint,
        asked,
        stream: reader.flag("stream") ?? false,
        call: responsesCall(body, asked, model),
        maxTokens: reader.whole("max_output_tokens") ?? null,
      };
    case "messages":
    case "messages/count_tokens":
      return {
        kind: "pass",
        endpoint,
        asked,
        stream: endpoint === "messages" && (reader.flag("stream") ?? false),
        call: messagesCall(`POST /v1/${endpoint}`, body, asked, model),
        maxTokens: reader.whole("max_tokens") ?? null,
      };
  }
}

/** Renders and counts what can be before the first byte. Throws WireError 400 when the prompt does not fit. */
export function* prepareV1(work: V1Work, model: ServedModel): Steps<V1Prepared> {
  switch (work.kind) {
    case "generate": {
      const prepared = yield* prepare(work.work, model);
      const { route, body, promptTokens } = prepared;
      return { kind: "run", route, body, prepared, promptTokens };
    }
    case "embed":
      return { kind: "answer", reply: embeddingReply(work, yield* vectorsOf(work.work, model)) };
    case "pass": {
      const promptTokens = work.endpoint === "messages" ? yield* checkLength(work.call.body, model) : null;
      return { kind: "run", ...withinContext(work.call, model, promptTokens), prepared: null, promptTokens };
    }
  }
}

/** The core would go on and on in a context that shifts; in these dialects an answer ends where the context does. */
function withinContext(
  { route, body }: EngineCall,
  model: ServedModel,
  promptTokens: number | null,
): EngineCall {
  const limits = body as { readonly max_tokens?: number; readonly max_output_tokens?: number };
  const room = model.contextTokens - (promptTokens ?? 0);
  switch (route) {
    case "POST /v1/messages":
      return { route, body: { ...body, max_tokens: Math.min(limits.max_tokens ?? room, room) } };
    case "POST /v1/responses":
      return {
        route,
        body: { ...body, max_output_tokens: Math.min(limits.max_output_tokens ?? room, room) },
      };
    default:
      return { route, body };
  }
}

/** Messages can be counted beforehand; responses are by the engine, before their first event. */
function* checkLength(body: object, model: ServedModel): Steps<number> {
  const answer = yield { route: "POST /v1/messages/count_tokens", body };
  const { input_tokens: tokens } = answer as { readonly input_tokens: number };
  if (tokens >= model.contextTokens) {
    throw new WireError(
      400,
      `request (${tokens} tokens) exceeds the available context size (${model.contextTokens} tokens), try increasing it`,
    );
  }
  return tokens;
}

// ---- chat and completions -------------------------------------------------------------------------------------

function generationWork(
  endpoint: "chat/completions" | "completions",
  asked: string,
  reader: Reader,
  work: GenerateWork,
): V1Work {
  const options = readerOf(reader.object("stream_options") ?? {}, "StreamOptions");
  const includeUsage = options.flag("include_usage") ?? false;
  return { kind: "generate", endpoint, asked, stream: work.stream, work, includeUsage };
}

/** What both have. This dialect's defaults for temperature and top_p win over the model's own. */
function commonWork(
  reader: Reader,
  asked: string,
  model: ServedModel,
  limit: number | undefined,
): Omit<GenerateWork, "source" | "logprobs" | "topLogprobs"> {
  if (limit !== undefined && limit < 1) throw new WireError(400, "max_tokens must be at least 1");
  const stop = reader.raw("stop");
  const options = readOptions(model.settings.parameters, {
    temperature: reader.number("temperature") ?? 1,
    top_p: reader.number("top_p") ?? 1,
    top_k: reader.whole("top_k"),
    min_p: reader.number("min_p"),
    frequency_penalty: reader.number("frequency_penalty"),
    presence_penalty: reader.number("presence_penalty"),
    seed: reader.whole("seed"),
    num_predict: limit,
    stop,
  });
  const effort = readEffort(
    reader.raw("reasoning_effort") ?? readerOf(reader.object("reasoning") ?? {}, "Reasoning").raw("effort"),
  );
  const bias = reader.object("logit_bias");
  return {
    kind: "generate",
    dialect: "chat",
    asked,
    keepAliveSeconds: null,
    stream: reader.flag("stream") ?? false,
    contextTokens: contextOf({ ...options, contextTokens: null }, model, 0),
    imageCount: 0,
    options,
    format: null,
    think: thinkOf(effort, model),
    // A conversation that does not fit is an error here, as at OpenAI's: clients shorten it themselves.
    truncate: false,
    shift: false,
    engineFields: bias === undefined ? {} : { logit_bias: bias },
  };
}

function chatWork(reader: Reader, asked: string, model: ServedModel): GenerateWork {
  const list = reader.objects("messages") ?? [];
  if (list.length === 0) throw new WireError(400, "[] is too short - 'messages'");
  const limit = reader.whole("max_completion_tokens") ?? reader.whole("max_tokens");
  const common = commonWork(reader, asked, model, limit);
  const topLogprobs = reader.whole("top_logprobs") ?? 0;
  if (topLogprobs < 0 || topLogprobs > 20) {
    throw new WireError(400, "top_logprobs must be between 0 and 20");
  }
  const chosen = chooseTools(reader, model);
  const { messages, imageCount } = chatMessages(list, asked, model);
  const kwargs = reader.object("chat_template_kwargs");
  return {
    ...common,
    imageCount,
    format: readResponseFormat(reader),
    think: kwargsThink(kwargs, common),
    logprobs: reader.flag("logprobs") ?? false,
    topLogprobs,
    source: { kind: "messages", messages, tools: chosen.tools, before: [] },
    engineFields: { ...common.engineFields, ...chosen.fields },
  };
}

/** Clients of llama.cpp's and vLLM's servers switch thoughts off like this. */
function kwargsThink(kwargs: Fields | undefined, common: Pick<GenerateWork, "think">): GenerateWork["think"] {
  const on = kwargs?.["enable_thinking"] ?? kwargs?.["thinking"];
  return common.think !== null && typeof on === "boolean" ? { ...common.think, on } : common.think;
}

/** One named function is offered alone and must be called. */
function chooseTools(
  reader: Reader,
  model: ServedModel,
): { readonly tools: readonly Fields[]; readonly fields: Fields } {
  const tools = readToolSchemas(reader);
  if (tools.length > 0 && !model.capabilities.includes("tools")) {
    throw new WireError(400, `${longName(model.name)} does not support tools`);
  }
  const choice = reader.raw("tool_choice");
  const parallel = reader.flag("parallel_tool_calls");
  const fields = parallel === undefined || tools.length === 0 ? {} : { parallel_tool_calls: parallel };
  if (choice === undefined || tools.length === 0) return { tools, fields };
  if (choice === "none" || choice === "auto" || choice === "required") {
    return { tools, fields: { ...fields, tool_choice: choice } };
  }
  const name = readerOf(
    readerOf(isObject(choice) ? choice : {}, "ToolChoice").object("function") ?? {},
    "ToolChoice",
  ).text("name");
  const named = tools.filter((tool) => isObject(tool["function"]) && tool["function"]["name"] === name);
  if (named.length === 0) {
    throw new WireError(
      400,
      `tool_choice must be "none", "auto", "required" or one of the tools, not ${JSON.stringify(choice)}`,
    );
  }
  return { tools: named, fields: { ...fields, tool_choice: "required" } };
}

function readResponseFormat(reader: Reader): Fields | null {
  const format = reader.object("response_format");
  switch (format?.["type"]) {
    case undefined:
    case "text":
      return null;
    case "json_object":
      return { type: "object" };
    case "json_schema": {
      const wrapper = format?.["json_schema"];
      const schema = isObject(wrapper) ? wrapper["schema"] : undefined;
      if (isObject(schema)) return checkedSchema(schema);
      throw new WireError(400, "response_format needs json_schema.schema");
    }
    default:
      throw new WireError(
        400,
        `response_format must be of type "text", "json_object" or "json_schema", not ${JSON.stringify(format?.["type"])}`,
      );
  }
}

function chatMessages(
  list: readonly Fields[],
  asked: string,
  model: ServedModel,
): { readonly messages: readonly EngineMessage[]; readonly imageCount: number } {
  const names = new Map<string, string>();
  let imageCount = 0;
  const messages = list.map((fields): EngineMessage => {
    const reader = readerOf(fields, "Message");
    const role = reader.text("role") ?? "";
    const calls = (reader.objects("tool_calls") ?? []).map((call) => readCall(call, names));
    const content = readParts(reader, calls.length > 0, asked, model);
    if (typeof content !== "string") imageCount += content.filter((part) => "image_url" in part).length;
    const thinking = reader.text("reasoning") ?? reader.text("reasoning_content") ?? "";
    const callId = reader.text("tool_call_id");
    const name = reader.text("name") ?? names.get(callId ?? "");
    return {
      role,
      content,
      ...(thinking !== "" && { reasoning_content: thinking }),
      ...(calls.length > 0 && { tool_calls: calls }),
      ...(callId !== undefined && { tool_call_id: callId }),
      ...(role === "tool" && name !== undefined && { name }),
    };
  });
  return { messages, imageCount };
}

function readCall(fields: Fields, names: Map<string, string>): object {
  const reader = readerOf(fields, "ToolCall");
  const called = readerOf(reader.object("function") ?? {}, "ToolCallFunction");
  const name = called.text("name") ?? "";
  const given = called.raw("arguments");
  const text = isObject(given) ? JSON.stringify(given) : (called.text("arguments") ?? "");
  const id = reader.text("id");
  if (id !== undefined) names.set(id, name);
  if (name === "" || (text !== "" && !isJsonObject(text))) {
    throw new WireError(400, "a tool call needs a name, and arguments that are the text of a JSON object");
  }
  return {
    ...(id !== undefined && { id }),
    type: "function",
    function: { name, arguments: text === "" ? "{}" : text },
  };
}

function isJsonObject(text: string): boolean {
  try {
    return isObject(JSON.parse(text));
  } catch {
    return false;
  }
}

function readParts(
  reader: Reader,
  hasCalls: boolean,
  asked: string,
  model: ServedModel,
): string | readonly object[] {
  const content = reader.raw("content");
  if (content === undefined) {
    if (hasCalls) return "";
    throw new WireError(400, "a message needs content: text or a list of parts");
  }
  if (!Array.isArray(content)) return reader.text("content") ?? "";
  const parts = (reader.objects("content") ?? []).map((part): object => {
    const one = readerOf(part, "ContentPart");
    switch (one.text("type")) {
      case "text":
        return { type: "text", text: one.text("text") ?? "" };
      case "refusal":
        return { type: "text", text: one.text("refusal") ?? "" };
      case "image_url": {
        const image = one.raw("image_url");
        const url = checkedImage(isObject(image) ? image["url"] : image, model, asked);
        return { type: "image_url", image_url: { url } };
      }
      default:
        throw new WireError(
          400,
          `${JSON.stringify(asked)} does not support content of type ${JSON.stringify(one.raw("type") ?? null)}`,
        );
    }
  });
  const isText = parts.every((part) => "text" in part);
  return isText ? parts.map((part) => ("text" in part ? part.text : "")).join("\n") : parts;
}

/** The prompt is a user's message, as at /api/generate; with a suffix it is what stands before the hole. */
function completionWork(reader: Reader, asked: string, model: ServedModel): GenerateWork {
  const prompt = reader.text("prompt") ?? "";
  if (prompt === "") throw new WireError(400, "prompt is required and must be text");
  const suffix = reader.text("suffix") ?? "";
  if (suffix !== "" && model.fim === null) {
    throw new WireError(400, `${longName(model.name)} does not support insert`);
  }
  const count = reader.whole("logprobs");
  if (count !== undefined && (count < 0 || count > 20)) {
    throw new WireError(400, "logprobs must be between 0 and 20");
  }
  const { settings } = model;
  const messages = [
    ...(settings.system === "" ? [] : [{ role: "system", content: settings.system }]),
    { role: "user", content: prompt },
  ];
  return {
    ...commonWork(reader, asked, model, reader.whole("max_tokens")),
    logprobs: count !== undefined,
    topLogprobs: count ?? 0,
    source:
      suffix === ""
        ? { kind: "messages", messages, tools: [], before: [] }
        : { kind: "hole", prefix: prompt, suffix },
  };
}

// ---- embeddings -----------------------------------------------------------------------------------------------

function embeddingWork(body: Fields, asked: string, model: ServedModel): V1Work {
  const reader = readerOf(body, "EmbedRequest");
  const input = reader.raw("input");
  const isList = Array.isArray(input) && input.length > 0;
  if (typeof input !== "string" && !isList) throw new WireError(400, "invalid input");
  const format = reader.text("encoding_format") ?? "float";
  if (format !== "float" && format !== "base64") {
    throw new WireError(400, "encoding_format must be float or base64");
  }
  const work = parseEmbed({ model: asked, input, dimensions: reader.raw("dimensions") }, model);
  const inputs = typeof input === "string" ? [input] : work.inputs;
  return {
    kind: "embed",
    endpoint: "embeddings",
    asked,
    stream: false,
    work: { ...work, inputs },
    base64: format === "base64",
  };
}

function embeddingReply(
  work: Extract<V1Work, { readonly kind: "embed" }>,
  {
    vectors,
    promptTokens,
  }: { readonly vectors: readonly (readonly number[])[]; readonly promptTokens: number },
): object {
  return {
    object: "list",
    data: vectors.map((vector, index) => ({
      object: "embedding",
      embedding: work.base64 ? base64Floats(vector) : vector,
      index,
    })),
    model: work.asked,
    usage: { prompt_tokens: promptTokens, total_tokens: promptTokens },
  };
}

/** Little-endian float32. */
export function base64Floats(vector: readonly number[]): string {
  const view = new DataView(new ArrayBuffer(vector.length * 4));
  vector.forEach((value, index) => {
    view.setFloat32(index * 4, value, true);
  });
  let text = "";
  for (let at = 0; at < view.byteLength; at++) text += String.fromCharCode(view.getUint8(at));
  return btoa(text);
}

// ---- replies --------------------------------------------------------------------------------------------------

export interface V1Context {
  readonly nowUnixSeconds: number;
  /** Eight of [a-z0-9], another each time. */
  readonly newId: () => string;
}

export interface V1Reply {
  /** The model is loaded and the request is about to run. */
  begin(prepared: V1Prepared): void;
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

export function v1ReplyFor(work: V1Work, context: V1Context): V1Reply {
  switch (work.kind) {
    case "generate":
      return new GenerationReply(work, context);
    case "embed":
      return new PassReply(work, asItIs);
    case "pass":
      return new PassReply(work, menderFor(work, context));
  }
}

const asItIs: EventMender = {
  begin() {},
  mend: ({ name = "", data }) => [{ name, data: data as object }],
  mendWhole: (data) => data,
};

function menderFor(work: Extract<V1Work, { readonly kind: "pass" }>, context: V1Context): EventMender {
  const { asked, maxTokens } = work;
  switch (work.endpoint) {
    case "responses":
      return responsesMender({ ...context, asked, maxTokens });
    case "messages":
      return messagesMender({ ...context, asked, maxTokens });
    case "messages/count_tokens":
      return asItIs;
  }
}

/** Replies in the core's own dialects, and replies that need no generation. */
class PassReply implements V1Reply {
  readonly #work: V1Work;
  readonly #mender: EventMender;
  #whole: object | null = null;

  constructor(work: V1Work, mender: EventMender) {
    this.#work = work;
    this.#mender = mender;
  }

  begin(prepared: V1Prepared): void {
    if (prepared.kind === "answer") this.#whole = prepared.reply;
    else this.#mender.begin(prepared.promptTokens);
  }

  onChunk(chunk: EngineChunk): string {
    if (!this.#work.stream) {
      this.#whole = this.#mender.mendWhole(chunk.data as object);
      return "";
    }
    return this.#mender
      .mend(chunk)
      .map(({ name, data }) => frameOf(name, data))
      .join("");
  }

  end(): string {
    return "";
  }

  whole(): object {
    if (this.#whole === null) throw new WireError(500, "the engine ended without an answer");
    return this.#whole;
  }

  heartbeat(): string {
    return this.#work.endpoint === "messages" ? frameOf("ping", { type: "ping" }) : ": still at work\n\n";
  }

  error(error: WireError): string {
    const body = v1Error(this.#work.endpoint, error, null);
    if (this.#work.endpoint === "messages") return frameOf("error", body);
    return this.#work.endpoint === "responses"
      ? frameOf("error", { type: "error", code: "server_error", message: error.message, param: null })
      : frameOf(null, body);
  }
}

/** Chat and completions. */
class GenerationReply implements V1Reply {
  readonly #work: Extract<V1Work, { readonly kind: "generate" }>;
  readonly #context: V1Context;
  readonly #id: string;
  readonly #isChat: boolean;
  #reader: AnswerReader | null = null;
  #isFirst = true;
  #callCount = 0;
  #textLength = 0;
  readonly #said = { text: "", thinking: "", calls: [] as object[], choices: [] as TokenChoice[] };

  constructor(work: Extract<V1Work, { readonly kind: "generate" }>, context: V1Context) {
    this.#work = work;
    this.#context = context;
    this.#isChat = work.endpoint === "chat/completions";
    this.#id = `${this.#isChat ? "chatcmpl" : "cmpl"}-${context.newId()}`;
  }

  begin(prepared: V1Prepared): void {
    if (prepared.kind === "run" && prepared.prepared !== null) {
      this.#reader = new AnswerReader(prepared.prepared);
    }
  }

  onChunk(chunk: EngineChunk): string {
    return this.#tell(this.#running().add(chunk));
  }

  end(): string {
    const rest = this.#tell(this.#running().rest());
    const ending = this.#running().ending();
    const last = this.#isChat ? { delta: {} } : { text: "" };
    const frames = [
      rest,
      // An answer without a word has said nothing of its role yet.
      this.#isChat && this.#isFirst ? this.#chunk({ delta: this.#roled({ content: "" }) }, null) : "",
      this.#chunk(last, this.#finishReason(ending)),
      this.#work.includeUsage ? this.#frame([], { usage: usageOf(ending) }) : "",
      frameOf(null, "[DONE]"),
    ];
    return frames.join("");
  }

  whole(): object {
    this.#tell(this.#running().rest());
    const ending = this.#running().ending();
    const { text, thinking, calls, choices } = this.#said;
    const said = this.#isChat
      ? {
          message: {
            role: "assistant",
            content: text,
            ...(thinking !== "" && { reasoning: thinking }),
            ...(calls.length > 0 && { tool_calls: calls }),
          },
        }
      : { text };
    const logprobs = choices.length === 0 ? null : this.#logprobs(choices, 0);
    return {
      ...this.#head(this.#isChat ? "chat.completion" : "text_completion"),
      choices: [
        {
          index: 0,
          ...said,
          finish_reason: this.#finishReason(ending),
          ...(logprobs !== null && { logprobs }),
        },
      ],
      usage: usageOf(ending),
    };
  }

  heartbeat(): string {
    return ": still at work\n\n";
  }

  error(error: WireError): string {
    return frameOf(null, v1Error(this.#work.endpoint, error, null));
  }

  #running(): AnswerReader {
    if (this.#reader === null) throw new HypuraError("internal", "a chunk came before its request began");
    return this.#reader;
  }

  #finishReason({ finish }: Ending): string {
    return finish === "stop" && this.#said.calls.length > 0 ? "tool_calls" : finish;
  }

  #head(object: string): object {
    return {
      id: this.#id,
      object,
      created: this.#context.nowUnixSeconds,
      model: this.#work.asked,
      system_fingerprint: "fp_ollama",
    };
  }

  #frame(choices: readonly object[], more: object): string {
    const head = this.#head(this.#isChat ? "chat.completion.chunk" : "text_completion");
    return frameOf(null, { ...head, choices, ...more });
  }

  /** One choice; of completions every chunk carries a usage when usage was asked for. */
  #chunk(said: object, finish: string | null, choices: readonly TokenChoice[] = []): string {
    const logprobs = choices.length === 0 ? {} : { logprobs: this.#logprobs(choices, this.#textLength) };
    const noUsage = !this.#isChat && this.#work.includeUsage ? { usage: zeroUsage } : {};
    return this.#frame([{ index: 0, ...said, finish_reason: finish, ...logprobs }], noUsage);
  }

  #roled(delta: object): object {
    const roled = this.#isFirst ? { role: "assistant", ...delta } : delta;
    this.#isFirst = false;
    return roled;
  }

  #tell({ text, thinking, calls, choices }: Told): string {
    this.#said.text += text;
    this.#said.thinking += thinking;
    this.#said.choices.push(...choices);
    let frames = "";
    if (this.#isChat) {
      if (thinking !== "") {
        frames += this.#chunk(
          { delta: this.#roled({ reasoning: thinking }) },
          null,
          text === "" ? choices : [],
        );
      }
      if (text !== "" || (thinking === "" && choices.length > 0)) {
        frames += this.#chunk({ delta: this.#roled({ content: text }) }, null, choices);
      }
      for (const call of calls) frames += this.#chunk({ delta: this.#roled(this.#callDelta(call)) }, null);
    } else if (text !== "" || choices.length > 0) {
      frames = this.#chunk({ text }, null, choices);
    }
    for (const { token } of choices) this.#textLength += token.length;
    return frames;
  }

  #callDelta(call: WholeCall): object {
    const told = {
      index: this.#callCount++,
      id: `call_${this.#context.newId()}`,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    };
    this.#said.calls.push(told);
    return { tool_calls: [told] };
  }

  #logprobs(choices: readonly TokenChoice[], start: number): object {
    const count = this.#work.work.topLogprobs;
    if (this.#isChat) {
      // Clients of this dialect expect the list, empty when none were asked for.
      return { content: choices.map((choice) => ({ top_logprobs: [], ...logprobEntry(choice, count) })) };
    }
    let at = start;
    const offsets = choices.map(({ token }) => {
      const offset = at;
      at += token.length;
      return offset;
    });
    return {
      tokens: choices.map(({ token }) => token),
      token_logprobs: choices.map(({ logprob }) => logprob),
      top_logprobs: choices.map(({ alternatives }) =>
        Object.fromEntries(alternatives.slice(0, count).map(({ token, logprob }) => [token, logprob])),
      ),
      text_offset: offsets,
    };
  }
}

const zeroUsage = { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 };

function usageOf(ending: Ending): object {
  return {
    prompt_tokens: ending.promptTokens,
    completion_tokens: ending.generatedTokens,
    total_tokens: ending.promptTokens + ending.generatedTokens,
    prompt_tokens_details: { cached_tokens: ending.cachedTokens },
  };
}

// ---- errors ---------------------------------------------------------------------------------------------------

/** The body of an error before the first frame. `requestId` is only in Anthropic's shape. */
export function v1Error(endpoint: V1Endpoint | "models", error: WireError, requestId: string | null): object {
  if (endpoint === "messages" || endpoint === "messages/count_tokens") {
    return {
      type: "error",
      error: { type: anthropicType(error.status), message: error.message },
      ...(requestId !== null && { request_id: requestId }),
    };
  }
  return {
    error: { message: error.message, type: openAiType(error.status), param: null, code: null },
  };
}

function openAiType(status: number): string {
  if (status === 400) return "invalid_request_error";
  return status === 404 ? "not_found_error" : "api_error";
}

function anthropicType(status: number): string {
  switch (status) {
    case 400:
      return "invalid_request_error";
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
    case 529:
      return "overloaded_error";
    default:
      return "api_error";
  }
}

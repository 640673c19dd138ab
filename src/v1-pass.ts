// OpenAI's responses and Anthropic's messages: dialects that the engine's core speaks by itself. It owns what their
// requests must be checked for and mended in before they go there (the core would fetch a picture from anywhere),
// and what the core's events lack that the official clients rely on; it knows no socket and no clock. Pure.

import type { EngineChunk } from "./engine";
import type { ServedModel } from "./ollama-model";
import type { EngineCall } from "./ollama-prepare";
import { type Think, thinkFields } from "./ollama-request";
import { checkedSchema, type Fields, isObject, type Reader, readerOf } from "./wire-body";
import { WireError } from "./wire-error";

/** One server-sent event. */
export function frameOf(name: string | null, data: object | string): string {
  const text = typeof data === "string" ? data : JSON.stringify(data);
  return `${name === null ? "" : `event: ${name}\n`}data: ${text}\n\n`;
}

/** What of a request the core is shown: the named fields, as sent, without those that are null. */
export function picked(body: Fields, names: readonly string[]): Record<string, unknown> {
  return Object.fromEntries(
    names.flatMap((name) => {
      const value = readerOf(body, "").raw(name);
      return value === undefined ? [] : [[name, value]];
    }),
  );
}

// ---- images ---------------------------------------------------------------------------------------------------

/** Types that the engine decodes. */
const dataImage = /^data:image\/(jpeg|jpg|png|webp);base64,[A-Za-z0-9+/]+={0,2}$/;

/** A picture must come with the request: a server that fetches what a client names reaches where the client cannot. */
export function checkedImage(url: unknown, model: ServedModel, asked: string): string {
  if (!model.capabilities.includes("vision")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support images`);
  }
  if (typeof url !== "string" || !dataImage.test(url)) {
    throw new WireError(
      400,
      "invalid image input: send a data: URI with base64 of a JPEG, PNG or WebP image",
    );
  }
  return url;
}

const imageTypes: readonly unknown[] = ["image_url", "input_image", "image"];

/**
 * A line's end between images that stand side by side: the engine's core can keep no prefix that ends between two of
 * them, and fails every later request that would (keep_first in server-common.cpp, "Chunk not found").
 */
export function withImagesApart<Part extends object>(parts: readonly Part[], between: Part): readonly Part[] {
  const isImage = (part: Part | undefined): boolean =>
    part !== undefined && "type" in part && imageTypes.includes(part.type);
  return parts.flatMap((part, i) => (isImage(part) && isImage(parts[i - 1]) ? [between, part] : [part]));
}

/** The same in every list of parts of a request, however deep. */
function withMediaApart(value: unknown, between: Fields): unknown {
  if (Array.isArray(value)) {
    const parts = value.map((one) => withMediaApart(one, between));
    return parts.every(isObject) ? withImagesApart(parts, between) : parts;
  }
  return isObject(value)
    ? Object.fromEntries(Object.entries(value).map(([name, one]) => [name, withMediaApart(one, between)]))
    : value;
}

/** Looks at every content part of a request, however deep: tool results have parts too. */
function checkMedia(value: unknown, model: ServedModel, asked: string): void {
  if (Array.isArray(value)) {
    for (const one of value) checkMedia(one, model, asked);
  } else if (isObject(value)) {
    switch (value["type"]) {
      case "input_image":
      case "image_url": {
        const { image_url: image } = value;
        checkedImage(isObject(image) ? image["url"] : image, model, asked);
        return;
      }
      case "image": {
        const source = isObject(value["source"]) ? value["source"] : {};
        checkedImage(
          source["type"] === "base64" ? `data:${source["media_type"]};base64,${source["data"]}` : null,
          model,
          asked,
        );
        return;
      }
      case "input_audio":
      case "input_video":
      case "video_url":
      case "input_file":
      case "document":
        throw new WireError(
          400,
          `${JSON.stringify(asked)} does not support content of type ${value["type"]}`,
        );
      default:
        for (const one of Object.values(value)) checkMedia(one, model, asked);
    }
  }
}

// ---- effort ---------------------------------------------------------------------------------------------------

/** `undefined`: nothing was said. Names of other makers' levels are understood. */
export function readEffort(value: unknown): Think | undefined {
  switch (value) {
    case undefined:
      return undefined;
    case "none":
      return { on: false, level: null };
    case "minimal":
    case "low":
      return { on: true, level: "low" };
    case "medium":
    case "high":
    case "max":
      return { on: true, level: value };
    case "xhigh":
    case "ultra":
      return { on: true, level: "max" };
    default:
      throw new WireError(
        400,
        `invalid reasoning value: ${JSON.stringify(value)} (must be "none", "minimal", "low", "medium", "high", or "max")`,
      );
  }
}

/** On a model that does not think, an effort is a hint that nobody follows. */
export function thinkOf(effort: Think | undefined, model: ServedModel): Think | null {
  if (!model.capabilities.includes("thinking")) return null;
  return effort ?? { on: true, level: null };
}

// ---- requests -------------------------------------------------------------------------------------------------

function whole(reader: Reader, name: string, least: number): number | undefined {
  const value = reader.whole(name);
  if (value !== undefined && value < least) throw new WireError(400, `${name} must be at least ${least}`);
  return value;
}

/** For POST /v1/messages and its count_tokens. */
export function messagesCall(
  route: "POST /v1/messages" | "POST /v1/messages/count_tokens",
  body: Fields,
  asked: string,
  model: ServedModel,
): EngineCall {
  const reader = readerOf(body, "MessagesRequest");
  const messages = reader.objects("messages") ?? [];
  if (messages.length === 0) throw new WireError(400, "messages is required");
  const maxTokens = whole(reader, "max_tokens", 1);
  if (maxTokens === undefined && route === "POST /v1/messages") {
    throw new WireError(400, "max_tokens is required and must be positive");
  }
  const tools = reader.objects("tools") ?? [];
  if (tools.length > 0 && !model.capabilities.includes("tools")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support tools`);
  }
  checkMedia(reader.raw("system"), model, asked);
  checkMedia(messages, model, asked);
  const thinking = readerOf(reader.object("thinking") ?? {}, "Thinking").text("type");
  const effort = readerOf(reader.object("output_config") ?? {}, "OutputConfig").raw("effort");
  // Who does not ask for thoughts gets none: that is this dialect's default.
  const asks = thinking === "enabled" || thinking === "adaptive";
  const level = effort === undefined ? null : (readEffort(effort)?.level ?? null);
  const { chat_template_kwargs: kwargs, reasoning_effort: named } = thinkFields(
    thinkOf({ on: asks, level: asks ? level : null }, model),
    model,
  ) as { readonly chat_template_kwargs?: object; readonly reasoning_effort?: string };
  return {
    route,
    body: {
      temperature: 1,
      top_p: 1,
      top_k: 40,
      ...picked(body, [
        "system",
        "tool_choice",
        "stop_sequences",
        "thinking",
        "temperature",
        "top_p",
        "top_k",
      ]),
      messages: withMediaApart(messages, { type: "text", text: "\n" }),
      ...(tools.length > 0 && { tools: tools.map(customTool) }),
      ...(maxTokens !== undefined && { max_tokens: maxTokens }),
      stream: route === "POST /v1/messages" && (reader.flag("stream") ?? false),
      ...(kwargs !== undefined && {
        chat_template_kwargs: { ...kwargs, ...(named !== undefined && { reasoning_effort: named }) },
      }),
    },
  };
}

/** Tools that run at Anthropic's have no schema of their own, and nothing runs them here. */
function customTool(tool: Fields): Fields {
  if (isObject(tool["input_schema"]) && typeof tool["name"] === "string") return checkedSchema(tool);
  throw new WireError(
    400,
    `the tool ${JSON.stringify(tool["name"] ?? tool["type"] ?? "")} has no name or no input_schema: only tools that the client runs are supported`,
  );
}

/** For POST /v1/responses. */
export function responsesCall(body: Fields, asked: string, model: ServedModel): EngineCall {
  const reader = readerOf(body, "ResponsesRequest");
  const input = reader.raw("input");
  if (input === undefined || input === "" || (Array.isArray(input) && input.length === 0)) {
    throw new WireError(400, "input is required");
  }
  if ((reader.text("previous_response_id") ?? "") !== "") {
    throw new WireError(
      400,
      "previous_response_id is not supported: this server keeps no state, send the items",
    );
  }
  checkMedia(input, model, asked);
  const tools = functionTools(reader.objects("tools") ?? []);
  if (tools.length > 0 && !model.capabilities.includes("tools")) {
    throw new WireError(400, `${JSON.stringify(asked)} does not support tools`);
  }
  const reasoning = readerOf(reader.object("reasoning") ?? {}, "Reasoning");
  const limit = whole(reader, "max_output_tokens", 1);
  return {
    route: "POST /v1/responses",
    body: {
      temperature: 1,
      top_p: 1,
      min_p: 0,
      ...picked(body, ["instructions", "temperature", "top_p"]),
      input: Array.isArray(input)
        ? withMediaApart(input.flatMap(inputItem), { type: "input_text", text: "\n" })
        : input,
      ...(tools.length > 0 && { tools, ...toolChoice(reader.raw("tool_choice")) }),
      ...(limit !== undefined && { max_output_tokens: limit }),
      ...responseFormat(reader),
      ...thinkFields(thinkOf(readEffort(reasoning.raw("effort")), model), model),
      cache_prompt: true,
      stream: reader.flag("stream") ?? false,
    },
  };
}

/** Functions in groups are functions; what only OpenAI can run is left out, as the model cannot call it. */
function functionTools(tools: readonly Fields[]): readonly Fields[] {
  return tools.flatMap((tool) => {
    if (tool["type"] === "function") return [checkedSchema(tool)];
    const inner = tool["tools"];
    return tool["type"] === "namespace" && Array.isArray(inner) ? functionTools(inner.filter(isObject)) : [];
  });
}

function toolChoice(value: unknown): object {
  if (value === "none" || value === "auto" || value === "required") return { tool_choice: value };
  return isObject(value) ? { tool_choice: "required" } : {};
}

/** Items in the forms that clients send and the core does not know. */
function inputItem(item: unknown): readonly unknown[] {
  if (!isObject(item)) throw new WireError(400, "input must be text or a list of items");
  switch (item["type"]) {
    case undefined:
      return [{ type: "message", ...item }];
    case "web_search_call":
      return [];
    case "reasoning": {
      const content = item["content"];
      return Array.isArray(content) && content.length > 0 ? [item] : [];
    }
    default:
      return [item];
  }
}

function responseFormat(reader: Reader): object {
  const text = readerOf(reader.object("text") ?? {}, "Text");
  const format = text.object("format");
  switch (format?.["type"]) {
    case undefined:
    case "text":
      return {};
    case "json_object":
      return { response_format: { type: "json_object" } };
    case "json_schema":
      if (isObject(format?.["schema"])) {
        return {
          response_format: { type: "json_schema", json_schema: { schema: checkedSchema(format["schema"]) } },
        };
      }
      throw new WireError(400, "text.format needs a schema");
    default:
      throw new WireError(400, `text.format cannot be of type ${JSON.stringify(format?.["type"])}`);
  }
}

// ---- replies --------------------------------------------------------------------------------------------------

/** What the core's events become. */
export interface EventMender {
  /** How long the prompt is, where it was counted. */
  begin(promptTokens: number | null): void;
  /** The events that one event becomes: itself, mended, and what was missing before it. */
  mend(chunk: EngineChunk): readonly { readonly name: string; readonly data: object }[];
  /** The one object of a reply that does not stream. */
  mendWhole(data: object): object;
}

export interface MenderContext {
  readonly asked: string;
  readonly nowUnixSeconds: number;
  readonly newId: () => string;
  /** What the request said. */
  readonly maxTokens: number | null;
}

type Json = Readonly<Record<string, unknown>>;

/**
 * Messages: the name as asked, an id of this dialect's, an input where a call has none yet. The core begins a message
 * with its first token, and not at all when that is no whole character yet: the beginning is made up for here.
 */
export function messagesMender(context: MenderContext): EventMender {
  const id = `msg_${context.newId()}${context.newId()}${context.newId()}`;
  let promptTokens = 0;
  let hasBegun = false;
  const start = () => ({
    name: "message_start",
    data: {
      type: "message_start",
      message: {
        id,
        type: "message",
        role: "assistant",
        content: [],
        model: context.asked,
        stop_reason: null,
        stop_sequence: null,
        usage: { input_tokens: promptTokens, output_tokens: 0 },
      },
    },
  });
  return {
    begin(tokens) {
      promptTokens = tokens ?? 0;
    },
    mend({ name = "", data }) {
      const event = data as Json;
      const { message, content_block: block } = event;
      const missing = hasBegun || isObject(message) ? [] : [start()];
      hasBegun = true;
      if (isObject(message)) {
        return [{ name, data: { ...event, message: { ...message, id, model: context.asked } } }];
      }
      if (isObject(block) && block["type"] === "tool_use") {
        return [...missing, { name, data: { ...event, content_block: { ...block, input: {} } } }];
      }
      return [...missing, { name, data: event }];
    },
    mendWhole: (data) => ({ ...data, id, model: context.asked }),
  };
}

/** Responses: numbers and places on every event, and the whole object where the client starts from it. */
export function responsesMender(context: MenderContext): EventMender {
  const places = new Map<string, number>();
  const begun = new Set<unknown>();
  let number = 0;
  const response = (said: unknown): object => ({
    created_at: context.nowUnixSeconds,
    error: null,
    incomplete_details: null,
    instructions: null,
    metadata: {},
    output: [],
    parallel_tool_calls: true,
    temperature: null,
    tool_choice: "auto",
    tools: [],
    top_p: null,
    usage: null,
    ...(isObject(said) ? said : {}),
    model: context.asked,
    ...incomplete(said, context.maxTokens),
  });
  const placed = (event: Json): Json => {
    const item = isObject(event["item"]) ? event["item"] : null;
    const id = item?.["id"] ?? event["item_id"];
    if (typeof id !== "string") return event;
    const place = places.get(id) ?? places.size;
    places.set(id, place);
    const isPart = /content_part|_text\./.test(String(event["type"]));
    return { ...event, output_index: place, ...(isPart && { content_index: 0 }) };
  };
  const numbered = (event: Json): { readonly name: string; readonly data: object } => ({
    name: String(event["type"]),
    data: { ...event, sequence_number: number++ },
  });
  return {
    begin() {},
    mend({ data }) {
      const event = placed(data as Json);
      const { item, part, type } = event;
      // The core says these again and again when the first token was no whole character.
      if (type === "response.created" || type === "response.in_progress") {
        if (begun.has(type)) return [];
        begun.add(type);
      }
      if (isObject(event["response"])) {
        const mended = response(event["response"]);
        const isCut =
          event["type"] === "response.completed" && "status" in mended && mended.status === "incomplete";
        return [numbered({ ...event, response: mended, ...(isCut && { type: "response.incomplete" }) })];
      }
      if (
        event["type"] === "response.output_item.done" &&
        isObject(item) &&
        item["type"] === "function_call"
      ) {
        const done = {
          type: "response.function_call_arguments.done",
          item_id: item["id"],
          output_index: event["output_index"],
          name: item["name"],
          arguments: item["arguments"],
        };
        return [numbered(done), numbered(event)];
      }
      if (isObject(part)) {
        return [numbered({ ...event, part: { annotations: [], logprobs: [], ...part } })];
      }
      return [
        numbered(
          /output_text\.(delta|done)$/.test(String(event["type"])) ? { logprobs: [], ...event } : event,
        ),
      ];
    },
    mendWhole: (data) => response(data),
  };
}

/** The core calls every answer completed; one that used all it was allowed was cut. */
function incomplete(response: unknown, maxTokens: number | null): object {
  if (!isObject(response) || response["status"] !== "completed" || maxTokens === null) return {};
  const usage = isObject(response["usage"]) ? response["usage"] : {};
  const used = usage["output_tokens"];
  return typeof used === "number" && used >= maxTokens
    ? { status: "incomplete", incomplete_details: { reason: "max_output_tokens" } }
    : {};
}

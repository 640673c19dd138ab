// The replies under /v1 as schemas of our own making, after the published descriptions of OpenAI's and Anthropic's
// APIs. What this program writes itself is closed: a field that is not known is a problem. What the engine's core
// writes (responses, messages) is open: what clients rely on must be there and right, more may be.

import {
  anything,
  constant,
  countValue,
  either,
  listOf,
  numberValue,
  object,
  objectValue,
  oneOf,
  optional,
  type Schema,
  textValue,
  wholeValue,
} from "./api-schemas";

/** An object with these fields, and any others. */
function open(fields: Readonly<Record<string, Schema>>): Schema {
  return (value, at) => {
    const wrong = objectValue(value, at);
    if (wrong.length > 0) return wrong;
    const given = value as Readonly<Record<string, unknown>>;
    return Object.entries(fields).flatMap(([name, schema]) =>
      Object.hasOwn(given, name) ? schema(given[name], `${at}.${name}`) : [`${at}.${name}: missing`],
    );
  };
}

const nothing = constant(null);

function idOf(prefix: string): Schema {
  return (value, at) =>
    typeof value === "string" && value.startsWith(prefix) && value.length > prefix.length
      ? []
      : [`${at}: ${JSON.stringify(value)} is no id that begins with ${prefix}`];
}

// ---- OpenAI -----------------------------------------------------------------------------------------------------------

export const openAiError = object({
  error: object({
    message: textValue,
    type: oneOf("invalid_request_error", "not_found_error", "api_error"),
    param: nothing,
    code: nothing,
  }),
});

const usage = object({
  prompt_tokens: countValue,
  completion_tokens: countValue,
  total_tokens: countValue,
  prompt_tokens_details: optional(object({ cached_tokens: countValue })),
});

const toolCall = object({
  index: countValue,
  id: idOf("call_"),
  type: constant("function"),
  function: object({ name: textValue, arguments: textValue }),
});

const tokenLogprob = { token: textValue, logprob: numberValue, bytes: listOf(countValue) };
const chatLogprobs = object({
  content: listOf(object({ ...tokenLogprob, top_logprobs: listOf(object(tokenLogprob)) })),
});
const textLogprobs = object({
  tokens: listOf(textValue),
  token_logprobs: listOf(numberValue),
  top_logprobs: listOf(objectValue),
  text_offset: listOf(countValue),
});

const finish = oneOf("stop", "length", "tool_calls");

const head = (kind: string, prefix: string) => ({
  id: idOf(prefix),
  object: constant(kind),
  created: countValue,
  model: textValue,
  system_fingerprint: textValue,
});

export const chatCompletion = object({
  ...head("chat.completion", "chatcmpl-"),
  choices: listOf(
    object({
      index: countValue,
      message: object({
        role: constant("assistant"),
        content: textValue,
        reasoning: optional(textValue),
        tool_calls: optional(listOf(toolCall)),
      }),
      finish_reason: finish,
      logprobs: optional(chatLogprobs),
    }),
  ),
  usage,
});

export const chatChunk = object({
  ...head("chat.completion.chunk", "chatcmpl-"),
  choices: listOf(
    object({
      index: countValue,
      delta: object({
        role: optional(constant("assistant")),
        content: optional(textValue),
        reasoning: optional(textValue),
        tool_calls: optional(listOf(toolCall)),
      }),
      finish_reason: either(nothing, finish),
      logprobs: optional(chatLogprobs),
    }),
  ),
  usage: optional(usage),
});

/** One object for the whole reply and for its chunks, as this old dialect has it. */
export const textCompletion = object({
  ...head("text_completion", "cmpl-"),
  choices: listOf(
    object({
      index: countValue,
      text: textValue,
      finish_reason: either(nothing, finish),
      logprobs: optional(textLogprobs),
    }),
  ),
  usage: optional(usage),
});

const modelFields = {
  id: textValue,
  object: constant("model"),
  created: countValue,
  owned_by: textValue,
};
export const modelEntry = object(modelFields);
export const modelList = object({ object: constant("list"), data: listOf(modelEntry) });

export const embeddingList = object({
  object: constant("list"),
  data: listOf(
    object({
      object: constant("embedding"),
      index: countValue,
      embedding: either(listOf(numberValue), textValue),
    }),
  ),
  model: textValue,
  usage: object({ prompt_tokens: countValue, total_tokens: countValue }),
});

// ---- responses --------------------------------------------------------------------------------------------------------

const outputItem = open({ type: oneOf("message", "function_call", "reasoning"), id: textValue });

export const response = open({
  id: textValue,
  object: constant("response"),
  created_at: countValue,
  model: textValue,
  status: oneOf("completed", "incomplete", "in_progress"),
  error: nothing,
  incomplete_details: either(nothing, open({ reason: textValue })),
  output: listOf(outputItem),
  parallel_tool_calls: anything,
  tool_choice: anything,
  tools: listOf(objectValue),
  usage: either(
    nothing,
    open({ input_tokens: countValue, output_tokens: countValue, total_tokens: countValue }),
  ),
});

const placed = { item_id: textValue, output_index: countValue };
const inPart = { ...placed, content_index: countValue };

const responseEvents: Readonly<Record<string, Readonly<Record<string, Schema>>>> = {
  "response.created": { response },
  "response.in_progress": { response },
  "response.completed": { response },
  "response.incomplete": { response },
  "response.output_item.added": { item: outputItem, output_index: countValue },
  "response.output_item.done": { item: outputItem, output_index: countValue },
  "response.content_part.added": { ...inPart, part: objectValue },
  "response.content_part.done": { ...inPart, part: objectValue },
  "response.output_text.delta": { ...inPart, delta: textValue, logprobs: listOf(objectValue) },
  "response.output_text.done": { ...inPart, text: textValue, logprobs: listOf(objectValue) },
  "response.reasoning_text.delta": { ...inPart, delta: textValue },
  "response.reasoning_text.done": { ...inPart, text: textValue },
  "response.function_call_arguments.delta": { ...placed, delta: textValue },
  "response.function_call_arguments.done": { ...placed, arguments: textValue, name: textValue },
  error: { message: textValue, code: textValue, param: nothing },
};

export const responseEvent: Schema = (value, at) =>
  eventOf(responseEvents, { sequence_number: countValue })(value, at);

function eventOf(
  events: Readonly<Record<string, Readonly<Record<string, Schema>>>>,
  always: Readonly<Record<string, Schema>>,
): Schema {
  return (value, at) => {
    const type = (value as { readonly type?: unknown } | null)?.type;
    const fields = typeof type === "string" ? events[type] : undefined;
    return fields === undefined
      ? [`${at}.type: ${JSON.stringify(type)} is no event of this stream`]
      : open({ ...(type === "error" ? {} : always), ...fields })(value, at);
  };
}

// ---- Anthropic --------------------------------------------------------------------------------------------------------

export const anthropicError = object({
  type: constant("error"),
  error: object({ type: textValue, message: textValue }),
  request_id: optional(textValue),
});

const stopReason = oneOf("end_turn", "max_tokens", "tool_use", "stop_sequence");

const block: Schema = (value, at) =>
  eventOf(
    {
      text: { text: textValue },
      thinking: { thinking: textValue, signature: textValue },
      tool_use: { id: textValue, name: textValue, input: objectValue },
    },
    {},
  )(value, at);

const messageHead = {
  id: idOf("msg_"),
  type: constant("message"),
  role: constant("assistant"),
  model: textValue,
  content: listOf(block),
  usage: open({ input_tokens: countValue, output_tokens: countValue }),
};

export const message = open({
  ...messageHead,
  stop_reason: stopReason,
  stop_sequence: either(nothing, textValue),
});

export const messageEvent: Schema = eventOf(
  {
    message_start: { message: open({ ...messageHead, stop_reason: nothing }) },
    content_block_start: { index: countValue, content_block: block },
    content_block_delta: {
      index: countValue,
      delta: eventOf(
        {
          text_delta: { text: textValue },
          thinking_delta: { thinking: textValue },
          signature_delta: { signature: textValue },
          input_json_delta: { partial_json: textValue },
        },
        {},
      ),
    },
    content_block_stop: { index: countValue },
    message_delta: { delta: open({ stop_reason: stopReason }), usage: open({ output_tokens: countValue }) },
    message_stop: {},
    ping: {},
    error: { error: open({ type: textValue, message: textValue }) },
  },
  {},
);

export const countReply = open({ input_tokens: wholeValue });

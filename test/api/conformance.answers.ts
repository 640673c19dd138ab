// Rows of the table of conformance about answers: /api/generate, /api/chat, what options mean, and the dialects under
// /v1. Data only; conformance.test.ts asks them.

import {
  callDelta,
  called,
  chat,
  delta,
  ending,
  eventType,
  few,
  hello,
  jsonType,
  metrics,
  type Row,
  type Shape,
  said,
  streamType,
  textOf,
  thought,
  utc,
  v1,
  v1Error,
  weather,
} from "./conformance.row";

// ---- generate -------------------------------------------------------------------------------------------------------

const generate: readonly Row[] = [
  {
    line: "3.2 every line has model, created_at, response, done",
    ask: ["POST", "/api/generate", said],
    type: streamType,
    holds: ({ lines }) =>
      lines.length >= 3 &&
      lines.every(
        (line) =>
          line.model === "m" &&
          typeof line.response === "string" &&
          typeof line.done === "boolean" &&
          utc.test(line.created_at),
      ),
  },
  {
    line: "3.2 the last line has done, its reason, context and six metrics",
    ask: ["POST", "/api/generate", said],
    last: { done: true, done_reason: "length", eval_count: 3 },
    holds: ({ lines }) =>
      metrics.every((name) => lines.at(-1)[name] > 0) && lines.filter((line) => line.done).length === 1,
  },
  {
    line: "5.1 num_predict 0: the prompt is evaluated and one token comes, as from the server that Ollama runs",
    ask: ["POST", "/api/generate", { ...said, options: { num_predict: 0 } }],
    last: { done: true, done_reason: "length", eval_count: 1 },
  },
  { line: "3.1 stream is the default", ask: ["POST", "/api/generate", said], type: streamType },
  {
    line: "3.3 stream false: one object of the last line's fields",
    ask: ["POST", "/api/generate", { ...said, stream: false }],
    type: jsonType,
    json: { model: "m", done: true, done_reason: "length", eval_count: 3 },
    holds: ({ json }) =>
      json.response.length > 0 && metrics.every((name) => name in json) && json.context.length > 3,
  },
  {
    line: "3.4 an empty prompt loads",
    ask: ["POST", "/api/generate", { model: "m" }],
    type: jsonType,
    json: { model: "m", response: "", done: true, done_reason: "load" },
    holds: ({ json }) => !("total_duration" in json),
  },
  {
    line: "3.4 an empty prompt and keep_alive 0 unloads",
    ask: ["POST", "/api/generate", { model: "m", keep_alive: 0 }],
    type: jsonType,
    json: { model: "m", response: "", done: true, done_reason: "unload" },
  },
  {
    line: "3.4 a prompt and keep_alive 0 generates",
    ask: ["POST", "/api/generate", { ...said, keep_alive: 0 }],
    last: { done: true, eval_count: 3 },
  },
  {
    line: "3.5 context: the ids of prompt and answer",
    ask: ["POST", "/api/generate", said],
    holds: ({ lines }) => {
      const last = lines.at(-1);
      return last.context.every(Number.isSafeInteger) && last.context.length >= last.prompt_eval_count;
    },
  },
  {
    line: "3.5 no context with raw",
    ask: ["POST", "/api/generate", { ...said, raw: true }],
    holds: ({ lines }) => !("context" in lines.at(-1)),
  },
  {
    line: "3.1 context is taken back",
    ask: ["POST", "/api/generate", { ...said, context: [5, 40, 77] }],
    last: { done: true },
  },
  {
    line: "3.1 raw takes fewer tokens than the template",
    ask: ["POST", "/api/generate", { ...said, raw: true }],
    holds: ({ lines }) => lines.at(-1).prompt_eval_count < 8,
  },
  {
    line: "3.1 system",
    ask: ["POST", "/api/generate", { ...said, system: "Be brief." }],
    last: { done: true },
  },
  {
    line: "3.1 a template of Go's is refused",
    ask: ["POST", "/api/generate", { ...said, template: "{{ .Prompt }}" }],
    status: 400,
  },
  {
    line: "3.1 suffix fills a hole",
    on: "able",
    ask: ["POST", "/api/generate", { ...said, suffix: "world" }],
    last: { done: true },
  },
  {
    line: "3.1 images in bad base64",
    ask: ["POST", "/api/generate", { ...said, images: ["%%%"] }],
    status: 400,
  },
  {
    line: "3.1 format json gives JSON",
    ask: [
      "POST",
      "/api/generate",
      { ...said, format: "json", options: { num_predict: 400, temperature: 0, seed: 1 }, stream: false },
    ],
    holds: ({ json }) => json.response.trim().startsWith("{"),
  },
  {
    line: "3.1 format as a schema is kept",
    ask: [
      "POST",
      "/api/generate",
      {
        ...said,
        stream: false,
        format: {
          type: "object",
          properties: { a: { enum: ["x", "y"] } },
          required: ["a"],
          additionalProperties: false,
        },
        options: { num_predict: 200, temperature: 0 },
      },
    ],
    holds: ({ json }) => ["x", "y"].includes(JSON.parse(json.response).a),
  },
  {
    line: '3.1 format "" is absent',
    ask: ["POST", "/api/generate", { ...said, format: "" }],
    last: { done: true },
  },
  {
    line: "3.1 _debug_render_only",
    ask: ["POST", "/api/generate", { ...said, _debug_render_only: true }],
    holds: ({ json }) =>
      json._debug_info.rendered_template.includes("Hello") && json._debug_info.image_count === 0,
  },
  {
    line: "3.1 think false on a model that does not",
    ask: ["POST", "/api/generate", { ...said, think: false }],
    last: { done: true },
  },
  {
    line: "3.2 thinking is a field of its own",
    on: "scripted",
    script: thought,
    ask: ["POST", "/api/generate", said],
    holds: (seen) =>
      seen.lines.map((line) => line.thinking ?? "").join("") === "Hm, yes." && textOf(seen) === "Yes!",
  },
];

// ---- chat -----------------------------------------------------------------------------------------------------------

const chats: readonly Row[] = [
  {
    line: "4.2 every line has model, created_at, message, done",
    ask: ["POST", "/api/chat", chat],
    type: streamType,
    holds: ({ lines }) =>
      lines.length >= 3 &&
      lines.every(
        (line) =>
          line.model === "m" &&
          line.message.role === "assistant" &&
          typeof line.message.content === "string" &&
          typeof line.done === "boolean",
      ),
  },
  {
    line: "4.2 the last line has done, its reason and six metrics, and no context",
    ask: ["POST", "/api/chat", chat],
    last: { done: true, done_reason: "length", eval_count: 3 },
    holds: ({ lines }) => metrics.every((name) => lines.at(-1)[name] > 0) && !("context" in lines.at(-1)),
  },
  {
    line: "4.2 stream false: one object",
    ask: ["POST", "/api/chat", { ...chat, stream: false }],
    type: jsonType,
    json: { model: "m", message: { role: "assistant" }, done: true, done_reason: "length", eval_count: 3 },
  },
  {
    line: "4.1 content is a text",
    ask: ["POST", "/api/chat", { ...chat, messages: [{ role: "user", content: 5 }] }],
    status: 400,
  },
  {
    line: "4.1 roles in any letter case",
    ask: ["POST", "/api/chat", { ...chat, messages: [{ role: "User", content: "Hi" }] }],
    last: { done: true },
  },
  {
    line: "4.1 a system message",
    ask: ["POST", "/api/chat", { ...chat, messages: [{ role: "system", content: "Be brief." }, ...hello] }],
    last: { done: true },
  },
  {
    line: "4.1 a conversation",
    ask: [
      "POST",
      "/api/chat",
      { ...chat, messages: [...hello, { role: "assistant", content: "Hi." }, ...hello] },
    ],
    last: { done: true },
  },
  {
    line: "4.1 earlier calls and their results, arguments as an object",
    on: "able",
    ask: [
      "POST",
      "/api/chat",
      {
        ...chat,
        tools: [weather],
        messages: [
          ...hello,
          {
            role: "assistant",
            content: "",
            tool_calls: [{ id: "a", function: { name: "get_weather", arguments: { city: "Paris" } } }],
          },
          { role: "tool", content: "sunny", tool_name: "get_weather", tool_call_id: "a" },
        ],
      },
    ],
    last: { done: true },
  },
  {
    line: "4.1 arguments as a text that is an object",
    on: "able",
    ask: [
      "POST",
      "/api/chat",
      {
        ...chat,
        messages: [
          ...hello,
          { role: "assistant", content: "", tool_calls: [{ function: { name: "f", arguments: '{"a":1}' } }] },
          { role: "tool", content: "x" },
        ],
      },
    ],
    last: { done: true },
  },
  {
    line: "4.1 tools reach the template unchanged",
    on: "able",
    ask: ["POST", "/api/chat", { ...chat, tools: [weather], _debug_render_only: true }],
    holds: ({ json }) =>
      json._debug_info.rendered_template.includes('"name": "get_weather"') &&
      json._debug_info.rendered_template.includes('"city"'),
  },
  {
    line: "4.1 tool_choice is no field",
    on: "able",
    ask: ["POST", "/api/chat", { ...chat, tool_choice: "none" }],
    last: { done: true },
  },
  {
    line: "4.4 no messages load",
    ask: ["POST", "/api/chat", { model: "m" }],
    type: jsonType,
    json: { model: "m", message: { role: "assistant", content: "" }, done: true, done_reason: "load" },
  },
  {
    line: "4.4 an empty list of messages loads",
    ask: ["POST", "/api/chat", { model: "m", messages: [] }],
    json: { done: true, done_reason: "load" },
  },
  {
    line: "4.4 no messages and keep_alive 0 unloads",
    ask: ["POST", "/api/chat", { model: "m", messages: [], keep_alive: 0 }],
    type: jsonType,
    json: { message: { role: "assistant", content: "" }, done: true, done_reason: "unload" },
  },
  {
    line: "4.3 calls come whole, in lines of their own before the last, arguments as objects",
    on: "scripted",
    script: called,
    ask: ["POST", "/api/chat", { ...chat, tools: [weather] }],
    last: { done: true, done_reason: "stop", message: { role: "assistant", content: "" } },
    holds: ({ lines }) => {
      const calls = lines.filter((line) => line.message.tool_calls !== undefined);
      const all = calls.flatMap((line) => line.message.tool_calls);
      return (
        calls.every((line) => line.done === false && line.message.content === "") &&
        all.length === 2 &&
        all.every(
          (one, i) =>
            /^call_[a-z0-9]{8}$/.test(one.id) &&
            one.function.index === i &&
            one.function.name === "get_weather",
        ) &&
        all[0].function.arguments.city === "Paris" &&
        all[1].function.arguments.city === "Rome"
      );
    },
  },
  {
    line: "4.3 stream false: all calls in one object",
    on: "scripted",
    script: called,
    ask: ["POST", "/api/chat", { ...chat, tools: [weather], stream: false }],
    json: {
      done_reason: "stop",
      message: {
        content: "Let me see.",
        tool_calls: [
          { function: { name: "get_weather", arguments: { city: "Paris" } } },
          { function: { arguments: { city: "Rome" } } },
        ],
      },
    },
  },
  {
    line: "4.3 arguments that are empty are {}",
    on: "scripted",
    script: [callDelta(0, "get_weather", ""), ending("tool_calls")],
    ask: ["POST", "/api/chat", { ...chat, tools: [weather], stream: false }],
    holds: ({ json }) => JSON.stringify(json.message.tool_calls[0].function.arguments) === "{}",
  },
  {
    line: "4.5 thoughts stream before the answer, without tags",
    on: "scripted",
    script: thought,
    ask: ["POST", "/api/chat", chat],
    holds: (seen) => {
      const lines = seen.lines.filter((line) => line.message.thinking || line.message.content);
      const firstText = lines.findIndex((line) => line.message.content !== "");
      return (
        lines.map((line) => line.message.thinking ?? "").join("") === "Hm, yes." &&
        textOf(seen) === "Yes!" &&
        lines.slice(firstText).every((line) => !line.message.thinking)
      );
    },
  },
  {
    line: "4.5 thoughts, stream false",
    on: "scripted",
    script: thought,
    ask: ["POST", "/api/chat", { ...chat, stream: false }],
    json: { message: { thinking: "Hm, yes.", content: "Yes!" } },
  },
  {
    line: "4.5 think false is accepted where nobody thinks",
    ask: ["POST", "/api/chat", { ...chat, think: false }],
    last: { done: true },
  },
  {
    line: "4.5 think false closes the thoughts in the prompt",
    on: "able",
    ask: ["POST", "/api/chat", { ...chat, think: false, _debug_render_only: true }],
    holds: ({ json }) => json._debug_info.rendered_template.includes("</think>"),
  },
  {
    line: "4.5 thinking is on by default",
    on: "able",
    ask: ["POST", "/api/chat", { ...chat, _debug_render_only: true }],
    holds: ({ json }) => !json._debug_info.rendered_template.includes("</think>"),
  },
  ...["low", "medium", "high", "max", true].map(
    (think): Row => ({
      line: `4.5 think ${think}`,
      on: "able",
      ask: ["POST", "/api/chat", { ...chat, think }],
      last: { done: true },
    }),
  ),
  {
    line: "OpenClaw's request as it was seen",
    on: "able",
    ask: [
      "POST",
      "/api/chat",
      {
        model: "m",
        messages: hello,
        stream: true,
        tools: [weather],
        options: { num_ctx: 32768, num_predict: 3, temperature: 0 },
        truncate: false,
        shift: false,
        think: false,
        keep_alive: "5m",
      },
    ],
    headers: { authorization: "Bearer ollama-local", "content-type": "application/json" },
    last: { done: true, done_reason: "length" },
  },
];

// ---- semantics ------------------------------------------------------------------------------------------------------

const semantics: readonly Row[] = [
  {
    line: "5.1 unknown options are ignored",
    ask: [
      "POST",
      "/api/generate",
      {
        ...said,
        options: {
          ...few,
          mirostat: 1,
          tfs_z: "x",
          numa: true,
          f16_kv: true,
          low_vram: false,
          vocab_only: 1,
        },
      },
    ],
    last: { done: true },
  },
  {
    line: "5.1 a number with a fraction for a whole one is cut",
    ask: ["POST", "/api/generate", { ...said, options: { num_predict: 2.9, temperature: 0 } }],
    last: { eval_count: 2 },
  },
  {
    line: "5.1 stop as a text",
    ask: ["POST", "/api/generate", { ...said, options: { ...few, stop: "zzz" } }],
    last: { done: true },
  },
  {
    line: "5.1 temperature 0 is greedy: the same again",
    ask: ["POST", "/api/generate", { ...said, options: { num_predict: 12, temperature: 0, seed: 2 } }],
    first: ["POST", "/api/generate", said],
    holds: (seen) => textOf(seen).length > 0,
  },
  {
    line: "5.1 num_ctx larger than what is served is no error",
    ask: ["POST", "/api/chat", { ...chat, options: { ...few, num_ctx: 1_000_000 } }],
    last: { done: true },
  },
  {
    line: "5.1 a small num_ctx holds for this request",
    ask: ["POST", "/api/chat", { ...chat, options: { num_ctx: 32, temperature: 0 }, shift: false }],
    last: { done: true, done_reason: "length" },
    holds: ({ lines }) => lines.at(-1).eval_count + lines.at(-1).prompt_eval_count <= 33,
  },
  {
    line: "5.1 num_predict 0 and less end somewhere",
    ask: ["POST", "/api/chat", { ...chat, options: { num_predict: -2, num_ctx: 64 }, shift: false }],
    last: { done: true },
  },
  {
    line: "5.1 stop strings are no part of the answer, nor is their beginning",
    on: "scripted",
    script: [delta({ content: "Yes" }), ending("stop")],
    ask: ["POST", "/api/chat", { ...chat, options: { stop: ["!"] } }],
    last: { done: true, done_reason: "stop" },
  },
  {
    line: "5.2 stop",
    on: "scripted",
    script: [delta({ content: "Yes" }), ending("stop")],
    ask: ["POST", "/api/chat", chat],
    last: { done_reason: "stop" },
  },
  {
    line: "5.2 length",
    on: "scripted",
    script: [delta({ content: "Yes" }), ending("length")],
    ask: ["POST", "/api/chat", chat],
    last: { done_reason: "length" },
  },
  {
    line: "5.3 truncate drops the oldest messages",
    ask: [
      "POST",
      "/api/chat",
      {
        ...chat,
        messages: [
          ...Array.from({ length: 80 }, (_, i) => ({
            role: i % 2 ? "assistant" : "user",
            content: `message ${i} ${"word ".repeat(20)}`,
          })),
          ...hello,
        ],
      },
    ],
    last: { done: true },
    holds: ({ lines }) => lines.at(-1).prompt_eval_count <= 1024,
  },
  {
    line: "5.3 what still does not fit is cut",
    ask: ["POST", "/api/generate", { ...said, prompt: "word ".repeat(3000) }],
    last: { done: true },
    holds: ({ lines }) => lines.at(-1).prompt_eval_count <= 1024,
  },
  {
    line: "5.3 truncate false: 400",
    ask: ["POST", "/api/generate", { ...said, prompt: "word ".repeat(3000), truncate: false }],
    status: 400,
  },
  {
    line: "5.4 prompt_eval_count counts what was cached too",
    on: "scripted",
    script: [delta({ content: "Yes" }), ending("stop")],
    ask: ["POST", "/api/chat", chat],
    last: {
      prompt_eval_count: 9,
      eval_count: 4,
      eval_duration: 8_000_000,
      prompt_eval_duration: 5_000_000,
      prompt_eval_cached_count: 2,
    },
  },
  {
    // Whole characters only: the core has no entry for a token that is half of one.
    line: "5.5 logprobs: one entry a token",
    ask: [
      "POST",
      "/api/chat",
      {
        ...chat,
        logprobs: true,
        format: { type: "array", items: { type: "integer" }, minItems: 30 },
        options: { num_predict: 10, temperature: 0 },
      },
    ],
    holds: ({ lines }) => {
      const entries = lines.flatMap((line) => line.logprobs ?? []);
      return (
        entries.length === 10 &&
        entries.every(
          (one) =>
            typeof one.token === "string" &&
            one.logprob <= 0 &&
            !("top_logprobs" in one && one.top_logprobs.length > 0),
        )
      );
    },
  },
  {
    line: "5.5 top_logprobs: with the likeliest, by their bytes",
    ask: ["POST", "/api/generate", { ...said, logprobs: true, top_logprobs: 3, stream: false }],
    holds: ({ json }) =>
      json.logprobs.length === 3 &&
      json.logprobs.every(
        (one: Shape) =>
          one.top_logprobs.length === 3 &&
          one.top_logprobs[0].logprob >= one.top_logprobs[2].logprob &&
          Array.isArray(one.bytes),
      ),
  },
];

// ---- OpenAI and Anthropic -------------------------------------------------------------------------------------------

const openai: readonly Row[] = [
  {
    line: "6 chat completions",
    ask: ["POST", "/v1/chat/completions", v1],
    type: jsonType,
    json: {
      object: "chat.completion",
      model: "m",
      system_fingerprint: "fp_ollama",
      choices: [{ index: 0, message: { role: "assistant" }, finish_reason: "length" }],
      usage: { completion_tokens: 3 },
    },
    holds: ({ json, sentMs }) =>
      /^chatcmpl-/.test(json.id) &&
      Math.abs(json.created - sentMs / 1000) < 5 &&
      json.usage.total_tokens === json.usage.prompt_tokens + 3,
  },
  {
    line: "6 chat completions, streamed",
    ask: ["POST", "/v1/chat/completions", { ...v1, stream: true }],
    type: eventType,
    holds: ({ events }) => {
      const chunks = events.slice(0, -1);
      return (
        events.at(-1) === "[DONE]" &&
        new Set(chunks.map((one) => one.id)).size === 1 &&
        chunks.every((one) => one.object === "chat.completion.chunk") &&
        chunks[0].choices[0].delta.role === "assistant" &&
        chunks.at(-1).choices[0].finish_reason === "length" &&
        chunks.slice(0, -1).every((one) => one.choices[0].finish_reason === null)
      );
    },
  },
  {
    line: "6 include_usage",
    ask: ["POST", "/v1/chat/completions", { ...v1, stream: true, stream_options: { include_usage: true } }],
    holds: ({ events }) => events.at(-2).choices.length === 0 && events.at(-2).usage.completion_tokens === 3,
  },
  {
    line: "6 max_completion_tokens is honoured",
    ask: ["POST", "/v1/chat/completions", { model: "m", messages: hello, max_completion_tokens: 2 }],
    json: { usage: { completion_tokens: 2 } },
  },
  { line: "6 stream is off by default", ask: ["POST", "/v1/chat/completions", v1], type: jsonType },
  {
    line: "6 no messages",
    ask: ["POST", "/v1/chat/completions", { model: "m", messages: [] }],
    status: 400,
    json: v1Error("[] is too short - 'messages'"),
  },
  {
    line: "6 an unknown model",
    ask: ["POST", "/v1/chat/completions", { ...v1, model: "nope" }],
    status: 404,
    type: jsonType,
    json: v1Error("model 'nope' not found", "not_found_error"),
  },
  {
    line: "6 no body",
    ask: ["POST", "/v1/chat/completions", ""],
    status: 400,
    json: v1Error("missing request body"),
  },
  {
    line: "6 content as text parts",
    ask: [
      "POST",
      "/v1/chat/completions",
      { ...v1, messages: [{ role: "user", content: [{ type: "text", text: "Hi" }] }] },
    ],
  },
  {
    line: "6 a picture by URL",
    ask: [
      "POST",
      "/v1/chat/completions",
      {
        ...v1,
        messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "http://x/y.png" } }] }],
      },
    ],
    status: 400,
  },
  {
    line: "6 response_format json_object",
    ask: ["POST", "/v1/chat/completions", { ...v1, response_format: { type: "json_object" } }],
    holds: ({ json }) => json.choices[0].message.content.trim().startsWith("{"),
  },
  {
    line: "6 response_format json_schema",
    ask: [
      "POST",
      "/v1/chat/completions",
      {
        ...v1,
        max_tokens: 100,
        response_format: {
          type: "json_schema",
          json_schema: {
            name: "a",
            schema: {
              type: "object",
              properties: { a: { enum: ["x", "y"] } },
              required: ["a"],
              additionalProperties: false,
            },
          },
        },
      },
    ],
    holds: ({ json }) => ["x", "y"].includes(JSON.parse(json.choices[0].message.content).a),
  },
  {
    line: "6 reasoning_effort that is none",
    on: "able",
    ask: ["POST", "/v1/chat/completions", { ...v1, reasoning_effort: "some" }],
    status: 400,
  },
  {
    line: "6 reasoning_effort none",
    on: "able",
    ask: ["POST", "/v1/chat/completions", { ...v1, reasoning_effort: "none" }],
  },
  {
    line: "6 logprobs",
    ask: ["POST", "/v1/chat/completions", { ...v1, logprobs: true, top_logprobs: 2 }],
    holds: ({ json }) =>
      json.choices[0].logprobs.content.length === 3 &&
      json.choices[0].logprobs.content[0].top_logprobs.length === 2,
  },
  {
    line: "6 tool calls: arguments are a text, the finish is tool_calls",
    on: "scripted",
    script: called,
    ask: ["POST", "/v1/chat/completions", { ...v1, tools: [weather] }],
    holds: ({ json }) => {
      const [choice] = json.choices;
      const [first] = choice.message.tool_calls;
      return (
        choice.finish_reason === "tool_calls" &&
        first.type === "function" &&
        JSON.parse(first.function.arguments).city === "Paris"
      );
    },
  },
  {
    line: "6 tool calls, streamed whole",
    on: "scripted",
    script: called,
    ask: ["POST", "/v1/chat/completions", { ...v1, tools: [weather], stream: true }],
    holds: ({ events }) => {
      const calls = events.flatMap((one) => one.choices?.[0]?.delta.tool_calls ?? []);
      return (
        calls.length === 2 &&
        calls.every((one) => typeof JSON.parse(one.function.arguments).city === "string") &&
        events.at(-2).choices[0].finish_reason === "tool_calls"
      );
    },
  },
  {
    line: "6 thoughts are reasoning",
    on: "scripted",
    script: thought,
    ask: ["POST", "/v1/chat/completions", v1],
    json: { choices: [{ message: { content: "Yes!", reasoning: "Hm, yes." } }] },
  },
  {
    line: "6 an error in the stream is an event",
    on: "scripted",
    script: [delta({ content: "Yes" }), { fail: "a.gguf: input/output error" }],
    ask: ["POST", "/v1/chat/completions", { ...v1, stream: true }],
    holds: ({ events }) => events.some((one) => one.error?.message === "a.gguf: input/output error"),
  },
  {
    line: "6 completions",
    ask: ["POST", "/v1/completions", { model: "m", prompt: "Hello", max_tokens: 3 }],
    json: {
      object: "text_completion",
      choices: [{ index: 0, finish_reason: "length" }],
      usage: { completion_tokens: 3 },
    },
    holds: ({ json }) => /^cmpl-/.test(json.id) && typeof json.choices[0].text === "string",
  },
  {
    line: "6 completions, streamed",
    ask: ["POST", "/v1/completions", { model: "m", prompt: "Hello", max_tokens: 3, stream: true }],
    type: eventType,
    holds: ({ events }) =>
      events.at(-1) === "[DONE]" && events.slice(0, -1).every((one) => one.object === "text_completion"),
  },
  {
    line: "6 models",
    ask: ["GET", "/v1/models"],
    json: { object: "list", data: [{ id: "m:latest", object: "model", owned_by: "library" }] },
    holds: ({ json }) => Number.isSafeInteger(json.data[0].created),
  },
  { line: "6 a model, its id as asked", ask: ["GET", "/v1/models/M"], json: { id: "M", object: "model" } },
  {
    line: "6 a model that is not there",
    ask: ["GET", "/v1/models/nope"],
    status: 404,
    json: { error: { type: "not_found_error" } },
  },
  {
    line: "6 embeddings without an embedding model",
    ask: ["POST", "/v1/embeddings", { model: "m", input: "x" }],
    status: 501,
    json: { error: { type: "api_error" } },
  },
  {
    line: "6 responses",
    ask: ["POST", "/v1/responses", { model: "m", input: "Hello", max_output_tokens: 3 }],
    json: { object: "response", model: "m" },
    holds: ({ json }) => json.output.some((one: Shape) => one.type === "message"),
  },
  {
    line: "6 responses, streamed",
    ask: ["POST", "/v1/responses", { model: "m", input: "Hello", max_output_tokens: 3, stream: true }],
    type: eventType,
    holds: ({ events }) =>
      events[0].type === "response.created" &&
      /^response\.(completed|incomplete)$/.test(events.at(-1).type) &&
      events.every((one, i) => one.sequence_number === i),
  },
  {
    line: "7 messages",
    ask: ["POST", "/v1/messages", v1],
    json: {
      type: "message",
      role: "assistant",
      model: "m",
      stop_reason: "max_tokens",
      usage: { output_tokens: 3 },
    },
    holds: ({ json }) => /^msg_/.test(json.id) && json.content[0].type === "text",
  },
  {
    line: "7 messages, streamed",
    ask: ["POST", "/v1/messages", { ...v1, stream: true }],
    type: eventType,
    holds: ({ events }) => {
      const types = events.map((one) => one.type).filter((type) => type !== "ping");
      return (
        types[0] === "message_start" &&
        types.at(-1) === "message_stop" &&
        types.includes("content_block_delta") &&
        types.includes("message_delta")
      );
    },
  },
  {
    line: "7 messages without max_tokens",
    ask: ["POST", "/v1/messages", { model: "m", messages: hello }],
    status: 400,
    json: { type: "error", error: { type: "invalid_request_error" } },
  },
  {
    line: "7 messages: an unknown model",
    ask: ["POST", "/v1/messages", { ...v1, model: "nope" }],
    status: 404,
    json: { type: "error", error: { type: "not_found_error" } },
    holds: ({ json }) => typeof json.request_id === "string",
  },
  {
    line: "7 messages: thinking on a model that does not is dropped",
    ask: ["POST", "/v1/messages", { ...v1, thinking: { type: "enabled", budget_tokens: 1024 } }],
    json: { type: "message" },
  },
  {
    line: "7 count_tokens",
    ask: ["POST", "/v1/messages/count_tokens", v1],
    holds: ({ json }) => json.input_tokens > 0,
  },
];

export const answerRows: readonly Row[] = [...generate, ...chats, ...semantics, ...openai];

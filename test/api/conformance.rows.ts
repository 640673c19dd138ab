// The table of conformance: one row for each line of Ollama's API, of OpenAI's and Anthropic's as Ollama speaks them,
// that a request can show. Data only: a row says what is asked and what must come; conformance.test.ts asks it over a
// real socket.

/** A reply as a row looks at it. */
export interface Seen {
  readonly status: number;
  readonly headers: Headers;
  readonly text: string;
  /** The text as JSON; undefined where it is none. */
  readonly json: Shape;
  /** The lines of a stream of JSON, each parsed. */
  readonly lines: readonly Shape[];
  /** The data of a stream of events, each parsed; "[DONE]" as it is. */
  readonly events: readonly Shape[];
  /** When the request was sent and when the reply was complete, ms since 1970. */
  readonly sentMs: number;
  readonly doneMs: number;
}

/** A piece of JSON of which a row knows the shape. */
export type Shape = ReturnType<typeof JSON.parse>;

/**
 * plain: a model that generates and no more; able: its template thinks and calls tools, it fills holes; scripted: the
 * same with an engine that says what the row lets it say.
 */
export type Kind = "plain" | "able" | "scripted";

export interface Row {
  /** Section of the reference, and what it says. */
  readonly line: string;
  readonly on?: Kind;
  readonly ask: readonly [method: string, path: string, body?: object | string];
  readonly headers?: Readonly<Record<string, string>>;
  /** Sent before, its answer not looked at. */
  readonly first?: readonly [method: string, path: string, body?: object | string];
  /** What the scripted engine says to a chat. */
  readonly script?: readonly object[];
  readonly status?: number;
  readonly type?: string;
  /** The whole text. */
  readonly text?: string;
  /** Part of the object that is the reply. */
  readonly json?: object;
  /** Part of the last line of a stream. */
  readonly last?: object;
  /** Anything else; gives false or a sentence where it is wrong. */
  readonly holds?: (seen: Seen) => boolean | string;
}

const jsonType = "application/json; charset=utf-8";
const plainType = "text/plain; charset=utf-8";
const streamType = "application/x-ndjson";
const eventType = "text/event-stream";

const few = { num_predict: 3, temperature: 0 };
const hello = [{ role: "user", content: "Hello" }];
const chat = { model: "m", messages: hello, options: few };
const said = { model: "m", prompt: "Hello", options: few };
const v1 = { model: "m", messages: hello, max_tokens: 3, temperature: 0 };
const utc = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$/;
const rfc3339 = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$/;
const metrics = [
  "total_duration",
  "load_duration",
  "prompt_eval_count",
  "prompt_eval_duration",
  "eval_count",
  "eval_duration",
];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather somewhere",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const error = (message: string) => ({ error: message });
const v1Error = (message: string, type = "invalid_request_error") => ({
  error: { message, type, param: null, code: null },
});

function delta(change: object, finish: string | null = null): object {
  return { object: "chat.completion.chunk", choices: [{ index: 0, delta: change, finish_reason: finish }] };
}

const timings = { cache_n: 2, prompt_n: 7, prompt_ms: 5, predicted_n: 4, predicted_ms: 8 };
function ending(finish: string): object {
  return { ...delta({}, finish), timings };
}

function callDelta(index: number, name: string, args: string): object {
  return delta({
    tool_calls: [{ index, id: `id${index}`, type: "function", function: { name, arguments: args } }],
  });
}

const called: readonly object[] = [
  delta({ role: "assistant", content: null }),
  delta({ content: "Let me see." }),
  callDelta(0, "get_weather", ""),
  delta({ tool_calls: [{ index: 0, function: { arguments: '{"city":' } }] }),
  delta({ tool_calls: [{ index: 0, function: { arguments: '"Paris"}' } }] }),
  callDelta(1, "get_weather", '{"city":"Rome"}'),
  ending("tool_calls"),
];
const thought: readonly object[] = [
  delta({ role: "assistant", content: null }),
  delta({ reasoning_content: "Hm, " }),
  delta({ reasoning_content: "yes." }),
  delta({ content: "Yes" }),
  delta({ content: "!" }),
  ending("stop"),
];

function textOf({ lines }: Seen): string {
  return lines.map((line) => line.message?.content ?? line.response ?? "").join("");
}

// ---- transport ------------------------------------------------------------------------------------------------------

const transport: readonly Row[] = [
  {
    line: "1.1 the body is JSON whatever the content type: a form",
    ask: ["POST", "/api/show", { model: "m" }],
    headers: { "content-type": "application/x-www-form-urlencoded" },
    type: jsonType,
  },
  {
    line: "1.1 the body is JSON whatever the content type: text",
    ask: ["POST", "/api/show", { model: "m" }],
    headers: { "content-type": "text/plain" },
  },
  {
    line: "1.1 the body is JSON whatever the content type: multipart",
    ask: ["POST", "/api/show", { model: "m" }],
    headers: { "content-type": "multipart/form-data" },
  },
  { line: "1.1 keys in any letter case", ask: ["POST", "/api/show", { MODEL: "m" }], json: { details: {} } },
  { line: "1.1 unknown keys are ignored", ask: ["POST", "/api/show", { model: "m", colour: "red" }] },
  {
    line: "1.1 null is absent",
    ask: [
      "POST",
      "/api/chat",
      {
        ...chat,
        stream: false,
        format: null,
        tools: null,
        think: null,
        keep_alive: null,
        options: { ...few, top_k: null },
      },
    ],
    json: { done: true },
  },
  {
    line: "1.1 what follows the first value is ignored",
    ask: ["POST", "/api/show", '{"model":"m"} and more'],
  },
  {
    line: "1.1 streams: one object a line, no blank lines, no data:, no [DONE]",
    ask: ["POST", "/api/chat", chat],
    type: streamType,
    holds: ({ text }) => /^(\{.*\}\n)+$/.test(text) && !text.includes("[DONE]"),
  },
  {
    line: "1.1 no compression",
    ask: ["GET", "/api/tags"],
    headers: { "accept-encoding": "gzip, deflate, br, zstd" },
    holds: ({ headers }) => headers.get("content-encoding") === null,
  },
  {
    line: "1.1 an error before the first line is a status and an object",
    ask: ["POST", "/api/chat", { ...chat, options: { temperature: "hot" } }],
    status: 400,
    type: jsonType,
    json: error('option "temperature" must be of type float32'),
  },
  {
    line: "1.1 an error after the first line is one line more, and no done",
    on: "scripted",
    script: [delta({ content: "Yes" }), { fail: "a.gguf: input/output error" }],
    ask: ["POST", "/api/chat", chat],
    type: streamType,
    holds: ({ lines }) =>
      lines.at(-1)?.error === "a.gguf: input/output error" &&
      Object.keys(lines.at(-1)).length === 1 &&
      lines.every((line) => line.done !== true),
  },
];

// ---- errors ---------------------------------------------------------------------------------------------------------

const errors: readonly Row[] = [
  ...["/api/chat", "/api/generate", "/api/show", "/api/embed", "/api/embeddings", "/api/pull"].map(
    (path): Row => ({
      line: `1.2 an empty body: ${path}`,
      ask: ["POST", path, ""],
      status: 400,
      type: jsonType,
      json: error("missing request body"),
    }),
  ),
  {
    line: "1.2 a body that is not JSON",
    ask: ["POST", "/api/chat", "{model:"],
    status: 400,
    holds: ({ json }) => typeof json.error === "string" && json.error !== "",
  },
  {
    line: "1.2 a body that ends too soon",
    ask: ["POST", "/api/chat", '{"model":"m"'],
    status: 400,
    json: error("unexpected EOF"),
  },
  { line: "1.2 a body that is no object", ask: ["POST", "/api/chat", "[1]"], status: 400 },
  { line: "1.2 a body that is a text", ask: ["POST", "/api/chat", '"hi"'], status: 400 },
  {
    line: "1.2 a field of the wrong type: model",
    ask: ["POST", "/api/chat", { model: 5 }],
    status: 400,
    holds: ({ json }) => json.error.startsWith("json: cannot unmarshal number into Go struct field"),
  },
  {
    line: "1.2 a field of the wrong type: stream",
    ask: ["POST", "/api/chat", { ...chat, stream: "yes" }],
    status: 400,
    holds: ({ json }) => json.error.startsWith("json: cannot unmarshal string into Go struct field"),
  },
  {
    line: "1.2 a field of the wrong type: messages",
    ask: ["POST", "/api/chat", { model: "m", messages: "x" }],
    status: 400,
  },
  {
    line: "1.2 a field of the wrong type: prompt",
    ask: ["POST", "/api/generate", { model: "m", prompt: 1 }],
    status: 400,
  },
  {
    line: "1.2 an unknown path",
    ask: ["GET", "/nope"],
    status: 404,
    type: plainType,
    text: "404 page not found",
  },
  {
    line: "1.2 an unknown path under /api",
    ask: ["POST", "/api/nope", {}],
    status: 404,
    text: "404 page not found",
  },
  {
    line: "1.2 an unknown path under /v1",
    ask: ["POST", "/v1/nope", {}],
    status: 404,
    text: "404 page not found",
  },
  {
    line: "1.2 a wrong method",
    ask: ["GET", "/api/chat"],
    status: 405,
    type: plainType,
    text: "405 method not allowed",
    holds: ({ headers }) => headers.get("allow") === "POST",
  },
  {
    line: "1.2 a wrong method: PUT",
    ask: ["PUT", "/api/tags", {}],
    status: 405,
    text: "405 method not allowed",
  },
  { line: "1.2 a wrong method: DELETE", ask: ["DELETE", "/api/generate", {}], status: 405 },
  { line: "1.2 a wrong method under /v1", ask: ["GET", "/v1/chat/completions"], status: 405 },
  { line: "1.2 a trailing slash: GET", ask: ["GET", "/api/tags/"], json: { models: [{}] } },
  { line: "1.2 a trailing slash: POST", ask: ["POST", "/api/show/", { model: "m" }], json: { details: {} } },
  ...(["chat", "generate"] as const).map(
    (endpoint): Row => ({
      line: `1.2 an unknown model: ${endpoint}, the name as sent`,
      ask: ["POST", `/api/${endpoint}`, { model: "Nope" }],
      status: 404,
      type: jsonType,
      json: error("model 'Nope' not found"),
    }),
  ),
  {
    line: "1.2 an unknown model: show, its short full name",
    ask: ["POST", "/api/show", { model: "nope" }],
    status: 404,
    json: error("model 'nope:latest' not found"),
  },
  {
    line: "1.2 an unknown model: embed",
    ask: ["POST", "/api/embed", { model: "nope", input: "x" }],
    status: 404,
    json: error('model "nope" not found, try pulling it first'),
  },
  {
    line: "1.2 an unknown model: embeddings",
    ask: ["POST", "/api/embeddings", { model: "nope", prompt: "x" }],
    status: 404,
    json: error('model "nope" not found, try pulling it first'),
  },
  ...(["chat", "show", "embeddings"] as const).flatMap((endpoint): Row[] =>
    [{}, { model: "" }].map((body) => ({
      line: `1.2 no model: ${endpoint} ${JSON.stringify(body)}`,
      ask: ["POST", `/api/${endpoint}`, body],
      status: 400,
      json: error("model is required"),
    })),
  ),
  ...(["generate", "embed"] as const).flatMap((endpoint): Row[] =>
    [{}, { model: "" }].map((body) => ({
      line: `1.2 no model: ${endpoint} ${JSON.stringify(body)}`,
      ask: ["POST", `/api/${endpoint}`, body],
      status: 404,
      json: error("model '' not found"),
    })),
  ),
  ...["/bad", "a b", "..", "m:", "a:b:c", "é"].map(
    (model): Row => ({
      line: `1.2 a name that is none: ${model}`,
      ask: ["POST", "/api/chat", { model }],
      status: 400,
      json: error("invalid model name"),
    }),
  ),
  ...[-1, 21].map(
    (count): Row => ({
      line: `1.2 top_logprobs ${count}`,
      ask: ["POST", "/api/chat", { ...chat, logprobs: true, top_logprobs: count }],
      status: 400,
      json: error("top_logprobs must be between 0 and 20"),
    }),
  ),
  {
    line: "1.2 a think that is none",
    on: "able",
    ask: ["POST", "/api/chat", { ...chat, think: "x" }],
    status: 400,
    json: error('invalid think value: "x" (must be "high", "medium", "low", "max", true, or false)'),
  },
  {
    line: "1.2 think on a model that does not",
    ask: ["POST", "/api/chat", { ...chat, think: true }],
    status: 400,
    json: error('"m" does not support thinking'),
  },
  {
    line: "1.2 think as a level on a model that does not",
    ask: ["POST", "/api/generate", { ...said, think: "high" }],
    status: 400,
    json: error('"m" does not support thinking'),
  },
  {
    line: "1.2 tools on a model that calls none",
    ask: ["POST", "/api/chat", { ...chat, tools: [weather] }],
    status: 400,
    json: error("registry.ollama.ai/library/m:latest does not support tools"),
  },
  {
    line: "1.2 a suffix on a model that fills no holes",
    ask: ["POST", "/api/generate", { ...said, suffix: "x" }],
    status: 400,
    json: error("registry.ollama.ai/library/m:latest does not support insert"),
  },
  ...["template", "system"].map(
    (field): Row => ({
      line: `1.2 raw with ${field}`,
      ask: ["POST", "/api/generate", { ...said, raw: true, [field]: "x" }],
      status: 400,
      json: error("raw mode does not support template, system, or context"),
    }),
  ),
  {
    line: "1.2 raw with context",
    ask: ["POST", "/api/generate", { ...said, raw: true, context: [1] }],
    status: 400,
    json: error("raw mode does not support template, system, or context"),
  },
  {
    line: "1.2 a format that is none",
    ask: ["POST", "/api/chat", { ...chat, format: "yaml" }],
    status: 400,
    json: error('invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object'),
  },
  { line: "1.2 a format that is a number", ask: ["POST", "/api/chat", { ...chat, format: 5 }], status: 400 },
  ...(
    [
      ["temperature", "hot", "float32"],
      ["top_k", "many", "integer"],
      ["num_predict", true, "integer"],
      ["seed", [1], "integer"],
      ["use_mmap", 1, "boolean"],
      ["stop", 5, "array"],
      ["num_ctx", "4096", "integer"],
    ] as const
  ).map(
    ([name, value, type]): Row => ({
      line: `1.2 an option of the wrong type: ${name}`,
      ask: ["POST", "/api/generate", { ...said, options: { [name]: value } }],
      status: 400,
      json: error(`option "${name}" must be of type ${type}`),
    }),
  ),
  {
    line: "1.2 a prompt that is too long and may not be cut, in llama.cpp's words",
    ask: [
      "POST",
      "/api/chat",
      { ...chat, messages: [{ role: "user", content: "word ".repeat(3000) }], truncate: false, shift: false },
    ],
    status: 400,
    holds: ({ json }) =>
      /^request \(\d+ tokens\) exceeds the available context size \(1024 tokens\), try increasing it$/.test(
        json.error,
      ),
  },
  {
    line: "1.2 images to a model that sees none",
    ask: ["POST", "/api/chat", { model: "m", messages: [{ role: "user", content: "x", images: ["aGk="] }] }],
    status: 400,
    json: error('"m" does not support images'),
  },
  {
    line: "1.2 a Host that is not ours",
    ask: ["GET", "/"],
    headers: { host: "evil.example" },
    status: 403,
    text: "",
  },
  {
    line: "1.2 an Origin that is not ours",
    ask: ["GET", "/"],
    headers: { origin: "https://evil.example" },
    status: 403,
    text: "",
  },
];

// ---- times and names ------------------------------------------------------------------------------------------------

const timesAndNames: readonly Row[] = [
  {
    line: "1.3 created_at is RFC 3339 in UTC, stamped for each line",
    ask: ["POST", "/api/chat", chat],
    holds: ({ lines, sentMs, doneMs }) =>
      lines.every((line) => utc.test(line.created_at)) &&
      lines.every(
        (line) => Date.parse(line.created_at) >= sentMs - 5 && Date.parse(line.created_at) <= doneMs + 5,
      ),
  },
  {
    line: "1.3 durations are whole nanoseconds",
    ask: ["POST", "/api/chat", chat],
    holds: ({ lines, sentMs, doneMs }) => {
      const last = lines.at(-1);
      const whole = metrics.every((name) => Number.isSafeInteger(last[name]));
      const wallNs = (doneMs - sentMs + 50) * 1e6;
      return (
        whole &&
        last.total_duration > 1e5 &&
        last.total_duration < wallNs &&
        last.load_duration <= last.total_duration
      );
    },
  },
  {
    line: "1.3 modified_at is RFC 3339",
    ask: ["GET", "/api/tags"],
    holds: ({ json }) => rfc3339.test(json.models[0].modified_at),
  },
  ...[300, 0.5, "300ms", "1.5h", "2h45m", "5m", "0", "-1s", -1, "30"].map(
    (keep): Row => ({
      line: `1.4 keep_alive ${JSON.stringify(keep)}`,
      ask: ["POST", "/api/generate", { model: "m", keep_alive: keep }],
      json: { done: true, done_reason: keep === "0" ? "unload" : "load" },
    }),
  ),
  ...[true, [1], { s: 1 }, "soon", "5 minutes"].map(
    (keep): Row => ({
      line: `1.4 keep_alive ${JSON.stringify(keep)} is none`,
      ask: ["POST", "/api/generate", { model: "m", keep_alive: keep }],
      status: 400,
    }),
  ),
  ...[
    "m",
    "M",
    "m:latest",
    "m:LATEST",
    "library/m",
    "registry.ollama.ai/library/m:latest",
    " m ",
    "m:local",
  ].map(
    (model): Row => ({
      line: `1.5 the model as ${JSON.stringify(model)}, echoed as sent`,
      ask: ["POST", "/api/chat", { ...chat, model, stream: false }],
      json: { model },
    }),
  ),
  ...["m:other", "mm", "other/m", "host.example/library/m", "m:cloud"].map(
    (model): Row => ({
      line: `1.5 ${model} is another model`,
      ask: ["POST", "/api/chat", { ...chat, model }],
      status: 404,
    }),
  ),
];

// ---- metadata -------------------------------------------------------------------------------------------------------

const metadata: readonly Row[] = [
  { line: "2 GET /", ask: ["GET", "/"], type: plainType, text: "Ollama is running" },
  {
    line: "2 HEAD /",
    ask: ["HEAD", "/"],
    text: "",
    holds: ({ headers }) => headers.get("content-length") === "17",
  },
  {
    line: "2 GET /api/version is three numbers, at least 0.6.4",
    ask: ["GET", "/api/version"],
    type: jsonType,
    holds: ({ json }) => /^\d+\.\d+\.\d+$/.test(json.version) && Bun.semver.order(json.version, "0.6.4") >= 0,
  },
  { line: "2 HEAD /api/version", ask: ["HEAD", "/api/version"], text: "" },
  { line: "2 HEAD /api/tags", ask: ["HEAD", "/api/tags"], text: "" },
  {
    line: "2 GET /api/tags: an entry",
    ask: ["GET", "/api/tags"],
    type: jsonType,
    json: {
      models: [
        {
          name: "m:latest",
          model: "m:latest",
          details: {
            parent_model: "",
            format: "gguf",
            family: "llama",
            families: ["llama"],
            context_length: 1024,
          },
        },
      ],
    },
    holds: ({ json }) => {
      const [one] = json.models;
      return (
        /^[0-9a-f]{64}$/.test(one.digest) &&
        Number.isSafeInteger(one.size) &&
        one.size > 1e5 &&
        /^\d+(\.\d+)?[KMBT]$/.test(one.details.parameter_size) &&
        typeof one.details.quantization_level === "string" &&
        one.details.embedding_length > 0 &&
        one.capabilities.includes("completion")
      );
    },
  },
  {
    line: "2 POST /api/show",
    ask: ["POST", "/api/show", { model: "m" }],
    json: {
      details: { format: "gguf", family: "llama" },
      model_info: { "general.architecture": "llama", "llama.context_length": 1024 },
      capabilities: ["completion"],
    },
    holds: ({ json }) =>
      rfc3339.test(json.modified_at) &&
      json.modelfile.includes("FROM ") &&
      typeof json.template === "string" &&
      !("general.name" in json.model_info) &&
      !("tokenizer.chat_template" in json.model_info) &&
      json.model_info["general.parameter_count"] > 0 &&
      json.model_info["llama.block_count"] > 0 &&
      json.details.context_length === undefined,
  },
  { line: "2 show: by the older field", ask: ["POST", "/api/show", { name: "m" }], json: { details: {} } },
  {
    line: "2 show: num_ctx is what is served, in 30 columns",
    ask: ["POST", "/api/show", { model: "m" }],
    holds: ({ json }) => /^num_ctx {24}1024$/m.test(json.parameters),
  },
  {
    line: "2 show: long arrays are emptied",
    ask: ["POST", "/api/show", { model: "m" }],
    holds: ({ json }) => {
      const tokens = json.model_info["tokenizer.ggml.tokens"];
      return tokens === null || tokens.length === 0;
    },
  },
  {
    line: "2 show: and given when verbose",
    ask: ["POST", "/api/show", { model: "m", verbose: true }],
    holds: ({ json }) =>
      json.model_info["tokenizer.ggml.tokens"].length > 100 &&
      json.tensors.length > 5 &&
      json.tensors[0].shape.length > 0,
  },
  {
    line: "2 show: what the template can is said",
    on: "able",
    ask: ["POST", "/api/show", { model: "m" }],
    holds: ({ json }) =>
      ["completion", "tools", "thinking", "insert"].every((one) => json.capabilities.includes(one)),
  },
  {
    line: "2 show: Copilot gets the name it asked for",
    ask: ["POST", "/api/show", { model: "M:latest" }],
    headers: { "user-agent": "GitHubCopilotChat/0.30" },
    holds: ({ json }) => json.model_info["general.basename"] === "M:latest",
  },
  {
    line: "2 GET /api/ps: nothing loaded is an empty list",
    first: ["POST", "/api/generate", { model: "m", keep_alive: 0 }],
    ask: ["GET", "/api/ps"],
    json: { models: [] },
    holds: ({ json }) => json.models.length === 0,
  },
  {
    line: "2 GET /api/ps: an entry",
    first: ["POST", "/api/generate", { model: "m", keep_alive: "1h" }],
    ask: ["GET", "/api/ps"],
    json: {
      models: [
        {
          name: "m:latest",
          model: "m:latest",
          size_vram: 0,
          context_length: 1024,
          details: { format: "gguf" },
        },
      ],
    },
    holds: ({ json }) => {
      const [one] = json.models;
      const left = Date.parse(one.expires_at) - Date.now();
      return (
        one.size > 1e6 &&
        /^[0-9a-f]{64}$/.test(one.digest) &&
        rfc3339.test(one.expires_at) &&
        left > 3.5e6 &&
        left < 3.61e6
      );
    },
  },
  {
    line: "2 GET /api/ps: for ever is far away",
    first: ["POST", "/api/generate", { model: "m", keep_alive: -1 }],
    ask: ["GET", "/api/ps"],
    holds: ({ json }) =>
      rfc3339.test(json.models[0].expires_at) && new Date(json.models[0].expires_at).getUTCFullYear() > 2200,
  },
];

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

// ---- the rest -------------------------------------------------------------------------------------------------------

const rest: readonly Row[] = [
  {
    line: "8 an Origin that is ours",
    ask: ["GET", "/api/tags"],
    headers: { origin: "http://localhost:3000" },
    holds: ({ headers }) =>
      headers.get("access-control-allow-origin") === "http://localhost:3000" &&
      headers.get("vary") === "Origin",
  },
  {
    line: "8 no Origin, no header",
    ask: ["GET", "/api/tags"],
    holds: ({ headers }) => headers.get("access-control-allow-origin") === null,
  },
  {
    line: "8 a browser that asks before",
    ask: ["OPTIONS", "/api/chat"],
    headers: { origin: "http://localhost:3000", "access-control-request-method": "POST" },
    status: 204,
    text: "",
    holds: ({ headers }) =>
      headers.get("access-control-allow-origin") === "http://localhost:3000" &&
      (headers.get("access-control-allow-methods") ?? "").includes("POST") &&
      (headers.get("access-control-allow-headers") ?? "").toLowerCase().includes("authorization") &&
      headers.get("access-control-max-age") === "43200",
  },
  {
    line: "8 also on paths that do not exist",
    ask: ["OPTIONS", "/nope"],
    headers: { origin: "http://localhost" },
    status: 204,
  },
  {
    line: "8 but not from elsewhere",
    ask: ["OPTIONS", "/api/chat"],
    headers: { origin: "https://evil.example" },
    status: 403,
    text: "",
  },
  {
    line: "8 headers on errors too",
    ask: ["POST", "/api/chat", "{"],
    headers: { origin: "app://x" },
    status: 400,
    holds: ({ headers }) => headers.get("access-control-allow-origin") === "app://x",
  },
  {
    line: "8 headers on streams too",
    ask: ["POST", "/api/chat", chat],
    headers: { origin: "app://x" },
    holds: ({ headers }) => headers.get("access-control-allow-origin") === "app://x",
  },
  {
    line: "8 headers on 404 too",
    ask: ["GET", "/nope"],
    headers: { origin: "app://x" },
    status: 404,
    holds: ({ headers }) => headers.get("access-control-allow-origin") === "app://x",
  },
  { line: "8 a Host of this machine", ask: ["GET", "/"], headers: { host: "tool.localhost:8080" } },
  {
    line: "8 Authorization is accepted and ignored",
    ask: ["GET", "/api/tags"],
    headers: { authorization: "Bearer sk-anything" },
  },
  {
    line: "9 embed without an embedding model",
    ask: ["POST", "/api/embed", { model: "m", input: "x" }],
    status: 501,
    json: error('model "m" does not support embeddings'),
  },
  {
    line: "9 embeddings without an embedding model",
    ask: ["POST", "/api/embeddings", { model: "m", prompt: "x" }],
    status: 501,
  },
  {
    line: "9 pull of what is here",
    ask: ["POST", "/api/pull", { model: "m" }],
    type: streamType,
    holds: ({ lines }) =>
      lines[0].status === "pulling manifest" && lines.at(-1).status === "success" && lines.length === 2,
  },
  {
    line: "9 pull, stream false",
    ask: ["POST", "/api/pull", { name: "m:latest", stream: false }],
    type: jsonType,
    json: { status: "success" },
  },
  {
    line: "9 pull of anything else",
    ask: ["POST", "/api/pull", { model: "llama3" }],
    status: 400,
    json: error("this server serves one local model; pulling models is not supported"),
  },
  ...(
    [
      ["POST", "/api/push", "push"],
      ["POST", "/api/create", "create"],
      ["POST", "/api/copy", "copy"],
      ["DELETE", "/api/delete", "delete"],
    ] as const
  ).map(
    ([method, path, operation]): Row => ({
      line: `9 ${operation}`,
      ask: [method, path, { model: "m" }],
      status: 501,
      type: jsonType,
      json: error(`${operation} is not supported: this server serves a single local model`),
    }),
  ),
  { line: "9 a blob is sent", ask: ["POST", `/api/blobs/sha256:${"0".repeat(64)}`, "x"], status: 501 },
  {
    line: "9 a blob is asked for",
    ask: ["HEAD", `/api/blobs/sha256:${"0".repeat(64)}`],
    status: 501,
    text: "",
  },
  {
    line: "0 GET /api/status",
    ask: ["GET", "/api/status"],
    json: { cloud: { disabled: true, source: "none" } },
  },
  { line: "0 POST /api/me", ask: ["POST", "/api/me", {}], status: 404, type: jsonType },
  { line: "0 POST /api/signout", ask: ["POST", "/api/signout", {}], status: 404 },
  { line: "0 DELETE /api/user/keys/x", ask: ["DELETE", "/api/user/keys/x"], status: 404 },
  {
    line: "0 POST /api/experimental/web_search",
    ask: ["POST", "/api/experimental/web_search", { query: "x" }],
    status: 404,
    type: jsonType,
  },
  {
    line: "0 POST /v1/audio/transcriptions",
    ask: ["POST", "/v1/audio/transcriptions", "x"],
    status: 404,
    json: { error: { type: "not_found_error" } },
  },
  {
    line: "10 an empty line at once",
    ask: ["POST", "/api/chat", chat],
    holds: ({ lines }) => lines[0].message.content === "" && lines[0].done === false,
  },
  {
    line: "10 an empty line at once: generate",
    ask: ["POST", "/api/generate", said],
    holds: ({ lines }) => lines[0].response === "" && lines[0].done === false,
  },
  {
    line: "clients 3.16 nothing is buffered on the way",
    ask: ["POST", "/api/chat", chat],
    holds: ({ headers }) => headers.get("x-accel-buffering") === "no",
  },
  {
    line: "clients 3.22 characters are never cut in two",
    on: "scripted",
    script: [delta({ content: "a🙂" }), delta({ content: "é漢" }), ending("stop")],
    ask: ["POST", "/api/chat", chat],
    holds: (seen) => textOf(seen) === "a🙂é漢",
  },
  { line: "GET /health", ask: ["GET", "/health"], json: { status: "ok" } },
  {
    line: "GET /metrics is what Prometheus reads",
    first: ["POST", "/api/chat", chat],
    ask: ["GET", "/metrics"],
    type: "text/plain; version=0.0.4; charset=utf-8",
    holds: ({ text }) =>
      text
        .split("\n")
        .every(
          (one) =>
            one === "" || one.startsWith("# ") || /^hypura_\w+(\{(\w+="[^"]*",?)+\})? -?[\d.e+]+$/.test(one),
        ) && /hypura_tokens_total\{kind="generated"\} [1-9]/.test(text),
  },
];

export const rows: readonly Row[] = [
  ...transport,
  ...errors,
  ...timesAndNames,
  ...metadata,
  ...generate,
  ...chats,
  ...semantics,
  ...openai,
  ...rest,
];

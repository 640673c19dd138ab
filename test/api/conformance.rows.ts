// The table of conformance: one row for each line of Ollama's API, of OpenAI's and Anthropic's as Ollama speaks them,
// that a request can show. Data only: a row says what is asked and what must come; conformance.test.ts asks it over a
// real socket. Rows about answers are in conformance.answers.ts.

import { answerRows } from "./conformance.answers";
import {
  chat,
  delta,
  ending,
  error,
  few,
  jsonType,
  metrics,
  plainType,
  type Row,
  rfc3339,
  said,
  streamType,
  textOf,
  utc,
  weather,
} from "./conformance.row";

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
    line: "9 embed: model, vectors of length 1, durations and the count of the prompt",
    on: "embedder",
    ask: ["POST", "/api/embed", { model: "m", input: ["The sky is blue.", "Hello"] }],
    type: jsonType,
    json: { model: "m" },
    holds: ({ json }) =>
      json.embeddings.length === 2 &&
      json.embeddings.every((one: readonly number[]) => Math.abs(Math.hypot(...one) - 1) < 1e-3) &&
      json.prompt_eval_count > 0 &&
      json.total_duration > 0,
  },
  {
    line: "9 embed: no input gives no vectors",
    on: "embedder",
    ask: ["POST", "/api/embed", { model: "m" }],
    json: { model: "m", embeddings: [] },
  },
  {
    line: "9 embeddings: one vector",
    on: "embedder",
    ask: ["POST", "/api/embeddings", { model: "m", prompt: "Hello" }],
    holds: ({ json }) => json.embedding.length > 0,
  },
  {
    line: "9 embeddings: no prompt, no vector",
    on: "embedder",
    ask: ["POST", "/api/embeddings", { model: "m", prompt: "" }],
    json: { embedding: [] },
  },
  {
    line: "6 /v1/embeddings: a list, in numbers or in base64",
    on: "embedder",
    ask: ["POST", "/v1/embeddings", { model: "m", input: "Hello", encoding_format: "base64" }],
    json: { object: "list", model: "m" },
    holds: ({ json }) => typeof json.data[0].embedding === "string",
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
  ...answerRows,
  ...rest,
];

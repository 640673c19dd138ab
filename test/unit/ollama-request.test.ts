// Ollama's requests as a table: one row for each line of the wire's description that is about fields, defaults and
// refusals. Nothing here needs an engine.

import { describe, expect, test } from "bun:test";
import { noSettings, type ServedModel } from "../../src/ollama-model";
import { samplingOf } from "../../src/ollama-options";
import type { Endpoint, GenerateWork } from "../../src/ollama-request";
import {
  modelAsked,
  modelMissing,
  parseChat,
  parseEmbed,
  parseEmbeddings,
  parseGenerate,
  parsePull,
  parseShow,
  pullReply,
} from "../../src/ollama-request";
import { durationSeconds, type Fields, readBody } from "../../src/wire-body";
import { count, served, thinker } from "./served";

const plain = served();
const thinking = thinker();
const embedder = { ...plain, capabilities: ["embedding"] } as const;
const seeing = { ...plain, capabilities: ["completion", "vision"] } as const;
const filling = served([
  count("tokenizer.ggml.fim_pre_token_id", 10),
  count("tokenizer.ggml.fim_suf_token_id", 11),
  count("tokenizer.ggml.fim_mid_token_id", 12),
]);
const hi = [{ role: "user", content: "hi" }];

function refusal(run: () => unknown): { status?: number; message?: string } {
  try {
    run();
  } catch (error) {
    return error as { status: number; message: string };
  }
  return {};
}

function chat(body: Fields, model: ServedModel = plain): GenerateWork {
  const work = parseChat({ model: "m", messages: hi, ...body }, model);
  if (!("source" in work)) throw new Error("an empty prompt");
  return work;
}

function generate(body: Fields, model: ServedModel = plain): GenerateWork {
  const work = parseGenerate({ model: "m", prompt: "hi", ...body }, model);
  if (!("source" in work)) throw new Error("an empty prompt");
  return work;
}

describe("bodies", () => {
  test.each([
    ["", 400, "missing request body"],
    [" \n", 400, "missing request body"],
    ["{", 400, "unexpected EOF"],
    ['{"a": "b', 400, "unexpected EOF"],
    ["[1]", 400, "json: cannot unmarshal array into Go value of type object"],
    ['"x"', 400, "json: cannot unmarshal string into Go value of type object"],
    ["12", 400, "json: cannot unmarshal number into Go value of type object"],
    ["[".repeat(200), 400, "the JSON is nested deeper than 128 levels"],
  ])("%j is refused", (text, status, message) => {
    expect(refusal(() => readBody(text))).toMatchObject({ status, message });
  });

  test.each(["{bad}", "{'a':1}", "nope", "{,}"])("%j is refused as no JSON", (text) => {
    const error = refusal(() => readBody(text));
    expect(error.status).toBe(400);
    expect(error.message).not.toContain("\n");
  });

  test.each([
    ['{"a":1} and more', { a: 1 }],
    ['{"a":1}{"a":2}', { a: 1 }],
    [' {"a":"}\\"{"} x', { a: '}"{' }],
    ['{"a":"\\\\"}x', { a: "\\" }],
    ["null", {}],
    ['{"a":"\\ud800b"}', { a: "\ufffdb" }],
  ])("%j is read up to the end of its first value", (text, value) => {
    expect(readBody(text)).toEqual(value);
  });

  test("keys in any letters count, exact ones first; null is absent", () => {
    const work = chat({ STREAM: false, Think: null, oPtIoNs: { seed: 5 }, FORMAT: null });
    expect(work).toMatchObject({ stream: false, think: null, format: null, options: { seed: 5 } });
    expect(chat({ stream: true, Stream: false }).stream).toBe(true);
  });

  test("a field of the wrong type says which", () => {
    expect(refusal(() => chat({ stream: "yes" })).message).toBe(
      "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool",
    );
    expect(refusal(() => generate({ prompt: 5 })).message).toBe(
      "json: cannot unmarshal number into Go struct field GenerateRequest.prompt of type string",
    );
  });
});

describe("names", () => {
  test.each<[Endpoint, Fields, number, string]>([
    ["chat", {}, 400, "model is required"],
    ["chat", { model: "" }, 400, "model is required"],
    ["show", { name: " " }, 400, "model is required"],
    ["embeddings", {}, 400, "model is required"],
    ["generate", {}, 404, "model '' not found"],
    ["embed", { model: null }, 404, "model '' not found"],
    ["chat", { model: "a b" }, 400, "invalid model name"],
    ["generate", { model: "../x" }, 400, "invalid model name"],
    ["show", { model: "x:y:z" }, 400, "invalid model name"],
  ])("%s of %j is refused", (endpoint, body, status, message) => {
    expect(refusal(() => modelAsked(endpoint, body))).toMatchObject({ status, message });
  });

  test.each<[Endpoint, string, number, string]>([
    ["chat", "Nope", 404, "model 'Nope' not found"],
    ["generate", "nope:x", 404, "model 'nope:x' not found"],
    ["show", "library/nope", 404, "model 'nope:latest' not found"],
    ["embed", "nope", 404, 'model "nope" not found, try pulling it first'],
    ["embeddings", "nope", 404, 'model "nope" not found, try pulling it first'],
    ["pull", "nope", 400, "this server serves one local model; pulling models is not supported"],
  ])("%s of a model that is not served: %s", (endpoint, asked, status, message) => {
    expect(modelMissing(endpoint, asked)).toMatchObject({ status, message });
  });

  test("show and pull take the older field, and the newer before it", () => {
    expect(modelAsked("show", { name: "old" })).toBe("old");
    expect(modelAsked("pull", { name: "old", model: "new" })).toBe("new");
    expect(refusal(() => modelAsked("chat", { name: "old" })).status).toBe(400);
  });
});

describe("keep_alive", () => {
  test.each<[unknown, number | null]>([
    [300, 300],
    [1.5, 1.5],
    [0, 0],
    [-1, Number.POSITIVE_INFINITY],
    ["5m", 300],
    ["1h30m", 5400],
    ["300ms", 0.3],
    ["1.5h", 5400],
    ["0", 0],
    ["-1s", Number.POSITIVE_INFINITY],
    ["-1", Number.POSITIVE_INFINITY],
    ["30", 30],
    ["5 m", null],
    ["m", null],
    ["", null],
    [true, null],
    [[], null],
  ])("%j is %p seconds", (value, seconds) => {
    expect(durationSeconds(value)).toBe(seconds);
  });

  test("what is none is refused", () => {
    expect(refusal(() => chat({ keep_alive: "soon" }))).toMatchObject({
      status: 400,
      message: 'time: invalid duration "soon"',
    });
    expect(refusal(() => chat({ keep_alive: true })).status).toBe(400);
    expect(chat({}).keepAliveSeconds).toBeNull();
  });
});

describe("load and unload", () => {
  test.each<[string, Fields, string]>([
    ["chat", { messages: [] }, "load"],
    ["chat", {}, "load"],
    ["chat", { messages: null, keep_alive: 0 }, "unload"],
    ["chat", { messages: [], keep_alive: "0s" }, "unload"],
    ["generate", {}, "load"],
    ["generate", { prompt: "", keep_alive: 5 }, "load"],
    ["generate", { prompt: "", keep_alive: 0 }, "unload"],
  ])("%s %j: %s", (endpoint, body, kind) => {
    const parse = endpoint === "chat" ? parseChat : parseGenerate;
    expect(parse({ model: "M", ...body }, plain)).toMatchObject({ kind, asked: "M", dialect: endpoint });
  });

  test("a prompt with keep_alive 0 generates, and says when to leave", () => {
    expect(generate({ keep_alive: 0 })).toMatchObject({ kind: "generate", keepAliveSeconds: 0 });
  });
});

describe("refusals", () => {
  const longNamed = {
    type: "function",
    function: { name: "f", parameters: { properties: { ["x".repeat(300)]: {} } } },
  };
  test.each<[string, ServedModel, Fields, number, string | RegExp]>([
    ["chat", plain, { top_logprobs: 21 }, 400, "top_logprobs must be between 0 and 20"],
    ["chat", plain, { top_logprobs: -1 }, 400, "top_logprobs must be between 0 and 20"],
    [
      "chat",
      thinking,
      { think: "x" },
      400,
      'invalid think value: "x" (must be "high", "medium", "low", "max", true, or false)',
    ],
    ["chat", plain, { think: true }, 400, '"m" does not support thinking'],
    ["generate", plain, { think: "low" }, 400, '"m" does not support thinking'],
    [
      "chat",
      plain,
      { tools: [{ type: "function", function: { name: "f" } }] },
      400,
      "registry.ollama.ai/library/tiny:latest does not support tools",
    ],
    [
      "generate",
      plain,
      { suffix: "x" },
      400,
      "registry.ollama.ai/library/tiny:latest does not support insert",
    ],
    ["generate", embedder, {}, 400, '"m" does not support generate'],
    ["chat", embedder, {}, 400, '"m" does not support chat'],
    [
      "generate",
      plain,
      { raw: true, system: "s" },
      400,
      "raw mode does not support template, system, or context",
    ],
    [
      "generate",
      plain,
      { raw: true, template: "t" },
      400,
      "raw mode does not support template, system, or context",
    ],
    [
      "generate",
      plain,
      { raw: true, context: [1] },
      400,
      "raw mode does not support template, system, or context",
    ],
    ["generate", plain, { template: "{{ .Prompt }}" }, 400, /^template is not supported/],
    [
      "chat",
      plain,
      { format: "yaml" },
      400,
      'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object',
    ],
    ["chat", plain, { format: 5 }, 400, 'invalid format: "5"; expected "json" or a valid JSON Schema object'],
    ["chat", plain, { format: { properties: { ["x".repeat(300)]: {} } } }, 400, /at most 256 characters/],
    ["chat", plain, { format: { enum: new Array(3000).fill("x") } }, 400, /at most 2000 values, not 3000/],
    ["chat", thinking, { tools: [longNamed] }, 400, /at most 256 characters/],
    ["chat", thinking, { tools: [{ type: "function", function: {} }] }, 400, /needs a name/],
    ["chat", plain, { options: [] }, 400, "options must be a JSON object"],
    ["chat", plain, { options: { temperature: "hot" } }, 400, 'option "temperature" must be of type float32'],
    ["chat", plain, { options: { num_ctx: "4096" } }, 400, 'option "num_ctx" must be of type integer'],
    ["chat", plain, { options: { use_mmap: 1 } }, 400, 'option "use_mmap" must be of type boolean'],
    ["chat", plain, { options: { stop: [1] } }, 400, 'option "stop" must be of type array'],
    ["chat", plain, { options: { stop: 5 } }, 400, 'option "stop" must be of type array'],
    ["generate", plain, { images: ["aGk="] }, 400, '"m" does not support images'],
    [
      "chat",
      plain,
      { messages: [{ role: "user", content: "x", images: ["aGk="] }] },
      400,
      '"m" does not support images',
    ],
    ["generate", seeing, { images: ["not base64!"] }, 400, "illegal base64 data in images"],
    ["generate", seeing, { images: ["aGk="], raw: true }, 400, /raw mode does not support images/],
    ["generate", seeing, { images: ["aGk="], context: [1] }, 400, /images go neither/],
    ["generate", plain, { context: ["a"] }, 400, /context must be a list of this model's token ids/],
    ["generate", plain, { context: [512] }, 400, /context must be a list of this model's token ids/],
    ["generate", plain, { context: [-1] }, 400, /context must be a list of this model's token ids/],
    [
      "chat",
      plain,
      { messages: [{ role: "user", content: [{ type: "image_url" }] }] },
      400,
      "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string",
    ],
    ["chat", plain, { messages: ["x"] }, 400, /ChatRequest.messages of type object/],
    [
      "chat",
      plain,
      { messages: [{ role: "assistant", tool_calls: [{ function: { name: "f", arguments: "[1]" } }] }] },
      400,
      /ToolCallFunction.arguments/,
    ],
  ])("%s %#", (endpoint, model, body, status, message) => {
    const error = refusal(() => (endpoint === "chat" ? chat(body, model) : generate(body, model)));
    expect(error.status).toBe(status);
    if (typeof message === "string") expect(error.message).toBe(message);
    else expect(error.message).toMatch(message);
  });

  test("think: false is accepted of a model that does not think", () => {
    expect(chat({ think: false }).think).toBeNull();
  });
});

describe("defaults", () => {
  test("of the request", () => {
    expect(chat({})).toMatchObject({
      kind: "generate",
      stream: true,
      truncate: true,
      shift: true,
      think: null,
      format: null,
      logprobs: false,
      topLogprobs: 0,
      contextTokens: 2048,
    });
  });

  test("of the options, in the engine's names", () => {
    expect(samplingOf(chat({}).options, 2048)).toEqual({
      temperature: 0.8,
      top_k: 40,
      top_p: 0.9,
      min_p: 0,
      typical_p: 1,
      repeat_last_n: 64,
      repeat_penalty: 1,
      presence_penalty: 0,
      frequency_penalty: 0,
      stop: [],
      n_keep: 4,
    });
    expect(chat({}).options.predictTokens).toBe(-1);
  });

  test.each<[Fields, object]>([
    [{ temperature: 0 }, { temperature: 0 }],
    [{ top_k: 7.9 }, { top_k: 7 }],
    [{ top_k: -5 }, { top_k: 0 }],
    [{ repeat_last_n: -1 }, { repeat_last_n: 2048 }],
    [{ repeat_last_n: 1e12 }, { repeat_last_n: 2048 }],
    [{ seed: 42 }, { seed: 42 }],
    [{ stop: "x" }, { stop: ["x"] }],
    [{ stop: ["a", "", "b"] }, { stop: ["a", "b"] }],
    [{ temperature: null }, { temperature: 0.8 }],
    [{ mirostat: 2, tfs_z: "x", numa: {}, low_vram: true, TEMPERATURE: "x" }, { temperature: 0.8 }],
    [{ num_keep: 24 }, { n_keep: 24 }],
  ])("options %j", (options, sampling) => {
    expect(samplingOf(chat({ options }).options, 2048)).toMatchObject(sampling);
  });

  test("a negative seed is chance", () => {
    expect(samplingOf(chat({ options: { seed: -1 } }).options, 2048)).not.toHaveProperty("seed");
  });

  test("the model's stored parameters stand between default and request", () => {
    const parameters = { temperature: 0.1, top_k: 5, stop: ["<end>"] };
    const model = served([], { settings: { ...noSettings, parameters } });
    expect(chat({ options: { top_k: 9 } }, model).options).toMatchObject({
      temperature: 0.1,
      topK: 9,
      topP: 0.9,
      stop: ["<end>"],
    });
  });

  test.each<[Fields, number]>([
    [{}, 2048],
    [{ num_ctx: 512 }, 512],
    [{ num_ctx: 1 }, 4],
    [{ num_ctx: -8 }, 4],
    [{ num_ctx: 1e9 }, 2048],
  ])("num_ctx of %j is a limit of the request within what is served", (options, tokens) => {
    expect(chat({ options }).contextTokens).toBe(tokens);
  });

  test("the trained length bounds it, an image raises it", () => {
    expect(chat({}, served([], { trainedContextTokens: 1024 })).contextTokens).toBe(1024);
    const body = { images: ["aGk="], options: { num_ctx: 100 } };
    expect(generate(body, seeing).contextTokens).toBe(2048);
  });

  test.each<[unknown, object]>([
    [undefined, { on: true, level: null }],
    [true, { on: true, level: null }],
    [false, { on: false, level: null }],
    ["low", { on: true, level: "low" }],
    ["max", { on: true, level: "max" }],
  ])("think %j on a model that thinks", (think, read) => {
    expect(chat({ think }, thinking).think).toEqual(read as never);
  });

  test.each<[unknown, object | null]>([
    ["json", { type: "object" }],
    ["", null],
    [null, null],
    [{ type: "string" }, { type: "string" }],
  ])("format %j", (format, schema) => {
    expect(chat({ format }).format).toEqual(schema as never);
  });
});

describe("messages", () => {
  function sent(messages: readonly object[], model: ServedModel = thinking): readonly object[] {
    const { source } = chat({ messages }, model);
    return source.kind === "messages" ? source.messages : [];
  }

  test.each<[string, object, object]>([
    ["the role in small letters", { role: "USER", content: "x" }, { role: "user", content: "x" }],
    ["no content", { role: "user" }, { role: "user", content: "" }],
    ["null content", { role: "user", content: null }, { role: "user", content: "" }],
    [
      "a list of texts",
      {
        role: "user",
        content: [
          { type: "text", text: "a" },
          { type: "text", text: "b" },
        ],
      },
      { role: "user", content: "ab" },
    ],
    ["other roles", { role: "developer", content: "x" }, { role: "developer", content: "x" }],
    [
      "thoughts",
      { role: "assistant", content: "x", thinking: "hm" },
      { role: "assistant", content: "x", reasoning_content: "hm" },
    ],
    [
      "a call with an object",
      {
        role: "assistant",
        tool_calls: [
          { id: "1", type: "function", function: { name: "f", arguments: { b: 1, a: [2] }, index: 0 } },
        ],
      },
      {
        role: "assistant",
        content: "",
        tool_calls: [{ id: "1", type: "function", function: { name: "f", arguments: '{"b":1,"a":[2]}' } }],
      },
    ],
    [
      "a call with text, or without arguments",
      {
        role: "assistant",
        tool_calls: [{ function: { name: "f", arguments: '{"a":1}' } }, { function: { name: "g" } }],
      },
      {
        role: "assistant",
        content: "",
        tool_calls: [
          { type: "function", function: { name: "f", arguments: '{"a":1}' } },
          { type: "function", function: { name: "g", arguments: "{}" } },
        ],
      },
    ],
  ])("%s", (_, given, expected) => {
    expect(sent([given])).toEqual([expected]);
  });

  const calls = {
    role: "assistant",
    tool_calls: [
      { id: "c1", function: { name: "f", arguments: {} } },
      { function: { name: "g", arguments: {} } },
    ],
  };
  test.each<[string, readonly object[], readonly object[]]>([
    ["by id", [{ tool_call_id: "c1" }], [{ tool_call_id: "c1", name: "f" }]],
    ["by name", [{ tool_name: "g" }], [{ name: "g" }]],
    ["in order, without either", [{}, {}], [{ tool_call_id: "c1", name: "f" }, { name: "g" }]],
    ["an id that nobody asked for", [{ tool_call_id: "c9" }], [{ tool_call_id: "c9" }]],
  ])("a tool's result finds its call %s", (_, results, expected) => {
    const messages = [calls, ...results.map((result) => ({ role: "tool", content: "r", ...result }))];
    expect(sent(messages).slice(1)).toEqual(
      expected.map((fields) => ({ role: "tool", content: "r", ...fields })),
    );
  });

  test("tools go on unchanged and in order", () => {
    const parameters = {
      type: "object",
      $defs: { z: { type: ["string", "null"] } },
      properties: { b: { anyOf: [{ $ref: "#/$defs/z" }] }, a: { items: { enum: [1] }, type: "array" } },
      required: ["a"],
    };
    const { source } = chat(
      { tools: [{ type: "function", function: { name: "f", description: "d", parameters } }] },
      thinking,
    );
    expect(JSON.stringify(source.kind === "messages" ? source.tools : [])).toBe(
      JSON.stringify([{ type: "function", function: { name: "f", description: "d", parameters } }]),
    );
  });

  test("stored messages come first, the stored system text where there is none", () => {
    const settings = { ...noSettings, system: "S", messages: [{ role: "user", content: "example" }] };
    const model = served([], { settings });
    const roles = (list: readonly object[]) => list.map((one) => Object.values(one).slice(0, 2).join(":"));
    expect(roles(sent(hi, model))).toEqual(["system:S", "user:example", "user:hi"]);
    const own = { ...settings, messages: [] };
    expect(roles(sent([{ role: "system", content: "mine" }, ...hi], served([], { settings: own })))).toEqual([
      "system:mine",
      "user:hi",
    ]);
  });

  test("old thoughts of Qwen 3 and DeepSeek R1 are left out before the last user message", () => {
    const model = thinker({ name: "deepseek-r1:8b" });
    const old = { role: "assistant", content: "<think>\nhm\n</think>\n\nyes" };
    expect(sent([...hi, old, ...hi, old], model).map((message) => Object.values(message)[1])).toEqual([
      "hi",
      "yes",
      "hi",
      old.content,
    ]);
    expect(sent([...hi, old, ...hi])).toContainEqual(old);
  });

  test("images stand before the text, or at their marks", () => {
    const png = "iVBORw0KGgo=";
    const image = (type: string, data: string) => ({
      type: "image_url",
      image_url: { url: `data:image/${type};base64,${data}` },
    });
    const one = chat({ messages: [{ role: "user", content: "what?", images: [png] }] }, seeing);
    expect(one.imageCount).toBe(1);
    expect(one.source).toMatchObject({
      messages: [{ content: [image("png", png), { type: "text", text: "what?" }] }],
    });
    const marked = generate({ prompt: "a [img] b [img]", images: [png, "/9j/4AAQ"] }, seeing);
    expect(marked.source).toMatchObject({
      messages: [
        {
          content: [
            { type: "text", text: "a " },
            image("png", png),
            { type: "text", text: " b " },
            image("jpeg", "/9j/4AAQ"),
          ],
        },
      ],
    });
  });
});

describe("prompts of generate", () => {
  const settings = { ...noSettings, system: "S", messages: [{ role: "user", content: "example" }] };
  const stored = served([], { settings });
  test.each<[string, ServedModel, Fields, object]>([
    ["a user's message", plain, {}, { kind: "messages", messages: [{ role: "user", content: "hi" }] }],
    [
      "with a system text",
      plain,
      { system: "be kind" },
      { messages: [{ role: "system", content: "be kind" }, { role: "user" }] },
    ],
    [
      "with what is stored",
      stored,
      {},
      { messages: [{ content: "S" }, { content: "example" }, { content: "hi" }] },
    ],
    [
      "with context: without the examples",
      stored,
      { context: [1, 2] },
      { before: [1, 2], messages: [{ content: "hi" }] },
    ],
    ["raw", plain, { raw: true }, { kind: "text", text: "hi" }],
    ["a hole", filling, { suffix: "end" }, { kind: "hole", prefix: "hi", suffix: "end" }],
  ])("%s", (_, model, body, source) => {
    expect(generate(body, model).source).toMatchObject(source);
  });

  test("deepseek2 does not shift unless asked to", () => {
    const model = { ...plain, model: { ...plain.model, architecture: "deepseek2" } };
    expect(generate({}, model).shift).toBe(false);
    expect(generate({ shift: true }, model).shift).toBe(true);
  });

  test("_debug_render_only", () => {
    expect(generate({ _debug_render_only: true }).kind).toBe("debug-render");
  });
});

describe("the other endpoints", () => {
  const embeds: ServedModel = { ...plain, capabilities: ["completion", "embedding"] };
  test.each<[unknown, readonly string[]]>([
    ["a", ["a"]],
    [
      ["a", "b"],
      ["a", "b"],
    ],
    ["", []],
    [[], []],
    [undefined, []],
  ])("embed %j", (input, inputs) => {
    expect(parseEmbed({ model: "m", input }, embeds).inputs).toEqual(inputs);
  });

  test.each([[5], [["a", 5]], [{}]])("embed %j is refused", (input) => {
    expect(refusal(() => parseEmbed({ model: "m", input }, embeds))).toMatchObject({
      status: 400,
      message: "invalid input type",
    });
  });

  test("a model that cannot embed says so", () => {
    expect(refusal(() => parseEmbed({ model: "m", input: "a" }, plain))).toMatchObject({
      status: 501,
      message: 'model "m" does not support embeddings',
    });
    expect(refusal(() => parseEmbeddings({ model: "m", prompt: "a" }, plain)).status).toBe(501);
    expect(parseEmbeddings({ model: "m", prompt: "" }, embeds).inputs).toEqual([]);
  });

  test("show and pull", () => {
    expect(parseShow({ model: "m", verbose: true, system: "s", options: { seed: 1 } })).toEqual({
      asked: "m",
      verbose: true,
      system: "s",
      options: { seed: 1 },
    });
    expect(pullReply(parsePull({ name: "m" }))).toEqual([
      { status: "pulling manifest" },
      { status: "success" },
    ]);
    expect(pullReply(parsePull({ model: "m", stream: false }))).toEqual([{ status: "success" }]);
  });
});

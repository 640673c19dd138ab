// The dialects under /v1: fields, defaults, refusals, frames and errors, without an engine.

import { describe, expect, test } from "bun:test";
import type { EngineChunk } from "../../src/engine";
import type { ServedModel } from "../../src/ollama-model";
import { drive, type EngineCall } from "../../src/ollama-prepare";
import {
  base64Floats,
  parseV1,
  prepareV1,
  type V1Endpoint,
  type V1Work,
  v1Error,
  v1ModelAsked,
  v1ModelMissing,
  v1ReplyFor,
} from "../../src/openai";
import { responsesMender } from "../../src/v1-pass";
import type { Fields } from "../../src/wire-body";
import { WireError } from "../../src/wire-error";
import { served, thinker } from "./served";

const plain = served();
const thinking = thinker();
const embeds: ServedModel = { ...plain, capabilities: ["completion", "embedding"] };
const seeing: ServedModel = { ...plain, capabilities: ["completion", "vision"] };
const hi = [{ role: "user", content: "hi" }];
const tool = { type: "function", function: { name: "f", parameters: { type: "object" } } };
const png = "data:image/png;base64,iVBORw0KGgo=";
const timings = { cache_n: 20, prompt_n: 6, prompt_ms: 1, predicted_n: 9, predicted_ms: 1 };

const minimal: Readonly<Record<V1Endpoint, Fields>> = {
  "chat/completions": { messages: hi },
  completions: { prompt: "hi" },
  embeddings: { input: "hi" },
  responses: { input: "hi" },
  messages: { messages: hi, max_tokens: 9 },
  "messages/count_tokens": { messages: hi },
};

function parse(endpoint: V1Endpoint, body: Fields = {}, model: ServedModel = plain): V1Work {
  return parseV1(endpoint, { model: "M", ...minimal[endpoint], ...body }, model);
}

async function ask({ route, body }: EngineCall): Promise<unknown> {
  switch (route) {
    case "POST /tokenize":
      return { tokens: [5, 6, 7] };
    case "POST /apply-template":
      return { prompt: JSON.stringify(body) };
    case "POST /v1/messages/count_tokens":
      return { input_tokens: 12 };
    case "POST /v1/embeddings":
      return {
        data: (body as { input: unknown[] }).input.map(() => ({ embedding: [3, 4] })),
        usage: { prompt_tokens: 3 },
      };
    default:
      throw new Error(route);
  }
}

/** What the engine would be sent. */
async function sent(
  endpoint: V1Endpoint,
  body: Fields = {},
  model: ServedModel = plain,
): Promise<Record<string, unknown>> {
  const prepared = await drive(prepareV1(parse(endpoint, body, model), model), ask);
  return prepared.kind === "run" ? { route: prepared.route, ...prepared.body } : { ...prepared.reply };
}

async function replied(
  endpoint: V1Endpoint,
  body: Fields,
  chunks: readonly EngineChunk[],
  model: ServedModel = plain,
): Promise<{ text: string; whole: Record<string, unknown> | null }> {
  const work = parse(endpoint, body, model);
  let id = 0;
  const reply = v1ReplyFor(work, { nowUnixSeconds: 7, newId: () => `id00000${++id}` });
  reply.begin(await drive(prepareV1(work, model), ask));
  const text = chunks.map((chunk) => reply.onChunk(chunk)).join("");
  return work.stream
    ? { text: text + reply.end(), whole: null }
    : { text, whole: reply.whole() as Record<string, unknown> };
}

function framesOf(text: string): Record<string, unknown>[] {
  expect(text.endsWith("\n\n")).toBe(true);
  return text
    .slice(0, -2)
    .split("\n\n")
    .map((frame) => {
      expect(frame).toMatch(/^(event: [\w.]+\n)?data: .+$/);
      const data = frame.slice(frame.indexOf("data: ") + 6);
      return data === "[DONE]" ? { done: true } : JSON.parse(data);
    });
}

function delta(fields: object, more: object = {}): EngineChunk {
  return { data: { choices: [{ index: 0, finish_reason: null, delta: fields, ...more }] } };
}

function finish(reason: string): EngineChunk {
  return { data: { choices: [{ index: 0, finish_reason: reason, delta: {} }], timings } };
}

describe("refusals", () => {
  test.each<[V1Endpoint, ServedModel, Fields, number, string | RegExp]>([
    ["chat/completions", plain, { messages: [] }, 400, "[] is too short - 'messages'"],
    ["chat/completions", plain, { messages: null }, 400, "[] is too short - 'messages'"],
    ["chat/completions", plain, { messages: [{ role: "user" }] }, 400, /needs content/],
    [
      "chat/completions",
      plain,
      { messages: [{ role: "user", content: 5 }] },
      400,
      /Message.content of type string/,
    ],
    ["chat/completions", plain, { tools: [tool] }, 400, /does not support tools$/],
    ["chat/completions", plain, { reasoning_effort: "huge" }, 400, /^invalid reasoning value: "huge"/],
    ["chat/completions", plain, { response_format: { type: "xml" } }, 400, /^response_format must be/],
    [
      "chat/completions",
      plain,
      { response_format: { type: "json_schema" } },
      400,
      /needs json_schema.schema/,
    ],
    ["chat/completions", plain, { top_logprobs: 30 }, 400, /between 0 and 20/],
    ["chat/completions", plain, { max_tokens: 0 }, 400, /at least 1/],
    ["chat/completions", plain, { temperature: "1" }, 400, /of type float64/],
    [
      "chat/completions",
      thinking,
      { tools: [tool], tool_choice: { function: { name: "g" } } },
      400,
      /^tool_choice must/,
    ],
    [
      "chat/completions",
      plain,
      { messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: png } }] }] },
      400,
      '"M" does not support images',
    ],
    [
      "chat/completions",
      seeing,
      {
        messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "http://x/y.png" } }] }],
      },
      400,
      /^invalid image input/,
    ],
    [
      "chat/completions",
      seeing,
      {
        messages: [
          { role: "user", content: [{ type: "image_url", image_url: { url: "file:///etc/passwd" } }] },
        ],
      },
      400,
      /^invalid image input/,
    ],
    [
      "chat/completions",
      plain,
      { messages: [{ role: "user", content: [{ type: "input_audio", input_audio: {} }] }] },
      400,
      /does not support content of type "input_audio"/,
    ],
    [
      "chat/completions",
      thinking,
      { messages: [{ role: "assistant", tool_calls: [{ function: { name: "f", arguments: "nope" } }] }] },
      400,
      /JSON object/,
    ],
    ["completions", plain, { prompt: ["a"] }, 400, /Request.prompt of type string/],
    ["completions", plain, { prompt: "" }, 400, /^prompt is required/],
    ["completions", plain, { suffix: "x" }, 400, /does not support insert$/],
    ["embeddings", embeds, { input: null }, 400, "invalid input"],
    ["embeddings", embeds, { input: [] }, 400, "invalid input"],
    ["embeddings", embeds, { input: [[1, 2]] }, 400, "invalid input type"],
    ["embeddings", embeds, { encoding_format: "hex" }, 400, /float or base64/],
    ["embeddings", plain, {}, 501, 'model "M" does not support embeddings'],
    ["responses", plain, { input: [] }, 400, "input is required"],
    ["responses", plain, { previous_response_id: "resp_1" }, 400, /keeps no state/],
    ["responses", plain, { max_output_tokens: 0 }, 400, /at least 1/],
    [
      "responses",
      seeing,
      { input: [{ role: "user", content: [{ type: "input_image", image_url: "https://x/y.png" }] }] },
      400,
      /^invalid image input/,
    ],
    ["messages", plain, { messages: [] }, 400, "messages is required"],
    ["messages", plain, { max_tokens: null }, 400, "max_tokens is required and must be positive"],
    ["messages", plain, { max_tokens: -1 }, 400, /at least 1/],
    [
      "messages",
      thinking,
      { tools: [{ type: "web_search_20250305", name: "web_search" }] },
      400,
      /only tools that the client runs/,
    ],
    [
      "messages",
      seeing,
      {
        messages: [
          {
            role: "user",
            content: [
              { type: "tool_result", content: [{ type: "image", source: { type: "url", url: "http://x" } }] },
            ],
          },
        ],
      },
      400,
      /^invalid image input/,
    ],
  ])("%s %#", (endpoint, model, body, status, message) => {
    let error: unknown;
    try {
      parse(endpoint, body, model);
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(WireError);
    expect((error as WireError).status).toBe(status);
    if (typeof message === "string") expect((error as WireError).message).toBe(message);
    else expect((error as WireError).message).toMatch(message);
  });

  test("names", () => {
    expect(() => v1ModelAsked("chat/completions", {})).toThrow("model is required");
    expect(() => v1ModelAsked("messages", { model: "a b" })).toThrow("invalid model name");
    expect(v1ModelMissing("Nope")).toMatchObject({ status: 404, message: "model 'Nope' not found" });
  });
});

describe("chat", () => {
  test("its defaults", async () => {
    expect(await sent("chat/completions")).toMatchObject({
      route: "POST /v1/chat/completions",
      temperature: 1,
      top_p: 1,
      top_k: 40,
      min_p: 0,
      repeat_penalty: 1,
      stream: true,
      messages: hi,
      n_predict: 2045,
    });
    expect(parse("chat/completions").stream).toBe(false);
  });

  test.each<[Fields, object]>([
    [{ max_tokens: 5 }, { n_predict: 5 }],
    [{ max_tokens: 5, max_completion_tokens: 7 }, { n_predict: 7 }],
    [
      { temperature: 0, top_p: 0.5, seed: 3, frequency_penalty: 1, presence_penalty: 2 },
      { temperature: 0, top_p: 0.5, seed: 3, frequency_penalty: 1, presence_penalty: 2 },
    ],
    [{ stop: "x" }, { stop: ["x"] }],
    [{ stop: ["x", "y"] }, { stop: ["x", "y"] }],
    [{ logit_bias: { "5": 1 } }, { logit_bias: { "5": 1 } }],
    [{ response_format: { type: "text" }, n: 3, user: "u", store: true }, { messages: hi }],
    [
      { response_format: { type: "json_object" } },
      { response_format: { type: "json_schema", json_schema: { schema: { type: "object" } } } },
    ],
    [
      { response_format: { type: "json_schema", json_schema: { name: "n", schema: { type: "string" } } } },
      { response_format: { type: "json_schema", json_schema: { schema: { type: "string" } } } },
    ],
    [{ reasoning_effort: "high" }, { messages: hi }],
  ])("%j becomes %j", async (body, expected) => {
    expect(await sent("chat/completions", body)).toMatchObject(expected);
  });

  test.each<[Fields, boolean, string | undefined]>([
    [{}, true, undefined],
    [{ reasoning_effort: "none" }, false, undefined],
    [{ reasoning_effort: "minimal" }, true, "low"],
    [{ reasoning: { effort: "medium" } }, true, "medium"],
    [{ reasoning_effort: "xhigh" }, true, "max"],
    [{ reasoning_effort: "ultra" }, true, "max"],
    [{ chat_template_kwargs: { enable_thinking: false } }, false, undefined],
  ])("%j: thinking %p, %p", async (body, on, effort) => {
    const request = await sent("chat/completions", body, thinking);
    expect(request["chat_template_kwargs"]).toMatchObject({ enable_thinking: on });
    expect(request["reasoning_effort"]).toBe(effort as never);
  });

  test.each(["n", "user", "id_slot", "lora", "grammar", "samplers", "n_cmpl", "prompt", "return_tokens"])(
    "%s stays outside",
    async (name) => {
      expect(await sent("chat/completions", { [name]: 2 })).not.toHaveProperty(name);
    },
  );

  test.each<[unknown, object]>([
    ["auto", { tool_choice: "auto" }],
    ["none", { tool_choice: "none" }],
    ["required", { tool_choice: "required" }],
    [
      { type: "function", function: { name: "f" } },
      { tool_choice: "required", tools: [{ function: { name: "f" } }] },
    ],
  ])("tool_choice %j", async (choice, expected) => {
    const other = { type: "function", function: { name: "g" } };
    const request = await sent("chat/completions", { tools: [tool, other], tool_choice: choice }, thinking);
    expect(request).toMatchObject(typeof choice === "string" ? expected : {});
    if (typeof choice !== "string") expect(request["tools"]).toHaveLength(1);
  });

  test("messages: parts, calls, results, thoughts", async () => {
    const messages = [
      { role: "developer", content: "d" },
      {
        role: "user",
        content: [
          { type: "text", text: "a" },
          { type: "text", text: "b" },
        ],
      },
      {
        role: "assistant",
        content: null,
        reasoning: "hm",
        tool_calls: [{ id: "c1", type: "function", function: { name: "f", arguments: '{"a":1}' } }],
      },
      { role: "tool", tool_call_id: "c1", content: "r" },
    ];
    expect((await sent("chat/completions", { messages }, thinking))["messages"]).toEqual([
      { role: "developer", content: "d" },
      { role: "user", content: "a\nb" },
      {
        role: "assistant",
        content: "",
        reasoning_content: "hm",
        tool_calls: [{ id: "c1", type: "function", function: { name: "f", arguments: '{"a":1}' } }],
      },
      { role: "tool", content: "r", tool_call_id: "c1", name: "f" },
    ]);
  });

  test("an image in a data: URI", async () => {
    const content = [
      { type: "text", text: "?" },
      { type: "image_url", image_url: { url: png } },
    ];
    const request = await sent("chat/completions", { messages: [{ role: "user", content }] }, seeing);
    expect(request["messages"]).toEqual([{ role: "user", content }]);
  });

  const role = delta({ role: "assistant", content: null });
  const answer = [
    role,
    delta({ reasoning_content: "hm" }),
    delta({ content: "Hel" }),
    delta({ content: "lo" }),
    delta({ tool_calls: [{ index: 0, id: "x", type: "function", function: { name: "f", arguments: "" } }] }),
    delta({ tool_calls: [{ index: 0, function: { arguments: '{"a":1}' } }] }),
    finish("tool_calls"),
  ];

  test("a stream", async () => {
    const { text } = await replied(
      "chat/completions",
      { stream: true, stream_options: { include_usage: true } },
      answer,
    );
    const frames = framesOf(text);
    expect(frames.pop()).toEqual({ done: true });
    expect(frames.every((frame) => frame["id"] === "chatcmpl-id000001" && frame["created"] === 7)).toBe(true);
    expect(
      frames.every((frame) => frame["object"] === "chat.completion.chunk" && frame["model"] === "M"),
    ).toBe(true);
    expect(frames.map((frame) => frame["choices"])).toEqual([
      [{ index: 0, delta: { role: "assistant", reasoning: "hm" }, finish_reason: null }],
      [{ index: 0, delta: { content: "Hel" }, finish_reason: null }],
      [{ index: 0, delta: { content: "lo" }, finish_reason: null }],
      [
        {
          index: 0,
          delta: {
            tool_calls: [
              {
                index: 0,
                id: "call_id000002",
                type: "function",
                function: { name: "f", arguments: '{"a":1}' },
              },
            ],
          },
          finish_reason: null,
        },
      ],
      [{ index: 0, delta: {}, finish_reason: "tool_calls" }],
      [],
    ]);
    expect(frames.at(-1)?.["usage"]).toEqual({
      prompt_tokens: 26,
      completion_tokens: 9,
      total_tokens: 35,
      prompt_tokens_details: { cached_tokens: 20 },
    });
  });

  test("a stream without a word still has its role", async () => {
    const frames = framesOf(
      (await replied("chat/completions", { stream: true }, [role, finish("stop")])).text,
    );
    expect(frames).toHaveLength(3);
    expect(frames[0]).toMatchObject({ choices: [{ delta: { role: "assistant", content: "" } }] });
    expect(frames[1]).toMatchObject({ choices: [{ finish_reason: "stop" }] });
  });

  test("one object", async () => {
    const { whole } = await replied("chat/completions", {}, answer);
    expect(whole).toEqual({
      id: "chatcmpl-id000001",
      object: "chat.completion",
      created: 7,
      model: "M",
      system_fingerprint: "fp_ollama",
      choices: [
        {
          index: 0,
          message: {
            role: "assistant",
            content: "Hello",
            reasoning: "hm",
            tool_calls: [
              {
                index: 0,
                id: "call_id000002",
                type: "function",
                function: { name: "f", arguments: '{"a":1}' },
              },
            ],
          },
          finish_reason: "tool_calls",
        },
      ],
      usage: {
        prompt_tokens: 26,
        completion_tokens: 9,
        total_tokens: 35,
        prompt_tokens_details: { cached_tokens: 20 },
      },
    });
  });

  test("an error in the stream", () => {
    const reply = v1ReplyFor(parse("chat/completions", { stream: true }), {
      nowUnixSeconds: 7,
      newId: () => "a",
    });
    expect(reply.error(new WireError(500, "broken"))).toBe(
      'data: {"error":{"message":"broken","type":"api_error","param":null,"code":null}}\n\n',
    );
    expect(reply.heartbeat()).toMatch(/^:.*\n\n$/);
  });
});

describe("completions", () => {
  const plainChunk = (content: string) => ({
    data: {
      content,
      tokens: [1],
      stop: false,
      completion_probabilities: [
        {
          id: 1,
          token: content,
          bytes: [],
          logprob: -1,
          top_logprobs: [{ id: 1, token: content, bytes: [], logprob: -1 }],
        },
      ],
    },
  });
  const last = { data: { content: "", tokens: [], stop: true, stop_type: "eos", timings } };

  test("a stream: a zero usage in every chunk, the sums in the last", async () => {
    const body = { stream: true, stream_options: { include_usage: true } };
    const { text } = await replied("completions", body, [delta({ content: "a" }), finish("stop")]);
    const frames = framesOf(text);
    expect(
      frames.map((frame) => [frame["choices"], (frame["usage"] as { total_tokens?: number })?.total_tokens]),
    ).toEqual([
      [[{ index: 0, text: "a", finish_reason: null }], 0],
      [[{ index: 0, text: "", finish_reason: "stop" }], 0],
      [[], 35],
      [undefined, undefined],
    ]);
    expect(frames[0]).toMatchObject({ object: "text_completion", id: "cmpl-id000001" });
  });

  test("log-probabilities in their old shape", async () => {
    const { whole } = await replied("completions", { logprobs: 1 }, [
      plainChunk("ab"),
      plainChunk("c"),
      last,
    ]);
    expect(whole).toMatchObject({
      choices: [
        {
          text: "abc",
          logprobs: {
            tokens: ["ab", "c"],
            token_logprobs: [-1, -1],
            top_logprobs: [{ ab: -1 }, { c: -1 }],
            text_offset: [0, 2],
          },
        },
      ],
    });
  });

  test("the prompt is a user's message", async () => {
    expect(await sent("completions", { prompt: "x" })).toMatchObject({
      messages: [{ role: "user", content: "x" }],
    });
  });
});

describe("embeddings", () => {
  test("floats and base64", async () => {
    expect(await sent("embeddings", { input: ["a", "b"], dimensions: 1 }, embeds)).toEqual({
      object: "list",
      data: [
        { object: "embedding", embedding: [1], index: 0 },
        { object: "embedding", embedding: [1], index: 1 },
      ],
      model: "M",
      usage: { prompt_tokens: 3, total_tokens: 3 },
    });
    const { data } = (await sent("embeddings", { encoding_format: "base64" }, embeds)) as unknown as {
      data: { embedding: string }[];
    };
    const bytes = Buffer.from(data[0]?.embedding ?? "", "base64");
    expect([bytes.readFloatLE(0), bytes.readFloatLE(4)]).toEqual([3, 4]);
    expect(base64Floats([])).toBe("");
  });

  test("an empty text is a text", () => {
    expect(parse("embeddings", { input: "" }, embeds)).toMatchObject({ work: { inputs: [""] } });
  });
});

describe("responses", () => {
  test("what the core is sent", async () => {
    const body = {
      input: [
        { role: "user", content: "a" },
        { type: "web_search_call", id: "w" },
        { type: "reasoning", summary: [], encrypted_content: "x" },
        { type: "function_call", call_id: "c", name: "f", arguments: "{}" },
      ],
      instructions: "i",
      tools: [
        { type: "function", name: "f", parameters: {} },
        { type: "namespace", name: "n", tools: [{ type: "function", name: "g", parameters: {} }] },
        { type: "web_search" },
      ],
      text: { format: { type: "json_schema", name: "n", schema: { type: "string" } } },
      reasoning: { effort: "none" },
      max_output_tokens: 5,
      truncation: "auto",
      store: false,
    };
    const request = await sent("responses", body, thinking);
    expect(request).toMatchObject({
      route: "POST /v1/responses",
      temperature: 1,
      top_p: 1,
      instructions: "i",
      max_output_tokens: 5,
      response_format: { type: "json_schema", json_schema: { schema: { type: "string" } } },
      chat_template_kwargs: { enable_thinking: false },
      stream: false,
    });
    expect((request["input"] as { type: string }[]).map(({ type }) => type)).toEqual([
      "message",
      "function_call",
    ]);
    expect((request["tools"] as { name: string }[]).map(({ name }) => name)).toEqual(["f", "g"]);
    expect(request).not.toHaveProperty("store");
  });

  test("events get numbers and places; arguments get their end", () => {
    const mender = responsesMender({ asked: "M", nowUnixSeconds: 7, newId: () => "a", maxTokens: null });
    const events = [
      { type: "response.created", response: { id: "r", status: "in_progress" } },
      { type: "response.created", response: { id: "r", status: "in_progress" } },
      { type: "response.output_item.added", item: { id: "rs", type: "reasoning" } },
      { type: "response.reasoning_text.delta", item_id: "rs", delta: "h" },
      { type: "response.output_item.added", item: { id: "fc", type: "function_call" } },
      { type: "response.function_call_arguments.delta", item_id: "fc", delta: "{}" },
      { type: "response.output_item.done", item: { id: "rs", type: "reasoning" } },
      {
        type: "response.output_item.done",
        item: { id: "fc", type: "function_call", name: "f", arguments: "{}" },
      },
      {
        type: "response.completed",
        response: { id: "r", status: "completed", output: [], usage: { output_tokens: 5 } },
      },
    ].flatMap((data) => mender.mend({ name: data.type, data }));
    expect(events.map(({ name }) => name.replace("response.", ""))).toEqual([
      "created",
      "output_item.added",
      "reasoning_text.delta",
      "output_item.added",
      "function_call_arguments.delta",
      "output_item.done",
      "function_call_arguments.done",
      "output_item.done",
      "completed",
    ]);
    const data = events.map((event) => event.data as Record<string, unknown>);
    expect(data.map((one) => one["sequence_number"])).toEqual([...data.keys()]);
    expect(data.map((one) => one["output_index"])).toEqual([undefined, 0, 0, 1, 1, 0, 1, 1, undefined]);
    expect(data[0]?.["response"]).toMatchObject({
      model: "M",
      created_at: 7,
      output: [],
      status: "in_progress",
    });
    expect(data.at(-1)?.["response"]).toMatchObject({ model: "M", status: "completed" });
  });
});

describe("messages", () => {
  test("what the core is sent", async () => {
    const tools = [{ name: "f", input_schema: { type: "object" } }];
    expect(
      await sent("messages", { tools, system: "s", stop_sequences: ["x"], metadata: {} }, thinking),
    ).toEqual({
      route: "POST /v1/messages",
      messages: hi,
      tools,
      system: "s",
      stop_sequences: ["x"],
      max_tokens: 9,
      temperature: 1,
      top_p: 1,
      top_k: 40,
      stream: false,
      chat_template_kwargs: { enable_thinking: false, thinking: false },
    });
  });

  test.each<[Fields, ServedModel, object | undefined]>([
    [{}, thinking, { enable_thinking: false }],
    [{ thinking: { type: "enabled", budget_tokens: 5 } }, thinking, { enable_thinking: true }],
    [{ thinking: { type: "disabled" } }, thinking, { enable_thinking: false }],
    [
      { thinking: { type: "adaptive" }, output_config: { effort: "low" } },
      thinking,
      { enable_thinking: true, reasoning_effort: "low" },
    ],
    [{ thinking: { type: "enabled" } }, plain, undefined],
  ])("%j", async (body, model, kwargs) => {
    const sentKwargs = (await sent("messages", body, model))["chat_template_kwargs"];
    if (kwargs === undefined) expect(sentKwargs).toBeUndefined();
    else expect(sentKwargs).toMatchObject(kwargs);
  });

  test("a stream begins once, with the name as asked, and calls have an input", async () => {
    const chunks = [
      { type: "message_start", message: { id: "chatcmpl-1", model: "x", usage: { input_tokens: 3 } } },
      { type: "content_block_start", index: 0, content_block: { type: "tool_use", id: "t", name: "f" } },
      { type: "message_stop" },
    ].map((data) => ({ name: data.type, data }));
    const whole = framesOf((await replied("messages", { stream: true }, chunks)).text);
    expect(whole.map((frame) => frame["type"])).toEqual([
      "message_start",
      "content_block_start",
      "message_stop",
    ]);
    expect(whole[0]).toMatchObject({ message: { id: "msg_id000001id000002id000003", model: "M" } });
    expect(whole[1]).toMatchObject({ content_block: { input: {} } });
    const late = framesOf((await replied("messages", { stream: true }, chunks.slice(1))).text);
    expect(late[0]).toMatchObject({ type: "message_start", message: { usage: { input_tokens: 12 } } });
    expect(late).toHaveLength(3);
  });

  test("its heartbeat and its error are events", () => {
    const reply = v1ReplyFor(parse("messages", { stream: true }), { nowUnixSeconds: 7, newId: () => "a" });
    expect(reply.heartbeat()).toBe('event: ping\ndata: {"type":"ping"}\n\n');
    expect(reply.error(new WireError(503, "busy"))).toBe(
      'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n',
    );
  });
});

describe("errors", () => {
  test.each([
    [400, "invalid_request_error", "invalid_request_error"],
    [401, "api_error", "authentication_error"],
    [403, "api_error", "permission_error"],
    [404, "not_found_error", "not_found_error"],
    [429, "api_error", "rate_limit_error"],
    [500, "api_error", "api_error"],
    [501, "api_error", "api_error"],
    [503, "api_error", "overloaded_error"],
    [529, "api_error", "overloaded_error"],
  ])("%d is %s at OpenAI's and %s at Anthropic's", (status, openai, anthropic) => {
    const error = new WireError(status, "x");
    for (const endpoint of ["chat/completions", "models", "responses"] as const) {
      expect(v1Error(endpoint, error, "req_1")).toEqual({
        error: { message: "x", type: openai, param: null, code: null },
      });
    }
    expect(v1Error("messages", error, "req_1")).toEqual({
      type: "error",
      error: { type: anthropic, message: "x" },
      request_id: "req_1",
    });
  });
});

// The official clients of Ollama, OpenAI and Anthropic against a real server: what people point at it. Two models: one
// of a few hundred kilobytes that recites its thoughts and a tool call by its own weights (reciter.ts), and SmolLM2,
// which answers in words. Where nothing else is said, both sides are as they come.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import Anthropic from "@anthropic-ai/sdk";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { until } from "../engine/process";
import { recital, writeReciter } from "../engine/reciter";
import { smolLm2OrSkip } from "../models";
import { scratchFolder, startServer, stopServers, type TestServer } from "./served";

const folder = scratchFolder();
let tiny: TestServer;
let real: TestServer | null = null;

beforeAll(async () => {
  const reciter = join(folder, "reciter.gguf");
  writeReciter(reciter);
  tiny = await startServer([reciter], { limits: { contextTokens: 2048 } });
  const smol = await smolLm2OrSkip();
  real = smol === null ? null : await startServer([smol], { name: "smol" });
});

afterAll(stopServers);

function ollamaOf({ url }: TestServer): Ollama {
  return new Ollama({ host: url });
}

function openaiOf({ url }: TestServer): OpenAI {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
}

function anthropicOf({ url }: TestServer): Anthropic {
  return new Anthropic({ baseURL: url, apiKey: "any", maxRetries: 0 });
}

function idle(server: TestServer): Promise<void> {
  return until(
    () => server.keeper.counts().inside === 0 && server.keeper.counts().waiting === 0,
    () => JSON.stringify(server.keeper.counts()),
    10,
  );
}

const parameters = {
  type: "object" as const,
  properties: { city: { type: "string" } },
  required: ["city"],
};
const weather = {
  type: "function" as const,
  function: { name: "weather", description: "The weather of a city", parameters },
};
const question = [{ role: "user" as const, content: "How is the weather in Bern?" }];
const thoughts = recital.thoughts.join("");
const sum = [{ role: "user" as const, content: "What is 2+2? One word." }];
/** What it says of 2+2 is constrained to this. */
const answerSchema = {
  type: "object",
  properties: { answer: { type: "integer" }, unit: { enum: ["none"] } },
  required: ["answer", "unit"],
  additionalProperties: false,
} as const;

async function all<Item>(items: AsyncIterable<Item>): Promise<Item[]> {
  const list: Item[] = [];
  for await (const item of items) {
    list.push(item);
  }
  return list;
}

/** What a promise rejects with. */
async function failureOf(promise: Promise<unknown>): Promise<Record<string, unknown>> {
  return promise.then(
    () => {
      throw new Error("it did not fail");
    },
    (error: Record<string, unknown>) => error,
  );
}

describe("ollama's own client", () => {
  test("lists, shows and tells what is loaded", async () => {
    const client = ollamaOf(tiny);
    const { models } = await client.list();
    expect(models).toMatchObject([{ name: "reciter:latest", details: { format: "gguf", family: "llama" } }]);
    expect(models[0]?.digest).toMatch(/^[0-9a-f]{64}$/);
    const shown = await client.show({ model: "reciter" });
    expect(shown.capabilities.toSorted()).toEqual(["completion", "thinking", "tools"]);
    expect(shown.model_info).toMatchObject({ "general.architecture": "llama", "llama.context_length": 2048 });
    await client.generate({ model: "reciter", prompt: "" });
    const loaded = await client.ps();
    expect(loaded.models).toMatchObject([{ name: "reciter:latest", context_length: 2048 }]);
    expect((await client.version()).version).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test("chats, whole and streamed, with thoughts", async () => {
    const client = ollamaOf(tiny);
    const ask = { model: "reciter", messages: question, tools: [weather], think: true };
    const whole = await client.chat(ask);
    expect(whole.message.thinking?.trim()).toBe(thoughts);
    expect(whole.message.tool_calls).toMatchObject([{ function: recital.call }]);
    expect(whole).toMatchObject({ done: true, done_reason: "stop" });
    const chunks = await all(await client.chat({ ...ask, stream: true }));
    const thought = chunks.map(({ message }) => message.thinking ?? "");
    expect(thought.join("").trim()).toBe(thoughts);
    expect(thought.filter((one) => one !== "").length).toBeGreaterThan(1); // as they come
    const silent = await client.chat({ ...ask, think: false });
    expect(silent.message.thinking).toBeUndefined();
    expect(silent.message.tool_calls).toMatchObject([{ function: recital.call }]);
  });

  test("gets whole tool calls before the last line, and none of their markup as text", async () => {
    const ask = {
      model: "reciter",
      messages: question,
      tools: [weather],
      think: false,
      stream: true as const,
    };
    const chunks = await all(await ollamaOf(tiny).chat(ask));
    const at = chunks.findIndex(({ message }) => message.tool_calls !== undefined);
    expect(chunks[at]?.message.tool_calls).toMatchObject([{ function: recital.call }]);
    expect(chunks[at]?.done).toBe(false);
    expect(chunks.at(-1)).toMatchObject({ done: true, done_reason: "stop" });
    expect(chunks.map(({ message }) => message.content).join("")).toBe("");
    // The conversation goes on with the call and its result.
    const messages = [
      ...question,
      { role: "assistant", content: "", tool_calls: [{ function: { ...recital.call } }] },
      { role: "tool", content: "sunny", tool_name: "weather" },
    ];
    const next = await ollamaOf(tiny).chat({ model: "reciter", messages, tools: [weather], think: true });
    expect(next.message.thinking?.trim()).toBe(thoughts);
  });

  test("without tools what the model writes is text", async () => {
    const { message } = await ollamaOf(tiny).chat({
      model: "reciter",
      messages: question,
      think: false,
    });
    expect(message.tool_calls).toBeUndefined();
    expect(message.content).toContain('{"name": "weather"');
  });

  test("generates, whole and streamed, and goes on from its context", async () => {
    if (real === null) return;
    const client = ollamaOf(real);
    const ask = {
      model: "smol",
      prompt: "What is 2+2? One word.",
      options: { temperature: 0, num_predict: 24 },
    };
    const whole = await client.generate(ask);
    expect(whole.response).not.toBe("");
    const chunks = await all(await client.generate({ ...ask, stream: true }));
    expect(chunks.map(({ response }) => response ?? "").join("")).toBe(whole.response ?? "");
    expect(chunks.at(-1)).toMatchObject({ done: true, eval_count: whole.eval_count });
    const ending = whole.done_reason === "stop" ? 1 : 0; // the token that ends an answer is counted, and no context
    expect(whole.context.length).toBe(whole.prompt_eval_count + whole.eval_count - ending);
    const next = await client.generate({ ...ask, prompt: "And 3+3?", context: whole.context });
    expect(next.context.slice(0, whole.context.length)).toEqual(whole.context);
  });

  test("structured output is what the schema says", async () => {
    if (real === null) return;
    const { message } = await ollamaOf(real).chat({
      model: "smol",
      messages: sum,
      format: answerSchema,
      options: { temperature: 0 },
    });
    const object = JSON.parse(message.content) as Record<string, unknown>;
    expect(object["unit"]).toBe("none");
    expect(object["answer"]).toBeInteger();
  });

  test("every token has its log-probability", async () => {
    if (real === null) return;
    const client = ollamaOf(real);
    const options = { temperature: 0, num_predict: 10 };
    const asked = { model: "smol", messages: sum, logprobs: true, top_logprobs: 3, options };
    const whole = await client.chat(asked);
    expect(whole.logprobs?.length).toBe(
      whole.done_reason === "stop" ? whole.eval_count - 1 : whole.eval_count,
    );
    expect(whole.logprobs?.map(({ token }) => token).join("")).toBe(whole.message.content);
    for (const { logprob, top_logprobs } of whole.logprobs ?? []) {
      expect(logprob).toBeLessThanOrEqual(0);
      expect(top_logprobs?.length).toBe(3);
      expect(top_logprobs?.[0]?.logprob).toBeCloseTo(logprob, 3); // the likeliest is taken
    }
    const chunks = await all(
      await client.generate({ model: "smol", prompt: "Hi", logprobs: true, options, stream: true }),
    );
    expect(chunks.flatMap(({ logprobs }) => logprobs ?? []).length).toBeGreaterThan(0);
  });

  test("aborts: the stream ends with an error at once and nothing runs on", async () => {
    const client = ollamaOf(tiny);
    const options = { num_predict: 1500, temperature: 0 };
    const format = { type: "array", items: { type: "integer" }, minItems: 1000 };
    const ask = { model: "reciter", prompt: "Count", think: false, format, options, stream: true } as const;
    const stream = await client.generate(ask);
    let seen = 0;
    const error = await failureOf(
      (async () => {
        for await (const { response } of stream) {
          seen += response === "" ? 0 : 1;
          if (seen === 3) stream.abort();
        }
      })(),
    );
    expect(error["name"]).toBe("AbortError");
    await idle(tiny);
    expect(seen).toBeLessThan(1000);
    const other = await client.generate(ask);
    const second = failureOf(all(other));
    client.abort(); // all of this client's
    expect((await second)["name"]).toBe("AbortError");
    await idle(tiny);
  });

  test("embeds, or hears that this model does not", async () => {
    const client = ollamaOf(tiny);
    const canEmbed = tiny.models[0]?.served.capabilities.includes("embedding") === true;
    if (canEmbed) {
      const { embeddings } = await client.embed({ model: "reciter", input: ["one", "two"] });
      expect(embeddings.map((vector) => Math.hypot(...vector).toFixed(3))).toEqual(["1.000", "1.000"]);
      return;
    }
    const error = await failureOf(client.embed({ model: "reciter", input: "one" }));
    expect(error).toMatchObject({
      name: "ResponseError",
      status_code: 501,
      error: 'model "reciter" does not support embeddings',
    });
  });

  test("hears refusals in Ollama's words", async () => {
    const client = ollamaOf(tiny);
    expect(await failureOf(client.chat({ model: "absent", messages: [] }))).toMatchObject({
      status_code: 404,
      error: "model 'absent' not found",
    });
    expect(await failureOf(client.pull({ model: "absent" }))).toMatchObject({ status_code: 400 });
    expect(await client.pull({ model: "reciter" })).toEqual({ status: "success" } as never);
    const stream = await failureOf(
      client.chat({
        model: "reciter",
        messages: [{ role: "user", content: "x ".repeat(9000) }],
        stream: true,
        ...{ truncate: false },
      }),
    );
    expect(stream).toMatchObject({ status_code: 400 });
    expect(stream["error"]).toMatch(/^request \(\d+ tokens\) exceeds the available context size/);
  });

  test("unloads with a keep_alive of 0", async () => {
    const client = ollamaOf(tiny);
    await client.generate({ model: "reciter", prompt: "", keep_alive: "1m" });
    expect((await client.ps()).models.length).toBe(1);
    expect(await client.generate({ model: "reciter", prompt: "", keep_alive: 0 })).toMatchObject({
      done: true,
      done_reason: "unload",
    });
    expect((await client.ps()).models).toEqual([]);
  });
});

describe("OpenAI's own client", () => {
  test("lists and retrieves models", async () => {
    const client = openaiOf(tiny);
    const page = await client.models.list();
    expect(page.data).toMatchObject([{ id: "reciter:latest", object: "model", owned_by: "library" }]);
    expect(await client.models.retrieve("reciter")).toMatchObject({ id: "reciter", object: "model" });
  });

  test("chats, whole and streamed, with its own counts", async () => {
    if (real === null) return;
    const client = openaiOf(real);
    const ask = { model: "smol", messages: sum, temperature: 0, max_tokens: 24 };
    const whole = await client.chat.completions.create(ask);
    const text = whole.choices[0]?.message.content ?? "";
    expect(text).not.toBe("");
    expect(whole.usage?.total_tokens).toBe(
      (whole.usage?.prompt_tokens ?? 0) + (whole.usage?.completion_tokens ?? 0),
    );
    const chunks = await all(
      await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }),
    );
    expect(chunks.map(({ choices }) => choices[0]?.delta.content ?? "").join("")).toBe(text);
    const { completion_tokens, prompt_tokens } = whole.usage ?? {};
    expect(chunks.at(-1)).toMatchObject({ choices: [], usage: { completion_tokens, prompt_tokens } });
    // The SDK's own gatherer accepts the stream and comes to the same message.
    const gathered = await client.chat.completions.stream(ask).finalMessage();
    expect(gathered.content).toBe(text);
    const plain = await client.completions.create({
      model: "smol",
      prompt: "What is 2+2? One word.",
      temperature: 0,
      max_tokens: 24,
    });
    expect(plain.choices[0]?.text).toBe(text);
  });

  test("tools: whole, streamed, named, and none", async () => {
    const client = openaiOf(tiny);
    const ask = { model: "reciter", messages: question, tools: [weather], temperature: 0 };
    const whole = await client.chat.completions.create({
      ...ask,
      messages: question,
    });
    const [choice] = whole.choices;
    expect(choice?.finish_reason).toBe("tool_calls");
    const [call] = choice?.message.tool_calls ?? [];
    expect(call).toMatchObject({ type: "function", function: { name: "weather" } });
    expect(call?.type === "function" && JSON.parse(call.function.arguments)).toEqual({
      ...recital.call.arguments,
    });
    const stream = client.chat.completions.stream(ask);
    const message = await stream.finalMessage();
    expect(message.tool_calls?.[0]).toMatchObject({ function: { name: "weather" } });
    const clock = { ...weather, function: { ...weather.function, name: "clock" } };
    const named = await client.chat.completions.create({
      ...ask,
      tools: [weather, clock],
      tool_choice: { type: "function", function: { name: "weather" } },
    });
    expect(named.choices[0]?.message.tool_calls).toMatchObject([{ function: { name: "weather" } }]);
    const none = await client.chat.completions.create({ ...ask, tool_choice: "none" });
    expect(none.choices[0]?.message.tool_calls).toBeUndefined();
    expect(none.choices[0]?.finish_reason).toBe("stop");
  });

  test("structured output, parsed by the SDK", async () => {
    if (real === null) return;
    const client = openaiOf(real);
    const parsed = await client.chat.completions.parse({
      model: "smol",
      messages: sum,
      temperature: 0,
      response_format: {
        type: "json_schema",
        json_schema: { name: "answer", schema: answerSchema, strict: true },
      },
    });
    expect(parsed.choices[0]?.message.parsed).toMatchObject({ unit: "none" });
    const json = await client.chat.completions.create({
      model: "smol",
      messages: [{ role: "user", content: "Give me an empty JSON object." }],
      temperature: 0,
      max_tokens: 200,
      response_format: { type: "json_object" },
    });
    if (json.choices[0]?.finish_reason === "stop") {
      JSON.parse(json.choices[0].message.content ?? "");
    }
  });

  test("log-probabilities", async () => {
    if (real === null) return;
    const { choices } = await openaiOf(real).chat.completions.create({
      model: "smol",
      messages: sum,
      temperature: 0,
      max_tokens: 5,
      logprobs: true,
      top_logprobs: 2,
    });
    const content = choices[0]?.logprobs?.content ?? [];
    expect(content.length).toBeGreaterThan(0);
    expect(content.map(({ token }) => token).join("")).toBe(choices[0]?.message.content ?? "");
    expect(content.every(({ top_logprobs: top }) => top.length === 2)).toBe(true);
  });

  test("responses, whole and streamed", async () => {
    if (real === null) return;
    const client = openaiOf(real);
    const ask = { model: "smol", input: "What is 2+2? One word.", temperature: 0, max_output_tokens: 24 };
    const whole = await client.responses.create(ask);
    expect(whole.output_text).not.toBe("");
    let text = "";
    let last = "";
    for await (const event of await client.responses.create({ ...ask, stream: true })) {
      text += event.type === "response.output_text.delta" ? event.delta : "";
      last = event.type;
    }
    expect(text).toBe(whole.output_text);
    expect(["response.completed", "response.incomplete"]).toContain(last);
    const gathered = await client.responses.stream(ask).finalResponse();
    expect(gathered.output_text).toBe(text);
  });

  test("embeddings, or the refusal", async () => {
    const canEmbed = tiny.models[0]?.served.capabilities.includes("embedding") === true;
    const asked = openaiOf(tiny).embeddings.create({ model: "reciter", input: ["one", "two"] });
    if (canEmbed) {
      expect((await asked).data.map(({ embedding }) => embedding.length)).toEqual([256, 256]);
      return;
    }
    expect(await failureOf(asked)).toMatchObject({ status: 501 });
  });

  test("errors arrive as its own kinds", async () => {
    const client = openaiOf(tiny);
    const absent = client.chat.completions.create({ model: "absent", messages: question });
    expect(await failureOf(absent)).toBeInstanceOf(OpenAI.NotFoundError);
    const empty = await failureOf(client.chat.completions.create({ model: "reciter", messages: [] }));
    expect(empty).toBeInstanceOf(OpenAI.BadRequestError);
    expect(empty).toMatchObject({ status: 400, type: "invalid_request_error" });
    const long = [{ role: "user" as const, content: "x ".repeat(9000) }];
    const streamed = client.chat.completions.create({ model: "reciter", messages: long, stream: true });
    expect(await failureOf(streamed)).toBeInstanceOf(OpenAI.BadRequestError);
  });

  test("aborts, and nothing runs on", async () => {
    if (real === null) return;
    const stream = await openaiOf(real).chat.completions.create({
      model: "smol",
      messages: [{ role: "user", content: "Tell me a long story." }],
      stream: true,
    });
    for await (const _ of stream) {
      break; // which aborts
    }
    await idle(real);
  });
});

describe("Anthropic's own client", () => {
  test("messages, whole and streamed", async () => {
    if (real === null) return;
    const client = anthropicOf(real);
    const ask = { model: "smol", max_tokens: 24, temperature: 0, messages: sum };
    const whole = await client.messages.create(ask);
    expect(whole).toMatchObject({ type: "message", role: "assistant", model: "smol" });
    const [block] = whole.content;
    const text = block?.type === "text" ? block.text : "";
    expect(text).not.toBe("");
    expect(whole.usage.output_tokens).toBeGreaterThan(0);
    const events = await all(await client.messages.create({ ...ask, stream: true }));
    expect(events[0]?.type).toBe("message_start");
    expect(events.at(-1)?.type).toBe("message_stop");
    const gathered = await client.messages.stream(ask).finalMessage();
    expect(gathered.content).toMatchObject([{ type: "text", text }]);
    expect(gathered.stop_reason).toBe(whole.stop_reason);
  });

  test("tools: a call with its input, whole and streamed, and the turn after it", async () => {
    const client = anthropicOf(tiny);
    const tools = [{ name: "weather", description: "The weather of a city", input_schema: parameters }];
    const ask = { model: "reciter", max_tokens: 100, temperature: 0, messages: question };
    const whole = await client.messages.create({ ...ask, tools });
    expect(whole.stop_reason).toBe("tool_use");
    const use = whole.content.find((block) => block.type === "tool_use");
    expect(use).toMatchObject({ name: "weather", input: { ...recital.call.arguments } });
    const gathered = await client.messages.stream({ ...ask, tools }).finalMessage();
    expect(gathered.content.find((block) => block.type === "tool_use")).toMatchObject({
      name: "weather",
      input: { ...recital.call.arguments },
    });
    const next = await client.messages.create({
      ...ask,
      tools,
      messages: [
        ...question,
        { role: "assistant", content: whole.content },
        { role: "user", content: [{ type: "tool_result", tool_use_id: use?.id ?? "", content: "sunny" }] },
      ],
    });
    expect(next.type).toBe("message");
  });

  test("thoughts, where they are asked for", async () => {
    const asked = await anthropicOf(tiny).messages.create({
      model: "reciter",
      max_tokens: 2000,
      thinking: { type: "enabled", budget_tokens: 1024 },
      messages: question,
    });
    const [first] = asked.content;
    expect(first?.type === "thinking" && first.thinking.trim()).toBe(thoughts);
  });

  test("counts tokens, and errors arrive as its own kinds", async () => {
    const client = anthropicOf(tiny);
    const { input_tokens } = await client.messages.countTokens({ model: "reciter", messages: question });
    expect(input_tokens).toBeGreaterThan(5);
    const absent = client.messages.create({ model: "absent", max_tokens: 5, messages: question });
    expect(await failureOf(absent)).toBeInstanceOf(Anthropic.NotFoundError);
    const empty = client.messages.create({ model: "reciter", max_tokens: 5, messages: [] });
    expect(await failureOf(empty)).toBeInstanceOf(Anthropic.BadRequestError);
  });
});

// The official clients of Ollama, OpenAI and Anthropic against the server, as a program uses them: whatever they refuse
// to read, or read as something else, fails here. The model's weights are random; a schema gives it words.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import Anthropic from "@anthropic-ai/sdk";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { until } from "../engine/process";
import { writeThinker } from "../engine/thinker";
import { scratchFolder, startServer, stopServers, type TestServer } from "./served";

const folder = scratchFolder();
let server: TestServer;
let ollama: Ollama;
let openai: OpenAI;
let anthropic: Anthropic;

afterAll(stopServers);
beforeAll(() => {
  const path = join(folder, "able.gguf");
  writeThinker(path);
  server = startServer([path], { name: "m" });
  ollama = new Ollama({ host: server.url });
  openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "unused", maxRetries: 0 });
  anthropic = new Anthropic({ baseURL: server.url, apiKey: "unused", maxRetries: 0 });
});

const model = "m";
const messages = [{ role: "user" as const, content: "Hello" }];
const options = { num_predict: 4, temperature: 0 };
const schema = {
  type: "object",
  properties: { a: { enum: ["x", "y"] } },
  required: ["a"],
  additionalProperties: false,
};
const tool = {
  type: "function" as const,
  function: {
    name: "get_weather",
    description: "The weather somewhere",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

async function messageOf(promise: Promise<unknown>): Promise<string> {
  return promise.then(
    () => "no error",
    (error: unknown) => (error as Error).message,
  );
}

describe("ollama", () => {
  test("list, show, version, ps", async () => {
    const [entry] = (await ollama.list()).models;
    expect(entry?.name).toBe("m:latest");
    expect(Number.isNaN(new Date(entry?.modified_at ?? "").getTime())).toBe(false);
    const shown = await ollama.show({ model });
    expect(shown.capabilities).toContain("tools");
    expect((await ollama.version()).version).toMatch(/^\d+\.\d+\.\d+$/);
    await ollama.generate({ model, prompt: "" });
    expect((await ollama.ps()).models.map(({ name }) => name)).toEqual(["m:latest"]);
  });

  test("generate and chat, whole and streamed", async () => {
    const generated = await ollama.generate({ model, prompt: "Hello", options });
    expect(generated).toMatchObject({ done: true, eval_count: 4 });
    let text = "";
    for await (const part of await ollama.generate({ model, prompt: "Hello", options, stream: true })) {
      text += part.response;
    }
    expect(text).toBe(generated.response ?? "");
    const chatted = await ollama.chat({ model, messages, options, think: false });
    let content = "";
    for await (const part of await ollama.chat({ model, messages, options, think: false, stream: true })) {
      content += part.message.content;
    }
    expect(content).toBe(chatted.message.content);
  });

  test("abort ends the stream and frees the slot", async () => {
    const stream = await ollama.chat({ model, messages, options: { num_predict: 100_000 }, stream: true });
    const reading = (async () => {
      for await (const part of stream) {
        if (part.message.content !== "" || part.message.thinking !== undefined) {
          stream.abort();
        }
      }
    })();
    expect(await messageOf(reading)).toContain("abort");
    await until(
      () => server.keeper.counts().inside === 0,
      () => "the slot is busy",
    );
  });

  test("tools, thinking, log-probabilities", async () => {
    expect((await ollama.chat({ model, messages, tools: [tool], options })).done_reason).toBe("length");
    expect((await ollama.chat({ model, messages, think: "low", options })).done).toBe(true);
    const told = await ollama.chat({
      model,
      messages,
      think: false,
      logprobs: true,
      top_logprobs: 2,
      options,
    });
    expect(told.logprobs?.[0]?.top_logprobs?.length).toBe(2);
  });

  test("structured output", async () => {
    const answer = await ollama.chat({
      model,
      messages,
      think: false,
      format: schema,
      options: { num_predict: 200, temperature: 0 },
    });
    expect(["x", "y"]).toContain(JSON.parse(answer.message.content).a);
  });

  test("errors and what is not offered", async () => {
    expect(await messageOf(ollama.chat({ model: "nope", messages }))).toBe("model 'nope' not found");
    expect(await messageOf(ollama.embed({ model, input: "x" }))).toContain("does not support embeddings");
    expect((await ollama.pull({ model })).status).toBe("success");
    expect(await messageOf(ollama.delete({ model }))).toContain("not supported");
  });
});

describe("openai", () => {
  const base = { model, messages, max_tokens: 4, temperature: 0, reasoning_effort: "none" as const };

  test("chat, whole and streamed, with its usage", async () => {
    const whole = await openai.chat.completions.create(base);
    expect(whole.usage?.completion_tokens).toBe(4);
    let text = "";
    let total = 0;
    const stream = await openai.chat.completions.create({
      ...base,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      total = chunk.usage?.total_tokens ?? total;
    }
    expect(text).toBe(whole.choices[0]?.message.content as string);
    expect(total).toBe(whole.usage?.total_tokens as number);
  });

  test("tools and structured output", async () => {
    const called = await openai.chat.completions.create({ ...base, tools: [tool] });
    expect(called.choices[0]?.finish_reason).toBe("length");
    const formed = await openai.chat.completions.create({
      ...base,
      max_tokens: 200,
      response_format: { type: "json_schema", json_schema: { name: "answer", schema, strict: true } },
    });
    expect(["x", "y"]).toContain(JSON.parse(formed.choices[0]?.message.content ?? "").a);
  });

  test("models, completions, responses, errors", async () => {
    expect((await openai.models.list()).data.map(({ id }) => id)).toEqual(["m:latest"]);
    expect(
      (await openai.completions.create({ model, prompt: "Hello", max_tokens: 4 })).usage?.completion_tokens,
    ).toBe(4);
    expect((await openai.responses.create({ model, input: "Hello", max_output_tokens: 4 })).status).toBe(
      "incomplete",
    );
    const types: string[] = [];
    for await (const event of await openai.responses.create({
      model,
      input: "Hello",
      max_output_tokens: 4,
      stream: true,
    })) {
      types.push(event.type);
    }
    expect(types[0]).toBe("response.created");
    expect(await messageOf(openai.chat.completions.create({ ...base, model: "nope" }))).toContain(
      "not found",
    );
    expect(await messageOf(openai.embeddings.create({ model, input: "x" }))).toContain(
      "does not support embeddings",
    );
  });
});

describe("anthropic", () => {
  const base = { model, messages, max_tokens: 4 };

  test("messages, whole and streamed", async () => {
    const whole = await anthropic.messages.create(base);
    expect(whole.stop_reason).toBe("max_tokens");
    const final = await anthropic.messages.stream(base).finalMessage();
    expect(final.usage.output_tokens).toBe(4);
    expect((await anthropic.messages.countTokens({ model, messages })).input_tokens).toBeGreaterThan(0);
  });

  test("tools and errors", async () => {
    const input_schema = { type: "object" as const, properties: { city: { type: "string" } } };
    const called = await anthropic.messages.create({
      ...base,
      tools: [{ name: "get_weather", description: "The weather somewhere", input_schema }],
    });
    expect(called.type).toBe("message");
    expect(await messageOf(anthropic.messages.create({ ...base, model: "nope" }))).toContain(
      "not_found_error",
    );
  });
});

// Ollama's and OpenAI's dialects against the engine itself: requests as clients write them go through the pure
// translation to a real model and back, so that what is translated is what the engine's core really says.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, openEngine } from "../../src/engine";
import { openModelFile } from "../../src/modelfile";
import { capabilitiesOf, fimTokensOf, noSettings, type ServedModel } from "../../src/ollama-model";
import { drive, type EngineCall, prepare } from "../../src/ollama-prepare";
import { type ReplyContext, renderReply, replyFor } from "../../src/ollama-reply";
import { parseChat, parseGenerate } from "../../src/ollama-request";
import { parseV1, prepareV1, type V1Endpoint, v1ReplyFor } from "../../src/openai";
import { chatLine, doneLine, generateLine, problemsOf } from "../api-schemas";
import { smolLm2OrSkip } from "../models";
import { writeThinker } from "./thinker";
import { planOf } from "./tiny";

/** What the tests look at in a line, an object or an event. */
interface Json {
  readonly model?: string;
  readonly created?: number;
  readonly id?: string;
  readonly type?: string;
  readonly done?: boolean;
  readonly done_reason?: string;
  readonly message?: { readonly content: string };
  readonly response?: string;
  readonly context?: readonly number[];
  readonly logprobs?: readonly { readonly token: string; readonly top_logprobs?: readonly object[] }[];
  readonly prompt_eval_count?: number;
  readonly prompt_eval_cached_count?: number;
  readonly eval_count?: number;
  readonly sequence_number?: number;
  readonly _debug_info?: { readonly rendered_template: string };
  readonly choices?: readonly { readonly message?: { readonly content: string } }[];
}

interface Subject {
  readonly engine: Engine;
  readonly model: ServedModel;
}

const contextTokens = 512;

async function openSubject(path: string, tokens: number): Promise<Subject> {
  const file = openModelFile(path);
  const fim = fimTokensOf(file.gguf.metadata, null);
  const engine = await openEngine(planOf(path, { contextTokens: tokens }));
  const { metadata } = file.gguf;
  const facts = { metadata, model: file.model, fim, hasProjector: false, canEmbed: false };
  return {
    engine,
    model: {
      name: "m:latest",
      files: file.files,
      digest: "0".repeat(64),
      modifiedAt: "2026-01-01T00:00:00Z",
      modifiedUnixSeconds: 1,
      model: file.model,
      metadata,
      projector: null,
      fim,
      capabilities: capabilitiesOf(facts),
      contextTokens: engine.info.contextTokens,
      trainedContextTokens: file.model.trainedContextTokens,
      canShift: false,
      settings: noSettings,
    },
  };
}

function asker({ engine }: Subject) {
  return async ({ route, body }: EngineCall): Promise<unknown> => {
    for await (const { data } of engine.request(route, body)) return data;
    throw new Error(`no answer from ${route}`);
  };
}

let ids = 0;
function context(): ReplyContext {
  const start = Bun.nanoseconds();
  return {
    stamp: () => "2026-01-01T00:00:00Z",
    nowNs: Bun.nanoseconds,
    receivedNs: start,
    newId: () => String(++ids).padStart(8, "a"),
  };
}

/** All lines of an answer; one where the request says `stream: false`. */
async function ollama(subject: Subject, dialect: "chat" | "generate", body: object): Promise<Json[]> {
  const fields = { model: "m", ...body };
  const work = dialect === "chat" ? parseChat(fields, subject.model) : parseGenerate(fields, subject.model);
  if (!("source" in work)) throw new Error("an empty prompt");
  const ask = asker(subject);
  const reply = replyFor(work, context());
  const prepared = await drive(prepare(work, subject.model), ask);
  if (work.kind === "debug-render") return [renderReply(prepared, "2026-01-01T00:00:00Z") as Json];
  reply.begin(prepared);
  const lines: object[] = [];
  for await (const chunk of subject.engine.request(prepared.route, prepared.body)) {
    lines.push(...reply.onChunk(chunk));
  }
  if (!work.stream) return [(await drive(reply.whole(), ask)) as Json];
  return [...lines, ...(await drive(reply.end(), ask))] as Json[];
}

async function v1(subject: Subject, endpoint: V1Endpoint, body: object): Promise<string | Json> {
  const work = parseV1(endpoint, { model: "m", ...body }, subject.model);
  const ask = asker(subject);
  const reply = v1ReplyFor(work, { nowUnixSeconds: 7, newId: context().newId });
  const prepared = await drive(prepareV1(work, subject.model), ask);
  reply.begin(prepared);
  let frames = "";
  if (prepared.kind === "run") {
    for await (const chunk of subject.engine.request(prepared.route, prepared.body)) {
      frames += reply.onChunk(chunk);
    }
  }
  return work.stream ? frames + reply.end() : (reply.whole() as Json);
}

/** The JSON of each frame, `[DONE]` as a type. */
function framesOf(text: string): Json[] {
  return text
    .split("\n\n")
    .filter((frame) => frame.includes("data: "))
    .map((frame) => {
      const data = frame.slice(frame.indexOf("data: ") + 6);
      return data === "[DONE]" ? { type: data } : (JSON.parse(data) as Json);
    });
}

const hi = [{ role: "user", content: "Say hi" }];
const greedy = { temperature: 0, seed: 1 };
/** `{"a":"x"}` in whatever spacing. */
const format = {
  type: "object",
  properties: { a: { enum: ["x"] } },
  required: ["a"],
};
const tool = {
  type: "function",
  function: {
    name: "weather",
    description: "the weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

let folder = "";
let tiny: Subject;

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "hypura-dialect-"));
  const path = join(folder, "thinker.gguf");
  writeThinker(path);
  tiny = await openSubject(path, contextTokens);
});

afterAll(async () => {
  await tiny?.engine.close();
  rmSync(folder, { recursive: true, force: true });
});

describe("a tiny model that thinks, calls tools and fills holes", () => {
  test("has the capabilities", () => {
    expect([...tiny.model.capabilities].sort()).toEqual(["completion", "insert", "thinking", "tools"]);
  });

  test("chat streams lines that keep to the schema, the last with exact counts", async () => {
    const lines = await ollama(tiny, "chat", { messages: hi, options: { ...greedy, num_predict: 8 } });
    expect(lines.flatMap((line) => problemsOf(chatLine, line))).toEqual([]);
    const last = lines.at(-1) as Json;
    expect(problemsOf(doneLine, last)).toEqual([]);
    expect(last).toMatchObject({ model: "m", done: true, done_reason: "length", eval_count: 8 });
    expect(lines.slice(0, -1).every((line) => line.done === false)).toBe(true);
  });

  test("chat as one object says the same", async () => {
    const body = { messages: hi, options: { ...greedy, num_predict: 8 } };
    const lines = await ollama(tiny, "chat", body);
    const [whole] = await ollama(tiny, "chat", { ...body, stream: false });
    const text = lines.map((line) => line.message?.content).join("");
    expect(whole).toMatchObject({ done: true, message: { role: "assistant", content: text } });
  });

  test("generate gives its context back, and continues from it by its very tokens", async () => {
    const first = await ollama(tiny, "generate", {
      prompt: "One",
      stream: false,
      think: false,
      options: { ...greedy, num_predict: 4 },
    });
    expect(first.flatMap((line) => problemsOf(generateLine, line))).toEqual([]);
    const before = first[0]?.context ?? [];
    expect(before.length).toBeGreaterThan(10);
    const [second] = await ollama(tiny, "generate", {
      prompt: "Two",
      context: before,
      stream: false,
      think: false,
      options: { ...greedy, num_predict: 4 },
    });
    const after = second?.context ?? [];
    expect(after.slice(0, before.length)).toEqual([...before]);
    expect(second?.prompt_eval_cached_count).toBeGreaterThan(0);
  });

  test("raw goes as it stands and gives no context", async () => {
    const [line] = await ollama(tiny, "generate", {
      prompt: "abc",
      raw: true,
      stream: false,
      options: { ...greedy, num_predict: 2 },
    });
    expect(line).toMatchObject({ done: true, eval_count: 2 });
    expect(line).not.toHaveProperty("context");
    expect(line?.prompt_eval_count).toBeLessThanOrEqual(3);
  });

  test("a hole is laid out of the model's own tokens", async () => {
    const [line] = await ollama(tiny, "generate", {
      prompt: "abc",
      suffix: "xyz",
      _debug_render_only: true,
    });
    expect(line?._debug_info).toMatchObject({ image_count: 0 });
    const [whole] = await ollama(tiny, "generate", {
      prompt: "abc",
      suffix: "xyz",
      stream: false,
      options: { num_predict: 2 },
    });
    expect(whole?.context?.filter((id) => id >= 10 && id <= 12)).toEqual(
      expect.arrayContaining([10, 11, 12]),
    );
  });

  test("the template sees system, thoughts and tools", async () => {
    const [line] = await ollama(tiny, "chat", {
      messages: [{ role: "system", content: "Be kind." }, ...hi],
      tools: [tool],
      think: false,
      _debug_render_only: true,
    });
    const prompt = line?._debug_info?.rendered_template ?? "";
    expect(prompt).toContain("Be kind.");
    expect(prompt).toContain('"name": "weather"');
    expect(prompt).toEndWith("<think>\n\n</think>\n\n");
  });

  test("tool calls and their results are rendered", async () => {
    const [line] = await ollama(tiny, "chat", {
      messages: [
        ...hi,
        { role: "assistant", tool_calls: [{ function: { name: "weather", arguments: { city: "Bern" } } }] },
        { role: "tool", content: "sunny" },
      ],
      tools: [tool],
      _debug_render_only: true,
    });
    const prompt = line?._debug_info?.rendered_template ?? "";
    expect(prompt).toContain('{"name": "weather", "arguments": {"city": "Bern"}}');
    expect(prompt).toContain("<tool_response>\nsunny\n</tool_response>");
  });

  test.each(["chat", "generate"] as const)("a format holds in %s, thinking or not", async (dialect) => {
    for (const think of [true, false]) {
      const prompt = dialect === "chat" ? { messages: hi } : { prompt: "Say hi" };
      const body = { ...prompt, think, format, stream: false, options: { seed: 3, num_predict: 200 } };
      const [line] = await ollama(tiny, dialect, body);
      const said = dialect === "chat" ? line?.message?.content : line?.response;
      if (line?.done_reason === "stop") {
        expect(JSON.parse(said ?? "")).toEqual({ a: "x" });
      } else {
        expect(line?.done_reason).toBe("length");
      }
    }
  });

  test("a schema that is none is the request's fault", async () => {
    const asked = ollama(tiny, "chat", { messages: hi, format: { type: "nonsense" } });
    expect(await asked.catch((error) => error)).toMatchObject({ status: 400 });
  });
});

describe("prompts that are too long", () => {
  const long = "word and other words ".repeat(120);
  const talk = [
    { role: "system", content: "Be kind." },
    { role: "user", content: `first ${"old ".repeat(130)}` },
    { role: "assistant", content: `yes ${"old ".repeat(130)}` },
    { role: "user", content: "the newest" },
  ];

  async function rendered(body: object): Promise<string> {
    const [line] = await ollama(tiny, "chat", { ...body, _debug_render_only: true });
    return line?._debug_info?.rendered_template ?? "";
  }

  test("lose their oldest messages, never the system's nor the last", async () => {
    const prompt = await rendered({ messages: talk });
    expect(prompt).toContain("Be kind.");
    expect(prompt).toContain("the newest");
    expect(prompt).not.toContain("first");
  });

  test.each([
    ["chat", { messages: talk, truncate: false }],
    ["chat", { messages: [{ role: "user", content: long }], shift: false }],
    ["chat", { messages: talk, truncate: false, shift: false, think: false }],
    ["generate", { prompt: long, truncate: false }],
    ["generate", { prompt: long, raw: true, shift: false }],
    ["generate", { prompt: long, suffix: "x", truncate: false }],
  ] as const)("are refused in %s with the sentence that clients know: %j", async (dialect, body) => {
    const error = await ollama(tiny, dialect, body).catch((thrown) => thrown);
    expect(error).toMatchObject({ status: 400 });
    expect(error.message).toMatch(
      /^request \(\d+ tokens\) exceeds the available context size \(512 tokens\), try increasing it$/,
    );
  });

  test.each([
    ["chat", { messages: [{ role: "user", content: long }] }],
    ["chat", { messages: [{ role: "system", content: long }, ...hi] }],
    ["generate", { prompt: long }],
    ["generate", { prompt: long, raw: true }],
    ["generate", { prompt: long, suffix: long }],
    ["generate", { prompt: long, context: Array.from({ length: 600 }, (_, i) => 20 + (i % 400)) }],
  ] as const)("are cut in %s when they may be, and half of the window is free", async (dialect, body) => {
    const [line] = await ollama(tiny, dialect, { ...body, stream: false, options: { num_predict: 3 } });
    const count = line?.prompt_eval_count;
    expect(count).toBeGreaterThan(120);
    expect(count).toBeLessThan(400);
    expect(line).toMatchObject({ done: true, eval_count: 3 });
  });

  test("num_ctx is a limit of the request: prompt and answer together stay within it", async () => {
    const [line] = await ollama(tiny, "generate", {
      prompt: "Count",
      stream: false,
      think: false,
      options: { num_ctx: 60, ...greedy },
    });
    const { prompt_eval_count: prompt, eval_count: answer } = line ?? {};
    expect((prompt ?? 0) + (answer ?? 0)).toBeLessThanOrEqual(60);
    if (line?.done_reason === "length") expect((prompt ?? 0) + (answer ?? 0)).toBe(60);
  });
});

describe("OpenAI's and Anthropic's dialects", () => {
  const max = { max_tokens: 6, seed: 1, temperature: 0 };

  test("chat: a stream with one id, a role, an end and [DONE]", async () => {
    const body = { messages: hi, stream: true, stream_options: { include_usage: true }, ...max };
    const frames = framesOf((await v1(tiny, "chat/completions", body)) as string);
    expect(frames.pop()).toEqual({ type: "[DONE]" });
    const usage = frames.pop();
    expect(usage).toMatchObject({ choices: [], usage: { completion_tokens: 6 } });
    expect(new Set(frames.map((frame) => `${frame.id} ${frame.created} ${frame.model}`)).size).toBe(1);
    expect(frames[0]).toMatchObject({ choices: [{ delta: { role: "assistant" }, finish_reason: null }] });
    expect(frames.at(-1)).toMatchObject({ choices: [{ delta: {}, finish_reason: "length" }] });
  });

  test("chat and completions as one object", async () => {
    expect(await v1(tiny, "chat/completions", { messages: hi, ...max })).toMatchObject({
      object: "chat.completion",
      model: "m",
      system_fingerprint: "fp_ollama",
      choices: [{ index: 0, message: { role: "assistant" }, finish_reason: "length" }],
    });
    expect(await v1(tiny, "completions", { prompt: "Say hi", ...max })).toMatchObject({
      object: "text_completion",
      choices: [{ index: 0, finish_reason: "length" }],
    });
  });

  test("responses: numbered events with places, cut short is said", async () => {
    const text = (await v1(tiny, "responses", { input: "hi", max_output_tokens: 5, stream: true })) as string;
    const frames = framesOf(text);
    expect(frames.map((frame) => frame.sequence_number)).toEqual([...frames.keys()]);
    expect(frames[0]).toMatchObject({ type: "response.created", response: { model: "m", output: [] } });
    expect(frames.at(-1)).toMatchObject({
      type: "response.incomplete",
      response: { status: "incomplete", incomplete_details: { reason: "max_output_tokens" } },
    });
    const deltas = frames.filter((frame) => String(frame.type).endsWith("_text.delta"));
    expect(deltas.length).toBeGreaterThan(0);
    for (const delta of deltas) expect(delta).toMatchObject({ output_index: 0, content_index: 0 });
  });

  test("messages: an id and a model of this dialect, stream and not", async () => {
    const body = { messages: hi, max_tokens: 5 };
    const whole = await v1(tiny, "messages", body);
    expect(whole).toMatchObject({ type: "message", model: "m", stop_reason: "max_tokens" });
    expect((whole as Json).id).toStartWith("msg_");
    const frames = framesOf((await v1(tiny, "messages", { ...body, stream: true })) as string);
    expect(frames[0]).toMatchObject({ type: "message_start", message: { model: "m" } });
    expect(frames.at(-1)).toMatchObject({ type: "message_stop" });
    expect(await v1(tiny, "messages/count_tokens", { messages: hi })).toHaveProperty("input_tokens");
  });

  test.each([
    ["chat/completions", { messages: [{ role: "user", content: "word ".repeat(400) }] }],
    ["completions", { prompt: "word ".repeat(400) }],
    ["messages", { messages: [{ role: "user", content: "word ".repeat(400) }], max_tokens: 5 }],
    ["responses", { input: "word ".repeat(400) }],
  ] as const)("%s refuses what is too long", async (endpoint, body) => {
    const error = await v1(tiny, endpoint, body).catch((thrown) => thrown);
    expect(error).toMatchObject({ status: 400 });
    expect(error.message).toContain("exceeds the available context size");
  });
});

describe("SmolLM2", () => {
  let real: Subject | null = null;
  beforeAll(async () => {
    const path = await smolLm2OrSkip();
    real = path === null ? null : await openSubject(path, 1024);
  });
  afterAll(() => real?.engine.close());

  test("every generated token has its log-probability, streamed or not, also while text is held back", async () => {
    if (real === null) return;
    const body = {
      prompt: "Count from one to ten.",
      logprobs: true,
      top_logprobs: 2,
      options: { ...greedy, num_predict: 10, stop: [" of a kind that never comes", "I'm so unlikely"] },
    };
    const lines = await ollama(real, "generate", body);
    const streamed = lines.flatMap((line) => line.logprobs ?? []);
    expect(streamed.length).toBe(10);
    expect(streamed.map(({ token }) => token).join("")).toBe(lines.map((line) => line.response).join(""));
    expect(streamed.every((entry) => entry.top_logprobs?.length === 2)).toBe(true);
    const [whole] = await ollama(real, "generate", { ...body, stream: false });
    expect(whole?.logprobs).toEqual(streamed);
  });

  test("a stop string ends the answer and is no part of it", async () => {
    if (real === null) return;
    const prompt = { messages: [{ role: "user", content: "Repeat: alpha beta gamma delta" }] };
    const [free] = await ollama(real, "chat", {
      ...prompt,
      stream: false,
      options: { ...greedy, num_predict: 30 },
    });
    const text = free?.message?.content ?? "";
    const stop = text.slice(8, 12);
    const [line] = await ollama(real, "chat", {
      ...prompt,
      stream: false,
      options: { ...greedy, num_predict: 30, stop },
    });
    expect(line).toMatchObject({ done_reason: "stop" });
    expect(line?.message?.content).toBe(text.slice(0, text.indexOf(stop)));
  });

  test("a real answer ends by itself, the same each time, through chat and through OpenAI's", async () => {
    if (real === null) return;
    const question = [{ role: "user", content: "What is 2+2? One word." }];
    const [line] = await ollama(real, "chat", {
      messages: question,
      stream: false,
      options: { ...greedy, num_predict: 200 },
    });
    expect(line).toMatchObject({ done_reason: "stop" });
    const other = await v1(real, "chat/completions", { messages: question, temperature: 0, max_tokens: 200 });
    expect((other as Json).choices?.[0]?.message?.content).toBe(line?.message?.content);
  });
});

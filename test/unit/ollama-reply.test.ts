// Answers: the engine's chunks, in the shapes that its core gives them, to lines. What a real engine says is in
// test/engine/dialect.test.ts; here are the cases that a tiny model cannot be brought to (tool calls above all).

import { describe, expect, test } from "bun:test";
import { ThoughtSplitter } from "../../src/answer-parts";
import { HypuraError } from "../../src/errors";
import {
  drive,
  type EngineCall,
  type Prepared,
  prepare,
  type Steps,
  shortened,
  truncations,
} from "../../src/ollama-prepare";
import { errorReply, renderReply, replyFor, residenceReply } from "../../src/ollama-reply";
import { type GenerateWork, parseChat, parseGenerate } from "../../src/ollama-request";
import type { Fields } from "../../src/wire-body";
import { serverBusy, WireError, wireErrorOf } from "../../src/wire-error";
import {
  chatLine,
  doneLine,
  errorReply as errorSchema,
  generateLine,
  problemsOf,
  renderLine,
  residenceReply as residenceSchema,
} from "../api-schemas";
import { openRandom } from "../fixtures/random";
import { served, thinker } from "./served";

const plain = served();
const stamp = "2026-01-01T00:00:00.5Z";
const timings = { cache_n: 20, prompt_n: 6, prompt_ms: 342.546, predicted_n: 9, predicted_ms: 1.5 };

function work(dialect: "chat" | "generate", body: Fields = {}, model = plain): GenerateWork {
  const parsed =
    dialect === "chat"
      ? parseChat({ model: "M", messages: [{ role: "user", content: "x" }], ...body }, model)
      : parseGenerate({ model: "M", prompt: "x", ...body }, model);
  if (!("source" in parsed)) throw new Error("an empty prompt");
  return parsed;
}

function prepared(of: GenerateWork, more: Partial<Prepared> = {}): Prepared {
  return {
    work: of,
    route: "POST /v1/chat/completions",
    body: { messages: [] },
    promptTokens: 26,
    promptIds: null,
    messages: [],
    promptText: "<user>x<assistant>",
    splitThoughts: "no",
    ...more,
  };
}

/** One chunk of the chat route. */
function delta(fields: object, more: object = {}): { data: object } {
  return { data: { choices: [{ index: 0, finish_reason: null, delta: fields, ...more }] } };
}

function finish(reason: string): { data: object } {
  return { data: { choices: [{ index: 0, finish_reason: reason, delta: {} }], timings } };
}

const role = delta({ role: "assistant", content: null });

function call(index: number, fields: { name?: string; arguments?: string; id?: string }): { data: object } {
  const { id, ...rest } = fields;
  return delta({
    tool_calls: [{ index, ...(id !== undefined && { id, type: "function" }), function: rest }],
  });
}

/** A fake engine: a token for every character. */
async function ask({ route, body }: EngineCall): Promise<unknown> {
  switch (route) {
    case "POST /tokenize":
      return { tokens: [...(body as { content: string }).content].map((one) => one.charCodeAt(0)) };
    case "POST /detokenize":
      return { content: String.fromCharCode(...(body as { tokens: number[] }).tokens) };
    case "POST /apply-template":
      return {
        prompt: (body as { messages: { role: string; content: string }[] }).messages
          .map((one) => `${one.role}:${one.content};`)
          .join(""),
      };
    default:
      throw new Error(route);
  }
}

let clock = 0;
function replyOf(of: GenerateWork, as: Partial<Prepared> = {}) {
  let id = 0;
  clock = 1_000_000;
  const reply = replyFor(of, {
    stamp: () => stamp,
    nowNs: () => clock,
    receivedNs: 0,
    newId: () => `id00000${++id}`,
  });
  return { reply, begin: () => reply.begin(prepared(of, as)) };
}

async function lines(of: GenerateWork, chunks: readonly { data: object }[], as: Partial<Prepared> = {}) {
  const { reply, begin } = replyOf(of, as);
  begin();
  const all = chunks.flatMap((chunk) => reply.onChunk(chunk));
  clock = 5_000_000;
  return [...all, ...(await drive(reply.end(), ask))] as Record<string, unknown>[];
}

async function whole(of: GenerateWork, chunks: readonly { data: object }[], as: Partial<Prepared> = {}) {
  const { reply, begin } = replyOf(of, as);
  begin();
  for (const chunk of chunks) reply.onChunk(chunk);
  return (await drive(reply.whole(), ask)) as Record<string, unknown>;
}

describe("lines", () => {
  const hello = [role, delta({ content: "Hel" }), delta({ content: "lo" }), finish("stop")];

  test("of chat", async () => {
    const all = await lines(work("chat"), hello);
    expect(all.flatMap((line) => problemsOf(chatLine, line))).toEqual([]);
    expect(all).toEqual([
      { model: "M", created_at: stamp, message: { role: "assistant", content: "Hel" }, done: false },
      { model: "M", created_at: stamp, message: { role: "assistant", content: "lo" }, done: false },
      {
        model: "M",
        created_at: stamp,
        message: { role: "assistant", content: "" },
        done: true,
        done_reason: "stop",
        total_duration: 5_000_000,
        load_duration: 1_000_000,
        prompt_eval_count: 26,
        prompt_eval_cached_count: 20,
        prompt_eval_duration: 342_546_000,
        eval_count: 9,
        eval_duration: 1_500_000,
      },
    ]);
    expect(problemsOf(doneLine, all.at(-1))).toEqual([]);
  });

  test("of generate, with the context of prompt and answer", async () => {
    const all = await lines(work("generate"), hello);
    expect(all.flatMap((line) => problemsOf(generateLine, line))).toEqual([]);
    const last = all.at(-1) as { context: number[] };
    expect(String.fromCharCode(...last.context)).toBe("<user>x<assistant>Hello");
  });

  test("as one object", async () => {
    const one = await whole(work("chat"), [role, delta({ reasoning_content: "hm" }), ...hello]);
    expect(one).toMatchObject({ message: { content: "Hello", thinking: "hm" }, done: true });
    expect(problemsOf(chatLine, one)).toEqual([]);
  });

  test("thoughts come in lines of their own before the text", async () => {
    const all = await lines(work("generate"), [role, delta({ reasoning_content: "hm" }), ...hello]);
    expect(all[0]).toMatchObject({ response: "", thinking: "hm", done: false });
    expect(all[1]).not.toHaveProperty("thinking");
  });

  test("a heartbeat is an empty line", () => {
    expect(replyOf(work("chat")).reply.heartbeat()).toEqual({
      model: "M",
      created_at: stamp,
      message: { role: "assistant", content: "" },
      done: false,
    });
    expect(problemsOf(generateLine, replyOf(work("generate")).reply.heartbeat())).toEqual([]);
  });

  test("the limit is the reason where it was", async () => {
    expect((await lines(work("chat"), [role, finish("length")])).at(-1)).toMatchObject({
      done_reason: "length",
    });
  });

  test("raw gives no context", async () => {
    const as = { route: "POST /completion", body: { prompt: [1] } } as const;
    const chunk = { data: { content: "a", tokens: [1], stop: false } };
    const last = { data: { content: "", tokens: [], stop: true, stop_type: "eos", timings } };
    const all = await lines(work("generate", { raw: true }), [chunk, last], as);
    expect(all.at(-1)).not.toHaveProperty("context");
    expect(all[0]).toMatchObject({ response: "a" });
  });

  test("an engine that ends without an end is an error", async () => {
    expect(await lines(work("chat"), [role]).catch((error) => error)).toMatchObject({ status: 500 });
  });

  test.each(["chat", "generate"] as const)("of an empty prompt and of a rendering in %s", (dialect) => {
    const common = { dialect, asked: "M", keepAliveSeconds: null };
    const load = residenceReply({ kind: "load", ...common }, stamp);
    expect(problemsOf(residenceSchema(dialect), load)).toEqual([]);
    expect(load).toMatchObject({ done: true, done_reason: "load" });
    expect(residenceReply({ kind: "unload", ...common }, stamp)).toMatchObject({ done_reason: "unload" });
    const render = renderReply(prepared(work(dialect)), stamp);
    expect(problemsOf(renderLine(dialect), render)).toEqual([]);
  });
});

describe("tool calls", () => {
  const pieces = [
    role,
    delta({ content: "Let me see." }),
    call(0, { id: "x", name: "f", arguments: "" }),
    call(0, { arguments: '{"a":' }),
    call(0, { arguments: '[1,{"b":"}"}]}' }),
    call(1, { id: "y", name: "g" }),
    finish("tool_calls"),
  ];

  test("arrive whole, each in a line before the last, with objects", async () => {
    const all = await lines(work("chat"), pieces);
    expect(all.flatMap((line) => problemsOf(chatLine, line))).toEqual([]);
    expect(all.map((line) => line["message"])).toEqual([
      { role: "assistant", content: "Let me see." },
      {
        role: "assistant",
        content: "",
        tool_calls: [
          { id: "call_id000001", function: { index: 0, name: "f", arguments: { a: [1, { b: "}" }] } } },
        ],
      },
      {
        role: "assistant",
        content: "",
        tool_calls: [{ id: "call_id000002", function: { index: 1, name: "g", arguments: {} } }],
      },
      { role: "assistant", content: "" },
    ]);
    expect(all.at(-1)).toMatchObject({ done: true, done_reason: "stop" });
    expect(all.slice(0, -1).every((line) => line["done"] === false)).toBe(true);
  });

  test("are all in the one object", async () => {
    const one = await whole(work("chat"), pieces);
    expect(one).toMatchObject({
      message: {
        content: "Let me see.",
        tool_calls: [{ function: { name: "f" } }, { function: { name: "g" } }],
      },
      done_reason: "stop",
    });
  });

  test("that the limit cut are nobody's", async () => {
    const cut = [role, call(0, { id: "x", name: "f", arguments: '{"a":' }), finish("length")];
    const all = await lines(work("chat"), cut);
    expect(all).toHaveLength(1);
    expect(all[0]).toMatchObject({ done_reason: "length", message: { content: "" } });
  });

  test("whose arguments are no object are an error that says so", async () => {
    const bad = [role, call(0, { id: "x", name: "f", arguments: "[1]" }), finish("tool_calls")];
    const error = await lines(work("chat"), bad).catch((thrown) => thrown);
    expect(error).toMatchObject({ status: 500 });
    expect(error.message).toContain('"f"');
  });
});

describe("log-probabilities", () => {
  const top = [
    { id: 7, token: "A", bytes: [65], logprob: -0.5 },
    { id: 8, token: "B", bytes: [66], logprob: -1.5 },
    { id: 9, token: "", bytes: [], logprob: -2 },
  ];
  const entry = (id: number, token: string) => ({ id, token, bytes: [], logprob: -1.5, top_logprobs: top });
  const plainChunk = (content: string, id: number, token: string) => ({
    data: { content, tokens: [id], stop: false, completion_probabilities: [entry(id, token)] },
  });
  const last = { data: { content: "", tokens: [], stop: true, stop_type: "eos", timings } };
  const as = { route: "POST /completion", body: { prompt: [1] } } as const;

  test("a token that was held back has its own text, the end of the answer has none", async () => {
    const chunks = [plainChunk("", 8, ""), plainChunk("BA", 7, "BA"), plainChunk("", 9, ""), last];
    const all = await lines(work("generate", { logprobs: true, top_logprobs: 1 }), chunks, as);
    expect(all.flatMap((line) => problemsOf(generateLine, line))).toEqual([]);
    expect(all.map((line) => [line["response"], line["logprobs"]])).toEqual([
      [
        "",
        [
          {
            token: "B",
            logprob: -1.5,
            bytes: [66],
            top_logprobs: [{ token: "A", bytes: [65], logprob: -0.5 }],
          },
        ],
      ],
      [
        "BA",
        [
          {
            token: "A",
            logprob: -1.5,
            bytes: [65],
            top_logprobs: [{ token: "A", bytes: [65], logprob: -0.5 }],
          },
        ],
      ],
      ["", undefined],
    ]);
  });

  test("without top_logprobs there are no alternatives", async () => {
    const all = await lines(work("generate", { logprobs: true }), [plainChunk("A", 7, "A"), last], as);
    expect(all[0]?.["logprobs"]).toEqual([{ token: "A", logprob: -1.5, bytes: [65] }]);
  });

  test("chat's are read too", async () => {
    const chunk = delta({ content: "A" }, { logprobs: { content: [entry(7, "A")] } });
    const one = await whole(work("chat", { logprobs: true }), [role, chunk, finish("stop")]);
    expect(one["logprobs"]).toHaveLength(1);
  });
});

describe("thoughts in running text", () => {
  test.each<[string, boolean, string, string]>([
    ["<think>\nhm so\n</think>\n\nHello there", false, "hm so", "Hello there"],
    ["hm so\n</think>\n\nHello", true, "hm so", "Hello"],
    [" \n<think>a</think>b", false, "a", "b"],
    ["no thoughts <think>x</think>", false, "", "no thoughts <think>x</think>"],
    ["<think>never closed ", false, "never closed", ""],
    ["<think></think>x", false, "", "x"],
    ["<thin", false, "", "<thin"],
    ["<think>a < b </thin </think> c", false, "a < b </thin", "c"],
    ["", false, "", ""],
    ["  indented", false, "", "  indented"],
  ])("%j (open: %p), cut anywhere", (all, isOpen, thinking, words) => {
    const random = openRandom(5);
    for (let round = 0; round < 50; round++) {
      const splitter = new ThoughtSplitter(isOpen);
      const said = { thinking: "", text: "" };
      const add = (piece: { thinking: string; text: string }) => {
        said.thinking += piece.thinking;
        said.text += piece.text;
      };
      for (let at = 0; at < all.length; ) {
        const length = round === 0 ? 1 : 1 + random.below(all.length);
        add(splitter.add(all.slice(at, at + length)));
        at += length;
      }
      add(splitter.finish());
      expect(said).toEqual({ thinking, text: words });
    }
  });
});

describe("preparation", () => {
  function run(of: GenerateWork, model = plain): Promise<Prepared> {
    return drive(prepare(of, model), ask);
  }

  test("chat goes to the chat route, with a limit", async () => {
    const of = work("chat", { options: { num_ctx: 100, seed: 3 }, format: "json" });
    expect(await run(of)).toMatchObject({
      route: "POST /v1/chat/completions",
      promptTokens: 7,
      promptText: "user:x;",
      body: {
        messages: [{ role: "user", content: "x" }],
        response_format: { type: "json_schema", json_schema: { schema: { type: "object" } } },
        n_predict: 93,
        seed: 3,
        stream: true,
        cache_prompt: true,
      },
    });
  });

  test.each<[Fields, boolean, number]>([
    [{ num_predict: 5 }, false, 5],
    [{}, false, 93],
    [{ num_predict: 0 }, false, 0],
    [{ num_predict: 1e6 }, false, 93],
    [{ num_predict: 1e6 }, true, 1000],
    [{ num_predict: -2 }, true, 1000],
    [{ num_predict: 50 }, true, 50],
  ])("options %j, an engine that shifts: %p: at most %d tokens", async (options, canShift, most) => {
    const of = work("chat", { options: { num_ctx: 100, ...options } });
    expect((await run(of, { ...plain, canShift })).body).toMatchObject({ n_predict: most });
  });

  test("think goes to the template", async () => {
    const model = thinker();
    const body = async (think: unknown, one = model) => (await run(work("chat", { think }, one), one)).body;
    expect(await body(false)).toMatchObject({ chat_template_kwargs: { enable_thinking: false } });
    expect(await body(false)).not.toHaveProperty("reasoning_effort");
    expect(await body("max")).toMatchObject({
      chat_template_kwargs: { enable_thinking: true },
      reasoning_effort: "max",
    });
    expect(await body(undefined)).toMatchObject({ chat_template_kwargs: { enable_thinking: true } });
    expect(await body(undefined, plain)).not.toHaveProperty("chat_template_kwargs");
    const oss = { ...model, model: { ...model.model, architecture: "gpt-oss" } };
    expect(await body("max", oss)).toMatchObject({ reasoning_effort: "high" });
    expect(await body(false, oss)).toMatchObject({ reasoning_effort: "low" });
  });

  test("context stands before the rendered prompt, by its ids; one BOS", async () => {
    const bos = plain.metadata.get("tokenizer.ggml.bos_token_id");
    expect(bos).toBe(0);
    const of = work("generate", { context: [0, 0, 5] });
    expect(await run(of)).toMatchObject({
      route: "POST /completion",
      body: { prompt: [0, 5, ...[..."user:x;"].map((one) => one.charCodeAt(0))] },
      promptTokens: 9,
    });
  });

  test("log-probabilities go to the plain route, unless tools or thoughts under a format need the other", async () => {
    const model = thinker();
    const route = async (body: Fields) =>
      (await run(work("chat", { logprobs: true, ...body }, model), model)).route;
    expect(await route({})).toBe("POST /completion");
    expect(await route({ format: "json" })).toBe("POST /v1/chat/completions");
    expect(await route({ format: "json", think: false })).toBe("POST /completion");
    expect(await route({ tools: [{ type: "function", function: { name: "f" } }] })).toBe(
      "POST /v1/chat/completions",
    );
    const oss = served([], { capabilities: ["completion", "thinking"] });
    expect((await run(work("chat", { logprobs: true }, oss), oss)).route).toBe("POST /v1/chat/completions");
  });

  test("what the template refuses is the request's fault; a dead engine is not", async () => {
    const refuse = (error: Error) => drive(prepare(work("chat"), plain), () => Promise.reject(error));
    const refused = Object.assign(new HypuraError("request", "no such role"), { status: 500 });
    expect(await refuse(refused).catch((error) => error)).toMatchObject({
      status: 400,
      message: "no such role",
    });
    const dead = new HypuraError("engine", "gone");
    expect(await refuse(dead).catch((error) => error)).toBe(dead);
    const busy = Object.assign(new HypuraError("request", "loading"), { status: 503 });
    expect(await refuse(busy).catch((error) => error)).toBe(busy);
  });

  test("what may be dropped of a conversation", () => {
    const talk = "s1 u1 a1 u2 s2 a2 u3".split(" ").map((name) => ({
      role: { s: "system", u: "user", a: "assistant" }[name[0] ?? ""] ?? "",
      content: name,
    }));
    const names = truncations(talk).map((list) => list.map(({ content }) => content).join(" "));
    expect(names).toEqual(["s1 u2 s2 a2 u3", "s1 s2 u3"]);
    expect(truncations([{ role: "user", content: "x" }])).toEqual([]);
    expect(truncations([{ role: "system", content: "x" }])).toEqual([]);
  });

  test("the longest rest of a conversation that fits is kept", async () => {
    const messages = Array.from({ length: 41 }, (_, index) => ({
      role: index % 2 === 0 ? "user" : "assistant",
      content: `m${index}`.padEnd(20, "."),
    }));
    const { body, promptTokens } = await run(work("chat", { messages, options: { num_ctx: 256 } }));
    const kept = (body as { messages: { role: string; content: string }[] }).messages;
    expect(kept.at(-1)?.content).toStartWith("m40");
    expect(kept[0]?.role).toBe("user");
    expect(promptTokens).toBeLessThan(256);
    // Two messages more would not have fitted.
    expect(promptTokens + 26 + 31).toBeGreaterThanOrEqual(256);
  });

  test("a vector is cut to length 1", () => {
    expect(shortened([3, 4, 12], 2)).toEqual([0.6, 0.8]);
    expect(shortened([0, 0], 1)).toEqual([0]);
  });
});

describe("errors", () => {
  const request = (status: number) => Object.assign(new HypuraError("request", "x"), { status });
  test.each<[string, () => unknown, number, RegExp]>([
    ["a refusal", () => new WireError(418, "x"), 418, /^x$/],
    ["cancelled", () => new HypuraError("cancelled", "x"), 499, /^request canceled$/],
    [
      "engine",
      () => new HypuraError("engine", "SIGSEGV"),
      500,
      /^model runner has unexpectedly stopped, this/,
    ],
    ["memory", () => new HypuraError("not-enough-memory", "lower --context"), 500, /^lower --context$/],
    ["the engine's 400", () => request(400), 400, /^x$/],
    ["an impossible status", () => request(9), 500, /^x$/],
    ["a mistake", () => new TypeError("secret of the house"), 500, /^internal error$/],
    [
      "a full line",
      () => serverBusy,
      503,
      /^server busy, please try again\. {2}maximum pending requests exceeded$/,
    ],
  ])("%s", (_, make, status, message) => {
    const error = make();
    const wire = wireErrorOf(error);
    expect(wire.status).toBe(status);
    expect(wire.message).toMatch(message);
    expect(problemsOf(errorSchema, errorReply(wire))).toEqual([]);
  });

  test("steps see the error of their own question and go on", async () => {
    function* careful(): Steps<string> {
      try {
        yield { route: "a", body: {} };
      } catch {
        return String(yield { route: "b", body: {} });
      }
      return "no error";
    }
    const answer = drive(careful(), async ({ route }) => {
      if (route === "a") throw new Error("no");
      return "second";
    });
    expect(await answer).toBe("second");
  });
});

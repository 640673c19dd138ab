// The server over a real socket and a real engine: answers, the line before them, clients that leave, models that
// take turns, engines that are killed or slow, and its end.

import { afterAll, beforeAll, describe, expect, spyOn, test } from "bun:test";
import { connect } from "node:net";
import { openChildEngine } from "../../src/child";
import { openEngine } from "../../src/engine";
import { generate } from "../../src/generate";
import type { LibraryModel } from "../../src/library";
import { totalBytes } from "../../src/plan";
import { until } from "../engine/process";
import {
  allLines,
  chatBody,
  type Line,
  linesOf,
  post,
  scratchFolder,
  startServer,
  stopServers,
  type TestServer,
  testModels,
  textOf,
} from "./served";

const folder = scratchFolder();
let files: { readonly endless: string; readonly experts: string } = { endless: "", experts: "" };

afterAll(stopServers);

beforeAll(async () => {
  files = await testModels(folder);
});

async function json(response: Response): Promise<Record<string, unknown>> {
  return (await response.json()) as Record<string, unknown>;
}

async function running(
  server: TestServer,
): Promise<readonly { readonly name: string; readonly expires_at: string }[]> {
  const { models } = await json(await fetch(`${server.url}/api/ps`));
  return models as readonly { readonly name: string; readonly expires_at: string }[];
}

function idle(server: TestServer): Promise<void> {
  return until(
    () => server.keeper.counts().inside === 0 && server.keeper.counts().waiting === 0,
    () => JSON.stringify(server.keeper.counts()),
    10,
  );
}

/** The first line that says something: the model answers. */
async function firstWord(lines: AsyncIterator<Line>): Promise<Line> {
  for (;;) {
    const { value, done } = await lines.next();
    if (done) {
      throw new Error("the stream ended before its first word");
    }
    if (value.error !== undefined || value.message?.content !== "") {
      return value;
    }
  }
}

describe("answers", () => {
  test("streamed and whole are the same text, as is the second time", async () => {
    const server = await startServer([files.endless]);
    const response = await post(`${server.url}/api/chat`, chatBody("endless", 40));
    expect(response.status).toBe(200);
    expect(response.headers.get("content-type")).toBe("application/x-ndjson");
    expect(response.headers.get("x-accel-buffering")).toBe("no");
    const lines = await allLines(response);
    expect(lines.map(({ done }) => done)).toEqual([...Array(lines.length - 1).fill(false), true]);
    expect(lines[0]).toMatchObject({
      model: "endless",
      done: false,
      message: { role: "assistant", content: "" },
    });
    expect(lines.at(-1)).toMatchObject({ done_reason: "length", eval_count: 40 });
    const whole = await post(`${server.url}/api/chat`, chatBody("endless", 40, { stream: false }));
    expect(whole.headers.get("content-type")).toBe("application/json; charset=utf-8");
    const object = (await whole.json()) as Line;
    expect(object.message?.content).toBe(textOf(lines));
    expect(object).toMatchObject({ done: true, done_reason: "length", eval_count: 40 });
    expect(object.prompt_eval_count).toBe(lines.at(-1)?.prompt_eval_count as number);
  });

  test.each(["resident", "stream"] as const)("of a %s model are those of `hypura run`", async (mode) => {
    const limits = mode === "stream" ? { mode, memoryBytes: 175_000_000 } : { mode };
    const server = await startServer([files.experts], { limits });
    const plan = await server.models[0]?.plan();
    expect(plan?.mode).toBe(mode === "stream" ? "expert-streaming" : "full-resident");
    if (plan === undefined) {
      throw new Error("no plan");
    }
    const here = await openEngine(plan);
    let text = "";
    const messages = [{ role: "user", content: "Tell me a story." }] as const;
    // Ollama's defaults beside the temperature change nothing where the likeliest token is taken.
    for await (const piece of generate(here, { messages }, { maxTokens: 60, temperature: 0 })) {
      text += piece.type === "text" ? piece.text : "";
    }
    await here.close();
    const lines = await allLines(await post(`${server.url}/api/chat`, chatBody("experts", 60)));
    expect(textOf(lines)).toBe(text);
    if (mode === "stream") {
      const metrics = await (await fetch(`${server.url}/metrics`)).text();
      expect(metrics).toMatch(/hypura_strides_total\{[^}]*result="miss"\} [1-9]/);
      expect(metrics).toContain('hypura_memory_bytes{model="experts:latest",tier="nvme"}');
    }
  });

  test("that run together are each their own", async () => {
    const server = await startServer([files.endless], { parallel: 3 });
    const ask = async (word: string): Promise<string> => {
      const body = {
        model: "endless",
        prompt: word,
        raw: true,
        options: { num_predict: 50, temperature: 0 },
      };
      return textOf(await allLines(await post(`${server.url}/api/generate`, body)));
    };
    const words = ["one", "two", "three", "four", "five", "six"];
    const alone: string[] = [];
    for (const word of words) {
      alone.push(await ask(word));
    }
    expect(new Set(alone).size).toBeGreaterThan(1);
    expect(await Promise.all(words.map(ask))).toEqual(alone);
  });

  test("in the dialects under /v1", async () => {
    const server = await startServer([files.endless]);
    const messages = [{ role: "user", content: "Hi" }];
    const body = { model: "endless", messages, max_tokens: 8, temperature: 0 };
    const chat = await json(await post(`${server.url}/v1/chat/completions`, body));
    const [choice] = chat["choices"] as readonly { readonly message: { readonly content: string } }[];
    expect(choice?.message.content.length).toBeGreaterThan(0);
    const stream = await post(`${server.url}/v1/chat/completions`, { ...body, stream: true });
    expect(stream.headers.get("content-type")).toBe("text/event-stream");
    const frames = (await stream.text()).split("\n\n").filter((frame) => frame.startsWith("data: {"));
    const deltas = frames.map((frame) => JSON.parse(frame.slice(6)).choices[0]?.delta.content ?? "");
    expect(deltas.join("")).toBe(choice?.message.content as string);
    const message = await json(await post(`${server.url}/v1/messages`, body));
    expect(message).toMatchObject({ type: "message", stop_reason: "max_tokens" });
    const answer = await json(
      await post(`${server.url}/v1/responses`, { model: "endless", input: "Hi", max_output_tokens: 8 }),
    );
    expect(answer).toMatchObject({ object: "response", status: "incomplete" });
    const counted = await json(await post(`${server.url}/v1/messages/count_tokens`, body));
    expect(counted["input_tokens"]).toBeGreaterThan(0);
  });

  test("a prompt that is too long is refused with a status, in every dialect", async () => {
    const server = await startServer([files.endless], { limits: { contextTokens: 256 } });
    const content = "word ".repeat(2000);
    const messages = [{ role: "user", content }];
    const asked: readonly (readonly [string, object])[] = [
      ["/api/chat", { messages, truncate: false }],
      ["/api/generate", { prompt: content, truncate: false }],
      ["/v1/chat/completions", { messages, stream: true }],
      ["/v1/messages", { messages, stream: true, max_tokens: 9 }],
      ["/v1/responses", { input: content, stream: true }],
    ];
    for (const [path, body] of asked) {
      const response = await post(server.url + path, { model: "endless", ...body });
      expect([path, response.status]).toEqual([path, 400]);
      const text = await response.text();
      expect(text).toMatch(/request \(\d+ tokens\) exceeds the available context size \(256 tokens\)/);
    }
    await idle(server);
  });
});

describe("a full context", () => {
  const limits = { contextTokens: 256 } as const;

  test("loses its older half and goes on, unless the request says no", async () => {
    const server = await startServer([files.endless], { limits });
    const ask = async (more: object) =>
      (await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 600, more)))).at(-1);
    expect(await ask({})).toMatchObject({ done_reason: "length", eval_count: 600 });
    const cut = await ask({ shift: false });
    expect(cut?.done_reason).toBe("length");
    expect((cut?.eval_count ?? 0) + (cut?.prompt_eval_count ?? 0)).toBe(256);
    // -1 is as long as Ollama lets it be: ten contexts.
    const long = { options: { num_predict: -1, num_ctx: 64, temperature: 0 } };
    expect(await ask(long)).toMatchObject({ done_reason: "length", eval_count: 640 });
    await server.stop();
  });

  test("ends an answer of OpenAI's and Anthropic's dialects", async () => {
    const server = await startServer([files.endless], { limits });
    const messages = [{ role: "user", content: "Tell me a story." }];
    const ask = async (path: string, body: object) =>
      json(await post(server.url + path, { model: "endless", ...body }));
    const chat = await ask("/v1/chat/completions", { messages });
    expect(chat).toMatchObject({ choices: [{ finish_reason: "length" }], usage: { total_tokens: 256 } });
    const message = await ask("/v1/messages", { messages, max_tokens: 5000 });
    expect(message).toMatchObject({ stop_reason: "max_tokens" });
    const { input_tokens: input, output_tokens: output } = message["usage"] as Record<string, number>;
    expect((input ?? 0) + (output ?? 0)).toBeLessThanOrEqual(257);
    const response = await ask("/v1/responses", { input: "Tell me a story." });
    const { output_tokens: tokens } = response["usage"] as Record<string, number>;
    expect(tokens).toBeLessThanOrEqual(256);
    await server.stop();
  });

  test("goes on with the same words where weights are streamed", async () => {
    const ask = async (mode: "resident" | "stream") => {
      const more = mode === "stream" ? { mode, memoryBytes: 175_000_000 } : { mode };
      const server = await startServer([files.experts], {
        limits: { ...limits, ...more },
        open: (plan, how) => openChildEngine({ ...plan, repack: false }, how), // which changes last bits
      });
      const lines = await allLines(await post(`${server.url}/api/chat`, chatBody("experts", 400)));
      expect(server.keeper.residence()?.info.canShift).toBe(true);
      await server.stop();
      return textOf(lines);
    };
    const text = await ask("resident");
    expect(text.length).toBeGreaterThan(400);
    expect(await ask("stream")).toBe(text);
  });
});

describe("what the next plan learns", () => {
  test("is an answer of eight tokens or more that had the engine to itself", async () => {
    const limits = { mode: "stream", memoryBytes: 175_000_000 } as const;
    const server = await startServer([files.experts], { limits, parallel: 2 });
    const remember = spyOn(server.models[0] as LibraryModel, "remember").mockImplementation(() => {});
    const ask = async (count: number, more: object = {}) =>
      (await post(`${server.url}/api/chat`, chatBody("experts", count, more))).text();
    await ask(8);
    expect(remember).toHaveBeenCalledTimes(0); // the first token came with the prompt
    await ask(20);
    await until(
      () => remember.mock.calls.length === 1,
      () => "it was not remembered",
    );
    const [plan, decoded, streaming] = remember.mock.calls[0] as Parameters<LibraryModel["remember"]>;
    expect(plan.mode).toBe("expert-streaming");
    expect(decoded.tokens).toBe(19);
    expect(decoded.seconds).toBeGreaterThan(0);
    expect((streaming?.hits ?? 0) + (streaming?.lateHits ?? 0) + (streaming?.misses ?? 0)).toBeGreaterThan(0);
    expect(streaming?.passes).toBeLessThanOrEqual(20);
    await ask(20, { stream: false });
    await until(
      () => remember.mock.calls.length === 2,
      () => "it was not remembered",
    );
    await Promise.all([ask(40), ask(40)]);
    expect(remember).toHaveBeenCalledTimes(2);
  });
});

describe("the line", () => {
  test("is bounded: beyond it 503 in Ollama's words, for every dialect", async () => {
    const server = await startServer([files.endless], { maxQueue: 1 });
    const stop = new AbortController();
    const first = linesOf(
      await post(`${server.url}/api/chat`, chatBody("endless", 100_000), { signal: stop.signal }),
    );
    await firstWord(first);
    const waiting = post(`${server.url}/api/chat`, chatBody("endless", 3));
    await until(
      () => server.keeper.counts().waiting === 1,
      () => "nobody waits",
    );
    const refused = await post(`${server.url}/api/chat`, chatBody("endless", 3));
    expect(refused.status).toBe(503);
    expect(await json(refused)).toEqual({
      error: "server busy, please try again.  maximum pending requests exceeded",
    });
    const other = await post(`${server.url}/v1/messages`, {
      model: "endless",
      max_tokens: 1,
      messages: [{ role: "user", content: "x" }],
    });
    expect(other.status).toBe(503);
    expect(await json(other)).toMatchObject({ type: "error", error: { type: "overloaded_error" } });
    stop.abort();
    expect((await allLines(await waiting)).at(-1)).toMatchObject({ done: true, eval_count: 3 });
    await idle(server);
  });

  test("who waits has no headers yet, and leaves it at once", async () => {
    const server = await startServer([files.endless]);
    const stop = new AbortController();
    const first = linesOf(
      await post(`${server.url}/api/chat`, chatBody("endless", 100_000), { signal: stop.signal }),
    );
    await firstWord(first);
    const leave = new AbortController();
    let answered = false;
    const waiting = post(`${server.url}/api/chat`, chatBody("endless", 3), { signal: leave.signal }).then(
      () => {
        answered = true;
      },
      () => {},
    );
    await until(
      () => server.keeper.counts().waiting === 1,
      () => "nobody waits",
    );
    await Bun.sleep(100);
    expect(answered).toBe(false);
    leave.abort();
    await waiting;
    await until(
      () => server.keeper.counts().waiting === 0,
      () => "the place is still taken",
      2,
    );
    stop.abort();
    await first.return(undefined).catch(() => {});
    await idle(server);
  });

  test.each([true, false])("a client that leaves frees its slot (stream: %p)", async (stream) => {
    const server = await startServer([files.endless]);
    for (let round = 0; round < 3; round++) {
      const leave = new AbortController();
      const asked = post(`${server.url}/api/chat`, chatBody("endless", 1_000_000, { stream }), {
        signal: leave.signal,
      });
      const ended = asked.then((response) => response.text()).catch(() => {});
      await until(
        () => server.keeper.counts().inside === 1,
        () => "it has not begun",
      );
      await Bun.sleep(20 * round);
      leave.abort();
      await ended;
      await idle(server);
    }
    expect(
      (await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 2)))).at(-1)?.eval_count,
    ).toBe(2);
  });

  test("a client that does not read holds up nobody", async () => {
    const server = await startServer([files.endless], { parallel: 2 });
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1)));
    const body = JSON.stringify(chatBody("endless", 1_000_000));
    const lazy = connect(Number(new URL(server.url).port), "127.0.0.1");
    lazy.write(`POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
    lazy.pause();
    await until(
      () => server.keeper.counts().inside === 1,
      () => "it has not begun",
    );
    for (let i = 0; i < 3; i++) {
      expect(
        (await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 30)))).at(-1)?.eval_count,
      ).toBe(30);
    }
    lazy.destroy();
    await idle(server);
  });
});

describe("models", () => {
  test("tell what they take of which memory", async () => {
    const gpuMemory = { weightBytes: 3_000_000, kvBytes: 200_000, stateBytes: 0, computeBytes: 10_000 };
    const server = await startServer([files.endless], {
      // This machine may have no GPU: what is told is the plan's, what runs is not.
      open: async (plan, how) => openChildEngine({ ...plan, gpuMemory: null }, how),
    });
    const model = server.models[0] as LibraryModel;
    const plan = await model.plan();
    spyOn(model, "plan").mockImplementation(async () => ({ ...plan, gpuMemory }));
    await (await post(`${server.url}/api/generate`, { model: "endless" })).text();
    const [entry] = await running(server);
    expect(entry).toMatchObject({ size: totalBytes(plan.memory) + 3_210_000, size_vram: 3_210_000 });
    const metrics = await (await fetch(`${server.url}/metrics`)).text();
    expect(metrics).toContain('hypura_memory_bytes{model="endless:latest",tier="gpu"} 3210000');
    await server.stop();
  });

  test("take turns, and what is said of them is true", async () => {
    const server = await startServer([files.endless, files.experts]);
    expect(await running(server)).toEqual([]);
    const load = await json(await post(`${server.url}/api/chat`, { model: "endless" }));
    expect(load).toMatchObject({ model: "endless", done: true, done_reason: "load" });
    expect((await running(server)).map(({ name }) => name)).toEqual(["endless:latest"]);
    const firstProcess = server.keeper.residence()?.processId as number;
    const stop = new AbortController();
    const busy = linesOf(
      await post(`${server.url}/api/chat`, chatBody("endless", 100_000), { signal: stop.signal }),
    );
    await firstWord(busy);
    const other = post(`${server.url}/api/generate`, {
      model: "experts",
      prompt: "x",
      options: { num_predict: 2 },
    });
    await Bun.sleep(50);
    expect((await running(server)).map(({ name }) => name)).toEqual(["endless:latest"]);
    stop.abort();
    expect((await allLines(await other)).at(-1)).toMatchObject({ done: true, model: "experts" });
    expect((await running(server)).map(({ name }) => name)).toEqual(["experts:latest"]);
    expect(() => process.kill(firstProcess, 0)).toThrow();
    expect(await json(await fetch(`${server.url}/health`))).toMatchObject({
      status: "ok",
      model: "experts:latest",
    });
  });

  test("leave when their time is over, or at once when asked", async () => {
    const server = await startServer([files.endless]);
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1, { keep_alive: "90s" })));
    const [entry] = await running(server);
    const seconds = (Date.parse(entry?.expires_at ?? "") - Date.now()) / 1000;
    expect(seconds).toBeGreaterThan(80);
    expect(seconds).toBeLessThan(91);
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1, { keep_alive: -1 })));
    expect(Date.parse((await running(server))[0]?.expires_at ?? "")).toBeGreaterThan(Date.now() + 1e12);
    const unload = await json(await post(`${server.url}/api/generate`, { model: "endless", keep_alive: 0 }));
    expect(unload).toMatchObject({ model: "endless", done: true, done_reason: "unload", response: "" });
    expect(await running(server)).toEqual([]);
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1, { keep_alive: 0 })));
    await until(
      () => server.keeper.residence() === null,
      () => "it stays",
    );
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1, { keep_alive: 0.2 })));
    expect((await running(server)).length).toBe(1);
    await until(
      () => server.keeper.residence() === null,
      () => "it stays",
    );
  });

  test("are described at once while one generates", async () => {
    const server = await startServer([files.endless]);
    const stop = new AbortController();
    await firstWord(
      linesOf(await post(`${server.url}/api/chat`, chatBody("endless", 100_000), { signal: stop.signal })),
    );
    const started = performance.now();
    const shown = await json(await post(`${server.url}/api/show`, { model: "endless" }));
    expect(shown["model_info"]).toMatchObject({ "llama.context_length": 1024 });
    expect((await json(await fetch(`${server.url}/api/tags`)))["models"]).toBeArrayOfSize(1);
    expect(performance.now() - started).toBeLessThan(3000);
    stop.abort();
    await idle(server);
  });
});

describe("engines", () => {
  test("killed in mid-stream: an error line, a clean end, and the next request is right", async () => {
    const server = await startServer([files.endless], { parallel: 2 });
    const right = textOf(await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 20))));
    const streams = await Promise.all(
      ["/api/chat", "/api/chat"].map((path) => post(server.url + path, chatBody("endless", 1_000_000))),
    );
    const whole = post(`${server.url}/v1/chat/completions`, chatBody("endless", 9));
    const readers = streams.map((stream) => linesOf(stream));
    await Promise.all(readers.map(firstWord));
    process.kill(server.keeper.residence()?.processId as number, "SIGKILL");
    for (const reader of readers) {
      let last: Line = {};
      for await (const line of reader) {
        last = line;
      }
      expect(last.error).toStartWith(
        "model runner has unexpectedly stopped, this may be due to resource limitations",
      );
      expect(last.done).toBeUndefined();
    }
    expect((await whole).status).toBe(200); // it waited, and got the next engine
    const again = await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 20)));
    expect(textOf(again)).toBe(right);
    expect(await (await fetch(`${server.url}/metrics`)).text()).toContain("hypura_engine_crashes_total 1");
  });

  test("that cannot be opened are an error with the reason, and the server stays", async () => {
    const server = await startServer([files.endless], {
      open: (plan, options) => openChildEngine({ ...plan, tensors: plan.tensors.slice(1) }, options),
    });
    for (const path of ["/api/chat", "/v1/chat/completions"]) {
      const response = await post(server.url + path, chatBody("endless", 3));
      expect(response.status).toBe(500);
      expect(await response.text()).toContain("disagree");
    }
    expect((await fetch(`${server.url}/`)).status).toBe(200);
  });

  test("that are slow: a first line at once, heartbeats in silence, and what fails then is a line", async () => {
    let fail = false;
    const server = await startServer([files.endless], {
      heartbeatMs: 100,
      async open(plan, options) {
        const engine = await openChildEngine(plan, options);
        return {
          ...engine,
          request: (route, body, signal) =>
            route === "POST /v1/chat/completions"
              ? slowly(engine.request(route, body, signal))
              : engine.request(route, body, signal),
        };
        async function* slowly<Chunk>(chunks: AsyncIterable<Chunk>): AsyncGenerator<Chunk> {
          await Bun.sleep(650);
          if (fail) {
            throw new Error("the disk is on fire");
          }
          yield* chunks;
        }
      },
    });
    const started = performance.now();
    const times: number[] = [];
    const lines: Line[] = [];
    await json(await post(`${server.url}/api/chat`, { model: "endless" }));
    const begun = performance.now();
    for await (const line of linesOf(await post(`${server.url}/api/chat`, chatBody("endless", 2)))) {
      times.push(performance.now() - begun);
      lines.push(line);
    }
    expect(performance.now() - started).toBeGreaterThan(650);
    expect(times[0]).toBeLessThan(300);
    const beats = lines.filter(
      (line, i) => line.done === false && line.message?.content === "" && (times[i] ?? 0) < 640,
    );
    expect(beats.length).toBeGreaterThanOrEqual(4);
    expect(beats.length).toBeLessThanOrEqual(8);
    expect(lines.at(-1)).toMatchObject({ done: true, eval_count: 2 });
    const sse = await (
      await post(`${server.url}/v1/chat/completions`, {
        ...chatBody("endless", 2),
        max_tokens: 2,
        stream: true,
      })
    ).text();
    expect(sse).toContain("[DONE]");
    fail = true;
    const failed = await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 2)));
    expect(failed.at(-1)?.error).toBeString();
    expect(failed.at(-1)?.error).not.toContain("on fire"); // a mistake of ours is not the client's
    await idle(server);
  });
});

describe("the end", () => {
  test("lets a short answer finish and takes nothing new", async () => {
    const server = await startServer([files.endless]);
    await allLines(await post(`${server.url}/api/chat`, chatBody("endless", 1)));
    const process_ = server.keeper.residence()?.processId as number;
    const answer = linesOf(await post(`${server.url}/api/chat`, chatBody("endless", 200)));
    await firstWord(answer);
    const stopped = server.stop(5000);
    let last: Line = {};
    for await (const line of answer) {
      last = line;
    }
    expect(last).toMatchObject({ done: true, eval_count: 200 });
    await stopped;
    expect(() => process.kill(process_, 0)).toThrow();
    await expect(fetch(server.url)).rejects.toThrow();
  });

  test("cancels a long one with a line that says so", async () => {
    const server = await startServer([files.endless]);
    const answer = linesOf(await post(`${server.url}/api/chat`, chatBody("endless", 1_000_000)));
    await firstWord(answer);
    const waiting = post(`${server.url}/api/chat`, chatBody("endless", 1));
    await until(
      () => server.keeper.counts().waiting === 1,
      () => "nobody waits",
    );
    const started = performance.now();
    const stopped = server.stop(100);
    let last: Line = {};
    for await (const line of answer) {
      last = line;
    }
    expect(last).toEqual({ error: "the server is shutting down" });
    expect((await waiting).status).toBe(503);
    await stopped;
    expect(performance.now() - started).toBeLessThan(3000);
  });
});

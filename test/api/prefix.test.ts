// What conversations begin with, kept on disk: an agent's second turn after a restart evaluates its own words alone and
// reads the weights for no more; and whatever happens to the files, the answer is the one of a server that keeps nothing.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { openChildEngine } from "../../src/child";
import type { MemoryLayer, Model } from "../../src/model";
import { PrefixStore, whyNotKept } from "../../src/prefix-store";
import { program } from "../cli/program";
import { until } from "../engine/process";
import { writeThinker } from "../engine/thinker";
import { makeFixture } from "../fixtures";
import { writeGguf } from "../fixtures/gguf-writer";
import { tinyLlama } from "../fixtures/tiny";
import { withPool } from "../golden/compare";
import { childrenOf, endProgram, startProgram } from "./program";
import {
  allLines,
  type Line,
  post,
  scratchFolder,
  startServer,
  stopServers,
  type TestServer,
  type TestServerOptions,
  textOf,
  writeEmbedder,
} from "./served";

const folder = scratchFolder();
const experts = join(folder, "experts.gguf");
const able = join(folder, "able.gguf");

afterAll(stopServers);
beforeAll(async () => {
  await makeFixture("tiny-qwen3moe", experts);
  writeThinker(able);
});

interface Ending extends Line {
  readonly prompt_eval_cached_count?: number;
}

const system = "You are a helpful assistant who answers briefly. ".repeat(14);

function turn(model: string, question: string, instructions = system): object {
  const messages = [
    { role: "system", content: instructions },
    { role: "user", content: question },
  ];
  return { model, messages, options: { temperature: 0, num_predict: 12 } };
}

async function ask(url: string, body: object, path = "/api/chat") {
  const lines = await allLines(await post(url + path, body));
  const last = lines.at(-1) as Ending;
  expect(last.done).toBe(true);
  return {
    text: textOf(lines),
    prompt: last.prompt_eval_count ?? 0,
    cached: last.prompt_eval_cached_count ?? 0,
  };
}

/** A server whose pool holds a quarter of the experts, with prompts in many passes. */
function startStreaming(home: string, options: TestServerOptions = {}): Promise<TestServer> {
  return startServer([experts], {
    limits: { mode: "stream", contextTokens: 2048 },
    prefixBytes: 50_000_000,
    prefixFolder: home,
    open: (plan, how) =>
      openChildEngine({ ...withPool(plan, "quarter", "lfu-decay"), ubatchTokens: 32, batchTokens: 32 }, how),
    ...options,
  });
}

async function metric(server: TestServer, name: string): Promise<number> {
  const text = await (await fetch(`${server.url}/metrics`)).text();
  return Number(
    text
      .split("\n")
      .find((line) => line.startsWith(name))
      ?.split(" ")
      .at(-1),
  );
}

/** The files of the only model's shelf. */
function kept(home: string): readonly string[] {
  const root = join(home, "prefixes");
  const [key] = existsSync(root) ? readdirSync(root) : [];
  return key === undefined ? [] : readdirSync(join(root, key)).map((name) => join(root, key, name));
}

const homeOf = (name: string): string => {
  const home = join(folder, name);
  mkdirSync(home, { recursive: true });
  return home;
};

describe("after a restart", () => {
  test("an identical turn evaluates no more than its own words, and reads weights for no more", async () => {
    const home = homeOf("restart");
    const bare = await startStreaming(home, { prefixBytes: undefined as never });
    const right = await ask(bare.url, turn("experts", "What is a lamp?"));
    const coldPasses = await metric(bare, "hypura_passes_total");
    await bare.stop();
    expect(kept(home)).toEqual([]); // off by default: nothing is written

    const first = await startStreaming(home);
    expect((await ask(first.url, turn("experts", "What is a lamp?"))).text).toBe(right.text);
    await first.stop();
    expect(
      kept(home)
        .map((path) => path.replace(/.*\./, ""))
        .sort(),
    ).toEqual(["json", "kv"]);
    const [notes] = kept(home).filter((path) => path.endsWith(".json"));
    const { tokens } = JSON.parse(readFileSync(notes as string, "utf8")) as { readonly tokens: number[] };
    expect(tokens.length).toBeGreaterThan(128);
    expect(tokens.length).toBeLessThan(right.prompt); // what the user says is not in it

    const second = await startStreaming(home);
    await (await post(`${second.url}/api/generate`, { model: "experts", prompt: "" })).text(); // loads
    const [bytes, passes] = [
      await metric(second, "hypura_read_bytes_total"),
      await metric(second, "hypura_passes_total"),
    ];
    const again = await ask(second.url, turn("experts", "What is a lamp?"));
    const readPasses = (await metric(second, "hypura_passes_total")) - passes;
    expect(again).toEqual({ ...right, cached: tokens.length });
    // The twelve tokens of the answer and one or two passes for what the user said.
    expect(readPasses).toBeLessThanOrEqual(12 + Math.ceil((right.prompt - tokens.length) / 32));
    expect(readPasses).toBeLessThanOrEqual(coldPasses - Math.floor(tokens.length / 32));
    expect(await metric(second, "hypura_read_bytes_total")).toBeGreaterThan(bytes); // it streams
    const other = await ask(second.url, turn("experts", "Who bakes bread?"));
    expect(other.cached).toBeGreaterThanOrEqual(tokens.length);
    await second.stop();
  });

  test("instructions that differ late are taken up as far as they agree", async () => {
    const home = homeOf("late");
    const first = await startStreaming(home);
    await ask(first.url, turn("experts", "Hello", `${system} Session 17.`));
    await first.stop();
    const second = await startStreaming(home);
    const { cached, prompt } = await ask(second.url, turn("experts", "Hello", `${system} Session 18.`));
    expect(cached).toBeGreaterThan(prompt - 60);
    await second.stop();
    expect(kept(home).length).toBe(2); // too little was new to be kept beside it
  });

  test("tools are part of it, under /v1 too", async () => {
    const home = homeOf("tools");
    const tools = Array.from({ length: 6 }, (_, i) => ({
      type: "function",
      function: {
        name: `tool_${i}`,
        description: "Finds what a person asks for in a long list of things that were written down before.",
        parameters: { type: "object", properties: { what: { type: "string" } }, required: ["what"] },
      },
    }));
    const options: TestServerOptions = {
      prefixBytes: 50_000_000,
      prefixFolder: home,
      limits: { contextTokens: 2048 },
    };
    const body = {
      messages: [{ role: "user", content: "Hello" }],
      tools,
      model: "able",
      temperature: 0,
      max_tokens: 4,
    };
    const usage = async (server: TestServer) =>
      (
        (await (await post(`${server.url}/v1/chat/completions`, body)).json()) as {
          readonly usage: {
            readonly prompt_tokens: number;
            readonly prompt_tokens_details: { readonly cached_tokens: number };
          };
        }
      ).usage;
    const first = await startServer([able], options);
    await usage(first);
    await first.stop();
    const second = await startServer([able], options);
    const { prompt_tokens: prompt, prompt_tokens_details: details } = await usage(second);
    expect(details.cached_tokens).toBeGreaterThan(128);
    expect(details.cached_tokens).toBeGreaterThan(prompt - 40);
    await second.stop();
  });

  test("several slots: each conversation finds its beginning", async () => {
    const home = homeOf("slots");
    const options: TestServerOptions = { parallel: 3 };
    const other = "Everything is written in the old style of the sea. ".repeat(14);
    const first = await startStreaming(home, options);
    const right = await Promise.all([
      ask(first.url, turn("experts", "One")),
      ask(first.url, turn("experts", "Two", other)),
    ]);
    await first.stop();
    expect(kept(home).filter((path) => path.endsWith(".kv")).length).toBe(2);
    const second = await startStreaming(home, options);
    const again = await Promise.all([
      ask(second.url, turn("experts", "One")),
      ask(second.url, turn("experts", "Two", other)),
      ask(second.url, turn("experts", "Three")),
    ]);
    expect(again.slice(0, 2).map(({ text }) => text)).toEqual(right.map(({ text }) => text));
    for (const { cached } of again) {
      expect(cached).toBeGreaterThan(128);
    }
    await until(
      () => second.keeper.counts().inside === 0,
      () => JSON.stringify(second.keeper.counts()),
    );
    await second.stop();
  });
});

describe("whatever happens to the files", () => {
  /** A home with one kept head, and the right answer. */
  async function filled(name: string): Promise<{ readonly home: string; readonly text: string }> {
    const home = homeOf(name);
    const server = await startStreaming(home);
    const { text } = await ask(server.url, turn("experts", "What is a lamp?"));
    await server.stop();
    return { home, text };
  }
  const file = (home: string, end: string): string => kept(home).find((path) => path.endsWith(end)) as string;

  const damages: readonly (readonly [string, (home: string) => void])[] = [
    [
      "a changed byte",
      (home) => {
        const bytes = readFileSync(file(home, ".kv"));
        bytes[bytes.length >> 1] = (bytes[bytes.length >> 1] as number) ^ 1;
        writeFileSync(file(home, ".kv"), bytes);
      },
    ],
    [
      "a file cut short",
      (home) => writeFileSync(file(home, ".kv"), readFileSync(file(home, ".kv")).subarray(0, 999)),
    ],
    ["notes that are no JSON", (home) => writeFileSync(file(home, ".json"), "{")],
    [
      "notes of other tokens",
      (home) => {
        const notes = JSON.parse(readFileSync(file(home, ".json"), "utf8"));
        writeFileSync(file(home, ".json"), JSON.stringify({ ...notes, tokens: notes.tokens.toReversed() }));
      },
    ],
    [
      "sound notes of a file that is no cache",
      (home) => {
        const notes = JSON.parse(readFileSync(file(home, ".json"), "utf8"));
        writeFileSync(file(home, ".kv"), "not a cache");
        const sizeBytes = "not a cache".length;
        writeFileSync(
          file(home, ".json"),
          JSON.stringify({ ...notes, sizeBytes, checksum: Bun.hash.crc32("not a cache") }),
        );
      },
    ],
  ];

  test.each(damages)("%s: evaluated again, and kept again", async (name, damage) => {
    const { home, text } = await filled(name.replaceAll(" ", "-"));
    damage(home);
    const server = await startStreaming(home);
    const again = await ask(server.url, turn("experts", "What is a lamp?"));
    expect(again.text).toBe(text);
    expect(server.keeper.counts().crashes).toBe(0);
    await server.stop();
    expect(kept(home).length).toBe(2);
    const third = await startStreaming(home);
    expect((await ask(third.url, turn("experts", "What is a lamp?"))).cached).toBeGreaterThan(128);
    await third.stop();
  });

  test("what is not ours, or was left by the dead, is removed", async () => {
    const { home } = await filled("foreign");
    const place = join(file(home, ".kv"), "..");
    copyFileSync(file(home, ".kv"), join(place, "0123456789abcdef01234567.kv"));
    writeFileSync(join(place, "notes.txt"), "x");
    writeFileSync(join(place, "2147483000-1.tmp"), "x"); // no process has this number
    writeFileSync(join(place, `${process.ppid}-1.tmp`), "x"); // this one lives
    const server = await startStreaming(home);
    await server.stop();
    expect(
      kept(home)
        .map((path) => path.replace(/.*\//, ""))
        .filter((name) => !/^[0-9a-f]{24}\.(kv|json)$/.test(name)),
    ).toEqual([`${process.ppid}-1.tmp`]);
    expect(kept(home).length).toBe(3);
  });

  test("the budget holds, and what was used longest ago goes", async () => {
    const { home } = await filled("budget");
    const { size } = statSync(file(home, ".kv"));
    const server = await startStreaming(home, { prefixBytes: Math.floor(size * 2.5) });
    const heads = ["Birds", "Stones"].map((word) => `${word}: ${system}`);
    await ask(server.url, turn("experts", "a", heads[0]));
    await ask(server.url, turn("experts", "b")); // used again
    await ask(server.url, turn("experts", "c", heads[1]));
    const sizes = kept(home)
      .filter((path) => path.endsWith(".kv"))
      .map((path) => statSync(path).size);
    expect(sizes.reduce((sum, one) => sum + one, 0)).toBeLessThanOrEqual(size * 2.5);
    await server.stop();
    const second = await startStreaming(home);
    expect((await ask(second.url, turn("experts", "d"))).cached).toBeGreaterThan(128);
    expect((await ask(second.url, turn("experts", "e", heads[1]))).cached).toBeGreaterThan(128);
    expect((await ask(second.url, turn("experts", "f", heads[0]))).cached).toBeLessThan(32);
    await second.stop();
  });

  test("a head that is larger than the budget is not kept, and the conversation is not evaluated again for it", async () => {
    const home = homeOf("too-large");
    const server = await startStreaming(home, { prefixBytes: 10_000 });
    const first = await ask(server.url, turn("experts", "What is a lamp?"));
    const second = await ask(server.url, turn("experts", "What is a lamp?"));
    expect(second).toEqual({ ...first, cached: first.prompt - 1 });
    expect(kept(home)).toEqual([]);
    expect(server.log.filter((line) => line.startsWith("warn")).length).toBe(1);
    expect(server.log.join("\n")).toContain("larger than --prefix-cache allows");
    await server.stop();
  });

  test("a disk that is full: a warning, and the answer goes on", async () => {
    const home = homeOf("full");
    // No file may grow beyond 64 kB, and who tries is told so instead of being ended.
    const limited = ["sh", "-c", `trap '' XFSZ; ulimit -f 128; exec "$@"`, "sh", ...program];
    const server = await startProgram(
      [experts, "--context", "2048", "--prefix-cache", "1G"],
      { HYPURA_HOME: home },
      limited,
    );
    const { text } = await ask(server.facts.endpoint, turn("experts", "What is a lamp?"));
    expect(text.length).toBeGreaterThan(0);
    const stderr = await endProgram(server);
    expect(stderr).toContain("could not be kept");
    expect(kept(home)).toEqual([]);
  });

  test("kill -9 at any moment of it: the next start is right", async () => {
    const home = homeOf("killed");
    mkdirSync(join(home, "prefixes"), { recursive: true });
    const words = [experts, "--context", "2048", "--prefix-cache", "1G"];
    const clean = await startProgram(words.slice(0, 3), { HYPURA_HOME: home });
    const right = await ask(clean.facts.endpoint, turn("experts", "What is a lamp?"));
    await endProgram(clean);
    const states = new Set<string>();
    for (let round = 0; round < 6; round++) {
      const server = await startProgram(words, { HYPURA_HOME: home });
      await ask(server.facts.endpoint, {
        ...turn("experts", "x"),
        messages: [{ role: "user", content: "x" }],
      });
      const instructions = `${round} ${system}`;
      const answer = ask(server.facts.endpoint, turn("experts", "What is a lamp?", instructions)).catch(
        () => null,
      );
      // Odd rounds at the first sign of a file, others a little later.
      const before = kept(home).length;
      const deadline = performance.now() + 5000;
      while (kept(home).length === before && performance.now() < deadline) {
        await Bun.sleep(0);
      }
      await Bun.sleep(round % 2 === 0 ? 0 : round);
      const engine = childrenOf(server.facts.pid);
      server.child.kill("SIGKILL");
      await server.child.exited;
      await answer;
      states.add(
        kept(home)
          .slice(before)
          .map((path) => path.replace(/.*\./, ""))
          .sort()
          .join(" "),
      );
      await until(
        () => engine.every((id) => !existsSync(`/proc/${id}`)),
        () => "the engine lives on",
      );
      const next = await startProgram(words, { HYPURA_HOME: home });
      expect((await ask(next.facts.endpoint, turn("experts", "What is a lamp?"))).text).toBe(right.text);
      const log = await endProgram(next);
      expect(log).not.toContain("unexpectedly");
      expect(kept(home).every((path) => /[0-9a-f]{24}\.(kv|json)$/.test(path))).toBe(true);
    }
    console.log(`killed with these files there: ${JSON.stringify([...states])}`);
  });
});

describe("what cannot be kept", () => {
  const layer: MemoryLayer = {
    layer: 0,
    keyElements: 64,
    valueElements: 64,
    windowTokens: null,
    extraKeyElements: 0,
    extraValueElements: 0,
    compression: 1,
    stateElements: 0,
  };
  const model = (...layers: readonly Partial<MemoryLayer>[]): Model =>
    ({ memoryLayers: layers.map((one) => ({ ...layer, ...one })) }) as unknown as Model;

  test("is what has no whole past: windows, recurrent states, hybrids", () => {
    expect(whyNotKept(model({}))).toBeNull();
    expect(whyNotKept(model({}, { windowTokens: 1024 }))).toContain("sliding window");
    expect(whyNotKept(model({}, { stateElements: 5 }))).toContain("recurrent state");
  });

  test("and the model is served without, with a sentence", async () => {
    const windows = join(folder, "windows.gguf");
    const spec = tinyLlama({ seed: 3, context: 512 });
    const metadata = spec.metadata.map(({ key, value }) => ({
      key: key.replace(/^llama\./, "gemma2."),
      value: key === "general.architecture" ? ({ type: "str", value: "gemma2" } as const) : value,
    }));
    writeGguf(windows, { ...spec, metadata });
    const embedder = join(folder, "embedder.gguf");
    writeEmbedder(embedder);
    const server = await startServer([windows, embedder], {
      prefixBytes: 1e9,
      prefixFolder: homeOf("none"),
      limits: { contextTokens: null },
    });
    const said = server.log.join("\n");
    expect(said).toContain("windows:latest is served without --prefix-cache: it attends to a sliding window");
    expect(said).toContain("embedder:latest is served without --prefix-cache: it generates no text");
    expect(server.models.map(({ shelf }) => shelf)).toEqual([null, null]);
    await server.stop();
  });

  test("a folder that cannot be made is an error with advice", () => {
    const path = join(folder, "a-file");
    writeFileSync(path, "");
    const store = new PrefixStore({ budgetBytes: 1e9, log: () => {}, folder: join(path, "prefixes") });
    expect(() => store.shelf("x")).toThrow("--prefix-cache");
  });
});

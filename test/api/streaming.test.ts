// Streamed weights behind the server: models whose pool holds a quarter of what streams give, over a socket, the very
// text of `hypura run` with everything in memory; and what a conversation has said already is not read again.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { openChildEngine } from "../../src/child";
import type { Plan } from "../../src/plan";
import { hypura } from "../cli/program";
import { makeFixture } from "../fixtures";
import { withPool } from "../golden/compare";
import {
  allLines,
  type Line,
  post,
  scratchFolder,
  startServer,
  stopServers,
  type TestServer,
  textOf,
} from "./served";

const folder = scratchFolder();
const tokenCount = 40;

interface Subject {
  readonly name: string;
  readonly mode: Plan["mode"];
  readonly make: (path: string) => Promise<unknown>;
}

const subjects: readonly Subject[] = [
  {
    name: "upcycled",
    mode: "expert-streaming",
    async make(path) {
      const source = join(folder, "source.gguf");
      await makeFixture("tiny-llama", source, { seed: 5 });
      await makeFixture("upcycle", path, { source, experts: 8, used: 2, mode: "noise", noise: 0.3 });
    },
  },
  { name: "experts", mode: "expert-streaming", make: (path) => makeFixture("tiny-qwen3moe", path) },
  {
    name: "dense",
    mode: "dense-ffn-streaming",
    make: (path) => makeFixture("tiny-llama", path, { seed: 6 }),
  },
];

const pathOf = (name: string): string => join(folder, `${name}.gguf`);

afterAll(stopServers);

beforeAll(async () => {
  for (const { name, make } of subjects) {
    await make(pathOf(name));
  }
});

/** A server whose pool holds a quarter of the strides of each class; `batch` sizes the passes of a prompt. */
function startStreaming(name: string, mode: Plan["mode"], batch: Partial<Plan> = {}): Promise<TestServer> {
  return startServer([pathOf(name)], {
    // By itself the plan guesses or not by what was measured here: asked for, a dense model guesses on every machine.
    limits: {
      mode: "stream",
      contextTokens: 1024,
      speculation: mode === "dense-ffn-streaming" ? 4 : "auto",
    },
    open(plan, options) {
      expect(plan.mode).toBe(mode);
      return openChildEngine({ ...withPool(plan, "quarter", "lfu-decay"), ...batch }, options);
    },
  });
}

async function runText(name: string, words: readonly string[]): Promise<string> {
  const common = ["--temp", "0", "--max-tokens", String(tokenCount), "--threads", "1", "--context", "1024"];
  const outcome = await hypura(["run", pathOf(name), "--json", ...common, ...words]);
  expect([outcome.status, outcome.stderr]).toEqual([0, ""]);
  const { text, mode } = JSON.parse(outcome.stdout) as { readonly text: string; readonly mode: string };
  expect(mode).toBe("full-resident");
  return text;
}

async function metric(server: TestServer, name: string): Promise<number> {
  const text = await (await fetch(`${server.url}/metrics`)).text();
  const value = text
    .split("\n")
    .find((line) => line.startsWith(name))
    ?.split(" ")
    .at(-1);
  if (value === undefined) {
    throw new Error(`${name} is not in ${text}`);
  }
  return Number(value);
}

describe.each(subjects)("$name, $mode with a quarter in the pool", ({ name, mode }) => {
  const options = { temperature: 0, num_predict: tokenCount };
  const prompt = "Once upon a time there was a small machine";

  test("says what `hypura run` says: chat, generate and generate as it stands", async () => {
    const server = await startStreaming(name, mode);
    const chat = await runText(name, ["--mode", "resident", "--prompt", prompt]);
    const raw = await runText(name, ["--mode", "resident", "--raw", "--prompt", prompt]);
    expect(chat).not.toBe(raw);
    const ask = async (path: string, body: object): Promise<string> =>
      textOf(await allLines(await post(server.url + path, { model: name, options, ...body })));
    expect(await ask("/api/chat", { messages: [{ role: "user", content: prompt }] })).toBe(chat);
    expect(await ask("/api/generate", { prompt })).toBe(chat);
    expect(await ask("/api/generate", { prompt, raw: true })).toBe(raw);
    const whole = await post(`${server.url}/api/generate`, {
      model: name,
      options,
      prompt,
      raw: true,
      stream: false,
    });
    expect(((await whole.json()) as Line).response).toBe(raw);
    expect(await metric(server, `hypura_strides_total{model="${name}:latest",result="miss"`)).toBeGreaterThan(
      0,
    );
    expect(await metric(server, "hypura_evictions_total")).toBeGreaterThan(0);
    // What was asked before is asked again, so that guesses are right.
    const right = `hypura_right_guesses_total{model="${name}:latest",source="context"`;
    if (mode === "dense-ffn-streaming") expect(await metric(server, right)).toBeGreaterThan(0);
    else await expect(metric(server, right)).rejects.toThrow("is not in");
    await server.stop();
  });

  test("an identical turn reads the weights for its answer, not for what it has read before", async () => {
    const server = await startStreaming(name, mode, { ubatchTokens: 32, batchTokens: 32 });
    const system = "You are a helpful assistant. ".repeat(20);
    const messages = [
      { role: "system", content: system },
      { role: "user", content: prompt },
    ];
    const turn = async () => {
      const [bytes, passes] = [
        await metric(server, "hypura_read_bytes_total"),
        await metric(server, "hypura_passes_total"),
      ];
      const body = { model: name, messages, options: { ...options, num_predict: 1 } };
      const lines = await allLines(await post(`${server.url}/api/chat`, body));
      return {
        bytes: (await metric(server, "hypura_read_bytes_total")) - bytes,
        passes: (await metric(server, "hypura_passes_total")) - passes,
        last: lines.at(-1) as Line & { readonly prompt_eval_cached_count?: number },
        text: textOf(lines),
      };
    };
    await allLines(
      await post(`${server.url}/api/generate`, {
        model: name,
        prompt: "x",
        raw: true,
        options: { num_predict: 1 },
      }),
    );
    const first = await turn();
    const second = await turn();
    expect(second.text).toBe(first.text);
    expect(second.last.prompt_eval_count).toBe(first.last.prompt_eval_count as number);
    // All but the last token, which is asked for its successor, comes from the cache.
    expect(second.last.prompt_eval_cached_count).toBe((first.last.prompt_eval_count as number) - 1);
    expect(second.passes).toBe(1);
    expect(first.passes).toBeGreaterThan(second.passes);
    expect(second.bytes).toBeLessThan(first.bytes);
    await server.stop();
  });
});

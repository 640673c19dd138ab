// A model in a process of its own, asked for greedy texts one at a time: what the benchmark of guesses compares. Run by
// openSubject (subject.ts): a plan as its argument, questions on stdin, one line of figures each on stdout.

import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { type Engine, openEngine } from "../../src/engine";
import { type GuessCounters, guessesSince } from "../../src/guesses";
import type { Plan } from "../../src/plan";
import { countersSince, type StreamingCounters } from "../../src/streaming";
import { marginsOf, roundingOf, type SaidToken } from "../engine/speculation";

export interface Asked {
  /** A question in the model's own template, or text, or tokens. */
  readonly chat?: string;
  readonly text?: string;
  readonly ids?: readonly number[];
  readonly tokens: number;
  readonly grammar?: string;
  /** Text in pieces that are one token each. */
  readonly pieces?: readonly string[];
  /** Weights of such pieces. */
  readonly bias?: readonly (readonly [string, number])[];
  /** In one piece: tokens that end amid a character are missing from a stream. */
  readonly whole?: boolean;
  /** Asks how sure the model was of each token, which takes time. */
  readonly margins?: boolean;
  /** With margins: at so many places of the answer, how far a pass over many tokens moves them. */
  readonly roundingPlaces?: number;
}

export interface Figures {
  readonly text: string;
  readonly promptIds: readonly number[];
  readonly ids: readonly number[];
  /** As of Told in test/engine/speculation.ts. */
  readonly margins: readonly number[];
  /** As of roundingOf in test/engine/speculation.ts. */
  readonly rounding: readonly number[];
  readonly promptSeconds: number;
  readonly tokens: number;
  /** From the first token to the last. */
  readonly seconds: number;
  readonly drafted: number;
  readonly accepted: number;
  /** By source; null where nothing is guessed. */
  readonly guesses: GuessCounters | null;
  /** From the first token on; null where everything is resident. */
  readonly decode: StreamingCounters | null;
  /** Bytes that the kernel fetched from storage for this process meanwhile. */
  readonly storageBytes: number | null;
}

interface Chunk {
  readonly content: string;
  readonly tokens?: readonly number[];
  readonly timings?: {
    readonly prompt_ms: number;
    readonly predicted_n: number;
    readonly predicted_ms: number;
    readonly draft_n?: number;
    readonly draft_n_accepted?: number;
  };
  readonly completion_probabilities?: readonly SaidToken[];
}

async function only<Answer>(engine: Engine, route: string, body: object): Promise<Answer> {
  for await (const { data } of engine.request(route, body)) return data as Answer;
  throw new Error(`${route} answered nothing`);
}

async function promptOf(
  engine: Engine,
  { chat, text, ids, pieces }: Asked,
): Promise<string | readonly number[]> {
  if (pieces !== undefined) return Promise.all(pieces.map((piece) => tokenOf(engine, piece)));
  if (chat === undefined) return ids ?? text ?? "";
  const messages = [{ role: "user", content: chat }];
  return (await only<{ readonly prompt: string }>(engine, "POST /apply-template", { messages })).prompt;
}

async function biasOf(engine: Engine, { bias = [] }: Asked): Promise<readonly (readonly [number, number])[]> {
  return Promise.all(
    bias.map(async ([content, weight]) => [await tokenOf(engine, content), weight] as const),
  );
}

async function tokensOf(engine: Engine, content: string, special: boolean): Promise<readonly number[]> {
  const body = { content, add_special: special, parse_special: special };
  return (await only<{ readonly tokens: readonly number[] }>(engine, "POST /tokenize", body)).tokens;
}

async function tokenOf(engine: Engine, content: string): Promise<number> {
  const [token, ...more] = await tokensOf(engine, content, false);
  if (token === undefined || more.length > 0) {
    throw new Error(`${JSON.stringify(content)} is ${1 + more.length} tokens, not one`);
  }
  return token;
}

function storageRead(): number | null {
  try {
    return Number(/^read_bytes: (\d+)$/m.exec(readFileSync("/proc/self/io", "utf8"))?.[1] ?? Number.NaN);
  } catch {
    return null; // not on this system
  }
}

async function answer(engine: Engine, asked: Asked): Promise<Figures> {
  const prompt = await promptOf(engine, asked);
  const bias = await biasOf(engine, asked);
  if (asked.margins === true && bias.length > 0)
    throw new Error("margins of weighed tokens are not asked for here");
  const guessedBefore = await engine.guesses();
  const body = {
    prompt,
    n_predict: asked.tokens,
    temperature: 0,
    cache_prompt: false,
    stream: asked.whole !== true,
    return_tokens: true,
    timings_per_token: true,
    ...(asked.grammar === undefined ? {} : { grammar: asked.grammar }),
    ...(bias.length === 0 ? {} : { logit_bias: bias }),
    ...(asked.margins === true ? { n_probs: 2 } : {}),
  };
  let text = "";
  const ids: number[] = [];
  const said: SaidToken[] = [];
  let timings: Chunk["timings"];
  let first: { counters: StreamingCounters | null; storage: number | null } | undefined;
  for await (const { data } of engine.request("POST /completion", body)) {
    first ??= { counters: await engine.streaming(), storage: storageRead() };
    const chunk = data as Chunk;
    text += chunk.content;
    ids.push(...(chunk.tokens ?? []));
    timings = chunk.timings ?? timings;
    said.push(...(chunk.completion_probabilities ?? []));
  }
  const after = await engine.streaming();
  const storage = storageRead();
  const before = first?.counters ?? null;
  const guessed = await engine.guesses();
  const promptIds = typeof prompt === "string" ? await tokensOf(engine, prompt, true) : prompt;
  const told = { prompt: promptIds, tokens: ids, said, bias };
  return {
    text,
    promptIds,
    ids,
    margins: asked.margins === true ? await marginsOf(engine, told) : [],
    rounding: asked.roundingPlaces === undefined ? [] : await roundingOf(engine, told, asked.roundingPlaces),
    guesses: guessedBefore === null || guessed === null ? null : guessesSince(guessedBefore, guessed),
    promptSeconds: (timings?.prompt_ms ?? 0) / 1000,
    tokens: timings?.predicted_n ?? 0,
    seconds: (timings?.predicted_ms ?? 0) / 1000,
    drafted: timings?.draft_n ?? 0,
    accepted: timings?.draft_n_accepted ?? 0,
    decode: before === null || after === null ? null : countersSince(before, after),
    storageBytes:
      storage === null || (first?.storage ?? null) === null ? null : storage - (first?.storage ?? 0),
  };
}

if (import.meta.main) {
  const plan = JSON.parse(readFileSync(process.argv[2] as string, "utf8")) as Plan;
  const started = performance.now();
  const engine = await openEngine(plan, { onWarning: (text) => console.error(text) });
  console.log(JSON.stringify({ openSeconds: (performance.now() - started) / 1000 }));
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await answer(engine, JSON.parse(line) as Asked)));
  }
  await engine.close();
}

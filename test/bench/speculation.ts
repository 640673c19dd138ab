// Guesses against their bars (test/bench/NOTES.md):
//   bun test/bench/speculation.ts prompts MODEL --memory 600M [--kinds "code edit,json"] [--tokens 64] [--draft FILE]
//       [--fresh]                                              each answer guessed without those before it
//   bun test/bench/speculation.ts repeat FILE [--runs 3]        FILE from `bun test/fixtures/make.ts dense-6g FILE`
//   bun test/bench/speculation.ts experts FILE [--runs 3]       FILE from `bun test/fixtures/make.ts moe-6g FILE`
//   bun test/bench/speculation.ts clients FILE [--clients 8]    FILE as for repeat, through `hypura serve`
//   bun test/bench/speculation.ts replay MODEL [--answers FILE]  what steering each pass would bring
//   bun test/bench/speculation.ts flips MODEL [--tokens 96] [--kinds json]  how often a pass of guesses turns a greedy text
// `--threads 1` where the cores are not idle: two that wait for each other crawl.
// Two processes with the same plan, one that guesses and one that does not, asked the same in turns. Weights are read
// past the page cache, so every pass is cold. The prompts of prompts.json were written down before any measurement.

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { planOf } from "../../src/api";
import { openModelFile } from "../../src/modelfile";
import { noLimits, type Plan, type PlanLimits, runOf } from "../../src/plan";
import { withoutMemory } from "../../src/plan-speculation";
import { loadMachine } from "../../src/profile";
import { bytesText, parseBytes } from "../../src/text";
import { compare, type Told } from "../engine/speculation";
import {
  contextGuesses,
  densePassCost,
  firstOf,
  type Guesser,
  longestMatch,
  mapOfKeys,
  newestPlace,
  replayGuesses,
} from "./guesses";
import { median, verdict } from "./measure";
import { linesOf, openSubject, type Subject } from "./subject";
import type { Asked, Figures } from "./teller";

interface NamedPrompt {
  readonly kind: string;
  readonly name: string;
  readonly prompt: string;
}

const [mode = "", path = ""] = process.argv.slice(2);
function flag(name: string): string | undefined {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? undefined : process.argv[at + 1];
}
const runs = Number(flag("runs") ?? 3);
const prompts = JSON.parse(
  readFileSync(join(import.meta.dir, "prompts.json"), "utf8"),
) as readonly NamedPrompt[];

type Teller = Subject<Asked, Figures>;

function open(name: string, plan: Plan): Promise<Teller> {
  return openSubject<Asked, Figures>(name, plan, null, { program: join(import.meta.dir, "teller.ts") });
}

function limitsFor(memoryBytes: number | null, change: Partial<PlanLimits> = {}): PlanLimits {
  const threads = flag("threads");
  const given = { contextTokens: 1024, slotCount: 1, memoryBytes };
  return { ...noLimits, ...given, threads: threads === undefined ? null : Number(threads), ...change };
}

/** As `run` plans: with what was measured here. */
const machine = await loadMachine({ folder: path === "" ? "." : path, measure: "cached" });

/** What a plan takes where nothing was measured. */
const usualGuesses = 7;

/** The plan as it guesses, and the same plan without. */
function bothPlans(limits: PlanLimits): { readonly on: Plan; readonly off: Plan } {
  const auto = planOf(openModelFile(path), limits, machine);
  if (auto.speculation === null) {
    const why = auto.choices.find((one) => one.name === "speculation")?.reason;
    console.log(`auto guesses nothing (${why}); measured with up to ${usualGuesses} all the same`);
  }
  const on =
    auto.speculation === null
      ? planOf(openModelFile(path), { ...limits, speculation: usualGuesses }, machine)
      : auto;
  const draft = on.speculation?.draftPath ?? null;
  // A draft takes memory: without it the weights have that memory.
  const off =
    draft === null
      ? { ...on, speculation: null }
      : planOf(openModelFile(path), { ...limits, draftPath: null, speculation: "off" }, machine);
  return { on, off };
}

interface Pair {
  readonly on: Figures;
  readonly off: Figures;
}

async function inTurns(
  tellers: { readonly on: Teller; readonly off: Teller },
  asked: Asked,
  run: number,
): Promise<Pair> {
  if (run % 2 === 0) {
    const off = await tellers.off.ask(asked);
    return { off, on: await tellers.on.ask(asked) };
  }
  const on = await tellers.on.ask(asked);
  return { on, off: await tellers.off.ask(asked) };
}

const rate = ({ tokens, seconds }: Figures): number => (tokens - 1) / seconds;
const passesOf = ({ tokens, accepted, decode }: Figures): number =>
  decode === null ? tokens - 1 - accepted : decode.passes;
const tokensPerPass = (one: Figures): number => (one.tokens - 1) / Math.max(1, passesOf(one));
const readPerToken = (one: Figures): number => (one.decode?.readBytes ?? 0) / (one.tokens - 1);
const kernelPerToken = (one: Figures): number => (one.storageBytes ?? 0) / (one.tokens - 1);

/** Of the runs of four tokens in a text, those that are the first of their kind. */
function distinctShare(tokens: readonly number[]): number {
  const all = tokens.slice(3).map((_, i) => tokens.slice(i, i + 4).join(" "));
  return all.length === 0 ? 1 : new Set(all).size / all.length;
}
/** An answer with fewer repeats itself: guesses would be right for no merit of theirs. */
const leastDistinct = 0.5;

function spread(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b);
  return `${median(values).toFixed(2)} (${sorted[0]?.toFixed(2)} to ${sorted.at(-1)?.toFixed(2)})`;
}

// ---- real prompts -------------------------------------------------------------------------------------------------

async function realPrompts(): Promise<void> {
  const kinds = flag("kinds")?.split(",");
  const tokens = Number(flag("tokens") ?? 64);
  const wish = flag("speculation");
  const { on, off } = bothPlans(
    limitsFor(parseBytes(flag("memory") ?? "") ?? null, {
      mode: "stream",
      draftPath: flag("draft") ?? null,
      speculation: wish === undefined || wish === "auto" ? "auto" : Number(wish),
    }),
  );
  const isFresh = process.argv.includes("--fresh");
  const guessing = isFresh ? withoutMemory(on) : on;
  console.log(
    `${on.mode}, pool ${bytesText(on.memory.poolBytes)}, up to ${on.speculation?.maxTokens} guesses, draft ${on.speculation?.draftPath ?? "none"}` +
      (isFresh ? ", nothing remembered of the answers before" : ""),
  );
  await using onTeller = await open("on", guessing);
  await using offTeller = await open("off", off);
  const tellers = { on: onTeller, off: offTeller };
  for (const kind of new Set(prompts.map((one) => one.kind))) {
    if (kinds !== undefined && !kinds.includes(kind)) continue;
    const started = performance.now();
    const pairs: Pair[] = [];
    for (const [i, { name, prompt }] of prompts.filter((one) => one.kind === kind).entries()) {
      const pair = await inTurns(tellers, { chat: prompt, tokens }, i);
      const distinct = distinctShare(pair.off.ids);
      const isLoop = distinct < leastDistinct;
      console.log(
        `  ${kind}: ${name}: ${rate(pair.off).toFixed(2)} -> ${rate(pair.on).toFixed(2)} tok/s (x${(rate(pair.on) / rate(pair.off)).toFixed(2)}), ` +
          `${tokensPerPass(pair.on).toFixed(2)} tokens a pass, ${sourcesText(pair.on)}, ` +
          `${bytesText(readPerToken(pair.off))} -> ${bytesText(readPerToken(pair.on))} a token, ` +
          `${pair.on.tokens} tokens, ${(100 * distinct).toFixed(0)} % distinct${isLoop ? ": A LOOP, left out" : ""}` +
          `${pair.on.text === pair.off.text ? "" : ", another text after a near tie"}`,
      );
      if (!isLoop && pair.off.tokens > 8 && pair.on.tokens > 8) pairs.push(pair);
    }
    judgeKind(kind, pairs);
    console.log(`  ${((performance.now() - started) / 1000).toFixed(0)} s for this kind`);
  }
}

function sourcesText({ guesses }: Figures): string {
  if (guesses === null) return "nothing guessed";
  const told = Object.entries(guesses).filter(([, { drafted }]) => drafted > 0);
  return told.map(([name, { drafted, accepted }]) => `${name} ${accepted} of ${drafted} right`).join(", ");
}

function judgeKind(kind: string, pairs: readonly Pair[]): void {
  const gains = pairs.map((pair) => rate(pair.on) / rate(pair.off));
  const least = kind === "prose" ? 0.98 : kind === "quote" ? 0 : 2.5;
  const bytes = pairs.map((pair) => readPerToken(pair.off) / readPerToken(pair.on));
  const [without, with_] = (["off", "on"] as const).map((side) =>
    bytesText(median(pairs.map((pair) => readPerToken(pair[side])))),
  );
  const distinct = median(pairs.map(({ off }) => distinctShare(off.ids)));
  const kernel = pairs.map((pair) => kernelPerToken(pair.off) / kernelPerToken(pair.on));
  verdict(
    median(gains) >= least,
    `${kind}: ${pairs.length} pairs, speed-up ${spread(gains)}, bar ${least}; tokens a pass ${spread(pairs.map(({ on }) => tokensPerPass(on)))}; ` +
      `bytes a token ${without} -> ${with_}, fewer by x${spread(bytes)}, by the kernel's count x${spread(kernel)}; ` +
      `distinct runs of four tokens ${(100 * distinct).toFixed(0)} %`,
  );
}

// ---- text that repeats --------------------------------------------------------------------------------------------

/**
 * The synthetic model has nothing to say, so a grammar says what it may: eight letters again and again. Their own
 * tokens weigh more than any that joins letters, so that the text has one way of being cut into tokens.
 */
const letters = "abcdefgh";
const repeating = {
  pieces: [...letters.repeat(6)],
  grammar: `root ::= ("${letters}")+`,
  bias: [...letters].map((letter) => [letter, 100] as const),
};

async function repeat(): Promise<void> {
  const { on, off } = bothPlans(limitsFor(parseBytes(flag("memory") ?? "2G") ?? null, { mode: "stream" }));
  await using onTeller = await open("on", withoutMemory(on)); // the same is asked again
  await using offTeller = await open("off", off);
  const widths: number[] = [];
  const most = on.speculation?.maxTokens ?? 7;
  for (let run = 0; run < runs; run++) {
    const one = await offTeller.ask({ ids: [40 + run], tokens: 1 });
    const wide = await offTeller.ask({
      ids: Array.from({ length: 1 + most }, (_, i) => 50 + run + 7 * i),
      tokens: 1,
    });
    widths.push(wide.promptSeconds / one.promptSeconds);
  }
  const pairs: Pair[] = [];
  for (let run = 0; run < runs; run++) {
    const asked = { ...repeating, tokens: 8 };
    const offFigures = await offTeller.ask(asked);
    pairs.push({ off: offFigures, on: await onTeller.ask({ ...asked, tokens: 1 + 8 * (1 + most) }) });
  }
  const gains = pairs.map((pair) => rate(pair.on) / rate(pair.off));
  const perPass = median(pairs.map(({ on: one }) => tokensPerPass(one)));
  const cost = median(widths);
  console.log(`a pass of ${1 + most} tokens against one of 1: ${spread(widths)}`);
  for (const { on: one, off: other } of pairs) {
    console.log(
      `  ${rate(other).toFixed(3)} -> ${rate(one).toFixed(3)} tok/s, ${tokensPerPass(one).toFixed(2)} tokens a pass, ${one.accepted} of ${one.drafted} right, ` +
        `${bytesText(readPerToken(other))} -> ${bytesText(readPerToken(one))} a token (kernel ${bytesText(kernelPerToken(other))} -> ${bytesText(kernelPerToken(one))}), ${JSON.stringify(one.text.slice(0, 24))}`,
    );
  }
  const gain = median(gains);
  verdict(
    gain >= (0.85 * perPass) / cost,
    `speed-up ${spread(gains)}, bar 0.85 x ${perPass.toFixed(2)} tokens a pass / ${cost.toFixed(3)} = ${((0.85 * perPass) / cost).toFixed(2)}`,
  );
  verdict(
    gain >= 5 || perPass < 7.5,
    `speed-up ${gain.toFixed(2)} at ${perPass.toFixed(2)} tokens a pass, bar 5 at 8`,
  );
  const bytes = median(pairs.map((pair) => kernelPerToken(pair.off) / kernelPerToken(pair.on)));
  verdict(
    Math.abs(bytes / perPass - 1) < 0.1,
    `bytes a token fall by ${bytes.toFixed(2)} by the kernel's count, tokens a pass rise to ${perPass.toFixed(2)}`,
  );
}

// ---- a mixture of experts -----------------------------------------------------------------------------------------

async function experts(): Promise<void> {
  const limits = limitsFor(parseBytes(flag("memory") ?? "2G") ?? null, { mode: "stream" });
  const file = openModelFile(path);
  const at = new Date().toISOString();
  const { on, off } = bothPlans({ ...limits, speculation: 4 });
  // The same is asked again and again: an answer that is remembered would be guessed for no merit of the text.
  await using onTeller = await open("on", withoutMemory(on));
  await using offTeller = await open("off", off);
  const tellers = { on: onTeller, off: offTeller };
  // Text that repeats loosely, and text that is new: guesses have something to say in both.
  const asks: readonly Asked[] = [
    { ...repeating, tokens: 48 },
    { ids: Array.from({ length: 64 }, (_, i) => 60 + ((i * 13) % 32)), tokens: 48 },
  ];
  for (const asked of asks) await inTurns(tellers, asked, 0); // the pools know the router
  for (const [i, asked] of asks.entries()) {
    const pairs: Pair[] = [];
    for (let run = 0; run < runs; run++) pairs.push(await inTurns(tellers, asked, run));
    const gain = median(pairs.map((pair) => rate(pair.on) / rate(pair.off)));
    const history = pairs.flatMap((pair) =>
      (["on", "off"] as const).flatMap((side) => {
        const { tokens, seconds, drafted, accepted } = pair[side];
        const figures = { at, decodeTokens: tokens - 1, decodeSeconds: seconds, hitRate: null };
        const guesses = { maxTokens: 4, draftKey: null, passes: passesOf(pair[side]), drafted, accepted };
        const run = runOf(on, file, machine, side === "on" ? { ...figures, guesses } : figures);
        return run === null ? [] : [run];
      }),
    );
    const chosen = planOf(file, limits, machine, { history });
    const isOn = chosen.speculation !== null;
    const say = machine.profile === null ? " (no profile: own runs are not kept)" : "";
    verdict(
      isOn === gain > 1.03 || (Math.abs(gain - 1) < 0.05 && !isOn),
      `${i === 0 ? "text that repeats" : "new text"}: on/off ${gain.toFixed(3)}, ${median(pairs.map((pair) => tokensPerPass(pair.on))).toFixed(2)} tokens a pass; ` +
        `auto then chooses ${isOn ? "on" : "off"}${say}: ${chosen.choices.find((one) => one.name === "speculation")?.reason}`,
    );
  }
}

// ---- clients ------------------------------------------------------------------------------------------------------

async function clients(): Promise<void> {
  const count = Number(flag("clients") ?? 8);
  const tokens = Number(flag("tokens") ?? 10);
  const main = join(import.meta.dir, "..", "..", "src", "main.ts");
  const child = Bun.spawn(
    [
      process.execPath,
      main,
      "serve",
      path,
      "--parallel",
      String(count),
      "--port",
      "0",
      "--json",
      "--context",
      "512",
      "--memory",
      flag("memory") ?? "2G",
    ],
    { stdout: "pipe", stderr: "inherit" },
  );
  try {
    const { value } = await linesOf(child.stdout).next();
    const { endpoint, models } = JSON.parse(value as string) as {
      readonly endpoint: string;
      readonly models: readonly { readonly name: string }[];
    };
    const ask = async (seed: number, most: number): Promise<number> => {
      const response = await fetch(`${endpoint}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({
          model: models[0]?.name,
          prompt: `client ${seed}`,
          max_tokens: most,
          temperature: 1,
          seed,
        }),
      });
      const reply = (await response.json()) as { readonly usage?: { readonly completion_tokens: number } };
      if (reply.usage === undefined) throw new Error(JSON.stringify(reply));
      return reply.usage.completion_tokens;
    };
    await ask(0, 1); // loads the model
    const timed = async (many: number): Promise<number> => {
      const started = performance.now();
      const told = await Promise.all(Array.from({ length: many }, (_, i) => ask(100 * many + i, tokens)));
      return told.reduce((a, b) => a + b, 0) / ((performance.now() - started) / 1000);
    };
    const ratios: number[] = [];
    for (let run = 0; run < runs; run++) {
      const one = await timed(1);
      const all = await timed(count);
      console.log(
        `  1 client ${one.toFixed(3)} tok/s, ${count} clients ${all.toFixed(3)} tok/s, x${(all / one).toFixed(2)}`,
      );
      ratios.push(all / one);
    }
    verdict(
      median(ratios) >= 5,
      `${count} clients against one, with their prompts: x${spread(ratios)}, bar 5`,
    );
  } finally {
    child.kill("SIGTERM");
    await child.exited;
  }
}

// ---- replay -------------------------------------------------------------------------------------------------------

/** What another rule, or steering at each pass, would bring: over answers that were made once, by the measured cost. */
async function replay(): Promise<void> {
  const tokens = Number(flag("tokens") ?? 96);
  const kinds = flag("kinds")?.split(",");
  const file = flag("answers");
  const chosen = prompts.filter(({ kind }) => kinds === undefined || kinds.includes(kind));
  const answers: { kind: string; promptIds: readonly number[]; ids: readonly number[] }[] =
    file !== undefined && existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : [];
  if (answers.length === 0) {
    const plan = planOf(openModelFile(path), limitsFor(null, { speculation: "off" }));
    await using teller = await open("answers", plan);
    for (const { kind, prompt } of chosen) {
      const { promptIds, ids } = await teller.ask({ chat: prompt, tokens });
      answers.push({ kind, promptIds, ids });
      if (file !== undefined) writeFileSync(file, JSON.stringify(answers));
    }
  }
  const depth = { leastTokens: 2, tokensPerRight: 4, newestPercent: 30 };
  const rule = { leastMatchTokens: 1, mostCarries: 3, maxTokens: 7, ...depth };
  const rules: readonly (readonly [string, (memory: readonly number[]) => Guesser])[] = [
    ["the plan's", (memory) => contextGuesses(rule, memory)],
    ["the plan's, nothing remembered", () => contextGuesses(rule)],
    ["the plan's, no carrying on", (memory) => contextGuesses({ ...rule, mostCarries: 0 }, memory)],
    ["the plan's, always up to 7", (memory) => contextGuesses({ ...rule, leastTokens: 7 }, memory)],
    ["the plan's, up to 15", (memory) => contextGuesses({ ...rule, maxTokens: 15 }, memory)],
    [
      "steered: up to 15 where 12 match",
      (memory) => contextGuesses({ ...rule, sure: { matchTokens: 12, maxTokens: 15 } }, memory),
    ],
    ["longest match alone, up to 7", () => longestMatch(1, () => 7)],
    ["llama.cpp: newest place (3), then the map (1)", () => firstOf(newestPlace(3, 7), mapOfKeys(1, 7))],
    ["llama.cpp: the map (2)", () => mapOfKeys(2, 7)],
    ["llama.cpp: the map (1)", () => mapOfKeys(1, 7)],
  ];
  for (const kind of new Set(answers.map((one) => one.kind))) {
    for (const [name, rule] of rules) {
      const ofKind = answers
        .map((one) => ({ ...one, ids: one.ids.slice(0, tokens) }))
        .filter((one) => one.kind === kind && distinctShare(one.ids) >= leastDistinct && one.ids.length > 8);
      const told = ofKind.map(({ promptIds, ids }, i) => {
        // As the engine remembers them where one is asked after the other: all but the last pass.
        const memory = ofKind.slice(0, i).flatMap((one) => [...one.promptIds, ...one.ids.slice(0, -4), -1]);
        return replayGuesses(promptIds, ids, rule(memory), densePassCost);
      });
      console.log(
        `${kind}: ${name}: tokens a pass ${spread(told.map((one) => one.tokens / one.passes))}, speed-up ${spread(told.map((one) => one.tokens / one.cost))}`,
      );
    }
  }
}

// ---- near ties ----------------------------------------------------------------------------------------------------

async function flips(): Promise<void> {
  const tokens = Number(flag("tokens") ?? 96);
  const limits = limitsFor(parseBytes(flag("memory") ?? "") ?? null, { speculation: 7 });
  const { on, off } = bothPlans(limits);
  const plain = { ...off, repack: false };
  const kinds = flag("kinds")?.split(",");
  const told: { on: Told; off: Told }[] = [];
  const rounding: number[] = [];
  {
    // One after the other: this is no measurement of time.
    await using offTeller = await open("off", plain);
    await using onTeller = await open("on", { ...on, repack: false });
    for (const { prompt, kind } of prompts) {
      if (kinds !== undefined && !kinds.includes(kind)) continue;
      const asked = { chat: prompt, tokens, whole: true };
      const without = await offTeller.ask({ ...asked, margins: true, roundingPlaces: 4 });
      rounding.push(...without.rounding);
      const guessed = await onTeller.ask(asked);
      const asTold = (one: Figures): Told => ({ ...one, tokens: one.ids });
      told.push({ off: asTold(without), on: asTold(guessed) });
    }
  }
  // What rounding moves with no guess in it, a guess may move.
  const tie = Math.max(...rounding);
  const comparisons = told.map((one) => compare(one.off, one.on, tie));
  const parted = comparisons.flatMap((one) => (one.kind === "equal" ? [] : [one]));
  // After the first difference two texts have nothing to do with each other.
  const same = told.reduce((sum, one, i) => {
    const comparison = comparisons[i];
    return (
      sum + (comparison === undefined || comparison.kind === "equal" ? one.off.tokens.length : comparison.at)
    );
  }, 0);
  const accepted = told.reduce((sum, one) => sum + one.on.accepted, 0);
  console.log(
    `${told.length} answers, ${same} tokens compared, ${accepted} guesses taken: ${parted.length} answers part, ` +
      `${((1000 * parted.length) / Math.max(1, same)).toFixed(2)} per 1,000 tokens; margins there ${parted.map((one) => one.margin.toFixed(4)).join(", ") || "none"} nats`,
  );
  console.log(
    `a pass over many tokens moves the lead of the likelier of two tokens by ${median(rounding).toFixed(4)} nats in the median, ` +
      `${tie.toFixed(4)} at most (${rounding.length} places, nothing guessed)`,
  );
  const drafted = told.reduce((sum, one) => sum + one.on.drafted, 0);
  console.log(`${drafted} tokens were guessed: each pass with a guess is a wide one, right or wrong`);
  const different = comparisons.filter((one) => one.kind === "different").length;
  verdict(different === 0, `${different} answers part where the model was surer than rounding moves it`);
}

switch (mode) {
  case "prompts":
    await realPrompts();
    break;
  case "repeat":
    await repeat();
    break;
  case "experts":
    await experts();
    break;
  case "clients":
    await clients();
    break;
  case "replay":
    await replay();
    break;
  case "flips":
    await flips();
    break;
  default:
    throw new Error(
      "say prompts MODEL, repeat FILE, experts FILE, clients FILE, replay MODEL or flips MODEL",
    );
}

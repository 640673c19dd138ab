// Guesses change how fast an answer comes, never which: greedy text is the text without guesses, sampling keeps its
// distribution, slots that guess together do not meddle with each other, and a reader that leaves in the middle of a
// pass of guesses leaves nothing behind.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { planOf as planOfApi } from "../../src/api";
import { differenceOf, openDraft } from "../../src/draft";
import { type Engine, openEngine } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import { openModelFile, readMetadataArray } from "../../src/modelfile";
import { noLimits, type Plan, type Speculation, totalBytes } from "../../src/plan";
import { validatePlan } from "../../src/plan-json";
import { contextGuesses, densePassCost, replayGuesses } from "../bench/guesses";
import { makeFixture } from "../fixtures";
import { openRandom, type Random } from "../fixtures/random";
import { withPool } from "../golden/compare";
import { held, until, untilHeldAtMost } from "./process";
import { compare, type Told, tell } from "./speculation";
import { planOf } from "./tiny";

const kinds = ["tiny-llama", "tiny-mixtral", "tiny-qwen3moe"] as const;
const withMtp = "tiny-glm4moe";

const folder = mkdtempSync(join(tmpdir(), "hypura-speculation-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const models = new Map<string, string>();
beforeAll(async () => {
  for (const kind of [...kinds, withMtp]) {
    const [path = ""] = await makeFixture(kind, join(folder, `${kind}.gguf`));
    models.set(kind, path);
  }
});

function guesses(maxTokens: number): Speculation {
  return {
    maxTokens,
    context: {
      leastMatchTokens: 1,
      mostCarries: 3,
      memoryTokens: 4096,
      leastTokens: 2,
      tokensPerRight: 4,
      newestPercent: 30,
    },
    draftPath: null,
    draftKey: null,
    mtp: false,
    draftProbability: 0,
  };
}

/** Streaming through the smallest pool, with a batch that holds every slot's token and guesses and not one more. */
function streamingPlan(kind: string, slotCount: number, maxTokens: number): Plan {
  const plan = planOf(models.get(kind) ?? "", { mode: "stream", slotCount, contextTokens: 512 });
  const pooled = withPool(plan, "minimum", kind === "tiny-llama" ? "pinned-cyclic" : "lfu-decay");
  return {
    ...pooled,
    ubatchTokens: 32,
    batchTokens: Math.max(2, slotCount * (1 + maxTokens), 32),
    speculation: maxTokens === 0 ? null : guesses(maxTokens),
  };
}

/** A text that comes again and again with a change here and there: guesses are right for a while, and then wrong. */
function loosePrompt(random: Random, length = 120): readonly number[] {
  const phrase = Array.from({ length: 12 }, () => 5 + random.below(200));
  return Array.from({ length }, (_, i) =>
    random.below(12) === 0 ? 5 + random.below(200) : (phrase[i % phrase.length] as number),
  );
}

/** Weighs four tokens so that the model writes with them alone, and its text has the pairs of its prompt. */
const few = [20, 21, 22, 23] as const;
const onlyFew = few.map((token) => [token, 100] as const);

function fewPrompt(random: Random): readonly number[] {
  return Array.from({ length: 90 }, () => random.pick(few));
}

interface Question {
  readonly prompt: readonly number[];
  readonly logit_bias?: readonly (readonly [number, number])[];
}

function questions(seed: number): readonly Question[] {
  const random = openRandom(seed);
  return Array.from({ length: 6 }, (_, i) =>
    i % 2 === 0 ? { prompt: loosePrompt(random) } : { prompt: fewPrompt(random), logit_bias: onlyFew },
  );
}

function greedy(question: Question, tokens = 48) {
  return { ...question, n_predict: tokens, temperature: 0, ignore_eos: true };
}

async function tellAll(plan: Plan, asked: readonly Question[], margins: boolean): Promise<readonly Told[]> {
  await using engine = await openEngine(plan);
  // As many at once as there are slots.
  const told: Told[] = [];
  for (let i = 0; i < asked.length; i += plan.slotCount) {
    const group = asked.slice(i, i + plan.slotCount);
    told.push(...(await Promise.all(group.map((one) => tell(engine, greedy(one), margins)))));
  }
  return told;
}

function sumOf(told: readonly Told[], field: "drafted" | "accepted"): number {
  return told.reduce((sum, one) => sum + one[field], 0);
}

const cases = kinds.flatMap((kind) =>
  [1, 4].flatMap((slots) => [3, 15].map((most) => [kind, slots, most] as const)),
);

describe("greedy text is the text without guesses", () => {
  const plain = new Map<string, readonly Told[]>();
  let equal = 0;
  let ties = 0;

  test.each(cases)("%s, %d slots, up to %d guesses", async (kind, slots, most) => {
    const asked = questions(7);
    if (!plain.has(kind)) {
      plain.set(kind, await tellAll(streamingPlan(kind, 1, 0), asked, true));
    }
    const expected = plain.get(kind) ?? [];
    const told = await tellAll(streamingPlan(kind, slots, most), asked, false);
    expect(told.length).toBe(expected.length);
    for (const [i, one] of told.entries()) {
      const comparison = compare(expected[i] as Told, one);
      expect(comparison.kind, JSON.stringify(comparison)).not.toBe("different");
      equal += comparison.kind === "equal" ? 1 : 0;
      ties += comparison.kind === "tie" ? 1 : 0;
      expect(one.accepted).toBeLessThanOrEqual(one.drafted);
    }
    expect(sumOf(told, "accepted")).toBeGreaterThan(0);
    expect(sumOf(told, "accepted")).toBeLessThan(sumOf(told, "drafted")); // some were wrong
    expect(expected.every((one) => one.drafted === 0)).toBe(true);
  });

  test("ties are few", () => {
    expect(equal + ties).toBe(cases.length * 6);
    expect(ties / (equal + ties)).toBeLessThan(0.1);
  });
});

describe("what the counters say", () => {
  test("accepted guesses are passes that were not made", async () => {
    const [, question] = questions(11) as [Question, Question];
    await using engine = await openEngine(streamingPlan("tiny-llama", 1, 7));
    const before = await engine.streaming();
    const told = await tell(engine, greedy(question, 64));
    const after = await engine.streaming();
    const passes = (after?.passes ?? 0) - (before?.passes ?? 0);
    // 90 tokens of prompt in micro-batches of 32 and the cut before the last of them, then a pass for each token that
    // was not guessed; a pass of guesses is one micro-batch.
    const decodePasses = 64 - 1 - told.accepted;
    expect(told.accepted).toBeGreaterThan(0);
    expect(passes).toBeGreaterThanOrEqual(decodePasses + 3);
    expect(passes).toBeLessThanOrEqual(decodePasses + 5);
  });

  test("the replay of an answer counts what the engine counted", async () => {
    const plan = streamingPlan("tiny-llama", 1, 7);
    const { context } = guesses(7);
    if (context === null) throw new Error("nothing is guessed from the context");
    for (const question of questions(19)) {
      await using engine = await openEngine(plan); // it remembers the requests before
      const told = await tell(engine, greedy(question, 64));
      const replayed = replayGuesses(
        question.prompt,
        told.tokens,
        contextGuesses({ ...context, maxTokens: 7 }),
        densePassCost,
      );
      expect([replayed.drafted, replayed.accepted]).toEqual([told.drafted, told.accepted]);
      const none = { drafted: 0, accepted: 0 };
      const { drafted, accepted } = told;
      expect(await engine.guesses()).toEqual({ context: { drafted, accepted }, draft: none, mtp: none });
    }
  });

  test("a request that comes again is guessed from the first, as far as the memory reaches", async () => {
    const [question = { prompt: [5] }] = questions(23);
    const other = { prompt: Array.from({ length: 40 }, (_, i) => 300 + 3 * i) };
    const accepted = async (memoryTokens: number): Promise<readonly number[]> => {
      const plan = streamingPlan("tiny-llama", 1, 7);
      const speculation = guesses(7);
      const context = speculation.context === null ? null : { ...speculation.context, memoryTokens };
      await using engine = await openEngine({ ...plan, speculation: { ...speculation, context } });
      const first = await tell(engine, greedy(question, 64));
      await tell(engine, greedy(other, 4));
      const again = await tell(engine, greedy(question, 64));
      expect(again.tokens).toEqual(first.tokens);
      return [first.accepted, again.accepted];
    };
    const [first = 0, again = 0] = await accepted(4096);
    expect(first).toBeLessThan(50);
    expect(again).toBeGreaterThan(50); // of 62, but for what the end of an answer leaves out
    expect(await accepted(0)).toEqual([first, first]);
  });

  test("a plan whose batch cannot hold all guesses is refused", async () => {
    const plan = { ...streamingPlan("tiny-llama", 4, 15), batchTokens: 63 };
    await expect(openEngine(plan)).rejects.toThrow(HypuraError);
    expect(() => validatePlan(plan)).toThrow(/batchTokens is 63, not at least 64/);
  });
});

// ---- sampling -------------------------------------------------------------------------------------------------

/** Pearson's statistic of two samples over the same cells, in standard deviations above what chance gives. */
function distance(one: ReadonlyMap<string, number>, other: ReadonlyMap<string, number>): number {
  const sum = (counts: ReadonlyMap<string, number>) => [...counts.values()].reduce((a, b) => a + b, 0);
  const [n, m] = [sum(one), sum(other)];
  let chi = 0;
  let cells = 0;
  let rest = [0, 0];
  const add = ([a, b]: readonly number[]) => {
    const all = (a ?? 0) + (b ?? 0);
    const [ea, eb] = [(all * n) / (n + m), (all * m) / (n + m)];
    chi += ((a ?? 0) - ea) ** 2 / ea + ((b ?? 0) - eb) ** 2 / eb;
    cells++;
  };
  for (const key of new Set([...one.keys(), ...other.keys()])) {
    const pair = [one.get(key) ?? 0, other.get(key) ?? 0];
    // Too small a cell is no normal variable: those count together.
    if ((pair[0] ?? 0) + (pair[1] ?? 0) < 20) rest = rest.map((value, i) => value + (pair[i] ?? 0));
    else add(pair);
  }
  if (rest[0] !== 0 || rest[1] !== 0) add(rest);
  const freedom = Math.max(1, cells - 1);
  // Wilson and Hilferty: the cube root of a chi-square is all but normal.
  const spread = 2 / (9 * freedom);
  return ((chi / freedom) ** (1 / 3) - (1 - spread)) / Math.sqrt(spread);
}

describe("sampling keeps its distribution", () => {
  const sampleCount = 1500;
  const prompt = fewPrompt(openRandom(3)).slice(0, 40);

  /**
   * How often each continuation came; its first token comes with the prompt, guesses make the others. The core guesses
   * nothing again where it was wholly wrong before, and forgets that with a shorter prompt: one stands between.
   */
  async function sampled(engine: Engine, seeds: number, temperature: number) {
    const forget = { prompt: [20, 21], n_predict: 1, temperature: 0 };
    const counts = new Map<string, number>();
    const texts: string[] = [];
    let drafted = 0;
    let accepted = 0;
    for (let i = 0; i < sampleCount; i++) {
      const body = { prompt, logit_bias: onlyFew, n_predict: 6, ignore_eos: true, cache_prompt: true };
      if (engine.plan.speculation !== null) await tell(engine, forget);
      const told = await tell(engine, { ...body, temperature, samplers: ["temperature"], seed: seeds + i });
      const key = told.tokens.slice(1, 4).join(" ");
      counts.set(key, (counts.get(key) ?? 0) + 1);
      texts.push(told.tokens.join(" "));
      drafted += told.drafted;
      accepted += told.accepted;
    }
    return { counts, texts, drafted, accepted };
  }

  test("with guesses and without, from other seeds; another temperature is told apart", async () => {
    const residentPlan = planOf(models.get("tiny-llama") ?? "", { contextTokens: 512 });
    const plainPlan = { ...residentPlan, speculation: null, repack: false };
    await using plain = await openEngine(plainPlan);
    const without = await sampled(plain, 1, 1);
    const again = await sampled(plain, 500_001, 1);
    const warmer = await sampled(plain, 900_001, 1.6);
    await plain.close();
    await using guessing = await openEngine({ ...plainPlan, speculation: guesses(3) });
    const withGuesses = await sampled(guessing, 700_001, 1);
    const sameSeeds = await sampled(guessing, 1, 1);

    expect(withGuesses.drafted).toBeGreaterThan(sampleCount);
    expect(withGuesses.accepted).toBeGreaterThan(sampleCount / 20);
    expect(withGuesses.accepted).toBeLessThan(withGuesses.drafted);
    // Fixed seeds: what is 4 standard deviations off by chance, one time in 30,000, is so for ever or never.
    expect(distance(without.counts, again.counts)).toBeLessThan(4);
    expect(distance(without.counts, withGuesses.counts)).toBeLessThan(4);
    expect(distance(without.counts, warmer.counts)).toBeGreaterThan(6);
    // What the guesses would give if they were believed unseen is told apart, too.
    const believed = new Map(withGuesses.counts);
    const [likeliest = ""] = [...believed].sort(([, a], [, b]) => b - a)[0] ?? [];
    believed.set(likeliest, (believed.get(likeliest) ?? 0) + sampleCount / 5);
    expect(distance(without.counts, believed)).toBeGreaterThan(4);
    // Guesses are compared with what the sampler draws anyway, so that a seed gives the text that it gives without.
    const same = sameSeeds.texts.filter((text, i) => text === without.texts[i]).length;
    expect(same / sampleCount).toBeGreaterThan(0.98); // rounding moves a draw at the edge of two tokens
  });
});

// ---- a draft model --------------------------------------------------------------------------------------------

describe("a draft model", () => {
  let twin = "";
  let other = "";
  beforeAll(async () => {
    twin = join(folder, "twin.gguf");
    copyFileSync(models.get("tiny-llama") ?? "", twin);
    [other = ""] = await makeFixture("tiny-llama", join(folder, "other.gguf"), { seed: 9, layers: 2 });
  });

  const withDraft = (slotCount: number, draftPath: string): Plan => {
    const plan = streamingPlan("tiny-llama", slotCount, 7);
    return { ...plan, speculation: { ...guesses(7), context: null, draftPath } };
  };

  test.each([1, 4])(
    "that thinks as the model does is right, and one that does not changes nothing, %d slots",
    async (slots) => {
      // A draft knows nothing of the weights that a request puts on tokens.
      const asked = questions(17).filter((question) => question.logit_bias === undefined);
      const expected = await tellAll(streamingPlan("tiny-llama", 1, 0), asked, true);
      for (const path of [twin, other]) {
        const told = await tellAll(withDraft(slots, path), asked, false);
        const kindsSeen = told.map((one, i) => compare(expected[i] as Told, one).kind);
        expect(kindsSeen).not.toContain("different");
        const share = sumOf(told, "accepted") / sumOf(told, "drafted");
        expect(sumOf(told, "drafted")).toBeGreaterThan(50);
        if (path === twin) expect(share).toBeGreaterThan(0.9);
        else expect(share).toBeLessThan(0.9);
      }
    },
  );

  test("is asked for, found beside the model, and refused where its words are others", async () => {
    const file = openModelFile(models.get("tiny-llama") ?? "");
    expect(openDraft(file, other)).toMatchObject({ path: other, isAskedFor: true });
    expect(() => openDraft(file, file.path)).toThrow(/names the model itself/);
    expect(() => openDraft(file, join(folder, "none.gguf"))).toThrow(/there is no file/);
    const [stranger = ""] = await makeFixture("tiny-gpt-oss", join(folder, "stranger", "stranger.gguf"));
    expect(differenceOf(openModelFile(stranger), file)).toBeNull(); // all fixtures have one vocabulary
    const bytes = readFileSync(other);
    const words = readMetadataArray(file, "tokenizer.ggml.tokens") ?? [];
    const word = words.find((one) => /^[a-z]{5}$/.test(String(one))) as string;
    bytes.write("zzzzz", bytes.indexOf(word, bytes.indexOf("tokenizer.ggml.tokens")));
    const wrong = join(folder, "wrong.gguf");
    writeFileSync(wrong, bytes);
    expect(() => openDraft(file, wrong)).toThrow(/cannot guess for "tiny-llama.gguf" \(token \d+ is "zzzzz"/);
  });

  test("takes its memory from the plan, and one that does not fit is said", async () => {
    const path = models.get("tiny-llama") ?? "";
    const limits = { mode: "stream", contextTokens: 512, slotCount: 1, threads: 1 } as const;
    const file = openModelFile(path);
    const plan = (memoryBytes: number | null, change: object = {}) =>
      planOfApi(file, { ...noLimits, ...limits, memoryBytes, draftPath: twin, speculation: 4, ...change });
    const { memory, speculation, choices } = plan(null);
    expect(speculation).toMatchObject({ draftPath: twin, maxTokens: 4 });
    expect(memory.draftBytes).toBeGreaterThan(openModelFile(twin).model.tensorBytes);
    expect(choices.find(({ name }) => name === "draft")?.reason).toBe("asked for");
    let least = totalBytes(memory);
    for (let step = least / 2; step > 1000; step /= 2) {
      const fits = ((): boolean => {
        try {
          plan(Math.floor(least - step), { draftPath: null });
          return true;
        } catch {
          return false;
        }
      })();
      least -= fits ? step : 0;
    }
    expect(() => plan(Math.floor(least + memory.draftBytes / 2))).toThrow(
      /draft model twin.gguf does not fit/,
    );
    expect(() => plan(null, { speculation: "off" })).toThrow(/leave out one of them/);
  });
});

// ---- the model's own layers -----------------------------------------------------------------------------------

describe("MTP layers", () => {
  test.each([1, 4])(
    "that guess change nothing, and what they guess is told apart, %d slots",
    async (slots) => {
      const asked = questions(29).filter((question) => question.logit_bias === undefined);
      const expected = await tellAll(streamingPlan(withMtp, 1, 0), asked, true);
      const plan = streamingPlan(withMtp, slots, 4);
      const speculation = { ...guesses(4), context: null, mtp: true };
      await using engine = await openEngine({ ...plan, speculation });
      const told = await Promise.all(asked.slice(0, slots).map((one) => tell(engine, greedy(one))));
      for (const [i, one] of told.entries()) {
        const comparison = compare(expected[i] as Told, one);
        expect(comparison.kind, JSON.stringify(comparison)).not.toBe("different");
      }
      const counted = await engine.guesses();
      expect(counted?.mtp).toEqual({ drafted: sumOf(told, "drafted"), accepted: sumOf(told, "accepted") });
      expect(counted?.mtp.drafted).toBeGreaterThan(20);
      expect(counted?.context).toEqual({ drafted: 0, accepted: 0 });
    },
  );

  test("are taken where guesses are, with the memory of their context, and inspect says so", () => {
    const file = openModelFile(models.get(withMtp) ?? "");
    const limits = { ...noLimits, mode: "stream", contextTokens: 512, slotCount: 1, threads: 1 } as const;
    const plan = (change: object) => planOfApi(file, { ...limits, ...change });
    const line = ({ choices }: Plan) => choices.find(({ name }) => name === "mtp layers");
    const asked = plan({ speculation: 4 });
    expect(asked.speculation).toMatchObject({ mtp: true, draftKey: "mtp", maxTokens: 4 });
    expect(asked.memory.draftBytes).toBeGreaterThan(0);
    expect(line(asked)).toMatchObject({ value: "1" });
    expect(validatePlan(JSON.parse(JSON.stringify(asked)))).toEqual(asked);
    // Of a mixture of experts auto guesses nothing before own runs showed a gain.
    expect(line(plan({}))).toMatchObject({ value: "not used", reason: expect.stringMatching(/own run/) });
    expect(line(plan({ speculation: "off" }))).toMatchObject({ value: "not used" });
    expect(line(plan({ speculation: 4, draftPath: models.get("tiny-llama") }))).toMatchObject({
      reason: expect.stringMatching(/draft model/),
    });
    const without = openModelFile(models.get("tiny-llama") ?? "");
    expect(line(planOfApi(without, { ...limits, speculation: 4 }))).toBeUndefined();
  });
});

// ---- readers that leave ---------------------------------------------------------------------------------------

describe("readers that leave while guesses are verified", () => {
  test.each(["tiny-llama", "tiny-mixtral"] as const)("%s: the next answer is right", async (kind) => {
    const random = openRandom(5);
    const [, question = { prompt: [5] }] = questions(13);
    await using engine = await openEngine(streamingPlan(kind, 2, 7));
    const expected = await tell(engine, greedy(question));
    expect(expected.accepted).toBeGreaterThan(0);
    const before = held();
    for (let i = 0; i < 60; i++) {
      const abort = new AbortController();
      const pair = [0, 1].map(() => tell(engine, greedy(question, 300), false, abort.signal));
      setTimeout(() => abort.abort(), 5 + random.below(60));
      for (const result of await Promise.allSettled(pair)) {
        if (result.status === "rejected") {
          expect(result.reason).toBeInstanceOf(HypuraError);
          expect((result.reason as HypuraError).code).toBe("cancelled");
        }
      }
    }
    await until(
      () => engine.activeRequests() === 0,
      () => `${engine.activeRequests()} requests are active`,
    );
    await untilHeldAtMost(before);
    const after = await tell(engine, greedy(question));
    expect(after.tokens).toEqual(expected.tokens);
  });
});

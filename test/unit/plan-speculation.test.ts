// How many tokens a pass may guess: by what it reads, by what a person asked for, and by the room of a pass.

import { describe, expect, test } from "bun:test";
import type { Model } from "../../src/model";
import { noLimits, type PlanLimits } from "../../src/plan";
import type { Placement, Speeds } from "../../src/plan-cost";
import type { GuessExperience } from "../../src/plan-history";
import {
  chooseSpeculation,
  type Draft,
  judgeDraft,
  type SpeculationFacts,
  tokensPerPass,
} from "../../src/plan-speculation";

const strides = [{ tensorIndex: 0, strideCount: 10 }];
const streamed = {
  gpuLayers: 0,
  tiers: ["nvme"],
  classes: [{ kind: "dense", sets: strides, slotCount: 2, strideBytes: 100 }],
} as unknown as Placement;
const resident = { gpuLayers: 0, tiers: ["ram"], classes: [] } as unknown as Placement;
const tensors = [{ typeName: "q4_K", shape: [10, 100], touchedBytesPerToken: 1000, role: "ffn" }];
const dense = { kind: "dense", tensors, memoryLayers: [] } as unknown as Model;
const experts = { kind: "mixture-of-experts", tensors, memoryLayers: [] } as unknown as Model;
const recurrent = { ...dense, memoryLayers: [{ stateElements: 64 }] } as unknown as Model;

/** Eight strides of 100 bytes are read at 800 bytes a second; a batch of n tokens computes for n * `seconds`. */
function speeds(seconds: number): Speeds {
  return {
    batchSeconds: (_: string, __: unknown, tokens: number) => tokens * seconds,
    storage: { bestBytesPerSecond: 800 },
  } as unknown as Speeds;
}

function choose(change: Partial<SpeculationFacts>, limits: Partial<PlanLimits> = {}, batchTokens = 512) {
  const usual = {
    model: dense,
    placement: streamed,
    speeds: null,
    experience: null,
    draft: null,
    mtp: false,
  };
  const facts = { ...usual, ...change };
  return chooseSpeculation({ ...facts, limits: { ...noLimits, ...limits } }, batchTokens).speculation;
}

describe("guesses", () => {
  test("auto guesses for a dense model that streams, and for no other", () => {
    expect(choose({})).toMatchObject({
      maxTokens: 7,
      context: { leastMatchTokens: 1, mostCarries: 3 },
    });
    expect(choose({ model: experts })).toBeNull();
    expect(choose({ placement: resident })).toBeNull();
    expect(choose({ model: recurrent })).toBeNull();
  });

  test("as many as a pass takes without getting longer, by what was measured", () => {
    expect(choose({ speeds: speeds(0.2) })?.maxTokens).toBe(3); // 4 tokens compute in about 3/4 of the second of the reads
    expect(choose({ speeds: speeds(0.3) })).toBeNull(); // one guess alone would fit
    expect(choose({ speeds: speeds(0.01) })?.maxTokens).toBe(15);
    expect(choose({ speeds: speeds(2) })).toBeNull();
  });

  test("slots share a pass: together they guess no more than one would", () => {
    expect(choose({}, { slotCount: 2 })?.maxTokens).toBe(3);
    expect(choose({}, { slotCount: 8 })).toBeNull();
    expect(choose({ speeds: speeds(0.1) }, { slotCount: 4 })?.maxTokens).toBe(1); // 8 of 10 tokens
    expect(choose({}, { slotCount: 8, speculation: 2 })?.maxTokens).toBe(2);
  });

  test("a person's word counts, within what a pass of all slots holds", () => {
    expect(choose({}, { speculation: "off" })).toBeNull();
    expect(choose({ model: experts, placement: resident }, { speculation: 3 })?.maxTokens).toBe(3);
    expect(choose({}, { speculation: 64, slotCount: 8 }, 32)?.maxTokens).toBe(3);
    expect(choose({}, { slotCount: 32 }, 32)).toBeNull();
  });
});

describe("what own runs say", () => {
  const slow: GuessExperience = {
    plainSeconds: 1,
    guessed: [{ maxTokens: 4, seconds: 1.2, tokensPerPass: 1.1 }],
  };
  const fast: GuessExperience = {
    plainSeconds: 1,
    guessed: [
      { maxTokens: 4, seconds: 0.7, tokensPerPass: 1.9 },
      { maxTokens: 8, seconds: 0.6, tokensPerPass: 2.4 },
    ],
  };

  test("beats what is usual, both ways", () => {
    expect(choose({ experience: slow })).toBeNull();
    expect(choose({ model: experts, experience: slow })).toBeNull();
    expect(choose({ model: experts, experience: fast })?.maxTokens).toBe(8);
    expect(choose({ model: experts, experience: fast }, {}, 4)?.maxTokens).toBe(3);
  });

  test("says nothing where one of the two is missing, or the gain is within what a run differs by", () => {
    expect(choose({ experience: { ...slow, plainSeconds: null } })?.maxTokens).toBe(7);
    expect(choose({ model: experts, experience: { plainSeconds: null, guessed: fast.guessed } })).toBeNull();
    const even = { plainSeconds: 1, guessed: [{ maxTokens: 4, seconds: 0.98, tokensPerPass: 1 }] };
    expect(choose({ model: experts, experience: even })).toBeNull();
  });

  test("and a person's word beats both", () => {
    expect(choose({ experience: slow }, { speculation: 4 })?.maxTokens).toBe(4);
  });
});

describe("a draft model", () => {
  const draft: Draft = { path: "/d.gguf", name: "d.gguf", model: dense, bytes: 300 };
  /** Slots for so many of ten strides of 100 bytes. */
  const holding = (slotCount: number): Placement =>
    ({
      gpuLayers: 0,
      tiers: ["nvme"],
      classes: [{ kind: "dense", sets: strides, slotCount, strideBytes: 100 }],
    }) as unknown as Placement;
  const judge = (alone: number, together: number, change: object = {}) =>
    judgeDraft({
      draft,
      model: dense,
      alone: holding(alone),
      together: holding(together),
      guesses: 7,
      speeds: null,
      experienceAlone: null,
      experienceTogether: null,
      ...change,
    });
  const measured = (tokens: number): GuessExperience => ({
    plainSeconds: null,
    guessed: [{ maxTokens: 7, seconds: 1, tokensPerPass: tokens }],
  });

  test("A(n) is the sum of the powers of the acceptance", () => {
    expect(tokensPerPass(0.5, 3)).toBe(1.875);
    expect(tokensPerPass(1, 7)).toBe(8);
    expect(tokensPerPass(0, 7)).toBe(1);
  });

  test("is taken where it brings more tokens a pass than a pass reads more", () => {
    // W - R + d over W - R: 800 and 500 bytes, 1.6 tokens.
    const verdict = judge(5, 2, { experienceTogether: measured(1.7) });
    expect(verdict).toMatchObject({ pays: true });
    expect(verdict.reason).toContain("1.60 tokens for each one without it, and brings 1.70");
    expect(judge(5, 2, { experienceTogether: measured(1.5) }).pays).toBe(false);
    expect(judge(9, 6).pays).toBe(false); // 100 bytes become 400: four times, and about three are assumed
    expect(judge(5, 2).pays).toBe(true);
  });

  test("has to beat what the context alone brings", () => {
    const experienceTogether = measured(3);
    expect(judge(5, 2, { experienceTogether, experienceAlone: measured(2.5) }).pays).toBe(false);
    expect(judge(5, 2, { experienceTogether, experienceAlone: measured(1.2) }).pays).toBe(true);
  });

  test("that guesses slowly costs what a pass waits for it", () => {
    expect(judge(5, 2, { speeds: speeds(0.01) }).pays).toBe(true);
    expect(judge(5, 2, { speeds: speeds(0.5) }).pays).toBe(false);
  });

  test("guesses beside the context", () => {
    expect(choose({ draft })).toMatchObject({
      draftPath: "/d.gguf",
      context: { leastMatchTokens: 3, mostCarries: 0 },
      maxTokens: 7,
    });
  });
});

// How many tokens a pass may guess: by what it reads, by what a person asked for, and by the room of a pass.

import { describe, expect, test } from "bun:test";
import type { Model } from "../../src/model";
import { noLimits, type PlanLimits } from "../../src/plan";
import type { Placement, Speeds } from "../../src/plan-cost";
import { chooseSpeculation } from "../../src/plan-speculation";

const strides = [{ tensorIndex: 0, strideCount: 10 }];
const streamed = {
  gpuLayers: 0,
  tiers: ["nvme"],
  classes: [{ kind: "dense", sets: strides, slotCount: 2, strideBytes: 100 }],
} as unknown as Placement;
const resident = { gpuLayers: 0, tiers: ["ram"], classes: [] } as unknown as Placement;
const tensors = [{ typeName: "q4_K", shape: [10, 100], touchedBytesPerToken: 1000, role: "ffn" }];
const dense = { kind: "dense", tensors } as unknown as Model;
const experts = { kind: "mixture-of-experts", tensors } as unknown as Model;

/** Eight strides of 100 bytes are read at 800 bytes a second; a batch of n tokens computes for n * `seconds`. */
function speeds(seconds: number): Speeds {
  return {
    batchSeconds: (_: string, __: unknown, tokens: number) => tokens * seconds,
    storage: { bestBytesPerSecond: 800 },
  } as unknown as Speeds;
}

function choose(
  change: { readonly model?: Model; readonly placement?: Placement; readonly speeds?: Speeds | null },
  limits: Partial<PlanLimits> = {},
  batchTokens = 512,
) {
  const facts = { model: dense, placement: streamed, speeds: null, ...change };
  return chooseSpeculation({ ...facts, limits: { ...noLimits, ...limits } }, batchTokens).speculation;
}

describe("guesses", () => {
  test("auto guesses for a dense model that streams, and for no other", () => {
    expect(choose({})).toMatchObject({ maxTokens: 7, fromContext: true, matchTokens: 2 });
    expect(choose({ model: experts })).toBeNull();
    expect(choose({ placement: resident })).toBeNull();
  });

  test("as many as a pass takes without getting longer, by what was measured", () => {
    expect(choose({ speeds: speeds(0.2) })?.maxTokens).toBe(4); // 5 tokens compute in the second of the reads
    expect(choose({ speeds: speeds(0.01) })?.maxTokens).toBe(15);
    expect(choose({ speeds: speeds(2) })).toBeNull();
  });

  test("a person's word counts, within what a pass of all slots holds", () => {
    expect(choose({}, { speculation: "off" })).toBeNull();
    expect(choose({ model: experts, placement: resident }, { speculation: 3 })?.maxTokens).toBe(3);
    expect(choose({}, { speculation: 64, slotCount: 8 }, 32)?.maxTokens).toBe(3);
    expect(choose({}, { slotCount: 32 }, 32)).toBeNull();
  });
});

// What streaming did, as figures: differences, sums by layer, and the honest line.

import { describe, expect, test } from "bun:test";
import { guessesSince, guessesText, guessSummary } from "../../src/guesses";
import type { Plan } from "../../src/plan";
import {
  countersSince,
  layersOf,
  layersText,
  type StreamingCounters,
  shareOf,
  streamingText,
} from "../../src/streaming";

function counters(values: Partial<StreamingCounters>): StreamingCounters {
  return {
    poolBytes: 100,
    passes: 0,
    ops: 0,
    delegateCalls: 0,
    waves: 0,
    predictedExperts: 0,
    rightExperts: 0,
    gatheredProducts: 0,
    hits: 0,
    lateHits: 0,
    misses: 0,
    stallNs: 0,
    readBytes: 0,
    demandReads: 0,
    prefetchReads: 0,
    droppedPrefetches: 0,
    unusedPrefetches: 0,
    failedReads: 0,
    evictions: 0,
    kernelBytes: 0,
    bounceBytes: 0,
    readerBusyNs: 0,
    backgroundReads: 0,
    fallbackFiles: 0,
    resyncs: 0,
    readingNs: 0,
    tensors: [],
    ...values,
  };
}

const plan = {
  tensors: ["token_embd.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight"].map((name) => ({
    name,
  })),
  streaming: {
    classes: [{ strideBytes: 1000 }],
    tensors: [
      { tensorIndex: 1, strideCount: 8, classIndex: 0 },
      { tensorIndex: 2, strideCount: 8, classIndex: 0 },
    ],
  },
} as unknown as Plan;

describe("counters", () => {
  test("a difference leaves the pool as it is and subtracts the rest, tensor by tensor", () => {
    const before = counters({ hits: 3, readBytes: 10, tensors: [{ asked: 4, late: 1, stallNs: 5 }] });
    const after = counters({ hits: 10, readBytes: 30, tensors: [{ asked: 9, late: 3, stallNs: 25 }] });
    const since = countersSince(before, after);
    expect(since).toMatchObject({ poolBytes: 100, hits: 7, readBytes: 20 });
    expect(since.tensors).toEqual([{ asked: 5, late: 2, stallNs: 20 }]);
  });

  test("layers sum their tensors, and a row says what a token cost", () => {
    const layers = layersOf(
      counters({
        tensors: [
          { asked: 20, late: 5, stallNs: 2e6 },
          { asked: 10, late: 0, stallNs: 0 },
        ],
      }),
      plan,
    );
    expect(layers).toEqual([
      { layer: 0, asked: 20, hitRate: 0.75, lateBytes: 5000, stallSeconds: 0.002 },
      { layer: 1, asked: 10, hitRate: 1, lateBytes: 0, stallSeconds: 0 },
    ]);
    const rows = layersText(layers, 10).split("\n");
    expect(rows[1]).toMatch(/0 +2\.0 +75\.0 % +500 B +200 us/);
  });

  test("the line gives the bound that the disk sets", () => {
    const one = counters({ hits: 6, lateHits: 1, misses: 3, stallNs: 5e8, readBytes: 4e9, readingNs: 2e9 });
    expect(shareOf(one)).toMatchObject({ hitRate: 0.6, lateHitRate: 0.1, missRate: 0.3 });
    const text = streamingText(one, { tokens: 2, seconds: 4 }, 8e9);
    expect(text).toContain("read 2.00 GB a token of 8.00 GB");
    expect(text).toContain("75.0 % less");
    expect(text).toContain("waited 12.5 % of the time");
    expect(text).toContain("bound 1.00 tok/s at the 2.00 GB/s");
    expect(text).not.toContain("guesses");
  });

  test("guesses are told by their source, with the bound with them and without", () => {
    const none = { drafted: 0, accepted: 0 };
    const before = { context: { drafted: 3, accepted: 3 }, draft: none, mtp: none };
    const after = { context: { drafted: 10, accepted: 7 }, draft: none, mtp: none };
    const streaming = counters({ passes: 4, readBytes: 4e9, readingNs: 2e9 });
    const one = guessSummary(guessesSince(before, after), 8, streaming);
    expect(one).toMatchObject({ passes: 4, tokensPerPass: 2, drafted: 7, accepted: 4 });
    expect(one.bound).toEqual({ tokensPerSecond: 4, tokensPerSecondWithout: 2 });
    expect(guessesText(one)).toBe(
      "4 passes of 2.00 tokens, 4 of 7 guesses from the context right, bound without guesses 2.00 tok/s",
    );
    const both = { context: { drafted: 5, accepted: 3 }, draft: { drafted: 2, accepted: 1 }, mtp: none };
    expect(guessesText(guessSummary(both, 8, null))).toBe(
      "4 passes of 2.00 tokens, 4 of 7 guesses right (the context 3 of 5, the draft model 1 of 2)",
    );
    expect(guessesText(guessSummary({ context: none, draft: none, mtp: none }, 8, null))).toBe(
      "8 passes of 1.00 tokens, nothing was guessed",
    );
  });
});

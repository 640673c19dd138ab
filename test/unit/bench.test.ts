// The arithmetic of benchmarks: spreads, bounds, the refusal of what cannot be, the order of runs, and records that are
// read back.

import { describe, expect, test } from "bun:test";
import {
  baselineDanger,
  boundOf,
  type Ceilings,
  disagreement,
  figuresOf,
  higherOf,
  type MeasuredPlan,
  medianOf,
  orderOfRuns,
  outcomeOf,
  parseRecord,
  promptOf,
  quantile,
  type RunFigures,
  type RunRecord,
  type RunReport,
  ratioOf,
  recordVersion,
  spreadOf,
} from "../../src/bench";
import type { StreamingCounters } from "../../src/streaming";

/** A token of it touches 400 MB of memory. */
const residentPlan = {
  streaming: null,
  speculation: null,
  estimate: { tokenBytes: { touched: 4e8, gpu: 0 } },
} as MeasuredPlan;
const streamingPlan = { ...residentPlan, streaming: { reader: { direct: true } } } as MeasuredPlan;

function volume(volumeBytesPerSecond: number | null): Ceilings {
  return { volumeBytesPerSecond, memory: null };
}
const unseen = { groupPeakBytes: null, deviceBusySeconds: null, processors: null };

/** 100 tokens of 0.1 s; 50 MB read for each, under way for `readingShare` of the time. */
function report(changes: Partial<RunReport> = {}, counters: Partial<StreamingCounters> = {}): RunReport {
  return {
    loadSeconds: 1,
    firstTokenSeconds: 2,
    promptTokens: 64,
    promptSeconds: 1.6,
    tokenSeconds: Array.from({ length: 100 }, () => 0.1),
    distinctTokens: 60,
    seenTokens: 100,
    isCutShort: false,
    streaming: {
      hits: 900,
      lateHits: 10,
      misses: 90,
      stallNs: 2e9,
      kernelBytes: 5e9,
      readBytes: 4.9e9,
      readingNs: 3e9,
      ...counters,
    } as StreamingCounters,
    storageBytes: { load: 1e9, prompt: 2e9, decode: 5e9 },
    majorFaults: 0,
    processorSeconds: 16,
    peakBytes: 1.8e9,
    ...changes,
  };
}

describe("figures", () => {
  test("quantiles lie between neighbours", () => {
    expect(quantile([1, 2, 3, 4], 0.5)).toBe(2.5);
    expect(quantile([1, 2, 3, 4, 5], 0.1)).toBeCloseTo(1.4);
    expect(quantile([7], 0.9)).toBe(7);
    expect(medianOf([9, 1, 5])).toBe(5);
    expect(Number.isNaN(medianOf([]))).toBe(true);
  });

  test("a spread is of rates, and its mean is of time", () => {
    const spread = spreadOf([0.1, 0.1, 0.1, 0.7]);
    expect(spread.median).toBeCloseTo(10);
    expect(spread.mean).toBeCloseTo(4); // 4 tokens in 1 s
    expect(spread.p10).toBeLessThan(spread.median);
  });

  test("of a run", () => {
    const figures = figuresOf(report(), { ...unseen, groupPeakBytes: 2e9, deviceBusySeconds: 9 });
    expect(figures.decodeTokensPerSecond.median).toBeCloseTo(10);
    expect(figures.promptTokensPerSecond).toBeCloseTo(40);
    expect(figures.distinctShare).toBeCloseTo(0.6);
    expect(figures.reads).toMatchObject({ oursBytes: 5e9, storageBytes: 5e9, hits: 900, misses: 90 });
    expect(figures.reads.stallShare).toBeCloseTo(0.2);
    expect(figures.reads.bytesPerSecond).toBeCloseTo(5e9 / 3);
    expect(figures.diskBusyShare).toBeCloseTo(0.3); // the engine's own clock, not the device's
    expect(figures.groupPeakBytes).toBe(2e9);
  });

  test("of a resident run: the device's clock, if the run was long enough", () => {
    const seen = { ...unseen, deviceBusySeconds: 5 };
    expect(figuresOf(report({ streaming: null }), seen).diskBusyShare).toBeCloseTo(0.5);
    expect(figuresOf(report({ streaming: null, tokenSeconds: [0.1, 0.1] }), seen).diskBusyShare).toBeNull();
  });
});

test("what other programs had of the processors", () => {
  const share = (busySeconds: number): number | null =>
    figuresOf(report(), { ...unseen, processors: { busySeconds, count: 4 } }).othersShare;
  expect(share(20)).toBeCloseTo(0.1); // 4 s of 10 s on 4 processors
  expect(share(15.9)).toBe(0); // the kernel's clock is coarse
  expect(figuresOf(report(), unseen).othersShare).toBeNull();
});

describe("the bound", () => {
  const of = (one: RunReport): RunFigures => figuresOf(one, unseen);

  test("is the storage's bandwidth by what came from it", () => {
    const bound = boundOf(of(report()), volume(2e9), streamingPlan);
    expect(bound).toMatchObject({ kind: "disk", bytesPerToken: 5e7, bytesPerSecond: 2e9 });
    expect(bound.kind === "disk" && bound.tokensPerSecond).toBeCloseTo(40);
    expect(bound.kind === "disk" && bound.share).toBeCloseTo(0.25);
  });

  test("takes the run's own bandwidth where it was a little better, and no further", () => {
    const faster = boundOf(of(report({}, { readingNs: 5e9 / 2.2 })), volume(2e9), streamingPlan);
    expect(faster.kind === "disk" && faster.bytesPerSecond).toBeCloseTo(2.2e9, -3);
    const impossible = boundOf(of(report({}, { readingNs: 5e8 })), volume(2e9), streamingPlan);
    expect(impossible.kind === "disk" && impossible.bytesPerSecond).toBe(2.5e9);
  });

  test("is none where storage gave nothing, or is not known", () => {
    const nothing = report({ streaming: null, storageBytes: { load: 1e9, prompt: 0, decode: 4096 } });
    expect(boundOf(of(nothing), volume(2e9), streamingPlan)).toMatchObject({
      kind: "none",
      reason: expect.stringMatching(/memory/),
    });
    expect(
      boundOf(of(report({ streaming: null, storageBytes: null })), volume(2e9), streamingPlan).kind,
    ).toBe("none");
    const faults = report({ streaming: null });
    expect(boundOf(of(faults), volume(null), streamingPlan)).toMatchObject({
      kind: "none",
      reason: "the volume was not measured",
    });
    expect(boundOf(of(faults), volume(2e9), streamingPlan).kind).toBe("disk");
  });

  test("what keeps to it is not refused", () => {
    expect(disagreement(of(report()), volume(2e9), streamingPlan)).toBeNull();
    expect(outcomeOf(report(), unseen, { plan: streamingPlan, ceilings: volume(2e9) }).status).toBe(
      "finished",
    );
  });

  test("the better of two measurements counts, and none is none", () => {
    const memory = { bytesPerSecond: 5, cacheBytes: 1 };
    expect(higherOf(volume(1), { volumeBytesPerSecond: 2, memory })).toEqual({
      volumeBytesPerSecond: 2,
      memory,
    });
    expect(higherOf({ volumeBytesPerSecond: 3, memory }, volume(null)).volumeBytesPerSecond).toBe(3);
    expect(higherOf(volume(null), volume(null))).toEqual(volume(null));
  });

  test("reads that are faster than the volume are refused, with both numbers", () => {
    const outcome = outcomeOf(report({}, { readingNs: 5e8 }), unseen, {
      plan: streamingPlan,
      ceilings: volume(2e9),
    });
    expect(outcome.status).toBe("refused");
    expect(outcome.status === "refused" && outcome.reason).toMatch(
      /reads ran at 10\.0 GB\/s.*gives 2\.50 GB\/s/,
    );
  });

  test("decoding that beats the bytes it needed is refused, with both numbers", () => {
    const quick = report({ streaming: null, tokenSeconds: Array.from({ length: 100 }, () => 0.01) });
    const outcome = outcomeOf(quick, unseen, { plan: residentPlan, ceilings: volume(2e9) });
    expect(outcome.status).toBe("refused");
    expect(outcome.status === "refused" && outcome.reason).toMatch(
      /decoding ran at 100 tok\/s, and 50\.0 MB a token.*50\.0 tok\/s at most/,
    );
  });

  test("bytes that the kernel did not fetch are refused, with both numbers", () => {
    const cached = report({ storageBytes: { load: 0, prompt: 0, decode: 1e9 } });
    const outcome = outcomeOf(cached, unseen, { plan: streamingPlan, ceilings: volume(2e9) });
    expect(outcome.status === "refused" && outcome.reason).toMatch(/brought 5\.00 GB.*fetched 1\.00 GB/);
    const buffered = { ...residentPlan, streaming: { reader: { direct: false } } } as MeasuredPlan;
    expect(outcomeOf(cached, unseen, { plan: buffered, ceilings: volume(2e9) }).status).toBe("finished");
  });

  describe("of memory", () => {
    const memory = { bytesPerSecond: 10e9, cacheBytes: 1e8 };
    const resident = report({ streaming: null, storageBytes: { load: 1e9, prompt: 0, decode: 0 } });

    test("is what a token touches, less the caches, at the speed of memory", () => {
      const bound = boundOf(of(resident), { volumeBytesPerSecond: 2e9, memory }, residentPlan);
      expect(bound).toMatchObject({ kind: "memory", bytesPerToken: 3e8, bytesPerSecond: 10e9 });
      expect(bound.kind === "memory" && bound.tokensPerSecond).toBeCloseTo(33.3, 1);
    });

    test("counts where it is the tighter one, and the disk's where that is", () => {
      const both = (bytesPerSecond: number): string =>
        boundOf(
          of(report()),
          { volumeBytesPerSecond: 2e9, memory: { ...memory, bytesPerSecond } },
          streamingPlan,
        ).kind;
      expect([both(10e9), both(20e9)]).toEqual(["memory", "disk"]); // 33 and 67 beside the disk's 40
    });

    test("is none where caches hold all, a GPU does, or one pass serves several tokens", () => {
      const kind = (cacheBytes: number, plan: object = {}): string =>
        boundOf(of(resident), { volumeBytesPerSecond: null, memory: { ...memory, cacheBytes } }, {
          ...residentPlan,
          ...plan,
        } as MeasuredPlan).kind;
      expect(kind(1e8)).toBe("memory");
      expect(kind(4e8)).toBe("none");
      expect(kind(1e8, { estimate: { tokenBytes: { touched: 4e8, gpu: 4e8 } } })).toBe("none");
      expect(kind(1e8, { speculation: { maxTokens: 4 } })).toBe("none");
    });

    test("refuses decoding that memory could not have fed, with both numbers", () => {
      const quick = { ...resident, tokenSeconds: Array.from({ length: 100 }, () => 0.01) };
      const ceilings = { volumeBytesPerSecond: 2e9, memory };
      const outcome = outcomeOf(quick, unseen, { plan: residentPlan, ceilings });
      expect(outcome.status === "refused" && outcome.reason).toMatch(
        /decoding ran at 100 tok\/s, and 300 MB a token at 12\.5 GB\/s of memory allow 41\.7 tok\/s at most/,
      );
    });
  });

  test("a run without a second token has no speed", () => {
    const one = report({ tokenSeconds: [] });
    expect(outcomeOf(one, unseen, { plan: residentPlan, ceilings: volume(null) }).status).toBe("failed");
  });
});

test("the baseline is dangerous where the model exceeds memory less 4 GB", () => {
  expect(baselineDanger(12e9, 16e9)).toBeNull();
  expect(baselineDanger(12.1e9, 16e9)).toMatch(/12\.1 GB.*16\.0 GB/);
});

test("a prompt is always the same, of ordinary tokens, spread over the vocabulary", () => {
  const types = Array.from({ length: 1000 }, (_, i) => (i % 10 === 0 ? 3 : 1));
  const prompt = promptOf(64, 1000, types);
  expect(prompt).toEqual(promptOf(64, 1000, types));
  expect(prompt.length).toBe(64);
  expect(prompt.every((token) => types[token] === 1)).toBe(true);
  expect(new Set(prompt).size).toBeGreaterThan(50);
  expect(() => promptOf(1, 10, [3, 3, 3, 3, 3, 3, 3, 3, 3, 3])).toThrow(/no ordinary tokens/);
});

describe("many runs", () => {
  test("A B B A: neither side is always first", () => {
    const order = orderOfRuns(2, true).map((run) => `${run.side[0]}${run.state[0]}${run.round}`);
    expect(order).toEqual(["hc0", "bc0", "bw0", "hw0", "hc1", "bc1", "bw1", "hw1"]);
    expect(orderOfRuns(1, false).map((run) => run.state)).toEqual(["cold", "warm"]);
  });

  const record = (side: RunRecord["side"], round: number, seconds: number): RunRecord =>
    ({
      version: recordVersion,
      hypura: "0",
      session: "s",
      index: 0,
      round,
      startedAt: "2026-01-01T00:00:00.000Z",
      side,
      state: "cold",
      machine: { fingerprint: "f", memoryBytes: 1 },
      model: { name: "m", path: "m.gguf", bytes: 1, hash: "h" },
      settings: { promptTokens: 1, maxTokens: 2, seconds: 1, seed: 1, temperature: 1, groupBytes: null },
      plan: { mode: "full-resident" },
      cachedBytes: null,
      outcome: outcomeOf(
        report({ streaming: null, storageBytes: null, tokenSeconds: [seconds, seconds] }),
        unseen,
        { plan: residentPlan, ceilings: volume(null) },
      ),
    }) as unknown as RunRecord;

  test("ratios are of runs of one round; what was killed has none", () => {
    const killed = { ...record("baseline", 2, 1), outcome: { status: "killed", reason: "x" } } as RunRecord;
    const records = [
      record("hypura", 0, 0.1),
      record("baseline", 0, 0.2),
      record("hypura", 1, 0.1),
      record("baseline", 1, 0.4),
      record("hypura", 2, 0.1),
      killed,
    ];
    const ratio = ratioOf(records, "cold");
    expect(ratio?.decode.median).toBeCloseTo(3);
    expect([ratio?.decode.least, ratio?.decode.most]).toEqual([expect.closeTo(2), expect.closeTo(4)]);
    expect(ratioOf(records, "warm")).toBeNull();
    expect(ratioOf([record("hypura", 0, 0.1), record("baseline", 1, 0.1)], "cold")).toBeNull();
  });

  test("a record is read back whole, and nothing else is", () => {
    const whole = record("hypura", 0, 0.1);
    expect(parseRecord(JSON.stringify(whole))).toEqual(whole);
    for (const broken of [
      "",
      "null",
      "[]",
      "{}",
      JSON.stringify({ ...whole, version: 0 }),
      JSON.stringify({ ...whole, side: "other" }),
      JSON.stringify({ ...whole, outcome: { status: "great" } }),
      JSON.stringify({ ...whole, model: undefined }),
    ]) {
      expect(parseRecord(broken)).toBeNull();
    }
  });
});

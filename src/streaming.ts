// What streaming did, from the engine's counters: the difference of two readings, and the honest figures in it. Pure.

import type { Plan } from "./plan";
import { bandwidthText, bytesText, durationText, rateText, table } from "./text";

/** Counts since the engine opened; ffi/native/engine.cpp, streaming_json. */
export interface StreamingCounters {
  readonly poolBytes: number;
  /** Evaluations of the graph. */
  readonly passes: number;
  /** Matrix products on streamed weights. */
  readonly ops: number;
  readonly delegateCalls: number;
  readonly waves: number;
  readonly gatheredProducts: number;
  /** Experts that a layer was expected to choose, and those of them that it chose. */
  readonly predictedExperts: number;
  readonly rightExperts: number;
  /** Ready when an op asked. */
  readonly hits: number;
  /** Being read already when an op asked. */
  readonly lateHits: number;
  readonly misses: number;
  /** Time that ops waited for reads. */
  readonly stallNs: number;
  /** Bytes of the strides that were read. */
  readonly readBytes: number;
  readonly demandReads: number;
  readonly prefetchReads: number;
  readonly droppedPrefetches: number;
  readonly unusedPrefetches: number;
  readonly failedReads: number;
  readonly evictions: number;
  /** What the system calls brought: with the edges of pages. */
  readonly kernelBytes: number;
  readonly bounceBytes: number;
  readonly readerBusyNs: number;
  /** Reads that the system did in the background, without a thread. */
  readonly backgroundReads: number;
  readonly fallbackFiles: number;
  readonly resyncs: number;
  /** Time with at least one read under way. */
  readonly readingNs: number;
  /** In the order of the plan's streamed tensors. */
  readonly tensors: readonly TensorCounters[];
}

export interface TensorCounters {
  /** Strides that products asked for. */
  readonly asked: number;
  /** Of those, the ones that were not ready. */
  readonly late: number;
  readonly stallNs: number;
}

/** What happened between two readings. */
export function countersSince(before: StreamingCounters, after: StreamingCounters): StreamingCounters {
  const { tensors, poolBytes, ...counts } = after;
  const entries = Object.entries(counts).map(([key, value]) => [
    key,
    value - before[key as keyof typeof counts],
  ]);
  return {
    ...(Object.fromEntries(entries) as typeof counts),
    poolBytes,
    tensors: tensors.map(({ asked, late, stallNs }, i) => {
      const was = before.tensors[i];
      return {
        asked: asked - (was?.asked ?? 0),
        late: late - (was?.late ?? 0),
        stallNs: stallNs - (was?.stallNs ?? 0),
      };
    }),
  };
}

export interface LayerShare {
  readonly layer: number;
  /** Strides asked for, and the share of them that was ready. */
  readonly asked: number;
  readonly hitRate: number;
  /** Bytes that were not ready when asked for. */
  readonly lateBytes: number;
  readonly stallSeconds: number;
}

/** The tensors' counts by layer, as the plan's names number them. */
export function layersOf(counters: StreamingCounters, plan: Plan): readonly LayerShare[] {
  const layers = new Map<number, { asked: number; late: number; lateBytes: number; stallNs: number }>();
  for (const [i, { tensorIndex, classIndex }] of (plan.streaming?.tensors ?? []).entries()) {
    const { asked, late, stallNs } = counters.tensors[i] ?? { asked: 0, late: 0, stallNs: 0 };
    const layer = Number(/^blk\.(\d+)\./.exec(plan.tensors[tensorIndex]?.name ?? "")?.[1] ?? -1);
    const strideBytes = plan.streaming?.classes[classIndex]?.strideBytes ?? 0;
    const sum = layers.get(layer) ?? { asked: 0, late: 0, lateBytes: 0, stallNs: 0 };
    sum.asked += asked;
    sum.late += late;
    sum.lateBytes += late * strideBytes;
    sum.stallNs += stallNs;
    layers.set(layer, sum);
  }
  return [...layers].map(([layer, { asked, late, lateBytes, stallNs }]) => ({
    layer,
    asked,
    hitRate: 1 - late / Math.max(1, asked),
    lateBytes,
    stallSeconds: stallNs / 1e9,
  }));
}

export interface StreamingShare {
  /** Of all strides that ops asked for, 0 to 1. */
  readonly hitRate: number;
  readonly lateHitRate: number;
  readonly missRate: number;
  /** While reads were under way. */
  readonly readBytesPerSecond: number;
  readonly stallSeconds: number;
}

export function shareOf(counters: StreamingCounters): StreamingShare {
  const asked = Math.max(1, counters.hits + counters.lateHits + counters.misses);
  return {
    hitRate: counters.hits / asked,
    lateHitRate: counters.lateHits / asked,
    missRate: counters.misses / asked,
    readBytesPerSecond: counters.readingNs === 0 ? 0 : counters.readBytes / (counters.readingNs / 1e9),
    stallSeconds: counters.stallNs / 1e9,
  };
}

/**
 * Of the strides that ops asked for, the share that was not read for them, whether an op asked for the read or a
 * prediction did; null where nothing was asked for. What the pool held, where `hits` says what was there in time.
 */
export function heldRateOf(counters: StreamingCounters): number | null {
  const asked = counters.hits + counters.lateHits + counters.misses;
  const read = counters.demandReads + counters.prefetchReads - counters.droppedPrefetches;
  // Reads that were dropped may have been queued before the counting began.
  return asked === 0 ? null : Math.min(1, Math.max(0, 1 - read / asked));
}

/**
 * One line about the streaming while `tokens` were generated in `seconds`. The bound is what the disk would allow at
 * the bandwidth measured while reads were under way, if it never rested and computing took no time.
 */
export function streamingText(
  counters: StreamingCounters,
  generated: {
    readonly tokens: number;
    readonly seconds: number;
  },
  touchedBytes: number,
): string {
  const share = shareOf(counters);
  const percent = (fraction: number): string => `${(100 * fraction).toFixed(1)} %`;
  const tokens = Math.max(1, generated.tokens);
  const perToken = counters.readBytes / tokens;
  const parts = [
    `read ${bytesText(perToken)} a token of ${bytesText(touchedBytes)} that it touches (${percent(1 - perToken / touchedBytes)} less)`,
    `hits ${percent(share.hitRate)}, late ${percent(share.lateHitRate)}, misses ${percent(share.missRate)}`,
    `waited ${percent(share.stallSeconds / Math.max(generated.seconds, 1e-9))} of the time`,
  ];
  if (perToken > 0) {
    const bound = rateText(share.readBytesPerSecond / perToken);
    parts.push(`bound ${bound} at the ${bandwidthText(share.readBytesPerSecond)} that the disk gave`);
  }
  return parts.join(", ");
}

/** A row for each layer, for `--verbose`. */
export function layersText(layers: readonly LayerShare[], tokens: number): string {
  const each = Math.max(1, tokens);
  return table(
    [
      ["layer", "strides a token", "ready", "read a token", "waited a token"],
      ...layers.map((one) => [
        one.layer < 0 ? "none" : String(one.layer),
        (one.asked / each).toFixed(1),
        `${(100 * one.hitRate).toFixed(1)} %`,
        bytesText(one.lateBytes / each),
        durationText(one.stallSeconds / each),
      ]),
    ],
    [0, 1, 2, 3, 4],
  );
}

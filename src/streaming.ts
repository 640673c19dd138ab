// What streaming did, from the engine's counters: the difference of two readings, and the honest figures in it. Pure.

import { bandwidthText, bytesText, rateText } from "./text";

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
  readonly fallbackFiles: number;
  readonly resyncs: number;
  /** Time with at least one read under way. */
  readonly readingNs: number;
}

/** What happened between two readings. */
export function countersSince(before: StreamingCounters, after: StreamingCounters): StreamingCounters {
  const entries = Object.entries(after).map(([key, value]) => [
    key,
    key === "poolBytes" ? value : value - before[key as keyof StreamingCounters],
  ]);
  return Object.fromEntries(entries) as unknown as StreamingCounters;
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
 * One line about the streaming while `tokens` were generated in `seconds`. The bound is what the disk would allow at
 * the bandwidth measured while reads were under way, if it never rested and computing took no time.
 */
export function streamingText(
  counters: StreamingCounters,
  generated: { readonly tokens: number; readonly seconds: number },
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

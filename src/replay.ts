// A routing trace judged: which cache policy and which size of pool would have served it, how well, and how near to
// the optimum. It owns the questions that native code answers on the real neuron cache (ffi/native/replay.h) and the
// arithmetic on the answers; it knows no terminal. What it predicts in tokens a second rests on the times in the trace.

import { closeSync, openSync, readSync } from "node:fs";
import { runTask } from "./engine";
import { HypuraError } from "./errors";
import type { CachePolicy } from "./plan";
import { headerLength, parseHeader, type TraceClass, type TraceHeader, traceStartBytes } from "./trace";

export interface Trace {
  readonly path: string;
  readonly header: TraceHeader;
  readonly recordsOffset: number;
}

/** Opens a trace and reads its header. */
export function openTrace(path: string): Trace {
  let descriptor: number;
  try {
    descriptor = openSync(path, "r");
  } catch (cause) {
    const isMissing = (cause as { readonly code?: string }).code === "ENOENT";
    throw new HypuraError(
      isMissing ? "not-found" : "io",
      isMissing
        ? `there is no trace ${JSON.stringify(path)}: check the path`
        : `the trace ${JSON.stringify(path)} cannot be opened (${(cause as Error).message}): check its permissions`,
      { cause },
    );
  }
  try {
    const length = headerLength(path, bytesAt(descriptor, 0, traceStartBytes));
    const header = parseHeader(path, bytesAt(descriptor, traceStartBytes, length));
    return { path, header, recordsOffset: traceStartBytes + length };
  } catch (cause) {
    throw cause instanceof HypuraError
      ? cause
      : new HypuraError("io", `the trace ${JSON.stringify(path)} cannot be read: give a file`, { cause });
  } finally {
    closeSync(descriptor);
  }
}

function bytesAt(descriptor: number, offset: number, length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  let got = 0;
  while (got < length) {
    const n = readSync(descriptor, bytes, got, length - got, offset + got);
    if (n === 0) {
      return bytes.subarray(0, got);
    }
    got += n;
  }
  return bytes;
}

// ---- what is asked of native code -------------------------------------------------------------------------------

export interface ReplayClass {
  readonly slotCount: number;
  readonly policy: CachePolicy;
  /** Strides (of the whole trace) that a pinned policy keeps; empty: evenly spread. */
  readonly kept: readonly number[];
}

export type ReplayRun =
  | {
      readonly kind: "verbatim" | "model" | "optimum";
      readonly classes: readonly ReplayClass[];
      readonly lookaheadStrides: number;
      readonly countFrom: number;
      readonly decodeTokens: number;
      readonly wantsPasses: boolean;
    }
  | { readonly kind: "uses"; readonly firstPass: number; readonly endPass: number };

export interface ClassCounts {
  readonly hits: number;
  readonly lateHits: number;
  readonly misses: number;
  readonly reads: number;
  readonly evictions: number;
}

export interface ReplayPass {
  readonly tokens: number;
  readonly startUs: number;
  readonly stallUs: number;
  /** With at least one read under way; 0 but in a verbatim replay. */
  readonly readingUs: number;
  readonly hits: number;
  readonly lateHits: number;
  readonly misses: number;
  readonly askedBytes: number;
  readonly readBytes: number;
}

export interface ReplayOutcome {
  readonly cutOff: boolean;
  readonly classes: readonly (ClassCounts & { readonly askedBytes: number; readonly readBytes: number })[];
  readonly recorded: readonly (ClassCounts & { readonly stallUs: number })[] | null;
  readonly decode: { readonly passes: number; readonly askedBytes: number; readonly readBytes: number };
  readonly passes: readonly ReplayPass[];
}

interface WireOutcome extends Omit<ReplayOutcome, "passes"> {
  readonly passes: readonly (readonly number[])[];
  readonly uses?: readonly number[];
}

/** The answers in the order of the runs: an outcome, or for `uses` the routed tokens of each stride. */
async function ask(
  trace: Trace,
  runs: readonly ReplayRun[],
  how: ReplayOptions,
): Promise<readonly (ReplayOutcome | readonly number[])[]> {
  const { header } = trace;
  const body = {
    path: trace.path,
    recordsOffset: trace.recordsOffset,
    strideBytes: header.classes.map((one) => one.strideBytes),
    tensors: header.tensors,
    runs,
  };
  const answers: (ReplayOutcome | readonly number[])[] = [];
  for await (const { data } of runTask("replay", body, how.signal)) {
    const outcome = data as WireOutcome;
    answers.push(outcome.uses ?? { ...outcome, passes: outcome.passes.map(passOf) });
    how.onRun?.();
  }
  return answers;
}

function passOf(row: readonly number[]): ReplayPass {
  const [
    tokens = 0,
    startUs = 0,
    stallUs = 0,
    readingUs = 0,
    hits = 0,
    lateHits = 0,
    misses = 0,
    askedBytes = 0,
    readBytes = 0,
  ] = row;
  return { tokens, startUs, stallUs, readingUs, hits, lateHits, misses, askedBytes, readBytes };
}

export interface ReplayOptions {
  readonly signal?: AbortSignal;
  readonly onProgress?: (what: string, fraction: number) => void;
  readonly onRun?: () => void;
}

// ---- the recorded run --------------------------------------------------------------------------------------------

export interface RecordedRun {
  readonly outcome: ReplayOutcome;
  /** Every count of every class equals the engine's own; null where the trace was cut off and has none. */
  readonly isExact: boolean | null;
}

/** The recorded calls on the recorded cache: what the engine counted, exactly. */
export async function replayRecorded(trace: Trace, how: ReplayOptions = {}): Promise<RecordedRun> {
  const { header } = trace;
  const classes = header.classes.map(({ slotCount, policy }) => ({ slotCount, policy, kept: [] }));
  const run = {
    kind: "verbatim",
    classes,
    lookaheadStrides: header.lookaheadStrides,
    countFrom: 0,
    decodeTokens: header.slotCount,
    wantsPasses: true,
  } as const;
  const [outcome] = (await ask(trace, [run], how)) as readonly ReplayOutcome[];
  if (outcome === undefined) {
    throw new HypuraError("engine", "the replay gave no answer");
  }
  const same = (one: ClassCounts, other: ClassCounts | undefined): boolean =>
    one.hits === other?.hits &&
    one.lateHits === other.lateHits &&
    one.misses === other.misses &&
    one.reads === other.reads &&
    one.evictions === other.evictions;
  const isExact =
    outcome.recorded === null ? null : outcome.recorded.every((one, i) => same(one, outcome.classes[i]));
  return { outcome, isExact };
}

/** What decoding was made of, from the times of the recorded run; what cannot be known is null. */
export interface DecodeTimes {
  /** Median of a step less what it waited for reads. */
  readonly computeSeconds: number | null;
  /** While at least one read was under way. */
  readonly readBytesPerSecond: number | null;
  /** Of the time with reads under way, the part that an op waited: the rest was hidden behind computing. */
  readonly waitedShare: number;
}

export function decodeTimes(passes: readonly ReplayPass[], decodeTokens: number): DecodeTimes {
  const computed: number[] = [];
  let stallUs = 0;
  let readingUs = 0;
  let readBytes = 0;
  for (const [i, pass] of passes.entries()) {
    const next = passes[i + 1];
    if (pass.tokens > decodeTokens) {
      continue;
    }
    stallUs += pass.stallUs;
    readingUs += pass.readingUs;
    readBytes += pass.readBytes;
    if (next !== undefined) {
      computed.push(Math.max(0, next.startUs - pass.startUs - pass.stallUs) / 1e6);
    }
  }
  computed.sort((one, other) => one - other);
  return {
    computeSeconds: computed[Math.floor(computed.length / 2)] ?? null,
    readBytesPerSecond: readingUs === 0 ? null : readBytes / (readingUs / 1e6),
    waitedShare: readingUs === 0 ? 1 : Math.min(1, stallUs / readingUs),
  };
}

/** Tokens a second with so many bytes read for a token; null where the trace does not tell. */
export function predictRate(times: DecodeTimes, readBytesPerToken: number): number | null {
  const { computeSeconds, readBytesPerSecond, waitedShare } = times;
  if (computeSeconds === null || (readBytesPerSecond === null && readBytesPerToken > 0)) {
    return null;
  }
  const waited = readBytesPerSecond === null ? 0 : (waitedShare * readBytesPerToken) / readBytesPerSecond;
  return computeSeconds + waited === 0 ? null : 1 / (computeSeconds + waited);
}

// ---- policies and sizes ------------------------------------------------------------------------------------------

export const policyNames = [
  "belady",
  "lfu-decay",
  "pinned-lru",
  "least-stale",
  "lru",
  "lru-guarded",
  "pinned-cyclic",
] as const;
export type PolicyName = (typeof policyNames)[number];

/**
 * A policy to try; `value` is the half-life in tokens (lfu-decay) or the passes (least-stale), `mostPassTokens` what a
 * pass counts for at most (lfu-decay), else the recorded ones.
 */
export interface Candidate {
  readonly label: string;
  readonly name: PolicyName;
  readonly value: number | null;
  readonly mostPassTokens: number | null;
}

/** Numbers that may stand behind a name. */
const valueCounts: Readonly<Partial<Record<PolicyName, number>>> = { "lfu-decay": 2, "least-stale": 1 };

/** "lfu-decay:256" -> a candidate; null where there is no such policy. */
export function parseCandidate(text: string): Candidate | null {
  const [name = "", ...values] = text.split(":");
  const known = policyNames.find((one) => one === name);
  if (known === undefined || values.length > (valueCounts[known] ?? 0)) {
    return null;
  }
  const [value = null, mostPassTokens = null] = values.map((word) =>
    /^\d{1,9}$/.test(word) ? Number(word) : Number.NaN,
  );
  return Number.isNaN(value) || Number.isNaN(mostPassTokens)
    ? null
    : { label: text, name: known, value, mostPassTokens };
}

interface Geometry {
  readonly one: TraceClass;
  readonly strideCount: number;
  /** With fewer slots an op cannot work well: what the recorded plan keeps free for the ops of now and next. */
  readonly leastSlots: number;
  /** Of its strides, the number within the whole trace. */
  readonly strides: readonly number[];
}

function geometryOf({ classes, tensors }: TraceHeader): readonly Geometry[] {
  const strides: number[][] = classes.map(() => []);
  let next = 0;
  for (const { strideCount, classIndex } of tensors) {
    for (let i = 0; i < strideCount; i++) {
      strides[classIndex]?.push(next++);
    }
  }
  return classes.map((one, i) => {
    const strideCount = strides[i]?.length ?? 0;
    const { kind, pinnedSlots, guardRingSlots } = one.policy;
    const ring = kind === "pinned-cyclic" ? Math.max(2, one.slotCount - pinnedSlots) : guardRingSlots;
    return {
      one,
      strideCount,
      leastSlots: Math.max(1, Math.min(strideCount, ring)),
      strides: strides[i] ?? [],
    };
  });
}

/** Bytes of all strides, and of the smallest pool that can serve them. */
export function poolLimits(header: TraceHeader): {
  readonly leastBytes: number;
  readonly allBytes: number;
  readonly recordedBytes: number;
} {
  const classes = geometryOf(header);
  const sum = (slots: (one: Geometry) => number): number =>
    classes.reduce((total, one) => total + slots(one) * one.one.slotBytes, 0);
  return {
    leastBytes: sum((one) => one.leastSlots),
    allBytes: sum((one) => one.strideCount),
    recordedBytes: sum((one) => one.one.slotCount),
  };
}

/** Slots by class for a pool of so many bytes: everyone's least, the rest in proportion to what each class holds. */
function slotsFor(header: TraceHeader, poolBytes: number): readonly number[] {
  const classes = geometryOf(header);
  const { leastBytes, recordedBytes } = poolLimits(header);
  if (poolBytes === recordedBytes) {
    return classes.map((one) => one.one.slotCount);
  }
  const open = classes.reduce((sum, one) => sum + (one.strideCount - one.leastSlots) * one.one.slotBytes, 0);
  const share = open === 0 ? 0 : Math.min(1, Math.max(0, poolBytes - leastBytes) / open);
  return classes.map((one) => one.leastSlots + Math.floor(share * (one.strideCount - one.leastSlots)));
}

function policyOf(candidate: Candidate, geometry: Geometry, slotCount: number): CachePolicy {
  const { one, strideCount, leastSlots } = geometry;
  const base = {
    ...one.policy,
    pinnedSlots: 0,
    guardRingSlots: Math.max(1, Math.min(slotCount, leastSlots)),
  };
  switch (candidate.name) {
    case "lru":
      return { ...base, kind: "lru", workingSetStrides: 0 };
    case "lru-guarded":
      return { ...base, kind: "lru" };
    case "lfu-decay":
      return {
        ...base,
        kind: "lfu-decay",
        halfLifeTokens: candidate.value ?? base.halfLifeTokens,
        mostPassTokens: candidate.mostPassTokens ?? base.mostPassTokens,
      };
    case "least-stale":
      return { ...base, kind: "least-stale", staleAfterPasses: candidate.value ?? base.staleAfterPasses };
    case "pinned-cyclic":
    case "pinned-lru":
    case "belady": {
      const pinned = slotCount >= strideCount ? slotCount - 1 : Math.max(0, slotCount - leastSlots);
      return { ...base, kind: "pinned-cyclic", pinnedSlots: pinned };
    }
  }
}

/** How much of what the ring leaves is given to pins, tried on the trace's own first part. */
const pinShares = [0.25, 0.5, 0.75, 0.9, 1] as const;

/** For each class its hottest strides, as many as `share` of the slots beyond the ring. */
function hotStrides(
  classes: readonly Geometry[],
  slots: readonly number[],
  uses: readonly number[],
  share: number,
): readonly (readonly number[])[] {
  return classes.map(({ strides, leastSlots }, i) => {
    const count = Math.floor(Math.max(0, (slots[i] ?? 0) - leastSlots) * share);
    return [...strides].sort((a, b) => (uses[b] ?? 0) - (uses[a] ?? 0) || a - b).slice(0, count);
  });
}

// ---- the judgement -------------------------------------------------------------------------------------------------

export interface Cell {
  readonly poolBytes: number;
  readonly readBytesPerStep: number;
  /** By bytes: 1 less what was read of what was asked for, while decoding. */
  readonly hitRate: number;
  readonly tokensPerSecond: number | null;
}

export interface PolicyRow {
  readonly candidate: Candidate;
  readonly cells: readonly Cell[];
}

export interface Judgement {
  /** Steps that count; the passes before them warm the pool and choose the pins. */
  readonly steps: number;
  readonly warmUpPasses: number;
  readonly times: DecodeTimes;
  readonly rows: readonly PolicyRow[];
  readonly choice: Choice | null;
}

export interface Choice {
  readonly policy: string;
  readonly poolBytes: number;
  readonly hitRate: number;
  readonly tokensPerSecond: number | null;
  /** Strides to keep for good: the tensor and its experts; empty for policies that pin none. */
  readonly pinned: readonly { readonly tensor: string; readonly strides: readonly number[] }[];
}

/** Replays every candidate at every size. */
export async function judge(
  trace: Trace,
  recorded: RecordedRun,
  wanted: { readonly candidates: readonly Candidate[]; readonly poolBytes: readonly number[] },
  how: ReplayOptions = {},
): Promise<Judgement> {
  const { header } = trace;
  const { passes } = recorded.outcome;
  const warmUpPasses = Math.floor(passes.length / 2);
  const classes = geometryOf(header);
  const sizes = wanted.poolBytes.map((poolBytes) => ({ poolBytes, slots: slotsFor(header, poolBytes) }));
  const pins = await choosePins(trace, { classes, sizes, warmUpPasses }, wanted.candidates, how);
  const common = {
    lookaheadStrides: header.lookaheadStrides,
    countFrom: warmUpPasses,
    decodeTokens: header.slotCount,
    wantsPasses: false,
  };
  const runs = wanted.candidates.flatMap((candidate) =>
    sizes.map(
      ({ slots }, i): ReplayRun => ({
        ...common,
        kind: candidate.name === "belady" ? "optimum" : "model",
        classes: classes.map((one, c) => ({
          slotCount: slots[c] as number,
          policy: policyOf(candidate, one, slots[c] as number),
          kept: candidate.name === "pinned-lru" ? (pins[i]?.[c] ?? []) : [],
        })),
      }),
    ),
  );
  // The optimum counts each use once, however many waves a pool makes of it: what every rate is of.
  const asked: ReplayRun = {
    ...common,
    kind: "optimum",
    classes: classes.map(({ one }) => ({ slotCount: one.slotCount, policy: one.policy, kept: [] })),
  };
  let done = 0;
  const answers = (await ask(trace, [asked, ...runs], {
    ...how,
    onRun: () => how.onProgress?.("policies", ++done / (runs.length + 1)),
  })) as readonly ReplayOutcome[];
  const { decode } = answers[0] as ReplayOutcome;
  const steps = decode.passes;
  const times = decodeTimes(passes, header.slotCount);
  const rows = wanted.candidates.map((candidate, k) => ({
    candidate,
    cells: sizes.map(({ poolBytes }, i): Cell => {
      const { readBytes } = (answers[1 + k * sizes.length + i] as ReplayOutcome).decode;
      const readBytesPerStep = readBytes / Math.max(1, steps);
      return {
        poolBytes,
        readBytesPerStep,
        hitRate: decode.askedBytes === 0 ? 1 : 1 - readBytes / decode.askedBytes,
        tokensPerSecond: predictRate(times, readBytesPerStep),
      };
    }),
  }));
  return { steps, warmUpPasses, times, rows, choice: choose(header, rows, pins) };
}

interface Setting {
  readonly classes: readonly Geometry[];
  readonly sizes: readonly { readonly poolBytes: number; readonly slots: readonly number[] }[];
  readonly warmUpPasses: number;
}

/**
 * The pins of pinned-lru for each size, chosen from the warm-up alone: hot strides of its first half, with the share
 * that serves its second half best; then the hot strides of all of it.
 */
async function choosePins(
  trace: Trace,
  { classes, sizes, warmUpPasses }: Setting,
  candidates: readonly Candidate[],
  how: ReplayOptions,
): Promise<readonly (readonly (readonly number[])[])[]> {
  const candidate = candidates.find((one) => one.name === "pinned-lru");
  if (candidate === undefined) {
    return [];
  }
  const quarter = Math.floor(warmUpPasses / 2);
  const uses = (await ask(
    trace,
    [
      { kind: "uses", firstPass: 0, endPass: quarter },
      { kind: "uses", firstPass: 0, endPass: warmUpPasses },
    ],
    how,
  )) as readonly (readonly number[])[];
  const trials = sizes.flatMap(({ slots }) =>
    pinShares.map((share): ReplayRun => {
      const hot = hotStrides(classes, slots, uses[0] ?? [], share);
      return {
        kind: "model",
        classes: classes.map((one, c) => ({
          slotCount: slots[c] as number,
          policy: policyOf(candidate, one, slots[c] as number),
          kept: hot[c] ?? [],
        })),
        lookaheadStrides: trace.header.lookaheadStrides,
        countFrom: quarter,
        decodeTokens: trace.header.slotCount,
        wantsPasses: true,
      };
    }),
  );
  let done = 0;
  const outcomes = (await ask(trace, trials, {
    ...how,
    onRun: () => how.onProgress?.("pins", ++done / trials.length),
  })) as readonly ReplayOutcome[];
  const bytesRead = (outcome: ReplayOutcome): number =>
    outcome.passes.slice(quarter, warmUpPasses).reduce((sum, pass) => sum + pass.readBytes, 0);
  return sizes.map(({ slots }, i) => {
    const tried = outcomes.slice(i * pinShares.length, (i + 1) * pinShares.length).map(bytesRead);
    const best = pinShares[tried.indexOf(Math.min(...tried))] ?? 0.5;
    return hotStrides(classes, slots, uses[1] ?? [], best);
  });
}

/** A pool that gives this share of the best speed among those tried is enough. */
const enough = 0.9;

/**
 * The policy that reads least over all sizes (the optimum is none: it looks ahead), and the smallest pool with which it
 * comes near the best of the sizes tried.
 */
function choose(
  header: TraceHeader,
  rows: readonly PolicyRow[],
  pins: readonly (readonly (readonly number[])[])[],
): Choice | null {
  const read = (row: PolicyRow): number => row.cells.reduce((sum, cell) => sum + cell.readBytesPerStep, 0);
  const [best] = rows.filter((row) => row.candidate.name !== "belady").toSorted((a, b) => read(a) - read(b));
  if (best === undefined) {
    return null;
  }
  const worth = (cell: Cell): number => cell.tokensPerSecond ?? cell.hitRate;
  const most = Math.max(...best.cells.map(worth));
  const byPool = best.cells.toSorted((one, other) => one.poolBytes - other.poolBytes);
  const cell = byPool.find((one) => worth(one) >= enough * most);
  if (cell === undefined) {
    return null;
  }
  const kept = best.candidate.name === "pinned-lru" ? pins[best.cells.indexOf(cell)] : undefined;
  return {
    policy: best.candidate.label,
    poolBytes: cell.poolBytes,
    hitRate: cell.hitRate,
    tokensPerSecond: cell.tokensPerSecond,
    pinned: kept === undefined ? [] : byTensor(header, kept.flat()),
  };
}

function byTensor(header: TraceHeader, strides: readonly number[]): Choice["pinned"] {
  const marked = new Set(strides);
  let first = 0;
  return header.tensors.flatMap(({ name, strideCount }) => {
    const base = first;
    first += strideCount;
    const own = Array.from({ length: strideCount }, (_, i) => i).filter((i) => marked.has(base + i));
    return own.length === 0 ? [] : [{ tensor: name, strides: own }];
  });
}

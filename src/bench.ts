// What a benchmark run is worth: the figures of one run, the physical bound it is held against, and the record of both.
// It owns the arithmetic and the refusal of a record that beats physics; it runs nothing and prints nothing. Pure.

import { HypuraError } from "./errors";
import type { Plan } from "./plan";
import { heldRateOf, type StreamingCounters } from "./streaming";
import { bandwidthText, bytesText, rateText } from "./text";

// ---- between the two processes of a run --------------------------------------------------------------------------

/** What the child of a run is told, as JSON on its stdin. */
export interface RunOrder {
  readonly plan: Plan;
  readonly prompt: readonly number[];
  readonly maxTokens: number;
  /** Decoding stops after so long. */
  readonly seconds: number;
  readonly seed: number;
  readonly trace: { readonly path: string; readonly header: string } | null;
}

/** What it says on its stdout, a line each. */
export type RunEvent =
  | { readonly type: "loaded"; readonly seconds: number }
  | { readonly type: "token"; readonly count: number }
  | { readonly type: "report"; readonly report: RunReport }
  | { readonly type: "error"; readonly code: string; readonly message: string };

/** Measured inside the process that did the work. */
export interface RunReport {
  readonly loadSeconds: number;
  /** From the request to its first token. */
  readonly firstTokenSeconds: number;
  readonly promptTokens: number;
  readonly promptSeconds: number;
  /** Time of each token after the first, since the one before it. */
  readonly tokenSeconds: readonly number[];
  readonly distinctTokens: number;
  readonly seenTokens: number;
  /** Whether the time was over before the tokens were. */
  readonly isCutShort: boolean;
  /** While tokens were decoded; null in a full-resident plan. */
  readonly streaming: StreamingCounters | null;
  /** Bytes that the kernel fetched from storage for this process; null where it does not tell. */
  readonly storageBytes: { readonly load: number; readonly prompt: number; readonly decode: number } | null;
  readonly majorFaults: number;
  /** Time of processors while decoding, all threads together. */
  readonly processorSeconds: number;
  readonly peakBytes: number;
}

// ---- a record ----------------------------------------------------------------------------------------------------

export const recordVersion = 1;

export type Side = "hypura" | "baseline";
export type CacheState = "cold" | "warm";

export interface RunRecord {
  readonly version: typeof recordVersion;
  readonly hypura: string;
  /** Runs of one `hypura bench`. */
  readonly session: string;
  readonly index: number;
  readonly round: number;
  /** ISO 8601. */
  readonly startedAt: string;
  readonly side: Side;
  readonly state: CacheState;
  readonly machine: { readonly fingerprint: string; readonly memoryBytes: number };
  readonly model: {
    readonly name: string;
    readonly path: string;
    readonly bytes: number;
    /** Of sizes, tensor table and a sample of the weights. */
    readonly hash: string;
  };
  readonly settings: RunSettings;
  /** Without its list of tensors, which the model's hash stands for. */
  readonly plan: Omit<Plan, "tensors">;
  /** Of the model's files in the page cache when the run began; null where that cannot be known. */
  readonly cachedBytes: number | null;
  readonly outcome: Outcome;
}

export interface RunSettings {
  readonly promptTokens: number;
  readonly maxTokens: number;
  readonly seconds: number;
  readonly seed: number;
  readonly temperature: number;
  /** The limit of the control group; null: none. */
  readonly groupBytes: number | null;
}

export type Outcome =
  | { readonly status: "finished"; readonly figures: RunFigures; readonly bound: Bound }
  /** The figures contradict each other or physics; they are kept for whoever looks for the mistake. */
  | {
      readonly status: "refused";
      readonly reason: string;
      readonly figures: RunFigures;
      readonly bound: Bound;
    }
  /** By the kernel, for want of memory. */
  | { readonly status: "killed"; readonly reason: string }
  | { readonly status: "failed"; readonly reason: string };

export interface Spread {
  readonly median: number;
  /** One token in ten was slower. */
  readonly p10: number;
  /** One in ten was faster. */
  readonly p90: number;
  /** Tokens by the time of all of them. */
  readonly mean: number;
}

export interface RunFigures {
  readonly decodeTokensPerSecond: Spread;
  readonly promptTokensPerSecond: number;
  readonly firstTokenSeconds: number;
  readonly loadSeconds: number;
  readonly decodedTokens: number;
  readonly isCutShort: boolean;
  /** Of the tokens whose number is known; a loop would route alike at each step. */
  readonly distinctShare: number;
  readonly peakBytes: number;
  /** Page cache and all; null where no control group counts it. */
  readonly groupPeakBytes: number | null;
  readonly reads: ReadFigures;
  /** Of the disk's time while decoding; null where it is not known. */
  readonly diskBusyShare: number | null;
  /** Of all processors' time while decoding, what other programs had; null where it is not known. */
  readonly othersShare: number | null;
  readonly majorFaults: number;
  readonly tokenSeconds: readonly number[];
}

/** While decoding. */
export interface ReadFigures {
  /** What the engine's reader brought, edges of pages included; null in a full-resident plan. */
  readonly oursBytes: number | null;
  /** What the kernel fetched from storage; null where it does not tell. */
  readonly storageBytes: number | null;
  readonly hits: number;
  readonly lateHits: number;
  readonly misses: number;
  /** heldRateOf of streaming.ts; null where nothing streams. */
  readonly heldRate: number | null;
  readonly stallShare: number;
  /** The engine's reads, while at least one was under way; null where none was. */
  readonly bytesPerSecond: number | null;
}

export type Bound =
  | {
      /** What gives the bytes. */
      readonly kind: "disk" | "memory";
      readonly tokensPerSecond: number;
      readonly bytesPerToken: number;
      readonly bytesPerSecond: number;
      /** What was reached of it, 0 to 1. */
      readonly share: number;
    }
  | { readonly kind: "none"; readonly reason: string };

// ---- figures -----------------------------------------------------------------------------------------------------

/** The value below which `fraction` of the values lie; of sorted values, between neighbours by proportion. */
export function quantile(sorted: readonly number[], fraction: number): number {
  const at = (sorted.length - 1) * fraction;
  const low = sorted[Math.floor(at)] ?? Number.NaN;
  const high = sorted[Math.ceil(at)] ?? low;
  return low + (high - low) * (at - Math.floor(at));
}

export function medianOf(values: readonly number[]): number {
  return quantile(
    values.toSorted((one, other) => one - other),
    0.5,
  );
}

export function spreadOf(tokenSeconds: readonly number[]): Spread {
  const rates = tokenSeconds.map((seconds) => 1 / Math.max(seconds, 1e-6)).sort((one, other) => one - other);
  const total = tokenSeconds.reduce((sum, seconds) => sum + seconds, 0);
  return {
    median: quantile(rates, 0.5),
    p10: quantile(rates, 0.1),
    p90: quantile(rates, 0.9),
    mean: tokenSeconds.length / Math.max(total, 1e-6),
  };
}

/** What the parent saw of a run. */
export interface Seen {
  readonly groupPeakBytes: number | null;
  /** Of the volume's device, whoever read, while tokens were decoded. */
  readonly deviceBusySeconds: number | null;
  /** Of all processors, whoever used them, and the virtual machine's host, in the same time. */
  readonly processors: { readonly busySeconds: number; readonly count: number } | null;
}

/** The kernel counts a device's time in milliseconds, and the parent sees the run a little late. */
const leastBusySeconds = 0.5;

export function figuresOf(report: RunReport, seen: Seen): RunFigures {
  const { streaming, storageBytes, tokenSeconds } = report;
  const seconds = Math.max(
    tokenSeconds.reduce((sum, one) => sum + one, 0),
    1e-9,
  );
  const deviceBusy = seconds < leastBusySeconds ? null : seen.deviceBusySeconds;
  const busySeconds = streaming === null ? deviceBusy : streaming.readingNs / 1e9;
  return {
    decodeTokensPerSecond: spreadOf(tokenSeconds),
    promptTokensPerSecond: report.promptTokens / Math.max(report.promptSeconds, 1e-6),
    firstTokenSeconds: report.firstTokenSeconds,
    loadSeconds: report.loadSeconds,
    decodedTokens: tokenSeconds.length,
    isCutShort: report.isCutShort,
    distinctShare: report.distinctTokens / Math.max(1, report.seenTokens),
    peakBytes: report.peakBytes,
    groupPeakBytes: seen.groupPeakBytes,
    reads: {
      oursBytes: streaming === null ? null : streaming.kernelBytes,
      storageBytes: storageBytes === null ? null : storageBytes.decode,
      hits: streaming?.hits ?? 0,
      lateHits: streaming?.lateHits ?? 0,
      misses: streaming?.misses ?? 0,
      heldRate: streaming === null ? null : heldRateOf(streaming),
      stallShare: Math.min(1, (streaming?.stallNs ?? 0) / 1e9 / seconds),
      bytesPerSecond:
        streaming === null || streaming.readingNs === 0
          ? null
          : streaming.kernelBytes / (streaming.readingNs / 1e9),
    },
    othersShare: othersShareOf(report, seen, seconds),
    diskBusyShare: busySeconds === null ? null : Math.min(1, busySeconds / seconds),
    majorFaults: report.majorFaults,
    tokenSeconds,
  };
}

function othersShareOf({ processorSeconds }: RunReport, seen: Seen, seconds: number): number | null {
  if (seen.processors === null || seconds < leastBusySeconds) {
    return null;
  }
  const { busySeconds, count } = seen.processors;
  return Math.min(1, Math.max(0, (busySeconds - processorSeconds) / (seconds * count)));
}

// ---- the bound ---------------------------------------------------------------------------------------------------

/**
 * A disk that is shared, virtual or warm gives more at one time than at another: by so much the volume may have been
 * better during a run than when it was measured (1.4 to 2.1 GB/s on one virtual disk, by the hour).
 */
const drift = 1.25;
/** Less says nothing about a disk. */
const leastReadBytes = 16_777_216;
/** Of what the reader says it brought past the page cache, the kernel must have fetched so much. */
const leastFetchedShare = 0.9;

/** What was measured of the machine before the runs; null where it could not be. */
export interface Ceilings {
  /** Of the model's volume, cold and past the page cache. */
  readonly volumeBytesPerSecond: number | null;
  readonly memory: MemoryCeiling | null;
}

export interface MemoryCeiling {
  /** All processors reading together. */
  readonly bytesPerSecond: number;
  /** What the last caches may keep from one token to the next. */
  readonly cacheBytes: number;
}

/** Of two measurements of one machine the better figures: what it gave once it can give. */
export function higherOf(one: Ceilings, other: Ceilings): Ceilings {
  const volumes = [one, other].flatMap(({ volumeBytesPerSecond }) => volumeBytesPerSecond ?? []);
  const memories = [one, other]
    .flatMap(({ memory }) => memory ?? [])
    .toSorted((a, b) => b.bytesPerSecond - a.bytesPerSecond);
  return {
    volumeBytesPerSecond: volumes.length === 0 ? null : Math.max(...volumes),
    memory: memories[0] ?? null,
  };
}

/** The tighter of what the storage and what the memory allow. */
export function boundOf(figures: RunFigures, ceilings: Ceilings, plan: MeasuredPlan): Bound {
  const disk = diskBound(figures, ceilings.volumeBytesPerSecond);
  const memory = memoryBound(figures, ceilings.memory, plan);
  if (disk.kind === "none" || memory.kind === "none") {
    return memory.kind === "none" ? disk : memory;
  }
  return disk.tokensPerSecond <= memory.tokensPerSecond ? disk : memory;
}

/** What a bound needs to know of a plan. */
export type MeasuredPlan = Pick<Plan, "streaming" | "estimate" | "speculation">;

/**
 * What the storage allows: the bytes that came from it for each decoded token, at the volume's measured bandwidth (or at
 * the run's own, where that was better by no more than drift). Bytes that no storage gave bound nothing.
 */
function diskBound(figures: RunFigures, volumeBytesPerSecond: number | null): Bound {
  const { reads, decodedTokens } = figures;
  const mean = figures.decodeTokensPerSecond.mean;
  const bytes = reads.storageBytes ?? reads.oursBytes;
  if (bytes === null) {
    return { kind: "none", reason: "what came from storage is not known here" };
  }
  if (bytes < leastReadBytes || decodedTokens === 0) {
    return {
      kind: "none",
      reason: "storage gave next to nothing, and memory was not measured or caches hold it",
    };
  }
  const seconds = decodedTokens / mean;
  const reached = Math.max(bytes / seconds, reads.bytesPerSecond ?? 0);
  if (volumeBytesPerSecond === null && reads.bytesPerSecond === null) {
    return { kind: "none", reason: "the volume was not measured" };
  }
  const bytesPerSecond = volumeBytesPerSecond === null ? reached : drifted(volumeBytesPerSecond, reached);
  return boundAt("disk", { bytesPerToken: bytes / decodedTokens, bytesPerSecond }, mean);
}

/**
 * What the memory allows: every weight that a token touches goes from memory to a processor once, but for what the
 * caches may have kept. A pass that checks guessed tokens serves several with one reading, so there it bounds nothing.
 */
function memoryBound(figures: RunFigures, memory: MemoryCeiling | null, plan: MeasuredPlan): Bound {
  const { touched, gpu } = plan.estimate.tokenBytes;
  const bytesPerToken = touched - gpu - (memory?.cacheBytes ?? 0);
  const mean = figures.decodeTokensPerSecond.mean;
  if (memory === null || bytesPerToken < leastReadBytes || plan.speculation !== null) {
    return { kind: "none", reason: "memory was not measured, or caches hold what a token touches" };
  }
  const bytesPerSecond = drifted(memory.bytesPerSecond, mean * bytesPerToken);
  return boundAt("memory", { bytesPerToken, bytesPerSecond }, mean);
}

/** A measured bandwidth, or what a run reached where that is no more than drift above it. */
function drifted(measured: number, reached: number): number {
  return Math.max(measured, Math.min(reached, drift * measured));
}

function boundAt(
  kind: "disk" | "memory",
  { bytesPerToken, bytesPerSecond }: { readonly bytesPerToken: number; readonly bytesPerSecond: number },
  mean: number,
): Bound {
  const tokensPerSecond = bytesPerSecond / bytesPerToken;
  return { kind, tokensPerSecond, bytesPerToken, bytesPerSecond, share: mean / tokensPerSecond };
}

/** The rounding of counters that are not read at the very same moment. */
const slack = 1.02;

/** Why the figures cannot be true, with the two numbers that disagree; null where nothing speaks against them. */
export function disagreement(figures: RunFigures, ceilings: Ceilings, plan: MeasuredPlan): string | null {
  const disk = diskBound(figures, ceilings.volumeBytesPerSecond);
  const memory = memoryBound(figures, ceilings.memory, plan);
  return (
    fetchedTooLittle(figures, plan) ??
    readTooFast(figures, disk) ??
    decodedTooFast(figures, disk) ??
    decodedTooFast(figures, memory)
  );
}

function fetchedTooLittle({ reads }: RunFigures, plan: MeasuredPlan): string | null {
  const { oursBytes, storageBytes } = reads;
  const isDirect = plan.streaming?.reader.direct === true;
  if (!isDirect || oursBytes === null || oursBytes < leastReadBytes || storageBytes === null) {
    return null;
  }
  return storageBytes >= leastFetchedShare * oursBytes
    ? null
    : `the reader brought ${bytesText(oursBytes)} past the page cache, and the kernel fetched ` +
        `${bytesText(storageBytes)} from storage: something else gave the rest`;
}

function readTooFast({ reads }: RunFigures, disk: Bound): string | null {
  const rate = reads.bytesPerSecond;
  if (disk.kind === "none" || rate === null || (reads.oursBytes ?? 0) < leastReadBytes) {
    return null;
  }
  return rate <= slack * disk.bytesPerSecond
    ? null
    : `reads ran at ${bandwidthText(rate)}, and the volume gives ${bandwidthText(disk.bytesPerSecond)} ` +
        "at most: it was not the disk that gave them";
}

function decodedTooFast({ decodeTokensPerSecond: { mean } }: RunFigures, bound: Bound): string | null {
  return bound.kind === "none" || mean <= slack * bound.tokensPerSecond
    ? null
    : `decoding ran at ${rateText(mean)}, and ${bytesText(bound.bytesPerToken)} a token ` +
        `at ${bandwidthText(bound.bytesPerSecond)} of ${bound.kind} allow ${rateText(bound.tokensPerSecond)} at most`;
}

export function outcomeOf(
  report: RunReport,
  seen: Seen,
  about: { readonly plan: MeasuredPlan; readonly ceilings: Ceilings },
): Outcome {
  if (report.tokenSeconds.length === 0) {
    return { status: "failed", reason: "it ended before its second token, so there is no speed to tell" };
  }
  const { plan, ceilings } = about;
  const figures = figuresOf(report, seen);
  const bound = boundOf(figures, ceilings, plan);
  const reason = disagreement(figures, ceilings, plan);
  return reason === null
    ? { status: "finished", figures, bound }
    : { status: "refused", reason, figures, bound };
}

// ---- safety ------------------------------------------------------------------------------------------------------

/** What the rest of a machine needs to stay usable. */
const headroomBytes = 4_000_000_000;

/** Why the baseline should not be run on this machine; null where it may. Mapping a model that does not fit thrashes. */
export function baselineDanger(modelBytes: number, memoryBytes: number): string | null {
  const most = memoryBytes - headroomBytes;
  return modelBytes <= most
    ? null
    : `the baseline maps the whole model, ${bytesText(modelBytes)}, and this machine has ${bytesText(memoryBytes)}: ` +
        `more than what is left beside ${bytesText(headroomBytes)} for everything else`;
}

// ---- the prompt --------------------------------------------------------------------------------------------------

/** LLAMA_TOKEN_TYPE_NORMAL. */
const normalToken = 1;

/** So many ordinary tokens of the vocabulary, always the same ones, spread over all of it. */
export function promptOf(
  count: number,
  vocabularySize: number,
  types: readonly unknown[] | null,
): readonly number[] {
  const isNormal = (token: number): boolean => types === null || types[token] === normalToken;
  const tokens: number[] = [];
  let state = 0x2545_f491;
  for (let tries = 0; tokens.length < count && tries < 1000 * count; tries++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0; // Numerical Recipes' generator
    const token = Math.floor((state / 2 ** 32) * vocabularySize);
    if (isNormal(token)) {
      tokens.push(token);
    }
  }
  if (tokens.length < count) {
    throw new HypuraError(
      "unsupported-model",
      "the model's vocabulary has no ordinary tokens to make a prompt of",
    );
  }
  return tokens;
}

// ---- many runs ---------------------------------------------------------------------------------------------------

export interface PlannedRun {
  readonly side: Side;
  readonly state: CacheState;
  readonly round: number;
}

/**
 * Rounds of A cold, B cold, B warm, A warm: neither side always comes first, and what warms up or slows down with time
 * meets both alike. Without a baseline, A cold and A warm.
 */
export function orderOfRuns(rounds: number, hasBaseline: boolean): readonly PlannedRun[] {
  return Array.from({ length: rounds }, (_, round): readonly PlannedRun[] =>
    hasBaseline
      ? [
          { side: "hypura", state: "cold", round },
          { side: "baseline", state: "cold", round },
          { side: "baseline", state: "warm", round },
          { side: "hypura", state: "warm", round },
        ]
      : [
          { side: "hypura", state: "cold", round },
          { side: "hypura", state: "warm", round },
        ],
  ).flat();
}

/** The figures of runs that may be believed. */
export function finished(
  records: readonly RunRecord[],
  side: Side,
  state: CacheState,
): readonly { readonly figures: RunFigures; readonly bound: Bound; readonly round: number }[] {
  return records.flatMap(({ outcome, round, ...record }) =>
    record.side === side && record.state === state && outcome.status === "finished"
      ? [{ figures: outcome.figures, bound: outcome.bound, round }]
      : [],
  );
}

export interface Ratio {
  readonly state: CacheState;
  readonly decode: RoundRatio;
  readonly prompt: RoundRatio;
  readonly firstToken: RoundRatio;
}

/** Over the rounds, hypura's figure by the baseline's of the same round; above 1 hypura is better. */
export interface RoundRatio {
  readonly median: number;
  readonly least: number;
  readonly most: number;
}

/** Null where no round has both sides. */
export function ratioOf(records: readonly RunRecord[], state: CacheState): Ratio | null {
  const ours = finished(records, "hypura", state);
  const theirs = finished(records, "baseline", state);
  const pairs = ours.flatMap((one) => {
    const other = theirs.find(({ round }) => round === one.round);
    return other === undefined ? [] : [[one.figures, other.figures] as const];
  });
  if (pairs.length === 0) {
    return null;
  }
  const over = (ratio: (a: RunFigures, b: RunFigures) => number): RoundRatio => {
    const ratios = pairs.map(([a, b]) => ratio(a, b));
    return { median: medianOf(ratios), least: Math.min(...ratios), most: Math.max(...ratios) };
  };
  return {
    state,
    decode: over((a, b) => a.decodeTokensPerSecond.median / Math.max(b.decodeTokensPerSecond.median, 1e-9)),
    prompt: over((a, b) => a.promptTokensPerSecond / Math.max(b.promptTokensPerSecond, 1e-9)),
    firstToken: over((a, b) => b.firstTokenSeconds / Math.max(a.firstTokenSeconds, 1e-9)),
  };
}

/** A record as it stands in a file; null where it is of another version or damaged. */
export function parseRecord(text: string): RunRecord | null {
  let record: Partial<RunRecord> | null;
  try {
    record = JSON.parse(text);
  } catch {
    return null;
  }
  const statuses: readonly (string | undefined)[] = ["finished", "refused", "killed", "failed"];
  const isWhole =
    record !== null &&
    typeof record === "object" &&
    record.version === recordVersion &&
    typeof record.session === "string" &&
    typeof record.startedAt === "string" &&
    typeof record.round === "number" &&
    (record.side === "hypura" || record.side === "baseline") &&
    (record.state === "cold" || record.state === "warm") &&
    typeof record.model?.hash === "string" &&
    typeof record.model.name === "string" &&
    typeof record.machine?.fingerprint === "string" &&
    typeof record.settings?.maxTokens === "number" &&
    typeof record.plan?.mode === "string" &&
    statuses.includes(record.outcome?.status);
  return isWhole ? (record as RunRecord) : null;
}

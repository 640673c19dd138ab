// What a token costs: (Model, Placement, Machine) -> bytes by tier, seconds, and the bound that no cleverness passes. It
// owns the cost model and nothing of how a placement is found (plan-place.ts). Pure, and without constants of belief:
// where the machine was not measured the estimate says so and gives no number, and what is assumed of routing is
// called assumed.
//
// One token: the resident weights are read from memory once, at the speed that products on their type and on rows of
// their length reached; the
// experts of a layer that are in the pool are computed while the missing ones are read, so a layer takes
// serial + max(computing, reading); of a dense model the missing matrices are read ahead in a ring that goes on
// through the whole pass and across its end, so the pass takes max(computing, reading).

import type { Machine, ProductSpeed, RowSpeeds, StepSeconds, StorageSpeed } from "./machine";
import type { Model, ModelTensor, StrideSet } from "./model";
import { bandwidthText, bytesText, durationText, rateText } from "./text";

// ---- how often the pool has what a token needs --------------------------------------------------------------------

/** Of the experts that a token needs, the share that the pool has, by the share of all experts that it holds. */
export interface HitCurve {
  /** `recorded`: of runs of this very model. */
  readonly kind: "recorded" | "assumed";
  /** By rising share, both between 0 and 1; straight lines in logarithms between them, and on to (1, 1). */
  readonly points: readonly { readonly share: number; readonly hitRate: number }[];
}

/**
 * What others measured on real models: a share of 0.125 hits 0.53, 0.17 hits 0.71, 0.25 hits 0.72, 0.13 hits 0.66 to
 * 0.72, 0.16 hits 0.71, 0.22 hits 0.80; together about share^0.29 (their exponents lie between 0.25 and 0.33). Routing
 * is a property of each model, so this is an assumption until a run has recorded the model's own.
 */
export const publishedHitCurve: HitCurve = {
  kind: "assumed",
  points: [{ share: 0.5, hitRate: 0.5 ** 0.29 }],
};

export function hitRateAt(curve: HitCurve, share: number): number {
  if (share >= 1) return 1;
  if (share <= 0) return 0;
  const points = [...curve.points, { share: 1, hitRate: 1 }];
  const above = points.findIndex((point) => point.share >= share);
  const high = points[above] ?? { share: 1, hitRate: 1 };
  const low = points[above - 1];
  if (low === undefined && curve.kind === "recorded" && high.share < 1 && high.hitRate < 1) {
    // As if misses fell by the same factor with every slot: through the first point, and steeper below it as every
    // curve of a working set is.
    const rate = 1 - (1 - share) ** (Math.log(1 - high.hitRate) / Math.log(1 - high.share));
    return Math.min(1, Math.max(share, rate));
  }
  const from = low ?? high;
  const to = low === undefined ? (points[above + 1] ?? high) : high;
  // Below the first point the first line goes on; a curve of one point at 1 is a straight share.
  const run = Math.log(to.share / from.share);
  const slope = run === 0 ? 1 : Math.min(1, Math.max(0, Math.log(to.hitRate / from.hitRate) / run));
  const rate = from.hitRate * (share / from.share) ** slope;
  // Any routing at all hits its share of the strides.
  return Math.min(1, Math.max(share, rate));
}

// ---- what was measured --------------------------------------------------------------------------------------------

export interface Speeds {
  /** Seconds to read and use so many bytes of weights of a type, for one token, in long rows as they lie in the file. */
  decodeSeconds(typeName: string, bytes: number): number;
  /** Seconds of the product of a matrix with one token. */
  productSeconds(typeName: string, matrix: Matrix): number;
  /** Seconds of the products of a matrix with a batch of tokens: between the measured batches, 1 and 512. */
  batchSeconds(typeName: string, matrix: Matrix, tokens: number): number;
  readonly copyBytesPerSecond: number;
  /** On the threads of the plan. */
  readonly steps: StepSeconds;
  /** Null: no storage was measured. */
  readonly storage: StorageSpeed | null;
  /** Of the model's types, those that were not measured and take the median of the others. */
  readonly missingTypes: readonly string[];
}

/** As in the file; rearranged by llama.cpp; so, and one of a tensor of experts. */
type Form = "plain" | "repacked" | "experts";

interface Matrix {
  readonly bytes: number;
  readonly elements: number;
  readonly rowElements: number;
  readonly form: Form;
}

/** `bytes` of a tensor: all of it, or what a token touches. */
export function matrixOf(tensor: ModelTensor, bytes: number, repack: boolean): Matrix {
  const elements = (elementsOf(tensor) * bytes) / tensor.sizeBytes;
  const form = !repack
    ? "plain"
    : tensor.strides !== null && tensor.strides.strideCount > 1
      ? "experts"
      : "repacked";
  return { bytes, elements, rowElements: tensor.shape[0] ?? 1, form };
}

/**
 * Elements of a row of the weights that products are measured on. A processor reads short rows more slowly: llama.cpp
 * hands 64 rows at a time to a thread, each beginning at another place than where the thread's last ones ended.
 */
export const measuredRowElements = { short: 512, long: 4096 } as const;

/** The batch that prefillFlopsPerSecond was measured with (ProductSpeed of machine.ts). */
const measuredBatch = 512;

/** Null where the machine was not measured. */
export function speedsOf(model: Model, machine: Machine, threads: number): Speeds | null {
  const { profile } = machine;
  if (profile === null || profile.products.length === 0) {
    return null;
  }
  const byType = new Map(profile.products.map((product) => [product.typeName, product]));
  const usual = usualSpeed(profile.products);
  // Fewer threads than were measured do their share of the work; more were not measured, and promise nothing.
  const share = Math.min(1, threads / profile.computeThreads);
  const of = (typeName: string) => byType.get(typeName) ?? usual;
  const decodeSeconds = (typeName: string, bytes: number): number =>
    bytes / (of(typeName).decodeBytesPerSecond * share);
  const productSeconds = (typeName: string, matrix: Matrix): number =>
    rowsSeconds(formOf(of(typeName), matrix.form), matrix) / share;
  return {
    decodeSeconds,
    productSeconds,
    batchSeconds(typeName, matrix, tokens) {
      const one = productSeconds(typeName, matrix);
      const speed = of(typeName);
      const { prefillFlopsPerSecond } = matrix.form === "plain" ? speed : (speed.repacked ?? speed);
      const full = (2 * matrix.elements * measuredBatch) / (prefillFlopsPerSecond * share);
      return one + (Math.max(0, full - one) * (tokens - 1)) / (measuredBatch - 1);
    },
    copyBytesPerSecond: profile.copyBytesPerSecond,
    steps: {
      attention: profile.steps.attention / share,
      mixing: profile.steps.mixing / share,
      // A row is too short to be shared among threads.
      plain: profile.steps.plain,
    },
    storage: profile.storage[0] ?? null,
    missingTypes: [...model.bytesByType]
      .filter(([name, bytes]) => !byType.has(name) && bytes > model.tensorBytes / 100)
      .map(([name]) => name),
  };
}

/** Of a type that was not measured. */
function usualSpeed(products: readonly ProductSpeed[]): ProductSpeed {
  return {
    typeName: "",
    decodeBytesPerSecond: middle(products.map((one) => one.decodeBytesPerSecond)),
    shortRowBytesPerSecond: middle(products.map((one) => one.shortRowBytesPerSecond)),
    prefillFlopsPerSecond: middle(products.map((one) => one.prefillFlopsPerSecond)),
    repacked: null,
  };
}

/** What has no rearranged form is computed as it is. */
function formOf(speed: ProductSpeed, form: Form): RowSpeeds {
  if (form === "plain" || speed.repacked === null) return speed;
  return form === "experts" ? speed.repacked.experts : speed.repacked;
}

/** On the line through the two lengths of a row that were measured: so much for a row, and so much for each byte. */
function rowsSeconds(speeds: RowSpeeds, { bytes, elements, rowElements }: Matrix): number {
  if (elements === 0) return 0;
  const rowBytes = (count: number): number => (count * bytes) / elements;
  const short = rowBytes(measuredRowElements.short);
  const long = rowBytes(measuredRowElements.long);
  const shortSeconds = short / speeds.shortRowBytesPerSecond;
  const longSeconds = long / speeds.decodeBytesPerSecond;
  // Where a noisy measurement found short rows faster a byte costs what it does in long ones, and a row nothing.
  const byteSeconds = Math.min(longSeconds / long, Math.max(0, longSeconds - shortSeconds) / (long - short));
  const rowSeconds = longSeconds - byteSeconds * long;
  return (elements / rowElements) * rowSeconds + bytes * byteSeconds;
}

function middle(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const half = Math.floor(sorted.length / 2);
  const upper = sorted[half] ?? 1;
  return sorted.length % 2 === 1 ? upper : ((sorted[half - 1] ?? upper) + upper) / 2;
}

/** Bytes per second of reads of this size with so many in flight: the measured sizes nearest to it, between depths. */
export function bandwidthAt(storage: StorageSpeed, readBytes: number, depth: number): number {
  const distance = (bytes: number): number => Math.abs(Math.log(bytes / Math.max(1, readBytes)));
  const nearest = storage.reads.reduce(
    (best, one) => (distance(one.readBytes) < distance(best) ? one.readBytes : best),
    storage.reads[0]?.readBytes ?? 1,
  );
  const rows = storage.reads
    .filter((one) => one.readBytes === nearest)
    .sort((one, other) => one.depth - other.depth);
  const above = rows.find((one) => one.depth >= depth);
  const below = rows.findLast((one) => one.depth <= depth);
  if (above === undefined || below === undefined || above.depth === below.depth) {
    return (above ?? below)?.bytesPerSecond ?? storage.bestBytesPerSecond;
  }
  const part = Math.log(depth / below.depth) / Math.log(above.depth / below.depth);
  return below.bytesPerSecond + part * (above.bytesPerSecond - below.bytesPerSecond);
}

export interface ReaderShape {
  readonly threads: number;
  readonly pieceBytes: number;
}

/** Seconds until `count` strides asked for at once are there. */
function readSeconds(
  storage: StorageSpeed,
  reader: ReaderShape,
  read: { readonly strideBytes: number; readonly count: number },
): number {
  if (read.count <= 0) return 0;
  const piece = Math.min(reader.pieceBytes, read.strideBytes);
  const pieces = Math.ceil(read.strideBytes / piece) * Math.max(1, read.count);
  const depth = Math.max(1, Math.min(reader.threads, pieces));
  return (read.strideBytes * read.count) / bandwidthAt(storage, piece, depth);
}

// ---- one token ----------------------------------------------------------------------------------------------------

/** Strides of one class as a placement has them. */
export interface PlacedClass {
  readonly kind: "dense" | "expert";
  readonly strideBytes: number;
  /** Of the sets that stream. */
  readonly strideCount: number;
  readonly slotCount: number;
  /** Of a dense class: slots whose stride never leaves. */
  readonly pinnedCount: number;
  readonly sets: readonly StrideSet[];
}

/** Where everything is: what the cost model needs of it. */
export interface Placement {
  readonly gpuLayers: number;
  /** By index of the tensor. */
  readonly tiers: readonly ("gpu" | "ram" | "nvme")[];
  readonly classes: readonly PlacedClass[];
}

export interface CostFacts {
  readonly model: Model;
  readonly placement: Placement;
  readonly curve: HitCurve;
  readonly reader: ReaderShape;
  readonly ubatchTokens: number;
  /** Bytes of one token of context on the processor's side. */
  readonly kvBytesPerToken: number;
  /** Whether llama.cpp rearranges the weights that it can. */
  readonly repack: boolean;
  /** Of the missing experts, those that are read before they are asked for. */
  readonly earlyShare: number;
}

/** Bytes of weights that one token of decoding takes from each tier. */
interface TokenBytes {
  readonly touched: number;
  readonly gpu: number;
  readonly ram: number;
  /** Streamed, and in the pool. */
  readonly pool: number;
  /** Streamed, and read for it. */
  readonly read: number;
}

/** Share of a class that the pool has, as the policy keeps it. */
function heldShare(one: PlacedClass, curve: HitCurve): number {
  if (one.strideCount === 0 || one.slotCount >= one.strideCount) {
    return 1;
  }
  return one.kind === "dense"
    ? one.pinnedCount / one.strideCount
    : hitRateAt(curve, one.slotCount / one.strideCount);
}

interface TokenUse extends TokenBytes {
  /** Of the streamed strides that a token touches; null where nothing streams. */
  readonly hitRate: number | null;
}

export function bytesOfToken(facts: CostFacts): TokenUse {
  const { model, placement, curve } = facts;
  const sums = { gpu: 0, ram: 0, nvme: 0 };
  let touched = 0;
  for (const tensor of model.tensors) {
    touched += tensor.touchedBytesPerToken;
    sums[placement.tiers[tensor.index] ?? "ram"] += tensor.touchedBytesPerToken;
  }
  let streamed = 0;
  let held = 0;
  for (const one of placement.classes) {
    const bytes = one.sets.reduce(
      (sum, set) => sum + (model.tensors[set.tensorIndex]?.touchedBytesPerToken ?? 0),
      0,
    );
    streamed += bytes;
    held += bytes * heldShare(one, curve);
  }
  return {
    touched,
    gpu: sums.gpu,
    // What is on nvme and does not stream is mapped: the page cache has it.
    ram: sums.ram + (sums.nvme - streamed),
    pool: held,
    read: streamed - held,
    hitRate: streamed === 0 ? null : held / streamed,
  };
}

export interface Seconds {
  /** Of one token. */
  readonly total: number;
  /** If reads took no time, and if computing took none. */
  readonly compute: number;
  readonly read: number;
}

/** Of a context that is hardly filled: what a short conversation meets. */
const filledTokens = 256;

/** The streamed experts of one layer. */
interface ExpertLayer {
  readonly used: number;
  readonly tensorCount: number;
  readonly bytesEach: number;
  readonly secondsEach: number;
  readonly hitRate: number;
}

interface Streams {
  readonly experts: readonly ExpertLayer[];
  readonly denseReadBytes: number;
  readonly denseSeconds: number;
  readonly denseStrideBytes: number;
}

function streamsOf(facts: CostFacts, speeds: Speeds): Streams {
  const { model, placement, curve } = facts;
  const layers = new Map<number, ExpertLayer>();
  let denseReadBytes = 0;
  let denseSeconds = 0;
  let denseStrideBytes = 0;
  for (const one of placement.classes) {
    const share = heldShare(one, curve);
    for (const set of one.sets) {
      const tensor = model.tensors[set.tensorIndex];
      if (tensor === undefined) continue;
      if (one.kind === "dense") {
        denseReadBytes += tensor.touchedBytesPerToken * (1 - share);
        const matrix = matrixOf(tensor, tensor.touchedBytesPerToken, false);
        denseSeconds += speeds.productSeconds(tensor.typeName, matrix);
        denseStrideBytes = Math.max(denseStrideBytes, set.strideBytes);
        continue;
      }
      const before = layers.get(tensor.layer ?? 0);
      const bytes = (before?.bytesEach ?? 0) + set.strideBytes;
      layers.set(tensor.layer ?? 0, {
        used: Math.max(before?.used ?? 0, set.touchedCount),
        tensorCount: (before?.tensorCount ?? 0) + 1,
        bytesEach: bytes,
        secondsEach:
          (before?.secondsEach ?? 0) +
          speeds.productSeconds(tensor.typeName, matrixOf(tensor, set.strideBytes, false)),
        hitRate: ((before?.hitRate ?? 0) * (before?.bytesEach ?? 0) + share * set.strideBytes) / bytes,
      });
    }
  }
  return { experts: [...layers.values()], denseReadBytes, denseSeconds, denseStrideBytes };
}

/**
 * Expected seconds of one layer's experts: each is missing with the same chance, the missing ones are read at once
 * while the others are computed, and the last product waits for the last read. What is read early is not missing: its
 * time is the disk's, and a token takes no less than all that it reads.
 */
function expertSeconds(layer: ExpertLayer, facts: CostFacts, storage: StorageSpeed): number {
  const miss = (1 - layer.hitRate) * (1 - facts.earlyShare);
  const there = 1 - miss;
  const all = layer.used * layer.secondsEach;
  let chance = there ** layer.used; // of no miss
  let expected = chance * all;
  for (let missing = 1; missing <= layer.used; missing++) {
    chance =
      there === 0
        ? missing === layer.used
          ? 1
          : 0
        : (chance * miss * (layer.used - missing + 1)) / (there * missing);
    const read = readSeconds(storage, facts.reader, {
      strideBytes: layer.bytesEach / layer.tensorCount,
      count: missing * layer.tensorCount,
    });
    const last = (missing * layer.secondsEach) / layer.tensorCount;
    expected += chance * Math.max(all, read + last);
  }
  return expected;
}

/**
 * Operations on a row in llama.cpp's graph of a layer: two norms, two rotations, two rows kept, two sums, a product of
 * gate and up and its function; and of a router: its softmax, the order, the shares picked, summed, divided and set.
 */
const plainOperations = { layer: 10, router: 6 } as const;

/**
 * From the end of a pass to the begin of the next one: sampling, the event of the token, llama.cpp's building of the batch.
 * SmolLM2's tokens take so much longer than its passes (test/bench/NOTES.md); only models of 100 tokens a second feel it.
 */
export const betweenPassesSeconds = 0.6e-3;

/** What a token costs beside products with weights. */
function stepsSeconds(
  { model, kvBytesPerToken, placement }: CostFacts,
  { steps, copyBytesPerSecond }: Speeds,
): number {
  // Layers on a GPU are computed there; nothing was measured of it.
  const layers = Math.max(0, model.layerCount - placement.gpuLayers);
  const isMixture = model.kind === "mixture-of-experts";
  const headElements = model.headCount * ((model.keyLength + model.valueLength) / 2);
  const attending = model.memoryLayers.filter(
    (one) => one.layer >= placement.gpuLayers && one.keyElements + one.valueElements > 0,
  );
  const attention = attending.length * headElements * filledTokens * steps.attention;
  const memory = (kvBytesPerToken * filledTokens) / copyBytesPerSecond;
  const mixing = isMixture ? layers * model.expertUsedCount * model.embeddingLength * steps.mixing : 0;
  const operations = layers * (plainOperations.layer + (isMixture ? plainOperations.router : 0));
  return Math.max(attention, memory) + mixing + operations * model.embeddingLength * steps.plain;
}

/** Null where something is streamed and no storage was measured. */
export function secondsOfToken(facts: CostFacts, speeds: Speeds): Seconds | null {
  const { model, placement } = facts;
  const { storage } = speeds;
  let serial = betweenPassesSeconds + stepsSeconds(facts, speeds);
  const streamed = new Set(placement.classes.flatMap((one) => one.sets.map((set) => set.tensorIndex)));
  for (const tensor of model.tensors) {
    if (placement.tiers[tensor.index] !== "gpu" && !streamed.has(tensor.index)) {
      const matrix = matrixOf(tensor, tensor.touchedBytesPerToken, facts.repack);
      serial += speeds.productSeconds(tensor.typeName, matrix);
    }
  }
  const streams = streamsOf(facts, speeds);
  const expertCompute = streams.experts.reduce((sum, one) => sum + one.used * one.secondsEach, 0);
  const compute = serial + streams.denseSeconds + expertCompute;
  if (streamed.size === 0) {
    return { total: compute, compute, read: 0 };
  }
  if (storage === null) {
    return null;
  }
  const dense = readSeconds(storage, facts.reader, {
    strideBytes: Math.max(1, streams.denseStrideBytes),
    count: streams.denseReadBytes / Math.max(1, streams.denseStrideBytes),
  });
  let chain = serial + streams.denseSeconds;
  for (const layer of streams.experts) {
    chain += expertSeconds(layer, facts, storage);
  }
  const read = bytesOfToken(facts).read / storage.bestBytesPerSecond;
  // Beside experts, whose reads go first, nothing is counted as read ahead: it was not measured.
  const total = streams.experts.length > 0 ? chain + dense : Math.max(chain, dense);
  return { total: Math.max(total, read), compute, read };
}

/** Seconds of one micro-batch of a prompt; null as above. */
export function secondsOfBatch(facts: CostFacts, speeds: Speeds): number | null {
  const { model, placement, ubatchTokens } = facts;
  const streamed = new Set(placement.classes.flatMap((one) => one.sets.map((set) => set.tensorIndex)));
  let serial = 0;
  for (const tensor of model.tensors) {
    if (placement.tiers[tensor.index] === "gpu" || streamed.has(tensor.index)) continue;
    if (tensor.touchedBytesPerToken === 0 || tensor.shape.length < 2 || tensor.role === "embedding") continue;
    const tokens = tensor.role === "output" ? 1 : ubatchTokens;
    serial += setSeconds(tensor, tensor.strides, { tokens, repack: facts.repack }, speeds);
  }
  if (streamed.size === 0) return serial;
  if (speeds.storage === null) return null;
  let compute = 0;
  let read = 0;
  for (const one of placement.classes) {
    for (const set of one.sets) {
      const tensor = model.tensors[set.tensorIndex];
      if (tensor === undefined) continue;
      compute += setSeconds(tensor, set, { tokens: ubatchTokens, repack: false }, speeds);
      read += batchReads(one, set, ubatchTokens) * set.strideBytes;
    }
  }
  return serial + Math.max(compute, read / speeds.storage.bestBytesPerSecond);
}

/** Of one tensor; experts get a share of the batch each. */
function setSeconds(
  tensor: ModelTensor,
  set: StrideSet | null,
  { tokens, repack }: { readonly tokens: number; readonly repack: boolean },
  speeds: Speeds,
): number {
  const { sizeBytes, typeName } = tensor;
  if (set === null || set.strideCount === 1) {
    return speeds.batchSeconds(typeName, matrixOf(tensor, sizeBytes, repack), tokens);
  }
  const named = namedStrides(set, tokens);
  const each = matrixOf(tensor, set.strideBytes, repack);
  return named * speeds.batchSeconds(typeName, each, (tokens * set.touchedCount) / named);
}

/** Strides of a set that a batch names, if tokens choose independently of each other. */
function namedStrides(set: StrideSet, tokens: number): number {
  return set.strideCount * (1 - (1 - set.touchedCount / set.strideCount) ** tokens);
}

/** Strides of a set that a micro-batch reads: those that its tokens name, less those held. */
export function batchReads(one: PlacedClass, set: StrideSet, tokens: number): number {
  const held =
    one.slotCount >= one.strideCount
      ? one.strideCount
      : one.kind === "dense"
        ? one.pinnedCount
        : one.slotCount;
  const heldHere = (held / Math.max(1, one.strideCount)) * set.strideCount;
  return Math.max(0, namedStrides(set, tokens) - heldHere);
}

function elementsOf(tensor: ModelTensor): number {
  return tensor.shape.reduce((product, size) => product * size, 1);
}

// ---- the estimate -------------------------------------------------------------------------------------------------

/** What a plan should do on this machine, and how well that is known. */
export interface Estimate {
  /** Null: not measured, and `note` says what to do. */
  readonly decodeTokensPerSecond: number | null;
  readonly prefillTokensPerSecond: number | null;
  /** `model`: computed from measured speeds; `corrected`, `measured`: by runs that were kept. */
  readonly basis: "none" | "model" | "corrected" | "measured";
  /** What no overlap and no cleverness can pass; null where nothing was measured. */
  readonly bound: Bound | null;
  readonly tokenBytes: TokenBytes;
  readonly hits: {
    readonly rate: number;
    /** If routing were random; what the pool hits at least. */
    readonly leastRate: number;
    readonly curve: HitCurve["kind"];
  } | null;
  /** Of the cost model, before any correction: what a measured run is compared with. */
  readonly modelSeconds: number | null;
  readonly note: string;
}

export interface Bound {
  readonly tokensPerSecond: number;
  readonly by: "storage" | "computing";
  readonly sentence: string;
}

export const notMeasured = "not measured: run `hypura profile`";

export function estimateOf(facts: CostFacts, speeds: Speeds | null): Estimate {
  const use = bytesOfToken(facts);
  const { hitRate, ...tokenBytes } = use;
  const isExpert = facts.placement.classes.some((one) => one.kind === "expert");
  const least = leastHitRate(facts);
  const hits =
    hitRate === null
      ? null
      : { rate: hitRate, leastRate: isExpert ? least : hitRate, curve: facts.curve.kind };
  const seconds = speeds === null ? null : secondsOfToken(facts, speeds);
  const batch = speeds === null ? null : secondsOfBatch(facts, speeds);
  const gpuUnknown = use.gpu > 0;
  const known = seconds !== null && !gpuUnknown;
  return {
    decodeTokensPerSecond: known ? 1 / seconds.total : null,
    prefillTokensPerSecond: known && batch !== null ? facts.ubatchTokens / batch : null,
    basis: known ? "model" : "none",
    bound: boundOf(facts, use, speeds),
    tokenBytes,
    hits,
    modelSeconds: known ? seconds.total : null,
    note: noteOf(speeds, { seconds, gpuUnknown }),
  };
}

/** With random routing a class hits by the share of its strides that it holds. */
function leastHitRate(facts: CostFacts): number {
  const random: HitCurve = { kind: "assumed", points: [] };
  return bytesOfToken({ ...facts, curve: random }).hitRate ?? 1;
}

function noteOf(
  speeds: Speeds | null,
  known: { readonly seconds: Seconds | null; readonly gpuUnknown: boolean },
): string {
  if (speeds === null) return notMeasured;
  if (known.seconds === null)
    return "the disk was not measured: run `hypura profile --path FOLDER` for the model's folder";
  if (known.gpuUnknown) return "products on the GPU were not measured: the bound is all that can be said";
  return speeds.missingTypes.length === 0
    ? ""
    : `products of ${speeds.missingTypes.join(", ")} were not measured: the median of other types stands for them`;
}

function boundOf(facts: CostFacts, use: TokenUse, speeds: Speeds | null): Bound | null {
  if (speeds === null) return null;
  const seconds = secondsOfToken(facts, speeds);
  if (seconds === null) return null;
  if (seconds.read > seconds.compute && speeds.storage !== null) {
    const rate = 1 / seconds.read;
    const sentence = `a token reads ${bytesText(use.read)}: at ${bandwidthText(speeds.storage.bestBytesPerSecond)} of disk ${rateText(rate)} at most`;
    return { tokensPerSecond: rate, by: "storage", sentence };
  }
  if (use.gpu > 0) {
    // What the processor does is no bound for a machine whose GPU does most of it.
    return null;
  }
  const rate = 1 / seconds.compute;
  const sentence = `computing on ${bytesText(use.touched)} takes ${durationText(seconds.compute)}: ${rateText(rate)} at most`;
  return { tokensPerSecond: rate, by: "computing", sentence };
}

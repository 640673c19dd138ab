// What a routing trace says about itself: the header that native code puts before the records (ffi/native/trace.h has
// the records). It holds the geometry, the pool and the policies of the run, so that a replay needs nothing else: no
// model file, no plan, no machine. Pure.

import { HypuraError } from "./errors";
import type { CachePolicy, Plan, Streaming } from "./plan";
import { totalBytes } from "./plan";

export interface TraceClass {
  readonly strideBytes: number;
  readonly slotBytes: number;
  readonly slotCount: number;
  readonly policy: CachePolicy;
}

export interface TraceTensor {
  readonly name: string;
  readonly strideCount: number;
  readonly classIndex: number;
}

export interface TraceHeader {
  readonly format: "hypura trace";
  readonly version: 1;
  readonly model: { readonly name: string; readonly architecture: string; readonly fileBytes: number };
  readonly mode: Plan["mode"];
  readonly contextTokens: number;
  /** Requests that decoded together: a pass of more tokens was a prompt's. */
  readonly slotCount: number;
  readonly decodeThreads: number;
  /** What the plan used beside its pool: `--memory` less this is the pool. */
  readonly restBytes: number;
  readonly touchedBytesPerToken: number;
  readonly lookaheadStrides: number;
  readonly classes: readonly TraceClass[];
  /** In the order of a pass; their strides are numbered through in this order. */
  readonly tensors: readonly TraceTensor[];
}

export function traceHeader(plan: Plan, streaming: Streaming): TraceHeader {
  return {
    format: "hypura trace",
    version: 1,
    model: { ...plan.model, fileBytes: plan.files.reduce((sum, file) => sum + file.sizeBytes, 0) },
    mode: plan.mode,
    contextTokens: plan.contextTokens,
    slotCount: plan.slotCount,
    decodeThreads: plan.decodeThreads,
    restBytes: totalBytes(plan.memory) - plan.memory.poolBytes,
    touchedBytesPerToken: streaming.touchedBytesPerToken,
    lookaheadStrides: streaming.lookaheadStrides,
    classes: streaming.classes.map(({ strideBytes, slotBytes, slotCount, policy }) => ({
      strideBytes,
      slotBytes,
      slotCount,
      policy,
    })),
    tensors: streaming.tensors.map(({ tensorIndex, strideCount, classIndex }) => ({
      name: plan.tensors[tensorIndex]?.name ?? "",
      strideCount,
      classIndex,
    })),
  };
}

/** "hytrace1" and the length of the header. */
export const traceStartBytes = 12;
const magic = "hytrace1";
/** A header of a model with a million tensors is smaller. */
const mostHeaderBytes = 256_000_000;

/** The length of the header, out of the first `traceStartBytes` bytes. Throws `corrupt-model` where it is no trace. */
export function headerLength(path: string, start: Uint8Array): number {
  const text = new TextDecoder("latin1").decode(start.subarray(0, magic.length));
  if (start.byteLength < traceStartBytes || text !== magic) {
    throw new HypuraError(
      "usage",
      `${JSON.stringify(path)} is no trace: make one with \`hypura run MODEL --trace FILE\``,
    );
  }
  const length = new DataView(start.buffer, start.byteOffset).getUint32(magic.length, true);
  if (length > mostHeaderBytes) {
    throw damaged(path, `its header of ${length} bytes is too long`);
  }
  return length;
}

/** The header from its bytes. Throws where it is cut off, damaged or of another version. */
export function parseHeader(path: string, bytes: Uint8Array): TraceHeader {
  let header: Partial<TraceHeader>;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw damaged(path, "its header is no JSON");
  }
  if (header.format !== "hypura trace" || header.version !== 1) {
    throw new HypuraError(
      "usage",
      `${JSON.stringify(path)} was recorded by another version of hypura: record it again`,
    );
  }
  if (!isWhole(header)) {
    throw damaged(path, "its header lacks a field");
  }
  return header;
}

function damaged(path: string, what: string): HypuraError {
  return new HypuraError("usage", `the trace ${JSON.stringify(path)} is damaged (${what}): record it again`);
}

/** Native code checks the numbers; here only what this side computes with. */
function isWhole(header: Partial<TraceHeader>): header is TraceHeader {
  const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0;
  const isSize = (value: unknown): boolean => isCount(value) && (value as number) > 0;
  const { classes, tensors } = header;
  return (
    typeof header.model?.name === "string" &&
    isSize(header.slotCount) &&
    isCount(header.restBytes) &&
    isCount(header.touchedBytesPerToken) &&
    isCount(header.lookaheadStrides) &&
    Array.isArray(classes) &&
    classes.length > 0 &&
    classes.every(
      (one) =>
        isSize(one?.strideBytes) &&
        isSize(one?.slotBytes) &&
        isSize(one?.slotCount) &&
        typeof one?.policy?.kind === "string",
    ) &&
    Array.isArray(tensors) &&
    tensors.length > 0 &&
    tensors.every(
      (one) =>
        typeof one?.name === "string" &&
        isSize(one?.strideCount) &&
        isCount(one?.classIndex) &&
        one.classIndex < classes.length,
    )
  );
}

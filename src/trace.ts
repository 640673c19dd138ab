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
  /** Tokens of a step of decoding at most, of all requests and with guesses: a pass of more was a prompt's. */
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
    slotCount: plan.slotCount * (1 + (plan.speculation?.maxTokens ?? 0)),
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

// ---- records -------------------------------------------------------------------------------------------------------

/** What a page about a trace shows of its records; the others only move the reader on. */
export type TraceEvent =
  | { readonly kind: "pass"; readonly atUs: number; readonly tokens: number }
  /** Ops ask for these strides. */
  | { readonly kind: "begin"; readonly atUs: number; readonly strides: readonly number[] }
  | { readonly kind: "complete"; readonly atUs: number; readonly stride: number }
  | { readonly kind: "stall"; readonly atUs: number; readonly us: number };

/** Numbers of ffi/native/trace.h. */
const recordKinds = {
  end: 0,
  pass: 1,
  begin: 2,
  mixed: 3,
  release: 5,
  complete: 6,
  fail: 8,
  prefetch: 9,
  stall: 11,
} as const;
const cancelKind = 7;

/** The events of a trace, in order. Ends early where the records are cut off or damaged: native code judges those. */
export function* traceEvents(records: Uint8Array): Generator<TraceEvent> {
  let at = 0;
  let atUs = 0;
  let last = 0;
  const varint = (): number => {
    let value = 0;
    let scale = 1;
    while (at < records.length) {
      const byte = records[at++] as number;
      value += (byte & 0x7f) * scale;
      scale *= 128;
      if (byte < 0x80) {
        return value;
      }
    }
    return Number.NaN;
  };
  const step = (code: number): number => {
    last += code % 2 === 0 ? code / 2 : -(code + 1) / 2;
    return last;
  };
  const time = (): number => {
    atUs += varint();
    return atUs;
  };
  while (at < records.length) {
    const head = varint();
    const kind = head % 16;
    const argument = Math.floor(head / 16);
    switch (kind) {
      case recordKinds.pass:
        yield { kind: "pass", atUs: time(), tokens: argument };
        break;
      case recordKinds.begin:
      case recordKinds.mixed: {
        const begunAt = time();
        const strides: number[] = [];
        for (let i = 0; i < argument && at < records.length; i++) {
          strides.push(step(varint()));
          if (kind === recordKinds.mixed) {
            varint();
          }
        }
        yield { kind: "begin", atUs: begunAt, strides };
        break;
      }
      case recordKinds.release:
        for (let i = 0; i < argument && at < records.length; i++) {
          step(varint());
        }
        break;
      case recordKinds.complete: {
        const stride = step(argument);
        yield { kind: "complete", atUs: time(), stride };
        break;
      }
      case cancelKind:
      case recordKinds.fail:
      case recordKinds.prefetch:
        step(argument);
        break;
      case recordKinds.stall:
        yield { kind: "stall", atUs: time(), us: argument };
        break;
      case recordKinds.end:
        return;
    }
  }
}

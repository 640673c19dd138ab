// Bytes of GGUF files -> metadata and tensor directory. It owns the file format: versions, limits, ggml's tensor
// types, split files. It must not know what a tensor is for (model.ts) or where bytes come from (modelfile.ts):
// it is pure, and reads through a ByteSource that the caller supplies. It never reads tensor data, so a file of
// hundreds of gigabytes costs its header only. Everything a file says is checked before it is believed: a
// header that lies ends in a HypuraError, never in a wrong range, a large allocation or a long wait.
//
// The format, and what a sound file is, follow llama.cpp v0.5.0 (ggml/src/gguf.cpp, gguf_init_from_reader): what
// this reader accepts, llama.cpp's accepts too, and where this reader is stricter the constant below says why.

import { HypuraError } from "./errors";

/** Random access to the bytes of one file. `read` may return fewer bytes only where the file ends. */
export interface ByteSource {
  readonly sizeBytes: number;
  read(offsetBytes: number, lengthBytes: number): Uint8Array;
}

export interface NamedSource {
  readonly name: string;
  readonly source: ByteSource;
}

export type GgufScalar = number | bigint | boolean | string;

export type GgufElementType =
  | "u8"
  | "i8"
  | "u16"
  | "i16"
  | "u32"
  | "i32"
  | "f32"
  | "bool"
  | "str"
  | "u64"
  | "i64"
  | "f64";

/**
 * An array of the metadata. Short ones carry their `values`; long ones (a vocabulary has 150,000 strings) say
 * where they lie, and `readArray` fetches them for who asks. A text of more than a megabyte is kept in the same
 * way, as an array of one string.
 */
export interface GgufArray {
  readonly elementType: GgufElementType;
  readonly count: number;
  readonly fileIndex: number;
  readonly offsetBytes: number;
  readonly sizeBytes: number;
  readonly values: readonly GgufScalar[] | null;
}

export type GgufValue = GgufScalar | GgufArray;

export interface GgufTensor {
  readonly name: string;
  /** ggml's `ne`: elements, fastest dimension first; one to four numbers. */
  readonly shape: readonly number[];
  /** ggml_type. */
  readonly type: number;
  readonly typeName: string;
  readonly fileIndex: number;
  /** From the start of its file. */
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

export interface GgufFile {
  readonly name: string;
  readonly sizeBytes: number;
  /** Where tensor data starts; everything before it is header. */
  readonly dataOffsetBytes: number;
}

export interface Gguf {
  readonly version: number;
  readonly alignment: number;
  /** Of the first file; the other files of a split set repeat only their split.* keys. */
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: readonly GgufTensor[];
  readonly files: readonly GgufFile[];
}

export interface GgufLimits {
  /** llama.cpp compares every name with every other, so it would not survive more either. */
  readonly maxTensorCount: number;
  readonly maxMetadataCount: number;
  readonly maxKeyBytes: number;
  /** GGUF_MAX_STRING_LENGTH in gguf.cpp. */
  readonly maxStringBytes: number;
  /** Strings must be walked one by one; the largest vocabularies have 262,144 tokens and 512,000 merges. */
  readonly maxStringCount: number;
  /** GGUF_MAX_ARRAY_ELEMENTS in gguf.cpp. */
  readonly maxArrayCount: number;
  readonly maxHeaderBytes: number;
  /** split.count is a 16-bit number. */
  readonly maxFileCount: number;
}

export const defaultLimits: GgufLimits = {
  maxTensorCount: 262_144,
  maxMetadataCount: 65_536,
  maxKeyBytes: 65_535,
  maxStringBytes: 1_073_741_824,
  maxStringCount: 2_097_152,
  maxArrayCount: 1_073_741_824,
  maxHeaderBytes: 1_073_741_824,
  maxFileCount: 65_535,
};

/** GGML_MAX_NAME is 64 with its final zero. */
const maxTensorNameBytes = 63;
/** GGML_MAX_DIMS. */
const maxDimensions = 4;
/** GGUF_DEFAULT_ALIGNMENT. */
const defaultAlignment = 32;
/** Read at a time: a few system calls for a usual header, and little of the data behind it. */
const windowBytes = 65_536;
/** Arrays up to this length are per-layer hyperparameters (LLAMA_MAX_LAYERS is 512) and wanted at once. */
const eagerArrayCount = 1024;
const eagerArrayBytes = 65_536;
/** Longer texts (a whole tokenizer as JSON has 30 MB) stay in the file, as an array of one string. */
const eagerTextBytes = 1_048_576;
/** All texts that a file's metadata brings into memory. */
const eagerTotalTextBytes = 16_777_216;
/** All eager arrays of a file together, so that many short arrays cost no more than a long one. */
const eagerTotalCount = 262_144;

export interface TensorType {
  readonly id: number;
  readonly name: string;
  /** Elements of a block. */
  readonly blockElements: number;
  /** Bytes of a block. */
  readonly blockBytes: number;
}

function tensorType(id: number, name: string, blockElements: number, blockBytes: number): TensorType {
  return { id, name, blockElements, blockBytes };
}

/**
 * Every ggml_type of llama.cpp v0.5.0 that a file may hold: ids from ggml/include/ggml.h, names and block sizes
 * from `type_traits` in ggml/src/ggml.c, bytes from the static_asserts in ggml/src/ggml-common.h.
 */
export const tensorTypes: ReadonlyMap<number, TensorType> = new Map(
  [
    tensorType(0, "f32", 1, 4),
    tensorType(1, "f16", 1, 2),
    tensorType(2, "q4_0", 32, 18),
    tensorType(3, "q4_1", 32, 20),
    tensorType(6, "q5_0", 32, 22),
    tensorType(7, "q5_1", 32, 24),
    tensorType(8, "q8_0", 32, 34),
    tensorType(9, "q8_1", 32, 36),
    tensorType(10, "q2_K", 256, 84),
    tensorType(11, "q3_K", 256, 110),
    tensorType(12, "q4_K", 256, 144),
    tensorType(13, "q5_K", 256, 176),
    tensorType(14, "q6_K", 256, 210),
    tensorType(15, "q8_K", 256, 292),
    tensorType(16, "iq2_xxs", 256, 66),
    tensorType(17, "iq2_xs", 256, 74),
    tensorType(18, "iq3_xxs", 256, 98),
    tensorType(19, "iq1_s", 256, 50),
    tensorType(20, "iq4_nl", 32, 18),
    tensorType(21, "iq3_s", 256, 110),
    tensorType(22, "iq2_s", 256, 82),
    tensorType(23, "iq4_xs", 256, 136),
    tensorType(24, "i8", 1, 1),
    tensorType(25, "i16", 1, 2),
    tensorType(26, "i32", 1, 4),
    tensorType(27, "i64", 1, 8),
    tensorType(28, "f64", 1, 8),
    tensorType(29, "iq1_m", 256, 56),
    tensorType(30, "bf16", 1, 2),
    tensorType(34, "tq1_0", 256, 54),
    tensorType(35, "tq2_0", 256, 66),
    tensorType(39, "mxfp4", 32, 17),
    tensorType(40, "nvfp4", 64, 36),
    tensorType(41, "q1_0", 128, 18),
    tensorType(42, "q2_0", 64, 18),
  ].map((type) => [type.id, type] as const),
);

/** Types that once were in files and are gone, so that the sentence can say so. */
const removedTypes: ReadonlyMap<number, string> = new Map([
  [4, "q4_2"],
  [5, "q4_3"],
  [31, "q4_0_4_4"],
  [32, "q4_0_4_8"],
  [33, "q4_0_8_8"],
  [36, "iq4_nl_4_4"],
  [37, "iq4_nl_4_8"],
  [38, "iq4_nl_8_8"],
]);

const arrayTypeId = 9;

/** gguf_type -> name and bytes of an element; a string has no fixed size. */
const valueTypes: ReadonlyMap<number, { readonly name: GgufElementType; readonly sizeBytes: number }> =
  new Map([
    [0, { name: "u8", sizeBytes: 1 }],
    [1, { name: "i8", sizeBytes: 1 }],
    [2, { name: "u16", sizeBytes: 2 }],
    [3, { name: "i16", sizeBytes: 2 }],
    [4, { name: "u32", sizeBytes: 4 }],
    [5, { name: "i32", sizeBytes: 4 }],
    [6, { name: "f32", sizeBytes: 4 }],
    [7, { name: "bool", sizeBytes: 1 }],
    [8, { name: "str", sizeBytes: 0 }],
    [10, { name: "u64", sizeBytes: 8 }],
    [11, { name: "i64", sizeBytes: 8 }],
    [12, { name: "f64", sizeBytes: 8 }],
  ]);

const strictUtf8 = new TextDecoder("utf-8", { fatal: true });
const lenientUtf8 = new TextDecoder("utf-8");

/** Text of a file, made safe to print: quoted, control characters escaped, long text cut. */
function quote(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 77)}...` : text).replaceAll("\u007f", "\\u007f");
}

function corrupt(name: string, sentence: string): HypuraError {
  return new HypuraError(
    "corrupt-model",
    `${quote(name)} is damaged: ${sentence}; download or convert it again`,
  );
}

function roundUp(value: number, step: number): number {
  const rest = value % step;
  return rest === 0 ? value : value + (step - rest);
}

/**
 * A cursor over one file. Invariant: `window` holds the file's bytes [windowStart, windowStart + window.length),
 * and no read passes the end of the file or the header limit. All reads are little-endian.
 */
interface Cursor {
  readonly name: string;
  position(): number;
  remaining(): number;
  bytes(lengthBytes: number, what: string): Uint8Array;
  skip(lengthBytes: number, what: string): void;
  /** Passes over `count` strings; a vocabulary has hundreds of thousands, so this is the one hot loop here. */
  skipStrings(count: number, what: string): void;
  u32(what: string): number;
  /** A 64-bit count, length or offset; refused where a number could not hold it exactly. */
  u64(what: string): number;
  scalar(type: GgufElementType, what: string, maxStringBytes: number): GgufScalar;
}

function openCursor(file: NamedSource, startBytes: number, maxBytes: number): Cursor {
  const { name, source } = file;
  const endBytes = Math.min(source.sizeBytes, startBytes + maxBytes);
  let window: Uint8Array = new Uint8Array(0);
  let view: DataView = new DataView(new ArrayBuffer(0));
  let windowStart = startBytes;
  let at = startBytes;

  function checkRoom(lengthBytes: number, what: string): void {
    if (lengthBytes <= endBytes - at) return;
    if (endBytes < source.sizeBytes) {
      throw corrupt(name, `its header does not end within ${maxBytes} bytes (${what} at byte ${at})`);
    }
    const missing = at + lengthBytes - source.sizeBytes;
    throw new HypuraError(
      "corrupt-model",
      `${quote(name)} is cut short or damaged: ${what} at byte ${at} needs ${lengthBytes} bytes, but the file ends ` +
        `at byte ${source.sizeBytes}, ${missing} bytes too early; download it again`,
    );
  }

  /** Makes the next `lengthBytes` bytes addressable and returns their index in the window. */
  function need(lengthBytes: number, what: string): number {
    const index = at - windowStart;
    if (index + lengthBytes <= window.length) return index;
    checkRoom(lengthBytes, what);
    const wanted = Math.min(Math.max(lengthBytes, windowBytes), endBytes - at);
    const loaded = source.read(at, wanted);
    if (loaded.length < lengthBytes) {
      throw new HypuraError(
        "io",
        `${quote(name)} gave ${loaded.length} of ${lengthBytes} bytes at byte ${at}: it changed while it was read; try again`,
      );
    }
    window = loaded.length > wanted ? loaded.subarray(0, wanted) : loaded;
    view = new DataView(window.buffer, window.byteOffset, window.length);
    windowStart = at;
    return 0;
  }

  function bytes(lengthBytes: number, what: string): Uint8Array {
    const index = need(lengthBytes, what);
    at += lengthBytes;
    return window.subarray(index, index + lengthBytes);
  }

  function u64(what: string): number {
    const index = need(8, what);
    const low = view.getUint32(index, true);
    const high = view.getUint32(index + 4, true);
    // 2^53 = 2^21 * 2^32: beyond it a number is not exact, and no file is that large.
    if (high >= 0x20_0000) {
      throw corrupt(
        name,
        `${what} at byte ${at} is ${view.getBigUint64(index, true)}, which no file can hold`,
      );
    }
    at += 8;
    return high * 4_294_967_296 + low;
  }

  function scalar(type: GgufElementType, what: string, maxStringBytes: number): GgufScalar {
    if (type === "str") {
      const lengthBytes = u64(`the length of ${what}`);
      if (lengthBytes > maxStringBytes) {
        throw corrupt(
          name,
          `${what} at byte ${at} claims ${lengthBytes} bytes, the limit is ${maxStringBytes}`,
        );
      }
      return lenientUtf8.decode(bytes(lengthBytes, what));
    }
    const sizeBytes = scalarBytes(type);
    const index = need(sizeBytes, what);
    at += sizeBytes;
    switch (type) {
      case "u8":
        return view.getUint8(index);
      case "i8":
        return view.getInt8(index);
      case "u16":
        return view.getUint16(index, true);
      case "i16":
        return view.getInt16(index, true);
      case "u32":
        return view.getUint32(index, true);
      case "i32":
        return view.getInt32(index, true);
      case "f32":
        return view.getFloat32(index, true);
      case "bool":
        return view.getUint8(index) !== 0;
      case "u64":
        return exactInteger(view.getBigUint64(index, true));
      case "i64":
        return exactInteger(view.getBigInt64(index, true));
      case "f64":
        return view.getFloat64(index, true);
    }
  }

  return {
    name,
    position: () => at,
    remaining: () => endBytes - at,
    bytes,
    skip(lengthBytes, what) {
      checkRoom(lengthBytes, what);
      at += lengthBytes;
      // It may leave the window, but only forwards: need() then loads another.
    },
    skipStrings(count, what) {
      for (let i = 0; i < count; i++) {
        const index = at - windowStart;
        // Short strings inside the window, without a call; everything else takes the checked way.
        if (index + 8 <= window.length && view.getUint32(index + 4, true) === 0) {
          const lengthBytes = view.getUint32(index, true);
          if (index + 8 + lengthBytes <= window.length) {
            at += 8 + lengthBytes;
            continue;
          }
        }
        const lengthBytes = u64(what);
        checkRoom(lengthBytes, what);
        at += lengthBytes;
      }
    },
    u32(what) {
      const index = need(4, what);
      at += 4;
      return view.getUint32(index, true);
    },
    u64,
    scalar,
  };
}

function scalarBytes(type: Exclude<GgufElementType, "str">): number {
  switch (type) {
    case "u8":
    case "i8":
    case "bool":
      return 1;
    case "u16":
    case "i16":
      return 2;
    case "u32":
    case "i32":
    case "f32":
      return 4;
    case "u64":
    case "i64":
    case "f64":
      return 8;
  }
}

function exactInteger(value: bigint): number | bigint {
  return value >= BigInt(Number.MIN_SAFE_INTEGER) && value <= BigInt(Number.MAX_SAFE_INTEGER)
    ? Number(value)
    : value;
}

/** What the first bytes of something that is no GGUF look like, for the sentence that says so. */
function magicHint(head: Uint8Array): string {
  const text = lenientUtf8.decode(head.subarray(0, 64));
  if (text.startsWith("version https://git-lfs")) {
    return "it is a Git LFS pointer, not the model itself: fetch it with `git lfs pull`";
  }
  if (/^\s*<(!doctype|html)/i.test(text))
    return "it is a web page: the download went wrong, fetch the .gguf file itself";
  if (text.startsWith("PK\u0003\u0004"))
    return "it is a zip archive or a PyTorch checkpoint: convert it to GGUF";
  if (/^(ggml|ggmf|ggjt|lmgg|fmgg|tjgg)/.test(text))
    return "it is a GGML file from before GGUF: get the GGUF version";
  if (head[8] === 0x7b && head[6] === 0 && head[7] === 0)
    return "it looks like a safetensors file: convert it to GGUF";
  return "give a .gguf file";
}

interface ParsedFile {
  readonly version: number;
  readonly alignment: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: readonly GgufTensor[];
  readonly dataOffsetBytes: number;
}

/** How a file starts: magic, version, counts. Returns null-free values or throws. */
function readPreamble(
  cursor: Cursor,
  file: NamedSource,
): { version: number; tensorCount: number; keyCount: number } {
  const { name } = cursor;
  if (file.source.sizeBytes === 0) {
    throw new HypuraError("not-a-model", `${quote(name)} is empty (0 bytes): download the model again`);
  }
  const head = file.source.read(0, Math.min(64, file.source.sizeBytes));
  const magic = lenientUtf8.decode(head.subarray(0, 4));
  if (magic !== "GGUF") {
    throw new HypuraError(
      "not-a-model",
      `${quote(name)} is not a GGUF model: it starts with ${quote(magic)} instead of "GGUF"; ${magicHint(head)}`,
    );
  }
  cursor.skip(4, "the magic");
  const version = cursor.u32("the version");
  // gguf.cpp recognises the other byte order in the same way: a small number has its low 16 bits clear.
  if (version !== 0 && (version & 0xffff) === 0) {
    throw new HypuraError(
      "unsupported-model",
      `${quote(name)} is a big-endian GGUF, which this machine cannot use: get the little-endian version`,
    );
  }
  if (version === 1) {
    throw new HypuraError(
      "unsupported-model",
      `${quote(name)} is GGUF version 1, which llama.cpp no longer reads: get or convert a version 3 file`,
    );
  }
  if (version !== 2 && version !== 3) {
    throw new HypuraError(
      "unsupported-model",
      `${quote(name)} says it is GGUF version ${version}, and versions 2 and 3 are known: update hypura or check the file`,
    );
  }
  return { version, tensorCount: cursor.u64("the tensor count"), keyCount: cursor.u64("the metadata count") };
}

/** `count` things of at least `eachBytes` must fit what is left; a lie is found before any loop starts. */
function checkCount(
  cursor: Cursor,
  claim: { what: string; count: number; limit: number; eachBytes: number },
): void {
  if (claim.count > claim.limit) {
    throw corrupt(cursor.name, `it claims ${claim.count} ${claim.what}, the limit is ${claim.limit}`);
  }
  if (claim.count * claim.eachBytes > cursor.remaining()) {
    throw corrupt(
      cursor.name,
      `it claims ${claim.count} ${claim.what} at byte ${cursor.position()}, which do not fit the ` +
        `${cursor.remaining()} bytes that are left`,
    );
  }
}

/** A key or a tensor name: UTF-8 without control characters, since it is compared and printed. */
function readName(cursor: Cursor, what: string, maxBytes: number): string {
  const at = cursor.position();
  const lengthBytes = cursor.u64(`the length of ${what}`);
  if (lengthBytes === 0) throw corrupt(cursor.name, `${what} at byte ${at} is empty`);
  if (lengthBytes > maxBytes) {
    throw corrupt(cursor.name, `${what} at byte ${at} claims ${lengthBytes} bytes, the limit is ${maxBytes}`);
  }
  const raw = cursor.bytes(lengthBytes, what);
  for (const byte of raw) {
    if (byte < 0x20 || byte === 0x7f) {
      throw corrupt(cursor.name, `${what} at byte ${at} contains the control character ${byte}`);
    }
  }
  try {
    return strictUtf8.decode(raw);
  } catch (cause) {
    throw new HypuraError(
      "corrupt-model",
      corrupt(cursor.name, `${what} at byte ${at} is not UTF-8`).message,
      { cause },
    );
  }
}

function readElements(
  cursor: Cursor,
  array: { type: GgufElementType; count: number; what: string },
  maxStringBytes: number,
): GgufScalar[] {
  const values: GgufScalar[] = [];
  for (let i = 0; i < array.count; i++) values.push(cursor.scalar(array.type, array.what, maxStringBytes));
  return values;
}

interface HeaderContext {
  readonly file: NamedSource;
  readonly fileIndex: number;
  readonly limits: GgufLimits;
  /** What may still be spent: elements turned into values at once, strings walked, bytes of text kept. */
  readonly left: { eagerCount: number; stringCount: number; textBytes: number };
}

function readArrayValue(cursor: Cursor, key: string, context: HeaderContext): GgufArray {
  const { limits, left } = context;
  const what = `the array ${quote(key)}`;
  const typeId = cursor.u32(`the element type of ${what}`);
  const type = valueTypes.get(typeId);
  if (type === undefined) {
    const sentence =
      typeId === arrayTypeId
        ? "holds arrays, which llama.cpp does not read"
        : `has the unknown element type ${typeId}`;
    throw corrupt(cursor.name, `${what} ${sentence}`);
  }
  const count = cursor.u64(`the length of ${what}`);
  const eachBytes = type.name === "str" ? 8 : type.sizeBytes;
  checkCount(cursor, { what: `elements of ${what}`, count, limit: limits.maxArrayCount, eachBytes });
  const offsetBytes = cursor.position();
  if (type.name === "str") {
    left.stringCount -= count;
    if (left.stringCount < 0) {
      throw corrupt(
        cursor.name,
        `${what} brings its strings to more than ${limits.maxStringCount}, the limit`,
      );
    }
    cursor.skipStrings(count, what);
  } else {
    cursor.skip(count * type.sizeBytes, what);
  }
  const sizeBytes = cursor.position() - offsetBytes;
  const eager = count <= eagerArrayCount && sizeBytes <= eagerArrayBytes && count <= left.eagerCount;
  const array = { elementType: type.name, count, fileIndex: context.fileIndex, offsetBytes, sizeBytes };
  if (!eager) return { ...array, values: null };
  left.eagerCount -= count;
  return { ...array, values: readArray({ ...array, values: null }, context.file) };
}

/** The values of an array of the metadata, read again from the file it came from. */
export function readArray(array: GgufArray, file: NamedSource): readonly GgufScalar[] {
  if (array.values !== null) return array.values;
  const cursor = openCursor(file, array.offsetBytes, array.sizeBytes);
  return readElements(
    cursor,
    { type: array.elementType, count: array.count, what: "an array" },
    array.sizeBytes,
  );
}

/** A string value; one too long to be wanted stays where it lies. */
function readText(cursor: Cursor, what: string, context: HeaderContext): GgufValue {
  const { limits, left, fileIndex } = context;
  const offsetBytes = cursor.position();
  const lengthBytes = cursor.u64(`the length of ${what}`);
  if (lengthBytes > limits.maxStringBytes) {
    throw corrupt(
      cursor.name,
      `${what} at byte ${offsetBytes} claims ${lengthBytes} bytes, the limit is ${limits.maxStringBytes}`,
    );
  }
  if (lengthBytes > Math.min(eagerTextBytes, left.textBytes)) {
    cursor.skip(lengthBytes, what);
    return { elementType: "str", count: 1, fileIndex, offsetBytes, sizeBytes: 8 + lengthBytes, values: null };
  }
  left.textBytes -= lengthBytes;
  return lenientUtf8.decode(cursor.bytes(lengthBytes, what));
}

function readMetadata(cursor: Cursor, keyCount: number, context: HeaderContext): Map<string, GgufValue> {
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < keyCount; i++) {
    const key = readName(cursor, `metadata key ${i}`, context.limits.maxKeyBytes);
    if (metadata.has(key)) throw corrupt(cursor.name, `the metadata key ${quote(key)} occurs twice`);
    const typeId = cursor.u32(`the type of ${quote(key)}`);
    if (typeId === arrayTypeId) {
      metadata.set(key, readArrayValue(cursor, key, context));
      continue;
    }
    const type = valueTypes.get(typeId);
    if (type === undefined) {
      throw corrupt(cursor.name, `the metadata key ${quote(key)} has the unknown type ${typeId}`);
    }
    const what = `the value of ${quote(key)}`;
    metadata.set(
      key,
      type.name === "str" ? readText(cursor, what, context) : cursor.scalar(type.name, what, 0),
    );
  }
  return metadata;
}

function readAlignment(name: string, metadata: ReadonlyMap<string, GgufValue>): number {
  const value = metadata.get("general.alignment");
  if (value === undefined) return defaultAlignment;
  if (
    typeof value !== "number" ||
    !Number.isInteger(value) ||
    value <= 0 ||
    !Number.isInteger(Math.log2(value))
  ) {
    const shown = typeof value === "object" ? "an array" : String(value);
    throw corrupt(name, `general.alignment is ${shown} and must be a power of two`);
  }
  return value;
}

/** A tensor as the directory states it; its offset counts from the start of the data section. */
type DirectoryEntry = Omit<GgufTensor, "fileIndex">;

function readShape(cursor: Cursor, tensor: string): number[] {
  const dimensionCount = cursor.u32(`the dimension count of tensor ${quote(tensor)}`);
  if (dimensionCount > maxDimensions) {
    throw corrupt(
      cursor.name,
      `tensor ${quote(tensor)} has ${dimensionCount} dimensions, at most ${maxDimensions} are possible`,
    );
  }
  const shape: number[] = [];
  let elements = 1;
  for (let i = 0; i < dimensionCount; i++) {
    const size = cursor.u64(`dimension ${i} of tensor ${quote(tensor)}`);
    if (size === 0) throw corrupt(cursor.name, `dimension ${i} of tensor ${quote(tensor)} is 0`);
    elements *= size;
    if (!Number.isSafeInteger(elements)) {
      throw corrupt(
        cursor.name,
        `tensor ${quote(tensor)} has more elements than can be counted (shape ${[...shape, size].join(" x ")})`,
      );
    }
    shape.push(size);
  }
  // ggml pads shapes with ones, so a tensor without dimensions is one element.
  return shape.length === 0 ? [1] : shape;
}

function readDirectoryEntry(cursor: Cursor, index: number): DirectoryEntry {
  const name = readName(cursor, `the name of tensor ${index}`, maxTensorNameBytes);
  const shape = readShape(cursor, name);
  const typeId = cursor.u32(`the type of tensor ${quote(name)}`);
  const type = tensorTypes.get(typeId);
  if (type === undefined) {
    const removed = removedTypes.get(typeId);
    throw new HypuraError(
      "unsupported-model",
      removed === undefined
        ? `tensor ${quote(name)} in ${quote(cursor.name)} has the ggml type ${typeId}, which llama.cpp v0.5.0 does not know: update hypura or check the file`
        : `tensor ${quote(name)} in ${quote(cursor.name)} has the type ${removed}, which llama.cpp no longer reads: get a file with another quantisation`,
    );
  }
  const rowElements = shape[0] ?? 1;
  if (rowElements % type.blockElements !== 0) {
    throw corrupt(
      cursor.name,
      `tensor ${quote(name)} has rows of ${rowElements} elements, not a multiple of the ${type.blockElements} in a block of ${type.name}`,
    );
  }
  const elements = shape.reduce((product, size) => product * size, 1);
  const sizeBytes = (elements / type.blockElements) * type.blockBytes;
  if (!Number.isSafeInteger(sizeBytes))
    throw corrupt(cursor.name, `tensor ${quote(name)} claims ${sizeBytes} bytes`);
  const offsetBytes = cursor.u64(`the offset of tensor ${quote(name)}`);
  return { name, shape, type: typeId, typeName: type.name, offsetBytes, sizeBytes };
}

/**
 * Places the directory in the file. gguf.cpp demands that tensors follow each other in directory order, each
 * padded to the alignment, and refuses any other file; so overlaps and gaps are refused here too, by name.
 */
function placeTensors(
  entries: readonly DirectoryEntry[],
  place: { name: string; fileIndex: number; sizeBytes: number; dataOffsetBytes: number; alignment: number },
): GgufTensor[] {
  const tensors: GgufTensor[] = [];
  let expected = 0;
  let previous = "";
  for (const entry of entries) {
    if (entry.offsetBytes % place.alignment !== 0) {
      throw corrupt(
        place.name,
        `tensor ${quote(entry.name)} lies at data offset ${entry.offsetBytes}, not a multiple of the alignment ${place.alignment}`,
      );
    }
    if (entry.offsetBytes !== expected) {
      const how =
        entry.offsetBytes < expected
          ? `overlaps ${previous === "" ? "another tensor" : `tensor ${quote(previous)}`}`
          : `leaves a gap of ${entry.offsetBytes - expected} bytes`;
      throw corrupt(
        place.name,
        `tensor ${quote(entry.name)} at data offset ${entry.offsetBytes} ${how} (expected at ${expected})`,
      );
    }
    tensors.push({
      ...entry,
      fileIndex: place.fileIndex,
      offsetBytes: place.dataOffsetBytes + entry.offsetBytes,
    });
    expected = roundUp(expected + entry.sizeBytes, place.alignment);
    if (!Number.isSafeInteger(expected))
      throw corrupt(place.name, `its tensors together claim ${expected} bytes`);
    previous = entry.name;
  }
  checkEnd(tensors, place);
  return tensors;
}

function checkEnd(tensors: readonly GgufTensor[], place: { name: string; sizeBytes: number }): void {
  const last = tensors.at(-1);
  if (last === undefined) return;
  const endBytes = last.offsetBytes + last.sizeBytes;
  if (endBytes <= place.sizeBytes) return;
  const first = tensors.find((tensor) => tensor.offsetBytes + tensor.sizeBytes > place.sizeBytes) ?? last;
  throw new HypuraError(
    "corrupt-model",
    `${quote(place.name)} is cut short: it needs ${endBytes} bytes and has ${place.sizeBytes}, so ` +
      `${endBytes - place.sizeBytes} bytes are missing, from tensor ${quote(first.name)} on; download it again`,
  );
}

function parseFile(file: NamedSource, fileIndex: number, limits: GgufLimits): ParsedFile {
  const cursor = openCursor(file, 0, limits.maxHeaderBytes);
  const { version, tensorCount, keyCount } = readPreamble(cursor, file);
  // A key needs its length, a character, a type and a byte; a tensor its length, a character, the dimension
  // count, a type and an offset.
  checkCount(cursor, {
    what: "metadata keys",
    count: keyCount,
    limit: limits.maxMetadataCount,
    eachBytes: 14,
  });
  checkCount(cursor, { what: "tensors", count: tensorCount, limit: limits.maxTensorCount, eachBytes: 25 });
  const left = {
    eagerCount: eagerTotalCount,
    stringCount: limits.maxStringCount,
    textBytes: eagerTotalTextBytes,
  };
  const metadata = readMetadata(cursor, keyCount, { file, fileIndex, limits, left });
  const alignment = readAlignment(file.name, metadata);
  const entries: DirectoryEntry[] = [];
  for (let i = 0; i < tensorCount; i++) entries.push(readDirectoryEntry(cursor, i));
  const dataOffsetBytes = tensorCount === 0 ? cursor.position() : roundUp(cursor.position(), alignment);
  const place = { name: file.name, fileIndex, sizeBytes: file.source.sizeBytes, dataOffsetBytes, alignment };
  return { version, alignment, metadata, tensors: placeTensors(entries, place), dataOffsetBytes };
}

/** The files of a split set by the name of any of them (`-00001-of-00003.gguf`); null for a name that is none. */
export function splitNames(
  fileName: string,
): { readonly index: number; readonly count: number; readonly names: readonly string[] } | null {
  const match = /^(.*)-(\d{5})-of-(\d{5})\.gguf$/.exec(fileName);
  if (match === null) return null;
  const prefix = match[1] ?? "";
  const number = Number(match[2]);
  const count = Number(match[3]);
  if (number < 1 || number > count || count > defaultLimits.maxFileCount) return null;
  const pad = (value: number): string => String(value).padStart(5, "0");
  const names = Array.from({ length: count }, (_, i) => `${prefix}-${pad(i + 1)}-of-${pad(count)}.gguf`);
  return { index: number - 1, count, names };
}

/** The whole number of a split key, or null where the file does not carry it. */
function splitNumber(name: string, metadata: ReadonlyMap<string, GgufValue>, key: string): number | null {
  const value = metadata.get(key);
  if (value === undefined) return null;
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0) {
    throw corrupt(name, `${key} is no whole number`);
  }
  return value;
}

function checkSplitCount(count: number, sources: readonly NamedSource[]): void {
  const first = sources[0]?.name ?? "";
  if (count === sources.length) return;
  if (sources.length > count) {
    throw corrupt(first, `it is a model of ${count} file(s), but ${sources.length} were given`);
  }
  const given = new Set(sources.map((file) => baseName(file.name)));
  const wanted = splitNames(baseName(first))?.names ?? [];
  const missing = wanted.filter((name) => !given.has(name));
  const named =
    missing.length === 0 ? `${count - sources.length} of them` : missing.slice(0, 3).map(quote).join(", ");
  const more = missing.length > 3 ? ` and ${missing.length - 3} more` : "";
  throw new HypuraError(
    "not-found",
    `${quote(first)} is one of ${count} files of a split model, and ${named}${more} is missing: put all files in one folder`,
  );
}

function baseName(path: string): string {
  return path.slice(Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1);
}

/** Order, count and tensors of a split set, as llama-model-loader.cpp checks them. */
function checkSplit(parsed: readonly ParsedFile[], sources: readonly NamedSource[]): void {
  const names = sources.map((file) => file.name);
  const firstName = names[0] ?? "";
  const count = splitNumber(firstName, parsed[0]?.metadata ?? new Map(), "split.count") ?? 0;
  if (count <= 1 && sources.length === 1) return;
  parsed.forEach((file, index) => {
    const name = names[index] ?? "";
    const number = splitNumber(name, file.metadata, "split.no");
    if (number !== index) {
      const said =
        number === null ? "is not part of a split model" : `says it is file ${number + 1} of its split model`;
      throw corrupt(name, `it ${said}, where file ${index + 1} is expected`);
    }
    const itsCount = splitNumber(name, file.metadata, "split.count");
    if (itsCount !== null && itsCount !== count) {
      throw corrupt(
        name,
        `it belongs to a model of ${itsCount} files, ${quote(firstName)} to one of ${count}`,
      );
    }
  });
  const stated = splitNumber(firstName, parsed[0]?.metadata ?? new Map(), "split.tensors.count");
  const found = parsed.reduce((sum, file) => sum + file.tensors.length, 0);
  if (stated === null || stated !== found) {
    throw corrupt(
      firstName,
      `split.tensors.count is ${stated ?? "missing"}, but the files hold ${found} tensors`,
    );
  }
}

function checkDuplicates(tensors: readonly GgufTensor[], names: readonly string[]): void {
  const seen = new Map<string, GgufTensor>();
  for (const tensor of tensors) {
    const other = seen.get(tensor.name);
    if (other !== undefined) {
      const where =
        other.fileIndex === tensor.fileIndex ? "" : ` (also in ${quote(names[other.fileIndex] ?? "")})`;
      throw corrupt(names[tensor.fileIndex] ?? "", `the tensor ${quote(tensor.name)} occurs twice${where}`);
    }
    seen.set(tensor.name, tensor);
  }
}

/** Parses the files of one model, in order; one file, or all files of a split set. */
export function parseGguf(sources: readonly NamedSource[], limits: GgufLimits = defaultLimits): Gguf {
  const first = sources[0];
  if (first === undefined) throw new HypuraError("internal", "parseGguf was called without a file");
  const head = parseFile(first, 0, limits);
  const splitCount = splitNumber(first.name, head.metadata, "split.count") ?? 1;
  checkSplitCount(Math.max(1, splitCount), sources);
  const parsed = [head, ...sources.slice(1).map((file, index) => parseFile(file, index + 1, limits))];
  checkSplit(parsed, sources);
  const tensors = parsed.flatMap((file) => file.tensors);
  checkDuplicates(
    tensors,
    sources.map((file) => file.name),
  );
  return {
    version: head.version,
    alignment: head.alignment,
    metadata: head.metadata,
    tensors,
    files: parsed.map((file, index) => ({
      name: sources[index]?.name ?? "",
      sizeBytes: sources[index]?.source.sizeBytes ?? 0,
      dataOffsetBytes: file.dataOffsetBytes,
    })),
  };
}

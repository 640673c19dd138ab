// The reader of GGUF files: what it finds in sound ones, and a table of named corruptions that it must refuse, each
// with the code and the words that tell a person what is wrong.

import { describe, expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import {
  type ByteSource,
  defaultLimits,
  type Gguf,
  type GgufArray,
  parseGguf,
  readArray,
  splitNames,
  tensorTypes,
} from "../../src/gguf";
import {
  byteList,
  type GgufSpec,
  ggufBytes,
  headerBytes,
  type Metadata,
  type TensorSpec,
} from "../fixtures/gguf-writer";
import { randomWeights } from "../fixtures/weights";

function sourceOf(bytes: Uint8Array): ByteSource {
  return { sizeBytes: bytes.length, read: (offset, length) => bytes.subarray(offset, offset + length) };
}

function parse(...files: Uint8Array[]): Gguf {
  const pad = (index: number): string => String(index + 1).padStart(5, "0");
  const name = (index: number): string =>
    files.length === 1 ? "m.gguf" : `m-${pad(index)}-of-${pad(files.length - 1)}.gguf`;
  return parseGguf(files.map((bytes, index) => ({ name: name(index), source: sourceOf(bytes) })));
}

function u32Key(key: string, value: number): Metadata {
  return { key, value: { type: "u32", value } };
}

function tensor(name: string, shape: readonly number[], typeName: string): TensorSpec {
  const elements = shape.reduce((product, size) => product * size, 1);
  return {
    name,
    shape,
    typeName,
    pieces: () => randomWeights({ typeName, elements, deviation: 1, seed: 1 }),
  };
}

/** Milliseconds of the fastest of up to three runs: one run may lose its core to another process. */
function fastest(run: () => void): number {
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0; i < 3 && best > 20; i++) {
    const started = performance.now();
    run();
    best = Math.min(best, performance.now() - started);
  }
  return best;
}

const sound: GgufSpec = {
  metadata: [
    { key: "general.architecture", value: { type: "str", value: "llama" } },
    u32Key("a.u32", 7),
    { key: "a.i8", value: { type: "i8", value: -3 } },
    { key: "a.u64", value: { type: "u64", value: 12_345_678_901n } },
    { key: "a.big", value: { type: "u64", value: 18_446_744_073_709_551_615n } },
    { key: "a.i64", value: { type: "i64", value: -5n } },
    { key: "a.f32", value: { type: "f32", value: 0.5 } },
    { key: "a.f64", value: { type: "f64", value: 0.1 } },
    { key: "a.bool", value: { type: "bool", value: true } },
    { key: "a.text", value: { type: "str", value: "Zoë 日本" } },
    { key: "a.heads", value: { type: "array", of: "i32", values: [4, -1, 8] } },
    { key: "a.words", value: { type: "array", of: "str", values: ["one", "", "three"] } },
  ],
  tensors: [
    tensor("first.weight", [32, 3], "q4_0"),
    tensor("second.weight", [5], "f32"),
    tensor("third.weight", [32, 2, 2], "q8_0"),
  ],
};

describe("a sound file", () => {
  const gguf = parse(ggufBytes(sound));

  test("gives its metadata with exact values", () => {
    const { metadata } = gguf;
    expect(metadata.get("a.u32")).toBe(7);
    expect(metadata.get("a.i8")).toBe(-3);
    expect(metadata.get("a.u64")).toBe(12_345_678_901);
    expect(metadata.get("a.big")).toBe(18_446_744_073_709_551_615n);
    expect(metadata.get("a.i64")).toBe(-5);
    expect(metadata.get("a.f32")).toBe(0.5);
    expect(metadata.get("a.f64")).toBe(0.1);
    expect(metadata.get("a.bool")).toBe(true);
    expect(metadata.get("a.text")).toBe("Zoë 日本");
    expect((metadata.get("a.heads") as GgufArray).values).toEqual([4, -1, 8]);
    expect((metadata.get("a.words") as GgufArray).values).toEqual(["one", "", "three"]);
  });

  test("gives its tensors with their places", () => {
    const start = gguf.files[0]?.dataOffsetBytes ?? 0;
    expect(start).toBe(headerBytes(sound).length);
    expect(gguf.tensors).toEqual([
      {
        name: "first.weight",
        shape: [32, 3],
        type: 2,
        typeName: "q4_0",
        fileIndex: 0,
        offsetBytes: start,
        sizeBytes: 54,
      },
      {
        name: "second.weight",
        shape: [5],
        type: 0,
        typeName: "f32",
        fileIndex: 0,
        offsetBytes: start + 64,
        sizeBytes: 20,
      },
      {
        name: "third.weight",
        shape: [32, 2, 2],
        type: 8,
        typeName: "q8_0",
        fileIndex: 0,
        offsetBytes: start + 96,
        sizeBytes: 136,
      },
    ]);
    expect(gguf.version).toBe(3);
    expect(gguf.alignment).toBe(32);
  });

  test("may be version 2, and may have another alignment", () => {
    expect(parse(ggufBytes({ ...sound, version: 2 })).version).toBe(2);
    for (const alignment of [8, 64, 4096]) {
      const other = parse(ggufBytes({ ...sound, alignment }));
      expect(other.alignment).toBe(alignment);
      for (const one of other.tensors) expect(one.offsetBytes % alignment).toBe(0);
    }
  });

  test("keeps a long array where it lies, and fetches it when asked", () => {
    const values = Array.from({ length: 150_000 }, (_, i) => `token ${i}`);
    const bytes = ggufBytes({
      metadata: [{ key: "t", value: { type: "array", of: "str", values } }],
      tensors: [],
    });
    const array = parse(bytes).metadata.get("t") as GgufArray;
    expect(array.values).toBeNull();
    expect(array.count).toBe(150_000);
    expect(readArray(array, { name: "m.gguf", source: sourceOf(bytes) })).toEqual(values);
  });

  test("keeps a long text where it lies, too", () => {
    const value = "ä".repeat(600_000);
    const bytes = ggufBytes({ metadata: [{ key: "t", value: { type: "str", value } }], tensors: [] });
    const text = parse(bytes).metadata.get("t") as GgufArray;
    expect(text).toMatchObject({ elementType: "str", count: 1, values: null });
    expect(readArray(text, { name: "m.gguf", source: sourceOf(bytes) })).toEqual([value]);
  });

  test("may lack the padding after its last tensor, as llama.cpp allows", () => {
    const bytes = ggufBytes(sound);
    const last = parse(bytes).tensors.at(-1);
    expect(last).toBeDefined();
    const end = (last?.offsetBytes ?? 0) + (last?.sizeBytes ?? 0);
    expect(parse(bytes.subarray(0, end)).tensors).toHaveLength(3);
    expect(() => parse(bytes.subarray(0, end - 1))).toThrow(HypuraError);
  });

  test("of 400 GB costs its header only", () => {
    const tensors = Array.from({ length: 1200 }, (_, i) => ({
      ...tensor(`blk.${i}.ffn_up_exps.weight`, [8192, 4096, 18], "q4_0"),
      pieces: () => [],
    }));
    const header = headerBytes({ metadata: sound.metadata, tensors });
    const sizeBytes = 430_000_000_000;
    let readBytes = 0;
    const source: ByteSource = {
      sizeBytes,
      read(offset, length) {
        readBytes += length;
        const out = new Uint8Array(length);
        out.set(header.subarray(offset, offset + length));
        return out;
      },
    };
    const gguf400 = parseGguf([{ name: "big.gguf", source }]);
    expect(gguf400.tensors.at(-1)?.offsetBytes).toBeGreaterThan(400_000_000_000);
    expect(readBytes).toBeLessThan(header.length + 200_000);
    expect(fastest(() => parseGguf([{ name: "big.gguf", source }]))).toBeLessThan(200);
  });
});

test("the table of tensor types has every type once, with whole blocks", () => {
  expect(tensorTypes.size).toBe(35);
  for (const type of tensorTypes.values()) {
    expect(Number.isInteger(type.blockBytes) && type.blockBytes > 0).toBe(true);
    expect([1, 32, 64, 128, 256]).toContain(type.blockElements);
  }
  // Bits per weight as published, as a check that is independent of the source the table was written from.
  const bits = (name: string): number => {
    const type = [...tensorTypes.values()].find((one) => one.name === name);
    return type === undefined ? 0 : (type.blockBytes * 8) / type.blockElements;
  };
  expect(
    ["q4_0", "q8_0", "q4_K", "q5_K", "q6_K", "q2_K", "q3_K", "iq2_xxs", "iq4_xs", "mxfp4", "tq1_0"].map(bits),
  ).toEqual([4.5, 8.5, 4.5, 5.5, 6.5625, 2.625, 3.4375, 2.0625, 4.25, 4.25, 1.6875]);
});

// ---- corruptions ----------------------------------------------------------------------------------------------

/** Builds a file field by field, so that any field can lie. */
interface Fields {
  magic?: string;
  version?: number;
  tensorCount?: bigint;
  keyCount?: bigint;
  keys?: (list: ReturnType<typeof byteList>) => void;
  tensors?: (list: ReturnType<typeof byteList>) => void;
  dataBytes?: number;
}

function handmade(fields: Fields): Uint8Array {
  const list = byteList();
  list.raw(new TextEncoder().encode(fields.magic ?? "GGUF"));
  list
    .u32(fields.version ?? 3)
    .u64(fields.tensorCount ?? 0n)
    .u64(fields.keyCount ?? 0n);
  fields.keys?.(list);
  fields.tensors?.(list);
  list.raw(new Uint8Array((32 - (list.sizeBytes() % 32)) % 32)).raw(new Uint8Array(fields.dataBytes ?? 256));
  return list.take();
}

function oneTensor(change: {
  name?: string;
  dims?: readonly bigint[];
  dimCount?: number;
  type?: number;
  offset?: bigint;
}): Uint8Array {
  const dims = change.dims ?? [32n];
  return handmade({
    tensorCount: 1n,
    tensors(list) {
      list.text(change.name ?? "t.weight").u32(change.dimCount ?? dims.length);
      for (const dim of dims) list.u64(dim);
      list.u32(change.type ?? 0).u64(change.offset ?? 0n);
    },
  });
}

function twoTensors(second: { name?: string; offset: bigint }): Uint8Array {
  return handmade({
    tensorCount: 2n,
    tensors(list) {
      list.text("a.weight").u32(1).u64(32n).u32(0).u64(0n);
      list
        .text(second.name ?? "b.weight")
        .u32(1)
        .u64(32n)
        .u32(0)
        .u64(second.offset);
    },
  });
}

function oneKey(write: (list: ReturnType<typeof byteList>) => void): Uint8Array {
  return handmade({ keyCount: 1n, keys: write });
}

const text = (words: string): Uint8Array => new TextEncoder().encode(words);

/** Name of the corruption, the file, the code, and what the sentence must say. */
const corruptions: readonly (readonly [string, () => Uint8Array, string, RegExp])[] = [
  ["empty file", () => new Uint8Array(0), "not-a-model", /is empty \(0 bytes\)/],
  ["text file", () => text("Dear reader, this is no model."), "not-a-model", /starts with "Dear"/],
  ["web page", () => text("<!DOCTYPE html><html>"), "not-a-model", /web page/],
  [
    "git-lfs pointer",
    () => text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
    "not-a-model",
    /git lfs pull/,
  ],
  ["zip archive", () => text("PK\u0003\u0004 and so on"), "not-a-model", /zip archive/],
  ["file from before GGUF", () => text("tjgg and so on"), "not-a-model", /before GGUF/],
  ["safetensors", () => Uint8Array.from([80, 1, 0, 0, 0, 0, 0, 0, 0x7b, 34]), "not-a-model", /safetensors/],
  ["magic only", () => text("GGUF"), "corrupt-model", /the version at byte 4 needs 4 bytes/],
  ["magic cut", () => text("GG"), "not-a-model", /starts with "GG"/],
  ["version 0", () => handmade({ version: 0 }), "unsupported-model", /version 0/],
  [
    "version 1",
    () => handmade({ version: 1 }),
    "unsupported-model",
    /version 1, which llama.cpp no longer reads/,
  ],
  ["version 4", () => handmade({ version: 4 }), "unsupported-model", /version 4/],
  ["big-endian", () => handmade({ version: 0x03000000 }), "unsupported-model", /big-endian/],
  [
    "tensor count beyond the file",
    () => handmade({ tensorCount: 1000n }),
    "corrupt-model",
    /1000 tensors at byte 24, which do not fit/,
  ],
  [
    "tensor count beyond the limit",
    () => handmade({ tensorCount: 0xffff_ffffn }),
    "corrupt-model",
    /4294967295 tensors, the limit/,
  ],
  [
    "tensor count of 64 bits",
    () => handmade({ tensorCount: 0xffff_ffff_ffff_ffffn }),
    "corrupt-model",
    /18446744073709551615/,
  ],
  [
    "key count beyond the file",
    () => handmade({ keyCount: 5000n }),
    "corrupt-model",
    /5000 metadata keys at byte 24/,
  ],
  ["key count of 64 bits", () => handmade({ keyCount: 1n << 63n }), "corrupt-model", /9223372036854775808/],
  [
    "key length beyond the file",
    () => oneKey((list) => list.u64(60_000n)),
    "corrupt-model",
    /metadata key 0/,
  ],
  [
    "key length beyond the limit",
    () => oneKey((list) => list.u64(1n << 40n)),
    "corrupt-model",
    /claims 1099511627776 bytes, the limit is 65535/,
  ],
  [
    "empty key",
    () => oneKey((list) => list.text("").u32(4).u32(1)),
    "corrupt-model",
    /metadata key 0 at byte 24 is empty/,
  ],
  [
    "key that is not UTF-8",
    () =>
      oneKey((list) =>
        list
          .u64(2)
          .raw(Uint8Array.from([0xc3, 0x28]))
          .u32(4)
          .u32(1),
      ),
    "corrupt-model",
    /not UTF-8/,
  ],
  [
    "key with a line break",
    () => oneKey((list) => list.text("a\nb").u32(4).u32(1)),
    "corrupt-model",
    /control character 10/,
  ],
  [
    "key twice",
    () => ggufBytes({ metadata: [u32Key("a", 1), u32Key("a", 2)], tensors: [] }),
    "corrupt-model",
    /"a" occurs twice/,
  ],
  [
    "unknown value type",
    () => oneKey((list) => list.text("k").u32(99).u64(0)),
    "corrupt-model",
    /unknown type 99/,
  ],
  [
    "string longer than the file",
    () => oneKey((list) => list.text("k").u32(8).u64(1_000_000n)),
    "corrupt-model",
    /value of "k"/,
  ],
  [
    "string longer than the limit",
    () =>
      oneKey((list) =>
        list
          .text("k")
          .u32(8)
          .u64(1n << 50n),
      ),
    "corrupt-model",
    /the limit is 1073741824/,
  ],
  [
    "array of arrays",
    () => oneKey((list) => list.text("k").u32(9).u32(9).u64(1n)),
    "corrupt-model",
    /holds arrays/,
  ],
  [
    "array of an unknown type",
    () => oneKey((list) => list.text("k").u32(9).u32(13).u64(1n)),
    "corrupt-model",
    /unknown element type 13/,
  ],
  [
    "array longer than the file",
    () => oneKey((list) => list.text("k").u32(9).u32(4).u64(1_000_000n)),
    "corrupt-model",
    /1000000 elements/,
  ],
  [
    "array length that overflows",
    () =>
      oneKey((list) =>
        list
          .text("k")
          .u32(9)
          .u32(10)
          .u64(1n << 61n),
      ),
    "corrupt-model",
    /2305843009213693952/,
  ],
  [
    "string array beyond the file",
    () => oneKey((list) => list.text("k").u32(9).u32(8).u64(1_000_000n)),
    "corrupt-model",
    /1000000 elements/,
  ],
  [
    "string in an array beyond the file",
    () => oneKey((list) => list.text("k").u32(9).u32(8).u64(1n).u64(5000n)),
    "corrupt-model",
    /the array "k"/,
  ],
  [
    "alignment of 0",
    () => ggufBytes({ metadata: [u32Key("general.alignment", 0)], tensors: [] }),
    "corrupt-model",
    /power of two/,
  ],
  [
    "alignment of 48",
    () => ggufBytes({ metadata: [u32Key("general.alignment", 48)], tensors: [] }),
    "corrupt-model",
    /is 48 and must be/,
  ],
  [
    "alignment as text",
    () =>
      ggufBytes({
        metadata: [{ key: "general.alignment", value: { type: "str", value: "32" } }],
        tensors: [],
      }),
    "corrupt-model",
    /power of two/,
  ],
  [
    "tensor name of 64 bytes",
    () => oneTensor({ name: "x".repeat(64) }),
    "corrupt-model",
    /claims 64 bytes, the limit is 63/,
  ],
  [
    "tensor without a name",
    () => oneTensor({ name: "" }),
    "corrupt-model",
    /name of tensor 0 at byte 24 is empty/,
  ],
  [
    "tensor name with a zero byte",
    () => oneTensor({ name: "a\u0000b" }),
    "corrupt-model",
    /control character 0/,
  ],
  [
    "tensor twice",
    () => twoTensors({ name: "a.weight", offset: 128n }),
    "corrupt-model",
    /"a.weight" occurs twice/,
  ],
  ["five dimensions", () => oneTensor({ dims: [1n, 1n, 1n, 1n, 1n] }), "corrupt-model", /5 dimensions/],
  [
    "dimension count of 2^32-1",
    () => oneTensor({ dimCount: 0xffff_ffff }),
    "corrupt-model",
    /4294967295 dimensions/,
  ],
  [
    "dimension of 0",
    () => oneTensor({ dims: [0n] }),
    "corrupt-model",
    /dimension 0 of tensor "t.weight" is 0/,
  ],
  [
    "dimension of -1",
    () => oneTensor({ dims: [0xffff_ffff_ffff_ffffn] }),
    "corrupt-model",
    /18446744073709551615/,
  ],
  [
    "elements that overflow",
    () => oneTensor({ dims: [1n << 30n, 1n << 30n] }),
    "corrupt-model",
    /more elements than can be counted/,
  ],
  ["unknown tensor type", () => oneTensor({ type: 77 }), "unsupported-model", /"t.weight" .* ggml type 77/],
  [
    "removed tensor type",
    () => oneTensor({ type: 31 }),
    "unsupported-model",
    /q4_0_4_4, which llama.cpp no longer reads/,
  ],
  [
    "rows that do not divide",
    () => oneTensor({ dims: [33n], type: 2 }),
    "corrupt-model",
    /rows of 33 elements, not a multiple of the 32/,
  ],
  [
    "offset that is not aligned",
    () => oneTensor({ offset: 16n }),
    "corrupt-model",
    /data offset 16, not a multiple of the alignment 32/,
  ],
  [
    "offset beyond the file",
    () => oneTensor({ offset: 1n << 40n }),
    "corrupt-model",
    /leaves a gap of 1099511627776 bytes/,
  ],
  ["offset of 64 bits", () => oneTensor({ offset: 1n << 62n }), "corrupt-model", /4611686018427387904/],
  [
    "tensor over tensor",
    () => twoTensors({ offset: 64n }),
    "corrupt-model",
    /"b.weight" at data offset 64 overlaps tensor "a.weight"/,
  ],
  ["tensor in the place of another", () => twoTensors({ offset: 0n }), "corrupt-model", /overlaps/],
  ["gap between tensors", () => twoTensors({ offset: 160n }), "corrupt-model", /leaves a gap of 32 bytes/],
  [
    "data cut off",
    () => ggufBytes(sound).subarray(0, headerBytes(sound).length + 100),
    "corrupt-model",
    /132 bytes are missing, from tensor "third.weight" on/,
  ],
  [
    "data missing altogether",
    () => headerBytes(sound),
    "corrupt-model",
    /232 bytes are missing, from tensor "first.weight"/,
  ],
  [
    "header cut in the directory",
    () => headerBytes(sound).subarray(0, headerBytes(sound).length - 60),
    "corrupt-model",
    /cut short or damaged/,
  ],
];

describe("a damaged file is refused:", () => {
  test.each(corruptions.map((row) => [...row] as const))("%s", (_, make, code, sentence) => {
    let caught: unknown;
    const bytes = make();
    const milliseconds = fastest(() => {
      try {
        parse(bytes);
      } catch (error) {
        caught = error;
      }
    });
    expect(milliseconds).toBeLessThan(50);
    expect(caught).toBeInstanceOf(HypuraError);
    const error = caught as HypuraError;
    expect(error.message).toMatch(sentence);
    expect(error.code as string).toBe(code);
    expect(error.message).toContain('"m.gguf"');
    expect(error.message).not.toContain("\n");
  });

  test("the table has at least fifty names, all different", () => {
    expect(new Set(corruptions.map((row) => row[0])).size).toBe(corruptions.length);
    expect(corruptions.length).toBeGreaterThanOrEqual(50);
  });

  test("cut at every byte of its header", () => {
    const header = headerBytes(sound);
    for (let length = 0; length < header.length; length++)
      expect(() => parse(header.subarray(0, length))).toThrow(HypuraError);
  });
});

test("limits hold for files that could back their claims", () => {
  const strings: Metadata = { key: "t", value: { type: "array", of: "str", values: ["a", "b", "c", "d"] } };
  const bytes = ggufBytes({ metadata: [strings], tensors: [] });
  const file = { name: "m.gguf", source: sourceOf(bytes) };
  expect(() => parseGguf([file], { ...defaultLimits, maxStringCount: 3 })).toThrow(/more than 3/);
  expect(() => parseGguf([file], { ...defaultLimits, maxArrayCount: 3 })).toThrow(/limit is 3/);
  expect(() => parseGguf([file], { ...defaultLimits, maxHeaderBytes: 40 })).toThrow(HypuraError);
  expect(parseGguf([file]).metadata.size).toBe(1);
});

test("a claim that a large file could hold fails fast too", () => {
  // 400 GB of zeros behind a header: every count fits the file, so only the limits and the zeros can stop it.
  const header = handmade({ tensorCount: 262_144n, keyCount: 65_536n });
  const source: ByteSource = {
    sizeBytes: 400_000_000_000,
    read(offset, length) {
      const out = new Uint8Array(length);
      out.set(header.subarray(offset, offset + length));
      return out;
    },
  };
  expect(
    fastest(() => expect(() => parseGguf([{ name: "m.gguf", source }])).toThrow(HypuraError)),
  ).toBeLessThan(50);
});

test("a file that shrinks while it is read is an error of the system, not of the file", () => {
  const bytes = ggufBytes(sound);
  const source: ByteSource = {
    sizeBytes: bytes.length,
    read: (offset, length) => bytes.subarray(offset, Math.min(100, offset + length)),
  };
  expect(() => parseGguf([{ name: "m.gguf", source }])).toThrow(/it changed while it was read/);
});

// ---- split sets -----------------------------------------------------------------------------------------------

describe("split names", () => {
  test("of a set", () => {
    expect(splitNames("m-00002-of-00003.gguf")).toEqual({
      index: 1,
      count: 3,
      names: ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"],
    });
  });

  test.each([
    "m.gguf",
    "m-00000-of-00003.gguf",
    "m-00004-of-00003.gguf",
    "m-1-of-3.gguf",
    "m-00001-of-00003.bin",
    "m-99999-of-99999.gguf",
  ])("%s is none", (name) => {
    expect(splitNames(name)).toBeNull();
  });
});

describe("a split set", () => {
  const part = (
    index: number,
    tensors: readonly TensorSpec[],
    change: { no?: number; count?: number; total?: number } = {},
  ): Uint8Array =>
    ggufBytes({
      metadata: [
        ...(index === 0 ? sound.metadata : []),
        { key: "split.no", value: { type: "u16", value: change.no ?? index } },
        { key: "split.count", value: { type: "u16", value: change.count ?? 3 } },
        { key: "split.tensors.count", value: { type: "i32", value: change.total ?? 3 } },
      ],
      tensors,
    });
  const [first, second, third] = sound.tensors;
  if (first === undefined || second === undefined || third === undefined)
    throw new Error("the sound file has three tensors");
  const named = (files: readonly Uint8Array[]) =>
    files.map((bytes, index) => ({ name: `dir/m-0000${index + 1}-of-00003.gguf`, source: sourceOf(bytes) }));
  const all = [part(0, [first]), part(1, [second]), part(2, [third])];

  test("is one model: the first file's metadata, the tensors of all", () => {
    const gguf = parseGguf(named(all));
    expect(gguf.tensors.map((one) => [one.name, one.fileIndex])).toEqual([
      ["first.weight", 0],
      ["second.weight", 1],
      ["third.weight", 2],
    ]);
    expect(gguf.files).toHaveLength(3);
    expect(gguf.metadata.get("a.u32")).toBe(7);
    for (const one of gguf.tensors)
      expect(one.offsetBytes).toBe(gguf.files[one.fileIndex]?.dataOffsetBytes ?? -1);
  });

  test("may have a first file without tensors", () => {
    expect(parseGguf(named([part(0, []), part(1, [first, second]), part(2, [third])])).tensors).toHaveLength(
      3,
    );
  });

  const wrong: readonly (readonly [string, readonly Uint8Array[], string, RegExp])[] = [
    [
      "a missing file",
      all.slice(0, 2),
      "not-found",
      /"m-00003-of-00003.gguf" is missing: put all files in one folder/,
    ],
    ["only the first file", all.slice(0, 1), "not-found", /"m-00002-of-00003.gguf", "m-00003-of-00003.gguf"/],
    ["too many files", [...all, part(3, [])], "corrupt-model", /model of 3 file\(s\), but 4 were given/],
    [
      "files in the wrong order",
      [all[0] as Uint8Array, all[2] as Uint8Array, all[1] as Uint8Array],
      "corrupt-model",
      /says it is file 3 .* file 2 is expected/,
    ],
    [
      "a file of another set",
      [all[0] as Uint8Array, part(1, [second], { count: 4 }), all[2] as Uint8Array],
      "corrupt-model",
      /one of 3|to one of 3/,
    ],
    [
      "a tensor in two files",
      [part(0, [first]), part(1, [first]), part(2, [third])],
      "corrupt-model",
      /"first.weight" occurs twice \(also in "dir\/m-00001/,
    ],
    [
      "a wrong tensor count",
      [part(0, [first], { total: 9 }), all[1] as Uint8Array, all[2] as Uint8Array],
      "corrupt-model",
      /split.tensors.count is 9, but the files hold 3/,
    ],
    [
      "a file that is no part",
      [all[0] as Uint8Array, ggufBytes({ metadata: [], tensors: [second] }), all[2] as Uint8Array],
      "corrupt-model",
      /not part of a split model/,
    ],
    [
      "a damaged part",
      [all[0] as Uint8Array, (all[1] as Uint8Array).subarray(0, 30), all[2] as Uint8Array],
      "corrupt-model",
      /m-00002-of-00003.gguf" is (damaged|cut short)/,
    ],
  ];
  test.each(wrong.map((row) => [...row] as const))("with %s is refused", (_, files, code, sentence) => {
    let caught: unknown;
    try {
      parseGguf(named(files));
    } catch (error) {
      caught = error;
    }
    expect(caught).toBeInstanceOf(HypuraError);
    expect((caught as HypuraError).message).toMatch(sentence);
    expect((caught as HypuraError).code as string).toBe(code);
  });

  test("opened at its second file alone is refused", () => {
    expect(() =>
      parseGguf([{ name: "m-00002-of-00003.gguf", source: sourceOf(all[1] as Uint8Array) }]),
    ).toThrow(HypuraError);
  });
});

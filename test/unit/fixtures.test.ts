// The fixtures: the same bytes for the same options, sound models by our own reader, weights with the statistics
// they promise, a tokenizer that loses nothing, upcycling that keeps the function. That llama.cpp loads them is
// tested where the engine is.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openModelFile, readMetadataArray } from "../../src/modelfile";
import { headerBytes } from "../fixtures/gguf-writer";
import { type FixtureOptions, fixtureKinds, makeFixture } from "../fixtures/index";
import { openRandom } from "../fixtures/random";
import { FetchError, fetchSmolLm2 } from "../fixtures/smollm2";
import { tinyLlama } from "../fixtures/tiny";
import { fixtureTokenizer } from "../fixtures/tokenizer";
import { type UpcycleMode, upcycle } from "../fixtures/upcycle";
import { blockOf, fromHalf, randomWeights, toHalf, weightTypes } from "../fixtures/weights";

let folder = "";

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "hypura-fixtures-"));
});

afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

async function hashOf(kind: string, options: FixtureOptions): Promise<string> {
  const paths = await makeFixture(kind, join(folder, `hash-${kind}.gguf`), options);
  const hash = createHash("sha256");
  for (const path of paths) hash.update(readFileSync(path));
  return hash.digest("hex");
}

const generated = [...fixtureKinds.keys()].filter((kind) => kind.startsWith("tiny-"));

describe("every small kind", () => {
  test.each(generated)(
    "%s has the same bytes for the same seed, others for another, and is sound",
    async (kind) => {
      const first = await hashOf(kind, { seed: 5 });
      expect(await hashOf(kind, { seed: 6 })).not.toBe(first);
      expect(await hashOf(kind, { seed: 5 })).toBe(first);
      const file = openModelFile(join(folder, `hash-${kind}.gguf`));
      expect(file.model.hasChatTemplate).toBe(true);
      expect(file.model.tensors.filter((tensor) => tensor.role === "other")).toEqual([]);
      expect(file.files[0]?.sizeBytes).toBeLessThan(6_000_000);
    },
  );

  test("takes its options", async () => {
    const [path = ""] = await makeFixture("tiny-mixtral", join(folder, "options.gguf"), {
      layers: 2,
      embd: 128,
      ff: 64,
      heads: 2,
      kvHeads: 1,
      experts: 5,
      used: 3,
      context: 512,
      type: "q8_0",
      types: "down=q4_0/q4_1",
      alignment: 64,
    });
    const { model, gguf } = openModelFile(path);
    expect(model).toMatchObject({
      layerCount: 2,
      embeddingLength: 128,
      headCount: 2,
      kvHeadCount: 1,
      expertCount: 5,
      expertUsedCount: 3,
    });
    expect(model.trainedContextTokens).toBe(512);
    expect(gguf.alignment).toBe(64);
    const typeOf = (name: string) => model.tensors.find((tensor) => tensor.name === name)?.typeName;
    expect(typeOf("blk.0.ffn_down_exps.weight")).toBe("q4_0");
    expect(typeOf("blk.1.ffn_down_exps.weight")).toBe("q4_1");
    expect(typeOf("blk.1.ffn_up_exps.weight")).toBe("q8_0");
  });

  test("can be a split set", async () => {
    const paths = await makeFixture("tiny-mixtral", join(folder, "split.gguf"), { split: 4 });
    expect(paths).toHaveLength(4);
    const [whole = ""] = await makeFixture("tiny-mixtral", join(folder, "whole.gguf"));
    const set = openModelFile(paths[2] ?? "");
    expect(set.model.tensors.map((tensor) => tensor.name)).toEqual(
      openModelFile(whole).model.tensors.map((tensor) => tensor.name),
    );
    expect(new Set(set.model.tensors.map((tensor) => tensor.fileIndex)).size).toBe(4);
  });

  test.each([
    ["tiny-llama", { type: "q9" }, /unknown tensor type q9/],
    ["tiny-llama", { type: "iq1_s" }, /no random weights in iq1_s/],
    ["tiny-llama", { embd: 48, type: "q4_K" }, /rows of 48 do not divide into blocks of 256/],
    ["tiny-llama", { types: "nose=q4_0" }, /nose=q4_0 is not PART=TYPE/],
    ["tiny-llama", { experts: 4 }, /takes no option experts/],
    ["no-such-kind", {}, /there is no fixture "no-such-kind": one of tiny-llama/],
  ] as const)("%s with %o is refused", async (kind, options, sentence) => {
    expect(makeFixture(kind, join(folder, "refused.gguf"), options)).rejects.toThrow(sentence);
    expect(existsSync(join(folder, "refused.gguf"))).toBe(false);
  });
});

test("bytes are the same on every machine and engine: two pinned hashes", async () => {
  // Change these only together with a recipe, on purpose: results elsewhere are compared with them.
  expect(sha256(headerBytes(tinyLlama({})))).toBe(pinned.header);
  expect(await hashOf("tiny-mixed", {})).toBe(pinned.mixed);
});

const pinned = {
  header: "bfc1e300f39718a09d40870fbf3d339fbfaa2c9429dd8b90dd1200e73cc8b2ad",
  mixed: "36aefecf3741c30ae2ee1b4b629c078bba15603beea32232b0d1c9a4a04c1264",
} as const;

describe("the large kinds, shrunk", () => {
  test("moe-6g is a mixture of 64 experts with a skewed router", async () => {
    const [path = ""] = await makeFixture("moe-6g", join(folder, "moe.gguf"), { scale: 0.01 });
    const { model } = openModelFile(path);
    expect(model).toMatchObject({
      architecture: "qwen3moe",
      expertCount: 64,
      expertUsedCount: 8,
      layerCount: 2,
    });
    const router = model.tensors.find((tensor) => tensor.name === "blk.0.ffn_gate_inp.weight");
    if (router === undefined) throw new Error("no router");
    const bytes = readFileSync(path).subarray(router.offsetBytes, router.offsetBytes + router.sizeBytes);
    const floats = new Float32Array(Uint8Array.from(bytes).buffer);
    const biases = Array.from(
      { length: 64 },
      (_, expert) => (floats[expert * model.embeddingLength] ?? 0) * 4,
    ).sort((a, b) => b - a);
    // Zipf: the bias of rank r is -0.9 ln r.
    for (const rank of [1, 2, 8, 64]) expect(biases[rank - 1]).toBeCloseTo(-0.9 * Math.log(rank), 2);
  });

  test("no block of moe-6g changes the steady element of the residual stream", async () => {
    const [path = ""] = await makeFixture("moe-6g", join(folder, "moe2.gguf"), { scale: 0.01 });
    const { model } = openModelFile(path);
    const bytes = readFileSync(path);
    for (const tensor of model.tensors) {
      if (!/attn_output|ffn_down_exps/.test(tensor.name)) continue;
      const rowBytes = ((tensor.shape[0] ?? 1) / 32) * 18;
      const matrixBytes = rowBytes * (tensor.shape[1] ?? 1);
      for (let at = 0; at < tensor.sizeBytes; at += matrixBytes) {
        const start = tensor.offsetBytes + at;
        expect(bytes.subarray(start, start + rowBytes).every((byte) => byte === 0)).toBe(true);
        expect(bytes.subarray(start + rowBytes, start + 2 * rowBytes).every((byte) => byte === 0)).toBe(
          false,
        );
      }
    }
  });

  test("dense-6g is dense", async () => {
    const [path = ""] = await makeFixture("dense-6g", join(folder, "dense.gguf"), { scale: 0.01 });
    expect(openModelFile(path).model).toMatchObject({ architecture: "llama", kind: "dense", layerCount: 2 });
  });
});

// ---- weights --------------------------------------------------------------------------------------------------

test("halves convert exactly both ways", () => {
  for (let bits = 0; bits < 65_536; bits++) {
    if (((bits >>> 10) & 31) === 31 || bits === 0x8000) continue;
    expect(toHalf(fromHalf(bits))).toBe(bits);
  }
  expect(toHalf(1 + 2 ** -11)).toBe(toHalf(1));
  expect(toHalf(1 + 3 * 2 ** -11)).toBe(toHalf(1 + 2 ** -9));
  expect(toHalf(-0.1)).toBe(0xae66);
});

/** The values of blocks, as ggml's dequantize_row_* reads them; written from its source, not from the generator. */
const readers: Readonly<Record<string, (block: DataView) => number[]>> = {
  f32: (block) => [block.getFloat32(0, true)],
  f16: (block) => [fromHalf(block.getUint16(0, true))],
  q8_0: (block) =>
    Array.from({ length: 32 }, (_, i) => fromHalf(block.getUint16(0, true)) * block.getInt8(2 + i)),
  q4_0: (block) =>
    Array.from({ length: 32 }, (_, i) => {
      const byte = block.getUint8(2 + (i % 16));
      return fromHalf(block.getUint16(0, true)) * ((i < 16 ? byte & 15 : byte >>> 4) - 8);
    }),
  q4_1: (block) =>
    Array.from({ length: 32 }, (_, i) => {
      const byte = block.getUint8(4 + (i % 16));
      return (
        fromHalf(block.getUint16(0, true)) * (i < 16 ? byte & 15 : byte >>> 4) +
        fromHalf(block.getUint16(2, true))
      );
    }),
  q5_0: (block) =>
    Array.from({ length: 32 }, (_, i) => {
      const byte = block.getUint8(6 + (i % 16));
      const high = (block.getUint32(2, true) >>> i) & 1;
      return fromHalf(block.getUint16(0, true)) * ((i < 16 ? byte & 15 : byte >>> 4) + 16 * high - 16);
    }),
  q4_K: (block) =>
    Array.from({ length: 256 }, (_, i) => {
      const group = i >>> 5;
      const byte = block.getUint8(16 + 32 * (group >>> 1) + (i % 32));
      const quant = (group & 1) === 0 ? byte & 15 : byte >>> 4;
      const [scale, minimum] = scaleAndMinimum(block, group);
      return (
        fromHalf(block.getUint16(0, true)) * scale * quant - fromHalf(block.getUint16(2, true)) * minimum
      );
    }),
  q6_K: (block) =>
    Array.from({ length: 256 }, (_, i) => {
      const half = i >>> 7;
      const quarter = (i >>> 5) & 3;
      const j = i & 31;
      const low = block.getUint8(64 * half + 32 * (quarter & 1) + j);
      const high = (block.getUint8(128 + 32 * half + j) >>> (2 * quarter)) & 3;
      const quant = ((quarter < 2 ? low & 15 : low >>> 4) | (high << 4)) - 32;
      return (
        fromHalf(block.getUint16(208, true)) * block.getInt8(192 + 8 * half + 2 * quarter + (j >>> 4)) * quant
      );
    }),
};

/** get_scale_min_k4 of ggml-quants.c. */
function scaleAndMinimum(block: DataView, group: number): [number, number] {
  const at = (i: number): number => block.getUint8(4 + i);
  if (group < 4) return [at(group) & 63, at(group + 4) & 63];
  return [
    (at(group + 4) & 15) | ((at(group - 4) >>> 6) << 4),
    (at(group + 4) >>> 4) | ((at(group) >>> 6) << 4),
  ];
}

describe("random weights", () => {
  test.each(Object.keys(readers))("in %s have mean zero and the deviation asked for", (typeName) => {
    const elements = 262_144;
    const { blockBytes } = blockOf(typeName);
    const read = readers[typeName];
    const values: number[] = [];
    for (const piece of randomWeights({ typeName, elements, deviation: 0.05, seed: 3 })) {
      for (let at = 0; at < piece.length; at += blockBytes) {
        values.push(...(read?.(new DataView(piece.buffer, piece.byteOffset + at, blockBytes)) ?? []));
      }
    }
    expect(values).toHaveLength(elements);
    const mean = values.reduce((sum, value) => sum + value, 0) / elements;
    const deviation = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / elements);
    // Four standard errors of the mean.
    expect(Math.abs(mean)).toBeLessThan((4 * 0.05) / Math.sqrt(elements));
    expect(deviation).toBeGreaterThan(0.045);
    expect(deviation).toBeLessThan(0.055);
  });

  test.each([...weightTypes])("in %s fill exactly the bytes of their type", (typeName) => {
    const { blockElements, blockBytes } = blockOf(typeName);
    for (const blocks of [1, 3, 1000]) {
      let sum = 0;
      for (const piece of randomWeights({
        typeName,
        elements: blocks * blockElements,
        deviation: 1,
        seed: 1,
      }))
        sum += piece.length;
      expect(sum).toBe(blocks * blockBytes);
    }
  });
});

test("a permutation holds every number once", () => {
  const order = openRandom(9).permutation(1000);
  expect([...order].sort((a, b) => a - b)).toEqual(Array.from({ length: 1000 }, (_, i) => i));
  expect([...order]).not.toEqual(Array.from({ length: 1000 }, (_, i) => i));
});

// ---- tokenizer ------------------------------------------------------------------------------------------------

test("the tokenizer has every byte, no token twice, and merges that build its tokens in order", () => {
  const { tokens, metadata } = fixtureTokenizer();
  expect(tokens).toHaveLength(512);
  expect(new Set(tokens).size).toBe(512);
  const merges = metadata.find((entry) => entry.key === "tokenizer.ggml.merges")?.value;
  if (merges?.type !== "array") throw new Error("no merges");
  const known = new Set(tokens.slice(0, 3 + 256));
  expect([...known].filter((token) => [...token].length === 1)).toHaveLength(256);
  merges.values.forEach((merge, i) => {
    const [left = "", right = ""] = String(merge).split(" ");
    expect(known.has(left) && known.has(right)).toBe(true);
    expect(tokens[3 + 256 + i]).toBe(left + right);
    known.add(left + right);
  });
  // Whole words were learned, so that prompts are not only bytes.
  expect(tokens).toContain("Ġthe");
});

// ---- upcycling ------------------------------------------------------------------------------------------------

describe("upcycling", () => {
  const experts = 4;
  const hidden = 128;

  /** The matrix of one expert (or the dense one), as rows of values. */
  function matrix(path: string, name: string, expert: number): number[][] {
    const { model } = openModelFile(path);
    const tensor = model.tensors.find((one) => one.name === name);
    if (tensor === undefined) throw new Error(`no ${name}`);
    const { blockElements, blockBytes } = blockOf(tensor.typeName);
    const [rowElements = 1, rowCount = 1, count = 1] = tensor.shape;
    const strideBytes = tensor.sizeBytes / count;
    const bytes = readFileSync(path);
    const read = readers[tensor.typeName];
    return Array.from({ length: rowCount }, (_, row) =>
      Array.from({ length: rowElements / blockElements }, (_, block) => {
        const at =
          tensor.offsetBytes +
          expert * strideBytes +
          (row * (rowElements / blockElements) + block) * blockBytes;
        return read?.(new DataView(bytes.buffer, bytes.byteOffset + at, blockBytes)) ?? [];
      }).flat(),
    );
  }

  /** A linear FFN, down * (gate x + 2 up x): equal for equal functions, and any misfit of the three shows. */
  function ffn(
    path: string,
    names: readonly [string, string, string],
    expert: number,
    input: readonly number[],
  ): number[] {
    const times = (rows: readonly (readonly number[])[], vector: readonly number[]): number[] =>
      rows.map((row) => row.reduce((sum, value, i) => sum + value * (vector[i] ?? 0), 0));
    const [gate, up, down] = names.map((name) => matrix(path, name, expert));
    const gated = times(gate ?? [], input);
    const upped = times(up ?? [], input);
    return times(
      down ?? [],
      gated.map((value, i) => Math.max(0, value) + 2 * (upped[i] ?? 0)),
    );
  }

  const dense = ["blk.1.ffn_gate.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"] as const;
  const mixed = [
    "blk.1.ffn_gate_exps.weight",
    "blk.1.ffn_up_exps.weight",
    "blk.1.ffn_down_exps.weight",
  ] as const;

  async function make(type: string, mode: UpcycleMode): Promise<{ source: string; path: string }> {
    const [source = ""] = await makeFixture("tiny-llama", join(folder, `dense-${type}.gguf`), {
      layers: 2,
      embd: 64,
      ff: hidden,
      type,
    });
    const [path = ""] = upcycle(join(folder, `${mode}-${type}.gguf`), {
      source,
      experts,
      used: 2,
      mode,
      seed: 4,
    });
    return { source, path };
  }

  function distance(a: readonly number[], b: readonly number[]): number {
    const norm = (values: readonly number[]): number =>
      Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
    return norm(a.map((value, i) => value - (b[i] ?? 0))) / norm(b);
  }

  const input = Array.from({ length: 64 }, (_, i) => ((i * 37) % 64) / 32 - 1);

  test.each(["f32", "f16", "q8_0", "q4_0", "q4_1"])(
    "of %s by permute keeps the function and changes the bytes of every expert",
    async (type) => {
      const { source, path } = await make(type, "permute");
      const wanted = ffn(source, dense, 0, input);
      const gates = new Set<string>();
      for (let expert = 0; expert < experts; expert++) {
        expect(distance(ffn(path, mixed, expert, input), wanted)).toBeLessThan(1e-5);
        gates.add(JSON.stringify(matrix(path, mixed[0], expert)));
      }
      expect(gates.size).toBe(experts);
      // Parts of different experts do not fit, which is what this mode is for.
      const misfit = distance(ffnOfParts(path, 0, 1), wanted);
      expect(misfit).toBeGreaterThan(0.1);
    },
  );

  /** Expert `a` with the down matrix of expert `b`. */
  function ffnOfParts(path: string, a: number, b: number): number[] {
    const gate = matrix(path, mixed[0], a);
    const up = matrix(path, mixed[1], a);
    const down = matrix(path, mixed[2], b);
    const dot = (row: readonly number[], vector: readonly number[]): number =>
      row.reduce((sum, value, i) => sum + value * (vector[i] ?? 0), 0);
    const middle = gate.map((row, i) => Math.max(0, dot(row, input)) + 2 * dot(up[i] ?? [], input));
    return down.map((row) => dot(row, middle));
  }

  test.each(["f32", "q4_1"])("of %s by copy makes equal experts", async (type) => {
    const { source, path } = await make(type, "copy");
    for (let expert = 0; expert < experts; expert++) {
      expect(matrix(path, mixed[2], expert)).toEqual(matrix(source, dense[2], 0));
    }
  });

  test.each(["f32", "f16", "q8_0", "q4_0", "q4_1"])(
    "of %s by noise makes experts that differ by a few per cent",
    async (type) => {
      const { source, path } = await make(type, "noise");
      const wanted = ffn(source, dense, 0, input);
      const outputs = Array.from({ length: experts }, (_, expert) => ffn(path, mixed, expert, input));
      for (const output of outputs) {
        expect(distance(output, wanted)).toBeGreaterThan(0.005);
        expect(distance(output, wanted)).toBeLessThan(0.25);
      }
      expect(distance(outputs[0] ?? [], outputs[1] ?? [])).toBeGreaterThan(0.005);
    },
  );

  test("keeps the metadata, adds the expert keys, and is a sound mixture", async () => {
    const { source, path } = await make("q4_1", "permute");
    const before = openModelFile(source);
    const after = openModelFile(path);
    expect(after.model).toMatchObject({
      kind: "mixture-of-experts",
      expertCount: experts,
      expertUsedCount: 2,
      architecture: "llama",
    });
    for (const [key, value] of before.gguf.metadata) {
      if (key === "general.name" || typeof value === "object") continue;
      expect(after.gguf.metadata.get(key)).toBe(value);
    }
    expect(readMetadataArray(after, "tokenizer.ggml.tokens")).toEqual(
      readMetadataArray(before, "tokenizer.ggml.tokens"),
    );
  });

  test("has the same bytes for the same seed, whole or split", async () => {
    const { source, path } = await make("q4_0", "permute");
    const again = upcycle(join(folder, "again.gguf"), { source, experts, used: 2, mode: "permute", seed: 4 });
    expect(sha256(readFileSync(again[0] ?? ""))).toBe(sha256(readFileSync(path)));
    const set = upcycle(join(folder, "set.gguf"), {
      source,
      experts,
      used: 2,
      mode: "permute",
      seed: 4,
      split: 3,
    });
    expect(set).toHaveLength(3);
    const whole = openModelFile(path);
    const parts = openModelFile(set[0] ?? "");
    for (const [i, tensor] of parts.model.tensors.entries()) {
      const other = whole.model.tensors[i];
      const bytes = (
        file: string | undefined,
        one: { offsetBytes: number; sizeBytes: number } | undefined,
      ): Uint8Array =>
        readFileSync(file ?? "").subarray(
          one?.offsetBytes ?? 0,
          (one?.offsetBytes ?? 0) + (one?.sizeBytes ?? 0),
        );
      expect(sha256(bytes(parts.files[tensor.fileIndex]?.path, tensor))).toBe(sha256(bytes(path, other)));
    }
  });

  test("of a mixture is refused", async () => {
    const [source = ""] = await makeFixture("tiny-mixtral", join(folder, "mixtral.gguf"));
    expect(() => upcycle(join(folder, "no.gguf"), { source })).toThrow(/only a dense model/);
  });
});

// ---- the real model -------------------------------------------------------------------------------------------

describe("fetching SmolLM2", () => {
  const path = process.env["PATH"] ?? "";
  afterAll(() => {
    process.env["PATH"] = path;
  });

  async function failure(): Promise<FetchError> {
    const cache = join(folder, "cache");
    mkdirSync(cache, { recursive: true });
    try {
      await fetchSmolLm2(cache);
    } catch (error) {
      expect(error).toBeInstanceOf(FetchError);
      return error as FetchError;
    }
    throw new Error("it was fetched");
  }

  test("without pip says what to install", async () => {
    process.env["PATH"] = folder;
    const error = await failure();
    process.env["PATH"] = path;
    expect(error.code).toBe("missing-tool");
    expect(error.message).toMatch(/install Python's pip/);
  });
});

// Mutations of headers through the reader, the description and the planner: each must end in a HypuraError or in a
// description whose every range lies in its file and a plan that fits, quickly and with few bytes read. Seeded, so that a failure names the mutation that shows it again.

import { expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import { type ByteSource, type Gguf, parseGguf } from "../../src/gguf";
import { describeModel, kvBytesPerToken, type Model, memoryBytes } from "../../src/model";
import { makePlan, type Plan, totalBytes } from "../../src/plan";
import { type GgufSpec, headerBytes, tensorBytes } from "../fixtures/gguf-writer";
import { openRandom, type Random } from "../fixtures/random";
import { tinyDeepseek2, tinyLfm2Moe, tinyLlama, tinyMixtral } from "../fixtures/tiny";
import { machineOf, machines } from "../unit/plan-family";

/** HYPURA_FUZZ_RUNS raises the number for a soak. */
const runs = Number(process.env["HYPURA_FUZZ_RUNS"] ?? 10_000);

/** Without most of the vocabulary: a mutation should hit structure, not one token among hundreds. */
function lean(spec: GgufSpec): GgufSpec {
  const metadata = spec.metadata.map((entry) =>
    entry.value.type === "array" && entry.key.startsWith("tokenizer.")
      ? { key: entry.key, value: { ...entry.value, values: entry.value.values.slice(0, 4) } }
      : entry,
  );
  return { ...spec, metadata };
}

/** A file: its header, and how many bytes of data follow (the reader never looks at them). */
interface Seed {
  readonly header: Uint8Array;
  readonly dataBytes: number;
}

const small = { layers: 2, embd: 64, ff: 64 } as const;
const seeds: readonly Seed[] = [
  lean(tinyLlama(small)),
  lean(tinyMixtral({ ...small, experts: 4 })),
  lean(tinyDeepseek2({ layers: 2, embd: 64 })),
  lean(tinyLfm2Moe({ layers: 3, embd: 64 })),
].map((spec) => ({
  header: headerBytes(spec),
  dataBytes: spec.tensors.reduce((sum, tensor) => sum + Math.ceil(tensorBytes(tensor) / 32) * 32, 0),
}));

/** Values that sit at the edges of what counts, lengths and offsets can be. */
const edges: readonly bigint[] = [
  0n,
  1n,
  2n,
  31n,
  32n,
  63n,
  64n,
  255n,
  256n,
  65_535n,
  65_536n,
  1n << 20n,
  1n << 31n,
  (1n << 32n) - 1n,
  1n << 32n,
  1n << 53n,
  (1n << 63n) - 1n,
  1n << 63n,
  (1n << 64n) - 1n,
];

type Mutation = (seed: Seed, random: Random) => Seed;

function edit(seed: Seed, change: (header: Uint8Array) => void): Seed {
  const header = seed.header.slice();
  change(header);
  return { ...seed, header };
}

function joined(seed: Seed, ...parts: readonly Uint8Array[]): Seed {
  return { ...seed, header: new Uint8Array(Buffer.concat([...parts])) };
}

const mutations: Readonly<Record<string, Mutation>> = {
  flip: (seed, random) =>
    edit(seed, (header) => {
      for (let n = 1 + random.below(3); n > 0; n--) {
        const at = random.below(header.length);
        header[at] = (header[at] ?? 0) ^ (1 << random.below(8));
      }
    }),
  replace: (seed, random) =>
    edit(seed, (header) => {
      for (let n = 1 + random.below(8); n > 0; n--) header[random.below(header.length)] = random.u32() & 255;
    }),
  truncate: (seed, random) =>
    random.below(2) === 0
      ? { header: seed.header.slice(0, random.below(seed.header.length)), dataBytes: 0 }
      : { ...seed, dataBytes: random.below(seed.dataBytes) },
  edge64: (seed, random) =>
    edit(seed, (header) =>
      new DataView(header.buffer).setBigUint64(random.below(header.length - 8), random.pick(edges), true),
    ),
  edge32: (seed, random) =>
    edit(seed, (header) =>
      new DataView(header.buffer).setUint32(
        random.below(header.length - 4),
        Number(random.pick(edges) & 0xffff_ffffn),
        true,
      ),
    ),
  counts: (seed, random) =>
    edit(seed, (header) => {
      const value = BigInt.asUintN(64, random.pick(edges) + BigInt(random.below(64)));
      new DataView(header.buffer).setBigUint64(8 + 8 * random.below(2), value, true);
    }),
  nudge: (seed, random) =>
    edit(seed, (header) => {
      const at = random.below(header.length);
      header[at] = ((header[at] ?? 0) + (random.below(2) === 0 ? 1 : 255)) & 255;
    }),
  remove: (seed, random) => {
    const at = random.below(seed.header.length);
    return joined(seed, seed.header.subarray(0, at), seed.header.subarray(at + 1 + random.below(16)));
  },
  repeat: (seed, random) => {
    const at = random.below(seed.header.length);
    const end = Math.min(seed.header.length, at + 1 + random.below(64));
    return joined(seed, seed.header.subarray(0, end), seed.header.subarray(at));
  },
  splice: (seed, random) => {
    const other = random.pick(seeds);
    const at = random.below(seed.header.length);
    return {
      ...joined(seed, seed.header.subarray(0, at), other.header.subarray(at)),
      dataBytes: other.dataBytes,
    };
  },
  // The file is as large as any claim: only limits and structure can refuse it.
  huge: (seed, random) => ({
    ...(mutations[random.pick(["edge64", "counts", "edge32"])]?.(seed, random) ?? seed),
    dataBytes: 400_000_000_000,
  }),
};

/**
 * A reader may ask for every byte of a header a few times, and for no more at once than a window: what it asks for is
 * what it allocates (modelfile.ts), so that a header that lies must not make it ask for more.
 */
const mostReadBytes = { atOnce: 1_048_576, inAll: 8_388_608 } as const;

function sourceOf(seed: Seed): ByteSource {
  const sizeBytes = seed.header.length + seed.dataBytes;
  let readBytes = 0;
  return {
    sizeBytes,
    read(offset, length) {
      readBytes += length;
      if (length > mostReadBytes.atOnce || readBytes > mostReadBytes.inAll) {
        throw new Error(`it reads ${length} bytes at once and ${readBytes} in all`);
      }
      if (offset + length <= seed.header.length) return seed.header.subarray(offset, offset + length);
      const out = new Uint8Array(Math.min(length, sizeBytes - offset));
      out.set(seed.header.subarray(offset, offset + length));
      return out;
    },
  };
}

function checkRanges(gguf: Gguf): void {
  for (const tensor of gguf.tensors) {
    const file = gguf.files[tensor.fileIndex];
    const ok =
      file !== undefined &&
      Number.isSafeInteger(tensor.offsetBytes) &&
      Number.isSafeInteger(tensor.sizeBytes) &&
      tensor.sizeBytes > 0 &&
      tensor.offsetBytes >= file.dataOffsetBytes &&
      tensor.offsetBytes + tensor.sizeBytes <= file.sizeBytes;
    if (!ok) throw new Error(`the range of ${tensor.name} lies outside its file`);
  }
}

const machine = machineOf({ ...machines["ci-24g"], availableBytes: 120_000_000 });

/** A small machine, so that some stream and some are refused. */
function checkPlan(model: Model): void {
  let plan: Plan;
  try {
    plan = makePlan({ name: "m", files: [], model }, machine);
  } catch (error) {
    if (error instanceof HypuraError && error.code === "not-enough-memory") return;
    throw error;
  }
  if (!(totalBytes(plan.memory) <= machine.memory.availableBytes)) throw new Error("the plan does not fit");
  const placed = plan.tensors.reduce((sum, one) => sum + one.sizeBytes, 0);
  if (placed !== model.tensorBytes) throw new Error("the plan loses bytes");
  const rate = plan.estimate.decodeTokensPerSecond;
  if (rate !== null && !(rate > 0)) throw new Error(`the plan predicts ${rate} tokens a second`);
}

/** Parses, describes, plans and checks; true if the mutated file was still a model. */
function tryFile(file: Seed): boolean {
  try {
    const gguf = parseGguf([{ name: "m.gguf", source: sourceOf(file) }]);
    checkRanges(gguf);
    const model = describeModel(gguf);
    for (const set of model.strides) {
      if (!Number.isInteger(set.strideBytes) || set.touchedCount > set.strideCount)
        throw new Error("a stride is no whole part of its tensor");
    }
    const use = { keyType: "f16", valueType: "f16", contextTokens: 4096, batchTokens: 512, sequenceCount: 1 };
    const numbers = [
      model.touchedBytesPerToken,
      kvBytesPerToken(model, use),
      memoryBytes(model, use).kvBytes,
      memoryBytes(model, use).stateBytes,
    ];
    if (!numbers.every((value) => Number.isFinite(value) && value >= 0))
      throw new Error(`a figure is no number: ${numbers.join(", ")}`);
    checkPlan(model);
    return true;
  } catch (error) {
    if (!(error instanceof HypuraError)) throw error;
    if (error.code === "internal" || error.message.includes("\n"))
      throw new Error(`a bad error: ${error.code} ${error.message}`);
    return false;
  }
}

function fastestOfThree(file: Seed): number {
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0; i < 3; i++) {
    const started = performance.now();
    tryFile(file);
    best = Math.min(best, performance.now() - started);
  }
  return best;
}

test("the seeds themselves are sound", () => {
  for (const seed of seeds) expect(tryFile(seed)).toBe(true);
});

test(
  `${runs} mutations give an error or a sound description, each within 50 ms`,
  () => {
    const random = openRandom(20_260_101);
    const names = Object.keys(mutations);
    let sound = 0;
    for (let run = 0; run < runs; run++) {
      const seed = random.pick(seeds);
      const name = random.pick(names);
      const file = mutations[name]?.(seed, random) ?? seed;
      try {
        const started = performance.now();
        if (tryFile(file)) sound++;
        const milliseconds = performance.now() - started;
        // A slow run may have lost its core or met the collector; the same file must be quick in one of three.
        if (milliseconds > 50 && fastestOfThree(file) > 50) throw new Error(`it took ${milliseconds} ms`);
      } catch (cause) {
        throw new Error(
          `mutation ${run} (${name}) broke the reader: ${cause instanceof Error ? cause.message : String(cause)}`,
          { cause },
        );
      }
    }
    // Both outcomes must occur, or the mutations test nothing.
    expect(sound).toBeGreaterThan(runs / 100);
    expect(sound).toBeLessThan((runs * 9) / 10);
  },
  10_000 + runs * 20,
);

// Models and machines of real shapes, as values: headers without weights and figures without hardware. Shared by the
// tests of the planner; the sizes are those of the published files within a percent or two.

import { truncateSync, writeFileSync } from "node:fs";
import { parseGguf } from "../../src/gguf";
import { type Device, type Machine, type MachineProfile, profileVersion } from "../../src/machine";
import { describeModel, type Model } from "../../src/model";
import {
  type GgufSpec,
  headerBytes,
  type Metadata,
  type TensorSpec,
  tensorBytes,
} from "../fixtures/gguf-writer";
import { key } from "../fixtures/tiny";

// ---- models -------------------------------------------------------------------------------------------------------

/** ggml types of the parts of a file, as llama.cpp's quantisation mixes choose them. */
interface Mix {
  readonly base: string;
  /** Of attention's values and of the FFN's last matrix, in the layers that the mix treats better. */
  readonly better: string;
  readonly output: string;
}

const q4km: Mix = { base: "q4_K", better: "q6_K", output: "q6_K" };
const q5km: Mix = { base: "q5_K", better: "q6_K", output: "q6_K" };
const mxfp4: Mix = { base: "mxfp4", better: "mxfp4", output: "q8_0" };

export interface Dimensions {
  readonly architecture: string;
  readonly layers: number;
  readonly embd: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headLength?: number;
  readonly ff: number;
  readonly vocab: number;
  readonly tied?: boolean;
  readonly experts?: number;
  readonly used?: number;
  readonly expertFf?: number;
  readonly denseLayers?: number;
  readonly shared?: number;
  readonly context?: number;
  readonly attention?: "mla";
  readonly attentionType?: string;
  readonly mix?: Mix;
}

function tensor(name: string, shape: readonly number[], typeName: string): TensorSpec {
  return { name, shape, typeName, pieces: () => [] };
}

/** use_more_bits of llama.cpp's quantisation: the first and last eighths, and every third between. */
function isBetter(layer: number, layers: number): boolean {
  return layer < layers / 8 || layer >= (7 * layers) / 8 || (layer - Math.floor(layers / 8)) % 3 === 2;
}

/** A file of this shape, without weights. */
export function shapeSpec(size: Dimensions): GgufSpec {
  const mix = size.mix ?? q4km;
  const head = size.headLength ?? size.embd / size.heads;
  const isMla = size.attention === "mla";
  const a = size.architecture;
  const metadata: Metadata[] = [
    key("general.architecture", "str", a),
    key("general.name", "str", a),
    key(`${a}.block_count`, "u32", size.layers),
    key(`${a}.context_length`, "u32", size.context ?? 32_768),
    key(`${a}.embedding_length`, "u32", size.embd),
    key(`${a}.feed_forward_length`, "u32", size.ff),
    key(`${a}.attention.head_count`, "u32", size.heads),
    key(`${a}.attention.head_count_kv`, "u32", isMla ? 1 : size.kvHeads),
    key(`${a}.attention.key_length`, "u32", isMla ? 576 : head),
    key(`${a}.attention.value_length`, "u32", isMla ? 512 : head),
    key(`${a}.vocab_size`, "u32", size.vocab),
    ...(isMla
      ? [key(`${a}.attention.key_length_mla`, "u32", 192), key(`${a}.attention.value_length_mla`, "u32", 128)]
      : []),
    ...(size.experts === undefined
      ? []
      : [
          key(`${a}.expert_count`, "u32", size.experts),
          key(`${a}.expert_used_count`, "u32", size.used ?? 2),
          key(`${a}.expert_feed_forward_length`, "u32", size.expertFf ?? size.ff),
        ]),
  ];
  const tensors: TensorSpec[] = [tensor("token_embd.weight", [size.embd, size.vocab], mix.base)];
  for (let layer = 0; layer < size.layers; layer++) {
    tensors.push(...layerTensors(layer, size, mix, head));
  }
  tensors.push(tensor("output_norm.weight", [size.embd], "f32"));
  if (size.tied !== true) {
    tensors.push(tensor("output.weight", [size.embd, size.vocab], mix.output));
  }
  return { metadata, tensors };
}

function fileBytes(spec: GgufSpec): number {
  return spec.tensors.reduce((sum, one) => sum + Math.ceil(tensorBytes(one) / 32) * 32, 0);
}

export function describeShape(size: Dimensions): Model {
  const spec = shapeSpec(size);
  const header = headerBytes(spec);
  const read = (offset: number, length: number): Uint8Array => {
    const out = new Uint8Array(length);
    out.set(header.subarray(offset, offset + length));
    return out;
  };
  const sizeBytes = header.length + fileBytes(spec);
  return describeModel(parseGguf([{ name: "m.gguf", source: { sizeBytes, read } }]));
}

/** The header, and as many bytes after it as the weights would take, which take no room on the disk. */
export function writeHollow(path: string, size: Dimensions): void {
  const spec = shapeSpec(size);
  const header = headerBytes(spec);
  writeFileSync(path, header);
  truncateSync(path, header.length + fileBytes(spec));
}

function layerTensors(layer: number, size: Dimensions, mix: Mix, head: number): TensorSpec[] {
  const name = (base: string): string => `blk.${layer}.${base}.weight`;
  const better = isBetter(layer, size.layers) ? mix.better : mix.base;
  const type = size.attentionType ?? mix.base;
  const { embd, heads, kvHeads, experts } = size;
  const attention =
    size.attention === "mla"
      ? [
          tensor(name("attn_q_a"), [embd, 1536], type),
          tensor(name("attn_q_b"), [1536, heads * 192], type),
          tensor(name("attn_kv_a_mqa"), [embd, 576], type),
          tensor(name("attn_k_b"), [128, 512, heads], "q8_0"),
          tensor(name("attn_v_b"), [512, 128, heads], "q8_0"),
          tensor(name("attn_output"), [heads * 128, embd], type),
        ]
      : [
          tensor(name("attn_q"), [embd, heads * head], type),
          tensor(name("attn_k"), [embd, kvHeads * head], type),
          tensor(name("attn_v"), [embd, kvHeads * head], size.attentionType ?? better),
          tensor(name("attn_output"), [heads * head, embd], type),
        ];
  const norms = [tensor(name("attn_norm"), [embd], "f32"), tensor(name("ffn_norm"), [embd], "f32")];
  if (experts === undefined || layer < (size.denseLayers ?? 0)) {
    return [
      ...attention,
      ...norms,
      tensor(name("ffn_gate"), [embd, size.ff], mix.base),
      tensor(name("ffn_up"), [embd, size.ff], mix.base),
      tensor(name("ffn_down"), [size.ff, embd], better),
    ];
  }
  const ff = size.expertFf ?? size.ff;
  const shared = size.shared ?? 0;
  return [
    ...attention,
    ...norms,
    tensor(name("ffn_gate_inp"), [embd, experts], "f32"),
    tensor(name("ffn_gate_exps"), [embd, ff, experts], mix.base),
    tensor(name("ffn_up_exps"), [embd, ff, experts], mix.base),
    tensor(name("ffn_down_exps"), [ff, embd, experts], better),
    ...(shared === 0
      ? []
      : [
          tensor(name("ffn_gate_shexp"), [embd, shared], mix.base),
          tensor(name("ffn_up_shexp"), [embd, shared], mix.base),
          tensor(name("ffn_down_shexp"), [shared, embd], mix.base),
        ]),
  ];
}

const llama = { architecture: "llama", kvHeads: 8, vocab: 128_256 } as const;

const qwen3moe = {
  architecture: "qwen3moe",
  kvHeads: 4,
  headLength: 128,
  vocab: 151_936,
  experts: 128,
  used: 8,
} as const;

const gptOss = {
  architecture: "gpt-oss",
  embd: 2880,
  heads: 64,
  kvHeads: 8,
  headLength: 64,
  ff: 2880,
  vocab: 201_088,
  used: 4,
  attentionType: "bf16",
  mix: mxfp4,
} as const;

export const shapes = {
  "llama-1b": { ...llama, layers: 16, embd: 2048, heads: 32, ff: 8192, tied: true },
  "llama-8b": { ...llama, layers: 32, embd: 4096, heads: 32, ff: 14_336 },
  "qwen2.5-14b": {
    architecture: "qwen2",
    layers: 48,
    embd: 5120,
    heads: 40,
    kvHeads: 8,
    ff: 13_824,
    vocab: 152_064,
  },
  "qwen2.5-32b": {
    architecture: "qwen2",
    layers: 64,
    embd: 5120,
    heads: 40,
    kvHeads: 8,
    ff: 27_648,
    vocab: 152_064,
  },
  "llama-70b": { ...llama, layers: 80, embd: 8192, heads: 64, ff: 28_672 },
  "mixtral-8x7b": {
    ...llama,
    vocab: 32_000,
    layers: 32,
    embd: 4096,
    heads: 32,
    ff: 14_336,
    experts: 8,
    used: 2,
    mix: q5km,
  },
  "qwen3-30b": { ...qwen3moe, layers: 48, embd: 2048, heads: 32, ff: 6144, expertFf: 768 },
  "qwen3-235b": { ...qwen3moe, layers: 94, embd: 4096, heads: 64, ff: 12_288, expertFf: 1536 },
  "gpt-oss-20b": { ...gptOss, layers: 24, experts: 32 },
  "gpt-oss-120b": { ...gptOss, layers: 36, experts: 128 },
  "deepseek-v3": {
    architecture: "deepseek2",
    layers: 61,
    embd: 7168,
    heads: 128,
    kvHeads: 128,
    ff: 18_432,
    vocab: 129_280,
    experts: 256,
    used: 8,
    expertFf: 2048,
    denseLayers: 3,
    shared: 2048,
    attention: "mla",
  },
} as const satisfies Readonly<Record<string, Dimensions>>;

export type ShapeName = keyof typeof shapes;
export const shapeNames = Object.keys(shapes) as readonly ShapeName[];

const described = new Map<ShapeName, Model>();

/** Each is described once: a header of a thousand tensors takes a while. */
export function shapeModel(name: ShapeName): Model {
  const model = described.get(name) ?? describeShape(shapes[name]);
  described.set(name, model);
  return model;
}

// ---- machines -----------------------------------------------------------------------------------------------------

export interface MachineSpec {
  readonly totalBytes: number;
  readonly availableBytes: number;
  readonly cores: number;
  /** Of products of one token. */
  readonly decodeBytesPerSecond: number;
  readonly prefillFlopsPerSecond: number;
  readonly diskBytesPerSecond: number;
  readonly gpus?: readonly Device[];
}

const typesMeasured = ["q4_K", "q5_K", "q6_K", "q4_0", "q8_0", "mxfp4", "bf16", "f16", "f32"];

export function profileOf(spec: MachineSpec): MachineProfile {
  const read = (readBytes: number, depth: number, share: number) => ({
    readBytes,
    depth,
    bytesPerSecond: spec.diskBytesPerSecond * share,
    latencySeconds: { p50: 1e-4, p99: 1e-3 },
  });
  return {
    version: profileVersion,
    fingerprint: `cores=${spec.cores}; total=${spec.totalBytes}`,
    measuredAt: "2026-11-01T00:00:00.000Z",
    cpuModel: "as a value",
    computeThreads: spec.cores,
    copyBytesPerSecond: spec.decodeBytesPerSecond,
    // So little that figures worked out by hand need not contain them.
    steps: { attention: 1e-18, mixing: 1e-18, plain: 1e-18 },
    products: typesMeasured.map((typeName) => ({
      typeName,
      decodeBytesPerSecond: spec.decodeBytesPerSecond,
      shortRowBytesPerSecond: spec.decodeBytesPerSecond,
      repacked: null,
      prefillFlopsPerSecond: spec.prefillFlopsPerSecond,
    })),
    storage: [
      {
        volume: "disk",
        measuredAt: "2026-11-01T00:00:00.000Z",
        direct: true,
        reads: [
          read(262_144, 1, 0.3),
          read(262_144, 8, 0.85),
          read(1_048_576, 1, 0.5),
          read(1_048_576, 4, 0.9),
          read(1_048_576, 8, 1),
          read(1_048_576, 16, 1),
        ],
        bestBytesPerSecond: spec.diskBytesPerSecond,
        best: { readBytes: 1_048_576, depth: 8 },
      },
    ],
  };
}

export function machineOf(spec: MachineSpec): Machine {
  return {
    computeCores: spec.cores,
    hasDirectLoad: spec.gpus?.[0]?.isUnified !== true,
    memory: { totalBytes: spec.totalBytes, availableBytes: spec.availableBytes, limitedBy: null },
    devices: spec.gpus ?? [],
    gpuBackends: [],
    profile: profileOf(spec),
  };
}

function metal(name: string, workingSetBytes: number): Device {
  return {
    name: "Metal",
    description: name,
    type: "gpu",
    totalBytes: workingSetBytes,
    freeBytes: workingSetBytes,
    isUnified: true,
  };
}

function cuda(name: string, totalBytes: number): Device {
  return {
    name: "CUDA0",
    description: name,
    type: "gpu",
    totalBytes,
    freeBytes: totalBytes - 300e6,
    isUnified: false,
  };
}

export const machines = {
  "laptop-8g": {
    totalBytes: 8.2e9,
    availableBytes: 5.5e9,
    cores: 4,
    decodeBytesPerSecond: 25e9,
    prefillFlopsPerSecond: 150e9,
    diskBytesPerSecond: 2.2e9,
  },
  "slow-disk-16g": {
    totalBytes: 16.5e9,
    availableBytes: 13e9,
    cores: 6,
    decodeBytesPerSecond: 35e9,
    prefillFlopsPerSecond: 250e9,
    diskBytesPerSecond: 0.5e9,
  },
  "m1-max-32g": {
    totalBytes: 34.36e9,
    availableBytes: 29e9,
    cores: 8,
    decodeBytesPerSecond: 150e9,
    prefillFlopsPerSecond: 700e9,
    diskBytesPerSecond: 5.1e9,
    gpus: [metal("Apple M1 Max", 22.9e9)],
  },
  "m4-24g": {
    totalBytes: 25.77e9,
    availableBytes: 20e9,
    cores: 4,
    decodeBytesPerSecond: 90e9,
    prefillFlopsPerSecond: 600e9,
    diskBytesPerSecond: 3e9,
    gpus: [metal("Apple M4", 17.2e9)],
  },
  "mac-192g": {
    totalBytes: 206.2e9,
    availableBytes: 185e9,
    cores: 16,
    decodeBytesPerSecond: 400e9,
    prefillFlopsPerSecond: 1.5e12,
    diskBytesPerSecond: 7e9,
    gpus: [metal("Apple M2 Ultra", 154e9)],
  },
  "cuda-24g-64g": {
    totalBytes: 67e9,
    availableBytes: 60e9,
    cores: 16,
    decodeBytesPerSecond: 60e9,
    prefillFlopsPerSecond: 1e12,
    diskBytesPerSecond: 7e9,
    gpus: [cuda("RTX 4090", 25.2e9)],
  },
  "cuda-8g-16g": {
    totalBytes: 16.5e9,
    availableBytes: 12e9,
    cores: 8,
    decodeBytesPerSecond: 40e9,
    prefillFlopsPerSecond: 500e9,
    diskBytesPerSecond: 3.5e9,
    gpus: [cuda("RTX 4060", 8.3e9)],
  },
  "ci-24g": {
    totalBytes: 25.2e9,
    availableBytes: 22e9,
    cores: 2,
    decodeBytesPerSecond: 9e9,
    prefillFlopsPerSecond: 100e9,
    diskBytesPerSecond: 1.6e9,
  },
  "workstation-512g": {
    totalBytes: 540e9,
    availableBytes: 500e9,
    cores: 32,
    decodeBytesPerSecond: 200e9,
    prefillFlopsPerSecond: 3e12,
    diskBytesPerSecond: 12e9,
  },
} as const satisfies Readonly<Record<string, MachineSpec>>;

export type MachineName = keyof typeof machines;
export const machineNames = Object.keys(machines) as readonly MachineName[];

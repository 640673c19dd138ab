// How much memory a plan takes, by purpose and by device, before any weight is placed: context, scratch, the process
// itself, and what streaming needs beside its pool. It owns the formulas and their sources; it must not know how weights
// are placed (plan-place.ts) and is pure.

import { type KvUse, type Model, type ModelTensor, memoryBytes } from "./model";
import { predictionBytes } from "./plan-prediction";

/** Bytes by purpose; their sum is what the process should need at its peak. */
export interface MemoryUse {
  /** Resident weights in ram. */
  readonly weightBytes: number;
  readonly kvBytes: number;
  readonly stateBytes: number;
  readonly computeBytes: number;
  /** Slots for streamed weights, and what streaming needs beside them. */
  readonly poolBytes: number;
  readonly streamingBytes: number;
  /** A draft model: its weights, context and scratch. Of MTP layers, which are a part of the model, context and scratch. */
  readonly draftBytes: number;
  /** What reads images: its weights and scratch. */
  readonly projectorBytes: number;
  readonly processBytes: number;
}

/** The same on the GPUs, all of them together. On unified memory it is the same memory as the rest. */
export interface GpuMemoryUse {
  readonly weightBytes: number;
  readonly kvBytes: number;
  readonly stateBytes: number;
  readonly computeBytes: number;
}

/** Resident memory of the executable with libhypura loaded and no model: 95 MB measured on Linux x86-64. */
const processBytes = 90_000_000;
/** What NVIDIA's libraries add, whether there is a GPU or not: 185 MB measured with CUDA 13.5 on Linux x86-64. */
const cudaBytes = 185_000_000;

/** Of a machine's gpuBackends. */
export function processBytesWith(gpuBackends: readonly string[]): number {
  return processBytes + (gpuBackends.includes("CUDA") ? cudaBytes : 0);
}

/** What kv_type of ffi/native/engine.cpp knows. */
export const kvTypes = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"] as const;
/** Direct reads are aligned to this (kDirectAlign of ffi/native/platform.h). */
const directAlignBytes = 4096;

export function sumOf(use: MemoryUse | GpuMemoryUse): number {
  return Object.values(use).reduce((sum: number, bytes: number) => sum + bytes, 0);
}

export interface Use {
  /** Of one slot. */
  readonly contextTokens: number;
  readonly slotCount: number;
  readonly ubatchTokens: number;
  readonly kvType: string;
  /** llama.cpp's n_gpu_layers: so many of the last layers, the output counting as one. */
  readonly gpuLayers: number;
  readonly processBytes: number;
}

/** The first block on a GPU (i_gpu_start of load_tensors in src/llama-model.cpp). */
function firstGpuLayer(model: Model, gpuLayers: number): number {
  const all = model.layerCount + model.mtpLayerCount;
  return gpuLayers === 0 ? all : Math.max(0, all + 1 - gpuLayers);
}

/** Every block and the output. */
export function allGpuLayers(model: Model): number {
  return model.layerCount + model.mtpLayerCount + 1;
}

/** Where llama.cpp puts a tensor that nobody streams: embeddings stay with the processor (dev_input), the output counts last. */
export function isOnGpu(model: Model, tensor: ModelTensor, gpuLayers: number): boolean {
  if (gpuLayers === 0 || tensor.role === "embedding") {
    return false;
  }
  return tensor.layer === null || tensor.layer >= firstGpuLayer(model, gpuLayers);
}

/** The embedding once more: a GPU that computes the output of a model without an output matrix has its own copy. */
export function copiedOutputBytes(model: Model, gpuLayers: number): number {
  if (gpuLayers === 0 || !model.tiedOutput) {
    return 0;
  }
  return model.tensors.find((tensor) => tensor.name === "token_embd.weight")?.sizeBytes ?? 0;
}

/** Memory without weights and pool. */
export function memoryOf(
  model: Model,
  use: Use,
  streams: boolean,
): { readonly ram: MemoryUse; readonly gpu: GpuMemoryUse } {
  const first = firstGpuLayer(model, use.gpuLayers);
  const kvUse: KvUse = {
    keyType: use.kvType,
    valueType: use.kvType,
    contextTokens: use.contextTokens * use.slotCount,
    batchTokens: use.ubatchTokens,
    sequenceCount: use.slotCount,
  };
  const side = (wanted: (layer: number) => boolean) =>
    memoryBytes({ ...model, memoryLayers: model.memoryLayers.filter(({ layer }) => wanted(layer)) }, kvUse);
  const compute = computeBytes(model, use);
  const allOnGpu = !streams && use.gpuLayers >= allGpuLayers(model);
  return {
    ram: {
      weightBytes: 0,
      ...side((layer) => layer < first),
      // With every product on a GPU the processor only looks rows up.
      computeBytes: allOnGpu ? 4 * use.ubatchTokens * model.embeddingLength : compute,
      poolBytes: 0,
      streamingBytes: streams ? streamingBytes(model, use) : 0,
      draftBytes: 0,
      projectorBytes: 0,
      processBytes: use.processBytes,
    },
    gpu: {
      weightBytes: 0,
      ...side((layer) => layer >= first),
      computeBytes: use.gpuLayers === 0 ? 0 : compute,
    },
  };
}

/**
 * Bytes of the graph's scratch for one micro-batch of u tokens over the n cells of KV of one slot:
 * u * (4 * floats + 2 * n + 24) + 4 * vocab * outputs. Floats are what the phase of a block that needs most holds at once
 * for a token, the masks of attention are in f16, 24 bytes are the numbers of a token. A test holds it against llama.cpp's
 * own allocation; on real models it is within 1 % of it.
 */
function computeBytes(model: Model, use: Use): number {
  const window = Math.max(0, ...model.memoryLayers.map(({ windowTokens }) => windowTokens ?? 0));
  const windowCells = window === 0 ? 0 : Math.min(use.contextTokens, window + use.ubatchTokens + 256);
  const floats = Math.max(...phaseFloats(model));
  return (
    use.ubatchTokens * (4 * floats + 2 * (use.contextTokens + windowCells) + 24) +
    4 * model.vocabularySize * use.slotCount
  );
}

/**
 * Each phase keeps the block's input and about three more rows of the embedding's width. A feed-forward holds gate, up
 * and what becomes of them; with experts that for each one used, and the answers of all where these do not fit into the
 * place that gate and up leave; attention holds queries before and after they are turned, keys and values likewise, and
 * its answer.
 */
function phaseFloats(model: Model): readonly number[] {
  const { embeddingLength: width, expertFeedForwardLength: expertWidth, keyLength, valueLength } = model;
  const answer = width > 2 * expertWidth ? width : 0;
  const phases = [
    4 * width + 3 * model.feedForwardLength,
    4 * width + model.expertUsedCount * (3 * expertWidth + answer) + 2 * model.expertCount,
    5 * width + 3 * model.sharedExpertCount * expertWidth,
    4 * width +
      model.headCount * (2 * keyLength + valueLength) +
      2 * model.kvHeadCount * (keyLength + valueLength),
  ];
  // What recurrent blocks and caches of further kinds hold follows sizes of their own; this was enough where it was tried.
  const isUsual = model.memoryLayers.every((one) => one.stateElements === 0 && one.extraKeyElements === 0);
  const experts = model.expertUsedCount * (3 * expertWidth + width);
  return isUsual ? phases : [...phases, 7 * width + Math.max(2 * model.feedForwardLength, experts)];
}

/** Bound of the work memory of one product over several slots. */
export const spanWorkBytes = 16_777_216;

/**
 * ffi/native/backend.cpp, Computer: rows gathered for two experts at a time, ids and indices; the delegate's work
 * memory for a product over a span of slots; and the routers' copies. The readers' bounce buffers are not in it: in a
 * pool in this process's memory no stride of a plan goes through one, and what is not touched takes no memory.
 */
function streamingBytes(model: Model, use: Use): number {
  let widest = 0;
  for (const set of model.strides) {
    const [columns = 0, rows = 0] = model.tensors[set.tensorIndex]?.shape ?? [];
    widest = Math.max(widest, columns + rows);
  }
  const gather =
    2 * 4 * use.ubatchTokens * widest + 20 * use.ubatchTokens * Math.max(1, model.expertCount) + 1_048_576;
  return gather + spanWorkBytes + predictionBytes(model);
}

/** Distance of two slots: room for a stride at any page phase (min_slot_bytes of ffi/native/stream.h). */
export function slotBytesOf(strideBytes: number): number {
  return Math.floor((strideBytes + 2 * directAlignBytes - 2) / directAlignBytes) * directAlignBytes;
}

/**
 * A draft model beside the model of `use`: all of its weights on the processor's side, and a context of its own that
 * holds what the model's holds (common_speculative_init_from_params of common/speculative.cpp).
 */
export function draftMemoryBytes(draft: Model, use: Use): number {
  const { ram } = memoryOf(draft, { ...use, gpuLayers: 0 }, false);
  return draft.tensorBytes + ram.kvBytes + ram.stateBytes + ram.computeBytes;
}

/**
 * The context of MTP layers, which holds what the model's holds for one layer, its scratch, and the rows that go from
 * one to the other: of the batch, in f32 (common_speculative_impl_draft_mtp of common/speculative.cpp).
 */
export function mtpMemoryBytes(model: Model, use: Use): number {
  const last = { ...model, memoryLayers: model.memoryLayers.slice(-model.mtpLayerCount) };
  const { ram } = memoryOf(last, { ...use, gpuLayers: 0 }, false);
  return ram.kvBytes + ram.computeBytes + 3 * 4 * use.ubatchTokens * model.embeddingLength;
}

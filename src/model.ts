// Gguf -> Model: what each tensor is for, which of them can stream and in which strides, how many bytes a token
// touches and how many its context costs. It owns the meaning of names, shapes and keys; it must not know any
// machine (plan.ts weighs one against the other) and is pure. What it does not recognise it calls "other" and
// leaves resident: a wrong guess would stream a tensor that an operation reads behind the streamer's back.
//
// Names are those of LLM_TENSOR_NAMES and keys those of LLM_KV_NAMES in llama.cpp v0.5.0's src/llama-arch.cpp.

import {
  architectureNames,
  diffusionArchitectures,
  encoderArchitectures,
  fileTypeNames,
  hybridArchitectures,
  indexerArchitectures,
  recurrentArchitectures,
  slidingRules,
} from "./architectures";
import { HypuraError } from "./errors";
import { type Gguf, type GgufTensor, type GgufValue, tensorTypes } from "./gguf";

export type Role =
  | "attention"
  | "norm"
  | "embedding"
  | "output"
  | "router"
  | "dense-ffn"
  | "expert"
  /** gate and up of all experts in one tensor */
  | "expert-gate-up"
  /** biases and scales of experts: one row or one number each, added beside the expert product */
  | "expert-bias"
  | "shared-expert"
  /** state-space, linear-attention, RWKV and short-convolution parts */
  | "recurrent"
  /** multi-token-prediction layers, which ordinary decoding does not evaluate */
  | "mtp"
  | "vision"
  | "rope"
  /** what llama.cpp knows around the blocks: hyper-connections, altup, laurel, per-layer inputs */
  | "mixing"
  | "other";

/** Strides of one tensor: `count` consecutive pieces of `strideBytes`, which is the whole tensor. */
export interface StrideSet {
  readonly tensorIndex: number;
  readonly strideCount: number;
  readonly strideBytes: number;
  /** Strides that one token touches: experts used, or 1 for a dense tensor. */
  readonly touchedCount: number;
}

export interface ModelTensor extends GgufTensor {
  /** Position in `Model.tensors` and in `Gguf.tensors`. */
  readonly index: number;
  readonly role: Role;
  /** The block the name states; null outside the blocks. */
  readonly layer: number | null;
  readonly strides: StrideSet | null;
  /** Bytes of this tensor that decoding one token reads. */
  readonly touchedBytesPerToken: number;
}

/** What one layer keeps of the past. A layer can have a KV cache, a recurrent state, both or neither. */
export interface MemoryLayer {
  readonly layer: number;
  /** Elements of one token's key and value; 0 where there is none. With MLA the value is part of the key. */
  readonly keyElements: number;
  readonly valueElements: number;
  /** Only the last so many tokens are kept; null: all. */
  readonly windowTokens: number | null;
  /** One more cache, with one entry for every `compression` tokens (1: each token). */
  readonly extraKeyElements: number;
  readonly extraValueElements: number;
  readonly compression: number;
  /** Elements (f32) of the state of one sequence, of whatever length. */
  readonly stateElements: number;
}

export interface Model {
  readonly architecture: string;
  readonly name: string | null;
  /** `general.file_type` in words, e.g. "Q4_K_M"; null where the file does not say. */
  readonly fileTypeName: string | null;
  readonly parameterCount: number;
  readonly tensorBytes: number;
  /** Blocks that decoding evaluates; MTP blocks follow them. */
  readonly layerCount: number;
  readonly mtpLayerCount: number;
  readonly embeddingLength: number;
  /** The largest of all layers, where layers differ. */
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly keyLength: number;
  readonly valueLength: number;
  readonly feedForwardLength: number;
  readonly expertFeedForwardLength: number;
  readonly vocabularySize: number;
  readonly trainedContextTokens: number;
  readonly expertCount: number;
  /** The largest of all layers. */
  readonly expertUsedCount: number;
  readonly sharedExpertCount: number;
  /** No output matrix of its own: the embedding is read whole for every token. */
  readonly tiedOutput: boolean;
  readonly hasChatTemplate: boolean;
  /** False for models that only embed text. */
  readonly generatesText: boolean;
  readonly kind: "dense" | "mixture-of-experts";
  readonly tensors: readonly ModelTensor[];
  /** Everything that may stream, in file order. */
  readonly strides: readonly StrideSet[];
  readonly bytesByType: ReadonlyMap<string, number>;
  readonly bytesByRole: ReadonlyMap<Role, number>;
  readonly touchedBytesPerToken: number;
  readonly memoryLayers: readonly MemoryLayer[];
}

/** LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of src/llama-hparams.h. */
const maxLayerCount = 512;
const maxExpertCount = 1024;

// ---- keys -----------------------------------------------------------------------------------------------------

/** Typed access to the metadata of one architecture; a key of the wrong kind is an error, not a default. */
interface Keys {
  readonly architecture: string;
  readonly fileName: string;
  text(key: string): string | null;
  flag(key: string): boolean | null;
  /** Whole number under `<architecture>.<key>`. */
  count(key: string): number | null;
  requiredCount(key: string): number;
  /** One number for all layers, or an array with one for each; null where the key is missing. */
  perLayer(key: string, layerCount: number): readonly number[] | null;
  array(key: string): readonly number[] | null;
  arrayLength(fullKey: string): number | null;
}

function corrupt(fileName: string, sentence: string): HypuraError {
  return new HypuraError(
    "corrupt-model",
    `${JSON.stringify(fileName)} is damaged: ${sentence}; download or convert it again`,
  );
}

function toCount(value: GgufValue | undefined): number | null {
  if (typeof value === "boolean") return value ? 1 : 0;
  return typeof value === "number" && Number.isInteger(value) && value >= 0 ? value : null;
}

function openKeys(gguf: Gguf, architecture: string, fileName: string): Keys {
  const { metadata } = gguf;

  function arrayOf(key: string): readonly number[] | null {
    const fullKey = `${architecture}.${key}`;
    const value = metadata.get(fullKey);
    if (value === undefined || typeof value !== "object") return null;
    if (value.values === null)
      throw corrupt(fileName, `${fullKey} has ${value.count} elements, at most ${maxLayerCount} make sense`);
    return value.values.map((element) => {
      // Signed arrays use -1 for "none" in keys that are of no interest here; a count is never negative.
      if (typeof element === "number" && Number.isFinite(element)) return Math.max(0, Math.trunc(element));
      if (typeof element === "boolean") return element ? 1 : 0;
      throw corrupt(fileName, `${fullKey} holds something that is no number`);
    });
  }

  function count(key: string): number | null {
    const fullKey = `${architecture}.${key}`;
    const value = metadata.get(fullKey);
    if (value === undefined) return null;
    const number = toCount(value);
    if (number === null || number > 0xffff_ffff)
      throw corrupt(fileName, `${fullKey} is no whole number of 32 bits`);
    return number;
  }

  return {
    architecture,
    fileName,
    text(key) {
      const value = metadata.get(key);
      return typeof value === "string" ? value : null;
    },
    flag(key) {
      const value = metadata.get(`${architecture}.${key}`);
      return typeof value === "boolean" ? value : null;
    },
    count,
    requiredCount(key) {
      const number = count(key);
      if (number === null) throw corrupt(fileName, `the key ${architecture}.${key} is missing`);
      return number;
    },
    perLayer(key, layerCount) {
      const values = arrayOf(key);
      if (values === null) {
        const number = count(key);
        return number === null ? null : new Array<number>(layerCount).fill(number);
      }
      // get_key_or_arr in src/llama-model-loader.cpp demands the exact length.
      if (values.length !== layerCount) {
        throw corrupt(
          fileName,
          `${architecture}.${key} has ${values.length} elements for ${layerCount} layers`,
        );
      }
      return values;
    },
    array: arrayOf,
    arrayLength(fullKey) {
      const value = metadata.get(fullKey);
      return typeof value === "object" ? value.count : null;
    },
  };
}

// ---- tensors --------------------------------------------------------------------------------------------------

interface TensorName {
  readonly layer: number | null;
  /** "" for the usual `blk.`, else the prefix before it: "enc", "dec". */
  readonly stack: string;
  /** Without block and suffix: `ffn_up_exps`. */
  readonly base: string;
  /** "weight", "bias", "scale", "input_scale", or "". */
  readonly suffix: string;
}

function splitTensorName(name: string): TensorName {
  const block = /^(?:(enc|dec)\.)?blk\.(\d{1,6})\.(.+)$/.exec(name);
  const rest = block?.[3] ?? name;
  const suffix = /\.(weight|bias|scale|input_scale)$/.exec(rest);
  return {
    layer: block === null ? null : Number(block[2]),
    stack: block?.[1] ?? "",
    base: suffix === null ? rest : rest.slice(0, suffix.index),
    suffix: suffix?.[1] ?? "",
  };
}

/** Roles by name inside a block, first match wins; expert and dense matrices are decided by shape below. */
const blockRoles: readonly (readonly [RegExp, Role])[] = [
  [/^nextn\./, "mtp"],
  [/^vis_/, "vision"],
  [/^(hc|ple|altup|laurel)_/, "mixing"],
  [
    /^(inp_gate|proj|post_norm|layer_output_scale|(attn|ffn)_res_score|(attn|ffn)_conv_(base|proj))$/,
    "mixing",
  ],
  [/^ffn_(gate_up|gate|up|down)_(ch)?exps$/, "expert-bias"],
  [/^ffn_(gate_inp|gate_inp_shexp|gate_tid2eid)$|^exp_probs_b(_vl)?$/, "router"],
  [/^ffn_(gate|up|down)_shexp$|^ffn_latent_(down|up)$|^ffn_routed_(down|up)$/, "shared-expert"],
  [/^ffn_(gate|up|down)$|^ffn\.act$/, "dense-ffn"],
  [/^(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)$/, "rope"],
  [/^(ssm|time_mix|channel_mix)_|^shortconv\./, "recurrent"],
  [/(^|_|\.)(k_|q_)?norm(_\d|_exps)?$/, "norm"],
  [/^(cross_)?attn_|^indexer[._]/, "attention"],
];

/** Roles by name outside the blocks. */
const globalRoles: readonly (readonly [RegExp, Role])[] = [
  [/^(v|a|mm|resampler|adapter)\./, "vision"],
  [/^(token_embd|position_embd|token_types|per_layer_token_embd)$/, "embedding"],
  [/^(output|cls|cls\.output|dense_2|dense_3|d2t|fc|markov_w[12]|conf_proj)$/, "output"],
  [/^selector_(predecessor|successor|hidden)$|^masked_embd_(centroids|ordering)$/, "output"],
  [/^(rope_freqs|rope_factors_long|rope_factors_short)$/, "rope"],
  [/^(output_hc_|altup_|per_layer_|hrm\.)|^output_res_score$/, "mixing"],
  [/^nextn\./, "mtp"],
  [/(^|_|\.)norm$/, "norm"],
  [/^(conv1d$|convnext\.|posnet\.)/, "recurrent"],
];

/** Read by row (get_rows) and not by matrix product: a token touches one row. */
const rowTables = /^(token_embd|position_embd|token_types|per_layer_token_embd|ffn_gate_tid2eid)$/;

interface Shape {
  readonly expertCount: number;
  readonly layerCount: number;
  readonly mtpLayerCount: number;
  readonly usedByLayer: readonly number[];
}

function roleByName(name: TensorName): Role {
  const rules = name.layer === null ? globalRoles : blockRoles;
  for (const [pattern, role] of rules) if (pattern.test(name.base)) return role;
  return "other";
}

/** True for the stacked experts of a layer: {n_in, n_out, n_expert}, or one of their groups (grovemoe). */
function isExpertStack(tensor: GgufTensor, name: TensorName, shape: Shape): boolean {
  const count = tensor.shape[2] ?? 1;
  if (name.suffix !== "weight" || shape.expertCount === 0 || tensor.shape.length > 3) return false;
  if (name.base.endsWith("_chexps")) return shape.expertCount % count === 0;
  return count === shape.expertCount;
}

function roleOf(tensor: GgufTensor, name: TensorName, shape: Shape): Role {
  const role = roleByName(name);
  const { layer } = name;
  // The blocks after the last evaluated one are MTP blocks, whatever their tensors are called.
  if (layer !== null && name.stack === "" && shape.mtpLayerCount > 0 && layer >= shape.layerCount)
    return "mtp";
  if (role !== "expert-bias") return role;
  if (name.suffix !== "weight") return "expert-bias";
  if (!isExpertStack(tensor, name, shape)) return "other";
  return name.base.startsWith("ffn_gate_up_") ? "expert-gate-up" : "expert";
}

/** What may stream: stacked experts, and the dense FFN matrices of the ordinary blocks. */
function stridesOf(
  tensor: GgufTensor,
  place: { index: number; name: TensorName; role: Role },
  shape: Shape,
): StrideSet | null {
  const { index: tensorIndex, name, role } = place;
  if (name.layer === null || name.stack !== "" || name.suffix !== "weight") return null;
  if (role === "expert" || role === "expert-gate-up") {
    const strideCount = tensor.shape[2] ?? 1;
    const used = shape.usedByLayer[name.layer] ?? 0;
    return {
      tensorIndex,
      strideCount,
      strideBytes: tensor.sizeBytes / strideCount,
      touchedCount: Math.min(used, strideCount),
    };
  }
  const isMatrix = tensor.shape.length === 2 && name.base !== "ffn.act";
  return role === "dense-ffn" && isMatrix
    ? { tensorIndex, strideCount: 1, strideBytes: tensor.sizeBytes, touchedCount: 1 }
    : null;
}

function touchedBytes(
  tensor: GgufTensor,
  place: { name: TensorName; role: Role; strides: StrideSet | null; tied: boolean },
): number {
  const { name, role, strides } = place;
  // MTP and vision parts rest while text is decoded; an encoder runs once per prompt.
  if (role === "mtp" || role === "vision" || name.stack === "enc") return 0;
  if (strides !== null) return strides.strideBytes * strides.touchedCount;
  if (!rowTables.test(name.base) || (name.base === "token_embd" && place.tied)) return tensor.sizeBytes;
  return tensor.sizeBytes / (tensor.shape[1] ?? 1);
}

/** How often a token passes a block: looped architectures walk the same weights several times. */
function passesOf(keys: Keys): (layer: number | null) => number {
  if (keys.architecture === "nanbeige") {
    const loops = Math.max(1, keys.count("num_loops") ?? 1);
    return (layer) => (layer === null ? 1 : loops);
  }
  if (keys.architecture === "hrm_text") {
    const perStack = keys.count("hrm.layers_per_stack") ?? 1;
    const high = Math.max(1, keys.count("hrm.h_cycles") ?? 1);
    const low = high * Math.max(1, keys.count("hrm.l_cycles") ?? 1);
    return (layer) => (layer === null ? 1 : layer < perStack ? low : high);
  }
  return () => 1;
}

function describeTensors(
  gguf: Gguf,
  shape: Shape,
  tied: boolean,
  passes: (layer: number | null) => number,
): ModelTensor[] {
  return gguf.tensors.map((tensor, index) => {
    const name = splitTensorName(tensor.name);
    const role = roleOf(tensor, name, shape);
    const strides = stridesOf(tensor, { index, name, role }, shape);
    const touched = touchedBytes(tensor, { name, role, strides, tied }) * passes(name.layer);
    return { ...tensor, index, role, layer: name.layer, strides, touchedBytesPerToken: touched };
  });
}

// ---- memory of the past ---------------------------------------------------------------------------------------

interface Heads {
  readonly headCounts: readonly number[];
  readonly kvHeadCounts: readonly number[];
  readonly feedForwardLengths: readonly number[];
  readonly keyLength: number;
  readonly valueLength: number;
}

/** load_hparams in src/llama-model.cpp. */
function readHeads(keys: Keys, layerCountAll: number, embeddingLength: number): Heads {
  const zeros = new Array<number>(layerCountAll).fill(0);
  const headCounts = keys.perLayer("attention.head_count", layerCountAll) ?? zeros;
  const kvHeadCounts = keys.perLayer("attention.head_count_kv", layerCountAll) ?? headCounts;
  const first = headCounts[0] ?? 0;
  const derived = first > 0 ? Math.floor(embeddingLength / first) : 0;
  return {
    headCounts,
    kvHeadCounts,
    feedForwardLengths: keys.perLayer("feed_forward_length", layerCountAll) ?? zeros,
    keyLength: first > 0 ? (keys.count("attention.key_length") ?? derived) : 0,
    valueLength: first > 0 ? (keys.count("attention.value_length") ?? derived) : 0,
  };
}

/** The window of each layer, null where a layer sees everything. */
function readWindows(keys: Keys, layerCount: number): readonly (number | null)[] {
  const full = new Array<number | null>(layerCount).fill(null);
  const rule = slidingRules.get(keys.architecture);
  if (rule === undefined || (rule.onlyLayerCount ?? layerCount) !== layerCount) return full;
  const stated = keys.count("attention.sliding_window");
  if (stated === 0) return full;
  const window = stated === null ? rule.defaultWindowTokens : (rule.fixedWindowTokens ?? stated);
  if (window === undefined) return full;
  const pattern = keys.array("attention.sliding_window_pattern");
  if (pattern !== null) return full.map((_, layer) => ((pattern[layer] ?? 0) !== 0 ? window : null));
  if (rule.everyLayers === null) return full;
  // set_swa_pattern in src/llama-hparams.cpp. A pattern given as a number replaces the architecture's own.
  const every =
    rule.everyLayers === 0 ? 0 : (keys.count("attention.sliding_window_pattern") ?? rule.everyLayers);
  return full.map((_, layer) => {
    if (every === 0) return window;
    const isFull = rule.fullFirst === true ? layer % every === 0 : layer % every === every - 1;
    return isFull ? null : window;
  });
}

/** Elements of the state of a recurrent layer: n_embd_r() + n_embd_s() of src/llama-hparams.cpp. */
function stateElements(keys: Keys, heads: Heads, embeddingLength: number): number {
  const number = (key: string): number => keys.count(key) ?? 0;
  const wkvHeadSize = number("wkv.head_size");
  if (wkvHeadSize > 0) return embeddingLength * ((keys.count("token_shift_count") ?? 2) + wkvHeadSize);
  const shortConvolution = number("shortconv.l_cache");
  if (shortConvolution > 0) return embeddingLength * (shortConvolution - 1);
  const convolution = number("ssm.conv_kernel");
  const headCount = heads.headCounts[0] ?? 0;
  const kdaLength = number("kda.head_dim");
  if (kdaLength > 0) {
    return kdaLength * headCount * (3 * (convolution > 0 ? convolution - 1 : 3) + kdaLength);
  }
  if (keys.architecture === "minimax-01") return heads.keyLength * heads.keyLength * headCount;
  const inner = number("ssm.inner_size");
  const state = number("ssm.state_size");
  const groups = number("ssm.group_count");
  return Math.max(0, convolution - 1) * (inner + 2 * groups * state) + state * inner;
}

/** Which layers keep a recurrent state and which a KV cache. */
function readLayerKinds(
  keys: Keys,
  heads: Heads,
  layerCount: number,
): readonly { state: boolean; kv: boolean }[] {
  const layers = Array.from({ length: layerCount }, (_, layer) => layer);
  const { architecture } = keys;
  if (recurrentArchitectures.has(architecture)) return layers.map(() => ({ state: true, kv: false }));
  if (encoderArchitectures.has(architecture) || diffusionArchitectures.has(architecture)) {
    return layers.map(() => ({ state: false, kv: false }));
  }
  const rule = hybridArchitectures.get(architecture);
  const noKv = (layer: number): boolean => heads.kvHeadCounts[layer] === 0;
  if (rule === undefined) return layers.map(() => ({ state: false, kv: true }));
  if (rule === "both") return layers.map(() => ({ state: true, kv: true }));
  if (rule === "kv-heads") return layers.map((layer) => ({ state: noKv(layer), kv: !noKv(layer) }));
  if (rule === "nemotron") {
    const noFfn = (layer: number): boolean => heads.feedForwardLengths[layer] === 0;
    return layers.map((layer) => ({ state: noKv(layer) && noFfn(layer), kv: !noKv(layer) && noFfn(layer) }));
  }
  const stated = keys.array("attention.recurrent_layers");
  const every = Math.max(1, keys.count("full_attention_interval") ?? rule);
  return layers.map((layer) => {
    const state = stated === null ? (layer + 1) % every !== 0 : (stated[layer] ?? 0) !== 0;
    return { state, kv: !state };
  });
}

/** gemma3n and gemma4: the last layers use the keys of earlier ones. */
function ownKvLayerCount(keys: Keys, layerCount: number): number {
  if (keys.architecture === "gemma3n") return Math.min(20, layerCount);
  if (keys.architecture === "gemma4")
    return Math.max(0, layerCount - (keys.count("attention.shared_kv_layers") ?? 0));
  return layerCount;
}

/** The caches beside the main one: compressed keys of DeepSeek 4, keys of sparse-attention indexers. */
function readExtraCache(
  keys: Keys,
  layer: number,
  keyLength: number,
): Pick<MemoryLayer, "extraKeyElements" | "extraValueElements" | "compression"> {
  const none = { extraKeyElements: 0, extraValueElements: 0, compression: 1 };
  const indexer = keys.count("attention.indexer.key_length") ?? 0;
  if (keys.architecture === "deepseek4") {
    const ratio = keys.array("attention.compress_ratios")?.[layer] ?? 0;
    if (ratio === 0) return none;
    return { ...none, extraKeyElements: keyLength + (ratio === 4 ? indexer : 0), compression: ratio };
  }
  if (!indexerArchitectures.has(keys.architecture) || indexer === 0) return none;
  if (keys.architecture === "minimax-m3") {
    const isDense = layer < (keys.count("leading_dense_block_count") ?? 0);
    return isDense
      ? none
      : {
          ...none,
          extraKeyElements: indexer,
          extraValueElements: keys.count("attention.value_length") ?? indexer,
        };
  }
  // A layer without an indexer of its own reuses an earlier one; where the file does not say, all have one.
  const owns = (keys.array("attention.indexer.types")?.[layer] ?? 1) !== 0;
  return owns ? { ...none, extraKeyElements: indexer } : none;
}

function readMemoryLayers(
  keys: Keys,
  heads: Heads,
  layerCount: number,
  embeddingLength: number,
): MemoryLayer[] {
  const windows = readWindows(keys, layerCount);
  const kinds = readLayerKinds(keys, heads, layerCount);
  const state = stateElements(keys, heads, embeddingLength);
  const ownKv = ownKvLayerCount(keys, layerCount);
  // is_mla() of src/llama-hparams.cpp: keys hold the compressed values too (kv_lora_rank + rope dimensions).
  const isMla =
    (keys.count("attention.key_length_mla") ?? 0) > 0 && (keys.count("attention.value_length_mla") ?? 0) > 0;
  const keyOnly = isMla || keys.architecture === "deepseek4";
  const keyLengthSliding = keys.count("attention.key_length_swa") ?? heads.keyLength;
  const valueLengthSliding = keys.count("attention.value_length_swa") ?? heads.valueLength;
  return kinds.map((kind, layer) => {
    const windowTokens = kind.kv ? (windows[layer] ?? null) : null;
    const slides = windowTokens !== null;
    const kvHeads = kind.kv && layer < ownKv ? (heads.kvHeadCounts[layer] ?? 0) : 0;
    const extra =
      kvHeads > 0
        ? readExtraCache(keys, layer, heads.keyLength)
        : { extraKeyElements: 0, extraValueElements: 0, compression: 1 };
    return {
      layer,
      keyElements: kvHeads * (slides ? keyLengthSliding : heads.keyLength),
      valueElements: keyOnly ? 0 : kvHeads * (slides ? valueLengthSliding : heads.valueLength),
      windowTokens,
      ...extra,
      stateElements: kind.state ? state : 0,
    };
  });
}

/** ggml_row_size: bytes of so many elements of a type; a started block counts whole. */
function rowBytes(elements: number, typeName: string): number {
  for (const type of tensorTypes.values()) {
    if (type.name === typeName) return Math.ceil(elements / type.blockElements) * type.blockBytes;
  }
  throw new HypuraError(
    "usage",
    `there is no tensor type ${JSON.stringify(typeName)}; use f16, bf16, f32, q8_0, q4_0 or the like`,
  );
}

export interface KvTypes {
  readonly keyType: string;
  readonly valueType: string;
}

/** Bytes that one more token of context costs while every layer still keeps it. */
export function kvBytesPerToken(model: Model, types: KvTypes): number {
  return model.memoryLayers.reduce((sum, layer) => sum + kvLayerBytesPerToken(layer, types), 0);
}

export function kvLayerBytesPerToken(layer: MemoryLayer, types: KvTypes): number {
  const main = rowBytes(layer.keyElements, types.keyType) + rowBytes(layer.valueElements, types.valueType);
  const extra =
    rowBytes(layer.extraKeyElements, types.keyType) + rowBytes(layer.extraValueElements, types.valueType);
  return main + extra / layer.compression;
}

/** llama-context.cpp and llama-kv-cache-iswa.cpp round cache sizes up to this many cells. */
const cellStep = 256;

function roundUpCells(cells: number): number {
  return Math.ceil(cells / cellStep) * cellStep;
}

export interface KvUse extends KvTypes {
  /** Context of all sequences together; each has its share as a cache of its own (kv_unified is off). */
  readonly contextTokens: number;
  /** Largest physical batch (n_ubatch): a sliding layer keeps its window and one batch. */
  readonly batchTokens: number;
  readonly sequenceCount: number;
}

/** Bytes of KV caches and recurrent states that llama.cpp allocates for a context. */
export function memoryBytes(
  model: Model,
  use: KvUse,
): { readonly kvBytes: number; readonly stateBytes: number } {
  const cellsOfOne = roundUpCells(Math.ceil(use.contextTokens / use.sequenceCount));
  const cells = cellsOfOne * use.sequenceCount;
  let kvBytes = 0;
  let stateBytes = 0;
  for (const layer of model.memoryLayers) {
    const own =
      layer.windowTokens === null
        ? cells
        : use.sequenceCount * Math.min(cellsOfOne, roundUpCells(layer.windowTokens + use.batchTokens));
    const extraCells = layer.compression === 1 ? cells : roundUpCells(cells / layer.compression);
    kvBytes +=
      own * (rowBytes(layer.keyElements, use.keyType) + rowBytes(layer.valueElements, use.valueType));
    kvBytes +=
      extraCells *
      (rowBytes(layer.extraKeyElements, use.keyType) + rowBytes(layer.extraValueElements, use.valueType));
    stateBytes += layer.stateElements * 4 * use.sequenceCount;
  }
  return { kvBytes, stateBytes };
}

// ---- the model ------------------------------------------------------------------------------------------------

function readArchitecture(gguf: Gguf, fileName: string): string {
  const architecture = gguf.metadata.get("general.architecture");
  const quoted = JSON.stringify(fileName);
  if (typeof architecture !== "string") {
    throw new HypuraError(
      "corrupt-model",
      `${quoted} does not name its architecture (general.architecture is missing): convert it again`,
    );
  }
  if (architecture === "clip" || gguf.metadata.get("general.type") === "mmproj") {
    throw new HypuraError(
      "unsupported-model",
      `${quoted} is the vision projector of a model (mmproj), not a language model: give the model's own .gguf file`,
    );
  }
  if (gguf.metadata.get("general.type") === "adapter") {
    throw new HypuraError(
      "unsupported-model",
      `${quoted} is a LoRA adapter, not a whole model: give the model it belongs to`,
    );
  }
  if (!architectureNames.has(architecture)) {
    throw new HypuraError(
      "unsupported-model",
      `${quoted} has the architecture ${JSON.stringify(architecture.slice(0, 64))}, which llama.cpp v0.5.0 does not know: use another model or a newer hypura`,
    );
  }
  return architecture;
}

function readLayerCounts(keys: Keys): { layerCount: number; mtpLayerCount: number } {
  const all = keys.requiredCount("block_count");
  if (all < 1 || all > maxLayerCount)
    throw corrupt(keys.fileName, `block_count is ${all}, not between 1 and ${maxLayerCount}`);
  const mtp = keys.count("nextn_predict_layers") ?? 0;
  if (mtp > all) throw corrupt(keys.fileName, `nextn_predict_layers is ${mtp} of ${all} layers`);
  // A file of MTP layers only (a draft head) evaluates them.
  return mtp === all ? { layerCount: all, mtpLayerCount: 0 } : { layerCount: all - mtp, mtpLayerCount: mtp };
}

function readExperts(
  keys: Keys,
  layerCountAll: number,
): { expertCount: number; usedByLayer: readonly number[] } {
  const expertCount = keys.count("expert_count") ?? 0;
  const usedByLayer =
    keys.perLayer("expert_used_count", layerCountAll) ?? new Array<number>(layerCountAll).fill(0);
  const used = largest(usedByLayer);
  // Hunyuan's dense models carry an expert count of 1 (load_hparams).
  if (expertCount <= 1 && keys.architecture.startsWith("hunyuan"))
    return { expertCount: 0, usedByLayer: usedByLayer.map(() => 0) };
  if (expertCount > maxExpertCount)
    throw corrupt(keys.fileName, `expert_count is ${expertCount}, the limit is ${maxExpertCount}`);
  if (used > expertCount)
    throw corrupt(keys.fileName, `expert_used_count is ${used} of ${expertCount} experts`);
  if (expertCount > 0 && used === 0)
    throw corrupt(keys.fileName, `it has ${expertCount} experts but expert_used_count is missing or 0`);
  return { expertCount, usedByLayer };
}

function largest(values: readonly number[]): number {
  return values.reduce((max, value) => Math.max(max, value), 0);
}

function sumBy<Key>(
  tensors: readonly ModelTensor[],
  key: (tensor: ModelTensor) => Key,
): ReadonlyMap<Key, number> {
  const sums = new Map<Key, number>();
  for (const tensor of tensors) sums.set(key(tensor), (sums.get(key(tensor)) ?? 0) + tensor.sizeBytes);
  return new Map([...sums].sort((a, b) => b[1] - a[1]));
}

function checkUsable(gguf: Gguf, fileName: string): void {
  if (gguf.tensors.length === 0) {
    throw new HypuraError(
      "unsupported-model",
      `${JSON.stringify(fileName)} holds metadata but no tensors (a vocabulary file): give the model itself`,
    );
  }
}

/** The looped architectures keep a KV cache for every pass of every block. */
function memoryLayersOf(
  keys: Keys,
  heads: Heads,
  layerCount: number,
  embeddingLength: number,
): MemoryLayer[] {
  const layers = readMemoryLayers(keys, heads, layerCount, embeddingLength);
  if (keys.architecture !== "nanbeige") return layers;
  const loops = Math.max(1, keys.count("num_loops") ?? 1);
  if (loops * layerCount > maxLayerCount)
    throw corrupt(keys.fileName, `num_loops is ${loops} for ${layerCount} layers`);
  return Array.from({ length: loops }, () => layers).flat();
}

function readVocabularySize(gguf: Gguf, keys: Keys): number {
  const stated = keys.count("vocab_size") ?? keys.arrayLength("tokenizer.ggml.tokens");
  return stated ?? gguf.tensors.find((tensor) => tensor.name === "token_embd.weight")?.shape[1] ?? 0;
}

/** What the model is. Throws where the file contradicts itself or llama.cpp has no such architecture. */
export function describeModel(gguf: Gguf): Model {
  const fileName = gguf.files[0]?.name ?? "";
  const architecture = readArchitecture(gguf, fileName);
  checkUsable(gguf, fileName);
  const keys = openKeys(gguf, architecture, fileName);
  const { layerCount, mtpLayerCount } = readLayerCounts(keys);
  const layerCountAll = layerCount + mtpLayerCount;
  const embeddingLength = keys.requiredCount("embedding_length");
  const trainedContextTokens = keys.requiredCount("context_length");
  const heads = readHeads(keys, layerCountAll, embeddingLength);
  const { expertCount, usedByLayer } = readExperts(keys, layerCountAll);
  const generatesText = !encoderArchitectures.has(architecture);
  const tiedOutput = generatesText && !gguf.tensors.some((tensor) => tensor.name === "output.weight");
  const tensors = describeTensors(
    gguf,
    { expertCount, layerCount, mtpLayerCount, usedByLayer },
    tiedOutput,
    passesOf(keys),
  );
  const fileType = toCount(gguf.metadata.get("general.file_type"));
  return {
    architecture,
    name: keys.text("general.name"),
    fileTypeName: fileType === null ? null : (fileTypeNames.get(fileType) ?? null),
    parameterCount: tensors.reduce(
      (sum, tensor) => sum + tensor.shape.reduce((product, size) => product * size, 1),
      0,
    ),
    tensorBytes: tensors.reduce((sum, tensor) => sum + tensor.sizeBytes, 0),
    layerCount,
    mtpLayerCount,
    embeddingLength,
    headCount: largest(heads.headCounts),
    kvHeadCount: largest(heads.kvHeadCounts),
    keyLength: heads.keyLength,
    valueLength: heads.valueLength,
    feedForwardLength: largest(heads.feedForwardLengths),
    expertFeedForwardLength:
      expertCount === 0
        ? 0
        : largest(keys.perLayer("expert_feed_forward_length", layerCountAll) ?? heads.feedForwardLengths),
    vocabularySize: readVocabularySize(gguf, keys),
    trainedContextTokens,
    expertCount,
    expertUsedCount: expertCount === 0 ? 0 : largest(usedByLayer),
    sharedExpertCount: keys.count("expert_shared_count") ?? 0,
    tiedOutput,
    hasChatTemplate: (keys.text("tokenizer.chat_template") ?? "") !== "",
    generatesText,
    kind: tensors.some((tensor) => tensor.role === "expert" || tensor.role === "expert-gate-up")
      ? "mixture-of-experts"
      : "dense",
    tensors,
    strides: tensors.flatMap((tensor) => (tensor.strides === null ? [] : [tensor.strides])),
    bytesByType: sumBy(tensors, (tensor) => tensor.typeName),
    bytesByRole: sumBy(tensors, (tensor) => tensor.role),
    touchedBytesPerToken: tensors.reduce((sum, tensor) => sum + tensor.touchedBytesPerToken, 0),
    memoryLayers: memoryLayersOf(keys, heads, layerCount, embeddingLength),
  };
}

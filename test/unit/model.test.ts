// The description of models: roles, strides, bytes touched, memory of the past. Small models of real layouts come
// from the fixtures; large ones are headers without weights, with the figures that are public about them.

import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { architectureNames } from "../../src/architectures";
import { HypuraError } from "../../src/errors";
import { parseGguf } from "../../src/gguf";
import { describeModel, kvBytesPerToken, type Model, memoryBytes, type Role } from "../../src/model";
import {
  type GgufSpec,
  ggufBytes,
  headerBytes,
  type Metadata,
  type TensorSpec,
  tensorBytes,
} from "../fixtures/gguf-writer";
import {
  arrayKey,
  key,
  tinyDeepseek2,
  tinyFused,
  tinyGptOss,
  tinyLfm2Moe,
  tinyLlama,
  tinyMixed,
  tinyMixtral,
  tinyQwen3Moe,
} from "../fixtures/tiny";

/** Describes a spec from its header alone: data is never read, so it need not exist. */
function describeSpec(spec: GgufSpec): Model {
  const header = headerBytes(spec);
  const alignment = spec.alignment ?? 32;
  const dataBytes = spec.tensors.reduce(
    (sum, tensor) => sum + Math.ceil(tensorBytes(tensor) / alignment) * alignment,
    0,
  );
  const read = (offset: number, length: number): Uint8Array => {
    const out = new Uint8Array(length);
    out.set(header.subarray(offset, offset + length));
    return out;
  };
  return describeModel(
    parseGguf([{ name: "m.gguf", source: { sizeBytes: header.length + dataBytes, read } }]),
  );
}

function weight(name: string, shape: readonly number[], typeName = "f16"): TensorSpec {
  return { name, shape, typeName, pieces: () => [] };
}

function keysOf(
  architecture: string,
  values: Readonly<Record<string, number | readonly number[]>>,
): Metadata[] {
  const defaults = { block_count: 4, context_length: 4096, embedding_length: 256, "attention.head_count": 4 };
  const entries = Object.entries({ ...defaults, ...values }).map(([name, value]) =>
    typeof value === "number"
      ? key(`${architecture}.${name}`, "u32", value)
      : arrayKey(`${architecture}.${name}`, "i32", [...(value as readonly number[])]),
  );
  return [key("general.architecture", "str", architecture), ...entries];
}

/** A model of one tensor and the given keys, for what the keys alone decide. */
function modelOf(architecture: string, values: Readonly<Record<string, number | readonly number[]>>): Model {
  return describeSpec({
    metadata: keysOf(architecture, values),
    tensors: [weight("token_embd.weight", [256, 512])],
  });
}

const f16 = { keyType: "f16", valueType: "f16" } as const;

function roles(model: Model): Record<string, Role> {
  return Object.fromEntries(model.tensors.map((tensor) => [tensor.name, tensor.role]));
}

describe("tiny-llama", () => {
  const model = describeSpec(tinyLlama({}));

  test("has the dimensions it was made with", () => {
    expect(model).toMatchObject({
      architecture: "llama",
      name: "tiny-llama",
      kind: "dense",
      layerCount: 4,
      mtpLayerCount: 0,
      embeddingLength: 256,
      headCount: 4,
      kvHeadCount: 2,
      keyLength: 64,
      valueLength: 64,
      feedForwardLength: 512,
      vocabularySize: 512,
      trainedContextTokens: 2048,
      expertCount: 0,
      expertUsedCount: 0,
      tiedOutput: false,
      hasChatTemplate: true,
      generatesText: true,
    });
    expect(model.parameterCount).toBe(
      4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512 + 2 * 256) + 2 * 256 * 512 + 256,
    );
  });

  test("streams its twelve FFN matrices, each as one stride", () => {
    expect(model.strides).toHaveLength(12);
    for (const set of model.strides) {
      const tensor = model.tensors[set.tensorIndex];
      expect(tensor?.role).toBe("dense-ffn");
      expect(set).toMatchObject({ strideCount: 1, touchedCount: 1, strideBytes: tensor?.sizeBytes ?? 0 });
    }
  });

  test("reads all but the embedding, of which one row", () => {
    const embedding = model.tensors.find((tensor) => tensor.name === "token_embd.weight");
    const embeddingBytes = embedding?.sizeBytes ?? 0;
    expect(model.touchedBytesPerToken).toBe(model.tensorBytes - embeddingBytes + embeddingBytes / 512);
  });

  test("keeps 4 layers x 2 heads x 64 x (key, value) in f16 a token", () => {
    expect(kvBytesPerToken(model, f16)).toBe(4 * 2 * 64 * 2 * 2);
    expect(kvBytesPerToken(model, { keyType: "q8_0", valueType: "q8_0" })).toBe((4 * 2 * 64 * 2 * 34) / 32);
    expect(() => kvBytesPerToken(model, { keyType: "q9", valueType: "f16" })).toThrow(HypuraError);
  });

  test("with a tied output reads the embedding whole", () => {
    const spec = tinyLlama({});
    const tied = describeSpec({
      ...spec,
      tensors: spec.tensors.filter((tensor) => tensor.name !== "output.weight"),
    });
    expect(tied.tiedOutput).toBe(true);
    expect(tied.touchedBytesPerToken).toBe(tied.tensorBytes);
  });
});

describe("experts", () => {
  test("of tiny-mixtral are eight strides a tensor, two touched", () => {
    const model = describeSpec(tinyMixtral({}));
    expect(model.kind).toBe("mixture-of-experts");
    expect(model.strides).toHaveLength(9);
    for (const set of model.strides) {
      expect(set.strideCount).toBe(8);
      expect(set.touchedCount).toBe(2);
      expect(set.strideBytes * set.strideCount).toBe(model.tensors[set.tensorIndex]?.sizeBytes ?? 0);
    }
    const expertBytes = model.bytesByRole.get("expert") ?? 0;
    const embeddingBytes = model.bytesByRole.get("embedding") ?? 0;
    expect(model.touchedBytesPerToken).toBe(
      model.tensorBytes - expertBytes * 0.75 - embeddingBytes * (511 / 512),
    );
  });

  test("of tiny-qwen3moe are 128, with a length of their own", () => {
    const model = describeSpec(tinyQwen3Moe({}));
    expect(model).toMatchObject({ expertCount: 128, expertUsedCount: 8, expertFeedForwardLength: 64 });
    expect(model.strides.every((set) => set.strideCount === 128 && set.touchedCount === 8)).toBe(true);
  });

  test("of tiny-fused have gate and up in one tensor", () => {
    const model = describeSpec(tinyFused({}));
    expect(roles(model)["blk.1.ffn_gate_up_exps.weight"]).toBe("expert-gate-up");
    expect(roles(model)["blk.1.ffn_down_exps.weight"]).toBe("expert");
    expect(model.strides).toHaveLength(3 + 2 * 2);
  });

  test("of tiny-gpt-oss have biases that stay", () => {
    const model = describeSpec(tinyGptOss({}));
    const names = roles(model);
    expect(names["blk.0.ffn_up_exps.weight"]).toBe("expert");
    expect(names["blk.0.ffn_up_exps.bias"]).toBe("expert-bias");
    expect(names["blk.0.ffn_gate_inp.bias"]).toBe("router");
    expect(names["blk.0.attn_sinks.weight"]).toBe("attention");
    expect(names["blk.0.post_attention_norm.weight"]).toBe("norm");
    expect(
      model.strides
        .map((set) => model.tensors[set.tensorIndex]?.name)
        .every((name) => name?.endsWith("_exps.weight")),
    ).toBe(true);
  });

  test("of tiny-deepseek2 stand beside shared ones, after a dense layer", () => {
    const model = describeSpec(tinyDeepseek2({}));
    const names = roles(model);
    expect(names["blk.0.ffn_up.weight"]).toBe("dense-ffn");
    expect(names["blk.1.ffn_up_exps.weight"]).toBe("expert");
    expect(names["blk.1.ffn_up_shexp.weight"]).toBe("shared-expert");
    expect(names["blk.1.exp_probs_b.bias"]).toBe("router");
    expect(names["blk.1.attn_kv_a_mqa.weight"]).toBe("attention");
    expect(names["blk.1.attn_kv_a_norm.weight"]).toBe("norm");
    expect(model.sharedExpertCount).toBe(2);
    expect(model.strides.filter((set) => set.strideCount === 1)).toHaveLength(3);
  });

  test("of tiny-mixed differ in type and size", () => {
    const model = describeSpec(tinyMixed({}));
    expect(new Set(model.strides.map((set) => set.strideBytes)).size).toBeGreaterThanOrEqual(6);
    expect([...model.bytesByType.keys()].sort()).toEqual([
      "f16",
      "f32",
      "q4_0",
      "q4_1",
      "q4_K",
      "q5_0",
      "q5_K",
      "q6_K",
      "q8_0",
    ]);
    expect([...model.bytesByType.values()].reduce((sum, bytes) => sum + bytes, 0)).toBe(model.tensorBytes);
    expect([...model.bytesByRole.values()].reduce((sum, bytes) => sum + bytes, 0)).toBe(model.tensorBytes);
  });

  test("whose count differs from the file's stay resident and are reported", () => {
    const spec = tinyMixtral({});
    const tensors = spec.tensors.map((tensor) =>
      tensor.name === "blk.1.ffn_up_exps.weight" ? { ...tensor, shape: [256, 256, 4] } : tensor,
    );
    const model = describeSpec({ ...spec, tensors });
    expect(roles(model)["blk.1.ffn_up_exps.weight"]).toBe("other");
    expect(model.strides).toHaveLength(8);
  });

  test("may be used in another number by each layer", () => {
    const metadata = keysOf("llama", { expert_count: 8, expert_used_count: [1, 2, 3, 4] });
    const tensors = [0, 1, 2, 3].map((layer) => weight(`blk.${layer}.ffn_up_exps.weight`, [256, 64, 8]));
    const model = describeSpec({ metadata, tensors });
    expect(model.strides.map((set) => set.touchedCount)).toEqual([1, 2, 3, 4]);
    expect(model.expertUsedCount).toBe(4);
  });
});

test("names decide roles, and what is unknown is other and never streams", () => {
  const expected: Readonly<Record<string, Role>> = {
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
    "position_embd.weight": "embedding",
    "output.weight": "output",
    "output_norm.weight": "norm",
    "token_embd_norm.weight": "norm",
    "rope_freqs.weight": "rope",
    "v.blk.0.attn_q.weight": "vision",
    "mm.0.weight": "vision",
    "blk.0.attn_q.weight": "attention",
    "blk.0.attn_q.bias": "attention",
    "blk.0.attn_q_norm.weight": "norm",
    "blk.0.attn_kv_b.weight": "attention",
    "blk.0.attn_norm_2.weight": "norm",
    "blk.0.post_ffw_norm_1.weight": "norm",
    "blk.0.pre_ffw_norm_2.weight": "norm",
    "blk.0.layer_output_norm.weight": "norm",
    "blk.0.indexer.attn_k.weight": "attention",
    "blk.0.indexer.k_norm.weight": "norm",
    "blk.0.attn_compressor_kv.weight": "attention",
    "blk.0.ssm_in.weight": "recurrent",
    "blk.0.ssm_a": "recurrent",
    "blk.0.time_mix_key.weight": "recurrent",
    "blk.0.channel_mix_value.weight": "recurrent",
    "blk.0.shortconv.conv.weight": "recurrent",
    "blk.0.ffn_up.weight": "dense-ffn",
    "blk.0.ffn_up.bias": "dense-ffn",
    "blk.0.ffn_up.scale": "dense-ffn",
    "blk.0.ffn.act": "dense-ffn",
    "blk.0.ffn_gate_inp.weight": "router",
    "blk.0.ffn_gate_inp_shexp.weight": "router",
    "blk.0.ffn_up_shexp.weight": "shared-expert",
    "blk.0.ffn_latent_down.weight": "shared-expert",
    "blk.0.hc_attn_fn.weight": "mixing",
    "blk.0.laurel_l.weight": "mixing",
    "blk.0.altup_router.weight": "mixing",
    "blk.0.inp_gate.weight": "mixing",
    "blk.0.nextn.eh_proj.weight": "mtp",
    "blk.0.vis_gate.weight": "vision",
    "blk.0.rope_factors_long.weight": "rope",
    "blk.0.ffn_up_exps.weight": "other",
    "blk.0.ffn_sideways.weight": "other",
    "blk.0.ffn_up.3.weight": "other",
    "something.weight": "other",
    "xblk.0.ffn_up.weight": "other",
    "blk.x.ffn_up.weight": "other",
  };
  const model = describeSpec({
    metadata: keysOf("llama", {}),
    tensors: Object.keys(expected).map((name) => weight(name, [32, 8])),
  });
  expect(roles(model)).toEqual({ ...expected });
  expect(model.strides.map((set) => model.tensors[set.tensorIndex]?.name)).toEqual(["blk.0.ffn_up.weight"]);
  expect(model.tensors.find((tensor) => tensor.name === "blk.0.attn_q.weight")?.layer).toBe(0);
  expect(model.tensors.find((tensor) => tensor.name === "output.weight")?.layer).toBeNull();
});

test("blocks after the last evaluated one are MTP blocks, neither streamed nor touched", () => {
  const metadata = keysOf("glm4moe", {
    block_count: 3,
    nextn_predict_layers: 1,
    expert_count: 4,
    expert_used_count: 2,
  });
  const tensors = [0, 1, 2].flatMap((layer) => [
    weight(`blk.${layer}.ffn_up_exps.weight`, [256, 64, 4]),
    weight(`blk.${layer}.attn_q.weight`, [256, 256]),
  ]);
  const model = describeSpec({ metadata, tensors });
  expect(model).toMatchObject({ layerCount: 2, mtpLayerCount: 1 });
  expect(model.strides).toHaveLength(2);
  expect(roles(model)["blk.2.ffn_up_exps.weight"]).toBe("mtp");
  expect(roles(model)["blk.2.attn_q.weight"]).toBe("mtp");
  expect(model.touchedBytesPerToken).toBe(2 * (256 * 64 * 2 * 2 + 256 * 256 * 2));
  expect(model.memoryLayers).toHaveLength(2);
});

describe("public models by their keys", () => {
  const kvOf = (model: Model): number => kvBytesPerToken(model, f16);

  test("Llama 3.3 70B: 80 layers x 8 heads x 128, 320 KiB a token", () => {
    const model = modelOf("llama", {
      block_count: 80,
      embedding_length: 8192,
      "attention.head_count": 64,
      "attention.head_count_kv": 8,
    });
    expect(kvOf(model)).toBe(327_680);
  });

  test("Qwen3-30B-A3B: heads longer than embedding / heads", () => {
    const model = modelOf("qwen3moe", {
      block_count: 48,
      embedding_length: 2048,
      "attention.head_count": 32,
      "attention.head_count_kv": 4,
      "attention.key_length": 128,
      "attention.value_length": 128,
      expert_count: 128,
      expert_used_count: 8,
    });
    expect(kvOf(model)).toBe(48 * 4 * 256 * 2);
  });

  test("DeepSeek V3: one compressed vector of 512 + 64 for each of 61 layers", () => {
    const model = modelOf("deepseek2", {
      block_count: 61,
      embedding_length: 7168,
      "attention.head_count": 128,
      "attention.head_count_kv": 1,
      "attention.key_length": 576,
      "attention.value_length": 512,
      "attention.key_length_mla": 192,
      "attention.value_length_mla": 128,
      expert_count: 256,
      expert_used_count: 8,
    });
    expect(kvOf(model)).toBe(61 * 576 * 2);
  });

  test("gpt-oss 20B: every second layer keeps 128 tokens", () => {
    const model = modelOf("gpt-oss", {
      block_count: 24,
      embedding_length: 2880,
      "attention.head_count": 64,
      "attention.head_count_kv": 8,
      "attention.key_length": 64,
      "attention.value_length": 64,
      "attention.sliding_window": 128,
    });
    expect(model.memoryLayers.map((layer) => layer.windowTokens).slice(0, 4)).toEqual([128, null, 128, null]);
    const use = { ...f16, contextTokens: 131_072, batchTokens: 512, sequenceCount: 1 };
    // llama.cpp rounds the window and one batch up to 256 cells.
    expect(memoryBytes(model, use).kvBytes).toBe(12 * 8 * 128 * 2 * (131_072 + 768));
  });

  test("Gemma 3 27B: one full layer in six", () => {
    const model = modelOf("gemma3", { block_count: 62, "attention.sliding_window": 1024 });
    expect(model.memoryLayers.filter((layer) => layer.windowTokens === null)).toHaveLength(10);
    expect(model.memoryLayers[5]?.windowTokens).toBeNull();
    expect(model.memoryLayers[0]?.windowTokens).toBe(1024);
  });

  test("a pattern in the file goes before the architecture's", () => {
    const model = modelOf("gemma3", {
      "attention.sliding_window": 64,
      "attention.sliding_window_pattern": [0, 1, 0, 1],
    });
    expect(model.memoryLayers.map((layer) => layer.windowTokens)).toEqual([null, 64, null, 64]);
  });

  test("Llama 4 slides by itself, unless its file says 0", () => {
    expect(modelOf("llama4", {}).memoryLayers.map((layer) => layer.windowTokens)).toEqual([
      8192,
      8192,
      8192,
      null,
    ]);
    const full = modelOf("llama4", { "attention.sliding_window": 0 });
    expect(full.memoryLayers.every((layer) => layer.windowTokens === null)).toBe(true);
  });

  test("architectures that do not slide ignore the key", () => {
    const model = modelOf("phi3", { "attention.sliding_window": 2048 });
    expect(model.memoryLayers.every((layer) => layer.windowTokens === null)).toBe(true);
  });

  test("Qwen3-Next: three layers of four keep a state instead of keys", () => {
    const model = modelOf("qwen3next", {
      block_count: 48,
      embedding_length: 2048,
      "attention.head_count": 16,
      "attention.head_count_kv": 2,
      "attention.key_length": 256,
      "attention.value_length": 256,
      "ssm.conv_kernel": 4,
      "ssm.inner_size": 4096,
      "ssm.state_size": 128,
      "ssm.group_count": 16,
    });
    const stateful = model.memoryLayers.filter((layer) => layer.stateElements > 0);
    expect(stateful).toHaveLength(36);
    expect(stateful[0]?.stateElements).toBe(3 * (4096 + 2 * 16 * 128) + 128 * 4096);
    expect(kvOf(model)).toBe(12 * 2 * 512 * 2);
  });

  test("Mamba has states only, whatever the context", () => {
    const model = modelOf("mamba", {
      "attention.head_count": 0,
      "ssm.conv_kernel": 4,
      "ssm.inner_size": 512,
      "ssm.state_size": 16,
    });
    expect(kvOf(model)).toBe(0);
    const use = { ...f16, contextTokens: 4096, batchTokens: 512, sequenceCount: 3 };
    expect(memoryBytes(model, use)).toEqual({ kvBytes: 0, stateBytes: 4 * (3 * 512 + 16 * 512) * 4 * 3 });
  });

  test("RWKV: the shift and one matrix of each head", () => {
    const model = modelOf("rwkv7", { "attention.head_count": 0, "wkv.head_size": 64 });
    expect(model.memoryLayers[0]?.stateElements).toBe(256 * (2 + 64));
  });

  test("layers with no heads keep nothing (heads by layer)", () => {
    const model = modelOf("deci", {
      "attention.head_count": [4, 4, 0, 4],
      "attention.head_count_kv": [2, 4, 0, 1],
    });
    expect(model.memoryLayers.map((layer) => layer.keyElements)).toEqual([128, 256, 0, 64]);
  });

  test("tiny-lfm2moe: attention where it has heads, short convolutions elsewhere", () => {
    const model = describeSpec(tinyLfm2Moe({}));
    expect(model.memoryLayers.map((layer) => layer.keyElements)).toEqual([0, 0, 64, 0]);
    expect(model.memoryLayers.map((layer) => layer.stateElements)).toEqual([256, 256, 0, 256]);
  });

  test("Gemma 4: the last layers use the keys of earlier ones", () => {
    const model = modelOf("gemma4", {
      block_count: 6,
      "attention.shared_kv_layers": 2,
      "attention.sliding_window": 512,
      "attention.sliding_window_pattern": [1, 1, 0, 1, 1, 0],
      "attention.key_length_swa": 32,
      "attention.value_length_swa": 32,
    });
    expect(model.memoryLayers.map((layer) => layer.keyElements)).toEqual([128, 128, 256, 128, 0, 0]);
  });

  test("DeepSeek V3.2 keeps a key for its indexer too", () => {
    const model = modelOf("deepseek32", {
      "attention.head_count_kv": 1,
      "attention.key_length": 576,
      "attention.value_length": 512,
      "attention.key_length_mla": 192,
      "attention.value_length_mla": 128,
      "attention.indexer.key_length": 128,
    });
    expect(kvOf(model)).toBe(4 * (576 + 128) * 2);
  });

  test("a looped model walks its weights, and keeps its past, once for each loop", () => {
    const metadata = keysOf("nanbeige", { num_loops: 3 });
    const model = describeSpec({
      metadata,
      tensors: [weight("blk.0.ffn_up.weight", [256, 64]), weight("output.weight", [256, 64])],
    });
    expect(model.touchedBytesPerToken).toBe(4 * 256 * 64 * 2);
    expect(model.memoryLayers).toHaveLength(12);
  });

  test("an embedding model generates nothing and keeps nothing", () => {
    const model = modelOf("bert", {});
    expect(model).toMatchObject({ generatesText: false, tiedOutput: false });
    expect(kvOf(model)).toBe(0);
  });
});

describe("a model that cannot be described is refused:", () => {
  const embd = [weight("token_embd.weight", [256, 512])];
  const without = (name: string): Metadata[] =>
    keysOf("llama", {}).filter((entry) => !entry.key.endsWith(name));
  const cases: readonly (readonly [string, GgufSpec, string, RegExp])[] = [
    [
      "no architecture",
      { metadata: without("general.architecture"), tensors: embd },
      "corrupt-model",
      /does not name its architecture/,
    ],
    [
      "an unknown architecture",
      { metadata: keysOf("llama5", {}), tensors: embd },
      "unsupported-model",
      /"llama5", which llama.cpp v0.5.0 does not know/,
    ],
    ["a vision projector", { metadata: keysOf("clip", {}), tensors: embd }, "unsupported-model", /mmproj/],
    [
      "a LoRA adapter",
      { metadata: [...keysOf("llama", {}), key("general.type", "str", "adapter")], tensors: embd },
      "unsupported-model",
      /LoRA adapter/,
    ],
    ["a vocabulary alone", { metadata: keysOf("llama", {}), tensors: [] }, "unsupported-model", /no tensors/],
    [
      "no block count",
      { metadata: without("block_count"), tensors: embd },
      "corrupt-model",
      /llama.block_count is missing/,
    ],
    [
      "no context length",
      { metadata: without("context_length"), tensors: embd },
      "corrupt-model",
      /llama.context_length is missing/,
    ],
    [
      "no layers",
      { metadata: keysOf("llama", { block_count: 0 }), tensors: embd },
      "corrupt-model",
      /block_count is 0/,
    ],
    [
      "too many layers",
      { metadata: keysOf("llama", { block_count: 513 }), tensors: embd },
      "corrupt-model",
      /block_count is 513/,
    ],
    [
      "more experts used than there are",
      { metadata: keysOf("llama", { expert_count: 4, expert_used_count: 5 }), tensors: embd },
      "corrupt-model",
      /is 5 of 4/,
    ],
    [
      "experts of which none is used",
      { metadata: keysOf("llama", { expert_count: 4 }), tensors: embd },
      "corrupt-model",
      /expert_used_count is missing/,
    ],
    [
      "too many experts",
      { metadata: keysOf("llama", { expert_count: 5000, expert_used_count: 2 }), tensors: embd },
      "corrupt-model",
      /5000, the limit/,
    ],
    [
      "heads for another number of layers",
      { metadata: keysOf("llama", { "attention.head_count": [4, 4] }), tensors: embd },
      "corrupt-model",
      /2 elements for 4 layers/,
    ],
    [
      "a key of the wrong kind",
      { metadata: [...without("block_count"), key("llama.block_count", "str", "4")], tensors: embd },
      "corrupt-model",
      /block_count is no whole number/,
    ],
  ];
  test.each(cases.map((row) => [...row] as const))("%s", (_, spec, code, sentence) => {
    let caught: unknown;
    try {
      describeSpec(spec);
    } catch (error) {
      caught = error;
    }
    expect(caught).toBeInstanceOf(HypuraError);
    expect((caught as HypuraError).message).toMatch(sentence);
    expect((caught as HypuraError).code as string).toBe(code);
  });
});

test("every architecture of llama.cpp is described from the common keys", () => {
  expect(architectureNames.size).toBeGreaterThan(140);
  for (const name of architectureNames) {
    const model = modelOf(name, { "attention.head_count_kv": 2, "attention.sliding_window": 64 });
    expect(model.architecture).toBe(name);
    expect(model.memoryLayers.length).toBeGreaterThan(0);
    expect(kvBytesPerToken(model, f16)).toBeGreaterThanOrEqual(0);
  }
});

test("the list of architectures is the one of the vendored llama.cpp", () => {
  const path = join(import.meta.dir, "../../vendor/llama.cpp/src/llama-arch.cpp");
  if (!existsSync(path)) {
    console.warn(`skipped: ${path} is not unpacked`);
    return;
  }
  const source = readFileSync(path, "utf8");
  const table = /LLM_ARCH_NAMES = \{(.*?)\n\};/s.exec(source)?.[1] ?? "";
  const named = [...table.matchAll(/"([^"]+)"/g)].map((match) => match[1] ?? "");
  const left = named.filter((name) => !["clip", "gptj", "(unknown)"].includes(name));
  expect([...architectureNames].sort()).toEqual(left.sort());
});

test("describing 1,200 tensors takes milliseconds", () => {
  const metadata = keysOf("qwen3moe", { block_count: 94, expert_count: 128, expert_used_count: 8 });
  const tensors = Array.from({ length: 1200 }, (_, i) => weight(`blk.${i % 94}.t${i}.weight`, [256, 64]));
  const gguf = parseGguf([
    { name: "m.gguf", source: sourceOfBytes(ggufBytes({ metadata, tensors: tensors.map(filled) })) },
  ]);
  const started = performance.now();
  describeModel(gguf);
  expect(performance.now() - started).toBeLessThan(100);
});

function filled(tensor: TensorSpec): TensorSpec {
  return { ...tensor, pieces: () => [new Uint8Array(tensorBytes(tensor))] };
}

function sourceOfBytes(bytes: Uint8Array) {
  return {
    sizeBytes: bytes.length,
    read: (offset: number, length: number) => bytes.subarray(offset, offset + length),
  };
}

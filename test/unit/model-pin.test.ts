// What architectures.ts and model.ts say of llama.cpp, against its source at the pin, where that is unpacked: every tensor
// name has a role, and the tables of what slides, recurs and generates nothing are those of the source. A new pin fails
// here first.

import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  architectureNames,
  diffusionArchitectures,
  encoderArchitectures,
  hybridArchitectures,
  indexerArchitectures,
  recurrentArchitectures,
  slidingRules,
} from "../../src/architectures";
import { parseGguf } from "../../src/gguf";
import { describeModel } from "../../src/model";
import { headerBytes, type TensorSpec } from "../fixtures/gguf-writer";
import { key } from "../fixtures/tiny";

const root = join(import.meta.dir, "../../vendor/llama.cpp/src");
const isUnpacked = existsSync(join(root, "llama-arch.cpp"));
if (!isUnpacked) {
  console.warn(`skipped: ${root} is not unpacked`);
}

function textOf(name: string): string {
  return readFileSync(join(root, name), "utf8");
}

/** LLM_ARCH_X -> its name in files. */
function enumNames(): ReadonlyMap<string, string> {
  const table = /LLM_ARCH_NAMES = \{(.*?)\n\};/s.exec(textOf("llama-arch.cpp"))?.[1] ?? "";
  return new Map(
    [...table.matchAll(/\{\s*(LLM_ARCH_\w+),\s*"([^"]+)"/g)].map((match) => [match[1] ?? "", match[2] ?? ""]),
  );
}

/** The architectures for which a predicate of llama-arch.cpp is true. */
function namesIn(predicate: string): readonly string[] {
  const names = enumNames();
  const source = textOf("llama-arch.cpp");
  const from = source.indexOf(`bool ${predicate}(`);
  const body = source.slice(from, source.indexOf("return true", from));
  return [...body.matchAll(/case (LLM_ARCH_\w+):/g)].map((match) => names.get(match[1] ?? "") ?? "?").sort();
}

/** Files of src/models whose architecture has another name. */
const otherNames: Readonly<Record<string, string>> = { "openai-moe": "gpt-oss" };

function bare(name: string): string {
  return name.replace(/[-_.]/g, "");
}

/** Text of each file of src/models, by the name of its architecture; shared pieces have none. */
function modelSources(): ReadonlyMap<string, string> {
  const byBare = new Map([...architectureNames].map((name) => [bare(name), name]));
  const sources = new Map<string, string>();
  for (const file of readdirSync(join(root, "models")).filter((name) => name.endsWith(".cpp"))) {
    const stem = file.slice(0, -4);
    const name = otherNames[stem] ?? byBare.get(bare(stem));
    if (name !== undefined) sources.set(name, textOf(join("models", file)));
  }
  return sources;
}

describe.skipIf(!isUnpacked)("llama.cpp at the pin", () => {
  test("has no tensor whose role is unknown, but the experts of 2023 that lay apart", () => {
    const source = textOf("llama-arch.cpp");
    const table = source.slice(source.indexOf("LLM_TENSOR_NAMES"));
    const names = [...table.slice(0, table.indexOf("\n};")).matchAll(/\{\s*LLM_TENSOR_\w+,\s*"([^"]+)"/g)];
    expect(names.length).toBeGreaterThan(250);
    const unique = [...new Set(names.map((match) => `${(match[1] ?? "").replaceAll("%d", "1")}.weight`))];
    const tensors = unique.map((name): TensorSpec => {
      const shape = name.includes("exps.") ? [64, 64, 4] : [64, 64];
      return { name, shape, typeName: "f16", pieces: () => [] };
    });
    const metadata = [
      key("general.architecture", "str", "llama"),
      key("llama.block_count", "u32", 4),
      key("llama.context_length", "u32", 64),
      key("llama.embedding_length", "u32", 64),
      key("llama.attention.head_count", "u32", 4),
      key("llama.expert_count", "u32", 4),
      key("llama.expert_used_count", "u32", 2),
    ];
    const header = headerBytes({ metadata, tensors });
    const read = (offset: number, length: number): Uint8Array => {
      const out = new Uint8Array(length);
      out.set(header.subarray(offset, offset + length));
      return out;
    };
    const model = describeModel(parseGguf([{ name: "m", source: { sizeBytes: header.length + 1e8, read } }]));
    const unknown = model.tensors.filter((one) => one.role === "other").map((one) => one.name);
    expect(unknown.sort()).toEqual([
      "blk.1.ffn_down.1.weight",
      "blk.1.ffn_gate.1.weight",
      "blk.1.ffn_up.1.weight",
    ]);
    // What streams is stacked experts and the FFN of ordinary blocks, whatever else has a name alike.
    const streams = model.tensors.filter((one) => one.strides !== null).map((one) => one.name);
    expect(streams.sort()).toEqual(
      [
        "down",
        "down_chexps",
        "down_exps",
        "gate",
        "gate_chexps",
        "gate_exps",
        "gate_up_exps",
        "up",
        "up_chexps",
        "up_exps",
      ]
        .map((name) => `blk.1.ffn_${name}.weight`)
        .sort(),
    );
  });

  test("recurs where the tables say so", () => {
    expect([...recurrentArchitectures].sort()).toEqual([...namesIn("llm_arch_is_recurrent")]);
    expect([...hybridArchitectures.keys()].sort()).toEqual(
      namesIn("llm_arch_is_hybrid").filter((name) => name !== "deepseek4"),
    );
    expect([...diffusionArchitectures].sort()).toEqual([...namesIn("llm_arch_is_diffusion")]);
  });

  test("finds recurrent layers by the rule of the table", () => {
    const sources = modelSources();
    for (const [name, rule] of hybridArchitectures) {
      const source = sources.get(name);
      if (source === undefined || !source.includes("is_recr_impl[")) continue; // said by another file
      const byHeads = /is_recr_impl\[\w+\]\s*=[^;]*n_head_kv\(\w+\)\s*==\s*0/.test(source);
      expect([name, byHeads]).toEqual([name, rule === "kv-heads" || rule === "nemotron"]);
      const every = /full_attn_interval\s*=\s*(\d+)/.exec(source);
      if (typeof rule === "number" && every !== null) expect([name, Number(every[1])]).toEqual([name, rule]);
    }
  });

  test("slides where the table says so, and in the same pattern", () => {
    const sources = modelSources();
    const silent = new Set([...encoderArchitectures, "phi3", "phimoe"]); // no KV cache; sliding switched off
    const sliding = [...sources].filter(([, source]) => /\bn_swa\b|\bswa_type\b/.test(source));
    expect(
      sliding
        .map(([name]) => name)
        .filter((name) => !silent.has(name))
        .sort(),
    ).toEqual([...slidingRules.keys()].filter((name) => sources.has(name)).sort());
    for (const [name, source] of sliding) {
      const match = /load_swa_pattern\(ml,\s*(\d+)(,\s*(?:\/\*[^*]*\*\/)?\s*true)?/.exec(source);
      const rule = slidingRules.get(name);
      if (match === null || rule === undefined) continue;
      const inSource = [name, Number(match[1]), match[2] !== undefined];
      expect([name, rule.everyLayers, rule.fullFirst === true]).toEqual(
        inSource as [string, number, boolean],
      );
    }
  });

  test("keeps an indexer's keys where the table says so", () => {
    const users = [...modelSources()]
      .filter(([, source]) => /indexer_(head_size|n_head)/.test(source))
      .map(([name]) => name)
      .filter((name) => name !== "deepseek4"); // its caches are of a kind of their own
    expect(users.sort()).toEqual([...indexerArchitectures].sort());
  });
});

// Names, capabilities and entries of a served model.

import { describe, expect, test } from "bun:test";
import {
  capabilitiesOf,
  fimTokensOf,
  longName,
  matchesName,
  nameGiven,
  nameOf,
  parameterSize,
  psEntry,
  showReply,
  tagsEntry,
  v1ModelEntry,
  v1ModelList,
} from "../../src/ollama-model";
import { problemsOf, psReply, showReply as showSchema, tagsReply } from "../api-schemas";
import { count, served, text, thinkingTemplate } from "./served";

describe("names", () => {
  test.each([
    ["SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct:q4_1"],
    ["/a/b/Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "qwen3-30b-a3b:q4_k_xl"],
    ["Mixtral-8x7B.i1-IQ2_XS.gguf", "mixtral-8x7b:iq2_xs"],
    ["gpt-oss-120b-MXFP4_MOE-00001-of-00003.gguf", "gpt-oss-120b:mxfp4_moe"],
    ["model-f16.gguf", "model:f16"],
    ["model-BF16.GGUF", "model:bf16"],
    ["plain.gguf", "plain:latest"],
    ["C:\\models\\My Model (v2).gguf", "my-model-v2:latest"],
    ["ünïcode.gguf", "n-code:latest"],
    ["---.gguf", "model:latest"],
    [`${"x".repeat(200)}.gguf`, `${"x".repeat(80)}:latest`],
  ])("%s is %s", (file, name) => {
    expect(nameOf(file)).toBe(name);
    expect(nameGiven(nameOf(file))).toBe(name);
  });

  test.each([
    ["m", "m:q4", true],
    ["M", "m:q4", true],
    ["m:q4", "m:q4", true],
    ["m:Q4", "m:q4", true],
    ["m:latest", "m:q4", true],
    [" m ", "m:q4", true],
    ["library/m", "m:q4", true],
    ["registry.ollama.ai/library/m:q4", "m:q4", true],
    ["m:q4:local", "m:q4", true],
    ["m:q8", "m:q4", false],
    ["other", "m:q4", false],
    ["you/m", "m:q4", false],
    ["hf.co/library/m", "m:q4", false],
    ["m:cloud", "m:q4", false],
    ["m:q4-cloud", "m:q4", false],
    ["", "m:q4", false],
    ["m/", "m:q4", false],
    ["hf.co/you/M:q4", "hf.co/you/m:q4", true],
  ])("%j asks for %s: %p", (asked, name, same) => {
    expect(matchesName(asked, name)).toBe(same);
  });

  test("long names", () => {
    expect(longName("m:q4")).toBe("registry.ollama.ai/library/m:q4");
    expect(longName("hf.co/you/m:q4")).toBe("hf.co/you/m:q4");
  });

  test.each([
    [134_515_008, "134.52M"],
    [7_241_732_096, "7.2B"],
    [46_702_792_704, "46.7B"],
    [8e9, "8B"],
    [260_000, "260K"],
    [12, "12"],
  ])("%d parameters are %s", (number, size) => {
    expect(parameterSize(number)).toBe(size);
  });
});

describe("capabilities", () => {
  const model = served();
  function of(keys: Parameters<typeof served>[0], more = {}) {
    const one = served(keys);
    const fim = fimTokensOf(one.metadata, null);
    return capabilitiesOf({
      metadata: one.metadata,
      model: one.model,
      fim,
      hasProjector: false,
      canEmbed: false,
      ...more,
    });
  }
  const template = (source: string) => text("tokenizer.chat_template", source);

  test.each<[string, Parameters<typeof served>[0], object, readonly string[]]>([
    ["text only", [], {}, ["completion"]],
    ["tools", [template("{% if tools %}x{% endif %}")], {}, ["completion", "tools"]],
    ["tool calls", [template("{{ message.tool_call }}")], {}, ["completion", "tools"]],
    ["thoughts", [template("<think> </think>")], {}, ["completion", "thinking"]],
    ["one tag only", [template("<think>")], {}, ["completion"]],
    ["cut thoughts", [template("{{ content.split('</think>')[-1] }}")], {}, ["completion", "thinking"]],
    [
      "cut thoughts that have a field",
      [template("{{ content.split('</think>')[-1] }}{{ reasoning_content }}")],
      {},
      ["completion"],
    ],
    ["both", [template(thinkingTemplate)], {}, ["completion", "tools", "thinking"]],
    ["a projector", [], { hasProjector: true }, ["completion", "vision"]],
    [
      "pooling, and an engine that embeds",
      [count("llama.pooling_type", 1)],
      { canEmbed: true },
      ["embedding"],
    ],
    ["pooling, and one that does not", [count("llama.pooling_type", 1)], {}, []],
    [
      "holes",
      [
        count("tokenizer.ggml.fim_pre_token_id", 1),
        count("tokenizer.ggml.suffix_token_id", 2),
        count("tokenizer.ggml.fim_mid_token_id", 3),
      ],
      {},
      ["completion", "insert"],
    ],
    ["half a hole", [count("tokenizer.ggml.fim_pre_token_id", 1)], {}, ["completion"]],
  ])("%s", (_, keys, more, expected) => {
    expect(of(keys, more)).toEqual(expected as never);
  });

  test("tokens of holes are found by their names", () => {
    const words = ["a", "<|fim_prefix|>", "<|fim_suffix|>", "b", "<|fim_middle|>"];
    expect(fimTokensOf(model.metadata, words)).toEqual({ prefix: 1, suffix: 2, middle: 4 });
    expect(fimTokensOf(model.metadata, ["a"])).toBeNull();
  });
});

describe("entries", () => {
  const model = served();

  test("tags and ps keep to their schemas", () => {
    expect(problemsOf(tagsReply, { models: [tagsEntry(model)] })).toEqual([]);
    expect(tagsEntry(model)).toMatchObject({
      name: "tiny:latest",
      model: "tiny:latest",
      size: model.files[0]?.sizeBytes,
      details: { parent_model: "", family: "llama", families: ["llama"], context_length: 2048 },
    });
    const loaded = { residentBytes: 7, gpuBytes: 0, contextTokens: 2048 };
    const timed = psEntry(model, { ...loaded, expiresAt: "2026-01-01T00:00:00+02:00" });
    const forever = psEntry(model, { ...loaded, expiresAt: null });
    expect(problemsOf(psReply, { models: [timed, forever] })).toEqual([]);
    expect(Date.parse((forever as { expires_at: string }).expires_at)).toBeGreaterThan(
      Date.parse("2300-01-01"),
    );
  });

  const request = { asked: "Tiny", verbose: false, system: null, options: {} };
  const seen = { userAgent: "", readArray: () => ["a", 5n] };

  test("show keeps to its schema and tells the context that is served", () => {
    const reply = showReply(model, request, seen) as Record<string, unknown>;
    expect(problemsOf(showSchema, reply)).toEqual([]);
    const info = reply["model_info"] as Record<string, unknown>;
    expect(info["llama.context_length"]).toBe(2048);
    expect(info["hypura.trained_context_tokens"]).toBe(4096);
    expect(Object.keys(info).filter((key) => key.endsWith(".context_length"))).toEqual([
      "llama.context_length",
    ]);
    expect(info).not.toHaveProperty("general.name");
    expect(info).not.toHaveProperty(["tokenizer.chat_template"]);
    expect(info["tokenizer.ggml.tokens"]).toEqual([]);
    expect(info["general.parameter_count"]).toBe(model.model.parameterCount);
    expect(reply["parameters"]).toBe("num_ctx                        2048");
    expect(
      (reply["modelfile"] as string)
        .split("\n")
        .slice(0, 2)
        .every((line) => line.startsWith("#")),
    ).toBe(true);
    expect(reply["modelfile"]).toContain("\nFROM models/tiny.gguf\n");
    expect(JSON.parse(JSON.stringify(reply))).toEqual(reply);
  });

  test("show verbose reads the long arrays and lists the tensors", () => {
    const reply = showReply(model, { ...request, verbose: true }, seen) as Record<string, unknown>;
    expect(problemsOf(showSchema, reply)).toEqual([]);
    expect((reply["model_info"] as Record<string, unknown>)["tokenizer.ggml.merges"]).not.toEqual([]);
    expect((reply["tensors"] as unknown[]).length).toBe(model.model.tensors.length);
  });

  test("what is stored is shown, and never a larger context than there is", () => {
    const settings = {
      system: "S",
      parameters: { stop: ["<|im_end|>"], num_ctx: 131_072 },
      messages: [{ role: "user", content: "x" }],
      licenses: ["A", "B"],
    };
    const reply = showReply({ ...model, settings }, request, seen) as Record<string, unknown>;
    expect(problemsOf(showSchema, reply)).toEqual([]);
    expect(reply).toMatchObject({ license: "A\nB", system: "S", messages: settings.messages });
    expect(reply["parameters"]).toBe(
      'num_ctx                        2048\nstop                           "<|im_end|>"',
    );
  });

  test("Copilot gets the name it asked for", () => {
    const info = (userAgent: string) =>
      (showReply(model, request, { ...seen, userAgent }) as { model_info: Record<string, unknown> })
        .model_info;
    expect(info("GitHubCopilotChat/1.2")["general.basename"]).toBe("Tiny");
    expect(info("curl")).not.toHaveProperty(["general.basename"]);
  });

  test("OpenAI's list", () => {
    expect(v1ModelList([model])).toEqual({
      object: "list",
      data: [{ id: "tiny:latest", object: "model", created: 1_767_323_045, owned_by: "library" }],
    });
    expect(v1ModelEntry(model, "Tiny")).toMatchObject({ id: "Tiny" });
  });
});

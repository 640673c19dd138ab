// What the arguments of `serve` name: files, split sets, folders and an Ollama store, and the context each is served
// with.

import { beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readdirSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { HypuraError } from "../../src/errors";
import {
  type LibraryModel,
  type LibraryOptions,
  ollamaStorePath,
  openLibrary,
  planToServe,
} from "../../src/library";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { noLimits, totalBytes } from "../../src/plan";
import { makeFixture } from "../fixtures";
import { scratchFolder } from "./served";

const folder = scratchFolder();
const models = join(folder, "models");
const store = join(folder, "store");
const dense = join(models, "Tiny-Llama-Q4_0.gguf");
const warnings: string[] = [];

function open(
  words: readonly string[],
  options: Partial<LibraryOptions> = {},
): Promise<readonly LibraryModel[]> {
  warnings.length = 0;
  return openLibrary(words, {
    limits: { ...noLimits, contextTokens: 512, threads: 1 },
    name: null,
    storePath: store,
    onWarning: (sentence) => warnings.push(sentence),
    ...options,
  });
}

async function refusal(run: () => Promise<unknown>): Promise<HypuraError> {
  try {
    await run();
  } catch (error) {
    expect(error).toBeInstanceOf(HypuraError);
    return error as HypuraError;
  }
  throw new Error("it was taken");
}

beforeAll(async () => {
  await makeFixture("tiny-llama", dense);
  await makeFixture("tiny-qwen3moe", join(models, "split.gguf"), { split: 2 });
  writeFileSync(join(models, "notes.txt"), "no model");
});

describe("a file", () => {
  test("has its name, its size and a digest that changes with it", async () => {
    const [model] = await open([dense]);
    expect(model?.name).toBe("tiny-llama:q4_0");
    expect(model?.served.digest).toMatch(/^[0-9a-f]{64}$/);
    expect((await open([dense]))[0]?.served.digest).toBe(model?.served.digest as string);
    const copy = join(folder, "copy.gguf");
    copyFileSync(dense, copy);
    utimesSync(copy, 1, 1);
    const changed = (await open([copy]))[0]?.served;
    expect(changed?.digest).not.toBe(model?.served.digest as string);
    expect(changed?.modifiedAt).toBe("1970-01-01T00:00:01.000Z");
    expect(changed?.modifiedUnixSeconds).toBe(1);
  });

  test("any of a split set is the whole set", async () => {
    const parts = readdirSync(models).filter((name) => name.startsWith("split"));
    expect(parts.length).toBe(2);
    for (const part of parts) {
      const [model] = await open([join(models, part)]);
      expect(model?.name).toBe("split:latest");
      expect(model?.served.files.length).toBe(2);
    }
  });

  test("takes a given name, and refuses what is none", async () => {
    expect((await open([dense], { name: "Mine:8B" }))[0]?.name.toLowerCase()).toBe("mine:8b");
    expect((await refusal(() => open([dense], { name: "not a name" }))).code).toBe("usage");
    expect(
      (await refusal(() => open([dense, join(models, "split-00001-of-00002.gguf")], { name: "x" }))).message,
    ).toContain("--name");
  });

  test("two of one name are refused", async () => {
    const other = join(folder, "tiny-llama.Q4_0.gguf");
    copyFileSync(dense, other);
    const { code, message } = await refusal(() => open([dense, other]));
    expect(code).toBe("usage");
    expect(message).toContain("tiny-llama:q4_0");
  });

  test("that does not exist", async () => {
    expect((await refusal(() => open([join(models, "absent.gguf")]))).code).toBe("not-found");
  });
});

describe("a folder", () => {
  test("has every model once", async () => {
    expect((await open([models])).map(({ name }) => name)).toEqual(["tiny-llama:q4_0", "split:latest"]);
    expect(warnings).toEqual([]);
  });

  test("leaves out what is none, and says so", async () => {
    const mixed = join(folder, "mixed");
    mkdirSync(mixed, { recursive: true });
    copyFileSync(dense, join(mixed, "good.gguf"));
    writeFileSync(join(mixed, "bad.gguf"), "no model at all");
    expect((await open([mixed])).map(({ name }) => name)).toEqual(["good:latest"]);
    expect(warnings.length).toBe(1);
    expect(warnings[0]).toContain("bad.gguf");
  });

  test("without models is refused", async () => {
    const empty = join(folder, "empty");
    mkdirSync(empty, { recursive: true });
    expect((await refusal(() => open([empty]))).code).toBe("not-found");
    writeFileSync(join(empty, "bad.gguf"), "x");
    expect((await refusal(() => open([empty]))).message).toContain("can be served");
  });
});

describe("an Ollama store", () => {
  const blob = (bytes: Uint8Array | string): string => {
    const hex = createHash("sha256").update(bytes).digest("hex");
    mkdirSync(join(store, "blobs"), { recursive: true });
    writeFileSync(join(store, "blobs", `sha256-${hex}`), bytes);
    return `sha256:${hex}`;
  };
  const layer = (kind: string, bytes: Uint8Array | string) => ({
    mediaType: `application/vnd.ollama.image.${kind}`,
    digest: blob(bytes),
    size: bytes.length,
  });
  const manifest = (path: string, layers: readonly object[]): string => {
    const file = join(store, "manifests", path);
    mkdirSync(join(file, ".."), { recursive: true });
    const text = JSON.stringify({ schemaVersion: 2, config: { digest: blob("{}") }, layers });
    writeFileSync(file, text);
    return text;
  };

  test("gives the model with what was stored beside it", async () => {
    const weights = await Bun.file(dense).bytes();
    const text = manifest("registry.ollama.ai/library/stored/8b", [
      layer("model", weights),
      layer("system", "Be kind."),
      layer("params", '{"temperature":0.5,"stop":["END"]}'),
      layer("license", "MIT"),
      layer("license", "and more"),
      layer("template", "{{ .Prompt }}"),
      layer("messages", '[{"role":"user","content":"Hi"}]'),
    ]);
    const [model] = await open(["ollama:stored:8b"]);
    expect(model?.name).toBe("stored:8b");
    expect(model?.served.digest).toBe(createHash("sha256").update(text).digest("hex"));
    expect(model?.served.settings).toEqual({
      system: "Be kind.",
      parameters: { temperature: 0.5, stop: ["END"] },
      messages: [{ role: "user", content: "Hi" }],
      licenses: ["MIT", "and more"],
    });
    manifest("registry.ollama.ai/library/stored/latest", [layer("model", weights)]);
    expect((await open(["ollama:stored"]))[0]?.name).toBe("stored:latest");
    manifest("registry.ollama.ai/me/mine/q4", [layer("model", weights)]);
    expect((await open(["ollama:me/mine:q4"]))[0]?.name).toBe("me/mine:q4");
  });

  test("leaves the projector out, and says so", async () => {
    manifest("registry.ollama.ai/library/eyes/latest", [
      layer("model", await Bun.file(dense).bytes()),
      layer("projector", "clip"),
    ]);
    expect((await open(["ollama:eyes"])).length).toBe(1);
    expect(warnings[0]).toContain("projector");
  });

  test.each([
    ["ollama:absent", "not-found", "ollama:stored:8b"],
    ["ollama:", "usage", "no name"],
    ["ollama:../../etc/passwd", "usage", "no name"],
    ["ollama:a/../b", "usage", "no name"],
    ["ollama:..:..", "usage", "no name"],
    ["ollama:a:b:c", "usage", "no name"],
    ["ollama:w/x/y/z", "usage", "no name"],
  ])("%s is refused as %s", async (word, code, words) => {
    const error = await refusal(() => open([word]));
    expect(error.code as string).toBe(code);
    expect(error.message).toContain(words);
  });

  test.each([
    ["torn", "{", "corrupt-model"],
    ["list", "[]", "corrupt-model"],
    ["layerless", "{}", "corrupt-model"],
    ["strange", '{"layers":[1]}', "corrupt-model"],
    ["weightless", '{"layers":[]}', "unsupported-model"],
    [
      "climber",
      '{"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:../../../etc/passwd"}]}',
      "corrupt-model",
    ],
  ])("a manifest that is %s is refused", async (name, text, code) => {
    const path = join(store, "manifests", "registry.ollama.ai", "library", name);
    mkdirSync(path, { recursive: true });
    writeFileSync(join(path, "latest"), text);
    expect((await refusal(() => open([`ollama:${name}`]))).code as string).toBe(code);
  });

  test("with an adapter, or with a part that is missing", async () => {
    const weights = layer("model", await Bun.file(dense).bytes());
    manifest("registry.ollama.ai/library/adapted/latest", [weights, layer("adapter", "lora")]);
    expect((await refusal(() => open(["ollama:adapted"]))).code).toBe("unsupported-model");
    const absent = { mediaType: "application/vnd.ollama.image.system", digest: `sha256:${"0".repeat(64)}` };
    manifest("registry.ollama.ai/library/partial/latest", [weights, absent]);
    expect((await refusal(() => open(["ollama:partial"]))).code).toBe("not-found");
    manifest("registry.ollama.ai/library/weird/latest", [weights, layer("params", "[1]")]);
    expect((await refusal(() => open(["ollama:weird"]))).code).toBe("corrupt-model");
  });

  test("is where OLLAMA_MODELS says", () => {
    expect(ollamaStorePath({ OLLAMA_MODELS: "/x" })).toBe("/x");
    expect(ollamaStorePath({})).toEndWith(join(".ollama", "models"));
  });
});

describe("the context a model is served with", () => {
  const machine = readMachine();
  const withBytes = (availableBytes: number) => ({
    ...machine,
    memory: { ...machine.memory, availableBytes },
  });
  const served = (path: string, availableBytes: number, mode: "auto" | "resident" | "stream" = "auto") =>
    planToServe(
      "m",
      openModelFile(path),
      { ...noLimits, mode },
      {
        machine: withBytes(availableBytes),
        knowledge: {},
      },
    );
  const long = join(folder, "long.gguf");

  beforeAll(async () => {
    await makeFixture("tiny-qwen3moe", long, { context: 131_072, layers: 8 });
  });

  test("is 32,768 tokens where there is room, and no more than was trained", async () => {
    expect(served(long, 8e9)).toMatchObject({ contextTokens: 32_768, mode: "full-resident" });
    expect(served(dense, 8e9).contextTokens).toBe(2048);
  });

  test("is less where that keeps everything in memory", async () => {
    const full = totalBytes(served(long, 8e9).memory);
    const plan = served(long, full * (16 / 15) - 1_000_000);
    expect(plan).toMatchObject({ contextTokens: 24_576, mode: "full-resident" });
    expect(plan.choices.find(({ name }) => name === "context")?.reason).toContain("stay in memory");
  });

  test("is an agent's turn when streaming, and the rest is the pool's", async () => {
    const bound = totalBytes(
      planToServe(
        "m",
        openModelFile(long),
        { ...noLimits, contextTokens: 16_384 },
        {
          machine,
          knowledge: {},
        },
      ).memory,
    );
    expect(served(long, bound * 1.2, "stream")).toMatchObject({
      contextTokens: 16_384,
      mode: "expert-streaming",
    });
    expect(served(long, 64e9, "stream")).toMatchObject({ contextTokens: 32_768, mode: "expert-streaming" });
  });

  test("is what fits where that does not", async () => {
    const plan = served(long, 130e6);
    expect(plan.contextTokens).toBeLessThan(16_384);
    expect(plan.contextTokens).toBeGreaterThanOrEqual(512);
    expect((await refusal(async () => served(long, 50e6))).code).toBe("not-enough-memory");
  });

  test("stays as it was told when the model is loaded", async () => {
    const [model] = await openLibrary([long], {
      limits: { ...noLimits, threads: 1 },
      name: null,
      storePath: "",
      onWarning: () => {},
    });
    expect((await model?.plan())?.contextTokens).toBe(model?.served.contextTokens as number);
  });
});

// `hypura inspect`: the page fits its columns and says what is there, the JSON is complete, the plan is the one that
// `run` would follow, and no damaged file gets it to do anything but refuse.

import { describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { inspectText } from "../../src/cli/inspect";
import { HypuraError } from "../../src/errors";
import { noLimits } from "../../src/plan";
import { makeFixture } from "../fixtures";
import { hypura, scratchFolder, tinyModel } from "./program";

const folder = scratchFolder();
const dense = await tinyModel(folder);
const [moe = ""] = await makeFixture("tiny-mixtral", join(folder, "moe.gguf"));
const [split = ""] = await makeFixture("tiny-llama", join(folder, "split.gguf"), { split: 2 });

const text = { tensors: true, json: false };

describe("the page", () => {
  for (const [name, path] of [
    ["dense", dense],
    ["mixture of experts", moe],
    ["split", split],
  ] as const) {
    test(`${name}: fits 100 columns and has no control characters`, () => {
      for (const line of inspectText(path, noLimits, text).split("\n")) {
        expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
        expect(line).not.toMatch(/[\x00-\x1f\x7f-\x9f]/);
      }
    });
  }

  test("says what is in a mixture of experts", () => {
    const page = inspectText(moe, noLimits, text);
    expect(page).toMatch(/mixture-of-experts, 8 experts of which 2 work on a token/);
    expect(page).toMatch(/expert +2\.65 MB +█+\S* +83\.9 % +9 tensors/);
    expect(page).toMatch(/streamable +2\.65 MB in 72 strides; a token touches 18 of them/);
    expect(page).toMatch(/blk\.0\.ffn_gate_exps\.weight +expert +q4_0 +295 KB +256 x 256 x 8/);
    expect(page).toMatch(/mode +full-resident/);
    expect(page).not.toMatch(/undefined|NaN|\[object/);
  });

  test("lists tensors only when asked", () => {
    expect(inspectText(dense, noLimits, { ...text, tensors: false })).not.toContain("blk.0.attn_q.weight");
  });

  test("counts the files of a split model", () => {
    expect(inspectText(split, noLimits, text)).toMatch(/ in 2 files, GGUF version 3/);
  });
});

test("a model that does not fit is shown with the reason, and that is a success", async () => {
  const outcome = await hypura(["inspect", dense, "--memory", "50M"]);
  expect(outcome.status).toBe(0);
  expect(outcome.stderr).toBe("");
  expect(outcome.stdout).toMatch(/cannot run: the model needs .* MB/);
  expect(outcome.stdout).toMatch(/50\.0 MB are\s+allowed by --memory/);
});

test("--json holds everything, and the plan that run follows", async () => {
  const outcome = await hypura(["inspect", moe, "--json", "--context", "300", "--threads", "1"]);
  const value = JSON.parse(outcome.stdout);
  expect(Object.keys(value)).toEqual([
    "path",
    "files",
    "gguf",
    "model",
    "metadata",
    "tensors",
    "machine",
    "budgetBytes",
    "plan",
    "refusal",
  ]);
  expect(value.model).toMatchObject({
    architecture: "llama",
    expertCount: 8,
    strideCount: 72,
    streamableBytes: 2_654_208,
  });
  expect(value.metadata["general.architecture"]).toBe("llama");
  expect(value.metadata["tokenizer.ggml.tokens"]).toMatchObject({ elementType: "str", count: 512 });
  expect(value.plan).toMatchObject({ contextTokens: 300, decodeThreads: 1, mode: "full-resident" });
  expect(value.refusal).toBeNull();
  const sum = value.tensors.reduce(
    (total: number, tensor: { readonly sizeBytes: number }) => total + tensor.sizeBytes,
    0,
  );
  expect(sum).toBe(value.model.tensorBytes);
});

/** splitmix32: small and the same everywhere. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = state ^ (state >>> 16);
    mixed = Math.imul(mixed, 0x21f0aaad);
    mixed ^= mixed >>> 15;
    mixed = Math.imul(mixed, 0x735a2d97);
    return (mixed ^ (mixed >>> 15)) >>> 0;
  };
}

test("300 damaged files are shown or refused in a sentence, nothing else", () => {
  const whole = readFileSync(moe);
  const headerBytes = 24_000; // metadata with the vocabulary, and the tensor directory
  const path = join(folder, "damaged.gguf");
  let refused = 0;
  for (let seed = 0; seed < 300; seed++) {
    const next = random(seed);
    let bytes = Buffer.from(whole);
    for (let hits = 1 + (next() % 4); hits > 0; hits--) {
      bytes[next() % headerBytes] = next() & 0xff;
    }
    if (next() % 4 === 0) {
      bytes = bytes.subarray(0, next() % bytes.length);
    }
    writeFileSync(path, bytes);
    for (const options of [text, { tensors: true, json: true }]) {
      try {
        const page = inspectText(path, noLimits, options);
        expect([seed, /[\x00-\x09\x0b-\x1f\x7f-\x9f]/.test(page)]).toEqual([seed, false]);
      } catch (error) {
        if (!(error instanceof HypuraError) || error.code === "internal") {
          throw new Error(`seed ${seed}`, { cause: error });
        }
        refused++;
      }
    }
  }
  // Both happen, or the mutations hit nothing.
  expect(refused).toBeGreaterThan(50);
  expect(refused).toBeLessThan(600);
});

// The engine against a plain libllama program from the same build: the logits of every step, with memcmp. Everything
// resident; streaming.test.ts has the rest.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { makeFixture } from "../fixtures";
import { smolLm2OrSkip } from "../models";
import { compareLogits, hasLogits, planFor, someTokens } from "./compare";

const steps = 16;
let folder = "";
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "hypura-golden-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe.skipIf(!hasLogits())("logits equal those of plain libllama", () => {
  async function expectEqual(path: string, promptTokens: number): Promise<void> {
    const verdict = await compareLogits(planFor(path), someTokens(promptTokens), steps);
    expect(verdict).toEqual({ ...verdict, steps, engineSteps: steps, equalSteps: steps });
    expect(verdict.vocabTokens).toBeGreaterThan(200);
  }

  test.each([1, 17, 300])("tiny dense llama, prompt of %d", async (promptTokens) => {
    const path = join(folder, "dense.gguf");
    await makeFixture("tiny-llama", path, {});
    await expectEqual(path, promptTokens);
  });

  test.each([1, 17, 300])("tiny mixture of experts, prompt of %d", async (promptTokens) => {
    const path = join(folder, "moe.gguf");
    await makeFixture("tiny-mixtral", path, {});
    await expectEqual(path, promptTokens);
  });

  test("SmolLM2-135M-Instruct", async () => {
    const path = await smolLm2OrSkip();
    if (path !== null) {
      await expectEqual(path, 60);
    }
  });
});

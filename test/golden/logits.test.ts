// The engine against a plain libllama program from the same build: the logits of every step, with memcmp.

import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { makePlan, noLimits, type Plan } from "../../src/plan";
import { makeFixture } from "../fixtures";
import { smolLm2OrSkip } from "../models";

const program = join(import.meta.dir, "..", "..", "build", "native", "hypura-logits");
const folder = mkdtempSync(join(tmpdir(), "hypura-logits-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface Verdict {
  readonly steps: number;
  readonly engineSteps: number;
  readonly equalSteps: number;
  readonly vocabTokens: number;
}

async function compare(plan: Plan, tokens: readonly number[], count: number): Promise<Verdict> {
  const file = join(folder, "plan.json");
  writeFileSync(file, JSON.stringify(plan));
  const child = Bun.spawn([program, file, tokens.join(","), String(count)], { stdout: "pipe", stderr: "pipe" });
  const [out, err] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  await child.exited;
  if (out === "") {
    throw new Error(`hypura-logits said nothing: ${err}`);
  }
  return JSON.parse(out) as Verdict;
}

function planFor(path: string): Plan {
  const file = openModelFile(path);
  return makePlan({ name: "golden", files: file.files, model: file.model }, readMachine(), {
    ...noLimits,
    contextTokens: 512,
  });
}

/** Token ids that any vocabulary has, spread over its lower part. */
function someTokens(count: number): readonly number[] {
  return Array.from({ length: count }, (_, i) => 3 + ((i * 37) % 200));
}

describe.skipIf(!existsSync(program))("logits equal those of plain libllama", () => {
  const steps = 16;

  async function expectEqual(path: string, promptTokens: number): Promise<void> {
    const verdict = await compare(planFor(path), someTokens(promptTokens), steps);
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

// The comparison that golden tests make: logits of the engine against those of plain libllama, by hypura-logits
// (logits.cpp). It owns the start of that program, the plans to compare with, and the pools that a plan can be given;
// it judges nothing.

import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { type CachePolicy, makePlan, noLimits, type Plan, type PlanLimits } from "../../src/plan";
import { predictionOf } from "../../src/plan-prediction";

const program = join(import.meta.dir, "..", "..", "build", "native", "hypura-logits");

/** Whether the program was built; a loud line where not. */
export function hasLogits(): boolean {
  const has = existsSync(program);
  if (!has) {
    console.error(`!!! SKIPPED: ${program} is not built (bun ffi/build.ts --native-only --reference)`);
  }
  return has;
}

export interface Verdict {
  readonly steps: number;
  readonly engineSteps: number;
  readonly equalSteps: number;
  readonly vocabTokens: number;
}

/** A generation of the slowest case takes 7 s on a loaded machine; one that takes this long hangs. */
const limitMs = 120_000;

/** Generates `count` tokens after `tokens` by both programs. Throws where there is no verdict. */
export async function compareLogits(plan: Plan, tokens: readonly number[], count: number): Promise<Verdict> {
  const folder = mkdtempSync(join(tmpdir(), "hypura-logits-"));
  try {
    const file = join(folder, "plan.json");
    writeFileSync(file, JSON.stringify(plan));
    const child = Bun.spawn([program, file, tokens.join(","), String(count)], {
      stdout: "pipe",
      stderr: "pipe",
      timeout: limitMs,
      killSignal: "SIGKILL",
    });
    const [out, err] = await Promise.all([
      new Response(child.stdout).text(),
      new Response(child.stderr).text(),
    ]);
    const status = await child.exited;
    if (!out.startsWith("{")) {
      throw new Error(`hypura-logits ended with ${child.signalCode ?? status} and no verdict: ${out}${err}`);
    }
    if (err !== "") {
      console.error(err.trimEnd());
    }
    return JSON.parse(out) as Verdict;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** The plan for the model at `path`, with little context, so that many of them are quick. */
export function planFor(path: string, limits: Partial<PlanLimits> = {}): Plan {
  const file = openModelFile(path);
  return makePlan({ name: "golden", files: file.files, model: file.model }, readMachine(), {
    ...noLimits,
    contextTokens: 512,
    ...limits,
  });
}

/** Token ids that any vocabulary has, spread over its lower part. */
export function someTokens(count: number): readonly number[] {
  return Array.from({ length: count }, (_, i) => 3 + ((i * 37) % 200));
}

/** How many of a class's strides its pool holds. */
export type PoolSize = "minimum" | "quarter" | "half" | "all";

export const poolSizes: readonly PoolSize[] = ["minimum", "quarter", "half", "all"];

export type PolicyKind = CachePolicy["kind"];

export const policyKinds: readonly PolicyKind[] = ["lru", "lfu-decay", "least-stale", "pinned-cyclic"];

/** The same plan with another pool: every class is given slots for that share of its strides, and the policy. */
export function withPool(plan: Plan, size: PoolSize, kind: PolicyKind): Plan {
  const streaming = plan.streaming;
  if (streaming === null) {
    throw new Error(`${plan.model.name} does not stream`);
  }
  const classes = streaming.classes.map((one, index) => {
    const strides = streaming.tensors
      .filter((tensor) => tensor.classIndex === index)
      .reduce((sum, tensor) => sum + tensor.strideCount, 0);
    const slotCount = slotsOf(size, strides);
    const policy: CachePolicy = {
      ...one.policy,
      kind,
      pinnedSlots: kind === "pinned-cyclic" ? Math.floor(slotCount / 2) : 0,
      guardRingSlots: Math.max(1, Math.floor(slotCount / 2)),
    };
    return { ...one, slotCount, policy };
  });
  return { ...plan, streaming: { ...streaming, classes } };
}

/** The same plan with experts read before their router has chosen them, however small the pool, where that can be. */
export function withPrediction(plan: Plan): Plan {
  const { streaming } = plan;
  if (streaming === null) {
    throw new Error(`${plan.model.name} does not stream`);
  }
  const { model } = openModelFile(plan.files[0]?.path ?? "");
  return { ...plan, streaming: { ...streaming, prediction: predictionOf(model, streaming.tensors) } };
}

function slotsOf(size: PoolSize, strides: number): number {
  switch (size) {
    case "minimum":
      return 1;
    case "quarter":
      return Math.max(1, Math.floor(strides / 4));
    case "half":
      return Math.max(1, Math.floor(strides / 2));
    case "all":
      return strides;
  }
}

// Plans for models and machines that nobody would build: random shapes, memories, disks and GPUs. Each is refused in a
// sentence or fits its tiers, places every byte once, and promises a speed that is a number.

import { expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import type { Device } from "../../src/machine";
import { budgetOf, gpuBudgetOf, makePlan, noLimits, type PlanLimits, totalBytes } from "../../src/plan";
import { validatePlan } from "../../src/plan-json";
import { sumOf } from "../../src/plan-memory";
import { openRandom, type Random } from "../fixtures/random";
import { describeShape, machineOf } from "../unit/plan-family";

/** HYPURA_FUZZ_RUNS raises the number for a soak. */
const runs = Math.max(200, Math.floor(Number(process.env["HYPURA_FUZZ_RUNS"] ?? 0) / 50));

function modelOf(random: Random) {
  const heads = random.pick([4, 8, 32]);
  const experts = random.pick([0, 0, 4, 16, 60, 128]);
  return describeShape({
    architecture: random.pick(["llama", "qwen3moe", "deepseek2", "gpt-oss"]),
    layers: 1 + random.below(40),
    embd: 256 * (1 + random.below(16)),
    heads,
    kvHeads: random.pick([1, 2, heads]),
    headLength: random.pick([64, 128]),
    ff: 256 * (1 + random.below(40)),
    vocab: 256 * (1 + random.below(400)),
    tied: random.below(3) === 0,
    context: random.pick([64, 2048, 131_072]),
    ...(experts === 0
      ? {}
      : {
          experts,
          used: 1 + random.below(Math.min(8, experts)),
          expertFf: 256 * (1 + random.below(8)),
          denseLayers: random.below(3),
          shared: random.below(2) * 512,
        }),
  });
}

function machineFor(random: Random, modelBytes: number) {
  const availableBytes = Math.floor(100e6 + modelBytes * random.unit() * 1.5 + random.unit() * 2e9);
  const isUnified = random.below(2) === 0;
  const gpuBytes = Math.floor(isUnified ? availableBytes * 0.7 : 1.2e9 + modelBytes * random.unit());
  const gpu: Device = {
    name: "gpu",
    description: "a gpu",
    type: random.pick(["gpu", "igpu"]),
    totalBytes: gpuBytes,
    freeBytes: gpuBytes,
    isUnified,
  };
  return machineOf({
    totalBytes: availableBytes * 2,
    availableBytes,
    cores: 1 + random.below(32),
    decodeBytesPerSecond: 1e9 * (1 + random.below(300)),
    prefillFlopsPerSecond: 1e10 * (1 + random.below(300)),
    diskBytesPerSecond: 1e8 * (1 + random.below(150)),
    gpus: random.below(2) === 0 ? [gpu] : [],
  });
}

test(
  `${runs} plans for random models and machines`,
  () => {
    const modes = new Map<string, number>();
    for (let seed = 0; seed < runs; seed++) {
      const random = openRandom(seed);
      const model = modelOf(random);
      const machine = machineFor(random, model.tensorBytes);
      const limits: PlanLimits = {
        ...noLimits,
        slotCount: 1 + random.below(3),
        contextTokens: random.below(2) === 0 ? null : random.pick([256, 4096]),
        mode: random.pick(["auto", "auto", "auto", "stream"]),
      };
      const made = (() => {
        try {
          return makePlan({ name: "m", files: [{ path: "m", sizeBytes: 1 }], model }, machine, limits);
        } catch (error) {
          if (error instanceof HypuraError && error.code === "not-enough-memory") return null;
          throw new Error(`seed ${seed}`, { cause: error });
        }
      })();
      modes.set(made?.mode ?? "refused", (modes.get(made?.mode ?? "refused") ?? 0) + 1);
      if (made === null) continue;
      const ram = totalBytes(made.memory);
      const gpu = made.gpuMemory === null ? 0 : sumOf(made.gpuMemory);
      const budget = budgetOf(machine, limits);
      const gpuBudget = gpuBudgetOf(machine, limits);
      const byTier = { gpu: 0, ram: 0, nvme: 0 };
      for (const one of made.tensors) byTier[one.tier] += one.sizeBytes;
      const rates = [made.estimate.decodeTokensPerSecond, made.estimate.prefillTokensPerSecond];
      expect({
        seed,
        fitsRam: ram <= budget && (gpuBudget?.isUnified !== true || ram + gpu <= budget),
        fitsGpu: gpu <= (gpuBudget?.bytes ?? 0),
        weights: made.memory.weightBytes === byTier.ram,
        bytes: byTier.gpu + byTier.ram + byTier.nvme,
        rates: rates.every((rate) => rate === null || (rate > 0 && Number.isFinite(rate))),
        slots: (made.streaming?.classes ?? []).every(
          (one) => one.slotCount > 0 && one.policy.pinnedSlots < one.slotCount,
        ),
        context: made.contextTokens <= made.longestContextTokens,
      }).toEqual({
        seed,
        fitsRam: true,
        fitsGpu: true,
        weights: true,
        bytes: model.tensorBytes,
        rates: true,
        slots: true,
        context: true,
      });
      expect(validatePlan(JSON.parse(JSON.stringify(made)))).toEqual(made);
    }
    for (const mode of [
      "refused",
      "full-resident",
      "partial-gpu",
      "dense-ffn-streaming",
      "expert-streaming",
      "mixed-streaming",
    ]) {
      expect([mode, (modes.get(mode) ?? 0) > 0]).toEqual([mode, true]);
    }
  },
  20_000 + runs * 300,
);

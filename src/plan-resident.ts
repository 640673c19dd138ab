// Plans in which everything that tokens compute on is resident: in ram, on GPUs, or in both. And the one in which the page
// cache keeps the rest. Pure.

import type { Model, ModelTensor } from "./model";
import type { Plan, Tier } from "./plan";
import type { Placement } from "./plan-cost";
import { allGpuLayers, memoryOf, sumOf } from "./plan-memory";
import { chooseSpeculation } from "./plan-speculation";
import {
  bytesAt,
  type ContextChoice,
  commonPart,
  contextChoices,
  fits,
  gpuChoices,
  homesOf,
  kvChoices,
  noGpu,
  residentBatchTokens,
  residentPollPercent,
  type Sides,
  speculationFacts,
  type Task,
  threadChoice,
  useOf,
  usualUbatchTokens,
  withWeights,
} from "./plan-task";
import { bytesText, countText } from "./text";

// ---- everything resident --------------------------------------------------------------------------------------

export interface Resident {
  readonly sides: Sides;
  readonly gpuLayers: number;
  readonly ubatchTokens: number;
}

/** With as many layers on the GPU as it holds; null where the rest is too much for the ram. */
function residentSides(task: Task, contextTokens: number): Resident | null {
  const { model } = task;
  const most = task.gpu === null ? 0 : allGpuLayers(model);
  for (let gpuLayers = most; gpuLayers >= 0; gpuLayers--) {
    // Attention that looks both ways sees an input whole or not at all.
    const ubatchTokens = task.limits.embeddings === true ? contextTokens : usualUbatchTokens;
    const use = useOf(task, { contextTokens, ubatchTokens, gpuLayers });
    const made = withWeights(
      memoryOf(model, use, false),
      bytesAt(model, gpuLayers, () => true),
    );
    const sides = gpuLayers === 0 ? { ...made, gpu: noGpu } : made;
    if (fits(task, sides)) {
      return { sides, gpuLayers, ubatchTokens };
    }
  }
  return null;
}

export function makeResident(task: Task): Plan | null {
  for (const context of contextChoices(task)) {
    const found = residentSides(task, context.tokens);
    if (found !== null) return residentPlan(task, context, found);
  }
  return null;
}

export function residentPlan(
  task: Task,
  context: ContextChoice,
  { sides, gpuLayers, ubatchTokens }: Resident,
): Plan {
  const { model, machine, limits, budget } = task;
  const { ram, gpu } = sides;
  const needed = sumOf(ram) + (task.gpu?.isUnified === true ? sumOf(gpu) : 0);
  const repack = ram.weightBytes > 0 && gpuLayers === 0 && needed + ram.weightBytes <= budget;
  const isPartial = gpuLayers > 0 && gpuLayers < allGpuLayers(model);
  const mode = isPartial ? "partial-gpu" : "full-resident";
  const placement: Placement = { gpuLayers, tiers: homesOf(model, gpuLayers), classes: [] };
  const batchTokens = limits.embeddings === true ? Math.max(ubatchTokens, 2) : residentBatchTokens;
  const guesses = chooseSpeculation(speculationFacts(task, placement), batchTokens);
  return {
    ...commonPart(task, placement, { context, sides, ubatchTokens, repack }),
    mode,
    speculation: guesses.speculation,
    batchTokens,
    pollPercent: residentPollPercent,
    repack,
    // What is rearranged is a copy: mapped pages would be the same bytes in memory once more.
    loadMode: isAligned(model) && !repack ? "mmap" : "read",
    streaming: null,
    solved: null,
    choices: [
      {
        name: "mode",
        value: mode,
        reason: `${bytesText(needed)} fit in ${bytesText(budget)}`,
      },
      ...gpuChoices(task, gpuLayers, sides),
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      ...(ubatchTokens === usualUbatchTokens
        ? []
        : [
            {
              name: "ubatch",
              value: `${countText(ubatchTokens)} tokens`,
              reason:
                limits.embeddings === true
                  ? "an input is evaluated whole"
                  : "the most with which everything fits",
            },
          ]),
      threadChoice(machine, limits),
      ...(guesses.speculation === null ? [] : [guesses.choice]),
      {
        name: "repacking",
        value: repack ? "on" : "off",
        reason: repack
          ? "resident, and there is room for the rearranged copy"
          : gpuLayers > 0
            ? "layers on a GPU are computed as they lie in the file"
            : "no room for a second copy of the weights",
      },
    ],
  };
}

/** ggml computes on tensors at multiples of this (TENSOR_ALIGNMENT of ggml-impl.h); a file may hold them closer. */
const tensorAlignBytes = 32;

/** Whether the file can be computed on where it is mapped. */
export function isAligned(model: Model): boolean {
  return model.tensors.every((tensor) => tensor.offsetBytes % tensorAlignBytes === 0);
}

// ---- the page cache -------------------------------------------------------------------------------------------

/**
 * The file mapped, and the kernel drops what nobody touches. Chosen only where everything that a token computes on fits
 * (all experts counted), so that the overflow is rows of tables, of which a token reads one, and layers that decoding
 * leaves out: then nothing is read again and again, and no streaming can be faster. Never where a person set a limit,
 * because mapped pages count as this process's until the kernel takes them.
 */
export function makeMapped(task: Task): Plan | null {
  const { model, limits, budget } = task;
  if (limits.memoryBytes !== null || limits.mode === "stream" || !isAligned(model)) {
    return null;
  }
  const isHot = (tensor: ModelTensor): boolean =>
    tensor.touchedBytesPerToken >= tensor.sizeBytes || tensor.strides !== null;
  const cold = new Set(model.tensors.filter((tensor) => !isHot(tensor)).map((tensor) => tensor.index));
  const context = contextChoices(task)[0];
  if (context === undefined || cold.size === 0) {
    return null;
  }
  const use = useOf(task, { contextTokens: context.tokens, ubatchTokens: usualUbatchTokens, gpuLayers: 0 });
  const sides = withWeights(memoryOf(model, use, false), bytesAt(model, 0, isHot));
  // Rows in use: a sixteenth of the tables is far more than a text has different words.
  const coldBytes = model.tensors.reduce((sum, one) => sum + (cold.has(one.index) ? one.sizeBytes : 0), 0);
  if (sumOf(sides.ram) + coldBytes / 16 > budget) {
    return null;
  }
  const tiers = model.tensors.map((tensor) => (cold.has(tensor.index) ? "nvme" : "ram") as Tier);
  const placement: Placement = { gpuLayers: 0, tiers, classes: [] };
  return {
    ...commonPart(task, placement, { context, sides, ubatchTokens: usualUbatchTokens }),
    mode: "mmap",
    batchTokens: residentBatchTokens,
    pollPercent: residentPollPercent,
    repack: false,
    loadMode: "mmap",
    streaming: null,
    speculation: null,
    solved: null,
    choices: [
      {
        name: "mode",
        value: "mmap",
        reason: `all that tokens compute on fits; ${bytesText(coldBytes)} that they hardly touch stay in the file`,
      },
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      threadChoice(task.machine, limits),
      { name: "repacking", value: "off", reason: "no room for a second copy of the weights" },
    ],
  };
}

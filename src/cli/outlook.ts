// How a plan looks to a person: the picture of the tiers, what to expect of it, and what limits it. Shared by `inspect`,
// which shows everything, and `estimate`, which shows this alone. Gives rows; who asked prints them.

import type { Machine } from "../machine";
import type { Model, ModelTensor, Role } from "../model";
import { type Estimate, gpuBudgetOf, type Plan, type PlanLimits, type Tier, totalBytes } from "../plan";
import { bar, bytesText, countText, rateText } from "../text";

/** Everything fits in this many columns. */
export const pageWidth = 100;
export const barWidth = 24;

export function percentText(fraction: number): string {
  return `${(fraction * 100).toFixed(1)} %`;
}

/** A long sentence in lines of `width` columns at most. */
export function wrapped(sentence: string, width: number): readonly string[] {
  const lines = [""];
  for (const word of sentence.split(" ")) {
    const line = lines.at(-1) as string;
    const longer = line === "" ? word : `${line} ${word}`;
    if (Bun.stringWidth(longer) <= width) {
      lines[lines.length - 1] = longer;
    } else {
      lines.push(word);
    }
  }
  return lines;
}

// ---- the picture --------------------------------------------------------------------------------------------------

const tierNames: readonly Tier[] = ["gpu", "ram", "nvme"];

/** One line a tier with its bar, and under it what lies there. */
export function pictureLines(
  plan: Plan,
  model: Model,
  room: { readonly ramBytes: number; readonly gpuBytes: number },
): readonly string[] {
  return tierNames.flatMap((tier) => {
    const parts = partsOf(plan, model, tier);
    const used = parts.reduce((sum, { bytes }) => sum + bytes, 0);
    if (used === 0 && tier !== "ram") {
      return [];
    }
    const capacity = tier === "gpu" ? room.gpuBytes : tier === "ram" ? room.ramBytes : model.tensorBytes;
    const of = tier === "nvme" ? "of the model stay in the file" : "that it may have";
    const head = `${tier.padEnd(5)} ${bar(used / capacity, barWidth)}  ${bytesText(used)} of ${bytesText(capacity)} ${of}`;
    const detail = parts.map(({ name, bytes }) => `${name} ${bytesText(bytes)}`).join(", ");
    return [head, ...wrapped(detail, pageWidth - 12).map((line) => `      ${line}`)];
  });
}

interface Part {
  readonly name: string;
  readonly bytes: number;
}

const roleNames: Readonly<Partial<Record<Role, string>>> = {
  expert: "experts",
  "expert-gate-up": "experts",
  "expert-bias": "expert biases",
  "shared-expert": "shared experts",
  "dense-ffn": "FFN",
  norm: "norms",
  embedding: "embeddings",
  router: "routers",
};

/** What lies on a tier, the largest first: weights by role, and what is no weight. */
function partsOf(plan: Plan, model: Model, tier: Tier): readonly Part[] {
  const byName = new Map<string, number>();
  const add = (name: string, bytes: number): void => {
    byName.set(name, (byName.get(name) ?? 0) + bytes);
  };
  for (const [index, planned] of plan.tensors.entries()) {
    const role = model.tensors[index]?.role ?? "other";
    if (planned.tier === tier) add(roleNames[role] ?? role, planned.sizeBytes);
  }
  if (tier === "ram") {
    const { memory } = plan;
    add("pool for what streams", memory.poolBytes);
    add("context", memory.kvBytes + memory.stateBytes);
    add("scratch", memory.computeBytes + memory.streamingBytes);
    add("hypura itself", memory.processBytes);
  }
  if (tier === "gpu" && plan.gpuMemory !== null) {
    add("context", plan.gpuMemory.kvBytes + plan.gpuMemory.stateBytes);
    add("scratch", plan.gpuMemory.computeBytes);
  }
  return [...byName]
    .map(([name, bytes]) => ({ name, bytes }))
    .filter(({ bytes }) => bytes > 0)
    .sort((one, other) => other.bytes - one.bytes);
}

// ---- what to expect -----------------------------------------------------------------------------------------------

const basisTexts: Readonly<Record<Estimate["basis"], string>> = {
  none: "",
  model: "computed from what was measured here",
  corrected: "",
  measured: "",
};

function speedText(rate: number | null, estimate: Estimate): string {
  if (rate === null) {
    return estimate.note;
  }
  const why = estimate.basis === "model" ? basisTexts.model : estimate.note;
  return `${rateText(rate)} (${why})`;
}

/** Speed, the bound, bytes, hits, context, and what limits it. */
export function expectRows(
  plan: Plan,
  model: Model,
  machine: Machine,
  limits: PlanLimits,
): readonly (readonly string[])[] {
  const { estimate } = plan;
  const { touched, gpu, ram, pool, read } = estimate.tokenBytes;
  const places = [
    ...(gpu > 0 ? [`${bytesText(gpu)} on the gpu`] : []),
    ...(ram > 0 ? [`${bytesText(ram)} in ram`] : []),
    ...(pool > 0 ? [`${bytesText(pool)} in the pool`] : []),
    `${bytesText(read)} read`,
  ];
  const rows: string[][] = [
    ["mode", `${plan.mode} (${plan.choices.find(({ name }) => name === "mode")?.reason ?? ""})`],
    ["decode", speedText(estimate.decodeTokensPerSecond, estimate)],
  ];
  if (estimate.prefillTokensPerSecond !== null) {
    rows.push([
      "prompt",
      `${rateText(estimate.prefillTokensPerSecond)}, in batches of ${countText(plan.ubatchTokens)}`,
    ]);
  }
  if (estimate.bound !== null) {
    rows.push(["bound", estimate.bound.sentence]);
  }
  rows.push(["a token", `touches ${bytesText(touched)}: ${places.join(", ")}`]);
  if (estimate.hits !== null) {
    rows.push(["pool hits", hitsText(estimate.hits)]);
  }
  rows.push(["context", contextText(plan, model)], ["limited by", limitText(plan, model, machine, limits)]);
  return rows;
}

function hitsText({ rate, leastRate, curve }: NonNullable<Estimate["hits"]>): string {
  if (rate === leastRate) {
    return `${percentText(rate)}: the part that stays`;
  }
  const source = curve === "recorded" ? "as earlier runs of this model" : "assumed, as other models do";
  return `${percentText(rate)} (${source}; ${percentText(leastRate)} if routing were random)`;
}

function contextText(plan: Plan, model: Model): string {
  const { contextTokens, longestContextTokens } = plan;
  const trained = model.trainedContextTokens;
  const most =
    longestContextTokens >= trained
      ? `all ${countText(trained)} that it was trained for would fit`
      : `at most ${countText(longestContextTokens)} fit, of ${countText(trained)} in training`;
  return `${countText(contextTokens)} tokens (${most})`;
}

/** One sentence: what to have more of. */
function limitText(plan: Plan, model: Model, machine: Machine, limits: PlanLimits): string {
  const streamed = plan.tensors.reduce((sum, one) => sum + (one.tier === "nvme" ? one.sizeBytes : 0), 0);
  if (plan.streaming !== null) {
    const more = bytesText(Math.max(0, streamed - plan.memory.poolBytes));
    const who =
      plan.estimate.bound?.by === "computing"
        ? "the processor: its products take longer than the reads"
        : "the disk";
    return `${who}; ${more} more memory would make it resident`;
  }
  if (plan.mode === "partial-gpu") {
    const onRam = plan.tensors.reduce((sum, one) => sum + (one.tier === "ram" ? one.sizeBytes : 0), 0);
    return `the processor: ${bytesText(onRam)} of the weights do not fit on the gpu`;
  }
  if (plan.gpuLayers > 0) {
    return "the gpu's memory bandwidth";
  }
  const hasGpu = gpuBudgetOf(machine, { ...limits, gpuMemoryBytes: null }) !== null;
  return `the processor: ${bytesText(model.touchedBytesPerToken)} pass through it for a token${hasGpu ? " (a gpu is there: --gpu-memory)" : ""}`;
}

// ---- memory -------------------------------------------------------------------------------------------------------

const memoryNames: Readonly<Record<keyof Plan["memory"], string>> = {
  weightBytes: "resident weights",
  poolBytes: "pool for streamed weights",
  kvBytes: "context",
  stateBytes: "recurrent state",
  computeBytes: "scratch",
  streamingBytes: "scratch of streaming",
  draftBytes: "draft model or MTP context",
  projectorBytes: "projector for images",
  processBytes: "hypura itself",
};

/** Bytes of ram by purpose, with bars. */
export function memoryRows(plan: Plan, budgetBytes: number): readonly (readonly string[])[] {
  const parts = Object.entries(memoryNames)
    .map(([key, name]) => ({ name, bytes: plan.memory[key as keyof Plan["memory"]] }))
    .filter(({ bytes }) => bytes > 0);
  return [...parts, { name: "together", bytes: totalBytes(plan.memory) }].map(({ name, bytes }) => [
    name,
    bytesText(bytes),
    bar(bytes / budgetBytes, barWidth),
    percentText(bytes / budgetBytes),
  ]);
}

/** Tensors that the model description does not know: they stay in memory, and a person should hear of it. */
export function unknownTensors(model: Model): readonly ModelTensor[] {
  return model.tensors.filter((tensor) => tensor.role === "other");
}

// A model's own layers for the tokens after the next (MTP): whether they guess, and why not where they do not. Their
// weights are a part of the model; what they take besides is a context of their own. Pure.

import type { Model } from "./model";
import type { Plan } from "./plan";
import { mtpMemoryBytes } from "./plan-memory";
import { type Task, useOf, usualUbatchTokens } from "./plan-task";
import { bytesText, countText } from "./text";

/**
 * Architectures whose MTP layer this build has a graph for (LLM_GRAPH_TYPE_DECODER_MTP in src/models of llama.cpp v0.5.0)
 * and was tried with. The others that have one (deepseek32, deepseek4, glm-dsa, qwen3next, qwen35, qwen35moe, step35, mimo2,
 * hy-v3, cohere2moe, bailingmoe3, nemotron-h-moe) need recurrent state taken back, several layers in a chain, or caches of
 * other kinds, which nobody tried here: a graph that asserts ends the process.
 */
const tried: readonly string[] = ["glm4moe"];

/** `alone` is the plan without; `planned` makes one for a task, or gives null where it does not fit. */
export function withMtp(task: Task, alone: Plan, planned: (task: Task) => Plan | null): Plan {
  const { model, limits } = task;
  if (model.mtpLayerCount === 0 || limits.embeddings === true) {
    return alone;
  }
  const lack = limits.speculation === "off" ? "nothing is guessed: asked for" : lackOf(task, alone);
  if (lack !== null) {
    return withChoice(alone, "not used", lack);
  }
  const use = useOf(task, {
    contextTokens: alone.contextTokens,
    ubatchTokens: usualUbatchTokens,
    gpuLayers: 0,
  });
  const bytes = mtpMemoryBytes(model, use);
  const together = planned({
    ...task,
    limits: { ...limits, contextTokens: alone.contextTokens },
    budget: task.budget - bytes,
    mtpBytes: bytes,
  });
  if (together === null) {
    return withChoice(alone, "not used", `a context of ${bytesText(bytes)} for them does not fit`);
  }
  if (together.speculation === null) {
    const why = together.choices.find((choice) => choice.name === "speculation")?.reason ?? "";
    return withChoice(alone, "not used", `nothing is guessed: ${why}`);
  }
  const kept = new Map(
    alone.choices.filter(({ name }) => name === "context" || name === "draft").map((one) => [one.name, one]),
  );
  const choices = together.choices.map((one) => kept.get(one.name) ?? one);
  const draft = kept.get("draft");
  return withChoice(
    { ...together, choices: draft === undefined ? choices : [...choices, draft] },
    countText(model.mtpLayerCount),
    `the model's own guesses take ${bytesText(bytes)} of context`,
  );
}

/** Why the layers cannot guess; null where they can. */
function lackOf({ model, gpu }: Task, { speculation }: Plan): string | null {
  if ((speculation?.draftPath ?? null) !== null) return "a draft model guesses";
  if (!tried.includes(model.architecture))
    return `guessing with those of ${model.architecture} was not tried`;
  if (model.mtpLayerCount > 1) return "llama.cpp guesses with one such layer here";
  if (model.memoryLayers.some(({ stateElements }) => stateElements > 0)) {
    return "a wrong guess cannot be taken back from a recurrent state without a copy of it";
  }
  if (gpu !== null) return "guessing with them beside a GPU was not tried";
  return hasHead(model) ? null : "the file lacks their tensors";
}

function hasHead({ tensors, layerCount }: Model): boolean {
  return tensors.some(({ name }) => name === `blk.${layerCount}.nextn.eh_proj.weight`);
}

function withChoice(plan: Plan, value: string, reason: string): Plan {
  return { ...plan, choices: [...plan.choices, { name: "mtp layers", value, reason }] };
}

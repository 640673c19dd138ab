// A plan with a draft model or without: the draft's memory is taken from the weights, both plans are made, and the
// better one by plan-speculation.ts's rule is the plan. It owns the comparison and its line in the plan's choices. Pure.

import { HypuraError } from "./errors";
import type { DraftModel, Plan } from "./plan";
import type { PlacedClass, Placement } from "./plan-cost";
import { draftMemoryBytes } from "./plan-memory";
import { type Draft, type DraftVerdict, judgeDraft } from "./plan-speculation";
import { speculationFacts, type Task, useOf, usualUbatchTokens } from "./plan-task";
import { bytesText, printable } from "./text";

/** `alone` is the plan without the draft; `planned` makes one for a task, or gives null where it does not fit. */
export function withDraft(
  task: Task,
  alone: Plan,
  { path, model, isAskedFor }: DraftModel,
  planned: (task: Task) => Plan | null,
): Plan {
  const { limits } = task;
  const use = useOf(task, {
    contextTokens: alone.contextTokens,
    ubatchTokens: usualUbatchTokens,
    gpuLayers: 0,
  });
  const name = printable(path.split(/[\\/]/).at(-1) ?? path);
  const draft: Draft = { path, name, model, bytes: draftMemoryBytes(model, use) };
  const isForced = isAskedFor && typeof limits.speculation === "number";
  const together = planned({
    ...task,
    limits: { ...limits, contextTokens: alone.contextTokens },
    budget: task.budget - draft.bytes,
    draft,
  });
  if (together === null) {
    const lack = `its ${bytesText(draft.bytes)} leave too little of ${bytesText(task.budget)} for the model`;
    if (isForced) {
      throw new HypuraError(
        "not-enough-memory",
        `the draft model ${name} does not fit: ${lack}; allow more with --memory, or leave out --draft`,
      );
    }
    return withChoice(alone, "none", `${name}: ${lack}`);
  }
  const contextReason = alone.choices.find((choice) => choice.name === "context");
  const asAlone = {
    ...together,
    choices: together.choices.map((one) => (one.name === "context" ? (contextReason ?? one) : one)),
  };
  if (isForced) {
    return withChoice(asAlone, `${name}, ${bytesText(draft.bytes)}`, "asked for");
  }
  if (together.speculation === null) {
    const why = together.choices.find((choice) => choice.name === "speculation")?.reason ?? "";
    return withChoice(alone, "none", `${name}: ${why === "" ? "nothing is guessed" : why}`);
  }
  const verdict = verdictOn(task, draft, { alone, together, guesses: together.speculation.maxTokens });
  return verdict.pays
    ? withChoice(asAlone, `${name}, ${bytesText(draft.bytes)}`, verdict.reason)
    : withChoice(alone, "none", `${name}: ${verdict.reason}`);
}

function verdictOn(
  task: Task,
  draft: Draft,
  plans: { readonly alone: Plan; readonly together: Plan; readonly guesses: number },
): DraftVerdict {
  const alone = placementOf(task, plans.alone);
  const together = placementOf(task, plans.together);
  return judgeDraft({
    draft,
    model: task.model,
    alone,
    together,
    guesses: plans.guesses,
    speeds: task.speeds,
    experienceAlone: speculationFacts(task, alone).experience,
    experienceTogether: speculationFacts({ ...task, draft }, together).experience,
  });
}

/** The placement that a plan was made of. */
function placementOf({ model }: Task, plan: Plan): Placement {
  const tiers = plan.tensors.map(({ tier }) => tier);
  const { streaming } = plan;
  if (streaming === null) {
    return { gpuLayers: plan.gpuLayers, tiers, classes: [] };
  }
  const sets = new Map(model.strides.map((set) => [set.tensorIndex, set]));
  const classes = streaming.classes.map(({ strideBytes, slotCount, policy }, classIndex): PlacedClass => {
    const own = streaming.tensors
      .filter((one) => one.classIndex === classIndex)
      .flatMap((one) => sets.get(one.tensorIndex) ?? []);
    return {
      kind: policy.kind === "pinned-cyclic" ? "dense" : "expert",
      strideBytes,
      strideCount: own.reduce((sum, set) => sum + set.strideCount, 0),
      slotCount,
      pinnedCount: policy.pinnedSlots,
      sets: own,
    };
  });
  return { gpuLayers: plan.gpuLayers, tiers, classes };
}

function withChoice(plan: Plan, value: string, reason: string): Plan {
  const at = plan.choices.findIndex((choice) => choice.name === "speculation");
  const choice = { name: "draft", value, reason };
  const choices = at < 0 ? [...plan.choices, choice] : plan.choices.toSpliced(at + 1, 0, choice);
  return { ...plan, choices };
}

// Whether experts are read before their router has chosen them. While a layer is computed the disk mostly rests; the
// router of the next layer, asked about the input of this one, names most of the experts that it will choose, and what is
// read meanwhile is not waited for later. Where the disk is what a token waits for this brings little and costs little,
// because a prediction goes behind every read that is asked for. Pure.

import type { Model, ModelTensor } from "./model";
import type { Choice, Prediction, SlotClass, Streaming } from "./plan";
import { countText } from "./text";

/** Slots for so many times what a layer asks for: with fewer, what is predicted would push out what is needed. */
const leastLayers = 4;

/** Copies of the routers are half as large (f16). ffi/native/predictor.h. */
export function predictionBytes(model: Model): number {
  return model.tensors.reduce((sum, tensor) => sum + (isRouter(tensor) ? tensor.sizeBytes / 2 : 0), 0);
}

interface Chosen {
  readonly prediction: Prediction | null;
  readonly choice: Choice | null;
}

/** What is predicted; nothing for models without streamed experts, where there is no choice either. */
export function choosePrediction(
  model: Model,
  streamed: Streaming["tensors"],
  classes: readonly SlotClass[],
): Chosen {
  const layers = expertLayers(model, streamed);
  if (layers.length === 0) {
    return { prediction: null, choice: null };
  }
  const off = (reason: string): Chosen => ({
    prediction: null,
    choice: { name: "prefetch", value: "off", reason },
  });
  const askedAtOnce = classes.map((_, classIndex) =>
    Math.max(
      ...layers.map(
        ({ places, touchedCount }) =>
          touchedCount * places.filter((place) => streamed[place]?.classIndex === classIndex).length,
      ),
    ),
  );
  const strideCounts = classes.map((_, classIndex) =>
    streamed.reduce((sum, one) => sum + (one.classIndex === classIndex ? one.strideCount : 0), 0),
  );
  if (classes.every(({ slotCount }, i) => slotCount >= (strideCounts[i] ?? 0))) {
    return off("the pool holds every expert");
  }
  if (classes.some(({ slotCount }, i) => slotCount < leastLayers * (askedAtOnce[i] ?? 0))) {
    return off("the pool holds little more than a layer asks for");
  }
  const prediction = predictionOf(model, streamed);
  if (prediction === null) {
    return off("the routers of this architecture see something else than the layers before");
  }
  return {
    prediction,
    choice: {
      name: "prefetch",
      value: `${countText(prediction.experts)} experts of the next layer`,
      reason: "its router is asked early, while the disk rests",
    },
  };
}

/** Every router that can be asked early, whatever the pool; null where there is none. */
export function predictionOf(model: Model, streamed: Streaming["tensors"]): Prediction | null {
  const layers = expertLayers(model, streamed);
  const byName = new Map(model.tensors.map((tensor) => [tensor.name, tensor]));
  const routers = layers.flatMap((layer, i) => {
    const before = layers[i - 1];
    const router = before === undefined ? null : routerOf(byName, before, layer);
    return router === null ? [] : [router];
  });
  const experts = Math.max(0, ...layers.map(({ touchedCount }) => touchedCount));
  return routers.length === 0 ? null : { experts, routers };
}

/**
 * Of the experts that are not in the pool when they are needed, so many were predicted and are there or on their way
 * (test/bench/NOTES.md: moe-6g, 2 GB). Measured on one model only; a model's own runs correct what follows from it.
 */
const predictedShare = 0.7;

/** That share; 0 where no router can be asked early. */
export function earlyShareOf(model: Model): number {
  const all = model.strides.map(({ tensorIndex, strideCount }) => ({
    tensorIndex,
    strideCount,
    classIndex: 0,
  }));
  return predictionOf(model, all) === null ? 0 : predictedShare;
}

interface ExpertLayer {
  readonly layer: number;
  readonly places: readonly number[];
  /** Of these, one whose product takes what goes into the layer's experts. */
  readonly inputPlace: number | null;
  readonly expertCount: number;
  readonly touchedCount: number;
}

/** Layers with streamed experts, in the order of a pass, and the places of these in `streamed`. */
function expertLayers(model: Model, streamed: Streaming["tensors"]): readonly ExpertLayer[] {
  const byLayer = new Map<number, ExpertLayer>();
  for (const [place, { tensorIndex, strideCount }] of streamed.entries()) {
    const tensor = model.tensors[tensorIndex];
    const touchedCount = tensor?.strides?.touchedCount ?? 0;
    if (tensor === undefined || tensor.layer === null || !isExpert(tensor)) continue;
    const known = byLayer.get(tensor.layer);
    byLayer.set(tensor.layer, {
      layer: tensor.layer,
      places: [...(known?.places ?? []), place],
      inputPlace:
        known?.inputPlace ?? (/\.ffn_(gate|up|gate_up)_exps\.weight$/.test(tensor.name) ? place : null),
      expertCount: strideCount,
      touchedCount,
    });
  }
  return [...byLayer.values()].sort((one, other) => one.layer - other.layer);
}

function isExpert({ role }: ModelTensor): boolean {
  return role === "expert" || role === "expert-gate-up";
}

function isRouter({ name }: ModelTensor): boolean {
  return /^blk\.\d+\.ffn_gate_inp\.weight$/.test(name);
}

/** Null where the router's input is not the layer's norm alone, or another number decides with it. */
function routerOf(
  byName: ReadonlyMap<string, ModelTensor>,
  before: ExpertLayer,
  layer: ExpertLayer,
): Prediction["routers"][number] | null {
  const named = (of: number, name: string): ModelTensor | undefined => byName.get(`blk.${of}.${name}`);
  const router = named(layer.layer, "ffn_gate_inp.weight");
  const norm = named(layer.layer, "ffn_norm.weight");
  const normBefore = named(before.layer, "ffn_norm.weight");
  const biased = ["ffn_gate_inp.bias", "exp_probs_b.bias", "ffn_norm.bias"];
  const after = before.inputPlace;
  if (
    router === undefined ||
    norm === undefined ||
    normBefore === undefined ||
    after === null ||
    layer.layer !== before.layer + 1 ||
    [router, norm, normBefore].some(({ typeName }) => typeName !== "f32") ||
    router.sizeBytes !== layer.expertCount * norm.sizeBytes ||
    normBefore.sizeBytes !== norm.sizeBytes ||
    biased.some((name) => named(layer.layer, name) !== undefined || named(before.layer, name) !== undefined)
  ) {
    return null;
  }
  return {
    after,
    asked: layer.places,
    tensorIndex: router.index,
    normIndex: norm.index,
    normBeforeIndex: normBefore.index,
  };
}

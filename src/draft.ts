// Draft models: a small model that guesses for a large one. It opens the one that a person named or finds one beside the
// model, and checks that both have one vocabulary before anything is loaded: llama.cpp would load a draft that does not
// fit, and then silently guess without it. Whether a draft pays is the plan's question (plan-draft.ts).

import { readdirSync, realpathSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { HypuraError } from "./errors";
import { splitNames } from "./gguf";
import { type ModelFile, openModelFile, readMetadataArray } from "./modelfile";
import type { DraftModel, Plan, PlanLimits } from "./plan";
import { countText } from "./text";

/** SPEC_VOCAB_MAX_SIZE_DIFFERENCE and SPEC_VOCAB_CHECK_START_TOKEN_ID of llama.cpp's common/speculative.cpp. */
const mostSizeDifference = 128;
const firstComparedToken = 5;

/** A model of more than this share of the large one guesses about as slowly as that computes. */
const mostShare = 0.35;
/** In a folder of hundreds of models the search would take longer than it brings. */
const mostCandidates = 16;

/**
 * The plan that `make` gives with the draft model that there is: the one that was asked for, else one beside a dense
 * model that streams. Throws where the one that was asked for cannot be one.
 */
export function planWithDraft(file: ModelFile, limits: PlanLimits, make: (limits: PlanLimits) => Plan): Plan {
  const { draftPath = null, speculation } = limits;
  if (draftPath !== null) {
    if (speculation === "off") {
      throw new HypuraError(
        "usage",
        "--draft names a model that guesses and --speculation off forbids guessing: leave out one of them",
      );
    }
    return make({ ...limits, draft: openDraft(file, draftPath) });
  }
  const alone = make(limits);
  const planned = limits.plan?.speculation?.draftPath ?? null;
  if (planned !== null) {
    openDraft(file, planned); // since the plan was made it may have become another file, or none
    return alone;
  }
  if (alone.streaming === null || file.model.kind !== "dense" || alone.speculation === null) {
    return alone;
  }
  const draft = (limits.plan ?? null) === null ? besideOnce(file) : null; // a plan from a file decides all
  return draft === null ? alone : make({ ...limits, draft });
}

/** The model that a person named as the draft. Throws where it is none, or none for this model. */
export function openDraft(file: ModelFile, path: string): DraftModel {
  const draft = openModelFile(path);
  const difference = draft.model.generatesText
    ? differenceOf(file, draft)
    : "it turns text into vectors and generates none";
  if (difference !== null) {
    throw new HypuraError(
      "unsupported-model",
      `${JSON.stringify(basename(path))} cannot guess for ${JSON.stringify(basename(file.path))} (${difference}): ` +
        "give a smaller model of the same family",
    );
  }
  if (isSame(draft.path, file.path)) {
    throw new HypuraError(
      "usage",
      "--draft names the model itself, which guesses as slowly as it computes: give a smaller model of the same family",
    );
  }
  if (draft.files.length > 1) {
    throw new HypuraError(
      "unsupported-model",
      `the draft model ${JSON.stringify(basename(path))} is split in ${draft.files.length} files: give one in a single file`,
    );
  }
  return { path: draft.path, model: draft.model, isAskedFor: true };
}

/** A server makes many plans of one model, and comparing two vocabularies takes a tenth of a second. */
const besideOf = new WeakMap<ModelFile, DraftModel | null>();

function besideOnce(file: ModelFile): DraftModel | null {
  const known = besideOf.get(file);
  if (known !== undefined) return known;
  const found = draftBeside(file);
  besideOf.set(file, found);
  return found;
}

/** The smallest model in the folder of `file` that has its vocabulary; null where there is none. */
export function draftBeside(file: ModelFile): DraftModel | null {
  const folder = dirname(file.path);
  let names: readonly string[];
  try {
    names = readdirSync(folder);
  } catch {
    return null; // a folder that may be passed and not listed
  }
  const candidates = names
    .filter((name) => name.toLowerCase().endsWith(".gguf") && splitNames(name) === null)
    .filter((name) => !isSame(join(folder, name), file.path))
    .sort()
    .slice(0, mostCandidates)
    .flatMap((name) => openQuietly(join(folder, name)))
    .filter(({ model }) => model.generatesText && model.tensorBytes <= mostShare * file.model.tensorBytes)
    .sort((one, other) => one.model.tensorBytes - other.model.tensorBytes);
  const fitting = candidates.find((candidate) => differenceOf(file, candidate) === null);
  return fitting === undefined ? null : { path: fitting.path, model: fitting.model, isAskedFor: false };
}

/** What lies beside a model and is no model of ours concerns nobody. */
function openQuietly(path: string): readonly ModelFile[] {
  try {
    return [openModelFile(path)];
  } catch (error) {
    if (error instanceof HypuraError) return [];
    throw error;
  }
}

function isSame(one: string, other: string): boolean {
  try {
    return realpathSync(one) === realpathSync(other);
  } catch {
    return false;
  }
}

/**
 * Why the two have not one vocabulary, in a few words; null where they have. The same questions as llama.cpp's
 * (common_speculative_are_compatible), except that a key that only one file has counts as a difference here.
 */
export function differenceOf(target: ModelFile, draft: ModelFile): string | null {
  const key = (name: string) => `tokenizer.ggml.${name}`;
  const values = (name: string) => [target, draft].map(({ gguf }) => gguf.metadata.get(key(name)));
  const shown = (value: unknown): string => (value === undefined ? "not given" : String(value));
  const differing = (name: string): string | null => {
    const [one, other] = values(name);
    return one === other ? null : `${key(name)} is ${shown(other)}, not ${shown(one)}`;
  };
  const [addsStart] = values("add_bos_token");
  const [addsEnd] = values("add_eos_token");
  const scalars =
    differing("model") ??
    differing("add_bos_token") ??
    (addsStart === false ? null : differing("bos_token_id")) ??
    differing("add_eos_token") ??
    (addsEnd === true ? differing("eos_token_id") : null);
  if (scalars !== null) {
    return scalars;
  }
  const sizes = [target, draft].map(({ model }) => model.vocabularySize) as [number, number];
  if (Math.abs(sizes[0] - sizes[1]) > mostSizeDifference) {
    return `it has ${countText(sizes[1])} tokens of vocabulary, not ${countText(sizes[0])}`;
  }
  const [own, other] = [target, draft].map((file) => readMetadataArray(file, key("tokens")));
  if (own === null || own === undefined || other === null || other === undefined) {
    return "a file has no vocabulary";
  }
  for (let i = firstComparedToken; i < Math.min(own.length, other.length); i++) {
    if (own[i] !== other[i]) {
      return `token ${countText(i)} is ${JSON.stringify(other[i])}, not ${JSON.stringify(own[i])}`;
    }
  }
  return null;
}

// A plan that a person saved, and perhaps changed, for a model that is here: `--plan FILE`. It owns reading it and the
// check that it is a plan of this very model (its tensors at their places); native code checks the numbers once more.

import { readFileSync } from "node:fs";
import { HypuraError } from "./errors";
import type { ModelFile } from "./modelfile";
import type { Plan } from "./plan";

/** What native code reads of a plan (ffi/native/engine.cpp, parse_plan) and what this side shows of it. */
const fields: Readonly<Record<string, "number" | "string" | "boolean" | "object">> = {
  mode: "string",
  model: "object",
  contextTokens: "number",
  slotCount: "number",
  batchTokens: "number",
  ubatchTokens: "number",
  decodeThreads: "number",
  prefillThreads: "number",
  pollPercent: "number",
  gpuLayers: "number",
  kvTypeK: "string",
  kvTypeV: "string",
  repack: "boolean",
  loadMode: "string",
  streaming: "object",
  memory: "object",
  choices: "object",
};

/** The plan in the file at `path`, alone or in what `hypura inspect --json` printed, for the model in `file`. */
export function readPlan(path: string, file: ModelFile): Plan {
  const document = parse(path);
  const plan = (isObject(document) && isObject(document["plan"]) ? document["plan"] : document) as
    | (Partial<Plan> & Record<string, unknown>)
    | null;
  const refuse = (what: string): never => {
    throw new HypuraError(
      "usage",
      `${JSON.stringify(path)} ${what}: make one with \`hypura inspect MODEL --json\``,
    );
  };
  if (!isObject(plan) || plan.version !== 1) {
    return refuse("holds no plan of this version of hypura");
  }
  const wrong = Object.entries(fields).find(([name, type]) => typeof plan[name] !== type);
  if (wrong !== undefined) {
    return refuse(`is no whole plan: ${wrong[0]} is not there or no ${wrong[1]}`);
  }
  const sizes = (files: Plan["files"] | undefined): string =>
    JSON.stringify((Array.isArray(files) ? files : []).map((one) => one?.sizeBytes));
  const places = (tensors: Plan["tensors"] | undefined): string =>
    JSON.stringify(
      (Array.isArray(tensors) ? tensors : []).map((one) => [
        one?.name,
        one?.fileIndex,
        one?.offsetBytes,
        one?.sizeBytes,
      ]),
    );
  const isSame =
    sizes(plan.files) === sizes(file.files) &&
    places(plan.tensors) === places(file.model.tensors as unknown as Plan["tensors"]);
  if (!isSame) {
    return refuse(`is the plan of another model than ${JSON.stringify(file.path)}`);
  }
  return { ...(plan as unknown as Plan), files: file.files };
}

function parse(path: string): unknown {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (cause) {
    const isMissing = (cause as { readonly code?: string }).code === "ENOENT";
    throw new HypuraError(
      isMissing ? "not-found" : "io",
      isMissing
        ? `there is no plan ${JSON.stringify(path)}: check the path`
        : `the plan ${JSON.stringify(path)} cannot be read (${(cause as Error).message})`,
      { cause },
    );
  }
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new HypuraError(
      "usage",
      `${JSON.stringify(path)} is no JSON: make a plan with \`hypura inspect MODEL --json\``,
      { cause },
    );
  }
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null;
}

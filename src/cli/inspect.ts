// `hypura inspect`: what a model file holds and how it would run here. Reads headers only and loads no weights, so
// it works on a machine that could not run the model. Its plan is the one `run` makes from the same flags.

import { basename } from "node:path";
import { planOf } from "../api";
import { HypuraError } from "../errors";
import type { GgufValue } from "../gguf";
import { type Machine, readMachine } from "../machine";
import { kvBytesPerToken, type Model } from "../model";
import { type ModelFile, openModelFile } from "../modelfile";
import { budgetOf, type MemoryUse, type Plan, type PlanLimits, totalBytes } from "../plan";
import { bar, bytesText, clip, countText, plural, printable, shortCountText, table } from "../text";
import { command, limitArgs, limitsOf, warnOfCut } from "./command";
import { print, stdout } from "./terminal";

export const inspectCommand = command(
  {
    meta: { name: "inspect", description: "Show what a model file holds and how it would run here" },
    args: {
      model: { type: "positional", description: "A .gguf file (any file of a split model)", required: true },
      tensors: { type: "boolean", description: "List every tensor" },
      ...limitArgs,
      json: { type: "boolean", description: "Print one JSON object with everything" },
    },
    async run({ args }) {
      const options = { tensors: args.tensors === true, json: args.json === true };
      await print(inspectText(args.model, limitsOf(args), options));
    },
  },
  {
    examples: [
      "hypura inspect model.gguf",
      "hypura inspect model.gguf --memory 4G --context 8192    how it would run with these",
      "hypura inspect model.gguf --tensors",
      "hypura inspect model.gguf --json",
    ],
    notes: [
      "A model that cannot run here is shown all the same, with the reason; the exit status is then 0 too.",
    ],
  },
);

/** What the command prints about the model file at `path`. */
export function inspectText(
  path: string,
  limits: PlanLimits,
  options: { readonly tensors: boolean; readonly json: boolean },
): string {
  const file = openModelFile(path);
  const verdict = judge(file, limits);
  if (verdict.plan !== null) {
    warnOfCut(limits, verdict.plan);
  }
  return options.json ? `${JSON.stringify(asJson(file, verdict))}\n` : page(file, verdict, options.tensors);
}

/** The plan, or the reason why there is none. */
interface Verdict {
  readonly machine: Machine;
  /** What the plan may use: what is free less a reserve, or what --memory allows. */
  readonly budgetBytes: number;
  readonly plan: Plan | null;
  readonly refusal: HypuraError | null;
}

function judge(file: ModelFile, limits: PlanLimits): Verdict {
  const machine = readMachine();
  const budgetBytes = budgetOf(machine, limits);
  try {
    return { machine, budgetBytes, plan: planOf(file, limits, machine), refusal: null };
  } catch (error) {
    if (error instanceof HypuraError && error.code !== "usage") {
      return { machine, budgetBytes, plan: null, refusal: error };
    }
    throw error;
  }
}

// ---- the page -----------------------------------------------------------------------------------------------------

/** Everything fits in this many columns. */
const pageWidth = 100;
const barWidth = 24;

function page(file: ModelFile, verdict: Verdict, withTensors: boolean): string {
  const sections = [
    headSection(file),
    section("Metadata", metadataRows(file)),
    section(
      "Weights by role",
      shareRows(file.model.bytesByRole, file.model, (tensor) => tensor.role),
      [1, 3, 4],
    ),
    section(
      "Weights by type",
      shareRows(file.model.bytesByType, file.model, (tensor) => tensor.typeName),
      [1, 3, 4],
    ),
    section("One token", tokenRows(file.model)),
    ...(withTensors ? [section("Tensors", tensorRows(file.model), [3])] : []),
    ...hereSections(verdict),
  ];
  const lines = sections.join("\n\n").split("\n");
  return `${lines.map((line) => clip(line, pageWidth)).join("\n")}\n`;
}

function section(title: string, rows: readonly (readonly string[])[], right: readonly number[] = []): string {
  const body = table(rows, right).split("\n");
  return `${stdout.paint("bold", title)}\n${body.map((line) => `  ${line}`).join("\n")}`;
}

function headSection({ path, files, gguf, model }: ModelFile): string {
  const fileBytes = files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const split = files.length === 1 ? "" : ` in ${plural(files.length, "file")}`;
  const experts =
    model.expertCount === 0
      ? ""
      : `, ${countText(model.expertCount)} experts of which ${countText(model.expertUsedCount)} work on a token`;
  const type = model.fileTypeName === null ? "" : `, ${model.fileTypeName}`;
  const facts: readonly (readonly string[])[] = [
    [
      "model",
      `${printable(model.name ?? "(unnamed)")}, ${shortCountText(model.parameterCount)} parameters${type}`,
    ],
    ["kind", `${printable(model.architecture)}, ${model.kind}${experts}`],
    [
      "shape",
      `${plural(model.layerCount, "layer")}, ${countText(model.embeddingLength)} wide, ${plural(model.headCount, "head")} ` +
        `(${countText(model.kvHeadCount)} for keys and values), ${countText(model.vocabularySize)} tokens of vocabulary`,
    ],
    ["context", `${countText(model.trainedContextTokens)} tokens in training`],
    ["chat", model.hasChatTemplate ? "has a chat template" : "no chat template: run it with --raw"],
  ];
  return section(
    `${printable(basename(path))}: ${bytesText(fileBytes)}${split}, GGUF version ${gguf.version}`,
    facts,
  );
}

function metadataRows({ gguf }: ModelFile): readonly (readonly string[])[] {
  return [...gguf.metadata].map(([key, value]) => [clip(printable(key), 44), valueText(value)]);
}

function valueText(value: GgufValue): string {
  if (typeof value === "string") {
    return printable(value.slice(0, 2 * pageWidth));
  }
  if (typeof value === "number") {
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(7))); // a float of 32 bits
  }
  if (typeof value !== "object") {
    return String(value);
  }
  const kind = `${countText(value.count)} of ${value.elementType}`;
  const few = value.values === null || value.count > 16 ? [] : value.values.map((one) => valueText(one));
  return few.length === 0 ? `(${kind})` : `[${few.join(", ")}]`;
}

type Tensor = Model["tensors"][number];

function shareRows(
  bytesBy: ReadonlyMap<string, number>,
  model: Model,
  keyOf: (tensor: Tensor) => string,
): readonly (readonly string[])[] {
  return [...bytesBy]
    .sort(([, one], [, other]) => other - one)
    .map(([key, bytes]) => {
      const fraction = bytes / Math.max(1, model.tensorBytes);
      const count = model.tensors.filter((tensor) => keyOf(tensor) === key).length;
      return [key, bytesText(bytes), bar(fraction, barWidth), percentText(fraction), plural(count, "tensor")];
    });
}

function percentText(fraction: number): string {
  return `${(fraction * 100).toFixed(1)} %`;
}

function tokenRows(model: Model): readonly (readonly string[])[] {
  const { tensorBytes, touchedBytesPerToken, strides } = model;
  const touched = percentText(touchedBytesPerToken / Math.max(1, tensorBytes));
  const streamable = strides.reduce((sum, one) => sum + one.strideBytes * one.strideCount, 0);
  const count = strides.reduce((sum, one) => sum + one.strideCount, 0);
  const used = strides.reduce((sum, one) => sum + one.touchedCount, 0);
  const usedBytes = strides.reduce((sum, one) => sum + one.touchedCount * one.strideBytes, 0);
  const strideText =
    count === 0
      ? "none: every weight must be in memory"
      : `${bytesText(streamable)} in ${plural(count, "stride")}; a token touches ${countText(used)} of them, ${bytesText(usedBytes)}`;
  const kv = kvBytesPerToken(model, { keyType: "f16", valueType: "f16" });
  return [
    ["touches", `${bytesText(touchedBytesPerToken)} of ${bytesText(tensorBytes)} of weights (${touched})`],
    ["streamable", strideText],
    ["remembering", `${bytesText(kv)} of context for each token, in f16`],
  ];
}

function tensorRows(model: Model): readonly (readonly string[])[] {
  return model.tensors.map((tensor) => [
    clip(printable(tensor.name), 44),
    tensor.role,
    tensor.typeName,
    bytesText(tensor.sizeBytes),
    tensor.shape.join(" x "),
  ]);
}

const memoryNames: Readonly<Record<keyof MemoryUse, string>> = {
  weightBytes: "resident weights",
  poolBytes: "pool for streamed weights",
  kvBytes: "context",
  stateBytes: "recurrent state",
  computeBytes: "scratch",
  streamingBytes: "scratch of streaming",
  processBytes: "hypura itself",
};

function hereSections({ machine, budgetBytes, plan, refusal }: Verdict): readonly string[] {
  const { availableBytes, totalBytes: allBytes } = machine.memory;
  const free = [
    "memory",
    `${bytesText(availableBytes)} free of ${bytesText(allBytes)}, ${plural(machine.computeCores, "core")}`,
  ];
  if (plan === null) {
    return [`${section("On this machine", [free])}\n${wrapped(`cannot run: ${refusal?.message ?? ""}`)}`];
  }
  const choices = plan.choices.map(({ name, value, reason }) => [name, `${value} (${reason})`]);
  const total = totalBytes(plan.memory);
  const parts = Object.entries(memoryNames)
    .map(([key, name]) => ({ name, bytes: plan.memory[key as keyof MemoryUse] }))
    .filter(({ bytes }) => bytes > 0);
  const rows = [...parts, { name: "together", bytes: total }].map(({ name, bytes }) => [
    name,
    bytesText(bytes),
    bar(bytes / budgetBytes, barWidth),
    percentText(bytes / budgetBytes),
  ]);
  const title = `Its memory, of the ${bytesText(budgetBytes)} that it may have`;
  return [section("On this machine", [free, ...choices]), section(title, rows, [1, 3])];
}

/** A long sentence in lines of the page. */
function wrapped(sentence: string): string {
  const lines = [""];
  for (const word of printable(sentence).split(" ")) {
    const line = lines.at(-1) as string;
    const longer = line === "" ? word : `${line} ${word}`;
    if (Bun.stringWidth(longer) <= pageWidth - 2) {
      lines[lines.length - 1] = longer;
    } else {
      lines.push(word);
    }
  }
  return lines.map((line) => `  ${line}`).join("\n");
}

// ---- JSON ---------------------------------------------------------------------------------------------------------

/** Everything that the page shows and more. Fields are added, never renamed. */
function asJson(
  { path, files, gguf, model }: ModelFile,
  { machine, budgetBytes, plan, refusal }: Verdict,
): object {
  const { tensors, strides, bytesByRole, bytesByType, ...facts } = model;
  return {
    path,
    files,
    gguf: { version: gguf.version, alignment: gguf.alignment },
    model: {
      ...facts,
      bytesByRole: Object.fromEntries(bytesByRole),
      bytesByType: Object.fromEntries(bytesByType),
      kvBytesPerToken: kvBytesPerToken(model, { keyType: "f16", valueType: "f16" }),
      streamableBytes: strides.reduce((sum, one) => sum + one.strideBytes * one.strideCount, 0),
      strideCount: strides.reduce((sum, one) => sum + one.strideCount, 0),
    },
    metadata: Object.fromEntries([...gguf.metadata].map(([key, value]) => [key, jsonValue(value)])),
    tensors,
    machine,
    budgetBytes,
    plan,
    refusal: refusal === null ? null : { code: refusal.code, message: refusal.message },
  };
}

/** Arrays too long to be kept are named by their length; a 64-bit number that JSON cannot hold becomes text. */
function jsonValue(value: GgufValue): unknown {
  if (typeof value === "bigint") {
    return Number.isSafeInteger(Number(value)) ? Number(value) : String(value);
  }
  if (typeof value !== "object") {
    return value;
  }
  const { elementType, count, values } = value;
  return { elementType, count, values: values === null ? null : values.map(jsonValue) };
}

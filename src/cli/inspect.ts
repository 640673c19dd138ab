// `hypura inspect`: what a model file holds and how it would run, here or on a machine that a file describes. Reads
// headers only and loads no weights, so it works on a machine that could not run the model. Its plan is the one `run`
// makes from the same flags.

import { basename } from "node:path";
import { consola } from "consola";
import { planOf } from "../api";
import { HypuraError } from "../errors";
import type { GgufValue } from "../gguf";
import { type Machine, validateMachine } from "../machine";
import { kvBytesPerToken, type Model } from "../model";
import { type ModelFile, openModelFile } from "../modelfile";
import { budgetOf, gpuBudgetOf, type Knowledge, type Plan, type PlanLimits } from "../plan";
import { surroundingsOf } from "../surroundings";
import {
  bandwidthText,
  bar,
  bytesText,
  clip,
  countText,
  durationText,
  plural,
  printable,
  shortCountText,
  table,
} from "../text";
import { command, limitArgs, limitsOf, readJson, warnOfCut, warnOfDraft } from "./command";
import {
  barWidth,
  expectRows,
  memoryRows,
  pageWidth,
  percentText,
  pictureLines,
  unknownTensors,
  wrapped,
} from "./outlook";
import { print, stdout } from "./terminal";

export const machineArg = {
  type: "string",
  description: "Plan for the machine in this file, which `profile --json` printed",
  valueHint: "FILE",
} as const;

export const inspectCommand = command(
  {
    meta: { name: "inspect", description: "Show what a model file holds and how it would run" },
    args: {
      model: { type: "positional", description: "A .gguf file (any file of a split model)", required: true },
      tensors: { type: "boolean", description: "List every tensor" },
      ...limitArgs,
      machine: machineArg,
      verbose: { type: "boolean", description: "Say how the plan was found, and what was measured" },
      json: { type: "boolean", description: "Print one JSON object with everything" },
    },
    async run({ args }) {
      const file = openModelFile(args.model);
      const place = await placeOf(file.path, args.machine);
      const show = {
        tensors: args.tensors === true,
        json: args.json === true,
        verbose: args.verbose === true,
      };
      await print(inspectText(file, limitsOf(args), place, show));
    },
  },
  {
    examples: [
      "hypura inspect model.gguf",
      "hypura inspect model.gguf --memory 4G --context 8192    how it would run with these",
      "hypura inspect model.gguf --machine mac.json            how it would run there",
      "hypura inspect model.gguf --tensors",
      "hypura inspect model.gguf --json > plan.json            for `hypura run --plan plan.json`",
    ],
    notes: [
      "A model that cannot run is shown all the same, with the reason; the exit status is then 0 too.",
      "Speeds are predicted from what `hypura profile` measured and from earlier runs, nothing else.",
    ],
  },
);

/** Where a plan is made for, and what is known of it. */
export interface Place {
  readonly machine: Machine;
  /** In words: "this machine". */
  readonly name: string;
  /** A machine that a file describes: nothing of this process's counts. */
  readonly isElsewhere: boolean;
  readonly knowledge: Knowledge;
}

/** The machine in the file, else this one as it is and as it was measured for the volume of the model. */
export async function placeOf(modelPath: string, machinePath: string | undefined): Promise<Place> {
  if (machinePath !== undefined) {
    const machine = validateMachine(readJson(machinePath, "machine"));
    return { machine, name: printable(basename(machinePath)), isElsewhere: true, knowledge: {} };
  }
  const onNote = (note: string): void => consola.warn(note);
  const here = await surroundingsOf(modelPath, { measure: "cached", onNote });
  return { ...here, name: "this machine", isElsewhere: false };
}

export interface Show {
  readonly tensors: boolean;
  readonly json: boolean;
  readonly verbose: boolean;
}

/** What the command prints about a model. */
export function inspectText(file: ModelFile, limits: PlanLimits, place: Place, show: Show): string {
  const verdict = judge(file, limits, place);
  if (verdict.plan !== null) {
    warnOfCut(limits, verdict.plan);
    warnOfDraft(limits, verdict.plan);
  }
  return show.json ? `${JSON.stringify(asJson(file, verdict))}\n` : page(file, verdict, show);
}

/** The plan, or the reason why there is none. */
export interface Verdict {
  readonly place: Place;
  readonly limits: PlanLimits;
  /** What the plan may use: what is free less a reserve, or what --memory allows. */
  readonly budgetBytes: number;
  readonly plan: Plan | null;
  readonly refusal: HypuraError | null;
}

export function judge(file: ModelFile, limits: PlanLimits, place: Place): Verdict {
  const { machine } = place;
  const budgetBytes = budgetOf(machine, limits);
  try {
    return { place, limits, budgetBytes, plan: planFor(file, limits, place), refusal: null };
  } catch (error) {
    if (error instanceof HypuraError && error.code !== "usage") {
      return { place, limits, budgetBytes, plan: null, refusal: error };
    }
    throw error;
  }
}

function planFor(file: ModelFile, limits: PlanLimits, place: Place): Plan {
  const { machine, isElsewhere, knowledge } = place;
  if (isElsewhere && limits.threads !== null) {
    // More threads than this machine has are no mistake there: its own cores are what counts.
    const cores = Math.min(limits.threads, machine.computeCores);
    return planOf(file, { ...limits, threads: null }, { ...machine, computeCores: cores }, knowledge);
  }
  return planOf(file, limits, machine, knowledge);
}

// ---- the page -----------------------------------------------------------------------------------------------------

function page(file: ModelFile, verdict: Verdict, show: Show): string {
  const { model } = file;
  const sections = [
    headSection(file),
    ...planSections(file, verdict, show),
    section("One token", tokenRows(model)),
    section(
      "Weights by role",
      shareRows(model.bytesByRole, model, (tensor) => tensor.role),
      [1, 3, 4],
    ),
    section(
      "Weights by type",
      shareRows(model.bytesByType, model, (tensor) => tensor.typeName),
      [1, 3, 4],
    ),
    section("Metadata", metadataRows(file)),
    ...(show.tensors ? [section("Tensors", tensorRows(model), [3])] : []),
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

function planSections(file: ModelFile, verdict: Verdict, show: Show): readonly string[] {
  const { place, limits, budgetBytes, plan, refusal } = verdict;
  const { model } = file;
  const unknown = unknownTensors(model);
  const notes = [
    ...(unknown.length === 0
      ? []
      : [
          `${plural(unknown.length, "tensor")} of no known role (${printable(unknown[0]?.name ?? "")}${unknown.length > 1 ? " ..." : ""}): resident, never streamed`,
        ]),
  ];
  const title = `On ${place.name}`;
  if (plan === null) {
    const reason = paragraph(`cannot run: ${printable(refusal?.message ?? "")}`);
    return [`${section(title, machineRows(verdict))}\n${reason}`];
  }
  const room = { ramBytes: budgetBytes, gpuBytes: gpuBudgetOf(place.machine, limits)?.bytes ?? 0 };
  const picture = pictureLines(plan, model, room).map((line) => `  ${line}`);
  return [
    [
      stdout.paint("bold", title),
      ...table(machineRows(verdict))
        .split("\n")
        .map((line) => `  ${line}`),
      ...picture,
    ].join("\n"),
    [
      section("What to expect", wrapRows(expectRows(plan, model, place.machine, limits))),
      ...notes.map(paragraph),
    ].join("\n"),
    section(
      `Its memory, of the ${bytesText(budgetBytes)} that it may have`,
      memoryRows(plan, budgetBytes),
      [1, 3],
    ),
    section(
      "Chosen, and why",
      wrapRows(plan.choices.map(({ name, value, reason }) => [name, `${value} (${reason})`])),
    ),
    ...(show.verbose ? [section("How the plan was found", wrapRows(solvedRows(verdict, plan)))] : []),
  ];
}

function machineRows({ place: { machine } }: Verdict): readonly (readonly string[])[] {
  const { availableBytes, totalBytes: allBytes } = machine.memory;
  const gpus = machine.devices.filter((device) => device.type === "gpu" || device.type === "igpu");
  return [
    [
      "memory",
      `${bytesText(availableBytes)} free of ${bytesText(allBytes)}, ${plural(machine.computeCores, "core")}`,
    ],
    ...gpus.map((device) => [
      "gpu",
      `${printable(device.description)}: ${bytesText(device.freeBytes)} free of ${bytesText(device.totalBytes)}${device.isUnified ? ", part of the memory" : ""}`,
    ]),
  ];
}

/** Both solvers' answers and their distance, what was measured, and what was assumed. */
function solvedRows({ place: { machine } }: Verdict, plan: Plan): readonly (readonly string[])[] {
  const { solved, estimate } = plan;
  const { profile } = machine;
  const rows: string[][] = [];
  if (solved === null) {
    rows.push(["placement", "everything fits: there was nothing to solve"]);
  } else {
    const isMeasured = profile !== null && profile.storage.length > 0;
    const cost = (value: number | null): string =>
      value === null ? "found none" : isMeasured ? `${durationText(value)} a token` : value.toPrecision(4);
    const { greedyCost, programCost, by } = solved;
    const apart =
      greedyCost === null || programCost === null
        ? ""
        : `, ${percentText(Math.abs(greedyCost - programCost) / Math.min(greedyCost, programCost))} apart`;
    rows.push(
      ["by density", cost(greedyCost)],
      ["as a program", `${cost(programCost)}${apart}`],
      ["taken", by === "greedy" ? "by density" : "as a program"],
    );
  }
  if (profile === null) {
    rows.push(["measured", "nothing: run `hypura profile`"]);
    return rows;
  }
  const products = profile.products.map(
    (one) => `${one.typeName} ${bandwidthText(one.decodeBytesPerSecond)}`,
  );
  rows.push(
    ["measured", `${printable(profile.cpuModel)}, ${plural(profile.computeThreads, "thread")}`],
    ["products", products.join(", ")],
    ["copying", bandwidthText(profile.copyBytesPerSecond)],
    ...profile.storage.map((one) => [
      "disk",
      `${printable(one.volume)}: ${bandwidthText(one.bestBytesPerSecond)} with ${one.best.depth} reads of ${bytesText(one.best.readBytes)}`,
    ]),
  );
  if (estimate.modelSeconds !== null) {
    rows.push(["computed", `${durationText(estimate.modelSeconds)} a token, before any correction`]);
  }
  return rows;
}

/** Two columns, the second one in as many lines as it needs. */
function wrapRows(rows: readonly (readonly string[])[]): readonly (readonly string[])[] {
  const first = Math.max(...rows.map(([name = ""]) => name.length));
  return rows.flatMap(([name = "", value = ""]) =>
    wrapped(value, pageWidth - first - 4).map((line, index) => [index === 0 ? name : "", line]),
  );
}

function paragraph(sentence: string): string {
  return wrapped(sentence, pageWidth - 2)
    .map((line) => `  ${line}`)
    .join("\n");
}

// ---- JSON ---------------------------------------------------------------------------------------------------------

/** Everything that the page shows and more. Fields are added, never renamed. */
function asJson(
  { path, files, gguf, model }: ModelFile,
  { place: { machine }, budgetBytes, plan, refusal }: Verdict,
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

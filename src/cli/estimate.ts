// `hypura estimate`: what a model would do here, in a few lines: the mode, the speed with its bound, the memory. The short
// form of `inspect`, from the same plan; loads nothing.

import { basename } from "node:path";
import { type ModelFile, openModelFile } from "../modelfile";
import { type PlanLimits, totalBytes } from "../plan";
import { bytesText, clip, printable, table } from "../text";
import { command, limitArgs, limitsOf, warnOfCut } from "./command";
import { judge, machineArg, type Place, placeOf } from "./inspect";
import { expectRows, pageWidth, wrapped } from "./outlook";
import { print, stdout } from "./terminal";

export const estimateCommand = command(
  {
    meta: { name: "estimate", description: "Say how fast a model would be, without loading it" },
    args: {
      model: { type: "positional", description: "A .gguf file (any file of a split model)", required: true },
      ...limitArgs,
      machine: machineArg,
      json: { type: "boolean", description: "Print one JSON object" },
    },
    async run({ args }) {
      const file = openModelFile(args.model);
      const place = await placeOf(file.path, args.machine);
      await print(estimateText(file, limitsOf(args), place, args.json === true));
    },
  },
  {
    examples: [
      "hypura estimate model.gguf",
      "hypura estimate model.gguf --memory 8G",
      "hypura estimate model.gguf --machine mac.json --json",
    ],
    notes: [
      "Speeds are predicted from what `hypura profile` measured and from earlier runs, nothing else.",
      "A model that cannot run gets the reason; the exit status is then 0 too. `hypura inspect` says more.",
    ],
  },
);

/** What the command prints about a model. */
export function estimateText(file: ModelFile, limits: PlanLimits, place: Place, json: boolean): string {
  const { plan, refusal, budgetBytes } = judge(file, limits, place);
  if (json) {
    const facts =
      plan === null
        ? null
        : {
            mode: plan.mode,
            memoryBytes: totalBytes(plan.memory),
            gpuMemory: plan.gpuMemory,
            poolBytes: plan.memory.poolBytes,
            contextTokens: plan.contextTokens,
            longestContextTokens: plan.longestContextTokens,
            estimate: plan.estimate,
          };
    const why = refusal === null ? null : { code: refusal.code, message: refusal.message };
    return `${JSON.stringify({ path: file.path, budgetBytes, plan: facts, refusal: why })}\n`;
  }
  const title = stdout.paint("bold", `${printable(basename(file.path))} on ${place.name}`);
  if (plan === null) {
    const lines = wrapped(`cannot run: ${printable(refusal?.message ?? "")}`, pageWidth - 2);
    return `${[title, ...lines.map((line) => `  ${line}`)].join("\n")}\n`;
  }
  warnOfCut(limits, plan);
  const memory = `${bytesText(totalBytes(plan.memory))} of ${bytesText(budgetBytes)}`;
  const rows = [...expectRows(plan, file.model, place.machine, limits), ["memory", memory]];
  const lines = table(rows)
    .split("\n")
    .map((line) => clip(`  ${line}`, pageWidth));
  return `${[title, ...lines].join("\n")}\n`;
}

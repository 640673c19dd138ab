// What a plan is made from beside the model: this machine as it is and as it was measured, and what earlier runs
// taught; and the way back, from a run to what the next plan knows. It joins profile.ts and history.ts, which know
// nothing of each other, and decides that a lack of either never keeps a model from running.

import { HypuraError } from "./errors";
import { keepRun, readHistory } from "./history";
import { type Machine, readMachine } from "./machine";
import type { ModelFile } from "./modelfile";
import { type Knowledge, type Plan, type RunFigures, runOf } from "./plan";
import { loadMachine } from "./profile";
import { heldRateOf, type StreamingCounters } from "./streaming";

export interface Surroundings {
  readonly machine: Machine;
  readonly knowledge: Knowledge;
}

export interface SurroundingsOptions {
  /** cached: never measures. if-needed: measures what is missing, which takes some ten seconds, once. */
  readonly measure: "cached" | "if-needed";
  /** What a person should know of how the figures came about. */
  readonly onNote?: ((text: string) => void) | undefined;
  /** What is being measured, and the share that is done. */
  readonly onProgress?: (what: string, fraction: number) => void;
  readonly signal?: AbortSignal;
}

/** This machine, with what was measured on the volume of the model at `modelPath`. Throws `cancelled` alone. */
export async function surroundingsOf(modelPath: string, options: SurroundingsOptions): Promise<Surroundings> {
  const { onNote } = options;
  const knowledge: Knowledge = { history: readHistory(onNote === undefined ? {} : { onNote }) };
  try {
    return { machine: await loadMachine({ folder: modelPath, ...options }), knowledge };
  } catch (error) {
    if (!(error instanceof HypuraError) || error.code === "cancelled") throw error;
    onNote?.(`planning without what was measured: ${error.message}`);
    return { machine: readMachine(), knowledge };
  }
}

/** Whether plans that stream can be judged: the processor and the volume of the model were measured. */
export function isMeasured({ machine }: Surroundings): boolean {
  return machine.profile !== undefined && machine.profile !== null && machine.profile.storage.length > 0;
}

/** Tokens that were decoded, the first one left out, which comes with the prompt. */
export interface Decoded {
  readonly tokens: number;
  readonly seconds: number;
  /** Tokens that were guessed, and those of them that were right. */
  readonly drafted: number;
  readonly accepted: number;
}

/** Keeps what a run did for the plans to come, where the machine was measured. */
export function rememberRun(
  plan: Plan,
  file: Pick<ModelFile, "model">,
  machine: Machine,
  decoded: Decoded,
  streaming: StreamingCounters | null,
  onNote?: (text: string) => void,
): void {
  const { tokens, seconds } = decoded;
  if (tokens <= 0 || seconds <= 0) return;
  const figures: RunFigures = {
    at: new Date().toISOString(),
    decodeTokens: tokens,
    decodeSeconds: seconds,
    hitRate: streaming === null ? null : heldRateOf(streaming),
    ...guessesOf(plan, decoded, streaming),
  };
  rememberFigures(plan, file, machine, figures, onNote);
}

/** The same, of figures that are made already. */
export function rememberFigures(
  plan: Plan,
  file: Pick<ModelFile, "model">,
  machine: Machine,
  figures: RunFigures,
  onNote?: (text: string) => void,
): void {
  const run = runOf(plan, file, machine, figures);
  if (run === null) return;
  try {
    keepRun(run);
  } catch (error) {
    if (!(error instanceof HypuraError)) throw error;
    onNote?.(`this run is not remembered: ${error.message}`);
  }
}

/** What was guessed, for a plan that guesses: a wrong guess may cost a pass time too. */
function guessesOf(
  { speculation }: Plan,
  { tokens, drafted, accepted }: Decoded,
  streaming: StreamingCounters | null,
): Pick<RunFigures, "guesses"> {
  if (speculation === null) return {};
  const { maxTokens, draftKey } = speculation;
  const passes = Math.max(1, streaming?.passes ?? tokens - accepted);
  return { guesses: { maxTokens, draftKey, passes, drafted, accepted } };
}

// The runs that were measured, kept in the state folder, so that the next plan knows what this machine really did with
// this model. It owns the document and how long it may get; what runs say about a plan is plan-history.ts's matter.

import { HypuraError } from "./errors";
import type { GuessFigures, MeasuredRun } from "./plan";
import { readState, writeState } from "./state";

const documentName = "history.json";

/** Enough for dozens of models; older runs go. */
const mostRuns = 400;

export interface HistoryOptions {
  /** What a person should know: that the document was damaged, say. */
  readonly onNote?: (text: string) => void;
}

/** The kept runs, oldest first. What is no run in it is left out, and said. */
export function readHistory({ onNote }: HistoryOptions = {}): readonly MeasuredRun[] {
  let text: string | null;
  try {
    text = readState(documentName);
  } catch (error) {
    if (!(error instanceof HypuraError)) throw error;
    onNote?.(`earlier runs are not used: ${error.message}`);
    return [];
  }
  if (text === null) {
    return [];
  }
  let entries: unknown;
  try {
    entries = JSON.parse(text);
  } catch {
    entries = null; // said below
  }
  const runs = Array.isArray(entries) ? entries.filter(isRun) : [];
  if (!Array.isArray(entries) || runs.length < entries.length) {
    onNote?.(`earlier runs in ${documentName} are damaged: what is whole of them is used`);
  }
  return runs;
}

/** Adds a run. Two programs that end at once may lose one of the two, which costs an estimate a little. */
export function keepRun(run: MeasuredRun, options: HistoryOptions = {}): void {
  const runs = [...readHistory(options), run].slice(-mostRuns);
  writeState(documentName, `[\n${runs.map((one) => JSON.stringify(one)).join(",\n")}\n]\n`);
}

function isRun(value: unknown): value is MeasuredRun {
  if (typeof value !== "object" || value === null) {
    return false;
  }
  const run = value as Readonly<Record<keyof MeasuredRun, unknown>>;
  const isAmount = (one: unknown): boolean => typeof one === "number" && Number.isFinite(one) && one >= 0;
  const isShare = (one: unknown): boolean => one === null || (isAmount(one) && (one as number) <= 1);
  return (
    run.version === 1 &&
    [run.at, run.machineKey, run.modelKey].every((one) => typeof one === "string") &&
    typeof run.streams === "boolean" &&
    [run.threads, run.layerCount, run.decodeTokens, run.decodeSeconds].every(isAmount) &&
    (run.modelSeconds === null || isAmount(run.modelSeconds)) &&
    isShare(run.poolShare) &&
    isShare(run.hitRate) &&
    (run.modelHitRate === undefined || isShare(run.modelHitRate)) &&
    (run.guesses === undefined || isGuesses(run.guesses, isAmount))
  );
}

function isGuesses(value: unknown, isAmount: (one: unknown) => boolean): boolean {
  if (typeof value !== "object" || value === null) {
    return false;
  }
  const guesses = value as Readonly<Record<keyof GuessFigures, unknown>>;
  return (
    [guesses.maxTokens, guesses.passes, guesses.drafted, guesses.accepted].every(isAmount) &&
    (guesses.draftKey === null || typeof guesses.draftKey === "string")
  );
}

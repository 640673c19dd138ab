// What the commands that measure share: a line of progress that goes away, an end by Ctrl-C that leaves nothing behind,
// and the table of reads. It knows no measurement.

import { consola } from "consola";
import { readSizeText } from "../storage";
import { type Surroundings, surroundingsOf } from "../surroundings";
import { bandwidthText, bar, clip, table } from "../text";
import { interruptible } from "./answer";
import { stderr, tell } from "./terminal";

/** Everything that these commands print fits in this many columns. */
export const pageWidth = 100;

const progressWidth = 24;
/** More often than this an eye does not follow. */
const redrawMs = 50;

export interface Measuring {
  readonly signal: AbortSignal;
  readonly onProgress: (what: string, fraction: number) => void;
}

/** Runs `work`; the line of progress stands on a terminal only, and is gone when the work is over or fails. */
export async function measuring<Result>(work: (how: Measuring) => Promise<Result>): Promise<Result> {
  let shownAt = 0;
  const onProgress = (what: string, fraction: number): void => {
    if (stderr.isTerminal && performance.now() - shownAt > redrawMs) {
      shownAt = performance.now();
      const percent = String(Math.floor(fraction * 100)).padStart(3);
      tell(
        `\r\x1b[K${clip(`measuring  ${bar(fraction, progressWidth)} ${percent} %  ${what}`, pageWidth - 1)}`,
      );
    }
  };
  // An exit runs what removes a scratch file; a signal's own end would not.
  const onTerminate = (): never => process.exit(143);
  const onHangUp = (): never => process.exit(129);
  process.once("SIGTERM", onTerminate);
  process.once("SIGHUP", onHangUp);
  try {
    return await interruptible((signal) => work({ signal, onProgress }));
  } finally {
    process.off("SIGTERM", onTerminate);
    process.off("SIGHUP", onHangUp);
    if (shownAt > 0) {
      tell("\r\x1b[K");
    }
  }
}

/** Before a plan that streams, where this machine was never measured. */
export function measureOnce(
  modelPath: string,
  onNote: (note: string) => void = (note) => consola.warn(note),
): Promise<Surroundings> {
  consola.info("measuring this machine for the plan, once (`hypura profile` shows it)");
  return measuring(({ signal, onProgress }) =>
    surroundingsOf(modelPath, {
      measure: "if-needed",
      onNote,
      onProgress,
      signal,
    }),
  );
}

export interface GridCell {
  readonly readBytes: number;
  readonly depth: number;
  readonly bytesPerSecond: number;
}

/** Bandwidth by read size (rows) and depth (columns). Reads are powers of two, and said so: "256 KiB". */
export function gridRows(cells: readonly GridCell[]): readonly (readonly string[])[] {
  const sizes = [...new Set(cells.map((cell) => cell.readBytes))].toSorted((one, other) => one - other);
  const depths = [...new Set(cells.map((cell) => cell.depth))].toSorted((one, other) => one - other);
  return [
    ["", ...depths.map((depth) => `x ${depth}`)],
    ...sizes.map((size) => [
      readSizeText(size),
      ...depths.map((depth) => {
        const found = cells.find((cell) => cell.readBytes === size && cell.depth === depth);
        return found === undefined ? "" : bandwidthText(found.bytesPerSecond);
      }),
    ]),
  ];
}

/** A title and rows below it, indented; `right` columns are flush right. */
export function section(
  title: string,
  rows: readonly (readonly string[])[],
  right: readonly number[] = [],
): readonly string[] {
  return [
    title,
    ...table(rows, right)
      .split("\n")
      .map((line) => clip(`  ${line}`, pageWidth)),
  ];
}

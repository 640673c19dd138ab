// How a benchmark is shown in a terminal: the table of its figures, bars, ratios, and the list of kept ones. It owns the
// columns and the words; the figures are bench.ts's, and who asked prints the lines.

import {
  type Bound,
  type CacheState,
  finished,
  medianOf,
  type RoundRatio,
  type RunFigures,
  type RunRecord,
  ratioOf,
  type Side,
} from "../bench";
import { bar, bytesText, clip, countText, durationText, printable, rateText, table } from "../text";
import { pageWidth } from "./measuring";
import { stdout } from "./terminal";

const states: readonly CacheState[] = ["cold", "warm"];
const sides: readonly Side[] = ["hypura", "baseline"];

interface Column {
  readonly title: string;
  readonly runs: readonly { readonly figures: RunFigures; readonly bound: Bound }[];
}

function columnsOf(records: readonly RunRecord[]): readonly Column[] {
  return sides.flatMap((side) =>
    states.flatMap((state): readonly Column[] =>
      records.some((one) => one.side === side && one.state === state)
        ? [{ title: `${side} ${state}`, runs: finished(records, side, state) }]
        : [],
    ),
  );
}

function percentText(fraction: number): string {
  return `${(100 * fraction).toFixed(1)} %`;
}

function bare(tokensPerSecond: number): string {
  return rateText(tokensPerSecond).replace(" tok/s", "");
}

/** A row: what to show of a run's figures, as the median over the runs of a column. */
interface Row {
  readonly name: string;
  readonly value: (figures: RunFigures, bound: Bound) => number | null;
  readonly text: (value: number) => string;
}

const rows: readonly Row[] = [
  { name: "decode tok/s", value: (one) => one.decodeTokensPerSecond.median, text: bare },
  { name: "  slowest tenth", value: (one) => one.decodeTokensPerSecond.p10, text: bare },
  { name: "  fastest tenth", value: (one) => one.decodeTokensPerSecond.p90, text: bare },
  { name: "prompt tok/s", value: (one) => one.promptTokensPerSecond, text: bare },
  { name: "first token", value: (one) => one.firstTokenSeconds, text: durationText },
  { name: "load", value: (one) => one.loadSeconds, text: durationText },
  { name: "peak memory", value: (one) => one.peakBytes, text: bytesText },
  { name: "  of the group", value: (one) => one.groupPeakBytes, text: bytesText },
  { name: "read a token", value: (one) => perToken(one, one.reads.oursBytes), text: bytesText },
  { name: "  as the kernel", value: (one) => perToken(one, one.reads.storageBytes), text: bytesText },
  { name: "pool hits", value: (one) => shareOfAsked(one, one.reads.hits), text: percentText },
  { name: "  late", value: (one) => shareOfAsked(one, one.reads.lateHits), text: percentText },
  { name: "  misses", value: (one) => shareOfAsked(one, one.reads.misses), text: percentText },
  {
    name: "waited",
    value: (one) => (one.reads.oursBytes === null ? null : one.reads.stallShare),
    text: percentText,
  },
  { name: "others' load", value: (one) => one.othersShare ?? null, text: percentText },
  { name: "disk busy", value: (one) => one.diskBusyShare, text: percentText },
  {
    name: "bound tok/s",
    value: (_, bound) => (bound.kind === "none" ? null : bound.tokensPerSecond),
    text: bare,
  },
  {
    name: "  set by",
    // The median of disk runs and memory runs lies between them.
    value: (_, bound) => (bound.kind === "none" ? null : bound.kind === "disk" ? 0 : 1),
    text: (kind) => (kind === 0 ? "disk" : kind === 1 ? "memory" : "both"),
  },
  { name: "  reached", value: (_, bound) => (bound.kind === "none" ? null : bound.share), text: percentText },
  { name: "distinct tokens", value: (one) => one.distinctShare, text: percentText },
];

function perToken(figures: RunFigures, bytes: number | null): number | null {
  return bytes === null ? null : bytes / Math.max(1, figures.decodedTokens);
}

function shareOfAsked({ reads }: RunFigures, count: number): number | null {
  const asked = reads.hits + reads.lateHits + reads.misses;
  return asked === 0 ? null : count / asked;
}

/** Every figure of a benchmark, its bars, what was lost, and the ratios; in 100 columns. */
export function resultLines(records: readonly RunRecord[]): readonly string[] {
  const columns = columnsOf(records);
  const cell = (row: Row, { runs }: Column): string => {
    const values = runs.flatMap(({ figures, bound }) => row.value(figures, bound) ?? []);
    return values.length === 0 ? "-" : row.text(medianOf(values));
  };
  const shown = rows
    .map((row) => [row.name, ...columns.map((column) => cell(row, column))])
    .filter((cells) => cells.slice(1).some((text) => text !== "-"));
  const right = columns.map((_, i) => i + 1);
  const counts = ["runs", ...columns.map(({ runs }) => countText(runs.length))];
  const lines = [
    "",
    ...table([["", ...columns.map(({ title }) => title)], counts, ...shown], right).split("\n"),
    "",
    ...barLines(columns),
    ...lossLines(records),
    ...ratioLines(records),
  ];
  return lines.map((line) => clip(line, pageWidth));
}

const barColumns = 50;

function barLines(columns: readonly Column[]): readonly string[] {
  const rates = columns.map(({ runs }) =>
    runs.length === 0 ? 0 : medianOf(runs.map(({ figures }) => figures.decodeTokensPerSecond.median)),
  );
  const most = Math.max(...rates, 1e-9);
  return table(
    columns.map(({ title }, i) => [title, bar((rates[i] ?? 0) / most, barColumns), rateText(rates[i] ?? 0)]),
    [2],
  ).split("\n");
}

function lossLines(records: readonly RunRecord[]): readonly string[] {
  return records.flatMap(({ outcome, index, side, state }) =>
    outcome.status === "finished"
      ? []
      : [`${index + 1}. ${side} ${state} ${outcome.status}: ${outcome.reason}`],
  );
}

function timesText(ratio: number): string {
  return `${ratio >= 99.95 ? ratio.toFixed(0) : ratio >= 9.995 ? ratio.toFixed(1) : ratio.toFixed(2)}x`;
}

function ratioText({ median, least, most }: RoundRatio): string {
  return least === most
    ? timesText(median)
    : `${timesText(median)} (${timesText(least)} to ${timesText(most)})`;
}

function ratioLines(records: readonly RunRecord[]): readonly string[] {
  return states.flatMap((state) => {
    const ratio = ratioOf(records, state);
    return ratio === null
      ? []
      : [
          `hypura to baseline, ${state}: decode ${ratioText(ratio.decode)}, prompt ${ratioText(ratio.prompt)}`,
          `  first token ${ratioText(ratio.firstToken)} as soon`,
        ];
  });
}

// ---- history -----------------------------------------------------------------------------------------------------

const historyBar = 14;

/** A line for each session and side: its warm speed (cold where there is no warm), and the change since the one before. */
export function historyLines(sessions: readonly (readonly RunRecord[])[]): readonly string[] {
  const entries = sessions.flatMap((records) =>
    sides.flatMap((side) => {
      const state = finished(records, side, "warm").length > 0 ? "warm" : "cold";
      const runs = finished(records, side, state);
      const [first] = records.filter((one) => one.side === side);
      return first === undefined
        ? []
        : [
            {
              first,
              side,
              state,
              rate:
                runs.length === 0
                  ? null
                  : medianOf(runs.map(({ figures }) => figures.decodeTokensPerSecond.median)),
            },
          ];
    }),
  );
  const comparable = (one: RunRecord): string =>
    JSON.stringify([one.model.hash, one.side, one.settings, one.machine.fingerprint]);
  const most = new Map<string, number>();
  for (const { first, rate } of entries) {
    most.set(first.model.hash, Math.max(most.get(first.model.hash) ?? 1e-9, rate ?? 0));
  }
  const previous = new Map<string, number>();
  const lines = entries.map(({ first, side, state, rate }) => {
    const key = comparable(first) + state;
    const before = previous.get(key);
    if (rate !== null) {
      previous.set(key, rate);
    }
    const change = before === undefined || rate === null ? "" : signedPercent(rate / before - 1);
    const limit = first.settings.groupBytes === null ? "" : bytesText(first.settings.groupBytes);
    return [
      first.startedAt.slice(0, 16).replace("T", " "),
      clip(printable(first.model.name), 20),
      limit,
      side,
      state,
      bar((rate ?? 0) / (most.get(first.model.hash) ?? 1), historyBar),
      rate === null ? (first.outcome.status === "finished" ? "-" : first.outcome.status) : bare(rate),
      change,
    ];
  });
  const head = ["when (UTC)", "model", "memory", "side", "cache", "", "tok/s", "change"];
  return [stdout.paint("bold", "Kept benchmarks"), ...table([head, ...lines], [6, 7]).split("\n")].map(
    (line) => clip(line, pageWidth),
  );
}

function signedPercent(change: number): string {
  return `${change >= 0 ? "+" : ""}${(100 * change).toFixed(1)} %`;
}

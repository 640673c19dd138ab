// The page of a benchmark: one HTML file that needs nothing else, with the table of its runs and plots drawn as SVG. It
// owns how figures look on paper; what they mean is bench.ts's and replay.ts's.

import { readFileSync } from "node:fs";
import { finished, quantile, type RunFigures, type RunRecord, ratioOf } from "./bench";
import { openTrace, type ReplayPass, replayRecorded } from "./replay";
import { bandwidthText, bytesText, durationText, rateText } from "./text";
import { type TraceEvent, type TraceHeader, traceEvents } from "./trace";

/** What the routing trace of a run tells for plots. */
export interface Passages {
  readonly header: TraceHeader;
  readonly passes: readonly ReplayPass[];
  /** Bytes read for each layer, over all passes. */
  readonly layers: readonly { readonly layer: string; readonly bytes: number }[];
  /** The events of the step whose time is the median one. */
  readonly token: {
    readonly step: number;
    readonly events: readonly TraceEvent[];
    readonly endUs: number;
  } | null;
}

export async function readPassages(path: string): Promise<Passages> {
  const trace = openTrace(path);
  const { outcome } = await replayRecorded(trace);
  const events = [...traceEvents(readFileSync(path).subarray(trace.recordsOffset))];
  return {
    header: trace.header,
    passes: outcome.passes,
    layers: layerBytes(trace.header, events),
    token: medianToken(outcome.passes, events, trace.header.slotCount),
  };
}

/** "blk.12.ffn_up_exps.weight" -> "12". */
function layerOf(tensor: string): string {
  return /^blk\.(\d+)\./.exec(tensor)?.[1] ?? tensor;
}

function layerBytes(header: TraceHeader, events: readonly TraceEvent[]): Passages["layers"] {
  const owner: { layer: string; bytes: number }[] = header.tensors.flatMap(
    ({ name, strideCount, classIndex }) => {
      const one = { layer: layerOf(name), bytes: header.classes[classIndex]?.strideBytes ?? 0 };
      return Array.from({ length: strideCount }, () => one);
    },
  );
  const bytes = new Map<string, number>(owner.map(({ layer }) => [layer, 0]));
  for (const event of events) {
    const stride = event.kind === "complete" ? owner[event.stride] : undefined;
    if (stride !== undefined) {
      bytes.set(stride.layer, (bytes.get(stride.layer) ?? 0) + stride.bytes);
    }
  }
  return [...bytes].map(([layer, total]) => ({ layer, bytes: total }));
}

function medianToken(
  passes: readonly ReplayPass[],
  events: readonly TraceEvent[],
  decodeTokens: number,
): Passages["token"] {
  const steps = passes.flatMap((pass, i) => {
    const next = passes[i + 1];
    return pass.tokens <= decodeTokens && next !== undefined ? [{ i, us: next.startUs - pass.startUs }] : [];
  });
  // Of the later half, which a warm pool serves.
  const late = steps.slice(Math.floor(steps.length / 2)).toSorted((one, other) => one.us - other.us);
  const chosen = late[Math.floor(late.length / 2)];
  if (chosen === undefined) {
    return null;
  }
  let pass = -1;
  const own = events.filter((event) => {
    pass += event.kind === "pass" ? 1 : 0;
    return pass === chosen.i;
  });
  return { step: chosen.i, events: own, endUs: passes[chosen.i + 1]?.startUs ?? 0 };
}

// ---- the page ------------------------------------------------------------------------------------------------------

export function benchPage(records: readonly RunRecord[], passages: Passages | null): string {
  const [first] = records;
  const title = `hypura bench: ${first?.model.name ?? ""}`;
  const parts = [
    `<h1>${escaped(title)}</h1>`,
    first === undefined ? "" : aboutRun(first),
    "<h2>Runs</h2>",
    runTable(records),
    ratioText(records),
    `<p class="faint">10 % and 90 %: one token in ten was slower, one in ten was faster. Bound: what the disk or the memory would
have allowed, whichever is less; reached: the share of it.</p>`,
    "<h2>Speed over tokens</h2>",
    speedPlot(records),
    ...(passages === null
      ? ["<p>No run of hypura that streams was finished, so there is no pool to draw.</p>"]
      : [
          "<h2>Timeline of a token</h2>",
          timelinePlot(passages),
          "<h2>Bytes read by layer</h2>",
          layerPlot(passages),
          "<h2>Hit rate over tokens</h2>",
          hitPlot(passages),
        ]),
  ];
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escaped(title)}</title>
<style>${style}</style>
</head>
<body>
<main>
${parts.filter((part) => part !== "").join("\n")}
</main>
</body>
</html>
`;
}

const style = `
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #6a737d; --line: #d5dae0;
  --a: #2563a8; --b: #c2571a; --c: #3a8a4d; --d: #8a4fb0; --stall: #c8352b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --faint: #98a1ab; --line: #343a42;
  --a: #6ea8e6; --b: #e8935a; --c: #72c487; --d: #bd8be0; --stall: #ef6b62; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 32px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 3px 6px; border-bottom: 1px solid var(--line); white-space: nowrap; } th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.wide { overflow-x: auto; } .faint { color: var(--faint); } td.bad { color: var(--stall); text-align: left; white-space: normal; }
svg { width: 100%; min-width: 640px; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0; font-size: 13px; }
.key i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
`;

function escaped(text: string): string {
  const entities: Readonly<Record<string, string>> = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
  };
  return text.replace(/[&<>"]/g, (character) => entities[character] ?? character);
}

function aboutRun({ model, settings, plan, startedAt, machine }: RunRecord): string {
  const limit =
    settings.groupBytes === null ? "" : ` in a control group of ${bytesText(settings.groupBytes)}`;
  return `<p>${escaped(startedAt.slice(0, 16).replace("T", " "))} UTC, ${bytesText(model.bytes)}, ${escaped(plan.mode)}${limit}:
${settings.promptTokens} tokens of prompt, ${settings.maxTokens} to generate at temperature ${settings.temperature}.<br>
<span class="faint">${escaped(machine.fingerprint)}</span></p>`;
}

function runTable(records: readonly RunRecord[]): string {
  const head = [
    "",
    "run",
    "decode tok/s",
    "10 %",
    "90 %",
    "prompt tok/s",
    "first token",
    "load",
    "peak",
    "read a token",
    "hits",
    "waited",
    "disk busy",
    "bound",
    "reached",
  ];
  const body = records.map((record) => {
    const { outcome, index, side, state } = record;
    const start = `<td>${index + 1}</td><td>${side} ${state}</td>`;
    if (outcome.status !== "finished") {
      return `<tr>${start}<td class="bad" colspan="${head.length - 2}">${outcome.status}: ${escaped(outcome.reason)}</td></tr>`;
    }
    const { figures, bound } = outcome;
    const rate = figures.decodeTokensPerSecond;
    const bytes = figures.reads.oursBytes ?? figures.reads.storageBytes;
    const cells = [
      number(rate.median),
      number(rate.p10),
      number(rate.p90),
      number(figures.promptTokensPerSecond),
      durationText(figures.firstTokenSeconds),
      durationText(figures.loadSeconds),
      bytesText(figures.peakBytes),
      bytes === null ? "" : bytesText(bytes / Math.max(1, figures.decodedTokens)),
      ...streamCells(figures),
      bound.kind === "none" ? "none" : `${number(bound.tokensPerSecond)} (${bound.kind})`,
      bound.kind === "none" ? "" : percent(bound.share),
    ];
    return `<tr>${start}${cells.map((cell) => `<td>${escaped(cell)}</td>`).join("")}</tr>`;
  });
  return `<div class="wide"><table><thead><tr>${head.map((cell) => `<th>${cell}</th>`).join("")}</tr></thead>
<tbody>${body.join("\n")}</tbody></table></div>`;
}

/** Hits, waited, disk busy; the first two are of a pool. */
function streamCells({ reads, diskBusyShare }: RunFigures): readonly string[] {
  const asked = reads.hits + reads.lateHits + reads.misses;
  return [
    asked === 0 ? "" : percent(reads.hits / asked),
    asked === 0 ? "" : percent(reads.stallShare),
    diskBusyShare === null ? "" : percent(diskBusyShare),
  ];
}

function ratioText(records: readonly RunRecord[]): string {
  const sentences = (["cold", "warm"] as const).flatMap((state) => {
    const ratio = ratioOf(records, state);
    return ratio === null
      ? []
      : [
          `${state}: decode ${ratio.decode.median.toFixed(2)} times the baseline's speed, prompt ${ratio.prompt.median.toFixed(2)}, first token ${ratio.firstToken.median.toFixed(2)} times as soon`,
        ];
  });
  return sentences.length === 0 ? "" : `<p>hypura, ${sentences.join("; ")}.</p>`;
}

function number(tokensPerSecond: number): string {
  return rateText(tokensPerSecond).replace(" tok/s", "");
}

function percent(fraction: number): string {
  return `${(100 * fraction).toFixed(1)} %`;
}

// ---- plots ---------------------------------------------------------------------------------------------------------

const plot = { width: 1040, height: 240, left: 64, right: 12, top: 10, bottom: 30 } as const;

interface Axes {
  readonly x: (value: number) => number;
  readonly y: (value: number) => number;
  readonly frame: string;
}

/** The smallest of 1, 2, 2.5 and 5 times a power of ten that cuts `most` into at most five steps. */
function stepOf(most: number): number {
  const least = most / 5;
  const power = 10 ** Math.floor(Math.log10(least));
  return power * ([1, 2, 2.5, 5].find((one) => one * power >= least * (1 - 1e-9)) ?? 10);
}

/** From 0 in even steps, none beyond `most`. */
function marksOf(most: number, step: number): readonly number[] {
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

interface Texts {
  readonly x: (value: number) => string;
  readonly y: (value: number) => string;
  /** What is counted along x has no halves. */
  readonly isWhole?: boolean;
}

/** A linear plot from 0, up to the next even step; `texts` say what a value is on each axis. */
function axes(most: { readonly x: number; readonly y: number }, texts: Texts): Axes {
  const { width, height, left, right, top, bottom } = plot;
  const yStep = stepOf(most.y || 1);
  const yMost = yStep * Math.ceil((most.y || 1) / yStep - 1e-9);
  const xStep = texts.isWhole === true ? Math.max(1, Math.ceil(stepOf(most.x || 1))) : stepOf(most.x || 1);
  const x = (value: number): number => round(left + ((width - left - right) * value) / (most.x || 1));
  const y = (value: number): number => round(height - bottom - ((height - top - bottom) * value) / yMost);
  const lines = marksOf(yMost, yStep).map((value) => {
    const at = y(value);
    return `<line x1="${left}" x2="${width - right}" y1="${at}" y2="${at}" stroke="var(--line)"/><text x="${left - 6}" y="${at + 4}" text-anchor="end">${escaped(value === 0 ? "0" : texts.y(value))}</text>`;
  });
  const ticks = marksOf(most.x, xStep).map((value) => {
    const anchor = value === 0 ? "start" : value > 0.95 * most.x ? "end" : "middle";
    return `<text x="${x(value)}" y="${height - 10}" text-anchor="${anchor}">${escaped(texts.x(value))}</text>`;
  });
  return { x, y, frame: [...lines, ...ticks].join("") };
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}

function tokensText(count: number): string {
  return count === 0 ? "tokens" : String(count);
}

function svg(label: string, body: string, height: number = plot.height): string {
  return `<div class="wide"><svg viewBox="0 0 ${plot.width} ${height}" role="img" aria-label="${escaped(label)}">${body}</svg></div>`;
}

function key(entries: readonly (readonly [colour: string, text: string])[]): string {
  const items = entries.map(
    ([colour, text]) => `<span><i style="background:${colour}"></i>${escaped(text)}</span>`,
  );
  return `<div class="key">${items.join("")}</div>`;
}

function path(points: readonly (readonly [number, number])[], colour: string): string {
  const steps = points.map(([x, y], i) => `${i === 0 ? "M" : "L"}${x} ${y}`).join("");
  return `<path d="${steps}" fill="none" stroke="${colour}" stroke-width="1.5"/>`;
}

const kinds = [
  ["hypura", "cold", "var(--a)"],
  ["hypura", "warm", "var(--c)"],
  ["baseline", "cold", "var(--b)"],
  ["baseline", "warm", "var(--d)"],
] as const;

/** Tokens a second at each token: of each kind the run in the middle. */
function speedPlot(records: readonly RunRecord[]): string {
  const shown = kinds.flatMap(([side, state, colour]) => {
    const runs = finished(records, side, state).toSorted(
      (one, other) => one.figures.decodeTokensPerSecond.median - other.figures.decodeTokensPerSecond.median,
    );
    const run = runs[Math.floor(runs.length / 2)];
    return run === undefined
      ? []
      : [
          {
            name: `${side} ${state}`,
            colour,
            rates: run.figures.tokenSeconds.map((one) => 1 / Math.max(one, 1e-6)),
          },
        ];
  });
  const count = Math.max(1, ...shown.map(({ rates }) => rates.length));
  // One lucky token is no reason to flatten all others.
  const common = (rates: readonly number[]): number =>
    quantile(
      rates.toSorted((one, other) => one - other),
      0.95,
    );
  const most = 1.05 * Math.max(1e-9, ...shown.map(({ rates }) => common(rates)));
  const { x, y, frame } = axes(
    { x: count, y: most },
    { x: tokensText, y: (value) => `${round(value)}`, isWhole: true },
  );
  const lines = shown.map(({ rates, colour }) =>
    path(
      rates.map((rate, i) => [x(i), y(Math.min(rate, most))]),
      colour,
    ),
  );
  return (
    key(shown.map(({ name, colour }) => [colour, name])) +
    svg("tokens a second over tokens", frame + lines.join(""))
  );
}

/** Rows of one step: what ops waited, what was computed, each read from the begin that asked for it to its end. */
function timelinePlot({ token, header }: Passages): string {
  if (token === null) {
    return "<p>The trace has too few steps to show one.</p>";
  }
  const startUs = token.events[0]?.atUs ?? 0;
  const lengthUs = Math.max(1, token.endUs - startUs);
  const x = (us: number): number =>
    round(plot.left + ((plot.width - plot.left - plot.right) * (us - startUs)) / lengthUs);
  const reads = readsOf(token.events);
  const lanes = lanesOf(reads);
  const laneHeight = 8;
  const top = 44;
  const height = top + Math.max(1, lanes.count) * laneHeight + 34;
  const bar = (from: number, to: number, at: number, tall: number, colour: string): string =>
    `<rect x="${x(from)}" y="${at}" width="${Math.max(0.6, round(x(to) - x(from)))}" height="${tall}" fill="${colour}"/>`;
  const stalls = token.events.flatMap((event) =>
    event.kind === "stall" ? [{ fromUs: Math.max(startUs, event.atUs - event.us), toUs: event.atUs }] : [],
  );
  const stalledUs = stalls.reduce((sum, one) => sum + one.toUs - one.fromUs, 0);
  const body = [
    `<text x="${plot.left - 6}" y="21" text-anchor="end">compute</text>`,
    bar(startUs, token.endUs, 10, 16, "var(--c)"),
    ...stalls.map((one) => bar(one.fromUs, one.toUs, 10, 16, "var(--stall)")),
    `<text x="${plot.left - 6}" y="${top + 8}" text-anchor="end">reads</text>`,
    ...reads.map((one, i) =>
      bar(one.fromUs, one.toUs, top + (lanes.of[i] ?? 0) * laneHeight, laneHeight - 2, "var(--a)"),
    ),
    ...marksOf(lengthUs, stepOf(lengthUs)).map(
      (us) =>
        `<text x="${x(startUs + us)}" y="${height - 8}" text-anchor="${us === 0 ? "start" : us > 0.95 * lengthUs ? "end" : "middle"}">${escaped(us === 0 ? "0" : durationText(us / 1e6))}</text>`,
    ),
  ];
  const bytes = reads.reduce((sum, one) => sum + (strideBytes(header, one.stride) ?? 0), 0);
  const text = `Step ${token.step}, the median one of the later half: ${durationText(lengthUs / 1e6)}, of which ${durationText(stalledUs / 1e6)} were waited; ${reads.length} reads of ${bytesText(bytes)}${lengthUs > 0 ? `, ${bandwidthText(bytes / (lengthUs / 1e6))} over the whole step` : ""}.`;
  return `<p>${escaped(text)}</p>${key([
    ["var(--c)", "computing"],
    ["var(--stall)", "waiting for a read"],
    ["var(--a)", "a read, from asking to its end"],
  ])}${svg("timeline of a token", body.join(""), height)}`;
}

interface Read {
  readonly stride: number;
  readonly fromUs: number;
  readonly toUs: number;
}

function readsOf(events: readonly TraceEvent[]): readonly Read[] {
  const asked = new Map<number, number>();
  const start = events[0]?.atUs ?? 0;
  const reads: Read[] = [];
  for (const event of events) {
    if (event.kind === "begin") {
      for (const stride of event.strides) {
        asked.set(stride, event.atUs);
      }
    } else if (event.kind === "complete") {
      reads.push({ stride: event.stride, fromUs: asked.get(event.stride) ?? start, toUs: event.atUs });
    }
  }
  return reads;
}

/** Reads that overlap are drawn below each other. */
function lanesOf(reads: readonly Read[]): { readonly of: readonly number[]; readonly count: number } {
  const order = reads.map((_, i) => i).sort((a, b) => (reads[a]?.fromUs ?? 0) - (reads[b]?.fromUs ?? 0));
  const ends: number[] = [];
  const of: number[] = [];
  for (const i of order) {
    const { fromUs, toUs } = reads[i] as Read;
    const free = ends.findIndex((end) => end <= fromUs);
    const lane = free === -1 ? ends.length : free;
    ends[lane] = toUs;
    of[i] = lane;
  }
  return { of, count: ends.length };
}

function strideBytes(header: TraceHeader, stride: number): number | undefined {
  let first = 0;
  for (const { strideCount, classIndex } of header.tensors) {
    first += strideCount;
    if (stride < first) {
      return header.classes[classIndex]?.strideBytes;
    }
  }
  return undefined;
}

function layerPlot({ layers }: Passages): string {
  const most = Math.max(1, ...layers.map((one) => one.bytes));
  const { x, y, frame } = axes(
    { x: layers.length, y: most },
    {
      x: (value) => (value === layers.length ? "" : `layer ${layers[value]?.layer ?? ""}`),
      y: bytesText,
      isWhole: true,
    },
  );
  const bars = layers.map(({ layer, bytes }, i) => {
    const width = Math.max(1, round(x(i + 1) - x(i)) - 2);
    return `<rect x="${x(i)}" y="${y(bytes)}" width="${width}" height="${round(y(0) - y(bytes))}" fill="var(--a)"><title>layer ${escaped(layer)}: ${escaped(bytesText(bytes))}</title></rect>`;
  });
  const total = layers.reduce((sum, one) => sum + one.bytes, 0);
  return `<p>${escaped(bytesText(total))} in all, prompt and tokens.</p>${svg("bytes read by layer", frame + bars.join(""))}`;
}

/** By bytes, at each step and as a running mean. */
function hitPlot({ passes, header }: Passages): string {
  const steps = passes.filter((pass) => pass.tokens <= header.slotCount && pass.askedBytes > 0);
  if (steps.length === 0) {
    return "<p>The trace has no steps of decoding.</p>";
  }
  const rates = steps.map((pass) => Math.max(0, 1 - pass.readBytes / pass.askedBytes));
  const window = 16;
  const means = rates.map((_, i) => {
    const part = rates.slice(Math.max(0, i - window + 1), i + 1);
    return part.reduce((sum, one) => sum + one, 0) / part.length;
  });
  const { x, y, frame } = axes(
    { x: rates.length, y: 1 },
    { x: tokensText, y: (value) => `${Math.round(100 * value)} %`, isWhole: true },
  );
  const dots = rates.map((rate, i) => `<circle cx="${x(i)}" cy="${y(rate)}" r="1.6" fill="var(--a)"/>`);
  const line = path(
    means.map((rate, i) => [x(i), y(rate)]),
    "var(--b)",
  );
  return (
    key([
      ["var(--a)", "hit rate of a step, by bytes"],
      ["var(--b)", `mean of the last ${window}`],
    ]) + svg("hit rate over tokens", frame + dots.join("") + line)
  );
}

// `hypura replay`: a routing trace run again through the cache policies, offline. It prints how often each would have
// found what an op asked for, by size of pool, beside the optimum, and says which policy and size it would take.

import { consola } from "consola";
import { HypuraError } from "../errors";
import {
  type Candidate,
  type Judgement,
  judge,
  openTrace,
  parseCandidate,
  policyNames,
  poolLimits,
  type RecordedRun,
  replayRecorded,
  type Trace,
} from "../replay";
import {
  bandwidthText,
  bar,
  bytesText,
  clip,
  countText,
  durationText,
  parseBytes,
  plural,
  printable,
  rateText,
} from "../text";
import { command } from "./command";
import { measuring, pageWidth, section } from "./measuring";
import { print, stdout } from "./terminal";

/** Shares of the streamed bytes: below, around and above the working set of one token of most models. */
const defaultPercents: readonly number[] = [5, 8, 11, 16, 24, 50, 75];

export const replayCommand = command(
  {
    meta: { name: "replay", description: "Replay a routing trace through the cache policies" },
    args: {
      trace: { type: "positional", description: "A file that `--trace` wrote", required: true },
      policy: {
        type: "string",
        description: "all (the default), or some of the policies below",
        valueHint: "LIST",
      },
      memory: {
        type: "string",
        alias: "m",
        description: "Sizes as --memory of run takes them, as in 2G,4G",
        valueHint: "LIST",
      },
      pool: {
        type: "string",
        description: "Sizes of the pool alone, as in 500M,11%",
        valueHint: "LIST",
      },
      json: { type: "boolean", description: "Print one JSON object with every figure" },
    },
    async run({ args }) {
      const candidates = candidatesOf(args.policy);
      const trace = openTrace(args.trace);
      const poolBytes = sizesOf(trace, { memory: args.memory, pool: args.pool });
      const { recorded, judgement } = await measuring(async (how) => {
        const recorded = await replayRecorded(trace, how);
        if (recorded.outcome.passes.length === 0) {
          throw new HypuraError("usage", `${JSON.stringify(trace.path)} holds no pass: record a longer run`);
        }
        return { recorded, judgement: await judge(trace, recorded, { candidates, poolBytes }, how) };
      });
      if (recorded.isExact === false) {
        consola.error(
          "the replay does not give what the engine counted (this is a mistake in hypura: please report it, with the trace)",
        );
        process.exitCode = 70;
      }
      await print(
        args.json === true ? jsonOf(trace, recorded, judgement) : pageOf(trace, recorded, judgement),
      );
    },
  },
  {
    examples: [
      'hypura run model.gguf --memory 4G --prompt "..." --trace run.trace',
      "hypura replay run.trace",
      "hypura replay run.trace --memory 3G,4G,6G,8G --policy lfu-decay,lru",
      "hypura replay run.trace --pool 5%,11%,24% --policy lfu-decay:256,lfu-decay:4096,belady --json",
    ],
    notes: [
      "Policies:\n" +
        "  belady         the optimum: knows the future; no policy reads less\n" +
        "  lfu-decay[:N[:M]] the least used goes; uses are forgotten by half in N tokens, and a pass counts\n" +
        "                 for M tokens at most\n" +
        "  pinned-lru     the hottest strides of the first half stay for good, the rest is LRU\n" +
        "  least-stale[:N] unused for N passes goes, else what comes round last\n" +
        "  lru            the longest unused goes: worth nothing below one token's working set\n" +
        "  lru-guarded    the same, but there a fixed part of the strides stays: what the engine does\n" +
        "  pinned-cyclic  a fixed part of the strides stays, evenly spread",
      "The first half of the trace warms each pool and chooses the pins; the figures are of the second.\n" +
        "The recorded pool and policy are replayed call by call too, and must give the engine's own counts.\n" +
        "Predicted speed: the trace's own median time to compute, and its reads at the bandwidth they had.",
    ],
  },
);

function candidatesOf(text: string | undefined): readonly Candidate[] {
  const words =
    text === undefined || text === "all" ? policyNames : text.split(",").map((word) => word.trim());
  return words.map((word) => {
    const candidate = parseCandidate(word);
    if (candidate === null) {
      throw new HypuraError(
        "usage",
        `--policy ${JSON.stringify(word)}: give all, or some of ${policyNames.join(", ")}`,
      );
    }
    return candidate;
  });
}

/** Bytes of pools, ascending, each once; the recorded one is always among them. */
function sizesOf(
  { header }: Trace,
  given: { readonly memory: string | undefined; readonly pool: string | undefined },
): readonly number[] {
  const { leastBytes, allBytes, recordedBytes } = poolLimits(header);
  const held = (poolBytes: number, said: string): number => {
    if (poolBytes < leastBytes) {
      const least = given.memory === undefined ? leastBytes : leastBytes + header.restBytes;
      throw new HypuraError(
        "usage",
        `${said} is too little for this model: give at least ${bytesText(least)}`,
      );
    }
    return Math.min(poolBytes, allBytes);
  };
  const sizes = [
    ...(given.memory ?? "")
      .split(",")
      .filter(Boolean)
      .map((word) => held(parseSize("memory", word) - header.restBytes, `--memory ${word}`)),
    ...(given.pool ?? "")
      .split(",")
      .filter(Boolean)
      .map((word) => held(parsePool(word, allBytes), `--pool ${word}`)),
  ];
  const chosen =
    given.memory === undefined && given.pool === undefined
      ? defaultPercents
          .map((percent) => Math.floor((allBytes * percent) / 100))
          .filter((size) => size >= leastBytes)
      : sizes;
  if (chosen.length > 12) {
    throw new HypuraError("usage", `${chosen.length} sizes do not fit a page: give at most 12`);
  }
  return [...new Set([...chosen, recordedBytes])].sort((one, other) => one - other);
}

function parseSize(flag: string, word: string): number {
  const bytes = parseBytes(word);
  if (bytes === null || bytes === 0) {
    throw new HypuraError("usage", `--${flag} ${JSON.stringify(word)}: give sizes such as 2G,1500M or 8GiB`);
  }
  return bytes;
}

function parsePool(word: string, allBytes: number): number {
  const percent = /^\s*(\d+(?:\.\d+)?)\s*%\s*$/.exec(word)?.[1];
  return percent === undefined ? parseSize("pool", word) : Math.floor((allBytes * Number(percent)) / 100);
}

// ---- output ----------------------------------------------------------------------------------------------------

function jsonOf(trace: Trace, { outcome, isExact }: RecordedRun, judgement: Judgement): string {
  const { classes, recorded, cutOff, passes } = outcome;
  const { header } = trace;
  return `${JSON.stringify({ trace: trace.path, header, passes: passes.length, cutOff, isExact, classes, recorded, ...judgement })}\n`;
}

function pageOf(trace: Trace, recorded: RecordedRun, judgement: Judgement): string {
  const lines = [
    ...headLines(trace, recorded),
    "",
    ...rateLines(trace, judgement),
    "",
    ...curveLines(judgement),
    "",
    choiceLine(judgement),
  ];
  return `${lines.join("\n")}\n`;
}

function headLines({ header, path }: Trace, { outcome, isExact }: RecordedRun): readonly string[] {
  const { recordedBytes, allBytes } = poolLimits(header);
  const strides = header.tensors.reduce((sum, tensor) => sum + tensor.strideCount, 0);
  const decoding = outcome.passes.filter((pass) => pass.tokens <= header.slotCount).length;
  const sum = (key: "hits" | "lateHits" | "misses"): number =>
    outcome.classes.reduce((total, one) => total + one[key], 0);
  const policies = [...new Set(header.classes.map((one) => one.policy.kind))].join(" and ");
  const counts = `${countText(sum("hits"))} hits, ${countText(sum("lateHits"))} late, ${countText(sum("misses"))} misses`;
  const verdict =
    isExact === null
      ? "the trace is cut off, so the engine's own counts are not in it"
      : isExact
        ? "the engine counted the same, exactly"
        : "the engine counted otherwise";
  return [
    stdout.paint(
      "bold",
      clip(`${printable(header.model.name)}, ${header.mode}: ${printable(path)}`, pageWidth),
    ),
    `  recorded  ${countText(outcome.passes.length)} ${outcome.passes.length === 1 ? "pass" : "passes"}` +
      `, ${countText(decoding)} of them steps of decoding; ${countText(strides)} strides of ${bytesText(allBytes)} stream`,
    `  pool      ${bytesText(recordedBytes)}, ${policies}`,
    `  replayed  ${counts}: ${verdict}`,
  ];
}

function percentText(fraction: number): string {
  return `${(100 * fraction).toFixed(1)} %`;
}

function rateLines({ header }: Trace, judgement: Judgement): readonly string[] {
  const { recordedBytes, allBytes } = poolLimits(header);
  const sizes = judgement.rows[0]?.cells.map((cell) => cell.poolBytes) ?? [];
  const head = [
    ["pool", ...sizes.map((size) => `${bytesText(size)}${size === recordedBytes ? "*" : ""}`)],
    ["of all strides", ...sizes.map((size) => `${Math.round((100 * size) / allBytes)} %`)],
  ];
  const { steps, warmUpPasses, times } = judgement;
  const hits = wideSection(
    `Hits by bytes while decoding, over the last ${countText(steps)} steps (${countText(warmUpPasses)} passes before them warm the pool)`,
    [
      ...head,
      ...judgement.rows.map(({ candidate, cells }) => [
        candidate.label,
        ...cells.map((cell) => percentText(cell.hitRate)),
      ]),
    ],
  );
  if (
    times.computeSeconds === null ||
    judgement.rows.some((row) => row.cells.some((c) => c.tokensPerSecond === null))
  ) {
    return [...hits, "", "  The trace is too short, or read too little, to tell a speed from its times."];
  }
  const disk =
    times.readBytesPerSecond === null ? "" : `, reads at ${bandwidthText(times.readBytesPerSecond)}`;
  const speeds = wideSection(
    `Predicted tok/s: ${durationText(times.computeSeconds)} to compute${disk}, ${percentText(times.waitedShare)} of their time waited for`,
    [
      head[0] ?? [],
      ...judgement.rows.map(({ candidate, cells }) => [
        candidate.label,
        ...cells.map((cell) => rateText(cell.tokensPerSecond ?? 0).replace(" tok/s", "")),
      ]),
    ],
  );
  return [...hits, "  * as recorded", "", ...speeds];
}

/** A section whose columns go on below where they do not fit beside each other; the first one names the rows. */
function wideSection(title: string, rows: readonly (readonly string[])[]): readonly string[] {
  const widthOf = (column: number): number => Math.max(...rows.map((row) => (row[column] ?? "").length));
  const columns = Math.max(1, (rows[0]?.length ?? 1) - 1);
  const widest = Math.max(...Array.from({ length: columns }, (_, i) => widthOf(i + 1)));
  const fitting = Math.max(1, Math.floor((pageWidth - 2 - widthOf(0)) / (widest + 2)));
  const blocks = Array.from({ length: Math.ceil(columns / fitting) }, (_, i) =>
    rows.map((row) => [row[0] ?? "", ...row.slice(1 + i * fitting, 1 + (i + 1) * fitting)]),
  );
  return blocks.flatMap((block, i) => {
    const right = (block[0] ?? []).slice(1).map((_, at) => at + 1);
    const [head = "", ...lines] = section(clip(title, pageWidth), block, right);
    return i === 0 ? [head, ...lines] : ["", ...lines];
  });
}

const curveWidth = 50;

/** The best policy by size of pool; the optimum, and LRU with its cliff, as marks on the same line. */
function curveLines({ rows, choice }: Judgement): readonly string[] {
  const best = rows.find((row) => row.candidate.label === choice?.policy);
  if (best === undefined) {
    return [];
  }
  const marks = (["lru", "belady"] as const).flatMap((name) => {
    const row = rows.find((one) => one.candidate.name === name && one !== best);
    return row === undefined ? [] : [{ sign: name === "lru" ? "L" : "|", name, row }];
  });
  const legend = marks.map(({ sign, name }) => `${sign} is ${name === "lru" ? "LRU" : "the optimum"}`);
  return section(
    `${best.candidate.label} by size of pool${legend.length === 0 ? "" : ` (${legend.join(", ")})`}`,
    best.cells.map((cell, i) => {
      const drawn = [...bar(cell.hitRate, curveWidth)];
      for (const { sign, row } of marks) {
        const rate = row.cells[i]?.hitRate ?? 0;
        drawn[Math.min(curveWidth - 1, Math.max(0, Math.round(rate * curveWidth) - 1))] = sign;
      }
      return [bytesText(cell.poolBytes), drawn.join(""), percentText(cell.hitRate)];
    }),
    [0, 2],
  );
}

function choiceLine({ choice }: Judgement): string {
  if (choice === null) {
    return "No policy but the optimum was asked for, and nobody can have that one.";
  }
  const pinned = choice.pinned.reduce((sum, one) => sum + one.strides.length, 0);
  const pins = pinned === 0 ? "no pins" : `${plural(pinned, "stride")} pinned (--json lists them)`;
  const rate = choice.tokensPerSecond === null ? "" : `, about ${rateText(choice.tokensPerSecond)}`;
  return [
    `Choice: ${choice.policy}, ${pins}, a pool of ${bytesText(choice.poolBytes)}`,
    `  ${percentText(choice.hitRate)} hits${rate}; larger pools among those tried are faster by a tenth at most`,
  ].join("\n");
}

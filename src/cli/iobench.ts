// `hypura iobench`: how fast the volume of a model gives bytes, cold, by size and depth of the reads, past the page
// cache and through it, from page borders and from anywhere. The reader is the one that streams weights, and what it
// finds is what the machine's profile holds.

import { consola } from "consola";
import { HypuraError } from "../errors";
import { keepStorage } from "../profile";
import {
  defaultDepths,
  defaultReadSizes,
  measureStorage,
  type ReadResult,
  type ReadSetting,
  readSizeText,
  type StorageResult,
  settingText,
} from "../storage";
import { bandwidthText, bytesText, clip, durationText, parseBytes, printable } from "../text";
import { command, numberFlag } from "./command";
import { gridRows, measuring, pageWidth, section } from "./measuring";
import { print, stdout } from "./terminal";

const defaultSizes: readonly number[] = [...defaultReadSizes, 16_777_216];
const defaultSeconds = 0.25;
const scratchSeconds = 5;

export const iobenchCommand = command(
  {
    meta: { name: "iobench", description: "Measure how fast a volume gives bytes, by read size and depth" },
    args: {
      path: { type: "positional", description: "A model, any large file, or a folder", required: true },
      sizes: {
        type: "string",
        description: `Read sizes, as in 64KiB,1MiB (default: ${defaultSizes.map(readSizeText).join(", ")})`,
        valueHint: "LIST",
      },
      depths: {
        type: "string",
        description: `Reads under way at once, as in 1,8 (default: ${defaultDepths.join(", ")})`,
        valueHint: "LIST",
      },
      seconds: {
        type: "string",
        description: `How long to read with each setting (default: ${defaultSeconds})`,
        valueHint: "N",
      },
      pages: {
        type: "string",
        description: "huge or base: the memory that is read into (default: huge, as hypura's pool)",
        valueHint: "KIND",
      },
      json: { type: "boolean", description: "Print one JSON object with every figure" },
    },
    async run({ args }) {
      const sizes = listFlag("sizes", args.sizes, defaultSizes, parseReadSize);
      const depths = listFlag("depths", args.depths, defaultDepths, parseDepth);
      const seconds = numberFlag("seconds", args.seconds, { least: 0.001, most: 600, integer: false });
      const hugePages = pagesFlag(args.pages);
      const { result, isKept } = await measuring(async (how) => {
        const result = await measureStorage(args.path, {
          ...how,
          settings: settingsOf(sizes, depths),
          secondsPerSetting: seconds ?? defaultSeconds,
          hugePages,
          scratchSeconds,
        });
        // Fewer settings than a profile's, or a shorter look, would put a worse figure in the place of a better one.
        const isComplete =
          hugePages &&
          (seconds ?? defaultSeconds) >= defaultSeconds &&
          defaultReadSizes.every((size) => sizes.includes(size)) &&
          defaultDepths.every((depth) => depths.includes(depth));
        return {
          result,
          isKept: isComplete && (await keepStorage(result.speed, { ...how, folder: args.path })),
        };
      });
      for (const note of result.notes) {
        consola.warn(note);
      }
      await print(
        args.json === true ? `${JSON.stringify(asJson(result, isKept))}\n` : iobenchPage(result, isKept),
      );
    },
  },
  {
    examples: [
      "hypura iobench model.gguf",
      "hypura iobench ~/models                           the volume, by the largest model there",
      "hypura iobench model.gguf --sizes 1MiB --depths 4,8 --seconds 5",
    ],
    notes: [
      "Reads are cold: direct ones go past the page cache, and before buffered ones the file is dropped\n" +
        "from it. Each setting reads other places in random order, none twice.",
      "The reader is hypura's own, threads with one pread(2) each: depth is the number of threads. What\n" +
        "io_uring would give stands beside it, and is not what the profile is made of.",
      "To compare with another program, such as fio, give --pages base: most read into base pages, and on\n" +
        "some machines direct reads into huge pages are more than twice as fast.",
      "Where the machine has a profile (`hypura profile`), the figures of its settings are kept in it.",
    ],
  },
);

/** Direct reads from page borders first, which the profile is made of; then each of the two otherwise. */
export function settingsOf(
  sizes: readonly number[],
  depths: readonly number[],
  platform: NodeJS.Platform = process.platform,
): readonly ReadSetting[] {
  return kinds
    .filter(({ ring }) => !ring || platform === "linux")
    .flatMap(({ direct, aligned, ring }) =>
      sizes.flatMap((readBytes) => depths.map((depth) => ({ readBytes, depth, direct, aligned, ring }))),
    );
}

const kinds = [
  { direct: true, aligned: true, ring: false, title: "Direct reads, from page borders" },
  { direct: true, aligned: true, ring: true, title: "The same by io_uring, one thread" },
  { direct: true, aligned: false, ring: false, title: "Direct reads, from anywhere" },
  { direct: false, aligned: true, ring: false, title: "Buffered reads, from page borders" },
  { direct: false, aligned: false, ring: false, title: "Buffered reads, from anywhere" },
] as const;

// ---- flags ------------------------------------------------------------------------------------------------------------

function listFlag(
  name: string,
  text: string | undefined,
  otherwise: readonly number[],
  parse: (name: string, part: string) => number,
): readonly number[] {
  if (text === undefined) {
    return otherwise;
  }
  return [...new Set(text.split(",").map((part) => parse(name, part.trim())))].toSorted(
    (one, other) => one - other,
  );
}

function pagesFlag(text: string | undefined): boolean {
  if (text !== undefined && text !== "huge" && text !== "base") {
    throw new HypuraError("usage", `--pages ${JSON.stringify(text)}: give huge or base`);
  }
  return text !== "base";
}

const leastReadBytes = 4096;
const mostReadBytes = 67_108_864;

function parseReadSize(name: string, part: string): number {
  const bytes = parseBytes(part);
  if (bytes === null || bytes < leastReadBytes || bytes > mostReadBytes || bytes % 4096 !== 0) {
    throw new HypuraError(
      "usage",
      `--${name} ${JSON.stringify(part)}: give sizes from 4KiB to 64MiB in whole pages of 4 KiB, as in 64KiB,1MiB`,
    );
  }
  return bytes;
}

function parseDepth(name: string, part: string): number {
  const depth = numberFlag(name, part, { least: 1, most: 64, integer: true });
  if (depth === undefined) {
    throw new HypuraError("internal", `--${name} has no value`);
  }
  return depth;
}

// ---- what is printed ----------------------------------------------------------------------------------------------------

export function iobenchPage(result: StorageResult, isKept: boolean): string {
  const { source, speed, best } = result;
  const name = source.isScratch ? "a scratch file" : printable(source.path);
  const tables = kinds.flatMap(({ direct, aligned, ring, title }) => {
    const cells = result.results.filter(
      (one) => one.direct === direct && one.aligned === aligned && (one.ring ?? false) === ring,
    );
    const depths = new Set(cells.map((one) => one.depth)).size;
    const right = Array.from({ length: depths }, (_, index) => index + 1);
    return cells.length === 0 ? [] : ["", ...section(stdout.paint("bold", title), gridRows(cells), right)];
  });
  const lines = [
    ...section(stdout.paint("bold", printable(speed.volume)), [
      ["read", `${name}, ${bytesText(source.sizeBytes)}`],
      ["reader", "threads with one pread each; the number of threads is the depth"],
      ...(isRingRefused(result) ? [["io_uring", "this system has none, or forbids it"]] : []),
    ]),
    ...tables,
    "",
    ...section(
      stdout.paint("bold", "Best: the fewest bytes under way that come near the highest bandwidth"),
      [
        ["setting", settingText(best)],
        [
          "bandwidth",
          `${bandwidthText(best.bytesPerSecond)}, measured again for ${durationText(best.seconds)}`,
        ],
        [
          "latency",
          `${durationText(best.latencySeconds.p50)} in the middle, ${durationText(best.latencySeconds.p99)} at p99`,
        ],
        ...(isKept ? [["kept", "in the machine's profile"]] : []),
      ],
    ),
  ];
  return `${lines.map((line) => clip(line, pageWidth)).join("\n")}\n`;
}

function isRingRefused({ results }: StorageResult): boolean {
  return process.platform === "linux" && !results.some(({ ring }) => ring === true);
}

/** Fields are added, never renamed. */
function asJson(result: StorageResult, isKept: boolean): object {
  const figures = ({
    storageShare,
    isExhausted,
    isRefused: _,
    ring = false,
    ...one
  }: ReadResult): object => ({
    ...one,
    engine: ring ? "io_uring" : "pread threads",
    isExhausted,
    storageShare,
  });
  return {
    volume: result.speed.volume,
    source: result.source,
    engine: "pread threads",
    reads: result.results.map(figures),
    best: figures(result.best),
    notes: result.notes,
    isKept,
  };
}

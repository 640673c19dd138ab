// How fast a volume gives bytes: finds a file there that can be read cold (or writes one), has native code read it with
// the engine's own reader, and says what that means. It owns the choice of the file, the grid of settings and the
// meaning of "best"; nothing of where the result is kept (profile.ts) or shown.

import {
  accessSync,
  constants,
  type Dirent,
  readdirSync,
  rmSync,
  type Stats,
  statfsSync,
  statSync,
} from "node:fs";
import { dirname, join, resolve } from "node:path";
import { type EngineChunk, runTask } from "./engine";
import { HypuraError } from "./errors";
import { type ReadSpeed, type StorageSpeed, volumeOf } from "./machine";
import { bytesText, durationText } from "./text";

/** Native code that measures; tests put another in its place. */
export type TaskRunner = (name: string, body: object, signal?: AbortSignal) => AsyncIterable<EngineChunk>;

export interface MeasureOptions {
  readonly signal?: AbortSignal | undefined;
  /** Called before each step with what it is and the share of the steps that are done. */
  readonly onProgress?: ((what: string, fraction: number) => void) | undefined;
  readonly run?: TaskRunner | undefined;
}

/** One setting of the reader. */
export interface ReadSetting {
  readonly readBytes: number;
  readonly depth: number;
  /** Past the page cache. */
  readonly direct: boolean;
  /** Reads begin at page borders. */
  readonly aligned: boolean;
  /** By io_uring of one thread, for comparison; else by as many threads as there are reads, as the engine reads. */
  readonly ring?: boolean;
}

export interface ReadResult extends ReadSetting, ReadSpeed {
  readonly readCount: number;
  readonly seconds: number;
  /** Every place of the file was read before the time was over. */
  readonly isExhausted: boolean;
  /** The system has no io_uring, or forbids it: nothing was read. */
  readonly isRefused: boolean;
  /** What the kernel fetched from storage for each byte delivered; below 1 a cache gave the rest. Null: not known. */
  readonly storageShare: number | null;
}

/** What is read to measure a volume. */
export interface ReadSource {
  readonly path: string;
  readonly sizeBytes: number;
  /** Written for this purpose; gone when the measurement is over. */
  readonly isScratch: boolean;
}

export interface StorageResult {
  readonly source: ReadSource;
  readonly results: readonly ReadResult[];
  /** Of the direct aligned reads (of all where none is), measured again and longer. */
  readonly best: ReadResult;
  readonly speed: StorageSpeed;
  readonly notes: readonly string[];
}

export const defaultReadSizes: readonly number[] = [65_536, 262_144, 1_048_576, 4_194_304];
export const defaultDepths: readonly number[] = [1, 2, 4, 8, 16];

/** A file below this is over before a fast disk has shown what it can. */
const leastFileBytes = 268_435_456;
const scratchBytes = 1_073_741_824;
const scratchChunkBytes = 4_194_304;
/** Of a volume's free bytes, for a scratch file at most this share. */
const scratchShare = 0.25;
/** Less than the best by no more than this, at fewer bytes in flight, is as good: two runs differ by as much. */
const nearBest = 0.95;
/** The best setting is measured again for this many times as long: the highest of many short figures is too high. */
const confirmTimes = 4;
/** A read that begins here in its first page, as most tensors do (GGUF aligns them to 32 bytes). */
const skewBytes = 1_184;

// ---- what to read ---------------------------------------------------------------------------------------------------

/** A cold file on the volume of `path`: the file itself, or the best in that folder; null where none will do. */
export function findSource(path: string): ReadSource | null {
  const stats = statOf(path);
  if (!stats.isDirectory()) {
    return isReadable(path, stats, leastFileBytes / 4)
      ? { path, sizeBytes: stats.size, isScratch: false }
      : null;
  }
  const found = filesUnder(path, stats.dev);
  const models = found.filter((file) => file.path.endsWith(".gguf"));
  const best = (models.length > 0 ? models : found).toSorted(
    (one, other) => other.sizeBytes - one.sizeBytes,
  )[0];
  return best === undefined ? null : { ...best, isScratch: false };
}

function statOf(path: string): Stats {
  const stats = statSync(path, { throwIfNoEntry: false });
  if (stats === undefined) {
    throw new HypuraError("not-found", `${path} cannot be found: give a file or a folder that exists`);
  }
  if (!stats.isFile() && !stats.isDirectory()) {
    throw new HypuraError("usage", `${path} is neither a file nor a folder`);
  }
  return stats;
}

/** Whether reading the file shows what the storage can: large, without holes, and not being written just now. */
function isReadable(path: string, stats: Stats, leastBytes = leastFileBytes): boolean {
  const isWhole = stats.blocks * 512 >= stats.size * 0.98;
  const isQuiet = Date.now() - stats.mtimeMs > 60_000;
  return stats.isFile() && stats.size >= leastBytes && isWhole && isQuiet && mayRead(path);
}

function mayRead(path: string): boolean {
  try {
    accessSync(path, constants.R_OK);
    return true;
  } catch {
    return false; // somebody else's: another file will do
  }
}

const mostLevels = 4;
const mostEntries = 20_000;

/** Readable files on this device, a few levels deep; links are not followed. */
function filesUnder(root: string, device: number): readonly { path: string; sizeBytes: number }[] {
  const found: { path: string; sizeBytes: number }[] = [];
  let folders: readonly string[] = [root];
  let entryCount = 0;
  for (let level = 0; level < mostLevels && folders.length > 0; level++) {
    const next: string[] = [];
    for (const folder of folders) {
      for (const entry of entriesOf(folder)) {
        if (++entryCount > mostEntries) {
          return found;
        }
        const path = join(folder, entry.name);
        const stats =
          entry.isFile() || entry.isDirectory() ? statSync(path, { throwIfNoEntry: false }) : undefined;
        if (stats?.dev !== device) {
          continue;
        }
        if (entry.isDirectory()) {
          next.push(path);
        } else if (isReadable(path, stats)) {
          found.push({ path, sizeBytes: stats.size });
        }
      }
    }
    folders = next;
  }
  return found;
}

function entriesOf(folder: string): readonly Dirent[] {
  try {
    return readdirSync(folder, { withFileTypes: true });
  } catch {
    return []; // not ours to look into
  }
}

// ---- a file to read where there is none --------------------------------------------------------------------------------

const scratchName = /^\.hypura-scratch-(\d+)$/;

/** Writes a file into the folder of `path`, past the page cache. `remove` is idempotent and runs at exit in any case. */
async function writeScratch(
  path: string,
  { settings, scratchSeconds: seconds, signal, run = runTask }: GridOptions,
): Promise<{ readonly source: ReadSource; readonly remove: () => void }> {
  const folder = statOf(path).isDirectory() ? path : dirname(resolve(path));
  removeAbandoned(folder);
  const file = join(folder, `.hypura-scratch-${process.pid}`);
  const leastBytes = Math.max(...settings.map((setting) => setting.readBytes));
  const sizeBytes =
    Math.floor(Math.min(scratchBytes, freeBytes(folder) * scratchShare) / scratchChunkBytes) *
    scratchChunkBytes;
  if (sizeBytes < leastFileBytes / 4) {
    throw new HypuraError(
      "io",
      `${folder} has no file to read and too little space to write one: free some, or give a large file`,
    );
  }
  const remove = (): void => {
    rmSync(file, { force: true });
    process.off("exit", remove);
  };
  process.on("exit", remove);
  try {
    const body = { path: file, sizeBytes, chunkBytes: scratchChunkBytes, durationNs: nanoseconds(seconds) };
    for await (const { data } of run("scratch", body, signal)) {
      const { bytes } = data as { readonly bytes: number };
      if (bytes < leastBytes) {
        throw new HypuraError("io", `only ${bytesText(bytes)} could be written in ${durationText(seconds)}`);
      }
      return { source: { path: file, sizeBytes: bytes, isScratch: true }, remove };
    }
    throw new HypuraError("internal", "the scratch file was written without a word");
  } catch (cause) {
    remove();
    if (cause instanceof HypuraError && cause.code !== "request" && cause.code !== "io") {
      throw cause;
    }
    throw new HypuraError(
      "io",
      `there is no large file to read in ${folder}, and none could be written (${(cause as Error).message}): give one`,
      { cause },
    );
  }
}

function freeBytes(folder: string): number {
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
}

/** What a run that was killed while it wrote has left behind. */
function removeAbandoned(folder: string): void {
  for (const { name } of entriesOf(folder)) {
    const owner = Number(scratchName.exec(name)?.[1] ?? Number.NaN);
    if (owner > 0 && !isAlive(owner)) {
      rmSync(join(folder, name), { force: true });
    }
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as { readonly code?: string }).code === "EPERM";
  }
}

// ---- measuring ------------------------------------------------------------------------------------------------------

export interface GridOptions extends MeasureOptions {
  readonly settings: readonly ReadSetting[];
  readonly secondsPerSetting: number;
  /** The whole grid is read so many times, one after another, and of each setting the best counts; 1 where not given. */
  readonly rounds?: number;
  /** Read into huge pages, as a plan's pool is made of; false: into base pages, as most other programs do. */
  readonly hugePages?: boolean;
  /** At most this long for writing a scratch file. */
  readonly scratchSeconds: number;
}

/** Reads with each setting, then with the best of them once more. */
export async function measureStorage(path: string, options: GridOptions): Promise<StorageResult> {
  const notes: string[] = [];
  const volume = volumeOf(path);
  const existing = findSource(path);
  options.onProgress?.(existing === null ? "writing a file to read" : "reading", 0);
  const { source, remove } =
    existing === null ? await writeScratch(path, options) : { source: existing, remove: () => {} };
  if (source.isScratch) {
    notes.push(
      `${dirname(source.path)} has no file that is large, without holes and left alone for a minute: a scratch file of ` +
        `${bytesText(source.sizeBytes)} was written past the page cache and removed again`,
    );
  }
  try {
    const results = await bestRound(source, options, readGrid);
    const chosen = bestOf(results);
    const again = {
      ...options,
      settings: [chosen],
      secondsPerSetting: options.secondsPerSetting * confirmTimes,
    };
    const confirm = (): Promise<readonly ReadResult[]> => readCells(source, again, gridFraction);
    const [confirmed = chosen] = await bestRound(source, again, confirm);
    notes.push(...doubtsAbout([...results, confirmed]));
    return { source, results, best: confirmed, speed: speedOf(volume, results, confirmed), notes };
  } finally {
    remove();
  }
}

/** Of all progress, what the grid is; the rest is the best setting once more. */
const gridFraction = 0.9;

/** Of each setting the fastest of the rounds. */
async function bestRound(
  source: ReadSource,
  options: GridOptions,
  read: (source: ReadSource, options: GridOptions) => Promise<readonly ReadResult[]>,
): Promise<readonly ReadResult[]> {
  let best: readonly ReadResult[] = [];
  const rounds = options.rounds ?? 1;
  for (let round = 0; round < rounds; round++) {
    const onProgress = (what: string, done: number): void =>
      options.onProgress?.(what, (round * gridFraction + done) / rounds);
    const results = await read(source, { ...options, onProgress });
    const before = new Map(best.map((one) => [settingText(one), one]));
    best = results.map((one) => {
      const last = before.get(settingText(one));
      return last !== undefined && last.bytesPerSecond > one.bytesPerSecond ? last : one;
    });
  }
  return best;
}

/** The settings as far as the volume has them: without direct reads, only the buffered ones are left. */
async function readGrid(source: ReadSource, options: GridOptions): Promise<readonly ReadResult[]> {
  const probe: ReadSetting = { readBytes: 65_536, depth: 1, direct: true, aligned: true };
  const [first] = await readCells(source, { ...options, settings: [probe], secondsPerSetting: 0 }, 0);
  if (first?.direct === true) {
    return readCells(source, options, 0);
  }
  const buffered = options.settings.map((setting) => ({ ...setting, direct: false }));
  const settings = buffered.filter(
    (one, index) => buffered.findIndex((other) => Bun.deepEquals(one, other)) === index,
  );
  return readCells(source, { ...options, settings }, 0);
}

/** What native code says of a cell (ffi/native/tasks.cpp). */
interface CellFigures {
  readonly readCount: number;
  readonly bytes: number;
  readonly ns: number;
  readonly p50Ns: number;
  readonly p99Ns: number;
  readonly direct: boolean;
  readonly isExhausted: boolean;
  /** The system has no io_uring, or forbids it. */
  readonly isRefused?: boolean;
  readonly storageBytes: number | null;
}

async function readCells(
  source: ReadSource,
  { settings, secondsPerSetting, hugePages = true, signal, onProgress, run = runTask }: GridOptions,
  doneFraction: number,
): Promise<readonly ReadResult[]> {
  // Other places in each run: what a disk or a host keeps of the last one must not answer.
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] as number;
  const body = {
    files: [{ path: source.path, sizeBytes: source.sizeBytes }],
    hugePages,
    retryCount: 8,
    retryWaitNs: 1_000_000,
    pollNs: 1_000_000,
    cells: settings.map(({ readBytes, depth, direct, aligned, ring = false }, index) => ({
      ...{ readBytes, depth, direct, skewBytes: aligned ? 0 : skewBytes, ring },
      ...{ durationNs: nanoseconds(secondsPerSetting), seed: seed + index },
    })),
  };
  const results: ReadResult[] = [];
  const tell = (): void => {
    const next = settings[results.length];
    if (next !== undefined && secondsPerSetting > 0) {
      onProgress?.(
        settingText(next),
        doneFraction + (1 - doneFraction) * (results.length / settings.length) * 0.9,
      );
    }
  };
  tell();
  for await (const { data } of run("reads", body, signal)) {
    results.push(resultOf(settings[results.length] as ReadSetting, data as CellFigures));
    tell();
  }
  return results.filter(({ isRefused }) => !isRefused);
}

function resultOf(setting: ReadSetting, figures: CellFigures): ReadResult {
  const { bytes, ns, storageBytes } = figures;
  return {
    ...setting,
    direct: figures.direct,
    bytesPerSecond: Math.max(1, Math.round((bytes / Math.max(1, ns)) * 1e9)),
    latencySeconds: { p50: figures.p50Ns / 1e9, p99: figures.p99Ns / 1e9 },
    readCount: figures.readCount,
    seconds: ns / 1e9,
    isExhausted: figures.isExhausted,
    isRefused: figures.isRefused === true,
    storageShare: storageBytes === null || bytes === 0 ? null : storageBytes / bytes,
  };
}

/** "4 MiB x 8, direct": the setting in the words of the table. */
export function settingText({ readBytes, depth, direct, aligned, ring }: ReadSetting): string {
  const kind = `${direct ? "direct" : "buffered"}${aligned ? "" : ", unaligned"}${ring === true ? ", io_uring" : ""}`;
  return `${readSizeText(readBytes)} x ${depth}, ${kind}`;
}

/** Reads are powers of two, and said so: "256 KiB". */
export function readSizeText(bytes: number): string {
  return bytes % 1_048_576 === 0 ? `${bytes / 1_048_576} MiB` : `${bytes / 1024} KiB`;
}

// ---- what it means ---------------------------------------------------------------------------------------------------

/** What the profile is made of: direct aligned reads by the engine's reader, or all of that reader's. */
function relevant(results: readonly ReadResult[]): readonly ReadResult[] {
  const ours = results.filter((one) => one.ring !== true);
  const direct = ours.filter((one) => one.direct && one.aligned);
  return direct.length > 0 ? direct : ours;
}

/** The fewest bytes in flight that come near the highest bandwidth. */
export function bestOf(results: readonly ReadResult[]): ReadResult {
  const all = relevant(results);
  const highest = Math.max(...all.map((one) => one.bytesPerSecond));
  const near = all.filter((one) => one.bytesPerSecond >= highest * nearBest);
  const inFlight = (one: ReadResult): number => one.readBytes * one.depth;
  const [best] = near.toSorted((one, other) => inFlight(one) - inFlight(other) || one.depth - other.depth);
  if (best === undefined) {
    throw new HypuraError("internal", "no setting of the reader was measured");
  }
  return best;
}

function speedOf(volume: string, results: readonly ReadResult[], best: ReadResult): StorageSpeed {
  return {
    volume,
    measuredAt: new Date().toISOString(),
    direct: best.direct,
    reads: relevant(results).map(({ readBytes, depth, bytesPerSecond, latencySeconds }) => ({
      ...{ readBytes, depth, bytesPerSecond, latencySeconds },
    })),
    bestBytesPerSecond: best.bytesPerSecond,
    best: { readBytes: best.readBytes, depth: best.depth },
  };
}

/** Sentences on what may be wrong with the figures. */
function doubtsAbout(results: readonly ReadResult[]): readonly string[] {
  const doubts: string[] = [];
  for (const kind of ["direct", "buffered"] as const) {
    const shares = results
      .filter((one) => one.direct === (kind === "direct") && one.storageShare !== null)
      .map((one) => one.storageShare as number);
    const least = Math.min(...shares);
    if (shares.length > 0 && Math.max(...shares) === 0) {
      doubts.push(
        `the kernel counts none of the ${kind} reads as reads of storage, as on file systems in memory or over a network: ` +
          "whether they were cold is not known",
      );
    } else if (least < 0.9) {
      doubts.push(
        `${kind} reads: a cache gave up to ${Math.round((1 - least) * 100)} % of the bytes, so the figures are above what the storage can`,
      );
    }
  }
  if (!results.some((one) => one.direct)) {
    doubts.push(
      "this volume has no direct reads: the figures are of reads through the page cache, emptied before each",
    );
  }
  if (results.some((one) => one.isExhausted && one.seconds < 0.02)) {
    doubts.push("some settings had read the whole file within 20 ms: a larger file gives steadier figures");
  }
  return doubts;
}

function nanoseconds(seconds: number): number {
  return Math.round(seconds * 1e9);
}

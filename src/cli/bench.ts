// `hypura bench`: how fast a model runs here, and beside it, if asked, stock llama.cpp's way of running it. It owns the
// order of the runs, their safety and what is shown of them; a run is bench-run.ts's, its worth bench.ts's.

import { randomBytes } from "node:crypto";
import {
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { consola } from "consola";
import packageJson from "../../package.json";
import { planOf } from "../api";
import {
  baselineDanger,
  type Ceilings,
  higherOf,
  type MemoryCeiling,
  type Outcome,
  orderOfRuns,
  outcomeOf,
  type PlannedRun,
  promptOf,
  type RunOrder,
  type RunRecord,
  type RunSettings,
  ratioOf,
  recordVersion,
  type Seen,
  type Side,
} from "../bench";
import { keepRecord, readRecords } from "../bench-records";
import { runOrder } from "../bench-run";
import { runTask } from "../engine";
import { exitStatus, HypuraError } from "../errors";
import { type Machine, readProcessor } from "../machine";
import { type MemoryGroup, makeMemoryGroup } from "../memory-group";
import { type ModelFile, openModelFile, readMetadataArray } from "../modelfile";
import type { Plan, PlanLimits } from "../plan";
import { isAligned } from "../plan-resident";
import { withoutMemory } from "../plan-speculation";
import { fingerprintOf } from "../profile";
import { findSource, measureStorage } from "../storage";
import { isMeasured, rememberFigures, type Surroundings, surroundingsOf } from "../surroundings";
import {
  bandwidthText,
  bytesText,
  clip,
  countText,
  durationText,
  plural,
  printable,
  rateText,
} from "../text";
import { interruptible } from "./answer";
import { historyLines, resultLines } from "./bench-text";
import { bytesFlag, command, limitArgs, limitsOf, numberFlag } from "./command";
import { measureOnce, pageWidth } from "./measuring";
import { traceOption } from "./run";
import { print, stderr, tell } from "./terminal";

const defaults = { promptTokens: 128, maxTokens: 128, runs: 12, seconds: 60 } as const;
/** Without --runs a benchmark takes no longer, where one round does not. */
const usualSeconds = 110;
const seed = 20_251_121;

const args = {
  model: { type: "positional", description: "A .gguf file (any file of a split model)", required: false },
  baseline: { type: "boolean", description: "Run stock llama.cpp beside it: mapped, nothing streamed" },
  plan: limitArgs.plan,
  context: limitArgs.context,
  threads: limitArgs.threads,
  mode: limitArgs.mode,
  "kv-type": limitArgs["kv-type"],
  speculation: { ...limitArgs.speculation, description: "Guess tokens, though the text is random: N (off)" },
  draft: limitArgs.draft,
  "gpu-memory": limitArgs["gpu-memory"],
  "prompt-tokens": {
    type: "string",
    description: `Length of the prompt (${defaults.promptTokens})`,
    valueHint: "N",
  },
  "max-tokens": {
    type: "string",
    alias: "n",
    description: `Tokens to generate (${defaults.maxTokens})`,
    valueHint: "N",
  },
  runs: {
    type: "string",
    description: `Rounds of a cold and a warm run of each side (${defaults.runs}, or fewer within 2 minutes)`,
    valueHint: "N",
  },
  seconds: {
    type: "string",
    description: `Stop decoding after so long in each run (${defaults.seconds})`,
    valueHint: "N",
  },
  memory: {
    type: "string",
    alias: "m",
    description: "Run each in a control group with this limit, such as 2G",
    valueHint: "SIZE",
  },
  force: { type: "boolean", description: "Run the baseline even where it may make the machine unusable" },
  html: { type: "string", description: "Write a page with plots", valueHint: "FILE" },
  trace: {
    type: "string",
    description: "Keep the routing trace of the last run of hypura, for `hypura replay`",
    valueHint: "FILE",
  },
  history: { type: "boolean", description: "Show and compare the records that are kept" },
  json: { type: "boolean", description: "Print one JSON object with every figure" },
} as const;

type Flags = {
  readonly [Name in keyof typeof args]?: (typeof args)[Name]["type"] extends "boolean" ? boolean : string;
};

export const benchCommand = command(
  {
    meta: { name: "bench", description: "Measure a model's speed, beside stock llama.cpp if asked to" },
    args,
    async run({ args: given }) {
      const flags = given as Flags;
      if (flags.history === true) {
        await showHistory(flags);
        return;
      }
      if (flags.model === undefined || flags.model === "") {
        throw new HypuraError("usage", "hypura bench needs a MODEL (or --history): see `hypura help bench`");
      }
      await bench(flags, openModelFile(flags.model));
    },
  },
  {
    examples: [
      "hypura bench model.gguf",
      "hypura bench model.gguf --baseline                      beside stock llama.cpp",
      "hypura bench big.gguf --baseline --memory 2G --runs 1   both with 2 GB, as root",
      "hypura bench model.gguf --html page.html --json > figures.json",
      "hypura bench --history                                  what was measured before",
    ],
    notes: [
      "Each run is a process of its own, in rounds of A cold, B cold, B warm, A warm. Cold: the model's\n" +
        "files are dropped from the page cache first, and it is said how much of them would not go.\n" +
        "Warm: right after another run. Figures are medians over the runs of a kind.",
      "The bound is the tighter of two: the bytes that came from storage for each token, at the bandwidth\n" +
        "just measured on the same file; and the weights that a token touches, less what the caches hold, at\n" +
        "the speed at which memory was just read. A run that beats one of them is refused and not counted.\n" +
        "Tokens are sampled at temperature 1 with a fixed seed, the end of text ignored.",
      "Every run is kept as a JSON record in the state folder (~/.hypura/bench, or HYPURA_HOME) as soon as\n" +
        "it is over. Ctrl-C ends the benchmark and shows what is done.",
    ],
  },
);

// ---- a benchmark -------------------------------------------------------------------------------------------------

/** What does not change from run to run. */
interface Setting {
  readonly file: ModelFile;
  readonly session: string;
  readonly machine: RunRecord["machine"];
  readonly model: RunRecord["model"];
  readonly settings: RunSettings;
  readonly prompt: readonly number[];
  readonly plans: Readonly<Record<Side, Plan | null>>;
  readonly ceilings: Ceilings;
  readonly group: MemoryGroup | null;
  /** With the profile that is kept for this machine, if there is one. */
  readonly profiled: Machine;
}

async function bench(flags: Flags, file: ModelFile): Promise<void> {
  const groupBytes = bytesFlag("memory", flags.memory) ?? null;
  const rounds = numberFlag("runs", flags.runs, { least: 1, most: 100, integer: true }) ?? defaults.runs;
  const known = await knownOf(flags, file, groupBytes);
  const plans = plansOf(flags, file, { known, groupBytes });
  traceOption(plans.hypura as Plan, flags.trace); // refused now, not after all runs
  const group = groupBytes === null ? null : makeMemoryGroup(groupBytes);
  const records: RunRecord[] = [];
  const mostSeconds = flags.runs === undefined ? usualSeconds : Number.POSITIVE_INFINITY;
  try {
    await endable(async (signal) => {
      const setting = await prepareSetting(flags, file, { plans, group, profiled: known.machine, signal });
      sayPlans(setting);
      const tracePath = plans.hypura?.streaming === null ? undefined : traceFile(flags);
      await runAll(setting, { rounds, mostSeconds, tracePath, signal }, records);
    });
  } catch (error) {
    if (!(error instanceof HypuraError && error.code === "cancelled")) {
      throw error;
    }
    consola.warn(
      records.length === 0
        ? "stopped before the first run was over"
        : `stopped: ${records.length} ${records.length === 1 ? "run is" : "runs are"} done and kept`,
    );
    process.exitCode = exitStatus("cancelled");
  } finally {
    group?.remove();
  }
  await show(flags, records);
}

interface Course {
  readonly rounds: number;
  /** No round begins that would not be over by then, but for the first. */
  readonly mostSeconds: number;
  /** Of the last run of hypura in each round: the last round's stays. */
  readonly tracePath: string | undefined;
  readonly signal: AbortSignal;
}

/** What is over is in `records`, whatever comes after. */
async function runAll(setting: Setting, course: Course, records: RunRecord[]): Promise<void> {
  const { rounds, mostSeconds, tracePath, signal } = course;
  const order = orderOfRuns(rounds, setting.plans.baseline !== null);
  const started = performance.now();
  for (const [index, run] of order.entries()) {
    const seconds = (performance.now() - started) / 1000;
    const isNewRound = index > 0 && run.round !== order[index - 1]?.round;
    if (isNewRound && (seconds * (run.round + 1)) / run.round > mostSeconds) {
      consola.info(
        `${plural(run.round, "round")} took ${durationText(seconds)}: that is all, --runs ${rounds} does more`,
      );
      return;
    }
    const isLastOfRound = run.side === "hypura" && run.state === "warm";
    const place = {
      index,
      count: order.length,
      signal,
      tracePath: isLastOfRound ? tracePath : undefined,
    };
    const record = await oneRun(setting, run, place);
    records.push(record);
    keepRecord(record);
    tellPlanner(setting, record);
    sayOutcome(record);
  }
}

/** As `interruptible`, and ended by a service manager or a terminal that closes too: a control group would be left. */
async function endable<Result>(work: (signal: AbortSignal) => Promise<Result>): Promise<Result> {
  const end = new AbortController();
  const onSignal = (): void => end.abort();
  const signals = ["SIGTERM", "SIGHUP"] as const;
  for (const name of signals) {
    process.once(name, onSignal);
  }
  try {
    return await interruptible((interrupt) => work(AbortSignal.any([interrupt, end.signal])));
  } finally {
    for (const name of signals) {
      process.off(name, onSignal);
    }
  }
}

/** Where the trace of hypura's last run goes: where it was asked for, or beside for the page alone. */
function traceFile(flags: Flags): string | undefined {
  return (
    flags.trace ??
    (flags.html === undefined ? undefined : join(tmpdir(), `hypura-bench-${process.pid}.trace`))
  );
}

/** What `hypura run` would plan from: where something has to stream and nothing was measured yet, it is measured. */
async function knownOf(flags: Flags, file: ModelFile, groupBytes: number | null): Promise<Surroundings> {
  const onNote = (note: string): void => consola.info(note);
  const known = await surroundingsOf(file.path, { measure: "cached", onNote });
  const { hypura } = plansOf({ ...flags, baseline: false }, file, { known, groupBytes });
  if (hypura?.streaming === null || flags.plan !== undefined || isMeasured(known)) {
    return known;
  }
  return measureOnce(file.path, onNote);
}

/** The machine as it is inside a group of that size. */
function machineWith(machine: Machine, groupBytes: number | null): Machine {
  if (groupBytes === null) {
    return machine;
  }
  const { memory } = machine;
  return {
    ...machine,
    memory: {
      totalBytes: Math.min(memory.totalBytes, groupBytes),
      availableBytes: Math.min(memory.availableBytes, groupBytes),
      limitedBy: `of --memory ${bytesText(groupBytes)}`,
    },
  };
}

function plansOf(
  flags: Flags,
  file: ModelFile,
  given: { readonly known: Surroundings; readonly groupBytes: number | null },
): Setting["plans"] {
  const { known, groupBytes } = given;
  // --memory is the control group's: what is left in it bounds the plan, and a plan from a file is taken as it is.
  const { memory: _, ...asked } = flags;
  const machine = machineWith(known.machine, groupBytes);
  // Its prompt is of random tokens, for which nobody can guess well: a pass for each, unless asked otherwise.
  const speculation = flags.speculation ?? (flags.draft === undefined ? "off" : undefined);
  const limits = flags.plan === undefined ? { ...asked, speculation } : asked;
  const planned = planOf(file, limitsOf(limits), machine, known.knowledge);
  // Rounds ask the same: what they remembered of each other would be guessed.
  const hypura = flags.plan === undefined ? withoutMemory(planned) : planned;
  if (flags.baseline !== true) {
    return { hypura, baseline: null };
  }
  const modelBytes = file.files.reduce((sum, one) => sum + one.sizeBytes, 0);
  const danger = groupBytes === null ? baselineDanger(modelBytes, machine.memory.totalBytes) : null;
  if (danger !== null && flags.force !== true) {
    throw new HypuraError(
      "not-enough-memory",
      `${danger}. Give --memory SIZE to run it in a control group, or --force to risk it: the machine may swap, ` +
        "stop answering or have the kernel end other programs",
    );
  }
  if (danger !== null) {
    consola.warn(`${danger}: with --force it runs all the same, and the machine may stop answering`);
  }
  return { hypura, baseline: baselinePlan(file, hypura, machine) };
}

/**
 * Stock llama.cpp: the whole model mapped, with hypura's context and threads. Its default rearranges the weights into
 * memory of its own where a kernel wants it; a person whose process dies of that turns it off, so it is on only where
 * the copy fits.
 */
function baselinePlan(file: ModelFile, hypura: Plan, machine: Machine): Plan {
  const limits: PlanLimits = {
    contextTokens: hypura.contextTokens,
    threads: hypura.decodeThreads,
    slotCount: 1,
    memoryBytes: null,
    mode: "resident",
    speculation: "off",
  };
  const boundless = {
    ...machine,
    memory: { ...machine.memory, availableBytes: 2 ** 50, totalBytes: 2 ** 50 },
  };
  const plan = planOf(file, limits, boundless);
  const copyFits = 2 * file.model.tensorBytes + plan.memory.kvBytes < machine.memory.availableBytes;
  return { ...plan, repack: copyFits, loadMode: isAligned(file.model) ? "mmap" : "read" };
}

interface Preparation {
  readonly plans: Setting["plans"];
  readonly group: MemoryGroup | null;
  readonly profiled: Machine;
  readonly signal: AbortSignal;
}

async function prepareSetting(flags: Flags, file: ModelFile, given: Preparation): Promise<Setting> {
  const { plans, group, profiled, signal } = given;
  const plan = plans.hypura as Plan;
  const whole = (most: number) => ({ least: 1, most, integer: true });
  const promptTokens =
    numberFlag("prompt-tokens", flags["prompt-tokens"], whole(1_000_000)) ?? defaults.promptTokens;
  const maxTokens =
    numberFlag("max-tokens", flags["max-tokens"], { ...whole(1_000_000), least: 2 }) ?? defaults.maxTokens;
  if (promptTokens + maxTokens > plan.contextTokens) {
    throw new HypuraError(
      "usage",
      `${countText(promptTokens)} tokens of prompt and ${countText(maxTokens)} to generate do not fit the context of ` +
        `${countText(plan.contextTokens)}: give a larger --context, or less of them`,
    );
  }
  const { vocabularySize } = file.model;
  const types = readMetadataArray(file, "tokenizer.ggml.token_type");
  return {
    file,
    session: `${new Date().toISOString().replace(/[-:]|\.\d+/g, "")}-${randomBytes(2).toString("hex")}`,
    machine: { fingerprint: fingerprintOf(profiled), memoryBytes: profiled.memory.totalBytes },
    model: {
      name: plan.model.name,
      path: file.path,
      bytes: file.files.reduce((sum, one) => sum + one.sizeBytes, 0),
      hash: hashOf(file),
    },
    settings: {
      promptTokens,
      maxTokens,
      seconds:
        numberFlag("seconds", flags.seconds, { least: 0.1, most: 86_400, integer: false }) ??
        defaults.seconds,
      seed,
      temperature: 1,
      groupBytes: group?.limitBytes ?? null,
    },
    prompt: promptOf(promptTokens, vocabularySize, types),
    plans,
    ceilings: await measureCeilings(file, profiled, signal),
    group,
    profiled,
  };
}

/** A plan's estimate learns from what its plan really did; under a limit the machine is another one. */
function tellPlanner(
  { plans, file, group, profiled }: Setting,
  { side, startedAt, outcome }: RunRecord,
): void {
  const isGuessing = plans.hypura?.speculation != null; // and what is right of guesses at random text says nothing
  if (
    isGuessing ||
    side !== "hypura" ||
    group !== null ||
    outcome.status !== "finished" ||
    outcome.figures.isCutShort
  ) {
    return;
  }
  const { decodedTokens, decodeTokensPerSecond, reads } = outcome.figures;
  const figures = {
    at: startedAt,
    decodeTokens: decodedTokens,
    decodeSeconds: decodedTokens / decodeTokensPerSecond.mean,
    hitRate: reads.heldRate,
  };
  rememberFigures(plans.hypura as Plan, file, profiled, figures, (note) => consola.warn(note));
}

/** Pieces of this many bytes, at so many places of each file, stand for the weights. */
const sample = { bytes: 4096, places: 64 } as const;

/** Tells models apart without reading all of them: sizes, the table of tensors, and a sample of the bytes. */
function hashOf({ files, model }: ModelFile): string {
  const hasher = new Bun.CryptoHasher("sha256");
  hasher.update(
    JSON.stringify([
      files.map((one) => one.sizeBytes),
      model.tensors.map((one) => [one.name, one.typeName, one.offsetBytes, one.sizeBytes]),
    ]),
  );
  const piece = new Uint8Array(sample.bytes);
  for (const { path, sizeBytes } of files) {
    const descriptor = openSync(path, "r");
    for (let i = 0; i < sample.places; i++) {
      const at = Math.floor((Math.max(0, sizeBytes - sample.bytes) * i) / (sample.places - 1));
      hasher.update(piece.subarray(0, readSync(descriptor, piece, 0, sample.bytes, at)));
    }
    closeSync(descriptor);
  }
  return hasher.digest("hex").slice(0, 32);
}

async function measureCeilings(file: ModelFile, machine: Machine, signal: AbortSignal): Promise<Ceilings> {
  return {
    volumeBytesPerSecond: await measureVolume(file, signal),
    memory: await measureMemory(machine, signal),
  };
}

const storageSeconds = 0.4;

/** What the model's own volume gives, cold and past the page cache; null where the file is too small to tell. */
async function measureVolume(file: ModelFile, signal: AbortSignal): Promise<number | null> {
  const [first] = file.files.toSorted((one, other) => other.sizeBytes - one.sizeBytes);
  if (first === undefined || findSource(first.path) === null) {
    return null;
  }
  status("measuring the model's volume");
  const settings = [8, 16].map((depth) => ({ readBytes: 1_048_576, depth, direct: true, aligned: true }));
  const { speed } = await measureStorage(first.path, {
    settings,
    secondsPerSetting: storageSeconds,
    scratchSeconds: 0,
    signal,
  });
  return speed.bestBytesPerSecond;
}

/**
 * The best of several short looks counts, by the time that the threads had a processor: what other programs took of it
 * is not the memory's limit, and a bound that is too low would refuse what is true.
 */
const memoryLooks = { count: 5, seconds: 0.1, leastBytes: 268_435_456 } as const;

/** What all processors together get from memory, only reading; null where the size of the caches is not known. */
async function measureMemory({ memory }: Machine, signal: AbortSignal): Promise<MemoryCeiling | null> {
  const { cacheBytes, logicalCores } = readProcessor();
  if (cacheBytes === null) {
    return null;
  }
  status("measuring the memory");
  const bufferBytes = Math.max(memoryLooks.leastBytes, 4 * cacheBytes);
  if (bufferBytes > memory.availableBytes / 4) {
    return null;
  }
  const body = { threads: logicalCores, bufferBytes, durationNs: memoryLooks.seconds * 1e9 };
  let bytesPerSecond = 0;
  for (let look = 0; look < memoryLooks.count; look++) {
    for await (const { data } of runTask("scan", body, signal)) {
      const { bytes, threadNs } = data as { readonly bytes: number; readonly threadNs: number };
      bytesPerSecond = Math.max(bytesPerSecond, (bytes * logicalCores * 1e9) / Math.max(1, threadNs));
    }
  }
  return { bytesPerSecond, cacheBytes };
}

// ---- a run -------------------------------------------------------------------------------------------------------

interface RunPlace {
  readonly index: number;
  readonly count: number;
  readonly signal: AbortSignal;
  readonly tracePath: string | undefined;
}

async function oneRun(setting: Setting, run: PlannedRun, place: RunPlace): Promise<RunRecord> {
  const { group, settings, file, session, machine, model } = setting;
  const plan = setting.plans[run.side] as Plan;
  const label = `run ${place.index + 1} of ${place.count}: ${run.side}, ${run.state}`;
  status(`${label}: ${run.state === "cold" ? "dropping the model from the page cache" : "starting"}`);
  const cachedBytes = await cached(file, run.state === "cold", place.signal);
  const { trace = null } = traceOption(plan, place.tracePath);
  const order: RunOrder = {
    plan,
    prompt: setting.prompt,
    maxTokens: settings.maxTokens,
    seconds: settings.seconds,
    seed: settings.seed,
    trace,
  };
  group?.resetPeak();
  const startedAt = new Date().toISOString();
  let atFirst: Busy = { deviceSeconds: null, processors: null };
  let firstAt = 0;
  const end = await runOrder(order, {
    signal: place.signal,
    group,
    onLoaded: () => status(`${label}: reading the prompt`),
    onToken: (count) => {
      if (count === 1) {
        atFirst = busyNow(file.path);
        firstAt = performance.now();
      }
      const rate = count < 2 ? "" : `, ${rateText((count - 1) / ((performance.now() - firstAt) / 1000))}`;
      status(`${label}: ${count} of ${settings.maxTokens} tokens${rate}`);
    },
  });
  const seen = { groupPeakBytes: group?.peakBytes() ?? null, ...busySince(atFirst, busyNow(file.path)) };
  const judge = (ceilings: Ceilings): Outcome =>
    end.status === "reported" ? outcomeOf(end.report, seen, { plan, ceilings }) : end;
  const first = judge(setting.ceilings);
  // What was measured while something else had the disk is measured once more, before a run is refused for it.
  const outcome =
    first.status === "refused"
      ? judge(higherOf(setting.ceilings, await measureCeilings(file, setting.profiled, place.signal)))
      : first;
  const { tensors: _, ...kept } = plan;
  return {
    version: recordVersion,
    hypura: packageJson.version,
    session,
    index: place.index,
    round: run.round,
    startedAt,
    side: run.side,
    state: run.state,
    machine,
    model,
    settings,
    plan: kept,
    cachedBytes,
    outcome,
  };
}

/** Bytes of the model in the page cache, after dropping them if asked to. */
async function cached(file: ModelFile, drop: boolean, signal: AbortSignal): Promise<number | null> {
  const body = { paths: file.files.map((one) => one.path), drop };
  for await (const { data } of runTask("cached", body, signal)) {
    return (data as { readonly cachedBytes: number | null }).cachedBytes;
  }
  return null;
}

/** How long things have been busy since the machine started, whoever used them; null where that is unknown. */
interface Busy {
  readonly deviceSeconds: number | null;
  readonly processors: Seen["processors"];
}

function busyNow(path: string): Busy {
  return { deviceSeconds: deviceBusySeconds(path), processors: processorsBusy() };
}

function busySince(before: Busy, after: Busy): Pick<Seen, "deviceBusySeconds" | "processors"> {
  const since = (from: number | null, to: number | null): number | null =>
    from === null || to === null ? null : to - from;
  const busySeconds = since(before.processors?.busySeconds ?? null, after.processors?.busySeconds ?? null);
  return {
    deviceBusySeconds: since(before.deviceSeconds, after.deviceSeconds),
    processors: busySeconds === null ? null : { busySeconds, count: after.processors?.count ?? 1 },
  };
}

/** The unit of /proc/stat, USER_HZ, is 100 on every Linux that programs see. */
const ticksPerSecond = 100;

function processorsBusy(): Busy["processors"] {
  try {
    const lines = readFileSync("/proc/stat", "utf8").split("\n");
    const ticks = (lines[0] ?? "").trim().split(/\s+/).slice(1).map(Number);
    const [user = 0, nice = 0, system = 0, , , interrupts = 0, softInterrupts = 0, stolen = 0] = ticks;
    return {
      busySeconds: (user + nice + system + interrupts + softInterrupts + stolen) / ticksPerSecond,
      count: lines.filter((line) => /^cpu\d/.test(line)).length,
    };
  } catch {
    return null; // no such file on this system
  }
}

/** How long the device of the file has been busy since the machine started, whoever used it; null where unknown. */
function deviceBusySeconds(path: string): number | null {
  try {
    const { dev } = statSync(path);
    // As the kernel packs a device number into a stat (new_encode_dev and glibc's gnu_dev_major).
    const major = (dev >> 8) & 0xfff;
    const minor = (dev & 0xff) | ((dev >> 12) & 0xfff00);
    const line = readFileSync("/proc/diskstats", "utf8")
      .split("\n")
      .map((text) => text.trim().split(/\s+/))
      .find((fields) => fields[0] === String(major) && fields[1] === String(minor));
    return line === undefined ? null : Number(line[12]) / 1000; // milliseconds with requests under way
  } catch {
    return null; // no such file on this system
  }
}

// ---- what is said while it runs ----------------------------------------------------------------------------------

let statusShownAt = 0;

/** A line that the next one takes the place of; on a terminal only. */
function status(text: string): void {
  if (stderr.isTerminal && performance.now() - statusShownAt > 50) {
    statusShownAt = performance.now();
    tell(`\r\x1b[K${clip(text, pageWidth - 1)}`);
  }
}

function clearStatus(): void {
  if (statusShownAt > 0) {
    tell("\r\x1b[K");
    statusShownAt = 0;
  }
}

function planText(plan: Plan): string {
  const { poolBytes } = plan.memory;
  const pool = poolBytes === 0 ? "" : `, a pool of ${bytesText(poolBytes)}`;
  const repack = plan.streaming === null ? `, repacking ${plan.repack ? "on" : "off"}` : "";
  return `${plan.mode} (${plan.loadMode}${repack}${pool}), ${plural(plan.decodeThreads, "thread")}`;
}

function sayPlans({ plans, settings, model, ceilings }: Setting): void {
  clearStatus();
  const { hypura, baseline } = plans;
  const limit = settings.groupBytes === null ? "" : `, each in ${bytesText(settings.groupBytes)}`;
  consola.info(
    `${printable(model.name)}, ${bytesText(model.bytes)}: ${settings.promptTokens} tokens of prompt, ` +
      `${settings.maxTokens} to generate${limit}`,
  );
  consola.info(`hypura: ${planText(hypura as Plan)}`);
  if (baseline !== null) {
    consola.info(`baseline: ${planText(baseline)}`);
  }
  const { volumeBytesPerSecond, memory } = ceilings;
  const gives = [
    ...(volumeBytesPerSecond === null
      ? []
      : [`the volume gives ${bandwidthText(volumeBytesPerSecond)}, cold and past the page cache`]),
    ...(memory === null ? [] : [`memory ${bandwidthText(memory.bytesPerSecond)} to who only reads`]),
  ];
  if (gives.length > 0) {
    consola.info(gives.join("; "));
  }
}

/** What is left to others on an idle machine: the benchmark's own parent, and the system. */
const mostOthersShare = 0.1;

function sayOutcome(record: RunRecord): void {
  clearStatus();
  const { outcome, side, state, cachedBytes, model } = record;
  const head = `run ${String(record.index + 1).padEnd(2)} ${side.padEnd(8)} ${state}`;
  const rest = (cachedBytes ?? 0) / model.bytes;
  if (state === "cold" && cachedBytes === null) {
    consola.warn("this system does not tell what the page cache holds: cold may be less cold than it says");
  } else if (state === "cold" && rest > 0.01) {
    consola.warn(
      `${bytesText(cachedBytes ?? 0)} of the model would not leave the page cache: not quite cold`,
    );
  }
  switch (outcome.status) {
    case "finished": {
      const { decodeTokensPerSecond: rate, firstTokenSeconds, isCutShort, othersShare } = outcome.figures;
      const cut = isCutShort ? " (cut short by --seconds)" : "";
      consola.info(
        `${head}: ${rateText(rate.median)}, first token after ${durationText(firstTokenSeconds)}${cut}`,
      );
      if ((othersShare ?? 0) > mostOthersShare) {
        consola.warn(
          `other programs had ${Math.round(100 * (othersShare ?? 0))} % of the processors meanwhile: this figure is theirs too`,
        );
      }
      return;
    }
    case "refused":
      consola.warn(`${head}: refused: ${outcome.reason}`);
      return;
    case "killed":
    case "failed":
      consola.warn(`${head}: ${outcome.status}: ${outcome.reason}`);
  }
}

// ---- the result --------------------------------------------------------------------------------------------------

async function show(flags: Flags, records: readonly RunRecord[]): Promise<void> {
  const ratios = (["cold", "warm"] as const).flatMap((state) => ratioOf(records, state) ?? []);
  if (flags.html !== undefined && records.length > 0) {
    await writePage(flags, flags.html, records);
  }
  if (flags.json === true) {
    await print(`${JSON.stringify({ session: records[0]?.session ?? null, records, ratios })}\n`);
  } else if (records.length > 0) {
    await print(`${resultLines(records).join("\n")}\n`);
  }
  const isUseless = records.length > 0 && !records.some(({ outcome }) => outcome.status === "finished");
  if (isUseless && process.exitCode === undefined) {
    process.exitCode = exitStatus("engine");
  }
}

async function writePage(flags: Flags, path: string, records: readonly RunRecord[]): Promise<void> {
  const { benchPage, readPassages } = await import("../bench-page");
  const tracePath = traceFile(flags);
  // A run that was stopped, or has nothing to stream, leaves none; and an older one is of other runs.
  const isOfThese =
    tracePath !== undefined &&
    existsSync(tracePath) &&
    statSync(tracePath).mtimeMs >= Date.parse(records[0]?.startedAt ?? "");
  const passages = isOfThese ? await readPassages(tracePath) : null;
  if (tracePath !== undefined && flags.trace === undefined) {
    rmSync(tracePath, { force: true });
  }
  try {
    writeFileSync(path, benchPage(records, passages));
  } catch (cause) {
    throw new HypuraError(
      "io",
      `the page ${JSON.stringify(path)} cannot be written (${(cause as Error).message})`,
      {
        cause,
      },
    );
  }
}

// ---- history -----------------------------------------------------------------------------------------------------

const mostSessions = 20;

async function showHistory(flags: Flags): Promise<void> {
  const { records: all, unreadable } = readRecords();
  const wanted = flags.model === undefined ? null : hashOf(openModelFile(flags.model));
  const records = wanted === null ? all : all.filter((record) => record.model.hash === wanted);
  if (unreadable > 0) {
    const verb = unreadable === 1 ? "is" : "are";
    consola.warn(`${plural(unreadable, "record")} ${verb} damaged or of another version, and left out`);
  }
  if (flags.json === true) {
    await print(`${JSON.stringify({ records })}\n`);
    return;
  }
  if (records.length === 0) {
    await print("no benchmark is kept yet: run `hypura bench MODEL`\n");
    return;
  }
  const sessions = [...new Set(records.map((one) => one.session))].slice(-mostSessions);
  await print(
    `${historyLines(sessions.map((session) => records.filter((one) => one.session === session))).join("\n")}\n`,
  );
}

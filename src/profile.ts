// The measured machine: has native code measure it once, keeps the figures in the state folder, and knows when they no
// longer hold. It owns the fingerprint (what the figures depend on), their age, and how long each measurement takes;
// what a machine is stands in machine.ts, what a volume gives in storage.ts.

import { join } from "node:path";
import packageJson from "../package.json";
import pin from "../vendor/llama.json";
import { runTask } from "./engine";
import { HypuraError } from "./errors";
import {
  type Machine,
  type MachineProfile,
  type ProductSpeed,
  profileVersion,
  type RowSpeeds,
  readMachine,
  readProcessor,
  type StepSeconds,
  type StorageSpeed,
  validateProfile,
  volumeOf,
} from "./machine";
import { measuredRowElements } from "./plan-cost";
import { listState, readState, removeState, stateFolder, writeState } from "./state";
import {
  defaultDepths,
  defaultReadSizes,
  type MeasureOptions,
  measureStorage,
  type ReadSetting,
  type StorageResult,
} from "./storage";

export interface LoadOptions extends MeasureOptions {
  /** A file or a folder: the volume that matters. */
  readonly folder: string;
  /** cached: never measures. if-needed: what is missing, too old or of another machine. always: everything. */
  readonly measure: "cached" | "if-needed" | "always";
  /** How long everything may take; more is steadier. */
  readonly seconds?: number;
  /** What a person should know of how the figures came about. */
  readonly onNote?: ((text: string) => void) | undefined;
  /** Milliseconds since 1970, for tests. */
  readonly now?: number;
}

/** What measuring everything takes, a scratch file not counted. */
export const defaultSeconds = 10;

/** Disks fill up and firmware changes: a profile older than this is measured again. */
const lifeMs = 30 * 24 * 3600 * 1000;

/** A profile for each fingerprint, so that a run in a control group does not cost the machine its own. */
const cachePrefix = "machine-";

function cacheName(fingerprint: string): string {
  return `${cachePrefix}${Bun.hash.xxHash64(fingerprint).toString(16).padStart(16, "0")}.json`;
}

function keep(profile: MachineProfile, now: number): void {
  const name = cacheName(profile.fingerprint);
  writeState(name, `${JSON.stringify(profile, null, 2)}\n`);
  for (const other of listState(cachePrefix)) {
    if (other.name !== name && now - other.modifiedMs > lifeMs) {
      removeState(other.name);
    }
  }
}

/** What was measured holds for this process also where it cannot be kept. */
function keepOrSay(profile: MachineProfile, { now = Date.now(), onNote }: LoadOptions): void {
  try {
    keep(profile, now);
  } catch (error) {
    if (!(error instanceof HypuraError)) throw error;
    onNote?.(`the figures are not kept, and the next command measures again: ${error.message}`);
  }
}

/** The types that models are made of; for another one the planner takes the median of these. */
const measuredTypes = [
  ...["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"],
  ...["q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq3_s", "iq4_nl", "iq4_xs", "mxfp4"],
] as const;

/** The machine with its devices and its profile for the volume of `folder`; the profile is null where none holds. */
export async function loadMachine(options: LoadOptions): Promise<Machine> {
  const machine: Machine = { ...readMachine(), ...(await readDevices(options)) };
  const volume = volumeOf(options.folder);
  const fingerprint = fingerprintOf(machine);
  const kept = readKept(fingerprint, options);
  if (options.measure === "cached") {
    return { ...machine, profile: kept === null ? null : forVolume(kept, volume) };
  }
  const needsAll = kept === null || options.measure === "always";
  const base = needsAll ? await measureProcessor(machine, fingerprint, options) : kept;
  const others = (kept?.storage ?? []).filter((one) => one.volume !== volume);
  const known = kept?.storage.find((one) => one.volume === volume);
  const storage = needsAll || known === undefined ? await measureVolume(options) : known;
  const profile = { ...base, storage: storage === null ? others : [storage, ...others] };
  if (profile !== kept && (needsAll || storage !== known)) {
    keepOrSay(profile, options);
  }
  return { ...machine, profile: forVolume(profile, volume) };
}

/** Keeps what `hypura iobench` found, where there is a profile to keep it in. Says whether it did. */
export async function keepStorage(
  speed: StorageSpeed,
  options: Omit<LoadOptions, "measure">,
): Promise<boolean> {
  const machine: Machine = { ...readMachine(), ...(await readDevices(options)) };
  const kept = readKept(fingerprintOf(machine), { ...options, measure: "cached" });
  if (kept === null) {
    return false;
  }
  const others = kept.storage.filter((one) => one.volume !== speed.volume);
  keep({ ...kept, storage: [speed, ...others] }, options.now ?? Date.now());
  return true;
}

function forVolume(profile: MachineProfile, volume: string): MachineProfile {
  return { ...profile, storage: profile.storage.filter((one) => one.volume === volume) };
}

// ---- what holds -------------------------------------------------------------------------------------------------------

/** Memory that a kernel or a hypervisor takes a little more or less of is still the same memory. */
const memoryStepBytes = 268_435_456;

/** Everything that the figures depend on, but for the volume, which each of storage's figures names. */
export function fingerprintOf(machine: Machine): string {
  const { model, logicalCores } = readProcessor();
  const devices = machine.devices
    .filter((one) => one.type !== "cpu")
    .map((one) => `${one.name} ${one.description}`);
  const parts: Readonly<Record<string, string | number>> = {
    processor: model,
    cores: `${machine.computeCores} of ${logicalCores}`,
    memory: Math.round(machine.memory.totalBytes / memoryStepBytes) * memoryStepBytes,
    limit: machine.memory.limitedBy === null ? "none" : "control group",
    devices: devices.join(", ") || "none",
    profile: profileVersion,
    hypura: packageJson.version,
    llama: pin.release,
  };
  return Object.entries(parts)
    .map(([name, value]) => `${name}=${value}`)
    .join("; ");
}

/** The names of the parts in which two fingerprints differ: "cores, llama". */
export function differenceOf(one: string, other: string): string {
  const parts = (text: string): readonly string[] => text.split("; ");
  return parts(one)
    .filter((part) => !parts(other).includes(part))
    .map((part) => part.slice(0, part.indexOf("=")))
    .join(", ");
}

/** The kept profile with the storage that is still young; null where it does not hold. Says why. */
function readKept(
  fingerprint: string,
  { measure, now = Date.now(), onNote }: LoadOptions,
): MachineProfile | null {
  const again = measure === "cached" ? "`hypura profile` measures again" : "measuring again";
  const name = cacheName(fingerprint);
  const text = readState(name);
  if (text === null) {
    const last = listState(cachePrefix).map((other) => parseKept(readState(other.name)))[0];
    if (last !== undefined && last !== null) {
      onNote?.(
        `this is not the machine that was measured last (${differenceOf(fingerprint, last.fingerprint)}): ${again}`,
      );
    }
    return null;
  }
  const kept = parseKept(text);
  if (kept?.fingerprint !== fingerprint) {
    onNote?.(`the kept profile ${join(stateFolder(), name)} is damaged: ${again}`);
    return null;
  }
  const isYoung = (measuredAt: string): boolean => Math.abs(now - Date.parse(measuredAt)) < lifeMs;
  if (!isYoung(kept.measuredAt)) {
    onNote?.(`the kept profile is more than 30 days old: ${again}`);
    return null;
  }
  return { ...kept, storage: kept.storage.filter((one) => isYoung(one.measuredAt)) };
}

function parseKept(text: string | null): MachineProfile | null {
  try {
    return validateProfile(JSON.parse(text ?? ""));
  } catch {
    return null; // damaged; who asks says so
  }
}

// ---- measuring --------------------------------------------------------------------------------------------------------

/** How the time is divided; the rest is what cannot be hurried: filling memory, starting threads. */
const shares = { copy: 0.03, product: 0.001, products: 0.8, readSetting: 0.024 } as const;

/** A share of the whole for the bar that shows progress. */
const progressOf = { copy: 0.05, products: 0.5 } as const;

async function readDevices({
  run = runTask,
  signal,
}: MeasureOptions): Promise<Pick<Machine, "devices" | "gpuBackends">> {
  for await (const { data } of run("devices", {}, signal)) {
    return data as Pick<Machine, "devices" | "gpuBackends">;
  }
  throw new HypuraError("internal", "ggml's devices were listed without a word");
}

async function measureProcessor(
  machine: Machine,
  fingerprint: string,
  options: LoadOptions,
): Promise<MachineProfile> {
  const { model } = readProcessor();
  const computeThreads = machine.computeCores;
  options.onProgress?.("memory", 0);
  const copyBytesPerSecond = await measureCopy(machine, options);
  const steps = await measureSteps(machine, options);
  const products = await measureProducts(machine, options);
  return {
    version: profileVersion,
    fingerprint,
    measuredAt: new Date(options.now ?? Date.now()).toISOString(),
    cpuModel: model,
    computeThreads,
    copyBytesPerSecond,
    steps,
    products,
    storage: [],
  };
}

/** Twice the caches, and enough for a steady figure; a machine that is short of memory gives an eighth of what is free. */
function workingBytes({ memory }: Machine): number {
  const wanted = Math.max(134_217_728, 2 * (readProcessor().cacheBytes ?? 0));
  const most = Math.max(33_554_432, Math.min(1_073_741_824, memory.availableBytes / 8));
  return Math.floor(Math.min(wanted, most) / 4096) * 4096;
}

async function measureCopy(machine: Machine, options: LoadOptions): Promise<number> {
  const { run = runTask, signal, seconds = defaultSeconds } = options;
  const body = {
    threads: machine.computeCores,
    bufferBytes: workingBytes(machine) / 2,
    durationNs: Math.round(seconds * shares.copy * 1e9),
  };
  for await (const { data } of run("copy", body, signal)) {
    const { bytes, ns } = data as { readonly bytes: number; readonly ns: number };
    return Math.round((bytes / Math.max(1, ns)) * 1e9);
  }
  throw new HypuraError("internal", "copying memory was measured without a word");
}

/** Layers of a model of a few billion weights, and a conversation's beginning; `operations` is what a step is made of. */
const stepCases = [
  { kind: "attention", width: 128, heads: 16, keyHeads: 4, parts: 256, steps: 32, operations: 1 },
  { kind: "mixing", width: 2048, heads: 1, keyHeads: 1, parts: 8, steps: 32, operations: 1 },
  // llama.cpp computes a norm and its weights at once; the sum is the second.
  { kind: "plain", width: 2048, heads: 1, keyHeads: 1, parts: 1, steps: 128, operations: 2 },
] as const;

async function measureSteps(machine: Machine, options: LoadOptions): Promise<StepSeconds> {
  const { run = runTask, signal, seconds = defaultSeconds } = options;
  const body = {
    threads: machine.computeCores,
    pollPercent: 50,
    durationNs: Math.round(seconds * shares.product * 1e9),
    cases: stepCases.map(({ operations: _, ...one }) => one),
  };
  const best = stepCases.map(() => Infinity);
  for (let round = 0; round < productRounds; round++) {
    let index = 0;
    for await (const { data } of run("steps", body, signal)) {
      const one = stepCases[index];
      if (one === undefined) break;
      const elements = one.width * one.heads * one.parts * one.steps * one.operations;
      const each = (data as { readonly ns: number }).ns / 1e9 / elements;
      best[index] = Math.min(best[index] ?? Infinity, each);
      index++;
    }
  }
  const [attention = 0, mixing = 0, plain = 0] = best;
  return { attention, mixing, plain };
}

/** What native code says of a case (ffi/native/tasks.cpp); of a form that a type has not, nothing but that. */
interface ProductFigures {
  readonly bytes: number;
  readonly flops: number;
  readonly ns: number;
  readonly isAbsent: boolean;
}

type Form = "plain" | "repacked" | "experts";

interface ProductCase {
  readonly typeName: string;
  readonly form: Form;
  readonly rows: "short" | "long" | "batch";
}

/** What is measured of each type. Those of one type follow each other: native code makes weights of it once. */
const productCases: readonly ProductCase[] = measuredTypes.flatMap((typeName): readonly ProductCase[] => [
  ...(["plain", "repacked"] as const).flatMap((form) =>
    (["short", "long", "batch"] as const).map((rows) => ({ typeName, form, rows })),
  ),
  { typeName, form: "experts", rows: "short" },
  { typeName, form: "experts", rows: "long" },
]);

/** Matrices as models of some hundred million to some ten billion weights have them. */
const shapes = {
  short: { rowElements: measuredRowElements.short, rowCount: 1024, tokens: 1, products: 1 << 20 },
  long: { rowElements: measuredRowElements.long, rowCount: 2048, tokens: 1, products: 1 << 20 },
  batch: { rowElements: measuredRowElements.long, rowCount: 512, tokens: 512, products: 1 },
} as const;

const expertShape = { experts: 8, rowCount: 512 } as const;

/**
 * Rounds over all types, some tenths of a second apart, of which each case's best counts: another program that computes
 * at the same time can only slow a product down, and the figures are kept for a month. Fewer where time runs out.
 */
const productRounds = 5;

async function measureProducts(machine: Machine, options: LoadOptions): Promise<readonly ProductSpeed[]> {
  const { run = runTask, signal, onProgress, seconds = defaultSeconds } = options;
  const body = {
    threads: machine.computeCores,
    pollPercent: 50, // llama.cpp's default, and a resident plan's
    weightBytes: workingBytes(machine),
    durationNs: Math.round(seconds * shares.product * 1e9),
    cases: productCases.map(({ typeName, form, rows }) => ({
      ...{ typeName, ...shapes[rows], experts: 0, repacked: form !== "plain" },
      ...(form === "experts" ? expertShape : {}),
    })),
  };
  const best = new Map<ProductCase, number>();
  const startMs = performance.now();
  for (let round = 0; round < productRounds; round++) {
    const spentSeconds = (performance.now() - startMs) / 1000;
    if ((spentSeconds * (round + 1)) / Math.max(1, round) > seconds * shares.products) break;
    let step = 0;
    for await (const { data } of run("products", body, signal)) {
      const one = productCases[step];
      if (one === undefined) break;
      best.set(one, Math.max(best.get(one) ?? 0, rateOf(one, data as ProductFigures)));
      const done = (round * productCases.length + step++) / (productRounds * productCases.length);
      const fraction = progressOf.copy + (progressOf.products - progressOf.copy) * done;
      onProgress?.(`products with ${one.typeName}`, fraction);
    }
  }
  return measuredTypes.map((typeName) => speedOfType(typeName, best));
}

/** Bytes or operations a second; 0 where the type has no such form. */
function rateOf({ rows }: ProductCase, { bytes, flops, ns, isAbsent }: ProductFigures): number {
  return isAbsent ? 0 : Math.round(((rows === "batch" ? flops : bytes) / ns) * 1e9);
}

function speedOfType(typeName: string, best: ReadonlyMap<ProductCase, number>): ProductSpeed {
  const rate = (form: Form, rows: ProductCase["rows"]): number => {
    const found = productCases.find(
      (one) => one.typeName === typeName && one.form === form && one.rows === rows,
    );
    return (found === undefined ? undefined : best.get(found)) ?? 0;
  };
  const rowSpeeds = (form: Form): RowSpeeds => ({
    decodeBytesPerSecond: rate(form, "long"),
    shortRowBytesPerSecond: rate(form, "short"),
  });
  const isRepacked = (["repacked", "experts"] as const).every(
    (form) => rate(form, "short") > 0 && rate(form, "long") > 0,
  );
  const repacked = isRepacked
    ? {
        ...rowSpeeds("repacked"),
        prefillFlopsPerSecond: rate("repacked", "batch"),
        experts: rowSpeeds("experts"),
      }
    : null;
  return {
    typeName,
    ...rowSpeeds("plain"),
    prefillFlopsPerSecond: rate("plain", "batch"),
    repacked,
  };
}

/** The settings that a profile holds: direct and aligned. */
export function profileSettings(): readonly ReadSetting[] {
  return defaultReadSizes.flatMap((readBytes) =>
    defaultDepths.map((depth) => ({ readBytes, depth, direct: true, aligned: true })),
  );
}

/** As with products: what else reads at the same time can only slow a setting down. */
const storageRounds = 2;

/** Null, with the reason as a note, where the volume gives nothing to read and takes nothing. */
async function measureVolume(options: LoadOptions): Promise<StorageSpeed | null> {
  const { folder, onNote, onProgress, seconds = defaultSeconds } = options;
  const rest = 1 - progressOf.products;
  let result: StorageResult;
  try {
    result = await measureStorage(folder, {
      ...options,
      settings: profileSettings(),
      secondsPerSetting: (seconds * shares.readSetting) / storageRounds,
      rounds: storageRounds,
      scratchSeconds: Math.min(3, seconds / 3),
      onProgress: (what, done) => onProgress?.(`storage: ${what}`, progressOf.products + rest * done),
    });
  } catch (error) {
    if (error instanceof HypuraError && (error.code === "io" || error.code === "request")) {
      onNote?.(`storage was not measured: ${error.message}`);
      return null;
    }
    throw error;
  }
  for (const note of result.notes) {
    onNote?.(note);
  }
  return result.speed;
}

// What a machine offers: processors that may be used, memory that is free, devices, and what was measured of them. It
// owns the value, the questions to the system, and the reading of a machine from a file; nothing of what follows from
// the answers (plan.ts), and none of the measuring (profile.ts). Inside a control group the group's limit is the
// memory, because the kernel kills at that line whatever the machine has.

import { existsSync, readFileSync, realpathSync } from "node:fs";
import { availableParallelism, cpus, totalmem } from "node:os";
import { HypuraError } from "./errors";

export interface Machine {
  /** Cores that compute threads should use: physical ones (performance cores on Apple), within the affinity mask. */
  readonly computeCores: number;
  /** Whether llama.cpp can load weights past the page cache here. */
  readonly hasDirectLoad: boolean;
  readonly memory: {
    /** All of the machine's, or of the control group's where that is less. */
    readonly totalBytes: number;
    /** What new allocations can have without swapping: free memory and what the kernel would drop for it. */
    readonly availableBytes: number;
    /** Set where a control group's limit is what counts. */
    readonly limitedBy: string | null;
  };
  /** What ggml can compute on; empty where nobody has asked it (readMachine does not, loadMachine of profile.ts does). */
  readonly devices: readonly Device[];
  /** What for GPUs is compiled in, as ggml names it ("CUDA"), whether there is such a GPU or not; empty like devices. */
  readonly gpuBackends: readonly string[];
  /** What was measured, for the volume that was asked about; null where nothing was, or not of this machine. */
  readonly profile: MachineProfile | null;
}

export interface Device {
  readonly name: string;
  readonly description: string;
  readonly type: "cpu" | "gpu" | "igpu" | "accel";
  /** As ggml says; of Metal it is the recommended working set, of a processor the machine's memory. */
  readonly totalBytes: number;
  readonly freeBytes: number;
  /** Its memory is the machine's own: what is placed on one is not free for the other. */
  readonly isUnified: boolean;
}

/** Of MachineProfile; another one is measured again, because its figures mean something else. */
export const profileVersion = 2;

export interface MachineProfile {
  readonly version: typeof profileVersion;
  /** What the figures depend on, as `name=value` parts joined by "; ". Another one means another machine. */
  readonly fingerprint: string;
  /** ISO 8601. */
  readonly measuredAt: string;
  readonly cpuModel: string;
  /** Threads that the figures below were measured with. */
  readonly computeThreads: number;
  /** Bytes copied from memory to memory, counted once. */
  readonly copyBytesPerSecond: number;
  readonly steps: StepSeconds;
  /** ggml's type names as the GGUF reader gives them: "q4_K", "f16". */
  readonly products: readonly ProductSpeed[];
  /** loadMachine gives the volume of its folder only: one entry, or none where that was not measured. */
  readonly storage: readonly StorageSpeed[];
}

/** Products with one token: bytes of weights per second, from weights that no cache holds. */
export interface RowSpeeds {
  /** Of long rows, `measuredRowElements` of plan-cost.ts. */
  readonly decodeBytesPerSecond: number;
  /** Of short ones. */
  readonly shortRowBytesPerSecond: number;
}

/** Matrix products on weights of one type, on the processor. */
export interface ProductSpeed extends RowSpeeds {
  readonly typeName: string;
  /** A batch of 512 tokens: floating-point operations (two for each weight and token) per second. */
  readonly prefillFlopsPerSecond: number;
  /** The same on weights that llama.cpp has rearranged; null where it has no such form of the type here. */
  readonly repacked: RepackedSpeed | null;
}

/** What a layer does for one token beside its products, in seconds for each element. */
export interface StepSeconds {
  /** Of a head of the query (not of the keys), times the positions that it looks at. */
  readonly attention: number;
  /** Of what the experts of one token answer: weighed and added. */
  readonly mixing: number;
  /** Of a row, for one operation like a norm or a sum. */
  readonly plain: number;
}

/** Only rearranged weights have a way of their own for experts: as they lie in the file both are equally fast. */
export interface RepackedSpeed extends RowSpeeds {
  readonly prefillFlopsPerSecond: number;
  readonly experts: RowSpeeds;
}

export interface StorageSpeed {
  /** As `mount` prints it: "/dev/nvme0n1p2 on / (ext4)". */
  readonly volume: string;
  /** ISO 8601. */
  readonly measuredAt: string;
  /** Read past the page cache; false where the file system cannot. */
  readonly direct: boolean;
  readonly reads: readonly ReadSpeed[];
  readonly bestBytesPerSecond: number;
  /** The smallest reads in flight that come near the best bandwidth. */
  readonly best: { readonly readBytes: number; readonly depth: number };
}

/** Reads of one size at random places of a cold file, `depth` of them in flight. */
export interface ReadSpeed {
  readonly readBytes: number;
  readonly depth: number;
  readonly bytesPerSecond: number;
  readonly latencySeconds: { readonly p50: number; readonly p99: number };
}

/** Asks the system only: no device, no profile. */
export function readMachine(): Machine {
  return process.platform === "darwin" ? readDarwin() : readLinux();
}

// ---- Linux --------------------------------------------------------------------------------------------------

function readLinux(): Machine {
  const info = textOf("/proc/meminfo") ?? "";
  const field = (name: string): number =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(info)?.[1] ?? 0) * 1024;
  const total = field("MemTotal") || totalmem();
  const available = field("MemAvailable");
  const group = readGroupLimit();
  const isLimited = group !== null && group.limitBytes < total;
  return {
    computeCores: Math.max(
      1,
      Math.min(availableParallelism(), physicalCoresLinux(), groupCores() ?? Infinity),
    ),
    hasDirectLoad: true,
    memory: {
      totalBytes: isLimited ? group.limitBytes : total,
      availableBytes: isLimited ? Math.min(available, group.limitBytes - group.usedBytes) : available,
      limitedBy: isLimited ? group.path : null,
    },
    devices: [],
    gpuBackends: [],
    profile: null,
  };
}

interface GroupLimit {
  readonly path: string;
  readonly limitBytes: number;
  /** Without page cache, which the kernel drops before it kills. */
  readonly usedBytes: number;
}

/** The tightest memory limit among this process's control group and its parents, version 1 or 2. */
function readGroupLimit(): GroupLimit | null {
  let tightest: GroupLimit | null = null;
  for (const { folder, isUnified } of groupFolders("memory", textOf)) {
    const limit = readLimit(folder, isUnified);
    if (limit !== null && (tightest === null || limit.limitBytes < tightest.limitBytes)) {
      tightest = limit;
    }
  }
  return tightest;
}

type Read = (path: string) => string | null;

/** The folders of this process's control group for a controller and of its parents. */
function groupFolders(controller: string, read: Read): readonly { folder: string; isUnified: boolean }[] {
  return (read("/proc/self/cgroup") ?? "").split("\n").flatMap((line) => {
    const [, controllers, path] = line.split(":");
    const isUnified = controllers === "";
    if (path === undefined || !(isUnified || controllers?.split(",").includes(controller))) {
      return [];
    }
    const mount = isUnified ? "/sys/fs/cgroup" : `/sys/fs/cgroup/${controller}`;
    const parts = path.split("/").filter((part) => part !== "");
    return Array.from({ length: parts.length + 1 }, (_, depth) => ({
      folder: [mount, ...parts.slice(0, depth)].join("/"),
      isUnified,
    }));
  });
}

/**
 * The processors' worth of time that control groups leave to this process, rounded up; null without a limit. More
 * threads than that are stopped together for the rest of each period, and all wait for the last at the next barrier.
 */
export function groupCores(read: Read = textOf): number | null {
  const limits = groupFolders("cpu", read).flatMap(({ folder, isUnified }) => {
    const [quota, period] = isUnified
      ? (read(`${folder}/cpu.max`) ?? "").trim().split(" ")
      : [read(`${folder}/cpu.cfs_quota_us`)?.trim(), read(`${folder}/cpu.cfs_period_us`)?.trim()];
    const cores = Number(quota || Number.NaN) / Number(period || Number.NaN);
    return cores > 0 && Number.isFinite(cores) ? [Math.ceil(cores)] : []; // "max", -1 or nothing: no limit
  });
  return limits.length === 0 ? null : Math.min(...limits);
}

function readLimit(folder: string, isUnified: boolean): GroupLimit | null {
  const limit = textOf(`${folder}/${isUnified ? "memory.max" : "memory.limit_in_bytes"}`)?.trim();
  // Version 1 says "no limit" with a number near 2^63; either way it is more than any machine has.
  if (limit === undefined || limit === "max" || Number(limit) > 2 ** 60) {
    return null;
  }
  const used = Number(textOf(`${folder}/${isUnified ? "memory.current" : "memory.usage_in_bytes"}`) ?? 0);
  const stat = textOf(`${folder}/memory.stat`) ?? "";
  const cached = Number(/^(?:total_inactive_file|inactive_file) (\d+)$/m.exec(stat)?.[1] ?? 0);
  return { path: folder, limitBytes: Number(limit), usedBytes: Math.max(0, used - cached) };
}

/** Physical cores within the affinity mask. */
function physicalCoresLinux(): number {
  const allowed = parseCpuList(
    /^Cpus_allowed_list:\s*(\S+)/m.exec(textOf("/proc/self/status") ?? "")?.[1] ?? "",
  );
  const cores = new Set<string>();
  for (let cpu = 0; existsSync(`/sys/devices/system/cpu/cpu${cpu}`); cpu++) {
    if (allowed.size === 0 || allowed.has(cpu)) {
      cores.add(textOf(`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`) ?? String(cpu));
    }
  }
  return cores.size || availableParallelism();
}

/** "0-2,5" -> 0, 1, 2, 5. */
export function parseCpuList(text: string): ReadonlySet<number> {
  const cpus = new Set<number>();
  for (const part of text.split(",")) {
    const [, first, last] = /^(\d+)(?:-(\d+))?$/.exec(part.trim()) ?? [];
    for (let cpu = Number(first); cpu <= Number(last ?? first); cpu++) {
      cpus.add(cpu);
    }
  }
  return cpus;
}

function textOf(path: string): string | null {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null; // absent on this kernel: the caller's other sources decide
  }
}

// ---- macOS --------------------------------------------------------------------------------------------------

function readDarwin(): Machine {
  const performanceCores = Number(outputOf(["sysctl", "-n", "hw.perflevel0.physicalcpu"]));
  const pages = outputOf(["vm_stat"]);
  const pageBytes = Number(/page size of (\d+) bytes/.exec(pages)?.[1] ?? 16_384);
  const count = (name: string): number =>
    Number(new RegExp(`^Pages ${name}:\\s+(\\d+)`, "m").exec(pages)?.[1] ?? 0);
  const reclaimable = count("free") + count("inactive") + count("speculative") + count("purgeable");
  return {
    computeCores: Math.max(1, performanceCores || availableParallelism()),
    hasDirectLoad: false,
    memory: {
      totalBytes: totalmem(),
      availableBytes: Math.min(totalmem(), reclaimable * pageBytes),
      limitedBy: null,
    },
    devices: [],
    gpuBackends: [],
    profile: null,
  };
}

function outputOf(command: string[]): string {
  const result = Bun.spawnSync(command, { stdout: "pipe", stderr: "ignore" });
  return result.success ? result.stdout.toString() : "";
}

// ---- the processor and the volumes, for who measures them ----------------------------------------------------------

/**
 * The most memory that this process ever held. Not getrusage's figure where the kernel tells: that one begins with what
 * the parent held when it started this process.
 */
export function peakMemoryBytes(read: Read = textOf): number {
  const kilobytes = /^VmHWM:\s+(\d+) kB$/m.exec(read("/proc/self/status") ?? "")?.[1];
  return kilobytes === undefined ? process.resourceUsage().maxRSS * 1024 : Number(kilobytes) * 1024;
}

export interface Processor {
  readonly model: string;
  /** Processors that the system shows this process, hyper-threads included. */
  readonly logicalCores: number;
  /** All last-level caches together; null where the system does not tell. */
  readonly cacheBytes: number | null;
}

export function readProcessor(): Processor {
  const model = cpus()[0]?.model.trim() ?? "";
  return {
    model: /^(unknown)?$/i.test(model) ? `${process.arch} processor` : model,
    logicalCores: availableParallelism(),
    cacheBytes: process.platform === "linux" ? cacheBytesLinux() : null,
  };
}

function cacheBytesLinux(): number | null {
  const lastLevel = new Map<string, number>();
  for (let cpu = 0; existsSync(`/sys/devices/system/cpu/cpu${cpu}`); cpu++) {
    for (let index = 9; index >= 0; index--) {
      const folder = `/sys/devices/system/cpu/cpu${cpu}/cache/index${index}`;
      const [, size, unit] = /^(\d+)([KM])/.exec(textOf(`${folder}/size`) ?? "") ?? [];
      if (size !== undefined) {
        const bytes = Number(size) * (unit === "M" ? 1_048_576 : 1024);
        lastLevel.set(textOf(`${folder}/shared_cpu_list`) ?? String(cpu), bytes);
        break;
      }
    }
  }
  return lastLevel.size === 0 ? null : [...lastLevel.values()].reduce((sum, bytes) => sum + bytes, 0);
}

/** The volume that holds `path`, as `mount` prints it. Throws `not-found`. */
export function volumeOf(path: string): string {
  let real: string;
  try {
    real = realpathSync(path);
  } catch (cause) {
    throw new HypuraError("not-found", `${path} cannot be found: give a file or a folder that exists`, {
      cause,
    });
  }
  return process.platform === "linux"
    ? mountOf(real, textOf("/proc/self/mountinfo") ?? "")
    : (/^(\S+).*?(\/[^\n]*)$/m
        .exec(outputOf(["df", "-P", real]).split("\n")[1] ?? "")
        ?.slice(1, 3)
        .join(" on ") ?? real);
}

/** The last mount with the longest mount point above `path` (proc(5), mountinfo). */
export function mountOf(path: string, mountInfo: string): string {
  let best = { point: "", text: path };
  for (const line of mountInfo.split("\n")) {
    const [before = "", after = ""] = line.split(" - ");
    const point = unescaped(before.split(" ")[4] ?? "");
    const [type, source] = after.split(" ");
    const isAbove =
      point !== "" && (path === point || path.startsWith(point.endsWith("/") ? point : `${point}/`));
    if (isAbove && source !== undefined && point.length >= best.point.length) {
      best = { point, text: `${unescaped(source)} on ${point} (${type})` };
    }
  }
  return best.text;
}

function unescaped(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) =>
    String.fromCharCode(Number.parseInt(digits, 8)),
  );
}

// ---- a machine from a file ----------------------------------------------------------------------------------------

/** The machine that `hypura profile --json` printed somewhere. Throws `usage` with the field that is wrong. */
export function validateMachine(json: unknown): Machine {
  const machine = fieldsOf(json, "");
  const memory = fieldsOf(machine.value("memory"), "memory.");
  const totalBytes = memory.size("totalBytes");
  const availableBytes = memory.size("availableBytes");
  if (availableBytes > totalBytes) {
    throw wrong("memory.availableBytes", `at most memory.totalBytes, which is ${totalBytes}`, availableBytes);
  }
  return {
    computeCores: machine.count("computeCores"),
    hasDirectLoad: machine.flag("hasDirectLoad"),
    memory: { totalBytes, availableBytes, limitedBy: memory.textOrNull("limitedBy") },
    devices: machine.list("devices", deviceOf),
    gpuBackends: machine.texts("gpuBackends"),
    profile: machine.value("profile") === null ? null : validateProfile(machine.value("profile"), "profile."),
  };
}

/** The profile in `json`; `at` is said before the name of the field that is wrong. */
export function validateProfile(json: unknown, at = ""): MachineProfile {
  const profile = fieldsOf(json, at);
  const version = profile.value("version");
  if (version !== profileVersion) {
    throw wrong(`${at}version`, `${profileVersion}, which this version of hypura measures`, version);
  }
  return {
    version,
    fingerprint: profile.text("fingerprint"),
    measuredAt: profile.moment("measuredAt"),
    cpuModel: profile.text("cpuModel"),
    computeThreads: profile.count("computeThreads"),
    copyBytesPerSecond: profile.rate("copyBytesPerSecond"),
    steps: stepsOf(fieldsOf(profile.value("steps"), `${at}steps.`)),
    products: profile.list("products", (product) => ({
      typeName: product.text("typeName"),
      ...rowSpeedsOf(product),
      prefillFlopsPerSecond: product.rate("prefillFlopsPerSecond"),
      repacked: product.value("repacked") === null ? null : repackedOf(product),
    })),
    storage: profile.list("storage", storageOf),
  };
}

function stepsOf(steps: Fields): StepSeconds {
  return { attention: steps.rate("attention"), mixing: steps.rate("mixing"), plain: steps.rate("plain") };
}

function rowSpeedsOf(fields: Fields): RowSpeeds {
  return {
    decodeBytesPerSecond: fields.rate("decodeBytesPerSecond"),
    shortRowBytesPerSecond: fields.rate("shortRowBytesPerSecond"),
  };
}

function repackedOf(product: Fields): RepackedSpeed {
  const repacked = fieldsOf(product.value("repacked"), `${product.at}repacked.`);
  return {
    ...rowSpeedsOf(repacked),
    prefillFlopsPerSecond: repacked.rate("prefillFlopsPerSecond"),
    experts: rowSpeedsOf(fieldsOf(repacked.value("experts"), `${repacked.at}experts.`)),
  };
}

const deviceTypes = ["cpu", "gpu", "igpu", "accel"] as const;

function deviceOf(device: Fields): Device {
  const type = device.text("type");
  const known = deviceTypes.find((one) => one === type);
  if (known === undefined) {
    throw wrong(`${device.at}type`, `one of ${deviceTypes.join(", ")}`, type);
  }
  return {
    name: device.text("name"),
    description: device.text("description"),
    type: known,
    totalBytes: device.size("totalBytes"),
    freeBytes: device.size("freeBytes"),
    isUnified: device.flag("isUnified"),
  };
}

function storageOf(storage: Fields): StorageSpeed {
  const best = fieldsOf(storage.value("best"), `${storage.at}best.`);
  return {
    volume: storage.text("volume"),
    measuredAt: storage.moment("measuredAt"),
    direct: storage.flag("direct"),
    reads: storage.list("reads", (read) => {
      const latency = fieldsOf(read.value("latencySeconds"), `${read.at}latencySeconds.`);
      return {
        readBytes: read.count("readBytes"),
        depth: read.count("depth"),
        bytesPerSecond: read.rate("bytesPerSecond"),
        latencySeconds: { p50: latency.rate("p50"), p99: latency.rate("p99") },
      };
    }),
    bestBytesPerSecond: storage.rate("bestBytesPerSecond"),
    best: { readBytes: best.count("readBytes"), depth: best.count("depth") },
  };
}

/** The fields of one object, each taken with the check that it needs; `at` names the object: "profile.storage[0]." */
interface Fields {
  readonly at: string;
  value(name: string): unknown;
  text(name: string): string;
  textOrNull(name: string): string | null;
  flag(name: string): boolean;
  /** A whole number from 1. */
  count(name: string): number;
  /** A whole number from 0. */
  size(name: string): number;
  /** A number above 0. */
  rate(name: string): number;
  moment(name: string): string;
  texts(name: string): readonly string[];
  list<T>(name: string, read: (fields: Fields) => T): readonly T[];
}

function fieldsOf(json: unknown, at: string): Fields {
  if (typeof json !== "object" || json === null || Array.isArray(json)) {
    throw wrong(at.replace(/\.$/, "") || "it", "an object", json);
  }
  const object = json as Readonly<Record<string, unknown>>;
  const value = (name: string): unknown => {
    if (!Object.hasOwn(object, name)) {
      throw new HypuraError("usage", `the machine lacks the field ${at}${name}: ${remedy}`);
    }
    return object[name];
  };
  const taken = <T>(name: string, wanted: string, isRight: (one: unknown) => boolean): T => {
    const one = value(name);
    if (!isRight(one)) {
      throw wrong(`${at}${name}`, wanted, one);
    }
    return one as T;
  };
  const isText = (one: unknown): boolean => typeof one === "string";
  const isWhole = (one: unknown, least: number): boolean =>
    Number.isSafeInteger(one) && (one as number) >= least;
  return {
    at,
    value,
    text: (name) => taken(name, "a text", isText),
    textOrNull: (name) => taken(name, "a text or null", (one) => one === null || isText(one)),
    flag: (name) => taken(name, "true or false", (one) => typeof one === "boolean"),
    count: (name) => taken(name, "a whole number from 1", (one) => isWhole(one, 1)),
    size: (name) => taken(name, "a whole number of bytes", (one) => isWhole(one, 0)),
    rate: (name) => taken(name, "a number above 0", (one) => Number.isFinite(one) && (one as number) > 0),
    moment: (name) => taken(name, "a date", (one) => isText(one) && !Number.isNaN(Date.parse(one as string))),
    texts: (name) => taken(name, "a list of texts", (one) => Array.isArray(one) && one.every(isText)),
    list: (name, read) =>
      taken<readonly unknown[]>(name, "a list", Array.isArray).map((one, index) =>
        read(fieldsOf(one, `${at}${name}[${index}].`)),
      ),
  };
}

const remedy = "`hypura profile --json` prints a machine with every field";

function wrong(field: string, wanted: string, found: unknown): HypuraError {
  const text = JSON.stringify(found) ?? String(found);
  const shown = text.length > 60 ? `${text.slice(0, 59)}…` : text;
  return new HypuraError("usage", `in the machine, ${field} must be ${wanted}, and is ${shown}: ${remedy}`);
}

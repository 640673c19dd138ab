// What this machine offers: processors that may be used and memory that is free. It owns the questions to the
// system and nothing of what follows from the answers (plan.ts). Inside a control group the group's limit is the
// memory, because the kernel kills at that line whatever the machine has.

import { existsSync, readFileSync } from "node:fs";
import { availableParallelism, totalmem } from "node:os";

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
}

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
    computeCores: Math.max(1, Math.min(availableParallelism(), physicalCoresLinux())),
    hasDirectLoad: true,
    memory: {
      totalBytes: isLimited ? group.limitBytes : total,
      availableBytes: isLimited ? Math.min(available, group.limitBytes - group.usedBytes) : available,
      limitedBy: isLimited ? group.path : null,
    },
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
  for (const line of (textOf("/proc/self/cgroup") ?? "").split("\n")) {
    const [, controllers, path] = line.split(":");
    if (controllers === undefined || path === undefined) {
      continue;
    }
    const isUnified = controllers === "";
    if (!isUnified && !controllers.split(",").includes("memory")) {
      continue;
    }
    for (const folder of groupFolders(isUnified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory", path)) {
      const limit = readLimit(folder, isUnified);
      if (limit !== null && (tightest === null || limit.limitBytes < tightest.limitBytes)) {
        tightest = limit;
      }
    }
  }
  return tightest;
}

function groupFolders(mount: string, path: string): readonly string[] {
  const parts = path.split("/").filter((part) => part !== "");
  return Array.from({ length: parts.length + 1 }, (_, depth) => [mount, ...parts.slice(0, depth)].join("/"));
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

function physicalCoresLinux(): number {
  const cores = new Set<string>();
  for (let cpu = 0; existsSync(`/sys/devices/system/cpu/cpu${cpu}`); cpu++) {
    const siblings = textOf(`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`);
    cores.add(siblings ?? String(cpu));
  }
  return cores.size || availableParallelism();
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
  };
}

function outputOf(command: string[]): string {
  const result = Bun.spawnSync(command, { stdout: "pipe", stderr: "ignore" });
  return result.success ? result.stdout.toString() : "";
}

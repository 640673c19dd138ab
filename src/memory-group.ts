// A control group with a memory limit, for a child that should meet "less memory than the model" on a machine that has
// more. It owns the group's folder from its making to its removal, in version 1 or 2 of the kernel's interface; it
// knows nothing of what runs inside.

import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  rmdirSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { HypuraError } from "./errors";
import { bytesText } from "./text";

export interface MemoryGroup {
  readonly path: string;
  readonly limitBytes: number;
  /** The words of a command that starts the given one inside. */
  wrap(words: readonly string[]): readonly string[];
  /** From here on the peak counts anew, where the kernel can do that. */
  resetPeak(): void;
  /** The most that was charged to the group, page cache included; null where the kernel does not tell. */
  peakBytes(): number | null;
  /** How many processes the kernel has killed in it for want of memory. */
  killCount(): number;
  /** Nothing may run inside. */
  remove(): void;
}

interface Interface {
  readonly limit: string;
  readonly swap: string;
  readonly peak: string;
  readonly events: string;
}

const interfaces: Readonly<Record<"1" | "2", Interface>> = {
  1: {
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
  },
  2: { limit: "memory.max", swap: "memory.swap.max", peak: "memory.peak", events: "memory.events" },
};

/** Makes a group below this process's own, or above where that is not allowed. Throws `usage` with the reasons. */
export function makeMemoryGroup(limitBytes: number): MemoryGroup {
  const reasons: string[] = [];
  for (const { folder, version } of candidates()) {
    const path = join(folder, `hypura-bench-${process.pid}`);
    try {
      mkdirSync(path);
    } catch (error) {
      reasons.push(`${folder} takes no new group (${codeOf(error)})`);
      continue;
    }
    try {
      return openGroup(path, version, limitBytes);
    } catch (error) {
      reasons.push(`${folder} has no memory limit to set (${codeOf(error)})`);
      rmdirSync(path);
    }
  }
  const why = reasons.length === 0 ? "this system has no control groups" : reasons.slice(0, 2).join("; ");
  throw new HypuraError(
    "usage",
    `--memory ${bytesText(limitBytes)} needs a control group, and none can be made: ${why}. ` +
      "Run it as root, or inside a group with that limit (systemd-run --user --scope -p MemoryMax=2G hypura bench ...)",
  );
}

/** Where a group could be made: this process's own memory group first, then its parents. */
function candidates(): readonly { readonly folder: string; readonly version: "1" | "2" }[] {
  const groups = textOf("/proc/self/cgroup") ?? "";
  const found: { folder: string; version: "1" | "2" }[] = [];
  for (const line of groups.split("\n")) {
    const [, controllers, path] = line.split(":");
    const isMemory = controllers?.split(",").includes("memory") === true;
    if (path === undefined || (controllers !== "" && !isMemory)) {
      continue;
    }
    const version = isMemory ? "1" : "2";
    const mounts = isMemory ? ["/sys/fs/cgroup/memory"] : ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    for (const mount of mounts.filter((one) => existsSync(one))) {
      for (let at = path; ; at = dirname(at)) {
        found.push({ folder: join(mount, at), version });
        if (at === "/") {
          break;
        }
      }
    }
  }
  return found;
}

function openGroup(path: string, version: "1" | "2", limitBytes: number): MemoryGroup {
  const names = interfaces[version];
  const file = (name: string): string => join(path, name);
  writeFileSync(file(names.limit), String(limitBytes));
  if (existsSync(file(names.swap))) {
    // Version 1 counts memory and swap together. A limit that swaps would measure the swap.
    writeFileSync(file(names.swap), version === "1" ? String(limitBytes) : "0");
  }
  // Version 2 resets the peak for the descriptor that wrote, and for nobody else: one is kept. Null: read-only there.
  const peak = openOrNull(file(names.peak));
  return {
    path,
    limitBytes,
    wrap: (words) => ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', file("cgroup.procs"), ...words],
    resetPeak() {
      try {
        if (peak !== null) {
          writeSync(peak, "0");
        }
      } catch {
        // Older kernels of version 2 cannot: the peak is then of all runs, which peakBytes() still tells.
      }
    },
    peakBytes() {
      const text = peak === null ? textOf(file(names.peak)) : readStart(peak);
      return text === null ? null : Number(text);
    },
    killCount: () => Number(/^oom_kill (\d+)$/m.exec(textOf(file(names.events)) ?? "")?.[1] ?? 0),
    remove() {
      if (peak !== null) {
        closeSync(peak);
      }
      for (let tries = 0; tries < 50; tries++) {
        try {
          rmdirSync(path);
          return;
        } catch (error) {
          if (codeOf(error) === "ENOENT") {
            return;
          }
          Bun.sleepSync(20); // a process that just ended is still in it
        }
      }
    },
  };
}

function openOrNull(path: string): number | null {
  try {
    return openSync(path, "r+");
  } catch {
    return null; // absent on this kernel, or read-only
  }
}

function readStart(descriptor: number): string {
  const bytes = new Uint8Array(64);
  return new TextDecoder().decode(bytes.subarray(0, readSync(descriptor, bytes, 0, bytes.length, 0)));
}

function textOf(path: string): string | null {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return null; // absent on this kernel
  }
}

function codeOf(error: unknown): string {
  return (error as { readonly code?: string }).code ?? (error as Error).message;
}

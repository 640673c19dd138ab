// What this process holds of the system: descriptors, threads, resident memory; and how to wait until it holds no
// more than before. For tests that look for leaks. Linux counts in /proc; elsewhere nothing is counted.

import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs";

export interface Held {
  readonly descriptors: number;
  readonly threads: number;
}

/** Whether the system says what a process holds. */
export const canCount = existsSync("/proc/self/task");

export function held(): Held {
  if (!canCount) {
    return { descriptors: 0, threads: 0 };
  }
  const { descriptors, threads } = heldBy("self");
  return { descriptors: descriptors - 1, threads }; // the listing itself holds one while it runs
}

/** What a process holds; where `canCount`. */
export function heldBy(id: number | "self"): Held {
  return {
    descriptors: readdirSync(`/proc/${id}/fd`).length,
    threads: readdirSync(`/proc/${id}/task`).length,
  };
}

/** What the descriptors are and the threads are called: for the message of a test that fails. */
export function describeHeld(): string {
  return describeHeldBy("self");
}

export function describeHeldBy(process: number | "self"): string {
  const descriptors = readdirSync(`/proc/${process}/fd`).map((fd) => {
    try {
      return readlinkSync(`/proc/${process}/fd/${fd}`);
    } catch {
      return "gone"; // the descriptor of the listing
    }
  });
  const threads = readdirSync(`/proc/${process}/task`).map((id) => {
    try {
      return readFileSync(`/proc/${process}/task/${id}/comm`, "utf8").trim();
    } catch {
      return "gone"; // it ended since it was listed
    }
  });
  return `descriptors ${descriptors.join(" ")}; threads ${threads.join(" ")}`;
}

/** Resident memory of this process after a collection, from the kernel. */
export function residentBytes(): number {
  Bun.gc(true);
  return canCount ? residentBytesOf("self") : process.memoryUsage().rss;
}

/** Resident memory of a process as it is; where `canCount`. */
export function residentBytesOf(id: number | "self"): number {
  const status = readFileSync(`/proc/${id}/status`, "utf8");
  return Number(/^VmRSS:\s+(\d+) kB/m.exec(status)?.[1]) * 1024;
}

/** Waits until `look` is true, asking again and again; throws what `describe` says after `seconds`. */
export async function until(look: () => boolean, describe: () => string, seconds = 30): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  while (!look()) {
    if (performance.now() > deadline) {
      throw new Error(`waited ${seconds} s in vain: ${describe()}`);
    }
    await Bun.sleep(5);
  }
}

/** Waits until no more is held than `before`: threads end a moment after what they did was seen. */
export function untilHeldAtMost(before: Held): Promise<void> {
  return until(
    () => {
      const now = held();
      return now.descriptors <= before.descriptors && now.threads <= before.threads;
    },
    () => `${JSON.stringify(before)} were held before, now ${JSON.stringify(held())}: ${describeHeld()}`,
  );
}

// Runs CMake for the build, the releases and the checks of other platforms: one configuration, one build with its
// progress, and the compiler's own words when it fails. It knows no target and no option of ours.

import { existsSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";

const isTerminal = process.stderr.isTTY === true;

export function say(step: string): void {
  process.stderr.write(`${isTerminal ? "\r\x1b[K" : ""}${step}\n`);
}

type Environment = Readonly<Record<string, string>>;

const groups = new Set<number>();
const statusOf = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;
let isWatching = false;

/** Each signal that ends us ends the groups first. */
function watchSignals(): void {
  if (isWatching) {
    return;
  }
  isWatching = true;
  for (const [signal, status] of Object.entries(statusOf)) {
    process.once(signal, () => {
      for (const id of groups) {
        try {
          process.kill(-id, "SIGTERM");
        } catch {
          // It ended meanwhile.
        }
      }
      process.exit(status);
    });
  }
}

/**
 * CMake starts what builds, and that the compilers: they are one process group, which ends with us. Otherwise a build whose
 * start was killed goes on, and the next one meets it in the same folder.
 */
function spawnGroup(command: readonly string[], cwd: string, environment: Environment) {
  watchSignals();
  const child = Bun.spawn([...command], {
    cwd,
    env: { ...process.env, ...environment },
    stdout: "pipe",
    stderr: "pipe",
    stdin: "ignore",
    detached: true,
  });
  groups.add(child.pid);
  child.exited.then(() => groups.delete(child.pid));
  return child;
}

/** Runs a command to its end; what it said counts only when it fails. */
export async function runQuietly(
  command: readonly string[],
  cwd: string,
  environment: Environment = {},
): Promise<string> {
  const child = spawnGroup(command, cwd, environment);
  const [out, err, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (status !== 0) {
    throw new Error(`\`${command.join(" ")}\` failed:\n${out}${err}`);
  }
  return out;
}

export interface Configuration {
  readonly source: string;
  readonly folder: string;
  /** What is being made, for people: "libhypura". */
  readonly what: string;
  /** -D options. They are given each time, so that a changed one takes effect. */
  readonly options?: readonly string[];
  readonly environment?: Environment;
}

export async function configure({
  source,
  folder,
  what,
  options = [],
  environment = {},
}: Configuration): Promise<void> {
  const isNew = !existsSync(join(folder, "CMakeCache.txt"));
  if (!isNew && options.length === 0) {
    return; // the build itself sees changed CMake files
  }
  if (isNew) {
    say(`configuring ${what}${Bun.which("ccache") === null ? "" : " (with ccache)"}`);
  }
  const generator = Bun.which("ninja") === null ? "Unix Makefiles" : "Ninja";
  await runQuietly(
    ["cmake", "-S", source, "-B", folder, ...(isNew ? ["-G", generator] : []), ...options],
    source,
    environment,
  );
}

/** Builds targets of a configured folder. Throws with the compiler's words. */
export async function buildTargets(
  { folder, what, environment = {} }: Configuration,
  targets: readonly string[],
): Promise<void> {
  const parallel = String(availableParallelism());
  const command = ["cmake", "--build", folder, "--parallel", parallel, "--target", ...targets];
  const child = spawnGroup(command, folder, environment);
  const [log, err] = await Promise.all([followBuild(child.stdout, what), new Response(child.stderr).text()]);
  if ((await child.exited) !== 0) {
    throw new Error(`${what} did not build:\n${failureOf(log)}${err}`);
  }
}

/** The compiler's words, without the steps that went well. */
function failureOf(log: readonly string[]): string {
  const first = log.findIndex((line) => line.includes("FAILED:") || line.includes("error:"));
  return `${log.slice(Math.max(0, first)).slice(0, 60).join("\n")}\n`;
}

/** Shows ninja's `[3/199] ...` or make's `[ 12%] ...` as a bar on a terminal, every tenth part elsewhere. */
async function followBuild(stream: ReadableStream<Uint8Array>, what: string): Promise<readonly string[]> {
  const log: string[] = [];
  const decoder = new TextDecoder();
  const started = performance.now();
  let rest = "";
  let tenth = 0;
  for await (const chunk of stream) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      log.push(line);
      const ninja = /^\[(\d+)\/(\d+)\]/.exec(line);
      const make = /^\[\s*(\d+)%\]/.exec(line);
      const fraction =
        ninja !== null ? Number(ninja[1]) / Number(ninja[2]) : make !== null ? Number(make[1]) / 100 : null;
      if (fraction === null) {
        continue;
      }
      const seconds = Math.round((performance.now() - started) / 1000);
      if (isTerminal) {
        const filled = Math.round(fraction * 30);
        process.stderr.write(
          `\r\x1b[Kbuilding ${what} [${"#".repeat(filled)}${"-".repeat(30 - filled)}] ${Math.floor(fraction * 100)} %  ${seconds} s`,
        );
      } else if (Math.floor(fraction * 10) > tenth) {
        tenth = Math.floor(fraction * 10);
        process.stderr.write(`building ${what}: ${tenth * 10} % after ${seconds} s\n`);
      }
    }
  }
  if (isTerminal) {
    process.stderr.write("\r\x1b[K");
  }
  return log;
}

// `hypura serve` as a program, for tests: starts it, ends it, and finds its engine.

import { existsSync, readFileSync } from "node:fs";
import { environment, program } from "../cli/program";

interface Facts {
  readonly endpoint: string;
  readonly pid: number;
  readonly models: readonly {
    readonly name: string;
    readonly mode: string;
    readonly contextTokens: number;
    readonly memoryBytes: number;
    readonly predicted: { readonly decodeTokensPerSecond: number | null; readonly basis: string };
  }[];
}

export interface Running {
  readonly child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly facts: Facts;
  readonly stderr: Promise<string>;
}

/** Starts it on a free port and waits until it listens. */
export async function startProgram(
  words: readonly string[],
  env: Readonly<Record<string, string>> = {},
  start: readonly string[] = program,
): Promise<Running> {
  const child = Bun.spawn([...start, "serve", "--port", "0", "--threads", "1", "--json", ...words], {
    env: { ...environment, ...env },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const stderr = new Response(child.stderr).text();
  const reader = child.stdout.getReader();
  const { value } = await reader.read();
  if (value === undefined) {
    throw new Error(`it did not start: ${await stderr}`);
  }
  return { child, facts: JSON.parse(new TextDecoder().decode(value)) as Facts, stderr };
}

/** Ends it and gives what it said. */
export async function endProgram(
  { child, stderr }: Running,
  signal: NodeJS.Signals = "SIGTERM",
): Promise<string> {
  child.kill(signal);
  await child.exited;
  return stderr;
}

/** The processes that this one has started; Linux only. */
export function childrenOf(processId: number): readonly number[] {
  const path = `/proc/${processId}/task/${processId}/children`;
  return existsSync(path) ? readFileSync(path, "utf8").trim().split(" ").filter(Boolean).map(Number) : [];
}

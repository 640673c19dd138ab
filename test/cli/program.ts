// The real program for tests: runs `hypura` as a user does and gives what came out. Owns which program that is
// (dist/hypura where it was built, else the source by this Bun), its scratch folder, and small models for it.

import { afterAll } from "bun:test";
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openModelFile, readMetadataArray } from "../../src/modelfile";
import { makeFixture } from "../fixtures";
import { FetchError, fetchSmolLm2 } from "../fixtures/smollm2";

export const root = join(import.meta.dir, "..", "..");
const executable = process.env["HYPURA_PROGRAM"] ?? join(root, "dist", "hypura");

/** The words that start hypura. */
export const program: readonly string[] = existsSync(executable)
  ? [executable]
  : [process.execPath, join(root, "src", "main.ts")];

/** Where the program finds its library and unpacks it; nothing of it outside the tree. */
export const environment: Readonly<Record<string, string | undefined>> = {
  ...process.env,
  HYPURA_CACHE: process.env["HYPURA_CACHE"] ?? join(root, "build", "test-cache"),
};

export interface Outcome {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly stdin?: string | Uint8Array;
  /** stdin gives nothing and never ends. */
  readonly keepStdinOpen?: boolean;
  readonly env?: Readonly<Record<string, string>>;
}

/** Runs hypura to its end. */
export async function hypura(args: readonly string[], options: RunOptions = {}): Promise<Outcome> {
  const child = Bun.spawn([...program, ...args], {
    env: { ...environment, ...options.env },
    stdin: options.keepStdinOpen === true ? "pipe" : new Blob([options.stdin ?? ""]),
    stdout: "pipe",
    stderr: "pipe",
  });
  return outcomeOf(child);
}

/** Both streams and the status of a program, once it has ended. */
export async function outcomeOf(child: Bun.Subprocess<Bun.Spawn.Writable, "pipe", "pipe">): Promise<Outcome> {
  const [stdout, stderr, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { status, stdout, stderr };
}

/** A folder of this test file's own, removed after its tests. */
export function scratchFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "hypura-test-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A small dense model in `folder` that answers at once, with noise. */
export async function tinyModel(folder: string): Promise<string> {
  const [path = ""] = await makeFixture("tiny-llama", join(folder, "tiny.gguf"));
  return path;
}

/**
 * A small model that never ends an answer at temperature 0: the output rows of its control tokens are zero, and of
 * hundreds of random logits some are above zero.
 */
export async function endlessModel(folder: string): Promise<string> {
  const [path = ""] = await makeFixture("tiny-llama", join(folder, "endless.gguf"), { context: 65_536 });
  const file = openModelFile(path);
  const output = file.model.tensors.find((tensor) => tensor.name === "output.weight");
  const types = readMetadataArray(file, "tokenizer.ggml.token_type");
  if (output === undefined || types === null) {
    throw new Error("the fixture is not what this helper was written for");
  }
  const rowBytes = output.sizeBytes / (output.shape[1] as number);
  const descriptor = openSync(path, "r+");
  for (const [token, type] of types.entries()) {
    if (type === controlToken) {
      writeSync(descriptor, new Uint8Array(rowBytes), 0, rowBytes, output.offsetBytes + token * rowBytes);
    }
  }
  closeSync(descriptor);
  return path;
}

/** LLAMA_TOKEN_TYPE_CONTROL. */
const controlToken = 3;

/** SmolLM2, or null (said loudly) where no registry can be reached. */
export async function smolLm2(): Promise<string | null> {
  try {
    return await fetchSmolLm2(join(root, "build", "models"));
  } catch (error) {
    if (error instanceof FetchError && (error.code === "unreachable" || error.code === "missing-tool")) {
      console.error(`!!! SKIPPED: SmolLM2 is not here: ${error.message}`);
      return null;
    }
    throw error;
  }
}

/** Waits until `look` gives something, asking again and again; fails with what `describe` says. */
export async function eventually<Value>(
  look: () => Value | undefined | Promise<Value | undefined>,
  describe: () => string | Promise<string>,
  seconds = 30,
): Promise<Value> {
  const deadline = performance.now() + seconds * 1000;
  while (performance.now() < deadline) {
    const value = await look();
    if (value !== undefined) {
      return value;
    }
    await Bun.sleep(25);
  }
  throw new Error(`waited ${seconds} s in vain: ${await describe()}`);
}

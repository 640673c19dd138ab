// What hypura keeps between runs: small JSON documents in one folder (~/.hypura, or HYPURA_HOME). It owns where that is
// and that a document is whole or absent, whoever else writes it; nothing of what the documents mean.

import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { HypuraError } from "./errors";

/** "/" for a user that the system knows no home of, as in a container that runs with any user's number. */
export function userHome(): string {
  try {
    return homedir();
  } catch {
    return "/"; // no HOME, and no entry in the list of users
  }
}

export function stateFolder(): string {
  const named = process.env["HYPURA_HOME"];
  return named === undefined || named === "" ? join(userHome(), ".hypura") : named;
}

/** The document's text; null where there is none. Throws `io` where it cannot be read. */
export function readState(name: string): string | null {
  const path = join(stateFolder(), name);
  try {
    return readFileSync(path, "utf8");
  } catch (cause) {
    if ((cause as { readonly code?: string }).code === "ENOENT") {
      return null;
    }
    throw new HypuraError("io", `${path} cannot be read (${(cause as Error).message})`, { cause });
  }
}

/** Names of the documents that begin so, the youngest first. */
export function listState(prefix: string): readonly { readonly name: string; readonly modifiedMs: number }[] {
  let names: readonly string[];
  try {
    names = readdirSync(stateFolder());
  } catch {
    return []; // there is no folder yet
  }
  return names
    .filter((name) => name.startsWith(prefix) && name.endsWith(".json"))
    .map((name) => ({
      name,
      modifiedMs: statSync(join(stateFolder(), name), { throwIfNoEntry: false })?.mtimeMs ?? 0,
    }))
    .toSorted((one, other) => other.modifiedMs - one.modifiedMs);
}

export function removeState(name: string): void {
  rmSync(join(stateFolder(), name), { force: true });
}

/** Replaces the document at once: a reader sees the old one or the new one. Throws `io`. */
export function writeState(name: string, text: string): void {
  const path = join(stateFolder(), name);
  const temporary = `${path}.${process.pid}.tmp`;
  const bytes = Buffer.from(text);
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    const descriptor = openSync(temporary, "w", 0o600);
    try {
      // A write may end short without an error (a disk that is almost full): the next one tells why.
      for (let at = 0; at < bytes.length; ) {
        at += writeSync(descriptor, bytes, at);
      }
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
    renameSync(temporary, path);
  } catch (cause) {
    rmSync(temporary, { force: true });
    throw new HypuraError(
      "io",
      `${path} cannot be written (${(cause as Error).message}): set HYPURA_HOME to a folder that can`,
      { cause },
    );
  }
}

// A path -> an opened, described model. It owns the file system's side of a model: finding the other files of a
// split set, saying in one sentence why a path is no model, reading headers in bounded pieces. It knows nothing
// of the format (gguf.ts) or its meaning (model.ts), and never holds a descriptor after it returns.

import { closeSync, existsSync, fstatSync, openSync, readdirSync, readSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { HypuraError } from "./errors";
import { type ByteSource, type Gguf, type GgufScalar, parseGguf, readArray, splitNames } from "./gguf";
import { describeModel, type Model } from "./model";

export interface ModelFile {
  /** As given, or the first file of the set where another of its files was given. */
  readonly path: string;
  readonly files: readonly { readonly path: string; readonly sizeBytes: number }[];
  readonly gguf: Gguf;
  readonly model: Model;
}

/** No read asks for more at once: the format reader asks for windows far below this. */
const maxReadBytes = 1_048_576;

interface OpenFile {
  readonly path: string;
  readonly descriptor: number;
  readonly sizeBytes: number;
}

function errnoOf(cause: unknown): string {
  return cause instanceof Error && "code" in cause && typeof cause.code === "string" ? cause.code : "";
}

function show(path: string): string {
  return JSON.stringify(path);
}

/** The sentence for a path that the system will not open or read. */
function systemError(path: string, cause: unknown): HypuraError {
  switch (errnoOf(cause)) {
    case "ENOENT":
    case "ENOTDIR":
      return new HypuraError("not-found", `there is no file ${show(path)}${suggestion(path)}`, { cause });
    case "EACCES":
    case "EPERM":
      return new HypuraError(
        "io",
        `${show(path)} may not be read by this user: change its permissions (chmod +r)`,
        { cause },
      );
    case "ELOOP":
      return new HypuraError(
        "io",
        `${show(path)} is a symbolic link that leads back to itself: mend the link`,
        { cause },
      );
    case "EMFILE":
    case "ENFILE":
      return new HypuraError(
        "io",
        `${show(path)} cannot be opened, too many files are open: raise the limit (ulimit -n)`,
        { cause },
      );
    default: {
      const reason = cause instanceof Error ? cause.message : String(cause);
      return new HypuraError("io", `${show(path)} cannot be read (${reason}): check the disk and try again`, {
        cause,
      });
    }
  }
}

/** The .gguf files of a folder, in order; an empty list where it cannot be listed. */
function ggufNames(folder: string): string[] {
  try {
    return readdirSync(folder)
      .filter((name) => name.toLowerCase().endsWith(".gguf"))
      .sort();
  } catch (cause) {
    // The list only improves a sentence; the error it belongs to is reported either way.
    if (errnoOf(cause) === "") throw cause;
    return [];
  }
}

function listNames(names: readonly string[]): string {
  const shown = names.slice(0, 3).map(show).join(", ");
  return names.length > 3 ? `${shown} and ${names.length - 3} more` : shown;
}

function suggestion(path: string): string {
  const names = ggufNames(dirname(path));
  if (names.length === 0) return ": check the path";
  return `: check the path (in that folder there ${names.length === 1 ? "is" : "are"} ${listNames(names)})`;
}

function directoryError(path: string): HypuraError {
  const names = ggufNames(path);
  const first = names[0];
  const sentence =
    first === undefined
      ? `${show(path)} is a folder without any .gguf file: give the path of a model file`
      : `${show(path)} is a folder: give one of its files, ${listNames(names)}`;
  return new HypuraError("usage", sentence);
}

function openFile(path: string): OpenFile {
  let descriptor: number;
  try {
    // The kind is checked first: opening a pipe would wait for its writer.
    const kind = statSync(path);
    if (kind.isDirectory()) throw directoryError(path);
    if (!kind.isFile()) {
      throw new HypuraError(
        "not-a-model",
        `${show(path)} is a device, pipe or socket, not a file: give the path of a .gguf file`,
      );
    }
    descriptor = openSync(path, "r");
  } catch (cause) {
    throw cause instanceof HypuraError ? cause : systemError(path, cause);
  }
  try {
    return { path, descriptor, sizeBytes: fstatSync(descriptor).size };
  } catch (cause) {
    closeSync(descriptor);
    throw systemError(path, cause);
  }
}

function sourceOf(file: OpenFile): ByteSource {
  return {
    sizeBytes: file.sizeBytes,
    read(offsetBytes, lengthBytes) {
      const buffer = new Uint8Array(Math.max(0, Math.min(lengthBytes, file.sizeBytes - offsetBytes)));
      let done = 0;
      while (done < buffer.length) {
        let count: number;
        try {
          count = readSync(
            file.descriptor,
            buffer,
            done,
            Math.min(maxReadBytes, buffer.length - done),
            offsetBytes + done,
          );
        } catch (cause) {
          throw systemError(file.path, cause);
        }
        if (count === 0) break;
        done += count;
      }
      return buffer.subarray(0, done);
    },
  };
}

/** Runs `use` with all files open, and closes them whatever happens. */
function withFiles<Result>(paths: readonly string[], use: (files: readonly OpenFile[]) => Result): Result {
  const files: OpenFile[] = [];
  try {
    for (const path of paths) files.push(openFile(path));
    return use(files);
  } finally {
    for (const file of files) closeSync(file.descriptor);
  }
}

/** All files of the set that `path` belongs to, in order; the missing ones in an error. */
function setPaths(path: string): readonly string[] {
  const split = splitNames(basename(path));
  // A name that merely looks like one of a set, alone: the header decides (parseGguf).
  if (split === null || !existsSync(path)) return [path];
  const folder = dirname(path);
  const paths = split.names.map((name) => (name === basename(path) ? path : join(folder, name)));
  const missing = paths.filter((one) => !existsSync(one)).map((one) => basename(one));
  if (missing.length === 0) return paths;
  throw new HypuraError(
    "not-found",
    `${show(path)} is one of ${split.count} files of a split model, and ${listNames(missing)} ` +
      `${missing.length === 1 ? "is" : "are"} missing beside it: put all files in one folder`,
  );
}

/** Opens, checks and describes the model at `path`: a file, or any file of a split set. */
export function openModelFile(path: string): ModelFile {
  if (path === "")
    throw new HypuraError("usage", "the path of the model is empty: give the path of a .gguf file");
  return withFiles(setPaths(path), (files) => {
    const gguf = parseGguf(files.map((file) => ({ name: file.path, source: sourceOf(file) })));
    return {
      path: files[0]?.path ?? path,
      files: files.map((file) => ({ path: file.path, sizeBytes: file.sizeBytes })),
      gguf,
      model: describeModel(gguf),
    };
  });
}

/** What one file holds, whatever it is of. */
export function openGguf(path: string): { readonly gguf: Gguf; readonly sizeBytes: number } {
  return withFiles([path], (files) => ({
    gguf: parseGguf(files.map((file) => ({ name: file.path, source: sourceOf(file) }))),
    sizeBytes: files[0]?.sizeBytes ?? 0,
  }));
}

/** The values of a metadata array too long to be kept (the vocabulary, its merges); null for any other key. */
export function readMetadataArray(file: ModelFile, key: string): readonly GgufScalar[] | null {
  const value = file.gguf.metadata.get(key);
  if (typeof value !== "object") return null;
  if (value.values !== null) return value.values;
  const path = file.files[value.fileIndex]?.path;
  if (path === undefined) throw new HypuraError("internal", `the array ${show(key)} belongs to no open file`);
  return withFiles([path], (files) =>
    files.flatMap((open) => readArray(value, { name: open.path, source: sourceOf(open) })),
  );
}

// Where libhypura comes from: a file that a person named, the build's own, one beside the executable, or one that the
// executable carries, unpacked into a folder that only its user can change. It owns which of the carried libraries suits
// the processor, and that what is loaded is whole; it loads nothing itself (native.ts), and knows no function of it.
//
// Bun can load a carried library by itself, but unpacks to TMPDIR only, and takes a damaged copy of the right size as it
// is. Here each copy is hashed before it is used, written beside its place and renamed into it, so that many first starts
// at once leave one whole file; a folder that is full, read-only, missing or mounted noexec is passed over.

import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { HypuraError } from "../src/errors";
import { userHome } from "../src/state";
import { type EmbeddedLibrary, hashOf, libraryName } from "./library";
import { processorFeatures } from "./processor";
import { bestFor } from "./targets";

export interface Candidate {
  readonly path: string;
  /** Of the CPU kernels, as targets.ts names it; "native" for this machine's own build, null where a file was named. */
  readonly variant: string | null;
}

export interface Sources {
  /** What the executable carries, best first; null where hypura runs from its sources. */
  readonly embedded: readonly EmbeddedLibrary[] | null;
  /** A file that is in memory only, for machines where no folder will do; null where the system has no such thing. */
  readonly openMemoryFile: () => { readonly descriptor: number; readonly close: () => void } | null;
}

/** What to load, best first. What fails on the way is noted in `tried`. Throws HypuraError where nothing can suit. */
export function* candidates({ embedded, openMemoryFile }: Sources, tried: string[]): Generator<Candidate> {
  const named = process.env["HYPURA_LIB"];
  if (named !== undefined && named !== "") {
    yield { path: resolve(named), variant: null }; // what a person names is used or refused, never replaced
    return;
  }
  if (embedded === null) {
    yield { path: join(import.meta.dir, "..", "build", "native", libraryName), variant: "native" };
    return;
  }
  const beside = join(dirname(process.execPath), libraryName);
  if (existsSync(beside)) {
    yield { path: beside, variant: null };
  }
  const library = suitable(embedded, processorFeatures(), process.env["HYPURA_CPU"] ?? "");
  for (const root of cacheRoots()) {
    let path: string;
    try {
      path = unpack(library, root);
    } catch (error) {
      tried.push(`${root.folder}: ${(error as Error).message}`);
      continue;
    }
    yield { path, variant: library.variant };
  }
  yield* inMemory(library, openMemoryFile, tried);
}

function* inMemory(
  library: EmbeddedLibrary,
  openMemoryFile: Sources["openMemoryFile"],
  tried: string[],
): Generator<Candidate> {
  let memory: ReturnType<Sources["openMemoryFile"]> = null;
  try {
    memory = openMemoryFile();
    if (memory !== null) {
      const bytes = bytesOf(library);
      for (let at = 0; at < bytes.length; ) {
        at += writeSync(memory.descriptor, bytes, at);
      }
      yield { path: `/proc/self/fd/${memory.descriptor}`, variant: library.variant };
    }
  } catch (error) {
    tried.push(`a file in memory: ${(error as Error).message}`);
  } finally {
    memory?.close();
  }
}

/** The library for a processor; `wanted` names one instead. Throws HypuraError. */
export function suitable(
  libraries: readonly EmbeddedLibrary[],
  features: ReadonlySet<string> | null,
  wanted: string,
): EmbeddedLibrary {
  const least = libraries.at(-1) as EmbeddedLibrary;
  if (wanted !== "") {
    const named = libraries.find(({ variant }) => variant === wanted);
    if (named === undefined) {
      const names = libraries.map(({ variant }) => variant).join(", ");
      throw new HypuraError("usage", `HYPURA_CPU=${wanted}: this hypura carries ${names}`);
    }
    const missing = named.needs.filter((one) => features !== null && !features.has(one));
    if (missing.length > 0) {
      throw new HypuraError("usage", `HYPURA_CPU=${wanted}: this processor has no ${missing.join(", ")}`);
    }
    return named;
  }
  if (features === null) {
    return least; // the system does not tell (no /proc): what the release is for at the least
  }
  const best = bestFor(libraries, features);
  if (best === null) {
    const missing = least.needs.filter((one) => !features.has(one));
    throw new HypuraError(
      "engine",
      `this release needs a processor with ${missing.join(", ")}, which this one has not: build hypura on it from the sources`,
    );
  }
  return best;
}

// ---- unpacking --------------------------------------------------------------------------------------------------------

interface CacheRoot {
  readonly folder: string;
  /** The folder in it that is this user's and hypura's. */
  readonly own: string;
  /** Made if it is not there; a temporary folder that somebody named wrongly is not. */
  readonly canBeMade: boolean;
}

function cacheRoots(): readonly CacheRoot[] {
  const shared = `hypura-${process.getuid?.() ?? 0}`; // two users of one folder do not meet
  const home = userHome();
  const caches = process.platform === "darwin" ? ["Library", "Caches"] : [".cache"];
  const roots: readonly CacheRoot[] = [
    { folder: process.env["HYPURA_CACHE"] ?? "", own: shared, canBeMade: true },
    { folder: process.env["XDG_CACHE_HOME"] ?? "", own: "hypura", canBeMade: true },
    { folder: home === "/" ? "" : join(home, ...caches), own: "hypura", canBeMade: true },
    { folder: tmpdir(), own: shared, canBeMade: false },
    { folder: "/tmp", own: shared, canBeMade: false },
  ];
  const named = roots
    .filter(({ folder }) => folder !== "")
    .map((root) => ({ ...root, folder: resolve(root.folder) }));
  return named.filter((root, index) => named.findIndex(({ folder }) => folder === root.folder) === index);
}

/** The library in a folder named by its hash; written there unless a sound copy of our own is. */
function unpack(library: EmbeddedLibrary, root: CacheRoot): string {
  const ours = join(root.folder, root.own);
  const folder = join(ours, `lib-${library.hash}`);
  const file = join(folder, libraryName);
  if (root.canBeMade) {
    mkdirSync(root.folder, { recursive: true, mode: 0o700 });
  }
  makeOwnFolder(ours);
  makeOwnFolder(folder);
  if (!isIntact(file, library)) {
    const temporary = `${file}.${process.pid}.${performance.now()}`;
    try {
      writeFileSync(temporary, bytesOf(library), { mode: 0o500, flag: "wx" });
      chmodSync(temporary, 0o500); // whatever the umask took
      renameSync(temporary, file);
    } catch (error) {
      rmSync(temporary, { force: true });
      throw error;
    }
    removeOld(ours, folder);
  }
  return file;
}

/** A folder that others can write is one where they can put another library after it was looked at. */
function makeOwnFolder(path: string): void {
  try {
    mkdirSync(path, { mode: 0o700 });
  } catch (error) {
    if ((error as { readonly code?: string }).code !== "EEXIST") {
      throw error;
    }
  }
  const stat = lstatSync(path);
  if (!stat.isDirectory() || stat.uid !== process.getuid?.() || (stat.mode & 0o022) !== 0) {
    throw new Error(`${path} is not a folder that this user alone can write`);
  }
}

function isIntact(file: string, { sizeBytes, hash }: EmbeddedLibrary): boolean {
  const stat = lstatSync(file, { throwIfNoEntry: false });
  if (stat === undefined || !stat.isFile() || stat.size !== sizeBytes) {
    return false;
  }
  if (stat.uid !== process.getuid?.() || (stat.mode & 0o022) !== 0) {
    return false; // another user could have written it
  }
  return hashOf(readFileSync(file)) === hash;
}

function bytesOf(library: EmbeddedLibrary): Uint8Array {
  const bytes = Bun.zstdDecompressSync(readFileSync(library.path));
  if (bytes.byteLength !== library.sizeBytes || hashOf(bytes) !== library.hash) {
    throw new Error(`the executable ${process.execPath} is damaged: install it again`);
  }
  return bytes;
}

/** Longer than any version stays in use without a start, and than any unpacking takes. */
const oldMs = 60 * 24 * 3600 * 1000;

/** Removes the libraries of versions long gone and what killed starts left: best effort, it is a cache. */
function removeOld(ours: string, current: string): void {
  try {
    for (const name of readdirSync(ours)) {
      const folder = join(ours, name);
      const isOld = Date.now() - statSync(folder).mtimeMs > oldMs;
      if (name.startsWith("lib-") && folder !== current && isOld) {
        rmSync(folder, { recursive: true, force: true });
      }
    }
    for (const name of readdirSync(current)) {
      const file = join(current, name);
      const stat = statSync(file, { throwIfNoEntry: false });
      if (name !== libraryName && stat !== undefined && Date.now() - stat.mtimeMs > 3_600_000) {
        rmSync(file, { force: true });
      }
    }
  } catch {
    // another start removes at the same time, or may not: nothing depends on it
  }
}

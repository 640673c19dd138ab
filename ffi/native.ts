// The only file that imports bun:ffi: finds libhypura, loads it on first use, and gives each function of
// hypura.h a typed face. It knows nothing of plans or events. Every call returns at once.

import { CString, dlopen, type Pointer } from "bun:ffi";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { homedir, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { HypuraError } from "../src/errors";
import { hashOf, libraryName } from "./library";

/** HY_ABI_VERSION that this file is written for. */
const abiVersion = 1;

const symbols = {
  hy_abi_version: { args: [], returns: "i32" },
  hy_build_info: { args: [], returns: "ptr" },
  hy_open: { args: ["buffer", "u64", "buffer"], returns: "i64" },
  hy_request: { args: ["i64", "buffer", "buffer", "u64"], returns: "i32" },
  hy_task: { args: ["buffer", "buffer", "u64"], returns: "i32" },
  hy_close: { args: ["i64"], returns: "i32" },
  hy_active_requests: { args: ["i64"], returns: "i32" },
} as const;

/** HY_E_* as sentences. */
const codeSentences: Readonly<Record<number, string>> = {
  [-1]: "the engine was given a document that it cannot read; hypura and its library are of different versions",
  [-2]: "the engine is closed",
  [-3]: "no file descriptor is left for the engine: raise the limit (ulimit -n) or send fewer requests at once",
  [-4]: "too many models are open in this process: close one",
  [-5]: "the system has no thread left for the engine: raise the limit (ulimit -u) or send fewer requests at once",
  [-6]: "the engine failed for a reason that it did not expect",
};

export type EngineId = bigint;

export interface NativeLibrary {
  readonly path: string;
  /** Facts about the build: llama.cpp's version, and the CPU features compiled in. */
  buildInfo(): { readonly llama: string; readonly build: string; readonly system: string };
  /** Starts to load; the descriptor is the caller's to read and to close. */
  open(planJson: string): { readonly engine: EngineId; readonly fd: number };
  /** Starts a request and returns its descriptor, the caller's to read and to close. */
  request(engine: EngineId, route: string, bodyJson: string): number;
  /** Starts a task (the table is in ffi/native/tasks.cpp) and returns its descriptor, the caller's to read and to close. */
  task(name: string, json: string): number;
  close(engine: EngineId): void;
  activeRequests(engine: EngineId): number;
}

interface EmbeddedLibrary {
  /** Where Bun shows the bytes inside the executable. */
  readonly path: string;
  readonly sizeBytes: number;
  /** hashOf the bytes. */
  readonly hash: string;
}

let embedded: EmbeddedLibrary | undefined;
let loaded: NativeLibrary | undefined;

/** Told by the compiled executable's entry, which carries the library. */
export function embedLibrary(library: EmbeddedLibrary): void {
  embedded = library;
}

/** The library, loaded on first use. */
export function nativeLibrary(): NativeLibrary {
  loaded ??= load();
  return loaded;
}

function load(): NativeLibrary {
  const tried: string[] = [];
  for (const candidate of candidates(tried)) {
    try {
      return bind(candidate, dlopen(candidate, symbols).symbols);
    } catch (error) {
      tried.push(`${candidate}: ${(error as Error).message}`);
    }
  }
  const hint =
    embedded === undefined
      ? "build it with `bun run native`"
      : "set HYPURA_CACHE to a folder that allows execution";
  throw new HypuraError(
    "internal",
    `${libraryName} could not be loaded; ${hint}. Tried:\n  ${tried.join("\n  ")}`,
  );
}

/** Places to load from, best first. What fails on the way is noted in `tried`. */
function* candidates(tried: string[]): Generator<string> {
  const override = process.env["HYPURA_LIB"];
  if (override !== undefined && override !== "") {
    yield override; // what a person names is used or refused, never replaced
    return;
  }
  if (embedded === undefined) {
    yield join(import.meta.dir, "..", "build", "native", libraryName);
    return;
  }
  const beside = join(dirname(process.execPath), libraryName);
  if (existsSync(beside)) {
    yield beside;
  }
  for (const root of cacheRoots()) {
    try {
      yield extract(embedded, root);
    } catch (error) {
      tried.push(`${root}: ${(error as Error).message}`);
    }
  }
}

function cacheRoots(): readonly string[] {
  const home = homedir();
  const roots = [
    process.env["HYPURA_CACHE"],
    process.env["XDG_CACHE_HOME"],
    process.platform === "darwin" ? join(home, "Library", "Caches") : join(home, ".cache"),
    tmpdir(),
  ];
  return roots.filter((root) => root !== undefined && root !== "" && root !== "/") as string[];
}

/** Writes the library into a folder named by its hash, unless a sound copy of our own is there. */
function extract(library: EmbeddedLibrary, root: string): string {
  const folder = join(root, "hypura", `lib-${library.hash}`);
  const file = join(folder, libraryName);
  if (!isIntact(file, library)) {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    const temporary = `${file}.${process.pid}`;
    try {
      writeFileSync(temporary, readFileSync(library.path), { mode: 0o500 });
      chmodSync(temporary, 0o500);
      renameSync(temporary, file);
    } catch (error) {
      rmSync(temporary, { force: true });
      throw error;
    }
  }
  return file;
}

function isIntact(file: string, library: EmbeddedLibrary): boolean {
  const stat = lstatSync(file, { throwIfNoEntry: false });
  if (stat === undefined || !stat.isFile() || stat.size !== library.sizeBytes) {
    return false;
  }
  if (stat.uid !== process.getuid?.() || (stat.mode & 0o022) !== 0) {
    return false; // another user could have written it
  }
  return hashOf(readFileSync(file)) === library.hash;
}

type Bound = ReturnType<typeof dlopen<typeof symbols>>["symbols"];

function bind(path: string, native: Bound): NativeLibrary {
  const version = native.hy_abi_version();
  if (version !== abiVersion) {
    throw new Error(`its interface is version ${version}, this hypura needs ${abiVersion}`);
  }
  return {
    path,
    buildInfo: () => JSON.parse(new CString(native.hy_build_info() as Pointer).toString()),
    open(planJson) {
      const plan = new TextEncoder().encode(planJson);
      const fd = new Int32Array(1);
      const engine = BigInt(native.hy_open(plan, BigInt(plan.byteLength), fd));
      check(Number(engine));
      return { engine, fd: fd[0] as number };
    },
    request(engine, route, bodyJson) {
      const body = new TextEncoder().encode(bodyJson);
      return check(native.hy_request(engine, zeroEnded(route), body, BigInt(body.byteLength)));
    },
    task(name, json) {
      const bytes = new TextEncoder().encode(json);
      return check(native.hy_task(zeroEnded(name), bytes, BigInt(bytes.byteLength)));
    },
    close: (engine) => void native.hy_close(engine),
    activeRequests: (engine) => native.hy_active_requests(engine),
  };
}

function zeroEnded(text: string): Uint8Array {
  return new TextEncoder().encode(`${text}\0`);
}

function check(result: number): number {
  if (result < 0) {
    throw new HypuraError("engine", codeSentences[result] ?? `the engine gave the unknown code ${result}`);
  }
  return result;
}

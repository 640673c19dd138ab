// The only file that imports bun:ffi: finds libhypura, loads it on first use, and gives each function of
// hypura.h a typed face. It knows nothing of plans or events. Every call returns at once.

import { CString, dlopen, type Pointer } from "bun:ffi";
import { closeSync } from "node:fs";
import { HypuraError } from "../src/errors";
import { type EmbeddedLibrary, libraryName } from "./library";
import { candidates, suitable } from "./loader";
import { processorFeatures } from "./processor";

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
  /** Of the CPU kernels: targets.ts's name, "native" for this machine's own build, null where a person named the file. */
  readonly variant: string | null;
  /** What was passed over before it, as sentences. */
  readonly tried: readonly string[];
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

let embedded: readonly EmbeddedLibrary[] | null = null;
let loaded: NativeLibrary | undefined;

/** Told by the compiled executable's entry, which carries the libraries, best first. */
export function embedLibraries(libraries: readonly EmbeddedLibrary[]): void {
  embedded = libraries;
}

/** The library, loaded on first use. */
export function nativeLibrary(): NativeLibrary {
  loaded ??= load();
  return loaded;
}

function load(): NativeLibrary {
  const tried: string[] = [];
  for (const { path, variant } of candidates({ embedded, openMemoryFile }, tried)) {
    try {
      return bind({ path, variant, tried }, dlopen(path, symbols).symbols);
    } catch (error) {
      tried.push(`${path}: ${(error as Error).message}`);
    }
  }
  const hint =
    embedded === null
      ? "build it with `bun run native`"
      : "set HYPURA_CACHE to a folder with room that allows execution";
  throw new HypuraError(
    "internal",
    `${libraryName} could not be loaded: ${hint}. Tried: ${tried.join("; ")}`,
  );
}

/** The best of the libraries that the executable carries, for this processor; null where it carries none. */
export function bestVariant(): string | null {
  return embedded === null ? null : suitable(embedded, processorFeatures(), "").variant;
}

/** memfd_create(2): executable wherever files are not. */
function openMemoryFile(): { readonly descriptor: number; readonly close: () => void } | null {
  if (process.platform !== "linux") {
    return null;
  }
  const closeOnExec = 1; // MFD_CLOEXEC
  const c = dlopen("libc.so.6", { memfd_create: { args: ["buffer", "u32"], returns: "i32" } });
  const descriptor = c.symbols.memfd_create(zeroEnded(libraryName), closeOnExec);
  return descriptor < 0 ? null : { descriptor, close: () => closeSync(descriptor) };
}

type Bound = ReturnType<typeof dlopen<typeof symbols>>["symbols"];

function bind(origin: Pick<NativeLibrary, "path" | "variant" | "tried">, native: Bound): NativeLibrary {
  const version = native.hy_abi_version();
  if (version !== abiVersion) {
    throw new Error(`its interface is version ${version}, this hypura needs ${abiVersion}`);
  }
  return {
    ...origin,
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

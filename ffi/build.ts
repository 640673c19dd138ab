// From a fresh clone to dist/hypura: npm packages, llama.cpp's source, libhypura by CMake, one executable by Bun.
// Each step is skipped or cheap when nothing has changed, and each missing tool is one sentence that says what to
// install. It runs before any npm package is there, so it imports none.
//
//   bun ffi/build.ts [--native-only] [--reference] [--cuda]
//     --native-only   stop after libhypura
//     --reference     also llama-completion and llama-server, which the tests compare with
//     --cuda          with llama.cpp's CUDA backend, for the NVIDIA GPUs of this machine or those in CUDAARCHS (needs
//                     the CUDA toolkit; cuda.ts)

import { existsSync, readFileSync, statfsSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { unpackLlama } from "../vendor/unpack";
import { buildTargets, configure, runQuietly, say } from "./cmake";
import { cudaOptions } from "./cuda";
import { makeExecutable } from "./executable";
import { libraryName } from "./library";

const root = join(import.meta.dir, "..");
const nativeFolder = join(root, "build", "native");
const library = join(nativeFolder, libraryName);
const executable = join(root, "dist", "hypura");

/** Sources, objects and the executable of a full build take 0.9 GB (measured, Release, with the references). */
const neededDiskBytes = 1_500_000_000;

/** Fixed in bun.md's measurements: older Buns crash in bun:ffi or load a foreign bunfig.toml. */
const oldestBun = "1.4.4";

export interface BuildOptions {
  readonly nativeOnly?: boolean;
  readonly reference?: boolean;
  readonly cuda?: boolean;
}

/** Builds what the options ask for. Throws Error with a sentence for people. */
export async function build(options: BuildOptions = {}): Promise<void> {
  checkTools();
  await installPackages();
  await unpackLlama(say);
  await buildNative(options);
  if (options.nativeOnly !== true) {
    await compileExecutable();
  }
}

/** Throws with what is missing and how to get it. */
export function checkTools(): void {
  if (Bun.semver.order(Bun.version, oldestBun) < 0) {
    throw new Error(
      `Bun ${Bun.version} is too old, hypura needs ${oldestBun}: run it as npx --yes bun@${oldestBun} run ...`,
    );
  }
  const mac = process.platform === "darwin";
  if (Bun.which("cmake") === null) {
    throw new Error(
      `cmake is missing: install it (${mac ? "brew install cmake" : "Debian: apt install cmake"}; or pip install cmake)`,
    );
  }
  const compiler = process.env["CXX"] ?? "c++";
  if (Bun.which(compiler) === null) {
    throw new Error(
      `the C++ compiler ${compiler} is missing: install one (${mac ? "xcode-select --install" : "Debian: apt install g++"})`,
    );
  }
  if (Bun.which("ninja") === null && Bun.which("make") === null) {
    throw new Error(
      `neither ninja nor make is here: install one (${mac ? "brew install ninja" : "Debian: apt install ninja-build"})`,
    );
  }
  const disk = statfsSync(root);
  const free = disk.bavail * disk.bsize;
  if (free < neededDiskBytes && !existsSync(library)) {
    throw new Error(
      `the build needs ${Math.ceil(neededDiskBytes / 1e9)} GB of disk under ${root}, ${(free / 1e9).toFixed(1)} GB are free: make room`,
    );
  }
}

export async function installPackages(): Promise<void> {
  const lock = readFileSync(join(root, "bun.lock"), "utf8");
  const stamp = join(root, "node_modules", ".hypura-lock");
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === lock) {
    return;
  }
  say("installing npm packages");
  await runQuietly([process.execPath, "install", "--frozen-lockfile"], root);
  writeFileSync(stamp, lock);
}

async function buildNative(options: BuildOptions): Promise<void> {
  const made = {
    source: join(root, "ffi"),
    folder: nativeFolder,
    what: "libhypura",
    // The last choice stays: a build without the flag leaves a CUDA build one.
    options: options.cuda === true ? cudaOptions() : [],
  };
  await configure(made);
  await buildTargets(made, options.reference === true ? ["hypura", "reference"] : ["hypura"]);
  if (!existsSync(library)) {
    throw new Error(`the build ended without ${library}: remove build/native and try again`);
  }
}

async function compileExecutable(): Promise<void> {
  await makeExecutable({ libraries: [{ variant: "native", needs: [], file: library }], outfile: executable });
  // A failed bytecode compilation still exits 0 and leaves a file that cannot start: start it, from elsewhere.
  await runQuietly([executable, "version"], tmpdir());
}

if (import.meta.main) {
  const started = performance.now();
  try {
    const nativeOnly = process.argv.includes("--native-only");
    await build({
      nativeOnly,
      reference: process.argv.includes("--reference"),
      cuda: process.argv.includes("--cuda"),
    });
    say(
      `${nativeOnly ? library : executable} is ready after ${Math.round((performance.now() - started) / 1000)} s`,
    );
  } catch (error) {
    say((error as Error).message);
    process.exit(1);
  }
}

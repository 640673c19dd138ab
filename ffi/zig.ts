// The cross compiler: zig, as pinned in vendor/zig.txt, which brings clang, linkers and the C and C++ libraries of every
// target in one PyPI package. Owns its installation into build/ and the toolchain files that CMake needs for a target;
// it knows nothing of what is compiled. Used by releases and by the test run's Darwin check, never by a plain build.

import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join, relative } from "node:path";
import type { Target } from "./targets";

const root = join(import.meta.dir, "..");
const requirements = join(root, "vendor", "zig.txt");

/** `unreachable`: a check may skip, loudly. `missing-tool`: no pip here. */
export class ZigError extends Error {
  readonly code: "unreachable" | "missing-tool";

  constructor(code: "unreachable" | "missing-tool", message: string) {
    super(message);
    this.name = "ZigError";
    this.code = code;
  }
}

async function run(command: readonly string[]): Promise<{ readonly status: number; readonly text: string }> {
  const child = Bun.spawn([...command], { cwd: root, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
  const [out, err] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  return { status: await child.exited, text: out + err };
}

function pinned(): string {
  const version = /^ziglang==(\S+)/m.exec(readFileSync(requirements, "utf8"))?.[1];
  if (version === undefined) {
    throw new Error(`${requirements} pins no version of ziglang`);
  }
  return version;
}

/** The compiler's path, installed if need be. Throws ZigError with a sentence for people. */
export async function installZig(say: (step: string) => void): Promise<string> {
  const version = pinned();
  const folder = join(root, "build", `zig-${version}`);
  const zig = join(folder, "ziglang", "zig");
  if (existsSync(zig)) {
    return zig;
  }
  const python = ["python3", "python"].find((name) => Bun.which(name) !== null);
  if (python === undefined || (await run([python, "-m", "pip", "--version"])).status !== 0) {
    throw new ZigError(
      "missing-tool",
      "pip is missing, and the cross compiler comes from PyPI: install it (Debian: apt install python3-pip; macOS: brew install python)",
    );
  }
  say(`fetching the cross compiler zig ${version} (93 MB, from PyPI)`);
  const fresh = `${folder}.${process.pid}`;
  try {
    const options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps"];
    const pins = ["--only-binary=:all:", "--require-hashes", "-r", requirements];
    const installed = await run([python, "-m", "pip", "install", ...options, "--target", fresh, ...pins]);
    if (installed.status !== 0) {
      const last = installed.text.trim().split("\n").at(-1);
      const message = `zig ${version} could not be installed from PyPI: ${last}`;
      // Anything else, a wrong hash before all, is a failure and no reason to skip.
      const isUnreachable = /from versions: none|Retrying|Connection|timed out|resolution/.test(
        installed.text,
      );
      throw isUnreachable ? new ZigError("unreachable", message) : new Error(message);
    }
    rmSync(folder, { recursive: true, force: true });
    renameSync(fresh, folder);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
  return zig;
}

/** ccache and CMake take a younger file for a changed one: what is the same is left alone. */
function writeChanged(file: string, text: string): void {
  if (!existsSync(file) || readFileSync(file, "utf8") !== text) {
    writeFileSync(file, text);
  }
}

/**
 * ccache knows a compiler by its file's size and age. This one names nothing of where the checkout is, and is as old as its
 * text says: clones share their objects, and another zig or other flags are another compiler.
 */
function writeProgram(file: string, words: string): void {
  const text = `#!/bin/sh\nhere="\${0%/*}"\nexec ${words} "$@"\n`;
  const ageSeconds = Number(Bun.hash.xxHash64(text) % 1_000_000_000n);
  writeChanged(file, text);
  chmodSync(file, 0o755);
  utimesSync(file, ageSeconds, ageSeconds);
}

/**
 * What compiled code and the C++ library call of the compiler's own runtime, by zig's files for it. Its whole runtime is one
 * object, with slow stand-ins for memcpy, expf and their like that a linker prefers to those of the machine's libc: decoding
 * was at 0.78 to 0.88 of the native build with it. What is missing here fails the link, which names it.
 */
const runtimePieces = ["divti3"];

/** Compiles those pieces for a target; returns the objects. Throws Error with zig's words. */
async function buildRuntime(zig: string, target: Target): Promise<readonly string[]> {
  const folder = join(zig, "..", "..", target.triple); // beside the compiler: another version of it makes its own
  mkdirSync(folder, { recursive: true });
  const sources = join(zig, "..", "lib", "compiler_rt");
  const cache = join(root, "build", "zig-cache");
  const objects: string[] = [];
  for (const piece of runtimePieces) {
    const object = join(folder, `${piece}.o`);
    objects.push(object);
    if (existsSync(object)) {
      continue;
    }
    const fresh = `${object}.${process.pid}`;
    const flags = ["-target", target.triple, "-OReleaseFast", "-fPIC", "-fstrip", "-fno-compiler-rt"];
    const dirs = ["--global-cache-dir", cache, "--cache-dir", cache];
    const words = [zig, "build-obj", ...flags, ...dirs, `-femit-bin=${fresh}`, join(sources, `${piece}.zig`)];
    const made = await run(words);
    if (made.status !== 0) {
      throw new Error(`${piece} of zig's runtime did not compile for ${target.name}:\n${made.text}`);
    }
    renameSync(fresh, object);
  }
  return objects;
}

/** Writes the toolchain of a target into `folder`; returns the file for CMAKE_TOOLCHAIN_FILE. */
export async function writeToolchain(zig: string, target: Target, folder: string): Promise<string> {
  mkdirSync(folder, { recursive: true });
  const cache = `"$here/${relative(folder, join(root, "build", "zig-cache"))}"`; // the C++ library of a target, built once
  const call = `env ZIG_GLOBAL_CACHE_DIR=${cache} ZIG_LOCAL_CACHE_DIR=${cache} "$here/${relative(folder, zig)}"`;
  // zig's own defaults are those of a debug build: no sanitizer belongs in a release.
  const flags = ["-target", target.triple, target.baseline?.zig ?? "", "-fno-sanitize=all"].join(" ");
  writeProgram(join(folder, "cc"), `${call} cc ${flags}`);
  writeProgram(join(folder, "c++"), `${call} c++ ${flags}`);
  writeProgram(join(folder, "ar"), `${call} ar`);
  writeProgram(join(folder, "ranlib"), `${call} ranlib`);
  const isDarwin = target.platform === "darwin";
  const lines = [
    `set(CMAKE_SYSTEM_NAME ${isDarwin ? "Darwin" : "Linux"})`,
    `set(CMAKE_SYSTEM_PROCESSOR ${target.arch === "x64" ? "x86_64" : isDarwin ? "arm64" : "aarch64"})`,
    `set(CMAKE_C_COMPILER "${join(folder, "cc")}")`,
    `set(CMAKE_CXX_COMPILER "${join(folder, "c++")}")`,
    `set(CMAKE_AR "${join(folder, "ar")}")`,
    `set(CMAKE_RANLIB "${join(folder, "ranlib")}")`,
    `set(HYPURA_ZIG ON)`,
    // What zig links for macOS is a check and no release.
    ...(isDarwin ? [] : [`set(HYPURA_RUNTIME "${(await buildRuntime(zig, target)).join(";")}")`]),
    `set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)`,
    `set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)`,
    `set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)`,
    ...(isDarwin ? [`set(CMAKE_OSX_SYSROOT "")`, `set(CMAKE_INSTALL_NAME_TOOL /bin/true)`] : []),
  ];
  const file = join(folder, "toolchain.cmake");
  writeChanged(file, `${lines.join("\n")}\n`);
  return file;
}

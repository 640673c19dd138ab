// From a fresh clone to dist/hypura: npm packages, llama.cpp's source, libhypura by CMake, one executable by Bun.
// Each step is skipped or cheap when nothing has changed, and each missing tool is one sentence that says what to
// install. It runs before any npm package is there, so it imports none.
//
//   bun ffi/build.ts [--native-only] [--reference]
//     --native-only   stop after libhypura
//     --reference     also llama-completion and llama-server, which the tests compare with

import { existsSync, mkdirSync, readFileSync, statfsSync, writeFileSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { unpackLlama } from "../vendor/unpack";
import { hashOf, libraryName } from "./library";

const root = join(import.meta.dir, "..");
const nativeFolder = join(root, "build", "native");
const library = join(nativeFolder, libraryName);
const executable = join(root, "dist", "hypura");

/** Sources, objects and the executable of a full build take 0.9 GB (measured, Release, with the references). */
const neededDiskBytes = 1_500_000_000;

/** Fixed in bun.md's measurements: older Buns crash in bun:ffi or load a foreign bunfig.toml. */
const oldestBun = "1.4.4";

const isTerminal = process.stderr.isTTY === true;

export interface BuildOptions {
  readonly nativeOnly?: boolean;
  readonly reference?: boolean;
}

/** Builds what the options ask for. Throws Error with a sentence for people. */
export async function build(options: BuildOptions = {}): Promise<void> {
  checkTools();
  await install();
  await unpackLlama(say);
  await buildNative(options.reference === true ? ["hypura", "reference"] : ["hypura"]);
  if (options.nativeOnly !== true) {
    await compileExecutable();
  }
}

function say(step: string): void {
  process.stderr.write(`${isTerminal ? "\r\x1b[K" : ""}${step}\n`);
}

function checkTools(): void {
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

async function install(): Promise<void> {
  const lock = readFileSync(join(root, "bun.lock"), "utf8");
  const stamp = join(root, "node_modules", ".hypura-lock");
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === lock) {
    return;
  }
  say("installing npm packages");
  await runQuietly([process.execPath, "install", "--frozen-lockfile"], root);
  writeFileSync(stamp, lock);
}

async function runQuietly(command: readonly string[], cwd: string): Promise<void> {
  const child = Bun.spawn([...command], { cwd, stdout: "pipe", stderr: "pipe", stdin: "ignore" });
  const [out, err, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (status !== 0) {
    throw new Error(`\`${command.join(" ")}\` failed:\n${out}${err}`);
  }
}

async function buildNative(targets: readonly string[]): Promise<void> {
  const generator = Bun.which("ninja") === null ? "Unix Makefiles" : "Ninja";
  const configure = ["cmake", "-S", join(root, "ffi"), "-B", nativeFolder, "-G", generator];
  if (!existsSync(join(nativeFolder, "CMakeCache.txt"))) {
    say(`configuring libhypura${Bun.which("ccache") === null ? "" : " (with ccache)"}`);
    await runQuietly(configure, root);
  }
  const command = [
    "cmake",
    "--build",
    nativeFolder,
    "--parallel",
    String(availableParallelism()),
    "--target",
    ...targets,
  ];
  const child = Bun.spawn(command, { cwd: root, stdout: "pipe", stderr: "pipe", stdin: "ignore" });
  const [log, err] = await Promise.all([followBuild(child.stdout), new Response(child.stderr).text()]);
  if ((await child.exited) !== 0) {
    throw new Error(`libhypura did not build:\n${failureOf(log)}${err}`);
  }
  if (!existsSync(library)) {
    throw new Error(`the build ended without ${library}: remove build/native and try again`);
  }
}

/** The compiler's words, without the steps that went well. */
function failureOf(log: readonly string[]): string {
  const first = log.findIndex((line) => line.includes("FAILED:") || line.includes("error:"));
  return `${log.slice(Math.max(0, first)).slice(0, 60).join("\n")}\n`;
}

/** Shows ninja's `[3/199] ...` or make's `[ 12%] ...` as a bar on a terminal, every tenth part elsewhere. */
async function followBuild(stream: ReadableStream<Uint8Array>): Promise<readonly string[]> {
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
          `\r\x1b[Kbuilding libhypura [${"#".repeat(filled)}${"-".repeat(30 - filled)}] ${Math.floor(fraction * 100)} %  ${seconds} s`,
        );
      } else if (Math.floor(fraction * 10) > tenth) {
        tenth = Math.floor(fraction * 10);
        process.stderr.write(`building libhypura: ${tenth * 10} % after ${seconds} s\n`);
      }
    }
  }
  if (isTerminal) {
    process.stderr.write("\r\x1b[K");
  }
  return log;
}

/** The entry that carries the library; generated because its import exists only after the build. */
function writeEntry(): string {
  const bytes = readFileSync(library);
  const hash = hashOf(bytes);
  const entry = join(root, "build", "hypura.ts");
  writeFileSync(
    entry,
    `import path from ${JSON.stringify(`./native/${libraryName}`)} with { type: "file" };
import { embedLibrary } from "../ffi/native";
import { main } from "../src/main";

embedLibrary({ path, sizeBytes: ${bytes.byteLength}, hash: "${hash}" });
await main();
`,
  );
  return entry;
}

async function compileExecutable(): Promise<void> {
  mkdirSync(join(root, "dist"), { recursive: true });
  // Bytecode halves the start (44 to 14 ms) and needs ESM; a bunfig.toml or .env where a user happens to stand
  // must not run code in hypura.
  const flags = [
    "--compile",
    "--minify",
    "--bytecode",
    "--format=esm",
    "--no-compile-autoload-bunfig",
    "--no-compile-autoload-dotenv",
  ];
  await runQuietly([process.execPath, "build", ...flags, writeEntry(), "--outfile", executable], root);
  // A failed bytecode compilation still exits 0 and leaves a file that cannot start: start it, from elsewhere.
  await runQuietly([executable, "version"], tmpdir());
}

if (import.meta.main) {
  const started = performance.now();
  try {
    const nativeOnly = process.argv.includes("--native-only");
    await build({ nativeOnly, reference: process.argv.includes("--reference") });
    say(
      `${nativeOnly ? library : executable} is ready after ${Math.round((performance.now() - started) / 1000)} s`,
    );
  } catch (error) {
    say((error as Error).message);
    process.exit(1);
  }
}

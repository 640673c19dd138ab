// The tests of the data plane as the test command runs them: configured, built and run by ctest in a folder for each
// variant (plain, and under the sanitizers that a compiler here has). Owns the choice of compiler and the count of
// ctest's verdicts; it knows nothing of what the tests test.

import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const root = join(import.meta.dir, "..", "..");

export interface Tally {
  passed: number;
  failed: number;
  skipped: number;
}

export type Variant = "release" | "asan" | "tsan";

export const variants: readonly Variant[] = ["release", "asan", "tsan"];

const sanitizers: Readonly<Record<Variant, string>> = {
  release: "",
  asan: "address,undefined",
  tsan: "thread",
};

/** Two at a time: a test has threads of its own, and more memory than cores is not to be had everywhere. */
const parallel = "2";

/** Where a variant is built. */
export function folderOf(variant: Variant): string {
  return join(root, "build", `native-tests-${variant}`);
}

interface Result {
  readonly status: number | null;
  readonly text: string;
}

/** Runs a command to its end; what it said in one text. */
export async function run(command: readonly string[], cwd = root): Promise<Result> {
  const child = Bun.spawn([...command], { cwd, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
  const [out, err] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  return { status: await child.exited, text: out + err };
}

/** clang first: it has thread-safety annotations and libFuzzer; then whatever compiles. */
function compilers(): readonly string[] {
  const versions = [20, 19, 18, 17, 16, 15, 14].map((version) => `clang++-${version}`);
  return ["clang++", ...versions, "g++", "c++"].filter((name) => Bun.which(name) !== null);
}

/** A compiler that builds programs with these sanitizers that run here; null where none does. */
async function sanitizingCompiler(sanitize: string, candidates = compilers()): Promise<string | null> {
  const folder = mkdtempSync(join(tmpdir(), "hypura-sanitizer-"));
  try {
    const source = join(folder, "trivial.cpp");
    const program = join(folder, "trivial");
    writeFileSync(source, "#include <thread>\nint main() { std::thread([] {}).join(); return 0; }\n");
    for (const compiler of candidates) {
      const built = await run([
        compiler,
        "-std=c++17",
        `-fsanitize=${sanitize}`,
        "-pthread",
        source,
        "-o",
        program,
      ]);
      if (built.status === 0 && (await run([program])).status === 0) {
        return compiler;
      }
    }
    return null;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Builds the variant and runs its tests. */
export async function nativeTests(variant: Variant): Promise<Tally> {
  const sanitize = sanitizers[variant];
  const compiler = sanitize === "" ? null : await sanitizingCompiler(sanitize);
  if (sanitize !== "" && compiler === null) {
    console.error(
      `!!! SKIPPED: no compiler here builds with -fsanitize=${sanitize} (Debian: apt install clang)`,
    );
    return { passed: 0, failed: 0, skipped: 1 };
  }
  const folder = folderOf(variant);
  const generator = Bun.which("ninja") === null ? "Unix Makefiles" : "Ninja";
  const configured = await run([
    ...["cmake", "-S", join(root, "test", "native"), "-B", folder, `-DHYPURA_SANITIZE=${sanitize}`],
    // The generator and the compiler of a folder are fixed when it is made.
    ...(existsSync(join(folder, "CMakeCache.txt")) ? [] : ["-G", generator]),
    ...(compiler === null ? [] : [`-DCMAKE_CXX_COMPILER=${compiler}`]),
  ]);
  const built =
    configured.status === 0 ? await run(["cmake", "--build", folder, "--parallel", parallel]) : configured;
  if (built.status !== 0) {
    throw new Error(`the native tests (${variant}) did not build:\n${built.text.slice(-8000)}`);
  }
  const ran = await run(["ctest", "--test-dir", folder, "--output-on-failure", "--parallel", parallel]);
  const tally = countVerdicts(ran.text);
  if (ran.status !== 0 || tally.failed > 0 || tally.passed === 0) {
    console.error(ran.text.slice(-20_000));
  }
  // A ctest that fails without a failed test is a failure too.
  return (ran.status !== 0 && tally.failed === 0) || tally.passed === 0
    ? { ...tally, failed: tally.failed + 1 }
    : tally;
}

/** ` 1/7 Test #3: stream_test ......   Passed    1.20 sec`, or `***Failed`, `***Timeout`, `***Exception: ...`. */
export function countVerdicts(text: string): Tally {
  const verdicts = [...text.matchAll(/^\s*\d+\/\d+ Test\s+#\d+: \S+ \.*\s*(\S+)/gm)].map((match) => match[1]);
  const count = (wanted: (verdict: string) => boolean) => verdicts.filter((one) => wanted(one ?? "")).length;
  const skipped = count((one) => /Skipped|Disabled/.test(one));
  const passed = count((one) => one === "Passed");
  return { passed, failed: verdicts.length - passed - skipped, skipped };
}

/** Builds hypura-abi with our own objects sanitised, in a folder of its own; null where no compiler can. */
export async function sanitisedAbiProgram(): Promise<string | null> {
  const sanitize = sanitizers.asan;
  // The compiler of the library's own build where it can, so that ccache has llama.cpp's objects.
  const compiler = await sanitizingCompiler(sanitize, [process.env["CXX"] ?? "c++", ...compilers()]);
  if (compiler === null) {
    console.error(
      `!!! SKIPPED: no compiler here builds with -fsanitize=${sanitize} (Debian: apt install g++)`,
    );
    return null;
  }
  const folder = join(root, "build", "native-asan");
  const generator = Bun.which("ninja") === null ? "Unix Makefiles" : "Ninja";
  const configured = await run([
    ...["cmake", "-S", join(root, "ffi"), "-B", folder, `-DHYPURA_SANITIZE=${sanitize}`],
    ...(existsSync(join(folder, "CMakeCache.txt"))
      ? []
      : ["-G", generator, `-DCMAKE_CXX_COMPILER=${compiler}`]),
  ]);
  const build = ["cmake", "--build", folder, "--parallel", parallel, "--target", "hypura-abi"];
  const built = configured.status === 0 ? await run(build) : configured;
  if (built.status !== 0) {
    throw new Error(`the sanitised hypura-abi did not build:\n${built.text.slice(-8000)}`);
  }
  return join(folder, "hypura-abi");
}

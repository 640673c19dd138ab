// The test command: sets everything up, builds, and runs every check there is. One line for each part as it ends;
// the last line is "N passed, N failed", with what was skipped. `--soak` adds the long runs.

import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { build } from "../ffi/build";
import { compileForDarwin, linkForDarwin } from "../ffi/darwin";
import { ZigError } from "../ffi/zig";
import { folderOf, nativeTests, sanitisedAbiProgram, type Tally, variants } from "./native/suite";

const root = join(import.meta.dir, "..");
const soak = process.argv.includes("--soak");

const total: Tally = { passed: 0, failed: 0, skipped: 0 };

async function part(name: string, run: () => Promise<Tally>): Promise<void> {
  const started = performance.now();
  console.error(`--- ${name}`);
  const tally = await run().catch((error: Error): Tally => {
    console.error(error.message);
    return { passed: 0, failed: 1, skipped: 0 };
  });
  total.passed += tally.passed;
  total.failed += tally.failed;
  total.skipped += tally.skipped;
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.error(
    `--- ${name}: ${tally.passed} passed, ${tally.failed} failed, ${tally.skipped} skipped, ${seconds} s`,
  );
}

async function spawn(command: readonly string[], environment: Record<string, string> = {}): Promise<number> {
  const child = Bun.spawn([...command], {
    cwd: root,
    env: { ...process.env, ...environment },
    stdin: "ignore",
    stdout: 2, // the verdict alone is stdout's
    stderr: "inherit",
  });
  return child.exited;
}

/** A command that passes or fails as a whole. */
async function one(command: readonly string[]): Promise<Tally> {
  const status = await spawn(command);
  return { passed: status === 0 ? 1 : 0, failed: status === 0 ? 0 : 1, skipped: 0 };
}

/** `bun test` over folders, counted from its JUnit report. */
async function bunTests(
  folders: readonly string[],
  environment: Record<string, string> = {},
): Promise<Tally> {
  const report = join(root, "build", "junit.xml");
  rmSync(report, { force: true });
  const status = await spawn(
    [
      process.execPath,
      "test",
      "--timeout",
      "600000",
      "--reporter=junit",
      `--reporter-outfile=${report}`,
      ...folders,
    ],
    { HYPURA_SOAK: soak ? "1" : "", ...environment },
  );
  if (!existsSync(report)) {
    throw new Error("bun test wrote no report");
  }
  const suites = /<testsuites[^>]*>/.exec(readFileSync(report, "utf8"))?.[0] ?? "";
  const count = (name: string): number => Number(new RegExp(` ${name}="(\\d+)"`).exec(suites)?.[1] ?? 0);
  const failed = count("failures");
  const passed = count("tests") - failed - count("skipped");
  // A crash or an error outside any test leaves no failed case; it is one.
  return { passed, failed: status !== 0 && failed === 0 ? 1 : failed, skipped: count("skipped") };
}

/** Everything of ours for macOS, compiled here; what only a Mac can show is the workflow's matter. */
async function darwin(check: () => Promise<void>): Promise<Tally> {
  try {
    await check();
    return { passed: 1, failed: 0, skipped: 0 };
  } catch (error) {
    if (!(error instanceof ZigError)) {
      throw error;
    }
    console.error(`!!! SKIPPED: nothing is compiled for macOS: ${error.message}`);
    return { passed: 0, failed: 0, skipped: 1 };
  }
}

/** The long runs that are no bun tests. */
async function soakParts(): Promise<void> {
  await part("libhypura.dylib and the executable for macOS", () => darwin(linkForDarwin));
  await part("10,000 runs of stream_stress", () =>
    one([join(folderOf("release"), "stream_stress"), "10000"]),
  );
  await part("a minute of fuzzing", async () => {
    const fuzzer = join(folderOf("asan"), "neuron_cache_fuzz");
    if (!existsSync(fuzzer)) {
      console.error("!!! SKIPPED: the fuzzer needs clang (Debian: apt install clang)");
      return { passed: 0, failed: 0, skipped: 1 };
    }
    return one([fuzzer, "-max_total_time=60", "-max_len=4096"]);
  });
  await part("the interface under ASan and UBSan", async () => {
    const program = await sanitisedAbiProgram();
    return program === null
      ? { passed: 0, failed: 0, skipped: 1 }
      : bunTests(["test/native/abi.test.ts"], { HYPURA_ABI: program });
  });
  for (const name of readdirSync(join(root, "test", "bench")).sort()) {
    const path = join("test", "bench", name);
    // A module that others import is no benchmark: it has no bar to reach.
    if (name.endsWith(".ts") && name !== "measure.ts") {
      await part(path, () => one([process.execPath, path]));
    }
  }
}

await part("build", async () => {
  await build({ reference: true });
  return { passed: 1, failed: 0, skipped: 0 };
});
if (total.failed === 0) {
  await part("types", () => one([process.execPath, "x", "tsc", "--noEmit"]));
  await part("lint and format", () => one([process.execPath, "x", "biome", "check", "."]));
  for (const variant of variants) {
    await part(`native tests, ${variant}`, () => nativeTests(variant));
  }
  await part("darwin compile", () => darwin(compileForDarwin));
  await part("bun test", () => bunTests(["test"]));
  if (soak) {
    await soakParts();
  }
}
const skipped = total.skipped > 0 ? `, ${total.skipped} skipped` : "";
console.log(`${total.passed} passed, ${total.failed} failed${skipped}`);
process.exit(total.failed === 0 ? 0 : 1);

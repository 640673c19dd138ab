// The executable for Linux arm64, made on another machine by the cross compiler and run under QEMU: it starts, takes the
// kernels that the emulated processor has, refuses one that has too little, and streams a model to the same answer as
// from memory. What an emulator cannot show: speed, and io_uring, which it does not have (the reader's threads read).
// In the soak run only: llama.cpp is compiled for it, some fifteen minutes the first time.

import { beforeAll, describe, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { buildLibraries } from "../../ffi/cross";
import { makeExecutable } from "../../ffi/executable";
import { targets } from "../../ffi/targets";
import { outcomeOf, root, scratchFolder } from "../cli/program";
import { makeFixture } from "../fixtures";

const target = targets["linux-arm64"];
const executable = join(root, "build", "cross", "hypura-linux-arm64");
/** Where Debian's libc6-arm64-cross puts the C library. */
const systemRoot = "/usr/aarch64-linux-gnu";
const emulator = Bun.which("qemu-aarch64-static") ?? Bun.which("qemu-aarch64");
const isSoak = process.env["HYPURA_SOAK"] === "1";
const isPossible =
  process.platform === "linux" &&
  process.arch === "x64" &&
  emulator !== null &&
  existsSync(join(systemRoot, "lib", "ld-linux-aarch64.so.1"));
if (isSoak && !isPossible) {
  console.error(
    "!!! SKIPPED: the executable for arm64: needs Linux x64 with QEMU and a C library for it (Debian: apt install qemu-user-static libc6-arm64-cross)",
  );
}

const folder = scratchFolder();

/** Runs hypura on an emulated processor, with a cache and a home of its own. */
function on(processor: string, words: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const command = [emulator ?? "", "-cpu", processor, "-L", systemRoot, executable, ...words];
  return outcomeOf(
    Bun.spawn(command, {
      env: { HYPURA_CACHE: join(folder, processor), HYPURA_HOME: join(folder, "home"), ...env },
      cwd: folder,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    }) as never,
  );
}

interface Doctor {
  readonly library: { readonly variant: string | null; readonly fault: string | null };
}

describe.skipIf(!isSoak || !isPossible)("the executable for arm64, emulated", () => {
  beforeAll(async () => {
    const libraries = await buildLibraries(target, "zig");
    await makeExecutable({ libraries, outfile: executable, bunTarget: target.bun });
  }, 3_600_000);

  test("starts and says what it is", async () => {
    const { status, stdout, stderr } = await on("max", ["version"]);
    expect([status, stderr]).toEqual([0, ""]);
    expect(stdout).toEndWith("linux-arm64)\n");
  });

  test.each([
    ["max", "i8mm"],
    ["neoverse-n1", "dotprod"],
    ["cortex-a76", "dotprod"],
  ])("takes on %s the kernels for %s", async (processor, variant) => {
    const { status, stdout } = await on(processor, ["doctor", "/", "--json"]);
    expect(status).toBe(0);
    expect((JSON.parse(stdout) as Doctor).library).toMatchObject({ variant, fault: null });
  });

  test("refuses a processor without dotprod, and kernels that it has not", async () => {
    const [model = ""] = await makeFixture("tiny-llama", join(folder, "tiny.gguf"));
    const old = await on("cortex-a72", ["run", model, "--prompt", "a"]);
    expect(old.status).not.toBe(0);
    expect(old.stderr).toContain("needs a processor with asimddp, asimdhp, which this one has not");
    const wrong = await on("cortex-a76", ["run", model, "--prompt", "a"], { HYPURA_CPU: "i8mm" });
    expect(wrong.status).not.toBe(0);
    expect(wrong.stderr).toContain("HYPURA_CPU=i8mm: this processor has no i8mm");
  });

  test.each(["max", "neoverse-n1"])("streams to the same answer as from memory on %s", async (processor) => {
    const [model = ""] = await makeFixture("tiny-mixtral", join(folder, `${processor}.gguf`));
    const answer = async (mode: "stream" | "resident") => {
      const words = ["--prompt", "a few words", "--max-tokens", "8", "--temp", "0", "--json"];
      const { status, stdout, stderr } = await on(processor, [
        "run",
        model,
        "--plan",
        await plan(processor, model, mode),
        ...words,
      ]);
      expect([status, stderr]).toEqual([0, ""]);
      return JSON.parse(stdout) as { readonly mode: string; readonly text: string };
    };
    const [streamed, resident] = [await answer("stream"), await answer("resident")];
    expect([streamed.mode, resident.mode]).toEqual(["expert-streaming", "full-resident"]);
    expect(streamed.text.length).toBeGreaterThan(0);
    expect(streamed.text).toBe(resident.text);
  });
});

/**
 * What `inspect` would do, without rearranged weights, which change last bits. `run` without a plan would measure this
 * machine before it streams, and an emulator is slow at that.
 */
async function plan(processor: string, model: string, mode: string): Promise<string> {
  const inspected = await on(processor, ["inspect", model, "--mode", mode, "--threads", "1", "--json"]);
  expect([inspected.status, inspected.stderr]).toEqual([0, ""]);
  const told = JSON.parse(inspected.stdout) as { readonly plan: object };
  const file = join(folder, `${processor}-${mode}.json`);
  writeFileSync(file, JSON.stringify({ ...told, plan: { ...told.plan, repack: false } }));
  return file;
}

// `hypura doctor` as a person and a script run it.

import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { hypura, scratchFolder, tinyModel } from "./program";

const folder = scratchFolder();
const model = await tinyModel(folder);
const env = { HYPURA_HOME: join(folder, "home") };

describe("doctor", () => {
  test("fits a screen of 100 columns, and says what to do first", async () => {
    const { status, stdout, stderr } = await hypura(["doctor", model], { env });
    expect([status, stderr]).toEqual([0, ""]);
    const lines = stdout.split("\n");
    expect(lines.length).toBeLessThanOrEqual(30);
    for (const line of lines) {
      expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
    }
    for (const row of [
      "library",
      "kernels",
      "processor",
      "memory",
      "huge pages",
      "gpu",
      "volume",
      "direct I/O",
    ]) {
      expect(stdout).toMatch(new RegExp(`^  ${row} +\\S`, "m"));
    }
    expect(stdout).toMatch(/bandwidth +not measured/);
    expect(stdout).toMatch(/model +tiny\.gguf in .*: full-resident/);
    expect(stdout).toMatch(/ {2}- this volume was not measured yet: `hypura profile --path/);
    expect(stdout).not.toMatch(/undefined|NaN|\[object|Infinity/);
  });

  test("shows the kept profile, and no longer asks for one", async () => {
    const measured = await hypura(["profile", "--path", folder, "--seconds", "0.1"], { env });
    expect(measured.status).toBe(0);
    const { stdout } = await hypura(["doctor", model], { env });
    expect(stdout).toMatch(/bandwidth +[\d.]+ [KMG]B\/s in reads of .* ago/);
    expect(stdout).toMatch(/direct I\/O +(yes|no)/);
    expect(stdout).not.toContain("hypura profile --path");
  });

  test("as JSON", async () => {
    const { stdout } = await hypura(["doctor", folder, "--json"], { env });
    const facts = JSON.parse(stdout);
    expect(facts.library.path).toMatch(/libhypura\.(so|dylib)$/);
    expect(facts.machine.memory.totalBytes).toBeGreaterThan(1e8);
    expect(facts.instructionSets.length).toBeGreaterThan(0);
    expect(Array.isArray(facts.advice)).toBe(true);
  });

  test.each([
    [["/no/such/place"], 3, "cannot be found"],
    [["a", "b"], 2, "one argument too many"],
    [["--verbose"], 2, "has no option"],
    [[join(import.meta.dir, "doctor.test.ts")], 4, "GGUF"],
  ])("%p is refused", async (args, status, message) => {
    const outcome = await hypura(["doctor", ...args], { env });
    expect([outcome.status, outcome.stdout]).toEqual([status, ""]);
    expect(outcome.stderr).toContain(message);
  });
});

// `hypura iobench` as a person and a script run it, with a moment for each setting.

import { describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { hypura, scratchFolder } from "./program";

const folder = scratchFolder();
const env = { HYPURA_HOME: join(folder, "home") };
const model = join(folder, "m.gguf");
writeFileSync(model, new Uint8Array(64 * 1_048_576).fill(1));
utimesSync(model, 1e9, 1e9);

describe("iobench", () => {
  test("prints a table for each way of reading, of 100 columns, and the best setting", async () => {
    const outcome = await hypura(["iobench", model, "--seconds", "0.002"], { env });
    expect(outcome.status).toBe(0);
    for (const line of outcome.stdout.split("\n")) {
      expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
    }
    expect(outcome.stdout).toContain(" on /");
    expect(outcome.stdout).toMatch(/Buffered reads, from anywhere\n +x 1 +x 2 +x 4 +x 8 +x 16\n/);
    expect(outcome.stdout.match(/16 MiB( +[\d.]+ [KMG]B\/s){5}/g)?.length).toBeGreaterThanOrEqual(2);
    expect(outcome.stdout).toMatch(/setting +\d+ [KM]iB x \d+, (direct|buffered)\n/);
    expect(outcome.stdout).not.toMatch(/undefined|NaN|\[object|Infinity|in the machine's profile/);
    expect(() => readdirSync(env.HYPURA_HOME)).toThrow(); // a short look is not kept
  });

  test("--json has every setting that was asked for, once", async () => {
    const args = [
      "--sizes",
      "1MiB,64KiB,64KiB",
      "--depths",
      "3,1",
      "--seconds",
      "0.002",
      "--pages",
      "base",
      "--json",
    ];
    const outcome = await hypura(["iobench", model, ...args], { env });
    const result = JSON.parse(outcome.stdout);
    expect([result.source.path, result.source.isScratch, result.engine]).toEqual([
      model,
      false,
      "pread threads",
    ]);
    // Without direct reads only the buffered ones; io_uring may be forbidden.
    const engines = new Set(result.reads.map((read: { engine: string }) => read.engine));
    const hasDirect = result.reads.some((read: { direct: boolean }) => read.direct);
    expect(engines.has("pread threads")).toBe(true);
    expect(result.reads.length).toBe((hasDirect ? 16 : 8) + (engines.has("io_uring") ? 4 : 0));
    expect(result.best.engine).toBe("pread threads");
    for (const read of result.reads) {
      expect([65_536, 1_048_576]).toContain(read.readBytes);
      expect([1, 3]).toContain(read.depth);
      expect(read.readCount).toBeGreaterThanOrEqual(read.depth);
      expect(read.bytesPerSecond).toBeCloseTo((read.readCount * read.readBytes) / read.seconds, -1);
      expect(read.latencySeconds.p50).toBeGreaterThan(0);
      expect(read.latencySeconds.p99).toBeGreaterThanOrEqual(read.latencySeconds.p50);
    }
    expect(result.best).toMatchObject({ readBytes: expect.any(Number), depth: expect.any(Number) });
    expect(result.isKept).toBe(false);
  });

  test("writes a file where there is none, says so, and removes it", async () => {
    const empty = join(folder, "empty");
    mkdirSync(empty);
    const args = ["--sizes", "64KiB", "--depths", "1", "--seconds", "0.01"];
    const outcome = await hypura(["iobench", empty, ...args], { env });
    expect(outcome.status).toBe(0);
    expect(outcome.stderr).toMatch(
      /^warning: .*empty has no file that is large.*a scratch file of .* was written/,
    );
    expect(outcome.stdout).toMatch(/read +a scratch file, /);
    expect(readdirSync(empty)).toEqual([]);
  });

  test.each([
    [[], 2, "needs a PATH"],
    [["/no/such/model.gguf"], 3, "/no/such/model.gguf cannot be found"],
    [[model, "--sizes", "100"], 2, '--sizes "100": give sizes from 4KiB to 64MiB'],
    [[model, "--sizes", "1GiB"], 2, '--sizes "1GiB": give sizes from 4KiB to 64MiB'],
    [[model, "--sizes", "64KiB,"], 2, '--sizes "": give sizes'],
    [[model, "--depths", "0"], 2, '--depths "0": give a whole number from 1 to 64'],
    [[model, "--depths", "1,two"], 2, '--depths "two": give a whole number'],
    [[model, "--pages", "small"], 2, '--pages "small": give huge or base'],
    [[model, "--seconds", "-1"], 2, '--seconds "-1": give a number'],
  ])("%p is refused", async (args, status, message) => {
    const outcome = await hypura(["iobench", ...args], { env });
    expect([outcome.status, outcome.stdout]).toEqual([status, ""]);
    expect(outcome.stderr).toMatch(/^error: .*\n$/);
    expect(outcome.stderr).toContain(message);
  });
});

// `hypura profile` as a person and a script run it, with next to no time to measure in.

import { describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { validateMachine } from "../../src/machine";
import { environment, eventually, hypura, outcomeOf, program, scratchFolder } from "./program";

const folder = scratchFolder();
const env = { HYPURA_HOME: join(folder, "home") };
const models = join(folder, "models");
mkdirSync(models);
const model = join(models, "m.gguf");
writeFileSync(model, new Uint8Array(64 * 1_048_576).fill(1));
utimesSync(model, 1e9, 1e9);

const quick = ["--seconds", "0.1", "--path", model];

describe("profile", () => {
  test("measures once, prints a page of 100 columns, and keeps it", async () => {
    const first = await hypura(["profile", ...quick], { env });
    expect(first.status).toBe(0);
    for (const line of first.stdout.split("\n")) {
      expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
    }
    expect(first.stdout).toMatch(/measured +just now/);
    expect(first.stdout).toMatch(/ram +[\d.]+ [MG]B\/s +[█▉▊▋▌▍▎▏]/);
    expect(first.stdout).toMatch(
      /nvme +[\d.]+ [MG]B\/s +\S+ +(direct|buffered) reads of \d+ [KM]iB x \d+, \S+/,
    );
    expect(first.stdout).toMatch(/q4_K +[\d.]+ [MG]B\/s +\S+( +[\d.]+ [MG]B\/s){1,2} +[\d.]+ [GT]FLOP\/s/);
    expect(first.stdout).toMatch(/1 MiB( +[\d.]+ [MG]B\/s){5}/);
    expect(first.stdout).not.toMatch(/undefined|NaN|\[object|Infinity/);
    const kept = await hypura(["profile", ...quick, "--json"], { env });
    expect([kept.status, kept.stderr]).toEqual([0, ""]);
    const machine = validateMachine(JSON.parse(kept.stdout));
    const again = validateMachine(
      JSON.parse((await hypura(["profile", ...quick, "--json"], { env })).stdout),
    );
    expect(again.profile).toEqual(machine.profile);
    expect(machine.profile?.storage[0]?.reads.length).toBe(20);
    const [name = ""] = readdirSync(env.HYPURA_HOME);
    expect(name).toMatch(/^machine-[0-9a-f]{16}\.json$/);
    expect(statSync(join(env.HYPURA_HOME, name)).mode & 0o077).toBe(0);

    const forced = validateMachine(
      JSON.parse((await hypura(["profile", ...quick, "--force", "--json"], { env })).stdout),
    );
    expect(forced.profile?.measuredAt).not.toBe(machine.profile?.measuredAt as string);

    writeFileSync(join(env.HYPURA_HOME, name), "{");
    const mended = await hypura(["profile", ...quick, "--json"], { env });
    expect(mended.status).toBe(0);
    expect(mended.stderr).toMatch(/^warning: the kept profile .* is damaged: measuring again\n/);
    expect(validateMachine(JSON.parse(mended.stdout)).profile).not.toBeNull();
    expect(readdirSync(models)).toEqual(["m.gguf"]);
  });

  test.each([
    [
      ["--path", "/no/such/folder"],
      3,
      "/no/such/folder cannot be found: give a file or a folder that exists",
    ],
    [["--seconds", "0"], 2, '--seconds "0": give a number from 0.1 to 600'],
    [["--seconds", "soon"], 2, '--seconds "soon": give a number from 0.1 to 600'],
    [["--paht", "."], 2, "did you mean --path?"],
    [["here"], 2, "one argument too many"],
  ])("%p is refused", async (args, status, message) => {
    const outcome = await hypura(["profile", ...args], { env });
    expect([outcome.status, outcome.stdout]).toEqual([status, ""]);
    expect(outcome.stderr).toMatch(/^error: .*\n$/);
    expect(outcome.stderr).toContain(message);
  });

  for (const [signal, status] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const) {
    test(`${signal} ends it, and leaves nothing behind`, async () => {
      const empty = join(folder, signal);
      mkdirSync(empty);
      const home = join(folder, `home-${signal}`);
      const child = Bun.spawn([...program, "profile", "--path", empty, "--seconds", "20"], {
        env: { ...environment, HYPURA_HOME: home },
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
      });
      const outcome = outcomeOf(child);
      // The scratch file is there while storage is measured.
      await eventually(
        () => readdirSync(empty).find((name) => name.startsWith(".hypura-scratch-")),
        () => "no scratch file was written",
        120,
      );
      child.kill(signal);
      expect((await outcome).status).toBe(status);
      expect(readdirSync(empty)).toEqual([]);
      expect(() => readdirSync(home)).toThrow();
    });
  }
});

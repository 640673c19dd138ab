// Kept runs: they come back as they were, what is damaged is said and left out, and the document stays small.

import { afterAll, beforeEach, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { keepRun, readHistory } from "../../src/history";
import type { MeasuredRun } from "../../src/plan";

const folder = mkdtempSync(join(tmpdir(), "hypura-test-"));
const before = process.env["HYPURA_HOME"];
process.env["HYPURA_HOME"] = folder;
afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
  if (before === undefined) delete process.env["HYPURA_HOME"];
  else process.env["HYPURA_HOME"] = before;
});

const document = join(folder, "history.json");
beforeEach(() => rmSync(document, { recursive: true, force: true }));

const run: MeasuredRun = {
  version: 1,
  at: "2026-11-02T00:00:00Z",
  machineKey: "a machine",
  modelKey: "a model",
  streams: true,
  threads: 2,
  poolShare: 0.25,
  layerCount: 24,
  modelSeconds: 0.1,
  decodeTokens: 64,
  decodeSeconds: 7,
  hitRate: 0.87,
};

test("runs with guesses come back, runs of before guesses were kept stay, damaged guesses go", () => {
  const guesses = { maxTokens: 7, draftKey: null, passes: 30, drafted: 90, accepted: 34 };
  keepRun(run);
  keepRun({ ...run, guesses });
  keepRun({ ...run, guesses: { ...guesses, draftKey: "a draft" } });
  keepRun({ ...run, guesses: { ...guesses, passes: -1 } });
  expect(readHistory().map((one) => one.guesses?.draftKey)).toEqual([undefined, null, "a draft"]);
});

test("nothing is kept at first, and then what was kept", () => {
  expect(readHistory()).toEqual([]);
  keepRun(run);
  keepRun({ ...run, poolShare: null, hitRate: null, modelSeconds: null, streams: false });
  expect(readHistory().map((one) => one.poolShare)).toEqual([0.25, null]);
  expect(readHistory()[0]).toEqual(run);
});

test("old runs make room for new ones", () => {
  writeFileSync(document, JSON.stringify(Array.from({ length: 400 }, (_, i) => ({ ...run, threads: i }))));
  keepRun({ ...run, threads: 1000 });
  const threads = readHistory().map((one) => one.threads);
  expect([threads.length, threads[0], threads.at(-1)]).toEqual([400, 1, 1000]);
});

test("what is damaged is said, and the rest is used", () => {
  const bad: readonly unknown[] = [
    null,
    1,
    { ...run, version: 2 },
    { ...run, decodeSeconds: -1 },
    { ...run, hitRate: 1.5 },
    { ...run, machineKey: null },
    { ...run, poolShare: "0.2" },
  ];
  for (const one of bad) {
    const notes: string[] = [];
    writeFileSync(document, JSON.stringify([run, one]));
    expect(readHistory({ onNote: (note) => notes.push(note) })).toEqual([run]);
    expect(notes).toEqual([expect.stringMatching(/damaged: what is whole of them is used/)]);
  }
  for (const text of ["", "{", "[", "{}", "null"]) {
    const notes: string[] = [];
    writeFileSync(document, text);
    expect(readHistory({ onNote: (note) => notes.push(note) })).toEqual([]);
    expect(notes).toHaveLength(1);
  }
});

test.skipIf(process.platform !== "linux")(
  "a disk that takes only a part leaves the document as it was",
  async () => {
    for (let i = 0; i < 30; i++) keepRun(run);
    const whole = readFileSync(document, "utf8");
    expect(whole.length).toBeGreaterThan(4096);
    const more = `import { keepRun, readHistory } from ${JSON.stringify(join(import.meta.dir, "../../src/history"))};
    keepRun(readHistory()[0]);`;
    const script = join(folder, "more.ts");
    writeFileSync(script, more);
    // No file of this process may grow past 4 KiB; the signal that says so is ignored, as for a full disk.
    const child = Bun.spawn(
      ["bash", "-c", `trap '' XFSZ; ulimit -f 4; exec "$0" "$1"`, process.execPath, script],
      {
        env: process.env,
        stdout: "pipe",
        stderr: "pipe",
      },
    );
    expect(await new Response(child.stderr).text()).toContain("cannot be written");
    expect(await child.exited).not.toBe(0);
    expect(readFileSync(document, "utf8")).toBe(whole);
    expect(readdirSync(folder).filter((name) => name.endsWith(".tmp"))).toEqual([]);
  },
);

// How long the executable takes: `hypura version` to its end, and `hypura run` on a tiny model to the first byte of
// its answer, warm (the library is unpacked, the files are in the page cache); and the same on the very first start, with
// no library unpacked and the executable out of the page cache. Prints the medians; ends with 1 above a bar.
//
//   bun test/bench/start.ts [runs] [executable]     dist/hypura by default

import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { makeFixture } from "../fixtures";
import { dropCached, median, verdict } from "./measure";

const versionBarMs = 60;
const firstByteBarMs = 300;
const firstStartBarMs = 1500;
const firstStarts = 5;
const runCount = Number(process.argv[2] ?? 20);
const root = join(import.meta.dir, "..", "..");
const program = resolve(process.argv[3] ?? join(root, "dist", "hypura"));
const warmCache = join(root, "build", "test-cache");

interface Times {
  readonly end: number;
  readonly firstByte: number;
}

/** As if it had just been downloaded, and the machine started since. */
async function timeFirst(args: readonly string[], folder: string): Promise<Times> {
  dropCached(program);
  return time(args, mkdtempSync(join(folder, "cache-")));
}

/** Milliseconds from the start to the end, and to the first byte on stdout. */
async function time(args: readonly string[], cache = warmCache): Promise<Times> {
  const started = performance.now();
  const child = Bun.spawn([program, ...args], {
    env: { ...process.env, HYPURA_CACHE: cache },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const errors = new Response(child.stderr).text();
  let firstByte = Number.NaN;
  for await (const _ of child.stdout) {
    firstByte = Number.isNaN(firstByte) ? performance.now() - started : firstByte;
  }
  if ((await child.exited) !== 0 || Number.isNaN(firstByte)) {
    throw new Error(`hypura ${args.join(" ")} failed or said nothing: ${await errors}`);
  }
  return { end: performance.now() - started, firstByte };
}

if (!existsSync(program)) {
  console.error(`!!! SKIPPED: ${program} is not built (bun run build)`);
  process.exit(0);
}
const folder = mkdtempSync(join(tmpdir(), "hypura-start-"));
try {
  const [model = ""] = await makeFixture("tiny-llama", join(folder, "tiny.gguf"));
  const run = ["run", model, "--prompt", "a", "--max-tokens", "1", "--temp", "0"];
  const versions: number[] = [];
  const firstBytes: number[] = [];
  await time(["version"]);
  await time(run); // unpacks the library
  for (let i = 0; i < runCount; i++) {
    versions.push((await time(["version"])).end);
    firstBytes.push((await time(run)).firstByte);
  }
  const version = median(versions);
  const firstByte = median(firstBytes);
  verdict(version < versionBarMs, `hypura version: ${version.toFixed(1)} ms (bar ${versionBarMs})`);
  verdict(
    firstByte < firstByteBarMs,
    `hypura run, start to first byte: ${firstByte.toFixed(1)} ms (bar ${firstByteBarMs}); median of ${runCount}`,
  );
  for (const [name, args] of [
    ["version", ["version"]],
    ["run", run],
  ] as const) {
    const ends: number[] = [];
    for (let i = 0; i < firstStarts; i++) {
      ends.push((await timeFirst(args, folder)).end);
    }
    const end = median(ends);
    verdict(
      end < firstStartBarMs,
      `hypura ${name}, very first start to its end: ${end.toFixed(0)} ms (bar ${firstStartBarMs}); median of ${firstStarts}`,
    );
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}

// What a release costs against a build for this machine: each of the release's libraries that this processor can run,
// paired with build/native's, on SmolLM2, prompt and decode. The best variant has a bar and the pairs that it takes to judge by
// it; the lesser ones are shown for what they are worth. Wants a quiet machine, and `bun run release` before it.
//
//   bun test/bench/variants.ts [pairs] [threads]

import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { compilerFor } from "../../ffi/cross";
import { libraryName } from "../../ffi/library";
import { processorFeatures } from "../../ffi/processor";
import { type Target, type TargetName, targets } from "../../ffi/targets";
import { readMachine } from "../../src/machine";
import { smolLm2OrSkip } from "../models";
import { median, verdict } from "./measure";

const bar = 0.98;
const bestPairs = Number(process.argv[2] ?? 16);
const lesserPairs = Math.min(bestPairs, 4);
const threads = process.argv[3] ?? String(readMachine().computeCores);
const root = join(import.meta.dir, "..", "..");
const program = join(root, "dist", "hypura");
const prompt = "The history of the city begins with a small harbour and the people who built it. ".repeat(20);

interface Speeds {
  readonly prompt: number;
  readonly decode: number;
}

async function measure(model: string, library: string, home: string): Promise<Speeds> {
  const words = ["run", model, "--raw", "--prompt", prompt, "--max-tokens", "256", "--temp", "0"];
  const child = Bun.spawn([program, ...words, "--threads", threads, "--mode", "resident", "--json"], {
    env: { ...process.env, HYPURA_LIB: library, HYPURA_HOME: home },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const [out, err] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  if ((await child.exited) !== 0) {
    throw new Error(`hypura with ${library} failed: ${err}`);
  }
  const { timings } = JSON.parse(out) as {
    readonly timings: Readonly<
      Record<"promptTokens" | "promptSeconds" | "generatedTokens" | "generatedSeconds", number>
    >;
  };
  return {
    prompt: timings.promptTokens / timings.promptSeconds,
    decode: timings.generatedTokens / timings.generatedSeconds,
  };
}

interface Built {
  readonly name: string;
  readonly file: string;
}

/** The release's libraries that this processor can run, best first. */
function builtVariants(target: Target): readonly Built[] {
  const folder = join(root, "build", "cross", `${target.name}-${compilerFor(target)}`, "native");
  const features = processorFeatures();
  return target.variants
    .filter(({ needs }) => needs.every((need) => features?.has(need) === true))
    .map(({ name, flags }) => ({
      name,
      file: join(folder, flags === null ? libraryName : libraryName.replace(".", `-${name}.`)),
    }))
    .filter(({ file }) => existsSync(file));
}

async function compare(
  model: string,
  native: string,
  variants: readonly Built[],
  home: string,
): Promise<void> {
  for (const [index, { name, file }] of variants.entries()) {
    const ratios: Record<keyof Speeds, number[]> = { prompt: [], decode: [] };
    const speeds: Record<keyof Speeds, number[]> = { prompt: [], decode: [] };
    const pairCount = index === 0 ? bestPairs : lesserPairs;
    for (let pair = 0; pair < pairCount; pair++) {
      // Each goes first in every other pair: whatever the first one of two pays is paid by both.
      const order = pair % 2 === 0 ? [native, file] : [file, native];
      const measured = new Map<string, Speeds>();
      for (const library of order) {
        measured.set(library, await measure(model, library, home));
      }
      for (const kind of ["prompt", "decode"] as const) {
        const own = measured.get(file)?.[kind] ?? Number.NaN;
        speeds[kind].push(own);
        ratios[kind].push(own / (measured.get(native)?.[kind] ?? Number.NaN));
      }
    }
    for (const kind of ["prompt", "decode"] as const) {
      const ratio = median(ratios[kind]);
      const figures = `${name}, ${kind}: ${(ratio * 100).toFixed(1)} % of the native build, ${median(speeds[kind]).toFixed(1)} tok/s, median of ${pairCount} pairs, ${threads} threads`;
      if (index === 0) {
        verdict(ratio >= bar, `${figures} (bar ${bar * 100} %)`);
      } else {
        console.log(`         ${figures}`);
      }
    }
  }
}

const target = targets[`${process.platform}-${process.arch}` as TargetName] as Target | undefined;
const variants = target === undefined ? [] : builtVariants(target);
const native = join(root, "build", "native", libraryName);
if (variants.length === 0 || !existsSync(native) || !existsSync(program)) {
  console.error("!!! SKIPPED: the release's libraries are not built (bun run build, bun run release)");
  process.exit(0);
}
const model = await smolLm2OrSkip();
if (model !== null) {
  const home = mkdtempSync(join(tmpdir(), "hypura-variants-"));
  try {
    await compare(model, native, variants, home);
  } finally {
    rmSync(home, { recursive: true, force: true });
  }
}

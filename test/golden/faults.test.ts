// Under any read fault an answer is right or an error that names the file and the offset; the next one is right.

import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { makePlan, noLimits, type Plan } from "../../src/plan";
import { makeFixture } from "../fixtures";

const program = join(import.meta.dir, "..", "..", "build", "native", "hypura-faults");
const folder = mkdtempSync(join(tmpdir(), "hypura-faults-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Together they make the soak's 10,000 and the usual run's 500. */
const kinds = ["tiny-mixtral", "tiny-llama", "tiny-mixed", "tiny-gpt-oss"] as const;
const runsPerKind = process.env["HYPURA_SOAK"] === "1" ? 2500 : 125;

interface Tally {
  readonly runs: number;
  readonly equal: number;
  readonly errors: number;
  readonly wrong: number;
}

/** A pool so small that every pass reads, and one compute thread, so that a busy machine does not slow it down. */
function starved(plan: Plan): Plan {
  if (plan.streaming === null) {
    throw new Error("the plan does not stream");
  }
  const classes = plan.streaming.classes.map((one) => ({
    ...one,
    slotCount: Math.min(one.slotCount, 4),
    policy: { ...one.policy, pinnedSlots: Math.min(one.policy.pinnedSlots, 1) },
  }));
  const reader = { ...plan.streaming.reader, retryWaitNs: 10_000 };
  return { ...plan, decodeThreads: 1, prefillThreads: 1, streaming: { ...plan.streaming, classes, reader } };
}

if (!existsSync(program)) {
  console.error(`SKIPPED, ${program} is not built: bun ffi/build.ts --reference`);
}

describe.skipIf(!existsSync(program))("read faults", () => {
  test.each(kinds)("%s", async (kind) => {
    const path = join(folder, `${kind}.gguf`);
    await makeFixture(kind, path, {});
    const file = openModelFile(path);
    const plan = makePlan({ name: kind, files: file.files, model: file.model }, readMachine(), {
      ...noLimits,
      contextTokens: 256,
      mode: "stream",
    });
    const planFile = join(folder, `${kind}.json`);
    writeFileSync(planFile, JSON.stringify(starved(plan)));
    const child = Bun.spawn([program, planFile, "3,40,77,99", "4", String(runsPerKind), "7"], {
      stdout: "pipe",
      stderr: "pipe",
    });
    const [out, err] = await Promise.all([
      new Response(child.stdout).text(),
      new Response(child.stderr).text(),
    ]);
    expect(err).toBe("");
    const tally = JSON.parse(out) as Tally;
    console.error(`${kind}: ${out.trim()}`);
    expect(tally.wrong).toBe(0);
    expect(tally.equal + tally.errors).toBe(runsPerKind);
    // Both outcomes must have happened, or the faults did not reach the engine.
    expect(tally.equal).toBeGreaterThan(0);
    expect(tally.errors).toBeGreaterThan(0);
    expect(await child.exited).toBe(0);
  });
});

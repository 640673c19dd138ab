// hypura-abi (abi_test.cpp) on a resident and on a streaming plan. The soak names a sanitised build of it in
// HYPURA_ABI.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { planOf } from "../engine/tiny";
import { makeFixture } from "../fixtures";

const program =
  process.env["HYPURA_ABI"] ?? join(import.meta.dir, "..", "..", "build", "native", "hypura-abi");

const hasProgram = existsSync(program);
if (!hasProgram) {
  console.error(`!!! SKIPPED: ${program} is not built (bun ffi/build.ts --native-only --reference)`);
}

describe.skipIf(!hasProgram)("the engine through hypura.h alone", () => {
  let folder = "";
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "hypura-abi-"));
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  test.each(["resident", "stream"] as const)("%s", async (mode) => {
    const [path = ""] = await makeFixture("tiny-qwen3moe", join(folder, `${mode}.gguf`));
    const plan = join(folder, `${mode}.json`);
    writeFileSync(plan, JSON.stringify(planOf(path, { mode, slotCount: 2, contextTokens: 512 })));
    const child = Bun.spawn([program, plan], {
      stdout: "pipe",
      stderr: "pipe",
      timeout: 300_000,
      killSignal: "SIGKILL",
    });
    const [out, err] = await Promise.all([
      new Response(child.stdout).text(),
      new Response(child.stderr).text(),
    ]);
    expect([await child.exited, out, err]).toEqual([0, "right\n", expect.any(String)]);
  });
});

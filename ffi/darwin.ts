// The Darwin check: every native file of ours compiled for macOS on whatever machine this is, by zig, with our warnings
// as errors; nothing of llama.cpp is compiled. What it cannot show: that the program runs, and anything that needs
// Apple's SDK, which is nothing of ours (Metal and Accelerate are llama.cpp's).
//
//   bun ffi/darwin.ts [--link]
//     --link   also llama.cpp: the whole libhypura.dylib for the CPU, and the executable (some ten minutes the first time)

import { existsSync } from "node:fs";
import { join } from "node:path";
import { buildTargets, say } from "./cmake";
import { buildLibraries, configureFor } from "./cross";
import { makeExecutable } from "./executable";
import { signatureFault } from "./macho";
import { targets } from "./targets";

const darwin = targets["darwin-arm64"];

/** Throws with the compiler's words; ZigError where there is no compiler. */
export async function compileForDarwin(): Promise<void> {
  await buildTargets(await configureFor(darwin, "zig"), ["hypura_data", "hypura_engine"]);
}

/** Links libhypura.dylib of every variant and makes the executable, and checks the signature of each. */
export async function linkForDarwin(): Promise<void> {
  const libraries = await buildLibraries(darwin, "zig");
  for (const { file } of libraries) {
    const fault = existsSync(file) ? signatureFault(file) : "it is not there";
    if (fault !== null) {
      throw new Error(`${file}: ${fault}`);
    }
  }
  const outfile = join(import.meta.dir, "..", "build", "cross", "hypura-darwin-arm64");
  await makeExecutable({ libraries, outfile, bunTarget: darwin.bun }); // throws where its signature does not hold
}

if (import.meta.main) {
  try {
    await (process.argv.includes("--link") ? linkForDarwin() : compileForDarwin());
    say("macOS: compiled");
  } catch (error) {
    say((error as Error).message);
    process.exit(1);
  }
}

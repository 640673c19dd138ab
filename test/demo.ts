// The demonstration: from a fresh clone to a real language model that answers through dist/hypura.

import { join } from "node:path";
import { build } from "../ffi/build";
import { fetchSmolLm2 } from "./fixtures/smollm2";

const root = join(import.meta.dir, "..");
const started = performance.now();

try {
  await build();
  const model = await fetchSmolLm2(join(root, "build", "models"));
  const command = [
    join(root, "dist", "hypura"),
    "run",
    model,
    "--prompt",
    "Why is the sky blue?",
    "--max-tokens",
    "80",
    "--seed",
    "1",
  ];
  console.error(
    `\n$ ${command.map((word) => (/[ ?]/.test(word) ? JSON.stringify(word) : word)).join(" ")}\n`,
  );
  const status = await Bun.spawn(command, { stdin: "ignore", stdout: "inherit", stderr: "inherit" }).exited;
  console.error(
    `\nthe demo took ${Math.round((performance.now() - started) / 1000)} s; try: dist/hypura help`,
  );
  process.exit(status);
} catch (error) {
  console.error((error as Error).message);
  process.exit(1);
}

// `hypura version`: which hypura, and which llama.cpp is in it. Loads no native code, so it answers at once.

import packageJson from "../../package.json";
import pin from "../../vendor/llama.json";
import { command } from "./command";
import { print } from "./terminal";

export const versionCommand = command(
  {
    meta: { name: "version", description: "Show the version of hypura and of llama.cpp in it" },
    args: { json: { type: "boolean", description: "Print one JSON object" } },
    async run({ args }) {
      const facts = {
        hypura: packageJson.version,
        llama: pin.release,
        bun: Bun.version,
        platform: `${process.platform}-${process.arch}`,
      };
      const line = `hypura ${facts.hypura} (llama.cpp ${facts.llama}, Bun ${facts.bun}, ${facts.platform})`;
      await print(`${args.json === true ? JSON.stringify(facts) : line}\n`);
    },
  },
  { examples: ["hypura version", "hypura version --json"] },
);

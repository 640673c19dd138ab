// Tiny models for tests of the engine: the plan for one, and what one answers.

import type { Engine } from "../../src/engine";
import { readMachine } from "../../src/machine";
import { openModelFile } from "../../src/modelfile";
import { makePlan, noLimits, type Plan, type PlanLimits } from "../../src/plan";

export function planOf(path: string, limits: Partial<PlanLimits> = {}): Plan {
  const file = openModelFile(path);
  return makePlan({ name: "tiny", files: file.files, model: file.model }, readMachine(), {
    ...noLimits,
    contextTokens: 1024,
    threads: 1, // more spin where tests share their cores
    ...limits,
  });
}

interface Completion {
  readonly content: string;
  readonly tokens: readonly number[];
}

/** The greedy continuation of a few tokens; control tokens do not end it. */
export async function answerOf(engine: Engine, tokenCount = 12): Promise<Completion> {
  let last: Completion | undefined;
  const body = { ...endlessBody(tokenCount), stream: false, return_tokens: true };
  for await (const { data } of engine.request("POST /completion", body)) {
    last = data as Completion;
  }
  if (last === undefined) {
    throw new Error("the engine answered nothing");
  }
  return { content: last.content, tokens: last.tokens };
}

/** A greedy request that streams and goes on to `tokenCount`. */
export function endlessBody(tokenCount: number) {
  return {
    prompt: [5, 40, 77, 114],
    n_predict: tokenCount,
    temperature: 0,
    ignore_eos: true,
    cache_prompt: false,
    stream: true,
  };
}

// A thousand readers that leave at random moments: before the first byte, in the prompt, between chunks, with others
// waiting for their slot. Afterwards nothing of them is left, and the next answer is the right one.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, openEngine } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import { makeFixture } from "../fixtures";
import { openRandom, type Random } from "../fixtures/random";
import { held, residentBytes, until, untilHeldAtMost } from "./process";
import { answerOf, endlessBody, planOf } from "./tiny";

const requestCount = 1000;
/** Twice as many as there are slots: half of the requests wait for one when they are left. */
const readerCount = 8;
/** By then every thread has run and the allocators have seen the most that is asked of them. */
const settledAfter = 200;

let folder = "";
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "hypura-cancel-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** How a request is left. */
type Leaving = "at once" | "after a moment" | "after some chunks" | "by break" | "not at all";

const leavings: readonly Leaving[] = [
  "at once",
  "after a moment",
  "after a moment",
  "after some chunks",
  "by break",
  "not at all",
];

function bodyOf(random: Random): object {
  const prompt = Array.from({ length: random.pick([1, 4, 60, 200]) }, () => 3 + random.below(200));
  const body = { ...endlessBody(random.pick([1, 20, 120])), prompt, stream: random.below(8) > 0 };
  return random.below(2) === 0 ? body : { ...body, cache_prompt: true, temperature: 1, seed: random.u32() };
}

async function requestAndLeave(engine: Engine, random: Random, leaving: Leaving): Promise<void> {
  const abort = new AbortController();
  // Whoever stays takes a short answer.
  const body = leaving === "not at all" ? { ...bodyOf(random), n_predict: 3 } : bodyOf(random);
  const chunks = engine.request("POST /completion", body, abort.signal);
  const most = 1 + random.below(6);
  const timer =
    leaving === "after a moment" ? setTimeout(() => abort.abort(), random.below(1 << random.below(6))) : null;
  if (leaving === "at once") {
    abort.abort();
  }
  try {
    let count = 0;
    for await (const _ of chunks) {
      count++;
      if (count === most && leaving === "by break") {
        break;
      }
      if (count === most && leaving === "after some chunks") {
        abort.abort();
      }
    }
  } catch (error) {
    expect(error).toBeInstanceOf(HypuraError);
    expect((error as HypuraError).code).toBe("cancelled");
  } finally {
    if (timer !== null) {
      clearTimeout(timer);
    }
  }
}

test.each(["resident", "stream"] as const)(
  "a thousand requests are left at random moments, %s",
  async (mode) => {
    const random = openRandom(20_251_121);
    const path = join(folder, `${mode}.gguf`);
    await makeFixture("tiny-qwen3moe", path);
    const engine = await openEngine(planOf(path, { mode, slotCount: 4, contextTokens: 512 }));
    try {
      const expected = await answerOf(engine, 30);
      const idle = () =>
        until(
          () => engine.activeRequests() === 0,
          () => `${engine.activeRequests()} requests are active`,
        );
      let started = 0;
      async function readUntil(last: number): Promise<void> {
        while (started < last) {
          started++;
          await requestAndLeave(engine, random, random.pick(leavings));
        }
      }
      const readers = (last: number) =>
        Promise.all(Array.from({ length: readerCount }, () => readUntil(last)));

      await readers(settledAfter);
      await idle();
      const before = held();
      const bytesBefore = residentBytes();
      await readers(requestCount);
      await idle();

      expect(started).toBe(requestCount);
      await untilHeldAtMost(before);
      // JavaScript's heap breathes; what native code lost would not come back.
      await until(
        () => residentBytes() < bytesBefore * 1.05,
        () => `resident memory grew from ${bytesBefore} to ${residentBytes()} bytes in 800 requests`,
      );
      expect(await answerOf(engine, 30)).toEqual(expected);
    } finally {
      await engine.close();
    }
  },
);

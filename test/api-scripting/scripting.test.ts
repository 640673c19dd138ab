// hypura as a library: the README's example runs as it stands there, and a reply keeps what its type promises.

import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Model, type ModelOptions, open, PromptTooLongError } from "../../src/api";
import { endlessModel, environment, root, scratchFolder, smolLm2, tinyModel } from "../cli/program";

const folder = scratchFolder();
const tiny = await tinyModel(folder);
const endless = await endlessModel(folder);
const short = { temperature: 0, maxTokens: 8 } as const;

function openTiny(options: ModelOptions = {}): Promise<Model> {
  return open(tiny, { threads: 1, contextTokens: 512, ...options });
}

/** Scripts resolve "hypura" from inside the package; outside of it they would depend on it. */
function scriptFolder(): string {
  const path = join(root, "build", `script-test-${process.pid}`);
  mkdirSync(path, { recursive: true });
  afterAll(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

test("the README's example", async () => {
  const blocks = [...readFileSync(join(root, "README.md"), "utf8").matchAll(/```ts\n([\s\S]*?)```/g)];
  const example = blocks[0]?.[1] ?? "";
  expect(blocks).toHaveLength(1);
  expect(example).toContain('from "hypura"');
  expect(example.trim().split("\n").length).toBeLessThanOrEqual(11);
  const model = (await smolLm2()) ?? tiny;
  const file = join(scriptFolder(), "my-script.ts");
  writeFileSync(file, example.replace(/open\("[^"]*"/, `open(${JSON.stringify(model)}`));
  const child = Bun.spawn([process.execPath, "run", file], {
    cwd: root,
    env: { ...environment },
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  expect([await child.exited, stderr]).toEqual([0, ""]);
  expect(stdout).toMatch(/\S[\s\S]*\n[\s\S]*\d+(\.\d+)? tok\/s/);
}, 120_000);

describe("a reply", () => {
  test("is the same as text, as pieces and as an answer", async () => {
    await using model = await openTiny();
    let text = "";
    const streamed = model.chat("Hello", short);
    for await (const part of streamed) {
      text += part;
    }
    const answer = await streamed.answer();
    expect(answer.text).toBe(text);
    expect(text).not.toBe("");
    expect(answer.timings.generatedTokens).toBeGreaterThan(0);
    expect((await model.chat("Hello", short).answer()).text).toBe(text);
    const types: string[] = [];
    for await (const piece of model.chat([{ role: "user", content: "Hello" }], short).pieces()) {
      types.push(piece.type);
    }
    expect(types.at(-1)).toBe("end");
  });

  test("that nobody reads does not start, and one that is read twice says so", async () => {
    await using model = await openTiny();
    model.chat("Hello", short);
    const reply = model.generate("Once upon", short);
    await reply.answer();
    await expect(reply.answer()).resolves.toMatchObject({ finish: expect.any(String) });
    expect(() => reply.pieces()).toThrow(/read once/);
  });

  test("stops when its loop is left, and keeps what came", async () => {
    await using model = await open(endless, { threads: 1, contextTokens: 60_160 });
    const reply = model.generate("Once upon", { temperature: 0 });
    let parts = 0;
    for await (const _ of reply) {
      if (++parts === 5) {
        break;
      }
    }
    const answer = await reply.answer();
    expect(answer.finish).toBe("cancelled");
    expect(answer.text).not.toBe("");
    expect(answer.timings.generatedTokens).toBeLessThan(10_000);
    // The model is free again.
    expect((await model.generate("More", short).answer()).finish).toBe("length");
  });

  test("stops by its signal", async () => {
    await using model = await open(endless, { threads: 1, contextTokens: 60_160 });
    const stop = new AbortController();
    const reply = model.generate("Once upon", { temperature: 0, signal: stop.signal });
    let text = "";
    for await (const part of reply) {
      text += part;
      stop.abort();
    }
    expect(await reply.answer()).toMatchObject({ finish: "cancelled", text });
    const early = await model.generate("Once upon", { signal: AbortSignal.abort() }).answer();
    expect(early).toMatchObject({ finish: "cancelled", text: "" });
  });

  test("fails with a typed error, in the loop and in answer()", async () => {
    await using model = await openTiny();
    const long = "far too long ".repeat(500);
    const reply = model.chat(long);
    const failure = await (async () => {
      for await (const _ of reply) {
        // never
      }
    })().catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PromptTooLongError);
    expect(failure).toMatchObject({ code: "request", status: 400, contextTokens: 512 });
    await expect(reply.answer()).rejects.toBe(failure);
  });

  test("waits for its turn, or not with `parallel`", async () => {
    await using model = await openTiny({ parallel: 2 });
    const replies = await Promise.all(["a", "b", "c"].map((text) => model.chat(text, short).answer()));
    for (const { text } of replies) {
      expect(text).not.toBe("");
    }
    expect(model.plan.slotCount).toBe(2);
  });
});

describe("open", () => {
  test("refuses with the codes of the command line", async () => {
    await expect(open(join(folder, "none.gguf"))).rejects.toMatchObject({ code: "not-found" });
    await expect(open(tiny, { memoryBytes: 1000 })).rejects.toMatchObject({ code: "not-enough-memory" });
    await expect(open(tiny, { threads: 0.5 })).rejects.toMatchObject({ code: "usage" });
  });

  test("says how it goes, and what it opened", async () => {
    const fractions: number[] = [];
    await using model = await openTiny({ onProgress: (fraction) => fractions.push(fraction) });
    expect(fractions.at(-1)).toBe(1);
    expect(model).toMatchObject({ name: "tiny", contextTokens: 512, hasChatTemplate: true });
  });

  test("a closed model answers no more", async () => {
    const model = await openTiny();
    await model.close();
    await model.close();
    await expect(model.chat("Hello").answer()).rejects.toThrow(/closed/);
  });
});

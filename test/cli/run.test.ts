// `hypura run` as a user meets it: where prompts come from, what each flag does to the answer, what goes to which
// stream, and Ctrl-C. The tiny model talks noise, so everything is judged by counts, equality and difference.

import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import type { GuessSummary } from "../../src/guesses";
import { endlessModel, environment, eventually, hypura, program, scratchFolder, tinyModel } from "./program";

const folder = scratchFolder();
const model = await tinyModel(folder);
const endless = await endlessModel(folder);
/** Two threads that wait for each other crawl on a machine that is busy with something else. */
const one = ["--threads", "1"];
const greedy = ["--temp", "0", "--max-tokens", "12", ...one];

interface JsonAnswer {
  readonly text: string;
  readonly thinking: string;
  readonly finish: string;
  readonly mode: string;
  readonly timings: Readonly<Record<"cachedTokens" | "promptTokens" | "generatedTokens", number>>;
  readonly peakBytes: number;
  readonly guesses: GuessSummary | null;
}

async function answer(args: readonly string[], stdin = "", path = model): Promise<JsonAnswer> {
  const outcome = await hypura(["run", path, "--json", ...one, ...args], { stdin });
  expect(outcome.stderr).toBe("");
  expect(outcome.status).toBe(0);
  return JSON.parse(outcome.stdout) as JsonAnswer;
}

describe("the prompt", () => {
  test("is the same from a flag, a file and stdin", async () => {
    const text = "Why is the sky blue?";
    const file = join(folder, "prompt.txt");
    writeFileSync(file, text);
    const expected = await answer(["--prompt", text, ...greedy]);
    expect(expected.text).not.toBe("");
    const same = [
      await answer([`-p=${text}`, ...greedy]),
      await answer(["--prompt-file", file, ...greedy]),
      await answer(greedy, text),
      await answer(["--prompt", "-", ...greedy], text),
    ];
    for (const { text: said } of same) {
      expect(said).toBe(expected.text);
    }
  });

  test("may look like a flag", async () => {
    const plain = await answer(["--prompt", "--no-json", ...greedy]);
    const other = await answer(["--prompt=--help", ...greedy]);
    expect(plain.timings.promptTokens).toBeGreaterThan(0);
    expect(other.timings.promptTokens).toBeGreaterThan(0);
  });

  test("is wrapped by the chat template, and not with --raw", async () => {
    const wrapped = await answer(["--prompt", "hello", ...greedy]);
    const raw = await answer(["--prompt", "hello", "--raw", ...greedy]);
    const withSystem = await answer([
      "--prompt",
      "hello",
      "--system",
      "You are a very terse poet.",
      ...greedy,
    ]);
    expect(raw.timings.promptTokens).toBeLessThan(wrapped.timings.promptTokens);
    expect(withSystem.timings.promptTokens).not.toBe(wrapped.timings.promptTokens);
  });

  test("given as a flag leaves a stdin alone that never ends", async () => {
    const outcome = await hypura(["run", model, "--prompt", "hi", ...greedy], { keepStdinOpen: true });
    expect(outcome.status).toBe(0);
  });
});

describe("flags", () => {
  test("--max-tokens counts", async () => {
    const { finish, timings } = await answer(
      ["--prompt", "hi", "--max-tokens", "7", "--temp", "0"],
      "",
      endless,
    );
    expect([finish, timings.generatedTokens]).toEqual(["length", 7]);
  });

  test("--seed repeats an answer and another seed does not", async () => {
    const hot = ["--prompt", "hi", "--temp", "1.5", "--max-tokens", "24"];
    const [first, again, other] = [
      await answer([...hot, "--seed", "7"]),
      await answer([...hot, "--seed", "7"]),
      await answer([...hot, "--seed", "8"]),
    ];
    expect(again.text).toBe(first.text);
    expect(other.text).not.toBe(first.text);
  });

  test("--top-k 1, --top-p 0 and --min-p 1 are all greedy at any temperature", async () => {
    const { text } = await answer(["--prompt", "hi", ...greedy]);
    const hot = ["--prompt", "hi", "--temp", "1.5", "--max-tokens", "12", "--seed", "3"];
    expect((await answer(hot)).text).not.toBe(text);
    for (const flag of ["--top-k=1", "--top-p=0", "--min-p=1"]) {
      expect([flag, (await answer([...hot, flag])).text]).toEqual([flag, text]);
    }
  });

  test("--stop ends before any of its texts", async () => {
    const { text } = await answer(["--prompt", "hi", "--temp", "0", "--max-tokens", "40"]);
    const stop = text.slice(10, 13);
    const cut = await answer([
      "--prompt",
      "hi",
      "--temp",
      "0",
      "--max-tokens",
      "40",
      "--stop",
      "never said",
      "--stop",
      stop,
    ]);
    expect(cut.text).toBe(text.slice(0, text.indexOf(stop)));
    expect(cut.finish).toBe("stop");
  });

  test("--context ends the answer when it is full", async () => {
    const outcome = await hypura([
      "run",
      endless,
      "--prompt",
      "hi",
      "--context",
      "256",
      "--temp",
      "0",
      ...one,
    ]);
    expect(outcome.stderr).toMatch(/the context of 256 tokens is full/);
    expect(outcome.status).toBe(0);
  });

  test("--context beyond the training is said and cut", async () => {
    const outcome = await hypura(["run", model, "--prompt", "hi", ...greedy, "--context", "50000"]);
    expect(outcome.stderr).toMatch(/^warning: .*trained for 2,048 tokens.*50000 is taken as 2048\n/);
    expect(outcome.stderr.trimEnd().split("\n")).toHaveLength(2);
    expect(outcome.status).toBe(0);
  });

  test("--verbose says what was decided and why", async () => {
    const { stderr } = await hypura([
      "run",
      model,
      "--prompt",
      "hi",
      ...greedy,
      "--verbose",
      "--threads",
      "1",
    ]);
    expect(stderr).toMatch(/^mode: full-resident \(.*fit in.*\)$/m);
    expect(stderr).toMatch(/^threads: 1 \(asked for\)$/m);
  });
});

describe("streams", () => {
  test("the answer alone is on stdout, one line of numbers on stderr, no colour in either", async () => {
    const args = ["--prompt", "hi", ...greedy];
    const { text } = await answer(args);
    const outcome = await hypura(["run", model, ...args]);
    expect(outcome.stdout).toBe(`${text}\n`);
    expect(outcome.stderr).toMatch(
      /^12 tokens at [\d.]+ tok\/s(?: \([\d.]+ tok\/s predicted\))?, prompt \d+ at [^\n]+full-resident: [^\n]+\n$/,
    );
    expect(outcome.stderr).not.toContain("\x1b");
  });

  test("--json holds the numbers too", async () => {
    const { mode, thinking, peakBytes, timings } = await answer(["--prompt", "hi", ...greedy]);
    expect([mode, thinking]).toEqual(["full-resident", ""]);
    expect(peakBytes).toBeGreaterThan(20_000_000);
    expect(timings.generatedTokens).toBe(12);
  });

  test("guesses are told by source, in the numbers and in a line of their own", async () => {
    const asked = ["--prompt", "one two three ".repeat(12), "--temp", "0", "--max-tokens", "64"];
    const { guesses } = await answer([...asked, "--speculation", "4"], "", endless);
    const { passes = 0, drafted = 0, accepted = 0, sources, bound } = guesses ?? {};
    expect(drafted).toBeGreaterThan(0);
    expect(passes).toBe(63 - accepted);
    expect(sources?.context).toEqual({ drafted, accepted });
    expect(sources?.draft.drafted).toBe(0);
    expect(bound).toBeNull(); // nothing is read for a pass
    const { guesses: none } = await answer(asked, "", endless);
    expect(none).toBeNull();
    const told = await hypura(["run", endless, ...asked, "--speculation", "4", ...one]);
    expect(told.stderr.trim().split("\n").at(-1)).toBe(
      `${passes} passes of ${(63 / passes).toFixed(2)} tokens, ${accepted} of ${drafted} guesses from the context right`,
    );
  });
});

describe("Ctrl-C", () => {
  const args = [
    "run",
    endless,
    "--prompt",
    "hi",
    "--context",
    "60000",
    "--max-tokens",
    "50000",
    "--temp",
    "0",
    ...one,
  ];

  async function interrupted(
    more: readonly string[],
    isAnswering: (stdout: string, stderr: string) => boolean,
  ) {
    const child = Bun.spawn([...program, ...args, ...more], {
      env: { ...environment },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    const [stdout, stderr] = [followed(child.stdout), followed(child.stderr)];
    await eventually(
      () => (isAnswering(stdout.text(), stderr.text()) ? true : undefined),
      () => `stdout ${JSON.stringify(stdout.text())}, stderr ${JSON.stringify(stderr.text())}`,
    );
    child.kill("SIGINT");
    const [status] = await Promise.all([child.exited, stdout.end, stderr.end]);
    return { status, stdout: stdout.text(), stderr: stderr.text() };
  }

  function followed(stream: ReadableStream<Uint8Array>) {
    let text = "";
    const decoder = new TextDecoder();
    const end = (async () => {
      for await (const chunk of stream) {
        text += decoder.decode(chunk, { stream: true });
      }
    })();
    return { text: () => text, end };
  }

  test("ends the answer where it is, with its numbers", async () => {
    const outcome = await interrupted([], (stdout) => stdout.length > 50);
    expect(outcome.status).toBe(130);
    expect(outcome.stdout.endsWith("\n")).toBe(true);
    expect(outcome.stderr).toMatch(/^[\d,]+ tokens at .*stopped by Ctrl-C\n$/);
  });

  test("and with --json", async () => {
    const outcome = await interrupted(["--json", "--verbose"], (_, stderr) => stderr.includes("loaded: "));
    expect(outcome.status).toBe(130);
    expect(JSON.parse(outcome.stdout).finish).toBe("cancelled");
  });
});

// Every way to go wrong on the command line ends in one line on stderr that says what to do, the documented exit
// status, and no stack trace. The real program, not its functions.

import { describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  environment,
  hypura,
  type Outcome,
  outcomeOf,
  program,
  type RunOptions,
  scratchFolder,
  tinyModel,
} from "./program";

const folder = scratchFolder();
const model = await tinyModel(folder);
const path = (name: string): string => join(folder, name);

const bytes = readFileSync(model);
writeFileSync(path("truncated.gguf"), bytes.subarray(0, bytes.length / 2));
writeFileSync(path("cut-header.gguf"), bytes.subarray(0, 1000));
writeFileSync(path("text.gguf"), "This is a letter and no model.\n".repeat(100));
writeFileSync(path("empty.gguf"), "");
writeFileSync(path("zebra.gguf"), withArchitecture(bytes, "zebra"));
writeFileSync(path("hostile.gguf"), withArchitecture(bytes, "\x1b[2J\n"));
writeFileSync(
  path("lacking.gguf"),
  bytes.toString("latin1").replace("blk.0.ffn_up", "blk.0.ffn_xx"),
  "latin1",
);
writeFileSync(path("latin1.txt"), Uint8Array.of(0x47, 0x72, 0xfc, 0xdf, 0x65));
mkdirSync(path("folder.gguf"));
symlinkSync("loop.gguf", path("loop.gguf"));

/** The file with another word of the same length in general.architecture. */
function withArchitecture(file: Uint8Array, name: string): Uint8Array {
  const copy = Buffer.from(file);
  const key = "general.architecture";
  // The key, then the type (u32) and the length (u64) of its value.
  const at = copy.indexOf(key) + key.length + 12;
  if (copy.toString("latin1", at, at + 5) !== "llama" || name.length !== 5) {
    throw new Error("the fixture is not what this test was written for");
  }
  copy.write(name, at, "latin1");
  return copy;
}

/** What is wrong; the arguments; the exit status; what the line must say, the advice among it. */
type Case = readonly [string, readonly string[], number, RegExp, RunOptions?];

const ask = ["--prompt", "hi", "--max-tokens", "3", "--threads", "1"];

const fileCases: readonly Case[] = [
  [
    "no such file",
    ["run", path("nofile.gguf"), ...ask],
    3,
    /there is no file .*nofile\.gguf.*: check the path/,
  ],
  ["a folder without models", ["run", path("folder.gguf"), ...ask], 2, /is a folder.*: give/],
  ["a folder with models", ["run", folder, ...ask], 2, /is a folder: give one of its files/],
  ["a truncated file", ["run", path("truncated.gguf"), ...ask], 4, /truncated\.gguf.*(download|convert)/],
  ["a truncated header", ["run", path("cut-header.gguf"), ...ask], 4, /cut-header\.gguf.*(download|convert)/],
  ["a text file", ["run", path("text.gguf"), ...ask], 4, /text\.gguf.*(no|not).*GGUF/],
  ["an empty file", ["run", path("empty.gguf"), ...ask], 4, /empty\.gguf.*empty/],
  ["an unknown architecture", ["run", path("zebra.gguf"), ...ask], 4, /zebra/],
  [
    "an architecture that steers the terminal",
    ["run", path("hostile.gguf"), ...ask],
    4,
    /\\u001b\[2J|\\x1b\[2J/,
  ],
  [
    "a model that lacks a tensor",
    ["run", path("lacking.gguf"), ...ask],
    6,
    /cannot load the model \(.*blk\.0\.ffn_up\.weight.*\): .*download or convert it again/,
  ],
  ["a link to itself", ["run", path("loop.gguf"), ...ask], 6, /symbolic link.*: mend/],
  ["a device", ["run", "/dev/null", ...ask], 4, /give the path of a \.gguf file/],
  [
    "too little memory",
    ["run", model, "--memory", "90M", ...ask],
    5,
    /90\.0 MB are allowed by --memory.*too few: /,
  ],
  ["inspect: no such file", ["inspect", path("nofile.gguf")], 3, /check the path/],
  ["inspect: a truncated file", ["inspect", path("truncated.gguf")], 4, /truncated\.gguf/],
  ["inspect: an empty file", ["inspect", path("empty.gguf")], 4, /empty/],
];

const flagCases: readonly Case[] = [
  ["an unknown command", ["rnu", model], 2, /there is no command "rnu": did you mean `hypura run`\?/],
  ["a command like nothing", ["xylophone"], 2, /`hypura help` lists/],
  ["help for an unknown command", ["help", "inspct"], 2, /did you mean `hypura inspect`\?/],
  ["no model", ["run"], 2, /needs a MODEL: see `hypura help run`/],
  [
    "an unknown flag",
    ["run", model, "--max-token", "5"],
    2,
    /has no option "--max-token": did you mean --max-tokens\?/,
  ],
  ["a flag without its value", ["run", model, "--prompt"], 2, /--prompt needs a value/],
  ["a value for a switch", ["run", model, ...ask, "--json=maybe"], 2, /--json takes no value/],
  [
    "a loose argument",
    ["run", model, "hello"],
    2,
    /"hello" is one argument too many: give the question as --prompt/,
  ],
  ["negative temperature", ["run", model, ...ask, "--temp", "-1"], 2, /--temp "-1": give a number from 0/],
  ["no number", ["run", model, ...ask, "--top-k", "many"], 2, /--top-k "many": give a whole number/],
  [
    "a fraction of a token",
    ["run", model, "--prompt", "hi", "--max-tokens", "1.5"],
    2,
    /--max-tokens "1\.5": give a whole/,
  ],
  ["no tokens", ["run", model, "--prompt", "hi", "--max-tokens=0"], 2, /--max-tokens "0"/],
  [
    "a probability above one",
    ["run", model, ...ask, "--top-p", "1.01"],
    2,
    /--top-p "1\.01": give a number from 0 to 1/,
  ],
  ["a negative probability", ["run", model, ...ask, "--min-p", "-0.1"], 2, /--min-p "-0\.1"/],
  ["not a number at all", ["run", model, ...ask, "--top-p", "NaN"], 2, /--top-p "NaN"/],
  ["infinity", ["run", model, ...ask, "--temp", "Infinity"], 2, /--temp "Infinity"/],
  ["an empty number", ["run", model, ...ask, "--seed="], 2, /--seed ""/],
  ["a seed of 2^32", ["run", model, ...ask, "--seed", "4294967296"], 2, /--seed "4294967296"/],
  ["an absurd context", ["run", model, ...ask, "--context", "1e30"], 2, /--context "1e30"/],
  ["no threads", ["run", model, ...ask, "--threads", "0"], 2, /--threads "0"/],
  [
    "a size that is none",
    ["run", model, ...ask, "--memory", "lots"],
    2,
    /--memory "lots": give a size such as/,
  ],
  ["no memory", ["run", model, ...ask, "--memory", "0"], 2, /--memory "0"/],
  ["an empty stop text", ["run", model, ...ask, "--stop="], 2, /--stop.*empty.*: give/],
  ["two prompts", ["run", model, ...ask, "--prompt-file", model], 2, /both given: give one/],
  ["an empty prompt", ["run", model, "--prompt", ""], 2, /the prompt is empty.*: give a question/],
  ["a prompt of blanks", ["run", model, "--prompt", " \n"], 2, /the prompt is empty/],
  ["nothing on stdin", ["run", model], 2, /the prompt is empty \(stdin\)/],
  [
    "a missing prompt file",
    ["run", model, "--prompt-file", path("none.txt")],
    3,
    /there is no prompt file.*: check/,
  ],
  ["a prompt file that is a folder", ["run", model, "--prompt-file", folder], 6, /cannot be read/],
  [
    "a prompt that is no UTF-8",
    ["run", model, "--prompt-file", path("latin1.txt")],
    2,
    /not UTF-8 text: convert/,
  ],
  ["stdin that is no UTF-8", ["run", model], 2, /stdin is not UTF-8/, { stdin: Uint8Array.of(0xff, 0xfe) }],
  ["chat and --json", ["run", model, "--interactive", "--json"], 2, /--json prints one answer/],
  ["chat and --raw", ["run", model, "--interactive", "--raw"], 2, /--raw continues a text/],
  ["chat and stdin twice", ["run", model, "--interactive", "--prompt", "-"], 2, /leave out one/],
  ["--raw with --system", ["run", model, ...ask, "--raw", "--system", "x"], 2, /--system has no place/],
  [
    "a prompt longer than the context",
    ["run", model, "--threads", "1", "--context", "256", "--prompt", "a long story ".repeat(300)],
    6,
    /the prompt has [\d,]+ tokens and the context holds 256: .*--context \d+/,
  ],
];

function expectOneLine(outcome: Outcome, status: number, says: RegExp): void {
  const { stderr } = outcome;
  expect(stderr).toMatch(/^error: [^\n]+\n$/);
  expect(stderr).toMatch(says);
  expect(stderr).not.toMatch(/\n\s+at |Error:|\x1b|mistake in hypura/);
  expect(outcome.status).toBe(status);
}

describe("files", () => {
  for (const [name, args, status, says, options] of fileCases) {
    test(name, async () => {
      const outcome = await hypura(args, options);
      expectOneLine(outcome, status, says);
      expect(outcome.stdout).toBe("");
    });
  }
});

describe("flags", () => {
  for (const [name, args, status, says, options] of flagCases) {
    test(name, async () => {
      const outcome = await hypura(args, options);
      expectOneLine(outcome, status, says);
      expect(outcome.stdout === "").toBe(!args.includes("--json"));
    });
  }
});

test("--json puts the error on stdout too, for the same exit status", async () => {
  for (const [args, status, code] of [
    [["run", path("nofile.gguf"), ...ask, "--json"], 3, "not-found"],
    [["run", model, "--json", "--memory", "90M", ...ask], 5, "not-enough-memory"],
    [["run", model, "--json", "--temp", "-1", ...ask], 2, "usage"],
    [["inspect", path("text.gguf"), "--json"], 4, "not-a-model"],
  ] as const) {
    const outcome = await hypura(args);
    expectOneLine(outcome, status, /./);
    const { error } = JSON.parse(outcome.stdout) as {
      readonly error: { readonly code: string; readonly message: string };
    };
    expect(error.code).toBe(code);
    expect(outcome.stderr).toContain(error.message);
  }
});

describe("a stdout that closes", () => {
  const quote = (words: readonly string[]): string => words.map((word) => `'${word}'`).join(" ");

  async function inBash(script: string): Promise<Outcome> {
    const child = Bun.spawn(["bash", "-c", script], {
      env: { ...environment },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    return outcomeOf(child);
  }

  test("run | head", async () => {
    const args = ["run", model, "--prompt", "hi", "--max-tokens", "1500", "--seed", "1", "--threads", "1"];
    const outcome = await inBash(`${quote([...program, ...args])} | head -c 20; exit "\${PIPESTATUS[0]}"`);
    expectOneLine(outcome, 6, /stdout took no more \(its reader closed it\)/);
    expect(Buffer.byteLength(outcome.stdout)).toBeGreaterThan(0);
  });

  test("run --json, inspect and help into a pipe that nobody reads any more", async () => {
    for (const args of [["run", model, ...ask, "--json"], ["inspect", model, "--tensors"], ["help"]]) {
      const outcome = await inBash(`exec 3> >(:); wait $!; ${quote([...program, ...args])} >&3`);
      expectOneLine(outcome, 6, /its reader closed it/);
    }
  });

  test("a full disk", async () => {
    if (process.platform !== "linux") {
      return; // /dev/full is Linux's
    }
    expectOneLine(await inBash(`${quote([...program, "help"])} > /dev/full`), 6, /the disk is full/);
  });
});

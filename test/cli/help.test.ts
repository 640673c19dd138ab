// help, version, and the reading of command lines and words behind them.

import { describe, expect, test } from "bun:test";
import packageJson from "../../package.json";
import { readCommandLine, repeatedFlag } from "../../src/cli/command";
import { bar, clip, nearest, oneLine, terminalText } from "../../src/text";
import { hypura } from "./program";

describe("help", () => {
  test("is the same by every road", async () => {
    const pages = await Promise.all(
      [[], ["help"], ["--help"], ["-h"], ["help", "help"]].map((args) => hypura(args)),
    );
    for (const page of pages) {
      expect(page).toEqual({ status: 0, stdout: pages[0]?.stdout ?? "", stderr: "" });
    }
    expect(pages[0]?.stdout).toContain("--max-tokens 10 on a model you have not tried");
  });

  test("of a command is the same by every road, fits 100 columns, and is not coloured in a pipe", async () => {
    for (const name of [
      "run",
      "serve",
      "inspect",
      "estimate",
      "bench",
      "replay",
      "profile",
      "iobench",
      "version",
    ]) {
      const roads = [
        ["help", name],
        [name, "--help"],
        [name, "-h"],
        [name, "x.gguf", "--bogus", "--help"],
        ["--help", name],
      ];
      const pages = await Promise.all(roads.map((args) => hypura(args)));
      for (const page of pages) {
        expect(page).toEqual({ status: 0, stdout: pages[0]?.stdout ?? "", stderr: "" });
      }
      const lines = (pages[0]?.stdout ?? "").split("\n");
      expect(lines.length).toBeGreaterThan(5);
      for (const line of lines) {
        expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
        expect(line).not.toContain("\x1b");
      }
    }
  });

  test("names every flag that there is", async () => {
    const { stdout } = await hypura(["help", "run"]);
    for (const flag of "prompt prompt-file interactive system max-tokens context seed temp top-k top-p min-p stop raw json verbose threads memory".split(
      " ",
    )) {
      expect(stdout).toContain(`--${flag} `);
    }
  });
});

test("version, for people and for scripts", async () => {
  const { stdout } = await hypura(["version"]);
  expect(stdout).toMatch(/^hypura \d+\.\d+\.\d+ \(llama\.cpp v[\d.]+, Bun [\d.]+, \w+-\w+\)\n$/);
  expect((await hypura(["--version"])).stdout).toBe(stdout);
  const facts = JSON.parse((await hypura(["version", "--json"])).stdout);
  expect(facts.hypura).toBe(packageJson.version);
  expect(Object.keys(facts)).toEqual(["hypura", "llama", "bun", "platform"]);
});

describe("a command line", () => {
  const args = {
    model: { type: "positional", required: true },
    prompt: { type: "string", alias: "p" },
    stop: { type: "string" },
    json: { type: "boolean" },
  } as const;
  const words = (...argv: readonly string[]): readonly string[] => readCommandLine("run", args, argv).words;

  test("is brought into one form", () => {
    expect(words("m", "-p", "--json", "--json")).toEqual(["--prompt=--json", "--json", "--", "m"]);
    expect(words("--prompt=a=b\nc", "m")).toEqual(["--prompt=a=b\nc", "--", "m"]);
    expect(words("--", "-m")).toEqual(["--", "-m"]);
    expect(words("m", "--prompt", "-5")).toEqual(["--prompt=-5", "--", "m"]);
  });

  test("--help counts as a flag, not as the value of one", () => {
    expect(readCommandLine("run", args, ["--help"]).help).toBe(true);
    expect(words("m", "--prompt", "--help")).toEqual(["--prompt=--help", "--", "m"]);
  });

  test("keeps every value of a repeated flag", () => {
    expect(repeatedFlag("stop", words("m", "--stop", "a", "--stop=b", "--prompt", "--stop=c"))).toEqual([
      "a",
      "b",
    ]);
    expect(repeatedFlag("stop", words("--", "--stop=d"))).toEqual([]);
  });
});

describe("text", () => {
  test("nearest finds slips of the finger and nothing far", () => {
    expect(nearest("max-token", ["max-tokens", "top-k"])).toBe("max-tokens");
    expect(nearest("insepct", ["run", "inspect"])).toBe("inspect");
    expect(nearest("xylophone", ["run", "inspect", "version", "help"])).toBeNull();
    expect(nearest("q", ["run", "help"])).toBeNull();
  });

  test("what a file or a model says cannot steer a terminal", () => {
    expect(terminalText("a\x1b[2Jb\tc\nd\x9b1me\r")).toBe("a\\x1b[2Jb\tc\nd\\x9b1me\\x0d");
    expect(oneLine(" two\r\n  lines\x07 ")).toBe("two lines\\x07");
  });

  test("bars and clips keep their width", () => {
    for (const fraction of [-1, 0, 1e-9, 0.5, 0.999, 1, 7]) {
      expect(Bun.stringWidth(bar(fraction, 24))).toBe(24);
    }
    expect(bar(1e-9, 3)).toBe("▏░░");
    expect(bar(0, 2)).toBe("░░");
    expect(clip("日本語テキスト", 7)).toBe("日本語…");
    expect(clip("short", 5)).toBe("short");
  });
});

// Opening models by path: sound files and sets, and every kind of path that is no model, each with one sentence.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { type ErrorCode, exitStatus, HypuraError } from "../../src/errors";
import { openModelFile, readMetadataArray } from "../../src/modelfile";
import { writeGguf } from "../fixtures/gguf-writer";
import { tinyLlama } from "../fixtures/tiny";
import { fixtureTokenizer } from "../fixtures/tokenizer";

let folder = "";
let whole = "";

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "hypura-modelfile-"));
  whole = join(folder, "tiny.gguf");
  writeGguf(whole, tinyLlama({ layers: 1, embd: 64, ff: 64 }));
});

afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

function errorOf(path: string): HypuraError {
  try {
    openModelFile(path);
  } catch (error) {
    expect(error).toBeInstanceOf(HypuraError);
    return error as HypuraError;
  }
  throw new Error(`${path} was opened`);
}

function expectError(path: string, code: ErrorCode, sentence: RegExp): void {
  const error = errorOf(path);
  expect(error.message).toMatch(sentence);
  expect(error.code).toBe(code);
  expect(error.message).not.toContain("\n");
}

function openDescriptors(): number {
  try {
    return readdirSync("/proc/self/fd").length;
  } catch {
    return 0;
  }
}

describe("a sound path", () => {
  test("is opened and described", () => {
    const file = openModelFile(whole);
    expect(file.path).toBe(whole);
    expect(file.files).toEqual([{ path: whole, sizeBytes: readFileSync(whole).length }]);
    expect(file.model.architecture).toBe("llama");
  });

  test("may be a symbolic link", () => {
    const link = join(folder, "link.gguf");
    symlinkSync(whole, link);
    expect(openModelFile(link).model.layerCount).toBe(1);
  });

  test("gives its vocabulary when asked", () => {
    const file = openModelFile(whole);
    expect(readMetadataArray(file, "tokenizer.ggml.tokens")).toEqual(fixtureTokenizer().tokens);
    expect(readMetadataArray(file, "general.name")).toBeNull();
    expect(readMetadataArray(file, "no.such.key")).toBeNull();
  });

  test("leaves no descriptor open, whether it works or not", () => {
    const before = openDescriptors();
    for (let i = 0; i < 20; i++) {
      openModelFile(whole);
      errorOf(folder);
      errorOf(join(folder, "missing.gguf"));
    }
    expect(openDescriptors()).toBe(before);
  });
});

describe("a split set", () => {
  let set: string[] = [];
  beforeAll(() => {
    mkdirSync(join(folder, "set"));
    set = writeGguf(join(folder, "set", "big.gguf"), tinyLlama({ layers: 2, embd: 64, ff: 64 }), 3);
  });

  test("is found from any of its files", () => {
    const model = openModelFile(set[0] ?? "").model;
    expect(model.layerCount).toBe(2);
    for (const path of set) {
      const file = openModelFile(path);
      expect(file.path).toBe(set[0] ?? "");
      expect(file.files.map((one) => one.path)).toEqual(set);
      expect(file.model.tensorBytes).toBe(model.tensorBytes);
    }
  });

  test("with a missing file names it", () => {
    const part = join(folder, "part");
    mkdirSync(part);
    for (const path of [set[0], set[2]]) copyFileSync(path ?? "", join(part, basename(path ?? "")));
    expectError(
      join(part, "big-00003-of-00003.gguf"),
      "not-found",
      /"big-00002-of-00003.gguf" is missing beside it/,
    );
  });

  test("whose first file was renamed says so", () => {
    const renamed = join(folder, "renamed.gguf");
    copyFileSync(set[0] ?? "", renamed);
    expectError(renamed, "not-found", /one of 3 files of a split model, and 2 of them is missing|2 of them/);
  });

  test("mixed with a file of another model is refused", () => {
    const mixed = join(folder, "mixed");
    mkdirSync(mixed);
    for (const path of set) copyFileSync(path, join(mixed, basename(path)));
    copyFileSync(set[1] ?? "", join(mixed, "big-00003-of-00003.gguf"));
    expectError(join(mixed, "big-00001-of-00003.gguf"), "corrupt-model", /says it is file 2/);
  });
});

describe("a path that is no model is refused:", () => {
  test("missing file, with what lies beside it", () => {
    expectError(
      join(folder, "nofile.gguf"),
      "not-found",
      /there is no file ".*nofile.gguf": check the path \(in that folder there .*"tiny.gguf"/,
    );
  });

  test("missing folder", () => {
    expectError(join(folder, "no", "such", "m.gguf"), "not-found", /there is no file .*: check the path$/);
  });

  test("file used as a folder", () => {
    expectError(join(whole, "m.gguf"), "not-found", /there is no file/);
  });

  test("empty path", () => {
    expectError("", "usage", /path of the model is empty/);
  });

  test("folder with models", () => {
    expectError(folder, "usage", /is a folder: give one of its files, .*"tiny.gguf"/);
  });

  test("folder without models", () => {
    mkdirSync(join(folder, "bare"));
    expectError(join(folder, "bare"), "usage", /is a folder without any .gguf file/);
  });

  test("empty file", () => {
    const path = join(folder, "empty.gguf");
    writeFileSync(path, "");
    expectError(path, "not-a-model", /is empty \(0 bytes\)/);
  });

  test("text file", () => {
    const path = join(folder, "text.gguf");
    writeFileSync(path, "Hello, I am a text.\n");
    expectError(path, "not-a-model", /is not a GGUF model: it starts with "Hell" instead of "GGUF"/);
  });

  test("truncated file, with the bytes that are missing", () => {
    const path = join(folder, "short.gguf");
    const bytes = readFileSync(whole);
    // The last tensor needs no padding, so what is missing is counted to its end.
    writeFileSync(path, bytes.subarray(0, bytes.length - 1000));
    expectError(
      path,
      "corrupt-model",
      /is cut short: it needs \d+ bytes and has \d+, so \d+ bytes are missing/,
    );
    const { sizeBytes } = openModelFile(whole).files[0] ?? { sizeBytes: 0 };
    expect(errorOf(path).message).toContain(`has ${sizeBytes - 1000},`);
  });

  test("unknown architecture", () => {
    const path = join(folder, "unknown.gguf");
    const spec = tinyLlama({ layers: 1, embd: 64, ff: 64 });
    const metadata = spec.metadata.map((entry) =>
      entry.key === "general.architecture"
        ? { key: entry.key, value: { type: "str" as const, value: "gizmo" } }
        : entry,
    );
    writeGguf(path, { ...spec, metadata });
    expectError(path, "unsupported-model", /architecture "gizmo"/);
  });

  test("link that leads nowhere", () => {
    const link = join(folder, "dangling.gguf");
    symlinkSync(join(folder, "gone.gguf"), link);
    expectError(link, "not-found", /there is no file/);
  });

  test("link that leads to itself", () => {
    const link = join(folder, "loop.gguf");
    symlinkSync(link, link);
    expectError(link, "io", /leads back to itself/);
  });

  test("device", () => {
    expectError("/dev/null", "not-a-model", /is a device, pipe or socket/);
  });

  // The superuser may read every file, so there is nothing to see.
  test.skipIf(process.getuid?.() === 0)("unreadable file", () => {
    const path = join(folder, "secret.gguf");
    copyFileSync(whole, path);
    chmodSync(path, 0);
    expectError(path, "io", /may not be read by this user/);
  });
});

test("each code has its exit status", () => {
  const codes: readonly (readonly [ErrorCode, number])[] = [
    ["usage", 2],
    ["not-found", 3],
    ["not-a-model", 4],
    ["corrupt-model", 4],
    ["unsupported-model", 4],
    ["not-enough-memory", 5],
    ["engine", 6],
    ["request", 6],
    ["io", 6],
    ["internal", 70],
    ["cancelled", 130],
  ];
  for (const [code, status] of codes) expect(exitStatus(code)).toBe(status);
});

// The tree obeys the rules of rules.ts; and the canary: each rule finds what is planted against it, so that a rule
// that finds nothing says something.

import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type RuleName, rules, type Tree, type Violation, violationsIn, violationsOf } from "./rules";
import { codeOf, importsOf } from "./source";

const root = join(import.meta.dir, "..", "..");

/** What is or may become a file of the repository: what .gitignore names is left out here too. */
function readTree(): Tree {
  const skipped =
    /(^|\/)(node_modules|\.git)\/|^(build|dist)\/|^vendor\/llama\.cpp\/|^src\/gen\/|\.tsbuildinfo$/;
  const tree = new Map<string, string>();
  for (const pattern of ["*", "{src,ffi,test,vendor}/**/*", "{.ci,.github}/**/*"]) {
    for (const path of new Bun.Glob(pattern).scanSync({ cwd: root, dot: true, onlyFiles: true })) {
      const text = skipped.test(path) ? "\0" : readFileSync(join(root, path), "utf8");
      if (!text.includes("\0")) {
        tree.set(path, text);
      }
    }
  }
  return tree;
}

function show(found: readonly Violation[]): readonly string[] {
  return found.map(({ rule, path, line, what }) => `${path}:${line}: ${rule}: ${what}`);
}

/** With a title of one short line in front. */
function titled<Row extends readonly string[]>(rows: readonly Row[]): readonly (readonly [string, ...Row])[] {
  return rows.map((row) => [row.map((text) => JSON.stringify(text).slice(1, 60)).join(" "), ...row] as const);
}

const tree = readTree();
const violations = violationsOf(tree);

test("the tree is read", () => {
  for (const path of [
    "src/plan.ts",
    "ffi/native.ts",
    "ffi/native/backend.cpp",
    "test/tidy/rules.ts",
    "package.json",
  ]) {
    expect(tree.has(path)).toBe(true);
  }
  expect([...tree.keys()].filter((path) => path.includes("node_modules"))).toEqual([]);
});

test.each(Object.keys(rules) as RuleName[])("the tree obeys the rule %s", (name) => {
  expect(show(violations.filter(({ rule }) => rule === name))).toEqual([]);
});

describe("canary: a planted violation is reported", () => {
  const header = "// A file.\n";
  const planted: readonly (readonly [RuleName, string, string])[] = [
    ["pure", "src/plan.ts", `import { readFileSync } from "node:fs";`],
    ["pure", "src/plan.ts", `import { readMachine } from "./machine";`],
    ["pure", "src/plan.ts", `import { type Machine } from "./machine";`], // a side effect remains
    ["pure", "src/plan.ts", `import {\n  a,\n  b,\n} from "./engine";`],
    ["pure", "src/ollama-reply.ts", `export * from "./server";`],
    ["pure", "src/gguf.ts", `import "consola";`],
    ["pure", "src/gguf.ts", `const fs = await import("node:fs");`],
    ["pure", "src/model.ts", "const x = Math.random();"],
    ["pure", "src/text.ts", "const now = new Date();"],
    ["pure", "src/text.ts", "const now = performance.now();"],
    ["pure", "src/errors.ts", `console.error("no");`],
    ["pure", "src/errors.ts", "const x = `${process.env}`;"],
    ["pure", "src/generate.ts", "setTimeout(() => {}, 5);"],
    ["pure", "src/generate.ts", `import { makePlan } from "./api";`],
    ["bun-ffi", "src/engine.ts", `import { dlopen } from "bun:ffi";`],
    ["bun-ffi", "test/engine/x.test.ts", `import type { Pointer } from "bun:ffi";`],
    ["ffi-native", "src/api.ts", `import { nativeLibrary } from "../ffi/native";`],
    ["ffi-native", "src/cli/run.ts", `import { nativeLibrary } from "../../ffi/native.ts";`],
    ["cli", "src/server.ts", `import { print } from "./cli/terminal";`],
    ["cli", "src/api.ts", `export { command } from "./cli/command";`],
    ["includes", "ffi/native/stream.cpp", `#include "ggml.h"`],
    ["includes", "ffi/native/reader.h", `#include "llama.h"`],
    ["includes", "ffi/native/neuron_cache.cpp", "#include <ggml-backend.h>"],
    ["includes", "ffi/native/stream.h", `#include "events.h"`],
    ["includes", "ffi/native/platform_linux.cpp", `#  include "engine.h"`],
    ["includes", "ffi/native/engine.cpp", `#include "ggml-backend-impl.h"`],
    ["includes", "ffi/native/backend.h", `#include "ggml-impl.h"`],
    ["includes", "ffi/native/backend.cpp", `#include "common.h"`],
    ["includes", "ffi/native/backend.cpp", `#include "llama.h"`],
    ["includes", "ffi/native/abi.cpp", `#include "server-context.h"`],
    ["includes", "ffi/native/events.cpp", `#include "json.h"`],
    ["includes", "test/native/x_test.cpp", `#include "ggml.h"`],
    ["silent", "ffi/native/engine.cpp", `void f() { fprintf(stderr, "x"); }`],
    ["silent", "ffi/native/engine.cpp", `void f() { std::cout << 1; }`],
    ["silent", "ffi/native/stream.cpp", `void f() { std::printf("x"); }`],
    ["silent", "ffi/native/stream.cpp", `void f() { puts("x"); }`],
    ["silent", "ffi/native/reader.cpp", `auto x = std::getenv("X");`],
    ["silent", "ffi/native/reader.cpp", `void f() { write(2, "x", 1); }`],
    ["silent", "ffi/native/platform_linux.cpp", `void f() {\n    write(STDERR_FILENO, "x", 1);\n}`],
    ["header", "src/new.ts", `\nexport const x = 1;`],
    ["header", "ffi/native/alone.cpp", `#include "stream.h"`],
    ["header", "ffi/native/new.h", "#pragma once"],
    ["header", "test/native/CMakeLists.txt", "project(x)"],
    ["length", "src/long.ts", "const x = 1;\n".repeat(1400)],
    ["any", "src/x.ts", "function f(x: any): void {}"],
    ["any", "src/x.ts", "const x = y as any;"],
    ["any", "src/x.ts", "const x = new Map<string, any>();"],
    ["any", "test/x.ts", "type X = string | any;"],
    ["hosts", "README.md", `See ${["registry", "npmjs", "org"].join(".")} for it.`],
    ["hosts", "bun.lock", `"https://${["PyPI", "org"].join(".")}/simple"`],
    ["paths", "README.md", `It lies in ${["", "work", "main", "src"].join("/")}.`],
    ["paths", "src/x.ts", `const x = "${["", "home", "somebody", "models"].join("/")}";`],
    ["paths", ".ci/run", `cd ${["", "Users", "me", "hypura"].join("/")}`],
  ];

  test.each(titled(planted))("%s", (_, rule, path, text) => {
    const needsHeader = rule !== "header" && /^(src|ffi|test)\//.test(path);
    const changed = new Map([...tree, [path, `${needsHeader ? header : ""}${text}\n`]]);
    const found = violationsIn(changed, path);
    expect(found.map((one) => one.rule)).toContain(rule);
    expect(new Set(found.map((one) => one.rule))).toEqual(new Set([rule]));
  });

  test("each rule has one", () => {
    expect([...new Set(planted.map(([rule]) => rule))].sort()).toEqual(
      (Object.keys(rules) as RuleName[]).sort(),
    );
  });
});

describe("what only looks like a violation is none", () => {
  const innocent: readonly (readonly [string, string])[] = [
    ["src/plan.ts", `import type { Machine } from "./machine";`],
    [
      "src/plan.ts",
      `// import { readMachine } from "./machine";\n/* Math.random() */ const x = "Date.now()";`,
    ],
    ["src/plan.ts", "const x = { date: 1, randomly: 2, any: 3 };"],
    ["src/text.ts", "const x = Bun.stringWidth('x');"],
    ["src/x.ts", "const x = AbortSignal.any([]); // as any"],
    ["src/x.ts", `const x = /["']/.test("as any") ? \`\${1}: any\` : 2;`],
    ["ffi/native/stream.cpp", `// printf(\n#include <cstdio>\nvoid f() { snprintf(a, n, "stderr"); }`],
    [
      "ffi/native/platform_linux.cpp",
      `void fatal(const char* t) {\n    write(STDERR_FILENO, t, 1);\n    abort();\n}`,
    ],
    ["README.md", "`~/.hypura`, /tmp/x, and models/x"],
  ];

  test.each(titled(innocent))("%s", (_, path, text) => {
    const changed = new Map([...tree, [path, `// A file.\n${text}\n`]]);
    expect(show(violationsIn(changed, path))).toEqual([]);
  });

  test("comments and strings are told from code", () => {
    expect(codeOf(`a /* b */ c "d" // e`, { strings: true })).toBe(`a         c " "     `);
    expect(codeOf("`a${b}c`", { strings: true })).toBe("` ${b} `");
    expect(codeOf("x = /a\"/; y = 'b'", { strings: true })).toBe("x = /  /; y = ' '");
    expect(codeOf("int n = 1'000'000; // x", { strings: true })).toBe("int n = 1'000'000;     ");
    expect(
      importsOf(`import a from "x";\nimport type b from "y";\nimport "z";`).map((one) => one.from),
    ).toEqual(["x", "y", "z"]);
  });
});

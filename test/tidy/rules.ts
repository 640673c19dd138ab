// The rules of the house that a machine can check (DESIGN.md, section 3), as one function from texts to violations. It
// reads no file, so that a canary can feed it planted violations. Each rule has a name; the test's messages use it.

import { dirname, join } from "node:path";
import { codeOf, importsOf, includesOf, lineAt } from "./source";

/** Path (from the root of the tree, with slashes) -> text. */
export type Tree = ReadonlyMap<string, string>;

export interface Violation {
  readonly rule: RuleName;
  readonly path: string;
  readonly line: number;
  readonly what: string;
}

type Found = Omit<Violation, "rule" | "path">;
type Rule = (path: string, text: string, tree: Tree) => readonly Found[];

export const rules = {
  pure: pureRule,
  "bun-ffi": bunFfiRule,
  "ffi-native": ffiNativeRule,
  cli: cliRule,
  includes: includeRule,
  silent: silentRule,
  header: headerRule,
  length: lengthRule,
  any: anyRule,
  hosts: hostRule,
  paths: machinePathRule,
} as const satisfies Readonly<Record<string, Rule>>;

export type RuleName = keyof typeof rules;

/** Everything that is wrong in the tree. */
export function violationsOf(tree: Tree): readonly Violation[] {
  return [...tree.keys()].flatMap((path) => violationsIn(tree, path));
}

/** Everything that is wrong in one file of the tree. */
export function violationsIn(tree: Tree, path: string): readonly Violation[] {
  const text = tree.get(path) ?? "";
  return (Object.entries(rules) as [RuleName, Rule][]).flatMap(([rule, check]) =>
    check(path, text, tree).map((found) => ({ rule, path, ...found })),
  );
}

function isTypeScript(path: string): boolean {
  return /^(src|ffi|test|vendor)\/.*\.ts$/.test(path);
}

function isNative(path: string): boolean {
  return /^ffi\/native\/.*\.(cpp|h|mm)$/.test(path);
}

/** Where an import leads, from the root, without extension; null for packages. */
function target(path: string, from: string): string | null {
  return from.startsWith(".") ? join(dirname(path), from).replace(/\.ts$/, "") : null;
}

function matches(code: string, pattern: RegExp, what: (found: string) => string): readonly Found[] {
  return [...code.matchAll(pattern)].map((match) => ({
    line: lineAt(code, match.index),
    what: what(match[0].trim()),
  }));
}

// ---- TypeScript ---------------------------------------------------------------------------------------------

/** Values in, values out. `generate` may also know the engine; the others know only each other. */
const pureModules: ReadonlyMap<string, readonly string[]> = new Map([
  ["src/gguf", []],
  ["src/model", []],
  ["src/architectures", []],
  ["src/plan", []],
  ["src/plan-memory", []],
  ["src/plan-cost", []],
  ["src/plan-draft", []],
  ["src/plan-history", []],
  ["src/plan-mtp", []],
  ["src/plan-json", []],
  ["src/plan-resident", []],
  ["src/plan-speculation", []],
  ["src/plan-prediction", []],
  ["src/plan-draft", []],
  ["src/plan-stream", []],
  ["src/plan-task", []],
  // A simplex is a pure function too.
  ["src/plan-place", ["yalps"]],
  ["src/text", []],
  ["src/guesses", []],
  ["src/streaming", []],
  ["src/errors", []],
  ["src/ollama-model", []],
  ["src/ollama-options", []],
  ["src/ollama-request", []],
  ["src/ollama-prepare", []],
  ["src/ollama-reply", []],
  ["src/answer-parts", []],
  ["src/openai", []],
  ["src/v1-pass", []],
  ["src/wire-body", []],
  ["src/wire-error", []],
  ["src/generate", ["src/engine"]],
]);

/** Files, clocks, chance, environment, console, network. Bun.stringWidth is a table, not an effect. */
const effects =
  /\b(?:Bun\.(?!stringWidth\b)\w+|process\.\w+|console\.\w+|performance\.\w+|Date\b|Math\.random|crypto\.\w+|fetch\s*\(|set(?:Timeout|Interval|Immediate)\s*\(|import\.meta|globalThis)/g;

function pureRule(path: string, text: string): readonly Found[] {
  const also = pureModules.get(path.replace(/\.ts$/, ""));
  if (also === undefined) {
    return [];
  }
  const imports = importsOf(text)
    .filter((one) => !one.isType)
    .filter(({ from }) => {
      const to = target(path, from);
      return to === null ? !also.includes(from) : !(pureModules.has(to) || also.includes(to));
    })
    .map(({ line, from }) => ({ line, what: `a pure module imports the code of ${from}` }));
  const calls = matches(codeOf(text, { strings: true }), effects, (found) => `a pure module uses ${found}`);
  return [...imports, ...calls];
}

function bunFfiRule(path: string, text: string): readonly Found[] {
  if (!isTypeScript(path) || path === "ffi/native.ts") {
    return [];
  }
  return importsOf(text)
    .filter(({ from }) => from === "bun:ffi")
    .map(({ line }) => ({ line, what: "only ffi/native.ts imports bun:ffi" }));
}

const nativeUsers: readonly string[] = ["src/engine.ts", "src/machine.ts"];

function ffiNativeRule(path: string, text: string): readonly Found[] {
  if (!path.startsWith("src/") || !isTypeScript(path) || nativeUsers.includes(path)) {
    return [];
  }
  return importsOf(text)
    .filter(({ from }) => target(path, from) === "ffi/native")
    .map(({ line }) => ({ line, what: `only ${nativeUsers.join(" and ")} import ffi/native` }));
}

function cliRule(path: string, text: string): readonly Found[] {
  if (
    !/^(src|ffi)\//.test(path) ||
    !isTypeScript(path) ||
    path === "src/main.ts" ||
    path.startsWith("src/cli/")
  ) {
    return [];
  }
  return importsOf(text)
    .filter(({ from }) => target(path, from)?.startsWith("src/cli/"))
    .map(({ line, from }) => ({ line, what: `only main.ts imports a command, this imports ${from}` }));
}

function anyRule(path: string, text: string): readonly Found[] {
  if (!isTypeScript(path)) {
    return [];
  }
  const pattern = /(?::|\bas|\bsatisfies|<|,|\||&|=|=>)\s*any\b(?!\s*[(.:=])/g;
  return matches(codeOf(text, { strings: true }), pattern, () => "`any` turns the compiler off");
}

// ---- native code --------------------------------------------------------------------------------------------

const dataPlane = /^(platform|reader|neuron_cache|stream|measure|trace|replay|guesser)(_\w+)?\.(cpp|h|mm)$/;
const ggmlPublic = /^(ggml|ggml-(alloc|backend|cpu|cpp|cuda|metal)|gguf)\.h$/;
const ggmlInternal = /^ggml-.*(impl|common|quants|threading).*\.h$/;

/** The headers of llama.cpp that a file of ours may include. */
function mayInclude(file: string, name: string): boolean {
  if (ggmlInternal.test(name)) {
    return file === "backend.cpp";
  }
  if (ggmlPublic.test(name)) {
    return (
      ["engine.cpp", "products.cpp", "tasks.cpp"].includes(file) ||
      /^(backend|computer|predictor)\.(cpp|h)$/.test(file)
    );
  }
  if (name === "speculative.cpp") {
    return file === "speculation.cpp"; // compiled as a part of it
  }
  if (name === "json.h") {
    return file === "engine.cpp" || file === "tasks.cpp";
  }
  return file === "engine.cpp"; // llama.h, the server core's and common's
}

function includeRule(path: string, text: string, tree: Tree): readonly Found[] {
  const isTest = /^test\/native\/.*\.(cpp|h)$/.test(path);
  if (!isNative(path) && !isTest) {
    return [];
  }
  const file = path.slice(path.lastIndexOf("/") + 1);
  return includesOf(text).flatMap(({ name, isSystem, line }) => {
    const looksLlama = /^(ggml|gguf|llama|server-|common\b)/.test(name);
    const isOurs = tree.has(join(dirname(path), name)) || tree.has(join("ffi/native", name));
    if (isSystem ? !looksLlama : isOurs) {
      const leavesPlane = isNative(path) && dataPlane.test(file) && !isSystem && !dataPlane.test(name);
      return leavesPlane ? [{ line, what: `the data plane includes ${name}` }] : [];
    }
    return !isTest && mayInclude(file, name) ? [] : [{ line, what: `${file} may not include ${name}` }];
  });
}

const output =
  /\b(?:std::)?(?:printf|fprintf|vprintf|vfprintf|dprintf|puts|fputs|putchar|fputc|putc|fwrite|perror|psignal)\s*\(|\b(?:std|::)?:?:?(?:cout|cerr|clog|wcout|wcerr)\b|\b(?:stdout|stderr|STDOUT_FILENO|STDERR_FILENO)\b|\bwrite\s*\(\s*[12]\s*,|\b(?:secure_)?getenv\s*\(|\b(?:set|put)env\s*\(|\benviron\b/g;

/** The one function that may say a line, on its way to abort: `fatal` of a platform file. */
function withoutFatal(path: string, code: string): string {
  return /\/platform_\w+\.(cpp|mm)$/.test(path)
    ? code.replace(/^\S[^\n;]*\bfatal\([^)]*\)[^;{]*\{[\s\S]*?^\}/m, (body) => body.replace(/[^\n]/g, " "))
    : code;
}

function silentRule(path: string, text: string): readonly Found[] {
  if (!isNative(path)) {
    return [];
  }
  const code = withoutFatal(path, codeOf(text, { strings: true }));
  return matches(code, output, (found) => `native code is silent and reads no environment: ${found}`);
}

// ---- every file ---------------------------------------------------------------------------------------------

/** Formats without comments, or without need of them. */
const headless = /\.(json|lock|map)$|\/\.[^/]+$|\.snap$/;

function headerRule(path: string, text: string, tree: Tree): readonly Found[] {
  if (!/^(src|ffi|test|vendor)\//.test(path) || headless.test(path)) {
    return [];
  }
  // The header file beside a source file speaks for both.
  const speaker = path.replace(/\.cpp$/, ".h");
  if (path.endsWith(".cpp") && tree.has(speaker)) {
    return [];
  }
  const body = text.replace(/^#!.*\n/, "");
  const comment = /^(?:\/\/|\/\*|#)(?!include|pragma)[ !*]*\S/.test(body);
  return comment
    ? []
    : [{ line: 1, what: "a file starts with a paragraph: what it owns, and why it exists" }];
}

const mostLines = 1400;

function lengthRule(path: string, text: string): readonly Found[] {
  const lines = text.split("\n").length - (text.endsWith("\n") ? 1 : 0);
  const isOurs = /^(src|ffi|test|vendor)\//.test(path) && !headless.test(path);
  return isOurs && lines > mostLines
    ? [{ line: mostLines + 1, what: `${lines} lines; a file that needs more than ${mostLines} is two files` }]
    : [];
}

/** Put together here, so that this file passes its own rule. */
const hosts = [
  ["registry", "npmjs", "org"],
  ["npmjs", "com"],
  ["pypi", "org"],
  ["files", "pythonhosted", "org"],
  ["crates", "io"],
  ["rubygems", "org"],
  ["proxy", "golang", "org"],
].map((parts) => parts.join("."));

const hostPattern = new RegExp(
  `\\b(?:${hosts.map((host) => host.replaceAll(".", "\\.")).join("|")})\\b`,
  "gi",
);

/** Packages are taken by name: where from is the client's matter, and another in every house. */
function hostRule(_: string, text: string): readonly Found[] {
  return matches(text, hostPattern, (found) => `names the registry ${found}`);
}

const homes = ["work", "root", "home/[\\w.-]+", "Users/[\\w.-]+", "workspace", "mnt/[\\w.-]+"].join("|");
const homePattern = new RegExp(`(?<![\\w./~}\\]-])/(?:${homes})/[\\w.-]+`, "g");

function machinePathRule(_: string, text: string): readonly Found[] {
  return matches(text, homePattern, (found) => `a path of one machine: ${found}`);
}

// What every command shares: its shape, the words of its command line, and reading numbers, sizes and documents out of
// flags with errors that say what to do. citty takes what this file has checked: by itself it ignores flags and arguments
// that it does not know, and a typing mistake must not be ignored.

import { readFileSync } from "node:fs";
import type { ArgDef, ArgsDef, CommandDef } from "citty";
import { consola } from "consola";
import { HypuraError } from "../errors";
import type { Plan, PlanLimits } from "../plan";
import { validatePlan } from "../plan-json";
import { countText, nearest, parseBytes } from "../text";

export interface Command {
  readonly definition: CommandDef<ArgsDef>;
  /** Lines for `--help`, ready to paste. */
  readonly examples: readonly string[];
  /** What else `--help` says. */
  readonly notes: readonly string[];
  /** The last positional may be given more than once; `positionalsOf` has them all. */
  readonly takesMany: boolean;
}

/** citty infers a type for every flag; a table of commands needs one type for all. */
export function command<Args extends ArgsDef>(
  definition: CommandDef<Args>,
  help: {
    readonly examples: readonly string[];
    readonly notes?: readonly string[];
    readonly takesMany?: boolean;
  },
): Command {
  const { examples, notes = [], takesMany = false } = help;
  return { definition: definition as unknown as CommandDef<ArgsDef>, examples, notes, takesMany };
}

export interface CommandLine {
  /** `--help` stands among the flags: nothing else counts. */
  readonly help: boolean;
  /** The same words with every flag as `--name=value`, so that no value can be taken for a flag. */
  readonly words: readonly string[];
}

/** Checks the words after a command's name. Throws `usage` with the first mistake. */
export function readCommandLine(
  name: string,
  args: ArgsDef,
  argv: readonly string[],
  takesMany = false,
): CommandLine {
  const flags = flagTable(args);
  const words: string[] = [];
  const positionals: string[] = [];
  const mistakes: string[] = [];
  for (let i = 0; i < argv.length; i++) {
    const word = argv[i] as string;
    if (word === "--") {
      positionals.push(...argv.slice(i + 1));
      break;
    }
    const match = /^--?([a-zA-Z][^=]*)(?:=([\s\S]*))?$/.exec(word);
    if (match === null) {
      positionals.push(word);
      continue;
    }
    const [, spelling = "", value] = match;
    if (spelling === "help" || spelling === "h") {
      return { help: true, words: [] };
    }
    const flag = flags.get(spelling);
    if (flag === undefined) {
      mistakes.push(unknownFlag(name, word, [...flags.keys()]));
    } else if (flag.arg.type === "boolean") {
      if (value !== undefined) {
        mistakes.push(`--${flag.name} takes no value: give it or leave it out`);
      }
      words.push(`--${flag.name}`);
    } else if (value === undefined && argv[i + 1] === undefined) {
      mistakes.push(`--${flag.name} needs a value: see \`hypura help ${name}\``);
    } else {
      words.push(`--${flag.name}=${value ?? argv[++i]}`);
    }
  }
  const mistake = mistakes[0] ?? wrongPositionals(name, args, positionals, takesMany);
  if (mistake !== null) {
    throw new HypuraError("usage", mistake);
  }
  return { help: false, words: [...words, "--", ...positionals] };
}

/** Other spellings of a flag. */
export function aliasesOf(arg: ArgDef): readonly string[] {
  return "alias" in arg && arg.alias !== undefined ? [arg.alias].flat() : [];
}

interface Flag {
  readonly name: string;
  readonly arg: ArgDef;
}

function flagTable(args: ArgsDef): ReadonlyMap<string, Flag> {
  const flags = new Map<string, Flag>();
  for (const [name, arg] of Object.entries(args)) {
    if (arg.type === "positional") {
      continue;
    }
    for (const spelling of [name, ...aliasesOf(arg)]) {
      flags.set(spelling, { name, arg });
    }
  }
  return flags;
}

function unknownFlag(name: string, word: string, known: readonly string[]): string {
  const close = nearest(
    word.replace(/^--?|=[\s\S]*$/g, ""),
    known.filter((spelling) => spelling.length > 1),
  );
  const hint = close === null ? `see \`hypura help ${name}\`` : `did you mean --${close}?`;
  return `hypura ${name} has no option ${JSON.stringify(word)}: ${hint}`;
}

function wrongPositionals(
  name: string,
  args: ArgsDef,
  given: readonly string[],
  takesMany: boolean,
): string | null {
  const wanted = Object.entries(args).filter(([, arg]) => arg.type === "positional");
  const [missing] = wanted.slice(given.length).find(([, arg]) => arg.required === true) ?? [];
  if (missing !== undefined) {
    return `hypura ${name} needs a ${missing.toUpperCase()}: see \`hypura help ${name}\``;
  }
  const extra = given[wanted.length];
  if (extra === undefined || takesMany) {
    return null;
  }
  const hint =
    "prompt" in args ? "give the question as --prompt TEXT, in quotes" : `see \`hypura help ${name}\``;
  return `${JSON.stringify(extra)} is one argument too many: ${hint}`;
}

export interface NumberRange {
  readonly least: number;
  readonly most: number;
  readonly integer: boolean;
}

/** The number that a flag gives; undefined where the flag is not given. */
export function numberFlag(name: string, text: string | undefined, range: NumberRange): number | undefined {
  if (text === undefined) {
    return undefined;
  }
  const value = Number(text);
  const fits = text.trim() !== "" && value >= range.least && value <= range.most;
  if (!fits || (range.integer && !Number.isInteger(value))) {
    const kind = range.integer ? "a whole number" : "a number";
    throw new HypuraError(
      "usage",
      `--${name} ${JSON.stringify(text)}: give ${kind} from ${range.least} to ${range.most}`,
    );
  }
  return value;
}

/** The bytes that a flag such as --memory gives. */
export function bytesFlag(name: string, text: string | undefined): number | undefined {
  if (text === undefined) {
    return undefined;
  }
  const bytes = parseBytes(text);
  if (bytes === null || bytes === 0) {
    throw new HypuraError(
      "usage",
      `--${name} ${JSON.stringify(text)}: give a size such as 2G, 1500M or 8GiB`,
    );
  }
  return bytes;
}

/** Every value of a flag that may be given more than once, out of `CommandLine.words`; citty keeps the last only. */
export function repeatedFlag(name: string, words: readonly string[]): readonly string[] {
  const flags = words.slice(0, words.indexOf("--"));
  return flags.filter((word) => word.startsWith(`--${name}=`)).map((word) => word.slice(name.length + 3));
}

/** Every positional, out of `CommandLine.words`. */
export function positionalsOf(words: readonly string[]): readonly string[] {
  return words.slice(words.indexOf("--") + 1);
}

/** What may be asked of a plan; the same words in every command that makes one. */
export const limitArgs = {
  context: {
    type: "string",
    alias: "c",
    description: "Tokens the model can look back on (4,096 if it fits)",
    valueHint: "N",
  },
  threads: { type: "string", alias: "t", description: "Compute threads (one for each core)", valueHint: "N" },
  memory: {
    type: "string",
    alias: "m",
    description: "Use at most this much memory, such as 8G",
    valueHint: "SIZE",
  },
  "gpu-memory": {
    type: "string",
    description: "Use at most this much memory of GPUs; 0 uses none",
    valueHint: "SIZE",
  },
  "kv-type": {
    type: "string",
    description: "Type of the context: f16, q8_0 ... (f16; others change answers)",
    valueHint: "TYPE",
  },
  mode: {
    type: "string",
    description: "auto, resident or stream (auto: stream what does not fit)",
    valueHint: "MODE",
  },
  speculation: {
    type: "string",
    description: "Tokens guessed for a pass: off, auto or N (auto: while it costs nothing)",
    valueHint: "N",
  },
  draft: {
    type: "string",
    description: "A small model that guesses for this one (where it pays, one beside it)",
    valueHint: "FILE",
  },
  plan: {
    type: "string",
    description: "Follow the plan in this file, which `inspect --json` printed",
    valueHint: "FILE",
  },
} as const;

function modeFlag(text: string | undefined): "auto" | "resident" | "stream" {
  if (text === undefined || text === "auto" || text === "resident" || text === "stream") {
    return text ?? "auto";
  }
  throw new HypuraError("usage", `--mode ${JSON.stringify(text)}: give auto, resident or stream`);
}

type LimitFlags = { readonly [Name in keyof typeof limitArgs]?: string | undefined };

function speculationFlag(text: string | undefined): "off" | "auto" | number {
  if (text === undefined || text === "auto" || text === "off") {
    return text ?? "auto";
  }
  const count = Number(text);
  if (Number.isInteger(count) && count >= 1 && count <= 64) {
    return count;
  }
  throw new HypuraError(
    "usage",
    `--speculation ${JSON.stringify(text)}: give off, auto, or how many tokens to guess at once (1 to 64)`,
  );
}

/** The limits that these flags give. */
export function limitsOf(flags: LimitFlags): PlanLimits {
  const gpuMemory = flags["gpu-memory"];
  return {
    contextTokens:
      numberFlag("context", flags.context, { least: 16, most: 16_777_216, integer: true }) ?? null,
    slotCount: 1,
    threads: numberFlag("threads", flags.threads, { least: 1, most: 512, integer: true }) ?? null,
    memoryBytes: bytesFlag("memory", flags.memory) ?? null,
    mode: modeFlag(flags.mode),
    gpuMemoryBytes: gpuMemory === "0" ? 0 : (bytesFlag("gpu-memory", gpuMemory) ?? null),
    kvType: flags["kv-type"]?.toLowerCase() ?? null,
    speculation: speculationFlag(flags.speculation),
    draftPath: flags.draft ?? null,
    plan: planFlag(flags),
  };
}

function planFlag(flags: LimitFlags): Plan | null {
  if (flags.plan === undefined) {
    return null;
  }
  const other = Object.keys(limitArgs).find(
    (name) => name !== "plan" && name in flags && flags[name as keyof LimitFlags] !== undefined,
  );
  if (other !== undefined) {
    throw new HypuraError("usage", `--plan decides all that --${other} would: give one of them`);
  }
  return validatePlan(readJson(flags.plan, "plan"));
}

/** The JSON document in a file that a person named. */
export function readJson(path: string, what: string): unknown {
  let content: string;
  try {
    content = readFileSync(path, "utf8");
  } catch (cause) {
    const isMissing = (cause as { readonly code?: string }).code === "ENOENT";
    throw new HypuraError(
      isMissing ? "not-found" : "io",
      isMissing
        ? `there is no ${what} file ${JSON.stringify(path)}: check the path`
        : `the ${what} file ${JSON.stringify(path)} cannot be read (${(cause as Error).message}): give a text file`,
      { cause },
    );
  }
  try {
    return JSON.parse(content);
  } catch (cause) {
    throw new HypuraError(
      "usage",
      `the ${what} file ${JSON.stringify(path)} is no JSON (${(cause as Error).message})`,
      { cause },
    );
  }
}

/** Says that the draft model that was asked for is not used, where it is not. */
export function warnOfDraft(limits: PlanLimits, plan: Plan): void {
  const choice = plan.choices.find(({ name }) => name === "draft");
  if ((limits.draftPath ?? null) !== null && plan.speculation?.draftPath == null) {
    consola.warn(
      `--draft is not used: ${choice?.reason ?? "nothing is guessed"} (--speculation N uses it all the same)`,
    );
  }
}

/** Says that the plan has less context than was asked for, where it has. */
export function warnOfCut(limits: PlanLimits, plan: Plan): void {
  const { contextTokens } = plan;
  if (limits.contextTokens !== null && limits.contextTokens > contextTokens) {
    const trained = `the model was trained for ${countText(contextTokens)} tokens of context`;
    consola.warn(`${trained}: --context ${limits.contextTokens} is taken as ${contextTokens}`);
  }
}

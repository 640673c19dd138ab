// The pages of `hypura help`: the overview and one page a command, at most 100 columns wide, out of the same
// definitions that read the command line. Gives text; who asked prints it.

import type { ArgDef, ArgsDef } from "citty";
import { table } from "../text";
import { aliasesOf, type Command } from "./command";
import { stdout } from "./terminal";

export interface CommandSummary {
  readonly name: string;
  readonly summary: string;
}

const overviewExamples = `  hypura run model.gguf                            chat with a model
  hypura run model.gguf --prompt "Why is the sky blue?" --max-tokens 10
  hypura serve model.gguf                          for Ollama's clients, OpenAI's and Anthropic's
  hypura inspect model.gguf                        what is in it, and does it fit here`;

/** Every exit status that a script may meet; errors.ts has the codes behind them. */
const exitStatusRows: readonly (readonly [string, string])[] = [
  ["0", "done"],
  ["2", "wrong usage: a flag or an argument"],
  ["3", "a file that was named does not exist"],
  ["4", "the file is no model, is damaged, or is of a kind that hypura cannot run"],
  ["5", "the model does not fit the memory"],
  ["6", "the engine or the system failed, or stdout was closed before the end"],
  ["70", "a mistake in hypura itself"],
  ["130", "stopped by Ctrl-C"],
];

function heading(text: string): string {
  return stdout.paint("bold", text);
}

function indented(rows: readonly (readonly string[])[]): string {
  return table(rows.map((row) => [` ${row[0]}`, ...row.slice(1)]));
}

export function overviewPage(version: string, commands: readonly CommandSummary[]): string {
  return `hypura ${version}: runs language models that are bigger than memory

${heading("Usage:")} hypura <command> [options]

${heading("Commands:")}
${indented([...commands, { name: "help", summary: "Show this, or the page of one command: hypura help run" }].map(({ name, summary }) => [name, summary]))}

${heading("Examples:")}
${overviewExamples}

Start with --max-tokens 10 on a model you have not tried.

${heading("Exit status:")}
${indented(exitStatusRows)}`;
}

export function commandPage(name: string, command: Command): string {
  const { definition, examples, notes, takesMany } = command;
  const args = Object.entries((definition.args ?? {}) as ArgsDef);
  const positionals = args.filter(([, arg]) => arg.type === "positional");
  const flags = args.filter(([, arg]) => arg.type !== "positional");
  const words = positionals.map(([arg]) => `<${arg.toUpperCase()}>${takesMany ? "..." : ""}`);
  const usage = ["hypura", name, ...words, "[options]"].join(" ");
  const sections = [
    `${descriptionOf(definition.meta)}\n\n${heading("Usage:")} ${usage}`,
    ...(positionals.length === 0
      ? []
      : [
          `${heading("Arguments:")}\n${indented(positionals.map(([arg, { description }]) => [arg.toUpperCase(), description ?? ""]))}`,
        ]),
    `${heading("Options:")}\n${indented([...flags.map(flagRow), ["    --help", "Show this page"]])}`,
    `${heading("Examples:")}\n${examples.map((example) => `  ${example}`).join("\n")}`,
    ...notes,
  ];
  return sections.join("\n\n");
}

function descriptionOf(meta: Command["definition"]["meta"]): string {
  return typeof meta === "object" && "description" in meta ? (meta.description ?? "") : "";
}

function flagRow([name, arg]: readonly [string, ArgDef]): readonly string[] {
  const short = aliasesOf(arg).find((alias) => alias.length === 1);
  const value = arg.type === "boolean" ? "" : ` ${arg.valueHint ?? "VALUE"}`;
  return [`${short === undefined ? "   " : `-${short},`} --${name}${value}`, arg.description ?? ""];
}

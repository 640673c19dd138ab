// The command table, and the one place that prints an error and exits. Commands are imported when they are asked
// for, so that `version` and `help` start in a few milliseconds. Nothing imports this file but the executable.

import { type ArgsDef, runCommand } from "citty";
import { consola } from "consola";
import packageJson from "../package.json";
import { type Command, readCommandLine } from "./cli/command";
import { print, stderr, tell } from "./cli/terminal";
import { type ErrorCode, exitStatus, HypuraError } from "./errors";
import { nearest, oneLine } from "./text";

/** The hidden command of a benchmark's child (bench-run.ts). */
const benchRunCommand = "__bench-run";
/** What `serve` starts its engines with (child.ts); no command of a person's, so it is in no list. */
const engineCommand = "__engine";

interface Entry {
  readonly summary: string;
  readonly load: () => Promise<Command>;
}

const commands: Readonly<Record<string, Entry>> = {
  run: {
    summary: "Answer a prompt, or chat, with a model",
    load: async () => (await import("./cli/run")).runCommand,
  },
  serve: {
    summary: "Serve models to everything that speaks Ollama, OpenAI or Anthropic",
    load: async () => (await import("./cli/serve")).serveCommand,
  },
  inspect: {
    summary: "Show what a model file holds and how it would run here",
    load: async () => (await import("./cli/inspect")).inspectCommand,
  },
  estimate: {
    summary: "Say how fast a model would be, without loading it",
    load: async () => (await import("./cli/estimate")).estimateCommand,
  },
  profile: {
    summary: "Measure this machine: processor, memory, devices, storage",
    load: async () => (await import("./cli/profile")).profileCommand,
  },
  doctor: {
    summary: "Say what this machine offers, and what would make hypura faster here",
    load: async () => (await import("./cli/doctor")).doctorCommand,
  },
  bench: {
    summary: "Measure a model's speed, beside stock llama.cpp if asked to",
    load: async () => (await import("./cli/bench")).benchCommand,
  },
  iobench: {
    summary: "Measure how fast a volume gives bytes, by read size and depth",
    load: async () => (await import("./cli/iobench")).iobenchCommand,
  },
  replay: {
    summary: "Replay a routing trace through the cache policies",
    load: async () => (await import("./cli/replay")).replayCommand,
  },
  version: {
    summary: "Show the version of hypura and of llama.cpp in it",
    load: async () => (await import("./cli/version")).versionCommand,
  },
};

/** Messages are one line each on stderr, in colour only where a person looks. */
function setUpMessages(): void {
  const labels: Readonly<Record<string, string>> = {
    error: `${stderr.paint("red", "error")}: `,
    warn: `${stderr.paint("yellow", "warning")}: `,
  };
  consola.setReporters([
    {
      log: ({ type, args }) => {
        const text = oneLine(args.map(String).join(" "));
        tell(`${labels[type] ?? ""}${type === "info" ? stderr.paint("dim", text) : text}\n`);
      },
    },
  ]);
  consola.options.throttle = 0; // a line that repeats is a line
  consola.level = 3; // whatever the environment says: an error that is not shown helps nobody
}

/** Runs the command line of this process and ends it. */
export async function main(): Promise<never> {
  setUpMessages();
  const argv = process.argv.slice(2);
  if (argv[0] === engineCommand) {
    return (await import("./child")).runEngineChild();
  }
  process.exit(await run(argv));
}

async function run(argv: readonly string[]): Promise<number> {
  try {
    await dispatch(argv);
    return process.exitCode === undefined ? 0 : Number(process.exitCode);
  } catch (error) {
    return report(error, argv.includes("--json"));
  }
}

async function dispatch(argv: readonly string[]): Promise<void> {
  const [first, ...rest] = argv;
  if (first === benchRunCommand) {
    const { obeyRunOrder } = await import("./bench-run");
    await obeyRunOrder(print);
    return;
  }
  if (first === undefined || first === "help" || first === "--help" || first === "-h") {
    await print(`${await helpPage(rest.find((word) => !word.startsWith("-")))}\n`);
    return;
  }
  const name = first === "--version" || first === "-v" ? "version" : first;
  const { definition, takesMany } = await find(name);
  const { help, words } = readCommandLine(name, (definition.args ?? {}) as ArgsDef, rest, takesMany);
  if (help) {
    await print(`${await helpPage(name)}\n`);
    return;
  }
  await runCommand(definition, { rawArgs: [...words] });
}

async function find(name: string): Promise<Command> {
  const entry = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (entry === undefined) {
    const close = nearest(name, [...Object.keys(commands), "help"]);
    const hint = close === null ? "`hypura help` lists the commands" : `did you mean \`hypura ${close}\`?`;
    throw new HypuraError("usage", `there is no command ${JSON.stringify(name)}: ${hint}`);
  }
  return entry.load();
}

async function helpPage(name: string | undefined): Promise<string> {
  const { commandPage, overviewPage } = await import("./cli/help");
  if (name !== undefined && name !== "help") {
    return commandPage(name, await find(name));
  }
  const summaries = Object.entries(commands).map(([command, { summary }]) => ({ name: command, summary }));
  return overviewPage(packageJson.version, summaries);
}

/** One line for people on stderr, one object for scripts on stdout if they asked, the exit status for both. */
async function report(error: unknown, json: boolean): Promise<number> {
  const { code, message } = explain(error);
  consola.error(message);
  if (json) {
    await print(`${JSON.stringify({ error: { code, message } })}\n`).catch((second: unknown) => {
      // A stdout that is closed has been reported, or is the error itself.
      if (!(second instanceof HypuraError)) {
        throw second;
      }
    });
  }
  return exitStatus(code);
}

function explain(error: unknown): { readonly code: ErrorCode; readonly message: string } {
  if (error instanceof HypuraError) {
    return { code: error.code, message: error.message };
  }
  const { name, message } = error instanceof Error ? error : new Error(String(error));
  return name === "CLIError"
    ? { code: "usage", message }
    : {
        code: "internal",
        message: `${message} (this is a mistake in hypura: please report it, with the command line)`,
      };
}

if (import.meta.main) {
  await main();
}

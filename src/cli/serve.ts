// `hypura serve`: models for every tool that speaks Ollama, OpenAI or Anthropic. It reads flags and Ollama's own
// environment variables, says what is served and where, and ends the server on a signal.

import { consola } from "consola";
import { HypuraError } from "../errors";
import { type Address, originRule, parseOllamaHost } from "../http-policy";
import { Keeper, type KeeperOptions, type Log } from "../keeper";
import { type LibraryModel, ollamaStorePath, openLibrary } from "../library";
import { type Plan, totalBytes } from "../plan";
import { PrefixStore } from "../prefix-store";
import { openProjector } from "../projector";
import { type Server, serve } from "../server";
import { bytesText, countText, durationText, plural, rateText } from "../text";
import { durationSeconds } from "../wire-body";
import { bytesFlag, command, limitArgs, limitsOf, numberFlag, positionalsOf, warnOfCut } from "./command";
import { measureOnce } from "./measuring";
import { traceOption } from "./run";
import { print, tell } from "./terminal";

const args = {
  model: {
    type: "positional",
    description: "A .gguf file, a folder of them, or ollama:NAME[:TAG] out of an Ollama store",
    required: true,
  },
  host: {
    type: "string",
    description: "Address to listen on (127.0.0.1; OLLAMA_HOST)",
    valueHint: "ADDRESS",
  },
  port: { type: "string", description: "Port (8080; 0 takes any that is free; OLLAMA_HOST)", valueHint: "N" },
  context: {
    type: "string",
    alias: "c",
    description: "Tokens a request may use, prompt and answer (what fits, at most 32,768)",
    valueHint: "N",
  },
  parallel: {
    type: "string",
    description: "Requests that generate at once, each with its own context (1)",
    valueHint: "N",
  },
  "max-queue": { type: "string", description: "Requests that may wait for their turn (512)", valueHint: "N" },
  "keep-alive": {
    type: "string",
    description: "How long an idle model stays in memory, such as 30m; -1 is for ever (5m)",
    valueHint: "TIME",
  },
  name: {
    type: "string",
    description: "What clients call the model (from its file's name)",
    valueHint: "NAME",
  },
  mmproj: {
    type: "string",
    description: "The model's projector (mmproj file), with which it sees images",
    valueHint: "FILE",
  },
  origins: {
    type: "string",
    description: "Web pages that may use it too, such as https://chat.example.com; * is all",
    valueHint: "LIST",
  },
  threads: limitArgs.threads,
  memory: limitArgs.memory,
  "gpu-memory": limitArgs["gpu-memory"],
  "kv-type": limitArgs["kv-type"],
  mode: limitArgs.mode,
  speculation: limitArgs.speculation,
  draft: limitArgs.draft,
  "prefix-cache": {
    type: "string",
    description: "Keep what conversations begin with on disk, up to this size (off)",
    valueHint: "SIZE",
  },
  trace: {
    type: "string",
    description: "Write down what is streamed, for `hypura replay` (the next load: FILE.2)",
    valueHint: "FILE",
  },
  json: { type: "boolean", description: "Print one JSON object on stdout once it listens" },
  verbose: { type: "boolean", description: "Say what was decided and why, and every request" },
} as const;

type Flags = {
  readonly [Name in keyof typeof args]?: (typeof args)[Name]["type"] extends "boolean" ? boolean : string;
};

/** Running requests may finish for so long after a signal; what is left is cancelled. */
const graceMs = 2000;
const usualPort = 8080;

export const serveCommand = command(
  {
    meta: {
      name: "serve",
      description: "Serve models to everything that speaks Ollama, OpenAI or Anthropic",
    },
    args,
    async run({ args: given, rawArgs }) {
      const flags = given as Flags;
      const settings = settingsOf(flags, process.env);
      const log = logOf(flags.verbose === true);
      const prefixCache = bytesFlag("prefix-cache", flags["prefix-cache"]);
      const models = await openLibrary(positionalsOf(rawArgs), {
        limits: settings.limits,
        name: flags.name ?? null,
        storePath: ollamaStorePath(process.env),
        onWarning: (sentence) => consola.warn(sentence),
        measure: measureOnce,
        projector: flags.mmproj === undefined ? null : openProjector(flags.mmproj),
        prefixes: prefixCache === undefined ? null : new PrefixStore({ budgetBytes: prefixCache, log }),
      });
      const keeper = new Keeper<LibraryModel>({ ...settings, ...tracing(flags.trace, models, log), log });
      const server = serve({ ...settings, ...settings.address, models, keeper, log });
      await announce(server, models, settings, flags);
      await untilSignal(server);
    },
  },
  {
    takesMany: true,
    examples: [
      "hypura serve model.gguf",
      "hypura serve model.gguf --port 11434 --keep-alive 30m     # where Ollama's clients look",
      "hypura serve big.gguf small.gguf --memory 16G             # two models, one at a time in memory",
      "hypura serve big.gguf --prefix-cache 20G                  # keeps what an agent always says",
      "hypura serve models/ --parallel 4                         # a folder; four decode together",
      "hypura serve gemma.gguf --mmproj mmproj-gemma.gguf        # sees images",
      "hypura serve ollama:llama3.2:3b                           # what Ollama has pulled, read-only",
      'curl http://127.0.0.1:8080/api/generate -d \'{"model":"NAME","prompt":"Hi","stream":false}\'',
    ],
    notes: [
      "--prefix-cache writes the cache of each new system prompt with its tools to disk and takes it from\n" +
        "there after a restart, instead of evaluating it again, which takes minutes where weights are\n" +
        "streamed. What users and the model say is not written. For models of plain attention, and clients\n" +
        "of /api/chat, /api/generate and /v1/chat/completions; what was used longest ago goes first.\n" +
        "A model is loaded by its first request. One is in memory at a time: a request for another waits\n" +
        "until those that run are done, and then takes its place.\n" +
        "Without --context a request may use 32,768, 24,576 or 16,384 tokens (less where the model was\n" +
        "trained for less), the most that leaves all weights in memory; where they do not fit anyway,\n" +
        "16,384, or 32,768 if that takes less than an eighth of the memory.\n" +
        "OLLAMA_HOST, OLLAMA_ORIGINS, OLLAMA_KEEP_ALIVE, OLLAMA_CONTEXT_LENGTH, OLLAMA_NUM_PARALLEL,\n" +
        "OLLAMA_MAX_QUEUE and OLLAMA_MODELS mean what they mean to Ollama; flags win.\n" +
        "Only this machine is served unless --host says otherwise: there is no password.\n" +
        "Ctrl-C ends it: running answers get two seconds, a second Ctrl-C ends at once.",
    ],
  },
);

// ---- flags and environment --------------------------------------------------------------------------------------

interface Settings {
  readonly address: Address;
  readonly limits: ReturnType<typeof limitsOf>;
  readonly parallel: number;
  readonly maxQueue: number;
  readonly keepAliveSeconds: number;
  readonly origins: readonly string[];
}

type Environment = Readonly<Record<string, string | undefined>>;

function settingsOf(flags: Flags, environment: Environment): Settings {
  const whole = (least: number, most: number) => ({ least, most, integer: true });
  const number = (flag: "parallel" | "max-queue", variable: string, range: ReturnType<typeof whole>) =>
    numberFlag(flag, flags[flag], range) ?? numberVariable(environment, variable, range);
  // 0 leaves these two to Ollama, and so to us.
  const parallel = number("parallel", "OLLAMA_NUM_PARALLEL", whole(0, 256)) || 1;
  const context =
    flags.context ?? String(numberVariable(environment, "OLLAMA_CONTEXT_LENGTH", whole(0, 2 ** 24)) || "");
  return {
    address: addressOf(flags, environment),
    limits: {
      ...limitsOf({ ...flags, context: context === "" ? undefined : context }),
      slotCount: parallel,
      contextShift: true,
    },
    parallel,
    maxQueue: number("max-queue", "OLLAMA_MAX_QUEUE", whole(0, 1_000_000)) ?? 512,
    keepAliveSeconds: keepAliveOf(flags["keep-alive"], environment),
    origins: originsOf(flags.origins, environment),
  };
}

function variableOf(environment: Environment, variable: string): string | undefined {
  const value = environment[variable]?.trim();
  return value === "" ? undefined : value;
}

function numberVariable(
  environment: Environment,
  variable: string,
  range: { readonly least: number; readonly most: number },
): number | undefined {
  const text = variableOf(environment, variable);
  if (text === undefined) {
    return undefined;
  }
  const value = Number(text);
  if (!Number.isInteger(value) || value < range.least || value > range.most) {
    throw new HypuraError(
      "usage",
      `the environment variable ${variable} is ${JSON.stringify(text)}: set a whole number from ${range.least} to ${range.most}, or unset it`,
    );
  }
  return value;
}

function addressOf(flags: Flags, environment: Environment): Address {
  const variable = variableOf(environment, "OLLAMA_HOST");
  const fromVariable = variable === undefined ? undefined : parseOllamaHost(variable);
  const port = numberFlag("port", flags.port, { least: 0, most: 65_535, integer: true });
  if (flags.host !== undefined && !/^[\w.:[\]%-]+$/.test(flags.host)) {
    throw new HypuraError(
      "usage",
      `--host ${JSON.stringify(flags.host)}: give an address or a name of this machine, such as 0.0.0.0`,
    );
  }
  return {
    hostname: flags.host?.replace(/^\[|\]$/g, "") ?? fromVariable?.hostname ?? "127.0.0.1",
    port: port ?? fromVariable?.port ?? usualPort,
  };
}

function keepAliveOf(flag: string | undefined, environment: Environment): number {
  const text = flag ?? variableOf(environment, "OLLAMA_KEEP_ALIVE") ?? "5m";
  const seconds = durationSeconds(text);
  if (seconds === null) {
    const where = flag === undefined ? "the environment variable OLLAMA_KEEP_ALIVE" : "--keep-alive";
    throw new HypuraError(
      "usage",
      `${where} ${JSON.stringify(text)}: give a time such as 30m, 2h or 90s; -1 is for ever`,
    );
  }
  return seconds;
}

function originsOf(flag: string | undefined, environment: Environment): readonly string[] {
  const text = flag ?? variableOf(environment, "OLLAMA_ORIGINS") ?? "";
  const patterns = text
    .split(",")
    .map((one) => one.trim())
    .filter((one) => one !== "");
  try {
    originRule(patterns);
  } catch (cause) {
    const wrong = (cause as Error).message;
    const where = flag === undefined ? "OLLAMA_ORIGINS" : "--origins";
    throw new HypuraError(
      "usage",
      `${where} has ${JSON.stringify(wrong)}: give origins such as https://chat.example.com or https://*.example.com, divided by commas`,
      { cause },
    );
  }
  return patterns;
}

/** A trace for each load of a model that streams; refused now where none does. */
function tracing(
  path: string | undefined,
  models: readonly LibraryModel[],
  log: Log,
): Pick<KeeperOptions, "traceFor"> {
  const [first] = models;
  if (path === undefined || first === undefined) {
    return {};
  }
  const streams = models.find(({ firstPlan }) => firstPlan.streaming !== null) ?? first;
  traceOption(streams.firstPlan, path);
  let count = 0;
  return {
    traceFor(plan) {
      if (plan.streaming === null) {
        log("warn", `${plan.model.name} is all in memory now: this load has nothing to trace`);
        return undefined;
      }
      count++;
      const { trace } = traceOption(plan, count === 1 ? path : `${path}.${count}`);
      log("info", `the trace of this load goes to ${trace?.path}, once it is unloaded`);
      return trace;
    },
  };
}

// ---- what it says -----------------------------------------------------------------------------------------------

function logOf(verbose: boolean): Log {
  return (level, text) => {
    if (level === "debug") {
      if (verbose) {
        consola.info(text);
      }
      return;
    }
    consola[level](text);
  };
}

async function announce(
  server: Server,
  models: readonly LibraryModel[],
  settings: Settings,
  flags: Flags,
): Promise<void> {
  const endpoint = endpointOf(server);
  for (const { name, firstPlan } of models) {
    warnOfCut(settings.limits, firstPlan);
    tell(`${name}: ${planText(firstPlan, settings.parallel)}\n`);
    if (flags.verbose === true) {
      for (const choice of firstPlan.choices) {
        consola.info(`${choice.name}: ${choice.value} (${choice.reason})`);
      }
    }
  }
  const keep = settings.keepAliveSeconds;
  const stays =
    keep === Number.POSITIVE_INFINITY
      ? "stays loaded"
      : `stays loaded ${durationText(keep)} after its last answer`;
  tell(
    `${plural(models.length, "model")} at ${endpoint} (Ollama), ${endpoint}/v1 (OpenAI, Anthropic); a model ${stays}\n`,
  );
  if (flags.json === true) {
    const facts = {
      endpoint,
      pid: process.pid,
      models: models.map(({ served, firstPlan }) => factsOf(served.name, firstPlan)),
    };
    await print(`${JSON.stringify(facts)}\n`);
  }
}

function factsOf(name: string, plan: Plan): object {
  const { decodeTokensPerSecond, prefillTokensPerSecond, basis } = plan.estimate;
  return {
    name,
    mode: plan.mode,
    contextTokens: plan.contextTokens,
    memoryBytes: totalBytes(plan.memory),
    predicted: { decodeTokensPerSecond, prefillTokensPerSecond, basis },
  };
}

function endpointOf({ hostname, port }: Server): string {
  const name = hostname === "0.0.0.0" || hostname === "::" ? "127.0.0.1" : hostname;
  return `http://${name.includes(":") ? `[${name}]` : name}:${port}`;
}

function planText(plan: Plan, parallel: number): string {
  const { poolBytes } = plan.memory;
  const pool = poolBytes === 0 ? "" : `, a pool of ${bytesText(poolBytes)}`;
  const slots = parallel === 1 ? "" : ` for each of ${parallel} requests`;
  return `${plan.mode}, ${bytesText(totalBytes(plan.memory))} of memory${pool}, ${countText(plan.contextTokens)} tokens of context${slots}${speedText(plan)}`;
}

/** What to expect of one request: the prompt's speed decides how long an agent waits for a first word. */
function speedText({ estimate }: Plan): string {
  const { decodeTokensPerSecond: decode, prefillTokensPerSecond: prompt, basis, note } = estimate;
  if (decode === null) {
    return `, speed ${note}`;
  }
  const source = basis === "model" ? "" : ` (${note})`;
  return `, ${rateText(decode)} predicted${source}${prompt === null ? "" : `, prompts at ${rateText(prompt)}`}`;
}

/** Until the server has ended, which a signal asks for; a second one ends the process at once. */
async function untilSignal(server: Server): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let asked = false;
  const onSignal = (): void => {
    if (asked) {
      process.exit(130);
    }
    asked = true;
    consola.info("ending: answers under way get two seconds");
    server.stop(graceMs).then(resolve, reject);
  };
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const signal of signals) {
    process.on(signal, onSignal);
  }
  await promise;
  for (const signal of signals) {
    process.off(signal, onSignal);
  }
}

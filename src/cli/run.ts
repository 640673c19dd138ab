// `hypura run`: one prompt answered on stdout, or a chat. The answer is stdout's; everything else is stderr.

import { readFileSync } from "node:fs";
import { consola } from "consola";
import { type Prepared, prepare } from "../api";
import { type Engine, openEngine } from "../engine";
import { exitStatus, HypuraError } from "../errors";
import {
  type Answer,
  answerOf,
  type GenerateOptions,
  generate,
  type Message,
  type Prompt,
} from "../generate";
import { guessesText, guessSummary } from "../guesses";
import { peakMemoryBytes } from "../machine";
import { type Plan, totalBytes } from "../plan";
import { layersOf, layersText, streamingText } from "../streaming";
import { bytesText, countText, durationText } from "../text";
import { traceHeader } from "../trace";
import { interruptible, rememberAnswer, StreamingWatch, showAnswer, speedText, withAdvice } from "./answer";
import { command, limitArgs, limitsOf, numberFlag, repeatedFlag, warnOfCut, warnOfDraft } from "./command";
import { measureOnce } from "./measuring";
import { print, stderr, tell } from "./terminal";

const args = {
  model: { type: "positional", description: "A .gguf file (any file of a split model)", required: true },
  prompt: {
    type: "string",
    alias: "p",
    description: "The question; - reads it from stdin",
    valueHint: "TEXT",
  },
  "prompt-file": {
    type: "string",
    alias: "f",
    description: "Take the question from a file",
    valueHint: "FILE",
  },
  interactive: { type: "boolean", alias: "i", description: "Chat (as on a terminal without a prompt)" },
  system: {
    type: "string",
    alias: "s",
    description: "Instructions that stand before the conversation",
    valueHint: "TEXT",
  },
  "max-tokens": {
    type: "string",
    alias: "n",
    description: "Stop after so many tokens (512; in a chat no limit)",
    valueHint: "N",
  },
  ...limitArgs,
  trace: {
    type: "string",
    description: "Write down which strides the answer needs, for `hypura replay`",
    valueHint: "FILE",
  },
  seed: { type: "string", description: "Same seed, same answer", valueHint: "N" },
  temp: { type: "string", description: "Temperature; 0 takes the likeliest token each time", valueHint: "X" },
  "top-k": { type: "string", description: "Sample among the K likeliest tokens; 0 is all", valueHint: "K" },
  "top-p": {
    type: "string",
    description: "Sample among the likeliest tokens that make up P",
    valueHint: "P",
  },
  "min-p": {
    type: "string",
    description: "Drop tokens less likely than P times the likeliest",
    valueHint: "P",
  },
  stop: {
    type: "string",
    description: "End before this text; may be given more than once",
    valueHint: "TEXT",
  },
  raw: { type: "boolean", description: "Continue the prompt as it stands, without a chat template" },
  json: { type: "boolean", description: "Print one JSON object at the end instead of text as it comes" },
  verbose: { type: "boolean", description: "Say what was decided and why, and what llama.cpp has to say" },
} as const;

const defaultMaxTokens = 512;

export const runCommand = command(
  {
    meta: { name: "run", description: "Answer a prompt, or chat, with a model" },
    args,
    async run({ args: given, rawArgs }) {
      const flags = given as Flags;
      const options = generateOptions(flags, rawArgs);
      const isChat = wantsChat(flags);
      const prepared = await prepareRun(flags, isChat);
      const { trainedContextTokens, hasChatTemplate } = prepared.file.model;
      const prompt = await readPrompt(flags, isChat);
      await using engine = await open(prepared.plan, flags);
      if (isChat) {
        const { chat } = await import("./chat");
        const system = flags.system ?? null;
        process.exitCode = await chat(engine, { options, system, first: prompt, prepared });
        return;
      }
      const full = promptFor(prompt ?? "", flags, hasChatTemplate);
      try {
        await answerOnce(engine, full, { maxTokens: defaultMaxTokens, ...options }, { flags, prepared });
      } catch (error) {
        throw withAdvice(error, trainedContextTokens);
      }
    },
  },
  {
    examples: [
      "hypura run model.gguf                                      chat",
      'hypura run model.gguf --prompt "Why is the sky blue?"      one answer',
      'hypura run model.gguf --prompt-file essay.txt --system "Summarise in one sentence." --temp 0',
      'git diff | hypura run model.gguf --system "Write a commit message." --max-tokens 100',
      'hypura run model.gguf --prompt "Once upon a time" --raw    continue a text',
    ],
    notes: [
      "The answer is on stdout, all else on stderr: `hypura run ... > answer.txt` holds the answer alone.\n" +
        "What a reasoning model thinks is shown dimmed on a terminal only; --json has it too.\n" +
        "Ctrl-C ends the answer where it is. In the chat, /help lists the commands.",
    ],
  },
);

type Flags = {
  readonly [Name in keyof typeof args]?: (typeof args)[Name]["type"] extends "boolean" ? boolean : string;
};

function generateOptions(flags: Flags, words: readonly string[]): GenerateOptions {
  const real = (least: number, most: number) => ({ least, most, integer: false });
  const whole = (least: number, most: number) => ({ least, most, integer: true });
  const stop = repeatedFlag("stop", words);
  if (stop.includes("")) {
    throw new HypuraError(
      "usage",
      "--stop was given an empty text, which ends every answer at once: give some text",
    );
  }
  const options = {
    maxTokens: numberFlag("max-tokens", flags["max-tokens"], whole(1, 1_000_000)),
    temperature: numberFlag("temp", flags.temp, real(0, 100)),
    topK: numberFlag("top-k", flags["top-k"], whole(0, 1_000_000)),
    topP: numberFlag("top-p", flags["top-p"], real(0, 1)),
    minP: numberFlag("min-p", flags["min-p"], real(0, 1)),
    // 2^32 - 1 is llama.cpp's word for "any seed" (LLAMA_DEFAULT_SEED).
    seed: numberFlag("seed", flags.seed, whole(0, 2 ** 32 - 2)),
    stop: stop.length > 0 ? stop : undefined,
  };
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}

/** Whether this is a conversation; throws where flags contradict each other. */
function wantsChat(flags: Flags): boolean {
  const hasPrompt = flags.prompt !== undefined || flags["prompt-file"] !== undefined;
  const isChat = flags.interactive === true || (!hasPrompt && process.stdin.isTTY === true);
  const refuse = (sentence: string): never => {
    throw new HypuraError("usage", sentence);
  };
  if (flags.prompt !== undefined && flags["prompt-file"] !== undefined) {
    refuse("--prompt and --prompt-file were both given: give one");
  }
  if (isChat && flags.raw === true) {
    refuse("--raw continues a text and knows no conversation: give it with --prompt");
  }
  if (isChat && flags.json === true) {
    refuse("--json prints one answer and a chat has many: give it with --prompt");
  }
  if (isChat && flags.prompt === "-") {
    refuse("a chat reads stdin line by line, so --prompt - has nothing left to read: leave out one of them");
  }
  if (flags.raw === true && flags.system !== undefined) {
    refuse("--system has no place in a --raw prompt: write it into the prompt");
  }
  return isChat;
}

/** The plan of this run, said where it is not what was asked for. */
async function prepareRun(flags: Flags, isChat: boolean): Promise<Prepared> {
  const limits = limitsOf(flags);
  const prepared = await prepare(flags.model as string, limits, {
    onNote: (note) => consola.warn(note),
    measure: measureOnce,
  });
  const { file, plan } = prepared;
  const { hasChatTemplate } = file.model;
  warnOfCut(limits, plan);
  warnOfDraft(limits, plan);
  if (!hasChatTemplate && isChat) {
    throw new HypuraError(
      "unsupported-model",
      `${plan.model.name} has no chat template, so it knows no conversation: have it continue a text with --raw --prompt TEXT`,
    );
  }
  if (!hasChatTemplate && flags.raw !== true) {
    consola.warn(
      `${plan.model.name} has no chat template: it continues the prompt as it stands (--raw says so without this line)`,
    );
  }
  if (flags.verbose) {
    for (const choice of plan.choices) {
      consola.info(`${choice.name}: ${choice.value} (${choice.reason})`);
    }
  }
  return prepared;
}

/** The text of the prompt; null where a chat begins without one. */
async function readPrompt(flags: Flags, isChat: boolean): Promise<string | null> {
  const file = flags["prompt-file"];
  if (flags.prompt === undefined && file === undefined && isChat) {
    return null;
  }
  const [text, source] =
    file !== undefined
      ? [readText(file), `the prompt file ${JSON.stringify(file)}`]
      : flags.prompt !== undefined && flags.prompt !== "-"
        ? [flags.prompt, "--prompt"]
        : [await readStdin(), "stdin"];
  if (text.trim() === "") {
    throw new HypuraError("usage", `the prompt is empty (${source}): give a question with --prompt TEXT`);
  }
  return text;
}

function readText(path: string): string {
  try {
    return decode(readFileSync(path), `the prompt file ${JSON.stringify(path)}`);
  } catch (cause) {
    if (cause instanceof HypuraError) {
      throw cause;
    }
    const isMissing = (cause as { readonly code?: string }).code === "ENOENT";
    const sentence = isMissing
      ? `there is no prompt file ${JSON.stringify(path)}: check the path`
      : `the prompt file ${JSON.stringify(path)} cannot be read (${(cause as Error).message}): give a text file`;
    throw new HypuraError(isMissing ? "not-found" : "io", sentence, { cause });
  }
}

async function readStdin(): Promise<string> {
  let bytes: Uint8Array;
  try {
    bytes = await Bun.stdin.bytes();
  } catch (cause) {
    throw new HypuraError(
      "io",
      `stdin cannot be read (${(cause as Error).message}): give the prompt with --prompt`,
      { cause },
    );
  }
  return decode(bytes, "stdin");
}

function decode(bytes: Uint8Array, source: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new HypuraError("usage", `${source} is not UTF-8 text: convert it first (iconv -t UTF-8)`, {
      cause,
    });
  }
}

async function open(plan: Plan, flags: Flags): Promise<Engine> {
  const started = performance.now();
  const verbose = flags.verbose === true;
  let shown = false;
  const engine = await openEngine(plan, {
    ...traceOption(plan, flags.trace),
    onWarning: (text) => consola.warn(text),
    onProgress: (fraction) => {
      if (stderr.isTerminal) {
        shown = true;
        tell(`\r\x1b[Kloading ${plan.model.name}: ${Math.floor(fraction * 100)} %`);
      }
    },
    onLog: (level, text) => {
      if (verbose) {
        consola[level](text);
      }
    },
  }).finally(() => {
    if (shown) {
      tell("\r\x1b[K");
    }
  });
  if (verbose) {
    consola.info(`loaded: ${durationText((performance.now() - started) / 1000)}`);
  }
  return engine;
}

/** Where the trace goes and what stands before it. Throws where nothing would be in it. */
export function traceOption(
  plan: Plan,
  path: string | undefined,
): { readonly trace?: { readonly path: string; readonly header: string } } {
  if (path === undefined) {
    return {};
  }
  if (plan.streaming === null) {
    throw new HypuraError(
      "usage",
      "--trace writes down what streams, and the whole model is in memory: give --memory or --mode stream",
    );
  }
  return { trace: { path, header: JSON.stringify(traceHeader(plan, plan.streaming)) } };
}

function promptFor(text: string, flags: Flags, hasChatTemplate: boolean): Prompt {
  if (flags.raw === true || !hasChatTemplate) {
    return { text: flags.system === undefined ? text : `${flags.system}\n\n${text}` };
  }
  const messages: Message[] = [{ role: "user", content: text }];
  if (flags.system !== undefined) {
    messages.unshift({ role: "system", content: flags.system });
  }
  return { messages };
}

async function answerOnce(
  engine: Engine,
  prompt: Prompt,
  options: GenerateOptions,
  {
    flags: { json = false, verbose = false },
    prepared,
  }: { readonly flags: Flags; readonly prepared: Prepared },
): Promise<void> {
  const watch = new StreamingWatch(engine);
  const answer = await interruptible((signal) => {
    const pieces = watch.follow(generate(engine, prompt, { ...options, signal }));
    return json ? answerOf(pieces) : showAnswer(pieces);
  });
  const streaming = await watch.counters();
  const counted = await watch.guesses();
  const { plan } = engine;
  const decodedTokens = answer.timings.generatedTokens - 1; // the first came with the prompt
  const guessed =
    counted === null || decodedTokens < 1 ? null : guessSummary(counted, decodedTokens, streaming);
  rememberAnswer(prepared, answer, streaming);
  if (json) {
    const { decodeTokensPerSecond, basis } = plan.estimate;
    const facts = {
      model: plan.model.name,
      mode: plan.mode,
      ...answer,
      predicted: { decodeTokensPerSecond, basis },
      peakBytes: peakMemoryBytes(),
      streaming,
      guesses: guessed,
    };
    await print(`${JSON.stringify(facts)}\n`);
  } else {
    await print("\n");
    consola.info(summary(engine, answer));
    if (streaming !== null && streaming.passes > 0 && plan.streaming !== null && decodedTokens > 0) {
      const decoded = { tokens: decodedTokens, seconds: answer.timings.generatedSeconds };
      consola.info(streamingText(streaming, decoded, plan.streaming.touchedBytesPerToken));
      if (verbose) {
        tell(`${layersText(layersOf(streaming, plan), decoded.tokens)}\n`);
      }
    }
    if (guessed !== null) {
      consola.info(guessesText(guessed));
    }
  }
  if (answer.finish === "cancelled") {
    process.exitCode = exitStatus("cancelled");
  }
}

/** The line after an answer: speed, where the bytes are, why it ended. */
function summary({ plan, info }: Engine, answer: Answer): string {
  const { weightBytes, poolBytes } = plan.memory;
  const nvmeBytes = plan.tensors.reduce(
    (sum, { tier, sizeBytes }) => sum + (tier === "nvme" ? sizeBytes : 0),
    0,
  );
  const pool = poolBytes === 0 ? "" : ` with a pool of ${bytesText(poolBytes)}`;
  return [
    speedText(answer, plan),
    `${plan.mode}: ${bytesText(weightBytes + poolBytes)} in ram${pool}, ${bytesText(nvmeBytes)} on nvme`,
    `peak ${bytesText(peakMemoryBytes())} of ${bytesText(totalBytes(plan.memory))} planned`,
    endText(answer, info.contextTokens),
  ].join(", ");
}

function endText({ finish, timings }: Answer, contextTokens: number): string {
  switch (finish) {
    case "stop":
      return durationText(timings.promptSeconds + timings.generatedSeconds);
    case "length":
      return "stopped at --max-tokens";
    case "context":
      return `stopped because the context of ${countText(contextTokens)} tokens is full (--context N)`;
    case "cancelled":
      return "stopped by Ctrl-C";
  }
}

// hypura for scripts, what `import { open } from "hypura"` gives: open a model, chat with it, have it continue a
// text. It owns the life of a model in a script and the shape of a reply; the command line opens models by the same
// `prepare`. It knows no terminal.

import { availableParallelism } from "node:os";
import { basename } from "node:path";
import { planWithDraft } from "./draft";
import { type Engine, openEngine } from "./engine";
import { HypuraError } from "./errors";
import {
  type Answer,
  type GenerateOptions,
  generate,
  type Message,
  type Piece,
  type Prompt,
} from "./generate";
import { type Machine, readMachine } from "./machine";
import { type ModelFile, openModelFile } from "./modelfile";
import { type Knowledge, makePlan, noLimits, type Plan, type PlanLimits } from "./plan";
import { isMeasured, type Surroundings, surroundingsOf } from "./surroundings";

export { RequestError } from "./engine";
export { type ErrorCode, HypuraError } from "./errors";
export {
  type Answer,
  type Finish,
  type GenerateOptions,
  type Message,
  type Piece,
  PromptTooLongError,
  type Timings,
} from "./generate";
export type { Plan } from "./plan";

export interface ModelOptions {
  /** Tokens the model can look back on; by default 4,096, or what the model was trained for or what fits. */
  readonly contextTokens?: number;
  /** Compute threads; by default one for each core, at most one for each processor. */
  readonly threads?: number;
  /** Use at most so many bytes of memory; by default what is free. What does not fit is streamed from the file. */
  readonly memoryBytes?: number;
  /** Replies that are generated at once (1 by default); others wait. Each has its own context, which takes memory. */
  readonly parallel?: number;
  /** The share of the model that is loaded, 0 to 1. */
  readonly onProgress?: (fraction: number) => void;
  /** llama.cpp's warnings and errors. */
  readonly onLog?: (level: "warn" | "error", text: string) => void;
}

export interface ChatOptions extends GenerateOptions {
  /** Instructions that stand before the conversation. */
  readonly system?: string;
}

/**
 * One reply: iterate over it for its text as it comes, or over `pieces()` for thinking and timings too, or only
 * await `answer()`. Generation starts with the first of these, runs once, and stops when the loop is left.
 */
export interface Reply extends AsyncIterable<string> {
  /** The reply piece by piece; the last one holds the answer. */
  pieces(): AsyncIterable<Piece>;
  /** The whole answer with its timings, once it is complete. */
  answer(): Promise<Answer>;
}

/** A loaded model. `await using` closes it at the end of its block. */
export interface Model extends AsyncDisposable {
  readonly name: string;
  /** Where every byte went, and why. */
  readonly plan: Plan;
  /** Tokens that prompt and reply may have together. */
  readonly contextTokens: number;
  /** Without one the model knows no conversation, and `chat` refuses. */
  readonly hasChatTemplate: boolean;
  /** The reply to a question, or to a conversation that ends with one, in the model's own chat template. */
  chat(conversation: string | readonly Message[], options?: ChatOptions): Reply;
  /** The continuation of a text as it stands. */
  generate(text: string, options?: GenerateOptions): Reply;
  /** Ends the replies that run and gives the memory back. */
  close(): Promise<void>;
}

/** Loads the .gguf file at `path` (any file of a split model). Throws HypuraError where it cannot run here. */
export async function open(path: string, options: ModelOptions = {}): Promise<Model> {
  const { plan } = await prepare(path, {
    contextTokens: countOption("contextTokens", options.contextTokens),
    threads: countOption("threads", options.threads),
    slotCount: countOption("parallel", options.parallel) ?? 1,
    memoryBytes: countOption("memoryBytes", options.memoryBytes),
  });
  return modelOf(await openEngine(plan, options));
}

export interface PrepareOptions {
  /** What a person should know of how the plan came about. */
  readonly onNote?: (text: string) => void;
  /** Measures the machine for the model at this path; by default without a word. */
  readonly measure?: (modelPath: string) => Promise<Surroundings>;
}

export interface Prepared {
  readonly file: ModelFile;
  readonly plan: Plan;
  readonly machine: Machine;
}

/**
 * The model file at `path` and how it runs here; no weight is read yet. Where something has to stream and the machine
 * was never measured, it is measured first, which takes some ten seconds; what fits in memory never waits for that.
 * Throws where the model cannot run.
 */
export async function prepare(
  path: string,
  limits: PlanLimits = noLimits,
  options: PrepareOptions = {},
): Promise<Prepared> {
  const { onNote, measure = (modelPath) => surroundingsOf(modelPath, { measure: "if-needed", onNote }) } =
    options;
  const file = openModelFile(path);
  const known = await surroundingsOf(file.path, { measure: "cached", onNote });
  const first = planOf(file, limits, known.machine, known.knowledge);
  const isGiven = limits.plan !== undefined && limits.plan !== null;
  if (first.streaming === null || isGiven || isMeasured(known)) {
    return { file, plan: first, machine: known.machine };
  }
  const { machine, knowledge } = await measure(file.path);
  return { file, plan: planOf(file, limits, machine, knowledge), machine };
}

/** How the model in `file` runs on this machine. Throws where it cannot. */
export function planOf(
  file: ModelFile,
  limits: PlanLimits,
  machine: Machine = readMachine(),
  knowledge: Knowledge = {},
): Plan {
  if (!file.model.generatesText) {
    throw new HypuraError(
      "unsupported-model",
      `${JSON.stringify(basename(file.path))} (${file.model.architecture}) turns text into vectors and generates none: take a language model`,
    );
  }
  // ggml's threads wait for each other at every operation: more than there are processors take minutes for a token.
  if (limits.threads !== null && limits.threads > availableParallelism()) {
    throw new HypuraError(
      "usage",
      `${limits.threads} threads are more than this machine has processors: give at most ${availableParallelism()}`,
    );
  }
  const name = basename(file.path).replace(/(-00001-of-\d{5})?\.gguf$/i, "");
  const subject = { name, files: file.files, model: file.model };
  return planWithDraft(file, limits, (all) => makePlan(subject, machine, all, knowledge));
}

/** The model that an open engine holds. */
export function modelOf(engine: Engine): Model {
  return {
    name: engine.plan.model.name,
    plan: engine.plan,
    contextTokens: engine.info.contextTokens,
    hasChatTemplate: engine.info.hasChatTemplate,
    chat(conversation, { system, ...options } = {}) {
      if (!engine.info.hasChatTemplate) {
        throw new HypuraError(
          "unsupported-model",
          `${engine.plan.model.name} has no chat template: use generate()`,
        );
      }
      const given =
        typeof conversation === "string" ? [{ role: "user", content: conversation } as const] : conversation;
      const messages =
        system === undefined ? given : [{ role: "system", content: system } as const, ...given];
      return replyOf(engine, { messages }, options);
    },
    generate: (text, options = {}) => replyOf(engine, { text }, options),
    close: () => engine.close(),
    [Symbol.asyncDispose]: () => engine.close(),
  };
}

function replyOf(engine: Engine, prompt: Prompt, options: GenerateOptions): Reply {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  promise.catch(() => {}); // who iterates meets the error there
  let started = false;

  async function* run(): AsyncGenerator<Piece> {
    const stop = new AbortController();
    const signal =
      options.signal === undefined ? stop.signal : AbortSignal.any([options.signal, stop.signal]);
    const pieces = generate(engine, prompt, { ...options, signal });
    let ended = false;
    try {
      for (let next = await pieces.next(); next.done !== true; next = await pieces.next()) {
        if (next.value.type === "end") {
          ended = true;
          resolve(next.value.answer);
        }
        yield next.value;
      }
    } catch (error) {
      ended = true;
      reject(error);
      throw error;
    } finally {
      if (!ended) {
        // The loop over the reply was left: what came so far is the answer.
        stop.abort();
        const last = await pieces.next();
        if (last.value?.type === "end") {
          resolve(last.value.answer);
        }
      }
    }
  }

  function pieces(): AsyncGenerator<Piece> {
    if (started) {
      throw new HypuraError("usage", "a reply can be read once: keep its text, or ask again");
    }
    started = true;
    return run();
  }

  return {
    pieces,
    async answer() {
      if (!started) {
        for await (const _ of pieces()) {
          // run() takes the answer out of the last piece
        }
      }
      return promise;
    },
    async *[Symbol.asyncIterator]() {
      for await (const piece of pieces()) {
        if (piece.type === "text") {
          yield piece.text;
        }
      }
    },
  };
}

function countOption(name: string, value: number | undefined): number | null {
  if (value !== undefined && !(Number.isSafeInteger(value) && value > 0)) {
    throw new HypuraError("usage", `${name} is ${value}: give a whole number above 0`);
  }
  return value ?? null;
}

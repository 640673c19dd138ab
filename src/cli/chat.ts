// The chat of `hypura run`: lines in, answers out, until somebody leaves. The whole conversation is sent each time,
// and the engine evaluates only what its KV cache does not hold yet; nothing is loaded twice. What a line means and
// what a saved conversation looks like is in ../chat.ts, how lines are read in ./lines.ts.

import {
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { consola } from "consola";
import type { Prepared } from "../api";
import {
  askedMessages,
  type Conversation,
  chatCommands,
  emptyConversation,
  fromFile,
  type Input,
  readInput,
  toFile,
  withTurn,
} from "../chat";
import type { Engine } from "../engine";
import { exitStatus, HypuraError } from "../errors";
import { type Answer, type GenerateOptions, generate, PromptTooLongError } from "../generate";
import { userHome } from "../state";
import { countText, plural, table } from "../text";
import { rememberAnswer, StreamingWatch, showAnswer, speedText } from "./answer";
import { interrupted, type Lines, openLines } from "./lines";
import { print, stderr, tell } from "./terminal";

export interface ChatSetup {
  readonly options: GenerateOptions;
  readonly system: string | null;
  /** A first message that the command line gave. */
  readonly first: string | null;
  /** What runs, and where. */
  readonly prepared: Prepared;
}

const promptMark = "> ";

/** Chats until the user leaves; gives the exit status. */
export async function chat(engine: Engine, setup: ChatSetup): Promise<number> {
  const isTerminal = process.stdin.isTTY === true && stderr.isTerminal;
  if (isTerminal) {
    const room = `${countText(engine.info.contextTokens)} tokens of context`;
    consola.info(`${engine.plan.model.name}, ${room}`);
    consola.info("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves");
  }
  const lines = openLines(stderr.paint("bold", promptMark));
  try {
    return await converse(new Chat(engine, setup, lines), lines, setup.first, isTerminal);
  } finally {
    lines.close();
  }
}

async function converse(
  talk: Chat,
  lines: Lines,
  first: string | null,
  isTerminal: boolean,
): Promise<number> {
  let status = 0;
  for (let pending = first; ; pending = null) {
    if (pending !== null && isTerminal) {
      tell(`${promptMark}${pending}\n`);
    }
    const line = pending ?? (await lines.next());
    if (line === null || line === interrupted) {
      tell(isTerminal ? "\n" : "");
      return line === null ? status : exitStatus("cancelled");
    }
    // What the command line gave is a message whatever it looks like.
    const input: Input = pending === null ? readInput(line) : { type: "message", text: line };
    if (input.type === "quit") {
      return status;
    }
    try {
      await talk.take(input);
    } catch (error) {
      if (!(error instanceof HypuraError) || !isHarmless(error)) {
        throw error;
      }
      consola.error(error.message);
      status = isTerminal ? 0 : exitStatus(error.code); // a script should learn of it, a person has read it
    }
  }
}

/** An error after which the conversation can go on as it was. */
function isHarmless(error: HypuraError): boolean {
  return (
    error.code === "request" ||
    error.code === "usage" ||
    error.code === "not-found" ||
    error instanceof FileError
  );
}

class FileError extends HypuraError {}

/** A conversation with an engine. */
class Chat {
  readonly #engine: Engine;
  readonly #options: GenerateOptions;
  readonly #lines: Lines;
  readonly #prepared: Prepared;
  #conversation: Conversation;

  constructor(engine: Engine, setup: ChatSetup, lines: Lines) {
    this.#engine = engine;
    this.#options = setup.options;
    this.#lines = lines;
    this.#prepared = setup.prepared;
    this.#conversation = { ...emptyConversation, system: setup.system };
  }

  async take(input: Exclude<Input, { readonly type: "quit" }>): Promise<void> {
    switch (input.type) {
      case "nothing":
        return;
      case "message":
        return this.#ask(input.text);
      case "help":
        return tell(`${table(chatCommands.map(([command, meaning]) => [`  ${command}`, meaning]))}\n`);
      case "clear":
        this.#conversation = { ...this.#conversation, messages: [] };
        return consola.info("the conversation is forgotten");
      case "system":
        return this.#setSystem(input.text);
      case "save":
        return this.#save(input.path);
      case "load":
        return this.#load(input.path);
      case "mistake":
        throw new HypuraError("usage", input.sentence);
    }
  }

  async #ask(text: string): Promise<void> {
    const stop = new AbortController();
    this.#lines.listen(() => {
      if (stop.signal.aborted) {
        this.#lines.close();
        process.exit(exitStatus("cancelled"));
      }
      stop.abort();
    });
    const messages = askedMessages(this.#conversation, text);
    const watch = new StreamingWatch(this.#engine);
    const pieces = watch.follow(
      generate(this.#engine, { messages }, { ...this.#options, signal: stop.signal }),
    );
    const answer = await showAnswer(pieces).catch((error: unknown) => {
      throw error instanceof PromptTooLongError ? tooLong(error, this.#conversation) : error;
    });
    if (answer.text !== "" && !answer.text.endsWith("\n")) {
      await print("\n");
    }
    this.#conversation = withTurn(this.#conversation, text, answer.text);
    rememberAnswer(this.#prepared, answer, await watch.counters());
    consola.info([speedText(answer, this.#engine.plan), ...endNotes(answer)].join(", "));
    if (answer.finish === "context") {
      consola.warn(
        `the context of ${countText(this.#engine.info.contextTokens)} tokens is full: ${fullAdvice}`,
      );
    }
  }

  #setSystem(text: string): void {
    if (text === "") {
      const { system } = this.#conversation;
      consola.info(system === null ? "there is no system text" : `system: ${system}`);
      return;
    }
    this.#conversation = { ...this.#conversation, system: text === "-" ? null : text };
    consola.info(
      text === "-" ? "the system text is removed" : "the system text is set, from the next message on",
    );
  }

  #save(path: string): void {
    const file = withHome(path);
    writeConversation(file, toFile(this.#conversation, this.#engine.plan.model.name));
    consola.info(`${plural(this.#conversation.messages.length, "message")} saved in ${JSON.stringify(file)}`);
  }

  #load(path: string): void {
    const file = withHome(path);
    this.#conversation = fromFile(readConversation(file), file);
    consola.info(
      `${plural(this.#conversation.messages.length, "message")} loaded from ${JSON.stringify(file)}`,
    );
  }
}

const fullAdvice =
  "/save FILE keeps the conversation, /clear starts anew, --context N at the start gives more room";

function tooLong(error: PromptTooLongError, { messages }: Conversation): HypuraError {
  const { promptTokens, contextTokens } = error;
  const sentence =
    messages.length === 0
      ? `the message has ${countText(promptTokens)} tokens and the context holds ${countText(contextTokens)}: shorten it, or start with a larger --context`
      : `the context is full, ${countText(promptTokens)} tokens for ${countText(contextTokens)}: ${fullAdvice}`;
  return new HypuraError("request", sentence, { cause: error });
}

function endNotes({ finish, text }: Answer): readonly string[] {
  switch (finish) {
    case "stop":
    case "context":
      return [];
    case "length":
      return ["stopped at --max-tokens"];
    case "cancelled":
      return [text === "" ? "stopped before the first word; the message is dropped" : "stopped by Ctrl-C"];
  }
}

// ---- files ------------------------------------------------------------------------------------------------------

/** No shell expands what is typed here. */
function withHome(path: string): string {
  return path.startsWith("~/") ? `${userHome()}${path.slice(1)}` : path;
}

/** Whole or not at all, and never over a file that is something else. */
function writeConversation(path: string, text: string): void {
  if (existsSync(path) && !isConversation(path)) {
    throw new FileError(
      "io",
      `${JSON.stringify(path)} exists and is no saved conversation: choose another name`,
    );
  }
  const temporary = `${path}.${process.pid}.tmp`;
  try {
    const descriptor = openSync(temporary, "wx", 0o600);
    try {
      writeFileSync(descriptor, text);
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
    renameSync(temporary, path);
  } catch (cause) {
    rmSync(temporary, { force: true });
    throw new FileError("io", `${JSON.stringify(path)} was not saved: ${reasonOf(cause)}`, { cause });
  }
}

function isConversation(path: string): boolean {
  try {
    fromFile(readConversation(path), path);
    return true;
  } catch (error) {
    if (error instanceof HypuraError) {
      return false;
    }
    throw error;
  }
}

/** More than any context holds. */
const maxConversationBytes = 256_000_000;

function readConversation(path: string): string {
  try {
    const stat = statSync(path);
    if (!stat.isFile() || stat.size > maxConversationBytes) {
      throw new FileError(
        "io",
        `${JSON.stringify(path)} is no saved conversation: give a file that /save wrote`,
      );
    }
    return readFileSync(path, "utf8");
  } catch (cause) {
    throw cause instanceof HypuraError
      ? cause
      : new FileError("io", `${JSON.stringify(path)} was not loaded: ${reasonOf(cause)}`, { cause });
  }
}

function reasonOf(cause: unknown): string {
  const { code, message } = cause as { readonly code?: string; readonly message: string };
  switch (code) {
    case "ENOENT":
    case "ENOTDIR":
      return "there is no such file or folder, check the path";
    case "EACCES":
    case "EPERM":
    case "EROFS":
      return "this user has no permission there, choose another place";
    case "ENOSPC":
    case "EDQUOT":
      return "the disk is full, make room or choose another place";
    default:
      return message;
  }
}

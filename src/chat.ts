// A conversation as a value: what was said, what a line that a person types means, and the file that keeps it. It
// knows no terminal, no file system and no engine, so that everything here is tested without them. Pure.

import { HypuraError } from "./errors";
import type { Message } from "./generate";

export interface Conversation {
  /** Stands before the first message; null where there is none. */
  readonly system: string | null;
  /** User and assistant by turns; the user begins. */
  readonly messages: readonly Message[];
}

export const emptyConversation: Conversation = { system: null, messages: [] };

/** What the model is shown when the user says `text`. */
export function askedMessages(conversation: Conversation, text: string): readonly Message[] {
  const { system, messages } = conversation;
  const before: readonly Message[] = system === null ? [] : [{ role: "system", content: system }];
  return [...before, ...messages, { role: "user", content: text }];
}

/**
 * The conversation after a question and its answer. An answer without a word leaves it as it was: most chat
 * templates refuse two questions in a row.
 */
export function withTurn(conversation: Conversation, question: string, answer: string): Conversation {
  if (answer === "") {
    return conversation;
  }
  const { system, messages } = conversation;
  return {
    system,
    messages: [...messages, { role: "user", content: question }, { role: "assistant", content: answer }],
  };
}

export type Input =
  | { readonly type: "nothing" }
  | { readonly type: "message"; readonly text: string }
  | { readonly type: "help" | "clear" | "quit" }
  | { readonly type: "system"; readonly text: string }
  | { readonly type: "save" | "load"; readonly path: string }
  /** A command that does not exist, or lacks what it needs; the sentence says so. */
  | { readonly type: "mistake"; readonly sentence: string };

/** What /help shows. */
export const chatCommands: readonly (readonly [string, string])[] = [
  ["/help", "show this"],
  ["/clear", "forget the conversation (the system text stays)"],
  ["/system TEXT", "set the system text; alone: show it; /system - removes it"],
  ["/save FILE", "keep the conversation in a file"],
  ["/load FILE", "go on with a conversation from a file"],
  ["/quit", "leave (also Ctrl-D)"],
];

/** The meaning of what was typed. Only `/word` is a command: a path such as /etc/hosts begins a message. */
export function readInput(line: string): Input {
  const text = line.trim();
  if (text === "") {
    return { type: "nothing" };
  }
  const match = /^\/([a-z]+|\?)(?:\s+([\s\S]*))?$/i.exec(text);
  if (match === null) {
    return { type: "message", text };
  }
  const name = (match[1] as string).toLowerCase();
  const rest = match[2] ?? "";
  switch (name) {
    case "help":
    case "?":
      return { type: "help" };
    case "clear":
      return { type: "clear" };
    case "quit":
    case "exit":
    case "bye":
      return { type: "quit" };
    case "system":
      return { type: "system", text: rest };
    case "save":
    case "load":
      return rest === ""
        ? { type: "mistake", sentence: `/${name} needs the name of a file: /${name} talk.json` }
        : { type: name, path: rest };
    default:
      return { type: "mistake", sentence: `there is no command /${name}: /help lists them` };
  }
}

// ---- the file ---------------------------------------------------------------------------------------------------

const format = "hypura-conversation";

/** The conversation as the text of a file. */
export function toFile(conversation: Conversation, modelName: string): string {
  const { system, messages } = conversation;
  return `${JSON.stringify({ format, version: 1, model: modelName, system, messages }, null, 2)}\n`;
}

/** The conversation that `text`, from the file called `name`, holds. Throws `usage` with what is wrong with it. */
export function fromFile(text: string, name: string): Conversation {
  const wrong = (what: string): HypuraError =>
    new HypuraError("usage", `${JSON.stringify(name)} is no conversation that /save wrote: ${what}`);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw wrong("it is not JSON");
  }
  if (!isRecord(value) || value["format"] !== format) {
    throw wrong(`it has no "format": "${format}"`);
  }
  if (value["version"] !== 1) {
    throw wrong(
      `its version is ${JSON.stringify(value["version"]) ?? "missing"}, this hypura reads version 1`,
    );
  }
  const { system, messages } = value;
  if (system !== null && typeof system !== "string") {
    throw wrong("its system is neither a text nor null");
  }
  if (!Array.isArray(messages)) {
    throw wrong("its messages are no list");
  }
  return {
    system,
    messages: messages.map((message: unknown, index) => readMessage(message, index, messages.length, wrong)),
  };
}

function readMessage(
  message: unknown,
  index: number,
  count: number,
  wrong: (what: string) => HypuraError,
): Message {
  const role = index % 2 === 0 ? "user" : "assistant";
  if (!isRecord(message) || typeof message["content"] !== "string") {
    throw wrong(`message ${index + 1} has no content`);
  }
  if (message["role"] !== role) {
    throw wrong(
      `message ${index + 1} is of ${JSON.stringify(message["role"]) ?? "nobody"} where ${role} has its turn`,
    );
  }
  if (index === count - 1 && role === "user") {
    throw wrong("its last message has no answer");
  }
  return { role, content: message["content"] };
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

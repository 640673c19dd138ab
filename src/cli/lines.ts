// Where a chat gets its lines from: a terminal with editing, history and pasting, or a pipe. It owns the terminal's
// state (raw mode, bracketed paste) and gives it back on every way out; editing itself is node:readline's. It does
// not know what a line means.
//
// On a terminal the bytes pass a filter before readline sees them. Readline takes each line break of a paste for
// the Enter key; the filter finds the marks of a bracketed paste (\x1b[200~ and \x1b[201~) and makes the paste one
// line, in which line breaks stand as ⏎ until the line is complete. While an answer is printed the filter holds
// what is typed back for the next prompt, and looks for Ctrl-C.

import { createInterface, type Interface } from "node:readline";
import { PassThrough } from "node:stream";
import { plural } from "../text";
import { stderr, tell } from "./terminal";

export const interrupted = Symbol("Ctrl-C");

export interface Lines {
  /** The next line; null at the end of input, `interrupted` for Ctrl-C at an empty prompt. */
  next(): Promise<string | null | typeof interrupted>;
  /** From now until the next `next()`, Ctrl-C calls `onInterrupt`. */
  listen(onInterrupt: () => void): void;
  /** Gives the terminal back. Idempotent. */
  close(): void;
}

/** Line breaks of a paste, while it is edited. */
const breakMark = "⏎";
/** Bracketed paste mode, DECSET 2004 of xterm. */
const pasteOn = "\x1b[?2004h";
const pasteOff = "\x1b[?2004l";
const pasteStart = "\x1b[200~";
const pasteEnd = "\x1b[201~";
/** A longer paste is shown by its size; readline would redraw it whole at every key. */
const maxInlineLength = 500;

/** Turns what a terminal sends into what readline should see. Holds no stream, so that it is tested with strings. */
export class PasteFilter {
  readonly #long = new Map<string, string>();
  #pasted: string | null = null;
  #rest = "";

  feed(chunk: string): string {
    let input = this.#rest + chunk;
    this.#rest = "";
    let output = "";
    while (input !== "") {
      const mark = this.#pasted === null ? pasteStart : pasteEnd;
      const at = input.indexOf(mark);
      // A mark may be cut in two; a lone Escape outside a paste is a key.
      const keep = at >= 0 ? 0 : partialMark(input, mark, this.#pasted === null ? 2 : 1);
      const text = input.slice(0, at >= 0 ? at : input.length - keep);
      this.#rest = keep === 0 ? "" : input.slice(-keep);
      input = at >= 0 ? input.slice(at + mark.length) : "";
      if (this.#pasted === null) {
        output += text;
        this.#pasted = at >= 0 ? "" : null;
      } else {
        this.#pasted += text;
        if (at >= 0) {
          output += this.#insertion(this.#pasted);
          this.#pasted = null;
        }
      }
    }
    return output;
  }

  /** The line as it was meant: marks replaced by what they stand for. */
  restore(line: string): string {
    const text = line.replaceAll(breakMark, "\n");
    return text.replace(/\[paste \d+: [\d,]+ lines?\]/g, (label) => this.#long.get(label) ?? label);
  }

  #insertion(pasted: string): string {
    const text = pasted.replace(/\r\n?/g, "\n").replace(/[\x00-\x08\x0b-\x1f\x7f]/g, "");
    if (text.length <= maxInlineLength) {
      return text.replaceAll("\n", breakMark);
    }
    const label = `[paste ${this.#long.size + 1}: ${plural(text.trimEnd().split("\n").length, "line")}]`;
    this.#long.set(label, text);
    return label;
  }
}

/** How many characters at the end of `text` may be the beginning of `mark`; fewer than `least` do not count. */
function partialMark(text: string, mark: string, least: number): number {
  for (let length = Math.min(mark.length - 1, text.length); length >= least; length--) {
    if (text.endsWith(mark.slice(0, length))) {
      return length;
    }
  }
  return 0;
}

/** Lines that readline has completed and nobody has asked for yet, and who waits for one. */
class LineQueue {
  readonly #lines: (string | null | typeof interrupted)[] = [];
  #waiting: ((line: string | null | typeof interrupted) => void) | undefined;

  get isEmpty(): boolean {
    return this.#lines.length === 0;
  }

  push(line: string | null | typeof interrupted): void {
    if (this.#waiting === undefined) {
      this.#lines.push(line);
      return;
    }
    const resolve = this.#waiting;
    this.#waiting = undefined;
    resolve(line);
  }

  shift(): Promise<string | null | typeof interrupted> {
    const line = this.#lines.shift();
    if (line !== undefined) {
      return Promise.resolve(line);
    }
    return new Promise((resolve) => {
      this.#waiting = resolve;
    });
  }
}

export function openLines(prompt: string): Lines {
  return process.stdin.isTTY === true && stderr.isTerminal ? openTerminal(prompt) : openPipe();
}

function openPipe(): Lines {
  const queue = new LineQueue();
  const reader = createInterface({ input: process.stdin, crlfDelay: Number.POSITIVE_INFINITY });
  let onInterrupt: (() => void) | undefined;
  const onSignal = (): void => (onInterrupt ?? (() => queue.push(interrupted)))();
  process.on("SIGINT", onSignal);
  reader.on("line", (line) => queue.push(line));
  reader.on("close", () => queue.push(null));
  return {
    next() {
      onInterrupt = undefined;
      return queue.shift();
    },
    listen(handler) {
      onInterrupt = handler;
    },
    close() {
      process.off("SIGINT", onSignal);
      reader.close();
    },
  };
}

function openTerminal(prompt: string): Lines {
  const queue = new LineQueue();
  const filter = new PasteFilter();
  // Readline changes the mode itself when Ctrl-Z stops the process and the shell lets it go on.
  const setRawMode = (raw: boolean): void => void process.stdin.setRawMode(raw);
  const keys = Object.assign(new PassThrough(), { isTTY: true, setRawMode });
  const held: string[] = [];
  let onInterrupt: (() => void) | undefined;
  let editor: Interface | undefined;
  const onKeys = (chunk: string): void => {
    if (onInterrupt === undefined) {
      keys.write(filter.feed(chunk));
    } else if (chunk.includes("\x03")) {
      held.length = 0;
      onInterrupt();
    } else {
      held.push(chunk);
    }
  };
  const onSignal = (): void => onKeys("\x03");
  const restore = takeTerminal(onKeys, onSignal, () => queue.push(null));
  return {
    next() {
      onInterrupt = undefined;
      editor ??= openEditor(keys, prompt, filter, queue);
      if (queue.isEmpty) {
        editor.prompt();
        for (const chunk of held.splice(0)) {
          onKeys(chunk);
        }
      }
      return queue.shift();
    },
    listen(handler) {
      onInterrupt = handler;
    },
    close() {
      editor?.close();
      restore();
    },
  };
}

function openEditor(keys: PassThrough, prompt: string, filter: PasteFilter, queue: LineQueue): Interface {
  const editor = createInterface({
    input: keys,
    output: process.stderr,
    terminal: true,
    prompt,
    historySize: 1000,
  });
  editor.on("line", (line) => queue.push(filter.restore(line)));
  editor.on("close", () => queue.push(null));
  editor.on("SIGCONT", () => {
    tell(pasteOn); // the shell had the terminal in between
    editor.prompt(true);
  });
  editor.on("SIGINT", () => {
    if (editor.line === "") {
      queue.push(interrupted);
      return;
    }
    // As in a shell: the line stays on the screen and is forgotten.
    editor.write(null, { ctrl: true, name: "e" });
    tell("^C\n");
    editor.write(null, { ctrl: true, name: "u" });
    editor.prompt();
  });
  return editor;
}

/** Puts the terminal into the state that editing needs; the result puts it back, and runs at exit in any case. */
function takeTerminal(
  onKeys: (chunk: string) => void,
  onInterrupt: () => void,
  onEnd: () => void,
): () => void {
  const { stdin } = process;
  let taken = true;
  const restore = (): void => {
    if (taken) {
      taken = false;
      tell(pasteOff);
      stdin.setRawMode(false);
      stdin.off("data", onKeys);
      stdin.pause();
      process.off("exit", restore);
      process.off("SIGINT", onInterrupt);
      process.off("SIGTERM", onTerminate);
      process.off("SIGHUP", onHangUp);
    }
  };
  const leave = (signalNumber: number): void => {
    restore();
    tell("\n"); // the shell's prompt begins its own line
    process.exit(128 + signalNumber);
  };
  const onTerminate = (): void => leave(15);
  const onHangUp = (): void => leave(1);
  stdin.setEncoding("utf8");
  stdin.setRawMode(true);
  stdin.on("data", onKeys);
  stdin.on("end", onEnd);
  stdin.resume();
  tell(pasteOn);
  process.on("exit", restore);
  process.on("SIGINT", onInterrupt);
  process.on("SIGTERM", onTerminate);
  process.on("SIGHUP", onHangUp);
  return restore;
}

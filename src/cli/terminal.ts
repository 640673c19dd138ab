// Writing for people and for pipes: all of stdout and stderr goes through here. It owns what is special about the
// two streams: a pipe may be full or closed, a terminal may take colours and must not be steered by a model's words.
// It knows nothing of what is written.

import { writeSync } from "node:fs";
import { HypuraError } from "../errors";
import { terminalText } from "../text";

export type Style = "bold" | "dim" | "red" | "yellow" | "cyan";

/** SGR codes, on and off. */
const codes: Readonly<Record<Style, readonly [number, number]>> = {
  bold: [1, 22],
  dim: [2, 22],
  red: [31, 39],
  yellow: [33, 39],
  cyan: [36, 39],
};

export interface Stream {
  readonly descriptor: 1 | 2;
  readonly isTerminal: boolean;
  /** The text in a style where a person looks and has not asked for none (NO_COLOR, https://no-color.org). */
  paint(style: Style, text: string): string;
}

function describe(descriptor: 1 | 2, stream: NodeJS.WriteStream): Stream {
  const isTerminal = stream.isTTY === true;
  const coloured = isTerminal && !process.env["NO_COLOR"] && process.env["TERM"] !== "dumb";
  return {
    descriptor,
    isTerminal,
    paint(style, text) {
      const [on, off] = codes[style];
      return coloured && text !== "" ? `\x1b[${on}m${text}\x1b[${off}m` : text;
    },
  };
}

export const stdout = describe(1, process.stdout);
export const stderr = describe(2, process.stderr);

/** Text to stdout as it is, all of it, waiting while a pipe is full. Throws `io` when the other end is gone. */
export async function print(text: string): Promise<void> {
  let bytes = new TextEncoder().encode(text);
  while (bytes.byteLength > 0) {
    try {
      bytes = bytes.subarray(writeSync(1, bytes));
    } catch (error) {
      const { code } = error as { readonly code?: string };
      if (code !== "EAGAIN") {
        throw new HypuraError(
          "io",
          `stdout took no more (${outputReason(code, error)}): the rest was not written`,
          {
            cause: error,
          },
        );
      }
      await Bun.sleep(1);
    }
  }
}

/** What a model said, to stdout: as it is into a pipe or a file, without control sequences to a terminal. */
export function printAnswer(text: string): Promise<void> {
  return print(stdout.isTerminal ? terminalText(text) : text);
}

function outputReason(code: string | undefined, error: unknown): string {
  switch (code) {
    case "EPIPE":
      return "its reader closed it";
    case "EBADF":
      return "it is closed";
    case "ENOSPC":
    case "EDQUOT":
      return "the disk is full";
    default:
      return (error as Error).message;
  }
}

/** Text to stderr. Messages are no reason to fail or to wait: what stderr does not take within a second is lost. */
export function tell(text: string): void {
  let bytes = new TextEncoder().encode(text);
  for (let tries = 0; bytes.byteLength > 0 && tries < 1000; ) {
    try {
      bytes = bytes.subarray(writeSync(2, bytes));
    } catch (error) {
      if ((error as { readonly code?: string }).code !== "EAGAIN") {
        return;
      }
      tries++;
      Bun.sleepSync(1);
    }
  }
}

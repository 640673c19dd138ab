// Newline-delimited text out of a descriptor: how native code's events reach TypeScript, in this process or in the
// engine's own. It owns the descriptor and where one line ends; it knows nothing of what a line says.

import { closeSync, writeSync } from "node:fs";

/** Lines that come one by one. */
export interface LineSource {
  /** Null when the source has ended or was cancelled. */
  next(): Promise<string | null>;
  /** Nobody wants the rest, which tells the writer to stop. Idempotent; a pending next() gives null. */
  cancel(): void;
}

/** The complete lines in pieces of text that are cut anywhere. */
export class LineSplitter {
  readonly #decoder = new TextDecoder();
  #rest = "";

  split(bytes: Uint8Array): string[] {
    const parts = (this.#rest + this.#decoder.decode(bytes, { stream: true })).split("\n");
    this.#rest = parts.pop() ?? "";
    return parts;
  }
}

function readerOf(fd: number) {
  return Bun.file(fd).stream().getReader();
}

/** The lines of a descriptor that this object owns. */
export class EventLines implements LineSource {
  readonly #fd: number;
  readonly #reader: ReturnType<typeof readerOf>;
  readonly #splitter = new LineSplitter();
  #queue: readonly string[] = [];
  #taken = 0;
  #closed = false;

  constructor(fd: number) {
    this.#fd = fd;
    this.#reader = readerOf(fd);
  }

  async next(): Promise<string | null> {
    while (this.#taken >= this.#queue.length) {
      const lines = await this.nextLines();
      if (lines === null) {
        return null;
      }
      this.#queue = lines;
      this.#taken = 0;
    }
    return this.#queue[this.#taken++] as string;
  }

  /** The lines that one read brings, which may be none; for who takes them all. Not to be mixed with next(). */
  async nextLines(): Promise<readonly string[] | null> {
    if (this.#closed) {
      return null;
    }
    const { done, value } = await this.#reader.read().catch(() => ({ done: true, value: undefined }));
    if (this.#closed) {
      return null;
    }
    if (done || value === undefined) {
      this.#close();
      return null;
    }
    return this.#splitter.split(value);
  }

  /**
   * Tells the writer to stop and goes on reading, so that the end of the lines is the end of the writer. Native code
   * takes anything that can be read on its side for a reader that has left (events.cpp, peer_gone).
   */
  hangUp(): void {
    if (this.#closed) {
      return;
    }
    try {
      writeSync(this.#fd, "\n");
    } catch {
      // The writer has left already: the end of the lines follows.
    }
  }

  cancel(): void {
    if (!this.#closed) {
      this.#close();
    }
  }

  #close(): void {
    this.#closed = true;
    this.#reader.cancel().catch(() => {});
    closeSync(this.#fd);
  }
}

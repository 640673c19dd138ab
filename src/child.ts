// An engine in a process of its own, behind the interface of engine.ts: a crash in native code ends the requests in
// flight and not the server, and a model that is unloaded gives all its memory back. It owns both ends of the pipes
// between the two processes, and what the child printed before it died; it knows no request and no model.
//
// Down the child's stdin, one line each, fields divided by tabs (JSON has no bare tab):
//   open <plan>            the first line
//   request <id> <route> <body>
//   cancel <id>
//   close
// Up its descriptor 3, one line each: `<id> <event of hypura.h>`, id 0 for the engine itself, and `<id>` with nothing
// behind it when that request has left the engine. Event lines pass as they are. The end of its stdin, which is also
// the parent's death, ends the child at once.

import { closeSync, writeSync } from "node:fs";
import { join } from "node:path";
import {
  type Engine,
  type EngineTransport,
  engineOver,
  type OpenOptions,
  openNative,
  planJson,
} from "./engine";
import { HypuraError } from "./errors";
import { type EventLines, type LineSource, LineSplitter } from "./event-lines";
import type { Plan } from "./plan";
import { clip, oneLine } from "./text";

/** The hidden command by which hypura starts its engine; main.ts knows it too. */
const engineCommand = "__engine";

/** The child's descriptor for events; 0 to 2 are its standard streams. */
const eventDescriptor = 3;
/** What the engine is given to end by itself before its process is ended. */
const closeMs = 3000;
/** Of what the child printed; llama.cpp's grammar parser may print thousands of lines. */
const keptStderrLines = 40;
const keptLineColumns = 400;

export interface ChildOptions extends OpenOptions {
  /** A request has left the engine: its slot is free. */
  readonly onRequestLeft?: () => void;
  /** A line that the child printed. */
  readonly onPrint?: (line: string) => void;
  /** The engine is gone, asked for or not. */
  readonly onGone?: () => void;
  /** Ends the engine at once, also while it loads. */
  readonly signal?: AbortSignal;
}

/** An engine in a child process. */
export interface ChildEngine extends Engine {
  readonly processId: number;
}

/** Loads the model that the plan describes in a child of this program. Throws HypuraError when that fails. */
export async function openChildEngine(plan: Plan, options: ChildOptions = {}): Promise<ChildEngine> {
  const child = new ChildTransport(planJson(plan, options), options);
  const engine = await engineOver(child, plan, options);
  return { ...engine, processId: child.processId };
}

/** How this program is started again. */
function engineWords(): readonly string[] {
  return Bun.isStandaloneExecutable
    ? [process.execPath, engineCommand]
    : [process.execPath, join(import.meta.dir, "main.ts"), engineCommand];
}

function spawnEngine() {
  return Bun.spawn([...engineWords()], { stdio: ["pipe", "ignore", "pipe", "pipe"] });
}

/** The parent's end. */
class ChildTransport implements EngineTransport {
  readonly lines: ChildLines;
  readonly #child: ReturnType<typeof spawnEngine>;
  readonly #options: ChildOptions;
  readonly #requests = new Map<number, ChildLines>();
  readonly #lastWords: string[] = [];
  readonly #ended: Promise<HypuraError | undefined>;
  #lastId = 0;
  #closing = false;
  #hasLeft = false;

  constructor(planJson: string, options: ChildOptions) {
    this.#options = options;
    try {
      this.#child = spawnEngine();
    } catch (cause) {
      throw new HypuraError("engine", `the engine's process cannot be started: ${(cause as Error).message}`, {
        cause,
      });
    }
    // Who wants no more of the engine's own lines (an assertion, a listener that failed) wants no engine.
    this.lines = new ChildLines(() => this.#child.kill("SIGKILL"));
    const printed = this.#followStderr();
    this.#ended = this.#follow(printed);
    this.#tell(`open\t${planJson}`);
    const end = (): void => this.#child.kill("SIGKILL");
    options.signal?.addEventListener("abort", end, { once: true });
    this.#ended.finally(() => options.signal?.removeEventListener("abort", end));
  }

  get processId(): number {
    return this.#child.pid;
  }

  request(route: string, bodyJson: string): ChildLines {
    const id = ++this.#lastId;
    const lines = new ChildLines(() => this.#tell(`cancel\t${id}`));
    this.#requests.set(id, lines);
    this.#tell(`request\t${id}\t${route}\t${bodyJson}`);
    return lines;
  }

  activeRequests(): number {
    return this.#requests.size;
  }

  close(): void {
    if (this.#closing) {
      return;
    }
    this.#closing = true;
    this.#tell("close");
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), closeMs);
    this.#ended.finally(() => clearTimeout(timer));
  }

  ended(): Promise<HypuraError | undefined> {
    return this.#ended;
  }

  #tell(line: string): void {
    if (this.#hasLeft) {
      return;
    }
    try {
      this.#child.stdin.write(`${line}\n`);
      // What the child does not take waits in memory; that it is gone is seen at the other pipe.
      Promise.resolve(this.#child.stdin.flush()).catch(() => {});
    } catch {
      // The pipe is broken: the child is dead, and its end is seen at the other pipe.
    }
  }

  /** Until the child has ended; the reason, where nobody asked it to. */
  async #follow(printed: Promise<void>): Promise<HypuraError | undefined> {
    await this.#readEvents();
    this.#child.kill("SIGKILL"); // a child that says nothing more is of no use; one that has ended does not mind
    await this.#child.exited;
    this.#hasLeft = true;
    await Promise.race([printed, Bun.sleep(200)]); // a grandchild may hold the pipe open
    this.lines.end();
    this.#requests.clear();
    const reason = this.#closing || this.#child.exitCode === 0 ? undefined : this.#obituary();
    this.#options.onGone?.();
    return reason;
  }

  async #readEvents(): Promise<void> {
    const fd = this.#child.stdio[eventDescriptor] as number;
    const reader = Bun.file(fd).stream().getReader();
    const splitter = new LineSplitter();
    try {
      for (let next = await reader.read(); !next.done; next = await reader.read()) {
        for (const line of splitter.split(next.value)) {
          this.#dispatch(line);
        }
      }
    } catch {
      // The pipe broke with the child.
    } finally {
      reader.cancel().catch(() => {});
      closeSync(fd);
    }
  }

  #dispatch(line: string): void {
    const tab = line.indexOf("\t");
    if (tab < 0) {
      const id = Number(line);
      this.#requests.get(id)?.end();
      this.#requests.delete(id);
      this.#options.onRequestLeft?.();
      return;
    }
    const id = Number(line.slice(0, tab));
    (id === 0 ? this.lines : this.#requests.get(id))?.push(line.slice(tab + 1));
  }

  async #followStderr(): Promise<void> {
    const splitter = new LineSplitter();
    for await (const bytes of this.#child.stderr) {
      for (const line of splitter.split(bytes)) {
        this.#remember(line);
      }
    }
  }

  #remember(line: string): void {
    const text = clip(oneLine(line), keptLineColumns);
    if (text !== "") {
      this.#lastWords.push(text);
      this.#lastWords.splice(0, this.#lastWords.length - keptStderrLines);
      this.#options.onPrint?.(text);
    }
  }

  #obituary(): HypuraError {
    const { signalCode, exitCode } = this.#child;
    const how = signalCode === null ? `ended with status ${exitCode}` : `was ended by ${signalCode}`;
    const last = this.#lastWords.slice(-3).join(" | ");
    return new HypuraError("engine", `the engine's process ${how}${last === "" ? "" : `; it said: ${last}`}`);
  }
}

/** The lines of one request, as they come out of the shared pipe. */
class ChildLines implements LineSource {
  readonly #onCancel: () => void;
  #queue: string[] = [];
  #taken = 0;
  #ended = false;
  #waiting: ((line: string | null) => void) | undefined;

  constructor(onCancel: () => void) {
    this.#onCancel = onCancel;
  }

  next(): Promise<string | null> {
    if (this.#taken < this.#queue.length) {
      const line = this.#queue[this.#taken++] as string;
      if (this.#taken === this.#queue.length) {
        this.#queue = [];
        this.#taken = 0;
      }
      return Promise.resolve(line);
    }
    if (this.#ended) {
      return Promise.resolve(null);
    }
    const { promise, resolve } = Promise.withResolvers<string | null>();
    this.#waiting = resolve;
    return promise;
  }

  push(line: string): void {
    if (this.#ended) {
      return;
    }
    if (this.#waiting === undefined) {
      this.#queue.push(line);
      return;
    }
    this.#answer(line);
  }

  /** Nothing more will come; what has come can still be taken. */
  end(): void {
    this.#ended = true;
    this.#answer(null);
  }

  cancel(): void {
    const wasOpen = !this.#ended;
    this.#queue = [];
    this.#taken = 0;
    this.end();
    if (wasOpen) {
      this.#onCancel();
    }
  }

  #answer(line: string | null): void {
    const resolve = this.#waiting;
    this.#waiting = undefined;
    resolve?.(line);
  }
}

// ---- the child's end --------------------------------------------------------------------------------------------

/** Is the engine of the process that started this one, until it is closed or that process ends. */
export async function runEngineChild(): Promise<never> {
  // The terminal's Ctrl-C and a service manager's SIGTERM go to the whole group; when to end is the parent's decision.
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => {});
  }
  const host = new EngineHost();
  const splitter = new LineSplitter();
  for await (const bytes of Bun.stdin.stream()) {
    for (const line of splitter.split(bytes)) {
      host.obey(line);
    }
  }
  return vanish();
}

/** Ends this process with all its threads, whatever they do: nothing of it is left to be saved. */
function vanish(): never {
  process.kill(process.pid, "SIGKILL");
  throw new Error("unreachable");
}

/** The engine of this process, and the requests in it by the parent's numbers. */
class EngineHost {
  readonly #pipe = new LinePipe(eventDescriptor);
  readonly #requests = new Map<number, EventLines>();
  #engine: EngineTransport<EventLines> | undefined;

  obey(line: string): void {
    const [verb, first = "", route = "", ...rest] = line.split("\t");
    switch (verb) {
      case "open":
        void this.#open(line.slice(verb.length + 1));
        break;
      case "request":
        void this.#request(Number(first), route, rest.join("\t"));
        break;
      case "cancel":
        this.#requests.get(Number(first))?.hangUp();
        break;
      case "close":
        this.#engine?.close();
        break;
      default:
        throw new HypuraError("internal", `the engine's process was told ${JSON.stringify(clip(line, 80))}`);
    }
  }

  async #open(planJson: string): Promise<void> {
    try {
      this.#engine = openNative(planJson);
      await this.#forward(0, this.#engine.lines);
    } catch (error) {
      const { code, message } =
        error instanceof HypuraError ? error : new HypuraError("internal", (error as Error).message);
      this.#pipe.line(`0\t${JSON.stringify({ event: "error", code, message })}`);
    }
    this.#pipe.flush();
    process.exit(0);
  }

  async #request(id: number, route: string, bodyJson: string): Promise<void> {
    try {
      const lines = (this.#engine as EngineTransport<EventLines>).request(route, bodyJson);
      this.#requests.set(id, lines);
      await this.#forward(id, lines);
    } catch (error) {
      const { message } = error as Error;
      const event = { event: "error", status: 503, error: { message, type: "unavailable_error" } };
      this.#pipe.line(`${id}\t${JSON.stringify(event)}`);
    }
    this.#requests.delete(id);
    this.#pipe.line(String(id));
  }

  async #forward(id: number, from: EventLines): Promise<void> {
    for (let lines = await from.nextLines(); lines !== null; lines = await from.nextLines()) {
      for (const line of lines) {
        this.#pipe.line(`${id}\t${line}`);
      }
    }
  }
}

/** Lines to the parent; those of one turn of the event loop leave in one write, however many requests they are of. */
class LinePipe {
  readonly #fd: number;
  #pending = "";

  constructor(fd: number) {
    this.#fd = fd;
  }

  line(text: string): void {
    if (this.#pending === "") {
      setImmediate(() => this.flush());
    }
    this.#pending += `${text}\n`;
  }

  /** Waits for a parent that is behind: there is nothing else to do meanwhile. */
  flush(): void {
    let bytes: Uint8Array = Buffer.from(this.#pending);
    this.#pending = "";
    try {
      while (bytes.length > 0) {
        bytes = bytes.subarray(writeSync(this.#fd, bytes));
      }
    } catch {
      vanish(); // nobody reads: the parent is dead
    }
  }
}

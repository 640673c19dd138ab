// The engine as TypeScript sees it: open a plan, send requests, read events. It turns the lines of events into
// values, whatever carries them: native code in this process (openEngine), or in a process of its own (child.ts);
// nothing else in src sees native code (profile.ts has it measure the machine). It knows no dialect: a route's body and
// chunks pass through as they are.

import { bestVariant, nativeLibrary } from "../ffi/native";
import { type ErrorCode, HypuraError } from "./errors";
import { EventLines, type LineSource } from "./event-lines";
import type { GuessCounters } from "./guesses";
import type { Plan } from "./plan";
import type { StreamingCounters } from "./streaming";

/** What is known of a model once it is loaded. */
export interface EngineInfo {
  /** Tokens that one request may use. */
  readonly contextTokens: number;
  readonly slotCount: number;
  readonly vocabTokens: number;
  readonly parameters: number;
  readonly hasChatTemplate: boolean;
  /** A full context loses its older half and generation goes on: the plan wants it, and the model's cache can. */
  readonly canShift: boolean;
  /** Bytes that llama.cpp allocated, by buffer type and purpose. */
  readonly memory: readonly {
    readonly buffer: string;
    readonly weightBytes: number;
    readonly kvBytes: number;
    readonly computeBytes: number;
  }[];
}

/** One piece of an answer, in the dialect of its route. */
export interface EngineChunk {
  /** Set by dialects that name their chunks. */
  readonly name?: string;
  readonly data: unknown;
}

/** A request that the engine refused or that failed on the way. */
export class RequestError extends HypuraError {
  /** As of HTTP: 400 is the caller's fault, 500 the engine's, 503 try again. */
  readonly status: number;
  readonly type: string;
  /** What else the engine says about it, by the core's names. */
  readonly details: Readonly<Record<string, unknown>>;

  constructor(
    status: number,
    type: string,
    message: string,
    details: Readonly<Record<string, unknown>> = {},
  ) {
    super("request", message);
    this.name = "RequestError";
    this.status = status;
    this.type = type;
    this.details = details;
  }
}

export interface OpenOptions {
  /** 0 to 1, the share of the resident bytes that are loaded. */
  readonly onProgress?: (fraction: number) => void;
  /** llama.cpp's warnings and errors. */
  readonly onLog?: (level: "warn" | "error", text: string) => void;
  /** What a person should know and nothing fails for: a trace that ended early. */
  readonly onWarning?: (text: string) => void;
  /** Writes a routing trace while the engine lives; `header` is JSON (trace.ts). Of a plan that streams. */
  readonly trace?: { readonly path: string; readonly header: string };
}

export interface Engine extends AsyncDisposable {
  readonly plan: Plan;
  readonly info: EngineInfo;
  /**
   * Sends `body` to `route` ("POST /v1/chat/completions"; the table is in ffi/native/engine.cpp) and gives the
   * chunks of the answer: many when the body says `stream: true`, else one. Breaking off the iteration or aborting
   * the signal cancels the request. Throws RequestError, and HypuraError `cancelled` when the signal ended it.
   */
  request(route: string, body: object, signal?: AbortSignal): AsyncIterableIterator<EngineChunk>;
  /** What streaming did since the engine opened; null in a full-resident plan. */
  streaming(): Promise<StreamingCounters | null>;
  /** What was guessed since the engine opened; null where the plan guesses nothing. */
  guesses(): Promise<GuessCounters | null>;
  /** Requests that native code still works on; a cancelled one leaves within the running pass. */
  activeRequests(): number;
  /** Cancels what runs, unloads the model, and waits until its memory is given back. */
  close(): Promise<void>;
}

type OpenEvent =
  | { readonly event: "progress"; readonly value: number }
  | { readonly event: "log"; readonly level: "warn" | "error"; readonly text: string }
  | { readonly event: "warning"; readonly text: string }
  | { readonly event: "ready"; readonly info: EngineInfo }
  | { readonly event: "error"; readonly code: ErrorCode; readonly message: string }
  | { readonly event: "fatal"; readonly message: string }
  | { readonly event: "closed" };

type RequestEvent =
  | { readonly event: "data"; readonly name?: string; readonly data: unknown }
  | {
      readonly event: "error";
      readonly status: number;
      readonly error: { readonly message: string; readonly type: string };
    }
  | { readonly event: "end" };

/** What carries an engine's events and requests. */
export interface EngineTransport<Lines extends LineSource = LineSource> {
  /** The engine's own events, from open to closed. */
  readonly lines: Lines;
  /** Sends a request; the body is JSON. Throws HypuraError where it cannot be sent. */
  request(route: string, bodyJson: string): Lines;
  activeRequests(): number;
  /** Starts the engine's end. Idempotent. */
  close(): void;
  /** Asked after the last line: waits until all is given back, and gives the reason of an end that nobody asked for. */
  ended(): Promise<HypuraError | undefined>;
}

/** Loads the model that the plan describes. Throws HypuraError when that fails. */
export async function openEngine(plan: Plan, options: OpenOptions = {}): Promise<Engine> {
  return engineOver(openNative(planJson(plan, options)), plan, options);
}

/** The engine of this process, line by line. */
export function openNative(json: string): EngineTransport<EventLines> {
  const native = nativeLibrary();
  const { engine, fd } = native.open(json);
  return {
    lines: new EventLines(fd),
    request: (route, bodyJson) => new EventLines(native.request(engine, route, bodyJson)),
    activeRequests: () => Math.max(0, native.activeRequests(engine)),
    close: () => native.close(engine),
    ended: () => Promise.resolve(undefined),
  };
}

/** The engine at the other end of `transport`, once it is ready. */
export async function engineOver(
  transport: EngineTransport,
  plan: Plan,
  options: OpenOptions,
): Promise<Engine> {
  const life = new EngineLife(transport, options);
  return life.ready.then(
    async (info): Promise<Engine> => {
      if (plan.speculation !== null && !(await guesses(life))) {
        options.onWarning?.(
          "llama.cpp guesses nothing for this model: each pass gives one token, and the draft model, if any, waits in vain",
        );
      }
      return engineOf(life, transport, plan, info);
    },
    async (error) => {
      await life.close();
      throw error;
    },
  );
}

/** Where the core cannot set up guessing it goes on without, and only its slots tell. */
async function guesses(life: EngineLife): Promise<boolean> {
  for await (const { data } of life.request("GET /slots", {}, undefined)) {
    return (data as readonly { readonly speculative: boolean }[]).every((slot) => slot.speculative);
  }
  return false;
}

function engineOf(life: EngineLife, transport: EngineTransport, plan: Plan, info: EngineInfo): Engine {
  return {
    plan,
    info,
    request: (route, body, signal) => life.request(route, body, signal),
    async streaming() {
      for await (const chunk of life.request("GET /streaming", {}, undefined)) {
        return chunk.data as StreamingCounters | null;
      }
      return null;
    },
    async guesses() {
      for await (const chunk of life.request("GET /guesses", {}, undefined)) {
        return chunk.data as GuessCounters | null;
      }
      return null;
    },
    activeRequests: () => transport.activeRequests(),
    close: () => life.close(),
    [Symbol.asyncDispose]: () => life.close(),
  };
}

/** Work of native code that needs no model (the table is in ffi/native/tasks.cpp); cancelled as a request is. */
export function runTask(
  name: string,
  body: object,
  signal?: AbortSignal,
): AsyncIterableIterator<EngineChunk> {
  if (signal?.aborted) {
    return refused(new HypuraError("cancelled", `${name} was cancelled`));
  }
  const fd = nativeLibrary().task(name, JSON.stringify(body));
  return new RequestChunks(new EventLines(fd), signal, () => {});
}

/** The native library in use. */
export interface EngineLibrary {
  readonly path: string;
  /** Of the CPU kernels; null where a person named the library. */
  readonly variant: string | null;
  /** The best for this processor that the executable carries; null where it carries none. */
  readonly bestVariant: string | null;
  /** Places that were passed over before it, with the reason. */
  readonly passedOver: readonly string[];
  /** Instruction sets that are compiled in, as ggml names them. */
  readonly instructionSets: readonly string[];
  /** What for GPUs is compiled in, as ggml names it: CUDA, MTL. Whether there is such a GPU is another matter. */
  readonly gpuBackends: readonly string[];
}

/** Loads the library and says which it is. Throws HypuraError where none can be loaded. */
export function engineLibrary(): EngineLibrary {
  const { path, variant, tried, buildInfo } = nativeLibrary();
  return {
    path,
    variant,
    bestVariant: bestVariant(),
    passedOver: tried,
    ...compiledIn(buildInfo().system),
  };
}

/** llama.cpp's "CUDA : ARCHS = 890 | NO_VMM = 1 | CPU : SSE3 = 1 | AVX = 0 | ". */
export function compiledIn(system: string): Pick<EngineLibrary, "instructionSets" | "gpuBackends"> {
  const backends = [...system.matchAll(/(\w+) : (.*?)(?=\w+ : |$)/g)];
  const processor = backends.find((match) => match[1] === "CPU")?.[2] ?? "";
  return {
    instructionSets: [...processor.matchAll(/(\w+) = 1/g)].map((match) => match[1] as string),
    gpuBackends: backends.map((match) => match[1] as string).filter((name) => name !== "CPU"),
  };
}

/** What native code is given: the plan, and where its trace goes. */
export function planJson(plan: Plan, { trace }: OpenOptions): string {
  if (trace === undefined) {
    return JSON.stringify(plan);
  }
  if (plan.streaming === null) {
    throw new HypuraError("internal", "a plan without streaming was asked for a trace");
  }
  return JSON.stringify({ ...plan, streaming: { ...plan.streaming, trace } });
}

/** llama.cpp names the cause in its own words, function names first. */
function loadFailure(reason: string): string {
  const cause = reason.replace(/^(\w+: |error loading model: )+/, "");
  return `llama.cpp cannot load the model (${cause}): the file may be incomplete, download or convert it again`;
}

/** Reads the engine's own events from open to closed, and holds what ends with it. */
class EngineLife {
  readonly ready: Promise<EngineInfo>;
  readonly #transport: EngineTransport;
  readonly #ended: Promise<void>;
  readonly #requests = new Set<RequestChunks>();
  #death: HypuraError | undefined;

  constructor(transport: EngineTransport, options: OpenOptions) {
    this.#transport = transport;
    const { promise, resolve, reject } = Promise.withResolvers<EngineInfo>();
    this.ready = promise;
    this.#ended = this.#follow(options, resolve, reject);
  }

  async #follow(
    options: OpenOptions,
    resolve: (info: EngineInfo) => void,
    reject: (error: HypuraError) => void,
  ): Promise<void> {
    let failure: HypuraError | undefined;
    try {
      failure = await this.#readEvents(options, resolve);
    } catch (cause) {
      // A listener of the caller's threw. Nobody reads the engine any more, so it is told to end.
      failure = new HypuraError("internal", `a listener of the engine failed: ${(cause as Error).message}`, {
        cause,
      });
      this.#transport.close();
      this.#transport.lines.cancel();
    }
    const loss = await this.#transport.ended();
    const death = this.#death ?? failure ?? loss ?? new HypuraError("engine", "the engine is closed");
    this.#die(death);
    reject(death);
  }

  /** Until the engine has closed; gives the reason of a load that failed. */
  async #readEvents(
    options: OpenOptions,
    resolve: (info: EngineInfo) => void,
  ): Promise<HypuraError | undefined> {
    const { lines } = this.#transport;
    let failure: HypuraError | undefined;
    for (let line = await lines.next(); line !== null; line = await lines.next()) {
      const event = JSON.parse(line) as OpenEvent;
      switch (event.event) {
        case "progress":
          options.onProgress?.(event.value);
          break;
        case "log":
          options.onLog?.(event.level, event.text);
          break;
        case "warning":
          options.onWarning?.(event.text);
          break;
        case "ready":
          resolve(event.info);
          break;
        case "error":
          failure = new HypuraError(
            event.code,
            event.code === "engine" ? loadFailure(event.message) : event.message,
          );
          break;
        case "fatal":
          // The engine's thread stands still and "closed" will never come.
          this.#die(
            new HypuraError("engine", `the engine stopped on an assertion of llama.cpp: ${event.message}`),
          );
          lines.cancel();
          break;
        case "closed":
          break;
      }
    }
    return failure;
  }

  #die(error: HypuraError): void {
    this.#death ??= error;
    for (const request of this.#requests) {
      request.fail(this.#death);
    }
  }

  request(route: string, body: object, signal: AbortSignal | undefined): AsyncIterableIterator<EngineChunk> {
    if (this.#death !== undefined) {
      throw this.#death;
    }
    if (signal?.aborted) {
      return refused(new HypuraError("cancelled", "the request was cancelled"));
    }
    const lines = this.#transport.request(route, JSON.stringify(body));
    const chunks = new RequestChunks(lines, signal, () => this.#requests.delete(chunks));
    this.#requests.add(chunks);
    return chunks;
  }

  close(): Promise<void> {
    this.#transport.close();
    return this.#ended;
  }
}

// biome-ignore lint/correctness/useYield: it throws before its first chunk
async function* refused(error: HypuraError): AsyncGenerator<EngineChunk> {
  throw error;
}

/** The chunks of one answer. An iterator and not a generator, so that it can be cancelled while it waits. */
class RequestChunks implements AsyncIterableIterator<EngineChunk> {
  readonly #lines: LineSource;
  readonly #signal: AbortSignal | undefined;
  readonly #onDone: () => void;
  readonly #onAbort = () => this.fail(new HypuraError("cancelled", "the request was cancelled"));
  #failure: HypuraError | undefined;
  #done = false;

  constructor(lines: LineSource, signal: AbortSignal | undefined, onDone: () => void) {
    this.#lines = lines;
    this.#signal = signal;
    this.#onDone = onDone;
    signal?.addEventListener("abort", this.#onAbort, { once: true });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async next(): Promise<IteratorResult<EngineChunk>> {
    if (this.#done) {
      return { done: true, value: undefined };
    }
    const line = await this.#lines.next();
    if (this.#failure !== undefined) {
      this.#finish();
      throw this.#failure;
    }
    const event = line === null ? undefined : (JSON.parse(line) as RequestEvent);
    switch (event?.event) {
      case "data":
        return {
          done: false,
          value: event.name === undefined ? { data: event.data } : { name: event.name, data: event.data },
        };
      case "error":
        this.#finish();
        throw new RequestError(event.status, event.error.type, event.error.message, { ...event.error });
      case "end":
        this.#finish();
        return { done: true, value: undefined };
      case undefined:
        this.#finish();
        throw new RequestError(500, "server_error", "the engine ended in the middle of the answer");
    }
  }

  return(): Promise<IteratorResult<EngineChunk>> {
    this.#finish();
    return Promise.resolve({ done: true, value: undefined });
  }

  /** Ends the iteration with `error`, also while it waits. */
  fail(error: HypuraError): void {
    this.#failure ??= error;
    this.#lines.cancel();
    this.#onDone();
  }

  #finish(): void {
    this.#done = true;
    this.#lines.cancel();
    this.#signal?.removeEventListener("abort", this.#onAbort);
    this.#onDone();
  }
}

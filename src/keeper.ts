// Which model is loaded, and whose turn it is. Owns the one engine that lives at a time, the queue before it, and the
// timers by which an idle model is unloaded; it knows no HTTP and no dialect. A request leases a place: it waits in
// one line, first come first served, until its model is loaded and fewer than N others are inside the engine. A
// request for another model waits until those inside are done; then the models are swapped, so that memory never
// holds two.

import { type ChildEngine, type ChildOptions, openChildEngine } from "./child";
import { type EngineChunk, type EngineInfo, type OpenOptions, RequestError } from "./engine";
import { HypuraError } from "./errors";
import type { GuessCounters } from "./guesses";
import type { Plan } from "./plan";
import type { StreamingCounters } from "./streaming";
import { durationText } from "./text";
import { serverBusy } from "./wire-error";

/** A model that can be loaded. */
export interface KeptModel {
  readonly name: string;
  /** How it runs on what is free now. Throws where it cannot. */
  plan(): Plan | Promise<Plan>;
}

export type Log = (level: "info" | "warn" | "error" | "debug", text: string) => void;

export interface KeeperOptions {
  /** Requests inside the engine at once. */
  readonly parallel: number;
  /** Requests that may wait beside those inside. */
  readonly maxQueue: number;
  /** How long an idle model stays; Infinity: for ever. */
  readonly keepAliveSeconds: number;
  readonly log: Log;
  /** Where the routing trace of an engine that is about to be loaded goes; undefined: this one writes none. */
  readonly traceFor?: (plan: Plan) => OpenOptions["trace"];
  /** Opens an engine; a test may give its own. */
  readonly open?: (plan: Plan, options: ChildOptions) => Promise<ChildEngine>;
}

export interface LeaseOptions {
  /** From here on for this model; null: as it was. */
  readonly keepAliveSeconds: number | null;
  /** Leaves the line, and the engine. */
  readonly signal: AbortSignal;
}

/** A place inside the engine, until it is released. */
export interface Lease<Kept extends KeptModel> {
  readonly model: Kept;
  readonly plan: Plan;
  readonly info: EngineInfo;
  /** As Engine.request; a request of which nothing came before its pass failed is sent once more. */
  request(route: string, body: object): AsyncGenerator<EngineChunk, void>;
  /** The data of the only chunk of an answer. */
  ask(route: string, body: object): Promise<unknown>;
  /** Whether nobody else was inside since it was given, so that its times are the model's own. */
  isAlone(): boolean;
  /** What streaming did since the model was loaded; null where all of it is in memory. */
  streaming(): Promise<StreamingCounters | null>;
  /** Idempotent. */
  release(): void;
}

/** How a model is in memory. */
export interface Residence<Kept extends KeptModel> {
  readonly model: Kept;
  readonly plan: Plan;
  readonly info: EngineInfo;
  readonly processId: number;
  /** Milliseconds since 1970; Infinity: it stays. */
  readonly expiresAtMs: number;
}

export interface KeeperCounts {
  readonly inside: number;
  readonly waiting: number;
  readonly loads: number;
  readonly failedLoads: number;
  readonly unloads: number;
  readonly crashes: number;
  readonly refused: number;
  readonly retries: number;
}

interface Waiter<Kept extends KeptModel> {
  readonly model: Kept;
  readonly options: LeaseOptions;
  readonly resolve: (lease: Lease<Kept>) => void;
  readonly reject: (error: unknown) => void;
  readonly onAbort: () => void;
}

/** setTimeout takes no longer times. */
const longestTimeoutMs = 2 ** 31 - 1;

export class Keeper<Kept extends KeptModel> {
  readonly #options: KeeperOptions;
  readonly #open: (plan: Plan, options: ChildOptions) => Promise<ChildEngine>;
  readonly #line: Waiter<Kept>[] = [];
  readonly #counts = { loads: 0, failedLoads: 0, unloads: 0, crashes: 0, refused: 0, retries: 0 };
  #loaded: Loaded<Kept> | undefined;
  /** A load or an unload under way: nobody is let in meanwhile. */
  #change: Promise<void> | undefined;
  #isLoading = false;
  #closed = false;
  readonly #end = new AbortController();

  constructor(options: KeeperOptions) {
    this.#options = options;
    this.#open = options.open ?? openChildEngine;
  }

  /** Waits for a place with `model` loaded. Throws serverBusy, `cancelled`, or why the model cannot be loaded. */
  lease(model: Kept, options: LeaseOptions): Promise<Lease<Kept>> {
    if (options.signal.aborted) {
      return Promise.reject(cancelled());
    }
    if (this.#closed) {
      return Promise.reject(new HypuraError("cancelled", "the server is shutting down"));
    }
    const { promise, resolve, reject } = Promise.withResolvers<Lease<Kept>>();
    const waiter: Waiter<Kept> = { model, options, resolve, reject, onAbort: () => this.#leaveLine(waiter) };
    this.#line.push(waiter);
    options.signal.addEventListener("abort", waiter.onAbort, { once: true });
    this.#advance();
    if (this.#inside() + this.#line.length > this.#options.parallel + this.#options.maxQueue) {
      this.#counts.refused++;
      this.#drop(waiter, serverBusy);
    }
    return promise;
  }

  /** Unloads the model, at once where nobody uses it, else when the last one is done. */
  async unload(model: Kept): Promise<void> {
    await this.#change; // it may be on its way in
    if (this.#loaded?.model === model) {
      this.#loaded.keepAliveSeconds = 0;
      this.#settle();
    }
    await this.#change;
  }

  /** What is in memory now, or will be in a moment. */
  residence(): Residence<Kept> | null {
    const loaded = this.#loaded;
    if (loaded === undefined) {
      return null;
    }
    const { model, plan, engine } = loaded;
    const expiresAtMs = loaded.expiresAtMs ?? Date.now() + loaded.keepAliveSeconds * 1000;
    return { model, plan, info: engine.info, processId: engine.processId, expiresAtMs };
  }

  /** Null where no model is loaded, or all of it is in memory. */
  async streaming(): Promise<StreamingCounters | null> {
    return this.#loaded === undefined ? null : streamingOf(this.#loaded);
  }

  /** Null where no model is loaded, or its plan guesses nothing. */
  async guesses(): Promise<GuessCounters | null> {
    const { plan, engine } = this.#loaded ?? {};
    const isGuessing = (plan?.speculation ?? null) !== null;
    return engine === undefined || !isGuessing ? null : engine.guesses().catch(() => null); // it was unloaded meanwhile
  }

  counts(): KeeperCounts {
    return { inside: this.#inside(), waiting: this.#line.length, ...this.#counts };
  }

  /** Cancels everybody and ends the engine. */
  async close(): Promise<void> {
    this.#closed = true;
    for (const waiter of [...this.#line]) {
      this.#drop(waiter, new HypuraError("cancelled", "the server is shutting down"));
    }
    if (this.#isLoading || this.#options.traceFor === undefined) {
      this.#end.abort(); // a model that is being loaded, or is used, is not waited for; a trace has to be finished
    }
    await this.#change;
    const loaded = this.#loaded;
    if (loaded !== undefined) {
      this.#forget(loaded);
      await loaded.engine.close();
    }
  }

  // ---- the line -------------------------------------------------------------------------------------------------

  #inside(): number {
    return this.#loaded?.insideCount() ?? 0;
  }

  #leaveLine(waiter: Waiter<Kept>): void {
    this.#drop(waiter, cancelled());
    this.#advance(); // it may have stood before one whose model is loaded
  }

  #drop(waiter: Waiter<Kept>, error: unknown): void {
    const at = this.#line.indexOf(waiter);
    if (at >= 0) {
      this.#line.splice(at, 1);
      waiter.options.signal.removeEventListener("abort", waiter.onAbort);
      waiter.reject(error);
    }
  }

  /** Lets in whoever may go in now, and starts the load or the swap that the first in line waits for. */
  #advance(): void {
    while (this.#change === undefined && !this.#closed) {
      const first = this.#line[0];
      const loaded = this.#loaded;
      if (first === undefined) {
        return;
      }
      if (loaded === undefined) {
        this.#begin(this.#load(first.model));
        return;
      }
      if (loaded.model !== first.model) {
        if (loaded.leases.size === 0) {
          this.#begin(this.#unload(loaded, `${first.model.name} is asked for`));
        }
        return;
      }
      if (loaded.insideCount() >= this.#options.parallel) {
        return;
      }
      this.#letIn(loaded, first);
    }
  }

  #letIn(loaded: Loaded<Kept>, waiter: Waiter<Kept>): void {
    this.#line.shift();
    const { signal, keepAliveSeconds } = waiter.options;
    signal.removeEventListener("abort", waiter.onAbort);
    loaded.keepAliveSeconds = keepAliveSeconds ?? loaded.keepAliveSeconds;
    loaded.stopTimer();
    loaded.entryCount++;
    const lease = new EngineLease(loaded, signal, {
      onRelease: () => {
        loaded.leases.delete(lease);
        this.#settle();
        this.#advance();
      },
      onRetry: (error) => {
        this.#counts.retries++;
        this.#options.log("warn", `a pass failed before its answer began, asking again: ${error.message}`);
      },
    });
    loaded.leases.add(lease);
    waiter.resolve(lease);
  }

  // ---- loading and unloading ------------------------------------------------------------------------------------

  #begin(change: Promise<void>): void {
    this.#change = change.finally(() => {
      this.#change = undefined;
      this.#settle();
      this.#advance();
    });
  }

  /** Never rejects: who waits for the model is told. */
  async #load(model: Kept): Promise<void> {
    const { log } = this.#options;
    const started = performance.now();
    this.#isLoading = true;
    try {
      await Promise.resolve(); // the caller's state is set before anything can fail
      const plan = await model.plan();
      log("info", `loading ${model.name} (${plan.mode}, ${plan.contextTokens} tokens of context)`);
      let loaded: Loaded<Kept> | undefined;
      let isGone = false;
      const trace = this.#options.traceFor?.(plan);
      const engine = await this.#open(plan, {
        ...(trace === undefined ? {} : { trace }),
        onWarning: (text) => log("warn", `${model.name}: ${text}`),
        onLog: (level, text) => log("debug", `${model.name}: ${level}: ${text}`),
        onPrint: (line) => log("debug", `${model.name}: ${line}`),
        onRequestLeft: () => this.#advance(),
        signal: this.#end.signal,
        onGone: () => {
          isGone = true;
          this.#onGone(loaded);
        },
      });
      this.#counts.loads++;
      log("info", `loaded ${model.name} in ${durationText((performance.now() - started) / 1000)}`);
      if (!isGone) {
        loaded = new Loaded(model, plan, engine, this.#options.keepAliveSeconds);
        this.#loaded = loaded;
      }
    } catch (error) {
      this.#counts.failedLoads++;
      log("error", `${model.name} cannot be loaded: ${(error as Error).message}`);
      for (const waiter of this.#line.filter((one) => one.model === model)) {
        this.#drop(waiter, error);
      }
    } finally {
      this.#isLoading = false;
    }
  }

  async #unload(loaded: Loaded<Kept>, why: string): Promise<void> {
    this.#forget(loaded);
    await loaded.engine.close();
    this.#counts.unloads++;
    this.#options.log("info", `unloaded ${loaded.model.name}: ${why}`);
  }

  #forget(loaded: Loaded<Kept>): void {
    loaded.stopTimer();
    if (this.#loaded === loaded) {
      this.#loaded = undefined;
    }
  }

  /** The engine's process has ended; where nobody asked it to, whoever is inside learns it from the engine. */
  #onGone(loaded: Loaded<Kept> | undefined): void {
    if (loaded === undefined || this.#loaded !== loaded) {
      return;
    }
    this.#forget(loaded);
    this.#counts.crashes++;
    this.#options.log(
      "error",
      `the engine of ${loaded.model.name} has ended unexpectedly; the next request loads it again`,
    );
    this.#advance();
  }

  /** An idle model's time begins, or is over. */
  #settle(): void {
    const loaded = this.#loaded;
    if (loaded === undefined || loaded.leases.size > 0 || this.#change !== undefined || this.#closed) {
      return;
    }
    if (this.#line.length > 0) {
      return; // the first in line takes it, or takes its place
    }
    const waitMs = loaded.keepAliveSeconds * 1000;
    if (waitMs <= 0) {
      this.#begin(this.#unload(loaded, "its keep_alive is over"));
      return;
    }
    loaded.startTimer(waitMs, () => {
      loaded.keepAliveSeconds = 0;
      this.#settle();
    });
  }
}

function cancelled(): HypuraError {
  return new HypuraError("cancelled", "the request was cancelled");
}

async function streamingOf({ plan, engine }: Loaded<KeptModel>): Promise<StreamingCounters | null> {
  return plan.streaming === null ? null : engine.streaming().catch(() => null); // it was unloaded meanwhile
}

/** A model in memory, and who uses it. */
class Loaded<Kept extends KeptModel> {
  readonly model: Kept;
  readonly plan: Plan;
  readonly engine: ChildEngine;
  readonly leases = new Set<EngineLease<Kept>>();
  keepAliveSeconds: number;
  /** Leases so far. */
  entryCount = 0;
  /** Set while it is idle. */
  expiresAtMs: number | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(model: Kept, plan: Plan, engine: ChildEngine, keepAliveSeconds: number) {
    this.model = model;
    this.plan = plan;
    this.engine = engine;
    this.keepAliveSeconds = keepAliveSeconds;
  }

  /** Leases, and requests that were cancelled and have not left the engine yet. */
  insideCount(): number {
    let asking = 0;
    for (const lease of this.leases) {
      asking += lease.askingCount;
    }
    return this.leases.size + Math.max(0, this.engine.activeRequests() - asking);
  }

  startTimer(waitMs: number, onOver: () => void): void {
    this.stopTimer();
    this.expiresAtMs = Date.now() + waitMs;
    const sleep = (): void => {
      const leftMs = (this.expiresAtMs ?? 0) - Date.now();
      if (leftMs <= 0) {
        onOver();
      } else if (leftMs !== Number.POSITIVE_INFINITY) {
        this.#timer = setTimeout(sleep, Math.min(leftMs, longestTimeoutMs));
      }
    };
    sleep();
  }

  stopTimer(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.expiresAtMs = undefined;
  }
}

class EngineLease<Kept extends KeptModel> implements Lease<Kept> {
  /** Requests of this lease that the engine works on. */
  askingCount = 0;
  readonly #loaded: Loaded<Kept>;
  readonly #signal: AbortSignal;
  readonly #hooks: { readonly onRelease: () => void; readonly onRetry: (error: Error) => void };
  /** Its number, where it found nobody inside. */
  readonly #aloneEntry: number | null;
  #released = false;

  constructor(
    loaded: Loaded<Kept>,
    signal: AbortSignal,
    hooks: { readonly onRelease: () => void; readonly onRetry: (error: Error) => void },
  ) {
    this.#loaded = loaded;
    this.#signal = signal;
    this.#hooks = hooks;
    this.#aloneEntry = loaded.insideCount() === 0 ? loaded.entryCount : null;
  }

  get model(): Kept {
    return this.#loaded.model;
  }

  get plan(): Plan {
    return this.#loaded.plan;
  }

  get info(): EngineInfo {
    return this.#loaded.engine.info;
  }

  async *request(route: string, body: object): AsyncGenerator<EngineChunk, void> {
    let begun = false;
    for (let isFirst = true; ; isFirst = false) {
      this.askingCount++;
      try {
        for await (const chunk of this.#loaded.engine.request(route, body, this.#signal)) {
          begun = true;
          yield chunk;
        }
        return;
      } catch (error) {
        if (begun || !isFirst || !isFailedPass(error)) {
          throw refusalOf(error);
        }
        this.#hooks.onRetry(error);
      } finally {
        this.askingCount--;
      }
    }
  }

  async ask(route: string, body: object): Promise<unknown> {
    let data: unknown;
    for await (const chunk of this.request(route, body)) {
      data = chunk.data;
    }
    return data;
  }

  isAlone(): boolean {
    return this.#aloneEntry === this.#loaded.entryCount;
  }

  streaming(): Promise<StreamingCounters | null> {
    return streamingOf(this.#loaded);
  }

  release(): void {
    if (!this.#released) {
      this.#released = true;
      this.#hooks.onRelease();
    }
  }
}

/** A read that failed costs every request of its pass, the innocent too. The core numbers such errors. */
function isFailedPass(error: unknown): error is RequestError {
  return error instanceof RequestError && error.status === 500 && error.details["code"] === 500;
}

/** What the core throws at a request that it cannot read has no number: native code knows no better than 500. */
function refusalOf(error: unknown): unknown {
  const isThrown =
    error instanceof RequestError && error.status === 500 && error.details["code"] === undefined;
  return isThrown ? new RequestError(400, "invalid_request_error", error.message) : error;
}

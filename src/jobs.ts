// One request that needs the engine, from its arrival to its last byte: its place in the line, its check before the
// first byte, the lines as they come, heartbeats while nothing comes, and its end, whoever brings it about. It owns
// the order of these; the words are the dialects' (ollama-*.ts, openai.ts), the line is the keeper's.

import type { EngineChunk } from "./engine";
import type { Keeper, Lease, Log } from "./keeper";
import type { LibraryModel } from "./library";
import type { ServedModel } from "./ollama-model";
import { drive, type EngineCall, embed, type Prepared, prepare } from "./ollama-prepare";
import { errorReply, renderReply, replyFor, residenceReply } from "./ollama-reply";
import type { EmbedWork, GenerateWork, Work } from "./ollama-request";
import { prepareV1, type V1Reply, type V1Work, v1ReplyFor } from "./openai";
import { type Evaluated, nothing, type Placed, type PrefixSlots } from "./prefix-slots";
import { countersSince, type StreamingCounters } from "./streaming";
import { WireError, wireErrorOf } from "./wire-error";

/** What jobs need of the server. */
export interface Workshop {
  readonly keeper: Keeper<LibraryModel>;
  readonly log: Log;
  /** Silence after which a heartbeat is sent. */
  readonly heartbeatMs: number;
  readonly counters: TokenCounters;
  readonly slots: PrefixSlots;
}

/** Since the server started. */
export interface TokenCounters {
  promptTokens: number;
  cachedTokens: number;
  generatedTokens: number;
}

/**
 * How long a stream waits in line with its status still open. Clients give up after 300 s without headers (Node's
 * fetch), so a longer wait begins the answer with heartbeats, and what goes wrong later is a line in it.
 */
const silentWaitMs = 60_000;
/**
 * What the engine checks by itself it refuses at once, while a right request may need minutes for its first token.
 * After so long the answer begins with a heartbeat.
 */
const verdictWaitMs = 2000;

/** The jobs under way, and the one timer of their heartbeats. */
export class Jobs implements Disposable {
  readonly #jobs = new Set<Job>();
  readonly #timer: ReturnType<typeof setInterval>;
  #onEmpty: (() => void) | undefined;
  #stopping = false;

  constructor(heartbeatMs: number) {
    this.#timer = setInterval(
      () => {
        for (const job of this.#jobs) {
          job.tick();
        }
      },
      Math.max(1, heartbeatMs / ticksPerHeartbeat),
    );
  }

  get isStopping(): boolean {
    return this.#stopping;
  }

  begin(request: Request): Job {
    const job: Job = new Job(request, () => {
      this.#jobs.delete(job);
      if (this.#jobs.size === 0) {
        this.#onEmpty?.();
      }
    });
    this.#jobs.add(job);
    return job;
  }

  /** Lets the jobs finish for `graceMs`, then cancels what is left. */
  async stop(graceMs: number): Promise<void> {
    this.#stopping = true;
    await this.#empty(graceMs);
    for (const job of this.#jobs) {
      job.cancel(shuttingDown);
    }
    await this.#empty(500);
  }

  #empty(waitMs: number): Promise<void> {
    if (this.#jobs.size === 0) {
      return Promise.resolve();
    }
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, waitMs);
    this.#onEmpty = resolve;
    return promise.finally(() => clearTimeout(timer));
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }
}

export const shuttingDown = new WireError(503, "the server is shutting down");

const ticksPerHeartbeat = 10;

/** A request under way. */
class Job {
  readonly receivedNs = Bun.nanoseconds();
  readonly #stop = new AbortController();
  readonly #onEnd: () => void;
  #lease: Lease<LibraryModel> | undefined;
  #placed: Placed | undefined;
  #reason: WireError | undefined;
  #outlet: Outlet | undefined;
  #ended = false;

  constructor(request: Request, onEnd: () => void) {
    this.#onEnd = onEnd;
    const leave = (): void => this.cancel();
    if (request.signal.aborted) {
      leave();
    } else {
      request.signal.addEventListener("abort", leave, { once: true });
    }
  }

  /** Aborted when the client has left, or the server ends. */
  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  /** Without a reason: the client has left, and nobody hears anything. */
  cancel(reason?: WireError): void {
    this.#reason ??= reason;
    this.#stop.abort();
    this.#outlet?.wake();
  }

  /** Idempotent. */
  end(): void {
    if (!this.#ended) {
      this.#ended = true;
      this.#stop.abort(); // whatever it still asks of the engine
      this.#placed?.done();
      this.#lease?.release();
      this.#onEnd();
    }
  }

  /** The chunks of the answer, out of the slot that has most of the prompt. */
  async *run(
    shop: Workshop,
    lease: Lease<LibraryModel>,
    prepared: Prepared,
  ): AsyncGenerator<EngineChunk, void> {
    const placed = await shop.slots.place(lease, prepared);
    this.#placed = placed;
    if (this.#ended) {
      placed.done();
    }
    const body = { ...prepared.body, ...placed.fields };
    yield* counted(shop, lease, { route: prepared.route, body }, placed.evaluated);
  }

  async enter(
    keeper: Keeper<LibraryModel>,
    model: LibraryModel,
    keepAliveSeconds: number | null,
  ): Promise<Lease<LibraryModel>> {
    const lease = await keeper.lease(model, { keepAliveSeconds, signal: this.signal });
    this.#lease = lease;
    if (this.#ended) {
      lease.release();
    }
    return lease;
  }

  errorOf(error: unknown): WireError {
    return this.#reason ?? wireErrorOf(error);
  }

  /** Runs `answer` to its end; for replies that are one object. */
  async whole(answer: () => Promise<object>): Promise<Response> {
    try {
      return jsonResponse(await answer());
    } catch (error) {
      throw this.errorOf(error);
    } finally {
      this.end();
    }
  }

  /**
   * A stream that `produce` fills once `ready` is. What fails before the first byte is thrown; `waitMs` later the
   * answer begins all the same, and what fails from there on is said in it.
   */
  async stream<Ready>(shape: StreamShape<Ready>, ready: Promise<Ready>): Promise<Response> {
    try {
      await settledOr(ready, shape.waitMs);
    } catch (error) {
      this.end();
      throw this.errorOf(error);
    }
    const outlet = new Outlet(shape.heartbeat, () => this.cancel());
    this.#outlet = outlet;
    void this.#fill(outlet, shape, ready);
    return new Response(outlet.body, {
      headers: { "content-type": shape.contentType, "cache-control": "no-cache", "x-accel-buffering": "no" },
    });
  }

  async #fill<Ready>(outlet: Outlet, shape: StreamShape<Ready>, ready: Promise<Ready>): Promise<void> {
    try {
      outlet.beat();
      await shape.produce(await ready, outlet);
    } catch (error) {
      outlet.send(shape.failure(this.errorOf(error)));
    } finally {
      outlet.close();
      this.end();
    }
  }

  tick(): void {
    this.#outlet?.tick();
  }
}

export type { Job };

interface StreamShape<Ready> {
  readonly contentType: string;
  readonly waitMs: number;
  readonly heartbeat: () => string;
  readonly produce: (ready: Ready, outlet: Outlet) => Promise<void>;
  /** The last text of an answer that failed. */
  readonly failure: (error: WireError) => string;
}

/** Resolves when `promise` has, or after `waitMs`; rejects where it has by then. */
async function settledOr(promise: Promise<unknown>, waitMs: number): Promise<void> {
  const { promise: over, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, waitMs);
  try {
    await Promise.race([promise, over]);
  } finally {
    clearTimeout(timer);
  }
  promise.catch(() => {}); // from here on it is looked at in the stream
}

/** Bytes that may wait for a client that reads slowly before the answer waits for it. */
const bufferedBytes = 65_536;

/** The body of a streamed reply. */
class Outlet {
  readonly body: ReadableStream<Uint8Array>;
  readonly #heartbeat: () => string;
  readonly #encoder = new TextEncoder();
  #controller!: ReadableStreamDefaultController<Uint8Array>;
  #silentTicks = 0;
  #closed = false;
  #onRoom: (() => void) | undefined;

  constructor(heartbeat: () => string, onLeave: () => void) {
    this.#heartbeat = heartbeat;
    this.body = new ReadableStream<Uint8Array>(
      {
        start: (controller) => {
          this.#controller = controller;
        },
        pull: () => this.wake(),
        cancel: () => {
          this.#closed = true;
          this.wake();
          onLeave();
        },
      },
      new ByteLengthQueuingStrategy({ highWaterMark: bufferedBytes }),
    );
  }

  send(text: string): void {
    if (text !== "" && !this.#closed) {
      this.#silentTicks = 0;
      this.#controller.enqueue(this.#encoder.encode(text));
    }
  }

  beat(): void {
    this.send(this.#heartbeat());
  }

  /** Null: there is room for more; else wait for it. */
  whenRoom(): Promise<void> | null {
    if (this.#closed || (this.#controller.desiredSize ?? 1) > 0) {
      return null;
    }
    return new Promise((resolve) => {
      this.#onRoom = resolve;
    });
  }

  /** A client that does not read what is there needs no heartbeat. */
  tick(): void {
    if (++this.#silentTicks >= ticksPerHeartbeat && this.#onRoom === undefined) {
      this.beat();
    }
  }

  close(): void {
    if (!this.#closed) {
      this.#closed = true;
      this.#controller.close();
    }
  }

  /** Who waits for room looks again. */
  wake(): void {
    this.#onRoom?.();
    this.#onRoom = undefined;
  }
}

// ---- Ollama's dialect -------------------------------------------------------------------------------------------

export async function answerWork(
  shop: Workshop,
  job: Job,
  model: LibraryModel,
  work: Work,
): Promise<Response> {
  switch (work.kind) {
    case "unload":
      return job.whole(async () => {
        await shop.keeper.unload(model);
        return residenceReply(work, stamp());
      });
    case "load":
      return job.whole(async () => {
        await job.enter(shop.keeper, model, work.keepAliveSeconds);
        return residenceReply(work, stamp());
      });
    case "debug-render":
      return job.whole(async () => renderReply((await readied(shop, job, model, work)).prepared, stamp()));
    case "generate":
      return work.stream
        ? streamWork(shop, job, model, work)
        : job.whole(() => wholeWork(shop, job, model, work));
  }
}

export async function answerEmbed(
  shop: Workshop,
  job: Job,
  model: LibraryModel,
  work: EmbedWork,
): Promise<Response> {
  return job.whole(async () => {
    const lease = await job.enter(shop.keeper, model, work.keepAliveSeconds);
    const times = { receivedNs: job.receivedNs, loadedNs: Bun.nanoseconds(), nowNs: Bun.nanoseconds };
    return drive(embed(work, model.served, times), asker(lease));
  });
}

/** What is known of a model once it is loaded, with the rest. */
function servedBy({ model, info }: Lease<LibraryModel>): ServedModel {
  return { ...model.served, canShift: info.canShift };
}

/** Asks the engine what a dialect's steps want to know. */
function asker(lease: Lease<LibraryModel>): (call: EngineCall) => Promise<unknown> {
  return ({ route, body }) => lease.ask(route, body);
}

async function readied(shop: Workshop, job: Job, model: LibraryModel, work: GenerateWork) {
  const lease = await job.enter(shop.keeper, model, work.keepAliveSeconds);
  const prepared = await drive(prepare(work, servedBy(lease)), asker(lease));
  return { lease, prepared };
}

function replyOf(job: Job, work: GenerateWork) {
  return replyFor(work, { stamp, nowNs: Bun.nanoseconds, receivedNs: job.receivedNs, newId });
}

async function wholeWork(shop: Workshop, job: Job, model: LibraryModel, work: GenerateWork): Promise<object> {
  const reply = replyOf(job, work);
  const { lease, prepared } = await readied(shop, job, model, work);
  reply.begin(prepared);
  for await (const chunk of job.run(shop, lease, prepared)) {
    reply.onChunk(chunk);
  }
  return drive(reply.whole(), asker(lease));
}

async function streamWork(
  shop: Workshop,
  job: Job,
  model: LibraryModel,
  work: GenerateWork,
): Promise<Response> {
  const reply = replyOf(job, work);
  return job.stream(
    {
      contentType: "application/x-ndjson",
      waitMs: silentWaitMs,
      heartbeat: () => ndjson([reply.heartbeat()]),
      failure: (error) => ndjson([errorReply(error)]),
      async produce({ lease, prepared }, outlet) {
        reply.begin(prepared);
        for await (const chunk of job.run(shop, lease, prepared)) {
          outlet.send(ndjson(reply.onChunk(chunk)));
          await outlet.whenRoom();
        }
        outlet.send(ndjson(await drive(reply.end(), asker(lease))));
      },
    },
    readied(shop, job, model, work),
  );
}

function ndjson(lines: readonly object[]): string {
  let text = "";
  for (const line of lines) {
    text += `${JSON.stringify(line)}\n`;
  }
  return text;
}

// ---- the dialects under /v1 -------------------------------------------------------------------------------------

export async function answerV1(
  shop: Workshop,
  job: Job,
  model: LibraryModel,
  work: V1Work,
): Promise<Response> {
  const reply = v1ReplyFor(work, { nowUnixSeconds: Math.floor(Date.now() / 1000), newId });
  const keepAliveSeconds = work.kind === "embed" ? work.work.keepAliveSeconds : null;
  const begin = async (): Promise<AsyncGenerator<EngineChunk, void> | null> => {
    const lease = await job.enter(shop.keeper, model, keepAliveSeconds);
    const prepared = await drive(prepareV1(work, servedBy(lease)), asker(lease));
    reply.begin(prepared);
    if (prepared.kind === "answer") {
      return null;
    }
    if (prepared.prepared === null) {
      shop.slots.forget(lease);
      return counted(shop, lease, prepared);
    }
    return job.run(shop, lease, prepared.prepared);
  };
  if (work.stream) {
    return streamV1(job, reply, begun(begin(), work.kind === "pass"));
  }
  return job.whole(async () => {
    for await (const chunk of (await begin()) ?? []) {
      reply.onChunk(chunk);
    }
    return reply.whole();
  });
}

interface Begun {
  readonly chunks: AsyncIterator<EngineChunk, void> | null;
  readonly first: Promise<IteratorResult<EngineChunk, void>> | null;
}

/** What is passed through is checked by the engine alone: its first word, where it comes soon, decides the status. */
async function begun(
  beginning: Promise<AsyncGenerator<EngineChunk, void> | null>,
  isPassed: boolean,
): Promise<Begun> {
  const chunks = await beginning;
  const first = chunks?.next() ?? null;
  if (first !== null && isPassed) {
    await settledOr(first, verdictWaitMs);
  }
  return { chunks, first };
}

function streamV1(job: Job, reply: V1Reply, ready: Promise<Begun>): Promise<Response> {
  return job.stream(
    {
      contentType: "text/event-stream",
      waitMs: silentWaitMs,
      heartbeat: () => reply.heartbeat(),
      failure: (error) => reply.error(error),
      async produce({ chunks, first }, outlet) {
        if (chunks !== null && first !== null) {
          for (let next = await first; !next.done; next = await chunks.next()) {
            outlet.send(reply.onChunk(next.value));
            await outlet.whenRoom();
          }
        }
        outlet.send(reply.end());
      },
    },
    ready,
  );
}

// ---- what all share ---------------------------------------------------------------------------------------------

/** timings of server-task.cpp (result_timings). */
interface CoreTimings {
  readonly cache_n?: number;
  readonly prompt_n?: number;
  readonly prompt_ms?: number;
  readonly predicted_n?: number;
  readonly predicted_ms?: number;
  readonly draft_n?: number;
  readonly draft_n_accepted?: number;
}

/** The chunks of the answer as they are, its tokens counted and its speed remembered when it ends, however it ends. */
async function* counted(
  { counters }: Workshop,
  lease: Lease<LibraryModel>,
  { route, body }: EngineCall,
  evaluated: Evaluated = nothing,
): AsyncGenerator<EngineChunk, void> {
  let timings: CoreTimings | undefined;
  // From the first token on: what the prompt read says nothing of decoding.
  let before: Promise<StreamingCounters | null> | undefined;
  try {
    for await (const answered of lease.request(route, body)) {
      const chunk = evaluated.tokens === 0 ? answered : withEvaluated(answered, evaluated);
      timings = (chunk.data as { readonly timings?: CoreTimings } | null)?.timings ?? timings;
      before ??= timings === undefined && lease.isAlone() ? lease.streaming() : undefined;
      yield chunk;
    }
  } finally {
    if (timings !== undefined && lease.isAlone()) {
      void remember(lease, timings, before);
    }
    counters.promptTokens += timings?.prompt_n ?? 0;
    counters.cachedTokens += timings?.cache_n ?? 0;
    counters.generatedTokens += timings?.predicted_n ?? 0;
  }
}

/** What was evaluated for this request is no memory of an earlier one, though the engine finds it in its slot. */
function withEvaluated(chunk: EngineChunk, { tokens, ms }: Evaluated): EngineChunk {
  const data = chunk.data as { readonly timings?: CoreTimings } | null;
  const timings = data?.timings;
  if (timings === undefined) {
    return chunk;
  }
  const whole = {
    ...timings,
    cache_n: Math.max(0, (timings.cache_n ?? 0) - tokens),
    prompt_n: (timings.prompt_n ?? 0) + tokens,
    prompt_ms: (timings.prompt_ms ?? 0) + ms,
  };
  return { ...chunk, data: { ...data, timings: whole } };
}

/** Of fewer the first, slow ones are too large a part. */
const leastRememberedTokens = 8;

/** The next plan knows how fast this answer was. Nobody waits for it. */
async function remember(
  lease: Lease<LibraryModel>,
  timings: CoreTimings,
  before: Promise<StreamingCounters | null> | undefined,
): Promise<void> {
  const decoded = {
    tokens: (timings.predicted_n ?? 0) - 1, // the first came with the prompt
    seconds: (timings.predicted_ms ?? 0) / 1000,
    drafted: timings.draft_n ?? 0,
    accepted: timings.draft_n_accepted ?? 0,
  };
  if (decoded.tokens < leastRememberedTokens) {
    return;
  }
  const [from, to] = before === undefined ? [null, null] : await Promise.all([before, lease.streaming()]);
  lease.model.remember(lease.plan, decoded, from === null || to === null ? null : countersSince(from, to));
}

export function jsonResponse(value: object, status = 200): Response {
  return new Response(JSON.stringify(value), {
    status,
    headers: { "content-type": "application/json; charset=utf-8" },
  });
}

function stamp(): string {
  return new Date().toISOString();
}

const idLetters = "abcdefghijklmnopqrstuvwxyz0123456789";

/** Eight of [a-z0-9]. */
export function newId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => idLetters[byte % 36]).join("");
}

// Whose turn it is and what is in memory, over an engine that does what the test says: the line, its limit, swaps,
// timers, crashes and the second try.

import { describe, expect, test } from "bun:test";
import type { ChildEngine, ChildOptions } from "../../src/child";
import { type EngineChunk, RequestError } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import { Keeper, type KeeperOptions, type KeptModel, type Lease } from "../../src/keeper";
import type { Plan } from "../../src/plan";
import { serverBusy } from "../../src/wire-error";
import { until } from "../engine/process";

/** What the fake engines of one test were told, and how they behave. */
class Stage {
  readonly events: string[] = [];
  readonly engines: FakeEngine[] = [];
  /** Resolved by the test where it holds loads back. */
  loadGate: Promise<void> = Promise.resolve();
  failLoads = 0;
  /** Thrown by the next requests, one each. */
  readonly failures: Error[] = [];

  readonly open = async (plan: Plan, options: ChildOptions): Promise<ChildEngine> => {
    this.events.push(`load ${plan.model.name}`);
    await Promise.race([
      this.loadGate,
      new Promise((_, reject) => {
        options.signal?.addEventListener("abort", () => reject(new HypuraError("engine", "ended")));
      }),
    ]);
    if (this.failLoads > 0) {
      this.failLoads--;
      throw new HypuraError("engine", "the file is torn");
    }
    const engine = new FakeEngine(this, plan, options);
    this.engines.push(engine);
    return engine as unknown as ChildEngine;
  };
}

class FakeEngine {
  readonly plan: Plan;
  readonly info = { contextTokens: 1024 };
  readonly processId = 1;
  readonly #stage: Stage;
  readonly #options: ChildOptions;
  /** Requests that were cancelled and are still in the engine. */
  lingering = 0;
  #running = 0;

  constructor(stage: Stage, plan: Plan, options: ChildOptions) {
    this.#stage = stage;
    this.plan = plan;
    this.#options = options;
  }

  async *request(route: string): AsyncGenerator<EngineChunk> {
    this.#running++;
    try {
      const failure = this.#stage.failures.shift();
      this.#stage.events.push(`${failure === undefined ? "answer" : "fail"} ${route}`);
      if (failure !== undefined) {
        throw failure;
      }
      yield { data: 1 };
      yield { data: 2 };
    } finally {
      this.#running--;
    }
  }

  activeRequests(): number {
    return this.#running + this.lingering;
  }

  leave(): void {
    this.lingering = 0;
    this.#options.onRequestLeft?.();
  }

  crash(): void {
    this.#options.onGone?.();
  }

  streaming(): Promise<null> {
    return Promise.resolve(null);
  }

  guesses(): Promise<null> {
    return Promise.resolve(null);
  }

  close(): Promise<void> {
    this.#stage.events.push(`unload ${this.plan.model.name}`);
    return Promise.resolve();
  }
}

function model(name: string): KeptModel {
  return {
    name,
    plan: () => ({ model: { name }, mode: "full-resident", contextTokens: 1024, streaming: null }) as Plan,
  };
}

const a = model("a");
const b = model("b");

function setUp(options: Partial<KeeperOptions> = {}): {
  readonly stage: Stage;
  readonly keeper: Keeper<KeptModel>;
} {
  const stage = new Stage();
  const keeper = new Keeper<KeptModel>({
    parallel: 1,
    maxQueue: 8,
    keepAliveSeconds: 300,
    log: () => {},
    open: stage.open,
    ...options,
  });
  return { stage, keeper };
}

function lease(
  keeper: Keeper<KeptModel>,
  of: KeptModel,
  options: { readonly keepAliveSeconds?: number; readonly signal?: AbortSignal } = {},
): Promise<Lease<KeptModel>> {
  return keeper.lease(of, {
    keepAliveSeconds: options.keepAliveSeconds ?? null,
    signal: options.signal ?? new AbortController().signal,
  });
}

async function codeOf(promise: Promise<unknown>): Promise<string> {
  return promise.then(
    () => "none",
    (error: unknown) => (error instanceof HypuraError ? error.code : "foreign"),
  );
}

/** Whether the promise has been settled by now. */
async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  const mark = Symbol("pending");
  await Bun.sleep(5);
  return (await Promise.race([promise.catch(() => null), Promise.resolve(mark)])) !== mark;
}

describe("the line", () => {
  test("is first come, first served, N at once", async () => {
    const { keeper } = setUp({ parallel: 2 });
    const order: number[] = [];
    const places: Lease<KeptModel>[] = [];
    const waits = [0, 1, 2, 3, 4].map((i) =>
      lease(keeper, a).then((one) => {
        order.push(i);
        places.push(one);
      }),
    );
    await Promise.all(waits.slice(0, 2));
    await Bun.sleep(5);
    expect(order).toEqual([0, 1]);
    expect(keeper.counts()).toMatchObject({ inside: 2, waiting: 3 });
    places[1]?.release();
    places[1]?.release();
    await waits[2];
    await Bun.sleep(5);
    expect(order).toEqual([0, 1, 2]);
    places[0]?.release();
    places[2]?.release();
    await Promise.all(waits);
    expect(order).toEqual([0, 1, 2, 3, 4]);
  });

  test("takes so many and refuses the rest in Ollama's words", async () => {
    const { keeper } = setUp({ parallel: 2, maxQueue: 3 });
    const waits = Array.from({ length: 5 }, () => lease(keeper, a));
    expect(await lease(keeper, a).catch((error: unknown) => error)).toBe(serverBusy);
    expect(keeper.counts()).toMatchObject({ refused: 1 });
    (await (waits[0] as Promise<Lease<KeptModel>>)).release();
    const late = lease(keeper, a);
    expect(await isSettled(late)).toBe(false);
  });

  test("without room to wait, those inside are still served", async () => {
    const { keeper } = setUp({ maxQueue: 0 });
    const first = lease(keeper, a);
    expect(await lease(keeper, a).catch((error: unknown) => error)).toBe(serverBusy);
    (await first).release();
    (await lease(keeper, a)).release();
  });

  test("one who leaves makes room at once, wherever he stands", async () => {
    const { keeper } = setUp({ maxQueue: 1 });
    const inside = await lease(keeper, a);
    const stop = new AbortController();
    const waiting = lease(keeper, a, { signal: stop.signal });
    expect(keeper.counts().waiting).toBe(1);
    stop.abort();
    expect(keeper.counts().waiting).toBe(0);
    expect(await codeOf(waiting)).toBe("cancelled");
    const next = lease(keeper, a);
    inside.release();
    (await next).release();
    expect(await codeOf(lease(keeper, a, { signal: stop.signal }))).toBe("cancelled");
  });

  test("a request that was cancelled holds its place until it has left the engine", async () => {
    const { stage, keeper } = setUp();
    const first = await lease(keeper, a);
    const engine = stage.engines[0] as FakeEngine;
    engine.lingering = 1;
    first.release();
    const second = lease(keeper, a);
    expect(await isSettled(second)).toBe(false);
    expect(keeper.counts().inside).toBe(1);
    engine.leave();
    (await second).release();
  });
});

describe("swapping", () => {
  test("waits for those inside, and nobody overtakes", async () => {
    const { stage, keeper } = setUp({ parallel: 2 });
    const first = await lease(keeper, a);
    const other = lease(keeper, b);
    const late = lease(keeper, a);
    expect(await isSettled(other)).toBe(false);
    expect(await isSettled(late)).toBe(false);
    first.release();
    const inB = await other;
    expect(inB.model).toBe(b);
    expect(stage.events).toEqual(["load a", "unload a", "load b"]);
    inB.release();
    expect((await late).model).toBe(a);
    expect(stage.events).toEqual(["load a", "unload a", "load b", "unload b", "load a"]);
  });

  test("is not needed when the one who wanted it has left", async () => {
    const { stage, keeper } = setUp({ parallel: 2 });
    const first = await lease(keeper, a);
    const stop = new AbortController();
    const other = lease(keeper, b, { signal: stop.signal });
    const late = lease(keeper, a);
    stop.abort();
    expect(await codeOf(other)).toBe("cancelled");
    (await late).release();
    first.release();
    expect(stage.events).toEqual(["load a"]);
  });
});

describe("a load that fails", () => {
  test("is told to all who wait for that model, and tried again by the next", async () => {
    const { stage, keeper } = setUp({ parallel: 2 });
    stage.failLoads = 1;
    const [one, two, other] = [lease(keeper, a), lease(keeper, a), lease(keeper, b)];
    expect(await codeOf(one)).toBe("engine");
    expect(await codeOf(two)).toBe("engine");
    (await other).release();
    (await lease(keeper, a)).release();
    expect(keeper.counts()).toMatchObject({ failedLoads: 1, loads: 2 });
  });

  test("so is a plan that does not fit any more", async () => {
    const { keeper } = setUp();
    const big = {
      name: "big",
      plan: () => {
        throw new HypuraError("not-enough-memory", "too big");
      },
    };
    expect(await codeOf(lease(keeper, big))).toBe("not-enough-memory");
    (await lease(keeper, a)).release();
  });
});

describe("keep-alive", () => {
  test("the time begins when the last one is done, and is the last one's that gave any", async () => {
    const { stage, keeper } = setUp({ parallel: 2 });
    const first = await lease(keeper, a, { keepAliveSeconds: 0.05 });
    const second = await lease(keeper, a);
    first.release();
    await Bun.sleep(120);
    expect(stage.events).toEqual(["load a"]);
    second.release();
    expect(keeper.residence()?.expiresAtMs).toBeGreaterThan(Date.now());
    await until(
      () => keeper.residence() === null,
      () => "it stays",
    );
    expect(stage.events).toEqual(["load a", "unload a"]);
  });

  test("nothing unloads at once, for ever stays", async () => {
    const { stage, keeper } = setUp();
    (await lease(keeper, a, { keepAliveSeconds: Number.POSITIVE_INFINITY })).release();
    expect(keeper.residence()?.expiresAtMs).toBe(Number.POSITIVE_INFINITY);
    (await lease(keeper, a, { keepAliveSeconds: 0 })).release();
    await until(
      () => stage.events.includes("unload a"),
      () => "it stays",
    );
    expect(keeper.residence()).toBeNull();
  });

  test("longer than a timer can count", async () => {
    const { keeper } = setUp({ keepAliveSeconds: 1e9 });
    (await lease(keeper, a)).release();
    await Bun.sleep(20);
    expect((keeper.residence()?.expiresAtMs ?? 0) - Date.now()).toBeGreaterThan(9e11);
  });

  test("asked to unload: at once when idle, else when the last one is done; a load is waited for", async () => {
    const { stage, keeper } = setUp();
    const first = await lease(keeper, a);
    await keeper.unload(a);
    expect(keeper.residence()).not.toBeNull();
    first.release();
    await until(
      () => keeper.residence() === null,
      () => "it stays",
    );
    (await lease(keeper, a)).release();
    await keeper.unload(b);
    expect(keeper.residence()).not.toBeNull();
    await keeper.unload(a);
    expect(keeper.residence()).toBeNull();
    expect(stage.events.filter((event) => event === "unload a").length).toBe(2);
  });
});

describe("failures", () => {
  const failedPass = (): RequestError =>
    new RequestError(500, "server_error", "a.gguf: input/output error at 4096", { code: 500 });

  test("a request that sent nothing is asked once more", async () => {
    const { stage, keeper } = setUp();
    const place = await lease(keeper, a);
    stage.failures.push(failedPass());
    expect(await place.ask("POST /x", {})).toBe(2);
    expect(stage.events).toEqual(["load a", "fail POST /x", "answer POST /x"]);
    expect(keeper.counts().retries).toBe(1);
    stage.failures.push(failedPass(), failedPass());
    expect(await codeOf(place.ask("POST /x", {}))).toBe("request");
    place.release();
  });

  test("a refusal is not", async () => {
    const { stage, keeper } = setUp();
    const place = await lease(keeper, a);
    stage.failures.push(new RequestError(400, "invalid_request_error", "no"));
    expect(await codeOf(place.ask("POST /x", {}))).toBe("request");
    stage.failures.push(new HypuraError("engine", "dead"));
    expect(await codeOf(place.ask("POST /x", {}))).toBe("engine");
    stage.failures.push(new RequestError(500, "server_error", "Missing 'role' in message"));
    const thrown = await place.ask("POST /x", {}).catch((error: unknown) => error);
    expect((thrown as RequestError).status).toBe(400);
    expect(keeper.counts().retries).toBe(0);
    place.release();
  });

  test("after a crash the next request loads again, and those of the dead engine do not count", async () => {
    const { stage, keeper } = setUp();
    const lost = await lease(keeper, a);
    const waiting = lease(keeper, a);
    stage.engines[0]?.crash();
    const next = await waiting;
    expect(stage.events).toEqual(["load a", "load a"]);
    expect(keeper.counts()).toMatchObject({ crashes: 1, inside: 1 });
    lost.release();
    expect(keeper.counts().inside).toBe(1);
    next.release();
    expect(keeper.residence()?.model).toBe(a);
  });
});

describe("the end", () => {
  test("rejects who waits, ends a load, takes nobody in", async () => {
    const { stage, keeper } = setUp();
    stage.loadGate = new Promise(() => {});
    const waiting = lease(keeper, a);
    const rejected = codeOf(waiting);
    await Bun.sleep(1);
    await keeper.close();
    expect(await rejected).toBe("cancelled");
    expect(await codeOf(lease(keeper, a))).toBe("cancelled");
  });

  test("closes the engine", async () => {
    const { stage, keeper } = setUp();
    await lease(keeper, a);
    await keeper.close();
    expect(stage.events).toEqual(["load a", "unload a"]);
    expect(keeper.residence()).toBeNull();
  });
});

// Before a request runs: which of the engine's slots it should take, and whether what it begins with comes out of the
// store into that slot, or is evaluated by itself and kept (prefix-store.ts). It owns what it knows of the slots of the
// engine that is loaded; wrong knowledge costs time and never a wrong token, since the engine's core compares tokens.

import type { EngineInfo } from "./engine";
import { HypuraError } from "./errors";
import type { Lease, Log } from "./keeper";
import type { LibraryModel } from "./library";
import { drive, likeConversation, type Prepared } from "./ollama-prepare";
import { type KeptHead, type Shelf, sharedCount, type TokenIds } from "./prefix-store";

/** Fewer are evaluated in one pass, which what follows them needs anyway. */
const leastTokens = 128;

/** What was evaluated of a prompt before its request. */
export interface Evaluated {
  readonly tokens: number;
  readonly ms: number;
}

export const nothing: Evaluated = { tokens: 0, ms: 0 };

/** A slot that was chosen for a request. */
export interface Placed {
  /** For the engine's request. */
  readonly fields: object;
  readonly evaluated: Evaluated;
  /** The request has ended. */
  done(): void;
}

const nowhere: Placed = { fields: {}, evaluated: nothing, done() {} };

interface Slot {
  readonly index: number;
  /** What it was last asked to evaluate; the engine may have dropped or added some. */
  tokens: TokenIds;
  isTaken: boolean;
  usedAt: number;
}

export class PrefixSlots {
  readonly #log: Log;
  /** By what is said of an engine when it is ready: a new engine begins with empty slots. */
  readonly #slots = new WeakMap<EngineInfo, Slot[]>();
  #clock = 0;
  /** Choices are made one at a time. */
  #choosing: Promise<unknown> = Promise.resolve();

  constructor(log: Log) {
    this.#log = log;
  }

  /** Chooses a slot for a request, and has in it what the store knows of its beginning. */
  async place(lease: Lease<LibraryModel>, prepared: Prepared): Promise<Placed> {
    const { shelf } = lease.model;
    const tokens = prepared.promptIds;
    // A draft model keeps a cache of its own, which no file has.
    const hasDraft = (lease.plan.speculation?.draftPath ?? null) !== null;
    if (shelf === null || tokens === null || hasDraft) {
      this.forget(lease);
      return nowhere;
    }
    const turn = this.#choosing.then(() => this.#choose(lease, shelf, tokens));
    this.#choosing = turn.catch(() => {});
    const slot = await turn;
    if (slot === null) {
      return nowhere;
    }
    let evaluated = nothing;
    try {
      evaluated = await this.#evaluateHead(lease, { shelf, slot, prepared, tokens });
    } catch (error) {
      slot.isTaken = false;
      throw error;
    }
    slot.tokens = tokens;
    return {
      fields: { id_slot: slot.index },
      evaluated,
      done: () => {
        slot.isTaken = false;
      },
    };
  }

  /** A request runs in a slot of the engine's own choice: nobody knows any more what is where. */
  forget(lease: Lease<LibraryModel>): void {
    for (const slot of this.#slots.get(lease.info) ?? []) {
      slot.tokens = [];
    }
  }

  /** Takes the slot that has most of the prompt, by itself or out of the store. */
  async #choose(lease: Lease<LibraryModel>, shelf: Shelf, tokens: TokenIds): Promise<Slot | null> {
    const free = await this.#freeSlots(lease);
    const byAge = free.toSorted((one, other) => one.usedAt - other.usedAt);
    const oldest = byAge[0];
    if (oldest === undefined) {
      return null;
    }
    const warmest = byAge.reduce((best, one) =>
      sharedCount(one.tokens, tokens) > sharedCount(best.tokens, tokens) ? one : best,
    );
    const warmTokens = sharedCount(warmest.tokens, tokens);
    const kept = shelf.best(tokens);
    if (kept !== null && kept.sharedTokens >= warmTokens + leastTokens) {
      if (await this.#restore(lease, shelf, oldest, kept.head)) {
        return take(oldest, ++this.#clock);
      }
    }
    return take(warmTokens > 0 ? warmest : oldest, ++this.#clock);
  }

  async #freeSlots(lease: Lease<LibraryModel>): Promise<readonly Slot[]> {
    let slots = this.#slots.get(lease.info);
    if (slots === undefined) {
      slots = Array.from({ length: lease.info.slotCount }, (_, index) => ({
        index,
        tokens: [],
        isTaken: false,
        usedAt: 0,
      }));
      this.#slots.set(lease.info, slots);
    }
    const free = slots.filter(({ isTaken }) => !isTaken);
    if (slots.length === 1) {
      return free;
    }
    // Requests that this file did not place are in slots too.
    const states = (await lease.ask("GET /slots", {})) as readonly {
      readonly id: number;
      readonly is_processing: boolean;
    }[];
    const busy = new Set(states.filter((one) => one.is_processing).map(({ id }) => id));
    return free.filter(({ index }) => !busy.has(index));
  }

  async #restore(lease: Lease<LibraryModel>, shelf: Shelf, slot: Slot, head: KeptHead): Promise<boolean> {
    if (!(await shelf.isSound(head))) {
      return false;
    }
    const started = performance.now();
    slot.tokens = [];
    try {
      await lease.ask(`POST /slots?id_slot=${slot.index}&action=restore`, { filename: `${head.name}.kv` });
    } catch (error) {
      if (error instanceof HypuraError && error.code === "request") {
        this.#log("warn", `a kept prefix was refused by the engine and is evaluated again: ${error.message}`);
        shelf.remove(head);
        return false;
      }
      throw error;
    }
    shelf.touch(head);
    slot.tokens = head.tokens;
    const ms = (performance.now() - started).toFixed(0);
    this.#log("debug", `${head.tokens.length} tokens that a conversation begins with were read in ${ms} ms`);
    return true;
  }

  /** A head of which much is new is evaluated alone, so that it can be kept without the conversation behind it. */
  async #evaluateHead(
    lease: Lease<LibraryModel>,
    { shelf, slot, prepared, tokens }: PlaceOf,
  ): Promise<Evaluated> {
    const like = await drive(likeConversation(prepared, lease.model.served), ({ route, body }) =>
      lease.ask(route, body),
    );
    const head = like === null ? [] : tokens.slice(0, sharedCount(like, tokens));
    const known = shelf.best(head)?.sharedTokens ?? 0;
    if (head.length < known + leastTokens || !shelf.wants(head)) {
      return nothing;
    }
    const body = {
      prompt: head,
      n_predict: 0,
      temperature: 0,
      cache_prompt: true,
      id_slot: slot.index,
      stream: true,
    };
    let evaluated = nothing;
    for await (const { data } of lease.request("POST /completion", body)) {
      // Its token is of no use; what counts is in the slot.
      const { timings } = data as {
        readonly timings?: { readonly prompt_n: number; readonly prompt_ms: number };
      };
      evaluated = timings === undefined ? evaluated : { tokens: timings.prompt_n, ms: timings.prompt_ms };
    }
    const { plan } = lease;
    const kvBytes = plan.memory.kvBytes + (plan.gpuMemory?.kvBytes ?? 0);
    const expectedBytes = Math.ceil((kvBytes * head.length) / (plan.contextTokens * plan.slotCount));
    await shelf.keep(head, expectedBytes, async (filename) => {
      const answer = await lease.ask(`POST /slots?id_slot=${slot.index}&action=save`, { filename });
      const { n_saved: savedTokens, n_written: writtenBytes } = answer as {
        readonly n_saved: number;
        readonly n_written: number;
      };
      if (savedTokens !== head.length) {
        throw new HypuraError(
          "internal",
          `the slot held ${savedTokens} tokens and not the ${head.length} that were to be kept`,
        );
      }
      return writtenBytes;
    });
    return evaluated;
  }
}

interface PlaceOf {
  readonly shelf: Shelf;
  readonly slot: Slot;
  readonly prepared: Prepared;
  readonly tokens: TokenIds;
}

function take(slot: Slot, usedAt: number): Slot {
  slot.isTaken = true;
  slot.usedAt = usedAt;
  return slot;
}

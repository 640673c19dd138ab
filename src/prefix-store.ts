// What conversations begin with, kept on disk: for each served model the KV of heads (system prompt and tools) that were
// evaluated once, so that after a restart nobody waits minutes for them again. It owns the folder: which files are whole,
// how much they may take together, which goes first. What is in the engine's slots is prefix-slots.ts's matter, and no
// request is known here.
//
// A head is two files, `<name>.kv`, which the engine's core wrote, and `<name>.json`, which says what is in it and is put
// there last. Both come into being under a name that ends in `.tmp` and are renamed when they are whole on the disk: a
// process that dies at any moment leaves at most files that the next one removes.

import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, utimesSync } from "node:fs";
import { open, rename } from "node:fs/promises";
import { join, resolve } from "node:path";
import { crc32 } from "node:zlib";
import { HypuraError } from "./errors";
import type { Log } from "./keeper";
import type { Model } from "./model";
import { stateFolder } from "./state";
import { bytesText, countText } from "./text";

export type TokenIds = readonly number[];

/** A head that is kept. */
export interface KeptHead {
  readonly name: string;
  readonly tokens: TokenIds;
  readonly sizeBytes: number;
  readonly checksum: number;
}

const headVersion = 1;
const folderName = "prefixes";

/** Why no prefix of this model can be taken up again; null where it can. */
export function whyNotKept(model: Model): string | null {
  const { memoryLayers } = model;
  if (memoryLayers.some(({ stateElements }) => stateElements > 0)) {
    return "it has a recurrent state, of which no beginning can be cut off";
  }
  if (memoryLayers.some(({ windowTokens }) => windowTokens !== null)) {
    return "it attends to a sliding window, so the beginning of a long prompt is gone when it has been read";
  }
  return memoryLayers.some(({ extraKeyElements }) => extraKeyElements > 0)
    ? "its cache is not one of plain attention"
    : null;
}

export interface PrefixStoreOptions {
  /** What all heads of all models may take together. */
  readonly budgetBytes: number;
  readonly log: Log;
  /** By default in the state folder. */
  readonly folder?: string;
}

/** Every model's heads. */
export class PrefixStore {
  readonly #options: PrefixStoreOptions;
  readonly #folder: string;
  readonly #shelves = new Map<string, Shelf>();

  constructor(options: PrefixStoreOptions) {
    this.#options = options;
    this.#folder = resolve(options.folder ?? join(stateFolder(), folderName)); // native code wants all of the path
  }

  /**
   * The heads of the model that `key` identifies: its weights, the types of its cache and whatever else makes another
   * cache of the same text. Throws `io` where its folder cannot be made.
   */
  shelf(key: string): Shelf {
    const known = this.#shelves.get(key);
    if (known !== undefined) {
      return known;
    }
    const shelf = new Shelf(join(this.#folder, key), this.#options.log, (bytes) => this.#makeRoom(bytes));
    this.#shelves.set(key, shelf);
    return shelf;
  }

  /** Removes what was used longest ago until `bytes` fit. Says whether they do. */
  #makeRoom(bytes: number): boolean {
    const { budgetBytes, log } = this.#options;
    if (bytes > budgetBytes) {
      return false;
    }
    const all = this.#everyHead().toSorted((one, other) => one.usedMs - other.usedMs);
    let used = all.reduce((sum, one) => sum + one.sizeBytes, 0);
    for (const { folder, name, sizeBytes } of all) {
      if (used + bytes <= budgetBytes) {
        break;
      }
      used -= sizeBytes;
      removeHead(folder, name);
      for (const shelf of this.#shelves.values()) {
        shelf.forget(folder, name);
      }
      log("debug", `a kept prefix of ${bytesText(sizeBytes)} made room for another`);
    }
    return true;
  }

  /** Of models too that this server does not serve. */
  #everyHead() {
    return namesIn(this.#folder).flatMap((key) => {
      const folder = join(this.#folder, key);
      return namesIn(folder)
        .filter((name) => name.endsWith(".kv"))
        .map((file) => {
          const kept = statSync(join(folder, file), { throwIfNoEntry: false });
          return {
            folder,
            name: file.slice(0, -".kv".length),
            sizeBytes: kept?.size ?? 0,
            usedMs: kept?.mtimeMs ?? 0,
          };
        });
    });
  }
}

/** The heads of one model. */
export class Shelf {
  /** Where the engine writes and reads; the plan's `slotFolder`. */
  readonly folder: string;
  readonly #log: Log;
  readonly #makeRoom: (bytes: number) => boolean;
  readonly #heads = new Map<string, KeptHead>();
  /** Their bytes were read and are those that were written. */
  readonly #checked = new Set<string>();
  /** Heads that were tried: one that could not be kept is not evaluated by itself again and again. */
  readonly #tried = new Set<string>();
  #warned = false;
  #lastTemporary = 0;

  constructor(folder: string, log: Log, makeRoom: (bytes: number) => boolean) {
    this.folder = folder;
    this.#log = log;
    this.#makeRoom = makeRoom;
    try {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
    } catch (cause) {
      throw new HypuraError(
        "io",
        `${folder} cannot be made (${(cause as Error).message}): set HYPURA_HOME to a folder that can, or leave out --prefix-cache`,
        { cause },
      );
    }
    this.#tidy();
  }

  /** Takes in what is whole, and removes what is not: of a process that died, damaged, or not ours. */
  #tidy(): void {
    const names = namesIn(this.folder);
    for (const name of names.filter((one) => one.endsWith(".json"))) {
      const head = readHead(this.folder, name.slice(0, -".json".length));
      if (head !== null) {
        this.#heads.set(head.name, head);
      }
    }
    for (const name of names) {
      const isKept = this.#heads.has(name.replace(/\.(?:kv|json)$/, "")) && /\.(?:kv|json)$/.test(name);
      if (!isKept && !isBeingWritten(name)) {
        rmSync(join(this.folder, name), { force: true, recursive: true });
        this.#log("debug", `${name} in ${this.folder} is no whole prefix and was removed`);
      }
    }
  }

  /** The head that shares the most tokens with the beginning of `tokens`. */
  best(tokens: TokenIds): { readonly head: KeptHead; readonly sharedTokens: number } | null {
    let best: { head: KeptHead; sharedTokens: number } | null = null;
    for (const head of this.#heads.values()) {
      const sharedTokens = sharedCount(head.tokens, tokens);
      if (sharedTokens > (best?.sharedTokens ?? 0)) {
        best = { head, sharedTokens };
      }
    }
    return best;
  }

  /** Whether the head's file is there and as it was written; one that is not is removed. */
  async isSound(head: KeptHead): Promise<boolean> {
    if (!this.#checked.has(head.name)) {
      const checksum = await checksumOf(join(this.folder, `${head.name}.kv`), head.sizeBytes).catch(
        () => null,
      );
      if (checksum !== head.checksum) {
        this.#log("warn", "a kept prefix was damaged and is evaluated again");
        this.remove(head);
        return false;
      }
      this.#checked.add(head.name);
    }
    return true;
  }

  /** Whether it makes sense to evaluate these tokens alone and `keep` them. */
  wants(tokens: TokenIds): boolean {
    return !this.#tried.has(nameOf(tokens));
  }

  /** It was needed just now. */
  touch(head: KeptHead): void {
    try {
      const now = new Date();
      utimesSync(join(this.folder, `${head.name}.kv`), now, now);
    } catch {
      // Another server took it away; whoever restores it sees that.
    }
  }

  remove(head: KeptHead): void {
    this.forget(this.folder, head.name);
    removeHead(this.folder, head.name);
  }

  forget(folder: string, name: string): void {
    if (folder === this.folder) {
      this.#heads.delete(name);
      this.#checked.delete(name);
      this.#tried.delete(name);
    }
  }

  /**
   * Has `write` write the KV of `tokens` into a file of this folder, and keeps it. `write` gives the bytes written;
   * `expectedBytes` is what they should be. Never throws for the disk's sake: what cannot be kept is said once.
   */
  async keep(
    tokens: TokenIds,
    expectedBytes: number,
    write: (fileName: string) => Promise<number>,
  ): Promise<void> {
    this.#tried.add(nameOf(tokens));
    if (!this.#makeRoom(expectedBytes)) {
      this.#warn(
        `the beginning of this conversation (${countText(tokens.length)} tokens, ${bytesText(expectedBytes)}) is larger than --prefix-cache allows and is not kept: allow more`,
      );
      return;
    }
    const temporary = `${process.pid}-${++this.#lastTemporary}.tmp`;
    const path = join(this.folder, temporary);
    try {
      mkdirSync(this.folder, { recursive: true, mode: 0o700 }); // someone may have cleared the whole cache
      const writtenBytes = await write(temporary);
      const { size } = statSync(path);
      if (size !== writtenBytes) {
        throw new Error(`${bytesText(size)} of ${bytesText(writtenBytes)} were written`);
      }
      if (!this.#makeRoom(size)) {
        throw new Error(`its ${bytesText(size)} are more than --prefix-cache allows`);
      }
      await this.#install(tokens, path, size);
    } catch (error) {
      if (error instanceof HypuraError && error.code === "cancelled") {
        throw error;
      }
      this.#warn(
        `the beginning of a conversation could not be kept in ${this.folder} (${(error as Error).message}): is the disk full? Answers go on without`,
      );
    } finally {
      rmSync(path, { force: true });
    }
  }

  async #install(tokens: TokenIds, path: string, sizeBytes: number): Promise<void> {
    const checksum = await checksumOf(path, sizeBytes);
    await syncFile(path);
    const name = nameOf(tokens);
    const head: KeptHead = { name, tokens, sizeBytes, checksum };
    // What was under this name is void before its bytes change.
    rmSync(join(this.folder, `${name}.json`), { force: true });
    await rename(path, join(this.folder, `${name}.kv`));
    const notes = `${path}.json.tmp`;
    try {
      await Bun.write(notes, JSON.stringify({ version: headVersion, sizeBytes, checksum, tokens }));
      await syncFile(notes);
      await rename(notes, join(this.folder, `${name}.json`));
    } catch (error) {
      rmSync(notes, { force: true });
      rmSync(join(this.folder, `${name}.kv`), { force: true });
      throw error;
    }
    await syncFile(this.folder);
    this.#heads.set(name, head);
    this.#checked.add(name);
    this.#log(
      "debug",
      `kept ${countText(tokens.length)} tokens that a conversation begins with, ${bytesText(sizeBytes)}`,
    );
  }

  /** Once: a disk that is full now is full at the next turn. */
  #warn(text: string): void {
    this.#log(this.#warned ? "debug" : "warn", text);
    this.#warned = true;
  }
}

// ---- files --------------------------------------------------------------------------------------------------------

function namesIn(folder: string): readonly string[] {
  try {
    return readdirSync(folder);
  } catch {
    return []; // there is none
  }
}

function removeHead(folder: string, name: string): void {
  rmSync(join(folder, `${name}.json`), { force: true }); // first: without it the other is nothing
  rmSync(join(folder, `${name}.kv`), { force: true });
}

/** What the notes say, where they are whole and fit the file beside them. */
function readHead(folder: string, name: string): KeptHead | null {
  try {
    const notes = JSON.parse(readFileSync(join(folder, `${name}.json`), "utf8")) as {
      readonly version?: unknown;
      readonly tokens?: unknown;
      readonly sizeBytes?: unknown;
      readonly checksum?: unknown;
    };
    const { version, tokens, sizeBytes, checksum } = notes;
    const isWhole =
      version === headVersion &&
      Array.isArray(tokens) &&
      tokens.every(Number.isSafeInteger) &&
      Number.isSafeInteger(sizeBytes) &&
      Number.isSafeInteger(checksum) &&
      nameOf(tokens as TokenIds) === name &&
      statSync(join(folder, `${name}.kv`)).size === sizeBytes;
    return isWhole
      ? { name, tokens: tokens as TokenIds, sizeBytes: sizeBytes as number, checksum: checksum as number }
      : null;
  } catch {
    return null; // no JSON, or no file beside it
  }
}

/** By another server that lives, or by this one: "4711-3.tmp". */
function isBeingWritten(name: string): boolean {
  const pid = Number(/^(\d+)-\d+\.tmp/.exec(name)?.[1] ?? 0);
  if (pid === 0) {
    return false;
  }
  if (pid === process.pid) {
    return true;
  }
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as { readonly code?: string }).code === "EPERM";
  }
}

function nameOf(tokens: TokenIds): string {
  return new Bun.CryptoHasher("sha256").update(Int32Array.from(tokens)).digest("hex").slice(0, 24);
}

/** Pieces of this size leave the event loop room for others. */
const pieceBytes = 1_048_576;

/** Throws where the file is not `sizeBytes` long. */
async function checksumOf(path: string, sizeBytes: number): Promise<number> {
  const file = await open(path, "r");
  try {
    if ((await file.stat()).size !== sizeBytes) {
      throw new Error("it has another size");
    }
    const piece = new Uint8Array(pieceBytes);
    let checksum = 0;
    for (let at = 0; at < sizeBytes; ) {
      const { bytesRead } = await file.read(piece, 0, pieceBytes, at);
      if (bytesRead === 0) {
        throw new Error("it ended early");
      }
      checksum = crc32(piece.subarray(0, bytesRead), checksum);
      at += bytesRead;
    }
    return checksum;
  } finally {
    await file.close();
  }
}

async function syncFile(path: string): Promise<void> {
  const file = await open(path, "r");
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}

export function sharedCount(one: TokenIds, other: TokenIds): number {
  const most = Math.min(one.length, other.length);
  let count = 0;
  while (count < most && one[count] === other[count]) count++;
  return count;
}

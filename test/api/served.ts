// A server for tests: the real one, in this process or as the program, over models of a few hundred kilobytes under
// one thread. Owns starting it, asking it and reading its lines; a test owns what is asked.

import { afterAll } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Keeper, type KeeperOptions } from "../../src/keeper";
import { type LibraryModel, openLibrary } from "../../src/library";
import { noLimits, type PlanLimits } from "../../src/plan";
import { PrefixStore } from "../../src/prefix-store";
import type { Projector } from "../../src/projector";
import { type Server, serve } from "../../src/server";
import { endlessModel } from "../cli/program";
import { makeFixture } from "../fixtures";
import { writeGguf } from "../fixtures/gguf-writer";
import { tinyLlama } from "../fixtures/tiny";

/** A folder of this test file's own, removed after its tests. */
export function scratchFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "hypura-api-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Two models: `endless` never ends an answer by itself, `experts` has experts that can stream. */
export async function testModels(
  folder: string,
): Promise<{ readonly endless: string; readonly experts: string }> {
  const experts = join(folder, "experts.gguf");
  await makeFixture("tiny-qwen3moe", experts);
  return { endless: await endlessModel(folder), experts };
}

/** A model that makes vectors of texts and generates nothing. */
export function writeEmbedder(path: string): void {
  const spec = tinyLlama({ seed: 3, context: 512 });
  // LLAMA_POOLING_TYPE_MEAN: the vectors of all tokens, averaged.
  const pooling = { key: "llama.pooling_type", value: { type: "u32", value: 1 } } as const;
  writeGguf(path, { ...spec, metadata: [...spec.metadata, pooling] });
}

export interface TestServer {
  readonly url: string;
  readonly keeper: Keeper<LibraryModel>;
  readonly models: readonly LibraryModel[];
  /** What it logged, a line each. */
  readonly log: readonly string[];
  /** Ends it; idempotent. */
  stop(graceMs?: number): Promise<void>;
}

export interface TestServerOptions extends Partial<Omit<KeeperOptions, "log">> {
  readonly limits?: Partial<PlanLimits>;
  readonly name?: string;
  readonly origins?: readonly string[];
  readonly hostname?: string;
  readonly heartbeatMs?: number;
  readonly storePath?: string;
  /** What the store of prefixes may take, in `prefixFolder`; absent: there is none. */
  readonly prefixBytes?: number;
  readonly prefixFolder?: string;
  readonly projector?: Projector;
}

const started = new Set<() => Promise<void>>();

/** Ends every server of a test file; for its afterAll, which counts only at the file's top. */
export async function stopServers(): Promise<void> {
  await Promise.all([...started].map((stop) => stop()));
  started.clear();
}

export async function startServer(
  words: readonly string[],
  options: TestServerOptions = {},
): Promise<TestServer> {
  const log: string[] = [];
  const write = (level: string, text: string): void => void log.push(`${level}: ${text}`);
  const parallel = options.parallel ?? 1;
  const models = await openLibrary(words, {
    limits: {
      ...noLimits,
      contextTokens: 1024,
      threads: 1,
      slotCount: parallel,
      contextShift: true,
      ...options.limits,
    },
    name: options.name ?? null,
    storePath: options.storePath ?? "",
    onWarning: (sentence) => write("warn", sentence),
    projector: options.projector ?? null,
    prefixes:
      options.prefixBytes === undefined
        ? null
        : new PrefixStore({
            budgetBytes: options.prefixBytes,
            log: write,
            folder: join(options.prefixFolder ?? "", "prefixes"),
          }),
  });
  const keeper = new Keeper<LibraryModel>({
    maxQueue: 16,
    keepAliveSeconds: 300,
    ...options,
    parallel,
    log: write,
  });
  const server: Server = serve({
    models,
    keeper,
    hostname: options.hostname ?? "127.0.0.1",
    port: 0,
    origins: options.origins ?? [],
    log: write,
    ...(options.heartbeatMs !== undefined && { heartbeatMs: options.heartbeatMs }),
  });
  let stopped: Promise<void> | undefined;
  const stop = (graceMs = 0): Promise<void> => {
    stopped ??= server.stop(graceMs);
    return stopped;
  };
  started.add(stop);
  return { url: `http://127.0.0.1:${server.port}`, keeper, models, log, stop };
}

export function post(url: string, body: unknown, init: RequestInit = {}): Promise<Response> {
  return fetch(url, {
    method: "POST",
    body: typeof body === "string" ? body : JSON.stringify(body),
    ...init,
  });
}

export interface Line {
  readonly model?: string;
  readonly done?: boolean;
  readonly done_reason?: string;
  readonly error?: string;
  readonly response?: string;
  readonly message?: { readonly role: string; readonly content: string };
  readonly eval_count?: number;
  readonly prompt_eval_count?: number;
  readonly load_duration?: number;
}

/** The lines of a stream as they come. */
export async function* linesOf(response: Response): AsyncGenerator<Line> {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let rest = "";
  for await (const bytes of response.body as ReadableStream<Uint8Array>) {
    const parts = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = parts.pop() ?? "";
    for (const part of parts) {
      yield JSON.parse(part) as Line;
    }
  }
  if (rest !== "") {
    throw new Error(`the stream ended within a line: ${rest}`);
  }
}

export async function allLines(response: Response): Promise<readonly Line[]> {
  const lines: Line[] = [];
  for await (const line of linesOf(response)) {
    lines.push(line);
  }
  return lines;
}

/** A chat that goes on for `tokenCount` tokens, always the same ones. */
export function chatBody(model: string, tokenCount: number, more: object = {}): object {
  return {
    model,
    messages: [{ role: "user", content: "Tell me a story." }],
    options: { num_predict: tokenCount, temperature: 0 },
    ...more,
  };
}

export function textOf(lines: readonly Line[]): string {
  return lines.map((line) => line.message?.content ?? line.response ?? "").join("");
}

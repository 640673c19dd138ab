// The HTTP side of hypura: routes, who is let in, bodies in and replies out, and the server's end. It owns the table
// of endpoints and the shape of every refusal; what a request means is the dialects' (ollama-*.ts, openai.ts), when
// it runs is the keeper's, and how its answer is sent is jobs.ts. It knows no command line.

import { hostname as machineName, networkInterfaces } from "node:os";
import { createGunzip, createInflate, createZstdDecompress } from "node:zlib";
import { Elysia } from "elysia";
import packageJson from "../package.json";
import { HypuraError } from "./errors";
import { isHostAllowed, originRule, preflightHeaders } from "./http-policy";
import {
  answerEmbed,
  answerV1,
  answerWork,
  type Job,
  Jobs,
  jsonResponse,
  newId,
  shuttingDown,
  type Workshop,
} from "./jobs";
import type { Keeper, Log } from "./keeper";
import type { LibraryModel } from "./library";
import { metricsText } from "./metrics";
import { matchesName, psEntry, showReply, tagsEntry, v1ModelEntry, v1ModelList } from "./ollama-model";
import { errorReply } from "./ollama-reply";
import {
  type Endpoint,
  modelAsked,
  modelMissing,
  parseChat,
  parseEmbed,
  parseEmbeddings,
  parseGenerate,
  parsePull,
  parseShow,
  pullReply,
} from "./ollama-request";
import { parseV1, type V1Endpoint, v1Error, v1ModelAsked, v1ModelMissing } from "./openai";
import { gpuTotalBytes, totalBytes } from "./plan";
import { PrefixSlots } from "./prefix-slots";
import { type Fields, readBody } from "./wire-body";
import { WireError, wireErrorOf } from "./wire-error";

/** The level of Ollama's API that is spoken here: clients refuse versions that they find too old. */
const apiVersion = "0.33.0";
/** A conversation with a dozen photographs in base64. */
const maxBodyBytes = 64 * 1024 * 1024;
/** Bun's own limit answers without a word; ours comes first. */
const bunBodyBytes = Number.MAX_SAFE_INTEGER;

export interface ServerOptions {
  readonly models: readonly LibraryModel[];
  readonly keeper: Keeper<LibraryModel>;
  readonly hostname: string;
  /** 0: any that is free. */
  readonly port: number;
  /** Patterns of origins beside the usual ones; "*" is all. */
  readonly origins: readonly string[];
  readonly log: Log;
  readonly heartbeatMs?: number;
}

export interface Server {
  readonly hostname: string;
  readonly port: number;
  /** Takes nothing more, lets what runs finish for `graceMs`, cancels the rest, and ends the engine. */
  stop(graceMs: number): Promise<void>;
}

type Method = "GET" | "HEAD" | "POST" | "DELETE";

/** What a handler gets to see of a request. */
interface Call {
  readonly request: Request;
  readonly params: Readonly<Record<string, string>>;
}

interface Route {
  readonly method: Method;
  readonly path: string;
  readonly handle: (call: Call) => Response | Promise<Response>;
  /** The body of a refusal, in the words of the path. */
  readonly refusal: (error: WireError) => object;
}

/** Starts to listen. Throws `io` where the address is taken or not this machine's. */
export function serve(options: ServerOptions): Server {
  const jobs = new Jobs(options.heartbeatMs ?? 10_000);
  const desk = new Desk(options, jobs);
  const routes = [...ollamaRoutes(desk), ...v1Routes(desk), ...otherRoutes(desk)];
  const guard = guardOf(options);
  const app = new Elysia({ serve: { maxRequestBodySize: bunBodyBytes } });
  for (const route of routes) {
    app.route(
      route.method,
      route.path,
      ({ request, params }) => guard(request, () => desk.run(route, { request, params })),
      {
        parse: "none",
      },
    );
  }
  const fallback = fallbackOf(routes);
  app.all("/*", ({ request }) => guard(request, () => fallback(request)), { parse: "none" });
  app.onError(({ error }) => {
    options.log(
      "error",
      `a request failed unexpectedly: ${error instanceof Error ? error.message : String(error)}`,
    );
    return jsonResponse({ error: "internal error" }, 500);
  });
  listen(app, options);
  return {
    hostname: options.hostname,
    port: app.server?.port ?? options.port,
    async stop(graceMs) {
      const closed = app.server?.stop();
      await jobs.stop(graceMs);
      await options.keeper.close();
      await app.server?.stop(true);
      await closed;
      jobs[Symbol.dispose]();
    },
  };
}

function listen(app: Elysia, { hostname, port }: ServerOptions): void {
  try {
    app.listen({ hostname, port, idleTimeout: 0, reusePort: false });
  } catch (cause) {
    const { code, message } = cause as { readonly code?: string; readonly message: string };
    const sentence =
      code === "EADDRINUSE"
        ? `port ${port} of ${hostname} is taken by another program: give another with --port, or end that program`
        : code === "EACCES"
          ? `port ${port} may not be used by this user: give one above 1023 with --port`
          : `the server cannot listen on ${hostname}, port ${port} (${message}): give an address of this machine with --host`;
    throw new HypuraError("io", sentence, { cause });
  }
}

// ---- who is let in ----------------------------------------------------------------------------------------------

type Guard = (request: Request, handle: () => Response | Promise<Response>) => Promise<Response>;

function guardOf(options: ServerOptions): Guard {
  const place = {
    hostname: options.hostname,
    machineName: machineName(),
    ownAddresses: Object.values(networkInterfaces()).flatMap(
      (one) => one?.map(({ address }) => address) ?? [],
    ),
  };
  const verdictOf = originRule(options.origins);
  return async (request, handle) => {
    const host = request.headers.get("host");
    if (!isHostAllowed(host, place)) {
      return new Response(null, { status: 403 });
    }
    const verdict = verdictOf(request.headers.get("origin"), host);
    if (verdict === "refused") {
      return new Response(null, { status: 403 });
    }
    const response =
      request.method === "OPTIONS"
        ? new Response(null, { status: 204, headers: verdict === null ? {} : preflightHeaders })
        : await handle();
    for (const [name, value] of Object.entries(verdict ?? {})) {
      response.headers.set(name, value);
    }
    return response;
  };
}

/** For what no route takes: 405 where another method would be right, else 404, both as text. */
function fallbackOf(routes: readonly Route[]): (request: Request) => Response {
  const known = routes.map(({ method, path }) => ({
    method,
    pattern: new RegExp(`^${path.replace(/\/:\w+/g, "/[^/]+").replace(/\*$/, ".*")}/?$`),
  }));
  return (request) => {
    const { pathname } = new URL(request.url);
    const methods = known.filter(({ pattern }) => pattern.test(pathname)).map(({ method }) => method);
    return methods.length === 0
      ? plain("404 page not found", 404)
      : plain("405 method not allowed", 405, { allow: [...new Set(methods)].join(", ") });
  };
}

function plain(text: string, status = 200, headers: Readonly<Record<string, string>> = {}): Response {
  return new Response(text, { status, headers: { "content-type": "text/plain; charset=utf-8", ...headers } });
}

// ---- what handlers share ----------------------------------------------------------------------------------------

class Desk {
  readonly models: readonly LibraryModel[];
  readonly keeper: Keeper<LibraryModel>;
  readonly shop: Workshop;
  readonly jobs: Jobs;
  readonly #log: Log;
  readonly #replies = new Map<string, { route: string; status: number; count: number }>();

  constructor({ models, keeper, log, heartbeatMs }: ServerOptions, jobs: Jobs) {
    this.models = models;
    this.keeper = keeper;
    this.jobs = jobs;
    this.#log = log;
    const counters = { promptTokens: 0, cachedTokens: 0, generatedTokens: 0 };
    this.shop = { keeper, log, heartbeatMs: heartbeatMs ?? 10_000, counters, slots: new PrefixSlots(log) };
  }

  get replies(): ReadonlyMap<
    string,
    { readonly route: string; readonly status: number; readonly count: number }
  > {
    return this.#replies;
  }

  async run(route: Route, call: Call): Promise<Response> {
    const started = performance.now();
    const response = await this.#answer(route, call);
    const { method, path } = route;
    const key = `${method} ${path} ${response.status}`;
    const entry = this.#replies.get(key) ?? { route: `${method} ${path}`, status: response.status, count: 0 };
    entry.count++;
    this.#replies.set(key, entry);
    this.#log("debug", `${key}, ${(performance.now() - started).toFixed(1)} ms`);
    return response;
  }

  async #answer(route: Route, call: Call): Promise<Response> {
    try {
      if (this.jobs.isStopping && route.method === "POST") {
        throw shuttingDown;
      }
      return await route.handle(call);
    } catch (thrown) {
      const error = wireErrorOf(thrown);
      if (error.status === 500) {
        this.#log("error", `${route.method} ${route.path}: ${causeOf(thrown)}`);
      }
      return jsonResponse(route.refusal(error), error.status);
    }
  }

  find(asked: string): LibraryModel | undefined {
    return this.models.find((model) => matchesName(asked, model.name));
  }

  /** The model of an Ollama request, or its refusal. */
  modelFor(endpoint: Endpoint, body: Fields): LibraryModel {
    const asked = modelAsked(endpoint, body);
    const model = this.find(asked);
    if (model === undefined) {
      throw modelMissing(endpoint, asked);
    }
    return model;
  }

  /** A job whose request could not even be read, or is refused, is over. */
  async job(request: Request, answer: (job: Job) => Promise<Response>): Promise<Response> {
    const job = this.jobs.begin(request);
    try {
      return await answer(job);
    } catch (error) {
      job.end();
      throw error;
    }
  }
}

function causeOf(error: unknown): string {
  if (!(error instanceof Error)) {
    return String(error);
  }
  const isOurs = error instanceof HypuraError;
  const cause =
    error.cause instanceof Error && error.cause.message !== error.message ? ` (${error.cause.message})` : "";
  return `${isOurs ? error.message : (error.stack ?? error.message)}${cause}`;
}

async function bodyOf(request: Request): Promise<Fields> {
  return readBody(new TextDecoder().decode(await readBytes(request)));
}

const tooLarge = new WireError(
  413,
  `the request body is larger than ${maxBodyBytes} bytes, which is all that this server takes`,
);

async function readBytes(request: Request): Promise<Uint8Array> {
  if (Number(request.headers.get("content-length") ?? 0) > maxBodyBytes) {
    throw tooLarge;
  }
  const { body } = request;
  if (body === null) {
    return new Uint8Array();
  }
  const pieces: Uint8Array[] = [];
  let count = 0;
  for await (const piece of unpacked(body, request.headers.get("content-encoding"))) {
    count += piece.length;
    if (count > maxBodyBytes) {
      throw tooLarge;
    }
    pieces.push(piece);
  }
  return Buffer.concat(pieces);
}

/** Codex sends zstd. */
async function* unpacked(
  body: ReadableStream<Uint8Array>,
  encoding: string | null,
): AsyncGenerator<Uint8Array> {
  const unpacker = unpackerOf(encoding?.trim().toLowerCase() ?? "");
  if (unpacker === null) {
    yield* body;
    return;
  }
  try {
    const { Readable } = await import("node:stream");
    yield* Readable.from(body).pipe(unpacker) as AsyncIterable<Uint8Array>;
  } catch (cause) {
    throw new WireError(400, `the request body is not ${encoding}: ${(cause as Error).message}`, { cause });
  }
}

function unpackerOf(encoding: string) {
  switch (encoding) {
    case "":
    case "identity":
      return null;
    case "gzip":
    case "x-gzip":
      return createGunzip();
    case "deflate":
      return createInflate();
    case "zstd":
      return createZstdDecompress();
    default:
      throw new WireError(
        415,
        `a body in ${JSON.stringify(encoding)} cannot be read: send it plain, gzip or zstd`,
      );
  }
}

// ---- Ollama -----------------------------------------------------------------------------------------------------

function ollamaRoutes(desk: Desk): readonly Route[] {
  const refusal = errorReply;
  const route = (method: Method, path: string, handle: Route["handle"]): Route => ({
    method,
    path,
    handle,
    refusal,
  });
  return [
    route("GET", "/", () => plain("Ollama is running")),
    route("GET", "/api/version", () => jsonResponse({ version: apiVersion, hypura: packageJson.version })),
    route("GET", "/api/tags", () =>
      jsonResponse({ models: desk.models.map(({ served }) => tagsEntry(served)) }),
    ),
    route("GET", "/api/ps", () => jsonResponse({ models: running(desk) })),
    route("GET", "/api/status", () => jsonResponse({ cloud: { disabled: true, source: "none" } })),
    route("POST", "/api/show", async ({ request }) => {
      const body = await bodyOf(request);
      const model = desk.modelFor("show", body);
      const userAgent = request.headers.get("user-agent") ?? "";
      const readArray = (key: string) => model.readArray(key);
      return jsonResponse(showReply(model.served, parseShow(body), { userAgent, readArray }));
    }),
    route("POST", "/api/generate", ({ request }) =>
      desk.job(request, async (job) => {
        const body = await bodyOf(request);
        const model = desk.modelFor("generate", body);
        return answerWork(desk.shop, job, model, parseGenerate(body, model.served));
      }),
    ),
    route("POST", "/api/chat", ({ request }) =>
      desk.job(request, async (job) => {
        const body = await bodyOf(request);
        const model = desk.modelFor("chat", body);
        return answerWork(desk.shop, job, model, parseChat(body, model.served));
      }),
    ),
    route("POST", "/api/embed", ({ request }) =>
      desk.job(request, async (job) => {
        const body = await bodyOf(request);
        const model = desk.modelFor("embed", body);
        return answerEmbed(desk.shop, job, model, parseEmbed(body, model.served));
      }),
    ),
    route("POST", "/api/embeddings", ({ request }) =>
      desk.job(request, async (job) => {
        const body = await bodyOf(request);
        const model = desk.modelFor("embeddings", body);
        return answerEmbed(desk.shop, job, model, parseEmbeddings(body, model.served));
      }),
    ),
    route("POST", "/api/pull", async ({ request }) => {
      const body = await bodyOf(request);
      desk.modelFor("pull", body);
      const work = parsePull(body);
      const lines = pullReply(work);
      return work.stream
        ? new Response(lines.map((line) => `${JSON.stringify(line)}\n`).join(""), {
            headers: { "content-type": "application/x-ndjson" },
          })
        : jsonResponse(lines.at(-1) ?? {});
    }),
    ...unsupported.map(({ method, path, operation }) =>
      route(method, path, () => {
        throw new WireError(501, `${operation} is not supported: this server serves a single local model`);
      }),
    ),
    ...accounts.map(({ method, path }) =>
      route(method, path, () => {
        throw new WireError(404, "not found: this server has no accounts and uses no cloud");
      }),
    ),
  ];
}

const unsupported: readonly { readonly method: Method; readonly path: string; readonly operation: string }[] =
  [
    { method: "POST", path: "/api/push", operation: "push" },
    { method: "POST", path: "/api/create", operation: "create" },
    { method: "POST", path: "/api/copy", operation: "copy" },
    { method: "DELETE", path: "/api/delete", operation: "delete" },
    { method: "POST", path: "/api/blobs/:digest", operation: "creating blobs" },
    { method: "HEAD", path: "/api/blobs/:digest", operation: "looking for blobs" },
  ];

const accounts: readonly { readonly method: Method; readonly path: string }[] = [
  { method: "POST", path: "/api/me" },
  { method: "POST", path: "/api/signout" },
  { method: "DELETE", path: "/api/user/keys/:key" },
  { method: "POST", path: "/api/experimental/*" },
  { method: "GET", path: "/api/experimental/*" },
];

/** The entries of /api/ps. */
function running(desk: Desk): readonly object[] {
  const residence = desk.keeper.residence();
  if (residence === null) {
    return [];
  }
  const { model, plan, info, expiresAtMs } = residence;
  // Dates end in the year 275,760; keep-alives may be longer.
  const expires = new Date(Math.min(expiresAtMs, 8.64e15));
  const expiresAt =
    expiresAtMs === Number.POSITIVE_INFINITY || expires.getUTCFullYear() > 9999
      ? null
      : expires.toISOString();
  return [
    psEntry(model.served, {
      residentBytes: totalBytes(plan.memory) + gpuTotalBytes(plan),
      gpuBytes: gpuTotalBytes(plan),
      expiresAt,
      contextTokens: info.contextTokens,
    }),
  ];
}

// ---- OpenAI and Anthropic ---------------------------------------------------------------------------------------

const v1Endpoints: readonly V1Endpoint[] = [
  "chat/completions",
  "completions",
  "embeddings",
  "responses",
  "messages",
  "messages/count_tokens",
];

function v1Routes(desk: Desk): readonly Route[] {
  const refusalOf = (endpoint: V1Endpoint | "models") => (error: WireError) =>
    v1Error(endpoint, error, `req_${newId()}`);
  return [
    ...v1Endpoints.map(
      (endpoint): Route => ({
        method: "POST",
        path: `/v1/${endpoint}`,
        handle: ({ request }) => desk.job(request, (job) => v1(desk, job, endpoint, request)),
        refusal: refusalOf(endpoint),
      }),
    ),
    {
      method: "GET",
      path: "/v1/models",
      handle: () => jsonResponse(v1ModelList(desk.models.map(({ served }) => served))),
      refusal: refusalOf("models"),
    },
    {
      method: "GET",
      path: "/v1/models/*",
      handle: ({ params }) => {
        const asked = decoded(params["*"] ?? "");
        const model = desk.find(asked);
        if (model === undefined) {
          throw v1ModelMissing(asked);
        }
        return jsonResponse(v1ModelEntry(model.served, asked));
      },
      refusal: refusalOf("models"),
    },
    ...["/v1/audio/transcriptions", "/v1/systemone"].map(
      (path): Route => ({
        method: "POST",
        path,
        handle: () => {
          throw new WireError(404, `${path} is not offered: this server generates text`);
        },
        refusal: refusalOf("models"),
      }),
    ),
  ];
}

async function v1(desk: Desk, job: Job, endpoint: V1Endpoint, request: Request): Promise<Response> {
  const body = await bodyOf(request);
  const asked = v1ModelAsked(endpoint, body);
  const model = desk.find(asked);
  if (model === undefined) {
    throw v1ModelMissing(asked);
  }
  return answerV1(desk.shop, job, model, parseV1(endpoint, body, model.served));
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // no encoding of anything: no model is called so
  }
}

// ---- for whoever runs it ----------------------------------------------------------------------------------------

function otherRoutes(desk: Desk): readonly Route[] {
  const route = (path: string, handle: Route["handle"]): Route => ({
    method: "GET",
    path,
    handle,
    refusal: errorReply,
  });
  return [
    route("/health", () => {
      const { inside, waiting } = desk.keeper.counts();
      const model = desk.keeper.residence()?.model.name ?? null;
      return jsonResponse({ status: "ok", model, requests: { inside, waiting } });
    }),
    route("/metrics", async () => {
      return new Response(await metrics(desk), {
        headers: { "content-type": "text/plain; version=0.0.4; charset=utf-8" },
      });
    }),
  ];
}

async function metrics(desk: Desk): Promise<string> {
  const residence = desk.keeper.residence();
  const [streaming, guesses] = await Promise.all([desk.keeper.streaming(), desk.keeper.guesses()]);
  return metricsText({
    version: packageJson.version,
    keeper: desk.keeper.counts(),
    tokens: desk.shop.counters,
    replies: desk.replies,
    loaded:
      residence === null
        ? null
        : {
            model: residence.model.name,
            mode: residence.plan.mode,
            ramBytes: totalBytes(residence.plan.memory),
            gpuBytes: gpuTotalBytes(residence.plan),
            nvmeBytes: residence.plan.tensors.reduce(
              (sum, { tier, sizeBytes }) => sum + (tier === "nvme" ? sizeBytes : 0),
              0,
            ),
            contextTokens: residence.info.contextTokens,
            streaming,
            guesses,
          },
  });
}

// What a server must survive: bodies, headers and paths of every wrong kind, and bodies without end. Afterwards nothing
// is busy and the next request is right. (Clients that leave are in leavers.test.ts.)

import { afterAll, beforeAll, expect, test } from "bun:test";
import { connect } from "node:net";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { until } from "../engine/process";
import { writeThinker } from "../engine/thinker";
import { openRandom, type Random } from "../fixtures/random";
import {
  allLines,
  chatBody,
  post,
  scratchFolder,
  startServer,
  stopServers,
  type TestServer,
  testModels,
  textOf,
} from "./served";

const folder = scratchFolder();
const soak = process.env["HYPURA_SOAK"] === "1";
let endless = "";
const able = `${folder}/able.gguf`;

beforeAll(async () => {
  ({ endless } = await testModels(folder));
  writeThinker(able);
});
afterAll(stopServers);

async function answer(server: TestServer): Promise<string> {
  return textOf(await allLines(await post(`${server.url}/api/chat`, chatBody("m", 20))));
}

function idle(server: TestServer): Promise<void> {
  return until(
    () => {
      const { inside, waiting } = server.keeper.counts();
      return inside === 0 && waiting === 0;
    },
    () => JSON.stringify(server.keeper.counts()),
  );
}

// ---- malformed requests ---------------------------------------------------------------------------------------------

type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

const paths: readonly string[] = [
  "/api/chat",
  "/api/generate",
  "/api/show",
  "/api/embed",
  "/api/embeddings",
  "/api/pull",
  "/v1/chat/completions",
  "/v1/completions",
  "/v1/embeddings",
  "/v1/responses",
  "/v1/messages",
  "/v1/messages/count_tokens",
];

/** A request that touches every field there is. */
const full: Json = {
  model: "m",
  prompt: "Hello",
  suffix: "there",
  system: "Be brief.",
  input: "Hello",
  messages: [
    { role: "system", content: "Be brief." },
    { role: "user", content: [{ type: "text", text: "Hello" }] },
    {
      role: "assistant",
      content: "",
      tool_calls: [{ id: "a", type: "function", function: { name: "f", arguments: { x: 1 } } }],
    },
    { role: "tool", content: "1", tool_call_id: "a", tool_name: "f" },
    { role: "user", content: "Hello", images: [] },
  ],
  tools: [
    {
      type: "function",
      name: "f",
      input_schema: { type: "object" },
      function: {
        name: "f",
        description: "d",
        parameters: {
          type: "object",
          properties: { x: { type: ["integer", "null"], enum: [1, 2] } },
          required: ["x"],
        },
      },
    },
  ],
  format: {
    type: "object",
    properties: {
      a: { type: "string", pattern: "^[a-z]+$" },
      b: { anyOf: [{ type: "null" }, { $ref: "#/$defs/c" }] },
    },
    $defs: { c: { type: "array", items: {}, minItems: 1, maxItems: 3 } },
  },
  response_format: {
    type: "json_schema",
    json_schema: {
      name: "n",
      schema: { type: "object", properties: { a: { type: "integer", minimum: 0 } } },
    },
  },
  options: {
    num_predict: 4,
    temperature: 0.5,
    top_k: 5,
    top_p: 0.9,
    min_p: 0.1,
    typical_p: 0.9,
    repeat_penalty: 1.1,
    repeat_last_n: 8,
    seed: 3,
    stop: ["x"],
    num_ctx: 64,
    num_keep: 2,
  },
  think: false,
  logprobs: true,
  top_logprobs: 2,
  keep_alive: "5m",
  context: [1, 2, 3],
  truncate: true,
  shift: true,
  raw: false,
  stream: true,
  max_tokens: 4,
  max_output_tokens: 4,
  stop: ["x"],
  stream_options: { include_usage: true },
  reasoning_effort: "low",
  thinking: { type: "disabled" },
  encoding_format: "float",
  dimensions: 4,
  verbose: true,
};

const odd: readonly Json[] = [
  null,
  true,
  0,
  -1,
  1e308,
  -1e308,
  2 ** 53,
  0.1,
  "",
  " ",
  "m",
  "x".repeat(3000),
  "\u0000\ud800🙂\u202e",
  "<|im_start|>system\n{{ 1/0 }}",
  "../../etc/passwd",
  [],
  [null],
  [[[[[[]]]]]],
  {},
  { type: "object" },
  { $ref: "#" },
  { __proto__: 1, constructor: "x" },
];

/** The value with a few things in it gone, doubled or replaced. */
function spoiled(value: Json, random: Random, chance: number): Json {
  if (random.unit() < chance) {
    return random.pick(odd);
  }
  if (Array.isArray(value)) {
    return value.flatMap((one: Json) =>
      random.unit() < chance ? [] : random.unit() < chance ? [one, one] : [spoiled(one, random, chance)],
    );
  }
  if (typeof value === "object" && value !== null) {
    const entries = Object.entries(value).filter(() => random.unit() >= chance);
    return Object.fromEntries(
      entries.map(([key, one]) => [
        random.unit() < chance / 4 ? key.toUpperCase() : key,
        spoiled(one, random, chance),
      ]),
    );
  }
  return value;
}

function spoiledText(text: string, random: Random): string | Uint8Array {
  const at = Math.floor(random.unit() * text.length);
  switch (Math.floor(random.unit() * 5)) {
    case 0:
      return text.slice(0, at);
    case 1:
      return (
        text.slice(0, at) + random.pick(["}", "]", '"', "\\", "\u0000", ",", "NaN", "\n\n"]) + text.slice(at)
      );
    case 2:
      return new Uint8Array(Array.from({ length: 200 }, () => Math.floor(random.unit() * 256)));
    case 3:
      return `${'{"a":'.repeat(5000)}1${"}".repeat(5000)}`;
    default:
      return "[".repeat(100_000);
  }
}

/** Which keys stay: most endpoints refuse a request that has them all. */
function someFields(random: Random): Json {
  const entries = Object.entries(full as Record<string, Json>);
  const share = random.unit();
  return Object.fromEntries(
    entries.filter(
      ([key]) =>
        ["model", "messages", "prompt", "input", "max_tokens", "options"].includes(key) ||
        random.unit() < share,
    ),
  );
}

function request(random: Random): { readonly path: string; readonly init: RequestInit } {
  const path =
    random.pick(paths) +
    (random.unit() < 0.05 ? random.pick(["/", "//", "/x", "?a=b", "/%00", "/..", "#x"]) : "");
  const body = spoiled(someFields(random), random, random.pick([0, 0.01, 0.03, 0.1, 0.3]));
  const text = JSON.stringify(body);
  const sent = random.unit() < 0.15 ? spoiledText(text, random) : text;
  const headers: Record<string, string> = {};
  if (random.unit() < 0.2) {
    headers["content-type"] = random.pick([
      "application/json",
      "text/plain",
      "multipart/form-data; boundary=x",
      "x",
      "application/x-www-form-urlencoded",
    ]);
  }
  if (random.unit() < 0.05) {
    headers["content-encoding"] = random.pick(["gzip", "zstd", "deflate", "br", "identity", "x"]);
  }
  if (random.unit() < 0.05) {
    headers["user-agent"] = random.pick(["", "x".repeat(4000), "GitHubCopilotChat/1"]);
  }
  return {
    path,
    init: {
      method: random.unit() < 0.03 ? random.pick(["PUT", "DELETE", "PATCH"]) : "POST",
      headers,
      body: sent,
    },
  };
}

/** What a client's own mistakes may be met with; 501 and 503 are documented. */
const documented = new Set([200, 204, 400, 403, 404, 405, 413, 415, 501, 503]);
const malformedCount = soak ? 10_000 : 1000;

test(
  `${malformedCount} malformed requests: no status that is not documented, no crash, and the next one is right`,
  async () => {
    const server = await startServer([able], { name: "m", parallel: 2, limits: { contextTokens: 256 } });
    const right = await answer(server);
    const random = openRandom(11);
    const statuses = new Map<number, number>();
    for (let i = 0; i < malformedCount; i++) {
      const { path, init } = request(random);
      const response = await fetch(server.url + path, { ...init, signal: AbortSignal.timeout(30_000) });
      const text = await response.text();
      statuses.set(response.status, (statuses.get(response.status) ?? 0) + 1);
      if (
        !documented.has(response.status) ||
        text.includes("unexpectedly stopped") ||
        text.includes("internal error")
      ) {
        throw new Error(
          `request ${i} to ${path} got ${response.status}: ${text.slice(0, 500)}\n${String(init.body).slice(0, 3000)}`,
        );
      }
    }
    expect(statuses.get(200) ?? 0).toBeGreaterThan(malformedCount / 50);
    expect(statuses.get(400) ?? 0).toBeGreaterThan(malformedCount / 10);
    await idle(server);
    expect(server.keeper.counts().crashes).toBe(0);
    expect(await answer(server)).toBe(right);
    console.log(`statuses: ${JSON.stringify(Object.fromEntries(statuses))}`);
  },
  soak ? 1_800_000 : 180_000,
);

/** Sends bytes and gives what comes back until the server closes or `waitMs` are over. */
function raw(server: TestServer, bytes: string, waitMs = 400): Promise<string> {
  return new Promise((resolve) => {
    let text = "";
    const socket = connect(Number(new URL(server.url).port), "127.0.0.1", () =>
      socket.write(bytes, "latin1"),
    );
    const done = (): void => {
      socket.destroy();
      resolve(text);
    };
    socket.on("data", (data) => {
      text += data.toString("latin1");
    });
    socket.on("close", done);
    socket.on("error", done);
    setTimeout(done, waitMs);
  });
}

test("requests that are no HTTP, or hardly any, harm nobody", async () => {
  const server = await startServer([endless], { name: "m" });
  const right = await answer(server);
  const nonsense = [
    "\r\n\r\n",
    "GET\r\n\r\n",
    "GET / HTTP/9.9\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: \u0000\r\n\r\n",
    `GET /${"x".repeat(100_000)} HTTP/1.1\r\nHost: localhost\r\n\r\n`,
    `GET / HTTP/1.1\r\n${"A: b\r\n".repeat(5000)}\r\n`,
    "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999999999999\r\n\r\n{}",
    "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n{}",
    "POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
  ];
  for (const bytes of nonsense) {
    const text = await raw(server, bytes);
    expect([bytes.slice(0, 40), text]).toEqual([
      bytes.slice(0, 40),
      expect.stringMatching(/^$|^HTTP\/1\.[01] (?:[24]\d\d|505)/),
    ]);
  }
  await idle(server);
  expect(await answer(server)).toBe(right);
});

test("a body that is too large is an error in JSON, announced or not", async () => {
  const server = await startServer([endless], { name: "m" });
  const port = new URL(server.url).port;
  const announced = await raw(
    server,
    `POST /api/chat HTTP/1.1\r\nHost: localhost:${port}\r\nContent-Length: 99999999\r\n\r\n{`,
  );
  expect(announced).toStartWith("HTTP/1.1 413");
  expect(announced).toContain('{"error":"the request body is larger than');
  const piece = new Uint8Array(1_000_000).fill(32);
  let left = 80;
  const body = new ReadableStream({
    pull: (controller) => (left-- > 0 ? controller.enqueue(piece) : controller.close()),
  });
  const response = await fetch(`${server.url}/v1/messages`, { method: "POST", body });
  expect(response.status).toBe(413);
  expect(await response.json()).toMatchObject({
    type: "error",
    error: { message: expect.stringContaining("larger than") },
  });
  const bomb = gzipSync(new Uint8Array(200_000_000));
  const blown = await fetch(`${server.url}/api/chat`, {
    method: "POST",
    body: bomb,
    headers: { "content-encoding": "gzip" },
  });
  expect(blown.status).toBe(413);
});

test("packed bodies are read, and what is not packed as it says is refused", async () => {
  const server = await startServer([endless], { name: "m" });
  const text = JSON.stringify(chatBody("m", 2, { stream: false }));
  for (const [encoding, bytes] of [
    ["zstd", zstdCompressSync(text)],
    ["gzip", gzipSync(text)],
    ["identity", Buffer.from(text)],
  ] as const) {
    const response = await fetch(`${server.url}/api/chat`, {
      method: "POST",
      body: bytes,
      headers: { "content-encoding": encoding },
    });
    expect([encoding, response.status]).toEqual([encoding, 200]);
  }
  const wrong = await fetch(`${server.url}/api/chat`, {
    method: "POST",
    body: text,
    headers: { "content-encoding": "gzip" },
  });
  expect(wrong.status).toBe(400);
  const unknown = await fetch(`${server.url}/api/chat`, {
    method: "POST",
    body: text,
    headers: { "content-encoding": "br" },
  });
  expect(unknown.status).toBe(415);
});

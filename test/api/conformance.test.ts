// Asks every row of the table (conformance.rows.ts) over a real socket and prints how many there were. The scripted
// rows have a real engine behind them too, which prepares their prompts; what it would generate is replaced. Whatever a
// row says, its reply must keep the schema of its route.

import { afterAll, beforeAll, expect, test } from "bun:test";
import { join } from "node:path";
import { openChildEngine } from "../../src/child";
import { type EngineChunk, RequestError } from "../../src/engine";
import { writeThinker } from "../engine/thinker";
import type { Kind, Row, Seen, Shape } from "./conformance.row";
import { rows } from "./conformance.rows";
import { routesToSee, verdictOf } from "./conformance.schemas";
import {
  scratchFolder,
  startServer,
  stopServers,
  type TestServer,
  testModels,
  writeEmbedder,
} from "./served";

const folder = scratchFolder();
const servers = new Map<Kind, TestServer>();
let script: readonly object[] = [];
const seenRoutes = new Set<string>();
let validated = 0;

afterAll(stopServers);

beforeAll(async () => {
  const { endless } = await testModels(folder);
  const able = join(folder, "able.gguf");
  writeThinker(able);
  const embedder = join(folder, "embedder.gguf");
  writeEmbedder(embedder);
  servers.set("embedder", await startServer([embedder], { name: "m", limits: { contextTokens: null } }));
  servers.set("plain", await startServer([endless], { name: "m" }));
  servers.set("able", await startServer([able], { name: "m" }));
  servers.set(
    "scripted",
    await startServer([able], {
      name: "m",
      async open(plan, options) {
        const engine = await openChildEngine(plan, options);
        return {
          ...engine,
          request: (route, body, signal) =>
            /^POST \/(v1\/chat\/completions|completion)$/.test(route)
              ? scripted()
              : engine.request(route, body, signal),
        };
      },
    }),
  );
});

async function* scripted(): AsyncGenerator<EngineChunk> {
  for (const data of script) {
    const { fail } = data as { readonly fail?: string };
    if (fail !== undefined) {
      throw new RequestError(500, "server_error", fail, { code: 500 });
    }
    yield { data };
  }
}

async function send(
  url: string,
  [method, path, body]: Row["ask"],
  headers: Row["headers"] = {},
): Promise<Seen> {
  const sentMs = Date.now();
  const response = await fetch(url + path, {
    method,
    headers,
    ...(body !== undefined && { body: typeof body === "string" ? body : JSON.stringify(body) }),
  });
  const text = await response.text();
  const isStream = response.headers.get("content-type") === "application/x-ndjson";
  return {
    status: response.status,
    headers: response.headers,
    text,
    json: parsed(text),
    lines: isStream ? text.trimEnd().split("\n").map(parsed) : [],
    events: eventsOf(text),
    sentMs,
    doneMs: Date.now(),
  };
}

function eventsOf(text: string): readonly Shape[] {
  return [...text.matchAll(/^data: (.*)$/gm)].map(([, data = ""]) =>
    data === "[DONE]" ? data : parsed(data),
  );
}

function parsed(text: string): Shape {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

test.each(rows.map((row) => [row.line, row] as const))("%s", async (_, row) => {
  const server = servers.get(row.on ?? "plain");
  if (server === undefined) {
    throw new Error("no server");
  }
  script = row.script ?? [];
  if (row.first !== undefined) {
    await send(server.url, row.first);
  }
  const seen = await send(server.url, row.ask, row.headers);
  const facts = `${seen.status} ${seen.headers.get("content-type")}\n${seen.text}`;
  expect([seen.status, facts]).toEqual([row.status ?? 200, facts]);
  const [method, path] = row.ask;
  const { route, problems } = verdictOf(method, path, seen);
  expect([problems, facts]).toEqual([[], facts]);
  validated++;
  if (route !== null) {
    seenRoutes.add(route);
  }
  if (row.type !== undefined) {
    expect(seen.headers.get("content-type")).toBe(row.type);
  }
  if (row.text !== undefined) {
    expect(seen.text).toBe(row.text);
  }
  if (row.json !== undefined) {
    expect(seen.json).toMatchObject(row.json);
  }
  if (row.last !== undefined) {
    expect(seen.lines.at(-1)).toMatchObject(row.last);
  }
  if (row.holds !== undefined) {
    expect([row.holds(seen), facts]).toEqual([true, facts]);
  }
});

test("every route was seen and kept its schema, streamed where it streams", () => {
  expect(routesToSee.filter((route) => !seenRoutes.has(route))).toEqual([]);
  console.log(`${validated} replies against the schemas of ${routesToSee.length} routes`);
});

test("a reply that breaks its schema is seen", () => {
  const reply = (json: object): Seen => ({
    status: 200,
    headers: new Headers({ "content-type": "application/json" }),
    text: "",
    json,
    lines: [],
    events: [],
    sentMs: 0,
    doneMs: 0,
  });
  const problems = (path: string, json: object) => verdictOf("GET", path, reply(json)).problems;
  expect(problems("/api/version", { version: "0.33.0" })).toEqual([]);
  expect(problems("/api/version", { version: 33 }).length).toBe(1);
  expect(problems("/api/tags", { models: null }).length).toBe(1);
  expect(problems("/v1/models", { object: "list", data: [{ id: "m" }] }).length).toBe(3);
  expect(verdictOf("POST", "/api/chat", { ...reply({ error: 5 }), status: 400 }).problems.length).toBe(1);
});

test("every row has a line of its own", () => {
  expect(new Set(rows.map(({ line }) => line)).size).toBe(rows.length);
  console.log(`${rows.length} rows of conformance`);
});

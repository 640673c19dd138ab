// A model that embeds, served: vectors over every endpoint that gives some, their length and their likeness, inputs
// that are too long, and what it refuses.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { post, scratchFolder, startServer, stopServers, type TestServer, writeEmbedder } from "./served";

const folder = scratchFolder();
let server: TestServer;

afterAll(stopServers);
beforeAll(async () => {
  const path = join(folder, "embedder.gguf");
  writeEmbedder(path);
  server = await startServer([path], { limits: { contextTokens: null } });
});

interface Embedded {
  readonly embeddings: readonly (readonly number[])[];
  readonly prompt_eval_count: number;
}

async function embed(body: object): Promise<Embedded> {
  const response = await post(`${server.url}/api/embed`, { model: "embedder", ...body });
  expect(response.status).toBe(200);
  return (await response.json()) as Embedded;
}

function lengthOf(vector: readonly number[] = []): number {
  return Math.hypot(...vector);
}

describe("/api/embed", () => {
  test("one input and several, of length 1, the same each time", async () => {
    const one = await embed({ input: "The sky is blue." });
    expect(one.embeddings.length).toBe(1);
    expect(lengthOf(one.embeddings[0])).toBeCloseTo(1, 4);
    expect(one.prompt_eval_count).toBeGreaterThan(3);
    const two = await embed({ input: ["The sky is blue.", "Bread is baked."] });
    expect(two.embeddings.length).toBe(2);
    const product = (two.embeddings[0] ?? []).reduce(
      (sum, x, i) => sum + x * (one.embeddings[0]?.[i] ?? 0),
      0,
    );
    expect(product).toBeCloseTo(1, 3);
    expect(two.embeddings[1]).not.toEqual(two.embeddings[0] as number[]);
  });

  test("dimensions are cut and of length 1 again; nothing gives nothing", async () => {
    const { embeddings } = await embed({ input: "Hello", dimensions: 8 });
    expect(embeddings[0]?.length).toBe(8);
    expect(lengthOf(embeddings[0])).toBeCloseTo(1, 4);
    expect((await embed({ input: "" })).embeddings).toEqual([]);
    expect((await embed({})).embeddings).toEqual([]);
  });

  test("what is too long is cut, or refused where it may not be", async () => {
    const input = "word ".repeat(2000);
    expect((await embed({ input })).prompt_eval_count).toBeLessThanOrEqual(512);
    const refused = await post(`${server.url}/api/embed`, { model: "embedder", input, truncate: false });
    expect(refused.status).toBe(400);
    expect(await refused.json()).toEqual({ error: "the input length exceeds the context length" });
  });

  test("what is no input is refused", async () => {
    const refused = await post(`${server.url}/api/embed`, { model: "embedder", input: [1] });
    expect(refused.status).toBe(400);
    expect(await refused.json()).toEqual({ error: "invalid input type" });
  });
});

test("/api/embeddings gives one vector as the model gives it", async () => {
  const response = await post(`${server.url}/api/embeddings`, { model: "embedder", prompt: "Hello" });
  const { embedding } = (await response.json()) as { readonly embedding: readonly number[] };
  expect(embedding.length).toBeGreaterThan(8);
  expect(Math.abs(lengthOf(embedding) - 1)).toBeGreaterThan(0.01);
});

test("/v1/embeddings gives the same as floats and in base64", async () => {
  const ask = async (format: string): Promise<unknown> => {
    const response = await post(`${server.url}/v1/embeddings`, {
      model: "embedder",
      input: "Hello",
      encoding_format: format,
    });
    expect(response.status).toBe(200);
    const { data, object } = (await response.json()) as {
      readonly object: string;
      readonly data: readonly { readonly embedding: unknown }[];
    };
    expect(object).toBe("list");
    return data[0]?.embedding;
  };
  const floats = (await ask("float")) as readonly number[];
  const bytes = Buffer.from((await ask("base64")) as string, "base64");
  const same = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  expect(same.length).toBe(floats.length);
  floats.forEach((value, i) => {
    expect(same[i]).toBeCloseTo(value, 5);
  });
});

test("it says that it embeds and does no more", async () => {
  const shown = (await (await post(`${server.url}/api/show`, { model: "embedder" })).json()) as {
    readonly capabilities: unknown;
  };
  expect(shown.capabilities).toEqual(["embedding"]);
  const chat = await post(`${server.url}/api/chat`, {
    model: "embedder",
    messages: [{ role: "user", content: "x" }],
  });
  expect(chat.status).toBe(400);
  expect(await chat.json()).toEqual({ error: '"embedder" does not support chat' });
  const generate = await post(`${server.url}/api/generate`, { model: "embedder", prompt: "x" });
  expect(await generate.json()).toEqual({ error: '"embedder" does not support generate' });
});

// Images: a model with its projector over every dialect that sends some, and what is refused. The projector is tiny and
// random, so the tests ask whether an answer depends on the picture, and on nothing else.

import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { crc32, deflateSync } from "node:zlib";
import { openChildEngine } from "../../src/child";
import { openProjector } from "../../src/projector";
import { problemsOf, showReply } from "../api-schemas";
import { hypura } from "../cli/program";
import { makeFixture } from "../fixtures";
import { writeGguf } from "../fixtures/gguf-writer";
import { tinyProjector } from "../fixtures/projector";
import { allLines, post, scratchFolder, startServer, stopServers, type TestServer, textOf } from "./served";

const folder = scratchFolder();
const path = (name: string): string => join(folder, `${name}.gguf`);
let server: TestServer;

afterAll(stopServers);
beforeAll(async () => {
  await makeFixture("tiny-qwen3moe", path("experts"), { context: 4096 });
  writeGguf(path("mmproj"), tinyProjector({ textEmbd: 64 }));
  server = await startServer([path("experts")], {
    name: "m",
    limits: { contextTokens: 4096 },
    projector: openProjector(path("mmproj")),
  });
});

/** A square of one colour. */
function png(red: number, green: number, blue: number, size = 24): string {
  const chunk = (type: string, data: Uint8Array): Uint8Array => {
    const body = Buffer.concat([Buffer.from(type), data]);
    const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(data.length);
    sum.writeUInt32BE(crc32(body));
    return Buffer.concat([length, body, sum]);
  };
  const header = Buffer.alloc(13);
  header.writeUInt32BE(size, 0);
  header.writeUInt32BE(size, 4);
  header.set([8, 2, 0, 0, 0], 8); // 8 bits, RGB
  const row = [0, ...Array.from({ length: size }, () => [red, green, blue]).flat()];
  const pixels = deflateSync(Uint8Array.from(Array.from({ length: size }, () => row).flat()));
  const signature = Uint8Array.from([137, 80, 78, 71, 13, 10, 26, 10]);
  return Buffer.concat([
    signature,
    chunk("IHDR", header),
    chunk("IDAT", pixels),
    chunk("IEND", new Uint8Array()),
  ]).toString("base64");
}

const red = png(250, 10, 10);
const blue = png(10, 10, 250);
const options = { temperature: 0, num_predict: 16 };

async function chat(images: readonly string[], from = server): Promise<string> {
  const messages = [{ role: "user", content: "What is this?", images }];
  const response = await post(`${from.url}/api/chat`, { model: "m", messages, options });
  expect(response.status).toBe(200);
  const lines = await allLines(response);
  expect(lines.at(-1)).toMatchObject({ done: true, eval_count: 16 });
  return textOf(lines);
}

async function json(path: string, body: object): Promise<Record<string, never>> {
  const response = await post(server.url + path, { model: "m", ...body });
  expect([response.status, path]).toEqual([200, path]);
  return (await response.json()) as Record<string, never>;
}

describe("with a projector", () => {
  test("the model says that it sees", async () => {
    const show = await json("/api/show", {});
    expect(problemsOf(showReply, show)).toEqual([]);
    expect(show).toMatchObject({
      capabilities: expect.arrayContaining(["vision"]),
      projector_info: { "clip.projector_type": "mlp" },
    });
  });

  test("an answer depends on the picture, the same each time", async () => {
    const [none, one, other] = [await chat([]), await chat([red]), await chat([blue])];
    expect(new Set([none, one, other]).size).toBe(3);
    expect(await chat([red])).toBe(one);
    expect(await chat([red, blue])).not.toBe(one);
  });

  test("in /api/generate, /v1/chat/completions and /v1/messages too", async () => {
    const generate = async (image: string) =>
      textOf(
        await allLines(
          await post(`${server.url}/api/generate`, {
            model: "m",
            prompt: "What is this?",
            images: [image],
            options,
          }),
        ),
      );
    expect(await generate(red)).toBe(await chat([red]));
    const openAi = async (image: string) => {
      const content = [
        { type: "image_url", image_url: { url: `data:image/png;base64,${image}` } },
        { type: "text", text: "What is this?" },
      ];
      const body = { messages: [{ role: "user", content }], max_tokens: 16, temperature: 0 };
      return JSON.stringify((await json("/v1/chat/completions", body))["choices"]);
    };
    expect(await openAi(red)).not.toBe(await openAi(blue));
    const anthropic = async (data: string) => {
      const content = [
        { type: "image", source: { type: "base64", media_type: "image/png", data } },
        { type: "text", text: "What is this?" },
      ];
      const body = { messages: [{ role: "user", content }], max_tokens: 16, temperature: 0 };
      return JSON.stringify((await json("/v1/messages", body))["content"]);
    };
    expect(await anthropic(red)).not.toBe(await anthropic(blue));
  });

  test("with streamed weights the same words", async () => {
    const start = (more: object) =>
      startServer([path("experts")], {
        name: "m",
        limits: { contextTokens: 4096, ...more },
        projector: openProjector(path("mmproj")),
        open: (plan, how) => openChildEngine({ ...plan, repack: false }, how),
      });
    const resident = await start({ mode: "resident" });
    const streamed = await start({ mode: "stream" });
    expect(await chat([red], streamed)).toBe(await chat([red], resident));
    expect(streamed.keeper.residence()?.plan.memory.projectorBytes).toBeGreaterThan(0);
    await resident.stop();
    await streamed.stop();
  });

  test("what is no picture is the request's fault, and harms nobody", async () => {
    const before = await chat([red]);
    for (const image of [Buffer.from("not a picture").toString("base64"), red.slice(0, 64)]) {
      const messages = [{ role: "user", content: "x", images: [image] }];
      const response = await post(`${server.url}/api/chat`, { model: "m", messages, stream: false });
      expect(response.status).toBe(400);
      expect(await response.json()).toEqual({ error: expect.any(String) });
    }
    expect(await chat([red])).toBe(before);
    expect(server.keeper.counts().crashes).toBe(0);
  });
});

describe("a projector", () => {
  test("of another model is said when it is loaded", async () => {
    writeGguf(path("wide"), tinyProjector({ textEmbd: 128 }));
    const wrong = await startServer([path("experts")], {
      name: "m",
      projector: openProjector(path("wide")),
    });
    const response = await post(`${wrong.url}/api/generate`, { model: "m", prompt: "x", stream: false });
    expect(response.status).toBe(500);
    expect(await response.text()).toContain("is it the mmproj file of this very model?");
    await wrong.stop();
  });

  test("is a file of its own kind, for one model", async () => {
    expect(() => openProjector(path("experts"))).toThrow("is no projector");
    writeFileSync(path("text"), "nothing");
    expect(() => openProjector(path("text"))).toThrow();
    const two = await hypura(["serve", path("experts"), path("experts"), "--mmproj", path("mmproj")]);
    expect([two.status, two.stderr.includes("--mmproj belongs to one model")]).toEqual([2, true]);
  });
});

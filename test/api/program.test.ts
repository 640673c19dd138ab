// `hypura serve` as a program: what it prints, its flags and Ollama's variables, and its end by a signal.

import { beforeAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { hypura } from "../cli/program";
import { until } from "../engine/process";
import { childrenOf, endProgram, startProgram } from "./program";
import { allLines, chatBody, type Line, linesOf, post, scratchFolder, testModels } from "./served";

const folder = scratchFolder();
let files: { readonly endless: string; readonly experts: string } = { endless: "", experts: "" };

beforeAll(async () => {
  files = await testModels(folder);
});

describe("starting", () => {
  test("says what is served, where and how", async () => {
    const server = await startProgram([files.endless, files.experts, "--keep-alive", "90s"]);
    expect(server.facts.endpoint).toMatch(/^http:\/\/127\.0\.0\.1:\d+$/);
    expect(server.facts.models).toMatchObject([
      { name: "endless:latest", mode: "full-resident", contextTokens: 32_768 },
      { name: "experts:latest", mode: "full-resident", contextTokens: 2048 },
    ]);
    expect(await (await fetch(server.facts.endpoint)).text()).toBe("Ollama is running");
    const stderr = await endProgram(server);
    expect(stderr).toContain("endless:latest: full-resident");
    expect(stderr).toContain("32,768 tokens of context");
    expect(stderr).toContain(server.facts.endpoint);
    expect(stderr).toContain("1 min 30 s");
  });

  test("the types of the context and speculation are the plan's", async () => {
    const words = [files.endless, "--context", "1024", "--verbose"];
    const plain = await startProgram(words);
    const small = await startProgram([
      ...words,
      "--kv-type",
      "Q8_0",
      "--speculation",
      "4",
      "--gpu-memory",
      "0",
    ]);
    const text = async ({ facts }: typeof plain) =>
      (await allLines(await post(`${facts.endpoint}/api/chat`, chatBody("endless", 20)))).length;
    expect(await text(small)).toBeGreaterThan(1);
    const bytes = ({ facts }: typeof plain) => facts.models[0]?.memoryBytes ?? 0;
    expect(bytes(small)).toBeLessThan(bytes(plain));
    await endProgram(plain);
    const stderr = await endProgram(small);
    expect(stderr).toContain("q8_0");
    expect(stderr).toContain("speculation");
  });

  test("Ollama's variables count, and flags win", async () => {
    const variables = {
      OLLAMA_HOST: "localhost:1",
      OLLAMA_CONTEXT_LENGTH: "512",
      OLLAMA_KEEP_ALIVE: "-1",
      OLLAMA_NUM_PARALLEL: "2",
      OLLAMA_MAX_QUEUE: "7",
      OLLAMA_ORIGINS: "https://chat.example.com",
    };
    const server = await startProgram([files.endless], variables);
    const { endpoint, models } = server.facts;
    expect(endpoint).toMatch(/^http:\/\/localhost:\d+$/);
    expect(models).toMatchObject([{ contextTokens: 512 }]);
    const origin = "https://chat.example.com";
    const tags = await fetch(`${endpoint}/api/tags`, { headers: { origin } });
    expect(tags.headers.get("access-control-allow-origin")).toBe(origin);
    const stderr = await endProgram(server);
    expect(stderr).toContain("stays loaded");
    expect(stderr).toContain("for each of 2 requests");
    const other = await startProgram(
      [files.endless, "--context", "1024", "--parallel", "1", "--host", "127.0.0.1"],
      variables,
    );
    expect(other.facts.endpoint).toStartWith("http://127.0.0.1:");
    expect(other.facts.models).toMatchObject([{ contextTokens: 1024 }]);
    expect(await endProgram(other)).not.toContain("for each of");
  });

  test("a model that streams waits until the machine was measured, once, and what it does is remembered", async () => {
    const home = join(folder, "fresh-home");
    const words = [files.experts, "--mode", "stream", "--memory", "175M", "--context", "1024"];
    const server = await startProgram(words, { HYPURA_HOME: home });
    expect(server.facts.models).toMatchObject([{ mode: "expert-streaming", predicted: { basis: "model" } }]);
    expect(server.facts.models[0]?.predicted.decodeTokensPerSecond).toBeGreaterThan(0);
    await allLines(await post(`${server.facts.endpoint}/api/chat`, chatBody("experts", 20)));
    const history = join(home, "history.json");
    await until(
      () => existsSync(history),
      () => "nothing was remembered",
    );
    expect(JSON.parse(readFileSync(history, "utf8"))).toMatchObject([{ streams: true, decodeTokens: 19 }]);
    const stderr = await endProgram(server);
    expect(stderr).toContain("measuring this machine for the plan, once");
    expect(stderr).toMatch(/tok\/s predicted, prompts at [\d.,]+ tok\/s/);
    const again = await startProgram(words, { HYPURA_HOME: home });
    expect(again.facts.models).toMatchObject([{ predicted: { basis: "measured" } }]);
    expect(await endProgram(again)).not.toContain("measuring");
  });

  test.each([
    [["--port", "70000"], "--port"],
    [["--parallel", "x"], "--parallel"],
    [["--keep-alive", "soon"], "--keep-alive"],
    [["--origins", "example.com"], "--origins"],
    [["--host", "a b"], "--host"],
    [["--host", "203.0.113.9"], "cannot listen"],
    [["--name", "no name"], "--name"],
    [["--max-queue", "-1"], "--max-queue"],
    [["--prot", "1"], "--port"],
    [["--prefix-cache", "much"], "--prefix-cache"],
    [["--kv-type", "q3"], "q3"],
    [["--speculation", "many"], "--speculation"],
    [["--gpu-memory", "x"], "--gpu-memory"],
  ])("%j is one sentence", async (words, about) => {
    const { status, stdout, stderr } = await hypura(["serve", files.endless, ...words]);
    expect([2, 6]).toContain(status);
    expect(stdout).toBe("");
    expect(
      stderr
        .trim()
        .split("\n")
        .filter((line) => line.startsWith("error: ")),
    ).toBeArrayOfSize(1);
    expect(stderr).toContain(about);
    expect(stderr).not.toMatch(/^\s+at /m);
  });

  test.each([
    ["OLLAMA_NUM_PARALLEL", "many"],
    ["OLLAMA_KEEP_ALIVE", "soon"],
    ["OLLAMA_ORIGINS", "example.com"],
    ["OLLAMA_MAX_QUEUE", "1.5"],
  ])("a wrong %s too", async (variable, value) => {
    const { status, stderr } = await hypura(["serve", files.endless], { env: { [variable]: value } });
    expect(status).toBe(2);
    expect(stderr).toContain(variable);
  });

  test("a port that is taken is one sentence", async () => {
    const server = await startProgram([files.endless]);
    const { port } = new URL(server.facts.endpoint);
    const { status, stderr } = await hypura(["serve", files.endless, "--port", port]);
    expect(status).toBe(6);
    expect(stderr).toContain(`port ${port} of 127.0.0.1 is taken`);
    await endProgram(server);
  });

  test("without a model, or with one that is none", async () => {
    expect((await hypura(["serve"])).status).toBe(2);
    const none = join(folder, "none.gguf");
    writeFileSync(none, "nothing");
    expect((await hypura(["serve", none])).status).toBe(4);
    expect((await hypura(["serve", join(folder, "absent.gguf")])).status).toBe(3);
  });
});

describe("ending", () => {
  test.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)(
    "%s while it answers: an error line, status 0, within five seconds, nothing left",
    async (signal) => {
      const temporary = join(folder, `temporary-${signal}`);
      mkdirSync(temporary);
      const server = await startProgram([files.endless], { TMPDIR: temporary });
      await allLines(await post(`${server.facts.endpoint}/api/chat`, chatBody("endless", 1)));
      const children = childrenOf(server.facts.pid);
      const answer = linesOf(await post(`${server.facts.endpoint}/api/chat`, chatBody("endless", 1_000_000)));
      await answer.next();
      const started = performance.now();
      server.child.kill(signal);
      let last: Line = {};
      for await (const line of answer) {
        last = line;
      }
      expect(last).toEqual({ error: "the server is shutting down" });
      expect(await server.child.exited).toBe(0);
      expect(performance.now() - started).toBeLessThan(5000);
      for (const child of children) {
        expect(() => process.kill(child, 0)).toThrow();
      }
      expect(readdirSync(temporary)).toEqual([]);
    },
  );

  test("idle: at once", async () => {
    const server = await startProgram([files.endless]);
    await allLines(await post(`${server.facts.endpoint}/api/chat`, chatBody("endless", 1)));
    const started = performance.now();
    await endProgram(server);
    expect(server.child.exitCode).toBe(0);
    expect(performance.now() - started).toBeLessThan(1500);
  });

  test("a second Ctrl-C does not wait", async () => {
    const server = await startProgram([files.endless]);
    const answer = linesOf(await post(`${server.facts.endpoint}/api/chat`, chatBody("endless", 1_000_000)));
    await answer.next();
    const started = performance.now();
    server.child.kill("SIGINT");
    await Bun.sleep(100);
    server.child.kill("SIGINT");
    expect(await server.child.exited).toBe(130);
    expect(performance.now() - started).toBeLessThan(1500);
    await answer.return(undefined).catch(() => {});
  });

  test("killed, its engine ends too", async () => {
    const server = await startProgram([files.endless]);
    await allLines(await post(`${server.facts.endpoint}/api/chat`, chatBody("endless", 1)));
    const children = childrenOf(server.facts.pid);
    await endProgram(server, "SIGKILL");
    await until(
      () =>
        children.every((child) => {
          try {
            process.kill(child, 0);
            return false;
          } catch {
            return true;
          }
        }),
      () => `the engine runs on: ${children}`,
      10,
    );
  });
});

describe("--trace", () => {
  test("a trace of each load, whole also when Ctrl-C ends an answer, and exact", async () => {
    const path = join(folder, "served.trace");
    const words = ["--mode", "stream", "--context", "512", "--keep-alive", "0", "--trace", path];
    const server = await startProgram([files.experts, ...words]);
    const chat = `${server.facts.endpoint}/api/chat`;
    await allLines(await post(chat, chatBody("experts", 12)));
    await until(
      () => existsSync(path),
      () => "an unloaded model left no trace",
      10,
    );
    const answer = linesOf(await post(chat, chatBody("experts", 400, { options: { num_predict: 400 } })));
    await answer.next();
    const stderr = endProgram(server, "SIGINT");
    await answer.return(undefined).catch(() => {});
    expect(await stderr).toContain(`${path}.2`);
    for (const trace of [path, `${path}.2`]) {
      const { status, stdout } = await hypura(["replay", trace, "--policy", "lru", "--json"]);
      expect([status, JSON.parse(stdout).isExact]).toEqual([0, true]);
    }
    expect(existsSync(`${path}.2.part`)).toBe(false);
  }, 120_000); // the machine may have to be measured first

  test("is refused where nothing streams", async () => {
    const { status, stderr } = await hypura(["serve", files.endless, "--trace", join(folder, "none.trace")]);
    expect([status, stderr.includes("the whole model is in memory")]).toEqual([2, true]);
  });
});

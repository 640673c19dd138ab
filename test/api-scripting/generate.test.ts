// generate() over an engine that says what a test wants: what becomes of thinking, of each kind of end, of errors.

import { describe, expect, test } from "bun:test";
import { type Engine, type EngineChunk, RequestError } from "../../src/engine";
import { HypuraError } from "../../src/errors";
import { answerOf, generate, type Piece, PromptTooLongError } from "../../src/generate";

const coreTimings = { cache_n: 2, prompt_n: 3, prompt_ms: 500, predicted_n: 4, predicted_ms: 250 };

function delta(part: object, finish: string | null = null): EngineChunk {
  return { data: { choices: [{ delta: part, finish_reason: finish }], timings: coreTimings } };
}

interface Sent {
  readonly route: string;
  readonly body: Readonly<Record<string, unknown>>;
}

function scripted(
  chunks: readonly EngineChunk[],
  failure?: unknown,
): { readonly engine: Engine; readonly sent: Sent[] } {
  const sent: Sent[] = [];
  const request = (route: string, body: object) => {
    sent.push({ route, body: JSON.parse(JSON.stringify(body)) });
    return (async function* () {
      yield* chunks;
      if (failure !== undefined) {
        throw failure;
      }
    })();
  };
  return { engine: { request } as unknown as Engine, sent };
}

const question = { messages: [{ role: "user", content: "Why?" }] } as const;

async function piecesOf(pieces: AsyncIterable<Piece>): Promise<readonly Piece[]> {
  const all: Piece[] = [];
  for await (const piece of pieces) {
    all.push(piece);
  }
  return all;
}

test("thinking and text are kept apart, and both are in the answer", async () => {
  const { engine } = scripted([
    delta({ role: "assistant", content: null }),
    delta({ reasoning_content: "Hm. " }),
    delta({ reasoning_content: "Air." }),
    delta({ content: "Because" }),
    delta({ content: " of air." }),
    delta({}, "stop"),
  ]);
  const pieces = await piecesOf(generate(engine, question));
  expect(pieces.map(({ type }) => type)).toEqual(["thinking", "thinking", "text", "text", "end"]);
  expect(pieces.at(-1)).toEqual({
    type: "end",
    answer: {
      text: "Because of air.",
      thinking: "Hm. Air.",
      finish: "stop",
      timings: {
        cachedTokens: 2,
        promptTokens: 3,
        promptSeconds: 0.5,
        generatedTokens: 4,
        generatedSeconds: 0.25,
        draftedTokens: 0,
        acceptedTokens: 0,
      },
    },
  });
});

describe("the end", () => {
  const cut = [delta({ content: "a" }), delta({}, "length")];

  test("is length where the limit was reached, and context where it was not", async () => {
    expect((await answerOf(generate(scripted(cut).engine, question, { maxTokens: 4 }))).finish).toBe(
      "length",
    );
    expect((await answerOf(generate(scripted(cut).engine, question, { maxTokens: 5 }))).finish).toBe(
      "context",
    );
    expect((await answerOf(generate(scripted(cut).engine, question))).finish).toBe("context");
  });

  test("is cancelled by the signal alone, with what came and its numbers", async () => {
    const cancelled = new HypuraError("cancelled", "the request was cancelled");
    const { engine } = scripted([delta({ content: "a" })], cancelled);
    const answer = await answerOf(generate(engine, question, { signal: AbortSignal.abort() }));
    expect(answer).toMatchObject({ text: "a", finish: "cancelled", timings: { generatedTokens: 4 } });
    await expect(answerOf(generate(engine, question))).rejects.toBe(cancelled);
  });
});

test("errors of the engine pass, and a prompt that is too long gets its numbers", async () => {
  const other = new RequestError(500, "server_error", "broken");
  await expect(answerOf(generate(scripted([], other).engine, question))).rejects.toBe(other);
  const details = { n_prompt_tokens: 1829, n_ctx: 512 };
  const long = new RequestError(
    400,
    "exceed_context_size_error",
    "request (1829 tokens) exceeds ...",
    details,
  );
  const error = await answerOf(generate(scripted([], long).engine, question)).catch(
    (thrown: unknown) => thrown,
  );
  expect(error).toBeInstanceOf(PromptTooLongError);
  expect(error).toMatchObject({ status: 400, promptTokens: 1829, contextTokens: 512 });
  expect(String(error)).toContain("the prompt has 1,829 tokens and the context holds 512");
});

test("options reach the engine by its names, and what is left out is left to it", async () => {
  const { engine, sent } = scripted([delta({}, "stop")]);
  await answerOf(
    generate(engine, question, {
      maxTokens: 9,
      temperature: 0,
      topK: 1,
      topP: 0.5,
      minP: 0.1,
      seed: 3,
      stop: ["x"],
    }),
  );
  await answerOf(generate(engine, question));
  const always = { messages: question.messages, stream: true, cache_prompt: true, timings_per_token: true };
  expect(sent).toEqual([
    {
      route: "POST /v1/chat/completions",
      body: {
        ...always,
        max_tokens: 9,
        temperature: 0,
        top_k: 1,
        top_p: 0.5,
        min_p: 0.1,
        seed: 3,
        stop: ["x"],
      },
    },
    { route: "POST /v1/chat/completions", body: always },
  ]);
});

// What tests and benchmarks of guesses share: one request with its tokens and how sure the model was of each, and the
// comparison of two answers. A pass over several tokens runs other kernels than a pass over one, whose sums are rounded
// in another order: where two tokens are all but equally likely the answer may turn. Every other difference is a fault.

import type { Engine } from "../../src/engine";

export interface Told {
  readonly tokens: readonly number[];
  readonly text: string;
  /** By token: how much likelier the first choice was than the second, in nats. Empty unless asked for. */
  readonly margins: readonly number[];
  readonly drafted: number;
  readonly accepted: number;
}

/** What the core says of a token with `n_probs`. */
export interface SaidToken {
  readonly id: number;
  readonly top_logprobs: readonly { readonly id: number; readonly logprob: number }[];
}

interface Reply {
  readonly content: string;
  readonly tokens: readonly number[];
  readonly timings: { readonly draft_n?: number; readonly draft_n_accepted?: number };
  readonly completion_probabilities?: readonly SaidToken[];
}

type Bias = readonly (readonly [number, number])[];

/** The core's probabilities know nothing of what a request adds to tokens: with a bias all tokens are asked for. */
const wholeVocabulary = 1 << 20;
function probabilityCount(bias: Bias): number {
  return bias.length === 0 ? 2 : wholeVocabulary;
}

function marginOf({ top_logprobs: tops }: SaidToken, bias: Bias): number {
  const added = new Map(bias);
  const sorted = tops.map(({ id, logprob }) => logprob + (added.get(id) ?? 0)).sort((a, b) => b - a);
  return (sorted[0] ?? 0) - (sorted[1] ?? -1e9);
}

export interface MarginsAsked {
  readonly prompt: readonly number[];
  readonly tokens: readonly number[];
  readonly said: readonly SaidToken[];
  readonly bias: Bias;
}

/**
 * How sure the model was of each token. The core says nothing of a token that ends amid a character, so what it says is
 * put beside the tokens by their ids, and it is asked again for those it left out: it has to take a whole character
 * there, and says what it would have taken.
 */
export async function marginsOf(engine: Engine, asked: MarginsAsked): Promise<readonly number[]> {
  const { prompt, tokens, said, bias } = asked;
  let next = 0;
  const plain = await plainToken(engine);
  const margins: number[] = [];
  for (const [i, token] of tokens.entries()) {
    const entry = said[next];
    if (entry?.id === token) {
      margins.push(marginOf(entry, bias));
      next++;
      continue;
    }
    const body = {
      prompt: [...prompt, ...tokens.slice(0, i)],
      n_predict: 1,
      temperature: 0,
      logit_bias: [[plain, 1000]],
      n_probs: probabilityCount(bias),
    };
    const { completion_probabilities: again = [] } = await only<Reply>(engine, "POST /completion", body);
    if (again[0] === undefined) throw new Error(`nothing is said of token ${i}`);
    margins.push(marginOf(again[0], bias));
  }
  if (next !== said.length) throw new Error(`${said.length - next} of what was said belongs to no token`);
  return margins;
}

/**
 * By how much a pass over many tokens moves what a pass over one says, in nats: the lead of the likelier of two tokens, at
 * so many places of an answer. This is rounding, with no guess in it: the same model, the same tokens.
 */
export async function roundingOf(
  engine: Engine,
  { prompt, tokens, said, bias }: MarginsAsked,
  placeCount: number,
): Promise<readonly number[]> {
  const step = Math.max(1, Math.floor(tokens.length / placeCount));
  const changes: number[] = [];
  let next = 0;
  for (const [i, token] of tokens.entries()) {
    const entry = said[next];
    if (entry?.id !== token) continue;
    next++;
    const [first, second] = entry.top_logprobs;
    if (i % step !== 0 || first === undefined || second === undefined) continue;
    // The token itself is drawn, so that the core does not end where it says nothing.
    const body = {
      prompt: [...prompt, ...tokens.slice(0, i)],
      n_predict: 1,
      temperature: 0,
      logit_bias: [...bias, [token, 1000]],
      n_probs: wholeVocabulary,
      cache_prompt: false,
    };
    const { completion_probabilities: wide = [] } = await only<Reply>(engine, "POST /completion", body);
    const lead = (id: number) => wide[0]?.top_logprobs.find((one) => one.id === id)?.logprob ?? Number.NaN;
    changes.push(Math.abs(first.logprob - second.logprob - (lead(first.id) - lead(second.id))));
  }
  return changes;
}

async function plainToken(engine: Engine): Promise<number> {
  const body = { content: "a", add_special: false };
  const { tokens } = await only<{ readonly tokens: readonly number[] }>(engine, "POST /tokenize", body);
  const last = tokens.at(-1);
  if (last === undefined) throw new Error("the model has no token for a letter");
  return last;
}

async function only<Answer>(engine: Engine, route: string, body: object): Promise<Answer> {
  for await (const { data } of engine.request(route, body)) return data as Answer;
  throw new Error(`${route} answered nothing`);
}

/** One request to its end; `margins` asks for the two likeliest of each token. */
export async function tell(
  engine: Engine,
  body: { readonly prompt: readonly number[]; readonly logit_bias?: Bias; readonly [field: string]: unknown },
  margins = false,
  signal?: AbortSignal,
): Promise<Told> {
  const full = { return_tokens: true, cache_prompt: false, stream: false, ...body };
  const bias = body.logit_bias ?? [];
  const asked = margins ? { ...full, n_probs: probabilityCount(bias) } : full;
  for await (const { data } of engine.request("POST /completion", asked, signal)) {
    const reply = data as Reply;
    const { tokens, completion_probabilities: said = [] } = reply;
    return {
      tokens: reply.tokens,
      text: reply.content,
      margins: margins ? await marginsOf(engine, { prompt: body.prompt, tokens, said, bias }) : [],
      drafted: reply.timings.draft_n ?? 0,
      accepted: reply.timings.draft_n_accepted ?? 0,
    };
  }
  throw new Error("the engine answered nothing");
}

/**
 * Two tokens that are closer than this, in nats, are a tie. Products of 8-bit activations round at about 1 part in 250,
 * and a tiny model of random weights has logits of a few units: differences of a few hundredths are seen.
 */
export const tieNats = 0.05;

export type Comparison =
  | { readonly kind: "equal" }
  /** The answers part at a tie, `margin` nats wide. */
  | { readonly kind: "tie"; readonly at: number; readonly margin: number }
  | { readonly kind: "different"; readonly at: number; readonly margin: number };

/** Compares a greedy answer with the one that was told without guesses and with its margins. */
export function compare(plain: Told, guessed: Told, tie = tieNats): Comparison {
  const at = plain.tokens.findIndex((token, i) => guessed.tokens[i] !== token);
  if (at < 0) {
    return plain.tokens.length === guessed.tokens.length
      ? { kind: "equal" }
      : { kind: "different", at: plain.tokens.length, margin: Number.NaN };
  }
  const margin = plain.margins[at] ?? Number.NaN;
  return { kind: margin <= tie ? "tie" : "different", at, margin };
}

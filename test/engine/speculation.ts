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

interface Reply {
  readonly content: string;
  readonly tokens: readonly number[];
  readonly timings: { readonly draft_n?: number; readonly draft_n_accepted?: number };
  readonly completion_probabilities?: readonly {
    readonly top_logprobs: readonly { readonly logprob: number }[];
  }[];
}

/** One request to its end; `margins` asks for the two likeliest of each token. */
export async function tell(
  engine: Engine,
  body: object,
  margins = false,
  signal?: AbortSignal,
): Promise<Told> {
  const full = { return_tokens: true, cache_prompt: false, stream: false, ...body };
  const asked = margins ? { ...full, n_probs: 2 } : full;
  for await (const { data } of engine.request("POST /completion", asked, signal)) {
    const reply = data as Reply;
    return {
      tokens: reply.tokens,
      text: reply.content,
      margins: (reply.completion_probabilities ?? []).map(
        ({ top_logprobs: [first, second] }) => (first?.logprob ?? 0) - (second?.logprob ?? -1e9),
      ),
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
export function compare(plain: Told, guessed: Told): Comparison {
  const at = plain.tokens.findIndex((token, i) => guessed.tokens[i] !== token);
  if (at < 0) {
    return plain.tokens.length === guessed.tokens.length
      ? { kind: "equal" }
      : { kind: "different", at: plain.tokens.length, margin: Number.NaN };
  }
  const margin = plain.margins[at] ?? Number.POSITIVE_INFINITY;
  return { kind: margin <= tieNats ? "tie" : "different", at, margin };
}

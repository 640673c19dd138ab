// A request of Ollama's dialect -> the engine's request, with a prompt that is rendered, counted and known to fit. It
// owns what happens to prompts that are too long, and the choice of the engine's route; it asks the engine by
// yielding calls, so that it stays without one. Pure.
//
// Two routes generate. Chat (POST /v1/chat/completions) takes messages: the engine renders the template, parses
// thoughts and tool calls, and constrains only what follows the thoughts. Plain (POST /completion) takes token ids and
// gives one chunk for each token: it serves what chat cannot say: prompts as they stand, prompts with a hole,
// `context` in front of the rendered messages, and log-probabilities without a gap while text is held back. What the
// model thinks is then told apart in ollama-reply.ts.

import { HypuraError } from "./errors";
import type { ServedModel } from "./ollama-model";
import { samplingOf } from "./ollama-options";
import {
  type EmbedWork,
  type EngineMessage,
  type GenerateWork,
  hasThinkTags,
  imageTokens,
  type Source,
  thinkFields,
} from "./ollama-request";
import { withImagesApart } from "./v1-pass";
import { WireError } from "./wire-error";

// ---- steps ----------------------------------------------------------------------------------------------------

/** A question to the engine; its answer is the `data` of the one chunk. */
export interface EngineCall {
  readonly route: string;
  readonly body: object;
}

/** Pure steps that need the engine in between. */
export type Steps<Result> = Generator<EngineCall, Result, unknown>;

/** Runs them: `ask` sends a call to the engine and gives the chunk's data, or throws what the engine threw. */
export async function drive<Result>(
  steps: Steps<Result>,
  ask: (call: EngineCall) => Promise<unknown>,
): Promise<Result> {
  let step = steps.next();
  while (!step.done) {
    const asked = await ask(step.value).then(
      (answer) => ({ answer }),
      (error: unknown) => ({ error }),
    );
    step = "error" in asked ? steps.throw(asked.error) : steps.next(asked.answer);
  }
  return step.value;
}

// ---- questions ------------------------------------------------------------------------------------------------

type Ids = readonly number[];

/** `special`: the tokenizer adds what stands at a beginning, a BOS mostly. `markup`: control tokens are recognised. */
export function* tokenize(
  content: string,
  how: { readonly special: boolean; readonly markup: boolean },
): Steps<Ids> {
  const answer = yield {
    route: "POST /tokenize",
    body: { content, add_special: how.special, parse_special: how.markup },
  };
  return (answer as { readonly tokens: Ids }).tokens;
}

function* detokenize(tokens: Ids): Steps<string> {
  if (tokens.length === 0) return "";
  const answer = yield { route: "POST /detokenize", body: { tokens } };
  return (answer as { readonly content: string }).content;
}

interface Rendered {
  readonly prompt: string;
  readonly ids: Ids;
  /** With the images. */
  readonly tokenCount: number;
}

function* render(work: GenerateWork, body: ChatBody): Steps<Rendered> {
  let answer: unknown;
  try {
    answer = yield { route: "POST /apply-template", body };
  } catch (error) {
    throw inTheRequest(error);
  }
  const { prompt } = answer as { readonly prompt: string };
  const before = work.source.kind === "messages" ? work.source.before : [];
  const ids = yield* tokenize(prompt, { special: before.length === 0, markup: true });
  return { prompt, ids, tokenCount: before.length + ids.length + imageTokens * work.imageCount };
}

/** What a template, a grammar or an image decoder refuses is the request's fault, whatever status the engine gave. */
function inTheRequest(error: unknown): unknown {
  const isRefusal =
    error instanceof HypuraError &&
    error.code === "request" &&
    "status" in error &&
    (error.status === 400 || error.status === 500);
  return isRefusal ? new WireError(400, error.message, { cause: error }) : error;
}

// ---- the engine's request -------------------------------------------------------------------------------------

export interface Prepared {
  readonly work: GenerateWork;
  readonly route: "POST /v1/chat/completions" | "POST /completion";
  /** Always `stream: true`: the reply gathers it where the client wants one object. */
  readonly body: object;
  readonly promptTokens: number;
  /** As rendered. */
  readonly promptText: string;
  /** What the engine evaluates; null where images are among it. */
  readonly promptIds: Ids | null;
  /** The conversation as it fits; empty where the prompt is no conversation. */
  readonly messages: readonly EngineMessage[];
  /** Thoughts have to be told apart from the text; `open`: the prompt has begun them. */
  readonly splitThoughts: "no" | "yes" | "open";
}

interface ChatBody {
  readonly messages: readonly EngineMessage[];
  readonly [field: string]: unknown;
}

function chatBody(work: GenerateWork, model: ServedModel, messages: readonly EngineMessage[]): ChatBody {
  const tools = work.source.kind === "messages" ? work.source.tools : [];
  return {
    messages: messages.map((message) =>
      typeof message.content === "string"
        ? message
        : { ...message, content: withImagesApart(message.content, { type: "text", text: "\n" }) },
    ),
    ...(tools.length > 0 && { tools }),
    ...thinkFields(work.think, model),
    ...(work.format !== null && {
      response_format: { type: "json_schema", json_schema: { schema: work.format } },
    }),
  };
}

/** Asked of the engine for every token: among so many, the chosen one is found again by its id. */
export const probabilityCount = 20;

function generationFields(work: GenerateWork, model: ServedModel, promptTokens: number): object {
  const { options, contextTokens } = work;
  // A limit of ten contexts, as Ollama has it, ends what would go round in circles for ever.
  const most = 10 * contextTokens;
  const wanted = options.predictTokens < 0 ? most : Math.min(options.predictTokens, most);
  const room = Math.max(1, contextTokens - promptTokens);
  return {
    ...samplingOf(options, contextTokens),
    n_predict: work.shift && model.canShift ? wanted : Math.min(wanted, room),
    ...(work.logprobs && { n_probs: probabilityCount }),
    cache_prompt: true,
    stream: true,
    ...work.engineFields,
  };
}

/** Some models are rendered and counted only; the sentence is the one that clients recognise as an overflow. */
function tooLong(promptTokens: number, work: GenerateWork): WireError {
  return new WireError(
    400,
    `request (${promptTokens} tokens) exceeds the available context size (${work.contextTokens} tokens), try increasing it`,
  );
}

/** At least one token must come after the prompt. */
function fits(promptTokens: number, work: GenerateWork): boolean {
  return promptTokens < work.contextTokens;
}

function bosOf(model: ServedModel): number | null {
  const id = model.metadata.get("tokenizer.ggml.bos_token_id");
  return typeof id === "number" ? id : null;
}

/** The tokenizer adds a BOS, and the text may have had one. */
function withOneBos(ids: Ids, model: ServedModel): Ids {
  const bos = bosOf(model);
  let extra = 0;
  while (bos !== null && ids[extra] === bos && ids[extra + 1] === bos) extra++;
  return ids.slice(extra);
}

/** What a prompt is cut to: the tokens to keep at its front, and the window's older half behind them free. */
function cutPlan(work: GenerateWork, hasBos: boolean): { readonly head: number; readonly tail: number } {
  const most = Math.max(0, work.contextTokens - 4);
  const head = Math.min(Math.max(0, work.options.keepTokens) + (hasBos ? 1 : 0), most);
  return { head, tail: Math.max(1, Math.floor((work.contextTokens - head) / 2)) };
}

/** May a prompt that is too long lose its middle? */
function mayCut(work: GenerateWork): boolean {
  return work.truncate && work.shift;
}

/** Renders, counts, drops or cuts. Throws WireError 400 when the prompt does not fit or cannot be rendered. */
export function* prepare(work: GenerateWork, model: ServedModel): Steps<Prepared> {
  const { source } = work;
  switch (source.kind) {
    case "text":
      return yield* prepareText(work, model, source.text);
    case "hole":
      return yield* prepareHole(work, model, source);
    case "messages":
      return isPlain(work, source, model)
        ? yield* preparePlain(work, model, source)
        : yield* prepareChat(work, model, source);
  }
}

function* prepareText(work: GenerateWork, model: ServedModel, text: string): Steps<Prepared> {
  const ids = withOneBos(yield* tokenize(text, { special: true, markup: true }), model);
  return plainRequest(work, model, { ids: cutIds(ids, work, model), text, splitThoughts: "no" });
}

/** `ids` as they are when they fit, cut when they may be. */
function cutIds(ids: Ids, work: GenerateWork, model: ServedModel): Ids {
  if (fits(ids.length, work)) return ids;
  if (!mayCut(work)) throw tooLong(ids.length, work);
  const { head, tail } = cutPlan(work, ids[0] !== undefined && ids[0] === bosOf(model));
  return [...ids.slice(0, head), ...ids.slice(-tail)];
}

function plainRequest(
  work: GenerateWork,
  model: ServedModel,
  prompt: {
    readonly ids: Ids;
    readonly text: string;
    readonly splitThoughts: Prepared["splitThoughts"];
    readonly messages?: readonly EngineMessage[];
  },
): Prepared {
  const promptTokens = prompt.ids.length;
  return {
    work,
    route: "POST /completion",
    body: {
      prompt: prompt.ids,
      ...(work.format !== null && { json_schema: work.format }),
      ...generationFields(work, model, promptTokens),
    },
    promptTokens,
    promptText: prompt.text,
    promptIds: prompt.ids,
    messages: prompt.messages ?? [],
    splitThoughts: prompt.splitThoughts,
  };
}

/** The engine's own POST /infill cuts both sides to what fits one batch without a word, so the tokens are laid here. */
function* prepareHole(
  work: GenerateWork,
  model: ServedModel,
  source: Extract<Source, { readonly kind: "hole" }>,
): Steps<Prepared> {
  const { fim } = model;
  if (fim === null) throw new HypuraError("internal", "a prompt with a hole for a model that fills none");
  const code = { special: false, markup: false };
  const start = (yield* tokenize("", { special: true, markup: false })).filter((id) => id === bosOf(model));
  let prefix = yield* tokenize(source.prefix, code);
  let suffix = yield* tokenize(source.suffix, code);
  const total = start.length + prefix.length + suffix.length + 3;
  if (!fits(total, work)) {
    if (!mayCut(work)) throw tooLong(total, work);
    // What is near the hole says most about it; what comes before more than what comes after.
    const room = Math.max(0, Math.floor(work.contextTokens / 2) - start.length - 3);
    const before = Math.min(prefix.length, Math.max(Math.floor((room * 3) / 4), room - suffix.length));
    prefix = prefix.slice(prefix.length - before);
    suffix = suffix.slice(0, room - before);
  }
  const ids = [...start, fim.prefix, ...prefix, fim.suffix, ...suffix, fim.middle];
  const text = work.kind === "debug-render" ? yield* detokenize(ids) : "";
  return plainRequest(work, model, { ids, text, splitThoughts: "no" });
}

type MessageSource = Extract<Source, { readonly kind: "messages" }>;

function isPlain(work: GenerateWork, source: MessageSource, model: ServedModel): boolean {
  if (source.before.length > 0) return true;
  const isText = work.imageCount === 0 && source.tools.length === 0;
  const canSplit = work.think === null || hasThinkTags(model);
  return work.logprobs && isText && canSplit && !(work.format !== null && work.think?.on === true);
}

function* preparePlain(work: GenerateWork, model: ServedModel, source: MessageSource): Steps<Prepared> {
  // A constraint on plain text holds from its first token, so there is no room for thoughts.
  const calm: GenerateWork =
    work.format !== null && work.think?.on === true ? { ...work, think: { on: false, level: null } } : work;
  const { messages, rendered } = yield* fitMessages(calm, model, source, { cut: false });
  const open = rendered.prompt.trimEnd().endsWith("<think>");
  const bos = bosOf(model);
  const continues = source.before.length > 0 && rendered.ids[0] === bos;
  const ids = withOneBos([...source.before, ...rendered.ids.slice(continues ? 1 : 0)], model);
  return plainRequest({ ...calm, source: { ...source, messages } }, model, {
    ids: cutIds(ids, calm, model),
    text: rendered.prompt,
    messages,
    splitThoughts: calm.think?.on === true ? (open ? "open" : "yes") : "no",
  });
}

function* prepareChat(work: GenerateWork, model: ServedModel, source: MessageSource): Steps<Prepared> {
  const { messages, rendered } = yield* fitMessages(work, model, source, { cut: true });
  return {
    work,
    route: "POST /v1/chat/completions",
    body: { ...chatBody(work, model, messages), ...generationFields(work, model, rendered.tokenCount) },
    promptTokens: rendered.tokenCount,
    promptText: rendered.prompt,
    promptIds: work.imageCount === 0 ? rendered.ids : null,
    messages,
    splitThoughts: "no",
  };
}

// ---- what conversations share ---------------------------------------------------------------------------------

/** Stands where a conversation's own words begin; what a template does with it is what it does with any word. */
const probe: EngineMessage = { role: "user", content: "¶" };

/**
 * Another conversation with the same instructions and tools: what both begin with is what all of that kind begin with.
 * Null where there is neither, or the template refuses it.
 */
export function* likeConversation({ work, messages }: Prepared, model: ServedModel): Steps<Ids | null> {
  const { source } = work;
  const first = messages.findIndex(({ role }) => role !== "system");
  const instructions = messages.slice(0, Math.max(0, first));
  if (source.kind !== "messages" || source.before.length > 0 || work.imageCount > 0) return null;
  if (instructions.length === 0 && source.tools.length === 0) return null;
  const like = yield* rendering(work, model, [...instructions, probe]);
  return like === null ? null : withOneBos(like.rendered.ids, model);
}

// ---- conversations that are too long --------------------------------------------------------------------------

interface Fitted {
  readonly messages: readonly EngineMessage[];
  readonly rendered: Rendered;
}

/** The messages that the prompt keeps. With `cut: false` the last candidate is given as it is, too long perhaps. */
function* fitMessages(
  work: GenerateWork,
  model: ServedModel,
  source: MessageSource,
  may: { readonly cut: boolean },
): Steps<Fitted> {
  const whole: Fitted = {
    messages: source.messages,
    rendered: yield* render(work, chatBody(work, model, source.messages)),
  };
  if (fits(whole.rendered.tokenCount, work)) return whole;
  if (!work.truncate) throw tooLong(whole.rendered.tokenCount, work);
  const candidates = work.dialect === "chat" ? truncations(source.messages) : [];
  const shorter = yield* firstThatFits(work, model, candidates);
  if (shorter !== null && fits(shorter.rendered.tokenCount, work)) return shorter;
  if (!mayCut(work)) throw tooLong(whole.rendered.tokenCount, work);
  if (!may.cut) return shorter ?? whole;
  const short = yield* cutMessages(work, model, shorter ?? whole);
  if (short === null) throw tooLong(whole.rendered.tokenCount, work);
  return short;
}

/**
 * The conversation without its oldest messages, ever fewer of them: all system messages and the last message stay.
 * A conversation starts with something that a user said, since templates refuse others (a result without its call).
 */
export function truncations(messages: readonly EngineMessage[]): readonly (readonly EngineMessage[])[] {
  const last = messages.length - 1;
  const from = (start: number): readonly EngineMessage[] =>
    messages.filter((message, index) => index >= start || message.role === "system");
  const first = messages.findIndex((message) => message.role !== "system");
  const starts = messages.flatMap((message, index) =>
    index > first && index < last && message.role === "user" ? [index] : [],
  );
  return first === -1 || first === last ? [] : [...starts, last].map(from);
}

/** The longest candidate that fits, else the shortest one. Halving: each question costs a rendering. */
function* firstThatFits(
  work: GenerateWork,
  model: ServedModel,
  candidates: readonly (readonly EngineMessage[])[],
): Steps<Fitted | null> {
  let best: Fitted | null = null;
  let low = 0;
  let high = candidates.length - 1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    const candidate: Fitted | null = yield* rendering(work, model, candidates[middle] ?? []);
    if (candidate !== null && fits(candidate.rendered.tokenCount, work)) {
      best = candidate;
      high = middle - 1;
    } else {
      low = middle + 1;
      if (low === candidates.length) return candidate;
    }
  }
  return best;
}

/** null: the template refuses the conversation without its beginning. */
function* rendering(
  work: GenerateWork,
  model: ServedModel,
  messages: readonly EngineMessage[],
): Steps<Fitted | null> {
  try {
    return { messages, rendered: yield* render(work, chatBody(work, model, messages)) };
  } catch (error) {
    if (error instanceof WireError && error.status === 400) return null;
    throw error;
  }
}

/**
 * Cuts the middle out of the longest texts until the prompt leaves about half of its window free. Ollama cuts the
 * rendered prompt, the template's marks and all; cut inside a message, what remains is still a conversation.
 */
function* cutMessages(work: GenerateWork, model: ServedModel, from: Fitted): Steps<Fitted | null> {
  const { head, tail } = cutPlan(work, from.rendered.ids[0] === bosOf(model));
  let { messages, rendered } = from;
  // Each round cuts one message; the last one to be cut may need a second, since pieces of text join differently.
  for (let round = 0; round <= from.messages.length; round++) {
    const excess = rendered.tokenCount - (head + tail);
    const index = longestText(messages);
    const message = messages[index];
    if (message === undefined || typeof message.content !== "string") return null;
    const ids: Ids = yield* tokenize(message.content, { special: false, markup: false });
    const keep = Math.max(0, Math.min(ids.length, head));
    const end = Math.max(0, ids.length - keep - excess);
    const start: string = yield* detokenize(ids.slice(0, keep));
    const rest: string = yield* detokenize(ids.slice(ids.length - end));
    // A cut inside a character leaves half of one on each side.
    const content = start.replace(/�+$/, "") + rest.replace(/^�+/, "");
    messages = messages.map((one, at) => (at === index ? { ...one, content } : one));
    rendered = yield* render(work, chatBody(work, model, messages));
    if (fits(rendered.tokenCount, work)) return { messages, rendered };
    if (content.length >= message.content.length) return null;
  }
  return null;
}

function longestText(messages: readonly EngineMessage[]): number {
  let longest = -1;
  let length = 0;
  messages.forEach(({ content }, index) => {
    if (typeof content === "string" && content.length > length) {
      longest = index;
      length = content.length;
    }
  });
  return longest;
}

// ---- embeddings -----------------------------------------------------------------------------------------------

interface EmbeddingReply {
  readonly data: readonly { readonly embedding: readonly number[] }[];
  readonly usage: { readonly prompt_tokens: number };
}

export interface Vectors {
  readonly vectors: readonly (readonly number[])[];
  readonly promptTokens: number;
}

/** Asks the engine for one vector for each input, of Euclidean length 1 unless it is the old endpoint that asks. */
export function* vectorsOf(work: EmbedWork, model: ServedModel): Steps<Vectors> {
  const prompts: Ids[] = [];
  for (const input of work.inputs) {
    const ids = yield* tokenize(input, { special: true, markup: true });
    if (ids.length > work.contextTokens && !work.truncate) {
      throw new WireError(400, "the input length exceeds the context length");
    }
    prompts.push(withOneBos(ids, model).slice(0, work.contextTokens));
  }
  if (prompts.length === 0) return { vectors: [], promptTokens: 0 };
  const answer = yield {
    route: "POST /v1/embeddings",
    // -1: as the model gives them; 2: of Euclidean length 1.
    body: { input: prompts, encoding_format: "float", embd_normalize: work.dialect === "embed" ? 2 : -1 },
  };
  const { data, usage } = answer as EmbeddingReply;
  const { dimensions } = work;
  return {
    vectors: data.map(({ embedding }) =>
      dimensions === null ? embedding : shortened(embedding, dimensions),
    ),
    promptTokens: usage.prompt_tokens,
  };
}

/** The reply of /api/embed and /api/embeddings. */
export function* embed(
  work: EmbedWork,
  model: ServedModel,
  times: { readonly receivedNs: number; readonly loadedNs: number; readonly nowNs: () => number },
): Steps<object> {
  const { vectors, promptTokens } = yield* vectorsOf(work, model);
  if (work.dialect === "embeddings") return { embedding: vectors[0] ?? [] };
  if (vectors.length === 0) return { model: work.asked, embeddings: [] };
  return {
    model: work.asked,
    embeddings: vectors,
    total_duration: Math.round(times.nowNs() - times.receivedNs),
    load_duration: Math.max(1, Math.round(times.loadedNs - times.receivedNs)),
    prompt_eval_count: promptTokens,
  };
}

/** The first so many dimensions, of length 1 again. */
export function shortened(vector: readonly number[], dimensions: number): readonly number[] {
  const part = vector.slice(0, dimensions);
  const length = Math.hypot(...part);
  return length === 0 ? part : part.map((value) => value / length);
}

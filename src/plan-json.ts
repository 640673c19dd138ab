// A plan out of a JSON document, as `inspect --json` prints it: every field is there, of its kind, and within the numbers
// that native code takes. It owns the check and nothing of what a plan means; that the plan is one of the model at hand
// is plan.ts's question. Pure.

import { HypuraError } from "./errors";
import type { Plan } from "./plan";
import { kvTypes } from "./plan-memory";

type Check = (value: unknown, at: string) => void;

function wrong(at: string, wanted: string, value: unknown): HypuraError {
  const shown = JSON.stringify(value) ?? "missing";
  return new HypuraError(
    "usage",
    `the plan's ${at} is ${shown.slice(0, 60)}, not ${wanted}: make a plan with \`hypura inspect MODEL --json\``,
  );
}

function kind(wanted: string, isRight: (value: unknown) => boolean): Check {
  return (value, at) => {
    if (!isRight(value)) throw wrong(at, wanted, value);
  };
}

const text = kind("a text", (value) => typeof value === "string");
const flag = kind("true or false", (value) => typeof value === "boolean");
const number = kind("a number", (value) => typeof value === "number" && Number.isFinite(value));

function whole(least: number, most: number = Number.MAX_SAFE_INTEGER): Check {
  return kind(
    `a whole number from ${least} to ${most}`,
    (value) => Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most,
  );
}

function oneOf(...words: readonly (string | number)[]): Check {
  return kind(`one of ${words.join(", ")}`, (value) => words.some((word) => word === value));
}

function nullable(check: Check): Check {
  return (value, at) => {
    if (value !== null) check(value, at);
  };
}

function list(check: Check, least = 0): Check {
  return (value, at) => {
    if (!Array.isArray(value) || value.length < least) throw wrong(at, "a list", value);
    for (const [index, one] of value.entries()) check(one, `${at}[${index}]`);
  };
}

function object(fields: Readonly<Record<string, Check>>): Check {
  return (value, at) => {
    if (typeof value !== "object" || value === null || Array.isArray(value))
      throw wrong(at, "an object", value);
    for (const [name, check] of Object.entries(fields)) {
      check((value as Readonly<Record<string, unknown>>)[name], at === "" ? name : `${at}.${name}`);
    }
  };
}

/** ffi/native/engine.cpp takes counts as signed 32-bit numbers. */
const count = whole(1, 0x7fff_ffff);
const bytes = whole(0);

const policy = object({
  kind: oneOf("lru", "lfu-decay", "least-stale", "pinned-cyclic"),
  halfLifeTokens: number,
  mostPassTokens: whole(0, 0x7fff_ffff),
  staleAfterPasses: whole(0, 0x7fff_ffff),
  pinnedSlots: whole(0, 0x7fff_ffff),
  workingSetStrides: whole(0, 0x7fff_ffff),
  guardRingSlots: whole(0, 0x7fff_ffff),
});

const streaming = object({
  tensors: list(object({ tensorIndex: whole(0), strideCount: count, classIndex: whole(0, 0x7fff_ffff) }), 1),
  classes: list(
    object({ strideBytes: whole(1), slotBytes: whole(1), slotCount: count, opSlots: count, policy }),
    1,
  ),
  reader: object({
    threads: whole(1, 512),
    pieceBytes: kind(
      "a multiple of 4096 up to 2^30",
      (value) =>
        Number.isSafeInteger(value) &&
        (value as number) % 4096 === 0 &&
        (value as number) > 0 &&
        (value as number) <= 2 ** 30,
    ),
    direct: flag,
    dropBuffered: flag,
    retryCount: whole(0, 1000),
    retryWaitNs: bytes,
    prefetchDepth: whole(0, 1024),
    backgroundTokens: whole(0, 0x7fff_ffff),
    backgroundDepth: whole(0, 1024),
  }),
  lookaheadStrides: whole(0, 0x7fff_ffff),
  prediction: nullable(
    object({
      experts: whole(1, 1024),
      routers: list(
        object({
          after: whole(0),
          asked: list(whole(0), 1),
          tensorIndex: whole(0),
          normIndex: whole(0),
          normBeforeIndex: whole(0),
        }),
        1,
      ),
    }),
  ),
  hugePages: flag,
  touchThreads: whole(1, 512),
  spanWorkBytes: bytes,
  touchedBytesPerToken: number,
});

const memory = {
  weightBytes: bytes,
  kvBytes: bytes,
  stateBytes: bytes,
  computeBytes: bytes,
} as const;

const estimate = object({
  decodeTokensPerSecond: nullable(number),
  prefillTokensPerSecond: nullable(number),
  basis: oneOf("none", "model", "corrected", "measured"),
  bound: nullable(object({ tokensPerSecond: number, by: oneOf("storage", "computing"), sentence: text })),
  tokenBytes: object({ touched: number, gpu: number, ram: number, pool: number, read: number }),
  hits: nullable(object({ rate: number, leastRate: number, curve: oneOf("recorded", "assumed") })),
  modelSeconds: nullable(number),
  note: text,
});

const plan = object({
  version: oneOf(1),
  mode: oneOf(
    "full-resident",
    "partial-gpu",
    "mmap",
    "expert-streaming",
    "dense-ffn-streaming",
    "mixed-streaming",
  ),
  model: object({ name: text, architecture: text }),
  files: list(object({ path: text, sizeBytes: bytes }), 1),
  tensors: list(
    object({
      name: text,
      fileIndex: whole(0),
      offsetBytes: bytes,
      sizeBytes: bytes,
      tier: oneOf("gpu", "ram", "nvme"),
    }),
    1,
  ),
  contextTokens: count,
  slotCount: whole(1, 256),
  batchTokens: whole(2, 0x7fff_ffff),
  ubatchTokens: count,
  decodeThreads: whole(1, 512),
  prefillThreads: whole(1, 512),
  pollPercent: whole(0, 100),
  gpuLayers: whole(0, 0x7fff_ffff),
  kvTypeK: oneOf(...kvTypes),
  kvTypeV: oneOf(...kvTypes),
  embeddings: flag,
  repack: flag,
  loadMode: oneOf("mmap", "direct", "read"),
  streaming: nullable(streaming),
  speculation: nullable(
    object({
      maxTokens: whole(1, 65_535),
      context: nullable(
        object({
          leastMatchTokens: whole(1, 65_535),
          mostCarries: whole(0, 65_535),
          memoryTokens: whole(0, 1 << 24),
          leastTokens: whole(1, 65_535),
          tokensPerRight: whole(0, 65_535),
          newestPercent: whole(0, 100),
        }),
      ),
      draftPath: nullable(text),
      draftKey: nullable(text),
      mtp: flag,
      draftProbability: number,
    }),
  ),
  slotFolder: nullable(text),
  contextShift: flag,
  projector: nullable(object({ path: text, sizeBytes: bytes })),
  memory: object({
    ...memory,
    poolBytes: bytes,
    streamingBytes: bytes,
    draftBytes: bytes,
    projectorBytes: bytes,
    processBytes: bytes,
  }),
  gpuMemory: nullable(object(memory)),
  longestContextTokens: whole(0),
  estimate,
  solved: nullable(
    object({ by: oneOf("greedy", "program"), greedyCost: nullable(number), programCost: nullable(number) }),
  ),
  choices: list(object({ name: text, value: text, reason: text })),
});

/** The plan in `json`: a plan, or what `inspect --json` prints, which holds one. Throws `usage` with the field that is wrong. */
export function validatePlan(json: unknown): Plan {
  const holder = json as { readonly plan?: unknown } | null;
  const inner = typeof holder === "object" && holder !== null && "plan" in holder ? holder.plan : json;
  if (inner === null) {
    throw new HypuraError(
      "usage",
      "the document holds no plan but the reason why there is none: make one with more memory",
    );
  }
  plan(inner, "");
  const value = inner as Plan;
  const verified = value.slotCount * (1 + (value.speculation?.maxTokens ?? 0));
  if (value.batchTokens < verified) {
    throw wrong("batchTokens", `at least ${verified}, each slot's token and its guesses`, value.batchTokens);
  }
  for (const [index, one] of (value.streaming?.tensors ?? []).entries()) {
    const tensor = value.tensors[one.tensorIndex];
    const strideBytes = value.streaming?.classes[one.classIndex]?.strideBytes;
    if (
      tensor === undefined ||
      strideBytes === undefined ||
      strideBytes * one.strideCount !== tensor.sizeBytes
    ) {
      throw wrong(`streaming.tensors[${index}]`, "strides that are a whole tensor of the plan", one);
    }
  }
  return value;
}

// `options` of a request -> the engine's sampling. It owns the names, types and defaults of Ollama's options and the
// order in which they win (default, the model's stored parameters, the request); it knows no endpoint. Pure.

import { type Fields, isObject } from "./wire-body";
import { WireError } from "./wire-error";

/** Every option that is known, with the word for its type. Others are ignored: clients send many old ones. */
const optionTypes = {
  num_ctx: "integer",
  num_keep: "integer",
  num_predict: "integer",
  temperature: "float32",
  top_k: "integer",
  top_p: "float32",
  min_p: "float32",
  typical_p: "float32",
  repeat_last_n: "integer",
  repeat_penalty: "float32",
  presence_penalty: "float32",
  frequency_penalty: "float32",
  seed: "integer",
  stop: "array",
  num_batch: "integer",
  num_gpu: "integer",
  main_gpu: "integer",
  num_thread: "integer",
  use_mmap: "boolean",
  draft_num_predict: "integer",
} as const satisfies Readonly<Record<string, "integer" | "float32" | "array" | "boolean">>;

type OptionName = keyof typeof optionTypes;

export interface Options {
  /** null: as much as is served. */
  readonly contextTokens: number | null;
  readonly keepTokens: number;
  /** Negative: no limit of its own. */
  readonly predictTokens: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly typicalP: number;
  /** -1: the whole context. */
  readonly repeatLastTokens: number;
  readonly repeatPenalty: number;
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  /** Negative: random. */
  readonly seed: number;
  readonly stop: readonly string[];
}

type Values = Readonly<Partial<Record<OptionName, number | readonly string[] | boolean>>>;

/** Throws WireError 400 with Ollama's sentence for an option of the wrong type. */
export function readOptions(stored: Fields, asked: Fields): Options {
  const values: Values = { ...checked(stored), ...checked(asked) };
  const number = (name: OptionName, fallback: number): number => {
    const value = values[name];
    return typeof value === "number" ? value : fallback;
  };
  return {
    contextTokens: typeof values.num_ctx === "number" ? values.num_ctx : null,
    keepTokens: number("num_keep", 4),
    predictTokens: number("num_predict", -1),
    temperature: number("temperature", 0.8),
    topK: number("top_k", 40),
    topP: number("top_p", 0.9),
    minP: number("min_p", 0),
    typicalP: number("typical_p", 1),
    repeatLastTokens: number("repeat_last_n", 64),
    repeatPenalty: number("repeat_penalty", 1),
    presencePenalty: number("presence_penalty", 0),
    frequencyPenalty: number("frequency_penalty", 0),
    seed: number("seed", -1),
    stop: Array.isArray(values.stop) ? values.stop : [],
  };
}

function checked(fields: Fields): Values {
  const values: Partial<Record<OptionName, number | readonly string[] | boolean>> = {};
  for (const [key, value] of Object.entries(fields)) {
    if (value === null || value === undefined || !Object.hasOwn(optionTypes, key)) continue;
    const name = key as OptionName;
    values[name] = optionValue(name, value);
  }
  return values;
}

function optionValue(name: OptionName, value: unknown): number | readonly string[] | boolean {
  const type = optionTypes[name];
  switch (type) {
    case "integer":
      // Go reads JSON numbers as floats and cuts them.
      if (typeof value === "number") return Math.max(-(2 ** 31), Math.min(2 ** 31 - 1, Math.trunc(value)));
      break;
    case "float32":
      if (typeof value === "number") return Math.max(-3e38, Math.min(3e38, value));
      break;
    case "boolean":
      if (typeof value === "boolean") return value;
      break;
    case "array":
      if (typeof value === "string") return [value];
      if (Array.isArray(value) && value.every((one) => typeof one === "string")) return value;
      break;
  }
  throw new WireError(400, `option ${JSON.stringify(name)} must be of type ${type}`);
}

/** The options object of a body. */
export function optionsOf(value: unknown): Fields {
  if (value === undefined || value === null) return {};
  if (isObject(value)) return value;
  throw new WireError(400, "options must be a JSON object");
}

/** The engine's names. `n_predict` is decided when the prompt has been counted. */
export function samplingOf(options: Options, contextTokens: number): object {
  return {
    temperature: options.temperature,
    top_k: Math.max(0, options.topK),
    top_p: options.topP,
    min_p: options.minP,
    typical_p: options.typicalP,
    // The engine allocates room for as many tokens as this says.
    repeat_last_n:
      options.repeatLastTokens < 0 ? contextTokens : Math.min(options.repeatLastTokens, contextTokens),
    repeat_penalty: options.repeatPenalty,
    presence_penalty: options.presencePenalty,
    frequency_penalty: options.frequencyPenalty,
    ...(options.seed >= 0 && { seed: options.seed }),
    stop: options.stop.filter((text) => text !== ""),
    n_keep: Math.max(-1, options.keepTokens),
  };
}

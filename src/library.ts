// The models that are served: what the arguments of `serve` name, opened and described. An argument is a .gguf file
// (any file of a split set), a folder of them, or `ollama:NAME[:TAG]` out of an Ollama store, which is only ever read.
// It owns that lookup, each model's digest and the plan it is served with; nothing is loaded here (keeper.ts).

import { createHash } from "node:crypto";
import { closeSync, openSync, readdirSync, readFileSync, readSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import pin from "../vendor/llama.json";
import { planWithDraft } from "./draft";
import { HypuraError } from "./errors";
import { type GgufScalar, splitNames } from "./gguf";
import type { KeptModel } from "./keeper";
import { type ModelFile, openModelFile, readMetadataArray } from "./modelfile";
import {
  capabilitiesOf,
  fimTokensOf,
  nameGiven,
  nameOf,
  noSettings,
  type ServedModel,
  type StoredSettings,
} from "./ollama-model";
import { budgetOf, makePlan, type Plan, type PlanLimits } from "./plan";
import { type PrefixStore, type Shelf, whyNotKept } from "./prefix-store";
import type { Projector } from "./projector";
import { userHome } from "./state";
import type { StreamingCounters } from "./streaming";
import { type Decoded, isMeasured, rememberRun, type Surroundings, surroundingsOf } from "./surroundings";

/** A served model with what only this side of the wire needs. */
export interface LibraryModel extends KeptModel {
  readonly served: ServedModel;
  /** As it would run when the server started. */
  readonly firstPlan: Plan;
  /** The values of a metadata array too long to be kept; null for any other key. */
  readArray(key: string): readonly GgufScalar[] | null;
  /** Where the beginnings of its conversations are kept; null where none are. */
  readonly shelf: Shelf | null;
  /** Keeps what a request did, with the engine to itself, for the plans to come. */
  remember(plan: Plan, decoded: Decoded, streaming: StreamingCounters | null): void;
}

export interface LibraryOptions {
  /** Context null: as much as serves an agent and fits, see `planToServe`. */
  readonly limits: PlanLimits;
  /** Instead of the name out of the file; for a single model. */
  readonly name: string | null;
  /** The folder of the Ollama store. */
  readonly storePath: string;
  readonly onWarning: (sentence: string) => void;
  /** Measures the machine for a model that would stream; without it such a plan knows what was measured before. */
  readonly measure?: (modelPath: string) => Promise<Surroundings>;
  /** Reads images for the only model. */
  readonly projector?: Projector | null;
  /** Keeps the beginnings of conversations on disk; without it nothing is written. */
  readonly prefixes?: PrefixStore | null;
}

/** Where Ollama keeps its models. */
export function ollamaStorePath(environment: Readonly<Record<string, string | undefined>>): string {
  const given = environment["OLLAMA_MODELS"];
  return given === undefined || given === "" ? join(userHome(), ".ollama", "models") : given;
}

/** Opens everything that is named. Throws where an argument is no model, or none of its models can run here. */
export async function openLibrary(
  words: readonly string[],
  options: LibraryOptions,
): Promise<readonly LibraryModel[]> {
  const found: Found[] = [];
  for (const word of words) {
    found.push(...(await find(word, options)));
  }
  if (options.name !== null && found.length > 1) {
    throw new HypuraError(
      "usage",
      `--name gives one name and there are ${found.length} models: leave it out, or serve one model`,
    );
  }
  if ((options.projector ?? null) !== null && found.length > 1) {
    throw new HypuraError(
      "usage",
      `--mmproj belongs to one model and there are ${found.length}: serve that one alone`,
    );
  }
  const models: LibraryModel[] = [];
  for (const one of found) {
    models.push(await toModel(one, options));
  }
  const names = new Map<string, string>();
  for (const { served } of models) {
    const path = served.files[0]?.path ?? "";
    const other = names.get(served.name);
    if (other !== undefined) {
      throw new HypuraError(
        "usage",
        `${JSON.stringify(other)} and ${JSON.stringify(path)} would both be called ${served.name}: rename a file, or serve one of them`,
      );
    }
    names.set(served.name, path);
  }
  return models;
}

interface Found {
  /** Canonical "name:tag". */
  readonly name: string;
  readonly file: ModelFile;
  /** Set where a store knows it. */
  readonly digest: string | null;
  readonly settings: StoredSettings;
}

const storePrefix = "ollama:";

async function find(word: string, options: LibraryOptions): Promise<readonly Found[]> {
  if (word.startsWith(storePrefix)) {
    return [findInStore(word.slice(storePrefix.length), options)];
  }
  if (statSync(word, { throwIfNoEntry: false })?.isDirectory() === true) {
    return findInFolder(word, options);
  }
  return [asFound(openModelFile(word))];
}

function asFound(file: ModelFile): Found {
  return { name: nameOf(basename(file.path)), file, digest: null, settings: noSettings };
}

/** Every model of a folder, a split set once; what cannot be served is said and left out. */
async function findInFolder(folder: string, options: LibraryOptions): Promise<readonly Found[]> {
  const names = readdirSync(folder)
    .filter((name) => name.toLowerCase().endsWith(".gguf"))
    .filter((name) => (splitNames(name)?.names[0] ?? name) === name)
    .sort();
  const found: Found[] = [];
  for (const name of names) {
    try {
      const file = openModelFile(join(folder, name));
      planToServe(name, file, options.limits, await cached(file)); // one that cannot run here is no model of this server
      found.push(asFound(file));
    } catch (error) {
      if (!(error instanceof HypuraError)) {
        throw error;
      }
      options.onWarning(`${JSON.stringify(name)} is left out: ${error.message}`);
    }
  }
  if (found.length === 0) {
    const reason = names.length === 0 ? "has no .gguf file" : "has no .gguf file that can be served";
    throw new HypuraError(
      "not-found",
      `the folder ${JSON.stringify(folder)} ${reason}: give a folder of model files`,
    );
  }
  return found;
}

async function toModel(found: Found, given: LibraryOptions): Promise<LibraryModel> {
  const options: LibraryOptions = {
    ...given,
    limits: { ...given.limits, projector: given.projector ?? null },
  };
  const { file, settings } = found;
  const name = options.name === null ? found.name : givenName(options.name);
  const { metadata } = file.gguf;
  const fim =
    fimTokensOf(metadata, null) ?? fimTokensOf(metadata, readMetadataArray(file, "tokenizer.ggml.tokens"));
  const modifiedMs = Math.max(...file.files.map(({ path }) => statSync(path).mtimeMs));
  let surroundings = await cached(file, options.onWarning);
  let firstPlan = planToServe(name, file, options.limits, surroundings);
  if (firstPlan.streaming !== null && !isMeasured(surroundings) && options.measure !== undefined) {
    surroundings = await options.measure(file.path);
    firstPlan = planToServe(name, file, options.limits, surroundings);
  }
  const { contextTokens } = firstPlan;
  const shelf = shelfOf(name, firstPlan, file, { digest: found.digest ?? digestOf(file), options });
  const served: ServedModel = {
    name,
    files: file.files,
    digest: found.digest ?? digestOf(file),
    modifiedAt: new Date(modifiedMs).toISOString(),
    modifiedUnixSeconds: Math.floor(modifiedMs / 1000),
    model: file.model,
    metadata,
    projector: options.projector?.metadata ?? null,
    fim,
    capabilities: capabilitiesOf({
      metadata,
      model: file.model,
      fim,
      hasProjector: (options.projector ?? null) !== null,
      canEmbed: isForEmbedding(file),
    }),
    contextTokens,
    trainedContextTokens: file.model.trainedContextTokens || contextTokens,
    canShift: false,
    settings,
  };
  return {
    name,
    served,
    firstPlan,
    // What clients were told of the context stays; the rest follows the memory that is free at that time.
    async plan() {
      surroundings = await cached(file);
      const plan = planToServe(name, file, { ...options.limits, contextTokens }, surroundings);
      return { ...plan, slotFolder: shelf?.folder ?? null };
    },
    shelf,
    readArray: (key) => readMetadataArray(file, key),
    remember: rememberer((plan, decoded, streaming) =>
      rememberRun(plan, file, surroundings.machine, decoded, streaming, options.onWarning),
    ),
  };
}

/** What makes another cache of the same text has another shelf. */
function shelfOf(
  name: string,
  plan: Plan,
  file: ModelFile,
  { digest, options }: { readonly digest: string; readonly options: LibraryOptions },
): Shelf | null {
  const { prefixes, onWarning } = options;
  if (prefixes === undefined || prefixes === null) {
    return null;
  }
  const { model } = file;
  const why = isForEmbedding(file)
    ? "it generates no text"
    : (plan.speculation?.draftPath ?? null) !== null
      ? "a draft model would have to read it all again"
      : plan.speculation?.mtp === true
        ? "the model's MTP layers would have to read it all again"
        : whyNotKept(model);
  if (why !== null) {
    onWarning(`${name} is served without --prefix-cache: ${why}`);
    return null;
  }
  return prefixes.shelf([digest.slice(0, 24), plan.kvTypeK, plan.kvTypeV, pin.release].join("-"));
}

/** The machine as it is now, with what was measured of it before. */
function cached(file: ModelFile, onNote?: (sentence: string) => void): Promise<Surroundings> {
  return surroundingsOf(file.path, { measure: "cached", onNote });
}

/** A model that answers in less is asked often, and the history is a file that is written whole. */
const rememberEveryMs = 10_000;

function rememberer(remember: LibraryModel["remember"]): LibraryModel["remember"] {
  let notBeforeMs = 0;
  return (plan, decoded, streaming) => {
    const nowMs = performance.now();
    if (nowMs >= notBeforeMs) {
      notBeforeMs = nowMs + rememberEveryMs;
      remember(plan, decoded, streaming);
    }
  };
}

/** Its file says how vectors of tokens become one, or it generates nothing. */
function isForEmbedding({ gguf, model }: ModelFile): boolean {
  return gguf.metadata.has(`${model.architecture}.pooling_type`) || !model.generatesText;
}

function givenName(text: string): string {
  const name = nameGiven(text);
  if (name === null) {
    throw new HypuraError(
      "usage",
      `--name ${JSON.stringify(text)} is no name of a model: give letters, digits, "_", "-" and ".", and a tag after a colon, such as my-model:8b`,
    );
  }
  return name;
}

/** Enough to tell files apart without reading hundreds of gigabytes: the head of each, its size and its date. */
const digestedBytes = 1_048_576;

function digestOf(file: ModelFile): string {
  const hash = createHash("sha256");
  const head = new Uint8Array(digestedBytes);
  for (const { path, sizeBytes } of file.files) {
    const descriptor = openSync(path, "r");
    try {
      const count = readSync(descriptor, head, 0, digestedBytes, 0);
      hash.update(head.subarray(0, count)).update(`${sizeBytes} ${statSync(path).mtimeMs}\n`);
    } finally {
      closeSync(descriptor);
    }
  }
  return hash.digest("hex");
}

// ---- the plan a model is served with ----------------------------------------------------------------------------

/** The context that OpenClaw and its like ask for at most; more memory than that serves nobody by default. */
const mostContextTokens = 32_768;
/** The first turn of an agent takes some 8,000 tokens (its instructions and tools), and an answer must fit too. */
const goodContextTokens = 16_384;
/** With less there is no conversation. */
const leastContextTokens = 512;
/** Streaming lives on its pool: more context than `goodContextTokens` may take so much of the memory from it. */
const streamedContextShare = 1 / 8;

/**
 * How a model is served. Without a context asked for: 32,768, 24,576 or 16,384 tokens (or all that the model was
 * trained for, where that is less), the most with which everything stays resident; else streaming with 32,768 where
 * the context takes little of the memory, or with 16,384; and where that does not fit either, the largest half of a
 * half of it that does.
 */
export function planToServe(
  name: string,
  file: ModelFile,
  limits: PlanLimits,
  { machine, knowledge }: Surroundings,
): Plan {
  const subject = { name, files: file.files, model: file.model };
  const attempt = (contextTokens: number, mode: PlanLimits["mode"]): Plan | HypuraError => {
    try {
      return planWithDraft(file, { ...limits, contextTokens, mode: mode ?? "auto" }, (all) =>
        makePlan(subject, machine, all, knowledge),
      );
    } catch (error) {
      if (error instanceof HypuraError && error.code === "not-enough-memory") {
        return error;
      }
      throw error;
    }
  };
  if (isForEmbedding(file)) {
    return makePlan(subject, machine, { ...limits, mode: "resident", embeddings: true }, knowledge);
  }
  if (limits.contextTokens !== null) {
    return planOrThrow(attempt(limits.contextTokens, limits.mode));
  }
  const trained = file.model.trainedContextTokens || goodContextTokens;
  const most = Math.min(trained, mostContextTokens);
  const good = [most, 24_576, goodContextTokens].filter((tokens, i) => i === 0 || tokens < most);
  const why =
    trained <= mostContextTokens ? "all that the model was trained for" : "the most that is used by default";
  for (const tokens of limits.mode === "stream" ? [] : good) {
    const plan = attempt(tokens, "resident");
    if (!(plan instanceof HypuraError)) {
      return withReason(plan, tokens === most ? why : "the most with which all weights stay in memory");
    }
  }
  for (const tokens of limits.mode === "resident" ? [] : good) {
    const plan = attempt(tokens, "stream");
    const isLast = tokens === good.at(-1);
    if (!(plan instanceof HypuraError) && (isLast || isSmallBesidePool(plan, budgetOf(machine, limits)))) {
      return withReason(
        plan,
        tokens === most ? why : "an agent's turn, and the rest of the memory for the pool",
      );
    }
  }
  let last: Plan | HypuraError | undefined;
  for (let tokens = Math.floor((good.at(-1) as number) / 2); tokens >= leastContextTokens; tokens >>= 1) {
    last = attempt(tokens, limits.mode);
    if (!(last instanceof HypuraError)) {
      return withReason(last, "the most that fits");
    }
  }
  return planOrThrow(last ?? attempt(most, limits.mode));
}

function isSmallBesidePool(plan: Plan, budgetBytes: number): boolean {
  return plan.memory.kvBytes + plan.memory.stateBytes <= budgetBytes * streamedContextShare;
}

/** To the plan every context is one that was asked for. */
function withReason(plan: Plan, reason: string): Plan {
  const choices = plan.choices.map((choice) => (choice.name === "context" ? { ...choice, reason } : choice));
  return { ...plan, choices };
}

function planOrThrow(plan: Plan | HypuraError): Plan {
  if (plan instanceof HypuraError) {
    throw plan;
  }
  return plan;
}

// ---- an Ollama store --------------------------------------------------------------------------------------------

interface Layer {
  readonly mediaType: string;
  readonly digest: string;
}

const layerTypes = "application/vnd.ollama.image.";

function findInStore(asked: string, options: LibraryOptions): Found {
  const { storePath, onWarning } = options;
  const path = manifestPath(asked, storePath);
  const text = readStored(path, `there is no ${storePrefix}${asked} in the Ollama store ${storePath}`, () =>
    storedNames(storePath),
  );
  const layers = layersOf(text, path);
  const blob = (layer: Layer): string => blobPath(layer, storePath, path);
  const weights = layers.filter(({ mediaType }) => mediaType === `${layerTypes}model`);
  if (weights.length !== 1) {
    throw new HypuraError(
      "unsupported-model",
      `${storePrefix}${asked} has ${weights.length} GGUF files in its manifest, one is wanted: take a model that Ollama runs from a GGUF file`,
    );
  }
  if (layers.some(({ mediaType }) => mediaType === `${layerTypes}adapter`)) {
    throw new HypuraError(
      "unsupported-model",
      `${storePrefix}${asked} is an adapter on a model, which hypura does not apply: serve the model itself`,
    );
  }
  if (layers.some(({ mediaType }) => mediaType === `${layerTypes}projector`)) {
    onWarning(`${storePrefix}${asked} has a projector for images, which is left out: it is served for text`);
  }
  const texts = (kind: string): readonly string[] =>
    layers
      .filter(({ mediaType }) => mediaType === layerTypes + kind)
      .map((layer) => readStored(blob(layer), `the store lacks a part of ${storePrefix}${asked}`));
  return {
    name: storedName(asked),
    file: openModelFile(blob(weights[0] as Layer)),
    digest: createHash("sha256").update(text).digest("hex"),
    settings: {
      system: texts("system")[0] ?? "",
      parameters: jsonOf(texts("params")[0], isRecord, path) ?? {},
      messages: jsonOf(texts("messages")[0], isMessages, path) ?? [],
      licenses: texts("license"),
    },
  };
}

/** "llama3", "me/mine:q4", "host/me/mine" -> the parts of its path in a store. */
function nameParts(asked: string): readonly string[] {
  const words = asked.split("/");
  const [model = "", tag = "latest", ...more] = (words.pop() ?? "").split(":");
  const [namespace = "library", host = "registry.ollama.ai", ...rest] = words.reverse();
  const parts = [host, namespace, model, tag];
  const isName = parts.every((part) => /^[a-zA-Z0-9_][\w.:-]*$/.test(part));
  if (!isName || rest.length > 0 || more.length > 0) {
    throw new HypuraError(
      "usage",
      `${JSON.stringify(storePrefix + asked)} is no name of a model: give ${storePrefix}NAME or ${storePrefix}NAME:TAG`,
    );
  }
  return parts;
}

function manifestPath(asked: string, storePath: string): string {
  return join(storePath, "manifests", ...nameParts(asked));
}

/** As clients will call it: the name with its tag, and whose it is where it is not the library's. */
function storedName(asked: string): string {
  const [, namespace, model, tag] = nameParts(asked);
  return `${namespace === "library" ? "" : `${namespace}/`}${model}:${tag}`;
}

function blobPath({ digest }: Layer, storePath: string, manifest: string): string {
  if (!/^sha256:[0-9a-f]{64}$/.test(digest)) {
    throw new HypuraError(
      "corrupt-model",
      `${JSON.stringify(manifest)} names a blob ${JSON.stringify(digest)}, which is no digest: pull the model again`,
    );
  }
  return join(resolve(storePath), "blobs", digest.replace(":", "-"));
}

function layersOf(text: string, path: string): readonly Layer[] {
  const manifest = jsonOf(text, isRecord, path);
  const layers: unknown = manifest?.["layers"];
  const isLayer = (one: unknown): one is Layer =>
    isRecord(one) && typeof one["mediaType"] === "string" && typeof one["digest"] === "string";
  if (!Array.isArray(layers) || !layers.every(isLayer)) {
    throw new HypuraError(
      "corrupt-model",
      `${JSON.stringify(path)} is no manifest of Ollama's: pull the model again`,
    );
  }
  return layers;
}

function readStored(path: string, sentence: string, suggest: () => readonly string[] = () => []): string {
  try {
    return readFileSync(path, "utf8");
  } catch (cause) {
    const names = suggest();
    const more = names.length > 3 ? ` and ${names.length - 3} more` : "";
    const hint =
      names.length === 0 ? "pull it with ollama first" : `there is ${names.slice(0, 3).join(", ")}${more}`;
    const isMissing = (cause as { readonly code?: string }).code === "ENOENT";
    throw new HypuraError(
      isMissing ? "not-found" : "io",
      isMissing
        ? `${sentence}: ${hint}`
        : `${JSON.stringify(path)} cannot be read (${(cause as Error).message})`,
      { cause },
    );
  }
}

/** What the store's library has, for a message. */
function storedNames(storePath: string): readonly string[] {
  const library = join(storePath, "manifests", "registry.ollama.ai", "library");
  const entries = (folder: string): readonly string[] => {
    try {
      return readdirSync(folder).sort();
    } catch {
      return []; // the list only improves a sentence
    }
  };
  return entries(library).flatMap((model) =>
    entries(join(library, model)).map((tag) => `${storePrefix}${model}:${tag}`),
  );
}

function jsonOf<Value>(
  text: string | undefined,
  is: (value: unknown) => value is Value,
  path: string,
): Value | undefined {
  if (text === undefined) {
    return undefined;
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    value = undefined;
  }
  if (!is(value)) {
    throw new HypuraError(
      "corrupt-model",
      `a part of ${JSON.stringify(path)} is not what Ollama writes: pull the model again`,
    );
  }
  return value;
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isMessages(value: unknown): value is StoredSettings["messages"] {
  return (
    Array.isArray(value) &&
    value.every(
      (one) => isRecord(one) && typeof one["role"] === "string" && typeof one["content"] === "string",
    )
  );
}

// The replies of every /api endpoint as schemas of our own making, after Ollama's published description, and a
// validator of plain functions. Tests of the translation and of the socket check replies against them: fields that
// are missing, of the wrong type, or not known at all are problems.

/** Gives the problems of a value at a place ("$.message.content"). */
export type Schema = (value: unknown, at: string) => readonly string[];

export function problemsOf(schema: Schema, value: unknown): readonly string[] {
  return schema(value, "$");
}

function only(kind: string, is: (value: unknown) => boolean): Schema {
  return (value, at) => (is(value) ? [] : [`${at}: ${JSON.stringify(value) ?? "nothing"} is no ${kind}`]);
}

export const textValue = only("text", (value) => typeof value === "string");
export const flagValue = only("boolean", (value) => typeof value === "boolean");
export const countValue = only("count", (value) => Number.isSafeInteger(value) && (value as number) >= 0);
export const wholeValue = only("whole number", Number.isSafeInteger);
export const numberValue = only("number", (value) => typeof value === "number" && Number.isFinite(value));
export const objectValue = only(
  "object",
  (value) => typeof value === "object" && value !== null && !Array.isArray(value),
);
export const anything: Schema = () => [];

/** RFC 3339 with up to nine digits of a second and a zone. */
export const timeValue = only(
  "RFC 3339 time",
  (value) =>
    typeof value === "string" &&
    /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$/.test(value) &&
    !Number.isNaN(Date.parse(value.replace(/(\.\d{3})\d+/, "$1"))),
);
/** The same in UTC, as chunks are stamped. */
export const utcValue: Schema = (value, at) => [
  ...timeValue(value, at),
  ...(typeof value === "string" && !value.endsWith("Z") ? [`${at}: ${value} does not end in Z`] : []),
];
export const digestValue = only(
  "digest",
  (value) => typeof value === "string" && /^[0-9a-f]{64}$/.test(value),
);

export function constant(expected: unknown): Schema {
  return only(JSON.stringify(expected), (value) => value === expected);
}

export function oneOf(...expected: readonly unknown[]): Schema {
  return only(`one of ${JSON.stringify(expected)}`, (value) => expected.includes(value));
}

export function either(...schemas: readonly Schema[]): Schema {
  return (value, at) => {
    const problems = schemas.map((schema) => schema(value, at));
    return problems.some((list) => list.length === 0) ? [] : (problems[0] ?? []);
  };
}

export function listOf(schema: Schema): Schema {
  return (value, at) =>
    Array.isArray(value)
      ? value.flatMap((one, index) => schema(one, `${at}[${index}]`))
      : [`${at}: ${JSON.stringify(value)} is no list`];
}

/** A field may be left out. Only as `optional` inside `object`. */
interface Optional {
  readonly optional: Schema;
}

export function optional(schema: Schema): Optional {
  return { optional: schema };
}

/** An object with these fields and no others. */
export function object(fields: Readonly<Record<string, Schema | Optional>>): Schema {
  return (value, at) => {
    const wrong = objectValue(value, at);
    if (wrong.length > 0) return wrong;
    const given = value as Readonly<Record<string, unknown>>;
    const known = Object.entries(fields).flatMap(([name, field]) => {
      const isOptional = typeof field !== "function";
      if (!Object.hasOwn(given, name)) return isOptional ? [] : [`${at}.${name}: missing`];
      return (isOptional ? field.optional : field)(given[name], `${at}.${name}`);
    });
    const unknown = Object.keys(given).filter((name) => !Object.hasOwn(fields, name));
    return [...known, ...unknown.map((name) => `${at}.${name}: not known`)];
  };
}

const notEmpty: Schema = (value, at) => (value === "" ? [`${at}: empty, and should be left out`] : []);
const said: Schema = (value, at) => [...textValue(value, at), ...notEmpty(value, at)];

// ---- lines ----------------------------------------------------------------------------------------------------

const probability = object({ token: textValue, logprob: numberValue, bytes: listOf(countValue) });
const logprobs = listOf(
  object({
    token: textValue,
    logprob: numberValue,
    bytes: listOf(countValue),
    top_logprobs: optional(listOf(probability)),
  }),
);

export const toolCall = object({
  id: only("call id", (value) => typeof value === "string" && /^call_[a-z0-9]{8}$/.test(value)),
  function: object({ index: countValue, name: said, arguments: objectValue }),
});

const message = object({
  role: constant("assistant"),
  content: textValue,
  thinking: optional(said),
  tool_calls: optional(listOf(toolCall)),
});

const metrics = {
  total_duration: countValue,
  load_duration: countValue,
  prompt_eval_count: countValue,
  prompt_eval_cached_count: optional(countValue),
  prompt_eval_duration: countValue,
  eval_count: countValue,
  eval_duration: countValue,
};
const optionalMetrics = Object.fromEntries(
  Object.entries(metrics).map(([name, schema]) => [
    name,
    typeof schema === "function" ? optional(schema) : schema,
  ]),
);

const doneReason = oneOf("stop", "length", "load", "unload");

/** Any line of /api/chat, and its one object. */
export const chatLine = object({
  model: said,
  created_at: utcValue,
  message,
  done: flagValue,
  done_reason: optional(doneReason),
  logprobs: optional(logprobs),
  ...optionalMetrics,
});

/** Any line of /api/generate, and its one object. */
export const generateLine = object({
  model: said,
  created_at: utcValue,
  response: textValue,
  thinking: optional(said),
  tool_calls: optional(listOf(toolCall)),
  done: flagValue,
  done_reason: optional(doneReason),
  context: optional(listOf(countValue)),
  logprobs: optional(logprobs),
  ...optionalMetrics,
});

/** What the last line of a generation has whatever the endpoint; its other fields are the line's. */
export const doneLine: Schema = (value, at) => {
  const fields = value as Readonly<Record<string, unknown>>;
  return Object.entries({ ...metrics, done: constant(true), done_reason: oneOf("stop", "length") }).flatMap(
    ([name, schema]) => (typeof schema === "function" ? schema(fields[name], `${at}.${name}`) : []),
  );
};

/** The one object of an empty prompt: no counts. */
export const residenceReply = (dialect: "chat" | "generate"): Schema =>
  object({
    model: said,
    created_at: utcValue,
    ...(dialect === "chat" ? { message } : { response: constant("") }),
    done: constant(true),
    done_reason: oneOf("load", "unload"),
  });

export const renderLine = (dialect: "chat" | "generate"): Schema =>
  object({
    model: said,
    created_at: utcValue,
    ...(dialect === "chat" ? { message } : { response: constant("") }),
    done: constant(false),
    _debug_info: object({ rendered_template: textValue, image_count: countValue }),
  });

export const errorReply = object({ error: said });

// ---- models ---------------------------------------------------------------------------------------------------

const details = {
  parent_model: textValue,
  format: constant("gguf"),
  family: said,
  families: listOf(said),
  parameter_size: said,
  quantization_level: said,
};

const capability = oneOf(
  "completion",
  "tools",
  "insert",
  "vision",
  "embedding",
  "thinking",
  "audio",
  "image",
);

export const tagsReply = object({
  models: listOf(
    object({
      name: said,
      model: said,
      modified_at: timeValue,
      size: countValue,
      digest: digestValue,
      details: object({
        ...details,
        context_length: optional(countValue),
        embedding_length: optional(countValue),
      }),
      capabilities: optional(listOf(capability)),
    }),
  ),
});

export const psReply = object({
  models: listOf(
    object({
      name: said,
      model: said,
      size: countValue,
      digest: digestValue,
      details: object(details),
      expires_at: timeValue,
      size_vram: countValue,
      context_length: countValue,
    }),
  ),
});

export const showReply = object({
  license: optional(said),
  modelfile: textValue,
  parameters: optional(said),
  template: textValue,
  system: optional(said),
  details: object(details),
  messages: optional(listOf(object({ role: said, content: textValue }))),
  model_info: objectValue,
  projector_info: optional(objectValue),
  tensors: optional(listOf(object({ name: said, type: said, shape: listOf(countValue) }))),
  capabilities: listOf(capability),
  modified_at: timeValue,
});

/** The product's own version may stand beside Ollama's. */
export const versionReply = object({
  version: only(
    "version of three numbers",
    (value) => typeof value === "string" && /^\d+\.\d+\.\d+$/.test(value),
  ),
  hypura: optional(said),
});

export const statusReply = object({ cloud: object({ disabled: flagValue, source: said }) });

export const pullLine = object({
  status: said,
  digest: optional(said),
  total: optional(countValue),
  completed: optional(countValue),
});

// ---- embeddings -----------------------------------------------------------------------------------------------

export const embedReply = object({
  model: said,
  embeddings: listOf(listOf(numberValue)),
  total_duration: optional(countValue),
  load_duration: optional(countValue),
  prompt_eval_count: optional(countValue),
});

export const embeddingsReply = object({ embedding: listOf(numberValue) });

// What a row of the table of conformance is, and the pieces that rows are made of: requests, types of content, the
// chunks of a scripted engine. The rows are in conformance.rows.ts and conformance.answers.ts.

/** A reply as a row looks at it. */
export interface Seen {
  readonly status: number;
  readonly headers: Headers;
  readonly text: string;
  /** The text as JSON; undefined where it is none. */
  readonly json: Shape;
  /** The lines of a stream of JSON, each parsed. */
  readonly lines: readonly Shape[];
  /** The data of a stream of events, each parsed; "[DONE]" as it is. */
  readonly events: readonly Shape[];
  /** When the request was sent and when the reply was complete, ms since 1970. */
  readonly sentMs: number;
  readonly doneMs: number;
}

/** A piece of JSON of which a row knows the shape. */
export type Shape = ReturnType<typeof JSON.parse>;

/**
 * plain: a model that generates and no more; able: its template thinks and calls tools, it fills holes; scripted: the
 * same with an engine that says what the row lets it say; embedder: makes vectors and generates nothing.
 */
export type Kind = "plain" | "able" | "scripted" | "embedder";

export interface Row {
  /** Section of the reference, and what it says. */
  readonly line: string;
  readonly on?: Kind;
  readonly ask: readonly [method: string, path: string, body?: object | string];
  readonly headers?: Readonly<Record<string, string>>;
  /** Sent before, its answer not looked at. */
  readonly first?: readonly [method: string, path: string, body?: object | string];
  /** What the scripted engine says to a chat. */
  readonly script?: readonly object[];
  readonly status?: number;
  readonly type?: string;
  /** The whole text. */
  readonly text?: string;
  /** Part of the object that is the reply. */
  readonly json?: object;
  /** Part of the last line of a stream. */
  readonly last?: object;
  /** Anything else; gives false or a sentence where it is wrong. */
  readonly holds?: (seen: Seen) => boolean | string;
}

export const jsonType = "application/json; charset=utf-8";
export const plainType = "text/plain; charset=utf-8";
export const streamType = "application/x-ndjson";
export const eventType = "text/event-stream";

export const few = { num_predict: 3, temperature: 0 };
export const hello = [{ role: "user", content: "Hello" }];
export const chat = { model: "m", messages: hello, options: few };
export const said = { model: "m", prompt: "Hello", options: few };
export const v1 = { model: "m", messages: hello, max_tokens: 3, temperature: 0 };
export const utc = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$/;
export const rfc3339 = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$/;
export const metrics = [
  "total_duration",
  "load_duration",
  "prompt_eval_count",
  "prompt_eval_duration",
  "eval_count",
  "eval_duration",
];
export const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather somewhere",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
export const error = (message: string) => ({ error: message });
export const v1Error = (message: string, type = "invalid_request_error") => ({
  error: { message, type, param: null, code: null },
});

export function delta(change: object, finish: string | null = null): object {
  return { object: "chat.completion.chunk", choices: [{ index: 0, delta: change, finish_reason: finish }] };
}

export const timings = { cache_n: 2, prompt_n: 7, prompt_ms: 5, predicted_n: 4, predicted_ms: 8 };
export function ending(finish: string): object {
  return { ...delta({}, finish), timings };
}

export function callDelta(index: number, name: string, args: string): object {
  return delta({
    tool_calls: [{ index, id: `id${index}`, type: "function", function: { name, arguments: args } }],
  });
}

export const called: readonly object[] = [
  delta({ role: "assistant", content: null }),
  delta({ content: "Let me see." }),
  callDelta(0, "get_weather", ""),
  delta({ tool_calls: [{ index: 0, function: { arguments: '{"city":' } }] }),
  delta({ tool_calls: [{ index: 0, function: { arguments: '"Paris"}' } }] }),
  callDelta(1, "get_weather", '{"city":"Rome"}'),
  ending("tool_calls"),
];
export const thought: readonly object[] = [
  delta({ role: "assistant", content: null }),
  delta({ reasoning_content: "Hm, " }),
  delta({ reasoning_content: "yes." }),
  delta({ content: "Yes" }),
  delta({ content: "!" }),
  ending("stop"),
];

export function textOf({ lines }: Seen): string {
  return lines.map((line) => line.message?.content ?? line.response ?? "").join("");
}

// A request's body -> a JSON object and its typed fields, with the forgivingness of Go's decoder that Ollama's
// clients rely on: keys in any letter case, null as absent, whatever follows the first value ignored. It owns the
// sentences for JSON that is none and for fields of the wrong type; it knows no endpoint. Pure.

import { WireError } from "./wire-error";

/** A JSON object with the keys as sent. */
export type Fields = Readonly<Record<string, unknown>>;

/**
 * Deeper bodies are refused: schemas go through recursive code in the engine, whose stack they must not exhaust.
 * The deepest schemas that clients send have some 20 levels.
 */
const maxDepth = 128;

/** Throws WireError 400. */
export function readBody(text: string): Fields {
  if (text.trim() === "") throw new WireError(400, "missing request body");
  const end = endOfFirstValue(text);
  let value: unknown;
  try {
    value = JSON.parse(end === null ? text : text.slice(0, end));
  } catch (cause) {
    if (end === null) throw new WireError(400, "unexpected EOF", { cause });
    const reason = cause instanceof Error ? cause.message.replace(/^JSON Parse error: /, "") : "unreadable";
    throw new WireError(400, `invalid JSON in the request body: ${reason}`, { cause });
  }
  if (value === null) return {};
  // Half a surrogate pair is no character; Go puts the replacement character in its place, the engine refuses it.
  if (/\\u[dD][89a-fA-F]/.test(text)) value = wellFormed(value);
  if (typeof value !== "object" || Array.isArray(value)) {
    throw new WireError(400, `json: cannot unmarshal ${kindOf(value)} into Go value of type object`);
  }
  return value as Fields;
}

function wellFormed(value: unknown): unknown {
  if (typeof value === "string") return value.toWellFormed();
  if (Array.isArray(value)) return value.map(wellFormed);
  if (!isObject(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key.toWellFormed(), wellFormed(one)]));
}

/** Where the first value of the text ends; null when it does not. Only brackets and strings are looked at. */
function endOfFirstValue(text: string): number | null {
  let depth = 0;
  for (let at = text.search(/\S/); at < text.length; at++) {
    switch (text.charCodeAt(at)) {
      case 0x22: {
        const close = endOfString(text, at);
        if (close === null) return null;
        at = close;
        break;
      }
      case 0x7b:
      case 0x5b:
        depth++;
        if (depth > maxDepth) throw new WireError(400, `the JSON is nested deeper than ${maxDepth} levels`);
        continue;
      case 0x7d:
      case 0x5d:
        depth--;
        break;
      default:
        // A bare number or word: no object, so where it ends makes no difference.
        if (depth === 0) return text.length;
        continue;
    }
    if (depth <= 0) return at + 1;
  }
  return null;
}

/** The closing quote of the string that opens at `start`. Jumps from quote to quote: images are megabytes. */
function endOfString(text: string, start: number): number | null {
  for (let at = text.indexOf('"', start + 1); at !== -1; at = text.indexOf('"', at + 1)) {
    let slashes = 0;
    while (text.charCodeAt(at - 1 - slashes) === 0x5c) slashes++;
    if (slashes % 2 === 0) return at;
  }
  return null;
}

/** What Go calls the kind of a JSON value. */
export function kindOf(value: unknown): string {
  if (Array.isArray(value)) return "array";
  if (typeof value === "boolean") return "bool";
  return value === null ? "null" : typeof value;
}

/** The field by its name, else by its name in other letters; null is as good as absent. */
export function fieldOf(fields: Fields, name: string): unknown {
  if (Object.hasOwn(fields, name)) return fields[name] ?? undefined;
  const lower = name.toLowerCase();
  for (const key of Object.keys(fields)) {
    if (key.toLowerCase() === lower) return fields[key] ?? undefined;
  }
  return undefined;
}

/** Where a value stands, as error sentences name it: "ChatRequest.messages". */
export interface Place {
  readonly struct: string;
  readonly name: string;
}

export function wrongType(value: unknown, place: Place, type: string): WireError {
  return new WireError(
    400,
    `json: cannot unmarshal ${kindOf(value)} into Go struct field ${place.struct}.${place.name} of type ${type}`,
  );
}

/** Readers of one object's fields; each throws WireError 400 on another type. */
export interface Reader {
  readonly fields: Fields;
  text(name: string): string | undefined;
  flag(name: string): boolean | undefined;
  number(name: string): number | undefined;
  /** Floats are an error in Go; they are cut here, as for options. */
  whole(name: string): number | undefined;
  object(name: string): Fields | undefined;
  array(name: string): readonly unknown[] | undefined;
  objects(name: string): readonly Fields[] | undefined;
  texts(name: string): readonly string[] | undefined;
  raw(name: string): unknown;
}

export function readerOf(fields: Fields, struct: string): Reader {
  function typed<Value>(name: string, type: string, is: (value: unknown) => boolean): Value | undefined {
    const value = fieldOf(fields, name);
    if (value === undefined) return undefined;
    if (!is(value)) throw wrongType(value, { struct, name }, type);
    return value as Value;
  }
  function elements<Value>(name: string, type: string, is: (value: unknown) => boolean) {
    const values = typed<readonly unknown[]>(name, `[]${type}`, Array.isArray);
    const wrong = values?.find((value) => !is(value));
    if (wrong !== undefined) throw wrongType(wrong, { struct, name }, type);
    return values as readonly Value[] | undefined;
  }
  const reader: Reader = {
    fields,
    text: (name) => typed<string>(name, "string", isText),
    flag: (name) => typed<boolean>(name, "bool", (value) => typeof value === "boolean"),
    number: (name) => typed<number>(name, "float64", isNumber),
    whole: (name) => {
      const value = typed<number>(name, "int", isNumber);
      return value === undefined ? undefined : Math.trunc(value);
    },
    object: (name) => typed<Fields>(name, "map[string]interface {}", isObject),
    array: (name) => typed<readonly unknown[]>(name, "[]interface {}", Array.isArray),
    objects: (name) => elements<Fields>(name, "object", isObject),
    texts: (name) => elements<string>(name, "string", isText),
    raw: (name) => fieldOf(fields, name),
  };
  return reader;
}

function isText(value: unknown): boolean {
  return typeof value === "string";
}

function isNumber(value: unknown): boolean {
  return typeof value === "number";
}

export function isObject(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const durationUnits: ReadonlyMap<string, number> = new Map([
  ["ns", 1e-9],
  ["us", 1e-6],
  ["µs", 1e-6],
  ["μs", 1e-6],
  ["ms", 1e-3],
  ["s", 1],
  ["m", 60],
  ["h", 3600],
]);

/**
 * Seconds of a keep-alive: a number of seconds, or a duration like "1h30m" or "300ms". Whatever is negative means for
 * ever (Infinity). A number as text without a unit counts as seconds, where Go would refuse it. null: it is none.
 */
export function durationSeconds(value: unknown): number | null {
  if (typeof value === "number") return value < 0 ? Number.POSITIVE_INFINITY : value;
  if (typeof value !== "string") return null;
  const text = value.trim();
  const sign = text.startsWith("-") ? -1 : 1;
  const rest = text.replace(/^[-+]/, "");
  let seconds = 0;
  if (/^(\d+\.?\d*|\.\d+)$/.test(rest)) {
    seconds = Number(rest);
  } else if (/^((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+$/.test(rest)) {
    for (const [, count, unit] of rest.matchAll(/(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)/g)) {
      seconds += Number(count) * (durationUnits.get(unit ?? "") ?? 0);
    }
  } else {
    return null;
  }
  return sign < 0 && seconds > 0 ? Number.POSITIVE_INFINITY : seconds;
}

/**
 * What the engine's grammar builder stands: it matches names by a recursive expression (names of 20,000 characters
 * overflowed its stack) and takes quadratic time in the parts of one object (500 properties 0.2 s, 2,000 17 s) and of
 * one enum (10,000 values 9 s). Measured on llama.cpp v0.5.0.
 */
const maxSchemaName = 256;
const maxSchemaProperties = 500;
const maxSchemaValues = 2000;

/** A JSON schema that the engine can build a grammar of. Throws WireError 400. */
export function checkedSchema(schema: Fields): Fields {
  checkSchemaPart(schema);
  return schema;
}

function checkSchemaPart(part: unknown): void {
  if (Array.isArray(part)) {
    if (part.length > maxSchemaValues) {
      throw new WireError(
        400,
        `a JSON schema may list at most ${maxSchemaValues} values, not ${part.length}`,
      );
    }
    part.forEach(checkSchemaPart);
  } else if (isObject(part)) {
    const entries = Object.entries(part);
    if (entries.length > maxSchemaProperties) {
      throw new WireError(
        400,
        `an object of a JSON schema may have at most ${maxSchemaProperties} properties, not ${entries.length}`,
      );
    }
    for (const [name, value] of entries) {
      if (name.length > maxSchemaName) {
        throw new WireError(400, `a name in a JSON schema may have at most ${maxSchemaName} characters`);
      }
      checkSchemaPart(value);
    }
  }
}

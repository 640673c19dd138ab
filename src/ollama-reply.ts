// The parts of an answer -> lines of Ollama's dialect. It owns the shape of every line and the counts of the last one;
// it knows no socket and no clock: times and ids come in. Pure.

import {
  AnswerReader,
  argumentsOf,
  logprobEntry,
  type TokenChoice,
  type Told,
  type WholeCall,
} from "./answer-parts";
import type { EngineChunk } from "./engine";
import { HypuraError } from "./errors";
import { type Prepared, type Steps, tokenize } from "./ollama-prepare";
import type { GenerateWork, ResidenceWork } from "./ollama-request";
import type { WireError } from "./wire-error";

export interface ReplyContext {
  /** Now, as RFC 3339 in UTC with a `Z`. */
  readonly stamp: () => string;
  /** Monotonic. */
  readonly nowNs: () => number;
  /** When the request was received. */
  readonly receivedNs: number;
  /** Eight of [a-z0-9], another each time. */
  readonly newId: () => string;
}

export interface Reply {
  /** An empty line, legal at any time before the end. */
  heartbeat(): object;
  /** The model is loaded and the request is about to run. */
  begin(prepared: Prepared): void;
  /** Zero or more lines. */
  onChunk(chunk: EngineChunk): readonly object[];
  /** After the last chunk: the lines that remain, the `done: true` line last. */
  end(): Steps<readonly object[]>;
  /** The same as one object, for `stream: false`; instead of `end`. */
  whole(): Steps<object>;
}

/** What one line says beside its model, its time and `done`. */
interface Said {
  readonly text?: string;
  readonly thinking?: string;
  readonly calls?: readonly object[];
  readonly choices?: readonly TokenChoice[];
}

function lineOf(work: GenerateWork, stamp: string, said: Said, done: boolean): Record<string, unknown> {
  const { text = "", thinking = "", calls = [], choices = [] } = said;
  const optional = {
    ...(thinking !== "" && { thinking }),
    ...(calls.length > 0 && { tool_calls: calls }),
  };
  return {
    model: work.asked,
    created_at: stamp,
    ...(work.dialect === "chat"
      ? { message: { role: "assistant", content: text, ...optional } }
      : { response: text, ...optional }),
    done,
    ...(choices.length > 0 && {
      logprobs: choices.map((choice) => logprobEntry(choice, work.topLogprobs)),
    }),
  };
}

/** Lines of one answer, as they come; and all that was said, for the one object and for `context`. */
class OllamaReply implements Reply {
  readonly #work: GenerateWork;
  readonly #context: ReplyContext;
  #begun: { readonly prepared: Prepared; readonly reader: AnswerReader; readonly loadedNs: number } | null =
    null;
  #callCount = 0;
  readonly #said = { text: "", thinking: "", calls: [] as object[], choices: [] as TokenChoice[] };

  constructor(work: GenerateWork, context: ReplyContext) {
    this.#work = work;
    this.#context = context;
  }

  heartbeat(): object {
    return this.#line({}, false);
  }

  begin(prepared: Prepared): void {
    this.#begun = { prepared, reader: new AnswerReader(prepared), loadedNs: this.#context.nowNs() };
  }

  onChunk(chunk: EngineChunk): readonly object[] {
    return this.#tell(this.#running().reader.add(chunk));
  }

  *end(): Steps<readonly object[]> {
    const rest = this.#tell(this.#running().reader.rest());
    return [...rest, { ...this.#line({}, true), ...(yield* this.#ending()) }];
  }

  *whole(): Steps<object> {
    this.#tell(this.#running().reader.rest());
    return { ...this.#line(this.#said, true), ...(yield* this.#ending()) };
  }

  #running() {
    if (this.#begun === null) throw new HypuraError("internal", "a chunk came before its request began");
    return this.#begun;
  }

  #line(said: Said, done: boolean): Record<string, unknown> {
    return lineOf(this.#work, this.#context.stamp(), said, done);
  }

  #tell({ text, thinking, calls, choices }: Told): object[] {
    this.#said.text += text;
    this.#said.thinking += thinking;
    this.#said.choices.push(...choices);
    const lines: object[] = [];
    // Thoughts come before the text; one token's probabilities go with what it brought last.
    if (thinking !== "") lines.push(this.#line({ thinking, ...(text === "" && { choices }) }, false));
    if (text !== "" || (thinking === "" && choices.length > 0))
      lines.push(this.#line({ text, choices }, false));
    return [...lines, ...calls.map((call) => this.#callLine(call))];
  }

  /** A line of its own before the last one: some clients stop reading at `done` before they look for calls. */
  #callLine(call: WholeCall): object {
    const told = {
      id: `call_${this.#context.newId()}`,
      function: {
        index: this.#callCount++,
        name: call.name,
        arguments: argumentsOf(call.arguments) ?? {},
      },
    };
    this.#said.calls.push(told);
    return this.#line({ calls: [told] }, false);
  }

  *#ending(): Steps<object> {
    const { nowNs, receivedNs } = this.#context;
    const { reader, loadedNs } = this.#running();
    const ending = reader.ending();
    const totalNs = nowNs() - receivedNs;
    const context = yield* this.#contextIds();
    const nanoseconds = (milliseconds: number): number => Math.max(0, Math.round(milliseconds * 1e6));
    return {
      done_reason: ending.finish,
      ...(context !== null && { context }),
      total_duration: Math.round(totalNs),
      load_duration: Math.max(1, Math.round(loadedNs - receivedNs)),
      prompt_eval_count: ending.promptTokens,
      prompt_eval_cached_count: ending.cachedTokens,
      prompt_eval_duration: nanoseconds(ending.promptMilliseconds),
      eval_count: ending.generatedTokens,
      eval_duration: nanoseconds(ending.generatedMilliseconds),
    };
  }

  /** /api/generate gives the tokens of prompt and answer back, unless the prompt was raw; null: it does not. */
  *#contextIds(): Steps<readonly number[] | null> {
    if (this.#work.dialect === "chat" || this.#work.source.kind === "text") return null;
    const { body, promptText } = this.#running().prepared;
    const answer = promptText.trimEnd().endsWith("<think>")
      ? `${this.#said.thinking}\n</think>\n\n${this.#said.text}`
      : this.#said.text;
    if ("prompt" in body && Array.isArray(body.prompt)) {
      const ids = yield* tokenize(answer, { special: false, markup: false });
      return [...body.prompt, ...ids];
    }
    // Marks of images mean nothing in another request.
    const text = promptText.replace(/<__media_\w*__>/g, "");
    return yield* tokenize(text + answer, { special: true, markup: true });
  }
}

export function replyFor(work: GenerateWork, context: ReplyContext): Reply {
  return new OllamaReply(work, context);
}

/** The one object of an empty prompt. */
export function residenceReply(work: ResidenceWork, stamp: string): object {
  return {
    model: work.asked,
    created_at: stamp,
    ...(work.dialect === "chat" ? { message: { role: "assistant", content: "" } } : { response: "" }),
    done: true,
    done_reason: work.kind,
  };
}

/** The one object of `_debug_render_only`. */
export function renderReply(prepared: Prepared, stamp: string): object {
  const { work, promptText } = prepared;
  return {
    ...lineOf(work, stamp, {}, false),
    _debug_info: { rendered_template: promptText, image_count: work.imageCount },
  };
}

/** `{"error": ...}`, as body and as last line. */
export function errorReply(error: WireError): object {
  return { error: error.message };
}

// Which schema each reply of the conformance run must keep, by what was asked and what came: every route of the server
// that answers in JSON has one, streamed or not. The schemas are in api-schemas.ts and api-schemas-v1.ts.

import {
  chatLine,
  doneLine,
  embeddingsReply,
  embedReply,
  errorReply,
  generateLine,
  problemsOf,
  psReply,
  pullLine,
  renderLine,
  residenceReply,
  type Schema,
  showReply,
  statusReply,
  tagsReply,
  versionReply,
} from "../api-schemas";
import {
  anthropicError,
  chatChunk,
  chatCompletion,
  countReply,
  embeddingList,
  message,
  messageEvent,
  modelEntry,
  modelList,
  openAiError,
  response,
  responseEvent,
  textCompletion,
} from "../api-schemas-v1";
import type { Seen, Shape } from "./conformance.row";

interface Route {
  /** Of the one object. */
  readonly whole: Schema;
  /** Of each line or event. */
  readonly piece?: Schema;
  /** Of the last line or event, beside. */
  readonly last?: Schema;
}

/** The one object of a generation, of a load, or of a rendering. */
function wholeOf(dialect: "chat" | "generate"): Schema {
  const line = dialect === "chat" ? chatLine : generateLine;
  return (value, at) => {
    const { done_reason: reason, _debug_info: debug } = value as Shape;
    if (debug !== undefined) return renderLine(dialect)(value, at);
    if (reason === "load" || reason === "unload") return residenceReply(dialect)(value, at);
    return [...line(value, at), ...doneLine(value, at)];
  };
}

const routes: Readonly<Record<string, Route>> = {
  "GET /api/version": { whole: versionReply },
  "GET /api/tags": { whole: tagsReply },
  "GET /api/ps": { whole: psReply },
  "GET /api/status": { whole: statusReply },
  "POST /api/show": { whole: showReply },
  "POST /api/chat": { whole: wholeOf("chat"), piece: chatLine, last: doneLine },
  "POST /api/generate": { whole: wholeOf("generate"), piece: generateLine, last: doneLine },
  "POST /api/embed": { whole: embedReply },
  "POST /api/embeddings": { whole: embeddingsReply },
  "POST /api/pull": { whole: pullLine, piece: pullLine },
  "POST /v1/chat/completions": { whole: chatCompletion, piece: chatChunk },
  "POST /v1/completions": { whole: textCompletion, piece: textCompletion },
  "POST /v1/embeddings": { whole: embeddingList },
  "GET /v1/models": { whole: modelList },
  "GET /v1/models/*": { whole: modelEntry },
  "POST /v1/responses": { whole: response, piece: responseEvent },
  "POST /v1/messages": { whole: message, piece: messageEvent },
  "POST /v1/messages/count_tokens": { whole: countReply },
};

/** Routes that a run has to have seen, as `ROUTE` or, streamed, `ROUTE, streamed`. */
export const routesToSee: readonly string[] = Object.entries(routes).flatMap(([route, { piece }]) =>
  piece === undefined ? [route] : [route, `${route}, streamed`],
);

export interface Verdict {
  /** One of `routesToSee`; null where the reply is of no known shape: an error, or no JSON. */
  readonly route: string | null;
  readonly problems: readonly string[];
}

export function verdictOf(method: string, path: string, seen: Seen): Verdict {
  const clean = path.replace(/[?#].*/, "").replace(/(.)\/+$/, "$1");
  const type = seen.headers.get("content-type") ?? "";
  const isError = (value: Shape): boolean => value?.error !== undefined && value?.error !== null;
  const refusal = clean.startsWith("/v1/messages")
    ? anthropicError
    : clean.startsWith("/v1/")
      ? openAiError
      : errorReply;
  if (seen.status >= 400) {
    return {
      route: null,
      problems:
        type.startsWith("application/json") && method !== "HEAD" ? problemsOf(refusal, seen.json) : [],
    };
  }
  const key = `${method} ${clean.startsWith("/v1/models/") ? "/v1/models/*" : clean}`;
  const route = routes[key];
  if (route === undefined) {
    return { route: null, problems: [] };
  }
  const pieces = seen.lines.length > 0 ? seen.lines : seen.events.filter((one) => one !== "[DONE]");
  if (pieces.length === 0) {
    return { route: key, problems: problemsOf(route.whole, seen.json) };
  }
  const isEvents = seen.lines.length === 0;
  // What fails on the way is the last piece, in the words of an error.
  const problems = pieces.flatMap((piece, i) =>
    isError(piece) && i === pieces.length - 1 && !(isEvents && piece.type !== undefined)
      ? problemsOf(refusal, piece)
      : problemsOf(route.piece ?? route.whole, piece),
  );
  const last = pieces.at(-1);
  const ended = route.last === undefined || isError(last) ? [] : problemsOf(route.last, last);
  return { route: `${key}, streamed`, problems: [...problems, ...ended] };
}

// What a client is told when its request is refused or fails: a status and one sentence. The dialects throw it and
// server.ts sends it in the shape of the path (ollama-reply.ts, openai.ts). It knows no socket and no engine; that
// an engine's failures become such errors is decided here, so that every path says the same. Pure.

import { HypuraError } from "./errors";

export class WireError extends HypuraError {
  /** As of HTTP. */
  readonly status: number;

  constructor(status: number, message: string, options?: { readonly cause?: unknown }) {
    super("request", message, options);
    this.name = "WireError";
    this.status = status;
  }
}

/** Ollama's sentence for an engine that is gone; clients know it. */
const engineDied =
  "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, check ollama server logs for details";

/** Two spaces after the full stop, as clients know it. */
export const serverBusy = new WireError(
  503,
  "server busy, please try again.  maximum pending requests exceeded",
);

/** Any failure as the client is told of it. A mistake in hypura itself shows no more than its sentence. */
export function wireErrorOf(error: unknown): WireError {
  if (error instanceof WireError) return error;
  if (!(error instanceof HypuraError)) return new WireError(500, "internal error", { cause: error });
  switch (error.code) {
    case "request":
      return new WireError(statusOf(error), error.message, { cause: error });
    case "cancelled":
      return new WireError(499, "request canceled", { cause: error });
    case "engine":
      return new WireError(500, `${engineDied} (${error.message})`, { cause: error });
    case "usage":
      return new WireError(400, error.message, { cause: error });
    case "not-found":
      return new WireError(404, error.message, { cause: error });
    case "not-a-model":
    case "corrupt-model":
    case "unsupported-model":
    case "not-enough-memory":
    case "io":
    case "internal":
      return new WireError(500, error.message, { cause: error });
  }
}

/** The engine's own refusals carry a status; what it has not got at all is 501 there and here. */
function statusOf(error: HypuraError): number {
  const status = "status" in error ? error.status : undefined;
  return typeof status === "number" && status >= 400 && status <= 599 ? status : 500;
}

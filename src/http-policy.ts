// Who may talk to the server: which Host headers and Origins are let in, and the headers that browsers want to see.
// It owns Ollama's rules for both (a page on the internet must not reach a server on this machine by a name that
// resolves to it, nor by fetch from another origin); it knows no route and no socket. Pure.

import { isIP } from "node:net";

export interface Address {
  readonly hostname: string;
  readonly port: number;
}

/** Ollama's own port, for an OLLAMA_HOST that names none. */
const ollamaPort = 11_434;

/** OLLAMA_HOST: `host`, `host:port`, `:port`, `scheme://host[:port][/path]`, IPv6 in brackets. */
export function parseOllamaHost(text: string): Address {
  const [, scheme = "", rest = ""] =
    /^(?:([a-z]+):\/\/)?([\s\S]*)$/i.exec(text.trim().replace(/^["']|["']$/g, "")) ?? [];
  const usual = scheme === "http" ? 80 : scheme === "https" ? 443 : ollamaPort;
  const place = rest.replace(/\/.*$/, "");
  const match = /^(\[[^\]]*\]|[^:]*)(?::(\d*))?$/.exec(place);
  // Several colons without brackets: an IPv6 address and no port.
  const name = (match === null ? place : (match[1] as string)).replace(/^\[|\]$/g, "");
  const digits = match?.[2] ?? "";
  const port = digits === "" ? usual : Number(digits);
  return { hostname: name === "" ? "127.0.0.1" : name, port: port <= 65_535 ? port : usual };
}

/** Where the server listens, as far as Host headers are concerned. */
export interface Place {
  readonly hostname: string;
  /** This machine's name. */
  readonly machineName: string;
  /** The addresses of its interfaces. */
  readonly ownAddresses: readonly string[];
}

export function isLoopback(hostname: string): boolean {
  const bare = unbracketed(hostname);
  return bare === "localhost" || bare === "::1" || (isIP(bare) === 4 && bare.startsWith("127."));
}

function unbracketed(hostname: string): string {
  return hostname.replace(/^\[|\]$/g, "").toLowerCase();
}

/** Only a server on a loopback address has something to protect: others were opened to the network on purpose. */
export function isHostAllowed(header: string | null, place: Place): boolean {
  if (!isLoopback(place.hostname)) {
    return true;
  }
  const host = hostnameOf(header ?? "");
  if (host === "" || host === "localhost" || host === place.machineName.toLowerCase()) {
    return true;
  }
  if (isIP(host) !== 0) {
    return isLoopback(host) || isPrivate(host) || place.ownAddresses.includes(host);
  }
  return [".localhost", ".local", ".internal"].some((ending) => host.endsWith(ending));
}

function hostnameOf(header: string): string {
  const [, name = ""] = /^(\[[^\]]*\]|[^:]*)(?::\d*)?$/.exec(header.trim()) ?? ["", header];
  return unbracketed(name);
}

/** Private and unspecified addresses (RFC 1918, RFC 4193). */
function isPrivate(address: string): boolean {
  if (isIP(address) === 4) {
    const [a = 0, b = 0] = address.split(".").map(Number);
    return a === 10 || (a === 172 && b >= 16 && b < 32) || (a === 192 && b === 168) || address === "0.0.0.0";
  }
  return /^f[cd]/.test(address) || /^[0:]+$/.test(address);
}

/** Ollama's list: this machine's own pages, desktop applications, editors and browser extensions. */
const usualOrigins: readonly string[] = [
  ...["localhost", "127.0.0.1", "0.0.0.0"].flatMap((host) =>
    ["http", "https"].flatMap((scheme) => [`${scheme}://${host}`, `${scheme}://${host}:*`]),
  ),
  "app://*",
  "file://*",
  "tauri://*",
  "vscode-webview://*",
  "vscode-file://*",
  "chrome-extension://*",
  "moz-extension://*",
  "safari-extension://*",
  "ms-browser-extension://*",
];

/** What a request's Origin is met with: headers for the reply, or a refusal; null: it is no matter of browsers. */
export type OriginVerdict = Readonly<Record<string, string>> | "refused" | null;

/** The rule for `--origins` and OLLAMA_ORIGINS, patterns with at most one `*`. Throws the first that is none. */
export function originRule(
  patterns: readonly string[],
): (origin: string | null, host: string | null) => OriginVerdict {
  const wrong = patterns.find(
    (pattern) => pattern !== "*" && !/^[a-z][a-z0-9+.-]*:\/\/[^*]*\*?[^*]*$/i.test(pattern),
  );
  if (wrong !== undefined) {
    throw new RangeError(wrong);
  }
  const all = patterns.includes("*");
  const matchers = [...usualOrigins, ...patterns].map(matcherOf);
  return (origin, host) => {
    if (origin === null || origin === `http://${host}` || origin === `https://${host}`) {
      return null;
    }
    if (all) {
      return { "access-control-allow-origin": "*" };
    }
    const asked = origin.toLowerCase();
    return matchers.some((matches) => matches(asked))
      ? { "access-control-allow-origin": origin, vary: "Origin" }
      : "refused";
  };
}

function matcherOf(pattern: string): (origin: string) => boolean {
  const [head = "", tail] = pattern.toLowerCase().split("*");
  return tail === undefined
    ? (origin) => origin === head
    : (origin) =>
        origin.length >= head.length + tail.length && origin.startsWith(head) && origin.endsWith(tail);
}

/** Beside the origin, for a browser that asks before it sends. */
export const preflightHeaders: Readonly<Record<string, string>> = {
  "access-control-allow-methods": "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
  "access-control-allow-headers": [
    "Authorization",
    "Content-Type",
    "User-Agent",
    "Accept",
    "X-Requested-With",
    "OpenAI-Beta",
    "x-api-key",
    "anthropic-version",
    "anthropic-beta",
    "x-stainless-arch",
    "x-stainless-async",
    "x-stainless-custom-poll-interval",
    "x-stainless-helper-method",
    "x-stainless-lang",
    "x-stainless-os",
    "x-stainless-package-version",
    "x-stainless-poll-helper",
    "x-stainless-retry-count",
    "x-stainless-runtime",
    "x-stainless-runtime-version",
    "x-stainless-timeout",
  ].join(","),
  "access-control-max-age": "43200",
};

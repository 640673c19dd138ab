// Who is let in, as tables: Host headers, Origins, and the forms of OLLAMA_HOST.

import { describe, expect, test } from "bun:test";
import { isHostAllowed, isLoopback, originRule, parseOllamaHost } from "../../src/http-policy";

describe("OLLAMA_HOST", () => {
  test.each([
    ["", "127.0.0.1", 11434],
    ["1.2.3.4", "1.2.3.4", 11434],
    ["1.2.3.4:5678", "1.2.3.4", 5678],
    [":5678", "127.0.0.1", 5678],
    ["example.com", "example.com", 11434],
    ["http://example.com", "example.com", 80],
    ["https://example.com", "example.com", 443],
    ["http://example.com:8080/path/x", "example.com", 8080],
    ["https://example.com/path", "example.com", 443],
    ["[::1]", "::1", 11434],
    ["[::1]:5678", "::1", 5678],
    ["::1", "::1", 11434],
    ["0.0.0.0", "0.0.0.0", 11434],
    ["1.2.3.4:99999", "1.2.3.4", 11434],
    [' "1.2.3.4:5678" ', "1.2.3.4", 5678],
    ["1.2.3.4:0", "1.2.3.4", 0],
  ])("%j is %s, port %i", (text, hostname, port) => {
    expect(parseOllamaHost(text)).toEqual({ hostname, port });
  });
});

const place = { hostname: "127.0.0.1", machineName: "Heron", ownAddresses: ["203.0.113.7", "2001:db8::7"] };

describe("the Host header", () => {
  test.each([
    [null, true],
    ["", true],
    ["localhost", true],
    ["LOCALHOST:8080", true],
    ["heron", true],
    ["heron:80", true],
    ["app.localhost", true],
    ["mac.local:11434", true],
    ["api.internal", true],
    ["127.0.0.1:8080", true],
    ["127.9.9.9", true],
    ["[::1]:8080", true],
    ["0.0.0.0:1", true],
    ["[::]", true],
    ["10.1.2.3", true],
    ["172.16.0.1", true],
    ["172.32.0.1", false],
    ["192.168.1.9:8080", true],
    ["[fd00::1]", true],
    ["203.0.113.7", true],
    ["[2001:db8::7]:80", true],
    ["203.0.113.8", false],
    ["8.8.8.8", false],
    ["[2001:db8::8]", false],
    ["evil.example", false],
    ["evil.example:8080", false],
    ["localhost.evil.example", false],
    ["127.0.0.1.evil.example", false],
    ["notlocalhost", false],
    ["local", false],
    ["heron.evil.example", false],
    ["evil.example:80:80", false],
    ["a b", false],
  ])("%j: %p", (header, allowed) => {
    expect(isHostAllowed(header, place)).toBe(allowed);
  });

  test("is no matter where the network was let in on purpose", () => {
    expect(isHostAllowed("evil.example", { ...place, hostname: "0.0.0.0" })).toBe(true);
    expect(isHostAllowed("evil.example", { ...place, hostname: "192.168.1.2" })).toBe(true);
    expect(isHostAllowed("evil.example", { ...place, hostname: "localhost" })).toBe(false);
    expect(isHostAllowed("evil.example", { ...place, hostname: "::1" })).toBe(false);
  });

  test("loopback", () => {
    expect(["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"].map(isLoopback)).toEqual(
      Array(5).fill(true),
    );
    expect(["0.0.0.0", "10.0.0.1", "::", "127.evil.example"].map(isLoopback)).toEqual(Array(4).fill(false));
  });
});

describe("the Origin", () => {
  const usual = originRule([]);
  test.each([
    ["http://localhost", true],
    ["https://localhost:3000", true],
    ["http://127.0.0.1:9999", true],
    ["http://0.0.0.0", true],
    ["app://obsidian.md", true],
    ["file://", true],
    ["tauri://localhost", true],
    ["vscode-webview://abc", true],
    ["vscode-file://vscode-app", true],
    ["chrome-extension://abcdef", true],
    ["moz-extension://abcdef", true],
    ["safari-extension://abcdef", true],
    ["ms-browser-extension://abcdef", true],
    ["https://evil.example", false],
    ["http://localhost.evil.example", false],
    ["http://localhosts", false],
    ["http://127.0.0.1.evil.example", false],
    ["null", false],
    ["ftp://localhost", false],
  ])("%s: %p", (origin, allowed) => {
    const verdict = usual(origin, "127.0.0.1:8080");
    expect(verdict).toEqual(allowed ? { "access-control-allow-origin": origin, vary: "Origin" } : "refused");
  });

  test("of the server itself, or none, is no matter", () => {
    expect(usual(null, "h:1")).toBeNull();
    expect(usual("http://h:1", "h:1")).toBeNull();
    expect(usual("https://h:1", "h:1")).toBeNull();
    expect(usual("http://h:2", "h:1")).toBe("refused");
  });

  test("patterns of one's own come beside the usual ones", () => {
    const rule = originRule(["https://*.example.com", "http://tool"]);
    expect(rule("https://chat.example.com", "h")).toMatchObject({ vary: "Origin" });
    expect(rule("https://example.com", "h")).toBe("refused");
    expect(rule("http://tool", "h")).toMatchObject({ vary: "Origin" });
    expect(rule("http://tool:1", "h")).toBe("refused");
    expect(rule("http://localhost", "h")).toMatchObject({ vary: "Origin" });
  });

  test("a lone * is everybody", () => {
    expect(originRule(["*"])("https://evil.example", "h")).toEqual({ "access-control-allow-origin": "*" });
  });

  test.each(["example.com", "https://*.*", "", "**"])("%j is no pattern", (pattern) => {
    expect(() => originRule([pattern])).toThrow(RangeError);
  });
});

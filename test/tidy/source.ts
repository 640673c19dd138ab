// Source text without what is not code: comments, and where asked the insides of strings, become blanks. What is
// left keeps its offsets and lines. For C++ and TypeScript; a lexer of a screen or two, not a parser: it knows nothing
// of what the code means.

export interface Blanks {
  /** Blank the insides of strings too; quotes stay. */
  readonly strings: boolean;
}

/** `text` with comments (and strings) blanked. */
export function codeOf(text: string, blanks: Blanks): string {
  const out =
    [...text].length === text.length
      ? text.split("")
      : Array.from({ length: text.length }, (_, i) => text[i] ?? "");
  lex(text, (from, to, isString) => {
    if (!isString || blanks.strings) {
      for (let i = from; i < to; i++) {
        if (out[i] !== "\n") {
          out[i] = " ";
        }
      }
    }
  });
  return out.join("");
}

type Found = (from: number, to: number, isString: boolean) => void;

function lex(text: string, found: Found): void {
  // Depths of braces at which a template's ${ } ends.
  const templates: number[] = [];
  let depth = 0;
  let at = 0;
  while (at < text.length) {
    const two = text.slice(at, at + 2);
    const one = text[at] as string;
    if (two === "//" || two === "/*") {
      const end = two === "//" ? text.indexOf("\n", at) : text.indexOf("*/", at + 2);
      const next = end < 0 ? text.length : two === "//" ? end : end + 2;
      found(at, next, false);
      at = next;
    } else if (one === "/" && startsPattern(text, at)) {
      const next = endOfPattern(text, at);
      found(at + 1, next - 1, true);
      at = next;
    } else if (one === '"' || (one === "'" && !/[0-9a-fA-F]/.test(text[at - 1] ?? ""))) {
      const next = endOfString(text, at);
      found(at + 1, next - 1, true);
      at = next;
    } else if (one === "`" || (one === "}" && templates.at(-1) === depth)) {
      if (one === "}") {
        templates.pop();
      }
      const next = endOfTemplatePart(text, at + 1);
      const opens = text[next - 1] === "{";
      found(at + 1, next - (opens ? 2 : 1), true);
      if (opens) {
        templates.push(depth);
      }
      at = next;
    } else {
      depth += one === "{" ? 1 : one === "}" ? -1 : 0;
      at++;
    }
  }
}

/** After the closing quote, or at the end of a line that has none. */
function endOfString(text: string, start: number): number {
  const quote = text[start];
  for (let i = start + 1; i < text.length; i++) {
    if (text[i] === "\\") {
      i++;
    } else if (text[i] === quote || text[i] === "\n") {
      return i + 1;
    }
  }
  return text.length;
}

/** After the closing backtick, or after the `${` that comes first. */
function endOfTemplatePart(text: string, start: number): number {
  for (let i = start; i < text.length; i++) {
    if (text[i] === "\\") {
      i++;
    } else if (text[i] === "`") {
      return i + 1;
    } else if (text[i] === "$" && text[i + 1] === "{") {
      return i + 2;
    }
  }
  return text.length;
}

/** Whether the slash starts a regular expression: a value before it would make it a division. */
function startsPattern(text: string, at: number): boolean {
  const before = text.slice(Math.max(0, at - 40), at).trimEnd();
  return before === "" || /[(,=:[!&|?{};<>+]$|\breturn$|\bof$|=>$/.test(before);
}

function endOfPattern(text: string, start: number): number {
  let inClass = false;
  for (let i = start + 1; i < text.length && text[i] !== "\n"; i++) {
    if (text[i] === "\\") {
      i++;
    } else if (text[i] === "[") {
      inClass = true;
    } else if (text[i] === "]") {
      inClass = false;
    } else if (text[i] === "/" && !inClass) {
      return i + 1;
    }
  }
  return start + 1;
}

export interface Import {
  /** As written: "./plan", "node:fs". */
  readonly from: string;
  /** `import type` and `export type ... from`: gone at run time. */
  readonly isType: boolean;
  readonly line: number;
}

/** What a TypeScript module imports: statements, re-exports, `import()` and `require()`. */
export function importsOf(text: string): readonly Import[] {
  const code = codeOf(text, { strings: false });
  const forms = [
    /^[ \t]*(?:import|export)\s+(type\s+)?(?:[\w*{][^;"'`]*?\s)?from\s*["']([^"']+)["']/gm,
    /^[ \t]*import\s+()["']([^"']+)["']/gm,
    /\b(?:import|require)\s*\(\s*()["']([^"']+)["']/g,
  ];
  return forms.flatMap((form) =>
    [...code.matchAll(form)].map((match) => ({
      from: match[2] as string,
      isType: (match[1] ?? "") !== "",
      line: lineAt(text, match.index + match[0].length),
    })),
  );
}

export interface Include {
  /** As written, between the quotes or the angles. */
  readonly name: string;
  readonly isSystem: boolean;
  readonly line: number;
}

export function includesOf(text: string): readonly Include[] {
  return [
    ...codeOf(text, { strings: false }).matchAll(/^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]/gm),
  ].map((match) => ({
    name: match[2] as string,
    isSystem: match[1] === "<",
    line: lineAt(text, match.index + match[0].length),
  }));
}

/** The line, from 1, that holds this offset. */
export function lineAt(text: string, offset: number): number {
  return text.slice(0, offset).split("\n").length;
}

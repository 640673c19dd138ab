// Numbers and pictures for people. The only file that says "GB", and it means 10^9 bytes. Pure.

const byteUnits = ["B", "KB", "MB", "GB", "TB"] as const;

/** 98_362_432 -> "98.4 MB". Decimal units, three significant digits. */
export function bytesText(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < byteUnits.length - 1) {
    value /= 1000;
    unit++;
  }
  return `${unit === 0 ? value.toFixed(0) : significant(value)} ${byteUnits[unit]}`;
}

/** 2_450_000_000 -> "2.45 GB/s". */
export function bandwidthText(bytesPerSecond: number): string {
  return `${bytesText(bytesPerSecond)}/s`;
}

/** 171_000_000_000 -> "171 GFLOP/s". */
export function flopsText(flopsPerSecond: number): string {
  const giga = flopsPerSecond / 1e9;
  return giga < 999.5 ? `${significant(giga)} GFLOP/s` : `${significant(giga / 1000)} TFLOP/s`;
}

/** 0.0124 -> "12.4 ms"; 75 -> "1 min 15 s". */
export function durationText(seconds: number): string {
  if (seconds < 1e-3) {
    return `${significant(seconds * 1e6)} us`;
  }
  if (seconds < 1) {
    return `${significant(seconds * 1e3)} ms`;
  }
  if (seconds < 60) {
    return `${significant(seconds)} s`;
  }
  const whole = Math.round(seconds);
  if (whole < 3600) {
    return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  }
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** 12_345_678 -> "12,345,678". */
export function countText(count: number): string {
  return count.toLocaleString("en-US");
}

/** 134_515_008 -> "135 M": parameters, tokens. */
export function shortCountText(count: number): string {
  const units = ["", " K", " M", " B", " T"];
  let value = count;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  return unit === 0 ? String(value) : `${significant(value)}${units[unit]}`;
}

/** 12.345 -> "12.3 tok/s". */
export function rateText(tokensPerSecond: number): string {
  return `${significant(tokensPerSecond)} tok/s`;
}

/** "2", "2G", "2.5 GB", "2048MiB" -> bytes; null when it is no size. A bare number is bytes. */
export function parseBytes(text: string): number | null {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$/i.exec(text);
  if (match === null) {
    return null;
  }
  const power = "kmgt".indexOf((match[2] ?? "").toLowerCase()) + (match[2] === "" ? 0 : 1);
  const base = match[3] === "" ? 1000 : 1024;
  const bytes = Number(match[1]) * base ** power;
  return Number.isSafeInteger(Math.round(bytes)) ? Math.round(bytes) : null;
}

const barParts = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"] as const;

/** A bar of `width` cells, exact to an eighth: "█████▍░░". What is there at all is seen. `fraction` is held to 0..1. */
export function bar(fraction: number, width: number): string {
  const share = Math.min(1, Math.max(0, fraction)) * width * 8;
  const eighths = fraction > 0 ? Math.max(1, Math.round(share)) : 0;
  const drawn = "█".repeat(Math.floor(eighths / 8)) + barParts[eighths % 8];
  return drawn + "░".repeat(width - drawn.length);
}

/** Rows with columns padded to equal width, two spaces apart; numbers (by `right`) flush right. */
export function table(rows: readonly (readonly string[])[], right: readonly number[] = []): string {
  const widths: number[] = [];
  for (const row of rows) {
    for (const [column, cell] of row.entries()) {
      widths[column] = Math.max(widths[column] ?? 0, Bun.stringWidth(cell));
    }
  }
  const pad = (cell: string, column: number): string => {
    const space = " ".repeat((widths[column] ?? 0) - Bun.stringWidth(cell));
    return right.includes(column) ? space + cell : cell + space;
  };
  return rows.map((row) => row.map(pad).join("  ").trimEnd()).join("\n");
}

/** Control characters made visible, so that text from a file cannot move a cursor or colour a terminal. */
export function printable(text: string): string {
  return text.replace(/[\x00-\x1f\x7f-\x9f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

/** One line without control characters, for a message that quotes what a file or a library said. */
export function oneLine(text: string): string {
  return printable(text.trim().replace(/\s*[\r\n]+\s*/g, " "));
}

/** Text as it goes to a terminal: its lines and tabs stay, whatever else could steer the terminal is shown. */
export function terminalText(text: string): string {
  return text.replace(/[^\x00-\x1f\x7f-\x9f]+|[\n\t]|[\s\S]/g, (part) =>
    part.length === 1 && part !== "\n" && part !== "\t" ? printable(part) : part,
  );
}

/** The text, or its beginning and an ellipsis, in at most `width` columns. */
export function clip(text: string, width: number): string {
  if (Bun.stringWidth(text) <= width) {
    return text;
  }
  let kept = "";
  let used = 0;
  for (const character of text) {
    used += Bun.stringWidth(character);
    if (used > width - 1) {
      break;
    }
    kept += character;
  }
  return `${kept}…`;
}

/** "1 file", "3 files". */
export function plural(count: number, noun: string): string {
  return `${countText(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** The candidate that a mistyped word most likely means; null when none is near. */
export function nearest(word: string, candidates: readonly string[]): string | null {
  let best: string | null = null;
  let bestDistance = Math.max(2, Math.ceil(word.length / 3)) + 1;
  for (const candidate of candidates) {
    const distance = candidate.startsWith(word) && word.length > 1 ? 1 : editDistance(word, candidate);
    if (distance < bestDistance) {
      best = candidate;
      bestDistance = distance;
    }
  }
  return bestDistance < Math.max(word.length, 2) ? best : null;
}

/** Letters to insert, remove or replace to make one word of the other (Levenshtein). */
function editDistance(one: string, other: string): number {
  let row = Array.from({ length: other.length + 1 }, (_, column) => column);
  for (const [i, letter] of [...one].entries()) {
    const next = [i + 1];
    for (let j = 0; j < other.length; j++) {
      const replaced = (row[j] as number) + (other[j] === letter ? 0 : 1);
      next.push(Math.min(replaced, (row[j + 1] as number) + 1, (next[j] as number) + 1));
    }
    row = next;
  }
  return row[other.length] as number;
}

function significant(value: number): string {
  const size = Math.abs(value);
  return value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

// Makes the one executable out of libraries and TypeScript, and judges a finished one: whether it is whole and, for
// macOS, whether its signature holds. Used by the build (one library, this machine's own) and by releases (one for each
// CPU variant, also of other platforms). Imports no npm package.

import { closeSync, mkdirSync, openSync, readFileSync, readSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { runQuietly } from "./cmake";
import { hashOf } from "./library";
import { isMachO, signatureFault } from "./macho";

const root = join(import.meta.dir, "..");

export interface LibraryFile {
  readonly variant: string;
  readonly needs: readonly string[];
  readonly file: string;
}

export interface ExecutableOptions {
  /** Best first. */
  readonly libraries: readonly LibraryFile[];
  readonly outfile: string;
  /** Bun's name of another platform; this one without. */
  readonly bunTarget?: string;
  /** zstd's; a release takes its time. */
  readonly level?: number;
}

/** Writes the entry that carries the libraries; generated because its imports exist only after the build. */
function writeEntry({ libraries, bunTarget = "here", level = 3 }: ExecutableOptions): string {
  const folder = join(root, "build", "executable", bunTarget);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const up = relative(folder, root);
  const imports: string[] = [];
  const table: string[] = [];
  for (const [index, { variant, needs, file }] of libraries.entries()) {
    const bytes = readFileSync(file);
    const name = `libhypura-${variant}.zst`;
    writeFileSync(join(folder, name), Bun.zstdCompressSync(bytes, { level }));
    imports.push(`import path${index} from "./${name}" with { type: "file" };`);
    const facts = JSON.stringify({ variant, needs, sizeBytes: bytes.byteLength, hash: hashOf(bytes) });
    table.push(`  { ...${facts}, path: path${index} },`);
  }
  const entry = join(folder, "hypura.ts");
  writeFileSync(
    entry,
    `${imports.join("\n")}
import { embedLibraries } from "${up}/ffi/native";
import { main } from "${up}/src/main";

embedLibraries([
${table.join("\n")}
]);
await main();
`,
  );
  return entry;
}

export async function makeExecutable(options: ExecutableOptions): Promise<void> {
  mkdirSync(dirname(options.outfile), { recursive: true });
  // Bytecode halves the start (44 to 14 ms) and needs ESM; a bunfig.toml or .env where a user happens to stand
  // must not run code in hypura.
  const flags = [
    "--compile",
    "--minify",
    "--bytecode",
    "--format=esm",
    "--no-compile-autoload-bunfig",
    "--no-compile-autoload-dotenv",
    ...(options.bunTarget === undefined ? [] : [`--target=${options.bunTarget}`]),
  ];
  const entry = writeEntry(options);
  await runQuietly([process.execPath, "build", ...flags, entry, "--outfile", options.outfile], root);
  const fault = faultOf(options.outfile);
  if (fault !== null) {
    throw new Error(fault);
  }
}

/** What is wrong with a finished executable, as a sentence; null where nothing is. Runs nothing. */
export function faultOf(file: string): string | null {
  if (isMachO(file)) {
    const fault = signatureFault(file);
    return fault === null ? null : `${file} would be killed by macOS: ${fault}`;
  }
  return isStripped(file)
    ? `${file} was stripped, which cuts hypura out of it and leaves a bare Bun: package it as it was built ` +
        "(Debian: override_dh_strip; RPM: %global __strip /bin/true; Nix: dontStrip = true)"
    : null;
}

/**
 * Bun keeps the program in a section of its own, and its address in a word that lies in no section. `strip` copies
 * sections only, so that word becomes zero, and what starts is Bun alone. It looks for the word.
 */
function isStripped(file: string): boolean {
  const header = readAt(file, 0, 64);
  if (header.toString("latin1", 0, 4) !== "\x7fELF") {
    throw new Error(`${file} is no executable for Linux or macOS`);
  }
  const program = findSection(file, header, ".bun");
  if (program === null) {
    return true;
  }
  const word = Buffer.alloc(8);
  word.writeBigUInt64LE(program.address);
  const { offset } = segmentAround(file, header, program.offset);
  return !readAt(file, offset, program.offset - offset).includes(word);
}

interface Section {
  readonly offset: number;
  readonly address: bigint;
}

/** ELF-64, little-endian: elf(5), Elf64_Shdr. */
function findSection(file: string, header: Buffer, wanted: string): Section | null {
  const entryBytes = header.readUInt16LE(58);
  const table = readAt(file, Number(header.readBigUInt64LE(40)), entryBytes * header.readUInt16LE(60));
  const entries = Array.from({ length: table.length / entryBytes }, (_, index) =>
    table.subarray(index * entryBytes, (index + 1) * entryBytes),
  );
  const place = (entry: Buffer): number => Number(entry.readBigUInt64LE(24));
  const namesEntry = entries[header.readUInt16LE(62)];
  if (namesEntry === undefined) {
    return null;
  }
  const names = readAt(file, place(namesEntry), Number(namesEntry.readBigUInt64LE(32)));
  for (const entry of entries) {
    const at = entry.readUInt32LE(0);
    if (names.toString("latin1", at, names.indexOf(0, at)) === wanted) {
      return { offset: place(entry), address: entry.readBigUInt64LE(16) };
    }
  }
  return null;
}

/** The loaded segment that holds the byte at `offset` (Elf64_Phdr). */
function segmentAround(file: string, header: Buffer, offset: number): { readonly offset: number } {
  const [load, entryBytes] = [1, header.readUInt16LE(54)];
  const table = readAt(file, Number(header.readBigUInt64LE(32)), entryBytes * header.readUInt16LE(56));
  for (let at = 0; at < table.length; at += entryBytes) {
    const begin = Number(table.readBigUInt64LE(at + 8));
    const end = begin + Number(table.readBigUInt64LE(at + 32));
    if (table.readUInt32LE(at) === load && begin <= offset && offset < end) {
      return { offset: begin };
    }
  }
  throw new Error(`${file} has a program that no segment loads`);
}

function readAt(file: string, offset: number, bytes: number): Buffer {
  const buffer = Buffer.alloc(bytes);
  const descriptor = openSync(file, "r");
  try {
    if (readSync(descriptor, buffer, 0, bytes, offset) < bytes) {
      throw new Error(`${file} ends before byte ${offset + bytes}: it is cut off`);
    }
    return buffer;
  } finally {
    closeSync(descriptor);
  }
}

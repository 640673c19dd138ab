// Reads what macOS checks before it starts an arm64 executable: the code signature inside a Mach-O file, ad-hoc or not,
// and the hash of each page in it. It exists because a cross-built executable can be checked on any machine, and one
// with a wrong hash is killed on a Mac without a word. Mach-O from loader.h, the signature from cs_blobs.h.

import { closeSync, openSync, readFileSync, readSync } from "node:fs";

const machO64 = 0xfeedfacf;
const codeSignatureCommand = 0x1d;
const superBlob = 0xfade0cc0;
const codeDirectory = 0xfade0c02;
const sha256Type = 2;

export function isMachO(file: string): boolean {
  const head = Buffer.alloc(4);
  const descriptor = openSync(file, "r");
  try {
    return readSync(descriptor, head, 0, 4, 0) === 4 && head.readUInt32LE(0) === machO64;
  } finally {
    closeSync(descriptor);
  }
}

/** Why the signature does not hold, as a clause; null where it does. */
export function signatureFault(file: string): string | null {
  const bytes = readFileSync(file);
  const signature = findSignature(bytes);
  if (signature === null) {
    return "it has no code signature";
  }
  if (signature.offset + signature.size > bytes.length) {
    return "it is cut off before the end of its code signature";
  }
  const blob = bytes.subarray(signature.offset, signature.offset + signature.size);
  const directory = findDirectory(blob);
  if (directory === null) {
    return "its code signature holds no code directory";
  }
  return pageFault(bytes.subarray(0, signature.offset), directory);
}

function findSignature(bytes: Buffer): { readonly offset: number; readonly size: number } | null {
  const commandCount = bytes.readUInt32LE(16);
  let at = 32;
  for (let i = 0; i < commandCount; i++) {
    if (bytes.readUInt32LE(at) === codeSignatureCommand) {
      return { offset: bytes.readUInt32LE(at + 8), size: bytes.readUInt32LE(at + 12) };
    }
    at += bytes.readUInt32LE(at + 4);
  }
  return null;
}

function findDirectory(blob: Buffer): Buffer | null {
  if (blob.readUInt32BE(0) !== superBlob) {
    return null;
  }
  const found: Buffer[] = [];
  const count = blob.readUInt32BE(8);
  for (let i = 0; i < count; i++) {
    const directory = blob.subarray(blob.readUInt32BE(12 + i * 8 + 4));
    if (directory.readUInt32BE(0) === codeDirectory) {
      found.push(directory);
    }
  }
  // codesign may write one for each kind of hash; macOS takes the strongest.
  return found.find((directory) => directory.readUInt8(37) === sha256Type) ?? found[0] ?? null;
}

function pageFault(code: Buffer, directory: Buffer): string | null {
  const [hashOffset, slotCount, codeLimit] = [16, 28, 32].map((at) => directory.readUInt32BE(at)) as [
    number,
    number,
    number,
  ];
  const [hashBytes, hashType] = [directory.readUInt8(36), directory.readUInt8(37)];
  const pageBytes = 2 ** directory.readUInt8(39);
  if (hashType !== sha256Type) {
    return `its pages are hashed with type ${hashType}, not with SHA-256`;
  }
  if (codeLimit !== code.length || slotCount !== Math.ceil(codeLimit / pageBytes)) {
    return `its signature covers ${codeLimit} bytes of ${code.length}`;
  }
  for (let page = 0; page < slotCount; page++) {
    const at = hashOffset + page * hashBytes;
    const wanted = directory.subarray(at, at + hashBytes);
    const found = new Bun.CryptoHasher("sha256")
      .update(code.subarray(page * pageBytes, Math.min(codeLimit, (page + 1) * pageBytes)))
      .digest();
    if (!wanted.equals(found)) {
      return `page ${page} of ${slotCount} has another hash than its signature says`;
    }
  }
  return null;
}

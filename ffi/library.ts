// What the builder of libhypura (build.ts) and its loader (native.ts) must agree on: the file's name and its hash.

export const libraryName = process.platform === "darwin" ? "libhypura.dylib" : "libhypura.so";

/** xxHash64 as 16 hexadecimal digits: guards against damage, not against an attacker. */
export function hashOf(bytes: Uint8Array): string {
  return Bun.hash.xxHash64(bytes).toString(16).padStart(16, "0");
}

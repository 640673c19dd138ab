// What the makers of libhypura (build.ts, release.ts) and its loader (native.ts) must agree on: the file's name, its hash,
// and how an executable carries several of them.

/** The library's name on a platform. */
export function libraryNameOn(platform: string): string {
  return platform === "darwin" ? "libhypura.dylib" : "libhypura.so";
}

export const libraryName = libraryNameOn(process.platform);

/** xxHash64 as 16 hexadecimal digits: guards against damage, not against an attacker. */
export function hashOf(bytes: Uint8Array): string {
  return Bun.hash.xxHash64(bytes).toString(16).padStart(16, "0");
}

/** One library inside the executable. */
export interface EmbeddedLibrary {
  readonly variant: string;
  /** What the processor must have, as ffi/processor.ts names it; a library of this machine's own build needs nothing. */
  readonly needs: readonly string[];
  /** Where Bun shows the bytes inside the executable, compressed by zstd. */
  readonly path: string;
  /** Of the library itself. */
  readonly sizeBytes: number;
  /** hashOf the library itself. */
  readonly hash: string;
}

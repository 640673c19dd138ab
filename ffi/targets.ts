// The platforms that releases are made for, and the variants of ggml's CPU kernels in each: one table that the release,
// the cross compiler, the CMake build and the loader's choice agree on. It knows no file, no tool and no machine.
//
// Why several libraries in one executable: only ggml-cpu depends on the instruction set, and its C++ is full of inline
// functions and templates that a linker folds into one copy. Two variants in one library would share such a copy, and
// the copy that stays may hold instructions that the machine has not. A library for each variant cannot mix them; the
// loader takes one, and the rest cost disk only (4 MB each, compressed), no memory and no start time.

export type TargetName = "linux-x64" | "linux-arm64" | "darwin-arm64";

export interface Target {
  readonly name: TargetName;
  readonly platform: "linux" | "darwin";
  readonly arch: "x64" | "arm64";
  /** For zig; a C library of 2017's long-term systems, which is also the oldest that Bun runs on. */
  readonly triple: string;
  readonly bun: string;
  /** Best first; the last one is the least that the target runs on. */
  readonly variants: readonly Variant[];
}

export interface Variant {
  readonly name: string;
  /** What the machine must have, as Linux names it in /proc/cpuinfo. */
  readonly needs: readonly string[];
  /** On top of the baseline's compiler flags. */
  readonly flags: readonly string[];
}

const v3 = ["avx2", "fma", "f16c", "bmi2", "sse4_2"] as const;
const v4 = [...v3, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"] as const;
const v4Flags = ["-mavx512f", "-mavx512cd", "-mavx512vl", "-mavx512dq", "-mavx512bw"] as const;
const vnni = ["avx512vbmi", "avx512_vnni"] as const;
const vnniFlags = ["-mavx512vbmi", "-mavx512vnni"] as const;

/** Intel and AMD by what their processors have together; the names say from which one on. */
const x64: readonly Variant[] = [
  // Zen 4 and 5, Sapphire Rapids.
  {
    name: "avx512-bf16",
    needs: [...v4, ...vnni, "avx512_bf16"],
    flags: [...v4Flags, ...vnniFlags, "-mavx512bf16"],
  },
  // Ice Lake, Tiger Lake, Rocket Lake.
  { name: "avx512-vnni", needs: [...v4, ...vnni], flags: [...v4Flags, ...vnniFlags] },
  // Skylake-X, Cascade Lake.
  { name: "avx512", needs: v4, flags: v4Flags },
  // Alder Lake and later desktops, which have no AVX-512.
  { name: "avx2-vnni", needs: [...v3, "avx_vnni"], flags: ["-mavxvnni"] },
  { name: "avx2", needs: v3, flags: [] },
];

/** Every Apple processor from M1 has the baseline; i8mm came with M2. */
const arm64: readonly Variant[] = [
  { name: "i8mm", needs: ["asimddp", "fphp", "i8mm"], flags: ["-march=armv8.6-a+dotprod+fp16+i8mm"] },
  { name: "dotprod", needs: ["asimddp", "fphp"], flags: [] },
];

export const targets: Readonly<Record<TargetName, Target>> = {
  "linux-x64": {
    name: "linux-x64",
    platform: "linux",
    arch: "x64",
    triple: "x86_64-linux-gnu.2.17",
    bun: "bun-linux-x64",
    variants: x64,
  },
  "linux-arm64": {
    name: "linux-arm64",
    platform: "linux",
    arch: "arm64",
    triple: "aarch64-linux-gnu.2.17",
    bun: "bun-linux-arm64",
    variants: arm64,
  },
  "darwin-arm64": {
    name: "darwin-arm64",
    platform: "darwin",
    arch: "arm64",
    triple: "aarch64-macos.13.0",
    bun: "bun-darwin-arm64",
    variants: arm64,
  },
};

/** The first that the features allow; null where the machine has less than the least. */
export function bestFor<Needing extends Pick<Variant, "needs">>(
  choices: readonly Needing[],
  features: ReadonlySet<string>,
): Needing | null {
  return choices.find(({ needs }) => needs.every((one) => features.has(one))) ?? null;
}

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
  /** For zig; glibc 2.17 is of 2012, and the oldest that Bun runs on. */
  readonly triple: string;
  /** What every machine of the target has. x64 has ggml's own switches for it. */
  readonly baseline: Flags | null;
  readonly bun: string;
  /** Best first; the last one is the least that the target runs on. */
  readonly variants: readonly Variant[];
}

export interface Variant {
  readonly name: string;
  /** What the machine must have, as Linux names it in /proc/cpuinfo (how it is asked: processor.ts). */
  readonly needs: readonly string[];
  /** On top of the baseline's; null for the baseline itself. */
  readonly flags: Flags | null;
}

/** One instruction set, as gcc and clang say it and as zig does, which reads -march in its own way. */
export interface Flags {
  readonly host: string;
  readonly zig: string;
}

const v3 = ["avx2", "fma", "f16c", "bmi2", "sse4_2"] as const;
const v4Vnni = [...v3, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512_vnni"] as const;
const v4VnniFlags = ["-mavx512f", "-mavx512cd", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx512vnni"];

/** Clang, as zig has it, keeps vectors of 512 bits behind a switch of their own; gcc 12 does not know that one. */
function wideFlags(...flags: readonly string[]): Flags {
  return { host: flags.join(" "), zig: ["-mevex512", ...flags].join(" ") };
}

/** Intel and AMD by what their processors have together; the comments say which are the first. */
const x64: readonly Variant[] = [
  // Zen 4, Sapphire Rapids.
  {
    name: "avx512-bf16",
    needs: [...v4Vnni, "avx512vbmi", "avx512_bf16"],
    flags: wideFlags(...v4VnniFlags, "-mavx512vbmi", "-mavx512bf16"),
  },
  // Cascade Lake, Ice Lake.
  { name: "avx512-vnni", needs: v4Vnni, flags: wideFlags(...v4VnniFlags) },
  // Alder Lake, and later desktops of Intel.
  { name: "avx2-vnni", needs: [...v3, "avx_vnni"], flags: { host: "-mavxvnni", zig: "-mavxvnni" } },
  { name: "avx2", needs: v3, flags: null },
];

const dotprod: Flags = { host: "-march=armv8.2-a+dotprod+fp16", zig: "-mcpu=generic+v8_2a+dotprod+fullfp16" };
/** Not armv8.6-a, which has i8mm but also instructions that nobody asks the machine for: Neoverse V1 lacks some. */
const i8mm: Flags = {
  host: "-march=armv8.2-a+dotprod+fp16+i8mm",
  zig: "-mcpu=generic+v8_2a+dotprod+fullfp16+i8mm",
};
/** For macOS, clang's own headers want all that an M1 has. */
const [m1, m2]: readonly [Flags, Flags] = [
  { host: "-mcpu=apple-m1", zig: "-mcpu=apple_m1" },
  { host: "-mcpu=apple-m2", zig: "-mcpu=apple_m2" },
];

/** AWS's processors have the baseline from Graviton 2, i8mm from Graviton 3; Apple's from M1 and M2. */
function arm64(more: Flags): readonly Variant[] {
  return [
    { name: "i8mm", needs: ["asimddp", "asimdhp", "i8mm"], flags: more },
    { name: "dotprod", needs: ["asimddp", "asimdhp"], flags: null },
  ];
}

export const targets: Readonly<Record<TargetName, Target>> = {
  "linux-x64": {
    name: "linux-x64",
    platform: "linux",
    arch: "x64",
    triple: "x86_64-linux-gnu.2.17",
    baseline: null,
    bun: "bun-linux-x64",
    variants: x64,
  },
  "linux-arm64": {
    name: "linux-arm64",
    platform: "linux",
    arch: "arm64",
    triple: "aarch64-linux-gnu.2.17",
    baseline: dotprod,
    bun: "bun-linux-arm64",
    variants: arm64(i8mm),
  },
  "darwin-arm64": {
    name: "darwin-arm64",
    platform: "darwin",
    arch: "arm64",
    triple: "aarch64-macos.13.0",
    baseline: m1,
    bun: "bun-darwin-arm64",
    variants: arm64(m2),
  },
};

/** The first that the features allow; null where the machine has less than the least. */
export function bestFor<Needing extends Pick<Variant, "needs">>(
  choices: readonly Needing[],
  features: ReadonlySet<string>,
): Needing | null {
  return choices.find(({ needs }) => needs.every((one) => features.has(one))) ?? null;
}

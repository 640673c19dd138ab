// Builds libhypura for a target of targets.ts, once for each of its CPU variants: by zig for another platform (and for
// Linux also here, where it links against a glibc that is older than this machine's), by the machine's own compiler for
// macOS on a Mac, which alone has Apple's SDK and so Metal and Accelerate. Used by releases and by the Darwin check.

import { join } from "node:path";
import { buildTargets, type Configuration, configure, say } from "./cmake";
import type { LibraryFile } from "./executable";
import { libraryNameOn } from "./library";
import type { Flags, Target } from "./targets";
import { installZig, writeToolchain } from "./zig";

const root = join(import.meta.dir, "..");

export type Compiler = keyof Flags;

/** The compiler that makes the better library of a target on this machine. */
export function compilerFor(target: Target): Compiler {
  return target.platform === "darwin" && process.platform === "darwin" ? "host" : "zig";
}

/** Has CMake ready for a target. Throws ZigError where zig is needed and cannot be had. */
export async function configureFor(target: Target, compiler: Compiler): Promise<Configuration> {
  const folder = join(root, "build", "cross", `${target.name}-${compiler}`);
  const toolchain =
    compiler === "host"
      ? []
      : [`-DCMAKE_TOOLCHAIN_FILE=${await writeToolchain(await installZig(say), target, folder)}`];
  const made: Configuration = {
    source: join(root, "ffi"),
    folder: join(folder, "native"),
    what: `libhypura for ${target.name}`,
    options: [...toolchain, ...platformOptions(target, compiler), ...processorOptions(target, compiler)],
  };
  await configure(made);
  return made;
}

function platformOptions({ platform }: Target, compiler: Compiler): readonly string[] {
  if (platform === "linux") {
    return [];
  }
  return compiler === "host"
    ? ["-DCMAKE_OSX_ARCHITECTURES=arm64", "-DCMAKE_OSX_DEPLOYMENT_TARGET=13.0"]
    : ["-DGGML_METAL=OFF", "-DGGML_ACCELERATE=OFF", "-DGGML_BLAS=OFF"]; // these need Apple's SDK
}

function processorOptions({ arch, baseline, variants }: Target, compiler: Compiler): readonly string[] {
  const added = variants.flatMap(({ name, flags }) => (flags === null ? [] : [`${name}=${flags[compiler]}`]));
  return [
    "-DGGML_NATIVE=OFF",
    ...(arch === "x64"
      ? ["SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"].map((one) => `-DGGML_${one}=ON`)
      : []),
    // zig has the baseline in its toolchain file.
    ...(baseline !== null && compiler === "host"
      ? [`-DCMAKE_C_FLAGS=${baseline.host}`, `-DCMAKE_CXX_FLAGS=${baseline.host}`]
      : []),
    `-DHYPURA_VARIANTS=${added.join(";")}`,
  ];
}

/** Builds the library of every variant; best first, as an executable carries them. */
export async function buildLibraries(target: Target, compiler: Compiler): Promise<readonly LibraryFile[]> {
  const made = await configureFor(target, compiler);
  const names = target.variants.map(({ name, flags }) => (flags === null ? "hypura" : `hypura-${name}`));
  await buildTargets(made, names);
  const suffix = libraryNameOn(target.platform).replace("libhypura", "");
  return target.variants.map(({ name, needs }, index) => ({
    variant: name,
    needs,
    file: join(made.folder, `lib${names[index]}${suffix}`),
  }));
}

// Where the CUDA toolkit is on this machine, and what CMake needs to use it. NVIDIA's own packages put it into
// /usr/local/cuda, Debian's into the system's folders; CUDA_PATH and PATH come first. It runs nothing but nvcc's
// version, and owns the sentence for a machine that has no toolkit.

import { existsSync } from "node:fs";
import { join } from "node:path";

/** nvcc of the machine; null where there is none. */
export function findNvcc(environment: Readonly<Record<string, string | undefined>>): string | null {
  const named = environment["CUDACXX"];
  if (named !== undefined && named !== "") {
    return named;
  }
  const folders = [environment["CUDA_PATH"], environment["CUDA_HOME"]].filter(
    (one) => one !== undefined && one !== "",
  ) as string[];
  const placed = [...folders, "/usr/local/cuda"].map((folder) => join(folder, "bin", "nvcc"));
  return placed.find((file) => existsSync(file)) ?? Bun.which("nvcc", { PATH: environment["PATH"] ?? "" });
}

/** CMake's options for a build with CUDA. Throws Error with a sentence for people. */
export function cudaOptions(
  environment: Readonly<Record<string, string | undefined>> = process.env,
): readonly string[] {
  if (process.platform === "darwin") {
    throw new Error("there is no CUDA on macOS: build without --cuda, the GPU is used through Metal");
  }
  const nvcc = findNvcc(environment);
  if (nvcc === null) {
    throw new Error(
      "--cuda needs NVIDIA's CUDA toolkit, and nvcc is neither in CUDA_PATH, in /usr/local/cuda/bin nor in PATH: " +
        "install it (Debian: apt install nvidia-cuda-toolkit) or set CUDA_PATH to its folder",
    );
  }
  const version = Bun.spawnSync([nvcc, "--version"], { stdout: "pipe", stderr: "pipe" });
  if (!version.success) {
    throw new Error(`${nvcc} does not run: reinstall the CUDA toolkit, or set CUDA_PATH to another one`);
  }
  // cuBLAS stays a library of the machine (500 MB): this is a build for this machine, no release.
  return ["-DGGML_CUDA=ON", `-DCMAKE_CUDA_COMPILER=${nvcc}`];
}

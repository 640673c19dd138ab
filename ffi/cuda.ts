// Where the CUDA toolkit is on this machine, and what CMake needs to use it. NVIDIA's own packages put it into
// /usr/local/cuda, Debian's into the system's folders; CUDA_PATH and PATH come first. It runs nothing but nvcc's
// version and the driver's list of GPUs, and owns the sentences for a machine that has no toolkit or no GPU.

import { existsSync } from "node:fs";
import { join } from "node:path";

type Environment = Readonly<Record<string, string | undefined>>;

/** nvcc of the machine; null where there is none. */
export function findNvcc(environment: Environment): string | null {
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

/** The GPUs to compile for, in CMake's words: those that CUDAARCHS names, else those of this machine. */
function architectures(environment: Environment): string {
  const named = environment["CUDAARCHS"];
  if (named !== undefined && named !== "") {
    return named;
  }
  const query = Bun.which("nvidia-smi", { PATH: environment["PATH"] ?? "" });
  const asked =
    query === null
      ? ""
      : Bun.spawnSync([query, "--query-gpu=compute_cap", "--format=csv,noheader"], {
          stdout: "pipe",
          stderr: "ignore",
        }).stdout.toString();
  const found = [...asked.matchAll(/^(\d+)\.(\d+)\s*$/gm)].map(([, major, minor]) => `${major}${minor}-real`);
  if (found.length === 0) {
    throw new Error(
      "--cuda compiles for the GPUs of this machine, and its driver (nvidia-smi) shows none: install the driver, or name " +
        "the compute capability of the GPUs it is for in CUDAARCHS (75 for RTX 20, 86 for RTX 30, 89 for RTX 40, 90 for " +
        "H100, 120 for RTX 50; several with ; between)",
    );
  }
  return [...new Set(found)].toSorted().join(";");
}

/** CMake's options for a build with CUDA. Throws Error with a sentence for people. */
export function cudaOptions(environment: Environment = process.env): readonly string[] {
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
  return [
    // cuBLAS stays a library of the machine (500 MB): this is a build for this machine, no release.
    "-DGGML_CUDA=ON",
    `-DCMAKE_CUDA_COMPILER=${nvcc}`,
    `-DCMAKE_CUDA_ARCHITECTURES=${architectures(environment)}`,
    // ggml's pool of virtual memory links libcuda.so.1, which comes with the driver: where it is not (a container
    // without the GPU, a driver that was removed) the library would not load at all, and the processor is there still.
    "-DGGML_CUDA_NO_VMM=ON",
  ];
}

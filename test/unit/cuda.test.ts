// Where the CUDA toolkit is looked for, and what is said where it is not. Whether a build with it runs, only a machine
// with an NVIDIA GPU can show.

import { describe, expect, test } from "bun:test";
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { cudaOptions, findNvcc } from "../../ffi/cuda";

function withNvcc(exitStatus: number, use: (toolkit: string, nvcc: string) => void): void {
  const toolkit = mkdtempSync(join(tmpdir(), "hypura-cuda-"));
  try {
    const nvcc = join(toolkit, "bin", "nvcc");
    mkdirSync(join(toolkit, "bin"));
    writeFileSync(nvcc, `#!/bin/sh\nexit ${exitStatus}\n`);
    chmodSync(nvcc, 0o755);
    use(toolkit, nvcc);
  } finally {
    rmSync(toolkit, { recursive: true, force: true });
  }
}

describe.skipIf(process.platform === "darwin")("the CUDA toolkit", () => {
  test("is found by CUDACXX, CUDA_PATH, CUDA_HOME and PATH", () => {
    withNvcc(0, (toolkit, nvcc) => {
      expect(findNvcc({ CUDACXX: nvcc })).toBe(nvcc);
      expect(findNvcc({ CUDA_PATH: toolkit })).toBe(nvcc);
      expect(findNvcc({ CUDA_HOME: toolkit, CUDA_PATH: "/nowhere" })).toBe(nvcc);
      if (!existsSync("/usr/local/cuda/bin/nvcc")) {
        expect(findNvcc({ PATH: join(toolkit, "bin") })).toBe(nvcc);
      }
      expect(cudaOptions({ CUDA_PATH: toolkit, CUDAARCHS: "89;90" })).toEqual([
        "-DGGML_CUDA=ON",
        `-DCMAKE_CUDA_COMPILER=${nvcc}`,
        "-DCMAKE_CUDA_ARCHITECTURES=89;90",
        "-DGGML_CUDA_NO_VMM=ON",
      ]);
    });
  });

  test("compiles for the GPUs that the driver shows; without any, somebody must name them", () => {
    withNvcc(0, (toolkit) => {
      const path = join(toolkit, "driver");
      mkdirSync(path);
      const query = join(path, "nvidia-smi");
      const answer = (text: string, exitStatus: number): void =>
        writeFileSync(query, `#!/bin/sh\necho '${text}'\nexit ${exitStatus}\n`, { mode: 0o755 });
      answer("9.0\n8.9\n9.0", 0);
      expect(cudaOptions({ CUDA_PATH: toolkit, PATH: path })).toContain(
        "-DCMAKE_CUDA_ARCHITECTURES=89-real;90-real",
      );
      answer("NVIDIA-SMI has failed because it could not communicate with the driver", 9);
      expect(() => cudaOptions({ CUDA_PATH: toolkit, PATH: path })).toThrow(/shows none: .* CUDAARCHS/);
      expect(() => cudaOptions({ CUDA_PATH: toolkit, PATH: "" })).toThrow(/shows none: .* CUDAARCHS/);
    });
  });

  test("that does not run, or is not there, is one sentence with what to do", () => {
    withNvcc(1, (toolkit, nvcc) => {
      expect(() => cudaOptions({ CUDA_PATH: toolkit })).toThrow(
        `${nvcc} does not run: reinstall the CUDA toolkit`,
      );
    });
    if (!existsSync("/usr/local/cuda/bin/nvcc")) {
      expect(() => cudaOptions({ PATH: "" })).toThrow(/^--cuda needs NVIDIA's CUDA toolkit, .*: install it/);
    }
  });
});

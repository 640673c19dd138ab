// The advice of `hypura doctor`: each piece is there when its reason is, and only then.

import { describe, expect, test } from "bun:test";
import { adviceFor, type Findings } from "../../src/doctor";
import { compiledIn } from "../../src/engine";
import { type Machine, profileVersion } from "../../src/machine";

const storage = {
  volume: "/dev/nvme0n1 on / (ext4)",
  measuredAt: "2026-01-01T00:00:00Z",
  direct: true,
  reads: [],
  bestBytesPerSecond: 3e9,
  best: { readBytes: 1_048_576, depth: 8 },
};

const machine: Machine = {
  computeCores: 8,
  hasDirectLoad: true,
  memory: { totalBytes: 32e9, availableBytes: 20e9, limitedBy: null },
  devices: [],
  gpuBackends: [],
  profile: {
    version: profileVersion,
    fingerprint: "",
    measuredAt: "2026-01-01T00:00:00Z",
    cpuModel: "",
    computeThreads: 8,
    copyBytesPerSecond: 1e10,
    steps: { attention: 1e-10, mixing: 1e-9, plain: 1e-9 },
    products: [],
    storage: [storage],
  },
};

/** A machine that leaves nothing to wish for. */
const sound: Findings = {
  platform: "linux",
  library: {
    path: "/c/libhypura.so",
    fault: null,
    variant: "avx512-vnni",
    bestVariant: "avx512-vnni",
    passedOver: [],
    gpuBackends: [],
  },
  machine,
  installedBytes: 32e9,
  logicalCores: 16,
  groupCores: null,
  hugePages: "madvise",
  hasNvidiaDriver: false,
  volume: { path: "/models", name: storage.volume, direct: true },
  profileNotes: [],
  model: null,
};

const metal = {
  name: "MTL0",
  description: "Apple M3",
  type: "gpu",
  totalBytes: 12e9,
  freeBytes: 12e9,
  isUnified: true,
} as const;

describe("advice", () => {
  test("is none for a machine that leaves nothing to wish for", () => {
    expect(adviceFor(sound)).toEqual([]);
    const mac: Findings = {
      ...sound,
      platform: "darwin",
      hugePages: null,
      machine: { ...machine, devices: [metal] },
    };
    expect(adviceFor(mac)).toEqual([]);
    expect(adviceFor({ ...sound, hugePages: "always", groupCores: 16 })).toEqual([]);
  });

  const limited: Machine = {
    ...machine,
    memory: { totalBytes: 8e9, availableBytes: 6e9, limitedBy: "/sys/g" },
  };
  const model = { path: "m.gguf", mode: "expert-streaming", streamedBytes: 40e9, refusal: null };
  const { library } = sound;
  const cases: readonly (readonly [string, Partial<Findings>, RegExp])[] = [
    [
      "no library",
      { library: { ...library, path: null, fault: "it is gone" } },
      /^no model runs here: it is gone$/,
    ],
    ["NVIDIA without CUDA", { hasNvidiaDriver: true }, /bun run build --cuda/],
    [
      "CUDA without a driver",
      { library: { ...library, gpuBackends: ["CUDA"] } },
      /no NVIDIA driver is loaded/,
    ],
    [
      "CUDA whose driver shows nothing",
      { hasNvidiaDriver: true, library: { ...library, gpuBackends: ["CUDA"] } },
      /shows this build no GPU .*nvidia-smi/,
    ],
    ["a Mac without Metal", { platform: "darwin" }, /no Metal/],
    [
      "Metal without a GPU",
      { platform: "darwin", library: { ...library, gpuBackends: ["MTL"] } },
      /^macOS shows no GPU/,
    ],
    [
      "a group's memory",
      { machine: limited },
      /^the control group \/sys\/g allows 8\.00 GB of the machine's 32\.0 GB/,
    ],
    [
      "a streamed model",
      { model },
      /^40\.0 GB of the model are streamed: .*\(20\.0 GB of 32\.0 GB are free\)/,
    ],
    ["no huge pages", { hugePages: "never" }, /echo madvise > /],
    ["a group's processors", { groupCores: 2 }, /the time of 2 processors of 16/],
    [
      "lesser kernels",
      { library: { ...library, variant: "avx2" } },
      /^the kernels in use are avx2, this processor can do avx512-vnni: unset HYPURA_CPU/,
    ],
    [
      "no profile",
      { machine: { ...machine, profile: null } },
      /not measured yet: `hypura profile --path \/models`/,
    ],
    [
      "an old profile",
      { machine: { ...machine, profile: null }, profileNotes: ["the kept profile is old"] },
      /^the kept profile is old: `hypura profile/,
    ],
    [
      "no direct reads",
      { volume: { ...sound.volume, direct: false } },
      /cannot be read past the page cache.*3\.00 GB\/s/,
    ],
    [
      "passed over",
      { library: { ...library, passedOver: ["/a: full"] } },
      /^places were passed over .*\/a: full: set HYPURA_CACHE/,
    ],
  ];
  test.each(cases)("of %s", (_, change, expected) => {
    const advice = adviceFor({ ...sound, ...change });
    expect(advice).toHaveLength(1);
    expect(advice[0]).toMatch(expected);
  });
});

test("what llama.cpp says is compiled in", () => {
  expect(compiledIn("CPU : SSE3 = 1 | AVX = 0 | AVX512_VNNI = 1 | ")).toEqual({
    instructionSets: ["SSE3", "AVX512_VNNI"],
    gpuBackends: [],
  });
  expect(compiledIn("CUDA : ARCHS = 900 | NO_VMM = 1 | CPU : NEON = 1 | SVE_CNT = 0 | ")).toEqual({
    instructionSets: ["NEON"],
    gpuBackends: ["CUDA"],
  });
  expect(compiledIn("")).toEqual({ instructionSets: [], gpuBackends: [] });
});

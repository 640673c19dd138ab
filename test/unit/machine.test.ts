// What the system says of processors, groups and mounts, and a machine read from a file: every field that can be wrong
// is named.

import { describe, expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import {
  groupCores,
  type Machine,
  mountOf,
  parseCpuList,
  peakMemoryBytes,
  profileVersion,
  readMachine,
  readProcessor,
  validateMachine,
  volumeOf,
} from "../../src/machine";

function reader(files: Readonly<Record<string, string>>): (path: string) => string | null {
  return (path) => files[path] ?? null;
}

describe("cores under a control group", () => {
  test("version 2: the tightest of the group and its parents, rounded up", () => {
    const files = {
      "/proc/self/cgroup": "0::/a/b\n",
      "/sys/fs/cgroup/a/cpu.max": "150000 100000\n",
      "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
    };
    expect(groupCores(reader(files))).toBe(2);
    expect(groupCores(reader({ ...files, "/sys/fs/cgroup/a/b/cpu.max": "50000 100000" }))).toBe(1);
    expect(groupCores(reader({ ...files, "/sys/fs/cgroup/a/cpu.max": "max 100000" }))).toBeNull();
  });

  test("version 1: quota and period, -1 is no limit", () => {
    const files = {
      "/proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/c\n",
      "/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "400000\n",
      "/sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
    };
    expect(groupCores(reader(files))).toBe(4);
    expect(groupCores(reader({ ...files, "/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1\n" }))).toBeNull();
  });

  test("no group, or nonsense in it, is no limit", () => {
    expect(groupCores(reader({}))).toBeNull();
    const files = { "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "lots of it\n" };
    expect(groupCores(reader(files))).toBeNull();
  });
});

test("a list of processors", () => {
  expect([...parseCpuList("0-2,5,7-8")]).toEqual([0, 1, 2, 5, 7, 8]);
  expect(parseCpuList("").size).toBe(0);
});

test("a path's mount is the last of the longest points above it", () => {
  const info = [
    "27 1 254:0 / / rw - ext4 /dev/vda rw",
    "30 27 0:27 / /data rw shared:1 - xfs /dev/vdb rw",
    "31 27 0:28 / /data rw - btrfs /dev/vdc rw",
    "32 27 0:29 / /with\\040space rw - tmpfs tmp\\040fs rw",
    "",
  ].join("\n");
  expect(mountOf("/database/x", info)).toBe("/dev/vda on / (ext4)");
  expect(mountOf("/data", info)).toBe("/dev/vdc on /data (btrfs)");
  expect(mountOf("/data/models/m.gguf", info)).toBe("/dev/vdc on /data (btrfs)");
  expect(mountOf("/with space/x", info)).toBe("tmp fs on /with space (tmpfs)");
  expect(mountOf("/x", "")).toBe("/x");
});

test("this machine has cores, memory, a processor and a volume", () => {
  const machine = readMachine();
  expect(machine.computeCores).toBeGreaterThanOrEqual(1);
  expect(machine.computeCores).toBeLessThanOrEqual(readProcessor().logicalCores);
  expect(machine.memory.availableBytes).toBeGreaterThan(0);
  expect(machine.memory.availableBytes).toBeLessThanOrEqual(machine.memory.totalBytes);
  expect([machine.devices, machine.profile]).toEqual([[], null]);
  expect(readProcessor().model).not.toBe("");
  expect(volumeOf(import.meta.path)).toMatch(/ on \//);
  expect(() => volumeOf("/no/such/thing")).toThrow("/no/such/thing cannot be found");
});

const rows = { decodeBytesPerSecond: 90e9, shortRowBytesPerSecond: 60e9 };

const sound = {
  computeCores: 8,
  hasDirectLoad: false,
  memory: { totalBytes: 34_359_738_368, availableBytes: 30e9, limitedBy: null },
  gpuBackends: ["MTL"],
  devices: [
    {
      name: "Metal",
      description: "Apple M1 Max",
      type: "gpu",
      totalBytes: 22_906_503_168,
      freeBytes: 22_906_503_168,
      isUnified: true,
    },
  ],
  profile: {
    version: profileVersion,
    fingerprint: "processor=Apple M1 Max",
    measuredAt: "2026-01-02T03:04:05.000Z",
    cpuModel: "Apple M1 Max",
    computeThreads: 8,
    copyBytesPerSecond: 60e9,
    steps: { attention: 1e-10, mixing: 1e-9, plain: 1e-9 },
    products: [
      {
        typeName: "q4_K",
        ...rows,
        prefillFlopsPerSecond: 1e12,
        repacked: { ...rows, prefillFlopsPerSecond: 2e12, experts: rows },
      },
      { typeName: "f16", ...rows, prefillFlopsPerSecond: 1e12, repacked: null },
    ],
    storage: [
      {
        volume: "/dev/disk3s5 on /",
        measuredAt: "2026-01-02T03:04:05.000Z",
        direct: true,
        reads: [
          { readBytes: 1_048_576, depth: 4, bytesPerSecond: 5.1e9, latencySeconds: { p50: 1e-3, p99: 2e-3 } },
        ],
        bestBytesPerSecond: 5.1e9,
        best: { readBytes: 1_048_576, depth: 4 },
      },
    ],
  },
} as const satisfies Machine;

describe("a machine from a file", () => {
  test("comes back as it was written", () => {
    expect(validateMachine(JSON.parse(JSON.stringify(sound)))).toEqual(sound);
    expect(validateMachine({ ...sound, profile: null, devices: [] })).toEqual({
      ...sound,
      profile: null,
      devices: [],
    });
    expect(validateMachine(JSON.parse(JSON.stringify(readMachine()))).profile).toBeNull();
  });

  // [field to replace, its value, what the error must name]; undefined removes the field.
  const wrongs: readonly (readonly [string, unknown, string])[] = [
    ["computeCores", 0, "computeCores must be a whole number from 1, and is 0"],
    ["computeCores", undefined, "lacks the field computeCores"],
    ["hasDirectLoad", "yes", 'hasDirectLoad must be true or false, and is "yes"'],
    ["memory", null, "memory must be an object, and is null"],
    ["memory.totalBytes", "32G", 'memory.totalBytes must be a whole number of bytes, and is "32G"'],
    ["memory.totalBytes", 1.5, "memory.totalBytes must be a whole number of bytes"],
    ["memory.availableBytes", 1e12, "memory.availableBytes must be at most memory.totalBytes"],
    ["memory.limitedBy", 5, "memory.limitedBy must be a text or null"],
    ["devices", {}, "devices must be a list"],
    ["gpuBackends", ["CUDA", 1], "gpuBackends must be a list of texts"],
    ["devices.0", 7, "devices[0] must be an object"],
    ["devices.0.type", "npu", "devices[0].type must be one of cpu, gpu, igpu, accel"],
    ["devices.0.isUnified", undefined, "lacks the field devices[0].isUnified"],
    ["profile", undefined, "lacks the field profile"],
    ["profile.version", 1, "profile.version must be 2"],
    ["profile.measuredAt", "yesterday", 'profile.measuredAt must be a date, and is "yesterday"'],
    ["profile.copyBytesPerSecond", 0, "profile.copyBytesPerSecond must be a number above 0"],
    ["profile.copyBytesPerSecond", null, "profile.copyBytesPerSecond must be a number above 0, and is null"],
    ["profile.products.0.typeName", 3, "profile.products[0].typeName must be a text"],
    ["profile.products.0.prefillFlopsPerSecond", -1, "profile.products[0].prefillFlopsPerSecond must be"],
    ["profile.steps", undefined, "lacks the field profile.steps"],
    ["profile.steps.mixing", 0, "profile.steps.mixing must be a number above 0"],
    ["profile.products.1.repacked", undefined, "lacks the field profile.products[1].repacked"],
    [
      "profile.products.0.repacked.experts.shortRowBytesPerSecond",
      0,
      "profile.products[0].repacked.experts.shortRowBytesPerSecond must be a number above 0",
    ],
    ["profile.storage.0.reads.0.depth", 0, "profile.storage[0].reads[0].depth must be a whole number from 1"],
    [
      "profile.storage.0.reads.0.latencySeconds",
      1,
      "profile.storage[0].reads[0].latencySeconds must be an object",
    ],
    ["profile.storage.0.best", undefined, "lacks the field profile.storage[0].best"],
  ];

  test.each(wrongs)("%s = %p is refused by name", (path, value, message) => {
    const machine = JSON.parse(JSON.stringify(sound));
    const names = path.split(".");
    const last = names.pop() as string;
    const parent = names.reduce((object, name) => object[name], machine);
    if (value === undefined) {
      delete parent[last];
    } else {
      parent[last] = value;
    }
    expect(() => validateMachine(machine)).toThrow(message);
    try {
      validateMachine(machine);
    } catch (error) {
      expect((error as HypuraError).code).toBe("usage");
    }
  });

  test("what is no object at all is refused", () => {
    for (const json of [null, 1, "x", [], undefined]) {
      expect(() => validateMachine(json)).toThrow(HypuraError);
    }
  });
});

test("the peak is this process's own, not what its parent held", () => {
  expect(peakMemoryBytes(() => "Name:\tbun\nVmPeak:\t 900 kB\nVmHWM:\t    1234 kB\n")).toBe(1234 * 1024);
  // Without the kernel's word it is what getrusage says.
  expect(peakMemoryBytes(() => null)).toBe(process.resourceUsage().maxRSS * 1024);
});

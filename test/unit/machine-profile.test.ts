// The kept profile: measured when it is missing, damaged, old or of another machine, and at no other time; and which
// file a volume is measured by. Native code is replaced by figures, so that what was asked of it can be counted.

import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { HypuraError } from "../../src/errors";
import { differenceOf, keepStorage, type LoadOptions, loadMachine } from "../../src/profile";
import { bestOf, findSource, measureStorage, type ReadResult, type TaskRunner } from "../../src/storage";

let folder = "";
let home = "";
const homeBefore = process.env["HYPURA_HOME"];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "hypura-profile-"));
  home = join(folder, "home");
  process.env["HYPURA_HOME"] = home;
});

afterEach(() => {
  if (homeBefore === undefined) {
    delete process.env["HYPURA_HOME"];
  } else {
    process.env["HYPURA_HOME"] = homeBefore;
  }
  rmSync(folder, { recursive: true, force: true });
});

const mebibyte = 1_048_576;

/** A file of real blocks, last written an hour ago. */
function oldFile(path: string, mebibytes: number): string {
  writeFileSync(path, new Uint8Array(mebibytes * mebibyte).fill(1));
  const hourAgo = new Date(Date.now() - 3_600_000);
  utimesSync(path, hourAgo, hourAgo);
  return path;
}

interface Cell {
  readonly readBytes: number;
  readonly depth: number;
  readonly direct: boolean;
}

/** Native code that answers at once; `asked` counts the tasks but for the list of devices. */
function fakeNative(
  asked: string[],
  answers: {
    readonly isDirect?: boolean;
    readonly gpu?: boolean;
    /** Seconds for the products of each round; 1 where there is none. */
    readonly productSeconds?: readonly number[];
    /** Seconds for the reads of each task of that name. */
    readonly readSeconds?: readonly number[];
  } = {},
): TaskRunner {
  const gpu = {
    name: "GPU0",
    description: "A GPU",
    type: "gpu",
    totalBytes: 8e9,
    freeBytes: 8e9,
    isUnified: false,
  };
  return async function* run(name, body) {
    if (name !== "devices") {
      asked.push(name);
    }
    switch (name) {
      case "devices":
        yield { data: { devices: answers.gpu === true ? [gpu] : [], gpuBackends: [] } };
        return;
      case "copy":
        yield { data: { bytes: 20e9, ns: 1e9 } };
        return;
      case "steps":
        for (const _ of (body as { cases: readonly unknown[] }).cases) {
          yield { data: { ns: 1e6 * asked.filter((one) => one === "steps").length, passes: 1 } };
        }
        return;
      case "products": {
        const round = asked.filter((one) => one === "products").length - 1;
        const ns = (answers.productSeconds?.[round] ?? 1) * 1e9;
        for (const one of (body as { cases: readonly { typeName: string; repacked: boolean }[] }).cases) {
          const isAbsent = one.repacked && one.typeName !== "q4_0";
          const figures = { bytes: 30e9, flops: 2e11, ns, products: 1, passes: 1 };
          yield { data: isAbsent ? { bytes: 0, flops: 0, ns: 0, isAbsent } : { ...figures, isAbsent } };
        }
        return;
      }
      case "scratch": {
        const { path, sizeBytes } = body as { path: string; sizeBytes: number };
        writeFileSync(path, "x");
        yield { data: { bytes: sizeBytes } };
        return;
      }
      case "reads":
        for (const { readBytes, depth, direct } of (body as { cells: readonly Cell[] }).cells) {
          const bytes = Math.min(3e9, readBytes * depth * 1000);
          const isDirect = direct && answers.isDirect !== false;
          const turn = asked.filter((one) => one === "reads").length - 1;
          const times = { ns: (answers.readSeconds?.[turn] ?? 1) * 1e9, p50Ns: 1e5, p99Ns: 2e5 };
          yield {
            data: {
              readCount: 9,
              bytes,
              ...times,
              direct: isDirect,
              isExhausted: false,
              isRefused: false,
              storageBytes: bytes,
            },
          };
        }
        return;
      default:
        throw new Error(`no task ${name}`);
    }
  };
}

const everything = [
  ...[
    "copy",
    "steps",
    "steps",
    "steps",
    "steps",
    "steps",
    "products",
    "products",
    "products",
    "products",
    "products",
    "scratch",
  ],
  ...["reads", "reads", "reads", "reads", "reads", "reads"],
];

function options(asked: string[], notes: string[], more: Partial<LoadOptions> = {}): LoadOptions {
  return {
    folder,
    measure: "if-needed",
    run: fakeNative(asked),
    onNote: (note) => notes.push(note),
    ...more,
  };
}

function cacheFile(): string {
  return join(home, readdirSync(home).find((name) => name.startsWith("machine-")) ?? "none");
}

describe("the profile", () => {
  test("is never measured by who only asks for what is kept", async () => {
    const asked: string[] = [];
    expect((await loadMachine(options(asked, [], { measure: "cached" }))).profile).toBeNull();
    expect(asked).toEqual([]);
    expect(readdirSync(folder)).toEqual([]);
  });

  test("takes each product's best round, because other programs can only slow it down", async () => {
    const asked: string[] = [];
    const run = fakeNative(asked, { productSeconds: [4, 1.5, 2, 2, 2] });
    const { profile } = await loadMachine(options(asked, [], { run }));
    expect(profile?.steps.mixing).toBe(1e-3 / (2048 * 8 * 32));
    expect(profile?.steps.plain).toBe(1e-3 / (2048 * 128 * 2));
    expect(profile?.products.length).toBe(17);
    for (const product of profile?.products ?? []) {
      const rows = { decodeBytesPerSecond: 20e9, shortRowBytesPerSecond: 20e9 };
      const all = { ...rows, prefillFlopsPerSecond: 133333333333 };
      const repacked = product.typeName === "q4_0" ? { ...all, experts: rows } : null;
      expect(product).toEqual({ typeName: product.typeName, ...all, repacked });
    }
  });

  test("takes each read's best round, and of the best setting's too", async () => {
    const asked: string[] = [];
    // A probe and the grid, twice, and the best setting twice.
    const run = fakeNative(asked, { readSeconds: [1, 4, 1, 2, 3, 1.5] });
    const { profile } = await loadMachine(options(asked, [], { run }));
    const [storage] = profile?.storage ?? [];
    expect(storage?.bestBytesPerSecond).toBe(2e9);
    expect(storage?.reads.find((one) => one.readBytes === 4_194_304 && one.depth === 1)).toMatchObject({
      bytesPerSecond: 1.5e9,
    });
  });

  test("holds for this process also where it cannot be kept", async () => {
    const before = process.env["HYPURA_HOME"];
    process.env["HYPURA_HOME"] = "/proc/nowhere";
    try {
      const notes: string[] = [];
      const { profile } = await loadMachine(options([], notes));
      expect(profile?.products.length).toBe(17);
      expect(notes.join()).toContain("the figures are not kept");
    } finally {
      process.env["HYPURA_HOME"] = before;
    }
  });

  test("is measured once, and then kept", async () => {
    const asked: string[] = [];
    const notes: string[] = [];
    const measured = await loadMachine(options(asked, notes));
    expect(asked).toEqual(everything);
    expect(notes.join()).toContain("a scratch file of");
    expect(measured.profile?.copyBytesPerSecond).toBe(20e9);
    expect(measured.profile?.products.map((one) => one.typeName)).toContain("mxfp4");
    expect(measured.profile?.storage.length).toBe(1);
    for (const measure of ["if-needed", "cached"] as const) {
      const again: string[] = [];
      const kept = await loadMachine(options(again, [], { measure }));
      expect(again).toEqual([]);
      expect(kept.profile).toEqual(measured.profile);
    }
    expect(readdirSync(home).length).toBe(1); // no temporary file is left
    expect(readdirSync(folder)).toEqual(["home"]); // nor the scratch file
  });

  test("--force measures again", async () => {
    await loadMachine(options([], []));
    const asked: string[] = [];
    await loadMachine(options(asked, [], { measure: "always" }));
    expect(asked).toEqual(everything);
  });

  test("of 29 days holds, of 31 days or of next year does not", async () => {
    const now = Date.now();
    await loadMachine(options([], [], { now }));
    const day = 86_400_000;
    for (const [age, isOld] of [
      [29 * day, false],
      [31 * day, true],
      [-365 * day, true],
    ] as const) {
      const asked: string[] = [];
      const notes: string[] = [];
      const { profile } = await loadMachine(options(asked, notes, { now: now + age, measure: "cached" }));
      expect([profile === null, asked]).toEqual([isOld, []]);
      expect(notes.join().includes("more than 30 days old")).toBe(isOld);
    }
    const asked: string[] = [];
    await loadMachine(options(asked, [], { now: now + 31 * day }));
    expect(asked).toEqual(everything);
  });

  test("of a machine with another device is another one, and the first is kept too", async () => {
    await loadMachine(options([], []));
    const asked: string[] = [];
    const notes: string[] = [];
    const more = { run: fakeNative(asked, { gpu: true }) };
    const machine = await loadMachine(options(asked, notes, more));
    expect(asked).toEqual(everything);
    expect(notes[0]).toContain("this is not the machine that was measured last (devices): measuring again");
    expect(machine.devices[0]?.type).toBe("gpu");
    const again: string[] = [];
    await loadMachine(options(again, []));
    expect(again).toEqual([]);
  });

  test.each([
    ["empty", () => ""],
    ["cut off", (text: string) => text.slice(0, text.length / 2)],
    ["no profile", () => '{"version":1}'],
    ["of another version", (text: string) => text.replace(/"version": \d/, '"version": 9')],
    ["of another machine", (text: string) => text.replace("cores=", "cores=9")],
    ["with a figure that is none", (text: string) => text.replace('"depth": 1', '"depth": null')],
  ])("that is %s is measured again with a note", async (_, damage) => {
    await loadMachine(options([], []));
    const path = cacheFile();
    writeFileSync(path, damage(readFileSync(path, "utf8")));
    const quiet: string[] = [];
    const notes: string[] = [];
    expect((await loadMachine(options(quiet, notes, { measure: "cached" }))).profile).toBeNull();
    expect([quiet, notes.length]).toEqual([[], 1]);
    expect(notes[0]).toMatch(
      /the kept profile .*machine-\w+\.json is damaged: `hypura profile` measures again/,
    );
    const asked: string[] = [];
    expect((await loadMachine(options(asked, []))).profile).not.toBeNull();
    expect(asked).toEqual(everything);
    expect((await loadMachine(options([], [], { measure: "cached" }))).profile).not.toBeNull();
  });

  test("of another volume lacks only the storage", async () => {
    await loadMachine(options([], []));
    const path = cacheFile();
    const kept = JSON.parse(readFileSync(path, "utf8"));
    kept.storage[0].volume = "/dev/other on /other (ext4)";
    writeFileSync(path, JSON.stringify(kept));
    expect((await loadMachine(options([], [], { measure: "cached" }))).profile?.storage).toEqual([]);
    const asked: string[] = [];
    const { profile } = await loadMachine(options(asked, []));
    expect(asked).toEqual(everything.slice(everything.indexOf("scratch")));
    expect(profile?.storage.length).toBe(1);
    expect(JSON.parse(readFileSync(path, "utf8")).storage.length).toBe(2);
  });

  test("lives without storage where nothing can be read or written, and says so", async () => {
    const notes: string[] = [];
    const run: TaskRunner = async function* (name, body, signal) {
      if (name === "scratch") {
        throw new HypuraError("request", "cannot write x: Read-only file system");
      }
      yield* fakeNative([])(name, body, signal);
    };
    const { profile } = await loadMachine(options([], notes, { run }));
    expect(profile?.storage).toEqual([]);
    expect(profile?.products.length).toBeGreaterThan(0);
    expect(notes.join()).toMatch(/storage was not measured: .*Read-only file system/);
  });

  test("takes what iobench found, where there is a profile to take it", async () => {
    const { speed } = await measureStorage(folder, {
      ...{ settings: [{ readBytes: 65_536, depth: 1, direct: true, aligned: true }] },
      ...{ secondsPerSetting: 0, scratchSeconds: 1, run: fakeNative([]) },
    });
    expect(await keepStorage(speed, options([], []))).toBe(false);
    await loadMachine(options([], []));
    expect(await keepStorage(speed, options([], []))).toBe(true);
    const { profile } = await loadMachine(options([], [], { measure: "cached" }));
    expect(profile?.storage).toEqual([speed]);
  });

  test("a state folder that cannot be written is an error with advice", async () => {
    writeFileSync(home, "a file in the way");
    expect(loadMachine(options([], []))).rejects.toThrow(/cannot be (read|written)/);
  });
});

test("the difference of two fingerprints is named", () => {
  expect(differenceOf("processor=A; cores=2 of 4; llama=v1", "processor=A; cores=4 of 4; llama=v2")).toBe(
    "cores, llama",
  );
});

describe("the file that is read", () => {
  test("is the one that was named, where it is large enough", () => {
    const path = oldFile(join(folder, "m.gguf"), 64);
    expect(findSource(path)).toEqual({ path, sizeBytes: 64 * mebibyte, isScratch: false });
    expect(findSource(oldFile(join(folder, "small.gguf"), 1))).toBeNull();
  });

  test("is the largest model of a folder, before any other file", () => {
    mkdirSync(join(folder, "deep", "er"), { recursive: true });
    oldFile(join(folder, "other.bin"), 300);
    expect(findSource(folder)?.path).toBe(join(folder, "other.bin"));
    const model = oldFile(join(folder, "deep", "er", "m.gguf"), 257);
    expect(findSource(folder)?.path).toBe(model);
  });

  test("is not one with holes, just written, or behind a link", () => {
    const sparse = join(folder, "sparse.gguf");
    writeFileSync(sparse, "");
    truncateSync(sparse, 2 ** 40);
    utimesSync(sparse, 1, 1);
    writeFileSync(join(folder, "fresh.gguf"), new Uint8Array(257 * mebibyte).fill(1));
    symlinkSync(oldFile(join(folder, "real"), 1), join(folder, "link.gguf"));
    expect(findSource(folder)).toBeNull();
  });

  test("must be there", () => {
    expect(() => findSource(join(folder, "none"))).toThrow("cannot be found");
    expect(() => findSource("/dev/null")).toThrow("neither a file nor a folder");
  });

  test("that was left behind by a run that died is removed", async () => {
    const abandoned = join(folder, ".hypura-scratch-999999999");
    writeFileSync(abandoned, "x");
    await loadMachine(options([], []));
    expect(readdirSync(folder)).toEqual(["home"]);
  });
});

describe("what the figures mean", () => {
  const result = (readBytes: number, depth: number, bytesPerSecond: number, direct = true): ReadResult => ({
    ...{ readBytes, depth, bytesPerSecond, direct, aligned: true, latencySeconds: { p50: 1, p99: 1 } },
    ...{ readCount: 1, seconds: 1, isExhausted: false, isRefused: false, storageShare: 1 },
  });

  test("the best is the least in flight near the highest, of direct reads", () => {
    const results = [result(65_536, 1, 1e9), result(65_536, 16, 2.95e9), result(4_194_304, 4, 3e9)];
    expect(bestOf(results)).toBe(results[1] as ReadResult);
    expect(bestOf([...results, result(4096, 1, 9e9, false)])).toBe(results[1] as ReadResult);
    expect(bestOf([result(4096, 1, 9e9, false)]).bytesPerSecond).toBe(9e9);
  });

  const grid = {
    settings: [{ readBytes: 65_536, depth: 1, direct: true, aligned: true }],
    secondsPerSetting: 1,
    scratchSeconds: 1,
  } as const;

  test("a volume without direct reads is read through the page cache, and says so", async () => {
    const run = fakeNative([], { isDirect: false });
    const { speed, results, notes } = await measureStorage(folder, { ...grid, run });
    expect([speed.direct, results.map((one) => one.direct)]).toEqual([false, [false]]);
    expect(notes.join()).toContain("this volume has no direct reads");
  });

  test.each([
    [0, "whether they were cold is not known"],
    [0.5, "a cache gave up to 50 % of the bytes"],
  ])("bytes that did not come from storage (%p of them did) are named", async (share, message) => {
    const native = fakeNative([]);
    const run: TaskRunner = async function* (name, body, signal) {
      for await (const chunk of native(name, body, signal)) {
        const data = chunk.data as { readonly bytes: number };
        yield name === "reads" ? { data: { ...data, storageBytes: data.bytes * share } } : chunk;
      }
    };
    const { notes } = await measureStorage(folder, { ...grid, run });
    expect(notes.join()).toContain(message);
  });
});

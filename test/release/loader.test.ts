// The executable's own library: where it is unpacked, and what happens where that cannot be. The real dist/hypura, asked
// by `doctor --json` which library it loaded. Mounts and other users need root, and are skipped loudly without.

import { afterAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type EmbeddedLibrary, hashOf, libraryName } from "../../ffi/library";
import { suitable } from "../../ffi/loader";
import { outcomeOf, program, scratchFolder } from "../cli/program";

const executable = program[0] ?? "";
const isBuilt = executable.endsWith("/hypura");
if (!isBuilt) {
  console.error("!!! SKIPPED: the loader of the executable: dist/hypura is not built (bun run build)");
}

// Before the scratch folder, whose removal must find nothing mounted.
const mounted: string[] = [];
const lastResort = `/tmp/hypura-${process.getuid?.() ?? 0}`;
const hadLastResort = existsSync(lastResort);
afterAll(() => {
  for (const path of mounted.toReversed()) {
    Bun.spawnSync(["umount", path]);
  }
  if (!hadLastResort) {
    rmSync(lastResort, { recursive: true, force: true });
  }
});
const folder = scratchFolder();

interface Doctor {
  readonly library: {
    readonly path: string | null;
    readonly fault: string | null;
    readonly variant: string | null;
    readonly passedOver: readonly string[];
  };
}

type Environment = Readonly<Record<string, string>>;

/** What `doctor` says with nothing in the environment but `env`. */
async function doctor(env: Environment, command: readonly string[] = program): Promise<Doctor["library"]> {
  const child = Bun.spawn([...command, "doctor", "/", "--json"], {
    env: { PATH: process.env["PATH"] ?? "", ...env },
    cwd: "/",
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const { status, stdout, stderr } = await outcomeOf(child as never);
  expect([status, stderr]).toEqual([0, ""]);
  return (JSON.parse(stdout) as Doctor).library;
}

function fresh(name: string): string {
  const path = join(folder, name);
  mkdirSync(path, { recursive: true });
  return path;
}

/** The one library under a cache folder. */
function libraryIn(path: string): string {
  const found = readdirSync(path, { recursive: true })
    .map(String)
    .filter((name) => name.includes("libhypura"));
  expect(found.map((name) => name.split("/").at(-1))).toEqual([libraryName]);
  return join(path, found[0] as string);
}

const uid = process.getuid?.() ?? 0;

describe.skipIf(!isBuilt)("unpacking", () => {
  test("goes to HYPURA_CACHE first, into folders and a file that only the user can write", async () => {
    const cache = fresh("first");
    const { path, variant, passedOver } = await doctor({ HYPURA_CACHE: cache, HOME: fresh("home") });
    expect([path, variant, passedOver]).toEqual([libraryIn(cache), expect.stringMatching(/^[\w-]+$/), []]);
    expect(statSync(path ?? "").mode & 0o777).toBe(0o500);
    expect(statSync(join(path ?? "", "..")).mode & 0o777).toBe(0o700);
    expect(readdirSync(join(folder, "home"))).toEqual([]);
  });

  test("goes on to the user's cache, then to TMPDIR", async () => {
    const [home, xdg, tmp] = [fresh("home-1"), fresh("xdg-1"), fresh("tmp-1")];
    expect((await doctor({ XDG_CACHE_HOME: xdg, HOME: home })).path).toBe(libraryIn(xdg));
    const inHome = (await doctor({ HOME: home, TMPDIR: tmp })).path;
    expect(inHome).toBe(libraryIn(home));
    const caches = process.platform === "darwin" ? "Library" : ".cache";
    writeFileSync(join(fresh("home-2"), caches), "a file where a folder should be");
    const inTmp = await doctor({ HOME: join(folder, "home-2"), TMPDIR: tmp });
    expect(inTmp.path).toBe(libraryIn(tmp));
    expect(inTmp.passedOver.join()).toContain(join(folder, "home-2", caches));
  });

  test.each([
    ["cut", (bytes: Buffer) => bytes.subarray(0, 1000)],
    [
      "altered in one byte",
      (bytes: Buffer) => Buffer.from(bytes).fill(~(bytes[5000] ?? 0) & 0xff, 5000, 5001),
    ],
    ["empty", () => Buffer.alloc(0)],
    ["made writable for others", (bytes: Buffer) => bytes],
  ])("a copy that is %s is replaced", async (what, damage) => {
    const cache = fresh("damaged");
    await doctor({ HYPURA_CACHE: cache });
    const file = libraryIn(cache);
    const sound = readFileSync(file);
    chmodSync(file, 0o700);
    writeFileSync(file, damage(sound));
    chmodSync(file, what.startsWith("made") ? 0o722 : 0o500);
    const { path, passedOver } = await doctor({ HYPURA_CACHE: cache });
    expect([path, passedOver]).toEqual([file, []]);
    expect(hashOf(readFileSync(libraryIn(cache)))).toBe(hashOf(sound));
    expect(statSync(file).mode & 0o777).toBe(0o500);
  });

  test("16 first starts at once leave one whole library and nothing else", async () => {
    const cache = fresh("parallel");
    const starts = await Promise.all(Array.from({ length: 16 }, () => doctor({ HYPURA_CACHE: cache })));
    const file = libraryIn(cache);
    for (const { path, passedOver } of starts) {
      expect([path, passedOver]).toEqual([file, []]);
    }
    expect(file).toContain(`lib-${hashOf(readFileSync(file))}`);
  });

  test("reads no .env and no bunfig.toml of the folder where the user is", async () => {
    const cwd = fresh("hostile");
    writeFileSync(join(cwd, ".env"), `HYPURA_LIB=${join(cwd, "evil.so")}\n`);
    writeFileSync(join(cwd, "bunfig.toml"), `preload = ["./evil.ts"]\n`);
    writeFileSync(join(cwd, "evil.ts"), `require("node:fs").writeFileSync("ran", "");\n`);
    const child = Bun.spawn([...program, "doctor", "--json"], {
      env: { HYPURA_CACHE: fresh("hostile-cache") },
      cwd,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    const { status, stdout } = await outcomeOf(child as never);
    expect(status).toBe(0);
    expect((JSON.parse(stdout) as Doctor).library.path).toStartWith(join(folder, "hostile-cache"));
    expect(existsSync(join(cwd, "ran"))).toBe(false);
  });

  test("a library that a person names is used or refused, never replaced", async () => {
    const cache = fresh("named");
    const { path, fault } = await doctor({ HYPURA_LIB: "/no/such/libhypura.so", HYPURA_CACHE: cache });
    expect(path).toBeNull();
    expect(fault).toContain("/no/such/libhypura.so");
    expect(readdirSync(cache)).toEqual([]);
  });

  test.skipIf(process.platform === "darwin")(
    "the error lists what was tried where nothing works",
    async () => {
      // No file may grow beyond 64 blocks, one in memory neither; nothing half-written stays.
      const limited = ["sh", "-c", `trap "" XFSZ; ulimit -f 64; exec "$@"`, "sh", ...program];
      const [cache, home, tmp] = [fresh("limited-1"), fresh("limited-2"), fresh("limited-3")];
      const { path, fault } = await doctor({ HYPURA_CACHE: cache, HOME: home, TMPDIR: tmp }, limited);
      expect(path).toBeNull();
      expect(fault).toContain("set HYPURA_CACHE to a folder with room that allows execution. Tried: ");
      for (const tried of [cache, join(home, ".cache"), tmp, "/tmp", "a file in memory"]) {
        expect(fault).toContain(`${tried}: `);
      }
      for (const place of [cache, home, tmp]) {
        expect(readdirSync(place, { recursive: true }).join()).not.toContain("libhypura");
      }
    },
  );

  test("a variant that is not carried is refused by name", async () => {
    const { fault } = await doctor({ HYPURA_CPU: "pentium", HYPURA_CACHE: fresh("cpu") });
    expect(fault).toMatch(/^HYPURA_CPU=pentium: this hypura carries [\w-]/);
  });
});

// ---- folders that will not do ------------------------------------------------------------------------------------------

function mount(name: string, options: string): string {
  const path = fresh(name);
  const done = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", options, "hypura-test", path], {
    stderr: "pipe",
  });
  if (!done.success) {
    throw new Error(done.stderr.toString());
  }
  mounted.push(path);
  return path;
}

function mayMount(): boolean {
  if (process.platform !== "linux" || uid !== 0) {
    return false;
  }
  try {
    mount("probe", "size=4k");
    return true;
  } catch {
    return false;
  }
}

const canMount = isBuilt && mayMount();
if (isBuilt && !canMount) {
  console.error("!!! SKIPPED: full, read-only and noexec folders: mounting is not allowed here (needs root)");
}

describe.skipIf(!canMount)("a folder that will not do is passed over:", () => {
  test.each([
    ["full", "size=64k", /ENOSPC|no space/i],
    ["noexec", "noexec", /failed to map|Operation not permitted/],
    ["read-only", "ro", /EROFS|read-only/i],
  ])("%s", async (name, options, reason) => {
    const bad = mount(`bad-${name}`, options);
    const good = fresh(`good-${name}`);
    // As TMPDIR, with nowhere else: hypura goes on to /tmp.
    const asTemporary = await doctor({ TMPDIR: bad, HOME: "/" });
    expect(asTemporary.path).toStartWith("/tmp/hypura-0/lib-");
    expect(asTemporary.passedOver.join()).toMatch(reason);
    expect(asTemporary.passedOver.join()).toContain(bad);
    // As the cache that was asked for.
    const asCache = await doctor({ HYPURA_CACHE: bad, HOME: good });
    expect(asCache.path).toBe(libraryIn(good));
    expect(asCache.passedOver.join()).toContain(bad);
    if (name === "full") {
      expect(
        readdirSync(bad, { recursive: true }).filter((one) => String(one).includes("libhypura")),
      ).toEqual([]);
    }
  });

  test("missing: it is not made", async () => {
    const missing = join(folder, "never", "made");
    const { path, passedOver } = await doctor({ TMPDIR: missing, HOME: "/" });
    expect(path).toStartWith("/tmp/hypura-0/lib-");
    expect(passedOver.join()).toMatch(/never.made.*ENOENT/);
    expect(existsSync(join(folder, "never"))).toBe(false);
  });

  test("none will do: the library is loaded from memory", async () => {
    const nowhere = mount("nowhere", "noexec");
    const reach = fresh("reach");
    copyFileSync(executable, join(reach, "hypura"));
    // What lies over /tmp may hide the executable, so it is reached by /mnt.
    const script = `mount --bind ${reach} /mnt && mount --bind ${nowhere} /tmp && exec /mnt/hypura "$@"`;
    const inside = ["unshare", "--mount", "sh", "-c"];
    const env = { HOME: "/", TMPDIR: nowhere };
    const { path, passedOver } = await doctor(env, [...inside, script, "sh"]);
    expect(path).toStartWith("/proc/self/fd/");
    expect(passedOver.join()).toContain(nowhere);
    expect(passedOver.join()).toContain("/tmp/hypura-0/lib-");
  });

  test("another user's, and two users of one folder do not meet", async () => {
    const shared = fresh("shared");
    chmodSync(folder, 0o755);
    chmodSync(shared, 0o1777);
    const copy = join(folder, "hypura"); // a folder that nobody else can write
    copyFileSync(executable, copy);
    chmodSync(copy, 0o755);
    const nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    const [mine, theirs] = await Promise.all([
      doctor({ HYPURA_CACHE: shared, HOME: "/" }, [copy]),
      doctor({ HYPURA_CACHE: shared, HOME: "/" }, [...nobody, copy]),
    ]);
    expect(mine.path).toStartWith(join(shared, "hypura-0"));
    expect(theirs.path).toStartWith(join(shared, "hypura-65534"));
    // A folder of that name that another user made could hold anything.
    const trap = fresh("trap");
    chmodSync(trap, 0o1777);
    mkdirSync(join(trap, "hypura-0"), { mode: 0o777 });
    chownSync(join(trap, "hypura-0"), 65534, 65534);
    const careful = await doctor({ HYPURA_CACHE: trap, HOME: fresh("trap-home") }, [copy]);
    expect(careful.path).toBe(libraryIn(join(folder, "trap-home")));
    expect(careful.passedOver.join()).toContain("is not a folder that this user alone can write");
  });

  test("an executable in a read-only folder", async () => {
    const sealed = mount("sealed", "size=200m");
    copyFileSync(executable, join(sealed, "hypura"));
    chmodSync(join(sealed, "hypura"), 0o555);
    expect(Bun.spawnSync(["mount", "-o", "remount,ro", sealed]).success).toBe(true);
    const { path, passedOver } = await doctor({ HOME: fresh("sealed-home") }, [join(sealed, "hypura")]);
    expect([path, passedOver]).toEqual([libraryIn(join(folder, "sealed-home")), []]);
  });
});

// ---- which of several ---------------------------------------------------------------------------------------------------

describe("the library for a processor", () => {
  const library = (variant: string, ...needs: readonly string[]): EmbeddedLibrary => ({
    variant,
    needs,
    path: "",
    sizeBytes: 0,
    hash: "",
  });
  const carried = [
    library("wide", "avx2", "avx512f"),
    library("vnni", "avx2", "avx_vnni"),
    library("avx2", "avx2"),
  ];
  const pick = (features: readonly string[] | null, wanted = ""): string =>
    suitable(carried, features === null ? null : new Set(features), wanted).variant;

  test("is the first whose every need is met; the least where the system does not tell", () => {
    expect(pick(["avx2", "avx512f", "avx_vnni"])).toBe("wide");
    expect(pick(["avx2", "avx_vnni"])).toBe("vnni");
    expect(pick(["avx512f", "avx2x", "avx2"])).toBe("wide");
    expect(pick(["avx2"])).toBe("avx2");
    expect(pick(null)).toBe("avx2");
    expect(pick(["avx2", "avx512f"], "avx2")).toBe("avx2");
  });

  test("is refused with what is missing", () => {
    expect(() => pick(["sse4_2"])).toThrow(
      "this release needs a processor with avx2, which this one has not",
    );
    expect(() => pick(["avx2"], "wide")).toThrow("HYPURA_CPU=wide: this processor has no avx512f");
    expect(() => pick(["avx2"], "best")).toThrow("HYPURA_CPU=best: this hypura carries wide, vnni, avx2");
  });
});

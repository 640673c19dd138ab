// The executable alone on an empty machine: a root that holds the C library, /proc (Bun does not start without it: it
// looks for its stack in /proc/self/maps, and aborts), /dev/urandom (the C++ library of releases asks it for seeds), and
// nothing else: no shell, no Bun, no node, no compiler. In the soak run also a fresh Debian of debootstrap's smallest
// variant. Needs root for chroot and the mount, and says so without.

import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync, copyFileSync, mkdirSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { outcomeOf, program, scratchFolder, tinyModel } from "../cli/program";

const executable = program[0] ?? "";
const chroot = Bun.which("chroot");
const isPossible =
  executable.endsWith("/hypura") &&
  process.platform === "linux" &&
  process.getuid?.() === 0 &&
  chroot !== null;
if (!isPossible) {
  console.error("!!! SKIPPED: an empty root: needs Linux, root, and dist/hypura");
}

const mounted: string[] = [];
// Before the scratch folder, whose removal must find nothing mounted.
afterAll(() => {
  for (const proc of mounted) {
    Bun.spawnSync(["umount", proc]);
  }
});
const folder = scratchFolder();
const empty = join(folder, "root");

function mountProc(place: string): boolean {
  const proc = join(place, "proc");
  mkdirSync(proc, { recursive: true });
  if (!Bun.spawnSync(["mount", "-t", "proc", "proc", proc], { stderr: "pipe" }).success) {
    console.error(`!!! SKIPPED: an empty root: mounting is not allowed here`);
    return false;
  }
  mounted.push(proc);
  return true;
}

/** What the executable does alone in a root that has `model`. */
async function expectWorks(place: string, model: string): Promise<void> {
  copyFileSync(executable, join(place, "hypura"));
  chmodSync(join(place, "hypura"), 0o755);
  copyFileSync(model, join(place, "tiny.gguf"));
  const inside = (...words: readonly string[]) =>
    outcomeOf(
      Bun.spawn([chroot ?? "", place, "/hypura", ...words], {
        env: {},
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
      }) as never,
    );
  const version = await inside("version");
  expect([version.status, version.stderr]).toEqual([0, ""]);
  expect(version.stdout).toStartWith("hypura ");
  const inspected = await inside("inspect", "tiny.gguf");
  expect([inspected.status, inspected.stderr]).toEqual([0, ""]);
  expect(inspected.stdout).toContain("llama");
  const answer = ["--prompt", "a", "--max-tokens", "4", "--threads", "1", "--temp", "0"];
  const ran = await inside("run", "tiny.gguf", ...answer);
  expect(ran.status).toBe(0);
  expect(ran.stderr).toContain("4 tokens at");
  const doctor = await inside("doctor", "tiny.gguf");
  expect([doctor.status, doctor.stderr]).toEqual([0, ""]);
  expect(doctor.stdout).toContain("This machine");
}

/** "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)" */
function librariesOf(file: string): readonly string[] {
  const text = Bun.spawnSync(["ldd", file]).stdout.toString();
  return [...text.matchAll(/(\/\S+) \(0x/g)].map((match) => match[1] as string);
}

describe.skipIf(!isPossible || !mountProc(empty))("on an empty machine", () => {
  test("version, inspect, doctor and run work, and need libc only", async () => {
    const libraries = librariesOf(executable);
    for (const library of libraries) {
      expect(library).toMatch(/\/(ld-linux|libc|libm|libdl|libpthread|librt)[-.]/);
      mkdirSync(join(empty, dirname(library)), { recursive: true });
      copyFileSync(library, join(empty, library));
      chmodSync(join(empty, library), 0o755);
    }
    mkdirSync(join(empty, "tmp"));
    mkdirSync(join(empty, "dev"));
    const device = ["mknod", "-m", "444", join(empty, "dev", "urandom"), "c", "1", "9"];
    expect(Bun.spawnSync(device).success).toBe(true);
    await expectWorks(empty, await tinyModel(folder));
    expect(readdirSync(empty).filter((name) => name.startsWith("bin"))).toEqual([]);
  });
});

const debian = join(folder, "debian");

/** Makes a Debian without anything that is not essential; false, said loudly, where no archive can be reached. */
function hasDebian(): boolean {
  const debootstrap = Bun.which("debootstrap");
  if (debootstrap === null) {
    console.error("!!! SKIPPED: a fresh Debian: debootstrap is missing (Debian: apt install debootstrap)");
    return false;
  }
  const made = Bun.spawnSync([debootstrap, "--variant=minbase", "bookworm", debian], { stdout: "pipe" });
  if (!made.success) {
    const last = made.stdout.toString().trim().split("\n").at(-1);
    console.error(`!!! SKIPPED: a fresh Debian: debootstrap could not make it: ${last}`);
    return false;
  }
  return mountProc(debian);
}

const isSoak = process.env["HYPURA_SOAK"] === "1";
describe.skipIf(!isPossible || !isSoak || !hasDebian())("on a fresh Debian", () => {
  test("that has no compiler and no runtime of JavaScript, it works alone", async () => {
    const tools = ["bun", "node", "npm", "cc", "gcc", "c++", "python3"];
    const search = tools.map((tool) => `command -v ${tool}`).join("; ");
    const shell = Bun.spawnSync([chroot ?? "", debian, "/bin/sh", "-c", `${search}; true`]);
    expect([shell.success, shell.stdout.toString()]).toEqual([true, ""]);
    await expectWorks(debian, await tinyModel(folder));
  });
});

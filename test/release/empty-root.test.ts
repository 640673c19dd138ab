// The executable alone on an empty machine: a root that holds the C library, /proc (Bun does not start without it),
// /dev/urandom (the C++ library of releases asks it for seeds), and nothing else: no shell, no Bun, no node, no compiler. Needs root for chroot and the mount, and says so without.

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

let proc = "";
// Before the scratch folder, whose removal must find nothing mounted.
afterAll(() => {
  if (proc !== "") {
    Bun.spawnSync(["umount", proc]);
  }
});
const folder = scratchFolder();
const empty = join(folder, "root");

function isMounted(): boolean {
  proc = join(empty, "proc");
  mkdirSync(proc, { recursive: true });
  const mounted = Bun.spawnSync(["mount", "-t", "proc", "proc", proc], { stderr: "pipe" }).success;
  if (!mounted) {
    proc = "";
    console.error("!!! SKIPPED: an empty root: mounting is not allowed here");
  }
  return mounted;
}

/** "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)" */
function librariesOf(file: string): readonly string[] {
  const text = Bun.spawnSync(["ldd", file]).stdout.toString();
  return [...text.matchAll(/(\/\S+) \(0x/g)].map((match) => match[1] as string);
}

describe.skipIf(!isPossible || !isMounted())("on an empty machine", () => {
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
    copyFileSync(executable, join(empty, "hypura"));
    chmodSync(join(empty, "hypura"), 0o755);
    copyFileSync(await tinyModel(folder), join(empty, "tiny.gguf"));
    const inside = (...words: readonly string[]) =>
      outcomeOf(
        Bun.spawn([chroot ?? "", empty, "/hypura", ...words], {
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
    const ran = await inside(
      "run",
      "tiny.gguf",
      "--prompt",
      "a",
      "--max-tokens",
      "4",
      "--threads",
      "1",
      "--temp",
      "0",
    );
    expect(ran.status).toBe(0);
    expect(ran.stderr).toContain("4 tokens at");
    const doctor = await inside("doctor", "tiny.gguf");
    expect([doctor.status, doctor.stderr]).toEqual([0, ""]);
    expect(doctor.stdout).toContain("This machine");
    expect(readdirSync(empty).filter((name) => name.startsWith("bin"))).toEqual([]);
  });
});

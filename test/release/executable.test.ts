// What packaging refuses: an executable that was stripped, cut or altered. And what the release says of itself.

import { describe, expect, test } from "bun:test";
import { copyFileSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { signatureFault } from "../../ffi/macho";
import { parseAuxiliary, parseCpuInfo, parseSysctl } from "../../ffi/processor";
import { notesOf } from "../../ffi/release";
import { targets } from "../../ffi/targets";
import packageJson from "../../package.json";
import { outcomeOf, program, root, scratchFolder } from "../cli/program";

const executable = program[0] ?? "";
const isBuilt = executable.endsWith("/hypura");
const folder = scratchFolder();

async function check(...files: readonly string[]) {
  const words = [process.execPath, join(root, "ffi", "release.ts"), "--check", ...files];
  return outcomeOf(Bun.spawn(words, { stdin: "ignore", stdout: "pipe", stderr: "pipe" }) as never);
}

describe.skipIf(!isBuilt)("an executable", () => {
  test("as it was built is whole", async () => {
    expect(await check(executable)).toEqual({ status: 0, stdout: "", stderr: `${executable} is whole\n` });
  });

  const strips = process.platform === "linux" && Bun.which("strip") !== null;
  test.skipIf(!strips).each([[[]], [["--strip-debug"]], [["--strip-unneeded"]]])(
    "that was stripped is refused: strip %p",
    async (flags) => {
      const file = join(folder, "stripped");
      copyFileSync(executable, file);
      expect(Bun.spawnSync(["strip", ...flags, file]).success).toBe(true);
      const { status, stderr } = await check(executable, file);
      expect(status).toBe(1);
      expect(stderr).toContain(`${file} was stripped`);
      // The reason for the refusal: what is left is not hypura.
      expect(Bun.spawnSync([file, "version"]).stdout.toString()).not.toContain("hypura");
    },
  );

  test("that is cut, none, or another file is refused", async () => {
    const file = join(folder, "cut");
    copyFileSync(executable, file);
    truncateSync(file, 60_000_000);
    const text = join(folder, "text");
    writeFileSync(text, "x".repeat(100));
    const { status, stderr } = await check(file, text, join(folder, "none"));
    expect(status).toBe(1);
    expect(stderr).toContain(`${text} is no executable`);
    expect(stderr).toContain(`${join(folder, "none")} is not there`);
    expect(stderr.split("\n")[0]).toMatch(/cut/);
  });
});

/** The least Mach-O that has a signature: one page of code, its hash, and the load command that points at it. */
function signed(alter: (file: Buffer) => void = () => {}): string {
  const [page, code] = [4096, Buffer.alloc(5000, 7)];
  code.writeUInt32LE(0xfeedfacf, 0);
  code.writeUInt32LE(1, 16); // one load command:
  code.writeUInt32LE(0x1d, 32); // LC_CODE_SIGNATURE
  code.writeUInt32LE(16, 36);
  code.writeUInt32LE(code.length, 40);
  code.writeUInt32LE(20 + 108, 44);
  const blob = Buffer.alloc(20 + 108);
  blob.writeUInt32BE(0xfade0cc0, 0);
  blob.writeUInt32BE(1, 8);
  blob.writeUInt32BE(20, 16);
  const directory = blob.subarray(20);
  directory.writeUInt32BE(0xfade0c02, 0);
  directory.writeUInt32BE(44, 16); // hashes begin here
  directory.writeUInt32BE(2, 28); // pages
  directory.writeUInt32BE(code.length, 32);
  directory.writeUInt8(32, 36);
  directory.writeUInt8(2, 37); // SHA-256
  directory.writeUInt8(12, 39); // 2 ** 12 bytes a page
  for (const index of [0, 1]) {
    const bytes = code.subarray(index * page, (index + 1) * page);
    new Bun.CryptoHasher("sha256")
      .update(bytes)
      .digest()
      .copy(directory, 44 + index * 32);
  }
  const file = Buffer.concat([code, blob]);
  alter(file);
  const path = join(folder, "macho");
  writeFileSync(path, file);
  return path;
}

test("a signature of macOS holds for the bytes it was made for, and for no others", () => {
  expect(signatureFault(signed())).toBeNull();
  expect(signatureFault(signed((file) => void file.writeUInt8(8, 4500)))).toContain(
    "page 1 of 2 has another hash",
  );
  expect(signatureFault(signed((file) => void file.writeUInt32LE(0x1c, 32)))).toContain("no code signature");
  expect(signatureFault(signed((file) => void file.writeUInt32LE(9000, 44)))).toContain("cut off");
  expect(signatureFault(signed((file) => void file.writeUInt8(1, 5000 + 20 + 37)))).toContain(
    "not with SHA-256",
  );
  expect(signatureFault(signed((file) => void file.writeUInt32BE(4096, 5000 + 20 + 32)))).toContain(
    "covers 4096",
  );
});

describe("processors", () => {
  test("as Linux and macOS show them", () => {
    expect(parseCpuInfo("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t: x\n")).toEqual(
      new Set(["fpu", "avx2", "fma"]),
    );
    expect(parseCpuInfo("processor\t: 0\nFeatures\t: fp asimddp\n\n")).toEqual(new Set(["fp", "asimddp"]));
    expect(parseCpuInfo("nothing of the kind\n")).toBeNull();
    const auxiliary = (...words: readonly bigint[]) => new Uint8Array(new BigUint64Array(words).buffer);
    const [pageBytes, hwcap, hwcap2] = [6n, 16n, 26n];
    // Neoverse N1 as Linux 6.1 shows it, then what i8mm adds.
    const n1 = auxiliary(pageBytes, 4096n, hwcap, 0x10_ffffn | (1n << 28n), hwcap2, 0n, 0n, 0n);
    expect(parseAuxiliary(n1)).toEqual(new Set(["asimdhp", "asimddp"]));
    const v1 = auxiliary(hwcap2, 1n << 13n, hwcap, (1n << 10n) | (1n << 20n), 0n, 0n);
    expect(parseAuxiliary(v1)).toEqual(new Set(["asimdhp", "asimddp", "i8mm"]));
    expect(parseAuxiliary(auxiliary(hwcap, 0xffn, 0n, 0n))).toEqual(new Set()); // Cortex-A72
    expect(parseAuxiliary(auxiliary(pageBytes, 4096n, 0n, 0n))).toBeNull();
    const text =
      "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_FP16: 1\nhw.optional.arm.FEAT_I8MM: 0\n";
    expect(parseSysctl(text)).toEqual(new Set(["asimddp", "asimdhp"]));
  });

  test.each(Object.values(targets))(
    "variants of $name: the last is the least, and each other adds to it",
    ({ variants }) => {
      const least = variants.at(-1);
      expect(least?.flags).toBeNull();
      for (const variant of variants.slice(0, -1)) {
        expect(variant.flags).not.toBeNull();
        expect(least?.needs.every((need) => variant.needs.includes(need))).toBe(true);
        expect(variant.needs.length).toBeGreaterThan(least?.needs.length ?? 0);
      }
    },
  );
});

test("packages of several machines get their checksums and the installer its address", async () => {
  const release = (...words: readonly string[]) =>
    outcomeOf(
      Bun.spawn([process.execPath, join(root, "ffi", "release.ts"), ...words], {
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
      }) as never,
    );
  const files = join(folder, "files");
  mkdirSync(files);
  const names = Object.keys(targets).map((name) => `hypura-${name}.tar.gz`);
  for (const name of names.slice(1)) {
    writeFileSync(join(files, name), name);
  }
  const url = "https://example.org/v1";
  const incomplete = await release("--assemble", files, "--url", url);
  expect([incomplete.status, incomplete.stderr]).toEqual([1, `${files} has no package for linux-x64\n`]);
  writeFileSync(join(files, names[0] ?? ""), names[0] ?? "");
  expect((await release("--assemble", files, "--url", url)).status).toBe(0);
  const sums = readFileSync(join(files, "SHA256SUMS"), "utf8");
  for (const name of names) {
    expect(sums).toContain(`${new Bun.CryptoHasher("sha256").update(name).digest("hex")}  ${name}\n`);
  }
  expect(readFileSync(join(files, "install.sh"), "utf8")).toContain(`\nrelease_url='${url}'\n`);
  expect((await release("--assemble", files)).stderr).toContain("--assemble needs --url");
  expect((await release("--tarjet", "x")).stderr).toContain("release has no option --tarjet");
  expect((await release("--target", "plan9")).stderr).toContain(
    "--target plan9: give linux-x64, linux-arm64, darwin-arm64",
  );
});

test("the release's notes are this version's part of the changelog", () => {
  const changelog = readFileSync(join(root, "CHANGELOG.md"), "utf8");
  expect(notesOf(packageJson.version, changelog)).not.toContain("## ");
  expect(notesOf("1.0.0", "# C\n\n## 2.0.0\n\nb\n\n## 1.0.0\n\na\nc\n\n## 0.9.0\n\nd\n")).toBe("a\nc\n");
  expect(() => notesOf("9.9.9", changelog)).toThrow('write what is new under "## 9.9.9"');
});

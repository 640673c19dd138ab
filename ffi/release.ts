// Makes the files of a release in dist/release/: for each target one executable with its libraries inside, packed, with
// checksums, the installer and the notes. It makes what can be made on this machine and says what could not be and why;
// it publishes nothing (the workflow does).
//
//   bun ffi/release.ts [--target NAME ...] [--url URL]
//     --target NAME   linux-x64, linux-arm64, darwin-arm64 (default: all)
//     --url URL       where the files will be found, for the installer
//   bun ffi/release.ts --assemble FOLDER --url URL
//     checksums and the installer for the packages in FOLDER, which several machines made
//   bun ffi/release.ts --check FILE ...
//     refuses an executable that was stripped, cut or altered so that it cannot start: for packagers

import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import packageJson from "../package.json";
import { unpackLlama } from "../vendor/unpack";
import { checkTools, installPackages } from "./build";
import { runQuietly, say } from "./cmake";
import { buildLibraries, compilerFor } from "./cross";
import { faultOf, makeExecutable } from "./executable";
import { type Target, type TargetName, targets } from "./targets";

const root = join(import.meta.dir, "..");
const output = join(root, "dist", "release");

/** Best size; takes a second for a library. */
const releaseLevel = 19;

interface Outcome {
  readonly target: TargetName;
  /** Null where it could not be made. */
  readonly file: string | null;
  /** What a person should know of it, or why it is not there. */
  readonly note: string;
}

/** The name of a target's file: what install.sh asks for. */
function packedName(target: TargetName, isWhole: boolean): string {
  return `hypura-${target}${isWhole ? "" : "-without-metal"}.tar.gz`;
}

async function make(target: Target): Promise<Outcome> {
  const compiler = compilerFor(target);
  // Only a Mac has what Metal needs. What is made elsewhere has another name: no installer takes it for the release.
  const isWhole = target.platform !== "darwin" || compiler === "host";
  try {
    const libraries = await buildLibraries(target, compiler);
    const folder = join(output, target.name);
    const executable = join(folder, "hypura");
    say(`making ${target.name}`);
    await makeExecutable({ libraries, outfile: executable, bunTarget: target.bun, level: releaseLevel });
    if (compiler === "host" && target.platform === "darwin") {
      await sign(executable);
    }
    const isHere = target.platform === process.platform && target.arch === process.arch;
    if (isHere) {
      await runQuietly([executable, "version"], tmpdir());
    }
    copyFileSync(join(root, "LICENSE"), join(folder, "LICENSE"));
    const packed = join(output, packedName(target.name, isWhole));
    const temporary = `${packed}.part`;
    await runQuietly(["tar", "-czf", temporary, "-C", folder, "hypura", "LICENSE"], root);
    renameSync(temporary, packed);
    const notes = [
      `${megabytes(executable)} MB, packed ${megabytes(packed)} MB, ${libraries.map(({ variant }) => variant).join(", ")}`,
      ...(isWhole
        ? []
        : ["WITHOUT METAL, not for release: Apple's SDK is on Macs only, the workflow makes the whole one"]),
      ...(isHere ? [] : ["never started: this machine is another one"]),
    ];
    return { target: target.name, file: packed, note: notes.join("; ") };
  } catch (error) {
    return { target: target.name, file: null, note: (error as Error).message };
  }
}

/** What a hardened hypura needs: JavaScriptCore's JIT, and a library that is unpacked at the first start. */
const entitled = ["allow-jit", "allow-unsigned-executable-memory", "disable-library-validation"];

/**
 * The library was signed by the linker before it went in, and nothing changed it since; the executable is signed last.
 * "-" is ad-hoc, which Macs start when it did not come through a browser; a Developer ID is named by the environment.
 */
async function sign(executable: string): Promise<void> {
  const identity = process.env["HYPURA_SIGN_IDENTITY"] ?? "-";
  const entitlements = join(root, "build", "entitlements.plist");
  const keys = entitled.map((name) => `<key>com.apple.security.cs.${name}</key><true/>`).join("");
  writeFileSync(
    entitlements,
    `<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict>${keys}</dict></plist>\n`,
  );
  const options = ["--force", "--options", "runtime", "--entitlements", entitlements, "--sign", identity];
  await runQuietly(["codesign", ...options, executable], root);
  await runQuietly(["codesign", "--verify", "--strict", executable], root);
}

function megabytes(file: string): string {
  return (statSync(file).size / 1e6).toFixed(1);
}

/** `sha256sum -c` reads it, and so does install.sh. */
function writeChecksums(folder: string, files: readonly string[]): void {
  const lines = files.map(
    (file) =>
      `${new Bun.CryptoHasher("sha256").update(readFileSync(file)).digest("hex")}  ${basename(file)}\n`,
  );
  writeFileSync(join(folder, "SHA256SUMS"), lines.join(""));
}

/** The installer, which knows from here on where the release is. */
function writeInstaller(folder: string, url: string): void {
  const text = readFileSync(join(root, "install.sh"), "utf8");
  const filled = text.replace(/^release_url=""$/m, () => `release_url='${url.replaceAll("'", "%27")}'`);
  if (filled === text) {
    throw new Error("install.sh has no line for the release's address");
  }
  writeFileSync(join(folder, "install.sh"), filled, { mode: 0o755 });
}

/** The version's own part of CHANGELOG.md. */
export function notesOf(version: string, changelog: string): string {
  const parts = changelog.split(/^## /m).slice(1);
  const own = parts.find((part) => part.split("\n", 1)[0]?.trim() === version);
  const text = own?.slice(own.indexOf("\n")).trim() ?? "";
  if (text === "") {
    throw new Error(`CHANGELOG.md says nothing of ${version}: write what is new under "## ${version}"`);
  }
  return `${text}\n`;
}

function chosenTargets(argv: readonly string[]): readonly Target[] {
  const names = valuesOf(argv, "--target");
  const unknown = names.find((name) => !Object.hasOwn(targets, name));
  if (unknown !== undefined) {
    throw new Error(`--target ${unknown}: give ${Object.keys(targets).join(", ")}`);
  }
  const wanted = names.length === 0 ? Object.keys(targets) : names;
  return wanted.map((name) => targets[name as TargetName]);
}

function valuesOf(argv: readonly string[], flag: string): readonly string[] {
  return argv.flatMap((word, index) => {
    const value = argv[index + 1];
    if (word !== flag) {
      return [];
    }
    if (value === undefined) {
      throw new Error(`${flag} needs a value`);
    }
    return [value];
  });
}

async function release(argv: readonly string[]): Promise<boolean> {
  const chosen = chosenTargets(argv);
  const notes = notesOf(packageJson.version, readFileSync(join(root, "CHANGELOG.md"), "utf8"));
  checkTools();
  await installPackages();
  await unpackLlama(say);
  rmSync(output, { recursive: true, force: true });
  mkdirSync(output, { recursive: true });
  const outcomes: Outcome[] = [];
  for (const target of chosen) {
    outcomes.push(await make(target));
  }
  writeChecksums(
    output,
    outcomes.flatMap(({ file }) => (file === null ? [] : [file])),
  );
  writeFileSync(join(output, "NOTES.md"), notes);
  const [url] = valuesOf(argv, "--url");
  if (url !== undefined) {
    writeInstaller(output, url);
  }
  for (const { target, file, note } of outcomes) {
    say(file === null ? `NOT MADE  ${target}: ${note}` : `made      ${target}: ${note}`);
  }
  return outcomes.every(({ file }) => file !== null);
}

/** For packages that several machines made. */
function assemble(folder: string, argv: readonly string[]): boolean {
  const files = readdirSync(folder)
    .filter((name) => name.endsWith(".tar.gz"))
    .toSorted();
  const missing = Object.values(targets).filter(({ name }) => !files.includes(packedName(name, true)));
  const [url] = valuesOf(argv, "--url");
  if (missing.length > 0) {
    throw new Error(`${folder} has no package for ${missing.map(({ name }) => name).join(", ")}`);
  }
  if (url === undefined) {
    throw new Error("--assemble needs --url, the address where the files will be found");
  }
  writeChecksums(
    folder,
    files.map((name) => join(folder, name)),
  );
  writeInstaller(folder, url);
  say(`${files.join(", ")}: SHA256SUMS and install.sh are written`);
  return true;
}

/** Says what is wrong with each file; true where nothing is. */
function check(files: readonly string[]): boolean {
  const faults = files.map((file) => {
    try {
      return existsSync(file) ? faultOf(file) : `${file} is not there`;
    } catch (error) {
      return (error as Error).message;
    }
  });
  for (const [index, fault] of faults.entries()) {
    say(fault ?? `${files[index]} is whole`);
  }
  return faults.every((fault) => fault === null);
}

async function obey(argv: readonly string[]): Promise<boolean> {
  const [first, ...rest] = argv;
  if (first === "--check") {
    return check(rest);
  }
  if (first === "--assemble") {
    const [folder] = valuesOf(argv, "--assemble");
    return assemble(resolve(folder ?? ""), rest);
  }
  const unknown = argv.find((word, index) => index % 2 === 0 && word !== "--target" && word !== "--url");
  if (unknown !== undefined) {
    throw new Error(`release has no option ${unknown}: --target, --url, --assemble or --check`);
  }
  return release(argv);
}

if (import.meta.main) {
  const argv = process.argv.slice(2);
  try {
    process.exit((await obey(argv)) ? 0 : 1);
  } catch (error) {
    say((error as Error).message);
    process.exit(1);
  }
}

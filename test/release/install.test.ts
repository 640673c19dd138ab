// install.sh against a file server of this test: what it installs, and that nothing stays where it does not. The hypura
// in the package is a stand-in of one line: the script only starts it once.

import { afterAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { outcomeOf, root, scratchFolder } from "../cli/program";

const folder = scratchFolder();
const target = `${process.platform}-${process.arch}`;
const name = `hypura-${target}.tar.gz`;

/** A package with a program that says `words`, or fails. */
function packed(words: string): Buffer {
  const place = join(folder, `package-${words.replace(/\W/g, "-")}`);
  mkdirSync(place, { recursive: true });
  writeFileSync(join(place, "hypura"), words === "" ? "#!/bin/sh\nexit 1\n" : `#!/bin/sh\necho '${words}'\n`);
  chmodSync(join(place, "hypura"), 0o755);
  const made = Bun.spawnSync(["tar", "-czf", join(place, name), "-C", place, "hypura"]);
  expect(made.success).toBe(true);
  return readFileSync(join(place, name));
}

function sumOf(bytes: Uint8Array): string {
  return new Bun.CryptoHasher("sha256").update(bytes).digest("hex");
}

const good = packed("hypura 9.9.9");
const broken = packed("");

/** Path -> answer; each folder is a release. */
const served: Readonly<Record<string, () => Response>> = {
  [`/good/${name}`]: () => new Response(good),
  "/good/SHA256SUMS": () => new Response(`${sumOf(broken)}  other.tar.gz\n${sumOf(good)}  ${name}\n`),
  [`/wrong/${name}`]: () => new Response(good),
  "/wrong/SHA256SUMS": () => new Response(`${sumOf(broken)}  ${name}\n`),
  [`/cut/${name}`]: () => new Response(good.subarray(0, good.length / 2)),
  "/cut/SHA256SUMS": () => new Response(`${sumOf(good)}  ${name}\n`),
  "/unlisted/SHA256SUMS": () => new Response(`${sumOf(good)}  hypura-plan9-mips.tar.gz\n`),
  [`/unlisted/${name}`]: () => new Response(good),
  "/missing/SHA256SUMS": () => new Response(`${sumOf(good)}  ${name}\n`),
  [`/broken/${name}`]: () => new Response(broken),
  "/broken/SHA256SUMS": () => new Response(`${sumOf(broken)}  ${name}\n`),
  "/slow/SHA256SUMS": () => new Response(`${sumOf(good)}  ${name}\n`),
  [`/slow/${name}`]: () =>
    new Response(
      new ReadableStream({
        async pull(controller) {
          await Bun.sleep(100);
          controller.enqueue(new Uint8Array(10));
        },
      }),
    ),
};
const server = Bun.serve({
  port: 0,
  hostname: "127.0.0.1",
  fetch: (request) => served[new URL(request.url).pathname]?.() ?? new Response("no", { status: 404 }),
});
// A server that promises more than it sends before it hangs up.
const liar = Bun.listen({
  port: 0,
  hostname: "127.0.0.1",
  socket: {
    data(socket, data) {
      const isSums = data.toString().includes("SHA256SUMS");
      const body = isSums ? Buffer.from(`${sumOf(good)}  ${name}\n`) : good.subarray(0, 100);
      const length = isSums ? body.length : good.length;
      socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${length}\r\nConnection: close\r\n\r\n`);
      socket.write(body);
      socket.end();
    },
  },
});
afterAll(async () => {
  liar.stop(true);
  await server.stop(true);
});

interface Place {
  readonly home: string;
  readonly tmp: string;
}

function freshPlace(what: string): Place {
  const home = join(folder, `home of ${what}`);
  const tmp = join(folder, `tmp of ${what}`);
  mkdirSync(home, { recursive: true });
  mkdirSync(tmp, { recursive: true });
  return { home, tmp };
}

function start({ home, tmp }: Place, args: readonly string[], path = process.env["PATH"] ?? "") {
  return Bun.spawn(["/bin/sh", join(root, "install.sh"), ...args], {
    env: { HOME: home, TMPDIR: tmp, PATH: path },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
}

async function install(place: Place, args: readonly string[], path?: string) {
  return outcomeOf(start(place, args, path) as never);
}

function filesUnder(path: string): readonly string[] {
  return readdirSync(path, { recursive: true, withFileTypes: true })
    .filter((entry) => !entry.isDirectory())
    .map((entry) => join(entry.parentPath, entry.name));
}

const hasDownloader = Bun.which("curl") !== null || Bun.which("wget") !== null;
if (!hasDownloader) {
  console.error("!!! SKIPPED: install.sh: neither curl nor wget is here");
}

describe.skipIf(!hasDownloader)("install.sh", () => {
  const from = (release: string): readonly string[] => [
    "--from",
    `http://127.0.0.1:${server.port}/${release}`,
  ];

  test("installs to ~/.local/bin, says so, and how to undo it", async () => {
    const place = freshPlace("good");
    const { status, stdout, stderr } = await install(place, from("good"));
    const installed = join(place.home, ".local", "bin", "hypura");
    expect([status, stdout]).toEqual([0, ""]);
    expect(stderr).toContain(`installed hypura 9.9.9 as ${installed}\n`);
    expect(stderr).toContain(`to undo: rm ${installed}`);
    expect(stderr).toContain("is not in PATH: add it");
    expect(filesUnder(place.home)).toEqual([installed]);
    expect(readdirSync(place.tmp)).toEqual([]);
    expect(Bun.spawnSync([installed]).stdout.toString()).toBe("hypura 9.9.9\n");
  });

  test("installs to a folder that is given, over an older one", async () => {
    const place = freshPlace("given");
    const to = join(place.home, "a b");
    mkdirSync(to);
    writeFileSync(join(to, "hypura"), "old");
    const { status, stderr } = await install(
      place,
      [...from("good/"), "--to", to],
      `${to}:${process.env["PATH"]}`,
    );
    expect(status).toBe(0);
    expect(stderr).not.toContain("is not in PATH");
    expect(readFileSync(join(to, "hypura"), "utf8")).toContain("9.9.9");
    expect(readdirSync(to)).toEqual(["hypura"]);
  });

  test("does with wget what it does with curl", async () => {
    const wget = Bun.which("wget");
    if (wget === null || Bun.which("sha256sum") === null) {
      console.error("!!! SKIPPED: install.sh with wget: it is not here");
      return;
    }
    const tools = join(folder, "tools");
    mkdirSync(tools);
    for (const tool of "wget tar gzip sha256sum uname mktemp sed rm cp mv mkdir chmod rmdir cat".split(" ")) {
      symlinkSync(Bun.which(tool) ?? tool, join(tools, tool));
    }
    const place = freshPlace("wget");
    expect((await install(place, from("good"), tools)).status).toBe(0);
    const other = freshPlace("wget-missing");
    const failed = await install(other, from("missing"), tools);
    expect([failed.status, filesUnder(other.home), readdirSync(other.tmp)]).toEqual([1, [], []]);
    expect(failed.stderr).toContain("could not be downloaded");
  });

  test.each([
    ["wrong", /is not what the release says \(checksum [0-9a-f]{64}, wanted [0-9a-f]{64}\)/],
    ["cut", /is not what the release says/],
    ["unlisted", /the release has no checksum for hypura-/],
    ["missing", /hypura-.*\.tar\.gz could not be downloaded/],
    ["none", /SHA256SUMS could not be downloaded/],
    ["broken", /hypura does not start on this machine/],
  ])("a release that is %s leaves nothing, and an older hypura stays", async (release, reason) => {
    const place = freshPlace(release);
    const { status, stdout, stderr } = await install(place, from(release));
    expect([status, stdout]).toEqual([1, ""]);
    expect(stderr).toMatch(reason);
    expect([filesUnder(place.home), readdirSync(place.tmp)]).toEqual([[], []]);
    const to = join(place.home, "bin");
    mkdirSync(to);
    writeFileSync(join(to, "hypura"), "old");
    expect((await install(place, [...from(release), "--to", to])).status).toBe(1);
    expect([readdirSync(to), readFileSync(join(to, "hypura"), "utf8")]).toEqual([["hypura"], "old"]);
  });

  test("a download that ends early leaves nothing", async () => {
    const place = freshPlace("early");
    const { status } = await install(place, ["--from", `http://127.0.0.1:${liar.port}`]);
    expect(status).toBe(1);
    expect([filesUnder(place.home), readdirSync(place.tmp)]).toEqual([[], []]);
  });

  test.skipIf(Bun.which("setsid") === null)("Ctrl-C while it downloads leaves nothing", async () => {
    const place = freshPlace("interrupted");
    const child = Bun.spawn(["setsid", "/bin/sh", join(root, "install.sh"), ...from("slow")], {
      env: { HOME: place.home, TMPDIR: place.tmp, PATH: process.env["PATH"] ?? "" },
      stdin: "ignore",
      stdout: "ignore",
      stderr: "ignore",
    });
    while (filesUnder(place.tmp).every((file) => !file.endsWith(".tar.gz"))) {
      await Bun.sleep(20);
    }
    process.kill(-child.pid, "SIGINT"); // as a terminal does: to the whole group
    expect(await child.exited).toBe(130);
    expect([filesUnder(place.home), readdirSync(place.tmp)]).toEqual([[], []]);
  });

  test.each([
    [[], "this install.sh is of no release: give --from URL"],
    [["--to"], "--to needs a value"],
    [["--frm", "x"], "there is no option --frm"],
  ])("%p is refused", async (args, message) => {
    const place = freshPlace("usage");
    const { status, stderr } = await install(place, args);
    expect(status).toBe(1);
    expect(stderr).toContain(`error: ${message}`);
    expect(existsSync(join(place.home, ".local"))).toBe(false);
  });
});

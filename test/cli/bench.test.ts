// `hypura bench`, `hypura replay`, `run --trace` and `run --plan` as a user meets them: figures, records, refusals, a
// disk that is full, Ctrl-C, and what goes to which stream.

import { beforeAll, describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { RunRecord } from "../../src/bench";
import { makeMemoryGroup } from "../../src/memory-group";
import { makeFixture } from "../fixtures";
import { environment, eventually, hypura, outcomeOf, program, scratchFolder, tinyModel } from "./program";

const folder = scratchFolder();
const home = join(folder, "home");
const env = { HYPURA_HOME: home };
let dense = "";
let moe = "";

beforeAll(async () => {
  dense = await tinyModel(folder);
  const [path = ""] = await makeFixture("tiny-qwen3moe", join(folder, "moe.gguf"));
  moe = path;
});

const short = ["--runs", "1", "--max-tokens", "12", "--prompt-tokens", "20"];
const quick = [...short, "--threads", "1"];

function recordsIn(): readonly RunRecord[] {
  return readdirSync(join(home, "bench"))
    .sort()
    .map((name) => JSON.parse(readFileSync(join(home, "bench", name), "utf8")));
}

function widest(text: string): number {
  return Math.max(...text.split("\n").map((line) => Bun.stringWidth(line)));
}

/** Whether this process may make a control group with a limit. */
function mayLimit(): boolean {
  try {
    makeMemoryGroup(1_000_000_000).remove();
    return true;
  } catch {
    return false;
  }
}

/** The control group that a benchmark of this process number makes. */
function groupOf(processId: number): string {
  const own = makeMemoryGroup(1_000_000_000);
  own.remove();
  return own.path.replace(String(process.pid), String(processId));
}

describe("bench", () => {
  test("both sides, cold and warm: a table, four records, a page", async () => {
    rmSync(join(home, "bench"), { recursive: true, force: true });
    const page = join(folder, "page.html");
    const trace = join(folder, "bench.trace");
    const { status, stdout, stderr } = await hypura(
      ["bench", moe, "--mode", "stream", "--baseline", ...quick, "--html", page, "--trace", trace],
      { env },
    );
    expect([status, stderr.includes("error")]).toEqual([0, false]);
    for (const word of ["hypura cold", "hypura warm", "baseline cold", "baseline warm", "decode tok/s"]) {
      expect(stdout).toContain(word);
    }
    expect(stdout).toMatch(/hypura to baseline, cold: decode [\d.]+x/);
    expect(widest(stdout)).toBeLessThanOrEqual(100);
    const records = recordsIn();
    expect(records.map((one) => `${one.side} ${one.state}`)).toEqual([
      "hypura cold",
      "baseline cold",
      "baseline warm",
      "hypura warm",
    ]);
    for (const { outcome, side, plan, model } of records) {
      expect(outcome.status).toBe("finished");
      if (outcome.status === "finished") {
        const { figures } = outcome;
        expect(figures.decodedTokens).toBe(11);
        expect(figures.decodeTokensPerSecond.median).toBeGreaterThan(0);
        expect(figures.peakBytes).toBeGreaterThan(1e6);
        expect(figures.reads.oursBytes === null).toBe(side === "baseline");
        expect(figures.reads.hits + figures.reads.misses > 0).toBe(side === "hypura");
      }
      expect(plan.mode).toBe(side === "hypura" ? "expert-streaming" : "full-resident");
      expect(model.hash).toMatch(/^[0-9a-f]{32}$/);
    }
    const html = readFileSync(page, "utf8");
    for (const title of ["Timeline of a token", "Bytes read by layer", "Hit rate over tokens"]) {
      expect(html).toContain(title);
    }
    expect(html).not.toMatch(/<script|<link|\b(?:src|href)=/); // it needs nothing else
    expect(html).not.toContain("NaN");
    const replayed = await hypura(["replay", trace, "--json"]);
    expect(JSON.parse(replayed.stdout)).toMatchObject({ isExact: true });
  }, 120_000);

  test("--json is one object on stdout, --history lists what was kept", async () => {
    const page = join(folder, "resident.html");
    const { status, stdout } = await hypura(["bench", dense, "--json", ...quick, "--html", page], { env });
    expect(status).toBe(0);
    expect(readFileSync(page, "utf8")).toContain("there is no pool to draw");
    const { records, ratios } = JSON.parse(stdout);
    expect([records.length, ratios]).toEqual([2, []]);
    const history = await hypura(["bench", "--history"], { env });
    expect(history.status).toBe(0);
    expect(history.stdout.split("\n").filter((line) => line.includes("tiny")).length).toBeGreaterThan(0);
    expect(widest(history.stdout)).toBeLessThanOrEqual(100);
    const own = await hypura(["bench", dense, "--history", "--json"], { env });
    const hashes = JSON.parse(own.stdout).records.map((one: RunRecord) => one.model.hash);
    expect(new Set(hashes)).toEqual(new Set([records[0].model.hash]));
  }, 120_000);

  test("records that are damaged are counted, not trusted", async () => {
    writeFileSync(join(home, "bench", "0-broken.json"), '{"version":1}');
    const { status, stdout, stderr } = await hypura(["bench", "--history"], { env });
    expect([status, stderr.includes("1 record is damaged")]).toEqual([0, true]);
    expect(stdout).toContain("Kept benchmarks");
    rmSync(join(home, "bench", "0-broken.json"));
  });

  test.each(["SIGINT", "SIGTERM"] as const)(
    "%s keeps the runs that are done and leaves nothing",
    async (name) => {
      const limit = mayLimit() ? ["--memory", "1G"] : [];
      rmSync(join(home, "bench"), { recursive: true, force: true });
      const child = Bun.spawn(
        [...program, "bench", dense, "--threads", "1", "--runs", "50", "--max-tokens", "30", ...limit],
        {
          env: { ...environment, ...env },
          stdin: "ignore",
          stdout: "pipe",
          stderr: "pipe",
        },
      );
      const isThere = (): true | undefined =>
        existsSync(join(home, "bench")) && readdirSync(join(home, "bench")).length >= 2 ? true : undefined;
      await eventually(isThere, () => "no two runs were kept");
      const group = limit.length === 0 ? null : groupOf(child.pid);
      expect(group === null || existsSync(group)).toBe(true);
      child.kill(name);
      const { status, stdout, stderr } = await outcomeOf(child);
      expect(group !== null && existsSync(group)).toBe(false);
      expect(status).toBe(130);
      expect(stderr).toMatch(/stopped: \d+ runs are done and kept/);
      expect(stdout).toContain("decode tok/s");
      expect(recordsIn().every((one) => one.outcome.status === "finished")).toBe(true);
    },
    120_000,
  );

  test("a plan from inspect is taken back, and one of another model is not", async () => {
    const plan = join(folder, "plan.json");
    const inspected = await hypura([
      "inspect",
      moe,
      "--mode",
      "stream",
      "--context",
      "300",
      "--threads",
      "1",
      "--json",
    ]);
    writeFileSync(plan, inspected.stdout);
    const run = ["run", moe, "--plan", plan, "--raw", "--prompt", "a", "--max-tokens", "3", "--json"];
    const { status, stdout } = await hypura(run);
    expect([status, JSON.parse(stdout).mode]).toEqual([0, "expert-streaming"]);
    const benched = await hypura(
      ["bench", moe, "--plan", plan, "--json", "--runs", "1", "--max-tokens", "5"],
      { env },
    );
    expect(JSON.parse(benched.stdout).records[0].plan.contextTokens).toBe(300);
    for (const [words, message] of [
      [["run", dense, "--plan", plan, "--prompt", "a"], /made for another model/],
      [["run", moe, "--plan", moe, "--prompt", "a"], /is no JSON/],
      [["run", moe, "--plan", join(folder, "none"), "--prompt", "a"], /there is no plan file/],
      [
        ["run", moe, "--plan", plan, "--memory", "1G", "--prompt", "a"],
        /--plan decides all that --memory would/,
      ],
    ] as const) {
      const refused = await hypura(words);
      expect(refused.stderr).toMatch(message);
      expect(refused.status).toBeGreaterThan(0);
    }
  }, 120_000);

  test("what is wrong is said before anything runs", async () => {
    for (const [words, message] of [
      [["bench"], /needs a MODEL/],
      [["bench", moe, "--runs", "0"], /--runs "0"/],
      [["bench", moe, "--max-tokens", "1"], /--max-tokens "1"/],
      [
        ["bench", moe, "--context", "64", "--prompt-tokens", "60", "--max-tokens", "10"],
        /do not fit the context/,
      ],
      [["bench", dense, "--trace", join(folder, "x"), "--mode", "resident"], /whole model is in memory/],
      [["bench", moe, "--mode", "fast"], /--mode "fast"/],
    ] as const) {
      const { status, stderr } = await hypura(words, { env });
      expect(stderr).toMatch(message);
      expect(status).toBe(2);
    }
  });

  test.skipIf(!mayLimit())(
    "--memory runs in a control group, whose end is recorded",
    async () => {
      rmSync(join(home, "bench"), { recursive: true, force: true });
      const { status, stdout } = await hypura(
        ["bench", moe, "--memory", "200M", "--mode", "stream", ...quick, "--json"],
        {
          env,
        },
      );
      expect(status).toBe(0);
      const [record] = JSON.parse(stdout).records as readonly RunRecord[];
      expect(record?.settings.groupBytes).toBe(200e6);
      expect(
        record?.outcome.status === "finished" && record.outcome.figures.groupPeakBytes,
      ).toBeLessThanOrEqual(200e6);
      // A plan that needs more than the group has: the kernel ends it, and that is a result.
      const plan = join(folder, "large.json");
      const inspected = JSON.parse(
        (await hypura(["inspect", moe, "--mode", "stream", "--threads", "1", "--json"])).stdout,
      );
      inspected.plan.streaming.spanWorkBytes = 16_777_216;
      for (const one of inspected.plan.streaming.classes) {
        one.slotBytes = 1_048_576; // room for far more than the strides need, all of it touched at open
      }
      writeFileSync(plan, JSON.stringify(inspected));
      const killed = await hypura(["bench", moe, "--memory", "200M", "--plan", plan, ...short, "--json"], {
        env,
      });
      const outcomes = (JSON.parse(killed.stdout).records as readonly RunRecord[]).map(
        (one) => one.outcome.status,
      );
      expect(outcomes).toEqual(["killed", "killed"]);
      expect(killed.status).toBe(6);
    },
    120_000,
  );
});

describe("traces", () => {
  const traced = [
    "run",
    "--raw",
    "--prompt",
    "hello world",
    "--max-tokens",
    "40",
    "--threads",
    "1",
    "--mode",
    "stream",
  ];

  test("run --trace writes a file that replay judges", async () => {
    const path = join(folder, "run.trace");
    const run = await hypura([...traced, "--temp", "2", "--trace", path, moe]);
    expect(run.status).toBe(0);
    const { status, stdout, stderr } = await hypura(["replay", path]);
    expect([status, stderr]).toEqual([0, ""]);
    expect(stdout).toContain("the engine counted the same, exactly");
    expect(stdout).toMatch(/Choice: \S+, /);
    for (const policy of ["belady", "lfu-decay", "pinned-lru", "least-stale", "lru"]) {
      expect(stdout).toContain(`\n  ${policy} `);
    }
    expect(widest(stdout)).toBeLessThanOrEqual(100);
    const some = await hypura(["replay", path, "--policy", "lfu-decay:64,lru", "--pool", "20%,2M", "--json"]);
    const { rows } = JSON.parse(some.stdout);
    expect(rows.map((row: { candidate: { label: string } }) => row.candidate.label)).toEqual([
      "lfu-decay:64",
      "lru",
    ]);
    expect(rows[0].cells.length).toBe(3); // and the recorded size
    const sizes = Array.from({ length: 11 }, (_, i) => `${20 + 5 * i}%`).join(",");
    const wide = await hypura(["replay", path, "--policy", "lfu-decay:100000:4096,lru", "--pool", sizes]);
    expect(widest(wide.stdout)).toBeLessThanOrEqual(100);
    for (const size of sizes.split(",")) {
      expect(wide.stdout).toContain(` ${size.replace("%", " %")}`); // none is left out
    }
  }, 120_000);

  test("a disk that is full ends the trace and not the answer", async () => {
    const path = join(folder, "full.trace");
    const words = [...program, ...traced, "--trace", path, moe].map((word) => `'${word}'`).join(" ");
    // A limit on the size of files stands for the full disk: the same error on the same call.
    const child = Bun.spawn(["bash", "-c", `trap '' XFSZ; ulimit -f 4; exec ${words}`], {
      env: environment,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    const { status, stdout, stderr } = await outcomeOf(child);
    expect(stderr).toMatch(/warning: the trace .* ended after \d+ bytes: its disk takes no more/);
    expect([status, stdout.length > 20]).toEqual([0, true]);
    expect([existsSync(path), existsSync(`${path}.part`)]).toEqual([false, false]);
  }, 120_000);

  test("what cannot be traced or replayed is said", async () => {
    for (const [words, message, code] of [
      [
        ["run", moe, "--prompt", "a", "--mode", "resident", "--trace", join(folder, "x")],
        /whole model is in memory/,
        2,
      ],
      [[...traced, "--trace", join(folder, "no", "x"), moe], /cannot be written/, 6],
      [["replay", moe], /is no trace/, 2],
      [["replay", join(folder, "none")], /there is no trace/, 3],
      [["replay", join(folder, "run.trace"), "--policy", "best"], /--policy "best"/, 2],
      [["replay", join(folder, "run.trace"), "--pool", "1K"], /too little/, 2],
      [["replay", join(folder, "run.trace"), "--memory", "x"], /--memory "x"/, 2],
    ] as const) {
      const { status, stderr } = await hypura(words);
      expect(stderr).toMatch(message);
      expect(status).toBe(code);
    }
  }, 120_000);
});

// Prediction meets truth: predicted and measured tokens a second, and planned and measured memory, for six runs and more:
// one resident, a mixture of experts under three limits, a dense model under two. Each run is a process of its own, so
// that its peak is its own. Ends with 1 where a bar is missed.
//
//   bun test/bench/predict.ts [--moe FILE] [--dense FILE] [--rounds N] [--only NAME]
//
// Wants a profile (`hypura profile --path FOLDER` for the folder of the models) and a quiet machine. The models are
// made by `bun test/fixtures/make.ts moe-6g|dense-6g OUT` where they are not given (6 GB each). Nothing is kept in the
// state folder. Three predictions are printed: at first sight, from runs of the other cases, and from all earlier runs;
// the bars are on the second, which is what a person meets who changes a limit.

import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { planOf } from "../../src/api";
import { openEngine } from "../../src/engine";
import { type Machine, peakMemoryBytes } from "../../src/machine";
import { type ModelFile, openModelFile } from "../../src/modelfile";
import { type MeasuredRun, noLimits, type Plan, runOf, totalBytes } from "../../src/plan";
import { loadMachine } from "../../src/profile";
import { countersSince, heldRateOf } from "../../src/streaming";
import { bytesText, rateText, table } from "../../src/text";
import { smolLm2OrSkip } from "../models";
import { median, verdict } from "./measure";

const bars = { each: 0.25, middle: 0.15, memoryMost: 1.03, memoryLeast: 0.85 } as const;

interface Case {
  readonly name: string;
  readonly path: string;
  readonly memoryBytes: number | null;
  /** Before and while measuring: the pool is warm, and a slow model ends. */
  readonly warmTokens: number;
  readonly tokens: number;
}

interface Outcome {
  readonly plan: Plan;
  readonly run: MeasuredRun;
  readonly peakBytes: number;
}

const root = join(import.meta.dir, "..", "..");
const gigabyte = 1_000_000_000;

const { values: flags } = parseArgs({
  options: {
    moe: { type: "string" },
    dense: { type: "string" },
    rounds: { type: "string" },
    only: { type: "string" },
    child: { type: "string" },
  },
});

// ---- one run, in a process of its own -----------------------------------------------------------------------------

interface Task extends Case {
  readonly machine: Machine;
}

interface LastChunk {
  readonly timings?: { readonly predicted_n: number; readonly predicted_ms: number };
}

async function runTask(task: Task): Promise<Outcome> {
  const { machine, memoryBytes, path, warmTokens, tokens } = task;
  const file = openModelFile(path);
  const plan = planOf(file, { ...noLimits, memoryBytes, contextTokens: 1024 }, machine);
  await using engine = await openEngine(plan);
  const generate = async (count: number, seed: number): Promise<LastChunk> => {
    const body = {
      prompt: "The history of the city begins with a bridge, and the bridge begins with",
      n_predict: count,
      // So hot that the routing is not that of a loop.
      temperature: 100,
      seed,
      ignore_eos: true,
      cache_prompt: false,
      stream: true,
    };
    let last: LastChunk = {};
    for await (const { data } of engine.request("POST /completion", body)) last = data as LastChunk;
    return last;
  };
  await generate(warmTokens, 1);
  const before = plan.streaming === null ? null : await engine.streaming();
  const { timings } = await generate(tokens, 2);
  const after = before === null ? null : await engine.streaming();
  if (timings === undefined) throw new Error("an answer without timings");
  const heldRate = before === null || after === null ? null : heldRateOf(countersSince(before, after));
  const run = runOf(plan, file, machine, {
    at: new Date().toISOString(),
    // The first token comes with the prompt.
    decodeTokens: timings.predicted_n - 1,
    decodeSeconds: timings.predicted_ms / 1000,
    hitRate: heldRate,
  });
  if (run === null) throw new Error("the machine has no profile");
  return { plan, run, peakBytes: peakMemoryBytes() };
}

async function inChild(task: Task, folder: string): Promise<Outcome> {
  const request = join(folder, "task.json");
  const answer = join(folder, "outcome.json");
  writeFileSync(request, JSON.stringify({ task, answer }));
  const child = Bun.spawn([process.execPath, import.meta.path, "--child", request], {
    stdin: "ignore",
    stdout: "inherit",
    stderr: "inherit",
  });
  if ((await child.exited) !== 0) throw new Error(`${task.name} failed`);
  return JSON.parse(readFileSync(answer, "utf8")) as Outcome;
}

// ---- all of them --------------------------------------------------------------------------------------------------

async function ensureModel(given: string | undefined, kind: "moe-6g" | "dense-6g"): Promise<string> {
  const path = given ?? join(root, "build", "models", `${kind}.gguf`);
  if (!existsSync(path)) {
    mkdirSync(join(root, "build", "models"), { recursive: true });
    const maker = Bun.spawn([process.execPath, join(root, "test", "fixtures", "make.ts"), kind, path], {
      stdout: "inherit",
      stderr: "inherit",
    });
    if ((await maker.exited) !== 0) throw new Error(`${kind} could not be made`);
  }
  return path;
}

async function casesOf(): Promise<readonly Case[]> {
  const wants = (kind: string): boolean => flags.only === undefined || flags.only.startsWith(kind);
  const small = wants("smollm2") ? await smolLm2OrSkip() : null;
  const moe = wants("moe") ? await ensureModel(flags.moe, "moe-6g") : "";
  const dense = wants("dense") ? await ensureModel(flags.dense, "dense-6g") : "";
  const resident: readonly Case[] =
    small === null ? [] : [{ name: "smollm2", path: small, memoryBytes: null, warmTokens: 128, tokens: 384 }];
  return [
    ...resident,
    { name: "moe-1.2g", path: moe, memoryBytes: 1.2 * gigabyte, warmTokens: 48, tokens: 48 },
    { name: "moe-2g", path: moe, memoryBytes: 2 * gigabyte, warmTokens: 64, tokens: 64 },
    { name: "moe-3.5g", path: moe, memoryBytes: 3.5 * gigabyte, warmTokens: 96, tokens: 64 },
    { name: "moe-resident", path: moe, memoryBytes: null, warmTokens: 16, tokens: 64 },
    { name: "dense-2.1g", path: dense, memoryBytes: 2.1 * gigabyte, warmTokens: 4, tokens: 10 },
    { name: "dense-4g", path: dense, memoryBytes: 4 * gigabyte, warmTokens: 4, tokens: 10 },
  ].filter((one) => flags.only === undefined || one.name === flags.only);
}

/** What a plan would have promised, had it known these runs. */
function predicted(one: Case, file: ModelFile, machine: Machine, history: readonly MeasuredRun[]): number {
  const limits = { ...noLimits, memoryBytes: one.memoryBytes, contextTokens: 1024 };
  return planOf(file, limits, machine, { history }).estimate.decodeTokensPerSecond ?? Number.NaN;
}

function report(
  cases: readonly Case[],
  outcomes: ReadonlyMap<string, readonly Outcome[]>,
  machines: ReadonlyMap<string, Machine>,
): void {
  const errors: number[] = [];
  const rows: string[][] = [
    ["case", "mode", "measured", "first sight", "others' runs", "all runs", "peak / planned"],
  ];
  for (const one of cases) {
    const own = outcomes.get(one.name) ?? [];
    const last = own.at(-1);
    const machine = machines.get(one.path);
    if (last === undefined || machine === undefined) continue;
    const { run, plan, peakBytes } = last;
    const rate = run.decodeTokens / run.decodeSeconds;
    const file = openModelFile(one.path);
    const others = [...outcomes].flatMap(([name, list]) =>
      name === one.name ? [] : list.map((outcome) => outcome.run),
    );
    const rates = [
      predicted(one, file, machine, []),
      predicted(one, file, machine, others),
      predicted(one, file, machine, [...others, ...own.slice(0, -1).map((outcome) => outcome.run)]),
    ];
    const ratio = peakBytes / totalBytes(plan.memory);
    errors.push(Math.abs((rates[1] ?? 0) / rate - 1));
    rows.push([
      one.name,
      plan.mode,
      rateText(rate),
      ...rates.map((value) => `${rateText(value)} (${(value / rate).toFixed(2)})`),
      `${bytesText(peakBytes)} / ${bytesText(totalBytes(plan.memory))} (${ratio.toFixed(2)})`,
    ]);
    verdict(
      ratio <= bars.memoryMost && ratio >= bars.memoryLeast,
      `${one.name}: peak is ${(100 * ratio).toFixed(1)} % of the plan (bar ${100 * bars.memoryLeast} to ${100 * bars.memoryMost} %)`,
    );
    verdict(
      (errors.at(-1) ?? 1) <= bars.each,
      `${one.name}: predicted is off by ${(100 * (errors.at(-1) ?? 1)).toFixed(1)} % (bar ${100 * bars.each} %)`,
    );
  }
  console.log(`\n${table(rows, [2])}\n`);
  verdict(
    median(errors) <= bars.middle,
    `median of ${errors.length} predictions: off by ${(100 * median(errors)).toFixed(1)} % (bar ${100 * bars.middle} %)`,
  );
}

async function main(): Promise<void> {
  const cases = await casesOf();
  const folder = mkdtempSync(join(tmpdir(), "hypura-predict-"));
  const machines = new Map<string, Machine>();
  const outcomes = new Map<string, Outcome[]>();
  try {
    for (let round = 0; round < Number(flags.rounds ?? 2); round++) {
      for (const one of cases) {
        const machine = await loadMachine({ folder: one.path, measure: "cached" });
        if (machine.profile === null || machine.profile.storage.length === 0) {
          throw new Error(`nothing is measured: run \`hypura profile --path ${one.path}\` first`);
        }
        // The plan that is measured and the plans that are asked afterwards see the same free memory.
        const seen = machines.get(one.path) ?? machine;
        machines.set(one.path, seen);
        const outcome = await inChild({ ...one, machine: seen }, folder);
        const { decodeTokens, decodeSeconds, hitRate } = outcome.run;
        const hits = hitRate === null ? "" : `, hits ${(100 * hitRate).toFixed(1)} %`;
        console.log(`round ${round + 1}, ${one.name}: ${rateText(decodeTokens / decodeSeconds)}${hits}`);
        outcomes.set(one.name, [...(outcomes.get(one.name) ?? []), outcome]);
      }
    }
    report(cases, outcomes, machines);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

if (flags.child === undefined) {
  await main();
} else {
  const { task, answer } = JSON.parse(readFileSync(flags.child, "utf8")) as { task: Task; answer: string };
  writeFileSync(answer, JSON.stringify(await runTask(task)));
}

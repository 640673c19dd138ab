// Streaming against its bars (test/bench/NOTES.md):
//   bun test/bench/streaming.ts moe FILE [--runs N]      FILE from `bun test/fixtures/make.ts moe-6g FILE`
//   bun test/bench/streaming.ts dense FILE [--runs N]    FILE from `bun test/fixtures/make.ts dense-6g FILE`
// hypura in a control group of 2 GB beside the same kernels with the whole model in memory, asked in turns (medians) and
// at once (windows.ts); and stock behaviour (mapped file, dropped from the page cache first) in the same group, for as many
// tokens as patience has.

import { existsSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { planOf } from "../../src/api";
import { openModelFile } from "../../src/modelfile";
import type { Plan, SlotClass } from "../../src/plan";
import type { StreamingCounters } from "../../src/streaming";
import { bandwidthText, bytesText, durationText } from "../../src/text";
import { headerLength, parseHeader, traceEvents, traceStartBytes } from "../../src/trace";
import { dropCached, median } from "./measure";
import { canLimit, type Figures, openSubject, type Subject } from "./subject";
import { inWindows } from "./windows";

const groupBytes = 2_147_483_648;
const [kind = "", path = ""] = process.argv.slice(2);
const runs = Number(/--runs[ =](\d+)/.exec(process.argv.join(" "))?.[1] ?? 5);
const threads = availableParallelism();
const only = /--only[ =](\S+)/.exec(process.argv.join(" "))?.[1];

function planWith(mode: "resident" | "stream", memoryBytes: number | null): Plan {
  const limits = { contextTokens: 1024, slotCount: 1, threads, memoryBytes, mode };
  return planOf(openModelFile(path), limits);
}

function withClasses(plan: Plan, change: (one: SlotClass) => SlotClass): Plan {
  return plan.streaming === null
    ? plan
    : { ...plan, streaming: { ...plan.streaming, classes: plan.streaming.classes.map(change) } };
}

function say(what: string, measured: string): void {
  console.log(`${what}: ${measured}`);
}

function ratioText(values: readonly number[]): string {
  const sorted = [...values].sort((a, b) => a - b);
  return `${median(values).toFixed(3)} (${sorted[0]?.toFixed(3)} to ${sorted.at(-1)?.toFixed(3)}, ${values.length} pairs)`;
}

interface Pair {
  readonly one: Figures;
  readonly other: Figures;
}

/** Asks both the same question, in the order A B, B A, ... */
async function inTurns(
  one: Subject,
  other: Subject,
  promptTokens: number,
  tokens: number,
): Promise<readonly Pair[]> {
  const pairs: Pair[] = [];
  for (let run = 0; run < runs; run++) {
    const question = { promptTokens, tokens, seed: run + 1 };
    if (run % 2 === 0) {
      const first = await one.ask(question);
      pairs.push({ one: first, other: await other.ask(question) });
    } else {
      const first = await other.ask(question);
      pairs.push({ one: await one.ask(question), other: first });
    }
  }
  return pairs;
}

function decodeRatio(pairs: readonly Pair[]): string {
  const speeds = (of: "one" | "other"): string =>
    median(pairs.map((pair) => pair[of].decodeTokensPerSecond)).toFixed(2);
  const ratios = pairs.map(({ one, other }) => one.decodeTokensPerSecond / other.decodeTokensPerSecond);
  return `${speeds("one")} and ${speeds("other")} tok/s, ratio ${ratioText(ratios)}`;
}

function tellProcess(subject: Subject, plan: Plan, last: Figures): void {
  const planned = Object.values(plan.memory).reduce((sum: number, bytes: number) => sum + bytes, 0);
  const inGroup = subject.groupFigures();
  say("opening", durationText(subject.openSeconds));
  say(
    "peak resident memory",
    `${bytesText(last.peakBytes)} of ${bytesText(planned)} planned (${(last.peakBytes / planned).toFixed(3)})`,
  );
  if (inGroup !== null) {
    say(
      "group",
      `limit hit ${inGroup.limitHits} times, peak ${bytesText(inGroup.peakBytes)} of ${bytesText(groupBytes)}`,
    );
  }
  say("written to disk by the kernel's count", `${last.writtenBytes} bytes`);
}

async function stock(tokens: number): Promise<number> {
  const plan: Plan = { ...planWith("resident", null), repack: false, loadMode: "mmap" };
  dropCached(path);
  await using subject = await openSubject("stock", plan, groupBytes);
  const { decodeTokensPerSecond } = await subject.ask({ promptTokens: 2, tokens, seed: 1 });
  say("stock behaviour, mapped file, same group, cold", `${decodeTokensPerSecond.toFixed(3)} tok/s`);
  return decodeTokensPerSecond;
}

/** Every stride once for each pass that touches it. */
function askedBytes({ streaming }: Plan, counters: StreamingCounters | null): number {
  return (streaming?.tensors ?? []).reduce(
    (sum, { classIndex }, i) =>
      sum + (counters?.tensors[i]?.asked ?? 0) * (streaming?.classes[classIndex]?.strideBytes ?? 0),
    0,
  );
}

/** Decoding under the limit, beside the same kernels with everything in memory. */
async function inGroup(resident: Subject, plan: Plan): Promise<void> {
  // In memory where that can be, so that the bytes written to disk are not its own.
  const folder = existsSync("/dev/shm") ? "/dev/shm" : tmpdir();
  const tracePath = join(folder, `hypura-bench-${process.pid}.trace`);
  const pairs = await askInGroup(resident, plan, tracePath);
  say("decode in the group, and in memory without a limit", decodeRatio(pairs));
  const decode = pairs.map(({ one }) => one.decode).filter((one) => one !== null);
  const asked = decode.map((one) => one.hits / (one.hits + one.lateHits + one.misses));
  say("hits", `${(100 * median(asked)).toFixed(1)} %`);
  say("read a token", bytesText(median(decode.map((one) => one.readBytes / 99))));
  const readNs = median(decode.map((one) => one.readingNs / 99));
  say(
    "reading",
    `${(readNs / 1e6).toFixed(1)} ms a token, of which ops waited ${(median(decode.map((one) => one.stallNs / 99)) / 1e6).toFixed(1)} ms`,
  );
  const bandwidth = median(decode.map((one) => one.readBytes / (one.readingNs / 1e9)));
  const residentSeconds = median(pairs.map(({ other }) => 1 / other.decodeTokensPerSecond));
  const bound = layerBound(tracePath, plan, residentSeconds, bandwidth);
  const ratios = pairs.map(({ one }) => bound * one.decodeTokensPerSecond);
  say(
    "of the sum over layers of serial part + max(expert compute, missed bytes at the bandwidth while reading)",
    `${(bound * 1000).toFixed(1)} ms at ${bandwidthText(bandwidth)}, ratio ${ratioText(ratios)}`,
  );
  rmSync(tracePath);
}

async function askInGroup(resident: Subject, plan: Plan, tracePath: string): Promise<readonly Pair[]> {
  await using streamed = await openSubject("streamed", plan, groupBytes, { tracePath });
  await streamed.ask({ promptTokens: 16, tokens: 150, seed: 99 }); // the pool knows the router
  const pairs = await inTurns(streamed, resident, 16, 100);
  tellProcess(streamed, plan, pairs.at(-1)?.one as Figures);
  return pairs;
}

/** The same at once, by a process of its own: what it asks for is not in the trace of the pairs. */
async function inGroupAtOnce(resident: Subject, plan: Plan): Promise<void> {
  await using streamed = await openSubject("at once", plan, groupBytes);
  await streamed.ask({ promptTokens: 16, tokens: 150, seed: 99 });
  for (const [tokens, count] of [
    [100, 2 * runs],
    [900, Math.ceil(runs / 4)],
  ] as const) {
    const questions = Array.from({ length: count }, (_, i) => ({ promptTokens: 16, tokens, seed: i + 1 }));
    const { mean, standardError, windows } = await inWindows(streamed, resident, questions);
    say(
      `answers of ${tokens} tokens in the group against in memory, in windows of half a second`,
      `ratio ${mean.toFixed(3)} (standard error ${standardError.toFixed(3)}, ${windows} windows)`,
    );
  }
}

/**
 * Seconds a token that no order of reads could beat without knowing the router's choice in advance: for each pass of one
 * token the layers' misses are in the trace; a layer takes its experts' compute or its reads, whichever is longer, and the
 * rest of the resident time is serial. The experts' share of the resident time is their share of the touched bytes.
 */
function layerBound(tracePath: string, plan: Plan, residentSeconds: number, bandwidth: number): number {
  const bytes = readFileSync(tracePath);
  const header = parseHeader(
    tracePath,
    bytes.subarray(traceStartBytes, traceStartBytes + headerLength(tracePath, bytes)),
  );
  const layerOfStride: string[] = [];
  const bytesOfStride: number[] = [];
  for (const { name, strideCount, classIndex } of header.tensors) {
    const layer = /^blk\.(\d+)\./.exec(name)?.[1] ?? name;
    for (let i = 0; i < strideCount; i++) {
      layerOfStride.push(layer);
      bytesOfStride.push(header.classes[classIndex]?.strideBytes ?? 0);
    }
  }
  const layers = new Set(layerOfStride).size;
  const streamedTouched = plan.streaming?.touchedBytesPerToken ?? 0;
  const share = streamedTouched / plan.estimate.tokenBytes.touched;
  const compute = (residentSeconds * share) / layers;
  const passes: number[] = [];
  let missed: Map<string, number> | null = null;
  const close = (): void => {
    if (missed === null) return;
    const experts = [...missed.values()].reduce((sum, one) => sum + Math.max(compute, one / bandwidth), 0);
    passes.push(residentSeconds * (1 - share) + experts + (layers - missed.size) * compute);
  };
  for (const event of traceEvents(bytes.subarray(traceStartBytes + headerLength(tracePath, bytes)))) {
    if (event.kind === "pass") {
      close();
      missed = event.tokens === 1 ? new Map() : null;
    } else if (event.kind === "complete" && missed !== null) {
      const layer = layerOfStride[event.stride] ?? "";
      missed.set(layer, (missed.get(layer) ?? 0) + (bytesOfStride[event.stride] ?? 0));
    }
  }
  close();
  const warm = passes.slice(149); // the first question filled the pool
  return warm.reduce((sum, one) => sum + one, 0) / warm.length;
}

async function moe(): Promise<void> {
  const residentPlan: Plan = { ...planWith("resident", null), repack: false, loadMode: "read" };
  const plan = planWith("stream", groupBytes);
  const perToken = plan.streaming?.touchedBytesPerToken ?? 0;
  {
    await using resident = await openSubject("resident", residentPlan, null);
    if (only === undefined || only === "group") {
      await inGroup(resident, plan);
      await inGroupAtOnce(resident, plan);
    }
    if (only === undefined || only === "all") {
      const all = planWith("stream", null);
      await using streamed = await openSubject("all in the pool", all, null);
      for (let seed = 50; seed < 54; seed++) {
        await streamed.ask({ promptTokens: 300, tokens: 150, seed });
      }
      const decode = await inTurns(streamed, resident, 16, 100);
      say("all strides in the pool, warm, decode", decodeRatio(decode));
      const prefill = await inTurns(streamed, resident, 512, 2);
      const ratios = prefill.map(({ one, other }) => other.promptSeconds / one.promptSeconds);
      say("all strides in the pool, warm, prefill of 512, speed ratio", ratioText(ratios));
    }
  }
  if (only === undefined || only === "off") {
    const off = withClasses(plan, (one) => ({
      ...one,
      slotCount: Math.min(one.slotCount, 2 * one.policy.guardRingSlots),
      policy: { ...one.policy, kind: "lru", workingSetStrides: 0, guardRingSlots: 1 },
    }));
    await using streamed = await openSubject("cache off", off, groupBytes);
    const figures: Figures[] = [];
    for (let run = 0; run < runs; run++) {
      figures.push(await streamed.ask({ promptTokens: 2, tokens: 30, seed: run }));
    }
    const rates = figures.map(
      ({ decode, decodeTokensPerSecond }) => ((decode?.readBytes ?? 0) / 29) * decodeTokensPerSecond,
    );
    const disk = figures.map(({ decode }) => (decode?.readBytes ?? 0) / ((decode?.readingNs ?? 1) / 1e9));
    say(
      "no neuron cache",
      `${median(figures.map((one) => one.decodeTokensPerSecond)).toFixed(2)} tok/s, ${bytesText(perToken)} touched a token`,
    );
    say(
      "no neuron cache, bytes a second of all time",
      `${bandwidthText(median(rates))}, while reading ${bandwidthText(median(disk))}, ratio ${ratioText(rates.map((rate, i) => rate / (disk[i] ?? 1)))}`,
    );
  }
  if (only === undefined || only === "prefill") {
    await using streamed = await openSubject("prefill", plan, groupBytes);
    const { prompt } = await streamed.ask({ promptTokens: 512, tokens: 2, seed: 1 });
    const touched = askedBytes(plan, prompt);
    const read = prompt?.readBytes ?? 0;
    say(
      "prefill of 512, cold",
      `read ${bytesText(read)} of ${bytesText(touched)} that ops asked for in ${prompt?.passes} passes, ratio ${(read / touched).toFixed(4)}`,
    );
  }
  if (only === undefined || only === "stock") {
    await stock(12);
  }
}

async function dense(): Promise<void> {
  const plan = planWith("stream", groupBytes);
  if (only === undefined || only === "group") {
    await using streamed = await openSubject("streamed", plan, groupBytes);
    const figures: Figures[] = [];
    for (let run = 0; run < runs; run++) {
      figures.push(await streamed.ask({ promptTokens: 2, tokens: 9, seed: run }));
    }
    const rates = figures.map(
      ({ decode, decodeTokensPerSecond }) => ((decode?.readBytes ?? 0) / 8) * decodeTokensPerSecond,
    );
    say(
      "decode",
      `${median(figures.map((one) => one.decodeTokensPerSecond)).toFixed(3)} tok/s, ${bandwidthText(median(rates))} of all time`,
    );
    const one: number[] = [];
    const eight: number[] = [];
    for (let run = 0; run < runs; run++) {
      one.push((await streamed.ask({ promptTokens: 1, tokens: 1, seed: run })).promptSeconds);
      eight.push((await streamed.ask({ promptTokens: 8, tokens: 1, seed: run })).promptSeconds);
    }
    say(
      "a pass of 8 tokens against one of 1",
      `${durationText(median(eight))} and ${durationText(median(one))}, ratio ${ratioText(eight.map((seconds, i) => seconds / (one[i] ?? 1)))}`,
    );
    const last = await streamed.ask({ promptTokens: 512, tokens: 2, seed: 1 });
    say(
      "prefill of 512",
      `read ${bytesText(last.prompt?.readBytes ?? 0)} of ${bytesText(askedBytes(plan, last.prompt))} that ops asked for in ${last.prompt?.passes} passes, ${durationText(last.promptSeconds)}`,
    );
    tellProcess(streamed, plan, last);
  }
  if (only === undefined || only === "stock") {
    await stock(4);
  }
}

if (!canLimit()) {
  console.log(
    "SKIPPED: this machine allows no memory control group (version 1), and without one nothing is proved",
  );
} else if (kind === "moe") {
  await moe();
} else if (kind === "dense") {
  await dense();
} else {
  throw new Error("say moe FILE or dense FILE");
}

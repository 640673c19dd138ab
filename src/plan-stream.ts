// Plans in which weights stream: which layers a GPU computes, how large the micro-batch is, and the slots, policies and
// reader that native code gets. Where tensors go is plan-place.ts's answer. Pure.

import type { Model } from "./model";
import type { Plan, SlotClass, Streaming } from "./plan";
import {
  batchReads,
  bytesOfToken,
  type CostFacts,
  type PlacedClass,
  type Placement,
  type Speeds,
  secondsOfBatch,
  secondsOfToken,
} from "./plan-cost";
import { allGpuLayers, copiedOutputBytes, memoryOf, slotBytesOf, spanWorkBytes } from "./plan-memory";
import {
  groupsOf,
  leastPoolBytes,
  orderOfPass,
  orderOfTiers,
  type ProgramSolver,
  pinnedCount,
  place,
  ringSlots,
  type Solution,
  type TierSeconds,
} from "./plan-place";
import { choosePrediction } from "./plan-prediction";
import { residentPlan } from "./plan-resident";
import { chooseSpeculation } from "./plan-speculation";
import {
  bytesAt,
  type ContextChoice,
  commonPart,
  contextChoices,
  factsOf,
  fits,
  gpuChoices,
  homesOf,
  kvChoices,
  leastUbatchTokens,
  noGpu,
  prefetchDepthOf,
  roomOf,
  type Sides,
  speculationFacts,
  type Task,
  threadChoice,
  useOf,
  usualUbatchTokens,
  withWeights,
} from "./plan-task";
import { bytesText, countText } from "./text";

// ---- streaming ------------------------------------------------------------------------------------------------

export const retryCount = 8;
export const retryWaitNs = 1_000_000;
/** A wide pass asks for more than one look every few milliseconds keeps going; threads go on by themselves. */
const backgroundTokens = 16;
const backgroundDepth = 64;
/**
 * Experts come in several small graphs a layer, and waking a sleeping thread for each costs more than its spinning:
 * 10 % more tokens a second (test/bench/NOTES.md). A dense model waits for the disk, where spinning is waste.
 */
const streamingPollPercent = 20;
/**
 * Routing drifts with the text. On recorded runs (test/bench/NOTES.md) 64 and 128 lose nowhere and win up to 1.4 points
 * over 4,096 where routing follows the text; the longer of the two, because more experts are each seen less often.
 */
export const halfLifeTokens = 128;
/**
 * A prompt tells which experts are hot, and must not outweigh the answer: the core computes the last layer of a prompt
 * for its last token alone, and that layer's experts would count next to nothing for as many tokens as it had.
 */
export const mostPassTokens = 16;

export interface Streamed {
  readonly context: ContextChoice;
  readonly ubatchTokens: number;
  readonly sides: Sides;
  readonly solution: Solution;
}

export function makeStreaming(task: Task): Plan | null {
  if (task.model.strides.length === 0) {
    return null;
  }
  for (const context of contextChoices(task)) {
    const found = streamWith(task, context);
    if (found !== null) {
      return found.solution.placement.classes.length === 0
        ? nothingStreams(task, found)
        : streamingPlan(task, found);
    }
  }
  return null;
}

/** With a smaller micro-batch everything fits after all. */
function nothingStreams(task: Task, { context, ubatchTokens, solution }: Streamed): Plan {
  const { model } = task;
  const { gpuLayers } = solution.placement;
  const use = useOf(task, { contextTokens: context.tokens, ubatchTokens, gpuLayers });
  const made = withWeights(
    memoryOf(model, use, false),
    bytesAt(model, gpuLayers, () => true),
  );
  const sides = gpuLayers === 0 ? { ...made, gpu: noGpu } : made;
  return residentPlan(task, context, { sides, gpuLayers, ubatchTokens });
}

/**
 * Products on a GPU are not measured, so that a smaller share of the GPU has to promise this much of a shorter token
 * before it is taken.
 */
const gpuWorth = 0.95;

/** The best layers on the GPU, and then the best micro-batch, for this context; null where it does not fit. */
function streamWith(task: Task, context: ContextChoice): Streamed | null {
  const { solver } = task.knowledge;
  const candidates = gpuCandidates(task, context);
  let best: Streamed | null = null;
  for (const gpuLayers of candidates) {
    const found = firstUbatch(task, { context, gpuLayers }, greedyOnly);
    if (found !== null && (best === null || found.solution.seconds < gpuWorth * best.solution.seconds)) {
      best = found;
    }
  }
  for (const gpuLayers of best === null ? candidates : [best.solution.placement.gpuLayers]) {
    const found = firstUbatch(task, { context, gpuLayers }, solver);
    if (found !== null) return withBestUbatch(task, found);
  }
  return null;
}

/** For questions that do not need the last percent. */
const greedyOnly: ProgramSolver = () => null;

/** All that hold what cannot stream, in five steps from the most to none: fewer layers leave room for whole ones. */
function gpuCandidates(task: Task, context: ContextChoice): readonly number[] {
  if (task.gpu === null) {
    return [0];
  }
  let most = allGpuLayers(task.model);
  while (most > 0 && attempt(task, { context, ubatchTokens: leastUbatchTokens, gpuLayers: most }) === null) {
    most--;
  }
  return [...new Set([1, 0.75, 0.5, 0.25, 0].map((part) => Math.round(most * part)))];
}

export interface Shape {
  readonly context: ContextChoice;
  readonly ubatchTokens: number;
  readonly gpuLayers: number;
}

/** The memory of a shape with everything streamed, if the smallest pool fits too. */
function attempt(task: Task, { context, ubatchTokens, gpuLayers }: Shape): Sides | null {
  const { model } = task;
  const use = useOf(task, { contextTokens: context.tokens, ubatchTokens, gpuLayers });
  const fixed = bytesAt(model, gpuLayers, (tensor) => tensor.strides === null);
  const made = withWeights(memoryOf(model, use, true), fixed);
  const sides = gpuLayers === 0 ? { ...made, gpu: noGpu } : made;
  const pool = leastPoolBytes(groupsOf({ model, homes: homesOf(model, gpuLayers) }));
  return fits(task, { ...sides, ram: { ...sides.ram, poolBytes: pool } }) ? sides : null;
}

function firstUbatch(
  task: Task,
  shape: Omit<Shape, "ubatchTokens">,
  solver: ProgramSolver | undefined,
): Streamed | null {
  for (let ubatchTokens = usualUbatchTokens; ubatchTokens >= leastUbatchTokens; ubatchTokens /= 2) {
    const found = solved(task, { ...shape, ubatchTokens }, solver);
    if (found !== null) return found;
  }
  return null;
}

export function solved(task: Task, shape: Shape, solver: ProgramSolver | undefined): Streamed | null {
  const { model, speeds, curve, limits } = task;
  const sides = attempt(task, shape);
  if (sides === null) {
    return null;
  }
  const seconds = tierSeconds(speeds);
  const solution = place(
    {
      model,
      gpuLayers: shape.gpuLayers,
      homes: homesOf(model, shape.gpuLayers),
      room: roomOf(task, sides),
      mustStream: limits.mode === "stream",
      curve,
      seconds,
      judge: (placement) => judged(factsOf(task, placement, shape.ubatchTokens), speeds, seconds),
    },
    solver,
  );
  return solution === null ? null : { ...shape, sides, solution };
}

function tierSeconds(speeds: Speeds | null): TierSeconds {
  const storage = speeds?.storage;
  return speeds === null || storage === null || storage === undefined
    ? orderOfTiers
    : {
        // No product on a GPU was measured: it is only known to be the better place.
        gpu: () => 0,
        ram: speeds.decodeSeconds,
        read: (bytes) => bytes / storage.bestBytesPerSecond,
      };
}

export function judged(facts: CostFacts, speeds: Speeds | null, seconds: TierSeconds): number {
  const measured = speeds === null ? null : secondsOfToken(facts, speeds);
  if (measured !== null) {
    return measured.total;
  }
  const { gpu, ram, pool, read } = bytesOfToken(facts);
  return seconds.gpu("", gpu) + seconds.ram("", ram + pool + read) + seconds.read(read);
}

/** A few pages of prompt and a page of answer, as in a conversation: what the micro-batch is chosen for. */
const nominal = { promptTokens: 2048, answerTokens: 256 } as const;

/**
 * A smaller micro-batch leaves room for slots and reads the streamed weights more often: the one with which a page is
 * answered soonest. Not where a GPU computes: it was not measured, and is known to want wide batches.
 */
function withBestUbatch(task: Task, first: Streamed): Streamed {
  const { gpuLayers } = first.solution.placement;
  if (gpuLayers > 0) {
    return first;
  }
  let best = first;
  let bestSeconds = nominalSeconds(task, first);
  for (let ubatchTokens = first.ubatchTokens / 2; ubatchTokens >= leastUbatchTokens; ubatchTokens /= 2) {
    const found = solved(task, { context: first.context, ubatchTokens, gpuLayers }, greedyOnly);
    if (found === null) continue;
    const seconds = nominalSeconds(task, found);
    if (seconds < bestSeconds) {
      best = found;
      bestSeconds = seconds;
    }
  }
  return best === first ? first : (solved(task, { ...best, gpuLayers }, task.knowledge.solver) ?? best);
}

function nominalSeconds(task: Task, { solution, ubatchTokens }: Streamed): number {
  const facts = factsOf(task, solution.placement, ubatchTokens);
  const read = solution.placement.classes.reduce(
    (sum, one) =>
      sum + one.sets.reduce((all, set) => all + batchReads(one, set, ubatchTokens) * set.strideBytes, 0),
    0,
  );
  const measured = task.speeds === null ? null : secondsOfBatch(facts, task.speeds);
  const batch = measured ?? tierSeconds(task.speeds).read(read);
  return Math.ceil(nominal.promptTokens / ubatchTokens) * batch + nominal.answerTokens * solution.seconds;
}

function streamingPlan(task: Task, { context, ubatchTokens, sides, solution }: Streamed): Plan {
  const { model, machine, limits, budget, reader } = task;
  const { placement } = solution;
  const classes = placement.classes.map((one) => slotClass(one));
  const poolBytes = classes.reduce((sum, one) => sum + one.slotBytes * one.slotCount, 0);
  const more = bytesAt(
    model,
    placement.gpuLayers,
    (tensor) => tensor.strides !== null && placement.tiers[tensor.index] !== "nvme",
  );
  const withResident = withWeights(sides, {
    ramBytes: more.ramBytes,
    gpuBytes: more.gpuBytes - copiedOutputBytes(model, placement.gpuLayers),
  });
  const full = { ...withResident, ram: { ...withResident.ram, poolBytes } };
  const hasExperts = placement.classes.some((one) => one.kind === "expert");
  const hasDense = placement.classes.some((one) => one.kind === "dense");
  const mode = hasExperts ? (hasDense ? "mixed-streaming" : "expert-streaming") : "dense-ffn-streaming";
  const streamedBytes = placement.classes.reduce((sum, one) => sum + one.strideBytes * one.strideCount, 0);
  const residentBytes = more.ramBytes + more.gpuBytes - copiedOutputBytes(model, placement.gpuLayers);
  const lookahead = hasDense ? ringSlots : 0;
  const tensors = streamedTensors(model, placement);
  const expected = choosePrediction(model, tensors, classes);
  const guesses = chooseSpeculation(speculationFacts(task, placement), ubatchTokens);
  const longest = Math.max(...placement.classes.map((one) => one.strideBytes));
  // What a ring reads ahead is all that there is to read.
  const isBounded = expected.prediction !== null && !hasDense;
  const prefetchDepth = isBounded ? prefetchDepthOf(machine, reader, longest) : 0;
  return {
    ...commonPart(task, placement, { context, sides: full, ubatchTokens }),
    mode,
    batchTokens: Math.max(ubatchTokens, limits.slotCount ?? 1, 2),
    speculation: guesses.speculation,
    pollPercent: hasExperts ? streamingPollPercent : 0,
    repack: false,
    loadMode: machine.hasDirectLoad ? "direct" : "read",
    streaming: {
      tensors,
      classes,
      reader: {
        threads: reader.threads,
        pieceBytes: reader.pieceBytes,
        direct: true,
        dropBuffered: true,
        retryCount,
        retryWaitNs,
        prefetchDepth,
        backgroundTokens: hasDense ? 0 : backgroundTokens,
        backgroundDepth: hasDense ? 0 : backgroundDepth,
      },
      lookaheadStrides: lookahead,
      prediction: expected.prediction,
      hugePages: true,
      touchThreads: Math.max(1, Math.floor(machine.computeCores / 2)), // loading and the first prompt go on beside them
      spanWorkBytes,
      touchedBytesPerToken: placement.classes.reduce(
        (sum, one) => sum + one.sets.reduce((all, set) => all + set.touchedCount * set.strideBytes, 0),
        0,
      ),
    },
    solved: {
      by: solution.by,
      greedyCost: solution.greedySeconds,
      programCost: solution.programSeconds,
    },
    choices: [
      {
        name: "mode",
        value: mode,
        reason:
          limits.mode === "stream"
            ? "asked for"
            : `${bytesText(model.tensorBytes)} of weights do not fit in ${bytesText(budget + (task.gpu?.isUnified === false ? task.gpu.bytes : 0))}`,
      },
      ...gpuChoices(task, placement.gpuLayers, full),
      {
        name: "pool",
        value: bytesText(poolBytes),
        reason: `what the budget leaves, for ${bytesText(streamedBytes)} of streamed weights`,
      },
      ...(residentBytes === 0
        ? []
        : [
            {
              name: "resident too",
              value: bytesText(residentBytes),
              reason: "streamable weights that save more in memory than slots would",
            },
          ]),
      {
        name: "slots",
        value: classes.map((one) => countText(one.slotCount)).join(" + "),
        reason: classes.map((one) => `${bytesText(one.strideBytes)} each`).join(" and "),
      },
      {
        name: "lookahead",
        value: countText(lookahead),
        reason: hasDense
          ? "matrices in a ring, read ahead in the order of use"
          : "experts are known when the router has chosen",
      },
      ...(expected.choice === null ? [] : [expected.choice]),
      ...(isBounded
        ? [
            {
              name: "early reads",
              value: `${countText(prefetchDepth)} at once`,
              reason: "they keep the disk busy, and what is waited for shares it with no more",
            },
          ]
        : []),
      ...(hasDense
        ? []
        : [
            {
              name: "background reads",
              value: `for up to ${countText(backgroundTokens)} tokens at once`,
              reason: "where the system can (Linux), no thread takes a core from those that compute",
            },
          ]),
      {
        name: "reader",
        value: `${countText(reader.threads)} threads, pieces of ${bytesText(reader.pieceBytes)}`,
        reason: reader.reason,
      },
      { name: "context", value: `${countText(context.tokens)} tokens`, reason: context.reason },
      ...kvChoices(task),
      {
        name: "ubatch",
        value: `${countText(ubatchTokens)} tokens`,
        reason: "each reads the streamed weights once",
      },
      threadChoice(machine, limits),
      guesses.choice,
      { name: "repacking", value: "off", reason: "streamed weights are computed as they lie in the file" },
    ],
  };
}

function streamedTensors(model: Model, { classes }: Placement): Streaming["tensors"] {
  const classOf = new Map(
    classes.flatMap((one, classIndex) => one.sets.map((set) => [set.tensorIndex, classIndex] as const)),
  );
  return orderOfPass(model).flatMap(({ tensorIndex, strideCount }) => {
    const classIndex = classOf.get(tensorIndex);
    return classIndex === undefined ? [] : [{ tensorIndex, strideCount, classIndex }];
  });
}

function slotClass(one: PlacedClass): SlotClass {
  const touched = one.sets.reduce((sum, set) => sum + set.touchedCount, 0);
  const ofOp = one.sets.reduce((most, set) => Math.max(most, set.touchedCount), 1);
  return {
    strideBytes: one.strideBytes,
    slotBytes: slotBytesOf(one.strideBytes),
    slotCount: one.slotCount,
    opSlots: 1,
    policy: {
      // A cyclic order defeats every policy but a fixed subset; experts come by use.
      kind: one.kind === "expert" ? "lfu-decay" : "pinned-cyclic",
      halfLifeTokens,
      mostPassTokens,
      staleAfterPasses: 1,
      pinnedSlots: one.kind === "expert" ? 0 : pinnedCount(one.slotCount, one.strideCount),
      workingSetStrides: touched,
      guardRingSlots: Math.max(1, Math.min(one.slotCount, 2 * ofOp)),
    },
  };
}

// Two subjects that generate at once, one stopped while the other runs. Asked in turns, they would be compared seconds
// apart, in which a shared machine changes its speed by a third; windows of half a second see the same machine.

import type { Figures, Question, Subject } from "./subject";

const windowMs = 500;
/** Tokens of a window that do not count: the first one began in the window before, and finds nothing cached. */
const firstTokens = 2;

interface Window {
  readonly fromMs: number;
  readonly toMs: number;
}

export interface Ratio {
  /** Geometric mean of one's speed by the other's. */
  readonly mean: number;
  /** Of the mean, as a share of it. */
  readonly standardError: number;
  readonly windows: number;
}

/** Speed of `one` by that of `other`, each asked each of the questions. */
export async function inWindows(
  one: Subject,
  other: Subject,
  questions: readonly Question[],
): Promise<Ratio> {
  const logs: number[] = [];
  for (const [i, question] of questions.entries()) {
    const pair: [Subject, Subject] = i % 2 === 0 ? [one, other] : [other, one];
    const seconds = await tokenSeconds(pair, question);
    // Each window by the mean of its neighbours, which are the other's.
    for (let w = 1; w + 1 < seconds.length; w++) {
      const [before, here, after] = seconds.slice(w - 1, w + 2) as [number, number, number];
      const log = Math.log((before + after) / 2 / here);
      if (Number.isFinite(log)) {
        logs.push(pair[w % 2] === one ? log : -log);
      }
    }
  }
  const mean = logs.reduce((sum, log) => sum + log, 0) / logs.length;
  const variance = logs.reduce((sum, log) => sum + (log - mean) ** 2, 0) / (logs.length - 1);
  // Neighbouring triples share two windows of three: of 2n quotients about n are independent.
  return {
    mean: Math.exp(mean),
    standardError: Math.sqrt((2 * variance) / logs.length),
    windows: logs.length,
  };
}

/** Seconds a token in each window, the pair's first has the even ones; NaN where too few tokens came. */
async function tokenSeconds(pair: [Subject, Subject], question: Question): Promise<readonly number[]> {
  const windows: Window[] = [];
  let ended = false;
  const answers = pair.map((subject) => subject.ask(question));
  const end = (): void => {
    ended = true;
  };
  Promise.race(answers).then(end, end);
  while (!ended) {
    const [running, waiting] = windows.length % 2 === 0 ? pair : ([pair[1], pair[0]] as const);
    waiting.pause();
    running.resume();
    const fromMs = Date.now();
    while (!ended && Date.now() < fromMs + windowMs) {
      await Bun.sleep(10);
    }
    running.pause();
    windows.push({ fromMs, toMs: Date.now() });
  }
  for (const subject of pair) {
    subject.resume();
  }
  const figures = await Promise.all(answers);
  return windows.map(({ fromMs, toMs }, i) => {
    const times = (figures[i % 2] as Figures).tokenMs
      .filter((ms) => ms > fromMs && ms < toMs)
      .slice(firstTokens - 1);
    return times.length < 3
      ? Number.NaN
      : ((times.at(-1) as number) - (times[0] as number)) / 1000 / (times.length - 1);
  });
}

// What benchmarks share: the median of some figures, and the verdict on a bar. A benchmark is a program: it prints its
// figures and ends with 1 below its bar.

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return Number.isInteger(middle)
    ? ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2
    : (sorted[Math.floor(middle)] as number);
}

/** Prints the sentence; a bar that is missed makes the exit status 1. */
export function verdict(isReached: boolean, sentence: string): void {
  console.log(`${isReached ? "reached" : "MISSED "}  ${sentence}`);
  if (!isReached) {
    process.exitCode = 1;
  }
}

/** GNU dd gives a file's pages back with this pair of flags. */
export function dropCached(file: string): void {
  Bun.spawnSync(["dd", `if=${file}`, "iflag=nocache", "count=0"], { stderr: "ignore" });
}

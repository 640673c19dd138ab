// What the processor can do, in the words that targets.ts asks with: Linux's names of /proc/cpuinfo. It owns the
// question to the system; what follows from the answer is the table's matter. No question runs a native instruction
// that a small processor has not.
//
// x86 is asked through /proc/cpuinfo, arm64 through the auxiliary vector, where getauxval(3) reads too: it says what this
// process may use, also under an emulator or in a sandbox that shows another machine's /proc/cpuinfo.

import { closeSync, openSync, readFileSync, readSync } from "node:fs";

/** Linux's name of a feature -> macOS's. Every Apple processor of arm64 answers to these. */
const darwinNames: Readonly<Record<string, string>> = {
  asimddp: "hw.optional.arm.FEAT_DotProd",
  asimdhp: "hw.optional.arm.FEAT_FP16",
  i8mm: "hw.optional.arm.FEAT_I8MM",
};

/** The features that the system lets programs use; null where it does not say. */
export function processorFeatures(): ReadonlySet<string> | null {
  return process.platform === "darwin" ? darwinFeatures() : linuxFeatures();
}

function darwinFeatures(): ReadonlySet<string> | null {
  const names = Object.entries(darwinNames);
  const asked = Bun.spawnSync(["/usr/sbin/sysctl", "-i", ...names.map(([, name]) => name)], {
    stdout: "pipe",
    stderr: "ignore",
  });
  return asked.success ? parseSysctl(asked.stdout.toString()) : null;
}

/** "hw.optional.arm.FEAT_I8MM: 1" */
export function parseSysctl(text: string): ReadonlySet<string> {
  const on = new Set([...text.matchAll(/^(\S+): 1$/gm)].map((match) => match[1]));
  return new Set(
    Object.entries(darwinNames)
      .filter(([, name]) => on.has(name))
      .map(([name]) => name),
  );
}

function linuxFeatures(): ReadonlySet<string> | null {
  return (process.arch === "arm64" ? auxiliaryFeatures() : null) ?? cpuInfoFeatures();
}

/** Entries of the auxiliary vector, and the bits in them (Linux's asm/hwcap.h for arm64). */
const [hwcap, hwcap2] = [16n, 26n];
const armBits: readonly { readonly entry: bigint; readonly bit: bigint; readonly name: string }[] = [
  { entry: hwcap, bit: 10n, name: "asimdhp" },
  { entry: hwcap, bit: 20n, name: "asimddp" },
  { entry: hwcap2, bit: 13n, name: "i8mm" },
];

function auxiliaryFeatures(): ReadonlySet<string> | null {
  try {
    return parseAuxiliary(readFileSync("/proc/self/auxv"));
  } catch {
    return null; // hidden: /proc/cpuinfo is asked next
  }
}

/** Pairs of 64-bit words, type and value; null where the kernel gave no HWCAP. */
export function parseAuxiliary(bytes: Uint8Array): ReadonlySet<string> | null {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const values = new Map<bigint, bigint>();
  for (let at = 0; at + 16 <= bytes.byteLength; at += 16) {
    values.set(view.getBigUint64(at, true), view.getBigUint64(at + 8, true));
  }
  if (!values.has(hwcap)) {
    return null;
  }
  const has = ({ entry, bit }: { readonly entry: bigint; readonly bit: bigint }): boolean =>
    (((values.get(entry) ?? 0n) >> bit) & 1n) === 1n;
  return new Set(armBits.filter(has).map(({ name }) => name));
}

function cpuInfoFeatures(): ReadonlySet<string> | null {
  // The first processor's paragraph: the kernel takes milliseconds to write those of a hundred.
  const text = Buffer.alloc(8192);
  let descriptor: number;
  try {
    descriptor = openSync("/proc/cpuinfo", "r");
  } catch {
    return null; // no /proc: who asks says so
  }
  try {
    let length = 0;
    for (let n = -1; n !== 0 && length < text.length; length += n) {
      n = readSync(descriptor, text, length, text.length - length, null);
    }
    return parseCpuInfo(text.toString("latin1", 0, length));
  } finally {
    closeSync(descriptor);
  }
}

/** "flags : fpu vme ..." of x86, "Features : fp asimd ..." of arm64; null without such a line. */
export function parseCpuInfo(text: string): ReadonlySet<string> | null {
  const line = /^(?:flags|Features)\s*:(.*)\n/m.exec(text)?.[1];
  return line === undefined ? null : new Set(line.trim().split(/\s+/));
}

// What a machine's findings mean for speed: the advice of `hypura doctor`, each piece with its reason and what to do. It
// takes findings and gives sentences; it asks nothing (cli/doctor.ts does), and knows no threshold of belief: it speaks
// of what is off, missing or less than it could be, not of what is slow.

import type { Machine } from "./machine";
import { bandwidthText, bytesText, plural } from "./text";

export interface Findings {
  readonly platform: "linux" | "darwin";
  readonly library: {
    /** Null where none could be loaded: `fault` says why. */
    readonly path: string | null;
    readonly fault: string | null;
    /** Of the CPU kernels; null where a person named the library. */
    readonly variant: string | null;
    /** The best that this executable carries for this processor; null where it carries none or one. */
    readonly bestVariant: string | null;
    /** Places that were passed over, with the reason. */
    readonly passedOver: readonly string[];
    /** What for GPUs is compiled in, as ggml names it: CUDA, MTL. */
    readonly gpuBackends: readonly string[];
  };
  readonly machine: Machine;
  /** All of the machine's memory, whatever a control group leaves of it. */
  readonly installedBytes: number;
  readonly logicalCores: number;
  /** The processors' worth of time that a control group leaves; null without a limit. */
  readonly groupCores: number | null;
  /** Linux's choice for transparent huge pages; null where there is none to make. */
  readonly hugePages: "always" | "madvise" | "never" | null;
  /** An NVIDIA driver is loaded. */
  readonly hasNvidiaDriver: boolean;
  /** The volume that was asked about. */
  readonly volume: {
    readonly path: string;
    readonly name: string;
    /** Whether a file there can be read past the page cache; null where that was not found out. */
    readonly direct: boolean | null;
  };
  /** Why no profile holds, as sentences. */
  readonly profileNotes: readonly string[];
  readonly model: ModelFindings | null;
}

export interface ModelFindings {
  readonly path: string;
  readonly mode: string | null;
  /** Weights that are read from storage while it runs. */
  readonly streamedBytes: number;
  /** Why it cannot run here. */
  readonly refusal: string | null;
}

/** What would make hypura faster here, the largest first; empty where nothing is known. */
export function adviceFor(findings: Findings): readonly string[] {
  const { fault } = findings.library;
  return [
    ...(fault === null ? [] : [`no model runs here: ${fault}`]),
    ...gpuAdvice(findings),
    ...memoryAdvice(findings),
    ...processorAdvice(findings),
    ...storageAdvice(findings),
    ...libraryAdvice(findings),
  ];
}

function gpuAdvice({ platform, library, machine, hasNvidiaDriver }: Findings): readonly string[] {
  if (library.path === null || machine.devices.some(({ type }) => type === "gpu" || type === "igpu")) {
    return [];
  }
  if (platform === "darwin") {
    return library.gpuBackends.length > 0
      ? ["macOS shows no GPU that Metal can use: the processor computes everything"]
      : ["this build has no Metal: take the release for macOS, or build on this Mac (`bun run build`)"];
  }
  if (library.gpuBackends.includes("CUDA")) {
    return [
      hasNvidiaDriver
        ? "NVIDIA's driver is loaded and shows this build no GPU that it can use, the processor computes everything: `nvidia-smi` says what is there, CUDA_VISIBLE_DEVICES may hide it, and an old driver must be updated for a newer CUDA toolkit"
        : "this build has CUDA and no NVIDIA driver is loaded, the processor computes everything: install the driver, or give the container the GPU",
    ];
  }
  return hasNvidiaDriver
    ? [
        "an NVIDIA driver is loaded and this build has no CUDA: `bun run build --cuda`, where the CUDA toolkit is installed",
      ]
    : [];
}

function memoryAdvice({ machine, installedBytes, hugePages, model }: Findings): readonly string[] {
  const { availableBytes, totalBytes, limitedBy } = machine.memory;
  const advice: string[] = [];
  if (model !== null && model.streamedBytes > 0) {
    advice.push(
      `${bytesText(model.streamedBytes)} of the model are streamed: each gigabyte that is freed (${bytesText(availableBytes)} of ${bytesText(totalBytes)} are free) is one that need not be read again`,
    );
  }
  if (limitedBy !== null) {
    advice.push(
      `the control group ${limitedBy} allows ${bytesText(totalBytes)} of the machine's ${bytesText(installedBytes)}: raise its memory limit`,
    );
  }
  if (hugePages === "never") {
    advice.push(
      "transparent huge pages are off, and streamed weights are read slower without: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)",
    );
  }
  return advice;
}

function processorAdvice({ library, logicalCores, groupCores }: Findings): readonly string[] {
  const advice: string[] = [];
  if (groupCores !== null && groupCores < logicalCores) {
    advice.push(
      `the control group allows the time of ${plural(groupCores, "processor")} of ${logicalCores}: raise its CPU limit`,
    );
  }
  if (library.bestVariant !== null && library.variant !== library.bestVariant) {
    advice.push(
      `the kernels in use are ${library.variant ?? "those of a library that was named"}, this processor can do ${library.bestVariant}: unset HYPURA_CPU and HYPURA_LIB, and leave no libhypura beside the executable`,
    );
  }
  return advice;
}

function storageAdvice({ machine, volume, profileNotes }: Findings): readonly string[] {
  const speed = machine.profile?.storage[0];
  if (speed === undefined) {
    const reason = profileNotes.length === 0 ? "this volume was not measured yet" : profileNotes.join("; ");
    return [`${reason}: \`hypura profile --path ${volume.path}\` lets plans use what the machine can`];
  }
  return volume.direct === false || !speed.direct
    ? [
        `${volume.name} cannot be read past the page cache, so streamed weights push other memory out (${bandwidthText(speed.bestBytesPerSecond)} so far): keep models on ext4, XFS, Btrfs or APFS`,
      ]
    : [];
}

function libraryAdvice({ library }: Findings): readonly string[] {
  return library.passedOver.length === 0
    ? []
    : [
        `places were passed over before the library was loaded, which costs time at each start: ${library.passedOver.join("; ")}: set HYPURA_CACHE to a folder with room that allows execution`,
      ];
}

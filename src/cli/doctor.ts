// `hypura doctor`: one screen of what this machine offers (kernels, GPU, memory and its limits, disk, huge pages) and what
// would make hypura faster here. It looks and measures nothing: speeds are those that `hypura profile` kept. A library that
// cannot be loaded is a finding, not an end. What findings mean is doctor.ts's matter.

import { closeSync, constants, existsSync, openSync, readFileSync, statSync } from "node:fs";
import { totalmem } from "node:os";
import { basename, dirname } from "node:path";
import packageJson from "../../package.json";
import pin from "../../vendor/llama.json";
import { adviceFor, type Findings, type ModelFindings } from "../doctor";
import { type EngineLibrary, engineLibrary } from "../engine";
import { HypuraError } from "../errors";
import { groupCores, type Machine, readMachine, readProcessor, volumeOf } from "../machine";
import { openModelFile } from "../modelfile";
import { noLimits } from "../plan";
import { loadMachine } from "../profile";
import { readSizeText } from "../storage";
import { bandwidthText, bytesText, clip, durationText, plural, printable } from "../text";
import { command } from "./command";
import { judge } from "./inspect";
import { section } from "./measuring";
import { pageWidth, wrapped } from "./outlook";
import { print, stdout } from "./terminal";

export const doctorCommand = command(
  {
    meta: {
      name: "doctor",
      description: "Say what this machine offers, and what would make hypura faster here",
    },
    args: {
      model: {
        type: "positional",
        description: "A .gguf file, or the folder where models are (default: this folder)",
        required: false,
      },
      json: { type: "boolean", description: "Print one JSON object" },
    },
    async run({ args }) {
      const { findings, instructionSets } = await examine(args.model ?? ".");
      const advice = adviceFor(findings);
      await print(
        args.json === true
          ? `${JSON.stringify({ ...versions, ...findings, instructionSets, advice })}\n`
          : doctorPage(findings, instructionSets, advice),
      );
    },
  },
  {
    examples: [
      "hypura doctor",
      "hypura doctor ~/models/model.gguf                  and how that model would run",
      "hypura doctor --json",
    ],
    notes: ["It measures nothing: speeds are those that `hypura profile` kept for the volume."],
  },
);

const versions = {
  hypura: packageJson.version,
  llama: pin.release,
  bun: Bun.version,
  target: `${process.platform}-${process.arch}`,
} as const;

interface Examined {
  readonly findings: Findings;
  readonly instructionSets: readonly string[];
}

async function examine(path: string): Promise<Examined> {
  const name = volumeOf(path); // throws where there is no such path
  const { library, fault } = findLibrary();
  const profileNotes: string[] = [];
  const machine =
    library === null
      ? readMachine()
      : await loadMachine({ folder: path, measure: "cached", onNote: (note) => profileNotes.push(note) });
  const findings: Findings = {
    platform: process.platform === "darwin" ? "darwin" : "linux",
    library: {
      path: library?.path ?? null,
      fault,
      variant: library?.variant ?? null,
      bestVariant: library?.bestVariant ?? null,
      passedOver: library?.passedOver ?? [],
      gpuBackends: library?.gpuBackends ?? [],
    },
    machine,
    installedBytes: totalmem(),
    logicalCores: readProcessor().logicalCores,
    groupCores: process.platform === "linux" ? groupCores() : null,
    hugePages: hugePages(),
    hasNvidiaDriver: existsSync("/proc/driver/nvidia/version"),
    volume: { path, name, direct: canReadDirectly(path, machine) },
    profileNotes,
    model: modelFindings(path, machine),
  };
  return { findings, instructionSets: library?.instructionSets ?? [] };
}

function findLibrary(): { readonly library: EngineLibrary | null; readonly fault: string | null } {
  try {
    return { library: engineLibrary(), fault: null };
  } catch (error) {
    if (!(error instanceof HypuraError)) {
      throw error;
    }
    return { library: null, fault: error.message };
  }
}

/** "always [madvise] never" */
function hugePages(): Findings["hugePages"] {
  try {
    const text = readFileSync("/sys/kernel/mm/transparent_hugepage/enabled", "utf8");
    const chosen = /\[(\w+)\]/.exec(text)?.[1];
    return chosen === "always" || chosen === "madvise" || chosen === "never" ? chosen : null;
  } catch {
    return null; // another system, or a kernel without
  }
}

/** What was measured; of a file that was not, whether it opens past the page cache. */
function canReadDirectly(path: string, { profile }: Machine): boolean | null {
  const measured = profile?.storage[0]?.direct;
  if (measured !== undefined || process.platform === "darwin") {
    return measured ?? true; // macOS takes F_NOCACHE for every file
  }
  if (!statSync(path).isFile()) {
    return null;
  }
  try {
    closeSync(openSync(path, constants.O_RDONLY | constants.O_DIRECT));
    return true;
  } catch (error) {
    return (error as { readonly code?: string }).code === "EINVAL" ? false : null;
  }
}

function modelFindings(path: string, machine: Machine): ModelFindings | null {
  if (statSync(path).isDirectory()) {
    return null;
  }
  const file = openModelFile(path);
  const { plan, refusal } = judge(file, noLimits, {
    machine,
    name: "this machine",
    isElsewhere: false,
    knowledge: {},
  });
  const streamed = plan?.tensors.filter(({ tier }) => tier === "nvme") ?? [];
  return {
    path: file.path,
    mode: plan?.mode ?? null,
    streamedBytes: streamed.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
    refusal: refusal?.message ?? null,
  };
}

// ---- the page -----------------------------------------------------------------------------------------------------

/** What the command prints for people. */
export function doctorPage(
  findings: Findings,
  instructionSets: readonly string[],
  advice: readonly string[],
): string {
  const rows = [
    ["hypura", `${versions.hypura}, llama.cpp ${versions.llama}, Bun ${versions.bun}, ${versions.target}`],
    ["library", printable(findings.library.path ?? "none could be loaded")],
    ...kernelRows(findings, instructionSets),
    ...processorRows(findings),
    ...storageRows(findings),
    ...modelRows(findings),
  ];
  const said =
    advice.length === 0
      ? ["  nothing that hypura knows of"]
      : advice.flatMap((one) =>
          wrapped(printable(one), pageWidth - 4).map(
            (line, index) => `${index === 0 ? "  - " : "    "}${line}`,
          ),
        );
  const lines = [
    ...section(stdout.paint("bold", "This machine"), rows),
    "",
    stdout.paint("bold", "What would make hypura faster here"),
    ...said,
  ];
  return `${lines.map((line) => clip(line, pageWidth)).join("\n")}\n`;
}

function kernelRows({ library }: Findings, sets: readonly string[]): readonly (readonly string[])[] {
  const name = library.variant ?? (library.path === null ? "none" : "of the library that was named");
  const width = pageWidth - 16;
  return [
    ["kernels", name],
    ...(sets.length === 0 ? [] : wrapped(sets.join(" "), width).map((line) => ["", line])),
  ];
}

function processorRows(findings: Findings): readonly (readonly string[])[] {
  const { machine, hugePages: pages, logicalCores, groupCores: group, library } = findings;
  const { availableBytes, totalBytes, limitedBy } = machine.memory;
  const gpus = machine.devices.filter(({ type }) => type === "gpu" || type === "igpu");
  const limit = limitedBy === null ? "" : `, the limit of the control group ${limitedBy}`;
  const share = group === null ? "" : `, the control group allows the time of ${group}`;
  return [
    [
      "processor",
      `${printable(readProcessor().model)}, ${plural(machine.computeCores, "core")} to compute on of ${logicalCores}${share}`,
    ],
    ["memory", `${bytesText(availableBytes)} free of ${bytesText(totalBytes)}${limit}`],
    ["huge pages", pages ?? "not a choice on this system"],
    ...(gpus.length === 0 ? [["gpu", gpuAbsence(library)]] : []),
    ...gpus.map((one) => [
      "gpu",
      `${printable(one.description)}: ${bytesText(one.freeBytes)} free of ${bytesText(one.totalBytes)}${one.isUnified ? ", part of the memory" : ""}`,
    ]),
  ];
}

function gpuAbsence({ path, gpuBackends }: Findings["library"]): string {
  const compiled = gpuBackends.length === 0 ? "" : `, the library has ${gpuBackends.join(" and ")}`;
  return path === null ? "not known" : `none that can be used${compiled}`;
}

function storageRows({ volume, machine }: Findings): readonly (readonly string[])[] {
  const speed = machine.profile?.storage[0];
  const direct =
    volume.direct === null
      ? "not known, give a model"
      : volume.direct
        ? "yes"
        : "no, this file system cannot";
  const days = speed === undefined ? 0 : Math.max(0, Date.now() - Date.parse(speed.measuredAt)) / 1000;
  return [
    ["volume", printable(volume.name)],
    [
      "bandwidth",
      speed === undefined
        ? "not measured"
        : `${bandwidthText(speed.bestBytesPerSecond)} in reads of ${readSizeText(speed.best.readBytes)} x ${speed.best.depth}, measured ${durationText(days)} ago`,
    ],
    ["direct I/O", direct],
  ];
}

function modelRows({ model }: Findings): readonly (readonly string[])[] {
  if (model === null) {
    return [];
  }
  const streamed = model.streamedBytes === 0 ? "" : `, ${bytesText(model.streamedBytes)} streamed`;
  const fate =
    model.refusal === null ? `${model.mode}${streamed}` : `cannot run: ${printable(model.refusal)}`;
  return [["model", `${printable(basename(model.path))} in ${printable(dirname(model.path))}: ${fate}`]];
}

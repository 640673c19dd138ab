// `hypura profile`: what this machine is and how fast each of its tiers is. Measured once and kept; a plan is made of
// these figures. Its JSON is a machine, for `hypura inspect --machine FILE` on another one.

import { consola } from "consola";
import type { Machine, MachineProfile } from "../machine";
import { measuredRowElements } from "../plan-cost";
import { defaultSeconds, loadMachine } from "../profile";
import { readSizeText } from "../storage";
import { bandwidthText, bar, bytesText, durationText, flopsText, plural, printable } from "../text";
import { command, numberFlag } from "./command";
import { gridRows, measuring, section } from "./measuring";
import { print, stdout } from "./terminal";

export const profileCommand = command(
  {
    meta: { name: "profile", description: "Measure this machine: processor, memory, devices, storage" },
    args: {
      force: { type: "boolean", description: "Measure again even if the kept figures hold" },
      path: {
        type: "string",
        description: "Measure the volume of this folder or model (default: this folder)",
        valueHint: "PATH",
      },
      seconds: {
        type: "string",
        description: `How long to measure; more is steadier (default: ${defaultSeconds})`,
        valueHint: "N",
      },
      json: { type: "boolean", description: "Print the machine as one JSON object" },
    },
    async run({ args }) {
      const seconds = numberFlag("seconds", args.seconds, { least: 0.1, most: 600, integer: false });
      const machine = await measuring((how) =>
        loadMachine({
          ...how,
          folder: args.path ?? ".",
          measure: args.force === true ? "always" : "if-needed",
          seconds: seconds ?? defaultSeconds,
          onNote: (note) => consola.warn(note),
        }),
      );
      await print(args.json === true ? `${JSON.stringify(machine)}\n` : profilePage(machine));
    },
  },
  {
    examples: [
      "hypura profile",
      "hypura profile --path ~/models                    the volume where the models are",
      "hypura profile --force --seconds 30               again, and steadier",
      "hypura profile --json > box.json                  for `hypura inspect --machine` elsewhere",
    ],
    notes: [
      "The figures are kept in the state folder (~/.hypura, or HYPURA_HOME). They are measured again when\n" +
        "they are 30 days old or the machine differs: processor, cores, memory, devices, hypura, llama.cpp.",
      "Storage is read past the page cache by the reader that streams weights, threads with one pread(2)\n" +
        "each: from PATH or a large file under it. Where there is none, one of up to 1.07 GB is written and\n" +
        "removed again.",
      "A machine that is busy measures slow: leave it alone meanwhile.",
    ],
  },
);

const barWidth = 24;

/** What the command prints for people. */
export function profilePage(machine: Machine): string {
  const { profile } = machine;
  const lines = [
    ...section(stdout.paint("bold", "Machine"), machineRows(machine)),
    "",
    ...section(stdout.paint("bold", "Devices"), deviceRows(machine), [2, 3]),
    ...(profile === null ? [] : ["", ...profileLines(profile, machine)]),
  ];
  return `${lines.join("\n")}\n`;
}

function machineRows({ computeCores, memory, profile }: Machine): readonly (readonly string[])[] {
  const { availableBytes, totalBytes, limitedBy } = memory;
  const limit = limitedBy === null ? "" : `, the limit of the control group ${limitedBy}`;
  return [
    ...(profile === null ? [] : [["processor", printable(profile.cpuModel)]]),
    ["cores", `${plural(computeCores, "core")} to compute on`],
    ["memory", `${bytesText(availableBytes)} free of ${bytesText(totalBytes)}${limit}`],
    ...(profile === null ? [] : [["measured", ageText(profile.measuredAt)]]),
  ];
}

function ageText(measuredAt: string): string {
  const seconds = Math.max(0, (Date.now() - Date.parse(measuredAt)) / 1000);
  if (seconds < 60) {
    return "just now";
  }
  const days = Math.floor(seconds / 86_400);
  return days === 0 ? `${durationText(seconds)} ago` : `${plural(days, "day")} ago`;
}

function deviceRows({ devices }: Machine): readonly (readonly string[])[] {
  return devices.map(({ name, type, description, totalBytes, freeBytes, isUnified }) => [
    printable(name),
    type,
    totalBytes === 0 ? "" : bytesText(totalBytes),
    totalBytes === 0 || type === "cpu" ? "" : `${bytesText(freeBytes)} free`,
    isUnified && type !== "cpu" ? "shares the machine's memory" : "",
    printable(description),
  ]);
}

/** A picture for each tier, and the tables behind it. */
function profileLines(profile: MachineProfile, { devices }: Machine): readonly string[] {
  const { products, storage } = profile;
  const fastest = Math.max(...products.map((one) => one.decodeBytesPerSecond), profile.copyBytesPerSecond);
  const drawn = (rate: number): string => bar(rate / fastest, barWidth);
  const gpus = devices.filter((one) => one.type === "gpu" || one.type === "igpu");
  const tiers = [
    ...gpus.map((one) => ["gpu", "not measured", drawn(0), printable(one.description)]),
    [
      "ram",
      bandwidthText(profile.copyBytesPerSecond),
      drawn(profile.copyBytesPerSecond),
      "copied from memory to memory",
    ],
    ...storage.map((one) => [
      "nvme",
      bandwidthText(one.bestBytesPerSecond),
      drawn(one.bestBytesPerSecond),
      `${one.direct ? "direct" : "buffered"} reads of ${readSizeText(one.best.readBytes)} x ${one.best.depth}, ${printable(one.volume)}`,
    ]),
  ];
  const productRows = products.map((one) => [
    one.typeName,
    bandwidthText(one.decodeBytesPerSecond),
    drawn(one.decodeBytesPerSecond),
    bandwidthText(one.shortRowBytesPerSecond),
    one.repacked === null ? "" : bandwidthText(one.repacked.decodeBytesPerSecond),
    flopsText(one.prefillFlopsPerSecond),
  ]);
  return [
    ...section(stdout.paint("bold", "Tiers"), tiers, [1]),
    "",
    ...section(
      stdout.paint(
        "bold",
        `Products on ${plural(profile.computeThreads, "thread")}: one token, rows of ${measuredRowElements.long}, of ${measuredRowElements.short}, rearranged; a batch of 512`,
      ),
      productRows,
      [1, 3, 4, 5],
    ),
    ...storage.flatMap((one) => [
      "",
      ...section(
        stdout.paint("bold", `Storage: reads at random places, by size and depth`),
        gridRows(one.reads),
        one.reads.map((_, index) => index + 1),
      ),
    ]),
  ];
}

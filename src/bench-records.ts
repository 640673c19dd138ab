// Where the records of benchmark runs are kept: one JSON file a run in the folder `bench` of the state folder, written
// as soon as the run is over, so that stopping a benchmark loses nothing that is done. It knows no figure in them.

import { readdirSync } from "node:fs";
import { join } from "node:path";
import { parseRecord, type RunRecord } from "./bench";
import { readState, stateFolder, writeState } from "./state";

const folder = "bench";

/** Returns the path of the record. */
export function keepRecord(record: RunRecord): string {
  const name = `${folder}/${record.session}-${String(record.index).padStart(3, "0")}.json`;
  writeState(name, `${JSON.stringify(record, null, 1)}\n`);
  return join(stateFolder(), name);
}

/** All records that can be read, oldest first, and how many cannot. */
export function readRecords(): { readonly records: readonly RunRecord[]; readonly unreadable: number } {
  const names = recordNames();
  const records = names.flatMap((name) => {
    const record = parseRecord(readState(`${folder}/${name}`) ?? "");
    return record === null ? [] : [record];
  });
  return { records, unreadable: names.length - records.length };
}

function recordNames(): readonly string[] {
  try {
    return readdirSync(join(stateFolder(), folder))
      .filter((name) => name.endsWith(".json"))
      .sort();
  } catch {
    return []; // no benchmark was run yet
  }
}

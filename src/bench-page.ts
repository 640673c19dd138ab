// placeholder
import type { RunRecord } from "./bench";
export function benchPage(_records: readonly RunRecord[], _p: unknown): string {
  return "";
}
export async function readPassages(_path: string): Promise<unknown> {
  return null;
}

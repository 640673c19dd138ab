// `hypura estimate`: the short form says what `inspect` says, in lines that fit and in JSON, and gives no number that
// nobody measured.

import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { estimateText } from "../../src/cli/estimate";
import type { Place } from "../../src/cli/inspect";
import { openModelFile } from "../../src/modelfile";
import { noLimits } from "../../src/plan";
import { machineNames, machineOf, machines, shapeNames, shapes, writeHollow } from "../unit/plan-family";
import { hypura, scratchFolder, tinyModel } from "./program";

const folder = scratchFolder();

function placeOn(name: keyof typeof machines): Place {
  return { machine: machineOf(machines[name]), name, isElsewhere: true, knowledge: {} };
}

describe.each(shapeNames)("%s", (shape) => {
  const path = join(folder, `${shape}.gguf`);
  writeHollow(path, shapes[shape]);

  test.each(machineNames)("on %s: fits 100 columns, and has a speed or says why not", (machine) => {
    const text = estimateText(openModelFile(path), noLimits, placeOn(machine), false);
    for (const line of text.split("\n")) {
      expect(Bun.stringWidth(line)).toBeLessThanOrEqual(100);
    }
    expect(text).toMatch(
      /decode +(?:[\d.]+ tok\/s \(computed|products on the GPU were not measured)|cannot run: /,
    );
    expect(text).not.toMatch(/undefined|NaN|Infinity|\[object/);
  });
});

test("--json has the figures of the plan that inspect prints", async () => {
  const path = join(folder, "qwen3-30b.gguf");
  const file = join(folder, "laptop.json");
  writeFileSync(file, JSON.stringify(machineOf(machines["laptop-8g"])));
  const short = JSON.parse((await hypura(["estimate", path, "--machine", file, "--json"])).stdout);
  const long = JSON.parse((await hypura(["inspect", path, "--machine", file, "--json"])).stdout);
  expect(short.plan.mode).toBe("expert-streaming");
  expect(short.plan.estimate).toEqual(long.plan.estimate);
  expect(short.plan.estimate.decodeTokensPerSecond).toBeGreaterThan(0);
  expect(short.budgetBytes).toBe(long.budgetBytes);
});

test("a model that cannot run gets the reason, on this machine too", async () => {
  const outcome = await hypura(["estimate", await tinyModel(folder), "--memory", "50M"]);
  expect(outcome.status).toBe(0);
  expect(outcome.stdout).toMatch(/cannot run: the model needs/);
  const json = await hypura(["estimate", await tinyModel(folder), "--memory", "50M", "--json"]);
  expect(JSON.parse(json.stdout)).toMatchObject({ plan: null, refusal: { code: "not-enough-memory" } });
});

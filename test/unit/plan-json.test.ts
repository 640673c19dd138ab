// Plans from files: what was printed comes back as it was, and no change of a field gets through that native code would
// stumble over.

import { expect, test } from "bun:test";
import { HypuraError } from "../../src/errors";
import { makePlan, noLimits, type Plan } from "../../src/plan";
import { validatePlan } from "../../src/plan-json";
import { openRandom } from "../fixtures/random";
import { machineNames, machineOf, machines, shapeModel, shapeNames } from "./plan-family";

function planOf(shape: (typeof shapeNames)[number], machine: (typeof machineNames)[number]): Plan | null {
  const model = shapeModel(shape);
  try {
    const files = [{ path: "m.gguf", sizeBytes: model.tensorBytes }];
    return makePlan({ name: shape, files, model }, machineOf(machines[machine]), noLimits);
  } catch (error) {
    expect((error as HypuraError).code).toBe("not-enough-memory");
    return null;
  }
}

test.each(shapeNames)("every plan of %s survives JSON", (shape) => {
  for (const machine of machineNames) {
    const made = planOf(shape, machine);
    if (made === null) continue;
    const json = JSON.parse(JSON.stringify(made)) as unknown;
    expect(validatePlan(json)).toEqual(made);
    expect(validatePlan({ plan: json, path: "m.gguf" })).toEqual(made);
  }
});

/** Every place in a document where a value stands, as the path to it. */
function placesIn(value: unknown, path: readonly (string | number)[] = []): (readonly (string | number)[])[] {
  if (typeof value !== "object" || value === null) return [path];
  const inner = Array.isArray(value) ? [...value.keys()] : Object.keys(value);
  return [
    path,
    ...inner.flatMap((key) => placesIn((value as Record<string | number, unknown>)[key], [...path, key])),
  ];
}

test("a field that is missing, of another kind or out of range is named", () => {
  const model = shapeModel("gpt-oss-20b");
  const files = [{ path: "m.gguf", sizeBytes: model.tensorBytes }];
  const whole = makePlan({ name: "m", files, model }, machineOf(machines["laptop-8g"]));
  const made = { ...whole, tensors: whole.tensors, choices: whole.choices.slice(0, 2) };
  const text = JSON.stringify(made);
  const places = placesIn(made).filter((path) => path.length > 0);
  const random = openRandom(4);
  const strange: readonly unknown[] = [undefined, null, -1, 1.5, "x", {}, [], Number.NaN, 2 ** 60];
  let refused = 0;
  for (let i = 0; i < 1500; i++) {
    const path = random.pick(places);
    const copy = JSON.parse(text) as Record<string | number, unknown>;
    let at = copy;
    for (const key of path.slice(0, -1)) at = at[key] as Record<string | number, unknown>;
    const value = strange[random.below(strange.length)];
    const last = path.at(-1) ?? "";
    if (value === undefined) delete at[last];
    else at[last] = value;
    try {
      validatePlan(copy);
    } catch (error) {
      expect(error).toBeInstanceOf(HypuraError);
      expect((error as HypuraError).code).toBe("usage");
      refused++;
    }
  }
  expect(refused).toBeGreaterThan(1000);
});

test("a refusal holds no plan", () => {
  expect(() => validatePlan({ plan: null, refusal: { code: "not-enough-memory" } })).toThrow(/holds no plan/);
  for (const json of [null, 1, "x", [], {}]) expect(() => validatePlan(json)).toThrow(HypuraError);
});

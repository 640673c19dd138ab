// `hypura inspect`: what a model file holds and how it would run here. Reads headers only and loads no weights, so
// it works on a machine that could not run the model.

import { basename } from "node:path";
import { openModelFile } from "../modelfile";
import { command } from "./command";
import { bytesText, countText } from "../text";

export const inspectCommand = command(
  {
    meta: { name: "inspect", description: "Show what a model file holds and how it would run here" },
    args: { model: { type: "positional", description: "A .gguf file (any file of a split model)", required: true } },
    run({ args }) {
      const { model } = openModelFile(args.model);
      console.log(`${basename(args.model)}: ${model.architecture}, ${countText(model.parameterCount)} parameters, ${bytesText(model.tensorBytes)}`);
    },
  },
  ["hypura inspect model.gguf"],
);

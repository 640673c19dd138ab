// Projectors: the part of a model that turns images into what the model reads, in a file of its own (mmproj). It owns
// what such a file must say to be one, and how much memory it takes; which model it belongs to shows when the engine
// loads both, since the file does not say.

import { basename } from "node:path";
import { HypuraError } from "./errors";
import type { Gguf, GgufValue } from "./gguf";
import { openGguf } from "./modelfile";

export interface Projector {
  readonly path: string;
  readonly sizeBytes: number;
  /** Weights, and scratch for one image. */
  readonly memoryBytes: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
}

/** Throws where the file is no projector for images. */
export function openProjector(path: string): Projector {
  const { gguf, sizeBytes } = openGguf(path);
  const { metadata } = gguf;
  const quoted = JSON.stringify(basename(path));
  if (metadata.get("general.architecture") !== "clip") {
    throw new HypuraError(
      "unsupported-model",
      `${quoted} is no projector (its architecture is ${JSON.stringify(metadata.get("general.architecture") ?? "not named")}): give the model's mmproj file, which lies beside it where it was downloaded`,
    );
  }
  if (metadata.get("clip.has_vision_encoder") !== true) {
    throw new HypuraError(
      "unsupported-model",
      `${quoted} has no encoder for images: give the mmproj file of a model that sees`,
    );
  }
  return { path, sizeBytes, memoryBytes: sizeBytes + scratchBytes(gguf), metadata };
}

/**
 * Of one image of the encoder's own size: some ten rows of the encoder's width and two of its FFN for each patch, and
 * the pixels three times. Flash attention keeps no scores.
 */
function scratchBytes({ metadata }: Gguf): number {
  const count = (key: string): number => {
    const value = metadata.get(`clip.vision.${key}`);
    return typeof value === "number" && value > 0 ? value : 0;
  };
  const side = count("image_size");
  const patches = (side / Math.max(1, count("patch_size"))) ** 2;
  const floats = 10 * count("embedding_length") + 2 * count("feed_forward_length");
  return Math.ceil(4 * (patches * floats + 3 * 3 * side * side));
}

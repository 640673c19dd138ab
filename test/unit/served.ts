// A served model for tests of the dialects: a tiny GGUF made in memory, described as the library would.

import { parseGguf } from "../../src/gguf";
import { describeModel } from "../../src/model";
import { capabilitiesOf, fimTokensOf, noSettings, type ServedModel } from "../../src/ollama-model";
import { ggufBytes, type Metadata } from "../fixtures/gguf-writer";
import { tinyLlama } from "../fixtures/tiny";

export const thinkingTemplate =
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if tools %}{{ tools }}{% endif %}<think></think>";

export function text(key: string, value: string): Metadata {
  return { key, value: { type: "str", value } };
}

export function count(key: string, value: number): Metadata {
  return { key, value: { type: "u32", value } };
}

/** Of tiny-llama with these keys more, or instead. */
export function served(keys: readonly Metadata[] = [], more: Partial<ServedModel> = {}): ServedModel {
  const spec = tinyLlama({ seed: 1, context: 4096 });
  const replaced = new Set(keys.map(({ key }) => key));
  const bytes = ggufBytes({
    ...spec,
    metadata: [...spec.metadata.filter(({ key }) => !replaced.has(key)), ...keys],
  });
  const gguf = parseGguf([
    {
      name: "tiny.gguf",
      source: {
        sizeBytes: bytes.length,
        read: (offset, length) => bytes.subarray(offset, offset + length),
      },
    },
  ]);
  const model = describeModel(gguf);
  const fim = fimTokensOf(gguf.metadata, null);
  return {
    name: "tiny:latest",
    files: [{ path: "models/tiny.gguf", sizeBytes: bytes.length }],
    digest: "ab".repeat(32),
    modifiedAt: "2026-01-02T03:04:05Z",
    modifiedUnixSeconds: 1_767_323_045,
    model,
    metadata: gguf.metadata,
    projector: null,
    fim,
    capabilities: capabilitiesOf({
      metadata: gguf.metadata,
      model,
      fim,
      hasProjector: false,
      canEmbed: false,
    }),
    contextTokens: 2048,
    trainedContextTokens: 4096,
    canShift: false,
    settings: noSettings,
    ...more,
  };
}

export const thinker = (more: Partial<ServedModel> = {}): ServedModel =>
  served([text("tokenizer.chat_template", thinkingTemplate)], more);

// A tiny model that recites: after each token comes the one its script names, whatever stood before. It is a real
// model (a transformer whose blocks add nothing, and an output matrix that maps each token to its successor), so that
// a test sees the engine and its core stream thoughts and tool calls that the model itself has written. Its chat
// template is the thinker's.

import { writeGguf } from "../fixtures/gguf-writer";
import { openRandom } from "../fixtures/random";
import { tinyLlama } from "../fixtures/tiny";
import { fixtureTokenizer } from "../fixtures/tokenizer";
import { floatBytes } from "../fixtures/weights";
import { thinkerTemplate } from "./thinker";

/** What the model thinks, calls and says, each piece one token of its own. */
export const recital = {
  thoughts: ["The user asks", " about", " weather."],
  call: { name: "weather", arguments: { city: "Bern" } },
} as const;

const endOfTurn = 2; // <|im_end|> of the fixtures' tokenizer

/** The pieces in their order; `<think>` follows a prompt that leaves thinking open, the call one that has closed it. */
const thinking = ["<think>\n", ...recital.thoughts, "\n</think>"];
const calling = [
  "<tool_call>",
  `\n{"name": "${recital.call.name}", "arguments": `,
  JSON.stringify(recital.call.arguments),
  "}\n</tool_call>",
];

export function writeReciter(path: string): void {
  const spec = tinyLlama({ seed: 11, context: 4096, embd: 256, ff: 256 });
  const tokens = [...fixtureTokenizer().tokens];
  const newline = tokens.indexOf("Ċ");
  const first = tokens.length;
  const closed = "\n\n";
  const words = [...thinking, closed, ...calling];
  const idOf = (word: string): number => first + words.indexOf(word);
  const next = new Map<number, number>([[newline, idOf(thinking[0] as string)]]);
  const chain = [...words.map(idOf), endOfTurn];
  for (const [at, id] of chain.slice(0, -1).entries()) next.set(id, chain[at + 1] as number);
  // Byte-level vocabularies spell a space and a line's end with characters of their own; added tokens do not.
  const all = [...tokens, ...words];
  const userDefined = 4; // LLAMA_TOKEN_TYPE_USER_DEFINED
  const types = all.map((_, id) => (id < 3 ? 3 : id < first ? 1 : userDefined));
  const replaced: Readonly<Record<string, unknown>> = {
    "tokenizer.ggml.tokens": { type: "array", of: "str", values: all },
    "tokenizer.ggml.token_type": { type: "array", of: "i32", values: types },
    "tokenizer.chat_template": { type: "str", value: thinkerTemplate },
  };
  const metadata = spec.metadata.map((entry) =>
    entry.key in replaced ? { ...entry, value: replaced[entry.key] as typeof entry.value } : entry,
  );
  const width = 256;
  const { embedding, output } = matrices(all.length, width, next);
  const tensors = spec.tensors.map((tensor) => {
    const elements = tensor.shape.reduce((product, size) => product * size, 1);
    if (tensor.name === "token_embd.weight") return { ...tensor, ...floats(embedding, [width, all.length]) };
    if (tensor.name === "output.weight") return { ...tensor, ...floats(output, [width, all.length]) };
    if (tensor.name === "output_norm.weight") return { ...tensor, ...floats(ones(width), [width]) };
    // What a block would add is multiplied by nothing.
    const isLastOfPart = /attn_output|ffn_down/.test(tensor.name);
    return isLastOfPart ? { ...tensor, ...floats(new Float32Array(elements), tensor.shape) } : tensor;
  });
  writeGguf(path, { ...spec, metadata, tensors });
}

function floats(values: Float32Array, shape: readonly number[]) {
  return { shape, typeName: "f32", pieces: () => [floatBytes(values)] };
}

function ones(count: number): Float32Array {
  return new Float32Array(count).fill(1);
}

/** Embeddings of random signs, nearly at right angles to each other; a row of the output is its predecessor's. */
function matrices(
  vocabulary: number,
  width: number,
  next: ReadonlyMap<number, number>,
): { readonly embedding: Float32Array; readonly output: Float32Array } {
  const random = openRandom(12);
  const embedding = Float32Array.from({ length: vocabulary * width }, () =>
    random.pick([0, 1]) === 0 ? -1 : 1,
  );
  const output = new Float32Array(vocabulary * width);
  for (const [from, to] of next) {
    for (let i = 0; i < width; i++) {
      output[to * width + i] = (output[to * width + i] ?? 0) + (embedding[from * width + i] ?? 0);
    }
  }
  return { embedding, output };
}

// A tiny model whose chat template thinks and calls tools, in the manner of Qwen 3, with holes to fill. Its weights
// are random, so a test that wants words of it constrains them.

import { writeGguf } from "../fixtures/gguf-writer";
import { tinyLlama } from "../fixtures/tiny";

export const thinkerTemplate = `{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nAnswer with <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content }}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}{%- else %}{{- call.function.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}`;

export function writeThinker(path: string): void {
  const spec = tinyLlama({ seed: 7, context: 4096 });
  const replaced = new Set(["tokenizer.chat_template"]);
  writeGguf(path, {
    ...spec,
    metadata: [
      ...spec.metadata.filter(({ key }) => !replaced.has(key)),
      { key: "tokenizer.chat_template", value: { type: "str", value: thinkerTemplate } },
      // Any three tokens do.
      { key: "tokenizer.ggml.fim_pre_token_id", value: { type: "u32", value: 10 } },
      { key: "tokenizer.ggml.fim_suf_token_id", value: { type: "u32", value: 11 } },
      { key: "tokenizer.ggml.fim_mid_token_id", value: { type: "u32", value: 12 } },
    ],
  });
}

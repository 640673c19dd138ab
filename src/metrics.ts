// What GET /metrics says, in Prometheus' text format. It owns names, units and help lines; the numbers come in. Pure.

import type { GuessCount, GuessCounters } from "./guesses";
import type { KeeperCounts } from "./keeper";
import type { Mode } from "./plan";
import type { StreamingCounters } from "./streaming";

export interface MetricFacts {
  readonly version: string;
  readonly keeper: KeeperCounts;
  readonly tokens: {
    readonly promptTokens: number;
    readonly cachedTokens: number;
    readonly generatedTokens: number;
  };
  /** Replies by route and status. */
  readonly replies: ReadonlyMap<
    string,
    { readonly route: string; readonly status: number; readonly count: number }
  >;
  /** Null where no model is loaded. */
  readonly loaded: {
    readonly model: string;
    readonly mode: Mode;
    readonly ramBytes: number;
    readonly gpuBytes: number;
    readonly nvmeBytes: number;
    readonly contextTokens: number;
    readonly streaming: StreamingCounters | null;
    readonly guesses: GuessCounters | null;
  } | null;
}

type Labels = Readonly<Record<string, string | number>>;
type Sample = readonly [labels: Labels, value: number];

export function metricsText(facts: MetricFacts): string {
  const { keeper, tokens, loaded } = facts;
  const blocks = [
    gauge("hypura_info", "The running version.", [[{ version: facts.version }, 1]]),
    counter(
      "hypura_replies_total",
      "Replies by route and HTTP status; a stream counts when it begins.",
      [...facts.replies.values()].map(({ route, status, count }) => [{ route, status }, count]),
    ),
    counter(
      "hypura_tokens_total",
      "Tokens: of prompts that were evaluated or found in the KV cache, and generated.",
      [
        [{ kind: "prompt" }, tokens.promptTokens],
        [{ kind: "cached" }, tokens.cachedTokens],
        [{ kind: "generated" }, tokens.generatedTokens],
      ],
    ),
    gauge("hypura_requests_inside", "Requests inside the engine.", [[{}, keeper.inside]]),
    gauge("hypura_requests_waiting", "Requests that wait for their turn.", [[{}, keeper.waiting]]),
    counter("hypura_requests_refused_total", "Requests refused because too many waited.", [
      [{}, keeper.refused],
    ]),
    counter("hypura_passes_retried_total", "Requests sent again after a failed pass.", [
      [{}, keeper.retries],
    ]),
    counter("hypura_model_loads_total", "Models loaded, and loads that failed.", [
      [{ result: "ok" }, keeper.loads],
      [{ result: "failed" }, keeper.failedLoads],
    ]),
    counter("hypura_model_unloads_total", "Models unloaded.", [[{}, keeper.unloads]]),
    counter("hypura_engine_crashes_total", "Engines that ended unasked.", [[{}, keeper.crashes]]),
    ...(loaded === null ? [] : loadedBlocks(loaded)),
  ];
  return blocks.join("");
}

function loadedBlocks(loaded: NonNullable<MetricFacts["loaded"]>): readonly string[] {
  const { model, mode, streaming, guesses } = loaded;
  const labels = { model };
  return [
    gauge("hypura_model_loaded", "The model in memory and its mode.", [[{ model, mode }, 1]]),
    gauge("hypura_context_tokens", "Tokens of context of one request.", [[labels, loaded.contextTokens]]),
    gauge("hypura_memory_bytes", "Planned bytes by tier.", [
      [{ model, tier: "gpu" }, loaded.gpuBytes],
      [{ model, tier: "ram" }, loaded.ramBytes],
      [{ model, tier: "nvme" }, loaded.nvmeBytes],
    ]),
    ...(streaming === null ? [] : streamingBlocks(labels, streaming)),
    ...(guesses === null ? [] : guessBlocks(labels, guesses)),
  ];
}

function guessBlocks(labels: Labels, counters: GuessCounters): readonly string[] {
  const samples = (field: keyof GuessCount): readonly Sample[] =>
    Object.entries(counters).map(([source, count]: [string, GuessCount]) => [
      { ...labels, source },
      count[field],
    ]);
  return [
    counter("hypura_guesses_total", "Tokens guessed, by what guessed them.", samples("drafted")),
    counter("hypura_right_guesses_total", "Guesses that the model would have written.", samples("accepted")),
  ];
}

function streamingBlocks(labels: Labels, counters: StreamingCounters): readonly string[] {
  return [
    gauge("hypura_pool_bytes", "Bytes of the pool for streamed weights.", [[labels, counters.poolBytes]]),
    counter("hypura_strides_total", "Strides asked for by operations: ready, being read, absent.", [
      [{ ...labels, result: "hit" }, counters.hits],
      [{ ...labels, result: "late_hit" }, counters.lateHits],
      [{ ...labels, result: "miss" }, counters.misses],
    ]),
    counter("hypura_stall_seconds_total", "Time that operations waited for reads.", [
      [labels, counters.stallNs / 1e9],
    ]),
    counter("hypura_read_bytes_total", "Bytes of the strides that were read.", [
      [labels, counters.readBytes],
    ]),
    counter("hypura_reading_seconds_total", "Time with a read under way.", [
      [labels, counters.readingNs / 1e9],
    ]),
    counter("hypura_failed_reads_total", "Reads that failed after their retries.", [
      [labels, counters.failedReads],
    ]),
    counter("hypura_evictions_total", "Strides that gave their slot up.", [[labels, counters.evictions]]),
    counter("hypura_passes_total", "Evaluations of the graph.", [[labels, counters.passes]]),
  ];
}

function counter(name: string, help: string, samples: readonly Sample[]): string {
  return block(name, "counter", help, samples);
}

function gauge(name: string, help: string, samples: readonly Sample[]): string {
  return block(name, "gauge", help, samples);
}

function block(name: string, type: string, help: string, samples: readonly Sample[]): string {
  const lines = samples.map(([labels, value]) => `${name}${labelText(labels)} ${value}\n`);
  return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${lines.join("")}`;
}

function labelText(labels: Labels): string {
  const parts = Object.entries(labels).map(([key, value]) => `${key}="${escaped(String(value))}"`);
  return parts.length === 0 ? "" : `{${parts.join(",")}}`;
}

function escaped(text: string): string {
  return text.replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/\n/g, "\\n");
}

#include "engine.h"

#include "backend.h"

#include "build-info.h"
#include "common.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "json.h"
#include "llama-ext.h"
#include "llama.h"
#include "log.h"
#include "server-context.h"
#include "server-http.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <unistd.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace hypura {

// ------------------------------------------------------------------------------------------------ the plan

std::mutex & registry_mutex() {
    static auto * m = new std::mutex;
    return *m;
}

namespace {

uint32_t u32(const common_json & o, const char * key) {
    const int64_t v = o.at(key).get<int64_t>();
    if (v < 0 || v > INT32_MAX) {
        throw std::runtime_error(std::string(key) + " is out of range");
    }
    return static_cast<uint32_t>(v);
}

uint64_t u64(const common_json & o, const char * key) {
    const int64_t v = o.at(key).get<int64_t>();
    if (v < 0) {
        throw std::runtime_error(std::string(key) + " is negative");
    }
    return static_cast<uint64_t>(v);
}

LoadMode load_mode(const std::string & name) {
    if (name == "mmap") {
        return LoadMode::Mmap;
    }
    if (name == "direct") {
        return LoadMode::Direct;
    }
    if (name == "read") {
        return LoadMode::Read;
    }
    throw std::runtime_error("unknown load mode " + name);
}

ggml_type kv_type(const std::string & name) {
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                 GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1}) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::runtime_error("unknown KV type " + name);
}

void parse_prediction(const common_json & json, size_t tensor_count, PlanStreaming * s) {
    s->predicted_experts = u32(json, "experts");
    const common_json & routers = json.at("routers");
    bool fits = s->predicted_experts > 0 && s->predicted_experts <= 1024;
    for (size_t i = 0; i < routers.size(); ++i) {
        const common_json & from = routers.at(i);
        PlanRouter router{u32(from, "after"), {}, u32(from, "tensorIndex"), u32(from, "normIndex"), u32(from, "normBeforeIndex")};
        const common_json & asked = from.at("asked");
        for (size_t k = 0; k < asked.size(); ++k) {
            const auto place = static_cast<uint32_t>(asked.at(k).get<int64_t>());
            router.asked.push_back(place);
            fits = fits && place < s->tensors.size() && s->tensors[place].stride_count == s->tensors[router.asked.front()].stride_count;
        }
        fits = fits && !router.asked.empty() && router.asked.size() <= 16 && router.after < s->tensors.size() &&
               router.tensor_index < tensor_count && router.norm_index < tensor_count && router.norm_before_index < tensor_count;
        s->routers.push_back(std::move(router));
    }
    if (!fits) {
        throw std::runtime_error("the plan's prediction of experts is out of range");
    }
}

PlanStreaming parse_streaming(const common_json & json, size_t tensor_count) {
    PlanStreaming s;
    const common_json & tensors = json.at("tensors");
    const common_json & classes = json.at("classes");
    constexpr uint64_t most_pool_bytes = 1ull << 46;
    uint64_t pool_bytes = 0;
    for (size_t i = 0; i < classes.size(); ++i) {
        const common_json & c = classes.at(i);
        const common_json & policy = c.at("policy");
        ClassSpec spec{};
        spec.stride_bytes = u64(c, "strideBytes");
        spec.slot_bytes = u64(c, "slotBytes");
        spec.slot_count = u32(c, "slotCount");
        spec.op_slots = u32(c, "opSlots");
        spec.policy.kind = policy_kind(policy.at("kind").get<std::string>());
        spec.policy.half_life_tokens = policy.at("halfLifeTokens").get<double>();
        spec.policy.most_pass_tokens = u32(policy, "mostPassTokens");
        spec.policy.stale_after_passes = u32(policy, "staleAfterPasses");
        spec.policy.pinned_slots = u32(policy, "pinnedSlots");
        spec.policy.working_set_strides = u32(policy, "workingSetStrides");
        spec.policy.guard_ring_slots = u32(policy, "guardRingSlots");
        // What is multiplied later must not wrap: no pool is larger than 2^46 bytes.
        if (spec.stride_bytes == 0 || spec.slot_bytes == 0 || spec.slot_count == 0 ||
            spec.slot_count > most_pool_bytes / spec.slot_bytes) {
            throw std::runtime_error("a class of slots is out of range");
        }
        pool_bytes += spec.slot_bytes * spec.slot_count;
        if (pool_bytes > most_pool_bytes) {
            throw std::runtime_error("the pool is out of range");
        }
        s.classes.push_back(spec);
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
        const common_json & t = tensors.at(i);
        s.tensors.push_back({u32(t, "tensorIndex"), u32(t, "strideCount"), u32(t, "classIndex")});
        if (s.tensors.back().tensor_index >= tensor_count || s.tensors.back().class_index >= s.classes.size() ||
            s.tensors.back().stride_count == 0) {
            throw std::runtime_error("a streamed tensor of the plan is out of range");
        }
    }
    const common_json & reader = json.at("reader");
    s.reader.thread_count = u32(reader, "threads");
    s.reader.piece_bytes = u32(reader, "pieceBytes");
    s.reader.direct = reader.at("direct").get<bool>();
    s.reader.drop_buffered = reader.at("dropBuffered").get<bool>();
    s.reader.retry_count = u32(reader, "retryCount");
    s.reader.retry_wait_ns = u64(reader, "retryWaitNs");
    s.reader.prefetch_depth = u32(reader, "prefetchDepth");
    s.reader.background_tokens = u32(reader, "backgroundTokens");
    s.reader.background_depth = u32(reader, "backgroundDepth");
    s.lookahead_strides = u32(json, "lookaheadStrides");
    s.huge_pages = json.at("hugePages").get<bool>();
    s.touch_threads = u32(json, "touchThreads");
    s.span_work_bytes = u64(json, "spanWorkBytes");
    if (!json.at("prediction").is_null()) {
        parse_prediction(json.at("prediction"), tensor_count, &s);
    }
    if (json.contains("trace")) {
        s.trace_path = json.at("trace").at("path").get<std::string>();
        s.trace_header = json.at("trace").at("header").get<std::string>();
    }
    return s;
}

PlanSpeculation parse_speculation(const common_json & json) {
    constexpr uint32_t most_memory_tokens = 1u << 24; // it is searched for each pass
    PlanSpeculation s;
    s.max_tokens = u32(json, "maxTokens");
    s.from_context = !json.at("context").is_null();
    if (s.from_context) {
        const common_json & rule = json.at("context");
        s.rule = {s.max_tokens, u32(rule, "leastMatchTokens"), u32(rule, "mostCarries"), u32(rule, "memoryTokens"),
                  u32(rule, "leastTokens"), u32(rule, "tokensPerRight"), u32(rule, "newestPercent")};
    }
    s.draft_path = json.at("draftPath").is_null() ? "" : json.at("draftPath").get<std::string>();
    s.from_mtp = json.at("mtp").get<bool>();
    s.draft_probability = json.at("draftProbability").get<double>();
    if (s.max_tokens == 0 || s.max_tokens > UINT16_MAX || (s.from_context && s.rule.least_match == 0) ||
        s.rule.memory_tokens > most_memory_tokens || s.rule.newest_percent > 100 || (s.from_mtp && !s.draft_path.empty()) || !(s.draft_probability >= 0 && s.draft_probability <= 1)) {
        throw std::runtime_error("the speculation of the plan is out of range");
    }
    return s;
}

} // namespace

PolicyKind policy_kind(const std::string & name) {
    if (name == "lru") {
        return PolicyKind::kLru;
    }
    if (name == "lfu-decay") {
        return PolicyKind::kLfuDecay;
    }
    if (name == "least-stale") {
        return PolicyKind::kLeastStale;
    }
    if (name == "pinned-cyclic") {
        return PolicyKind::kPinnedCyclic;
    }
    throw std::runtime_error("unknown cache policy " + name);
}

OpenPlan parse_plan(std::string_view text) {
    const common_json json = common_json::parse(std::string(text));
    OpenPlan plan;
    plan.model_name = json.at("model").at("name").get<std::string>();
    const common_json & files = json.at("files");
    for (size_t i = 0; i < files.size(); ++i) {
        plan.files.push_back({files.at(i).at("path").get<std::string>(), u64(files.at(i), "sizeBytes")});
    }
    const common_json & tensors = json.at("tensors");
    for (size_t i = 0; i < tensors.size(); ++i) {
        const common_json & t = tensors.at(i);
        plan.tensors.push_back(
            {t.at("name").get<std::string>(), u32(t, "fileIndex"), u64(t, "offsetBytes"), u64(t, "sizeBytes")});
    }
    plan.context_tokens = u32(json, "contextTokens");
    plan.slot_count = u32(json, "slotCount");
    plan.batch_tokens = u32(json, "batchTokens");
    plan.ubatch_tokens = u32(json, "ubatchTokens");
    plan.decode_threads = u32(json, "decodeThreads");
    plan.prefill_threads = u32(json, "prefillThreads");
    plan.poll_percent = u32(json, "pollPercent");
    plan.gpu_layers = u32(json, "gpuLayers");
    plan.kv_type_k = json.at("kvTypeK").get<std::string>();
    plan.kv_type_v = json.at("kvTypeV").get<std::string>();
    kv_type(plan.kv_type_k);
    kv_type(plan.kv_type_v);
    plan.embeddings = json.at("embeddings").get<bool>();
    plan.repack = json.at("repack").get<bool>();
    plan.load_mode = load_mode(json.at("loadMode").get<std::string>());
    if (!json.at("streaming").is_null()) {
        plan.streaming = parse_streaming(json.at("streaming"), plan.tensors.size());
    }
    if (!json.at("speculation").is_null()) {
        plan.speculation = parse_speculation(json.at("speculation"));
    }
    plan.context_shift = json.at("contextShift").get<bool>();
    if (!json.at("projector").is_null()) {
        plan.projector_path = json.at("projector").at("path").get<std::string>();
    }
    if (!json.at("slotFolder").is_null()) {
        plan.slot_folder = json.at("slotFolder").get<std::string>();
        if (plan.slot_folder.empty() || plan.slot_folder.front() != '/') {
            throw std::runtime_error("the folder for slots is no absolute path");
        }
        if (plan.slot_folder.back() != '/') {
            plan.slot_folder += '/'; // the core puts the file's name right behind it
        }
    }
    // Every slot's token and what is guessed after it go into one batch.
    const uint64_t verified = plan.slot_count * (1ull + plan.speculation.max_tokens);
    // The core asserts on these; a plan that breaks them is refused instead. It tries the context with two tokens
    // while it loads, so a batch holds at least two.
    if (plan.files.empty() || plan.slot_count == 0 || plan.batch_tokens < 2 || plan.batch_tokens < verified ||
        plan.ubatch_tokens == 0 || plan.ubatch_tokens > plan.batch_tokens || plan.decode_threads == 0 ||
        plan.prefill_threads == 0 || plan.context_tokens == 0 || plan.poll_percent > 100 ||
        plan.decode_threads > GGML_MAX_N_THREADS || plan.prefill_threads > GGML_MAX_N_THREADS ||
        plan.slot_count > llama_max_parallel_sequences() ||
        static_cast<uint64_t>(plan.context_tokens) * plan.slot_count > INT32_MAX) {
        throw std::runtime_error("a count of the plan is out of range");
    }
    return plan;
}

std::string build_info_json() {
    take_log(); // the first look at the registry makes it
    std::lock_guard<std::mutex> lock(registry_mutex()); // the system's info walks the registry
    return "{\"llama\":" + json_string(llama_version()) + ",\"build\":" + json_string(llama_build_info()) +
           ",\"system\":" + json_string(llama_print_system_info()) + "}";
}

// ------------------------------------------------------------------------------------------ process-wide state

namespace {

// llama.cpp logs and asserts through process-wide hooks that carry no engine; they go to the engines that are open.
struct Listeners {
    std::mutex mutex;
    std::set<EventWriter *> writers;
    std::string last_error; // the newest error line: the reason of a load that fails
};

Listeners & listeners() {
    static auto * l = new Listeners; // never destroyed: hooks may run during exit
    return *l;
}

void tell_all(const std::string & line) {
    for (EventWriter * w : listeners().writers) {
        w->offer(line); // under the lock, so it must not wait for a reader
    }
}

void on_llama_log(ggml_log_level level, const char * text, void *) {
    static thread_local bool error_continues = false;
    if (level == GGML_LOG_LEVEL_CONT ? !error_continues : level < GGML_LOG_LEVEL_WARN) {
        error_continues = false;
        return;
    }
    std::string_view line(text);
    while (!line.empty() && line.back() == '\n') {
        line.remove_suffix(1);
    }
    if (line.empty()) {
        return;
    }
    std::lock_guard<std::mutex> lock(listeners().mutex);
    if (level != GGML_LOG_LEVEL_WARN) {
        // The loader reports from the inside out: the first line names the cause, later ones repeat it.
        if (listeners().last_error.empty()) {
            listeners().last_error = line;
        }
        error_continues = true;
    }
    tell_all("{\"event\":\"log\",\"level\":" + std::string(level == GGML_LOG_LEVEL_WARN ? "\"warn\"" : "\"error\"") +
             ",\"text\":" + json_string(line) + "}");
}

// An assertion of llama.cpp: the state behind it is unknown, so this thread stops for good and the readers are told.
// The process is theirs to end, with a sentence instead of a stack trace. Never returns, so ggml never aborts.
void on_llama_abort(const char * text) {
    std::string_view message(text);
    const std::string_view tree = "vendor/llama.cpp/"; // the rest of the path is the machine that built it
    const size_t at = message.find(tree);
    message.remove_prefix(at == std::string_view::npos ? 0 : at + tree.size());
    const std::string line = "{\"event\":\"fatal\",\"message\":" + json_string(message) + "}";
    for (;;) {
        // Again and again: an offer is dropped while a reader is behind, and the first that arrives ends the process.
        {
            std::lock_guard<std::mutex> lock(listeners().mutex);
            tell_all(line);
        }
        std::this_thread::sleep_for(std::chrono::seconds(1));
    }
}

void install_hooks_once() {
    static std::once_flag once;
    std::call_once(once, [] {
        common_log_set_verbosity_thold(-1); // the core's own log would go to stderr
        llama_log_set(on_llama_log, nullptr);
        ggml_set_abort_callback(on_llama_abort);
        llama_backend_init(); // a CUDA without its driver says so here
    });
}

std::string take_last_error() {
    std::lock_guard<std::mutex> lock(listeners().mutex);
    return std::move(listeners().last_error);
}

} // namespace

void take_log() {
    install_hooks_once();
}

// ------------------------------------------------------------------------------------------------ the core

namespace {

struct ThreadPoolFree {
    void operator()(ggml_threadpool * pool) const { ggml_threadpool_free(pool); }
};

StreamingSpec streaming_spec(const OpenPlan & plan) {
    const PlanStreaming & from = plan.streaming;
    StreamingSpec spec;
    for (const PlanFile & file : plan.files) {
        spec.stream.files.push_back({file.path, file.size_bytes});
    }
    spec.stream.classes = from.classes;
    spec.stream.reader = from.reader;
    spec.stream.lookahead_strides = from.lookahead_strides;
    for (uint32_t order = 0; order < from.tensors.size(); ++order) {
        const PlanStreamed & streamed = from.tensors[order];
        const PlanTensor & tensor = plan.tensors[streamed.tensor_index];
        const uint64_t stride_bytes = from.classes[streamed.class_index].stride_bytes;
        if (stride_bytes * streamed.stride_count != tensor.size_bytes) {
            throw std::runtime_error("the strides of " + tensor.name + " are not the whole tensor");
        }
        spec.tensors.push_back({tensor.name, static_cast<uint32_t>(spec.stream.strides.size()), streamed.stride_count});
        for (uint32_t i = 0; i < streamed.stride_count; ++i) {
            const auto extent = static_cast<uint32_t>(spec.stream.extents.size());
            spec.stream.extents.push_back({tensor.file_index, tensor.offset_bytes + i * stride_bytes, stride_bytes});
            spec.stream.strides.push_back({streamed.class_index, order, extent, 1});
        }
    }
    spec.prediction.experts = from.predicted_experts;
    for (const PlanRouter & router : from.routers) {
        const auto extent = [&](uint32_t index) {
            const PlanTensor & tensor = plan.tensors[index];
            return Extent{tensor.file_index, tensor.offset_bytes, tensor.size_bytes};
        };
        const RouterSpec to{router.after, router.asked, extent(router.tensor_index), extent(router.norm_index), extent(router.norm_before_index)};
        const uint64_t experts = from.tensors[router.asked.front()].stride_count;
        if (to.norm.bytes == 0 || to.norm.bytes % sizeof(float) != 0 || to.norm_before.bytes != to.norm.bytes ||
            to.norm.bytes > UINT32_MAX || to.weight.bytes != experts * to.norm.bytes) {
            throw std::runtime_error("the router " + plan.tensors[router.tensor_index].name + " is not of its experts and norms");
        }
        spec.prediction.routers.push_back(to);
    }
    spec.huge_pages = from.huge_pages;
    spec.touch_threads = from.touch_threads;
    spec.ubatch_tokens = plan.ubatch_tokens;
    spec.span_work_bytes = from.span_work_bytes;
    return spec;
}

} // namespace

struct Engine::Core {
    // In the order of construction; destroyed from the end: the context before the device, that before its threads.
    std::unique_ptr<ggml_threadpool, ThreadPoolFree> threads;
    std::unique_ptr<DelegateFactory> delegate;
    std::unique_ptr<StreamDevice> device; // null in a full-resident plan
    common_params params;                 // the routes keep a reference to it
    server_context context;
    std::unique_ptr<server_routes> routes;
    std::map<std::string, const server_http_context::handler_t *> table;

    bool open_device(const OpenPlan & plan, const EngineSeams & seams, EventWriter & events, std::string * error);
    void make_table();
    const server_http_context::handler_t * find(const std::string & method_and_path) const {
        const auto it = table.find(method_and_path);
        return it == table.end() ? nullptr : it->second;
    }
};

// One thread pool for llama.cpp and for the delegate: two that spin would starve each other and the readers.
bool Engine::Core::open_device(const OpenPlan & plan, const EngineSeams & seams, EventWriter & events,
                               std::string * error) {
    ggml_threadpool_params tp = ggml_threadpool_params_default(
        static_cast<int>(std::max(plan.decode_threads, plan.prefill_threads)));
    tp.poll = plan.poll_percent;
    threads.reset(ggml_threadpool_new(&tp));
    if (!threads) {
        *error = "the system has no threads left for computing";
        return false;
    }
    delegate = seams.make_delegate ? seams.make_delegate(threads.get()) : make_cpu_delegate(threads.get());
    StreamingSpec spec = streaming_spec(plan);
    spec.wrap_source = seams.wrap_source;
    spec.trace.path = plan.streaming.trace_path;
    spec.trace.header = plan.streaming.trace_header;
    spec.trace.on_failure = [&events](const std::string & sentence) {
        events.line("{\"event\":\"warning\",\"text\":" + json_string(sentence) + "}");
    };
    device = StreamDevice::open(std::move(spec), *delegate, error);
    if (!device) {
        return false;
    }
    for (const std::string & pattern : device->name_patterns()) {
        params.tensor_buft_overrides.push_back({pattern.c_str(), device->buffer_type()});
    }
    params.tensor_buft_overrides.push_back({nullptr, nullptr});
    return true;
}

void Engine::Core::make_table() {
    server_routes & r = *routes;
    table = {
        {"GET /metrics", &r.get_metrics},
        {"GET /props", &r.get_props},
        {"GET /slots", &r.get_slots},
        {"GET /v1/models", &r.get_models},
        {"POST /apply-template", &r.post_apply_template},
        {"POST /completion", &r.post_completions},
        {"POST /detokenize", &r.post_detokenize},
        {"POST /embeddings", &r.post_embeddings},
        {"POST /infill", &r.post_infill},
        {"POST /slots", &r.post_slots},
        {"POST /tokenize", &r.post_tokenize},
        {"POST /v1/chat/completions", &r.post_chat_completions},
        {"POST /v1/completions", &r.post_completions_oai},
        {"POST /v1/embeddings", &r.post_embeddings_oai},
        {"POST /v1/messages", &r.post_anthropic_messages},
        {"POST /v1/messages/count_tokens", &r.post_anthropic_count_tokens},
        {"POST /v1/responses", &r.post_responses_oai},
    };
}

namespace {

void set_speculation(common_params & p, const PlanSpeculation & s) {
    p.speculative.types.clear();
    if (s.from_context) { // in its place speculation.cpp puts our own rule
        p.speculative.types.push_back(COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE);
        p.speculative.ngram_simple.size_n = static_cast<uint16_t>(s.rule.least_match);
        p.speculative.ngram_simple.size_m = static_cast<uint16_t>(s.max_tokens);
    }
    if (s.from_mtp) {
        p.speculative.types.push_back(COMMON_SPECULATIVE_TYPE_DRAFT_MTP);
    }
    if (!s.draft_path.empty()) {
        p.speculative.types.push_back(COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE);
        p.speculative.draft.mparams.path = s.draft_path;
    }
    if (s.from_mtp || !s.draft_path.empty()) {
        p.speculative.draft.n_max = static_cast<int32_t>(s.max_tokens);
        p.speculative.draft.p_min = static_cast<float>(s.draft_probability);
        p.speculative.draft.cpuparams = p.cpuparams;
        p.speculative.draft.cpuparams_batch = p.cpuparams_batch;
        p.speculative.draft.n_gpu_layers = 0; // the plan gives it memory of the processor's side
        p.speculative.draft.cache_type_k = p.cache_type_k;
        p.speculative.draft.cache_type_v = p.cache_type_v;
        p.speculative.draft.backend_sampling = false;
    }
}

common_params params_of(const OpenPlan & plan) {
    common_params p;
    p.model.path = plan.files.front().path;
    p.model_alias = {plan.model_name};
    p.n_parallel = static_cast<int32_t>(plan.slot_count);
    p.n_ctx = static_cast<int32_t>(plan.context_tokens * plan.slot_count);
    p.n_batch = static_cast<int32_t>(plan.batch_tokens);
    p.n_ubatch = static_cast<int32_t>(plan.ubatch_tokens);
    p.cpuparams.n_threads = static_cast<int>(plan.decode_threads);
    p.cpuparams_batch.n_threads = static_cast<int>(plan.prefill_threads);
    p.cpuparams.poll = plan.poll_percent;
    p.cpuparams_batch.poll = plan.poll_percent;
    p.n_gpu_layers = static_cast<int32_t>(plan.gpu_layers);
    p.cache_type_k = kv_type(plan.kv_type_k);
    p.cache_type_v = kv_type(plan.kv_type_v);
    p.embedding = plan.embeddings;
    p.no_extra_bufts = !plan.repack;
    p.load_mode = plan.load_mode == LoadMode::Mmap     ? LLAMA_LOAD_MODE_MMAP
                  : plan.load_mode == LoadMode::Direct ? LLAMA_LOAD_MODE_DIRECT_IO
                                                       : LLAMA_LOAD_MODE_NONE;
    if (plan.speculation.max_tokens > 0) {
        set_speculation(p, plan.speculation);
    }
    p.ctx_shift = plan.context_shift; // the core turns it off itself where the model's cache cannot
    p.mmproj.path = plan.projector_path;
    p.mmproj_use_gpu = plan.gpu_layers > 0;
    p.slot_save_path = plan.slot_folder; // the core refuses to save and restore where it is empty
    // The rest is the contract, not policy: nothing the core does on its own may allocate, sleep, fetch or guess.
    p.fit_params = false;
    p.warmup = false;
    p.check_tensors = false;
    p.cache_ram_mib = 0;
    p.cache_idle_slots = false;
    p.n_ctx_checkpoints = 0;
    p.sleep_idle_seconds = -1;
    p.sse_ping_interval = -1;
    p.endpoint_slots = true;
    p.endpoint_metrics = true;
    p.offline = true;
    return p;
}

// {"contextTokens":..,"slotCount":..,"vocabTokens":..,"parameters":..,"hasChatTemplate":..,"canShift":..,
//  "memory":[{...}]}
std::string ready_info(const server_context & context, const OpenPlan & plan) {
    const server_context_meta meta = context.get_meta();
    llama_context * lctx = context.get_llama_context();
    std::string memory;
    for (const auto & [buft, bytes] : llama_get_memory_breakdown(lctx)) {
        memory += memory.empty() ? "" : ",";
        memory += "{\"buffer\":" + json_string(ggml_backend_buft_name(buft)) +
                  ",\"weightBytes\":" + std::to_string(bytes.model) + ",\"kvBytes\":" + std::to_string(bytes.context) +
                  ",\"computeBytes\":" + std::to_string(bytes.compute) + "}";
    }
    const bool can_shift = plan.context_shift && plan.projector_path.empty() &&
                           llama_memory_can_shift(llama_get_memory(lctx));
    const char * chat_template = llama_model_chat_template(llama_get_model(lctx), nullptr);
    return "{\"contextTokens\":" + std::to_string(meta.slot_n_ctx) +
           ",\"slotCount\":" + std::to_string(llama_n_seq_max(lctx)) +
           ",\"vocabTokens\":" + std::to_string(meta.model_vocab_n_tokens) +
           ",\"parameters\":" + std::to_string(meta.model_n_params) +
           ",\"hasChatTemplate\":" + (chat_template != nullptr ? "true" : "false") +
           ",\"canShift\":" + (can_shift ? "true" : "false") + ",\"memory\":[" + memory + "]}";
}

} // namespace

// ------------------------------------------------------------------------------------------------ a request

struct Engine::Request {
    Request(std::string r, std::string b, int fd) : route(std::move(r)), body(std::move(b)), events(fd) {}

    const std::string route; // "POST /v1/chat/completions"
    std::string body;
    EventWriter events;
    std::atomic<bool> stopped{false}; // sticky: the core asserts on a should_stop that goes back

    bool error(int status, const std::string & error_json) {
        return events.line("{\"event\":\"error\",\"status\":" + std::to_string(status) + ",\"error\":" + error_json + "}");
    }
    bool error(int status, const char * type, std::string_view message) {
        return error(status, "{\"message\":" + json_string(message) + ",\"type\":" + json_string(type) + "}");
    }
};

namespace {

// "POST /slots?id_slot=0&action=save" -> "POST /slots" and its parameters.
std::string split_route(const std::string & route, std::map<std::string, std::string> & params) {
    const size_t question = route.find('?');
    for (size_t at = question; at != std::string::npos && at < route.size();) {
        const size_t end = std::min(route.find('&', at + 1), route.size());
        const std::string pair = route.substr(at + 1, end - at - 1);
        const size_t equals = pair.find('=');
        if (equals != std::string::npos) {
            params[pair.substr(0, equals)] = pair.substr(equals + 1);
        }
        at = end;
    }
    return route.substr(0, question);
}

// The core's stream is server-sent events; each frame becomes one line. Returns false when the answer has ended: an
// error frame ends it, and so does a reader that left.
class FrameReader {
public:
    // `explain` may put a better reason into an error's JSON.
    FrameReader(EventWriter & events, std::function<std::string(const std::string &)> explain)
        : events_(events), explain_(std::move(explain)) {}

    bool feed(const std::string & chunk) {
        pending_ += chunk;
        size_t end;
        while ((end = pending_.find("\n\n")) != std::string::npos) {
            const std::string frame = pending_.substr(0, end);
            pending_.erase(0, end + 2);
            if (!emit(frame)) {
                return false;
            }
        }
        return true;
    }

    bool failed() const { return failed_; }

private:
    bool emit(std::string_view frame) {
        std::string_view name;
        std::string_view data;
        while (!frame.empty()) {
            const size_t end = std::min(frame.find('\n'), frame.size());
            const std::string_view field = frame.substr(0, end);
            frame.remove_prefix(std::min(end + 1, frame.size()));
            if (field.substr(0, 7) == "event: ") {
                name = field.substr(7);
            } else if (field.substr(0, 6) == "data: ") {
                data = field.substr(6);
            }
        }
        if (data.empty() || data == "[DONE]") {
            return true;
        }
        if (data.substr(0, 9) == "{\"error\":" || name == "error") {
            failed_ = true;
            emit_error(std::string(data));
            return false;
        }
        std::string line = "{\"event\":\"data\",";
        if (!name.empty()) {
            line += "\"name\":" + json_string(name) + ",";
        }
        line += "\"data\":";
        line += data;
        line += "}";
        return events_.line(line);
    }

    void emit_error(const std::string & data) {
        const common_json json = common_json::parse(data);
        const common_json & error = json.contains("error") ? json.at("error") : json;
        const int status = error.value("code", 500);
        events_.line("{\"event\":\"error\",\"status\":" + std::to_string(status) +
                     ",\"error\":" + explain_(error.dump_safe()) + "}");
    }

    EventWriter & events_;
    const std::function<std::string(const std::string &)> explain_;
    std::string pending_;
    bool failed_ = false;
};

} // namespace

// The core knows of a failed pass only that it failed; the device knows why.
std::string Engine::explain(const std::string & error_json) const {
    const std::string reason = core_->device ? core_->device->last_error() : "";
    if (reason.empty() || error_json.find("Compute error.") == std::string::npos) {
        return error_json;
    }
    return "{\"message\":" + json_string(reason) + ",\"type\":\"server_error\",\"code\":500}";
}

// Counters since the engine opened, as GET /streaming gives them; null in a full-resident plan.
std::string Engine::streaming_json() const {
    if (!core_->device) {
        return "null";
    }
    const StreamCounters counters = core_->device->stream().counters();
    const BackendCounters backend = core_->device->counters();
    const ClassCounters & total = counters.total;
    const std::pair<const char *, uint64_t> fields[] = {
        {"poolBytes", core_->device->pool_bytes()},
        {"passes", backend.pass_count},
        {"ops", backend.op_count},
        {"delegateCalls", backend.delegate_calls},
        {"waves", backend.wave_count},
        {"gatheredProducts", backend.gathered_count},
        {"predictedExperts", backend.predicted_count},
        {"rightExperts", backend.right_count},
        {"hits", total.hits},
        {"lateHits", total.late_hits},
        {"misses", total.misses},
        {"stallNs", total.stall_ns},
        {"readBytes", total.read_bytes},
        {"demandReads", total.demand_reads},
        {"prefetchReads", total.prefetch_reads},
        {"droppedPrefetches", total.dropped_prefetches},
        {"unusedPrefetches", total.unused_prefetches},
        {"failedReads", total.failed_reads},
        {"evictions", total.evictions},
        {"kernelBytes", counters.reader.kernel_bytes},
        {"bounceBytes", counters.reader.bounce_bytes},
        {"readerBusyNs", counters.reader.busy_ns},
        {"backgroundReads", counters.background.read_count},
        {"fallbackFiles", counters.fallback_files},
        {"resyncs", counters.resyncs},
        {"readingNs", counters.reading_ns},
    };
    std::string json = "{";
    for (const auto & [name, value] : fields) {
        json += (json.size() > 1 ? "," : "") + json_string(name) + ":" + std::to_string(value);
    }
    std::string tensors;
    for (const WeightCounters & one : core_->device->weight_counters()) {
        tensors += (tensors.empty() ? "" : ",") + std::string("{\"asked\":") + std::to_string(one.asked_count) + ",\"late\":" +
                   std::to_string(one.late_count) + ",\"stallNs\":" + std::to_string(one.stall_ns) + "}";
    }
    return json + ",\"tensors\":[" + tensors + "]}";
}

// Since the engine opened, as GET /guesses gives them; null where nothing is guessed.
std::string Engine::guesses_json() const {
    if (plan_.speculation.max_tokens == 0) {
        return "null";
    }
    const char * const names[kGuessSources] = {"context", "draft", "mtp"};
    std::string json;
    for (uint32_t i = 0; i < kGuessSources; ++i) {
        const auto & of = guess_counters_.of[i];
        json += (json.empty() ? "{" : ",") + json_string(names[i]) + ":{\"drafted\":" + std::to_string(of.drafted.load()) +
                ",\"accepted\":" + std::to_string(of.accepted.load()) + "}";
    }
    return json + "}";
}

void Engine::serve(Request & request) {
    const std::function<bool()> should_stop = [&] {
        if (!request.stopped && (closing_ || request.events.peer_gone())) {
            request.stopped = true;
        }
        return request.stopped.load();
    };
    std::map<std::string, std::string> params;
    const std::string path = split_route(request.route, params);
    if (path == "GET /streaming" || path == "GET /guesses") {
        const std::string counters = path == "GET /guesses" ? guesses_json() : streaming_json();
        request.events.line("{\"event\":\"data\",\"data\":" + counters + "}");
        request.events.line("{\"event\":\"end\"}");
        return;
    }
    const auto * handler = core_->find(path);
    if (handler == nullptr) {
        request.error(404, "not_found_error", "the engine has no route " + path);
        return;
    }
    const server_http_req req{params, {}, path, "", std::move(request.body), {}, should_stop};
    const server_http_res_ptr res = (*handler)(req);
    if (should_stop()) {
        res->on_complete();
        return;
    }
    if (!res->is_stream()) {
        if (res->status == 200) {
            // Not every body is JSON (metrics are text); those travel as a string.
            const bool is_json = res->content_type.find("json") != std::string::npos;
            request.events.line("{\"event\":\"data\",\"data\":" + (is_json ? res->data : json_string(res->data)) + "}");
            request.events.line("{\"event\":\"end\"}");
        } else {
            const common_json body = common_json::parse(res->data);
            request.error(res->status, explain(body.at("error").dump_safe()));
        }
        res->on_complete();
        return;
    }
    FrameReader frames(request.events, [this](const std::string & error) { return explain(error); });
    bool more = true;
    while (more) {
        std::string chunk;
        more = res->next(chunk) && !should_stop();
        if (!frames.feed(chunk)) {
            request.stopped = true; // an error was sent, or nobody reads
            more = false;
        }
    }
    if (!frames.failed() && !request.stopped) {
        request.events.line("{\"event\":\"end\"}");
    }
    res->on_complete();
}

void Engine::request(std::string route, std::string body, int fd) {
    auto owned = std::make_unique<Request>(std::move(route), std::move(body), fd);
    Request * r = owned.get();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!ready_ || closing_) {
            r->error(503, "unavailable_error", closing_ ? "the model is being unloaded" : "the model is still loading");
            return;
        }
        requests_.insert(r);
        if (core_->device) {
            core_->device->interrupt(false);
        }
        changed_.notify_all();
    }
    (void) owned.release(); // its thread's from here on
    try {
        std::thread([this, r] {
            try {
                serve(*r);
            } catch (const std::invalid_argument & e) {
                r->error(400, "invalid_request_error", e.what());
            } catch (const common_json_error & e) {
                r->error(400, "invalid_request_error", e.what());
            } catch (const std::exception & e) {
                r->error(500, "server_error", e.what());
            }
            forget(r);
        }).detach();
    } catch (...) {
        forget(r);
        throw;
    }
}

// Off the list and destroyed in one step: close() and the watcher reach the writer of whatever is on the list.
void Engine::forget(Request * request) {
    std::lock_guard<std::mutex> lock(mutex_);
    requests_.erase(request);
    delete request;
    changed_.notify_all();
}

int32_t Engine::active_requests() {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int32_t>(requests_.size());
}

// ------------------------------------------------------------------------------------------------ its life

Engine::Engine(OpenPlan plan, int fd, EngineSeams seams)
    : plan_(std::move(plan)), seams_(std::move(seams)), events_(fd) {}

Engine::~Engine() = default;

std::unique_ptr<Engine> Engine::start(OpenPlan plan, int fd, std::function<void()> on_closed, EngineSeams seams) {
    install_hooks_once();
    std::unique_ptr<Engine> engine(new Engine(std::move(plan), fd, std::move(seams)));
    {
        std::lock_guard<std::mutex> lock(listeners().mutex);
        listeners().writers.insert(&engine->events_);
    }
    try {
        std::thread([e = engine.get(), on_closed = std::move(on_closed)] {
            e->run();
            on_closed();
        }).detach();
    } catch (...) {
        std::lock_guard<std::mutex> lock(listeners().mutex);
        listeners().writers.erase(&engine->events_);
        throw;
    }
    return engine;
}

void Engine::fail(const char * code, const std::string & message) {
    events_.line("{\"event\":\"error\",\"code\":" + json_string(code) + ",\"message\":" + json_string(message) + "}");
}

void Engine::run() {
    try {
        if (verify_plan() && load()) {
            loop_until_closed();
        }
    } catch (const std::exception & e) {
        fail("internal", e.what());
    }
    {
        std::lock_guard<std::mutex> lock(registry_mutex());
        core_.reset();
    }
#if defined(__GLIBC__)
    malloc_trim(0); // glibc keeps freed blocks; an unloaded model gives its memory back
#endif
    {
        std::lock_guard<std::mutex> lock(listeners().mutex);
        listeners().writers.erase(&events_);
    }
    events_.offer("{\"event\":\"closed\"}"); // the end of the stream says it too, to a reader that is far behind
    events_.shut();
}

bool Engine::verify_plan() {
    size_t next = 0;
    for (size_t f = 0; f < plan_.files.size(); ++f) {
        const std::string & path = plan_.files[f].path;
        const gguf_context_ptr gguf(gguf_init_from_file(path.c_str(), {/*no_alloc*/ true, /*ctx*/ nullptr}));
        if (!gguf) {
            fail("corrupt-model", "llama.cpp cannot read " + path + ": " + take_last_error());
            return false;
        }
        const int64_t count = gguf_get_n_tensors(gguf.get());
        for (int64_t i = 0; i < count; ++i, ++next) {
            const char * name = gguf_get_tensor_name(gguf.get(), i);
            const uint64_t offset = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), i);
            const uint64_t size = gguf_get_tensor_size(gguf.get(), i);
            const bool same = next < plan_.tensors.size() && plan_.tensors[next].name == name &&
                              plan_.tensors[next].file_index == f && plan_.tensors[next].offset_bytes == offset &&
                              plan_.tensors[next].size_bytes == size;
            if (!same) {
                fail("corrupt-model", "the plan and " + path + " disagree at tensor " + name + " (" +
                                          std::to_string(size) + " bytes at " + std::to_string(offset) +
                                          "): was the file changed since it was read?");
                return false;
            }
        }
    }
    if (next != plan_.tensors.size()) {
        fail("corrupt-model", "the plan names tensor " + plan_.tensors[next].name + ", which the model files lack");
        return false;
    }
    return true;
}

bool Engine::load() {
    std::lock_guard<std::mutex> lock(registry_mutex());
    core_ = std::make_unique<Core>();
    core_->params = params_of(plan_);
    std::string error;
    if (!plan_.streaming.tensors.empty() && !core_->open_device(plan_, seams_, events_, &error)) {
        fail("io", error);
        return false;
    }
    struct HideAtEnd {
        Core & core;
        ~HideAtEnd() {
            if (core.device) {
                core.device->hide();
            }
        }
    } const hide{*core_};
    core_->routes = std::make_unique<server_routes>(core_->params, core_->context);
    core_->context.set_state_callback([this](server_state state, json payload) {
        if (state == SERVER_STATE_LOADING && payload.contains("value")) {
            events_.offer("{\"event\":\"progress\",\"value\":" + std::to_string(payload.at("value").get<double>()) + "}");
        }
    });
    take_last_error();
    const GuessScope guessing(plan_.speculation.rule, guess_counters_);
    if (!core_->context.load_model(core_->params)) {
        const std::string device_error = core_->device ? core_->device->last_error() : "";
        const std::string reason = device_error.empty() ? take_last_error() : device_error;
        if (reason.empty() && !plan_.projector_path.empty()) { // its own log goes nowhere
            fail("unsupported-model", "llama.cpp takes the model but not with the projector " + plan_.projector_path +
                                          ": is it the mmproj file of this very model?");
            return false;
        }
        fail("engine", reason.empty() ? "llama.cpp did not load the model and gave no reason" : reason);
        return false;
    }
    if (core_->device) {
        llama_attach_threadpool(core_->context.get_llama_context(), core_->threads.get(), core_->threads.get());
        core_->device->begin_serving();
    }
    core_->routes->update_meta(core_->context);
    core_->make_table();
    return true;
}

void Engine::loop_until_closed() {
    const std::string info = ready_info(core_->context, plan_);
    // Waits for close(), then for the requests (the core answers nobody after terminate), then stops the loop.
    // start_loop marks itself running when it enters, which would undo an earlier terminate: repeat until it is out.
    std::thread closer([this] {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return closing_.load() && requests_.empty(); });
        while (!loop_left_) {
            core_->context.terminate();
            changed_.wait_for(lock, std::chrono::milliseconds(10));
        }
    });
    std::thread watcher;
    std::exception_ptr failure;
    try {
        if (core_->device) {
            watcher = std::thread([this] { watch_readers(); });
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ready_ = true;
        }
        events_.line("{\"event\":\"ready\",\"info\":" + info + "}");
        core_->context.start_loop();
    } catch (...) {
        failure = std::current_exception(); // no thread to be had, or the core threw
    }
    if (failure) {
        close(); // requests end; none is taken
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        loop_left_ = true;
        changed_.notify_all();
    }
    closer.join();
    if (watcher.joinable()) {
        watcher.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

// The core looks for readers that left only between passes, and a streamed pass may take seconds. When the last one
// has left, the pass itself is ended at its next stride.
void Engine::watch_readers() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!loop_left_) {
        if (requests_.empty()) {
            changed_.wait(lock);
            continue;
        }
        const bool all_gone = std::all_of(requests_.begin(), requests_.end(),
                                          [this](Request * r) { return closing_ || r->events.peer_gone(); });
        if (all_gone) {
            core_->device->interrupt(true);
        }
        changed_.wait_for(lock, std::chrono::milliseconds(20));
    }
}

void Engine::close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    for (Request * r : requests_) {
        r->events.shut(); // a thread that waits for a slow reader stops waiting
    }
    changed_.notify_all();
}

} // namespace hypura

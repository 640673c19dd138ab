// engine.h - one opened model: llama.cpp's server core, its threads, and the requests inside it.
//
// Owns the core (server_context and its routes), the thread it loops on, and one thread for each request in
// flight. Obeys a plan and chooses nothing itself; knows no dialect of any HTTP API beyond the route it forwards
// to. llama.cpp's own types stay in engine.cpp, so that abi.cpp compiles without them.
//
// The contract with the core, learned by running it: the core is loaded and looped on one thread; a handler
// blocks, so each request has a thread; should_stop never goes back to false; requests end before the core is
// terminated, the core before its routes, the routes before the context.
#pragma once

#include "events.h"
#include "speculation.h"
#include "stream.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

struct ggml_threadpool;

namespace hypura {

struct PlanFile {
    std::string path;
    uint64_t size_bytes = 0;
};

// One tensor as the plan's author read it; native compares it with its own reading before it loads anything.
struct PlanTensor {
    std::string name;
    uint32_t file_index = 0;
    uint64_t offset_bytes = 0; // from the start of the file
    uint64_t size_bytes = 0;
};

enum class LoadMode { Mmap, Direct, Read };

// A tensor of the plan that streams, as `stride_count` equal parts in one class of slots.
struct PlanStreamed {
    uint32_t tensor_index = 0;
    uint32_t stride_count = 0;
    uint32_t class_index = 0;
};

// The streaming part of a plan; no tensors: everything is resident and the device is never registered.
// The router of a layer whose experts are asked for before it has run; places are in PlanStreaming::tensors.
struct PlanRouter {
    uint32_t after;              // place: computed on the input of the layer before
    std::vector<uint32_t> asked; // places: the layer's experts
    uint32_t tensor_index;
    uint32_t norm_index;
    uint32_t norm_before_index;
};

struct PlanStreaming {
    std::vector<PlanStreamed> tensors; // in the order of a pass
    std::vector<ClassSpec> classes;
    ReadSpec reader{};
    uint32_t lookahead_strides = 0;
    bool huge_pages = false;
    uint32_t touch_threads = 0;
    uint64_t span_work_bytes = 0;
    uint32_t predicted_experts = 0; // for each token; 0: routers are waited for
    std::vector<PlanRouter> routers;
    std::string trace_path; // a file for a routing trace; empty: none
    std::string trace_header;
};

// What native needs of src/plan.ts's Plan, field by field. No field has a default that means anything: parse_plan
// refuses a plan that lacks one.
// Tokens that are guessed and verified in one pass; nothing is guessed where max_tokens is zero.
struct PlanSpeculation {
    uint32_t max_tokens = 0;   // guessed at once, at most
    bool from_context = false; // what followed before, in prompt and answer and in the requests before
    GuessRule rule;            // for that; all zero where nothing is guessed from it
    std::string draft_path;        // of a small model with the same vocabulary; empty: none
    bool from_mtp = false;        // the model's own layers for the tokens after the next
    double draft_probability = 0; // a draft ends before a token that the draft model holds less likely
};

struct OpenPlan {
    std::string model_name;
    std::vector<PlanFile> files;     // in shard order
    std::vector<PlanTensor> tensors; // in file order
    uint32_t context_tokens = 0;     // of each slot
    uint32_t slot_count = 0;         // requests that decode together
    uint32_t batch_tokens = 0;
    uint32_t ubatch_tokens = 0;
    uint32_t decode_threads = 0;
    uint32_t prefill_threads = 0;
    uint32_t poll_percent = 0; // how long an idle compute thread spins, 0 to 100
    uint32_t gpu_layers = 0;
    std::string kv_type_k;
    std::string kv_type_v;
    bool embeddings = false; // the model turns text into vectors; each input is one micro-batch
    bool repack = false; // weights rearranged at load for faster kernels; changes last bits
    LoadMode load_mode = LoadMode::Mmap;
    PlanStreaming streaming;
    PlanSpeculation speculation;
    bool context_shift; // a full context loses its older half; else generation ends there
    std::string projector_path; // what reads images; empty: nothing does
    std::string slot_folder; // where the core may keep the KV of slots, with its closing slash; empty: nowhere
};

class DelegateFactory; // backend.h

// What tests replace; empty members mean the real thing.
struct EngineSeams {
    std::function<std::unique_ptr<ReadSource>(ReadSource & files)> wrap_source;
    std::function<std::unique_ptr<DelegateFactory>(ggml_threadpool *)> make_delegate;
};

// Throws std::exception when `json` is not a plan.
OpenPlan parse_plan(std::string_view json);

// ggml's registry of devices has no lock, and llama.cpp walks it while it loads: one engine at a time, and whoever else
// walks it.
std::mutex & registry_mutex();

// The policy that a plan calls so. Throws std::exception when there is none.
PolicyKind policy_kind(const std::string & name);

// Facts about the build as a JSON object.
std::string build_info_json();

class Engine {
public:
    // Starts loading on a thread of its own and returns at once; `on_closed` runs on that thread as the last thing
    // that touches the engine, and may delete it. Throws std::system_error when no thread can be had.
    static std::unique_ptr<Engine> start(OpenPlan plan, int fd, std::function<void()> on_closed,
                                         EngineSeams seams = {});

    ~Engine();
    Engine(const Engine &) = delete;
    Engine & operator=(const Engine &) = delete;

    // Runs a request on a thread of its own; events go to `fd`, which is the engine's to close. Throws
    // std::system_error when no thread can be had.
    void request(std::string route, std::string body, int fd);

    // Starts the end. Does not wait.
    void close();

    int32_t active_requests();

private:
    struct Core;    // the server core and, under it, the streaming device; engine.cpp
    struct Request; // one request in flight; engine.cpp

    Engine(OpenPlan plan, int fd, EngineSeams seams);

    void run();                 // the engine's thread: load, loop, tear down
    bool verify_plan();         // (name, offset, bytes) of the plan against the files; says why not
    bool load();                // false: an error event was written
    void loop_until_closed();
    void serve(Request & request); // a request's thread
    void forget(Request * request);
    void watch_readers();          // a thread of streaming engines: ends a pass that nobody waits for
    std::string explain(const std::string & error_json) const;
    std::string streaming_json() const;
    std::string guesses_json() const;
    void fail(const char * code, const std::string & message);

    const OpenPlan plan_;
    const EngineSeams seams_;
    EventWriter events_;
    GuessCounters guess_counters_; // the core counts in them
    std::unique_ptr<Core> core_;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::set<Request *> requests_; // guarded by mutex_; each owned by its thread
    bool ready_ = false;           // guarded by mutex_; requests are taken
    bool loop_left_ = false;       // guarded by mutex_; the core's loop has returned
    std::atomic<bool> closing_{false};
};

// From now on llama.cpp logs to engines, and not to stderr.
void take_log();

} // namespace hypura

// The tasks of hy_task. All times are nanoseconds, all sizes bytes; every field is needed.
//
//   devices   {}
//             -> one chunk {"devices":[{name,description,type,totalBytes,freeBytes,isUnified}]}: what ggml can compute
//                on, without a streaming device of ours
//   copy      {threads,bufferBytes,durationNs}
//   scan      the same, only reading
//             -> one chunk {bytes,ns,threadNs: of processors, all threads together}
//   products  {threads,pollPercent,weightBytes,durationNs,cases:[{typeName,rowElements,rowCount,tokens,experts: 0 for a
//              plain product,products: at most,repacked}]}
//             -> a chunk "product" for each case {bytes,flops,products,ns,passes,isAbsent: it has no such form}; all of
//                the median pass
//   steps     {threads,pollPercent,durationNs,cases:[{kind:"attention"|"mixing"|"plain",width,heads,keyHeads,parts,steps}]}
//             -> a chunk "steps" for each case {ns,passes}, of the median pass
//   reads     {files:[{path,sizeBytes}],hugePages,retryCount,retryWaitNs,pollNs,cells:[{readBytes,skewBytes,depth,direct,
//              durationNs,seed}]}
//             -> a chunk "cell" for each cell {readCount,bytes,ns,p50Ns,p99Ns,direct,isExhausted,storageBytes: what the
//                kernel fetched, null if it does not tell}
//   scratch   {path,sizeBytes,chunkBytes,durationNs}
//             -> one chunk {bytes,direct}: that much stands in the new file; it is gone again after an error or a cancel
//   replay    {path,recordsOffset,strideBytes:[by class],tensors:[{strideCount,classIndex}],runs:[RUN]}; a RUN is
//             {kind:"verbatim"|"model"|"optimum",classes:[{slotCount,policy,kept:[stride]}],lookaheadStrides,countFrom,
//             decodeTokens,wantsPasses} or {kind:"uses",firstPass,endPass}
//             -> a chunk "run" for each, in order {cutOff,classes:[{hits,lateHits,misses,reads,evictions,askedBytes,
//                readBytes,policy}],recorded:[{hits,lateHits,misses,reads,evictions,stallUs}] or null,passes:[[tokens,
//                startUs,stallUs,readingUs,hits,lateHits,misses,askedBytes,readBytes]],decode:{passes,askedBytes,
//                readBytes}}, or {uses:[by stride]}
//   cached    {paths,drop}
//             -> one chunk {cachedBytes: of these files in the page cache, null if the system does not tell}, after
//                dropping what can be dropped if asked to
#include "tasks.h"

#include "engine.h"
#include "events.h"
#include "measure.h"
#include "products.h"
#include "replay.h"

#include "ggml-backend.h"
#include "json.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace hypura {

// What a task says. The thread that runs it is the only one that uses it.
class TaskEvents {
public:
    explicit TaskEvents(int fd) : events_(fd) {}

    bool stopped() { return events_.peer_gone(); }
    void data(const std::string & json, const char * name = nullptr) {
        const std::string named = name == nullptr ? "" : "\"name\":" + json_string(name) + ",";
        events_.line("{\"event\":\"data\"," + named + "\"data\":" + json + "}");
    }
    void error(const std::string & message) {
        events_.line("{\"event\":\"error\",\"status\":500,\"error\":{\"message\":" + json_string(message) +
                     ",\"type\":\"server_error\"}}");
    }
    void end() { events_.line("{\"event\":\"end\"}"); }

private:
    EventWriter events_;
};

namespace {

// What a task throws when it fails: the message is for people.
struct TaskError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ---------------------------------------------------------------------------------------------- fields and their bounds

struct Bounds {
    uint64_t least;
    uint64_t most;
};

constexpr Bounds any_count{0, std::numeric_limits<int64_t>::max()};
constexpr Bounds one_or_more{1, std::numeric_limits<int64_t>::max()};
constexpr Bounds some_threads{1, 512}; // GGML_MAX_N_THREADS
// A read's superset and the two pages around it stay far below what 32 bits count.
constexpr Bounds some_bytes{platform::kDirectAlign, 1ull << 30};

uint64_t whole(const common_json & o, const char * key, Bounds bounds) {
    const common_json & field = o.at(key);
    const int64_t value = field.is_number_integer() ? field.get<int64_t>() : -1;
    if (value < 0 || static_cast<uint64_t>(value) < bounds.least || static_cast<uint64_t>(value) > bounds.most) {
        throw std::runtime_error(std::string(key) + " is out of range");
    }
    return static_cast<uint64_t>(value);
}

uint32_t small(const common_json & o, const char * key, Bounds bounds) {
    return static_cast<uint32_t>(whole(o, key, {bounds.least, std::min<uint64_t>(bounds.most, UINT32_MAX)}));
}

uint64_t pages(const common_json & o, const char * key) {
    const uint64_t bytes = whole(o, key, some_bytes);
    if (bytes % platform::kDirectAlign != 0) {
        throw std::runtime_error(std::string(key) + " is no multiple of a page");
    }
    return bytes;
}

const common_json & list(const common_json & o, const char * key) {
    const common_json & field = o.at(key);
    if (!field.is_array() || field.empty()) {
        throw std::runtime_error(std::string(key) + " is no list with something in it");
    }
    return field;
}

// One flat object of numbers.
class Object {
public:
    Object & add(const char * key, const std::string & json) {
        text_ += (text_.empty() ? "" : ",") + json_string(key) + ":" + json;
        return *this;
    }
    Object & add(const char * key, uint64_t value) { return add(key, std::to_string(value)); }
    std::string done() const { return "{" + text_ + "}"; }

private:
    std::string text_;
};

const char * truth(bool value) {
    return value ? "true" : "false";
}

// ------------------------------------------------------------------------------------------------------------ the tasks

const char * type_name(enum ggml_backend_dev_type type) {
    switch (type) {
        case GGML_BACKEND_DEVICE_TYPE_CPU:
            return "cpu";
        case GGML_BACKEND_DEVICE_TYPE_GPU:
            return "gpu";
        case GGML_BACKEND_DEVICE_TYPE_IGPU:
            return "igpu";
        case GGML_BACKEND_DEVICE_TYPE_ACCEL:
            return "accel";
        case GGML_BACKEND_DEVICE_TYPE_META:
            return nullptr; // other devices under one name
    }
    return nullptr;
}

// One without a device is a GPU's, too: the processor's kernels and BLAS always have one.
bool is_for_gpus(ggml_backend_reg_t backend) {
    if (ggml_backend_reg_dev_count(backend) == 0) {
        return true;
    }
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(ggml_backend_reg_dev_get(backend, 0));
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

TaskBody devices_task(const common_json &) {
    return [](TaskEvents & events) {
        take_log(); // the first look at the devices makes them, and what is missing is logged
        // A streaming device of ours is registered only while an engine loads, under this lock: it is never seen here.
        std::lock_guard<std::mutex> lock(registry_mutex());
        std::string list;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t device = ggml_backend_dev_get(i);
            ggml_backend_dev_props props{};
            ggml_backend_dev_get_props(device, &props);
            const char * type = type_name(props.type);
            if (type == nullptr) {
                continue;
            }
            // A GPU that computes on memory of the host where it stands (Metal) shares it.
            const bool unified = props.type != GGML_BACKEND_DEVICE_TYPE_GPU || props.caps.buffer_from_host_ptr;
            list += (list.empty() ? "" : ",") + Object()
                                                    .add("name", json_string(props.name))
                                                    .add("description", json_string(props.description))
                                                    .add("type", json_string(type))
                                                    .add("totalBytes", props.memory_total)
                                                    .add("freeBytes", props.memory_free)
                                                    .add("isUnified", truth(unified))
                                                    .done();
        }
        std::string backends;
        for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
            ggml_backend_reg_t backend = ggml_backend_reg_get(i);
            if (is_for_gpus(backend)) {
                backends += (backends.empty() ? "" : ",") + json_string(ggml_backend_reg_name(backend));
            }
        }
        events.data("{\"devices\":[" + list + "],\"gpuBackends\":[" + backends + "]}");
    };
}

TaskBody memory_task(const common_json & json, bool reads_only) {
    const CopySpec spec{small(json, "threads", some_threads), whole(json, "bufferBytes", one_or_more),
                        whole(json, "durationNs", any_count), reads_only};
    return [spec](TaskEvents & events) {
        CopyFigures figures;
        std::string error;
        if (!measure_copy(spec, [&] { return events.stopped(); }, &figures, &error)) {
            throw TaskError(error);
        }
        events.data(Object()
                        .add("bytes", figures.copied_bytes)
                        .add("ns", figures.wall_ns)
                        .add("threadNs", figures.thread_ns)
                        .done());
    };
}

TaskBody copy_task(const common_json & json) {
    return memory_task(json, false);
}

TaskBody scan_task(const common_json & json) {
    return memory_task(json, true);
}

ProductCase parse_product(const common_json & json) {
    ProductCase one{
        json.at("typeName").get<std::string>(),
        small(json, "rowElements", {1, 1u << 20}),
        small(json, "rowCount", {1, 1u << 20}),
        small(json, "tokens", {1, 1u << 16}),
        small(json, "experts", {0, 1u << 10}),
        small(json, "products", {1, 1u << 20}),
        json.at("repacked").get<bool>(),
    };
    if (!ProductMeasure::has_type(one.type_name)) {
        throw std::runtime_error("there are no weights of type " + one.type_name);
    }
    return one;
}

// Measures one case after the other, and tells of each, until nobody wants more.
template <typename Figures, typename Case, typename Run, typename Tell>
void measure_each(TaskEvents & events, const std::vector<Case> & cases, Run run, Tell tell) {
    const std::function<bool()> stop = [&events] { return events.stopped(); };
    std::string error;
    for (const Case & one : cases) {
        Figures figures;
        if (!run(one, stop, &figures, &error)) {
            throw TaskError(error);
        }
        if (events.stopped()) {
            return;
        }
        tell(figures);
    }
}

TaskBody products_task(const common_json & json) {
    const ProductsSpec spec{
        small(json, "threads", some_threads),
        small(json, "pollPercent", {0, 100}),
        whole(json, "weightBytes", one_or_more),
        whole(json, "durationNs", any_count),
    };
    std::vector<ProductCase> cases;
    for (const common_json & one : list(json, "cases")) {
        cases.push_back(parse_product(one));
    }
    return [spec, cases](TaskEvents & events) {
        take_log(); // rearranging is logged
        ProductMeasure measure;
        std::string error;
        if (!measure.open(spec, &error)) {
            throw TaskError(error);
        }
        const auto run = [&](const auto &... all) { return measure.run(all...); };
        measure_each<ProductFigures>(events, cases, run, [&](const ProductFigures & figures) {
            events.data(Object()
                            .add("bytes", figures.bytes)
                            .add("flops", figures.flops)
                            .add("products", figures.products)
                            .add("ns", figures.ns)
                            .add("passes", figures.passes)
                            .add("isAbsent", truth(figures.is_absent))
                            .done(),
                        "product");
        });
    };
}

StepCase parse_step(const common_json & json) {
    const std::string kind = json.at("kind").get<std::string>();
    if (kind != "attention" && kind != "mixing" && kind != "plain") {
        throw std::runtime_error("a layer has no step " + kind);
    }
    const StepCase one{
        kind == "attention" ? StepKind::kAttention : kind == "mixing" ? StepKind::kMixing : StepKind::kPlain,
        small(json, "width", {1, 1u << 20}),
        small(json, "heads", {1, 1u << 10}),
        small(json, "keyHeads", {1, 1u << 10}),
        small(json, "parts", {1, 1u << 16}),
        small(json, "steps", {1, 1u << 12}),
    };
    if (one.head_count % one.key_head_count != 0) {
        throw std::runtime_error("heads of the query are a multiple of those of the keys");
    }
    return one;
}

TaskBody steps_task(const common_json & json) {
    const ProductsSpec spec{
        small(json, "threads", some_threads),
        small(json, "pollPercent", {0, 100}),
        platform::kDirectAlign, // no weights
        whole(json, "durationNs", any_count),
    };
    std::vector<StepCase> cases;
    for (const common_json & one : list(json, "cases")) {
        cases.push_back(parse_step(one));
    }
    return [spec, cases](TaskEvents & events) {
        ProductMeasure measure;
        std::string error;
        if (!measure.open(spec, &error)) {
            throw TaskError(error);
        }
        const auto run = [&](const auto &... all) { return measure.run_steps(all...); };
        measure_each<StepFigures>(events, cases, run, [&](const StepFigures & figures) {
            events.data(Object().add("ns", figures.ns).add("passes", figures.passes).done(), "steps");
        });
    };
}

ReadCell parse_cell(const common_json & json) {
    return {static_cast<uint32_t>(pages(json, "readBytes")), small(json, "skewBytes", {0, platform::kDirectAlign - 1}),
            small(json, "depth", some_threads),              json.at("direct").get<bool>(),
            whole(json, "durationNs", any_count),            whole(json, "seed", any_count),
            json.contains("ring") && json.at("ring").get<bool>()};
}

std::string cell_json(const ReadFigures & figures) {
    return Object()
        .add("readCount", figures.read_count)
        .add("bytes", figures.delivered_bytes)
        .add("ns", figures.wall_ns)
        .add("p50Ns", figures.p50_ns)
        .add("p99Ns", figures.p99_ns)
        .add("direct", truth(figures.direct))
        .add("isExhausted", truth(figures.exhausted))
        .add("isRefused", truth(figures.refused))
        .add("storageBytes", figures.has_storage ? std::to_string(figures.storage_bytes) : "null")
        .done();
}

TaskBody reads_task(const common_json & json) {
    ReadMeasure::Options options{{}, 0, json.at("hugePages").get<bool>(), small(json, "retryCount", any_count),
                                 whole(json, "retryWaitNs", any_count), whole(json, "pollNs", one_or_more)};
    for (const common_json & file : list(json, "files")) {
        options.files.push_back({file.at("path").get<std::string>(), whole(file, "sizeBytes", any_count)});
    }
    std::vector<ReadCell> cells;
    for (const common_json & cell : list(json, "cells")) {
        cells.push_back(parse_cell(cell));
        const uint64_t slot_bytes = cells.back().read_bytes + 2 * platform::kDirectAlign;
        options.memory_bytes = std::max<uint64_t>(options.memory_bytes, cells.back().depth * slot_bytes);
    }
    return [options, cells](TaskEvents & events) {
        ReadMeasure measure;
        std::string error;
        if (!measure.open(options, &error)) {
            throw TaskError(error);
        }
        const auto run = [&](const auto &... all) { return measure.run(all...); };
        measure_each<ReadFigures>(events, cells, run, [&](const ReadFigures & figures) {
            events.data(cell_json(figures), "cell");
        });
    };
}

TaskBody scratch_task(const common_json & json) {
    const ScratchSpec spec{json.at("path").get<std::string>(), whole(json, "sizeBytes", one_or_more),
                           static_cast<uint32_t>(pages(json, "chunkBytes")), whole(json, "durationNs", any_count)};
    return [spec](TaskEvents & events) {
        ScratchFigures figures;
        std::string error;
        if (!write_scratch(spec, [&] { return events.stopped(); }, &figures, &error)) {
            throw TaskError(error);
        }
        events.data(Object().add("bytes", figures.written_bytes).add("direct", truth(figures.direct)).done());
    };
}

// ---- replay

struct ReplayRun {
    enum class Kind { kVerbatim, kModel, kOptimum, kUses } kind = Kind::kUses;
    std::vector<ReplayClass> classes;
    ReplayModel model;
    bool wants_passes = false;
    PassRange passes{0, 0};
};

struct ReplayTask {
    std::string path;
    uint64_t records_offset = 0;
    ReplayShape shape;
    std::vector<ReplayRun> runs;
};

// No model comes near; it bounds what a broken document can ask for.
constexpr uint64_t most_strides = 1ull << 26;

ReplayShape parse_shape(const common_json & json) {
    ReplayShape shape;
    for (const common_json & bytes : list(json, "strideBytes")) {
        const int64_t value = bytes.get<int64_t>();
        if (value <= 0) {
            throw std::runtime_error("strideBytes is out of range");
        }
        shape.stride_bytes.push_back(static_cast<uint64_t>(value));
    }
    uint32_t op = 0;
    for (const common_json & tensor : list(json, "tensors")) {
        const uint32_t count = small(tensor, "strideCount", {1, most_strides});
        const uint32_t index = small(tensor, "classIndex", {0, shape.stride_bytes.size() - 1});
        if (shape.class_of.size() + count > most_strides) {
            throw std::runtime_error("there are too many strides");
        }
        shape.class_of.insert(shape.class_of.end(), count, index);
        shape.op_of.insert(shape.op_of.end(), count, op++);
    }
    return shape;
}

CachePolicy parse_policy(const common_json & json, uint32_t slot_count) {
    CachePolicy policy;
    policy.kind = policy_kind(json.at("kind").get<std::string>());
    policy.half_life_tokens = json.at("halfLifeTokens").get<double>();
    // Traces from before it was a number of the plan have none.
    policy.most_pass_tokens = json.contains("mostPassTokens") ? small(json, "mostPassTokens", any_count) : 0;
    policy.stale_after_passes = small(json, "staleAfterPasses", any_count);
    policy.pinned_slots = small(json, "pinnedSlots", {0, slot_count - 1});
    policy.working_set_strides = small(json, "workingSetStrides", any_count);
    policy.guard_ring_slots = small(json, "guardRingSlots", {1, UINT32_MAX});
    if (!(policy.half_life_tokens >= 0) || std::isinf(policy.half_life_tokens)) {
        throw std::runtime_error("halfLifeTokens is out of range");
    }
    return policy;
}

// Strides of the whole trace, marked by their number within the class.
std::vector<uint8_t> parse_kept(const common_json & json, const ReplayShape & shape, uint32_t class_index) {
    std::vector<uint8_t> marks(shape.class_of.size());
    for (const common_json & stride : json) {
        marks.at(stride.get<uint64_t>()) = 1;
    }
    std::vector<uint8_t> kept;
    for (size_t i = 0; i < marks.size(); ++i) {
        if (shape.class_of[i] == class_index) {
            kept.push_back(marks[i]);
        }
    }
    return kept;
}

ReplayRun parse_run(const common_json & json, const ReplayShape & shape) {
    ReplayRun run;
    const std::string kind = json.at("kind").get<std::string>();
    if (kind == "uses") {
        run.passes = {small(json, "firstPass", any_count), small(json, "endPass", any_count)};
        return run;
    }
    if (kind != "verbatim" && kind != "model" && kind != "optimum") {
        throw std::runtime_error("there is no such replay");
    }
    run.kind = kind == "verbatim" ? ReplayRun::Kind::kVerbatim
               : kind == "model"  ? ReplayRun::Kind::kModel
                                  : ReplayRun::Kind::kOptimum;
    run.model = {small(json, "lookaheadStrides", any_count), small(json, "countFrom", any_count),
                 small(json, "decodeTokens", any_count)};
    run.wants_passes = json.at("wantsPasses").get<bool>();
    for (const common_json & one : list(json, "classes")) {
        const auto index = static_cast<uint32_t>(run.classes.size());
        ReplayClass c;
        c.slot_count = small(one, "slotCount", {1, most_strides});
        c.policy = parse_policy(one.at("policy"), c.slot_count);
        if (!one.at("kept").empty()) {
            c.kept = parse_kept(one.at("kept"), shape, index);
            const auto marked = static_cast<uint64_t>(std::count(c.kept.begin(), c.kept.end(), 1));
            if (marked >= c.slot_count && c.slot_count < c.kept.size()) {
                throw std::runtime_error("more strides are kept than there are slots");
            }
        }
        run.classes.push_back(std::move(c));
    }
    if (run.classes.size() != shape.stride_bytes.size()) {
        throw std::runtime_error("a replay has other classes than the trace");
    }
    return run;
}

const char * policy_name(PolicyKind kind) {
    switch (kind) {
        case PolicyKind::kLru:
            return "lru";
        case PolicyKind::kLfuDecay:
            return "lfu-decay";
        case PolicyKind::kLeastStale:
            return "least-stale";
        case PolicyKind::kPinnedCyclic:
            return "pinned-cyclic";
    }
    return "";
}

// A JSON list of `count` parts.
template <typename Part> std::string joined(size_t count, const Part & part) {
    std::string text = "[";
    for (size_t i = 0; i < count; ++i) {
        text += (i == 0 ? "" : ",") + part(i);
    }
    return text + "]";
}

std::string run_json(const ReplayResult & result, bool wants_passes) {
    const auto counts = [&](size_t i) {
        const ReplayCounts & c = result.classes[i];
        return Object()
            .add("hits", c.hits)
            .add("lateHits", c.late_hits)
            .add("misses", c.misses)
            .add("reads", c.reads)
            .add("evictions", c.evictions)
            .add("askedBytes", c.asked_bytes)
            .add("readBytes", c.read_bytes)
            .add("policy", i < result.effective.size() ? json_string(policy_name(result.effective[i])) : "null")
            .done();
    };
    const auto recorded = [&](size_t i) {
        const uint64_t * fields = result.recorded.data() + i * kTraceEndFields;
        return Object()
            .add("hits", fields[0])
            .add("lateHits", fields[1])
            .add("misses", fields[2])
            .add("reads", fields[3])
            .add("evictions", fields[4])
            .add("stallUs", fields[5])
            .done();
    };
    const auto pass = [&](size_t i) {
        const ReplayPass & p = result.passes[i];
        const uint64_t fields[] = {p.token_count,     p.start_us,        p.stall_us,           p.reading_us,
                                   p.counts.hits,     p.counts.late_hits, p.counts.misses,      p.counts.asked_bytes,
                                   p.counts.read_bytes};
        return joined(9, [&](size_t k) { return std::to_string(fields[k]); });
    };
    return Object()
        .add("cutOff", truth(result.cut_off))
        .add("classes", joined(result.classes.size(), counts))
        .add("recorded", result.recorded.empty() ? "null" : joined(result.recorded.size() / kTraceEndFields, recorded))
        .add("decode", Object()
                           .add("passes", result.decode.passes)
                           .add("askedBytes", result.decode.asked_bytes)
                           .add("readBytes", result.decode.read_bytes)
                           .done())
        .add("passes", joined(wants_passes ? result.passes.size() : 0, pass))
        .done();
}

std::vector<uint8_t> read_records(const ReplayTask & task) {
    std::ifstream file(task.path, std::ios::binary | std::ios::ate);
    const int64_t size = file ? static_cast<int64_t>(file.tellg()) : -1;
    const auto offset = static_cast<int64_t>(task.records_offset);
    if (size < offset || size - offset > UINT32_MAX) {
        throw TaskError("the trace " + task.path + " cannot be read: it is gone, or larger than 4 GB");
    }
    std::vector<uint8_t> records(static_cast<size_t>(size - offset));
    file.seekg(offset);
    if (!file.read(reinterpret_cast<char *>(records.data()), static_cast<std::streamsize>(records.size()))) {
        throw TaskError("the trace " + task.path + " cannot be read to its end");
    }
    return records;
}

ReplayResult replay(const ReplayTask & task, const ReplayRun & run, Span<const uint8_t> records, TaskEvents & events) {
    const auto stopped = [&] { return events.stopped(); };
    switch (run.kind) {
        case ReplayRun::Kind::kVerbatim:
            return replay_verbatim(records, task.shape, run.classes, stopped);
        case ReplayRun::Kind::kModel:
            return replay_model(records, task.shape, run.classes, run.model, stopped);
        default:
            return replay_optimum(records, task.shape, run.classes, run.model, stopped);
    }
}

TaskBody replay_task(const common_json & json) {
    ReplayTask task{json.at("path").get<std::string>(), whole(json, "recordsOffset", any_count), parse_shape(json), {}};
    for (const common_json & run : list(json, "runs")) {
        task.runs.push_back(parse_run(run, task.shape));
    }
    return [task = std::move(task)](TaskEvents & events) {
        const std::vector<uint8_t> bytes = read_records(task);
        const Span<const uint8_t> records{bytes.data(), static_cast<uint32_t>(bytes.size())};
        for (const ReplayRun & run : task.runs) {
            if (events.stopped()) {
                return;
            }
            if (run.kind == ReplayRun::Kind::kUses) {
                std::string error;
                const std::vector<uint64_t> uses = count_uses(records, task.shape, run.passes, &error);
                if (!error.empty()) {
                    throw TaskError(error);
                }
                events.data("{\"uses\":" + joined(uses.size(), [&](size_t i) { return std::to_string(uses[i]); }) + "}", "run");
                continue;
            }
            const ReplayResult result = replay(task, run, records, events);
            if (!result.error.empty() && !events.stopped()) {
                throw TaskError(result.error);
            }
            events.data(run_json(result, run.wants_passes), "run");
        }
    };
}

// ---- the page cache

TaskBody cached_task(const common_json & json) {
    std::vector<std::string> paths;
    for (const common_json & path : list(json, "paths")) {
        paths.push_back(path.get<std::string>());
    }
    const bool drop = json.at("drop").get<bool>();
    return [paths, drop](TaskEvents & events) {
        uint64_t cached_bytes = 0;
        bool told = true;
        for (const std::string & path : paths) {
            const int descriptor = platform::open_read(path.c_str(), platform::Access::kBuffered);
            if (descriptor < 0) {
                throw TaskError("the file " + path + " cannot be opened");
            }
            uint64_t bytes = 0;
            if (drop) {
                platform::flush_and_drop(descriptor);
            }
            told = platform::cached_bytes(descriptor, &bytes) && told;
            // The kernel batches what it takes off its lists; a page may need to be asked for again.
            for (int i = 0; drop && told && bytes > 0 && i < 5; ++i) {
                platform::sleep_ns(20'000'000);
                platform::flush_and_drop(descriptor);
                told = platform::cached_bytes(descriptor, &bytes);
            }
            cached_bytes += bytes;
            platform::close_file(descriptor);
        }
        events.data(Object().add("cachedBytes", told ? std::to_string(cached_bytes) : "null").done());
    };
}

struct Task {
    std::string_view name;
    TaskBody (*parse)(const common_json &);
};

constexpr Task tasks[] = {
    {"cached", cached_task}, {"copy", copy_task},   {"devices", devices_task}, {"products", products_task},
    {"reads", reads_task},   {"replay", replay_task}, {"scan", scan_task},       {"scratch", scratch_task},
    {"steps", steps_task},
};

void run_task(const TaskBody & body, TaskEvents & events) {
    try {
        body(events);
        events.end();
    } catch (const TaskError & error) {
        events.error(error.what());
    } catch (const std::bad_alloc &) {
        events.error("there is no memory left for the task");
    } catch (const std::exception & error) {
        events.error(std::string("the task failed: ") + error.what());
    }
}

} // namespace

TaskBody parse_task(std::string_view name, std::string_view json) {
    const common_json document = common_json::parse(std::string(json));
    if (!document.is_object()) {
        throw std::runtime_error("the arguments of a task are an object");
    }
    for (const Task & task : tasks) {
        if (task.name == name) {
            return task.parse(document);
        }
    }
    throw std::runtime_error("there is no such task");
}

void start_task(TaskBody body, int fd) {
    auto events = std::make_shared<TaskEvents>(fd);
    std::thread([body = std::move(body), events] { run_task(body, *events); }).detach();
}

} // namespace hypura

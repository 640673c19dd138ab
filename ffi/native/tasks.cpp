// The tasks of hy_task. All times are nanoseconds, all sizes bytes; every field is needed.
//
//   devices   {}
//             -> one chunk {"devices":[{name,description,type,totalBytes,freeBytes,isUnified}]}: what ggml can compute
//                on, without a streaming device of ours
//   copy      {threads,bufferBytes,durationNs}
//             -> one chunk {bytes,ns}
//   products  {threads,pollPercent,types,weightBytes,tensorBytes,rowElements,batchTokens,batchRows,durationNs}
//             -> a chunk "product" for each type {typeName,decodeBytes,decodeNs,decodePasses,prefillFlops,prefillNs,
//                prefillPasses}; the durations are of the median pass
//   reads     {files:[{path,sizeBytes}],hugePages,retryCount,retryWaitNs,pollNs,cells:[{readBytes,skewBytes,depth,direct,
//              durationNs,seed}]}
//             -> a chunk "opened" (from here on the files need no name), then a chunk "cell" for each cell {readCount,
//                bytes,ns,p50Ns,p99Ns,direct,isExhausted,storageBytes: what the kernel fetched, null if it does not tell}
//   scratch   {path,sizeBytes,chunkBytes,durationNs}
//             -> one chunk {bytes,direct}: that much stands in the new file; it is gone again after an error or a cancel
#include "tasks.h"

#include "engine.h"
#include "events.h"
#include "measure.h"
#include "products.h"

#include "ggml-backend.h"
#include "json.h"

#include <algorithm>
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

TaskBody devices_task(const common_json &) {
    return [](TaskEvents & events) {
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
        events.data("{\"devices\":[" + list + "]}");
    };
}

TaskBody copy_task(const common_json & json) {
    const CopySpec spec{small(json, "threads", some_threads), whole(json, "bufferBytes", one_or_more),
                        whole(json, "durationNs", any_count)};
    return [spec](TaskEvents & events) {
        CopyFigures figures;
        std::string error;
        if (!measure_copy(spec, [&] { return events.stopped(); }, &figures, &error)) {
            throw TaskError(error);
        }
        events.data(Object().add("bytes", figures.copied_bytes).add("ns", figures.wall_ns).done());
    };
}

TaskBody products_task(const common_json & json) {
    const ProductsSpec spec{
        small(json, "threads", some_threads),
        small(json, "pollPercent", {0, 100}),
        whole(json, "weightBytes", one_or_more),
        whole(json, "tensorBytes", one_or_more),
        small(json, "rowElements", {1, 1u << 20}),
        small(json, "batchTokens", {1, 1u << 16}),
        small(json, "batchRows", {1, 1u << 20}),
        whole(json, "durationNs", any_count),
    };
    std::vector<std::string> types;
    for (const common_json & type : list(json, "types")) {
        types.push_back(type.get<std::string>());
        if (!ProductMeasure::has_type(types.back())) {
            throw std::runtime_error("there are no weights of type " + types.back());
        }
    }
    return [spec, types](TaskEvents & events) {
        ProductMeasure measure;
        std::string error;
        if (!measure.open(spec, &error)) {
            throw TaskError(error);
        }
        for (const std::string & type : types) {
            ProductFigures figures;
            if (!measure.run(type, [&] { return events.stopped(); }, &figures, &error)) {
                throw TaskError(error);
            }
            if (events.stopped()) {
                return;
            }
            events.data(Object()
                            .add("typeName", json_string(type))
                            .add("decodeBytes", figures.decode_bytes)
                            .add("decodeNs", figures.decode_ns)
                            .add("decodePasses", figures.decode_passes)
                            .add("prefillFlops", figures.prefill_flops)
                            .add("prefillNs", figures.prefill_ns)
                            .add("prefillPasses", figures.prefill_passes)
                            .done(),
                        "product");
        }
    };
}

ReadCell parse_cell(const common_json & json) {
    return {static_cast<uint32_t>(pages(json, "readBytes")), small(json, "skewBytes", {0, platform::kDirectAlign - 1}),
            small(json, "depth", some_threads),              json.at("direct").get<bool>(),
            whole(json, "durationNs", any_count),            whole(json, "seed", any_count)};
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
        events.data("{}", "opened");
        for (const ReadCell & cell : cells) {
            ReadFigures figures;
            if (!measure.run(cell, [&] { return events.stopped(); }, &figures, &error)) {
                throw TaskError(error);
            }
            if (events.stopped()) {
                return;
            }
            events.data(cell_json(figures), "cell");
        }
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

struct Task {
    std::string_view name;
    TaskBody (*parse)(const common_json &);
};

constexpr Task tasks[] = {
    {"copy", copy_task},       {"devices", devices_task}, {"products", products_task},
    {"reads", reads_task},     {"scratch", scratch_task},
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

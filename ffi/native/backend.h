// backend.h - streamed weights as a ggml backend device.
//
// Owns what llama.cpp sees of streaming: an ACCEL device with a buffer type that is not host memory. The plan names
// the tensors that go there; llama.cpp's loader finds nothing to read for them, their addresses are reserved and
// inaccessible, and the scheduler hands us exactly the matrix products that use them. For each we acquire the
// strides it names, make shallow copies of the node whose weight is the pool, and let a delegate backend compute.
// Knows nothing of models, layers or names beyond the plan's list; chooses nothing. The only file of ours that may
// include ggml's internal headers is backend.cpp.
#pragma once

#include "stream.h"
#include "trace.h"

#include "ggml-backend.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct ggml_threadpool;

namespace hypura {

// A tensor that streams: strides first_stride .. first_stride + stride_count - 1 of the stream plan, in the order of
// its last used dimension (one expert each, or the whole tensor as one).
struct StreamedTensor {
    std::string name;
    uint32_t first_stride = 0;
    uint32_t stride_count = 0;
};

// The router of a layer, in the file: f32, as the norms that its input and that of the layer before went through.
struct RouterSpec {
    uint32_t after = 0;          // place in StreamingSpec::tensors: what is computed on the input of the layer before
    std::vector<uint32_t> asked; // places: the layer's own experts
    Extent weight;
    Extent norm;
    Extent norm_before;
};

// Experts that are read before their router has chosen them; none for 0 experts.
struct PredictionSpec {
    uint32_t experts = 0; // for each token
    std::vector<RouterSpec> routers;
};

struct StreamingSpec {
    StreamPlan stream;
    std::vector<StreamedTensor> tensors;
    bool huge_pages = false;
    uint32_t touch_threads = 0;
    uint32_t ubatch_tokens = 0; // no pass over a streamed op has more
    // Tests put a faulty layer between the files and the readers; empty: none.
    std::function<std::unique_ptr<ReadSource>(ReadSource & files)> wrap_source;
    // Work memory of one product over several slots grows with (slots spanned) x (token, expert) pairs; above this
    // many bytes the experts are computed one by one.
    uint64_t span_work_bytes = 0;
    PredictionSpec prediction;
    TraceWriter::Options trace; // no path: nothing is traced
};

// What computes. The pool lies in `pool_buffer_type`, which is the delegate's own.
class DelegateFactory {
public:
    virtual ~DelegateFactory() = default;
    virtual ggml_backend_t create() = 0; // a backend of its own for each context
    virtual ggml_backend_buffer_type_t pool_buffer_type() = 0;
    // Where activations of streamed ops live; the device's default buffer type.
    virtual ggml_backend_buffer_type_t activation_buffer_type() = 0;
    // The delegate's device: asked whether it can run what stands between two streamed products.
    virtual ggml_backend_dev_t device() = 0;
    virtual void set_threads(ggml_backend_t backend, int thread_count) = 0;
    // Whether the experts of a weight may lie at any distance in bytes; else only at whole blocks of its type.
    virtual bool takes_any_distance() const { return false; }
};

// llama.cpp's CPU backend, on a thread pool that the engine owns and llama.cpp shares.
std::unique_ptr<DelegateFactory> make_cpu_delegate(ggml_threadpool * threads);

// Counts of the backend itself; the stream has its own.
struct BackendCounters {
    uint64_t pass_count = 0;
    uint64_t op_count = 0;          // streamed products computed
    uint64_t delegate_calls = 0;    // graphs handed to the delegate
    uint64_t wave_count = 0;        // begins beyond the first of an op
    uint64_t gathered_count = 0; // products on some experts of an op, the others not being there yet
    uint64_t predicted_count = 0; // experts that a layer was expected to choose
    uint64_t right_count = 0;     // of those, the ones that it chose
};

// Of one streamed tensor.
struct WeightCounters {
    uint64_t asked_count; // strides that products asked for
    uint64_t late_count;  // of those, not ready when asked for
    uint64_t stall_ns;
};

class StreamDevice {
public:
    // Opens the pool and the stream and registers the device with ggml. Null and a sentence in `error` when that
    // fails. Registration is not thread safe in ggml: the caller serialises opening, loading and destruction of
    // engines. `delegate` and what it uses outlive the device.
    static std::unique_ptr<StreamDevice> open(StreamingSpec spec, DelegateFactory & delegate, std::string * error);

    // No model or context that saw the device may be alive.
    ~StreamDevice();
    StreamDevice(const StreamDevice &) = delete;
    StreamDevice & operator=(const StreamDevice &) = delete;

    // Takes the device off ggml's registry, where open() put it: llama.cpp gives every context that is made every ACCEL
    // device that is registered, so it is there only while its own model loads. Contexts that have it keep it.
    // Idempotent; the caller serialises it with open().
    void hide();

    // For llama_model_params::tensor_buft_overrides: regular expressions that match the streamed names and no other.
    const std::vector<std::string> & name_patterns() const;
    ggml_backend_buffer_type_t buffer_type();

    // Until then passes compute nothing and read nothing: while llama.cpp's server core loads it tries the context
    // with two tokens and throws the result away, which would cost a pass over the file.
    void begin_serving();

    Stream & stream();
    uint64_t pool_bytes() const;
    BackendCounters counters() const;
    std::vector<WeightCounters> weight_counters() const; // in the order of the plan

    // While on, passes end with GGML_STATUS_FAILED at the next stride. From any thread.
    void interrupt(bool on);
    // The sentence of the error that ended the last failed pass; empty when none did.
    std::string last_error();

    struct Impl;

private:
    explicit StreamDevice(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

} // namespace hypura

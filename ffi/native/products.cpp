// See products.h.
#include "products.h"

#include "platform.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace hypura {

namespace {

struct ThreadPoolFree {
    void operator()(ggml_threadpool * pool) const { ggml_threadpool_free(pool); }
};

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) > 0 && ggml_type_name(type) != nullptr && name == ggml_type_name(type)) {
            return type;
        }
    }
    return GGML_TYPE_COUNT;
}

// Numbers as weights have them: some spread around zero, the same in every run.
std::vector<float> some_floats(size_t count) {
    std::vector<float> floats(count);
    for (size_t i = 0; i < count; ++i) {
        floats[i] = 0.05f * std::sin(static_cast<float>(i) * 1.7f + static_cast<float>(i % 977));
    }
    return floats;
}

uint64_t median(std::vector<uint64_t> & values) {
    std::sort(values.begin(), values.end());
    return values[(values.size() - 1) / 2];
}

} // namespace

struct ProductMeasure::Impl {
    ProductsSpec spec{};
    platform::Memory weights;
    std::unique_ptr<ggml_threadpool, ThreadPoolFree> threads;
    ggml_backend_ptr backend;
    ggml_backend_buffer_ptr buffer; // over `weights`

    ~Impl() {
        buffer.reset();
        platform::unmap_memory(&weights);
    }

    bool fill(ggml_type type);
    bool time_graph(ggml_type type, const std::vector<uint32_t> & rows, uint32_t tokens,
                    const std::function<bool()> & stop, uint64_t * median_ns, uint64_t * passes);
};

ProductMeasure::ProductMeasure() : impl_(std::make_unique<Impl>()) {}
ProductMeasure::~ProductMeasure() = default;

bool ProductMeasure::has_type(const std::string & type_name) {
    const ggml_type type = type_of(type_name);
    return type != GGML_TYPE_COUNT && (type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || ggml_is_quantized(type)) &&
           type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K; // those two are for activations
}

bool ProductMeasure::open(const ProductsSpec & spec, std::string * error) {
    impl_->spec = spec;
    ggml_threadpool_params params = ggml_threadpool_params_default(static_cast<int>(spec.thread_count));
    params.poll = spec.poll_percent;
    impl_->threads.reset(ggml_threadpool_new(&params));
    impl_->backend.reset(ggml_backend_cpu_init());
    if (!impl_->threads || !impl_->backend) {
        *error = "the system has no threads left for computing";
        return false;
    }
    ggml_backend_cpu_set_threadpool(impl_->backend.get(), impl_->threads.get());
    ggml_backend_cpu_set_n_threads(impl_->backend.get(), static_cast<int>(spec.thread_count));
    impl_->weights = platform::map_memory(spec.weight_bytes, platform::PageKind::kHuge);
    if (impl_->weights.data == nullptr) {
        *error = "the system does not give " + std::to_string(spec.weight_bytes) + " bytes for weights to multiply with";
        return false;
    }
    impl_->buffer.reset(ggml_backend_cpu_buffer_from_ptr(impl_->weights.data, impl_->weights.bytes));
    return true;
}

// A few rows of real numbers, repeated: what a product costs does not depend on them, as long as they are sound.
bool ProductMeasure::Impl::fill(ggml_type type) {
    constexpr uint64_t some_rows = 16;
    const uint64_t row_bytes = ggml_row_size(type, spec.row_elements);
    std::vector<char> rows(some_rows * row_bytes);
    const std::vector<float> floats = some_floats(some_rows * spec.row_elements);
    const std::vector<float> importance(spec.row_elements, 1.0f);
    ggml_quantize_chunk(type, floats.data(), rows.data(), 0, some_rows, spec.row_elements, importance.data());
    for (uint64_t at = 0; at < spec.weight_bytes; at += rows.size()) {
        memcpy(weights.data + at, rows.data(), std::min<uint64_t>(rows.size(), spec.weight_bytes - at));
    }
    return true;
}

// One graph of products, one for each weight of `rows` rows, on the same `tokens` columns.
bool ProductMeasure::Impl::time_graph(ggml_type type, const std::vector<uint32_t> & rows, uint32_t tokens,
                                      const std::function<bool()> & stop, uint64_t * median_ns, uint64_t * passes) {
    const size_t tensor_count = 2 * rows.size() + 8;
    const ggml_init_params params = {tensor_count * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensor_count, false),
                                     nullptr, true};
    const ggml_context_ptr context(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), tensor_count, false);
    ggml_tensor * input = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, spec.row_elements, tokens);
    std::byte * at = weights.data;
    for (const uint32_t count : rows) {
        ggml_tensor * weight = ggml_new_tensor_2d(context.get(), type, spec.row_elements, count);
        if (ggml_backend_tensor_alloc(buffer.get(), weight, at) != GGML_STATUS_SUCCESS) {
            return false;
        }
        at += ggml_nbytes(weight);
        ggml_build_forward_expand(graph, ggml_mul_mat(context.get(), weight, input));
    }
    const ggml_backend_buffer_ptr activations(ggml_backend_alloc_ctx_tensors(context.get(), backend.get()));
    if (!activations) {
        return false;
    }
    const std::vector<float> columns = some_floats(static_cast<size_t>(spec.row_elements) * tokens);
    ggml_backend_tensor_set(input, columns.data(), 0, ggml_nbytes(input));
    std::vector<uint64_t> durations_ns;
    const uint64_t start_ns = platform::now_ns();
    do {
        const uint64_t pass_start_ns = platform::now_ns();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return false;
        }
        durations_ns.push_back(platform::now_ns() - pass_start_ns);
    } while (!stop() && platform::now_ns() - start_ns < spec.duration_ns);
    if (durations_ns.size() > 1) {
        durations_ns.erase(durations_ns.begin()); // it woke the threads and made memory present
    }
    *passes = durations_ns.size();
    *median_ns = std::max<uint64_t>(1, median(durations_ns));
    return true;
}

bool ProductMeasure::run(const std::string & type_name, const std::function<bool()> & stop, ProductFigures * figures,
                         std::string * error) {
    const ProductsSpec & spec = impl_->spec;
    const ggml_type type = type_of(type_name);
    const uint64_t row_bytes = ggml_row_size(type, spec.row_elements);
    const uint64_t tensor_rows = std::max<uint64_t>(1, spec.tensor_bytes / row_bytes);
    const uint64_t tensor_count = spec.weight_bytes / (tensor_rows * row_bytes);
    if (spec.row_elements % ggml_blck_size(type) != 0 || tensor_count == 0 || spec.batch_rows * row_bytes > spec.weight_bytes) {
        *error = "the weights of the measurement do not fit its memory";
        return false;
    }
    impl_->fill(type);
    const std::vector<uint32_t> many(tensor_count, static_cast<uint32_t>(tensor_rows));
    if (!impl_->time_graph(type, many, 1, stop, &figures->decode_ns, &figures->decode_passes) ||
        (!stop() && !impl_->time_graph(type, {spec.batch_rows}, spec.batch_tokens, stop, &figures->prefill_ns, &figures->prefill_passes))) {
        *error = "llama.cpp could not compute products of type " + type_name;
        return false;
    }
    figures->decode_bytes = tensor_count * tensor_rows * row_bytes;
    figures->prefill_flops = 2ull * spec.row_elements * spec.batch_rows * spec.batch_tokens;
    return true;
}

} // namespace hypura

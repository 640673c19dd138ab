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

// Where llama.cpp keeps rearranged weights; null where this processor has no such form of anything.
ggml_backend_buffer_type_t repacking_type(ggml_backend_dev_t device) {
    const ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device);
    const auto list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
    ggml_backend_buffer_type_t * one = list == nullptr ? nullptr : list(device);
    for (; one != nullptr && *one != nullptr; ++one) {
        if (strcmp(ggml_backend_buft_name(*one), "CPU_REPACK") == 0) {
            return *one;
        }
    }
    return nullptr;
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
    ggml_type filled = GGML_TYPE_COUNT;

    ~Impl() {
        buffer.reset();
        platform::unmap_memory(&weights);
    }

    void fill(ggml_type type);
    bool place(const std::vector<ggml_tensor *> & tensors);
    bool time_graph(ggml_cgraph * graph, const std::function<bool()> & stop, uint64_t * median_ns, uint64_t * passes);
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

// A few blocks of real numbers, repeated: what a product costs does not depend on them, as long as they are sound.
void ProductMeasure::Impl::fill(ggml_type type) {
    if (type == filled) {
        return;
    }
    constexpr uint64_t some_elements = 4096; // whole blocks of every type; some are made slowly
    std::vector<char> blocks(ggml_row_size(type, some_elements));
    const std::vector<float> floats = some_floats(some_elements);
    const std::vector<float> importance(some_elements, 1.0f);
    if (type == GGML_TYPE_F32) {
        memcpy(blocks.data(), floats.data(), blocks.size());
    } else {
        ggml_quantize_chunk(type, floats.data(), blocks.data(), 0, 1, some_elements, importance.data());
    }
    for (uint64_t at = 0; at < spec.weight_bytes; at += blocks.size()) {
        memcpy(weights.data + at, blocks.data(), std::min<uint64_t>(blocks.size(), spec.weight_bytes - at));
    }
    filled = type;
}

// One behind the other in `weights`.
bool ProductMeasure::Impl::place(const std::vector<ggml_tensor *> & tensors) {
    std::byte * at = weights.data;
    for (ggml_tensor * tensor : tensors) {
        if (ggml_backend_tensor_alloc(buffer.get(), tensor, at) != GGML_STATUS_SUCCESS) {
            return false;
        }
        at += ggml_nbytes(tensor);
    }
    return true;
}

bool ProductMeasure::Impl::time_graph(ggml_cgraph * graph, const std::function<bool()> & stop, uint64_t * median_ns, uint64_t * passes) {
    std::vector<uint64_t> durations_ns;
    const uint64_t start_ns = platform::now_ns();
    do {
        const uint64_t pass_start_ns = platform::now_ns();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return false;
        }
        durations_ns.push_back(platform::now_ns() - pass_start_ns);
    } while (!stop() && (durations_ns.size() < 2 || platform::now_ns() - start_ns < spec.duration_ns));
    if (durations_ns.size() > 1) {
        durations_ns.erase(durations_ns.begin()); // it woke the threads and made memory present
    }
    *passes = durations_ns.size();
    *median_ns = std::max<uint64_t>(1, median(durations_ns));
    return true;
}

// One graph of products, each on weights of its own, all on the same columns.
bool ProductMeasure::run(const ProductCase & one, const std::function<bool()> & stop, ProductFigures * figures, std::string * error) {
    Impl & my = *impl_;
    const ggml_type type = type_of(one.type_name);
    const uint64_t matrices = std::max<uint32_t>(1, one.expert_count);
    const bool is_whole = type != GGML_TYPE_COUNT && one.row_elements % ggml_blck_size(type) == 0;
    const uint64_t tensor_bytes = is_whole ? ggml_row_size(type, one.row_elements) * one.row_count * matrices : 0;
    if (!is_whole || tensor_bytes > my.spec.weight_bytes) {
        *error = "the weights of the measurement do not fit its memory";
        return false;
    }
    const uint64_t count = std::min<uint64_t>(one.product_count, my.spec.weight_bytes / tensor_bytes);
    *error = "llama.cpp could not compute products of type " + one.type_name;
    const ggml_init_params weight_params = {count * ggml_tensor_overhead(), nullptr, true};
    const ggml_context_ptr weight_context(ggml_init(weight_params));
    std::vector<ggml_tensor *> tensors(count);
    for (ggml_tensor *& tensor : tensors) {
        tensor = one.expert_count == 0 ? ggml_new_tensor_2d(weight_context.get(), type, one.row_elements, one.row_count)
                                       : ggml_new_tensor_3d(weight_context.get(), type, one.row_elements, one.row_count, one.expert_count);
    }
    my.fill(type);
    ggml_backend_buffer_ptr rearranged;
    if (!one.repacked) {
        if (!my.place(tensors)) {
            return false;
        }
    } else {
        const ggml_backend_buffer_type_t kind = repacking_type(ggml_backend_get_device(my.backend.get()));
        rearranged.reset(kind == nullptr ? nullptr : ggml_backend_alloc_ctx_tensors_from_buft(weight_context.get(), kind));
        figures->is_absent = !rearranged;
        if (figures->is_absent) {
            return true;
        }
    }

    const ggml_init_params params = {(count + 4) * ggml_tensor_overhead() + ggml_graph_overhead_custom(2 * count + 8, false), nullptr, true};
    const ggml_context_ptr context(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), 2 * count + 8, false);
    ggml_tensor * input = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, one.row_elements, one.expert_count == 0 ? one.token_count : 1,
                                             one.expert_count == 0 ? 1 : one.token_count);
    ggml_tensor * ids = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, static_cast<int64_t>(matrices), one.token_count);
    ggml_tensor * product = nullptr;
    for (ggml_tensor * tensor : tensors) {
        product = one.expert_count == 0 ? ggml_mul_mat(context.get(), tensor, input) : ggml_mul_mat_id(context.get(), tensor, input, ids);
        ggml_build_forward_expand(graph, product);
    }
    const ggml_backend_buffer_ptr activations(ggml_backend_alloc_ctx_tensors(context.get(), my.backend.get()));
    if (!activations) {
        return false;
    }
    if (one.repacked) {
        figures->is_absent = !ggml_backend_supports_op(my.backend.get(), product);
        if (figures->is_absent) {
            return true;
        }
        // The first is rearranged, the others are its copies.
        ggml_backend_tensor_set(tensors.front(), my.weights.data, 0, tensor_bytes);
        for (size_t i = 1; i < tensors.size(); ++i) {
            memcpy(tensors[i]->data, tensors.front()->data, tensor_bytes);
        }
    }
    const std::vector<float> columns = some_floats(static_cast<size_t>(one.row_elements) * one.token_count);
    ggml_backend_tensor_set(input, columns.data(), 0, ggml_nbytes(input));
    std::vector<int32_t> all(matrices * one.token_count);
    for (size_t i = 0; i < all.size(); ++i) {
        all[i] = static_cast<int32_t>((i * 5) % matrices); // in no order of theirs
    }
    ggml_backend_tensor_set(ids, all.data(), 0, ggml_nbytes(ids));
    figures->products = count;
    figures->bytes = count * tensor_bytes;
    figures->flops = 2ull * one.row_elements * one.row_count * matrices * count * one.token_count;
    return my.time_graph(graph, stop, &figures->ns, &figures->passes);
}

namespace {

// One step on tensors of its own, as llama.cpp's graphs of models have it.
ggml_tensor * build_step(ggml_context * context, const StepCase & one) {
    const int64_t width = one.width;
    const int64_t parts = one.part_count;
    switch (one.kind) {
    case StepKind::kAttention: {
        ggml_tensor * query = ggml_new_tensor_3d(context, GGML_TYPE_F32, width, 1, one.head_count);
        ggml_tensor * keys = ggml_new_tensor_3d(context, GGML_TYPE_F16, width, parts, one.key_head_count);
        ggml_tensor * values = ggml_new_tensor_3d(context, GGML_TYPE_F16, width, parts, one.key_head_count);
        return ggml_flash_attn_ext(context, query, keys, values, nullptr, 1 / std::sqrt(static_cast<float>(width)), 0, 0);
    }
    case StepKind::kMixing: {
        ggml_tensor * answers = ggml_new_tensor_3d(context, GGML_TYPE_F32, width, parts, 1);
        ggml_tensor * shares = ggml_new_tensor_3d(context, GGML_TYPE_F32, 1, parts, 1);
        ggml_tensor * weighed = ggml_mul(context, answers, shares);
        ggml_tensor * sum = ggml_view_2d(context, weighed, width, 1, weighed->nb[2], 0);
        for (int64_t i = 1; i < parts; ++i) {
            sum = ggml_add(context, sum, ggml_view_2d(context, weighed, width, 1, weighed->nb[2], static_cast<size_t>(i) * weighed->nb[1]));
        }
        return sum;
    }
    case StepKind::kPlain: {
        ggml_tensor * row = ggml_new_tensor_1d(context, GGML_TYPE_F32, width);
        ggml_tensor * weights = ggml_new_tensor_1d(context, GGML_TYPE_F32, width);
        return ggml_add(context, ggml_mul(context, ggml_rms_norm(context, row, 1e-5f), weights), row);
    }
    }
    return nullptr;
}

} // namespace

bool ProductMeasure::run_steps(const StepCase & one, const std::function<bool()> & stop, StepFigures * figures, std::string * error) {
    *error = "llama.cpp could not compute the steps of a layer";
    const size_t tensor_count = one.step_count * (2ull * one.part_count + 8); // of mixing: a view and a sum for each part
    const ggml_init_params params = {tensor_count * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensor_count, false), nullptr, true};
    const ggml_context_ptr context(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), tensor_count, false);
    for (uint32_t i = 0; i < one.step_count; ++i) {
        ggml_build_forward_expand(graph, build_step(context.get(), one));
    }
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(context.get(), impl_->backend.get()));
    if (!buffer) {
        return false;
    }
    ggml_backend_buffer_clear(buffer.get(), 0); // zeros: every one of the sums is sound
    return impl_->time_graph(graph, stop, &figures->ns, &figures->passes);
}

} // namespace hypura

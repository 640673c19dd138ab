#include "backend.h"

#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_map>

namespace hypura {

// --------------------------------------------------------------------------------------------- delegates

namespace {

class CpuDelegate final : public DelegateFactory {
public:
    // The device is looked up once: ggml's registry has no lock, and asking it during a pass would race with the load of
    // another model.
    explicit CpuDelegate(ggml_threadpool * threads)
        : threads_(threads), device_(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {}
    ggml_backend_t create() override {
        ggml_backend_t backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_threadpool(backend, threads_);
        return backend;
    }
    ggml_backend_buffer_type_t pool_buffer_type() override { return ggml_backend_cpu_buffer_type(); }
    ggml_backend_buffer_type_t activation_buffer_type() override { return ggml_backend_cpu_buffer_type(); }
    ggml_backend_dev_t device() override { return device_; }
    void set_threads(ggml_backend_t backend, int thread_count) override {
        ggml_backend_cpu_set_n_threads(backend, thread_count);
    }

private:
    ggml_threadpool * const threads_;
    const ggml_backend_dev_t device_;
};

} // namespace

std::unique_ptr<DelegateFactory> make_cpu_delegate(ggml_threadpool * threads) {
    return std::make_unique<CpuDelegate>(threads);
}

// ------------------------------------------------------------------------------------------------ the device

namespace {

// Where a buffer type holds memory of its own: the pool of a delegate that is not the host.
class DelegatePool final : public PoolMemory {
public:
    bool open(const std::vector<ClassSpec> & classes, ggml_backend_buffer_type_t buft) {
        uint64_t bytes = 0;
        for (const ClassSpec & c : classes) {
            offsets_.push_back(bytes);
            slot_bytes_.push_back(c.slot_bytes);
            bytes += c.slot_bytes * c.slot_count;
        }
        buffer_.reset(ggml_backend_buft_alloc_buffer(buft, bytes));
        return buffer_ != nullptr;
    }
    std::byte * host(uint32_t) override { return nullptr; }
    bool upload(SlotPlace place, uint64_t offset_in_slot, Span<const std::byte> bytes) override {
        ggml_tensor t{};
        t.type = GGML_TYPE_I8;
        t.ne[0] = bytes.count;
        t.ne[1] = t.ne[2] = t.ne[3] = 1;
        t.nb[0] = 1;
        t.nb[1] = t.nb[2] = t.nb[3] = bytes.count;
        t.buffer = buffer_.get();
        t.data = address(place) + offset_in_slot;
        ggml_backend_tensor_set(&t, bytes.data, 0, bytes.count);
        return true;
    }
    std::byte * address(SlotPlace place) const {
        return static_cast<std::byte *>(ggml_backend_buffer_get_base(buffer_.get())) + offsets_[place.class_index] +
               place.slot_index * slot_bytes_[place.class_index];
    }
    ggml_backend_buffer_t buffer() const { return buffer_.get(); }
    uint64_t bytes() const { return buffer_ ? ggml_backend_buffer_get_size(buffer_.get()) : 0; }

private:
    ggml_backend_buffer_ptr buffer_;
    std::vector<uint64_t> offsets_;
    std::vector<uint64_t> slot_bytes_;
};

// What a streamed weight's `extra` points to.
struct Weight {
    const StreamedTensor * spec = nullptr;
    ggml_tensor * tensor = nullptr;
    uint32_t order = 0; // place in the plan's list, which is the order of a pass
};

std::string escaped(const std::string & text) {
    std::string out;
    for (const char c : text) {
        if (strchr(".^$|()[]{}*+?\\", c) != nullptr) {
            out.push_back('\\');
        }
        out.push_back(c);
    }
    return out;
}

// llama.cpp compiles each expression anew for each tensor, so few expressions matter: names that differ in their first
// number only share one.
std::vector<std::string> patterns_for(const std::vector<StreamedTensor> & tensors) {
    std::map<std::pair<std::string, std::string>, std::string> numbers; // (before, after) -> "1|2|3"
    std::vector<std::string> patterns;
    for (const StreamedTensor & t : tensors) {
        const size_t first = t.name.find_first_of("0123456789");
        const size_t last = std::min(t.name.find_first_not_of("0123456789", first), t.name.size());
        if (first == std::string::npos) {
            patterns.push_back("^" + escaped(t.name) + "$");
            continue;
        }
        std::string & list = numbers[{t.name.substr(0, first), t.name.substr(last)}];
        list += (list.empty() ? "" : "|") + t.name.substr(first, last - first);
    }
    for (const auto & [around, list] : numbers) {
        patterns.push_back("^" + escaped(around.first) + "(" + list + ")" + escaped(around.second) + "$");
    }
    return patterns;
}

bool is_product(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
}

size_t row_step(const ggml_tensor * t) {
    return t->ne[1] == 1 ? t->nb[2] : t->nb[1];
}

// ggml's CPU backend has a second kernel for these types, for experts with several rows; it takes a weight only whole and
// contiguous (iqp.cpp), which several slots are not. Its last bits differ, so such experts go one by one.
bool wants_contiguous_experts(ggml_type type) {
    switch (type) {
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ4_XS:
            return true;
        default:
            return false;
    }
}

// True when t's rows (dimensions 1 and 2) lie at one distance, so that they can be numbered through.
bool rows_are_even(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1 &&
           (t->ne[1] == 1 || t->ne[2] == 1 || t->nb[2] == t->nb[1] * static_cast<size_t>(t->ne[1]));
}

bool overlaps(const ggml_tensor * a, const ggml_tensor * b) {
    const auto * a0 = static_cast<const char *>(a->data);
    const auto * b0 = static_cast<const char *>(b->data);
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src->buffer : t->buffer;
}

} // namespace

struct StreamDevice::Impl {
    StreamingSpec spec;
    DelegateFactory & delegate;
    FileSource source;
    std::unique_ptr<ReadSource> wrapped_source; // of a test
    HostPool host_pool;
    DelegatePool delegate_pool;
    bool pool_is_host = true;
    ggml_backend_buffer_ptr host_buffer; // the host pool as a buffer, so that shadow weights have one
    Stream stream;
    std::vector<std::string> patterns;

    std::unordered_map<std::string, uint32_t> by_name;
    std::vector<Weight> weights;
    std::string error; // guarded by error_mutex
    std::mutex error_mutex;

    ggml_backend_reg reg{};
    ggml_backend_device device{};
    ggml_backend_buffer_type buft{};

    std::atomic<uint64_t> pass_count{0};
    std::atomic<uint64_t> op_count{0};
    std::atomic<uint64_t> delegate_calls{0};
    std::atomic<uint64_t> wave_count{0};
    std::atomic<uint64_t> gathered_count{0};
    std::atomic<bool> probing{true};
    uint32_t last_order = UINT32_MAX; // of the last streamed op; a smaller one starts a pass. One context decodes at a time

    Impl(StreamingSpec s, DelegateFactory & d) : spec(std::move(s)), delegate(d) {}

    bool open(std::string * sentence);
    void make_device();
    void set_error(std::string sentence) {
        std::lock_guard<std::mutex> lock(error_mutex);
        error = std::move(sentence);
    }
    // A product that this device computes; an empty one (a pass without outputs) reads nothing.
    bool computes(const ggml_tensor * node) const {
        return is_product(node) && owns(node->src[0]) && !ggml_is_empty(node) &&
               (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
    }
    bool owns(const ggml_tensor * t) const {
        return t != nullptr && t->buffer != nullptr && t->buffer->buft == &buft && t->view_src == nullptr;
    }
    const Weight & weight_of(const ggml_tensor * t) const { return *static_cast<const Weight *>(t->extra); }
    bool claims(const ggml_tensor * op) const;
    bool fed_by_product(const ggml_tensor * t, int depth) const;
    ggml_backend_buffer_t pool_buffer() const { return pool_is_host ? host_buffer.get() : delegate_pool.buffer(); }
    std::byte * address(const Lease & lease) const {
        return pool_is_host ? lease.data : delegate_pool.address({lease.class_index, lease.slot_index});
    }
};

bool StreamDevice::Impl::open(std::string * sentence) {
    if (!source.open(spec.stream.files, spec.stream.reader.direct, sentence)) {
        return false;
    }
    pool_is_host = ggml_backend_buft_is_host(delegate.pool_buffer_type());
    uint64_t bytes = 0;
    for (const ClassSpec & c : spec.stream.classes) {
        bytes += c.slot_bytes * c.slot_count;
    }
    const bool got = pool_is_host
                         ? host_pool.open(spec.stream.classes, {spec.huge_pages ? platform::PageKind::kHuge : platform::PageKind::kBase,
                                                                spec.touch_threads})
                         : delegate_pool.open(spec.stream.classes, delegate.pool_buffer_type());
    if (!got) {
        *sentence = "the pool for streamed weights needs " + std::to_string(bytes) +
                    " bytes, which the system does not give: lower --memory or close programs";
        return false;
    }
    if (pool_is_host) {
        host_buffer.reset(ggml_backend_cpu_buffer_from_ptr(host_pool.host(0), host_pool.bytes()));
    }
    PoolMemory * pool = pool_is_host ? static_cast<PoolMemory *>(&host_pool) : &delegate_pool;
    if (spec.wrap_source) {
        wrapped_source = spec.wrap_source(source);
    }
    if (!stream.open(spec.stream, wrapped_source ? wrapped_source.get() : &source, pool, sentence)) {
        return false;
    }
    weights.resize(spec.tensors.size());
    for (uint32_t i = 0; i < spec.tensors.size(); ++i) {
        weights[i].spec = &spec.tensors[i];
        weights[i].order = i;
        by_name[spec.tensors[i].name] = i;
    }
    patterns = patterns_for(spec.tensors);
    return true;
}

// A product on a weight of ours, or what stands between two of them: claiming it keeps a block in one split. Whether
// it is claimed changes speed only.
bool StreamDevice::Impl::claims(const ggml_tensor * op) const {
    switch (op->op) {
        case GGML_OP_NONE:
            return owns(op);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return owns(op->src[0]);
        case GGML_OP_GLU:
        case GGML_OP_ADD_ID:
        case GGML_OP_UNARY:
        case GGML_OP_CLAMP:
        case GGML_OP_SCALE:
        case GGML_OP_SQR:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
            return fed_by_product(op, 8) && ggml_backend_dev_supports_op(delegate.device(), op);
        default:
            return false;
    }
}

bool StreamDevice::Impl::fed_by_product(const ggml_tensor * t, int depth) const {
    if (t == nullptr || depth == 0) {
        return false;
    }
    if (is_product(t)) {
        return owns(t->src[0]);
    }
    return fed_by_product(t->src[0], depth - 1) ||
           (t->op == GGML_OP_GLU && fed_by_product(t->src[1], depth - 1));
}

// ------------------------------------------------------------------------------------------ one llama_context

namespace {

// A streamed product of the split at hand.
struct Op {
    ggml_tensor * node = nullptr;
    const Weight * weight = nullptr;
    uint32_t node_index = 0;
    uint32_t first_lease = 0;
    uint32_t lease_count = 0;
    bool routed = false; // MUL_MAT_ID
    uint32_t computed = 0;

    uint32_t used_count() const { return routed ? static_cast<uint32_t>(node->src[2]->ne[0]) : 1; }
    uint32_t token_count() const { return static_cast<uint32_t>(routed ? node->src[2]->ne[1] : node->ne[1]); }
};

// Bytes in the delegate's memory that live until the next flush.
class Scratch {
public:
    bool open(ggml_backend_buffer_type_t buft, uint64_t bytes) {
        buffer_.reset(ggml_backend_buft_alloc_buffer(buft, bytes));
        bytes_ = bytes;
        return buffer_ != nullptr;
    }
    // Null when full: flush and ask again.
    void * take(uint64_t bytes) {
        const uint64_t at = (used_ + 63) / 64 * 64;
        if (at + bytes > bytes_) {
            return nullptr;
        }
        used_ = at + bytes;
        return static_cast<std::byte *>(ggml_backend_buffer_get_base(buffer_.get())) + at;
    }
    void reset(uint64_t keep) { used_ = keep; }
    uint64_t used() const { return used_; }
    ggml_backend_buffer_t buffer() const { return buffer_.get(); }

private:
    ggml_backend_buffer_ptr buffer_;
    uint64_t bytes_ = 0;
    uint64_t used_ = 0;
};

struct Shape {
    int64_t columns;
    int64_t rows;
    int64_t planes;
};

// Computes splits. All arrays are sized when it is made; a pass allocates nothing of ours.
class Computer {
public:
    explicit Computer(StreamDevice::Impl & device);
    bool ok() const { return ok_; }
    ggml_status compute(ggml_cgraph * cgraph);
    void set_threads(int thread_count) {
        thread_count_ = thread_count;
        device_.delegate.set_threads(delegate_.get(), thread_count);
    }

private:
    // Nodes of one delegate graph before it is handed over.
    static constexpr uint32_t graph_nodes = 2048;

    bool run(ggml_cgraph * cgraph);
    bool collect(ggml_cgraph * cgraph, int from);
    bool add_op(ggml_tensor * node, uint32_t index);
    bool list_experts(Op & op);
    bool begin_all();
    bool run_stage(uint32_t first, uint32_t last);
    uint32_t stage_end(ggml_cgraph * cgraph, uint32_t first) const;
    bool start_ready(Op & op);
    bool next_wave(uint32_t first, uint32_t last);
    bool wait_for(uint32_t first, uint32_t last);
    bool compute_whole(Op & op, const Lease & lease);
    bool compute_span(Op & op);
    bool compute_single(Op & op, const Lease & lease);
    bool compute_gathered(Op & op, uint32_t group_from, uint32_t group_to);
    uint32_t group_end(const Op & op, uint32_t from) const;
    bool one_span(const Op & op, uint32_t from, uint32_t to, uint64_t pairs) const;
    struct SlotSpan {
        uint32_t lowest; // lease
        uint32_t slots;
    };
    SlotSpan span_of(uint32_t from, uint32_t to) const;
    class SlotTable;
    bool append(ggml_tensor * node);
    bool flush();
    bool fail(const std::string & sentence);
    void release_computed(uint32_t last);
    void release_everything();

    void add_node(ggml_tensor * node, ggml_op op, std::array<ggml_tensor *, 3> sources);
    ggml_tensor * all_rows(const ggml_tensor * t);
    ggml_tensor * reshaped(const ggml_tensor & t, Shape shape);
    ggml_tensor * shadow(const ggml_tensor & like);
    ggml_tensor * fresh(ggml_type type, Shape shape, void * data, ggml_backend_buffer_t buffer);
    ggml_tensor * shadow_weight(const Op & op, const Lease & lease, uint32_t slots);
    void * scratch(uint64_t bytes);
    bool room_for(uint32_t tensor_count);
    int32_t expert_at(const Op & op, uint32_t used, uint32_t token) const;

    StreamDevice::Impl & device_;
    ggml_backend_ptr delegate_;
    int thread_count_ = 1;
    bool ok_ = false;
    ggml_context_ptr meta_;
    ggml_cgraph * graph_ = nullptr;
    std::vector<ggml_tensor> shadows_;
    uint32_t shadows_used_ = 0;
    Scratch scratch_;
    uint64_t scratch_kept_ = 0;
    void * zero_ids_ = nullptr; // ubatch_tokens zeros: "expert 0", of a view that has one

    std::vector<Op> ops_;
    uint32_t op_count_ = 0;
    std::vector<Lease> leases_;
    std::vector<uint8_t> computed_; // by lease
    uint32_t lease_count_ = 0;
    std::vector<uint32_t> ready_;   // leases of the op at hand that are ready and not computed
    uint32_t ready_count_ = 0;
    uint32_t gather_pairs_ = 0;     // that the scratch holds at once
    std::vector<Lease> wave_;       // leases on their way into a begin
    std::vector<uint32_t> wave_at_; // where they came from
    std::vector<uint32_t> place_;   // expert -> lease of the op at hand
    std::vector<std::byte> ids_;    // the router's choice, fetched
    const ggml_tensor * ids_of_ = nullptr;
    const std::byte * ids_data_ = nullptr;
    std::vector<int32_t> pair_rows_;
    std::vector<int64_t> pair_rows64_;
    std::vector<int32_t> span_ids_;
};

Computer::Computer(StreamDevice::Impl & device) : device_(device), delegate_(device.delegate.create()) {
    uint32_t largest = 1;
    int64_t widest_in = 1;
    int64_t widest_out = 1;
    for (const Weight & w : device.weights) {
        largest = std::max(largest, w.spec->stride_count);
        if (w.tensor != nullptr) {
            widest_in = std::max(widest_in, w.tensor->ne[0]);
            widest_out = std::max(widest_out, w.tensor->ne[1]);
        }
    }
    const uint32_t tokens = device.spec.ubatch_tokens;
    const uint32_t lease_capacity = largest * 4 + 64; // gate, up, down of a block and some to spare; more go in turns
    ops_.resize(256);
    leases_.resize(lease_capacity);
    computed_.resize(lease_capacity);
    ready_.resize(lease_capacity);
    gather_pairs_ = 2 * tokens;
    wave_.resize(lease_capacity);
    wave_at_.resize(lease_capacity);
    place_.assign(largest, UINT32_MAX);
    ids_.resize(static_cast<size_t>(largest) * tokens * sizeof(int32_t) + 4096);
    pair_rows_.resize(static_cast<size_t>(tokens) * largest);
    pair_rows64_.resize(static_cast<size_t>(tokens) * largest);
    span_ids_.resize(static_cast<size_t>(tokens) * largest);
    shadows_.resize(graph_nodes * 4);
    ggml_init_params params{};
    params.mem_size = ggml_graph_overhead_custom(graph_nodes, false) + ggml_tensor_overhead();
    params.no_alloc = true;
    meta_.reset(ggml_init(params));
    graph_ = ggml_new_graph_custom(meta_.get(), graph_nodes, false);
    // Rows of one expert gathered and its products, two experts at a time; ids; indices.
    const uint64_t bytes = 2 * (static_cast<uint64_t>(tokens) * (widest_in + widest_out) * sizeof(float)) +
                           static_cast<uint64_t>(tokens) * largest * sizeof(int32_t) + tokens * 64ull + (1u << 20);
    if (!scratch_.open(device.delegate.activation_buffer_type(), bytes)) {
        return;
    }
    zero_ids_ = scratch_.take(tokens * sizeof(int32_t));
    ggml_tensor zeros{};
    zeros.type = GGML_TYPE_I32;
    zeros.ne[0] = tokens;
    zeros.ne[1] = zeros.ne[2] = zeros.ne[3] = 1;
    zeros.nb[0] = sizeof(int32_t);
    zeros.nb[1] = zeros.nb[2] = zeros.nb[3] = tokens * sizeof(int32_t);
    zeros.data = zero_ids_;
    zeros.buffer = scratch_.buffer();
    std::fill(span_ids_.begin(), span_ids_.end(), 0);
    ggml_backend_tensor_set(&zeros, span_ids_.data(), 0, tokens * sizeof(int32_t));
    scratch_kept_ = scratch_.used();
    ok_ = true;
}

ggml_status Computer::compute(ggml_cgraph * cgraph) {
    if (device_.probing) {
        return GGML_STATUS_SUCCESS; // nobody looks at the result
    }
    device_.set_error("");
    bool done = false;
    try {
        done = run(cgraph);
    } catch (const std::exception & e) {
        // ggml's CPU backend is unusable once its work memory could not be had, and cannot be freed either.
        fail(std::string("a streamed product could not be computed: ") + e.what());
        (void) delegate_.release();
        delegate_.reset(device_.delegate.create());
        set_threads(thread_count_);
    }
    if (!done) {
        ggml_graph_clear(graph_); // what was not computed yet is not wanted any more
        shadows_used_ = 0;
        scratch_.reset(scratch_kept_);
    }
    release_everything();
    if (!done) {
        device_.stream.drain(); // no read writes into the pool while nobody watches
        device_.last_order = UINT32_MAX;
    }
    return done ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

// The nodes in order: streamed products by stages, the rest as it stands. `op_count_` products are collected ahead, so
// that all reads of a block are asked for at once, in the order of use.
bool Computer::run(ggml_cgraph * cgraph) {
    const int count = ggml_graph_n_nodes(cgraph);
    uint32_t next_op = 0;
    op_count_ = 0;
    for (int i = 0; i < count;) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (!device_.computes(node)) {
            if (!append(node)) {
                return false;
            }
            ++i;
            continue;
        }
        if (next_op == op_count_) {
            if (!flush()) {
                return false;
            }
            release_everything();
            if (!collect(cgraph, i)) {
                return false;
            }
            next_op = 0;
        }
        const uint32_t end = stage_end(cgraph, next_op);
        if (!run_stage(next_op, end)) {
            return false;
        }
        i = static_cast<int>(ops_[end - 1].node_index) + 1;
        next_op = end;
    }
    return flush();
}

// The streamed products from node `from` on, as many as the arrays hold, and a begin for all their strides.
bool Computer::collect(ggml_cgraph * cgraph, int from) {
    op_count_ = 0;
    lease_count_ = 0;
    ids_of_ = nullptr;
    for (int i = from; i < ggml_graph_n_nodes(cgraph); ++i) {
        ggml_tensor * node = ggml_graph_node(cgraph, i);
        if (!device_.computes(node)) {
            continue;
        }
        const uint32_t strides = device_.weight_of(node->src[0]).spec->stride_count;
        const bool other_router = node->op == GGML_OP_MUL_MAT_ID && ids_of_ != nullptr && ids_of_ != node->src[2];
        if (op_count_ == ops_.size() || lease_count_ + strides > leases_.size() || other_router) {
            break; // the next round's
        }
        if (!add_op(node, static_cast<uint32_t>(i))) {
            return false;
        }
    }
    return begin_all();
}

bool Computer::add_op(ggml_tensor * node, uint32_t index) {
    Op & op = ops_[op_count_++];
    op = Op{};
    op.node = node;
    op.weight = &device_.weight_of(node->src[0]);
    op.node_index = index;
    op.first_lease = lease_count_;
    op.routed = node->op == GGML_OP_MUL_MAT_ID;
    if (op.weight->order <= device_.last_order || device_.last_order == UINT32_MAX) {
        device_.stream.begin_pass(op.token_count());
        device_.pass_count++;
    }
    device_.last_order = op.weight->order;
    device_.op_count++;
    if (op.routed && op.token_count() > device_.spec.ubatch_tokens) {
        return fail("a pass of " + std::to_string(op.token_count()) + " tokens is larger than the plan's ubatch");
    }
    if (op.routed) {
        return list_experts(op);
    }
    if (op.weight->spec->stride_count != 1) {
        return fail("a plain product on " + op.weight->spec->name + ", which the plan streams by experts");
    }
    leases_[lease_count_] = Lease{};
    leases_[lease_count_].stride_index = op.weight->spec->first_stride;
    leases_[lease_count_].token_count = op.token_count();
    computed_[lease_count_++] = 0;
    op.lease_count = 1;
    return true;
}

int32_t Computer::expert_at(const Op & op, uint32_t used, uint32_t token) const {
    const ggml_tensor * ids = op.node->src[2];
    int32_t id;
    memcpy(&id, ids_data_ + token * ids->nb[1] + used * ids->nb[0], sizeof id);
    return id;
}

// One lease for each expert that the router chose, in the order of first use, with its number of tokens.
bool Computer::list_experts(Op & op) {
    const ggml_tensor * ids = op.node->src[2];
    if (ids_of_ != ids) {
        if (ggml_backend_buffer_is_host(buffer_of(ids))) {
            ids_data_ = static_cast<const std::byte *>(ids->data);
        } else {
            const size_t bytes = ggml_nbytes(ids);
            if (bytes > ids_.size()) {
                ids_.resize(bytes); // a wider stride than any seen: once
            }
            ggml_backend_tensor_get(ids, ids_.data(), 0, bytes);
            ids_data_ = ids_.data();
        }
        ids_of_ = ids;
    }
    const uint32_t experts = op.weight->spec->stride_count;
    for (uint32_t t = 0; t < op.token_count(); ++t) {
        for (uint32_t u = 0; u < op.used_count(); ++u) {
            const int32_t id = expert_at(op, u, t);
            if (id < 0 || static_cast<uint32_t>(id) >= experts) {
                std::fill(place_.begin(), place_.end(), UINT32_MAX);
                return fail("the router chose expert " + std::to_string(id) + " of " + std::to_string(experts) + " in " +
                            op.weight->spec->name);
            }
            uint32_t & at = place_[static_cast<uint32_t>(id)];
            if (at != UINT32_MAX) {
                leases_[at].token_count++;
                continue;
            }
            at = lease_count_++;
            leases_[at] = Lease{};
            leases_[at].stride_index = op.weight->spec->first_stride + static_cast<uint32_t>(id);
            leases_[at].token_count = 1;
            computed_[at] = 0;
        }
    }
    op.lease_count = lease_count_ - op.first_lease;
    for (uint32_t i = op.first_lease; i < lease_count_; ++i) {
        place_[leases_[i].stride_index - op.weight->spec->first_stride] = UINT32_MAX;
    }
    return true;
}

bool Computer::begin_all() {
    const BeginResult begun = device_.stream.begin({leases_.data(), lease_count_}, Holding::kNothing);
    return begun.status != Status::kInterrupted || fail("the request was cancelled");
}

// Products that follow each other directly and do not need each other's results: whichever is ready may go first. Not
// past any other node, and not where an earlier input's memory is a later output's (the allocator reuses memory).
uint32_t Computer::stage_end(ggml_cgraph * cgraph, uint32_t first) const {
    uint32_t end = first + 1;
    for (; end < op_count_; ++end) {
        for (uint32_t i = ops_[end - 1].node_index + 1; i < ops_[end].node_index; ++i) {
            const ggml_op between = ggml_graph_node(cgraph, static_cast<int>(i))->op;
            if (between != GGML_OP_VIEW && between != GGML_OP_RESHAPE) {
                return end;
            }
        }
        const ggml_tensor * later = ops_[end].node;
        for (uint32_t i = first; i < end; ++i) {
            const ggml_tensor * earlier = ops_[i].node;
            if (overlaps(later->src[1], earlier) || overlaps(later, earlier->src[1]) || overlaps(later, earlier) ||
                (earlier->src[2] != nullptr && overlaps(later, earlier->src[2]))) {
                return end;
            }
        }
    }
    return end;
}

bool Computer::run_stage(uint32_t first, uint32_t last) {
    for (;;) {
        bool done = true;
        for (uint32_t i = first; i < last; ++i) {
            if (!start_ready(ops_[i])) {
                return false;
            }
            done = done && ops_[i].computed == ops_[i].lease_count;
        }
        if (done) {
            return true;
        }
        // Compute what is there while the rest is being read.
        if (!flush() || !next_wave(first, last) || !wait_for(first, last)) {
            return false;
        }
    }
}

// Puts the op's products on ready strides into the graph: all at once where that is possible, else what is ready in as
// few products as the scratch allows.
bool Computer::start_ready(Op & op) {
    ready_count_ = 0;
    for (uint32_t i = op.first_lease; i < op.first_lease + op.lease_count; ++i) {
        if (!computed_[i] && leases_[i].state == LeaseState::kReady) {
            ready_[ready_count_++] = i;
        }
    }
    if (ready_count_ == 0) {
        return true;
    }
    bool added = true;
    if (!op.routed) {
        added = compute_whole(op, leases_[ready_[0]]);
    } else if (ready_count_ == op.lease_count && one_span(op, 0, ready_count_, op.used_count() * op.token_count())) {
        added = compute_span(op);
    } else {
        for (uint32_t from = 0; from < ready_count_ && added;) {
            const uint32_t to = group_end(op, from);
            added = op.token_count() == 1 && to == from + 1 ? compute_single(op, leases_[ready_[from]])
                                                            : compute_gathered(op, from, to);
            from = to;
        }
    }
    for (uint32_t i = 0; i < ready_count_; ++i) {
        computed_[ready_[i]] = 1;
    }
    op.computed += ready_count_;
    return added;
}

// Ready leases from `from` on that go into one product.
uint32_t Computer::group_end(const Op & op, uint32_t from) const {
    uint32_t pairs = leases_[ready_[from]].token_count;
    uint32_t to = from + 1;
    while (to < ready_count_) {
        pairs += leases_[ready_[to]].token_count;
        if (pairs > gather_pairs_ || !one_span(op, from, to + 1, pairs)) {
            break;
        }
        ++to;
    }
    return to;
}

// Strides of the stage that found no slot: gives back what is computed and asks again.
bool Computer::next_wave(uint32_t first, uint32_t last) {
    const uint32_t from = ops_[first].first_lease;
    const uint32_t behind = ops_[last - 1].first_lease + ops_[last - 1].lease_count;
    bool waiting = false;
    bool reading = false;
    for (uint32_t i = from; i < behind; ++i) {
        waiting |= leases_[i].state == LeaseState::kWaiting;
        reading |= leases_[i].state == LeaseState::kReading;
    }
    if (!waiting) {
        return true;
    }
    device_.wave_count++;
    release_computed(last);
    for (Holding holding : {Holding::kLeases, Holding::kNothing}) {
        uint32_t count = 0;
        for (uint32_t i = from; i < behind; ++i) {
            if (leases_[i].state == LeaseState::kWaiting) {
                wave_[count] = leases_[i];
                wave_at_[count++] = i;
            }
        }
        const BeginResult begun = device_.stream.begin({wave_.data(), count}, holding);
        for (uint32_t i = 0; i < count; ++i) {
            leases_[wave_at_[i]] = wave_[i];
        }
        if (begun.status == Status::kInterrupted) {
            return fail("the request was cancelled");
        }
        if (begun.admitted_count > 0 || reading) {
            return true;
        }
        // Everything of this stage and before it is given back, so later ops hold the slots: they can wait, and then
        // nothing is held and begin must give at least one.
        device_.stream.release({leases_.data() + behind, lease_count_ - behind});
        for (uint32_t i = behind; i < lease_count_; ++i) {
            leases_[i].state = LeaseState::kWaiting;
        }
    }
    return true;
}

bool Computer::wait_for(uint32_t first, uint32_t last) {
    const uint32_t begin = ops_[first].first_lease;
    const uint32_t end = ops_[last - 1].first_lease + ops_[last - 1].lease_count;
    for (uint32_t i = begin; i < end; ++i) {
        if (leases_[i].state == LeaseState::kReady && !computed_[i]) {
            return true; // a wave brought something that was ready already
        }
    }
    switch (device_.stream.wait_some({leases_.data() + begin, end - begin})) {
        case Status::kOk:
            return true;
        case Status::kInterrupted:
            return fail("the request was cancelled");
        case Status::kFailed:
            break;
    }
    char text[512];
    device_.stream.describe_error(device_.stream.last_error(), {text, sizeof text});
    return fail(std::string("a streamed weight could not be read: ") + text);
}

// Of the ops before `last`; nothing of them may be waiting for a flush.
void Computer::release_computed(uint32_t last) {
    for (uint32_t i = 0; i < ops_[last - 1].first_lease + ops_[last - 1].lease_count; ++i) {
        if (computed_[i] && leases_[i].state == LeaseState::kReady) {
            device_.stream.release({leases_.data() + i, 1});
        }
    }
}

void Computer::release_everything() {
    device_.stream.release({leases_.data(), lease_count_});
    lease_count_ = 0;
    op_count_ = 0;
}

// ---- shadow nodes

bool Computer::fail(const std::string & sentence) {
    device_.set_error(sentence);
    return false;
}

// True when that many more shadows fit into the graph at hand, after a flush if need be.
bool Computer::room_for(uint32_t tensor_count) {
    const bool fits = shadows_used_ + tensor_count <= shadows_.size() &&
                      ggml_graph_n_nodes(graph_) + static_cast<int>(tensor_count) <= static_cast<int>(graph_nodes);
    return fits || flush();
}

ggml_tensor * Computer::shadow(const ggml_tensor & like) {
    ggml_tensor * t = &shadows_[shadows_used_++];
    *t = like;
    t->view_src = nullptr; // the address is final
    t->view_offs = 0;
    t->extra = nullptr;
    return t;
}

ggml_tensor * Computer::fresh(ggml_type type, Shape shape, void * data, ggml_backend_buffer_t buffer) {
    ggml_tensor t{};
    t.type = type;
    t.ne[0] = shape.columns;
    t.ne[1] = shape.rows;
    t.ne[2] = shape.planes;
    t.ne[3] = 1;
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = ggml_row_size(type, shape.columns);
    t.nb[2] = t.nb[1] * static_cast<size_t>(shape.rows);
    t.nb[3] = t.nb[2] * static_cast<size_t>(shape.planes);
    t.data = data;
    t.buffer = buffer;
    return shadow(t);
}

// The weight as `slots` consecutive slots of the pool, from the lease's own on.
ggml_tensor * Computer::shadow_weight(const Op & op, const Lease & lease, uint32_t slots) {
    ggml_tensor * w = shadow(*op.node->src[0]);
    const uint64_t slot_bytes = device_.spec.stream.classes[lease.class_index].slot_bytes;
    w->data = device_.address(lease);
    w->buffer = device_.pool_buffer();
    w->ne[2] = slots;
    if (slots > 1) {
        w->nb[2] = slot_bytes;
    }
    w->nb[3] = w->nb[2] * slots;
    return w;
}

void * Computer::scratch(uint64_t bytes) {
    void * p = scratch_.take(bytes);
    if (p == nullptr) {
        if (!flush()) {
            return nullptr;
        }
        p = scratch_.take(bytes);
        if (p == nullptr) {
            fail("the scratch memory of streamed products is too small for " + std::to_string(bytes) + " bytes");
        }
    }
    return p;
}

bool Computer::append(ggml_tensor * node) {
    if (!room_for(1)) {
        return false;
    }
    ggml_graph_add_node(graph_, node);
    return true;
}

bool Computer::flush() {
    if (ggml_graph_n_nodes(graph_) > 0) {
        device_.delegate_calls++;
        const ggml_status status = ggml_backend_graph_compute(delegate_.get(), graph_);
        ggml_graph_clear(graph_);
        if (status != GGML_STATUS_SUCCESS) {
            return fail("the compute backend failed with status " + std::to_string(status));
        }
    }
    shadows_used_ = 0;
    scratch_.reset(scratch_kept_);
    return true;
}

bool Computer::compute_whole(Op & op, const Lease & lease) {
    if (!room_for(2)) {
        return false;
    }
    ggml_tensor * w = shadow(*op.node->src[0]);
    w->data = device_.address(lease);
    w->buffer = device_.pool_buffer();
    ggml_tensor * m = shadow(*op.node);
    m->src[0] = w;
    ggml_graph_add_node(graph_, m);
    return true;
}

// Several slots are one weight to the delegate when their strides lie at one phase. Worth it while the kernel's tables,
// (slots spanned) x (pairs) of two 32-bit numbers, stay within the plan's bound.
bool Computer::one_span(const Op & op, uint32_t from, uint32_t to, uint64_t pairs) const {
    const Lease & one = leases_[ready_[from]];
    uint32_t low = one.slot_index;
    uint32_t high = one.slot_index;
    for (uint32_t i = from; i < to; ++i) {
        const Lease & lease = leases_[ready_[i]];
        low = std::min(low, lease.slot_index);
        high = std::max(high, lease.slot_index);
        if (lease.phase_bytes != one.phase_bytes) {
            return false;
        }
        if (to - from > 1 && lease.token_count > 1 && wants_contiguous_experts(op.node->src[0]->type)) {
            return false;
        }
    }
    const uint64_t slot_bytes = device_.spec.stream.classes[one.class_index].slot_bytes;
    return slot_bytes % ggml_type_size(op.node->src[0]->type) == 0 &&
           (high - low + 1) * pairs * 2 * sizeof(int32_t) <= device_.spec.span_work_bytes;
}

// The lowest slot of a group, and how many slots it spans.
Computer::SlotSpan Computer::span_of(uint32_t from, uint32_t to) const {
    uint32_t low = ready_[from];
    uint32_t high = 0;
    for (uint32_t i = from; i < to; ++i) {
        low = leases_[ready_[i]].slot_index < leases_[low].slot_index ? ready_[i] : low;
        high = std::max(high, leases_[ready_[i]].slot_index);
    }
    return {low, high - leases_[low].slot_index + 1};
}

// While it lives, place_ tells for each expert of the group its slot within the span.
class Computer::SlotTable {
public:
    SlotTable(Computer & c, const Op & op, uint32_t from, uint32_t to, uint32_t lowest)
        : c_(c), first_(op.weight->spec->first_stride), from_(from), to_(to) {
        for (uint32_t i = from; i < to; ++i) {
            const Lease & lease = c.leases_[c.ready_[i]];
            c.place_[lease.stride_index - first_] = lease.slot_index - lowest;
        }
    }
    ~SlotTable() {
        for (uint32_t i = from_; i < to_; ++i) {
            c_.place_[c_.leases_[c_.ready_[i]].stride_index - first_] = UINT32_MAX;
        }
    }

private:
    Computer & c_;
    const uint32_t first_;
    const uint32_t from_;
    const uint32_t to_;
};

// All experts of the op, where its rows stand.
bool Computer::compute_span(Op & op) {
    if (!room_for(3)) {
        return false;
    }
    const ggml_tensor * ids = op.node->src[2];
    const uint32_t pairs = op.used_count() * op.token_count();
    void * at = scratch(pairs * sizeof(int32_t));
    if (at == nullptr) {
        return false;
    }
    const SlotSpan span = span_of(0, ready_count_);
    {
        const SlotTable table(*this, op, 0, ready_count_, leases_[span.lowest].slot_index);
        for (uint32_t t = 0, n = 0; t < op.token_count(); ++t) {
            for (uint32_t u = 0; u < op.used_count(); ++u, ++n) {
                span_ids_[n] = static_cast<int32_t>(place_[static_cast<uint32_t>(expert_at(op, u, t))]);
            }
        }
    }
    ggml_tensor * slots = fresh(GGML_TYPE_I32, {ids->ne[0], ids->ne[1], 1}, at, scratch_.buffer());
    ggml_backend_tensor_set(slots, span_ids_.data(), 0, pairs * sizeof(int32_t));
    ggml_tensor * w = shadow_weight(op, leases_[span.lowest], span.slots);
    ggml_tensor * m = shadow(*op.node);
    m->src[0] = w;
    m->src[2] = slots;
    ggml_graph_add_node(graph_, m);
    return true;
}

// One expert, one token: its row of the result, computed where it stands.
bool Computer::compute_single(Op & op, const Lease & lease) {
    const auto expert = static_cast<int32_t>(lease.stride_index - op.weight->spec->first_stride);
    const ggml_tensor * input = op.node->src[1];
    for (uint32_t u = 0; u < op.used_count(); ++u) {
        if (expert_at(op, u, 0) != expert) {
            continue;
        }
        if (!room_for(4)) {
            return false;
        }
        ggml_tensor * w = shadow_weight(op, lease, 1);
        ggml_tensor * row = shadow(*input);
        row->data = static_cast<char *>(input->data) + (u % static_cast<uint32_t>(input->ne[1])) * input->nb[1];
        row->ne[1] = 1;
        ggml_tensor * m = shadow(*op.node);
        m->data = static_cast<char *>(op.node->data) + u * op.node->nb[1];
        m->ne[1] = 1;
        m->src[0] = w;
        m->src[1] = row;
        m->src[2] = fresh(GGML_TYPE_I32, {1, 1, 1}, zero_ids_, scratch_.buffer());
        ggml_graph_add_node(graph_, m);
    }
    return true;
}

// Some experts, all their (token, expert) pairs: rows gathered, multiplied, and scattered to their places. A row's bits
// do not depend on its neighbours: ggml takes the rows of an expert one by one, and chooses the kernel by their number,
// which is the same as in the whole product because an expert's rows are never divided.
bool Computer::compute_gathered(Op & op, uint32_t group_from, uint32_t group_to) {
    const ggml_tensor * input = op.node->src[1];
    if (!rows_are_even(input) || !rows_are_even(op.node)) {
        return fail("the rows around " + op.weight->spec->name + " lie in a way that streaming does not know");
    }
    const SlotSpan span = span_of(group_from, group_to);
    uint32_t pairs = 0;
    {
        const SlotTable table(*this, op, group_from, group_to, leases_[span.lowest].slot_index);
        for (uint32_t t = 0; t < op.token_count(); ++t) {
            for (uint32_t u = 0; u < op.used_count(); ++u) {
                const uint32_t slot = place_[static_cast<uint32_t>(expert_at(op, u, t))];
                if (slot != UINT32_MAX) {
                    span_ids_[pairs] = static_cast<int32_t>(slot);
                    pair_rows_[pairs] = static_cast<int32_t>(t * input->ne[1] + u % static_cast<uint32_t>(input->ne[1]));
                    pair_rows64_[pairs++] = static_cast<int64_t>(t) * op.node->ne[1] + u;
                }
            }
        }
    }
    const uint64_t columns = static_cast<uint64_t>(input->ne[0] + op.node->ne[0]);
    const uint64_t need = pairs * (2 * sizeof(int32_t) + sizeof(int64_t) + columns * sizeof(float)) + 5 * 64;
    auto * at = static_cast<std::byte *>(room_for(12) ? scratch(need) : nullptr);
    if (at == nullptr) {
        return false;
    }
    const auto take = [&](uint64_t bytes) { // inside the block, at multiples of 64
        std::byte * p = at;
        at += (bytes + 63) / 64 * 64;
        return p;
    };
    const auto upload = [&](ggml_type type, Shape shape, const void * data) {
        const uint64_t bytes = pairs * ggml_type_size(type);
        ggml_tensor * t = fresh(type, shape, take(bytes), scratch_.buffer());
        ggml_backend_tensor_set(t, data, 0, bytes);
        return t;
    };
    ggml_tensor * from = upload(GGML_TYPE_I32, {pairs, 1, 1}, pair_rows_.data());
    ggml_tensor * slots = upload(GGML_TYPE_I32, {1, pairs, 1}, span_ids_.data());
    ggml_tensor * to = upload(GGML_TYPE_I64, {pairs, 1, 1}, pair_rows64_.data());
    const auto floats = [&](Shape shape) {
        return fresh(GGML_TYPE_F32, shape, take(shape.columns * pairs * sizeof(float)), scratch_.buffer());
    };

    ggml_tensor * gathered = floats({input->ne[0], pairs, 1});
    add_node(gathered, GGML_OP_GET_ROWS, {all_rows(input), from, nullptr});

    ggml_tensor * product = floats({op.node->ne[0], 1, pairs});
    memcpy(product->op_params, op.node->op_params, sizeof product->op_params);
    add_node(product, GGML_OP_MUL_MAT_ID,
             {shadow_weight(op, leases_[span.lowest], span.slots), reshaped(*gathered, {input->ne[0], 1, pairs}), slots});

    ggml_tensor * all_out = all_rows(op.node);
    add_node(shadow(*all_out), GGML_OP_SET_ROWS, {reshaped(*product, {op.node->ne[0], pairs, 1}), to, all_out});
    device_.gathered_count++;
    return true;
}

void Computer::add_node(ggml_tensor * node, ggml_op op, std::array<ggml_tensor *, 3> sources) {
    node->op = op;
    node->flags |= GGML_TENSOR_FLAG_COMPUTE; // ggml skips a node without it
    std::copy(sources.begin(), sources.end(), node->src);
    ggml_graph_add_node(graph_, node);
}

// A tensor's rows (dimensions 1 and 2) numbered through; rows_are_even().
ggml_tensor * Computer::all_rows(const ggml_tensor * t) {
    ggml_tensor * rows = fresh(GGML_TYPE_F32, {t->ne[0], t->ne[1] * t->ne[2], 1}, t->data, buffer_of(t));
    rows->nb[1] = row_step(t);
    rows->nb[2] = rows->nb[3] = rows->nb[1] * static_cast<size_t>(rows->ne[1]);
    return rows;
}

// The same contiguous bytes in another shape.
ggml_tensor * Computer::reshaped(const ggml_tensor & t, Shape shape) {
    return fresh(t.type, shape, t.data, t.buffer);
}

// --------------------------------------------------------------------------------------- ggml's tables of functions

StreamDevice::Impl & impl_of(ggml_backend_dev_t dev) {
    return *static_cast<StreamDevice::Impl *>(dev->context);
}

Computer & computer_of(ggml_backend_t backend) {
    return *static_cast<Computer *>(backend->context);
}

// ---- buffer: addresses that nothing may touch

struct Reservation {
    StreamDevice::Impl & device;
    platform::Memory memory;
};

void buffer_free(ggml_backend_buffer_t buffer) {
    auto * r = static_cast<Reservation *>(buffer->context);
    platform::unmap_memory(&r->memory);
    delete r;
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return static_cast<Reservation *>(buffer->context)->memory.data;
}

// The loader asks ggml_nbytes how much to read: with no planes the answer is zero. init_backend gives the planes back.
ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    StreamDevice::Impl & device = static_cast<Reservation *>(buffer->context)->device;
    const auto found = device.by_name.find(tensor->name);
    if (found == device.by_name.end()) {
        device.set_error(std::string("llama.cpp put ") + tensor->name + " into the pool, which the plan does not stream");
        return GGML_STATUS_FAILED;
    }
    Weight & weight = device.weights[found->second];
    const uint32_t count = weight.spec->stride_count;
    const StreamPlan & plan = device.spec.stream;
    const uint64_t stride_bytes = plan.classes[plan.strides[weight.spec->first_stride].class_index].stride_bytes;
    const bool fits = count == 1 ? ggml_nbytes(tensor) == stride_bytes
                                 : tensor->ne[2] == count && tensor->nb[2] == stride_bytes && tensor->ne[3] == 1;
    if (!fits) {
        device.set_error(std::string("the plan and llama.cpp disagree on the size of ") + tensor->name);
        return GGML_STATUS_FAILED;
    }
    weight.tensor = tensor;
    tensor->extra = &weight;
    tensor->ne[3] = 0;
    return GGML_STATUS_SUCCESS;
}

// The loader writes no byte (ggml_nbytes is zero while it loads), and an op that is not ours has no business with the
// weight: the scheduler would copy it for another backend. Either is a fault and never a wrong number.
void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t, size_t size) {
    if (size > 0) {
        GGML_ABORT("%s is streamed, and %zu bytes were loaded into it", tensor->name, size);
    }
}

void buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void *, size_t, size_t) {
    GGML_ABORT("%s is streamed, and was read past the streamer", tensor->name);
}

void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t, size_t, size_t) {
    GGML_ABORT("%s is streamed, and was written to", tensor->name);
}

void buffer_clear(ggml_backend_buffer_t, uint8_t) {}

// ---- buffer type

const char * buft_name(ggml_backend_buffer_type_t) {
    return "Streamed";
}

ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    auto * r = new Reservation{impl_of(buft->device), platform::reserve_addresses(size)};
    if (r->memory.data == nullptr) {
        delete r;
        return nullptr;
    }
    ggml_backend_buffer_i iface{};
    iface.free_buffer = buffer_free;
    iface.get_base = buffer_base;
    iface.init_tensor = buffer_init_tensor;
    iface.memset_tensor = buffer_memset_tensor;
    iface.set_tensor = buffer_set_tensor;
    iface.get_tensor = buffer_get_tensor;
    iface.clear = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, r, size);
}

size_t buft_alignment(ggml_backend_buffer_type_t) {
    return platform::kDirectAlign;
}

size_t buft_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return std::max<size_t>(ggml_nbytes(tensor), platform::kDirectAlign);
}

bool buft_is_host(ggml_backend_buffer_type_t) {
    return false; // nobody may read through the address
}

// ---- backend

const char * backend_name(ggml_backend_t) {
    return "Streamed";
}

void backend_free(ggml_backend_t backend) {
    delete static_cast<Computer *>(backend->context);
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    return computer_of(backend).compute(cgraph);
}

void backend_set_threads(ggml_backend_t backend, int thread_count) {
    computer_of(backend).set_threads(thread_count);
}

// ---- device

const char * device_name(ggml_backend_dev_t) {
    return "Streamed";
}

const char * device_description(ggml_backend_dev_t) {
    return "weights streamed from the model file";
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 0;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL; // llama.cpp adds such a device to every context by itself
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    props->caps.mmap_support = true; // or llama.cpp gives up mapping for the resident tensors
}

ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    StreamDevice::Impl & device = impl_of(dev);
    for (Weight & weight : device.weights) {
        if (weight.tensor != nullptr) {
            weight.tensor->ne[3] = 1; // loading is over; idempotent, there may be more contexts
        }
    }
    auto computer = std::make_unique<Computer>(device);
    if (!computer->ok()) {
        device.set_error("no memory for the scratch of streamed products");
        return nullptr;
    }
    static const ggml_guid guid = {0x68, 0x79, 0x70, 0x75, 0x72, 0x61, 0x2d, 0x73, 0x74, 0x72, 0x65, 0x61, 0x6d, 0x2d, 0x30, 0x31};
    auto * backend = new ggml_backend{};
    backend->guid = const_cast<ggml_guid *>(&guid);
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device = dev;
    backend->context = computer.release();
    return backend;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) {
    // The delegate's, never our own: this is where activations go, and llama.cpp takes it for a home of CPU weights.
    return impl_of(dev).delegate.activation_buffer_type();
}

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    return impl_of(dev).claims(op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    StreamDevice::Impl & device = impl_of(dev);
    return buft == &device.buft || ggml_backend_dev_supports_buft(device.delegate.device(), buft);
}

const char * reg_name(ggml_backend_reg_t) {
    return "Streamed";
}

size_t reg_device_count(ggml_backend_reg_t) {
    return 1;
}

ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    return &static_cast<StreamDevice::Impl *>(reg->context)->device;
}

void ignore_abort_callback(ggml_backend_t, ggml_abort_callback, void *) {
    // The server core takes an aborted pass for a full KV cache and retries it to death; a pass ends by FAILED only.
}

void * reg_proc_address(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(backend_set_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(ignore_abort_callback);
    }
    return nullptr;
}

} // namespace

void StreamDevice::Impl::make_device() {
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface = {reg_name, reg_device_count, reg_device, reg_proc_address};
    reg.context = this;
    device.iface.get_name = device_name;
    device.iface.get_description = device_description;
    device.iface.get_memory = device_memory;
    device.iface.get_type = device_type;
    device.iface.get_props = device_props;
    device.iface.init_backend = device_init_backend;
    device.iface.get_buffer_type = device_buffer_type;
    device.iface.supports_op = device_supports_op;
    device.iface.supports_buft = device_supports_buft;
    device.reg = &reg;
    device.context = this;
    buft.iface.get_name = buft_name;
    buft.iface.alloc_buffer = buft_alloc;
    buft.iface.get_alignment = buft_alignment;
    buft.iface.get_alloc_size = buft_alloc_size;
    buft.iface.is_host = buft_is_host;
    buft.device = &device;
}

StreamDevice::StreamDevice(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::unique_ptr<StreamDevice> StreamDevice::open(StreamingSpec spec, DelegateFactory & delegate, std::string * error) {
    auto impl = std::make_unique<Impl>(std::move(spec), delegate);
    if (!impl->open(error)) {
        return nullptr;
    }
    impl->make_device();
    ggml_backend_register(&impl->reg);
    return std::unique_ptr<StreamDevice>(new StreamDevice(std::move(impl)));
}

StreamDevice::~StreamDevice() {
    impl_->stream.close();
}

void StreamDevice::hide() {
    ggml_backend_unload(&impl_->reg);
}

const std::vector<std::string> & StreamDevice::name_patterns() const {
    return impl_->patterns;
}

ggml_backend_buffer_type_t StreamDevice::buffer_type() {
    return &impl_->buft;
}

void StreamDevice::begin_serving() {
    impl_->probing = false;
}

Stream & StreamDevice::stream() {
    return impl_->stream;
}

uint64_t StreamDevice::pool_bytes() const {
    return impl_->pool_is_host ? impl_->host_pool.bytes() : impl_->delegate_pool.bytes();
}

BackendCounters StreamDevice::counters() const {
    return {impl_->pass_count, impl_->op_count, impl_->delegate_calls, impl_->wave_count, impl_->gathered_count};
}

void StreamDevice::interrupt(bool on) {
    impl_->stream.interrupt(on);
}

std::string StreamDevice::last_error() {
    std::lock_guard<std::mutex> lock(impl_->error_mutex);
    return impl_->error;
}

} // namespace hypura

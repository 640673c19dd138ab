// computer.h - what happens when llama.cpp computes a split of streamed weights.
//
// Owns, for one llama_context, the arrays of a pass: the products of a split, their leases, the shadow nodes and the
// scratch that the delegate computes in; and, shared by all contexts of a model, the state behind the device. Knows
// nothing of ggml's registry or of how a device is described (backend.cpp), and no ggml header that is internal.
#pragma once

#include "backend.h"
#include "predictor.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace hypura {

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

// What a streamed weight's `extra` points to. The counts are since the engine opened.
struct Weight {
    const StreamedTensor * spec = nullptr;
    ggml_tensor * tensor = nullptr;
    uint32_t order = 0; // place in the plan's list, which is the order of a pass
    std::atomic<uint64_t> asked_count{0}; // strides that products asked for
    std::atomic<uint64_t> late_count{0};  // of those, not ready when asked for
    std::atomic<uint64_t> stall_ns{0};
};

inline bool is_product(const ggml_tensor * node) {
    return node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
}

// What the device and the computers of its contexts share.
struct StreamState {
    StreamingSpec spec;
    DelegateFactory & delegate;
    FileSource source;
    std::unique_ptr<ReadSource> wrapped_source; // of a test
    HostPool host_pool;
    DelegatePool delegate_pool;
    bool pool_is_host = true;
    ggml_backend_buffer_ptr host_buffer; // the host pool as a buffer, so that shadow weights have one
    TraceWriter trace; // before the stream, which writes into it to its end
    Stream stream;
    ExpertPredictor predictor; // one context decodes at a time
    std::vector<std::string> patterns;

    std::unordered_map<std::string, uint32_t> by_name;
    std::unique_ptr<Weight[]> weights; // as many as spec.tensors
    std::string error; // guarded by error_mutex
    std::mutex error_mutex;

    ggml_backend_buffer_type_t own_type = nullptr; // of streamed weights

    std::atomic<uint64_t> pass_count{0};
    std::atomic<uint64_t> op_count{0};
    std::atomic<uint64_t> delegate_calls{0};
    std::atomic<uint64_t> wave_count{0};
    std::atomic<uint64_t> gathered_count{0};
    std::atomic<bool> probing{true};
    uint32_t last_order = UINT32_MAX; // of the last streamed op; a smaller one starts a pass. One context decodes at a time

    StreamState(StreamingSpec s, DelegateFactory & d) : spec(std::move(s)), delegate(d) {}

    bool open(std::string * sentence);
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
        return t != nullptr && t->buffer != nullptr && ggml_backend_buffer_get_type(t->buffer) == own_type && t->view_src == nullptr;
    }
    Span<Weight> all_weights() const { return {weights.get(), static_cast<uint32_t>(spec.tensors.size())}; }
    Weight & weight_of(const ggml_tensor * t) const { return *static_cast<Weight *>(t->extra); }
    bool claims(const ggml_tensor * op) const;
    bool fed_by_product(const ggml_tensor * t, int depth) const;
    ggml_backend_buffer_t pool_buffer() const { return pool_is_host ? host_buffer.get() : delegate_pool.buffer(); }
    std::byte * address(const Lease & lease) const {
        return pool_is_host ? lease.data : delegate_pool.address({lease.class_index, lease.slot_index});
    }
};

// A streamed product of the split at hand.
struct Op {
    ggml_tensor * node = nullptr;
    Weight * weight = nullptr;
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
    uint64_t bytes() const { return bytes_; }
    ggml_backend_buffer_t buffer() const { return buffer_.get(); }

private:
    ggml_backend_buffer_ptr buffer_;
    uint64_t bytes_ = 0;
    uint64_t used_ = 0;
};

// True when t's rows (dimensions 1 and 2) lie at one distance, so that they can be numbered through.
bool rows_are_even(const ggml_tensor * t);
// How many nodes of the whole graph take this node of a split as a source; -1 where ggml does not tell. (backend.cpp)
int32_t uses_in_graph(const ggml_cgraph * split, int node_index);

struct Shape {
    int64_t columns;
    int64_t rows;
    int64_t planes;
};

// Computes splits. All arrays are sized when it is made; a pass allocates nothing of ours.
class Computer {
public:
    explicit Computer(StreamState & device);
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
    bool lists_by_expert();
    void judge_prediction();
    void predict_next();
    void count_asked();
    bool run_stage(uint32_t first, uint32_t last);
    uint32_t stage_end(ggml_cgraph * cgraph, uint32_t first) const;
    bool start_ready(Op & op);
    bool next_wave(uint32_t first, uint32_t last);
    bool wait_for(uint32_t first, uint32_t last);
    bool wait_for_read(Weight & weight, Span<Lease> leases);
    bool compute_whole(Op & op, const Lease & lease);
    bool compute_span(Op & op);
    bool compute_single(Op & op, const Lease & lease);
    bool compute_gathered(Op & op, uint32_t group_from, uint32_t group_to);
    uint32_t group_end(const Op & op, uint32_t from) const;
    bool one_span(const Op & op, uint32_t from, uint32_t to, uint64_t pairs) const;
    struct SlotSpan {
        const Lease * lowest;
        uint32_t slots;
    };
    SlotSpan span_of(const Op & op, uint32_t from, uint32_t to) const;

    // While it lives, place_ tells for each expert of the group its slot within the span.
    class SlotTable {
    public:
        SlotTable(Computer & c, const Op & op, uint32_t from, uint32_t to, const Lease & lowest);
        ~SlotTable();

    private:
        Computer & c_;
        const Op & op_;
        const uint32_t from_;
        const uint32_t to_;
    };

    // computer_chain.cpp
    static constexpr uint32_t chain_capacity = 24; // nodes from the first product to the last
    struct Chain {
        uint32_t first_op = 0;
        uint32_t last_op = 0;   // the product that ends it: down
        uint32_t first_node = 0;
        uint32_t node_count = 0;
        uint32_t pairs = 0;     // (token, expert)
        uint32_t pairs_done = 0;
        std::byte * rows = nullptr; // of the last product, in the order in which they were computed
    };
    struct ChainGroup;
    bool find_chain(ggml_cgraph * cgraph, uint32_t first);
    bool is_chain(ggml_cgraph * cgraph) const;
    bool is_chain_step(const ggml_tensor * node, ggml_cgraph * cgraph) const;
    bool chain_waits(uint32_t first, uint32_t last, LeaseState state) const;
    const ggml_tensor * chain_node(ggml_cgraph * cgraph, uint32_t index) const;
    uint32_t chain_index(const ggml_tensor * t, ggml_cgraph * cgraph) const;
    uint64_t chain_bytes(ggml_cgraph * cgraph, uint32_t pairs) const;
    bool run_chain(ggml_cgraph * cgraph);
    bool add_complete_experts(ggml_cgraph * cgraph);
    uint32_t chain_group_end(uint32_t from) const;
    bool add_chain_group(ggml_cgraph * cgraph, uint32_t from, uint32_t to);
    bool add_chain_node(ggml_cgraph * cgraph, uint32_t index, ChainGroup & group);
    bool add_chain_product(const Op & op, const ChainGroup & group, ggml_tensor * input, ggml_tensor * to);
    ggml_tensor * chain_ids(Shape rows, const int32_t * ids);
    ggml_tensor * chain_floats(int64_t columns, const ChainGroup & group);
    ggml_tensor * chain_row(const ChainGroup & group);
    bool finish_chain();
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
    const Lease & ready_lease(const Op & op, uint32_t i) const { return leases_[op.first_lease + ready_[i]]; }

    StreamState & device_;
    ggml_backend_ptr delegate_;
    int thread_count_ = 1;
    bool ok_ = false;
    ggml_context_ptr meta_;
    ggml_cgraph * graph_ = nullptr;
    std::vector<ggml_tensor> shadows_;
    uint32_t shadows_used_ = 0;
    Scratch scratch_;
    uint64_t scratch_kept_ = 0; // what a flush leaves
    uint64_t scratch_base_ = 0; // of that, what lives as long as the computer
    void * zero_ids_ = nullptr; // ubatch_tokens zeros: "expert 0", of a view that has one

    std::vector<Op> ops_;
    uint32_t op_count_ = 0;
    std::vector<Lease> leases_;
    std::vector<uint8_t> computed_; // by lease
    uint32_t lease_count_ = 0;
    std::vector<uint32_t> ready_;   // leases of the op at hand (from its first on) that are ready and not computed
    uint32_t ready_count_ = 0;
    uint32_t gather_pairs_ = 0;     // that the scratch holds at once
    std::vector<Lease> wave_;       // leases on their way into a begin
    std::vector<uint32_t> wave_at_; // where they came from
    std::vector<uint32_t> place_;   // expert -> lease of the op at hand
    std::vector<std::byte> ids_;    // the router's choice, fetched
    const ggml_tensor * ids_of_ = nullptr;
    const std::byte * ids_data_ = nullptr;
    std::vector<uint32_t> expected_; // strides of a prediction
    std::vector<int32_t> pair_rows_;
    std::vector<int64_t> pair_rows64_;
    std::vector<int32_t> span_ids_;
    Chain chain_;
    std::vector<int32_t> pair_experts_;
    std::vector<int32_t> chain_places_; // row of the result -> where it stands in chain_.rows
};

} // namespace hypura

#include "computer.h"

#include <algorithm>
#include <cstring>

namespace hypura {

namespace {

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

bool overlaps(const ggml_tensor * a, const ggml_tensor * b) {
    const auto * a0 = static_cast<const char *>(a->data);
    const auto * b0 = static_cast<const char *>(b->data);
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src->buffer : t->buffer;
}

} // namespace

bool rows_are_even(const ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1 &&
           (t->ne[1] == 1 || t->ne[2] == 1 || t->nb[2] == t->nb[1] * static_cast<size_t>(t->ne[1]));
}

Computer::Computer(StreamState & device) : device_(device), delegate_(device.delegate.create()) {
    uint32_t largest = 1;
    int64_t widest_in = 1;
    int64_t widest_out = 1;
    for (const Weight & w : device.all_weights()) {
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
    expected_.resize(device.predictor.most_strides());
    ids_.resize(static_cast<size_t>(largest) * tokens * sizeof(int32_t) + 4096);
    pair_rows_.resize(static_cast<size_t>(tokens) * largest);
    pair_rows64_.resize(static_cast<size_t>(tokens) * largest);
    span_ids_.resize(static_cast<size_t>(tokens) * largest);
    pair_experts_.resize(static_cast<size_t>(tokens) * largest);
    chain_places_.resize(static_cast<size_t>(tokens) * largest);
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
    scratch_base_ = scratch_kept_ = scratch_.used();
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
        scratch_kept_ = scratch_base_;
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
        const bool chained = find_chain(cgraph, next_op);
        const uint32_t end = chained ? chain_.last_op + 1 : stage_end(cgraph, next_op);
        if (!(chained ? run_chain(cgraph) : run_stage(next_op, end))) {
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
    const bool by_expert = lists_by_expert();
    const Span<Lease> asked{by_expert ? wave_.data() : leases_.data(), lease_count_};
    const BeginResult begun = device_.stream.begin(asked, Holding::kNothing);
    for (uint32_t i = 0; by_expert && i < lease_count_; ++i) {
        leases_[wave_at_[i]] = wave_[i];
    }
    count_asked();
    if (begun.status == Status::kInterrupted) {
        return fail("the request was cancelled");
    }
    judge_prediction();
    predict_next(); // behind the reads of this layer in the queue
    return true;
}

// Few tokens: the strides of one expert behind each other into wave_, so that the first expert is complete, and can be
// computed, while those of the next are being read. With many tokens slots may be few, and go to the first product.
bool Computer::lists_by_expert() {
    const Op & first = ops_[0];
    for (uint32_t i = 0; i < op_count_; ++i) {
        if (!ops_[i].routed || ops_[i].lease_count != first.lease_count || ops_[i].token_count() > ExpertPredictor::most_tokens) {
            return false;
        }
    }
    uint32_t count = 0;
    for (uint32_t e = 0; e < first.lease_count; ++e) {
        for (uint32_t i = 0; i < op_count_; ++i) {
            wave_at_[count] = ops_[i].first_lease + e;
            wave_[count] = leases_[wave_at_[count]];
            ++count;
        }
    }
    return true;
}

// What was expected of the layer at hand, beside what it asks for; reads that are not wanted and did not begin are
// taken back.
void Computer::judge_prediction() {
    ExpertPredictor & predictor = device_.predictor;
    for (uint32_t i = 0; i < op_count_; ++i) {
        const Op & op = ops_[i];
        const uint32_t router = predictor.router_of(op.weight->order);
        if (router == ExpertPredictor::kNone) {
            continue;
        }
        const Span<const uint32_t> predicted = predictor.take_predicted(router);
        if (predicted.count == 0 || op.token_count() > ExpertPredictor::most_tokens) {
            continue;
        }
        for (uint32_t l = op.first_lease; l < op.first_lease + op.lease_count; ++l) {
            place_[leases_[l].stride_index - op.weight->spec->first_stride] = l;
        }
        uint32_t wrong = 0;
        for (const uint32_t expert : predicted) {
            if (place_[expert] == UINT32_MAX) {
                for (const uint32_t order : predictor.asked(router)) {
                    expected_[wrong++] = device_.weights[order].spec->first_stride + expert;
                }
            }
        }
        for (uint32_t l = op.first_lease; l < op.first_lease + op.lease_count; ++l) {
            place_[leases_[l].stride_index - op.weight->spec->first_stride] = UINT32_MAX;
        }
        const auto tensors = static_cast<uint32_t>(predictor.asked(router).size());
        predictor.note(predicted.count, predicted.count - wrong / tensors);
        device_.stream.retract({expected_.data(), wrong});
    }
}

// What the next layer will ask for, judged by the input of this one, is read while this one is computed.
void Computer::predict_next() {
    ExpertPredictor & predictor = device_.predictor;
    for (uint32_t i = 0; i < op_count_; ++i) {
        const Op & op = ops_[i];
        const uint32_t router = predictor.router_after(op.weight->order);
        const ggml_tensor * input = op.node->src[1];
        const bool is_computed = input == ops_[0].node->src[1]; // a later product's input may not be, yet
        if (router == ExpertPredictor::kNone || !op.routed || !is_computed || op.token_count() > ExpertPredictor::most_tokens ||
            input->type != GGML_TYPE_F32 || input->ne[0] != predictor.columns(router) || input->ne[1] != 1 ||
            !ggml_backend_buffer_is_host(buffer_of(input))) {
            continue;
        }
        const Span<const uint32_t> predicted =
            predictor.predict(router, static_cast<const std::byte *>(input->data), input->nb[2], op.token_count());
        uint32_t count = 0;
        for (const uint32_t expert : predicted) {
            for (const uint32_t order : predictor.asked(router)) {
                expected_[count++] = device_.weights[order].spec->first_stride + expert;
            }
        }
        device_.stream.prefetch({expected_.data(), count});
    }
}

void Computer::count_asked() {
    for (uint32_t i = 0; i < op_count_; ++i) {
        const Op & op = ops_[i];
        const Lease * first = leases_.data() + op.first_lease;
        const auto ready = std::count_if(first, first + op.lease_count, [](const Lease & l) { return l.state == LeaseState::kReady; });
        op.weight->asked_count += op.lease_count;
        op.weight->late_count += op.lease_count - static_cast<uint32_t>(ready);
    }
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
    for (uint32_t i = 0; i < op.lease_count; ++i) {
        if (!computed_[op.first_lease + i] && leases_[op.first_lease + i].state == LeaseState::kReady) {
            ready_[ready_count_++] = i;
        }
    }
    if (ready_count_ == 0) {
        return true;
    }
    bool added = true;
    if (!op.routed) {
        added = compute_whole(op, ready_lease(op, 0));
    } else if (ready_count_ == op.lease_count && one_span(op, 0, ready_count_, op.used_count() * op.token_count())) {
        added = compute_span(op);
    } else {
        for (uint32_t from = 0; from < ready_count_ && added;) {
            const uint32_t to = group_end(op, from);
            added = op.token_count() == 1 && to == from + 1 ? compute_single(op, ready_lease(op, from))
                                                            : compute_gathered(op, from, to);
            from = to;
        }
    }
    for (uint32_t i = 0; i < ready_count_; ++i) {
        computed_[op.first_lease + ready_[i]] = 1;
    }
    op.computed += ready_count_;
    return added;
}

// Ready leases from `from` on that go into one product.
uint32_t Computer::group_end(const Op & op, uint32_t from) const {
    uint32_t pairs = ready_lease(op, from).token_count;
    uint32_t to = from + 1;
    while (to < ready_count_) {
        pairs += ready_lease(op, to).token_count;
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
    uint32_t waiting = first; // the first that still lacks a stride
    while (waiting + 1 < last && ops_[waiting].computed == ops_[waiting].lease_count) {
        ++waiting;
    }
    return wait_for_read(*ops_[waiting].weight, {leases_.data() + begin, end - begin});
}

// Until one of them that is being read is there; the time counts for `weight`.
bool Computer::wait_for_read(Weight & weight, Span<Lease> leases) {
    const uint64_t start_ns = platform::now_ns();
    const Status status = device_.stream.wait_some(leases);
    weight.stall_ns += platform::now_ns() - start_ns;
    switch (status) {
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
    const Lease & one = ready_lease(op, from);
    uint32_t low = one.slot_index;
    uint32_t high = one.slot_index;
    for (uint32_t i = from; i < to; ++i) {
        const Lease & lease = ready_lease(op, i);
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
    const bool even = slot_bytes % ggml_type_size(op.node->src[0]->type) == 0 || device_.delegate.takes_any_distance();
    return even &&
           (high - low + 1) * pairs * 2 * sizeof(int32_t) <= device_.spec.span_work_bytes;
}

// The lowest slot of a group, and how many slots it spans.
Computer::SlotSpan Computer::span_of(const Op & op, uint32_t from, uint32_t to) const {
    const Lease * low = &ready_lease(op, from);
    uint32_t high = 0;
    for (uint32_t i = from; i < to; ++i) {
        const Lease & lease = ready_lease(op, i);
        low = lease.slot_index < low->slot_index ? &lease : low;
        high = std::max(high, lease.slot_index);
    }
    return {low, high - low->slot_index + 1};
}

Computer::SlotTable::SlotTable(Computer & c, const Op & op, uint32_t from, uint32_t to, const Lease & lowest)
    : c_(c), op_(op), from_(from), to_(to) {
    for (uint32_t i = from; i < to; ++i) {
        const Lease & lease = c.ready_lease(op, i);
        c.place_[lease.stride_index - op.weight->spec->first_stride] = lease.slot_index - lowest.slot_index;
    }
}

Computer::SlotTable::~SlotTable() {
    for (uint32_t i = from_; i < to_; ++i) {
        c_.place_[c_.ready_lease(op_, i).stride_index - op_.weight->spec->first_stride] = UINT32_MAX;
    }
}

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
    const SlotSpan span = span_of(op, 0, ready_count_);
    {
        const SlotTable table(*this, op, 0, ready_count_, *span.lowest);
        for (uint32_t t = 0, n = 0; t < op.token_count(); ++t) {
            for (uint32_t u = 0; u < op.used_count(); ++u, ++n) {
                span_ids_[n] = static_cast<int32_t>(place_[static_cast<uint32_t>(expert_at(op, u, t))]);
            }
        }
    }
    ggml_tensor * slots = fresh(GGML_TYPE_I32, {ids->ne[0], ids->ne[1], 1}, at, scratch_.buffer());
    ggml_backend_tensor_set(slots, span_ids_.data(), 0, pairs * sizeof(int32_t));
    ggml_tensor * w = shadow_weight(op, *span.lowest, span.slots);
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
    const SlotSpan span = span_of(op, group_from, group_to);
    uint32_t pairs = 0;
    {
        const SlotTable table(*this, op, group_from, group_to, *span.lowest);
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
             {shadow_weight(op, *span.lowest, span.slots), reshaped(*gathered, {input->ne[0], 1, pairs}), slots});

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

} // namespace hypura

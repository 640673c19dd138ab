// A block of experts at the grain of an expert (see computer.h).
//
// Gate, up, what stands between them, and down are one chain of nodes that only hand on to each other. Where some of
// a chain's strides are still being read, the experts that are complete go through all of it meanwhile, in the scratch,
// and only the last result is put where the graph wants it, when it is whole: llama.cpp's allocator may have given it
// the memory of what the late experts still need. A row's bits do not depend on its neighbours (computer.cpp,
// compute_gathered), so the result is that of the nodes one after another.

#include "computer.h"

#include <algorithm>
#include <cstring>

namespace hypura {

// Some experts of the chain and their (token, expert) pairs.
struct Computer::ChainGroup {
    uint32_t from; // in ready_
    uint32_t to;
    uint32_t pairs = 0;
    Shape rows{};                  // how the pairs lie; columns are each node's own
    ggml_tensor * input = nullptr; // of the first products: a row for each pair, or one for all
    std::array<ggml_tensor *, chain_capacity> shadows{};
};

namespace {

bool is_rowwise(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_GLU:
        case GGML_OP_UNARY:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_SQR:
            return true;
        default:
            return false;
    }
}

// A part of each row of its source.
bool is_part_of_rows(const ggml_tensor * view) {
    const ggml_tensor * whole = view->src[0];
    const size_t offset = static_cast<size_t>(static_cast<const char *>(view->data) - static_cast<const char *>(whole->data));
    return view->data >= whole->data && offset + static_cast<size_t>(view->ne[0]) * sizeof(float) <= whole->nb[1] &&
           view->nb[0] == sizeof(float) && view->nb[1] == whole->nb[1] && view->nb[2] == whole->nb[2];
}

uint64_t padded(uint64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

} // namespace

const ggml_tensor * Computer::chain_node(ggml_cgraph * cgraph, uint32_t index) const {
    return ggml_graph_node(cgraph, static_cast<int>(chain_.first_node + index));
}

// The place of `t` in the chain; its node_count when it is not of it.
uint32_t Computer::chain_index(const ggml_tensor * t, ggml_cgraph * cgraph) const {
    uint32_t i = 0;
    while (i < chain_.node_count && chain_node(cgraph, i) != t) {
        ++i;
    }
    return i;
}

bool Computer::chain_waits(uint32_t first, uint32_t last, LeaseState state) const {
    const uint32_t end = ops_[last - 1].first_lease + ops_[last - 1].lease_count;
    for (uint32_t i = ops_[first].first_lease; i < end; ++i) {
        if (leases_[i].state == state) {
            return true;
        }
    }
    return false;
}

// Whether the products on one input from `first` on and the one behind them are a chain that is worth it: a first product
// waits for a read, and every stride has its slot, so that no wave needs to take one back.
bool Computer::find_chain(ggml_cgraph * cgraph, uint32_t first) {
    uint32_t last = first + 1;
    while (last < op_count_ && ops_[last].node->src[1] == ops_[first].node->src[1]) {
        ++last;
    }
    if (last >= op_count_ || !ops_[first].routed || !chain_waits(first, last, LeaseState::kReading) ||
        chain_waits(first, last + 1, LeaseState::kWaiting)) {
        return false;
    }
    const uint32_t count = ops_[last].node_index + 1 - ops_[first].node_index;
    if (count > chain_capacity) {
        return false;
    }
    chain_ = Chain{};
    chain_.first_op = first;
    chain_.last_op = last;
    chain_.first_node = ops_[first].node_index;
    chain_.node_count = count;
    chain_.pairs = ops_[first].used_count() * ops_[first].token_count();
    return is_chain(cgraph) && chain_bytes(cgraph, chain_.pairs) <= scratch_.bytes() - scratch_base_;
}

bool Computer::is_chain(ggml_cgraph * cgraph) const {
    std::array<int32_t, chain_capacity> uses{};
    for (uint32_t i = 0; i < chain_.node_count; ++i) {
        const ggml_tensor * node = chain_node(cgraph, i);
        if (node->type != GGML_TYPE_F32 || node->ne[1] != ops_[chain_.first_op].used_count() ||
            node->ne[2] != ops_[chain_.first_op].token_count() || node->ne[3] != 1 || !is_chain_step(node, cgraph)) {
            return false;
        }
        for (const ggml_tensor * source : node->src) {
            const uint32_t at = source == nullptr ? chain_.node_count : chain_index(source, cgraph);
            if (at < chain_.node_count) {
                uses[at]++;
            }
        }
    }
    for (uint32_t i = 0; i + 1 < chain_.node_count; ++i) { // nobody else looks at what is only in the scratch
        const bool is_output = (chain_node(cgraph, i)->flags & GGML_TENSOR_FLAG_OUTPUT) != 0;
        if (is_output || uses_in_graph(cgraph, static_cast<int>(chain_.first_node + i)) != uses[i]) {
            return false;
        }
    }
    return rows_are_even(ops_[chain_.last_op].node);
}

bool Computer::is_chain_step(const ggml_tensor * node, ggml_cgraph * cgraph) const {
    const auto inside = [&](const ggml_tensor * t) { return t != nullptr && chain_index(t, cgraph) < chain_.node_count; };
    if (device_.computes(node)) {
        const bool is_last = node == ops_[chain_.last_op].node;
        const ggml_tensor * input = node->src[1];
        const bool fits = is_last ? inside(input) && input->op != GGML_OP_VIEW : !inside(input) && rows_are_even(input);
        return node->op == GGML_OP_MUL_MAT_ID && node->src[2] == ids_of_ && fits &&
               (is_last || input == ops_[chain_.first_op].node->src[1]);
    }
    if (node->op == GGML_OP_ADD_ID) {
        return inside(node->src[0]) && !inside(node->src[1]) && node->src[2] == ids_of_;
    }
    if (node->op == GGML_OP_VIEW) {
        return inside(node->src[0]) && node->src[0]->op != GGML_OP_VIEW && is_part_of_rows(node);
    }
    return is_rowwise(node) && inside(node->src[0]) && (node->src[1] == nullptr || inside(node->src[1]));
}

// Scratch for so many pairs, and for the result of all.
uint64_t Computer::chain_bytes(ggml_cgraph * cgraph, uint32_t pairs) const {
    const ggml_tensor * input = ops_[chain_.first_op].node->src[1];
    const ggml_tensor * last = ops_[chain_.last_op].node;
    uint64_t bytes = padded(static_cast<uint64_t>(last->ne[0]) * chain_.pairs * sizeof(float)) + padded(chain_.pairs * sizeof(int32_t)) +
                     padded(static_cast<uint64_t>(input->ne[0]) * pairs * sizeof(float)) + 2 * padded(pairs * sizeof(int32_t));
    for (uint32_t i = 0; i + 1 < chain_.node_count; ++i) {
        const ggml_tensor * node = chain_node(cgraph, i);
        bytes += node->op == GGML_OP_VIEW ? 0 : padded(static_cast<uint64_t>(node->ne[0]) * pairs * sizeof(float));
    }
    return bytes + (chain_.last_op - chain_.first_op + 1) * padded(pairs * sizeof(int32_t));
}

bool Computer::run_chain(ggml_cgraph * cgraph) {
    const Op & first = ops_[chain_.first_op];
    const Op & last = ops_[chain_.last_op];
    if (!flush()) {
        return false;
    }
    chain_.rows = static_cast<std::byte *>(scratch(static_cast<uint64_t>(last.node->ne[0]) * chain_.pairs * sizeof(float)));
    if (chain_.rows == nullptr) {
        return false;
    }
    scratch_kept_ = scratch_.used(); // through the flushes between the groups
    for (;;) {
        if (!add_complete_experts(cgraph)) {
            return false;
        }
        if (chain_.pairs_done == chain_.pairs) {
            break;
        }
        const uint32_t count = last.first_lease + last.lease_count - first.first_lease;
        if (!flush() || !wait_for_read(*first.weight, {leases_.data() + first.first_lease, count})) {
            return false;
        }
    }
    scratch_kept_ = scratch_base_; // the next flush is the last that needs it
    return finish_chain();
}

// The experts of which every stride is there, in as few groups as the products allow.
bool Computer::add_complete_experts(ggml_cgraph * cgraph) {
    const uint32_t experts = ops_[chain_.first_op].lease_count;
    ready_count_ = 0;
    for (uint32_t e = 0; e < experts; ++e) {
        bool complete = !computed_[ops_[chain_.first_op].first_lease + e];
        for (uint32_t i = chain_.first_op; i <= chain_.last_op; ++i) {
            complete = complete && leases_[ops_[i].first_lease + e].state == LeaseState::kReady;
        }
        if (complete) {
            ready_[ready_count_++] = e;
        }
    }
    for (uint32_t from = 0; from < ready_count_;) {
        const uint32_t to = chain_group_end(from);
        if (!add_chain_group(cgraph, from, to)) {
            return false;
        }
        from = to;
    }
    for (uint32_t i = chain_.first_op; i <= chain_.last_op; ++i) {
        for (uint32_t n = 0; n < ready_count_; ++n) {
            computed_[ops_[i].first_lease + ready_[n]] = 1;
        }
        ops_[i].computed += ready_count_;
    }
    return true;
}

// The experts from `from` on that go through every product of the chain at once.
uint32_t Computer::chain_group_end(uint32_t from) const {
    const Op & first = ops_[chain_.first_op];
    uint32_t pairs = ready_lease(first, from).token_count;
    uint32_t to = from + 1;
    for (; to < ready_count_; ++to) {
        pairs += ready_lease(first, to).token_count;
        for (uint32_t i = chain_.first_op; i <= chain_.last_op; ++i) {
            if (!one_span(ops_[i], from, to + 1, pairs)) {
                return to;
            }
        }
    }
    return to;
}

bool Computer::add_chain_group(ggml_cgraph * cgraph, uint32_t from, uint32_t to) {
    const Op & first = ops_[chain_.first_op];
    const ggml_tensor * input = first.node->src[1];
    ChainGroup group{from, to};
    if (!room_for(5 * chain_.node_count + 8)) {
        return false;
    }
    {
        const SlotTable table(*this, first, from, to, *span_of(first, from, to).lowest);
        for (uint32_t t = 0; t < first.token_count(); ++t) {
            for (uint32_t u = 0; u < first.used_count(); ++u) {
                const auto expert = static_cast<uint32_t>(expert_at(first, u, t));
                if (place_[expert] != UINT32_MAX) {
                    pair_experts_[group.pairs] = static_cast<int32_t>(expert);
                    pair_rows_[group.pairs] = static_cast<int32_t>(t * input->ne[1] + u % static_cast<uint32_t>(input->ne[1]));
                    chain_places_[t * first.used_count() + u] = static_cast<int32_t>(chain_.pairs_done + group.pairs++);
                }
            }
        }
    }
    // One token: its row serves all, as it stands. Several: a row for each pair.
    const bool gathers = first.token_count() > 1 || input->ne[1] != 1;
    group.rows = gathers ? Shape{0, 1, group.pairs} : Shape{0, group.pairs, 1};
    if (gathers) {
        ggml_tensor * from_rows = chain_ids({0, group.pairs, 1}, pair_rows_.data());
        group.input = chain_floats(input->ne[0], group);
        if (from_rows == nullptr || group.input == nullptr) {
            return false;
        }
        ggml_tensor * flat = reshaped(*group.input, {input->ne[0], group.pairs, 1});
        add_node(flat, GGML_OP_GET_ROWS, {all_rows(input), from_rows, nullptr});
    } else {
        group.input = shadow(*input);
    }
    for (uint32_t i = 0; i < chain_.node_count; ++i) {
        if (!add_chain_node(cgraph, i, group)) {
            return false;
        }
    }
    chain_.pairs_done += group.pairs;
    device_.gathered_count++;
    return true;
}

bool Computer::add_chain_node(ggml_cgraph * cgraph, uint32_t index, ChainGroup & group) {
    const ggml_tensor * node = chain_node(cgraph, index);
    const auto source = [&](uint32_t i) { return node->src[i] == nullptr ? nullptr : group.shadows[chain_index(node->src[i], cgraph)]; };
    if (node->op == GGML_OP_VIEW) {
        ggml_tensor * part = reshaped(*source(0), {node->ne[0], group.rows.rows, group.rows.planes});
        const size_t step = source(0)->nb[1];
        part->data = static_cast<char *>(part->data) + (static_cast<const char *>(node->data) - static_cast<const char *>(node->src[0]->data));
        part->nb[1] = step;
        part->nb[2] = step * static_cast<size_t>(group.rows.rows);
        part->nb[3] = part->nb[2] * static_cast<size_t>(group.rows.planes);
        group.shadows[index] = part;
        return true;
    }
    const bool is_last = index + 1 == chain_.node_count;
    ggml_tensor * to = is_last ? chain_row(group) : chain_floats(node->ne[0], group);
    if (to == nullptr) {
        return false;
    }
    memcpy(to->op_params, node->op_params, sizeof to->op_params);
    group.shadows[index] = to;
    if (device_.computes(node)) {
        uint32_t op = chain_.first_op;
        while (ops_[op].node != node) {
            ++op;
        }
        return add_chain_product(ops_[op], group, is_last ? source(1) : group.input, to);
    }
    if (node->op == GGML_OP_ADD_ID) {
        ggml_tensor * experts = chain_ids(group.rows, pair_experts_.data());
        if (experts == nullptr) {
            return false;
        }
        add_node(to, node->op, {source(0), node->src[1], experts});
    } else {
        add_node(to, node->op, {source(0), source(1), nullptr});
    }
    return true;
}

bool Computer::add_chain_product(const Op & op, const ChainGroup & group, ggml_tensor * input, ggml_tensor * to) {
    const SlotSpan span = span_of(op, group.from, group.to);
    {
        const SlotTable table(*this, op, group.from, group.to, *span.lowest);
        for (uint32_t i = 0; i < group.pairs; ++i) {
            span_ids_[i] = static_cast<int32_t>(place_[static_cast<uint32_t>(pair_experts_[i])]);
        }
    }
    ggml_tensor * slots = chain_ids(group.rows, span_ids_.data());
    if (slots == nullptr) {
        return false;
    }
    add_node(to, GGML_OP_MUL_MAT_ID, {shadow_weight(op, *span.lowest, span.slots), input, slots});
    return true;
}

// A number for each pair; `rows` says how they lie.
ggml_tensor * Computer::chain_ids(Shape rows, const int32_t * ids) {
    const uint64_t bytes = static_cast<uint64_t>(rows.rows * rows.planes) * sizeof(int32_t);
    void * at = scratch_.take(bytes); // find_chain() saw that there is room
    if (at == nullptr) {
        fail("the scratch memory of a chain of streamed products is too small");
        return nullptr;
    }
    ggml_tensor * t = fresh(GGML_TYPE_I32, {rows.rows, rows.planes, 1}, at, scratch_.buffer());
    ggml_backend_tensor_set(t, ids, 0, bytes);
    return t;
}

ggml_tensor * Computer::chain_floats(int64_t columns, const ChainGroup & group) {
    void * at = scratch_.take(static_cast<uint64_t>(columns) * group.pairs * sizeof(float));
    if (at == nullptr) {
        fail("the scratch memory of a chain of streamed products is too small");
        return nullptr;
    }
    return fresh(GGML_TYPE_F32, {columns, group.rows.rows, group.rows.planes}, at, scratch_.buffer());
}

// Where the group's results go: behind those that are computed already.
ggml_tensor * Computer::chain_row(const ChainGroup & group) {
    const int64_t columns = ops_[chain_.last_op].node->ne[0];
    std::byte * at = chain_.rows + static_cast<uint64_t>(columns) * chain_.pairs_done * sizeof(float);
    return fresh(GGML_TYPE_F32, {columns, group.rows.rows, group.rows.planes}, at, scratch_.buffer());
}

// Every row to its place.
bool Computer::finish_chain() {
    const ggml_tensor * result = ops_[chain_.last_op].node;
    if (!room_for(4)) {
        return false;
    }
    ggml_tensor * places = chain_ids({0, chain_.pairs, 1}, chain_places_.data());
    if (places == nullptr) {
        return false;
    }
    ggml_tensor * rows = fresh(GGML_TYPE_F32, {result->ne[0], chain_.pairs, 1}, chain_.rows, scratch_.buffer());
    add_node(all_rows(result), GGML_OP_GET_ROWS, {rows, places, nullptr});
    return true;
}

} // namespace hypura

// See neuron_cache.h.
#include "neuron_cache.h"

#include <algorithm>
#include <cmath>

namespace hypura {
namespace {

// Scores are doubles; well before they overflow everything is divided by a power of two, which is exact.
constexpr double kRescaleAt = 0x1p500;

} // namespace

void NeuronCache::open(const CacheShape& shape, const CachePolicy& policy) {
    HY_CHECK(shape.slot_count > 0);
    *this = NeuronCache();
    policy_ = policy;
    stride_count_ = shape.order_index.count;
    slot_count_ = shape.slot_count;
    strides_ = std::make_unique<Stride[]>(stride_count_);
    slots_ = std::make_unique<Slot[]>(slot_count_);
    for (uint32_t i = 0; i < stride_count_; i++) {
        strides_[i].order = shape.order_index[i];
        order_count_ = std::max(order_count_, shape.order_index[i] + 1);
    }
    bool below_cliff = slot_count_ < policy_.working_set_strides && slot_count_ < stride_count_;
    if (policy_.kind == PolicyKind::kLru && below_cliff) {
        policy_.kind = PolicyKind::kPinnedCyclic;
        policy_.pinned_slots = slot_count_ - std::min(slot_count_, policy_.guard_ring_slots);
    }
    if (policy_.kind == PolicyKind::kPinnedCyclic) {
        choose_kept(shape.kept);
    }
    if (policy_.kind == PolicyKind::kLfuDecay) {
        heap_ = std::make_unique<HeapEntry[]>(slot_count_);
    }
    if (policy_.kind == PolicyKind::kLeastStale) {
        orders_ = std::make_unique<Ends[]>(order_count_);
        order_bits_ = std::make_unique<uint64_t[]>(order_count_ / 64 + 1);
    }
    Ends& free = lists_[static_cast<uint32_t>(List::kFree)];
    for (uint32_t i = 0; i < slot_count_; i++) {
        slots_[i].prev = i == 0 ? kNil : i - 1;
        slots_[i].next = i + 1 == slot_count_ ? kNil : i + 1;
    }
    free = {0, slot_count_ - 1, slot_count_};
}

// Stride i is in the subset when the line from 0 to n with slope pinned / n crosses an integer at i: the gaps between
// subset strides differ by at most one.
void NeuronCache::choose_kept(Span<const uint8_t> kept) {
    bool all_fit = stride_count_ <= slot_count_;
    HY_CHECK(kept.count == 0 || kept.count == stride_count_);
    uint64_t wanted = all_fit ? stride_count_ : policy_.pinned_slots;
    for (uint64_t i = 0; i < stride_count_; i++) {
        bool spread = (i + 1) * wanted / stride_count_ > i * wanted / stride_count_;
        strides_[i].kept = kept.count == 0 || all_fit ? spread : kept[static_cast<uint32_t>(i)] != 0;
        kept_count_ += strides_[i].kept ? 1 : 0;
    }
    HY_CHECK(kept_count_ < slot_count_ || kept_count_ == stride_count_);
}

// ---- clock

void NeuronCache::begin_pass(uint32_t token_count) {
    pass_count_++;
    bool shortened = policy_.most_pass_tokens > 0 && token_count > policy_.most_pass_tokens;
    double counted = shortened ? policy_.most_pass_tokens : token_count;
    pass_share_ = shortened ? counted / token_count : 1;
    if (policy_.kind == PolicyKind::kLfuDecay && policy_.half_life_tokens > 0) {
        weight_ *= std::exp2(std::min(counted / policy_.half_life_tokens, 400.0));
        if (weight_ > kRescaleAt) {
            rescale();
        }
    }
}

void NeuronCache::rescale() {
    int exponent = std::ilogb(weight_);
    weight_ = std::ldexp(weight_, -exponent);
    for (uint32_t i = 0; i < stride_count_; i++) {
        strides_[i].score = std::ldexp(strides_[i].score, -exponent);
    }
    // Scores that vanished became equal: their order is another now.
    for (uint32_t i = 0; i < heap_count_; i++) {
        heap_[i] = heap_entry(heap_[i].slot);
    }
    for (uint32_t i = heap_count_ / 2; i-- > 0;) {
        heap_down(i);
    }
}

void NeuronCache::touch(uint32_t stride, uint32_t token_count) {
    HY_CHECK(stride < stride_count_);
    Stride& s = strides_[stride];
    double before = s.score;
    s.score += token_count * pass_share_ * weight_;
    s.used_at = ++touch_count_;
    s.used_pass = pass_count_;
    current_order_ = s.order;
    // A higher score waits until the entry comes to the top; one that rounding kept the same goes before its equals now.
    if (s.score == before && s.slot != kNil && slots_[s.slot].heap_at != kNil) {
        uint32_t at = slots_[s.slot].heap_at;
        heap_[at] = heap_entry(s.slot);
        heap_up(at);
        heap_down(slots_[s.slot].heap_at);
    }
}

// ---- strides

Admission NeuronCache::admit(uint32_t stride, Purpose purpose) {
    HY_CHECK(stride < stride_count_ && strides_[stride].state == StrideState::kAbsent);
    Stride& s = strides_[stride];
    if (purpose == Purpose::kDemand) {
        current_order_ = s.order;
    }
    // Free slots of a pinned policy are kept for the subset once the ring has its share; the subset always finds one.
    bool ring_full = !s.kept && ring_used_ >= slot_count_ - kept_count_;
    uint32_t slot = ring_full ? kNil : lists_[static_cast<uint32_t>(List::kFree)].head;
    Admission admission;
    if (slot == kNil) {
        slot = victim(purpose);
        if (slot == kNil) {
            return admission;
        }
        admission.evicted_stride = slots_[slot].stride;
        admission.evicted_unused = !strides_[admission.evicted_stride].used;
        release_slot(admission.evicted_stride);
        strides_[admission.evicted_stride].state = StrideState::kAbsent;
    }
    admission.slot_index = slot;
    ring_used_ += s.kept ? 0 : 1;
    slots_[slot].stride = stride;
    s.slot = slot;
    s.state = StrideState::kReading;
    s.used = false;
    s.used_pass = pass_count_;
    move(slot, List::kReading);
    return admission;
}

void NeuronCache::pin(uint32_t stride) {
    HY_CHECK(stride < stride_count_ && strides_[stride].state != StrideState::kAbsent);
    Stride& s = strides_[stride];
    if (s.pins++ == 0 && s.state == StrideState::kReady) {
        move(s.slot, List::kPinned);
    }
    s.used = true;
}

void NeuronCache::unpin(uint32_t stride) {
    HY_CHECK(stride < stride_count_ && strides_[stride].pins > 0);
    Stride& s = strides_[stride];
    if (--s.pins > 0) {
        return;
    }
    if (s.state == StrideState::kReady) {
        rest(s.slot);
    } else if (s.state == StrideState::kFailed) {
        s.state = StrideState::kAbsent;
    }
}

void NeuronCache::complete(uint32_t stride) {
    HY_CHECK(stride < stride_count_ && strides_[stride].state == StrideState::kReading);
    Stride& s = strides_[stride];
    s.state = StrideState::kReady;
    if (s.pins > 0) {
        move(s.slot, List::kPinned);
    } else {
        rest(s.slot);
    }
}

void NeuronCache::fail(uint32_t stride) {
    HY_CHECK(stride < stride_count_ && strides_[stride].state == StrideState::kReading);
    release_slot(stride);
    strides_[stride].state = strides_[stride].pins > 0 ? StrideState::kFailed : StrideState::kAbsent;
}

void NeuronCache::cancel(uint32_t stride) {
    HY_CHECK(stride < stride_count_ && strides_[stride].state == StrideState::kReading && strides_[stride].pins == 0);
    release_slot(stride);
    strides_[stride].state = StrideState::kAbsent;
}

void NeuronCache::abandon(uint32_t stride) {
    HY_CHECK(stride < stride_count_);
    Stride& s = strides_[stride];
    if (s.slot == kNil || s.used) {
        return;
    }
    s.used = true;
    if (slots_[s.slot].list == List::kFresh) {
        rest(s.slot);
    }
}

// ---- lists

void NeuronCache::release_slot(uint32_t stride) {
    Stride& s = strides_[stride];
    ring_used_ -= s.kept ? 0 : 1;
    move(s.slot, List::kFree);
    slots_[s.slot].stride = kNil;
    s.slot = kNil;
}

void NeuronCache::rest(uint32_t slot) {
    const Stride& s = strides_[slots_[slot].stride];
    bool ring = policy_.kind == PolicyKind::kPinnedCyclic;
    move(slot, s.kept ? List::kKept : ring && !s.used ? List::kFresh : List::kIdle);
}

// The only place that takes a slot off a list and puts it on one.
void NeuronCache::move(uint32_t slot, List to) {
    Slot& s = slots_[slot];
    if (s.list == List::kIdle) {
        unindex_idle(slot);
    }
    if (to == List::kFree && s.heap_at != kNil) {
        heap_remove(s.heap_at);
    }
    Ends& from = lists_[static_cast<uint32_t>(s.list)];
    HY_CHECK(from.count > 0);
    from.count--;
    (s.prev == kNil ? from.head : slots_[s.prev].next) = s.next;
    (s.next == kNil ? from.tail : slots_[s.next].prev) = s.prev;
    Ends& ends = lists_[static_cast<uint32_t>(to)];
    s.list = to;
    s.next = kNil;
    s.prev = ends.tail;
    (s.prev == kNil ? ends.head : slots_[s.prev].next) = slot;
    ends.tail = slot;
    ends.count++;
    if (to == List::kIdle) {
        index_idle(slot);
    }
}

void NeuronCache::index_idle(uint32_t slot) {
    if (policy_.kind == PolicyKind::kLfuDecay) {
        if (slots_[slot].heap_at == kNil) {
            heap_set(heap_count_, heap_entry(slot));
            heap_up(heap_count_++);
        }
    } else if (policy_.kind == PolicyKind::kLeastStale) {
        uint32_t order = strides_[slots_[slot].stride].order;
        Ends& ends = orders_[order];
        slots_[slot].order_prev = ends.tail;
        slots_[slot].order_next = kNil;
        (ends.tail == kNil ? ends.head : slots_[ends.tail].order_next) = slot;
        ends.tail = slot;
        ends.count++;
        order_bits_[order / 64] |= 1ull << order % 64;
    }
}

void NeuronCache::unindex_idle(uint32_t slot) {
    Slot& s = slots_[slot];
    if (policy_.kind == PolicyKind::kLeastStale) {
        uint32_t order = strides_[s.stride].order;
        Ends& ends = orders_[order];
        (s.order_prev == kNil ? ends.head : slots_[s.order_prev].order_next) = s.order_next;
        (s.order_next == kNil ? ends.tail : slots_[s.order_next].order_prev) = s.order_prev;
        s.order_prev = s.order_next = kNil;
        if (--ends.count == 0) {
            order_bits_[order / 64] &= ~(1ull << order % 64);
        }
    }
}

// ---- policy

uint32_t NeuronCache::victim(Purpose purpose) {
    const Ends& idle = lists_[static_cast<uint32_t>(List::kIdle)];
    uint32_t slot = idle.head;
    if (policy_.kind == PolicyKind::kLfuDecay) {
        slot = least_used();
    } else if (policy_.kind == PolicyKind::kLeastStale) {
        slot = stalest();
    }
    if (slot == kNil && purpose == Purpose::kDemand) {
        slot = lists_[static_cast<uint32_t>(List::kFresh)].tail;
    }
    if (slot != kNil && purpose == Purpose::kPrefetch && !strides_[slots_[slot].stride].used) {
        return kNil;
    }
    return slot;
}

uint32_t NeuronCache::stalest() const {
    uint32_t oldest = lists_[static_cast<uint32_t>(List::kIdle)].head;
    if (oldest == kNil) {
        return kNil;
    }
    // The idle list is in the order of release, so its head is the longest unused.
    if (strides_[slots_[oldest].stride].used_pass + policy_.stale_after_passes < pass_count_) {
        return oldest;
    }
    // The next op with an idle slot, from the current one backwards and around.
    uint32_t words = order_count_ / 64 + 1;
    uint32_t word = current_order_ / 64;
    uint64_t bits = order_bits_[word] & (~0ull >> (63 - current_order_ % 64));
    for (uint32_t i = 0; i <= words; i++) {
        if (bits != 0) {
            return orders_[word * 64 + 63 - static_cast<uint32_t>(__builtin_clzll(bits))].head;
        }
        word = word == 0 ? words - 1 : word - 1;
        bits = order_bits_[word];
    }
    HY_CHECK(false);
    return kNil;
}

// An entry's score is at most its stride's, so a top entry that is idle and up to date is the least of all idle ones.
uint32_t NeuronCache::least_used() {
    while (heap_count_ > 0) {
        uint32_t slot = heap_[0].slot;
        if (slots_[slot].list != List::kIdle) {
            heap_remove(0); // comes back when it is idle again
        } else if (heap_[0].used_at != strides_[slots_[slot].stride].used_at) {
            heap_[0] = heap_entry(slot);
            heap_down(0);
        } else {
            return slot;
        }
    }
    return kNil;
}

NeuronCache::HeapEntry NeuronCache::heap_entry(uint32_t slot) const {
    const Stride& s = strides_[slots_[slot].stride];
    return {s.score, s.used_at, slot};
}

bool NeuronCache::goes_before(const HeapEntry& a, const HeapEntry& b) const {
    if (a.score != b.score) {
        return a.score < b.score;
    }
    return a.used_at != b.used_at ? a.used_at > b.used_at : slots_[a.slot].stride < slots_[b.slot].stride;
}

void NeuronCache::heap_set(uint32_t at, const HeapEntry& entry) {
    heap_[at] = entry;
    slots_[entry.slot].heap_at = at;
}

void NeuronCache::heap_remove(uint32_t at) {
    slots_[heap_[at].slot].heap_at = kNil;
    HeapEntry last = heap_[--heap_count_];
    if (at < heap_count_) {
        heap_set(at, last);
        heap_up(at);
        heap_down(slots_[last.slot].heap_at);
    }
}

void NeuronCache::heap_up(uint32_t at) {
    HeapEntry entry = heap_[at];
    while (at > 0 && goes_before(entry, heap_[(at - 1) / 2])) {
        heap_set(at, heap_[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    heap_set(at, entry);
}

void NeuronCache::heap_down(uint32_t at) {
    HeapEntry entry = heap_[at];
    for (;;) {
        uint32_t child = at * 2 + 1;
        if (child >= heap_count_) {
            break;
        }
        if (child + 1 < heap_count_ && goes_before(heap_[child + 1], heap_[child])) {
            child++;
        }
        if (!goes_before(heap_[child], entry)) {
            break;
        }
        heap_set(at, heap_[child]);
        at = child;
    }
    heap_set(at, entry);
}

// ---- invariants

SlotCounts NeuronCache::counts() const {
    auto of = [this](List list) { return lists_[static_cast<uint32_t>(list)].count; };
    SlotCounts counts{of(List::kFree), of(List::kReading), of(List::kIdle) + of(List::kFresh) + of(List::kKept),
                      of(List::kPinned)};
    HY_CHECK(counts.free + counts.reading + counts.ready_unpinned + counts.ready_pinned == slot_count_);
    return counts;
}

void NeuronCache::check() const {
    counts();
    uint32_t listed = 0;
    for (uint32_t i = 0; i < kListCount; i++) {
        uint32_t seen = 0;
        uint32_t prev = kNil;
        for (uint32_t slot = lists_[i].head; slot != kNil; slot = slots_[slot].next) {
            HY_CHECK(static_cast<uint32_t>(slots_[slot].list) == i && slots_[slot].prev == prev);
            prev = slot;
            seen++;
            HY_CHECK(seen <= slot_count_);
        }
        HY_CHECK(seen == lists_[i].count && lists_[i].tail == prev);
        listed += seen;
    }
    HY_CHECK(listed == slot_count_);
    uint32_t held = 0;
    uint32_t ring = 0;
    for (uint32_t i = 0; i < stride_count_; i++) {
        const Stride& s = strides_[i];
        bool holds = s.state == StrideState::kReading || s.state == StrideState::kReady;
        HY_CHECK(holds == (s.slot != kNil));
        HY_CHECK(s.state != StrideState::kAbsent || s.pins == 0);
        HY_CHECK(s.state != StrideState::kFailed || s.pins > 0);
        held += holds ? 1 : 0;
        ring += holds && !s.kept ? 1 : 0;
        if (holds) {
            List list = slots_[s.slot].list;
            HY_CHECK(slots_[s.slot].stride == i);
            HY_CHECK((list == List::kReading) == (s.state == StrideState::kReading));
            HY_CHECK(s.state == StrideState::kReading || (list == List::kPinned) == (s.pins > 0));
            HY_CHECK((list == List::kKept) == (s.kept && list != List::kReading && list != List::kPinned));
        }
    }
    HY_CHECK(held == slot_count_ - lists_[static_cast<uint32_t>(List::kFree)].count);
    HY_CHECK(ring == ring_used_ && (kept_count_ == 0 || ring_used_ <= slot_count_ - kept_count_ || ring == 0));
    uint32_t idle = lists_[static_cast<uint32_t>(List::kIdle)].count;
    uint32_t idle_entries = 0;
    for (uint32_t i = 0; i < heap_count_; i++) {
        uint32_t slot = heap_[i].slot;
        HY_CHECK(slots_[slot].heap_at == i);
        HY_CHECK(slots_[slot].list == List::kIdle || slots_[slot].list == List::kPinned);
        HY_CHECK(!goes_before(heap_entry(slot), heap_[i]));
        HY_CHECK(i == 0 || !goes_before(heap_[i], heap_[(i - 1) / 2]));
        idle_entries += slots_[slot].list == List::kIdle ? 1 : 0;
    }
    HY_CHECK(policy_.kind == PolicyKind::kLfuDecay ? idle_entries == idle : heap_count_ == 0);
    uint32_t ordered = 0;
    for (uint32_t i = 0; policy_.kind == PolicyKind::kLeastStale && i < order_count_; i++) {
        HY_CHECK((orders_[i].count > 0) == ((order_bits_[i / 64] >> i % 64 & 1) != 0));
        ordered += orders_[i].count;
    }
    HY_CHECK(policy_.kind != PolicyKind::kLeastStale || ordered == idle);
}

} // namespace hypura

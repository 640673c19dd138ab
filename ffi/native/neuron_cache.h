// The table stride -> slot of one class, with pins and the policy that chooses whom to evict. It owns no bytes and does
// no reading, has no thread, no lock and no clock: a pure data structure, so that a model-based test and a fuzzer can
// decide whether it is right. Its owner (the stream) guards it and numbers the strides of the class 0..n-1.
//
// States of a stride, and what holds a slot:
//
//     absent --admit--> reading --complete--> ready --(evicted by an admit)--> absent
//                          |--cancel--> absent (only unpinned)
//                          |--fail----> failed while pinned, then absent; absent at once when not pinned
//
// A slot is on exactly one list: free, reading, ready-pinned, or one of three that together are "ready-unpinned": idle
// (evictable), fresh (prefetched into a ring and not yet used) and kept (never evicted by policy). A pinned or reading
// slot is on no list that eviction looks at, so it cannot be evicted.
//
// Policies, each with its cost for one eviction:
//   lru           the longest unpinned goes. O(1). Worthless below one token's working set: a cyclic scan then evicts
//                 each stride just before its next use and never hits. So when slot_count < working_set_strides, open()
//                 takes pinned_cyclic with slot_count - guard_ring_slots kept slots instead: an evenly spread subset
//                 stays for good and hits at its share, everything else passes through the ring.
//   lfu_decay     the least used goes, by a count of routed tokens that halves every half_life_tokens. The count is
//                 kept for absent strides too. Counting tokens and not passes matters: with several tokens in a pass
//                 the pass counts tie. On a tie the most recently used goes, so that a scan over equal strides keeps a
//                 part of them. Binary heap, O(log slots) for an eviction, nothing for a use: scores only grow, so an
//                 entry is put right when it comes to the top. Decay costs nothing per stride: the weight of a new token
//                 grows. A long pass may count as a shorter one, with the same proportions: the core computes the last
//                 layer of a prompt for its last token alone, so against the whole weight of a long prompt the experts
//                 of that layer would be the first to go for as many tokens as the prompt had.
//   least_stale   first what no op used for stale_after_passes passes, longest unused first; else what the order of ops
//                 needs last again, which is what the op just done and its predecessors used. O(ops / 64).
//   pinned_cyclic a fixed subset of pinned_slots strides, evenly spread over the stride numbers (or a given one: the
//                 hot strides, and the ring is then LRU for the rest), is never evicted once ready; the rest share the other slots as a ring: the first consumed goes first, and what a prefetch
//                 brought and nobody has used goes last (newest first). O(1).
#pragma once

#include "platform.h"

#include <memory>

namespace hypura {

enum class PolicyKind : uint8_t { kLru, kLfuDecay, kLeastStale, kPinnedCyclic };

struct CachePolicy {
    PolicyKind kind = PolicyKind::kLru;
    double half_life_tokens = 0;      // lfu_decay; 0: never forget
    uint32_t most_pass_tokens = 0;    // lfu_decay: a pass of more tokens counts as so many; 0: as it is
    uint32_t stale_after_passes = 0;  // least_stale
    uint32_t pinned_slots = 0;        // pinned_cyclic
    uint32_t working_set_strides = 0; // lru: strides of this class that one token touches
    uint32_t guard_ring_slots = 1;    // lru: ring when the guard takes over
};

struct CacheShape {
    uint32_t slot_count;
    Span<const uint32_t> order_index; // for each stride its op's place in the order of a pass (several may share one)
    // pinned_cyclic: for each stride whether it is of the subset; fewer than the slots, or all. Empty: evenly spread.
    Span<const uint8_t> kept = {};
};

enum class StrideState : uint8_t { kAbsent, kReading, kReady, kFailed };

enum class Purpose : uint8_t { kDemand, kPrefetch };

struct Admission {
    uint32_t slot_index = UINT32_MAX;     // UINT32_MAX: no slot may be taken
    uint32_t evicted_stride = UINT32_MAX; // UINT32_MAX: the slot was free
    bool evicted_unused = false;          // a prefetch that nobody came for

    bool taken() const { return slot_index != UINT32_MAX; }
};

struct SlotCounts {
    uint32_t free = 0;
    uint32_t reading = 0;
    uint32_t ready_unpinned = 0;
    uint32_t ready_pinned = 0;
};

class NeuronCache {
public:
    // Allocates; nothing below does. slot_count > 0; at least one slot is left to the ring of a pinned policy.
    void open(const CacheShape& shape, const CachePolicy& policy);

    // A new pass begins, of this many tokens: the clock of decay and staleness.
    void begin_pass(uint32_t token_count);
    // An op uses the stride for this many routed tokens.
    void touch(uint32_t stride, uint32_t token_count);

    // absent -> reading. A demand may evict any idle slot; a prefetch none that an unused prefetch fills. Not pinned.
    Admission admit(uint32_t stride, Purpose purpose);
    void pin(uint32_t stride); // any state but absent
    void unpin(uint32_t stride);
    void complete(uint32_t stride); // reading -> ready; the caller vouches for every byte
    void fail(uint32_t stride);     // reading -> failed, or absent when not pinned; the slot is free
    void cancel(uint32_t stride);   // reading, not pinned -> absent; the slot is free
    // A prefetch that is not expected to be used any more is evictable like all else.
    void abandon(uint32_t stride);

    StrideState state(uint32_t stride) const { return strides_[stride].state; }
    uint32_t slot(uint32_t stride) const { return strides_[stride].slot; }
    uint32_t pins(uint32_t stride) const { return strides_[stride].pins; }
    bool kept(uint32_t stride) const { return strides_[stride].kept; }
    bool used(uint32_t stride) const { return strides_[stride].used; } // pinned since it was admitted
    double score(uint32_t stride) const { return strides_[stride].score; }
    uint32_t stride_at(uint32_t slot) const { return slots_[slot].stride; }
    uint32_t stride_count() const { return stride_count_; }
    uint32_t slot_count() const { return slot_count_; }
    const CachePolicy& effective_policy() const { return policy_; } // after the guard
    SlotCounts counts() const;

    // Every invariant of this page, O(strides + slots); aborts when one is broken.
    void check() const;

private:
    enum class List : uint8_t { kFree, kReading, kPinned, kIdle, kFresh, kKept };
    static constexpr uint32_t kListCount = 6;
    static constexpr uint32_t kNil = UINT32_MAX;

    struct Stride {
        double score = 0;     // lfu_decay: routed tokens, in units of the weight when the clock was zero
        uint64_t used_at = 0; // number of the touch; orders equal scores
        uint64_t used_pass = 0;
        uint32_t slot = kNil;
        uint32_t pins = 0;
        uint32_t order = 0;
        StrideState state = StrideState::kAbsent;
        bool kept = false; // in the pinned subset of pinned_cyclic
        bool used = false;
    };
    struct Slot {
        uint32_t stride = kNil;
        uint32_t prev = kNil; // of its list
        uint32_t next = kNil;
        uint32_t heap_at = kNil;    // lfu_decay: every idle one has an entry, a pinned one may
        uint32_t order_prev = kNil; // least_stale, idle only: slots of one op
        uint32_t order_next = kNil;
        List list = List::kFree;
    };
    // What a slot's stride had when the entry was made: a touch changes the stride alone.
    struct HeapEntry {
        double score;
        uint64_t used_at;
        uint32_t slot;
    };
    struct Ends {
        uint32_t head = kNil;
        uint32_t tail = kNil;
        uint32_t count = 0;
    };

    void choose_kept(Span<const uint8_t> kept);
    void move(uint32_t slot, List to);
    void rest(uint32_t slot); // an unpinned ready slot goes to its list
    void release_slot(uint32_t stride);
    void index_idle(uint32_t slot);
    void unindex_idle(uint32_t slot);
    uint32_t victim(Purpose purpose);
    uint32_t least_used();
    uint32_t stalest() const;
    HeapEntry heap_entry(uint32_t slot) const;
    bool goes_before(const HeapEntry& a, const HeapEntry& b) const;
    void heap_up(uint32_t at);
    void heap_down(uint32_t at);
    void heap_remove(uint32_t at);
    void heap_set(uint32_t at, const HeapEntry& entry);
    void rescale();

    std::unique_ptr<Stride[]> strides_;
    std::unique_ptr<Slot[]> slots_;
    std::unique_ptr<HeapEntry[]> heap_;
    std::unique_ptr<Ends[]> orders_;
    std::unique_ptr<uint64_t[]> order_bits_; // a bit for each op that has an idle slot
    Ends lists_[kListCount];
    CachePolicy policy_;
    uint32_t stride_count_ = 0;
    uint32_t slot_count_ = 0;
    uint32_t order_count_ = 0;
    uint32_t heap_count_ = 0;
    uint32_t kept_count_ = 0; // strides of the pinned subset
    uint32_t ring_used_ = 0;  // slots that strides outside the subset hold
    uint32_t current_order_ = 0;
    uint64_t touch_count_ = 0;
    uint64_t pass_count_ = 0;
    double pass_share_ = 1; // of a token of this pass, what counts
    double weight_ = 1; // of one token now
};

} // namespace hypura

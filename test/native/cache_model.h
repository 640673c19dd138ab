// The neuron cache as anyone would write it who did not care about speed, and a driver that feeds the same operations
// to both and compares. The operations come from a stream of bytes: a generator's or a fuzzer's.
#pragma once

#include "check.h"
#include "neuron_cache.h"

#include <cmath>
#include <vector>

struct ModelStride {
    hypura::StrideState state = hypura::StrideState::kAbsent;
    uint32_t pins = 0;
    uint32_t order = 0;
    bool kept = false;
    bool used = false;
    bool fresh = false;     // on the fresh list
    uint64_t rested_at = 0; // when it became idle or fresh; 0: it is neither
    uint64_t used_at = 0;
    uint64_t used_pass = 0;
    double score = 0;
};

struct CacheModel {
    std::vector<ModelStride> strides;
    hypura::CachePolicy policy; // effective
    uint32_t slot_count = 0;
    uint32_t kept_count = 0;
    uint32_t order_count = 0;
    uint32_t current_order = 0;
    uint64_t clock = 0;
    uint64_t pass = 0;
    double pass_share = 1;

    bool holds(const ModelStride& s) const {
        return s.state == hypura::StrideState::kReading || s.state == hypura::StrideState::kReady;
    }

    uint32_t victim(hypura::Purpose purpose) const {
        uint32_t best = UINT32_MAX;
        uint32_t oldest = UINT32_MAX;
        for (uint32_t i = 0; i < strides.size(); i++) {
            if (strides[i].rested_at != 0 && !strides[i].fresh) {
                oldest = oldest == UINT32_MAX || strides[i].rested_at < strides[oldest].rested_at ? i : oldest;
                best = best == UINT32_MAX || before(i, best) ? i : best;
            }
        }
        bool stale = policy.kind == hypura::PolicyKind::kLeastStale && oldest != UINT32_MAX &&
                     strides[oldest].used_pass + policy.stale_after_passes < pass;
        best = stale ? oldest : best;
        if (best == UINT32_MAX && purpose == hypura::Purpose::kDemand) {
            for (uint32_t i = 0; i < strides.size(); i++) {
                if (strides[i].fresh && (best == UINT32_MAX || strides[i].rested_at > strides[best].rested_at)) {
                    best = i;
                }
            }
        }
        bool refused = best != UINT32_MAX && purpose == hypura::Purpose::kPrefetch && !strides[best].used;
        return refused ? UINT32_MAX : best;
    }

    bool before(uint32_t a, uint32_t b) const {
        const ModelStride& x = strides[a];
        const ModelStride& y = strides[b];
        if (policy.kind == hypura::PolicyKind::kLfuDecay) {
            return x.score != y.score ? x.score < y.score : x.used_at > y.used_at;
        }
        if (policy.kind == hypura::PolicyKind::kLeastStale && x.order != y.order) {
            return ops_until(x.order) > ops_until(y.order);
        }
        return x.rested_at < y.rested_at;
    }

    uint32_t ops_until(uint32_t order) const {
        uint32_t ahead = (order + order_count - current_order) % order_count;
        return ahead == 0 ? order_count : ahead;
    }

    void rest(ModelStride& s) {
        s.fresh = policy.kind == hypura::PolicyKind::kPinnedCyclic && !s.used && !s.kept;
        s.rested_at = s.kept ? 0 : ++clock;
    }

    // Whether a slot was taken, and from whom.
    bool admit(uint32_t stride, hypura::Purpose purpose, uint32_t* evicted) {
        ModelStride& s = strides[stride];
        current_order = purpose == hypura::Purpose::kDemand ? s.order : current_order;
        uint32_t held = 0;
        uint32_t ring = 0;
        for (const ModelStride& other : strides) {
            held += holds(other) ? 1 : 0;
            ring += holds(other) && !other.kept ? 1 : 0;
        }
        *evicted = UINT32_MAX;
        if (held == slot_count || (!s.kept && ring >= slot_count - kept_count)) {
            *evicted = victim(purpose);
            if (*evicted == UINT32_MAX) {
                return false;
            }
            strides[*evicted].state = hypura::StrideState::kAbsent;
            strides[*evicted].rested_at = 0;
            strides[*evicted].fresh = false;
        }
        s.state = hypura::StrideState::kReading;
        s.used = false;
        s.used_pass = pass;
        return true;
    }
};

template <typename Bytes> class CacheDriver {
public:
    explicit CacheDriver(Bytes bytes) : bytes_(bytes) {
        hypura::CachePolicy policy;
        policy.kind = static_cast<hypura::PolicyKind>(bytes_() % 4);
        policy.half_life_tokens = bytes_() % 4 == 0 ? 0 : 4;
        policy.most_pass_tokens = bytes_() % 3 * 4;
        policy.stale_after_passes = bytes_() % 4;
        uint32_t slots = 1 + bytes_() % 16;
        uint32_t count = 1 + bytes_() % 40;
        policy.pinned_slots = bytes_() % slots;
        policy.working_set_strides = bytes_() % 20;
        policy.guard_ring_slots = 1 + bytes_() % slots;
        model_.slot_count = slots;
        model_.strides.resize(count);
        std::vector<uint32_t> orders;
        uint32_t ops = 1 + bytes_() % 100;
        for (ModelStride& s : model_.strides) {
            s.order = bytes_() % ops;
            orders.push_back(s.order);
            model_.order_count = s.order + 1 > model_.order_count ? s.order + 1 : model_.order_count;
        }
        cache_.open({slots, {orders.data(), count}}, policy);
        if (policy.kind == hypura::PolicyKind::kLru && slots < policy.working_set_strides && slots < count) {
            uint32_t ring = policy.guard_ring_slots < slots ? policy.guard_ring_slots : slots;
            policy.kind = hypura::PolicyKind::kPinnedCyclic;
            policy.pinned_slots = slots - ring;
        }
        model_.policy = policy;
        CHECK(cache_.effective_policy().kind == policy.kind);
        for (uint32_t i = 0; i < count; i++) {
            model_.strides[i].kept = cache_.kept(i);
            model_.kept_count += cache_.kept(i) ? 1 : 0;
        }
        bool ring = policy.kind == hypura::PolicyKind::kPinnedCyclic;
        CHECK(model_.kept_count == (!ring ? 0 : count <= slots ? count : policy.pinned_slots));
    }

    void step() {
        uint32_t stride = bytes_() % static_cast<uint32_t>(model_.strides.size());
        ModelStride& s = model_.strides[stride];
        switch (bytes_() % 12) {
        case 0:
        case 1:
        case 2:
            if (s.state == hypura::StrideState::kAbsent && admit(stride, hypura::Purpose::kDemand)) {
                pin(stride);
            }
            break;
        case 3:
            if (s.state == hypura::StrideState::kAbsent) {
                admit(stride, hypura::Purpose::kPrefetch);
            }
            break;
        case 4:
            pin(stride);
            break;
        case 5:
        case 6:
            unpin(stride);
            break;
        case 7:
        case 8:
            end_read(stride);
            break;
        case 9:
        case 10:
            touch(stride);
            break;
        default:
            begin_pass_or_abandon(stride);
        }
        compare();
    }

    void settle() { // every pin goes, every read ends, and nothing may be left
        for (uint32_t i = 0; i < model_.strides.size(); i++) {
            while (model_.strides[i].pins > 0) {
                unpin(i);
            }
            if (model_.strides[i].state == hypura::StrideState::kReading) {
                cache_.complete(i);
                model_.strides[i].state = hypura::StrideState::kReady;
                model_.rest(model_.strides[i]);
            }
        }
        compare();
        cache_.check();
        hypura::SlotCounts counts = cache_.counts();
        CHECK(counts.reading == 0 && counts.ready_pinned == 0);
    }

private:
    bool admit(uint32_t stride, hypura::Purpose purpose) {
        uint32_t evicted;
        bool taken = model_.admit(stride, purpose, &evicted);
        bool unused = evicted != UINT32_MAX && !model_.strides[evicted].used;
        hypura::Admission admission = cache_.admit(stride, purpose);
        CHECK(admission.taken() == taken && admission.evicted_stride == evicted && admission.evicted_unused == unused);
        CHECK(!taken || cache_.stride_at(admission.slot_index) == stride);
        return taken;
    }
    void pin(uint32_t stride) {
        ModelStride& s = model_.strides[stride];
        if (s.state != hypura::StrideState::kAbsent) {
            s.pins++;
            s.used = true;
            s.rested_at = 0;
            s.fresh = false;
            cache_.pin(stride);
        }
    }
    void unpin(uint32_t stride) {
        ModelStride& s = model_.strides[stride];
        if (s.pins == 0) {
            return;
        }
        cache_.unpin(stride);
        if (--s.pins == 0 && s.state == hypura::StrideState::kReady) {
            model_.rest(s);
        } else if (s.pins == 0 && s.state == hypura::StrideState::kFailed) {
            s.state = hypura::StrideState::kAbsent;
        }
    }
    void end_read(uint32_t stride) {
        ModelStride& s = model_.strides[stride];
        if (s.state != hypura::StrideState::kReading) {
            return;
        }
        uint32_t how = bytes_() % 8;
        if (how == 0) {
            cache_.fail(stride);
            s.state = s.pins > 0 ? hypura::StrideState::kFailed : hypura::StrideState::kAbsent;
        } else if (how == 1 && s.pins == 0) {
            cache_.cancel(stride);
            s.state = hypura::StrideState::kAbsent;
        } else {
            cache_.complete(stride);
            s.state = hypura::StrideState::kReady;
            if (s.pins == 0) {
                model_.rest(s);
            }
        }
    }
    void touch(uint32_t stride) {
        ModelStride& s = model_.strides[stride];
        uint32_t tokens = bytes_() % 8;
        cache_.touch(stride, tokens);
        s.score += tokens * model_.pass_share;
        s.used_at = ++model_.clock;
        s.used_pass = model_.pass;
        model_.current_order = s.order;
    }
    void begin_pass_or_abandon(uint32_t stride) {
        ModelStride& s = model_.strides[stride];
        if (bytes_() % 2 == 0) {
            cache_.abandon(stride);
            bool holds = model_.holds(s);
            if (holds && !s.used) {
                s.used = true;
                if (s.fresh) {
                    model_.rest(s);
                }
            }
            return;
        }
        // Whole half-lives: powers of two, so that decaying each score and growing the weight round alike. Few enough
        // that no score vanishes here while it lives there.
        uint32_t half_lives = bytes_() % 4;
        uint32_t tokens = half_lives * 4;
        uint32_t most = model_.policy.most_pass_tokens;
        cache_.begin_pass(tokens);
        model_.pass++;
        model_.pass_share = most > 0 && tokens > most ? static_cast<double>(most) / tokens : 1;
        half_lives = most > 0 && tokens > most ? most / 4 : half_lives;
        if (model_.policy.kind == hypura::PolicyKind::kLfuDecay && model_.policy.half_life_tokens > 0) {
            for (ModelStride& each : model_.strides) {
                each.score = std::ldexp(each.score, -static_cast<int>(half_lives));
            }
        }
    }
    void compare() {
        for (uint32_t i = 0; i < model_.strides.size(); i++) {
            const ModelStride& s = model_.strides[i];
            CHECK(cache_.state(i) == s.state && cache_.pins(i) == s.pins);
            CHECK(model_.holds(s) == (cache_.slot(i) != UINT32_MAX));
            CHECK(!model_.holds(s) || cache_.stride_at(cache_.slot(i)) == i);
        }
        if (++steps_ % 16 == 0) {
            cache_.check();
        }
    }

    Bytes bytes_;
    CacheModel model_;
    hypura::NeuronCache cache_;
    uint64_t steps_ = 0;
};

// Hit rates of the policies beside Belady's optimum on a synthetic router: 24 layers of 64 experts, 8 of them for each
// token, router logits -0.9 ln(rank) plus normal noise of 0.7 fresh at each token. That noise gives about the optimum
// of the trace of a 24-layer test model with such a router (39, 68, 90.5, 99.4 %). A flatter router leaves more between
// any online policy and the optimum: draws that do not depend on the past cannot be foreseen, only their frequencies.
#include "check.h"
#include "neuron_cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

using namespace hypura;

namespace {

constexpr uint32_t kLayers = 24;
constexpr uint32_t kExperts = 64;
constexpr uint32_t kUsed = 8;
constexpr uint32_t kStrides = kLayers * kExperts;
constexpr uint32_t kTokens = 600;
constexpr uint32_t kWarm = 100; // tokens that fill the cache and are not counted

// Acquires in order; kUsed for each layer of each token.
std::vector<uint32_t> make_trace() {
    Random random{42};
    std::vector<std::vector<uint32_t>> rank_of(kLayers);
    for (std::vector<uint32_t>& ranks : rank_of) {
        for (uint32_t i = 0; i < kExperts; i++) {
            ranks.push_back(i);
            std::swap(ranks[i], ranks[random.below(i + 1)]);
        }
    }
    std::vector<uint32_t> trace;
    for (uint32_t token = 0; token < kTokens; token++) {
        for (uint32_t layer = 0; layer < kLayers; layer++) {
            std::vector<std::pair<double, uint32_t>> logits;
            for (uint32_t expert = 0; expert < kExperts; expert++) {
                double noise = -6; // sum of 12 uniforms: near enough to a normal of variance 1
                for (int i = 0; i < 12; i++) {
                    noise += random.unit();
                }
                double logit = -0.9 * std::log(1.0 + rank_of[layer][expert]) + 0.7 * noise;
                logits.push_back({logit, layer * kExperts + expert});
            }
            std::partial_sort(logits.begin(), logits.begin() + kUsed, logits.end(), std::greater<>());
            for (uint32_t i = 0; i < kUsed; i++) {
                trace.push_back(logits[i].second);
            }
        }
    }
    return trace;
}

// An op takes its strides together: all are pinned while it runs.
double hit_rate(const std::vector<uint32_t>& trace, uint32_t slots, const CachePolicy& policy) {
    std::vector<uint32_t> order(kStrides);
    for (uint32_t i = 0; i < kStrides; i++) {
        order[i] = i / kExperts;
    }
    NeuronCache cache;
    cache.open({slots, {order.data(), kStrides}}, policy);
    uint64_t hits = 0;
    for (size_t at = 0; at < trace.size(); at += kUsed) {
        if (at % (kLayers * kUsed) == 0) {
            cache.begin_pass(1);
        }
        for (size_t i = at; i < at + kUsed; i++) {
            if (cache.state(trace[i]) == StrideState::kReady) {
                cache.pin(trace[i]);
                hits += i >= kWarm * kLayers * kUsed ? 1 : 0;
            }
        }
        for (size_t i = at; i < at + kUsed; i++) {
            if (cache.state(trace[i]) == StrideState::kAbsent) {
                CHECK(cache.admit(trace[i], Purpose::kDemand).taken());
                cache.pin(trace[i]);
                cache.complete(trace[i]);
            }
            cache.touch(trace[i], 1);
        }
        for (size_t i = at; i < at + kUsed; i++) {
            cache.unpin(trace[i]);
        }
    }
    cache.check();
    return 100.0 * static_cast<double>(hits) / static_cast<double>(trace.size() - kWarm * kLayers * kUsed);
}

// Evicts what is used farthest in the future; what is farther than all residents is not kept (it passes through).
double belady(const std::vector<uint32_t>& trace, uint32_t slots) {
    const size_t never = trace.size();
    std::vector<size_t> next(trace.size());
    std::vector<size_t> last(kStrides, never);
    for (size_t i = trace.size(); i-- > 0;) {
        next[i] = last[trace[i]];
        last[trace[i]] = i;
    }
    std::vector<size_t> resident(kStrides, SIZE_MAX); // next use, or not resident
    uint32_t held = 0;
    uint64_t hits = 0;
    for (size_t i = 0; i < trace.size(); i++) {
        if (resident[trace[i]] != SIZE_MAX) {
            hits += i >= kWarm * kLayers * kUsed ? 1 : 0;
            resident[trace[i]] = next[i];
            continue;
        }
        if (held < slots) {
            held++;
            resident[trace[i]] = next[i];
            continue;
        }
        uint32_t farthest = 0;
        for (uint32_t s = 0; s < kStrides; s++) {
            bool better =
                resident[s] != SIZE_MAX && (resident[farthest] == SIZE_MAX || resident[s] > resident[farthest]);
            farthest = better ? s : farthest;
        }
        if (resident[farthest] > next[i]) {
            resident[farthest] = SIZE_MAX;
            resident[trace[i]] = next[i];
        }
    }
    return 100.0 * static_cast<double>(hits) / static_cast<double>(trace.size() - kWarm * kLayers * kUsed);
}

} // namespace

int main() {
    std::vector<uint32_t> trace = make_trace();
    CachePolicy lru;
    CachePolicy guarded;
    guarded.working_set_strides = kLayers * kUsed;
    guarded.guard_ring_slots = kUsed;
    CachePolicy lfu;
    lfu.kind = PolicyKind::kLfuDecay;
    lfu.half_life_tokens = 256;
    CachePolicy stale;
    stale.kind = PolicyKind::kLeastStale;
    stale.stale_after_passes = 4;
    std::printf("slots   belady  lfu_decay  least_stale    lru  lru guarded   (hits, %%)\n");
    for (uint32_t percent : {5u, 11u, 24u, 50u}) {
        uint32_t slots = kStrides * percent / 100;
        double best = belady(trace, slots);
        double frequency = hit_rate(trace, slots, lfu);
        std::printf("%3u %%    %5.1f      %5.1f        %5.1f  %5.1f        %5.1f\n", percent, best, frequency,
                    hit_rate(trace, slots, stale), hit_rate(trace, slots, lru), hit_rate(trace, slots, guarded));
        CHECK(frequency >= best - 9);
    }
    return 0;
}

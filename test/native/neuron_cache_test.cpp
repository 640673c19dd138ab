// The neuron cache: random operations against a naive model, the rules that have a name, and its cost.
#include "cache_model.h"

#include <vector>

using namespace hypura;

namespace {

uint64_t g_operations = 1200000;

void agrees_with_model() {
    const uint64_t per_run = 4000;
    for (uint64_t run = 0; run * per_run < g_operations; run++) {
        Random random{run * 7919};
        auto bytes = [&random]() -> uint32_t { return static_cast<uint32_t>(random.next() & 0xff); };
        CacheDriver<decltype(bytes)&> driver(bytes);
        for (uint64_t i = 0; i < per_run; i++) {
            driver.step();
        }
        driver.settle();
    }
}

struct Scan {
    NeuronCache cache;
    uint32_t hits = 0;

    Scan(uint32_t stride_count, CacheShape shape, const CachePolicy& policy) {
        std::vector<uint32_t> order(stride_count);
        for (uint32_t i = 0; i < stride_count; i++) {
            order[i] = i;
        }
        shape.order_index = {order.data(), stride_count};
        cache.open(shape, policy);
    }
    void use(uint32_t stride, uint32_t tokens = 1) {
        if (cache.state(stride) == StrideState::kAbsent) {
            CHECK(cache.admit(stride, Purpose::kDemand).taken());
            cache.complete(stride);
        } else {
            hits++;
        }
        cache.pin(stride);
        cache.touch(stride, tokens);
        cache.unpin(stride);
    }
    void pass(uint32_t stride_count) {
        cache.begin_pass(1);
        for (uint32_t i = 0; i < stride_count; i++) {
            use(i);
        }
    }
};

void cyclic_scan_keeps_a_part() {
    CachePolicy lru;
    Scan cliff(100, {40, {}}, lru); // no working set known, so no guard
    CachePolicy guarded = lru;
    guarded.working_set_strides = 100;
    guarded.guard_ring_slots = 4;
    Scan guard(100, {40, {}}, guarded);
    CachePolicy lfu;
    lfu.kind = PolicyKind::kLfuDecay;
    lfu.half_life_tokens = 64;
    Scan frequency(100, {40, {}}, lfu);
    CachePolicy stale;
    stale.kind = PolicyKind::kLeastStale;
    stale.stale_after_passes = 2;
    Scan least_stale(100, {40, {}}, stale);
    CachePolicy pinned;
    pinned.kind = PolicyKind::kPinnedCyclic;
    pinned.pinned_slots = 38;
    Scan ring(100, {40, {}}, pinned);
    for (Scan* scan : {&cliff, &guard, &frequency, &least_stale, &ring}) {
        scan->pass(100);
        scan->hits = 0;
        for (int i = 0; i < 10; i++) {
            scan->pass(100);
        }
        scan->cache.check();
    }
    std::printf("  hits of 1000 in a scan of 100 over 40 slots: lru %u, lru guarded %u, lfu_decay %u, least_stale %u, "
                "pinned_cyclic %u\n",
                cliff.hits, guard.hits, frequency.hits, least_stale.hits, ring.hits);
    CHECK(cliff.hits == 0);
    CHECK(guard.cache.effective_policy().kind == PolicyKind::kPinnedCyclic && guard.hits == 360);
    CHECK(ring.hits == 380);
    CHECK(frequency.hits >= 250 && least_stale.hits >= 350);
}

void subset_is_evenly_spread() {
    CachePolicy pinned;
    pinned.kind = PolicyKind::kPinnedCyclic;
    pinned.pinned_slots = 8;
    Scan scan(144, {12, {}}, pinned);
    uint32_t last = UINT32_MAX;
    uint32_t count = 0;
    for (uint32_t i = 0; i < 144; i++) {
        if (scan.cache.kept(i)) {
            CHECK(last == UINT32_MAX || i - last == 18);
            last = i;
            count++;
        }
    }
    CHECK(count == 8);
}

void frequency_counts_tokens() {
    CachePolicy lfu;
    lfu.kind = PolicyKind::kLfuDecay;
    Scan scan(4, {2, {}}, lfu);
    scan.use(0, 5);
    scan.use(1, 1);
    scan.use(2, 2); // evicts 1
    CHECK(scan.cache.state(0) == StrideState::kReady && scan.cache.state(1) == StrideState::kAbsent);
    scan.use(1, 7); // remembered: 8 tokens; evicts 2
    CHECK(scan.cache.score(1) == 8 && scan.cache.state(2) == StrideState::kAbsent);
}

void pinned_and_reading_stay() {
    for (PolicyKind kind :
         {PolicyKind::kLru, PolicyKind::kLfuDecay, PolicyKind::kLeastStale, PolicyKind::kPinnedCyclic}) {
        CachePolicy policy;
        policy.kind = kind;
        Scan scan(4, {2, {}}, policy);
        CHECK(scan.cache.admit(0, Purpose::kDemand).taken());
        scan.cache.pin(0);
        scan.cache.complete(0);
        CHECK(scan.cache.admit(1, Purpose::kPrefetch).taken());
        CHECK(!scan.cache.admit(2, Purpose::kDemand).taken());
        scan.cache.complete(1);
        CHECK(!scan.cache.admit(2, Purpose::kPrefetch).taken()); // 1 was prefetched and not used yet
        Admission admission = scan.cache.admit(2, Purpose::kDemand);
        CHECK(admission.evicted_stride == 1 && admission.evicted_unused);
        scan.cache.fail(2);
        CHECK(scan.cache.state(2) == StrideState::kAbsent);
        scan.cache.unpin(0);
        scan.cache.check();
    }
}

void ten_thousand_slots_are_cheap() {
    const uint32_t slots = 10000;
    const uint32_t strides = 20000;
    for (PolicyKind kind :
         {PolicyKind::kLru, PolicyKind::kLfuDecay, PolicyKind::kLeastStale, PolicyKind::kPinnedCyclic}) {
        CachePolicy policy;
        policy.kind = kind;
        policy.half_life_tokens = 100;
        policy.stale_after_passes = 50;
        policy.pinned_slots = kind == PolicyKind::kPinnedCyclic ? slots / 2 : 0;
        Scan scan(strides, {slots, {}}, policy);
        Random random{1};
        for (uint32_t i = 0; i < 3 * slots; i++) {
            scan.use(random.below(strides));
        }
        uint64_t start_ns = platform::now_ns();
        const uint32_t tokens = 100;
        for (uint32_t token = 0; token < tokens; token++) {
            scan.cache.begin_pass(1);
            for (uint32_t i = 0; i < 500; i++) {
                scan.use(random.below(strides));
            }
        }
        std::printf("  policy %u: %.1f us per token of 500 acquires\n", static_cast<unsigned>(kind),
                    static_cast<double>(platform::now_ns() - start_ns) / 1000 / tokens);
        scan.cache.check();
    }
}

} // namespace

int main(int argc, char** argv) {
    if (argc > 1) {
        g_operations = std::strtoull(argv[1], nullptr, 10);
    }
    CASE(agrees_with_model);
    CASE(cyclic_scan_keeps_a_part);
    CASE(subset_is_evenly_spread);
    CASE(frequency_counts_tokens);
    CASE(pinned_and_reading_stay);
    CASE(ten_thousand_slots_are_cheap);
    return 0;
}

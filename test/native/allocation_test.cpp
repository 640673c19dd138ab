// After open() the data plane allocates nothing: neither the consumer's calls nor the readers do. malloc itself is
// counted where the C library lets us stand in front of it, elsewhere operator new.
#include "stream_rig.h"

#include <atomic>
#include <new>

namespace {
std::atomic<uint64_t> g_allocations{0};
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HY_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define HY_SANITIZED 1
#endif
#endif

#ifdef HY_SANITIZED
// The sanitizer owns malloc and operator new: the calls below run, their allocations are not counted.
#elif defined(__GLIBC__)
extern "C" void* __libc_malloc(size_t bytes);
extern "C" void* __libc_calloc(size_t count, size_t bytes);
extern "C" void* __libc_realloc(void* at, size_t bytes);
extern "C" void* malloc(size_t bytes) {
    g_allocations++;
    return __libc_malloc(bytes);
}
extern "C" void* calloc(size_t count, size_t bytes) {
    g_allocations++;
    return __libc_calloc(count, bytes);
}
extern "C" void* realloc(void* at, size_t bytes) {
    g_allocations++;
    return __libc_realloc(at, bytes);
}
#else
void* operator new(size_t bytes) {
    g_allocations++;
    return std::malloc(bytes);
}
void operator delete(void* at) noexcept {
    std::free(at);
}
void operator delete(void* at, size_t) noexcept {
    std::free(at);
}
#endif

using namespace hypura;

int main() {
    StreamRig rig;
    rig.plan.reader = {3, 8192, true, false, 64, 1000};
    rig.plan.reader.background_tokens = 8; // every other pass
    rig.plan.reader.background_depth = 5;
    CachePolicy lfu;
    lfu.kind = PolicyKind::kLfuDecay;
    lfu.half_life_tokens = 1; // rescales on the way
    rig.add_class(64, {20000, 0, 16, 8, lfu});
    CachePolicy stale;
    stale.kind = PolicyKind::kLeastStale;
    rig.add_class(64, {5000, 0, 16, 8, stale});
    CachePolicy ring;
    ring.kind = PolicyKind::kPinnedCyclic;
    ring.pinned_slots = 4;
    rig.add_class(24, {9000, 0, 8, 1, ring});
    rig.plan.lookahead_strides = 4;
    rig.must_open();
    Faults faults;
    faults.short_one_in = 4;
    faults.eintr_one_in = 8;
    faults.eio_at = 500;
    rig.source->set(faults);
    StreamCounters warm = rig.stream.counters();
    CHECK(warm.total.misses == 0);

    uint64_t before = g_allocations;
    Random random{5};
    uint64_t failures = 0;
    for (uint32_t pass = 0; pass < 200; pass++) {
        rig.stream.begin_pass(8 + pass % 2);
        for (uint32_t at = 0; at < 24; at++) {
            Lease leases[9];
            for (uint32_t i = 0; i < 8; i++) {
                leases[i].stride_index = i < 4 ? random.below(64) : 64 + random.below(64);
            }
            leases[8].stride_index = 128 + at;
            uint32_t ahead[2] = {random.below(64), random.below(64)};
            rig.stream.prefetch({ahead, 2});
            CHECK(rig.stream.begin({leases, 9}, Holding::kNothing).admitted_count > 0);
            for (Lease& lease : leases) {
                bool admitted = lease.state != LeaseState::kWaiting;
                failures += admitted && rig.stream.wait(&lease) == Status::kFailed ? 1 : 0;
            }
            rig.stream.release({leases, 9});
        }
        rig.stream.counters();
    }
    rig.stream.drain();
    uint64_t during = g_allocations - before;
    StreamCounters counters = rig.stream.counters();
    std::printf("%" PRIu64 " allocations in 4800 ops, %" PRIu64 " reads, %" PRIu64 " failures; %" PRIu64 " before\n",
                during, counters.total.completed_count, failures, before);
#ifdef HY_SANITIZED
    std::printf("not counted: built with a sanitizer\n");
#else
    CHECK(before > 0 && during == 0);
#endif
    rig.stream.check();
    return 0;
}

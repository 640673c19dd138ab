// The stream's rules, one by one, over a source whose reads can be held back.
#include "stream_rig.h"

#include <atomic>
#include <thread>

using namespace hypura;

namespace {

const ReadSpec kReader{2, 8192, true, false, 64, 1000};

CachePolicy policy(PolicyKind kind, uint32_t pinned_slots = 0) {
    CachePolicy p;
    p.kind = kind;
    p.half_life_tokens = 100;
    p.stale_after_passes = 4;
    p.pinned_slots = pinned_slots;
    return p;
}

std::string refusal(StreamRig& rig) {
    std::string error;
    CHECK(!rig.open(&error) && !error.empty());
    std::printf("  %s\n", error.c_str());
    return error;
}

void refuses_unsound_plans() {
    StreamRig few;
    few.plan.reader = kReader;
    few.add_class(10, {5000, 0, 4, 5, policy(PolicyKind::kLru)});
    CHECK(refusal(few).find("12288 bytes of pool are missing") != std::string::npos);
    StreamRig pinned;
    pinned.plan.reader = kReader;
    pinned.add_class(10, {5000, 0, 4, 1, policy(PolicyKind::kPinnedCyclic, 4)});
    CHECK(refusal(pinned).find("4 of them pinned") != std::string::npos);
    StreamRig outside;
    outside.plan.reader = kReader;
    outside.add_class(10, {5000, 0, 4, 1, policy(PolicyKind::kLru)});
    outside.plan.extents[9].offset++;
    CHECK(refusal(outside).find("outside its file") != std::string::npos);
    StreamRig slots;
    slots.plan.reader = kReader;
    slots.add_class(10, {5000, 0, 4, 1, policy(PolicyKind::kLru)});
    slots.plan.classes[0].slot_bytes = 8192;
    CHECK(refusal(slots).find("it needs 12288") != std::string::npos);
    StreamRig piece;
    piece.plan.reader = kReader;
    piece.plan.reader.piece_bytes = 5000;
    piece.add_class(10, {5000, 0, 4, 1, policy(PolicyKind::kLru)});
    CHECK(refusal(piece).find("multiple of 4096") != std::string::npos);
}

void counts_hits_and_misses() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(10, {5000, 0, 4, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    CHECK(rig.op({0, 1, 2}) == Status::kOk);
    CHECK(rig.op({2, 1}) == Status::kOk);
    uint32_t ahead[] = {3, 2, 4}; // 2 is there; 3 takes the free slot; 4 evicts 0
    CHECK(rig.stream.prefetch({ahead, 3}) == 2);
    CHECK(rig.op({3, 0}) == Status::kOk);
    StreamCounters counters = rig.stream.counters();
    CHECK(counters.total.hits + counters.total.late_hits == 3 && counters.total.hits >= 2);
    CHECK(counters.total.misses == 4 && counters.total.demand_reads == 4 && counters.total.prefetch_reads == 2);
    rig.stream.drain();
    rig.stream.check();
    CHECK(rig.stream.pinned_count() == 0);
}

void runs_in_waves() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(40, {5000, 0, 6, 1, policy(PolicyKind::kLfuDecay)});
    rig.must_open();
    std::vector<uint32_t> all;
    for (uint32_t i = 0; i < 40; i++) {
        all.push_back(i);
    }
    CHECK(rig.op(all) == Status::kOk);
    StreamCounters counters = rig.stream.counters();
    CHECK(counters.total.misses == 40 && counters.total.read_bytes == 40 * 5000); // each once
    // What is ready further down is computed first and not read again.
    CHECK(rig.op(all) == Status::kOk);
    counters = rig.stream.counters();
    CHECK(counters.total.misses == 40 + 34 && counters.total.hits == 6);
    // Holding everything: nothing more is admitted, and nothing is waited for.
    std::vector<Lease> held(6);
    for (uint32_t i = 0; i < 6; i++) {
        held[i].stride_index = i;
    }
    CHECK(rig.stream.begin({held.data(), 6}, Holding::kNothing).admitted_count == 6);
    Lease more;
    more.stride_index = 20;
    CHECK(rig.stream.begin({&more, 1}, Holding::kLeases).admitted_count == 0 && more.state == LeaseState::kWaiting);
    rig.stream.release({&more, 1});
    rig.stream.release({held.data(), 6});
    rig.stream.check();
}

void demand_before_prefetch() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.plan.reader.thread_count = 1;
    rig.add_class(10, {4096, 0, 6, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.source->record(true);
    rig.source->gate(true);
    uint32_t ahead[] = {0, 1, 2, 3, 4, 5};
    CHECK(rig.stream.prefetch({ahead, 6}) == 6);
    rig.source->wait_arrived(1); // 0 is in the reader's hands
    Lease leases[3];
    leases[0].stride_index = 8; // takes the slot of the newest prefetch, 5
    leases[1].stride_index = 3; // promoted
    leases[2].stride_index = 9; // takes the slot of 4
    CHECK(rig.stream.begin({leases, 3}, Holding::kNothing).admitted_count == 3);
    rig.source->gate(false);
    for (Lease& lease : leases) {
        CHECK(rig.stream.wait(&lease) == Status::kOk);
    }
    rig.stream.release({leases, 3});
    Lease rest;
    rest.stride_index = 2;
    CHECK(rig.stream.begin({&rest, 1}, Holding::kNothing).admitted_count == 1 && rig.stream.wait(&rest) == Status::kOk);
    rig.stream.release({&rest, 1});
    std::vector<uint64_t> order;
    for (FilePlace place : rig.source->recorded()) {
        order.push_back((place.offset + 4095) / 4096); // stride 1 begins at 4096 + 96
    }
    // What was demanded came first. Of the two prefetches left, 2 was demanded while 1 may or may not have been begun.
    CHECK(order.size() >= 5 && (order[4] == 1 || order[4] == 2));
    order.resize(4);
    CHECK((order == std::vector<uint64_t>{0, 8, 3, 9}));
    StreamCounters counters = rig.stream.counters();
    CHECK(counters.total.dropped_prefetches == 2 && counters.total.late_hits >= 1);
    rig.stream.drain();
    rig.stream.check();
}

void looks_ahead_in_a_cycle() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(24, {20000, 0, 8, 2, policy(PolicyKind::kPinnedCyclic, 4)});
    rig.add_class(12, {9000, 0, 4, 1, policy(PolicyKind::kPinnedCyclic, 1)});
    rig.plan.lookahead_strides = 8;
    rig.must_open();
    auto pass = [&rig](uint32_t layers) {
        for (uint32_t layer = 0; layer < layers; layer++) {
            CHECK(rig.op({layer * 2, layer * 2 + 1}) == Status::kOk);
            CHECK(rig.op({24 + layer}) == Status::kOk);
        }
    };
    pass(12);
    pass(12);
    rig.stream.drain();
    uint64_t misses = rig.stream.counters().total.misses;
    for (int i = 0; i < 5; i++) {
        pass(12);
    }
    rig.stream.drain();
    StreamCounters counters = rig.stream.counters();
    std::printf("  5 passes of 36: misses %" PRIu64 ", hits %" PRIu64 ", late %" PRIu64 "\n",
                counters.total.misses - misses, counters.total.hits, counters.total.late_hits);
    CHECK(counters.total.misses - misses <= 2); // what drain() took back
    CHECK(counters.resyncs == 0);
    pass(7); // and stops there
    rig.stream.drain();
    pass(12);
    CHECK(rig.stream.counters().resyncs == 1);
    misses = rig.stream.counters().total.misses;
    uint64_t read_bytes = rig.stream.counters().total.read_bytes;
    pass(12);
    pass(12);
    rig.stream.check();
    counters = rig.stream.counters();
    CHECK(counters.total.misses == misses && counters.resyncs == 1);
    // Two passes read twice what is not pinned, give or take the ring.
    uint64_t cycle_bytes = 20 * 20000 + 11 * 9000;
    uint64_t ring_bytes = 4 * 20000 + 3 * 9000;
    CHECK(counters.total.read_bytes - read_bytes <= 2 * cycle_bytes + ring_bytes);
    CHECK(counters.total.read_bytes - read_bytes + ring_bytes >= 2 * cycle_bytes);
}

void failed_reads_say_where() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(10, {50000, 0, 4, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    Faults faults;
    faults.eio_at = 2;
    rig.source->set(faults);
    CHECK(rig.op({4}) == Status::kFailed);
    char text[200];
    rig.stream.describe_error(rig.stream.last_error(), {text, sizeof text});
    std::printf("  %s\n", text);
    CHECK(std::string(text).find("fake.gguf at offset 2") == 0 &&
          std::string(text).find("errno 5") != std::string::npos);
    rig.stream.drain();
    rig.stream.check();
    CHECK(rig.op({4, 5}) == Status::kOk); // a later pass may try again
    CHECK(rig.stream.counters().total.failed_reads == 1);
}

void interrupt_ends_waits() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(10, {50000, 0, 4, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.source->gate(true);
    std::thread other([&rig] {
        rig.source->wait_arrived(1);
        rig.stream.interrupt(true);
    });
    CHECK(rig.op({4, 5}) == Status::kInterrupted);
    other.join();
    CHECK(rig.op({4, 5}) == Status::kInterrupted && rig.stream.pinned_count() == 0);
    rig.source->gate(false);
    rig.stream.drain();
    rig.stream.check();
    rig.stream.interrupt(false);
    CHECK(rig.op({4, 5}) == Status::kOk);
}

ReadSpec background_reader() {
    ReadSpec spec = kReader;
    spec.background_tokens = 4;
    spec.background_depth = 8;
    return spec;
}

uint64_t thread_reads(const StreamCounters& counters) {
    uint64_t reads = 0;
    for (const ReaderCounters& thread : counters.threads) {
        reads += thread.read_count;
    }
    return reads;
}

void short_passes_read_in_the_background() {
    StreamRig rig;
    rig.plan.reader = background_reader();
    rig.add_class(40, {4000, 0, 12, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.stream.begin_pass(4);
    CHECK(rig.op({0, 1, 2, 3, 4, 5, 6, 7, 8, 9}) == Status::kOk); // more than are under way at once
    StreamCounters counters = rig.stream.counters();
    CHECK(counters.background.read_count == 10 && thread_reads(counters) == 0 && counters.total.misses == 10);
    uint32_t ahead[] = {10, 11};
    CHECK(rig.stream.prefetch({ahead, 2}) == 2);
    CHECK(rig.op({10, 11, 0}) == Status::kOk);
    rig.stream.begin_pass(5);
    CHECK(rig.op({20, 21, 22}) == Status::kOk);
    counters = rig.stream.counters();
    CHECK(counters.background.read_count == 12 && thread_reads(counters) == 3);
    CHECK(counters.reader.delivered_bytes == 15 * 4000 && counters.reader.read_count == 15);
    rig.stream.begin_pass(1);
    CHECK(rig.stream.prefetch({ahead, 2}) == 0);
    uint32_t more[] = {30, 31, 32};
    CHECK(rig.stream.prefetch({more, 3}) == 3);
    rig.stream.begin_pass(17); // what is under way ends whatever the pass; what is queued goes to threads
    CHECK(rig.op({30, 31, 32}) == Status::kOk);
    rig.stream.drain();
    rig.stream.check();
    CHECK(rig.stream.prefetch({ahead, 2}) <= 2); // close() ends what nobody waits for
}

void background_leaves_faults_to_threads() {
    StreamRig rig;
    rig.plan.reader = background_reader();
    rig.add_class(10, {4000, 0, 4, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.stream.begin_pass(1);
    Faults faults;
    faults.eio_at = 0;
    rig.source->set(faults);
    CHECK(rig.op({4}) == Status::kOk); // the thread's own attempt went well
    StreamCounters counters = rig.stream.counters();
    CHECK(counters.background.read_count == 1 && thread_reads(counters) == 1 && counters.total.failed_reads == 0);
    faults.eio_count = 1000;
    rig.source->set(faults);
    CHECK(rig.op({5}) == Status::kFailed);
    CHECK(rig.stream.last_error().fault == ReadFault::kErrno && rig.stream.last_error().offset == 96 + 5 * 4000);
    faults = {};
    faults.change_at = 0;
    rig.source->set(faults);
    CHECK(rig.op({6}) == Status::kFailed && rig.stream.last_error().fault == ReadFault::kChanged);
    faults = {};
    faults.einval_at = 0; // no direct reads after all: threads read through the page cache from now on
    rig.source->set(faults);
    CHECK(rig.op({7, 8}) == Status::kOk);
    const uint64_t before = rig.stream.counters().background.read_count;
    CHECK(rig.op({9, 1, 2}) == Status::kOk && rig.stream.counters().background.read_count == before);
    rig.stream.drain();
    rig.stream.check();
}

// Where reading in the background is no such thing, threads do it after all.
void background_that_blocks_is_given_up() {
    StreamRig rig;
    rig.plan.reader = background_reader();
    rig.add_class(40, {4000, 0, 12, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.source->reads_at_once = true;
    for (uint32_t i = 0; i < 40; i++) {
        rig.stream.begin_pass(1);
        CHECK(rig.op({i}) == Status::kOk);
    }
    const StreamCounters counters = rig.stream.counters();
    CHECK(counters.background.read_count == 8 && thread_reads(counters) == 32);
    rig.stream.check();
}

void interrupt_ends_background_waits() {
    StreamRig rig;
    rig.plan.reader = background_reader();
    rig.add_class(10, {4000, 0, 4, 1, policy(PolicyKind::kLru)});
    rig.must_open();
    rig.stream.begin_pass(1);
    rig.source->gate(true);
    std::thread other([&rig] {
        platform::sleep_ns(5'000'000);
        rig.stream.interrupt(true);
    });
    CHECK(rig.op({4, 5}) == Status::kInterrupted);
    other.join();
    CHECK(rig.stream.pinned_count() == 0);
    rig.source->gate(false);
    rig.stream.drain();
    rig.stream.check();
    rig.stream.interrupt(false);
    CHECK(rig.op({4, 5}) == Status::kOk);
}

void device_memory_gets_uploads() {
    StreamRig rig;
    rig.plan.reader = kReader;
    rig.add_class(10, {50001, 0, 3, 1, policy(PolicyKind::kLru)});
    rig.plan.classes[0].slot_bytes = 50001; // no page phase there
    rig.device = std::make_unique<FakeDevicePool>(1, 3 * 50001, std::vector<uint64_t>{50001});
    rig.source = std::make_unique<FakeSource>(std::vector<uint64_t>{rig.plan.files[0].bytes});
    std::string error;
    CHECK(rig.stream.open(rig.plan, rig.source.get(), rig.device.get(), &error));
    for (uint32_t i = 0; i < 30; i++) {
        CHECK(rig.op({i % 10, (i + 3) % 10}) == Status::kOk);
    }
    rig.stream.drain();
    rig.device->refuse_at = 1; // long gone: nothing is refused
    rig.stream.check();
}

void order_is_learned() {
    CyclicOrder order;
    order.open(8);
    auto feed = [&order](std::vector<uint32_t> strides) {
        for (uint32_t s : strides) {
            order.note(s);
        }
    };
    feed({3, 1, 4});
    CHECK(!order.learned());
    CHECK(order.note(3) == CyclicOrder::Noted::kLearning && order.length() == 3 && order.ahead(1) == 1);
    CHECK(order.note(1) == CyclicOrder::Noted::kExpected && order.ahead(2) == 3);
    CHECK(order.note(3) == CyclicOrder::Noted::kUnexpected && order.ahead(1) == 1); // back to the start
    feed({1, 4});
    CHECK(order.note(5) == CyclicOrder::Noted::kUnexpected && !order.learned()); // the pass is longer than it seemed
    feed({6, 3, 1, 4, 5});
    CHECK(order.length() == 5 && order.ahead(1) == 6 && order.ahead(5) == 5);
    feed({6, 4, 1, 3, 5, 6, 4, 1, 3, 5}); // another graph: learned anew
    CHECK(order.note(6) == CyclicOrder::Noted::kExpected && order.ahead(1) == 4);
}

void all_hits_cost_little() {
    for (PolicyKind kind :
         {PolicyKind::kLru, PolicyKind::kLfuDecay, PolicyKind::kLeastStale, PolicyKind::kPinnedCyclic}) {
        StreamRig rig;
        rig.plan.reader = kReader;
        rig.add_class(192, {4096, 0, 192, 8, policy(kind)});
        rig.must_open();
        std::vector<Lease> leases(192);
        auto pass = [&] {
            rig.stream.begin_pass(1);
            for (uint32_t i = 0; i < 192; i++) {
                leases[i].stride_index = i;
            }
            uint32_t ready = 0;
            for (uint32_t i = 0; i < 192; i += 8) {
                Span<Lease> op{&leases[i], 8};
                BeginResult begun = rig.stream.begin(op, Holding::kNothing);
                ready += begun.ready_count;
                for (uint32_t k = 0; begun.ready_count < 8 && k < 8; k++) {
                    CHECK(rig.stream.wait(&op[k]) == Status::kOk);
                }
                rig.stream.release(op);
            }
            return ready;
        };
        pass();
        uint64_t start_ns = platform::now_ns();
        for (int i = 0; i < 200; i++) {
            CHECK(pass() == 192);
        }
        std::printf("  policy %u: %.0f ns per acquire and release, %.1f us per pass of 192 strides in 24 ops\n",
                    static_cast<unsigned>(kind), static_cast<double>(platform::now_ns() - start_ns) / 200 / 192,
                    static_cast<double>(platform::now_ns() - start_ns) / 200 / 1000);
    }
}

} // namespace

int main() {
    CASE(refuses_unsound_plans);
    CASE(counts_hits_and_misses);
    CASE(runs_in_waves);
    CASE(demand_before_prefetch);
    CASE(looks_ahead_in_a_cycle);
    CASE(failed_reads_say_where);
    CASE(interrupt_ends_waits);
    CASE(short_passes_read_in_the_background);
    CASE(background_leaves_faults_to_threads);
    CASE(background_that_blocks_is_given_up);
    CASE(interrupt_ends_background_waits);
    CASE(device_memory_gets_uploads);
    CASE(order_is_learned);
    CASE(all_hits_cost_little);
    return 0;
}

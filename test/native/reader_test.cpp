// The reader without threads or stream: how jobs are cut, what a piece does with each fault, and real files with direct
// reads at odd offsets and sizes.
#include "fake_source.h"
#include "stream.h" // HostPool, min_slot_bytes

#include <cstdio>
#include <string>
#include <unistd.h>

using namespace hypura;

namespace {

const ReadSpec kSpec{1, 8192, true, false, 64, 1000};

// One job through queue and piece reader on one slot; true when it was done.
struct Rig {
    FakeSource source;
    uint32_t file_count;
    HostPool pool;
    FileModes modes;
    PieceReader reader;
    ReadQueue queue;
    ReaderCounters counters;
    ReadError error;
    std::byte* slot = nullptr;

    Rig(const std::vector<uint64_t>& file_bytes, uint64_t slot_bytes)
        : source(file_bytes), file_count(static_cast<uint32_t>(file_bytes.size())) {
        std::vector<ClassSpec> classes{{1, slot_bytes, 1, 1, {}}};
        CHECK(pool.open(classes, {platform::PageKind::kBase, 1}));
        slot = pool.host(0);
        queue.open(1, kSpec);
    }
    bool run(const std::vector<Extent>& extents, const Faults& faults) {
        source.set(faults);
        modes.open(file_count, source, kSpec.direct);
        CHECK(reader.open(&source, &pool, &modes, kSpec));
        Span<const Extent> span{extents.data(), static_cast<uint32_t>(extents.size())};
        uint32_t phase = static_cast<uint32_t>(extents[0].offset % platform::kDirectAlign);
        queue.submit(0, {span, {0, 0}, slot, phase}, Urgency::kDemand);
        Piece piece;
        ReadQueue::Outcome outcome = ReadQueue::Outcome::kPending;
        while (queue.next(&piece)) {
            PieceResult result = reader.run(piece);
            counters.read_count += result.read_count;
            counters.kernel_bytes += result.kernel_bytes;
            counters.bounce_bytes += result.bounce_bytes;
            counters.retry_count += result.retry_count;
            outcome = queue.finish(piece, result.error);
            if (outcome == ReadQueue::Outcome::kFailed) {
                error = queue.error(0);
            }
        }
        CHECK(outcome != ReadQueue::Outcome::kPending && !queue.active(0) && queue.startable_pieces() == 0);
        bool done = outcome == ReadQueue::Outcome::kDone;
        CHECK(!done || has_pattern(extents, slot + phase));
        return done;
    }
};

void lands_in_place() {
    for (uint64_t offset : {0ull, 32ull, 4095ull, 4096ull, 512ull * 9, 123456ull}) {
        for (uint64_t bytes : {1ull, 31ull, 4096ull, 4097ull, 8192ull, 20000ull, 65536ull}) {
            Rig rig({300000}, min_slot_bytes(bytes));
            CHECK(rig.run({{0, offset, bytes}}, {}));
            CHECK(rig.counters.bounce_bytes == 0);
            CHECK(rig.counters.kernel_bytes <= bytes + 2 * 4096);
        }
    }
}

void last_bytes_of_file() {
    Rig rig({100001}, min_slot_bytes(5001));
    CHECK(rig.run({{0, 95000, 5001}}, {}));
    CHECK(rig.counters.retry_count == 0 && rig.counters.bounce_bytes == 0);
}

void extents_share_pages() {
    // The second extent has the phase that it has in the slot: only the shared page is copied.
    Rig fits({300000, 300000}, min_slot_bytes(40000));
    CHECK(fits.run({{0, 100, 20000}, {1, 4096 * 3 + 20100, 20000}}, {}));
    CHECK(fits.counters.bounce_bytes > 0 && fits.counters.bounce_bytes <= 2 * 4096);
    Rig apart({300000, 300000}, min_slot_bytes(40001));
    CHECK(apart.run({{0, 100, 20000}, {1, 777, 20001}}, {}));
    CHECK(apart.counters.bounce_bytes >= 20001 && apart.counters.bounce_bytes <= 20001 + 4096);
    Rig small({300000, 300000, 300000}, min_slot_bytes(3));
    CHECK(small.run({{0, 4095, 1}, {1, 0, 1}, {2, 1, 1}}, {}));
    Random random{3};
    for (int i = 0; i < 300; i++) {
        std::vector<Extent> extents;
        uint64_t bytes = 0;
        for (uint32_t k = 1 + random.below(4); k > 0; k--) {
            uint64_t aligned = random.chance(2) && !extents.empty()
                                   ? (extents[0].offset + bytes) % 4096 + 4096 * random.below(20)
                                   : random.below(100000);
            extents.push_back({random.below(3), aligned, 1 + random.below(30000)});
            bytes += extents.back().bytes;
        }
        Rig rig({300000, 300000, 300000}, min_slot_bytes(bytes));
        CHECK(rig.run(extents, {}));
    }
}

void transient_faults_are_retried() {
    for (uint64_t seed = 0; seed < 200; seed++) {
        Rig rig({300000}, min_slot_bytes(50000));
        Faults faults;
        faults.seed = seed;
        faults.short_one_in = 2;
        faults.eintr_one_in = 4;
        faults.eagain_one_in = 8;
        CHECK(rig.run({{0, 1000 + seed, 50000}}, faults));
        CHECK(rig.counters.retry_count > 0 || rig.counters.read_count > 0);
    }
}

void invalid_direct_read_falls_back() {
    Rig rig({300000}, min_slot_bytes(50000));
    Faults faults;
    faults.einval_at = 2;
    CHECK(rig.run({{0, 1001, 50000}}, faults));
    CHECK(rig.modes.fallback_count() == 1);
    Rig never({300000}, min_slot_bytes(50000));
    faults = Faults{};
    faults.direct = false;
    CHECK(never.run({{0, 1001, 50000}}, faults));
    CHECK(never.modes.fallback_count() == 1 && never.counters.kernel_bytes == 50000);
}

std::string sentence(const ReadError& error) {
    char text[256];
    describe(error, "model.gguf", {text, sizeof text});
    return text;
}

void lasting_faults_are_errors() {
    Rig eio({300000}, min_slot_bytes(50000));
    Faults faults;
    faults.eio_at = 1;
    CHECK(!eio.run({{0, 1000, 50000}}, faults));
    CHECK(eio.error.fault == ReadFault::kErrno && eio.error.error_number == EIO && eio.error.offset == 8192);
    CHECK(sentence(eio.error) == "model.gguf at offset 8192: read failed: Input/output error (errno 5)");
    CHECK(eio.run({{0, 1000, 50000}}, {}));

    Rig shrunk({300000}, min_slot_bytes(50000));
    faults = Faults{};
    faults.shrink_at = 0;
    faults.shrink_to = 30001;
    CHECK(!shrunk.run({{0, 1000, 50000}}, faults));
    CHECK(shrunk.error.fault == ReadFault::kEndOfFile && shrunk.error.offset == 30001);

    Rig changed({300000}, min_slot_bytes(50000));
    faults = Faults{};
    faults.change_at = 1;
    CHECK(!changed.run({{0, 1000, 50000}}, faults));
    CHECK(changed.error.fault == ReadFault::kChanged);

    Rig stuck({300000}, min_slot_bytes(5000));
    faults = Faults{};
    faults.eagain_one_in = 1;
    CHECK(!stuck.run({{0, 1000, 5000}}, faults));
    CHECK(stuck.error.fault == ReadFault::kStuck && stuck.counters.retry_count == kSpec.retry_count + 1);
}

void demand_goes_first() {
    ReadQueue queue;
    queue.open(4, kSpec);
    Extent extents[4] = {{0, 0, 20000}, {0, 20000, 20000}, {0, 40000, 20000}, {0, 60000, 20000}};
    for (uint32_t i = 0; i < 4; i++) {
        queue.submit(i, {{&extents[i], 1}, {0, i}, nullptr, 0}, i < 2 ? Urgency::kPrefetch : Urgency::kDemand);
    }
    Piece piece;
    CHECK(queue.next(&piece) && piece.job_index == 2);
    Piece in_flight = piece;
    queue.promote(1);
    std::vector<uint32_t> order;
    while (queue.next(&piece)) {
        if (order.empty() || order.back() != piece.job_index) {
            order.push_back(piece.job_index);
        }
        if (piece.job_index == 0) {
            break;
        }
        CHECK(queue.finish(piece, {}) == ReadQueue::Outcome::kPending || piece.job_index != 2);
    }
    CHECK((order == std::vector<uint32_t>{2, 3, 1, 0}));
    CHECK(queue.cancel(0) == ReadQueue::Cancelled::kDraining);
    queue.promote(0); // taken back
    CHECK(queue.finish(piece, {}) == ReadQueue::Outcome::kPending);
    CHECK(queue.cancel(0) == ReadQueue::Cancelled::kRemoved);
    CHECK(queue.finish(in_flight, {}) == ReadQueue::Outcome::kDone);
    CHECK(queue.active_count() == 0 && queue.startable_pieces() == 0);
}

// Prefetch of one piece each, of the jobs 0 to count - 1.
void submit_prefetch(ReadQueue* queue, const Extent& extent, uint32_t count) {
    for (uint32_t job = 0; job < count; job++) {
        queue->submit(job, {{&extent, 1}, {0, job}, nullptr, 0}, Urgency::kPrefetch);
    }
}

// While two pieces are under way no prefetch begins, and a demand begins whatever is under way.
void prefetch_waits_for_room() {
    ReadSpec spec = kSpec;
    spec.prefetch_depth = 2;
    ReadQueue queue;
    queue.open(5, spec);
    Extent extent{0, 0, 8192};
    submit_prefetch(&queue, extent, 3);
    CHECK(queue.startable_pieces() == 2);
    Piece ahead[2];
    CHECK(queue.next(&ahead[0]) && queue.next(&ahead[1]) && ahead[1].job_index == 1);
    Piece none;
    CHECK(!queue.next(&none) && queue.startable_pieces() == 0);
    queue.submit(3, {{&extent, 1}, {0, 3}, nullptr, 0}, Urgency::kDemand);
    queue.submit(4, {{&extent, 1}, {0, 4}, nullptr, 0}, Urgency::kDemand);
    CHECK(queue.startable_pieces() == 2);
    Piece demand[2];
    CHECK(queue.next(&demand[0]) && demand[0].job_index == 3 && queue.next(&demand[1]) && demand[1].job_index == 4);
    for (const Piece& piece : {ahead[0], demand[0]}) {
        CHECK(queue.finish(piece, {}) == ReadQueue::Outcome::kDone);
        CHECK(!queue.next(&none) && queue.startable_pieces() == 0); // still two under way
    }
    CHECK(queue.finish(ahead[1], {}) == ReadQueue::Outcome::kDone && queue.startable_pieces() == 1);
    CHECK(queue.next(&none) && none.job_index == 2);
    CHECK(queue.finish(none, {}) == ReadQueue::Outcome::kDone);
    CHECK(queue.finish(demand[1], {}) == ReadQueue::Outcome::kDone && queue.startable_pieces() == 0);
}

void read_real_file(bool in_background) {
    char name[] = "reader_test.XXXXXX"; // in the current folder: a file system that may have direct reads
    int descriptor = mkstemp(name);
    CHECK(descriptor >= 0);
    const uint64_t file_bytes = 3000017;
    std::vector<std::byte> bytes(file_bytes);
    fill_pattern({0, 0}, {bytes.data(), static_cast<uint32_t>(file_bytes)});
    CHECK(write(descriptor, bytes.data(), file_bytes) == static_cast<ssize_t>(file_bytes));
    CHECK(fsync(descriptor) == 0);
    platform::drop_cached(descriptor, {0, 0});

    FileSource source;
    std::string error;
    CHECK(!source.open({{name, file_bytes + 1}}, true, &error) &&
          error.find("make the plan again") != std::string::npos);
    error.clear();
    CHECK(source.open({{name, file_bytes}}, true, &error));
    StreamPlan plan;
    plan.files = {{name, file_bytes}};
    const uint64_t stride_bytes = 70001;
    for (uint64_t at = 7; at + stride_bytes <= file_bytes; at += stride_bytes + 13) {
        plan.strides.push_back({0, 0, static_cast<uint32_t>(plan.extents.size()), 1});
        plan.extents.push_back({0, at, stride_bytes});
    }
    plan.strides.push_back({0, 0, static_cast<uint32_t>(plan.extents.size()), 1});
    plan.extents.push_back({0, file_bytes - stride_bytes, stride_bytes});
    plan.classes = {{stride_bytes, min_slot_bytes(stride_bytes), 5, 1, {}}};
    plan.reader = {3, 16384, true, true, 64, 1000};
    plan.reader.background_tokens = in_background ? 1 : 0;
    plan.reader.background_depth = 4;
    plan.lookahead_strides = 0;
    HostPool pool;
    CHECK(pool.open(plan.classes, {platform::PageKind::kHuge, 2}));
    pool.make_present(); // while it is read into
    Stream stream;
    CHECK(stream.open(plan, &source, &pool, &error));
    stream.begin_pass(1);
    for (uint32_t i = 0; i < plan.strides.size(); i++) {
        Lease lease;
        lease.stride_index = i;
        CHECK(stream.begin({&lease, 1}, Holding::kNothing).status == Status::kOk);
        CHECK(stream.wait(&lease) == Status::kOk);
        CHECK(has_pattern({plan.extents[i]}, lease.data));
        stream.release({&lease, 1});
    }
    StreamCounters counters = stream.counters();
    CHECK(counters.total.read_bytes == plan.strides.size() * stride_bytes);
    std::printf("  direct %s, %" PRIu64 " system calls, kernel bytes %.3f of delivered, bounced %" PRIu64 "\n",
                source.has_direct(0) && counters.fallback_files == 0 ? "yes" : "no (not in this folder)",
                counters.reader.read_count,
                static_cast<double>(counters.reader.kernel_bytes) / static_cast<double>(counters.total.read_bytes),
                counters.reader.bounce_bytes);
    CHECK(counters.reader.bounce_bytes == 0);
    if (in_background) {
        std::printf("  %" PRIu64 " reads in the background%s\n", counters.background.read_count,
                    counters.background.read_count == 0 ? ": SKIPPED, this system or folder has none" : "");
    }

    CHECK(ftruncate(descriptor, 200000) == 0); // under the running stream
    Lease lease;
    lease.stride_index = 10;
    CHECK(stream.begin({&lease, 1}, Holding::kNothing).status == Status::kOk);
    CHECK(stream.wait(&lease) == Status::kFailed);
    char text[256];
    stream.describe_error(stream.last_error(), {text, sizeof text});
    std::printf("  %s\n", text);
    CHECK(stream.last_error().fault == ReadFault::kEndOfFile && std::string(text).find(name) == 0);
    stream.release({&lease, 1});
    stream.close();
    close(descriptor);
    unlink(name);
}

void real_file() {
    read_real_file(false);
}

void real_file_in_the_background() {
    read_real_file(true);
}

} // namespace

int main() {
    CASE(lands_in_place);
    CASE(last_bytes_of_file);
    CASE(extents_share_pages);
    CASE(transient_faults_are_retried);
    CASE(invalid_direct_read_falls_back);
    CASE(lasting_faults_are_errors);
    CASE(demand_goes_first);
    CASE(prefetch_waits_for_room);
    CASE(real_file);
    CASE(real_file_in_the_background);
    return 0;
}

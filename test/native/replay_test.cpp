// Traces and their replay. The main claim: whatever the faults, the interruptions, the waves and the timing of reads,
// the verbatim replay of a recorded stream gives the stream's own counts, each of them. And: a full disk ends the trace
// and nothing else, damaged bytes are an error and never a crash, no policy beats the optimum.
//   replay_test [runs] [first seed]
#include "random_plan.h"
#include "replay.h"

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sys/resource.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

using namespace hypura;

namespace {

std::string folder;

std::string path_of(const char* name) {
    return folder + "/" + name;
}

bool exists(const std::string& path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0;
}

const std::string kHeader = "{\"of\":\"a test\"}";

std::vector<uint8_t> records_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<uint8_t> all{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    size_t start = kTraceMagic.size() + 4 + kHeader.size();
    CHECK(all.size() > start && std::string(all.begin(), all.begin() + 8) == kTraceMagic);
    CHECK(all[8] == kHeader.size() && all[9] == 0);
    CHECK(std::string(all.begin() + 12, all.begin() + static_cast<long>(start)) == kHeader);
    return {all.begin() + static_cast<long>(start), all.end()};
}

Span<const uint8_t> span(const std::vector<uint8_t>& bytes) {
    return {bytes.data(), static_cast<uint32_t>(bytes.size())};
}

ReplayShape shape_of(const StreamPlan& plan) {
    ReplayShape shape;
    for (const StrideSpec& stride : plan.strides) {
        shape.class_of.push_back(stride.class_index);
        shape.op_of.push_back(stride.order_index);
    }
    for (const ClassSpec& c : plan.classes) {
        shape.stride_bytes.push_back(c.stride_bytes);
    }
    return shape;
}

std::vector<ReplayClass> classes_of(const StreamPlan& plan) {
    std::vector<ReplayClass> classes;
    for (const ClassSpec& c : plan.classes) {
        classes.push_back({c.slot_count, c.policy, {}});
    }
    return classes;
}

bool never() {
    return false;
}

void consume(StreamRig& rig, Random& random) {
    random_passes(rig, random, 3 + random.below(6), [&](const std::vector<uint32_t>& op) { return rig.op(op); });
}

struct Tally {
    uint64_t hits = 0, late_hits = 0, misses = 0, prefetches = 0, waits = 0, failures = 0, dropped = 0;
};

// A traced run; false when the plan was refused.
bool record(uint64_t seed, StreamRig& rig, const std::string& path, std::vector<ClassCounters>* counters) {
    Random random{mix(seed)};
    random_plan(rig, random);
    std::vector<uint64_t> file_bytes;
    for (const FileSpec& file : rig.plan.files) {
        file_bytes.push_back(file.bytes);
    }
    rig.source = std::make_unique<FakeSource>(file_bytes);
    rig.source->set(random_faults(rig, random));
    rig.host = std::make_unique<HostPool>();
    CHECK(rig.host->open(rig.plan.classes, {platform::PageKind::kBase, 1}));
    std::string error;
    if (!rig.stream.open(rig.plan, rig.source.get(), rig.host.get(), &error)) {
        return false;
    }
    TraceWriter trace;
    uint32_t strides = static_cast<uint32_t>(rig.plan.strides.size());
    CHECK(trace.open({path, kHeader, strides, [](const std::string&) { CHECK(false); }}, &error));
    CHECK(exists(path + ".part") && !exists(path));
    rig.stream.trace_to(&trace);
    std::atomic<bool> over{false};
    std::thread meddler;
    if (random.chance(3)) {
        meddler = std::thread([&rig, &over] {
            for (bool on = true; !over; on = !on) {
                rig.stream.interrupt(on);
                platform::sleep_ns(on ? 10000 : 300000);
            }
            rig.stream.interrupt(false);
        });
    }
    consume(rig, random);
    over = true;
    if (meddler.joinable()) {
        meddler.join();
    }
    rig.stream.drain();
    StreamCounters seen = rig.stream.counters();
    counters->assign(seen.classes.begin(), seen.classes.end());
    rig.stream.close();
    trace.close();
    CHECK(exists(path) && !exists(path + ".part"));
    return true;
}

void expect_equal(uint64_t seed, const ReplayResult& result, const std::vector<ClassCounters>& counters) {
    if (!result.error.empty() || result.cut_off) {
        std::fprintf(stderr, "seed %" PRIu64 ": %s\n", seed, result.error.c_str());
    }
    CHECK(result.error.empty() && !result.cut_off);
    CHECK(result.classes.size() == counters.size() && result.recorded.size() == counters.size() * kTraceEndFields);
    ReplayCounts sum;
    for (const ReplayPass& pass : result.passes) {
        sum.hits += pass.counts.hits;
        sum.late_hits += pass.counts.late_hits;
        sum.misses += pass.counts.misses;
        sum.reads += pass.counts.reads;
    }
    for (size_t c = 0; c < counters.size(); c++) {
        const ReplayCounts& mine = result.classes[c];
        const ClassCounters& theirs = counters[c];
        bool equal = mine.hits == theirs.hits && mine.late_hits == theirs.late_hits && mine.misses == theirs.misses &&
                     mine.reads == theirs.completed_count && mine.evictions == theirs.evictions &&
                     mine.read_bytes == theirs.read_bytes;
        if (!equal) {
            std::fprintf(stderr,
                         "seed %" PRIu64 " class %zu: hits %" PRIu64 "/%" PRIu64 " late %" PRIu64 "/%" PRIu64
                         " misses %" PRIu64 "/%" PRIu64 " reads %" PRIu64 "/%" PRIu64 " evictions %" PRIu64 "/%" PRIu64 "\n",
                         seed, c, mine.hits, theirs.hits, mine.late_hits, theirs.late_hits, mine.misses, theirs.misses,
                         mine.reads, theirs.completed_count, mine.evictions, theirs.evictions);
        }
        CHECK(equal);
        const uint64_t* recorded = result.recorded.data() + c * kTraceEndFields;
        CHECK(recorded[0] == theirs.hits && recorded[1] == theirs.late_hits && recorded[2] == theirs.misses);
        CHECK(recorded[3] == theirs.completed_count && recorded[4] == theirs.evictions);
        CHECK(recorded[5] == theirs.stall_ns / 1000);
        sum.hits -= mine.hits;
        sum.late_hits -= mine.late_hits;
        sum.misses -= mine.misses;
        sum.reads -= mine.reads;
    }
    CHECK(sum.hits == 0 && sum.late_hits == 0 && sum.misses == 0 && sum.reads == 0); // passes sum up to the whole
}

uint64_t run_count = 400;
uint64_t first_seed = 0;

void verbatim_is_exact() {
    Tally tally;
    for (uint64_t seed = first_seed; seed < first_seed + run_count; seed++) {
        StreamRig rig;
        std::vector<ClassCounters> counters;
        std::string path = path_of("exact");
        if (!record(seed, rig, path, &counters)) {
            continue;
        }
        std::vector<uint8_t> records = records_of(path);
        expect_equal(seed, replay_verbatim(span(records), shape_of(rig.plan), classes_of(rig.plan), never), counters);
        for (const ClassCounters& c : counters) {
            tally.hits += c.hits;
            tally.late_hits += c.late_hits;
            tally.misses += c.misses;
            tally.prefetches += c.prefetch_reads;
            tally.waits += c.waiting;
            tally.failures += c.failed_reads;
            tally.dropped += c.dropped_prefetches;
        }
        unlink(path.c_str());
    }
    std::printf("  %" PRIu64 " hits, %" PRIu64 " late, %" PRIu64 " misses, %" PRIu64 " prefetches (%" PRIu64
                " dropped), %" PRIu64 " left to waves, %" PRIu64 " failed reads\n",
                tally.hits, tally.late_hits, tally.misses, tally.prefetches, tally.dropped, tally.waits, tally.failures);
    bool all = tally.hits && tally.late_hits && tally.misses && tally.prefetches && tally.waits && tally.failures &&
               tally.dropped;
    CHECK(run_count < 100 || all); // the runs met everything that the records are for
}

// The exactness is no accident of small numbers: another policy or another size does not give the same counts.
void another_cache_differs() {
    uint32_t other_policy = 0;
    uint32_t other_size = 0;
    for (uint64_t seed = 0; seed < 60; seed++) {
        StreamRig rig;
        std::vector<ClassCounters> counters;
        std::string path = path_of("other");
        if (!record(seed, rig, path, &counters)) {
            continue;
        }
        std::vector<uint8_t> records = records_of(path);
        auto differs = [&](const std::vector<ReplayClass>& classes) {
            ReplayResult result = replay_verbatim(span(records), shape_of(rig.plan), classes, never);
            bool same = result.error.empty();
            for (size_t c = 0; same && c < counters.size(); c++) {
                same = result.classes[c].hits == counters[c].hits && result.classes[c].misses == counters[c].misses;
            }
            return !same;
        };
        std::vector<ReplayClass> classes = classes_of(rig.plan);
        for (ReplayClass& c : classes) {
            c.policy = CachePolicy{};
            c.policy.kind = PolicyKind::kLfuDecay;
        }
        other_policy += differs(classes) ? 1 : 0;
        classes = classes_of(rig.plan);
        for (ReplayClass& c : classes) {
            c.slot_count += 1;
        }
        other_size += differs(classes) ? 1 : 0;
        unlink(path.c_str());
    }
    std::printf("  of 60: another policy differs in %u, one more slot in %u\n", other_policy, other_size);
    CHECK(other_policy > 20 && other_size > 20);
}

// Ops that fit: no waves. Then the model is the verbatim replay, and the optimum reads least.
void model_and_optimum() {
    for (uint64_t seed = 0; seed < 120; seed++) {
        Random random{mix(seed + 5000)};
        StreamRig rig;
        rig.plan.reader = {2, 4096, true, false, 10, 1};
        rig.plan.lookahead_strides = 0;
        uint32_t stride_count = 20 + random.below(60);
        ClassSpec spec{};
        spec.stride_bytes = 4096;
        spec.slot_count = 8 + random.below(20);
        spec.op_slots = 1;
        spec.policy.kind = static_cast<PolicyKind>(random.below(4));
        spec.policy.half_life_tokens = random.below(40);
        spec.policy.most_pass_tokens = random.below(3);
        spec.policy.stale_after_passes = random.below(3);
        spec.policy.pinned_slots = spec.policy.kind == PolicyKind::kPinnedCyclic ? spec.slot_count - 4 : 0;
        rig.add_class(stride_count, spec);
        rig.must_open();
        TraceWriter trace;
        std::string error;
        std::string path = path_of("model");
        CHECK(trace.open({path, kHeader, stride_count, {}}, &error));
        rig.stream.trace_to(&trace);
        for (uint32_t pass = 0; pass < 30; pass++) {
            rig.stream.begin_pass(1);
            for (uint32_t op = 0; op + 4 <= stride_count; op += 4) {
                uint32_t square = random.below(16);
                rig.op({op + square % 4, op + (square % 4 + 1 + square / 4 % 3) % 4});
            }
        }
        StreamCounters seen = rig.stream.counters();
        std::vector<ClassCounters> counters(seen.classes.begin(), seen.classes.end());
        rig.stream.close();
        trace.close();
        std::vector<uint8_t> records = records_of(path);
        ReplayShape shape = shape_of(rig.plan);
        std::vector<ReplayClass> classes = classes_of(rig.plan);
        expect_equal(seed, replay_verbatim(span(records), shape, classes, never), counters);
        ReplayResult model = replay_model(span(records), shape, classes, {0, 0}, never);
        CHECK(model.error.empty() && model.classes[0].hits == counters[0].hits);
        CHECK(model.classes[0].misses == counters[0].misses && model.classes[0].evictions == counters[0].evictions);
        CHECK(model.passes.size() == 30);
        ReplayResult late = replay_model(span(records), shape, classes, {0, 10}, never);
        ReplayCounts after;
        for (size_t pass = 10; pass < 30; pass++) {
            after.hits += model.passes[pass].counts.hits;
            after.misses += model.passes[pass].counts.misses;
        }
        CHECK(late.classes[0].hits == after.hits && late.classes[0].misses == after.misses);
        ReplayResult best = replay_optimum(span(records), shape, classes, {0, 0}, never);
        ReplayResult best_late = replay_optimum(span(records), shape, classes, {0, 10}, never);
        CHECK(best.error.empty() && best.classes[0].asked_bytes == model.classes[0].asked_bytes);
        CHECK(best_late.classes[0].asked_bytes == late.classes[0].asked_bytes);
        for (uint32_t kind = 0; kind < 4; kind++) {
            classes[0].policy.kind = static_cast<PolicyKind>(kind);
            classes[0].policy.pinned_slots = classes[0].slot_count - 4;
            ReplayResult any = replay_model(span(records), shape, classes, {0, 0}, never);
            CHECK(any.error.empty() && any.classes[0].reads >= best.classes[0].reads);
        }
        CHECK(count_uses(span(records), shape, {0, 30}, &error).size() == stride_count && error.empty());
        unlink(path.c_str());
    }
}

// 0 1 2 3, four times, three slots: the optimum keeps two and passes two through after the first round (a slot is needed
// to pass), or evicts what is farthest; either way 3 hits a round are impossible and the count is known.
void optimum_of_a_cycle() {
    StreamRig rig;
    rig.plan.reader = {1, 4096, true, false, 10, 1};
    rig.plan.lookahead_strides = 0;
    ClassSpec spec{};
    spec.stride_bytes = 4096;
    spec.slot_count = 3;
    spec.op_slots = 1;
    rig.add_class(4, spec);
    rig.must_open();
    TraceWriter trace;
    std::string error;
    std::string path = path_of("cycle");
    CHECK(trace.open({path, kHeader, 4, {}}, &error));
    rig.stream.trace_to(&trace);
    for (uint32_t pass = 0; pass < 4; pass++) {
        rig.stream.begin_pass(1);
        for (uint32_t stride = 0; stride < 4; stride++) {
            rig.op({stride});
        }
    }
    CHECK(rig.stream.counters().total.hits == 0); // LRU over a cycle
    rig.stream.close();
    trace.close();
    std::vector<uint8_t> records = records_of(path);
    ReplayResult best = replay_optimum(span(records), shape_of(rig.plan), classes_of(rig.plan), {0, 0}, never);
    CHECK(best.classes[0].hits == 9 && best.classes[0].misses == 7); // 0 1 2 stay, 3 passes through
    std::vector<ReplayClass> classes = classes_of(rig.plan);
    classes[0].policy.kind = PolicyKind::kPinnedCyclic;
    classes[0].policy.pinned_slots = 2;
    classes[0].kept = {0, 1, 0, 1}; // a chosen subset
    ReplayResult pinned = replay_model(span(records), shape_of(rig.plan), classes, {0, 0}, never);
    CHECK(pinned.classes[0].hits == 6 && pinned.classes[0].misses == 10); // 1 and 3 stay, 0 and 2 take turns
    unlink(path.c_str());
}

// Bytes that are not what the writer wrote: a sentence or a result, never a crash. And a trace that ends anywhere.
void damaged_traces() {
    uint32_t errors = 0;
    uint32_t cut = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        StreamRig rig;
        std::vector<ClassCounters> counters;
        std::string path = path_of("damaged");
        if (!record(seed, rig, path, &counters)) {
            continue;
        }
        std::vector<uint8_t> records = records_of(path);
        ReplayShape shape = shape_of(rig.plan);
        std::vector<ReplayClass> classes = classes_of(rig.plan);
        Random random{mix(seed + 77)};
        for (uint32_t i = 0; i < 60; i++) {
            std::vector<uint8_t> bad = records;
            if (i % 3 == 0) {
                bad.resize(random.below(bad.size()));
            } else {
                for (uint32_t n = 1 + random.below(4); n > 0; n--) {
                    bad[random.below(bad.size())] = static_cast<uint8_t>(random.next());
                }
            }
            ReplayResult result = replay_verbatim(span(bad), shape, classes, never);
            errors += result.error.empty() ? 0 : 1;
            cut += result.cut_off ? 1 : 0;
            CHECK(i % 3 != 0 || result.cut_off || !result.error.empty());
            replay_model(span(bad), shape, classes, {rig.plan.lookahead_strides, 1}, never);
            replay_optimum(span(bad), shape, classes, {0, 1}, never);
        }
        unlink(path.c_str());
    }
    std::printf("  %u errors, %u cut off\n", errors, cut);
    CHECK(errors > 100 && cut > 100);
}

// A disk that takes no more: a limit on the size of files gives EFBIG where a full disk gives ENOSPC.
void full_disk() {
    StreamRig rig;
    rig.plan.reader = {1, 4096, true, false, 10, 1};
    rig.plan.lookahead_strides = 0;
    ClassSpec spec{};
    spec.stride_bytes = 4096;
    spec.slot_count = 4;
    spec.op_slots = 1;
    rig.add_class(64, spec);
    rig.must_open();
    TraceWriter trace;
    std::string error;
    std::string path = path_of("full");
    std::atomic<uint32_t> told{0};
    std::string sentence;
    auto on_failure = [&](const std::string& text) {
        sentence = text;
        told++;
    };
    struct rlimit before;
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    std::signal(SIGXFSZ, SIG_IGN);
    struct rlimit small{40000, before.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK(trace.open({path, kHeader, 64, on_failure}, &error));
    rig.stream.trace_to(&trace);
    for (uint32_t i = 0; i < 30000; i++) {
        rig.stream.begin_pass(1);
        CHECK(rig.op({i % 64, (i + 1) % 64}) == Status::kOk);
    }
    rig.stream.close();
    trace.close();
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    std::printf("  %s\n", sentence.c_str());
    CHECK(told == 1 && sentence.find("ended after 40000 bytes") != std::string::npos);
    CHECK(!exists(path) && !exists(path + ".part"));
    CHECK(!trace.open({folder + "/no/such/folder", kHeader, 64, {}}, &error) && error.find("--trace") != std::string::npos);
}

} // namespace

int main(int argc, char** argv) {
    run_count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 400;
    first_seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    char name[] = "/tmp/hypura-replay-XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    folder = name;
    CASE(verbatim_is_exact);
    CASE(another_cache_differs);
    CASE(model_and_optimum);
    CASE(optimum_of_a_cycle);
    CASE(damaged_traces);
    CASE(full_disk);
    CHECK(rmdir(name) == 0);
    return 0;
}

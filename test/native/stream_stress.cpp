// Seeded runs of consumers over a faulty source: whatever the faults, what is ready has the right bytes until it is
// released, what fails names a fault that was put in, and when the faults are gone every stride can be had.
//   stream_stress [runs] [first seed]
#include "random_plan.h"

#include <atomic>
#include <memory>
#include <thread>

using namespace hypura;

namespace {

struct Tally {
    std::atomic<uint64_t> failures{0};
    std::atomic<uint64_t> interruptions{0};
    std::atomic<uint64_t> ops{0};
};

// A few passes, each of whose ops ends as it may.
void consume(StreamRig& rig, uint64_t seed, bool fatal, Tally* tally) {
    Random random{seed};
    random_passes(rig, random, 3 + random.below(4), [&](const std::vector<uint32_t>& op) {
        Status status = rig.op(op);
        tally->ops++;
        if (status == Status::kFailed) {
            ReadError error = rig.stream.last_error();
            CHECK(fatal && error.fault != ReadFault::kNone && error.file_index < rig.plan.files.size());
            CHECK(error.offset < rig.plan.files[error.file_index].bytes);
            tally->failures++;
        } else if (status == Status::kInterrupted) {
            tally->interruptions++;
        }
        return status;
    });
}

void run(uint64_t seed, Tally* tally) {
    Random random{mix(seed)};
    StreamRig rig;
    random_plan(rig, random);
    std::vector<uint64_t> file_bytes;
    for (const FileSpec& file : rig.plan.files) {
        file_bytes.push_back(file.bytes);
    }
    rig.source = std::make_unique<FakeSource>(file_bytes);
    Faults faults = random_faults(rig, random);
    rig.source->set(faults);
    PoolMemory* pool;
    if (random.chance(4)) {
        uint64_t most = 0;
        std::vector<uint64_t> slot_bytes;
        for (const ClassSpec& spec : rig.plan.classes) {
            most = std::max(most, spec.slot_bytes * spec.slot_count);
            slot_bytes.push_back(spec.slot_bytes);
        }
        uint32_t classes = static_cast<uint32_t>(rig.plan.classes.size());
        rig.device = std::make_unique<FakeDevicePool>(classes, most, slot_bytes);
        pool = rig.device.get();
    } else {
        rig.host = std::make_unique<HostPool>();
        CHECK(rig.host->open(rig.plan.classes, {platform::PageKind::kBase, 1}));
        pool = rig.host.get();
    }
    std::string error;
    if (!rig.stream.open(rig.plan, rig.source.get(), pool, &error)) {
        CHECK(error.find("class ") == 0); // a plan that does not fit is refused with a sentence
        return;
    }
    std::thread second;
    if (random.chance(3)) {
        uint64_t other = random.next();
        second = std::thread([&rig, other, &faults, tally] { consume(rig, other, faults.fatal(), tally); });
    }
    std::thread meddler;
    std::atomic<bool> over{false};
    if (random.chance(3)) {
        meddler = std::thread([&rig, &over] {
            for (bool on = true; !over; on = !on) {
                rig.stream.interrupt(on);
                platform::sleep_ns(on ? 10000 : 300000);
                rig.stream.counters();
                rig.stream.check();
            }
            rig.stream.interrupt(false);
        });
    }
    consume(rig, random.next(), faults.fatal(), tally);
    if (second.joinable()) {
        second.join();
    }
    over = true;
    if (meddler.joinable()) {
        meddler.join();
    }
    CHECK(rig.stream.pinned_count() == 0);
    rig.stream.drain();
    rig.stream.check();

    rig.source->set({}); // no more faults: everything can be had
    for (uint32_t i = 0; i < rig.plan.strides.size(); i++) {
        CHECK(rig.op({i}) == Status::kOk);
    }
    rig.stream.drain();
    rig.stream.check();
}

} // namespace

int main(int argc, char** argv) {
    uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
    uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    Tally tally;
    for (uint64_t seed = first; seed < first + runs; seed++) {
        std::fprintf(stderr, "\rseed %" PRIu64, seed);
        run(seed, &tally);
    }
    std::printf("\n%" PRIu64 " runs, %" PRIu64 " ops, %" PRIu64 " failed reads met, %" PRIu64 " interruptions\n", runs,
                tally.ops.load(), tally.failures.load(), tally.interruptions.load());
    CHECK(runs < 100 || (tally.failures > 0 && tally.interruptions > 0));
    return 0;
}

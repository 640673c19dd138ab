// The measurements of the data plane on a real file, with durations of next to nothing: what is counted, that nothing
// is read twice, that a stop ends it, and each way in which it fails.
#include "check.h"
#include "measure.h"

#include <cstring>
#include <fcntl.h>
#include <set>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

using namespace hypura;

namespace {

const StopQuestion kNever = [] { return false; };
constexpr uint64_t kLong = 60'000'000'000;

bool exists(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0;
}

// A scratch file of the test's own, gone at its end.
struct File {
    std::string path = "measure_test." + std::to_string(getpid()) + ".tmp";
    uint64_t bytes;

    explicit File(uint64_t wanted) : bytes(wanted) {
        ScratchFigures figures;
        std::string error;
        CHECK(write_scratch({path, wanted, 65536, kLong}, kNever, &figures, &error));
        CHECK(error.empty() && figures.written_bytes == wanted);
    }
    ~File() { unlink(path.c_str()); }

    ReadMeasure::Options options() const { return {{{path, bytes}}, 1 << 22, false, 8, 1000, 100000}; }
};

void shuffles_are_permutations() {
    for (uint64_t count : {1ull, 2ull, 3ull, 4ull, 5ull, 63ull, 64ull, 65ull, 1000ull, 4097ull}) {
        std::set<uint64_t> first_places;
        for (uint64_t seed = 0; seed < 20; seed++) {
            Shuffle shuffle(count, seed);
            std::set<uint64_t> seen;
            for (uint64_t i = 0; i < count; i++) {
                CHECK(shuffle[i] < count && seen.insert(shuffle[i]).second);
            }
            first_places.insert(shuffle[0]);
        }
        CHECK(count < 1000 || first_places.size() > 10);
    }
}

// By threads and by io_uring; where that is refused it is said, and nothing is read.
void every_place_is_read_once() {
    File file(1 << 20);
    for (int kind = 0; kind < 8; kind++) {
        const bool direct = (kind & 1) != 0;
        const uint32_t skew = (kind & 2) != 0 ? 1184 : 0;
        const bool ring = (kind & 4) != 0;
        for (uint32_t depth : {1u, 3u, 16u}) {
            ReadMeasure measure;
            ReadFigures figures;
            std::string error;
            CHECK(measure.open(file.options(), &error));
            CHECK(measure.run({65536, skew, depth, direct, kLong, 7, ring}, kNever, &figures, &error));
            if (figures.refused) {
                CHECK(ring && figures.read_count == 0);
                continue;
            }
            uint64_t blocks = skew == 0 ? 16 : 15;
            CHECK(figures.exhausted && figures.read_count == blocks && figures.delivered_bytes == blocks * 65536);
            CHECK(figures.wall_ns > 0 && figures.p50_ns > 0 && figures.p50_ns <= figures.p99_ns);
            CHECK(direct || !figures.direct);
        }
    }
}

void a_moment_is_enough_for_one_read_each() {
    File file(1 << 20);
    ReadMeasure measure;
    ReadFigures figures;
    std::string error;
    CHECK(measure.open(file.options(), &error));
    CHECK(measure.run({4096, 0, 5, true, 0, 1}, kNever, &figures, &error));
    CHECK(figures.read_count == 5 && !figures.exhausted);
}

void stops() {
    File file(1 << 20);
    ReadMeasure measure;
    ReadFigures figures;
    std::string error;
    CHECK(measure.open(file.options(), &error));
    CHECK(measure.run({4096, 0, 1, true, kLong, 1}, [] { return true; }, &figures, &error));
    CHECK(figures.read_count <= 256);
    CopyFigures copied;
    uint64_t start_ns = platform::now_ns();
    CHECK(measure_copy({2, 1 << 20, kLong}, [] { return true; }, &copied, &error));
    CHECK(platform::now_ns() - start_ns < kLong / 4);
}

void refuses_what_it_cannot_read() {
    File file(1 << 20);
    std::string error;
    ReadMeasure absent;
    CHECK(!absent.open({{{file.path + ".none", 5}}, 1 << 20, false, 8, 1000, 100000}, &error));
    CHECK(error.find("cannot open") == 0);
    error.clear();
    ReadMeasure grown;
    CHECK(!grown.open({{{file.path, 5}}, 1 << 20, false, 8, 1000, 100000}, &error));
    error.clear();
    ReadMeasure measure;
    ReadFigures figures;
    CHECK(measure.open(file.options(), &error));
    CHECK(!measure.run({2 << 20, 0, 1, true, 0, 1}, kNever, &figures, &error));
    CHECK(error.find("shorter than one read of 2097152 bytes") != std::string::npos);
    error.clear();
    CHECK(!measure.run({65536, 0, 512, true, 0, 1}, kNever, &figures, &error));
    CHECK(error.find("no memory") != std::string::npos);
    error.clear();
    CHECK(truncate(file.path.c_str(), 4096) == 0); // under the measurement
    CHECK(!measure.run({65536, 0, 2, true, kLong, 1}, kNever, &figures, &error));
    CHECK(error.find(file.path) == 0);
    std::printf("  %s\n", error.c_str());
}

void scratch_files() {
    File file(1 << 20);
    ScratchFigures figures;
    std::string error;
    CHECK(!write_scratch({file.path, 65536, 65536, kLong}, kNever, &figures, &error)); // there is one
    CHECK(exists(file.path) && error.find("cannot write") == 0);
    error.clear();
    std::string other = file.path + ".2";
    int chunks = 0;
    CHECK(!write_scratch({other, 1 << 20, 65536, kLong}, [&] { return ++chunks > 2; }, &figures, &error));
    CHECK(!exists(other));
    error.clear();
    figures = {};
    CHECK(write_scratch({other, 1 << 20, 65536, 0}, kNever, &figures, &error)); // no time: one chunk
    CHECK(exists(other) && figures.written_bytes == 65536);
    unlink(other.c_str());
}

void copies() {
    CopyFigures figures;
    std::string error;
    CHECK(measure_copy({3, 3 << 20, 0}, kNever, &figures, &error));
    CHECK(figures.copied_bytes == 3 << 20 && figures.wall_ns > 0 && error.empty());
    figures = {};
    CHECK(measure_copy({3, 3 << 20, 0, true}, kNever, &figures, &error));
    CHECK(figures.copied_bytes == 3 << 20 && figures.wall_ns > 0 && figures.thread_ns > 0 && error.empty());
    CHECK(!measure_copy({8, 4096, 0}, kNever, &figures, &error)); // less than a page for each
}

} // namespace

int main() {
    CASE(shuffles_are_permutations);
    CASE(every_place_is_read_once);
    CASE(a_moment_is_enough_for_one_read_each);
    CASE(stops);
    CASE(refuses_what_it_cannot_read);
    CASE(scratch_files);
    CASE(copies);
    return 0;
}

// Bandwidth of the reader on a cold file: drops FILE from the page cache, then streams it through a small pool in
// strides and prints MB/s beside the kernel's own count. Not a test.
//   reader_bench FILE [piece_kib=1024] [threads=8] [pages=huge|base] [access=direct|buffered] [stride_kib=1152]
//                [order=random|sequential] [limit_mib=0: the whole file]
#include "check.h"
#include "stream.h"

#include <cstring>
#include <string>

using namespace hypura;

namespace {

uint64_t number(int argc, char** argv, int at, uint64_t otherwise) {
    return argc > at ? std::strtoull(argv[at], nullptr, 10) : otherwise;
}

bool word(int argc, char** argv, int at, const char* wanted, bool otherwise) {
    return argc > at ? std::strcmp(argv[at], wanted) == 0 : otherwise;
}

} // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr,
                     "usage: reader_bench FILE [piece_kib] [threads] [huge|base] [direct|buffered] [stride_kib] "
                     "[random|sequential] [limit_mib]\n");
        return 2;
    }
    uint32_t piece_bytes = static_cast<uint32_t>(number(argc, argv, 2, 1024)) << 10;
    uint32_t threads = static_cast<uint32_t>(number(argc, argv, 3, 8));
    bool huge = word(argc, argv, 4, "huge", true);
    bool direct = word(argc, argv, 5, "direct", true);
    uint64_t stride_bytes = number(argc, argv, 6, 1152) << 10;
    bool random_order = word(argc, argv, 7, "random", true);
    uint64_t limit_bytes = number(argc, argv, 8, 0) << 20;

    int descriptor = platform::open_read(argv[1], platform::Access::kBuffered);
    platform::FileIdentity identity{};
    if (descriptor < 0 || platform::identify(descriptor, &identity) != 0) {
        std::fprintf(stderr, "cannot open %s\n", argv[1]);
        return 1;
    }
    platform::drop_cached(descriptor, {0, 0});
    platform::close_file(descriptor);

    StreamPlan plan;
    plan.files = {{argv[1], identity.bytes}};
    uint32_t count = static_cast<uint32_t>(identity.bytes / stride_bytes);
    for (uint32_t i = 0; i < count; i++) {
        plan.strides.push_back({0, i, i, 1});
        plan.extents.push_back({0, i * stride_bytes, stride_bytes});
    }
    const uint32_t slots = 64;
    plan.classes = {{stride_bytes, min_slot_bytes(stride_bytes), slots, 1, {}}};
    plan.reader = {threads, piece_bytes, direct, false, 100, 1000000};
    plan.lookahead_strides = 0;
    FileSource source;
    HostPool pool;
    Stream stream;
    std::string error;
    bool opened = source.open(plan.files, direct, &error) &&
                  pool.open(plan.classes, {huge ? platform::PageKind::kHuge : platform::PageKind::kBase, 2}) &&
                  stream.open(plan, &source, &pool, &error);
    if (!opened) {
        std::fprintf(stderr, "%s\n", error.c_str());
        return 1;
    }
    pool.make_present();
    pool.wait_present();
    std::vector<uint32_t> order(count);
    Random random{1};
    for (uint32_t i = 0; i < count; i++) {
        order[i] = i;
        if (random_order) {
            uint32_t other = random.below(i + 1);
            order[i] = order[other];
            order[other] = i;
        }
    }
    if (limit_bytes > 0 && limit_bytes / stride_bytes < count) {
        count = static_cast<uint32_t>(limit_bytes / stride_bytes);
    }
    platform::StorageCounters before{};
    platform::StorageCounters after{};
    platform::storage_counters(&before);
    uint64_t start_ns = platform::now_ns();
    std::vector<Lease> leases(slots / 2);
    // Half the slots are read ahead while the other half is waited for, so the queue never runs dry.
    for (uint32_t at = 0; at < count;) {
        uint32_t n = 0;
        for (; n < leases.size() && at < count; n++, at++) {
            leases[n].stride_index = order[at];
        }
        stream.begin({leases.data(), n}, Holding::kNothing);
        uint32_t ahead = count - at < slots / 2 ? count - at : slots / 2;
        stream.prefetch({order.data() + at, ahead});
        for (uint32_t i = 0; i < n; i++) {
            if (stream.wait(&leases[i]) != Status::kOk) {
                char text[256];
                stream.describe_error(stream.last_error(), {text, sizeof text});
                std::fprintf(stderr, "%s\n", text);
                return 1;
            }
        }
        stream.release({leases.data(), n});
    }
    double seconds = static_cast<double>(platform::now_ns() - start_ns) / 1e9;
    platform::storage_counters(&after);
    StreamCounters counters = stream.counters();
    std::printf("%s %s piece %u KiB, %u threads, stride %" PRIu64 " KiB: %.0f MB/s (%.2f s; storage %.3f of delivered; "
                "fallbacks %u)\n",
                huge && pool.huge() ? "huge" : "base", direct ? "direct" : "buffered", piece_bytes >> 10, threads,
                stride_bytes >> 10, static_cast<double>(counters.total.read_bytes) / 1e6 / seconds, seconds,
                static_cast<double>(after.read_bytes - before.read_bytes) /
                    static_cast<double>(counters.total.read_bytes),
                counters.fallback_files);
    return 0;
}

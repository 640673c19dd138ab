// See measure.h.
#include "measure.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <numeric>
#include <system_error>
#include <unistd.h>

namespace hypura {
namespace {

using platform::kDirectAlign;

uint64_t mixed(uint64_t x) { // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The blocks of all files as one row.
struct Blocks {
    std::vector<uint64_t> ends; // of each file's blocks in the row
    uint32_t read_bytes;
    uint32_t skew_bytes;

    Blocks(const std::vector<FileSpec>& files, const ReadCell& cell)
        : read_bytes(cell.read_bytes), skew_bytes(cell.skew_bytes) {
        uint64_t end = 0;
        for (const FileSpec& file : files) {
            end += file.bytes < skew_bytes ? 0 : (file.bytes - skew_bytes) / read_bytes;
            ends.push_back(end);
        }
    }
    uint64_t count() const { return ends.back(); }
    FilePlace place(uint64_t index) const {
        const auto file = std::upper_bound(ends.begin(), ends.end(), index) - ends.begin();
        const uint64_t first = file == 0 ? 0 : ends[static_cast<size_t>(file) - 1];
        return {static_cast<uint32_t>(file), (index - first) * read_bytes + skew_bytes};
    }
};

// Hands each reader thread one block after the other and notes how long it took. Each read under way has a slot of the
// memory, so that no two meet.
class BlockWork final : public PieceWork {
public:
    BlockWork(const ReadCell& cell, const Blocks& blocks, std::byte* memory)
        : cell_(cell), blocks_(blocks), order_(blocks.count(), cell.seed), memory_(memory) {
        for (uint32_t slot = 0; slot < cell.depth; slot++) {
            free_slots_.push_back(slot);
        }
    }

    bool take(Piece* piece) override {
        MutexLock lock(mutex_);
        const uint64_t now_ns = platform::now_ns();
        if (taken_ == 0) {
            start_ns_ = now_ns;
        }
        const bool late = taken_ >= cell_.depth && now_ns - start_ns_ >= cell_.duration_ns;
        exhausted_ = exhausted_ || (taken_ == blocks_.count() && !late && !over_);
        over_ = over_ || late || exhausted_;
        if (over_) {
            return false;
        }
        const uint32_t slot = free_slots_.back();
        free_slots_.pop_back();
        const uint64_t slot_bytes = cell_.read_bytes + 2 * kDirectAlign;
        *piece = Piece{};
        piece->job_index = slot;
        piece->from = blocks_.place(order_[taken_++]);
        piece->bytes = cell_.read_bytes;
        piece->host = memory_ + slot * slot_bytes;
        piece->slot_offset = piece->from.offset % kDirectAlign; // the phase that the stream gives a stride
        piece->in_place = true;
        return true;
    }

    void finish(uint32_t, const Piece& piece, const PieceResult& result) override {
        MutexLock lock(mutex_);
        end_ns_ = platform::now_ns();
        free_slots_.push_back(piece.job_index);
        if (result.error.fault == ReadFault::kNone) {
            durations_ns_.push_back(result.busy_ns);
        } else if (error_.fault == ReadFault::kNone) {
            error_ = result.error;
            over_ = true;
        }
    }

    void end() {
        MutexLock lock(mutex_);
        over_ = true;
    }
    bool over() {
        MutexLock lock(mutex_);
        return over_;
    }

    // After the threads have ended.
    ReadError error() {
        MutexLock lock(mutex_);
        return error_;
    }
    void report(ReadFigures* figures) {
        MutexLock lock(mutex_);
        std::sort(durations_ns_.begin(), durations_ns_.end());
        const size_t n = durations_ns_.size();
        figures->read_count = n;
        figures->delivered_bytes = n * cell_.read_bytes;
        figures->wall_ns = n == 0 ? 0 : end_ns_ - start_ns_;
        figures->p50_ns = n == 0 ? 0 : durations_ns_[(n - 1) / 2];
        figures->p99_ns = n == 0 ? 0 : durations_ns_[(n - 1) * 99 / 100];
        figures->exhausted = exhausted_;
    }

private:
    const ReadCell cell_;
    const Blocks& blocks_;
    const Shuffle order_;
    std::byte* const memory_;

    Mutex mutex_;
    std::vector<uint32_t> free_slots_ HY_GUARDED_BY(mutex_);
    std::vector<uint64_t> durations_ns_ HY_GUARDED_BY(mutex_);
    uint64_t taken_ HY_GUARDED_BY(mutex_) = 0;
    uint64_t start_ns_ HY_GUARDED_BY(mutex_) = 0;
    uint64_t end_ns_ HY_GUARDED_BY(mutex_) = 0;
    bool over_ HY_GUARDED_BY(mutex_) = false;
    bool exhausted_ HY_GUARDED_BY(mutex_) = false;
    ReadError error_ HY_GUARDED_BY(mutex_);
};

// The descriptors of a cell's files, for reads that do not go through the engine's source.
class Descriptors {
public:
    Descriptors() = default;
    Descriptors(const Descriptors&) = delete;
    Descriptors& operator=(const Descriptors&) = delete;
    ~Descriptors() {
        for (int descriptor : open_) {
            platform::close_file(descriptor);
        }
    }
    int add(const std::string& path, bool direct) {
        const int descriptor = platform::open_read(path.c_str(), direct ? platform::Access::kDirect : platform::Access::kBuffered);
        if (descriptor >= 0) {
            open_.push_back(descriptor);
        }
        return descriptor;
    }
    int operator[](uint32_t index) const { return open_[index]; }

private:
    std::vector<int> open_;
};

// What a piece is read as: a direct read begins and ends at page borders.
struct RingRead {
    Piece piece;
    uint64_t begun_ns = 0;
    uint64_t offset = 0;
    uint32_t bytes = 0;

    void start(const Piece& wanted, bool direct) {
        piece = wanted;
        const uint64_t phase = direct ? wanted.from.offset % kDirectAlign : 0;
        offset = wanted.from.offset - phase;
        const uint64_t end = wanted.from.offset + wanted.bytes;
        bytes = static_cast<uint32_t>((direct ? (end + kDirectAlign - 1) / kDirectAlign * kDirectAlign : end) - offset);
        begun_ns = platform::now_ns();
    }
    // A file may end within the last page.
    bool delivered(int64_t got) const {
        return got >= static_cast<int64_t>(piece.from.offset + piece.bytes - offset);
    }
};

// One thread that keeps `depth` reads under way. 0, or -errno of what could not be done.
int read_by_ring(platform::ReadRing& ring, const Descriptors& files, const ReadCell& cell, BlockWork& work, const StopQuestion& stop) {
    std::vector<RingRead> reads(cell.depth);
    uint32_t under_way = 0;
    int status = 0;
    const auto start = [&](uint32_t slot, const Piece& piece) {
        reads[slot].start(piece, cell.direct);
        const RingRead& read = reads[slot];
        status = ring.submit(files[piece.from.file_index], read.offset, {piece.host, read.bytes}, slot);
        under_way += status == 0 ? 1 : 0;
    };
    Piece piece;
    for (uint32_t i = 0; i < cell.depth && status == 0 && work.take(&piece); i++) {
        start(piece.job_index, piece);
    }
    while (under_way > 0) {
        platform::ReadRing::Done done{};
        const int waited = ring.wait(&done);
        if (waited < 0) {
            return waited; // the ring is closed with what is under way before the memory goes
        }
        under_way--;
        const RingRead& read = reads[done.tag];
        PieceResult result{};
        result.busy_ns = platform::now_ns() - read.begun_ns;
        const bool whole = read.delivered(done.result);
        status = whole || status < 0 ? status : done.result < 0 ? static_cast<int>(done.result) : -EIO;
        work.finish(0, read.piece, result);
        if (status < 0 || stop()) {
            work.end();
        }
        if (status == 0 && work.take(&piece)) {
            start(piece.job_index, piece);
        }
    }
    return status;
}

} // namespace

// ---- storage

Shuffle::Shuffle(uint64_t count, uint64_t seed) : count_(count), seed_(seed) {
    while (half_bits_ < 31 && (1ull << (2 * half_bits_)) < count) {
        half_bits_++;
    }
}

uint64_t Shuffle::operator[](uint64_t index) const {
    do {
        index = step(index);
    } while (index >= count_);
    return index;
}

uint64_t Shuffle::step(uint64_t value) const {
    const uint64_t mask = (1ull << half_bits_) - 1;
    uint64_t left = value >> half_bits_;
    uint64_t right = value & mask;
    for (uint64_t round = 1; round <= 4; round++) {
        const uint64_t next = left ^ (mixed(right + (seed_ + round) * 0x9e3779b97f4a7c15ull) & mask);
        left = right;
        right = next;
    }
    return left << half_bits_ | right;
}

bool ReadMeasure::open(const Options& options, std::string* error) {
    options_ = options;
    if (!source_.open(options.files, true, error)) {
        return false;
    }
    memory_ = platform::map_memory(options.memory_bytes,
                                   options.huge_pages ? platform::PageKind::kHuge : platform::PageKind::kBase);
    if (memory_.data == nullptr) {
        *error = "the system does not give the " + std::to_string(options.memory_bytes) + " bytes to read into";
        return false;
    }
    platform::touch_memory(memory_.data, memory_.bytes);
    return true;
}

void ReadMeasure::drop_files() {
    for (uint32_t i = 0; i < options_.files.size(); i++) {
        source_.drop_cached(i, {0, 0});
    }
}

bool ReadMeasure::run_ring(const ReadCell& cell, const StopQuestion& stop, ReadFigures* figures, std::string* error) {
    const Blocks blocks(options_.files, cell);
    platform::ReadRing ring;
    if (ring.open(cell.depth) < 0) {
        figures->refused = true;
        return true;
    }
    Descriptors files;
    for (const FileSpec& file : options_.files) {
        const int descriptor = files.add(file.path, cell.direct);
        if (descriptor < 0) {
            *error = file.path + " cannot be opened: " + std::strerror(-descriptor);
            return false;
        }
    }
    BlockWork work(cell, blocks, memory_.data);
    platform::StorageCounters before{};
    platform::StorageCounters after{};
    figures->has_storage = platform::storage_counters(&before);
    const int status = read_by_ring(ring, files, cell, work, stop);
    figures->has_storage = platform::storage_counters(&after) && figures->has_storage;
    if (!cell.direct) {
        drop_files();
    }
    if (status < 0) {
        *error = std::string("a read by io_uring failed: ") + std::strerror(-status);
        return false;
    }
    work.report(figures);
    figures->storage_bytes = after.read_bytes - before.read_bytes;
    figures->direct = cell.direct;
    return true;
}

bool ReadMeasure::run(const ReadCell& cell, const StopQuestion& stop, ReadFigures* figures, std::string* error) {
    const Blocks blocks(options_.files, cell);
    const uint64_t needed_bytes = cell.depth * (cell.read_bytes + 2 * kDirectAlign);
    if (blocks.count() == 0 || needed_bytes > options_.memory_bytes) {
        *error = blocks.count() == 0 ? "the file is shorter than one read of " + std::to_string(cell.read_bytes) + " bytes"
                                     : "there is no memory for so many reads of this size";
        return false;
    }
    if (!cell.direct || platform::kDirectMeetsCache) {
        drop_files();
    }
    if (cell.ring) {
        return run_ring(cell, stop, figures, error);
    }
    // Every read lands in place: the bounce buffers are never used, and so of the smallest size.
    const ReadSpec spec{cell.depth,           static_cast<uint32_t>(kDirectAlign), cell.direct, false,
                        options_.retry_count, options_.retry_wait_ns};
    FileModes modes;
    modes.open(static_cast<uint32_t>(options_.files.size()), source_, cell.direct);
    BlockWork work(cell, blocks, memory_.data);
    ReaderThreads threads;
    platform::StorageCounters before{};
    platform::StorageCounters after{};
    figures->has_storage = platform::storage_counters(&before);
    const bool opened = threads.open(&source_, nullptr, &modes, &work, spec);
    while (opened && !work.over()) {
        if (stop()) {
            work.end();
        } else {
            platform::sleep_ns(options_.poll_ns);
        }
    }
    work.end();
    threads.join();
    figures->has_storage = platform::storage_counters(&after) && figures->has_storage;
    if (!cell.direct) {
        drop_files();
    }
    if (!opened) {
        *error = "the system has no threads or memory left to read with";
        return false;
    }
    const ReadError fault = work.error();
    if (fault.fault != ReadFault::kNone) {
        char text[512];
        describe(fault, source_.path(fault.file_index), {text, sizeof text});
        *error = text;
        return false;
    }
    work.report(figures);
    figures->storage_bytes = after.read_bytes - before.read_bytes;
    figures->direct = cell.direct && modes.fallback_count() == 0;
    return true;
}

// ---- a file to read where there is none

namespace {

// False with the reason in `code` as -errno.
bool write_chunk(int descriptor, uint64_t offset, Span<const std::byte> chunk, int64_t* code) {
    for (uint32_t at = 0; at < chunk.count;) {
        const int64_t n = platform::write_at(descriptor, offset + at, {chunk.data + at, chunk.count - at});
        if (n == -EINTR) {
            continue;
        }
        if (n <= 0 || n % static_cast<int64_t>(kDirectAlign) != 0) {
            *code = n < 0 ? n : -ENOSPC;
            return false;
        }
        at += static_cast<uint32_t>(n);
    }
    return true;
}

void fill_random(std::byte* data, uint64_t bytes, uint64_t seed) {
    for (uint64_t at = 0; at < bytes; at += sizeof(uint64_t)) {
        const uint64_t word = mixed((seed + at + 1) * 0x9e3779b97f4a7c15ull);
        memcpy(data + at, &word, sizeof word);
    }
}

} // namespace

bool write_scratch(const ScratchSpec& spec, const StopQuestion& stop, ScratchFigures* figures, std::string* error) {
    platform::Memory chunk = platform::map_memory(spec.chunk_bytes, platform::PageKind::kBase);
    if (chunk.data == nullptr) {
        *error = "the system does not give the memory of one write";
        return false;
    }
    const int descriptor = platform::create_write(spec.path.c_str(), &figures->direct);
    int64_t code = descriptor < 0 ? descriptor : 0;
    const uint64_t start_ns = platform::now_ns();
    bool stopped = false;
    const auto in_time = [&] {
        return figures->written_bytes == 0 || platform::now_ns() - start_ns < spec.duration_ns;
    };
    while (code == 0 && figures->written_bytes < spec.bytes && in_time()) {
        stopped = stop();
        if (stopped) {
            break;
        }
        fill_random(chunk.data, spec.chunk_bytes, figures->written_bytes);
        if (write_chunk(descriptor, figures->written_bytes, {chunk.data, spec.chunk_bytes}, &code)) {
            figures->written_bytes += spec.chunk_bytes;
        }
    }
    platform::unmap_memory(&chunk);
    if (code == 0 && !stopped) {
        code = platform::sync_file(descriptor);
        platform::drop_cached(descriptor, {0, 0});
    }
    platform::close_file(descriptor);
    if (code == 0 && !stopped) {
        return true;
    }
    if (descriptor >= 0) {
        unlink(spec.path.c_str());
    }
    *error = code == 0 ? "stopped" : "cannot write " + spec.path + ": " + strerror(static_cast<int>(-code));
    return false;
}

// ---- memory

namespace {

// Eight sums, so that no addition waits for the one before it: the processor is never what is measured.
uint64_t sum_of(const std::byte* bytes, uint64_t count) {
    constexpr uint64_t kLanes = 8;
    uint64_t sums[kLanes] = {};
    for (uint64_t at = 0; at + sizeof(sums) <= count; at += sizeof(sums)) {
        uint64_t words[kLanes];
        memcpy(words, bytes + at, sizeof(words));
        for (uint64_t i = 0; i < kLanes; i++) {
            sums[i] += words[i];
        }
    }
    return std::accumulate(sums, sums + kLanes, uint64_t{0});
}

// Of a processor, that the calling thread has had.
uint64_t thread_time_ns() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

} // namespace

bool measure_copy(const CopySpec& spec, const StopQuestion& stop, CopyFigures* figures, std::string* error) {
    const uint64_t share = spec.buffer_bytes / spec.thread_count / kDirectAlign * kDirectAlign;
    platform::Memory from = platform::map_memory(spec.buffer_bytes, platform::PageKind::kHuge);
    platform::Memory to = platform::map_memory(spec.buffer_bytes, platform::PageKind::kHuge);
    bool right = share > 0 && from.data != nullptr && to.data != nullptr;
    *error = right ? "" : "the system does not give twice " + std::to_string(spec.buffer_bytes) + " bytes to copy";
    std::atomic<uint32_t> ready{0};
    std::atomic<bool> stopped{false};
    std::atomic<uint64_t> start_ns{0};
    std::atomic<uint64_t> copied_bytes{0};
    std::atomic<uint64_t> thread_ns{0};
    std::atomic<uint64_t> sum{0}; // keeps the compiler from leaving the reads out
    const auto body = [&](uint32_t index) {
        std::byte* source = from.data + index * share;
        std::byte* target = to.data + index * share;
        memset(source, static_cast<int>(index + 1), share); // pages that are all zero share one page of memory
        if (!spec.reads_only) {
            platform::touch_memory(target, share);
        }
        if (ready.fetch_add(1) + 1 == spec.thread_count) {
            start_ns = platform::now_ns();
        }
        while (start_ns == 0 && !stopped) {
            std::this_thread::yield();
        }
        const uint64_t begun_ns = thread_time_ns();
        do {
            if (spec.reads_only) {
                sum += sum_of(source, share);
            } else {
                memcpy(target, source, share);
            }
            copied_bytes += share;
            if (index == 0 && stop()) {
                stopped = true;
            }
        } while (!stopped && platform::now_ns() - start_ns < spec.duration_ns);
        thread_ns += thread_time_ns() - begun_ns;
    };
    std::vector<std::thread> threads;
    try {
        for (uint32_t i = 0; right && i < spec.thread_count; i++) {
            threads.emplace_back(body, i);
        }
    } catch (const std::system_error&) {
        *error = "the system has no threads left to copy with";
        right = false;
        stopped = true;
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    figures->wall_ns = right ? platform::now_ns() - start_ns : 0;
    figures->copied_bytes = copied_bytes;
    figures->thread_ns = thread_ns;
    platform::unmap_memory(&from);
    platform::unmap_memory(&to);
    return right;
}

} // namespace hypura

// See reader.h.
#include "reader.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace hypura {
namespace {

using platform::Access;
using platform::kDirectAlign;

uint64_t page_floor(uint64_t value) {
    return value & ~(kDirectAlign - 1);
}
uint64_t page_ceil(uint64_t value) {
    return page_floor(value + kDirectAlign - 1);
}

// The bytes of the file that a read of the piece asks for: whole pages when direct.
struct Superset {
    uint64_t base;
    uint64_t end;
    uint64_t head; // before the first wanted byte

    uint64_t bytes() const { return end - base; }
};

Superset superset_of(const Piece& piece, Access access) {
    const uint64_t end = piece.from.offset + piece.bytes;
    if (access != Access::kDirect) {
        return {piece.from.offset, end, 0};
    }
    const uint64_t base = page_floor(piece.from.offset);
    return {base, page_ceil(end), piece.from.offset - base};
}

// Bytes that arrived are those that the plan was made for, or the piece has an error.
void check_unchanged(ReadSource* source, const Piece& piece, PieceResult* result) {
    if (!source->unchanged(piece.from.file_index)) {
        result->error = {ReadFault::kChanged, 0, piece.from.file_index, piece.from.offset};
    }
}

} // namespace

void describe(const ReadError& error, const char* path, Span<char> text) {
    char reason[160];
    switch (error.fault) {
    case ReadFault::kNone:
        snprintf(reason, sizeof reason, "no error");
        break;
    case ReadFault::kErrno:
        snprintf(reason, sizeof reason, "read failed: %s (errno %d)", strerror(error.error_number), error.error_number);
        break;
    case ReadFault::kEndOfFile:
        snprintf(reason, sizeof reason, "the file ends there, before the bytes that were wanted");
        break;
    case ReadFault::kChanged:
        snprintf(reason, sizeof reason, "the file was changed after it was opened");
        break;
    case ReadFault::kStuck:
        snprintf(reason, sizeof reason, "repeated reads brought no bytes (errno %d)", error.error_number);
        break;
    case ReadFault::kUpload:
        snprintf(reason, sizeof reason, "the memory of the pool refused the bytes");
        break;
    }
    snprintf(text.data, text.count, "%s at offset %" PRIu64 ": %s", path, error.offset, reason);
}

// ---- FileSource

bool FileSource::open(const std::vector<FileSpec>& files, bool direct, std::string* error) {
    close();
    for (const FileSpec& spec : files) {
        files_.emplace_back();
        File& file = files_.back();
        file.path = spec.path;
        file.buffered = platform::open_read(spec.path.c_str(), Access::kBuffered);
        int code = file.buffered < 0 ? file.buffered : platform::identify(file.buffered, &file.identity);
        if (code < 0) {
            *error = "cannot open " + spec.path + ": " + strerror(-code);
        } else if (file.identity.bytes != spec.bytes) {
            *error = spec.path + " has " + std::to_string(file.identity.bytes) + " bytes, the plan was made for " +
                     std::to_string(spec.bytes) + ": make the plan again";
        } else if (direct) {
            // A second open could meet another file under the same name; the identity tells.
            file.direct = platform::open_read(spec.path.c_str(), Access::kDirect);
            platform::FileIdentity again{};
            if (file.direct < 0 && file.direct != -EINVAL) {
                *error = "cannot open " + spec.path + ": " + strerror(-file.direct);
            } else if (file.direct >= 0 && (platform::identify(file.direct, &again) != 0 ||
                                            again.inode != file.identity.inode || again.bytes != file.identity.bytes)) {
                *error = spec.path + " was replaced while it was being opened";
            }
        }
        if (!error->empty()) {
            close();
            return false;
        }
    }
    return true;
}

void FileSource::close() {
    for (File& file : files_) {
        platform::close_file(file.direct);
        platform::close_file(file.buffered);
    }
    files_.clear();
}

int64_t FileSource::read(FilePlace place, Access access, Span<std::byte> into) {
    const File& file = files_[place.file_index];
    return platform::read_at(access == Access::kDirect ? file.direct : file.buffered, place.offset, into);
}

int64_t FileSource::bytes_now(uint32_t file_index) {
    platform::FileIdentity identity{};
    int code = platform::identify(files_[file_index].buffered, &identity);
    return code < 0 ? code : static_cast<int64_t>(identity.bytes);
}

bool FileSource::unchanged(uint32_t file_index) {
    const File& file = files_[file_index];
    platform::FileIdentity identity{};
    return platform::identify(file.buffered, &identity) == 0 && identity.bytes == file.identity.bytes &&
           identity.modified_ns == file.identity.modified_ns;
}

void FileSource::drop_cached(uint32_t file_index, platform::FileRange range) {
    platform::drop_cached(files_[file_index].buffered, range);
}

namespace {

class FileBackgroundReads final : public BackgroundReads {
public:
    // By file; negative where there is no direct access.
    explicit FileBackgroundReads(std::vector<int> descriptors) : descriptors_(std::move(descriptors)) {}
    bool open(uint32_t depth) {
        begun_.resize(depth);
        return reads_.open(depth) == 0;
    }
    uint32_t begin(Span<const Read> reads) override {
        const auto count = std::min<uint32_t>(reads.count, static_cast<uint32_t>(begun_.size()));
        for (uint32_t i = 0; i < count; i++) {
            begun_[i] = {descriptors_[reads[i].place.file_index], reads[i].place.offset, reads[i].into, reads[i].tag};
        }
        return reads_.begin({begun_.data(), count});
    }
    uint32_t done_count() override { return reads_.done_count(); }
    uint32_t wait(Span<Done> done, uint64_t most_ns) override { return reads_.wait(done, most_ns); }

private:
    std::vector<int> descriptors_;
    std::vector<platform::AsyncReads::Read> begun_;
    platform::AsyncReads reads_;
};

} // namespace

std::unique_ptr<BackgroundReads> FileSource::background_reads(uint32_t depth) {
    std::vector<int> descriptors;
    for (const File& file : files_) {
        descriptors.push_back(file.direct);
    }
    auto reads = std::make_unique<FileBackgroundReads>(std::move(descriptors));
    return reads->open(depth) ? std::move(reads) : nullptr;
}

// ---- ReadQueue

void ReadQueue::open(uint32_t job_count, const ReadSpec& spec) {
    HY_CHECK(spec.piece_bytes >= kDirectAlign && spec.piece_bytes % kDirectAlign == 0);
    jobs_ = std::make_unique<Job[]>(job_count);
    job_count_ = job_count;
    active_count_ = 0;
    queued_bytes_[0] = queued_bytes_[1] = 0;
    in_flight_count_ = 0;
    heads_[0] = heads_[1] = tails_[0] = tails_[1] = kNone;
    piece_bytes_ = spec.piece_bytes;
    prefetch_depth_ = spec.prefetch_depth;
}

void ReadQueue::link(uint32_t job_index, List list) {
    Job& job = jobs_[job_index];
    uint32_t q = static_cast<uint32_t>(list);
    job.list = list;
    job.next = kNone;
    job.prev = tails_[q];
    (job.prev == kNone ? heads_[q] : jobs_[job.prev].next) = job_index;
    tails_[q] = job_index;
    queued_bytes_[q] += job.total_bytes - job.cut_bytes;
}

void ReadQueue::unlink(uint32_t job_index) {
    Job& job = jobs_[job_index];
    if (job.list == List::kOff) {
        return;
    }
    uint32_t q = static_cast<uint32_t>(job.list);
    (job.prev == kNone ? heads_[q] : jobs_[job.prev].next) = job.next;
    (job.next == kNone ? tails_[q] : jobs_[job.next].prev) = job.prev;
    job.list = List::kOff;
    queued_bytes_[q] -= job.total_bytes - job.cut_bytes;
}

void ReadQueue::submit(uint32_t job_index, const ReadJob& what, Urgency urgency) {
    HY_CHECK(job_index < job_count_ && !jobs_[job_index].active && what.extents.count > 0);
    Job& job = jobs_[job_index];
    job = Job{};
    job.what = what;
    for (const Extent& extent : what.extents) {
        HY_CHECK(extent.bytes > 0);
        job.total_bytes += extent.bytes;
    }
    job.active = true;
    active_count_++;
    link(job_index, urgency == Urgency::kDemand ? List::kDemand : List::kPrefetch);
}

void ReadQueue::promote(uint32_t job_index) {
    Job& job = jobs_[job_index];
    HY_CHECK(job.active);
    if (job.error.fault != ReadFault::kNone || job.list == List::kDemand || job.cut_bytes == job.total_bytes) {
        return;
    }
    job.cancelled = false;
    unlink(job_index);
    link(job_index, List::kDemand);
}

ReadQueue::Cancelled ReadQueue::cancel(uint32_t job_index) {
    Job& job = jobs_[job_index];
    HY_CHECK(job.active);
    unlink(job_index);
    job.cancelled = true;
    if (job.outstanding > 0) {
        return Cancelled::kDraining;
    }
    job.active = false;
    active_count_--;
    return Cancelled::kRemoved;
}

uint32_t ReadQueue::newest_prefetch(uint32_t after) const {
    return after == kNone ? tails_[static_cast<uint32_t>(List::kPrefetch)] : jobs_[after].prev;
}

uint64_t ReadQueue::startable_pieces() const {
    auto pieces = [this](List list) {
        return (queued_bytes_[static_cast<uint32_t>(list)] + piece_bytes_ - 1) / piece_bytes_;
    };
    return pieces(List::kDemand) + std::min<uint64_t>(pieces(List::kPrefetch), prefetch_room());
}

bool ReadQueue::next(Piece* piece) {
    uint32_t job_index = heads_[0] != kNone ? heads_[0] : prefetch_room() == 0 ? kNone : heads_[1];
    if (job_index == kNone) {
        return false;
    }
    Job& job = jobs_[job_index];
    piece->job_index = job_index;
    cut(job, piece);
    job.outstanding++;
    in_flight_count_++;
    job.cut_bytes += piece->bytes;
    queued_bytes_[static_cast<uint32_t>(job.list)] -= piece->bytes;
    job.extent_cut_bytes += piece->bytes;
    if (job.extent_cut_bytes == job.what.extents[job.extent_index].bytes) {
        job.extent_index++;
        job.extent_cut_bytes = 0;
    }
    if (job.cut_bytes == job.total_bytes) {
        unlink(job_index);
    }
    return true;
}

// Pieces end at page borders of the file, so only the ends of an extent are ever unaligned. The slot's first page may
// hold anything before the first extent and its last page anything behind the last one; a page that two extents share
// must not be overwritten by the superset of either.
void ReadQueue::cut(Job& job, Piece* piece) const {
    const Extent& extent = job.what.extents[job.extent_index];
    uint64_t at = extent.offset + job.extent_cut_bytes;
    uint64_t left = extent.bytes - job.extent_cut_bytes;
    uint64_t slot_at = job.what.phase_bytes + job.cut_bytes;
    uint64_t head = at % kDirectAlign;
    uint64_t bytes = std::min(left, piece_bytes_ - head);
    bool in_place = job.what.host != nullptr && head == slot_at % kDirectAlign;
    bool last_extent = job.extent_index + 1 == job.what.extents.count;
    if (in_place && head != 0 && job.cut_bytes != 0) {
        bytes = std::min(left, kDirectAlign - head);
        in_place = false;
    } else if (in_place && !last_extent) {
        uint64_t tail = (at + bytes) % kDirectAlign;
        if (tail != 0 && bytes > tail) {
            bytes -= tail;
        } else if (tail != 0) {
            in_place = false;
        }
    }
    piece->from = {extent.file_index, at};
    piece->bytes = static_cast<uint32_t>(bytes);
    piece->slot = job.what.slot;
    piece->slot_offset = slot_at;
    piece->host = job.what.host;
    piece->in_place = in_place;
}

ReadQueue::Outcome ReadQueue::finish(const Piece& piece, const ReadError& error) {
    Job& job = jobs_[piece.job_index];
    HY_CHECK(job.active && job.outstanding > 0);
    job.outstanding--;
    in_flight_count_--;
    if (error.fault == ReadFault::kNone) {
        job.delivered_bytes += piece.bytes;
    } else {
        if (job.error.fault == ReadFault::kNone) {
            job.error = error;
        }
        unlink(piece.job_index);
    }
    if (job.outstanding > 0) {
        return Outcome::kPending;
    }
    bool failed = job.error.fault != ReadFault::kNone;
    bool whole = job.delivered_bytes == job.total_bytes;
    if (!failed && !whole && !job.cancelled) {
        return Outcome::kPending; // it is still queued
    }
    job.active = false;
    active_count_--;
    return failed ? Outcome::kFailed : whole ? Outcome::kDone : Outcome::kCancelled;
}

// ---- FileModes

void FileModes::open(uint32_t file_count, const ReadSource& source, bool direct) {
    buffered_ = std::make_unique<std::atomic<bool>[]>(file_count);
    fallbacks_ = 0;
    for (uint32_t i = 0; i < file_count; i++) {
        bool buffered = !direct || !source.has_direct(i);
        buffered_[i] = buffered;
        fallbacks_ += direct && buffered ? 1 : 0;
    }
}

void FileModes::fall_back(uint32_t file_index) {
    if (!buffered_[file_index].exchange(true, std::memory_order_relaxed)) {
        fallbacks_.fetch_add(1, std::memory_order_relaxed);
    }
}

// ---- PieceReader

// The bytes that one attempt to read a piece asks the source for, and where they go.
struct PieceReader::Window {
    FilePlace from;
    Access access;
    std::byte* data;    // receives the byte at from.offset
    uint64_t bytes;     // asked for: whole pages when direct
    uint64_t need_from; // file offsets of the wanted bytes
    uint64_t need_end;
};

bool PieceReader::open(ReadSource* source, PoolMemory* pool, FileModes* modes, const ReadSpec& spec) {
    source_ = source;
    pool_ = pool;
    modes_ = modes;
    spec_ = spec;
    // A piece ends at a page border or its extent's end, so its superset is never longer than piece_bytes.
    // Address space alone: its pages become present with the first piece that needs them, and in most pools none does.
    bounce_ = platform::map_memory(spec.piece_bytes, platform::PageKind::kBase);
    return bounce_.data != nullptr;
}

PieceResult PieceReader::run(const Piece& piece) {
    PieceResult result;
    uint64_t start_ns = platform::now_ns();
    if (read_piece(piece, &result)) {
        check_unchanged(source_, piece, &result);
    }
    result.busy_ns = platform::now_ns() - start_ns;
    return result;
}

bool PieceReader::read_piece(const Piece& piece, PieceResult* result) {
    uint32_t file_index = piece.from.file_index;
    for (;;) {
        Access access = modes_->access(file_index);
        uint64_t need_end = piece.from.offset + piece.bytes;
        const auto [base, end, head] = superset_of(piece, access);
        bool to_slot = piece.host != nullptr && (piece.in_place || access == Access::kBuffered);
        std::byte* data = to_slot ? piece.host + piece.slot_offset - head : bounce_.data;
        HY_CHECK(to_slot || end - base <= bounce_.bytes);
        Window window{{file_index, base}, access, data, end - base, piece.from.offset, need_end};
        if (!fill(window, result)) {
            bool not_direct = access == Access::kDirect && result->error.fault == ReadFault::kErrno &&
                              result->error.error_number == EINVAL;
            if (not_direct) {
                modes_->fall_back(file_index);
                result->error = ReadError{};
                continue;
            }
            return false;
        }
        if (access == Access::kBuffered && spec_.drop_buffered) {
            source_->drop_cached(file_index, {base, end - base});
        }
        return to_slot || deliver(piece, {data + head, piece.bytes}, result);
    }
}

// Reads until the wanted bytes are there. A direct read that stops inside a page goes on from that page's start: the
// same bytes land on the same place again.
bool PieceReader::fill(const Window& window, PieceResult* result) {
    uint64_t have = window.from.offset; // everything before it has arrived
    uint32_t fruitless = 0;
    while (have < window.need_end) {
        uint64_t at = window.access == Access::kDirect ? page_floor(have) : have;
        uint64_t skip = at - window.from.offset;
        uint32_t ask = static_cast<uint32_t>(window.bytes - skip);
        int64_t n = source_->read({window.from.file_index, at}, window.access, {window.data + skip, ask});
        result->read_count++;
        HY_CHECK(n <= static_cast<int64_t>(ask));
        if (n > 0) {
            result->kernel_bytes += static_cast<uint64_t>(n);
        }
        if (n > 0 && at + static_cast<uint64_t>(n) > have) {
            have = at + static_cast<uint64_t>(n);
            fruitless = 0;
            continue;
        }
        int32_t code = n < 0 ? static_cast<int32_t>(-n) : 0;
        uint64_t missing = std::max(have, window.need_from);
        if (code != 0 && code != EINTR && code != EAGAIN) {
            result->error = {ReadFault::kErrno, code, window.from.file_index, missing};
            return false;
        }
        int64_t file_bytes = code == 0 ? source_->bytes_now(window.from.file_index) : INT64_MAX;
        if (file_bytes >= 0 && static_cast<uint64_t>(file_bytes) <= have) {
            result->error = {ReadFault::kEndOfFile, 0, window.from.file_index, missing};
            return false;
        }
        result->retry_count++;
        if (++fruitless > spec_.retry_count) {
            result->error = {ReadFault::kStuck, code, window.from.file_index, missing};
            return false;
        }
        if (code != EINTR) {
            platform::sleep_ns(spec_.retry_wait_ns);
        }
    }
    return true;
}

bool PieceReader::deliver(const Piece& piece, Span<const std::byte> bytes, PieceResult* result) {
    result->bounce_bytes += bytes.count;
    if (piece.host != nullptr) {
        memcpy(piece.host + piece.slot_offset, bytes.data, bytes.count);
        return true;
    }
    if (!pool_->upload(piece.slot, piece.slot_offset, bytes)) {
        result->error = {ReadFault::kUpload, 0, piece.from.file_index, piece.from.offset};
        return false;
    }
    return true;
}

// ---- BackgroundReader

bool BackgroundReader::open(ReadSource* source, const FileModes* modes, uint32_t depth) {
    source_ = source;
    modes_ = modes;
    under_way_.assign(depth, UnderWay{});
    begun_.resize(depth);
    done_.resize(depth);
    under_way_count_ = synchronous_count_ = 0;
    looked_ns_ = awaited_ns_ = awaited_count_ = 0;
    reads_ = depth > 0 ? source->background_reads(depth) : nullptr;
    return is_open();
}

void BackgroundReader::close() {
    HY_CHECK(under_way_count_ == 0);
    reads_.reset();
}

bool BackgroundReader::takes(const Piece& piece) const {
    return piece.host != nullptr && piece.in_place && modes_->access(piece.from.file_index) == Access::kDirect;
}

void BackgroundReader::begin(ReadQueue* queue, std::vector<Piece>* left) {
    uint32_t count = 0;
    const uint64_t now_ns = platform::now_ns();
    for (uint32_t tag = 0; tag < under_way_.size(); tag++) {
        UnderWay& one = under_way_[tag];
        if (one.used) {
            continue;
        }
        bool taken = false;
        while (!taken && left->size() < under_way_.size() && queue->next(&one.piece)) {
            taken = takes(one.piece);
            if (!taken) {
                left->push_back(one.piece);
            }
        }
        if (!taken) {
            break;
        }
        const Piece& piece = one.piece;
        const Superset superset = superset_of(piece, Access::kDirect);
        std::byte* into = piece.host + piece.slot_offset - superset.head;
        begun_[count++] = {{piece.from.file_index, superset.base}, {into, static_cast<uint32_t>(superset.bytes())}, tag};
        one.begun_ns = now_ns;
        one.used = true;
    }
    if (count == 0) {
        return;
    }
    const uint32_t begun = reads_->begin({begun_.data(), count});
    for (uint32_t i = begun; i < count; i++) { // the system has no room for them now
        UnderWay& one = under_way_[begun_[i].tag];
        left->push_back(one.piece);
        one.used = false;
    }
    under_way_count_ += begun;
    const bool at_once = begun > 0 && reads_->done_count() == under_way_count_;
    synchronous_count_ = at_once ? synchronous_count_ + 1 : 0;
}

uint32_t BackgroundReader::look(uint64_t now_ns) {
    if (under_way_count_ == 0 || reads_->done_count() == 0) {
        looked_ns_ = now_ns;
        return 0;
    }
    return wait(0);
}

uint32_t BackgroundReader::wait(uint64_t most_ns) {
    return reads_->wait({done_.data(), static_cast<uint32_t>(done_.size())}, most_ns);
}

BackgroundReader::Ended BackgroundReader::end(uint32_t i, bool awaited, uint64_t now_ns) {
    UnderWay& one = under_way_[done_[i].tag];
    HY_CHECK(one.used);
    one.used = false;
    under_way_count_--;
    const int64_t got = done_[i].result;
    const uint64_t wanted = superset_of(one.piece, Access::kDirect).head + one.piece.bytes;
    Ended ended{one.piece, {}, now_ns, got >= static_cast<int64_t>(wanted)};
    if (awaited) {
        awaited_ns_ += now_ns - one.begun_ns;
        awaited_count_++;
    } else {
        const uint64_t usual_ns = one.begun_ns + (awaited_count_ == 0 ? 0 : awaited_ns_ / awaited_count_);
        ended.ended_ns = std::min(std::max({usual_ns, looked_ns_, one.begun_ns}), now_ns);
    }
    ended.result.read_count = 1;
    ended.result.kernel_bytes = got > 0 ? static_cast<uint64_t>(got) : 0;
    ended.result.busy_ns = ended.ended_ns - one.begun_ns;
    if (ended.is_whole) {
        check_unchanged(source_, one.piece, &ended.result);
    }
    return ended;
}

// ---- ReaderThreads

bool ReaderThreads::open(ReadSource* source, PoolMemory* pool, FileModes* modes, PieceWork* work,
                         const ReadSpec& spec) {
    HY_CHECK(threads_.empty());
    readers_ = std::make_unique<PieceReader[]>(spec.thread_count);
    for (uint32_t i = 0; i < spec.thread_count; i++) {
        if (!readers_[i].open(source, pool, modes, spec)) {
            return false;
        }
    }
    threads_.reserve(spec.thread_count);
    for (uint32_t i = 0; i < spec.thread_count; i++) {
        PieceReader* reader = &readers_[i];
        auto body = [reader, work, i] {
            platform::name_thread("hypura-read");
            Piece piece;
            while (work->take(&piece)) {
                work->finish(i, piece, reader->run(piece));
            }
        };
        try {
            threads_.emplace_back(body);
        } catch (const std::system_error&) {
            return false;
        }
    }
    return true;
}

void ReaderThreads::join() {
    for (std::thread& thread : threads_) {
        thread.join();
    }
    threads_.clear();
}

} // namespace hypura

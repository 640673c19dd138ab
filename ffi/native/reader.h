// Bytes from files to slots. It owns the file table, the queue of read jobs, the reader threads and their bounce
// buffers; it must not know what a stride means, when a slot is free, or who waits. It exists so that everything that
// touches the disk (direct reads, alignment, short reads, retries, errors) is in one place behind two seams:
// ReadSource (where bytes come from; tests inject faults there) and PoolMemory (where they go; not always host memory).
//
// There is no lock here. ReadQueue is a plain structure that its owner guards; threads take pieces from and give them
// back to a PieceWork, which is the owner. So the data plane has one mutex, and the stream has it.
//
// No bounce copy: a direct read takes the aligned superset of the wanted bytes, and it lands at the right page phase by
// itself when (place in the slot) % 4096 == (offset in the file) % 4096 and no page of the superset holds bytes of
// another extent. ReadQueue cuts pieces so that this holds wherever it can; what is left goes through a bounce buffer.
#pragma once

#include "platform.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace hypura {

constexpr uint32_t kNone = UINT32_MAX; // no slot, no stride, no file

struct FileSpec {
    std::string path;
    uint64_t bytes; // what the plan saw; open refuses a file of another size
};

struct FilePlace {
    uint32_t file_index;
    uint64_t offset;
};

struct Extent {
    uint32_t file_index;
    uint64_t offset;
    uint64_t bytes; // > 0
};

struct SlotPlace {
    uint32_t class_index;
    uint32_t slot_index;
};

enum class ReadFault : uint8_t {
    kNone,
    kErrno,     // error_number says which
    kEndOfFile, // the file ends before the wanted bytes do
    kChanged,   // size or modification time differs from open: its bytes are not those that the plan was made for
    kStuck,     // retry_count reads in a row brought nothing
    kUpload,    // the pool's memory refused the bytes
};

struct ReadError {
    ReadFault fault = ReadFault::kNone;
    int32_t error_number = 0;
    uint32_t file_index = kNone;
    uint64_t offset = 0; // first byte that was not delivered
};

// Writes "FILE at offset N: reason" (always terminated).
void describe(const ReadError& error, const char* path, Span<char> text);

// Direct reads that go on by themselves once they are begun. Its owner guards it, but for wait(), which one thread at a time
// may call beside the rest.
class BackgroundReads {
public:
    struct Read {
        FilePlace place;
        Span<std::byte> into; // aligned, as the rest
        uint32_t tag;
    };
    using Done = platform::AsyncReads::Done; // the result as of ReadSource::read

    virtual ~BackgroundReads() = default; // waits for what is under way
    // How many of the first ones were begun.
    virtual uint32_t begin(Span<const Read> reads) = 0;
    virtual uint32_t done_count() = 0; // that wait() would give at once
    // Until one is done or so much time has passed: how many are.
    virtual uint32_t wait(Span<Done> done, uint64_t most_ns) = 0;
};

// Where bytes come from. Called by several threads at once, without a lock.
class ReadSource {
public:
    virtual ~ReadSource() = default;
    virtual bool has_direct(uint32_t file_index) const = 0;
    // One attempt: bytes read (fewer than asked is allowed), 0 at the end of the file, or -errno. Direct reads are
    // aligned in memory, offset and length.
    virtual int64_t read(FilePlace place, platform::Access access, Span<std::byte> into) = 0;
    // Size of the file now, or -errno.
    virtual int64_t bytes_now(uint32_t file_index) = 0;
    virtual bool unchanged(uint32_t file_index) = 0;
    virtual const char* path(uint32_t file_index) const = 0;
    virtual void drop_cached(uint32_t, platform::FileRange) {}
    // So many at once; null where there is no such thing. The source outlives them.
    virtual std::unique_ptr<BackgroundReads> background_reads(uint32_t) { return nullptr; }
};

// Where bytes go: one region of slots for each class. `upload` is called by several threads at once.
class PoolMemory {
public:
    virtual ~PoolMemory() = default;
    // Base of the class's slots, page aligned, or null when the memory is not the host's: then each piece is read into
    // a thread's own buffer and uploaded.
    virtual std::byte* host(uint32_t class_index) = 0;
    virtual bool upload(SlotPlace place, uint64_t offset_in_slot, Span<const std::byte> bytes) = 0;
};

struct ReadSpec {
    uint32_t thread_count;
    uint32_t piece_bytes;   // multiple of 4096; a stride is cut into pieces so that several threads work on it
    bool direct;            // past the page cache where the file system can
    bool drop_buffered;     // after a buffered read, give the page cache's copy back
    uint32_t retry_count;   // attempts in a row without a new byte (EINTR, EAGAIN, nothing) before a read fails
    uint64_t retry_wait_ns; // pause before an attempt that follows EAGAIN or nothing
    // No piece that nobody waits for is begun while so many are under way: a disk that few reads keep busy shares itself
    // among all it has, and what is waited for comes later. 0: as many as there are threads.
    uint32_t prefetch_depth = 0;
    // In passes of at most so many tokens what needs one read is read in the background, where the source can do that: no
    // thread is woken for it, and none takes a core from those that compute. 0: never.
    uint32_t background_tokens = 0;
    uint32_t background_depth = 0; // of those reads, under way at once
};

// The real files, read only. Each is opened twice (direct, buffered), so that a fallback needs no path any more.
class FileSource final : public ReadSource {
public:
    ~FileSource() override { close(); }
    // False with a sentence in `error`.
    bool open(const std::vector<FileSpec>& files, bool direct, std::string* error);
    void close();

    bool has_direct(uint32_t file_index) const override { return files_[file_index].direct >= 0; }
    int64_t read(FilePlace place, platform::Access access, Span<std::byte> into) override;
    int64_t bytes_now(uint32_t file_index) override;
    bool unchanged(uint32_t file_index) override;
    const char* path(uint32_t file_index) const override { return files_[file_index].path.c_str(); }
    void drop_cached(uint32_t file_index, platform::FileRange range) override;
    std::unique_ptr<BackgroundReads> background_reads(uint32_t depth) override;

private:
    struct File {
        std::string path;
        int direct = -1;
        int buffered = -1;
        platform::FileIdentity identity{};
    };
    std::vector<File> files_;
};

// The unit of work of one thread: a run of wanted bytes in one file and their place in one slot.
struct Piece {
    uint32_t job_index;
    FilePlace from; // first wanted byte
    uint32_t bytes; // wanted
    SlotPlace slot;
    uint64_t slot_offset; // where the first wanted byte belongs, from the slot's base
    std::byte* host;      // the slot's base; null: upload
    bool in_place;        // the aligned superset may be read straight into the slot
};

struct PieceResult {
    ReadError error;
    uint64_t kernel_bytes = 0; // what the system calls brought: superset and repeats included
    uint32_t read_count = 0;
    uint32_t retry_count = 0;
    uint32_t bounce_bytes = 0; // copied after the read
    uint64_t busy_ns = 0;
};

struct ReaderCounters {
    uint64_t read_count = 0;
    uint64_t kernel_bytes = 0;
    uint64_t delivered_bytes = 0; // wanted bytes of pieces that succeeded
    uint64_t bounce_bytes = 0;
    uint64_t retry_count = 0;
    uint64_t busy_ns = 0;
};

enum class Urgency : uint8_t { kDemand, kPrefetch };

struct ReadJob {
    Span<const Extent> extents;
    SlotPlace slot;
    std::byte* host;      // the slot's base, or null
    uint32_t phase_bytes; // where the first byte goes in the slot
};

// The jobs in order: demand before prefetch, first come first served within each. Not thread safe: its owner guards it.
// A job that still has uncut bytes is on exactly one queue, unless it failed or was cancelled.
class ReadQueue {
public:
    enum class Cancelled : uint8_t { kRemoved, kDraining };
    enum class Outcome : uint8_t { kPending, kDone, kFailed, kCancelled };

    void open(uint32_t job_count, const ReadSpec& spec);
    void submit(uint32_t job_index, const ReadJob& what, Urgency urgency);
    // A prefetch that something waits for now; takes a cancel back while the job is draining.
    void promote(uint32_t job_index);
    // No further piece is started. kRemoved: the job is over. kDraining: pieces are in flight, finish() will tell.
    Cancelled cancel(uint32_t job_index);
    // The next piece in order; false when nothing is queued that may begin now.
    bool next(Piece* piece);
    // kDone only when every byte of the job was delivered. After any outcome but kPending the job is over.
    Outcome finish(const Piece& piece, const ReadError& error);

    bool active(uint32_t job_index) const { return jobs_[job_index].active; }
    bool in_flight(uint32_t job_index) const { return jobs_[job_index].outstanding > 0; }
    bool queued(uint32_t job_index) const { return jobs_[job_index].list != List::kOff; }
    const ReadError& error(uint32_t job_index) const { return jobs_[job_index].error; }
    uint64_t delivered_bytes(uint32_t job_index) const { return jobs_[job_index].delivered_bytes; }
    uint32_t active_count() const { return active_count_; }
    // About how many pieces may begin now.
    uint64_t startable_pieces() const;
    // Walks prefetch jobs from the newest: kNone starts, kNone ends.
    uint32_t newest_prefetch(uint32_t after) const;

private:
    enum class List : uint8_t { kDemand, kPrefetch, kOff };
    struct Job {
        ReadJob what;
        uint64_t total_bytes;
        uint64_t cut_bytes;       // of the job, handed out so far
        uint64_t delivered_bytes; // of the job
        uint64_t extent_cut_bytes;
        uint32_t extent_index;
        uint32_t outstanding; // pieces handed out and not finished
        uint32_t prev;
        uint32_t next;
        List list = List::kOff;
        bool active = false;
        bool cancelled = false;
        ReadError error;
    };

    void link(uint32_t job_index, List list);
    void unlink(uint32_t job_index);
    void cut(Job& job, Piece* piece) const;
    uint32_t prefetch_room() const { // pieces
        return prefetch_depth_ == 0 ? UINT32_MAX : prefetch_depth_ - std::min(prefetch_depth_, in_flight_count_);
    }

    std::unique_ptr<Job[]> jobs_;
    uint32_t job_count_ = 0;
    uint32_t active_count_ = 0;
    uint32_t heads_[2] = {kNone, kNone};
    uint32_t tails_[2] = {kNone, kNone};
    uint64_t queued_bytes_[2] = {0, 0}; // not handed out, of the jobs on the queues
    uint32_t in_flight_count_ = 0;      // pieces
    uint32_t piece_bytes_ = 0;
    uint32_t prefetch_depth_ = 0;
};

// Which files are read through the page cache. A file falls back once, when a direct read says EINVAL.
class FileModes {
public:
    void open(uint32_t file_count, const ReadSource& source, bool direct);
    platform::Access access(uint32_t file_index) const {
        return buffered_[file_index].load(std::memory_order_relaxed) ? platform::Access::kBuffered
                                                                     : platform::Access::kDirect;
    }
    void fall_back(uint32_t file_index);
    // Files that were wanted direct and are read buffered.
    uint32_t fallback_count() const { return fallbacks_.load(std::memory_order_relaxed); }

private:
    std::unique_ptr<std::atomic<bool>[]> buffered_;
    std::atomic<uint32_t> fallbacks_{0};
};

// Executes pieces; one for each thread. Holds the thread's bounce buffer.
class PieceReader {
public:
    PieceReader() = default;
    ~PieceReader() { platform::unmap_memory(&bounce_); }
    PieceReader(const PieceReader&) = delete;
    PieceReader& operator=(const PieceReader&) = delete;

    bool open(ReadSource* source, PoolMemory* pool, FileModes* modes, const ReadSpec& spec);
    PieceResult run(const Piece& piece);

private:
    struct Window;
    bool read_piece(const Piece& piece, PieceResult* result);
    bool fill(const Window& window, PieceResult* result);
    bool deliver(const Piece& piece, Span<const std::byte> bytes, PieceResult* result);

    ReadSource* source_ = nullptr;
    PoolMemory* pool_ = nullptr;
    FileModes* modes_ = nullptr;
    ReadSpec spec_{};
    platform::Memory bounce_;
};

// Executes pieces without a thread: whoever holds the owner's lock begins them and takes in what has ended. A piece that one
// read does not bring (it goes through a bounce buffer or the page cache, came short or failed) is left to the threads.
// The owner guards it, but for wait().
class BackgroundReader {
public:
    struct Ended {
        Piece piece;
        PieceResult result;
        uint64_t ended_ns;
        bool is_whole; // else a thread has to read it
    };

    // False where the source has no such reads.
    bool open(ReadSource* source, const FileModes* modes, uint32_t depth);
    // Nothing may be under way.
    void close();
    bool is_open() const { return reads_ != nullptr; }
    uint32_t under_way_count() const { return under_way_count_; }
    // Begins what may begin of the queue; what is left to the threads is appended, while that is shorter than the depth.
    void begin(ReadQueue* queue, std::vector<Piece>* left);
    // Reads are over when they have been begun, time after time: the file system does them there and then, and computing
    // waits meanwhile.
    bool is_synchronous() const { return synchronous_count_ >= kProof; }
    // How many have ended by now: end() takes each.
    uint32_t look(uint64_t now_ns);
    uint32_t wait(uint64_t most_ns);
    // awaited: by wait(). When a read ended that nobody awaited is not known: it counts as long as the mean of those that
    // somebody did, within the two looks between which it ended.
    Ended end(uint32_t i, bool awaited, uint64_t now_ns);

private:
    static constexpr uint32_t kProof = 8;
    struct UnderWay {
        Piece piece{};
        uint64_t begun_ns = 0;
        bool used = false;
    };

    bool takes(const Piece& piece) const;

    ReadSource* source_ = nullptr;
    const FileModes* modes_ = nullptr;
    std::unique_ptr<BackgroundReads> reads_;
    std::vector<UnderWay> under_way_; // by tag
    std::vector<BackgroundReads::Read> begun_;
    std::vector<BackgroundReads::Done> done_;
    uint32_t under_way_count_ = 0;
    uint32_t synchronous_count_ = 0; // in a row
    uint64_t looked_ns_ = 0;
    uint64_t awaited_ns_ = 0; // of all reads that were awaited
    uint64_t awaited_count_ = 0;
};

// What reader threads work for.
class PieceWork {
public:
    virtual ~PieceWork() = default;
    // Blocks until there is a piece; false ends the thread.
    virtual bool take(Piece* piece) = 0;
    virtual void finish(uint32_t thread_index, const Piece& piece, const PieceResult& result) = 0;
};

class ReaderThreads {
public:
    ~ReaderThreads() { HY_CHECK(threads_.empty()); }
    bool open(ReadSource* source, PoolMemory* pool, FileModes* modes, PieceWork* work, const ReadSpec& spec);
    // After the work's take() returns false to every thread.
    void join();
    uint32_t count() const { return static_cast<uint32_t>(threads_.size()); }

private:
    std::unique_ptr<PieceReader[]> readers_;
    std::vector<std::thread> threads_;
};

} // namespace hypura

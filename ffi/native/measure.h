// measure.h - how fast this machine reads its storage and copies its memory, as the engine would.
//
// Owns the timing of both: storage is read by the engine's own reader threads with the engine's own direct reads, so
// that what is measured is what a plan will get. Every number comes in a spec; nothing here decides how long or how
// deep to measure, or what a good result is. No llama.cpp: it is built and tested with the data plane.
#pragma once

#include "reader.h"

#include <functional>
#include <string>
#include <vector>

namespace hypura {

// Asked often; true ends the measurement early.
using StopQuestion = std::function<bool()>;

// ---- storage

// A permutation of 0 .. count-1 without memory: four Feistel rounds over the next even number of bits, walked until the
// result is in range (four steps on average at most).
class Shuffle {
public:
    Shuffle(uint64_t count, uint64_t seed);
    uint64_t operator[](uint64_t index) const;

private:
    uint64_t step(uint64_t value) const;

    const uint64_t count_;
    const uint64_t seed_;
    uint32_t half_bits_ = 1;
};

struct ReadCell {
    uint32_t read_bytes; // wanted by each read, a multiple of 4096
    uint32_t skew_bytes; // where in its first page a read begins, less than 4096: 0 is aligned
    uint32_t depth;      // reader threads, each with one read under way
    bool direct;
    uint64_t duration_ns; // no read begins later, beyond the first `depth`
    uint64_t seed;        // which places are read
    bool ring = false;    // io_uring of one thread instead of threads
};

struct ReadFigures {
    uint64_t read_count = 0;
    uint64_t delivered_bytes = 0;
    uint64_t wall_ns = 0; // from the first read's start to the last one's end
    uint64_t p50_ns = 0;  // of one read
    uint64_t p99_ns = 0;
    bool direct = false;    // false as well where the file system cannot
    bool exhausted = false; // every place was read before the time was over
    bool refused = false;   // this system has no io_uring, or forbids it: nothing was read
    bool has_storage = false; // the kernel told what it fetched
    uint64_t storage_bytes = 0;
};

// Reads blocks of the files in random order, none twice within a cell.
class ReadMeasure {
public:
    struct Options {
        std::vector<FileSpec> files;
        uint64_t memory_bytes; // for the reads under way: depth x (read_bytes + two pages) of the largest cell
        bool huge_pages;
        uint32_t retry_count;
        uint64_t retry_wait_ns;
        uint64_t poll_ns; // how often the stop question is asked
    };
    ~ReadMeasure() { platform::unmap_memory(&memory_); }
    // False with a sentence.
    bool open(const Options& options, std::string* error);
    // False with a sentence; a cell that was stopped is true with what was read so far. A buffered cell begins with the
    // files dropped from the page cache and drops what it brought there.
    bool run(const ReadCell& cell, const StopQuestion& stop, ReadFigures* figures, std::string* error);

private:
    void drop_files();
    bool run_ring(const ReadCell& cell, const StopQuestion& stop, ReadFigures* figures, std::string* error);

    Options options_{};
    FileSource source_;
    platform::Memory memory_;
};

// ---- a file to read where there is none

struct ScratchSpec {
    std::string path; // nothing may be there
    uint64_t bytes;   // a multiple of chunk_bytes
    uint32_t chunk_bytes; // of one write, a multiple of 4096
    uint64_t duration_ns; // no chunk begins later, beyond the first
};

struct ScratchFigures {
    uint64_t written_bytes = 0;
    bool direct = false;
};

// Writes incompressible bytes past the page cache, waits until they are on the storage and drops what the cache has of
// them. False with a sentence; the file is then gone again, and so it is after a stop.
bool write_scratch(const ScratchSpec& spec, const StopQuestion& stop, ScratchFigures* figures, std::string* error);

// ---- memory

struct CopySpec {
    uint32_t thread_count;
    uint64_t buffer_bytes; // of each of the two sides, all threads together
    uint64_t duration_ns;  // no pass over a thread's share begins later, beyond the first
    bool reads_only = false; // adds up the source instead: what memory gives to who only reads, as weights are read
};

struct CopyFigures {
    uint64_t copied_bytes = 0; // or read
    uint64_t wall_ns = 0;
    uint64_t thread_ns = 0; // of processors, all threads together: what other programs took of them is not in it
};

bool measure_copy(const CopySpec& spec, const StopQuestion& stop, CopyFigures* figures, std::string* error);

} // namespace hypura

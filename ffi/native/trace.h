// Routing traces: what ops asked of a stream and what its readers brought, in the order in which the stream's tables
// changed. It owns the format, its writer and its reader; it must not know what an expert or a model is, nor what the
// header says (JSON of whoever asked for the trace). It exists so that a cache policy is chosen by evidence: replay.h
// runs a trace again on the real neuron cache.
//
// A trace file:
//
//     8 bytes    "hytrace1"
//     4 bytes    length of the header, little endian
//     header     JSON: everything a replay needs beside the records (src/trace.ts, TraceHeader)
//     records    until `end`; a file without `end` was cut off
//
// A record begins with a LEB128 varint `head` = kind | argument << 4. "stride" stands for the zigzag difference to the
// stride that was named last (0 before the first), "dt" for a varint of microseconds since the last record with a dt.
//
//     kind          argument   then                           meaning
//     0 end         classes    dt, and for each class 6       counters of the stream when it closed: hits, late hits,
//                              varints                        misses, strides read, evictions, stalled microseconds
//     1 pass        tokens     dt                             a pass over the weights begins
//     2 begin       leases     dt, a stride for each          ops ask for these, one routed token each
//     3 begin+      leases     dt, for each a stride and      the same; `again`: a wave asks once more for what found
//                              tokens << 1 | again            no slot
//     4 release all                                           what the last begin named is unpinned, in that order
//     5 release     count      a stride for each              these are unpinned
//     6 complete    stride     dt                             all its bytes are there
//     7 cancel      stride                                    its read was given up
//     8 fail        stride                                    its read failed
//     9 prefetch    stride                                    a read that no op waits for was given a slot
//    10 abandon                                               what was read ahead is not expected any more
//    11 stall       us         dt                             an op waited so long, until now
//    12 at          lease                                     the next record came before this lease of the begin
//                                                             under way was given a slot (or not)
//    13 interrupted                                           the begin under way gave nothing
//
// A begin's hits and misses are not written: they follow from the rest, and that they do is the test of the replay.
#pragma once

#include "stream.h"

#include <atomic>
#include <functional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace hypura {

enum class TraceKind : uint8_t {
    kEnd,
    kPass,
    kBegin,
    kBeginMixed,
    kReleaseAll,
    kRelease,
    kComplete,
    kCancel,
    kFail,
    kPrefetch,
    kAbandon,
    kStall,
    kAt,
    kInterrupted,
};

constexpr std::string_view kTraceMagic = "hytrace1";
constexpr uint32_t kTraceEndFields = 6;

// Writes a trace beside the work it describes: records go into a fixed buffer, a thread brings them to the file. An
// error (a full disk, or one slower than the records) ends the trace and nothing else. The file has its name only once
// it is complete; until then it is PATH.part.
//
// The hooks (pass to interrupted) are called by the stream under its lock, so they are serialised. None allocates,
// none waits for the disk.
class TraceWriter {
public:
    TraceWriter() = default;
    ~TraceWriter() { close(); }
    TraceWriter(const TraceWriter&) = delete;
    TraceWriter& operator=(const TraceWriter&) = delete;

    struct Options {
        std::string path;
        std::string header;                                 // JSON
        uint32_t stride_count = 0;                          // more than any begin names
        std::function<void(const std::string&)> on_failure; // a sentence; on the writer's thread or in close()
    };
    // False with a sentence in `error` when the file cannot be made.
    bool open(Options options, std::string* error);
    // Writes the rest and gives the file its name. Idempotent.
    void close();

    void pass(uint32_t token_count);
    void begin(Span<const Lease> leases); // before it changes them: kWaiting says "again"
    // The begin under way comes to this lease; begun() ends it.
    void at(uint32_t lease) { at_ = lease; }
    void begun(bool interrupted);
    void release(Span<const Lease> leases); // before it changes them
    void complete(uint32_t stride) { stride_event(TraceKind::kComplete, stride); }
    void cancel(uint32_t stride) { stride_event(TraceKind::kCancel, stride); }
    void fail(uint32_t stride) { stride_event(TraceKind::kFail, stride); }
    void prefetch(uint32_t stride) { stride_event(TraceKind::kPrefetch, stride); }
    void abandon();
    void stall(uint64_t duration_ns);
    void end(Span<const ClassCounters> classes);

private:
    struct Buffer {
        std::unique_ptr<uint8_t[]> bytes;
        uint32_t used = 0;
    };

    bool room(uint64_t bytes) HY_REQUIRES(mutex_);
    void put(uint64_t value) HY_REQUIRES(mutex_);
    void put_head(TraceKind kind, uint64_t argument) HY_REQUIRES(mutex_);
    void put_stride(uint32_t stride) HY_REQUIRES(mutex_);
    uint64_t from_last(uint32_t stride) HY_REQUIRES(mutex_);
    void put_time() HY_REQUIRES(mutex_);
    void put_at() HY_REQUIRES(mutex_);
    void stride_event(TraceKind kind, uint32_t stride);
    void written() HY_REQUIRES(mutex_);
    void write_on();
    bool write_out(const uint8_t* data, uint64_t bytes);
    void fail_with(const std::string& what, int error_number);
    void discard();

    Options options_;
    std::string part_path_;
    std::thread thread_;
    int descriptor_ = -1; // the writer thread's between open() and its end
    uint64_t file_bytes_ = 0;
    std::atomic<bool> failed_{false};

    Mutex mutex_;
    CondVar wake_;
    Buffer buffers_[2] HY_GUARDED_BY(mutex_); // the other one is the writer thread's while it writes
    uint32_t filling_ HY_GUARDED_BY(mutex_) = 0;
    uint32_t capacity_ HY_GUARDED_BY(mutex_) = 0;
    bool closing_ HY_GUARDED_BY(mutex_) = false;
    bool overrun_ HY_GUARDED_BY(mutex_) = false;
    uint64_t last_us_ HY_GUARDED_BY(mutex_) = 0;
    uint32_t last_stride_ HY_GUARDED_BY(mutex_) = 0;

    // Of the hooks, which the stream's lock serialises.
    std::unique_ptr<uint32_t[]> begun_; // strides of the last begin, for "release all"
    uint32_t begun_count_ = 0;
    uint32_t at_ = kNone; // kNone: no begin is under way
};

// A record, taken apart. Fields that its kind does not have are 0.
struct TraceRecord {
    struct Use {
        uint32_t stride;
        uint32_t token_count;
        bool again;
    };
    TraceKind kind = TraceKind::kEnd;
    uint64_t argument = 0;  // tokens, lease, microseconds
    uint64_t passed_us = 0; // dt
    uint32_t stride = 0;
    std::vector<Use> uses;          // begin
    std::vector<uint32_t> strides;  // release
    std::vector<uint64_t> counters; // end: kTraceEndFields for each class
};

// Reads the records of a trace. Trusts nothing: whatever the bytes are, next() gives a sound record or a sentence.
class TraceReader {
public:
    TraceReader(Span<const uint8_t> bytes, uint32_t stride_count, uint32_t class_count)
        : bytes_(bytes), stride_count_(stride_count), class_count_(class_count) {}

    // False at the end of the bytes (cut_off() tells whether in the middle) and on an error.
    bool next(TraceRecord* record);
    bool cut_off() const { return cut_off_; }
    const std::string& error() const { return error_; } // empty: none
    uint32_t offset() const { return at_; }             // of the next record

private:
    bool varint(uint64_t* value);
    bool stride(uint32_t* value);
    bool step(uint64_t zigzag, uint32_t* value);
    bool body(TraceRecord* record);
    bool uses(TraceRecord* record);
    bool corrupt(const char* what);

    Span<const uint8_t> bytes_;
    uint32_t stride_count_;
    uint32_t class_count_;
    uint32_t at_ = 0;
    uint32_t last_stride_ = 0;
    bool cut_off_ = false;
    std::string error_;
};

} // namespace hypura

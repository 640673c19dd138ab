// Strides made ready for ops: acquire, release, prefetch. It owns the pool's slots (not their memory: PoolMemory), one
// neuron cache for each class, the read queue, the reader threads and the one mutex of the data plane. It must not know
// what an expert, a layer or a model is, and it chooses no number: all of them are in the StreamPlan. It exists so that
// "this stride is ready and stays so until you release it" is said in one place.
//
// An op's way:
//
//     Lease leases[n];                                    // stride_index and token_count filled in, in order of use
//     BeginResult begun = stream.begin({leases, n}, Holding::kNothing);
//     while (leases of kReading remain) stream.wait_some({leases, n});   // or wait(&lease) for a certain one
//     ... compute on lease.data (or lease.slot_index) of those that are kReady ...
//     stream.release({leases, n});
//
// begin() admits what is present (ready or being read) and then, in the order of the list, as many of the absent as
// there are slots for; a lease that was left out is kWaiting and takes part in a later begin (a wave). Nothing that is
// present is given up for what is absent, so an op in waves reads each stride at most once. It admits at least one when
// the caller holds nothing (it waits for a slot if all are busy), so waves make progress; a caller that holds leases
// may get none. A caller whose list has an inner order (up and gate before down) and that cannot use what it got,
// releases and begins a shorter list. All of a list is admitted when it is no longer than the class's slots (the
// ring's, for a pinned policy), the caller holds nothing else, and no prefetch is in flight.
//
// Invariants: a stride is ready only by a read that delivered all its bytes; what a lease names is pinned from begin()
// to release(); demand reads precede prefetch, and a queued prefetch gives its slot up first; nothing is allocated
// after open(); read_bytes is the sum of the bytes of completed strides, and with discarded_bytes it equals what the
// reader delivered.
#pragma once

#include "neuron_cache.h"
#include "platform.h"
#include "reader.h"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace hypura {

class TraceWriter; // trace.h

// Strides of equal type and size, and their slots.
struct ClassSpec {
    uint64_t stride_bytes;
    // Distance of two slots. At least min_slot_bytes(); for host memory a multiple of 4096. A delegate whose kernels
    // count in blocks may want more.
    uint64_t slot_bytes;
    uint32_t slot_count;
    uint32_t op_slots; // what the largest single op needs at once; 1 when the op can run in waves
    CachePolicy policy;
};

struct StrideSpec {
    uint32_t class_index;
    uint32_t order_index;  // place of its op in the order of a pass, for least_stale
    uint32_t first_extent; // in StreamPlan::extents
    uint32_t extent_count;
};

struct StreamPlan {
    std::vector<FileSpec> files;
    std::vector<Extent> extents;
    std::vector<StrideSpec> strides; // index = stride index everywhere below
    std::vector<ClassSpec> classes;
    ReadSpec reader;
    uint32_t lookahead_strides; // how far the learned order is read ahead in classes of pinned_cyclic; 0: not at all
};

// Room for a stride that lands at any page phase, and the page tail of its aligned superset: with phase p <= 4095 the
// superset ends at round_up(p + stride_bytes, 4096) <= round_up(stride_bytes + 4095, 4096).
constexpr uint64_t min_slot_bytes(uint64_t stride_bytes) {
    return (stride_bytes + 2 * platform::kDirectAlign - 2) / platform::kDirectAlign * platform::kDirectAlign;
}

// Pool in this process's memory: huge pages. A large one takes seconds to become present, and nobody can map memory while
// a piece of it does; so that begins once the model is loaded and goes on piece by piece behind the first prompt. A read
// that comes to a page before takes the time of that page.
class HostPool final : public PoolMemory {
public:
    struct Options {
        platform::PageKind pages;
        uint32_t touch_threads; // that make the pages present
    };
    ~HostPool() override { close(); }
    // False when the system has not that much memory.
    bool open(const std::vector<ClassSpec>& classes, const Options& options);
    // Begins to make the pages present.
    void make_present();
    void close();
    std::byte* host(uint32_t class_index) override { return memory_.data + offsets_[class_index]; }
    bool upload(SlotPlace, uint64_t, Span<const std::byte>) override { return false; }
    uint64_t bytes() const { return memory_.bytes; }
    bool huge() const { return memory_.huge; }
    // Until make_present() is done.
    void wait_present();

private:
    void touch(uint32_t thread_index, uint32_t thread_count);

    platform::Memory memory_;
    uint32_t touch_threads_ = 1;
    std::vector<std::thread> touchers_;
    std::atomic<bool> closing_{false};
    std::vector<uint64_t> offsets_;
};

// The order of acquires in a pass, learned from acquires alone. A pass is closed by the stride that began it. While the
// acquires follow the last whole pass, what comes next is known, over the border of the pass too; another stride puts
// the position there (or forgets everything if it is none of the order), and a later whole pass replaces the order.
class CyclicOrder {
public:
    enum class Noted : uint8_t { kLearning, kExpected, kUnexpected };

    void open(uint32_t stride_count);
    Noted note(uint32_t stride);
    bool learned() const { return length_ > 0; }
    uint32_t length() const { return length_; }
    // The stride `distance` acquires after the last one; learned() and 1 <= distance.
    uint32_t ahead(uint32_t distance) const { return order_[(at_ + distance) % length_]; }

private:
    void record(uint32_t stride);

    std::unique_ptr<uint32_t[]> order_;
    std::unique_ptr<uint32_t[]> place_; // stride -> place in order_, kNone
    std::unique_ptr<uint32_t[]> record_;
    std::unique_ptr<uint32_t[]> recorded_; // stride -> number of the record that has it
    uint32_t stride_count_ = 0;
    uint32_t length_ = 0;
    uint32_t at_ = 0;
    uint32_t record_length_ = 0;
    uint32_t record_number_ = 0;
    uint32_t closed_length_ = 0; // of the last record that closed
};

enum class LeaseState : uint8_t {
    kNone,    // not begun, or released
    kWaiting, // no slot for it in this wave; on the way into begin(): asked for before
    kReading,
    kReady,
    kFailed,
};

struct Lease {
    uint32_t stride_index = 0; // in
    uint32_t token_count = 1;  // in: routed tokens that use it
    LeaseState state = LeaseState::kNone;
    // From begin() on, unless kWaiting or kFailed:
    uint32_t class_index = 0;
    uint32_t slot_index = 0;
    uint32_t phase_bytes = 0;  // where the stride begins in its slot; 0 when the pool is not host memory
    std::byte* data = nullptr; // slot base + phase; null when the pool is not host memory
};

enum class Status : uint8_t { kOk, kFailed, kInterrupted };

enum class Holding : uint8_t { kNothing, kLeases };

struct BeginResult {
    Status status = Status::kOk; // kInterrupted: nothing was admitted
    uint32_t admitted_count = 0;
    uint32_t ready_count = 0; // of the admitted
};

struct ClassCounters {
    uint64_t hits = 0;      // ready at begin
    uint64_t late_hits = 0; // being read at begin
    uint64_t misses = 0;    // absent at begin
    uint64_t stall_ns = 0;  // waited for strides of this class
    uint64_t read_bytes = 0;
    uint64_t completed_count = 0; // strides; read_bytes = completed_count * stride_bytes
    uint64_t discarded_bytes = 0; // delivered for reads that failed or were cancelled
    uint64_t demand_reads = 0;
    uint64_t prefetch_reads = 0;
    uint64_t dropped_prefetches = 0; // cancelled before all bytes were there
    uint64_t unused_prefetches = 0;  // read and evicted without a use
    uint64_t failed_reads = 0;
    uint64_t evictions = 0;
    uint64_t waiting = 0; // leases left to a later wave
};

struct StreamCounters {
    Span<const ClassCounters> classes; // valid until the next call of counters()
    Span<const ReaderCounters> threads;
    ReaderCounters background; // what no thread read
    ClassCounters total;
    ReaderCounters reader;
    uint32_t fallback_files = 0; // wanted direct, read buffered
    uint64_t resyncs = 0;        // acquires that the learned order did not expect
    uint64_t reading_ns = 0;     // time with at least one read under way
};

class Stream final : private PieceWork {
public:
    Stream() = default;
    ~Stream() override { close(); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    // Verifies the plan, allocates everything, starts the readers. False with a sentence in `error`. The source and the
    // pool must outlive the stream.
    bool open(const StreamPlan& plan, ReadSource* source, PoolMemory* pool, std::string* error);
    // Ends the readers. No lease may be held.
    void close();

    // Writes down what happens from now on. Before the first begin(); the trace outlives the stream.
    void trace_to(TraceWriter* trace) HY_EXCLUDES(mutex_);

    // A new pass of this many tokens: the clock of the policies. Optional; without it nothing decays.
    void begin_pass(uint32_t token_count) HY_EXCLUDES(mutex_);
    BeginResult begin(Span<Lease> leases, Holding holding) HY_EXCLUDES(mutex_);
    // Until the lease is ready or failed. Of an admitted lease.
    Status wait(Lease* lease) HY_EXCLUDES(mutex_);
    // Until at least one more of the kReading leases is ready; kFailed as soon as one has failed. kOk at once when none
    // is being read.
    Status wait_some(Span<Lease> leases) HY_EXCLUDES(mutex_);
    void release(Span<Lease> leases) HY_EXCLUDES(mutex_);
    // Reads what is absent into free slots or those of idle strides, in this order, when no demand is waiting. Returns
    // how many reads were queued.
    uint32_t prefetch(Span<const uint32_t> strides) HY_EXCLUDES(mutex_);
    // Takes back what prefetch() queued of these: reads that did not begin and that no op asked for meanwhile.
    void retract(Span<const uint32_t> strides) HY_EXCLUDES(mutex_);
    // Drops all reads that nobody waits for and returns when none is in flight.
    void drain() HY_EXCLUDES(mutex_);
    // While on, begin and wait return kInterrupted. From any thread.
    void interrupt(bool on) HY_EXCLUDES(mutex_);

    // The last read error that an op met, and its sentence.
    ReadError last_error() HY_EXCLUDES(mutex_);
    void describe_error(const ReadError& error, Span<char> text) const;

    StreamCounters counters() HY_EXCLUDES(mutex_);
    uint32_t pinned_count() HY_EXCLUDES(mutex_); // slots; 0 between passes
    uint32_t class_count() const { return class_count_; }
    // After the guard against LRU's cliff.
    CachePolicy effective_policy(uint32_t class_index) HY_EXCLUDES(mutex_);
    // Every invariant, counters included; aborts when one is broken. O(strides + slots).
    void check() HY_EXCLUDES(mutex_);

private:
    struct Stride {
        Span<const Extent> extents;
        uint32_t class_index;
        uint32_t local; // number within the class
        uint32_t phase_bytes;
    };
    struct Class {
        ClassSpec spec;
        NeuronCache cache;
        ClassCounters counters;
        std::byte* host = nullptr;
        uint32_t first_job = 0;              // job index = first_job + slot index
        uint32_t pinned = 0;                 // pins of all leases
        std::unique_ptr<uint32_t[]> globals; // local -> stride index
        bool full = false;                   // no slot to be had; a mark within one call under the lock
    };
    // What goes with the read of a slot.
    struct Read {
        uint32_t stride_index = kNone;
        bool demanded = false;
        bool awaited = false; // somebody sleeps until it ends
    };

    static bool verify(const StreamPlan& plan, PoolMemory* pool, std::string* error);
    void adopt(const StreamPlan& plan, PoolMemory* pool) HY_REQUIRES(mutex_);

    bool take(Piece* piece) override HY_EXCLUDES(mutex_);
    void finish(uint32_t thread_index, const Piece& piece, const PieceResult& result) override HY_EXCLUDES(mutex_);
    void finish_piece(const Piece& piece, const PieceResult& result, uint64_t ended_ns, ReaderCounters* counters)
        HY_REQUIRES(mutex_);
    void end_read(uint32_t job_index, ReadQueue::Outcome outcome) HY_REQUIRES(mutex_);
    void end_background(uint32_t count, bool awaited) HY_REQUIRES(mutex_);
    bool look() HY_REQUIRES(mutex_);
    bool collect() HY_REQUIRES(mutex_);
    void rest() HY_REQUIRES(mutex_);

    bool pin_present(Lease* lease) HY_REQUIRES(mutex_);
    bool find_slot(Lease* lease) HY_REQUIRES(mutex_);
    bool admit(uint32_t stride_index, Purpose purpose) HY_REQUIRES(mutex_);
    void clear_full() HY_REQUIRES(mutex_);
    bool drop_prefetch(uint32_t class_index) HY_REQUIRES(mutex_);
    void start_reads(Span<Lease> leases, BeginResult* result) HY_REQUIRES(mutex_);
    void submit(uint32_t stride_index, Urgency urgency) HY_REQUIRES(mutex_);
    void cancel_read(uint32_t job_index) HY_REQUIRES(mutex_);
    void note_activity(uint64_t now_ns) HY_REQUIRES(mutex_);
    void unpin(Lease* lease) HY_REQUIRES(mutex_);
    void fill(Lease* lease) HY_REQUIRES(mutex_);
    void sleep(uint32_t class_index) HY_REQUIRES(mutex_);
    void note_order(Span<Lease> leases) HY_REQUIRES(mutex_);
    void look_ahead() HY_REQUIRES(mutex_);
    void abandon_lookahead() HY_REQUIRES(mutex_);
    void dispatch() HY_REQUIRES(mutex_);
    uint32_t job_of(const Stride& stride) const HY_REQUIRES(mutex_);
    bool cyclic(uint32_t class_index) const HY_REQUIRES(mutex_);

    Mutex mutex_;
    CondVar work_;    // readers: a piece may be queued, or stopping_
    CondVar changed_; // consumers: an awaited read ended, a slot came free, or interrupted_
    ReaderThreads threads_;
    FileModes modes_;
    ReadSource* source_ = nullptr;
    TraceWriter* trace_ HY_GUARDED_BY(mutex_) = nullptr; // null: nothing is traced
    uint32_t stride_count_ = 0;
    uint32_t class_count_ = 0;
    uint32_t slot_count_ = 0; // of all classes
    uint32_t lookahead_strides_ = 0;
    bool open_ = false;

    // Guarded too, but for the wait() of the one consumer that collects.
    BackgroundReader background_;
    bool collecting_ HY_GUARDED_BY(mutex_) = false;
    bool in_background_ HY_GUARDED_BY(mutex_) = false; // what begins from now on, and not by threads
    uint32_t background_tokens_ HY_GUARDED_BY(mutex_) = 0;
    std::vector<Piece> left_ HY_GUARDED_BY(mutex_); // to the threads, which take them first

    ReadQueue queue_ HY_GUARDED_BY(mutex_);
    CyclicOrder order_ HY_GUARDED_BY(mutex_);
    std::unique_ptr<Extent[]> extents_;
    std::unique_ptr<Stride[]> strides_;
    std::unique_ptr<Class[]> classes_ HY_GUARDED_BY(mutex_);
    std::unique_ptr<Read[]> reads_ HY_GUARDED_BY(mutex_);       // by job index
    std::unique_ptr<ReadError[]> errors_ HY_GUARDED_BY(mutex_); // by stride, of kFailed ones
    std::unique_ptr<ReaderCounters[]> thread_counters_ HY_GUARDED_BY(mutex_);
    std::unique_ptr<ClassCounters[]> class_snapshot_ HY_GUARDED_BY(mutex_);
    std::unique_ptr<ReaderCounters[]> thread_snapshot_ HY_GUARDED_BY(mutex_);
    ReaderCounters background_counters_ HY_GUARDED_BY(mutex_);
    ReadError last_error_ HY_GUARDED_BY(mutex_);
    uint32_t thread_count_ = 0;
    uint32_t idle_readers_ HY_GUARDED_BY(mutex_) = 0;
    uint32_t sleepers_ HY_GUARDED_BY(mutex_) = 0;      // consumers at changed_
    uint32_t slot_waiters_ HY_GUARDED_BY(mutex_) = 0;  // consumers that need any slot
    uint32_t drain_waiters_ HY_GUARDED_BY(mutex_) = 0; // that need the queue to be empty
    uint64_t resync_count_ HY_GUARDED_BY(mutex_) = 0;
    uint64_t reading_ns_ HY_GUARDED_BY(mutex_) = 0;
    uint64_t reading_since_ns_ HY_GUARDED_BY(mutex_) = 0; // 0: nothing is being read
    bool stopping_ HY_GUARDED_BY(mutex_) = false;
    bool interrupted_ HY_GUARDED_BY(mutex_) = false;
};

} // namespace hypura

// See stream.h.
#include "stream.h"

#include "trace.h"

#include <algorithm>
#include <cmath>
#include <system_error>
#include <thread>

namespace hypura {
namespace {

uint64_t page_ceil(uint64_t bytes) {
    return (bytes + platform::kDirectAlign - 1) / platform::kDirectAlign * platform::kDirectAlign;
}

void add(ClassCounters* sum, const ClassCounters& c) {
    sum->hits += c.hits;
    sum->late_hits += c.late_hits;
    sum->misses += c.misses;
    sum->stall_ns += c.stall_ns;
    sum->read_bytes += c.read_bytes;
    sum->completed_count += c.completed_count;
    sum->discarded_bytes += c.discarded_bytes;
    sum->demand_reads += c.demand_reads;
    sum->prefetch_reads += c.prefetch_reads;
    sum->dropped_prefetches += c.dropped_prefetches;
    sum->unused_prefetches += c.unused_prefetches;
    sum->failed_reads += c.failed_reads;
    sum->evictions += c.evictions;
    sum->waiting += c.waiting;
}

void add(ReaderCounters* sum, const ReaderCounters& c) {
    sum->read_count += c.read_count;
    sum->kernel_bytes += c.kernel_bytes;
    sum->delivered_bytes += c.delivered_bytes;
    sum->bounce_bytes += c.bounce_bytes;
    sum->retry_count += c.retry_count;
    sum->busy_ns += c.busy_ns;
}

std::string number(uint64_t value) {
    return std::to_string(value);
}

// The sentence about a class that open() refuses; empty when it is sound.
std::string refuse_class(const ClassSpec& spec, uint32_t class_index, uint64_t stride_count) {
    std::string name = "class " + number(class_index);
    if (spec.stride_bytes == 0 || spec.slot_count == 0) {
        return name + " has no slots or strides of no bytes";
    }
    bool all_fit = stride_count <= spec.slot_count;
    uint64_t fixed = 0;
    const CachePolicy& policy = spec.policy;
    if (policy.kind == PolicyKind::kPinnedCyclic && !all_fit) {
        fixed = policy.pinned_slots;
    }
    uint64_t wanted = std::min<uint64_t>(std::max<uint64_t>(spec.op_slots, 1), std::max<uint64_t>(stride_count, 1));
    if (spec.slot_count < fixed + wanted) {
        uint64_t missing = (fixed + wanted - spec.slot_count) * spec.slot_bytes;
        return name + " has " + number(spec.slot_count) + " slots, " + number(fixed) + " of them pinned, and one op " +
               "needs " + number(wanted) + ": " + number(missing) + " bytes of pool are missing; give the pool more " +
               "memory or pin less";
    }
    bool guarded = policy.kind == PolicyKind::kLru && spec.slot_count < policy.working_set_strides && !all_fit;
    if (guarded && policy.guard_ring_slots < wanted) {
        return name + ": the ring of " + number(policy.guard_ring_slots) + " slots that guards lru is smaller than " +
               "the " + number(wanted) + " slots that one op needs";
    }
    if (!(policy.half_life_tokens >= 0) || std::isinf(policy.half_life_tokens)) {
        return name + ": half_life_tokens must be 0 or more";
    }
    return "";
}

std::string refuse_reader(const ReadSpec& spec) {
    if (spec.thread_count == 0) {
        return "the plan has no reader threads";
    }
    if (spec.piece_bytes == 0 || spec.piece_bytes % platform::kDirectAlign != 0) {
        return "piece_bytes is " + number(spec.piece_bytes) + ", not a multiple of " + number(platform::kDirectAlign);
    }
    constexpr uint32_t most_background = 1024;
    if (spec.background_depth > most_background) {
        return "background_depth is " + number(spec.background_depth) + ", more than " + number(most_background);
    }
    return "";
}

} // namespace

// ---- HostPool

bool HostPool::open(const std::vector<ClassSpec>& classes, const Options& options) {
    close();
    uint64_t bytes = 0;
    for (const ClassSpec& spec : classes) {
        offsets_.push_back(bytes);
        bytes += page_ceil(spec.slot_bytes * spec.slot_count);
    }
    memory_ = platform::map_memory(bytes, options.pages);
    if (memory_.data == nullptr) {
        offsets_.clear();
        return false;
    }
    touch_threads_ = std::max(options.touch_threads, 1u);
    return true;
}

void HostPool::make_present() {
    try {
        for (uint32_t i = 0; i < touch_threads_; i++) {
            touchers_.emplace_back([this, i] { touch(i, touch_threads_); });
        }
    } catch (const std::system_error&) {
        // What no thread takes becomes present when it is read into.
    }
}

// Every thread_count-th piece.
void HostPool::touch(uint32_t thread_index, uint32_t thread_count) {
    platform::name_thread("hypura-touch");
    constexpr uint64_t piece_bytes = 2u << 20; // the kernel lets nobody map memory meanwhile
    for (uint64_t at = thread_index * piece_bytes; at < memory_.bytes && !closing_; at += thread_count * piece_bytes) {
        platform::touch_memory(memory_.data + at, std::min(piece_bytes, memory_.bytes - at));
    }
}

void HostPool::wait_present() {
    for (std::thread& thread : touchers_) {
        thread.join();
    }
    touchers_.clear();
}

void HostPool::close() {
    closing_ = true;
    wait_present();
    closing_ = false;
    platform::unmap_memory(&memory_);
    offsets_.clear();
}

// ---- CyclicOrder

void CyclicOrder::open(uint32_t stride_count) {
    order_ = std::make_unique<uint32_t[]>(stride_count);
    place_ = std::make_unique<uint32_t[]>(stride_count);
    record_ = std::make_unique<uint32_t[]>(stride_count);
    recorded_ = std::make_unique<uint32_t[]>(stride_count);
    std::fill_n(place_.get(), stride_count, kNone);
    std::fill_n(recorded_.get(), stride_count, 0u);
    stride_count_ = stride_count;
    length_ = at_ = record_length_ = closed_length_ = 0;
    record_number_ = 1;
}

CyclicOrder::Noted CyclicOrder::note(uint32_t stride) {
    Noted noted = Noted::kLearning;
    if (learned()) {
        noted = ahead(1) == stride ? Noted::kExpected : Noted::kUnexpected;
        if (place_[stride] == kNone) {
            length_ = 0;
        } else {
            at_ = place_[stride];
        }
    }
    record(stride);
    return noted;
}

void CyclicOrder::record(uint32_t stride) {
    if (recorded_[stride] == record_number_) {
        // An aborted pass looks like a short one: it replaces a longer order only when the next is as short.
        bool whole = record_[0] == stride;
        if (whole && (record_length_ >= length_ || record_length_ == closed_length_)) {
            std::fill_n(place_.get(), stride_count_, kNone);
            length_ = record_length_;
            for (uint32_t i = 0; i < length_; i++) {
                order_[i] = record_[i];
                place_[record_[i]] = i;
            }
            at_ = 0;
        }
        closed_length_ = whole ? record_length_ : 0;
        record_length_ = 0;
        record_number_++;
    }
    record_[record_length_++] = stride;
    recorded_[stride] = record_number_;
}

// ---- open and close

bool Stream::verify(const StreamPlan& plan, PoolMemory* pool, std::string* error) {
    *error = refuse_reader(plan.reader);
    std::vector<uint64_t> members(plan.classes.size());
    uint64_t slots = 0;
    for (size_t i = 0; error->empty() && i < plan.strides.size(); i++) {
        const StrideSpec& stride = plan.strides[i];
        std::string name = "stride " + number(i);
        uint64_t end = uint64_t{stride.first_extent} + stride.extent_count;
        if (stride.class_index >= plan.classes.size() || stride.extent_count == 0 || end > plan.extents.size()) {
            *error = name + " names a class or extents that the plan does not have";
            break;
        }
        members[stride.class_index]++;
        uint64_t bytes = 0;
        for (uint64_t k = stride.first_extent; k < end; k++) {
            const Extent& extent = plan.extents[k];
            bool inside = extent.file_index < plan.files.size() && extent.bytes > 0 &&
                          extent.bytes <= plan.files[extent.file_index].bytes &&
                          extent.offset <= plan.files[extent.file_index].bytes - extent.bytes;
            if (!inside) {
                *error = name + " has an extent outside its file";
            }
            bytes += extent.bytes;
        }
        if (error->empty() && bytes != plan.classes[stride.class_index].stride_bytes) {
            *error = name + " has " + number(bytes) + " bytes, its class says " +
                     number(plan.classes[stride.class_index].stride_bytes);
        }
    }
    for (uint32_t i = 0; error->empty() && i < plan.classes.size(); i++) {
        const ClassSpec& spec = plan.classes[i];
        *error = refuse_class(spec, i, members[i]);
        slots += spec.slot_count;
        std::byte* host = pool->host(i);
        uint64_t least = host != nullptr ? min_slot_bytes(spec.stride_bytes) : spec.stride_bytes;
        bool aligned = host == nullptr || (spec.slot_bytes % platform::kDirectAlign == 0 &&
                                           reinterpret_cast<uint64_t>(host) % platform::kDirectAlign == 0);
        if (error->empty() && (spec.slot_bytes < least || !aligned)) {
            *error = "class " + number(i) + " has slots of " + number(spec.slot_bytes) + " bytes; it needs " +
                     number(least) + (aligned ? "" : ", page aligned");
        }
    }
    if (error->empty() && (slots >= kNone || plan.strides.size() >= kNone)) {
        *error = "the plan has too many slots or strides";
    }
    return error->empty();
}

void Stream::adopt(const StreamPlan& plan, PoolMemory* pool) {
    stride_count_ = static_cast<uint32_t>(plan.strides.size());
    class_count_ = static_cast<uint32_t>(plan.classes.size());
    lookahead_strides_ = plan.lookahead_strides;
    thread_count_ = plan.reader.thread_count;
    extents_ = std::make_unique<Extent[]>(plan.extents.size());
    std::copy(plan.extents.begin(), plan.extents.end(), extents_.get());
    strides_ = std::make_unique<Stride[]>(stride_count_);
    classes_ = std::make_unique<Class[]>(class_count_);
    std::vector<std::vector<uint32_t>> members(class_count_);
    std::vector<std::vector<uint32_t>> orders(class_count_);
    for (uint32_t i = 0; i < stride_count_; i++) {
        const StrideSpec& spec = plan.strides[i];
        Stride& stride = strides_[i];
        stride.extents = {extents_.get() + spec.first_extent, spec.extent_count};
        stride.class_index = spec.class_index;
        stride.local = static_cast<uint32_t>(members[spec.class_index].size());
        bool host = pool->host(spec.class_index) != nullptr;
        stride.phase_bytes = host ? static_cast<uint32_t>(stride.extents[0].offset % platform::kDirectAlign) : 0;
        members[spec.class_index].push_back(i);
        orders[spec.class_index].push_back(spec.order_index);
    }
    slot_count_ = 0;
    for (uint32_t i = 0; i < class_count_; i++) {
        Class& c = classes_[i];
        c.spec = plan.classes[i];
        c.host = pool->host(i);
        c.first_job = slot_count_;
        c.globals = std::make_unique<uint32_t[]>(members[i].size());
        std::copy(members[i].begin(), members[i].end(), c.globals.get());
        Span<const uint32_t> order{orders[i].data(), static_cast<uint32_t>(orders[i].size())};
        c.cache.open({c.spec.slot_count, order}, c.spec.policy);
        slot_count_ += c.spec.slot_count;
    }
    queue_.open(slot_count_, plan.reader);
    order_.open(stride_count_);
    reads_ = std::make_unique<Read[]>(slot_count_);
    errors_ = std::make_unique<ReadError[]>(stride_count_);
    thread_counters_ = std::make_unique<ReaderCounters[]>(thread_count_);
    thread_snapshot_ = std::make_unique<ReaderCounters[]>(thread_count_);
    class_snapshot_ = std::make_unique<ClassCounters[]>(class_count_);
    last_error_ = ReadError{};
    resync_count_ = 0;
    idle_readers_ = sleepers_ = slot_waiters_ = drain_waiters_ = 0;
    background_counters_ = ReaderCounters{};
    background_tokens_ = 0;
    left_.clear();
    in_background_ = stopping_ = interrupted_ = false;
}

bool Stream::open(const StreamPlan& plan, ReadSource* source, PoolMemory* pool, std::string* error) {
    HY_CHECK(!open_);
    error->clear();
    if (!verify(plan, pool, error)) {
        return false;
    }
    {
        MutexLock lock(mutex_);
        adopt(plan, pool);
    }
    source_ = source;
    modes_.open(static_cast<uint32_t>(plan.files.size()), *source, plan.reader.direct);
    if (!threads_.open(source, pool, &modes_, this, plan.reader)) {
        {
            MutexLock lock(mutex_);
            stopping_ = true;
            work_.notify_all();
        }
        threads_.join();
        *error = "cannot start " + number(plan.reader.thread_count) + " reader threads with buffers of " +
                 number(plan.reader.piece_bytes) + " bytes: take fewer or smaller ones";
        return false;
    }
    bool hosted = true; // or each piece is uploaded, which takes a thread
    for (uint32_t i = 0; i < class_count_; i++) {
        hosted = hosted && pool->host(i) != nullptr;
    }
    if (hosted && background_.open(source, &modes_, plan.reader.background_depth)) {
        MutexLock lock(mutex_);
        background_tokens_ = plan.reader.background_tokens;
        left_.reserve(2 * plan.reader.background_depth); // dispatch() adds to no more than half of that
    }
    open_ = true;
    return true;
}

void Stream::close() {
    if (!open_) {
        return;
    }
    {
        MutexLock lock(mutex_);
        stopping_ = true;
        for (uint32_t job = 0; job < slot_count_; job++) {
            if (queue_.active(job)) {
                cancel_read(job);
            }
        }
        for (uint32_t i = 0; i < class_count_; i++) {
            HY_CHECK(classes_[i].pinned == 0);
        }
        while (background_.under_way_count() > 0) {
            rest();
        }
        work_.notify_all();
    }
    threads_.join();
    background_.close();
    MutexLock lock(mutex_);
    if (trace_ != nullptr) {
        for (uint32_t i = 0; i < class_count_; i++) {
            class_snapshot_[i] = classes_[i].counters;
        }
        trace_->end({class_snapshot_.get(), class_count_});
        trace_ = nullptr;
    }
    open_ = false;
}

void Stream::trace_to(TraceWriter* trace) {
    MutexLock lock(mutex_);
    trace_ = trace;
}

// ---- readers

bool Stream::take(Piece* piece) {
    MutexLock lock(mutex_);
    for (;;) {
        if (stopping_) {
            return false;
        }
        if (!left_.empty()) {
            *piece = left_.front();
            left_.erase(left_.begin());
            return true;
        }
        if (!in_background_ && queue_.next(piece)) {
            if (idle_readers_ > 0 && queue_.startable_pieces() > 0) {
                work_.notify_one();
            }
            return true;
        }
        idle_readers_++;
        work_.wait(mutex_);
        idle_readers_--;
    }
}

void Stream::finish(uint32_t thread_index, const Piece& piece, const PieceResult& result) {
    MutexLock lock(mutex_);
    finish_piece(piece, result, platform::now_ns(), &thread_counters_[thread_index]);
    if (in_background_) {
        dispatch(); // a thread takes no more than what is left to it
    }
}

void Stream::finish_piece(const Piece& piece, const PieceResult& result, uint64_t ended_ns, ReaderCounters* counters) {
    counters->read_count += result.read_count;
    counters->kernel_bytes += result.kernel_bytes;
    counters->bounce_bytes += result.bounce_bytes;
    counters->retry_count += result.retry_count;
    counters->busy_ns += result.busy_ns;
    counters->delivered_bytes += result.error.fault == ReadFault::kNone ? piece.bytes : 0;
    ReadQueue::Outcome outcome = queue_.finish(piece, result.error);
    if (outcome != ReadQueue::Outcome::kPending) {
        end_read(piece.job_index, outcome);
        note_activity(ended_ns);
    }
}

void Stream::end_read(uint32_t job_index, ReadQueue::Outcome outcome) {
    Read read = reads_[job_index];
    reads_[job_index] = Read{};
    const Stride& stride = strides_[read.stride_index];
    Class& c = classes_[stride.class_index];
    uint64_t delivered_bytes = queue_.delivered_bytes(job_index);
    if (trace_ != nullptr) {
        outcome == ReadQueue::Outcome::kDone     ? trace_->complete(read.stride_index)
        : outcome == ReadQueue::Outcome::kFailed ? trace_->fail(read.stride_index)
                                                 : trace_->cancel(read.stride_index);
    }
    if (outcome == ReadQueue::Outcome::kDone) {
        HY_CHECK(delivered_bytes == c.spec.stride_bytes);
        c.cache.complete(stride.local);
        c.counters.read_bytes += delivered_bytes;
        c.counters.completed_count++;
    } else {
        c.counters.discarded_bytes += delivered_bytes;
        if (outcome == ReadQueue::Outcome::kFailed) {
            c.counters.failed_reads++;
            c.cache.fail(stride.local);
            if (c.cache.pins(stride.local) > 0) {
                errors_[read.stride_index] = last_error_ = queue_.error(job_index);
            }
        } else {
            c.counters.dropped_prefetches += read.demanded ? 0 : 1;
            c.cache.cancel(stride.local);
        }
    }
    bool drained = drain_waiters_ > 0 && queue_.active_count() == 0;
    if (read.awaited || slot_waiters_ > 0 || drained) {
        changed_.notify_all();
    }
}

// Hands out what may begin: to the background, or to threads that sleep.
void Stream::dispatch() {
    look();
    if (in_background_ && !stopping_) {
        background_.begin(&queue_, &left_);
        if (background_.is_synchronous()) {
            background_tokens_ = 0;
            in_background_ = false;
        }
    }
    if (sleepers_ > 0 && !collecting_ && background_.under_way_count() > 0) {
        changed_.notify_all(); // one of them has to collect
    }
    uint64_t pieces = left_.size() + (in_background_ ? 0 : queue_.startable_pieces());
    for (uint64_t i = std::min<uint64_t>(pieces, idle_readers_); i > 0; i--) {
        work_.notify_one();
    }
}

void Stream::end_background(uint32_t count, bool awaited) {
    const uint64_t now_ns = platform::now_ns();
    uint64_t ended_ns = 0; // of the last of them
    for (uint32_t i = 0; i < count; i++) {
        const BackgroundReader::Ended ended = background_.end(i, awaited, now_ns);
        ended_ns = std::max(ended_ns, ended.ended_ns);
        if (ended.is_whole) {
            finish_piece(ended.piece, ended.result, ended_ns, &background_counters_);
        } else {
            background_counters_.read_count += ended.result.read_count;
            background_counters_.kernel_bytes += ended.result.kernel_bytes;
            left_.push_back(ended.piece);
            work_.notify_one();
        }
    }
}

// Takes in what has ended in the background; false when nothing has.
bool Stream::look() {
    if (collecting_ || background_.under_way_count() == 0) {
        return false;
    }
    const uint32_t count = background_.look(platform::now_ns());
    end_background(count, false);
    return count > 0;
}

// Waits for a read in the background. False when there is none, or another consumer does that.
bool Stream::collect() {
    if (collecting_ || background_.under_way_count() == 0) {
        return false;
    }
    if (!look()) {
        constexpr uint64_t patience_ns = 20'000'000; // after which an interrupt is noticed
        collecting_ = true;
        mutex_.unlock();
        const uint32_t count = background_.wait(patience_ns);
        mutex_.lock();
        collecting_ = false;
        end_background(count, true);
    }
    dispatch(); // and another sleeper, if there is one, goes on collecting
    return true;
}

// Until something may have changed.
void Stream::rest() {
    if (!collect()) {
        sleepers_++;
        changed_.wait(mutex_);
        sleepers_--;
    }
}

// ---- leases

uint32_t Stream::job_of(const Stride& stride) const {
    const Class& c = classes_[stride.class_index];
    return c.first_job + c.cache.slot(stride.local);
}

bool Stream::cyclic(uint32_t class_index) const {
    return classes_[class_index].spec.policy.kind == PolicyKind::kPinnedCyclic; // not lru under its guard
}

void Stream::begin_pass(uint32_t token_count) {
    MutexLock lock(mutex_);
    if (trace_ != nullptr) {
        trace_->pass(token_count);
    }
    for (uint32_t i = 0; i < class_count_; i++) {
        classes_[i].cache.begin_pass(token_count);
    }
    const bool in_background = token_count <= background_tokens_;
    if (in_background_ != in_background) {
        in_background_ = in_background;
        dispatch(); // what is queued still
    }
}

// What the consumer sees of its pinned stride.
void Stream::fill(Lease* lease) {
    const Stride& stride = strides_[lease->stride_index];
    const Class& c = classes_[stride.class_index];
    StrideState state = c.cache.state(stride.local);
    HY_CHECK(c.cache.pins(stride.local) > 0 && state != StrideState::kAbsent);
    lease->state = state == StrideState::kReady     ? LeaseState::kReady
                   : state == StrideState::kReading ? LeaseState::kReading
                                                    : LeaseState::kFailed;
    lease->class_index = stride.class_index;
    lease->slot_index = c.cache.slot(stride.local);
    lease->phase_bytes = stride.phase_bytes;
    bool placed = c.host != nullptr && lease->state != LeaseState::kFailed;
    lease->data = placed ? c.host + lease->slot_index * c.spec.slot_bytes + stride.phase_bytes : nullptr;
}

bool Stream::pin_present(Lease* lease) {
    const Stride& stride = strides_[lease->stride_index];
    Class& c = classes_[stride.class_index];
    if (c.cache.state(stride.local) == StrideState::kAbsent) {
        return false;
    }
    c.cache.pin(stride.local);
    c.pinned++;
    fill(lease);
    return true;
}

void Stream::unpin(Lease* lease) {
    const Stride& stride = strides_[lease->stride_index];
    Class& c = classes_[stride.class_index];
    HY_CHECK(c.pinned > 0);
    c.pinned--;
    c.cache.unpin(stride.local);
    bool orphan = c.cache.state(stride.local) == StrideState::kReading && c.cache.pins(stride.local) == 0;
    if (orphan) {
        cancel_read(job_of(stride));
    }
}

bool Stream::admit(uint32_t stride_index, Purpose purpose) {
    const Stride& stride = strides_[stride_index];
    Class& c = classes_[stride.class_index];
    Admission admission = c.cache.admit(stride.local, purpose);
    if (!admission.taken()) {
        return false;
    }
    c.counters.evictions += admission.evicted_stride != kNone ? 1 : 0;
    c.counters.unused_prefetches += admission.evicted_unused ? 1 : 0;
    reads_[job_of(stride)].stride_index = stride_index;
    if (trace_ != nullptr && purpose == Purpose::kPrefetch) {
        trace_->prefetch(stride_index);
    }
    return true;
}

// A queued prefetch gives its slot up before anything is evicted, and before a demand goes without a slot.
bool Stream::find_slot(Lease* lease) {
    uint32_t class_index = strides_[lease->stride_index].class_index;
    if (classes_[class_index].cache.counts().free == 0) {
        drop_prefetch(class_index);
    }
    while (!admit(lease->stride_index, Purpose::kDemand)) {
        if (!drop_prefetch(class_index)) {
            return false;
        }
    }
    return pin_present(lease);
}

// The newest queued prefetch of the class that has no piece in flight. A kept stride's slot would help nobody.
bool Stream::drop_prefetch(uint32_t class_index) {
    for (uint32_t job = queue_.newest_prefetch(kNone); job != kNone; job = queue_.newest_prefetch(job)) {
        const Stride& stride = strides_[reads_[job].stride_index];
        const NeuronCache& cache = classes_[stride.class_index].cache;
        bool ours = stride.class_index == class_index && cache.pins(stride.local) == 0; // begin() may have pinned it
        if (ours && !queue_.in_flight(job) && !cache.kept(stride.local)) {
            cancel_read(job);
            return true;
        }
    }
    return false;
}

void Stream::clear_full() {
    for (uint32_t i = 0; i < class_count_; i++) {
        classes_[i].full = false;
    }
}

BeginResult Stream::begin(Span<Lease> leases, Holding holding) {
    MutexLock lock(mutex_);
    look();
    BeginResult result;
    if (trace_ != nullptr && !interrupted_) {
        trace_->begin({leases.data, leases.count});
    }
    for (Lease& lease : leases) {
        HY_CHECK(lease.stride_index < stride_count_);
        lease.state = LeaseState::kWaiting;
    }
    clear_full();
    bool any = false; // admitted
    if (!interrupted_) {
        for (Lease& lease : leases) {
            any |= pin_present(&lease);
        }
    }
    for (Lease& lease : leases) {
        uint32_t class_index = strides_[lease.stride_index].class_index;
        Class& c = classes_[class_index];
        if (trace_ != nullptr && !interrupted_) {
            trace_->at(static_cast<uint32_t>(&lease - leases.data));
        }
        while (lease.state == LeaseState::kWaiting && !interrupted_ && !c.full) {
            if (pin_present(&lease) || find_slot(&lease)) {
                any = true;
            } else if (any || holding == Holding::kLeases) {
                c.full = true;
            } else {
                slot_waiters_++;
                sleep(class_index);
                slot_waiters_--;
                clear_full(); // others used the marks meanwhile
            }
        }
    }
    if (trace_ != nullptr) {
        trace_->begun(interrupted_);
    }
    if (interrupted_) {
        for (Lease& lease : leases) {
            HY_CHECK(lease.state == LeaseState::kWaiting); // the lock was given up only while none was admitted
            lease.state = LeaseState::kNone;
        }
        result.status = Status::kInterrupted;
        return result;
    }
    start_reads(leases, &result);
    note_order(leases);
    dispatch();
    return result;
}

// In the order of the list, so that reads are done in the order of use.
void Stream::start_reads(Span<Lease> leases, BeginResult* result) {
    for (Lease& lease : leases) {
        const Stride& stride = strides_[lease.stride_index];
        Class& c = classes_[stride.class_index];
        if (lease.state == LeaseState::kWaiting) {
            c.counters.waiting++;
            continue;
        }
        result->admitted_count++;
        c.cache.touch(stride.local, lease.token_count);
        if (lease.state == LeaseState::kReady) {
            result->ready_count++;
            c.counters.hits++;
            continue;
        }
        if (lease.state == LeaseState::kFailed) {
            c.counters.misses++;
            continue;
        }
        uint32_t job = job_of(stride);
        if (!queue_.active(job)) {
            c.counters.misses++;
            submit(lease.stride_index, Urgency::kDemand);
        } else {
            c.counters.late_hits++;
            queue_.promote(job);
        }
        reads_[job].demanded = true;
    }
}

void Stream::submit(uint32_t stride_index, Urgency urgency) {
    const Stride& stride = strides_[stride_index];
    Class& c = classes_[stride.class_index];
    (urgency == Urgency::kDemand ? c.counters.demand_reads : c.counters.prefetch_reads)++;
    uint32_t slot = c.cache.slot(stride.local);
    std::byte* host = c.host == nullptr ? nullptr : c.host + slot * c.spec.slot_bytes;
    queue_.submit(c.first_job + slot, {stride.extents, {stride.class_index, slot}, host, stride.phase_bytes}, urgency);
    note_activity(platform::now_ns());
}

void Stream::cancel_read(uint32_t job_index) {
    if (queue_.cancel(job_index) == ReadQueue::Cancelled::kRemoved) {
        end_read(job_index, ReadQueue::Outcome::kCancelled);
        note_activity(platform::now_ns());
    }
}

// The disk's share of the time: from the first read under way to the last.
void Stream::note_activity(uint64_t now_ns) {
    bool active = queue_.active_count() > 0;
    if (active == (reading_since_ns_ != 0)) {
        return;
    }
    reading_ns_ += active ? 0 : now_ns - reading_since_ns_;
    reading_since_ns_ = active ? now_ns : 0;
}

void Stream::sleep(uint32_t class_index) {
    uint64_t start_ns = platform::now_ns();
    rest();
    uint64_t waited_ns = platform::now_ns() - start_ns;
    classes_[class_index].counters.stall_ns += waited_ns;
    if (trace_ != nullptr) {
        trace_->stall(waited_ns);
    }
}

Status Stream::wait(Lease* lease) {
    MutexLock lock(mutex_);
    HY_CHECK(lease->state != LeaseState::kNone && lease->state != LeaseState::kWaiting);
    for (;;) {
        fill(lease);
        if (lease->state != LeaseState::kReading) {
            return lease->state == LeaseState::kReady ? Status::kOk : Status::kFailed;
        }
        if (interrupted_) {
            return Status::kInterrupted;
        }
        reads_[job_of(strides_[lease->stride_index])].awaited = true;
        sleep(lease->class_index);
    }
}

Status Stream::wait_some(Span<Lease> leases) {
    MutexLock lock(mutex_);
    dispatch();
    for (;;) {
        bool failed = false;
        bool ready = false;
        const Lease* reading = nullptr;
        for (Lease& lease : leases) {
            if (lease.state != LeaseState::kReading) {
                failed |= lease.state == LeaseState::kFailed;
                continue;
            }
            fill(&lease);
            failed |= lease.state == LeaseState::kFailed;
            ready |= lease.state == LeaseState::kReady;
            if (lease.state == LeaseState::kReading) {
                reading = &lease;
                reads_[job_of(strides_[lease.stride_index])].awaited = true;
            }
        }
        if (failed || ready || reading == nullptr) {
            return failed ? Status::kFailed : Status::kOk;
        }
        if (interrupted_) {
            return Status::kInterrupted;
        }
        sleep(reading->class_index);
    }
}

void Stream::release(Span<Lease> leases) {
    MutexLock lock(mutex_);
    if (trace_ != nullptr) {
        trace_->release({leases.data, leases.count});
    }
    for (Lease& lease : leases) {
        if (lease.state != LeaseState::kNone && lease.state != LeaseState::kWaiting) {
            unpin(&lease);
        }
        lease.state = LeaseState::kNone;
        lease.data = nullptr;
    }
    if (slot_waiters_ > 0) {
        changed_.notify_all();
    }
    look_ahead();
    dispatch();
}

// ---- prefetch

uint32_t Stream::prefetch(Span<const uint32_t> strides) {
    MutexLock lock(mutex_);
    uint32_t started = 0;
    for (uint32_t stride_index : strides) {
        HY_CHECK(stride_index < stride_count_);
        const Stride& stride = strides_[stride_index];
        bool absent = classes_[stride.class_index].cache.state(stride.local) == StrideState::kAbsent;
        if (absent && !interrupted_ && admit(stride_index, Purpose::kPrefetch)) {
            submit(stride_index, Urgency::kPrefetch);
            started++;
        }
    }
    dispatch();
    return started;
}

void Stream::retract(Span<const uint32_t> strides) {
    MutexLock lock(mutex_);
    for (uint32_t stride_index : strides) {
        HY_CHECK(stride_index < stride_count_);
        const Stride& stride = strides_[stride_index];
        const NeuronCache& cache = classes_[stride.class_index].cache;
        if (cache.state(stride.local) != StrideState::kReading || cache.pins(stride.local) > 0) {
            continue;
        }
        const uint32_t job = job_of(stride);
        if (queue_.active(job) && !queue_.in_flight(job)) {
            cancel_read(job);
        }
    }
}

void Stream::note_order(Span<Lease> leases) {
    if (lookahead_strides_ == 0) {
        return;
    }
    for (const Lease& lease : leases) {
        if (lease.state == LeaseState::kWaiting || !cyclic(strides_[lease.stride_index].class_index)) {
            continue;
        }
        if (order_.note(lease.stride_index) == CyclicOrder::Noted::kUnexpected) {
            resync_count_++;
            abandon_lookahead();
        }
    }
    look_ahead();
}

void Stream::look_ahead() {
    if (lookahead_strides_ == 0 || !order_.learned() || interrupted_) {
        return;
    }
    clear_full();
    uint32_t distance = std::min(lookahead_strides_, order_.length() - 1);
    for (uint32_t i = 1; i <= distance; i++) {
        uint32_t stride_index = order_.ahead(i);
        const Stride& stride = strides_[stride_index];
        Class& c = classes_[stride.class_index];
        if (c.full || c.cache.state(stride.local) != StrideState::kAbsent) {
            continue;
        }
        if (admit(stride_index, Purpose::kPrefetch)) {
            submit(stride_index, Urgency::kPrefetch);
        } else {
            c.full = true;
        }
    }
}

// What was read ahead is not what comes: reads not begun are dropped, the others become as evictable as all else.
void Stream::abandon_lookahead() {
    if (trace_ != nullptr) {
        trace_->abandon();
    }
    for (uint32_t i = 0; i < class_count_; i++) {
        Class& c = classes_[i];
        if (!cyclic(i)) {
            continue;
        }
        for (uint32_t slot = 0; slot < c.spec.slot_count; slot++) {
            uint32_t local = c.cache.stride_at(slot);
            uint32_t job = c.first_job + slot;
            if (local == kNone || c.cache.pins(local) > 0) {
                continue;
            }
            c.cache.abandon(local);
            if (queue_.active(job)) {
                cancel_read(job);
            }
        }
    }
}

// ---- the rest

void Stream::drain() {
    MutexLock lock(mutex_);
    for (uint32_t job = 0; job < slot_count_; job++) {
        if (queue_.active(job)) {
            const Stride& stride = strides_[reads_[job].stride_index];
            if (classes_[stride.class_index].cache.pins(stride.local) == 0) {
                cancel_read(job);
            }
        }
    }
    drain_waiters_++;
    while (queue_.active_count() > 0) {
        rest();
    }
    drain_waiters_--;
}

void Stream::interrupt(bool on) {
    MutexLock lock(mutex_);
    interrupted_ = on;
    changed_.notify_all();
}

ReadError Stream::last_error() {
    MutexLock lock(mutex_);
    return last_error_;
}

void Stream::describe_error(const ReadError& error, Span<char> text) const {
    describe(error, error.file_index == kNone ? "" : source_->path(error.file_index), text);
}

StreamCounters Stream::counters() {
    MutexLock lock(mutex_);
    dispatch();
    StreamCounters counters;
    for (uint32_t i = 0; i < class_count_; i++) {
        class_snapshot_[i] = classes_[i].counters;
        add(&counters.total, class_snapshot_[i]);
    }
    for (uint32_t i = 0; i < thread_count_; i++) {
        thread_snapshot_[i] = thread_counters_[i];
        add(&counters.reader, thread_snapshot_[i]);
    }
    counters.background = background_counters_;
    add(&counters.reader, background_counters_);
    counters.classes = {class_snapshot_.get(), class_count_};
    counters.threads = {thread_snapshot_.get(), thread_count_};
    counters.fallback_files = modes_.fallback_count();
    counters.resyncs = resync_count_;
    counters.reading_ns = reading_ns_ + (reading_since_ns_ == 0 ? 0 : platform::now_ns() - reading_since_ns_);
    return counters;
}

uint32_t Stream::pinned_count() {
    MutexLock lock(mutex_);
    uint32_t pinned = 0;
    for (uint32_t i = 0; i < class_count_; i++) {
        pinned += classes_[i].pinned;
    }
    return pinned;
}

CachePolicy Stream::effective_policy(uint32_t class_index) {
    MutexLock lock(mutex_);
    HY_CHECK(class_index < class_count_);
    return classes_[class_index].cache.effective_policy();
}

void Stream::check() {
    MutexLock lock(mutex_);
    uint64_t accounted_bytes = 0;
    for (uint32_t i = 0; i < class_count_; i++) {
        const Class& c = classes_[i];
        c.cache.check();
        uint64_t pins = 0;
        for (uint32_t local = 0; local < c.cache.stride_count(); local++) {
            pins += c.cache.pins(local);
        }
        HY_CHECK(pins == c.pinned);
        for (uint32_t slot = 0; slot < c.spec.slot_count; slot++) {
            uint32_t local = c.cache.stride_at(slot);
            uint32_t job = c.first_job + slot;
            bool reading = local != kNone && c.cache.state(local) == StrideState::kReading;
            HY_CHECK(queue_.active(job) == reading);
            HY_CHECK(!reading || reads_[job].stride_index == c.globals[local]);
            accounted_bytes += reading ? queue_.delivered_bytes(job) : 0;
        }
        HY_CHECK(c.counters.read_bytes == c.counters.completed_count * c.spec.stride_bytes);
        accounted_bytes += c.counters.read_bytes + c.counters.discarded_bytes;
    }
    uint64_t delivered_bytes = 0;
    for (uint32_t i = 0; i < thread_count_; i++) {
        delivered_bytes += thread_counters_[i].delivered_bytes;
    }
    delivered_bytes += background_counters_.delivered_bytes;
    HY_CHECK(accounted_bytes == delivered_bytes);
}

} // namespace hypura

// See trace.h.
#include "trace.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <system_error>
#include <unistd.h>
#include <utility>

namespace hypura {
namespace {

constexpr uint32_t kLeastBufferBytes = 1u << 20;
// The writer wakes when so much waits: a few system calls a second at most, and little is lost in a crash.
constexpr uint32_t kFlushBytes = 1u << 16;
constexpr uint32_t kVarintBytes = 10; // the most that one takes

uint64_t zigzag(int64_t value) {
    return static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63);
}

} // namespace

// ---- the writer

bool TraceWriter::open(Options options, std::string* error) {
    HY_CHECK(descriptor_ < 0 && !thread_.joinable());
    options_ = std::move(options);
    part_path_ = options_.path + ".part";
    descriptor_ = ::open(part_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor_ < 0) {
        *error = "the trace " + part_path_ + " cannot be written (" + std::system_category().message(errno) +
                 "): give --trace another path";
        return false;
    }
    uint32_t header_bytes = static_cast<uint32_t>(options_.header.size());
    std::string start(kTraceMagic);
    for (uint32_t shift = 0; shift < 32; shift += 8) {
        start.push_back(static_cast<char>(header_bytes >> shift & 0xff));
    }
    start += options_.header;
    if (!write_out(reinterpret_cast<const uint8_t*>(start.data()), start.size())) {
        *error = "the trace " + part_path_ + " cannot be written (" + std::system_category().message(errno) +
                 "): make room or give --trace another path";
        discard();
        return false;
    }
    begun_ = std::make_unique<uint32_t[]>(options_.stride_count);
    MutexLock lock(mutex_);
    capacity_ = std::max(kLeastBufferBytes, 4 * kVarintBytes * options_.stride_count);
    for (Buffer& buffer : buffers_) {
        buffer.bytes = std::make_unique<uint8_t[]>(capacity_); // zeroed, so its pages are there
    }
    last_us_ = platform::now_ns() / 1000;
    thread_ = std::thread([this] { write_on(); });
    return true;
}

void TraceWriter::close() {
    if (!thread_.joinable()) {
        return;
    }
    {
        MutexLock lock(mutex_);
        closing_ = true;
        wake_.notify_one();
    }
    thread_.join();
    if (failed_) {
        return;
    }
    if (::close(std::exchange(descriptor_, -1)) != 0 || ::rename(part_path_.c_str(), options_.path.c_str()) != 0) {
        fail_with("it could not be finished", errno);
    }
}

void TraceWriter::fail_with(const std::string& what, int error_number) {
    failed_ = true;
    discard();
    std::string reason = error_number == 0 ? "" : " (" + std::system_category().message(error_number) + ")";
    if (options_.on_failure) {
        options_.on_failure("the trace " + options_.path + " ended after " + std::to_string(file_bytes_) + " bytes: " +
                            what + reason + "; it is removed, and the model goes on without it");
    }
}

void TraceWriter::discard() {
    if (descriptor_ >= 0) {
        ::close(std::exchange(descriptor_, -1));
    }
    ::unlink(part_path_.c_str());
}

bool TraceWriter::write_out(const uint8_t* data, uint64_t bytes) {
    while (bytes > 0) {
        ssize_t n = ::write(descriptor_, data, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        data += n;
        bytes -= static_cast<uint64_t>(n);
        file_bytes_ += static_cast<uint64_t>(n);
    }
    return true;
}

void TraceWriter::write_on() {
    platform::name_thread("hy-trace");
    for (;;) {
        const uint8_t* data = nullptr;
        uint32_t bytes = 0;
        bool last = false;
        bool overrun = false;
        {
            MutexLock lock(mutex_);
            while (!closing_ && !overrun_ && buffers_[filling_].used < kFlushBytes) {
                wake_.wait(mutex_);
            }
            last = closing_;
            overrun = overrun_;
            data = buffers_[filling_].bytes.get();
            bytes = buffers_[filling_].used;
            filling_ ^= 1;
            buffers_[filling_].used = 0;
        }
        if (overrun) {
            fail_with("its disk is slower than the records come", 0);
        } else if (!write_out(data, bytes)) {
            fail_with("its disk takes no more", errno);
        }
        if (last || failed_) {
            return;
        }
    }
}

// ---- its hooks

bool TraceWriter::room(uint64_t bytes) {
    if (failed_ || overrun_) {
        return false;
    }
    if (buffers_[filling_].used + bytes > capacity_) {
        overrun_ = true; // nobody waits for the disk here
        wake_.notify_one();
        return false;
    }
    return true;
}

void TraceWriter::put(uint64_t value) {
    Buffer& buffer = buffers_[filling_];
    while (value >= 0x80) {
        buffer.bytes[buffer.used++] = static_cast<uint8_t>(value | 0x80);
        value >>= 7;
    }
    buffer.bytes[buffer.used++] = static_cast<uint8_t>(value);
}

void TraceWriter::put_head(TraceKind kind, uint64_t argument) {
    put(static_cast<uint64_t>(kind) | argument << 4);
}

uint64_t TraceWriter::from_last(uint32_t stride) {
    int64_t step = static_cast<int64_t>(stride) - last_stride_;
    last_stride_ = stride;
    return zigzag(step);
}

void TraceWriter::put_stride(uint32_t stride) {
    put(from_last(stride));
}

void TraceWriter::put_time() {
    uint64_t now_us = platform::now_ns() / 1000;
    put(now_us - last_us_);
    last_us_ = now_us;
}

void TraceWriter::put_at() {
    if (at_ != kNone) {
        put_head(TraceKind::kAt, at_);
    }
}

void TraceWriter::written() {
    if (buffers_[filling_].used >= kFlushBytes) {
        wake_.notify_one();
    }
}

void TraceWriter::pass(uint32_t token_count) {
    MutexLock lock(mutex_);
    if (room(4 * kVarintBytes)) {
        put_at();
        put_head(TraceKind::kPass, token_count);
        put_time();
        written();
    }
}

void TraceWriter::begin(Span<const Lease> leases) {
    bool plain = true;
    for (const Lease& lease : leases) {
        plain &= lease.token_count == 1 && lease.state != LeaseState::kWaiting;
    }
    begun_count_ = leases.count <= options_.stride_count ? leases.count : 0;
    for (uint32_t i = 0; i < begun_count_; i++) {
        begun_[i] = leases[i].stride_index;
    }
    MutexLock lock(mutex_);
    if (!room((2 * uint64_t{leases.count} + 4) * kVarintBytes)) {
        return;
    }
    put_at();
    put_head(plain ? TraceKind::kBegin : TraceKind::kBeginMixed, leases.count);
    put_time();
    for (const Lease& lease : leases) {
        put_stride(lease.stride_index);
        if (!plain) {
            put(uint64_t{lease.token_count} << 1 | (lease.state == LeaseState::kWaiting ? 1 : 0));
        }
    }
    written();
}

void TraceWriter::begun(bool interrupted) {
    bool open = at_ != kNone;
    at_ = kNone;
    MutexLock lock(mutex_);
    if (open && interrupted && room(kVarintBytes)) {
        put_head(TraceKind::kInterrupted, 0);
    }
}

void TraceWriter::release(Span<const Lease> leases) {
    uint32_t held = 0;
    bool all = true;
    for (const Lease& lease : leases) {
        if (lease.state != LeaseState::kNone && lease.state != LeaseState::kWaiting) {
            all &= held < begun_count_ && begun_[held] == lease.stride_index;
            held++;
        }
    }
    MutexLock lock(mutex_);
    if (held == 0 || !room((uint64_t{held} + 2) * kVarintBytes)) {
        return;
    }
    put_at();
    if (all && held == begun_count_) {
        put_head(TraceKind::kReleaseAll, 0);
    } else {
        put_head(TraceKind::kRelease, held);
        for (const Lease& lease : leases) {
            if (lease.state != LeaseState::kNone && lease.state != LeaseState::kWaiting) {
                put_stride(lease.stride_index);
            }
        }
    }
    written();
}

void TraceWriter::stride_event(TraceKind kind, uint32_t stride) {
    MutexLock lock(mutex_);
    if (room(4 * kVarintBytes)) {
        put_at();
        put_head(kind, from_last(stride));
        if (kind == TraceKind::kComplete) {
            put_time();
        }
        written();
    }
}

void TraceWriter::abandon() {
    MutexLock lock(mutex_);
    if (room(2 * kVarintBytes)) {
        put_at();
        put_head(TraceKind::kAbandon, 0);
    }
}

void TraceWriter::stall(uint64_t duration_ns) {
    MutexLock lock(mutex_);
    if (room(4 * kVarintBytes)) {
        put_at();
        put_head(TraceKind::kStall, duration_ns / 1000);
        put_time();
        written();
    }
}

void TraceWriter::end(Span<const ClassCounters> classes) {
    MutexLock lock(mutex_);
    if (!room((uint64_t{classes.count} * kTraceEndFields + 2) * kVarintBytes)) {
        return;
    }
    put_head(TraceKind::kEnd, classes.count);
    put_time();
    for (const ClassCounters& c : classes) {
        for (uint64_t value :
             {c.hits, c.late_hits, c.misses, c.completed_count, c.evictions, c.stall_ns / 1000}) {
            put(value);
        }
    }
}

// ---- the reader

bool TraceReader::corrupt(const char* what) {
    error_ = "the trace is damaged near byte " + std::to_string(at_) + " of its records: " + what;
    return false;
}

bool TraceReader::varint(uint64_t* value) {
    *value = 0;
    for (uint32_t shift = 0; shift < 64; shift += 7) {
        if (at_ >= bytes_.count) {
            cut_off_ = true;
            return false;
        }
        uint8_t byte = bytes_[at_++];
        *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
        if (byte < 0x80) {
            return true;
        }
    }
    return corrupt("a number has no end");
}

bool TraceReader::step(uint64_t code, uint32_t* value) {
    int64_t difference = static_cast<int64_t>(code >> 1) ^ -static_cast<int64_t>(code & 1);
    if (difference > INT32_MAX || difference < INT32_MIN) {
        return corrupt("a stride that the model does not have");
    }
    int64_t next = last_stride_ + difference;
    if (next < 0 || next >= stride_count_) {
        return corrupt("a stride that the model does not have");
    }
    *value = last_stride_ = static_cast<uint32_t>(next);
    return true;
}

bool TraceReader::stride(uint32_t* value) {
    uint64_t code = 0;
    return varint(&code) && step(code, value);
}

bool TraceReader::uses(TraceRecord* record) {
    uint64_t count = record->argument;
    // Each takes at least one byte: no allocation is larger than the file's own size allows.
    if (count > bytes_.count - at_) {
        cut_off_ = true;
        return false;
    }
    for (uint64_t i = 0; i < count; i++) {
        TraceRecord::Use use{0, 1, false};
        uint64_t code = 2;
        if (!stride(&use.stride) || (record->kind == TraceKind::kBeginMixed && !varint(&code))) {
            return false;
        }
        if (code >> 1 > UINT32_MAX) {
            return corrupt("a lease of too many tokens");
        }
        use.token_count = static_cast<uint32_t>(code >> 1);
        use.again = (code & 1) != 0;
        record->uses.push_back(use);
    }
    return true;
}

bool TraceReader::body(TraceRecord* record) {
    switch (record->kind) {
        case TraceKind::kEnd:
            if (record->argument != class_count_) {
                return corrupt("its end counts other classes than its header");
            }
            if (!varint(&record->passed_us)) {
                return false;
            }
            record->counters.resize(class_count_ * kTraceEndFields);
            return std::all_of(record->counters.begin(), record->counters.end(),
                               [this](uint64_t& counter) { return varint(&counter); });
        case TraceKind::kPass:
            return record->argument <= UINT32_MAX ? varint(&record->passed_us) : corrupt("a pass of too many tokens");
        case TraceKind::kStall:
            return varint(&record->passed_us);
        case TraceKind::kBegin:
        case TraceKind::kBeginMixed:
            return varint(&record->passed_us) && uses(record);
        case TraceKind::kRelease: {
            if (record->argument > bytes_.count - at_) {
                cut_off_ = true;
                return false;
            }
            record->strides.resize(record->argument);
            for (uint32_t& one : record->strides) {
                if (!stride(&one)) {
                    return false;
                }
            }
            return true;
        }
        case TraceKind::kComplete:
            return step(record->argument, &record->stride) && varint(&record->passed_us);
        case TraceKind::kCancel:
        case TraceKind::kFail:
        case TraceKind::kPrefetch:
            return step(record->argument, &record->stride);
        case TraceKind::kAt:
            return record->argument <= UINT32_MAX || corrupt("a lease that no begin has");
        case TraceKind::kReleaseAll:
        case TraceKind::kAbandon:
        case TraceKind::kInterrupted:
            return true;
    }
    return corrupt("a record of an unknown kind");
}

bool TraceReader::next(TraceRecord* record) {
    if (at_ >= bytes_.count || cut_off_ || !error_.empty()) {
        return false;
    }
    uint64_t head = 0;
    if (!varint(&head)) {
        return false;
    }
    record->kind = static_cast<TraceKind>(head & 15);
    record->argument = head >> 4;
    record->passed_us = 0;
    record->stride = 0;
    record->uses.clear();
    record->strides.clear();
    record->counters.clear();
    return body(record);
}

} // namespace hypura

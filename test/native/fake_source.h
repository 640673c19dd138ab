// Files that exist only as a function of (file, offset), with faults: every byte can be verified, every fault is
// seeded.
#pragma once

#include "check.h"
#include "fake_background.h"
#include "reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <vector>

inline uint8_t pattern(hypura::FilePlace place) {
    return static_cast<uint8_t>(mix(place.file_index * 0x100000001b3ull + place.offset / 8 * 8) >>
                                place.offset % 8 * 8);
}

inline void fill_pattern(hypura::FilePlace place, hypura::Span<std::byte> into) {
    uint32_t i = 0;
    for (; i < into.count && (place.offset + i) % 8 != 0; i++) {
        into[i] = std::byte{pattern({place.file_index, place.offset + i})};
    }
    for (; i + 8 <= into.count; i += 8) {
        uint64_t word = mix(place.file_index * 0x100000001b3ull + place.offset + i);
        std::memcpy(into.data + i, &word, 8);
    }
    for (; i < into.count; i++) {
        into[i] = std::byte{pattern({place.file_index, place.offset + i})};
    }
}

inline bool has_pattern(const std::vector<hypura::Extent>& extents, const std::byte* data) {
    std::vector<std::byte> want;
    for (const hypura::Extent& extent : extents) {
        want.resize(extent.bytes);
        fill_pattern({extent.file_index, extent.offset}, {want.data(), static_cast<uint32_t>(extent.bytes)});
        if (std::memcmp(want.data(), data, extent.bytes) != 0) {
            return false;
        }
        data += extent.bytes;
    }
    return true;
}

struct Faults {
    uint64_t seed = 0;
    uint32_t short_one_in = 0; // 0: never
    uint32_t eintr_one_in = 0;
    uint32_t eagain_one_in = 0;
    uint32_t slow_one_in = 0; // latency, which also reorders completions
    uint32_t slow_ns = 0;
    uint64_t eio_at = UINT64_MAX; // from this read on, eio_count of them
    uint64_t eio_count = 1;
    uint64_t einval_at = UINT64_MAX; // direct reads from here on
    uint64_t shrink_at = UINT64_MAX; // from this read on the file has shrink_to bytes
    uint64_t shrink_to = 0;
    uint64_t change_at = UINT64_MAX;
    bool direct = true;

    bool fatal() const { return eio_at != UINT64_MAX || shrink_at != UINT64_MAX || change_at != UINT64_MAX; }
};

class FakeSource final : public hypura::ReadSource {
public:
    explicit FakeSource(std::vector<uint64_t> file_bytes) : file_bytes_(std::move(file_bytes)) {}

    bool reads_at_once = false; // what is to be read in the background

    // Only while no read is in flight.
    void set(const Faults& faults) {
        faults_ = faults;
        reads_ = 0;
    }

    bool has_direct(uint32_t) const override { return faults_.direct; }
    const char* path(uint32_t) const override { return "fake.gguf"; }
    bool unchanged(uint32_t) override { return reads_ < faults_.change_at; }
    int64_t bytes_now(uint32_t file_index) override {
        uint64_t bytes = file_bytes_[file_index];
        return static_cast<int64_t>(reads_ > faults_.shrink_at ? std::min(bytes, faults_.shrink_to) : bytes);
    }

    int64_t read(hypura::FilePlace place, hypura::platform::Access access, hypura::Span<std::byte> into) override {
        if (access == hypura::platform::Access::kDirect) {
            uint64_t bits = reinterpret_cast<uint64_t>(into.data) | place.offset | into.count;
            CHECK(bits % hypura::platform::kDirectAlign == 0);
        }
        wait_gate(place);
        uint64_t number = reads_++;
        Random random{faults_.seed ^ mix(number)};
        auto hit = [&random](uint32_t one_in) { return one_in != 0 && random.chance(one_in); };
        if (hit(faults_.slow_one_in)) {
            hypura::platform::sleep_ns(random.below(faults_.slow_ns));
        }
        if (number >= faults_.einval_at && access == hypura::platform::Access::kDirect) {
            return -EINVAL;
        }
        if (number >= faults_.eio_at && number - faults_.eio_at < faults_.eio_count) {
            return -EIO;
        }
        if (hit(faults_.eintr_one_in) || hit(faults_.eagain_one_in)) {
            return random.chance(2) ? -EINTR : -EAGAIN;
        }
        uint64_t bytes = static_cast<uint64_t>(bytes_now(place.file_index));
        if (place.offset >= bytes) {
            return 0;
        }
        uint32_t n = static_cast<uint32_t>(std::min<uint64_t>(into.count, bytes - place.offset));
        if (n > 1 && hit(faults_.short_one_in)) {
            n = 1 + random.below(n);
        }
        fill_pattern(place, {into.data, n});
        return n;
    }

    std::unique_ptr<hypura::BackgroundReads> background_reads(uint32_t depth) override {
        return std::make_unique<FakeBackground>(
            *this, FakeBackground::Options{depth, faults_.seed,
                                           [this] {
                                               std::lock_guard<std::mutex> lock(mutex_);
                                               return closed_;
                                           },
                                           [this] { return reads_at_once; }});
    }

    // A closed gate holds reads back; places that passed are recorded while recording.
    void gate(bool closed) {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = closed;
        gate_.notify_all();
    }
    void record(bool on) {
        std::lock_guard<std::mutex> lock(mutex_);
        recording_ = on;
        if (on) {
            recorded_.reserve(1024);
        }
    }
    void wait_arrived(uint32_t count) {
        std::unique_lock<std::mutex> lock(mutex_);
        gate_.wait(lock, [&] { return arrived_ >= count; });
    }
    std::vector<hypura::FilePlace> recorded() {
        std::lock_guard<std::mutex> lock(mutex_);
        return recorded_;
    }

private:
    void wait_gate(hypura::FilePlace place) {
        std::unique_lock<std::mutex> lock(mutex_);
        arrived_++;
        gate_.notify_all();
        gate_.wait(lock, [this] { return !closed_; });
        if (recording_) {
            recorded_.push_back(place);
        }
    }

    std::vector<uint64_t> file_bytes_;
    Faults faults_;
    std::atomic<uint64_t> reads_{0};
    std::mutex mutex_;
    std::condition_variable gate_;
    bool closed_ = false;
    bool recording_ = false;
    uint32_t arrived_ = 0;
    std::vector<hypura::FilePlace> recorded_;
};

// Memory that no host pointer reaches: bytes get in by upload only.
class FakeDevicePool final : public hypura::PoolMemory {
public:
    FakeDevicePool(uint32_t classes, uint64_t class_bytes, std::vector<uint64_t> slot_bytes)
        : memory_(classes, std::vector<std::byte>(class_bytes)), slot_bytes_(std::move(slot_bytes)) {}

    std::byte* host(uint32_t) override { return nullptr; }
    bool upload(hypura::SlotPlace place, uint64_t offset, hypura::Span<const std::byte> bytes) override {
        CHECK(offset + bytes.count <= slot_bytes_[place.class_index]);
        uploads_++;
        if (uploads_ == refuse_at) {
            return false;
        }
        std::memcpy(at(place) + offset, bytes.data, bytes.count);
        return true;
    }
    std::byte* at(hypura::SlotPlace place) {
        uint64_t offset = place.slot_index * slot_bytes_[place.class_index];
        CHECK(offset + slot_bytes_[place.class_index] <= memory_[place.class_index].size());
        return memory_[place.class_index].data() + offset;
    }

    uint64_t refuse_at = 0; // the how manieth upload fails

private:
    std::vector<std::vector<std::byte>> memory_;
    std::vector<uint64_t> slot_bytes_;
    std::atomic<uint64_t> uploads_{0};
};

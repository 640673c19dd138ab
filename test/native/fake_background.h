// Background reads over any source, without a thread: a read is done when somebody waits or looks, in no order. Whatever the
// source makes of a read (short, failed, slow) is what becomes of it.
#pragma once

#include "reader.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <vector>

class FakeBackground final : public hypura::BackgroundReads {
public:
    struct Options {
        uint32_t depth;
        uint64_t seed; // 0: begins all that it is given
        std::function<bool()> held;    // nothing is read meanwhile
        std::function<bool()> at_once; // as a file system that has no background reads; empty: it has
    };
    FakeBackground(hypura::ReadSource& source, Options options) : source_(source), options_(std::move(options)) {
        pending_.reserve(options_.depth);
        ready_.reserve(options_.depth);
    }

    uint32_t begin(hypura::Span<const Read> reads) override {
        std::lock_guard<std::mutex> lock(mutex_);
        const uint32_t count = options_.seed != 0 && dice(16) == 0 ? reads.count / 2 : reads.count;
        for (uint32_t i = 0; i < count; i++) {
            pending_.push_back(reads[i]);
        }
        while (options_.at_once && options_.at_once() && !pending_.empty()) {
            read_one();
        }
        begun_now_ = true;
        return count;
    }
    uint32_t done_count() override {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!begun_now_ && !pending_.empty() && !options_.held() && dice(2) == 0) {
            read_one();
        }
        begun_now_ = false;
        return static_cast<uint32_t>(ready_.size());
    }
    uint32_t wait(hypura::Span<Done> done, uint64_t most_ns) override {
        const uint64_t end_ns = hypura::platform::now_ns() + most_ns;
        while (options_.held()) {
            if (hypura::platform::now_ns() >= end_ns) {
                return 0;
            }
            hypura::platform::sleep_ns(100'000);
        }
        std::lock_guard<std::mutex> lock(mutex_);
        if (ready_.empty() && most_ns > 0 && !pending_.empty()) {
            read_one();
        }
        const auto count = std::min<uint32_t>(done.count, static_cast<uint32_t>(ready_.size()));
        std::copy_n(ready_.begin(), count, done.data);
        ready_.erase(ready_.begin(), ready_.begin() + count);
        return count;
    }

private:
    uint64_t dice(uint64_t sides) { // xorshift64*
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1dull % sides;
    }
    void read_one() {
        const auto which = static_cast<std::ptrdiff_t>(dice(pending_.size()));
        const Read read = pending_[static_cast<size_t>(which)];
        pending_.erase(pending_.begin() + which);
        ready_.push_back({read.tag, source_.read(read.place, hypura::platform::Access::kDirect, read.into)});
    }

    hypura::ReadSource& source_;
    const Options options_;
    std::mutex mutex_;
    uint64_t state_ = options_.seed | 1;
    bool begun_now_ = false;
    std::vector<Read> pending_;
    std::vector<Done> ready_;
};

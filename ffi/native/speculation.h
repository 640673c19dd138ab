// speculation.h - what the core guesses from, how much of it was right, and our own rule among its sources.
//
// llama.cpp's core asks common/speculative.h for guesses and says how many were right. It counts by source and tells
// nobody, and it takes no rule from outside. So that unpatched source is compiled here, as part of this file, with four
// of its functions wrapped: the linker finds them before it looks into the archive, as it does with the kernels of
// another processor (CMakeLists.txt). A core of another version that has these functions no more does not build.
//
// Knows no plan and no request; one GuessCounters belongs to one opened model and outlives its core.
#pragma once

#include "guesser.h"

#include <atomic>

namespace hypura {

enum class GuessSource : uint32_t { context, draft, mtp };
constexpr uint32_t kGuessSources = 3;

// Since the model was opened. Written by the core's thread, read by any.
struct GuessCounters {
    struct {
        std::atomic<uint64_t> drafted{0};
        std::atomic<uint64_t> accepted{0};
    } of[kGuessSources];
};

// While it lives, what a core that is loaded on this thread guesses from the context follows `rule` (where
// most_tokens is not zero), and its guesses are counted in `counters`.
class GuessScope {
public:
    GuessScope(const GuessRule & rule, GuessCounters & counters);
    ~GuessScope();
    GuessScope(const GuessScope &) = delete;
    GuessScope & operator=(const GuessScope &) = delete;
};

} // namespace hypura

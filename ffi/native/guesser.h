// guesser.h - which tokens may come next, from what was written before.
//
// A pure data structure over tokens: no model, no clock, no thread. It looks for the longest run of last tokens that
// stands somewhere before, in this text or in those of requests before it, and guesses what followed there. Where the
// text then takes another word, the place it was copied from is mostly still the right one, a word further: a few
// times it goes on from there (a field of another value, a name that is changed). It exists because llama.cpp's own
// rules forget each request, give a key up after one wrong guess, and start anew after each word that differs; replayed
// over real answers that is a fifth of the tokens of a pass (test/bench/NOTES.md). test/bench/guesses.ts has the same
// rule again, for replays; a test holds that both count alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hypura {

// From the plan; no field has a default that means anything.
struct GuessRule {
    uint32_t most_tokens = 0;     // guessed at once
    uint32_t least_match = 0;     // last tokens that have to stand elsewhere
    uint32_t most_carries = 0;    // guesses in a row that go on at the place before where fewer do
    uint32_t memory_tokens = 0;   // of requests before, in all
    // Guessed at once are least_tokens and so many for each that was right before, in the mean of the guesses of this
    // request, in which the newest counts newest_percent: where guesses are wrong a pass is kept short.
    uint32_t least_tokens = 0;
    uint32_t tokens_per_right = 0;
    uint32_t newest_percent = 0;
};

class Guesser {
public:
    Guesser(const GuessRule & rule, uint32_t sequence_count);

    // A request begins in `sequence` with this prompt: what stood there before is remembered from where it differs.
    void begin(uint32_t sequence, const std::vector<int32_t> & prompt);

    // What may follow `text` and then `last`; empty where nothing like it was seen. Negative tokens, which stand for
    // images, match nothing and are never guessed.
    std::vector<int32_t> guess(uint32_t sequence, const std::vector<int32_t> & text, int32_t last);

    // Of the last guess in `sequence`, so many were right.
    void learn(uint32_t sequence, uint32_t right);

private:
    // Where a guess is copied from. `none` where there was none.
    enum class Source { none, text, memory };
    struct Sequence {
        std::vector<int32_t> text;
        Source source = Source::none;
        size_t at = 0;      // the token that was guessed first
        size_t tokens = 0;  // of the text, when it was
        uint32_t carries = 0;
        uint64_t memory_version = 0;
        uint64_t right_thousandths = 0; // in the mean
    };
    struct Match {
        Source source;
        size_t at;
        size_t length;
    };

    size_t most_now(const Sequence & s) const;
    Match longest_match(const std::vector<int32_t> & text) const;
    const std::vector<int32_t> & text_of(const Sequence & s, Source source) const {
        return source == Source::memory ? memory_ : s.text;
    }
    void remember(const std::vector<int32_t> & text, size_t from);

    const GuessRule rule_;
    std::vector<Sequence> sequences_;
    std::vector<int32_t> memory_; // texts, a negative number after each
    uint64_t memory_version_ = 0; // places in it are good for one version
};

} // namespace hypura

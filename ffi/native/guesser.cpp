#include "guesser.h"

#include <algorithm>

namespace hypura {

namespace {

// More than so many alike say no more about what follows.
constexpr size_t kLongestCompared = 16;
constexpr int32_t kEndOfText = -1;
// Where a text goes on that was changed here and there: a word was put in, or one was left out.
constexpr int kResyncSteps[] = {1, -1, 2, -2, 3, 4};

// How many tokens before `at` are those at the end of `text`.
size_t alike(const std::vector<int32_t> & where, size_t at, const std::vector<int32_t> & text) {
    const size_t most = std::min({kLongestCompared, at, text.size()});
    size_t length = 0;
    while (length < most && where[at - 1 - length] == text[text.size() - 1 - length] && where[at - 1 - length] >= 0) {
        ++length;
    }
    return length;
}

// The newest of the longest matches that are longer than `length`; nothing is written to `at` where there is none.
void search(const std::vector<int32_t> & where, const std::vector<int32_t> & text, size_t * at, size_t * length) {
    for (size_t end = where.empty() ? 0 : where.size() - 1; end > 0 && *length < kLongestCompared; --end) {
        if (where[end - 1] != text.back()) {
            continue;
        }
        const size_t found = alike(where, end, text);
        if (found > *length) {
            *at = end;
            *length = found;
        }
    }
}

size_t resync(const std::vector<int32_t> & where, size_t at, int32_t last) {
    if (at == 0 || where[at - 1] == last) {
        return at;
    }
    for (const int step : kResyncSteps) {
        const int64_t place = static_cast<int64_t>(at) - 1 + step;
        if (place >= 0 && place + 1 < static_cast<int64_t>(where.size()) && where[place] == last) {
            return static_cast<size_t>(place + 1);
        }
    }
    return at;
}

} // namespace

Guesser::Guesser(const GuessRule & rule, uint32_t sequence_count) : rule_(rule), sequences_(sequence_count) {}

// Whole numbers, so that a replay in another language counts the same.
void Guesser::learn(uint32_t sequence, uint32_t right) {
    uint64_t & mean = sequences_[sequence].right_thousandths;
    mean = (mean * (100 - rule_.newest_percent) + 1000ull * right * rule_.newest_percent) / 100;
}

size_t Guesser::most_now(const Sequence & s) const {
    const uint64_t most = rule_.least_tokens + (rule_.tokens_per_right * s.right_thousandths + 999) / 1000;
    return static_cast<size_t>(std::min<uint64_t>(rule_.most_tokens, most));
}

void Guesser::begin(uint32_t sequence, const std::vector<int32_t> & prompt) {
    Sequence & s = sequences_[sequence];
    const size_t shorter = std::min(s.text.size(), prompt.size());
    const auto differs = std::mismatch(s.text.begin(), s.text.begin() + static_cast<std::ptrdiff_t>(shorter), prompt.begin());
    // What the new prompt repeats is found in the prompt itself.
    remember(s.text, static_cast<size_t>(differs.first - s.text.begin()));
    s = Sequence{};
    s.right_thousandths = 1000ull * rule_.most_tokens; // until it is known better
}

void Guesser::remember(const std::vector<int32_t> & text, size_t from) {
    const size_t room = rule_.memory_tokens;
    if (text.size() - from <= rule_.least_match || room < 2) {
        return;
    }
    from = std::max(from, text.size() - std::min(text.size(), room - 1));
    memory_.insert(memory_.end(), text.begin() + static_cast<std::ptrdiff_t>(from), text.end());
    memory_.push_back(kEndOfText);
    if (memory_.size() > room) {
        memory_.erase(memory_.begin(), memory_.end() - static_cast<std::ptrdiff_t>(room));
    }
    ++memory_version_;
}

Guesser::Match Guesser::longest_match(const std::vector<int32_t> & text) const {
    Match match{Source::none, 0, 0};
    if (text.back() < 0) {
        return match;
    }
    search(text, text, &match.at, &match.length);
    const size_t own = match.length;
    search(memory_, text, &match.at, &match.length);
    match.source = match.length == 0 ? Source::none : match.length > own ? Source::memory : Source::text;
    return match;
}

std::vector<int32_t> Guesser::guess(uint32_t sequence, const std::vector<int32_t> & text, int32_t last) {
    Sequence & s = sequences_[sequence];
    s.text.assign(text.begin(), text.end());
    s.text.push_back(last);
    const Match match = longest_match(s.text);
    if (s.source == Source::memory && s.memory_version != memory_version_) {
        s.source = Source::none; // what stood there stands elsewhere now
    }
    // A text that became shorter was shifted: nothing stands where it stood.
    const size_t carried = s.source == Source::none || s.text.size() < s.tokens ? SIZE_MAX : s.at + s.text.size() - s.tokens;
    const bool can_carry = carried < text_of(s, s.source).size() && s.carries < rule_.most_carries;
    if (match.length >= rule_.least_match) {
        s.source = match.source;
        s.at = match.at;
        s.carries = 0;
    } else if (can_carry) {
        s.at = resync(text_of(s, s.source), carried, last);
        ++s.carries;
    } else {
        s.source = Source::none;
        return {};
    }
    s.tokens = s.text.size();
    s.memory_version = memory_version_;
    const std::vector<int32_t> & from = text_of(s, s.source);
    std::vector<int32_t> guessed;
    const size_t most = most_now(s);
    for (size_t at = s.at; guessed.size() < most; ++at) {
        // Beyond the end of this very text stands what was just guessed: a text that repeats goes on so.
        const bool is_beyond = at >= from.size();
        if (is_beyond && s.source == Source::memory) {
            break;
        }
        const int32_t token = is_beyond ? guessed[at - from.size()] : from[at];
        if (token < 0) {
            break;
        }
        guessed.push_back(token);
    }
    return guessed;
}

} // namespace hypura

// Guessing from what was written before, on texts whose continuation is known, and on random ones under the sanitizers:
// places are kept from guess to guess while texts grow, shrink, come and go.

#include "check.h"
#include "guesser.h"

#include <vector>

using hypura::Guesser;
using hypura::GuessRule;
using Tokens = std::vector<int32_t>;

namespace {

// most_tokens, least_match, most_carries, memory_tokens, least_tokens, tokens_per_right, newest_percent
const GuessRule usual{7, 1, 3, 4096, 2, 4, 30};

Tokens guess_after(Guesser & guesser, Tokens text) {
    const int32_t last = text.back();
    text.pop_back();
    return guesser.guess(0, text, last);
}

void test_match() {
    Guesser guesser(usual, 1);
    guesser.begin(0, {});
    CHECK(guess_after(guesser, {1, 2, 3}).empty()); // nothing like it was seen
    guesser.begin(0, {});
    // The longest match wins over the newest; a text that repeats goes on beyond its end.
    CHECK((guess_after(guesser, {5, 6, 7, 8, 9, 6, 1, 5, 6}) == Tokens{7, 8, 9, 6, 1, 5, 6}));
    guesser.begin(0, {});
    CHECK((guess_after(guesser, {1, 2, 3, 1, 2, 3}) == Tokens{1, 2, 3, 1, 2, 3, 1}));
    guesser.begin(0, {});
    // An image is neither matched nor guessed.
    CHECK((guess_after(guesser, {4, 5, -1, 6, 4}) == Tokens{5}));
    CHECK(guess_after(guesser, {-1, 4, -1}).empty());
}

void test_carry() {
    Guesser guesser(usual, 1);
    const Tokens before = {10, 11, 12, 13, 14, 15, 16, 17, 18, 19};
    Tokens text = before;
    text.insert(text.end(), {10, 11});
    guesser.begin(0, text);
    CHECK((guess_after(guesser, text) == Tokens{12, 13, 14, 15, 16, 17, 18}));
    guesser.learn(0, 0);
    text.push_back(90); // another word in the place of 12
    CHECK((guess_after(guesser, text) == Tokens{13, 14, 15, 16, 17, 18, 19}));
    guesser.learn(0, 0);
    // Put in rather than in the place of one: what stands there is found again.
    text.push_back(12);
    CHECK((guess_after(guesser, text).at(0) == 13));

    GuessRule rule = usual;
    rule.most_carries = 0;
    Guesser plain(rule, 1);
    Tokens again = before;
    again.insert(again.end(), {10, 11});
    CHECK(!guess_after(plain, again).empty());
    again.push_back(90);
    CHECK(guess_after(plain, again).empty());
}

void test_depth() {
    Guesser guesser(usual, 1);
    Tokens text;
    for (int32_t i = 0; i < 40; ++i) {
        text.push_back(i % 10);
    }
    guesser.begin(0, text);
    CHECK(guess_after(guesser, text).size() == 7);
    for (int i = 0; i < 60; ++i) {
        guesser.learn(0, 0);
    }
    CHECK(guess_after(guesser, text).size() == 2);
    guesser.learn(0, 2);
    CHECK(guess_after(guesser, text).size() == 2 + 3); // 0.6 right in the mean, four for each
    guesser.learn(0, 5);
    guesser.learn(0, 7);
    CHECK(guess_after(guesser, text).size() == 7);
    for (int i = 0; i < 60; ++i) {
        guesser.learn(0, 0);
    }
    guesser.begin(0, text); // a request begins as if all were right
    CHECK(guess_after(guesser, text).size() == 7);
}

void test_memory() {
    for (const uint32_t memory_tokens : {4096u, 6u, 0u}) {
        GuessRule rule = usual;
        rule.memory_tokens = memory_tokens;
        Guesser guesser(rule, 2);
        guesser.begin(0, {1, 2});
        guess_after(guesser, {1, 2, 30, 31, 32, 33, 34, 35});
        guesser.begin(0, {7, 8});
        const Tokens guessed = guess_after(guesser, {7, 8, 32});
        CHECK(guessed == (memory_tokens == 0 ? Tokens{} : Tokens{33, 34, 35}));
        // Another sequence has it too; what the room did not hold is forgotten.
        guesser.begin(1, {9});
        CHECK(guesser.guess(1, {9}, 30).empty() == (memory_tokens <= 6));
    }
}

void test_random() {
    Random random{7};
    const auto below = [&](uint32_t n) { return random.below(n); };
    for (int round = 0; round < 40; ++round) {
        GuessRule rule{1 + below(15), 1 + below(3), below(4), below(3) * 50, 1 + below(3), below(5), below(101)};
        Guesser guesser(rule, 3);
        Tokens texts[3];
        for (int step = 0; step < 400; ++step) {
            const uint32_t sequence = below(3);
            Tokens & text = texts[sequence];
            if (text.empty() || below(30) == 0) {
                text.resize(below(2) * text.size() / 2); // a new prompt, or one that shares its beginning
                for (uint32_t i = 0; i < 1 + below(60); ++i) {
                    text.push_back(static_cast<int32_t>(below(12)) - 1);
                }
                guesser.begin(sequence, text);
            } else if (below(40) == 0) {
                text.erase(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(text.size() / 2)); // shifted
            }
            const int32_t last = static_cast<int32_t>(below(12)) - 1;
            const Tokens guessed = guesser.guess(sequence, text, last);
            CHECK(guessed.size() <= rule.most_tokens);
            const size_t right = guessed.empty() ? 0 : below(static_cast<uint32_t>(guessed.size()) + 1);
            text.push_back(last);
            for (size_t i = 0; i < guessed.size(); ++i) {
                CHECK(guessed[i] >= 0);
                if (i < right) {
                    text.push_back(guessed[i]);
                }
            }
            if (!guessed.empty()) {
                guesser.learn(sequence, static_cast<uint32_t>(right));
            }
        }
    }
}

} // namespace

int main() {
    CASE(test_match);
    CASE(test_carry);
    CASE(test_depth);
    CASE(test_memory);
    CASE(test_random);
    return 0;
}

// What every test here needs: a check that says where, a seeded generator, a runner of named cases. Nothing else.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition);                                \
            std::abort();                                                                                              \
        }                                                                                                              \
    } while (0)

#define CASE(name)                                                                                                     \
    do {                                                                                                               \
        std::printf("%s\n", #name);                                                                                    \
        std::fflush(stdout);                                                                                           \
        name();                                                                                                        \
    } while (0)

inline uint64_t mix(uint64_t x) { // splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

struct Random {
    uint64_t state;

    uint64_t next() { return mix(state++ * 0x2545f4914f6cdd1dull + 1); }
    uint32_t below(uint64_t n) { return static_cast<uint32_t>(next() % n); }
    bool chance(uint32_t one_in) { return below(one_in) == 0; }
    double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
};

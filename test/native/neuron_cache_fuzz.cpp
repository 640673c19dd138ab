// The neuron cache against its model, operations by libFuzzer.
#include "cache_model.h"

#include <cstddef>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    size_t at = 0;
    auto bytes = [&]() -> uint8_t { return at < size ? data[at++] : 0; };
    CacheDriver<decltype(bytes)&> driver(bytes);
    // At 3 half-lives a pass, 300 steps cannot make a score vanish (2^-900 > the least double).
    for (int steps = 0; at < size && steps < 300; steps++) {
        driver.step();
    }
    driver.settle();
    return 0;
}

// products.h - how fast the processor multiplies with weights of a type, as llama.cpp's CPU backend does it.
//
// Owns the weights, the graphs and the timing. The weights lie in plain memory as in a plan without repacking. Every
// number comes in the spec.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace hypura {

struct ProductsSpec {
    uint32_t thread_count;
    uint32_t poll_percent;  // how long an idle compute thread spins, 0 to 100
    uint64_t weight_bytes;  // of one pass with one token; more than the processor's caches
    uint64_t tensor_bytes;  // of one product of that pass
    uint32_t row_elements;  // a multiple of every type's block
    uint32_t batch_tokens;  // of the second measurement
    uint32_t batch_rows;    // of its weight
    uint64_t duration_ns;   // of each of the two; no pass begins later, beyond the first
};

struct ProductFigures {
    uint64_t decode_bytes = 0; // of weights in one pass
    uint64_t decode_ns = 0;    // of the median pass
    uint64_t decode_passes = 0;
    uint64_t prefill_flops = 0;
    uint64_t prefill_ns = 0;
    uint64_t prefill_passes = 0;
};

class ProductMeasure {
public:
    ProductMeasure();
    ~ProductMeasure();
    ProductMeasure(const ProductMeasure &) = delete;
    ProductMeasure & operator=(const ProductMeasure &) = delete;

    // Whether ggml has a type of this name that weights can have.
    static bool has_type(const std::string & type_name);

    // False with a sentence.
    bool open(const ProductsSpec & spec, std::string * error);
    // False with a sentence; stopped: true with what was measured so far.
    bool run(const std::string & type_name, const std::function<bool()> & stop, ProductFigures * figures, std::string * error);

private:
    struct Impl;
    const std::unique_ptr<Impl> impl_;
};

} // namespace hypura

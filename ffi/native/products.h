// products.h - how fast the processor multiplies with weights of a type, and what a layer does beside, as llama.cpp's CPU
// backend does it.
//
// Owns the weights, the graphs and the timing. The weights lie in plain memory, or in llama.cpp's own where it rearranges
// them. Every number comes in the spec and the cases.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace hypura {

struct ProductsSpec {
    uint32_t thread_count;
    uint32_t poll_percent; // how long an idle compute thread spins, 0 to 100
    uint64_t weight_bytes; // of one pass with one token; more than the processor's caches
    uint64_t duration_ns;  // of each case; no pass begins later, beyond the second
};

// What one graph of products is made of.
struct ProductCase {
    std::string type_name;
    uint32_t row_elements; // a multiple of the type's block
    uint32_t row_count;
    uint32_t token_count;
    uint32_t expert_count;  // 0: a plain product; else one on a tensor of so many matrices, all of which are used
    uint32_t product_count; // of the graph, if the weights have room for so many
    bool repacked;          // rearranged by llama.cpp as in a resident plan that asks for it
};

struct ProductFigures {
    bool is_absent = false; // llama.cpp does not rearrange this type here
    uint64_t bytes = 0;     // of weights in one pass
    uint64_t flops = 0;     // of one pass, two for each weight and token
    uint64_t products = 0;  // of one pass
    uint64_t ns = 0;        // of the median pass
    uint64_t passes = 0;
};

// What a layer does beside its products, for one token.
enum class StepKind {
    kAttention, // one query over what is kept of the past, in f16
    kMixing,    // the answers of a token's experts, weighed and added
    kPlain,     // a norm with its weights, and a sum
};

struct StepCase {
    StepKind kind;
    uint32_t width;          // elements: of a head; of an expert's answer; of the row
    uint32_t head_count;     // attention: of the query
    uint32_t key_head_count; // attention: a divisor of it
    uint32_t part_count;     // attention: positions; mixing: experts
    uint32_t step_count;     // of the graph
};

struct StepFigures {
    uint64_t ns = 0; // of the median pass
    uint64_t passes = 0;
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
    bool run(const ProductCase & one, const std::function<bool()> & stop, ProductFigures * figures, std::string * error);

    // The same for a graph of steps; the type of weights plays no part.
    bool run_steps(const StepCase & one, const std::function<bool()> & stop, StepFigures * figures, std::string * error);

private:
    struct Impl;
    const std::unique_ptr<Impl> impl_;
};

} // namespace hypura

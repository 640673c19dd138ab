// predictor.h - which experts a layer will choose, before its router has run.
//
// Owns copies of the routers. A layer adds little to the stream of activations that it hands on, so that the router of
// the next one, asked about the input of this one, mostly names the experts that it will choose (Eliseev and Mazur,
// "Fast Inference of Mixture-of-Experts Language Models with Offloading", 2023, section 3.2). The two inputs went through
// norms of their own; the quotient of these is part of the copy. A wrong prediction costs a read, never a bit of the
// answer, and where most are wrong it stops. Knows nothing of slots and reads nothing after open().
#pragma once

#include "backend.h"

#include <atomic>
#include <string>
#include <vector>

namespace hypura {

class ExpertPredictor {
public:
    // More tokens ask for most experts anyway.
    static constexpr uint32_t most_tokens = 8;

    // Reads the routers from the model's files. False with a sentence in `error`.
    bool open(const StreamingSpec & spec, std::string * error);

    // The router that follows the streamed tensor `order`; kNone where there is none, or where it is not worth it.
    static constexpr uint32_t kNone = UINT32_MAX;
    uint32_t router_after(uint32_t order) const { return is_off() || order >= after_.size() ? kNone : after_[order]; }
    // The router whose layer's first streamed tensor is `order`; kNone where there is none.
    uint32_t router_of(uint32_t order) const { return order >= of_.size() ? kNone : of_[order]; }

    // Numbers of the experts that router `router` will choose for these rows of activations, the likeliest of every token
    // first. Valid until the next call. `step_bytes`: from row to row.
    Span<const uint32_t> predict(uint32_t router, const std::byte * rows, size_t step_bytes, uint32_t row_count);
    // What the last predict() for this router said, and forgets it; empty where there was none.
    Span<const uint32_t> take_predicted(uint32_t router);
    // Of a prediction of `predicted` experts, `right` were asked for.
    void note(uint32_t predicted, uint32_t right);

    uint32_t columns(uint32_t router) const { return routers_[router].columns; }
    const std::vector<uint32_t> & asked(uint32_t router) const { return routers_[router].asked; }
    // The most strides that a prediction comes to.
    uint32_t most_strides() const { return most_strides_; }
    uint64_t predicted_count() const { return predicted_count_; }
    uint64_t right_count() const { return right_count_; }

private:
    struct Router {
        std::vector<uint32_t> asked;
        uint32_t columns = 0;
        uint32_t experts = 0;
        std::vector<uint16_t> weight; // experts x columns, f16
        std::vector<uint32_t> predicted;
        uint32_t predicted_count = 0;
    };
    bool is_off() const;
    void rank(const Router & router, uint32_t row);

    uint32_t experts_ = 0;
    uint32_t most_strides_ = 0;
    std::vector<Router> routers_;
    std::vector<uint32_t> after_; // streamed tensor -> router
    std::vector<uint32_t> of_;
    std::vector<uint16_t> row_;      // of activations, f16
    std::vector<float> logits_;
    std::vector<uint32_t> ranked_;   // most_tokens x experts_
    std::vector<uint8_t> is_listed_; // by expert
    std::atomic<uint64_t> predicted_count_{0}; // read by whoever asks for the counters
    std::atomic<uint64_t> right_count_{0};
};

} // namespace hypura

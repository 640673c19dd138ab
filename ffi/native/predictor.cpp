// See predictor.h.
#include "predictor.h"

#include "platform.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hypura {

namespace {

// Before this many predictions nothing is concluded from them.
constexpr uint64_t enough_predictions = 1024;

// The floats at `extent`; false with a sentence where they cannot be had.
bool read_floats(const std::vector<FileSpec> & files, const Extent & extent, std::vector<float> * floats, std::string * error) {
    const std::string & path = files[extent.file_index].path;
    const int file = platform::open_read(path.c_str(), platform::Access::kBuffered);
    if (file < 0) {
        *error = path + " cannot be opened: " + std::strerror(-file);
        return false;
    }
    floats->resize(extent.bytes / sizeof(float));
    auto * into = reinterpret_cast<std::byte *>(floats->data());
    uint64_t done = 0;
    int64_t got = 1;
    while (done < extent.bytes && got > 0) {
        const auto wanted = static_cast<uint32_t>(std::min<uint64_t>(extent.bytes - done, 1u << 30));
        got = platform::read_at(file, extent.offset + done, {into + done, wanted});
        done += got > 0 ? static_cast<uint64_t>(got) : 0;
    }
    platform::close_file(file);
    if (done < extent.bytes) {
        *error = path + " cannot be read at " + std::to_string(extent.offset + done) + ": " +
                 (got < 0 ? std::strerror(static_cast<int>(-got)) : "the file ends there");
        return false;
    }
    return true;
}

} // namespace

bool ExpertPredictor::open(const StreamingSpec & spec, std::string * error) {
    experts_ = spec.prediction.experts;
    if (experts_ == 0) {
        return true;
    }
    after_.assign(spec.tensors.size(), kNone);
    of_.assign(spec.tensors.size(), kNone);
    uint32_t widest = 0;
    uint32_t most_experts = 0;
    for (const RouterSpec & from : spec.prediction.routers) {
        std::vector<float> weight;
        std::vector<float> norm;
        std::vector<float> before;
        if (!read_floats(spec.stream.files, from.weight, &weight, error) || !read_floats(spec.stream.files, from.norm, &norm, error) ||
            !read_floats(spec.stream.files, from.norm_before, &before, error)) {
            return false;
        }
        Router router;
        router.asked = from.asked;
        router.columns = static_cast<uint32_t>(norm.size());
        router.experts = static_cast<uint32_t>(weight.size() / norm.size());
        for (size_t i = 0; i < weight.size(); ++i) {
            const size_t column = i % norm.size();
            weight[i] *= before[column] == 0.0f ? 0.0f : norm[column] / before[column];
        }
        router.weight.resize(weight.size());
        ggml_fp32_to_fp16_row(weight.data(), router.weight.data(), static_cast<int64_t>(weight.size()));
        router.predicted.resize(static_cast<size_t>(most_tokens) * experts_);
        after_[from.after] = static_cast<uint32_t>(routers_.size());
        of_[from.asked.front()] = static_cast<uint32_t>(routers_.size());
        most_strides_ = std::max(most_strides_, most_tokens * experts_ * static_cast<uint32_t>(router.asked.size()));
        widest = std::max(widest, router.columns);
        most_experts = std::max(most_experts, router.experts);
        routers_.push_back(std::move(router));
    }
    row_.resize(widest);
    logits_.resize(most_experts);
    ranked_.resize(static_cast<size_t>(most_tokens) * experts_);
    is_listed_.assign(most_experts, 0);
    return true;
}

bool ExpertPredictor::is_off() const {
    return predicted_count_ >= enough_predictions && 2 * right_count_ < predicted_count_;
}

void ExpertPredictor::note(uint32_t predicted, uint32_t right) {
    predicted_count_ += predicted;
    right_count_ += right;
}

// The experts of a row by their logits, the largest first, into ranked_.
void ExpertPredictor::rank(const Router & router, uint32_t row) {
    static const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(GGML_TYPE_F16)->vec_dot;
    for (uint32_t e = 0; e < router.experts; ++e) {
        const uint16_t * weight = router.weight.data() + static_cast<size_t>(e) * router.columns;
        dot(static_cast<int>(router.columns), &logits_[e], 0, weight, 0, row_.data(), 0, 1);
    }
    const uint32_t wanted = std::min(experts_, router.experts);
    for (uint32_t rank = 0; rank < wanted; ++rank) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < router.experts; ++e) {
            best = logits_[e] > logits_[best] ? e : best;
        }
        ranked_[row * experts_ + rank] = best;
        logits_[best] = -INFINITY;
    }
}

Span<const uint32_t> ExpertPredictor::predict(uint32_t router_index, const std::byte * rows, size_t step_bytes, uint32_t row_count) {
    Router & router = routers_[router_index];
    const uint32_t count = std::min(row_count, most_tokens);
    for (uint32_t row = 0; row < count; ++row) {
        ggml_fp32_to_fp16_row(reinterpret_cast<const float *>(rows + row * step_bytes), row_.data(), router.columns);
        rank(router, row);
    }
    router.predicted_count = 0;
    for (uint32_t rank = 0; rank < std::min(experts_, router.experts); ++rank) {
        for (uint32_t row = 0; row < count; ++row) {
            const uint32_t expert = ranked_[row * experts_ + rank];
            if (is_listed_[expert] == 0) {
                is_listed_[expert] = 1;
                router.predicted[router.predicted_count++] = expert;
            }
        }
    }
    const Span<const uint32_t> list{router.predicted.data(), router.predicted_count};
    for (const uint32_t expert : list) {
        is_listed_[expert] = 0;
    }
    return list;
}

Span<const uint32_t> ExpertPredictor::take_predicted(uint32_t router_index) {
    Router & router = routers_[router_index];
    const Span<const uint32_t> list{router.predicted.data(), router.predicted_count};
    router.predicted_count = 0;
    return list;
}

} // namespace hypura

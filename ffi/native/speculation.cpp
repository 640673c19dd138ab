#define common_speculative_init core_speculative_init
#define common_speculative_free core_speculative_free
#define common_speculative_deleter core_speculative_deleter // it calls the function above
#define common_speculative_draft core_speculative_draft
#define common_speculative_accept core_speculative_accept
#include "speculative.cpp"
#undef common_speculative_init
#undef common_speculative_free
#undef common_speculative_deleter
#undef common_speculative_draft
#undef common_speculative_accept

#include "speculation.h"

namespace hypura {

namespace {

struct Setup {
    GuessRule rule;
    GuessCounters * counters = nullptr;
};
thread_local Setup setup;

// Our rule in the form of one of the core's sources.
struct ContextGuesses : common_speculative_impl {
    ContextGuesses(const GuessRule & rule, uint32_t sequences)
        : common_speculative_impl(COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE, sequences, static_cast<int32_t>(rule.most_tokens)),
          guesser_(rule, sequences) {}

    void begin(llama_seq_id sequence, const llama_tokens & prompt) override {
        guesser_.begin(static_cast<uint32_t>(sequence), prompt);
    }
    bool process(const llama_batch &) override { return true; }
    void draft(common_speculative_draft_params_vec & asked) override {
        for (uint32_t sequence = 0; sequence < n_seq; ++sequence) {
            if (asked[sequence].drafting) {
                *asked[sequence].result = guesser_.guess(sequence, *asked[sequence].prompt, asked[sequence].id_last);
            }
        }
    }
    void accept(llama_seq_id sequence, uint16_t accepted, bool is_other) override {
        if (!is_other) {
            guesser_.learn(static_cast<uint32_t>(sequence), accepted);
        }
    }

private:
    Guesser guesser_;
};

struct Speculation : common_speculative {
    GuessCounters * counters = nullptr;

    void count() const {
        uint64_t drafted[kGuessSources] = {};
        uint64_t accepted[kGuessSources] = {};
        for (const auto & impl : impls) {
            const GuessSource source = impl->type == COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE ? GuessSource::draft
                                       : impl->type == COMMON_SPECULATIVE_TYPE_DRAFT_MTP  ? GuessSource::mtp
                                                                                          : GuessSource::context;
            drafted[static_cast<uint32_t>(source)] += impl->n_gen_tokens;
            accepted[static_cast<uint32_t>(source)] += impl->n_acc_tokens;
        }
        for (uint32_t i = 0; i < kGuessSources; ++i) {
            counters->of[i].drafted.store(drafted[i], std::memory_order_relaxed);
            counters->of[i].accepted.store(accepted[i], std::memory_order_relaxed);
        }
    }
};

} // namespace

GuessScope::GuessScope(const GuessRule & rule, GuessCounters & counters) {
    setup = {rule, &counters};
}

GuessScope::~GuessScope() {
    setup = {};
}

} // namespace hypura

common_speculative * common_speculative_init(common_params_speculative & params, uint32_t sequences) {
    // The type of the core's own pointer, which frees what the core made.
    const common_speculative_ptr made(core_speculative_init(params, sequences));
    if (!made) {
        return nullptr;
    }
    GGML_ASSERT(hypura::setup.counters != nullptr && "a core is loaded within a GuessScope");
    auto ours = std::make_unique<hypura::Speculation>();
    static_cast<common_speculative &>(*ours) = std::move(*made);
    ours->counters = hypura::setup.counters;
    for (auto & impl : ours->impls) {
        if (impl->type == COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE) {
            impl = std::make_unique<hypura::ContextGuesses>(hypura::setup.rule, sequences);
        }
    }
    return ours.release();
}

void common_speculative_free(common_speculative * speculation) {
    delete static_cast<hypura::Speculation *>(speculation);
}

void common_speculative_draft(common_speculative * speculation) {
    core_speculative_draft(speculation);
    if (speculation != nullptr) {
        static_cast<hypura::Speculation *>(speculation)->count();
    }
}

void common_speculative_accept(common_speculative * speculation, llama_seq_id sequence, uint16_t accepted) {
    core_speculative_accept(speculation, sequence, accepted);
    static_cast<hypura::Speculation *>(speculation)->count();
}

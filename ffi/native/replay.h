// A routing trace run again on the real neuron cache, without a model, a reader or a byte of weights. It owns the
// arithmetic of three questions and no policy: what did this cache do (verbatim), what would another have done (model),
// and what could any have done at best (optimum). It must not know a file, a model or what the header of a trace says.
#pragma once

#include "trace.h"

#include <functional>
#include <string>
#include <vector>

namespace hypura {

// The geometry that the records speak of.
struct ReplayShape {
    std::vector<uint32_t> class_of; // by stride
    std::vector<uint32_t> op_of;    // by stride: the place of its tensor in the order of a pass
    std::vector<uint64_t> stride_bytes; // by class
};

struct ReplayClass {
    uint32_t slot_count = 0;
    CachePolicy policy;
    std::vector<uint8_t> kept; // by stride of the class, for pinned_cyclic; empty: evenly spread
};

struct ReplayCounts {
    uint64_t hits = 0;
    uint64_t late_hits = 0; // read already, or being read, for nobody: only the verbatim replay tells them from hits
    uint64_t misses = 0;
    uint64_t reads = 0; // strides that were read whole
    uint64_t evictions = 0;
    uint64_t asked_bytes = 0;
    uint64_t read_bytes = 0;
};

// One pass, for plots.
struct ReplayPass {
    uint32_t token_count = 0;
    uint64_t start_us = 0; // since the first record
    uint64_t stall_us = 0;
    uint64_t reading_us = 0; // with at least one read under way; verbatim only
    ReplayCounts counts;
};

// A pass of so few tokens is a step of decoding; larger ones are prompts.
struct ReplayDecode {
    uint32_t passes = 0;
    uint64_t asked_bytes = 0;
    uint64_t read_bytes = 0;
};

struct ReplayResult {
    std::string error; // empty: none
    bool cut_off = false;
    std::vector<ReplayCounts> classes;
    ReplayDecode decode;               // model and optimum: of the counted passes
    std::vector<ReplayPass> passes;    // verbatim and model
    std::vector<uint64_t> recorded;    // verbatim: kTraceEndFields for each class, empty when cut off
    std::vector<PolicyKind> effective; // by class, after the guard
};

using ReplayCancelled = std::function<bool()>; // asked once a pass

// The recorded calls, one by one, on a cache of these classes. With the classes that were recorded it gives the hits,
// late hits, misses, reads and evictions that the stream counted, exactly: what depended on the disk's timing (which
// read was done when, which prefetch was dropped, what a wave gave back) is in the records, and all else is the cache.
// With other classes the records contradict it, which is an error: use the model.
ReplayResult replay_verbatim(Span<const uint8_t> records, const ReplayShape& shape,
                             const std::vector<ReplayClass>& classes, const ReplayCancelled& cancelled);

// What the recorded ops would have met in these classes, had every read been done when it was needed. Counts from pass
// `count_from` on. Where an op goes in waves, each is taken to compute all it got, an op at a time in the order of the
// pass; without waves the counts of the recorded classes are those of the verbatim replay.
struct ReplayModel {
    uint32_t lookahead_strides = 0;
    uint32_t count_from = 0;
    uint32_t decode_tokens = 1;
};
ReplayResult replay_model(Span<const uint8_t> records, const ReplayShape& shape,
                          const std::vector<ReplayClass>& classes, const ReplayModel& model,
                          const ReplayCancelled& cancelled);

// Belady's optimum: evict what is used again last, and keep nothing that is used later than all that is kept. No policy
// with as many slots reads less: an upper bound, that no policy without foresight reaches. Only slot_count is used.
ReplayResult replay_optimum(Span<const uint8_t> records, const ReplayShape& shape,
                            const std::vector<ReplayClass>& classes, const ReplayModel& model,
                            const ReplayCancelled& cancelled);

// Routed tokens of each stride in the passes [first, end): how hot it is.
struct PassRange {
    uint32_t first;
    uint32_t end;
};
std::vector<uint64_t> count_uses(Span<const uint8_t> records, const ReplayShape& shape, PassRange passes,
                                 std::string* error);

} // namespace hypura

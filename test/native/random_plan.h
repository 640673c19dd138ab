// Seeded plans and faults, for the tests that throw many of them at a stream.
#pragma once

#include "stream_rig.h"

inline void random_plan(StreamRig& rig, Random& random) {
    rig.plan.reader = {1 + random.below(4), 4096 * (1 + random.below(4)), !random.chance(4), random.chance(2), 200, 1};
    rig.plan.reader.prefetch_depth = random.below(4);
    rig.plan.lookahead_strides = random.below(3) * 4;
    uint32_t files = 1 + random.below(3);
    for (uint32_t i = 0; i < files; i++) {
        rig.plan.files.push_back({"fake.gguf", random.below(5000)});
    }
    uint32_t classes = 1 + random.below(3);
    for (uint32_t c = 0; c < classes; c++) {
        hypura::ClassSpec spec{};
        spec.stride_bytes = random.chance(3) ? 4096 * (1 + random.below(6)) : 1 + random.below(30000);
        spec.slot_bytes = hypura::min_slot_bytes(spec.stride_bytes);
        spec.slot_count = 2 + random.below(10);
        spec.op_slots = 1;
        spec.policy.kind = static_cast<hypura::PolicyKind>(random.below(4));
        spec.policy.half_life_tokens = random.below(20);
        spec.policy.stale_after_passes = random.below(3);
        spec.policy.pinned_slots = random.below(spec.slot_count);
        spec.policy.working_set_strides = random.below(16);
        spec.policy.guard_ring_slots = 1 + random.below(3);
        rig.plan.classes.push_back(spec);
        for (uint32_t i = 1 + random.below(24); i > 0; i--) {
            uint32_t first = static_cast<uint32_t>(rig.plan.extents.size());
            uint64_t left = spec.stride_bytes;
            while (left > 0) {
                uint64_t bytes = random.chance(4) ? 1 + random.below(left) : left;
                uint32_t file_index = random.below(files);
                hypura::FileSpec& file = rig.plan.files[file_index];
                file.bytes += random.chance(3) ? random.below(5000) : 0;
                rig.plan.extents.push_back({file_index, file.bytes, bytes});
                file.bytes += bytes;
                left -= bytes;
            }
            uint32_t count = static_cast<uint32_t>(rig.plan.extents.size()) - first;
            rig.plan.strides.push_back({c, random.below(40), first, count});
        }
    }
    rig.plan.reader.background_tokens = random.below(6); // passes have up to 4
    rig.plan.reader.background_depth = random.below(8);
}

inline Faults random_faults(StreamRig& rig, Random& random) {
    Faults faults;
    faults.seed = random.next();
    faults.direct = !random.chance(5);
    faults.short_one_in = random.below(3) * 2;
    faults.eintr_one_in = random.below(3) * 3;
    faults.eagain_one_in = random.below(3) * 4;
    faults.slow_one_in = random.below(3) * 8;
    faults.slow_ns = 1 + random.below(100000);
    uint64_t reads = 40 + random.below(300);
    switch (random.below(8)) {
    case 0:
        faults.eio_at = random.below(reads);
        faults.eio_count = 1 + random.below(5);
        break;
    case 1:
        faults.einval_at = random.below(reads);
        break;
    case 2:
    case 3:
        faults.shrink_at = random.below(reads);
        faults.shrink_to = random.below(rig.plan.files[0].bytes + 1);
        break;
    case 4:
        faults.change_at = random.below(reads);
        break;
    default:
        break;
    }
    return faults;
}

// So many passes; cyclic ones repeat the same ops, with an aborted pass now and then, and what is prefetched is
// sometimes taken back. `run_op` computes a list of strides and tells how that ended.
template <typename RunOp>
void random_passes(StreamRig& rig, Random& random, uint32_t passes, RunOp run_op) {
    uint32_t count = static_cast<uint32_t>(rig.plan.strides.size());
    bool cyclic = random.chance(2);
    for (; passes > 0; passes--) {
        rig.stream.begin_pass(1 + random.below(4));
        for (uint32_t at = 0; at < count;) {
            std::vector<uint32_t> op;
            for (uint32_t n = cyclic ? 1 + at % 3 : 1 + random.below(12); n > 0 && at < count; n--, at++) {
                op.push_back(cyclic ? at : random.below(count));
            }
            if (random.chance(6)) {
                uint32_t ahead[3] = {random.below(count), random.below(count), random.below(count)};
                rig.stream.prefetch({ahead, 3});
                if (random.chance(2)) {
                    rig.stream.retract({ahead, 1 + random.below(3)}); // whatever became of them meanwhile
                }
            }
            if (run_op(op) != hypura::Status::kOk) {
                rig.stream.drain();
                break;
            }
            if (random.chance(40)) {
                break; // the pass is aborted
            }
        }
    }
}

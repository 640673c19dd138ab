// See replay.h.
#include "replay.h"

#include <algorithm>
#include <queue>

namespace hypura {
namespace {

// The strides of a class with their cache, numbered as the stream numbers them.
struct Table {
    NeuronCache cache;
    uint64_t stride_bytes = 0;
    ReplayCounts counts;
    bool cyclic = false; // as planned, whatever the guard against LRU's cliff made of it
    bool full = false;   // a mark within one begin
};

class Tables {
public:
    Tables(const ReplayShape& shape, const std::vector<ReplayClass>& classes)
        : shape_(shape), local_(shape.class_of.size()), active_(shape.class_of.size()), tables_(classes.size()) {
        std::vector<std::vector<uint32_t>> orders(classes.size());
        for (uint32_t i = 0; i < shape.class_of.size(); i++) {
            uint32_t c = shape.class_of[i];
            local_[i] = static_cast<uint32_t>(orders[c].size());
            orders[c].push_back(shape.op_of[i]);
        }
        for (uint32_t c = 0; c < classes.size(); c++) {
            Span<const uint32_t> order{orders[c].data(), static_cast<uint32_t>(orders[c].size())};
            Span<const uint8_t> kept{classes[c].kept.data(), static_cast<uint32_t>(classes[c].kept.size())};
            tables_[c].cache.open({classes[c].slot_count, order, kept}, classes[c].policy);
            tables_[c].stride_bytes = shape.stride_bytes[c];
            tables_[c].cyclic = classes[c].policy.kind == PolicyKind::kPinnedCyclic;
        }
    }

    Table& of(uint32_t stride) { return tables_[shape_.class_of[stride]]; }
    uint32_t local(uint32_t stride) const { return local_[stride]; }
    StrideState state(uint32_t stride) { return of(stride).cache.state(local(stride)); }
    uint32_t pins(uint32_t stride) { return of(stride).cache.pins(local(stride)); }
    uint32_t op(uint32_t stride) const { return shape_.op_of[stride]; }
    // Its read is under way.
    bool active(uint32_t stride) const { return active_[stride] != 0; }
    uint32_t active_count() const { return active_count_; }
    std::vector<Table>& all() { return tables_; }

    bool admit(uint32_t stride, Purpose purpose) {
        Admission admission = of(stride).cache.admit(local(stride), purpose);
        of(stride).counts.evictions += admission.taken() && admission.evicted_stride != UINT32_MAX ? 1 : 0;
        return admission.taken();
    }
    void pin(uint32_t stride) { of(stride).cache.pin(local(stride)); }
    void unpin(uint32_t stride) { of(stride).cache.unpin(local(stride)); }
    void start(uint32_t stride) { set_active(stride, true); }
    void complete(uint32_t stride) {
        set_active(stride, false);
        of(stride).cache.complete(local(stride));
        of(stride).counts.reads++;
        of(stride).counts.read_bytes += of(stride).stride_bytes;
    }
    void fail(uint32_t stride) {
        set_active(stride, false);
        of(stride).cache.fail(local(stride));
    }
    void cancel(uint32_t stride) {
        set_active(stride, false);
        of(stride).cache.cancel(local(stride));
    }
    // As Stream::start_reads counts an admitted lease.
    void use(uint32_t stride, uint32_t token_count) {
        Table& table = of(stride);
        table.cache.touch(local(stride), token_count);
        table.counts.asked_bytes += table.stride_bytes;
        if (state(stride) == StrideState::kReady) {
            table.counts.hits++;
        } else if (active(stride)) {
            table.counts.late_hits++;
        } else {
            table.counts.misses++;
            set_active(stride, state(stride) == StrideState::kReading);
        }
    }
    void abandon() {
        for (Table& table : tables_) {
            for (uint32_t slot = 0; table.cyclic && slot < table.cache.slot_count(); slot++) {
                uint32_t local = table.cache.stride_at(slot);
                if (local != UINT32_MAX && table.cache.pins(local) == 0) {
                    table.cache.abandon(local);
                }
            }
        }
    }

    void begin_pass(uint32_t token_count) {
        for (Table& table : tables_) {
            table.cache.begin_pass(token_count);
        }
    }
    ReplayCounts total() const {
        ReplayCounts sum;
        for (const Table& table : tables_) {
            const ReplayCounts& c = table.counts;
            sum.hits += c.hits;
            sum.late_hits += c.late_hits;
            sum.misses += c.misses;
            sum.reads += c.reads;
            sum.evictions += c.evictions;
            sum.asked_bytes += c.asked_bytes;
            sum.read_bytes += c.read_bytes;
        }
        return sum;
    }
    void forget_counts() {
        for (Table& table : tables_) {
            table.counts = ReplayCounts{};
        }
    }
    void finish(ReplayResult* result) {
        for (Table& table : tables_) {
            table.cache.check();
            result->classes.push_back(table.counts);
            result->effective.push_back(table.cache.effective_policy().kind);
        }
    }

private:
    void set_active(uint32_t stride, bool on) {
        active_count_ += on ? 1 : 0;
        active_count_ -= active_[stride];
        active_[stride] = on ? 1 : 0;
    }

    const ReplayShape& shape_;
    std::vector<uint32_t> local_;
    std::vector<uint8_t> active_;
    uint32_t active_count_ = 0;
    std::vector<Table> tables_;
};

ReplayCounts difference(const ReplayCounts& after, const ReplayCounts& before) {
    return {after.hits - before.hits,
            after.late_hits - before.late_hits,
            after.misses - before.misses,
            after.reads - before.reads,
            after.evictions - before.evictions,
            after.asked_bytes - before.asked_bytes,
            after.read_bytes - before.read_bytes};
}

// Cuts the running counts into passes.
class PassLog {
public:
    void time(const TraceRecord& record, bool reading) {
        now_us_ += record.passed_us;
        if (open_ && reading) {
            log_.back().reading_us += record.passed_us;
        }
        if (record.kind == TraceKind::kStall && open_) {
            log_.back().stall_us += record.argument;
        }
    }
    void begin(uint32_t token_count, const ReplayCounts& now) {
        end(now);
        log_.push_back({token_count, now_us_, 0, 0, {}});
        start_ = now;
        open_ = true;
    }
    void end(const ReplayCounts& now) {
        if (open_) {
            log_.back().counts = difference(now, start_);
        }
    }
    void restart() { start_ = ReplayCounts{}; }
    uint32_t count() const { return static_cast<uint32_t>(log_.size()); }
    std::vector<ReplayPass> take() { return std::move(log_); }

private:
    std::vector<ReplayPass> log_;
    ReplayCounts start_;
    uint64_t now_us_ = 0;
    bool open_ = false;
};

// ---- verbatim

class Verbatim {
public:
    Verbatim(Span<const uint8_t> records, const ReplayShape& shape, const std::vector<ReplayClass>& classes)
        : shape_(shape), tables_(shape, classes),
          reader_(records, static_cast<uint32_t>(shape.class_of.size()), static_cast<uint32_t>(classes.size())) {}

    ReplayResult run(const ReplayCancelled& cancelled) {
        ReplayResult result;
        bool ended = false;
        while (!ended && next()) {
            ended = record_.kind == TraceKind::kEnd;
            if (ended) {
                result.recorded = record_.counters;
            } else if (record_.kind == TraceKind::kPass && cancelled()) {
                error_ = "cancelled";
                break;
            } else if (!apply()) {
                break;
            }
        }
        log_.end(tables_.total());
        result.error = error_.empty() ? reader_.error() : error_;
        result.cut_off = !ended;
        if (result.error.empty()) {
            tables_.finish(&result);
        }
        result.passes = log_.take();
        return result;
    }

private:
    // One record of lookahead, because a begin waits for what came during it.
    bool next() {
        if (has_ahead_) {
            std::swap(record_, ahead_);
            has_ahead_ = false;
        } else if (!reader_.next(&record_)) {
            return false;
        }
        log_.time(record_, tables_.active_count() > 0);
        return true;
    }
    const TraceRecord* peek() {
        has_ahead_ = has_ahead_ || reader_.next(&ahead_);
        return has_ahead_ ? &ahead_ : nullptr;
    }

    // What the cache would abort on is an error of the trace here.
    bool sound(bool condition, const char* what) {
        if (!condition && error_.empty()) {
            error_ = std::string("the trace contradicts this cache near byte ") + std::to_string(reader_.offset()) +
                     " of its records: " + what;
        }
        return condition;
    }

    bool apply() {
        uint32_t stride = record_.stride;
        bool reading = shape_.class_of.size() > stride && tables_.state(stride) == StrideState::kReading;
        switch (record_.kind) {
            case TraceKind::kPass:
                log_.begin(static_cast<uint32_t>(record_.argument), tables_.total());
                tables_.begin_pass(static_cast<uint32_t>(record_.argument));
                return true;
            case TraceKind::kBegin:
            case TraceKind::kBeginMixed:
                return begin();
            case TraceKind::kReleaseAll:
                return release(begun_);
            case TraceKind::kRelease:
                return release(record_.strides);
            case TraceKind::kComplete:
                if (sound(reading, "a read that is done was not begun")) {
                    tables_.complete(stride);
                }
                return error_.empty();
            case TraceKind::kCancel:
                if (sound(reading && tables_.pins(stride) == 0, "a read that is given up is needed or was not begun")) {
                    tables_.cancel(stride);
                }
                return error_.empty();
            case TraceKind::kFail:
                if (sound(reading, "a read that failed was not begun")) {
                    tables_.fail(stride);
                }
                return error_.empty();
            case TraceKind::kPrefetch: {
                bool absent = tables_.state(stride) == StrideState::kAbsent;
                if (sound(absent && tables_.admit(stride, Purpose::kPrefetch), "a prefetch has no slot")) {
                    tables_.start(stride);
                }
                return error_.empty();
            }
            case TraceKind::kAbandon:
                tables_.abandon();
                return true;
            case TraceKind::kAt:
            case TraceKind::kInterrupted:
                return sound(false, "it speaks of a begin that is not under way");
            case TraceKind::kStall:
            case TraceKind::kEnd:
                return true;
        }
        return false;
    }

    bool release(const std::vector<uint32_t>& strides) {
        for (uint32_t stride : strides) {
            if (!sound(tables_.pins(stride) > 0, "what is released is not held")) {
                return false;
            }
            tables_.unpin(stride);
        }
        return true;
    }

    // As Stream::begin: what is present, then in order what finds a slot.
    bool begin() {
        uses_ = record_.uses;
        begun_.clear();
        std::vector<uint8_t> admitted(uses_.size());
        for (Table& table : tables_.all()) {
            table.full = false;
        }
        // An interrupted begin holds nothing, so nothing was present either.
        for (size_t i = 0; i < uses_.size(); i++) {
            begun_.push_back(uses_[i].stride);
            admitted[i] = pin_present(uses_[i].stride);
        }
        for (size_t i = 0; i < uses_.size(); i++) {
            if (!events_at(i)) {
                return false;
            }
            if (interrupted()) {
                return true;
            }
            uint32_t stride = uses_[i].stride;
            Table& table = tables_.of(stride);
            if (admitted[i] || table.full) {
                continue;
            }
            admitted[i] = pin_present(stride) || tables_.admit(stride, Purpose::kDemand);
            if (admitted[i] && tables_.pins(stride) == 0) {
                tables_.pin(stride);
            }
            table.full = !admitted[i];
        }
        for (size_t i = 0; i < uses_.size(); i++) {
            if (admitted[i]) {
                tables_.use(uses_[i].stride, uses_[i].token_count);
            }
        }
        return true;
    }

    bool pin_present(uint32_t stride) {
        bool present = tables_.state(stride) != StrideState::kAbsent;
        if (present) {
            tables_.pin(stride);
        }
        return present;
    }

    // What came before lease i was given a slot. It takes no mark away: a class is full only once something was admitted,
    // and such a begin does not sleep; what it drops of another class makes no room in this one.
    bool events_at(size_t i) {
        while (peek() != nullptr && ahead_.kind == TraceKind::kAt && ahead_.argument <= i) {
            if (!next() || !next()) {
                return sound(false, "it ends in the middle of a begin");
            }
            bool nested = record_.kind == TraceKind::kBegin || record_.kind == TraceKind::kBeginMixed ||
                          record_.kind == TraceKind::kAt || record_.kind == TraceKind::kEnd;
            if (!sound(!nested, "a begin within a begin") || !apply()) {
                return false;
            }
        }
        return true;
    }
    bool interrupted() {
        bool is = peek() != nullptr && ahead_.kind == TraceKind::kInterrupted;
        return is && next();
    }

    const ReplayShape& shape_;
    Tables tables_;
    TraceReader reader_;
    TraceRecord record_;
    TraceRecord ahead_;
    bool has_ahead_ = false;
    std::vector<TraceRecord::Use> uses_;
    std::vector<uint32_t> begun_;
    PassLog log_;
    std::string error_;
};

// ---- model

class Model {
public:
    Model(Span<const uint8_t> records, const ReplayShape& shape, const std::vector<ReplayClass>& classes,
          const ReplayModel& model)
        : tables_(shape, classes), model_(model),
          reader_(records, static_cast<uint32_t>(shape.class_of.size()), static_cast<uint32_t>(classes.size())) {
        order_.open(static_cast<uint32_t>(shape.class_of.size()));
    }

    ReplayResult run(const ReplayCancelled& cancelled) {
        ReplayResult result;
        TraceRecord record;
        bool ended = false;
        while (!ended && error_.empty() && reader_.next(&record)) {
            log_.time(record, false);
            ended = record.kind == TraceKind::kEnd;
            if (record.kind == TraceKind::kPass) {
                end_round();
                begin_pass(static_cast<uint32_t>(record.argument));
                error_ = cancelled() ? "cancelled" : "";
            } else if (record.kind == TraceKind::kBegin || record.kind == TraceKind::kBeginMixed) {
                round(record);
            }
        }
        end_round();
        log_.end(tables_.total());
        result.error = error_.empty() ? reader_.error() : error_;
        result.cut_off = !ended;
        if (result.error.empty()) {
            tables_.finish(&result);
        }
        result.passes = log_.take();
        for (size_t i = model_.count_from; i < result.passes.size(); i++) {
            const ReplayPass& pass = result.passes[i];
            if (pass.token_count <= model_.decode_tokens) {
                result.decode.passes++;
                result.decode.asked_bytes += pass.counts.asked_bytes;
                result.decode.read_bytes += pass.counts.read_bytes;
            }
        }
        return result;
    }

private:
    enum class Part : uint8_t { kWaiting, kHeld, kDone };
    struct Ask {
        uint32_t stride;
        uint32_t token_count;
        Part part;
    };

    void begin_pass(uint32_t token_count) {
        log_.begin(token_count, tables_.total());
        tables_.begin_pass(token_count);
        if (log_.count() == model_.count_from + 1) {
            tables_.forget_counts();
            log_.restart();
        }
    }

    // What the ops of a begin ask for. Waves of the record are its own; this cache makes others.
    void round(const TraceRecord& record) {
        std::vector<Ask> asks;
        for (const TraceRecord::Use& use : record.uses) {
            if (!use.again) {
                asks.push_back({use.stride, use.token_count, Part::kWaiting});
            }
        }
        if (asks.empty()) {
            return;
        }
        end_round();
        asks_ = std::move(asks);
        ask(0, asks_.size());
        for (size_t first = first_waiting(); first < asks_.size() && error_.empty(); first = first_waiting()) {
            wave(first);
        }
    }

    size_t first_waiting() const {
        size_t i = 0;
        while (i < asks_.size() && asks_[i].part != Part::kWaiting) {
            i++;
        }
        return i;
    }

    // As Computer::next_wave, an op at a time: gives back what is computed and asks for the rest of the op.
    void wave(size_t first) {
        size_t behind = first;
        while (behind < asks_.size() && tables_.op(asks_[behind].stride) == tables_.op(asks_[first].stride)) {
            behind++;
        }
        release(0, behind, Part::kDone);
        if (ask(first, behind) == 0) {
            release(behind, asks_.size(), Part::kWaiting);
            if (ask(first, behind) == 0) {
                error_ = "a class has no slot that an op could use";
            }
        }
    }

    // As Stream::begin; every read is done at once. How many were given a slot.
    size_t ask(size_t from, size_t to) {
        std::vector<size_t> given;
        for (Table& table : tables_.all()) {
            table.full = false;
        }
        for (size_t i = from; i < to; i++) {
            bool present = tables_.state(asks_[i].stride) != StrideState::kAbsent;
            if (asks_[i].part == Part::kWaiting && present) {
                hold(i);
            }
        }
        for (size_t i = from; i < to; i++) {
            Table& table = tables_.of(asks_[i].stride);
            if (asks_[i].part == Part::kWaiting && !table.full) {
                bool present = tables_.state(asks_[i].stride) != StrideState::kAbsent;
                if (present || tables_.admit(asks_[i].stride, Purpose::kDemand)) {
                    hold(i);
                } else {
                    table.full = true;
                }
            }
            if (asks_[i].part == Part::kHeld) {
                given.push_back(i);
            }
        }
        for (size_t i : given) {
            tables_.use(asks_[i].stride, asks_[i].token_count);
        }
        for (size_t i : given) {
            if (tables_.state(asks_[i].stride) == StrideState::kReading) {
                tables_.complete(asks_[i].stride);
            }
        }
        note_order(given);
        return given.size();
    }

    void hold(size_t i) {
        tables_.pin(asks_[i].stride);
        asks_[i].part = Part::kHeld;
    }

    void release(size_t from, size_t to, Part part) {
        for (size_t i = from; i < to; i++) {
            if (asks_[i].part == Part::kHeld) {
                tables_.unpin(asks_[i].stride);
                asks_[i].part = part;
            }
        }
        look_ahead();
    }

    void end_round() {
        if (!asks_.empty()) {
            release(0, asks_.size(), Part::kDone);
            asks_.clear();
        }
    }

    // As Stream::note_order and Stream::look_ahead.
    void note_order(const std::vector<size_t>& given) {
        for (size_t i : given) {
            uint32_t stride = asks_[i].stride;
            bool noted = model_.lookahead_strides > 0 && tables_.of(stride).cyclic;
            if (noted && order_.note(stride) == CyclicOrder::Noted::kUnexpected) {
                tables_.abandon();
            }
        }
        look_ahead();
    }

    void look_ahead() {
        if (model_.lookahead_strides == 0 || !order_.learned()) {
            return;
        }
        for (Table& table : tables_.all()) {
            table.full = false;
        }
        uint32_t distance = std::min(model_.lookahead_strides, order_.length() - 1);
        for (uint32_t i = 1; i <= distance; i++) {
            uint32_t stride = order_.ahead(i);
            Table& table = tables_.of(stride);
            if (table.full || tables_.state(stride) != StrideState::kAbsent) {
                continue;
            }
            if (tables_.admit(stride, Purpose::kPrefetch)) {
                tables_.complete(stride);
            } else {
                table.full = true;
            }
        }
    }

    Tables tables_;
    const ReplayModel model_;
    TraceReader reader_;
    CyclicOrder order_;
    std::vector<Ask> asks_;
    PassLog log_;
    std::string error_;
};

// ---- optimum

// The uses of one class in their order, each once however many waves it took.
struct Uses {
    std::vector<uint32_t> strides;
    std::vector<uint8_t> decoding; // of each: in a step of decoding that counts
    size_t count_from = 0;
};

ReplayCounts optimum_of(const Uses& uses, uint32_t slot_count, uint64_t stride_bytes, ReplayDecode* decode) {
    const size_t never = uses.strides.size();
    uint32_t stride_count = 0;
    for (uint32_t stride : uses.strides) {
        stride_count = std::max(stride_count, stride + 1);
    }
    std::vector<size_t> next(uses.strides.size());
    std::vector<size_t> seen(stride_count, never);
    for (size_t i = uses.strides.size(); i-- > 0;) {
        next[i] = seen[uses.strides[i]];
        seen[uses.strides[i]] = i;
    }
    const size_t absent = SIZE_MAX;
    std::vector<size_t> resident(stride_count, absent);     // its next use
    std::priority_queue<std::pair<size_t, uint32_t>> later; // (next use, stride); outdated entries stay until they surface
    uint32_t held = 0;
    ReplayCounts counts;
    for (size_t i = 0; i < uses.strides.size(); i++) {
        uint32_t stride = uses.strides[i];
        bool counted = i >= uses.count_from;
        bool hit = resident[stride] != absent;
        counts.hits += counted && hit ? 1 : 0;
        counts.misses += counted && !hit ? 1 : 0;
        decode->asked_bytes += uses.decoding[i] ? stride_bytes : 0;
        decode->read_bytes += uses.decoding[i] && !hit ? stride_bytes : 0;
        if (!hit && held == slot_count) {
            while (resident[later.top().second] != later.top().first) {
                later.pop();
            }
            if (later.top().first <= next[i]) {
                counts.evictions += counted ? 1 : 0;
                continue; // it passes through: whatever is kept is used sooner
            }
            resident[later.top().second] = absent;
            later.pop();
            counts.evictions += counted ? 1 : 0;
        } else {
            held += hit ? 0 : 1;
        }
        resident[stride] = next[i];
        later.push({next[i], stride});
    }
    counts.reads = counts.misses;
    counts.asked_bytes = (counts.hits + counts.misses) * stride_bytes;
    counts.read_bytes = counts.reads * stride_bytes;
    return counts;
}

} // namespace

ReplayResult replay_verbatim(Span<const uint8_t> records, const ReplayShape& shape,
                             const std::vector<ReplayClass>& classes, const ReplayCancelled& cancelled) {
    return Verbatim(records, shape, classes).run(cancelled);
}

ReplayResult replay_model(Span<const uint8_t> records, const ReplayShape& shape,
                          const std::vector<ReplayClass>& classes, const ReplayModel& model,
                          const ReplayCancelled& cancelled) {
    return Model(records, shape, classes, model).run(cancelled);
}

ReplayResult replay_optimum(Span<const uint8_t> records, const ReplayShape& shape,
                            const std::vector<ReplayClass>& classes, const ReplayModel& model,
                            const ReplayCancelled& cancelled) {
    ReplayResult result;
    TraceReader reader(records, static_cast<uint32_t>(shape.class_of.size()), static_cast<uint32_t>(classes.size()));
    TraceRecord record;
    std::vector<Uses> uses(classes.size());
    uint32_t passes = 0;
    bool decoding = false;
    bool ended = false;
    while (!ended && result.error.empty() && reader.next(&record)) {
        ended = record.kind == TraceKind::kEnd;
        if (record.kind == TraceKind::kPass) {
            decoding = passes >= model.count_from && record.argument <= model.decode_tokens;
            result.decode.passes += decoding ? 1 : 0;
            if (passes++ == model.count_from) {
                for (Uses& one : uses) {
                    one.count_from = one.strides.size();
                }
            }
            result.error = cancelled() ? "cancelled" : "";
        }
        for (const TraceRecord::Use& use : record.uses) {
            if (!use.again) {
                Uses& into = uses[shape.class_of[use.stride]];
                into.strides.push_back(use.stride);
                into.decoding.push_back(decoding ? 1 : 0);
            }
        }
    }
    result.error = result.error.empty() ? reader.error() : result.error;
    result.cut_off = !ended;
    for (uint32_t c = 0; c < classes.size() && result.error.empty(); c++) {
        result.classes.push_back(optimum_of(uses[c], classes[c].slot_count, shape.stride_bytes[c], &result.decode));
    }
    return result;
}

std::vector<uint64_t> count_uses(Span<const uint8_t> records, const ReplayShape& shape, PassRange passes,
                                 std::string* error) {
    TraceReader reader(records, static_cast<uint32_t>(shape.class_of.size()),
                       static_cast<uint32_t>(shape.stride_bytes.size()));
    TraceRecord record;
    std::vector<uint64_t> counts(shape.class_of.size());
    uint32_t pass = 0;
    while (reader.next(&record)) {
        pass += record.kind == TraceKind::kPass ? 1 : 0;
        bool inside = pass > passes.first && pass <= passes.end;
        for (const TraceRecord::Use& use : record.uses) {
            counts[use.stride] += inside && !use.again ? use.token_count : 0;
        }
    }
    *error = reader.error();
    return counts;
}

} // namespace hypura

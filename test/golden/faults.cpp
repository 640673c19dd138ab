// hypura-faults PLAN.json TOKENS COUNT RUNS SEED: under any read fault, is an answer right or an error?
//
// One engine with a streaming plan, whose reads go through a layer that fails on demand. First the reference answer;
// then RUNS generations, each under a fault drawn from the seed: short reads, EINTR, EAGAIN, EIO at the k-th read, a
// file that ends early, that shrank, that was replaced, slow reads, reordered completions. Each must give the
// reference's tokens or an error event that names the file and an offset, and the next fault-free generation must be
// right. Prints one JSON line with the tally; exit status 0 when nothing was wrong.
#include "../../ffi/native/engine.h"
#include "../native/fake_background.h"

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <unistd.h>

namespace {

using hypura::FilePlace;
using hypura::ReadSource;
using hypura::Span;
using hypura::platform::Access;

enum Fault { kNone, kShort, kInterrupted, kAgain, kIoOnce, kIoAlways, kEndsEarly, kShrank, kReplaced, kSlow, kReordered, kCount };

const char * const fault_names[] = {"none",      "short",      "eintr",  "eagain",   "eio-once", "eio",
                                    "ends-early", "shrank", "replaced", "slow", "reordered"};

// What the faulty layer does; set between generations.
struct Mischief {
    std::atomic<int> fault{kNone};
    std::atomic<uint64_t> at{0};   // the k-th read, or the k-th permille of the file
    std::atomic<uint64_t> reads{0};
    std::atomic<uint64_t> seed{0};
};

class FaultySource final : public ReadSource {
public:
    FaultySource(ReadSource & files, Mischief & mischief) : files_(files), mischief_(mischief) {}
    bool has_direct(uint32_t file) const override { return files_.has_direct(file); }
    const char * path(uint32_t file) const override { return files_.path(file); }
    void drop_cached(uint32_t file, hypura::platform::FileRange range) override { files_.drop_cached(file, range); }
    int64_t bytes_now(uint32_t file) override {
        return mischief_.fault == kShrank ? files_.bytes_now(file) * static_cast<int64_t>(mischief_.at % 1000) / 1000
                                          : files_.bytes_now(file);
    }
    std::unique_ptr<hypura::BackgroundReads> background_reads(uint32_t depth) override {
        return std::make_unique<FakeBackground>(*this, FakeBackground::Options{depth, mix(mischief_.seed), [] { return false; }, {}});
    }
    bool unchanged(uint32_t file) override { return mischief_.fault != kReplaced && files_.unchanged(file); }

    int64_t read(FilePlace place, Access access, Span<std::byte> into) override {
        const uint64_t k = mischief_.reads++;
        const uint64_t dice = mix(k ^ mischief_.seed);
        switch (mischief_.fault) {
            case kShort: { // direct reads come short in whole blocks
                const uint32_t blocks = into.count / 4096;
                const uint32_t bytes = access == Access::kDirect && blocks > 1 ? (1 + dice % blocks) * 4096 : into.count;
                return files_.read(place, access, {into.data, std::min(bytes, into.count)});
            }
            case kInterrupted:
                return dice % 3 == 0 ? -EINTR : files_.read(place, access, into);
            case kAgain:
                return dice % 3 == 0 ? -EAGAIN : files_.read(place, access, into);
            case kIoOnce:
                return k == mischief_.at ? -EIO : files_.read(place, access, into);
            case kIoAlways:
                return k >= mischief_.at ? -EIO : files_.read(place, access, into);
            case kEndsEarly: {
                const auto end = static_cast<uint64_t>(files_.bytes_now(place.file_index)) * (mischief_.at % 1000) / 1000;
                if (place.offset >= end) {
                    return 0;
                }
                const int64_t n = files_.read(place, access, into);
                return n < 0 ? n : std::min<int64_t>(n, static_cast<int64_t>(end - place.offset) / 4096 * 4096);
            }
            case kShrank:
                if (place.offset >= static_cast<uint64_t>(bytes_now(place.file_index))) {
                    return 0;
                }
                return files_.read(place, access, into);
            case kSlow:
                hypura::platform::sleep_ns(dice % 4 == 0 ? 2'000'000 : 0);
                return files_.read(place, access, into);
            case kReordered:
                hypura::platform::sleep_ns(dice % 300'000);
                return files_.read(place, access, into);
            default:
                return files_.read(place, access, into);
        }
    }

private:
    static uint64_t mix(uint64_t x) { // splitmix64
        x += 0x9E3779B97F4A7C15;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        return x ^ (x >> 31);
    }
    ReadSource & files_;
    Mischief & mischief_;
};

std::string read_until(int fd, const char * what) {
    std::string all;
    char c;
    for (size_t line = 0; read(fd, &c, 1) == 1;) {
        all.push_back(c);
        if (c == '\n') {
            if (what != nullptr && all.find(what, line) != std::string::npos) {
                break;
            }
            line = all.size();
        }
    }
    return all;
}

// The tokens of the answer as text, or the error event's line; empty for an answer that was cut off.
std::string generate(hypura::Engine & engine, const std::string & body) {
    const hypura::EventPair pair = hypura::make_event_pair();
    engine.request("POST /completion", body, pair.ours);
    const std::string all = read_until(pair.theirs, nullptr);
    close(pair.theirs);
    const size_t error = all.find("{\"event\":\"error\"");
    if (error != std::string::npos) {
        return all.substr(error);
    }
    const size_t tokens = all.find("\"tokens\":[");
    if (all.find("\"event\":\"end\"") == std::string::npos || tokens == std::string::npos) {
        return "";
    }
    return all.substr(tokens, all.find(']', tokens) - tokens);
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: hypura-faults PLAN.json 1,2,3 COUNT RUNS SEED\n");
        return 2;
    }
    std::ifstream file(argv[1]);
    std::stringstream text;
    text << file.rdbuf();
    const hypura::OpenPlan plan = hypura::parse_plan(text.str());
    const int runs = std::stoi(argv[4]);
    std::mt19937_64 random(std::stoull(argv[5]));

    Mischief mischief;
    hypura::EngineSeams seams;
    seams.wrap_source = [&](ReadSource & files) { return std::make_unique<FaultySource>(files, mischief); };
    std::mutex mutex;
    std::condition_variable changed;
    bool closed = false;
    const hypura::EventPair life = hypura::make_event_pair();
    auto engine = hypura::Engine::start(plan, life.ours, [&] {
        std::lock_guard<std::mutex> lock(mutex);
        closed = true;
        changed.notify_all();
    }, std::move(seams));
    const std::string opened = read_until(life.theirs, "\"event\":\"ready\"");
    if (opened.find("\"event\":\"ready\"") == std::string::npos) {
        fprintf(stderr, "the engine did not open: %s\n", opened.c_str());
        return 2;
    }

    const std::string body = std::string("{\"prompt\":[") + argv[2] + "],\"n_predict\":" + argv[3] +
                             ",\"temperature\":0,\"cache_prompt\":false,\"return_tokens\":true,\"stream\":false,\"ignore_eos\":true}";
    const std::string reference = generate(*engine, body);
    const uint64_t reads_per_run = mischief.reads;
    int equal = 0, errors = 0, wrong = 0;
    std::map<int, std::pair<int, int>> by_fault; // answers, errors
    for (int run = 0; run < runs && wrong == 0; ++run) {
        const int fault = 1 + static_cast<int>(random() % (kCount - 1));
        mischief.seed = random();
        mischief.at = random() % (fault == kIoOnce || fault == kIoAlways ? reads_per_run + 1 : 1000);
        mischief.reads = 0;
        mischief.fault = fault;
        const std::string answer = generate(*engine, body);
        mischief.fault = kNone;
        const bool names_place = answer.find(plan.files.front().path) != std::string::npos &&
                                 answer.find("offset") != std::string::npos;
        if (answer == reference) {
            ++equal;
            by_fault[fault].first++;
        } else if (answer.rfind("{\"event\":\"error\"", 0) == 0 && names_place) {
            ++errors;
            by_fault[fault].second++;
        } else {
            ++wrong;
            fprintf(stderr, "run %d, fault %s: %s\n", run, fault_names[fault], answer.c_str());
        }
        const std::string next = generate(*engine, body);
        if (next != reference) {
            ++wrong;
            fprintf(stderr, "run %d, after fault %s the next answer is: %s\n", run, fault_names[fault], next.c_str());
        }
    }
    engine->close();
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return closed; });
    printf("{\"runs\":%d,\"equal\":%d,\"errors\":%d,\"wrong\":%d", runs, equal, errors, wrong);
    for (const auto & [fault, tally] : by_fault) {
        printf(",\"%s\":[%d,%d]", fault_names[fault], tally.first, tally.second);
    }
    printf("}\n");
    return wrong == 0 && reference.rfind("\"tokens\":[", 0) == 0 ? 0 : 1;
}

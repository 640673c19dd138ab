// hypura-logits PLAN.json TOKENS COUNT [opaque]: are the engine's logits, bit for bit, those of a plain libllama program?
//
// The same process runs one greedy generation twice: through hypura's engine (server core, plan, events), with
// llama_get_logits_ith wrapped by the linker to copy every row the core samples from; then as a plain program over
// llama.h, resident and with the plan's numbers. The rows are compared with memcmp. The core exposes no logits, which
// is why this is a program and not a test through the ABI. `opaque` computes streamed weights through a delegate whose
// memory is not the host's. Prints one JSON line; exit status 0 when all are equal.
#include "../../ffi/native/engine.h"
#include "opaque_delegate.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

using Row = std::vector<float>;

bool recording = false;
std::vector<Row> engine_rows;

} // namespace

extern "C" float * __real_llama_get_logits_ith(llama_context * ctx, int32_t i);

extern "C" float * __wrap_llama_get_logits_ith(llama_context * ctx, int32_t i) {
    float * row = __real_llama_get_logits_ith(ctx, i);
    if (recording && row != nullptr) {
        const int32_t n = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        engine_rows.emplace_back(row, row + n);
    }
    return row;
}

namespace {

std::string read_all(int fd) {
    std::string all;
    char buffer[65536];
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) {
        all.append(buffer, static_cast<size_t>(n));
    }
    return all;
}

// Reads events until a line holds `what`; the lines read so far otherwise.
std::string read_until(int fd, const char * what) {
    std::string all;
    char c;
    size_t line = 0;
    while (read(fd, &c, 1) == 1) {
        all.push_back(c);
        if (c == '\n') {
            if (all.find(what, line) != std::string::npos) {
                break;
            }
            line = all.size();
        }
    }
    return all;
}

bool run_engine(const hypura::OpenPlan & plan, const std::string & tokens, int count, hypura::EngineSeams seams) {
    std::mutex mutex;
    std::condition_variable closed;
    bool is_closed = false;
    const hypura::EventPair life = hypura::make_event_pair();
    auto engine = hypura::Engine::start(plan, life.ours, [&] {
        std::lock_guard<std::mutex> lock(mutex);
        is_closed = true;
        closed.notify_all();
    }, std::move(seams));
    const std::string opened = read_until(life.theirs, "\"event\":\"ready\"");
    if (opened.find("\"event\":\"ready\"") == std::string::npos) {
        fprintf(stderr, "the engine did not open: %s\n", opened.c_str());
        return false;
    }
    const hypura::EventPair request = hypura::make_event_pair();
    recording = true;
    engine->request("POST /completion",
                    "{\"prompt\":[" + tokens + "],\"n_predict\":" + std::to_string(count) +
                        ",\"temperature\":0,\"cache_prompt\":false,\"stream\":true,\"ignore_eos\":true}",
                    request.ours);
    const std::string answer = read_all(request.theirs);
    recording = false;
    engine->close();
    std::unique_lock<std::mutex> lock(mutex);
    closed.wait(lock, [&] { return is_closed; });
    close(life.theirs);
    close(request.theirs);
    if (answer.find("\"event\":\"end\"") == std::string::npos) {
        fprintf(stderr, "the engine's answer has no end: %s\n", answer.c_str());
        return false;
    }
    return true;
}

// The likeliest token that does not end the text: the request says ignore_eos.
llama_token argmax(const llama_vocab * vocab, const Row & row) {
    llama_token best = LLAMA_TOKEN_NULL;
    for (size_t i = 0; i < row.size(); ++i) {
        const auto token = static_cast<llama_token>(i);
        if (!llama_vocab_is_eog(vocab, token) && (best == LLAMA_TOKEN_NULL || row[i] > row[static_cast<size_t>(best)])) {
            best = token;
        }
    }
    return best;
}

std::vector<Row> run_plain(const hypura::OpenPlan & plan, std::vector<llama_token> tokens, int count) {
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = static_cast<int32_t>(plan.gpu_layers);
    mparams.use_extra_bufts = plan.repack;
    llama_model * model = llama_model_load_from_file(plan.files.front().path.c_str(), mparams);
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = plan.context_tokens * plan.slot_count;
    cparams.n_seq_max = plan.slot_count;
    cparams.n_batch = plan.batch_tokens;
    cparams.n_ubatch = plan.ubatch_tokens;
    cparams.n_threads = static_cast<int32_t>(plan.decode_threads);
    cparams.n_threads_batch = static_cast<int32_t>(plan.prefill_threads);
    cparams.swa_full = false;
    llama_context * ctx = llama_init_from_model(model, cparams);
    const int32_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<Row> rows;
    for (int step = 0; step < count; ++step) {
        for (size_t at = 0; at < tokens.size(); at += plan.batch_tokens) {
            const size_t n = std::min<size_t>(plan.batch_tokens, tokens.size() - at);
            if (llama_decode(ctx, llama_batch_get_one(tokens.data() + at, static_cast<int32_t>(n))) != 0) {
                fprintf(stderr, "llama_decode failed in the plain program\n");
                exit(2);
            }
        }
        const float * row = llama_get_logits_ith(ctx, -1);
        rows.emplace_back(row, row + vocab);
        tokens = {argmax(llama_model_get_vocab(model), rows.back())};
    }
    llama_free(ctx);
    llama_model_free(model);
    return rows;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 4 && argc != 5) {
        fprintf(stderr, "usage: hypura-logits PLAN.json 1,2,3 COUNT [opaque]\n");
        return 2;
    }
    hypura::EngineSeams seams;
    if (argc == 5) {
        seams.make_delegate = hypura::make_opaque_delegate;
    }
    std::ifstream file(argv[1]);
    std::stringstream text;
    text << file.rdbuf();
    const hypura::OpenPlan plan = hypura::parse_plan(text.str());
    std::vector<llama_token> tokens;
    std::stringstream list(argv[2]);
    for (std::string token; std::getline(list, token, ',');) {
        tokens.push_back(std::stoi(token));
    }
    const int count = std::stoi(argv[3]);
    if (!run_engine(plan, argv[2], count, std::move(seams))) {
        return 2;
    }
    const std::vector<Row> plain = run_plain(plan, tokens, count);
    size_t equal = 0;
    while (equal < plain.size() && equal < engine_rows.size() && plain[equal].size() == engine_rows[equal].size() &&
           memcmp(plain[equal].data(), engine_rows[equal].data(), plain[equal].size() * sizeof(float)) == 0) {
        ++equal;
    }
    if (equal < plain.size() && equal < engine_rows.size()) {
        double largest = 0;
        double scale = 0;
        for (size_t i = 0; i < plain[equal].size(); ++i) {
            largest = std::max(largest, static_cast<double>(std::abs(plain[equal][i] - engine_rows[equal][i])));
            scale = std::max(scale, static_cast<double>(std::abs(plain[equal][i])));
        }
        fprintf(stderr, "step %zu differs by up to %g, where the largest logit is %g\n", equal, largest, scale);
    }
    const bool all = equal == plain.size() && engine_rows.size() == plain.size();
    printf("{\"steps\":%zu,\"engineSteps\":%zu,\"equalSteps\":%zu,\"vocabTokens\":%zu}\n", plain.size(),
           engine_rows.size(), equal, plain.empty() ? 0 : plain[0].size());
    return all ? 0 : 1;
}

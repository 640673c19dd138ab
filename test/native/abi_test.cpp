// hypura-abi PLAN.json: the engine through hypura.h alone, as another language sees it. Good answers, readers that
// leave at random moments, documents that are none, ids that are none, and no descriptors left. Built plain for the
// test and with sanitizers for the soak; llama.cpp itself is never instrumented.
#include "../../ffi/hypura.h"

#include "check.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <dirent.h>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <sys/resource.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

int64_t open_plan(const std::string & plan, int32_t * fd) {
    return hy_open(reinterpret_cast<const uint8_t *>(plan.data()), plan.size(), fd);
}

int32_t request(int64_t engine, const char * route, const std::string & body) {
    return hy_request(engine, route, reinterpret_cast<const uint8_t *>(body.data()), body.size());
}

std::string read_all(int fd) {
    std::string all;
    char buffer[4096];
    for (;;) {
        const ssize_t n = read(fd, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return all;
        }
        all.append(buffer, static_cast<size_t>(n));
    }
}

// The answer to a request that is taken; its descriptor is closed.
std::string answer(int64_t engine, const char * route, const std::string & body) {
    const int32_t fd = request(engine, route, body);
    CHECK(fd >= 0);
    std::string all = read_all(fd);
    CHECK(close(fd) == 0);
    CHECK(!all.empty() && all.back() == '\n');
    return all;
}

bool has(const std::string & text, const char * what) {
    return text.find(what) != std::string::npos;
}

// The texts of an answer's chunks, still escaped; all else in a chunk may differ from run to run.
std::string text_of(const std::string & events) {
    const std::string key = "\"content\":\"";
    std::string text;
    for (size_t at = events.find(key); at != std::string::npos; at = events.find(key, at)) {
        at += key.size();
        size_t end = at;
        while (end < events.size() && events[end] != '"') {
            end += events[end] == '\\' ? 2 : 1;
        }
        text += events.substr(at, end - at) + "|";
    }
    return text;
}

// Reads lines up to one that holds `what`.
void read_until(int fd, const char * what) {
    std::string line;
    char c;
    while (read(fd, &c, 1) == 1) {
        if (c != '\n') {
            line.push_back(c);
        } else if (has(line, what)) {
            return;
        } else {
            line.clear();
        }
    }
    CHECK(!"the stream ended before the line that was waited for");
}

template <typename Condition> void wait_for(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!condition()) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

#if defined(__linux__)
size_t count_descriptors() {
    size_t count = 0;
    DIR * folder = opendir("/proc/self/fd");
    CHECK(folder != nullptr);
    while (readdir(folder) != nullptr) {
        ++count;
    }
    closedir(folder);
    return count;
}
#else
size_t count_descriptors() {
    return 0; // only Linux lists them
}
#endif

const char * const COMPLETION = "POST /completion";

std::string completion(int tokens, const char * more) {
    return "{\"prompt\":[5,40,77,114],\"n_predict\":" + std::to_string(tokens) +
           ",\"temperature\":0,\"ignore_eos\":true,\"cache_prompt\":false,\"stream\":true" + more + "}";
}

void refuse_what_is_no_plan(const std::string & plan) {
    std::vector<std::string> documents = {"", "{", "[]", "null", "{}", "7", "\"plan\"", "\xff\xfe", std::string("\0\0", 2)};
    for (size_t part = 1; part < 8; ++part) {
        documents.push_back(plan.substr(0, plan.size() * part / 8));
    }
    for (const std::string & document : documents) {
        int32_t fd = -7;
        CHECK(open_plan(document, &fd) == HY_E_JSON);
        CHECK(fd == -7); // nothing was given out
    }
    int32_t fd = -7;
    CHECK(hy_open(nullptr, 0, &fd) == HY_E_JSON);
}

void refuse_what_is_no_engine() {
    for (const int64_t id : {int64_t{0}, int64_t{-1}, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
        CHECK(request(id, COMPLETION, "{}") == HY_E_HANDLE);
        CHECK(hy_active_requests(id) == HY_E_HANDLE);
        CHECK(hy_close(id) == 0);
    }
}

void refuse_what_is_no_request(int64_t engine) {
    const std::string deep = std::string(2000, '[') + std::string(2000, ']');
    for (const std::string & body : std::vector<std::string>{"", "{", "nul", "\xff\xfe", "[1,2", "{}", "[]", "7", deep,
                                                             "{\"prompt\":7}", "{\"prompt\":[-1]}",
                                                             "{\"prompt\":[99999999]}", std::string("{\0}", 3)}) {
        const std::string events = answer(engine, COMPLETION, body);
        CHECK(has(events, "{\"event\":\"error\",\"status\":400,"));
        CHECK(!has(events, "\"event\":\"end\""));
    }
    const int32_t fd = hy_request(engine, COMPLETION, nullptr, 0);
    CHECK(fd >= 0);
    CHECK(has(read_all(fd), "\"status\":400,"));
    close(fd);
    for (const char * route : {"", "POST", "POST /nowhere", "POST /completion/", "\xff", "GET /completion?a=b&c"}) {
        CHECK(has(answer(engine, route, "{}"), "\"status\":404,"));
    }
}

// As many readers as leave in the middle; each has read something or nothing.
void leave_at_random(int64_t engine) {
    std::mt19937 random(1);
    std::vector<int32_t> open;
    for (int i = 0; i < 100; ++i) {
        const int32_t fd = request(engine, COMPLETION, completion(200, random() % 4 == 0 ? ",\"top_k\":3" : ""));
        CHECK(fd >= 0);
        open.push_back(fd);
        if (random() % 2 == 0) {
            std::vector<char> some(1 + random() % 600);
            CHECK(read(fd, some.data(), some.size()) > 0);
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
        }
        while (open.size() > random() % 6) {
            close(open.back());
            open.pop_back();
        }
    }
    for (const int32_t fd : open) {
        close(fd);
    }
    wait_for([&] { return hy_active_requests(engine) == 0; });
}

void run_out_of_descriptors(int64_t engine, const std::string & plan) {
    rlimit before{};
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    const int lowest = dup(0); // the lowest free number: nothing at or above it may be opened
    close(lowest);
    rlimit none = before;
    none.rlim_cur = static_cast<rlim_t>(lowest);
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    int32_t fd = -7;
    CHECK(request(engine, COMPLETION, "{}") == HY_E_DESCRIPTOR);
    CHECK(open_plan(plan, &fd) == HY_E_DESCRIPTOR);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK(hy_active_requests(engine) == 0);
}

void live_once(const std::string & plan) {
    int32_t life = -1;
    const int64_t engine = open_plan(plan, &life);
    CHECK(engine >= 1 && life >= 0);
    const int32_t early = request(engine, COMPLETION, completion(1, ""));
    if (early >= 0) { // an error event while it loads, an answer when it has loaded by now
        CHECK(!read_all(early).empty());
        close(early);
    }
    read_until(life, "\"event\":\"ready\"");

    const std::string right = answer(engine, COMPLETION, completion(20, ""));
    CHECK(has(right, "\"event\":\"end\""));
    CHECK(has(answer(engine, "POST /tokenize", "{\"content\":\"hello\"}"), "\"tokens\""));
    CHECK(has(answer(engine, "GET /streaming", ""), "\"event\":\"end\""));
    refuse_what_is_no_request(engine);
    leave_at_random(engine);
    run_out_of_descriptors(engine, plan);
    const std::string again = answer(engine, COMPLETION, completion(20, ""));
    CHECK(text_of(right).size() > 20);
    CHECK(text_of(again) == text_of(right));

    // The end, with requests inside: each is cut off, and the engine still says its last word.
    std::vector<int32_t> running;
    for (int i = 0; i < 4; ++i) {
        running.push_back(request(engine, COMPLETION, completion(400, "")));
        CHECK(running.back() >= 0);
    }
    CHECK(hy_close(engine) == 0);
    CHECK(hy_close(engine) == 0);
    const int32_t late = request(engine, COMPLETION, completion(1, ""));
    if (late >= 0) {
        CHECK(has(read_all(late), "\"status\":503,"));
        close(late);
    } else {
        CHECK(late == HY_E_HANDLE);
    }
    read_until(life, "\"event\":\"closed\"");
    CHECK(read_all(life).empty());
    for (const int32_t fd : running) {
        CHECK(!has(read_all(fd), "\"event\":\"end\""));
        close(fd);
    }
    close(life);
    wait_for([&] { return hy_active_requests(engine) == HY_E_HANDLE; });
    CHECK(hy_close(engine) == 0);
    CHECK(request(engine, COMPLETION, "{}") == HY_E_HANDLE);
}

// Closed before it has loaded.
void close_at_once(const std::string & plan) {
    int32_t life = -1;
    const int64_t engine = open_plan(plan, &life);
    CHECK(engine >= 1);
    CHECK(hy_close(engine) == 0);
    CHECK(has(read_all(life), "\"event\":\"closed\""));
    close(life);
    wait_for([&] { return hy_active_requests(engine) == HY_E_HANDLE; });
}

// Nobody reads what the engine says of itself.
void leave_before_it_has_loaded(const std::string & plan) {
    int32_t life = -1;
    const int64_t engine = open_plan(plan, &life);
    CHECK(engine >= 1);
    close(life);
    CHECK(hy_close(engine) == 0);
    wait_for([&] { return hy_active_requests(engine) == HY_E_HANDLE; });
}

int32_t task(const char * name, const std::string & json) {
    return hy_task(name, reinterpret_cast<const uint8_t *>(json.data()), json.size());
}

std::string task_answer(const char * name, const std::string & json) {
    const int32_t fd = task(name, json);
    CHECK(fd >= 0);
    std::string all = read_all(fd);
    CHECK(close(fd) == 0);
    return all;
}

const char * const LONG_COPY = "{\"threads\":2,\"bufferBytes\":8388608,\"durationNs\":60000000000}";

// Work without an engine: answers, documents that are none, and readers that leave.
void tasks() {
    CHECK(has(task_answer("devices", "{}"), "\"type\":\"cpu\""));
    const std::string copied = task_answer("copy", "{\"threads\":2,\"bufferBytes\":1048576,\"durationNs\":0}");
    CHECK(has(copied, "{\"event\":\"data\",\"data\":{\"bytes\":") && has(copied, "{\"event\":\"end\"}\n"));
    const std::string absent = task_answer(
        "scratch", "{\"path\":\"/no/such/folder/x\",\"sizeBytes\":4096,\"chunkBytes\":4096,\"durationNs\":1}");
    CHECK(has(absent, "\"event\":\"error\",\"status\":500") && !has(absent, "\"event\":\"end\""));
    CHECK(task("", "{}") == HY_E_JSON);
    CHECK(task("device", "{}") == HY_E_JSON);
    for (const char * json : {"", "{", "[]", "7", "{}", "{\"threads\":0,\"bufferBytes\":4096,\"durationNs\":1}",
                              "{\"threads\":1,\"bufferBytes\":-1,\"durationNs\":1}",
                              "{\"threads\":1e9,\"bufferBytes\":4096,\"durationNs\":1}",
                              "{\"threads\":\"1\",\"bufferBytes\":4096,\"durationNs\":1}"}) {
        CHECK(task("copy", json) == HY_E_JSON);
    }
    const size_t before = count_descriptors();
    for (int i = 0; i < 8; ++i) {
        const int32_t fd = task("copy", LONG_COPY);
        CHECK(fd >= 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(i));
        close(fd);
    }
    wait_for([&] { return count_descriptors() == before; }); // each has ended, far before its minute
}

} // namespace

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    std::ifstream file(argv[1]);
    std::stringstream text;
    text << file.rdbuf();
    const std::string plan = text.str();

    CHECK(hy_abi_version() == HY_ABI_VERSION);
    CHECK(has(hy_build_info(), "\"llama\""));
    CHECK(hy_build_info() == hy_build_info()); // one text for the life of the process
    refuse_what_is_no_plan(plan);
    refuse_what_is_no_engine();
    tasks();
    live_once(plan);
    const size_t before = count_descriptors();
    for (int i = 0; i < 2; ++i) {
        close_at_once(plan);
        leave_before_it_has_loaded(plan);
        live_once(plan);
    }
    CHECK(count_descriptors() == before);
    printf("right\n");
    return 0;
}

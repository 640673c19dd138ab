// abi.cpp - hypura.h's functions: parse, catch everything, return codes. No logic.
//
// Owns the table of engines, and with it their lifetime: an engine leaves the table on its own thread when it has
// closed, so that no call here ever waits for one.
#include "../hypura.h"

#include "engine.h"
#include "events.h"
#include "tasks.h"

#include <functional>
#include <map>
#include <string>
#include <system_error>
#include <utility>
#include <unistd.h>

namespace {

// More than one is for tests and for the moment between two models; each holds a model's memory.
constexpr size_t MAX_ENGINES = 16;

struct Table {
    std::mutex mutex;
    std::map<int64_t, std::unique_ptr<hypura::Engine>> engines;
    int64_t next_id = 1;
};

Table & table() {
    static auto * t = new Table; // never destroyed: engine threads may outlive main
    return *t;
}

void forget(int64_t id) {
    std::unique_ptr<hypura::Engine> last;
    std::lock_guard<std::mutex> lock(table().mutex);
    const auto it = table().engines.find(id);
    if (it != table().engines.end()) {
        last = std::move(it->second);
        table().engines.erase(it);
    }
}

} // namespace

int32_t hy_abi_version(void) {
    return HY_ABI_VERSION;
}

const char * hy_build_info(void) {
    try {
        static const std::string info = hypura::build_info_json();
        return info.c_str();
    } catch (...) {
        return "{}";
    }
}

int64_t hy_open(const uint8_t * plan_json, uint64_t plan_bytes, int32_t * fd) {
    hypura::OpenPlan plan;
    try {
        plan = hypura::parse_plan({reinterpret_cast<const char *>(plan_json), static_cast<size_t>(plan_bytes)});
    } catch (...) {
        return HY_E_JSON;
    }
    try {
        std::lock_guard<std::mutex> lock(table().mutex);
        if (table().engines.size() >= MAX_ENGINES) {
            return HY_E_LIMIT;
        }
        const hypura::EventPair pair = hypura::make_event_pair();
        if (pair.ours < 0) {
            return HY_E_DESCRIPTOR;
        }
        const int64_t id = table().next_id++;
        try {
            table().engines[id] = hypura::Engine::start(std::move(plan), pair.ours, [id] { forget(id); });
        } catch (...) {
            table().engines.erase(id);
            close(pair.theirs);
            throw;
        }
        *fd = pair.theirs;
        return id;
    } catch (const std::system_error &) {
        return HY_E_THREAD;
    } catch (...) {
        return HY_E_INTERNAL;
    }
}

int32_t hy_request(int64_t engine, const char * route, const uint8_t * body_json, uint64_t body_bytes) {
    try {
        std::lock_guard<std::mutex> lock(table().mutex);
        const auto it = table().engines.find(engine);
        if (it == table().engines.end()) {
            return HY_E_HANDLE;
        }
        // Copied before there is a descriptor that a failing copy would leak.
        std::string path(route);
        std::string body(reinterpret_cast<const char *>(body_json), static_cast<size_t>(body_bytes));
        const hypura::EventPair pair = hypura::make_event_pair();
        if (pair.ours < 0) {
            return HY_E_DESCRIPTOR;
        }
        try {
            it->second->request(std::move(path), std::move(body), pair.ours);
        } catch (...) {
            close(pair.theirs);
            throw;
        }
        return pair.theirs;
    } catch (const std::system_error &) {
        return HY_E_THREAD;
    } catch (...) {
        return HY_E_INTERNAL;
    }
}

int32_t hy_task(const char * name, const uint8_t * json, uint64_t bytes) {
    hypura::TaskBody body;
    try {
        body = hypura::parse_task(name, {reinterpret_cast<const char *>(json), static_cast<size_t>(bytes)});
    } catch (...) {
        return HY_E_JSON;
    }
    try {
        const hypura::EventPair pair = hypura::make_event_pair();
        if (pair.ours < 0) {
            return HY_E_DESCRIPTOR;
        }
        try {
            hypura::start_task(std::move(body), pair.ours);
        } catch (...) {
            close(pair.theirs);
            throw;
        }
        return pair.theirs;
    } catch (const std::system_error &) {
        return HY_E_THREAD;
    } catch (...) {
        return HY_E_INTERNAL;
    }
}

int32_t hy_close(int64_t engine) {
    std::lock_guard<std::mutex> lock(table().mutex);
    const auto it = table().engines.find(engine);
    if (it != table().engines.end()) {
        it->second->close();
    }
    return 0;
}

int32_t hy_active_requests(int64_t engine) {
    std::lock_guard<std::mutex> lock(table().mutex);
    const auto it = table().engines.find(engine);
    return it == table().engines.end() ? HY_E_HANDLE : it->second->active_requests();
}

// events.h - newline-delimited JSON to one end of a socket pair.
//
// Owns a descriptor and the promise that what goes into it is whole lines. Knows nothing of what the lines mean,
// of engines or of llama.cpp. Exists so that native code can talk to JavaScript without a callback: the reader
// blocks in its own event loop, and closing its end is how it cancels.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <sys/types.h>

namespace hypura {

// A connected pair: `ours` is written by EventWriter, `theirs` is handed to the other language. Both -1 when the
// system has no descriptor left.
struct EventPair {
    int ours = -1;
    int theirs = -1;
};

// Both ends are closed on exec, and a write to a closed peer is an error code, never SIGPIPE.
EventPair make_event_pair();

class EventWriter {
public:
    explicit EventWriter(int fd) : fd_(fd) {}
    ~EventWriter();
    EventWriter(const EventWriter &) = delete;
    EventWriter & operator=(const EventWriter &) = delete;

    // Writes `json` and a newline, all of it, waiting while the reader is slow. False once the reader is gone.
    // Safe to call from several threads; lines never interleave. `json` holds no newline.
    bool line(std::string_view json);

    // Writes the line if that takes no waiting, else drops it: for what may be missed (logs, progress), under any lock.
    void offer(std::string_view json);

    // True once the reader closed its end, or wrote anything. Sticky. Does not block.
    bool peer_gone();

    // Ends the stream for the reader, and any write of ours that waits. The descriptor itself lives until destruction,
    // so that its number cannot be reused under a thread that is still writing.
    void shut();

private:
    bool write_all(const char * data, size_t size);
    ssize_t send_some(const char * data, size_t size, int flags);

    const int fd_;
    std::mutex write_mutex_;
    bool gone_ = false;   // guarded by write_mutex_
    std::string pending_; // guarded by write_mutex_; the rest of an offered line that was begun
};

// `text` as a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD.
std::string json_string(std::string_view text);

} // namespace hypura

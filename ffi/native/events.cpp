#include "events.h"

#include <cerrno>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace hypura {

EventPair make_event_pair() {
    int fds[2];
#if defined(SOCK_CLOEXEC)
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
        return {};
    }
#else
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) {
        return {};
    }
    fcntl(fds[0], F_SETFD, FD_CLOEXEC);
    fcntl(fds[1], F_SETFD, FD_CLOEXEC);
#endif
#if defined(SO_NOSIGPIPE)
    const int on = 1;
    if (setsockopt(fds[0], SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof(on)) != 0) {
        close(fds[0]);
        close(fds[1]);
        return {};
    }
#endif
    return {fds[0], fds[1]};
}

EventWriter::~EventWriter() {
    close(fd_);
}

namespace {

// Darwin's newer headers have MSG_NOSIGNAL too, which its older kernels do not know; there the socket has SO_NOSIGPIPE.
#if defined(SO_NOSIGPIPE)
constexpr int no_signal = 0;
#else
constexpr int no_signal = MSG_NOSIGNAL;
#endif

// One buffer, one send: a line that fits the socket buffer is one system call and one wake-up of the reader.
std::string with_newline(std::string_view json) {
    std::string whole;
    whole.reserve(json.size() + 1);
    whole.append(json);
    whole.push_back('\n');
    return whole;
}

} // namespace

bool EventWriter::line(std::string_view json) {
    const std::string whole = with_newline(json);
    std::lock_guard<std::mutex> lock(write_mutex_);
    const std::string begun = std::move(pending_);
    pending_.clear();
    return write_all(begun.data(), begun.size()) && write_all(whole.data(), whole.size());
}

void EventWriter::offer(std::string_view json) {
    const std::string whole = with_newline(json);
    const std::unique_lock<std::mutex> lock(write_mutex_, std::try_to_lock);
    if (!lock.owns_lock() || gone_ || !pending_.empty()) {
        return; // the reader is behind
    }
    const ssize_t sent = send_some(whole.data(), whole.size(), MSG_DONTWAIT);
    if (sent > 0 && static_cast<size_t>(sent) < whole.size()) {
        pending_ = whole.substr(static_cast<size_t>(sent));
    }
}

ssize_t EventWriter::send_some(const char * data, size_t size, int flags) {
    for (;;) {
        const ssize_t sent = send(fd_, data, size, no_signal | flags);
        if (sent >= 0 || errno != EINTR) {
            return sent;
        }
    }
}

bool EventWriter::write_all(const char * data, size_t size) {
    while (size > 0 && !gone_) {
        const ssize_t sent = send_some(data, size, 0);
        if (sent < 0 && (errno == ENOBUFS || errno == ENOMEM)) {
            pollfd p{};
            p.fd = fd_;
            p.events = POLLOUT;
            poll(&p, 1, 10); // the system is short of buffers for a moment, not the reader gone
            continue;
        }
        if (sent <= 0) {
            gone_ = true; // EPIPE or ECONNRESET: the reader left
            break;
        }
        data += sent;
        size -= static_cast<size_t>(sent);
    }
    return !gone_;
}

bool EventWriter::peer_gone() {
    // The other side writes only to cancel, so anything to read, its end of file too, is its leaving. No lock: a blocked writer must not block
    // the question, and write_all finds out for itself.
    pollfd p{};
    p.fd = fd_;
    p.events = POLLIN;
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLIN | POLLHUP | POLLERR)) != 0;
}

void EventWriter::shut() {
    shutdown(fd_, SHUT_RDWR);
}

namespace {

// Length of the UTF-8 sequence at text[i], or 0 where there is none.
size_t utf8_sequence(std::string_view text, size_t i) {
    const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[k]); };
    const unsigned char lead = byte(i);
    const size_t n = lead < 0x80 ? 1 : lead >= 0xC2 && lead < 0xE0 ? 2 : lead >= 0xE0 && lead < 0xF0 ? 3
                   : lead >= 0xF0 && lead < 0xF5 ? 4 : 0;
    if (n == 0 || i + n > text.size()) {
        return 0;
    }
    for (size_t k = 1; k < n; ++k) {
        if ((byte(i + k) & 0xC0) != 0x80) {
            return 0;
        }
    }
    const bool overlong = (lead == 0xE0 && byte(i + 1) < 0xA0) || (lead == 0xF0 && byte(i + 1) < 0x90);
    const bool outside = (lead == 0xED && byte(i + 1) >= 0xA0) || (lead == 0xF4 && byte(i + 1) >= 0x90);
    return overlong || outside ? 0 : n;
}

} // namespace

std::string json_string(std::string_view text) {
    static const char hex[] = "0123456789abcdef";
    std::string out = "\"";
    for (size_t i = 0; i < text.size();) {
        const auto c = static_cast<unsigned char>(text[i]);
        const size_t n = utf8_sequence(text, i);
        if (c == '"' || c == '\\') {
            out.push_back('\\');
            out.push_back(static_cast<char>(c));
        } else if (c < 0x20) {
            out.append("\\u00");
            out.push_back(hex[c >> 4]);
            out.push_back(hex[c & 15]);
        } else if (n == 0) {
            out.append("\xEF\xBF\xBD");
        } else {
            out.append(text.substr(i, n));
        }
        i += n == 0 ? 1 : n;
    }
    out.push_back('"');
    return out;
}

} // namespace hypura

// platform.h on Linux: O_DIRECT, transparent huge pages, /proc/self/io.
#include "platform.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#ifndef MADV_POPULATE_WRITE // Linux 5.14; older headers lack the name, older kernels answer EINVAL
#define MADV_POPULATE_WRITE 23
#endif

namespace hypura::platform {
namespace {

// PMD size on x86-64 and on arm64 with 4 KiB pages.
constexpr uint64_t kHugePageBytes = 2ull << 20;

uint64_t page_bytes() {
    return static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

std::byte* map_anonymous(uint64_t bytes, int protection) {
    void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<std::byte*>(at);
}

} // namespace

void fatal(Site site, int line) {
    char text[512];
    int length = snprintf(text, sizeof text, "%s:%d: check failed: %s\n", site.file, line, site.text);
    if (length > 0) {
        size_t n = static_cast<size_t>(length) < sizeof text ? static_cast<size_t>(length) : sizeof text - 1;
        ssize_t written = write(STDERR_FILENO, text, n);
        static_cast<void>(written);
    }
    abort();
}

int open_read(const char* path, Access access) {
    int flags = O_RDONLY | O_CLOEXEC | (access == Access::kDirect ? O_DIRECT : 0);
    int descriptor;
    do {
        descriptor = open(path, flags);
    } while (descriptor < 0 && errno == EINTR);
    if (descriptor >= 0 && access == Access::kBuffered) {
        // The kernel's read-ahead guesses: on 1 MiB reads in random order it fetched 1.6 times the bytes asked for.
        posix_fadvise(descriptor, 0, 0, POSIX_FADV_RANDOM);
    }
    return descriptor < 0 ? -errno : descriptor;
}

void close_file(int descriptor) {
    if (descriptor >= 0) {
        close(descriptor);
    }
}

int64_t read_at(int descriptor, uint64_t offset, Span<std::byte> into) {
    ssize_t n = pread(descriptor, into.data, into.count, static_cast<off_t>(offset));
    return n < 0 ? -static_cast<int64_t>(errno) : n;
}

int create_write(const char* path, bool* direct) {
    constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
    int descriptor = open(path, kFlags | O_DIRECT, 0600);
    *direct = descriptor >= 0;
    if (descriptor < 0 && errno == EINVAL) {
        unlink(path); // some kernels make the file before they refuse the flag
        descriptor = open(path, kFlags, 0600);
    }
    return descriptor < 0 ? -errno : descriptor;
}

int64_t write_at(int descriptor, uint64_t offset, Span<const std::byte> from) {
    ssize_t n = pwrite(descriptor, from.data, from.count, static_cast<off_t>(offset));
    return n < 0 ? -static_cast<int64_t>(errno) : n;
}

int sync_file(int descriptor) {
    return fsync(descriptor) == 0 ? 0 : -errno;
}

int identify(int descriptor, FileIdentity* identity) {
    struct stat st;
    if (fstat(descriptor, &st) != 0) {
        return -errno;
    }
    identity->bytes = static_cast<uint64_t>(st.st_size);
    identity->inode = static_cast<uint64_t>(st.st_ino);
    identity->modified_ns = static_cast<int64_t>(st.st_mtim.tv_sec) * 1000000000 + st.st_mtim.tv_nsec;
    return 0;
}

void drop_cached(int descriptor, FileRange range) {
    posix_fadvise(descriptor, static_cast<off_t>(range.offset), static_cast<off_t>(range.bytes), POSIX_FADV_DONTNEED);
}

void flush_and_drop(int descriptor) {
    fdatasync(descriptor); // a dirty page is not dropped
    drop_cached(descriptor, {0, 0});
}

// In windows, so that the list of pages stays small.
bool cached_bytes(int descriptor, uint64_t* bytes) {
    *bytes = 0;
    FileIdentity identity{};
    if (identify(descriptor, &identity) != 0) {
        return false;
    }
    constexpr uint64_t window = 1ull << 28;
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> present(window / page);
    for (uint64_t at = 0; at < identity.bytes; at += window) {
        uint64_t size = std::min(window, identity.bytes - at);
        void* map = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, static_cast<off_t>(at));
        if (map == MAP_FAILED) {
            return false;
        }
        bool told = mincore(map, size, present.data()) == 0;
        munmap(map, size);
        if (!told) {
            return false;
        }
        for (uint64_t i = 0; i < (size + page - 1) / page; i++) {
            *bytes += (present[i] & 1) != 0 ? page : 0;
        }
    }
    return true;
}

void read_ahead(int descriptor, FileRange range) {
    posix_fadvise(descriptor, static_cast<off_t>(range.offset), static_cast<off_t>(range.bytes), POSIX_FADV_WILLNEED);
}

Memory map_memory(uint64_t bytes, PageKind kind) {
    Memory memory;
    if (bytes == 0) {
        return memory;
    }
    uint64_t unit = kind == PageKind::kHuge ? kHugePageBytes : page_bytes();
    uint64_t size = round_up(bytes, unit);
    uint64_t slack = kind == PageKind::kHuge ? kHugePageBytes : 0;
    std::byte* at = map_anonymous(size + slack, PROT_READ | PROT_WRITE);
    if (at == nullptr) {
        return memory;
    }
    uint64_t address = reinterpret_cast<uint64_t>(at);
    uint64_t head = round_up(address, unit) - address;
    if (head > 0) {
        munmap(at, head);
    }
    if (slack > head) {
        munmap(at + head + size, slack - head);
    }
    memory.data = at + head;
    memory.bytes = size;
    memory.huge = kind == PageKind::kHuge && madvise(memory.data, size, MADV_HUGEPAGE) == 0;
    return memory;
}

Memory reserve_addresses(uint64_t bytes) {
    Memory memory;
    uint64_t size = round_up(bytes, page_bytes());
    memory.data = size == 0 ? nullptr : map_anonymous(size, PROT_NONE);
    memory.bytes = memory.data == nullptr ? 0 : size;
    return memory;
}

void unmap_memory(Memory* memory) {
    if (memory->data != nullptr) {
        munmap(memory->data, memory->bytes);
    }
    *memory = Memory{};
}

void touch_memory(std::byte* data, uint64_t bytes) {
    if (bytes == 0 || madvise(data, bytes, MADV_POPULATE_WRITE) == 0) {
        return;
    }
    auto* at = reinterpret_cast<uint8_t*>(data);
    for (uint64_t i = 0; i < bytes; i += page_bytes()) {
        __atomic_fetch_or(at + i, 0, __ATOMIC_RELAXED);
    }
}

bool storage_counters(StorageCounters* counters) {
    int descriptor = open_read("/proc/self/io", Access::kBuffered);
    if (descriptor < 0) {
        return false;
    }
    char text[1024];
    ssize_t n = read(descriptor, text, sizeof text - 1);
    close_file(descriptor);
    if (n <= 0) {
        return false;
    }
    text[n] = 0;
    // "\n" keeps cancelled_write_bytes out.
    const char* reads = strstr(text, "\nread_bytes: ");
    const char* writes = strstr(text, "\nwrite_bytes: ");
    return reads != nullptr && writes != nullptr &&
           sscanf(reads, "\nread_bytes: %" SCNu64, &counters->read_bytes) == 1 &&
           sscanf(writes, "\nwrite_bytes: %" SCNu64, &counters->written_bytes) == 1;
}

// The two rings and the array of requests as the kernel maps them (io_uring_setup(2)). Head and tail are shared with the
// kernel: who writes one releases it, who reads the other's acquires it.
struct ReadRing::Impl {
    int descriptor = -1;
    void* submissions = MAP_FAILED;
    void* completions = MAP_FAILED;
    io_uring_sqe* requests = nullptr;
    size_t submission_bytes = 0;
    size_t completion_bytes = 0;
    size_t request_bytes = 0;
    io_uring_params params{};

    ~Impl() {
        if (requests != nullptr) {
            munmap(requests, request_bytes);
        }
        if (completions != MAP_FAILED) {
            munmap(completions, completion_bytes);
        }
        if (submissions != MAP_FAILED) {
            munmap(submissions, submission_bytes);
        }
        if (descriptor >= 0) {
            close(descriptor);
        }
    }
    static uint32_t* word(void* ring, uint32_t offset) {
        return reinterpret_cast<uint32_t*>(static_cast<std::byte*>(ring) + offset);
    }
    int enter(uint32_t submitted, uint32_t wanted) const {
        for (;;) {
            const unsigned flags = wanted > 0 ? IORING_ENTER_GETEVENTS : 0;
            const long status = syscall(__NR_io_uring_enter, descriptor, submitted, wanted, flags, nullptr, 0);
            if (status >= 0 || errno != EINTR) {
                return status < 0 ? -errno : 0;
            }
        }
    }
};

ReadRing::ReadRing() = default;
ReadRing::~ReadRing() = default;

int ReadRing::open(uint32_t depth) {
    auto impl = std::make_unique<Impl>();
    impl->descriptor = static_cast<int>(syscall(__NR_io_uring_setup, depth, &impl->params));
    if (impl->descriptor < 0) {
        return -errno;
    }
    const io_uring_params& p = impl->params;
    impl->submission_bytes = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    impl->completion_bytes = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
    impl->request_bytes = p.sq_entries * sizeof(io_uring_sqe);
    const auto map = [&](size_t bytes, off_t what) {
        return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, impl->descriptor, what);
    };
    impl->submissions = map(impl->submission_bytes, IORING_OFF_SQ_RING);
    impl->completions = map(impl->completion_bytes, IORING_OFF_CQ_RING);
    void* requests = map(impl->request_bytes, IORING_OFF_SQES);
    impl->requests = requests == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(requests);
    if (impl->submissions == MAP_FAILED || impl->completions == MAP_FAILED || impl->requests == nullptr) {
        return -ENOMEM;
    }
    impl_ = std::move(impl);
    return 0;
}

int ReadRing::submit(int descriptor, uint64_t offset, Span<std::byte> into, uint64_t tag) {
    const io_sqring_offsets& at = impl_->params.sq_off;
    uint32_t* tail = Impl::word(impl_->submissions, at.tail);
    const uint32_t next = *tail; // only this thread writes it
    const uint32_t place = next & *Impl::word(impl_->submissions, at.ring_mask);
    io_uring_sqe& request = impl_->requests[place];
    memset(&request, 0, sizeof request);
    request.opcode = IORING_OP_READ;
    request.fd = descriptor;
    request.off = offset;
    request.addr = reinterpret_cast<uint64_t>(into.data);
    request.len = into.count;
    request.user_data = tag;
    Impl::word(impl_->submissions, at.array)[place] = place;
    __atomic_store_n(tail, next + 1, __ATOMIC_RELEASE);
    return impl_->enter(1, 0);
}

int ReadRing::wait(Done* done) {
    const io_cqring_offsets& at = impl_->params.cq_off;
    uint32_t* head = Impl::word(impl_->completions, at.head);
    const uint32_t next = *head;
    if (next == __atomic_load_n(Impl::word(impl_->completions, at.tail), __ATOMIC_ACQUIRE)) {
        const int status = impl_->enter(0, 1);
        if (status < 0) {
            return status;
        }
    }
    const auto* entries = reinterpret_cast<const io_uring_cqe*>(static_cast<const std::byte*>(impl_->completions) + at.cqes);
    const io_uring_cqe& entry = entries[next & *Impl::word(impl_->completions, at.ring_mask)];
    *done = {entry.user_data, entry.res};
    __atomic_store_n(head, next + 1, __ATOMIC_RELEASE);
    return 0;
}

struct AsyncReads::Impl {
    // What the kernel shares at the context's address, as its fs/aio.c lays it out.
    struct Ring {
        uint32_t id;
        uint32_t event_count;
        uint32_t head;
        uint32_t tail;
        uint32_t magic;
    };
    static constexpr uint32_t kMagic = 0xa10a10a1;

    aio_context_t context = 0;
    std::vector<iocb> requests;
    std::vector<iocb*> batch;
    std::vector<io_event> events;

    ~Impl() {
        if (context != 0) {
            syscall(__NR_io_destroy, context);
        }
    }
    const Ring* ring() const { return reinterpret_cast<const Ring*>(context); }
};

AsyncReads::AsyncReads() = default;
AsyncReads::~AsyncReads() = default;

int AsyncReads::open(uint32_t depth) {
    auto impl = std::make_unique<Impl>();
    if (syscall(__NR_io_setup, depth, &impl->context) != 0) {
        impl->context = 0;
        return -errno;
    }
    if (impl->ring()->magic != Impl::kMagic) {
        return -ENOSYS;
    }
    impl->requests.resize(depth);
    impl->batch.resize(depth);
    impl->events.resize(depth);
    impl_ = std::move(impl);
    return 0;
}

uint32_t AsyncReads::begin(Span<const Read> reads) {
    Impl& impl = *impl_;
    const auto count = std::min<uint32_t>(reads.count, static_cast<uint32_t>(impl.requests.size()));
    for (uint32_t i = 0; i < count; i++) {
        iocb& request = impl.requests[i]; // the kernel has its copy when the call returns
        request = iocb{};
        request.aio_data = reads[i].tag;
        request.aio_lio_opcode = IOCB_CMD_PREAD;
        request.aio_fildes = static_cast<uint32_t>(reads[i].descriptor);
        request.aio_buf = reinterpret_cast<uint64_t>(reads[i].into.data);
        request.aio_nbytes = reads[i].into.count;
        request.aio_offset = static_cast<int64_t>(reads[i].offset);
        impl.batch[i] = &request;
    }
    const long begun = syscall(__NR_io_submit, impl.context, static_cast<long>(count), impl.batch.data());
    return begun > 0 ? static_cast<uint32_t>(begun) : 0;
}

uint32_t AsyncReads::done_count() const {
    const Impl::Ring* ring = impl_->ring();
    const uint32_t tail = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
    const uint32_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
    return head <= tail ? tail - head : ring->event_count - head + tail;
}

uint32_t AsyncReads::wait(Span<Done> done, uint64_t most_ns) {
    Impl& impl = *impl_;
    constexpr uint64_t second = 1'000'000'000;
    timespec most{static_cast<time_t>(most_ns / second), static_cast<long>(most_ns % second)};
    const long wanted = std::min<long>(done.count, static_cast<long>(impl.events.size()));
    const long ended = syscall(__NR_io_getevents, impl.context, most_ns > 0 ? 1L : 0L, wanted, impl.events.data(), &most);
    for (long i = 0; i < ended; i++) {
        done[static_cast<uint32_t>(i)] = {static_cast<uint32_t>(impl.events[i].data), impl.events[i].res};
    }
    return ended > 0 ? static_cast<uint32_t>(ended) : 0;
}

uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

void sleep_ns(uint64_t duration_ns) {
    timespec left{static_cast<time_t>(duration_ns / 1000000000u), static_cast<long>(duration_ns % 1000000000u)};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

void name_thread(const char* name) {
    char kept[16];
    snprintf(kept, sizeof kept, "%s", name);
    pthread_setname_np(pthread_self(), kept);
}

} // namespace hypura::platform

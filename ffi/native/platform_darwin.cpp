// platform.h on Darwin: F_NOCACHE, base-page anonymous memory, proc_pid_rusage. Darwin chooses its page size
// itself (16 KiB on Apple silicon) and gives programs no transparent huge pages, so PageKind::kHuge means base pages.
#include "platform.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <libproc.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace hypura::platform {
namespace {

uint64_t page_bytes() {
    return static_cast<uint64_t>(getpagesize());
}

uint64_t round_up(uint64_t value, uint64_t unit) {
    return (value + unit - 1) / unit * unit;
}

Memory map_anonymous(uint64_t bytes, int protection) {
    Memory memory;
    uint64_t size = round_up(bytes, page_bytes());
    void* at = size == 0 ? MAP_FAILED : mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (at != MAP_FAILED) {
        memory.data = static_cast<std::byte*>(at);
        memory.bytes = size;
    }
    return memory;
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
    int descriptor;
    do {
        descriptor = open(path, O_RDONLY | O_CLOEXEC);
    } while (descriptor < 0 && errno == EINTR);
    if (descriptor < 0) {
        return -errno;
    }
    if (access == Access::kDirect && fcntl(descriptor, F_NOCACHE, 1) != 0) {
        close(descriptor);
        return -EINVAL;
    }
    // The kernel's own read-ahead would fetch what nobody asked for.
    fcntl(descriptor, F_RDAHEAD, 0);
    return descriptor;
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
    int descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    *direct = descriptor >= 0 && fcntl(descriptor, F_NOCACHE, 1) == 0;
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
    identity->modified_ns = static_cast<int64_t>(st.st_mtimespec.tv_sec) * 1000000000 + st.st_mtimespec.tv_nsec;
    return 0;
}

// Darwin drops clean pages of a range through a mapping of it.
void drop_cached(int descriptor, FileRange range) {
    uint64_t bytes = range.bytes;
    FileIdentity identity;
    if (identify(descriptor, &identity) != 0 || range.offset >= identity.bytes) {
        return;
    }
    if (bytes == 0 || bytes > identity.bytes - range.offset) {
        bytes = identity.bytes - range.offset;
    }
    uint64_t start = range.offset / page_bytes() * page_bytes();
    uint64_t size = round_up(range.offset + bytes - start, page_bytes());
    void* at = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, static_cast<off_t>(start));
    if (at != MAP_FAILED) {
        msync(at, size, MS_INVALIDATE);
        munmap(at, size);
    }
}

void flush_and_drop(int descriptor) {
    fsync(descriptor); // a dirty page is not dropped
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
    const uint64_t page = page_bytes();
    std::vector<char> present(window / page);
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
    radvisory advice;
    advice.ra_offset = static_cast<off_t>(range.offset);
    advice.ra_count = range.bytes > INT_MAX ? INT_MAX : static_cast<int>(range.bytes);
    fcntl(descriptor, F_RDADVISE, &advice);
}

Memory map_memory(uint64_t bytes, PageKind) {
    return map_anonymous(bytes, PROT_READ | PROT_WRITE);
}

Memory reserve_addresses(uint64_t bytes) {
    return map_anonymous(bytes, PROT_NONE);
}

void unmap_memory(Memory* memory) {
    if (memory->data != nullptr) {
        munmap(memory->data, memory->bytes);
    }
    *memory = Memory{};
}

void touch_memory(std::byte* data, uint64_t bytes) {
    auto* at = reinterpret_cast<uint8_t*>(data);
    for (uint64_t i = 0; i < bytes; i += page_bytes()) {
        __atomic_fetch_or(at + i, 0, __ATOMIC_RELAXED);
    }
}

bool storage_counters(StorageCounters* counters) {
    rusage_info_v4 usage;
    memset(&usage, 0, sizeof usage);
    if (proc_pid_rusage(getpid(), RUSAGE_INFO_V4, reinterpret_cast<rusage_info_t*>(&usage)) != 0) {
        return false;
    }
    counters->read_bytes = usage.ri_diskio_bytesread;
    counters->written_bytes = usage.ri_diskio_byteswritten;
    return true;
}

struct ReadRing::Impl {};
ReadRing::ReadRing() = default;
ReadRing::~ReadRing() = default;
int ReadRing::open(uint32_t) {
    return -ENOSYS;
}
int ReadRing::submit(int, uint64_t, Span<std::byte>, uint64_t) {
    return -ENOSYS;
}
int ReadRing::wait(Done*) {
    return -ENOSYS;
}

struct AsyncReads::Impl {};
AsyncReads::AsyncReads() = default;
AsyncReads::~AsyncReads() = default;
int AsyncReads::open(uint32_t) {
    return -ENOSYS; // threads read
}
uint32_t AsyncReads::begin(Span<const Read>) {
    return 0;
}
uint32_t AsyncReads::done_count() const {
    return 0;
}
uint32_t AsyncReads::wait(Span<Done>, uint64_t) {
    return 0;
}

uint64_t now_ns() {
    return clock_gettime_nsec_np(CLOCK_UPTIME_RAW);
}

void sleep_ns(uint64_t duration_ns) {
    timespec left{static_cast<time_t>(duration_ns / 1000000000u), static_cast<long>(duration_ns % 1000000000u)};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

void name_thread(const char* name) {
    char kept[16];
    snprintf(kept, sizeof kept, "%s", name);
    pthread_setname_np(kept);
}

} // namespace hypura::platform

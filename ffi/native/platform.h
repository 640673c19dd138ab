// The seam to the operating system: direct file access, big anonymous memory, kernel counters, monotonic time, threads
// and locks. It owns no state and must not know what is read or why. It exists so that reader and stream are the same
// code on Linux and Darwin; platform_linux.cpp and platform_darwin.cpp implement it, the build takes one of them.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

// Clang's thread-safety analysis (-Wthread-safety); empty for other compilers.
#if defined(__clang__)
#define HY_ATTRIBUTE(x) __attribute__((x))
#else
#define HY_ATTRIBUTE(x)
#endif
#define HY_GUARDED_BY(mutex) HY_ATTRIBUTE(guarded_by(mutex))
#define HY_REQUIRES(mutex) HY_ATTRIBUTE(requires_capability(mutex))
#define HY_EXCLUDES(mutex) HY_ATTRIBUTE(locks_excluded(mutex))

// A programmer's error: aborts with file and line. On in release.
#define HY_CHECK(condition)                                                                                            \
    do {                                                                                                               \
        if (__builtin_expect(!(condition), 0)) {                                                                       \
            ::hypura::platform::fatal({__FILE__, #condition}, __LINE__);                                               \
        }                                                                                                              \
    } while (0)

namespace hypura {

// A run of elements. Arrays never travel as a pointer beside a number.
template <typename T> struct Span {
    T* data = nullptr;
    uint32_t count = 0;

    T& operator[](uint32_t i) const { return data[i]; }
    T* begin() const { return data; }
    T* end() const { return data + count; }
};

class HY_ATTRIBUTE(capability("mutex")) Mutex {
public:
    void lock() HY_ATTRIBUTE(acquire_capability()) { mutex_.lock(); }
    void unlock() HY_ATTRIBUTE(release_capability()) { mutex_.unlock(); }

private:
    friend class CondVar;
    std::mutex mutex_;
};

class HY_ATTRIBUTE(scoped_lockable) MutexLock {
public:
    explicit MutexLock(Mutex& mutex) HY_ATTRIBUTE(acquire_capability(mutex)) : mutex_(mutex) { mutex_.lock(); }
    ~MutexLock() HY_ATTRIBUTE(release_capability()) { mutex_.unlock(); }
    MutexLock(const MutexLock&) = delete;
    MutexLock& operator=(const MutexLock&) = delete;

private:
    Mutex& mutex_;
};

class CondVar {
public:
    // May return without a notification: the caller waits in a loop over its own condition.
    void wait(Mutex& mutex) HY_REQUIRES(mutex) {
        std::unique_lock<std::mutex> held(mutex.mutex_, std::adopt_lock);
        cond_.wait(held);
        held.release();
    }
    void notify_one() { cond_.notify_one(); }
    void notify_all() { cond_.notify_all(); }

private:
    std::condition_variable cond_;
};

namespace platform {

struct Site {
    const char* file;
    const char* text;
};
[[noreturn]] void fatal(Site site, int line);

// Direct reads need memory, offset and length at multiples of the logical block; 4096 is the largest block size that
// disks report today and the page size that the page cache works in. A file system that wants more says EINVAL.
constexpr uint64_t kDirectAlign = 4096;

// Whether a direct read takes what the page cache already has: F_NOCACHE does, O_DIRECT goes to the storage.
#if defined(__APPLE__)
constexpr bool kDirectMeetsCache = true;
#else
constexpr bool kDirectMeetsCache = false;
#endif

enum class Access : uint8_t { kBuffered, kDirect };

// Neither kind reads ahead by itself. >= 0: a descriptor, read only, close-on-exec. < 0: -errno (direct access that the
// file system has not is -EINVAL).
int open_read(const char* path, Access access);
void close_file(int descriptor);

// Bytes read, 0 at the end of the file, or -errno. One system call.
int64_t read_at(int descriptor, uint64_t offset, Span<std::byte> into);

// A new file to write (EEXIST where there is one), past the page cache where the file system can (`*direct`). >= 0: a
// descriptor, close-on-exec. < 0: -errno.
int create_write(const char* path, bool* direct);
// Bytes written or -errno. One system call.
int64_t write_at(int descriptor, uint64_t offset, Span<const std::byte> from);
// Waits until the file is on the storage: 0 or -errno.
int sync_file(int descriptor);

// What tells a file from another one and from its own later contents.
struct FileIdentity {
    uint64_t bytes;
    uint64_t inode;
    int64_t modified_ns;
};
// 0 or -errno.
int identify(int descriptor, FileIdentity* identity);

struct FileRange {
    uint64_t offset;
    uint64_t bytes;
};
// Hints: failure changes speed only. drop_cached throws clean pages of the range (0 bytes: to the end) out of the
// page cache, where the system can do that for a file.
void drop_cached(int descriptor, FileRange range);
// Writes dirty pages back and throws the whole file out of the page cache; pages that others map may stay.
void flush_and_drop(int descriptor);
// Of the file's bytes, in whole pages, those that the page cache holds. False where the system does not tell.
bool cached_bytes(int descriptor, uint64_t* bytes);
void read_ahead(int descriptor, FileRange range);

enum class PageKind : uint8_t { kBase, kHuge };

struct Memory {
    std::byte* data = nullptr; // aligned to 2 MiB for kHuge where the system has such pages, to a page else
    uint64_t bytes = 0;        // what was mapped, for unmap_memory
    bool huge = false;         // the system took the huge-page advice
};
// Zeroed private memory; data is null when the system has not that much.
Memory map_memory(uint64_t bytes, PageKind kind);
// Addresses without memory: any access faults.
Memory reserve_addresses(uint64_t bytes);
void unmap_memory(Memory* memory);
// Makes every page of fresh memory present, so that no read ever waits for the kernel to zero one. Changes no byte: others
// may write there meanwhile.
void touch_memory(std::byte* data, uint64_t bytes);

// The kernel's own account of this process: bytes fetched from and sent to storage.
struct StorageCounters {
    uint64_t read_bytes;
    uint64_t written_bytes;
};
// False where the system does not tell.
bool storage_counters(StorageCounters* counters);

// Reads that one thread has several of under way: io_uring. The engine's readers are threads and AsyncReads
// (test/bench/NOTES.md); this is what they are measured against.
class ReadRing {
public:
    struct Done {
        uint64_t tag;
        int64_t result; // bytes or -errno
    };

    ReadRing();
    ~ReadRing();
    ReadRing(const ReadRing&) = delete;
    ReadRing& operator=(const ReadRing&) = delete;
    // 0 or -errno: -ENOSYS where the system has no such thing, -EPERM where it is forbidden.
    int open(uint32_t depth);
    // At most `depth` at once. 0 or -errno.
    int submit(int descriptor, uint64_t offset, Span<std::byte> into, uint64_t tag);
    // Waits for one. 0 or -errno.
    int wait(Done* done);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// Direct reads that the kernel does behind the caller's back, several begun by one call: Linux's asynchronous I/O
// (io_submit(2)), which ends them in the disk's interrupt and wakes nobody but who waits.
class AsyncReads {
public:
    struct Read {
        int descriptor;
        uint64_t offset;
        Span<std::byte> into;
        uint32_t tag;
    };
    struct Done {
        uint32_t tag;
        int64_t result; // bytes or -errno
    };

    AsyncReads();
    ~AsyncReads(); // waits for what is under way
    AsyncReads(const AsyncReads&) = delete;
    AsyncReads& operator=(const AsyncReads&) = delete;
    // So many at once. 0 or -errno: -ENOSYS where the system has no such thing, -EAGAIN where others have it all.
    int open(uint32_t depth);
    // How many of the first ones were begun.
    uint32_t begin(Span<const Read> reads);
    // That wait() would give at once; no system call.
    uint32_t done_count() const;
    // Until one is done or so much time has passed: how many are. Beside the other calls, by one thread at a time.
    uint32_t wait(Span<Done> done, uint64_t most_ns);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

uint64_t now_ns(); // monotonic
void sleep_ns(uint64_t duration_ns);
void name_thread(const char* name); // the calling thread; at most 15 characters are kept

} // namespace platform
} // namespace hypura

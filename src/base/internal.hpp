#pragma once

#include "base/base.hpp"

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

Error make_error(ErrorKind kind, std::string_view message, std::string_view code = {},
                 std::string_view param = {});
/// printf into a std::string, for messages; never for numbers that are parsed again.
#if defined(__GNUC__) && !defined(_WIN32)  // mingw's check knows no %zu; its printf does
__attribute__((format(printf, 1, 2)))
#endif
std::string
format(const char* pattern, ...);

/// The indices 0 .. count - 1 in ascending order of what they stand for; equals keep their order.
using IndexLess = bool (*)(const void* context, uint32_t a, uint32_t b);
std::vector<uint32_t> sorted_order(size_t count, IndexLess less, const void* context);

/// std::stable_sort of items first .. last - 1, where speed does not matter: all types share the
/// sort of their indices, and each saves a fifth of a second of compiling.
template <class T, class Less>
void sort_items(std::vector<T>& items, const Less& less, size_t first = 0, size_t last = SIZE_MAX) {
    last = last < items.size() ? last : items.size();
    if (last - first < 2) return;
    const auto by_index = [&](uint32_t a, uint32_t b) {
        return less(items[first + a], items[first + b]);
    };
    const auto call = [](const void* context, uint32_t a, uint32_t b) {
        return (*static_cast<const decltype(by_index)*>(context))(a, b);
    };
    std::vector<T> sorted;
    sorted.reserve(last - first);
    for (const uint32_t i : sorted_order(last - first, call, &by_index))
        sorted.push_back(std::move(items[first + i]));
    for (size_t i = first; i < last; ++i) items[i] = std::move(sorted[i - first]);
}

/// std::bit_cast, which libc++ has from version 14 on, of what every compiler has.
template <class To, class From>
constexpr To bit_cast(const From& from) {
    return __builtin_bit_cast(To, from);
}

/// "what: reason", where the reason is errno's or, on Windows, GetLastError's, read first thing.
/// Kind not_found, out_of_memory, overloaded (a full disk) or else io.
Error os_error(std::string what);

#if !defined(_WIN32)
/// Takes what open, socket and their kin returned, at once: 0 to 2 are the host's standard streams,
/// and where it closed them the system hands out their numbers, so that what it prints would land
/// in our file. -1 with errno where no other number is free.
int own_descriptor(int descriptor);
#endif

uint64_t monotonic_ns();   ///< for durations
uint64_t thread_cpu_ns();  ///< CPU time of the calling thread
/// What the calendar shows, for people to read: from 1970 to the year 9999. It may be set at any
/// time, by decades, so that nothing waits or ages by it.
int64_t unix_time_ms();
/// Names the time since the machine was started: equal in two processes, monotonic_ns() counts on
/// from the one to the other. Empty where the system does not tell.
std::string boot_id();

/// product and sum that refuse to wrap
bool mul_overflows(uint64_t a, uint64_t b, uint64_t* product);
bool add_overflows(uint64_t a, uint64_t b, uint64_t* sum);

/// Bytes whose number comes from a file, a request or an option. 64-byte aligned, zeroed when
/// fresh from the OS (`allocate`). Huge pages are quicker to read through; but the first touch of
/// one takes milliseconds, in the middle of a frame. Movable, frees itself.
class Buffer {
public:
    static Result<Buffer> allocate(uint64_t bytes, const char* what, bool huge_pages = false,
                                   const Allocator& allocator = {});
    Buffer() = default;
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer();
    std::byte* data() const { return data_; }
    size_t size() const { return size_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

private:
    std::byte* data_ = nullptr;
    size_t size_ = 0;
    Allocator allocator_;
};

/// A whole file, mapped read-only. The bytes stay put when the object moves.
class MappedFile {
public:
    static Result<MappedFile> open(const std::string& path);  ///< path in UTF-8 on every system
    MappedFile() = default;
    MappedFile(MappedFile&& other) noexcept;
    MappedFile& operator=(MappedFile&& other) noexcept;
    ~MappedFile();
    std::span<const std::byte> bytes() const { return {data_, size_}; }
    /// The pages of this range will not be read again soon: the system may take them back.
    void release(size_t offset, size_t length) const;

private:
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
};

/// `is_private`: refuses (permission) what others than its owner may write, or others than its group
/// read, where files have modes.
Result<std::string> read_file(const std::string& path, uint64_t limit, bool is_private = false);

/// A file in the making: a temporary beside `path` that takes its name in commit(). So the file is
/// whole or as it was before; without commit() nothing is left.
class NewFile {
public:
    static Result<NewFile> create(const std::string& path);
    NewFile(NewFile&& other) noexcept;
    NewFile& operator=(NewFile&& other) = delete;
    ~NewFile();
    Result<void> append(std::span<const std::byte> bytes);
    Result<void> commit();  ///< once; bytes and name are on the disk afterwards

private:
    NewFile() = default;
    std::string path_, temporary_;
    intptr_t handle_ = -1;
};
Result<void> write_file(const std::string& path, std::span<const std::byte> bytes);

/// An open file of a Folder. Threads: read_at from any, the rest from one at a time.
class FolderFile {
public:
    virtual ~FolderFile() = default;
    virtual Result<uint64_t> size() = 0;
    virtual Result<void> read_at(uint64_t offset, void* bytes, size_t size) = 0;  ///< all of them
    virtual Result<void> write_at(uint64_t offset, std::string_view bytes) = 0;   ///< all of them
    virtual Result<void> truncate(uint64_t size) = 0;
    virtual Result<void> sync() = 0;  ///< bytes and size are on the disk, not the name
    /// Takes so many bytes of the disk for this file. Errors: overloaded.
    virtual Result<void> allocate(uint64_t /*size*/) { return {}; }
};

/// The files of one directory and the clock of its machine: the seam under which tests put a disk
/// that forgets and a clock of their own.
/// Threads: one at a time.
class Folder {
public:
    /// Makes it where it is absent, for this user only, and locks it against other processes and
    /// Folders as long as it lives. Errors: io names who holds it.
    static Result<std::unique_ptr<Folder>> open(const std::string& path);
    /// One that is there, to read in beside whoever has it locked.
    static Result<std::unique_ptr<Folder>> open_beside(const std::string& path);
    virtual ~Folder() = default;
    virtual Result<std::vector<std::string>> list() = 0;  ///< names, in no order
    /// For reading and writing; `create` makes it, or empties it. Errors: not_found.
    virtual Result<std::unique_ptr<FolderFile>> open_file(const std::string& name, bool create) = 0;
    virtual Result<void> rename(const std::string& from, const std::string& to) = 0;
    virtual Result<void> remove(const std::string& name) = 0;
    virtual Result<void> sync() = 0;  ///< names made, changed and removed so far are on the disk
    /// Of its disk. UINT64_MAX: unknown.
    virtual uint64_t free_bytes() const { return UINT64_MAX; }
    virtual uint64_t clock_ns() const;  ///< monotonic_ns, from any thread
    virtual std::string boot() const;   ///< boot_id
};

/// A thread started by the OS call (std::thread throws where threads are refused).
class Thread {
public:
    static Result<Thread> start(void (*function)(void*), void* context, const char* name);
    Thread() = default;
    Thread(Thread&& other) noexcept;
    Thread& operator=(Thread&& other) noexcept;
    ~Thread();  ///< joins
    void join();
    bool joinable() const { return handle_ != 0; }

private:
    uintptr_t handle_ = 0;
};

/// How far the calling thread's stack reaches: for what recurses as deep as a template or a schema
/// says. Knows nothing of a thread other than the one that made it.
class StackLimit {
public:
    StackLimit();
    /// What is left is for functions that do not recurse, and does not hold `more` beside them.
    bool is_low(size_t more = 0) const;
    static constexpr size_t reserve = size_t{14} << 10;

private:
    uintptr_t floor_;
};

/// The process that made it.
class Process {
public:
    Process();
    bool is_this() const;

private:
    uint64_t id_;
};

/// For destructors. In a child of fork the threads that `state` would wait for do not run, what they
/// had locked stays locked, and its files are the parent's still: there it is left as it is.
template <class State>
void leave_to_parent(std::unique_ptr<State>& state) {
    if (state && !state->process.is_this()) (void)state.release();
}

void pause();  ///< one spin-wait hint to the CPU

/// Sleeps while `*word == expected`, at most timeout_ns (or spuriously less): a futex where there
/// is one. `wake` wakes every sleeper on the word.
void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns);
void wake(const std::atomic<uint32_t>* word);

#if defined(_WIN32)
/// What the system's wide calls take.
std::wstring utf16_from(std::string_view text);
#endif

inline constexpr double kNoCpuLimit = 1e9;

/// What the system grants this process at most.
struct ProcessLimits {
    double cpus = kNoCpuLimit;     ///< CPU time per time
    uint64_t memory = UINT64_MAX;  ///< bytes
    /// Of so many cores in the affinity mask, those that these limits keep busy; at least 1.
    int cores(int of_mask) const;
};
/// Of the control groups that this process is in and all above them. `root` is put before every
/// path: "", or a tree of a test's own.
ProcessLimits read_cgroup_limits(const std::string& root);
/// Of the machine, or what this process is limited to.
uint64_t usable_memory();

/// A value of the environment, empty when unset.
std::string environment(const char* name);

}  // namespace detail
}  // namespace v1
}  // namespace valar

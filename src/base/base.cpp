// >>base
// Everything of the operating system but sockets: one function, one #if per system. POSIX comes
// last and is the pattern for whatever is neither Windows, Linux nor macOS.
#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/system.hpp"

#include <cstring>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

Error* box_error(Error&& error) { return new Error(std::move(error)); }
Error* copy_error(const Error* error) { return error ? new Error(*error) : nullptr; }
void free_error(Error* error) noexcept { delete error; }

Error make_error(ErrorKind kind, std::string_view message, std::string_view code,
                 std::string_view param) {
    return Error{kind, std::string(message), std::string(code), std::string(param)};
}

std::string format(const char* pattern, ...) {
    char brief[256];
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    const int length = std::vsnprintf(brief, sizeof brief, pattern, args);
    va_end(args);
    std::string text(brief, size_t(std::clamp(length, 0, int(sizeof brief) - 1)));
    if (length >= int(sizeof brief)) {
        text.resize(size_t(length));
        std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    }
    va_end(again);
    return text;
}

std::vector<uint32_t> sorted_order(size_t count, IndexLess less, const void* context) {
    std::vector<uint32_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = static_cast<uint32_t>(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return less(context, a, b); });
    return order;
}

bool mul_overflows(uint64_t a, uint64_t b, uint64_t* product) {
    *product = a * b;
    return a != 0 && b > UINT64_MAX / a;
}

bool add_overflows(uint64_t a, uint64_t b, uint64_t* sum) {
    *sum = a + b;
    return *sum < a;
}

#if defined(_WIN32)

Error os_error(std::string what) {
    const DWORD code = GetLastError();
    ErrorKind kind = ErrorKind::io;
    for (const DWORD absent : {ERROR_FILE_NOT_FOUND, ERROR_PATH_NOT_FOUND})
        if (code == absent) kind = ErrorKind::not_found;
    for (const DWORD full : {ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT})
        if (code == full) kind = ErrorKind::out_of_memory;
    for (const DWORD full : {ERROR_DISK_FULL, ERROR_HANDLE_DISK_FULL})
        if (code == full) kind = ErrorKind::overloaded;
    wchar_t wide[256];
    char text[512];
    const DWORD flags = FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS;
    const DWORD count = FormatMessageW(flags, nullptr, code, 0, wide, 256, nullptr);
    int size = WideCharToMultiByte(CP_UTF8, 0, wide, int(count), text, sizeof text, nullptr,
                                   nullptr);
    while (size > 0 && (text[size - 1] == '\n' || text[size - 1] == '\r')) --size;
    what += size > 0 ? ": " + std::string(text, size_t(size)) : format(": error %lu", code);
    return make_error(kind, std::move(what));
}

#else

namespace {
// strerror_r comes in two shapes, told apart by what it returns
[[maybe_unused]] const char* strerror_text(int result, const char* text) {
    return result == 0 ? text : "unknown";
}
[[maybe_unused]] const char* strerror_text(const char* result, const char*) { return result; }
}  // namespace

Error os_error(std::string what) {
    const int code = errno;
    ErrorKind kind = ErrorKind::io;
    if (code == ENOENT || code == ENOTDIR) kind = ErrorKind::not_found;
    if (code == ENOMEM) kind = ErrorKind::out_of_memory;
    if (code == ENOSPC || code == EDQUOT) kind = ErrorKind::overloaded;
    char text[128] = "";
    what += ": ";
    what += strerror_text(strerror_r(code, text, sizeof text), text);
    return make_error(kind, std::move(what));
}

#endif

#if !defined(_WIN32)

int own_descriptor(int descriptor) {
    constexpr int first = 3;
    if (descriptor < 0 || descriptor >= first) return descriptor;
#if defined(__wasi__)  // there the streams cannot be closed
    return descriptor;
#else
    const int moved = fcntl(descriptor, F_DUPFD_CLOEXEC, first);
    const int cause = errno;
    close(descriptor);
    errno = cause;
    return moved;
#endif
}

#endif

// ---- Clocks ----------------------------------------------------------------------------------

namespace {
constexpr int64_t last_unix_ms = INT64_C(253'402'300'799'999);  // of the year 9999
}

#if defined(_WIN32)

uint64_t monotonic_ns() {
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    const uint64_t t = uint64_t(ticks.QuadPart), f = uint64_t(per_second.QuadPart);
    return t / f * 1'000'000'000u + t % f * 1'000'000'000u / f;
}

namespace {
uint64_t filetime_ticks(FILETIME t) {  // of 100 ns
    return uint64_t(t.dwHighDateTime) << 32 | t.dwLowDateTime;
}
}  // namespace

uint64_t thread_cpu_ns() {
    FILETIME created, ended, kernel, user;
    if (!GetThreadTimes(GetCurrentThread(), &created, &ended, &kernel, &user)) return 0;
    return (filetime_ticks(kernel) + filetime_ticks(user)) * 100;
}

int64_t unix_time_ms() {
    FILETIME now;
    GetSystemTimeAsFileTime(&now);
    const int64_t since_1601 = int64_t(filetime_ticks(now) / 10'000);
    return std::clamp<int64_t>(since_1601 - 11'644'473'600'000, 0, last_unix_ms);
}

std::string boot_id() { return {}; }

#else

namespace {
uint64_t posix_clock_ns(clockid_t clock) {
    timespec t{};
    clock_gettime(clock, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000u + uint64_t(t.tv_nsec);
}
}  // namespace

uint64_t monotonic_ns() { return posix_clock_ns(CLOCK_MONOTONIC); }
#if defined(__wasi__)  // one thread, one clock
uint64_t thread_cpu_ns() { return monotonic_ns(); }
#else
uint64_t thread_cpu_ns() { return posix_clock_ns(CLOCK_THREAD_CPUTIME_ID); }
#endif

int64_t unix_time_ms() {
#if defined(SYS_clock_gettime64)  // a system of 32 bits, where libc's time_t may end in 2038
    int64_t t[2] = {};
    if (syscall(SYS_clock_gettime64, CLOCK_REALTIME, t) != 0) {
        timespec old{};
        clock_gettime(CLOCK_REALTIME, &old);
        t[0] = old.tv_sec, t[1] = old.tv_nsec;
    }
    const int64_t seconds = t[0], ns = t[1];
#else
    timespec t{};
    clock_gettime(CLOCK_REALTIME, &t);
    const int64_t seconds = t.tv_sec, ns = t.tv_nsec;
#endif
    return std::clamp<int64_t>(seconds, 0, last_unix_ms / 1000) * 1000 + ns / 1'000'000;
}

std::string boot_id() {
#if defined(__linux__)
    auto id = read_file("/proc/sys/kernel/random/boot_id", 100);
    return id ? *id : std::string();
#elif defined(__APPLE__)
    char id[100] = {};
    size_t size = sizeof id - 1;
    return sysctlbyname("kern.bootsessionuuid", id, &size, nullptr, 0) == 0 ? id : "";
#else
    return {};
#endif
}

#endif

}  // namespace detail
}  // namespace v1
}  // namespace valar

// A calendar that a test sets: the program's own clock_gettime stands before libc's. Elsewhere
// the calendar is the real one.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__) && defined(__LP64__)
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

inline std::atomic<int64_t> wall_clock_shift_s = 0;

#if defined(__GLIBC__) && defined(__LP64__)
extern "C" int clock_gettime(clockid_t clock, timespec* now) noexcept {
    const long done = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += wall_clock_shift_s;
    return int(done);
}
#endif

#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/system.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Threads ---------------------------------------------------------------------------------

namespace {

// Enough for the deepest nesting that parsers and templates allow; musl's default is 128 KiB.
constexpr size_t kStackBytes = 1 << 20;

struct ThreadStart {
    void (*function)(void*);
    void* context;
    char name[16];  // Linux takes 15 bytes and the NUL
};

void run_thread(void* start) {
    const ThreadStart copy = *static_cast<ThreadStart*>(start);
    delete static_cast<ThreadStart*>(start);
#if defined(__linux__)
    pthread_setname_np(pthread_self(), copy.name);
#elif defined(__APPLE__)
    pthread_setname_np(copy.name);
#endif
    copy.function(copy.context);
}

#if defined(_WIN32)

DWORD WINAPI thread_entry(void* start) {
    run_thread(start);
    return 0;
}

uintptr_t start_thread(ThreadStart* start) {
    return reinterpret_cast<uintptr_t>(CreateThread(nullptr, kStackBytes, thread_entry, start,
                                                    STACK_SIZE_PARAM_IS_A_RESERVATION, nullptr));
}

#else

void* thread_entry(void* start) {
    run_thread(start);
    return nullptr;
}

// The host's signals go to the host's threads; only those of a fault may strike here.
uintptr_t start_thread(ThreadStart* start) {
    static_assert(sizeof(pthread_t) <= sizeof(uintptr_t));
#if !defined(__wasi__)  // it has no signals
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGPROF})
        sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
#endif
    pthread_t thread{};
    pthread_attr_t attributes;
    int failed = pthread_attr_init(&attributes);
    if (!failed) {
        pthread_attr_setstacksize(&attributes, kStackBytes);
        failed = pthread_create(&thread, &attributes, thread_entry, start);
        pthread_attr_destroy(&attributes);
    }
    errno = failed;
    const bool started = failed == 0;
#if !defined(__wasi__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    uintptr_t handle = 0;
    if (started) std::memcpy(&handle, &thread, sizeof thread);
    return handle;
}

#endif
}  // namespace

Result<Thread> Thread::start(void (*function)(void*), void* context, const char* name) {
    auto* start = new (std::nothrow) ThreadStart{function, context, {}};
    if (start == nullptr)
        return make_error(ErrorKind::out_of_memory, "out of memory: starting a thread");
    std::memcpy(start->name, name, std::min(std::strlen(name), sizeof start->name - 1));
    Thread thread;
    thread.handle_ = start_thread(start);
    if (thread.handle_ != 0) return thread;
    delete start;
    return os_error(format("cannot start thread '%s'", name));
}

Thread::Thread(Thread&& other) noexcept : handle_(std::exchange(other.handle_, uintptr_t(0))) {}

Thread& Thread::operator=(Thread&& other) noexcept {
    join();
    handle_ = std::exchange(other.handle_, uintptr_t(0));
    return *this;
}

Thread::~Thread() { join(); }

void Thread::join() {
    if (handle_ == 0) return;
#if defined(_WIN32)
    WaitForSingleObject(reinterpret_cast<HANDLE>(handle_), INFINITE);
    CloseHandle(reinterpret_cast<HANDLE>(handle_));
#else
    pthread_t thread;
    std::memcpy(&thread, &handle_, sizeof thread);
    pthread_join(thread, nullptr);
#endif
    handle_ = 0;
}

// ---- Stacks ----------------------------------------------------------------------------------

namespace {

struct StackBounds {
    uintptr_t low = 0, high = 0;  // high 0: not known
};

// Not a local variable's: ASan may have those elsewhere.
#if defined(_MSC_VER) && !defined(__clang__)
#define VALAR_STACK_ADDRESS() reinterpret_cast<uintptr_t>(_AddressOfReturnAddress())
#else
#define VALAR_STACK_ADDRESS() reinterpret_cast<uintptr_t>(__builtin_frame_address(0))
#endif

#if defined(_WIN32)

// The reservation that holds the address; fibers have their own. Its last pages are guards.
StackBounds stack_bounds(uintptr_t here) {
    constexpr uintptr_t guards = 12 << 10;
    MEMORY_BASIC_INFORMATION about;
    if (!VirtualQuery(reinterpret_cast<void*>(here), &about, sizeof about)) return {};
    return {reinterpret_cast<uintptr_t>(about.AllocationBase) + guards, UINTPTR_MAX};
}

#elif defined(__linux__)

// The first thread's stack ends with the program's name and grows to the process's limit;
// pthread_getattr_np would read /proc for it.
StackBounds first_stack() {
    const uintptr_t high = uintptr_t(getauxval(AT_EXECFN));
    rlimit limit{};
    if (high == 0 || getrlimit(RLIMIT_STACK, &limit) != 0) return {};
    const uint64_t bytes = std::min<uint64_t>(limit.rlim_cur, uint64_t{64} << 20);
    return {high - size_t(std::min<uint64_t>(bytes, high)), high};
}

StackBounds stack_bounds(uintptr_t) {
    if (syscall(SYS_gettid) == getpid()) return first_stack();
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return {};
    void* low = nullptr;
    size_t bytes = 0;
    const bool known = pthread_attr_getstack(&attributes, &low, &bytes) == 0;
    pthread_attr_destroy(&attributes);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(low);
    return known ? StackBounds{begin, begin + bytes} : StackBounds{};
}

#elif defined(__APPLE__)

StackBounds stack_bounds(uintptr_t) {
    const pthread_t self = pthread_self();
    const uintptr_t high = reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(self));
    return {high - pthread_get_stacksize_np(self), high};
}

#else

StackBounds stack_bounds(uintptr_t) { return {}; }

#endif

}  // namespace

StackLimit::StackLimit() {
    constexpr uintptr_t unknown = 256 << 10, foreign = 40 << 10;  // a coroutine's, on the heap
    const uintptr_t here = VALAR_STACK_ADDRESS();
    const StackBounds bounds = stack_bounds(here);
    const bool inside = here > bounds.low && here < bounds.high;
    const uintptr_t most = bounds.high == 0 ? unknown : foreign;
    floor_ = (inside ? bounds.low : here - std::min(here, most)) + reserve;
}

bool StackLimit::is_low(size_t more) const { return VALAR_STACK_ADDRESS() < floor_ + more; }

#undef VALAR_STACK_ADDRESS

#if defined(_WIN32) || defined(__wasi__)  // no fork
Process::Process() : id_(0) {}
bool Process::is_this() const { return true; }
#else
Process::Process() : id_(static_cast<uint64_t>(getpid())) {}
bool Process::is_this() const { return id_ == static_cast<uint64_t>(getpid()); }
#endif

void pause() {
#if defined(_WIN32)
    YieldProcessor();
#elif defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__ARM_ARCH) && __ARM_ARCH >= 7)
    __asm__ __volatile__("yield");
#endif
}

namespace {
constexpr uint64_t wait_limit_ns = 1'000'000'000;  // a sleeper looks at its word that often
}

#if defined(_WIN32)

namespace {
// Windows 8 has them in a library that mingw and older projects do not link.
struct AddressWait {
    BOOL(WINAPI* wait)(volatile void*, void*, SIZE_T, DWORD) = nullptr;
    void(WINAPI* wake_all)(void*) = nullptr;
};

const AddressWait& address_wait() {
    static const AddressWait functions = [] {
        AddressWait found;
        if (const HMODULE base = GetModuleHandleW(L"kernelbase.dll")) {
            const FARPROC wait = GetProcAddress(base, "WaitOnAddress");
            const FARPROC wake_all = GetProcAddress(base, "WakeByAddressAll");
            std::memcpy(&found.wait, &wait, sizeof wait);
            std::memcpy(&found.wake_all, &wake_all, sizeof wake_all);
        }
        return found;
    }();
    return functions;
}
}  // namespace

void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns) {
    const DWORD ms = DWORD((std::min(timeout_ns, wait_limit_ns) + 999'999) / 1'000'000);
    if (word->load(std::memory_order_acquire) != expected) return;
    if (address_wait().wait == nullptr) return Sleep(std::min<DWORD>(ms, 1));
    address_wait().wait(const_cast<std::atomic<uint32_t>*>(word), &expected, sizeof expected, ms);
}

void wake(const std::atomic<uint32_t>* word) {
    if (address_wait().wake_all) address_wait().wake_all(const_cast<std::atomic<uint32_t>*>(word));
}

#elif defined(__linux__)

void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns) {
    timeout_ns = std::min(timeout_ns, wait_limit_ns);
    // The kernel's own timespec: with 64-bit time on a 32-bit system libc's has another layout.
    const long timeout[2] = {long(timeout_ns / 1'000'000'000u), long(timeout_ns % 1'000'000'000u)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, timeout, nullptr, 0);
}

void wake(const std::atomic<uint32_t>* word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

#elif defined(__APPLE__)

// What libc++ builds std::atomic::wait from.
extern "C" int __ulock_wait(uint32_t operation, void* address, uint64_t value, uint32_t timeout_us);
extern "C" int __ulock_wake(uint32_t operation, void* address, uint64_t value);
constexpr uint32_t ulock_compare_and_wait = 1, ulock_wake_all = 0x100;

void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns) {
    const uint64_t us = std::min(timeout_ns, wait_limit_ns) / 1000 + 1;  // 0 would be for ever
    __ulock_wait(ulock_compare_and_wait, const_cast<std::atomic<uint32_t>*>(word), expected,
                 uint32_t(us));
}

void wake(const std::atomic<uint32_t>* word) {
    __ulock_wake(ulock_compare_and_wait | ulock_wake_all, const_cast<std::atomic<uint32_t>*>(word),
                 0);
}

#else

void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns) {
    if (word->load(std::memory_order_acquire) != expected) return;
    const timespec nap{0, long(std::min<uint64_t>(timeout_ns, 50'000))};
    nanosleep(&nap, nullptr);
}

void wake(const std::atomic<uint32_t>*) {}  // sleepers look again every 50 us

#endif

std::string environment(const char* name) {
#if defined(_WIN32)
    const std::wstring wide = utf16_from(name);
    wchar_t value[4096];
    const DWORD count = GetEnvironmentVariableW(wide.c_str(), value, 4096);
    if (count == 0 || count >= 4096) return {};
    std::string text(size_t(count) * 3, '\0');
    const int size = WideCharToMultiByte(CP_UTF8, 0, value, int(count), text.data(),
                                         int(text.size()), nullptr, nullptr);
    text.resize(size_t(size > 0 ? size : 0));
    return text;
#else
    const char* value = std::getenv(name);
    return value ? value : "";
#endif
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

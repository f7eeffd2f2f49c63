// >>base
// Owns: Error, Result, the log callback, the clock, file mapping, checked allocation, threads.
// Assumes: an operating system call is allowed to fail at any time.
// Promises: no exceptions, no printing, no exit; every failure is an Error that names its cause.
#pragma once

#include "config.hpp"

#include <cstdint>
#include <new>
#include <string>
#include <string_view>
#include <utility>

namespace valar {
inline namespace v1 {

/// What went wrong, coarsely. The server maps each kind to an HTTP status.
enum class ErrorKind : uint8_t {
    invalid_request,  ///< a caller's argument, field or option is wrong
    bad_data,         ///< a file or byte stream is malformed
    unsupported,      ///< well-formed, but nothing here can do it
    io,               ///< the operating system refused
    out_of_memory,    ///< an allocation sized by a file, a request or an option failed
    not_found,        ///< no such model, record, key or path
    authentication,   ///< missing or unknown credentials
    permission,       ///< known, but not allowed
    too_large,        ///< a body over its limit
    conflict,         ///< at odds with what is there: a key that is taken
    rate_limit,       ///< too many requests by one key
    overloaded,       ///< a queue, store or memory limit is reached; worth a retry
    timeout,          ///< a wait ended before its event
    cancelled,        ///< somebody asked for the end
    closed,           ///< the engine, server or connection is gone
    internal,         ///< our own fault
};

/// One failure. `message` is for people and names the file, tensor, JSON path or offset;
/// `code` is a stable word for programs ("context_length_exceeded"), empty when there is none;
/// `param` is the dotted path of the field at fault, empty when there is none.
struct Error {
    ErrorKind kind = ErrorKind::internal;
    std::string message;
    std::string code = {};
    std::string param = {};
    uint32_t retry_after_s = 0;  ///< until another try is worth it; 0: unknown
};

namespace detail {
// An Error travels in a box: results stay small; what makes, copies and frees it is compiled once.
VALAR_API Error* box_error(Error&& error);
VALAR_API Error* copy_error(const Error* error);
VALAR_API void free_error(Error* error) noexcept;
}  // namespace detail

/// A value or an Error. Tests true when it holds a value; `->` and `*` reach it. value(), `->` and
/// `*` only when ok(), error() only when not (VALAR_ASSERT checks both). One that was moved from
/// can only be assigned to and destroyed. Threads: as safe as the value it holds.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : ok_(true) { new (&value_) T(std::move(value)); }
    Result(Error&& error) : error_(detail::box_error(std::move(error))), ok_(false) {}
    Result(const Error& error) : error_(detail::copy_error(&error)), ok_(false) {}
    Result(Result&& other) noexcept : ok_(other.ok_) { take(std::move(other)); }
    Result(const Result& other) : ok_(other.ok_) {
        if (ok_) new (&value_) T(other.value_);
        else error_ = detail::copy_error(other.error_);
    }
    Result& operator=(Result other) noexcept {
        destroy();
        ok_ = other.ok_;
        take(std::move(other));
        return *this;
    }
    ~Result() { destroy(); }

    explicit operator bool() const noexcept { return ok_; }
    bool ok() const noexcept { return ok_; }
    T& value() & { return checked(*this); }
    const T& value() const& { return checked(*this); }
    T value() && { return std::move(checked(*this)); }
    T* operator->() { return &checked(*this); }
    const T* operator->() const { return &checked(*this); }
    T& operator*() & { return checked(*this); }
    const T& operator*() const& { return checked(*this); }
    T operator*() && { return std::move(checked(*this)); }  // by value: a temporary ends
    Error& error() {
        VALAR_ASSERT(!ok_ && error_);
        return *error_;
    }
    const Error& error() const {
        VALAR_ASSERT(!ok_ && error_);
        return *error_;
    }

private:
    template <class Self>
    static auto& checked(Self& self) {
        VALAR_ASSERT(self.ok_);
        return self.value_;
    }
    void take(Result&& other) noexcept {
        if (ok_) new (&value_) T(std::move(other.value_));
        else error_ = std::exchange(other.error_, nullptr);
    }
    void destroy() noexcept {
        if (ok_) value_.~T();
        else detail::free_error(error_);
    }
    union {
        T value_;
        Error* error_;
    };
    bool ok_;
};

/// Success without a value, or an Error. One that was moved from is a success.
template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error&& error) : error_(detail::box_error(std::move(error))) {}
    Result(const Error& error) : error_(detail::copy_error(&error)) {}
    Result(Result&& other) noexcept : error_(std::exchange(other.error_, nullptr)) {}
    Result(const Result& other) : error_(detail::copy_error(other.error_)) {}
    Result& operator=(Result other) noexcept {
        std::swap(error_, other.error_);
        return *this;
    }
    ~Result() {
        if (error_) detail::free_error(error_);
    }
    explicit operator bool() const noexcept { return !error_; }
    bool ok() const noexcept { return !error_; }
    Error& error() {
        VALAR_ASSERT(error_);
        return *error_;
    }
    const Error& error() const {
        VALAR_ASSERT(error_);
        return *error_;
    }

private:
    Error* error_ = nullptr;
};

/// How serious a log line is.
enum class LogLevel : uint8_t { debug, info, warning, error };

/// Where log lines go; the default is nowhere. `write` may be called from any thread. A callback is
/// always a struct like this: functions, and the `context` of yours that they are given first.
struct LogSink {
    void (*write)(void* context, LogLevel level, std::string_view line) = nullptr;
    void* context = nullptr;
    void operator()(LogLevel level, std::string_view line) const {
        if (write) write(context, level, line);
    }
};

/// Where memory comes from; the default is the system. `allocate` returns bytes aligned as asked,
/// with any content, or null. Both are called by the thread that opens or closes.
struct Allocator {
    void* (*allocate)(void* context, uint64_t bytes, uint64_t alignment) = nullptr;
    void (*release)(void* context, void* memory, uint64_t bytes) = nullptr;
    void* context = nullptr;
};

/// Cores that this process may run on, hardware threads of one counted once, and that the CPU quota
/// of its cgroups or job keeps busy, rounded down; at least 1.
VALAR_API int physical_cores();

}  // namespace v1
}  // namespace valar

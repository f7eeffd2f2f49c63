// valar 0.1.0: run a quantized language model, and serve it over HTTP, from one header.
//
// DO THIS in exactly one .cpp:
//
//     #define VALAR_IMPLEMENTATION
//     #include "valar.hpp"
//
// and #include "valar.hpp" wherever else you need it. C++20, no dependency but the threads and
// sockets of the operating system (link with -pthread; on Windows ws2_32 and bcrypt). Doing it twice
// is a duplicate-symbol error, on purpose.
//
// QUICK START
//
//     auto engine = valar::Engine::open({.model_path = "model.gguf"});
//     if (!engine) return show(engine.error().message);
//     auto reply = engine->submit({.instructions = "You are a gruff blacksmith.",
//                                  .input = "Can you mend this sword before dawn?"});
//     while (game.frame()) {
//         engine->step(2000);                    // at most about 2,000 us of this frame
//         while (auto event = reply.poll())
//             if (auto text = event->text_delta()) hud.append(*text);
//         if (reply.finished()) break;
//     }
//
//     auto server = valar::Server::open(engine->responder(), {.port = 8080});
//     if (!server) return show(server.error().message);
//     engine->start();                           // a thread of its own
//     server->run();                             // POST /v1/responses until stop()
//
// CONTENTS: search for ">>name"; each name stands twice, before its declarations and before its
// implementation. A section uses only what stands above it.
//
//     >>base        Error, Result, logging, clock, files, memory, threads, sockets
//     >>digest      SHA-256, HMAC, CRC-32C, base64, random bytes
//     >>unicode     UTF-8, character classes, NFC
//     >>json        the Json value, parser and writer
//     >>api         requests, responses, events; Responder, the seam between wire and inference
//     >>gguf        the model file, reading and writing
//     >>kernels     the numeric definition; every kernel, scalar and vectorised; the worker team
//     >>tokenizer   text to tokens and back
//     >>template    chat templates (Jinja)
//     >>model       ModelSpec: what a network is, as data
//     >>backend     the interface of a device; the CPU
//     >>sampler     logits to token
//     >>engine      Engine and Reply: scheduling, batches, prefix cache, step(), streaming
//     >>http        HTTP/1.1: parser, event loop, client
//     >>store       the records of finished responses
//     >>server      the routes of the Responses API
//
// READING IT TO LEARN: start at the numeric definition in >>kernels (the whole forward pass in words),
// then the scalar kernels, then CpuBackend in >>backend, then Engine::step.
//
// CONFIGURATION, before the implementation is included. Declarations never change; to use a class that
// was cut is a link error.
//
//     VALAR_NO_INFERENCE   leaves out gguf to engine: a server for a Responder of your own
//     VALAR_NO_SERVER      leaves out http and server: no socket code at all
//     VALAR_NO_STORE       leaves out MemoryStore: pass a Store of your own in ServerOptions
//     VALAR_NO_SIMD        leaves out every path but the scalar one: smallest, slow, the same bits
//     VALAR_ASSERT(x)      checks of our own mistakes; off unless you define it
//     VALAR_API            export marks for a shared library
//
// In the environment VALAR_ISA=scalar (or another name of a
// kernel table) forces a path, for tests.
//
// THREADS. Engine: submit and everything of its Responder from any thread; step(), start(), stop() from
// one at a time. Reply: one thread at a time. Server: stop() from any, step() or run() from one.
// Helpers of an engine compute only inside step() (or always after start()).
//
// OWNERSHIP. Engine, Server and Reply are movable handles; what they own stays put. string_view and
// span borrow, and the declaration says until when. A Reply may outlive its Engine; a Responder must
// outlive its Server. No global state changes; no signal handlers, no printing, no exit.
//
// ERRORS. Everything that can fail returns Result<T>: a value, or an Error that names file, tensor,
// key, JSON path or offset. Memory whose size comes from a file, a request or an option is checked. If
// the small rest of memory runs out the C++ library's own behaviour applies (std::bad_alloc, or
// termination without exceptions): the single exception to "never aborts".
//
// WHAT IT DOES NOT DO: train; convert models (it reads GGUF); run on a GPU; speak TLS; read
// big-endian files or run on big-endian machines; tolerate -ffast-math (a compile error). What this
// version leaves to later ones is listed in README.md, "Limits".
//
// Licence: MIT, at the end of this file.
#ifndef VALAR_HPP
#define VALAR_HPP

#define VALAR_VERSION "0.1.0"

#ifndef VALAR_API
#define VALAR_API
#endif
#ifndef VALAR_ASSERT
#define VALAR_ASSERT(condition) ((void)0)
#endif

// Some headers (windows.h) define these; restored at the end.
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "valar runs on little-endian machines only"
#endif

// >>base
// Owns: Error, Result, the log callback, the clock, file mapping, checked allocation, threads.
// Assumes: an operating system call is allowed to fail at any time.
// Promises: no exceptions, no printing, no exit; every failure is an Error that names its cause.

namespace valar {
inline namespace v1 {

/// What went wrong, coarsely; the server maps each kind to an HTTP status (contract, section 2).
enum class ErrorKind : uint8_t {
    invalid_request,     ///< a caller's argument, field or option is wrong
    bad_data,            ///< a file or byte stream is malformed
    unsupported,         ///< well-formed, but nothing here can do it
    io,                  ///< the operating system refused
    out_of_memory,       ///< an allocation sized by a file, a request or an option failed
    not_found,           ///< no such model, record, key or path
    authentication,      ///< missing or unknown credentials
    permission,          ///< known, but not allowed
    method_not_allowed,  ///< known path, wrong method
    too_large,           ///< a body over its limit
    unsupported_media,   ///< a content type that is not read here
    idempotency,         ///< an idempotency key used for another body
    rate_limit,          ///< too many requests by one key
    overloaded,          ///< a queue, store or memory limit is reached; worth a retry
    timeout,             ///< a wait ended before its event
    cancelled,           ///< somebody asked for the end
    closed,              ///< the engine, server or connection is gone
    upstream,            ///< a server that we called failed
    internal,            ///< our own fault
};

/// One failure. `message` is for people and names the file, tensor, JSON path or offset;
/// `code` is a stable word for programs ("context_length_exceeded"), empty when there is none;
/// `param` is the dotted path of the field at fault, empty when there is none.
struct Error {
    ErrorKind   kind = ErrorKind::internal;
    std::string message;
    std::string code  = {};
    std::string param = {};
    uint32_t    retry_after_s = 0;  ///< of overloaded: when another try is worth it; 0: unknown
};

/// A value or an Error. Tests true when it holds a value; `->` and `*` reach it.
/// Threads: as safe as the value it holds.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : ok_(true) { new (&value_) T(std::move(value)); }
    Result(Error error) : ok_(false) { new (&error_) Error(std::move(error)); }
    Result(Result&& other) noexcept : ok_(other.ok_) { take(std::move(other)); }
    Result(const Result& other) : ok_(other.ok_) {
        if (ok_) new (&value_) T(other.value_);
        else new (&error_) Error(other.error_);
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
    T& value() & { return value_; }  // only when ok()
    const T& value() const& { return value_; }
    T value() && { return std::move(value_); }
    T* operator->() { return &value_; }
    const T* operator->() const { return &value_; }
    T& operator*() & { return value_; }
    const T& operator*() const& { return value_; }
    T operator*() && { return std::move(value_); }  // by value: a temporary ends
    Error& error() { return error_; }  // only when !ok()
    const Error& error() const { return error_; }

private:
    void take(Result&& other) noexcept {
        if (ok_) new (&value_) T(std::move(other.value_));
        else new (&error_) Error(std::move(other.error_));
    }
    void destroy() noexcept {
        if (ok_) value_.~T();
        else error_.~Error();
    }
    union {
        T     value_;
        Error error_;
    };
    bool ok_;
};

/// Success without a value, or an Error.
template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error error) : error_(std::move(error)) {}
    explicit operator bool() const noexcept { return !error_; }
    bool ok() const noexcept { return !error_; }
    Error& error() { return *error_; }
    const Error& error() const { return *error_; }

private:
    std::optional<Error> error_;
};

/// How serious a log line is.
enum class LogLevel : uint8_t { debug, info, warning, error };

/// Where log lines go; the default is nowhere. `write` may be called from any thread.
struct LogSink {
    void (*write)(void* context, LogLevel level, std::string_view line) = nullptr;
    void* context = nullptr;
    void operator()(LogLevel level, std::string_view line) const {
        if (write) write(context, level, line);
    }
};

/// A half-open range of bytes.
struct ByteRange {
    size_t begin = 0;
    size_t end   = 0;
};

/// A rendered prompt with provenance: `from_request` (ascending, disjoint, not touching) lists the
/// bytes that came from a request; all others came from the chat template. Control tokens are
/// recognised only in bytes of the template (design: no user text can forge one).
struct MarkedText {
    std::string            text;
    std::vector<ByteRange> from_request;
};

namespace detail {

Error make_error(ErrorKind kind, std::string message, std::string code = {},
                 std::string param = {});
/// printf into a std::string, for messages; never for numbers that are parsed again.
#if defined(__GNUC__) && !defined(_WIN32)  // mingw's check knows no %zu; its printf does
__attribute__((format(printf, 1, 2)))
#endif
std::string format(const char* pattern, ...);

/// "what: reason", where the reason is errno's or, on Windows, GetLastError's, read first thing.
/// Kind not_found, out_of_memory or else io.
Error os_error(std::string what);

uint64_t monotonic_ns();     ///< for durations
uint64_t thread_cpu_ns();    ///< CPU time of the calling thread
int64_t  unix_time_ms();     ///< for records

/// product and sum that refuse to wrap
bool mul_overflows(uint64_t a, uint64_t b, uint64_t* product);
bool add_overflows(uint64_t a, uint64_t b, uint64_t* sum);

/// Bytes whose number comes from a file, a request or an option. 64-byte aligned, zeroed when
/// fresh from the OS (`allocate`). Huge pages are quicker to read through; but the first touch of
/// one takes milliseconds, in the middle of a frame. Movable, frees itself.
class Buffer {
public:
    static Result<Buffer> allocate(uint64_t bytes, const char* what, bool huge_pages = false);
    Buffer() = default;
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer();
    std::byte* data() const { return data_; }
    size_t size() const { return size_; }
    template <class T> T* as() const { return reinterpret_cast<T*>(data_); }

private:
    std::byte* data_ = nullptr;
    size_t     size_ = 0;
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
    size_t           size_ = 0;
};

Result<std::string> read_file(const std::string& path, uint64_t limit);
/// Writes to a temporary beside it, then renames: the file is whole or absent.
Result<void> write_file(const std::string& path, std::span<const std::byte> bytes);

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

int  physical_cores();  ///< at least 1; respects the process's CPU mask
void pause();           ///< one spin-wait hint to the CPU

/// Sleeps while `*word == expected`, at most timeout_ns (or spuriously less): a futex where there
/// is one. `wake` wakes every sleeper on the word.
void wait_on(const std::atomic<uint32_t>* word, uint32_t expected, uint64_t timeout_ns);
void wake(const std::atomic<uint32_t>* word);

/// A value of the environment, empty when unset.
std::string environment(const char* name);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>base: sockets
// Owns: the TCP calls of Linux, Windows, macOS and BSD, readiness (epoll, kqueue, WSAPoll) and the
//       wake-up of a waiting loop from another thread.
// Assumes: numeric addresses; names are resolved elsewhere.
// Promises: no call blocks but Poller::wait; no SIGPIPE, and no signal handler either.

namespace valar {
inline namespace v1 {
namespace detail {

/// An IP address and a TCP port. IPv4 is held as ::ffff:a.b.c.d.
struct NetAddress {
    uint8_t  ip[16] = {};
    uint16_t port   = 0;
    bool     v4     = false;

    /// "127.0.0.1", "::1", "[::1]" or "localhost" (which is 127.0.0.1); anything else is an Error.
    static Result<NetAddress> parse(std::string_view host, uint16_t port);
    std::string host() const;  ///< "127.0.0.1", "::1"
    std::string text() const;  ///< "127.0.0.1:8080", "[::1]:8080"
    bool is_loopback() const;  ///< 127.0.0.0/8, ::1, and the former mapped into IPv6
};

/// How a socket call ended. `full`: accept found no free descriptor (EMFILE and kin): the caller
/// must stop asking until one is free, or it will spin.
enum class IoStatus : uint8_t { done, again, closed, full, failed };

struct IoResult {
    IoStatus status = IoStatus::failed;
    size_t   bytes  = 0;  ///< > 0 when done; `closed` is the peer's end of stream, or a reset
};

/// A non-blocking TCP socket that closes itself. Threads: one at a time.
class Socket {
public:
    static constexpr uintptr_t none = UINTPTR_MAX;

    /// Port 0 takes any free port; "::" takes IPv4 as well.
    static Result<Socket> listen(const NetAddress& address, int backlog);
    /// Begins; the socket is writable once connected() can tell how it went.
    static Result<Socket> connect(const NetAddress& address);

    Socket() = default;
    Socket(Socket&& other) noexcept : handle_(std::exchange(other.handle_, none)) {}
    Socket& operator=(Socket&& other) noexcept;
    ~Socket() { close(); }

    IoStatus accept(Socket* accepted, NetAddress* peer);
    IoStatus connected() const;  ///< done or failed; only after the socket became writable
    IoResult read(void* bytes, size_t size);
    /// Sends `head`, then `body`, in one call; `bytes` counts over both.
    IoResult write(std::string_view head, std::string_view body = {});
    void shutdown_write();  ///< sends the end of stream; reading goes on
    void close();
    Result<NetAddress> local() const;
    bool is_open() const { return handle_ != none; }
    uintptr_t handle() const { return handle_; }

private:
    explicit Socket(uintptr_t handle) : handle_(handle) {}
    uintptr_t handle_ = none;
};

struct PollEvent {
    uint64_t tag      = 0;
    bool     readable = false;  ///< bytes, an end of stream or an error wait to be read
    bool     writable = false;
    bool     hangup   = false;  ///< the peer sends no more, or is gone
};

/// What a socket is watched for. poll_hangup tells an end of stream behind bytes that nobody reads
/// yet; where the system cannot (kqueue, poll) it is silent until they are read.
enum PollInterest : unsigned { poll_read = 1, poll_write = 2, poll_hangup = 4 };

/// Level-triggered readiness of many sockets. Threads: wake() from any, the rest from one.
class Poller {
public:
    static Result<Poller> open();
    Poller(Poller&& other) noexcept;
    Poller& operator=(Poller&& other) noexcept;
    ~Poller();

    /// Watches a socket, or changes what it is watched for.
    Result<void> set(const Socket& socket, uint64_t tag, unsigned interest);
    void remove(const Socket& socket);  ///< before the socket is closed
    /// Waits for events or wake(), at most timeout_ms (-1: without limit), and fills `events`.
    Result<void> wait(int timeout_ms, std::vector<PollEvent>* events);
    void wake();

private:
    struct State;
    explicit Poller(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>digest
// Owns: SHA-256, HMAC-SHA256, CRC-32C, base64, hex, constant-time compare, the OS random source.
// Assumes: messages shorter than 2^61 bytes.
// Promises: the published test vectors; strict decoders (one spelling per value).

namespace valar {
inline namespace v1 {
namespace detail {

/// The 32 bytes of a SHA-256 or HMAC-SHA256.
struct Hash256 {
    uint8_t bytes[32] = {};
    bool operator==(const Hash256&) const = default;
    std::string hex() const;  ///< 64 lower-case digits
    std::string_view view() const { return {reinterpret_cast<const char*>(bytes), 32}; }
};

/// SHA-256 (FIPS 180-4) of bytes that arrive in pieces. `finish` ends it: make a new one after.
class Sha256 {
public:
    Sha256();
    void update(const void* data, size_t size);
    void update(std::string_view text) { update(text.data(), text.size()); }
    Hash256 finish();

private:
    void compress(const uint8_t* block);
    uint32_t state_[8];
    uint64_t length_ = 0;  // bytes taken so far
    uint8_t  pending_[64];
};

Hash256 sha256(const void* data, size_t size);
Hash256 sha256(std::string_view text);
/// RFC 2104 with SHA-256; a key of any length.
Hash256 hmac_sha256(std::string_view key, std::string_view message);

/// CRC-32C (Castagnoli). To go on with more bytes pass the value so far; start with 0.
uint32_t crc32c(const void* data, size_t size, uint32_t value = 0);

/// RFC 4648 section 4, padded. The decoder takes exactly what the encoder writes: no white space,
/// no missing padding, no stray bits; kind invalid_request.
std::string base64_encode(const void* data, size_t size);
std::string base64_encode(std::string_view bytes);
Result<std::string> base64_decode(std::string_view text);

std::string hex_encode(const void* data, size_t size);  ///< lower case
Result<std::string> hex_decode(std::string_view text);  ///< either case, even length

/// The time taken depends on the lengths only.
bool constant_time_equal(std::string_view a, std::string_view b);

/// Bytes from the operating system's generator, for ids and secrets.
Result<void> random_bytes(void* data, size_t size);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>unicode
// Owns: UTF-8, character classes, simple case mapping, canonical composition (NFC).
// Assumes: nothing about its input; malformed bytes are a value (`bad_utf8`), not an error.
// Promises: Unicode 14.0.0, from the generated table in the implementation; no locale.

namespace valar {
inline namespace v1 {
namespace detail {

/// What utf8_next gives for bytes that are not UTF-8. No code point has this value.
inline constexpr char32_t bad_utf8 = 0x110000;

/// The code point at text[*at], at < size; moves *at behind it. Malformed: gives bad_utf8 and moves
/// behind the maximal subpart (Unicode 3.9, table 3-8), at least one byte.
char32_t utf8_next(std::string_view text, size_t* at);
void utf8_append(std::string& out, char32_t code_point);  ///< not a scalar value: U+FFFD
bool utf8_valid(std::string_view text);
/// Length of the longest valid prefix; text.size() when all of it is UTF-8.
size_t utf8_valid_prefix(std::string_view text);
/// Bytes at the end that begin a code point and wait for the rest of it: 0 to 3.
size_t utf8_incomplete_suffix(std::string_view text);
/// Code points; a malformed subpart counts as one.
size_t utf8_count(std::string_view text);
std::string utf8_repair(std::string_view text);  ///< each malformed subpart becomes U+FFFD

/// General categories, in the order of their groups: the comparisons below rely on it.
enum class Category : uint8_t {
    Lu, Ll, Lt, Lm, Lo,          // letters
    Mn, Mc, Me,                  // marks
    Nd, Nl, No,                  // numbers
    Pc, Pd, Ps, Pe, Pi, Pf, Po,  // punctuation
    Sm, Sc, Sk, So,              // symbols
    Zs, Zl, Zp,                  // separators
    Cc, Cf, Cs, Co, Cn,          // others; bad_utf8 and whatever is not assigned: Cn
};

Category category(char32_t c);
inline bool is_letter(char32_t c) { return category(c) <= Category::Lo; }
inline bool is_mark(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Mn) < 3; }
inline bool is_number(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Nd) < 3; }
inline bool is_punctuation(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Pc) < 7; }
inline bool is_symbol(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Sm) < 4; }
bool is_whitespace(char32_t c);  ///< the property White_Space

char32_t to_lower(char32_t c);  ///< simple mappings: always one code point
char32_t to_upper(char32_t c);
std::string to_lower(std::string_view text);  ///< malformed bytes are kept as they are
std::string to_upper(std::string_view text);

/// Normalization form C (UAX 15). Malformed bytes are kept as they are.
std::string nfc(std::string_view text);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>json
// Owns: the Json value, its parser, its writer, its canonical form; numbers to and from text.
// Assumes: nothing about text. RFC 8259, strictly: what it leaves open is refused (duplicate keys,
// lone surrogates, invalid UTF-8, a byte order mark).
// Promises: integers exact to 64 bits, doubles correctly rounded both ways and printed as short as
// they read back the same, members in their order; no locale; output is always valid UTF-8.

namespace valar {
inline namespace v1 {

/// How deep arrays and objects nest, and how many values a text holds, before it is refused.
inline constexpr uint32_t json_depth_limit = 128;
inline constexpr uint32_t json_value_limit = 2'000'000;

struct JsonLimits {
    uint32_t depth  = json_depth_limit;
    uint32_t values = json_value_limit;
};

/// How a Json is written. Default: compact, {"a":[1,2]}. All keep non-ASCII characters.
struct JsonStyle {
    bool spaced = false;  ///< ", " and ": " as Python's json.dumps
    int  indent = -1;     ///< 0 and more: one item a line, so many spaces a level, and ": "
};
inline constexpr JsonStyle json_pretty{false, 2};
inline constexpr JsonStyle json_python{true, -1};  ///< json.dumps(x, ensure_ascii=False)

struct JsonMember;
namespace detail { class JsonParser; }

/// A JSON value of 16 bytes. Objects keep the order of their members. Nothing converts silently:
/// an `as_` accessor of another kind gives its fallback, `[]` of a missing place gives null.
/// Copies are deep; copy, compare, write and destroy recurse as deep as the value nests.
/// Threads: const use from any number; otherwise one at a time.
class Json {
public:
    enum class Kind : uint8_t { null, boolean, int64, uint64, real, string, array, object };

    Json() noexcept = default;
    Json(std::nullptr_t) noexcept {}
    template <class T> requires std::is_arithmetic_v<T>
    Json(T value) noexcept {
        if constexpr (std::is_same_v<T, bool>) store(Kind::boolean, value);
        else if constexpr (std::is_floating_point_v<T>) store(Kind::real, double(value));
        else if constexpr (std::is_signed_v<T>) store(Kind::int64, int64_t(value));
        else if (uint64_t(value) > uint64_t(INT64_MAX)) store(Kind::uint64, uint64_t(value));
        else store(Kind::int64, int64_t(value));
    }
    Json(std::string_view text);
    Json(const char* text) : Json(std::string_view(text)) {}
    Json(std::string text);
    Json(std::vector<Json> items);
    Json(const void*) = delete;  // a pointer is not a boolean
    Json(Json&& other) noexcept : node_(std::exchange(other.node_, Node{})) {}
    Json(const Json& other);
    Json& operator=(Json other) noexcept { swap(other); return *this; }
    ~Json() { if (kind() >= Kind::string) destroy(); }

    static Json array() { return Json(Kind::array); }
    static Json object() { return Json(Kind::object); }
    /// All of `text` as one value. Errors: invalid_request, code "invalid_json", line and column
    /// (both from 1; columns count code points).
    static Result<Json> parse(std::string_view text, JsonLimits limits = {});

    Kind kind() const { return node_.kind; }
    bool is_null() const { return node_.kind == Kind::null; }
    bool is_bool() const { return node_.kind == Kind::boolean; }
    bool is_int() const { return node_.kind == Kind::int64; }  ///< within int64_t
    bool is_integer() const { return node_.kind == Kind::int64 || node_.kind == Kind::uint64; }
    bool is_real() const { return node_.kind == Kind::real; }  ///< point, exponent, or huge
    bool is_number() const { return node_.kind >= Kind::int64 && node_.kind <= Kind::real; }
    bool is_string() const { return node_.kind == Kind::string; }
    bool is_array() const { return node_.kind == Kind::array; }
    bool is_object() const { return node_.kind == Kind::object; }

    bool     as_bool(bool fallback = false) const;
    int64_t  as_int(int64_t fallback = 0) const;     ///< an integer within int64_t
    uint64_t as_uint(uint64_t fallback = 0) const;   ///< an integer that is not negative
    double   as_double(double fallback = 0) const;   ///< any number, to the nearest double
    /// Borrowed until this value is changed, moved or destroyed.
    std::string_view as_string(std::string_view fallback = {}) const;
    std::string take_string();  ///< moves a string out and leaves null; not a string: empty

    size_t size() const;  ///< items of an array, members of an object, else 0
    bool empty() const { return size() == 0; }
    std::span<const Json> items() const;  ///< of an array, else none
    std::span<Json> items();
    std::span<const JsonMember> members() const;  ///< of an object, in order, else none
    const Json& operator[](size_t index) const;  ///< null when there is no such item
    const Json& operator[](int index) const { return (*this)[size_t(index)]; }
    const Json& operator[](std::string_view key) const;  ///< null when there is no such member
    const Json& operator[](const char* key) const { return (*this)[std::string_view(key)]; }
    const Json* find(std::string_view key) const;  ///< nullptr when there is no such member
    Json* find(std::string_view key);
    bool contains(std::string_view key) const { return find(key) != nullptr; }

    /// Adds an item; null becomes an array first; any other kind is replaced by one.
    Json& push(Json value) &;
    Json push(Json value) && { push(std::move(value)); return std::move(*this); }
    /// Adds or, in its place, replaces a member; null becomes an object first; any other kind is
    /// replaced by one. Returns *this: Json::object().set("a", 1).set("b", Json::array()).
    Json& set(std::string_view key, Json value) &;
    Json set(std::string_view key, Json value) && {
        set(key, std::move(value));
        return std::move(*this);
    }
    bool erase(std::string_view key);  ///< keeps the order of the others
    void reserve(size_t count);        ///< room for so many items or members

    std::string write(JsonStyle style = {}) const;
    void write_to(std::string& out, JsonStyle style = {}) const;  ///< appends
    /// One text per value, for fingerprints: keys sorted by code point, no white space, numbers
    /// that are whole and fit 64 bits as integers (1.0 = 1, -0 = 0), others as the shortest double.
    std::string canonical() const;

    void swap(Json& other) noexcept { std::swap(node_, other.node_); }
    /// Same kind and value; 1 and 1.0 differ. The order of members does not matter.
    bool operator==(const Json& other) const;

private:
    struct Object;
    struct Node {
        alignas(8) char bytes[14] = {};  // a scalar, a pointer, or a string of up to 14 bytes
        uint8_t short_size = 0;          // of that string; long_string: the bytes hold a pointer
        Kind    kind = Kind::null;
    };
    static constexpr uint8_t long_string = 255;
    explicit Json(Kind kind) noexcept { node_.kind = kind; }  // an empty array or object
    template <class T> T load() const { T v; std::memcpy(&v, node_.bytes, sizeof v); return v; }
    template <class T> void store(Kind kind, T v) {
        node_.kind = kind;
        std::memcpy(node_.bytes, &v, sizeof v);
    }
    bool is_long() const { return node_.short_size == long_string; }
    const Object* object_or_null() const { return is_object() ? load<Object*>() : nullptr; }
    void store_text(std::string_view text);
    void destroy() noexcept;
    friend class detail::JsonParser;

    Node node_;
};

struct JsonMember {
    std::string key;
    Json        value;
};

namespace detail {
/// The shortest decimal that reads back as `value`, spelled as Python's repr: "1.0", "1e-07",
/// "1e+16"; not finite: "null".
std::string write_double(double value);
/// A whole JSON number, to the nearest double (ties to even). Refused: any other spelling, and
/// what rounds to infinity. Kind invalid_request, code "invalid_json".
Result<double> parse_double(std::string_view text);
/// Appends `text` as a JSON string with its quotes; bytes that are not UTF-8 become U+FFFD.
void write_json_string(std::string& out, std::string_view text);
}  // namespace detail

}  // namespace v1
}  // namespace valar

// >>api
// Owns: the request, item, response and event types of the HTTP surfaces, to and from JSON; the
//       validation that needs no model; the Responder interface, the only seam between the wire and
//       inference.
// Assumes: JSON that was parsed by >>json.
// Promises: a request that validates holds only what this version can do; what it cannot do was
//           refused with 400 and the dotted path of the field, never silently ignored.

namespace valar {
inline namespace v1 {

/// Who speaks. In requests all six; answers are the assistant's.
enum class Role : uint8_t { system, developer, user, assistant, tool, function };

/// A piece of an item's content; all of them are text in this version.
struct ContentPart {
    enum class Kind : uint8_t { input_text, output_text, refusal };
    Kind        kind = Kind::input_text;
    std::string text = {};
};

/// One item of a conversation: what was said, by whom (contract, 3.2).
struct Item {
    enum class Kind : uint8_t { message, reasoning, function_call, function_call_output,
                                custom_tool_call, custom_tool_call_output };
    Kind                     kind      = Kind::message;
    Role                     role      = Role::user;
    std::vector<ContentPart> content   = {};  ///< messages, reasoning, outputs of calls
    std::string              call_id   = {};  ///< calls and their outputs
    std::string              name      = {};  ///< calls
    std::string              arguments = {};  ///< calls: JSON in a string, or custom input

    static Item message(Role role, std::string text);
    std::string text() const;  ///< all parts of content, joined
};

/// What a request asks: a text (one user message), or items.
struct Input {
    Input() = default;
    Input(const char* words) : text(words) {}
    Input(std::string words) : text(std::move(words)) {}
    Input(std::string_view words) : text(words) {}
    Input(std::vector<Item> turns) : items(std::move(turns)) {}

    std::string       text  = {};  ///< used when items is empty
    std::vector<Item> items = {};
    bool empty() const { return text.empty() && items.empty(); }
};

/// When an answer is wanted (contract, section 7): ahead of everything; fair among themselves; when
/// nothing else waits. Waiting makes a request more urgent, so that nothing starves.
enum class Window : uint8_t { asap, standard, flex };

/// A request for one answer, in C++ or from POST /v1/responses. Field by field as contract.md,
/// section 3; what is absent takes the model's own default.
struct Request {
    std::string           model             = {};  ///< empty: the responder's only or first model
    std::string           instructions      = {};  ///< becomes the first system message
    Input                 input             = {};
    std::optional<uint32_t> max_output_tokens = {};  ///< none: until the context is full
    std::optional<double> temperature       = {};  ///< 0..2; 0 is greedy
    std::optional<double> top_p             = {};  ///< 0..1; 0 keeps only the most likely token
    std::optional<int64_t> seed             = {};  ///< none: drawn at acceptance
    uint32_t              top_logprobs      = 0;   ///< 0..20 alternatives of each token
    bool                  logprobs          = false;  ///< return log-probabilities
    std::string           prompt_cache_key  = {};  ///< prefixes of one key are kept together
    std::string           user              = {};
    std::vector<std::pair<std::string, std::string>> metadata = {};
    std::optional<uint32_t> top_k           = {};  ///< C++ only; 0: no limit
    std::optional<double> min_p             = {};  ///< C++ only; 0: no limit
    std::string           organisation      = {};  ///< set by the server from the key
    Window                window            = Window::standard;
    std::vector<std::string> stop           = {};  ///< ends the answer before the first of these
    /// Added to the logits of these tokens: -100..100.
    std::vector<std::pair<int32_t, double>> logit_bias = {};
    double presence_penalty   = 0;  ///< -2..2: off the logit of every token the answer has
    double frequency_penalty  = 0;  ///< -2..2: the same, times how often it has it
    double repetition_penalty = 1;  ///< 0.1..10: divides logits above 0, multiplies those below, of
                                    ///< every token of prompt and answer
    bool                  background        = false;  ///< of the server: answered at once with 202
    bool                  store             = true;   ///< of the server: kept once answered
    std::string           previous_response_id = {};  ///< of the server: its turns come first
};

/// How far a response is. It never moves back.
enum class Status : uint8_t { pending, running, completed, failed, cancelled };
constexpr bool is_terminal(Status status) { return status >= Status::completed; }

/// Tokens in and out (contract, 3.1).
struct Usage {
    uint32_t input_tokens     = 0;
    uint32_t cached_tokens    = 0;  ///< of the input, found in the prefix cache
    uint32_t output_tokens    = 0;
    uint32_t reasoning_tokens = 0;  ///< of the output
};

/// One generated token with its natural log-probability under the model's own distribution.
struct TokenLogprob {
    struct Alternative {
        std::string bytes = {};
        float       logprob = 0;
    };
    std::string              bytes   = {};  ///< of the token; may be part of a character
    float                    logprob = 0;
    std::vector<Alternative> top     = {};  ///< most likely first
};

/// Where the time of one request went.
struct Timings {
    uint64_t queue_us = 0, prefill_us = 0, decode_us = 0;
};

/// The end of a response. `text` is the whole answer, valid UTF-8.
struct Outcome {
    Status      status     = Status::completed;  ///< terminal
    std::string text       = {};
    bool        cut        = false;  ///< ended by max_output_tokens or by a full context
    Usage       usage      = {};
    Timings     timings    = {};
    std::vector<TokenLogprob> logprobs = {};  ///< when asked for, a token each
    std::optional<Error>      error    = {};  ///< when failed or cancelled
    std::string               stopped_by = {};  ///< the one of Request::stop that ended it
};

/// What happened to a response, in order: started once, text_delta any number, finished once.
struct Event {
    enum class Kind : uint8_t { started, text_delta, finished };
    Kind        kind = Kind::started;
    std::string text = {};                               ///< of a text_delta: whole characters
    std::shared_ptr<const Outcome> outcome = {};         ///< of finished
    /// Of a text_delta, when asked for: the tokens since the one before; the text may be empty.
    std::vector<TokenLogprob> logprobs = {};

    /// The text of a text_delta, else nothing. Borrowed from the event.
    std::optional<std::string_view> text_delta() const {
        if (kind != Kind::text_delta) return std::nullopt;
        return std::string_view(text);
    }
};

/// A model that a Responder serves.
struct ModelInfo {
    std::string              id;
    std::vector<std::string> aliases  = {};
    int64_t                  created  = 0;  ///< unix seconds
    std::string              owned_by = "valar";
    uint32_t                 context_tokens = 0;
    std::vector<std::string> windows  = {"asap", "standard", "flex"};
    bool image = false, tools = false, thinking = false;
    bool ready = true;  ///< false while it loads: it is listed, and requests for it wait
};

/// A request that a Responder found acceptable, with all that it resolved. Cheap to hold: bounded by
/// the prompt's tokens.
class Prepared {
public:
    virtual ~Prepared() = default;
    std::string model;             ///< the id of the model that will answer
    uint32_t    input_tokens = 0;
    double      temperature  = 1;  ///< effective
    double      top_p        = 1;  ///< effective
    int64_t     seed         = 0;  ///< effective
};

/// How busy a Responder is, and what it did so far.
struct ResponderStats {
    uint32_t queued = 0, running = 0;
    uint64_t completed = 0, failed = 0, cancelled = 0;
    uint64_t input_tokens = 0, output_tokens = 0;
    uint64_t cached_tokens = 0;    ///< of the input, found in the prefix cache
    uint32_t pages = 0;            ///< of keys and values, in all
    uint32_t pages_used = 0;       ///< by running requests
    uint32_t pages_cached = 0;     ///< used by none, kept for prefixes
    uint32_t pages_shared = 0;     ///< used by several
    uint64_t preempted = 0;        ///< times a request gave way to be resumed later
    uint64_t batches = 0, batch_rows = 0;  ///< computed: forward passes, and tokens in them
    uint64_t drafted_tokens = 0, accepted_tokens = 0;  ///< of those: guessed, and guessed right
    uint64_t queue_us = 0, prefill_us = 0, decode_us = 0;  ///< sums over finished requests
};

/// Something that answers requests: the Engine, a scripted fake in tests, a proxy.
/// Threads: every member from any thread. It outlives the Server that uses it.
class Responder {
public:
    virtual ~Responder() = default;
    virtual std::vector<ModelInfo> models() const = 0;
    /// Every refusal that needs the model comes from here: unknown model (not_found, code
    /// "model_not_found", param "model"), context too small (invalid_request,
    /// "context_length_exceeded", param "input"), template errors.
    virtual Result<std::unique_ptr<Prepared>> prepare(const Request& request) = 0;
    /// Queues it under an id that is not in use. Fails with `overloaded` or `closed` only.
    virtual Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) = 0;
    /// The next event of `id`; nothing when there is none now or the id is unknown. After `finished`
    /// was taken the id is forgotten.
    virtual std::optional<Event> poll(const std::string& id) = 0;
    /// Ends it at the next step with status cancelled; unknown and finished ids are ignored.
    virtual void cancel(const std::string& id) = 0;
    virtual ResponderStats stats() const = 0;
    /// `ready(context, id)` is called, from any thread and without locks held, when `id` has events
    /// after poll said it had none. One listener; null takes it away and waits for calls under way.
    virtual void on_ready(void (*ready)(void* context, const std::string& id), void* context) = 0;
};

/// Which of the two dialects of the contract (section 13 lists the differences).
enum class Dialect : uint8_t { valar, openai };

/// A response as GET /v1/responses/{id} shows it: the request's echo and what became of it.
struct ResponseRecord {
    std::string id;                 ///< "resp_" + 24 of [0-9a-z]
    std::string organisation;
    std::string message_id;         ///< "msg_" + 24 of [0-9a-z]
    int64_t     created_at   = 0;   ///< unix seconds
    int64_t     completed_at = 0;   ///< 0 until terminal
    Status      status       = Status::pending;
    std::string model;              ///< as the request spelled it
    Json        request = {};       ///< the body as received, for the echoed fields
    double      temperature  = 1;   ///< effective
    double      top_p        = 1;
    int64_t     seed         = 0;
    std::shared_ptr<const Outcome> outcome = {};  ///< once terminal
};

/// A body of POST /v1/responses, checked in the contract's order: missing required fields in table
/// order, other fields in document order, rules across fields. Errors: invalid_request with code and
/// param; the message says what is wrong, what was received and what is allowed.
Result<Request> parse_response_request(const Json& body, Dialect dialect = Dialect::valar);
/// The response object, all keys of contract 3.1 in their order.
Json render_response(const ResponseRecord& record, Dialect dialect = Dialect::valar);
/// The items of a request's input as GET /v1/responses/{id}/input_items lists them, oldest first:
/// in their long form, those without an id with one made of `response_id` and their place.
std::vector<Json> render_input_items(const Json& request, const std::string& response_id);
/// {"error":{message,type,param,code}}. An error that is our own fault (500) keeps its message to
/// itself: it may name a file.
Json render_error(const Error& error);
/// The HTTP status of an error's kind (contract, section 2).
int http_status(ErrorKind kind);

}  // namespace v1
}  // namespace valar

// >>gguf
// Owns: the model file: metadata, tensor directory, table of tensor types; the writer.
// Assumes: little-endian GGUF v2 or v3, in one file or in split files name-00001-of-0000N.gguf.
// Promises: every count, length, offset and product from the file is checked before it is used;
// errors name the file and the key or tensor. Nothing is copied: keys, strings and tensor names
// are views into the mapped file (or the caller's bytes), valid as long as the Gguf lives, and
// they stay valid when it is moved.

namespace valar {
inline namespace v1 {

/// How a tensor's numbers are stored; the values are those in the file.
enum class TensorType : uint32_t {
    f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11,
    q4_k = 12, q5_k = 13, q6_k = 14, iq2_xxs = 16, iq2_xs = 17, iq3_xxs = 18, iq1_s = 19,
    iq4_nl = 20, iq3_s = 21, iq2_s = 22, iq4_xs = 23, i8 = 24, i16 = 25, i32 = 26, i64 = 27,
    f64 = 28, iq1_m = 29, bf16 = 30, tq1_0 = 34, tq2_0 = 35, mxfp4 = 39, nvfp4 = 40, q1_0 = 41,
};

/// A row is stored in blocks of `block_size` values, `block_bytes` each.
struct TypeInfo {
    const char* name;  // as people write it: "Q4_K"
    uint32_t block_size;
    uint32_t block_bytes;
};

/// Null for a type that is not known. Being known does not mean that kernels can compute with it.
VALAR_API const TypeInfo* type_info(TensorType type);

/// One entry of the directory. `dims[0]` is the length of a row, the fastest index in memory:
/// a matrix of `dims[1]` output rows by `dims[0]` input columns.
struct TensorInfo {
    std::string_view name;
    TensorType type = TensorType::f32;
    uint32_t n_dims = 0;                 // 1 to 4; the rest of dims is 1
    uint64_t dims[4] = {1, 1, 1, 1};
    uint64_t offset = 0;                 // from the start of its file
    uint64_t bytes = 0;
    uint32_t file = 0;                   // index of the split file, 0 first
};

/// Kinds of metadata values; the values are those in the file.
enum class GgufType : uint32_t {
    u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, boolean = 7, string = 8,
    array = 9, u64 = 10, i64 = 11, f64 = 12,
};

/// The strings of an array, in order; each is a view: for (std::string_view text : strings).
class GgufStrings {
public:
    class Iterator {
    public:
        explicit Iterator(const std::byte* at) : at_(at) {}
        std::string_view operator*() const {
            return {reinterpret_cast<const char*>(at_) + 8, length()};
        }
        Iterator& operator++() {
            at_ += 8 + length();
            return *this;
        }
        bool operator==(const Iterator& other) const { return at_ == other.at_; }

    private:
        size_t length() const {
            uint64_t n;
            std::memcpy(&n, at_, 8);
            return static_cast<size_t>(n);
        }
        const std::byte* at_;
    };
    GgufStrings() = default;
    GgufStrings(const std::byte* begin, const std::byte* end, size_t count)
        : begin_(begin), end_(end), count_(count) {}
    size_t size() const { return count_; }
    Iterator begin() const { return Iterator(begin_); }
    Iterator end() const { return Iterator(end_); }

private:
    const std::byte* begin_ = nullptr;
    const std::byte* end_ = nullptr;
    size_t count_ = 0;
};

/// The numbers of an array, of whatever width the file has; at(i) needs i < size().
template <class T>
class GgufNumbers {
public:
    GgufNumbers() = default;
    GgufNumbers(const std::byte* data, size_t count, GgufType type)
        : data_(data), count_(count), type_(type) {}
    size_t size() const { return count_; }
    T operator[](size_t i) const {
        switch (type_) {
            case GgufType::u8:
            case GgufType::boolean: return load<uint8_t>(i);
            case GgufType::i8: return load<int8_t>(i);
            case GgufType::u16: return load<uint16_t>(i);
            case GgufType::i16: return load<int16_t>(i);
            case GgufType::u32: return load<uint32_t>(i);
            case GgufType::i32: return load<int32_t>(i);
            case GgufType::f32: return load<float>(i);
            case GgufType::u64: return load<uint64_t>(i);
            case GgufType::i64: return load<int64_t>(i);
            default: return load<double>(i);
        }
    }

private:
    template <class Stored> T load(size_t i) const {
        Stored value;
        std::memcpy(&value, data_ + i * sizeof value, sizeof value);  // the file does not align
        return static_cast<T>(value);
    }
    const std::byte* data_ = nullptr;
    size_t count_ = 0;
    GgufType type_ = GgufType::u8;
};

/// One metadata entry. For an array `type` is that of its elements.
struct GgufKey {
    std::string_view name;
    GgufType type = GgufType::u8;
    bool is_array = false;
    size_t count = 1;                       // elements
    std::span<const std::byte> data = {};   // as in the file; each string with its length before it
};

/// Bytes fetched on demand, for a model inside an archive. `read` fills `dst` with `size` bytes
/// from `offset` and returns whether it could; it is called from any thread that reads tensors.
struct GgufReader {
    bool (*read)(void* context, uint64_t offset, void* dst, size_t size) = nullptr;
    void* context = nullptr;
    uint64_t size = 0;           // of the whole file
    std::string name = "model";  // for messages
};

/// A model file, opened: metadata and directory parsed, tensor bytes within reach.
/// Threads: const members from any thread at a time.
class VALAR_API Gguf {
public:
    static constexpr uint64_t max_keys = 65536;
    static constexpr uint64_t max_tensors = 262144;
    static constexpr uint64_t max_name_bytes = 255;       // of a key or a tensor
    static constexpr uint64_t max_alignment = 1 << 20;
    static constexpr uint64_t max_split_files = 1024;
    static constexpr uint64_t max_header_bytes = 1 << 28;  // metadata and directory of a file

    /// Maps the file; of split files, name the first and all are opened.
    static Result<Gguf> open(const std::string& path);
    /// Borrows `bytes` for its lifetime. `name` is for messages.
    static Result<Gguf> from_bytes(std::span<const std::byte> bytes, std::string name = "model");
    static Result<Gguf> from_reader(GgufReader reader);

    const std::string& name() const { return files_[0].name; }
    uint32_t version() const { return version_; }

    // Metadata of the first file. `find` gives null for a key that is absent. A getter without
    // `fallback` fails (not_found) where the key is absent; every getter fails where it has
    // another type, or a sign or size that does not fit.
    const std::vector<GgufKey>& keys() const { return keys_; }  // in the order of the file
    const GgufKey* find(std::string_view key) const;
    Result<uint64_t> get_uint(std::string_view key) const;      // any integer type, not negative
    Result<uint64_t> get_uint(std::string_view key, uint64_t fallback) const;
    Result<double> get_float(std::string_view key) const;       // f32 or f64
    Result<double> get_float(std::string_view key, double fallback) const;
    Result<bool> get_bool(std::string_view key) const;
    Result<bool> get_bool(std::string_view key, bool fallback) const;
    Result<std::string_view> get_string(std::string_view key) const;  // any bytes, maybe not UTF-8
    Result<std::string_view> get_string(std::string_view key, std::string_view fallback) const;
    Result<GgufStrings> get_strings(std::string_view key) const;
    Result<GgufNumbers<int64_t>> get_ints(std::string_view key) const;    // integers but u64, bools
    Result<GgufNumbers<double>> get_floats(std::string_view key) const;   // f32 or f64

    const std::vector<TensorInfo>& tensors() const { return tensors_; }  // in the order of files
    const TensorInfo* find_tensor(std::string_view name) const;
    /// The bytes where they lie; `unsupported` for a reader. A mapped file keeps the alignment
    /// that the file states (32 by default); borrowed bytes only as far as the caller's span does.
    Result<std::span<const std::byte>> tensor_bytes(const TensorInfo& tensor) const;
    /// Copies dst.size() bytes from `offset` on within the tensor; every source can.
    Result<void> read_tensor(const TensorInfo& tensor, uint64_t offset,
                             std::span<std::byte> dst) const;
    /// These bytes of the tensor will not be read again soon (a hint; mapped files only).
    void release(const TensorInfo& tensor, uint64_t offset = 0, uint64_t length = UINT64_MAX) const;

private:
    friend class GgufWriter;
    struct File {
        std::string name;
        uint64_t size = 0;
        std::span<const std::byte> bytes;  // the whole file; for a reader, its header
        detail::MappedFile map;
        detail::Buffer header;             // owns `bytes` for a reader
        GgufReader reader;
    };
    static Result<Gguf> parse_first(File file, const std::string& path);
    static Result<File> map_file(const std::string& path);
    Result<void> parse_file(File file);
    static Result<void> fetch_header(File& file, uint64_t length);
    Result<void> open_splits(const std::string& path);
    Result<void> index_tensors();
    Error fail(ErrorKind kind, std::string_view key, const char* what) const;
    Error fail(ErrorKind kind, const TensorInfo& tensor, const char* what) const;
    Result<const GgufKey*> typed(std::string_view key, bool is_array, uint32_t types,
                                 const char* wanted) const;

    std::vector<File> files_;
    std::vector<GgufKey> keys_;
    std::vector<uint32_t> keys_by_name_;
    std::vector<TensorInfo> tensors_;
    std::vector<uint32_t> tensors_by_name_;
    uint32_t version_ = 0;
};

/// Collects keys and tensors, then writes one GGUF v3 file. Whatever Gguf would refuse (a key or
/// tensor given twice, a size that does not match its shape) is reported by to_bytes and write.
class VALAR_API GgufWriter {
public:
    explicit GgufWriter(uint32_t alignment = 32);  // a power of two from 8 on

    void set_string(std::string_view key, std::string_view value);
    void set_strings(std::string_view key, std::span<const std::string_view> values);
    /// T is bool, float, double or an integer of 8 to 64 bits, and chooses the type in the file.
    template <class T> void set(std::string_view key, T value) {
        put(key, type_of<T>(), false, 1, {reinterpret_cast<const char*>(&value), sizeof value});
    }
    template <class T> void set_array(std::string_view key, std::span<const T> values) {
        put(key, type_of<T>(), true, values.size(),
            {reinterpret_cast<const char*>(values.data()), values.size_bytes()});
    }
    void set(const GgufKey& key);  // as another file has it
    /// `bytes` is borrowed until the file is written; dims[0] is the row length, as in TensorInfo.
    void add_tensor(std::string_view name, TensorType type, std::span<const uint64_t> dims,
                    std::span<const std::byte> bytes);

    Result<std::vector<std::byte>> to_bytes() const;
    Result<void> write(const std::string& path) const;

private:
    struct Tensor {
        std::string name;
        TensorType type;
        std::vector<uint64_t> dims;
        std::span<const std::byte> bytes;
    };
    template <class T> static constexpr GgufType type_of() {
        static_assert(std::is_integral_v<T> || std::is_same_v<T, float> ||
                      std::is_same_v<T, double>);
        if constexpr (std::is_same_v<T, bool>) return GgufType::boolean;
        else if constexpr (std::is_same_v<T, float>) return GgufType::f32;
        else if constexpr (std::is_same_v<T, double>) return GgufType::f64;
        else if constexpr (sizeof(T) == 8) return T(-1) < T(0) ? GgufType::i64 : GgufType::u64;
        else if constexpr (sizeof(T) == 4) return T(-1) < T(0) ? GgufType::i32 : GgufType::u32;
        else if constexpr (sizeof(T) == 2) return T(-1) < T(0) ? GgufType::i16 : GgufType::u16;
        else return T(-1) < T(0) ? GgufType::i8 : GgufType::u8;
    }
    void put(std::string_view key, GgufType type, bool is_array, uint64_t count,
             std::string_view data);
    Result<void> check(std::span<const std::byte> bytes) const;

    std::string keys_;   // encoded as in the file
    uint64_t n_keys_ = 0;
    std::vector<Tensor> tensors_;
    uint32_t alignment_;
};

}  // namespace v1
}  // namespace valar

// >>kernels
// Owns: the numeric definition below, the scalar reference of every kernel, one region per
//       instruction set, the table of kernels chosen once, the worker team.
// Assumes: little-endian IEEE 754 binary32 and binary64, round to nearest even, denormals kept.
// Promises: every kernel of every table gives the bits of its scalar twin.
//
// ---- The numeric definition, numerics = 1 ----------------------------------------------------
//
// All arithmetic is binary32 unless "double" is said. "a + b", "a * b", "a / b", "sqrt" round once,
// to nearest even. fma(a, b, c) is a * b + c rounded once. Sums are sequences: the order below is
// the order of operations. Nothing else may be fused or reordered.
//
//  1. Activation blocks. A vector x of n values (n a multiple of 32) that meets quantized weights
//     is cut into blocks of 32. Of a block: amax = max |x_i|. If amax < 2^-100: d = 0, all h_i = 0.
//     If an x_i is not finite: d is not a number, all h_i = 0 (so it shows in the logits, an
//     error). Else d = amax / 127, inv = 127 / amax, h_i = the integer nearest to the exact product
//     x_i * inv (ties to even), clamped to -127..127. (precision = fast: this one plane.)
//     precision = fine adds a second plane: r_i = fma(-d, h_i, x_i), d2 = d / 254, inv2 = inv *
//     254, l_i = the integer nearest to the exact product r_i * inv2 (ties to even), clamped to
//     -127..127; d = 0 or no number gives d2 = d, l_i = 0. A plane is a vector of blocks of its
//     own, (d, h) or (d2, l). Of a block also: hsum = sum of h_i (exact integer), s = d *
//     float(hsum); of the second plane with d2 and l_i.
//  2. Dot product of a row of quantized weights and one plane: acc = 0, then block after block, in
//     ascending order, with w_i the integers of the row's block and dw, m its scales (binary16 made
//     binary32, exact):
//       Q4_0 (w = nibble - 8), Q5_0 (w = 5 bits - 16), Q8_0 (w = int8):
//           acc = fma(float(sum w_i h_i), dw * d, acc)
//       Q4_1 (w = nibble):
//           acc = fma(float(sum w_i h_i), dw * d, acc); acc = fma(m, s, acc)
//       Q4_K (w = nibble), Q5_K (w = 5 bits): a block is one of the eight sub-blocks of 32, dw = D
//           * sc, m = -(Dmin * mn), with D, Dmin the super-block's scales and sc, mn the
//           sub-block's 6-bit integers (both products are exact, m may be -0); then as Q4_1.
//       Q6_K (w = 6 bits - 32): a block is two sub-blocks of 16 with int8 scales sc0, sc1; dw = D:
//           S = sc0 * sum w_i h_i (first 16) + sc1 * sum w_i h_i (last 16) (exact integer, below
//             2^24)
//           acc = fma(float(S), dw * d, acc)
//     Two planes: y = acc of plane one + acc of plane two.
//     The output matrix (logits) always uses two planes, whatever the precision.
//  3. F32, F16 and BF16 rows meet the unquantized x: acc = 0; acc = fma(w_k, x_k, acc) for
//     ascending k.
//  4. A bias is added to the finished sum: y + b. A residual: x + y.
//  5. Sum along a vector ("16 lanes"): lane j adds the elements i = j, j + 16, j + 32 ... in that
//     order, starting from 0; then lane j (j < 8) = lane j + lane j+8; j < 4: + lane j+4; j < 2: +
//     lane j+2; lane 0 + lane 1 is the sum. Elements past the end add nothing.
//  6. RMS norm: ss = 16-lane sum where adding an element is lane = fma(x_i, x_i, lane);
//     scale = 1 / sqrt(ss / float(n) + eps); y_i = (x_i * scale) * w_i.
//  7. exp(x), x in binary32: x < -87 gives 0; x > 88 counts as 88. k = the integer nearest to the
//     exact product x * log2e (ties to even; log2e = 0x1.715476p+0f); r = fma(-k, ln2_hi, x);
//     r = fma(-k, ln2_lo, r) (ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f); p = c6;
//     p = fma(p, r, c5) ... down to c0 = 1 (c1 = 1); the result is p * 2^k (exact; k in -126..127).
//     exp(0) = 1. c2 = 0x1.fffffcp-2f, c3 = 0x1.555492p-3f, c4 = 0x1.5558bp-5f, c5 =
//     0x1.123994p-7f, c6 = 0x1.6a4e0cp-10f (least maximal relative error on +-ln(2)/2: 3.1e-9
//     before rounding).
//  8. silu(x) = x / (1 + exp(-x)). Feed-forward: h_i = silu(gate_i) * up_i.
//  9. Rope. Frequencies, in double: f_i = exp2(-(2 i / n_rot) * log2(base)) for pair i (one
//     quotient, its sign changed, one product), times or divided by what the model's scaling says
//     (each one double operation, rounded); angle = position as double * f_i (rounded); its cos and
//     sin in double (12), rounded to binary32: c, s.
//     A pair (a, b), elements (2i, 2i+1) for "norm" rope and (i, i + n_rot/2) for "neox":
//       t = b * s;  a' = fma(a, c, -t);    t = b * c;  b' = fma(a, s, t).
// 10. Attention, for one query head and one position. q' = rope(q) * (1 / sqrt(head_dim)) (the
//     factor is a binary32 number of the model: attention_scale; one multiplication an element).
//     Keys and values are stored as binary16 (rounded to nearest even, too large is infinity) or
//     binary32 (kv_type). Keys are stored rotated. Positions are cut into segments of 256 absolute
//     positions (0..255, 256..511, ...). In a segment, over its visible positions j in ascending
//     order:
//       score_j: acc = 0; acc = fma(q'_e, k_j,e, acc) for ascending e
//       m = max score_j (a zero is +0);  p_j = exp(score_j - m)
//       l = 16-lane sum of p_j, lane = j mod 16 by absolute position, adding is lane + p_j; tree as
//         in 5
//       o_e = 0; o_e = fma(p_j, v_j,e, o_e) for ascending j
//     Segments are merged in ascending order: the first one gives (M, L, O) = (m, l, o); for each
//     next,
//       M' = max(M, m); a = exp(M - M'); b = exp(m - M'); L = fma(l, b, L * a);
//       O_e = fma(o_e, b, O_e * a); M = M'.
//     Result: O_e * (1 / L). A segment without visible positions is skipped.
// 11. An embedding row is dequantized: d * w for types without minimum (Q6_K: (D * sc) * w, D * sc
//     exact), fma(dw, w, m) with a minimum (Q4_K, Q5_K: dw, m as in 2); F16, BF16, F32: the value.
//     Where the model scales it (embedding_scale), each value is multiplied once.
// 12. rope_math: functions in double, from + - * / that round once each, never fused. nearest(x) is
//     the nearest integer, ties to even. 1/n! and 1/n are one quotient (n! is exact).
//       exp2(x): x < -1022 gives 0, x >= 1023 infinity. k = nearest(x); t = (x - k) *
//         0x1.62e42fefa39efp-1; p = 1/13!; p = p * t + 1/n! for n = 12 down to 0; the result is p *
//         2^k (exact).
//       log2(x), x > 0 (0 gives -infinity, less no number): x = m * 2^e with 1 <= m < 2; where
//         m > 0x1.6a09e667f3bcdp+0: m = m / 2, e = e + 1. u = (m - 1) / (m + 1); z = u * u; p =
//         1/23; p = p * z + 1/n for n = 21, 19 .. 1; the result is e + (u * p) *
//         0x1.71547652b82fep+1.
//       log(x) = log2(x) * 0x1.62e42fefa39efp-1.
//       sin, cos (x), |x| < 2^30: k = nearest(x * 0x1.45f306dc9c883p-1);
//         r = ((x - k * 0x1.921fb544p+0) - k * 0x1.0b4611a6p-34) - k * 0x1.3198a2ep-69; z = r * r;
//         S = 1/17!; S = S * z - 1/15!; S = S * z + 1/13!; .. (signs alternate) .. + 1; S = r * S;
//         C = 1/16!; C = C * z - 1/14!; C = C * z + 1/12!; .. + 1;
//         (sin, cos) = (S, C), (C, -S), (-S, -C), (-C, S) for k mod 4 = 0, 1, 2, 3.
//       (Within 1e-15 relative, sin and cos 1e-15 absolute to |x| = 2^20.)
// 13. A forward pass. x = the token's embedding row (11). In each layer: y = rms_norm(x); q, k, v =
//     the matrix products with y (1 to 3), each plus its bias where there is one (4); rope of q and
//     k (9); attention (10); x = x + attn_output matrix times it (plus bias); y = rms_norm(x); gate
//     and up = products with y; h as in 8; x = x + ffn_down matrix times h. Logits: the output
//     matrix (the embedding where there is none) times rms_norm(x). base and the factors of rope
//     are binary32 numbers of the model; attention_scale, where the model says nothing, is
//     1 / sqrt(float(head_dim)).
// ----------------------------------------------------------------------------------------------

namespace valar {
inline namespace v1 {

/// How exactly activations meet quantized weights: one int8 plane (fast) or two (fine).
enum class Precision : uint8_t { fast, fine };
/// How keys and values are stored.
enum class KvType : uint8_t { f16, f32 };

namespace detail {

inline constexpr int      kNumerics        = 1;    ///< version of the numeric definition
inline constexpr uint32_t kTileRows        = 16;   ///< rows of a packed tile: a lane is a row
inline constexpr uint32_t kActivationBlock = 32;
inline constexpr uint32_t kSegment         = 256;  ///< positions of an attention segment
inline constexpr uint32_t kKeyGroup        = 16;   ///< keys stored side by side

/// A block of one activation plane (definition, 1).
struct ActivationBlock {
    float   d;       ///< scale
    float   s;       ///< d * float(sum of all q)
    int32_t sum[2];  ///< sums of q[0..15] and q[16..31]
    int8_t  q[32];   ///< -127..127
};
static_assert(sizeof(ActivationBlock) == 48);

/// A weight matrix in tiles of 16 rows: tile after tile; inside a tile block after block of 32
/// columns, each with its scales beside it (layouts: implementation part, "packed layouts"). F32,
/// F16, BF16: (column, 16 rows). The last tile's missing rows are zero weights.
struct PackedMatrix {
    TensorType       type = TensorType::f32;
    uint32_t         rows = 0;
    uint32_t         cols = 0;
    const std::byte* data = nullptr;  ///< 64-byte aligned; borrowed
    uint32_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

bool     kernel_type_supported(TensorType type);
uint64_t packed_tile_bytes(TensorType type, uint32_t cols);  ///< a multiple of 64
/// Packs tiles first_tile .. last_tile - 1. `source` holds the matrix's rows in GGUF layout from
/// row first_tile * 16 on; `out` is where tile `first_tile` goes.
void pack_tiles(TensorType type, uint32_t rows, uint32_t cols, const std::byte* source,
                uint32_t first_tile, uint32_t last_tile, std::byte* out);
/// One row of a packed matrix as binary32 (definition, 11).
void dequantize_row(const PackedMatrix& matrix, uint32_t row, float* out);

/// y[column * y_stride + row] for the rows of tiles first_tile .. last_tile - 1 (rows past the
/// matrix's end are not written), all columns.
struct MatmulTask {
    const PackedMatrix*    weights;
    uint32_t               first_tile;
    uint32_t               last_tile;
    uint32_t               columns;
    uint32_t               planes;         ///< 1 or 2, quantized weights
    const ActivationBlock* blocks;         ///< (columns, planes, cols / 32), quantized weights
    const float*           x;              ///< (columns, x_stride), F32 F16 BF16 weights
    size_t                 x_stride;
    float*                 y;
    size_t                 y_stride;
};

/// One segment of attention for queries that share a key/value head (definition, 10).
struct AttentionTask {
    KvType             kv_type;
    uint32_t           head_dim;
    uint32_t           queries;
    const float*       q;         ///< (queries, q_stride), rotated and scaled
    size_t             q_stride;
    const uint16_t*    begin;     ///< (queries) first visible position, within the segment: 0..256
    const uint16_t*    end;       ///< (queries) one past the last; begin == end: none visible
    const void* const* keys;      ///< (16) groups of 16 positions: (head_dim, 16) elements each;
    const void* const* values;    ///< (16) groups: (16, head_dim); null where nobody looks
    float*             max;       ///< (queries) outputs; queries that see nothing are left alone
    float*             sum;       ///< (queries)
    float*             out;       ///< (queries, out_stride)
    size_t             out_stride;
};

/// The table of kernels of one instruction set. All pointers are filled. Alignment of float and
/// block arrays: 16 bytes unless said.
struct Kernels {
    const char* name;  ///< "scalar", "avx2", ...: what VALAR_ISA names
    /// x (n) to planes: out (planes, n / 32).
    void (*quantize)(const float* x, size_t n, uint32_t planes, ActivationBlock* out);
    void (*matmul)(const MatmulTask& task);
    void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);
    /// In place over heads (n_heads, head_dim); cos_sin (n_rot / 2, 2) of this position.
    void (*rope)(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
                 const float* cos_sin);
    void (*scale)(float* x, float factor, size_t n);            ///< x_i *= factor
    void (*add)(float* x, const float* y, size_t n);            ///< x_i += y_i
    void (*silu_mul)(float* gate, const float* up, size_t n);   ///< gate_i = silu(gate_i) * up_i
    /// Stores one position's key and value of one kv head into its groups, at slot 0..15.
    void (*store_kv)(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
                     void* key_group, void* value_group);
    void (*attention)(const AttentionTask& task);
    /// Merges a segment (m, l, o) into the state (M, L, O), n values; definition, 10.
    void (*attention_merge)(float* max, float* sum, float* out, float m, float l, const float* o,
                            size_t n);
};

/// The tables that this build and this CPU have, best last; [0] is the scalar reference.
std::span<const Kernels* const> available_kernels();
/// The best table, or the one that the environment's VALAR_ISA names; unknown or unusable: an
/// Error.
Result<const Kernels*> choose_kernels();

/// Scalar building blocks of the definition, for other sections (bit-exact everywhere).
float  exact_fma(float a, float b, float c);     ///< a * b + c, rounded once
float  exact_exp(float x);                       ///< definition, 7
double exact_exp2(double x);                     ///< rope_math
double exact_log2(double x);
double exact_log(double x);                      ///< exact_log2(x) * ln 2, for log-probabilities
void   exact_sincos(double x, double* sine, double* cosine);
float  half_to_float(uint16_t bits);
uint16_t float_to_half(float value);             ///< nearest even

/// Floating-point control of this thread set to the default (nearest even, no flush to zero, no
/// traps) while the object lives: hosts set flush-to-zero.
class FloatState {
public:
    FloatState();
    ~FloatState();
    FloatState(const FloatState&) = delete;
    FloatState& operator=(const FloatState&) = delete;

private:
    [[maybe_unused]] uint64_t saved_;
};

}  // namespace detail

/// The host's job system: calls job(context, i) for every i in 0 .. count-1, on any threads, in any
/// order, and returns when all have returned. No job waits for another.
using ParallelFor = void (*)(void* host, uint32_t count, void (*job)(void* context, uint32_t index),
                             void* context);

namespace detail {

/// The worker team: `helpers` threads beside the caller, or the host's job system.
/// `run` is one fork-join: job(context, part, parts) once for every part; parts() = helpers + 1.
/// Between begin() and end() helpers spin for the next stage (then sleep); outside they sleep, so
/// an idle engine costs nothing. Threads: one caller at a time. Every job runs under FloatState.
class Team {
public:
    static Result<std::unique_ptr<Team>> create(int helpers, ParallelFor parallel_for, void* host);
    ~Team();
    uint32_t parts() const;
    void begin();
    void end();
    void run(void (*job)(void* context, uint32_t part, uint32_t parts), void* context);

private:
    struct State;
    explicit Team(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>tokenizer
// Owns: tokens: byte-level BPE, SentencePiece BPE, special tokens, the streaming detokenizer.
// Assumes: a vocabulary may be hostile; text may be long, one single word, or not UTF-8.
// Promises: no special token from text that a request brought; O(n log n) in the text; the ids of
// Hugging Face tokenizers (byte-level) and of sentencepiece on the same vocabulary.

namespace valar {
inline namespace v1 {

/// The index of a token in the model's vocabulary.
using Token = int32_t;

/// What a token is for; the values are those in the file.
enum class TokenKind : uint8_t {
    normal = 1,        ///< a piece of text
    unknown = 2,       ///< stands for text that has no token
    control = 3,       ///< marks structure: turns, roles, the end
    user_defined = 4,  ///< a piece of text that is always taken whole
    unused = 5,        ///< not made from text
    byte = 6,          ///< one byte of text that has no token (SentencePiece)
};

namespace detail {
struct Vocabulary;
}

/// Text to tokens and back, for the vocabulary of one model.
///
/// Which tokens a text may spell:
///   control tokens         only where every byte came from the chat template;
///   user-defined tokens    the same if their spelling stands in the source of the chat template
///                          (a run of white space excepted), everywhere if it does not;
///   beginning, end of text and of turn, named by the file, count as control tokens.
/// The leftmost is taken, of several the longest. What lies between is one run of text: where the
/// request's bytes begin or end shows in nothing else. `add_space_prefix` puts its space at the
/// start of each run.
///
/// What no token stands for becomes byte tokens, else the unknown token, else nothing (byte-level
/// vocabularies may lack some control characters). Memory while encoding: 24 bytes for each byte
/// of the longest word (byte-level) or run (SentencePiece), beside the result.
///
/// Threads: immutable after `open`; every member from any thread. Copies share the vocabulary.
class VALAR_API Tokenizer {
public:
    static constexpr size_t max_vocabulary = 1 << 22;
    static constexpr size_t max_piece_bytes = 1024;
    static constexpr size_t max_text_bytes = size_t{1} << 30;

    /// Reads tokenizer.ggml.*; nothing of `file` is kept. `chat_template` is the template in use
    /// where it is not the file's own. Fails (unsupported) for a tokenizer.ggml.model other than
    /// gpt2 and llama or an unknown tokenizer.ggml.pre, (bad_data) for a malformed vocabulary.
    static Result<Tokenizer> open(const Gguf& file, std::string_view chat_template = {});

    size_t size() const;                      ///< ids are 0 .. size() - 1
    std::string_view piece(Token token) const;  ///< the bytes it stands for; empty if out of range
    TokenKind kind(Token token) const;        ///< unused if out of range
    /// The token of these bytes, an ordinary one before a special one.
    std::optional<Token> find(std::string_view piece) const;

    std::optional<Token> bos() const;  ///< begin of text
    std::optional<Token> eos() const;  ///< end of text (or of a turn: the file decides)
    bool add_bos() const;              ///< whether the model expects bos before a text
    bool add_eos() const;
    /// Ends an answer: the file's eos, eot and eom, and every control or user-defined token that
    /// is spelled like one of the known ends of turns (<|im_end|>, <|eot_id|>, <end_of_turn> ...).
    bool is_end(Token token) const;

    /// A rendered prompt. `add_bos` puts bos in front unless the text itself begins with it.
    Result<std::vector<Token>> encode(const MarkedText& text, bool add_bos = false) const;
    /// Plain text, all of it as if a request had brought it.
    Result<std::vector<Token>> encode(std::string_view text, bool add_bos = false) const;

private:
    friend class Detokenizer;
    explicit Tokenizer(std::shared_ptr<const detail::Vocabulary> vocabulary);
    Result<std::vector<Token>> encode(std::string_view text, std::span<const ByteRange> request,
                                      bool add_bos) const;
    std::shared_ptr<const detail::Vocabulary> vocabulary_;
};

/// Tokens to text as they come, always whole UTF-8: the bytes of an unfinished character are held
/// back, bytes that cannot become one turn into U+FFFD. Control and unknown tokens give nothing.
/// Threads: one at a time.
class VALAR_API Detokenizer {
public:
    /// At the start of a text the space that `add_space_prefix` models put there is taken away.
    explicit Detokenizer(const Tokenizer& tokenizer, bool at_start = true);
    /// The text that became ready; valid until the next call.
    std::string_view push(Token token);
    /// The end: what was held back, as U+FFFD. The next push begins a new text.
    std::string_view flush();

private:
    void take_ready(size_t count);
    std::shared_ptr<const detail::Vocabulary> vocabulary_;
    std::string ready_;
    std::string held_;
    bool at_start_;
};

}  // namespace v1
}  // namespace valar

// >>template
// Owns: the chat-template interpreter (Jinja as Hugging Face runs it: sandboxed and immutable,
//       trim_blocks, lstrip_blocks, break and continue) and the way from a request to a prompt.
// Assumes: nothing about the template (it comes from a model file), nothing about the request.
// Promises: every byte of the prompt that a request brought is marked as such, whatever the
// template
//           did to it; bounded steps, memory, depth and output; the same text for the same input.

namespace valar {
inline namespace v1 {

namespace detail {
struct TemplateProgram;
}

/// What a template sees: one variable for each member of the two objects; of a name that stands in
/// both, the one of `own`. The strings, keys included, numbers and punctuation of `request` are
/// text of the request wherever they or pieces of them are printed; `own` is as trusted as the
/// template. One exception: the `role` of a message that is one of the six roles of Role is the
/// template's, for there are templates that build a control token around it ('<|' + role + '|>').
struct TemplateInput {
    Json    request = Json::object();  ///< messages, tools
    Json    own     = Json::object();  ///< bos_token, eos_token, add_generation_prompt ...
    int64_t now_s   = 0;               ///< what strftime_now shows: unix time + the zone's offset
};

/// A chat template, parsed. What it does not know of Jinja it refuses by name and line: a statement
/// when it is parsed, a filter, test or method when it is used.
/// Threads: immutable after `parse`; every member from any thread. Copies share the program.
class VALAR_API ChatTemplate {
public:
    static constexpr size_t   max_source_bytes = size_t{1} << 20;
    static constexpr uint32_t max_nesting = 100;      ///< of blocks and brackets in the source
    static constexpr uint32_t max_calls   = 100;      ///< macros that call macros
    static constexpr uint32_t max_levels  = 600;      ///< of evaluation: 256 KiB of stack suffice
    static constexpr uint32_t max_value_depth = 256;  ///< lists in lists
    static constexpr uint32_t max_range   = 100'000;  ///< of range(), as in Jinja's sandbox
    static constexpr size_t   max_output_bytes = size_t{16} << 20;  ///< of any one string
    /// A step is one operation or `bytes_per_step` bytes of text or list made or searched: steps
    /// bound time and memory at once.
    static constexpr uint64_t max_steps = 1'000'000;
    static constexpr uint64_t bytes_per_step = 128;

    /// Errors: bad_data, with the line.
    static Result<ChatTemplate> parse(std::string source);
    /// The template of a model: its own, or without one ChatML, provided that the vocabulary has
    /// ChatML's two control tokens. Errors: as `parse`; unsupported.
    static Result<ChatTemplate> open(std::string source, bool has_chatml_tokens);

    /// Errors: invalid_request, with the line; what the template itself raises: its words alone.
    Result<MarkedText> render(const TemplateInput& input) const;

    const std::string& source() const;
    /// Whether a string literal of the template holds `word`: how one sees what it knows of.
    bool mentions(std::string_view word) const;

private:
    explicit ChatTemplate(std::shared_ptr<const detail::TemplateProgram> program);
    std::shared_ptr<const detail::TemplateProgram> program_;
};

/// The variables for `request`: messages (instructions first, as a system message; parts of text
/// joined; reasoning left out), add_generation_prompt, bos_token, eos_token, and tools and
/// documents as null. The role `developer` becomes `system` unless the template mentions it.
/// Errors: unsupported, with the item's path, for calls of tools and their outputs.
Result<TemplateInput> chat_input(const Request& request, const ChatTemplate& chat_template,
                                 std::string_view bos, std::string_view eos, int64_t now_s);

}  // namespace v1
}  // namespace valar

// >>model
// Owns: ModelSpec, which says as data what a decoder is, and the binding of a file's tensors to it.
// Assumes: a Gguf that outlives the binding.
// Promises: a spec that was read has sane sizes (limits below) and only options that a backend
// implements; a tensor that is missing, mis-shaped, unused or of an unsupported type is an error
// that names it.

namespace valar {
inline namespace v1 {

/// Which values of a head are rotated as a pair (RoPE, https://arxiv.org/abs/2104.09864).
enum class RopeKind : uint8_t {
    norm,  ///< neighbours: 2i and 2i + 1
    neox,  ///< halves: i and i + dims / 2
};

/// Pair i at position p turns by p * scale * base^(-2i / dims) / factor_i radians, where factor_i
/// is ModelSpec::rope_factors[i], or 1 where that is empty.
struct RopeSpec {
    RopeKind kind = RopeKind::norm;
    uint32_t dims = 0;   // the first `dims` values of a head turn, the rest stay; even
    float base = 10000;
    float scale = 1;     // linear scaling: 1 / factor
};

/// One layer: x += attention(rms_norm(x)); x += down(silu(gate(y)) * up(y)), y = rms_norm(x).
struct LayerSpec {
    uint32_t n_heads = 0;        // query heads; n_heads / n_kv_heads of them share a key head
    uint32_t n_kv_heads = 0;
    uint32_t head_dim = 0;       // of queries, keys and values
    uint32_t n_ff = 0;           // rows of gate and up
    bool qkv_bias = false;
    float attention_scale = 0;   // of query . key; 1 / sqrt(head_dim) unless the file says so
    RopeSpec rope;
};

/// What the network is. The embedding is multiplied by embedding_scale, the logits by logit_scale.
struct ModelSpec {
    static constexpr uint64_t max_layers = 1024;
    static constexpr uint64_t max_width = 1 << 20;    // n_embd, n_ff, n_heads * head_dim
    static constexpr uint64_t max_vocab = 1 << 24;
    static constexpr uint64_t max_context = 1 << 24;  // positions are exact in float up to here

    std::string architecture;
    std::string name;            // for people, may be empty
    uint32_t n_vocab = 0;
    uint32_t n_embd = 0;         // width of the residual stream
    uint32_t n_context = 0;      // positions it was trained for
    float norm_eps = 0;          // of every RMS norm
    float embedding_scale = 1;
    float logit_scale = 1;
    std::vector<float> rope_factors;  // (dims / 2), positive, the same for all layers; or empty
    bool tied_output = false;    // the output matrix is the token embedding
    std::vector<LayerSpec> layers;
};

/// Tensors of one layer, shapes as (rows, columns); a row is contiguous. Never null but the
/// biases, which are null where the layer has none. Norms and biases are F32.
struct LayerTensors {
    const TensorInfo* attn_norm = nullptr;    // (n_embd)
    const TensorInfo* q = nullptr;            // (n_heads * head_dim, n_embd)
    const TensorInfo* k = nullptr;            // (n_kv_heads * head_dim, n_embd)
    const TensorInfo* v = nullptr;            // (n_kv_heads * head_dim, n_embd)
    const TensorInfo* q_bias = nullptr;       // (n_heads * head_dim)
    const TensorInfo* k_bias = nullptr;       // (n_kv_heads * head_dim)
    const TensorInfo* v_bias = nullptr;       // (n_kv_heads * head_dim)
    const TensorInfo* attn_output = nullptr;  // (n_embd, n_heads * head_dim)
    const TensorInfo* ffn_norm = nullptr;     // (n_embd)
    const TensorInfo* gate = nullptr;         // (n_ff, n_embd)
    const TensorInfo* up = nullptr;           // (n_ff, n_embd)
    const TensorInfo* down = nullptr;         // (n_embd, n_ff)
};

/// All tensors, pointing into Gguf::tensors(): valid while that Gguf lives, moved or not.
struct ModelTensors {
    const TensorInfo* token_embd = nullptr;   // (n_vocab, n_embd)
    const TensorInfo* output_norm = nullptr;  // (n_embd)
    const TensorInfo* output = nullptr;       // (n_vocab, n_embd); equals token_embd when tied
    std::vector<LayerTensors> layers;
};

/// Reads what the file's architecture is: `llama` or `qwen2`.
VALAR_API Result<ModelSpec> read_model_spec(const Gguf& gguf);
/// Finds every tensor that the spec needs and checks shape and type. Matrices are F32, F16, BF16,
/// Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K or Q6_K.
VALAR_API Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec);

}  // namespace v1
}  // namespace valar

// >>backend
// Owns: the interface that a device implements, and the CPU backend.
// Assumes: a ModelSpec whose tensors were bound; token ids below n_vocab.
// Promises: logits are a pure function of the file, the tokens before and the options that say so
//           (numeric definition): not of batch, chunks, pages, threads or kernels.

namespace valar {
inline namespace v1 {

/// How a model is held and computed. `kv_type` and `precision` are the options that may change
/// bits.
struct BackendOptions {
    Precision   precision      = Precision::fast;
    KvType      kv_type        = KvType::f16;
    uint32_t    kv_pages       = 0;   ///< pages in the pool
    uint32_t    page_tokens    = 16;  ///< positions a page, a multiple of 16
    uint32_t    max_batch_rows = 512; ///< rows of one batch at most
    uint32_t    max_logit_rows = 1;   ///< rows of one batch that may want logits
    uint32_t    max_positions  = 0;   ///< of one sequence; 0: as many as all pages hold
    int         threads        = -1;  ///< helpers beside the caller; -1: physical cores - 1
    ParallelFor parallel_for   = nullptr;  ///< the host's job system instead of own threads
    void*       parallel_for_host = nullptr;
};

/// Bytes that a loaded model takes.
struct MemoryPlan {
    uint64_t weights = 0;  ///< packed
    uint64_t kv      = 0;
    uint64_t scratch = 0;
    uint64_t mapped  = 0;  ///< pages of the file that stay in use
    uint64_t total() const { return weights + kv + scratch; }
};

namespace detail {

/// One row of a batch: a token at a position of a sequence. `pages` lists the sequence's pages, in
/// order of position; the page of `position` is already there. A row sees the positions 0 ..
/// position of its sequence: those of earlier batches and those of earlier rows of this batch.
struct BatchRow {
    Token           token     = 0;
    const float*    embedding = nullptr;  ///< (n_embd) instead of the token's, or null
    uint32_t        position  = 0;
    const uint32_t* pages     = nullptr;  ///< borrowed until the batch is done
    bool            logits    = false;    ///< wanted for this row
};

/// A device that runs a ModelSpec. Threads: one at a time.
class Backend {
public:
    virtual ~Backend() = default;
    /// Whether the numeric promise holds here.
    virtual bool exact() const = 0;
    /// Loads the next slice of weights; true when all is there. `progress` (0..1) may be null.
    virtual Result<bool> load(uint64_t budget_us, float* progress) = 0;
    /// Takes a batch; the rows of one sequence in ascending order of position. Rows are borrowed
    /// until advance() says done.
    virtual Result<void> begin(std::span<const BatchRow> rows) = 0;
    /// Computes on until done (true), or until the first boundary past the deadline (false; 0: no
    /// deadline). Non-finite logits: an Error that names the layer; the batch is given up.
    virtual Result<bool> advance(uint64_t deadline_ns) = 0;
    /// Gives up a batch that was begun: its positions count as not computed.
    virtual void abandon() = 0;
    /// The logits (n_vocab) of the i-th row that wanted them; valid until the next begin().
    virtual std::span<const float> logits(uint32_t i) const = 0;
    /// Copies whole pages inside the pool; bytes of one page out and in (position-free layout).
    virtual void copy_page(uint32_t from, uint32_t to) = 0;
    virtual size_t page_bytes() const = 0;
    virtual void export_page(uint32_t page, std::byte* out) const = 0;
    virtual void import_page(uint32_t page, const std::byte* in) = 0;
};

/// What the CPU backend would take, to the byte; takes nothing. Errors: an option out of range.
Result<MemoryPlan> plan_cpu(const ModelSpec& spec, const ModelTensors& tensors,
                            const BackendOptions& options);
/// The CPU backend, with its worker team. Nothing is loaded yet: call load() until it says true.
/// `gguf`, `spec` and `tensors` are borrowed for its life. Kernels: choose_kernels() unless given.
Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const ModelTensors& tensors,
                                                  const BackendOptions& options,
                                                  const Kernels* kernels = nullptr);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>sampler
// Owns: logits to token: penalties, bias, greedy, temperature, top_k, top_p, min_p, seed;
//       log-probabilities.
// Assumes: finite logits.
// Promises: the same bytes everywhere: a function of (logits, options, position, tokens before)
//           alone; ties go to the lower token id; no allocation after the first calls.

namespace valar {
inline namespace v1 {
namespace detail {

/// In this order, as Hugging Face has it: penalties and bias; logits / temperature; the top_k most
/// likely; of those the fewest that together reach top_p; of those the ones at least min_p times as
/// likely as the first.
struct SamplerOptions {
    double   temperature = 1;  ///< 0: greedy
    double   top_p       = 1;
    double   min_p       = 0;
    uint32_t top_k       = 0;  ///< 0: no limit
    int64_t  seed        = 0;
    double   presence_penalty   = 0;  ///< as in Request
    double   frequency_penalty  = 0;
    double   repetition_penalty = 1;
    std::vector<std::pair<Token, float>> logit_bias = {};
};

/// Draws tokens for one sequence. Threads: one at a time.
class Sampler {
public:
    explicit Sampler(const SamplerOptions& options);
    /// The tokens of the prompt, before the first draw; makes room for `most_drawn` more.
    void see_prompt(std::span<const Token> tokens, size_t most_drawn);
    /// A token that was drawn and taken.
    void see(Token token);
    /// The token at `position` (of the token that is drawn).
    Token sample(std::span<const float> logits, uint64_t position);

private:
    struct Candidate {
        float logit;
        Token token;
    };
    struct Seen {
        Token    token;
        uint32_t drawn;  // times; 0: in the prompt only
    };
    friend struct CandidateOrder;
    std::span<const float> adjust(std::span<const float> logits);
    void   keep_top(std::span<const float> logits);
    void   keep_within(std::span<const float> logits, double below);
    Token  draw_from_all(std::span<const float> logits, double uniform);
    Token  draw_from_best(std::span<const float> logits, double uniform);
    double add_blocks(std::span<const float> logits);

    SamplerOptions         options_;
    double                 scale_;       // of a logit's distance to the highest
    float                  highest_ = 0;
    std::vector<Candidate> candidates_;  // most likely first
    std::vector<double>    sums_;        // of weights, a block of the vocabulary each
    bool                   penalised_;
    std::vector<Seen>      seen_;        // by token
    std::vector<float>     adjusted_;
};

/// A number in [0, 1) that depends on (seed, position) alone, 53 bits.
double uniform_at(int64_t seed, uint64_t position);
/// Natural log of the model's own distribution (before temperature and top_p): of `token`, and of
/// the `count` most likely ones, most likely first. `top` may be null when count is 0.
float logprob_of(std::span<const float> logits, Token token, uint32_t count,
                 std::pair<Token, float>* top);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>engine
// Owns: a loaded model and the requests on it: queue and scheduling, batches, pages and the prefix
//       cache, step(), streaming, cancel.
// Assumes: one thread at a time calls step(); everything else comes from any thread.
// Promises: submit never fails (a refused request is a Reply that is finished with its error); an
//           answer is a function of file, request and options, whatever else runs beside it;
//           nothing blocks but wait() and stop(); after opening no memory grows with the load but
//           that of the requests themselves.

namespace valar {
inline namespace v1 {

/// What an engine is made of. What a caller types first stands first.
struct EngineOptions {
    std::string  model_path     = {};   ///< a GGUF file (the first of a split one)
    std::vector<std::string> aliases = {};  ///< further ids that this model answers to
    std::string  model_id       = {};   ///< default: the file's general.name, else the file's name
    uint32_t context_tokens = 0;  ///< positions a request may use; 0: the model's, at most 8,192
    int threads = -1;             ///< helpers beside the caller; -1: physical cores - 1; 0: none
    Precision    precision      = Precision::fast;
    KvType       kv_type        = KvType::f16;
    uint32_t     max_queued     = 1000; ///< waiting requests; past it `overloaded`
    uint32_t     step_tokens    = 512;  ///< prompt tokens a batch at most, of all requests
    std::span<const std::byte> model_bytes =
        {};                             ///< instead of a path; borrowed for the engine's life
    GgufReader   model_reader   = {};   ///< instead of a path
    std::string  chat_template  = {};   ///< instead of the file's own
    ParallelFor  parallel_for   = nullptr;  ///< the host's job system instead of own threads
    void*        parallel_for_host = nullptr;
    LogSink      log            = {};
    uint32_t     max_running    = 16;   ///< requests computed side by side
    uint64_t     memory_limit   = 0;    ///< bytes of all that memory_plan() counts; what weights
                                        ///< and scratch leave is for keys and values. 0: keys and
                                        ///< values of two full contexts
    uint32_t     page_tokens    = 16;   ///< positions a page of keys and values, a multiple of 16
    bool         prefix_cache   = true; ///< keep what was computed for requests that begin alike
    bool         share_prefixes = false;  ///< among organisations too: for a single tenant
    uint32_t     standard_target_ms = 60'000;   ///< after this wait standard counts as asap
    uint32_t     flex_target_ms     = 300'000;  ///< after this wait flex counts as standard
    std::vector<Window> windows = {Window::asap, Window::standard, Window::flex};  ///< served here
    bool         speculation    = true; ///< guess tokens that the text had before and verify the
                                        ///< guesses: faster where it repeats, the same answer
};

namespace detail { struct Mailbox; }

/// The handle of one request. Movable; may outlive the Engine (then finished with `engine_closed`).
/// Dropping it cancels the request unless detach()ed. One made by hand is finished, with nothing.
/// Threads: one at a time.
class VALAR_API Reply {
public:
    Reply() = default;
    Reply(Reply&& other) noexcept;
    Reply& operator=(Reply&& other) noexcept;
    ~Reply();

    /// The next event, or nothing when there is none now. Never waits. Text that came since the
    /// last call comes as one text_delta.
    std::optional<Event> poll();
    /// Waits for the end while somebody else steps (start(), another thread); false after
    /// timeout_ms (-1: no limit). Events stay to be polled.
    bool wait(int64_t timeout_ms = -1);
    bool finished() const;        ///< the outcome is there; events may be left to poll
    /// The outcome; only once finished(). Valid while the Reply lives.
    const Outcome& outcome() const;
    void cancel();                ///< at the next step; what came so far stays
    void detach();                ///< dropping this handle no longer cancels
    const std::string& id() const;

private:
    friend class Engine;
    friend class Conversation;
    explicit Reply(std::shared_ptr<detail::Mailbox> mailbox);
    std::shared_ptr<detail::Mailbox> mailbox_;
};

/// A loaded model that answers requests. Movable handle over an object with a stable address.
/// Threads: submit, count_tokens, responder, is_loaded, load_progress from any thread; step, start,
/// stop and the destructor from one at a time. step() after start() is an error, not a race.
class VALAR_API Engine {
public:
    /// Loads the whole model. Errors name the file, key, tensor or option.
    static Result<Engine> open(const EngineOptions& options);
    /// Checks file and options and allocates; step() then loads in slices. Requests may be
    /// submitted at once and wait.
    static Result<Engine> begin_open(const EngineOptions& options);
    /// What open() would take, without loading.
    static Result<MemoryPlan> memory_plan(const EngineOptions& options);

    Engine(Engine&& other) noexcept;
    Engine& operator=(Engine&& other) noexcept;
    ~Engine();  ///< unfinished replies end with `engine_closed`

    Reply submit(const Request& request);
    /// Tokens of the prompt that this request makes. Errors: as of submit().
    Result<uint32_t> count_tokens(const Request& request) const;
    /// Works for about `budget_us` (stops at the first boundary past it; -1: until nothing is left
    /// to do): loads, computes, samples, emits. True while work is left. Errors: weights that
    /// cannot be read (every request ends with it); called after start(), or from two threads at
    /// once.
    Result<bool> step(int64_t budget_us = -1);
    /// Own thread that steps whenever there is work, until stop().
    Result<void> start();
    void stop();  ///< returns when the thread has ended; unfinished requests stay

    bool  is_loaded() const;
    float load_progress() const;  ///< 0..1
    const ModelSpec& spec() const;
    const Tokenizer& tokenizer() const;
    /// The seam to a Server; lives as long as the engine.
    Responder* responder();

private:
    friend class Conversation;
    struct State;
    explicit Engine(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

/// What a Conversation does when its context has no room for the next turn: refuse it
/// ("context_length_exceeded"), or forget the older half of its turns, again until there is room
/// (what is left has to be computed anew).
enum class WhenFull : uint8_t { refuse, drop_oldest_turns };

/// What a host and a model said, turn after turn. A turn is a request with all that was said before
/// it, so its answer is that of the same request by itself. Its keys and values stay in the prefix
/// cache until others need the room, so only what is new is computed, and a fork() shares them.
/// The engine must outlive it. Threads: one at a time; save() and restore() take their turn with
/// step(): they are an Error while it, or the thread of start(), is at work.
class VALAR_API Conversation {
public:
    /// `settings` is the request that every turn is made of: instructions, limits, sampling; its
    /// input, if there is any, is what was said before the first turn and is never forgotten.
    Conversation(Engine& engine, Request settings, WhenFull when_full = WhenFull::refuse);
    Conversation(Conversation&& other) noexcept;
    Conversation& operator=(Conversation&& other) noexcept;
    ~Conversation();

    /// The next turn. While the last one is not finished it is refused: "conversation_busy". An
    /// answer that was cut or cancelled counts as far as it came; a turn that failed, or was
    /// cancelled before its first word, was never said.
    Reply say(std::string_view words);
    /// What was said and is not forgotten, oldest first, without a turn that is not finished.
    std::span<const Item> items();
    uint32_t forgotten_turns() const;
    /// Another conversation that goes on from here. Error: "conversation_busy".
    Result<Conversation> fork();

    /// All of it as bytes, for a save game: settings and what was said and, with `pages`, the keys
    /// and values that the cache has of it (KvType and layers decide: 12 KiB a token and more), so
    /// that nothing needs to be computed again. Errors: "conversation_busy", memory.
    Result<std::vector<std::byte>> save(bool pages = true);
    /// What save() wrote. Errors (bad_data): a byte that is not as it was written; (unsupported):
    /// another version or model, or pages of an engine with other options.
    static Result<Conversation> restore(Engine& engine, std::span<const std::byte> saved);

private:
    struct State;
    explicit Conversation(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

// >>http
// Owns: HTTP/1.1 (RFC 9110, RFC 9112): the message parser, the event loop of a server, and a small
//       blocking client.
// Assumes: a handler that never blocks; what bodies mean is the handler's business, error bodies
//          included: http hands over status, code and message.
// Promises: framing that is ambiguous is refused, never guessed; every byte, second and connection
//           is bounded by a named limit; an idle connection costs less than 1 KB.

namespace valar {
inline namespace v1 {

/// Header fields in order of arrival.
using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

/// A reply, sent or received. The server adds Date, Content-Length and Connection by itself.
struct HttpReply {
    int         status = 200;
    HttpHeaders headers;
    std::string body;
    bool        close = false;  ///< end the connection after this reply
};

/// One request of the blocking client.
struct HttpCall {
    std::string host    = "127.0.0.1";  ///< a numeric address or "localhost"
    uint16_t    port    = 80;
    std::string method  = "GET";
    std::string target  = "/";
    HttpHeaders headers = {};
    std::string body    = {};
    int         timeout_ms      = 600'000;              ///< for the whole call
    uint64_t    max_reply_bytes = uint64_t{64} << 20;
};

/// Sends one request on a connection of its own and waits for the whole reply, whatever its status.
/// Errors: invalid_request (the call itself), io, timeout, bad_data (not HTTP), too_large.
/// Threads: any.
Result<HttpReply> http_call(const HttpCall& call);

namespace detail {

/// The first field of that name (ASCII case ignored), or null.
const std::string* find_header(const HttpHeaders& headers, std::string_view name);
size_t count_headers(const HttpHeaders& headers, std::string_view name);

/// A parsed request. Strings are as sent unless said otherwise.
struct HttpRequest {
    std::string method;
    std::string target;   ///< origin form, "/path?query", or "*"; absolute form is brought to it
    std::string host;     ///< "name" or "name:port", lower case; empty only under HTTP/1.0
    HttpHeaders headers;
    std::string body;
    NetAddress  peer;
    uint64_t    exchange = 0;  ///< names this request until it is answered; never used twice
    uint64_t    max_body = 0;  ///< on_head may change it; a longer body is refused with 413
    uint64_t    tag      = 0;  ///< the handler's own, kept from on_head to on_request
    std::optional<uint64_t> content_length;
    bool chunked         = false;
    bool keep_alive      = false;
    bool expect_continue = false;
    bool http_1_0        = false;

    bool is_head() const { return method == "HEAD"; }
    bool has_body() const { return chunked || content_length.value_or(0) > 0; }
    const std::string* header(std::string_view name) const { return find_header(headers, name); }
    size_t count(std::string_view name) const { return count_headers(headers, name); }
};

/// What bounds one message.
struct HttpLimits {
    uint32_t max_request_line_bytes = 8 << 10;   ///< 414; RFC 9112 asks for 8,000 or more
    uint32_t max_head_bytes         = 16 << 10;  ///< 431; header fields: a browser's cookies, a key
    uint32_t max_headers            = 100;       ///< 431; trailer fields are counted apart
    uint64_t max_body_bytes         = uint64_t{32} << 20;  ///< 413, unless on_head says otherwise
};

/// An incremental parser of one message after another: fed bytes, does no I/O. What it finds does
/// not depend on how the bytes are cut into pieces.
class HttpParser {
public:
    enum class Side : uint8_t { request, reply };
    enum class Event : uint8_t {
        more,      ///< all bytes used
        head,      ///< head complete, body not begun; set message.max_body now
        complete,  ///< body complete: take the message, then reset()
        fault,     ///< malformed: see status(), code(), reason(); only reset() leaves this state
    };

    HttpParser(const HttpLimits* limits, Side side = Side::request);  ///< limits: kept by pointer
    /// Goes on to the next event. The bytes after `*used` belong to it or to what follows.
    Event feed(std::string_view bytes, size_t* used);
    /// The stream has ended: complete when that is how this reply ends, else fault.
    Event end();
    void reset();
    /// Only before feeding a reply to HEAD: it has no body whatever its headers say.
    void expect_no_body() { no_body_ = true; }

    HttpRequest message;  ///< for a reply only headers, body and the framing are used

    int status() const { return status_; }  ///< of the reply read, or of the refusal after a fault
    std::string_view code() const;
    std::string_view reason() const { return reason_; }

private:
    enum class State : uint8_t {
        start_line, header_line, body, chunk_size, chunk_data, chunk_end, trailer, until_close,
        complete, fault
    };
    // Each step returns more to go on, or the event to report.
    Event fail(int status, const char* reason);
    bool  take_line(std::string_view bytes, size_t* used);
    bool  line_is_full();
    Event on_line();
    Event on_request_line();
    Event on_status_line();
    Event on_field();
    Event on_head_end();
    Event read_transfer_encoding();
    Event read_content_length();
    Event read_host();
    Event read_target();
    Event read_options();
    Event on_chunk_size();
    Event take_body(std::string_view bytes, size_t* used);
    bool  grow_body(size_t bytes);

    const HttpLimits* limits_;
    std::string       line_;
    uint64_t          body_left_    = 0;
    uint32_t          head_bytes_   = 0;  // also trailers and chunk extensions, once in the body
    uint32_t          fields_       = 0;
    int               status_       = 0;
    const char*       reason_       = "";
    Side              side_;
    State             state_        = State::start_line;
    bool              carriage_     = false;  // the last byte was CR
    bool              leading_line_ = false;  // one empty line was skipped
    bool              no_body_      = false;
};

/// Implemented by the user of HttpServer. All calls come from inside HttpServer::step.
///
/// An exchange: on_head; if it returns nothing, exactly one of on_request and on_closed; after
/// on_request, HttpServer::reply from any thread, or on_closed if the client is gone before it.
class HttpHandler {
public:
    virtual ~HttpHandler() = default;
    /// The head is here, the body not yet: authenticate, route, set request.max_body. A reply
    /// refuses: the body is not asked for (no 100 Continue), and if there is one the connection
    /// ends. Otherwise http itself refuses a body declared longer than max_body.
    virtual std::optional<HttpReply> on_head(HttpRequest& request) = 0;
    /// The request is complete. Answer with HttpServer::reply(request.exchange, ...), now or later.
    virtual void on_request(HttpRequest&& request) = 0;
    /// The client went away, or its body was refused: nobody waits for this exchange any more.
    virtual void on_closed(uint64_t exchange) = 0;
    /// The reply to a malformed or refused request: status 400 408 413 414 417 431 501 503 505;
    /// code "bad_request", "request_too_large" or "overloaded". Of `request` is there what was read
    /// before the fault.
    virtual HttpReply on_error(const HttpRequest& request, int status, std::string_view code,
                               std::string_view message) = 0;
    /// About every HttpOptions::tick_ms.
    virtual void on_tick() {}
};

/// Options of HttpServer. Each limit says what happens beyond it.
struct HttpOptions {
    std::string host = "127.0.0.1";
    uint16_t    port = 0;  ///< 0: any free one
    HttpLimits  limits = {};
    uint32_t max_connections         = 10'000;  ///< an idle one makes room, else 503
    uint64_t max_inflight_body_bytes = uint64_t{512} << 20;  ///< bodies not yet answered; 503
    uint32_t idle_timeout_ms   = 60'000;  ///< between requests; closed silently
    uint32_t header_timeout_ms = 10'000;  ///< from a head's first byte to its last; 408
    uint32_t body_timeout_ms   = 10'000;  ///< one window of the body's pace; 408
    uint32_t body_min_bytes    = 4 << 10;   ///< that must arrive in each window: 400 B/s by default
    uint32_t write_timeout_ms  = 30'000;  ///< without progress while a reply waits; closed
    uint32_t linger_timeout_ms = 5'000;   ///< to read what a refused client still sends; closed
    uint32_t drain_timeout_ms  = 10'000;  ///< for exchanges in work after stop(); closed
    uint32_t tick_ms           = 0;       ///< pace of on_tick; 0: never
    int      backlog           = 1024;    ///< of listen(); the system may cap it
};

/// An event loop: one thread calls step(), and no call inside blocks.
/// Threads: reply, post, stop and address from any; step from one at a time. The handler must
/// outlive the server. Destroying it closes what is open without a call to the handler.
class HttpServer {
public:
    static Result<HttpServer> open(const HttpOptions& options, HttpHandler* handler);
    HttpServer(HttpServer&& other) noexcept;
    HttpServer& operator=(HttpServer&& other) noexcept;
    ~HttpServer();

    NetAddress address() const;
    uint16_t port() const { return address().port; }
    /// Serves what is ready, waiting at most timeout_ms for it (-1: until something happens).
    /// False once stopped and drained.
    bool step(int timeout_ms);
    /// Stops accepting, ends idle connections, lets exchanges in work finish (drain_timeout_ms).
    void stop();
    /// Answers an exchange; without effect if its client is gone.
    void reply(uint64_t exchange, HttpReply reply);
    /// Has the loop call function(context) inside step(); dropped if the server is destroyed first.
    void post(void (*function)(void*), void* context);

    struct Stats {
        uint64_t accepted = 0, requests = 0, faults = 0, timeouts = 0;  ///< since open
        uint64_t connections = 0, body_bytes = 0;                       ///< now
    };
    Stats stats() const;  ///< only from the thread that calls step()

private:
    struct State;
    explicit HttpServer(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>store
// Owns: the responses that a server has accepted: the request as received, what was resolved when it
//       was accepted, the object that was answered; the reservations of idempotency keys.
// Assumes: ids that nobody can guess and that are never used twice.
// Promises: a record is seen by its own organisation only; what is not terminal never goes early;
//           what a completion reported is kept.

namespace valar {
inline namespace v1 {

/// What a Store keeps of one response.
struct StoredResponse {
    std::string id;
    std::string organisation;
    std::string reservation;  ///< key id and idempotency key; empty: none. Unique in its organisation
    std::string fingerprint;  ///< of the request that reserved it
    bool        background    = false;
    bool        terminal      = false;
    uint32_t    attempts      = 0;  ///< how often its work was begun
    int64_t     created_at_ms = 0;  ///< unix time
    int64_t     ended_at_ms   = 0;  ///< unix time; 0 until terminal
    std::shared_ptr<const std::string> head    = {};  ///< JSON: what acceptance resolved
    std::shared_ptr<const std::string> request = {};  ///< JSON: the body as received
    std::shared_ptr<const std::string> object  = {};  ///< JSON: as answered; null until terminal
};

/// Who holds a reservation.
struct Reservation {
    std::string id;
    std::string fingerprint;
    bool        deleted = false;  ///< the response is gone; the key stays taken until it expires
};

/// How a Store reports that a change is kept, or is not: one call, from any thread, also from inside
/// the call that asked for the change.
struct StoreDone {
    void (*call)(void* context, Result<void> result) = nullptr;
    void* context = nullptr;
};

/// Where a Server keeps its records. MemoryStore, or one of your own.
/// Threads: every member from any thread. Those with a StoreDone return at once and report when the
/// change cannot be lost any more; find may wait for a disk; the rest answer from memory.
class Store {
public:
    virtual ~Store() = default;
    /// A new record, not terminal, and its reservation, both or none. Errors: idempotency when the
    /// reservation is taken; overloaded when there is no room; io.
    virtual void add(StoredResponse record, StoreDone done) = 0;
    /// Work on it begins for the attempts-th time. Errors: not_found; io.
    virtual void begin(const std::string& id, uint32_t attempts, StoreDone done) = 0;
    /// Makes it terminal. Errors: not_found; overloaded; io.
    virtual void finish(const std::string& id, std::shared_ptr<const std::string> object,
                        int64_t now_ms, StoreDone done) = 0;
    /// Drops a record. With `tombstone` its reservation stays taken as long as it would have been.
    /// Errors: not_found, also where it is another organisation's; io.
    virtual void erase(const std::string& organisation, const std::string& id, bool tombstone,
                       int64_t now_ms, StoreDone done) = 0;
    /// Nothing when there is no such record or it is another organisation's.
    virtual std::optional<StoredResponse> find(std::string_view organisation,
                                               const std::string& id) = 0;
    virtual std::optional<Reservation> reserved(const std::string& organisation,
                                                const std::string& reservation) = 0;
    /// Ids of an organisation's records, newest first, those older than `after` (empty: from the
    /// newest). Errors: not_found when `after` is none of them.
    virtual Result<std::vector<std::string>> list(const std::string& organisation,
                                                  const std::string& after, size_t limit) = 0;
    /// The records that are not terminal, without head and request.
    virtual std::vector<StoredResponse> unfinished() = 0;
    /// Drops what has been terminal for longer than the store keeps it. Called about once a minute.
    virtual void expire(int64_t now_ms) = 0;
    virtual uint64_t bytes() const = 0;  ///< that records take
};

struct MemoryStoreOptions {
    uint64_t max_bytes   = uint64_t{256} << 20;  ///< past it the oldest terminal records go early
    int64_t  retention_s = 48 * 3600;            ///< of a terminal record
};

/// Records in memory, until the process ends.
class VALAR_API MemoryStore : public Store {
public:
    explicit MemoryStore(const MemoryStoreOptions& options = {});
    ~MemoryStore() override;
    void add(StoredResponse record, StoreDone done) override;
    void begin(const std::string& id, uint32_t attempts, StoreDone done) override;
    void finish(const std::string& id, std::shared_ptr<const std::string> object, int64_t now_ms,
                StoreDone done) override;
    void erase(const std::string& organisation, const std::string& id, bool tombstone,
               int64_t now_ms, StoreDone done) override;
    std::optional<StoredResponse> find(std::string_view organisation,
                                       const std::string& id) override;
    std::optional<Reservation> reserved(const std::string& organisation,
                                        const std::string& reservation) override;
    Result<std::vector<std::string>> list(const std::string& organisation,
                                          const std::string& after, size_t limit) override;
    std::vector<StoredResponse> unfinished() override;
    void expire(int64_t now_ms) override;
    uint64_t bytes() const override;

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

// >>server
// Owns: the routes of the Responses API: who may ask, what is asked, what is answered. Joins http,
//       a Store and any Responder; knows no engine.
// Assumes: Responders that outlive it, and a thread that calls run() or step().
// Promises: the contract's order of checks; an envelope and an X-Request-ID on every reply; the
//           loop never waits (two worker threads parse, validate, prepare and render); a terminal
//           object is rendered once; no body, prompt or key is ever logged.

namespace valar {
inline namespace v1 {

/// Who may use a server. Of the secret only its SHA-256 is kept.
struct ApiKey {
    std::string id           = {};         ///< for people: names the key, not secret
    std::string organisation = "default";  ///< whose records these are
    std::string secret       = {};         ///< 16 visible ASCII characters or more
    std::string secret_sha256 = {};        ///< in place of the secret: 64 hex digits
    uint32_t    requests_per_minute = 0;   ///< then 429 with Retry-After; 0: no limit
};

/// Reads a file of keys: a line each, `id organisation sha256 [requests-per-minute]`; empty lines
/// and those that begin with # are skipped. Errors: bad_data names the line; io, not_found.
Result<std::vector<ApiKey>> read_key_file(const std::string& path);

/// What a server is made of. What a caller types first stands first.
struct ServerOptions {
    uint16_t            port = 8080;         ///< 0: any free one
    std::string         host = "127.0.0.1";  ///< a numeric address or "localhost"
    std::vector<ApiKey> keys = {};  ///< none: anybody on this machine, organisation "default"
    bool allow_open = false;  ///< listen beyond loopback addresses although there are no keys
    /// Without keys the Host of a request must be localhost, 127.0.0.1, [::1] or one of these
    /// ("name", or "name:port").
    std::vector<std::string> allowed_hosts = {};
    /// Web pages of these origins ("https://example.org") may call. All others may not.
    std::vector<std::string> cors_origins = {};
    Dialect dialect = Dialect::valar;
    uint32_t sync_timeout_ms  = 600'000;  ///< then 504, and the work goes on
    uint32_t drain_timeout_ms = 10'000;   ///< after stop(); then what still runs is cancelled
    uint64_t max_body_bytes          = uint64_t{32} << 20;   ///< 413
    uint32_t max_connections         = 10'000;               ///< an idle one makes room, else 503
    uint64_t max_inflight_body_bytes = uint64_t{512} << 20;  ///< 503
    LogSink log   = {};       ///< a line a request: id, method, path, status, times, tokens
    /// Must outlive the server; null: a MemoryStore of its own. What it holds unfinished is taken up
    /// again, as the contract's section 6 says.
    Store*  store = nullptr;
    MemoryStoreOptions memory_store = {};  ///< of that one
    uint32_t max_queued = 1000;   ///< requests accepted but not begun; then 503
    bool     log_json   = false;  ///< the lines of requests are JSON objects
};

/// Serves Responders over HTTP. Movable handle over an object with a stable address.
/// Threads: stop() and port() from any; step(), run() and the destructor from one at a time.
class VALAR_API Server {
public:
    /// Listens. Errors: invalid_request names the option; io.
    static Result<Server> open(Responder* responder, const ServerOptions& options = {});
    /// A request goes to the first Responder that has its model.
    static Result<Server> open(std::span<Responder* const> responders,
                               const ServerOptions& options = {});
    Server(Server&& other) noexcept;
    Server& operator=(Server&& other) noexcept;
    ~Server();  ///< closes what is open and cancels what runs

    /// Serves until stop(), then lets what runs finish (drain_timeout_ms).
    Result<void> run();
    /// Serves what is ready, waiting at most timeout_ms for it (-1: until something happens). False
    /// once stopped and drained.
    Result<bool> step(int timeout_ms);
    void stop();
    uint16_t port() const;

private:
    struct State;
    explicit Server(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

#pragma pop_macro("max")
#pragma pop_macro("min")
#endif  // VALAR_HPP

#ifdef VALAR_IMPLEMENTATION
// ---------------------------------------------------------------------------------------------
// Implementation. All includes come first: a standard header included inside a target region
// would leak that region's instructions into shared functions.
// ---------------------------------------------------------------------------------------------
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "valar promises exact results: compile this file without -ffast-math and its parts"
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // false alarms of GCC 12 inside its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wrestrict"
#endif
#pragma push_macro("min")
#pragma push_macro("max")
#undef min
#undef max

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <winsock2.h>
#include <ws2tcpip.h>
#include <windows.h>
#include <bcrypt.h>
#else
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/syscall.h>
#elif defined(__APPLE__)
#include <sys/event.h>
#include <sys/sysctl.h>
#elif defined(__FreeBSD__) || defined(__OpenBSD__)
#include <sys/event.h>
#endif
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD)
#include <immintrin.h>
#elif defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(VALAR_NO_SIMD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#elif defined(__wasm_simd128__) && !defined(VALAR_NO_SIMD)
#include <wasm_simd128.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

// No compiler may fuse a product and a sum that the numeric definition keeps apart.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

// >>base
// Everything of the operating system but sockets: one function, one #if per system. POSIX comes
// last and is the pattern for whatever is neither Windows, Linux nor macOS.

namespace valar {
inline namespace v1 {
namespace detail {

Error make_error(ErrorKind kind, std::string message, std::string code, std::string param) {
    return Error{kind, std::move(message), std::move(code), std::move(param)};
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
    wchar_t wide[256];
    char text[512];
    const DWORD flags = FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS;
    const DWORD count = FormatMessageW(flags, nullptr, code, 0, wide, 256, nullptr);
    int size =
        WideCharToMultiByte(CP_UTF8, 0, wide, int(count), text, sizeof text, nullptr, nullptr);
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
    char text[128] = "";
    what += ": ";
    what += strerror_text(strerror_r(code, text, sizeof text), text);
    return make_error(kind, std::move(what));
}

#endif

// ---- clocks ---------------------------------------------------------------------------------

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
    return int64_t(filetime_ticks(now) / 10'000) - 11'644'473'600'000;  // from 1601 to 1970
}

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
int64_t unix_time_ms() { return int64_t(posix_clock_ns(CLOCK_REALTIME) / 1'000'000u); }

#endif

// ---- memory and files -----------------------------------------------------------------------

namespace {

constexpr size_t buffer_alignment = 64;
constexpr size_t buffer_from_system = size_t(1) << 20;  // from here on pages, not the heap

// A path for the system: text that a NUL would cut short is refused.
Result<void> check_path(const std::string& path) {
    if (!path.empty() && path.find('\0') == std::string::npos) return {};
    return make_error(ErrorKind::invalid_request,
                      path.empty() ? "a path is empty" : "a path contains a NUL byte");
}

#if defined(_WIN32)

std::wstring utf16_from(std::string_view text) {
    const int count = MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), nullptr, 0);
    std::wstring wide(size_t(count > 0 ? count : 0), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), wide.data(), count);
    return wide;
}

void* map_pages(size_t size, bool) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_pages(void* data, size_t) { VirtualFree(data, 0, MEM_RELEASE); }

struct FileHandle {  // closes itself
    HANDLE handle = INVALID_HANDLE_VALUE;
    ~FileHandle() { if (ok()) CloseHandle(handle); }
    bool ok() const { return handle != INVALID_HANDLE_VALUE && handle != nullptr; }
};

#else

#if defined(__wasi__)  // there mmap only reads and allocates: nothing to advise
int madvise(void*, size_t, int) { return 0; }
#endif

void* map_pages(size_t size, [[maybe_unused]] bool huge) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (huge) madvise(data, size, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
    return data;
}

void unmap_pages(void* data, size_t size) { munmap(data, size); }

struct FileHandle {  // closes itself
    int fd = -1;
    ~FileHandle() { if (ok()) ::close(fd); }
    bool ok() const { return fd >= 0; }
};

#endif
}  // namespace

Result<Buffer> Buffer::allocate(uint64_t bytes, const char* what, bool huge_pages) {
    Buffer buffer;
    if (bytes == 0) return buffer;
    if (bytes <= SIZE_MAX / 2) {
        const size_t size = size_t(bytes);
        if (size >= buffer_from_system) {
            buffer.data_ = static_cast<std::byte*>(map_pages(size, huge_pages));
        } else {
            void* p = ::operator new(size, std::align_val_t(buffer_alignment), std::nothrow);
            if (p != nullptr) buffer.data_ = static_cast<std::byte*>(std::memset(p, 0, size));
        }
    }
    if (buffer.data_ == nullptr)
        return make_error(ErrorKind::out_of_memory,
                          format("out of memory: %llu bytes for %s",
                                 static_cast<unsigned long long>(bytes), what));
    buffer.size_ = size_t(bytes);
    return buffer;
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, size_t(0))) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Buffer::~Buffer() {
    if (size_ >= buffer_from_system) unmap_pages(data_, size_);
    else ::operator delete(data_, std::align_val_t(buffer_alignment));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, size_t(0))) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

namespace {
Error file_too_large(const std::string& path, uint64_t size) {
    return make_error(ErrorKind::unsupported,
                      format("'%s' has %llu bytes: more than this process can address",
                             path.c_str(), static_cast<unsigned long long>(size)));
}
}  // namespace

#if defined(_WIN32)

Result<MappedFile> MappedFile::open(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    FileHandle file{CreateFileW(utf16_from(path).c_str(), GENERIC_READ,
                                FILE_SHARE_READ | FILE_SHARE_DELETE, nullptr, OPEN_EXISTING,
                                FILE_ATTRIBUTE_NORMAL, nullptr)};
    LARGE_INTEGER size{};
    if (!file.ok() || !GetFileSizeEx(file.handle, &size))
        return os_error("cannot open '" + path + "'");
    MappedFile mapped;
    if (size.QuadPart == 0) return mapped;
    const uint64_t bytes = uint64_t(size.QuadPart);
    if (bytes > SIZE_MAX / 2) return file_too_large(path, bytes);
    FileHandle section{CreateFileMappingW(file.handle, nullptr, PAGE_READONLY, 0, 0, nullptr)};
    const void* data = nullptr;
    if (section.ok()) data = MapViewOfFile(section.handle, FILE_MAP_READ, 0, 0, 0);
    if (data == nullptr) return os_error("cannot map '" + path + "'");
    mapped.data_ = static_cast<const std::byte*>(data);
    mapped.size_ = size_t(bytes);
    return mapped;
}

MappedFile::~MappedFile() { if (data_) UnmapViewOfFile(data_); }

void MappedFile::release(size_t offset, size_t length) const {
    // Unlocking pages that are not locked fails, and takes them out of the working set.
    if (offset <= size_ && length <= size_ - offset && length > 0)
        VirtualUnlock(const_cast<std::byte*>(data_) + offset, length);
}

#else

Result<MappedFile> MappedFile::open(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    FileHandle file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
    struct stat status{};
    if (!file.ok() || fstat(file.fd, &status) != 0) return os_error("cannot open '" + path + "'");
    if (!S_ISREG(status.st_mode))
        return make_error(ErrorKind::io, "cannot map '" + path + "': not a regular file");
    MappedFile mapped;
    const uint64_t size = uint64_t(status.st_size);
    if (size == 0) return mapped;
    if (size > SIZE_MAX / 2) return file_too_large(path, size);
    void* data = mmap(nullptr, size_t(size), PROT_READ, MAP_SHARED, file.fd, 0);
    if (data == MAP_FAILED) return os_error("cannot map '" + path + "'");
    mapped.data_ = static_cast<const std::byte*>(data);
    mapped.size_ = size_t(size);
    return mapped;
}

MappedFile::~MappedFile() { if (data_) munmap(const_cast<std::byte*>(data_), size_); }

void MappedFile::release(size_t offset, size_t length) const {
    if (offset > size_ || length > size_ - offset) return;
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t begin = (offset + page - 1) / page * page, end = (offset + length) / page * page;
    if (begin < end) madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

#endif

Result<std::string> read_file(const std::string& path, uint64_t limit) {
    if (auto checked = check_path(path); !checked) return checked.error();
#if defined(_WIN32)
    FileHandle file{CreateFileW(utf16_from(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr)};
#else
    FileHandle file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
#endif
    if (!file.ok()) return os_error("cannot open '" + path + "'");
    std::string text;
    char piece[16384];
    for (;;) {
#if defined(_WIN32)
        DWORD got = 0;
        if (!ReadFile(file.handle, piece, sizeof piece, &got, nullptr))
#else
        const ssize_t got = ::read(file.fd, piece, sizeof piece);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
#endif
            return os_error("cannot read '" + path + "'");
        if (got == 0) return text;
        if (uint64_t(got) > limit - text.size())
            return make_error(ErrorKind::too_large,
                              format("'%s' has more than %llu bytes", path.c_str(),
                                     static_cast<unsigned long long>(limit)));
        text.append(piece, size_t(got));
    }
}

namespace {

#if defined(_WIN32)

bool write_new_file(const std::string& path, std::span<const std::byte> bytes) {
    FileHandle file{CreateFileW(utf16_from(path).c_str(), GENERIC_WRITE, 0, nullptr, CREATE_NEW,
                                FILE_ATTRIBUTE_NORMAL, nullptr)};
    if (!file.ok()) return false;
    while (!bytes.empty()) {
        DWORD put = 0;
        const DWORD want = DWORD(std::min(bytes.size(), size_t(1) << 30));
        if (!WriteFile(file.handle, bytes.data(), want, &put, nullptr)) return false;
        bytes = bytes.subspan(put);
    }
    return FlushFileBuffers(file.handle) != 0;
}

bool replace_file(const std::string& from, const std::string& to) {
    return MoveFileExW(utf16_from(from).c_str(), utf16_from(to).c_str(),
                       MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
}

void remove_file(const std::string& path) {
    const DWORD cause = GetLastError();
    DeleteFileW(utf16_from(path).c_str());
    SetLastError(cause);
}

#else

bool write_new_file(const std::string& path, std::span<const std::byte> bytes) {
    FileHandle file{::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)};
    if (!file.ok()) return false;
    while (!bytes.empty()) {
        const ssize_t put = ::write(file.fd, bytes.data(), std::min(bytes.size(), size_t(1) << 30));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return false;
        bytes = bytes.subspan(size_t(put));
    }
    return fsync(file.fd) == 0;
}

bool replace_file(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) return false;
    const size_t slash = to.rfind('/');  // the new name is safe once its folder is
    const std::string folder = slash == std::string::npos ? "." : to.substr(0, slash + 1);
    FileHandle opened{::open(folder.c_str(), O_RDONLY | O_CLOEXEC)};
    if (opened.ok()) fsync(opened.fd);
    return true;
}

void remove_file(const std::string& path) {
    const int cause = errno;
    unlink(path.c_str());
    errno = cause;
}

#endif
}  // namespace

Result<void> write_file(const std::string& path, std::span<const std::byte> bytes) {
    if (auto checked = check_path(path); !checked) return checked.error();
    // Two writers at once differ in the address of their stack, one after another in the time.
    const uint64_t unique = monotonic_ns() ^ uint64_t(reinterpret_cast<uintptr_t>(&bytes)) << 20;
    const std::string temporary =
        path + format(".%llx.tmp", static_cast<unsigned long long>(unique));
    if (write_new_file(temporary, bytes) && replace_file(temporary, path)) return {};
    remove_file(temporary);
    return os_error("cannot write '" + path + "'");
}

// ---- threads --------------------------------------------------------------------------------

namespace {

struct ThreadStart {
    void (*function)(void*);
    void* context;
    char  name[16];  // Linux takes 15 bytes and the NUL
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
    return reinterpret_cast<uintptr_t>(CreateThread(nullptr, 0, thread_entry, start, 0, nullptr));
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
    errno = pthread_create(&thread, nullptr, thread_entry, start);
    const bool started = errno == 0;
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

int physical_cores() {
    int cores = 0;
#if defined(_WIN32)
    DWORD_PTR allowed = 0, system = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &allowed, &system);
    DWORD bytes = 0;
    GetLogicalProcessorInformation(nullptr, &bytes);
    std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> list(bytes / sizeof list[0] + 1);
    bytes = DWORD(list.size() * sizeof list[0]);
    if (!GetLogicalProcessorInformation(list.data(), &bytes)) bytes = 0;
    list.resize(bytes / sizeof list[0]);
    for (const auto& entry : list)
        cores += entry.Relationship == RelationProcessorCore && (entry.ProcessorMask & allowed);
#elif defined(__APPLE__)
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) != 0)
        sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0);
#elif defined(__linux__)
    // Logical CPUs of one core list the same siblings.
    cpu_set_t allowed;
    std::vector<std::string> seen;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) CPU_ZERO(&allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        auto siblings = read_file(
            format("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu), 4096);
        std::string text = siblings ? std::move(*siblings) : format("%d", cpu);
        if (std::find(seen.begin(), seen.end(), text) == seen.end())
            seen.push_back(std::move(text));
    }
    cores = int(seen.size());
#endif
#if !defined(_WIN32)
    if (cores < 1) cores = int(sysconf(_SC_NPROCESSORS_ONLN));
#endif
    return std::max(cores, 1);
}

void pause() {
#if defined(_WIN32)
    YieldProcessor();
#elif defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
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
    BOOL (WINAPI* wait)(volatile void*, void*, SIZE_T, DWORD) = nullptr;
    void (WINAPI* wake_all)(void*) = nullptr;
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
    __ulock_wake(ulock_compare_and_wait | ulock_wake_all,
                 const_cast<std::atomic<uint32_t>*>(word), 0);
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

// >>base: sockets
// Owns: the operating systems' TCP calls and readiness, each difference in one small function.
// Assumes: a call may fail at any time; EINTR and "would block" are no failures.
// Promises: what the declarations say, the same on every system.

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

#if defined(_WIN32)
using NetHandle = SOCKET;
using NetLength = int;
int net_errno() { return WSAGetLastError(); }
bool net_would_block(int error) { return error == WSAEWOULDBLOCK || error == WSAEINTR; }
bool net_connecting(int error) { return error == WSAEWOULDBLOCK; }
bool net_no_descriptor(int error) { return error == WSAEMFILE || error == WSAENOBUFS; }
#else
using NetHandle = int;
using NetLength = socklen_t;
int net_errno() { return errno; }
bool net_would_block(int error) {
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}
bool net_connecting(int error) { return error == EINPROGRESS || error == EINTR; }
bool net_no_descriptor(int error) {
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}
#endif

constexpr uint8_t mapped_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

NetHandle net_native(uintptr_t handle) { return static_cast<NetHandle>(handle); }

Error net_error(const std::string& what) {
    return make_error(ErrorKind::io, what + ": " + std::system_category().message(net_errno()));
}

/// Windows wants its sockets started once per process; the count it keeps makes this harmless
/// beside a host that does the same.
bool net_start() {
#if defined(_WIN32)
    static const bool started = [] {
        WSADATA data;
        return WSAStartup(MAKEWORD(2, 2), &data) == 0;
    }();
    return started;
#else
    return true;
#endif
}

void net_close(NetHandle handle) {
#if defined(_WIN32)
    ::closesocket(handle);
#else
    ::close(handle);
#endif
}

/// Non-blocking, not inherited by child processes, no SIGPIPE, no delay for small replies.
bool net_prepare(NetHandle handle) {
    const int on = 1;
    ::setsockopt(handle, IPPROTO_TCP, TCP_NODELAY, reinterpret_cast<const char*>(&on), sizeof on);
#if defined(_WIN32)
    u_long nonblocking = 1;
    return ::ioctlsocket(handle, static_cast<long>(FIONBIO), &nonblocking) == 0;
#else
#if defined(SO_NOSIGPIPE)
    ::setsockopt(handle, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    const int flags = ::fcntl(handle, F_GETFL, 0);
    return flags >= 0 && ::fcntl(handle, F_SETFL, flags | O_NONBLOCK) == 0 &&
           ::fcntl(handle, F_SETFD, FD_CLOEXEC) == 0;
#endif
}

NetLength net_pack(const NetAddress& address, sockaddr_storage* storage) {
    *storage = {};
    if (address.v4) {
        auto* out = reinterpret_cast<sockaddr_in*>(storage);
        out->sin_family = AF_INET;
        out->sin_port   = htons(address.port);
        std::memcpy(&out->sin_addr, address.ip + 12, 4);
        return static_cast<NetLength>(sizeof *out);
    }
    auto* out = reinterpret_cast<sockaddr_in6*>(storage);
    out->sin6_family = AF_INET6;
    out->sin6_port   = htons(address.port);
    std::memcpy(&out->sin6_addr, address.ip, 16);
    return static_cast<NetLength>(sizeof *out);
}

NetAddress net_unpack(const sockaddr_storage& storage) {
    NetAddress address;
    if (storage.ss_family == AF_INET) {
        const auto& in = reinterpret_cast<const sockaddr_in&>(storage);
        address.v4   = true;
        address.port = ntohs(in.sin_port);
        std::memcpy(address.ip, mapped_prefix, 12);
        std::memcpy(address.ip + 12, &in.sin_addr, 4);
    } else {
        const auto& in = reinterpret_cast<const sockaddr_in6&>(storage);
        address.port = ntohs(in.sin6_port);
        std::memcpy(address.ip, &in.sin6_addr, 16);
    }
    return address;
}

Result<uintptr_t> net_new_socket(const NetAddress& address) {
    if (!net_start()) return net_error("cannot start the system's sockets");
    const NetHandle handle = ::socket(address.v4 ? AF_INET : AF_INET6, SOCK_STREAM, IPPROTO_TCP);
    const auto value = static_cast<uintptr_t>(handle);
    if (value == Socket::none) return net_error("cannot make a socket");
    if (net_prepare(handle)) return value;
    Error error = net_error("cannot prepare a socket");
    net_close(handle);
    return error;
}

}  // namespace

Result<NetAddress> NetAddress::parse(std::string_view host, uint16_t port) {
    if (host == "localhost") host = "127.0.0.1";
    const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
    const std::string text(brackets ? host.substr(1, host.size() - 2) : host);
    NetAddress address;
    address.port = port;
    if (!brackets && ::inet_pton(AF_INET, text.c_str(), address.ip + 12) == 1) {
        address.v4 = true;
        std::memcpy(address.ip, mapped_prefix, 12);
    } else if (text.find('\0') != text.npos ||
               ::inet_pton(AF_INET6, text.c_str(), address.ip) != 1) {
        return make_error(ErrorKind::invalid_request,
                          format("'%.*s' is not an IP address or localhost",
                                 static_cast<int>(host.size()), host.data()));
    }
    return address;
}

std::string NetAddress::host() const {
    char text[INET6_ADDRSTRLEN] = {};
    const void* bytes = v4 ? ip + 12 : ip;
    ::inet_ntop(v4 ? AF_INET : AF_INET6, bytes, text, sizeof text);
    return text;
}

std::string NetAddress::text() const {
    return format(v4 ? "%s:%u" : "[%s]:%u", host().c_str(), unsigned{port});
}

bool NetAddress::is_loopback() const {
    if (std::memcmp(ip, mapped_prefix, 12) == 0) return ip[12] == 127;
    static constexpr uint8_t loopback[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    return std::memcmp(ip, loopback, 16) == 0;
}

Socket& Socket::operator=(Socket&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
}

void Socket::close() {
    if (is_open()) net_close(net_native(std::exchange(handle_, none)));
}

Result<Socket> Socket::listen(const NetAddress& address, int backlog) {
    auto handle = net_new_socket(address);
    if (!handle) return handle.error();
    Socket socket(*handle);
    const NetHandle native = net_native(*handle);
    const int on = 1, off = 0;
#if defined(_WIN32)
    // There, SO_REUSEADDR would let another process take the port over.
    ::setsockopt(native, SOL_SOCKET, SO_EXCLUSIVEADDRUSE, reinterpret_cast<const char*>(&on),
                 sizeof on);
#else
    ::setsockopt(native, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
#endif
    if (!address.v4)
        ::setsockopt(native, IPPROTO_IPV6, IPV6_V6ONLY, reinterpret_cast<const char*>(&off),
                     sizeof off);
    sockaddr_storage storage;
    const NetLength length = net_pack(address, &storage);
    if (::bind(native, reinterpret_cast<sockaddr*>(&storage), length) != 0 ||
        ::listen(native, backlog) != 0)
        return net_error("cannot listen on " + address.text());
    return socket;
}

Result<Socket> Socket::connect(const NetAddress& address) {
    auto handle = net_new_socket(address);
    if (!handle) return handle.error();
    Socket socket(*handle);
    sockaddr_storage storage;
    const NetLength length = net_pack(address, &storage);
    if (::connect(net_native(*handle), reinterpret_cast<sockaddr*>(&storage), length) != 0 &&
        !net_connecting(net_errno()))
        return net_error("cannot connect to " + address.text());
    return socket;
}

IoStatus Socket::connected() const {
    int error = 0;
    NetLength length = sizeof error;
    const int rc = ::getsockopt(net_native(handle_), SOL_SOCKET, SO_ERROR,
                                reinterpret_cast<char*>(&error), &length);
    return rc == 0 && error == 0 ? IoStatus::done : IoStatus::failed;
}

IoStatus Socket::accept(Socket* accepted, NetAddress* peer) {
    sockaddr_storage storage = {};
    NetLength length = sizeof storage;
    const NetHandle native =
        ::accept(net_native(handle_), reinterpret_cast<sockaddr*>(&storage), &length);
    const auto handle = static_cast<uintptr_t>(native);
    if (handle == none) {
        const int error = net_errno();
        if (net_would_block(error)) return IoStatus::again;
        // All else (a client that left the queue, a filter) concerns one connection only.
        return net_no_descriptor(error) ? IoStatus::full : IoStatus::failed;
    }
    *accepted = Socket(handle);
    *peer = net_unpack(storage);
    return net_prepare(native) ? IoStatus::done : IoStatus::failed;
}

IoResult Socket::read(void* bytes, size_t size) {
#if defined(_WIN32)
    const int want = static_cast<int>(std::min<size_t>(size, 1 << 30));
    const auto got = ::recv(net_native(handle_), static_cast<char*>(bytes), want, 0);
#else
    const auto got = ::recv(net_native(handle_), bytes, size, 0);
#endif
    if (got > 0) return {IoStatus::done, static_cast<size_t>(got)};
    if (got < 0 && net_would_block(net_errno())) return {IoStatus::again, 0};
    return {IoStatus::closed, 0};
}

IoResult Socket::write(std::string_view head, std::string_view body) {
#if defined(_WIN32)
    const auto part = [](std::string_view bytes) {
        return WSABUF{static_cast<ULONG>(std::min<size_t>(bytes.size(), 1 << 30)),
                      const_cast<char*>(bytes.data())};
    };
    WSABUF parts[2] = {part(head), part(body)};
    DWORD sent = 0;
    const bool ok = WSASend(net_native(handle_), parts, 2, &sent, 0, nullptr, nullptr) == 0;
#else
    const auto part = [](std::string_view bytes) {
        return iovec{const_cast<char*>(bytes.data()), bytes.size()};
    };
    iovec parts[2] = {part(head), part(body)};
    msghdr message = {};
    message.msg_iov    = parts;
    message.msg_iovlen = 2;
#if defined(MSG_NOSIGNAL)
    const auto sent = ::sendmsg(net_native(handle_), &message, MSG_NOSIGNAL);
#else
    const auto sent = ::sendmsg(net_native(handle_), &message, 0);
#endif
    const bool ok = sent >= 0;
#endif
    if (ok) return {IoStatus::done, static_cast<size_t>(sent)};
    return {net_would_block(net_errno()) ? IoStatus::again : IoStatus::closed, 0};
}

void Socket::shutdown_write() {
#if defined(_WIN32)
    ::shutdown(net_native(handle_), SD_SEND);
#else
    ::shutdown(net_native(handle_), SHUT_WR);
#endif
}

Result<NetAddress> Socket::local() const {
    sockaddr_storage storage = {};
    NetLength length = sizeof storage;
    if (::getsockname(net_native(handle_), reinterpret_cast<sockaddr*>(&storage), &length) != 0)
        return net_error("cannot read a socket's address");
    return net_unpack(storage);
}

// -- readiness --------------------------------------------------------------------------------
// Three systems, one shape: State owns the handles; open, set, remove, wait, wake.

namespace {

constexpr uint64_t wake_tag = UINT64_MAX;  // never a user's
constexpr size_t   max_events_per_wait = 256;

}  // namespace

#if defined(__linux__)

struct Poller::State {
    int epoll = -1, event = -1;
    epoll_event events[max_events_per_wait];
    ~State() {
        if (epoll >= 0) ::close(epoll);
        if (event >= 0) ::close(event);
    }
};

Result<Poller> Poller::open() {
    auto state = std::make_unique<State>();
    state->epoll = ::epoll_create1(EPOLL_CLOEXEC);
    state->event = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    epoll_event interest = {};
    interest.events   = EPOLLIN;
    interest.data.u64 = wake_tag;
    if (state->epoll < 0 || state->event < 0 ||
        ::epoll_ctl(state->epoll, EPOLL_CTL_ADD, state->event, &interest) != 0)
        return net_error("cannot watch sockets");
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    epoll_event event = {};
    event.data.u64 = tag;
    if (interest & poll_read) event.events |= EPOLLIN;
    if (interest & poll_write) event.events |= EPOLLOUT;
    if (interest & poll_hangup) event.events |= EPOLLRDHUP;
    const int handle = net_native(socket.handle());
    if (::epoll_ctl(state_->epoll, EPOLL_CTL_MOD, handle, &event) == 0) return {};
    if (errno == ENOENT && ::epoll_ctl(state_->epoll, EPOLL_CTL_ADD, handle, &event) == 0)
        return {};
    return net_error("cannot watch a socket");
}

void Poller::remove(const Socket& socket) {
    ::epoll_ctl(state_->epoll, EPOLL_CTL_DEL, net_native(socket.handle()), nullptr);
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    const int count = ::epoll_wait(state_->epoll, state_->events, max_events_per_wait, timeout_ms);
    if (count < 0 && errno != EINTR) return net_error("cannot wait for sockets");
    for (int i = 0; i < count; ++i) {
        const epoll_event& event = state_->events[i];
        if (event.data.u64 == wake_tag) {
            uint64_t drained = 0;
            [[maybe_unused]] auto got = ::read(state_->event, &drained, sizeof drained);
            continue;
        }
        const auto has = [&](uint32_t bits) { return (event.events & bits) != 0; };
        events->push_back({event.data.u64, has(EPOLLIN | EPOLLERR | EPOLLHUP), has(EPOLLOUT),
                           has(EPOLLRDHUP | EPOLLERR | EPOLLHUP)});
    }
    return {};
}

void Poller::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] auto sent = ::write(state_->event, &one, sizeof one);
}

#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__OpenBSD__)

struct Poller::State {
    int queue = -1, ends[2] = {-1, -1};
    struct kevent events[max_events_per_wait];
    ~State() {
        for (const int handle : {queue, ends[0], ends[1]})
            if (handle >= 0) ::close(handle);
    }
    bool change(uintptr_t handle, int filter, int flags, uint64_t tag) {
        struct kevent event;
        EV_SET(&event, handle, static_cast<short>(filter), static_cast<unsigned short>(flags), 0, 0,
               reinterpret_cast<void*>(static_cast<uintptr_t>(tag)));
        return ::kevent(queue, &event, 1, nullptr, 0, nullptr) == 0 ||
               ((flags & EV_DELETE) && errno == ENOENT);
    }
};

Result<Poller> Poller::open() {
    static_assert(sizeof(void*) == 8, "kqueue carries the 64-bit tag in its pointer");
    auto state = std::make_unique<State>();
    state->queue = ::kqueue();
    if (state->queue < 0 || ::pipe(state->ends) != 0 || !net_prepare(state->ends[0]) ||
        !net_prepare(state->ends[1]) ||
        !state->change(static_cast<uintptr_t>(state->ends[0]), EVFILT_READ, EV_ADD, wake_tag))
        return net_error("cannot watch sockets");
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    const int read = (interest & poll_read) ? EV_ADD : EV_DELETE;
    const int write = (interest & poll_write) ? EV_ADD : EV_DELETE;
    if (state_->change(socket.handle(), EVFILT_READ, read, tag) &&
        state_->change(socket.handle(), EVFILT_WRITE, write, tag))
        return {};
    return net_error("cannot watch a socket");
}

void Poller::remove(const Socket& socket) {
    state_->change(socket.handle(), EVFILT_READ, EV_DELETE, 0);
    state_->change(socket.handle(), EVFILT_WRITE, EV_DELETE, 0);
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    timespec limit = {timeout_ms / 1000, timeout_ms % 1000 * 1'000'000L};
    const int count = ::kevent(state_->queue, nullptr, 0, state_->events, max_events_per_wait,
                               timeout_ms < 0 ? nullptr : &limit);
    if (count < 0 && errno != EINTR) return net_error("cannot wait for sockets");
    for (int i = 0; i < count; ++i) {
        const struct kevent& event = state_->events[i];
        const auto tag = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(event.udata));
        if (tag == wake_tag) {
            char drained[64];
            while (::read(state_->ends[0], drained, sizeof drained) > 0) {}
            continue;
        }
        const bool writable = event.filter == EVFILT_WRITE;
        events->push_back({tag, !writable, writable, !writable && (event.flags & EV_EOF)});
    }
    return {};
}

void Poller::wake() {
    [[maybe_unused]] auto sent = ::write(state_->ends[1], "", 1);
}

#else  // poll: Windows, and whatever else there is

namespace {

#if defined(_WIN32)
using NetPollEntry = WSAPOLLFD;
int net_poll(NetPollEntry* entries, size_t count, int timeout_ms) {
    return WSAPoll(entries, static_cast<ULONG>(count), timeout_ms);
}
#else
using NetPollEntry = pollfd;
int net_poll(NetPollEntry* entries, size_t count, int timeout_ms) {
    return ::poll(entries, static_cast<nfds_t>(count), timeout_ms);
}
#endif

/// A UDP socket connected to itself: the one wake-up that poll understands on every system, and
/// nobody else can write to it.
bool net_open_self(NetHandle* handle) {
    if (!net_start()) return false;
    sockaddr_storage storage;
    NetLength length = net_pack(*NetAddress::parse("127.0.0.1", 0), &storage);
    auto* name = reinterpret_cast<sockaddr*>(&storage);
    *handle = ::socket(AF_INET, SOCK_DGRAM, IPPROTO_UDP);
    return static_cast<uintptr_t>(*handle) != Socket::none && net_prepare(*handle) &&
           ::bind(*handle, name, length) == 0 && ::getsockname(*handle, name, &length) == 0 &&
           ::connect(*handle, name, length) == 0;
}

}  // namespace

struct Poller::State {
    NetHandle self = net_native(Socket::none);
    std::vector<NetPollEntry> entries;
    std::vector<uint64_t>     tags;
    std::unordered_map<uintptr_t, size_t> places;
    ~State() {
        if (static_cast<uintptr_t>(self) != Socket::none) net_close(self);
    }
};

Result<Poller> Poller::open() {
    auto state = std::make_unique<State>();
    if (!net_open_self(&state->self)) return net_error("cannot watch sockets");
    NetPollEntry entry = {};
    entry.fd     = state->self;
    entry.events = POLLIN;
    state->entries.push_back(entry);
    state->tags.push_back(wake_tag);
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    const auto found = state_->places.try_emplace(socket.handle(), state_->entries.size());
    if (found.second) {
        state_->entries.push_back({});
        state_->tags.push_back(tag);
    }
    const size_t place = found.first->second;
    NetPollEntry& entry = state_->entries[place];
    entry.fd     = net_native(socket.handle());
    entry.events = static_cast<short>(((interest & poll_read) ? POLLIN : 0) |
                                      ((interest & poll_write) ? POLLOUT : 0));
    state_->tags[place] = tag;
    return {};
}

void Poller::remove(const Socket& socket) {
    const auto found = state_->places.find(socket.handle());
    if (found == state_->places.end()) return;
    const size_t place = found->second, last = state_->entries.size() - 1;
    state_->places.erase(found);
    if (place != last) {
        state_->entries[place] = state_->entries[last];
        state_->tags[place] = state_->tags[last];
        state_->places[static_cast<uintptr_t>(state_->entries[place].fd)] = place;
    }
    state_->entries.pop_back();
    state_->tags.pop_back();
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    int count = net_poll(state_->entries.data(), state_->entries.size(), timeout_ms);
    if (count < 0 && !net_would_block(net_errno())) return net_error("cannot wait for sockets");
    for (size_t i = 0; i < state_->entries.size() && count > 0; ++i) {
        const NetPollEntry& entry = state_->entries[i];
        if (entry.revents == 0) continue;
        --count;
        if (i == 0) {
            char drained[64];
            while (::recv(state_->self, drained, sizeof drained, 0) > 0) {}
            continue;
        }
        const bool gone = (entry.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
        events->push_back({state_->tags[i], gone || (entry.revents & POLLIN),
                           (entry.revents & POLLOUT) != 0, gone});
    }
    return {};
}

void Poller::wake() { ::send(state_->self, "", 1, 0); }

#endif

Poller::Poller(std::unique_ptr<State> state) : state_(std::move(state)) {}
Poller::Poller(Poller&& other) noexcept = default;
Poller& Poller::operator=(Poller&& other) noexcept = default;
Poller::~Poller() = default;

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

// >>digest
// Plain loops: the largest input is a model file, read once, and the disk is slower.

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// The first 32 bits of the fractions of the cube roots of the first 64 primes.
constexpr uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// And of the square roots of the first 8.
constexpr uint32_t sha256_start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

uint32_t load_big_endian32(const uint8_t* p) {
    return uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | p[3];
}

constexpr std::array<uint32_t, 256> crc32c_table = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0x82f63b78u : 0u);
        table[i] = value;
    }
    return table;
}();

constexpr char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

constexpr std::array<int8_t, 256> base64_values = [] {
    std::array<int8_t, 256> values{};
    values.fill(-1);
    for (int i = 0; i < 64; ++i) values[uint8_t(base64_digits[i])] = int8_t(i);
    return values;
}();

int hex_value(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

}  // namespace

std::string Hash256::hex() const { return hex_encode(bytes, sizeof bytes); }

Sha256::Sha256() { std::memcpy(state_, sha256_start, sizeof state_); }

void Sha256::compress(const uint8_t* block) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = load_big_endian32(block + 4 * i);
    for (int i = 16; i < 64; ++i) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
               (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    uint32_t s[8];
    std::memcpy(s, state_, sizeof s);
    for (int i = 0; i < 64; i += 8) {
        for (int k = 0; k < 8; ++k) {  // instead of moving eight variables, name them anew
            const auto v = [&](int name) -> uint32_t& { return s[(name - k) & 7]; };
            const uint32_t a = v(0), e = v(4);
            const uint32_t t = v(7) + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                               ((e & v(5)) ^ (~e & v(6))) + sha256_constants[i + k] + w[i + k];
            v(3) += t;
            v(7) = t + (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                   ((a & v(1)) ^ (a & v(2)) ^ (v(1) & v(2)));
        }
    }
    for (int i = 0; i < 8; ++i) state_[i] += s[i];
}

void Sha256::update(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    size_t filled = size_t(length_ % 64);
    length_ += size;
    while (size > 0) {
        if (filled == 0 && size >= 64) {  // whole blocks straight from the caller
            compress(bytes);
            bytes += 64;
            size -= 64;
            continue;
        }
        const size_t take = std::min(size, 64 - filled);
        std::memcpy(pending_ + filled, bytes, take);
        bytes += take;
        size -= take;
        filled = (filled + take) % 64;
        if (filled == 0) compress(pending_);
    }
}

Hash256 Sha256::finish() {
    const uint64_t bits = length_ * 8;
    uint8_t tail[72] = {0x80};
    const size_t padding = 64 - size_t((length_ + 8) % 64);  // 1 to 64: the 0x80 and zeros
    for (size_t i = 0; i < 8; ++i) tail[padding + i] = uint8_t(bits >> (56 - 8 * i));
    update(tail, padding + 8);
    Hash256 hash;
    for (size_t i = 0; i < 32; ++i) hash.bytes[i] = uint8_t(state_[i / 4] >> (24 - 8 * (i % 4)));
    return hash;
}

Hash256 sha256(const void* data, size_t size) {
    Sha256 digest;
    digest.update(data, size);
    return digest.finish();
}

Hash256 sha256(std::string_view text) { return sha256(text.data(), text.size()); }

Hash256 hmac_sha256(std::string_view key, std::string_view message) {
    uint8_t pad[64] = {};
    const Hash256 short_key = sha256(key);
    if (key.size() > sizeof pad) key = short_key.view();
    if (!key.empty()) std::memcpy(pad, key.data(), key.size());
    Sha256 inner, outer;
    for (uint8_t& byte : pad) byte ^= 0x36;
    inner.update(pad, sizeof pad);
    inner.update(message);
    for (uint8_t& byte : pad) byte ^= 0x36 ^ 0x5c;
    outer.update(pad, sizeof pad);
    outer.update(inner.finish().view());
    return outer.finish();
}

uint32_t crc32c(const void* data, size_t size, uint32_t value) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    value = ~value;
    for (size_t i = 0; i < size; ++i) value = value >> 8 ^ crc32c_table[(value ^ bytes[i]) & 255];
    return ~value;
}

std::string base64_encode(std::string_view bytes) {
    return base64_encode(bytes.data(), bytes.size());
}

std::string base64_encode(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    std::string text;
    text.reserve((size + 2) / 3 * 4);
    for (size_t i = 0; i < size; i += 3) {
        const size_t count = std::min(size - i, size_t(3));
        uint32_t group = uint32_t(bytes[i]) << 16;
        if (count > 1) group |= uint32_t(bytes[i + 1]) << 8;
        if (count > 2) group |= bytes[i + 2];
        for (size_t k = 0; k < 4; ++k)
            text += k <= count ? base64_digits[group >> (18 - 6 * k) & 63] : '=';
    }
    return text;
}

Result<std::string> base64_decode(std::string_view text) {
    std::string bytes;
    bytes.reserve(text.size() / 4 * 3);
    bool good = text.size() % 4 == 0;
    for (size_t i = 0; good && i < text.size(); i += 4) {
        const bool last = i + 4 == text.size();
        const size_t padding = !last || text[i + 3] != '=' ? 0 : text[i + 2] != '=' ? 1 : 2;
        uint32_t group = 0;
        for (size_t k = 0; k < 4 - padding; ++k) {
            const int value = base64_values[uint8_t(text[i + k])];
            good = good && value >= 0;
            group |= uint32_t(value & 63) << (18 - 6 * k);
        }
        for (size_t k = 0; k < 3 - padding; ++k) bytes += char(group >> (16 - 8 * k) & 255);
        good = good && (group & ((1u << 8 * padding) - 1)) == 0;  // bits beyond the last byte
    }
    if (good) return bytes;
    return make_error(ErrorKind::invalid_request, "not base64 (RFC 4648, padded)");
}

std::string hex_encode(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    std::string text(2 * size, '0');
    for (size_t i = 0; i < 2 * size; ++i)
        text[i] = "0123456789abcdef"[i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4];
    return text;
}

Result<std::string> hex_decode(std::string_view text) {
    std::string bytes(text.size() / 2, '\0');
    bool good = text.size() % 2 == 0;
    for (size_t i = 0; good && i < bytes.size(); ++i) {
        const int high = hex_value(text[2 * i]), low = hex_value(text[2 * i + 1]);
        good = high >= 0 && low >= 0;
        bytes[i] = char((high & 15) << 4 | (low & 15));
    }
    if (good) return bytes;
    return make_error(ErrorKind::invalid_request, "not hexadecimal");
}

bool constant_time_equal(std::string_view a, std::string_view b) {
    if (a.size() != b.size()) return false;
    volatile unsigned char difference = 0;  // volatile: no early way out for the optimiser
    for (size_t i = 0; i < a.size(); ++i)
        difference = static_cast<unsigned char>(difference | (a[i] ^ b[i]));
    return difference == 0;
}

Result<void> random_bytes(void* data, size_t size) {
    auto* bytes = static_cast<uint8_t*>(data);
#if defined(_WIN32)
    while (size > 0) {
        const ULONG count = ULONG(std::min(size, size_t(1) << 20));
        if (BCryptGenRandom(nullptr, bytes, count, BCRYPT_USE_SYSTEM_PREFERRED_RNG) != 0)
            return make_error(ErrorKind::io, "BCryptGenRandom failed");
        bytes += count;
        size -= count;
    }
#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__NetBSD__)
    arc4random_buf(bytes, size);
#elif defined(__linux__)
    while (size > 0) {
        const ssize_t count = getrandom(bytes, std::min(size, size_t(256)), 0);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return os_error("getrandom");
        bytes += count;
        size -= size_t(count);
    }
#else
    for (; size > 0; bytes += std::min(size, size_t(256)), size -= std::min(size, size_t(256)))
        if (getentropy(bytes, std::min(size, size_t(256))) != 0) return os_error("getentropy");
#endif
    return {};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>unicode
// The generated text is decoded while compiling: lookups are binary searches in read-only tables.

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// clang-format off
// BEGIN GENERATED unicode sha256=aa8a6d69b15311ae2ff86a400cf7d152a213d322586e96cfd0b05cedff5874dc
// Unicode 14.0.0, by tests/generate_unicode.py
constexpr size_t unicode_category_count = 2984;
constexpr char unicode_category_text[] =
    "~A9T$6T$01454/T#K+T#U$T#C;0417.7D;0515~B94V%8478'25=8785M#7$T#7-'3M$4C85C(D95D)aX$D#a0D#aO$C#$"
    "a$D$C#$a#C#$C$D#C%$C#$C$D$C#$C#$a%C#$#D#a#C#$C$$a#C#D#'#D$G%#%$#%$#%$a0D#a2D##%$a#C$$aZ$D(C#$C"
    "#D#a#C%$a(DF%'D<F3W%F-W/F&W(&7&W2HQ&a%&7a#`#&D$4#`%W##4C$@#@C#$C2@C*DD$#D#C$D$a8D&a#5a#C#D#CT$"
    "DQ$aC$8H&J#aW$C#$a,D#aa%@CG$`#&T'DJ$4/`#X#6@HN$/(4H#4H#4(`)G<`%G%T#`,]'U$T#6T#X#H,4=T$GA&G+H6K"
    "+T%G#(GD&4'H(=8H'F#H#8H%G#K+G$X#'T/@='(G}H<`#GZ%H,'`/K+GBH*F#8T$&`#(V#G7H%&H*&H$&H&`#T0@G:H$`#"
    "4@G,`&G97G'@]#`'H)GJ$&H9=HA)GW$()('I$H)I%(I#'H(G+H#T#K+4&G0(I#@G)`#G#`#G7@G(@'`$G%`#('I$H%`#I#"
    "`#I#('`))`%G#@G$H#`#K+G#V#M'86'4(`#H#)@G'`%G#`#G7@G(@G#@G#@G#`#(@I$H#`%H#`#H$`$(`(G%@'`(K+H#G$"
    "(4`+H#)@G*@G$@G7@G(@G#@G&`#('I$H&@H#)@I#(`#'`0G#H#`#K+46`('H'@(I#@G)`#G#`#G7@G(@G#@G&`#(')()H%"
    "`#I#`#I#(`(H#)`%G#@G$H#`#K+8'M'`+('@G'`$G$@G%`$G#@'@G#`$G#`$G$`$G-`%I#(I#`$I$@I$(`#'`')`/K+M$X"
    "'68`&(I$(G)@G$@G8@G1`#('H$I%@H$@H%`(H#@G$`#'`#G#H#`#K+`(4M(8'(I#4G)@G$@G8@G+@G&`#(')(I&@(I#@I#"
    "H#`(I#`'G#@G#H#`#K+@G#`.H#I#G*@G$@GJ$H#'I$H%@I$@I$('8`%G$)M(G$H#`#K+M*8G'@(I#@G3`$G9@G*@'`#G(`"
    "$(`%I$H$@(@I)`'K+`#I#4`-GQ$(G#H(`%6G'&H)4K+T#`F$G#@'@G&@G9@'@G+(G#H*'`#G&@&@H'`#K+`#G%`A'X$T08"
    "4X$H#X'K+M+8(8(8(0101I#G)@GE$`%H/)H&4H#G&H,@HE$@X)(X'@X#T&X%T#`F$GL$I#H%)H')H#I#H#'K+T'G'I#H#G"
    "%H$'I$G#I(G$H%G.(I#H#I'(')K+I$(X#CG$@#`&#`#DL$4&D$GJ-@G%`#G(@'@G%`#GJ$@G%`#GB@G%`#G(@'@G%`#G0@"
    "GZ$@G%`#GD%`#H$T*M5`$G1X+`'CW%`#D'`#/GM684G29G;01`$GL%T$L$G)`(G3H$)`*G4H#)T#`*G3H#`-G.@G$@H#`-"
    "GU$H#)H(I)(I#H,T$&T$6'(`#K+`'M+`'T'/T%H$=(K+`'GD$&GV$`(G&H#GC$('`&GG%`+G@@H$I%H#I$`%I#(I'H$`%8"
    "`$T#K+G}`#G&`,GM$`%G;`'K+-`$XC$G8H#I#(`#T#GV$)()H(@()(I#H)I'H+`#(K+`'K+`'T(&T'`#H/*H1`R$H%)GP$"
    "()H&)(I&(I#G)`$K+T(X+H*X*T#@H#)G})H%I#H#)H$G#K+GM$()H#I$()H$I#`)T%GE$I)H)I#H#`$T&K+`$G$K+G}F'T"
    "#D*`(CL$`#C$T)`)H$4H.)H(G%(G'(G#)H#'`&DM$F`$D.&DC$FF$Ha$aV'D*ab%D*C)D'`#C'`#D)C)D)C)D'`#C'`#D)"
    "@#@#@#@#D)C)D/`#D)E)D)E)D)E)D&@D#C%%7$W$D$@D#C%%W$D%`#D#C%@W$D)C&W$`#D$@D#C%%W#@Y,]&O'T#230R#3"
    "02T):;]&9T*23T%N#T$501T,54.T+9]&@]+-&`#M'U$01&M+U$01@F.`$VB`0H.J%(J$H-`0X##X%#X#$C$D#C$$8#X#5C"
    "&X'#8#8#8C%8$C%$G%$X#D#C#U&#D%85X#$8M1LD$a#L%-X#`%U&X&U#X%5X#5X#5X(5X@U#X#585X@UM+X)0101X5U#X("
    "01XR%5X}U:XI$U'XF%`:X,`6M]$XO%M7XX(5X*5XW$U)XP&5XY*01010101010101M}XM$U&01U@0101010101U1Xa*UD'"
    "0101010101010101010101U`$0101UA01UC+XQ$U6X#U'XH$`#XA@XJ&CQ$DQ$a#C$D#a'C%$#D##D'F#C$$ab%D#X'a%H"
    "$a#`&T%-T#DG$@$`&$`#GY$`(&4`/(G8`*G(@G(@G(@G(@G(@G(@G(@G(@HAT#2323T$23423T*/T#/423T#2301010101"
    "T&&T+O#T%/40T.X#T$01010101/`C$X;@XZ%`-XW)`;X-`%9T$8&',0101010101X#01010101/0Q#8L*H%I#/F&X#L$&'"
    "4X#@GW%`#H#W#F#'/G[%4F$'`&GL$@G_%@X#M%X+GAXE$`-G1X@@M+X}M)8M0XAM+XH$M0Xa,GaP)Xa$GVS7&GXF$`$XX$"
    "`*GI$F'T#GM+&T$G1K+G#`5aO$'(J$4H+4&a=F#H#GG%L+H#T'`)W8F*W#a.D$a_$&D)a%C#$a)&W#a%'a$D$a5C&$C&$a"
    "/C%$a#`&a#@$@$a%`9F$a#'F#$G((G$(G%(G8I#H#)X%(`$M'X#68`'GU$T%`)I#GS$I1H#`)T#K+`'H3G'T$'4G#(K+G="
    "H)T#G8H,I#`,4G>`$H$)GP$(I#H%I#H#I$T.@&K+`%T#G&(&G*K+G&@GJ$H'I#H#I#H#`*G$(G)()`#K+`#T%G1&G'X$')"
    "()GS$('H$G#H#G&H#'('`9G#&T#G,)H#I#T#'F#)(`+G'`#G'`#G'`*G(@G(@DL$7F%D*&W#`%DQ%GD$I#(I#(I#4)(`#K"
    "+`'GE`-`-G8`%GR$`%^ab$_aJ)GO.`#GK&`G$D(`-D&`&'(G+5G.@G&@'@G#@G#@GM&W2`1GL.10X1Ga$`#GW$`(8`AG-6"
    "X$H1T(014`'H14O#N#0101010101010101T#01T%N$T$@T%/010101T$5/U$@46T#`%G&@GH'`#=@T$6T$01454/T#K+T#"
    "U$T#C;0417.7D;051501401T#G+&GN$F#G@`$G'`#G'`#G'`#G$`$V#578V#@8U%X#`+]$X#`#G-@G;@G4@G#@G0`#G/`C"
    "$G~&`&T$`%MN$`$X*LV$M%X2M#X$@X.`$8`P$XN$(`C'G>`$GR$`0(M<`%GAM%`*G5,G),`&GG$H&`&G}@4GE$`%G)4L&`"
    "K$CI$DI$GO%`#K+`'CE$`%DE$`%GI$`)GU$`,4C,@C0@C(@C#@D,@D0@D(@D#`D%GX,`*G7`+G)`9F'@FK$@F*`F%G'`#'"
    "@GM$@G#`$'`#G8@4M)G8X#M(G@`)M*`Q$G4@G#`&M&G7M'`$4G;`&4`a$GY$`%M#G#M1`#MO$'H$@H#`&H%G%@G$@G>`#H"
    "$`%(M*`(T*`(G>M#4G>M$`AG)8G=H#`%M&T(`*GW$`$T(G7`#M)G4`&M)G3`(T%`-M(`Q%GJ%`X$CT$`.DT$`(M'GE$H%`"
    ")K+`G,M@@GK$@H#/`#G#`O%G>M+'`)G7H,M%T&`7G3H%T%`G$G6M(`5G8`*)()GV$H0T(`%M5K+(G#H#'`*H$)GN$I$H%I"
    "#H#T#=T%(`+=`#G:`(K+`'H$GE$H&)H)@K+T%'I#'`)GD$(T#'`*H#)GQ$I$H*I#G%T%H%4)(K+'4'T$@M5`,G3@G:I$H$"
    "I#()H#T'(`b$G(@'@G%@G0@G+4`'GP$(I$H)`&K+`'H#I#@G)`#G#`#G7@G(@G#@G&@H#'I#(I%`#I#`#I$`#'`')`&G&I"
    "#`#H(`$H&`L'GV$I$H)I#H$)(G%T&K+T#@4(G$`}GQ$I$H')(I%H#)H#G#4'`)K+`G(GP$I$H%`#I%H#)H#T8G%H#`C$GQ"
    "$I$H)I#()H#T$'`,K+`'T.`4GL$()(I#H')('4`'K+`W$G<`#H$I#H%)H&`%K+M#T$8G(`Z(GM$I$H*)H#4`E&CADAK+M*"
    "`-G)`#'`#G)@G#@G9I'@I#`#H#)(')')(T$`*K+`G%G)`#GH$I$H%`#H#I%('4')`<'H+GI$H')'H%T)(`)'H'I#H$GO$H"
    ".)H#T$'T&`.GJ%`H+G*@GF$)H(@H')('T&`+K+M4`$T#G}`#H7@)H()H#)H#`J%G(@G#@GG$H'`$(@H#@H('(`)K+`'G'@"
    "G#@GAI&@H#@I#()('`(K+`W,G4H#I#T#`X('`0M6X)V%X2`.4G[}`G&LP&@T&`,GE)`MU%Gb%T#`.GPD$@]*`Ha&GH5`ZP"
    "+GZ4`(G@@K+`%T#GP%@K+`'G}`#H&4`+GQ$H(T&X%F%48`+K+@M(@G6`&G4`Q8CADAM8T%`F&GL%`%('IX$`(H%F.`a$F#"
    "4&(`,I#`/GYb(`)GWI$`K$G*`HZ+F%@F(@F#@GD,`N$G$`2G%`)GM/`EK%GL&`&G.`$G*`(G+`#8H#4]%`]U'HO$`#H8`*"
    "XU&`]$XW*`+XH$`#X]$I#H$X$I'])H)X#H(X}H%X^$`6XC%H$8`['M5`-XX%`*M:`H'C;D;C;D(@D3C;D;#@C#`##`#C#`"
    "#C%@C)D%@$@D(@D,C;D;C#@C%`#C)@C(@D;C#@C%@C&@#`$C(@D;C;D;C;D;C;D;C;D;C;D;C;D=`#C:5D:5D'C:5D:5D'"
    "C:5D:5D'C:5D:5D'C:5D:5D'a#`#KS$Xa2HX$X%HS$X)(X/(X#T&`0H&@H0`QE$D+'D5`b)H(@H2`#H(@H#@H&`V)GN$`$"
    "H(F(`#K+`%'8`a,G}(`2GM$H%K+`&6`aI$G(@G%@G#@G0@GF)`#M*H(`J$CC$DC$H(&`%K+`%T#`R;M~$8M$6M%`M%MN$8"
    "M0`C)G%@G<@G#@'`#'@G+@G%@'@'`''`%'@'@'@G$@G#@'`#'@'@'@'@'@G#@'`#G%@G(@G%@G%@'@G+@G2`&G$@G&@G2`"
    "U$U#`O+XM$`%XE&`-X0`#X0@X0@XF$`+M.Xb'`Y$X>`.XM$`%X*`(X#`/X'`['X~*W&XY9`&X1`$X.`$XU&`-XZ%`(X-`%"
    "8`0X-`%XY$`)X+`'XI$`)X}`#X#`O%XU-`-X/`#X&`$X&`$X(`*X>`$X,`&X'`+X+`'X)`)X(`*XT'@XX$`F$K+`GC$GaY"
    "L$`AGZD'`(G_)`#GCW(`/GRL*``C&G_3`CR$GL]'`WH^8=`}]a%`a&HQ*`QSb$__bb$`#__bb$`#";
constexpr size_t unicode_lower_count = 182;
constexpr char unicode_lower_text[] =
    "D%U$C%b&O$C%;/C%K$R$%S$#P/%(%*2%4P$%Q$#T*$(%+#G0$&%'#_/$#%%%]/%#%&#a'$#W/$#Y/$#%%#]/$#a/%#I0$#"
    "E0$#%'#I0$#M0%#O0$(%)#W0$#%%#W0&#%%#W0$#%%%U0%&%'#Y0$#%'#%+#'$#%%#'$#%%#'$4%64%6#'$&%'#D)$#R&$"
    "J$%K$#F+%4%;#YE8$#%%#H-$#SE8&#%%#H/$#M'$#Q'$,%M,&%)#%,#K**#O%%'M%'#C'%%a&&C$C%53C%O$#3,:%}#Z&&"
    "#%%#0$#%&'F+&AC(3a$C%S%D$%M$X$%Y$#A$0%2b%%D&M%C&R^%M%CI1J$#CI1)#CI1V9a'C`N%S%-3CH%W%b^(P$'b^(F"
    "-X'%a'#`^1%b%%K&123-23123123-24*2212C$123123123%2%%V'%#4/)N('#4/%2%%J)1%2%%b)%#0/%b*%%^*%#4M,#"
    "~X1'#`N3$#NG3*#[$Q$AC$F$#%V<U$W$M]$a%C&C&#%%#Pb7$#NQ*$#Pa7&(%)#ZD8$#~b7$#`D8$#^D8%#%&#%,%`F8%F"
    "&%N&&%*#%QMAP$%C%>%E(0%3`$%J%&%'#JCH%$,%0#%%#RUU%&&%)6%7#JWU%$#`WU%$#XWU%$#DWU%$#JWU%%#FTU%$#V"
    "UU%$#LTU%$#C]$$2%3#b%$#HWU%$#RFH%$&%,#%)&%B#%O~8U$C%bI$Q%S%S(I%S%C)7Q%/}Q%3/Q%+%Q%OZ$G&C'CD&a$"
    "C%CP8a$C%CYAE%G%";
constexpr size_t unicode_upper_count = 200;
constexpr char unicode_upper_text[] =
    "D&U$b$W%#QQ$N$O$b$;/b$*#U*%R$$S$#R1%($*2$4P$$R$($(#Z5$#I/&&$(#$'#$)#$&#E)'#$$#I-'#G+&($*#$(#$&"
    "#$'&$(#$'#$%#S&)#$$#&%#$$#&%#$$#&%2$2#`'%4$6#$$#&%#$'J$$M$4$<#$&%aF8&#$(,$,#aD8$#[D8$#_D8$#F0$"
    "#^/%%~/&#V/%#X/$#aWU%'#~/$#YWU%%#`/%#SUU%$#KWU%%#D0$#H0$#KWU%$#Qb7$#EWU%&#H0%#]b7$#L0&#N0+#Qa7"
    "&#V0%#IWU%$#V0'#WUU%$#V0$#L'$%T0%#P')#X0.#MTU%$#GTU%J(#K(O$&$)#$''G+T$#N%$'L%'C$b$4#`$$3b$,#b&"
    "$%`&&#^&$#T&'#`%$#N&$#2%:$:#N($#b'$#1$#J*%#b(&#$&#$X$a$b$C$Ab'4D$$M$X$$Z$0$0#@%b%$S'M%b%R^%W%C"
    "_(P$'C_(^:-2KG%#^I/$#~I/$#JI/$%FI/%#HI/$#ZH/$#LE/$#G_G%T*#KCH%'#OQ*4#SFH%V&X'$]'#X&)b%$b%133-3"
    "3133133-34*32133%W'%)O('%K)%%C+%%C*%%_*'133133133%3&#5.#LE1(#50%33%3(#11#5^-#Z$E$AB7#$O=U$V$C^"
    "$a%b%T$#$'#XE8$#RE8%($.#$&#$.F&$N&&$*#$0M%bH1J$#bH1)#bH1WKAP$$C%>$E(0$3`$$J%&$(,$0#$(&$&#C&&6$"
    "A2$6&$,#$)&$B#$`=#b~$@a'b_N%Ta7U$b$JJ$Q%R%S(I%R%b(7P%/}P%3/P%+%P%H[$G&b&CC&a$b$CP8a$b$EYAE%F%";
constexpr size_t unicode_combining_count = 382;
constexpr char unicode_combining_text[] =
    "C;7I*8#K*$&_)'#K*$#[)$'_)($M)%&_)'$M)%-_).'$(&_)'*I*+#S*$#I*$%_)&%I*&$_)&%I*&&_)'#I*$#K*$$_)%#"
    "I*$#L*$$M*%#L*$$M*%#L*$/I*C,'I*Q+#_)$&I*'#_)$%I*&#a)$#_)$(I*)(_))$I*%#_)$$I*%#a)$#G*$#I*$#-$#."
    "$#/$#0$#1$#2$#3$#4$#5$$6%#7$#8$#9%#:%#;$#<%#I*$#_)%#5L%*I*+#A$#B$#C$T$#>$#}$#@$#A$#B$#C$$#D$$#"
    "E$$$I*%$_)%'I*(#_)$$I*%#_)4#F$I&)I*,&I*'#_)$#I*&$I*&#_)$$I*%#_)G$#G$B#I*$#_)$$I*%#_)$$I*%%_)&#"
    "I*$$_)%#I*$#_)$%I*&#_)$#I*$#_)$#I*$#_)$#I*$#_)$$I*E()I**#_)$#I*-#_)<&I*(+I*-%I*''I*S$%_)b$#I*$"
    "%_)&&I*Q$'I*('_)(0I*2#_)$$I*%#_)$$I*%#_)$%I*&%_)&#>$#}$#@$%I*&#_)$$I*%$_)%'I*D%#*4#,'#I*$#_)$$"
    "I*L&#*4#,T$#I*a$#*4#,R&#*4#,R&#*4#,C'#,R&#*4#,+#W%$#^%I&#*4#,Q&$,5#,`&#,Q&$J&%#,1&N&S&$Y&%#,1&"
    "]&S%$_)@#_)%#_)%#[)[$#D'$#E'%#G')&E')#E'%$I*%#,%$I*C%#_)T&#*%$,W%#_)S9%I*Z@$,C$#,a'#,.#I*O)#G*"
    "S'#a)$#I*$#_)_)#I*$#_)K%#,8*I*-#_)T$'I*((_))$I*%#_)%$_)%$I*%$_)%'I*(#_)$&I*L&#*3#,J$#I*$#_)$)I"
    "*`$$,_$#*/$,H%#*~'%I*'#$$'_)($I*%&_)'#I*%)$.#_)*#I*'$I*K)$I*%#_)$)I**#_)$$I*%#M*$#Y)$#_)$#M)$G"
    "$I*H$#K*$$G*%#_)$#])$#I*$#L*$#_)$#I*$#_)T9$I*%$$%&I*'%$&$I*)#I*'$$%#I*$#_)$#I*$$$%&_)'#I*bb%%I"
    "*S'#,D&BI*M5#])$#G*$#K*$#a)$$C*N&$+YQ@#I*(,I*M$$I*U%$I*Y+#,I$#,['#,}4I*N%%_)K$#,C&#*0#,S*#I*%$"
    "I*%#_)&$I**$I*&#I*X$#,Z*#,T~6#=E;)I**)_)*$I*RA#_)F*#_)Y''I*ZW$#_)%#I*L$#I*$#$$#_)(#,I(#I*$#_)a"
    "4&I*J/$I*^'$_)%%I*&#_)$#I*$&_)X$#I*$#_)$#I*$#_)D)#,M$#,2#,]$#,$#*I%%I*V$$,C%#*P%#,-#*N&#,$#*V("
    "#*$#,T%$*5#,<)I*-'I*U)#,'#*;#I*G&#,$#*_*#,$#*b&#,Z&#,$#*W&#,Q+#,$#*F+$,)#*`'#,W%#,6#,U%#,I0#,F"
    "+#*%$,V%#,~M6'$C%)I*CI$$)QH6#$JI($[)%%$)#E*$'[)0*_)-'I*($_)C$&I*['%I*aP&)I*+3I*6)I*+$I*&'I*M+)"
    "I*a.#I*a$&I*GR$)_)W&(I*)#*";
constexpr size_t unicode_decomposition_count = 2061;
constexpr char unicode_decomposition_text[] =
    "D/E'CS$&#%&#%&#%&#-&#'(']$&'P%&#%&#%&#/&+2&#%&#%&#/(-,&%(&#%&#%&#%&#-*/2&#%&#%&#/&+0*3$&#%&#%&"
    "#%&#-&#'(']$&'P%&#%&#%&#/&+2&#%&#%&#/(-,&%(&#%&#%&#%&#-*/2&#%&#%&#/&+0(#1&R&*&C%#&b$'&C%#&b$G%"
    "&C%#&^$P%&C%#&b$%&C%#&b$-&C%#&b$-&C%#&`$#&C%#*`$2&C%#&b$'&C%#&b$%&C%#&b$E%&C%#&b$Z$&C%#&^$6&C%"
    "#&b$+&C%#&b$%&C%#&b$C%&C%#&`$L%&C%#*`$%&C%#&b$%&C%#&b$'&C%#&b$G%&C%#&b$D%,%,&C%#&`$M%&C%#(`$N%"
    "&C%#&b$O%&C%#&b$X$&C%#.^$8&C%#&b$O%&C%#&b$X$&C%#,`$2&C%#&b$'&C%#&b$-&C%#*~$6&C%#&b$O%&C%#&b$X$"
    "&C%#&`$8&C%#&b$%&C%#&b$M%&C%#&b$X$&C%#&`$Y$&C%#&b$X$&C%#*`$4&C%#&b$%&C%#&b$'&C%#&b$+&C%#&b$%&C"
    "%#&b$]$&C%#&^$N%&C%#&^$#&C%#&b$/&%0&C%#&b$/&C%#&b$-&C%#H%X%A&C%#@V$#&C%#^$J&@&C%#&R$#&C%#&V$#&"
    "C%#&V$#&C%#&Q)2&C%#&b$(&C%#&b$9&C%#&b$:&C%#(R&+&C%#&G7#&%#&D9#&C%#*`,3&C%#&Z$#&C%#&Z$[$&C%#&Y:"
    "J%&%#&J&3&Y0#&RE$#,H%8&C%#*T$$&C%#&Q(%&C%#&`$#&C%#&>#&C%#&P.}&C%#&b$'&C%#&Z$&&C%#&b$'&C%#&Z$&&"
    "C%#&b$'&C%#&V$&&C%#&b$'&C%#&~$&&C%#&b$'&C%#&~$&&C%#&b$'&C%#&F%M$&C%#&`$#&C%#*Z%V$&C%#2P%,&C%#&"
    "Z$C%&C%#&E*H%&C%#&D%#&C%#&N-)&C%#&a>(&%#&N@#&C%#]3QK$JS$%%#'G$#%8ES$C&`'DS$7^J$#2])ES$&UQ$#%VP"
    "$DS$&_P$ES$&'#&'#(/#(/#&+#&E%#X$D&1&;#&;0&+#&'#&'#&G$#X$F$1&;#&.0&/#&+#.5#&#1~%I'2&#3(&0,<1.K$"
    "0&&$&9/:8#D%C%#R$(.&#3(&0,I%1.Z$0&&$&9/T$E&5&%#X'`(4&C%#@N%#&C%#&b$'&C%#*X$&&C%#*I-'&%#&H/#&C%"
    "#&`$#&C%#*`$*&C%#&b$+&C%#&V$#&C%#*W-#&%#&Z.#&C%#&V%*&C%#&b$+&C%#&b$)&C%#&Z$(&C%#*Z$#&C%#V5[@YW"
    "$&#%&E%#&D%%&I%$X,Y+#(J$#F$E$#PH$OH$SQ$43#*)#K%^$#%%#%%#%-#%-#%%#%5#%+#~)S,G+&#U$C$N%X$%%#'=#K"
    "(I+C+)/#I%F%#%%#%-#)A#X1[4W4*#R$&#U$C$N%X$%%#R&C*Y,P&K&T$&%#&$U$~*C+a*T*U*a*21#&#%(#J$&+I$b*[*"
    "U)&%#&$U$`+I,I*(#-&),&(M$M9U9S@77#--#--#--#=X$&7E&H''#'%E';'%#5F'#G$E%Q&77#--#--#--#=X$&^)M,U*"
    "DQ(CQ(QS(('#('#('#('#,+#V%U%#('#*'#&%#()#^N$DS0bC/&C%#&`$^$&C%#&b$[$&C%#&b$}&C%#&M)b%&C%#&H-/&"
    "C%#&b$[$&C%#&b$}&C%#&b$6&C%#&b$/&C%#&_-~%&%#&$%&%#&^/[%&C%#&b$)&C%#&I}V%&%#&HA%&C%#&`$(&C%#&`$"
    ")&C%#&b$[$&C%#&b$X$&C%#&b$a$&C%#&b$1&C%#&`$'&C%#&O)`%&C%#&J-#&C%#&b$G%&C%#&b$}&C%#&`$>&C%#&W_1"
    "`$&%#&Xa1]%&C%#&b$*&C%#&`$Z%&C%#&b$/&C%#&b$[$&C%#&`$Z$&C%#&b$[$&C%#&b$}&C%#&b$*&C%#&Q)Z%&C%#&b"
    "$1&C%#&Q(2&%#&$%&%#&~2#&C%#&b$/&C%#&^$#&C%#&b$[$&C%#&Sa1`$&%#&TC2]%&C%#&`$V%&C%#&b$[$&C%#&Q1Z$"
    "&%#&-#&%#&ES1#&%#&`C2#&C%#&b$[$&C%#&b$}&C%#&b$*&C%#&`$4&C%#&b$;&C%#&b$(&C%#&I2Z%&%#&%1&%#&L4,&"
    "C%#&b$C%&C%#&`$H%&C%#&b$%&C%#&b$1&C%#&b$$&C%#&b$[$&C%#&`$Z$&C%#&b$%&C%#&`$$&C%#&`$,&C%#&b$E%&C"
    "%#&b$}&C%#&F$#&;T%&)'&'#(O3(.^6[$&C%#&b$V$&C%#&E)2&C%#&b$$&C%#&b$5&C%#&b$.&C%#&_^1$&%#&`~1$&%#"
    "&$$&%#&$5&%#&$.&%#&]~1)&%#&ZH2]$&C%#&b$V$&C%#&b$.&C%#&M)&&C%#&b$$&C%#&b$5&C%#&b$.&C%#&__1$&%#&"
    "bI21&C%#&b$W$&C%#&V$#&C%#&b$V$&C%#&M)2&C%#&b$$&C%#&b$5&C%#&b$.&C%#&S`1$&%#&~U1$&%#&$$&%#&$5&%#"
    "&$.&%#&$C%&%#&Z7#&C%#&b$V$&C%#&W62&%#&$$&%#&$5&%#&$.&%#&$C%&%#&P8H%&C%#&b$I%&C%#&b$V$&C%#&b$.&"
    "C%#2SV$C$&#%&aW0J$&%#&$%&%#&$E'&%#&bY0`%&#%&QZ0J$&%#&$%&%#&$E'&%#&JX0`%&#%&YX0J$&%#&$%&%#*ZZ0G"
    "$&#%&I[0J$&%#&$%&%#*FY0G$&#%&UY0J$&%#&$%&%#&$E'&%#&V[0`%&#%&E~0J$&%#&$%&%#&$E'&%#&bY0`%&#%&QZ0"
    "J$&%#&$%&%#&$E'&%#&R~0`%&#%&a~0J$&%#&$%&%#&$E'&%#&VZ0`%&#%&E[0J$&%#&$%&%#*F]0G$&#%&U]0J$&%#&$%"
    "&%#*J[0G$&#%&Y[0J$&%#&$%&%#&$E'&%#(Z]0^%(K^0J$(#%(#E'&b[0`%&#%&Q~0J$&%#&$%&%#&$E'&%#&R^0`%&#%&"
    "a^0J$&%#&$%&%#&$E'&%#&R^0F'%,bR$&5CS$%2bR$&7CS$%4bR$&9CS$%6bR$&C$CS$%=bR$&0CS$%3bR$&*CS$%-bR$*"
    "GV0MW$&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&E$#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#"
    "&%#&%#&E&#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&%#&^^0`&&#&&a^0E'&`^0#&,#(-(&MC1)&LE1`&&#"
    "&&#*%8bR$&9MW$'S%LW$*DT$GW$&[O2)&~^0#&4#(5(&aC1)&DF1L'%<bR$&ACS$%>bR$&}MW$&SE1L'&#%&#E'&NC1Z&&"
    "#&&E$*%V&bR$*U%GW$&E$#&D&Z&&#&&#*%@bR$(KJ1CS$&#%&#E'&TF1Z&&#&&/*%X$bR$&E$IT$&#%&+_%&/#&N%Z&&#&"
    "&#*%P$bR$&I$KT$&TR$J$%]P$bR$%LU$#*[T2MW$&H^0#&-#(,(&]E1)&PH1L'%H$bR$&]$CS$%V$bR$&W$MW$%LR$LW$)"
    "_W2#%%#M5VH1#+^X$#%W*#b)YO3SV$&'#J$'#b$[&#&+#&&#N&E&#.-#*)#T$S$#('#Z$Q$#*1#*'#()#R$XC4#(KE4#:J"
    "$#&DD4#&'#&OE4#&%#*=#&%#*)#&%#2)#&%#*1#&%#*)#&%#J%Y$#&/#&%#&'#F&`%#&%#&K$#&%#2C%#&%#&%#&%#[&IX"
    ")RV$%%#G^&ZU%SV$DZ%_Y%EY9('#('#('#('#('#('#('#('#('#('#('#*)#('#('#21#&#%()$&#%()$&#%()$&#%()$"
    "&#%R$L&$8Q(#@}#('#('#('#('#('#('#('#('#('#('#('#*)#('#('#21#&#%()$&#%()$&#%()$&#%()$&#%R$L&$*U"
    "'#&%#&%#&%#,9#GCG&YWP$TL;%JX5#%O`6#%FC$#%Pb1#%`L3#%I^%#%Q^H$#%##%XGF$#%CK}#%VGA#%E_$#%_M'#%IJ-"
    "#%[T'#%WN&#%Y:#%_6#%Q~&#%~K6#%UT$#%_^$#%MS$#%aH+#%]U)#%QK'#%`YH$#%IR%#%a[.#%QT&#%GD-#%Eb.#%^OC"
    "$#%YL,#%Ga-#%Q~$#%XL6#%aS2#%QG&#%LX7#%]G'#%IH&#%G~%#%G`1#%RWC$#%EF$#%Q5#%Oa+#%aC&#%]V&#%QP%#%W"
    "T'#%MC&#%O(#%I~&#%IW'#%]F%#%YK$#%^Y5#%I2#%EE%#%UE&#%YV*#%YZ(#%T],#%Pb;#%ME&#%[X1#%_D%#%ZD*#%SI"
    "&#%Sb,#%MF(#%`DB#%W[$#%E^)#%Q_$#%M6#%CE*#%S3#%KD/#%TZD$#%U^9#%`M:#%B#%CH7#%G]$#%IF&#%KK,#%LR(#"
    "%DN7#%IV&#%[R3#%LOA#%_])#%YE%#%MZ,#%UA#%TH4#%Ka5#%ZV7#%Wa*#%Z~+#%aN2#%JX&#%W].#%`X7#%YL%#%IM2#"
    "%SW)#%EI&#%bQ2#%Ob4#%RU4#%V['#%Qa2#%LW2#%M_+#%PN6#%YN$#%C)#%SN.#%OI-#%S[%#%II'#%]R&#%VPB#%]7#%"
    "EV%#%UZ%#%UP&#%UF(#%[U'#%IK1#%]N%#%]E%#%Q&#%HFI$#%YE-#%EN%#%Ya4#%^Q;#%[T$#%C*#%WL$#%UK(#%OE$#%"
    "CW$#%EW%#%WE%#%YJ$#%QN*#%RF(#%MV(#%QU$#%HVC$#%[+#%WD$#%YC1#%Wb.#%SA#%Da8#%[5#%O[$#%IF'#%CL+#%T"
    "O'#%DL5#%MD'#%_Q%#%I@#%GI$#%O~,#%Q.#%EV(#%[-#%_a+#%GO%#%G(#%C0#%~KG$#%IE8#%OC/#%KS%#%P`=#%XH,#"
    "%KH$#%KT(#%E(#%WX'#%UI%#%[_&#%KJ%#%WN*#%C[(#%ET*#%LS}#%O]:#%L]D$#%GR-#%S*#%_W%#%Y8#%]Y%#%C8#%G"
    "T$#%MM%#%_W0#%DRF$#%EO+#%WG=#%~GF$#%_Q)#%EP+#%CW3#%`~:#%U>#%IP&#%CZ(#%aR4#%~HE$#%OA#%OH'#%_]'#"
    "%Y6#%W8#%]F%#%EU&#%[@#%Q~'#%OX'#%G$#%YQ'#%OT%#%H]D$#%YZ0#%~L0#%I^1#%SO$#%GY+#%UM+#%K^%#%SG$#%R"
    "S>#%KF&#%]D-#%~T&#%M(#%G:#%F`'#%PE$#%aN0#%RLA#%OJ=#%ZR;#%H&#%aL)#%]E%#%IC0#%DX3#%U~+#%VI&#%QK7"
    "#%`Q&#%EC*#%FO)#%RN8#%H~)#%CK%#)WL$#'WD*#)NL-#%[W3#%C]$#%GJ$#%G%#%1#%W%#%Q_1#%RL0#%aR$#'MH&#'O"
    "Q%#)CW%#%M/#+Gb&#%=#%[%#%[K%#%NP)#%U`%#%TSF$#%U6#%O)#%[:#%Y$#%])#%[G$#%U)#%G)#%S@#%S)#%[^$#%7#"
    "%OE%#%K0#%O%#%K)#%]X$#%I,#%a-#%KB#%GR%#%I-#%S3#%[G$#%].#%QB#%aI%#%]-#%9#%$#%3#%/#%1#%C&#%%#%G."
    "#%E'#%a6#%KF$#%M$#%S&#%E6#%I,#%SA#%[+#%##%_@#%UN%#%O+#%Y9#%S&#%W<#%M&#%_M$#%G+#%YM&#%[4#%[&#%N"
    "_>#%UJT*#%NPC*#)Fb<#%a[$#%~'#%RA#%M}#%Y&#%Q7#%I&#%IM$#%R'#%K'#%U'#%SJ$#%U(#%E,#%C$#%_3#%O/#%W]"
    "$#%1#%C,#%K'#%Y5#%O*#%N'#%O+#%^%#%G,#%G'#%C<#%S(#%O&#%K3#%_4#%I-#%+#%Y&#%IE%#%E'#%Q;#%W<#%B#%Q"
    "(#%[2#%C8#%UF&#%FZ%#%W*#%Y*#%Q7#%M,#%M&#%G1#%'#%Y-#%E$#%U$#%O(#%6#%[;#%MA#%a3#%Y.#%C1#%U,#%W7#"
    "%Q/#%]W$#%],#%W[$#%S}#%M'#%C$#%U5#%U&#%~%#%O&#%(#%D$#%['#%E(#%_:#%CF$#%W6#%Q5#%]0#%OC%#%Q)#%I*"
    "#%M+#%K%#%;#%C&#%QP$#%WK%#%_MG)#%.#%E~(#%RF_*#%YJ%#%E%#%CDL+#%QK(#%IC4#%b[R*#%Y'#K'L^O%K^%'U$)"
    "947%#%%CY]&$%#%%TZ]&8%#%%#+%%#%%#%%#%%#%%#%%#''#%%#%%#%%#%%#''#''#%%#''#%%#''#%%#%%#%%#%%#%L$("
    "%*/%7#%5#~W-MNH'YRH'('#B7#J+[+])&%#~D$MD$QD$&#U$b9G:I9&#6(#=~2a2G2&%#^Z$[Z$E[$OE_%GE_%MF_%%%#%"
    "15%#%%#%%#%%#%Q(W(<%%#%%5%%#%$%%%#CGV'`ZD)`YK*%,#%5#%EQ~)#%F_[)#%_'#%=#%Q'#%S*#%a$#%_'#%R$#%DF"
    "1#%[~K*#%~Q])#%1#%C$#%I$#%M]~)#%HIK*#%_M1#%O%#%_^~)#%J^~)#%=#%RP$#%CQ$#%5#%WEC,#%Vab+#%}#%JU1#"
    "%[X1#%9#%[%#%-#%FY1#%G^1#%'#%Y$#%O$#%9#%%#%E$#%G&#%3#%5#%U$#%7#%'#%##%##%]M^)#%Z^O)#%NM1#%M$#%"
    "K[^)#%RZ^)#%/#%M$#%S,#%N)#%C$#%C%#%W&#%K(#%W$#%I'#%C$#%E%#%##%M$#%G$#%3#%A#%K8#%b3#%E4#%N/#%I%"
    "#%~I%#%QQ&#%b4#%O%#%U$#%F+#%Q-#%$#%Y*#%SFa)#%Fb`)#%-#%A#%K$#%3#%C'#%OWa)#%G'#%^Ra)#%a%#%;#%`'#"
    "%_+#%RZ4#%}#%[C5#%O&#%##%WKb)#%LCb)#%M$#%A#%;#%MUb)#%TTb)#%1#%]W$#%DV$#%DM5#%aP5#%}#%G(#%H&#%Q"
    "XC*#%DMC*#%IMC*#%RJC*#%(#%E$#%M)#%%#%H^5#%__5#%Y%#%M$#%[%#%PC6#%EUW*#%PSW*#%KF6#%)#%)#%K$#%SOE"
    ",#%JLE,#%IFE*#%##%bUS)#%`P4#%##%XH6#%Eb_*#%GU:#%RJD+#%5#%RK6#%QN6#%I&#%7#%G%#%S+#%PW6#%^$#%SZ6"
    "#%CGF*#%~CF*#%E+#%+#%'#%&#%_%#%K$#%K%#%>#%9#%a%#%K$#%+#%W$#%9#%G'#%K(#%I%#%[*#%[^F*#%`_F*#%D'#"
    "%[)#%Y$#%E)#%]CG*#%`_F*#%~(#%Z$#%XZ7#%YF8#%M$#%a$#%N%#%XC8#%IQ8#%]$#%_LH*#%PEH*#%M4#%`-#%bU8#%"
    "SZ8#%T[8#%J%#%_M.#%)#%YY-#%J)#%ED0#%JPA#%_V4#%+#%/#%]&#%8#%CJI*#%VJ_*#%EN9#%L*#%]/#%I&#%SaH*#%"
    "``H*#%`)#%M2#%PZ9#%M]9#%E)#%Q'#%_.#%YbH*#%R_H*#%HO:#%US:#%O[I*#%HXI*#%NS:#%KU:#%]%#%Y$#%%#%GPJ"
    "*#%F[1#%aa1#%ZMJ*#%_IK*#%~bJ*#%}#%N)#%a-#%S%#%U&#%N&#%S%#%A#%=#%U~J*#%VaJ*#%Y2#%a&#%XV;#%S~;#%"
    "*#%WCK*#%RPK*#%M:#%CbJ*#%C&#%R_J*#%I*#%X$#%(#%LK<#%KN<#%I&#%.#%O&#%SJM)#%b`L)#%_TK*#%POK*#%aCL"
    "*#%H[K*#%=#%Y$#%S^L*#%R[L*#%M$#%CMM*#%a0#%VLM*#%E$#%`P=#%UR=#%~Q=#%##%a[=#%M$#%M$#%K$#%M'#%`]="
    "#%UC>#%GTN*#%RRN*#%KXN*#%FUN*#%aEY)#%`[X)#%E~O*#%Q$#%[+#%RGK+#%;#%[Q>#%abO*#%$#%Q%#%W$#%LDP*#%"
    "%#%##%Y%#%DT>#%GX>#%LW>#%C(#%Q[L+#%`_P*#%_&#%C'#%Ta>#%IWM+#%bOQ*#%KWQ*#%Y%#%NVQ*#%[(#%ZN}#%ET}"
    "#%7#%-#%]UR*#%Y5#%##%T^R*#%ZQ}#%U]O+#%LaR*#%)#%F]}#%UHP+#%^]R*#%FF@#%SG@#%,#%]$#%OKT*#%HET*#%F"
    "I@#%OO@#%Y&#%I'#%DT@#%KRR+#%a$#%^QR+#%C[R+#%`XT*#%K_T*#%T]T*#%M)#%9#%MPU*#%U'#%HOU*#%SWU*#%RVU"
    "*#%aQ~)#%V[Z*#%]PA#%E(#%RRA#%IVA#%TK6#%GRI+#%}#%FE=#%5#%X~[)#%)#%W~)#%HVH$#%OEB#%.#%G$#%Va:#%_"
    "b:#%'#%7#%U%#%OHW*#%PHW*#%S&#%O'#%W'#%V+#%W,#%W%#%C*#%J3#%Q*#%'#%C$#%WHW*#%M6#%N,#%V]V+#%O_B#%"
    "'#%I%#%KNZ*#%NIZ*#%S_W*#%`_W+#%+#%CHX+#%E5#%PYX+#%MQC$#%;#%9#%'#%C'#%D%#%O+#%Z%#%Q,#%D(#%I'#%Y"
    "$#%`]C$#%WCD$#%C%#%RCD$#%QID$#%)#%KCZ*#%b[Y*#%1#%TMD$#%MOD$#%`FM$#%IbD,#%S.#%RM~+#%5#%U`D$#%]'"
    "#%],#%Y/#%IH[*#%~bZ*#%O$#%W(#%[(#%S^[*#%XU^$#%TF`(#%@#%K&#%_Q`(#%VC`(#%K)#%WL^*#%Y$#%TX]*#%](#"
    "%C%#%]D^*#%HD^*#%]4#%a,#%%#%Z(#%]:#%[$#%Ma^*#%`I^*#%NbH$#%GEI$#%C_^*#%D~D,#%]PI$#%DT}#%EZ}#%GE"
    "`*#%M0#%Z]F,#%3#%WYI$#%WEa*#%RXG,#%KaG,#%XKa*#%##%_$#%][a*#%JPa*#%`]I$#%ObI$#%_*#%Y$#%[&#%bEJ$"
    "#%GYJ,#%^DC+#%_5#%].#%`EK$#%a$#%WJK$#%QYD+#%N`L,#%]CM,#%U3#%I+#%N`D+#%LYK$#%I]K$#%-#%1#%7#%1#%"
    "M%#%MOF+#";
constexpr size_t unicode_composition_count = 941;
constexpr char unicode_composition_text[] =
    "C~$(+D~$%%%G&'Q.V1SF$PF$C-Y%'S9X,N9S9''V9'''X&I=N9S9+'*N=%%]G$DD$''`&WG$PC$Q+'[:F9L-[9'+P2P*C:"
    "^9'S)N)'W9+T0Q0+'^>%%['''+H(KH$X>E&'W;LC$[9T9]9F4K4~9a9~9+Y9~9I:&+''T4Z(~(K@H:M:P:Y:&P@%%%a('G"
    "+F1KH$FBI&I&'~&M}P=K6'~:a:X:K)'Q4`:I;`:'a:X:]:T4N)Q;D;I;D5J)U;&RB%%I*''N*SI$bA'U$U&'H'Y@~)~:E;"
    "&3'''X;a;&+''E)HJ$a*WBR<I6H<OB&HBK<F<'G<'TD$%%%U$'Q.D0aD$^D$Q+Y%'S9X,N9S9''V9'''F%W;N9S9+'*~;%"
    "%KF$DD$''N%EF$PC$Q+'[:F9L-[9'+P2P*C:^9'S)N)'W9+T0Q0+'Y)bC$%%I&''N&YF$X>E&'W;LC$[9T9G)Y3F4K4~9a"
    "9~9+Y9~9I:&+''T4Z(J'Y>H:M:P:Y:&^>%%%O''G+T/YF$FBI&I&'~&M}P=K6'~:a:X:K)'Q4`:I;`:'a:X:]:T4N)Q;[%"
    "~=I;D5J)U;&`@%%W(''~(aG$bA'U$U&'H'Y@~)~:E;&3'''X;a;&I$@''E)VH$O)WBR<I6VB]H$T(Q(HBK<F<'G<'Q6TI$"
    "EG$H3&/&~;M$'H$_1I.&/&`+a,&/&H+P2U2X2J%X$*&+C<&/&~;M$'H$_1I.&/&`+a,&/&H+P2U2X2J%X$*&+S<&/&$&/&"
    "V,'$'U&'$'E$%%%E$%%%a$]&&/&+,&/&+1&/&+,&/&+R}&%8%I3%J/%L&YJ$ZF$YF$$D-%K-3JG$M=%C-LG$G>%K,;FH$E"
    "H$$XG$[>%W-XI$_}%I,&`H$_H$$TH$Q@E,XI$OA%O+~&;^'VAUE$$F-%O-&`&XAM<%Q(ZAC=%O,&P'~AEG$$^F$]=%K,L("
    "XAY>%E,%D)ZAUG$$VG$S}%Q+b(~AE@%S+&Z$RG$YG$7^G$IH$9RH$%+E$'J$&S$P$E$7'T$Y$T$Y$^$C%/J%O%'''6H$':"
    "&C$@57'D$I$T$Y$N$S$/Z$_$'''6~$+%5%9%=%'$''%&)%%5%9$')%'$'%)&%'%'$'%'$I$%%%%%%%%%%%U&%I%%9%_&74"
    "7A%E$%I%''[)`)''[)%%%%%%`)''[)`)''[)%%%%%%`)'$')'$')''C)H)''C)%%%%%%H)''C)H)''C)%%%%%%H)''('')"
    "''('')'$')'$')''('''%%)''S&X&''S&%%%%%%X&''S&X&''S&%%%%%%);W%F&G$%%2W%P$%%E%%%%'$'%%%%%%%%)$+%"
    "%%%%%%5%4%%%1%0%%%-%%%]$T$%%%%%%%%%%%%%%%%%%%%%%%%'W$T$%%%%%%%%%%%%%%%%%%%%%%%%'%%%%aA%%%%%%'$"
    "'%%%";
// END GENERATED
// clang-format on

// Reads the numbers of a generated table; tests/generate_unicode.py says how they are spelled.
struct UnicodeText {
    const char* at;
    constexpr uint32_t digit() {
        const char c = *at++;
        return c == '~' ? '\\' - 35 : c == '}' ? '?' - 35 : uint32_t(c - 35);
    }
    constexpr uint32_t number() {
        uint32_t value = 0, shift = 0, d = 32;
        for (; d >= 32; shift += 5) {
            d = digit();
            value |= (d & 31) << shift;
        }
        return value;
    }
    constexpr uint32_t signed_number() {  // to be added modulo 2^32
        const uint32_t value = number();
        return value & 1 ? ~(value >> 1) : value >> 1;
    }
};

constexpr uint32_t category_alternating = 30;  // a run of Lu, Ll, Lu, Ll ...

// first code point * 32 + category
constexpr auto unicode_categories = [] {
    std::array<uint32_t, unicode_category_count> runs{};
    UnicodeText text{unicode_category_text};
    uint32_t code = 0;
    for (uint32_t& run : runs) {
        const uint32_t kind = text.digit();
        run = code << 5 | (kind & 31);
        code += kind < 32 ? 1 : text.number() + 2;
    }
    return runs;
}();

struct CaseRun {
    uint32_t first, last;  // code points
    uint32_t step;         // 1: all of them; 2: every other
    uint32_t distance;     // modulo 2^32
};

template <size_t Count>
constexpr std::array<CaseRun, Count> decode_case_runs(const char* generated) {
    std::array<CaseRun, Count> runs{};
    UnicodeText text{generated};
    uint32_t code = 0;
    for (CaseRun& run : runs) {
        code += text.number();
        const uint32_t steps = text.number(), step = 1 + (steps & 1);
        run = {code, code + steps / 2 * step, step, text.signed_number()};
    }
    return runs;
}
constexpr auto unicode_lower = decode_case_runs<unicode_lower_count>(unicode_lower_text);
constexpr auto unicode_upper = decode_case_runs<unicode_upper_count>(unicode_upper_text);

struct CombiningRun {
    uint32_t first, last;
    uint32_t order;  // canonical combining class
};
constexpr auto unicode_combining = [] {
    std::array<CombiningRun, unicode_combining_count> runs{};
    UnicodeText text{unicode_combining_text};
    uint32_t code = 0;
    for (CombiningRun& run : runs) {
        code += text.number();
        const uint32_t more = text.number();
        run = {code, code + more, text.number()};
    }
    return runs;
}();

struct Decomposition {
    uint32_t first;  // named alike in all tables: the code point that is searched for
    uint32_t a, b;   // b == 0: a single code point
};
constexpr auto unicode_decomposition = [] {
    std::array<Decomposition, unicode_decomposition_count> all{};
    UnicodeText text{unicode_decomposition_text};
    Decomposition last{};
    for (Decomposition& one : all) {
        last.first += text.number() / 2;
        last.a += text.signed_number();
        last.b += text.signed_number();
        one = last;
    }
    return all;
}();

// Places in unicode_decomposition, ordered by (a, b), of the pairs that compose.
constexpr auto unicode_composition = [] {
    std::array<uint16_t, unicode_composition_count> places{};
    UnicodeText text{unicode_composition_text};
    uint32_t place = 0;
    for (uint16_t& one : places) one = uint16_t(place += text.signed_number());
    return places;
}();

// The last entry whose `first` is not above `code`, or null.
template <class Table>
const typename Table::value_type* unicode_find(const Table& table, char32_t code) {
    const auto above = std::upper_bound(
        table.begin(), table.end(), code,
        [](char32_t c, const typename Table::value_type& entry) { return c < entry.first; });
    return above == table.begin() ? nullptr : &*(above - 1);
}

template <class Table>
char32_t map_case(const Table& table, char32_t c) {
    const CaseRun* run = unicode_find(table, c);
    if (run == nullptr || c > run->last || (c - run->first) % run->step != 0) return c;
    return c + run->distance;
}

uint8_t combining_class(char32_t c) {
    const CombiningRun* run = c < 0x300 ? nullptr : unicode_find(unicode_combining, c);
    return run != nullptr && c <= run->last ? uint8_t(run->order) : uint8_t(0);
}

std::string map_text(std::string_view text, char32_t (*map)(char32_t)) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(text, &at);
        if (c == bad_utf8) out.append(text, begin, at - begin);
        else utf8_append(out, map(c));
    }
    return out;
}

}  // namespace

char32_t utf8_next(std::string_view text, size_t* at) {
    const unsigned lead = uint8_t(text[(*at)++]);
    if (lead < 0x80) return lead;
    if (lead < 0xc2 || lead > 0xf4) return bad_utf8;
    const int more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    char32_t value = lead & (0x3fu >> more);
    // what the first continuation byte must be: no overlong form, surrogate or value over 10FFFF
    unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 0; i < more; ++i) {
        const unsigned byte = *at < text.size() ? uint8_t(text[*at]) : 0u;
        if (byte < low || byte > high) return bad_utf8;
        value = value << 6 | (byte & 0x3f);
        ++*at;
        low = 0x80;
        high = 0xbf;
    }
    return value;
}

void utf8_append(std::string& out, char32_t c) {
    if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) c = 0xfffd;
    if (c < 0x80) {
        out += char(c);
        return;
    }
    const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    out += char((0xff00u >> (more + 1) & 0xff) | c >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += char(0x80 | (c >> (6 * i) & 0x3f));
}

size_t utf8_valid_prefix(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        uint64_t eight;
        if (text.size() - at >= 8) {
            std::memcpy(&eight, text.data() + at, 8);
            if ((eight & 0x8080808080808080u) == 0) {
                at += 8;
                continue;
            }
        }
        const size_t begin = at;
        if (utf8_next(text, &at) == bad_utf8) return begin;
    }
    return at;
}

bool utf8_valid(std::string_view text) { return utf8_valid_prefix(text) == text.size(); }

size_t utf8_incomplete_suffix(std::string_view text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
        size_t at = text.size() - back;
        const unsigned lead = uint8_t(text[at]);
        if (lead >= 0x80 && lead < 0xc0) continue;
        const bool cut = lead >= 0xc2 && lead <= 0xf4 && utf8_next(text, &at) == bad_utf8;
        return cut && at == text.size() ? back : 0;
    }
    return 0;
}

size_t utf8_count(std::string_view text) {
    size_t count = 0;
    for (size_t at = 0; at < text.size(); ++count) utf8_next(text, &at);
    return count;
}

std::string utf8_repair(std::string_view text) {
    std::string out;
    while (!text.empty()) {
        size_t at = utf8_valid_prefix(text);
        out.append(text, 0, at);
        if (at == text.size()) break;
        utf8_next(text, &at);
        utf8_append(out, 0xfffd);
        text.remove_prefix(at);
    }
    return out;
}

Category category(char32_t c) {
    if (c >= bad_utf8) return Category::Cn;
    const auto above = std::upper_bound(unicode_categories.begin(), unicode_categories.end(),
                                        uint32_t(c) << 5 | 31);
    const uint32_t run = *(above - 1);  // the first run begins at 0
    if ((run & 31) == category_alternating) return Category((c - (run >> 5)) & 1);
    return Category(run & 31);
}

bool is_whitespace(char32_t c) {
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
           c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

char32_t to_lower(char32_t c) { return map_case(unicode_lower, c); }
char32_t to_upper(char32_t c) { return map_case(unicode_upper, c); }
std::string to_lower(std::string_view text) { return map_text(text, to_lower); }
std::string to_upper(std::string_view text) { return map_text(text, to_upper); }

// ---- NFC ------------------------------------------------------------------------------------

namespace {

// Hangul syllables are computed (Unicode 3.12): LV = base + (l * 21 + v) * 28, LVT = LV + t.
constexpr char32_t hangul_base = 0xac00, hangul_l = 0x1100, hangul_v = 0x1161, hangul_t = 0x11a7;
constexpr uint32_t hangul_l_count = 19, hangul_v_count = 21, hangul_t_count = 28;
constexpr uint32_t hangul_count = hangul_l_count * hangul_v_count * hangul_t_count;

struct NormalChar {
    char32_t code;
    uint8_t  order;
};

void decompose(std::vector<NormalChar>& out, char32_t c) {
    if (c - hangul_base < hangul_count) {
        const uint32_t index = c - hangul_base, t = index % hangul_t_count;
        const uint32_t lv = index / hangul_t_count;
        out.push_back({hangul_l + lv / hangul_v_count, 0});
        out.push_back({hangul_v + lv % hangul_v_count, 0});
        if (t != 0) out.push_back({hangul_t + t, 0});
        return;
    }
    // Only the first half of a pair decomposes again, four deep at most.
    char32_t tail[8];
    size_t tail_count = 0;
    for (;;) {
        const Decomposition* found = unicode_find(unicode_decomposition, c);
        if (found == nullptr || found->first != c) break;
        if (found->b != 0) tail[tail_count++] = found->b;
        c = found->a;
    }
    out.push_back({c, combining_class(c)});
    while (tail_count-- > 0) out.push_back({tail[tail_count], combining_class(tail[tail_count])});
}

char32_t compose_pair(char32_t a, char32_t b) {  // 0: they do not compose
    if (a - hangul_l < hangul_l_count && b - hangul_v < hangul_v_count)
        return hangul_base + ((a - hangul_l) * hangul_v_count + (b - hangul_v)) * hangul_t_count;
    if (a - hangul_base < hangul_count && (a - hangul_base) % hangul_t_count == 0 &&
        b - hangul_t - 1 < hangul_t_count - 1)
        return a + (b - hangul_t);
    const uint64_t pair = uint64_t(a) << 32 | b;
    const auto key = [](uint16_t place) {
        return uint64_t(unicode_decomposition[place].a) << 32 | unicode_decomposition[place].b;
    };
    const auto found =
        std::lower_bound(unicode_composition.begin(), unicode_composition.end(), pair,
                         [&](uint16_t place, uint64_t p) { return key(place) < p; });
    if (found == unicode_composition.end() || key(*found) != pair) return 0;
    return unicode_decomposition[*found].first;
}

// Sorts the marks behind each starter, composes (UAX 15, D117), appends and empties `run`.
void flush_normal(std::string& out, std::vector<NormalChar>& run) {
    for (size_t i = 0; i < run.size();) {
        size_t end = i + 1;
        while (end < run.size() && run[end].order != 0) ++end;
        std::stable_sort(run.begin() + std::ptrdiff_t(run[i].order == 0 ? i + 1 : i),
                         run.begin() + std::ptrdiff_t(end),
                         [](NormalChar x, NormalChar y) { return x.order < y.order; });
        i = end;
    }
    constexpr size_t none = SIZE_MAX;
    size_t starter = none, kept = 0;  // in place: the first `kept` are done
    for (size_t i = 0; i < run.size(); ++i) {
        const NormalChar c = run[i];
        const bool blocked = starter != none && kept - starter > 1 &&
                             run[kept - 1].order >= c.order;
        const char32_t whole =
            starter == none || blocked ? 0 : compose_pair(run[starter].code, c.code);
        if (whole != 0) {
            run[starter].code = whole;
            continue;
        }
        if (c.order == 0) starter = kept;
        run[kept++] = c;
    }
    for (size_t i = 0; i < kept; ++i) utf8_append(out, run[i].code);
    run.clear();
}

}  // namespace

std::string nfc(std::string_view text) {
    // All below U+0300, whose first byte is 0xCC, is composed and composes only with what follows.
    size_t at = 0;
    while (at < text.size() && uint8_t(text[at]) < 0xcc) ++at;
    if (at == text.size()) return std::string(text);
    std::string out;
    out.reserve(text.size());
    std::vector<NormalChar> run;
    for (at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(text, &at);
        if (c < 0x300 || c == bad_utf8) flush_normal(out, run);
        if (c == bad_utf8) out.append(text, begin, at - begin);
        else decompose(run, c);
    }
    flush_normal(out, run);
    return out;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>json
// Numbers first: one table of powers of ten serves reading and writing. Then the value, the
// parser, the writer.

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

struct Wide128 {
    uint64_t high, low;
};

Wide128 multiply_wide(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    __extension__ using Wide = unsigned __int128;
    const Wide product = Wide(a) * b;
    return {uint64_t(product >> 64), uint64_t(product)};
#else
    const uint64_t a0 = uint32_t(a), a1 = a >> 32, b0 = uint32_t(b), b1 = b >> 32;
    const uint64_t mid = a1 * b0 + (a0 * b0 >> 32), mid2 = a0 * b1 + uint32_t(mid);
    return {a1 * b1 + (mid >> 32) + (mid2 >> 32), mid2 << 32 | uint32_t(a0 * b0)};
#endif
}

// The leading 128 bits, cut off, of 10^n = significand * 2^(power_exponent(n) - 127): for reading
// 10^-343 to 10^308, for writing 10^-292 to 10^324.
constexpr int power_min = -343, power_max = 324, power_exact_max = 55;

constexpr int power_exponent(int n) { return n * 1741647 >> 19; }  // floor(log2(10^n)), |n| < 1234

constexpr Wide128 leading_bits(const uint32_t (&words)[32]) {
    int top = 31;
    while (words[top] == 0) --top;
    const int shift = std::countl_zero(words[top]);
    const uint64_t a = uint64_t(words[top]) << 32 | words[top - 1];
    const uint64_t b = uint64_t(words[top - 2]) << 32 | words[top - 3];
    const uint64_t c = uint64_t(words[top - 4]) << 32;
    return {a << shift | b >> 1 >> (63 - shift), b << shift | c >> 1 >> (63 - shift)};
}

constexpr auto powers_of_ten = [] {
    std::array<Wide128, power_max - power_min + 1> table{};
    uint32_t words[32] = {};
    words[4] = 1;  // 5^n * 2^128, exactly
    for (int n = 0; n <= power_max; ++n) {
        table[size_t(n - power_min)] = leading_bits(words);
        uint64_t carry = 0;
        for (uint32_t& word : words) {
            carry += uint64_t(word) * 5;
            word = uint32_t(carry);
            carry >>= 32;
        }
    }
    for (uint32_t& word : words) word = 0;
    words[31] = 1u << 31;  // floor(2^1023 / 5^n): cutting off at each step changes nothing
    for (int n = -1; n >= power_min; --n) {
        uint64_t rest = 0;
        for (int i = 31; i >= 0; --i) {
            rest = rest << 32 | words[i];
            words[i] = uint32_t(rest / 5);
            rest %= 5;
        }
        table[size_t(n - power_min)] = leading_bits(words);
    }
    return table;
}();

// ---- reading numbers ------------------------------------------------------------------------

struct Decimal {
    uint64_t digits   = 0;  // the first that fit
    int64_t  exponent = 0;  // value = digits * 10^exponent, and more where `dropped` > 0
    uint64_t dropped  = 0;  // digits that did not fit
    bool negative = false, integer = true;
    const char* first = nullptr;  // all digits and the point
    const char* last  = nullptr;
};

bool is_digit(const char* p, const char* end) { return p < end && uint8_t(*p - '0') < 10; }

// RFC 8259 section 6. Returns where the number ends, or null.
const char* scan_decimal(const char* p, const char* end, Decimal& number) {
    number.negative = p < end && *p == '-';
    p += number.negative;
    number.first = p;
    const auto digit_run = [&](int64_t places) {
        for (; is_digit(p, end); ++p) {
            const uint64_t digit = uint64_t(*p - '0');
            if (number.dropped > 0 || number.digits > (UINT64_MAX - digit) / 10) {
                ++number.dropped;
                ++number.exponent;
            } else {
                number.digits = number.digits * 10 + digit;
            }
            number.exponent -= places;
        }
    };
    if (!is_digit(p, end)) return nullptr;
    if (*p == '0') ++p;
    else digit_run(0);
    if (p < end && *p == '.') {
        number.integer = false;
        if (!is_digit(++p, end)) return nullptr;
        digit_run(1);
    }
    number.last = p;
    if (p < end && (*p == 'e' || *p == 'E')) {
        number.integer = false;
        ++p;
        const bool negative = p < end && *p == '-';
        if (p < end && (*p == '-' || *p == '+')) ++p;
        if (!is_digit(p, end)) return nullptr;
        int64_t exponent = 0;
        for (; is_digit(p, end); ++p)
            if (exponent < INT64_MAX / 100) exponent = exponent * 10 + (*p - '0');
        number.exponent += negative ? -exponent : exponent;
    }
    return p;
}

// An unsigned integer of at most 3200 bits: both sides of the exact comparison below stay under
// 2800, because 801 digits and the shortest exponents bound them.
struct BigNumber {
    uint32_t words[100] = {};
    size_t   count      = 0;

    void multiply_add(uint32_t factor, uint32_t carry) {
        uint64_t sum = carry;
        for (size_t i = 0; i < count; ++i) {
            sum += uint64_t(words[i]) * factor;
            words[i] = uint32_t(sum);
            sum >>= 32;
        }
        if (sum != 0) words[count++] = uint32_t(sum);
    }
    void multiply_power_of_5(int64_t exponent) {
        for (; exponent >= 13; exponent -= 13) multiply_add(1220703125, 0);  // 5^13
        for (; exponent > 0; --exponent) multiply_add(5, 0);
    }
    void shift_left(int64_t bits) {
        for (; bits >= 32; bits -= 32) {
            for (size_t i = count; i > 0; --i) words[i] = words[i - 1];
            words[0] = 0;
            ++count;
        }
        multiply_add(1u << bits, 0);
    }
    int compare(const BigNumber& other) const {
        if (count != other.count) return count < other.count ? -1 : 1;
        for (size_t i = count; i-- > 0;)
            if (words[i] != other.words[i]) return words[i] < other.words[i] ? -1 : 1;
        return 0;
    }
};

// Sign of number - (2 * mantissa + 1) * 2^(exponent - 1), the middle between two doubles.
int compare_with_middle(const Decimal& number, uint64_t mantissa, int exponent) {
    constexpr int enough = 800;  // digits; no middle has more than 767
    BigNumber left, right;
    int64_t ten = number.exponent - int64_t(number.dropped);
    int taken = 0;
    bool more = false;
    for (const char* p = number.first; p < number.last; ++p) {
        if (*p == '.' || (taken == 0 && *p == '0')) continue;
        if (taken < enough) {
            left.multiply_add(10, uint32_t(*p - '0'));
            ++taken;
        } else {
            more = more || *p != '0';
            ++ten;
        }
    }
    if (more) {  // any digit there says: above
        left.multiply_add(10, 1);
        --ten;
    }
    right.words[0] = uint32_t(2 * mantissa + 1);
    right.words[1] = uint32_t((2 * mantissa + 1) >> 32);
    right.count = right.words[1] != 0 ? 2 : 1;
    left.multiply_power_of_5(ten);
    right.multiply_power_of_5(-ten);
    const int64_t two = ten - (exponent - 1);
    if (two > 0) left.shift_left(two);
    else right.shift_left(-two);
    return left.compare(right);
}

// To the nearest double, ties to even. The 64 leading bits of the digits times 128 of the power
// bound the value from both sides; only when the middle of two doubles lies between the bounds
// are big integers asked. (After Eisel and Lemire; D. Lemire, "Number parsing at a gigabyte per
// second", 2021.)
double nearest_double(const Decimal& number) {
    const double zero = number.negative ? -0.0 : 0.0;
    const double infinity = number.negative ? -HUGE_VAL : HUGE_VAL;
    if (number.digits == 0 || number.exponent < power_min) return zero;
    if (number.exponent > 308) return infinity;
    const int n = int(number.exponent), zeros = std::countl_zero(number.digits);
    const Wide128 power = powers_of_ten[size_t(n - power_min)];
    Wide128 x = multiply_wide(number.digits << zeros, power.high);
    const uint64_t carried = multiply_wide(number.digits << zeros, power.low).high;
    x.low += carried;
    x.high += x.low < carried;
    // value in [x, x + 2) * 2^scale, and where digits were dropped up to 2^(64 + zeros) more
    const int scale = power_exponent(n) - 127 + 64 - zeros;
    const int top = 127 - std::countl_zero(x.high) + scale;  // 2^top <= value < 2^(top + 1)
    if (top > 1023) return infinity;
    const int exponent = std::max(top - 52, -1074);          // of the last bit of the result
    const int cut = exponent - scale - 64;                   // bits of x.high that do not fit
    if (cut > 64) return zero;
    uint64_t mantissa = cut == 64 ? 0 : x.high >> cut;
    const uint64_t rest = x.high - (cut == 64 ? 0 : mantissa << cut);
    const uint64_t half = uint64_t(1) << (cut - 1);
    const uint64_t width = number.dropped > 0 ? (1u << zeros) + 1 : 0;  // in units of x.high
    if (rest > half || (rest == half && x.low > 0)) {
        ++mantissa;
    } else if (rest + width >= half || (rest + width + 1 == half && x.low > UINT64_MAX - 2)) {
        const int order = compare_with_middle(number, mantissa, exponent);
        mantissa += order > 0 || (order == 0 && mantissa % 2 == 1);
    }
    // adding lets a mantissa that was rounded up to 2^53 carry into the exponent
    const double value = std::bit_cast<double>((uint64_t(exponent + 1074) << 52) + mantissa);
    return number.negative ? -value : value;
}

Error json_error(std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), "invalid_json");
}

// ---- writing numbers ------------------------------------------------------------------------

// floor of g * c / 2^128, with the last bit set when anything was cut off
uint64_t multiply_to_odd(Wide128 g, uint64_t c) {
    const uint64_t carried = multiply_wide(g.low, c).high;
    Wide128 x = multiply_wide(g.high, c);
    x.low += carried;
    x.high += x.low < carried;
    return x.high | (x.low > 1);
}

struct ShortDecimal {
    uint64_t digits;
    int      exponent;
};

// The shortest decimal inside the interval that reads back as `value` (finite, above 0), the
// nearest of them when there are several. (R. Giulietti, "The Schubfach way to render doubles".)
ShortDecimal shortest_decimal(double value) {
    const uint64_t bits = std::bit_cast<uint64_t>(value);
    const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
    const int biased = int(bits >> 52);
    const uint64_t c = biased == 0 ? fraction : fraction | uint64_t(1) << 52;
    const int q = std::max(biased, 1) - 1075;
    const bool narrow_below = fraction == 0 && biased > 1;  // the neighbour below is half as far
    const uint64_t odd = c & 1;                             // then the ends read back as neighbours

    const int k = (q * 1262611 - (narrow_below ? 524031 : 0)) >> 22;  // floor(log10(length))
    const int shift = q + power_exponent(-k) + 1;
    Wide128 g = powers_of_ten[size_t(-k - power_min)];
    if (-k < 0 || -k > power_exact_max) {  // rounded up
        ++g.low;
        g.high += g.low == 0;
    }
    // four times the value and the ends of its interval, in units of 10^k
    const uint64_t low = multiply_to_odd(g, (4 * c - 2 + narrow_below) << shift) + odd;
    const uint64_t mid = multiply_to_odd(g, 4 * c << shift);
    const uint64_t high = multiply_to_odd(g, (4 * c + 2) << shift) - odd;

    const uint64_t s = mid / 4, tens = s / 10;
    if (tens > 0) {  // one digit fewer
        const bool below = low <= 40 * tens, above = 40 * tens + 40 <= high;
        if (below != above) return {tens + above, k + 1};
    }
    const bool below = low <= 4 * s, above = 4 * s + 4 <= high;
    if (below != above) return {s + above, k};
    return {s + (mid > 4 * s + 2 || (mid == 4 * s + 2 && s % 2 == 1)), k};
}

void append_unsigned(std::string& out, uint64_t value) {
    char text[20];
    size_t at = sizeof text;
    do text[--at] = char('0' + value % 10);
    while (value /= 10);
    out.append(text + at, sizeof text - at);
}

void append_signed(std::string& out, int64_t value) {
    if (value < 0) out += '-';
    append_unsigned(out, value < 0 ? 0 - uint64_t(value) : uint64_t(value));
}

void append_double(std::string& out, double value) {
    if (!std::isfinite(value)) {
        out += "null";
        return;
    }
    if (std::signbit(value)) out += '-';
    if (value == 0) {
        out += "0.0";
        return;
    }
    ShortDecimal decimal = shortest_decimal(std::fabs(value));
    for (; decimal.digits % 10 == 0; decimal.digits /= 10) ++decimal.exponent;
    std::string digits;  // at most 17: no allocation on the common libraries
    append_unsigned(digits, decimal.digits);
    const int count = int(digits.size()), point = count + decimal.exponent;
    if (point > 16 || point < -3) {
        out += digits[0];
        if (count > 1) out.append(".").append(digits, 1);
        const int exponent = std::abs(point - 1);
        out += point > 0 ? "e+" : "e-";
        if (exponent < 10) out += '0';
        append_unsigned(out, uint64_t(exponent));
    } else if (point <= 0) {
        out.append("0.").append(size_t(-point), '0').append(digits);
    } else if (point >= count) {
        out.append(digits).append(size_t(point - count), '0').append(".0");
    } else {
        out.append(digits, 0, size_t(point)).append(".").append(digits, size_t(point));
    }
}

}  // namespace

std::string write_double(double value) {
    std::string text;
    append_double(text, value);
    return text;
}

Result<double> parse_double(std::string_view text) {
    Decimal number;
    const char* end = text.data() + text.size();
    if (text.empty() || scan_decimal(text.data(), end, number) != end)
        return json_error("not a number");
    const double value = nearest_double(number);
    if (std::isinf(value)) return json_error("the number is too large for a double");
    return value;
}

}  // namespace detail

// ---- the value ------------------------------------------------------------------------------

// Members in their order; from 17 on with a hash table of their places. The hash is keyed, so
// that nobody can choose keys that collide.
struct Json::Object {
    static constexpr size_t none = SIZE_MAX, few = 16;
    std::vector<JsonMember> members;
    std::vector<uint32_t>   slots;  // place + 1, 0: free; empty while few
    uint64_t                seed = 0;

    size_t find(std::string_view key) const {
        if (!slots.empty()) return size_t(slots[slot_of(key)]) - 1;  // 0 - 1 is none
        for (size_t i = 0; i < members.size(); ++i)
            if (members[i].key == key) return i;
        return none;
    }

    void append(std::string_view key, Json value) {  // a key that is not there
        members.push_back({std::string(key), std::move(value)});
        if (members.size() <= few) return;
        if (slots.size() < 2 * members.size()) index();
        else slots[slot_of(members.back().key)] = uint32_t(members.size());
    }

    // Builds `slots` if needed. Returns the first member whose key came before, or none.
    size_t index() {
        slots.clear();
        if (members.size() <= few) {
            for (size_t i = 1; i < members.size(); ++i)
                if (find(members[i].key) < i) return i;
            return none;
        }
        slots.resize(std::bit_ceil(4 * members.size()));
        if (seed == 0 && !detail::random_bytes(&seed, sizeof seed)) seed = detail::monotonic_ns();
        for (size_t i = 0; i < members.size(); ++i) {
            uint32_t& slot = slots[slot_of(members[i].key)];
            if (slot != 0) return i;
            slot = uint32_t(i + 1);
        }
        return none;
    }

private:
    size_t slot_of(std::string_view key) const {  // where it is, or the free slot where it would be
        size_t i = size_t(hash(key));
        for (;; ++i) {
            i &= slots.size() - 1;
            if (slots[i] == 0 || members[slots[i] - 1].key == key) return i;
        }
    }

    uint64_t hash(std::string_view key) const {
        const auto mix = [](uint64_t a, uint64_t b) {
            const detail::Wide128 product = detail::multiply_wide(a, b);
            return product.high ^ product.low;
        };
        constexpr uint64_t odd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
        uint64_t state = mix(seed ^ key.size(), odd);
        for (size_t i = 0; i < key.size(); i += 8) {
            uint64_t piece = 0;
            std::memcpy(&piece, key.data() + i, std::min(key.size() - i, size_t(8)));
            state = mix(state ^ piece, seed | 1) + odd;
        }
        return mix(state, odd);
    }
};

static_assert(sizeof(Json) == 16);

namespace detail {
namespace {
constinit const Json json_null;  // what `[]` gives for a missing place
}
}  // namespace detail

Json::Json(std::string_view text) { store_text(text); }

Json::Json(std::string text) {
    if (text.size() <= sizeof node_.bytes) {
        store_text(text);
    } else {
        store(Kind::string, new std::string(std::move(text)));
        node_.short_size = long_string;
    }
}

Json::Json(std::vector<Json> items) {
    node_.kind = Kind::array;
    if (!items.empty()) store(Kind::array, new std::vector<Json>(std::move(items)));
}

Json::Json(const Json& other) : node_(other.node_) {
    if (is_string() && is_long()) {
        store(Kind::string, new std::string(*other.load<std::string*>()));
    } else if (is_array() && other.size() > 0) {
        store(Kind::array, new std::vector<Json>(*other.load<std::vector<Json>*>()));
    } else if (is_object() && other.size() > 0) {
        store(Kind::object, new Object(*other.load<Object*>()));
    } else if (is_array() || is_object()) {
        node_ = Json(kind()).node_;
    }
}

void Json::store_text(std::string_view text) {
    if (text.size() <= sizeof node_.bytes) {
        node_.kind = Kind::string;
        node_.short_size = uint8_t(text.size());
        if (!text.empty()) std::memcpy(node_.bytes, text.data(), text.size());
    } else {
        store(Kind::string, new std::string(text));
        node_.short_size = long_string;
    }
}

void Json::destroy() noexcept {
    if (is_array()) delete load<std::vector<Json>*>();
    else if (is_object()) delete load<Object*>();
    else if (is_long()) delete load<std::string*>();
}

bool Json::as_bool(bool fallback) const { return is_bool() ? load<bool>() : fallback; }

int64_t Json::as_int(int64_t fallback) const { return is_int() ? load<int64_t>() : fallback; }

uint64_t Json::as_uint(uint64_t fallback) const {
    if (kind() == Kind::uint64) return load<uint64_t>();
    return is_int() && load<int64_t>() >= 0 ? load<uint64_t>() : fallback;
}

double Json::as_double(double fallback) const {
    if (is_real()) return load<double>();
    if (is_int()) return double(load<int64_t>());
    return kind() == Kind::uint64 ? double(load<uint64_t>()) : fallback;
}

std::string_view Json::as_string(std::string_view fallback) const {
    if (!is_string()) return fallback;
    return is_long() ? std::string_view(*load<std::string*>())
                     : std::string_view(node_.bytes, node_.short_size);
}

std::string Json::take_string() {
    std::string text = is_string() && is_long() ? std::move(*load<std::string*>())
                                                : std::string(as_string());
    *this = nullptr;
    return text;
}

size_t Json::size() const { return is_array() ? items().size() : members().size(); }

std::span<const Json> Json::items() const {
    const auto* items = is_array() ? load<std::vector<Json>*>() : nullptr;
    return items ? std::span<const Json>(*items) : std::span<const Json>();
}

std::span<Json> Json::items() {
    const std::span<const Json> items = std::as_const(*this).items();
    return {const_cast<Json*>(items.data()), items.size()};
}

std::span<const JsonMember> Json::members() const {
    const Object* object = object_or_null();
    return object ? std::span<const JsonMember>(object->members) : std::span<const JsonMember>();
}

const Json& Json::operator[](size_t index) const {
    return index < items().size() ? items()[index] : detail::json_null;
}

const Json& Json::operator[](std::string_view key) const {
    const Json* found = find(key);
    return found ? *found : detail::json_null;
}

const Json* Json::find(std::string_view key) const {
    const Object* object = object_or_null();
    const size_t place = object ? object->find(key) : Object::none;
    return place == Object::none ? nullptr : &object->members[place].value;
}

Json* Json::find(std::string_view key) { return const_cast<Json*>(std::as_const(*this).find(key)); }

Json& Json::push(Json value) & {
    if (!is_array()) *this = array();
    if (load<void*>() == nullptr) store(Kind::array, new std::vector<Json>());
    load<std::vector<Json>*>()->push_back(std::move(value));
    return *this;
}

Json& Json::set(std::string_view key, Json value) & {
    if (!is_object()) *this = object();
    if (Json* found = find(key)) {
        *found = std::move(value);
        return *this;
    }
    if (load<void*>() == nullptr) store(Kind::object, new Object());
    load<Object*>()->append(key, std::move(value));
    return *this;
}

bool Json::erase(std::string_view key) {
    const Json* found = find(key);
    if (found == nullptr) return false;
    Object& object = *load<Object*>();
    object.members.erase(object.members.begin() + std::ptrdiff_t(object.find(key)));
    if (!object.slots.empty()) object.index();
    return true;
}

void Json::reserve(size_t count) {
    if (is_array()) {
        if (load<void*>() == nullptr) store(Kind::array, new std::vector<Json>());
        load<std::vector<Json>*>()->reserve(count);
    } else if (is_object()) {
        if (load<void*>() == nullptr) store(Kind::object, new Object());
        load<Object*>()->members.reserve(count);
    }
}

bool Json::operator==(const Json& other) const {
    if (kind() != other.kind()) return false;
    switch (kind()) {
    case Kind::null: return true;
    case Kind::boolean: return load<bool>() == other.load<bool>();
    case Kind::int64:
    case Kind::uint64: return load<uint64_t>() == other.load<uint64_t>();
    case Kind::real: return load<double>() == other.load<double>();
    case Kind::string: return as_string() == other.as_string();
    case Kind::array: {
        const std::span<const Json> a = items(), b = other.items();
        return std::equal(a.begin(), a.end(), b.begin(), b.end());
    }
    case Kind::object: break;
    }
    if (size() != other.size()) return false;
    for (const JsonMember& member : members()) {
        const Json* found = other.find(member.key);
        if (found == nullptr || !(member.value == *found)) return false;
    }
    return true;
}

// ---- the parser -----------------------------------------------------------------------------

namespace detail {

namespace {
// The first byte at or after p that a string cannot simply copy: a quote, a backslash, a control
// character, or the first of a longer UTF-8 sequence.
const char* skip_plain_text(const char* p, const char* end) {
    constexpr uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
    const auto has_zero = [](uint64_t v) { return (v - ones) & ~v; };
    for (; end - p >= 8; p += 8) {
        uint64_t eight;
        std::memcpy(&eight, p, 8);
        const uint64_t special = has_zero(eight ^ ones * '"') | has_zero(eight ^ ones * '\\') |
                                 (eight - ones * 0x20) | eight;
        if (special & tops) break;
    }
    while (p < end && *p != '"' && *p != '\\' && uint8_t(*p - 0x20) < 0x60) ++p;
    return p;
}
}  // namespace

// Recursive descent, as deep as limits.depth. Finished items and members wait on a stack of their
// own until their array or object ends, which then takes exactly the room it needs.
class JsonParser {
public:
    JsonParser(std::string_view text, JsonLimits limits)
        : begin_(text.data()), p_(text.data()), end_(text.data() + text.size()), limits_(limits) {}

    Result<Json> run() {
        Json value;
        if (parse_value(value)) {
            skip_space();
            if (p_ == end_) return value;
            fail("text after the value");
        }
        return report();
    }

private:
    struct Pending {
        JsonMember  member;
        const char* at;  // its key
    };

    bool fail(std::string message) { return fail(p_, std::move(message)); }
    bool fail(const char* at, std::string message) {
        p_ = at;
        message_ = std::move(message);
        return false;
    }

    Error report() const {
        const std::string_view before(begin_, size_t(p_ - begin_));
        const size_t line = size_t(std::count(before.begin(), before.end(), '\n')) + 1;
        const size_t newline = before.rfind('\n');  // npos + 1 is 0
        const size_t column = utf8_count(before.substr(newline + 1)) + 1;
        const std::string place = format("invalid JSON at line %zu, column %zu: ", line, column);
        return json_error(place + message_);
    }

    void skip_space() {
        while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
    }

    bool take(char c) {
        skip_space();
        if (p_ == end_ || *p_ != c) return false;
        ++p_;
        return true;
    }

    bool parse_value(Json& out) {
        skip_space();
        if (p_ == end_) return fail("expected a value, found the end");
        if (++values_ > limits_.values) return fail(format("more than %u values", limits_.values));
        switch (*p_) {
        case '{': return parse_nested(out, &JsonParser::parse_object);
        case '[': return parse_nested(out, &JsonParser::parse_array);
        case '"': return parse_string() && (out.store_text(text_), true);
        case 't': return parse_word("true", out, true);
        case 'f': return parse_word("false", out, false);
        case 'n': return parse_word("null", out, nullptr);
        default: return parse_number(out);
        }
    }

    bool parse_nested(Json& out, bool (JsonParser::*parse)(Json&)) {
        if (depth_ >= limits_.depth) return fail(format("nested deeper than %u", limits_.depth));
        ++depth_;
        ++p_;
        const bool good = (this->*parse)(out);
        --depth_;
        return good;
    }

    bool parse_word(std::string_view word, Json& out, Json value) {
        if (std::string_view(p_, size_t(end_ - p_)).substr(0, word.size()) != word)
            return fail("expected a value");
        p_ += word.size();
        out.swap(value);
        return true;
    }

    bool parse_number(Json& out) {
        Decimal number;
        const char* end = scan_decimal(p_, end_, number);
        if (end == nullptr)
            return fail(*p_ == '-' || is_digit(p_, end_) ? "malformed number" : "expected a value");
        const uint64_t limit = uint64_t(INT64_MAX) + number.negative;
        if (number.integer && number.dropped == 0 && number.digits <= limit) {
            out.store(Json::Kind::int64,
                      int64_t(number.negative ? 0 - number.digits : number.digits));
        } else if (number.integer && number.dropped == 0 && !number.negative) {
            out.store(Json::Kind::uint64, number.digits);
        } else {
            const double value = nearest_double(number);
            if (std::isinf(value)) return fail("the number is too large for a double");
            out.store(Json::Kind::real, value);
        }
        p_ = end;
        return true;
    }

    bool parse_array(Json& out) {
        out = Json::array();
        if (take(']')) return true;
        const size_t base = items_.size();
        do {
            Json item;
            if (!parse_value(item)) return false;
            items_.push_back(std::move(item));
        } while (take(','));
        if (!take(']')) return fail("expected ',' or ']'");
        const auto first = items_.begin() + std::ptrdiff_t(base);
        out.store(Json::Kind::array, new std::vector<Json>(std::make_move_iterator(first),
                                                           std::make_move_iterator(items_.end())));
        items_.erase(first, items_.end());
        return true;
    }

    bool parse_object(Json& out) {
        out = Json::object();
        if (take('}')) return true;
        const size_t base = pending_.size();
        do {
            skip_space();
            const char* at = p_;
            if (p_ == end_ || *p_ != '"') return fail("expected a key in quotes");
            if (!parse_string()) return false;
            std::string key(text_);
            if (!take(':')) return fail("expected ':'");
            Json value;
            if (!parse_value(value)) return false;
            pending_.push_back({{std::move(key), std::move(value)}, at});
        } while (take(','));
        if (!take('}')) return fail("expected ',' or '}'");
        return finish_object(out, base);
    }

    bool finish_object(Json& out, size_t base) {
        auto* object = new Json::Object();
        out.store(Json::Kind::object, object);
        object->members.reserve(pending_.size() - base);
        for (size_t i = base; i < pending_.size(); ++i)
            object->members.push_back(std::move(pending_[i].member));
        const size_t twice = object->index();
        if (twice != Json::Object::none) {
            std::string message = "duplicate key ";
            write_json_string(message, object->members[twice].key.substr(0, 64));
            return fail(pending_[base + twice].at, std::move(message));
        }
        pending_.erase(pending_.begin() + std::ptrdiff_t(base), pending_.end());
        return true;
    }

    // The string at the quote p_ into text_: a piece of the source, or buffer_ if it has escapes.
    bool parse_string() {
        const char* start = ++p_;
        bool copied = false;
        for (;;) {
            p_ = skip_plain_text(p_, end_);
            if (p_ == end_) return fail(start - 1, "the string does not end");
            if (uint8_t(*p_) >= 0x80) {
                size_t length = 0;
                if (utf8_next({p_, size_t(end_ - p_)}, &length) == bad_utf8)
                    return fail("invalid UTF-8");
                p_ += length;
            } else if (*p_ == '\\') {
                if (!copied) buffer_.clear();
                copied = true;
                buffer_.append(start, p_);
                if (!parse_escape()) return false;
                start = p_;
            } else if (*p_ == '"') {
                text_ = {start, size_t(p_ - start)};
                if (copied) text_ = buffer_.append(start, p_);
                ++p_;
                return true;
            } else {
                return fail("control character in a string");
            }
        }
    }

    bool parse_escape() {
        constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        const char* at = p_++;
        const char letter = p_ < end_ ? *p_++ : '\0';
        const size_t which = letters.find(letter);
        if (which != std::string_view::npos) {
            buffer_ += meanings[which];
            return true;
        }
        char32_t unit = 0, second = 0;
        if (letter != 'u' || !parse_hex4(unit)) return fail(at, "malformed escape");
        if (unit >= 0xd800 && unit < 0xe000) {
            const bool pair = unit < 0xdc00 && end_ - p_ >= 2 && p_[0] == '\\' && p_[1] == 'u';
            if (pair) p_ += 2;
            if (!pair || !parse_hex4(second) || second < 0xdc00 || second > 0xdfff)
                return fail(at, "lone surrogate");
            unit = 0x10000 + ((unit - 0xd800) << 10 | (second - 0xdc00));
        }
        utf8_append(buffer_, unit);
        return true;
    }

    bool parse_hex4(char32_t& unit) {
        if (end_ - p_ < 4) return false;
        for (int i = 0; i < 4; ++i) {
            const int digit = hex_value(*p_++);
            if (digit < 0) return false;
            unit = unit << 4 | char32_t(digit);
        }
        return true;
    }

    const char* begin_;
    const char* p_;
    const char* end_;
    JsonLimits  limits_;
    uint32_t    depth_ = 0, values_ = 0;
    std::string_view     text_;    // the last string, until the next
    std::string          buffer_;
    std::string          message_;
    std::vector<Json>    items_;
    std::vector<Pending> pending_;
};

}  // namespace detail

Result<Json> Json::parse(std::string_view text, JsonLimits limits) {
    return detail::JsonParser(text, limits).run();
}

// ---- the writer -----------------------------------------------------------------------------

namespace detail {

namespace {

class JsonWriter {
public:
    JsonWriter(std::string& out, JsonStyle style, bool canonical)
        : out_(out), style_(style), canonical_(canonical) {}

    void write(const Json& value) {
        switch (value.kind()) {
        case Json::Kind::null: out_ += "null"; break;
        case Json::Kind::boolean: out_ += value.as_bool() ? "true" : "false"; break;
        case Json::Kind::int64: append_signed(out_, value.as_int()); break;
        case Json::Kind::uint64: append_unsigned(out_, value.as_uint()); break;
        case Json::Kind::real: write_real(value.as_double()); break;
        case Json::Kind::string: write_json_string(out_, value.as_string()); break;
        case Json::Kind::array: write_array(value.items()); break;
        case Json::Kind::object: write_object(value.members()); break;
        }
    }

private:
    void write_real(double value) {
        constexpr double two63 = 9223372036854775808.0;
        const bool whole = canonical_ && std::trunc(value) == value;
        if (whole && value >= -two63 && value < two63) append_signed(out_, int64_t(value));
        else if (whole && value >= 0 && value < 2 * two63) append_unsigned(out_, uint64_t(value));
        else append_double(out_, value);
    }

    void write_array(std::span<const Json> items) {
        open('[');
        for (const Json& item : items) {
            separate(&item == items.data());
            write(item);
        }
        close(']', items.empty());
    }

    void write_object(std::span<const JsonMember> members) {
        open('{');
        if (canonical_) {
            std::vector<const JsonMember*> sorted;
            for (const JsonMember& member : members) sorted.push_back(&member);
            std::sort(sorted.begin(), sorted.end(), [](const JsonMember* a, const JsonMember* b) {
                return a->key < b->key;  // bytes of UTF-8 sort as their code points
            });
            for (const JsonMember* member : sorted) write_member(*member, member == sorted[0]);
        } else {
            for (const JsonMember& member : members)
                write_member(member, &member == members.data());
        }
        close('}', members.empty());
    }

    void write_member(const JsonMember& member, bool first) {
        separate(first);
        write_json_string(out_, member.key);
        out_ += style_.spaced || style_.indent >= 0 ? ": " : ":";
        write(member.value);
    }

    void open(char bracket) {
        out_ += bracket;
        ++depth_;
    }
    void separate(bool first) {
        if (!first) out_ += style_.spaced && style_.indent < 0 ? ", " : ",";
        new_line();
    }
    void close(char bracket, bool empty) {
        --depth_;
        if (!empty) new_line();
        out_ += bracket;
    }
    void new_line() {
        if (style_.indent >= 0) out_.append("\n").append(depth_ * size_t(style_.indent), ' ');
    }

    std::string& out_;
    JsonStyle    style_;
    bool         canonical_;
    size_t       depth_ = 0;
};

}  // namespace

void write_json_string(std::string& out, std::string_view text) {
    const char *p = text.data(), *end = p + text.size(), *start = p;
    out += '"';
    for (;;) {
        p = skip_plain_text(p, end);
        const char* at = p;
        if (p < end && uint8_t(*p) >= 0x80) {
            size_t length = 0;
            const char32_t c = utf8_next({p, size_t(end - p)}, &length);
            p += length;
            if (c != bad_utf8) continue;
        }
        out.append(start, at);
        if (at == end) break;
        if (p == at) ++p;
        start = p;
        constexpr std::string_view letters = "\"\\bfnrt", meanings = "\"\\\b\f\n\r\t";
        const size_t which = meanings.find(*at);
        if (uint8_t(*at) >= 0x80) utf8_append(out, 0xfffd);
        else if (which != std::string_view::npos) (out += '\\') += letters[which];
        else (out += "\\u00") += hex_encode(at, 1);
    }
    out += '"';
}

}  // namespace detail

std::string Json::write(JsonStyle style) const {
    std::string out;
    write_to(out, style);
    return out;
}

void Json::write_to(std::string& out, JsonStyle style) const {
    detail::JsonWriter(out, style, false).write(*this);
}

std::string Json::canonical() const {
    std::string out;
    detail::JsonWriter(out, {}, true).write(*this);
    return out;
}

}  // namespace v1
}  // namespace valar

// >>api
// Owns: the table of request fields and their checks, the response object, the error envelope.
// Assumes: bodies were parsed by >>json, so they are valid UTF-8 without duplicate keys.
// Promises: the first fault in the contract's order is the one that is reported.

namespace valar {
inline namespace v1 {

Item Item::message(Role role, std::string text) {
    Item item;
    item.role = role;
    item.content.push_back({role == Role::assistant ? ContentPart::Kind::output_text
                                                    : ContentPart::Kind::input_text,
                            std::move(text)});
    return item;
}

std::string Item::text() const {
    std::string all;
    for (const ContentPart& part : content) all += part.text;
    return all;
}

namespace detail {
namespace {

struct ApiKind {
    ErrorKind   kind;
    int         status;
    const char* type;
    const char* code;  // where the error brings none
    bool        ours;  // our own fault: its message may name a path and is not sent
};
constexpr ApiKind api_kinds[] = {
    {ErrorKind::invalid_request, 400, "invalid_request_error", "invalid_value", false},
    {ErrorKind::unsupported, 400, "invalid_request_error", "unsupported_value", false},
    {ErrorKind::idempotency, 400, "idempotency_error", "idempotency_key_reused", false},
    {ErrorKind::authentication, 401, "authentication_error", "invalid_api_key", false},
    {ErrorKind::permission, 403, "permission_error", "host_not_allowed", false},
    {ErrorKind::not_found, 404, "not_found_error", "not_found", false},
    {ErrorKind::method_not_allowed, 405, "invalid_request_error", "method_not_allowed", false},
    {ErrorKind::too_large, 413, "invalid_request_error", "request_too_large", false},
    {ErrorKind::unsupported_media, 415, "invalid_request_error", "unsupported_media_type", false},
    {ErrorKind::rate_limit, 429, "rate_limit_error", "rate_limit_exceeded", false},
    {ErrorKind::upstream, 502, "api_error", "upstream_error", false},
    {ErrorKind::overloaded, 503, "api_error", "overloaded", false},
    {ErrorKind::out_of_memory, 503, "api_error", "overloaded", true},
    {ErrorKind::closed, 503, "api_error", "overloaded", false},
    {ErrorKind::timeout, 504, "timeout_error", "timeout", false},
    {ErrorKind::internal, 500, "api_error", "internal_error", true},
};

const ApiKind& api_kind(ErrorKind kind) {
    for (const ApiKind& row : api_kinds)
        if (row.kind == kind) return row;
    return std::end(api_kinds)[-1];  // io, bad_data, cancelled: nothing a client sent
}

Error api_error(const char* code, std::string param, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, std::move(param));
}

// What was received, for messages: short, never a whole document.
std::string api_shown(const Json& value) {
    switch (value.kind()) {
    case Json::Kind::null: return "null";
    case Json::Kind::array: return "an array";
    case Json::Kind::object: return "an object";
    case Json::Kind::string: {
        if (value.as_string().size() > 60) return "a string";
        return value.write();
    }
    default: return value.write();
    }
}

Error api_wrong_type(const std::string& path, const char* expected, const Json& got) {
    return api_error("invalid_type", path,
                     "'" + path + "' must be " + expected + ", but " + api_shown(got) + " was received");
}

Error api_wrong_value(const char* code, const std::string& path, const std::string& allowed,
                      const Json& got) {
    return api_error(code, path,
                     "'" + path + "' must be " + allowed + ", but " + api_shown(got) + " was received");
}

Error api_missing(const std::string& path) {
    return api_error("missing_required_parameter", path, "'" + path + "' is required");
}

Error api_later(const std::string& path) {
    return api_error("unsupported_parameter", path, "'" + path + "': not in this version");
}

std::string api_index(const std::string& path, size_t i) {
    return path + "[" + std::to_string(i) + "]";
}

// ---- Checks of one value. Each returns what is wrong, or nothing. ------------------------------

using Fault = std::optional<Error>;

Fault check_text(const Json& value, const std::string& path, size_t least, size_t most) {
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    const size_t length = utf8_count(value.as_string());
    if (length < least)
        return api_error("string_below_min_length", path, "'" + path + "' must not be empty");
    if (length > most)
        return api_error("string_above_max_length", path,
                         format("'%s' has %zu characters; at most %zu are allowed", path.c_str(),
                                length, most));
    return {};
}

Fault check_integer(const Json& value, const std::string& path, int64_t least, int64_t most) {
    if (!value.is_integer()) return api_wrong_type(path, "an integer", value);
    const bool above = !value.is_int() || value.as_int() > most;
    if (!above && value.as_int() >= least) return {};
    return api_wrong_value(above ? "integer_above_max_value" : "integer_below_min_value", path,
                           above ? "at most " + std::to_string(most)
                                 : "at least " + std::to_string(least),
                           value);
}

Fault check_number(const Json& value, const std::string& path, double least, double most) {
    if (!value.is_number()) return api_wrong_type(path, "a number", value);
    const double number = value.as_double();
    if (number < least)
        return api_wrong_value("decimal_below_min_value", path, format("at least %g", least), value);
    if (number > most)
        return api_wrong_value("decimal_above_max_value", path, format("at most %g", most), value);
    return {};
}

Fault check_bool(const Json& value, const std::string& path) {
    if (value.is_bool()) return {};
    return api_wrong_type(path, "true or false", value);
}

Fault check_choice(const Json& value, const std::string& path,
                   std::initializer_list<std::string_view> choices,
                   const char* code = "invalid_value") {
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    std::string allowed;
    for (const std::string_view choice : choices) {
        if (value.as_string() == choice) return {};
        allowed.append(allowed.empty() ? "\"" : ", \"").append(choice).append("\"");
    }
    return api_wrong_value(code, path, (choices.size() > 1 ? "one of " : "") + allowed, value);
}

// ---- Items (contract, 3.2) ---------------------------------------------------------------------

constexpr std::string_view role_names[] = {"system", "developer", "user", "assistant", "tool",
                                           "function"};

struct ItemType {
    std::string_view name;
    Item::Kind       kind;
};
constexpr ItemType item_types[] = {
    {"message", Item::Kind::message},
    {"reasoning", Item::Kind::reasoning},
    {"function_call", Item::Kind::function_call},
    {"function_call_output", Item::Kind::function_call_output},
    {"custom_tool_call", Item::Kind::custom_tool_call},
    {"custom_tool_call_output", Item::Kind::custom_tool_call_output},
};

struct PartType {
    std::string_view  name;
    std::string_view  field;
    ContentPart::Kind kind;
    bool              replayed;  // only in what the assistant said
};
constexpr PartType part_types[] = {
    {"input_text", "text", ContentPart::Kind::input_text, false},
    {"text", "text", ContentPart::Kind::input_text, false},  // as Chat Completions spell it
    {"output_text", "text", ContentPart::Kind::output_text, true},
    {"refusal", "refusal", ContentPart::Kind::refusal, true},
    {"summary_text", "text", ContentPart::Kind::output_text, true},
    {"reasoning_text", "text", ContentPart::Kind::output_text, true},
};

Fault read_string_field(const Json& object, const char* key, const std::string& path, std::string* out) {
    const Json& value = object[key];
    const std::string field = path + "." + key;
    if (value.is_null()) return api_missing(field);
    if (!value.is_string()) return api_wrong_type(field, "a string", value);
    *out = value.as_string();
    return {};
}

Fault read_part(const Json& part, const std::string& path, bool assistant, Item* item) {
    if (!part.is_object()) return api_wrong_type(path, "an object", part);
    std::string type;
    if (Fault fault = read_string_field(part, "type", path, &type)) return fault;
    if (type == "input_image" || type == "image_url")
        return api_error("unsupported_parameter", path + ".type", "images: not in this version");
    for (const PartType& row : part_types) {
        if (type != row.name || (row.replayed && !assistant)) continue;
        ContentPart read{row.kind, {}};
        if (Fault fault = read_string_field(part, row.field.data(), path, &read.text)) return fault;
        item->content.push_back(std::move(read));
        return {};
    }
    const bool known = type == "input_audio" || type == "input_file";
    return api_wrong_value(known ? "unsupported_value" : "invalid_value", path + ".type",
                           assistant ? "\"output_text\", \"refusal\" or \"input_text\""
                                     : "\"input_text\"",
                           part["type"]);
}

// A string, or an array of parts.
Fault read_content(const Json& content, const std::string& path, bool assistant, Item* item) {
    if (content.is_null()) return api_missing(path);
    if (content.is_string()) {
        item->content.push_back({assistant ? ContentPart::Kind::output_text
                                           : ContentPart::Kind::input_text,
                                 std::string(content.as_string())});
        return {};
    }
    if (!content.is_array()) return api_wrong_type(path, "a string or an array of parts", content);
    for (size_t i = 0; i < content.size(); ++i)
        if (Fault fault = read_part(content[i], api_index(path, i), assistant, item)) return fault;
    return {};
}

Fault read_message(const Json& json, const std::string& path, Item* item) {
    std::string role;
    if (Fault fault = read_string_field(json, "role", path, &role)) return fault;
    const auto* found = std::find(std::begin(role_names), std::end(role_names), role);
    if (found == std::end(role_names))
        return api_wrong_value("invalid_value", path + ".role",
                               "one of \"system\", \"developer\", \"user\", \"assistant\", \"tool\", "
                               "\"function\"",
                               json["role"]);
    item->role = static_cast<Role>(found - role_names);
    return read_content(json["content"], path + ".content", item->role == Role::assistant, item);
}

// Thoughts of an earlier answer: `content` where there is one, else the summary.
Fault read_reasoning(const Json& json, const std::string& path, Item* item) {
    item->role = Role::assistant;
    const char* key = json["content"].empty() ? "summary" : "content";
    if (json[key].is_null()) return {};
    return read_content(json[key], path + "." + key, true, item);
}

Fault read_call(const Json& json, const std::string& path, Item* item) {
    item->role = Role::assistant;
    const bool custom = item->kind == Item::Kind::custom_tool_call;
    if (Fault fault = read_string_field(json, "call_id", path, &item->call_id)) return fault;
    if (Fault fault = read_string_field(json, "name", path, &item->name)) return fault;
    return read_string_field(json, custom ? "input" : "arguments", path, &item->arguments);
}

Fault read_call_output(const Json& json, const std::string& path, Item* item) {
    item->role = Role::tool;
    if (Fault fault = read_string_field(json, "call_id", path, &item->call_id)) return fault;
    return read_content(json["output"], path + ".output", false, item);
}

Fault read_item(const Json& json, const std::string& path, Item* item) {
    if (!json.is_object()) return api_wrong_type(path, "an object", json);
    const Json& type = json["type"];
    if (!type.is_null() && !type.is_string()) return api_wrong_type(path + ".type", "a string", type);
    const ItemType* found = nullptr;
    for (const ItemType& row : item_types)
        if (type.as_string("message") == row.name) found = &row;
    if (!found)
        return api_wrong_value(type.as_string() == "item_reference" ? "unsupported_value" : "invalid_value",
                               path + ".type",
                               "one of \"message\", \"reasoning\", \"function_call\", "
                               "\"function_call_output\", \"custom_tool_call\", "
                               "\"custom_tool_call_output\"",
                               type);
    item->kind = found->kind;
    switch (item->kind) {
    case Item::Kind::message: return read_message(json, path, item);
    case Item::Kind::reasoning: return read_reasoning(json, path, item);
    case Item::Kind::function_call:
    case Item::Kind::custom_tool_call: return read_call(json, path, item);
    default: return read_call_output(json, path, item);
    }
}

Fault read_items(const Json& array, const std::string& path, Request* request) {
    if (array.empty())
        return api_error("array_below_min_length", path, "'" + path + "' must not be empty");
    request->input.items.resize(array.size());
    for (size_t i = 0; i < array.size(); ++i)
        if (Fault fault = read_item(array[i], api_index(path, i), &request->input.items[i]))
            return fault;
    return {};
}

// Every output of a call answers a call that stands before it.
Fault check_calls(const Request& request, const std::string& path) {
    std::unordered_set<std::string_view> called;
    for (size_t i = 0; i < request.input.items.size(); ++i) {
        const Item& item = request.input.items[i];
        const bool custom = item.kind == Item::Kind::custom_tool_call ||
                            item.kind == Item::Kind::custom_tool_call_output;
        if (item.kind == Item::Kind::function_call || item.kind == Item::Kind::custom_tool_call)
            called.insert(item.call_id);
        else if ((item.kind == Item::Kind::function_call_output || custom) &&
                 !called.contains(item.call_id))
            return api_error("invalid_value", api_index(path, i) + ".call_id",
                             "no call '" + item.call_id + "' stands earlier in the input");
    }
    return {};
}

// ---- The fields of a request (contract, 3) -----------------------------------------------------

Fault field_model(const Json& value, Request* request) {
    request->model = value.as_string();
    return check_text(value, "model", 1, SIZE_MAX);
}

Fault field_input(const Json& value, Request* request) {
    if (value.is_string()) {
        request->input.text = value.as_string();
        return check_text(value, "input", 1, SIZE_MAX);
    }
    if (value.is_array()) return read_items(value, "input", request);
    if (!value.is_object())
        return api_wrong_type("input", "a string, an array of items or {\"messages\": [...]}", value);
    const Json& messages = value["messages"];
    if (messages.is_null()) return api_missing("input.messages");
    if (!messages.is_array()) return api_wrong_type("input.messages", "an array", messages);
    return read_items(messages, "input.messages", request);
}

Fault field_instructions(const Json& value, Request* request) {
    request->instructions = value.as_string();
    return check_text(value, "instructions", 0, SIZE_MAX);
}

Fault field_max_output_tokens(const Json& value, Request* request) {
    request->max_output_tokens = static_cast<uint32_t>(
        std::clamp<int64_t>(value.as_int(), 0, int64_t{UINT32_MAX}));
    return check_integer(value, "max_output_tokens", 1, INT64_MAX);
}

Fault field_temperature(const Json& value, Request* request) {
    request->temperature = value.as_double();
    return check_number(value, "temperature", 0, 2);
}

Fault field_top_p(const Json& value, Request* request) {
    request->top_p = value.as_double();
    return check_number(value, "top_p", 0, 1);
}

Fault field_seed(const Json& value, Request* request) {
    request->seed = value.as_int();
    return check_integer(value, "seed", INT64_MIN, INT64_MAX);
}

Fault field_text(const Json& value, Request*) {
    if (!value.is_object()) return api_wrong_type("text", "an object", value);
    const Json& form = value["format"];
    if (form.is_null()) return {};
    if (!form.is_object()) return api_wrong_type("text.format", "an object", form);
    if (form["type"].is_null()) return api_missing("text.format.type");
    if (form["type"].as_string() == "json_schema")
        return api_error("unsupported_parameter", "text.format", "json_schema: not in this version");
    const bool json_object = form["type"].as_string() == "json_object";
    return check_choice(form["type"], "text.format.type", {"text", "json_schema"},
                        json_object ? "unsupported_value" : "invalid_value");
}

Fault field_reasoning(const Json& value, Request*) {
    if (!value.is_object()) return api_wrong_type("reasoning", "an object", value);
    for (const JsonMember& member : value.members()) {
        const std::string path = "reasoning." + member.key;
        Fault fault;
        if (member.value.is_null()) continue;
        if (member.key == "effort")
            fault = check_choice(member.value, path,
                                 {"none", "minimal", "low", "medium", "high", "xhigh"});
        else if (member.key == "summary" || member.key == "generate_summary")
            fault = check_choice(member.value, path, {"auto", "concise", "detailed"});
        if (fault) return fault;
    }
    return {};
}

Fault field_background(const Json& value, Request* request) {
    request->background = value.as_bool();
    return check_bool(value, "background");
}

Fault field_prompt_cache_key(const Json& value, Request* request) {
    request->prompt_cache_key = value.as_string();
    return check_text(value, "prompt_cache_key", 0, SIZE_MAX);
}

// A switch that has one legal position.
Fault fixed_switch(const Json& value, const char* path, bool position) {
    if (Fault fault = check_bool(value, path)) return fault;
    if (value.as_bool() == position) return {};
    return api_wrong_value("unsupported_value", path, position ? "true" : "false", value);
}
Fault field_store(const Json& value, Request*) { return fixed_switch(value, "store", true); }
Fault openai_store(const Json& value, Request* request) {
    request->store = value.as_bool();
    return check_bool(value, "store");
}
Fault openai_previous(const Json& value, Request* request) {
    request->previous_response_id = value.as_string();
    return check_text(value, "previous_response_id", 1, 256);
}
Fault field_stream(const Json& value, Request*) { return fixed_switch(value, "stream", false); }

Fault field_truncation(const Json& value, Request*) {
    return check_choice(value, "truncation", {"disabled"}, "unsupported_value");
}

Fault field_service_tier(const Json& value, Request*) {
    return check_choice(value, "service_tier", {"auto"}, "unsupported_value");
}

Fault field_user(const Json& value, Request* request) {
    request->user = value.as_string();
    return check_text(value, "user", 0, 256);
}

constexpr size_t metadata_max_pairs = 256, metadata_max_key = 256, metadata_max_value = 8192;

Window window_of(std::string_view name) {
    return name == "asap" ? Window::asap : name == "flex" ? Window::flex : Window::standard;
}

Fault check_metadata(const std::string& key, const Json& value) {
    const std::string path = "metadata." + key;
    if (utf8_count(key) > metadata_max_key)
        return api_error("string_above_max_length", "metadata",
                         format("a key of 'metadata' has more than %zu characters", metadata_max_key));
    if (Fault fault = check_text(value, path, 0, metadata_max_value)) return fault;
    if (key == "completion_webhook") return api_later(path);
    if (key == "completion_window") return check_choice(value, path, {"asap", "standard", "flex"});
    if (key != "webhook_token") return {};
    const std::string_view token = value.as_string();
    const bool plain = std::all_of(token.begin(), token.end(), [](char c) { return c > ' ' && c < 127; });
    if (token.size() <= 512 && plain) return {};
    return api_error("invalid_value", path,
                     "'" + path + "' must be at most 512 visible ASCII characters");
}

Fault field_metadata(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("metadata", "an object", value);
    if (value.size() > metadata_max_pairs)
        return api_error("invalid_value", "metadata",
                         format("'metadata' has %zu pairs; at most %zu are allowed", value.size(),
                                metadata_max_pairs));
    for (const JsonMember& member : value.members()) {
        if (Fault fault = check_metadata(member.key, member.value)) return fault;
        request->metadata.emplace_back(member.key, member.value.as_string());
        if (member.key == "completion_window") request->window = window_of(member.value.as_string());
    }
    return {};
}

Fault field_tools(const Json& value, Request*) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    if (!value.empty()) return api_later("tools");
    return {};
}

Fault field_tool_choice(const Json& value, Request*) {
    if (value.is_string()) return check_choice(value, "tool_choice", {"none", "auto", "required"});
    if (!value.is_object()) return api_wrong_type("tool_choice", "a string or an object", value);
    if (value["type"].is_null()) return api_missing("tool_choice.type");
    return check_choice(value["type"], "tool_choice.type", {"function", "custom", "allowed_tools"});
}

Fault field_parallel_tool_calls(const Json& value, Request*) {
    return check_bool(value, "parallel_tool_calls");
}

Fault field_include(const Json& value, Request* request) {
    static constexpr std::string_view refused[] = {
        "reasoning.encrypted_content", "web_search_call.action.sources",
        "code_interpreter_call.outputs", "computer_call_output.output.image_url",
        "file_search_call.results"};
    if (!value.is_array()) return api_wrong_type("include", "an array", value);
    for (size_t i = 0; i < value.size(); ++i) {
        const std::string path = api_index("include", i);
        if (!value[i].is_string()) return api_wrong_type(path, "a string", value[i]);
        const std::string_view name = value[i].as_string();
        if (std::find(std::begin(refused), std::end(refused), name) != std::end(refused))
            return api_error("unsupported_value", path,
                             "'" + std::string(name) + "' cannot be included");
        if (name == "message.output_text.logprobs") request->logprobs = true;
    }
    return {};
}

Fault field_top_logprobs(const Json& value, Request* request) {
    request->top_logprobs = static_cast<uint32_t>(std::clamp<int64_t>(value.as_int(), 0, 20));
    return check_integer(value, "top_logprobs", 0, 20);
}

struct RequestField {
    using Check = Fault (*)(const Json& value, Request* request);
    std::string_view name;
    Check check;  // null: not supported at all
    bool  required = false;
    Check openai   = nullptr;  // where that dialect differs
};
constexpr RequestField request_fields[] = {
    {"model", field_model, true},
    {"input", field_input, true},
    {"instructions", field_instructions},
    {"max_output_tokens", field_max_output_tokens},
    {"temperature", field_temperature},
    {"top_p", field_top_p},
    {"seed", field_seed},
    {"text", field_text},
    {"reasoning", field_reasoning},
    {"background", field_background},
    {"prompt_cache_key", field_prompt_cache_key},
    {"store", field_store, false, openai_store},
    {"truncation", field_truncation},
    {"stream", field_stream},
    {"user", field_user},
    {"metadata", field_metadata},
    {"tools", field_tools},
    {"tool_choice", field_tool_choice},
    {"parallel_tool_calls", field_parallel_tool_calls},
    {"include", field_include},
    {"top_logprobs", field_top_logprobs},
    {"service_tier", field_service_tier},
    {"previous_response_id", nullptr, false, openai_previous},
    {"conversation", nullptr},
    {"prompt", nullptr},
};

const RequestField* find_request_field(std::string_view name) {
    for (const RequestField& field : request_fields)
        if (field.name == name) return &field;
    return nullptr;
}

// Tools are always [] in this version, so a choice that demands one can never be met.
Fault check_tool_choice(const Json& choice) {
    const bool demands = choice.is_object() || choice.as_string() == "required";
    if (!demands) return {};
    return api_error("invalid_value", "tool_choice", "'tool_choice' demands a tool, but 'tools' is empty");
}

Fault check_background(const Request& request) {
    if (request.background && !request.store)
        return api_error("unsupported_value", "store",
                         "'store' must be true with 'background', but false was received");
    if (request.background || request.window != Window::flex) return {};
    return api_error("invalid_value", "metadata.completion_window",
                     "'metadata.completion_window' may be \"flex\" only with 'background': true");
}

// ---- The response object (contract, 3.1) -------------------------------------------------------

// How objects differ between the dialects: one row each.
struct DialectWords {
    const char* status[5];
    const char* cut;       // the status of an answer that was cut
    const char* cut_item;  // and of its message
    bool        echo;      // `input` and `user`
    bool        usage_extras;
    const char* failure;   // the code of a failed response; null: the error's own
};
constexpr DialectWords dialect_words[] = {
    {{"pending", "running", "completed", "failed", "cancelled"},
     "completed", "completed", true, true, nullptr},
    {{"queued", "in_progress", "completed", "failed", "cancelled"},
     "incomplete", "incomplete", false, false, "server_error"},
};
const DialectWords& words_of(Dialect dialect) { return dialect_words[static_cast<size_t>(dialect)]; }

const char* status_name(Status status, bool cut, const DialectWords& words) {
    return cut && status == Status::completed ? words.cut : words.status[static_cast<size_t>(status)];
}

// JSON has no infinity: a token that cannot be drawn gets the number that OpenAI gives it.
constexpr double logprob_of_never = -9999.0;

Json render_logprob(std::string_view bytes, float logprob) {
    Json values = Json::array();
    for (const char byte : bytes) values.push(static_cast<uint8_t>(byte));
    return Json::object()
        .set("token", utf8_repair(bytes))
        .set("logprob", std::max(static_cast<double>(logprob), logprob_of_never))
        .set("bytes", std::move(values));
}

Json render_logprobs(const std::vector<TokenLogprob>& tokens) {
    Json all = Json::array();
    for (const TokenLogprob& token : tokens) {
        Json top = Json::array();
        for (const TokenLogprob::Alternative& other : token.top)
            top.push(render_logprob(other.bytes, other.logprob));
        all.push(render_logprob(token.bytes, token.logprob).set("top_logprobs", std::move(top)));
    }
    return all;
}

Json render_output(const ResponseRecord& record, const Outcome& outcome,
                   const DialectWords& words) {
    Json output = Json::array();
    const bool whole = record.status == Status::completed;
    if (!is_terminal(record.status) || (!whole && outcome.text.empty())) return output;
    Json part = Json::object()
                    .set("type", "output_text")
                    .set("text", outcome.text)
                    .set("annotations", Json::array());
    if (!outcome.logprobs.empty()) part.set("logprobs", render_logprobs(outcome.logprobs));
    const char* status = !whole ? "incomplete" : outcome.cut ? words.cut_item : "completed";
    output.push(Json::object()
                    .set("id", record.message_id)
                    .set("type", "message")
                    .set("role", "assistant")
                    .set("status", status)
                    .set("content", Json::array().push(std::move(part))));
    return output;
}

// Content in its long form: parts, and Chat Completions' "text" by its name here.
Json render_input_content(const Json& content, bool assistant) {
    const char* type = assistant ? "output_text" : "input_text";
    Json parts = content;
    if (content.is_string())
        parts = Json::array().push(Json::object().set("type", type).set("text", content));
    for (Json& part : parts.items()) {
        if (part["type"].as_string() == "text") part.set("type", type);
        if (part["type"].as_string() == "output_text" && !part.contains("annotations"))
            part.set("annotations", Json::array());
    }
    return parts;
}

// The id of an input item that came without one: the same each time it is asked for.
std::string input_item_id(const char* prefix, const std::string& response_id, size_t place) {
    std::string id = prefix;
    for (const uint8_t byte : sha256(response_id + "/" + std::to_string(place)).bytes)
        if (id.size() < 28) id += "0123456789abcdefghijklmnopqrstuvwxyz"[byte % 36];
    return id;
}

Json render_input_item(const Json& given, const std::string& response_id, size_t place) {
    static constexpr const char* prefixes[] = {"msg_", "rs_", "fc_", "fco_", "ctc_", "ctco_"};
    static constexpr const char* kept[] = {"role", "content", "phase", "summary", "call_id", "name",
                                           "arguments", "input", "output"};
    const std::string_view type = given["type"].as_string("message");
    const auto* row = std::find_if(std::begin(item_types), std::end(item_types),
                                   [&](const ItemType& one) { return one.name == type; });
    if (row == std::end(item_types)) return given;
    const bool own = given["id"].is_string() && !given["id"].as_string().empty();
    Json item = Json::object().set(
        "id", own ? given["id"]
                  : Json(input_item_id(prefixes[row - item_types], response_id, place)));
    item.set("type", type);
    item.set("status", given["status"].is_string() ? given["status"] : Json("completed"));
    for (const char* key : kept)
        if (!given[key].is_null()) item.set(key, given[key]);
    if (row->kind == Item::Kind::reasoning && !item.contains("summary"))
        item.set("summary", Json::array());
    if (row->kind == Item::Kind::message)
        item.set("content", render_input_content(given["content"],
                                                 given["role"].as_string() == "assistant"));
    return item;
}

Json render_usage(const Usage& usage, const DialectWords& words) {
    Json in = Json::object().set("cached_tokens", usage.cached_tokens);
    Json out = Json::object().set("reasoning_tokens", usage.reasoning_tokens);
    if (words.usage_extras) {
        in.set("reasoning_tokens", 0);
        out = Json::object().set("cached_tokens", 0).set("reasoning_tokens", usage.reasoning_tokens);
    } else {
        in.set("cache_write_tokens", 0);
    }
    Json all = Json::object()
                   .set("input_tokens", usage.input_tokens)
                   .set("input_tokens_details", std::move(in))
                   .set("output_tokens", usage.output_tokens)
                   .set("output_tokens_details", std::move(out))
                   .set("total_tokens", usage.input_tokens + usage.output_tokens);
    if (words.usage_extras)
        all.set("prompt_tokens", usage.input_tokens).set("completion_tokens", usage.output_tokens);
    return all;
}

Json render_metadata(const Json& given) {
    Json shown = given.is_object() ? given : Json::object();
    if (Json* token = shown.find("webhook_token")) *token = "***";
    return shown;
}

Json render_failure(const Outcome& outcome, const DialectWords& words) {
    if (!outcome.error) return nullptr;
    const ApiKind& kind = api_kind(outcome.error->kind);
    const std::string own = outcome.error->code.empty() ? kind.code : outcome.error->code;
    return Json::object()
        .set("code", words.failure ? words.failure : own)
        .set("message", kind.ours ? "the model could not be run" : outcome.error->message);
}

}  // namespace
}  // namespace detail

Result<Request> parse_response_request(const Json& body, Dialect dialect) {
    using namespace detail;
    if (!body.is_object()) return api_error("invalid_type", {}, "the body must be a JSON object");
    for (const RequestField& field : request_fields)
        if (field.required && body[field.name].is_null()) return api_missing(std::string(field.name));
    Request request;
    for (const JsonMember& member : body.members()) {
        const RequestField* field = find_request_field(member.key);
        if (!field || member.value.is_null()) continue;
        const bool differs = dialect == Dialect::openai && field->openai;
        const RequestField::Check check = differs ? field->openai : field->check;
        if (!check)
            return api_error("unsupported_parameter", member.key, "'" + member.key + "' is not supported");
        if (Fault fault = check(member.value, &request)) return std::move(*fault);
    }
    const char* items = body["input"].is_object() ? "input.messages" : "input";
    if (Fault fault = check_calls(request, items)) return std::move(*fault);
    if (Fault fault = check_tool_choice(body["tool_choice"])) return std::move(*fault);
    if (Fault fault = check_background(request)) return std::move(*fault);
    return request;
}

Json render_response(const ResponseRecord& record, Dialect dialect) {
    using namespace detail;
    const DialectWords& words = words_of(dialect);
    const Json& asked = record.request;
    const Outcome nothing;
    const Outcome& outcome = record.outcome ? *record.outcome : nothing;
    const bool done = is_terminal(record.status);
    const auto echo = [&](const char* key, Json fallback) {
        const Json& value = asked[key];
        return value.is_null() ? std::move(fallback) : value;
    };
    Json cut = nullptr;
    if (done && outcome.cut) cut = Json::object().set("reason", "max_output_tokens");
    Json form = asked["text"]["format"];
    if (form.is_null()) form = Json::object().set("type", "text");
    const Json& reasoning = asked["reasoning"];
    const char* summary = reasoning["summary"].is_null() ? "generate_summary" : "summary";
    Json object = Json::object();
    object.reserve(34);
    object.set("id", record.id)
        .set("object", "response")
        .set("created_at", record.created_at)
        .set("completed_at", done ? Json(record.completed_at) : Json())
        .set("status", status_name(record.status, outcome.cut, words))
        .set("background", echo("background", false))
        .set("model", record.model);
    if (words.echo) object.set("input", asked["input"]);
    object.set("instructions", asked["instructions"])
        .set("output", render_output(record, outcome, words))
        .set("error", record.status == Status::failed ? render_failure(outcome, words) : Json())
        .set("incomplete_details", std::move(cut))
        .set("max_output_tokens", asked["max_output_tokens"])
        .set("max_tool_calls", nullptr)
        .set("reasoning", Json::object()
                              .set("effort", reasoning["effort"])
                              .set("summary", reasoning[summary]))
        .set("text", Json::object().set("format", std::move(form)))
        .set("store", echo("store", true))
        .set("temperature", record.temperature)
        .set("top_p", record.top_p)
        .set("presence_penalty", 0)
        .set("frequency_penalty", 0)
        .set("top_logprobs", echo("top_logprobs", 0))
        .set("parallel_tool_calls", echo("parallel_tool_calls", true))
        .set("tool_choice", echo("tool_choice", "auto"))
        .set("tools", echo("tools", Json::array()))
        .set("truncation", "disabled")
        .set("service_tier", "auto")
        .set("previous_response_id", asked["previous_response_id"])
        .set("prompt_cache_key", asked["prompt_cache_key"])
        .set("safety_identifier", nullptr);
    if (words.echo) object.set("user", asked["user"]);
    object.set("metadata", render_metadata(asked["metadata"]))
        .set("usage", render_usage(done ? outcome.usage : Usage{}, words));
    return object;
}

std::vector<Json> render_input_items(const Json& request, const std::string& response_id) {
    using namespace detail;
    const Json& input = request["input"];
    std::vector<Json> items;
    if (input.is_string()) {
        const Json message = Json::object().set("role", "user").set("content", input);
        items.push_back(render_input_item(message, response_id, 0));
    }
    for (const Json& item : (input.is_object() ? input["messages"] : input).items())
        items.push_back(render_input_item(item, response_id, items.size()));
    return items;
}

Json render_error(const Error& error) {
    const detail::ApiKind& kind = detail::api_kind(error.kind);
    const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
    return Json::object().set(
        "error", Json::object()
                     .set("message", kind.ours ? "something went wrong on the server" : error.message)
                     .set("type", kind.type)
                     .set("param", or_null(error.param))
                     .set("code", kind.ours || error.code.empty() ? std::string(kind.code) : error.code));
}

int http_status(ErrorKind kind) { return detail::api_kind(kind).status; }

}  // namespace v1
}  // namespace valar

// >>gguf
// Owns: the model file: metadata, tensor directory, table of tensor types; the writer.
// Assumes: little-endian GGUF v2 or v3, in one file or in split files name-00001-of-0000N.gguf.
// Promises: every count, length, offset and product from the file is checked before it is used;
// errors name the file and the key or tensor.
// The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t gguf_magic = 0x46554747;  // "GGUF"
constexpr uint32_t gguf_default_alignment = 32;
constexpr uint64_t gguf_reader_chunk = 1 << 20;  // first guess of a header's size
constexpr uint32_t gguf_value_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // by GgufType

constexpr uint32_t gguf_bit(GgufType type) { return 1u << static_cast<uint32_t>(type); }
constexpr uint32_t gguf_integers =
    gguf_bit(GgufType::u8) | gguf_bit(GgufType::i8) | gguf_bit(GgufType::u16) |
    gguf_bit(GgufType::i16) | gguf_bit(GgufType::u32) | gguf_bit(GgufType::i32) |
    gguf_bit(GgufType::u64) | gguf_bit(GgufType::i64);
constexpr uint32_t gguf_floats = gguf_bit(GgufType::f32) | gguf_bit(GgufType::f64);

struct TypeRow {
    TensorType type;
    TypeInfo info;
};
constexpr TypeRow type_rows[] = {
    {TensorType::f32, {"F32", 1, 4}},            {TensorType::f16, {"F16", 1, 2}},
    {TensorType::q4_0, {"Q4_0", 32, 18}},        {TensorType::q4_1, {"Q4_1", 32, 20}},
    {TensorType::q5_0, {"Q5_0", 32, 22}},        {TensorType::q5_1, {"Q5_1", 32, 24}},
    {TensorType::q8_0, {"Q8_0", 32, 34}},        {TensorType::q2_k, {"Q2_K", 256, 84}},
    {TensorType::q3_k, {"Q3_K", 256, 110}},      {TensorType::q4_k, {"Q4_K", 256, 144}},
    {TensorType::q5_k, {"Q5_K", 256, 176}},      {TensorType::q6_k, {"Q6_K", 256, 210}},
    {TensorType::iq2_xxs, {"IQ2_XXS", 256, 66}}, {TensorType::iq2_xs, {"IQ2_XS", 256, 74}},
    {TensorType::iq3_xxs, {"IQ3_XXS", 256, 98}}, {TensorType::iq1_s, {"IQ1_S", 256, 50}},
    {TensorType::iq4_nl, {"IQ4_NL", 32, 18}},    {TensorType::iq3_s, {"IQ3_S", 256, 110}},
    {TensorType::iq2_s, {"IQ2_S", 256, 82}},     {TensorType::iq4_xs, {"IQ4_XS", 256, 136}},
    {TensorType::i8, {"I8", 1, 1}},              {TensorType::i16, {"I16", 1, 2}},
    {TensorType::i32, {"I32", 1, 4}},            {TensorType::i64, {"I64", 1, 8}},
    {TensorType::f64, {"F64", 1, 8}},            {TensorType::iq1_m, {"IQ1_M", 256, 56}},
    {TensorType::bf16, {"BF16", 1, 2}},          {TensorType::tq1_0, {"TQ1_0", 256, 54}},
    {TensorType::tq2_0, {"TQ2_0", 256, 66}},     {TensorType::mxfp4, {"MXFP4", 32, 17}},
    {TensorType::nvfp4, {"NVFP4", 64, 36}},      {TensorType::q1_0, {"Q1_0", 128, 18}},
};

/// Sets tensor.bytes from type and dims; returns what is wrong, or null.
const char* size_tensor(TensorInfo& tensor) {
    const TypeInfo* type = type_info(tensor.type);
    if (!type) return "has a type that is not known";
    uint64_t values = 1;
    for (uint64_t dim : tensor.dims) {
        if (dim == 0) return "has an empty dimension";
        if (mul_overflows(values, dim, &values)) return "has too many values";
    }
    if (tensor.dims[0] % type->block_size != 0) return "has rows that are not whole blocks";
    if (mul_overflows(values / type->block_size, type->block_bytes, &tensor.bytes))
        return "has too many bytes";
    return nullptr;
}

/// Indices of `items` by name; the second of two with one name is returned through `twice`.
template <class T>
std::vector<uint32_t> sort_by_name(const std::vector<T>& items, const T** twice) {
    std::vector<uint32_t> order(items.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return items[a].name < items[b].name; });
    for (size_t i = 1; i < order.size(); ++i)
        if (items[order[i]].name == items[order[i - 1]].name) *twice = &items[order[i]];
    return order;
}

template <class T>
const T* find_by_name(const std::vector<T>& items, const std::vector<uint32_t>& order,
                      std::string_view name) {
    auto at = std::lower_bound(order.begin(), order.end(), name,
                               [&](uint32_t i, std::string_view n) { return items[i].name < n; });
    return at != order.end() && items[*at].name == name ? &items[*at] : nullptr;
}

/// The value of a key that is one integer and not negative.
std::optional<uint64_t> gguf_uint(const GgufKey& key) {
    if (key.is_array || !(gguf_integers & gguf_bit(key.type))) return std::nullopt;
    if (key.type == GgufType::u64) return GgufNumbers<uint64_t>(key.data.data(), 1, key.type)[0];
    const int64_t value = GgufNumbers<int64_t>(key.data.data(), 1, key.type)[0];
    if (value < 0) return std::nullopt;
    return static_cast<uint64_t>(value);
}

/// Reads one file's header from front to back. Once something is wrong, `error` is set and every
/// function returns false; `short_of_bytes` says that a longer piece of the file would help.
struct GgufParser {
    const std::string& file;
    std::span<const std::byte> bytes;
    uint64_t file_size;
    uint64_t at = 0;
    uint32_t version = 0;
    uint64_t alignment = gguf_default_alignment;
    std::vector<GgufKey> keys = {};
    std::vector<uint32_t> keys_by_name = {};
    std::vector<TensorInfo> tensors = {};
    bool short_of_bytes = false;
    std::optional<Error> error = {};

    bool fail(const char* what, ErrorKind kind = ErrorKind::bad_data) {
        error = make_error(kind, format("%s: %s (at byte %llu)", file.c_str(), what,
                                        static_cast<unsigned long long>(at)));
        return false;
    }
    bool fail(const char* noun, std::string_view name, const char* what) {
        return fail(format("%s '%.*s' %s", noun, static_cast<int>(name.size()), name.data(), what)
                        .c_str());
    }
    bool has(uint64_t n) {
        if (n <= bytes.size() - at) return true;
        if (n > file_size - at) return fail("the file ends inside its header");
        if (n > Gguf::max_header_bytes - std::min(at, Gguf::max_header_bytes))
            return fail("the header is too long");
        short_of_bytes = true;
        return false;
    }
    template <class T> bool number(T& value) {
        if (!has(sizeof value)) return false;
        std::memcpy(&value, bytes.data() + at, sizeof value);
        at += sizeof value;
        return true;
    }
    bool string(std::string_view& value) {
        uint64_t length = 0;
        if (!number(length) || !has(length)) return false;
        value = {reinterpret_cast<const char*>(bytes.data() + at), static_cast<size_t>(length)};
        at += length;
        return true;
    }
    /// Names go into messages, so they are short and printable.
    bool name(std::string_view& value) {
        if (!string(value)) return false;
        if (value.empty() || value.size() > Gguf::max_name_bytes)
            return fail("a key or tensor name is empty or too long");
        for (char c : value)
            if (c < ' ' || c > '~') return fail("a key or tensor name is not printable ASCII");
        return true;
    }

    bool parse() {
        uint64_t n_tensors = 0, n_keys = 0;
        if (!preamble() || !number(n_tensors) || !number(n_keys)) return false;
        if (n_tensors > Gguf::max_tensors) return fail("too many tensors");
        if (n_keys > Gguf::max_keys) return fail("too many keys");
        while (keys.size() < n_keys)
            if (!key(keys.emplace_back())) return false;
        const GgufKey* twice = nullptr;
        keys_by_name = sort_by_name(keys, &twice);
        if (twice) return fail("key", twice->name, "occurs twice");
        if (!set_alignment()) return false;
        while (tensors.size() < n_tensors)
            if (!tensor(tensors.emplace_back())) return false;
        at = (at + alignment - 1) / alignment * alignment;
        return std::all_of(tensors.begin(), tensors.end(),
                           [this](TensorInfo& t) { return place(t); });
    }
    bool preamble() {
        uint32_t magic = 0;
        if (!number(magic)) return false;
        if (magic != gguf_magic) return fail("not a GGUF file");
        if (!number(version)) return false;
        if (version == 2 || version == 3) return true;
        if (version != 0 && (version & 0xffff) == 0)
            return fail("a big-endian GGUF file; only little-endian is read",
                        ErrorKind::unsupported);
        return fail(format("GGUF version %u; only 2 and 3 are read", version).c_str(),
                    ErrorKind::unsupported);
    }
    bool key(GgufKey& key) {
        uint32_t type = 0;
        if (!name(key.name) || !number(type)) return false;
        key.is_array = type == static_cast<uint32_t>(GgufType::array);
        uint64_t count = 1;
        if (key.is_array && (!number(type) || !number(count))) return false;
        if (type > static_cast<uint32_t>(GgufType::f64))
            return fail("key", key.name, "has an unknown type");
        key.type = static_cast<GgufType>(type);
        if (key.type == GgufType::array)
            return fail("key", key.name, "is an array of arrays, which is not read");
        return value(key, count);
    }
    bool value(GgufKey& key, uint64_t count) {
        const uint64_t begin = at;
        const bool strings = key.type == GgufType::string;
        uint64_t least = 0;  // a string takes at least its length field
        const uint32_t each = strings ? 8 : gguf_value_bytes[static_cast<uint32_t>(key.type)];
        if (mul_overflows(count, each, &least)) return fail("key", key.name, "has too many values");
        if (!has(least)) return false;
        if (!strings) at += least;
        std::string_view text;
        for (uint64_t i = 0; strings && i < count; ++i)
            if (!string(text)) return false;
        key.count = static_cast<size_t>(count);
        key.data = bytes.subspan(static_cast<size_t>(begin), static_cast<size_t>(at - begin));
        if (key.type == GgufType::boolean)
            for (std::byte b : key.data)
                if (b > std::byte{1}) return fail("key", key.name, "has a bool that is not 0 or 1");
        return true;
    }
    std::optional<uint64_t> uint_key(std::string_view wanted) const {
        const GgufKey* key = find_by_name(keys, keys_by_name, wanted);
        return key ? gguf_uint(*key) : std::nullopt;
    }
    bool set_alignment() {
        constexpr std::string_view key = "general.alignment";
        if (!find_by_name(keys, keys_by_name, key)) return true;
        alignment = uint_key(key).value_or(0);
        if (std::has_single_bit(alignment) && alignment >= 8 && alignment <= Gguf::max_alignment)
            return true;
        return fail("key", key, "is not a power of two from 8 to 1048576");
    }
    bool tensor(TensorInfo& tensor) {
        uint32_t type = 0;
        if (!name(tensor.name) || !number(tensor.n_dims)) return false;
        if (tensor.n_dims < 1 || tensor.n_dims > 4)
            return fail("tensor", tensor.name, "does not have 1 to 4 dimensions");
        for (uint32_t i = 0; i < tensor.n_dims; ++i)
            if (!number(tensor.dims[i])) return false;
        if (!number(type) || !number(tensor.offset)) return false;
        tensor.type = static_cast<TensorType>(type);
        if (const char* wrong = size_tensor(tensor)) return fail("tensor", tensor.name, wrong);
        if (tensor.offset % alignment != 0)
            return fail("tensor", tensor.name, "has an offset that is not aligned");
        return true;
    }
    /// Makes the offset count from the start of the file; `at` is where tensor data begins.
    bool place(TensorInfo& tensor) {
        uint64_t end = 0;
        if (add_overflows(tensor.offset, at, &tensor.offset) ||
            add_overflows(tensor.offset, tensor.bytes, &end) || end > file_size)
            return fail("tensor", tensor.name, "lies outside the file");
        return true;
    }
};

std::string_view as_chars(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void append_gguf_number(std::string& out, uint64_t value, size_t width) {
    out.append(reinterpret_cast<const char*>(&value), width);  // little-endian, as all targets
}

void append_gguf_string(std::string& out, std::string_view text) {
    append_gguf_number(out, text.size(), 8);
    out += text;
}

}  // namespace
}  // namespace detail

const TypeInfo* type_info(TensorType type) {
    for (const auto& row : detail::type_rows)
        if (row.type == type) return &row.info;
    return nullptr;
}

Result<Gguf::File> Gguf::map_file(const std::string& path) {
    auto map = detail::MappedFile::open(path);
    if (!map) return map.error();
    File file;
    file.name = path;
    file.map = std::move(*map);
    file.bytes = file.map.bytes();
    file.size = file.bytes.size();
    return file;
}

Result<Gguf> Gguf::open(const std::string& path) {
    auto file = map_file(path);
    if (!file) return file.error();
    return parse_first(std::move(*file), path);
}

Result<Gguf> Gguf::from_bytes(std::span<const std::byte> bytes, std::string name) {
    File file;
    file.name = std::move(name);
    file.bytes = bytes;
    file.size = bytes.size();
    return parse_first(std::move(file), {});
}

Result<Gguf> Gguf::from_reader(GgufReader reader) {
    if (!reader.read)
        return detail::make_error(ErrorKind::invalid_request, reader.name + ": no read function");
    File file;
    file.name = reader.name;
    file.size = reader.size;
    file.reader = std::move(reader);
    return parse_first(std::move(file), {});
}

Result<Gguf> Gguf::parse_first(File file, const std::string& path) {
    Gguf gguf;
    if (auto done = gguf.parse_file(std::move(file)); !done) return done.error();
    if (auto done = gguf.open_splits(path); !done) return done.error();
    if (auto done = gguf.index_tensors(); !done) return done.error();
    return gguf;
}

/// Appends the tensors of one more file. Its keys are kept if it is the first: split files share
/// none but `split.*`.
Result<void> Gguf::parse_file(File file) {
    // How long a header is shows only once it is parsed: a reader gives longer and longer pieces.
    for (uint64_t length = detail::gguf_reader_chunk;; length *= 4) {
        if (file.reader.read)
            if (auto done = fetch_header(file, length); !done) return done;
        detail::GgufParser parser{file.name, file.bytes, file.size};
        if (!parser.parse()) {
            if (parser.short_of_bytes) continue;
            return *parser.error;
        }
        const uint32_t index = static_cast<uint32_t>(files_.size());
        if (index == 0) {
            version_ = parser.version;
            keys_ = std::move(parser.keys);
            keys_by_name_ = std::move(parser.keys_by_name);
        } else if (parser.uint_key("split.no") != index ||
                   parser.uint_key("split.count") != get_uint("split.count").value()) {
            return detail::make_error(ErrorKind::bad_data,
                                      file.name + ": keys 'split.no' and 'split.count' say that "
                                                  "it is another part");
        }
        for (TensorInfo& tensor : parser.tensors) tensor.file = index;
        tensors_.insert(tensors_.end(), parser.tensors.begin(), parser.tensors.end());
        files_.push_back(std::move(file));
        return {};
    }
}

Result<void> Gguf::fetch_header(File& file, uint64_t length) {
    if (file.size == 0) return {};
    auto header =
        detail::Buffer::allocate(std::min({length, file.size, max_header_bytes}), "GGUF header");
    if (!header) return header.error();
    if (!file.reader.read(file.reader.context, 0, header->data(), header->size()))
        return detail::make_error(ErrorKind::io, file.name + ": the reader failed at byte 0");
    file.header = std::move(*header);
    file.bytes = {file.header.data(), file.header.size()};
    return {};
}

Result<void> Gguf::open_splits(const std::string& path) {
    auto count = get_uint("split.count", 1);
    auto number = get_uint("split.no", 0);
    if (!count) return count.error();
    if (!number) return number.error();
    if (*count <= 1) return {};
    if (*count > max_split_files) return fail(ErrorKind::bad_data, "split.count", "is too large");
    if (path.empty())
        return fail(ErrorKind::unsupported, "split.count", "needs split files opened by path");
    if (*number != 0)
        return fail(ErrorKind::invalid_request, "split.no", "is not 0: open the first split file");
    const auto ending = [&](uint64_t part) {
        return detail::format("-%05u-of-%05u.gguf", static_cast<unsigned>(part),
                              static_cast<unsigned>(*count));
    };
    const std::string first = ending(1);
    if (!std::string_view(path).ends_with(first))
        return fail(ErrorKind::bad_data, "split.count", ("needs a name with " + first).c_str());
    for (uint64_t part = 2; part <= *count; ++part) {
        auto file = map_file(path.substr(0, path.size() - first.size()) + ending(part));
        if (!file) return file.error();
        if (auto done = parse_file(std::move(*file)); !done) return done;
    }
    auto total = get_uint("split.tensors.count", tensors_.size());
    if (!total) return total.error();
    if (*total != tensors_.size())
        return fail(ErrorKind::bad_data, "split.tensors.count", "is not the number of tensors");
    return {};
}

Result<void> Gguf::index_tensors() {
    if (tensors_.size() > max_tensors)
        return detail::make_error(ErrorKind::bad_data, name() + ": too many tensors in all parts");
    const TensorInfo* twice = nullptr;
    tensors_by_name_ = detail::sort_by_name(tensors_, &twice);
    if (twice) return fail(ErrorKind::bad_data, *twice, "occurs twice");
    std::vector<const TensorInfo*> placed;
    for (const TensorInfo& tensor : tensors_) placed.push_back(&tensor);
    std::sort(placed.begin(), placed.end(), [](const TensorInfo* a, const TensorInfo* b) {
        return a->file != b->file ? a->file < b->file : a->offset < b->offset;
    });
    for (size_t i = 1; i < placed.size(); ++i) {
        const TensorInfo& before = *placed[i - 1];
        if (before.file == placed[i]->file && before.offset + before.bytes > placed[i]->offset)
            return fail(ErrorKind::bad_data, *placed[i], "overlaps another tensor");
    }
    return {};
}

Error Gguf::fail(ErrorKind kind, std::string_view key, const char* what) const {
    return detail::make_error(kind, detail::format("%s: key '%.*s' %s", name().c_str(),
                                                   static_cast<int>(key.size()), key.data(), what));
}

Error Gguf::fail(ErrorKind kind, const TensorInfo& tensor, const char* what) const {
    return detail::make_error(kind, detail::format("%s: tensor '%.*s' %s",
                                                   files_[tensor.file].name.c_str(),
                                                   static_cast<int>(tensor.name.size()),
                                                   tensor.name.data(), what));
}

const GgufKey* Gguf::find(std::string_view key) const {
    return detail::find_by_name(keys_, keys_by_name_, key);
}

Result<const GgufKey*> Gguf::typed(std::string_view name, bool is_array, uint32_t types,
                                   const char* wanted) const {
    const GgufKey* key = find(name);
    if (!key) return fail(ErrorKind::not_found, name, "is missing");
    if (key->is_array != is_array || !(types & detail::gguf_bit(key->type)))
        return fail(ErrorKind::bad_data, name, (std::string("is not ") + wanted).c_str());
    return key;
}

Result<uint64_t> Gguf::get_uint(std::string_view name) const {
    auto key = typed(name, false, detail::gguf_integers, "an integer");
    if (!key) return key.error();
    auto value = detail::gguf_uint(**key);
    if (!value) return fail(ErrorKind::bad_data, name, "is negative");
    return *value;
}

Result<double> Gguf::get_float(std::string_view name) const {
    auto key = typed(name, false, detail::gguf_floats, "a float");
    if (!key) return key.error();
    return GgufNumbers<double>((*key)->data.data(), 1, (*key)->type)[0];
}

Result<bool> Gguf::get_bool(std::string_view name) const {
    auto key = typed(name, false, detail::gguf_bit(GgufType::boolean), "a bool");
    if (!key) return key.error();
    return (*key)->data[0] != std::byte{0};
}

Result<std::string_view> Gguf::get_string(std::string_view name) const {
    auto key = typed(name, false, detail::gguf_bit(GgufType::string), "a string");
    if (!key) return key.error();
    return detail::as_chars((*key)->data).substr(8);
}

Result<uint64_t> Gguf::get_uint(std::string_view key, uint64_t fallback) const {
    return find(key) ? get_uint(key) : fallback;
}

Result<double> Gguf::get_float(std::string_view key, double fallback) const {
    return find(key) ? get_float(key) : fallback;
}

Result<bool> Gguf::get_bool(std::string_view key, bool fallback) const {
    return find(key) ? get_bool(key) : fallback;
}

Result<std::string_view> Gguf::get_string(std::string_view key, std::string_view fallback) const {
    return find(key) ? get_string(key) : fallback;
}

Result<GgufStrings> Gguf::get_strings(std::string_view name) const {
    auto key = typed(name, true, detail::gguf_bit(GgufType::string), "an array of strings");
    if (!key) return key.error();
    const auto data = (*key)->data;
    return GgufStrings(data.data(), data.data() + data.size(), (*key)->count);
}

Result<GgufNumbers<int64_t>> Gguf::get_ints(std::string_view name) const {
    constexpr uint32_t types = (detail::gguf_integers & ~detail::gguf_bit(GgufType::u64)) |
                               detail::gguf_bit(GgufType::boolean);
    auto key = typed(name, true, types, "an array of integers");
    if (!key) return key.error();
    return GgufNumbers<int64_t>((*key)->data.data(), (*key)->count, (*key)->type);
}

Result<GgufNumbers<double>> Gguf::get_floats(std::string_view name) const {
    auto key = typed(name, true, detail::gguf_floats, "an array of floats");
    if (!key) return key.error();
    return GgufNumbers<double>((*key)->data.data(), (*key)->count, (*key)->type);
}

const TensorInfo* Gguf::find_tensor(std::string_view name) const {
    return detail::find_by_name(tensors_, tensors_by_name_, name);
}

Result<std::span<const std::byte>> Gguf::tensor_bytes(const TensorInfo& tensor) const {
    const File& file = files_[tensor.file];
    if (file.reader.read)
        return detail::make_error(ErrorKind::unsupported,
                                  file.name + ": a reader's tensors are not in memory");
    return file.bytes.subspan(static_cast<size_t>(tensor.offset),
                              static_cast<size_t>(tensor.bytes));
}

Result<void> Gguf::read_tensor(const TensorInfo& tensor, uint64_t offset,
                               std::span<std::byte> dst) const {
    const File& file = files_[tensor.file];
    if (offset > tensor.bytes || dst.size() > tensor.bytes - offset)
        return fail(ErrorKind::invalid_request, tensor, "is shorter than what is read of it");
    if (dst.empty()) return {};
    offset += tensor.offset;
    if (!file.reader.read)
        std::memcpy(dst.data(), file.bytes.data() + static_cast<size_t>(offset), dst.size());
    else if (!file.reader.read(file.reader.context, offset, dst.data(), dst.size()))
        return fail(ErrorKind::io, tensor, "could not be read");
    return {};
}

void Gguf::release(const TensorInfo& tensor, uint64_t offset, uint64_t length) const {
    const File& file = files_[tensor.file];
    if (file.map.bytes().empty() || offset >= tensor.bytes) return;
    file.map.release(static_cast<size_t>(tensor.offset + offset),
                     static_cast<size_t>(std::min(length, tensor.bytes - offset)));
}

GgufWriter::GgufWriter(uint32_t alignment) : alignment_(alignment) {
    if (alignment != detail::gguf_default_alignment) set("general.alignment", alignment);
}

void GgufWriter::put(std::string_view key, GgufType type, bool is_array, uint64_t count,
                     std::string_view data) {
    detail::append_gguf_string(keys_, key);
    if (is_array) detail::append_gguf_number(keys_, static_cast<uint32_t>(GgufType::array), 4);
    detail::append_gguf_number(keys_, static_cast<uint32_t>(type), 4);
    if (is_array) detail::append_gguf_number(keys_, count, 8);
    keys_ += data;
    ++n_keys_;
}

void GgufWriter::set(const GgufKey& key) {
    put(key.name, key.type, key.is_array, key.count, detail::as_chars(key.data));
}

void GgufWriter::set_string(std::string_view key, std::string_view value) {
    std::string data;
    detail::append_gguf_string(data, value);
    put(key, GgufType::string, false, 1, data);
}

void GgufWriter::set_strings(std::string_view key, std::span<const std::string_view> values) {
    std::string data;
    for (std::string_view value : values) detail::append_gguf_string(data, value);
    put(key, GgufType::string, true, values.size(), data);
}

void GgufWriter::add_tensor(std::string_view name, TensorType type,
                            std::span<const uint64_t> dims, std::span<const std::byte> bytes) {
    tensors_.push_back({std::string(name), type, {dims.begin(), dims.end()}, bytes});
}

Result<std::vector<std::byte>> GgufWriter::to_bytes() const {
    const uint64_t alignment = std::max(alignment_, 1u);  // a wrong one is refused below
    const auto padded = [&](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };
    std::string header;
    detail::append_gguf_number(header, detail::gguf_magic, 4);
    detail::append_gguf_number(header, 3, 4);
    detail::append_gguf_number(header, tensors_.size(), 8);
    detail::append_gguf_number(header, n_keys_, 8);
    header += keys_;
    uint64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
        detail::append_gguf_string(header, tensor.name);
        detail::append_gguf_number(header, tensor.dims.size(), 4);
        for (uint64_t dim : tensor.dims) detail::append_gguf_number(header, dim, 8);
        detail::append_gguf_number(header, static_cast<uint32_t>(tensor.type), 4);
        detail::append_gguf_number(header, offset, 8);
        offset = padded(offset + tensor.bytes.size());
    }
    std::vector<std::byte> out(static_cast<size_t>(padded(header.size()) + offset));
    std::memcpy(out.data(), header.data(), header.size());
    std::byte* at = out.data() + padded(header.size());
    for (const Tensor& tensor : tensors_) {
        std::copy(tensor.bytes.begin(), tensor.bytes.end(), at);
        at += padded(tensor.bytes.size());
    }
    if (auto sound = check(out); !sound) return sound.error();
    return out;
}

/// What Gguf refuses is not written; only whether the other split files exist is not asked.
Result<void> GgufWriter::check(std::span<const std::byte> bytes) const {
    Gguf gguf;
    Gguf::File file;
    file.name = "written model";
    file.bytes = bytes;
    file.size = bytes.size();
    if (auto done = gguf.parse_file(std::move(file)); !done) return done;
    for (size_t i = 0; i < tensors_.size(); ++i)
        if (gguf.tensors()[i].bytes != tensors_[i].bytes.size())
            return detail::make_error(ErrorKind::invalid_request,
                                      "tensor '" + tensors_[i].name +
                                          "' has another size than its shape and type say");
    return gguf.index_tensors();
}

Result<void> GgufWriter::write(const std::string& path) const {
    auto bytes = to_bytes();
    if (!bytes) return bytes.error();
    return detail::write_file(path, *bytes);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>kernels
// The definition stands in the declaration part. Here, in this order: exact building blocks, packed
// layouts, the scalar reference (read this first), one region per instruction set, the
// floating-point state, the choice of a table, the worker team.

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "valar needs float arithmetic in binary32: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif
static_assert(std::endian::native == std::endian::little, "valar needs a little-endian target");
static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559);

// ---- Exact building blocks -------------------------------------------------------------------

namespace {

// a * b is exact in double; the sum is rounded to odd (Boldo and Melquiond, "Emulation of FMA and
// correctly rounded sums", 2008), so that rounding to float afterwards sees which side it is on.
inline float emulated_fma(float a, float b, float c) {
    const double product = double(a) * double(b);
    const double sum = product + double(c);
    const double other = sum - product;
    const double error = (product - (sum - other)) + (double(c) - other);
    uint64_t bits = std::bit_cast<uint64_t>(sum);
    const bool finite = (bits >> 52 & 0x7ff) != 0x7ff;
    if (finite && error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1u : ~uint64_t{0};
    return static_cast<float>(std::bit_cast<double>(bits));
}

inline float fma_once(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || (defined(__riscv_flen) && __riscv_flen >= 32)
    return __builtin_fmaf(a, b, c);
#else
    return emulated_fma(a, b, c);
#endif
}

// For exact products of two floats below 2^50: fusing product and sum would change nothing.
inline double nearest_integer(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kExpLeast = -87.0f, kExpMost = 88.0f;
constexpr float exp_coefficients[7] = {
    1.0f, 1.0f, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558bp-5f, 0x1.123994p-7f, 0x1.6a4e0cp-10f};

inline float exp_once(float x) {
    if (x < kExpLeast) return 0.0f;
    if (x != x) return x;
    if (x > kExpMost) x = kExpMost;
    const float k = static_cast<float>(nearest_integer(double(x) * double(kLog2e)));
    const float r = fma_once(-k, kLn2Low, fma_once(-k, kLn2High, x));
    float p = exp_coefficients[6];
    for (int i = 5; i >= 0; i--) p = fma_once(p, r, exp_coefficients[i]);
    return p * std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
}

inline float silu_once(float x) { return x / (1.0f + exp_once(-x)); }

// A product in double that no compiler may fuse with the sum it feeds.
inline double rounded(double product) {
    volatile double stored = product;
    return stored;
}

inline double inverse_factorial(int n) {
    double factorial = 1;
    for (int i = 2; i <= n; i++) factorial *= i;
    return 1.0 / factorial;
}

inline double power_of_two(int k) {  // -1022 <= k <= 1023
    return std::bit_cast<double>(static_cast<uint64_t>(k + 1023) << 52);
}

inline float half_value(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31,
                   fraction = half & 1023u;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent < 31) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
}

inline uint16_t half_bits(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) magnitude = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    else if (magnitude >= 0x477ff000u) magnitude = 0x7c00u;  // 65520 and more
    else if (magnitude < 0x38800000u)  // below 2^-14: beside 0.5 the last bit is worth 2^-24
        magnitude = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    else magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    return static_cast<uint16_t>(sign | magnitude);
}

inline float bfloat_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t load16(const std::byte* at) {
    uint16_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline uint32_t load32(const std::byte* at) {
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline void store16(std::byte* at, uint16_t value) { std::memcpy(at, &value, sizeof value); }
inline void store32(std::byte* at, uint32_t value) { std::memcpy(at, &value, sizeof value); }

}  // namespace

float exact_fma(float a, float b, float c) { return fma_once(a, b, c); }
float exact_exp(float x) { return exp_once(x); }
float half_to_float(uint16_t bits) { return half_value(bits); }
uint16_t float_to_half(float value) { return half_bits(value); }

double exact_exp2(double x) {
    if (x < -1022) return 0;
    if (x >= 1023) return std::numeric_limits<double>::infinity();
    if (x != x) return x;
    x = rounded(x);  // inlined, it may be the caller's product
    const double k = nearest_integer(x);
    const double t = rounded((x - k) * 0x1.62e42fefa39efp-1);
    double p = inverse_factorial(13);
    for (int n = 12; n >= 0; n--) p = rounded(p * t) + inverse_factorial(n);
    return p * power_of_two(static_cast<int>(k));
}

double exact_log2(double x) {
    if (x == 0) return -std::numeric_limits<double>::infinity();
    if (!(x > 0)) return std::numeric_limits<double>::quiet_NaN();
    if (x > std::numeric_limits<double>::max()) return x;
    double e = 0;
    if (x < 0x1p-1022) {
        x *= 0x1p54;
        e = -54;
    }
    const uint64_t bits = std::bit_cast<uint64_t>(x);
    e += static_cast<double>(static_cast<int>(bits >> 52) - 1023);
    double m = std::bit_cast<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m /= 2;
        e += 1;
    }
    const double u = (m - 1) / (m + 1);
    const double z = rounded(u * u);
    double p = 1.0 / 23;
    for (int n = 21; n >= 1; n -= 2) p = rounded(p * z) + 1.0 / n;
    return e + rounded(rounded(u * p) * 0x1.71547652b82fep+1);
}

double exact_log(double x) { return rounded(exact_log2(x) * 0x1.62e42fefa39efp-1); }

void exact_sincos(double x, double* sine, double* cosine) {
    x = rounded(x);  // inlined, it may be the caller's product
    const double k = nearest_integer(rounded(x * 0x1.45f306dc9c883p-1));
    const double r = ((x - rounded(k * 0x1.921fb544p+0)) - rounded(k * 0x1.0b4611a6p-34)) -
                     rounded(k * 0x1.3198a2ep-69);
    const double z = rounded(r * r);
    double s = inverse_factorial(17), c = inverse_factorial(16);
    for (int n = 15; n >= 1; n -= 2) {
        s = rounded(s * z) + (n & 2 ? -inverse_factorial(n) : inverse_factorial(n));
        c = rounded(c * z) + (n & 2 ? -inverse_factorial(n - 1) : inverse_factorial(n - 1));
    }
    s = rounded(r * s);
    const int64_t quarter = static_cast<int64_t>(k) & 3;
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

// ---- Packed layouts --------------------------------------------------------------------------
//
// A weight is a code of `bits` bits; w = code - bias. A block is 32 columns of 16 rows, in 8 groups
// of 4 columns. Word r (4 bytes) of a 64-byte vector holds one group of row r, one byte a column:
//     scales   of Q4_0 Q5_0 Q8_0: d[16], Q4_1: d[16] m[16], binary16
//              of Q4_K Q5_K: sc[16] mn[16], Q6_K: sc0[16] sc1[16], a byte each
//     codes    8 bits: 8 vectors, group by group; else 4 vectors: vector j holds the low four bits
//              of group 2j in the low halves of its bytes and of group 2j+1 in the high halves
//     high     5 bits: 1 vector, bit g of a byte belongs to group g; 6 bits: 2 vectors, groups 0..3
//              and 4..7, two bits each, lowest first
// Types with super-blocks write before each 8 blocks a head: D[16], Q4_K and Q5_K also Dmin[16],
// binary16. Tiles are padded to 64 bytes. Unsigned codes suit every integer instruction: the bias
// is taken out afterwards through ActivationBlock::sum.

namespace {

struct PackedLayout {
    TensorType type;
    uint8_t bits;  // of a code; of a value where float_bytes is set
    uint8_t bias;
    bool minimum;         // m of the definition
    uint8_t float_bytes;  // 0: quantized
    uint8_t scale_bytes;  // before a block's codes
    uint8_t head_bytes;   // before a super-block's first block
    uint8_t blocks;       // of a super-block
};

// clang-format off
constexpr PackedLayout packed_layouts[] = {
    // type            bits bias  min   float scale head blocks
    {TensorType::q4_0,  4,   8, false, 0, 32, 0, 1},
    {TensorType::q4_1,  4,   0, true,  0, 64, 0, 1},
    {TensorType::q5_0,  5,  16, false, 0, 32, 0, 1},
    {TensorType::q8_0,  8, 128, false, 0, 32, 0, 1},
    {TensorType::q4_k,  4,   0, true,  0, 32, 64, 8},
    {TensorType::q5_k,  5,   0, true,  0, 32, 64, 8},
    {TensorType::q6_k,  6,  32, false, 0, 32, 32, 8},
    {TensorType::f32,  32,   0, false, 4, 0, 0, 1},
    {TensorType::f16,  16,   0, false, 2, 0, 0, 1},
    {TensorType::bf16, 16,   0, false, 2, 0, 0, 1},
};
// clang-format on

inline const PackedLayout* find_layout(TensorType type) {
    for (const PackedLayout& layout : packed_layouts)
        if (layout.type == type) return &layout;
    return nullptr;
}

constexpr size_t packed_block_bytes(const PackedLayout& layout) {
    return layout.scale_bytes + size_t{layout.bits} * 64;
}
constexpr size_t packed_super_bytes(const PackedLayout& layout) {
    return layout.head_bytes + layout.blocks * packed_block_bytes(layout);
}

inline const std::byte* packed_tile(const PackedMatrix& matrix, size_t tile) {
    return matrix.data + tile * packed_tile_bytes(matrix.type, matrix.cols);
}

// The codes of one row of a block, four a word.
inline void load_codes(const PackedLayout& layout, const std::byte* codes, uint32_t row,
                       uint32_t words[8]) {
    codes += 4 * row;
    if (layout.bits == 8) {
        for (uint32_t g = 0; g < 8; g++) words[g] = load32(codes + 64 * g);
        return;
    }
    for (uint32_t g = 0; g < 8; g++)
        words[g] = load32(codes + g / 2 * 64) >> g % 2 * 4 & 0x0f0f0f0fu;
    const uint32_t high = layout.bits - 4u, mask = high == 1 ? 0x01010101u : 0x03030303u;
    for (uint32_t g = 0; high && g < 8; g++)
        words[g] |= (load32(codes + 256 + g * high / 8 * 64) >> g * high % 8 & mask) << 4;
}

inline void store_codes(const PackedLayout& layout, std::byte* codes, uint32_t row,
                        const uint32_t words[8]) {
    codes += 4 * row;
    if (layout.bits == 8) {
        for (uint32_t g = 0; g < 8; g++) store32(codes + 64 * g, words[g]);
        return;
    }
    for (uint32_t j = 0; j < 4; j++)
        store32(codes + 64 * j, (words[2 * j] & 0x0f0f0f0fu) | (words[2 * j + 1] & 0x0f0f0f0fu)
                                                                   << 4);
    const uint32_t high = layout.bits - 4u;
    uint32_t bits[2] = {};
    for (uint32_t g = 0; high && g < 8; g++)
        bits[g * high / 8] |= (words[g] >> 4 & 0x03030303u) << g * high % 8;
    for (uint32_t i = 0; i < high; i++) store32(codes + 256 + 64 * i, bits[i]);
}

// One block of a row as the GGUF file has it, decoded as far as all types are alike.
struct SourceBlock {
    uint32_t words[8];  // unsigned codes, four a word
    uint16_t d, m;      // binary16: d, m or D, Dmin
    uint8_t s0, s1;     // sc, mn or sc0, sc1
};

// The k-quants' eight 6-bit scales and minimums in 12 bytes.
inline void read_k_scales(const uint8_t* q, size_t s, SourceBlock& out) {
    if (s < 4) {
        out.s0 = q[s] & 63;
        out.s1 = q[s + 4] & 63;
    } else {
        out.s0 = static_cast<uint8_t>((q[s + 4] & 15) | (q[s - 4] >> 6) << 4);
        out.s1 = static_cast<uint8_t>(q[s + 4] >> 4 | (q[s] >> 6) << 4);
    }
}

inline void read_nibbles(const std::byte* at, SourceBlock& out) {  // 16 bytes: columns i and i + 16
    for (uint32_t g = 0; g < 4; g++) {
        const uint32_t word = load32(at + 4 * g);
        out.words[g] = word & 0x0f0f0f0fu;
        out.words[g + 4] = word >> 4 & 0x0f0f0f0fu;
    }
}

inline void read_source_block(TensorType type, const std::byte* row, size_t block,
                              SourceBlock& out) {
    const std::byte* at = row;
    const size_t s = block % 8;
    const uint32_t shift = s & 1 ? 4 : 0;
    switch (type) {
        case TensorType::q4_0:
            at += block * 18;
            out.d = load16(at);
            return read_nibbles(at + 2, out);
        case TensorType::q4_1:
            at += block * 20;
            out.d = load16(at);
            out.m = load16(at + 2);
            return read_nibbles(at + 4, out);
        case TensorType::q5_0:
            at += block * 22;
            out.d = load16(at);
            read_nibbles(at + 6, out);
            for (uint32_t g = 0; g < 8; g++)  // spreads four bits over four bytes
                out.words[g] |= ((load32(at + 2) >> 4 * g & 15) * 0x204081u & 0x01010101u) << 4;
            return;
        case TensorType::q8_0:
            at += block * 34;
            out.d = load16(at);
            for (uint32_t g = 0; g < 8; g++) out.words[g] = load32(at + 2 + 4 * g) ^ 0x80808080u;
            return;
        case TensorType::q4_k:
        case TensorType::q5_k: {
            at += block / 8 * (type == TensorType::q4_k ? 144 : 176);
            out.d = load16(at);
            out.m = load16(at + 2);
            read_k_scales(reinterpret_cast<const uint8_t*>(at) + 4, s, out);
            const std::byte* low = at + (type == TensorType::q4_k ? 16 : 48) + s / 2 * 32;
            for (uint32_t g = 0; g < 8; g++) {
                out.words[g] = load32(low + 4 * g) >> shift & 0x0f0f0f0fu;
                if (type == TensorType::q5_k)
                    out.words[g] |= (load32(at + 16 + 4 * g) >> s & 0x01010101u) << 4;
            }
            return;
        }
        default: {  // q6_k
            at += block / 8 * 210;
            out.d = load16(at + 208);
            out.s0 = static_cast<uint8_t>(at[192 + 2 * s]);
            out.s1 = static_cast<uint8_t>(at[192 + 2 * s + 1]);
            const std::byte* low = at + s / 4 * 64 + s % 2 * 32;
            const std::byte* high = at + 128 + s / 4 * 32;
            for (uint32_t g = 0; g < 8; g++)
                out.words[g] = (load32(low + 4 * g) >> s % 4 / 2 * 4 & 0x0f0f0f0fu) |
                               (load32(high + 4 * g) >> s % 4 * 2 & 0x03030303u) << 4;
            return;
        }
    }
}

// One function a type: with the layout a constant, the loops below have no branches left.
template <size_t layout_index>
void pack_tile(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
               std::byte* out) {
    constexpr const PackedLayout& layout = packed_layouts[layout_index];
    for (size_t b = 0; b < cols / kActivationBlock; b++) {
        std::byte* head = out;
        if (b % layout.blocks == 0) out += layout.head_bytes;
        else head = nullptr;
        for (uint32_t r = 0; r < rows; r++) {
            SourceBlock block;
            read_source_block(layout.type, source + r * row_bytes, b, block);
            store_codes(layout, out + layout.scale_bytes, r, block.words);
            std::byte* halves = layout.head_bytes ? head : out;
            if (halves) store16(halves + 2 * r, block.d);
            if (halves && layout.minimum) store16(halves + 32 + 2 * r, block.m);
            if (layout.head_bytes) out[r] = std::byte{block.s0};
            if (layout.head_bytes) out[16 + r] = std::byte{block.s1};
        }
        out += packed_block_bytes(layout);
    }
}

// A few columns of every row at a time: rows that lie a power of two apart share few cache lines.
template <size_t bytes>
void pack_float_tile(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
                     std::byte* out) {
    constexpr size_t piece = 32;
    for (size_t first = 0; first < cols; first += piece)
        for (uint32_t r = 0; r < rows; r++)
            for (size_t c = first; c < std::min(cols, first + piece); c++)
                std::memcpy(out + (c * kTileRows + r) * bytes, source + r * row_bytes + c * bytes,
                            bytes);
}

using PackTile = void (*)(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
                          std::byte* out);
constexpr PackTile pack_functions[] = {  // in the order of packed_layouts
    pack_tile<0>, pack_tile<1>, pack_tile<2>, pack_tile<3>, pack_tile<4>, pack_tile<5>,
    pack_tile<6>, pack_float_tile<4>, pack_float_tile<2>, pack_float_tile<2>,
};
static_assert(std::size(pack_functions) == std::size(packed_layouts));

inline float packed_float(TensorType type, const std::byte* tile, size_t index) {
    if (type == TensorType::f32) return std::bit_cast<float>(load32(tile + 4 * index));
    const uint16_t bits = load16(tile + 2 * index);
    return type == TensorType::f16 ? half_value(bits) : bfloat_value(bits);
}

}  // namespace

bool kernel_type_supported(TensorType type) { return find_layout(type) != nullptr; }

uint64_t packed_tile_bytes(TensorType type, uint32_t cols) {
    const PackedLayout* layout = find_layout(type);
    if (!layout) return 0;
    const uint64_t bytes =
        layout->float_bytes
            ? uint64_t{cols} * kTileRows * layout->float_bytes
            : uint64_t{cols} / (kActivationBlock * layout->blocks) * packed_super_bytes(*layout);
    return (bytes + 63) / 64 * 64;
}

void pack_tiles(TensorType type, uint32_t rows, uint32_t cols, const std::byte* source,
                uint32_t first_tile, uint32_t last_tile, std::byte* out) {
    const PackedLayout& layout = *find_layout(type);
    const size_t tile_bytes = static_cast<size_t>(packed_tile_bytes(type, cols));
    const TypeInfo& info = *type_info(type);
    const size_t row_bytes = size_t{cols} / info.block_size * info.block_bytes;
    for (uint32_t tile = first_tile; tile < last_tile; tile++) {
        const uint32_t count = std::min(kTileRows, rows - tile * kTileRows);
        const size_t used = layout.float_bytes
                                ? size_t{cols} * kTileRows * layout.float_bytes
                                : cols / (32 * layout.blocks) * packed_super_bytes(layout);
        if (count < kTileRows) std::memset(out, 0, tile_bytes);
        else std::memset(out + used, 0, tile_bytes - used);
        pack_functions[&layout - packed_layouts](source, row_bytes, count, cols, out);
        source += row_bytes * kTileRows;
        out += tile_bytes;
    }
}

// ---- Scalar reference ------------------------------------------------------------------------

namespace {
namespace scalar {

// A block of one row, ready for the definition's formulas.
struct RowBlock {
    int32_t w[kActivationBlock];
    float scale;     // dw
    float minimum;   // m
    int32_t sub[2];  // Q6_K's scales of the two halves, else 1
};

void read_block(const PackedLayout& layout, const std::byte* tile, size_t block, uint32_t row,
                RowBlock& out) {
    const std::byte* head = tile + block / layout.blocks * packed_super_bytes(layout);
    const std::byte* at =
        head + layout.head_bytes + block % layout.blocks * packed_block_bytes(layout);
    uint32_t words[8];
    load_codes(layout, at + layout.scale_bytes, row, words);
    for (uint32_t i = 0; i < kActivationBlock; i++)
        out.w[i] = static_cast<int32_t>(words[i / 4] >> i % 4 * 8 & 255) - layout.bias;

    const std::byte* halves = layout.head_bytes ? head : at;
    out.scale = half_value(load16(halves + 2 * row));
    out.minimum = layout.minimum ? half_value(load16(halves + 32 + 2 * row)) : 0.0f;
    out.sub[0] = out.sub[1] = 1;
    if (layout.type == TensorType::q6_k) {
        for (uint32_t i = 0; i < 2; i++) out.sub[i] = static_cast<int8_t>(at[16 * i + row]);
    } else if (layout.head_bytes) {
        out.scale *= static_cast<float>(static_cast<uint8_t>(at[row]));
        out.minimum = -(out.minimum * static_cast<float>(static_cast<uint8_t>(at[16 + row])));
    }
}

void quantize_plane(const float* x, float d, float inverse, ActivationBlock& out) {
    out = {d, 0, {0, 0}, {}};
    for (uint32_t i = 0; d > 0 && i < kActivationBlock; i++) {
        const double nearest = nearest_integer(double(x[i]) * double(inverse));
        out.q[i] = static_cast<int8_t>(std::min(127.0, std::max(-127.0, nearest)));
        out.sum[i / 16] += out.q[i];
    }
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

void quantize_block(const float* x, uint32_t planes, size_t plane_stride, ActivationBlock* out) {
    uint32_t largest = 0;  // magnitudes order like their bits
    for (uint32_t i = 0; i < kActivationBlock; i++)
        largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    const float amax = std::bit_cast<float>(largest);
    const bool finite = largest < 0x7f800000u, zero = amax < 0x1p-100f;
    const float d = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : amax / 127.0f;
    const float inverse = finite && !zero ? 127.0f / amax : 0.0f;
    quantize_plane(x, d, inverse, out[0]);
    if (planes < 2) return;
    float rest[kActivationBlock];
    for (uint32_t i = 0; i < kActivationBlock; i++)
        rest[i] = fma_once(-d, static_cast<float>(out[0].q[i]), x[i]);
    quantize_plane(rest, d / 254.0f, inverse * 254.0f, out[plane_stride]);
}

void quantize(const float* x, size_t n, uint32_t planes, ActivationBlock* out) {
    const size_t blocks = n / kActivationBlock;
    for (size_t b = 0; b < blocks; b++)
        quantize_block(x + b * kActivationBlock, planes, blocks, out + b);
}

int32_t dot_integers(const int32_t* w, const int8_t* h) {
    int32_t sum = 0;
    for (uint32_t i = 0; i < kActivationBlock / 2; i++) sum += w[i] * h[i];
    return sum;
}

float dot_block(const PackedLayout& layout, const RowBlock& row, const ActivationBlock& a,
                float acc) {
    const int32_t sum =
        row.sub[0] * dot_integers(row.w, a.q) + row.sub[1] * dot_integers(row.w + 16, a.q + 16);
    acc = fma_once(static_cast<float>(sum), row.scale * a.d, acc);
    return layout.minimum ? fma_once(row.minimum, a.s, acc) : acc;
}

// One row against `count` planes, which lie one after another.
void dot_row(const PackedLayout& layout, const std::byte* tile, uint32_t row, size_t blocks,
             const ActivationBlock* planes, uint32_t count, float* acc) {
    for (uint32_t p = 0; p < count; p++) acc[p] = 0;
    for (size_t b = 0; b < blocks; b++) {
        RowBlock block;
        read_block(layout, tile, b, row, block);
        for (uint32_t p = 0; p < count; p++)
            acc[p] = dot_block(layout, block, planes[p * blocks + b], acc[p]);
    }
}

float dot_float_row(TensorType type, const std::byte* tile, uint32_t row, uint32_t cols,
                    const float* x) {
    float acc = 0;
    for (size_t k = 0; k < cols; k++)
        acc = fma_once(packed_float(type, tile, k * kTileRows + row), x[k], acc);
    return acc;
}

void matmul(const MatmulTask& task) {
    const PackedMatrix& w = *task.weights;
    const PackedLayout& layout = *find_layout(w.type);
    const size_t blocks = w.cols / kActivationBlock;
    const uint32_t last_row = std::min(w.rows, task.last_tile * kTileRows);
    for (uint32_t row = task.first_tile * kTileRows; row < last_row; row++) {
        const std::byte* tile = packed_tile(w, row / kTileRows);
        const uint32_t lane = row % kTileRows;
        constexpr uint32_t kAtOnce = 16;  // columns that share one unpacking
        for (uint32_t first = 0; first < task.columns; first += kAtOnce) {
            const uint32_t count = std::min(kAtOnce, task.columns - first);
            float* y = task.y + first * task.y_stride + row;
            float acc[2 * kAtOnce];
            if (!layout.float_bytes)
                dot_row(layout, tile, lane, blocks, task.blocks + first * task.planes * blocks,
                        count * task.planes, acc);
            for (uint32_t c = 0; c < count; c++)
                y[c * task.y_stride] = layout.float_bytes
                                           ? dot_float_row(w.type, tile, lane, w.cols,
                                                           task.x + (first + c) * task.x_stride)
                                       : task.planes == 2 ? acc[2 * c] + acc[2 * c + 1]
                                                          : acc[c];
        }
    }
}

float sum_of_lanes(float lanes[16]) {
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    float lanes[16] = {};
    for (size_t i = 0; i < n; i++) lanes[i % 16] = fma_once(x[i], x[i], lanes[i % 16]);
    const float scale = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    for (size_t i = 0; i < n; i++) y[i] = (x[i] * scale) * weight[i];
}

void rotate(float& a, float& b, float c, float s) {
    const float bs = b * s, bc = b * c;
    const float turned = fma_once(a, c, -bs);
    b = fma_once(a, s, bc);
    a = turned;
}

void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin) {
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim)
        for (uint32_t i = 0; i < n_rot / 2; i++)
            rotate(x[neox ? i : 2 * i], x[neox ? i + n_rot / 2 : 2 * i + 1], cos_sin[2 * i],
                   cos_sin[2 * i + 1]);
}

void scale(float* x, float factor, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

void add(float* x, const float* y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

void silu_mul(float* gate, const float* up, size_t n) {
    for (size_t i = 0; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group) {
    for (size_t e = 0; e < head_dim; e++) {
        const size_t key = e * kKeyGroup + slot, value = size_t{slot} * head_dim + e;
        if (type == KvType::f32) {
            static_cast<float*>(key_group)[key] = k[e];
            static_cast<float*>(value_group)[value] = v[e];
        } else {
            static_cast<uint16_t*>(key_group)[key] = half_bits(k[e]);
            static_cast<uint16_t*>(value_group)[value] = half_bits(v[e]);
        }
    }
}

float read_kv(KvType type, const void* group, size_t index) {
    return type == KvType::f32 ? static_cast<const float*>(group)[index]
                               : half_value(static_cast<const uint16_t*>(group)[index]);
}

void attend(const AttentionTask& task, uint32_t query) {
    const uint32_t begin = task.begin[query], end = task.end[query];
    const float* q = task.q + query * task.q_stride;
    float p[kSegment], most = -std::numeric_limits<float>::infinity();
    for (uint32_t j = begin; j < end; j++) {
        p[j] = 0;
        for (size_t e = 0; e < task.head_dim; e++)
            p[j] = fma_once(q[e], read_kv(task.kv_type, task.keys[j / 16], e * kKeyGroup + j % 16),
                            p[j]);
        if (p[j] > most) most = p[j];
    }
    most += 0.0f;
    float lanes[16] = {};
    for (uint32_t j = begin; j < end; j++) {
        p[j] = exp_once(p[j] - most);
        lanes[j % 16] += p[j];
    }
    task.max[query] = most;
    task.sum[query] = sum_of_lanes(lanes);
    float* out = task.out + query * task.out_stride;
    for (size_t e = 0; e < task.head_dim; e++) {
        out[e] = 0;
        for (uint32_t j = begin; j < end; j++)
            out[e] = fma_once(
                p[j], read_kv(task.kv_type, task.values[j / 16], j % 16 * task.head_dim + e),
                out[e]);
    }
}

void attention(const AttentionTask& task) {
    for (uint32_t query = 0; query < task.queries; query++)
        if (task.begin[query] < task.end[query]) attend(task, query);
}

void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n) {
    const float most = m > *max ? m : *max;
    const float a = exp_once(*max - most), b = exp_once(m - most);
    *max = most;
    *sum = fma_once(l, b, *sum * a);
    for (size_t e = 0; e < n; e++) out[e] = fma_once(o[e], b, out[e] * a);
}

constexpr Kernels kernels = {"scalar", quantize, matmul,   rms_norm,  rope,           scale,
                             add,      silu_mul, store_kv, attention, attention_merge};

}  // namespace scalar
}  // namespace

void dequantize_row(const PackedMatrix& matrix, uint32_t row, float* out) {
    const PackedLayout& layout = *find_layout(matrix.type);
    const std::byte* tile = packed_tile(matrix, row / kTileRows);
    const uint32_t lane = row % kTileRows;
    if (layout.float_bytes) {
        for (size_t k = 0; k < matrix.cols; k++)
            out[k] = packed_float(matrix.type, tile, k * kTileRows + lane);
        return;
    }
    for (size_t b = 0; b < matrix.cols / kActivationBlock; b++) {
        scalar::RowBlock block;
        scalar::read_block(layout, tile, b, lane, block);
        for (uint32_t i = 0; i < kActivationBlock; i++) {
            const float w = static_cast<float>(block.w[i]);
            *out++ = layout.minimum ? fma_once(block.scale, w, block.minimum)
                                    : block.scale * static_cast<float>(block.sub[i / 16]) * w;
        }
    }
}

// ---- Instruction sets ------------------------------------------------------------------------
//
// A region compiles its functions for more than the build's baseline; nothing in it runs unless the
// CPU has it. Inside: no includes, no std templates (they might be emitted for the region and
// shared with everyone), pointers and sizes in. Register-tile loops carry an unroll pragma: gcc -O2
// would leave the array in memory.

#define VALAR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define VALAR_TARGET_BEGIN(features) \
    VALAR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define VALAR_TARGET_END VALAR_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define VALAR_TARGET_BEGIN(features) \
    VALAR_PRAGMA(GCC push_options) VALAR_PRAGMA(GCC target(features))
#define VALAR_TARGET_END VALAR_PRAGMA(GCC pop_options)
#else
#define VALAR_TARGET_BEGIN(features)
#define VALAR_TARGET_END
#endif
#if defined(__GNUC__)
#define VALAR_UNROLL VALAR_PRAGMA(GCC unroll 16)
#define VALAR_FORCE_INLINE inline __attribute__((always_inline))
// Keeps gcc from turning a chain of integer sums into a tree, which spills every product.
#define VALAR_IN_ORDER(vector) __asm__("" : "+x"(vector))
#else
#define VALAR_UNROLL
#define VALAR_FORCE_INLINE __forceinline
#define VALAR_IN_ORDER(vector) ((void)0)
#endif

// GCC for Windows does not align spilled 32-byte registers (its bug 54412): no AVX there.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD) && \
    !(defined(__MINGW32__) && !defined(__clang__))
#define VALAR_X86_KERNELS 1
#else
#define VALAR_X86_KERNELS 0
#endif

#if VALAR_X86_KERNELS
namespace {

struct X86Features {
    bool avx2 = false;     // with FMA and F16C
    bool avxvnni = false;  // besides
    bool avx512 = false;   // F, BW, DQ, VL and VNNI, besides AVX2
};

inline void cpuid(uint32_t leaf, uint32_t out[4], uint32_t subleaf = 0) {
#if !defined(__GNUC__)
    __cpuidex(reinterpret_cast<int*>(out), static_cast<int>(leaf), static_cast<int>(subleaf));
#else
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
#endif
}

inline uint32_t enabled_registers() {  // XCR0: what the system saves
#if defined(_MSC_VER) && !defined(__clang__)
    return static_cast<uint32_t>(_xgetbv(0));
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

inline X86Features x86_features() {
    X86Features found;
    uint32_t top[4], one[4], seven[4];
    cpuid(0, top);
    cpuid(1, one);
    constexpr uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA OSXSAVE AVX F16C
    if (top[0] < 7 || (one[2] & needed) != needed) return found;
    const uint32_t registers = enabled_registers();
    cpuid(7, seven);
    found.avx2 = (registers & 0x6) == 0x6 && (seven[1] & 1u << 5);
    constexpr uint32_t wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    found.avx512 = found.avx2 && (registers & 0xe6) == 0xe6 && (seven[1] & wide) == wide &&
                   (seven[2] & 1u << 11);
    if (seven[0] >= 1) {
        cpuid(7, seven, 1);
        found.avxvnni = found.avx2 && (seven[0] & 1u << 4);
    }
    return found;
}

// ---- What the x86 regions share: a matrix product as tile kernels and the loops around them ---

// A tile kernel adds to `sums` the products of two tiles and C columns, in ascending order of k.
struct TileStep {
    const std::byte* const* tiles;    // (2) where each goes on: at the head of a super-block
    const std::byte* const* columns;  // (C) ActivationBlocks, or floats
    size_t count;                     // of blocks, or floats
    float (*sums)[2][16];             // (C)
    // To prefetch: what lies `ahead` bytes ahead of every `every`th block, block `phase` first.
    size_t ahead, every, phase;
};
struct TileKernels {
    struct Shape {
        uint32_t columns;
        void (*dot)(const TileStep& step);
    } shapes[4];  // few columns to many
};

constexpr uint32_t kBatchColumns = 72;  // whose sums a pair of tiles keeps
constexpr size_t kChunk = 32;           // blocks that stay in a near cache for all columns
constexpr size_t kChunkFloats = 512;
constexpr size_t kAheadOne = 1024;  // best prefetch distances measured: for one or two columns,
constexpr size_t kAheadFew = 6144;  // for as many as one call takes

// Columns that meet a pair of tiles, and where their data lies.
struct ColumnBatch {
    const std::byte* data;
    size_t stride;  // from column to column, in bytes
    size_t unit;    // bytes of a block, or of a float
    uint32_t count;
};

// The kernel for the first of the columns that are left: 7 are better served as 4 and 3 than as 6
// and 1.
inline const TileKernels::Shape& next_shape(const TileKernels& k, uint32_t left) {
    for (const TileKernels::Shape& shape : k.shapes)
        if (left <= shape.columns) return shape;
    return k.shapes[left <= 2 * k.shapes[2].columns ? 2 : 3];
}

// sums (count) = two tiles times the columns. Where these need several kernel calls, k advances in
// chunks; each call prefetches its share of the next chunk.
inline void dot_batch(const PackedLayout& layout, const TileKernels& k,
                      const std::byte* const (&tiles)[2], size_t units, const ColumnBatch& batch,
                      float (*sums)[2][16]) {
    const uint32_t most = k.shapes[3].columns;
    const bool once = batch.count <= most;
    const size_t chunk = once ? units : layout.float_bytes ? kChunkFloats : kChunk;
    const size_t chunk_bytes = layout.float_bytes
                                   ? chunk * layout.float_bytes * kTileRows
                                   : chunk / layout.blocks * packed_super_bytes(layout);
    std::memset(sums, 0, (batch.count + most) * sizeof *sums);
    for (size_t u = 0, done = 0; u < units; u += chunk, done += chunk_bytes) {
        const std::byte *at[2] = {tiles[0] + done, tiles[1] + done}, *columns[8];
        TileStep step{at,
                      columns,
                      units - u < chunk ? units - u : chunk,
                      sums,
                      !once             ? chunk_bytes
                      : batch.count > 2 ? kAheadFew
                                        : kAheadOne,
                      (batch.count + most - 1) / most,
                      0};
        for (uint32_t v = 0; v < batch.count; step.phase++) {
            const TileKernels::Shape& shape = next_shape(k, batch.count - v);
            for (uint32_t c = 0; c < shape.columns; c++) {  // the last again where they run out
                const uint32_t column = v + c < batch.count ? v + c : batch.count - 1;
                columns[c] = batch.data + column * batch.stride + u * batch.unit;
            }
            step.sums = sums + v;
            shape.dot(step);
            v += shape.columns;
        }
    }
}

inline void write_tile(const MatmulTask& task, uint32_t tile, uint32_t first, uint32_t count,
                       uint32_t planes, float (*sums)[2][16]) {
    const uint32_t row = tile * kTileRows, left = task.weights->rows - row;
    for (uint32_t v = 0; v < count; v += planes) {
        float *y = task.y + (first + v) / planes * task.y_stride + row, *sum = sums[v][0];
        for (uint32_t r = 0; planes == 2 && r < kTileRows; r++) sum[r] += sums[v + 1][0][r];
        if (left >= kTileRows) std::memcpy(y, sum, kTileRows * sizeof(float));
        else std::memcpy(y, sum, left * sizeof(float));
    }
}

// The range's two halves are two streams through memory: each pair has a tile of both.
inline void matmul_tiles(const MatmulTask& task, const TileKernels& k) {
    const PackedMatrix& w = *task.weights;
    const PackedLayout& layout = *find_layout(w.type);
    const bool floats = layout.float_bytes != 0;
    const uint32_t planes = floats ? 1 : task.planes, all = task.columns * planes;
    const size_t units = floats ? w.cols : w.cols / kActivationBlock;
    const size_t unit = floats ? sizeof(float) : sizeof(ActivationBlock);
    const size_t stride = unit * (floats ? task.x_stride : units);
    const void* data = floats ? static_cast<const void*>(task.x) : task.blocks;
    const uint32_t pairs = (task.last_tile - task.first_tile + 1) / 2;
    for (uint32_t first = 0; first < all; first += kBatchColumns) {
        const ColumnBatch batch{static_cast<const std::byte*>(data) + first * stride, stride, unit,
                                all - first < kBatchColumns ? all - first : kBatchColumns};
        for (uint32_t i = 0; i < pairs; i++) {
            const uint32_t low = task.first_tile + i, high = low + pairs;
            const bool both = high < task.last_tile;
            alignas(64) float sums[kBatchColumns + 8][2][16];
            dot_batch(layout, k, {packed_tile(w, low), packed_tile(w, both ? high : low)}, units,
                      batch, sums);
            write_tile(task, low, first, batch.count, planes, sums);
            if (both)
                write_tile(task, high, first, batch.count, planes,
                           reinterpret_cast<float(*)[2][16]>(sums[0][1]));
        }
    }
}

}  // namespace

// ---- Attention of the vector paths -----------------------------------------------------------

namespace {

// Queries of an attention task that look at the same segment together.
constexpr uint32_t kTileQueries = 8;
struct QueryTile {
    const float* q[kTileQueries];
    uint32_t begin[kTileQueries], end[kTileQueries];
    float* p[kTileQueries];  // (256) scores, then weights
    float* out[kTileQueries];
};

// What an instruction set has for tiles of 1, 2, .. `queries` queries: [f32][queries - 1].
struct AttentionParts {
    using Range = void(const AttentionTask&, const QueryTile&, uint32_t first, uint32_t last);
    using RangeOfSome = void(const AttentionTask&, const QueryTile&, uint32_t query, uint32_t first,
                             uint32_t last);
    uint32_t queries;
    Range* score[2][kTileQueries];  // p = keys first .. last - 1, and some beside them
    void (*weigh)(float* p, uint32_t begin, uint32_t end, float* max, float* sum);
    RangeOfSome* add_values[2][kTileQueries];  // out += p * values, of queries from `query` on
};

void attend_tile(const AttentionParts& parts, const AttentionTask& task, const QueryTile& tile,
                 const uint32_t* query, uint32_t count) {
    uint32_t first = kSegment, last = 0, together = 0, apart = kSegment;
    for (uint32_t i = 0; i < count; i++) {
        first = std::min(first, tile.begin[i]);
        last = std::max(last, tile.end[i]);
        together = std::max(together, tile.begin[i]);  // all look from here on
        apart = std::min(apart, tile.end[i]);          // not all look from here on
    }
    const bool f32 = task.kv_type == KvType::f32;
    parts.score[f32][count - 1](task, tile, first, last);
    for (uint32_t i = 0; i < count; i++) {
        parts.weigh(tile.p[i], tile.begin[i], tile.end[i], task.max + query[i],
                    task.sum + query[i]);
        std::memset(tile.out[i], 0, task.head_dim * sizeof(float));
    }
    if (apart < together) apart = together = last;
    for (uint32_t i = 0; i < count; i++)
        parts.add_values[f32][0](task, tile, i, tile.begin[i], std::min(together, tile.end[i]));
    parts.add_values[f32][count - 1](task, tile, 0, together, apart);
    for (uint32_t i = 0; i < count; i++)
        parts.add_values[f32][0](task, tile, i, apart, tile.end[i]);
}

void attend(const AttentionParts& parts, const AttentionTask& task) {
    alignas(64) float p[kTileQueries][kSegment];
    for (uint32_t next = 0; next < task.queries;) {
        QueryTile tile;
        uint32_t count = 0, query[kTileQueries];
        for (; next < task.queries && count < parts.queries; next++) {
            if (task.begin[next] >= task.end[next]) continue;
            tile.q[count] = task.q + next * task.q_stride;
            tile.begin[count] = task.begin[next];
            tile.end[count] = task.end[next];
            tile.p[count] = p[count];
            tile.out[count] = task.out + next * task.out_stride;
            query[count++] = next;
        }
        if (count) attend_tile(parts, task, tile, query, count);
    }
}

}  // namespace

// ---- AVX2, FMA, F16C: eight rows, or eight elements, a vector --------------------------------

VALAR_TARGET_BEGIN("avx2,fma,f16c")
namespace {
namespace avx2 {

VALAR_FORCE_INLINE __m256i load_bytes(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
VALAR_FORCE_INLINE __m256 load_halves(const void* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
VALAR_FORCE_INLINE __m256 load_small_ints(const void* at) {  // uint8
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
}
VALAR_FORCE_INLINE __m256i broadcast4(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

VALAR_FORCE_INLINE void prefetch(const std::byte* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// acc += u * s of four unsigned and signed bytes each: one instruction of AVX-VNNI, or of AVX-512,
// whose encoding differs. A function has one target and these kernels serve three: so it is written
// by hand.
enum class Vnni { none, vex, evex };
template <Vnni kVnni>
VALAR_FORCE_INLINE __m256i dot4(__m256i acc, __m256i u, __m256i s) {
#if defined(__GNUC__) || defined(__clang__)
    if constexpr (kVnni == Vnni::vex)
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    else __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    return acc;
#else
    return kVnni == Vnni::vex ? _mm256_dpbusd_avx_epi32(acc, u, s) : _mm256_dpbusd_epi32(acc, u, s);
#endif
}

struct Scales {  // of eight rows
    __m256 dw, m;
    __m256 sub[2];  // Q6_K
};

template <int I>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* head, const std::byte* at, int half) {
    constexpr PackedLayout L = packed_layouts[I];
    Scales out{};
    if constexpr (L.bits == 6) {
        out.dw = load_halves(head + 16 * half);
        for (int i = 0; i < 2; i++)
            out.sub[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 16 * i + 8 * half))));
    } else if constexpr (L.head_bytes != 0) {
        const __m256 m =
            _mm256_mul_ps(load_halves(head + 32 + 16 * half), load_small_ints(at + 16 + 8 * half));
        out.dw = _mm256_mul_ps(load_halves(head + 16 * half), load_small_ints(at + 8 * half));
        out.m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
    } else {
        out.dw = load_halves(at + 16 * half);
        if constexpr (L.minimum) out.m = load_halves(at + 32 + 16 * half);
    }
    return out;
}

// Unsigned codes of group g of eight rows.
template <int I>
VALAR_FORCE_INLINE __m256i load_group(const std::byte* codes, int g) {
    constexpr int bits = packed_layouts[I].bits, high = bits - 4;
    if constexpr (bits == 8) return load_bytes(codes + 64 * g);
    const __m256i pair = load_bytes(codes + g / 2 * 64);
    const __m256i low =
        _mm256_and_si256(g % 2 ? _mm256_srli_epi16(pair, 4) : pair, _mm256_set1_epi8(15));
    if constexpr (high == 0 || bits == 8) return low;
    const __m256i rest = load_bytes(codes + 256 + g * high / 8 * 64);
    const int at = g * high % 8;
    return _mm256_or_si256(low, _mm256_and_si256(at < 4 ? _mm256_slli_epi16(rest, 4 - at)
                                                        : _mm256_srli_epi16(rest, at - 4),
                                                 _mm256_set1_epi8(high == 1 ? 16 : 48)));
}

// total (of each plane and eight rows) += codes of group g times activations. Without VNNI products
// are added in 16 bits as long as they cannot overflow, in `part`: 8 groups of 4-bit codes, 4 of 5
// bits, 2 of 6 bits. 8-bit codes are two of 4 bits.
template <Vnni kVnni, int kBits>
VALAR_FORCE_INLINE void add_products(__m256i& total, __m256i (&part)[2], __m256i codes, __m256i x,
                                     int g) {
    if constexpr (kVnni != Vnni::none) {
        total = dot4<kVnni>(total, codes, x);
        return;
    }
    constexpr int kRun = kBits == 5 ? 4 : kBits == 6 ? 2 : 8;
    const __m256i low = _mm256_set1_epi8(15);
    VALAR_UNROLL for (int i = 0; i < (kBits == 8 ? 2 : 1); i++) {
        const __m256i four = i ? _mm256_srli_epi16(codes, 4) : codes;
        const __m256i p = _mm256_maddubs_epi16(kBits == 8 ? _mm256_and_si256(four, low) : codes, x);
        part[i] = g % kRun ? _mm256_add_epi16(part[i], p) : p;
        VALAR_IN_ORDER(part[i]);
        if (g % kRun != kRun - 1) continue;
        total = _mm256_add_epi32(total, _mm256_madd_epi16(part[i], _mm256_set1_epi16(i ? 16 : 1)));
        VALAR_IN_ORDER(total);
    }
}

// sums += two tiles times C planes, H times eight rows at a time: registers decide.
template <int I, Vnni kVnni, int C>
void dot_tiles(const TileStep& step) {
    constexpr PackedLayout L = packed_layouts[I];
    constexpr int kParts = L.bits == 6 ? 2 : 1;  // sums of 16 codes that have a scale each
    constexpr int H = L.bits == 4 || (L.bits != 6 && kVnni != Vnni::none) ? 2 : 1;
    constexpr size_t kLines = (packed_block_bytes(L) + 63) / 64;
    const ActivationBlock* a[C];
    VALAR_UNROLL for (int c = 0; c < C; c++) a[c] =
        reinterpret_cast<const ActivationBlock*>(step.columns[c]);
    size_t head = 0, at = 0, wait = step.phase;
    for (size_t b = 0; b < step.count; b++) {
        if constexpr (L.head_bytes != 0) {
            if (b % L.blocks == 0) {
                head = at;
                at += L.head_bytes;
            }
        }
        if (wait-- == 0) {
            wait = step.every - 1;
            VALAR_UNROLL for (size_t i = 0; i < 2 * kLines; i++)
                prefetch(step.tiles[i % 2] + at + step.ahead + i / 2 * 64);
        }
        for (int v = 0; v < 4; v += H) {  // of the tiles' 32 rows
            const std::byte* tile = step.tiles[v / 2];
            __m256i total[kParts][C][H], part[C][H][2];
            VALAR_UNROLL for (int c = 0; c < C; c++) {  // what the codes' bias adds, negated
                const int32_t* sum = a[c][b].sum;
                VALAR_UNROLL for (int p = 0; p < kParts; p++) {
                    VALAR_UNROLL for (int h = 0; h < H; h++) total[p][c][h] =
                        _mm256_set1_epi32(-L.bias * (kParts == 2 ? sum[p] : sum[0] + sum[1]));
                }
            }
            VALAR_UNROLL for (int g = 0; g < 8; g++) {
                __m256i codes[H];
                VALAR_UNROLL for (int h = 0; h < H; h++) codes[h] =
                    load_group<I>(tile + at + L.scale_bytes + 32 * (v % 2 + h), g);
                VALAR_UNROLL for (int c = 0; c < C; c++) {
                    const __m256i x = broadcast4(a[c][b].q + 4 * g);
                    VALAR_UNROLL for (int h = 0; h < H; h++) add_products<kVnni, L.bits>(
                        total[g / 4 * (kParts - 1)][c][h], part[c][h], codes[h], x, g);
                }
            }
            VALAR_UNROLL for (int h = 0; h < H; h++) {
                const Scales scales = load_scales<I>(tile + head, tile + at, v % 2 + h);
                VALAR_UNROLL for (int c = 0; c < C; c++) {
                    __m256 sum = _mm256_cvtepi32_ps(total[0][c][h]);
                    if constexpr (L.bits == 6)  // exact, being below 2^24
                        sum = _mm256_fmadd_ps(
                            sum, scales.sub[0],
                            _mm256_mul_ps(_mm256_cvtepi32_ps(total[1][c][h]), scales.sub[1]));
                    float* acc = &step.sums[c][0][8 * (v + h)];
                    sum = _mm256_fmadd_ps(sum, _mm256_mul_ps(scales.dw, _mm256_set1_ps(a[c][b].d)),
                                          _mm256_load_ps(acc));
                    if constexpr (L.minimum)
                        sum = _mm256_fmadd_ps(scales.m, _mm256_set1_ps(a[c][b].s), sum);
                    _mm256_store_ps(acc, sum);
                }
            }
        }
        at += packed_block_bytes(L);
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE __m256 load_floats(const std::byte* tile, size_t index) {
    if constexpr (kType == TensorType::f32)
        return _mm256_loadu_ps(reinterpret_cast<const float*>(tile) + index);
    if constexpr (kType == TensorType::f16) return load_halves(tile + 2 * index);
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * index))),
        16));
}

template <TensorType kType, int C>
void dot_floats(const TileStep& step) {
    constexpr int H = C > 2 ? 2 : 4;
    const float* x[C];
    VALAR_UNROLL for (int c = 0; c < C; c++) x[c] = reinterpret_cast<const float*>(step.columns[c]);
    for (int v = 0; v < 4; v += H) {
        __m256 acc[C][H];
        VALAR_UNROLL for (int i = 0; i < C * H; i++) acc[i / H][i % H] =
            _mm256_load_ps(&step.sums[i / H][0][8 * (v + i % H)]);
        const std::byte *low = step.tiles[v / 2], *high = step.tiles[1];
        for (size_t k = 0; k < step.count; k++) {
            __m256 w[H];
            VALAR_UNROLL for (int h = 0; h < H; h++) w[h] =
                load_floats<kType>(h < 2 ? low : high, 16 * k + (h % 2 ? 8 : 0));
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                const __m256 at_k = _mm256_broadcast_ss(x[c] + k);
                VALAR_UNROLL for (int h = 0; h < H; h++) acc[c][h] =
                    _mm256_fmadd_ps(w[h], at_k, acc[c][h]);
            }
        }
        VALAR_UNROLL for (int i = 0; i < C * H; i++)
            _mm256_store_ps(&step.sums[i / H][0][8 * (v + i % H)], acc[i / H][i % H]);
    }
}

template <int I, Vnni kVnni, int kMost = kVnni == Vnni::none ? 4 : 6>
constexpr TileKernels quantized = {{{1, dot_tiles<I, kVnni, 1>},
                                    {2, dot_tiles<I, kVnni, 2>},
                                    {4, dot_tiles<I, kVnni, 4>},
                                    {kMost, dot_tiles<I, kVnni, kMost>}}};
template <TensorType kType>
constexpr TileKernels floats = {{{1, dot_floats<kType, 1>},
                                 {2, dot_floats<kType, 2>},
                                 {4, dot_floats<kType, 4>},
                                 {6, dot_floats<kType, 6>}}};
template <Vnni V>
constexpr TileKernels tile_kernels[] = {  // in the order of packed_layouts
    quantized<0, V>,         quantized<1, V>,         quantized<2, V>, quantized<3, V>,
    quantized<4, V>,         quantized<5, V>,         quantized<6, V>, floats<TensorType::f32>,
    floats<TensorType::f16>, floats<TensorType::bf16>};

template <Vnni kVnni>
void matmul(const MatmulTask& task) {
    matmul_tiles(task, tile_kernels<kVnni>[find_layout(task.weights->type) - packed_layouts]);
}

// Nearest integers of x * factor as 32 bytes, their sums, and optionally what is left: x - d * h.
VALAR_FORCE_INLINE void quantize_plane(__m256 (&x)[4], float d, float inverse,
                                       ActivationBlock& out) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f), scale = _mm256_set1_ps(inverse),
                 step = _mm256_set1_ps(d);
    __m256i h[4], sum[2];
    VALAR_UNROLL for (int i = 0; i < 4; i++) {
        const __m256 shifted = _mm256_fmadd_ps(x[i], scale, magic);
        h[i] = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
        h[i] = _mm256_max_epi32(_mm256_min_epi32(h[i], _mm256_set1_epi32(127)),
                                _mm256_set1_epi32(-127));
        x[i] = _mm256_fnmadd_ps(step, _mm256_cvtepi32_ps(h[i]), x[i]);
    }
    VALAR_UNROLL for (int i = 0; i < 2; i++) sum[i] = _mm256_add_epi32(h[2 * i], h[2 * i + 1]);
    const __m256i pairs = _mm256_hadd_epi32(sum[0], sum[1]),
                  quads = _mm256_hadd_epi32(pairs, pairs);
    const __m128i sums =
        _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out.sum), sums);
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(h[0], h[1]), _mm256_packs_epi32(h[2], h[3]));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out.q),
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    out.d = d;
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

void quantize(const float* x, size_t n, uint32_t planes, ActivationBlock* out) {
    const size_t blocks = n / kActivationBlock;
    for (size_t b = 0; b < blocks; b++, x += kActivationBlock) {
        __m256 v[4];
        __m256i largest = _mm256_setzero_si256();
        VALAR_UNROLL for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]),
                                                                 _mm256_set1_epi32(0x7fffffff)));
        }
        __m128i four =
            _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        const float amax = _mm_cvtss_f32(_mm_castsi128_ps(four));
        if (!(amax >= 0x1p-100f && amax <= 0x1.fffffep127f)) {  // zero, or not finite: rare
            scalar::quantize_block(x, planes, blocks, out + b);
            continue;
        }
        const float d = amax / 127.0f, inverse = 127.0f / amax;
        quantize_plane(v, d, inverse, out[b]);
        if (planes > 1) quantize_plane(v, d / 254.0f, inverse * 254.0f, out[blocks + b]);
    }
}

VALAR_FORCE_INLINE float sum_of_lanes(__m256 low, __m256 high) {
    const __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    __m256 low = _mm256_setzero_ps(), high = low;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    alignas(32) float rest[16] = {};  // 0 * 0 adds nothing
    for (size_t j = i; j < n; j++) rest[j - i] = x[j];
    low = _mm256_fmadd_ps(_mm256_load_ps(rest), _mm256_load_ps(rest), low);
    high = _mm256_fmadd_ps(_mm256_load_ps(rest + 8), _mm256_load_ps(rest + 8), high);
    const __m128 mean = _mm_set_ss(sum_of_lanes(low, high) / static_cast<float>(n) + eps);
    const float factor = 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean));
    const __m256 scale = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale),
                                              _mm256_loadu_ps(weight + i)));
    for (; i < n; i++) y[i] = (x[i] * factor) * weight[i];
}

void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin) {
    const uint32_t pairs = n_rot / 2;
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim) {
        uint32_t i = 0;
        for (; !neox && i + 4 <= pairs; i += 4) {  // lanes a, b, a, b ..; a * c - t and a * s + t
            const __m256 v = _mm256_loadu_ps(x + 2 * i), turn = _mm256_loadu_ps(cos_sin + 2 * i);
            const __m256 t = _mm256_mul_ps(_mm256_movehdup_ps(v), _mm256_permute_ps(turn, 0xb1));
            _mm256_storeu_ps(x + 2 * i, _mm256_fmaddsub_ps(_mm256_moveldup_ps(v), turn, t));
        }
        for (; neox && i + 8 <= pairs; i += 8) {
            const __m256 first = _mm256_loadu_ps(cos_sin + 2 * i),
                         second = _mm256_loadu_ps(cos_sin + 2 * i + 8);
            const __m256 low = _mm256_permute2f128_ps(first, second, 0x20),
                         high = _mm256_permute2f128_ps(first, second, 0x31);
            const __m256 c = _mm256_shuffle_ps(low, high, 0x88),
                         s = _mm256_shuffle_ps(low, high, 0xdd);
            const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + pairs + i);
            _mm256_storeu_ps(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
            _mm256_storeu_ps(x + pairs + i, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)));
        }
        for (; i < pairs; i++)
            scalar::rotate(x[neox ? i : 2 * i], x[neox ? i + pairs : 2 * i + 1], cos_sin[2 * i],
                           cos_sin[2 * i + 1]);
    }
}

void scale(float* x, float factor, size_t n) {
    const __m256 f = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), f));
    for (; i < n; i++) x[i] *= factor;
}

void add(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

VALAR_FORCE_INLINE __m256 exp8(__m256 x) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);
    const __m256 v = _mm256_min_ps(_mm256_set1_ps(kExpMost), x);  // gives x where it is no number
    const __m256 shifted = _mm256_fmadd_ps(v, _mm256_set1_ps(kLog2e), magic);
    const __m256 k = _mm256_sub_ps(shifted, magic);
    __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2High), v);
    r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Low), r);
    __m256 p = _mm256_set1_ps(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--) p =
        _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp_coefficients[i]));
    const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(kExpLeast), _CMP_LT_OQ), p);
}

void silu_mul(float* gate, const float* up, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_loadu_ps(gate + i);
        const __m256 e = exp8(_mm256_xor_ps(x, _mm256_set1_ps(-0.0f)));
        const __m256 silu = _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
    for (; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group) {
    if (type == KvType::f32)
        return scalar::store_kv(type, k, v, head_dim, slot, key_group, value_group);
    uint16_t* keys = static_cast<uint16_t*>(key_group) + slot;
    uint16_t* values = static_cast<uint16_t*>(value_group) + size_t{slot} * head_dim;
    size_t e = 0;
    for (; e + 8 <= head_dim; e += 8) {
        uint16_t halves[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves),
                         _mm256_cvtps_ph(_mm256_loadu_ps(k + e), 0));
        for (size_t i = 0; i < 8; i++) keys[(e + i) * kKeyGroup] = halves[i];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + e),
                         _mm256_cvtps_ph(_mm256_loadu_ps(v + e), 0));
    }
    for (; e < head_dim; e++) {
        keys[e * kKeyGroup] = half_bits(k[e]);
        values[e] = half_bits(v[e]);
    }
}

template <bool kHalf>
VALAR_FORCE_INLINE __m256 load_kv(const void* group, size_t index) {
    if constexpr (kHalf) return load_halves(static_cast<const uint16_t*>(group) + index);
    return _mm256_loadu_ps(static_cast<const float*>(group) + index);
}

template <bool kHalf, uint32_t Q>
void score_tile(const AttentionTask& task, const QueryTile& tile, uint32_t first, uint32_t last) {
    for (uint32_t group = first / 16; group * 16 < last; group++) {
        const void* keys = task.keys[group];
        if (!keys) continue;  // between the ranges of two queries
        __m256 acc[Q][2];
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        for (size_t e = 0; e < task.head_dim; e++) {
            const __m256 low = load_kv<kHalf>(keys, 16 * e),
                         high = load_kv<kHalf>(keys, 16 * e + 8);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const __m256 q = _mm256_broadcast_ss(tile.q[i] + e);
                acc[i][0] = _mm256_fmadd_ps(q, low, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(q, high, acc[i][1]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            _mm256_store_ps(tile.p[i] + 16 * group, acc[i][0]);
            _mm256_store_ps(tile.p[i] + 16 * group + 8, acc[i][1]);
        }
    }
}

// Scores to weights. What nobody may see in a group that is seen becomes -infinity, so weight 0.
void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    const uint32_t first = begin / 16 * 16, last = (end + 15) / 16 * 16;
    for (uint32_t j = first; j < begin; j++) p[j] = hidden;
    for (uint32_t j = end; j < last; j++) p[j] = hidden;
    __m256 top = _mm256_load_ps(p + first);
    for (uint32_t j = first + 8; j < last; j += 8) top = _mm256_max_ps(top, _mm256_load_ps(p + j));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    *max = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1))) + 0.0f;
    const __m256 most = _mm256_set1_ps(*max);
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (uint32_t j = first; j < last; j += 16) {
        VALAR_UNROLL for (int i = 0; i < 2; i++) {
            const __m256 weight = exp8(_mm256_sub_ps(_mm256_load_ps(p + j + 8 * i), most));
            lanes[i] = _mm256_add_ps(lanes[i], weight);
            _mm256_store_ps(p + j + 8 * i, weight);
        }
    }
    *sum = sum_of_lanes(lanes[0], lanes[1]);
}

// out_e += p_j * v_j,e for e0 <= e < e0 + 8 W, first <= j < last, of Q queries from `query` on.
template <bool kHalf, uint32_t Q, uint32_t W>
VALAR_FORCE_INLINE void add_values(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                                   size_t e0, uint32_t first, uint32_t last) {
    __m256 acc[Q][W];
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) acc[i / W][i % W] =
        _mm256_loadu_ps(tile.out[query + i / W] + e0 + 8 * (i % W));
    for (uint32_t j = first; j < last; j++) {
        __m256 v[W];
        VALAR_UNROLL for (uint32_t w = 0; w < W; w++) v[w] =
            load_kv<kHalf>(task.values[j / 16], j % 16 * task.head_dim + e0 + 8 * w);
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            const __m256 p = _mm256_broadcast_ss(tile.p[query + i] + j);
            VALAR_UNROLL for (uint32_t w = 0; w < W; w++) acc[i][w] =
                _mm256_fmadd_ps(p, v[w], acc[i][w]);
        }
    }
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++)
        _mm256_storeu_ps(tile.out[query + i / W] + e0 + 8 * (i % W), acc[i / W][i % W]);
}

template <bool kHalf, uint32_t Q>
void add_value_range(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                     uint32_t first, uint32_t last) {
    if (first >= last) return;
    constexpr uint32_t W = Q > 2 ? 2 : 4;
    size_t e = 0;
    for (; e + 8 * W <= task.head_dim; e += 8 * W)
        add_values<kHalf, Q, W>(task, tile, query, e, first, last);
    for (; e + 8 <= task.head_dim; e += 8)
        add_values<kHalf, Q, 1>(task, tile, query, e, first, last);
    for (; e < task.head_dim; e++)
        for (uint32_t i = query; i < query + Q; i++)
            for (uint32_t j = first; j < last; j++)
                tile.out[i][e] = fma_once(
                    tile.p[i][j],
                    scalar::read_kv(task.kv_type, task.values[j / 16], j % 16 * task.head_dim + e),
                    tile.out[i][e]);
}

constexpr AttentionParts attention_parts = {
    4,
    {{score_tile<true, 1>, score_tile<true, 2>, score_tile<true, 3>, score_tile<true, 4>},
     {score_tile<false, 1>, score_tile<false, 2>, score_tile<false, 3>, score_tile<false, 4>}},
    weigh,
    {{add_value_range<true, 1>, add_value_range<true, 2>, add_value_range<true, 3>,
      add_value_range<true, 4>},
     {add_value_range<false, 1>, add_value_range<false, 2>, add_value_range<false, 3>,
      add_value_range<false, 4>}}};

void attention(const AttentionTask& task) {
    attend(attention_parts, task);
}

void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n) {
    const float most = m > *max ? m : *max;
    const __m256 weights = exp8(_mm256_setr_ps(*max - most, m - most, 0, 0, 0, 0, 0, 0));
    const __m256 old_weight = _mm256_broadcastss_ps(_mm256_castps256_ps128(weights)),
                 new_weight = _mm256_permute_ps(_mm256_permute2f128_ps(weights, weights, 0), 0x55);
    *max = most;
    _mm_store_ss(sum, _mm_fmadd_ss(_mm_set_ss(l), _mm256_castps256_ps128(new_weight),
                                   _mm_set_ss(*sum * _mm256_cvtss_f32(old_weight))));
    size_t e = 0;
    for (; e + 8 <= n; e += 8)
        _mm256_storeu_ps(out + e,
                         _mm256_fmadd_ps(_mm256_loadu_ps(o + e), new_weight,
                                         _mm256_mul_ps(_mm256_loadu_ps(out + e), old_weight)));
    for (; e < n; e++)
        out[e] =
            fma_once(o[e], _mm256_cvtss_f32(new_weight), out[e] * _mm256_cvtss_f32(old_weight));
}

constexpr Kernels kernels_with(const char* name, void (*product)(const MatmulTask&)) {
    return {name, quantize, product,  rms_norm,  rope,           scale,
            add,  silu_mul, store_kv, attention, attention_merge};
}
constexpr Kernels kernels = kernels_with("avx2", matmul<Vnni::none>);
constexpr Kernels vnni_kernels = kernels_with("avxvnni", matmul<Vnni::vex>);
#if defined(VALAR_EVEX_VNNI)  // for tests: the same on a CPU that knows only AVX-512's encoding
constexpr Kernels evex_kernels = kernels_with("avxvnni", matmul<Vnni::evex>);
#endif

}  // namespace avx2
}  // namespace
VALAR_TARGET_END

// ---- AVX-512 with VNNI: sixteen rows a vector; unsigned code times signed activation ----------

VALAR_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace {
namespace avx512 {

VALAR_FORCE_INLINE __m512i load_bytes(const void* at) { return _mm512_loadu_si512(at); }
VALAR_FORCE_INLINE __m512 load_halves(const void* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
VALAR_FORCE_INLINE void prefetch(const std::byte* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}
VALAR_FORCE_INLINE __m128i load_scale_bytes(const void* at) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
}
VALAR_FORCE_INLINE __m512 load_small_ints(const void* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_scale_bytes(at)));
}
VALAR_FORCE_INLINE __m512i broadcast4(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm512_set1_epi32(four);
}

struct Scales {
    __m512 dw, m;
    __m512 sub[2];  // Q6_K
};

template <int I>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* head, const std::byte* at) {
    constexpr PackedLayout L = packed_layouts[I];
    Scales out{};
    if constexpr (L.bits == 6) {
        out.dw = load_halves(head);
        for (int i = 0; i < 2; i++)
            out.sub[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_scale_bytes(at + 16 * i)));
    } else if constexpr (L.head_bytes != 0) {
        const __m512 m = _mm512_mul_ps(load_halves(head + 32), load_small_ints(at + 16));
        out.dw = _mm512_mul_ps(load_halves(head), load_small_ints(at));
        out.m = _mm512_xor_ps(m, _mm512_set1_ps(-0.0f));
    } else {
        out.dw = load_halves(at);
        if constexpr (L.minimum) out.m = load_halves(at + 32);
    }
    return out;
}

// Unsigned codes of group g.
template <int I>
VALAR_FORCE_INLINE __m512i load_group(const std::byte* codes, int g) {
    constexpr int bits = packed_layouts[I].bits, high = bits - 4;
    if constexpr (bits == 8) return load_bytes(codes + 64 * g);
    const __m512i pair = load_bytes(codes + g / 2 * 64);
    const __m512i low =
        _mm512_and_si512(g % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
    if constexpr (high == 0) return low;
    const __m512i rest = load_bytes(codes + 256 + g * high / 8 * 64);
    const int at = g * high % 8;
    const __m512i moved = at < 4 ? _mm512_slli_epi16(rest, static_cast<unsigned>(4 - at) & 7)
                                 : _mm512_srli_epi16(rest, static_cast<unsigned>(at - 4) & 7);
    // low | (moved & mask)
    return _mm512_ternarylogic_epi32(low, moved, _mm512_set1_epi8(high == 1 ? 16 : 48), 0xf8);
}

// sums += two tiles times C planes.
template <int I, int C>
void dot_tiles(const TileStep& step) {
    constexpr PackedLayout L = packed_layouts[I];
    constexpr int kParts = L.bits == 6 ? 2 : 1;  // sums of 16 codes that have a scale each
    constexpr size_t kLines = (packed_block_bytes(L) + 63) / 64;
    const ActivationBlock* a[C];
    __m512 acc[C][2];
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        a[c] = reinterpret_cast<const ActivationBlock*>(step.columns[c]);
        VALAR_UNROLL for (int t = 0; t < 2; t++) acc[c][t] = _mm512_load_ps(step.sums[c][t]);
    }
    const std::byte* tile[2] = {step.tiles[0], step.tiles[1]};
    size_t head = 0, at = 0, wait = step.phase;
    for (size_t b = 0; b < step.count; b++) {
        if constexpr (L.head_bytes != 0) {
            if (b % L.blocks == 0) {
                head = at;
                at += L.head_bytes;
            }
        }
        if (wait-- == 0) {
            wait = step.every - 1;
            VALAR_UNROLL for (size_t i = 0; i < 2 * kLines; i++)
                prefetch(tile[i % 2] + at + step.ahead + i / 2 * 64);
        }
        __m512i total[kParts][C][2];  // starts as what the codes' bias adds, negated
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const int32_t* sum = a[c][b].sum;
            VALAR_UNROLL for (int p = 0; p < kParts; p++) total[p][c][0] = total[p][c][1] =
                _mm512_set1_epi32(-L.bias * (kParts == 2 ? sum[p] : sum[0] + sum[1]));
        }
        VALAR_UNROLL for (int g = 0; g < 8; g++) {
            __m512i w[2];
            VALAR_UNROLL for (int t = 0; t < 2; t++) w[t] =
                load_group<I>(tile[t] + at + L.scale_bytes, g);
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                const __m512i x = broadcast4(a[c][b].q + 4 * g);
                VALAR_UNROLL for (int t = 0; t < 2; t++) {
                    __m512i& sum = total[g / 4 * (kParts - 1)][c][t];
                    sum = _mm512_dpbusd_epi32(sum, w[t], x);
                }
            }
        }
        VALAR_UNROLL for (int t = 0; t < 2; t++) {
            const Scales scales = load_scales<I>(tile[t] + head, tile[t] + at);
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                __m512 sum = _mm512_cvtepi32_ps(total[0][c][t]);
                if constexpr (L.bits == 6)  // exact, being below 2^24
                    sum = _mm512_fmadd_ps(
                        sum, scales.sub[0],
                        _mm512_mul_ps(_mm512_cvtepi32_ps(total[1][c][t]), scales.sub[1]));
                acc[c][t] = _mm512_fmadd_ps(
                    sum, _mm512_mul_ps(scales.dw, _mm512_set1_ps(a[c][b].d)), acc[c][t]);
                if constexpr (L.minimum)
                    acc[c][t] = _mm512_fmadd_ps(scales.m, _mm512_set1_ps(a[c][b].s), acc[c][t]);
            }
        }
        at += packed_block_bytes(L);
    }
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        VALAR_UNROLL for (int t = 0; t < 2; t++) _mm512_store_ps(step.sums[c][t], acc[c][t]);
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE __m512 load_floats(const std::byte* tile, size_t index) {
    if constexpr (kType == TensorType::f32) return _mm512_loadu_ps(tile + 4 * index);
    if constexpr (kType == TensorType::f16) return load_halves(tile + 2 * index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 2 * index))),
        16));
}

template <TensorType kType, int C>
void dot_floats(const TileStep& step) {
    const float* x[C];
    __m512 acc[C][2];
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        x[c] = reinterpret_cast<const float*>(step.columns[c]);
        VALAR_UNROLL for (int t = 0; t < 2; t++) acc[c][t] = _mm512_load_ps(step.sums[c][t]);
    }
    const std::byte *low = step.tiles[0], *high = step.tiles[1];
    for (size_t k = 0; k < step.count; k++) {
        const __m512 w[2] = {load_floats<kType>(low, 16 * k), load_floats<kType>(high, 16 * k)};
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const __m512 v = _mm512_set1_ps(x[c][k]);
            VALAR_UNROLL for (int t = 0; t < 2; t++) acc[c][t] =
                _mm512_fmadd_ps(w[t], v, acc[c][t]);
        }
    }
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        VALAR_UNROLL for (int t = 0; t < 2; t++) _mm512_store_ps(step.sums[c][t], acc[c][t]);
    }
}

template <int I, int kMost = packed_layouts[I].bits == 6 ? 4 : 6>  // as registers allow
constexpr TileKernels quantized = {{{1, dot_tiles<I, 1>},
                                    {2, dot_tiles<I, 2>},
                                    {4, dot_tiles<I, 4>},
                                    {kMost, dot_tiles<I, kMost>}}};
template <TensorType kType>
constexpr TileKernels floats = {{{1, dot_floats<kType, 1>},
                                 {2, dot_floats<kType, 2>},
                                 {4, dot_floats<kType, 4>},
                                 {6, dot_floats<kType, 6>}}};
constexpr TileKernels tile_kernels[] = {  // in the order of packed_layouts
    quantized<0>,
    quantized<1>,
    quantized<2>,
    quantized<3>,
    quantized<4>,
    quantized<5>,
    quantized<6>,
    floats<TensorType::f32>,
    floats<TensorType::f16>,
    floats<TensorType::bf16>};

void matmul(const MatmulTask& task) {
    matmul_tiles(task, tile_kernels[find_layout(task.weights->type) - packed_layouts]);
}

// ---- Attention: lanes are keys for scores, elements of a head for values ----------------------

template <bool kHalf>
VALAR_FORCE_INLINE __m512 load_kv(const void* group, size_t index) {
    if constexpr (kHalf) return load_halves(static_cast<const uint16_t*>(group) + index);
    return _mm512_loadu_ps(static_cast<const float*>(group) + index);
}
template <bool kHalf>
VALAR_FORCE_INLINE __m512 load_some_kv(__mmask16 some, const void* group, size_t index) {
    if constexpr (kHalf)
        return _mm512_cvtph_ps(
            _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(group) + index));
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(group) + index);
}

// Several groups of keys at once: a sum is a chain, and one chain leaves the multiplier idle. Where
// a group is missing at the edge of the range, another one stands in; nobody looks at its scores.
template <bool kHalf, uint32_t Q>
void score_tile(const AttentionTask& task, const QueryTile& tile, uint32_t first, uint32_t last) {
    constexpr uint32_t G = Q > 4 ? 2 : 4;
    for (uint32_t group = first / 16 / G * G; group * 16 < last; group += G) {
        const void *keys[G], *any = nullptr;
        for (uint32_t g = 0; g < G; g++) {
            const uint32_t at = (group + g) * 16;
            keys[g] = at + 16 > first && at < last ? task.keys[group + g] : nullptr;
            if (keys[g]) any = keys[g];
        }
        if (!any) continue;  // between the ranges of two queries
        for (uint32_t g = 0; g < G; g++)
            if (!keys[g]) keys[g] = any;
        __m512 acc[Q][G];
        VALAR_UNROLL for (uint32_t i = 0; i < Q * G; i++) acc[i / G][i % G] = _mm512_setzero_ps();
        for (size_t e = 0; e < task.head_dim; e++) {
            __m512 k[G];
            VALAR_UNROLL for (uint32_t g = 0; g < G; g++) k[g] = load_kv<kHalf>(keys[g], 16 * e);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const __m512 q = _mm512_set1_ps(tile.q[i][e]);
                VALAR_UNROLL for (uint32_t g = 0; g < G; g++) acc[i][g] =
                    _mm512_fmadd_ps(q, k[g], acc[i][g]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q * G; i++)
            _mm512_store_ps(tile.p[i / G] + 16 * (group + i % G), acc[i / G][i % G]);
    }
}

VALAR_FORCE_INLINE __m512 exp16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);
    const __m512 v = _mm512_min_ps(_mm512_set1_ps(kExpMost), x);  // gives x where it is no number
    const __m512 k = _mm512_sub_ps(_mm512_fmadd_ps(v, _mm512_set1_ps(kLog2e), magic), magic);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2High), v);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2Low), r);
    __m512 p = _mm512_set1_ps(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--) p =
        _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp_coefficients[i]));
    const __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpLeast), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(visible, p, k);
}

// Those of the 16 positions from `at` on that begin .. end - 1 holds; it holds some.
VALAR_FORCE_INLINE __mmask16 visible_lanes(uint32_t at, uint32_t begin, uint32_t end) {
    const uint32_t from = begin > at ? begin - at : 0, count = end - at < 16 ? end - at : 16;
    return static_cast<__mmask16>((0xffffu << from) & (0xffffu >> (16 - count)));
}

// GCC 12 warns of its own header where a lower half is taken by a cast.
template <int kHalf>
VALAR_FORCE_INLINE __m256 half_of(__m512 v) {
    return _mm512_maskz_extractf32x8_ps(0xff, v, kHalf);
}

// Scores to weights; what nobody may see in a group that is seen gets weight 0.
void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    const uint32_t first = begin / 16 * 16;
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (uint32_t j = first; j < end; j += 16)  // the second operand where one is no number
        top = _mm512_mask_max_ps(top, visible_lanes(j, begin, end), _mm512_load_ps(p + j), top);
    const __m256 eight = _mm256_max_ps(half_of<0>(top), half_of<1>(top));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    *max = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1))) + 0.0f;
    const __m512 most = _mm512_set1_ps(*max);
    __m512 lanes = _mm512_setzero_ps();
    for (uint32_t j = first; j < end; j += 16) {
        const __m512 weight = _mm512_maskz_mov_ps(
            visible_lanes(j, begin, end), exp16(_mm512_sub_ps(_mm512_load_ps(p + j), most)));
        lanes = _mm512_add_ps(lanes, weight);
        _mm512_store_ps(p + j, weight);
    }
    *sum = avx2::sum_of_lanes(half_of<0>(lanes), half_of<1>(lanes));
}

// out_e += p_j * v_j,e for W vectors from e0 on, first <= j < last, of Q queries from `query` on;
// of a single vector only `some`.
template <bool kHalf, uint32_t Q, uint32_t W>
VALAR_FORCE_INLINE void add_values(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                                   size_t e0, __mmask16 some, uint32_t first, uint32_t last) {
    __m512 acc[Q][W];
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) {
        const float* out = tile.out[query + i / W] + e0 + 16 * (i % W);
        acc[i / W][i % W] = W > 1 ? _mm512_loadu_ps(out) : _mm512_maskz_loadu_ps(some, out);
    }
    for (uint32_t j = first; j < last; j++) {
        const void* group = task.values[j / 16];
        const size_t at = j % 16 * size_t{task.head_dim} + e0;
        __m512 v[W];
        VALAR_UNROLL for (uint32_t w = 0; w < W; w++) v[w] =
            W > 1 ? load_kv<kHalf>(group, at + 16 * w) : load_some_kv<kHalf>(some, group, at);
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            const __m512 p = _mm512_set1_ps(tile.p[query + i][j]);
            VALAR_UNROLL for (uint32_t w = 0; w < W; w++) acc[i][w] =
                _mm512_fmadd_ps(p, v[w], acc[i][w]);
        }
    }
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) {
        float* out = tile.out[query + i / W] + e0 + 16 * (i % W);
        _mm512_mask_storeu_ps(out, W > 1 ? __mmask16{0xffff} : some, acc[i / W][i % W]);
    }
}

template <bool kHalf, uint32_t Q>
void add_value_range(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                     uint32_t first, uint32_t last) {
    if (first >= last) return;
    constexpr uint32_t W = Q > 4 ? 2 : 4;
    uint32_t e = 0;
    for (; e + 16 * W <= task.head_dim; e += 16 * W)
        add_values<kHalf, Q, W>(task, tile, query, e, 0xffff, first, last);
    for (; e < task.head_dim; e += 16)
        add_values<kHalf, Q, 1>(task, tile, query, e, visible_lanes(e, 0, task.head_dim), first,
                                last);
}

#define VALAR_EACH_TILE(part, half)                                                               \
    {                                                                                             \
        part<half, 1>, part<half, 2>, part<half, 3>, part<half, 4>, part<half, 5>, part<half, 6>, \
            part<half, 7>, part<half, 8>                                                          \
    }
constexpr AttentionParts attention_parts = {
    kTileQueries,
    {VALAR_EACH_TILE(score_tile, true), VALAR_EACH_TILE(score_tile, false)},
    weigh,
    {VALAR_EACH_TILE(add_value_range, true), VALAR_EACH_TILE(add_value_range, false)}};
#undef VALAR_EACH_TILE

void attention(const AttentionTask& task) {
    attend(attention_parts, task);
}

constexpr Kernels kernels = {
    "avx512",  avx2::quantize, matmul,         avx2::rms_norm, avx2::rope,           avx2::scale,
    avx2::add, avx2::silu_mul, avx2::store_kv, attention,      avx2::attention_merge};

}  // namespace avx512
}  // namespace
VALAR_TARGET_END

#endif  // VALAR_X86_KERNELS

// ---- Vectors of 128 bits: NEON, WASM SIMD128 -------------------------------------------------
//
// Four rows, or four elements, a vector. What the instruction sets differ in comes first; the
// kernels after it are written once. For integer products an instruction set brings a class
// with Operands<C> (a block of C planes as its instructions want it), multiply (part += products of
// four rows with C planes), dot_tile (dot_blocks, compiled for that instruction set) and Narrow
// (the class for one and two columns).

#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(VALAR_NO_SIMD)
#define VALAR_NEON_KERNELS 1
#else
#define VALAR_NEON_KERNELS 0
#endif
#if defined(__wasm_simd128__) && !defined(VALAR_NO_SIMD)
#define VALAR_WASM_KERNELS 1
#else
#define VALAR_WASM_KERNELS 0
#endif

#if VALAR_NEON_KERNELS || VALAR_WASM_KERNELS
namespace {
namespace lanes4 {

// clang-format off
#if VALAR_NEON_KERNELS
using F4 = float32x4_t;
using I4 = int32x4_t;
using B16 = int8x16_t;

VALAR_FORCE_INLINE F4 load(const float* at) { return vld1q_f32(at); }
VALAR_FORCE_INLINE void store(float* at, F4 x) { vst1q_f32(at, x); }
VALAR_FORCE_INLINE F4 splat(float x) { return vdupq_n_f32(x); }
VALAR_FORCE_INLINE F4 add(F4 a, F4 b) { return vaddq_f32(a, b); }
VALAR_FORCE_INLINE F4 sub(F4 a, F4 b) { return vsubq_f32(a, b); }
VALAR_FORCE_INLINE F4 mul(F4 a, F4 b) { return vmulq_f32(a, b); }
VALAR_FORCE_INLINE F4 div(F4 a, F4 b) { return vdivq_f32(a, b); }
VALAR_FORCE_INLINE F4 fma(F4 a, F4 b, F4 c) { return vfmaq_f32(c, a, b); }
VALAR_FORCE_INLINE F4 negate(F4 x) { return vnegq_f32(x); }
VALAR_FORCE_INLINE F4 greater_of(F4 a, F4 b) { return vmaxnmq_f32(a, b); }  // a number, if any
VALAR_FORCE_INLINE F4 at_most(F4 x, F4 limit) { return vminq_f32(x, limit); }  // keeps no-numbers
VALAR_FORCE_INLINE F4 zero_where_less(F4 x, F4 a, F4 b) {  // x, but 0 where a < b
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(a, b)));
}
VALAR_FORCE_INLINE F4 even_lanes(F4 a, F4 b) { return vuzp1q_f32(a, b); }
VALAR_FORCE_INLINE F4 odd_lanes(F4 a, F4 b) { return vuzp2q_f32(a, b); }
VALAR_FORCE_INLINE F4 zip_low(F4 a, F4 b) { return vzip1q_f32(a, b); }
VALAR_FORCE_INLINE F4 zip_high(F4 a, F4 b) { return vzip2q_f32(a, b); }

VALAR_FORCE_INLINE I4 int_splat(int32_t x) { return vdupq_n_s32(x); }
VALAR_FORCE_INLINE I4 int_add(I4 a, I4 b) { return vaddq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_mul(I4 a, I4 b) { return vmulq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_min(I4 a, I4 b) { return vminq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_max(I4 a, I4 b) { return vmaxq_s32(a, b); }
VALAR_FORCE_INLINE F4 to_float(I4 x) { return vcvtq_f32_s32(x); }
VALAR_FORCE_INLINE I4 magnitude_bits(F4 x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
VALAR_FORCE_INLINE F4 power_of_two(I4 k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
}
// Nearest integers of exact products below 2^22.
VALAR_FORCE_INLINE I4 nearest_product(F4 a, F4 b) {
    const F4 magic = vdupq_n_f32(0x1.8p23f);
    return vsubq_s32(vreinterpretq_s32_f32(vfmaq_f32(magic, a, b)), vreinterpretq_s32_f32(magic));
}
VALAR_FORCE_INLINE F4 load_halves(const void* at) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(at))));
}
VALAR_FORCE_INLINE void store_halves(uint16_t* at, F4 x) {
    vst1_u16(at, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
VALAR_FORCE_INLINE F4 load_bfloats(const void* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(at)), 16));
}
VALAR_FORCE_INLINE I4 load_signed_bytes(const void* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

VALAR_FORCE_INLINE B16 load_bytes(const void* at) {
    return vld1q_s8(static_cast<const int8_t*>(at));
}
VALAR_FORCE_INLINE void store_bytes(void* at, B16 x) { vst1q_s8(static_cast<int8_t*>(at), x); }
VALAR_FORCE_INLINE B16 byte_splat(int x) { return vdupq_n_s8(static_cast<int8_t>(x)); }
VALAR_FORCE_INLINE B16 byte_sub(B16 a, B16 b) { return vsubq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_and(B16 a, B16 b) { return vandq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_or(B16 a, B16 b) { return vorrq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_xor(B16 a, B16 b) { return veorq_s8(a, b); }
template <int kShift>  // to the left, or right where negative, without sign
VALAR_FORCE_INLINE B16 byte_shift(B16 x) {
    const uint8x16_t bits = vreinterpretq_u8_s8(x);
    if constexpr (kShift > 0) return vreinterpretq_s8_u8(vshlq_n_u8(bits, kShift));
    else if constexpr (kShift < 0) return vreinterpretq_s8_u8(vshrq_n_u8(bits, -kShift));
    else return x;
}
#endif  // VALAR_NEON_KERNELS

#if VALAR_WASM_KERNELS
using F4 = v128_t;
using I4 = v128_t;
using B16 = v128_t;

VALAR_FORCE_INLINE F4 load(const float* at) { return wasm_v128_load(at); }
VALAR_FORCE_INLINE void store(float* at, F4 x) { wasm_v128_store(at, x); }
VALAR_FORCE_INLINE F4 splat(float x) { return wasm_f32x4_splat(x); }
VALAR_FORCE_INLINE F4 add(F4 a, F4 b) { return wasm_f32x4_add(a, b); }
VALAR_FORCE_INLINE F4 sub(F4 a, F4 b) { return wasm_f32x4_sub(a, b); }
VALAR_FORCE_INLINE F4 mul(F4 a, F4 b) { return wasm_f32x4_mul(a, b); }
VALAR_FORCE_INLINE F4 div(F4 a, F4 b) { return wasm_f32x4_div(a, b); }
VALAR_FORCE_INLINE F4 negate(F4 x) { return wasm_f32x4_neg(x); }
VALAR_FORCE_INLINE F4 greater_of(F4 a, F4 b) { return wasm_f32x4_pmax(a, b); }
VALAR_FORCE_INLINE F4 at_most(F4 x, F4 limit) { return wasm_f32x4_pmin(x, limit); }
VALAR_FORCE_INLINE F4 zero_where_less(F4 x, F4 a, F4 b) {
    return wasm_v128_andnot(x, wasm_f32x4_lt(a, b));
}
VALAR_FORCE_INLINE F4 even_lanes(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 0, 2, 4, 6); }
VALAR_FORCE_INLINE F4 odd_lanes(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 1, 3, 5, 7); }
VALAR_FORCE_INLINE F4 zip_low(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 0, 4, 1, 5); }
VALAR_FORCE_INLINE F4 zip_high(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 2, 6, 3, 7); }

VALAR_FORCE_INLINE v128_t low_doubles(F4 x) { return wasm_f64x2_promote_low_f32x4(x); }
VALAR_FORCE_INLINE v128_t high_doubles(F4 x) {
    return wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(x, x, 2, 3, 2, 3));
}
inline __attribute__((noinline)) F4 fma_by_lane(F4 a, F4 b, F4 c) {
    float x[4], y[4], z[4];
    store(x, a);
    store(y, b);
    store(z, c);
    for (int i = 0; i < 4; i++) z[i] = emulated_fma(x[i], y[i], z[i]);
    return load(z);
}
// There is no fma. Products are exact in double, and a sum rounded to double rounds to the same
// float as the exact one does, unless it lies midway between two floats or where floats are
// denormal.
VALAR_FORCE_INLINE v128_t rounds_twice(v128_t sum) {
    const v128_t middle = wasm_i64x2_eq(wasm_v128_and(sum, wasm_i64x2_splat(0x1fffffff)),
                                        wasm_i64x2_splat(0x10000000));
    const v128_t tiny = wasm_f64x2_lt(wasm_f64x2_abs(sum), wasm_f64x2_splat(0x1p-126));
    return wasm_v128_or(middle, wasm_v128_and(tiny, wasm_f64x2_ne(sum, wasm_f64x2_splat(0))));
}
VALAR_FORCE_INLINE F4 fma(F4 a, F4 b, F4 c) {
    const v128_t low =
        wasm_f64x2_add(wasm_f64x2_mul(low_doubles(a), low_doubles(b)), low_doubles(c));
    const v128_t high =
        wasm_f64x2_add(wasm_f64x2_mul(high_doubles(a), high_doubles(b)), high_doubles(c));
    if (wasm_v128_any_true(wasm_v128_or(rounds_twice(low), rounds_twice(high))))
        return fma_by_lane(a, b, c);
    return wasm_i32x4_shuffle(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high),
                              0, 1, 4, 5);
}

VALAR_FORCE_INLINE I4 int_splat(int32_t x) { return wasm_i32x4_splat(x); }
VALAR_FORCE_INLINE I4 int_add(I4 a, I4 b) { return wasm_i32x4_add(a, b); }
VALAR_FORCE_INLINE I4 int_mul(I4 a, I4 b) { return wasm_i32x4_mul(a, b); }
VALAR_FORCE_INLINE I4 int_min(I4 a, I4 b) { return wasm_i32x4_min(a, b); }
VALAR_FORCE_INLINE I4 int_max(I4 a, I4 b) { return wasm_i32x4_max(a, b); }
VALAR_FORCE_INLINE F4 to_float(I4 x) { return wasm_f32x4_convert_i32x4(x); }
VALAR_FORCE_INLINE I4 magnitude_bits(F4 x) { return wasm_f32x4_abs(x); }
VALAR_FORCE_INLINE F4 power_of_two(I4 k) {
    return wasm_i32x4_shl(wasm_i32x4_add(k, wasm_i32x4_splat(127)), 23);
}
VALAR_FORCE_INLINE I4 nearest_product(F4 a, F4 b) {
    const v128_t magic = wasm_f64x2_splat(0x1.8p52);
    return wasm_i32x4_shuffle(
        wasm_f64x2_add(wasm_f64x2_mul(low_doubles(a), low_doubles(b)), magic),
        wasm_f64x2_add(wasm_f64x2_mul(high_doubles(a), high_doubles(b)), magic), 0, 2, 4, 6);
}
VALAR_FORCE_INLINE F4 load_halves(const void* at) {
    const v128_t half = wasm_u32x4_load16x4(at);
    const v128_t size = wasm_v128_and(half, wasm_i32x4_splat(0x7fff));
    const v128_t sign = wasm_i32x4_shl(wasm_v128_xor(half, size), 16);
    const v128_t value = wasm_f32x4_mul(wasm_i32x4_shl(size, 13), wasm_f32x4_splat(0x1p112f));
    const v128_t large = wasm_v128_and(wasm_i32x4_gt(size, wasm_i32x4_splat(0x7bff)),
                                       wasm_i32x4_splat(0x7f800000));
    return wasm_v128_or(wasm_v128_or(value, large), sign);
}
VALAR_FORCE_INLINE void store_halves(uint16_t* at, F4 x) {
    float lanes[4];
    store(lanes, x);
    for (int i = 0; i < 4; i++) at[i] = half_bits(lanes[i]);
}
VALAR_FORCE_INLINE F4 load_bfloats(const void* at) {
    return wasm_i32x4_shl(wasm_u32x4_load16x4(at), 16);
}
VALAR_FORCE_INLINE I4 load_signed_bytes(const void* at) {
    return wasm_i32x4_extend_low_i16x8(wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(at)));
}

VALAR_FORCE_INLINE B16 load_bytes(const void* at) { return wasm_v128_load(at); }
VALAR_FORCE_INLINE void store_bytes(void* at, B16 x) { wasm_v128_store(at, x); }
VALAR_FORCE_INLINE B16 byte_splat(int x) { return wasm_i8x16_splat(static_cast<int8_t>(x)); }
VALAR_FORCE_INLINE B16 byte_sub(B16 a, B16 b) { return wasm_i8x16_sub(a, b); }
VALAR_FORCE_INLINE B16 bit_and(B16 a, B16 b) { return wasm_v128_and(a, b); }
VALAR_FORCE_INLINE B16 bit_or(B16 a, B16 b) { return wasm_v128_or(a, b); }
VALAR_FORCE_INLINE B16 bit_xor(B16 a, B16 b) { return wasm_v128_xor(a, b); }
template <int kShift>
VALAR_FORCE_INLINE B16 byte_shift(B16 x) {
    if constexpr (kShift > 0) return wasm_i8x16_shl(x, kShift);
    else if constexpr (kShift < 0) return wasm_u8x16_shr(x, -kShift);
    else return x;
}
#endif  // VALAR_WASM_KERNELS
// clang-format on

// Scales of four rows (definition, 2).
struct Scales {
    F4 dw, m;
    I4 sub[2];  // Q6_K
};

template <int I>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* head, const std::byte* at, size_t v) {
    constexpr PackedLayout L = packed_layouts[I];
    Scales out{};
    if constexpr (L.bits == 6) {
        out.dw = load_halves(head + 8 * v);
        for (size_t i = 0; i < 2; i++) out.sub[i] = load_signed_bytes(at + 16 * i + 4 * v);
    } else if constexpr (L.head_bytes != 0) {  // six bits: signed or not
        out.dw = mul(load_halves(head + 8 * v), to_float(load_signed_bytes(at + 4 * v)));
        out.m = negate(
            mul(load_halves(head + 32 + 8 * v), to_float(load_signed_bytes(at + 16 + 4 * v))));
    } else {
        out.dw = load_halves(at + 8 * v);
        if constexpr (L.minimum) out.m = load_halves(at + 32 + 8 * v);
    }
    return out;
}

// Codes of group G of four rows as signed bytes; those of 8 bits without their bias.
template <int I, int G>
VALAR_FORCE_INLINE B16 load_codes4(const std::byte* codes) {
    constexpr int bits = packed_layouts[I].bits, high = bits - 4;
    if constexpr (bits == 8) return bit_xor(load_bytes(codes + 64 * G), byte_splat(-128));
    else {
        const B16 pair = load_bytes(codes + G / 2 * 64);
        const B16 low = G % 2 ? byte_shift<-4>(pair) : bit_and(pair, byte_splat(15));
        if constexpr (high == 0) return low;
        else {
            const B16 rest =
                byte_shift<4 - G * high % 8>(load_bytes(codes + 256 + G * high / 8 * 64));
            return bit_or(low, bit_and(rest, byte_splat(high == 1 ? 16 : 48)));
        }
    }
}

// A tile whose blocks were unpacked for many columns: 512 weights (bias taken out), a byte each in
// the order of 8-bit codes; 16 dw; 16 m, or 16 + 16 sub-scales as integers.
constexpr size_t kPanelBytes = 704;
constexpr size_t kPanelBlocks = 24;

template <int I, int G = 0>
VALAR_FORCE_INLINE void fill_codes(const std::byte* codes, std::byte* panel) {
    constexpr int bias = packed_layouts[I].bits == 8 ? 0 : packed_layouts[I].bias;
    store_bytes(panel + 64 * G, byte_sub(load_codes4<I, G>(codes), byte_splat(bias)));
    if constexpr (G < 7) fill_codes<I, G + 1>(codes, panel);
}

template <int I>
void fill_panel(const std::byte* tile, size_t blocks, std::byte* panel) {
    constexpr PackedLayout L = packed_layouts[I];
    const std::byte *head = tile, *at = tile;
    for (size_t b = 0; b < blocks; b++, at += packed_block_bytes(L), panel += kPanelBytes) {
        if (b % L.blocks == 0) {
            head = at;
            at += L.head_bytes;
        }
        for (size_t v = 0; v < 4; v++) {
            fill_codes<I>(at + L.scale_bytes + 16 * v, panel + 16 * v);
            const Scales s = load_scales<I>(head, at, v);
            store(reinterpret_cast<float*>(panel + 512 + 16 * v), s.dw);
            if constexpr (L.minimum) store(reinterpret_cast<float*>(panel + 576 + 16 * v), s.m);
            if constexpr (L.bits == 6)
                for (size_t i = 0; i < 2; i++)
                    std::memcpy(panel + 576 + 64 * i + 16 * v, &s.sub[i], 16);
        }
    }
}

template <int I>
VALAR_FORCE_INLINE Scales panel_scales(const std::byte* at, size_t v) {
    Scales out{};
    out.dw = load(reinterpret_cast<const float*>(at + 512 + 16 * v));
    if constexpr (packed_layouts[I].minimum)
        out.m = load(reinterpret_cast<const float*>(at + 576 + 16 * v));
    if constexpr (packed_layouts[I].bits == 6)
        for (size_t i = 0; i < 2; i++) std::memcpy(&out.sub[i], at + 576 + 64 * i + 16 * v, 16);
    return out;
}

// Signed weights or codes of group G, from a panel or the packed tile.
template <int I, bool P, int G>
VALAR_FORCE_INLINE B16 load_group(const std::byte* codes) {
    if constexpr (P) return load_bytes(codes + 64 * G);
    else return load_codes4<I, G>(codes);
}

// sums (C, 16) += tile (16 rows) x C planes, block after block. P: the tile is a panel. K: the
// products; `part` has the sums of columns 0..15 and 16..31 apart where a type or latency asks.
template <int I, int C>
constexpr int sum_parts = packed_layouts[I].bits == 6 || C <= 4 ? 2 : 1;

template <class K, int I, bool P, int C>
VALAR_FORCE_INLINE void dot_blocks(const std::byte* tile, size_t blocks,
                                   const ActivationBlock* const* planes, float* sums) {
    constexpr PackedLayout L = packed_layouts[I];
    constexpr int bias = P || L.bits == 8 ? 0 : L.bias, parts = sum_parts<I, C>;
    const std::byte *head = tile, *at = tile;
    for (size_t b = 0; b < blocks; b++, at += P ? kPanelBytes : packed_block_bytes(L)) {
        if (!P && b % L.blocks == 0) {
            head = at;
            at += L.head_bytes;
        }
        const ActivationBlock* a[C];
        VALAR_UNROLL for (int c = 0; c < C; c++) a[c] = planes[c] + b;
        const typename K::template Operands<C> x(a);
        for (size_t v = 0; v < 4; v++) {
            I4 part[parts][C];  // starts as what the codes' bias adds, negated
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                VALAR_UNROLL for (int p = 0; p < parts; p++) part[p][c] =
                    int_splat(-bias * (parts == 2 ? a[c]->sum[p] : a[c]->sum[0] + a[c]->sum[1]));
            }
            K::template multiply<I, P, C>(x, at + (P ? 0 : L.scale_bytes) + 16 * v, part);
            Scales s;
            if constexpr (P) s = panel_scales<I>(at, v);
            else s = load_scales<I>(head, at, v);
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                float* sum = sums + 16 * c + 4 * v;
                I4 exact = part[0][c];
                if constexpr (L.bits == 6)
                    exact = int_add(int_mul(exact, s.sub[0]), int_mul(part[1][c], s.sub[1]));
                else if constexpr (parts == 2) exact = int_add(exact, part[1][c]);
                F4 acc = fma(to_float(exact), mul(s.dw, splat(a[c]->d)), load(sum));
                if constexpr (L.minimum) acc = fma(s.m, splat(a[c]->s), acc);
                store(sum, acc);
            }
        }
    }
}

using TileDot = void (*)(const std::byte* tile, size_t blocks, const ActivationBlock* const* planes,
                         float* sums);
struct QuantKernels {
    TileDot dot1, dot2;  // from the packed tile
    void (*fill)(const std::byte* tile, size_t blocks, std::byte* panel);
    TileDot dot4, dot8;  // from the panel that `fill` made
};

inline void write_sums(const MatmulTask& task, uint32_t tile, uint32_t first, uint32_t count,
                       float (*sums)[16], uint32_t planes) {
    const uint32_t row = tile * kTileRows, left = task.weights->rows - row;
    for (uint32_t v = 0; v < count; v += planes) {
        float* y = task.y + (first + v) / planes * task.y_stride + row;
        for (uint32_t r = 0; r < kTileRows && r < left; r++)
            y[r] = planes == 2 ? sums[v][r] + sums[v + 1][r] : sums[v][r];
    }
}

constexpr uint32_t kAccColumns = 64;  // planes whose sums a tile keeps

inline void matmul_quantized(const MatmulTask& task, const QuantKernels& k) {
    const PackedMatrix& w = *task.weights;
    const PackedLayout& layout = *find_layout(w.type);
    const size_t blocks = w.cols / kActivationBlock;
    const uint32_t all = task.columns * task.planes;
    alignas(16) std::byte panel[kPanelBlocks * kPanelBytes];
    alignas(16) float sums[kAccColumns][16];
    for (uint32_t t = task.first_tile; t < task.last_tile; t++) {
        const std::byte* tile = packed_tile(w, t);
        for (uint32_t first = 0; first < all; first += kAccColumns) {
            const uint32_t count = all - first < kAccColumns ? all - first : kAccColumns;
            const ActivationBlock* base = task.blocks + first * blocks;
            std::memset(sums, 0, sizeof sums);
            const ActivationBlock* planes[8] = {base, base + blocks};
            if (count <= 2) (count == 1 ? k.dot1 : k.dot2)(tile, blocks, planes, sums[0]);
            for (size_t b = 0; count > 2 && b < blocks; b += kPanelBlocks) {
                const size_t n = blocks - b < kPanelBlocks ? blocks - b : kPanelBlocks;
                k.fill(tile + b / layout.blocks * packed_super_bytes(layout), n, panel);
                for (uint32_t v = 0; v < count; v += 8) {
                    for (uint32_t c = 0; c < 8; c++)  // the last one again to the end
                        planes[c] = base + b + (v + c < count ? v + c : count - 1) * blocks;
                    (count - v > 4 ? k.dot8 : k.dot4)(panel, n, planes, sums[v]);
                }
            }
            write_sums(task, t, first, count, sums, task.planes);
        }
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE F4 load_values(const std::byte* at, size_t index) {
    if constexpr (kType == TensorType::f32) return load(reinterpret_cast<const float*>(at) + index);
    else if constexpr (kType == TensorType::f16) return load_halves(at + 2 * index);
    else return load_bfloats(at + 2 * index);
}

template <TensorType kType, int C>
void dot_values(const std::byte* tile, size_t cols, const float* const* x, float (*sums)[16]) {
    F4 acc[C][4];
    VALAR_UNROLL for (int i = 0; i < 4 * C; i++) acc[i / 4][i % 4] = splat(0);
    for (size_t k = 0; k < cols; k++) {
        F4 w[4];
        VALAR_UNROLL for (size_t v = 0; v < 4; v++) w[v] = load_values<kType>(tile, 16 * k + 4 * v);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const F4 one = splat(x[c][k]);
            VALAR_UNROLL for (int v = 0; v < 4; v++) acc[c][v] = fma(w[v], one, acc[c][v]);
        }
    }
    VALAR_UNROLL for (int i = 0; i < 4 * C; i++) store(sums[i / 4] + i % 4 * 4, acc[i / 4][i % 4]);
}

template <TensorType kType>
void matmul_values(const MatmulTask& task) {
    for (uint32_t t = task.first_tile; t < task.last_tile; t++) {
        const std::byte* tile = packed_tile(*task.weights, t);
        for (uint32_t first = 0; first < task.columns; first += 4) {
            const uint32_t count = task.columns - first < 4 ? task.columns - first : 4;
            const float* x[4];
            for (uint32_t c = 0; c < 4; c++)
                x[c] = task.x + (first + (c < count ? c : count - 1)) * task.x_stride;
            alignas(16) float sums[4][16];
            (count == 1 ? dot_values<kType, 1> : dot_values<kType, 4>)(tile, task.weights->cols, x,
                                                                       sums);
            write_sums(task, t, first, count, sums, 1);
        }
    }
}

// Nearest integers of x * inverse and their sums; x becomes what is left, x - d * h.
VALAR_FORCE_INLINE void quantize_plane(F4 (&x)[8], float d, float inverse, ActivationBlock& out) {
    alignas(16) int32_t h[kActivationBlock];
    out.d = d;
    VALAR_UNROLL for (int half = 0; half < 2; half++) {
        I4 sum = int_splat(0);
        VALAR_UNROLL for (int i = 4 * half; i < 4 * half + 4; i++) {
            const I4 nearest = int_max(
                int_min(nearest_product(x[i], splat(inverse)), int_splat(127)), int_splat(-127));
            sum = int_add(sum, nearest);
            x[i] = fma(splat(-d), to_float(nearest), x[i]);
            std::memcpy(h + 4 * i, &nearest, sizeof nearest);
        }
        int32_t lanes[4];
        std::memcpy(lanes, &sum, sizeof lanes);
        out.sum[half] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
    for (uint32_t i = 0; i < kActivationBlock; i++) out.q[i] = static_cast<int8_t>(h[i]);
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

void quantize(const float* x, size_t n, uint32_t planes, ActivationBlock* out) {
    const size_t blocks = n / kActivationBlock;
    for (size_t b = 0; b < blocks; b++, x += kActivationBlock) {
        F4 v[8];
        I4 largest = int_splat(0);
        VALAR_UNROLL for (int i = 0; i < 8; i++) {
            v[i] = load(x + 4 * i);
            largest = int_max(largest, magnitude_bits(v[i]));
        }
        int32_t lanes[4], top = 0;
        std::memcpy(lanes, &largest, sizeof lanes);
        for (int32_t lane : lanes) top = lane > top ? lane : top;
        const float amax = std::bit_cast<float>(top);
        if (!(amax >= 0x1p-100f && amax <= 0x1.fffffep127f)) {  // zero, or not finite: rare
            scalar::quantize_block(x, planes, blocks, out + b);
            continue;
        }
        const float d = amax / 127.0f, inverse = 127.0f / amax;
        quantize_plane(v, d, inverse, out[b]);
        if (planes > 1) quantize_plane(v, d / 254.0f, inverse * 254.0f, out[blocks + b]);
    }
}

VALAR_FORCE_INLINE float sum_of_lanes(const F4 (&lanes)[4]) {
    float four[4];
    store(four, add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3])));
    return (four[0] + four[2]) + (four[1] + four[3]);
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    F4 lanes[4] = {splat(0), splat(0), splat(0), splat(0)};
    alignas(16) float rest[16] = {};  // 0 * 0 adds nothing
    for (size_t i = n / 16 * 16; i < n; i++) rest[i % 16] = x[i];
    for (size_t i = 0; i < n; i += 16) {
        const float* at = i + 16 <= n ? x + i : rest;
        VALAR_UNROLL for (int j = 0; j < 4; j++) {
            const F4 v = load(at + 4 * j);
            lanes[j] = fma(v, v, lanes[j]);
        }
    }
    const float factor = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(y + i, mul(mul(load(x + i), splat(factor)), load(weight + i)));
    for (; i < n; i++) y[i] = (x[i] * factor) * weight[i];
}

void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin) {
    const uint32_t pairs = n_rot / 2;
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim) {
        uint32_t i = 0;
        for (; i + 4 <= pairs; i += 4) {
            float *low = neox ? x + i : x + 2 * i, *high = neox ? x + pairs + i : low + 4;
            const F4 u = load(low), v = load(high), turn = load(cos_sin + 2 * i),
                     next = load(cos_sin + 2 * i + 4);
            const F4 a = neox ? u : even_lanes(u, v), b = neox ? v : odd_lanes(u, v);
            const F4 c = even_lanes(turn, next), s = odd_lanes(turn, next);
            const F4 first = fma(a, c, negate(mul(b, s))), second = fma(a, s, mul(b, c));
            store(low, neox ? first : zip_low(first, second));
            store(high, neox ? second : zip_high(first, second));
        }
        for (; i < pairs; i++)
            scalar::rotate(x[neox ? i : 2 * i], x[neox ? i + pairs : 2 * i + 1], cos_sin[2 * i],
                           cos_sin[2 * i + 1]);
    }
}

void scale(float* x, float factor, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, mul(load(x + i), splat(factor)));
    for (; i < n; i++) x[i] *= factor;
}

void add_to(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, add(load(x + i), load(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

VALAR_FORCE_INLINE F4 exp4(F4 x) {
    const F4 v = at_most(x, splat(kExpMost));
    const I4 k = nearest_product(v, splat(kLog2e));
    const F4 minus_k = negate(to_float(k));
    const F4 r = fma(minus_k, splat(kLn2Low), fma(minus_k, splat(kLn2High), v));
    F4 p = splat(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--) p = fma(p, r, splat(exp_coefficients[i]));
    return zero_where_less(mul(p, power_of_two(k)), x, splat(kExpLeast));
}

void silu_mul(float* gate, const float* up, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const F4 x = load(gate + i);
        const F4 silu = div(x, add(splat(1.0f), exp4(negate(x))));
        store(gate + i, mul(silu, load(up + i)));
    }
    for (; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group) {
    const size_t whole = head_dim / 4 * 4;
    if (type == KvType::f32 || whole != head_dim)
        return scalar::store_kv(type, k, v, head_dim, slot, key_group, value_group);
    uint16_t* keys = static_cast<uint16_t*>(key_group) + slot;
    uint16_t* values = static_cast<uint16_t*>(value_group) + slot * whole;
    for (size_t e = 0; e < whole; e += 4) {
        uint16_t halves[4];
        store_halves(halves, load(k + e));
        for (size_t i = 0; i < 4; i++) keys[(e + i) * kKeyGroup] = halves[i];
        store_halves(values + e, load(v + e));
    }
}

template <KvType kType>
VALAR_FORCE_INLINE F4 load_kv(const void* group, size_t index) {
    if constexpr (kType == KvType::f16)
        return load_halves(static_cast<const uint16_t*>(group) + index);
    else return load(static_cast<const float*>(group) + index);
}

// Scores of one query to weights. What nobody may see in a group that is seen gets weight 0.
inline void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    const uint32_t first = begin / 16 * 16, last = (end + 15) / 16 * 16;
    for (uint32_t j = first; j < begin; j++) p[j] = hidden;
    for (uint32_t j = end; j < last; j++) p[j] = hidden;
    F4 top = splat(hidden);
    for (uint32_t j = first; j < last; j += 4) top = greater_of(top, load(p + j));
    float four[4];
    store(four, top);
    *max = hidden;
    for (float lane : four) *max = lane > *max ? lane : *max;
    *max += 0.0f;
    F4 lanes[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (uint32_t j = first; j < last; j += 16) {
        VALAR_UNROLL for (uint32_t i = 0; i < 4; i++) {
            const F4 weight = exp4(sub(load(p + j + 4 * i), splat(*max)));
            lanes[i] = add(lanes[i], weight);
            store(p + j + 4 * i, weight);
        }
    }
    *sum = sum_of_lanes(lanes);
}

// Q queries from `query` on that see the same positions.
template <KvType kType, uint32_t Q>
void attend(const AttentionTask& task, uint32_t query) {
    const uint32_t begin = task.begin[query], end = task.end[query];
    const float* q = task.q + query * task.q_stride;
    float* out = task.out + query * task.out_stride;
    alignas(16) float p[Q][kSegment];
    for (uint32_t group = begin / 16; group * 16 < end; group++) {
        F4 acc[Q][4];
        VALAR_UNROLL for (uint32_t i = 0; i < 4 * Q; i++) acc[i / 4][i % 4] = splat(0);
        for (size_t e = 0; e < task.head_dim; e++) {
            F4 key[4];
            VALAR_UNROLL for (size_t v = 0; v < 4; v++) key[v] =
                load_kv<kType>(task.keys[group], 16 * e + 4 * v);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const F4 one = splat(q[i * task.q_stride + e]);
                VALAR_UNROLL for (size_t v = 0; v < 4; v++) acc[i][v] = fma(one, key[v], acc[i][v]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < 4 * Q; i++)
            store(p[i / 4] + 16 * group + i % 4 * 4, acc[i / 4][i % 4]);
    }
    for (uint32_t i = 0; i < Q; i++)
        weigh(p[i], begin, end, task.max + query + i, task.sum + query + i);
    size_t e = 0;
    constexpr uint32_t W = 4;  // vectors of values at a time
    for (; e + 4 * W <= task.head_dim; e += 4 * W) {
        F4 acc[Q][W];
        VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) acc[i / W][i % W] = splat(0);
        for (uint32_t j = begin; j < end; j++) {
            F4 value[W];
            VALAR_UNROLL for (size_t v = 0; v < W; v++) value[v] =
                load_kv<kType>(task.values[j / 16], j % 16 * task.head_dim + e + 4 * v);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const F4 one = splat(p[i][j]);
                VALAR_UNROLL for (size_t v = 0; v < W; v++) acc[i][v] =
                    fma(one, value[v], acc[i][v]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++)
            store(out + i / W * task.out_stride + e + i % W * 4, acc[i / W][i % W]);
    }
    for (; e < task.head_dim; e++) {
        for (uint32_t i = 0; i < Q; i++) {
            float acc = 0;
            for (uint32_t j = begin; j < end; j++)
                acc = fma_once(
                    p[i][j],
                    scalar::read_kv(kType, task.values[j / 16], j % 16 * task.head_dim + e), acc);
            out[i * task.out_stride + e] = acc;
        }
    }
}

void attention(const AttentionTask& task) {
    using Attend = void (*)(const AttentionTask&, uint32_t);
    constexpr Attend together[2][4] = {{attend<KvType::f16, 1>, attend<KvType::f16, 2>,
                                        attend<KvType::f16, 3>, attend<KvType::f16, 4>},
                                       {attend<KvType::f32, 1>, attend<KvType::f32, 2>,
                                        attend<KvType::f32, 3>, attend<KvType::f32, 4>}};
    for (uint32_t query = 0, count; query < task.queries; query += count) {
        for (count = 1; count < 4 && query + count < task.queries; count++)
            if (task.begin[query + count] != task.begin[query] ||
                task.end[query + count] != task.end[query])
                break;
        if (task.begin[query] < task.end[query])
            together[task.kv_type == KvType::f32][count - 1](task, query);
    }
}

void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n) {
    const float most = m > *max ? m : *max;
    const float a = exp_once(*max - most), b = exp_once(m - most);
    *max = most;
    *sum = fma_once(l, b, *sum * a);
    size_t e = 0;
    for (; e + 4 <= n; e += 4)
        store(out + e, fma(load(o + e), splat(b), mul(load(out + e), splat(a))));
    for (; e < n; e++) out[e] = fma_once(o[e], b, out[e] * a);
}

// Panels differ by what their weights reach and by minimum: some types share theirs.
template <class K, int I, int kTwin = I>
constexpr QuantKernels quant_kernels = {
    K::Narrow::template dot_tile<I, false, 1>, K::Narrow::template dot_tile<I, false, 2>,
    fill_panel<I>, K::template dot_tile<kTwin, true, 4>, K::template dot_tile<kTwin, true, 8>};

template <class K>
void matmul(const MatmulTask& task) {
    static constexpr QuantKernels quantized[] = {
        quant_kernels<K, 0, 2>, quant_kernels<K, 1, 5>, quant_kernels<K, 2>, quant_kernels<K, 3>,
        quant_kernels<K, 4, 5>, quant_kernels<K, 5>,    quant_kernels<K, 6>};
    switch (task.weights->type) {
        case TensorType::f32:
            return matmul_values<TensorType::f32>(task);
        case TensorType::f16:
            return matmul_values<TensorType::f16>(task);
        case TensorType::bf16:
            return matmul_values<TensorType::bf16>(task);
        default:
            return matmul_quantized(task,
                                    quantized[find_layout(task.weights->type) - packed_layouts]);
    }
}

template <class K>
constexpr Kernels kernels_with(const char* name) {
    return {name,   quantize, matmul<K>, rms_norm,  rope,           scale,
            add_to, silu_mul, store_kv,  attention, attention_merge};
}

}  // namespace lanes4
}  // namespace
#endif  // VALAR_NEON_KERNELS || VALAR_WASM_KERNELS

#if VALAR_NEON_KERNELS
namespace {

struct ArmFeatures {
    bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)
inline bool apple_feature(const char* name) {
    int present = 0;
    size_t size = sizeof present;
    return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present;
}
#endif

inline ArmFeatures arm_features() {
#if defined(__linux__)
    return {(getauxval(AT_HWCAP) & 1u << 20) != 0, (getauxval(AT_HWCAP2) & 1u << 13) != 0};
#elif defined(__APPLE__)
    return {apple_feature("hw.optional.arm.FEAT_DotProd"),
            apple_feature("hw.optional.arm.FEAT_I8MM")};
#elif defined(_WIN32)  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, PF_ARM_V82_I8MM_...
    return {IsProcessorFeaturePresent(43) != 0, IsProcessorFeaturePresent(66) != 0};
#else
    ArmFeatures built;
#if defined(__ARM_FEATURE_DOTPROD)
    built.dotprod = true;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    built.i8mm = true;
#endif
    return built;
#endif
}

}  // namespace

// ---- NEON: widening products -----------------------------------------------------------------

namespace {
namespace neon {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        const ActivationBlock* const* a;
        explicit Operands(const ActivationBlock* const* blocks) : a(blocks) {}
    };

    static VALAR_FORCE_INLINE void add_products(int16x8_t& low, int16x8_t& high, B16 w, B16 x) {
        low = vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
        high = vmlal_high_s8(high, w, x);
    }

    // Sixteen bits hold four products of codes of up to 6 bits (63 * 127 * 4), or two of 8 bits.
    template <int I, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& x, const std::byte* codes,
                                                 I4 (&part)[N][C]) {
        const B16 w[4] = {load_group<I, P, 4 * H>(codes), load_group<I, P, 4 * H + 1>(codes),
                          load_group<I, P, 4 * H + 2>(codes), load_group<I, P, 4 * H + 3>(codes)};
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const int32x4_t four = vreinterpretq_s32_s8(load_bytes(x.a[c]->q + 16 * H));
            const B16 x0 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 0)),
                      x1 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 1)),
                      x2 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 2)),
                      x3 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 3));
            int16x8_t low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x0)),
                      high = vmull_high_s8(w[0], x0);
            add_products(low, high, w[1], x1);
            I4 low_sums, high_sums;
            if constexpr (packed_layouts[I].bits == 8) {
                low_sums = vpaddlq_s16(low);
                high_sums = vpaddlq_s16(high);
                low = vmull_s8(vget_low_s8(w[2]), vget_low_s8(x2));
                high = vmull_high_s8(w[2], x2);
                add_products(low, high, w[3], x3);
                low_sums = vpadalq_s16(low_sums, low);
                high_sums = vpadalq_s16(high_sums, high);
            } else {
                add_products(low, high, w[2], x2);
                add_products(low, high, w[3], x3);
                low_sums = vpaddlq_s16(low);
                high_sums = vpaddlq_s16(high);
            }
            I4& sum = part[N == 2 ? H : 0][c];
            sum = vaddq_s32(sum, vpaddq_s32(low_sums, high_sums));
        }
    }

    template <int I, bool P, int C, int N>
    static VALAR_FORCE_INLINE void multiply(const Operands<C>& x, const std::byte* codes,
                                            I4 (&part)[N][C]) {
        multiply_half<I, P, 0>(x, codes, part);
        multiply_half<I, P, 1>(x, codes, part);
    }

    template <int I, bool P, int C>
    static void dot_tile(const std::byte* tile, size_t blocks, const ActivationBlock* const* planes,
                         float* sums) {
        dot_blocks<Products, I, P, C>(tile, blocks, planes, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("neon");

}  // namespace neon
}  // namespace

// ---- NEON dotprod: four products and their sum in each lane ----------------------------------
//
// GNU compilers get the two instructions by name: clang before 16 has no intrinsics for them where
// the whole build does not have the feature.

#if !defined(__GNUC__)
#define VALAR_FLATTEN
#define VALAR_ARM_TARGET_DOTPROD ""
#define VALAR_ARM_TARGET_I8MM ""
#define VALAR_SDOT(sum, w, x, lane) sum = vdotq_laneq_s32(sum, w, x, lane)
#define VALAR_SMMLA(sum, w, x) sum = vmmlaq_s32(sum, w, x)
#else
// dot_blocks has the build's own instructions, so `multiply` cannot be inlined before dot_blocks is.
#define VALAR_FLATTEN __attribute__((flatten))
#if defined(__clang__)
#define VALAR_ARM_TARGET_DOTPROD "dotprod"
#define VALAR_ARM_TARGET_I8MM "dotprod,i8mm"
#else
#define VALAR_ARM_TARGET_DOTPROD "arch=armv8.2-a+dotprod"
#define VALAR_ARM_TARGET_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif
#define VALAR_SDOT(sum, w, x, lane) \
    __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(sum) : "w"(w), "w"(x))
#define VALAR_SMMLA(sum, w, x) __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x))
#endif

VALAR_TARGET_BEGIN(VALAR_ARM_TARGET_DOTPROD)
namespace {
namespace dotprod {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        const ActivationBlock* const* a;
        explicit Operands(const ActivationBlock* const* blocks) : a(blocks) {}
    };

    template <int I, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& operands,
                                                 const std::byte* codes, I4 (&part)[N][C]) {
        B16 x[C];
        VALAR_UNROLL for (int c = 0; c < C; c++) x[c] = load_bytes(operands.a[c]->q + 16 * H);
        I4(&sum)[C] = part[N == 2 ? H : 0];
        B16 w = load_group<I, P, 4 * H>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 0);
        w = load_group<I, P, 4 * H + 1>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 1);
        w = load_group<I, P, 4 * H + 2>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 2);
        w = load_group<I, P, 4 * H + 3>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 3);
    }

    template <int I, bool P, int C, int N>
    static inline void multiply(const Operands<C>& x, const std::byte* codes, I4 (&part)[N][C]) {
        multiply_half<I, P, 0>(x, codes, part);
        multiply_half<I, P, 1>(x, codes, part);
    }

    template <int I, bool P, int C>
    VALAR_FLATTEN static void dot_tile(const std::byte* tile, size_t blocks,
                                       const ActivationBlock* const* planes, float* sums) {
        dot_blocks<Products, I, P, C>(tile, blocks, planes, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("dotprod");

}  // namespace dotprod
}  // namespace
VALAR_TARGET_END

// ---- NEON i8mm: two rows times two columns, eight products each, an instruction --------------

VALAR_TARGET_BEGIN(VALAR_ARM_TARGET_I8MM)
namespace {
namespace i8mm {

using namespace lanes4;

struct Products {
    using Narrow = dotprod::Products;  // two instructions are needed to pair rows
    template <int C>
    struct Operands {  // eight values of column 2i, then of column 2i + 1
        B16 x[C / 2][4];
        explicit Operands(const ActivationBlock* const* a) {
            VALAR_UNROLL for (int i = 0; i < C; i++) {
                const int64x2_t even = vreinterpretq_s64_s8(load_bytes(a[i & ~1]->q + i % 2 * 16)),
                                odd = vreinterpretq_s64_s8(load_bytes(a[i | 1]->q + i % 2 * 16));
                x[i / 2][i % 2 * 2] = vreinterpretq_s8_s64(vzip1q_s64(even, odd));
                x[i / 2][i % 2 * 2 + 1] = vreinterpretq_s8_s64(vzip2q_s64(even, odd));
            }
        }
    };

    // Columns 8 J to 8 J + 7 of four rows. A sum is (row 0, row 1) x (column 2i, column 2i + 1).
    template <int I, bool P, int J, int C>
    static VALAR_FORCE_INLINE void multiply_step(const Operands<C>& operands,
                                                 const std::byte* codes, I4 (&sum)[C / 2][2]) {
        const I4 first = vreinterpretq_s32_s8(load_group<I, P, 2 * J>(codes)),
                 second = vreinterpretq_s32_s8(load_group<I, P, 2 * J + 1>(codes));
        const B16 low = vreinterpretq_s8_s32(vzip1q_s32(first, second)),
                  high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
        VALAR_UNROLL for (int i = 0; i < C / 2; i++) {
            VALAR_SMMLA(sum[i][0], low, operands.x[i][J]);
            VALAR_SMMLA(sum[i][1], high, operands.x[i][J]);
        }
    }

    template <int I, bool P, int C, int N>
    static inline void multiply(const Operands<C>& x, const std::byte* codes, I4 (&part)[N][C]) {
        I4 sum[C / 2][2];
        VALAR_UNROLL for (int i = 0; i < C; i++) sum[i / 2][i % 2] = int_splat(0);
        multiply_step<I, P, 0>(x, codes, sum);
        multiply_step<I, P, 1>(x, codes, sum);
        if constexpr (N == 2) take<0>(sum, part);
        multiply_step<I, P, 2>(x, codes, sum);
        multiply_step<I, P, 3>(x, codes, sum);
        take<N - 1>(sum, part);
    }

    template <int kPart, int C, int N>
    static VALAR_FORCE_INLINE void take(I4 (&sum)[C / 2][2], I4 (&part)[N][C]) {
        VALAR_UNROLL for (int i = 0; i < C / 2; i++) {
            I4 *even = &part[kPart][2 * i], *odd = even + 1;
            *even = int_add(*even, vuzp1q_s32(sum[i][0], sum[i][1]));
            *odd = int_add(*odd, vuzp2q_s32(sum[i][0], sum[i][1]));
            sum[i][0] = sum[i][1] = int_splat(0);
        }
    }

    template <int I, bool P, int C>
    VALAR_FLATTEN static void dot_tile(const std::byte* tile, size_t blocks,
                                       const ActivationBlock* const* planes, float* sums) {
        dot_blocks<Products, I, P, C>(tile, blocks, planes, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("i8mm");

}  // namespace i8mm
}  // namespace
VALAR_TARGET_END
#endif  // VALAR_NEON_KERNELS

#if VALAR_WASM_KERNELS
// ---- WASM SIMD128: products of 16 bits, added in pairs ---------------------------------------

namespace {
namespace wasm {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        alignas(16) int16_t x[C][kActivationBlock];
        explicit Operands(const ActivationBlock* const* a) {
            VALAR_UNROLL for (int i = 0; i < 4 * C; i++)
                wasm_v128_store(x[i / 4] + i % 4 * 8, wasm_i16x8_load8x8(a[i / 4]->q + i % 4 * 8));
        }
    };

    template <int I, bool P, int G, int C>
    static VALAR_FORCE_INLINE void multiply_group(const Operands<C>& operands,
                                                  const std::byte* codes, I4 (&sum)[C][2]) {
        const B16 w = load_group<I, P, G>(codes);
        const v128_t low = wasm_i16x8_extend_low_i8x16(w), high = wasm_i16x8_extend_high_i8x16(w);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const v128_t x = wasm_v128_load64_splat(operands.x[c] + 4 * G);
            sum[c][0] = int_add(sum[c][0], wasm_i32x4_dot_i16x8(low, x));
            sum[c][1] = int_add(sum[c][1], wasm_i32x4_dot_i16x8(high, x));
        }
    }

    template <int I, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& x, const std::byte* codes,
                                                 I4 (&part)[N][C]) {
        I4 sum[C][2];
        VALAR_UNROLL for (int i = 0; i < 2 * C; i++) sum[i / 2][i % 2] = int_splat(0);
        multiply_group<I, P, 4 * H>(x, codes, sum);
        multiply_group<I, P, 4 * H + 1>(x, codes, sum);
        multiply_group<I, P, 4 * H + 2>(x, codes, sum);
        multiply_group<I, P, 4 * H + 3>(x, codes, sum);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            I4& all = part[N == 2 ? H : 0][c];
            all = int_add(
                all, int_add(even_lanes(sum[c][0], sum[c][1]), odd_lanes(sum[c][0], sum[c][1])));
        }
    }

    template <int I, bool P, int C, int N>
    static VALAR_FORCE_INLINE void multiply(const Operands<C>& x, const std::byte* codes,
                                            I4 (&part)[N][C]) {
        multiply_half<I, P, 0>(x, codes, part);
        multiply_half<I, P, 1>(x, codes, part);
    }

    template <int I, bool P, int C>
    static void dot_tile(const std::byte* tile, size_t blocks, const ActivationBlock* const* planes,
                         float* sums) {
        dot_blocks<Products, I, P, C>(tile, blocks, planes, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("wasm");

}  // namespace wasm
}  // namespace
#endif  // VALAR_WASM_KERNELS

// ---- Floating-point state --------------------------------------------------------------------

// Denormals are kept, nearest even, all exceptions masked: the reset state of each control
// register.
#if defined(__x86_64__) || defined(_M_X64) || defined(__SSE__)
FloatState::FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatState::~FloatState() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatState::FloatState() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
}
FloatState::~FloatState() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#elif defined(_M_ARM64)
FloatState::FloatState() : saved_(static_cast<uint64_t>(_ReadStatusReg(ARM64_FPCR))) {
    _WriteStatusReg(ARM64_FPCR, 0);
}
FloatState::~FloatState() { _WriteStatusReg(ARM64_FPCR, static_cast<int64_t>(saved_)); }
#elif defined(__riscv_flen)
FloatState::FloatState() {
    unsigned long mode;
    __asm__ volatile("fsrm %0, zero" : "=r"(mode) : : "memory");
    saved_ = mode;
}
FloatState::~FloatState() {
    __asm__ volatile("fsrm %0" : : "r"(static_cast<unsigned long>(saved_)) : "memory");
}
#else
FloatState::FloatState() : saved_(0) {}
FloatState::~FloatState() = default;
#endif

// ---- The choice of a table -------------------------------------------------------------------

namespace {

struct KernelList {
    const Kernels* tables[5] = {&scalar::kernels};
    size_t count = 1;
    KernelList() {
#if VALAR_X86_KERNELS
        const X86Features cpu = x86_features();
        if (cpu.avx2) tables[count++] = &avx2::kernels;
        if (cpu.avxvnni) tables[count++] = &avx2::vnni_kernels;
#if defined(VALAR_EVEX_VNNI)
        else if (cpu.avx512) tables[count++] = &avx2::evex_kernels;
#endif
        if (cpu.avx512) tables[count++] = &avx512::kernels;
#elif VALAR_NEON_KERNELS
        const ArmFeatures cpu = arm_features();
        tables[count++] = &neon::kernels;
        if (cpu.dotprod) tables[count++] = &dotprod::kernels;
        if (cpu.dotprod && cpu.i8mm) tables[count++] = &i8mm::kernels;
#elif VALAR_WASM_KERNELS
        tables[count++] = &wasm::kernels;
#endif
    }
};

uint64_t fingerprint_bytes(const void* data, size_t size, uint64_t hash) {  // FNV-1a
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
    return hash;
}

// Some results of every kind of arithmetic. A compiler that was told to reassociate or approximate
// (clang does not say so in a macro) gives another number.
uint64_t kernel_fingerprint(const Kernels& k) {
    constexpr uint32_t n = 64, rows = 16;
    FloatState state;
    uint32_t seed = 1;
    auto next = [&] { return seed = seed * 1664525u + 1013904223u; };
    auto fill = [&](float* x, size_t count) {
        for (size_t i = 0; i < count; i++)
            x[i] = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-30f;
    };
    alignas(64) float x[n], y[3 * n], state_out[n + 2], kv[2][16 * 16];
    alignas(64) std::byte source[rows * n / 32 * 20], packed[2 * 320];
    ActivationBlock planes[2 * n / 32];
    uint64_t hash = 0xcbf29ce484222325u;
    fill(x, n);
    for (std::byte& b : source) b = std::byte(next() >> 24);
    for (uint32_t i = 0; i < rows * n / 32; i++)
        source[20 * i + 1] = source[20 * i + 3] = std::byte{0x21};
    pack_tiles(TensorType::q4_1, rows, n, source, 0, 1, packed);
    const PackedMatrix matrix{TensorType::q4_1, rows, n, packed};
    k.quantize(x, n, 2, planes);
    k.matmul({&matrix, 0, 1, 1, 2, planes, nullptr, 0, y, rows});
    hash = fingerprint_bytes(y, rows * sizeof(float), hash);
    fill(y, 3 * n);
    k.rms_norm(x, y, 1e-5f, n, y + n);
    k.silu_mul(y + n, x, n);
    k.rope(y + n, 1, n, n, true, y + 2 * n);
    hash = fingerprint_bytes(y + n, n * sizeof(float), hash);
    for (uint32_t slot = 0; slot < 16; slot++) {
        fill(y, n);
        k.store_kv(KvType::f32, y, y + 16, 16, slot, kv[0], kv[1]);
    }
    const void *keys[16] = {kv[0]}, *values[16] = {kv[1]};
    const uint16_t begin = 1, end = 15;
    k.attention({KvType::f32, 16, 1, x, n, &begin, &end, keys, values, y, y + 1, y + 2, n});
    std::memcpy(state_out, x, sizeof x);
    state_out[n] = 0.5f;
    state_out[n + 1] = 2.0f;
    k.attention_merge(state_out + n, state_out + n + 1, state_out, y[0], y[1], y + 2, 16);
    hash = fingerprint_bytes(state_out, sizeof state_out, hash);
    double d[4] = {exact_log2(3.7), exact_exp2(-3.3)};
    exact_sincos(12345.678, d + 2, d + 3);
    return fingerprint_bytes(d, sizeof d, hash);
}

constexpr uint64_t kKernelFingerprint = 0x3f6e8bd4e70d35fb;

}  // namespace

std::span<const Kernels* const> available_kernels() {
    static const KernelList list;
    return {list.tables, list.count};
}

Result<const Kernels*> choose_kernels() {
    const auto tables = available_kernels();
    const std::string wanted = environment("VALAR_ISA");
    const Kernels* chosen = wanted.empty() ? tables.back() : nullptr;
    std::string names;
    for (const Kernels* table : tables) {
        if (wanted == table->name) chosen = table;
        names += names.empty() ? table->name : std::string(", ") + table->name;
    }
    if (!chosen)
        return make_error(ErrorKind::unsupported,
                          "VALAR_ISA=" + wanted + ": this build on this CPU has " + names);
    const uint64_t found = kernel_fingerprint(*chosen);
    if (found != kKernelFingerprint)
        return make_error(ErrorKind::internal,
                          format("kernels \"%s\" do not compute the bits of the definition "
                                 "(%016llx): was this compiled with unsafe floating-point options?",
                                 chosen->name, static_cast<unsigned long long>(found)));
    return chosen;
}

// ---- The worker team -------------------------------------------------------------------------

namespace {
constexpr uint64_t kSpinNs = 100'000;         // a stage of decode takes tens of microseconds
constexpr uint64_t kSleepNs = 1'000'000'000;  // sleepers are woken; this only bounds a lost wake

// Spins until done() or kSpinNs have passed; returns done().
template <class Done>
bool spin_until(Done done) {
    const uint64_t start = monotonic_ns();
    for (uint32_t i = 1; !done(); i++) {
        if (i % 256 == 0 && monotonic_ns() - start > kSpinNs) return false;
        pause();
    }
    return true;
}
}  // namespace

// `ticket` changes whenever helpers should look: odd means that a job was published with it. Helper
// i takes part i + 1; a caller who is done with its own part takes those that nobody has begun, so
// a helper that sleeps or lost its CPU holds nobody up. A part is claimed by moving `open` from the
// job's ticket to the next number, which a helper that comes late cannot do for any other job.
struct Team::State {
    struct alignas(64) Helper {
        State* state = nullptr;
        uint32_t part = 0;
        std::atomic<uint32_t> open{0};
        Thread thread;
    };
    ParallelFor parallel_for = nullptr;
    void* host = nullptr;
    uint32_t parts = 1;
    void (*job)(void*, uint32_t, uint32_t) = nullptr;
    void* context = nullptr;
    alignas(64) std::atomic<uint32_t> ticket{0};
    std::atomic<uint32_t> sleepers{0};
    std::atomic<bool> hot{false}, quit{false};
    alignas(64) std::atomic<uint32_t> running{0};  // parts of helpers that are not done
    std::atomic<uint32_t> caller_sleeps{0};
    std::unique_ptr<Helper[]> helpers;
    uint32_t n_helpers = 0;

    uint32_t next_ticket_to_publish(bool with_job) const {
        return ((ticket.load(std::memory_order_relaxed) + 2) & ~1u) | (with_job ? 1u : 0u);
    }

    void publish(uint32_t next) {
        ticket.store(next, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) wake(&ticket);
    }

    uint32_t wait_for_ticket(uint32_t seen) {
        auto changed = [&] { return ticket.load(std::memory_order_acquire) != seen; };
        while (!changed()) {
            if (hot.load(std::memory_order_relaxed) && spin_until(changed)) break;
            sleepers.fetch_add(1, std::memory_order_seq_cst);
            if (ticket.load(std::memory_order_seq_cst) == seen) wait_on(&ticket, seen, kSleepNs);
            sleepers.fetch_sub(1, std::memory_order_seq_cst);
        }
        return ticket.load(std::memory_order_acquire);
    }

    void take_part(Helper& helper, uint32_t of_ticket) {
        if (!helper.open.compare_exchange_strong(
                of_ticket, of_ticket + 1, std::memory_order_acquire, std::memory_order_relaxed))
            return;
        job(context, helper.part, parts);
        if (running.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
            caller_sleeps.load(std::memory_order_seq_cst))
            wake(&running);
    }

    static void help(void* context_of_helper) {
        Helper& helper = *static_cast<Helper*>(context_of_helper);
        State& state = *helper.state;
        FloatState float_state;
        for (uint32_t seen = 0; !state.quit.load(std::memory_order_acquire);) {
            seen = state.wait_for_ticket(seen);
            if (seen & 1) state.take_part(helper, seen);
        }
    }

    void wait_for_helpers() {
        auto done = [&] { return running.load(std::memory_order_acquire) == 0; };
        while (!spin_until(done)) {
            caller_sleeps.store(1, std::memory_order_seq_cst);
            const uint32_t left = running.load(std::memory_order_seq_cst);
            if (left) wait_on(&running, left, kSleepNs);
            caller_sleeps.store(0, std::memory_order_relaxed);
        }
    }

    void run_with_helpers() {
        const uint32_t now = next_ticket_to_publish(true);
        running.store(n_helpers, std::memory_order_relaxed);
        for (uint32_t i = 0; i < n_helpers; i++)
            helpers[i].open.store(now, std::memory_order_release);
        publish(now);
        job(context, 0, parts);
        for (uint32_t i = 0; i < n_helpers; i++) take_part(helpers[i], now);
        wait_for_helpers();
    }

    static void host_job(void* team, uint32_t part) {
        const State& state = *static_cast<const State*>(team);
        FloatState float_state;
        state.job(state.context, part, state.parts);
    }
};

Team::Team(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<Team>> Team::create(int helpers, ParallelFor parallel_for, void* host) {
    if (helpers < 0 || helpers > 1023)
        return make_error(ErrorKind::invalid_request,
                          format("threads: %d is not in 0..1023", helpers), {}, "threads");
    std::unique_ptr<Team> team(new Team(std::make_unique<State>()));
    State& state = *team->state_;
    state.parallel_for = parallel_for;
    state.host = host;
    state.parts = static_cast<uint32_t>(helpers) + 1;
    if (parallel_for) return team;
    state.helpers = std::make_unique<State::Helper[]>(static_cast<size_t>(helpers));
    for (uint32_t i = 0; i + 1 < state.parts; i++) {
        State::Helper& helper = state.helpers[i];
        helper.state = &state;
        helper.part = i + 1;
        auto thread = Thread::start(State::help, &helper, "valar-worker");
        if (!thread) return thread.error();
        helper.thread = std::move(*thread);
        state.n_helpers++;
    }
    return team;
}

Team::~Team() {
    state_->quit.store(true, std::memory_order_release);
    state_->publish(state_->next_ticket_to_publish(false));
    for (uint32_t i = 0; i < state_->n_helpers; i++) state_->helpers[i].thread.join();
}

uint32_t Team::parts() const { return state_->parts; }

void Team::begin() {
    state_->hot.store(true, std::memory_order_relaxed);
    if (state_->sleepers.load(std::memory_order_seq_cst))
        state_->publish(state_->next_ticket_to_publish(false));
}

void Team::end() { state_->hot.store(false, std::memory_order_relaxed); }

void Team::run(void (*job)(void* context, uint32_t part, uint32_t parts), void* context) {
    State& state = *state_;
    state.job = job;
    state.context = context;
    if (state.parallel_for)
        return state.parallel_for(state.host, state.parts, State::host_job, &state);
    FloatState float_state;
    state.run_with_helpers();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>tokenizer
// Owns: the vocabulary in memory, the splitters, the merge loop, the matcher of special tokens.
// Byte-level BPE: special tokens are cut out, the text between them goes through the splitter of
// its pre-tokenizer, and each word is merged pair by pair, lowest rank first (Sennrich 2016).
// SentencePiece BPE: no words; pairs are ranked by the score of the piece that they make.
// Pieces are kept as the bytes they stand for: neither the printable alphabet of GPT-2 nor the
// U+2581 of SentencePiece gets past `open`.

#ifndef VALAR_NO_INFERENCE

namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr Token no_token = -1;
constexpr uint32_t no_rank = UINT32_MAX;
constexpr uint32_t no_symbol = UINT32_MAX;

uint64_t hash_piece(std::string_view piece) {
    constexpr uint64_t factor = 0x9E3779B97F4A7C15u;
    uint64_t hash = piece.size() * factor;
    auto mix = [&hash](uint64_t word) {
        hash = (hash ^ word) * factor;
        hash ^= hash >> 32;
    };
    size_t at = 0;
    uint64_t word = 0;
    for (; at + 8 <= piece.size(); at += 8) {
        std::memcpy(&word, piece.data() + at, 8);
        mix(word);
    }
    word = 0;
    for (; at < piece.size(); ++at) word = word << 8 | uint8_t(piece[at]);
    mix(word);
    return hash;
}

}  // namespace

// ---- tables of a vocabulary -----------------------------------------------------------------

// All pieces back to back, and a hash from the bytes of a piece to its id. Of equal pieces the
// first that is inserted is found.
class PieceTable {
public:
    void reserve(size_t count, size_t bytes) {
        starts_.reserve(count + 1);
        bytes_.reserve(bytes);
    }
    void add(std::string_view piece) {
        bytes_ += piece;
        starts_.push_back(bytes_.size());
    }
    size_t size() const { return starts_.size() - 1; }
    std::string_view operator[](size_t id) const {
        return {bytes_.data() + starts_[id], starts_[id + 1] - starts_[id]};
    }

    void start_index() { slots_.assign(std::bit_ceil(size() * 2 + 1), {}); }
    void insert(Token id) {
        const uint64_t hash = hash_piece((*this)[size_t(id)]);
        Slot& slot = slots_[slot_of((*this)[size_t(id)], hash)];
        if (slot.id == no_token) slot = {id, uint32_t(hash >> 32)};
    }
    Token find(std::string_view piece) const {
        return slots_[slot_of(piece, hash_piece(piece))].id;
    }

private:
    struct Slot {
        Token id = no_token;
        uint32_t tag = 0;  // spares most looks at the pieces of others
    };
    size_t slot_of(std::string_view piece, uint64_t hash) const {
        const size_t mask = slots_.size() - 1;
        size_t slot = size_t(hash) & mask;
        while (slots_[slot].id != no_token && (slots_[slot].tag != uint32_t(hash >> 32) ||
                                               (*this)[size_t(slots_[slot].id)] != piece))
            slot = (slot + 1) & mask;
        return slot;
    }
    std::string bytes_;
    std::vector<size_t> starts_ = {0};
    std::vector<Slot> slots_ = {{}};
};

// What a pair of neighbours becomes, and how urgent that is: a lower rank goes first.
struct Merge {
    uint32_t rank = no_rank;
    Token token = no_token;
};

// The merges of byte-level BPE, by the two ids.
class PairTable {
public:
    void reserve(size_t count) { slots_.assign(std::bit_ceil(count * 2 + 1), {}); }
    void insert(Token left, Token right, Merge merge) {
        Slot& slot = slots_[slot_of(left, right)];
        if (slot.merge.rank == no_rank) slot = {left, right, merge};
    }
    Merge find(Token left, Token right) const { return slots_[slot_of(left, right)].merge; }

private:
    struct Slot {
        Token left = no_token, right = no_token;
        Merge merge;
    };
    size_t slot_of(Token left, Token right) const {
        const size_t mask = slots_.size() - 1;
        const uint64_t key = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
        size_t slot = size_t((key * 0x9E3779B97F4A7C15u) >> 29) & mask;
        while (slots_[slot].merge.rank != no_rank &&
               (slots_[slot].left != left || slots_[slot].right != right))
            slot = (slot + 1) & mask;
        return slot;
    }
    std::vector<Slot> slots_ = {{}};
};

// Tokens that are recognised by their spelling: sorted, so that those that share a beginning
// are neighbours and a match narrows the range byte by byte.
class SpellingMatcher {
public:
    struct Match {
        Token token = no_token;
        size_t length = 0;  // 0: none
    };
    // The spelling is borrowed. A template_only token matches in bytes of the template alone.
    void add(std::string_view spelling, Token token, bool template_only) {
        if (!spelling.empty()) entries_.push_back({spelling, token, template_only});
    }
    void build() {
        std::stable_sort(entries_.begin(), entries_.end(),
                         [](const Entry& a, const Entry& b) { return a.spelling < b.spelling; });
        size_t at = 0;
        for (size_t byte = 0; byte < 256; ++byte) {
            first_[byte] = at;
            while (at < entries_.size() && uint8_t(entries_[at].spelling[0]) == byte) ++at;
        }
        first_[256] = at;
    }
    bool may_begin(char c) const { return first_[uint8_t(c)] != first_[uint8_t(c) + 1u]; }
    // The longest spelling at text[at]; bytes before template_end are the template's.
    Match longest(std::string_view text, size_t at, size_t template_end) const {
        Match match;
        auto low = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at])]);
        auto high = entries_.begin() + ptrdiff_t(first_[uint8_t(text[at]) + 1u]);
        for (size_t length = 1; low != high; ++length) {
            for (; low != high && low->spelling.size() == length; ++low)
                if (match.length != length && (!low->template_only || at + length <= template_end))
                    match = {low->token, length};
            if (at + length >= text.size()) break;
            const uint8_t next = uint8_t(text[at + length]);
            low = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) < next;
            });
            high = std::partition_point(low, high, [&](const Entry& entry) {
                return uint8_t(entry.spelling[length]) == next;
            });
        }
        return match;
    }

private:
    struct Entry {
        std::string_view spelling;
        Token token;
        bool template_only;
    };
    std::vector<Entry> entries_;
    std::array<size_t, 257> first_ = {};
};

// The regular expressions these rules stand for, with \p{N} as `digits` says:
//   old:    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   modern: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
//           ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
struct SplitRules {
    std::string_view name;  // tokenizer.ggml.pre
    bool modern;
    size_t digits;          // at most so many in one word
    bool digits_apart;      // each digit is cut out first: what is around it does not see it
    bool compose;           // NFC before anything else
    bool whole_words;       // a word that is a token is taken without merging
    bool add_bos;           // unless the file says otherwise
};

namespace {

// ---- pre-tokenizers -------------------------------------------------------------------------

constexpr SplitRules split_rules[] = {
    {"gpt-2", false, SIZE_MAX, false, false, false, false},
    {"smollm", false, 1, true, false, false, false},
    {"llama-bpe", true, 3, false, false, true, true},
    {"qwen2", true, 1, false, true, false, false},
};

enum class SplitClass : uint8_t { end, other, letter, number, space, newline };

struct SplitChar {
    SplitClass what;
    size_t next;  // where the next character begins
};

SplitClass split_class(char32_t c) {
    if (c == '\r' || c == '\n') return SplitClass::newline;
    if (is_letter(c)) return SplitClass::letter;
    if (is_number(c)) return SplitClass::number;
    return is_whitespace(c) ? SplitClass::space : SplitClass::other;
}

SplitChar split_char(std::string_view text, size_t at) {
    if (at >= text.size()) return {SplitClass::end, at};
    const uint8_t c = uint8_t(text[at]);
    if (c < 0x80) {
        if (unsigned(c | 0x20) - 'a' < 26) return {SplitClass::letter, at + 1};
        if (unsigned(c) - '0' < 10) return {SplitClass::number, at + 1};
        if (c > ' ') return {SplitClass::other, at + 1};
    }
    const char32_t code_point = utf8_next(text, &at);
    return {split_class(code_point), at};
}

size_t run_end(std::string_view text, size_t at, SplitClass what, size_t most = SIZE_MAX) {
    SplitChar c = split_char(text, at);
    for (; c.what == what && most > 0; --most) c = split_char(text, at = c.next);
    return at;
}

// The length of the English contraction at the apostrophe text[0], or 0.
size_t contraction_length(std::string_view text, bool any_case) {
    if (any_case && text.substr(1, 2) == "\xC5\xBF") return 3;  // U+017F folds to s
    auto letter = [&](size_t at) {
        const char c = at < text.size() ? text[at] : '\0';
        return any_case && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
    };
    const char a = letter(1), b = letter(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// White space up to a word leaves its last character to that word (\s+(?!\S)); if there is a line
// end in it, modern rules stop behind the last one.
size_t space_end(std::string_view text, size_t at, const SplitRules& rules) {
    size_t end = at, last = at, line_end = 0;
    SplitChar c = split_char(text, at);
    for (; c.what >= SplitClass::space; c = split_char(text, end)) {
        last = end;
        end = c.next;
        if (c.what == SplitClass::newline) line_end = end;
    }
    if (rules.modern && line_end) return line_end;
    const bool keep = c.what == SplitClass::end || last == at ||
                      (rules.digits_apart && c.what == SplitClass::number);
    return keep ? end : last;
}

size_t old_word_end(std::string_view text, size_t at, const SplitRules& rules) {
    SplitChar c = split_char(text, at);
    if (text[at] == ' ') {
        const SplitChar next = split_char(text, c.next);
        const bool joins = next.what == SplitClass::other || next.what == SplitClass::letter ||
                           (next.what == SplitClass::number && !rules.digits_apart);
        if (joins) at = c.next, c = next;
    }
    if (c.what >= SplitClass::space) return space_end(text, at, rules);
    return run_end(text, at, c.what, c.what == SplitClass::number ? rules.digits : SIZE_MAX);
}

size_t modern_word_end(std::string_view text, size_t at, const SplitRules& rules) {
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::letter) return run_end(text, at, SplitClass::letter);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, rules.digits);
    if (next.what == SplitClass::letter && c.what != SplitClass::newline)
        return run_end(text, c.next, SplitClass::letter);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other)) {
        size_t end = run_end(text, c.next, SplitClass::other);
        while (end < text.size() && (text[end] == '\r' || text[end] == '\n')) ++end;
        return end;
    }
    return space_end(text, at, rules);
}

// Where the word that begins at `at` ends.
size_t word_end(std::string_view text, size_t at, const SplitRules& rules) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), rules.modern))
            return at + length;
    return rules.modern ? modern_word_end(text, at, rules) : old_word_end(text, at, rules);
}

// ---- merging --------------------------------------------------------------------------------

// A stretch of text that is one piece so far; those alive form a list. The pair that begins here
// has `rank` (no_rank: cannot merge) and would become `merged`.
struct MergeSymbol {
    uint32_t begin = 0;  // of its bytes
    uint32_t previous = no_symbol;
    uint32_t next = no_symbol;
    Token token = no_token;
    uint32_t rank = no_rank;
    Token merged = no_token;
};

struct LaterPlace {
    bool operator()(uint32_t a, uint32_t b) const { return a > b; }
};

// Pending merges: lowest rank first, then leftmost. The places of one rank nearly always come in
// ascending order, so a rank's list is read from front to back, and turns into a heap only when
// a place comes too early: ten million equal letters cost little more than copying them.
class MergeQueue {
public:
    void push(uint32_t rank, uint32_t place) {
        if (!list_ || rank != list_rank_) list_ = &lists_[list_rank_ = rank];
        std::vector<uint32_t>& places = list_->places;
        if (list_->empty()) add_rank(rank);
        else if (!list_->is_heap && place < places.back()) list_->make_heap();
        places.push_back(place);
        if (list_->is_heap) std::push_heap(places.begin(), places.end(), LaterPlace());
    }
    bool pop(uint32_t* rank, uint32_t* place) {
        if (ranks_.empty()) return false;
        *rank = ranks_.front();
        if (!list_ || *rank != list_rank_) list_ = &lists_[list_rank_ = *rank];
        *place = list_->take_first();
        if (list_->empty()) drop_lowest_rank();
        return true;
    }

private:
    struct List {
        std::vector<uint32_t> places;
        size_t first = 0;
        bool is_heap = false;
        bool empty() const { return first == places.size(); }
        void make_heap() {  // what is sorted is a heap already
            places.erase(places.begin(), places.begin() + ptrdiff_t(first));
            first = 0;
            is_heap = true;
        }
        uint32_t take_first() {
            if (!is_heap) return places[first++];
            std::pop_heap(places.begin(), places.end(), LaterPlace());
            const uint32_t place = places.back();
            places.pop_back();
            return place;
        }
    };
    void add_rank(uint32_t rank) {
        ranks_.push_back(rank);
        std::push_heap(ranks_.begin(), ranks_.end(), LaterPlace());
    }
    void drop_lowest_rank() {
        std::pop_heap(ranks_.begin(), ranks_.end(), LaterPlace());
        ranks_.pop_back();
        list_->places.clear();
        list_->first = 0;
        list_->is_heap = false;
    }
    std::unordered_map<uint32_t, List> lists_;
    std::vector<uint32_t> ranks_;  // a heap of those whose lists are not empty
    List* list_ = nullptr;         // of list_rank_, the last one used
    uint32_t list_rank_ = 0;
};

// Merges neighbours until no pair can merge. `pairs(symbols, left, right)` gives a pair's Merge.
template <class Pairs>
class MergeLoop {
public:
    MergeLoop(std::span<MergeSymbol> symbols, const Pairs& pairs)
        : symbols_(symbols), pairs_(pairs) {}
    void run() {
        if (symbols_.empty()) return;
        for (uint32_t at = 0; at < symbols_.size(); ++at) {
            symbols_[at].previous = at - 1;  // of the first: no_symbol
            symbols_[at].next = at + 1 < symbols_.size() ? at + 1 : no_symbol;
        }
        if (symbols_.size() <= short_word) run_short();
        else run_long();
    }

private:
    static constexpr size_t short_word = 32;  // up to here looking at every pair is faster
    void run_short() {
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        for (;;) {
            uint32_t best = 0;
            for (uint32_t at = 0; at != no_symbol; at = symbols_[at].next)
                if (symbols_[at].rank < symbols_[best].rank) best = at;
            if (symbols_[best].rank == no_rank) return;
            merge(best);
        }
    }
    void run_long() {
        queue_.emplace();
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        uint32_t rank = 0, at = 0;
        while (queue_->pop(&rank, &at))
            if (symbols_[at].rank == rank) merge(at);  // else it was overtaken
    }
    void merge(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        MergeSymbol& right = symbols_[left.next];
        left.token = left.merged;
        left.next = right.next;
        right.rank = no_rank;
        if (left.next != no_symbol) symbols_[left.next].previous = at;
        if (left.previous != no_symbol) rate(left.previous);
        rate(at);
    }
    void rate(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        Merge merge;
        if (left.next != no_symbol) merge = pairs_(left, symbols_[left.next]);
        left.rank = merge.rank;
        left.merged = merge.token;
        if (queue_ && merge.rank != no_rank) queue_->push(merge.rank, at);
    }
    std::span<MergeSymbol> symbols_;
    const Pairs& pairs_;
    std::optional<MergeQueue> queue_;
};

}  // namespace

// ---- the vocabulary -------------------------------------------------------------------------

struct Vocabulary {
    PieceTable pieces;
    std::vector<TokenKind> kinds;
    std::vector<bool> from_text;      // merging and whole words may make it
    std::vector<bool> ends;           // see is_end
    std::vector<uint32_t> ranks;      // SentencePiece: position of its score, highest first
    PairTable pairs;                  // byte-level
    std::array<Token, 256> bytes;     // the token of a single byte, or no_token
    SpellingMatcher specials;         // cut out of the text first
    SpellingMatcher whole;            // SentencePiece: user-defined tokens of any text
    const SplitRules* rules = nullptr;  // null: SentencePiece
    size_t longest = 0;               // bytes of the longest piece that from_text marks
    Token bos = no_token, eos = no_token, unknown = no_token;
    bool add_bos = false, add_eos = false, add_space_prefix = false;
};

namespace {

std::string with_spaces(std::string_view text) {  // SentencePiece writes a space as U+2581
    std::string spaced;
    spaced.reserve(text.size());
    for (size_t at = 0; at < text.size(); ++at) {
        const bool mark = text.substr(at, 3) == "\xE2\x96\x81";
        spaced += mark ? ' ' : text[at];
        if (mark) at += 2;
    }
    return spaced;
}

// Reads tokenizer.ggml.* into a Vocabulary. Of equal pieces the lowest id is made from text.
// Merges that name no piece are refused; those of special tokens are skipped.
class VocabularyReader {
public:
    VocabularyReader(const Gguf& file, std::string_view chat_template, Vocabulary& vocabulary)
        : file_(file), chat_template_(chat_template), v_(vocabulary) {}
    Result<void> read() {
        for (auto step : {&VocabularyReader::read_model, &VocabularyReader::read_kinds,
                          &VocabularyReader::read_pieces, &VocabularyReader::read_ids,
                          &VocabularyReader::read_flags, &VocabularyReader::read_specials,
                          &VocabularyReader::build_index, &VocabularyReader::read_ranks})
            if (auto result = (this->*step)(); !result) return result;
        return {};
    }

private:
    Error bad(const char* key, const std::string& what) const {
        return make_error(ErrorKind::bad_data,
                          file_.name() + ": tokenizer.ggml." + key + ": " + what);
    }
    Error unsupported(const char* key, std::string_view value) const {
        return make_error(ErrorKind::unsupported,
                          file_.name() + ": tokenizer.ggml." + key + " = \"" +
                              utf8_repair(value.substr(0, 64)) + "\" is not supported");
    }
    bool is_sentencepiece() const { return v_.rules == nullptr; }

    Result<void> read_model() {
        auto model = file_.get_string("tokenizer.ggml.model");
        if (!model) return model.error();
        if (*model == "llama") return read_normalizer();
        if (*model != "gpt2") return unsupported("model", *model);
        auto pre = file_.get_string("tokenizer.ggml.pre");
        if (!pre) return pre.error();
        for (const SplitRules& rules : split_rules)
            if (rules.name == *pre) v_.rules = &rules;
        if (!v_.rules) return unsupported("pre", *pre);
        return {};
    }

    Result<void> read_normalizer() const {  // of SentencePiece: the identity or nothing
        auto trims = file_.get_bool("tokenizer.ggml.remove_extra_whitespaces", false);
        if (!trims) return trims.error();
        if (*trims) return unsupported("remove_extra_whitespaces", "true");
        const GgufKey* map = file_.find("tokenizer.ggml.precompiled_charsmap");
        if (map && map->count > 0) return unsupported("precompiled_charsmap", "not empty");
        return {};
    }

    Result<void> read_kinds() {
        auto tokens = file_.get_strings("tokenizer.ggml.tokens");
        if (!tokens) return tokens.error();
        if (tokens->size() == 0 || tokens->size() > Tokenizer::max_vocabulary)
            return bad("tokens", format("%zu tokens", tokens->size()));
        v_.kinds.assign(tokens->size(), TokenKind::normal);
        if (!file_.find("tokenizer.ggml.token_type")) return {};
        auto types = file_.get_ints("tokenizer.ggml.token_type");
        if (!types) return types.error();
        if (types->size() != tokens->size())
            return bad("token_type", format("%zu types for %zu tokens", types->size(),
                                            tokens->size()));
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const int64_t type = (*types)[id];
            if (type < 0 || type > 6)
                return bad("token_type", format("token %zu has type %lld", id, (long long)type));
            v_.kinds[id] = type == 0 ? TokenKind::normal : TokenKind(type);
        }
        return {};
    }

    Result<void> read_pieces() {
        auto tokens = file_.get_strings("tokenizer.ggml.tokens");
        if (!tokens) return tokens.error();
        v_.bytes.fill(no_token);
        v_.pieces.reserve(tokens->size(), tokens->size() * 8);
        size_t id = 0;
        for (std::string_view text : *tokens) {
            const std::string piece = piece_bytes(text, v_.kinds[id]);
            if (piece.size() > Tokenizer::max_piece_bytes)
                return bad("tokens", format("token %zu has %zu bytes", id, piece.size()));
            if (v_.kinds[id] == TokenKind::byte && piece.size() != 1)
                return bad("tokens", format("token %zu is a byte, but not spelled <0xXX>", id));
            v_.pieces.add(piece);
            ++id;
        }
        return {};
    }

    // The bytes that a token stands for. Special tokens are spelled as they are.
    std::string piece_bytes(std::string_view text, TokenKind kind) const {
        if (kind == TokenKind::byte) return byte_spelled(text);
        if (kind == TokenKind::control || kind == TokenKind::unknown) return std::string(text);
        if (is_sentencepiece()) return with_spaces(text);
        return kind == TokenKind::user_defined ? std::string(text) : from_printable(text);
    }
    static std::string byte_spelled(std::string_view text) {  // <0x0A>
        auto digit = [&](size_t at) {
            return std::string_view("0123456789ABCDEF").find(text[at]);
        };
        if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return {};
        if (digit(3) > 15 || digit(4) > 15) return {};
        return std::string(1, char(digit(3) * 16 + digit(4)));
    }
    // GPT-2 writes a byte as a printable character: itself where it is one in Latin-1, else
    // U+0100 and following in order. A piece with any other character is spelled as it is.
    static std::string from_printable(std::string_view text) {
        std::string bytes;
        for (size_t at = 0; at < text.size();) {
            const char32_t c = utf8_next(text, &at);
            const bool itself = (c > 0x20 && c < 0x7F) || (c > 0xA0 && c < 0x100 && c != 0xAD);
            if (itself) bytes += char(c);
            else if (c >= 0x100 && c <= 0x120) bytes += char(c - 0x100);           // 00..20
            else if (c > 0x120 && c <= 0x142) bytes += char(c - 0x121 + 0x7F);     // 7F..A0
            else if (c == 0x143) bytes += '\xAD';
            else return std::string(text);
        }
        return bytes;
    }

    Result<void> read_id(const char* key, Token* id) {
        const std::string name = std::string("tokenizer.ggml.") + key;
        if (!file_.find(name)) return {};
        auto value = file_.get_uint(name);
        if (!value) return value.error();
        if (*value >= v_.kinds.size())
            return bad(key, format("%llu, of %zu tokens", (unsigned long long)*value,
                                   v_.kinds.size()));
        *id = Token(*value);
        return {};
    }

    Result<void> read_ids() {
        Token turn = no_token, message = no_token;
        const std::pair<const char*, Token*> ids[] = {
            {"bos_token_id", &v_.bos}, {"eos_token_id", &v_.eos}, {"eot_token_id", &turn},
            {"eom_token_id", &message}, {"unknown_token_id", &v_.unknown}};
        for (auto [key, id] : ids)
            if (auto result = read_id(key, id); !result) return result;
        for (Token id : {v_.bos, v_.eos, turn, message})  // files call some of them normal
            if (id != no_token && v_.pieces[size_t(id)].size() > 1)
                v_.kinds[size_t(id)] = TokenKind::control;
        mark_ends({v_.eos, turn, message});
        if (v_.unknown != no_token && (v_.kinds[size_t(v_.unknown)] == TokenKind::control ||
                                       v_.ends[size_t(v_.unknown)]))
            v_.unknown = no_token;  // text must not make it
        return {};
    }

    void mark_ends(std::initializer_list<Token> ends) {
        static constexpr std::string_view spellings[] = {
            "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>",
            "<|end|>", "<|return|>", "<|call|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<turn|>",
            "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|end_of_role|>", "<end_of_utterance>",
            "<|user|>", "<|observation|>", "<EOT>", "</s>", "<eos>", "[EOS]",
            "<\xEF\xBD\x9C" "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"};
        v_.ends.assign(v_.kinds.size(), false);
        for (Token id : ends)
            if (id != no_token) v_.ends[size_t(id)] = true;
        for (size_t id = 0; id < v_.kinds.size(); ++id)
            if (v_.kinds[id] == TokenKind::control || v_.kinds[id] == TokenKind::user_defined)
                for (std::string_view spelling : spellings)
                    if (v_.pieces[id] == spelling) v_.ends[id] = true;
    }

    Result<void> read_flags() {
        const bool plain = is_sentencepiece();
        v_.add_bos = plain || v_.rules->add_bos;
        v_.add_space_prefix = plain;
        const std::pair<const char*, bool*> flags[] = {
            {"tokenizer.ggml.add_bos_token", &v_.add_bos},
            {"tokenizer.ggml.add_eos_token", &v_.add_eos},
            {"tokenizer.ggml.add_space_prefix", &v_.add_space_prefix}};
        for (auto [key, flag] : flags) {
            auto value = file_.get_bool(key, *flag);
            if (!value) return value.error();
            *flag = *value;
        }
        v_.add_space_prefix &= plain;
        return {};
    }

    // Which tokens are recognised by their spelling, and where; what is left, merging may make.
    Result<void> read_specials() {
        const std::vector<std::string_view> templates = chat_templates();
        v_.from_text.assign(v_.kinds.size(), false);
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const std::string_view piece = v_.pieces[id];
            const TokenKind kind = v_.kinds[id];
            const bool control = kind == TokenKind::control;
            const bool user = kind == TokenKind::user_defined;
            const bool guarded = control || (user && stands_in(templates, piece));
            v_.from_text[id] = kind == TokenKind::normal || (user && !guarded) ||
                               (is_sentencepiece() && kind == TokenKind::unused);
            if (v_.from_text[id]) v_.longest = std::max(v_.longest, piece.size());
            if (user && !guarded && is_sentencepiece()) v_.whole.add(piece, Token(id), false);
            else if (control || user) v_.specials.add(piece, Token(id), guarded);
        }
        v_.specials.build();
        v_.whole.build();
        return {};
    }
    std::vector<std::string_view> chat_templates() const {
        std::vector<std::string_view> templates = {chat_template_};
        for (const GgufKey& key : file_.keys())
            if (key.name.substr(0, 23) == "tokenizer.chat_template" && !key.is_array)
                if (auto text = file_.get_string(key.name)) templates.push_back(*text);
        return templates;
    }
    static bool stands_in(const std::vector<std::string_view>& templates, std::string_view piece) {
        if (piece.find_first_not_of(" \t\r\n") == std::string_view::npos) return false;
        return std::any_of(templates.begin(), templates.end(), [&](std::string_view text) {
            return text.find(piece) != std::string_view::npos;
        });
    }

    // Pieces that text can make come first, so that no special token hides one of them.
    Result<void> build_index() {
        v_.pieces.start_index();
        for (const bool from_text : {true, false})
            for (size_t id = 0; id < v_.kinds.size(); ++id)
                if (v_.from_text[id] == from_text && !v_.pieces[id].empty())
                    v_.pieces.insert(Token(id));
        for (size_t id = 0; id < v_.kinds.size(); ++id) {
            const bool single = is_sentencepiece() ? v_.kinds[id] == TokenKind::byte
                                                   : v_.from_text[id] && v_.pieces[id].size() == 1;
            Token& token = v_.bytes[single ? uint8_t(v_.pieces[id][0]) : 0];
            if (single && token == no_token) token = Token(id);
        }
        return {};
    }

    Result<void> read_ranks() { return is_sentencepiece() ? read_scores() : read_merges(); }

    Result<void> read_scores() {
        auto scores = file_.get_floats("tokenizer.ggml.scores");
        if (!scores) return scores.error();
        if (scores->size() != v_.kinds.size())
            return bad("scores", format("%zu scores for %zu tokens", scores->size(),
                                        v_.kinds.size()));
        std::vector<std::pair<double, Token>> order(scores->size());
        for (size_t id = 0; id < order.size(); ++id) {
            order[id] = {-(*scores)[id], Token(id)};
            if (!std::isfinite(order[id].first))
                return bad("scores", format("token %zu has no finite score", id));
        }
        std::sort(order.begin(), order.end());
        v_.ranks.resize(order.size());
        for (size_t i = 0; i < order.size(); ++i) {
            const bool tie = i > 0 && order[i].first == order[i - 1].first;
            v_.ranks[size_t(order[i].second)] =
                tie ? v_.ranks[size_t(order[i - 1].second)] : uint32_t(i);
        }
        return {};
    }

    Result<void> read_merges() {
        auto merges = file_.get_strings("tokenizer.ggml.merges");
        if (!merges) return merges.error();
        if (merges->size() > Tokenizer::max_vocabulary)
            return bad("merges", format("%zu merges", merges->size()));
        v_.pairs.reserve(merges->size());
        uint32_t rank = 0;
        for (std::string_view merge : *merges) {
            const size_t space = merge.find(' ', 1);
            if (space == std::string_view::npos)
                return bad("merges", format("merge %u is not a pair of pieces", rank));
            const std::string left = from_printable(merge.substr(0, space));
            const std::string right = from_printable(merge.substr(space + 1));
            const Token ids[] = {v_.pieces.find(left), v_.pieces.find(right),
                                 v_.pieces.find(left + right)};
            bool usable = true;
            for (Token id : ids) {
                if (id == no_token)
                    return bad("merges", format("merge %u names a piece that is no token", rank));
                usable = usable && v_.from_text[size_t(id)];
            }
            if (usable) v_.pairs.insert(ids[0], ids[1], {rank, ids[2]});
            ++rank;
        }
        return {};
    }

    const Gguf& file_;
    std::string_view chat_template_;
    Vocabulary& v_;
};

// ---- encoding -------------------------------------------------------------------------------

// One text on its way to tokens.
class TextEncoder {
public:
    TextEncoder(const Vocabulary& vocabulary, size_t text_bytes) : v_(vocabulary) {
        if (v_.rules) cache_.resize(std::bit_ceil(std::clamp<size_t>(text_bytes / 16, 1, 4096)));
        tokens.reserve(text_bytes / 4 + 4);
    }
    std::vector<Token> tokens;

    // `request` says which bytes cannot belong to a template_only token.
    Result<void> encode(std::string_view text, std::span<const ByteRange> request) {
        return cut_out(v_.specials, text, request,
                       [this](std::string_view run) { return encode_run(run); });
    }

private:
    struct CachedWord {  // its tokens stand in `tokens`
        char text[22];
        uint8_t length = 0;
        uint8_t count = 0;
        uint32_t begin = 0;
    };

    // Appends the tokens of the spellings that the matcher finds; `encode_between` does the rest.
    template <class Between>
    Result<void> cut_out(const SpellingMatcher& matcher, std::string_view text,
                         std::span<const ByteRange> request, const Between& encode_between) {
        size_t begin = 0, range = 0;
        for (size_t at = 0; at < text.size();) {
            SpellingMatcher::Match match;
            if (matcher.may_begin(text[at])) {
                while (range < request.size() && request[range].end <= at) ++range;
                match = matcher.longest(text, at, range < request.size() ? request[range].begin
                                                                         : text.size());
            }
            if (match.length == 0) {
                ++at;
                continue;
            }
            if (auto result = encode_between(text.substr(begin, at - begin)); !result)
                return result;
            tokens.push_back(match.token);
            begin = at += match.length;
        }
        return encode_between(text.substr(begin));
    }

    Result<void> encode_run(std::string_view text) {
        if (text.empty()) return {};
        if (!v_.rules) return encode_sentences(text);
        // no character before U+0300 (lead byte CC) is changed by NFC unless one after it is there
        const bool composed = !v_.rules->compose ||
            std::none_of(text.begin(), text.end(), [](char c) { return uint8_t(c) >= 0xCC; });
        return composed ? encode_words(text) : encode_words(nfc(text));
    }

    Result<void> encode_words(std::string_view text) {
        for (size_t at = 0; at < text.size();) {
            const size_t end = word_end(text, at, *v_.rules);
            if (auto result = encode_word(text.substr(at, end - at)); !result) return result;
            at = end;
        }
        return {};
    }

    Result<void> encode_word(std::string_view word) {
        if (word.size() > sizeof CachedWord::text) return merge_word(word);
        CachedWord& cached = cache_[size_t(hash_piece(word) >> 32) & (cache_.size() - 1)];
        if (std::string_view(cached.text, cached.length) == word) {
            for (uint32_t i = 0; i < cached.count; ++i)
                tokens.push_back(Token(tokens[cached.begin + i]));
            return {};
        }
        const size_t begin = tokens.size();
        auto result = merge_word(word);
        std::memcpy(cached.text, word.data(), word.size());
        cached.length = uint8_t(word.size());
        cached.begin = uint32_t(begin);
        cached.count = uint8_t(tokens.size() - begin);
        return result;
    }

    Result<void> merge_word(std::string_view word) {
        if (v_.rules->whole_words && word.size() <= v_.longest) {
            const Token token = v_.pieces.find(word);
            if (token != no_token && v_.from_text[size_t(token)])
                return tokens.push_back(token), Result<void>();
        }
        auto symbols = symbols_for(word.size());
        if (!symbols) return symbols.error();
        size_t count = 0;
        for (char c : word) {  // a byte without a token is left out, as Hugging Face does
            const Token token = v_.bytes[uint8_t(c)];
            if (token != no_token) (*symbols)[count++].token = token;
            else if (v_.unknown != no_token) (*symbols)[count++].token = v_.unknown;
        }
        auto pairs = [this](const MergeSymbol& left, const MergeSymbol& right) {
            return v_.pairs.find(left.token, right.token);
        };
        MergeLoop(symbols->first(count), pairs).run();
        for (size_t at = 0; count && at != no_symbol; at = (*symbols)[at].next)
            tokens.push_back((*symbols)[at].token);
        return {};
    }

    Result<std::span<MergeSymbol>> symbols_for(size_t count) {
        if (count <= few_.size()) return std::span(few_).first(count);
        if (count * sizeof(MergeSymbol) > many_.size()) {
            auto buffer = Buffer::allocate(uint64_t(count) * sizeof(MergeSymbol), "tokenizer");
            if (!buffer) return buffer.error();
            many_ = std::move(*buffer);
        }
        return std::span(many_.as<MergeSymbol>(), count);
    }

    // SentencePiece: a space in front where the model wants it, then user-defined tokens are cut
    // out, then the rest is merged.
    Result<void> encode_sentences(std::string_view raw) {
        const std::string text =
            (v_.add_space_prefix ? " " : "") + with_spaces(raw);
        return cut_out(v_.whole, text, {}, [this](std::string_view run) -> Result<void> {
            after_unknown_ = false;
            auto symbols = symbols_for(run.size());
            if (!symbols) return symbols.error();
            merge_sentence(run, *symbols, run.size());
            return {};
        });
    }

    // Merges `text` into pieces of at most `longest` bytes and appends them. `symbols` has room
    // for every byte. Recursion: each level is shorter, from max_piece_bytes on.
    void merge_sentence(std::string_view text, std::span<MergeSymbol> symbols, size_t longest) {
        size_t count = 0;
        for (size_t at = 0; at < text.size(); ++count) {
            symbols[count] = {.begin = uint32_t(at)};
            utf8_next(text, &at);
            symbols[count].token = piece_made(text.substr(symbols[count].begin,
                                                          at - symbols[count].begin));
        }
        symbols = symbols.first(count);
        longest = std::min(longest, v_.longest);
        auto end_of = [&](const MergeSymbol& symbol) {
            return symbol.next == no_symbol ? text.size() : symbols[symbol.next].begin;
        };
        auto pairs = [&](const MergeSymbol& left, const MergeSymbol& right) -> Merge {
            const size_t length = end_of(right) - left.begin;
            if (length > longest) return {};
            const Token token = piece_made(text.substr(left.begin, length));
            return token == no_token ? Merge{} : Merge{v_.ranks[size_t(token)], token};
        };
        MergeLoop(symbols, pairs).run();
        for (uint32_t at = 0; count && at != no_symbol; at = symbols[at].next)
            add_piece(text.substr(symbols[at].begin, end_of(symbols[at]) - symbols[at].begin),
                      symbols[at].token);
    }

    Token piece_made(std::string_view piece) const {
        const Token token = v_.pieces.find(piece);
        return token != no_token && v_.from_text[size_t(token)] ? token : no_token;
    }

    void add_piece(std::string_view piece, Token token) {
        const bool unused = token != no_token && v_.kinds[size_t(token)] == TokenKind::unused;
        size_t first = 0;
        utf8_next(piece, &first);
        if (unused && first < piece.size()) {  // only a step: back to what it was merged from
            std::vector<MergeSymbol> symbols(piece.size());
            return merge_sentence(piece, symbols, piece.size() - 1);
        }
        if (unused || token == no_token) return add_unknown(piece);
        tokens.push_back(token);
        after_unknown_ = false;
    }

    // A character that is no piece: its bytes, or one unknown token for all that follow each other.
    void add_unknown(std::string_view bytes) {
        for (char c : bytes) {
            const Token byte = v_.bytes[uint8_t(c)];
            if (byte != no_token) tokens.push_back(byte);
            else if (v_.unknown != no_token && !after_unknown_) tokens.push_back(v_.unknown);
            after_unknown_ = byte == no_token;
        }
    }

    const Vocabulary& v_;
    std::vector<CachedWord> cache_;
    std::array<MergeSymbol, 64> few_;
    Buffer many_;
    bool after_unknown_ = false;
};

Result<void> check_ranges(size_t text_bytes, std::span<const ByteRange> ranges) {
    size_t at = 0;
    for (const ByteRange& range : ranges) {
        if (range.begin < at || range.end < range.begin || range.end > text_bytes)
            return make_error(ErrorKind::internal, "a prompt's byte ranges are out of order");
        at = range.end;
    }
    return {};
}

}  // namespace
}  // namespace detail

// ---- Tokenizer ------------------------------------------------------------------------------

Tokenizer::Tokenizer(std::shared_ptr<const detail::Vocabulary> vocabulary)
    : vocabulary_(std::move(vocabulary)) {}

Result<Tokenizer> Tokenizer::open(const Gguf& file, std::string_view chat_template) {
    auto vocabulary = std::make_shared<detail::Vocabulary>();
    if (auto result = detail::VocabularyReader(file, chat_template, *vocabulary).read(); !result)
        return result.error();
    return Tokenizer(std::move(vocabulary));
}

size_t Tokenizer::size() const { return vocabulary_->kinds.size(); }

std::string_view Tokenizer::piece(Token token) const {
    return size_t(token) < size() ? vocabulary_->pieces[size_t(token)] : std::string_view();
}

TokenKind Tokenizer::kind(Token token) const {
    return size_t(token) < size() ? vocabulary_->kinds[size_t(token)] : TokenKind::unused;
}

bool Tokenizer::is_end(Token token) const {
    return size_t(token) < size() && vocabulary_->ends[size_t(token)];
}

bool Tokenizer::add_bos() const { return vocabulary_->add_bos; }
bool Tokenizer::add_eos() const { return vocabulary_->add_eos; }

namespace detail {
namespace {
std::optional<Token> token_or_nothing(Token token) {
    return token == no_token ? std::nullopt : std::optional<Token>(token);
}
}  // namespace
}  // namespace detail

std::optional<Token> Tokenizer::bos() const { return detail::token_or_nothing(vocabulary_->bos); }
std::optional<Token> Tokenizer::eos() const { return detail::token_or_nothing(vocabulary_->eos); }

std::optional<Token> Tokenizer::find(std::string_view piece) const {
    return detail::token_or_nothing(vocabulary_->pieces.find(piece));
}

Result<std::vector<Token>> Tokenizer::encode(const MarkedText& text, bool add_bos) const {
    return encode(text.text, text.from_request, add_bos);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text, bool add_bos) const {
    const ByteRange everything{0, text.size()};
    return encode(text, {&everything, 1}, add_bos);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text,
                                             std::span<const ByteRange> request,
                                             bool add_bos) const {
    if (text.size() > max_text_bytes)
        return detail::make_error(ErrorKind::too_large,
                                  detail::format("a text of %zu bytes", text.size()));
    if (auto result = detail::check_ranges(text.size(), request); !result) return result.error();
    detail::TextEncoder encoder(*vocabulary_, text.size());
    if (auto result = encoder.encode(text, request); !result) return result.error();
    std::vector<Token>& tokens = encoder.tokens;
    const auto bos = this->bos();
    if (add_bos && bos && (tokens.empty() || tokens[0] != *bos))
        tokens.insert(tokens.begin(), *bos);
    return std::move(tokens);
}

// ---- Detokenizer ----------------------------------------------------------------------------

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool at_start)
    : vocabulary_(tokenizer.vocabulary_), at_start_(at_start) {}

std::string_view Detokenizer::push(Token token) {
    ready_.clear();
    if (size_t(token) >= vocabulary_->kinds.size()) return ready_;
    const TokenKind kind = vocabulary_->kinds[size_t(token)];
    std::string_view piece = vocabulary_->pieces[size_t(token)];
    if (kind == TokenKind::control || kind == TokenKind::unknown || piece.empty()) return ready_;
    if (at_start_ && vocabulary_->add_space_prefix && piece[0] == ' ') piece.remove_prefix(1);
    at_start_ = false;
    held_ += piece;
    take_ready(held_.size() - detail::utf8_incomplete_suffix(held_));
    return ready_;
}

std::string_view Detokenizer::flush() {
    take_ready(held_.size());
    at_start_ = true;
    return ready_;
}

void Detokenizer::take_ready(size_t count) {
    ready_.assign(held_, 0, count);
    held_.erase(0, count);
    if (!detail::utf8_valid(ready_)) ready_ = detail::utf8_repair(ready_);
}

}  // namespace v1
}  // namespace valar

#endif  // VALAR_NO_INFERENCE

// >>template
// In this order: values, the program (a flat syntax tree), lexer, parser, renderer, the tables of
// filters, tests, methods and functions, and last the way from a request to a prompt.

#ifndef VALAR_NO_INFERENCE

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// ---- values ---------------------------------------------------------------------------------
// Immutable and shared. A namespace is the only thing that changes, and lives in the renderer, so
// values form no cycles. Containers know how deep they nest: recursion over them is bounded.

enum class Kind : uint8_t {
    undefined, none, boolean, integer, real, string, list, tuple, iterator, dict,
    name_space, loop, macro, function,
};

struct Value {
    Kind     kind    = Kind::undefined;
    bool     request = false;  // it came from the request; of a string its marks say so, not this
    uint16_t depth   = 0;      // of a container
    union {
        int64_t integer = 0;   // boolean, integer; undefined: its node; name_space: its index
        double  real;
    };
    std::shared_ptr<void> object = {};
};

struct Entry {
    Value key, value;
};

using Text = MarkedText;
using List = std::vector<Value>;
using Dict = std::vector<Entry>;  // few members, found one after another, in order of insertion

const Text& text_in(const Value& v) { return *static_cast<const Text*>(v.object.get()); }
const List& list_in(const Value& v) { return *static_cast<const List*>(v.object.get()); }
const Dict& dict_in(const Value& v) { return *static_cast<const Dict*>(v.object.get()); }
const std::string& chars(const Value& v) { return text_in(v).text; }

bool is_list(const Value& v) { return v.kind == Kind::list || v.kind == Kind::tuple; }
bool is_int(const Value& v) { return v.kind == Kind::integer || v.kind == Kind::boolean; }
bool is_number(const Value& v) { return is_int(v) || v.kind == Kind::real; }
bool is_string(const Value& v) { return v.kind == Kind::string; }
bool is_absent(const Value& v) { return v.kind <= Kind::none; }  // as an optional argument
double number_in(const Value& v) { return is_int(v) ? double(v.integer) : v.real; }

Value make_kind(Kind kind, int64_t integer) {
    Value v;
    v.kind = kind;
    v.integer = integer;
    return v;
}
Value make_none() { return make_kind(Kind::none, 0); }
Value make_bool(bool b) { return make_kind(Kind::boolean, b); }
Value make_int(int64_t i) { return make_kind(Kind::integer, i); }
Value make_real(double d) {
    Value v;
    v.kind = Kind::real;
    v.real = d;
    return v;
}
Value make_text(Text text) {
    Value v;
    v.kind = Kind::string;
    v.object = std::make_shared<Text>(std::move(text));
    return v;
}
Value make_text(std::string_view text) { return make_text(Text{std::string(text), {}}); }

Value make_list(Kind kind, List items) {
    Value v;
    v.kind = kind;
    for (const Value& item : items) v.depth = std::max(v.depth, item.depth);
    ++v.depth;
    v.object = std::make_shared<List>(std::move(items));
    return v;
}
Value make_dict(Dict entries) {
    Value v;
    v.kind = Kind::dict;
    for (const Entry& e : entries) v.depth = std::max({v.depth, e.key.depth, e.value.depth});
    ++v.depth;
    v.object = std::make_shared<Dict>(std::move(entries));
    return v;
}

bool truth(const Value& v) {
    switch (v.kind) {
        case Kind::undefined:
        case Kind::none: return false;
        case Kind::boolean:
        case Kind::integer: return v.integer != 0;
        case Kind::real: return v.real != 0;
        case Kind::string: return !chars(v).empty();
        case Kind::list:
        case Kind::tuple: return !list_in(v).empty();
        case Kind::dict: return !dict_in(v).empty();
        default: return true;  // as Python's generators
    }
}

const char* kind_name(const Value& v) {
    static const char* const names[] = {"Undefined", "None", "bool", "int", "float", "str", "list",
        "tuple", "generator", "dict", "Namespace", "LoopContext", "Macro", "function"};
    return names[size_t(v.kind)];
}

void add_mark(Text& out, size_t begin, size_t end) {
    if (begin == end) return;
    auto& marks = out.from_request;
    if (!marks.empty() && marks.back().end == begin) marks.back().end = end;
    else marks.push_back({begin, end});
}

/// Calls each(piece, from_request) for the stretches of one origin, in order.
template <class Each>
void each_run(const Text& t, Each each) {
    const std::string_view all = t.text;
    size_t at = 0;
    for (const ByteRange& r : t.from_request) {
        if (r.begin > at) each(all.substr(at, r.begin - at), false);
        each(all.substr(r.begin, r.end - r.begin), true);
        at = r.end;
    }
    if (at < all.size()) each(all.substr(at), false);
}

// ---- text without marks ---------------------------------------------------------------------
// All text is valid UTF-8: the source is checked, JSON is, and strings are cut between code points.

bool python_space(char32_t c) { return is_whitespace(c) || (c >= 0x1c && c <= 0x1f); }

bool starts_code_point(char c) { return (uint8_t(c) & 0xc0) != 0x80; }

/// The byte at which code point `index` begins; the size when there are fewer.
size_t byte_of(std::string_view s, size_t index) {
    size_t at = 0;
    for (; at < s.size(); ++at)
        if (starts_code_point(s[at]) && index-- == 0) break;
    return at;
}

size_t count_code_points(std::string_view s) {
    return size_t(std::count_if(s.begin(), s.end(), starts_code_point));
}

size_t previous_code_point(std::string_view s, size_t at) {
    do --at;
    while (at > 0 && !starts_code_point(s[at]));
    return at;
}

/// What is left of s after stripping; `set` null: white space. Sides: 1 left, 2 right.
ByteRange stripped(std::string_view s, const std::string* set, int sides) {
    const auto drops = [&](char32_t c, std::string_view bytes) {
        return set ? set->find(bytes) != std::string::npos : python_space(c);
    };
    ByteRange r{0, s.size()};
    while ((sides & 1) && r.begin < r.end) {
        size_t next = r.begin;
        const char32_t c = utf8_next(s, &next);
        if (!drops(c, s.substr(r.begin, next - r.begin))) break;
        r.begin = next;
    }
    while ((sides & 2) && r.begin < r.end) {
        const size_t before = previous_code_point(s, r.end);
        size_t at = before;
        const char32_t c = utf8_next(s, &at);
        if (!drops(c, s.substr(before, r.end - before))) break;
        r.end = before;
    }
    return r;
}

/// Where `needle` begins in `text` at or after `from`, or npos, in linear time: a request may bring
/// both. (Knuth, Morris, Pratt 1977; the library's search is quadratic but fast for short needles.)
size_t find_text(std::string_view text, std::string_view needle, size_t from = 0) {
    if (needle.size() <= 32 || needle.size() > text.size()) return text.find(needle, from);
    std::vector<uint32_t> border(needle.size() + 1, 0);  // of needle's first i bytes
    for (uint32_t i = 1, k = 0; i < needle.size(); ++i) {
        while (k > 0 && needle[i] != needle[k]) k = border[k];
        if (needle[i] == needle[k]) ++k;
        border[i + 1] = k;
    }
    uint32_t k = 0;
    for (size_t i = from; i < text.size(); ++i) {
        while (k > 0 && text[i] != needle[k]) k = border[k];
        if (text[i] == needle[k] && ++k == needle.size()) return i + 1 - k;
    }
    return std::string_view::npos;
}

std::string number_text(const Value& v) {
    if (is_int(v)) return std::to_string(v.integer);
    if (std::isfinite(v.real)) return write_double(v.real);
    return std::isnan(v.real) ? "nan" : v.real > 0 ? "inf" : "-inf";
}

// ---- program --------------------------------------------------------------------------------

enum class Op : uint8_t {
    // statements; children in comments, those in brackets may be node 0: nothing
    body,         // statements
    text,         // value: index into texts
    print,        // expression
    choice,       // condition, body, condition, body ..., [body of else]: an odd number of children
    loop,         // target, iterable, [condition], body, [body of else]
    set,          // target, expression
    set_block,    // target, body, filters ...
    macro,        // value: name; body, parameters (keyword) ...
    filter_block, // body, filters ...
    scope,        // body
    break_loop, continue_loop,
    // expressions
    constant,     // value: index into constants
    name,         // value: name
    list, tuple,  // expressions
    dict,         // key, value, key, value ...
    conditional,  // condition, then, [else]
    any, all,     // expressions: or, and
    negation,     // expression: not
    minus, plus,  // expression
    comparison,   // expression, then equal ... not_in
    chain,        // expression, then what follows here: applied from left to right
    add, subtract, multiply, divide, floor_divide, modulo, power, concat,  // expression
    attribute,    // value: name
    item,         // expression
    slice,        // [begin], [end], [step]
    call,         // expressions and keywords
    filter,       // value: name; expressions and keywords
    test,         // value: name; expressions and keywords; flag: negated
    equal, not_equal, less, less_equal, greater, greater_equal, in, not_in,  // expression
    keyword,      // value: name; [expression]
    field,        // a target: value: name of the attribute; name of the namespace
};

struct Node {
    Op       op    = Op::body;
    bool     flag  = false;
    uint32_t line  = 0;
    uint32_t value = 0;
    uint32_t first = 0;  // of its children in links
    uint32_t count = 0;
};

}  // namespace jinja

struct TemplateProgram {
    std::string                 source;
    std::vector<jinja::Node>    nodes = {jinja::Node{}};
    std::vector<uint32_t>       links;
    std::vector<jinja::Value>   constants;
    std::vector<std::string>    texts;  // outside of tags
    std::vector<std::string>    names;
    std::optional<uint32_t>     loop_name;  // of "loop", where the template uses it
    uint32_t                    root = 0;

    std::span<const uint32_t> children(const jinja::Node& node) const {
        return std::span(links).subspan(node.first, node.count);
    }
};

namespace jinja {

Error template_error(ErrorKind kind, uint32_t line, std::string_view what) {
    constexpr size_t limit = 1000;  // names in it may be of any length
    what = what.substr(0, what.size() > limit ? utf8_valid_prefix(what.substr(0, limit)) : limit);
    return make_error(kind, format("chat template, line %u: ", unsigned(line)) + std::string(what));
}

// ---- lexer ----------------------------------------------------------------------------------

struct Lexeme {
    enum class Type : uint8_t { text, begin_print, end_print, begin_tag, end_tag, name, string,
                                integer, real, symbol, end };
    Type             type = Type::end;
    std::string_view text = {};
    uint32_t         line = 1;
};

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_name_char(char c) {
    return is_digit(c) || c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           uint8_t(c) >= 0x80;
}

/// Cuts the source into text, tags and what stands in tags, and takes away the white space that
/// `-`, trim_blocks and lstrip_blocks remove. Lexemes borrow from the source.
class Lexer {
public:
    explicit Lexer(std::string_view source) : s_(source) {}
    std::vector<Lexeme> run();
    const std::optional<Error>& error() const { return error_; }

private:
    void advance(size_t to);
    void push(Lexeme::Type type, size_t to);
    void fail(const std::string& what) {
        error_ = template_error(ErrorKind::bad_data, line_, what);
    }
    size_t next_opener() const;
    void text_before(size_t opener, char sign, bool tag);
    size_t closed_at(size_t at, char kind) const;
    void comment();
    size_t raw_tag(size_t at, std::string_view word) const;
    void raw(size_t begin);
    void inside(char kind);
    void lexeme();
    size_t number_end(bool* real) const;
    bool bracket(char c);

    std::string_view     s_;
    size_t               at_ = 0;
    uint32_t             line_ = 1;
    bool                 line_start_ = true;  // what was cut off last ended with a line
    std::string          open_ = {};          // the closers of brackets that are open
    std::vector<Lexeme>  out_ = {};
    std::optional<Error> error_ = {};
};

std::vector<Lexeme> Lexer::run() {
    while (at_ < s_.size() && !error_) {
        const size_t opener = next_opener();
        if (opener == s_.size()) {
            push(Lexeme::Type::text, opener);
            break;
        }
        const char kind = s_[opener + 1];
        const char next = opener + 2 < s_.size() ? s_[opener + 2] : '\0';
        const char sign = next == '-' || next == '+' ? next : '\0';
        text_before(opener, sign, kind != '{');
        advance(opener + (sign ? 3 : 2));
        const size_t raw_begin = kind == '%' ? raw_tag(at_, "raw") : std::string_view::npos;
        if (kind == '#') comment();
        else if (raw_begin != std::string_view::npos) raw(raw_begin);
        else inside(kind);
    }
    out_.push_back({Lexeme::Type::end, {}, line_});
    return std::move(out_);
}

void Lexer::advance(size_t to) {
    line_ += uint32_t(std::count(s_.begin() + ptrdiff_t(at_), s_.begin() + ptrdiff_t(to), '\n'));
    at_ = to;
}

void Lexer::push(Lexeme::Type type, size_t to) {
    if (type != Lexeme::Type::text || to > at_)
        out_.push_back({type, s_.substr(at_, to - at_), line_});
    advance(to);
}

size_t Lexer::next_opener() const {
    for (size_t i = at_; i + 1 < s_.size(); ++i)
        if (s_[i] == '{' && (s_[i + 1] == '{' || s_[i + 1] == '%' || s_[i + 1] == '#')) return i;
    return s_.size();
}

/// The text up to `opener`, without its end where a sign or, before a tag that stands first in its
/// line, lstrip_blocks takes it away.
void Lexer::text_before(size_t opener, char sign, bool tag) {
    const std::string_view text = s_.substr(at_, opener - at_);
    size_t keep = text.size();
    if (sign == '-') keep = stripped(text, nullptr, 2).end;
    else if (sign != '+' && tag) {
        const size_t line = text.rfind('\n') + 1;  // 0 when there is none
        const bool blank = stripped(text.substr(line), nullptr, 2).end == 0;
        if ((line > 0 || line_start_) && blank) keep = line;
    }
    push(Lexeme::Type::text, at_ + keep);
    advance(opener);
}

/// Behind the closer at `at`, and the white space it takes away; npos when none is there.
size_t Lexer::closed_at(size_t at, char kind) const {
    const char sign = s_[at] == '-' || (s_[at] == '+' && kind != '{') ? s_[at] : '\0';
    const size_t closer = at + (sign ? 1 : 0);
    if (closer + 1 >= s_.size() || s_[closer + 1] != '}') return std::string_view::npos;
    if (s_[closer] != (kind == '{' ? '}' : kind)) return std::string_view::npos;
    const size_t end = closer + 2;
    if (sign == '-') return end + stripped(s_.substr(end), nullptr, 1).begin;
    return end + (kind != '{' && !sign && end < s_.size() && s_[end] == '\n');
}

void Lexer::comment() {
    size_t end = s_.find("#}", at_);
    if (end == std::string_view::npos) return fail("a comment without end");
    if (end > at_ && (s_[end - 1] == '-' || s_[end - 1] == '+')) --end;
    advance(closed_at(end, '#'));
    line_start_ = s_[at_ - 1] == '\n';
}

/// Behind "word %}" at `at`; npos when something else is there.
size_t Lexer::raw_tag(size_t at, std::string_view word) const {
    const auto skip = [&] { while (at < s_.size() && is_space(s_[at])) ++at; };
    skip();
    if (s_.substr(at, word.size()) != word) return std::string_view::npos;
    at += word.size();
    skip();
    return at < s_.size() ? closed_at(at, '%') : std::string_view::npos;
}

/// {% raw %} ... {% endraw %}: text, whatever it looks like.
void Lexer::raw(size_t begin) {
    // The newline behind {% raw %} stays, unlike behind any other tag.
    if (s_[begin - 1] == '\n' && s_.substr(begin - 3, 2) == "%}" && s_[begin - 4] != '-') --begin;
    advance(begin);
    line_start_ = false;
    for (size_t i = begin; (i = s_.find("{%", i)) != std::string_view::npos; i += 2) {
        const char sign =
            i + 2 < s_.size() && (s_[i + 2] == '-' || s_[i + 2] == '+') ? s_[i + 2] : '\0';
        const size_t end = raw_tag(i + (sign ? 3 : 2), "endraw");
        if (end == std::string_view::npos) continue;
        text_before(i, sign, true);
        advance(end);
        line_start_ = s_[at_ - 1] == '\n';
        return;
    }
    fail("raw without endraw");
}

/// From behind an opener to behind its closer.
void Lexer::inside(char kind) {
    const bool print = kind == '{';
    out_.push_back({print ? Lexeme::Type::begin_print : Lexeme::Type::begin_tag, {}, line_});
    open_.clear();
    while (!error_) {
        size_t next = at_;
        while (next < s_.size() && is_space(s_[next])) ++next;
        advance(next);
        if (at_ == s_.size()) return fail("a tag without end");
        const size_t end = open_.empty() ? closed_at(at_, kind) : std::string_view::npos;
        if (end == std::string_view::npos) {
            lexeme();
            continue;
        }
        out_.push_back({print ? Lexeme::Type::end_print : Lexeme::Type::end_tag, {}, line_});
        advance(end);
        line_start_ = s_[at_ - 1] == '\n';
        return;
    }
}

/// The end of the number at at_: an integer of any base, or digits with a fraction or an exponent.
size_t Lexer::number_end(bool* real) const {
    const auto digits = [&](size_t i) {
        while (i < s_.size() && (is_digit(s_[i]) || s_[i] == '_')) ++i;
        return i;
    };
    const auto digit_at = [&](size_t i) { return i < s_.size() && is_digit(s_[i]); };
    if (s_[at_] == '0' && at_ + 1 < s_.size() && std::strchr("xXoObB", s_[at_ + 1])) {
        size_t i = at_ + 2;
        while (i < s_.size() && is_name_char(s_[i])) ++i;
        return i;
    }
    size_t end = digits(at_);
    if (at_ > 0 && s_[at_ - 1] == '.') return end;  // the 0 of list.0.name
    if (end < s_.size() && s_[end] == '.' && digit_at(end + 1)) *real = true, end = digits(end + 1);
    if (end < s_.size() && (s_[end] == 'e' || s_[end] == 'E')) {
        const size_t sign = end + 1 < s_.size() && (s_[end + 1] == '+' || s_[end + 1] == '-');
        if (digit_at(end + 1 + sign)) *real = true, end = digits(end + 1 + sign);
    }
    return end;
}

/// Keeps track of brackets: inside of them }} and %} do not end a tag.
bool Lexer::bracket(char c) {
    if (c == '(' || c == '[' || c == '{') open_ += c == '(' ? ')' : c == '[' ? ']' : '}';
    if (c != ')' && c != ']' && c != '}') return true;
    if (open_.empty() || open_.back() != c) return false;
    open_.pop_back();
    return true;
}

void Lexer::lexeme() {
    const char c = s_[at_];
    if (is_digit(c)) {
        bool real = false;
        const size_t end = number_end(&real);
        return push(real ? Lexeme::Type::real : Lexeme::Type::integer, end);
    }
    if (is_name_char(c)) {
        size_t end = at_;
        while (end < s_.size() && is_name_char(s_[end])) ++end;
        return push(Lexeme::Type::name, end);
    }
    if (c == '"' || c == '\'') {
        size_t end = at_ + 1;
        while (end < s_.size() && s_[end] != c) end += s_[end] == '\\' ? 2 : 1;
        if (end >= s_.size()) return fail("a string without end");
        return push(Lexeme::Type::string, end + 1);
    }
    static const char* const pairs[] = {"//", "**", "==", "!=", ">=", "<="};
    for (const char* pair : pairs)
        if (s_.substr(at_, 2) == pair) return push(Lexeme::Type::symbol, at_ + 2);
    if (c == '\0' || !std::strchr("+-/*%~[](){}><=.:|,;", c) || !bracket(c))
        return fail(format("unexpected character \"%c\"", c >= ' ' && c < 127 ? c : '?'));
    push(Lexeme::Type::symbol, at_ + 1);
}

// ---- parser ---------------------------------------------------------------------------------
// Recursive descent in Jinja's own order of precedence. What chains from left to right becomes one
// node with many children, so that the tree is as deep as the source nests, no deeper. After the
// first error the parser stands at the end of the lexemes, where all loops end.

class Parser {
public:
    explicit Parser(TemplateProgram& program, std::vector<Lexeme> lexemes)
        : p_(program), lexemes_(std::move(lexemes)) {}
    Result<void> run() {
        p_.root = body({});
        if (const auto loop = name_ids_.find("loop"); loop != name_ids_.end())
            p_.loop_name = loop->second;
        if (error_) return *error_;
        return {};
    }

private:
    using Type = Lexeme::Type;
    using Ids = std::vector<uint32_t>;
    struct Statement {
        const char* name;
        uint32_t (Parser::*parse)(uint32_t line);
    };
    static const Statement statements[];

    /// One level of nesting of the source.
    struct Nested {
        explicit Nested(Parser& parser) : parser_(parser) {
            if (++parser_.depth_ > ChatTemplate::max_nesting) parser_.fail("nested too deep");
        }
        ~Nested() { --parser_.depth_; }
        Nested(const Nested&) = delete;
        Parser& parser_;
    };

    const Lexeme& now() const { return lexemes_[at_]; }
    const Lexeme& peek() const { return lexemes_[std::min(at_ + 1, lexemes_.size() - 1)]; }
    Lexeme next();
    uint32_t fail(const std::string& what);
    bool is(Type type, std::string_view text) const {
        return now().type == type && now().text == text;
    }
    bool is(const char* symbol) const { return is(Type::symbol, symbol); }
    bool is_word(const char* word) const { return is(Type::name, word); }
    bool take(const char* symbol);
    bool take_word(const char* word);
    void expect(const char* symbol);
    void expect_word(const char* word);
    void expect(Type type, const char* what);
    uint32_t node(Op op, uint32_t line, uint32_t value, const Ids& children, bool flag = false);
    uint32_t name_id(std::string_view name);
    uint32_t expect_name();
    uint32_t constant(Value value, uint32_t line);

    uint32_t body(std::initializer_list<const char*> ends);
    uint32_t statement();
    uint32_t end_block(std::initializer_list<const char*> ends);
    uint32_t if_statement(uint32_t line);
    uint32_t for_statement(uint32_t line);
    uint32_t set_statement(uint32_t line);
    uint32_t macro_statement(uint32_t line);
    uint32_t filter_statement(uint32_t line);
    uint32_t with_statement(uint32_t line);
    uint32_t generation_statement(uint32_t line);
    uint32_t break_statement(uint32_t line);
    uint32_t continue_statement(uint32_t line);
    uint32_t target(bool fields);
    uint32_t single_target(bool fields);

    uint32_t expression(bool conditionals = true);
    uint32_t tuple(bool conditionals, bool parenthesised = false);
    uint32_t logic(Op op);
    uint32_t negation();
    uint32_t comparison();
    uint32_t arithmetic(size_t level);
    uint32_t unary(bool filters);
    uint32_t primary();
    uint32_t word();
    uint32_t string();
    uint32_t number();
    uint32_t list();
    uint32_t dict();
    bool postfix(Ids& chain);
    bool filter_or_test(Ids& chain);
    uint32_t subscript();
    uint32_t test();
    Ids arguments();
    Ids filters();
    uint32_t chained(uint32_t line, const Ids& chain);

    TemplateProgram&                          p_;
    std::vector<Lexeme>                       lexemes_;
    std::unordered_map<std::string, uint32_t> name_ids_ = {};
    size_t                                    at_ = 0;
    uint32_t                                  depth_ = 0;
    uint32_t                                  loops_ = 0;  // around this place
    std::optional<Error>                      error_ = {};
};

Lexeme Parser::next() {
    const Lexeme lexeme = now();
    if (at_ + 1 < lexemes_.size()) ++at_;
    return lexeme;
}

uint32_t Parser::fail(const std::string& what) {
    if (!error_) error_ = template_error(ErrorKind::bad_data, now().line, what);
    at_ = lexemes_.size() - 1;
    return 0;
}

bool Parser::take(const char* symbol) { return is(symbol) && (next(), true); }
bool Parser::take_word(const char* word) { return is_word(word) && (next(), true); }

void Parser::expect(const char* symbol) {
    if (!take(symbol)) fail("expected \"" + std::string(symbol) + "\"");
}
void Parser::expect_word(const char* word) {
    if (!take_word(word)) fail("expected \"" + std::string(word) + "\"");
}
void Parser::expect(Type type, const char* what) {
    if (now().type == type) next();
    else fail("expected " + std::string(what));
}

uint32_t Parser::node(Op op, uint32_t line, uint32_t value, const Ids& children, bool flag) {
    const uint32_t first = uint32_t(p_.links.size());
    p_.links.insert(p_.links.end(), children.begin(), children.end());
    p_.nodes.push_back({op, flag, line, value, first, uint32_t(children.size())});
    return uint32_t(p_.nodes.size() - 1);
}

uint32_t Parser::name_id(std::string_view name) {
    const auto [place, fresh] = name_ids_.try_emplace(std::string(name), uint32_t(p_.names.size()));
    if (fresh) p_.names.emplace_back(name);
    return place->second;
}

uint32_t Parser::expect_name() {
    if (now().type != Type::name) return fail("expected a name");
    return name_id(next().text);
}

uint32_t Parser::constant(Value value, uint32_t line) {
    p_.constants.push_back(std::move(value));
    return node(Op::constant, line, uint32_t(p_.constants.size() - 1), {});
}

// statements

const Parser::Statement Parser::statements[] = {
    {"if", &Parser::if_statement},
    {"for", &Parser::for_statement},
    {"set", &Parser::set_statement},
    {"macro", &Parser::macro_statement},
    {"filter", &Parser::filter_statement},
    {"with", &Parser::with_statement},
    {"generation", &Parser::generation_statement},
    {"break", &Parser::break_statement},
    {"continue", &Parser::continue_statement},
};

/// Statements up to the tag that begins with one of `ends`, and stops at that word; with no ends,
/// up to the end of the source.
uint32_t Parser::body(std::initializer_list<const char*> ends) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    Ids children;
    while (now().type != Type::end) {
        const Lexeme lexeme = next();
        if (lexeme.type == Type::text) {
            p_.texts.emplace_back(lexeme.text);
            children.push_back(node(Op::text, lexeme.line, uint32_t(p_.texts.size() - 1), {}));
        } else if (lexeme.type == Type::begin_print) {
            const uint32_t value = tuple(true);
            children.push_back(node(Op::print, lexeme.line, 0, {value}));
            expect(Type::end_print, "\"}}\"");
        } else {
            for (const char* end : ends)
                if (is_word(end)) return node(Op::body, line, 0, children);
            children.push_back(statement());
        }
    }
    if (ends.size() > 0)
        return fail("expected \"" + std::string(*(ends.end() - 1)) + "\" before the end");
    return node(Op::body, line, 0, children);
}

uint32_t Parser::statement() {
    if (now().type != Type::name) return fail("expected the name of a statement");
    for (const Statement& s : statements) {
        if (!is_word(s.name)) continue;
        const uint32_t line = next().line;
        const uint32_t made = (this->*s.parse)(line);
        expect(Type::end_tag, "\"%}\"");
        return made;
    }
    return fail("unknown statement \"" + std::string(now().text) + "\"");
}

/// "%} statements {% end", behind the end's name.
uint32_t Parser::end_block(std::initializer_list<const char*> ends) {
    expect(Type::end_tag, "\"%}\"");
    const uint32_t made = body(ends);
    next();
    return made;
}

uint32_t Parser::if_statement(uint32_t line) {
    Ids children;
    for (;;) {
        children.push_back(tuple(false));
        expect(Type::end_tag, "\"%}\"");
        children.push_back(body({"elif", "else", "endif"}));
        if (!take_word("elif")) break;
    }
    children.push_back(take_word("else") ? end_block({"endif"}) : (next(), 0u));
    return node(Op::choice, line, 0, children);
}

uint32_t Parser::for_statement(uint32_t line) {
    const uint32_t what = target(false);
    expect_word("in");
    const uint32_t iterable = tuple(false);
    const uint32_t condition = take_word("if") ? expression() : 0;
    if (is_word("recursive")) return fail("recursive loops are not supported");
    expect(Type::end_tag, "\"%}\"");
    ++loops_;
    const uint32_t inner = body({"else", "endfor"});
    --loops_;
    const uint32_t otherwise = take_word("else") ? end_block({"endfor"}) : (next(), 0u);
    return node(Op::loop, line, 0, {what, iterable, condition, inner, otherwise});
}

uint32_t Parser::set_statement(uint32_t line) {
    const uint32_t what = target(true);
    if (take("=")) return node(Op::set, line, 0, {what, tuple(true)});
    Ids children = {what, 0};
    const Ids pipes = filters();
    children.insert(children.end(), pipes.begin(), pipes.end());
    children[1] = end_block({"endset"});
    return node(Op::set_block, line, 0, children);
}

uint32_t Parser::macro_statement(uint32_t line) {
    const uint32_t name = expect_name();
    Ids children = {0};
    expect("(");
    while (!take(")") && now().type != Type::end) {
        if (children.size() > 1) expect(",");
        const uint32_t at = now().line, parameter = expect_name();
        children.push_back(node(Op::keyword, at, parameter, {take("=") ? expression() : 0}));
    }
    const uint32_t loops = std::exchange(loops_, 0);
    children[0] = end_block({"endmacro"});
    loops_ = loops;
    return node(Op::macro, line, name, children);
}

uint32_t Parser::filter_statement(uint32_t line) {
    const uint32_t first_line = now().line, name = expect_name();
    Ids children = {0, node(Op::filter, first_line, name, arguments())};
    const Ids pipes = filters();
    children.insert(children.end(), pipes.begin(), pipes.end());
    children[0] = end_block({"endfilter"});
    return node(Op::filter_block, line, 0, children);
}

/// {% with a = 1, b = 2 %}: a scope that begins with assignments.
uint32_t Parser::with_statement(uint32_t line) {
    Ids children;
    while (now().type == Type::name) {
        const uint32_t at = now().line, what = single_target(false);
        expect("=");
        children.push_back(node(Op::set, at, 0, {what, expression()}));
        if (!take(",")) break;
    }
    children.push_back(end_block({"endwith"}));
    return node(Op::scope, line, 0, {node(Op::body, line, 0, children)});
}

/// Marks what the assistant says, for training; here it only bounds the life of variables.
uint32_t Parser::generation_statement(uint32_t line) {
    return node(Op::scope, line, 0, {end_block({"endgeneration"})});
}

uint32_t Parser::break_statement(uint32_t line) {
    if (loops_ == 0) return fail("break outside of a loop");
    return node(Op::break_loop, line, 0, {});
}

uint32_t Parser::continue_statement(uint32_t line) {
    if (loops_ == 0) return fail("continue outside of a loop");
    return node(Op::continue_loop, line, 0, {});
}

/// What is assigned to: a name, names for the items of a list, a field of a namespace.
uint32_t Parser::target(bool fields) {
    const uint32_t line = now().line;
    Ids items = {single_target(fields)};
    if (!is(",")) return items[0];
    while (take(","))
        if (now().type == Type::name || is("(")) {
            if (is_word("in")) break;
            items.push_back(single_target(fields));
        }
    return node(Op::tuple, line, 0, items);
}

uint32_t Parser::single_target(bool fields) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    if (take("(")) {
        const uint32_t inner = target(fields);
        expect(")");
        return inner;
    }
    static const char* const reserved[] = {"true", "false", "none", "True", "False", "None"};
    for (const char* w : reserved)
        if (is_word(w)) return fail("cannot assign to " + std::string(w));
    const uint32_t name = node(Op::name, line, expect_name(), {});
    return fields && take(".") ? node(Op::field, line, expect_name(), {name}) : name;
}

// expressions

/// "then if condition else otherwise", or what it is made of.
uint32_t Parser::expression(bool conditionals) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    uint32_t made = logic(Op::any);
    while (conditionals && take_word("if")) {
        const uint32_t condition = logic(Op::any);
        const uint32_t otherwise = take_word("else") ? expression() : 0;
        made = node(Op::conditional, line, 0, {condition, made, otherwise});
    }
    return made;
}

/// Expressions with commas between them; a single one without comma is itself.
uint32_t Parser::tuple(bool conditionals, bool parenthesised) {
    const uint32_t line = now().line;
    Ids items;
    bool comma = false;
    do {
        if (now().type == Type::end_print || now().type == Type::end_tag || is(")")) break;
        items.push_back(expression(conditionals));
    } while (take(",") && (comma = true));
    if (comma || (items.empty() && parenthesised)) return node(Op::tuple, line, 0, items);
    return items.empty() ? fail("expected an expression") : items[0];
}

uint32_t Parser::logic(Op op) {
    const uint32_t line = now().line;
    const auto operand = [&] { return op == Op::any ? logic(Op::all) : negation(); };
    Ids items = {operand()};
    while (take_word(op == Op::any ? "or" : "and")) items.push_back(operand());
    return items.size() == 1 ? items[0] : node(op, line, 0, items);
}

uint32_t Parser::negation() {
    const uint32_t line = now().line;
    if (!take_word("not")) return comparison();
    const Nested nested(*this);
    return node(Op::negation, line, 0, {negation()});
}

uint32_t Parser::comparison() {
    static const struct {
        const char* symbol;
        Op          op;
    } operators[] = {{"==", Op::equal}, {"!=", Op::not_equal}, {"<", Op::less},
                     {"<=", Op::less_equal}, {">", Op::greater}, {">=", Op::greater_equal}};
    const uint32_t begin = now().line;
    Ids items = {arithmetic(0)};
    for (;;) {
        const uint32_t line = now().line;
        Op op = Op::body;
        for (const auto& o : operators)
            if (take(o.symbol)) op = o.op;
        if (op == Op::body && take_word("in")) op = Op::in;
        if (op == Op::body && is_word("not") && peek().type == Type::name && peek().text == "in")
            next(), next(), op = Op::not_in;
        if (op == Op::body) break;
        items.push_back(node(op, line, 0, {arithmetic(0)}));
    }
    return items.size() == 1 ? items[0] : node(Op::comparison, begin, 0, items);
}

uint32_t Parser::arithmetic(size_t level) {
    static const struct {
        const char* symbol;
        size_t      level;
        Op          op;
    } operators[] = {{"+", 0, Op::add}, {"-", 0, Op::subtract}, {"~", 1, Op::concat},
                     {"*", 2, Op::multiply}, {"//", 2, Op::floor_divide}, {"/", 2, Op::divide},
                     {"%", 2, Op::modulo}, {"**", 3, Op::power}};
    if (level == 4) return unary(true);
    const uint32_t begin = now().line;
    Ids chain = {arithmetic(level + 1)};
    for (bool found = true; found;) {
        found = false;
        for (const auto& o : operators) {
            const uint32_t line = now().line;
            if (o.level != level || !take(o.symbol)) continue;
            chain.push_back(node(o.op, line, 0, {arithmetic(level + 1)}));
            found = true;
        }
    }
    return chained(begin, chain);
}

uint32_t Parser::chained(uint32_t line, const Ids& chain) {
    return chain.size() == 1 ? chain[0] : node(Op::chain, line, 0, chain);
}

uint32_t Parser::unary(bool with_filters) {
    const uint32_t line = now().line;
    const bool minus = is("-");
    Ids chain;
    if (minus || is("+")) {
        const Nested nested(*this);
        next();
        chain = {node(minus ? Op::minus : Op::plus, line, 0, {unary(false)})};
    } else {
        chain = {primary()};
    }
    while (postfix(chain)) {}
    while (with_filters && filter_or_test(chain)) {}
    return chained(line, chain);
}

uint32_t Parser::primary() {
    switch (now().type) {
        case Type::name: return word();
        case Type::string: return string();
        case Type::integer:
        case Type::real: return number();
        default: break;
    }
    if (is("[")) return list();
    if (is("{")) return dict();
    if (!take("(")) return fail("expected an expression");
    const uint32_t made = tuple(true, true);
    expect(")");
    return made;
}

uint32_t Parser::word() {
    static const struct {
        const char* word;
        Kind        kind;
        int64_t     value;
    } constants[] = {{"true", Kind::boolean, 1}, {"True", Kind::boolean, 1},
                     {"false", Kind::boolean, 0}, {"False", Kind::boolean, 0},
                     {"none", Kind::none, 0}, {"None", Kind::none, 0}};
    const Lexeme lexeme = next();
    for (const auto& c : constants)
        if (lexeme.text == c.word) return constant(make_kind(c.kind, c.value), lexeme.line);
    return node(Op::name, lexeme.line, name_id(lexeme.text), {});
}

/// Appends the escape behind the backslash at s[at - 1]; gives the place behind it, 0 when it is
/// malformed. As in Python, an unknown escape stands for itself.
size_t unescape(std::string_view s, size_t at, std::string& out) {
    static const char plain[] = "n\nt\tr\r\\\\'\'\"\"a\ab\bf\fv\v";
    const char c = s[at];
    for (size_t i = 0; plain[i]; i += 2)
        if (plain[i] == c) return out += plain[i + 1], at + 1;
    if (c == '\n') return at + 1;
    const bool octal = c >= '0' && c <= '7';
    const size_t digits = octal ? 3 : c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) return out += '\\', at;
    uint32_t code = 0;
    size_t i = octal ? at : at + 1, end = std::min(i + digits, s.size());
    for (; i < end; ++i) {
        const char d = s[i];
        const int digit = is_digit(d) ? d - '0' : d >= 'a' && d <= 'f' ? d - 'a' + 10
                        : d >= 'A' && d <= 'F' ? d - 'A' + 10 : 16;
        if (digit >= (octal ? 8 : 16)) break;
        code = code * (octal ? 8 : 16) + uint32_t(digit);
    }
    if ((!octal && i != at + 1 + digits) || code > 0x10ffff) return 0;
    utf8_append(out, char32_t(code));
    return i;
}

/// A string literal, or several in a row, which are one.
uint32_t Parser::string() {
    const uint32_t line = now().line;
    std::string out;
    while (now().type == Type::string) {
        const std::string_view s = now().text.substr(1, now().text.size() - 2);
        for (size_t i = 0; i < s.size();) {
            if (s[i] != '\\') out += s[i++];
            else if (i = unescape(s, i + 1, out); i == 0) return fail("a malformed escape");
        }
        next();
    }
    return constant(make_text(Text{std::move(out), {}}), line);
}

uint32_t Parser::number() {
    const Lexeme lexeme = next();
    std::string digits;
    for (char c : lexeme.text)
        if (c != '_') digits += c;
    if (lexeme.type == Type::real) {
        const auto real = parse_double(digits);
        return real ? constant(make_real(*real), lexeme.line) : fail("a malformed number");
    }
    const char mark = digits.size() > 1 && digits[0] == '0' ? char(digits[1] | 32) : '\0';
    const int base = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 10;
    const char* begin = digits.c_str() + (base == 10 ? 0 : 2);
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(begin, &end, base);
    if (errno != 0 || *end != '\0' || end == begin) return fail("a malformed or too large number");
    return constant(make_int(value), lexeme.line);
}

uint32_t Parser::list() {
    const uint32_t line = next().line;
    Ids items;
    while (!take("]") && now().type != Type::end) {
        if (!items.empty()) expect(",");
        if (take("]")) break;
        items.push_back(expression());
    }
    return node(Op::list, line, 0, items);
}

uint32_t Parser::dict() {
    const uint32_t line = next().line;
    Ids items;
    while (!take("}") && now().type != Type::end) {
        if (!items.empty()) expect(",");
        if (take("}")) break;
        items.push_back(expression());
        expect(":");
        items.push_back(expression());
    }
    return node(Op::dict, line, 0, items);
}

bool Parser::postfix(Ids& chain) {
    const uint32_t line = now().line;
    if (take(".")) {
        if (now().type == Type::integer) chain.push_back(node(Op::item, line, 0, {number()}));
        else chain.push_back(node(Op::attribute, line, expect_name(), {}));
    } else if (is("[")) {
        chain.push_back(subscript());
    } else if (is("(")) {
        chain.push_back(node(Op::call, line, 0, arguments()));
    } else {
        return false;
    }
    return true;
}

bool Parser::filter_or_test(Ids& chain) {
    const uint32_t line = now().line;
    if (is("|")) {
        const Ids pipes = filters();
        chain.insert(chain.end(), pipes.begin(), pipes.end());
    } else if (take_word("is")) {
        chain.push_back(test());
    } else if (is("(")) {
        chain.push_back(node(Op::call, line, 0, arguments()));
    } else {
        return false;
    }
    return true;
}

uint32_t Parser::subscript() {
    const Nested nested(*this);
    const uint32_t line = next().line;
    uint32_t parts[3] = {};
    size_t count = 0;
    bool slice = false;
    for (; count < 3; ++count) {
        if (!is(":") && !is("]")) parts[count] = expression();
        if (!take(":")) break;
        slice = true;
    }
    expect("]");
    if (slice) return node(Op::slice, line, 0, {parts[0], parts[1], parts[2]});
    return parts[0] ? node(Op::item, line, 0, {parts[0]}) : fail("expected an index");
}

Parser::Ids Parser::filters() {
    Ids made;
    while (take("|")) {
        const uint32_t line = now().line, name = expect_name();
        made.push_back(node(Op::filter, line, name, arguments()));
    }
    return made;
}

/// Behind "is". One argument may stand without parentheses: `x is divisibleby 3`.
uint32_t Parser::test() {
    const uint32_t line = now().line;
    const bool negated = take_word("not");
    const uint32_t name = expect_name();
    Ids values;
    if (is("(")) values = arguments();
    else if (now().type == Type::string || now().type == Type::integer ||
             now().type == Type::real || is("[") || is("{") ||
             (now().type == Type::name && !is_word("else") && !is_word("or") && !is_word("and"))) {
        if (is_word("is")) return fail("a test of a test");
        Ids chain = {primary()};
        while (postfix(chain)) {}
        values = {chained(line, chain)};
    }
    return node(Op::test, line, name, values, negated);
}

/// "(a, b, name = c)", or nothing at all.
Parser::Ids Parser::arguments() {
    Ids made;
    if (!take("(")) return made;
    bool keywords = false;
    while (!take(")") && now().type != Type::end) {
        if (!made.empty()) expect(",");
        if (take(")")) break;
        const uint32_t line = now().line;
        const bool keyword =
            now().type == Type::name && peek().type == Type::symbol && peek().text == "=";
        if (is("*") || is("**")) fail("arguments from a list or dict are not supported");
        if (keywords && !keyword) fail("an argument without name behind one with a name");
        keywords = keyword;
        const uint32_t name = keyword ? expect_name() : 0;
        if (keyword) next();
        const uint32_t value = expression();
        made.push_back(keyword ? node(Op::keyword, line, name, {value}) : value);
    }
    return made;
}

// ---- renderer -------------------------------------------------------------------------------

enum class Flow : uint8_t { next, break_loop, continue_loop };

struct Arguments {
    List                                            values = {};
    std::vector<std::pair<std::string_view, Value>> named  = {};
};

class Renderer;
using Function = Value (*)(Renderer& r, const Value& self, Arguments& args);

/// A filter, test, method or global function. `parameters`: names with a space between them, `?`
/// behind the optional ones; `args.values` then has one value for each, undefined where none was
/// given. Null: it takes its arguments as they come.
struct Builtin {
    const char* name;
    const char* parameters;
    Function    function;
};

const Builtin* find_filter(std::string_view name);
const Builtin* find_test(std::string_view name);
const Builtin* find_method(const Value& self, std::string_view name);
const Builtin* find_global(std::string_view name);

struct Bound {  // a function value: a method with what it belongs to, or a global function
    Value          self;
    const Builtin* builtin;
};

struct Loop {  // what `loop` is
    Value  items;
    size_t at;
};

struct Macro {
    uint32_t node;
    uint32_t frame;   // where it was defined
    uint64_t serial;  // of that frame
};

/// How values are written: as Python's repr, or as json.dumps.
struct WriteStyle {
    bool        json   = false;
    bool        ascii  = false;
    bool        sorted = false;
    std::string indent = {};
    bool        lines  = false;  // one item a line
    std::string comma  = ", ";
    std::string colon  = ": ";
};

/// One rendering. What fails sets the error, gives undefined, and stops everything else.
class Renderer {
public:
    Renderer(const TemplateProgram& program, int64_t now) : now_s(now), p_(program) {}
    Result<Text> run(const TemplateInput& input);

    const int64_t now_s;

    Value fail(std::string_view what);
    Value raise(std::string_view words);  // the template's own refusal
    bool failed() const { return error_.has_value(); }
    bool charge(uint64_t steps) { return charge_bytes(steps * ChatTemplate::bytes_per_step); }
    bool charge_bytes(uint64_t bytes);

    bool append(Text& out, std::string_view piece, bool request);
    bool append(Text& out, const Text& from, ByteRange range);
    bool append(Text& out, const Text& from) { return append(out, from, {0, from.text.size()}); }
    void print(Text& out, const Value& v);                        // Python's str()
    void write(Text& out, const Value& v, const WriteStyle& style, size_t level, bool request);
    Value to_string(const Value& v);
    Value piece(const Value& string, ByteRange range);            // of a string
    Value list(Kind kind, List items);
    Value dict(Dict entries);
    Value items_of(const Value& v);                               // as a list, for iteration
    bool want(const Value& v, Kind kind);
    std::string what(const Value& v) const;                       // for messages

    bool equal(const Value& a, const Value& b);
    bool less(const Value& a, const Value& b);
    bool contains(const Value& container, const Value& v);
    bool compare(Op op, const Value& a, const Value& b);
    Value binary(Op op, Value a, const Value& b);
    Value attribute(const Value& v, std::string_view name, uint32_t node = 0);
    Value subscript(const Value& v, const Value& key, uint32_t node = 0);
    Value path(const Value& v, const Value& dotted);              // filters' attribute = "a.b"
    Value slice(const Value& v, const Value& begin, const Value& end, const Value& step);
    Value call(const Builtin& builtin, const Value& self, Arguments& args);
    Value name_space(Dict fields);

private:
    struct Frame {
        uint32_t                                parent;
        uint64_t                                serial;
        std::vector<std::pair<uint32_t, Value>> bindings;
    };
    /// One level of evaluation: bounds the machine's stack.
    struct Level {
        explicit Level(Renderer& renderer) : r(renderer) {
            if (++r.levels_ > ChatTemplate::max_levels) r.fail("evaluation nested too deep");
        }
        ~Level() { --r.levels_; }
        Level(const Level&) = delete;
        Renderer& r;
    };

    Value from_json(const Json& json, bool request);
    void bind_context(const Json& object, bool request);

    void push_frame(uint32_t parent) { frames_.push_back({parent, ++serial_, {}}); }
    uint32_t frame() const { return uint32_t(frames_.size() - 1); }
    void assign_name(uint32_t name, Value value);
    Value lookup(const Node& node, uint32_t id);
    void assign(uint32_t target, const Value& value);

    Flow execute(uint32_t id);
    Flow execute_body(const Node& node);
    Flow execute_choice(const Node& node);
    Flow execute_loop(const Node& node);
    Flow execute_scope(uint32_t body);
    Flow execute_capture(const Node& node);
    List selected(const Node& node, const List& items);
    Flow captured(uint32_t body, Value* value);

    Value eval(uint32_t id);
    List eval_all(const Node& node);
    Value eval_dict(const Node& node);
    Value eval_conditional(const Node& node);
    Value eval_logic(const Node& node);
    Value eval_sign(const Node& node);
    Value eval_comparison(const Node& node);
    Value eval_chain(const Node& node);
    Value apply(Value v, uint32_t id);
    Value apply_slice(const Value& v, const Node& node);
    Value apply_builtin(const Value& v, const Node& node);
    Arguments eval_arguments(const Node& node);
    bool bind(const Builtin& builtin, Arguments& args);
    Value call_value(const Value& callee, Arguments& args);
    Value call_macro(const Macro& macro, Arguments& args);
    bool bind_parameters(const Node& node, Arguments& args);
    Value loop_attribute(const Loop& loop, std::string_view name);
    Value concatenated(Value a, const Value& b);
    Value arithmetic(Op op, const Value& a, const Value& b);
    Value repeated(const Value& v, int64_t times);
    void write_container(Text& out, const Value& v, const WriteStyle& style, size_t level,
                         bool request);

    const TemplateProgram& p_;
    std::optional<Error>   error_ = {};
    uint64_t               spent_ = 0;   // in bytes, see ChatTemplate::bytes_per_step
    uint32_t               line_ = 1;
    uint32_t               levels_ = 0;
    uint32_t               calls_ = 0;
    uint64_t               serial_ = 0;
    Text                   output_ = {};
    Text*                  out_ = &output_;
    std::vector<Frame>     frames_ = {};      // the last one is where names are set
    std::vector<Dict>      name_spaces_ = {};
};

Value Renderer::fail(std::string_view what) {
    if (!error_) error_ = template_error(ErrorKind::invalid_request, line_, what);
    return {};
}

Value Renderer::raise(std::string_view words) {
    constexpr size_t limit = 2000;
    if (words.size() > limit) words = words.substr(0, utf8_valid_prefix(words.substr(0, limit)));
    if (!error_) error_ = make_error(ErrorKind::invalid_request, std::string(words));
    return {};
}

bool Renderer::charge_bytes(uint64_t bytes) {
    spent_ += bytes;
    if (spent_ > ChatTemplate::max_steps * ChatTemplate::bytes_per_step) fail("too many steps");
    return !failed();
}

/// What an undefined value is called, or any value's type.
std::string Renderer::what(const Value& v) const {
    if (v.kind != Kind::undefined) return kind_name(v);
    const Node& node = p_.nodes[size_t(v.integer)];
    if (node.op == Op::name || node.op == Op::keyword)
        return "'" + p_.names[node.value] + "' is undefined";
    if (node.op == Op::attribute) return "there is no attribute '" + p_.names[node.value] + "'";
    return node.op == Op::item ? "there is no such item" : "the value is undefined";
}

bool Renderer::want(const Value& v, Kind kind) {
    if (v.kind == kind || (kind == Kind::integer && v.kind == Kind::boolean)) return true;
    fail("expected " + std::string(kind_name(make_kind(kind, 0))) + ", but " +
         (v.kind == Kind::undefined ? "" : "got ") + what(v));
    return false;
}

// text

bool Renderer::append(Text& out, std::string_view piece, bool request) {
    if (!charge_bytes(piece.size() + 16)) return false;  // 16: of a mark
    if (piece.size() > ChatTemplate::max_output_bytes - out.text.size())
        return fail("a text of over 16 MiB"), false;
    if (request) add_mark(out, out.text.size(), out.text.size() + piece.size());
    out.text += piece;
    return true;
}

bool Renderer::append(Text& out, const Text& from, ByteRange range) {
    const size_t base = out.text.size();
    const std::string_view bytes =
        std::string_view(from.text).substr(range.begin, range.end - range.begin);
    if (!append(out, bytes, false)) return false;
    const auto& marks = from.from_request;
    auto mark = std::upper_bound(marks.begin(), marks.end(), range.begin,
                                 [](size_t at, const ByteRange& r) { return at < r.end; });
    for (; mark != marks.end() && mark->begin < range.end; ++mark) {
        add_mark(out, base + std::max(mark->begin, range.begin) - range.begin,
                 base + std::min(mark->end, range.end) - range.begin);
        if (!charge_bytes(16)) return false;
    }
    return true;
}

void Renderer::print(Text& out, const Value& v) {
    if (is_string(v)) append(out, text_in(v));
    else if (v.kind != Kind::undefined) write(out, v, {}, 0, false);
}

Value Renderer::to_string(const Value& v) {
    if (is_string(v)) return v;
    Text text;
    print(text, v);
    return make_text(std::move(text));
}

Value Renderer::piece(const Value& string, ByteRange range) {
    Text text;
    charge(1);
    append(text, text_in(string), range);
    return make_text(std::move(text));
}

// containers

Value Renderer::list(Kind kind, List items) {
    charge_bytes(items.size() * sizeof(Value));
    Value made = make_list(kind, std::move(items));
    return made.depth > ChatTemplate::max_value_depth ? fail("lists nested too deep") : made;
}

Value Renderer::dict(Dict entries) {
    charge_bytes(entries.size() * sizeof(Entry));
    Value made = make_dict(std::move(entries));
    return made.depth > ChatTemplate::max_value_depth ? fail("dicts nested too deep") : made;
}

Value Renderer::name_space(Dict fields) {
    name_spaces_.push_back(std::move(fields));
    return make_kind(Kind::name_space, int64_t(name_spaces_.size() - 1));
}

const Value* find_entry(const Dict& dict, std::string_view key) {
    for (const Entry& e : dict)
        if (is_string(e.key) && chars(e.key) == key) return &e.value;
    return nullptr;
}

const Value* find_entry(const Dict& dict, const Value& key) {
    if (is_string(key)) return find_entry(dict, chars(key));
    for (const Entry& e : dict)
        if (is_number(key) ? is_number(e.key) && number_in(e.key) == number_in(key)
                           : e.key.kind == key.kind)
            return &e.value;
    return nullptr;
}

void set_entry(Dict& dict, Value key, Value value) {
    if (const Value* found = find_entry(dict, key)) *const_cast<Value*>(found) = std::move(value);
    else dict.push_back({std::move(key), std::move(value)});
}

Value Renderer::items_of(const Value& v) {
    List items;
    switch (v.kind) {
        case Kind::list:
        case Kind::tuple:
        case Kind::iterator: return v;
        case Kind::undefined: break;
        case Kind::dict:
            for (const Entry& e : dict_in(v)) items.push_back(e.key);
            break;
        case Kind::string:
            for (size_t at = 0, end; at < chars(v).size() && !failed(); at = end) {
                end = at;
                utf8_next(chars(v), &end);
                items.push_back(piece(v, {at, end}));
            }
            break;
        default: return fail("'" + what(v) + "' is not iterable");
    }
    return list(Kind::list, std::move(items));
}

// context

Value Renderer::from_json(const Json& json, bool request) {
    Value v;
    switch (json.kind()) {
        case Json::Kind::null: v = make_none(); break;
        case Json::Kind::boolean: v = make_bool(json.as_bool()); break;
        case Json::Kind::int64: v = make_int(json.as_int()); break;
        case Json::Kind::uint64:  // over 63 bits
        case Json::Kind::real: v = make_real(json.as_double()); break;
        case Json::Kind::string: {
            Text text{std::string(json.as_string()), {}};
            if (request) add_mark(text, 0, text.text.size());
            v = make_text(std::move(text));
            break;
        }
        case Json::Kind::array: {
            List items;
            items.reserve(json.size());
            for (const Json& item : json.items()) items.push_back(from_json(item, request));
            v = make_list(Kind::list, std::move(items));
            break;
        }
        case Json::Kind::object: {
            Dict entries;
            entries.reserve(json.size());
            for (const JsonMember& m : json.members()) {
                Text key{m.key, {}};
                if (request) add_mark(key, 0, key.text.size());
                entries.push_back({make_text(std::move(key)), from_json(m.value, request)});
            }
            v = make_dict(std::move(entries));
            break;
        }
    }
    v.request = request && !is_string(v);
    return v;
}

/// A role that spells one of the six is a word of the template's.
void trust_roles(const Value& messages) {
    static const char* const roles[] = {"system",    "developer", "user",
                                        "assistant", "tool",      "function"};
    if (!is_list(messages)) return;
    for (const Value& message : list_in(messages)) {
        const Value* role =
            message.kind == Kind::dict ? find_entry(dict_in(message), "role") : nullptr;
        if (!role || !is_string(*role)) continue;
        for (const char* name : roles)  // the value is new: nobody else holds it
            if (chars(*role) == name) static_cast<Text*>(role->object.get())->from_request.clear();
    }
}

/// Those members that the template names become variables.
void Renderer::bind_context(const Json& object, bool request) {
    for (uint32_t id = 0; id < p_.names.size(); ++id) {
        const Json* member = object.find(p_.names[id]);
        if (!member) continue;
        assign_name(id, from_json(*member, request));
        if (request && p_.names[id] == "messages")
            trust_roles(frames_.back().bindings.back().second);
    }
}

Result<Text> Renderer::run(const TemplateInput& input) {
    push_frame(0);
    bind_context(input.request, true);
    bind_context(input.own, false);
    push_frame(0);
    execute(p_.root);
    if (error_) return std::move(*error_);
    return std::move(output_);
}

// names

void Renderer::assign_name(uint32_t name, Value value) {
    charge_bytes(frames_.back().bindings.size());
    for (auto& [id, old] : frames_.back().bindings)
        if (id == name) {
            old = std::move(value);
            return;
        }
    frames_.back().bindings.emplace_back(name, std::move(value));
}

Value Renderer::lookup(const Node& node, uint32_t id) {
    for (uint32_t f = frame();; f = frames_[f].parent) {
        charge_bytes(frames_[f].bindings.size() + 1);
        for (const auto& [name, value] : frames_[f].bindings)
            if (name == node.value) return value;
        if (f == 0) break;
    }
    const Builtin* builtin = find_global(p_.names[node.value]);
    if (!builtin) return make_kind(Kind::undefined, id);
    Value v = make_kind(Kind::function, 0);
    v.object = std::make_shared<Bound>(Bound{{}, builtin});
    return v;
}

void Renderer::assign(uint32_t target, const Value& value) {
    const Node& node = p_.nodes[target];
    if (node.op == Op::name) return assign_name(node.value, value);
    const auto children = p_.children(node);
    if (node.op == Op::field) {
        const Value owner = eval(children[0]);
        if (failed()) return;
        if (owner.kind != Kind::name_space) return void(fail("only a namespace has fields to set"));
        Dict& fields = name_spaces_[size_t(owner.integer)];
        charge_bytes(fields.size() * 4);
        return set_entry(fields, make_text(p_.names[node.value]), value);
    }
    const Value items = items_of(value);
    if (failed()) return;
    if (list_in(items).size() != children.size())
        return void(fail(format("cannot unpack %zu values into %zu names", list_in(items).size(),
                                children.size())));
    for (size_t i = 0; i < children.size() && !failed(); ++i)
        assign(children[i], list_in(items)[i]);
}

// statements

Flow Renderer::execute(uint32_t id) {
    const Level level(*this);
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return Flow::next;
    switch (node.op) {
        case Op::body: return execute_body(node);
        case Op::text: append(*out_, p_.texts[node.value], false); break;
        case Op::print: {
            const Value v = eval(p_.children(node)[0]);
            if (!failed()) print(*out_, v);
            break;
        }
        case Op::choice: return execute_choice(node);
        case Op::loop: return execute_loop(node);
        case Op::set: {
            const Value v = eval(p_.children(node)[1]);
            if (!failed()) assign(p_.children(node)[0], v);
            break;
        }
        case Op::set_block:
        case Op::filter_block: return execute_capture(node);
        case Op::macro: {
            Value v = make_kind(Kind::macro, 0);
            v.object = std::make_shared<Macro>(Macro{id, frame(), frames_.back().serial});
            assign_name(node.value, std::move(v));
            break;
        }
        case Op::scope: return execute_scope(p_.children(node)[0]);
        case Op::break_loop: return Flow::break_loop;
        case Op::continue_loop: return Flow::continue_loop;
        default: break;
    }
    return Flow::next;
}

Flow Renderer::execute_body(const Node& node) {
    for (uint32_t child : p_.children(node)) {
        const Flow flow = execute(child);
        if (failed() || flow != Flow::next) return flow;
    }
    return Flow::next;
}

Flow Renderer::execute_choice(const Node& node) {
    const auto children = p_.children(node);
    for (size_t i = 0; i + 1 < children.size(); i += 2) {
        const bool chosen = truth(eval(children[i]));
        if (failed()) return Flow::next;
        if (chosen) return execute(children[i + 1]);
    }
    return execute(children.back());
}

Flow Renderer::execute_scope(uint32_t body) {
    push_frame(frame());
    const Flow flow = execute(body);
    frames_.pop_back();
    return flow;
}

/// The items for which the loop's condition holds.
List Renderer::selected(const Node& node, const List& items) {
    const auto children = p_.children(node);
    List kept;
    push_frame(frame());
    for (const Value& item : items) {
        frames_.back().bindings.clear();
        assign(children[0], item);
        const bool keep = truth(eval(children[2]));
        if (failed()) break;
        if (keep) kept.push_back(item);
    }
    frames_.pop_back();
    return kept;
}

Flow Renderer::execute_loop(const Node& node) {
    const auto children = p_.children(node);  // target, iterable, condition, body, else
    Value items = items_of(eval(children[1]));
    if (failed()) return Flow::next;
    if (children[2]) items = list(Kind::list, selected(node, list_in(items)));
    if (failed()) return Flow::next;
    const auto state = std::make_shared<Loop>(Loop{items, 0});
    Value loop = make_kind(Kind::loop, 0);
    loop.depth = uint16_t(items.depth + 1);
    loop.object = state;
    if (list_in(items).empty()) return execute_scope(children[4]);
    push_frame(frame());
    Flow flow = Flow::next;
    for (; state->at < list_in(items).size() && !failed() && flow != Flow::break_loop;
         ++state->at) {
        frames_.back().bindings.clear();
        if (p_.loop_name) assign_name(*p_.loop_name, loop);
        assign(children[0], list_in(items)[state->at]);
        if (!failed()) flow = execute(children[3]);
    }
    frames_.pop_back();
    return Flow::next;
}

/// What `body` prints, as a string.
Flow Renderer::captured(uint32_t body, Value* value) {
    Text text;
    Text* const outer = std::exchange(out_, &text);
    const Flow flow = execute_scope(body);
    out_ = outer;
    *value = make_text(std::move(text));
    return flow;
}

/// {% set x | filters %} body {% endset %} and {% filter filters %} body {% endfilter %}.
Flow Renderer::execute_capture(const Node& node) {
    const auto children = p_.children(node);
    const bool block = node.op == Op::filter_block;
    Value v;
    const Flow flow = captured(children[block ? 0 : 1], &v);
    for (uint32_t filter : children.subspan(block ? 1 : 2)) v = apply(std::move(v), filter);
    if (failed() || flow != Flow::next) return flow;
    if (block) print(*out_, v);
    else assign(children[0], v);
    return flow;
}

// expressions

Value Renderer::eval(uint32_t id) {
    const Level level(*this);
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return {};
    switch (node.op) {
        case Op::constant: return p_.constants[node.value];
        case Op::name: return lookup(node, id);
        case Op::list: return list(Kind::list, eval_all(node));
        case Op::tuple: return list(Kind::tuple, eval_all(node));
        case Op::dict: return eval_dict(node);
        case Op::conditional: return eval_conditional(node);
        case Op::any:
        case Op::all: return eval_logic(node);
        case Op::negation: return make_bool(!truth(eval(p_.children(node)[0])));
        case Op::minus:
        case Op::plus: return eval_sign(node);
        case Op::comparison: return eval_comparison(node);
        case Op::chain: return eval_chain(node);
        default: return {};
    }
}

List Renderer::eval_all(const Node& node) {
    List items;
    for (uint32_t child : p_.children(node)) items.push_back(eval(child));
    return items;
}

Value Renderer::eval_dict(const Node& node) {
    const auto children = p_.children(node);
    Dict entries;
    for (size_t i = 0; i + 1 < children.size() && !failed(); i += 2) {
        Value key = eval(children[i]);
        if (key.depth > 0) return fail("unhashable type: '" + what(key) + "'");
        charge_bytes(entries.size() * 4);
        set_entry(entries, std::move(key), eval(children[i + 1]));
    }
    return dict(std::move(entries));
}

Value Renderer::eval_conditional(const Node& node) {
    const auto children = p_.children(node);
    const bool chosen = truth(eval(children[0]));
    if (failed()) return {};
    if (chosen) return eval(children[1]);
    return children[2] ? eval(children[2]) : Value{};
}

Value Renderer::eval_logic(const Node& node) {
    Value v;
    for (uint32_t child : p_.children(node)) {
        v = eval(child);
        if (failed() || truth(v) == (node.op == Op::any)) break;
    }
    return v;
}

Value Renderer::eval_sign(const Node& node) {
    const Value v = eval(p_.children(node)[0]);
    if (failed() || node.op == Op::plus)
        return failed() || is_number(v) ? v : fail("a sign before " + what(v));
    return is_int(v) ? binary(Op::subtract, make_int(0), v)
                     : is_number(v) ? make_real(-v.real) : fail("a sign before " + what(v));
}

Value Renderer::eval_comparison(const Node& node) {
    const auto children = p_.children(node);
    Value left = eval(children[0]);
    for (uint32_t id : children.subspan(1)) {
        const Node& next = p_.nodes[id];
        Value right = eval(p_.children(next)[0]);
        line_ = next.line;
        if (failed()) return {};
        if (!compare(next.op, left, right)) return make_bool(false);
        left = std::move(right);
    }
    return make_bool(true);
}

bool Renderer::compare(Op op, const Value& a, const Value& b) {
    switch (op) {
        case Op::equal: return equal(a, b);
        case Op::not_equal: return !equal(a, b);
        case Op::less: return less(a, b);
        case Op::greater: return less(b, a);
        case Op::less_equal: return less(a, b) || equal(a, b);
        case Op::greater_equal: return less(b, a) || equal(a, b);
        case Op::in: return contains(b, a);
        default: return !contains(b, a);
    }
}

Value Renderer::eval_chain(const Node& node) {
    const auto children = p_.children(node);
    Value v = eval(children[0]);
    for (uint32_t id : children.subspan(1)) {
        if (failed()) break;
        v = apply(std::move(v), id);
    }
    return v;
}

Value Renderer::apply(Value v, uint32_t id) {
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return {};
    const auto children = p_.children(node);
    switch (node.op) {
        case Op::attribute: return attribute(v, p_.names[node.value], id);
        case Op::slice: return apply_slice(v, node);
        case Op::filter:
        case Op::test: return apply_builtin(v, node);
        case Op::call: {
            Arguments args = eval_arguments(node);
            line_ = node.line;
            return failed() ? Value{} : call_value(v, args);
        }
        default: break;
    }
    const Value operand = eval(children[0]);
    line_ = node.line;
    if (failed()) return {};
    return node.op == Op::item ? subscript(v, operand, id) : binary(node.op, std::move(v), operand);
}

Value Renderer::apply_slice(const Value& v, const Node& node) {
    const auto children = p_.children(node);
    Value bounds[3] = {make_none(), make_none(), make_none()};
    for (size_t i = 0; i < 3; ++i)
        if (children[i]) bounds[i] = eval(children[i]);
    line_ = node.line;
    return failed() ? Value{} : slice(v, bounds[0], bounds[1], bounds[2]);
}

Value Renderer::apply_builtin(const Value& v, const Node& node) {
    const bool test = node.op == Op::test;
    const std::string& name = p_.names[node.value];
    const Builtin* builtin = test ? find_test(name) : find_filter(name);
    if (!builtin)
        return fail(std::string("no ") + (test ? "test" : "filter") + " named '" + name + "'");
    Arguments args = eval_arguments(node);
    line_ = node.line;
    if (failed()) return {};
    Value made = call(*builtin, v, args);
    return test ? make_bool(truth(made) != node.flag) : made;
}

// calls

Arguments Renderer::eval_arguments(const Node& node) {
    Arguments args;
    for (uint32_t id : p_.children(node)) {
        const Node& child = p_.nodes[id];
        if (child.op != Op::keyword) args.values.push_back(eval(id));
        else args.named.emplace_back(p_.names[child.value], eval(p_.children(child)[0]));
    }
    return args;
}

/// Puts the named arguments into their places.
bool Renderer::bind(const Builtin& builtin, Arguments& args) {
    if (!builtin.parameters) return true;
    const auto refuse = [&](std::string_view why) {
        fail(std::string(builtin.name) + ": " + std::string(why));
        return false;
    };
    std::string_view rest = builtin.parameters;
    const size_t given = args.values.size();
    size_t count = 0, used = 0;
    for (; !rest.empty(); ++count) {
        std::string_view name = rest.substr(0, rest.find(' '));
        rest.remove_prefix(std::min(rest.size(), name.size() + 1));
        const bool optional = name.back() == '?';
        name.remove_suffix(optional);
        if (count < given) continue;
        const auto named = std::find_if(args.named.begin(), args.named.end(),
                                        [&](const auto& n) { return n.first == name; });
        if (named == args.named.end() && !optional) return refuse("needs " + std::string(name));
        args.values.push_back(named == args.named.end() ? Value{} : named->second);
        used += named != args.named.end();
    }
    if (given > count) return refuse("too many arguments");
    return used == args.named.size() || refuse("an unknown argument, or one given twice");
}

Value Renderer::call(const Builtin& builtin, const Value& self, Arguments& args) {
    return bind(builtin, args) ? builtin.function(*this, self, args) : Value{};
}

Value Renderer::call_value(const Value& callee, Arguments& args) {
    if (callee.kind == Kind::macro)
        return call_macro(*static_cast<const Macro*>(callee.object.get()), args);
    if (callee.kind != Kind::function)
        return fail(callee.kind == Kind::undefined ? what(callee)
                                                   : "'" + what(callee) + "' is not callable");
    const Bound& bound = *static_cast<const Bound*>(callee.object.get());
    return call(*bound.builtin, bound.self, args);
}

Value Renderer::call_macro(const Macro& macro, Arguments& args) {
    const Level level(*this);
    const Node& node = p_.nodes[macro.node];
    if (calls_ >= ChatTemplate::max_calls) return fail("macros call each other too deep");
    if (macro.frame >= frames_.size() || frames_[macro.frame].serial != macro.serial)
        return fail("'" + p_.names[node.value] +
                    "' is called outside of the block that defines it");
    const uint32_t line = line_;
    ++calls_;
    push_frame(macro.frame);
    Value v;
    if (bind_parameters(node, args)) captured(p_.children(node)[0], &v);
    frames_.pop_back();
    --calls_;
    line_ = line;
    return v;
}

bool Renderer::bind_parameters(const Node& node, Arguments& args) {
    const auto parameters = p_.children(node).subspan(1);
    if (args.values.size() > parameters.size())
        return fail("too many arguments for '" + p_.names[node.value] + "'"), false;
    size_t used = 0;
    for (size_t i = 0; i < parameters.size() && !failed(); ++i) {
        const Node& parameter = p_.nodes[parameters[i]];
        const std::string& name = p_.names[parameter.value];
        Value v = make_kind(Kind::undefined, parameters[i]);
        charge_bytes(args.named.size());
        const auto named = std::find_if(args.named.begin(), args.named.end(),
                                        [&](const auto& n) { return n.first == name; });
        if (i < args.values.size()) v = args.values[i];
        else if (named != args.named.end()) v = named->second, ++used;
        else if (p_.children(parameter)[0]) v = eval(p_.children(parameter)[0]);
        assign_name(parameter.value, std::move(v));
    }
    if (used != args.named.size() && !failed())
        fail("an unknown argument for '" + p_.names[node.value] + "', or one given twice");
    return !failed();
}

// operators

bool Renderer::equal(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer == b.integer : number_in(a) == number_in(b);
    if (a.kind != b.kind) return false;
    switch (a.kind) {
        case Kind::undefined:
        case Kind::none: return true;
        case Kind::string: return charge_bytes(chars(a).size() / 8) && chars(a) == chars(b);
        case Kind::name_space: return a.integer == b.integer;
        case Kind::dict: {
            if (dict_in(a).size() != dict_in(b).size()) return false;
            for (const Entry& e : dict_in(a)) {
                const Value other = subscript(b, e.key);
                if (failed() || other.kind == Kind::undefined || !equal(e.value, other))
                    return false;
            }
            return true;
        }
        case Kind::list:
        case Kind::tuple:
            return list_in(a).size() == list_in(b).size() &&
                   std::equal(list_in(a).begin(), list_in(a).end(), list_in(b).begin(),
                              [&](const Value& x, const Value& y) { return equal(x, y); });
        default: return a.object == b.object;
    }
}

bool Renderer::less(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer < b.integer : number_in(a) < number_in(b);
    if (is_string(a) && is_string(b))  // the order of UTF-8 is that of code points
        return charge_bytes(std::min(chars(a).size(), chars(b).size()) / 8) && chars(a) < chars(b);
    if (is_list(a) && a.kind == b.kind) {
        const List &x = list_in(a), &y = list_in(b);
        for (size_t i = 0; i < std::min(x.size(), y.size()) && !failed(); ++i)
            if (!equal(x[i], y[i])) return less(x[i], y[i]);
        return x.size() < y.size();
    }
    fail("no order between " + what(a) + " and " + what(b));
    return false;
}

bool Renderer::contains(const Value& container, const Value& v) {
    if (is_string(container)) {
        if (!want(v, Kind::string)) return false;
        if (!charge_bytes(chars(container).size() / 8 + chars(v).size() * 4)) return false;
        return find_text(chars(container), chars(v)) != std::string::npos;
    }
    if (container.kind == Kind::dict)
        return charge_bytes(dict_in(container).size() * 4) && find_entry(dict_in(container), v);
    const Value items = items_of(container);
    if (failed()) return false;
    for (const Value& item : list_in(items))
        if (failed() || equal(item, v)) return !failed();
    return false;
}

Value Renderer::concatenated(Value a, const Value& b) {
    // A string that nobody else holds grows in place: a + b + c copies each of them once.
    if (a.object.use_count() == 1 && a.object != b.object) {
        append(*static_cast<Text*>(a.object.get()), text_in(b));
        return a;
    }
    Text text;
    text.text.reserve(chars(a).size() + chars(b).size());
    append(text, text_in(a)) && append(text, text_in(b));
    return make_text(std::move(text));
}

Value Renderer::binary(Op op, Value a, const Value& b) {
    if (op == Op::concat) {
        const Value right = to_string(b);
        Value left = is_string(a) ? std::move(a) : to_string(a);
        return failed() ? Value{} : concatenated(std::move(left), right);
    }
    if (is_number(a) && is_number(b)) {
        Value v = arithmetic(op, a, b);
        v.request = a.request || b.request;
        return v;
    }
    if (op == Op::add && is_string(a) && is_string(b)) return concatenated(std::move(a), b);
    if (op == Op::add && is_list(a) && a.kind == b.kind) {
        List items = list_in(a);
        items.insert(items.end(), list_in(b).begin(), list_in(b).end());
        return list(a.kind, std::move(items));
    }
    if (op == Op::multiply && (is_string(a) || is_list(a)) && is_int(b))
        return repeated(a, b.integer);
    if (op == Op::multiply && (is_string(b) || is_list(b)) && is_int(a))
        return repeated(b, a.integer);
    if (a.kind == Kind::undefined || b.kind == Kind::undefined)
        return fail(what(a.kind == Kind::undefined ? a : b));
    return fail("cannot combine " + what(a) + " and " + what(b));
}

Value Renderer::repeated(const Value& v, int64_t times) {
    List items;
    Text text;
    for (int64_t i = 0; i < times && charge(1); ++i) {
        if (is_string(v)) append(text, text_in(v));
        else if (charge_bytes(list_in(v).size() * sizeof(Value)))
            items.insert(items.end(), list_in(v).begin(), list_in(v).end());
    }
    return is_string(v) ? make_text(std::move(text)) : list(v.kind, std::move(items));
}

/// a op b for 64-bit integers; false: it does not fit, or is no integer.
bool integer_result(Op op, int64_t a, int64_t b, int64_t* out) {
    const uint64_t x = uint64_t(a), y = uint64_t(b);
    switch (op) {
        case Op::add: *out = int64_t(x + y); return ((a ^ *out) & (b ^ *out)) >= 0;
        case Op::subtract: *out = int64_t(x - y); return ((a ^ b) & (a ^ *out)) >= 0;
        case Op::multiply:
            *out = int64_t(x * y);
            return a == 0 || (*out / a == b && a != INT64_MIN && b != INT64_MIN);
        case Op::floor_divide:
            if (a == INT64_MIN) return false;
            *out = a / b - (a % b != 0 && (a < 0) != (b < 0));
            return true;
        case Op::modulo:
            if (a == INT64_MIN) return false;
            *out = a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
            return true;
        case Op::power: {
            if (b < 0) return false;
            *out = 1;
            if (a == 0 || a == 1) return *out = b == 0 ? 1 : a, true;
            if (a == -1) return *out = b % 2 ? -1 : 1, true;
            for (int64_t i = 0; i < b; ++i)  // at most 63 times
                if (!integer_result(Op::multiply, *out, a, out)) return false;
            return true;
        }
        default: return false;
    }
}

Value Renderer::arithmetic(Op op, const Value& a, const Value& b) {
    const bool divides = op == Op::divide || op == Op::floor_divide || op == Op::modulo;
    const double x = number_in(a), y = number_in(b);
    if (divides && y == 0) return fail("division by zero");
    const bool integers = is_int(a) && is_int(b) && op != Op::divide;
    int64_t i = 0;
    if (integers && integer_result(op, a.integer, b.integer, &i)) return make_int(i);
    if (integers && !(op == Op::power && b.integer < 0)) return fail("an integer over 63 bits");
    switch (op) {
        case Op::add: return make_real(x + y);
        case Op::subtract: return make_real(x - y);
        case Op::multiply: return make_real(x * y);
        case Op::divide: return make_real(x / y);
        case Op::floor_divide: return make_real(std::floor(x / y));
        case Op::modulo: return make_real(x - y * std::floor(x / y));
        default: return make_real(std::pow(x, y));
    }
}

// parts of values

Value Renderer::loop_attribute(const Loop& loop, std::string_view name) {
    const List& items = list_in(loop.items);
    const int64_t at = int64_t(loop.at), size = int64_t(items.size());
    if (name == "index") return make_int(at + 1);
    if (name == "index0") return make_int(at);
    if (name == "revindex") return make_int(size - at);
    if (name == "revindex0") return make_int(size - at - 1);
    if (name == "first") return make_bool(at == 0);
    if (name == "last") return make_bool(at + 1 >= size);
    if (name == "length") return make_int(size);
    if (name == "depth") return make_int(1);
    if (name == "depth0") return make_int(0);
    if (name == "previtem" && at > 0) return items[size_t(at) - 1];
    if (name == "nextitem" && at + 1 < size) return items[size_t(at) + 1];
    return {};
}

/// v.name: a method first, then a member, as Jinja does.
Value Renderer::attribute(const Value& v, std::string_view name, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (const Builtin* method = find_method(v, name)) {
        Value made = make_kind(Kind::function, 0);
        made.depth = uint16_t(v.depth + 1);
        made.object = std::make_shared<Bound>(Bound{v, method});
        return made;
    }
    Value made;
    if (v.kind == Kind::loop)
        made = loop_attribute(*static_cast<const Loop*>(v.object.get()), name);
    const Dict* members = v.kind == Kind::dict ? &dict_in(v)
                        : v.kind == Kind::name_space ? &name_spaces_[size_t(v.integer)] : nullptr;
    if (members) charge_bytes(members->size() * 4);
    if (const Value* found = members ? find_entry(*members, name) : nullptr) return *found;
    return made.kind == Kind::undefined ? make_kind(Kind::undefined, node) : made;
}

/// v[key]: a member or an item first, then what v.key is.
Value Renderer::subscript(const Value& v, const Value& key, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (v.kind == Kind::dict) {
        charge_bytes(dict_in(v).size() * 4);
        if (const Value* found = find_entry(dict_in(v), key)) return *found;
    }
    if (is_string(key)) return attribute(v, chars(key), node);
    const Value missing = make_kind(Kind::undefined, node);
    if (!is_int(key) || !(is_list(v) || is_string(v))) return missing;
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : count_code_points(chars(v)));
    const int64_t at = key.integer < 0 ? key.integer + size : key.integer;
    if (at < 0 || at >= size) return missing;
    if (is_list(v)) return list_in(v)[size_t(at)];
    const size_t begin = byte_of(chars(v), size_t(at));
    size_t end = begin;
    utf8_next(chars(v), &end);
    return piece(v, {begin, end});
}

Value Renderer::path(const Value& v, const Value& dotted) {
    if (!is_string(dotted)) return subscript(v, dotted);
    const std::string_view names = chars(dotted);
    Value at = v;
    for (size_t begin = 0; begin <= names.size() && !failed();) {
        const size_t end = std::min(names.find('.', begin), names.size());
        const std::string_view name = names.substr(begin, end - begin);
        const bool digits =
            !name.empty() && name.size() < 10 && std::all_of(name.begin(), name.end(), is_digit);
        at = subscript(at,
                       digits ? make_int(std::atoi(std::string(name).c_str())) : make_text(name));
        begin = end + 1;
    }
    return at;
}

/// Python's rules: negative places count from the end, and what is outside is cut off.
Value Renderer::slice(const Value& v, const Value& begin, const Value& end, const Value& step) {
    if (!is_string(v) && !is_list(v)) return v.kind == Kind::undefined ? fail(what(v)) : Value{};
    for (const Value* bound : {&begin, &end, &step})
        if (bound->kind != Kind::none && !is_int(*bound)) return {};  // as Jinja does
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : count_code_points(chars(v)));
    const int64_t by =
        step.kind == Kind::none ? 1 : std::clamp<int64_t>(step.integer, -size - 1, size + 1);
    if (by == 0) return fail("a slice with step 0");
    const auto place = [&](const Value& bound, int64_t absent) {
        if (bound.kind == Kind::none) return absent;
        const int64_t at = bound.integer < 0 ? bound.integer + size : bound.integer;
        return std::clamp<int64_t>(at, by > 0 ? 0 : -1, by > 0 ? size : size - 1);
    };
    const int64_t from = place(begin, by > 0 ? 0 : size - 1), to = place(end, by > 0 ? size : -1);
    if (is_string(v) && by == 1) {
        const size_t first = byte_of(chars(v), size_t(from));
        const size_t count = size_t(std::max<int64_t>(to - from, 0));
        return piece(v, {first, first + byte_of(std::string_view(chars(v)).substr(first), count)});
    }
    const Value items = items_of(v);
    List kept;
    Text text;
    for (int64_t i = from; (by > 0 ? i < to : i > to) && !failed(); i += by) {
        const Value& item = list_in(items)[size_t(i)];
        if (is_string(v)) append(text, text_in(item));
        else kept.push_back(item);
    }
    return is_string(v) ? make_text(std::move(text)) : list(v.kind, std::move(kept));
}

// writing

void write_unicode_escape(std::string& out, char32_t c) {
    if (c >= 0x10000) {
        write_unicode_escape(out, 0xd800 + ((c - 0x10000) >> 10));
        c = 0xdc00 + ((c - 0x10000) & 0x3ff);
    }
    out += format("\\u%04x", unsigned(c));
}

/// The inside of a JSON string.
std::string json_escaped(std::string_view s, bool ascii) {
    static const char short_escapes[] = "\"\"\\\\n\nt\tr\rb\bf\f";
    std::string out;
    for (size_t at = 0; at < s.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(s, &at);
        const char* found = nullptr;
        for (const char* e = short_escapes; *e && !found; e += 2)
            if (c == char32_t(e[1])) found = e;
        if (found) out += '\\', out += *found;
        else if (c < 0x20 || (ascii && c > 0x7e)) write_unicode_escape(out, c);
        else out += s.substr(begin, at - begin);
    }
    return out;
}

/// The inside of Python's repr of a string.
std::string python_escaped(std::string_view s, char quote) {
    std::string out;
    for (size_t at = 0; at < s.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(s, &at);
        const Category k = category(c);
        if (c == char32_t(quote) || c == '\\') out += '\\', out += char(c);
        else if (c == '\n' || c == '\r' || c == '\t')
            out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
        else if (c == ' ' || k < Category::Zs) out += s.substr(begin, at - begin);
        else if (c > 0xffff) out += format("\\U%08x", unsigned(c));
        else out += format(c > 0xff ? "\\u%04x" : "\\x%02x", unsigned(c));
    }
    return out;
}

void Renderer::write(Text& out, const Value& v, const WriteStyle& style, size_t level,
                     bool request) {
    if (!charge(1)) return;
    request = request || v.request;
    const auto word = [&](const char* json, const char* python) {
        append(out, style.json ? json : python, request);
    };
    switch (v.kind) {
        case Kind::none: return word("null", "None");
        case Kind::boolean: return v.integer ? word("true", "True") : word("false", "False");
        case Kind::integer: return void(append(out, number_text(v), request));
        case Kind::real:
            if (!style.json || std::isfinite(v.real))
                return void(append(out, number_text(v), request));
            return word(std::isnan(v.real) ? "NaN" : v.real > 0 ? "Infinity" : "-Infinity", "");
        case Kind::string: {
            const std::string& s = chars(v);
            const bool apostrophes =
                s.find('\'') != std::string::npos && s.find('"') == std::string::npos;
            const char quote = style.json || apostrophes ? '"' : '\'';
            append(out, std::string_view(&quote, 1), request);
            each_run(text_in(v), [&](std::string_view run, bool marked) {
                charge_bytes(run.size());
                if (failed()) return;
                append(out,
                       style.json ? json_escaped(run, style.ascii) : python_escaped(run, quote),
                       request || marked);
            });
            append(out, std::string_view(&quote, 1), request);
            return;
        }
        case Kind::list:
        case Kind::tuple:
        case Kind::dict: return write_container(out, v, style, level, request);
        default:
            if (style.json) fail("a value of type " + what(v) + " has no JSON");
            else append(out, std::string("<") + kind_name(v) + ">", false);
    }
}

void Renderer::write_container(Text& out, const Value& v, const WriteStyle& style, size_t level,
                               bool request) {
    const bool is_dict = v.kind == Kind::dict;
    const bool round = v.kind == Kind::tuple && !style.json;
    const size_t size = is_dict ? dict_in(v).size() : list_in(v).size();
    const auto new_line = [&](size_t depth) {
        if (!style.lines || size == 0) return;
        append(out, "\n", request);
        for (size_t i = 0; i < depth && !failed(); ++i) append(out, style.indent, request);
    };
    Dict entries;
    if (is_dict && style.sorted) {
        entries = dict_in(v);
        std::stable_sort(entries.begin(), entries.end(),
                         [&](const Entry& a, const Entry& b) { return less(a.key, b.key); });
    }
    append(out, is_dict ? "{" : round ? "(" : "[", request);
    for (size_t i = 0; i < size && !failed(); ++i) {
        if (i > 0) append(out, style.comma, request);
        new_line(level + 1);
        if (!is_dict) {
            write(out, list_in(v)[i], style, level + 1, request);
            continue;
        }
        const Entry& e = style.sorted ? entries[i] : dict_in(v)[i];
        const bool quoted = style.json && !is_string(e.key);  // {1: 2} is {"1": 2}
        if (quoted) append(out, "\"", request);
        write(out, e.key, style, level + 1, request);
        if (quoted) append(out, "\"", request);
        append(out, style.colon, request);
        write(out, e.value, style, level + 1, request);
    }
    if (round && size == 1) append(out, ",", request);
    new_line(level);
    append(out, is_dict ? "}" : round ? ")" : "]", request);
}

// ---- filters, tests, methods, functions -----------------------------------------------------
// What a table entry shares with another or needs more than two lines for stands before the tables.

const std::string* chosen_characters(const Value& v) { return is_string(v) ? &chars(v) : nullptr; }

Value strip(Renderer& r, const Value& v, const Value& set, int sides) {
    const Value s = r.to_string(v);
    if (!is_absent(set) && !r.want(set, Kind::string)) return {};
    r.charge_bytes(chars(s).size() / 8);
    return r.piece(s, stripped(chars(s), chosen_characters(set), sides));
}

Value case_mapped(Renderer& r, const Value& v, bool upper) {
    const Value s = r.to_string(v);
    Text out;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        if (!r.failed()) r.append(out, upper ? to_upper(run) : to_lower(run), request);
    });
    return make_text(std::move(out));
}

/// Upper case at the start and after each character for which `separates` holds, else lower case.
Value capitalized(Renderer& r, const Value& v, bool (*separates)(char32_t)) {
    const Value s = r.to_string(v);
    Text out;
    bool start = true;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        std::string mapped;
        r.charge_bytes(run.size());
        for (size_t at = 0; at < run.size() && !r.failed();) {
            const char32_t c = utf8_next(run, &at);
            utf8_append(mapped, start ? to_upper(c) : to_lower(c));
            start = separates(c);
        }
        r.append(out, mapped, request);
    });
    return make_text(std::move(out));
}
bool separates_nothing(char32_t) { return false; }
bool separates_title(char32_t c) {  // of the method
    const Category k = category(c);
    return k > Category::Lt;
}
bool separates_words(char32_t c) {  // of the filter
    return python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
}

/// Where `separator`, or white space when it is null, divides s, at most `limit` times.
std::vector<ByteRange> split_places(Renderer& r, std::string_view s, const std::string* separator,
                                    size_t limit, bool from_right) {
    std::vector<ByteRange> pieces;
    const auto word_at = [&](size_t at) { return at + stripped(s.substr(at), nullptr, 1).begin; };
    const auto more = [&] { return r.charge(1) && (from_right || pieces.size() < limit); };
    size_t begin = separator ? 0 : word_at(0);
    while ((separator || begin < s.size()) && more()) {
        size_t end = begin, next = begin;
        if (separator) {
            end = find_text(s, *separator, begin);
            if (end == std::string_view::npos) break;
            next = end + separator->size();
        } else {
            while (next < s.size() && !python_space(utf8_next(s, &next))) end = next;
            next = word_at(end);
        }
        pieces.push_back({begin, end});
        begin = next;
    }
    // What is left keeps the white space at its end.
    if (separator || begin < s.size()) pieces.push_back({begin, s.size()});
    if (pieces.size() > limit && from_right) {
        pieces.erase(pieces.begin(), pieces.end() - ptrdiff_t(limit) - 1);
        pieces[0].begin = 0;
    }
    return pieces;
}

Value split(Renderer& r, const Value& s, Arguments& a, bool from_right) {
    const Value &separator = a.values[0], &limit = a.values[1];
    if (!is_absent(separator) && !r.want(separator, Kind::string)) return {};
    if (!is_absent(limit) && !r.want(limit, Kind::integer)) return {};
    const std::string* const by = chosen_characters(separator);
    if (by && by->empty()) return r.fail("split: an empty separator");
    if (!r.charge_bytes(chars(s).size() + (by ? by->size() * 4 : 0))) return {};
    List pieces;
    const bool everywhere = is_absent(limit) || limit.integer < 0;
    const size_t most = everywhere ? SIZE_MAX - 1 : size_t(limit.integer);
    for (ByteRange range : split_places(r, chars(s), by, most, from_right)) {
        if (r.failed()) break;
        pieces.push_back(r.piece(s, range));
    }
    return r.list(Kind::list, std::move(pieces));
}

Value split_lines(Renderer& r, const Value& s, const Value& keep_ends) {
    const auto ends_line = [](char32_t c) {
        return (c >= '\n' && c <= '\r') || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
               c == 0x2029;
    };
    const std::string& all = chars(s);
    List lines;
    for (size_t begin = 0; begin < all.size() && !r.failed();) {
        size_t end = begin, next = begin;
        while (next < all.size() && !ends_line(utf8_next(all, &next))) end = next;
        if (end + 1 < all.size() && all[end] == '\r' && all[end + 1] == '\n') next = end + 2;
        lines.push_back(r.piece(s, {begin, truth(keep_ends) ? next : end}));
        begin = next;
    }
    return r.list(Kind::list, std::move(lines));
}

Value replace(Renderer& r, const Value& v, Arguments& a) {
    const Value s = r.to_string(v);
    if (!r.want(a.values[0], Kind::string) || !r.want(a.values[1], Kind::string)) return {};
    if (!is_absent(a.values[2]) && !r.want(a.values[2], Kind::integer)) return {};
    const std::string &all = chars(s), &old = chars(a.values[0]);
    int64_t left =
        is_absent(a.values[2]) || a.values[2].integer < 0 ? INT64_MAX : a.values[2].integer;
    Text out;
    size_t begin = 0;
    r.charge_bytes(all.size() / 8 + old.size() * 4);
    while (left-- > 0 && r.charge_bytes(16)) {
        // An empty `old` stands before every character and at the end.
        const size_t at = old.empty() ? begin : find_text(all, old, begin);
        if (at == std::string::npos) break;
        size_t next = at + old.size();
        if (old.empty() && at < all.size()) utf8_next(all, &next);
        r.append(out, text_in(s), {begin, at});
        r.append(out, text_in(a.values[1]));
        if (old.empty()) r.append(out, text_in(s), {at, next});
        begin = next;
        if (old.empty() && at == all.size()) break;
    }
    r.append(out, text_in(s), {begin, all.size()});
    return make_text(std::move(out));
}

/// Python's find and rfind: an index in code points, or -1.
Value find_index(Renderer& r, const Value& s, const Value& needle, bool last) {
    if (!r.want(needle, Kind::string)) return {};
    if (!r.charge_bytes(chars(s).size() + chars(needle).size() * 4)) return {};
    const std::string& all = chars(s);
    size_t found = find_text(all, chars(needle));
    for (size_t at = found; last && at != std::string::npos && r.charge_bytes(16);) {
        found = at;
        at = at < all.size() ? find_text(all, chars(needle), at + 1) : std::string::npos;
    }
    if (found == std::string::npos) return make_int(-1);
    return make_int(int64_t(count_code_points(std::string_view(all).substr(0, found))));
}

Value count_text(Renderer& r, const Value& s, const Value& needle) {
    if (!r.want(needle, Kind::string)) return {};
    if (!r.charge_bytes(chars(s).size() + chars(needle).size() * 4)) return {};
    const std::string &all = chars(s), &what = chars(needle);
    if (what.empty()) return make_int(int64_t(count_code_points(all)) + 1);
    int64_t count = 0;
    for (size_t at = 0; (at = find_text(all, what, at)) != std::string::npos; at += what.size())
        ++count;
    return make_int(count);
}

bool affix_is(std::string_view s, std::string_view affix, bool at_end) {
    return s.size() >= affix.size() &&
           s.substr(at_end ? s.size() - affix.size() : 0, affix.size()) == affix;
}

Value has_affix(Renderer& r, const Value& s, const Value& affix, bool at_end) {
    const List options = affix.kind == Kind::tuple ? list_in(affix) : List{affix};
    for (const Value& option : options) {
        if (!r.want(option, Kind::string) || !r.charge_bytes(chars(option).size() / 8)) return {};
        if (affix_is(chars(s), chars(option), at_end)) return make_bool(true);
    }
    return make_bool(false);
}

Value without_affix(Renderer& r, const Value& s, const Value& affix, bool at_end) {
    if (!r.want(affix, Kind::string)) return {};
    const size_t size = chars(s).size(), cut = chars(affix).size();
    if (!affix_is(chars(s), chars(affix), at_end)) return s;
    return r.piece(s, at_end ? ByteRange{0, size - cut} : ByteRange{cut, size});
}

/// Whether s has characters and `holds` for each of them.
Value all_characters(Renderer& r, const Value& s, bool (*holds)(char32_t)) {
    r.charge_bytes(chars(s).size());
    for (size_t at = 0; at < chars(s).size() && !r.failed();)
        if (!holds(utf8_next(chars(s), &at))) return make_bool(false);
    return make_bool(!chars(s).empty());
}

/// islower and isupper: some letter has a case, and it is this one everywhere.
Value has_case(Renderer& r, const Value& v, bool upper) {
    const Value s = r.to_string(v);
    const std::string &all = chars(s), other = upper ? to_upper(all) : to_lower(all);
    r.charge_bytes(all.size());
    return make_bool(all == other && all != (upper ? to_lower(all) : to_upper(all)));
}

Value join(Renderer& r, const Value& items, Arguments& a) {  // d attribute
    const Value list = r.items_of(items), between = r.to_string(a.values[0]);
    const Value& attribute = a.values[1];
    if (r.failed()) return {};
    Text out;
    bool first = true;
    for (const Value& item : list_in(list)) {
        if (!std::exchange(first, false)) r.append(out, text_in(between));
        r.print(out, is_absent(attribute) ? item : r.path(item, attribute));
        if (r.failed()) return {};
    }
    return make_text(std::move(out));
}

/// The method: all items must be strings.
Value join_strings(Renderer& r, const Value& separator, const Value& items) {
    const Value list = r.items_of(items);
    if (r.failed()) return {};
    for (const Value& item : list_in(list))
        if (!r.want(item, Kind::string)) return {};
    Arguments as_filter{{separator, {}}, {}};
    return join(r, list, as_filter);
}

Value indent(Renderer& r, const Value& v, Arguments& a) {
    Text margin;
    if (is_string(a.values[0])) r.append(margin, text_in(a.values[0]));
    const int64_t width = is_absent(a.values[0]) ? 4
                          : is_int(a.values[0])  ? a.values[0].integer
                                                 : 0;
    for (int64_t i = 0; i < width && r.charge(1); ++i) margin.text += ' ';
    Text text;
    r.print(text, v);
    r.append(text, "\n", false);  // as Jinja does: else a last empty line would be lost
    const Value lines = split_lines(r, make_text(std::move(text)), {});
    if (r.failed()) return {};
    Text out;
    for (size_t i = 0; i < list_in(lines).size() && !r.failed(); ++i) {
        const Value& line = list_in(lines)[i];
        if (i > 0) r.append(out, "\n", false);
        if (i == 0 ? truth(a.values[1]) : truth(line) || truth(a.values[2])) r.append(out, margin);
        r.append(out, text_in(line));
    }
    return make_text(std::move(out));
}

Value to_json(Renderer& r, const Value& v,
              Arguments& a) {  // ensure_ascii indent separators sort_keys
    WriteStyle style;
    style.json = true;
    style.ascii = truth(a.values[0]);
    style.sorted = truth(a.values[3]);
    style.lines = !is_absent(a.values[1]);
    if (style.lines) {
        style.comma = ",";
        const bool text = is_string(a.values[1]);
        if (!text && !r.want(a.values[1], Kind::integer)) return {};
        const int64_t width = text ? 0 : std::clamp<int64_t>(a.values[1].integer, 0, 1000);
        style.indent = text ? chars(a.values[1]) : std::string(size_t(width), ' ');
    }
    if (!is_absent(a.values[2])) {
        const Value pair = r.items_of(a.values[2]);
        if (r.failed()) return {};
        if (list_in(pair).size() != 2) return r.fail("tojson: separators must be two strings");
        for (const Value& item : list_in(pair))
            if (!r.want(item, Kind::string)) return {};
        style.comma = chars(list_in(pair)[0]);
        style.colon = chars(list_in(pair)[1]);
    }
    Text out;
    r.write(out, v, style, 0, false);
    return make_text(std::move(out));
}

Value length(Renderer& r, const Value& v) {
    switch (v.kind) {
        case Kind::undefined: return make_int(0);
        case Kind::string:
            r.charge_bytes(chars(v).size() / 8);
            return make_int(int64_t(count_code_points(chars(v))));
        case Kind::list:
        case Kind::tuple: return make_int(int64_t(list_in(v).size()));
        case Kind::dict: return make_int(int64_t(dict_in(v).size()));
        default: return r.fail("'" + r.what(v) + "' has no length");
    }
}

Value to_list(Renderer& r, const Value& v) {
    const Value items = r.items_of(v);
    return r.failed() ? Value{} : r.list(Kind::list, list_in(items));
}

Value end_item(Renderer& r, const Value& v, bool last) {
    const Value items = r.items_of(v);
    if (r.failed() || list_in(items).empty()) return {};
    return last ? list_in(items).back() : list_in(items).front();
}

Value reversed(Renderer& r, const Value& v) {
    if (is_string(v)) return r.slice(v, make_none(), make_none(), make_int(-1));
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    return r.list(Kind::iterator, List(list_in(items).rbegin(), list_in(items).rend()));
}

/// A dict's members as pairs; `part` 0: pairs, 1: keys, 2: values.
Value members(Renderer& r, const Value& v, Kind kind, int part) {
    if (v.kind == Kind::undefined) return r.list(kind, {});
    if (!r.want(v, Kind::dict)) return {};
    List made;
    for (const Entry& e : dict_in(v)) {
        if (!r.charge(1)) return {};
        made.push_back(part == 0   ? make_list(Kind::tuple, {e.key, e.value})
                       : part == 1 ? e.key
                                   : e.value);
    }
    return r.list(kind, std::move(made));
}

/// What filters compare: an attribute, if asked for, and letters without their case.
Value comparison_key(Renderer& r, const Value& item, const Value& attribute, bool case_sensitive) {
    const Value key = is_absent(attribute) ? item : r.path(item, attribute);
    return is_string(key) && !case_sensitive ? case_mapped(r, key, false) : key;
}

Value sorted(Renderer& r, const List& items, const Value& attribute, bool case_sensitive,
             bool reverse) {
    Dict keyed;
    for (const Value& item : items) {
        if (!r.charge(1 + size_t(std::bit_width(items.size())))) return {};
        keyed.push_back({comparison_key(r, item, attribute, case_sensitive), item});
    }
    std::stable_sort(keyed.begin(), keyed.end(), [&](const Entry& a, const Entry& b) {
        return !r.failed() && (reverse ? r.less(b.key, a.key) : r.less(a.key, b.key));
    });
    List made;
    for (Entry& e : keyed) made.push_back(std::move(e.value));
    return r.list(Kind::list, std::move(made));
}

Value sort(Renderer& r, const Value& v, Arguments& a) {  // reverse case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    return sorted(r, list_in(items), a.values[2], truth(a.values[1]), truth(a.values[0]));
}

Value sort_dict(Renderer& r, const Value& v, Arguments& a) {  // case_sensitive by reverse
    const Value pairs = members(r, v, Kind::list, 0);
    const bool by_value = is_string(a.values[1]) && chars(a.values[1]) == "value";
    if (r.failed()) return {};
    return sorted(r, list_in(pairs), make_int(by_value), truth(a.values[0]), truth(a.values[2]));
}

Value unique(Renderer& r, const Value& v, Arguments& a) {  // case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List keys, made;
    for (const Value& item : list_in(items)) {
        const Value key = comparison_key(r, item, a.values[1], truth(a.values[0]));
        const bool seen = std::any_of(keys.begin(), keys.end(), [&](const Value& k) {
            return !r.failed() && r.equal(k, key);
        });
        if (r.failed()) return {};
        if (seen) continue;
        keys.push_back(key);
        made.push_back(item);
    }
    return r.list(Kind::iterator, std::move(made));
}

Value extreme(Renderer& r, const Value& v, Arguments& a,
              bool largest) {  // case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed() || list_in(items).empty()) return {};
    const Value order = sorted(r, list_in(items), a.values[1], truth(a.values[0]), largest);
    return r.failed() ? Value{} : list_in(order)[0];
}

Value sum(Renderer& r, const Value& v, Arguments& a) {  // attribute start
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    Value total = is_absent(a.values[1]) ? make_int(0) : a.values[1];
    for (const Value& item : list_in(items)) {
        const Value next = is_absent(a.values[0]) ? item : r.path(item, a.values[0]);
        if (!r.failed()) total = r.binary(Op::add, std::move(total), next);
    }
    return total;
}

/// select, reject and, with an attribute first, selectattr, rejectattr.
Value selected_items(Renderer& r, const Value& v, Arguments& a, bool by_attribute, bool wanted) {
    const size_t skip = by_attribute ? 1 : 0;
    const Builtin* test = nullptr;
    if (a.values.size() < skip) return r.fail("the name of an attribute is missing");
    if (a.values.size() > skip) {
        if (!r.want(a.values[skip], Kind::string)) return {};
        test = find_test(chars(a.values[skip]));
        if (!test) return r.fail("no test named '" + chars(a.values[skip]) + "'");
    }
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List kept;
    for (const Value& item : list_in(items)) {
        Value holds = by_attribute ? r.path(item, a.values[0]) : item;
        if (test && r.charge(1)) {
            Arguments rest{List(a.values.begin() + ptrdiff_t(skip) + 1, a.values.end()), a.named};
            holds = r.call(*test, holds, rest);
        }
        if (r.failed()) return {};
        if (truth(holds) == wanted) kept.push_back(item);
    }
    return r.list(Kind::iterator, std::move(kept));
}

/// map("filter", arguments ...), or map(attribute = "a.b", default = x).
Value mapped(Renderer& r, const Value& v, Arguments& a) {
    Value attribute, otherwise;
    for (auto& [name, value] : a.named) {
        if (name == "attribute") attribute = value;
        if (name == "default") otherwise = value;
    }
    const Builtin* filter = nullptr;
    if (is_absent(attribute)) {
        if (a.values.empty()) return r.fail("map: needs a filter or an attribute");
        if (!r.want(a.values[0], Kind::string)) return {};
        filter = find_filter(chars(a.values[0]));
        if (!filter) return r.fail("no filter named '" + chars(a.values[0]) + "'");
    }
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List made;
    for (const Value& item : list_in(items)) {
        if (!r.charge(1)) return {};
        if (filter) {
            Arguments rest{List(a.values.begin() + 1, a.values.end()), a.named};
            made.push_back(r.call(*filter, item, rest));
        } else {
            Value part = r.path(item, attribute);
            made.push_back(part.kind == Kind::undefined ? otherwise : std::move(part));
        }
    }
    return r.list(Kind::iterator, std::move(made));
}

Value to_int(Renderer& r, const Value& v, const Value& otherwise) {
    if (is_int(v)) return make_int(v.integer);
    double d = v.kind == Kind::real ? v.real : std::nan("");
    if (is_string(v)) {
        const ByteRange range = stripped(chars(v), nullptr, 3);
        const std::string text = chars(v).substr(range.begin, range.end - range.begin);
        char* end = nullptr;
        errno = 0;
        const long long value = std::strtoll(text.c_str(), &end, 10);
        if (!text.empty() && *end == '\0' && errno == 0) return make_int(value);
        if (const auto real = parse_double(text)) d = *real;
    }
    if (d > -9.2e18 && d < 9.2e18) return make_int(int64_t(d));
    return otherwise.kind == Kind::undefined && !r.failed() ? make_int(0) : otherwise;
}

Value to_real(Renderer&, const Value& v, const Value& otherwise) {
    if (is_number(v)) return make_real(number_in(v));
    if (is_string(v)) {
        const ByteRange range = stripped(chars(v), nullptr, 3);
        const auto real =
            parse_double(std::string_view(chars(v)).substr(range.begin, range.end - range.begin));
        if (real) return make_real(*real);
    }
    return otherwise.kind == Kind::undefined ? make_real(0) : otherwise;
}

Value range(Renderer& r, const Value&, Arguments& a) {
    if (a.values.empty() || a.values.size() > 3 || !a.named.empty())
        return r.fail("range: needs 1 to 3 integers");
    for (const Value& v : a.values)
        if (!r.want(v, Kind::integer)) return {};
    const bool one = a.values.size() == 1;
    const int64_t from = one ? 0 : a.values[0].integer, to = a.values[one ? 0 : 1].integer;
    const int64_t by = a.values.size() == 3 ? a.values[2].integer : 1;
    constexpr int64_t most = INT64_C(1) << 60;  // so that nothing below overflows
    if (by == 0 || std::max({from, to, by}) > most || std::min({from, to, by}) < -most)
        return r.fail("range: a step of 0, or numbers too large");
    const int64_t count = std::max<int64_t>(0, (to - from + by - (by > 0 ? 1 : -1)) / by);
    if (count > int64_t(ChatTemplate::max_range)) return r.fail("range: over 100,000 numbers");
    List items;
    for (int64_t i = 0; i < count; ++i) items.push_back(make_int(from + i * by));
    return r.list(Kind::list, std::move(items));
}

/// namespace(a = 1), dict(a = 1), and both from a dict.
Dict fields_of(Renderer& r, Arguments& a) {
    Dict fields;
    for (const Value& v : a.values)
        if (r.want(v, Kind::dict))
            fields.insert(fields.end(), dict_in(v).begin(), dict_in(v).end());
    for (auto& [name, value] : a.named)
        if (r.charge_bytes(fields.size() * 4)) set_entry(fields, make_text(name), std::move(value));
    return fields;
}

/// What strftime_now prints: the time in the caller's own zone, English names. Howard Hinnant's
/// civil_from_days, see his "chrono-Compatible Low-Level Date Algorithms".
std::string formatted_time(int64_t seconds, std::string_view pattern) {
    static const char* const months[] = {"January",   "February", "March",    "April",
                                         "May",       "June",     "July",     "August",
                                         "September", "October",  "November", "December"};
    static const char* const week[] = {"Sunday",   "Monday", "Tuesday", "Wednesday",
                                       "Thursday", "Friday", "Saturday"};
    seconds = std::clamp<int64_t>(seconds, 0, INT64_C(253402300799));  // 1970 to 9999
    const int64_t days = seconds / 86400, clock = seconds % 86400;
    const int64_t z = days + 719468, era = z / 146097, doe = z % 146097;
    const int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    const int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
    const int day = int(doy - (153 * mp + 2) / 5 + 1), month = int(mp < 10 ? mp + 3 : mp - 9);
    const int year = int(yoe + era * 400 + (month <= 2));
    const int hour = int(clock / 3600), hour12 = (hour + 11) % 12 + 1;
    const bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    const int year_day = int(month > 2 ? doy + 60 + leap : doy - 305);
    std::string out;
    for (size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] != '%' || i + 1 == pattern.size()) {
            out += pattern[i];
            continue;
        }
        const bool bare = pattern[i + 1] == '-' && i + 2 < pattern.size();
        i += bare ? 2 : 1;
        const auto number = [&](int n, int width) { out += format("%0*d", bare ? 1 : width, n); };
        switch (pattern[i]) {
            case 'Y': number(year, 4); break;
            case 'y': number(year % 100, 2); break;
            case 'm': number(month, 2); break;
            case 'd': number(day, 2); break;
            case 'e': out += format("%2d", day); break;
            case 'j': number(year_day, 3); break;
            case 'H': number(hour, 2); break;
            case 'I': number(hour12, 2); break;
            case 'M': number(int(clock / 60 % 60), 2); break;
            case 'S': number(int(clock % 60), 2); break;
            case 'p': out += hour < 12 ? "AM" : "PM"; break;
            case 'B': out += months[month - 1]; break;
            case 'b': out += std::string(months[month - 1], 3); break;
            case 'A': out += week[(days + 4) % 7]; break;
            case 'a': out += std::string(week[(days + 4) % 7], 3); break;
            case 'F': out += formatted_time(seconds, "%Y-%m-%d"); break;
            case 'T': out += formatted_time(seconds, "%H:%M:%S"); break;
            case '%': out += '%'; break;
            default: out += '%', out += pattern[i];
        }
    }
    return out;
}

Value to_text(Renderer& r, const Value& v) { return r.to_string(v); }

Value absolute(Renderer& r, const Value& v) {
    return r.binary(Op::multiply, v, make_int(is_number(v) && number_in(v) < 0 ? -1 : 1));
}

/// A table's entry from a function that takes fewer arguments, or more that the entry fixes.
template <auto function, auto... fixed>
Value none(Renderer& r, const Value& v, Arguments&) {
    return function(r, v, fixed...);
}
template <auto function, auto... fixed>
Value one(Renderer& r, const Value& v, Arguments& a) {
    return function(r, v, a.values[0], fixed...);
}
template <auto function, auto... fixed>
Value all(Renderer& r, const Value& v, Arguments& a) {
    return function(r, v, a, fixed...);
}

Value otherwise(Renderer&, const Value& v, Arguments& a) {  // default_value boolean
    const bool missing = v.kind == Kind::undefined || (truth(a.values[1]) && !truth(v));
    return !missing ? v : a.values[0].kind == Kind::undefined ? make_text("") : a.values[0];
}

const Builtin filters[] = {
    {"abs", "", none<absolute>},
    {"capitalize", "", none<capitalized, separates_nothing>},
    {"count", "", none<length>},
    {"d", "default_value? boolean?", otherwise},
    {"default", "default_value? boolean?", otherwise},
    {"dictsort", "case_sensitive? by? reverse?", sort_dict},
    {"first", "", none<end_item, false>},
    {"float", "default?", one<to_real>},
    {"indent", "width? first? blank?", indent},
    {"int", "default?", one<to_int>},
    {"items", "", none<members, Kind::iterator, 0>},
    {"join", "d? attribute?", join},
    {"last", "", none<end_item, true>},
    {"length", "", none<length>},
    {"list", "", none<to_list>},
    {"lower", "", none<case_mapped, false>},
    {"map", nullptr, mapped},
    {"max", "case_sensitive? attribute?", all<extreme, true>},
    {"min", "case_sensitive? attribute?", all<extreme, false>},
    {"reject", nullptr, all<selected_items, false, false>},
    {"rejectattr", nullptr, all<selected_items, true, false>},
    {"replace", "old new count?", replace},
    {"reverse", "", none<reversed>},
    {"safe", "", none<to_text>},
    {"select", nullptr, all<selected_items, false, true>},
    {"selectattr", nullptr, all<selected_items, true, true>},
    {"sort", "reverse? case_sensitive? attribute?", sort},
    {"string", "", none<to_text>},
    {"sum", "attribute? start?", sum},
    {"title", "", none<capitalized, separates_words>},
    {"tojson", "ensure_ascii? indent? separators? sort_keys?", to_json},
    {"trim", "chars?", one<strip, 3>},
    {"unique", "case_sensitive? attribute?", unique},
    {"upper", "", none<case_mapped, true>},
};

Value compared(Renderer& r, const Value& v, const Value& other, Op op) {
    return make_bool(r.compare(op, v, other));
}

Value is_kind(Renderer&, const Value& v, Kind kind) { return make_bool(v.kind == kind); }

Value is_defined(Renderer&, const Value& v) { return make_bool(v.kind != Kind::undefined); }

Value is_numeric(Renderer&, const Value& v) { return make_bool(is_number(v)); }

Value is_callable(Renderer&, const Value& v) {
    return make_bool(v.kind == Kind::undefined || v.kind >= Kind::macro);
}

Value is_iterable(Renderer&, const Value& v, bool sequence) {
    const bool has_items = v.kind >= Kind::string && v.kind <= Kind::dict;
    const bool skipped = sequence && v.kind == Kind::iterator;
    return make_bool(v.kind == Kind::undefined || (has_items && !skipped));
}

Value is_boolean(Renderer&, const Value& v, bool which) {
    return make_bool(v.kind == Kind::boolean && (v.integer != 0) == which);
}

Value is_same(Renderer& r, const Value& v, const Value& other) {
    return make_bool(v.kind == other.kind && r.equal(v, other));
}

Value is_divisible(Renderer& r, const Value& v, const Value& by) {
    const Value rest = r.binary(Op::modulo, v, by);
    return make_bool(is_number(rest) && number_in(rest) == 0);
}

Value is_even(Renderer& r, const Value& v, bool even) {
    return make_bool(truth(is_divisible(r, v, make_int(2))) == even);
}

Value is_known(Renderer&, const Value& v, const Builtin* (*find)(std::string_view)) {
    return make_bool(is_string(v) && find(chars(v)));
}

const Builtin tests[] = {
    {"!=", "other", one<compared, Op::not_equal>},
    {"<", "other", one<compared, Op::less>},
    {"<=", "other", one<compared, Op::less_equal>},
    {"==", "other", one<compared, Op::equal>},
    {">", "other", one<compared, Op::greater>},
    {">=", "other", one<compared, Op::greater_equal>},
    {"boolean", "", none<is_kind, Kind::boolean>},
    {"callable", "", none<is_callable>},
    {"defined", "", none<is_defined>},
    {"divisibleby", "num", one<is_divisible>},
    {"eq", "other", one<compared, Op::equal>},
    {"equalto", "other", one<compared, Op::equal>},
    {"even", "", none<is_even, true>},
    {"false", "", none<is_boolean, false>},
    {"filter", "", none<is_known, find_filter>},
    {"float", "", none<is_kind, Kind::real>},
    {"ge", "other", one<compared, Op::greater_equal>},
    {"greaterthan", "other", one<compared, Op::greater>},
    {"gt", "other", one<compared, Op::greater>},
    {"in", "seq", one<compared, Op::in>},
    {"integer", "", none<is_kind, Kind::integer>},
    {"iterable", "", none<is_iterable, false>},
    {"le", "other", one<compared, Op::less_equal>},
    {"lessthan", "other", one<compared, Op::less>},
    {"lower", "", none<has_case, false>},
    {"lt", "other", one<compared, Op::less>},
    {"mapping", "", none<is_kind, Kind::dict>},
    {"ne", "other", one<compared, Op::not_equal>},
    {"none", "", none<is_kind, Kind::none>},
    {"number", "", none<is_numeric>},
    {"odd", "", none<is_even, false>},
    {"sameas", "other", one<is_same>},
    {"sequence", "", none<is_iterable, true>},
    {"string", "", none<is_kind, Kind::string>},
    {"test", "", none<is_known, find_test>},
    {"true", "", none<is_boolean, true>},
    {"undefined", "", none<is_kind, Kind::undefined>},
    {"upper", "", none<has_case, true>},
};

bool is_alphanumeric(char32_t c) { return is_letter(c) || detail::is_number(c); }
bool is_decimal(char32_t c) { return category(c) == Category::Nd; }

const Builtin string_methods[] = {
    {"capitalize", "", none<capitalized, separates_nothing>},
    {"count", "sub", one<count_text>},
    {"endswith", "suffix", one<has_affix, true>},
    {"find", "sub", one<find_index, false>},
    {"isalnum", "", none<all_characters, is_alphanumeric>},
    {"isalpha", "", none<all_characters, is_letter>},
    {"isdigit", "", none<all_characters, is_decimal>},
    {"islower", "", none<has_case, false>},
    {"isspace", "", none<all_characters, python_space>},
    {"isupper", "", none<has_case, true>},
    {"join", "iterable", one<join_strings>},
    {"lower", "", none<case_mapped, false>},
    {"lstrip", "chars?", one<strip, 1>},
    {"removeprefix", "prefix", one<without_affix, false>},
    {"removesuffix", "suffix", one<without_affix, true>},
    {"replace", "old new count?", replace},
    {"rfind", "sub", one<find_index, true>},
    {"rsplit", "sep? maxsplit?", all<split, true>},
    {"rstrip", "chars?", one<strip, 2>},
    {"split", "sep? maxsplit?", all<split, false>},
    {"splitlines", "keepends?", one<split_lines>},
    {"startswith", "prefix", one<has_affix, false>},
    {"strip", "chars?", one<strip, 3>},
    {"title", "", none<capitalized, separates_title>},
    {"upper", "", none<case_mapped, true>},
};

Value count_item(Renderer& r, const Value& list, const Value& wanted) {
    int64_t count = 0;
    for (const Value& item : list_in(list)) count += r.equal(item, wanted);
    return make_int(count);
}

Value index_of(Renderer& r, const Value& list, const Value& wanted) {
    for (size_t i = 0; i < list_in(list).size(); ++i)
        if (r.equal(list_in(list)[i], wanted)) return make_int(int64_t(i));
    return r.fail("index: the value is not in the list");
}

Value get_member(Renderer& r, const Value& dict, Arguments& a) {  // key default
    r.charge_bytes(dict_in(dict).size() * 4);
    if (const Value* found = find_entry(dict_in(dict), a.values[0])) return *found;
    return a.values[1].kind == Kind::undefined ? make_none() : a.values[1];
}

Value same_dict(Renderer&, const Value& dict) { return dict; }

// Nothing here changes what it belongs to: append, pop, update and their kin do not exist.
const Builtin list_methods[] = {
    {"copy", "", none<to_list>},
    {"count", "value", one<count_item>},
    {"index", "value", one<index_of>},
};

const Builtin dict_methods[] = {
    {"copy", "", none<same_dict>},
    {"get", "key default?", get_member},
    {"items", "", none<members, Kind::list, 0>},
    {"keys", "", none<members, Kind::list, 1>},
    {"values", "", none<members, Kind::list, 2>},
};

Value cycle(Renderer& r, const Value& loop, Arguments& a) {
    if (a.values.empty()) return r.fail("cycle: needs values");
    return a.values[static_cast<const Loop*>(loop.object.get())->at % a.values.size()];
}

const Builtin loop_methods[] = {{"cycle", nullptr, cycle}};

Value new_dict(Renderer& r, const Value&, Arguments& a) { return r.dict(fields_of(r, a)); }
Value new_space(Renderer& r, const Value&, Arguments& a) { return r.name_space(fields_of(r, a)); }

Value raise_exception(Renderer& r, const Value&, const Value& message) {
    return r.raise(chars(r.to_string(message)));
}

Value strftime_now(Renderer& r, const Value&, const Value& pattern) {
    if (!r.want(pattern, Kind::string) || !r.charge_bytes(chars(pattern).size() * 16)) return {};
    return make_text(formatted_time(r.now_s, chars(pattern)));
}

const Builtin globals[] = {
    {"dict", nullptr, new_dict},
    {"namespace", nullptr, new_space},
    {"raise_exception", "message", one<raise_exception>},
    {"range", nullptr, range},
    {"strftime_now", "format", one<strftime_now>},
};

const Builtin* find_builtin(std::span<const Builtin> table, std::string_view name) {
    for (const Builtin& b : table)
        if (name == b.name) return &b;
    return nullptr;
}

const Builtin* find_filter(std::string_view name) { return find_builtin(filters, name); }
const Builtin* find_test(std::string_view name) { return find_builtin(tests, name); }
const Builtin* find_global(std::string_view name) { return find_builtin(globals, name); }

const Builtin* find_method(const Value& self, std::string_view name) {
    switch (self.kind) {
        case Kind::string: return find_builtin(string_methods, name);
        case Kind::list: return find_builtin(list_methods, name);
        case Kind::tuple: return find_builtin(std::span(list_methods).subspan(1), name);  // no copy
        case Kind::dict: return find_builtin(dict_methods, name);
        case Kind::loop: return find_builtin(loop_methods, name);
        default: return nullptr;
    }
}

/// As Jinja reads it: every kind of line end is \n, and the last one does not count.
std::string normalized_lines(std::string_view source) {
    std::string out;
    for (size_t i = 0; i < source.size(); ++i) {
        out += source[i] == '\r' ? '\n' : source[i];
        if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
}

}  // namespace jinja
}  // namespace detail

// ---- the public face ------------------------------------------------------------------------

ChatTemplate::ChatTemplate(std::shared_ptr<const detail::TemplateProgram> program)
    : program_(std::move(program)) {}

Result<ChatTemplate> ChatTemplate::parse(std::string source) {
    using namespace detail;
    if (source.size() > max_source_bytes)
        return make_error(ErrorKind::bad_data, "chat template: over 1 MiB");
    if (!utf8_valid(source)) return make_error(ErrorKind::bad_data, "chat template: not UTF-8");
    const std::string text = jinja::normalized_lines(source);
    jinja::Lexer lexer(text);
    std::vector<jinja::Lexeme> lexemes = lexer.run();
    if (lexer.error()) return *lexer.error();
    const auto program = std::make_shared<TemplateProgram>();
    program->source = std::move(source);
    const auto parsed = jinja::Parser(*program, std::move(lexemes)).run();
    if (!parsed) return parsed.error();
    return ChatTemplate(program);
}

Result<ChatTemplate> ChatTemplate::open(std::string source, bool has_chatml_tokens) {
    if (!source.empty()) return parse(std::move(source));
    if (!has_chatml_tokens)
        return detail::make_error(ErrorKind::unsupported,
                                  "the model has no chat template (tokenizer.chat_template) and no "
                                  "tokens <|im_start|> and <|im_end|> for the default one");
    return parse(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}");
}

Result<MarkedText> ChatTemplate::render(const TemplateInput& input) const {
    return detail::jinja::Renderer(*program_, input.now_s).run(input);
}

const std::string& ChatTemplate::source() const { return program_->source; }

bool ChatTemplate::mentions(std::string_view word) const {
    for (const auto& constant : program_->constants)
        if (detail::jinja::is_string(constant) &&
            detail::jinja::chars(constant).find(word) != std::string::npos) return true;
    return false;
}

Result<TemplateInput> chat_input(const Request& request, const ChatTemplate& chat_template,
                                 std::string_view bos, std::string_view eos, int64_t now_s) {
    static const char* const roles[] = {"system",    "developer", "user",
                                        "assistant", "tool",      "function"};
    const bool knows_developer = chat_template.mentions("developer");
    Json messages = Json::array();
    const auto add = [&](Role role, std::string text) {
        if (role == Role::developer && !knows_developer) role = Role::system;
        messages.push(
            Json::object().set("role", roles[size_t(role)]).set("content", std::move(text)));
    };
    if (!request.instructions.empty()) add(Role::system, request.instructions);
    if (request.input.items.empty()) add(Role::user, request.input.text);
    for (size_t i = 0; i < request.input.items.size(); ++i) {
        const Item& item = request.input.items[i];
        if (item.kind == Item::Kind::message) add(item.role, item.text());
        else if (item.kind != Item::Kind::reasoning)
            return detail::make_error(
                ErrorKind::unsupported, "calls of tools are not in this version",
                "unsupported_parameter", detail::format("input[%zu].type", i));
    }
    TemplateInput input;
    input.request.set("messages", std::move(messages))
        .set("tools", nullptr)
        .set("documents", nullptr);
    input.own.set("add_generation_prompt", true).set("bos_token", bos).set("eos_token", eos);
    input.now_s = now_s;
    return input;
}

}  // namespace v1
}  // namespace valar

#endif  // VALAR_NO_INFERENCE

// >>model
// Owns: ModelSpec, which says as data what a decoder is, and the binding of a file's tensors to it.
// Assumes: a Gguf that outlives the binding.
// Promises: a spec that was read has sane sizes and only options that a backend implements; a
// tensor that is missing, mis-shaped, unused or of an unsupported type is an error that names it.

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

/// A new family that differs only in these is one more row.
struct Architecture {
    const char* name;  // also the prefix of its keys
    RopeKind rope;
    bool qkv_bias;
};
constexpr Architecture architectures[] = {
    {"llama", RopeKind::norm, false},
    {"qwen2", RopeKind::neox, true},
};

/// Keys that change what the network computes in a way that no backend here does.
constexpr const char* refused_model_keys[] = {
    "expert_count",   "attn_logit_softcapping", "final_logit_softcapping",
    "residual_scale", "attention.clamp_kqv",
};

constexpr TensorType matrix_types[] = {
    TensorType::f32,  TensorType::f16,  TensorType::bf16, TensorType::q4_0, TensorType::q4_1,
    TensorType::q5_0, TensorType::q8_0, TensorType::q4_k, TensorType::q5_k, TensorType::q6_k,
};
constexpr TensorType vector_types[] = {TensorType::f32};

/// Reads keys into a spec. After the first failure `error` is set and what is returned is of no
/// use, so that a reader can go on to its end and look once.
struct SpecReader {
    const Gguf& gguf;
    std::string prefix = {};
    std::optional<Error> error = {};

    void fail(ErrorKind kind, const std::string& what) {
        if (!error) error = make_error(kind, gguf.name() + ": " + what);
    }
    void fail_key(ErrorKind kind, const char* key, const char* what) {
        fail(kind, format("key '%s%s' %s", prefix.c_str(), key, what));
    }
    template <class T> T value(Result<T> result) {
        if (result) return *result;
        if (!error) error = result.error();
        return T{};
    }
    const GgufKey* find(const char* key) const { return gguf.find(prefix + key); }

    uint32_t in_limits(const char* key, uint64_t number, uint64_t limit) {
        if (number < 1 || number > limit)
            fail_key(ErrorKind::bad_data, key,
                     format("is %llu, not from 1 to %llu", static_cast<unsigned long long>(number),
                            static_cast<unsigned long long>(limit))
                         .c_str());
        return error ? 1 : static_cast<uint32_t>(number);
    }
    uint32_t size(const char* key, uint64_t limit) {
        return in_limits(key, value(gguf.get_uint(prefix + key)), limit);
    }
    uint32_t size(const char* key, uint64_t limit, uint32_t fallback) {
        return find(key) ? size(key, limit) : fallback;
    }
    /// One number for all layers, or an array with one for each.
    uint32_t layer_size(const char* key, size_t layer, uint64_t limit) {
        const GgufKey* found = find(key);
        if (!found || !found->is_array) return size(key, limit);
        auto numbers = value(gguf.get_ints(prefix + key));
        if (layer >= numbers.size())
            fail_key(ErrorKind::bad_data, key, "is too short for the layers");
        return error ? 1 : in_limits(key, static_cast<uint64_t>(numbers[layer]), limit);
    }
    float positive(const char* key, float fallback) {
        const float number = static_cast<float>(
            value(gguf.get_float(prefix + key, static_cast<double>(fallback))));
        if (!(number > 0 && std::isfinite(number)))
            fail_key(ErrorKind::bad_data, key, "must be a positive number");
        return number;
    }
};

/// Text of a file as a message can carry it.
std::string printable(std::string_view text) {
    std::string out(text.substr(0, 64));
    for (char& c : out)
        if (c < ' ' || c > '~') c = '?';
    return out;
}

const Architecture* find_architecture(std::string_view name) {
    for (const Architecture& row : architectures)
        if (name == row.name) return &row;
    return nullptr;
}

void refuse_unknown_options(SpecReader& in) {
    for (const char* key : refused_model_keys) {
        const GgufKey* found = in.find(key);
        const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
        if (found && !std::all_of(found->data.begin(), found->data.end(), is_zero))
            in.fail_key(ErrorKind::unsupported, key, "asks for what is not implemented");
    }
}

/// 1 / factor of linear scaling. (llama3 scaling needs no key: its factors are a tensor.)
float read_rope_scale(SpecReader& in) {
    const auto type = in.value(in.gguf.get_string(in.prefix + "rope.scaling.type", "linear"));
    if (type == "none") return 1;
    if (type != "linear")
        in.fail_key(ErrorKind::unsupported, "rope.scaling.type",
                    "is neither 'none' nor 'linear'");
    const char* key = in.find("rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
    return 1.0f / in.positive(key, 1.0f);
}

std::vector<float> read_rope_factors(SpecReader& in, uint32_t rope_dims) {
    const TensorInfo* tensor = in.gguf.find_tensor("rope_freqs.weight");
    if (!tensor || in.error) return {};
    if (tensor->type != TensorType::f32 || tensor->n_dims != 1 ||
        tensor->dims[0] != rope_dims / 2) {
        in.fail(ErrorKind::bad_data, "tensor 'rope_freqs.weight' is not F32 of half the rope dims");
        return {};
    }
    std::vector<float> factors(rope_dims / 2);
    const auto bytes = std::as_writable_bytes(std::span<float>(factors));
    if (auto done = in.gguf.read_tensor(*tensor, 0, bytes); !done) in.error = done.error();
    for (float factor : factors)
        if (!(factor > 0 && std::isfinite(factor)))
            in.fail(ErrorKind::bad_data, "tensor 'rope_freqs.weight' has a factor not positive");
    return factors;
}

/// All layers have the head size of the first, also where their numbers of heads differ.
uint32_t read_head_dim(SpecReader& in, uint32_t n_embd) {
    if (in.find("attention.key_length"))
        return in.size("attention.key_length", ModelSpec::max_width);
    const uint32_t n_heads = in.layer_size("attention.head_count", 0, ModelSpec::max_width);
    if (n_embd % n_heads != 0)
        in.fail_key(ErrorKind::bad_data, "attention.head_count",
                    "does not divide embedding_length");
    return in.error ? 1 : n_embd / n_heads;
}

RopeSpec read_rope(SpecReader& in, const Architecture& row, uint32_t head_dim) {
    RopeSpec rope;
    rope.kind = row.rope;
    rope.dims = in.size("rope.dimension_count", head_dim, head_dim);
    if (rope.dims % 2 != 0) in.fail_key(ErrorKind::bad_data, "rope.dimension_count", "is odd");
    rope.base = in.positive("rope.freq_base", 10000.0f);
    rope.scale = read_rope_scale(in);
    return rope;
}

/// What is the same in all layers is in `layer` already.
LayerSpec read_layer(SpecReader& in, LayerSpec layer, size_t index) {
    layer.n_heads = in.layer_size("attention.head_count", index, ModelSpec::max_width);
    layer.n_kv_heads = layer.n_heads;
    if (in.find("attention.head_count_kv"))
        layer.n_kv_heads = in.layer_size("attention.head_count_kv", index, ModelSpec::max_width);
    layer.n_ff = in.layer_size("feed_forward_length", index, ModelSpec::max_width);
    if (layer.n_heads % layer.n_kv_heads != 0)
        in.fail_key(ErrorKind::bad_data, "attention.head_count_kv", "does not divide head_count");
    if (uint64_t{layer.n_heads} * layer.head_dim > ModelSpec::max_width)
        in.fail_key(ErrorKind::bad_data, "attention.head_count", "times head size is too large");
    return layer;
}

std::vector<LayerSpec> read_layers(SpecReader& in, const Architecture& row, uint32_t n_embd) {
    LayerSpec common;
    common.head_dim = read_head_dim(in, n_embd);
    if (in.size("attention.value_length", ModelSpec::max_width, common.head_dim) != common.head_dim)
        in.fail_key(ErrorKind::unsupported, "attention.value_length", "differs from key_length");
    common.qkv_bias = row.qkv_bias;
    common.attention_scale =
        in.positive("attention.scale", 1.0f / std::sqrt(static_cast<float>(common.head_dim)));
    common.rope = read_rope(in, row, common.head_dim);
    std::vector<LayerSpec> layers(in.size("block_count", ModelSpec::max_layers));
    for (size_t i = 0; i < layers.size() && !in.error; ++i) layers[i] = read_layer(in, common, i);
    return layers;
}

/// Rows of the embedding are the vocabulary: the file's own counts of it must agree.
uint32_t read_vocab_size(SpecReader& in) {
    const TensorInfo* embedding = in.gguf.find_tensor("token_embd.weight");
    if (!embedding) {
        in.fail(ErrorKind::bad_data, "tensor 'token_embd.weight' is missing");
        return 1;
    }
    const uint64_t rows = embedding->dims[1];
    const GgufKey* tokens = in.gguf.find("tokenizer.ggml.tokens");
    if (rows > ModelSpec::max_vocab)
        in.fail(ErrorKind::bad_data, "tensor 'token_embd.weight' has too many rows");
    if (tokens && tokens->count != rows)
        in.fail(ErrorKind::bad_data,
                format("key 'tokenizer.ggml.tokens' has %zu entries, 'token_embd.weight' %llu rows",
                       tokens->count, static_cast<unsigned long long>(rows)));
    return in.error ? 1 : static_cast<uint32_t>(rows);
}

/// Takes tensors of a file by name, checks them, and remembers which were taken.
struct TensorBinder {
    const Gguf& gguf;
    std::vector<bool> taken = std::vector<bool>(gguf.tensors().size());
    std::optional<Error> error = {};

    void fail(ErrorKind kind, const std::string& name, const std::string& what) {
        if (!error)
            error = make_error(kind, gguf.name() + ": tensor '" + name + "' " + what);
    }

    const TensorInfo* take(const std::string& name, std::span<const TensorType> types,
                           uint32_t n_dims, uint64_t rows, uint64_t columns) {
        const TensorInfo* tensor = gguf.find_tensor(name);
        if (!tensor) {
            fail(ErrorKind::bad_data, name, "is missing");
            return nullptr;
        }
        taken[static_cast<size_t>(tensor - gguf.tensors().data())] = true;
        if (tensor->n_dims != n_dims || tensor->dims[0] != columns || tensor->dims[1] != rows)
            fail(ErrorKind::bad_data, name,
                 format("has the shape %llu x %llu x %llu x %llu; %llu x %llu was expected",
                        ull(tensor->dims[0]), ull(tensor->dims[1]), ull(tensor->dims[2]),
                        ull(tensor->dims[3]), ull(columns), ull(rows)));
        if (std::find(types.begin(), types.end(), tensor->type) == types.end())
            fail(ErrorKind::unsupported, name,
                 format("has type %s, which is not supported here", type_info(tensor->type)->name));
        return tensor;
    }
    const TensorInfo* matrix(const std::string& name, uint64_t rows, uint64_t columns) {
        return take(name, matrix_types, 2, rows, columns);
    }
    const TensorInfo* vector(const std::string& name, uint64_t length) {
        return take(name, vector_types, 1, 1, length);
    }
    static unsigned long long ull(uint64_t n) { return n; }
};

LayerTensors bind_layer(TensorBinder& in, const LayerSpec& spec, uint64_t n_embd, size_t index) {
    const std::string layer = format("blk.%u.", static_cast<unsigned>(index));
    const uint64_t n_q = uint64_t{spec.n_heads} * spec.head_dim;
    const uint64_t n_kv = uint64_t{spec.n_kv_heads} * spec.head_dim;
    LayerTensors out;
    out.attn_norm = in.vector(layer + "attn_norm.weight", n_embd);
    out.q = in.matrix(layer + "attn_q.weight", n_q, n_embd);
    out.k = in.matrix(layer + "attn_k.weight", n_kv, n_embd);
    out.v = in.matrix(layer + "attn_v.weight", n_kv, n_embd);
    if (spec.qkv_bias) {
        out.q_bias = in.vector(layer + "attn_q.bias", n_q);
        out.k_bias = in.vector(layer + "attn_k.bias", n_kv);
        out.v_bias = in.vector(layer + "attn_v.bias", n_kv);
    }
    out.attn_output = in.matrix(layer + "attn_output.weight", n_embd, n_q);
    out.ffn_norm = in.vector(layer + "ffn_norm.weight", n_embd);
    out.gate = in.matrix(layer + "ffn_gate.weight", spec.n_ff, n_embd);
    out.up = in.matrix(layer + "ffn_up.weight", spec.n_ff, n_embd);
    out.down = in.matrix(layer + "ffn_down.weight", n_embd, spec.n_ff);
    return out;
}

}  // namespace
}  // namespace detail

Result<ModelSpec> read_model_spec(const Gguf& gguf) {
    detail::SpecReader in{gguf};
    ModelSpec spec;
    spec.architecture = in.value(gguf.get_string("general.architecture"));
    if (in.error) return *in.error;
    const auto* row = detail::find_architecture(spec.architecture);
    if (!row)
        return detail::make_error(ErrorKind::unsupported,
                                  gguf.name() + ": architecture '" +
                                      detail::printable(spec.architecture) + "' is not supported");
    in.prefix = spec.architecture + ".";
    spec.name = in.value(gguf.get_string("general.name", ""));
    detail::refuse_unknown_options(in);
    spec.n_embd = in.size("embedding_length", ModelSpec::max_width);
    spec.n_context = in.size("context_length", ModelSpec::max_context);
    spec.norm_eps = in.positive("attention.layer_norm_rms_epsilon", 0.0f);
    spec.embedding_scale = in.positive("embedding_scale", 1.0f);
    spec.logit_scale = in.positive("logit_scale", 1.0f);
    spec.tied_output = !gguf.find_tensor("output.weight");
    spec.n_vocab = detail::read_vocab_size(in);
    spec.layers = detail::read_layers(in, *row, spec.n_embd);
    spec.rope_factors = detail::read_rope_factors(in, spec.layers[0].rope.dims);
    if (in.error) return *in.error;
    return spec;
}

Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec) {
    detail::TensorBinder in{gguf};
    ModelTensors out;
    out.token_embd = in.matrix("token_embd.weight", spec.n_vocab, spec.n_embd);
    out.output_norm = in.vector("output_norm.weight", spec.n_embd);
    out.output = spec.tied_output ? out.token_embd
                                  : in.matrix("output.weight", spec.n_vocab, spec.n_embd);
    if (!spec.rope_factors.empty()) in.vector("rope_freqs.weight", spec.rope_factors.size());
    for (size_t i = 0; i < spec.layers.size() && !in.error; ++i)
        out.layers.push_back(detail::bind_layer(in, spec.layers[i], spec.n_embd, i));
    for (size_t i = 0; i < in.taken.size(); ++i)
        if (!in.taken[i])
            in.fail(ErrorKind::bad_data, std::string(gguf.tensors()[i].name), "is not used");
    if (in.error) return *in.error;
    return out;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>backend
// The CPU backend, top to bottom: how memory is laid out, loading, the batch as a machine of
// stages, the stages in the order in which they run. The formulas are in >>kernels.

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t kMaxBatchRows  = 65536;
constexpr uint32_t kMaxPageTokens = 4096;
constexpr uint32_t kQueryRows     = 16;         // rows of a sequence that attend together
constexpr uint64_t kJoinWork      = 1 << 16;    // products that are not worth a fork-join
constexpr uint64_t kClaimColumns  = 8;          // from here on units are claimed, a few at a time
constexpr uint64_t kClaimUnits    = 8;          // at most: tiles that share a read of the columns
constexpr uint64_t kSliceNs       = 200'000;    // between two looks at the deadline
constexpr double   kSlowestWorkNs = 0.2;        // a product, before it was measured
constexpr uint64_t kLoadBytes     = 1 << 20;    // of the file, a thread, between two looks

// Cuts a buffer into arrays, each on its own cache line. With base 0 it only counts, so that what a
// plan says is what is taken.
struct Carver {
    uintptr_t base = 0;
    uint64_t  used = 0;

    template <class T> T* take(uint64_t count) {
        const uint64_t at = used;
        used += (count * sizeof(T) + 63) / 64 * 64;  // operands are limited by check_cpu_options
        return reinterpret_cast<T*>(base + static_cast<uintptr_t>(at));
    }
};

// A tensor of the file and where it goes: packed, or, for a vector, as it is.
struct LoadItem {
    const TensorInfo* tensor;
    std::byte*        out;
    bool              packed;
};

struct CpuLayer {
    const LayerSpec* spec;
    uint32_t     rope;           // index of its RopeTable
    const float *attn_norm, *ffn_norm, *q_bias, *k_bias, *v_bias;
    PackedMatrix q, k, v, attn_output, gate, up, down;
    uint64_t     kv_offset;      // of its pages in the pool
    size_t       kv_head_bytes;  // one kv head of one page: groups of keys, then groups of values
    size_t kv_page_bytes() const { return kv_head_bytes * spec->n_kv_heads; }
};

struct CpuWeights {
    PackedMatrix          token_embd, output;
    const float*          output_norm = nullptr;
    std::vector<CpuLayer> layers;
    std::vector<LoadItem> items;  // in the order in which they are loaded

    PackedMatrix matrix(Carver& carver, const TensorInfo* tensor) {
        PackedMatrix out{tensor->type, static_cast<uint32_t>(tensor->dims[1]),
                         static_cast<uint32_t>(tensor->dims[0])};
        std::byte* data =
            carver.take<std::byte>(out.tiles() * packed_tile_bytes(out.type, out.cols));
        out.data = data;
        items.push_back({tensor, data, true});
        return out;
    }
    const float* vector(Carver& carver, const TensorInfo* tensor) {
        if (!tensor) return nullptr;
        float* data = carver.take<float>(tensor->dims[0]);
        items.push_back({tensor, reinterpret_cast<std::byte*>(data), false});
        return data;
    }
    void place(Carver& carver, const ModelSpec& spec, const ModelTensors& tensors);
};

void CpuWeights::place(Carver& carver, const ModelSpec& spec, const ModelTensors& tensors) {
    token_embd = matrix(carver, tensors.token_embd);
    for (size_t i = 0; i < spec.layers.size(); ++i) {
        const LayerTensors& from = tensors.layers[i];
        CpuLayer layer{};
        layer.spec = &spec.layers[i];
        layer.attn_norm = vector(carver, from.attn_norm);
        layer.q = matrix(carver, from.q);
        layer.k = matrix(carver, from.k);
        layer.v = matrix(carver, from.v);
        layer.q_bias = vector(carver, from.q_bias);
        layer.k_bias = vector(carver, from.k_bias);
        layer.v_bias = vector(carver, from.v_bias);
        layer.attn_output = matrix(carver, from.attn_output);
        layer.ffn_norm = vector(carver, from.ffn_norm);
        layer.gate = matrix(carver, from.gate);
        layer.up = matrix(carver, from.up);
        layer.down = matrix(carver, from.down);
        layers.push_back(layer);
    }
    output_norm = vector(carver, tensors.output_norm);
    output = tensors.output == tensors.token_embd ? token_embd : matrix(carver, tensors.output);
}

// Rotation angles a position, per pair; layers with the same RopeSpec share a table.
struct RopeTable {
    const RopeSpec*     spec;
    std::vector<double> frequencies;  // (dims / 2)
};

RopeTable make_rope_table(const RopeSpec& rope, const std::vector<float>& factors) {
    RopeTable table{&rope, std::vector<double>(rope.dims / 2)};
    const double log2_base = exact_log2(static_cast<double>(rope.base));
    for (uint32_t i = 0; i < rope.dims / 2; ++i) {
        double f = exact_exp2(-(2.0 * i / rope.dims) * log2_base);
        if (rope.scale != 1) f *= static_cast<double>(rope.scale);
        if (!factors.empty()) f /= static_cast<double>(factors[i]);
        table.frequencies[i] = f;
    }
    return table;
}

bool same_rope(const RopeSpec& a, const RopeSpec& b) {
    return a.kind == b.kind && a.dims == b.dims && a.base == b.base && a.scale == b.scale;
}

// Attention of `rows` neighbours of one sequence to segments first .. last - 1, one kv head a time.
struct AttentionUnit {
    uint32_t row, rows, first_segment, last_segment;
};

// What a thread needs for one AttentionUnit: one segment's result and the state so far.
struct QueryScratch {
    float *   max, *sum, *total_max, *total_sum;  // (kQueryRows * heads of a group)
    float*    out;                                // (the same, head_dim)
    uint16_t *begin, *end;
};

// The largest numbers that occur in any layer.
struct CpuSizes {
    uint64_t rows, logit_rows, planes, parts, segments;
    uint64_t split_rows;     // batches of so many rows are split over segments too
    uint64_t q = 0, kv = 0, ff = 0, group = 0, group_values = 0, heads = 0, columns = 0;
    uint64_t rope_values = 0;  // of all tables, for a position
    uint64_t staging = 0;    // a tile of each thread, as the file has it
};

struct CpuScratch {
    float *x, *y;                      // (rows, n_embd) the residual stream; normed or to be added
    float *q, *k, *v;                  // (rows, heads * head_dim) as they come from the weights
    float *turned;                     // (kv heads, rows, heads of a group, head_dim) rotated q
    float *gate, *up;                  // (rows, n_ff), in the place of q, k, v, turned
    float *attended;                   // (rows, n_heads * head_dim)
    float *cos_sin;                    // (rows, rope_values)
    float *part_max, *part_sum, *part_out;  // (split_rows, segments, n_heads, 1 or head_dim)
    float *logits;                     // (logit_rows, n_vocab)
    ActivationBlock* blocks;           // (rows, planes, columns / 32)
    AttentionUnit*   units;
    uint32_t*        wanted;           // (logit_rows) rows that want logits
    QueryScratch*    queries;          // (parts)

    void place(Carver& carver, const CpuSizes& n, uint64_t n_embd, uint64_t n_vocab) {
        const uint64_t start = carver.used;
        x = carver.take<float>(n.rows * n_embd);
        y = carver.take<float>(n.rows * n_embd);
        attended = carver.take<float>(n.rows * n.q);
        cos_sin = carver.take<float>(n.rows * n.rope_values);
        part_max = carver.take<float>(n.split_rows * n.segments * n.heads);
        part_sum = carver.take<float>(n.split_rows * n.segments * n.heads);
        part_out = carver.take<float>(n.split_rows * n.segments * n.q);
        logits = carver.take<float>(n.logit_rows * n_vocab);
        blocks = carver.take<ActivationBlock>(
            std::max(n.rows * n.planes * n.columns, n.logit_rows * 2 * n_embd) / kActivationBlock);
        units = carver.take<AttentionUnit>(std::max(n.rows, n.split_rows * n.segments));
        wanted = carver.take<uint32_t>(n.logit_rows);
        queries = carver.take<QueryScratch>(n.parts);
        for (uint64_t part = 0; part < n.parts; ++part) {
            QueryScratch one;
            for (float** array : {&one.max, &one.sum, &one.total_max, &one.total_sum})
                *array = carver.take<float>(kQueryRows * n.group);
            one.out = carver.take<float>(kQueryRows * n.group_values);
            one.begin = carver.take<uint16_t>(kQueryRows * n.group);
            one.end = carver.take<uint16_t>(kQueryRows * n.group);
            if (carver.base) queries[part] = one;
        }
        Carver other = carver;
        q = carver.take<float>(n.rows * n.q);
        k = carver.take<float>(n.rows * n.kv);
        v = carver.take<float>(n.rows * n.kv);
        turned = carver.take<float>(n.rows * n.q);
        gate = other.take<float>(n.rows * n.ff);
        up = other.take<float>(n.rows * n.ff);
        carver.used = std::max({carver.used, other.used, start + n.parts * n.staging});
    }
};

Result<void> check_cpu_options(const ModelTensors& tensors, const BackendOptions& options) {
    const auto refuse = [](const char* field, unsigned long long value, const char* wanted) {
        return make_error(ErrorKind::invalid_request,
                          format("%s: %llu is not %s", field, value, wanted), {}, field);
    };
    if (options.page_tokens == 0 || options.page_tokens % kKeyGroup ||
        options.page_tokens > kMaxPageTokens)
        return refuse("page_tokens", options.page_tokens, "a multiple of 16 up to 4096");
    if (options.kv_pages == 0) return refuse("kv_pages", 0, "positive");
    if (options.max_batch_rows == 0 || options.max_batch_rows > kMaxBatchRows)
        return refuse("max_batch_rows", options.max_batch_rows, "in 1..65536");
    if (options.max_logit_rows == 0 || options.max_logit_rows > options.max_batch_rows)
        return refuse("max_logit_rows", options.max_logit_rows, "in 1..max_batch_rows");
    if (options.threads < -1 || options.threads > 1023)
        return make_error(ErrorKind::invalid_request,
                          format("threads: %d is not in -1..1023", options.threads), {}, "threads");
    for (const TensorInfo* tensor : {tensors.token_embd, tensors.output})
        if (!kernel_type_supported(tensor->type))
            return make_error(ErrorKind::unsupported, "tensor '" + std::string(tensor->name) +
                                                          "' has a type that no kernel reads");
    return {};
}

uint32_t cpu_parts(const BackendOptions& options) {
    const int helpers = options.threads < 0 ? physical_cores() - 1 : options.threads;
    return static_cast<uint32_t>(helpers) + 1;
}

uint64_t cpu_positions(const BackendOptions& options) {
    const uint64_t most = options.max_positions ? options.max_positions : ModelSpec::max_context;
    return std::min({uint64_t{options.kv_pages} * options.page_tokens, ModelSpec::max_context,
                     most});
}

CpuSizes measure_cpu(const ModelSpec& spec, const BackendOptions& options,
                     const CpuWeights& weights, const std::vector<RopeTable>& ropes) {
    CpuSizes n{};
    n.rows = options.max_batch_rows;
    n.logit_rows = options.max_logit_rows;
    n.planes = options.precision == Precision::fine ? 2 : 1;
    n.parts = cpu_parts(options);
    n.segments = (cpu_positions(options) + kSegment - 1) / kSegment;
    uint64_t fewest_kv_heads = UINT64_MAX;
    for (const LayerSpec& layer : spec.layers) {
        const uint64_t dim = layer.head_dim, group = layer.n_heads / layer.n_kv_heads;
        n.heads = std::max(n.heads, uint64_t{layer.n_heads});
        n.q = std::max(n.q, layer.n_heads * dim);
        n.kv = std::max(n.kv, layer.n_kv_heads * dim);
        n.ff = std::max(n.ff, uint64_t{layer.n_ff});
        n.group = std::max(n.group, group);
        n.group_values = std::max(n.group_values, group * dim);
        fewest_kv_heads = std::min(fewest_kv_heads, uint64_t{layer.n_kv_heads});
    }
    n.columns = std::max({uint64_t{spec.n_embd}, n.q, n.ff});
    n.split_rows = std::min(n.rows, 2 * n.parts / fewest_kv_heads + 1);
    for (const RopeTable& rope : ropes) n.rope_values += rope.spec->dims;
    for (const LoadItem& item : weights.items)
        if (item.packed)
            n.staging = std::max(n.staging, item.tensor->bytes / item.tensor->dims[1] * kTileRows);
    return n;
}

// Everything about memory, computed the same way for a plan and for the real thing.
struct CpuLayout {
    CpuWeights             weights;
    std::vector<RopeTable> ropes;
    CpuSizes               sizes{};
    MemoryPlan             plan;
    uint64_t               page_bytes = 0;  // of all layers
};

Result<CpuLayout> lay_out_cpu(const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, uintptr_t weights_base) {
    auto good = check_cpu_options(tensors, options);
    if (!good) return good.error();
    CpuLayout out;
    Carver weights{weights_base}, scratch;
    out.weights.place(weights, spec, tensors);
    out.plan.weights = weights.used;
    const size_t element = options.kv_type == KvType::f32 ? 4 : 2;
    for (CpuLayer& layer : out.weights.layers) {
        layer.kv_head_bytes = 2 * element * layer.spec->head_dim * options.page_tokens;
        layer.kv_offset = out.page_bytes;  // times the pages, below
        out.page_bytes += layer.kv_page_bytes();
        const RopeSpec& rope = layer.spec->rope;
        while (layer.rope < out.ropes.size() && !same_rope(*out.ropes[layer.rope].spec, rope))
            ++layer.rope;
        if (layer.rope == out.ropes.size())
            out.ropes.push_back(make_rope_table(rope, spec.rope_factors));
    }
    if (mul_overflows(out.page_bytes, options.kv_pages, &out.plan.kv))
        return make_error(ErrorKind::out_of_memory,
                          format("out of memory: %u pages of keys and values", options.kv_pages));
    for (CpuLayer& layer : out.weights.layers) layer.kv_offset *= options.kv_pages;
    out.sizes = measure_cpu(spec, options, out.weights, out.ropes);
    CpuScratch().place(scratch, out.sizes, spec.n_embd, spec.n_vocab);
    out.plan.scratch = scratch.used;
    return out;
}

class CpuBackend final : public Backend {
public:
    bool exact() const override { return true; }
    Result<bool> load(uint64_t budget_us, float* progress) override;
    Result<void> begin(std::span<const BatchRow> rows) override;
    Result<bool> advance(uint64_t deadline_ns) override;
    void abandon() override { rows_ = {}; }
    std::span<const float> logits(uint32_t i) const override {
        return {scratch_.logits + size_t{i} * spec_->n_vocab, spec_->n_vocab};
    }
    void copy_page(uint32_t from, uint32_t to) override;
    size_t page_bytes() const override { return static_cast<size_t>(page_bytes_); }
    void export_page(uint32_t page, std::byte* out) const override;
    void import_page(uint32_t page, const std::byte* in) override;

    Result<void> open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                      const BackendOptions& options, const Kernels* kernels);

private:
    // A stage is cut into units: rows, tiles of weights or attention units. `job` does units
    // first .. last - 1; it is called once for each thread, or, where `claimed`, for a few units
    // at a time (attention: one).
    struct Stage {
        uint64_t (CpuBackend::*units)() const;
        uint64_t (CpuBackend::*work)() const;  // products of a unit, about
        void (CpuBackend::*job)(uint32_t first, uint32_t last, uint32_t part);
        bool claimed;
    };
    enum StageName : uint32_t { embed, first_of_layer, last_of_layer = 10, last_stage = 12 };
    static const Stage stages_[last_stage + 1];
    struct Slice {
        CpuBackend*  self;
        const Stage* stage;
        uint32_t     first, last;
        std::atomic<uint32_t> claim;
        uint32_t     claim_units;  // 0: each thread takes its share
    };
    struct PackJob {
        const LoadItem*  item;
        const std::byte* source;  // of tile `first`
        uint32_t         first, last;
    };

    const CpuLayer& layer() const { return weights_.layers[layer_]; }
    uint32_t row_count() const { return static_cast<uint32_t>(rows_.size()); }
    bool split_over_segments() const { return row_count() <= sizes_.split_rows; }
    std::byte* kv_page(const CpuLayer& in, uint32_t page) const {
        return kv_.data() + in.kv_offset + page * in.kv_page_bytes();
    }

    Result<void> load_item_slice();
    static void pack_part(void* context, uint32_t part, uint32_t parts);
    void plan_attention();
    void run_slice();
    static void run_part(void* context, uint32_t part, uint32_t parts);
    Error locate_bad_numbers();
    bool residual_is_finite() const;

    uint64_t count_rows() const { return row_count(); }
    uint64_t count_qkv() const { return layer().q.tiles() + layer().k.tiles() + layer().v.tiles(); }
    uint64_t count_attention() const { return uint64_t{unit_count_} * layer().spec->n_kv_heads; }
    uint64_t count_embd() const { return layer().down.tiles(); }
    uint64_t count_ff() const { return layer().up.tiles(); }
    uint64_t count_wanted() const { return wanted_count_; }
    uint64_t count_vocab() const { return wanted_count_ ? weights_.output.tiles() : 0; }
    uint64_t work_row() const { return sizes_.columns * 8; }
    uint64_t work_tile(uint64_t columns) const {
        return kTileRows * columns * rows_.size() * sizes_.planes;
    }
    uint64_t work_qkv() const { return work_tile(spec_->n_embd); }
    uint64_t work_attention() const;
    uint64_t work_output() const { return work_tile(layer().attn_output.cols); }
    uint64_t work_gate_up() const { return 2 * work_tile(spec_->n_embd); }
    uint64_t work_down() const { return work_tile(layer().down.cols); }
    uint64_t work_logits() const { return kTileRows * 2 * uint64_t{spec_->n_embd} * wanted_count_; }

    void embed_rows(uint32_t first, uint32_t last, uint32_t part);
    void norm_rows(uint32_t first, uint32_t last, const float* weight);
    void norm_for_attention(uint32_t first, uint32_t last, uint32_t part);
    void multiply_qkv(uint32_t first, uint32_t last, uint32_t part);
    void rotate_and_store(uint32_t first, uint32_t last, uint32_t part);
    void attend_units(uint32_t first, uint32_t last, uint32_t part);
    void attend_unit(const AttentionUnit& unit, uint32_t kv_head, QueryScratch& scratch);
    struct SegmentResult {
        float        max, sum;
        const float* out;
    };
    struct AttentionState {
        float *max, *sum, *out;
    };
    float* query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const;
    void merge_segment(uint32_t segment, const SegmentResult& from, const AttentionState& to);
    void merge_parts(uint32_t row);
    void finish_attention(uint32_t first, uint32_t last, uint32_t part);
    void project_attention(uint32_t first, uint32_t last, uint32_t part);
    void norm_for_ffn(uint32_t first, uint32_t last, uint32_t part);
    void multiply_gate_up(uint32_t first, uint32_t last, uint32_t part);
    void quantize_ffn(uint32_t first, uint32_t last, uint32_t part);
    void project_ffn(uint32_t first, uint32_t last, uint32_t part);
    void norm_wanted(uint32_t first, uint32_t last, uint32_t part);
    void multiply_logits(uint32_t first, uint32_t last, uint32_t part);
    void multiply(const PackedMatrix& matrix, uint32_t first, uint32_t last, const float* x,
                  float* y);
    void add_to_rows(float* to, const float* from, size_t from_stride, const PackedMatrix& matrix,
                     uint32_t first, uint32_t last);
    void project(const PackedMatrix& matrix, uint32_t first, uint32_t last, const float* x);
    void quantize_row(const float* x, uint32_t n, uint64_t planes, uint32_t row);

    const Gguf*            gguf_ = nullptr;
    const ModelSpec*       spec_ = nullptr;
    BackendOptions         options_;
    const Kernels*         kernels_ = nullptr;
    std::unique_ptr<Team>  team_;
    CpuWeights             weights_;
    std::vector<RopeTable> ropes_;
    CpuSizes               sizes_{};
    CpuScratch             scratch_{};
    uint64_t               page_bytes_ = 0;
    Buffer                 weights_memory_, kv_, scratch_memory_;

    size_t   load_item_ = 0;       // the next to load, and its next tile
    uint32_t load_tile_ = 0;
    uint64_t loaded_bytes_ = 0, bytes_to_load_ = 0;

    std::span<const BatchRow> rows_;  // of the batch in work; empty: none
    uint32_t stage_ = 0, layer_ = 0;  // what is next, and its next unit
    uint32_t unit_ = 0;
    uint32_t unit_count_ = 0, wanted_count_ = 0;
    bool     has_deadline_ = false;
    double   ns_per_work_[last_stage + 1][2] = {};  // of a stage, in batches of few and many rows
    std::atomic<bool> finite_{true};
};

// In the order in which they run; from first_of_layer to last_of_layer once a layer.
const CpuBackend::Stage CpuBackend::stages_[] = {
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::embed_rows, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::norm_for_attention, false},
    {&CpuBackend::count_qkv, &CpuBackend::work_qkv, &CpuBackend::multiply_qkv, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::rotate_and_store, false},
    {&CpuBackend::count_attention, &CpuBackend::work_attention, &CpuBackend::attend_units, true},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::finish_attention, false},
    {&CpuBackend::count_embd, &CpuBackend::work_output, &CpuBackend::project_attention, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::norm_for_ffn, false},
    {&CpuBackend::count_ff, &CpuBackend::work_gate_up, &CpuBackend::multiply_gate_up, false},
    {&CpuBackend::count_rows, &CpuBackend::work_row, &CpuBackend::quantize_ffn, false},
    {&CpuBackend::count_embd, &CpuBackend::work_down, &CpuBackend::project_ffn, false},
    {&CpuBackend::count_wanted, &CpuBackend::work_row, &CpuBackend::norm_wanted, false},
    {&CpuBackend::count_vocab, &CpuBackend::work_logits, &CpuBackend::multiply_logits, false},
};

Result<void> CpuBackend::open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, const Kernels* kernels) {
    gguf_ = &gguf;
    spec_ = &spec;
    options_ = options;
    if (!kernels) {
        auto chosen = choose_kernels();
        if (!chosen) return chosen.error();
        kernels = *chosen;
    }
    kernels_ = kernels;
    auto layout = lay_out_cpu(spec, tensors, options, 0);
    if (!layout) return layout.error();
    const struct { Buffer* buffer; uint64_t bytes; const char* what; } wanted[] = {
        {&weights_memory_, layout->plan.weights, "weights"},
        {&kv_, layout->plan.kv, "keys and values (context)"},
        {&scratch_memory_, layout->plan.scratch, "scratch"},
    };
    for (const auto& [buffer, bytes, what] : wanted) {
        auto memory = Buffer::allocate(bytes, what, buffer == &weights_memory_);
        if (!memory) return memory.error();
        *buffer = std::move(*memory);
    }
    layout =
        lay_out_cpu(spec, tensors, options, reinterpret_cast<uintptr_t>(weights_memory_.data()));
    weights_ = std::move(layout->weights);
    ropes_ = std::move(layout->ropes);
    sizes_ = layout->sizes;
    page_bytes_ = layout->page_bytes;
    Carver carver{reinterpret_cast<uintptr_t>(scratch_memory_.data())};
    scratch_.place(carver, sizes_, spec.n_embd, spec.n_vocab);
    for (const LoadItem& item : weights_.items) bytes_to_load_ += item.tensor->bytes;
    auto team = Team::create(static_cast<int>(sizes_.parts) - 1, options.parallel_for,
                             options.parallel_for_host);
    if (!team) return team.error();
    team_ = std::move(*team);
    return {};
}

// ---- Loading ---------------------------------------------------------------------------------

Result<bool> CpuBackend::load(uint64_t budget_us, float* progress) {
    const uint64_t start = monotonic_ns();
    team_->begin();
    Result<void> good;
    while (good && load_item_ < weights_.items.size()) {
        good = load_item_slice();
        if ((monotonic_ns() - start) / 1000 >= budget_us) break;
    }
    team_->end();
    if (!good) return good.error();
    if (progress)
        *progress = static_cast<float>(static_cast<double>(loaded_bytes_) /
                                       static_cast<double>(bytes_to_load_));
    return load_item_ == weights_.items.size();
}

// A vector, or as many tiles as the threads take at a time. What was read is released at once.
Result<void> CpuBackend::load_item_slice() {
    const LoadItem& item = weights_.items[load_item_];
    const TensorInfo& tensor = *item.tensor;
    const uint64_t rows = item.packed ? tensor.dims[1] : 1;
    const uint64_t row_bytes = tensor.bytes / rows, tile_bytes = row_bytes * kTileRows;
    const uint32_t tiles = static_cast<uint32_t>((rows + kTileRows - 1) / kTileRows);
    const uint64_t step = sizes_.parts * std::max<uint64_t>(1, kLoadBytes / tile_bytes);
    uint32_t last = static_cast<uint32_t>(std::min<uint64_t>(tiles, load_tile_ + step));
    const uint64_t offset = load_tile_ * tile_bytes;
    auto there = gguf_->tensor_bytes(tensor);
    const std::byte* source = there ? there->data() + offset : scratch_memory_.data();
    if (!there) {  // a reader: by way of the scratch memory, a tile a thread or more
        const uint64_t fits = scratch_memory_.size() / tile_bytes;
        if (item.packed) last = static_cast<uint32_t>(std::min<uint64_t>(last, load_tile_ + fits));
    }
    const uint64_t bytes = std::min(tensor.bytes, last * tile_bytes) - offset;
    if (!item.packed) {
        auto read = gguf_->read_tensor(tensor, 0, {item.out, static_cast<size_t>(bytes)});
        if (!read) return read;
    } else {
        if (!there) {
            auto read = gguf_->read_tensor(tensor, offset,
                                           {scratch_memory_.data(), static_cast<size_t>(bytes)});
            if (!read) return read;
        }
        PackJob job{&item, source, load_tile_, last};
        team_->run(pack_part, &job);
    }
    gguf_->release(tensor, offset, bytes);
    loaded_bytes_ += bytes;
    load_tile_ = last;
    if (last == tiles) {
        ++load_item_;
        load_tile_ = 0;
    }
    return {};
}

void CpuBackend::pack_part(void* context, uint32_t part, uint32_t parts) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const TensorInfo& tensor = *job.item->tensor;
    const uint32_t rows = static_cast<uint32_t>(tensor.dims[1]),
                   cols = static_cast<uint32_t>(tensor.dims[0]);
    const uint64_t count = job.last - job.first, row_bytes = tensor.bytes / rows;
    const uint32_t first = job.first + static_cast<uint32_t>(count * part / parts);
    const uint32_t last = job.first + static_cast<uint32_t>(count * (part + 1) / parts);
    if (first == last) return;
    pack_tiles(tensor.type, rows, cols, job.source + (first - job.first) * row_bytes * kTileRows,
               first, last, job.item->out + first * packed_tile_bytes(tensor.type, cols));
}

// ---- Pages -----------------------------------------------------------------------------------

void CpuBackend::copy_page(uint32_t from, uint32_t to) {
    for (const CpuLayer& in : weights_.layers)
        std::memcpy(kv_page(in, to), kv_page(in, from), in.kv_page_bytes());
}

void CpuBackend::export_page(uint32_t page, std::byte* out) const {
    for (const CpuLayer& in : weights_.layers) {
        std::memcpy(out, kv_page(in, page), in.kv_page_bytes());
        out += in.kv_page_bytes();
    }
}

void CpuBackend::import_page(uint32_t page, const std::byte* bytes) {
    for (const CpuLayer& in : weights_.layers) {
        std::memcpy(kv_page(in, page), bytes, in.kv_page_bytes());
        bytes += in.kv_page_bytes();
    }
}

// ---- A batch, stage after stage --------------------------------------------------------------

Result<void> CpuBackend::begin(std::span<const BatchRow> rows) {
    const auto refuse = [](std::string what) {
        return make_error(ErrorKind::internal, std::move(what));
    };
    if (load_item_ < weights_.items.size()) return refuse("batch: the model is not loaded yet");
    if (rows.empty() || rows.size() > options_.max_batch_rows)
        return refuse(
            format("batch: %zu rows are not in 1..%u", rows.size(), options_.max_batch_rows));
    uint32_t wanted = 0;
    for (const BatchRow& row : rows) {
        if (!row.embedding && (row.token < 0 || static_cast<uint32_t>(row.token) >= spec_->n_vocab))
            return refuse(format("batch: there is no token %d", row.token));
        if (row.position >= cpu_positions(options_))
            return refuse(format("batch: there is no position %u", row.position));
        if (!row.logits) continue;
        if (wanted == options_.max_logit_rows)
            return refuse(format("batch: more than %u rows want logits", wanted));
        scratch_.wanted[wanted++] = static_cast<uint32_t>(&row - rows.data());
    }
    rows_ = rows;
    wanted_count_ = wanted;
    stage_ = layer_ = unit_ = 0;
    finite_.store(true, std::memory_order_relaxed);
    plan_attention();
    return {};
}

Result<bool> CpuBackend::advance(uint64_t deadline_ns) {
    if (rows_.empty()) return make_error(ErrorKind::internal, "batch: none was begun");
    const FloatState float_state;
    has_deadline_ = deadline_ns != 0;
    team_->begin();
    do run_slice();
    while (stage_ <= last_stage && !(has_deadline_ && monotonic_ns() >= deadline_ns));
    const bool done = stage_ > last_stage;
    std::optional<Error> error;
    if (done && !finite_.load(std::memory_order_relaxed)) error = locate_bad_numbers();
    team_->end();
    if (done) rows_ = {};
    if (error) return std::move(*error);
    return done;
}

// All that is left of the stage, or, where there is a deadline, about kSliceNs of it.
void CpuBackend::run_slice() {
    const Stage& stage = stages_[stage_];
    const uint64_t units = (this->*stage.units)(), work = (this->*stage.work)();
    double& ns_per_work = ns_per_work_[stage_][rows_.size() >= kClaimColumns];
    if (ns_per_work == 0) ns_per_work = kSlowestWorkNs;
    uint64_t last = units;
    if (has_deadline_) {
        const double fits = static_cast<double>(kSliceNs) /
                            (ns_per_work * static_cast<double>((work + 1) * sizes_.parts));
        last = std::min(units, unit_ + sizes_.parts * (1 + static_cast<uint64_t>(fits)));
    }
    const uint64_t start = has_deadline_ ? monotonic_ns() : 0;
    const uint64_t count = last - unit_;
    // Kernels take tiles in pairs; four claims a thread even out what the threads are held up by.
    const uint64_t few = std::min(kClaimUnits, count / (4 * sizes_.parts)) & ~uint64_t{1};
    const uint64_t claim_units = stage.claimed                     ? 1
                                 : rows_.size() >= kClaimColumns ? std::max<uint64_t>(2, few)
                                                                 : 0;
    Slice slice{this, &stage, unit_, static_cast<uint32_t>(last), {unit_},
                static_cast<uint32_t>(claim_units)};
    if (count == 1 || count * work < kJoinWork) (this->*stage.job)(slice.first, slice.last, 0);
    else team_->run(run_part, &slice);
    if (has_deadline_ && count * work >= kJoinWork)
        ns_per_work = static_cast<double>(monotonic_ns() - start + 1) /
                      static_cast<double>(count * work);
    unit_ = slice.last;
    if (last < units) return;
    unit_ = 0;
    if (stage_ == last_of_layer && ++layer_ < weights_.layers.size()) stage_ = first_of_layer;
    else ++stage_;
    if (stage_ > last_of_layer) layer_ = 0;  // no layer's: any will do for what asks its sizes
}

void CpuBackend::run_part(void* context, uint32_t part, uint32_t parts) {
    Slice& slice = *static_cast<Slice*>(context);
    const auto job = slice.stage->job;
    if (const uint32_t n = slice.claim_units) {
        for (uint32_t i; (i = slice.claim.fetch_add(n, std::memory_order_relaxed)) < slice.last;)
            (slice.self->*job)(i, std::min(i + n, slice.last), part);
        return;
    }
    const uint64_t count = slice.last - slice.first;
    const uint32_t first = slice.first + static_cast<uint32_t>(count * part / parts);
    const uint32_t last = slice.first + static_cast<uint32_t>(count * (part + 1) / parts);
    if (first < last) (slice.self->*job)(first, last, part);
}

// Computes the batch again (it gives the same) and looks after every layer.
Error CpuBackend::locate_bad_numbers() {
    stage_ = layer_ = unit_ = 0;
    has_deadline_ = false;
    std::string where = "the output matrix";
    while (stage_ <= last_of_layer) {
        const uint32_t stage = stage_, in = layer_;
        run_slice();
        if ((stage != embed && stage != last_of_layer) || residual_is_finite()) continue;
        where = stage == embed ? "the token embedding" : format("layer %u (blk.%u)", in, in);
        break;
    }
    stage_ = last_stage + 1;
    return make_error(ErrorKind::bad_data, gguf_->name() +
                                               ": the logits are not finite; the first number "
                                               "that is not came from " +
                                               where);
}

bool CpuBackend::residual_is_finite() const {
    const size_t count = rows_.size() * spec_->n_embd;
    return std::all_of(scratch_.x, scratch_.x + count, [](float x) { return std::isfinite(x); });
}

// ---- The stages ------------------------------------------------------------------------------

void CpuBackend::quantize_row(const float* x, uint32_t n, uint64_t planes, uint32_t row) {
    if (n % kActivationBlock == 0)  // else no matrix that meets x is quantized
        kernels_->quantize(x, n, static_cast<uint32_t>(planes),
                           scratch_.blocks + row * planes * (n / kActivationBlock));
}

void CpuBackend::embed_rows(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first; row < last; ++row) {
        const BatchRow& from = rows_[row];
        float* x = scratch_.x + row * n;
        if (from.embedding) std::memcpy(x, from.embedding, n * sizeof(float));
        else dequantize_row(weights_.token_embd, static_cast<uint32_t>(from.token), x);
        if (!from.embedding && spec_->embedding_scale != 1)
            kernels_->scale(x, spec_->embedding_scale, n);
        float* cos_sin = scratch_.cos_sin + row * sizes_.rope_values;
        for (const RopeTable& rope : ropes_)
            for (const double frequency : rope.frequencies) {
                double sine, cosine;
                exact_sincos(static_cast<double>(from.position) * frequency, &sine, &cosine);
                *cos_sin++ = static_cast<float>(cosine);
                *cos_sin++ = static_cast<float>(sine);
            }
    }
}

void CpuBackend::norm_rows(uint32_t first, uint32_t last, const float* weight) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first; row < last; ++row) {
        float* y = scratch_.y + row * n;
        kernels_->rms_norm(scratch_.x + row * n, weight, spec_->norm_eps, n, y);
        quantize_row(y, spec_->n_embd, sizes_.planes, row);
    }
}

void CpuBackend::norm_for_attention(uint32_t first, uint32_t last, uint32_t) {
    norm_rows(first, last, layer().attn_norm);
}

// y (rows, matrix.rows) = matrix times every row of activations, of some tiles.
void CpuBackend::multiply(const PackedMatrix& matrix, uint32_t first, uint32_t last, const float* x,
                          float* y) {
    kernels_->matmul({&matrix, first, last, row_count(), static_cast<uint32_t>(sizes_.planes),
                      scratch_.blocks, x, matrix.cols, y, matrix.rows});
}

// to (rows, matrix.rows) += from (rows, or one for all where from_stride is 0), of some tiles.
void CpuBackend::add_to_rows(float* to, const float* from, size_t from_stride,
                             const PackedMatrix& matrix, uint32_t first, uint32_t last) {
    const size_t begin = first * kTileRows, end = std::min(last * kTileRows, matrix.rows);
    for (size_t row = 0; row < rows_.size(); ++row)
        kernels_->add(to + row * matrix.rows + begin, from + row * from_stride + begin,
                      end - begin);
}

void CpuBackend::multiply_qkv(uint32_t first, uint32_t last, uint32_t) {
    const struct { const PackedMatrix* matrix; const float* bias; float* y; } three[] = {
        {&layer().q, layer().q_bias, scratch_.q},
        {&layer().k, layer().k_bias, scratch_.k},
        {&layer().v, layer().v_bias, scratch_.v},
    };
    uint32_t base = 0;
    for (const auto& [matrix, bias, y] : three) {
        const uint32_t end = base + matrix->tiles();
        const uint32_t from = std::max(first, base), to = std::min(last, end);
        if (from < to) {
            multiply(*matrix, from - base, to - base, scratch_.y, y);
            if (bias) add_to_rows(y, bias, 0, *matrix, from - base, to - base);
        }
        base = end;
    }
}

void CpuBackend::rotate_and_store(uint32_t first, uint32_t last, uint32_t) {
    const LayerSpec& spec = *layer().spec;
    const RopeSpec& rope = spec.rope;
    const bool neox = rope.kind == RopeKind::neox;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const size_t n_q = size_t{spec.n_heads} * dim, n_kv = size_t{spec.n_kv_heads} * dim;
    size_t table = 0;
    for (uint32_t i = 0; i < layer().rope; ++i) table += ropes_[i].spec->dims;
    for (uint32_t row = first; row < last; ++row) {
        const float* cos_sin = scratch_.cos_sin + row * sizes_.rope_values + table;
        float *q = scratch_.q + row * n_q, *k = scratch_.k + row * n_kv;
        kernels_->rope(q, spec.n_heads, dim, rope.dims, neox, cos_sin);
        kernels_->rope(k, spec.n_kv_heads, dim, rope.dims, neox, cos_sin);
        kernels_->scale(q, spec.attention_scale, n_q);
        const uint32_t position = rows_[row].position, in_page = position % options_.page_tokens;
        std::byte* page = kv_page(layer(), rows_[row].pages[position / options_.page_tokens]);
        const size_t half = layer().kv_head_bytes / 2;
        const size_t group_at = in_page / kKeyGroup * (half * kKeyGroup / options_.page_tokens);
        for (uint32_t head = 0; head < spec.n_kv_heads; ++head) {
            std::memcpy(scratch_.turned + (size_t{head} * rows_.size() + row) * group * dim,
                        q + size_t{head} * group * dim, group * dim * sizeof(float));
            std::byte* keys = page + head * layer().kv_head_bytes + group_at;
            kernels_->store_kv(options_.kv_type, k + size_t{head} * dim,
                               scratch_.v + row * n_kv + size_t{head} * dim, dim,
                               in_page % kKeyGroup, keys, keys + half);
        }
    }
}

// Rows that are neighbours in their sequence attend together. A batch of few rows is cut by
// segments too, so that all threads have something to do; finish_attention() merges the parts.
void CpuBackend::plan_attention() {
    unit_count_ = 0;
    for (uint32_t row = row_count(), rows; row > 0; row -= rows) {  // the longest first
        const BatchRow& last = rows_[row - 1];
        const uint32_t segments = last.position / kSegment + 1;
        rows = 1;
        if (split_over_segments()) {
            for (uint32_t i = 0; i < segments; ++i)
                scratch_.units[unit_count_++] = {row - 1, 1, i, i + 1};
            continue;
        }
        while (rows < row && rows < kQueryRows && rows_[row - 1 - rows].pages == last.pages &&
               rows_[row - 1 - rows].position + rows == last.position) ++rows;
        scratch_.units[unit_count_++] = {row - rows, rows, 0, segments};
    }
}

uint64_t CpuBackend::work_attention() const {
    const AttentionUnit& unit = scratch_.units[0];
    const LayerSpec& spec = *layer().spec;
    return uint64_t{2 * kSegment} * unit.rows * (unit.last_segment - unit.first_segment) *
           (spec.n_heads / spec.n_kv_heads) * spec.head_dim;
}

void CpuBackend::attend_units(uint32_t first, uint32_t last, uint32_t part) {
    const uint32_t kv_heads = layer().spec->n_kv_heads;
    for (uint32_t i = first; i < last; ++i)
        attend_unit(scratch_.units[i / kv_heads], i % kv_heads, scratch_.queries[part]);
}

void CpuBackend::attend_unit(const AttentionUnit& unit, uint32_t kv_head, QueryScratch& scratch) {
    const LayerSpec& spec = *layer().spec;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const uint32_t page_tokens = options_.page_tokens,
                   newest = rows_[unit.row + unit.rows - 1].position;
    const size_t half = layer().kv_head_bytes / 2, group_bytes = half * kKeyGroup / page_tokens;
    const void *keys[kSegment / kKeyGroup], *values[kSegment / kKeyGroup];
    AttentionTask task{};
    task.kv_type = options_.kv_type;
    task.head_dim = dim;
    task.queries = unit.rows * group;
    task.q = scratch_.turned + (kv_head * rows_.size() + unit.row) * group * dim;
    task.q_stride = task.out_stride = dim;
    task.begin = scratch.begin;
    task.end = scratch.end;
    task.keys = keys;
    task.values = values;
    task.max = scratch.max;
    task.sum = scratch.sum;
    task.out = scratch.out;
    for (uint32_t segment = unit.first_segment; segment < unit.last_segment; ++segment) {
        const uint32_t start = segment * kSegment;
        for (uint32_t i = 0; i < kSegment / kKeyGroup; ++i) {
            const uint32_t position = start + i * kKeyGroup;
            keys[i] = values[i] = nullptr;
            if (position > newest) continue;
            const uint32_t page = rows_[unit.row].pages[position / page_tokens];
            const std::byte* at = kv_page(layer(), page) + kv_head * layer().kv_head_bytes +
                                  position % page_tokens / kKeyGroup * group_bytes;
            keys[i] = at;
            values[i] = at + half;
        }
        for (uint32_t i = 0; i < task.queries; ++i) {
            const uint32_t seen = rows_[unit.row + i / group].position + 1;
            scratch.begin[i] = 0;
            scratch.end[i] =
                static_cast<uint16_t>(seen > start ? std::min(seen - start, kSegment) : 0);
        }
        if (split_over_segments()) {
            const size_t at =
                (unit.row * sizes_.segments + segment) * spec.n_heads + kv_head * group;
            task.max = scratch_.part_max + at;
            task.sum = scratch_.part_sum + at;
            task.out = scratch_.part_out + at * dim;
        }
        kernels_->attention(task);
        if (split_over_segments()) continue;
        for (uint32_t i = 0; i < task.queries; ++i)
            if (scratch.end[i])
                merge_segment(
                    segment, {scratch.max[i], scratch.sum[i], task.out + size_t{i} * dim},
                    {scratch.total_max + i, scratch.total_sum + i, query_output(unit, kv_head, i)});
    }
    if (split_over_segments()) return;
    for (uint32_t i = 0; i < task.queries; ++i)
        kernels_->scale(query_output(unit, kv_head, i), 1 / scratch.total_sum[i], dim);
}

float* CpuBackend::query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const {
    const LayerSpec& spec = *layer().spec;
    const uint32_t group = spec.n_heads / spec.n_kv_heads;
    const size_t row = unit.row + query / group, head = kv_head * group + query % group;
    return scratch_.attended + (row * spec.n_heads + head) * spec.head_dim;
}

void CpuBackend::merge_segment(uint32_t segment, const SegmentResult& from,
                               const AttentionState& to) {
    const size_t dim = layer().spec->head_dim;
    if (segment != 0)
        return kernels_->attention_merge(to.max, to.sum, to.out, from.max, from.sum, from.out, dim);
    *to.max = from.max;
    *to.sum = from.sum;
    std::memcpy(to.out, from.out, dim * sizeof(float));
}

void CpuBackend::merge_parts(uint32_t row) {
    const LayerSpec& spec = *layer().spec;
    const size_t dim = spec.head_dim;
    for (uint32_t head = 0; head < spec.n_heads; ++head) {
        float max = 0, sum = 0,
              *out = scratch_.attended + (size_t{row} * spec.n_heads + head) * dim;
        for (uint32_t segment = 0; segment <= rows_[row].position / kSegment; ++segment) {
            const size_t at = (row * sizes_.segments + segment) * spec.n_heads + head;
            merge_segment(
                segment,
                {scratch_.part_max[at], scratch_.part_sum[at], scratch_.part_out + at * dim},
                {&max, &sum, out});
        }
        kernels_->scale(out, 1 / sum, dim);
    }
}

void CpuBackend::finish_attention(uint32_t first, uint32_t last, uint32_t) {
    const uint32_t n = layer().spec->n_heads * layer().spec->head_dim;
    for (uint32_t row = first; row < last; ++row) {
        if (split_over_segments()) merge_parts(row);
        quantize_row(scratch_.attended + size_t{row} * n, n, sizes_.planes, row);
    }
}

// x += matrix times activations, of some tiles.
void CpuBackend::project(const PackedMatrix& matrix, uint32_t first, uint32_t last,
                         const float* activations) {
    multiply(matrix, first, last, activations, scratch_.y);
    add_to_rows(scratch_.x, scratch_.y, spec_->n_embd, matrix, first, last);
}

void CpuBackend::project_attention(uint32_t first, uint32_t last, uint32_t) {
    project(layer().attn_output, first, last, scratch_.attended);
}

void CpuBackend::norm_for_ffn(uint32_t first, uint32_t last, uint32_t) {
    norm_rows(first, last, layer().ffn_norm);
}

void CpuBackend::multiply_gate_up(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = layer().spec->n_ff, begin = first * kTileRows;
    const size_t end = std::min<size_t>(last * kTileRows, n);
    multiply(layer().gate, first, last, scratch_.y, scratch_.gate);
    multiply(layer().up, first, last, scratch_.y, scratch_.up);
    for (size_t row = 0; row < rows_.size(); ++row)
        kernels_->silu_mul(scratch_.gate + row * n + begin, scratch_.up + row * n + begin,
                           end - begin);
}

void CpuBackend::quantize_ffn(uint32_t first, uint32_t last, uint32_t) {
    const uint32_t n = layer().spec->n_ff;
    for (uint32_t row = first; row < last; ++row)
        quantize_row(scratch_.gate + size_t{row} * n, n, sizes_.planes, row);
}

void CpuBackend::project_ffn(uint32_t first, uint32_t last, uint32_t) {
    project(layer().down, first, last, scratch_.gate);
}

// The output matrix always meets two planes.
void CpuBackend::norm_wanted(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = spec_->n_embd;
    for (uint32_t i = first; i < last; ++i) {
        kernels_->rms_norm(scratch_.x + scratch_.wanted[i] * n, weights_.output_norm,
                           spec_->norm_eps, n, scratch_.y + i * n);
        quantize_row(scratch_.y + i * n, spec_->n_embd, 2, i);
    }
}

void CpuBackend::multiply_logits(uint32_t first, uint32_t last, uint32_t) {
    const PackedMatrix& matrix = weights_.output;
    kernels_->matmul({&matrix, first, last, wanted_count_, 2, scratch_.blocks, scratch_.y,
                      matrix.cols, scratch_.logits, matrix.rows});
    const size_t begin = size_t{first} * kTileRows,
                 end = std::min<size_t>(size_t{last} * kTileRows, matrix.rows);
    uint32_t largest = 0;  // exponent: 255 is infinite or no number
    for (uint32_t i = 0; i < wanted_count_; ++i) {
        float* logits = scratch_.logits + size_t{i} * matrix.rows;
        if (spec_->logit_scale != 1)
            kernels_->scale(logits + begin, spec_->logit_scale, end - begin);
        for (size_t j = begin; j < end; ++j)
            largest = std::max(largest, std::bit_cast<uint32_t>(logits[j]) & 0x7f800000u);
    }
    if (largest == 0x7f800000u) finite_.store(false, std::memory_order_relaxed);
}

}  // namespace

Result<MemoryPlan> plan_cpu(const ModelSpec& spec, const ModelTensors& tensors,
                            const BackendOptions& options) {
    auto layout = lay_out_cpu(spec, tensors, options, 0);
    if (!layout) return layout.error();
    return layout->plan;
}

Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const ModelTensors& tensors,
                                                  const BackendOptions& options,
                                                  const Kernels* kernels) {
    auto backend = std::make_unique<CpuBackend>();
    auto opened = backend->open(gguf, spec, tensors, options, kernels);
    if (!opened) return opened.error();
    return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>sampler
// A token's weight is exp((logit - highest) / temperature), in double, from tables: up to 7e-7 too
// large, exactly 1 for the highest, and without a product that feeds a sum, so that no compiler can
// fuse any. Weights are added token by token in blocks of 1,024 ids, the blocks in order; of sorted
// candidates one after the other.

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr size_t kWeightBlock = 1024;

// 2^-(n / 2^20) for integers n is coarse[high 10 bits of the fraction] * fine[low 10 bits].
struct WeightTables {
    double coarse[1024], fine[1024];
    WeightTables() {
        for (int i = 0; i < 1024; ++i) {
            coarse[i] = exact_exp2(-i / 1024.0);
            fine[i] = exact_exp2(-i / 1048576.0);
        }
    }
};

const WeightTables& weight_tables() {
    static const WeightTables tables;
    return tables;
}

// 2^20 / ln 2 a unit of temperature; finite, for 0 times it must be 0.
double weight_scale(double temperature) {
    return std::min(0x1.71547652b82fep+20 / temperature, 1e300);
}

double weight_of(const WeightTables& tables, float logit, float highest, double scale) {
    const double steps = (static_cast<double>(highest) - static_cast<double>(logit)) * scale;
    if (!(steps < 1000.0 * 1048576)) return 0;
    const uint64_t n = static_cast<uint64_t>(steps);
    const double fraction = tables.coarse[n >> 10 & 1023] * tables.fine[n & 1023];
    return fraction * std::bit_cast<double>((1023 - (n >> 20)) << 52);
}

double weigh_block(std::span<const float> logits, size_t block, float highest, double scale) {
    const WeightTables& tables = weight_tables();
    double sum = 0;
    for (const float logit : logits.subspan(block, std::min(kWeightBlock, logits.size() - block)))
        sum += weight_of(tables, logit, highest, scale);
    return sum;
}

size_t most_likely(std::span<const float> logits) {
    size_t best = 0;
    for (size_t i = 0; i < logits.size(); i += 16) {  // a vectorisable question before a search
        const std::span<const float> some =
            logits.subspan(i, std::min<size_t>(16, logits.size() - i));
        bool above = false;
        for (const float logit : some) above |= logit > logits[best];
        if (!above) continue;
        for (size_t j = 0; j < some.size(); ++j)
            if (some[j] > logits[best]) best = i + j;
    }
    return best;
}

uint64_t mix_bits(uint64_t x) {  // the finalizer of splitmix64 (Steele, Lea, Flood, 2014)
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

}  // namespace

struct CandidateOrder {
    bool operator()(const Sampler::Candidate& a, const Sampler::Candidate& b) const {
        return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    }
};

double uniform_at(int64_t seed, uint64_t position) {
    constexpr uint64_t step = 0x9e3779b97f4a7c15u;
    const uint64_t bits =
        mix_bits(mix_bits(static_cast<uint64_t>(seed) + step) + (position + 1) * step);
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(const SamplerOptions& options)
    : options_(options),
      scale_(weight_scale(options.temperature)),
      penalised_(options.presence_penalty != 0 || options.frequency_penalty != 0 ||
                 options.repetition_penalty != 1) {}

void Sampler::see_prompt(std::span<const Token> tokens, size_t most_drawn) {
    if (!penalised_) return;
    const auto by_token = [](const Seen& a, const Seen& b) { return a.token < b.token; };
    seen_.reserve(tokens.size() + most_drawn);
    for (const Token token : tokens) seen_.push_back({token, 0});
    std::sort(seen_.begin(), seen_.end(), by_token);
    const auto same = [](const Seen& a, const Seen& b) { return a.token == b.token; };
    seen_.erase(std::unique(seen_.begin(), seen_.end(), same), seen_.end());
}

void Sampler::see(Token token) {
    if (!penalised_) return;
    auto at = std::lower_bound(seen_.begin(), seen_.end(), token,
                               [](const Seen& one, Token id) { return one.token < id; });
    if (at == seen_.end() || at->token != token) at = seen_.insert(at, {token, 0});
    ++at->drawn;
}

// The logits with penalties and bias.
std::span<const float> Sampler::adjust(std::span<const float> logits) {
    if (!penalised_ && options_.logit_bias.empty()) return logits;
    adjusted_.assign(logits.begin(), logits.end());
    for (const Seen& one : seen_) {
        float& logit = adjusted_[static_cast<size_t>(one.token)];
        double x = static_cast<double>(logit);
        x = x > 0 ? x / options_.repetition_penalty : x * options_.repetition_penalty;
        if (one.drawn) x -= options_.presence_penalty;
        x -= options_.frequency_penalty * one.drawn;
        logit = static_cast<float>(x);
    }
    for (const auto& [token, bias] : options_.logit_bias)
        adjusted_[static_cast<size_t>(token)] += bias;
    return adjusted_;
}

Token Sampler::sample(std::span<const float> raw_logits, uint64_t position) {
    const FloatState float_state;
    const std::span<const float> logits = adjust(raw_logits);
    const size_t best = most_likely(logits);
    if (options_.temperature <= 0 || options_.top_k == 1) return static_cast<Token>(best);
    highest_ = logits[best];
    const double uniform = uniform_at(options_.seed, position);
    const bool all = options_.top_k == 0 && options_.top_p >= 1 && options_.min_p <= 0;
    return all ? draw_from_all(logits, uniform) : draw_from_best(logits, uniform);
}

double Sampler::add_blocks(std::span<const float> logits) {
    double total = 0;
    sums_.clear();
    for (size_t block = 0; block < logits.size(); block += kWeightBlock) {
        sums_.push_back(weigh_block(logits, block, highest_, scale_));
        total += sums_.back();
    }
    return total;
}

// Walks to the first token whose running sum passes the drawn part of the total.
Token Sampler::draw_from_all(std::span<const float> logits, double uniform) {
    const double target = uniform * add_blocks(logits);
    double before = 0;
    size_t block = 0;
    while (block + 1 < sums_.size() && before + sums_[block] <= target) before += sums_[block++];
    const WeightTables& tables = weight_tables();
    Token last = 0;
    double inside = 0;
    const size_t end = std::min((block + 1) * kWeightBlock, logits.size());
    for (size_t i = block * kWeightBlock; i < end; ++i) {
        const double weight = weight_of(tables, logits[i], highest_, scale_);
        if (weight > 0) last = static_cast<Token>(i);
        inside += weight;
        if (before + inside > target) break;
    }
    return last;
}

// The top_k best of all logits, sorted: a heap whose top is the worst one kept.
void Sampler::keep_top(std::span<const float> logits) {
    const CandidateOrder better;
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i) {
        const Candidate one{logits[i], static_cast<Token>(i)};
        if (candidates_.size() == options_.top_k) {
            if (!better(one, candidates_.front())) continue;
            std::pop_heap(candidates_.begin(), candidates_.end(), better);
            candidates_.back() = one;
        } else {
            candidates_.push_back(one);
        }
        std::push_heap(candidates_.begin(), candidates_.end(), better);
    }
    std::sort_heap(candidates_.begin(), candidates_.end(), better);
}

// All whose logit is at most `below` under the highest, sorted.
void Sampler::keep_within(std::span<const float> logits, double below) {
    const double limit = static_cast<double>(highest_) - below;
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i)
        if (static_cast<double>(logits[i]) >= limit)
            candidates_.push_back({logits[i], static_cast<Token>(i)});
    std::sort(candidates_.begin(), candidates_.end(), CandidateOrder());
}

// How many are looked at never shows in the result: a walk that ends for want of candidates is
// repeated with more of them.
Token Sampler::draw_from_best(std::span<const float> logits, double uniform) {
    const WeightTables& tables = weight_tables();
    double total = 0;
    if (options_.top_k) {
        keep_top(logits);
        for (const Candidate& one : candidates_)
            total += weight_of(tables, one.logit, highest_, scale_);
    } else if (options_.top_p < 1) {
        total = add_blocks(logits);
    }
    const double enough =
        options_.top_p < 1 ? options_.top_p * total : std::numeric_limits<double>::infinity();
    size_t kept = 0;
    double sum = 0;
    for (double below = 8 * options_.temperature;; below *= 2) {
        if (!options_.top_k) keep_within(logits, below);
        bool ended = false;
        for (kept = 0, sum = 0; kept < candidates_.size() && !ended; ++kept) {
            const double weight = weight_of(tables, candidates_[kept].logit, highest_, scale_);
            if (kept > 0 && weight < options_.min_p) break;
            sum += weight;
            ended = sum >= enough;
        }
        if (ended || kept < candidates_.size() || options_.top_k ||
            candidates_.size() == logits.size())
            break;
    }
    const double target = uniform * sum;
    double so_far = 0;
    for (size_t i = 0; i < kept; ++i) {
        so_far += weight_of(tables, candidates_[i].logit, highest_, scale_);
        if (so_far > target) return candidates_[i].token;
    }
    return candidates_[0].token;
}

float logprob_of(std::span<const float> logits, Token token, uint32_t count,
                 std::pair<Token, float>* top) {
    const FloatState float_state;
    const float highest = logits[most_likely(logits)];
    double total = 0;
    for (size_t block = 0; block < logits.size(); block += kWeightBlock)
        total += weigh_block(logits, block, highest, weight_scale(1));
    const double log_total = exact_log(total);
    const auto logprob = [&](float logit) {
        return static_cast<float>((static_cast<double>(logit) - static_cast<double>(highest)) -
                                  log_total);
    };
    uint32_t found = 0;  // an insertion sort: count is small
    for (size_t i = 0; i < logits.size(); ++i) {
        if (found == count && (count == 0 || logits[i] <= top[count - 1].second)) continue;
        uint32_t at = found < count ? found++ : count - 1;
        for (; at > 0 && top[at - 1].second < logits[i]; --at) top[at] = top[at - 1];
        top[at] = {static_cast<Token>(i), logits[i]};
    }
    for (uint32_t i = 0; i < found; ++i) top[i].second = logprob(top[i].second);
    return logprob(logits[static_cast<size_t>(token)]);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>engine
// In this order: the mailbox of a reply; pages; a sequence; opening; from a request to tokens; the
// queue; the step: who runs, the batch, tokens and text; the handles. Locks are held briefly and
// never while something is called.

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t kDefaultContext = 8192;
constexpr uint32_t kMaxRunning     = 1024;
constexpr uint32_t kMaxStepTokens  = 32768;
constexpr uint32_t kMaxLogprobs    = 20;
constexpr size_t   kMaxStops       = 16;           // stop strings of a request, and their bytes
constexpr size_t   kMaxStopBytes   = 256;
constexpr uint32_t kMaxDraft       = 15;           // with the row before them a tile of columns
constexpr uint32_t kFirstDraft     = 5;            // six columns are cheap to multiply
constexpr uint32_t kLeastDraft     = 2;
constexpr uint32_t kMinMatch       = 3;            // tokens that must have stood together before
constexpr uint32_t kMaxMatch       = 8;            // that make a better match no longer
constexpr uint32_t kDraftCredit    = 64;           // a row wasted for so many that are not
constexpr uint32_t kMinPromptRows  = 16;           // of a batch, however small the budget
constexpr uint64_t kMixedNs        = 100'000'000;  // of a batch with prompts beside answers
constexpr uint64_t kLookNs         = 10'000'000;   // between two looks at cancels
constexpr uint64_t kIdleNs         = 1'000'000'000;
constexpr uint64_t kNoLimit        = UINT64_MAX;

}  // namespace

// Wakes the engine's own thread. Shared with replies, which may outlive the engine.
struct Doorbell {
    std::atomic<uint32_t> rings{0};
    std::atomic<bool>     cancels{false};  // some reply was cancelled since the engine last looked
    void ring() {
        rings.fetch_add(1, std::memory_order_release);
        wake(&rings);
    }
};

// ---- Reply: what the engine puts in and the holder takes out ---------------------------------

struct Mailbox {
    std::string id;
    std::shared_ptr<Doorbell> doorbell;
    bool        detached = false;                // the handle's
    std::atomic<bool>     cancelled{false};
    std::atomic<uint32_t> finished{0};           // wait() sleeps on it

    std::mutex  mutex;                           // guards what follows
    bool        hungry = true;                   // poll found nothing: the next event is announced
    bool        start_pending = false, finish_taken = false;
    std::string text;                            // not polled yet
    std::vector<TokenLogprob> logprobs;          // the same
    std::shared_ptr<const Outcome> outcome;

    // Each returns whether to announce that there are events.
    bool put_start(size_t most_text) {
        return put([&] {
            start_pending = true;
            text.reserve(most_text);
        });
    }
    bool put_text(std::string_view more) { return put([&] { text += more; }); }
    bool put_logprob(const TokenLogprob& one) { return put([&] { logprobs.push_back(one); }); }
    bool put_outcome(Outcome end) {
        auto shared = std::make_shared<const Outcome>(std::move(end));
        const bool announce = put([&] { outcome = std::move(shared); });
        finished.store(1, std::memory_order_release);
        wake(&finished);
        return announce;
    }
    template <class Change> bool put(Change change) {
        const std::lock_guard<std::mutex> lock(mutex);
        change();
        return std::exchange(hungry, false);
    }

    std::optional<Event> take() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (std::exchange(start_pending, false)) return Event{Event::Kind::started};
        if (!text.empty() || !logprobs.empty()) {
            Event event{Event::Kind::text_delta, text, {}, std::exchange(logprobs, {})};
            text.clear();  // keeps its room: the engine must not need memory for every token
            return event;
        }
        if (outcome && !std::exchange(finish_taken, true))
            return Event{Event::Kind::finished, {}, outcome};
        hungry = true;
        return std::nullopt;
    }
    void cancel() {
        if (finished.load(std::memory_order_acquire)) return;
        cancelled.store(true, std::memory_order_release);
        doorbell->cancels.store(true, std::memory_order_release);
        doorbell->ring();
    }
    bool wait(int64_t timeout_ms) {
        const uint64_t start = monotonic_ns();
        uint64_t limit = UINT64_MAX;
        if (timeout_ms >= 0 && mul_overflows(static_cast<uint64_t>(timeout_ms), 1'000'000, &limit))
            limit = UINT64_MAX;
        while (!finished.load(std::memory_order_acquire)) {
            const uint64_t waited = monotonic_ns() - start;
            if (waited >= limit) return false;
            wait_on(&finished, 0, std::min(limit - waited, kIdleNs));
        }
        return true;
    }
};

// ---- Pages -----------------------------------------------------------------------------------

// The pages of keys and values: how many use each, and what the full ones hold. A page that nobody
// uses any more can be found by its key until it is taken for something else; of those, the one
// used longest ago goes first. Nothing is allocated after open().
class PagePool {
public:
    static constexpr uint32_t none = UINT32_MAX;

    void open(uint32_t pages);
    uint32_t pages() const { return static_cast<uint32_t>(pages_.size()) - 1; }
    uint32_t unused() const { return unused_; }  // what take() can be called for
    uint32_t cached() const { return cached_; }  // of those, with a key
    uint32_t shared() const { return shared_; }  // with several users
    uint32_t take();
    void share(uint32_t page);  // a user more, a user less
    void drop(uint32_t page);
    bool in_use(uint32_t page) const { return pages_[page].users > 0; }
    /// Whether its only user may change it.
    bool writable(uint32_t page) const { return pages_[page].users == 1 && !pages_[page].keyed; }
    uint32_t find(const Hash256& key) const;
    void set_key(uint32_t page, const Hash256& key, uint64_t group);  // of a page without one
    void refresh(uint64_t group);  // as if its pages had been used just now

private:
    struct Page {
        Hash256  key;
        uint64_t group = 0;
        uint32_t users = 0;
        uint32_t next  = none;           // in its bucket
        uint32_t older = 0, newer = 0;   // among the unused
        bool     keyed = false;
    };
    uint32_t& bucket(const Hash256& key) {
        uint32_t bits;
        std::memcpy(&bits, key.bytes, sizeof bits);
        return buckets_[bits & (buckets_.size() - 1)];
    }
    void link_before(uint32_t page, uint32_t newer);  // into the unused
    void unlink(uint32_t page);
    void forget_key(uint32_t page);

    std::vector<Page>     pages_;  // the last one is both ends of the list of unused ones
    std::vector<uint32_t> buckets_;
    uint32_t unused_ = 0, cached_ = 0, shared_ = 0;
};

void PagePool::open(uint32_t pages) {
    pages_.assign(size_t{pages} + 1, {});
    pages_[pages].older = pages_[pages].newer = pages;
    buckets_.assign(std::bit_ceil(pages), none);
    for (uint32_t page = 0; page < pages; ++page) link_before(page, pages);
}

void PagePool::link_before(uint32_t page, uint32_t newer) {
    const uint32_t older = pages_[newer].older;
    pages_[page].older = older;
    pages_[page].newer = newer;
    pages_[older].newer = pages_[newer].older = page;
    ++unused_;
    cached_ += pages_[page].keyed;
}

void PagePool::unlink(uint32_t page) {
    const Page& at = pages_[page];
    pages_[at.older].newer = at.newer;
    pages_[at.newer].older = at.older;
    --unused_;
    cached_ -= at.keyed;
}

void PagePool::forget_key(uint32_t page) {
    uint32_t* at = &bucket(pages_[page].key);
    while (*at != page) at = &pages_[*at].next;
    *at = pages_[page].next;
    pages_[page].keyed = false;
}

uint32_t PagePool::take() {
    VALAR_ASSERT(unused_ > 0);
    const uint32_t page = pages_[pages()].newer;
    unlink(page);
    if (pages_[page].keyed) forget_key(page);
    pages_[page].users = 1;
    return page;
}

void PagePool::share(uint32_t page) {
    if (pages_[page].users == 0) unlink(page);
    shared_ += ++pages_[page].users == 2;
}

// What cannot be found again is the first to be taken.
void PagePool::drop(uint32_t page) {
    shared_ -= --pages_[page].users == 1;
    if (pages_[page].users) return;
    link_before(page, pages_[page].keyed ? pages() : pages_[pages()].newer);
}

uint32_t PagePool::find(const Hash256& key) const {
    uint32_t page = const_cast<PagePool*>(this)->bucket(key);
    while (page != none && !(pages_[page].key == key)) page = pages_[page].next;
    return page;
}

void PagePool::set_key(uint32_t page, const Hash256& key, uint64_t group) {
    uint32_t& first = bucket(key);
    Page& to = pages_[page];
    to.key = key;
    to.group = group;
    to.keyed = true;
    to.next = std::exchange(first, page);
}

void PagePool::refresh(uint64_t group) {
    uint32_t page = pages_[pages()].newer;
    for (uint32_t left = unused_; left > 0; --left) {
        const uint32_t newer = pages_[page].newer;
        if (pages_[page].keyed && pages_[page].group == group) {
            unlink(page);
            link_before(page, pages());
        }
        page = newer;
    }
}

// ---- Who steps, and what a save begins with ----------------------------------------------------

class Exclusive {
public:
    explicit Exclusive(std::atomic<bool>* taken) : taken_(taken) {}
    Exclusive(Exclusive&& other) noexcept : taken_(std::exchange(other.taken_, nullptr)) {}
    ~Exclusive() {
        if (taken_) taken_->store(false, std::memory_order_release);
    }

private:
    std::atomic<bool>* taken_;
};

struct SaveHeader {
    char     magic[8] = {'v', 'a', 'l', 'a', 'r', 's', 'a', 'v'};
    uint32_t version = 1, numerics = kNumerics;
    Hash256  model;
    uint32_t precision = 0, kv_type = 0, page_tokens = 0, pages = 0;
    uint64_t page_bytes = 0, json_bytes = 0;
};
static_assert(sizeof(SaveHeader) == 80 && std::is_trivially_copyable_v<SaveHeader>);

// ---- A request being answered ----------------------------------------------------------------

// What prepare() found out; becomes a Sequence.
struct PreparedPrompt final : Prepared {
    std::vector<Token>   tokens;
    std::vector<Hash256> page_keys;   // of the prompt's full pages
    Hash256        root;              // the key that stands before the first page's
    uint64_t       group = 0;         // of prompt_cache_key; 0: none
    std::string    organisation;
    Window         window = Window::standard;
    SamplerOptions sampling;
    uint32_t       max_output   = 0;
    bool           logprobs     = false;
    uint32_t       top_logprobs = 0;
    std::vector<std::string> stop;
};

// Organisations take turns: the one served longest ago is next.
struct Turn {
    uint64_t served  = 0;
    uint32_t members = 0;  // requests that wait or run
};

struct Sequence {
    std::shared_ptr<Mailbox>        reply;
    std::unique_ptr<PreparedPrompt> prompt;
    std::vector<Token>    tokens;           // the prompt and what was drawn
    uint32_t              computed = 0;     // positions whose keys and values are there
    uint32_t              reached  = 0;     // the most that it ever was: what is beyond counts as
                                            // cached when the cache has it
    uint32_t              rows     = 0;     // in the batch under way
    int32_t               logits   = -1;    // the first of the batch's that are for it, if any
    Token                 draft[kMaxDraft]; // the last of its rows: guesses of what comes next
    uint32_t              drafted  = 0;
    uint32_t              draft_most = kFirstDraft;   // follows what is accepted
    uint32_t              credit   = 0;     // for wasted rows, in 1 / kDraftCredit
    std::vector<uint32_t> pages;
    std::vector<Hash256>  page_keys;        // of the pages that its tokens fill, when needed
    uint32_t              kept     = 0;     // pages that the cache knows
    bool                  over     = false; // its reply has the end; its pages are still taken
    std::unordered_map<std::string, Turn>::value_type* turn = nullptr;
    uint64_t    ticket = 0;                 // order of arrival
    uint32_t    rank   = 0;                 // 0 first; see rank_of
    Sampler     sampler;
    Detokenizer detokenizer;
    std::string held;                       // text that may begin a stop string
    Outcome     outcome;
    uint64_t queued_ns = monotonic_ns(), started_ns = 0, first_token_ns = 0;
    uint64_t waiting_ns = queued_ns, waited_ns = 0;  // since when it waits; how long before

    Sequence(std::shared_ptr<Mailbox> to, std::unique_ptr<PreparedPrompt> from,
             const Tokenizer& tokenizer)
        : reply(std::move(to)),
          prompt(std::move(from)),
          tokens(std::move(prompt->tokens)),
          page_keys(std::move(prompt->page_keys)),
          sampler(prompt->sampling),
          detokenizer(tokenizer) {
        outcome.usage.input_tokens = credit = length();
    }
    uint32_t length() const { return static_cast<uint32_t>(tokens.size()); }
    uint32_t left() const { return length() - computed; }
};

namespace {

// "resp_" and 24 of [0-9a-z], unguessable.
Result<std::string> draw_response_id() {
    uint8_t bytes[24];
    auto drawn = random_bytes(bytes, sizeof bytes);
    if (!drawn) return drawn.error();
    std::string id = "resp_";
    for (const uint8_t byte : bytes) id += "0123456789abcdefghijklmnopqrstuvwxyz"[byte % 36];
    return id;
}

Error engine_closed_error() {
    return make_error(ErrorKind::closed, "the engine was closed", "engine_closed");
}

Error refuse_field(const char* param, std::string message, const char* code = "invalid_value") {
    return make_error(ErrorKind::invalid_request, std::move(message), code, param);
}

Result<void> check_range(const char* field, std::optional<double> value, double low, double high) {
    if (!value || (*value >= low && *value <= high)) return {};
    return refuse_field(field, format("%s: %g is not in %g..%g", field, *value, low, high));
}

// What the wire has checked already; a C++ caller's request comes straight here.
Result<void> check_request(const Request& request) {
    if (request.input.empty())
        return refuse_field("input", "input: missing or empty", "missing_required_parameter");
    if (request.max_output_tokens == 0u)
        return refuse_field("max_output_tokens", "max_output_tokens: 0 is not positive");
    if (request.top_logprobs > kMaxLogprobs)
        return refuse_field("top_logprobs", format("top_logprobs: %u is more than %u",
                                                   request.top_logprobs, kMaxLogprobs));
    const struct { const char* field; std::optional<double> value; double low, high; } ranges[] = {
        {"temperature", request.temperature, 0, 2},
        {"top_p", request.top_p, 0, 1},
        {"min_p", request.min_p, 0, 1},
        {"presence_penalty", request.presence_penalty, -2, 2},
        {"frequency_penalty", request.frequency_penalty, -2, 2},
        {"repetition_penalty", request.repetition_penalty, 0.1, 10},
    };
    for (const auto& [field, value, low, high] : ranges)
        if (auto good = check_range(field, value, low, high); !good) return good;
    if (request.stop.size() > kMaxStops)
        return refuse_field("stop", format("stop: %zu strings are more than %zu",
                                           request.stop.size(), kMaxStops));
    for (const std::string& stop : request.stop)
        if (stop.empty() || stop.size() > kMaxStopBytes || !utf8_valid(stop))
            return refuse_field("stop", format("stop: a string has %zu bytes or is not UTF-8; "
                                               "1..%zu are allowed", stop.size(), kMaxStopBytes));
    return {};
}

Result<void> check_bias(const Request& request, uint32_t n_vocab) {
    for (const auto& [token, bias] : request.logit_bias) {
        if (token < 0 || static_cast<uint32_t>(token) >= n_vocab)
            return refuse_field("logit_bias", format("logit_bias: there is no token %d", token));
        if (auto good = check_range("logit_bias", bias, -100, 100); !good) return good;
    }
    return {};
}

// The file's own recommendation, as far as it is there.
Result<SamplerOptions> read_sampling(const Gguf& gguf) {
    SamplerOptions out;
    const struct { const char* key; double* value; double high; } keys[] = {
        {"general.sampling.temp", &out.temperature, 2},
        {"general.sampling.top_p", &out.top_p, 1},
        {"general.sampling.min_p", &out.min_p, 1},
    };
    for (const auto& [key, value, high] : keys) {
        auto found = gguf.get_float(key, *value);
        if (!found) return found.error();
        if (!(*found >= 0 && *found <= high))
            return make_error(
                ErrorKind::bad_data,
                gguf.name() + format(": key '%s' is %g, not in 0..%g", key, *found, high));
        *value = *found;
    }
    auto top_k = gguf.get_uint("general.sampling.top_k", 0);
    if (!top_k) return top_k.error();
    out.top_k = static_cast<uint32_t>(std::min<uint64_t>(*top_k, UINT32_MAX));
    return out;
}

std::string choose_model_id(const EngineOptions& options, const ModelSpec& spec) {
    if (!options.model_id.empty()) return options.model_id;
    if (!spec.name.empty() && utf8_valid(spec.name)) return spec.name;
    std::string name = options.model_path.substr(options.model_path.find_last_of("/\\") + 1);
    if (name.ends_with(".gguf")) name.resize(name.size() - 5);
    return name.empty() ? "model" : name;
}

Result<Gguf> open_model_file(const EngineOptions& options) {
    if (!options.model_bytes.empty()) return Gguf::from_bytes(options.model_bytes);
    if (options.model_reader.read) return Gguf::from_reader(options.model_reader);
    if (options.model_path.empty())
        return make_error(ErrorKind::invalid_request, "model_path: missing", {}, "model_path");
    return Gguf::open(options.model_path);
}

uint32_t choose_context(const EngineOptions& options, const ModelSpec& spec) {
    return options.context_tokens ? options.context_tokens
                                  : std::min(spec.n_context, kDefaultContext);
}

Result<void> check_engine_options(const EngineOptions& options, const ModelSpec& spec) {
    const struct { const char* field; uint32_t value, most; } ranges[] = {
        {"context_tokens", choose_context(options, spec), spec.n_context},
        {"step_tokens", options.step_tokens, kMaxStepTokens},
        {"max_running", options.max_running, kMaxRunning},
    };
    for (const auto& [field, value, most] : ranges)
        if (value == 0 || value > most)
            return make_error(ErrorKind::invalid_request,
                              format("%s: %u is not in 1..%u", field, value, most), {}, field);
    return {};
}

// As many pages as memory_limit leaves room for: at least one context's.
Result<BackendOptions> choose_backend_options(const EngineOptions& options, const ModelSpec& spec,
                                              const ModelTensors& tensors) {
    auto good = check_engine_options(options, spec);
    if (!good) return good.error();
    const uint32_t context = choose_context(options, spec);
    BackendOptions out;
    out.precision = options.precision;
    out.kv_type = options.kv_type;
    out.page_tokens = options.page_tokens;
    const uint64_t page = std::max(options.page_tokens, 1u), least = (context + page - 1) / page;
    out.kv_pages = static_cast<uint32_t>(least);
    out.max_positions = context;
    out.max_logit_rows =
        std::max(options.max_running, options.speculation ? kMaxDraft + 1 : 1);
    out.max_batch_rows = std::min(options.step_tokens, context) + out.max_logit_rows;
    out.threads = options.threads;
    out.parallel_for = options.parallel_for;
    out.parallel_for_host = options.parallel_for_host;
    auto plan = plan_cpu(spec, tensors, out);
    if (!plan) return plan.error();
    uint64_t pages = least * std::min(options.max_running, 2u);
    if (const uint64_t limit = options.memory_limit) {
        if (plan->total() > limit)
            return make_error(ErrorKind::out_of_memory,
                              format("memory_limit: %llu bytes; this model takes %llu with a "
                                     "context of %u tokens",
                                     static_cast<unsigned long long>(limit),
                                     static_cast<unsigned long long>(plan->total()), context),
                              {}, "memory_limit");
        pages = std::min(least * options.max_running,
                         least + (limit - plan->total()) / std::max<uint64_t>(plan->kv / least, 1));
    }
    out.kv_pages = static_cast<uint32_t>(std::min<uint64_t>(pages, UINT32_MAX - 1));
    return out;
}

// The key that stands before that of a first page: all that may part prefixes which begin alike.
Hash256 root_key(const EngineOptions& options, const std::string& organisation) {
    const uint32_t numbers[] = {kNumerics, static_cast<uint32_t>(options.precision),
                                static_cast<uint32_t>(options.kv_type), options.page_tokens};
    Sha256 hash;
    hash.update(numbers, sizeof numbers);
    if (!options.share_prefixes) hash.update(organisation);
    return hash.finish();
}

uint64_t group_of(const Hash256& root, const std::string& prompt_cache_key) {
    if (prompt_cache_key.empty()) return 0;
    const Hash256 hash = hmac_sha256(root.view(), prompt_cache_key);
    uint64_t group;
    std::memcpy(&group, hash.bytes, sizeof group);
    return group | 1;
}

// Adds the keys of the pages that `tokens` fill, up to `count` of them.
void extend_page_keys(std::vector<Hash256>& keys, const Hash256& root,
                      std::span<const Token> tokens, uint32_t page_tokens, size_t count) {
    while (keys.size() < count) {
        Sha256 hash;
        hash.update((keys.empty() ? root : keys.back()).view());
        hash.update(tokens.data() + keys.size() * page_tokens, page_tokens * sizeof(Token));
        keys.push_back(hash.finish());
    }
}

// What may come next: what followed the last tokens where they stood before, at the longest match,
// of several the latest (prompt lookup decoding, Saxena 2023). Text that repeats itself up to its
// end goes on repeating. Returns how many of `most` it put into `out`.
uint32_t find_draft(std::span<const Token> tokens, uint32_t most, Token* out) {
    const size_t last = tokens.size() - 1;
    size_t next = 0;
    uint32_t longest = kMinMatch - 1;
    for (size_t at = last; at-- > longest && longest < kMaxMatch;) {
        if (tokens[at] != tokens[last]) continue;
        uint32_t match = 1;
        while (match < kMaxMatch && match <= at && tokens[at - match] == tokens[last - match])
            ++match;
        if (match <= longest) continue;
        longest = match;
        next = at + 1;
    }
    if (next == 0) return 0;
    for (size_t i = 0; i < most; ++i)
        out[i] = next + i <= last ? tokens[next + i] : out[next + i - last - 1];
    return most;
}

// How urgent, 0 before 1 before 2. Only waiting makes a request more urgent: one that runs for long
// still gives way.
uint32_t rank_of(const Sequence& sequence, const EngineOptions& options, uint64_t now) {
    constexpr uint64_t ms = 1'000'000;
    uint64_t waited = sequence.waited_ns + (sequence.waiting_ns ? now - sequence.waiting_ns : 0);
    uint32_t rank = static_cast<uint32_t>(sequence.prompt->window);
    if (rank == 2 && waited >= options.flex_target_ms * ms) {
        rank = 1;
        waited -= options.flex_target_ms * ms;
    }
    if (rank == 1 && waited >= options.standard_target_ms * ms) rank = 0;
    return rank;
}

constexpr const char* kWindowNames[] = {"asap", "standard", "flex"};

// What parts models that are alike in shape: their directory, and some weights of every tensor.
Hash256 fingerprint(const Gguf& gguf) {
    Sha256 hash;
    for (const TensorInfo& tensor : gguf.tensors()) {
        std::byte weights[64] = {};
        const size_t count = static_cast<size_t>(std::min<uint64_t>(tensor.bytes, sizeof weights));
        (void)gguf.read_tensor(tensor, 0, {weights, count});
        hash.update(tensor.name);
        hash.update(&tensor.type, sizeof tensor.type);
        hash.update(tensor.dims, sizeof tensor.dims);
        hash.update(weights, sizeof weights);
    }
    return hash.finish();
}

}  // namespace
}  // namespace detail

// ---- Engine::State ---------------------------------------------------------------------------

struct Engine::State final : Responder {
    using MailboxPtr = std::shared_ptr<detail::Mailbox>;
    using SequencePtr = std::unique_ptr<detail::Sequence>;

    // Set by open(), then constant.
    EngineOptions  options;
    Gguf           gguf;
    ModelSpec      spec;
    ModelTensors   tensors;
    ModelInfo      info;
    uint32_t       context = 0, step_tokens = 0, max_logit_rows = 0;
    detail::SamplerOptions      sampling;  // where a request says nothing
    std::optional<Tokenizer>    tokenizer;
    std::optional<ChatTemplate> chat_template;
    std::shared_ptr<detail::Doorbell> doorbell = std::make_shared<detail::Doorbell>();

    // Of whoever steps.
    std::unique_ptr<detail::Backend> backend;
    std::vector<SequencePtr>         waiting, running;
    std::vector<detail::BatchRow>    batch;        // under way unless empty
    size_t                           untaken = 0;  // last of running, with logits of a done batch
    detail::PagePool                 pool;
    std::unordered_map<std::string, detail::Turn> turns;  // of those that wait or run
    uint64_t serve_clock = 0, ticket_clock = 0;
    uint64_t batch_ns = 0, row_ns = 0;             // spent on the batch; a row takes, about
    std::pair<Token, float>          top[detail::kMaxLogprobs];
    std::atomic<bool>  loaded{false}, stepping{false};
    std::atomic<float> progress{0};
    std::optional<Error> failure;            // nothing works any more
    std::optional<detail::Hash256> model_fingerprint;  // once asked for
    detail::Thread     thread;
    std::atomic<bool>  stop_asked{false};

    mutable std::mutex      mutex;           // guards what follows
    std::vector<SequencePtr> arrivals;
    uint32_t                waiting_count = 0;  // waiting.size()
    bool                    closed = false;
    ResponderStats          counts;             // all but queued
    std::unordered_map<std::string, MailboxPtr> by_id;  // those submitted through Responder

    std::mutex              listener_mutex;
    std::condition_variable listener_idle;
    void (*listener)(void* context, const std::string& id) = nullptr;
    void*                   listener_context = nullptr;
    uint32_t                listener_calls = 0;

    ~State() override;
    Result<void> open(const EngineOptions& from);

    std::vector<ModelInfo> models() const override { return {info}; }
    Result<std::unique_ptr<Prepared>> prepare(const Request& request) override;
    Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) override;
    std::optional<Event> poll(const std::string& id) override;
    void cancel(const std::string& id) override;
    ResponderStats stats() const override;
    void on_ready(void (*ready)(void* context, const std::string& id), void* context) override;

    Result<std::unique_ptr<detail::PreparedPrompt>> prepare_prompt(const Request& request);
    Result<std::vector<Token>> make_prompt(const Request& request) const;
    std::string refused_window() const;
    Result<void> enqueue(std::unique_ptr<detail::PreparedPrompt> prompt, const MailboxPtr& reply,
                         bool known);
    MailboxPtr find(const std::string& id) const;
    void announce(const detail::Mailbox& reply);
    uint32_t retry_after_s() const;

    bool time_is_up(uint64_t deadline_ns) const {
        return detail::monotonic_ns() >= deadline_ns || stop_asked.load(std::memory_order_relaxed);
    }
    Result<bool> work(uint64_t deadline_ns, uint64_t budget_ns);
    Result<bool> load(uint64_t deadline_ns);
    bool work_on_batch(uint64_t deadline_ns, uint64_t budget_ns);
    void compute(uint64_t deadline_ns);
    void drop_cancelled();
    void take_arrivals();
    void admit();
    SequencePtr* next_waiting();
    bool make_place(const detail::Sequence& next);
    bool fits(const detail::Sequence& next) const;
    uint32_t pages_for(uint32_t positions) const;
    void start_sequence(SequencePtr sequence);
    void preempt_last();
    void release_pages(detail::Sequence& sequence);
    void leave(detail::Sequence& sequence);
    void sweep();
    void join_cached(detail::Sequence& sequence);
    void keep_pages(detail::Sequence& sequence);
    void extend_keys(detail::Sequence& sequence, size_t count) const;
    uint32_t prompt_rows(bool answers, uint64_t budget_ns) const;
    void share_prompt_rows(uint32_t budget);
    detail::Sequence* next_prompt() const;
    bool computes_the_same(const detail::Sequence& prompt) const;
    void reserve_pages(size_t index);
    void build_batch(uint64_t budget_ns);
    void draft(detail::Sequence& sequence, uint32_t* spare);
    void add_rows(detail::Sequence& sequence, uint32_t* wanted);
    void take_results(detail::Sequence& sequence);
    Token take_token(detail::Sequence& sequence, uint32_t logits_row);
    void count_drafts(detail::Sequence& sequence, uint32_t drafted, uint32_t accepted);
    bool pass_text(detail::Sequence& sequence, std::string_view text);
    void emit_text(detail::Sequence& sequence, std::string_view text);
    void add_logprob(detail::Sequence& sequence, std::span<const float> logits, Token token);
    void finish(detail::Sequence& sequence, Status status, std::optional<Error> error = {});
    void fail_all(const Error& error);
    static void run_thread(void* self);

    Result<detail::Exclusive> take_turn(const char* who);
    Reply reply_to(Result<std::unique_ptr<detail::PreparedPrompt>> prompt);
    detail::SaveHeader save_header();
    void import_pages(std::span<const detail::Hash256> keys, std::span<const std::byte> bytes);
};

// ---- Opening ---------------------------------------------------------------------------------

Result<void> Engine::State::open(const EngineOptions& from) {
    options = from;
    auto file = detail::open_model_file(options);
    if (!file) return file.error();
    gguf = std::move(*file);
    auto read = read_model_spec(gguf);
    if (!read) return read.error();
    spec = std::move(*read);
    auto bound = bind_model_tensors(gguf, spec);
    if (!bound) return bound.error();
    tensors = std::move(*bound);
    auto source = gguf.get_string("tokenizer.chat_template", "");
    if (!source) return source.error();
    const std::string text =
        options.chat_template.empty() ? std::string(*source) : options.chat_template;
    auto words = Tokenizer::open(gguf, text);
    if (!words) return words.error();
    tokenizer = std::move(*words);
    const bool has_chatml = tokenizer->find("<|im_start|>") && tokenizer->find("<|im_end|>");
    auto parsed = ChatTemplate::open(text, has_chatml);
    if (!parsed) return parsed.error();
    chat_template = std::move(*parsed);
    auto defaults = detail::read_sampling(gguf);
    if (!defaults) return defaults.error();
    sampling = *defaults;
    auto chosen = detail::choose_backend_options(options, spec, tensors);
    if (!chosen) return chosen.error();
    auto opened = detail::open_cpu_backend(gguf, spec, tensors, *chosen);
    if (!opened) return opened.error();
    backend = std::move(*opened);
    context = chosen->max_positions;
    max_logit_rows = chosen->max_logit_rows;
    step_tokens = chosen->max_batch_rows - max_logit_rows;
    batch.reserve(chosen->max_batch_rows);
    running.reserve(options.max_running);
    pool.open(chosen->kv_pages);
    counts.pages = chosen->kv_pages;
    info.id = detail::choose_model_id(options, spec);
    info.aliases = options.aliases;
    info.created = detail::unix_time_ms() / 1000;
    info.context_tokens = context;
    info.windows.clear();
    for (const Window window : options.windows)
        info.windows.push_back(detail::kWindowNames[static_cast<size_t>(window)]);
    return {};
}

Engine::State::~State() {
    stop_asked.store(true, std::memory_order_release);
    doorbell->ring();
    thread.join();
    fail_all(detail::engine_closed_error());
}

// ---- From a request to a prompt (any thread) -------------------------------------------------

Result<std::unique_ptr<Prepared>> Engine::State::prepare(const Request& request) {
    auto prompt = prepare_prompt(request);
    if (!prompt) return prompt.error();
    return std::unique_ptr<Prepared>(std::move(*prompt));
}

Result<std::unique_ptr<detail::PreparedPrompt>> Engine::State::prepare_prompt(
    const Request& request) {
    const auto& names = info.aliases;
    if (!request.model.empty() && request.model != info.id &&
        std::find(names.begin(), names.end(), request.model) == names.end())
        return detail::make_error(ErrorKind::not_found,
                                  "the model '" + request.model + "' does not exist",
                                  "model_not_found", "model");
    if (auto good = detail::check_request(request); !good) return good.error();
    const auto& windows = options.windows;
    if (std::find(windows.begin(), windows.end(), request.window) == windows.end())
        return detail::refuse_field("metadata.completion_window", refused_window());
    if (auto good = detail::check_bias(request, spec.n_vocab); !good) return good.error();
    auto tokens = make_prompt(request);
    if (!tokens) return tokens.error();
    const size_t count = tokens->size();
    if (count >= context)
        return detail::refuse_field(
            "input",
            detail::format("the prompt has %zu tokens; the context of this model is %u tokens for "
                           "prompt and answer",
                           count, context),
            "context_length_exceeded");
    auto out = std::make_unique<detail::PreparedPrompt>();
    out->sampling = sampling;
    out->sampling.temperature = request.temperature.value_or(sampling.temperature);
    out->sampling.top_p = request.top_p.value_or(sampling.top_p);
    out->sampling.top_k = request.top_k.value_or(sampling.top_k);
    out->sampling.min_p = request.min_p.value_or(sampling.min_p);
    uint64_t drawn = 0;  // 53 bits: exact in every JSON reader
    if (auto random = detail::random_bytes(&drawn, sizeof drawn); !random) return random.error();
    out->sampling.seed = request.seed.value_or(static_cast<int64_t>(drawn >> 11));
    const uint32_t room = context - static_cast<uint32_t>(count);
    out->max_output = std::min(request.max_output_tokens.value_or(room), room);
    out->sampling.presence_penalty = request.presence_penalty;
    out->sampling.frequency_penalty = request.frequency_penalty;
    out->sampling.repetition_penalty = request.repetition_penalty;
    for (const auto& [token, bias] : request.logit_bias)
        out->sampling.logit_bias.emplace_back(token, static_cast<float>(bias));
    out->logprobs = request.logprobs;
    out->top_logprobs = request.top_logprobs;
    out->stop = request.stop;
    out->organisation = request.organisation;
    out->window = request.window;
    out->root = detail::root_key(options, request.organisation);
    out->group = detail::group_of(out->root, request.prompt_cache_key);
    if (options.prefix_cache)
        detail::extend_page_keys(out->page_keys, out->root, *tokens, options.page_tokens,
                                 count / options.page_tokens);
    out->tokens = std::move(*tokens);
    out->model = info.id;
    out->input_tokens = static_cast<uint32_t>(count);
    out->temperature = out->sampling.temperature;
    out->top_p = out->sampling.top_p;
    out->seed = out->sampling.seed;
    return out;
}

std::string Engine::State::refused_window() const {
    std::string message = "metadata.completion_window: the model '" + info.id + "' serves";
    for (const std::string& window : info.windows) message += " " + window;
    return message;
}

Result<std::vector<Token>> Engine::State::make_prompt(const Request& request) const {
    const auto spelling = [&](std::optional<Token> token) {
        return token ? tokenizer->piece(*token) : std::string_view();
    };
    auto input = chat_input(request, *chat_template, spelling(tokenizer->bos()),
                            spelling(tokenizer->eos()), detail::unix_time_ms() / 1000);
    if (!input) return input.error();
    auto text = chat_template->render(*input);
    if (!text) return text.error();
    auto tokens = tokenizer->encode(*text, tokenizer->add_bos());
    if (!tokens) return tokens.error();
    if (tokens->empty())
        return detail::refuse_field("input", "input: the chat template made an empty prompt of it");
    return tokens;
}

// ---- The queue, and Responder (any thread) ---------------------------------------------------

Result<void> Engine::State::enqueue(std::unique_ptr<detail::PreparedPrompt> prompt,
                                    const MailboxPtr& reply, bool known) {
    auto sequence = std::make_unique<detail::Sequence>(reply, std::move(prompt), *tokenizer);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (closed) return detail::engine_closed_error();
        const size_t queued = arrivals.size() + waiting_count;
        if (queued >= options.max_queued) {
            Error error = detail::make_error(
                ErrorKind::overloaded, detail::format("%zu requests are waiting already", queued),
                "overloaded");
            error.retry_after_s = retry_after_s();
            return error;
        }
        if (known && !by_id.emplace(reply->id, reply).second)
            return detail::make_error(ErrorKind::internal, "the id " + reply->id + " is in use");
        arrivals.push_back(std::move(sequence));
    }
    doorbell->ring();
    return {};
}

// When half of the queue will have gone, as fast as requests were answered so far.
uint32_t Engine::State::retry_after_s() const {
    const uint64_t done = std::max<uint64_t>(counts.completed, 1);
    const uint64_t one_us = (counts.prefill_us + counts.decode_us) / done;
    const uint64_t queued = arrivals.size() + waiting_count;
    const uint64_t seconds = one_us * queued / 2 / options.max_running / 1'000'000;
    return static_cast<uint32_t>(std::clamp<uint64_t>(seconds, 1, 60));
}

Result<void> Engine::State::submit(std::unique_ptr<Prepared> prepared, std::string id) {
    auto reply = std::make_shared<detail::Mailbox>();
    reply->id = std::move(id);
    reply->doorbell = doorbell;
    std::unique_ptr<detail::PreparedPrompt> prompt(
        static_cast<detail::PreparedPrompt*>(prepared.release()));
    return enqueue(std::move(prompt), reply, true);
}

Engine::State::MailboxPtr Engine::State::find(const std::string& id) const {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = by_id.find(id);
    return found == by_id.end() ? nullptr : found->second;
}

std::optional<Event> Engine::State::poll(const std::string& id) {
    const MailboxPtr reply = find(id);
    if (!reply) return std::nullopt;
    auto event = reply->take();
    if (event && event->kind == Event::Kind::finished) {
        const std::lock_guard<std::mutex> lock(mutex);
        by_id.erase(id);
    }
    return event;
}

void Engine::State::cancel(const std::string& id) {
    if (const MailboxPtr reply = find(id)) reply->cancel();
}

ResponderStats Engine::State::stats() const {
    const std::lock_guard<std::mutex> lock(mutex);
    ResponderStats out = counts;
    out.queued = static_cast<uint32_t>(arrivals.size()) + waiting_count;
    return out;
}

void Engine::State::on_ready(void (*ready)(void* context, const std::string& id), void* to) {
    std::unique_lock<std::mutex> lock(listener_mutex);
    listener = ready;
    listener_context = to;
    listener_idle.wait(lock, [&] { return listener_calls == 0; });
}

void Engine::State::announce(const detail::Mailbox& reply) {
    std::unique_lock<std::mutex> lock(listener_mutex);
    if (!listener) return;
    const auto call = listener;
    void* to = listener_context;
    ++listener_calls;
    lock.unlock();
    call(to, reply.id);
    lock.lock();
    if (--listener_calls == 0) listener_idle.notify_all();
}

// ---- The step (one thread at a time) ---------------------------------------------------------

// Works until the deadline or until nothing is left; true while something is. `budget_ns` is what a
// step may take: batches are made so that they do not take many steps.
Result<bool> Engine::State::work(uint64_t deadline_ns, uint64_t budget_ns) {
    if (failure) return *failure;
    while (!loaded.load(std::memory_order_relaxed)) {
        auto done = load(std::min(deadline_ns, detail::monotonic_ns() + detail::kLookNs));
        if (!done) {
            failure = done.error();
            options.log(LogLevel::error, failure->message);
            fail_all(*failure);
            return *failure;
        }
        if (!*done && time_is_up(deadline_ns)) return true;
    }
    while (work_on_batch(deadline_ns, budget_ns))
        if (time_is_up(deadline_ns)) return true;
    return false;
}

Result<bool> Engine::State::load(uint64_t deadline_ns) {
    const uint64_t now = detail::monotonic_ns();
    float part = 0;
    auto done = backend->load(deadline_ns > now ? (deadline_ns - now) / 1000 : 0, &part);
    if (!done) return done;
    progress.store(part, std::memory_order_relaxed);
    if (*done) {
        options.log(LogLevel::info, "loaded " + gguf.name());
        loaded.store(true, std::memory_order_release);
    }
    return done;
}

// One piece of work: a sequence's results, a part of a batch or the next batch. False: there is
// nothing to do.
bool Engine::State::work_on_batch(uint64_t deadline_ns, uint64_t budget_ns) {
    if (doorbell->cancels.exchange(false, std::memory_order_acquire)) drop_cancelled();
    if (untaken > 0) {
        take_results(*running[running.size() - untaken]);
        --untaken;
    } else if (!batch.empty()) {
        compute(deadline_ns);
    } else {
        sweep();
        admit();
        if (running.empty()) return false;
        build_batch(budget_ns);
    }
    return true;
}

void Engine::State::compute(uint64_t deadline_ns) {
    const uint64_t start = detail::monotonic_ns();
    auto done = backend->advance(std::min(deadline_ns, start + detail::kLookNs));
    batch_ns += detail::monotonic_ns() - start;
    if (done && !*done) return;
    if (done) {
        if (batch.size() >= detail::kMinPromptRows) row_ns = batch_ns / batch.size();
        untaken = running.size();
        const std::lock_guard<std::mutex> lock(mutex);
        ++counts.batches;
        counts.batch_rows += batch.size();
    } else {
        for (const SequencePtr& sequence : running)
            if (sequence->rows && !sequence->over)
                finish(*sequence, Status::failed, done.error());
    }
    batch.clear();
}

// Replies learn at once; pages that a batch is using go when it is done.
void Engine::State::drop_cancelled() {
    const auto end = [&](const SequencePtr& sequence) {
        if (!sequence->over && sequence->reply->cancelled.load(std::memory_order_acquire))
            finish(*sequence, Status::cancelled,
                   detail::make_error(ErrorKind::cancelled, "cancelled", "cancelled"));
        return sequence->over;
    };
    take_arrivals();
    for (SequencePtr& sequence : waiting)
        if (end(sequence)) {
            leave(*sequence);
            sequence.reset();
        }
    std::erase(waiting, nullptr);
    bool any_left = false;
    for (const SequencePtr& sequence : running) any_left |= !end(sequence) && sequence->rows;
    if (!batch.empty() && !any_left) {
        backend->abandon();
        batch.clear();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
}

// ---- Who runs --------------------------------------------------------------------------------

void Engine::State::take_arrivals() {
    const size_t before = waiting.size();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        for (SequencePtr& sequence : arrivals) waiting.push_back(std::move(sequence));
        arrivals.clear();
        waiting_count = static_cast<uint32_t>(waiting.size());
    }
    for (size_t i = before; i < waiting.size(); ++i) {
        detail::Sequence& sequence = *waiting[i];
        sequence.ticket = ++ticket_clock;
        sequence.turn = &*turns.try_emplace(sequence.prompt->organisation).first;
        ++sequence.turn->second.members;
    }
}

void Engine::State::leave(detail::Sequence& sequence) {
    if (--sequence.turn->second.members == 0) turns.erase(std::string(sequence.turn->first));
}

// The one to start next, or null: by rank, then the organisation served longest ago, then first
// come.
Engine::State::SequencePtr* Engine::State::next_waiting() {
    SequencePtr* best = nullptr;
    const uint64_t now = detail::monotonic_ns();
    const auto order = [](const detail::Sequence& sequence) {
        return std::tuple(sequence.rank, sequence.turn->second.served, sequence.ticket);
    };
    for (SequencePtr& sequence : waiting) {
        sequence->rank = detail::rank_of(*sequence, options, now);
        if (!best || order(*sequence) < order(**best)) best = &sequence;
    }
    return best;
}

// Starts what there is room for. Who does not fit is waited for: it would never be its turn else.
void Engine::State::admit() {
    take_arrivals();
    while (SequencePtr* next = next_waiting()) {
        const uint64_t ticket = (*next)->ticket;
        if (!make_place(**next)) break;
        next = std::find_if(waiting.data(), waiting.data() + waiting.size(),
                            [&](const SequencePtr& one) { return one->ticket == ticket; });
        SequencePtr sequence = std::move(*next);
        waiting.erase(waiting.begin() + (next - waiting.data()));
        start_sequence(std::move(sequence));
    }
    std::sort(running.begin(), running.end(), [](const SequencePtr& a, const SequencePtr& b) {
        return std::tuple(a->rank, a->ticket) < std::tuple(b->rank, b->ticket);
    });
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
    counts.running = static_cast<uint32_t>(running.size());
    counts.pages_used = pool.pages() - pool.unused();
    counts.pages_cached = pool.cached();
    counts.pages_shared = pool.shared();
}

// Lower ranks give way.
bool Engine::State::make_place(const detail::Sequence& next) {
    while (running.size() == options.max_running || !fits(next)) {
        const auto last = std::max_element(
            running.begin(), running.end(), [](const SequencePtr& a, const SequencePtr& b) {
                return std::tuple(a->rank, a->ticket) < std::tuple(b->rank, b->ticket);
            });
        if ((*last)->rank <= next.rank) return false;
        std::swap(*last, running.back());
        preempt_last();
    }
    return true;
}

uint32_t Engine::State::pages_for(uint32_t positions) const {
    return (positions + options.page_tokens - 1) / options.page_tokens;
}

// Whether there are pages for it and for what the others still have to read.
bool Engine::State::fits(const detail::Sequence& next) const {
    uint64_t wanted = pages_for(next.length() + 1);
    for (const detail::Hash256& key : next.page_keys) {
        const uint32_t page = pool.find(key);
        if (page == detail::PagePool::none || !pool.in_use(page)) break;
        --wanted;
    }
    for (const SequencePtr& other : running) {
        const size_t needed = pages_for(other->length() + 1), there = other->pages.size();
        wanted += needed - std::min(needed, there);
    }
    return running.empty() || wanted <= pool.unused();
}

// All that grows later gets its room here.
void Engine::State::start_sequence(SequencePtr sequence) {
    const uint64_t now = detail::monotonic_ns();
    sequence->waited_ns += now - std::exchange(sequence->waiting_ns, 0);
    sequence->turn->second.served = ++serve_clock;
    if (sequence->prompt->group) pool.refresh(sequence->prompt->group);
    if (sequence->started_ns == 0) {
        sequence->started_ns = now;
        const uint32_t most = sequence->length() + sequence->prompt->max_output;
        const size_t most_text = size_t{sequence->prompt->max_output} * 4;
        sequence->tokens.reserve(most);
        sequence->pages.reserve(pages_for(most));
        if (options.prefix_cache) sequence->page_keys.reserve(pages_for(most));
        sequence->outcome.text.reserve(most_text);
        sequence->held.reserve(2 * detail::kMaxStopBytes);
        sequence->sampler.see_prompt(sequence->tokens, sequence->prompt->max_output);
        if (sequence->prompt->logprobs)
            sequence->outcome.logprobs.reserve(sequence->prompt->max_output);
        if (sequence->reply->put_start(most_text)) announce(*sequence->reply);
    }
    running.push_back(std::move(sequence));
}

// The last of those that run gives way: it goes on later with what the cache still has of it, and
// computes the rest again. Nothing that was drawn changes.
void Engine::State::preempt_last() {
    SequencePtr sequence = std::move(running.back());
    running.pop_back();
    release_pages(*sequence);
    sequence->drafted = 0;
    sequence->waiting_ns = detail::monotonic_ns();
    waiting.push_back(std::move(sequence));
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
    ++counts.preempted;
}

// From the last to the first: what begins a prefix is to outlive what ends it.
void Engine::State::release_pages(detail::Sequence& sequence) {
    for (; !sequence.pages.empty(); sequence.pages.pop_back()) pool.drop(sequence.pages.back());
    sequence.computed = sequence.rows = sequence.kept = 0;
}

void Engine::State::sweep() {
    for (SequencePtr& sequence : running)
        if (sequence->over) {
            release_pages(*sequence);
            leave(*sequence);
            sequence.reset();
        }
    std::erase(running, nullptr);
}

// ---- The prefix cache ------------------------------------------------------------------------

// Takes over what the cache has of the tokens that come next; the last one is left to compute.
void Engine::State::join_cached(detail::Sequence& sequence) {
    const uint32_t page_tokens = options.page_tokens;
    if (!options.prefix_cache) return;
    while (sequence.computed % page_tokens == 0 && sequence.left() >= page_tokens) {
        const size_t index = sequence.computed / page_tokens;
        extend_keys(sequence, index + 1);
        const uint32_t page = pool.find(sequence.page_keys[index]);
        if (page == detail::PagePool::none) break;
        pool.share(page);
        if (index < sequence.pages.size())
            pool.drop(std::exchange(sequence.pages[index], page));
        else sequence.pages.push_back(page);
        sequence.kept = static_cast<uint32_t>(index + 1);
        sequence.computed += page_tokens;
    }
    if (sequence.left() == 0) --sequence.computed;
    const uint32_t found = std::min(sequence.computed, sequence.outcome.usage.input_tokens);
    if (found > sequence.reached) {
        sequence.outcome.usage.cached_tokens += found - sequence.reached;
        sequence.reached = found;
    }
}

// Makes the pages that are full now known to the cache; of two with the same content one is kept.
void Engine::State::keep_pages(detail::Sequence& sequence) {
    const uint32_t full = sequence.computed / options.page_tokens;
    if (!options.prefix_cache) return;
    extend_keys(sequence, full);
    for (; sequence.kept < full; ++sequence.kept) {
        uint32_t& page = sequence.pages[sequence.kept];
        const detail::Hash256& key = sequence.page_keys[sequence.kept];
        const uint32_t known = pool.find(key);
        if (known == detail::PagePool::none) {
            pool.set_key(page, key, sequence.prompt->group);
        } else {
            pool.share(known);
            pool.drop(std::exchange(page, known));
        }
    }
}

void Engine::State::extend_keys(detail::Sequence& sequence, size_t count) const {
    detail::extend_page_keys(sequence.page_keys, sequence.prompt->root, sequence.tokens,
                             options.page_tokens, count);
}

// ---- The batch -------------------------------------------------------------------------------

// Prompt tokens for the next batch: less where it would take longer than the caller's budget or
// hold up answers.
uint32_t Engine::State::prompt_rows(bool answers, uint64_t budget_ns) const {
    const uint64_t target = answers ? std::min(budget_ns, detail::kMixedNs) : budget_ns;
    const uint32_t most = step_tokens;
    if (target == detail::kNoLimit) return most;
    const uint64_t fit = row_ns ? target / row_ns : 0;
    return static_cast<uint32_t>(
        std::clamp<uint64_t>(fit, std::min(detail::kMinPromptRows, most), most));
}

// Whether another prompt of this batch computes what this one needs next: then it is in the cache
// for the next batch.
bool Engine::State::computes_the_same(const detail::Sequence& prompt) const {
    const size_t index = prompt.computed / options.page_tokens;
    if (!options.prefix_cache || prompt.computed % options.page_tokens ||
        index >= prompt.page_keys.size())
        return false;
    for (const SequencePtr& other : running)
        if (other->rows && other->computed == prompt.computed && index < other->page_keys.size() &&
            other->page_keys[index] == prompt.page_keys[index])
            return true;
    return false;
}

// The prompt that gets rows next: of the best rank the one that needs least, so that few wait for
// one that is long.
detail::Sequence* Engine::State::next_prompt() const {
    detail::Sequence* best = nullptr;
    const auto order = [](const detail::Sequence& one) {
        return std::tuple(one.rank, one.left() - one.rows);
    };
    for (const SequencePtr& one : running)
        if (one->rows < one->left() && (!best || order(*one) < order(*best)) &&
            (one->rows || !computes_the_same(*one)))
            best = one.get();
    return best;
}

// A quarter goes to the first of the prompts, so that the long ones are read too.
void Engine::State::share_prompt_rows(uint32_t budget) {
    const auto give = [&](detail::Sequence& to, uint32_t most) {
        const uint32_t rows = std::min(to.left() - to.rows, most);
        to.rows += rows;
        budget -= rows;
    };
    const auto first = std::find_if(running.begin(), running.end(),
                                    [](const SequencePtr& one) { return one->rows == 0; });
    if (first != running.end()) give(**first, std::max(budget / 4, 1u));
    while (budget > 0) {
        detail::Sequence* next = next_prompt();
        if (!next) break;
        give(*next, budget);
    }
}

// Pages for the rows of the index-th that runs; those after it give way. What does not fit even so
// waits for a later batch.
void Engine::State::reserve_pages(size_t index) {
    detail::Sequence& sequence = *running[index];
    const uint32_t page_tokens = options.page_tokens, begun = sequence.computed / page_tokens;
    if (sequence.rows == 0) return;
    bool copy = begun < sequence.pages.size() && !pool.writable(sequence.pages[begun]);
    const auto lacking = [&] {
        const uint32_t needed = pages_for(sequence.computed + sequence.rows) + copy,
                       there = static_cast<uint32_t>(sequence.pages.size());
        return needed - std::min(needed, there);
    };
    if (pool.unused() < lacking()) sequence.rows -= std::exchange(sequence.drafted, 0);
    while (pool.unused() < lacking() && running.size() > index + 1) preempt_last();
    while (sequence.rows && pool.unused() < lacking()) --sequence.rows;
    if (sequence.rows == 0) return;
    if (copy) {
        const uint32_t from = std::exchange(sequence.pages[begun], pool.take());
        backend->copy_page(from, sequence.pages[begun]);
        pool.drop(from);
        sequence.kept = begun;
        copy = false;
    }
    while (lacking() > 0) sequence.pages.push_back(pool.take());
}

// Sequences that decode get a row each and some for guesses; the rest is for prompts.
void Engine::State::build_batch(uint64_t budget_ns) {
    bool answers = false;
    uint32_t spare = max_logit_rows - static_cast<uint32_t>(running.size());
    for (const SequencePtr& sequence : running) {
        join_cached(*sequence);
        sequence->rows = 0;
        if (sequence->left() > 1) continue;
        answers = true;
        draft(*sequence, &spare);
        sequence->rows = 1 + sequence->drafted;
    }
    share_prompt_rows(prompt_rows(answers, budget_ns));
    for (size_t i = 0; i < running.size(); ++i) reserve_pages(i);
    uint32_t wanted = 0;
    for (const SequencePtr& sequence : running) add_rows(*sequence, &wanted);
    batch_ns = 0;
    auto begun =
        backend->begin(batch);  // a batch that it refuses is our mistake: advance() fails too
    if (!begun) options.log(LogLevel::error, begun.error().message);
}

// No more than its credit says would be wasted if all of them were wrong.
void Engine::State::draft(detail::Sequence& sequence, uint32_t* spare) {
    const uint32_t left = sequence.prompt->max_output - sequence.outcome.usage.output_tokens;
    const uint32_t most = std::min({sequence.draft_most, sequence.credit / detail::kDraftCredit,
                                    *spare, left - 1, sequence.length()});
    sequence.drafted = 0;
    if (!options.speculation || most == 0) return;
    sequence.drafted = detail::find_draft(sequence.tokens, most, sequence.draft);
    *spare -= sequence.drafted;
}

// What is accepted earns credit, and so does, a little, every token.
void Engine::State::count_drafts(detail::Sequence& sequence, uint32_t drafted, uint32_t accepted) {
    constexpr uint32_t unit = detail::kDraftCredit;
    const uint32_t credit = sequence.credit + 1 + accepted * unit;
    sequence.credit = std::min(credit, 2 * detail::kMaxDraft * unit);
    if (drafted == 0) return;
    sequence.credit -= std::min(sequence.credit, (drafted - accepted) * unit);
    sequence.draft_most = accepted == drafted
                              ? std::min(2 * sequence.draft_most, detail::kMaxDraft)
                              : std::max(accepted, detail::kLeastDraft);
    const std::lock_guard<std::mutex> lock(mutex);
    counts.drafted_tokens += drafted;
    counts.accepted_tokens += accepted;
}

void Engine::State::add_rows(detail::Sequence& sequence, uint32_t* wanted) {
    const uint32_t end = sequence.computed + sequence.rows, length = sequence.length();
    sequence.logits = end < length ? -1 : static_cast<int32_t>(*wanted);
    for (uint32_t position = sequence.computed; position < end; ++position) {
        const Token token = position < length ? sequence.tokens[position]
                                              : sequence.draft[position - length];
        const bool logits = position + 1 >= length;
        batch.push_back({token, nullptr, position, sequence.pages.data(), logits});
        *wanted += logits;
    }
}

// Draws a token, and more as long as they are what was guessed.
void Engine::State::take_results(detail::Sequence& sequence) {
    if (sequence.over || sequence.rows == 0) return;
    const uint32_t drafted = std::exchange(sequence.drafted, 0);
    sequence.computed += std::exchange(sequence.rows, 0) - drafted;
    if (sequence.logits >= 0) {
        const uint32_t row = static_cast<uint32_t>(sequence.logits);
        uint32_t accepted = 0;
        for (;; ++accepted) {
            const Token token = take_token(sequence, row + accepted);
            if (sequence.over || accepted == drafted || token != sequence.draft[accepted]) break;
        }
        sequence.computed += accepted;
        count_drafts(sequence, drafted, accepted);
    }
    sequence.reached = std::max(sequence.reached, sequence.computed);
    keep_pages(sequence);
}

// Draws a token. The end, a stop string or the limit finishes the sequence.
Token Engine::State::take_token(detail::Sequence& sequence, uint32_t logits_row) {
    const auto logits = backend->logits(logits_row);
    const Token token = sequence.sampler.sample(logits, sequence.length());
    if (sequence.first_token_ns == 0) sequence.first_token_ns = detail::monotonic_ns();
    sequence.tokens.push_back(token);
    sequence.sampler.see(token);
    ++sequence.outcome.usage.output_tokens;
    if (tokenizer->is_end(token)) {
        finish(sequence, Status::completed);
        return token;
    }
    if (sequence.prompt->logprobs) add_logprob(sequence, logits, token);
    const bool stopped = pass_text(sequence, sequence.detokenizer.push(token));
    const bool full = sequence.outcome.usage.output_tokens == sequence.prompt->max_output;
    sequence.outcome.cut = full && !stopped;
    if (full || stopped) finish(sequence, Status::completed);
    return token;
}

// Lets text out up to the first stop string (then true), or to where one may begin.
bool Engine::State::pass_text(detail::Sequence& sequence, std::string_view text) {
    const auto& stops = sequence.prompt->stop;
    std::string& held = sequence.held;
    if (stops.empty()) {
        emit_text(sequence, text);
        return false;
    }
    held += text;
    size_t found = held.size(), begins = held.size();
    for (const std::string& stop : stops) {
        const size_t at = held.find(stop);
        if (at < found) {
            found = at;
            sequence.outcome.stopped_by = stop;
        }
        for (size_t i = held.size() - std::min(held.size(), stop.size() - 1); i < begins; ++i)
            if (stop.starts_with(std::string_view(held).substr(i))) begins = i;
    }
    const bool stopped = found < held.size();
    emit_text(sequence, std::string_view(held).substr(0, std::min(found, begins)));
    held.erase(0, stopped ? held.size() : begins);
    return stopped;
}

void Engine::State::emit_text(detail::Sequence& sequence, std::string_view text) {
    if (text.empty()) return;
    sequence.outcome.text += text;
    if (sequence.reply->put_text(text)) announce(*sequence.reply);
}

void Engine::State::add_logprob(detail::Sequence& sequence, std::span<const float> logits,
                                Token token) {
    TokenLogprob one;
    const uint32_t count = std::min(sequence.prompt->top_logprobs, spec.n_vocab);
    one.logprob = detail::logprob_of(logits, token, count, top);
    one.bytes = tokenizer->piece(token);
    for (uint32_t i = 0; i < count; ++i)
        one.top.push_back({std::string(tokenizer->piece(top[i].first)), top[i].second});
    if (sequence.reply->put_logprob(one)) announce(*sequence.reply);
    sequence.outcome.logprobs.push_back(std::move(one));
}

// The reply learns the end; sweep() takes the sequence away when no batch uses its pages.
void Engine::State::finish(detail::Sequence& sequence, Status status, std::optional<Error> error) {
    if (sequence.outcome.stopped_by.empty() && !pass_text(sequence, sequence.detokenizer.flush()))
        emit_text(sequence, sequence.held);
    sequence.over = true;
    Outcome& outcome = sequence.outcome;
    outcome.status = status;
    outcome.error = std::move(error);
    const uint64_t now = detail::monotonic_ns();
    const uint64_t started = sequence.started_ns ? sequence.started_ns : now;
    const uint64_t first = sequence.first_token_ns ? sequence.first_token_ns : now;
    outcome.timings.queue_us = (started - sequence.queued_ns) / 1000;
    outcome.timings.prefill_us = (first - started) / 1000;
    outcome.timings.decode_us = (now - first) / 1000;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ++(status == Status::completed ? counts.completed
           : status == Status::failed  ? counts.failed
                                       : counts.cancelled);
        counts.input_tokens += sequence.started_ns ? outcome.usage.input_tokens : 0;
        counts.output_tokens += outcome.usage.output_tokens;
        counts.cached_tokens += outcome.usage.cached_tokens;
        counts.queue_us += outcome.timings.queue_us;
        counts.prefill_us += outcome.timings.prefill_us;
        counts.decode_us += outcome.timings.decode_us;
        if (sequence.waiting_ns == 0) --counts.running;
    }
    if (sequence.reply->put_outcome(std::move(outcome))) announce(*sequence.reply);
}

// The end of everything: nothing is taken from now on.
void Engine::State::fail_all(const Error& error) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        closed = true;
    }
    take_arrivals();
    if (!batch.empty()) backend->abandon();
    batch.clear();
    untaken = 0;
    for (auto* list : {&running, &waiting}) {
        for (const SequencePtr& sequence : *list)
            if (!sequence->over) finish(*sequence, Status::failed, error);
        list->clear();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = 0;
}

// ---- For the handles -------------------------------------------------------------------------

// The one who steps, saves or restores.
Result<detail::Exclusive> Engine::State::take_turn(const char* who) {
    const char* why = thread.joinable() ? "the engine has a thread of its own since start()"
                      : stepping.exchange(true, std::memory_order_acquire)
                          ? "called while another step() is at work"
                          : nullptr;
    if (why) return detail::make_error(ErrorKind::invalid_request, std::string(who) + ": " + why);
    return detail::Exclusive(&stepping);
}

// Queues the prompt; a reply that was refused is finished.
Reply Engine::State::reply_to(Result<std::unique_ptr<detail::PreparedPrompt>> prompt) {
    auto reply = std::make_shared<detail::Mailbox>();
    reply->doorbell = doorbell;
    Result<void> good;
    auto id = detail::draw_response_id();
    if (!id) good = id.error();
    else reply->id = std::move(*id);
    if (good) good = prompt ? enqueue(std::move(*prompt), reply, false) : prompt.error();
    if (!good) {
        Outcome refused;
        refused.status = Status::failed;
        refused.error = std::move(good.error());
        (void)reply->put_outcome(std::move(refused));
    }
    return Reply(std::move(reply));
}

// What a save must share with this engine.
detail::SaveHeader Engine::State::save_header() {
    if (!model_fingerprint) model_fingerprint = detail::fingerprint(gguf);
    detail::SaveHeader out;
    out.model = *model_fingerprint;
    out.precision = static_cast<uint32_t>(options.precision);
    out.kv_type = static_cast<uint32_t>(options.kv_type);
    out.page_tokens = options.page_tokens;
    out.page_bytes = backend->page_bytes();
    return out;
}

// Makes the cache know these pages, as many as there is room for.
void Engine::State::import_pages(std::span<const detail::Hash256> keys, std::span<const std::byte> bytes) {
    const size_t size = backend->page_bytes(), count = std::min(keys.size(), bytes.size() / size);
    std::vector<uint32_t> pages;
    for (size_t i = 0; i < count; ++i) {
        uint32_t page = pool.find(keys[i]);
        if (page != detail::PagePool::none) {
            pool.share(page);
        } else {
            if (pool.unused() == 0) break;
            page = pool.take();
            backend->import_page(page, bytes.data() + i * size);
            pool.set_key(page, keys[i], 0);
        }
        pages.push_back(page);
    }
    for (; !pages.empty(); pages.pop_back()) pool.drop(pages.back());
}

void Engine::State::run_thread(void* self) {
    State& state = *static_cast<State*>(self);
    while (!state.stop_asked.load(std::memory_order_acquire)) {
        const uint32_t rings = state.doorbell->rings.load(std::memory_order_acquire);
        auto more = state.work(detail::kNoLimit, detail::kNoLimit);
        if (more && *more) continue;
        detail::wait_on(&state.doorbell->rings, rings, detail::kIdleNs);
    }
}

// ---- The handles -----------------------------------------------------------------------------

Reply::Reply(std::shared_ptr<detail::Mailbox> mailbox) : mailbox_(std::move(mailbox)) {}
Reply::Reply(Reply&& other) noexcept = default;

Reply& Reply::operator=(Reply&& other) noexcept {
    std::swap(mailbox_, other.mailbox_);
    return *this;
}

Reply::~Reply() {
    if (mailbox_ && !mailbox_->detached) mailbox_->cancel();
}

std::optional<Event> Reply::poll() { return mailbox_ ? mailbox_->take() : std::nullopt; }
bool Reply::wait(int64_t timeout_ms) { return !mailbox_ || mailbox_->wait(timeout_ms); }
bool Reply::finished() const {
    return !mailbox_ || mailbox_->finished.load(std::memory_order_acquire);
}

const Outcome& Reply::outcome() const {
    static const Outcome none;
    return mailbox_ && mailbox_->outcome ? *mailbox_->outcome : none;
}

void Reply::cancel() {
    if (mailbox_) mailbox_->cancel();
}

void Reply::detach() {
    if (mailbox_) mailbox_->detached = true;
}

const std::string& Reply::id() const {
    static const std::string none;
    return mailbox_ ? mailbox_->id : none;
}

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&& other) noexcept = default;
Engine& Engine::operator=(Engine&& other) noexcept = default;
Engine::~Engine() = default;

Result<Engine> Engine::begin_open(const EngineOptions& options) {
    auto state = std::make_unique<State>();
    auto opened = state->open(options);
    if (!opened) return opened.error();
    return Engine(std::move(state));
}

Result<Engine> Engine::open(const EngineOptions& options) {
    auto engine = begin_open(options);
    while (engine && !engine->is_loaded()) {
        auto more = engine->step();
        if (!more) return more.error();
    }
    return engine;
}

Result<MemoryPlan> Engine::memory_plan(const EngineOptions& options) {
    auto file = detail::open_model_file(options);
    if (!file) return file.error();
    auto spec = read_model_spec(*file);
    if (!spec) return spec.error();
    auto tensors = bind_model_tensors(*file, *spec);
    if (!tensors) return tensors.error();
    auto chosen = detail::choose_backend_options(options, *spec, *tensors);
    if (!chosen) return chosen.error();
    return detail::plan_cpu(*spec, *tensors, *chosen);
}

Reply Engine::submit(const Request& request) {
    return state_->reply_to(state_->prepare_prompt(request));
}

Result<uint32_t> Engine::count_tokens(const Request& request) const {
    auto tokens = state_->make_prompt(request);
    if (!tokens) return tokens.error();
    return static_cast<uint32_t>(tokens->size());
}

Result<bool> Engine::step(int64_t budget_us) {
    auto turn = state_->take_turn("step()");
    if (!turn) return turn.error();
    const uint64_t budget_ns = static_cast<uint64_t>(std::max<int64_t>(budget_us, 0)) * 1000;
    return budget_us < 0 ? state_->work(detail::kNoLimit, detail::kNoLimit)
                         : state_->work(detail::monotonic_ns() + budget_ns, budget_ns);
}

Result<void> Engine::start() {
    if (state_->thread.joinable()) return {};
    state_->stop_asked.store(false, std::memory_order_release);
    auto thread = detail::Thread::start(State::run_thread, state_.get(), "valar-engine");
    if (!thread) return thread.error();
    state_->thread = std::move(*thread);
    return {};
}

void Engine::stop() {
    state_->stop_asked.store(true, std::memory_order_release);
    state_->doorbell->ring();
    state_->thread.join();
    state_->stop_asked.store(false, std::memory_order_release);
}

bool Engine::is_loaded() const { return state_->loaded.load(std::memory_order_acquire); }
float Engine::load_progress() const { return state_->progress.load(std::memory_order_relaxed); }
const ModelSpec& Engine::spec() const { return state_->spec; }
const Tokenizer& Engine::tokenizer() const { return *state_->tokenizer; }
Responder* Engine::responder() { return state_.get(); }

// ---- Conversation ----------------------------------------------------------------------------
//
// A save is a SaveHeader, the history as JSON, the pages, and the CRC-32C of all that.

namespace detail {
namespace {

// The fields of `settings` that are numbers.
constexpr struct { const char* key; std::optional<double> Request::*field; } saved_numbers[] = {
    {"temperature", &Request::temperature}, {"top_p", &Request::top_p}, {"min_p", &Request::min_p},
};
constexpr struct { const char* key; double Request::*field; } saved_penalties[] = {
    {"presence_penalty", &Request::presence_penalty},
    {"frequency_penalty", &Request::frequency_penalty},
    {"repetition_penalty", &Request::repetition_penalty},
};
constexpr struct { const char* key; std::optional<uint32_t> Request::*field; } saved_counts[] = {
    {"max_output_tokens", &Request::max_output_tokens}, {"top_k", &Request::top_k},
};
constexpr struct { const char* key; std::string Request::*field; } saved_texts[] = {
    {"model", &Request::model}, {"instructions", &Request::instructions},
    {"organisation", &Request::organisation}, {"prompt_cache_key", &Request::prompt_cache_key},
};

Json settings_json(const Request& from) {
    Json out = Json::object();
    for (const auto& [key, field] : saved_numbers)
        if (from.*field) out.set(key, *(from.*field));
    for (const auto& [key, field] : saved_counts)
        if (from.*field) out.set(key, *(from.*field));
    for (const auto& [key, field] : saved_penalties) out.set(key, from.*field);
    for (const auto& [key, field] : saved_texts) out.set(key, from.*field);
    Json stop = Json::array(), bias = Json::array();
    for (const std::string& text : from.stop) stop.push(text);
    for (const auto& [token, value] : from.logit_bias)
        bias.push(Json::array().push(token).push(value));
    out.set("stop", std::move(stop)).set("logit_bias", std::move(bias));
    if (from.seed) out.set("seed", *from.seed);
    out.set("logprobs", from.logprobs).set("top_logprobs", from.top_logprobs);
    out.set("window", static_cast<uint32_t>(from.window));
    return out;
}

Request read_settings(const Json& from) {
    Request out;
    for (const auto& [key, field] : saved_numbers)
        if (const Json* value = from.find(key)) out.*field = value->as_double();
    for (const auto& [key, field] : saved_counts)
        if (const Json* value = from.find(key)) out.*field = static_cast<uint32_t>(value->as_uint());
    for (const auto& [key, field] : saved_penalties) out.*field = from[key].as_double(out.*field);
    for (const auto& [key, field] : saved_texts) out.*field = from[key].as_string();
    for (const Json& text : from["stop"].items()) out.stop.emplace_back(text.as_string());
    for (const Json& one : from["logit_bias"].items())
        out.logit_bias.push_back({static_cast<Token>(one[0].as_int()), one[1].as_double()});
    if (const Json* seed = from.find("seed")) out.seed = seed->as_int();
    out.logprobs = from["logprobs"].as_bool();
    out.top_logprobs = static_cast<uint32_t>(from["top_logprobs"].as_uint());
    out.window = static_cast<Window>(std::min<uint64_t>(from["window"].as_uint(), 2));
    return out;
}

Json item_json(const Item& item) {
    Json parts = Json::array();
    for (const ContentPart& part : item.content)
        parts.push(Json::array().push(static_cast<uint32_t>(part.kind)).push(part.text));
    return Json::array()
        .push(static_cast<uint32_t>(item.kind))
        .push(static_cast<uint32_t>(item.role))
        .push(item.call_id)
        .push(item.name)
        .push(item.arguments)
        .push(std::move(parts));
}

template <class Kind> Kind read_kind(const Json& from, Kind last) {
    return static_cast<Kind>(std::min<uint64_t>(from.as_uint(), static_cast<uint64_t>(last)));
}

Item read_item(const Json& from) {
    Item out;
    out.kind = read_kind(from[0], Item::Kind::custom_tool_call_output);
    out.role = read_kind(from[1], Role::function);
    out.call_id = from[2].as_string();
    out.name = from[3].as_string();
    out.arguments = from[4].as_string();
    for (const Json& part : from[5].items())
        out.content.push_back({read_kind(part[0], ContentPart::Kind::refusal),
                               std::string(part[1].as_string())});
    return out;
}

Error conversation_busy_error() {
    return make_error(ErrorKind::invalid_request, "the last turn is not finished yet",
                      "conversation_busy");
}

}  // namespace
}  // namespace detail

struct Conversation::State {
    Engine::State*    engine = nullptr;
    Request           settings;      // its input is items
    std::vector<Item> items;
    WhenFull          when_full = WhenFull::refuse;
    size_t            fixed     = 0;  // of items: said before the first turn
    uint32_t          forgotten = 0;  // turns
    std::shared_ptr<detail::Mailbox> reply;  // of the turn under way

    bool settle();
    Request request(std::vector<Item> said) const;
    bool forget_half();
    Result<std::unique_ptr<detail::PreparedPrompt>> prepare(std::string_view words);
    Result<std::vector<detail::Hash256>> page_keys() const;
    std::string history() const;
};

// Takes over the turn that was under way; false: it still is.
bool Conversation::State::settle() {
    if (!reply) return true;
    if (!reply->finished.load(std::memory_order_acquire)) return false;
    const Outcome& outcome = *reply->outcome;
    const bool said = outcome.status == Status::completed ||
                      (outcome.status == Status::cancelled && !outcome.text.empty());
    if (said) items.push_back(Item::message(Role::assistant, outcome.text));
    else items.pop_back();
    reply.reset();
    return true;
}

Request Conversation::State::request(std::vector<Item> said) const {
    Request out = settings;
    out.input = Input(std::move(said));
    return out;
}

// A turn is two items. False: there is none left.
bool Conversation::State::forget_half() {
    const size_t turns = (items.size() - fixed) / 2, half = (turns + 1) / 2;
    const auto first = items.begin() + static_cast<ptrdiff_t>(fixed);
    items.erase(first, first + static_cast<ptrdiff_t>(2 * half));
    forgotten += static_cast<uint32_t>(half);
    return half > 0;
}

// An answer should have as much room as it may take, or at least a quarter of the context.
Result<std::unique_ptr<detail::PreparedPrompt>> Conversation::State::prepare(
    std::string_view words) {
    const uint32_t quarter = engine->context / 4;
    const uint32_t room = std::min(settings.max_output_tokens.value_or(quarter), quarter);
    for (;;) {
        std::vector<Item> said = items;
        said.push_back(Item::message(Role::user, std::string(words)));
        auto prompt = engine->prepare_prompt(request(std::move(said)));
        const bool full = prompt ? (*prompt)->max_output < room
                                 : prompt.error().code == "context_length_exceeded";
        if (!full || when_full == WhenFull::refuse || !forget_half()) return prompt;
    }
}

// Of the pages that what was said fills.
Result<std::vector<detail::Hash256>> Conversation::State::page_keys() const {
    std::vector<detail::Hash256> keys;
    if (items.empty() || !engine->options.prefix_cache) return keys;
    auto tokens = engine->make_prompt(request(items));
    if (!tokens) return tokens.error();
    const uint32_t page_tokens = engine->options.page_tokens;
    detail::extend_page_keys(keys, detail::root_key(engine->options, settings.organisation),
                             *tokens, page_tokens, tokens->size() / page_tokens);
    return keys;
}

std::string Conversation::State::history() const {
    Json said = Json::array();
    for (const Item& item : items) said.push(detail::item_json(item));
    return Json::object()
        .set("settings", detail::settings_json(settings))
        .set("when_full", static_cast<uint32_t>(when_full))
        .set("fixed", fixed)
        .set("forgotten", forgotten)
        .set("items", std::move(said))
        .write();
}

Conversation::Conversation(std::unique_ptr<State> state) : state_(std::move(state)) {}
Conversation::Conversation(Conversation&& other) noexcept = default;
Conversation& Conversation::operator=(Conversation&& other) noexcept = default;
Conversation::~Conversation() = default;

Conversation::Conversation(Engine& engine, Request settings, WhenFull when_full)
    : state_(std::make_unique<State>()) {
    state_->engine = engine.state_.get();
    state_->when_full = when_full;
    state_->items = std::move(settings.input.items);
    if (state_->items.empty() && !settings.input.text.empty())
        state_->items.push_back(Item::message(Role::user, std::move(settings.input.text)));
    state_->fixed = state_->items.size();
    settings.input = {};
    state_->settings = std::move(settings);
}

Reply Conversation::say(std::string_view words) {
    if (!state_->settle()) return state_->engine->reply_to(detail::conversation_busy_error());
    Reply reply = state_->engine->reply_to(state_->prepare(words));
    state_->reply = reply.mailbox_;
    state_->items.push_back(Item::message(Role::user, std::string(words)));
    return reply;
}

std::span<const Item> Conversation::items() {
    const bool settled = state_->settle();
    return std::span(state_->items).first(state_->items.size() - !settled);
}

uint32_t Conversation::forgotten_turns() const { return state_->forgotten; }

Result<Conversation> Conversation::fork() {
    if (!state_->settle()) return detail::conversation_busy_error();
    return Conversation(std::make_unique<State>(*state_));
}

Result<std::vector<std::byte>> Conversation::save(bool pages) {
    if (!state_->settle()) return detail::conversation_busy_error();
    Engine::State& engine = *state_->engine;
    auto turn = engine.take_turn("save()");
    if (!turn) return turn.error();
    const std::string history = state_->history();
    auto keys = pages ? state_->page_keys() : Result(std::vector<detail::Hash256>());
    if (!keys) return keys.error();
    std::vector<uint32_t> found;
    for (const detail::Hash256& key : *keys) {
        const uint32_t page = engine.pool.find(key);
        if (page == detail::PagePool::none) break;
        found.push_back(page);
    }
    detail::SaveHeader header = engine.save_header();
    header.pages = static_cast<uint32_t>(found.size());
    header.json_bytes = history.size();
    std::vector<std::byte> out(sizeof header + history.size() + found.size() * header.page_bytes +
                               sizeof(uint32_t));
    std::byte* at = out.data();
    const auto put = [&](const void* from, size_t size) {
        std::memcpy(at, from, size);
        at += size;
    };
    put(&header, sizeof header);
    put(history.data(), history.size());
    for (const uint32_t page : found) {
        engine.backend->export_page(page, at);
        at += header.page_bytes;
    }
    const uint32_t sum = detail::crc32c(out.data(), out.size() - sizeof sum);
    put(&sum, sizeof sum);
    return out;
}

Result<Conversation> Conversation::restore(Engine& to, std::span<const std::byte> saved) {
    const auto refuse = [](ErrorKind kind, const char* why) {
        return detail::make_error(kind, std::string("saved conversation: ") + why);
    };
    Engine::State& engine = *to.state_;
    const detail::SaveHeader here = engine.save_header();
    detail::SaveHeader header;
    uint32_t sum = 0;
    if (saved.size() < sizeof header + sizeof sum)
        return refuse(ErrorKind::bad_data, "too short");
    std::memcpy(&header, saved.data(), sizeof header);
    if (std::memcmp(header.magic, here.magic, sizeof header.magic) != 0)
        return refuse(ErrorKind::bad_data, "this is none");
    if (header.version != here.version)
        return refuse(ErrorKind::unsupported, "written by another version of valar");
    const auto body = saved.subspan(sizeof header, saved.size() - sizeof header - sizeof sum);
    std::memcpy(&sum, saved.data() + saved.size() - sizeof sum, sizeof sum);
    uint64_t page_bytes;
    if (detail::crc32c(saved.data(), saved.size() - sizeof sum) != sum || header.json_bytes > body.size() ||
        detail::mul_overflows(header.pages, header.page_bytes, &page_bytes) ||
        page_bytes != body.size() - header.json_bytes)
        return refuse(ErrorKind::bad_data, "damaged");
    if (!(header.model == here.model)) return refuse(ErrorKind::unsupported, "of another model");
    const auto options = [](const detail::SaveHeader& of) {
        return std::tuple(of.numerics, of.precision, of.kv_type, of.page_tokens, of.page_bytes);
    };
    if (header.pages && options(header) != options(here))
        return refuse(ErrorKind::unsupported, "of an engine with other options");
    auto json = Json::parse(
        {reinterpret_cast<const char*>(body.data()), static_cast<size_t>(header.json_bytes)});
    if (!json) return refuse(ErrorKind::bad_data, json.error().message.c_str());

    auto state = std::make_unique<State>();
    state->engine = &engine;
    state->settings = detail::read_settings((*json)["settings"]);
    state->when_full = detail::read_kind((*json)["when_full"], WhenFull::drop_oldest_turns);
    state->forgotten = static_cast<uint32_t>((*json)["forgotten"].as_uint());
    for (const Json& item : (*json)["items"].items())
        state->items.push_back(detail::read_item(item));
    state->fixed = std::min<size_t>((*json)["fixed"].as_uint(), state->items.size());
    auto turn = engine.take_turn("restore()");
    if (!turn) return turn.error();
    auto keys = header.pages ? state->page_keys() : Result(std::vector<detail::Hash256>());
    if (!keys) return keys.error();
    engine.import_pages(*keys, body.subspan(static_cast<size_t>(header.json_bytes)));
    return Conversation(std::move(state));
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>http
// Owns: the HTTP/1.1 parser, the server's event loop, the blocking client.
// Assumes: callers of step() do not call it from inside a handler.
// Promises: one pass over the bytes, one exchange at a time on a connection, replies in order.

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

// -- characters (RFC 9110, section 5.6.2; RFC 3986, section 3.2.2) ------------------------------

enum HttpClass : uint8_t { http_token = 1, http_visible = 2, http_control = 4, http_name = 8 };

constexpr auto http_classes = [] {
    std::array<uint8_t, 256> classes = {};
    const auto mark = [&](std::string_view characters, int bits) {
        for (const char c : characters) {
            uint8_t& entry = classes[static_cast<uint8_t>(c)];
            entry = static_cast<uint8_t>(entry | bits);
        }
    };
    for (size_t c = 0x21; c < 0x7F; ++c) classes[c] = http_visible;
    for (size_t c = 0; c < 0x20; ++c) classes[c] = c == '\t' ? 0 : http_control;
    classes[0x7F] = http_control;
    mark("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", http_token | http_name);
    mark("0123456789-._", http_token | http_name);
    mark("!#$%&'*+^`|~", http_token);
    return classes;
}();

bool http_is(char c, int bits) { return (http_classes[static_cast<uint8_t>(c)] & bits) != 0; }

bool http_all(std::string_view text, int bits) {
    for (const char c : text)
        if (!http_is(c, bits)) return false;
    return !text.empty();
}

char http_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }

bool http_same(std::string_view a, std::string_view b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i)
        if (http_lower(a[i]) != http_lower(b[i])) return false;
    return true;
}

std::string_view http_trim(std::string_view text) {
    const auto space = [](char c) { return c == ' ' || c == '\t'; };
    while (!text.empty() && space(text.front())) text.remove_prefix(1);
    while (!text.empty() && space(text.back())) text.remove_suffix(1);
    return text;
}

/// The last element of a comma-separated list, which is cut from it.
std::string_view http_pop(std::string_view* list) {
    const size_t comma = list->rfind(',');
    const std::string_view last = comma == list->npos ? *list : list->substr(comma + 1);
    *list = comma == list->npos ? std::string_view() : list->substr(0, comma);
    return http_trim(last);
}

bool http_listed(const HttpHeaders& headers, std::string_view name, std::string_view token) {
    for (const auto& [key, value] : headers) {
        if (!http_same(key, name)) continue;
        for (std::string_view list = value; !list.empty();)
            if (http_same(http_pop(&list), token)) return true;
    }
    return false;
}

/// Decimal digits and nothing else, no wrap.
bool http_decimal(std::string_view text, uint64_t* value) {
    *value = 0;
    for (const char c : text) {
        const auto digit = static_cast<uint64_t>(c - '0');
        if (c < '0' || c > '9' || *value > (UINT64_MAX - digit) / 10) return false;
        *value = *value * 10 + digit;
    }
    return !text.empty();
}

int http_hex(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    const char lower = http_lower(c);
    return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

/// "name", "name:port" or "[v6]:port" in lower case, an empty port dropped; empty if invalid.
/// Narrower than RFC 3986, whose names may hold sub-delims and escapes: no DNS name does.
std::string http_host(std::string_view text) {
    const size_t bracket = text.rfind(']');
    const size_t colon = text.find(':', bracket == text.npos ? 0 : bracket);
    const std::string_view name = text.substr(0, colon);
    const std::string_view port = colon == text.npos ? "" : text.substr(colon + 1);
    uint64_t number = 0;
    if (!port.empty() && (port.size() > 5 || !http_decimal(port, &number) || number > 65535))
        return {};
    const bool v6 = !name.empty() && name.front() == '[' && name.back() == ']';
    if (v6 ? !NetAddress::parse(name, 0) : !http_all(name, http_name)) return {};
    std::string host(port.empty() ? name : text);
    for (char& c : host) c = http_lower(c);
    return host;
}

}  // namespace

const std::string* find_header(const HttpHeaders& headers, std::string_view name) {
    for (const auto& [key, value] : headers)
        if (http_same(key, name)) return &value;
    return nullptr;
}

size_t count_headers(const HttpHeaders& headers, std::string_view name) {
    size_t count = 0;
    for (const auto& header : headers) count += http_same(header.first, name);
    return count;
}

// -- the parser -------------------------------------------------------------------------------

HttpParser::HttpParser(const HttpLimits* limits, Side side) : limits_(limits), side_(side) {
    reset();
}

void HttpParser::reset() {
    message = {};
    message.max_body = limits_->max_body_bytes;
    line_.clear();
    body_left_  = 0;
    head_bytes_ = fields_ = 0;
    status_ = 0;
    reason_ = "";
    state_  = State::start_line;
    carriage_ = leading_line_ = no_body_ = false;
}

std::string_view HttpParser::code() const {
    return status_ == 413 ? "request_too_large" : status_ == 503 ? "overloaded" : "bad_request";
}

HttpParser::Event HttpParser::fail(int status, const char* reason) {
    state_  = State::fault;
    status_ = status;
    reason_ = reason;
    return Event::fault;
}

HttpParser::Event HttpParser::feed(std::string_view bytes, size_t* used) {
    *used = 0;
    for (;;) {
        Event event = Event::more;
        switch (state_) {
        case State::complete: return Event::complete;
        case State::fault: return Event::fault;
        case State::body:
        case State::chunk_data:
        case State::until_close:
            event = take_body(bytes, used);
            if (event == Event::more && *used == bytes.size()) return event;
            break;
        default:
            if (!take_line(bytes, used)) return state_ == State::fault ? Event::fault : Event::more;
            event = on_line();
            line_.clear();
        }
        if (event != Event::more) return event;
    }
}

HttpParser::Event HttpParser::end() {
    if (state_ == State::until_close) state_ = State::complete;
    if (state_ == State::complete) return Event::complete;
    return state_ == State::fault ? Event::fault : fail(400, "the message is cut short");
}

/// Collects one line into line_. True when it is whole, without its CR LF.
bool HttpParser::take_line(std::string_view bytes, size_t* used) {
    while (*used < bytes.size()) {
        const char c = bytes[(*used)++];
        if (carriage_ != (c == '\n')) {
            fail(400, carriage_ ? "a CR without LF" : "an LF without CR");
            return false;
        }
        if (carriage_) {
            carriage_ = false;
            return true;
        }
        if (c == '\r') {
            carriage_ = true;
        } else if (http_is(c, http_control)) {
            fail(400, "a control character");
            return false;
        } else if (line_is_full()) {
            return false;
        } else {
            line_.push_back(c);
        }
    }
    return false;
}

bool HttpParser::line_is_full() {
    if (state_ == State::start_line) {
        if (line_.size() < limits_->max_request_line_bytes) return false;
        fail(414, "the request line is too long");
    } else {
        if (head_bytes_ + line_.size() < limits_->max_head_bytes) return false;
        if (state_ == State::header_line || state_ == State::trailer)
            fail(431, "the header fields are too long");
        else
            fail(400, "a chunk's first line is too long");
    }
    return true;
}

HttpParser::Event HttpParser::on_line() {
    switch (state_) {
    case State::start_line:
        if (side_ == Side::reply) return on_status_line();
        if (!line_.empty()) return on_request_line();
        if (leading_line_) return fail(400, "empty lines before the request line");
        leading_line_ = true;  // RFC 9112, section 2.2: left over by old clients after a body
        return Event::more;
    case State::header_line:
    case State::trailer:
        return on_field();
    case State::chunk_size:
        return on_chunk_size();
    default:
        if (!line_.empty()) return fail(400, "a chunk longer than its size");
        state_ = State::chunk_size;
        return Event::more;
    }
}

namespace {

/// "HTTP/1.x"; otherwise the status to refuse with.
int http_version(std::string_view text, bool* http_1_0) {
    const auto digit = [](char c) { return c >= '0' && c <= '9'; };
    if (text.size() != 8 || text.substr(0, 5) != "HTTP/" || !digit(text[5]) || text[6] != '.' ||
        !digit(text[7]))
        return 400;
    *http_1_0 = text[7] == '0';
    return text[5] == '1' ? 0 : 505;
}

}  // namespace

HttpParser::Event HttpParser::on_request_line() {
    const std::string_view line = line_;
    const size_t first = line.find(' ');
    const size_t second = first == line.npos ? first : line.find(' ', first + 1);
    if (second == line.npos) return fail(400, "a request line without method, target and version");
    const std::string_view target = line.substr(first + 1, second - first - 1);
    if (!http_all(line.substr(0, first), http_token)) return fail(400, "the method is not a token");
    if (!http_all(target, http_visible) || target.find('#') != target.npos)
        return fail(400, "the target is empty or holds a character that must be escaped");
    const int refused = http_version(line.substr(second + 1), &message.http_1_0);
    if (refused == 505) return fail(505, "only HTTP/1.1 and HTTP/1.0 are spoken here");
    if (refused) return fail(refused, "the version is malformed");
    message.method = line.substr(0, first);
    message.target = target;
    state_ = State::header_line;
    return Event::more;
}

HttpParser::Event HttpParser::on_status_line() {
    const std::string_view line = line_;
    uint64_t status = 0;
    if (http_version(line.substr(0, 8), &message.http_1_0) != 0 || line.size() < 12 ||
        line[8] != ' ' || !http_decimal(line.substr(9, 3), &status) || status < 100 ||
        (line.size() > 12 && line[12] != ' '))
        return fail(400, "a malformed status line");
    status_ = static_cast<int>(status);
    state_ = State::header_line;
    return Event::more;
}

HttpParser::Event HttpParser::on_field() {
    const bool trailer = state_ == State::trailer;
    const std::string_view line = line_;
    if (line.empty()) {
        if (!trailer) return on_head_end();
        state_ = State::complete;
        return Event::complete;
    }
    head_bytes_ += static_cast<uint32_t>(line.size());
    if (++fields_ > limits_->max_headers) return fail(431, "too many header fields");
    if (line[0] == ' ' || line[0] == '\t') return fail(400, "a folded header field");
    const size_t colon = line.find(':');
    if (colon == line.npos) return fail(400, "a header field without colon");
    if (!http_all(line.substr(0, colon), http_token))
        return fail(400, "a header field's name is not a token");
    // Trailer fields are checked and dropped: merging them could smuggle a header past on_head.
    if (!trailer)
        message.headers.emplace_back(line.substr(0, colon), http_trim(line.substr(colon + 1)));
    return Event::more;
}

HttpParser::Event HttpParser::on_head_end() {
    using Step = Event (HttpParser::*)();
    static constexpr Step steps[] = {
        &HttpParser::read_transfer_encoding, &HttpParser::read_content_length,
        &HttpParser::read_host, &HttpParser::read_target, &HttpParser::read_options};
    const size_t count = side_ == Side::request ? std::size(steps) : 2;
    for (const Step step : std::span(steps, count))
        if ((this->*step)() != Event::more) return Event::fault;
    const bool bodiless = no_body_ || status_ / 100 == 1 || status_ == 204 || status_ == 304;
    if (side_ == Side::reply && bodiless) message.chunked = false, message.content_length = 0;
    body_left_ = message.content_length.value_or(0);
    state_ = message.chunked ? State::chunk_size : State::body;
    if (side_ == Side::reply && !message.chunked && !message.content_length)
        state_ = State::until_close;
    head_bytes_ = fields_ = 0;
    return Event::head;
}

HttpParser::Event HttpParser::read_transfer_encoding() {
    const size_t count = message.count("Transfer-Encoding");
    if (count == 0) return Event::more;
    if (message.http_1_0) return fail(400, "Transfer-Encoding in HTTP/1.0");
    if (message.count("Content-Length") > 0)
        return fail(400, "both Transfer-Encoding and Content-Length");
    std::string_view list;
    for (const auto& [name, value] : message.headers)
        if (http_same(name, "Transfer-Encoding")) list = value;
    const bool alone = count == 1 && list.find(',') == list.npos;
    // Where chunked does not come last, nobody knows where the body ends (RFC 9112, section 6.3).
    if (!http_same(http_pop(&list), "chunked"))
        return fail(400, "Transfer-Encoding does not end in chunked");
    if (!alone) return fail(501, "a transfer coding other than chunked");
    message.chunked = true;
    return Event::more;
}

HttpParser::Event HttpParser::read_content_length() {
    const size_t count = message.count("Content-Length");
    if (count == 0) return Event::more;
    if (count > 1) return fail(400, "more than one Content-Length");
    uint64_t length = 0;
    if (!http_decimal(*message.header("Content-Length"), &length))
        return fail(400, "Content-Length is not a number");
    message.content_length = length;
    return Event::more;
}

HttpParser::Event HttpParser::read_host() {
    const size_t count = message.count("Host");
    if (count > 1) return fail(400, "more than one Host");
    if (count == 0) return message.http_1_0 ? Event::more : fail(400, "Host is missing");
    message.host = http_host(*message.header("Host"));
    return message.host.empty() ? fail(400, "Host is not a name and port") : Event::more;
}

/// Brings the absolute form to the origin form; its host is the one that counts (RFC 9112, 3.2.2).
HttpParser::Event HttpParser::read_target() {
    if (message.method == "CONNECT") return fail(501, "CONNECT is for proxies");
    const std::string_view target = message.target;
    if (target[0] == '/') return Event::more;
    if (target == "*")
        return message.method == "OPTIONS" ? Event::more : fail(400, "the target * is for OPTIONS");
    const size_t colon = target.find("://");
    const std::string_view scheme = target.substr(0, colon);
    if (colon == target.npos || (!http_same(scheme, "http") && !http_same(scheme, "https")))
        return fail(400, "the target is neither a path nor an http URL");
    const std::string_view rest = target.substr(colon + 3);
    const size_t path = std::min(rest.find_first_of("/?"), rest.size());
    message.host = http_host(rest.substr(0, path));
    if (message.host.empty()) return fail(400, "the target's host is invalid");
    std::string origin(rest.substr(path));
    if (origin.empty()) origin = message.method == "OPTIONS" ? "*" : "/";
    if (origin[0] == '?') origin.insert(0, 1, '/');
    message.target = std::move(origin);
    return Event::more;
}

HttpParser::Event HttpParser::read_options() {
    const bool close = http_listed(message.headers, "Connection", "close");
    message.keep_alive = !close && (!message.http_1_0 ||
                                    http_listed(message.headers, "Connection", "keep-alive"));
    // An HTTP/1.0 client cannot mean it: to be ignored (RFC 9110, section 10.1.1).
    const size_t count = message.http_1_0 ? 0 : message.count("Expect");
    if (count > 1 || (count == 1 && !http_same(*message.header("Expect"), "100-continue")))
        return fail(417, "an expectation other than 100-continue");
    message.expect_continue = count == 1;
    return Event::more;
}

/// 1*HEXDIG, then nothing or an extension, which is dropped (RFC 9112, section 7.1.1).
HttpParser::Event HttpParser::on_chunk_size() {
    uint64_t size = 0;
    size_t digits = 0;
    for (; digits < line_.size() && http_hex(line_[digits]) >= 0; ++digits) {
        if (digits == 16) return fail(400, "a chunk size of more than 16 digits");
        size = size << 4 | static_cast<uint64_t>(http_hex(line_[digits]));
    }
    const std::string_view extension = std::string_view(line_).substr(digits);
    const std::string_view trimmed = http_trim(extension);
    if (digits == 0 || (!extension.empty() && (trimmed.empty() || trimmed[0] != ';')))
        return fail(400, "a malformed chunk size");
    head_bytes_ += static_cast<uint32_t>(extension.size());
    body_left_ = size;
    state_ = size > 0 ? State::chunk_data : State::trailer;
    return Event::more;
}

HttpParser::Event HttpParser::take_body(std::string_view bytes, size_t* used) {
    if (message.body.size() > message.max_body ||
        body_left_ > message.max_body - message.body.size())
        return fail(413, "the body is larger than this server takes");
    const size_t open = bytes.size() - *used;
    const bool bounded = state_ != State::until_close;
    const size_t take = bounded && body_left_ < open ? static_cast<size_t>(body_left_) : open;
    if (!bounded && take > message.max_body - message.body.size())
        return fail(413, "the body is larger than asked for");
    if (!grow_body(take)) return fail(503, "no memory for the body");
    message.body.append(bytes.substr(*used, take));
    *used += take;
    if (!bounded) return Event::more;
    body_left_ -= take;
    if (body_left_ > 0) return Event::more;
    state_ = state_ == State::body ? State::complete : State::chunk_end;
    return state_ == State::complete ? Event::complete : Event::more;
}

/// Doubles the body's room, never past its limit. std::string would end the process where memory
/// ends, so a large step is tried first in a way that may fail.
bool HttpParser::grow_body(size_t bytes) {
    constexpr size_t large = 256 << 10;
    const size_t need = message.body.size() + bytes, room = message.body.capacity();
    if (need <= room) return true;
    const size_t want = static_cast<size_t>(std::min<uint64_t>(
        std::max<uint64_t>(need, uint64_t{room} * 2), message.max_body));
    if (want >= large) {
        std::unique_ptr<char[]> probe(new (std::nothrow) char[want + 1]);
        if (!probe) return false;
    }
    message.body.reserve(want);
    return true;
}

// -- writing ----------------------------------------------------------------------------------

namespace {

const char* http_phrase(int status) {
    static constexpr struct {
        int         status;
        const char* phrase;
    } phrases[] = {
        {200, "OK"}, {202, "Accepted"}, {204, "No Content"}, {304, "Not Modified"},
        {400, "Bad Request"}, {401, "Unauthorized"}, {403, "Forbidden"}, {404, "Not Found"},
        {405, "Method Not Allowed"}, {408, "Request Timeout"}, {409, "Conflict"},
        {411, "Length Required"}, {413, "Content Too Large"}, {414, "URI Too Long"},
        {415, "Unsupported Media Type"}, {417, "Expectation Failed"}, {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"},
        {501, "Not Implemented"}, {502, "Bad Gateway"}, {503, "Service Unavailable"},
        {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"}};
    for (const auto& row : phrases)
        if (row.status == status) return row.phrase;
    return "";
}

/// "Sun, 06 Nov 1994 08:49:37 GMT", whatever the locale. Days to civil date: era of 400 years that
/// begins on 1 March, so that the leap day comes last.
std::string http_date(int64_t unix_seconds) {
    const int64_t days = unix_seconds / 86400, second = unix_seconds % 86400;
    const int64_t from_march = days + 719468, era = from_march / 146097;
    const int64_t day_of_era = from_march % 146097;
    const int64_t year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    const int64_t day_of_year =
        day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    const int64_t month_from_march = (5 * day_of_year + 2) / 153;
    const int day = static_cast<int>(day_of_year - (153 * month_from_march + 2) / 5 + 1);
    const int month = static_cast<int>((month_from_march + 2) % 12);
    const int year = static_cast<int>(year_of_era + era * 400 + (month < 2));
    return format("%.3s, %02d %.3s %04d %02d:%02d:%02d GMT", &"ThuFriSatSunMonTueWed"[days % 7 * 3],
                  day, &"JanFebMarAprMayJunJulAugSepOctNovDec"[month * 3], year,
                  static_cast<int>(second / 3600), static_cast<int>(second / 60 % 60),
                  static_cast<int>(second % 60));
}

bool http_field_ok(const std::pair<std::string, std::string>& field) {
    for (const char c : field.second)
        if (http_is(c, http_control)) return false;
    return http_all(field.first, http_token);
}

/// What the framing itself writes; a handler's own would make two of them.
bool http_own_field(std::string_view name) {
    for (const char* own : {"Date", "Connection", "Content-Length", "Transfer-Encoding"})
        if (http_same(name, own)) return true;
    return false;
}

void http_append(std::string* out, std::initializer_list<std::string_view> parts) {
    for (const std::string_view part : parts) out->append(part);
}

/// The caller's fields; one that could break out of its line is left out.
void http_append_fields(std::string* out, const HttpHeaders& headers) {
    for (const auto& field : headers)
        if (http_field_ok(field) && !http_own_field(field.first))
            http_append(out, {field.first, ": ", field.second, "\r\n"});
}

}  // namespace

// -- the server -------------------------------------------------------------------------------

namespace {

uint64_t http_now_ms() { return monotonic_ns() / 1'000'000; }

constexpr size_t   http_read_bytes      = 64 << 10;   // one read; so much may be kept for later
constexpr size_t   http_write_bytes     = 256 << 10;  // one write, so that no reply holds the loop
constexpr size_t   http_pipelined_bytes = 16 << 10;   // read ahead of a reply; then no more is read
constexpr int      http_accepts_a_turn  = 64;
constexpr uint32_t http_accept_pause_ms = 100;  // after running out of descriptors
constexpr uint64_t http_timer_grain_ms  = 10;   // the deadlines are looked through no more often
constexpr uint64_t http_never           = UINT64_MAX;
constexpr uint64_t http_listener_tag    = 0;
constexpr int      http_slot_bits       = 24;  // of an id; the rest is a serial number from 1
constexpr uint64_t http_slot_mask       = (1u << http_slot_bits) - 1;

}  // namespace

enum class HttpPhase : uint8_t {
    idle,    // between requests: nothing is held
    head,    // reading a head
    body,    // reading a body
    work,    // the handler has the request
    reply,   // writing
    queued,  // bytes of the next request are held; it is taken up in the next turn
    linger,  // our end of stream is sent; reading what still comes, so that it is no reset
};

/// What a connection needs only while it is not idle.
struct HttpActive {
    explicit HttpActive(const HttpLimits* limits) : parser(limits) {}
    HttpParser  parser;
    std::string input;  // pipelined bytes
    std::string head, body;
    size_t      sent    = 0;
    bool        blocked = false;  // the socket took no more: wait until it does
};

struct HttpConnection {
    Socket     socket;
    NetAddress peer;
    HttpPhase  phase       = HttpPhase::idle;
    uint8_t    interest    = 0;
    bool       keep_alive  = false;  // of the request in hand
    bool       head_only   = false;
    bool       http_1_0    = false;
    bool       peer_closed = false;
    uint64_t   id         = 0;
    uint64_t   exchange   = 0;  // accepted by on_head, neither answered nor closed
    uint64_t   body_bytes = 0;  // counted against max_inflight_body_bytes
    uint64_t   window     = 0;  // bytes since body_timeout_ms began
    std::unique_ptr<HttpActive> active;
};
static_assert(sizeof(HttpConnection) <= 256, "an idle connection must stay cheap");

struct HttpSlot {
    std::unique_ptr<HttpConnection> connection;
    uint64_t deadline = http_never;
    bool     idle     = false;
};

struct HttpMessage {  // to the loop: a reply, or a call when function is set
    uint64_t  exchange = 0;
    HttpReply reply    = {};
    void (*function)(void*) = nullptr;
    void* context = nullptr;
};

struct HttpServer::State {
    State(const HttpOptions& given, HttpHandler* user, Poller made, Socket bound)
        : options(given), handler(user), poller(std::move(made)), listener(std::move(bound)) {}

    HttpOptions  options;
    HttpHandler* handler;
    Poller       poller;
    Socket       listener;
    NetAddress   address;
    Stats        stats;

    std::vector<HttpSlot>  slots;
    std::vector<uint32_t>  free_slots;
    std::vector<uint64_t>  queue;  // connections with pipelined bytes
    std::vector<PollEvent> events;
    std::vector<char>      scratch = std::vector<char>(http_read_bytes);
    uint64_t serial       = 0;
    uint64_t now          = http_now_ms();
    uint64_t next_timer   = http_never;
    uint64_t next_tick    = http_never;
    uint64_t accept_again = http_never;
    uint64_t drain_until  = http_never;  // set once stopping
    bool     finished     = false;
    std::string date;
    int64_t     date_second = -1;

    std::mutex               mutex;  // guards the two below
    std::vector<HttpMessage> inbox;
    bool                     stop_asked = false;
    std::atomic<bool>        sleeping   = false;  // a sender has to wake the loop; set under mutex

    bool step(int timeout_ms);
    int  wait_ms(int timeout_ms);
    void send_message(HttpMessage message);
    void ask_stop();
    void take_messages();
    void run_queue();
    void run_timers();
    void on_deadline(HttpConnection& connection);
    void drain();

    void accept_some();
    void add(Socket socket, const NetAddress& peer);
    void turn_away(Socket socket);
    bool evict_idle();
    void drop(HttpConnection& connection);
    HttpConnection* find(uint64_t id);
    HttpSlot& slot(const HttpConnection& connection);

    void on_event(const PollEvent& event);
    void on_readable(HttpConnection& connection);
    void on_end(HttpConnection& connection);
    void consume(HttpConnection& connection, std::string_view bytes);
    bool begin_exchange(HttpConnection& connection, std::string_view rest);
    bool count_body(HttpConnection& connection);
    void send_continue(HttpConnection& connection);
    void deliver(HttpConnection& connection);
    void refuse(HttpConnection& connection, int status, std::string_view code,
                std::string_view reason);
    void send(HttpConnection& connection, HttpReply reply);
    void flush(HttpConnection& connection);
    void finish(HttpConnection& connection);
    void enter(HttpConnection& connection, HttpPhase phase);
    void watch(HttpConnection& connection);
    void release_body(HttpConnection& connection);
    std::string render(const HttpConnection& connection, const HttpReply& reply, bool close);
};

Result<HttpServer> HttpServer::open(const HttpOptions& options, HttpHandler* handler) {
    auto address = NetAddress::parse(options.host, options.port);
    if (!address) return address.error();
    if (options.max_connections == 0 || options.max_connections >= 1u << http_slot_bits)
        return make_error(ErrorKind::invalid_request, "max_connections is out of range", {},
                          "max_connections");
    auto listener = Socket::listen(*address, options.backlog);
    if (!listener) return listener.error();
    auto poller = Poller::open();
    if (!poller) return poller.error();
    auto bound = listener->local();
    if (!bound) return bound.error();
    auto state =
        std::make_unique<State>(options, handler, std::move(*poller), std::move(*listener));
    state->address = *bound;
    if (options.tick_ms > 0) state->next_tick = state->now + options.tick_ms;
    auto watched = state->poller.set(state->listener, http_listener_tag, poll_read);
    if (!watched) return watched.error();
    return HttpServer(std::move(state));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}
HttpServer::HttpServer(HttpServer&& other) noexcept = default;
HttpServer& HttpServer::operator=(HttpServer&& other) noexcept = default;
HttpServer::~HttpServer() = default;

NetAddress HttpServer::address() const { return state_->address; }
HttpServer::Stats HttpServer::stats() const { return state_->stats; }
bool HttpServer::step(int timeout_ms) { return state_->step(timeout_ms); }
void HttpServer::stop() { state_->ask_stop(); }
void HttpServer::reply(uint64_t exchange, HttpReply reply) {
    state_->send_message({exchange, std::move(reply), nullptr, nullptr});
}
void HttpServer::post(void (*function)(void*), void* context) {
    state_->send_message({0, {}, function, context});
}

// The loop's turn.

bool HttpServer::State::step(int timeout_ms) {
    if (finished) return false;
    now = http_now_ms();
    if (!poller.wait(wait_ms(timeout_ms), &events)) events.clear();
    sleeping = false;  // what the handler sends from here on is taken below
    now = http_now_ms();
    for (const PollEvent& event : events) on_event(event);
    run_queue();
    take_messages();
    run_timers();
    drain();
    return !finished;
}

int HttpServer::State::wait_ms(int timeout_ms) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!queue.empty() || !inbox.empty() || stop_asked) return 0;
    sleeping = true;
    const uint64_t next =
        std::min(std::min(next_timer, next_tick), std::min(accept_again, drain_until));
    if (next == http_never) return timeout_ms;
    const int until = static_cast<int>(std::min<uint64_t>(next > now ? next - now : 0, 60'000));
    return timeout_ms < 0 ? until : std::min(until, timeout_ms);
}

void HttpServer::State::send_message(HttpMessage message) {
    const std::lock_guard<std::mutex> lock(mutex);
    inbox.push_back(std::move(message));
    if (sleeping.exchange(false)) poller.wake();
}

void HttpServer::State::ask_stop() {
    const std::lock_guard<std::mutex> lock(mutex);
    stop_asked = true;
    if (sleeping.exchange(false)) poller.wake();
}

void HttpServer::State::take_messages() {
    std::vector<HttpMessage> taken;
    bool stop = false;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        taken.swap(inbox);
        stop = std::exchange(stop_asked, false);
    }
    for (HttpMessage& message : taken) {
        if (message.function) {
            message.function(message.context);
            continue;
        }
        HttpConnection* connection = find(message.exchange);
        if (connection && connection->phase == HttpPhase::work)
            send(*connection, std::move(message.reply));
    }
    if (!stop || drain_until != http_never) return;
    drain_until = now + options.drain_timeout_ms;
    poller.remove(listener);
    listener.close();
    accept_again = http_never;
    for (HttpSlot& entry : slots)
        if (entry.connection && entry.idle) drop(*entry.connection);
}

/// One more request of each connection that had sent several at once: fair to the others.
void HttpServer::State::run_queue() {
    std::vector<uint64_t> ids;
    ids.swap(queue);
    for (const uint64_t id : ids) {
        HttpConnection* connection = find(id);
        if (!connection || connection->phase != HttpPhase::queued) continue;
        const std::string input = std::move(connection->active->input);
        connection->active->input.clear();
        enter(*connection, HttpPhase::head);
        consume(*connection, input);
    }
}

void HttpServer::State::run_timers() {
    if (now >= next_tick) {
        next_tick = now + options.tick_ms;
        handler->on_tick();
    }
    if (now >= accept_again) {
        accept_again = http_never;
        (void)poller.set(listener, http_listener_tag, poll_read).ok();
    }
    if (now < next_timer) return;
    uint64_t next = http_never;
    for (HttpSlot& entry : slots) {
        if (entry.connection && entry.deadline <= now) on_deadline(*entry.connection);
        if (entry.connection) next = std::min(next, entry.deadline);
    }
    next_timer = next == http_never ? next : std::max(next, now + http_timer_grain_ms);
}

void HttpServer::State::on_deadline(HttpConnection& connection) {
    const bool body = connection.phase == HttpPhase::body;
    if (body && connection.window >= options.body_min_bytes)
        return enter(connection, HttpPhase::body);
    ++stats.timeouts;
    if (body || connection.phase == HttpPhase::head)
        return refuse(connection, 408, "bad_request", "the request did not arrive in time");
    drop(connection);
}

void HttpServer::State::drain() {
    if (drain_until == http_never || (stats.connections > 0 && now < drain_until)) return;
    for (HttpSlot& entry : slots)
        if (entry.connection) drop(*entry.connection);
    finished = true;
}

// Connections.

void HttpServer::State::accept_some() {
    for (int i = 0; i < http_accepts_a_turn && listener.is_open(); ++i) {
        Socket socket;
        NetAddress peer;
        const IoStatus status = listener.accept(&socket, &peer);
        if (status == IoStatus::again) return;
        if (status == IoStatus::done) {
            ++stats.accepted;
            if (stats.connections < options.max_connections || evict_idle())
                add(std::move(socket), peer);
            else
                turn_away(std::move(socket));
        } else if (status == IoStatus::full && !evict_idle()) {
            // The listener stays readable: to leave it watched would be a busy loop.
            (void)poller.set(listener, http_listener_tag, 0).ok();
            accept_again = now + http_accept_pause_ms;
            return;
        }
    }
}

void HttpServer::State::add(Socket socket, const NetAddress& peer) {
    if (free_slots.empty()) {
        free_slots.push_back(static_cast<uint32_t>(slots.size()));
        slots.emplace_back();
    }
    const uint32_t place = free_slots.back();
    free_slots.pop_back();
    auto connection = std::make_unique<HttpConnection>();
    connection->socket = std::move(socket);
    connection->peer = peer;
    connection->id = ++serial << http_slot_bits | place;
    slots[place].connection = std::move(connection);
    ++stats.connections;
    enter(*slots[place].connection, HttpPhase::idle);
}

/// Too many connections, none of them idle: one try to say so.
void HttpServer::State::turn_away(Socket socket) {
    ++stats.faults;
    const HttpReply reply = handler->on_error({}, 503, "overloaded", "too many connections");
    (void)socket.read(scratch.data(), scratch.size());  // unread bytes would turn close into reset
    (void)socket.write(render({}, reply, true), reply.body);
    socket.shutdown_write();
}

/// Makes room by closing the connection that has been idle for longest.
bool HttpServer::State::evict_idle() {
    HttpSlot* oldest = nullptr;
    for (HttpSlot& entry : slots)
        if (entry.connection && entry.idle && (!oldest || entry.deadline < oldest->deadline))
            oldest = &entry;
    if (oldest) drop(*oldest->connection);
    return oldest != nullptr;
}

void HttpServer::State::drop(HttpConnection& connection) {
    const uint64_t exchange = std::exchange(connection.exchange, 0);
    release_body(connection);
    poller.remove(connection.socket);
    --stats.connections;
    HttpSlot& entry = slot(connection);
    free_slots.push_back(static_cast<uint32_t>(&entry - slots.data()));
    entry = {};
    if (exchange) handler->on_closed(exchange);
}

HttpSlot& HttpServer::State::slot(const HttpConnection& connection) {
    return slots[connection.id & http_slot_mask];
}

/// By the id of the connection, or of the exchange it has in hand: both end in the slot's number.
HttpConnection* HttpServer::State::find(uint64_t id) {
    const size_t place = id & http_slot_mask;
    HttpConnection* connection = place < slots.size() ? slots[place].connection.get() : nullptr;
    if (connection && connection->id != id && connection->exchange != id) return nullptr;
    return connection;
}

void HttpServer::State::enter(HttpConnection& connection, HttpPhase phase) {
    connection.phase = phase;
    connection.window = 0;
    if (phase == HttpPhase::idle || phase == HttpPhase::linger) connection.active.reset();
    static constexpr uint32_t HttpOptions::* limits[] = {
        &HttpOptions::idle_timeout_ms, &HttpOptions::header_timeout_ms,
        &HttpOptions::body_timeout_ms, nullptr, &HttpOptions::write_timeout_ms, nullptr,
        &HttpOptions::linger_timeout_ms};
    const auto limit = limits[static_cast<size_t>(phase)];
    HttpSlot& entry = slot(connection);
    entry.idle = phase == HttpPhase::idle;
    entry.deadline = limit ? now + options.*limit : http_never;
    next_timer = std::min(next_timer, entry.deadline);
    watch(connection);
}

/// Reads always, so that an end of stream is seen, unless enough was read ahead of a reply.
void HttpServer::State::watch(HttpConnection& connection) {
    unsigned interest = poll_read;
    if (connection.active && connection.active->input.size() >= http_pipelined_bytes)
        interest = poll_hangup;
    if (connection.phase == HttpPhase::reply) {
        if (connection.peer_closed) interest = 0;
        if (connection.active->blocked) interest |= poll_write;
    }
    if (interest == connection.interest) return;
    connection.interest = static_cast<uint8_t>(interest);
    (void)poller.set(connection.socket, connection.id, interest).ok();
}

// Reading.

void HttpServer::State::on_event(const PollEvent& event) {
    if (event.tag == http_listener_tag) return accept_some();
    HttpConnection* connection = find(event.tag);
    if (!connection) return;  // dropped earlier in this turn
    if (event.writable && connection->phase == HttpPhase::reply) return flush(*connection);
    if (event.readable && connection->interest & poll_read) return on_readable(*connection);
    if (event.hangup) on_end(*connection);
}

void HttpServer::State::on_readable(HttpConnection& connection) {
    const IoResult got = connection.socket.read(scratch.data(), scratch.size());
    if (got.status == IoStatus::again) return;
    if (got.status != IoStatus::done) return on_end(connection);
    const std::string_view bytes(scratch.data(), got.bytes);
    connection.window += got.bytes;
    switch (connection.phase) {
    case HttpPhase::linger: return;
    case HttpPhase::work:
    case HttpPhase::reply:
    case HttpPhase::queued:
        connection.active->input.append(bytes);
        return watch(connection);
    case HttpPhase::idle:
        connection.active = std::make_unique<HttpActive>(&options.limits);
        enter(connection, HttpPhase::head);
        break;
    default: break;
    }
    consume(connection, bytes);
}

/// The client sends no more. While a reply is on its way it may still be reading; told twice, the
/// connection is broken (or WSAPoll repeats itself, which cannot be silenced).
void HttpServer::State::on_end(HttpConnection& connection) {
    if (connection.phase != HttpPhase::reply || connection.peer_closed) return drop(connection);
    connection.peer_closed = true;
    watch(connection);
}

void HttpServer::State::consume(HttpConnection& connection, std::string_view bytes) {
    HttpParser& parser = connection.active->parser;
    for (;;) {
        size_t used = 0;
        const HttpParser::Event event = parser.feed(bytes, &used);
        bytes.remove_prefix(used);
        if (!count_body(connection)) return;
        switch (event) {
        case HttpParser::Event::more:
            return send_continue(connection);
        case HttpParser::Event::fault:
            return refuse(connection, parser.status(), parser.code(), parser.reason());
        case HttpParser::Event::head:
            if (!begin_exchange(connection, bytes)) return;
            break;
        case HttpParser::Event::complete:
            connection.active->input = bytes;
            return deliver(connection);
        }
    }
}

/// Asks the handler; false when the request was answered or refused. `rest` follows the head.
bool HttpServer::State::begin_exchange(HttpConnection& connection, std::string_view rest) {
    HttpRequest& request = connection.active->parser.message;
    ++stats.requests;
    request.peer = connection.peer;
    request.exchange = ++serial << http_slot_bits | (connection.id & http_slot_mask);
    request.max_body = options.limits.max_body_bytes;
    connection.keep_alive = request.keep_alive;
    connection.head_only = request.is_head();
    connection.http_1_0 = request.http_1_0;
    if (std::optional<HttpReply> reply = handler->on_head(request)) {
        reply->close |= request.has_body();
        connection.active->input = rest;
        send(connection, std::move(*reply));
        return false;
    }
    connection.exchange = request.exchange;
    const uint64_t declared = request.content_length.value_or(0);
    const uint64_t room = options.max_inflight_body_bytes - stats.body_bytes;
    if (declared > room && declared <= request.max_body) {  // beyond max_body it will be a 413
        refuse(connection, 503, "overloaded", "too many requests in memory");
        return false;
    }
    enter(connection, HttpPhase::body);
    return true;
}

/// Adds what the body grew by to the bytes in flight; false when that is too much.
bool HttpServer::State::count_body(HttpConnection& connection) {
    const uint64_t size = connection.active->parser.message.body.size();
    stats.body_bytes += size - connection.body_bytes;
    connection.body_bytes = size;
    if (size == 0 || stats.body_bytes <= options.max_inflight_body_bytes) return true;
    refuse(connection, 503, "overloaded", "too many requests in memory");
    return false;
}

void HttpServer::State::release_body(HttpConnection& connection) {
    stats.body_bytes -= std::exchange(connection.body_bytes, 0);
}

/// The head is accepted and the declared size fits: the client may send its body.
void HttpServer::State::send_continue(HttpConnection& connection) {
    HttpRequest& request = connection.active->parser.message;
    if (connection.phase != HttpPhase::body || !request.expect_continue) return;
    request.expect_continue = false;
    static constexpr std::string_view line = "HTTP/1.1 100 Continue\r\n\r\n";
    // Nothing else is unsent, so 25 bytes fit, or the connection is broken.
    if (request.body.empty() && connection.socket.write(line).bytes != line.size())
        drop(connection);
}

void HttpServer::State::deliver(HttpConnection& connection) {
    HttpRequest request = std::move(connection.active->parser.message);
    connection.active->parser.reset();
    enter(connection, HttpPhase::work);
    handler->on_request(std::move(request));
}

void HttpServer::State::refuse(HttpConnection& connection, int status, std::string_view code,
                               std::string_view reason) {
    ++stats.faults;
    connection.head_only = connection.active->parser.message.is_head();
    if (const uint64_t exchange = std::exchange(connection.exchange, 0))
        handler->on_closed(exchange);
    HttpReply reply =
        handler->on_error(connection.active->parser.message, status, code, reason);
    reply.close = true;
    send(connection, std::move(reply));
}

// Writing.

std::string HttpServer::State::render(const HttpConnection& connection, const HttpReply& reply,
                                      bool close) {
    const int64_t second = unix_time_ms() / 1000;
    if (second != date_second) date = http_date(date_second = second);
    std::string out;
    http_append(&out, {"HTTP/1.1 ", std::to_string(reply.status), " ", http_phrase(reply.status),
                       "\r\nDate: ", date, "\r\n"});
    if (reply.status != 204)  // must not have one (RFC 9110, section 8.6)
        http_append(&out, {"Content-Length: ", std::to_string(reply.body.size()), "\r\n"});
    if (close) out += "Connection: close\r\n";
    else if (connection.http_1_0) out += "Connection: keep-alive\r\n";
    http_append_fields(&out, reply.headers);
    return out += "\r\n";
}

void HttpServer::State::send(HttpConnection& connection, HttpReply reply) {
    connection.exchange = 0;
    release_body(connection);
    HttpActive& active = *connection.active;
    active.parser.reset();
    connection.keep_alive &= !reply.close && drain_until == http_never;
    active.head = render(connection, reply, !connection.keep_alive);
    const bool bodiless = connection.head_only || reply.status == 204 || reply.status == 304;
    active.body = bodiless ? std::string() : std::move(reply.body);
    active.sent = 0;
    active.blocked = false;
    enter(connection, HttpPhase::reply);
    flush(connection);
}

void HttpServer::State::flush(HttpConnection& connection) {
    HttpActive& active = *connection.active;
    const std::string_view head = active.head, body = active.body;
    const std::string_view first = head.substr(std::min(active.sent, head.size()));
    const size_t from = active.sent - (head.size() - first.size());
    const IoResult sent = connection.socket.write(first, body.substr(from, http_write_bytes));
    if (sent.status == IoStatus::closed) return drop(connection);
    active.sent += sent.bytes;
    if (active.sent == head.size() + body.size()) return finish(connection);
    active.blocked = true;
    if (sent.bytes > 0) return enter(connection, HttpPhase::reply);
    watch(connection);
}

void HttpServer::State::finish(HttpConnection& connection) {
    if (connection.peer_closed) return drop(connection);
    if (!connection.keep_alive || drain_until != http_never) {
        connection.socket.shutdown_write();
        return enter(connection, HttpPhase::linger);
    }
    if (connection.active->input.empty()) return enter(connection, HttpPhase::idle);
    connection.active->head.clear();
    connection.active->body.clear();
    enter(connection, HttpPhase::queued);
    queue.push_back(connection.id);
}

// -- the client -------------------------------------------------------------------------------

namespace {

Result<std::string> http_render_call(const HttpCall& call, const NetAddress& address) {
    const auto refuse = [](const char* what) {
        return make_error(ErrorKind::invalid_request, what);
    };
    if (!http_all(call.method, http_token)) return refuse("the method is not a token");
    if (!http_all(call.target, http_visible)) return refuse("the target holds invalid characters");
    for (const auto& field : call.headers)
        if (!http_field_ok(field)) return refuse("a header field holds invalid characters");
    std::string out;
    http_append(&out, {call.method, " ", call.target, " HTTP/1.1\r\nConnection: close\r\n"});
    if (!find_header(call.headers, "Host"))
        http_append(&out, {"Host: ", address.text(), "\r\n"});
    if (!call.body.empty() || call.method == "POST" || call.method == "PUT")
        http_append(&out, {"Content-Length: ", std::to_string(call.body.size()), "\r\n"});
    http_append_fields(&out, call.headers);
    return out += "\r\n";
}

/// One call in progress: sends while it can, reads all along, because a server may refuse early.
struct HttpExchange {
    HttpExchange(const HttpCall& given, std::string_view rendered, const HttpLimits* limits)
        : call(given), head(rendered), parser(limits, HttpParser::Side::reply) {
        if (call.method == "HEAD") parser.expect_no_body();
    }
    const HttpCall&  call;
    std::string_view head;
    HttpParser       parser;
    size_t           sent      = 0;
    bool             connected = false;

    size_t unsent() const { return head.size() + call.body.size() - sent; }

    Result<void> write(Socket& socket) {
        if (!connected && socket.connected() != IoStatus::done)
            return make_error(ErrorKind::io, "cannot connect: refused or unreachable");
        connected = true;
        const std::string_view first = head.substr(std::min(sent, head.size()));
        const size_t from = sent - (head.size() - first.size());
        const IoResult io = socket.write(first, std::string_view(call.body).substr(from));
        // A server that refuses may stop reading; its reply may be on the way all the same.
        sent = io.status == IoStatus::closed ? head.size() + call.body.size() : sent + io.bytes;
        return {};
    }

    /// complete, more, or fault.
    HttpParser::Event read(Socket& socket) {
        char bytes[16 << 10];
        const IoResult io = socket.read(bytes, sizeof bytes);
        if (io.status == IoStatus::again) return HttpParser::Event::more;
        if (io.status != IoStatus::done) return parser.end();
        std::string_view rest(bytes, io.bytes);
        for (;;) {
            size_t used = 0;
            const HttpParser::Event event = parser.feed(rest, &used);
            rest.remove_prefix(used);
            if (event != HttpParser::Event::head) return event;
            if (parser.status() / 100 == 1) skip_interim();
        }
    }

    void skip_interim() {
        parser.reset();
        if (call.method == "HEAD") parser.expect_no_body();
    }
};

}  // namespace
}  // namespace detail

Result<HttpReply> http_call(const HttpCall& call) {
    using namespace detail;
    auto address = NetAddress::parse(call.host, call.port);
    if (!address) return address.error();
    auto head = http_render_call(call, *address);
    if (!head) return head.error();
    const uint64_t deadline = http_now_ms() + static_cast<uint64_t>(std::max(call.timeout_ms, 0));
    auto socket = Socket::connect(*address);
    if (!socket) return socket.error();
    auto poller = Poller::open();
    if (!poller) return poller.error();

    HttpLimits limits;
    limits.max_head_bytes = 64 << 10;
    limits.max_body_bytes = call.max_reply_bytes;
    HttpExchange exchange(call, *head, &limits);
    std::vector<PollEvent> events;
    for (;;) {
        const uint64_t now = http_now_ms();
        if (now >= deadline)
            return make_error(ErrorKind::timeout, "no complete reply from " + address->text());
        const unsigned interest = exchange.unsent() > 0 ? poll_write | poll_read : poll_read;
        auto watched = poller->set(*socket, 1, exchange.connected ? interest : poll_write);
        if (!watched) return watched.error();
        const int wait_ms = static_cast<int>(std::min<uint64_t>(deadline - now, 60'000));
        auto waited = poller->wait(wait_ms, &events);
        if (!waited) return waited.error();
        if (events.empty()) continue;
        if (exchange.unsent() > 0 && (events[0].writable || !exchange.connected)) {
            auto written = exchange.write(*socket);
            if (!written) return make_error(ErrorKind::io, "cannot connect to " + address->text());
        }
        if (!events[0].readable) continue;
        switch (exchange.read(*socket)) {
        case HttpParser::Event::complete: {
            HttpRequest& message = exchange.parser.message;
            return HttpReply{exchange.parser.status(), std::move(message.headers),
                             std::move(message.body), true};
        }
        case HttpParser::Event::fault:
            return make_error(
                exchange.parser.status() == 413 ? ErrorKind::too_large : ErrorKind::bad_data,
                "reply from " + address->text() + ": " + std::string(exchange.parser.reason()));
        default: break;
        }
    }
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

// >>store
// MemoryStore: a map; each organisation's records in order of arrival; the terminal ones in the
// order in which they ended.
#ifndef VALAR_NO_STORE

namespace valar {
inline namespace v1 {

namespace {
constexpr uint64_t store_bookkeeping_bytes = 600;  // of one record: map nodes, queue entry, strings
}

struct MemoryStore::State {
    struct Entry {
        StoredResponse record;
        uint64_t serial = 0;  // of arrival
        bool     erased = false;
    };

    MemoryStoreOptions options;
    mutable std::mutex mutex;
    uint64_t           bytes  = 0;
    uint64_t           serial = 0;
    std::unordered_map<std::string, Entry> records;
    std::map<std::pair<std::string, uint64_t>, std::string> arrivals;      // of an organisation: id
    std::map<std::pair<std::string, std::string>, std::string> reserved;  // of an organisation: id
    std::deque<std::pair<int64_t, std::string>> ended;  // time and id; dropped ones may linger

    static uint64_t cost(const Entry& entry) {
        const StoredResponse& record = entry.record;
        uint64_t sum = store_bookkeeping_bytes + 2 * record.id.size() +
                       record.organisation.size() + 2 * record.reservation.size();
        for (const auto& text : {record.head, record.request, record.object})
            sum += text ? text->size() : 0;
        return sum;
    }
    Entry* find(const std::string& id) {
        const auto found = records.find(id);
        return found == records.end() || found->second.erased ? nullptr : &found->second;
    }
    void end(Entry& entry, int64_t now_ms) {
        entry.record.terminal = true;
        entry.record.ended_at_ms = now_ms;
        ended.emplace_back(now_ms, entry.record.id);
    }
    void drop(const std::string& id) {
        const auto found = records.find(id);
        if (found == records.end()) return;
        const StoredResponse& record = found->second.record;
        bytes -= cost(found->second);
        arrivals.erase({record.organisation, found->second.serial});
        if (!record.reservation.empty()) reserved.erase({record.organisation, record.reservation});
        records.erase(found);
    }
    void drop_oldest() {
        drop(ended.front().second);
        ended.pop_front();
    }
    Result<void> add(StoredResponse record);
    Result<void> erase(const std::string& organisation, const std::string& id, bool tombstone,
                       int64_t now_ms);
    /// Changes a record that is not terminal.
    template <class Change>
    void update(const std::string& id, const StoreDone& done, Change change) {
        Result<void> result;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            Entry* entry = find(id);
            if (!entry || entry->record.terminal) {
                result = detail::make_error(ErrorKind::not_found,
                                            "no unfinished response has this id");
            } else {
                bytes -= cost(*entry);
                change(*entry);
                bytes += cost(*entry);
            }
        }
        done.call(done.context, std::move(result));
    }
};

MemoryStore::MemoryStore(const MemoryStoreOptions& options) : state_(std::make_unique<State>()) {
    state_->options = options;
}
MemoryStore::~MemoryStore() = default;

Result<void> MemoryStore::State::add(StoredResponse record) {
    Entry entry{std::move(record), ++serial};
    const StoredResponse& added = entry.record;
    if (!added.reservation.empty() && reserved.count({added.organisation, added.reservation}))
        return detail::make_error(ErrorKind::idempotency, "the idempotency key is taken");
    if (records.count(added.id))
        return detail::make_error(ErrorKind::internal, "a response id was used twice");
    while (bytes + cost(entry) > options.max_bytes && !ended.empty()) drop_oldest();
    if (bytes + cost(entry) > options.max_bytes)
        return detail::make_error(ErrorKind::overloaded, "the store of responses is full");
    bytes += cost(entry);
    arrivals.emplace(std::pair(added.organisation, entry.serial), added.id);
    if (!added.reservation.empty())
        reserved.emplace(std::pair(added.organisation, added.reservation), added.id);
    std::string id = added.id;
    records.emplace(std::move(id), std::move(entry));
    return {};
}

void MemoryStore::add(StoredResponse record, StoreDone done) {
    Result<void> result;
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        result = state_->add(std::move(record));
    }
    done.call(done.context, std::move(result));
}

void MemoryStore::begin(const std::string& id, uint32_t attempts, StoreDone done) {
    state_->update(id, done, [&](State::Entry& entry) { entry.record.attempts = attempts; });
}

void MemoryStore::finish(const std::string& id, std::shared_ptr<const std::string> object,
                         int64_t now_ms, StoreDone done) {
    state_->update(id, done, [&](State::Entry& entry) {
        entry.record.object = std::move(object);
        state_->end(entry, now_ms);
    });
    // What was worked for is kept, even where it alone is more than the limit.
    const std::lock_guard<std::mutex> lock(state_->mutex);
    while (state_->bytes > state_->options.max_bytes && state_->ended.size() > 1)
        state_->drop_oldest();
}

/// A tombstone is a record without texts.
Result<void> MemoryStore::State::erase(const std::string& organisation, const std::string& id,
                                       bool tombstone, int64_t now_ms) {
    Entry* entry = find(id);
    if (!entry || entry->record.organisation != organisation)
        return detail::make_error(ErrorKind::not_found, "no response has this id");
    if (!tombstone || entry->record.reservation.empty()) {
        drop(id);
        return {};
    }
    bytes -= cost(*entry);
    if (!entry->record.terminal) end(*entry, now_ms);
    entry->erased = true;
    entry->record.head = entry->record.request = entry->record.object = nullptr;
    arrivals.erase({organisation, entry->serial});
    bytes += cost(*entry);
    return {};
}

void MemoryStore::erase(const std::string& organisation, const std::string& id, bool tombstone,
                        int64_t now_ms, StoreDone done) {
    Result<void> result;
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        result = state_->erase(organisation, id, tombstone, now_ms);
    }
    done.call(done.context, std::move(result));
}

std::optional<StoredResponse> MemoryStore::find(std::string_view organisation,
                                                const std::string& id) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    const State::Entry* entry = state_->find(id);
    if (!entry || entry->record.organisation != organisation) return std::nullopt;
    return entry->record;
}

std::optional<Reservation> MemoryStore::reserved(const std::string& organisation,
                                                 const std::string& reservation) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    const auto found = state_->reserved.find({organisation, reservation});
    if (found == state_->reserved.end()) return std::nullopt;
    const State::Entry& entry = state_->records.find(found->second)->second;
    return Reservation{found->second, entry.record.fingerprint, entry.erased};
}

Result<std::vector<std::string>> MemoryStore::list(const std::string& organisation,
                                                   const std::string& after, size_t limit) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    uint64_t before = UINT64_MAX;
    if (!after.empty()) {
        const State::Entry* entry = state_->find(after);
        if (!entry || entry->record.organisation != organisation)
            return detail::make_error(ErrorKind::not_found, "no response has this id");
        before = entry->serial;
    }
    std::vector<std::string> ids;
    auto at = state_->arrivals.lower_bound({organisation, before});
    while (ids.size() < limit && at != state_->arrivals.begin()) {
        if ((--at)->first.first != organisation) break;
        ids.push_back(at->second);
    }
    return ids;
}

std::vector<StoredResponse> MemoryStore::unfinished() {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    std::vector<StoredResponse> found;
    for (const auto& [id, entry] : state_->records) {
        if (entry.record.terminal) continue;
        found.push_back(entry.record);
        found.back().head = found.back().request = nullptr;
    }
    return found;
}

void MemoryStore::expire(int64_t now_ms) {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    const int64_t before = now_ms - state_->options.retention_s * 1000;
    while (!state_->ended.empty() && state_->ended.front().first <= before) state_->drop_oldest();
}

uint64_t MemoryStore::bytes() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    return state_->bytes;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE

// >>server
// The loop thread owns exchanges and live responses; a job carries work to a worker or a change to
// the store, and the result back. A request: on_head (who, where) -> accept (a worker: parse,
// validate, prepare; the loop: is there room; the store: keep it) -> submit -> events -> finish (a
// worker renders, the store keeps it) -> reply. All who want one response wait for the same record.
#ifndef VALAR_NO_SERVER

namespace valar {
inline namespace v1 {
namespace detail {

struct ServerKey {
    Hash256     hash;  // of the secret
    std::string id, organisation;
    uint32_t    per_minute = 0;
    double      tokens     = 0;  // requests that it may make now
    uint64_t    filled_ns  = 0;  // when that was so
};

namespace {

constexpr size_t   server_workers             = 2;
constexpr uint32_t server_tick_ms             = 100;    // how exact sync_timeout_ms is
constexpr uint64_t server_get_body_bytes      = 4096;   // tolerated, and not read
constexpr int64_t  server_expire_every_ms     = 60'000;
constexpr size_t   server_min_secret          = 16;
constexpr size_t   server_shown_bytes         = 200;    // of a path in a log line or message
constexpr int      server_client_left         = 499;    // in the log only, as nginx has it
constexpr uint32_t server_max_retry_s         = 60;     // advised to a client
constexpr size_t   server_max_key_length      = 255;    // of an idempotency key
constexpr size_t   server_list_default = 20, server_list_most = 100;
constexpr size_t   server_max_turns           = 1000;   // of a chain of previous responses
constexpr uint32_t server_max_attempts        = 2;      // to answer one request, after crashes
constexpr size_t   server_recovering          = 16;     // taken up again at a time
constexpr uint64_t server_max_key_file        = 16 << 20;

// ---- Words -----------------------------------------------------------------------------------

std::string server_lower(std::string_view text) {
    std::string out(text);
    for (char& c : out)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 'a' - 'A');
    return out;
}

std::string_view server_trim(std::string_view text) {
    while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
    while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
    return text;
}

/// Of what a client sent, for a log line: one word, no control characters, not endless.
std::string server_printable(std::string_view text) {
    std::string out;
    for (const char c : text.substr(0, server_shown_bytes)) {
        const bool plain = c > ' ' && c < 0x7f && c != '"' && c != '\\';
        out += plain ? std::string(1, c) : format("\\x%02x", static_cast<unsigned char>(c));
    }
    return text.size() > server_shown_bytes ? out + "..." : out;
}

/// "%2F" is "/". Nothing when a percent sign is not followed by two hex digits.
std::optional<std::string> server_unescape(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '%') {
            out += text[i];
            continue;
        }
        auto byte = hex_decode(text.substr(i + 1, 2));
        if (!byte || byte->size() != 1) return std::nullopt;
        out += *byte;
        i += 2;
    }
    return out;
}

/// "resp_" and 24 of [0-9a-z]: 124 bits.
Result<std::string> server_new_id(std::string id) {
    const size_t size = id.size() + 24;
    while (id.size() < size) {
        uint8_t random[32];
        if (auto drawn = random_bytes(random, sizeof random); !drawn) return drawn.error();
        for (const uint8_t byte : random)  // 252 = 7 * 36: no character is likelier than another
            if (byte < 252 && id.size() < size)
                id += "0123456789abcdefghijklmnopqrstuvwxyz"[byte % 36];
    }
    return id;
}

/// A UUID of version 4 (RFC 9562). It only tells requests apart: zeros without a random source.
std::string server_uuid() {
    uint8_t bytes[16] = {};
    (void)random_bytes(bytes, sizeof bytes).ok();
    bytes[6] = static_cast<uint8_t>((bytes[6] & 0x0f) | 0x40);
    bytes[8] = static_cast<uint8_t>((bytes[8] & 0x3f) | 0x80);
    std::string hex = hex_encode(bytes, sizeof bytes);
    for (const size_t at : {20u, 16u, 12u, 8u}) hex.insert(at, 1, '-');
    return hex;
}

Error server_not_found(std::string message) {
    return make_error(ErrorKind::not_found, std::move(message), "not_found");
}

Error server_no_model(std::string_view model) {
    const size_t shown = std::min(model.size(), server_shown_bytes);
    return make_error(ErrorKind::not_found,
                      "no model '" + utf8_repair(model.substr(0, shown)) +
                          "' is loaded; GET /v1/models lists those that are",
                      "model_not_found", "model");
}

Error server_overloaded(std::string message) {
    return make_error(ErrorKind::overloaded, std::move(message), "overloaded");
}

// ---- Options ---------------------------------------------------------------------------------

Error server_option(const char* name, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), "invalid_value", name);
}

bool server_visible(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

Result<Hash256> server_secret_hash(const ApiKey& key) {
    const auto refused = [&](const char* what) {
        return server_option("keys", "key '" + key.id + "': " + what);
    };
    if (key.secret_sha256.empty()) {
        if (key.secret.size() >= server_min_secret && server_visible(key.secret))
            return sha256(key.secret);
        return refused("the secret must be 16 visible ASCII characters or more");
    }
    auto bytes = hex_decode(key.secret_sha256);
    Hash256 hash;
    if (!bytes || bytes->size() != sizeof hash.bytes || !key.secret.empty())
        return refused("secret_sha256 must be 64 hex digits, and there is no secret beside it");
    std::memcpy(hash.bytes, bytes->data(), sizeof hash.bytes);
    return hash;
}

/// Sorted by hash.
Result<std::vector<ServerKey>> server_keys(const std::vector<ApiKey>& given) {
    std::vector<ServerKey> keys;
    for (const ApiKey& key : given) {
        if (!server_visible(key.id))
            return server_option("keys", "the id of a key must be visible ASCII characters");
        auto hash = server_secret_hash(key);
        if (!hash) return hash.error();
        keys.push_back({*hash, key.id, key.organisation, key.requests_per_minute,
                        static_cast<double>(key.requests_per_minute), monotonic_ns()});
    }
    const auto before = [](const ServerKey& a, const ServerKey& b) {
        return a.hash.view() < b.hash.view();
    };
    std::sort(keys.begin(), keys.end(), before);
    for (size_t i = 1; i < keys.size(); ++i)
        if (keys[i].hash == keys[i - 1].hash)
            return server_option("keys", "keys '" + keys[i - 1].id + "' and '" + keys[i].id +
                                             "' have the same secret");
    return keys;
}

Result<void> server_check_options(const ServerOptions& options) {
    auto address = NetAddress::parse(options.host, options.port);
    if (!address) return address.error();
    if (options.keys.empty() && !options.allow_open && !address->is_loopback())
        return server_option("host",
                             "without keys a server only listens on a loopback address, and '" +
                                 options.host +
                                 "' is none: pass keys, or allow_open to let anybody in");
    for (const std::string& origin : options.cors_origins) {
        const size_t host = origin.find("://");
        if (host == origin.npos || origin.find('/', host + 3) != origin.npos)
            return server_option("cors_origins",
                                 "'" + origin + "' is not an origin (\"https://example.org\")");
    }
    return {};
}

HttpOptions server_http_options(const ServerOptions& options) {
    HttpOptions http;
    http.host = options.host;
    http.port = options.port;
    http.limits.max_body_bytes = options.max_body_bytes;
    http.max_connections = options.max_connections;
    http.max_inflight_body_bytes = options.max_inflight_body_bytes;
    http.drain_timeout_ms = options.drain_timeout_ms;
    http.tick_ms = server_tick_ms;
    return http;
}

}  // namespace

// ---- The loop's state --------------------------------------------------------------------------

struct ServerLoop : HttpHandler {
    struct Exchange;
    using Handle = void (ServerLoop::*)(Exchange&, HttpRequest&);

    struct Route {
        std::string_view path;         // ending in '/': an argument follows
        std::string_view suffix = {};  // behind the argument
        Handle get = nullptr, post = nullptr, remove = nullptr;
        bool   slashes = false;        // in the argument
        bool   open    = false;        // needs no key
        std::string allowed() const;   // the header Allow
    };
    static const Route routes[];

    /// A request that is not answered yet.
    struct Exchange {
        uint64_t         number = 0;  // in http
        std::string      request_id, method, path, argument, query;
        std::string      organisation = "default";
        std::string      key_id       = "open";
        std::string      cors_origin;  // to be named in the reply
        ServerKey*       key        = nullptr;
        const Route*     route      = nullptr;
        Handle           handle     = nullptr;
        uint64_t         started_ns = 0;
        std::string      response_id;          // that it asks for or waits for
        bool             keyed      = false;   // an idempotency key came with it
        bool             replayed   = false;
        bool             removes    = false;   // waits for the end, then for the record to go
        Usage            usage      = {};      // for the log line
        Timings          timings    = {};
    };

    /// A response that is not terminal.
    struct Live {
        enum class State : uint8_t {
            reserving,  // not kept yet
            waiting,    // kept, not submitted: after a restart
            working,    // a Responder has it
            finishing,  // the outcome is there and is being kept
            parked,     // left for the next start
        };
        State       state = State::reserving;
        std::string organisation;
        bool        running    = false;
        bool        background = false;
        bool        resumable  = false;  // is taken up again after a crash
        uint32_t    attempts   = 1;      // as the store has it
        bool        begun      = true;   // the last of them is this process's
        uint64_t    owner      = 0;      // the exchange whose end cancels it; 0: none
        Responder*  responder  = nullptr;
        std::vector<uint64_t> waiters;   // exchanges that want the terminal object
        std::optional<StoredResponse> unkept = {};  // the record, when `store` is false
    };

    /// Work for a worker, or a change for the store, and what comes back.
    struct Job {
        using Step = void (ServerLoop::*)(std::unique_ptr<Job>);
        ServerLoop*    loop = nullptr;
        void (ServerLoop::*work)(Job&) = nullptr;  // on a worker
        Step           next      = nullptr;        // then on the loop
        uint64_t       exchange  = 0;
        int            status    = 200;    // to answer with
        std::string    text      = {};     // a request's body; then the bytes to answer
        std::string    key       = {};     // accept: the idempotency key's header
        int            keys      = 0;      // and how many of them came
        std::string    key_id    = {};
        std::string    query     = {};
        bool           running   = false;  // how far a live response is
        bool           only_background = false;
        bool           store     = true;
        bool           more      = false;  // list: there are older ones
        std::vector<std::pair<std::string, bool>> ids = {};  // list: each with `running`
        StoredResponse stored    = {};
        std::optional<Reservation>     replay  = {};
        std::shared_ptr<const Outcome> outcome = {};
        Responder*     responder = nullptr;
        std::unique_ptr<Prepared> prepared = {};
        std::optional<Error>      error    = {};
    };
    using JobPtr = std::unique_ptr<Job>;

    ServerOptions           options;  // without secrets
    std::vector<ServerKey>  keys;
    std::vector<Responder*> responders;
    std::unique_ptr<Store>  own_store;
    Store*                  store = nullptr;
    std::optional<HttpServer> http;

    // of the loop thread
    std::unordered_map<uint64_t, Exchange> exchanges;
    std::unordered_map<std::string, Live>  live;
    std::deque<std::pair<uint64_t, uint64_t>> timeouts;  // of waiting exchanges, soonest first
    std::deque<std::string> recoverable;    // waiting, oldest first
    std::vector<JobPtr>     unsaved;        // outcomes that the store had no room for
    size_t   recovering     = 0;            // of them, on their way
    size_t   finishing      = 0;
    size_t   queued         = 0;            // live and not running
    double   finish_gap_s   = 1;            // between two ends, on average
    uint64_t last_finish_ns = 0;
    int64_t  next_expiry_ms = 0;
    bool     drain_begun    = false;
    bool     listening      = false;        // to the Responders
    std::map<std::pair<std::string, int>, uint64_t> answered;  // by route and status
    double   answer_seconds = 0;
    uint64_t replayed       = 0;

    std::atomic<bool>     stopping = false;
    std::atomic<uint32_t> storing  = 0;  // changes under way

    std::mutex              jobs_mutex;
    std::condition_variable jobs_waiting;
    std::deque<JobPtr>      jobs;
    bool                    ending = false;
    Thread                  workers[server_workers];

    std::mutex               inbox_mutex;
    std::vector<JobPtr>      inbox_jobs;
    std::vector<std::string> inbox_ready;  // ids with events
    std::atomic<uint32_t>    inbox_count = 0;  // ever put in

    ~ServerLoop() override;
    Result<void> start();
    bool step(int timeout_ms);

    // http's calls
    std::optional<HttpReply> on_head(HttpRequest& request) override;
    void on_request(HttpRequest&& request) override;
    void on_closed(uint64_t number) override;
    HttpReply on_error(const HttpRequest& request, int status, std::string_view code,
                       std::string_view message) override;
    void on_tick() override;

    // checks of a head, in the contract's order
    void find_route(Exchange& exchange);
    Result<void> check_host(const HttpRequest& request, Exchange& exchange);
    Result<void> check_origin(const HttpRequest& request, Exchange& exchange);
    Result<void> check_key(const HttpRequest& request, Exchange& exchange);
    Result<void> check_route(const HttpRequest& request, Exchange& exchange);
    Result<void> check_method(const HttpRequest& request, Exchange& exchange);
    Result<void> check_size(const HttpRequest& request, Exchange& exchange);
    Result<void> check_rate(const HttpRequest& request, Exchange& exchange);
    Result<void> check_type(const HttpRequest& request, Exchange& exchange);

    uint64_t body_limit(const HttpRequest& request) const {
        return request.method == "POST" ? options.max_body_bytes : server_get_body_bytes;
    }

    // routes
    void get_health(Exchange& exchange, HttpRequest& request);
    void get_metrics(Exchange& exchange, HttpRequest& request);
    void get_models(Exchange& exchange, HttpRequest& request);
    void get_model(Exchange& exchange, HttpRequest& request);
    void post_response(Exchange& exchange, HttpRequest& request);
    void get_responses(Exchange& exchange, HttpRequest& request);
    void get_response(Exchange& exchange, HttpRequest& request);
    void delete_response(Exchange& exchange, HttpRequest& request);
    void post_cancel(Exchange& exchange, HttpRequest& request);
    void get_input_items(Exchange& exchange, HttpRequest& request);

    // replies
    HttpReply make_reply(const Exchange& exchange, int status, std::string body,
                         HttpHeaders headers = {});
    HttpReply make_error_reply(const Exchange& exchange, const Error& error,
                               HttpHeaders headers = {});
    HttpReply make_preflight_reply(const Exchange& exchange, const HttpRequest& request);
    void answer(Exchange& exchange, HttpReply reply);
    void answer(Exchange& exchange, int status, std::string body);
    void refuse(Exchange& exchange, const Error& error, HttpHeaders headers = {});
    void log_exchange(const Exchange& exchange, int status);
    uint32_t retry_after_s() const;
    std::string metrics_text() const;

    // jobs
    JobPtr make_job(const Exchange& exchange, Job::Step next);
    void send_job(JobPtr job, void (ServerLoop::*work)(Job&), Job::Step next);
    StoreDone on_kept(JobPtr job, Job::Step next);
    void run_jobs();
    static void on_ready(void* context, const std::string& id);
    template <class Add> void send_to_loop(Add add);
    void take_inbox();
    Exchange* find_exchange(uint64_t number);
    void answer_job(JobPtr job);

    // accepting
    Responder* find_responder(const std::string& model) const;
    Result<Request> read_request(const Job& job, const std::string& text) const;
    Result<void> add_previous(const std::string& organisation, Request* request, Json body) const;
    Result<void> read_key(Job& job, const Json& body, const Request& request) const;
    Result<void> accept(Job& job);
    void accept_work(Job& job);
    void accept_admit(JobPtr job);
    void accept_done(JobPtr job);
    void replay(Exchange& exchange, const Reservation& reservation);
    void take_back(const std::string& id, JobPtr job, Error error);
    void wait_for(Exchange& exchange, const std::string& id, Live& entry);
    void begin(JobPtr job);

    // working and finishing
    void take_events(const std::string& id);
    void cancel(const std::string& id, Live& entry);
    void park(const std::string& id, Live& entry);
    void finish(const std::string& id, Live& entry, std::shared_ptr<const Outcome> outcome);
    void finish_work(Job& job);
    void finish_keep(JobPtr job);
    void finish_done(JobPtr job);
    void remove(Exchange& exchange, const std::string& id);
    void remove_done(JobPtr job);

    // after a restart
    void recover_all();
    void recover_some();
    void recover_work(Job& job);
    void recover_keep(JobPtr job);
    void recover_done(JobPtr job);

    // reading
    void show(Exchange& exchange, const std::string& id, int unfinished_status,
              bool only_background = false);
    void show_work(Job& job);
    void list_work(Job& job);
    void items_work(Job& job);
    std::string render_live(const StoredResponse& stored, bool running) const;
};

const ServerLoop::Route ServerLoop::routes[] = {
    {.path = "/health", .get = &ServerLoop::get_health, .open = true},
    {.path = "/metrics", .get = &ServerLoop::get_metrics},
    {.path = "/v1/models", .get = &ServerLoop::get_models},
    {.path = "/v1/models/", .get = &ServerLoop::get_model, .slashes = true},
    {.path = "/v1/responses", .get = &ServerLoop::get_responses,
     .post = &ServerLoop::post_response},
    {.path = "/v1/responses/", .get = &ServerLoop::get_response,
     .remove = &ServerLoop::delete_response},
    {.path = "/v1/responses/", .suffix = "/cancel", .post = &ServerLoop::post_cancel},
    {.path = "/v1/responses/", .suffix = "/input_items", .get = &ServerLoop::get_input_items},
};

std::string ServerLoop::Route::allowed() const {
    std::string all;
    for (const auto& [handler, methods] : {std::pair(get, "GET, HEAD"), std::pair(post, "POST"),
                                           std::pair(remove, "DELETE")})
        if (handler) all.append(all.empty() ? "" : ", ").append(methods);
    return all;
}

ServerLoop::~ServerLoop() {
    if (listening)
        for (Responder* responder : responders) responder->on_ready(nullptr, nullptr);
    {
        const std::lock_guard<std::mutex> lock(jobs_mutex);
        ending = true;
    }
    jobs_waiting.notify_all();
    for (Thread& worker : workers) worker.join();
    for (auto& [id, entry] : live) {
        park(id, entry);
        while (entry.responder && entry.responder->poll(id)) {
        }
    }
    while (const uint32_t left = storing) wait_on(&storing, left, 1'000'000);
}

Result<void> ServerLoop::start() {
    auto opened = HttpServer::open(server_http_options(options), this);
    if (!opened) return opened.error();
    http.emplace(std::move(*opened));
    for (Thread& worker : workers) {
        const auto run = [](void* self) { static_cast<ServerLoop*>(self)->run_jobs(); };
        auto started = Thread::start(run, this, "valar worker");
        if (!started) return started.error();
        worker = std::move(*started);
    }
    for (Responder* responder : responders) responder->on_ready(&ServerLoop::on_ready, this);
    listening = true;
    recover_all();
    return {};
}

bool ServerLoop::step(int timeout_ms) {
    const bool more = http->step(timeout_ms);
    if (stopping && !std::exchange(drain_begun, true))
        for (auto& [id, entry] : live)  // nobody is there to be answered
            if (entry.waiters.empty()) park(id, entry);
    if (more || finishing == 0) return more;
    // http is done and takes no more calls; what has an outcome is still to be kept.
    const uint32_t seen = inbox_count;
    take_inbox();
    if (finishing > 0) wait_on(&inbox_count, seen, 10'000'000);
    return true;
}

// ---- Who may ask, and for what ---------------------------------------------------------------

/// Fills in what the target says.
void ServerLoop::find_route(Exchange& exchange) {
    const std::string_view path = exchange.path;
    for (const Route& route : routes) {
        const bool prefix = path.substr(0, route.path.size()) == route.path;
        if (!prefix || path.size() < route.path.size() + route.suffix.size()) continue;
        const size_t end = path.size() - route.suffix.size();
        if (path.substr(end) != route.suffix) continue;
        auto argument = server_unescape(path.substr(route.path.size(), end - route.path.size()));
        if (!argument || argument->empty() == (route.path.back() == '/')) continue;
        if (!route.slashes && argument->find('/') != argument->npos) continue;
        exchange.argument = std::move(*argument);
        exchange.route = &route;
    }
}

std::optional<HttpReply> ServerLoop::on_head(HttpRequest& request) {
    Exchange exchange;
    exchange.number = request.exchange;
    exchange.request_id = server_uuid();
    exchange.method = request.method;
    const size_t mark = std::min(request.target.find('?'), request.target.size());
    exchange.path = request.target.substr(0, mark);
    exchange.query = request.target.substr(std::min(mark + 1, request.target.size()));
    exchange.started_ns = monotonic_ns();
    find_route(exchange);

    using Check = Result<void> (ServerLoop::*)(const HttpRequest&, Exchange&);
    static constexpr Check first[] = {&ServerLoop::check_host, &ServerLoop::check_origin};
    static constexpr Check then[] = {&ServerLoop::check_key, &ServerLoop::check_route,
                                     &ServerLoop::check_method, &ServerLoop::check_size,
                                     &ServerLoop::check_rate, &ServerLoop::check_type};
    const auto run = [&](std::span<const Check> checks) -> std::optional<HttpReply> {
        for (const Check check : checks)
            if (auto checked = (this->*check)(request, exchange); !checked)
                return make_error_reply(exchange, checked.error());
        return std::nullopt;
    };
    std::optional<HttpReply> reply = run(first);
    if (!reply && request.method == "OPTIONS" && !exchange.cors_origin.empty() &&
        request.header("Access-Control-Request-Method"))
        reply = make_preflight_reply(exchange, request);  // carries no key
    if (!reply) reply = run(then);
    if (reply) {
        log_exchange(exchange, reply->status);
        return reply;
    }
    request.max_body = body_limit(request);
    exchanges.emplace(request.exchange, std::move(exchange));
    return std::nullopt;
}

/// Without keys only names of this machine: a web page must not reach us through a name of its own
/// that resolves to a loopback address.
Result<void> ServerLoop::check_host(const HttpRequest& request, Exchange&) {
    if (!keys.empty()) return {};
    const std::string& host = request.host;
    const size_t colon = host.rfind(':');
    const bool port = colon != host.npos && host.find(']', colon) == host.npos;
    const std::string_view name = std::string_view(host).substr(0, port ? colon : host.npos);
    for (const std::string_view known : {"localhost", "127.0.0.1", "[::1]"})
        if (name == known) return {};
    for (const std::string& allowed : options.allowed_hosts)
        if (server_lower(allowed) == name || server_lower(allowed) == host) return {};
    return make_error(ErrorKind::permission,
                      "the host '" + server_printable(host) +
                          "' is not allowed; allowed are localhost and allowed_hosts",
                      "host_not_allowed");
}

Result<void> ServerLoop::check_origin(const HttpRequest& request, Exchange& exchange) {
    const std::string* given = request.header("Origin");
    if (!given) return {};
    const bool alone = request.count("Origin") == 1;
    const std::string origin = server_lower(*given);
    for (const std::string& allowed : options.cors_origins)
        if (alone && server_lower(allowed) == origin) {
            exchange.cors_origin = *given;
            return {};
        }
    if (alone && (origin == "http://" + request.host || origin == "https://" + request.host))
        return {};
    return make_error(ErrorKind::permission,
                      "the origin '" + server_printable(*given) + "' is not allowed",
                      "origin_not_allowed");
}

Result<void> ServerLoop::check_key(const HttpRequest& request, Exchange& exchange) {
    if (keys.empty() || (exchange.route && exchange.route->open)) return {};
    std::string_view secret;
    bool given = false;
    const auto refused = [](const char* message) {
        return make_error(ErrorKind::authentication, message, "invalid_api_key");
    };
    for (const auto& [name, value] : request.headers) {
        const std::string field = server_lower(name);
        std::string_view one = value;
        if (field == "authorization") {
            if (server_lower(one.substr(0, 7)) != "bearer ")
                return refused("the header Authorization must be 'Bearer <key>'");
            one = server_trim(one.substr(7));
        } else if (field != "x-api-key") {
            continue;
        }
        if (std::exchange(given, true) && one != secret)
            return refused("two different credentials in one request");
        secret = one;
    }
    if (!request.header("Authorization"))
        return refused("no API key; send the header 'Authorization: Bearer <key>'");
    const Hash256 hash = sha256(secret);
    const auto found = std::lower_bound(
        keys.begin(), keys.end(), hash,
        [](const ServerKey& key, const Hash256& to) { return key.hash.view() < to.view(); });
    if (found == keys.end() || !constant_time_equal(found->hash.view(), hash.view()))
        return refused("unknown API key");
    exchange.organisation = found->organisation;
    exchange.key_id = found->id;
    exchange.key = &*found;
    return {};
}

Result<void> ServerLoop::check_route(const HttpRequest&, Exchange& exchange) {
    if (exchange.route) return {};
    return server_not_found("unknown path '" + server_printable(exchange.path) + "'");
}

Result<void> ServerLoop::check_method(const HttpRequest& request, Exchange& exchange) {
    const Route& route = *exchange.route;
    for (const auto& [method, handle] : {std::pair("GET", route.get), std::pair("HEAD", route.get),
                                         std::pair("POST", route.post),
                                         std::pair("DELETE", route.remove)})
        if (request.method == method) exchange.handle = handle;
    if (exchange.handle) return {};
    return make_error(ErrorKind::method_not_allowed,
                      server_printable(request.method) + " is not allowed here; allowed: " +
                          route.allowed(),
                      "method_not_allowed");
}

Result<void> ServerLoop::check_size(const HttpRequest& request, Exchange&) {
    const uint64_t limit = body_limit(request);
    const uint64_t size = request.content_length.value_or(0);
    if (size <= limit) return {};
    return make_error(ErrorKind::too_large,
                      "the body has " + std::to_string(size) + " bytes; at most " +
                          std::to_string(limit) + " are allowed",
                      "request_too_large");
}

/// A bucket that holds a minute's requests and fills evenly.
Result<void> ServerLoop::check_rate(const HttpRequest&, Exchange& exchange) {
    ServerKey* key = exchange.key;
    if (!key || key->per_minute == 0) return {};
    const uint64_t now_ns = monotonic_ns();
    const double a_second = key->per_minute / 60.0;
    const double passed_s = static_cast<double>(now_ns - key->filled_ns) / 1e9;
    key->tokens = std::min<double>(key->per_minute, key->tokens + passed_s * a_second);
    key->filled_ns = now_ns;
    if (key->tokens >= 1) {
        --key->tokens;
        return {};
    }
    Error error = make_error(ErrorKind::rate_limit,
                             "this key may make " + std::to_string(key->per_minute) +
                                 " requests a minute",
                             "rate_limit_exceeded");
    error.retry_after_s = static_cast<uint32_t>(std::ceil((1 - key->tokens) / a_second));
    return error;
}

/// Also told before a body is asked for, unless its size is still unknown: size comes first.
Result<void> ServerLoop::check_type(const HttpRequest& request, Exchange&) {
    if (request.method != "POST" || (request.chunked && request.body.empty())) return {};
    const auto refused = [](const std::string& given, const char* allowed) {
        return make_error(ErrorKind::unsupported_media,
                          "'" + server_printable(given) + "' is not supported; allowed: " + allowed,
                          "unsupported_media_type");
    };
    for (const auto& [name, value] : request.headers) {
        const std::string field = server_lower(name);
        const std::string_view type = std::string_view(value).substr(0, value.find(';'));
        const std::string kind = server_lower(server_trim(type));
        if (field == "content-type" && kind != "application/json")
            return refused(value, "application/json");
        if (field == "content-encoding" && kind != "identity") return refused(value, "identity");
    }
    return {};
}

// ---- Replies ---------------------------------------------------------------------------------

HttpReply ServerLoop::make_reply(const Exchange& exchange, int status, std::string body,
                                    HttpHeaders headers) {
    HttpReply reply;
    reply.status = status;
    reply.headers = std::move(headers);
    reply.headers.emplace_back("X-Request-ID", exchange.request_id);
    if (!body.empty() && !find_header(reply.headers, "Content-Type"))
        reply.headers.emplace_back("Content-Type", "application/json");
    if (exchange.replayed) reply.headers.emplace_back("Idempotent-Replayed", "true");
    if (!exchange.cors_origin.empty()) {
        reply.headers.emplace_back("Access-Control-Allow-Origin", exchange.cors_origin);
        reply.headers.emplace_back("Access-Control-Expose-Headers",
                                   "X-Request-ID, X-Valar-Response-Id, Retry-After, "
                                   "Idempotent-Replayed");
    }
    if (!options.cors_origins.empty()) reply.headers.emplace_back("Vary", "Origin");
    reply.body = std::move(body);
    return reply;
}

HttpReply ServerLoop::make_error_reply(const Exchange& exchange, const Error& error,
                                          HttpHeaders headers) {
    const int status = http_status(error.kind);
    if (status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
    if (status == 405) headers.emplace_back("Allow", exchange.route->allowed());
    if (status == 503 || status == 429) {
        const uint32_t seconds = error.retry_after_s ? error.retry_after_s : retry_after_s();
        headers.emplace_back("Retry-After", std::to_string(seconds));
    }
    if (status == 500)
        options.log(LogLevel::error, "request " + exchange.request_id + ": " + error.message);
    return make_reply(exchange, status, render_error(error).write(), std::move(headers));
}

HttpReply ServerLoop::make_preflight_reply(const Exchange& exchange, const HttpRequest& request) {
    const std::string* asked = request.header("Access-Control-Request-Headers");
    return make_reply(exchange, 204, {},
                      {{"Access-Control-Allow-Methods", "GET, HEAD, POST, DELETE"},
                       {"Access-Control-Allow-Headers",
                        asked ? *asked : "Authorization, Content-Type, Idempotency-Key"},
                       {"Access-Control-Max-Age", "600"}});
}

/// Ends the exchange.
void ServerLoop::answer(Exchange& exchange, HttpReply reply) {
    const uint64_t number = exchange.number;
    log_exchange(exchange, reply.status);
    http->reply(number, std::move(reply));
    exchanges.erase(number);
}

void ServerLoop::answer(Exchange& exchange, int status, std::string body) {
    answer(exchange, make_reply(exchange, status, std::move(body)));
}

void ServerLoop::refuse(Exchange& exchange, const Error& error, HttpHeaders headers) {
    answer(exchange, make_error_reply(exchange, error, std::move(headers)));
}

/// When the queue will have moved on, as far as the pace of late tells.
uint32_t ServerLoop::retry_after_s() const {
    const double wait_s = std::ceil(static_cast<double>(queued) * finish_gap_s);
    return static_cast<uint32_t>(std::clamp<double>(wait_s, 1, server_max_retry_s));
}

void ServerLoop::log_exchange(const Exchange& exchange, int status) {
    const double ms = static_cast<double>(monotonic_ns() - exchange.started_ns) / 1e6;
    const Route* route = exchange.route;
    const bool nested = route && !route->suffix.empty();
    const std::string name = route ? std::string(route->path) + (nested ? "*" : "") : "none";
    ++answered[{name + (nested ? std::string(route->suffix) : ""), status}];
    answer_seconds += ms / 1e3;
    if (!options.log.write) return;
    const auto rounded = [](double value) { return std::round(value * 10) / 10; };
    Json line = Json::object();
    line.set("id", exchange.request_id)
        .set("method", server_printable(exchange.method))
        .set("path", server_printable(exchange.path))
        .set("status", status)
        .set("ms", rounded(ms))
        .set("key", exchange.key_id)
        .set("response", server_printable(exchange.response_id))
        .set("replayed", exchange.replayed)
        .set("input_tokens", exchange.usage.input_tokens)
        .set("output_tokens", exchange.usage.output_tokens)
        .set("queue_ms", rounded(static_cast<double>(exchange.timings.queue_us) / 1e3))
        .set("prefill_ms", rounded(static_cast<double>(exchange.timings.prefill_us) / 1e3))
        .set("decode_ms", rounded(static_cast<double>(exchange.timings.decode_us) / 1e3));
    if (options.log_json) return options.log(LogLevel::info, line.write());
    std::string text;
    for (const JsonMember& member : line.members()) {
        text.append(text.empty() ? "" : " ").append(member.key).append("=");
        text += member.value.is_string() ? std::string(member.value.as_string())
                                         : member.value.write();
    }
    options.log(LogLevel::info, text);
}

/// Framing that failed, and limits of http: the request may not even have a path.
HttpReply ServerLoop::on_error(const HttpRequest& request, int status, std::string_view code,
                               std::string_view message) {
    Exchange exchange;
    exchange.request_id = server_uuid();
    exchange.method = request.method.empty() ? "-" : request.method;
    exchange.path = request.target.empty() ? "-" : request.target.substr(0, request.target.find('?'));
    exchange.key_id = "-";
    exchange.started_ns = monotonic_ns();
    const ErrorKind kind = status == 503 ? ErrorKind::overloaded : ErrorKind::invalid_request;
    HttpReply reply = make_error_reply(
        exchange, make_error(kind, std::string(message), std::string(code)));
    reply.status = status;
    log_exchange(exchange, status);
    return reply;
}

// ---- Exchanges -------------------------------------------------------------------------------

void ServerLoop::on_request(HttpRequest&& request) {
    const auto found = exchanges.find(request.exchange);
    if (found == exchanges.end()) return;
    Exchange& exchange = found->second;
    if (request.chunked)  // only now is it known that its size is allowed
        if (auto checked = check_type(request, exchange); !checked)
            return refuse(exchange, checked.error());
    (this->*exchange.handle)(exchange, request);
}

ServerLoop::Exchange* ServerLoop::find_exchange(uint64_t number) {
    const auto found = exchanges.find(number);
    return found == exchanges.end() ? nullptr : &found->second;
}

/// A client that leaves cancels what only it can ask for again.
void ServerLoop::on_closed(uint64_t number) {
    const auto found = exchanges.find(number);
    if (found == exchanges.end()) return;
    log_exchange(found->second, server_client_left);
    const auto entry = live.find(found->second.response_id);
    if (entry != live.end()) {
        std::erase(entry->second.waiters, number);
        if (entry->second.owner == number) cancel(entry->first, entry->second);
    }
    exchanges.erase(found);
}

void ServerLoop::on_tick() {
    const uint64_t now_ns = monotonic_ns();
    while (!timeouts.empty() && timeouts.front().first <= now_ns) {
        Exchange* exchange = find_exchange(timeouts.front().second);
        timeouts.pop_front();
        if (!exchange) continue;
        const std::string id = exchange->response_id;
        const auto entry = live.find(id);
        if (entry == live.end()) continue;  // its end is on the way
        std::erase(entry->second.waiters, exchange->number);
        HttpHeaders headers = {{"X-Valar-Response-Id", id}};
        if (!exchange->keyed) headers.emplace_back("x-should-retry", "false");
        refuse(*exchange,
               make_error(ErrorKind::timeout,
                          "the response was not finished in time; it goes on: GET /v1/responses/" +
                              id,
                          "timeout"),
               std::move(headers));
    }
    recover_some();
    for (JobPtr& job : std::exchange(unsaved, {})) finish_keep(std::move(job));
    const int64_t now_ms = unix_time_ms();
    if (now_ms < next_expiry_ms) return;
    next_expiry_ms = now_ms + server_expire_every_ms;
    store->expire(now_ms);
}

void ServerLoop::get_health(Exchange& exchange, HttpRequest&) {
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (model.ready) return answer(exchange, 200, "{\"status\":\"ok\"}");
    refuse(exchange, server_overloaded("no model is ready yet"));
}

namespace {
Json server_model_json(const ModelInfo& model, const std::string& id) {
    return Json::object()
        .set("id", id)
        .set("object", "model")
        .set("created", model.created)
        .set("owned_by", model.owned_by);
}

bool server_answers_to(const ModelInfo& model, const std::string& id) {
    return model.id == id ||
           std::find(model.aliases.begin(), model.aliases.end(), id) != model.aliases.end();
}
}  // namespace

void ServerLoop::get_models(Exchange& exchange, HttpRequest&) {
    Json data = Json::array();
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models()) {
            data.push(server_model_json(model, model.id));
            for (const std::string& alias : model.aliases)
                data.push(server_model_json(model, alias));
        }
    answer(exchange, 200,
           Json::object().set("object", "list").set("data", std::move(data)).write());
}

void ServerLoop::get_model(Exchange& exchange, HttpRequest&) {
    const std::string id = exchange.argument;
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (server_answers_to(model, id))
                return answer(exchange, 200, server_model_json(model, id).write());
    refuse(exchange, server_no_model(id));
}

// ---- Jobs ------------------------------------------------------------------------------------

ServerLoop::JobPtr ServerLoop::make_job(const Exchange& exchange, Job::Step next) {
    auto job = std::make_unique<Job>();
    job->loop = this;
    job->next = next;
    job->exchange = exchange.number;
    job->key_id = exchange.key_id;
    job->query = exchange.query;
    job->stored.organisation = exchange.organisation;
    return job;
}

void ServerLoop::send_job(JobPtr job, void (ServerLoop::*work)(Job&), Job::Step next) {
    job->work = work;
    job->next = next;
    {
        const std::lock_guard<std::mutex> lock(jobs_mutex);
        jobs.push_back(std::move(job));
    }
    jobs_waiting.notify_one();
}

void ServerLoop::run_jobs() {
    for (;;) {
        JobPtr job;
        {
            std::unique_lock<std::mutex> lock(jobs_mutex);
            jobs_waiting.wait(lock, [&] { return ending || !jobs.empty(); });
            if (ending) return;
            job = std::move(jobs.front());
            jobs.pop_front();
        }
        (this->*job->work)(*job);
        send_to_loop([&] { inbox_jobs.push_back(std::move(job)); });
    }
}

/// What a change of the store ends with: the job comes to the loop, with the store's error if any.
StoreDone ServerLoop::on_kept(JobPtr job, Job::Step next) {
    job->loop = this;
    job->next = next;
    ++storing;
    const auto call = [](void* context, Result<void> result) {
        JobPtr kept(static_cast<Job*>(context));
        ServerLoop* self = kept->loop;
        if (!result) kept->error = std::move(result.error());
        self->send_to_loop([&] { self->inbox_jobs.push_back(std::move(kept)); });
        --self->storing;  // the last touch: the destructor waits for it
    };
    return {call, job.release()};
}

/// From any thread. One call into the loop serves all that gathers until it comes.
template <class Add>
void ServerLoop::send_to_loop(Add add) {
    bool first = false;
    {
        const std::lock_guard<std::mutex> lock(inbox_mutex);
        first = inbox_jobs.empty() && inbox_ready.empty();
        add();
        ++inbox_count;
    }
    wake(&inbox_count);
    if (first) http->post([](void* self) { static_cast<ServerLoop*>(self)->take_inbox(); }, this);
}

void ServerLoop::on_ready(void* context, const std::string& id) {
    auto* self = static_cast<ServerLoop*>(context);
    self->send_to_loop([&] { self->inbox_ready.push_back(id); });
}

void ServerLoop::take_inbox() {
    std::vector<JobPtr> done;
    std::vector<std::string> ready;
    {
        const std::lock_guard<std::mutex> lock(inbox_mutex);
        done.swap(inbox_jobs);
        ready.swap(inbox_ready);
    }
    for (JobPtr& job : done) {
        const Job::Step next = job->next;
        if (next) (this->*next)(std::move(job));
    }
    for (const std::string& id : ready) take_events(id);
}

/// The last step of what only reads.
void ServerLoop::answer_job(JobPtr job) {
    Exchange* exchange = find_exchange(job->exchange);
    if (!exchange) return;
    if (job->error) return refuse(*exchange, *job->error);
    answer(*exchange, job->status, std::move(job->text));
}

// ---- Accepting a request -----------------------------------------------------------------------

namespace {

Error server_no_response(std::string_view id) {
    return server_not_found("no response '" + server_printable(id) + "'");
}

Error server_field(const char* code, const char* param, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, param);
}

/// What acceptance resolved; a response is rendered from it and the request.
std::string server_head(const ResponseRecord& record) {
    return Json::object()
        .set("message_id", record.message_id)
        .set("created_at", record.created_at)
        .set("model", record.model)
        .set("temperature", record.temperature)
        .set("top_p", record.top_p)
        .set("seed", record.seed)
        .write();
}

ResponseRecord server_record(const StoredResponse& stored, Status status) {
    ResponseRecord record;
    const auto head = Json::parse(stored.head ? *stored.head : "");
    auto request = Json::parse(stored.request ? *stored.request : "");
    const Json& known = head ? *head : Json();
    record.id = stored.id;
    record.organisation = stored.organisation;
    record.message_id = known["message_id"].as_string();
    record.created_at = known["created_at"].as_int();
    record.model = known["model"].as_string();
    record.temperature = known["temperature"].as_double();
    record.top_p = known["top_p"].as_double();
    record.seed = known["seed"].as_int();
    record.status = status;
    if (request) record.request = std::move(*request);
    return record;
}

std::shared_ptr<const std::string> server_shared(std::string text) {
    return std::make_shared<const std::string>(std::move(text));
}

}  // namespace

void ServerLoop::post_response(Exchange& exchange, HttpRequest& request) {
    JobPtr job = make_job(exchange, nullptr);
    job->text = std::move(request.body);
    job->keys = static_cast<int>(request.count("Idempotency-Key"));
    if (const std::string* key = request.header("Idempotency-Key")) job->key = *key;
    exchange.keyed = job->keys > 0;
    send_job(std::move(job), &ServerLoop::accept_work, &ServerLoop::accept_admit);
}

Responder* ServerLoop::find_responder(const std::string& wanted) const {
    for (Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (server_answers_to(model, wanted)) return responder;
    return nullptr;
}

/// The idempotency key and the fingerprint of the request under it (contract, section 6).
Result<void> ServerLoop::read_key(Job& job, const Json& body, const Request& request) const {
    if (job.keys == 0) return {};
    const std::string_view key = server_trim(job.key);
    const auto refused = [](const char* code, const char* message) {
        return server_field(code, "Idempotency-Key", message);
    };
    if (job.keys > 1) return refused("invalid_value", "more than one header Idempotency-Key");
    if (key.empty())
        return refused("string_below_min_length", "the header Idempotency-Key is empty");
    if (utf8_count(key) > server_max_key_length)
        return refused("string_above_max_length",
                       "the header Idempotency-Key has more than 255 characters");
    const auto control = [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 0x7f; };
    if (std::any_of(key.begin(), key.end(), control))
        return refused("invalid_value", "the header Idempotency-Key holds control characters");
    if (!request.store)
        return server_field("unsupported_value", "store",
                            "'store' must be true with an idempotency key, but false was received");
    job.stored.reservation = job.key_id + "\n" + std::string(key);
    const Hash256 hash = sha256("/v1/responses\n" + body.canonical());
    job.stored.fingerprint = hash.view();
    return {};
}

/// Puts the turns of a chain of earlier responses before the request's own (openai dialect).
Result<void> ServerLoop::add_previous(const std::string& organisation, Request* request,
                                      Json body) const {
    std::vector<StoredResponse> turns;  // newest first
    const auto refused = [](const std::string& message) {
        return server_field("previous_response_not_found", "previous_response_id", message);
    };
    std::string id = request->previous_response_id;
    for (uint64_t bytes = 0; !id.empty();) {
        auto turn = store->find(organisation, id);
        if (!turn) return refused("no previous response '" + server_printable(id) + "'");
        if (!turn->terminal)
            return refused("the previous response '" + id + "' is not finished yet");
        bytes += turn->request->size() + turn->object->size();
        if (turns.size() == server_max_turns || bytes > options.max_body_bytes)
            return refused("the chain of previous responses is too long");
        auto asked = Json::parse(*turn->request);
        if (!asked) return asked.error();
        id = (*asked)["previous_response_id"].as_string();
        turns.push_back(std::move(*turn));
    }
    Json items = Json::array();
    for (auto turn = turns.rbegin(); turn != turns.rend(); ++turn) {
        auto asked = Json::parse(*turn->request), object = Json::parse(*turn->object);
        if (!asked || !object) return asked ? object.error() : asked.error();
        for (Json& item : render_input_items(*asked, turn->id)) items.push(std::move(item));
        for (const Json& item : (*object)["output"].items()) items.push(item);
    }
    for (Json& item : render_input_items(body, "")) items.push(std::move(item));
    body.set("input", std::move(items));
    auto whole = parse_response_request(body, options.dialect);
    if (!whole) return whole.error();
    *request = std::move(*whole);
    return {};
}

/// A body becomes a prepared request and a record, or an error: whichever check fails first.
Result<void> ServerLoop::accept(Job& job) {
    auto body = Json::parse(job.text);
    if (!body) return body.error();
    auto request = parse_response_request(*body, options.dialect);
    if (!request) return request.error();
    if (auto read = read_key(job, *body, *request); !read) return read.error();
    StoredResponse& stored = job.stored;
    if (!stored.reservation.empty()) {  // what was accepted once is not checked against the model
        job.replay = store->reserved(stored.organisation, stored.reservation);
        if (job.replay && job.replay->fingerprint == stored.fingerprint) return {};
    }
    job.responder = find_responder(request->model);
    if (!job.responder) return server_no_model(request->model);
    request->organisation = stored.organisation;
    if (!request->previous_response_id.empty()) {
        auto added = add_previous(stored.organisation, &*request, std::move(*body));
        if (!added) return added.error();
        request->organisation = stored.organisation;
    }
    auto prepared = job.responder->prepare(*request);
    if (!prepared) return prepared.error();
    job.prepared = std::move(*prepared);

    auto id = server_new_id("resp_"), message_id = server_new_id("msg_");
    if (!id || !message_id) return id ? message_id.error() : id.error();
    ResponseRecord record;
    record.message_id = *message_id;
    record.model = request->model;
    record.temperature = job.prepared->temperature;
    record.top_p = job.prepared->top_p;
    record.seed = job.prepared->seed;
    stored.created_at_ms = unix_time_ms();
    record.created_at = stored.created_at_ms / 1000;
    stored.id = *id;
    stored.background = request->background;
    stored.attempts = 1;
    stored.head = server_shared(server_head(record));
    stored.request = server_shared(std::move(job.text));
    job.store = request->store;
    job.text = stored.background ? render_live(stored, false) : std::string();
    return {};
}

void ServerLoop::accept_work(Job& job) {
    if (auto accepted = accept(job); !accepted) job.error = std::move(accepted.error());
}

/// The last refusals; from here on the record exists.
void ServerLoop::accept_admit(JobPtr job) {
    Exchange* exchange = find_exchange(job->exchange);
    if (!exchange) return;
    if (!job->error && job->prepared && stopping)
        job->error = server_overloaded("the server is shutting down");
    if (!job->error && job->prepared && queued >= options.max_queued)
        job->error = server_overloaded("too many requests are waiting");
    if (job->error) return refuse(*exchange, *job->error);
    if (!job->prepared) return replay(*exchange, *job->replay);

    const StoredResponse& stored = job->stored;
    Live& entry = live[stored.id];
    entry.organisation = stored.organisation;
    entry.background = stored.background;
    entry.resumable = stored.background || !stored.reservation.empty();
    entry.responder = job->responder;
    if (!entry.resumable) entry.owner = exchange->number;
    ++queued;
    exchange->response_id = stored.id;
    if (!job->store) {
        entry.unkept = stored;
        return accept_done(std::move(job));
    }
    StoredResponse record = stored;
    store->add(std::move(record), on_kept(std::move(job), &ServerLoop::accept_done));
}

/// The record is kept, or the reservation was taken meanwhile, or the store had no room.
void ServerLoop::accept_done(JobPtr job) {
    const std::string id = job->stored.id;
    Exchange* exchange = find_exchange(job->exchange);
    Live& entry = live.find(id)->second;
    if (!job->error && entry.state == Live::State::parked) return;  // stopping: for the next start
    if (!job->error) {
        if (!exchange && entry.owner)
            return take_back(id, std::move(job), make_error(ErrorKind::cancelled, "client left"));
        entry.state = Live::State::waiting;
        return begin(std::move(job));
    }
    --queued;
    live.erase(id);
    if (!exchange) return;
    if (job->error->kind == ErrorKind::idempotency) {
        const auto holder = store->reserved(job->stored.organisation, job->stored.reservation);
        if (holder && holder->fingerprint == job->stored.fingerprint)
            return replay(*exchange, *holder);
        job->error = make_error(ErrorKind::idempotency,
                                "this idempotency key was used for another request",
                                "idempotency_key_reused");
    }
    refuse(*exchange, *job->error);
}

/// Hands it to its Responder; who waits for it is told, or waits on.
void ServerLoop::begin(JobPtr job) {
    const std::string id = job->stored.id;
    Live& entry = live.find(id)->second;
    auto submitted = entry.responder->submit(std::move(job->prepared), id);
    if (!submitted) return take_back(id, std::move(job), std::move(submitted.error()));
    entry.state = Live::State::working;
    if (Exchange* exchange = find_exchange(job->exchange)) {
        if (entry.background) answer(*exchange, 202, std::move(job->text));
        else wait_for(*exchange, id, entry);
    }
    take_events(id);
}

/// Undoes an acceptance: nothing ran, and an idempotency key is free again.
void ServerLoop::take_back(const std::string& id, JobPtr job, Error error) {
    Live& entry = live.find(id)->second;
    std::vector<uint64_t> waiters = std::move(entry.waiters);
    waiters.push_back(job->exchange);
    const bool kept = !entry.unkept;
    const std::string organisation = entry.organisation;
    --queued;
    live.erase(id);
    for (const uint64_t number : waiters)
        if (Exchange* exchange = find_exchange(number)) refuse(*exchange, error);
    if (kept)
        store->erase(organisation, id, false, unix_time_ms(), on_kept(std::move(job), nullptr));
}

void ServerLoop::wait_for(Exchange& exchange, const std::string& id, Live& entry) {
    exchange.response_id = id;
    entry.waiters.push_back(exchange.number);
    const uint64_t wait_ns = uint64_t{options.sync_timeout_ms} * 1'000'000;
    timeouts.emplace_back(monotonic_ns() + wait_ns, exchange.number);
}

/// A repeat of a request: it never runs again, it is answered from the record.
void ServerLoop::replay(Exchange& exchange, const Reservation& reservation) {
    if (reservation.deleted) return refuse(exchange, server_no_response(reservation.id));
    exchange.replayed = true;
    ++replayed;
    const auto found = live.find(reservation.id);
    if (found != live.end() && !found->second.background)
        return wait_for(exchange, reservation.id, found->second);
    show(exchange, reservation.id, 202);
}

// ---- Working and finishing ---------------------------------------------------------------------

void ServerLoop::take_events(const std::string& id) {
    const auto found = live.find(id);
    if (found == live.end()) return;
    Live& entry = found->second;
    while (auto event = entry.responder ? entry.responder->poll(id) : std::nullopt) {
        if (entry.state == Live::State::parked) continue;
        if (event->kind == Event::Kind::finished)
            return finish(id, entry, std::move(event->outcome));
        if (!std::exchange(entry.running, true)) --queued;
    }
}

void ServerLoop::cancel(const std::string& id, Live& entry) {
    if (entry.state == Live::State::working) return entry.responder->cancel(id);
    if (entry.state != Live::State::waiting) return;
    auto outcome = std::make_shared<Outcome>();
    outcome->status = Status::cancelled;
    finish(id, entry, std::move(outcome));
}

/// Leaves it unfinished for the next start, as if it had not been begun this time.
void ServerLoop::park(const std::string& id, Live& entry) {
    if (entry.state >= Live::State::finishing) return;
    if (std::exchange(entry.state, Live::State::parked) == Live::State::working)
        entry.responder->cancel(id);
    if (!entry.begun || entry.unkept || !entry.resumable) return;
    auto job = std::make_unique<Job>();
    store->begin(id, entry.attempts - 1, on_kept(std::move(job), nullptr));
}

void ServerLoop::finish(const std::string& id, Live& entry,
                        std::shared_ptr<const Outcome> outcome) {
    if (!entry.running) --queued;
    entry.running = true;
    entry.state = Live::State::finishing;
    ++finishing;
    const uint64_t now_ns = monotonic_ns();
    const double gap_s = static_cast<double>(now_ns - last_finish_ns) / 1e9;
    if (std::exchange(last_finish_ns, now_ns) != 0)
        finish_gap_s += (std::min(gap_s, 60.0) - finish_gap_s) / 8;
    auto job = std::make_unique<Job>();
    job->loop = this;
    job->stored.id = id;
    job->stored.organisation = entry.organisation;
    if (entry.unkept) job->stored = *entry.unkept;
    job->store = !entry.unkept;
    if (outcome->status == Status::failed)
        options.log(LogLevel::error,
                    "response " + id + " failed: " +
                        (outcome->error ? outcome->error->message : "no reason given"));
    job->outcome = std::move(outcome);
    send_job(std::move(job), &ServerLoop::finish_work, &ServerLoop::finish_keep);
}

/// Renders the terminal object, once. What is large is freed here, not on the loop.
void ServerLoop::finish_work(Job& job) {
    if (job.store) {
        auto stored = store->find(job.stored.organisation, job.stored.id);
        if (!stored) {
            job.error = server_no_response(job.stored.id);
            return;
        }
        job.stored = std::move(*stored);
    }
    const Outcome& outcome = *job.outcome;
    ResponseRecord record = server_record(
        job.stored, is_terminal(outcome.status) ? outcome.status : Status::failed);
    record.completed_at = std::max(unix_time_ms() / 1000, record.created_at);
    record.outcome = job.outcome;
    job.stored.object = server_shared(render_response(record, options.dialect).write());
    job.stored.head = job.stored.request = nullptr;
}

void ServerLoop::finish_keep(JobPtr job) {
    if (job->error || !job->store) return finish_done(std::move(job));
    const std::string id = job->stored.id;
    auto object = job->stored.object;
    store->finish(id, std::move(object), unix_time_ms(),
                  on_kept(std::move(job), &ServerLoop::finish_done));
}

/// The terminal object is kept: all who wait get the same bytes.
void ServerLoop::finish_done(JobPtr job) {
    const auto found = live.find(job->stored.id);
    if (found == live.end()) return;
    const std::vector<uint64_t> waiters = std::exchange(found->second.waiters, {});
    const bool again = job->error && job->error->kind == ErrorKind::overloaded;
    if (!again) {
        live.erase(found);
        --finishing;
    }
    for (const uint64_t number : waiters) {
        Exchange* exchange = find_exchange(number);
        if (!exchange) continue;
        exchange->usage = job->outcome->usage;
        exchange->timings = job->outcome->timings;
        if (job->error) refuse(*exchange, *job->error);
        else if (exchange->removes) remove(*exchange, job->stored.id);
        else answer(*exchange, 200, *job->stored.object);
    }
    if (!again || stopping) return;
    job->error.reset();  // a full disk: the outcome is kept here until there is room
    unsaved.push_back(std::move(job));
}

// ---- Removing and cancelling -------------------------------------------------------------------

void ServerLoop::delete_response(Exchange& exchange, HttpRequest&) {
    const auto found = live.find(exchange.argument);
    if (found == live.end() || found->second.organisation != exchange.organisation ||
        found->second.unkept)
        return remove(exchange, exchange.argument);
    exchange.removes = true;
    wait_for(exchange, found->first, found->second);
    cancel(found->first, found->second);
}

void ServerLoop::remove(Exchange& exchange, const std::string& id) {
    JobPtr job = make_job(exchange, nullptr);
    job->stored.id = id;
    store->erase(exchange.organisation, id, true, unix_time_ms(),
                 on_kept(std::move(job), &ServerLoop::remove_done));
}

void ServerLoop::remove_done(JobPtr job) {
    const std::string& id = job->stored.id;
    if (job->error && job->error->kind == ErrorKind::not_found)
        job->error = server_no_response(id);
    job->text = Json::object().set("id", id).set("object", "response").set("deleted", true).write();
    answer_job(std::move(job));
}

namespace {
Error server_not_background() {
    return server_field("invalid_value", "response_id",
                        "only responses with 'background': true can be cancelled");
}
}  // namespace

void ServerLoop::post_cancel(Exchange& exchange, HttpRequest&) {
    const auto found = live.find(exchange.argument);
    if (found == live.end() || found->second.organisation != exchange.organisation)
        return show(exchange, exchange.argument, 200, true);
    if (!found->second.background) return refuse(exchange, server_not_background());
    wait_for(exchange, found->first, found->second);
    cancel(found->first, found->second);
}

// ---- After a restart ---------------------------------------------------------------------------

/// Whatever the last process left unfinished is live again before the first request comes.
void ServerLoop::recover_all() {
    std::vector<StoredResponse> left = store->unfinished();
    std::sort(left.begin(), left.end(), [](const StoredResponse& a, const StoredResponse& b) {
        return a.created_at_ms < b.created_at_ms;
    });
    for (const StoredResponse& stored : left) {
        Live& entry = live[stored.id];
        entry.state = Live::State::waiting;
        entry.organisation = stored.organisation;
        entry.background = stored.background;
        entry.resumable = stored.background || !stored.reservation.empty();
        entry.attempts = stored.attempts;
        entry.begun = false;
        ++queued;
        if (entry.resumable && entry.attempts < server_max_attempts) {
            recoverable.push_back(stored.id);
            continue;
        }
        auto outcome = std::make_shared<Outcome>();
        outcome->status = Status::failed;
        outcome->error = make_error(ErrorKind::closed, "the server was restarted", "server_restarted");
        finish(stored.id, entry, std::move(outcome));
    }
    recover_some();
}

void ServerLoop::recover_some() {
    while (!stopping && recovering < server_recovering && !recoverable.empty()) {
        auto job = std::make_unique<Job>();
        job->stored.id = recoverable.front();
        recoverable.pop_front();
        const auto found = live.find(job->stored.id);
        if (found == live.end() || found->second.state != Live::State::waiting) continue;
        job->stored.organisation = found->second.organisation;
        ++recovering;
        send_job(std::move(job), &ServerLoop::recover_work, &ServerLoop::recover_keep);
    }
}

/// The same request with the seed that was drawn for it.
void ServerLoop::recover_work(Job& job) {
    const auto prepare = [&]() -> Result<void> {
        auto stored = store->find(job.stored.organisation, job.stored.id);
        if (!stored) return server_no_response(job.stored.id);
        const ResponseRecord record = server_record(*stored, Status::pending);
        auto request = parse_response_request(record.request, options.dialect);
        if (!request) return request.error();
        if (!request->previous_response_id.empty()) {
            auto added = add_previous(record.organisation, &*request, record.request);
            if (!added) return added.error();
        }
        request->organisation = record.organisation;
        request->seed = record.seed;
        job.responder = find_responder(request->model);
        if (!job.responder) return server_no_model(request->model);
        auto prepared = job.responder->prepare(*request);
        if (!prepared) return prepared.error();
        job.prepared = std::move(*prepared);
        return {};
    };
    if (auto prepared = prepare(); !prepared) job.error = std::move(prepared.error());
}

void ServerLoop::recover_keep(JobPtr job) {
    const std::string id = job->stored.id;
    const auto found = live.find(id);
    if (found == live.end()) return recover_done(std::move(job));  // cancelled, and gone
    Live& entry = found->second;
    const bool on = entry.state == Live::State::waiting && !job->error;
    if (!on || std::exchange(entry.begun, true)) return recover_done(std::move(job));
    store->begin(id, ++entry.attempts, on_kept(std::move(job), &ServerLoop::recover_done));
}

void ServerLoop::recover_done(JobPtr job) {
    --recovering;
    const std::string id = job->stored.id;
    const auto found = live.find(id);
    if (found == live.end() || found->second.state != Live::State::waiting) return;  // cancelled
    Live& entry = found->second;
    if (!job->error) {
        entry.responder = job->responder;
        auto submitted = entry.responder->submit(std::move(job->prepared), id);
        if (submitted) {
            entry.state = Live::State::working;
            take_events(id);
            return recover_some();
        }
        job->error = std::move(submitted.error());
    }
    if (job->error->kind == ErrorKind::overloaded) {  // no room yet: again with the next tick
        recoverable.push_back(id);
        return;
    }
    auto outcome = std::make_shared<Outcome>();
    outcome->status = Status::failed;
    outcome->error = std::move(job->error);
    finish(id, entry, std::move(outcome));
    recover_some();
}

// ---- Reading -----------------------------------------------------------------------------------

std::string ServerLoop::render_live(const StoredResponse& stored, bool running) const {
    const ResponseRecord record =
        server_record(stored, running ? Status::running : Status::pending);
    return render_response(record, options.dialect).write();
}

void ServerLoop::get_response(Exchange& exchange, HttpRequest&) {
    show(exchange, exchange.argument, 200);
}

void ServerLoop::show(Exchange& exchange, const std::string& id, int unfinished_status,
                      bool only_background) {
    JobPtr job = make_job(exchange, nullptr);
    const auto found = live.find(id);
    job->running = found != live.end() && found->second.running;
    job->status = unfinished_status;
    job->only_background = only_background;
    job->stored.id = id;
    exchange.response_id = id;
    send_job(std::move(job), &ServerLoop::show_work, &ServerLoop::answer_job);
}

void ServerLoop::show_work(Job& job) {
    const auto stored = store->find(job.stored.organisation, job.stored.id);
    if (!stored) {
        job.error = server_no_response(job.stored.id);
        return;
    }
    if (job.only_background && !stored->background) job.error = server_not_background();
    if (stored->terminal) job.status = 200;
    job.text = stored->terminal ? *stored->object : render_live(*stored, job.running);
}

namespace {

/// The value of a field of a query, unescaped. Errors: not text, or given twice.
Result<std::optional<std::string>> server_query(std::string_view query, std::string_view name) {
    std::optional<std::string> found;
    while (!query.empty()) {
        const std::string_view one = query.substr(0, query.find('&'));
        query.remove_prefix(std::min(one.size() + 1, query.size()));
        const size_t equals = std::min(one.find('='), one.size());
        if (one.substr(0, equals) != name) continue;
        auto value = server_unescape(one.substr(std::min(equals + 1, one.size())));
        if (!value || found)
            return make_error(ErrorKind::invalid_request,
                              "'" + std::string(name) + "' in the query is malformed or given twice",
                              "invalid_value", std::string(name));
        found = std::move(*value);
    }
    return found;
}

struct ServerPage {
    size_t      limit = server_list_default;
    std::string after;
    bool        ascending = false;
};

Result<ServerPage> server_page(std::string_view query) {
    ServerPage page;
    auto limit = server_query(query, "limit"), after = server_query(query, "after"),
         order = server_query(query, "order");
    for (const auto* field : {&limit, &after, &order})
        if (!*field) return field->error();
    if (*limit) {
        const auto number = Json::parse(**limit);
        if (!number || !number->is_int())
            return server_field("invalid_type", "limit", "'limit' must be an integer");
        if (number->as_int() < 1)
            return server_field("integer_below_min_value", "limit", "'limit' must be at least 1");
        if (number->as_int() > static_cast<int64_t>(server_list_most))
            return server_field("integer_above_max_value", "limit", "'limit' must be at most 100");
        page.limit = static_cast<size_t>(number->as_int());
    }
    if (*order && **order != "asc" && **order != "desc")
        return server_field("invalid_value", "order", "'order' must be \"asc\" or \"desc\"");
    page.ascending = *order && **order == "asc";
    if (*after) page.after = std::move(**after);
    return page;
}

std::string server_list(std::vector<Json> data, bool more) {
    const Json first = data.empty() ? Json() : data.front()["id"];
    const Json last = data.empty() ? Json() : data.back()["id"];
    return Json::object()
        .set("object", "list")
        .set("data", Json(std::move(data)))
        .set("first_id", first)
        .set("last_id", last)
        .set("has_more", more)
        .write();
}

Error server_bad_after(std::string_view after) {
    return server_field("invalid_value", "after", "'after' is '" + server_printable(after) +
                                                      "', which is none of the list");
}

}  // namespace

void ServerLoop::get_responses(Exchange& exchange, HttpRequest&) {
    auto page = server_page(exchange.query);
    if (!page) return refuse(exchange, page.error());
    auto ids = store->list(exchange.organisation, page->after, page->limit + 1);
    if (!ids)
        return refuse(exchange, ids.error().kind == ErrorKind::not_found
                                    ? server_bad_after(page->after)
                                    : ids.error());
    JobPtr job = make_job(exchange, nullptr);
    job->more = ids->size() > page->limit;
    if (job->more) ids->pop_back();
    for (std::string& id : *ids) {
        const auto found = live.find(id);
        const bool running = found != live.end() && found->second.running;
        job->ids.emplace_back(std::move(id), running);
    }
    send_job(std::move(job), &ServerLoop::list_work, &ServerLoop::answer_job);
}

void ServerLoop::list_work(Job& job) {
    std::vector<Json> data;
    for (const auto& [id, running] : job.ids) {
        const auto stored = store->find(job.stored.organisation, id);
        if (!stored) continue;  // gone meanwhile
        auto object = Json::parse(stored->terminal ? *stored->object : render_live(*stored, running));
        if (!object) continue;
        for (const char* left_out : {"input", "instructions", "tools"}) object->erase(left_out);
        data.push_back(std::move(*object));
    }
    job.text = server_list(std::move(data), job.more);
}

void ServerLoop::get_input_items(Exchange& exchange, HttpRequest&) {
    JobPtr job = make_job(exchange, nullptr);
    job->stored.id = exchange.argument;
    send_job(std::move(job), &ServerLoop::items_work, &ServerLoop::answer_job);
}

/// Newest first unless asked otherwise, as OpenAI has it.
void ServerLoop::items_work(Job& job) {
    const auto fail = [&](Error error) { job.error = std::move(error); };
    auto page = server_page(job.query);
    if (!page) return fail(page.error());
    const auto stored = store->find(job.stored.organisation, job.stored.id);
    if (!stored) return fail(server_no_response(job.stored.id));
    auto request = Json::parse(*stored->request);
    if (!request) return fail(request.error());
    std::vector<Json> items = render_input_items(*request, stored->id);
    if (!page->ascending) std::reverse(items.begin(), items.end());
    auto first = items.begin();
    if (!page->after.empty()) {
        first = std::find_if(items.begin(), items.end(), [&](const Json& item) {
            return item["id"].as_string() == page->after;
        });
        if (first == items.end()) return fail(server_bad_after(page->after));
        ++first;
    }
    const size_t left = static_cast<size_t>(items.end() - first);
    const size_t count = std::min(left, page->limit);
    std::vector<Json> shown(std::make_move_iterator(first),
                            std::make_move_iterator(first + static_cast<ptrdiff_t>(count)));
    job.text = server_list(std::move(shown), left > count);
}

// ---- Metrics -----------------------------------------------------------------------------------

namespace {
void server_metric(std::string* out, const char* name, const char* kind, double value) {
    const Json number = value == std::floor(value) && value < 9e15
                            ? Json(static_cast<int64_t>(value)) : Json(value);
    *out += format("# TYPE valar_%s %s\nvalar_%s ", name, kind, name) + number.write() + "\n";
}
}  // namespace

std::string ServerLoop::metrics_text() const {
    std::string out = "# TYPE valar_http_requests_total counter\n";
    uint64_t requests = 0;
    for (const auto& [key, count] : answered) {
        out += format("valar_http_requests_total{route=\"%s\",status=\"%d\"} ", key.first.c_str(),
                      key.second) + std::to_string(count) + "\n";
        requests += count;
    }
    const HttpServer::Stats net = http->stats();
    ResponderStats sum;
    for (const Responder* responder : responders) {
        const ResponderStats one = responder->stats();
        sum.queued += one.queued, sum.running += one.running;
        sum.completed += one.completed, sum.failed += one.failed, sum.cancelled += one.cancelled;
        sum.input_tokens += one.input_tokens, sum.output_tokens += one.output_tokens;
    }
    struct Row {
        const char* name;
        const char* kind;
        double      value;
    };
    const auto number = [](uint64_t value) { return static_cast<double>(value); };
    const Row rows[] = {
        {"http_request_seconds_sum", "counter", answer_seconds},
        {"http_request_seconds_count", "counter", number(requests)},
        {"http_connections", "gauge", number(net.connections)},
        {"http_connections_accepted_total", "counter", number(net.accepted)},
        {"http_faults_total", "counter", number(net.faults)},
        {"http_timeouts_total", "counter", number(net.timeouts)},
        {"http_body_bytes", "gauge", number(net.body_bytes)},
        {"responses_live", "gauge", number(live.size())},
        {"responses_queued", "gauge", number(queued)},
        {"responses_replayed_total", "counter", number(replayed)},
        {"store_bytes", "gauge", number(store->bytes())},
        {"model_requests_queued", "gauge", number(sum.queued)},
        {"model_requests_running", "gauge", number(sum.running)},
        {"model_requests_completed_total", "counter", number(sum.completed)},
        {"model_requests_failed_total", "counter", number(sum.failed)},
        {"model_requests_cancelled_total", "counter", number(sum.cancelled)},
        {"model_input_tokens_total", "counter", number(sum.input_tokens)},
        {"model_output_tokens_total", "counter", number(sum.output_tokens)},
    };
    for (const Row& row : rows) server_metric(&out, row.name, row.kind, row.value);
    return out;
}

void ServerLoop::get_metrics(Exchange& exchange, HttpRequest&) {
    answer(exchange, make_reply(exchange, 200, metrics_text(),
                                {{"Content-Type", "text/plain; version=0.0.4"}}));
}

}  // namespace detail

// ---- Server ----------------------------------------------------------------------------------

Result<std::vector<ApiKey>> read_key_file(const std::string& path) {
    using namespace detail;
    auto text = read_file(path, server_max_key_file);
    if (!text) return text.error();
    std::vector<ApiKey> keys;
    std::string_view rest = *text;
    for (int line = 1; !rest.empty(); ++line) {
        std::string_view words = rest.substr(0, rest.find('\n'));
        rest.remove_prefix(std::min(words.size() + 1, rest.size()));
        std::vector<std::string> fields;
        for (;;) {
            const size_t from = words.find_first_not_of(" \t\r");
            if (from == words.npos) break;
            words.remove_prefix(from);
            fields.emplace_back(words.substr(0, words.find_first_of(" \t\r")));
            words.remove_prefix(fields.back().size());
        }
        if (fields.empty() || fields[0][0] == '#') continue;
        const auto refused = [&](const char* what) {
            return make_error(ErrorKind::bad_data, path + format(", line %d: ", line) + what);
        };
        if (fields.size() != 3 && fields.size() != 4)
            return refused("expected `id organisation sha256 [requests-per-minute]`");
        ApiKey key;
        key.id = fields[0], key.organisation = fields[1], key.secret_sha256 = fields[2];
        if (auto hash = server_secret_hash(key); !hash) return refused("not a SHA-256");
        if (fields.size() == 4) {
            const auto number = Json::parse(fields[3]);
            if (!number || number->as_int() < 1 || number->as_int() > INT32_MAX)
                return refused("requests-per-minute is not a positive number");
            key.requests_per_minute = static_cast<uint32_t>(number->as_int());
        }
        for (const ApiKey& other : keys)
            if (other.id == key.id) return refused("this id stands in an earlier line, too");
        keys.push_back(std::move(key));
    }
    return keys;
}

struct Server::State : detail::ServerLoop {};

Result<Server> Server::open(Responder* responder, const ServerOptions& options) {
    return open(std::span<Responder* const>(&responder, 1), options);
}

Result<Server> Server::open(std::span<Responder* const> responders, const ServerOptions& options) {
    if (responders.empty() ||
        std::find(responders.begin(), responders.end(), nullptr) != responders.end())
        return detail::server_option("responders", "a server needs a Responder");
    if (auto checked = detail::server_check_options(options); !checked) return checked.error();
    auto keys = detail::server_keys(options.keys);
    if (!keys) return keys.error();
    auto state = std::make_unique<State>();
    state->options = options;
    state->options.keys.clear();
    state->keys = std::move(*keys);
    state->store = options.store;
    if (!state->store) {
#ifdef VALAR_NO_STORE
        return detail::server_option("store", "VALAR_NO_STORE cuts MemoryStore: pass a Store");
#else
        state->own_store = std::make_unique<MemoryStore>(options.memory_store);
        state->store = state->own_store.get();
#endif
    }
    state->responders.assign(responders.begin(), responders.end());
    if (auto started = state->start(); !started) return started.error();
    return Server(std::move(state));
}

Server::Server(std::unique_ptr<State> state) : state_(std::move(state)) {}
Server::Server(Server&& other) noexcept = default;
Server& Server::operator=(Server&& other) noexcept = default;
Server::~Server() = default;

Result<void> Server::run() {
    while (state_->step(-1)) {
    }
    return {};
}

Result<bool> Server::step(int timeout_ms) { return state_->step(timeout_ms); }

void Server::stop() {
    state_->stopping = true;
    state_->http->stop();
}

uint16_t Server::port() const { return state_->http->port(); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif
#pragma pop_macro("max")
#pragma pop_macro("min")
#endif  // VALAR_IMPLEMENTATION

// MIT License
//
// Copyright (c) 2026 the valar authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
// associated documentation files (the "Software"), to deal in the Software without restriction,
// including without limitation the rights to use, copy, modify, merge, publish, distribute,
// sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
// furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial
// portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
// NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
// OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
// CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

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
//     >>engine      Engine and Reply: queue, step(), streaming, cancellation
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
// What each cut saves is in README.md. In the environment VALAR_ISA=scalar (or another name of a
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
    T operator*() && { return std::move(value_); }  // by value: a borrow of a temporary would dangle
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

Error make_error(ErrorKind kind, std::string message, std::string code = {}, std::string param = {});
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
/// fresh from the OS (`allocate`); large ones ask for huge pages. Movable, frees itself.
class Buffer {
public:
    static Result<Buffer> allocate(uint64_t bytes, const char* what);
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
size_t utf8_count(std::string_view text);          ///< code points; a malformed subpart counts as one
std::string utf8_repair(std::string_view text);    ///< each malformed subpart becomes U+FFFD

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
    bool is_real() const { return node_.kind == Kind::real; }  ///< has a point or an exponent, or is huge
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
    Json set(std::string_view key, Json value) && { set(key, std::move(value)); return std::move(*this); }
    bool erase(std::string_view key);  ///< keeps the order of the others
    void reserve(size_t count);        ///< room for so many items or members

    std::string write(JsonStyle style = {}) const;
    void write_to(std::string& out, JsonStyle style = {}) const;  ///< appends
    /// One text per value, for fingerprints: keys sorted by code point, no white space, numbers that
    /// are whole and fit 64 bits as integers (1.0 = 1, -0 = 0), others as the shortest double.
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
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD)
#include <immintrin.h>
#endif
#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(VALAR_NO_SIMD)
#include <arm_neon.h>
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
    char small[256];
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    const int length = std::vsnprintf(small, sizeof small, pattern, args);
    va_end(args);
    std::string text(small, size_t(std::clamp(length, 0, int(sizeof small) - 1)));
    if (length >= int(sizeof small)) {
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
    if (code == ERROR_FILE_NOT_FOUND || code == ERROR_PATH_NOT_FOUND) kind = ErrorKind::not_found;
    if (code == ERROR_NOT_ENOUGH_MEMORY || code == ERROR_OUTOFMEMORY ||
        code == ERROR_COMMITMENT_LIMIT) kind = ErrorKind::out_of_memory;
    wchar_t wide[256];
    char text[512];
    const DWORD flags = FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS;
    const DWORD count = FormatMessageW(flags, nullptr, code, 0, wide, 256, nullptr);
    int size = WideCharToMultiByte(CP_UTF8, 0, wide, int(count), text, sizeof text, nullptr, nullptr);
    while (size > 0 && (text[size - 1] == '\n' || text[size - 1] == '\r')) --size;
    what += size > 0 ? ": " + std::string(text, size_t(size)) : format(": error %lu", code);
    return make_error(kind, std::move(what));
}

#else

namespace {
// strerror_r comes in two shapes, told apart by what it returns
[[maybe_unused]] const char* strerror_text(int result, const char* text) { return result == 0 ? text : "unknown"; }
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
uint64_t thread_cpu_ns() { return posix_clock_ns(CLOCK_THREAD_CPUTIME_ID); }
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

void* map_pages(size_t size) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_pages(void* data, size_t) { VirtualFree(data, 0, MEM_RELEASE); }

struct FileHandle {  // closes itself
    HANDLE handle = INVALID_HANDLE_VALUE;
    ~FileHandle() { if (ok()) CloseHandle(handle); }
    bool ok() const { return handle != INVALID_HANDLE_VALUE && handle != nullptr; }
};

#else

void* map_pages(size_t size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);  // a wish: failing is fine
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

Result<Buffer> Buffer::allocate(uint64_t bytes, const char* what) {
    Buffer buffer;
    if (bytes == 0) return buffer;
    if (bytes <= SIZE_MAX / 2) {
        const size_t size = size_t(bytes);
        if (size >= buffer_from_system) {
            buffer.data_ = static_cast<std::byte*>(map_pages(size));
        } else if (void* p = ::operator new(size, std::align_val_t(buffer_alignment), std::nothrow)) {
            buffer.data_ = static_cast<std::byte*>(std::memset(p, 0, size));
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
    if (uint64_t(size.QuadPart) > SIZE_MAX / 2) return file_too_large(path, uint64_t(size.QuadPart));
    FileHandle section{CreateFileMappingW(file.handle, nullptr, PAGE_READONLY, 0, 0, nullptr)};
    const void* data = section.ok() ? MapViewOfFile(section.handle, FILE_MAP_READ, 0, 0, 0) : nullptr;
    if (data == nullptr) return os_error("cannot map '" + path + "'");
    mapped.data_ = static_cast<const std::byte*>(data);
    mapped.size_ = size_t(size.QuadPart);
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
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGPROF})
        sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_t thread{};
    errno = pthread_create(&thread, nullptr, thread_entry, start);
    const bool started = errno == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
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
    std::strncpy(start->name, name, sizeof start->name - 1);
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
    for (size_t i = 0; i < bytes / sizeof list[0]; ++i)
        if (list[i].Relationship == RelationProcessorCore && (list[i].ProcessorMask & allowed)) ++cores;
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
        if (std::find(seen.begin(), seen.end(), text) == seen.end()) seen.push_back(std::move(text));
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
    for (int i = 0; i < 64; ++i) {
        const uint32_t e = s[4], a = s[0];
        const uint32_t t1 = s[7] + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                            ((e & s[5]) ^ (~e & s[6])) + sha256_constants[i] + w[i];
        const uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                            ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        for (int k = 7; k > 0; --k) s[k] = s[k - 1];
        s[4] += t1;
        s[0] = t1 + t2;
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

std::string base64_encode(std::string_view bytes) { return base64_encode(bytes.data(), bytes.size()); }

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
        good = good && (group & ((1u << 8 * padding) - 1)) == 0;  // the bits that padding leaves over
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
    const auto found = std::lower_bound(unicode_composition.begin(), unicode_composition.end(), pair,
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
// are big integers asked. (After Eisel and Lemire, "Number parsing at a gigabyte per second", 2021.)
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
    const uint64_t width = number.dropped > 0 ? (1u << zeros) + 1 : 0;  // of the bounds, in x.high
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
    static constexpr size_t none = SIZE_MAX, small = 16;
    std::vector<JsonMember> members;
    std::vector<uint32_t>   slots;  // place + 1, 0: free; empty while small
    uint64_t                seed = 0;

    size_t find(std::string_view key) const {
        if (!slots.empty()) return size_t(slots[slot_of(key)]) - 1;  // 0 - 1 is none
        for (size_t i = 0; i < members.size(); ++i)
            if (members[i].key == key) return i;
        return none;
    }

    void append(std::string_view key, Json value) {  // a key that is not there
        members.push_back({std::string(key), std::move(value)});
        if (members.size() <= small) return;
        if (slots.size() < 2 * members.size()) index();
        else slots[slot_of(key)] = uint32_t(members.size());
    }

    // Builds `slots` where they are needed. Returns the first member whose key came before, or none.
    size_t index() {
        slots.clear();
        if (members.size() <= small) {
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
const Json json_null;
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
    case Kind::array: return std::equal(items().begin(), items().end(), other.items().begin(),
                                        other.items().end());
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
        return json_error(format("invalid JSON at line %zu, column %zu: ", line, column) + message_);
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

    // The string at the quote p_ into text_: a piece of the source, or of buffer_ when it has escapes.
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
            for (const JsonMember& member : members) write_member(member, &member == members.data());
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

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
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

#pragma once

#include "base/sockets.hpp"
#include "http/http.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// The first field of that name (ASCII case ignored), or null.
const std::string* find_header(const HttpHeaders& headers, std::string_view name);
size_t count_headers(const HttpHeaders& headers, std::string_view name);

/// A parsed request. Strings are as sent unless said otherwise.
struct HttpRequest {
    std::string method;
    std::string target;  ///< origin form, "/path?query", or "*"; absolute form is brought to it
    std::string host;    ///< "name" or "name:port", lower case; empty only under HTTP/1.0
    HttpHeaders headers;
    std::string body;
    NetAddress peer;
    uint64_t exchange = 0;  ///< names this request until it is answered; never used twice
    uint64_t max_body = 0;  ///< on_head may change it; a longer body is refused with 413
    uint64_t tag = 0;       ///< the handler's own, kept from on_head to on_request
    std::optional<uint64_t> content_length;
    bool chunked = false;
    bool keep_alive = false;
    bool expect_continue = false;
    bool http_1_0 = false;

    bool is_head() const { return method == "HEAD"; }
    bool has_body() const { return chunked || content_length.value_or(0) > 0; }
    const std::string* header(std::string_view name) const { return find_header(headers, name); }
    size_t count(std::string_view name) const { return count_headers(headers, name); }
};

/// What bounds one message.
struct HttpLimits {
    uint32_t max_request_line_bytes = 8 << 10;  ///< 414; RFC 9112 asks for 8,000 or more
    uint32_t max_head_bytes = 16 << 10;         ///< 431; header fields: a browser's cookies, a key
    uint32_t max_headers = 100;                 ///< 431; trailer fields are counted apart
    uint64_t max_body_bytes = uint64_t{32} << 20;  ///< 413, unless on_head says otherwise
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
        // clang-format off
        start_line, header_line, body, chunk_size, chunk_data, chunk_end, trailer, until_close,
        complete, fault
        // clang-format on
    };
    // Each step returns more to go on, or the event to report.
    Event fail(int status, const char* reason);
    bool take_line(std::string_view bytes, size_t* used);
    bool line_is_full();
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
    bool grow_body(size_t bytes);

    const HttpLimits* limits_;
    std::string line_;
    uint64_t body_left_ = 0;
    uint32_t head_bytes_ = 0;  // also trailers and chunk extensions, once in the body
    uint32_t fields_ = 0;
    int status_ = 0;
    const char* reason_ = "";
    Side side_;
    State state_ = State::start_line;
    bool carriage_ = false;      // the last byte was CR
    bool leading_line_ = false;  // one empty line was skipped
    bool no_body_ = false;
};

/// Implemented by the user of HttpServer. All calls come from inside HttpServer::step.
///
/// An exchange: on_head; if it returns nothing, exactly one of on_request and on_closed; after
/// on_request, HttpServer::reply from any thread, or begin and end on the loop, or on_closed if the
/// client is gone before it.
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
    /// The reply, status 503, to a connection that there is no room for, before it asked anything:
    /// as many as max_connections are at work, or the process has no descriptor left.
    virtual HttpReply on_full(bool /*no_descriptor*/) {
        return on_error({}, 503, "overloaded", "too many connections");
    }
    /// A begun reply whose client had been too slow, or of which 256 KiB were unsent at some time, is
    /// sent as far as it was appended.
    virtual void on_sent(uint64_t /*exchange*/) {}
    /// About every HttpOptions::tick_ms.
    virtual void on_tick() {}
    /// drain_timeout_ms is over, or nobody is left: replies of now are the last that go out.
    virtual void on_drained() {}
};

using HttpResolve = Result<std::vector<NetAddress>> (*)(const std::string& name, uint16_t port);

struct NetPolicy;

/// A call to another server. `call.host` may also be a name.
struct HttpErrand {
    HttpCall call = {};
    const NetPolicy* policy =
        nullptr;  ///< which addresses may be called; null: any. Must outlive it
    /// A reply whose head came counts, whatever becomes of its body: it is without that if it is too
    /// long or never ends.
    bool head_is_enough = false;
    bool streams = false;  ///< on_piece tells of its body
    /// On a connection that an earlier one left open, if there is one, and leaves its own open. Where
    /// that turns out to be closed before a byte of the reply came, it is sent once more on a new one.
    bool keeps_alive = false;
    uint32_t silence_timeout_ms = 0;  ///< without a byte of the reply; 0: only the call's own
};

/// Who wants to know how a call ended.
class HttpCaller {
public:
    virtual ~HttpCaller() = default;
    /// Errors: invalid_request (the call itself), permission (no address may be called), io, timeout,
    /// bad_data (not HTTP), too_large. It may start another. Of an errand that streams it has no body.
    virtual void on_reply(uint64_t call, Result<HttpReply> reply) = 0;
    /// More of the body of an errand that streams, without what frames it. It may cancel the call.
    virtual void on_piece(uint64_t /*call*/, int /*status*/, std::string_view /*bytes*/) {}
};

/// Options of HttpServer. Each limit says what happens beyond it.
struct HttpOptions {
    std::string host = "127.0.0.1";  ///< or "unix:/path"
    uint16_t port = 0;               ///< 0: any free one
    HttpLimits limits = {};
    uint32_t max_connections = 10'000;                       ///< an idle one makes room, else 503
    uint64_t max_inflight_body_bytes = uint64_t{512} << 20;  ///< bodies not yet answered; 503
    uint32_t idle_timeout_ms = 75'000;                       ///< between requests; closed silently
    uint32_t header_timeout_ms = 10'000;  ///< from a head's first byte to its last; 408
    uint32_t body_timeout_ms = 10'000;    ///< one window of the body's pace; 408
    uint32_t body_min_bytes = 4 << 10;    ///< that must arrive in each window: 400 B/s by default
    uint32_t write_timeout_ms = 30'000;   ///< without progress while bytes of a reply wait, or from
                                          ///< 256 KiB of a begun one on until all is sent; closed
    uint32_t linger_timeout_ms = 5'000;   ///< to read what a refused client still sends; closed
    uint32_t drain_timeout_ms = 10'000;   ///< for exchanges in work after stop(); on_drained
    uint32_t tick_ms = 0;                 ///< pace of on_tick; 0: never
    int backlog = 1024;                   ///< of listen(); the system may cap it
    HttpResolve resolve = net_resolve;    ///< of the names of other servers
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
    /// Stops accepting once all are taken that the system has connected, lets exchanges in work
    /// finish (drain_timeout_ms; at_once: no more) and ends each connection with its next reply, or
    /// half a second later.
    void stop(bool at_once = false);
    /// Answers an exchange; without effect if its client is gone.
    void reply(uint64_t exchange, HttpReply reply);
    /// A reply in pieces: its head and the body so far, then what append brings, then end. Pieces
    /// of one turn of the loop leave in one write, chunked (or until the end of the connection, for
    /// HTTP/1.0). A client that ends its stream is gone. Without effect once it is.
    /// Threads: only inside step(), in a call of the handler or a posted one.
    void begin(uint64_t exchange, HttpReply reply);
    void append(uint64_t exchange, std::string_view bytes);
    void end(uint64_t exchange);
    /// Bytes of a begun reply that its client did not take yet. Who appends on regardless has them
    /// in memory, until write_timeout_ms without progress.
    size_t unsent(uint64_t exchange) const;
    /// Calls another server from the loop; dropped if the server is destroyed first.
    /// Threads: only inside step(), as begin().
    uint64_t call(HttpErrand errand, HttpCaller* caller);
    /// Has the loop call function(context) inside step(); dropped if the server is destroyed first.
    void post(void (*function)(void*), void* context);

    struct Stats {
        uint64_t accepted = 0, requests = 0, faults = 0, timeouts = 0;  ///< since open
        uint64_t no_room = 0, no_descriptor = 0;  ///< since open: connections turned away, by cause
        uint64_t connections = 0, body_bytes = 0;  ///< now
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

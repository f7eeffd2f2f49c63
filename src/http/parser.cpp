// >>http
// Owns: the HTTP/1.1 parser, the server's event loop, the blocking client.
// Assumes: callers of step() do not call it from inside a handler.
// Promises: one pass over the bytes, one exchange at a time on a connection, replies in order.
#include "prologue.hpp"

#include "http/text.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- The parser ------------------------------------------------------------------------------

HttpParser::HttpParser(const HttpLimits* limits, Side side) : limits_(limits), side_(side) {
    reset();
}

void HttpParser::reset() {
    message = {};
    message.max_body = limits_->max_body_bytes;
    line_.clear();
    body_left_ = 0;
    head_bytes_ = fields_ = 0;
    status_ = 0;
    reason_ = "";
    state_ = State::start_line;
    carriage_ = leading_line_ = no_body_ = false;
}

std::string_view HttpParser::code() const {
    return status_ == 413 ? "request_too_large" : status_ == 503 ? "overloaded" : "bad_request";
}

HttpParser::Event HttpParser::fail(int status, const char* reason) {
    state_ = State::fault;
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
                if (!take_line(bytes, used))
                    return state_ == State::fault ? Event::fault : Event::more;
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
        else fail(400, "a chunk's first line is too long");
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
        case State::trailer: return on_field();
        case State::chunk_size: return on_chunk_size();
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
    if (!trailer) message.headers.emplace_back(line.substr(0, colon), trim(line.substr(colon + 1)));
    return Event::more;
}

HttpParser::Event HttpParser::on_head_end() {
    using Step = Event (HttpParser::*)();
    static constexpr Step steps[] = {&HttpParser::read_transfer_encoding,
                                     &HttpParser::read_content_length, &HttpParser::read_host,
                                     &HttpParser::read_target, &HttpParser::read_options};
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
    for (; digits < line_.size() && hex_value(line_[digits]) >= 0; ++digits) {
        if (digits == 16) return fail(400, "a chunk size of more than 16 digits");
        size = size << 4 | static_cast<uint64_t>(hex_value(line_[digits]));
    }
    const std::string_view extension = std::string_view(line_).substr(digits);
    const std::string_view trimmed = trim(extension);
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

/// Doubles the body's room, never past its limit; a long one gets all that it asks for at once: what
/// is not written takes no memory, while steps that are given back may stay with the allocator.
/// std::string would end the process where memory ends, so a large step is tried first in a way that
/// may fail.
bool HttpParser::grow_body(size_t bytes) {
    constexpr size_t large = 256 << 10, long_body = 2 << 20;
    const size_t need = message.body.size() + bytes, room = message.body.capacity();
    if (need <= room) return true;
    const uint64_t all = message.body.size() + (state_ == State::body ? body_left_ : 0);
    const uint64_t next = room < long_body ? 2 * uint64_t{room} : std::max(all, 2 * uint64_t{room});
    const size_t want = static_cast<size_t>(
        std::min<uint64_t>(std::max<uint64_t>(need, next), message.max_body));
    if (want >= large) {
        std::unique_ptr<char[]> probe(new (std::nothrow) char[want + 1]);
        if (!probe) return false;
    }
    message.body.reserve(want);
    return true;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

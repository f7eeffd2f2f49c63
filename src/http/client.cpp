#include "prologue.hpp"

#include "http/text.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {

// ---- The client ------------------------------------------------------------------------------

}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {
namespace detail {

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
    if (!find_header(call.headers, "Host")) http_append(&out, {"Host: ", address.text(), "\r\n"});
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
    const HttpCall& call;
    std::string_view head;
    HttpParser parser;
    size_t sent = 0;
    bool connected = false;

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
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

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

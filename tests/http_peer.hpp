// What the tests of http and of the server share: a client that sends any bytes it likes and sees
// every reply, and a run of the parser over a stream cut into pieces.
#ifndef VALAR_TESTS_HTTP_PEER_HPP
#define VALAR_TESTS_HTTP_PEER_HPP

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "http/internal.hpp"

/// A name that the tests give to a directory of a store or a model, or put into a message about one:
/// no reply may hold it, nor the directories in which the tests lie and run.
inline constexpr const char* not_for_clients = "not-for-clients";

/// Ends the program where a reply names a directory. All that the tests' clients read comes by here;
/// tests/sections.py sees to it that no test has another client.
inline void check_names_no_directory(std::string_view bytes) {
    static const std::vector<std::string> secret = [] {
        std::vector<std::string> all = {not_for_clients, std::filesystem::current_path().string()};
#if defined(VALAR_SOURCE_DIR)
        all.emplace_back(VALAR_SOURCE_DIR);
#endif
        if (const char* models = std::getenv("VALAR_MODELS")) all.emplace_back(models);
        std::erase_if(all, [](const std::string& one) { return one.size() < 4; });
        return all;
    }();
    for (const std::string& one : secret)
        if (bytes.find(one) != bytes.npos) {
            std::fprintf(stderr, "a reply holds '%s': %.*s\n", one.c_str(),
                         static_cast<int>(std::min<size_t>(bytes.size(), 2000)), bytes.data());
            std::abort();
        }
}

/// http_call for tests.
inline valar::Result<valar::HttpReply> checked_call(const valar::HttpCall& call) {
    auto reply = valar::http_call(call);
    if (!reply) return reply;
    for (const auto& [name, value] : reply->headers) check_names_no_directory(name + ": " + value);
    check_names_no_directory(reply->body);
    return reply;
}

/// Blocking, for tests: one connection to a port of this machine.
class HttpPeer {
public:
    explicit HttpPeer(uint16_t port, int timeout_ms = 10'000) : timeout_ms_(timeout_ms) {
        using namespace valar::detail;
        auto poller = Poller::open();
        auto socket = Socket::connect(*NetAddress::parse("127.0.0.1", port));
        if (!poller || !socket) return;
        poller_ = std::make_unique<Poller>(std::move(*poller));
        socket_ = std::move(*socket);
        if (!wait(poll_write) || socket_.connected() != IoStatus::done) socket_.close();
    }

    /// Told of every reply, when a test wants to know them all.
    static inline void (*seen)(int status) = nullptr;

    bool connected() const { return socket_.is_open(); }

    bool send(std::string_view bytes) {
        while (!bytes.empty()) {
            const auto sent = socket_.write(bytes);
            if (sent.status == valar::detail::IoStatus::closed) return false;
            bytes.remove_prefix(sent.bytes);
            if (!bytes.empty() && !wait(valar::detail::poll_write)) return false;
        }
        return true;
    }

    void end() { socket_.shutdown_write(); }

    /// The next reply, 100 Continue included; status 0 when the stream ended or time ran out.
    valar::HttpReply reply(bool to_head = false) {
        valar::detail::HttpParser parser(&limits_, valar::detail::HttpParser::Side::reply);
        if (to_head) parser.expect_no_body();
        for (;;) {
            size_t used = 0;
            const auto event = parser.feed(input_, &used);
            input_.erase(0, used);
            if (event == valar::detail::HttpParser::Event::complete && seen) seen(parser.status());
            if (event == valar::detail::HttpParser::Event::complete)
                return {parser.status(), std::move(parser.message.headers),
                        std::move(parser.message.body), false};
            if (event == valar::detail::HttpParser::Event::fault) return {0, {}, "", true};
            if (event == valar::detail::HttpParser::Event::more && !fill())
                return {0, {}, "", true};
        }
    }

    /// All that comes until the server ends the stream; "(timeout)" at its end if it does not.
    std::string rest() {
        while (fill()) {}
        return closed_ ? input_ : input_ + "(timeout)";
    }

    /// What comes up to and with `mark`, or until the stream ends or time runs out.
    std::string until(std::string_view mark) {
        while (input_.find(mark) == input_.npos && fill()) {}
        const size_t found = input_.find(mark);
        std::string taken = input_.substr(0, found == input_.npos ? found : found + mark.size());
        input_.erase(0, taken.size());
        return taken;
    }

    /// So many bytes, or fewer when the stream ends or time runs out. What is left is not read.
    std::string take(size_t count) {
        std::string taken = input_.substr(0, count);
        input_.erase(0, taken.size());
        while (taken.size() < count && !closed_ && wait(valar::detail::poll_read)) {
            char bytes[4096];
            const auto got = socket_.read(bytes, std::min(sizeof bytes, count - taken.size()));
            closed_ = got.status == valar::detail::IoStatus::closed;
            taken.append(bytes, got.bytes);
        }
        return taken;
    }

    /// Takes at most 16 KiB of what is there; true at the end of the stream.
    bool ended_after_some() {
        fill();
        input_.clear();
        return closed_;
    }

    /// True when the server ends the stream without another byte.
    bool ended() { return rest().empty(); }

private:
    bool wait(unsigned interest) {
        std::vector<valar::detail::PollEvent> events;
        const uint64_t limit = valar::detail::monotonic_ns() +
                               static_cast<uint64_t>(timeout_ms_) * 1'000'000;
        while (valar::detail::monotonic_ns() < limit) {
            if (!poller_->set(socket_, 1, interest) || !poller_->wait(timeout_ms_, &events))
                return false;
            if (!events.empty()) return true;
        }
        return false;
    }

    bool fill() {
        char bytes[16 << 10];
        while (!closed_ && wait(valar::detail::poll_read)) {
            const auto got = socket_.read(bytes, sizeof bytes);
            closed_ = got.status == valar::detail::IoStatus::closed;
            constexpr size_t longest_name = 4096;  // that may have come in two pieces
            const size_t before = input_.size();
            input_.append(bytes, got.bytes);
            check_names_no_directory(
                std::string_view(input_).substr(before - std::min(before, longest_name)));
            if (got.bytes > 0) return true;
        }
        return false;
    }

    valar::detail::Socket socket_;
    std::unique_ptr<valar::detail::Poller> poller_;
    valar::detail::HttpLimits limits_ = {.max_body_bytes = uint64_t{256} << 20};
    std::string input_;
    int timeout_ms_;
    bool closed_ = false;
};

/// Runs a stream through the parser, cut where `next_piece(left)` says, and tells what was found:
/// "GET /x host keep body=0:;" for each message, then "fault 400", "more" or "".
template <class NextPiece>
std::string describe_http(std::string_view bytes, valar::detail::HttpParser::Side side,
                          const valar::detail::HttpLimits& limits, NextPiece next_piece) {
    using valar::detail::HttpParser;
    HttpParser parser(&limits, side);
    std::string found;
    bool open = false;
    while (!bytes.empty()) {
        std::string_view piece = bytes.substr(0, std::max<size_t>(1, next_piece(bytes.size())));
        bytes.remove_prefix(piece.size());
        for (bool more = false; !more;) {
            size_t used = 0;
            const HttpParser::Event event = parser.feed(piece, &used);
            piece.remove_prefix(used);
            open = event != HttpParser::Event::complete || !piece.empty();
            const auto& message = parser.message;
            switch (event) {
                case HttpParser::Event::more: more = true; break;
                case HttpParser::Event::fault:
                    return found + "fault " + std::to_string(parser.status());
                case HttpParser::Event::head:
                    found += side == HttpParser::Side::reply
                                 ? std::to_string(parser.status())
                                 : message.method + " " + message.target;
                    found += " " + message.host + (message.keep_alive ? " keep" : " close");
                    if (message.expect_continue) found += " expect";
                    break;
                case HttpParser::Event::complete:
                    found += " " + std::to_string(message.headers.size()) +
                             " fields, body=" + message.body + ";";
                    parser.reset();
                    more = piece.empty();
            }
        }
    }
    if (side == HttpParser::Side::reply && open)
        return parser.end() == HttpParser::Event::complete
                   ? found + " body=" + parser.message.body + ";"
                   : found + "cut";
    return open ? found + "more" : found;
}

#endif

#include "prologue.hpp"

#include "http/client.hpp"
#include "http/text.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
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

constexpr uint32_t http_reply_head_bytes = 64 << 10;

/// `host`: what the header Host is to say where the call does not.
Result<std::string> http_render_call(const HttpCall& call, const std::string& host) {
    const auto refuse = [](const char* what) {
        return make_error(ErrorKind::invalid_request, what);
    };
    if (!http_all(call.method, http_token)) return refuse("the method is not a token");
    if (!http_all(call.target, http_visible)) return refuse("the target holds invalid characters");
    for (const auto& field : call.headers)
        if (!http_field_ok(field)) return refuse("a header field holds invalid characters");
    std::string out;
    http_append(&out, {call.method, " ", call.target, " HTTP/1.1\r\nConnection: close\r\n"});
    if (!find_header(call.headers, "Host")) http_append(&out, {"Host: ", host, "\r\n"});
    if (!call.body.empty() || call.method == "POST" || call.method == "PUT")
        http_append(&out, {"Content-Length: ", std::to_string(call.body.size()), "\r\n"});
    http_append_fields(&out, call.headers);
    return out += "\r\n";
}

}  // namespace

/// One call in progress: sends while it can, reads all along, because a server may refuse early.
struct HttpClient::Exchange {
    Exchange(HttpErrand given, HttpCaller* who, uint64_t id, uint64_t now)
        : errand(std::move(given)),
          caller(who),
          number(id),
          deadline(now + static_cast<uint64_t>(std::max(errand.call.timeout_ms, 0))),
          parser(&limits, HttpParser::Side::reply) {
        limits.max_head_bytes = http_reply_head_bytes;
        limits.max_body_bytes = errand.call.max_reply_bytes;
        reset_parser();
    }
    HttpErrand errand;
    HttpCaller* caller;
    uint64_t number, deadline;
    uint64_t next_address_at = http_no_deadline;  // while it connects
    HttpLimits limits;
    HttpParser parser;
    std::string head;
    std::vector<NetAddress> addresses;  // not tried yet, the next one last
    std::string peer = {};
    std::optional<Error> failed = {};  // before it began
    Socket socket = {};
    size_t sent = 0;
    unsigned interest = 0;
    bool connected = false;
    bool has_head = false;  // of the reply
    int status = 0;         // likewise

    size_t unsent() const { return head.size() + errand.call.body.size() - sent; }

    void reset_parser() {
        parser.reset();
        if (errand.call.method == "HEAD") parser.expect_no_body();
    }

    void write() {
        const std::string_view all = head;
        const std::string_view first = all.substr(std::min(sent, all.size()));
        const size_t from = sent - (head.size() - first.size());
        const IoResult io = socket.write(first, std::string_view(errand.call.body).substr(from));
        // A server that refuses may stop reading; its reply may be on the way all the same.
        sent = io.status == IoStatus::closed ? head.size() + errand.call.body.size()
                                             : sent + io.bytes;
    }

    /// complete, more, or fault.
    HttpParser::Event read() {
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
            if (parser.status() / 100 == 1) {
                reset_parser();
                continue;
            }
            has_head = true;
            status = parser.status();
        }
    }

    HttpReply reply() {
        HttpRequest& message = parser.message;
        return {status, std::move(message.headers), std::move(message.body), true};
    }
    /// What is known of it where it cannot go on.
    Result<HttpReply> give_up(ErrorKind kind, std::string why) {
        if (has_head && errand.head_is_enough) return HttpReply{status, {}, {}, true};
        return make_error(kind, std::move(why));
    }
};

/// Names one after the other, since the system's call cannot be broken off. Its thread sees nothing
/// of the client but this.
struct HttpClient::Resolver {
    struct Name {
        uint64_t number = 0;  // of the exchange
        std::string host = {};
        uint16_t port = 0;
        Result<std::vector<NetAddress>> addresses = std::vector<NetAddress>();
    };
    Resolver(HttpResolve how, Poller* whom) : resolve(how), poller(whom) {}
    HttpResolve resolve;
    Poller* poller;
    std::mutex mutex;  // guards the three below
    std::condition_variable waiting;
    std::deque<Name> asked, found;
    bool ending = false;
    Thread thread;

    static void run(void* self) { static_cast<Resolver*>(self)->run(); }
    void run() {
        for (;;) {
            Name name;
            {
                std::unique_lock<std::mutex> lock(mutex);
                waiting.wait(lock, [&] { return ending || !asked.empty(); });
                if (ending) return;
                name = std::move(asked.front());
                asked.pop_front();
            }
            name.addresses = resolve(name.host, name.port);
            {
                const std::lock_guard<std::mutex> lock(mutex);
                found.push_back(std::move(name));
            }
            poller->wake();
        }
    }
};

HttpClient::HttpClient(Poller* poller, HttpResolve resolve)
    : poller_(poller), resolve_(resolve), now_(http_now_ms()) {}

HttpClient::~HttpClient() {
    for (const auto& exchange : exchanges_)
        if (exchange->socket.is_open()) poller_->remove(exchange->socket);
    if (!resolver_) return;
    {
        const std::lock_guard<std::mutex> lock(resolver_->mutex);
        resolver_->ending = true;
    }
    resolver_->waiting.notify_one();
    resolver_->thread.join();
}

uint64_t HttpClient::start(HttpErrand errand, HttpCaller* caller) {
    now_ = http_now_ms();
    exchanges_.push_back(std::make_unique<Exchange>(std::move(errand), caller, ++serial_, now_));
    Exchange& exchange = *exchanges_.back();
    const HttpCall& call = exchange.errand.call;
    const auto begin = [&]() -> Result<void> {
        const auto path = unix_path(call.host);
        NetAddress local;
        local.local = true;
        auto address = path ? Result<NetAddress>(local) : NetAddress::parse(call.host, call.port);
        auto head = http_render_call(call, path      ? "localhost"
                                           : address ? address->text()
                                                     : call.host);
        if (!head) return head.error();
        exchange.head = std::move(*head);
        if (address) {
            exchange.addresses = {*address};
            return {};
        }
        if (!resolver_) {
            resolver_ = std::make_unique<Resolver>(resolve_, poller_);
            auto thread = Thread::start(&Resolver::run, resolver_.get(), "valar resolver");
            if (!thread) resolver_.reset();
            if (!thread) return thread.error();
            resolver_->thread = std::move(*thread);
        }
        const std::lock_guard<std::mutex> lock(resolver_->mutex);
        resolver_->asked.push_back({exchange.number, call.host, call.port});
        resolver_->waiting.notify_one();
        return {};
    };
    if (auto begun = begin(); !begun) exchange.failed = begun.error();
    // What is known already is told from step(), never from here.
    if (exchange.failed || !exchange.addresses.empty()) exchange.next_address_at = now_;
    return exchange.number;
}

uint64_t HttpClient::deadline() const {
    uint64_t next = http_no_deadline;
    for (const auto& exchange : exchanges_)
        next = std::min(next, std::min(exchange->deadline, exchange->next_address_at));
    return next;
}

void HttpClient::step(uint64_t now_ms) {
    now_ = now_ms;
    take_addresses();
    std::vector<uint64_t> due;
    for (const auto& exchange : exchanges_)
        if (std::min(exchange->deadline, exchange->next_address_at) <= now_)
            due.push_back(exchange->number);
    for (const uint64_t number : due) {
        const auto found = std::find_if(exchanges_.begin(), exchanges_.end(),
                                        [&](const auto& one) { return one->number == number; });
        if (found == exchanges_.end()) continue;
        Exchange& exchange = **found;
        if (exchange.failed) finish(exchange, *exchange.failed);
        else if (exchange.deadline > now_) dial(exchange);
        else
            finish(exchange, exchange.give_up(ErrorKind::timeout,
                                              "no complete reply from " +
                                                  (exchange.peer.empty() ? exchange.errand.call.host
                                                                         : exchange.peer)));
    }
}

void HttpClient::take_addresses() {
    if (!resolver_) return;
    std::deque<Resolver::Name> names;
    {
        const std::lock_guard<std::mutex> lock(resolver_->mutex);
        names.swap(resolver_->found);
    }
    for (Resolver::Name& name : names)
        for (const auto& exchange : exchanges_) {
            if (exchange->number != name.number) continue;
            if (!name.addresses) exchange->failed = name.addresses.error();
            else exchange->addresses.assign(name.addresses->rbegin(), name.addresses->rend());
            exchange->next_address_at = now_;
        }
}

/// Connects to the next address that may be called.
void HttpClient::dial(Exchange& exchange) {
    const HttpCall& call = exchange.errand.call;
    const NetPolicy* policy = exchange.errand.policy;
    if (exchange.socket.is_open()) poller_->remove(exchange.socket);
    exchange.socket.close();
    while (!exchange.addresses.empty()) {
        const NetAddress address = exchange.addresses.back();
        exchange.addresses.pop_back();
        if (policy && !policy->allows(address)) continue;
        const auto path = unix_path(call.host);
        auto socket = path ? Socket::connect_unix(*path) : Socket::connect(address);
        exchange.peer = address.text();
        if (!socket) continue;
        exchange.socket = std::move(*socket);
        exchange.interest = 0;
        exchange.next_address_at = now_ + http_connect_ms;
        return watch(exchange);
    }
    if (exchange.peer.empty())
        return finish(exchange, make_error(ErrorKind::permission, "blocked: " + call.host));
    finish(exchange, make_error(ErrorKind::io, "cannot connect to " + exchange.peer));
}

void HttpClient::watch(Exchange& exchange) {
    unsigned interest = exchange.connected ? poll_read : poll_write;
    if (exchange.unsent() > 0) interest |= poll_write;
    if (interest == exchange.interest) return;
    exchange.interest = interest;
    auto watched = poller_->set(exchange.socket, http_client_tag | exchange.number, interest);
    if (!watched) finish(exchange, watched.error());
}

void HttpClient::on_event(const PollEvent& event) {
    const auto found = std::find_if(exchanges_.begin(), exchanges_.end(), [&](const auto& one) {
        return one->number == (event.tag & ~http_client_tag);
    });
    if (found == exchanges_.end()) return;  // ended earlier in this turn
    Exchange& exchange = **found;
    if (!exchange.connected) {
        now_ = http_now_ms();
        if (exchange.socket.connected() != IoStatus::done) return dial(exchange);
        exchange.connected = true;
        exchange.next_address_at = http_no_deadline;
        exchange.write();
        return watch(exchange);
    }
    if (event.writable && exchange.unsent() > 0) exchange.write();
    if (!event.readable && !event.hangup) return watch(exchange);
    switch (exchange.read()) {
        case HttpParser::Event::complete: return finish(exchange, exchange.reply());
        case HttpParser::Event::fault:
            return finish(
                exchange,
                exchange.give_up(
                    exchange.parser.status() == 413 ? ErrorKind::too_large : ErrorKind::bad_data,
                    "reply from " + exchange.peer + ": " + std::string(exchange.parser.reason())));
        default: return watch(exchange);
    }
}

/// The last of an exchange: its caller may start another one.
void HttpClient::finish(Exchange& exchange, Result<HttpReply> reply) {
    if (exchange.socket.is_open()) poller_->remove(exchange.socket);
    const auto place = std::find_if(exchanges_.begin(), exchanges_.end(),
                                    [&](const auto& one) { return one.get() == &exchange; });
    const std::unique_ptr<Exchange> ended = std::move(*place);
    exchanges_.erase(place);
    ended->caller->on_reply(ended->number, std::move(reply));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

Result<HttpReply> http_call(const HttpCall& call) {
    using namespace detail;
    if (!unix_path(call.host))  // names are for those who say which addresses may be called
        if (auto address = NetAddress::parse(call.host, call.port); !address)
            return address.error();
    struct Caller : HttpCaller {
        std::optional<Result<HttpReply>> ended;
        void on_reply(uint64_t, Result<HttpReply> reply) override { ended = std::move(reply); }
    } caller;
    auto poller = Poller::open();
    if (!poller) return poller.error();
    HttpClient client(&*poller);
    client.start({call}, &caller);
    std::vector<PollEvent> events;
    for (;;) {
        const uint64_t now = http_now_ms();
        client.step(now);
        if (caller.ended) return std::move(*caller.ended);
        const uint64_t next = client.deadline();
        const int wait_ms = static_cast<int>(
            std::min<uint64_t>(next > now ? next - now : 0, 60'000));
        auto waited = poller->wait(wait_ms, &events);
        if (!waited) return waited.error();
        for (const PollEvent& event : events) client.on_event(event);
    }
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

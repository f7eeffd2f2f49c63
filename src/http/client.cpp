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
Result<std::string> http_render_call(const HttpCall& call, const std::string& host,
                                     bool keeps_alive) {
    const auto refuse = [](const char* what) {
        return make_error(ErrorKind::invalid_request, what);
    };
    if (!http_all(call.method, http_token)) return refuse("the method is not a token");
    if (!http_all(call.target, http_visible)) return refuse("the target holds invalid characters");
    for (const auto& field : call.headers)
        if (!http_field_ok(field)) return refuse("a header field holds invalid characters");
    std::string out;
    http_append(&out, {call.method, " ", call.target, " HTTP/1.1\r\n"});
    if (!keeps_alive) out += "Connection: close\r\n";
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
    HttpCaller* caller;  // null: cancelled
    uint64_t number, deadline;
    uint64_t silent_at = http_no_deadline;
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
    bool reused = false;     // a connection that another one had
    bool answered = false;   // there are bytes of a reply
    bool has_head = false;   // of the reply
    int status = 0;          // likewise
    bool left_over = false;  // bytes came behind the reply
    uint64_t streamed = 0;   // bytes of its body that the caller has

    uint64_t due() const { return std::min({deadline, silent_at, next_address_at}); }
    void listen(uint64_t now) {
        if (errand.silence_timeout_ms > 0) silent_at = now + errand.silence_timeout_ms;
    }
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
    HttpParser::Event read(uint64_t now) {
        char bytes[16 << 10];
        const IoResult io = socket.read(bytes, sizeof bytes);
        if (io.status == IoStatus::again) return HttpParser::Event::more;
        if (io.status != IoStatus::done) return parser.end();
        answered = true;
        listen(now);
        std::string_view rest(bytes, io.bytes);
        for (;;) {
            size_t used = 0;
            const HttpParser::Event event = parser.feed(rest, &used);
            rest.remove_prefix(used);
            if (event != HttpParser::Event::head) {
                pass_on();
                left_over = !rest.empty();
                return event;
            }
            if (parser.status() / 100 == 1) {
                reset_parser();
                continue;
            }
            has_head = true;
            status = parser.status();
        }
    }

    /// What there is of the body goes to the caller of an errand that streams.
    void pass_on() {
        std::string& body = parser.message.body;
        if (!errand.streams || !has_head || body.empty()) return;
        streamed += body.size();
        if (caller && !is_too_long()) caller->on_piece(number, status, body);
        body.clear();
    }
    bool is_too_long() const { return streamed > errand.call.max_reply_bytes; }

    /// Whether another one can follow on its connection.
    bool ends_alone() const {
        const HttpRequest& message = parser.message;
        return errand.keeps_alive && unsent() == 0 && !left_over && !message.http_1_0 &&
               (message.chunked || message.content_length) &&
               !http_listed(message.headers, "Connection", "close");
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

/// A connection that is open, and that nothing is asked on now.
struct HttpClient::Unused {
    uint64_t number, until;  // of the exchange that had it; when it is closed
    std::string host;
    uint16_t port;
    const NetPolicy* policy;  // that let it be dialled
    std::string peer;
    Socket socket;
};

HttpClient::HttpClient(Poller* poller, HttpResolve resolve)
    : poller_(poller), resolve_(resolve), now_(http_now_ms()) {}

HttpClient::~HttpClient() {
    for (const auto& exchange : exchanges_)
        if (exchange->socket.is_open()) poller_->remove(exchange->socket);
    for (const Unused& unused : unused_) poller_->remove(unused.socket);
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
    exchange.listen(now_);
    begin(exchange);
    return exchange.number;
}

void HttpClient::begin(Exchange& exchange) {
    if (auto begun = locate(exchange); !begun) exchange.failed = begun.error();
    // What is known already is told from step(), never from here.
    if (exchange.failed || !exchange.addresses.empty()) exchange.next_address_at = now_;
}

void HttpClient::cancel(uint64_t call) {
    Exchange* exchange = find(call);
    if (!exchange) return;
    exchange->caller = nullptr;
    exchange->deadline = 0;
}

HttpClient::Exchange* HttpClient::find(uint64_t number) const {
    const auto found = std::lower_bound(
        exchanges_.begin(), exchanges_.end(), number,
        [](const auto& exchange, uint64_t wanted) { return exchange->number < wanted; });
    return found != exchanges_.end() && (*found)->number == number ? found->get() : nullptr;
}

/// Writes its head, and finds out its addresses or asks for them.
Result<void> HttpClient::locate(Exchange& exchange) {
    const HttpCall& call = exchange.errand.call;
    const auto path = unix_path(call.host);
    NetAddress local;
    local.local = true;
    auto address = path ? Result<NetAddress>(local) : NetAddress::parse(call.host, call.port);
    auto head = http_render_call(call,
                                 path      ? "localhost"
                                 : address ? address->text()
                                           : call.host,
                                 exchange.errand.keeps_alive);
    if (!head) return head.error();
    exchange.head = std::move(*head);
    if (take_unused(exchange)) return {};
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
}

uint64_t HttpClient::deadline() const {
    uint64_t next = http_no_deadline;
    for (const auto& exchange : exchanges_) next = std::min(next, exchange->due());
    for (const Unused& unused : unused_) next = std::min(next, unused.until);
    return next;
}

void HttpClient::step(uint64_t now_ms) {
    now_ = now_ms;
    take_addresses();
    close_unused([&](const Unused& unused) { return unused.until <= now_; });
    std::vector<uint64_t> due;
    for (const auto& exchange : exchanges_)
        if (exchange->due() <= now_) due.push_back(exchange->number);
    for (const uint64_t number : due) {
        Exchange* exchange = find(number);
        if (!exchange) continue;
        if (exchange->failed) finish(*exchange, *exchange->failed);
        else if (std::min(exchange->deadline, exchange->silent_at) > now_) dial(*exchange);
        else
            finish(*exchange,
                   exchange->give_up(
                       ErrorKind::timeout,
                       "no complete reply from " +
                           (exchange->peer.empty() ? exchange->errand.call.host : exchange->peer)));
    }
}

void HttpClient::take_addresses() {
    if (!resolver_) return;
    std::deque<Resolver::Name> names;
    {
        const std::lock_guard<std::mutex> lock(resolver_->mutex);
        names.swap(resolver_->found);
    }
    for (Resolver::Name& name : names) {
        Exchange* exchange = find(name.number);
        if (!exchange) continue;
        if (!name.addresses) exchange->failed = name.addresses.error();
        else exchange->addresses.assign(name.addresses->rbegin(), name.addresses->rend());
        exchange->next_address_at = now_;
    }
}

// ---- Connections ---------------------------------------------------------------------------------

template <class Which>
void HttpClient::close_unused(const Which& which) {
    std::erase_if(unused_, [&](const Unused& unused) {
        if (!which(unused)) return false;
        poller_->remove(unused.socket);
        return true;
    });
}

/// Whether there is an open connection to where it goes, on which it is then sent.
bool HttpClient::take_unused(Exchange& exchange) {
    const HttpErrand& errand = exchange.errand;
    const auto found = std::find_if(unused_.rbegin(), unused_.rend(), [&](const Unused& unused) {
        return errand.keeps_alive && unused.host == errand.call.host &&
               unused.port == errand.call.port && unused.policy == errand.policy;
    });
    if (found == unused_.rend()) return false;
    exchange.socket = std::move(found->socket);
    exchange.peer = std::move(found->peer);
    unused_.erase(std::next(found).base());
    exchange.connected = exchange.reused = true;
    exchange.write();
    watch(exchange);
    return true;
}

void HttpClient::leave_open(Exchange& exchange) {
    if (unused_.size() >= http_most_unused)
        close_unused([&](const Unused& unused) { return &unused == &unused_.front(); });
    const HttpErrand& errand = exchange.errand;
    if (!poller_->set(exchange.socket, http_client_tag | exchange.number, poll_read)) return;
    unused_.push_back({exchange.number, now_ + http_unused_ms, errand.call.host, errand.call.port,
                       errand.policy, exchange.peer, std::move(exchange.socket)});
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
    if (watched) return;
    exchange.failed = watched.error();  // told from step()
    exchange.next_address_at = now_;
}

void HttpClient::on_event(const PollEvent& event) {
    const uint64_t number = event.tag & ~http_client_tag;
    Exchange* found = find(number);
    // Without an exchange the peer closed what nobody uses; or it ended earlier in this turn.
    if (!found) return close_unused([&](const Unused& unused) { return unused.number == number; });
    Exchange& exchange = *found;
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
    const HttpParser::Event read = exchange.read(
        exchange.errand.silence_timeout_ms > 0 ? http_now_ms() : now_);
    if (exchange.is_too_long())
        return finish(exchange, make_error(ErrorKind::too_large,
                                           "reply from " + exchange.peer + ": it is too long"));
    switch (read) {
        case HttpParser::Event::complete:
            if (exchange.ends_alone()) leave_open(exchange);
            return finish(exchange, exchange.reply());
        case HttpParser::Event::fault: return lose(exchange);
        default: return watch(exchange);
    }
}

/// What came is no reply, or ended before its end. A connection that was left open may have been
/// closed meanwhile: that says nothing of the server.
void HttpClient::lose(Exchange& exchange) {
    if (!exchange.reused || exchange.answered)
        return finish(
            exchange,
            exchange.give_up(
                exchange.parser.status() == 413 ? ErrorKind::too_large : ErrorKind::bad_data,
                "reply from " + exchange.peer + ": " + std::string(exchange.parser.reason())));
    poller_->remove(exchange.socket);
    exchange.socket.close();
    close_unused([&](const Unused& unused) {
        return unused.host == exchange.errand.call.host && unused.port == exchange.errand.call.port;
    });
    exchange.connected = exchange.reused = false;
    exchange.sent = 0;
    exchange.interest = 0;
    exchange.reset_parser();
    begin(exchange);
}

/// The last of an exchange: its caller may start another one.
void HttpClient::finish(Exchange& exchange, Result<HttpReply> reply) {
    if (exchange.socket.is_open()) poller_->remove(exchange.socket);
    const auto place = std::find_if(exchanges_.begin(), exchanges_.end(),
                                    [&](const auto& one) { return one.get() == &exchange; });
    const std::unique_ptr<Exchange> ended = std::move(*place);
    exchanges_.erase(place);
    if (ended->caller) ended->caller->on_reply(ended->number, std::move(reply));
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

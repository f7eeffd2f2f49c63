#include "prologue.hpp"

#include "http/client.hpp"
#include "http/text.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
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
namespace detail {

// ---- The server ------------------------------------------------------------------------------

namespace {

constexpr size_t http_read_bytes = 64 << 10;    // one read; so much may be kept for later
constexpr size_t http_write_bytes = 256 << 10;  // one write, so that no reply holds the loop
constexpr size_t http_kept_bytes = http_write_bytes / 16;  // sent, and not yet moved out
constexpr size_t http_pipelined_bytes = 16 << 10;  // read ahead of a reply; then no more is read
constexpr int http_accepts_a_turn = 64;
constexpr uint32_t http_accept_pause_ms = 100;  // after running out of descriptors
constexpr uint64_t http_timer_grain_ms = 10;    // the deadlines are looked through no more often
constexpr uint64_t http_goodbye_ms = 500;  // after stop: for requests that are on their way to us
constexpr uint64_t http_last_ms = 1'000;   // after drain_timeout_ms: for the last replies to leave
constexpr size_t http_spares = 8;          // kept to turn clients away when no other is free
constexpr size_t http_most_turned_away = 64;   // at once, and listened to until they are gone
constexpr uint32_t http_turned_away_ms = 500;  // at most
constexpr uint32_t http_fresh_ms = 1000;  // for a new connection to ask before it counts as idle
constexpr uint64_t http_never = UINT64_MAX;
constexpr uint64_t http_listener_tag = 0;
constexpr int http_slot_bits = 24;  // of an id; the rest is a serial number from 1
constexpr uint64_t http_slot_mask = (1u << http_slot_bits) - 1;

}  // namespace

enum class HttpPhase : uint8_t {
    idle,    // between requests: nothing is held
    head,    // reading a head
    body,    // reading a body
    work,    // the handler has the request
    reply,   // writing
    stream,  // all of a begun reply is sent that there is
    queued,  // bytes of the next request are held; it is taken up in the next turn
    linger,  // our end of stream is sent; reading what still comes, so that it is no reset
};

/// How long a connection may be in a phase; in the others it waits for us, without a limit.
struct HttpPhaseLimit {
    HttpPhase phase;
    uint32_t HttpOptions::*limit;
};
constexpr HttpPhaseLimit http_phase_limits[] = {
    {HttpPhase::idle, &HttpOptions::idle_timeout_ms},
    {HttpPhase::head, &HttpOptions::header_timeout_ms},
    {HttpPhase::body, &HttpOptions::body_timeout_ms},
    {HttpPhase::reply, &HttpOptions::write_timeout_ms},
    {HttpPhase::linger, &HttpOptions::linger_timeout_ms},
};

/// What a connection needs only while bytes of it are here.
struct HttpActive {
    explicit HttpActive(const HttpLimits* limits) : parser(limits) {}
    HttpParser parser;
    std::string input;  // pipelined bytes
    std::string head, body;
    size_t sent = 0;
    bool blocked = false;  // the socket took no more: wait until it does
    // Of a begun reply http_write_bytes or more stood unsent: who appends may wait for them, and they
    // have to be gone by then.
    uint64_t full_until = http_never;
};

struct HttpConnection {
    Socket socket;
    NetAddress peer;
    HttpPhase phase = HttpPhase::idle;
    uint8_t interest = 0;
    bool keep_alive = false;  // of the request in hand
    bool head_only = false;
    bool http_1_0 = false;
    bool peer_closed = false;
    bool fresh = true;         // asked nothing yet
    bool turned_away = false;  // answered before it asked: there was no room
    bool begun = false;        // the reply comes in pieces, and is not ended
    bool unsent = false;       // is in the list of connections to be written to
    uint64_t id = 0;
    uint64_t exchange = 0;    // accepted by on_head, neither answered nor closed
    uint64_t body_bytes = 0;  // counted against max_inflight_body_bytes
    uint64_t window = 0;      // bytes since body_timeout_ms began
    std::unique_ptr<HttpActive> active;
};
static_assert(sizeof(HttpConnection) <= 256, "an idle connection must stay cheap");

struct HttpSlot {
    std::unique_ptr<HttpConnection> connection;
    uint64_t deadline = http_never;
    bool idle = false;
};

struct HttpMessage {  // to the loop: a reply, or a call when function is set
    uint64_t exchange = 0;
    HttpReply reply = {};
    void (*function)(void*) = nullptr;
    void* context = nullptr;
};

struct HttpServer::State {
    State(const HttpOptions& given, HttpHandler* user, Poller made, Socket bound)
        : options(given),
          handler(user),
          poller(std::move(made)),
          listener(std::move(bound)),
          client(&poller, given.resolve) {}

    HttpOptions options;
    HttpHandler* handler;
    Poller poller;
    Socket listener;
    HttpClient client;
    NetAddress address;
    Stats stats;
    std::vector<Socket> spares;
    size_t turned_away = 0;  // of stats.connections

    std::vector<HttpSlot> slots;
    std::vector<uint32_t> free_slots;
    std::vector<uint64_t> queue;   // connections with pipelined bytes
    std::vector<uint64_t> unsent;  // and those with pieces that came in this turn
    std::vector<PollEvent> events;
    std::vector<char> scratch = std::vector<char>(http_read_bytes);
    uint64_t serial = 0;
    uint64_t now = http_now_ms();
    uint64_t next_timer = http_never;
    uint64_t next_tick = http_never;
    uint64_t accept_again = http_never;
    uint64_t drain_until = http_never;  // set once stopping
    std::string socket_path;            // of a Unix socket
    uint64_t socket_file = 0;
    bool drained = false;  // the handler was told; the last replies leave
    bool finished = false;
    std::string date;
    int64_t date_second = -1;

    std::mutex mutex;  // guards the three below
    std::vector<HttpMessage> inbox;
    bool stop_asked = false, stop_at_once = false;
    std::atomic<bool> sleeping = false;  // a sender has to wake the loop; set under mutex

    ~State() { remove_socket_file(socket_path, socket_file); }
    bool step(int timeout_ms);
    int wait_ms(int timeout_ms);
    void send_message(HttpMessage message);
    void ask_stop(bool at_once);
    void take_messages();
    void run_queue();
    void run_timers();
    void on_deadline(HttpConnection& connection);
    void begin_drain();
    void drain();
    bool is_sending() const;

    void accept_some();
    void admit(Socket socket, const NetAddress& peer, bool no_descriptor);
    HttpConnection& add(Socket socket, const NetAddress& peer);
    void turn_away(Socket socket, const NetAddress& peer, bool no_descriptor);
    void fill_spares();
    bool evict_idle();
    void drop(HttpConnection& connection);
    HttpConnection* find(uint64_t id);
    HttpSlot& slot(const HttpConnection& connection);
    HttpActive& active_of(HttpConnection& connection);
    void let_go(HttpConnection& connection);

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
    void start_reply(HttpConnection& connection, HttpReply reply, bool in_pieces);
    HttpConnection* find_begun(uint64_t exchange);
    void append(HttpConnection& connection, std::string_view bytes);
    void end(HttpConnection& connection);
    void await_piece(HttpConnection& connection);
    void flush_unsent();
    void enter(HttpConnection& connection, HttpPhase phase);
    void watch(HttpConnection& connection);
    void release_body(HttpConnection& connection);
    std::string render(const HttpConnection& connection, const HttpReply& reply, bool close,
                       bool in_pieces = false);
};

Result<HttpServer> HttpServer::open(const HttpOptions& options, HttpHandler* handler) {
    const auto path = unix_path(options.host);
    auto address = path ? Result<NetAddress>(NetAddress())
                        : NetAddress::parse(options.host, options.port);
    if (!address) return address.error();
    if (options.max_connections == 0 || options.max_connections >= 1u << http_slot_bits)
        return make_error(ErrorKind::invalid_request,
                          format("max_connections: %u is not in 1..%u", options.max_connections,
                                 (1u << http_slot_bits) - 1),
                          {}, "max_connections");
    auto listener = path ? Socket::listen_unix(*path, options.backlog)
                         : Socket::listen(*address, options.backlog);
    if (!listener) return listener.error();
    auto poller = Poller::open();
    if (!poller) return poller.error();
    auto bound = listener->local();
    if (!bound) return bound.error();
    auto state = std::make_unique<State>(options, handler, std::move(*poller),
                                         std::move(*listener));
    state->address = *bound;
    if (path) state->socket_path = *path, state->socket_file = socket_file(*path);
    if (options.tick_ms > 0) state->next_tick = state->now + options.tick_ms;
    auto watched = state->poller.set(state->listener, http_listener_tag, poll_read);
    if (!watched) return watched.error();
    state->fill_spares();
    return HttpServer(std::move(state));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}
HttpServer::HttpServer(HttpServer&& other) noexcept = default;
HttpServer& HttpServer::operator=(HttpServer&& other) noexcept = default;
HttpServer::~HttpServer() = default;

NetAddress HttpServer::address() const { return state_->address; }
HttpServer::Stats HttpServer::stats() const { return state_->stats; }
bool HttpServer::step(int timeout_ms) { return state_->step(timeout_ms); }
void HttpServer::stop(bool at_once) { state_->ask_stop(at_once); }
void HttpServer::reply(uint64_t exchange, HttpReply reply) {
    state_->send_message({exchange, std::move(reply), nullptr, nullptr});
}
void HttpServer::begin(uint64_t exchange, HttpReply reply) {
    HttpConnection* connection = state_->find(exchange);
    if (connection && connection->phase == HttpPhase::work)
        state_->start_reply(*connection, std::move(reply), true);
}
void HttpServer::append(uint64_t exchange, std::string_view bytes) {
    if (HttpConnection* connection = state_->find_begun(exchange))
        state_->append(*connection, bytes);
}
void HttpServer::end(uint64_t exchange) {
    if (HttpConnection* connection = state_->find_begun(exchange)) state_->end(*connection);
}
size_t HttpServer::unsent(uint64_t exchange) const {
    const HttpConnection* connection = state_->find_begun(exchange);
    if (!connection || !connection->active) return 0;
    const HttpActive& active = *connection->active;
    return active.head.size() + active.body.size() - active.sent;
}
uint64_t HttpServer::call(HttpErrand errand, HttpCaller* caller) {
    return state_->client.start(std::move(errand), caller);
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
    for (const PollEvent& event : events)
        event.tag& http_client_tag ? client.on_event(event) : on_event(event);
    client.step(now);
    run_queue();
    take_messages();
    run_timers();
    flush_unsent();
    drain();
    return !finished;
}

int HttpServer::State::wait_ms(int timeout_ms) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!queue.empty() || !unsent.empty() || !inbox.empty() || stop_asked) return 0;
    sleeping = true;
    const uint64_t next = std::min(
        {next_timer, next_tick, accept_again, drain_until, client.deadline()});
    if (next == http_never) return timeout_ms;
    const int until = static_cast<int>(std::min<uint64_t>(next > now ? next - now : 0, 60'000));
    return timeout_ms < 0 ? until : std::min(until, timeout_ms);
}

void HttpServer::State::send_message(HttpMessage message) {
    const std::lock_guard<std::mutex> lock(mutex);
    inbox.push_back(std::move(message));
    if (sleeping.exchange(false)) poller.wake();
}

void HttpServer::State::ask_stop(bool at_once) {
    const std::lock_guard<std::mutex> lock(mutex);
    stop_asked = true;
    stop_at_once |= at_once;
    if (sleeping.exchange(false)) poller.wake();
}

void HttpServer::State::take_messages() {
    std::vector<HttpMessage> taken;
    bool stop = false, at_once = false;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        taken.swap(inbox);
        stop = std::exchange(stop_asked, false);
        at_once = stop_at_once;
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
    if (stop && drain_until == http_never) begin_drain();
    if (stop && at_once) drain_until = std::min(drain_until, now);
}

/// Nobody who was connected is lost: whose request comes now is answered, if only with a refusal.
void HttpServer::State::begin_drain() {
    drain_until = now + options.drain_timeout_ms;
    for (int left = options.backlog; left > 0; left -= http_accepts_a_turn) accept_some();
    remove_socket_file(socket_path, std::exchange(socket_file, 0));
    poller.remove(listener);
    listener.close();
    accept_again = http_never;
    for (HttpSlot& entry : slots)
        if (entry.connection && entry.idle) enter(*entry.connection, HttpPhase::idle);
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
    if (drain_until == http_never) return;
    if (!drained && stats.connections > 0 && now < drain_until) return;
    if (!std::exchange(drained, true)) {
        drain_until = now + http_last_ms;
        for (HttpSlot& entry : slots)  // what is still coming
            if (entry.connection && (entry.connection->phase == HttpPhase::head ||
                                     entry.connection->phase == HttpPhase::body))
                refuse(*entry.connection, 503, "overloaded", "the server is shutting down");
        handler->on_drained();
        take_messages();
        flush_unsent();
    }
    if (now < drain_until && is_sending()) return;
    for (HttpSlot& entry : slots)
        if (entry.connection) drop(*entry.connection);
    finished = true;
}

bool HttpServer::State::is_sending() const {
    for (const HttpSlot& entry : slots)
        if (entry.connection && entry.connection->phase == HttpPhase::reply) return true;
    return false;
}

// Connections.

/// Where no descriptor is free, one that was kept for this tells whether anybody waits at all: Linux
/// says so only with a descriptor in hand.
void HttpServer::State::accept_some() {
    fill_spares();
    for (int i = 0; i < http_accepts_a_turn && listener.is_open(); ++i) {
        Socket socket;
        NetAddress peer;
        IoStatus status = listener.accept(&socket, &peer);
        bool no_descriptor = status == IoStatus::full;
        if (no_descriptor && (!spares.empty() || evict_idle())) {
            if (spares.empty()) no_descriptor = false;
            else spares.pop_back();
            status = listener.accept(&socket, &peer);
        }
        if (status == IoStatus::done) admit(std::move(socket), peer, no_descriptor);
        fill_spares();
        if (status == IoStatus::again) return;
        if (status == IoStatus::full || turned_away >= http_most_turned_away) {
            // The listener stays readable: to leave it watched would be a busy loop.
            (void)poller.set(listener, http_listener_tag, 0).ok();
            accept_again = now + http_accept_pause_ms;
            return;
        }
    }
}

void HttpServer::State::admit(Socket socket, const NetAddress& peer, bool no_descriptor) {
    ++stats.accepted;
    const bool room = !no_descriptor && stats.connections - turned_away < options.max_connections;
    if (room || evict_idle()) add(std::move(socket), peer);
    else turn_away(std::move(socket), peer, no_descriptor);
}

void HttpServer::State::fill_spares() {
    while (spares.size() < http_spares) {
        auto spare = Socket::spare();
        if (!spare) return;
        spares.push_back(std::move(*spare));
    }
}

HttpConnection& HttpServer::State::add(Socket socket, const NetAddress& peer) {
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
    return *slots[place].connection;
}

/// Too many connections, none of them idle. Its request is read and dropped, so that no reset
/// overtakes the reply.
void HttpServer::State::turn_away(Socket socket, const NetAddress& peer, bool no_descriptor) {
    ++(no_descriptor ? stats.no_descriptor : stats.no_room);
    const HttpReply reply = handler->on_full(no_descriptor);
    (void)socket.write(render({}, reply, true), reply.body);  // a new socket takes all of it
    socket.shutdown_write();
    HttpConnection& connection = add(std::move(socket), peer);
    connection.turned_away = true;
    ++turned_away;
    enter(connection, HttpPhase::linger);
    slot(connection).deadline = now + std::min(options.linger_timeout_ms, http_turned_away_ms);
    next_timer = std::min(next_timer, slot(connection).deadline);
}

/// Makes room by closing the connection that has been idle for longest. The request of a new one may
/// be on its way.
bool HttpServer::State::evict_idle() {
    HttpSlot* oldest = nullptr;
    const uint64_t fresh_until = now + options.idle_timeout_ms - http_fresh_ms;
    for (HttpSlot& entry : slots)
        if (entry.connection && entry.idle && (!oldest || entry.deadline < oldest->deadline) &&
            (!entry.connection->fresh || entry.deadline <= fresh_until))
            oldest = &entry;
    if (oldest) drop(*oldest->connection);
    return oldest != nullptr;
}

void HttpServer::State::drop(HttpConnection& connection) {
    const uint64_t exchange = std::exchange(connection.exchange, 0);
    release_body(connection);
    poller.remove(connection.socket);
    --stats.connections;
    turned_away -= connection.turned_away;
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

HttpActive& HttpServer::State::active_of(HttpConnection& connection) {
    if (!connection.active) connection.active = std::make_unique<HttpActive>(&options.limits);
    return *connection.active;
}

/// Of all but what came of the next request.
void HttpServer::State::let_go(HttpConnection& connection) {
    if (!connection.active) return;
    const std::string input = std::move(connection.active->input);
    connection.active.reset();
    if (!input.empty()) active_of(connection).input = input;
}

void HttpServer::State::enter(HttpConnection& connection, HttpPhase phase) {
    connection.phase = phase;
    connection.window = 0;
    if (phase == HttpPhase::idle || phase == HttpPhase::linger) connection.active.reset();
    HttpSlot& entry = slot(connection);
    entry.idle = phase == HttpPhase::idle;
    entry.deadline = http_never;
    for (const HttpPhaseLimit& row : http_phase_limits)
        if (row.phase == phase) entry.deadline = now + options.*row.limit;
    if (phase == HttpPhase::idle && drain_until != http_never)
        entry.deadline = std::min(drain_until, now + http_goodbye_ms);
    if (phase == HttpPhase::reply && connection.begun)
        entry.deadline = std::min(entry.deadline, connection.active->full_until);
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
        case HttpPhase::stream:
        case HttpPhase::queued: active_of(connection).input.append(bytes); return watch(connection);
        case HttpPhase::idle:
            active_of(connection);
            enter(connection, HttpPhase::head);
            break;
        default: break;
    }
    consume(connection, bytes);
}

/// The client sends no more. While a whole reply is on its way it may still be reading; told twice,
/// the connection is broken (or WSAPoll repeats itself, which cannot be silenced).
void HttpServer::State::on_end(HttpConnection& connection) {
    const bool answered = connection.phase == HttpPhase::reply && !connection.begun;
    if (!answered || connection.peer_closed) return drop(connection);
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
            case HttpParser::Event::more: return send_continue(connection);
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
    connection.fresh = false;
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
    let_go(connection);
    enter(connection, HttpPhase::work);
    handler->on_request(std::move(request));
}

void HttpServer::State::refuse(HttpConnection& connection, int status, std::string_view code,
                               std::string_view reason) {
    ++stats.faults;
    connection.head_only = connection.active->parser.message.is_head();
    if (const uint64_t exchange = std::exchange(connection.exchange, 0))
        handler->on_closed(exchange);
    HttpRequest& request = connection.active->parser.message;
    request.peer = connection.peer;
    HttpReply reply = handler->on_error(request, status, code, reason);
    reply.close = true;
    send(connection, std::move(reply));
}

// Writing.

std::string HttpServer::State::render(const HttpConnection& connection, const HttpReply& reply,
                                      bool close, bool in_pieces) {
    const int64_t second = unix_time_ms() / 1000;
    if (second != date_second) date = http_date(date_second = second);
    std::string out;
    http_append(&out, {"HTTP/1.1 ", std::to_string(reply.status), " ", http_phrase(reply.status),
                       "\r\nDate: ", date, "\r\n"});
    if (in_pieces) out += connection.http_1_0 ? "" : "Transfer-Encoding: chunked\r\n";
    else if (reply.status != 204 && reply.status != 304)  // none (RFC 9110, section 8.6)
        http_append(&out, {"Content-Length: ", std::to_string(reply.body.size()), "\r\n"});
    if (close) out += "Connection: close\r\n";
    else if (connection.http_1_0) out += "Connection: keep-alive\r\n";
    http_append_fields(&out, reply.headers);
    return out += "\r\n";
}

void HttpServer::State::send(HttpConnection& connection, HttpReply reply) {
    connection.exchange = 0;
    start_reply(connection, std::move(reply), false);
    flush(connection);
}

void HttpServer::State::start_reply(HttpConnection& connection, HttpReply reply, bool in_pieces) {
    release_body(connection);
    let_go(connection);
    HttpActive& active = active_of(connection);
    connection.keep_alive &= !reply.close && drain_until == http_never &&
                             !(in_pieces && connection.http_1_0);
    active.head = render(connection, reply, !connection.keep_alive, in_pieces);
    const bool bodiless = connection.head_only || reply.status == 204 || reply.status == 304;
    active.body = bodiless || in_pieces ? std::string() : std::move(reply.body);
    connection.begun = in_pieces;
    enter(connection, HttpPhase::reply);
    if (in_pieces) append(connection, reply.body);
}

HttpConnection* HttpServer::State::find_begun(uint64_t exchange) {
    HttpConnection* connection = find(exchange);
    return connection && connection->begun ? connection : nullptr;
}

/// As one chunk (RFC 9112, section 7.1); it is written when the turn ends.
void HttpServer::State::append(HttpConnection& connection, std::string_view bytes) {
    HttpActive& active = active_of(connection);
    const bool chunked = !connection.http_1_0;
    if (!connection.head_only && !bytes.empty()) {
        if (chunked) active.body += format("%zx\r\n", bytes.size());
        active.body += bytes;
        if (chunked) active.body += "\r\n";
    }
    const size_t left = active.head.size() + active.body.size() - active.sent;
    if (left >= http_write_bytes && active.full_until == http_never)
        active.full_until = now + options.write_timeout_ms;
    if (!std::exchange(connection.unsent, true)) unsent.push_back(connection.id);
}

void HttpServer::State::end(HttpConnection& connection) {
    append(connection, {});
    if (!connection.head_only && !connection.http_1_0) connection.active->body += "0\r\n\r\n";
    connection.begun = false;
    connection.exchange = 0;
}

void HttpServer::State::flush_unsent() {
    std::vector<uint64_t> ids;
    ids.swap(unsent);
    for (const uint64_t id : ids) {
        HttpConnection* connection = find(id);
        if (!connection || !std::exchange(connection->unsent, false)) continue;
        if (connection->active && !connection->active->blocked) flush(*connection);
    }
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
    if (connection.begun &&
        active.sent > head.size() + http_kept_bytes) {  // may never come to an end
        active.body.erase(0, active.sent - head.size());
        active.head.clear();
        active.sent = 0;
    }
    if (sent.bytes > 0 || connection.phase != HttpPhase::reply)
        return enter(connection, HttpPhase::reply);
    watch(connection);
}

void HttpServer::State::finish(HttpConnection& connection) {
    if (connection.begun) return await_piece(connection);
    if (connection.peer_closed) return drop(connection);
    if (!connection.keep_alive) {
        connection.socket.shutdown_write();
        return enter(connection, HttpPhase::linger);
    }
    let_go(connection);
    if (!connection.active) return enter(connection, HttpPhase::idle);
    enter(connection, HttpPhase::queued);
    queue.push_back(connection.id);
}

/// All is sent that there is. What a slow client had let grow is given back.
void HttpServer::State::await_piece(HttpConnection& connection) {
    const HttpActive& active = *connection.active;
    const bool waited_for = active.blocked || active.full_until != http_never;
    let_go(connection);
    enter(connection, HttpPhase::stream);
    if (waited_for) handler->on_sent(connection.exchange);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

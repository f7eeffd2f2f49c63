#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Streams -------------------------------------------------------------------------------------

HttpHeaders ServerLoop::stream_headers(const Exchange& exchange) const {
    return {{"Content-Type", "text/event-stream"},
            {"Cache-Control", "no-cache"},
            {"X-Accel-Buffering", "no"},  // nginx would wait for more
            {"X-Valar-Response-Id", exchange.response_id}};
}

namespace {

/// Of a log of events, those behind number `after`; UINT64_MAX: all.
std::string events_after(const std::string& log, uint64_t after) {
    size_t start = 0;
    for (uint64_t i = 0; after != UINT64_MAX && i <= after; ++i) {
        const size_t end = log.find("\n\n", start);
        if (end == std::string::npos) return {};
        start = end + 2;
    }
    return log.substr(start);
}

}  // namespace

/// The query of GET: whether it wants events, and from where.
Result<void> ServerLoop::read_stream(Exchange& exchange) const {
    auto stream = server_parameter(exchange.query, server_stream),
         after = server_parameter(exchange.query, server_starting_after);
    if (!stream || !after) return stream ? after.error() : stream.error();
    if (options.dialect != Dialect::openai) {
        if (stream->as_string() != "true" && after->is_null()) return {};
        return server_field("unsupported_value", stream->is_null() ? "starting_after" : "stream",
                            "'stream=true' is not supported in this dialect: start the server with "
                            "--dialect openai (in C++ ServerOptions::dialect), or poll without it");
    }
    exchange.form.stream = stream->as_string() == "true";
    if (after->is_null()) return {};
    if (!exchange.form.stream)
        return server_field("invalid_value", "starting_after",
                            "'starting_after' needs 'stream=true'");
    exchange.form.after = static_cast<uint64_t>(after->as_int());
    return {};
}

/// What has happened goes to it at once, what will happen as it does. Where that is not known from
/// the start (after a restart, or a log that became too long) all comes at the end.
void ServerLoop::join_stream(Exchange& exchange, const std::string& id, Live& entry) {
    exchange.response_id = id;
    exchange.begun = true;
    std::string text;
    const bool fits = entry.surface == exchange.form.surface;  // GET shows no chunks of Chat
    if (Stream* stream = fits ? entry.stream.get() : nullptr) {
        const bool first = !stream->told;
        std::string fresh = send_events(entry);
        exchange.follows = stream->kept || first;
        text = stream->kept ? events_after(stream->log, exchange.form.after) : std::move(fresh);
    }
    if (!exchange.follows) text.clear();
    entry.waiters.push_back(exchange.number);
    beats.emplace_back(monotonic_ns() + server_beat_ns, exchange.number);
    http->begin(exchange.number,
                make_reply(exchange, 200, std::move(text), stream_headers(exchange)));
}

void ServerLoop::end_stream(Exchange& exchange, std::string text) {
    const uint64_t number = exchange.number;
    http->append(number, text);
    http->end(number);
    log_exchange(exchange, 200);
    exchanges.erase(number);
}

/// What is new goes to all who follow.
std::string ServerLoop::send_events(Live& entry) {
    Stream& stream = *entry.stream;
    std::string text = stream.events->take();
    if (text.empty()) return text;
    stream.told = true;
    for (const uint64_t number : entry.waiters)
        if (Exchange* exchange = find_exchange(number); exchange && exchange->follows)
            http->append(number, text);
    if (stream.kept) stream.log += text;
    if (stream.log.size() > server_most_event_log) {
        stream.kept = false;
        stream.log = std::string();
    }
    return text;
}

/// Whether one who follows has not taken what there is: then the others wait with it.
bool ServerLoop::is_behind(const Live& entry) {
    return entry.stream &&
           std::any_of(entry.waiters.begin(), entry.waiters.end(), [&](uint64_t number) {
               return http->unsent(number) + entry.stream->events->size() >= server_most_unsent;
           });
}

void ServerLoop::on_sent(uint64_t number) {
    if (const Exchange* exchange = find_exchange(number)) {
        const std::string id = exchange->response_id;
        take_events(id);
    }
}

/// Those who get nothing for a while are told that somebody is there.
void ServerLoop::beat(uint64_t now_ns) {
    while (!beats.empty() && beats.front().first <= now_ns) {
        const uint64_t number = beats.front().second;
        beats.pop_front();
        const Exchange* exchange = find_exchange(number);
        if (!exchange) continue;
        const Surface* surface = exchange->form.surface;
        http->append(number, std::string(surface ? surface->beat : stream_beat));
        beats.emplace_back(now_ns + server_beat_ns, number);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

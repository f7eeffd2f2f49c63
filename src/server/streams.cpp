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

std::unique_ptr<EventWriter> ServerLoop::begin_events(const AnswerForm& form,
                                                      const ResponseRecord& record) const {
    auto events = event_writer(form, record, options.dialect);
    events->begin(form.surface ? Json() : render_response(record, options.dialect));
    return events;
}

std::unique_ptr<EventWriter> ServerLoop::begin_events(const std::string& id,
                                                      const Live& entry) const {
    const Stream& stream = *entry.stream;
    StoredResponse stored;
    stored.id = id;
    stored.organisation = entry.organisation;
    stored.head = stream.head;
    stored.request = server_shared(stream.request);
    ResponseRecord record = server_record(stored, Status::pending);
    record.input_tokens = stream.input_tokens;
    return begin_events({entry.surface, true, stream.include_usage, entry.echo}, record);
}

/// Something happens: its opening, which whoever asked first has got, is no longer made anew.
EventWriter& ServerLoop::events_of(const std::string& id, Live& entry) {
    Stream& stream = *entry.stream;
    if (!stream.events) {
        stream.events = begin_events(id, entry);
        std::string opening = stream.events->take();
        if (stream.kept) stream.log = std::move(opening);
    }
    return *stream.events;
}

/// What has happened goes to it at once, what will happen as it does. Where that is not known from
/// the start (after a restart, or a log that became too long) all comes at the end. `opening`: of
/// the stream, for whoever asks first.
void ServerLoop::join_stream(Exchange& exchange, const std::string& id, Live& entry,
                             const std::string* opening) {
    exchange.response_id = id;
    exchange.begun = true;
    std::string text;
    const bool fits = entry.surface == exchange.form.surface;  // GET shows no chunks of Chat
    if (Stream* stream = fits ? entry.stream.get() : nullptr) {
        send_events(entry);
        exchange.follows = stream->kept || opening;
        if (opening) text = *opening;
        else if (stream->kept)
            text = events_after(stream->events ? stream->log : begin_events(id, entry)->take(),
                                exchange.form.after);
    }
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
void ServerLoop::send_events(Live& entry) {
    Stream& stream = *entry.stream;
    if (!stream.events) return;
    const std::string text = stream.events->take();
    if (text.empty()) return;
    for (const uint64_t number : entry.waiters)
        if (Exchange* exchange = find_exchange(number); exchange && exchange->follows)
            http->append(number, text);
    if (stream.kept) stream.log += text;
    if (stream.log.size() > server_most_event_log) {
        stream.kept = false;
        stream.log.clear();
        stream.log.shrink_to_fit();  // an assignment would keep its memory
    }
}

/// Whether one who follows has not taken what there is: then the others wait with it.
bool ServerLoop::is_behind(const Live& entry) {
    return entry.stream &&
           std::any_of(entry.waiters.begin(), entry.waiters.end(), [&](uint64_t number) {
               const EventWriter* events = entry.stream->events.get();
               return http->unsent(number) + (events ? events->size() : 0) >= server_most_unsent;
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

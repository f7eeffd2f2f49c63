#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Starting and stopping -----------------------------------------------------------------------

Json server_health() { return Json::object().set("status", "ok"); }

namespace {

Error server_stopping(const std::string& more = {}) {
    return server_overloaded("the server is shutting down" + more);
}

}  // namespace

/// Why a balancer should ask others; nothing: all is well.
std::optional<Error> ServerLoop::unhealthy() const {
    if (stopping) return server_stopping();
    if (store_failed_ns != 0) {
        Error error = make_error(ErrorKind::overloaded, "the store takes no new responses",
                                 "store");
        error.retry_after_s = store_retry_s;
        return error;
    }
    float progress = 0;  // of the model that is farthest
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models()) {
            if (model.ready) return std::nullopt;
            progress = std::max(progress, model.progress);
        }
    return make_error(ErrorKind::overloaded,
                      format("the model is loading: %d %%", static_cast<int>(progress * 100)),
                      "loading");
}

void ServerLoop::get_health(Exchange& exchange, HttpRequest&) {
    auto alive = exchange.query == "live" ? Result<Json>("true")
                                          : server_parameter(exchange.query, server_live);
    if (!alive) return refuse(exchange, alive.error());
    const auto why = alive->as_string() == "true" ? std::nullopt : unhealthy();
    if (why) return refuse(exchange, *why);
    answer(exchange, 200, server_health().write());
}

/// While it refuses new records the log says so once a minute, with the cause, and clients are told
/// to come ever later. It is asked again and again, since nobody else may come to find it mended.
void ServerLoop::look_after_store(uint64_t now_ns) {
    const auto failure = store->failure();
    if (!failure && store_failed_ns == 0) return;
    if (!failure) {
        store_failed_ns = next_store_line_ns = 0;
        store_retry_s = 0;
        return say(LogLevel::warning,
                   Json::object().set("message", "store: it takes new responses again"));
    }
    if (store_failed_ns == 0) store_failed_ns = now_ns;
    const uint64_t since_s = (now_ns - store_failed_ns) / 1'000'000'000;
    store_retry_s = static_cast<uint32_t>(std::clamp<uint64_t>(since_s, 1, server_max_retry_s));
    store->expire(store->now_ms());
    if (now_ns < next_store_line_ns) return;
    next_store_line_ns = now_ns + server_trouble_ns;
    note_trouble("store", *failure);
}

/// Of a connection that was there before stop().
Result<void> ServerLoop::check_stopping(const HttpRequest&, Exchange& exchange) {
    const Route* route = exchange.route;
    if (!stopping || (route && route->get.handle == &ServerLoop::get_health)) return {};
    return server_stopping();
}

/// What nobody waits for and no model works on need not begin any more.
void ServerLoop::begin_drain() {
    for (auto& [id, entry] : live)
        if (entry.waiters.empty() && !entry.running && entry.state != Live::State::reserving)
            park(id, entry);
    save_unsaved();  // the last try
    say(LogLevel::info, Json::object().set("event", "drain").set("unfinished", live.size()));
}

/// Who waits is told why it ends: a stream by its last event. What can go on is left for the next
/// start.
void ServerLoop::break_off(const std::string& id, Live& entry) {
    const bool goes_on = entry.resumable && !entry.unkept;
    const Error error = server_stopping(
        goes_on ? "; when it is back the response goes on: GET /v1/responses/" + id : "");
    std::string last;  // for those who have what came before
    if (entry.stream) {
        EventWriter& events = events_of(id, entry);
        events.fail(error, goes_on);
        last = events.take();
        entry.stream.reset();
    }
    bool owned = false;
    for (const uint64_t number : std::exchange(entry.waiters, {})) {
        Exchange* exchange = find_exchange(number);
        if (!exchange) continue;
        owned |= number == entry.owner;
        if (exchange->follows) end_stream(*exchange, last);
        else refuse(*exchange, error, {{"X-Valar-Response-Id", id}});
    }
    if (owned) cancel(id, entry);
    else park(id, entry);
}

/// stop() gave what runs its time, and that is over.
void ServerLoop::on_drained() {
    for (auto& [id, entry] : live) break_off(id, entry);
    std::vector<uint64_t> left;  // those whose answer is still being made
    for (const auto& [number, exchange] : exchanges) left.push_back(number);
    for (const uint64_t number : left)
        if (Exchange* exchange = find_exchange(number)) refuse(*exchange, server_stopping());
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

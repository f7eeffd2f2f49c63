#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Metrics -----------------------------------------------------------------------------------

void ServerHistogram::add(double value, uint64_t times) {
    const auto place = std::lower_bound(bounds.begin(), bounds.end(), value);
    counts[static_cast<size_t>(place - bounds.begin())] += times;
    sum += value * static_cast<double>(times);
}

/// What a response that has ended tells of its times.
void ServerFigures::add(const Outcome& outcome) {
    const Timings& times = outcome.timings;
    const auto seconds = [](uint64_t us) { return static_cast<double>(us) / 1e6; };
    queue_seconds.add(seconds(times.queue_us));
    const uint32_t tokens = outcome.usage.output_tokens;
    if (tokens > 0) first_token_seconds.add(seconds(times.queue_us + times.prefill_us));
    if (tokens > 1) token_seconds.add(seconds(times.decode_us) / (tokens - 1), tokens - 1);
}

namespace {

/// What is told, gathered once for all rows.
struct ServerScrape {
    const ServerLoop& loop;
    HttpServer::Stats net;
    std::vector<ResponderStats> models;
};

std::string server_number(double value) {
    const bool whole = value == std::floor(value) && std::abs(value) < 9e15;
    return (whole ? Json(static_cast<int64_t>(value)) : Json(value)).write();
}

/// The lines of one metric.
struct ServerSamples {
    std::string* out;
    const char* name;
    /// `labels`: a="b",c="d". `part`: what stands behind the name.
    void add(double value, std::string_view labels = {}, std::string_view part = {}) {
        out->append("valar_").append(name).append(part);
        if (!labels.empty()) out->append("{").append(labels).append("}");
        out->append(" ").append(server_number(value)).append("\n");
    }
    void add(const ServerHistogram& histogram) {
        uint64_t count = 0;
        for (size_t i = 0; i <= histogram.bounds.size(); ++i) {
            count += histogram.counts[i];
            const bool last = i == histogram.bounds.size();
            const std::string bound = last ? "+Inf" : server_number(histogram.bounds[i]);
            add(static_cast<double>(count), "le=\"" + bound + "\"", "_bucket");
        }
        add(histogram.sum, {}, "_sum");
        add(static_cast<double>(count), {}, "_count");
    }
    void add_troubles(const ServerLoop& loop, std::string_view from) {
        const std::lock_guard<std::mutex> lock(loop.trouble_mutex);
        for (const auto& [cause, trouble] : loop.troubles)
            if (cause.first == from)
                add(static_cast<double>(trouble.count),
                    join({"kind=\"", server_error_kind(cause.second), "\""}));
    }
};

/// A metric: its value, or what writes its samples. A field of ResponderStats is summed over all.
struct ServerMetric {
    using Value = double (*)(const ServerScrape& now);
    using Write = void (*)(const ServerScrape& now, ServerSamples& out);
    using Stats = ResponderStats;
    const char *name, *type, *help;
    Value value = nullptr;
    Write write = nullptr;
    uint64_t Stats::*wide = nullptr;
    uint32_t Stats::*narrow = nullptr;
    double unit = 1;  // of the metric, in units of the field

    constexpr ServerMetric(const char* n, const char* t, const char* h, Value v)
        : name(n), type(t), help(h), value(v) {}
    constexpr ServerMetric(const char* n, const char* t, const char* h, Write w)
        : name(n), type(t), help(h), write(w) {}
    constexpr ServerMetric(const char* n, const char* t, const char* h, uint64_t Stats::*f,
                           double u = 1)
        : name(n), type(t), help(h), wide(f), unit(u) {}
    constexpr ServerMetric(const char* n, const char* t, const char* h, uint32_t Stats::*f)
        : name(n), type(t), help(h), narrow(f) {}
    constexpr size_t bytes() const {
        return wide ? sizeof(uint64_t) : narrow ? sizeof(uint32_t) : 0;
    }
    double of(const Stats& stats) const {
        return (wide ? static_cast<double>(stats.*wide) : static_cast<double>(stats.*narrow)) /
               unit;
    }
};

using ServerNow = const ServerScrape&;
using ServerOut = ServerSamples&;
constexpr ServerMetric server_metrics[] = {
    // clang-format off
    {"build_info", "gauge", "1, with the version as a label.", [](ServerNow now, ServerOut out) {
        out.add(1, join({"version=\"", VALAR_VERSION, "\",dialect=\"",
                         now.loop.options.dialect == Dialect::openai ? "openai" : "valar", "\""})); }},
    {"start_time_seconds", "gauge", "When the server began, in unix time.", [](ServerNow now) { return now.loop.started_s; }},
    {"http_requests_total", "counter", "Requests that were answered, by route and status.", [](ServerNow now, ServerOut out) {
        for (const auto& [key, count] : now.loop.answered)
            out.add(double(count), join({"route=\"", key.first, "\",status=\"", std::to_string(key.second), "\""})); }},
    {"http_request_seconds", "histogram", "Time from the head of a request to its answer's end.", [](ServerNow now, ServerOut out) { out.add(now.loop.figures.request_seconds); }},
    {"http_connections", "gauge", "Open connections.", [](ServerNow now) { return double(now.net.connections); }},
    {"http_connections_accepted_total", "counter", "Connections accepted.", [](ServerNow now) { return double(now.net.accepted); }},
    {"http_connections_refused_total", "counter", "Answered 503: max_connections were open.", [](ServerNow now) { return double(now.net.no_room); }},
    {"http_descriptors_refused_total", "counter", "Answered 503: no descriptor was free.", [](ServerNow now) { return double(now.net.no_descriptor); }},
    {"auth_refused_total", "counter", "Requests without a known key: 401, or 429.", [](ServerNow now) { return double(now.loop.unknown_keys); }},
    {"auth_limited_total", "counter", "Those of them that were answered 429.", [](ServerNow now) { return double(now.loop.limited_guesses); }},
    {"http_faults_total", "counter", "Malformed or refused requests.", [](ServerNow now) { return double(now.net.faults); }},
    {"http_timeouts_total", "counter", "Connections that were too slow.", [](ServerNow now) { return double(now.net.timeouts); }},
    {"http_body_bytes", "gauge", "Bytes of bodies in memory.", [](ServerNow now) { return double(now.net.body_bytes); }},
    {"responses_live", "gauge", "Responses that are not finished.", [](ServerNow now) { return double(now.loop.live.size()); }},
    {"responses_queued", "gauge", "Responses that are not begun.", [](ServerNow now) { return double(now.loop.queued); }},
    {"responses_orphaned", "gauge", "Responses of before a restart that wait for a model that is not here.", [](ServerNow now) { return double(now.loop.orphans.size()); }},
    {"batches_live", "gauge", "Batches that have not ended.", [](ServerNow now) { return double(now.loop.active_batches.size()); }},
    {"batch_requests_left", "gauge", "Requests of batches that have not ended.", [](ServerNow now) {
        double left = 0;
        for (const ServerLoop::Batch* batch : now.loop.active_batches) left += double(batch->left);
        return left; }},
    {"batch_requests_ended_total", "counter", "Requests of batches that have ended.", [](ServerNow now) { return double(now.loop.items_ended); }},
    {"responses_replayed_total", "counter", "Repeats answered from a record.", [](ServerNow now) { return double(now.loop.replayed); }},
    {"response_queue_seconds", "histogram", "Time that a response waited for its model.", [](ServerNow now, ServerOut out) { out.add(now.loop.figures.queue_seconds); }},
    {"response_first_token_seconds", "histogram", "Time to a response's first token, the wait included.", [](ServerNow now, ServerOut out) { out.add(now.loop.figures.first_token_seconds); }},
    {"response_token_seconds", "histogram", "Time for each token behind the first, by the mean of its response.", [](ServerNow now, ServerOut out) { out.add(now.loop.figures.token_seconds); }},
    {"request_errors_total", "counter", "Requests that were refused by our own fault, by kind.", [](ServerNow now, ServerOut out) { out.add_troubles(now.loop, "request"); }},
    {"response_errors_total", "counter", "Responses that failed, by kind.", [](ServerNow now, ServerOut out) { out.add_troubles(now.loop, "response"); }},
    {"store_errors_total", "counter", "Changes that the store did not take, by kind.", [](ServerNow now, ServerOut out) { out.add_troubles(now.loop, "store"); }},
    {"webhooks_queued", "gauge", "Deliveries that wait, or are being made.", [](ServerNow now) { return double(now.loop.webhooks.queued()); }},
    {"webhooks_total", "counter", "Deliveries that ended: delivered, failed, refused (no address that may be called), dropped (too many).", [](ServerNow now, ServerOut out) {
        for (const auto& [outcome, count] : now.loop.webhooks.ended()) out.add(double(count), join({"outcome=\"", outcome, "\""})); }},
    {"webhook_tries_total", "counter", "Requests that were made for them.", [](ServerNow now) { return double(now.loop.webhooks.tried()); }},
    {"store_bytes", "gauge", "Bytes of what the store holds.", [](ServerNow now) { return double(now.loop.store->bytes()); }},
    {"store_free_bytes", "gauge", "Bytes free on the store's disk; not for a store in memory.", [](ServerNow now, ServerOut out) {
        if (const uint64_t free = now.loop.store->free_bytes(); free != UINT64_MAX) out.add(double(free)); }},
    {"log_lines_dropped_total", "counter", "Log lines that were lost.", [](ServerNow now) {
        const ServerOptions& options = now.loop.options;
        return double(options.log_lost ? options.log_lost(options.log.context) : 0); }},
    {"model_requests_queued", "gauge", "Requests that wait for a model.", &ResponderStats::queued},
    {"model_requests_running", "gauge", "Requests that a model works on.", &ResponderStats::running},
    {"model_requests_completed_total", "counter", "Requests that were answered.", &ResponderStats::completed},
    {"model_requests_failed_total", "counter", "Requests that failed.", &ResponderStats::failed},
    {"model_requests_cancelled_total", "counter", "Requests that were cancelled.", &ResponderStats::cancelled},
    {"model_input_tokens_total", "counter", "Tokens read.", &ResponderStats::input_tokens},
    {"model_output_tokens_total", "counter", "Tokens written.", &ResponderStats::output_tokens},
    {"model_cached_tokens_total", "counter", "Tokens read that the prefix cache held.", &ResponderStats::cached_tokens},
    {"model_pages", "gauge", "Pages of keys and values, in all.", &ResponderStats::pages},
    {"model_pages_used", "gauge", "Pages that running requests use.", &ResponderStats::pages_used},
    {"model_pages_cached", "gauge", "Pages that no request uses, kept for prefixes.", &ResponderStats::pages_cached},
    {"model_pages_shared", "gauge", "Pages that several requests use.", &ResponderStats::pages_shared},
    {"model_preempted_total", "counter", "Times a request gave way to be resumed later.", &ResponderStats::preempted},
    {"model_batches_total", "counter", "Forward passes.", &ResponderStats::batches},
    {"model_batch_tokens_total", "counter", "Tokens in forward passes.", &ResponderStats::batch_rows},
    {"model_drafted_tokens_total", "counter", "Tokens in forward passes that were guessed.", &ResponderStats::drafted_tokens},
    {"model_accepted_tokens_total", "counter", "Tokens that were guessed right.", &ResponderStats::accepted_tokens},
    {"model_constrained_tokens_total", "counter", "Tokens written under a grammar.", &ResponderStats::constrained_tokens},
    {"model_masks_total", "counter", "Masks of allowed tokens that were made for them.", &ResponderStats::masks},
    {"model_queue_seconds_total", "counter", "Time that finished requests waited.", &ResponderStats::queue_us, 1e6},
    {"model_prefill_seconds_total", "counter", "Time in which finished requests were read.", &ResponderStats::prefill_us, 1e6},
    {"model_decode_seconds_total", "counter", "Time in which finished requests were answered.", &ResponderStats::decode_us, 1e6},
    // clang-format on
};

constexpr size_t server_stats_bytes() {
    size_t bytes = 0;
    for (const ServerMetric& row : server_metrics) bytes += row.bytes();
    return bytes;
}
static_assert(server_stats_bytes() == sizeof(ResponderStats), "every field has its row");

}  // namespace

std::string ServerLoop::metrics_text() const {
    ServerScrape now{*this, http->stats(), {}};
    for (const Responder* responder : responders) now.models.push_back(responder->stats());
    std::string out;
    for (const ServerMetric& row : server_metrics) {
        out += format("# HELP valar_%s %s\n# TYPE valar_%s %s\n", row.name, row.help, row.name,
                      row.type);
        ServerSamples samples{&out, row.name};
        if (row.write) {
            row.write(now, samples);
            continue;
        }
        double value = row.value ? row.value(now) : 0;
        if (!row.value)
            for (const ResponderStats& one : now.models) value += row.of(one);
        samples.add(value);
    }
    return out;
}

void ServerLoop::get_metrics(Exchange& exchange, HttpRequest&) {
    answer(exchange, make_reply(exchange, 200, metrics_text(),
                                {{"Content-Type", "text/plain; version=0.0.4"}}));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- What a log line says ----------------------------------------------------------------------

namespace {

/// "192.0.2.1", "192.0.2.1:80", "[2001:db8::1]:80", "2001:db8::1".
std::string hop_address(std::string_view hop) {
    if (hop.starts_with('"')) hop = hop.substr(1, hop.rfind('"') - 1);
    const bool v4 = std::count(hop.begin(), hop.end(), ':') == 1;
    const size_t bracket = hop.starts_with('[') ? hop.find(']') : hop.npos;
    if (bracket != hop.npos) hop = hop.substr(1, bracket - 1);
    else if (v4) hop = hop.substr(0, hop.find(':'));
    const auto address = NetAddress::parse(hop, 0);
    return address ? address->host() : std::string();
}

/// Of an element of Forwarded (RFC 7239), "for=192.0.2.1;proto=http".
std::string_view forwarded_for(std::string_view element) {
    while (!element.empty()) {
        const std::string_view pair = element.substr(0, element.find(';'));
        element.remove_prefix(std::min(pair.size() + 1, element.size()));
        if (ascii_lower(trim(pair).substr(0, 4)) == "for=") return trim(pair).substr(4);
    }
    return {};
}

/// What a value of a query looks like that cannot be a secret.
bool tells_no_secret(const ServerParameter& row, std::string_view value) {
    const auto digit = [](char c) { return c >= '0' && c <= '9'; };
    if (std::find(row.words.begin(), row.words.end(), value) != row.words.end()) return true;
    return row.most > 0 && value.size() < 20 && std::all_of(value.begin(), value.end(), digit);
}

/// Without what stands in double quotes, which the body may have held.
std::string without_quoted(std::string_view text) {
    std::string shown;
    for (size_t i = 0; i < text.size() && shown.size() < server_shown_bytes; ++i) {
        shown += text[i];
        if (text[i] != '"') continue;
        while (++i < text.size() && text[i] != '"')
            if (text[i] == '\\') ++i;
        shown += "...\"";
    }
    return shown;
}

/// As it is, or in quotes where it would look like more than one value.
std::string shown_value(const Json& value) {
    const auto plain = [](char c) { return c > ' ' && c != '"' && c != 0x7f; };
    if (!value.is_string()) return value.write();
    const std::string_view text = value.as_string();
    return std::all_of(text.begin(), text.end(), plain) ? std::string(text) : value.write();
}

}  // namespace

std::string server_client(const HttpRequest& request, bool trust_proxy) {
    std::string_view listed,
        forwarded;  // the last field of each: what is before it came from outside
    for (const auto& [field, value] : request.headers) {
        if (!trust_proxy) break;
        const std::string name = ascii_lower(field);
        if (name == "x-forwarded-for") listed = value;
        if (name == "forwarded") forwarded = value;
    }
    const auto last = [](std::string_view list) { return trim(list.substr(list.rfind(',') + 1)); };
    for (const std::string_view hop : {last(listed), forwarded_for(last(forwarded))})
        if (std::string address = hop.empty() ? "" : hop_address(hop); !address.empty())
            return address;
    return request.peer.port ? request.peer.host() : "-";
}

std::string server_shown_query(std::string_view query, std::span<const ServerParameter> known) {
    std::string shown;
    while (!query.empty() && shown.size() < server_shown_bytes) {
        const std::string_view one = query.substr(0, query.find('&'));
        query.remove_prefix(std::min(one.size() + 1, query.size()));
        const size_t equals = std::min(one.find('='), one.size());
        const std::string_view name = one.substr(0, equals);
        const std::string_view value = one.substr(std::min(equals + 1, one.size()));
        const auto row = std::find_if(known.begin(), known.end(),
                                      [&](const ServerParameter& it) { return it.name == name; });
        shown += shown.empty() ? '?' : '&';
        if (row != known.end()) shown.append(name).append("=");
        shown += row != known.end() && tells_no_secret(*row, value) ? value : "...";
    }
    return shown;
}

/// As the client reads it, but for what the body may have held.
void ServerLoop::note_error(Exchange& exchange, const Error& error) const {
    const Json shown = render_error(error);
    ExchangeExtra& extra = exchange.add_extra();
    extra.error_code = shown["error"]["code"].as_string();
    extra.error_message = without_quoted(shown["error"]["message"].as_string());
}

void ServerLoop::log_exchange(const Exchange& exchange, int status) {
    const ExchangeExtra& extra = exchange.extra();
    const uint64_t ended_ns = extra.ended_ns ? extra.ended_ns : monotonic_ns();
    const double ms = static_cast<double>(ended_ns - exchange.started_ns) / 1e6;
    const Route* route = exchange.route;
    const bool nested = route && !(route->suffix.empty() && route->middle.empty());
    const std::string name = route ? std::string(route->path) + (nested ? "*" : "") : "none";
    const std::string tail = !nested                 ? ""
                             : route->middle.empty() ? std::string(route->suffix)
                                                     : std::string(route->middle) + "*";
    ++answered[{name + tail, status}];
    figures.request_seconds.add(ms / 1e3);
    const Handle handle = exchange.operation ? exchange.operation->handle : nullptr;
    const bool probe = handle == &ServerLoop::get_health || handle == &ServerLoop::get_metrics;
    if (!options.log.write || (probe && !options.log_health)) return;
    const std::span<const ServerParameter> known = route ? route->get.query
                                                         : std::span<const ServerParameter>();
    Json line = Json::object();
    line.set("id", exchange.request_id);
    if (!extra.client_request_id.empty()) line.set("client_request_id", extra.client_request_id);
    line.set("method", printable(exchange.method))
        .set("path", printable(exchange.path) + server_shown_query(exchange.query, known))
        .set("status", status)
        .set("ms", server_rounded(ms));
    if (!extra.error_message.empty())
        line.set("code", extra.error_code).set("error", extra.error_message);
    line.set("client", exchange.client)
        .set("key", exchange.key_id)
        .set("response", printable(exchange.response_id))
        .set("replayed", exchange.replayed);
    if (!extra.ignored.empty()) {
        std::string names = extra.ignored;
        std::erase(names, ' ');
        line.set("ignored", names);
    }
    log_line(status >= 500 ? LogLevel::warning : LogLevel::info, std::move(line), extra.usage,
             extra.timings);
}

/// The line of a client that was the only one to wait and is gone, with what it cost all the same.
void ServerLoop::log_left(Live& entry, const Outcome* outcome) {
    const std::unique_ptr<Exchange> left = std::move(entry.left);
    if (!left) return;
    if (outcome) {
        left->add_extra().usage = outcome->usage;
        left->add_extra().timings = outcome->timings;
    }
    log_exchange(*left, server_client_left);
}

void ServerLoop::log_line(LogLevel level, Json line, const Usage& usage,
                          const Timings& timings) const {
    line.set("input_tokens", usage.input_tokens)
        .set("output_tokens", usage.output_tokens)
        .set("queue_ms", server_rounded(static_cast<double>(timings.queue_us) / 1e3))
        .set("prefill_ms", server_rounded(static_cast<double>(timings.prefill_us) / 1e3))
        .set("decode_ms", server_rounded(static_cast<double>(timings.decode_us) / 1e3));
    say(level, line);
}

/// From any thread.
void ServerLoop::say(LogLevel level, const Json& line) const {
    if (!options.log.write) return;
    if (options.log_json) return options.log(level, line.write());
    if (const Json* message = line.find("message")) return options.log(level, message->as_string());
    std::string text;
    for (const JsonMember& member : line.members()) {
        text.append(text.empty() ? "" : " ").append(member.key).append("=");
        text += shown_value(member.value);
    }
    options.log(level, text);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

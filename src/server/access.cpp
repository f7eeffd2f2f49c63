#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

constexpr ServerParameter health_query[] = {server_live};
constexpr ServerParameter list_query[] = {server_limit, server_after, server_key};
constexpr ServerParameter items_query[] = {server_limit, server_after, server_order};
constexpr ServerParameter batches_query[] = {server_batches_limit, server_after_id,
                                             server_before_id};
constexpr ServerParameter usage_query[] = {server_range};
constexpr ServerParameter breakdown_query[] = {server_range, server_by};
constexpr ServerParameter stream_query[] = {server_stream, server_starting_after};

}  // namespace

using Loop = ServerLoop;
const ServerLoop::Route ServerLoop::routes[] = {
    {.path = "/",
     .get = {&Loop::get_page, "getPage", "A page to talk with the models.", {}},
     .open = true},
    {.path = "/health",
     .get = {&Loop::get_health, "getHealth", "Whether a model is ready.", "Health", health_query},
     .open = true},
    {.path = "/openapi.json",
     .get = {&Loop::get_openapi, "getOpenapi", "This document.", "Document"},
     .open = true},
    {.path = "/metrics",
     .get = {&Loop::get_metrics, "getMetrics", "Figures, in the text format of Prometheus."}},
    {.path = "/v1/models",
     .get = {&Loop::get_models, "listModels", "The models that are served.", "ModelList"}},
    {.path = "/v1/models/",
     .get = {&Loop::get_model, "getModel", "One of them, by id or alias.", "Model"},
     .slashes = true},
    {.path = "/v1/responses",
     .get = {&Loop::get_responses, "listResponses", "What is kept, newest first.", "ResponseList",
             list_query},
     .post = {&Loop::post_response, "createResponse", "Answers a request.", "Response", {}, true}},
    {.path = "/v1/responses/",
     .get = {&Loop::get_response, "getResponse", "A response as it is now.", "Response",
             stream_query},
     .remove = {&Loop::delete_response,
                "deleteResponse",
                "Cancels what runs, and forgets it.",
                "DeletedResponse",
                {},
                true}},
    {.path = "/v1/chat/completions",
     .post = {&Loop::post_response,
              "createChatCompletion",
              "Answers a conversation.",
              "ChatCompletion",
              {},
              true},
     .surface = &chat_surface},
    {.path = "/v1/messages",
     .post =
         {&Loop::post_response, "createMessage", "Answers a conversation.", "Message", {}, true},
     .surface = &messages_surface},
    {.path = "/v1/messages/count_tokens",
     .post = {&Loop::post_count, "countMessageTokens", "How many tokens a prompt has.",
              "InputTokens"},
     .surface = &messages_count_surface},
    {.path = "/v1/responses/input_tokens",
     .post = {&Loop::post_count, "countInputTokens", "How many tokens a prompt has.",
              "InputTokens"}},
    {.path = "/v1/completions",
     .post = {&Loop::post_response,
              "createCompletion",
              "Goes on with a prompt.",
              "Completion",
              {},
              true},
     .openai = true,
     .surface = &completions_surface},
    {.path = "/v1/responses/",
     .suffix = "/cancel",
     .post = {&Loop::post_cancel,
              "cancelResponse",
              "Ends a response in the background.",
              "Response",
              {},
              true}},
    {.path = "/v1/responses/",
     .suffix = "/input_items",
     .get = {&Loop::get_input_items, "listInputItems", "What was asked, newest first.", "ItemList",
             items_query}},
    {.path = "/v1/responses/compact",
     .post = {&Loop::post_compact, "compactResponse", "Is not supported.", "Error"}},
    {.path = "/v1/batches",
     .get = {&Loop::get_batches, "listBatches", "The batches that are kept, newest first.",
             "BatchList", batches_query},
     .post = {&Loop::post_batch,
              "createBatch",
              "Accepts many requests at once.",
              "Batch",
              {},
              false,
              "BatchRequest"},
     .batch = true},
    {.path = "/v1/batches/",
     .get = {&Loop::get_batch, "getBatch", "A batch, and how far each request is.", "BatchStatus"}},
    {.path = "/v1/batches/",
     .suffix = "/cancel",
     .post = {&Loop::post_batch_cancel, "cancelBatch", "Ends what of it has not ended.",
              "BatchStatus"}},
    {.path = "/v1/batches/",
     .middle = "/",
     .get = {&Loop::get_batch_item, "getBatchItem", "The response to a request of it.",
             "Response"}},
    {.path = "/v1/usage",
     .get = {&Loop::get_usage<ServerUsageView::total>, "getUsage", "What was used, in all.",
             "Usage", usage_query}},
    {.path = "/v1/usage/breakdown",
     .get = {&Loop::get_usage<ServerUsageView::breakdown>, "getUsageBreakdown",
             "The same by model and window, or by one thing.", "UsageBreakdown", breakdown_query}},
    {.path = "/v1/usage/activity",
     .get = {&Loop::get_usage<ServerUsageView::activity>, "getUsageActivity",
             "Which API keys used which models, and when last.", "UsageActivity", usage_query}},
    {.path = "/v1/usage/activity/timeseries",
     .get = {&Loop::get_usage<ServerUsageView::timeseries>, "getUsageTimeseries",
             "What was used in each hour, or day.", "UsageTimeseries", usage_query}},
    {.path = "/v1/conversations",
     .post = {&Loop::post_conversation, "createConversation", "Begins a conversation.",
              "Conversation"},
     .openai = true},
    {.path = "/v1/conversations/",
     .get = {&Loop::get_conversation, "getConversation", "A conversation.", "Conversation"},
     .post = {&Loop::update_conversation, "updateConversation", "Replaces its metadata.",
              "Conversation"},
     .remove = {&Loop::delete_conversation, "deleteConversation", "Forgets it and its items.",
                "DeletedConversation"},
     .openai = true},
    {.path = "/v1/conversations/",
     .suffix = "/items",
     .get = {&Loop::get_items, "listItems", "Its items, newest first.", "ItemList", items_query},
     .post = {&Loop::post_items, "createItems", "Adds items to it.", "ItemList"},
     .openai = true},
    {.path = "/v1/conversations/",
     .middle = "/items/",
     .get = {&Loop::get_item, "getItem", "An item of it.", "InputItem"},
     .remove = {&Loop::delete_item, "deleteItem", "Takes an item away.", "Conversation"},
     .openai = true},
};
std::span<const ServerLoop::Route> ServerLoop::all_routes() { return routes; }

std::string ServerLoop::Route::shown() const {
    return join(
        {path, takes_argument() ? "{id}" : "", suffix, middle, middle.empty() ? "" : "{item}"});
}

const ServerLoop::Operation* ServerLoop::Route::operation(std::string_view method) const {
    for (const auto& [name, known] : {std::pair("GET", &get), std::pair("HEAD", &get),
                                      std::pair("POST", &post), std::pair("DELETE", &remove)})
        if (method == name && known->handle) return known;
    return nullptr;
}

std::string ServerLoop::Route::allowed() const {
    std::string all;
    for (const auto& [operation, methods] :
         {std::pair(get, "GET, HEAD"), std::pair(post, "POST"), std::pair(remove, "DELETE")})
        if (operation.handle) all.append(all.empty() ? "" : ", ").append(methods);
    return all;
}

// ---- Authentication and routing --------------------------------------------------------------

/// Fills in what the target says.
void ServerLoop::find_route(Exchange& exchange) {
    const std::string_view path = exchange.path;
    std::string found_item;
    for (const Route& route : routes) {
        const bool takes = route.takes_argument();
        const bool prefix = path.substr(0, route.path.size()) == route.path;
        if (!prefix || path.size() < route.path.size() + route.suffix.size()) continue;
        const size_t end = path.size() - route.suffix.size();
        if (path.substr(end) != route.suffix) continue;
        auto argument = server_unescape(path.substr(route.path.size(), end - route.path.size()));
        if (!argument || argument->empty() == takes) continue;
        if (route.openai && options.dialect != Dialect::openai) continue;
        if (route.middle == "/" && exchange.route && !route.operation(exchange.method))
            continue;  // an item may be called as what is done with a batch
        std::string item;
        if (const size_t at = argument->find(route.middle); !route.middle.empty()) {
            if (at == argument->npos) continue;
            item = argument->substr(at + route.middle.size());
            argument->resize(at);
            if (argument->empty() || item.empty() || item.find('/') != item.npos) continue;
        }
        if (!route.slashes && argument->find('/') != argument->npos) continue;
        exchange.argument = std::move(*argument);
        found_item = std::move(item);
        exchange.route = &route;
    }
    if (!found_item.empty()) exchange.add_extra().item = std::move(found_item);
}

std::string ServerLoop::make_request_id() {
    if (random_used == sizeof random) {
        (void)random_bytes(random, sizeof random).ok();
        random_used = 0;
    }
    return server_uuid(random + std::exchange(random_used, random_used + 16));
}

namespace {

/// What a client calls its request, where that may stand in a header and in a log line.
std::string client_request_id(const HttpRequest& request) {
    const auto is_visible = [](char c) { return c > ' ' && c < 0x7f; };
    for (const char* name : {"X-Client-Request-Id", "X-Request-ID"})
        if (const std::string* id = request.header(name);
            id && !id->empty() && id->size() <= server_max_client_id &&
            std::all_of(id->begin(), id->end(), is_visible))
            return *id;
    return {};
}

}  // namespace

std::optional<HttpReply> ServerLoop::on_head(HttpRequest& request) {
    take_keys();
    Exchange exchange;
    exchange.number = request.exchange;
    exchange.request_id = make_request_id();
    if (std::string id = client_request_id(request); !id.empty())
        exchange.add_extra().client_request_id = std::move(id);
    exchange.method = request.method;
    const size_t mark = std::min(request.target.find('?'), request.target.size());
    exchange.path = request.target.substr(0, mark);
    exchange.query = request.target.substr(std::min(mark + 1, request.target.size()));
    exchange.started_ns = monotonic_ns();
    exchange.client = server_client(request, options.trust_proxy);
    find_route(exchange);

    using Check = Result<void> (ServerLoop::*)(const HttpRequest&, Exchange&);
    static constexpr Check first[] = {&ServerLoop::check_host, &ServerLoop::check_proxy,
                                      &ServerLoop::check_origin, &ServerLoop::check_stopping};
    static constexpr Check then[] = {&ServerLoop::check_key,    &ServerLoop::check_route,
                                     &ServerLoop::check_method, &ServerLoop::check_size,
                                     &ServerLoop::check_rate,   &ServerLoop::check_type};
    const auto run = [&](std::span<const Check> checks) -> std::optional<HttpReply> {
        for (const Check check : checks)
            if (auto checked = (this->*check)(request, exchange); !checked)
                return make_error_reply(exchange, checked.error());
        return std::nullopt;
    };
    std::optional<HttpReply> reply = run(first);
    if (!reply && request.method == "OPTIONS" && !exchange.extra().cors_origin.empty() &&
        request.header("Access-Control-Request-Method"))
        reply = make_preflight_reply(exchange, request);  // carries no key
    if (!reply) reply = run(then);
    if (reply) {
        log_exchange(exchange, reply->status);
        reply->close |= stopping;
        return reply;
    }
    request.max_body = body_limit(request, exchange);
    exchanges.emplace(request.exchange, std::move(exchange));
    return std::nullopt;
}

/// Without keys only names of this machine: a web page must not reach us through a name of its own
/// that resolves to a loopback address.
Result<void> ServerLoop::check_host(const HttpRequest& request, Exchange&) {
    if (!keys.empty()) return {};
    const std::string& host = request.host;
    const size_t colon = host.rfind(':');
    const bool port = colon != host.npos && host.find(']', colon) == host.npos;
    const std::string_view name = std::string_view(host).substr(0, port ? colon : host.npos);
    for (const std::string_view known : {"localhost", "127.0.0.1", "[::1]"})
        if (name == known) return {};
    for (const std::string& allowed : options.allowed_hosts)
        if (ascii_lower(allowed) == name || ascii_lower(allowed) == host) return {};
    return make_error(ErrorKind::permission,
                      "the host '" + printable(host) +
                          "' is not allowed; allowed are localhost and allowed_hosts",
                      "host_not_allowed");
}

/// Without keys a proxy on this machine would let everybody in: Host and address are its own. One
/// that adds none of these fields cannot be told from a client.
Result<void> ServerLoop::check_proxy(const HttpRequest& request, Exchange&) {
    if (!keys.empty() || options.trust_proxy) return {};
    for (const char* name : {"Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"})
        if (request.header(name))
            return make_error(
                ErrorKind::permission,
                std::string("the header ") + name +
                    " says that a proxy passed this on, and the server has no keys: "
                    "give it some, or trust_proxy (--trust-proxy) to let everybody in",
                "proxy_not_allowed");
    return {};
}

Result<void> ServerLoop::check_origin(const HttpRequest& request, Exchange& exchange) {
    const std::string* given = request.header("Origin");
    if (!given) return {};
    const bool alone = request.count("Origin") == 1;
    const std::string origin = ascii_lower(*given);
    for (const std::string& allowed : options.cors_origins)
        if (alone && ascii_lower(allowed) == origin) {
            exchange.add_extra().cors_origin = *given;
            return {};
        }
    if (alone && (origin == "http://" + request.host || origin == "https://" + request.host))
        return {};
    return make_error(ErrorKind::permission,
                      "the origin '" + printable(*given) + "' is not allowed",
                      "origin_not_allowed");
}

/// A known key is never held up by what others of its address did: behind a proxy all share one.
Result<void> ServerLoop::check_key(const HttpRequest& request, Exchange& exchange) {
    if (keys.empty()) exchange.key_id = "open";
    if (keys.empty() || (exchange.route && exchange.route->open)) return {};
    auto found = find_key(request, exchange);
    if (found) return {};
    ++unknown_keys;
    const uint32_t wait_s = guesses.take(exchange.client, monotonic_ns());
    if (wait_s == 0) return found;
    ++limited_guesses;
    Error error = make_error(ErrorKind::rate_limit,
                             "too many requests without a known API key from this address",
                             "rate_limit_exceeded");
    error.retry_after_s = wait_s;
    return error;
}

Result<void> ServerLoop::find_key(const HttpRequest& request, Exchange& exchange) {
    std::string_view secret;
    bool given = false;
    const auto refused = [](const char* message) {
        return make_error(ErrorKind::authentication, message, "invalid_api_key");
    };
    for (const auto& [name, value] : request.headers) {
        const std::string field = ascii_lower(name);
        std::string_view one = value;
        if (field == "authorization") {
            if (ascii_lower(one.substr(0, 7)) != "bearer ")
                return refused("the header Authorization must be 'Bearer <key>'");
            one = trim(one.substr(7));
        } else if (field != "x-api-key") {
            continue;
        }
        if (std::exchange(given, true) && one != secret)
            return refused("two different credentials in one request");
        secret = one;
    }
    if (!given)
        return refused("no API key; send the header 'Authorization: Bearer <key>' or 'x-api-key'");
    const Hash256 hash = server_secret_hash(secret);
    const auto found = std::lower_bound(
        keys.begin(), keys.end(), hash,
        [](const ServerKey& key, const Hash256& to) { return key.hash.view() < to.view(); });
    if (found == keys.end() || !constant_time_equal(found->hash.view(), hash.view()))
        return refused("unknown API key");
    exchange.organisation = found->organisation;
    exchange.key_id = found->id;
    exchange.key = &*found;
    return {};
}

Result<void> ServerLoop::check_route(const HttpRequest&, Exchange& exchange) {
    if (exchange.route) return {};
    return server_not_found("unknown path '" + printable(exchange.path) + "'");
}

Result<void> ServerLoop::check_method(const HttpRequest& request, Exchange& exchange) {
    const Route& route = *exchange.route;
    exchange.operation = route.operation(request.method);
    if (exchange.operation) return {};
    return make_error(
        ErrorKind::invalid_request,
        printable(request.method) + " is not allowed here; allowed: " + route.allowed(),
        "method_not_allowed");
}

Result<void> ServerLoop::check_size(const HttpRequest& request, Exchange& exchange) {
    const uint64_t limit = body_limit(request, exchange);
    const uint64_t size = request.content_length.value_or(0);
    if (size <= limit) return {};
    return make_error(ErrorKind::too_large,
                      "the body has " + std::to_string(size) + " bytes; at most " +
                          std::to_string(limit) + " are allowed",
                      "request_too_large");
}

Result<void> ServerLoop::check_rate(const HttpRequest&, Exchange& exchange) {
    ServerKey* key = std::exchange(exchange.key, nullptr);
    if (!key || key->per_minute == 0) return {};
    const uint32_t wait_s = key->bucket.take(key->per_minute, monotonic_ns());
    if (wait_s == 0) return {};
    Error error = make_error(
        ErrorKind::rate_limit,
        "this key may make " + std::to_string(key->per_minute) + " requests a minute",
        "rate_limit_exceeded");
    error.retry_after_s = wait_s;
    return error;
}

/// Also told before a body is asked for, unless its size is still unknown: size comes first.
Result<void> ServerLoop::check_type(const HttpRequest& request, Exchange&) {
    if (request.method != "POST" || (request.chunked && request.body.empty())) return {};
    const auto refused = [](const std::string& given, const char* allowed) {
        return make_error(ErrorKind::invalid_request,
                          "'" + printable(given) + "' is not supported; allowed: " + allowed,
                          "unsupported_media_type");
    };
    for (const auto& [name, value] : request.headers) {
        const std::string field = ascii_lower(name);
        const std::string_view type = std::string_view(value).substr(0, value.find(';'));
        const std::string kind = ascii_lower(trim(type));
        if (field == "content-type" && kind != "application/json")
            return refused(value, "application/json");
        if (field == "content-encoding" && kind != "identity") return refused(value, "identity");
    }
    return {};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

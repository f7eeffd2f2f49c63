// The response object, input items and errors as clients see them.
#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {
namespace {

/// Whether a client may read an error's message. What the operating system or a file had to say
/// names paths, and may come as any kind that they know (a full disk is `overloaded`); but only what
/// was written for clients has a code.
enum class ApiShown : uint8_t { always, with_code, never };

struct ApiKind {
    ErrorKind kind;
    int status;
    const char* type;
    const char* code;  // where the error brings none
    ApiShown shown;
};
constexpr ApiKind api_kinds[] = {
    // clang-format off
    {ErrorKind::invalid_request, 400, "invalid_request_error", "invalid_value", ApiShown::always},
    {ErrorKind::unsupported, 400, "invalid_request_error", "unsupported_value", ApiShown::with_code},
    {ErrorKind::conflict, 400, "idempotency_error", "idempotency_key_reused", ApiShown::with_code},
    {ErrorKind::authentication, 401, "authentication_error", "invalid_api_key", ApiShown::always},
    {ErrorKind::permission, 403, "permission_error", "host_not_allowed", ApiShown::with_code},
    {ErrorKind::not_found, 404, "not_found_error", "not_found", ApiShown::with_code},
    {ErrorKind::too_large, 413, "invalid_request_error", "request_too_large", ApiShown::with_code},
    {ErrorKind::rate_limit, 429, "rate_limit_error", "rate_limit_exceeded", ApiShown::always},
    {ErrorKind::overloaded, 503, "api_error", "overloaded", ApiShown::with_code},
    {ErrorKind::out_of_memory, 503, "api_error", "overloaded", ApiShown::never},
    {ErrorKind::closed, 503, "api_error", "overloaded", ApiShown::with_code},
    {ErrorKind::timeout, 504, "timeout_error", "timeout", ApiShown::with_code},
    {ErrorKind::internal, 500, "api_error", "internal_error", ApiShown::never},
    // clang-format on
};

/// Codes for which HTTP has a status of its own.
struct ApiCode {
    ErrorKind kind;
    std::string_view code;
    int status;
};
constexpr ApiCode api_codes[] = {{ErrorKind::invalid_request, "method_not_allowed", 405},
                                 {ErrorKind::invalid_request, "unsupported_media_type", 415},
                                 {ErrorKind::closed, upstream_error_code, 502}};

const ApiKind& api_kind(ErrorKind kind) {
    for (const ApiKind& row : api_kinds)
        if (row.kind == kind) return row;
    return std::end(api_kinds)[-1];  // io, bad_data, cancelled: nothing a client sent
}

bool api_shows(const ApiKind& kind, const Error& error) {
    return kind.shown == ApiShown::always ||
           (kind.shown == ApiShown::with_code && !error.code.empty());
}

// ---- The response object ----------------------------------------------------------------------

// How objects differ between the dialects.
constexpr DialectWords valar_words = {
    .pending = "pending",
    .running = "running",
    .cut = "completed",
    .cut_item = "completed",
    .echo = true,
    .usage_extras = true,
    .failure = nullptr,
};
constexpr DialectWords openai_words = {
    .pending = "queued",
    .running = "in_progress",
    .cut = "incomplete",
    .cut_item = "incomplete",
    .echo = false,
    .usage_extras = false,
    .failure = "server_error",
};

// JSON has no infinity: a token that cannot be drawn gets the number that OpenAI gives it.
constexpr double logprob_of_never = -9999.0;

Json render_logprob(std::string_view bytes, float logprob) {
    Json values = Json::array();
    for (const char byte : bytes) values.push(static_cast<uint8_t>(byte));
    return Json::object()
        .set("token", utf8_repair(bytes))
        .set("logprob", std::max(static_cast<double>(logprob), logprob_of_never))
        .set("bytes", std::move(values));
}

}  // namespace

Json render_logprobs(const std::vector<TokenLogprob>& tokens) {
    Json all = Json::array();
    for (const TokenLogprob& token : tokens) {
        Json top = Json::array();
        for (const TokenLogprob::Alternative& other : token.top)
            top.push(render_logprob(other.bytes, other.logprob));
        all.push(render_logprob(token.bytes, token.logprob).set("top_logprobs", std::move(top)));
    }
    return all;
}

std::vector<TokenLogprob> logprobs_of(const Outcome& outcome, size_t index) {
    std::vector<TokenLogprob> own;
    for (const TokenLogprob& token : outcome.logprobs)
        if (token.item == index) own.push_back(token);
    return own;
}

std::vector<Item> output_items(const Outcome& outcome, Status status) {
    std::vector<Item> items = outcome.items;
    const bool whole = status == Status::completed && !outcome.cut;
    if (items.empty() && (whole || !outcome.text.empty()))
        items.push_back(Item::message(Role::assistant, outcome.text));
    return items;
}

// An item's id has what comes after "resp_" in its response's, so that it is found without an index.
static constexpr std::string_view response_prefix = "resp_";

static std::string id_in_response(const std::string& response_id, const char* prefix) {
    return prefix + response_id.substr(std::min(response_prefix.size(), response_id.size()));
}

std::string first_message_id(const std::string& response_id) {
    return id_in_response(response_id, item_type(Item::Kind::message).prefix);
}

std::string output_item_id(const std::string& response_id, Item::Kind kind, size_t index) {
    return id_in_response(response_id, item_type(kind).prefix) + std::to_string(index);
}

std::string item_response_id(std::string_view item_id) {
    const size_t drawn = item_id.find('_');
    if (drawn == item_id.npos) return {};
    return std::string(response_prefix).append(item_id.substr(drawn + 1, drawn_characters));
}

const char* output_item_status(bool last, Status status, bool cut, const DialectWords& words) {
    if (!last) return "completed";
    if (status != Status::completed) return "incomplete";
    return cut ? words.cut_item : "completed";
}

namespace {

Json render_output(const ResponseRecord& record, const Outcome& outcome,
                   const DialectWords& words) {
    Json output = Json::array();
    if (!is_terminal(record.status)) return output;
    const std::vector<Item> items = output_items(outcome, record.status);
    bool first = true;  // of the messages: it has the id that was drawn at acceptance
    for (size_t i = 0; i < items.size(); ++i) {
        const bool message = items[i].kind == Item::Kind::message;
        const std::string id = message && std::exchange(first, false)
                                   ? record.message_id
                                   : output_item_id(record.id, items[i].kind, i);
        const char* status = output_item_status(i + 1 == items.size(), record.status, outcome.cut,
                                                words);
        Json item = item_json(items[i], id, status);
        const auto tokens = message ? logprobs_of(outcome, i) : std::vector<TokenLogprob>();
        if (Json* content = item.find("content"); !tokens.empty() && !content->empty())
            content->items().front().set("logprobs", render_logprobs(tokens));
        output.push(std::move(item));
    }
    return output;
}

// Content in its long form: parts, and Chat Completions' "text" by its name here.
Json render_input_content(const Json& content, bool assistant) {
    const char* type = assistant ? "output_text" : "input_text";
    Json parts = content;
    if (content.is_string())
        parts = Json::array().push(Json::object().set("type", type).set("text", content));
    for (Json& part : parts.items()) {
        if (part["type"].as_string() == "text") part.set("type", type);
        if (part["type"].as_string() == "output_text" && !part.contains("annotations"))
            part.set("annotations", Json::array());
    }
    return parts;
}

Json render_input_item(const Json& given, const std::string& response_id, size_t place) {
    static constexpr const char* kept[] = {"role", "content",   "phase", "summary", "call_id",
                                           "name", "arguments", "input", "output"};
    const std::string_view type = given["type"].as_string("message");
    const auto* row = std::find_if(std::begin(item_types), std::end(item_types),
                                   [&](const ItemType& one) { return one.name == type; });
    if (row == std::end(item_types)) return given;
    const bool own = given["id"].is_string() && !given["id"].as_string().empty();
    Json item = Json::object().set(
        "id", own ? given["id"]
                  : Json(derive_id(row->prefix, response_id + "/" + std::to_string(place))));
    item.set("type", type);
    item.set("status", given["status"].is_string() ? given["status"] : Json("completed"));
    for (const char* key : kept)
        if (!given[key].is_null()) item.set(key, given[key]);
    if (row->kind == Item::Kind::reasoning && !item.contains("summary"))
        item.set("summary", Json::array());
    if (row->kind == Item::Kind::message) {
        const bool assistant = given["role"].as_string() == role_name(Role::assistant);
        item.set("content", render_input_content(given["content"], assistant));
    }
    return item;
}

}  // namespace

Json render_usage(const Usage& usage, const DialectWords& words) {
    Json in = Json::object().set("cached_tokens", usage.cached_tokens);
    Json out = Json::object().set("reasoning_tokens", usage.reasoning_tokens);
    if (words.usage_extras) {
        in.set("reasoning_tokens", 0);
        out =
            Json::object().set("cached_tokens", 0).set("reasoning_tokens", usage.reasoning_tokens);
    } else {
        in.set("cache_write_tokens", 0);
    }
    Json all = Json::object()
                   .set("input_tokens", usage.input_tokens)
                   .set("input_tokens_details", std::move(in))
                   .set("output_tokens", usage.output_tokens)
                   .set("output_tokens_details", std::move(out))
                   .set("total_tokens", usage.input_tokens + usage.output_tokens);
    if (words.usage_extras)
        all.set("prompt_tokens", usage.input_tokens).set("completion_tokens", usage.output_tokens);
    return all;
}

namespace {

Json render_metadata(const Json& given) {
    Json shown = given.is_object() ? given : Json::object();
    if (Json* token = shown.find(kWebhookTokenKey)) *token = "***";
    return shown;
}

// With the fields that clients look for though they were left out: those are null.
Json with_fields(Json given, std::initializer_list<const char*> fields) {
    for (const char* field : fields)
        if (!given.contains(field)) given.set(field, nullptr);
    return given;
}

Json render_format(const Json& given) {
    if (given.is_null()) return Json::object().set("type", "text");
    if (given["type"].as_string() != "json_schema") return given;
    Json shown = with_fields(given, {"description", "schema"});
    if (shown["strict"].is_null()) shown.set("strict", false);
    return shown;
}

Json render_tools(const Json& given) {
    Json tools = Json::array();
    for (const Json& tool : given.items()) {
        const bool custom = tool["type"].as_string() == "custom";
        if (!custom && tool["type"].as_string() != "function") continue;  // was ignored
        Json shown = custom ? with_fields(tool, {"description"})
                            : with_fields(tool, {"description", "parameters", "strict"});
        if (custom) shown.set("format", render_format(tool["format"]));
        tools.push(std::move(shown));
    }
    return tools;
}

}  // namespace

/// Codes that say what failed to who asked; of others a client is told no more than that it failed.
bool failure_is_told(std::string_view code) {
    return code == upstream_error_code || code == "invalid_value" ||
           code == "context_length_exceeded";
}

Json render_failure(const Outcome& outcome, const DialectWords& words) {
    if (!outcome.error) return nullptr;
    const ApiKind& kind = api_kind(outcome.error->kind);
    const std::string own = outcome.error->code.empty() ? kind.code : outcome.error->code;
    return Json::object()
        .set("code", words.failure && !failure_is_told(own) ? words.failure : own)
        .set("message", api_shows(kind, *outcome.error) ? outcome.error->message
                                                        : "the model could not be run");
}

const char* status_name(Status status, bool cut, const DialectWords& words) {
    switch (status) {
        case Status::pending: return words.pending;
        case Status::running: return words.running;
        case Status::completed: return cut ? words.cut : "completed";
        case Status::failed: return "failed";
        case Status::cancelled: break;
    }
    return "cancelled";
}

const DialectWords& words_of(Dialect dialect) {
    return dialect == Dialect::openai ? openai_words : valar_words;
}

Json render_response(const ResponseRecord& record, Dialect dialect) {
    const DialectWords& words = words_of(dialect);
    const Json& asked = record.request;
    const Outcome nothing;
    const Outcome& outcome = record.outcome ? *record.outcome : nothing;
    const bool done = is_terminal(record.status);
    const auto echo = [&](const char* key, Json fallback) {
        const Json& value = asked[key];
        return value.is_null() ? std::move(fallback) : value;
    };
    Json cut = nullptr;
    if (done && outcome.cut) cut = Json::object().set("reason", "max_output_tokens");
    const Json& reasoning = asked["reasoning"];
    const char* summary = reasoning["summary"].is_null() ? "generate_summary" : "summary";
    Json object = Json::object();
    object.reserve(34);
    object.set("id", record.id)
        .set("object", "response")
        .set("created_at", record.created_at)
        .set("completed_at", done ? Json(record.completed_at) : Json())
        .set("status", status_name(record.status, outcome.cut, words))
        .set("background", echo("background", false))
        .set("model", record.model);
    if (words.echo) object.set("input", asked["input"]);
    object.set("instructions", asked["instructions"])
        .set("output", render_output(record, outcome, words))
        .set("error", record.status == Status::failed ? render_failure(outcome, words) : Json())
        .set("incomplete_details", std::move(cut))
        .set("max_output_tokens", asked["max_output_tokens"])
        .set("max_tool_calls", asked["max_tool_calls"])
        .set("reasoning",
             Json::object().set("effort", reasoning["effort"]).set("summary", reasoning[summary]))
        .set("text", Json::object().set("format", render_format(asked["text"]["format"])))
        .set("store", echo("store", true))
        .set("temperature", record.temperature)
        .set("top_p", record.top_p)
        .set("presence_penalty", echo("presence_penalty", 0))
        .set("frequency_penalty", echo("frequency_penalty", 0))
        .set("top_logprobs", echo("top_logprobs", 0))
        .set("parallel_tool_calls", echo("parallel_tool_calls", true))
        .set("tool_choice", echo("tool_choice", "auto"))
        .set("tools", render_tools(asked["tools"]))
        .set("truncation", "disabled")
        .set("service_tier", "auto")
        .set("previous_response_id", asked["previous_response_id"])
        .set("prompt_cache_key", asked["prompt_cache_key"])
        .set("safety_identifier", nullptr);
    if (const Json& in = asked["conversation"]; !in.is_null())
        object.set("conversation", in.is_object() ? in : Json::object().set("id", in));
    if (words.echo) object.set("user", asked["user"]);
    object.set("metadata", render_metadata(asked["metadata"]))
        .set("usage", render_usage(done ? outcome.usage : Usage{}, words));
    if (done && !outcome.stopped_by.empty()) object.set("stopped_by", outcome.stopped_by);
    return object;
}

std::vector<Json> render_input_items(const Json& request, const std::string& response_id) {
    const Json& input = request["input"];
    std::vector<Json> items;
    if (input.is_string()) {
        const Json message = Json::object().set("role", "user").set("content", input);
        items.push_back(render_input_item(message, response_id, 0));
    }
    for (const Json& item : (input.is_object() ? input["messages"] : input).items())
        items.push_back(render_input_item(item, response_id, items.size()));
    return items;
}

Json render_error(const Error& error) {
    const ApiKind& kind = api_kind(error.kind);
    const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
    const bool shown = api_shows(kind, error);
    const bool own_code = kind.shown != ApiShown::never && !error.code.empty();
    const char* instead = kind.status == 503 ? "the server has no room for this now"
                                             : "something went wrong on the server";
    return Json::object().set("error", Json::object()
                                           .set("message", shown ? error.message : instead)
                                           .set("type", kind.type)
                                           .set("param", or_null(error.param))
                                           .set("code", own_code ? error.code : kind.code));
}

Json doc_error() {
    std::vector<std::string_view> types;
    for (const ApiKind& kind : api_kinds)
        if (std::find(types.begin(), types.end(), kind.type) == types.end())
            types.emplace_back(kind.type);
    types.emplace_back("overloaded_error");  // of Messages
    const Json or_null = doc_or_null(doc_type("string"));
    return doc_object(1, {{"error", doc_object(4, {{"message", doc_type("string")},
                                                   {"type", doc_words(types)},
                                                   {"param", or_null},
                                                   {"code", or_null}})}});
}

int http_status(const Error& error) {
    for (const ApiCode& row : api_codes)
        if (row.kind == error.kind && row.code == error.code) return row.status;
    return api_kind(error.kind).status;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>api
// Owns: the table of request fields and their checks, the response object, the error envelope.
// Assumes: bodies were parsed by >>json, so they are valid UTF-8 without duplicate keys.
// Promises: the first fault is the one that is reported: missing fields in the order of the table,
//           then the others as the body has them, then rules across fields.
#include "prologue.hpp"

#include "api_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {

Item Item::message(Role role, std::string text) {
    Item item;
    item.role = role;
    item.content.push_back(
        {role == Role::assistant ? ContentPart::Kind::output_text : ContentPart::Kind::input_text,
         std::move(text)});
    return item;
}

Item Item::output(const Item& call, std::string text) {
    Item item = message(Role::tool, std::move(text));
    item.kind = call.kind == Kind::custom_tool_call ? Kind::custom_tool_call_output
                                                    : Kind::function_call_output;
    item.call_id = call.call_id;
    item.name = call.name;
    return item;
}

std::string Item::text() const {
    std::string all;
    for (const ContentPart& part : content) all += part.text;
    return all;
}

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

/// Codes of invalid_request for which HTTP has a status of its own.
struct ApiCode {
    std::string_view code;
    int status;
};
constexpr ApiCode api_codes[] = {{"method_not_allowed", 405}, {"unsupported_media_type", 415}};

const ApiKind& api_kind(ErrorKind kind) {
    for (const ApiKind& row : api_kinds)
        if (row.kind == kind) return row;
    return std::end(api_kinds)[-1];  // io, bad_data, cancelled: nothing a client sent
}

bool api_shows(const ApiKind& kind, const Error& error) {
    return kind.shown == ApiShown::always ||
           (kind.shown == ApiShown::with_code && !error.code.empty());
}

Error api_error(const char* code, std::string param, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, std::move(param));
}

// What was received, for messages: short, never a whole document.
std::string api_shown(const Json& value) {
    switch (value.kind()) {
        case Json::Kind::null: return "null";
        case Json::Kind::array: return "an array";
        case Json::Kind::object: return "an object";
        case Json::Kind::string: {
            if (value.as_string().size() > 60) return "a string";
            return value.write();
        }
        default: return value.write();
    }
}

Error api_wrong_type(const std::string& path, const char* expected, const Json& got) {
    return api_error(
        "invalid_type", path,
        "'" + path + "' must be " + expected + ", but " + api_shown(got) + " was received");
}

Error api_wrong_value(const char* code, const std::string& path, const std::string& allowed,
                      const Json& got) {
    return api_error(
        code, path,
        "'" + path + "' must be " + allowed + ", but " + api_shown(got) + " was received");
}

Error api_missing(const std::string& path) {
    return api_error("missing_required_parameter", path, "'" + path + "' is required");
}

Error api_later(const std::string& path) {
    return api_error("unsupported_parameter", path, "'" + path + "': not in this version");
}

std::string api_index(const std::string& path, size_t i) {
    return path + "[" + std::to_string(i) + "]";
}

// ---- Checks of one value. Each returns what is wrong, or nothing. ------------------------------

using Fault = std::optional<Error>;

Fault check_text(const Json& value, const std::string& path, size_t least, size_t most) {
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    const size_t length = utf8_count(value.as_string());
    if (length < least)
        return api_error("string_below_min_length", path, "'" + path + "' must not be empty");
    if (length > most)
        return api_error(
            "string_above_max_length", path,
            format("'%s' has %zu characters; at most %zu are allowed", path.c_str(), length, most));
    return {};
}

Fault check_integer(const Json& value, const std::string& path, int64_t least, int64_t most) {
    if (!value.is_integer()) return api_wrong_type(path, "an integer", value);
    const bool above = !value.is_int() || value.as_int() > most;
    if (!above && value.as_int() >= least) return {};
    return api_wrong_value(
        above ? "integer_above_max_value" : "integer_below_min_value", path,
        above ? "at most " + std::to_string(most) : "at least " + std::to_string(least), value);
}

Fault check_number(const Json& value, const std::string& path, double least, double most) {
    if (!value.is_number()) return api_wrong_type(path, "a number", value);
    const double number = value.as_double();
    if (number < least)
        return api_wrong_value("decimal_below_min_value", path, format("at least %g", least),
                               value);
    if (number > most)
        return api_wrong_value("decimal_above_max_value", path, format("at most %g", most), value);
    return {};
}

Fault check_bool(const Json& value, const std::string& path) {
    if (value.is_bool()) return {};
    return api_wrong_type(path, "true or false", value);
}

Fault check_choice(const Json& value, const std::string& path,
                   std::span<const std::string_view> choices, const char* code = "invalid_value") {
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    std::string allowed;
    for (const std::string_view choice : choices) {
        if (value.as_string() == choice) return {};
        allowed.append(allowed.empty() ? "\"" : ", \"").append(choice).append("\"");
    }
    return api_wrong_value(code, path, (choices.size() > 1 ? "one of " : "") + allowed, value);
}

Fault check_choice(const Json& value, const std::string& path,
                   std::initializer_list<std::string_view> choices,
                   const char* code = "invalid_value") {
    return check_choice(value, path, std::span(choices.begin(), choices.size()), code);
}

// ---- Items ------------------------------------------------------------------------------------

struct ItemType {
    std::string_view name;
    Item::Kind kind;
    const char* prefix;  // of the id of one that came without
};
constexpr ItemType item_types[] = {
    {"message", Item::Kind::message, "msg_"},
    {"reasoning", Item::Kind::reasoning, "rs_"},
    {"function_call", Item::Kind::function_call, "fc_"},
    {"function_call_output", Item::Kind::function_call_output, "fco_"},
    {"custom_tool_call", Item::Kind::custom_tool_call, "ctc_"},
    {"custom_tool_call_output", Item::Kind::custom_tool_call_output, "ctco_"},
};
static_assert(std::size(item_types) == size_t(Item::Kind::custom_tool_call_output) + 1);

struct PartType {
    std::string_view name;
    std::string_view field;
    ContentPart::Kind kind;
    bool replayed;  // only in what the assistant said
};
constexpr PartType part_types[] = {
    {"input_text", "text", ContentPart::Kind::input_text, false},
    {"text", "text", ContentPart::Kind::input_text, false},  // as Chat Completions spell it
    {"output_text", "text", ContentPart::Kind::output_text, true},
    {"refusal", "refusal", ContentPart::Kind::refusal, true},
    {"summary_text", "text", ContentPart::Kind::output_text, true},
    {"reasoning_text", "text", ContentPart::Kind::output_text, true},
};

Fault read_string_field(const Json& object, const char* key, const std::string& path,
                        std::string* out) {
    const Json& value = object[key];
    const std::string field = path + "." + key;
    if (value.is_null()) return api_missing(field);
    if (!value.is_string()) return api_wrong_type(field, "a string", value);
    *out = value.as_string();
    return {};
}

Fault read_part(const Json& part, const std::string& path, bool assistant, Item* item) {
    if (!part.is_object()) return api_wrong_type(path, "an object", part);
    std::string type;
    if (Fault fault = read_string_field(part, "type", path, &type)) return fault;
    if (type == "input_image" || type == "image_url")
        return api_error("unsupported_parameter", path + ".type", "images: not in this version");
    for (const PartType& row : part_types) {
        if (type != row.name || (row.replayed && !assistant)) continue;
        ContentPart read{row.kind, {}};
        if (Fault fault = read_string_field(part, row.field.data(), path, &read.text)) return fault;
        item->content.push_back(std::move(read));
        return {};
    }
    const bool known = type == "input_audio" || type == "input_file";
    return api_wrong_value(
        known ? "unsupported_value" : "invalid_value", path + ".type",
        assistant ? "\"output_text\", \"refusal\" or \"input_text\"" : "\"input_text\"",
        part["type"]);
}

// A string, or an array of parts.
Fault read_content(const Json& content, const std::string& path, bool assistant, Item* item) {
    if (content.is_null()) return api_missing(path);
    if (content.is_string()) {
        item->content.push_back(
            {assistant ? ContentPart::Kind::output_text : ContentPart::Kind::input_text,
             std::string(content.as_string())});
        return {};
    }
    if (!content.is_array()) return api_wrong_type(path, "a string or an array of parts", content);
    for (size_t i = 0; i < content.size(); ++i)
        if (Fault fault = read_part(content[i], api_index(path, i), assistant, item)) return fault;
    return {};
}

Fault read_message(const Json& json, const std::string& path, Item* item) {
    std::string role;
    if (Fault fault = read_string_field(json, "role", path, &role)) return fault;
    if (Fault fault = check_choice(json["role"], path + ".role", kRoleNames)) return fault;
    item->role = *role_named(role);
    return read_content(json["content"], path + ".content", item->role == Role::assistant, item);
}

// Thoughts of an earlier answer: `content` where there is one, else the summary.
Fault read_reasoning(const Json& json, const std::string& path, Item* item) {
    item->role = Role::assistant;
    const char* key = json["content"].empty() ? "summary" : "content";
    if (json[key].is_null()) return {};
    return read_content(json[key], path + "." + key, true, item);
}

Fault read_call(const Json& json, const std::string& path, Item* item) {
    item->role = Role::assistant;
    const bool custom = item->kind == Item::Kind::custom_tool_call;
    if (Fault fault = read_string_field(json, "call_id", path, &item->call_id)) return fault;
    if (Fault fault = read_string_field(json, "name", path, &item->name)) return fault;
    return read_string_field(json, custom ? "input" : "arguments", path, &item->arguments);
}

Fault read_call_output(const Json& json, const std::string& path, Item* item) {
    item->role = Role::tool;
    if (Fault fault = read_string_field(json, "call_id", path, &item->call_id)) return fault;
    return read_content(json["output"], path + ".output", false, item);
}

Fault read_item(const Json& json, const std::string& path, Item* item) {
    if (!json.is_object()) return api_wrong_type(path, "an object", json);
    const Json& type = json["type"];
    if (!type.is_null() && !type.is_string())
        return api_wrong_type(path + ".type", "a string", type);
    const ItemType* found = nullptr;
    for (const ItemType& row : item_types)
        if (type.as_string("message") == row.name) found = &row;
    if (!found)
        return api_wrong_value(
            type.as_string() == "item_reference" ? "unsupported_value" : "invalid_value",
            path + ".type",
            "one of \"message\", \"reasoning\", \"function_call\", "
            "\"function_call_output\", \"custom_tool_call\", "
            "\"custom_tool_call_output\"",
            type);
    item->kind = found->kind;
    switch (item->kind) {
        case Item::Kind::message: return read_message(json, path, item);
        case Item::Kind::reasoning: return read_reasoning(json, path, item);
        case Item::Kind::function_call:
        case Item::Kind::custom_tool_call: return read_call(json, path, item);
        default: return read_call_output(json, path, item);
    }
}

Fault read_items(const Json& array, const std::string& path, Request* request) {
    if (array.empty())
        return api_error("array_below_min_length", path, "'" + path + "' must not be empty");
    request->input.items.resize(array.size());
    for (size_t i = 0; i < array.size(); ++i)
        if (Fault fault = read_item(array[i], api_index(path, i), &request->input.items[i]))
            return fault;
    return {};
}

// Every output of a call answers a call that stands before it.
Fault check_calls(const Request& request, const std::string& path) {
    std::unordered_set<std::string_view> called;
    for (size_t i = 0; i < request.input.items.size(); ++i) {
        const Item& item = request.input.items[i];
        const bool custom = item.kind == Item::Kind::custom_tool_call ||
                            item.kind == Item::Kind::custom_tool_call_output;
        if (item.kind == Item::Kind::function_call || item.kind == Item::Kind::custom_tool_call)
            called.insert(item.call_id);
        else if ((item.kind == Item::Kind::function_call_output || custom) &&
                 !called.contains(item.call_id))
            return api_error("invalid_value", api_index(path, i) + ".call_id",
                             "no call '" + item.call_id + "' stands earlier in the input");
    }
    return {};
}

// ---- The fields of a request ------------------------------------------------------------------

Fault field_model(const Json& value, Request* request) {
    request->model = value.as_string();
    return check_text(value, "model", 1, SIZE_MAX);
}

Fault field_input(const Json& value, Request* request) {
    if (value.is_string()) {
        request->input.text = value.as_string();
        return check_text(value, "input", 1, SIZE_MAX);
    }
    if (value.is_array()) return read_items(value, "input", request);
    if (!value.is_object())
        return api_wrong_type("input", "a string, an array of items or {\"messages\": [...]}",
                              value);
    const Json& messages = value["messages"];
    if (messages.is_null()) return api_missing("input.messages");
    if (!messages.is_array()) return api_wrong_type("input.messages", "an array", messages);
    return read_items(messages, "input.messages", request);
}

Fault field_instructions(const Json& value, Request* request) {
    request->instructions = value.as_string();
    return check_text(value, "instructions", 0, SIZE_MAX);
}

Fault field_max_output_tokens(const Json& value, Request* request) {
    request->max_output_tokens = static_cast<uint32_t>(
        std::clamp<int64_t>(value.as_int(), 0, int64_t{UINT32_MAX}));
    return check_integer(value, "max_output_tokens", 1, INT64_MAX);
}

Fault field_temperature(const Json& value, Request* request) {
    request->temperature = value.as_double();
    return check_number(value, "temperature", 0, 2);
}

Fault field_top_p(const Json& value, Request* request) {
    request->top_p = value.as_double();
    return check_number(value, "top_p", 0, 1);
}

Fault field_seed(const Json& value, Request* request) {
    request->seed = value.as_int();
    return check_integer(value, "seed", INT64_MIN, INT64_MAX);
}

Fault field_text(const Json& value, Request*) {
    if (!value.is_object()) return api_wrong_type("text", "an object", value);
    const Json& form = value["format"];
    if (form.is_null()) return {};
    if (!form.is_object()) return api_wrong_type("text.format", "an object", form);
    if (form["type"].is_null()) return api_missing("text.format.type");
    if (form["type"].as_string() == "json_schema")
        return api_error("unsupported_parameter", "text.format",
                         "json_schema: not in this version");
    const bool json_object = form["type"].as_string() == "json_object";
    return check_choice(form["type"], "text.format.type", {"text", "json_schema"},
                        json_object ? "unsupported_value" : "invalid_value");
}

Fault field_reasoning(const Json& value, Request*) {
    if (!value.is_object()) return api_wrong_type("reasoning", "an object", value);
    for (const JsonMember& member : value.members()) {
        const std::string path = "reasoning." + member.key;
        Fault fault;
        if (member.value.is_null()) continue;
        if (member.key == "effort")
            fault = check_choice(member.value, path,
                                 {"none", "minimal", "low", "medium", "high", "xhigh"});
        else if (member.key == "summary" || member.key == "generate_summary")
            fault = check_choice(member.value, path, {"auto", "concise", "detailed"});
        if (fault) return fault;
    }
    return {};
}

Fault field_background(const Json& value, Request* request) {
    request->background = value.as_bool();
    return check_bool(value, "background");
}

Fault field_prompt_cache_key(const Json& value, Request* request) {
    request->prompt_cache_key = value.as_string();
    return check_text(value, "prompt_cache_key", 0, SIZE_MAX);
}

// A switch that has one legal position.
Fault fixed_switch(const Json& value, const char* path, bool position) {
    if (Fault fault = check_bool(value, path)) return fault;
    if (value.as_bool() == position) return {};
    return api_wrong_value("unsupported_value", path, position ? "true" : "false", value);
}
Fault field_store(const Json& value, Request*) { return fixed_switch(value, "store", true); }
Fault openai_store(const Json& value, Request* request) {
    request->store = value.as_bool();
    return check_bool(value, "store");
}
Fault openai_previous(const Json& value, Request* request) {
    request->previous_response_id = value.as_string();
    return check_text(value, "previous_response_id", 1, 256);
}
Fault field_stream(const Json& value, Request*) { return fixed_switch(value, "stream", false); }

Fault field_truncation(const Json& value, Request*) {
    return check_choice(value, "truncation", {"disabled"}, "unsupported_value");
}

Fault field_service_tier(const Json& value, Request*) {
    return check_choice(value, "service_tier", {"auto"}, "unsupported_value");
}

Fault field_user(const Json& value, Request* request) {
    request->user = value.as_string();
    return check_text(value, "user", 0, 256);
}

constexpr size_t metadata_max_pairs = 256, metadata_max_key = 256, metadata_max_value = 8192;

Window window_of(std::string_view name) {
    const auto* found = std::find(std::begin(kWindowNames), std::end(kWindowNames), name);
    return found == std::end(kWindowNames) ? Window::standard
                                           : static_cast<Window>(found - std::begin(kWindowNames));
}

Fault check_metadata(const std::string& key, const Json& value) {
    const std::string path = "metadata." + key;
    if (utf8_count(key) > metadata_max_key)
        return api_error(
            "string_above_max_length", "metadata",
            format("a key of 'metadata' has more than %zu characters", metadata_max_key));
    if (Fault fault = check_text(value, path, 0, metadata_max_value)) return fault;
    if (key == "completion_webhook") return api_later(path);
    if (key == kWindowKey) return check_choice(value, path, kWindowNames);
    if (key != "webhook_token") return {};
    const std::string_view token = value.as_string();
    const bool plain = std::all_of(token.begin(), token.end(),
                                   [](char c) { return c > ' ' && c < 127; });
    if (token.size() <= 512 && plain) return {};
    return api_error("invalid_value", path,
                     "'" + path + "' must be at most 512 visible ASCII characters");
}

Fault field_metadata(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("metadata", "an object", value);
    if (value.size() > metadata_max_pairs)
        return api_error("invalid_value", "metadata",
                         format("'metadata' has %zu pairs; at most %zu are allowed", value.size(),
                                metadata_max_pairs));
    for (const JsonMember& member : value.members()) {
        if (Fault fault = check_metadata(member.key, member.value)) return fault;
        request->metadata.emplace_back(member.key, member.value.as_string());
        if (member.key == kWindowKey) request->window = window_of(member.value.as_string());
    }
    return {};
}

Fault field_tools(const Json& value, Request*) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    if (!value.empty()) return api_later("tools");
    return {};
}

Fault field_tool_choice(const Json& value, Request*) {
    if (value.is_string()) return check_choice(value, "tool_choice", {"none", "auto", "required"});
    if (!value.is_object()) return api_wrong_type("tool_choice", "a string or an object", value);
    if (value["type"].is_null()) return api_missing("tool_choice.type");
    return check_choice(value["type"], "tool_choice.type", {"function", "custom", "allowed_tools"});
}

Fault field_parallel_tool_calls(const Json& value, Request*) {
    return check_bool(value, "parallel_tool_calls");
}

Fault field_include(const Json& value, Request* request) {
    static constexpr std::string_view refused[] = {
        "reasoning.encrypted_content", "web_search_call.action.sources",
        "code_interpreter_call.outputs", "computer_call_output.output.image_url",
        "file_search_call.results"};
    if (!value.is_array()) return api_wrong_type("include", "an array", value);
    for (size_t i = 0; i < value.size(); ++i) {
        const std::string path = api_index("include", i);
        if (!value[i].is_string()) return api_wrong_type(path, "a string", value[i]);
        const std::string_view name = value[i].as_string();
        if (std::find(std::begin(refused), std::end(refused), name) != std::end(refused))
            return api_error("unsupported_value", path,
                             "'" + std::string(name) + "' cannot be included");
        if (name == "message.output_text.logprobs") request->logprobs = true;
    }
    return {};
}

Fault field_top_logprobs(const Json& value, Request* request) {
    request->top_logprobs = static_cast<uint32_t>(std::clamp<int64_t>(value.as_int(), 0, 20));
    return check_integer(value, "top_logprobs", 0, 20);
}

struct RequestField {
    using Check = Fault (*)(const Json& value, Request* request);
    std::string_view name;
    Check check;  // null: not supported at all
    bool required = false;
    Check openai = nullptr;  // where that dialect differs
};
constexpr RequestField request_fields[] = {
    {"model", field_model, true},
    {"input", field_input, true},
    {"instructions", field_instructions},
    {"max_output_tokens", field_max_output_tokens},
    {"temperature", field_temperature},
    {"top_p", field_top_p},
    {"seed", field_seed},
    {"text", field_text},
    {"reasoning", field_reasoning},
    {"background", field_background},
    {"prompt_cache_key", field_prompt_cache_key},
    {"store", field_store, false, openai_store},
    {"truncation", field_truncation},
    {"stream", field_stream},
    {"user", field_user},
    {"metadata", field_metadata},
    {"tools", field_tools},
    {"tool_choice", field_tool_choice},
    {"parallel_tool_calls", field_parallel_tool_calls},
    {"include", field_include},
    {"top_logprobs", field_top_logprobs},
    {"service_tier", field_service_tier},
    {"previous_response_id", nullptr, false, openai_previous},
    {"conversation", nullptr},
    {"prompt", nullptr},
};

const RequestField* find_request_field(std::string_view name) {
    for (const RequestField& field : request_fields)
        if (field.name == name) return &field;
    return nullptr;
}

// Tools are always [] in this version, so a choice that demands one can never be met.
Fault check_tool_choice(const Json& choice) {
    const bool demands = choice.is_object() || choice.as_string() == "required";
    if (!demands) return {};
    return api_error("invalid_value", "tool_choice",
                     "'tool_choice' demands a tool, but 'tools' is empty");
}

Fault check_background(const Request& request) {
    if (request.background && !request.store)
        return api_error("unsupported_value", "store",
                         "'store' must be true with 'background', but false was received");
    if (request.background || request.window != Window::flex) return {};
    return api_error("invalid_value", kWindowField,
                     format("'%s' may be \"flex\" only with 'background': true", kWindowField));
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

const ItemType& type_of(Item::Kind kind) { return item_types[static_cast<size_t>(kind)]; }

Json render_part(const Item& item, const ContentPart& part) {
    if (item.kind == Item::Kind::reasoning)
        return Json::object().set("type", "reasoning_text").set("text", part.text);
    if (item.role != Role::assistant)
        return Json::object().set("type", "input_text").set("text", part.text);
    if (part.kind == ContentPart::Kind::refusal)
        return Json::object().set("type", "refusal").set("refusal", part.text);
    return Json::object()
        .set("type", "output_text")
        .set("text", part.text)
        .set("annotations", Json::array());
}

Json render_parts(const Item& item) {
    Json parts = Json::array();
    for (const ContentPart& part : item.content) parts.push(render_part(item, part));
    return parts;
}

Json item_json(const Item& item, const std::string& id, const char* status) {
    const bool custom = item.kind == Item::Kind::custom_tool_call;
    Json out = Json::object();
    if (!id.empty()) out.set("id", id);
    out.set("type", type_of(item.kind).name);
    if (item.kind == Item::Kind::message) out.set("role", role_name(item.role));
    if (status) out.set("status", status);
    switch (item.kind) {
        case Item::Kind::message: return out.set("content", render_parts(item));
        case Item::Kind::reasoning:
            return out.set("summary", Json::array()).set("content", render_parts(item));
        case Item::Kind::function_call:
        case Item::Kind::custom_tool_call:
            return out.set("call_id", item.call_id)
                .set("name", item.name)
                .set(custom ? "input" : "arguments", item.arguments);
        default: break;
    }
    return out.set("call_id", item.call_id).set("output", item.text());
}

// Those of a message's tokens, in its first part.
void add_logprobs(const Outcome& outcome, size_t index, Json* item) {
    std::vector<TokenLogprob> own;
    for (const TokenLogprob& token : outcome.logprobs)
        if (token.item == index) own.push_back(token);
    if (Json* content = item->find("content"); content && !content->empty() && !own.empty())
        content->items().front().set("logprobs", render_logprobs(own));
}

Json render_output(const ResponseRecord& record, const Outcome& outcome,
                   const DialectWords& words) {
    Json output = Json::array();
    const bool whole = record.status == Status::completed;
    if (!is_terminal(record.status)) return output;
    std::vector<Item> items = outcome.items;
    if (items.empty() && (!outcome.text.empty() || (whole && !outcome.cut)))
        items.push_back(Item::message(Role::assistant, outcome.text));
    bool first = true;  // of the messages: it has the id that was drawn at acceptance
    for (size_t i = 0; i < items.size(); ++i) {
        const bool message = items[i].kind == Item::Kind::message;
        const bool last = i + 1 == items.size();
        const std::string id = message && std::exchange(first, false)
                                   ? record.message_id
                                   : derive_id(type_of(items[i].kind).prefix,
                                               record.id + "/" + std::to_string(i));
        const char* status = !last         ? "completed"
                             : !whole      ? "incomplete"
                             : outcome.cut ? words.cut_item
                                           : "completed";
        Json item = item_json(items[i], id, status);
        if (message) add_logprobs(outcome, i, &item);
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

Json render_metadata(const Json& given) {
    Json shown = given.is_object() ? given : Json::object();
    if (Json* token = shown.find("webhook_token")) *token = "***";
    return shown;
}

Json render_failure(const Outcome& outcome, const DialectWords& words) {
    if (!outcome.error) return nullptr;
    const ApiKind& kind = api_kind(outcome.error->kind);
    const std::string own = outcome.error->code.empty() ? kind.code : outcome.error->code;
    return Json::object()
        .set("code", words.failure ? words.failure : own)
        .set("message", api_shows(kind, *outcome.error) ? outcome.error->message
                                                        : "the model could not be run");
}

}  // namespace

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

Result<Request> parse_response_request(const Json& body, Dialect dialect) {
    if (!body.is_object()) return api_error("invalid_type", {}, "the body must be a JSON object");
    for (const RequestField& field : request_fields)
        if (field.required && body[field.name].is_null())
            return api_missing(std::string(field.name));
    Request request;
    for (const JsonMember& member : body.members()) {
        const RequestField* field = find_request_field(member.key);
        if (!field || member.value.is_null()) continue;
        const bool differs = dialect == Dialect::openai && field->openai;
        const RequestField::Check check = differs ? field->openai : field->check;
        if (!check)
            return api_error("unsupported_parameter", member.key,
                             "'" + member.key + "' is not supported");
        if (Fault fault = check(member.value, &request)) return std::move(*fault);
    }
    const char* items = body["input"].is_object() ? "input.messages" : "input";
    if (Fault fault = check_calls(request, items)) return std::move(*fault);
    if (Fault fault = check_tool_choice(body["tool_choice"])) return std::move(*fault);
    if (Fault fault = check_background(request)) return std::move(*fault);
    return request;
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
    Json form = asked["text"]["format"];
    if (form.is_null()) form = Json::object().set("type", "text");
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
        .set("max_tool_calls", nullptr)
        .set("reasoning",
             Json::object().set("effort", reasoning["effort"]).set("summary", reasoning[summary]))
        .set("text", Json::object().set("format", std::move(form)))
        .set("store", echo("store", true))
        .set("temperature", record.temperature)
        .set("top_p", record.top_p)
        .set("presence_penalty", 0)
        .set("frequency_penalty", 0)
        .set("top_logprobs", echo("top_logprobs", 0))
        .set("parallel_tool_calls", echo("parallel_tool_calls", true))
        .set("tool_choice", echo("tool_choice", "auto"))
        .set("tools", echo("tools", Json::array()))
        .set("truncation", "disabled")
        .set("service_tier", "auto")
        .set("previous_response_id", asked["previous_response_id"])
        .set("prompt_cache_key", asked["prompt_cache_key"])
        .set("safety_identifier", nullptr);
    if (words.echo) object.set("user", asked["user"]);
    object.set("metadata", render_metadata(asked["metadata"]))
        .set("usage", render_usage(done ? outcome.usage : Usage{}, words));
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

int http_status(const Error& error) {
    if (error.kind == ErrorKind::invalid_request)
        for (const ApiCode& row : api_codes)
            if (row.code == error.code) return row.status;
    return api_kind(error.kind).status;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

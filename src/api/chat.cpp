#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Chat Completions: the request -------------------------------------------------------------

namespace {

/// Reads the messages one by one; items come out.
struct ChatMessages {
    SurfaceBody* out;
    std::unordered_set<std::string> custom_calls = {};

    Fault add_message(const Json& message, const std::string& path);
    Fault add_assistant(const Json& message, const std::string& path);
    Fault add_call(const Json& call, const std::string& path);
    Fault add_result(const Json& message, const std::string& path);
};

Fault ChatMessages::add_message(const Json& message, const std::string& path) {
    if (!message.is_object()) return api_wrong_type(path, "an object", message);
    const std::string_view role = message["role"].as_string();
    if (role == role_name(Role::assistant)) return add_assistant(message, path);
    if (role == role_name(Role::tool)) return add_result(message, path);
    Json item = Json::object().set("role", message["role"]).set("content", message["content"]);
    if (role == role_name(Role::function) && message["content"].is_null()) item.set("content", "");
    out->add(std::move(item), path);
    return {};
}

/// Thoughts, text and calls, in that order. Without any of them it says nothing, and is left out.
Fault ChatMessages::add_assistant(const Json& message, const std::string& path) {
    const Json& one = message["reasoning_content"];
    const Json& thoughts = one.is_null() ? message["reasoning"] : one;
    if (!thoughts.is_null() && !thoughts.is_string())
        return api_wrong_type(path + (one.is_null() ? ".reasoning" : ".reasoning_content"),
                              "a string", thoughts);
    if (!thoughts.as_string().empty()) {
        const Json part = Json::object().set("type", "reasoning_text").set("text", thoughts);
        out->add(Json::object().set("type", "reasoning").set("content", Json::array().push(part)),
                 path);
    }
    const Json& calls = message["tool_calls"];
    if (!calls.is_null() && !calls.is_array())
        return api_wrong_type(path + ".tool_calls", "an array", calls);
    Json content = message["content"];
    if (content.is_null() && !message["refusal"].is_null())
        content = Json::array().push(
            Json::object().set("type", "refusal").set("refusal", message["refusal"]));
    if (!content.is_null() || (calls.empty() && thoughts.is_null()))
        out->add(Json::object().set("role", "assistant").set("content", std::move(content)), path);
    for (size_t i = 0; i < calls.size(); ++i)
        if (Fault fault = add_call(calls[i], api_index(path + ".tool_calls", i))) return fault;
    return {};
}

Fault ChatMessages::add_call(const Json& call, const std::string& path) {
    if (!call.is_object()) return api_wrong_type(path, "an object", call);
    const bool custom = call["type"].as_string() == "custom";
    const char* key = custom ? "custom" : "function";
    const Json& called = call[key];
    if (!called.is_object()) return api_wrong_type(path + "." + key, "an object", called);
    if (custom) custom_calls.emplace(call["id"].as_string());
    out->add(Json::object()
                 .set("type", custom ? "custom_tool_call" : "function_call")
                 .set("call_id", call["id"])
                 .set("name", called["name"])
                 .set(custom ? "input" : "arguments", called[custom ? "input" : "arguments"]),
             path);
    return {};
}

Fault ChatMessages::add_result(const Json& message, const std::string& path) {
    const bool custom = custom_calls.contains(std::string(message["tool_call_id"].as_string()));
    out->add(Json::object()
                 .set("type", custom ? "custom_tool_call_output" : "function_call_output")
                 .set("call_id", message["tool_call_id"])
                 .set("output", message["content"]),
             path);
    return {};
}

Fault chat_messages(const Json& value, SurfaceBody* out) {
    if (!value.is_array()) return api_wrong_type("messages", "an array", value);
    if (value.empty())
        return api_error("array_below_min_length", "messages", "'messages' must not be empty");
    out->body.set("input", Json::array());
    ChatMessages messages{out};
    for (size_t i = 0; i < value.size(); ++i)
        if (Fault fault = messages.add_message(value[i], api_index("messages", i))) return fault;
    return {};
}

Json doc_chat_calls() {
    const Json text = doc_type("string"), id = doc_text(1);
    const auto call = [&](const char* said) {
        return doc_object(2, {{"name", text}, {said, text}});
    };
    return doc_array(
        doc_any(
            {doc_object(
                 2, {{"id", id}, {"function", call("arguments")}, {"type", doc_word("function")}}),
             doc_object(3, {{"id", id}, {"custom", call("input")}, {"type", doc_word("custom")}})}),
        1);
}

/// One who says something: each of the fields can be it.
Json doc_chat_assistant() {
    const std::pair<std::string_view, Json> said[] = {{"content", doc_content(true)},
                                                      {"tool_calls", doc_chat_calls()},
                                                      {"refusal", doc_text(1)},
                                                      {"reasoning_content", doc_text(1)},
                                                      {"reasoning", doc_text(1)}};
    Json all = doc_any({});
    for (const auto& field : said)
        all.find("anyOf")->push(
            doc_object(2, {{"role", doc_word(role_name(Role::assistant))}, field}));
    return all;
}

Json doc_chat_messages(Dialect) {
    Json roles = Json::array();
    for (const std::string_view role : kRoleNames)
        if (role != role_name(Role::assistant) && role != role_name(Role::tool)) roles.push(role);
    return doc_array(
        doc_any({doc_object(2, {{"role", doc_type("string").set("enum", std::move(roles))},
                                {"content", doc_content(false)}}),
                 doc_object(3, {{"role", doc_word(role_name(Role::tool))},
                                {"content", doc_content(false)},
                                {"tool_call_id", doc_text(1)}}),
                 doc_chat_assistant()}),
        1);
}

/// {"type": T, T: {...}}, as Chat Completions nest it, in one object.
Json chat_flat(const Json& nested) {
    const std::string type(nested["type"].as_string());
    if (!nested[type].is_object()) return nested;
    Json flat = Json::object().set("type", type);
    for (const JsonMember& member : nested[type].members()) flat.set(member.key, member.value);
    return flat;
}

Fault chat_format(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("response_format", "an object", value);
    Json format = chat_flat(value);
    if (value["type"].as_string() == "json_object")
        format = Json::object()
                     .set("type", "json_schema")
                     .set("name", "json_object")
                     .set("schema", Json::object().set("type", "object"))
                     .set("strict", true);
    out->body.set("text", Json::object().set("format", std::move(format)));
    return {};
}

Json doc_chat_format(Dialect) {
    return doc_any(
        {doc_nested(doc_format(false)), doc_object(1, {{"type", doc_word("json_object")}})});
}

Fault chat_tools(const Json& value, SurfaceBody* out) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    Json tools = Json::array();
    for (size_t i = 0; i < value.size(); ++i) {
        if (!value[i].is_object())
            return api_wrong_type(api_index("tools", i), "an object", value[i]);
        Json tool = chat_flat(value[i]);
        if (tool["type"].as_string() == "function" && tool["strict"].is_null())
            tool.set("strict", false);
        if (tool.contains("format")) tool.set("format", chat_flat(tool["format"]));
        tools.push(std::move(tool));
    }
    out->body.set("tools", std::move(tools));
    return {};
}

Json doc_chat_tools(Dialect) { return doc_array(doc_nested(doc_tool())); }

Fault chat_tool_choice(const Json& value, SurfaceBody* out) {
    Json choice = value.is_object() ? chat_flat(value) : value;
    if (Json* tools = choice.is_object() ? choice.find("tools") : nullptr)
        for (Json& tool : tools->items()) tool = chat_flat(tool);
    out->body.set("tool_choice", std::move(choice));
    return {};
}

Json doc_chat_tool_choice(Dialect) { return doc_nested(doc_tool_choice()); }

Fault chat_effort(const Json& value, SurfaceBody* out) {
    out->body.set("reasoning", Json::object().set("effort", value));
    return {};
}

Json doc_chat_effort(Dialect) { return doc_words(kEffortNames); }

Fault chat_max_tokens(const Json& value, SurfaceBody* out) {
    if (out->body["max_output_tokens"].is_null()) out->body.set("max_output_tokens", value);
    return {};
}

Fault chat_logprobs(const Json& value, SurfaceBody* out) {
    if (value.as_bool())
        out->body.set("include", Json::array().push("message.output_text.logprobs"));
    return check_bool(value, "logprobs");
}

Json doc_chat_logprobs(Dialect) { return doc_type("boolean"); }

Fault chat_n(const Json& value, SurfaceBody*) {
    if (value.is_int() && value.as_int() == 1) return {};
    return api_error("unsupported_value", "n", "'n' must be 1: one choice a request");
}

Json doc_chat_n(Dialect) { return doc_type("integer").set("minimum", 1).set("maximum", 1); }

constexpr std::string_view chat_modes[] = {"text"};

Fault chat_modalities(const Json& value, SurfaceBody*) {
    if (value.is_array() && value.size() == 1 && value[0].as_string() == chat_modes[0]) return {};
    return api_error("unsupported_value", "modalities", "'modalities' must be [\"text\"]");
}

Json doc_chat_modalities(Dialect) { return doc_array(doc_words(chat_modes), 1, 1); }

constexpr SurfaceField chat_fields[] = {
    // clang-format off
    {"model", "model"},
    {"messages", "input", chat_messages, false, doc_chat_messages},
    {"max_completion_tokens", "max_output_tokens"},
    {"max_tokens", "max_output_tokens", chat_max_tokens, true},
    {"temperature", "temperature"},
    {"top_p", "top_p"},
    {"seed", "seed"},
    {"response_format", "text.format", chat_format, false, doc_chat_format},
    {"reasoning_effort", "reasoning.effort", chat_effort, false, doc_chat_effort},
    {"n", {}, chat_n, false, doc_chat_n},
    {"modalities", {}, chat_modalities, false, doc_chat_modalities},
    {"stream", {}, surface_stream, false, doc_surface_stream},
    {"stream_options", {}, surface_stream_options, false, doc_surface_stream_options},
    {"store", "store"},
    {"user", "user"},
    {"metadata", "metadata"},
    {"tools", "tools", chat_tools, false, doc_chat_tools},
    {"tool_choice", "tool_choice", chat_tool_choice, false, doc_chat_tool_choice},
    {"parallel_tool_calls", "parallel_tool_calls"},
    {"service_tier", "service_tier"},
    {"prompt_cache_key", "prompt_cache_key"},
    {"top_k", "top_k"},
    {"min_p", "min_p"},
    {"repetition_penalty", "repetition_penalty"},
    {"stop", "stop", surface_stop, true},
    {"logprobs", {}, chat_logprobs, true, doc_chat_logprobs},
    {"top_logprobs", "top_logprobs", nullptr, true},
    {"logit_bias", "logit_bias", nullptr, true},
    {"presence_penalty", "presence_penalty", nullptr, true},
    {"frequency_penalty", "frequency_penalty", nullptr, true},
    // clang-format on
};
constexpr std::string_view chat_refused[] = {"verbosity", "audio",         "prediction",
                                             "functions", "function_call", "web_search_options"};

constexpr std::string_view chat_required[] = {"model", "messages"};

/// The rest of a path into what Chat Completions nests in an object by its type.
std::string chat_nested(std::string_view type, std::string rest) {
    if (rest.empty() || rest.starts_with(".type")) return rest;
    return "." + std::string(type) + rest;
}

/// The rest of a path into an item.
std::string chat_item_rest(const Json& item, const std::string& rest) {
    const std::string_view type = item["type"].as_string("message");
    const bool result = type.ends_with("_output"), custom = type.starts_with("custom_");
    if (!result && !type.ends_with("_call")) return rest;
    if (rest == ".call_id") return result ? ".tool_call_id" : ".id";
    if (result)
        return ".content" + rest.substr(std::min(rest.size(), std::string(".output").size()));
    return chat_nested(custom ? "custom" : "function", rest);
}

/// The rest of a path below a field of a body of /v1/responses, as this surface nests it.
std::string chat_rest(std::string_view field, const Json& value, const std::string& rest) {
    if (field == "input") return chat_item_rest(value, rest);
    if (field == "text.format") return chat_nested("json_schema", rest);
    const bool typed = field == "tools" || (field == "tool_choice" && rest == ".name");
    return typed ? chat_nested(value["type"].as_string(), rest) : rest;
}

// ---- The answer --------------------------------------------------------------------------------

std::string chat_id(std::string_view response_id) {
    return derive_id("chatcmpl_", std::string(response_id));
}

Json chat_call(const Item& item) {
    const bool custom = item.kind == Item::Kind::custom_tool_call;
    const char* type = custom ? "custom" : "function";
    return Json::object()
        .set("id", item.call_id)
        .set("type", type)
        .set(type, Json::object()
                       .set("name", item.name)
                       .set(custom ? "input" : "arguments", item.arguments));
}

Json chat_usage(const Usage& usage) {
    const Json cached = Json::object().set("cached_tokens", usage.cached_tokens);
    const Json thought = Json::object().set("reasoning_tokens", usage.reasoning_tokens);
    return Json::object()
        .set("prompt_tokens", usage.input_tokens)
        .set("completion_tokens", usage.output_tokens)
        .set("total_tokens", usage.input_tokens + usage.output_tokens)
        .set("prompt_tokens_details", cached)
        .set("completion_tokens_details", thought);
}

const char* chat_finish(const Outcome& outcome, Dialect dialect) {
    if (outcome.cut) return dialect == Dialect::openai ? "length" : "stop";
    const auto& items = outcome.items;
    const bool called = std::any_of(items.begin(), items.end(),
                                    [](const Item& item) { return item.is_call(); });
    return called ? "tool_calls" : "stop";
}

/// How it ended, and which stop string ended it, as vLLM says it.
void set_chat_end(Json& choice, const Outcome& outcome, Dialect dialect) {
    choice.set("finish_reason", chat_finish(outcome, dialect));
    if (!outcome.stopped_by.empty()) choice.set("stop_reason", outcome.stopped_by);
}

Result<std::string> chat_render(const std::string& object, Dialect dialect) {
    auto parsed = Json::parse(object);
    if (!parsed) return parsed.error();
    const Json& response = *parsed;
    const Outcome outcome = outcome_of(response);
    if (outcome.status != Status::completed) return surface_failure(outcome);
    std::string text, thoughts;
    Json calls = Json::array(), logprobs = nullptr;
    bool said = false;
    for (size_t i = 0; i < outcome.items.size(); ++i) {
        const Item& item = outcome.items[i];
        if (item.is_call()) calls.push(chat_call(item));
        else (item.kind == Item::Kind::reasoning ? thoughts : text) += item.text();
        said |= item.kind == Item::Kind::message;
        const Json& tokens = response["output"][i]["content"][0]["logprobs"];
        if (tokens.empty()) continue;
        if (logprobs.is_null())
            logprobs = Json::object().set("content", Json::array()).set("refusal", nullptr);
        for (const Json& token : tokens.items()) logprobs.find("content")->push(token);
    }
    Json message = Json::object()
                       .set("role", "assistant")
                       .set("content", said || calls.empty() ? Json(text) : Json());
    if (!thoughts.empty()) message.set("reasoning_content", thoughts).set("reasoning", thoughts);
    message.set("refusal", nullptr);
    if (!calls.empty()) message.set("tool_calls", std::move(calls));
    Json choice = Json::object()
                      .set("index", 0)
                      .set("message", std::move(message))
                      .set("logprobs", std::move(logprobs));
    set_chat_end(choice, outcome, dialect);
    return Json::object()
        .set("id", chat_id(response["id"].as_string()))
        .set("object", "chat.completion")
        .set("created", response["created_at"])
        .set("model", response["model"])
        .set("choices", Json::array().push(std::move(choice)))
        .set("usage", chat_usage(outcome.usage))
        .write();
}

// ---- The stream --------------------------------------------------------------------------------

class ChatEvents : public EventWriter {
public:
    ChatEvents(const ResponseRecord& record, bool include_usage, Dialect dialect)
        : head_(Json::object()
                    .set("id", chat_id(record.id))
                    .set("object", "chat.completion.chunk")
                    .set("created", record.created_at)
                    .set("model", record.model)),
          include_usage_(include_usage),
          dialect_(dialect) {}

    void begin(const Json&) override {
        add_delta(Json::object().set("role", "assistant").set("content", ""));
    }
    void add(const Event& event) override;
    void end(const Outcome& outcome, const std::string& object) override;
    void fail(const Error& error, bool = false) override { write(render_error(error)); }

private:
    void write(const Json& chunk) { text_.append("data: ").append(chunk.write()).append("\n\n"); }
    void add_delta(Json delta, Json logprobs = nullptr, const Outcome* ended = nullptr);
    void add_text(Item::Kind kind, std::string_view text, const std::vector<TokenLogprob>& tokens);
    void add_call(const Item& item);

    Json head_;
    bool include_usage_;
    Dialect dialect_;
    size_t told_ = 0, calls_ = 0;         // items so far, and calls among them
    std::optional<size_t> message_ = {};  // that is begun
};

void ChatEvents::add_delta(Json delta, Json logprobs, const Outcome* ended) {
    Json choice = Json::object()
                      .set("index", 0)
                      .set("delta", std::move(delta))
                      .set("logprobs", std::move(logprobs))
                      .set("finish_reason", nullptr);
    if (ended) set_chat_end(choice, *ended, dialect_);
    Json chunk = head_;
    chunk.set("choices", Json::array().push(std::move(choice)));
    if (include_usage_) chunk.set("usage", nullptr);
    write(chunk);
}

void ChatEvents::add_text(Item::Kind kind, std::string_view text,
                          const std::vector<TokenLogprob>& tokens) {
    if (text.empty() && tokens.empty()) return;
    if (kind == Item::Kind::reasoning)
        return add_delta(Json::object().set("reasoning_content", text).set("reasoning", text));
    Json logprobs = nullptr;
    if (!tokens.empty())
        logprobs = Json::object().set("content", render_logprobs(tokens)).set("refusal", nullptr);
    add_delta(Json::object().set("content", text), std::move(logprobs));
}

/// In one piece: what was begun and then cut is never seen.
void ChatEvents::add_call(const Item& item) {
    Json call = Json::object().set("index", calls_++);
    const Json whole = chat_call(item);
    for (const JsonMember& member : whole.members()) call.set(member.key, member.value);
    add_delta(Json::object().set("tool_calls", Json::array().push(std::move(call))));
}

void ChatEvents::add(const Event& event) {
    if (event.kind == Event::Kind::prompt_progress) {
        Json chunk = head_;
        chunk.set("choices", Json::array());
        if (include_usage_) chunk.set("usage", nullptr);
        return write(chunk.set("prompt_progress", render_progress(event.progress)));
    }
    const bool thought = event.kind == Event::Kind::reasoning_delta;
    const bool text = event.kind == Event::Kind::text_delta && !event.text.empty();
    keep_tokens(event.logprobs);
    if (event.kind == Event::Kind::item_begun) message_.reset();
    if (text || (event.kind == Event::Kind::item_begun && event.item.kind == Item::Kind::message))
        message_ = event.index;
    if (thought) add_text(Item::Kind::reasoning, event.text, {});
    else if (const Item* call = event.call()) add_call(*call);
    else if (message_ == event.index)
        add_text(Item::Kind::message, event.text, tokens_of(event.index));
    else return;
    told_ = event.index + 1;
}

void ChatEvents::end(const Outcome& outcome, const std::string&) {
    if (outcome.status != Status::completed) return fail(surface_failure(outcome));
    const std::vector<Item> items = output_items(outcome, outcome.status);
    for (size_t i = told_; i < items.size(); ++i)
        if (items[i].is_call()) add_call(items[i]);
        else add_text(items[i].kind, items[i].text(), logprobs_of(outcome, i));
    add_delta(Json::object(), nullptr, &outcome);
    if (include_usage_) {
        Json chunk = head_;
        chunk.set("choices", Json::array());
        write(chunk.set("usage", chat_usage(outcome.usage)));
    }
    text_ += "data: [DONE]\n\n";
}

std::unique_ptr<EventWriter> chat_events(const ResponseRecord& record, bool include_usage,
                                         Dialect dialect) {
    return std::make_unique<ChatEvents>(record, include_usage, dialect);
}

}  // namespace

const Surface chat_surface = {
    .name = "ChatCompletion",
    .path = "/v1/chat/completions",
    .fields = chat_fields,
    .refused = chat_refused,
    .required = chat_required,
    .rest = chat_rest,
    .render = chat_render,
    .events = chat_events,
    .timeout_status = 408,
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "upstream/answer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- What is asked -----------------------------------------------------------------------------

namespace {

/// How the forms are said that have no words in OpenAI's API. Null, or false: not at all.
struct UpstreamWords {
    std::string_view owner;
    const char* inside;                 // an object that holds them
    const char *regex, *one_of, *gbnf;  // their names
    bool own;                           // as another valar has them
};
constexpr UpstreamWords upstream_words[] = {
    {"valar", nullptr, nullptr, nullptr, nullptr, true},
    {"vllm", "structured_outputs", "regex", "choice", "grammar", false},
    {"sglang", nullptr, "regex", nullptr, "ebnf", false},
    {"llamacpp", nullptr, nullptr, nullptr, "grammar", false},
    {{}, nullptr, nullptr, nullptr, nullptr, false},
};

const UpstreamWords& words_for(std::string_view owner) {
    for (const UpstreamWords& row : upstream_words)
        if (row.owner == owner) return row;
    return std::end(upstream_words)[-1];
}

/// The fields that are called the same.
constexpr std::string_view upstream_same[] = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "logit_bias",
    "parallel_tool_calls",
    "user",
    "prompt_cache_key",
};

Error upstream_unsupported(const char* param, const char* what) {
    return make_error(ErrorKind::invalid_request,
                      join({"'", param, "': the model's server takes no ", what}),
                      "unsupported_value", param);
}

/// Thoughts, text and calls of an answer stand in one message.
class UpstreamMessages {
public:
    explicit UpstreamMessages(const Request& request) {
        if (!request.instructions.empty()) say("system", request.instructions);
        if (request.input.items.empty()) say("user", request.input.text);
        for (const Item& item : request.input.items) add(item);
        flush();
    }
    Json take() { return std::move(all_); }

private:
    void say(std::string_view role, std::string text) {
        flush();
        all_.push(Json::object().set("role", role).set("content", std::move(text)));
    }
    void add(const Item& item);
    void add_call(const Item& item);
    void flush() {
        if (!answer_.is_null()) all_.push(std::exchange(answer_, Json()));
    }

    Json all_ = Json::array(), answer_ = {};
};

void UpstreamMessages::add(const Item& item) {
    const bool result = item.kind == Item::Kind::function_call_output ||
                        item.kind == Item::Kind::custom_tool_call_output;
    if (result) {
        flush();
        all_.push(Json::object()
                      .set("role", "tool")
                      .set("tool_call_id", item.call_id)
                      .set("content", item.text()));
        return;
    }
    const bool thought = item.kind == Item::Kind::reasoning;
    if (item.kind == Item::Kind::message && item.role != Role::assistant)  // templates know system
        return say(role_name(item.role == Role::developer ? Role::system : item.role), item.text());
    const bool follows = thought ? !answer_.is_null() : !answer_["content"].is_null();
    if (!item.is_call() && (follows || !answer_["tool_calls"].is_null())) flush();
    if (answer_.is_null())
        answer_ = Json::object().set("role", "assistant").set("content", nullptr);
    if (item.is_call()) return add_call(item);
    answer_.set(thought ? "reasoning_content" : "content", item.text());
}

void UpstreamMessages::add_call(const Item& item) {
    const bool custom = item.kind == Item::Kind::custom_tool_call;
    const char* type = custom ? "custom" : "function";
    if (!answer_.contains("tool_calls")) answer_.set("tool_calls", Json::array());
    const Json called =
        Json::object().set("name", item.name).set(custom ? "input" : "arguments", item.arguments);
    answer_.find("tool_calls")
        ->push(Json::object().set("id", item.call_id).set("type", type).set(type, called));
}

/// {type: T, ...} as Chat Completions write it: {type: T, T: {...}}.
Json upstream_nested(const Json& flat) {
    const std::string_view type = flat["type"].as_string();
    Json rest = Json::object();
    for (const JsonMember& member : flat.members())
        if (member.key != "type" && !member.value.is_null()) rest.set(member.key, member.value);
    return Json::object().set("type", type).set(type, std::move(rest));
}

Result<void> add_format(const Request& request, const UpstreamWords& words, const Json& flat,
                        Json* body) {
    const Format& format = request.format;
    if (format.empty()) return {};
    if (!format.schema.is_null() || words.own) {
        body->set("response_format", format.schema.is_null() ? flat : upstream_nested(flat));
        return {};
    }
    const char* name = !format.regex.empty()    ? words.regex
                       : !format.one_of.empty() ? words.one_of
                                                : words.gbnf;
    if (!name) return upstream_unsupported("text.format", "format but JSON Schemas");
    Json value = !format.regex.empty() ? Json(format.regex) : Json(format.gbnf);
    if (!format.one_of.empty()) value = flat["choices"];
    if (words.inside) body->set(words.inside, Json::object().set(name, std::move(value)));
    else body->set(name, std::move(value));
    return {};
}

/// Where only some may be called the others are not told of.
Result<void> add_tools(const Request& request, const UpstreamWords& words, const Json& flat,
                       Json* body) {
    const ToolChoice& choice = request.tool_choice;
    Json tools = Json::array();
    for (size_t i = 0; i < request.tools.size(); ++i) {
        const auto& names = choice.names;
        const Tool& tool = request.tools[i];
        if (tool.custom && !words.own) return upstream_unsupported("tools", "custom tools");
        if (names.empty() || std::find(names.begin(), names.end(), tool.name) != names.end())
            tools.push(upstream_nested(flat[i]));
    }
    if (tools.empty()) return {};
    constexpr const char* modes[] = {"auto", "none", "required"};
    Json chosen = modes[static_cast<size_t>(choice.mode)];
    if (choice.mode == ToolChoice::Mode::required && choice.names.size() == 1) {
        const std::string_view type = tools[0]["type"].as_string();
        chosen = Json::object()
                     .set("type", type)
                     .set(type, Json::object().set("name", choice.names.front()));
    }
    body->set("tools", std::move(tools)).set("tool_choice", std::move(chosen));
    return {};
}

/// Others know three words, and a switch of templates for none.
void add_effort(Effort effort, const UpstreamWords& words, Json* body) {
    if (effort == Effort::none && !words.own) {
        body->set("chat_template_kwargs",
                  Json::object().set("enable_thinking", false).set("thinking", false));
        return;
    }
    const Effort said = words.own ? effort : std::clamp(effort, Effort::low, Effort::high);
    body->set("reasoning_effort", effort_name(said));
}

void add_prompt(const Request& request, Json* body) {
    const RawPrompt& raw = *request.raw;
    std::string text = request.input.text;
    for (const Item& item : request.input.items) text += item.text();
    Json tokens = Json::array();
    for (const int32_t token : raw.tokens) tokens.push(token);
    body->set("prompt", tokens.empty() ? Json(std::move(text)) : std::move(tokens));
    if (!raw.suffix.empty()) body->set("suffix", raw.suffix);
    if (request.logprobs) body->set("logprobs", request.top_logprobs);
}

}  // namespace

Result<UpstreamCall> upstream_call(const Request& request, std::string_view owner) {
    const UpstreamWords& words = words_for(owner);
    const bool raw = request.raw.has_value();
    Request rest = request;
    rest.input = {};
    const Json flat = request_json(rest);
    Json body = Json::object().set("model", request.model);
    if (raw) add_prompt(request, &body);
    else body.set("messages", UpstreamMessages(request).take());
    for (const std::string_view name : upstream_same)
        if (const Json& value = flat[name]; !value.is_null()) body.set(name, value);
    if (request.max_output_tokens) {
        body.set("max_tokens", *request.max_output_tokens);
        if (!raw) body.set("max_completion_tokens", *request.max_output_tokens);
    }
    if (request.logprobs && !raw) {
        body.set("logprobs", true);
        if (request.top_logprobs > 0) body.set("top_logprobs", request.top_logprobs);
    }
    if (auto said = add_format(request, words, flat["text"]["format"], &body); !said)
        return said.error();
    if (auto said = add_tools(request, words, flat["tools"], &body); !said) return said.error();
    if (request.effort) add_effort(*request.effort, words, &body);
    if (words.own) body.set("store", false);  // this side keeps it
    Json options = Json::object().set("include_usage", true);
    if (request.prompt_progress && words.own) options.set("prompt_progress", true);
    else if (request.prompt_progress) body.set("return_progress", true);
    body.set("stream", true).set("stream_options", std::move(options));
    return UpstreamCall{raw ? "/completions" : "/chat/completions", body.write(), request.stop,
                        request.max_tool_calls.value_or(UINT32_MAX)};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

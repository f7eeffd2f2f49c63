#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Messages, as Anthropic has it: the request --------------------------------------------------

namespace {

Fault messages_string(const Json& object, const char* key, const std::string& path) {
    const Json& value = object[key];
    if (value.is_null()) return api_missing(path + "." + key);
    return value.is_string() ? Fault() : api_wrong_type(path + "." + key, "a string", value);
}

struct MessagesWord {
    std::string_view name;
    const char* ours;
};
/// The word of /v1/responses for one of this surface; else an error that names those that there are.
template <size_t N>
Fault messages_word(const Json& value, const std::string& path, const MessagesWord (&words)[N],
                    const char** out) {
    if (value.is_null()) return api_missing(path);
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    std::string allowed;
    for (const MessagesWord& word : words) {
        *out = word.ours;
        if (word.name == value.as_string()) return {};
        allowed.append(allowed.empty() ? "\"" : ", \"").append(word.name).append("\"");
    }
    return api_error("invalid_value", path, "'" + path + "' must be one of " + allowed);
}

/// A message, of which block after block becomes an item; texts side by side become one.
struct MessagesTurn {
    SurfaceBody* out;
    Json role;
    std::string path;
    Json texts = Json::array();

    void end_texts() {
        if (texts.empty()) return;
        Json content = std::exchange(texts, Json::array());
        out->add(Json::object().set("role", role).set("content", std::move(content)), path);
    }
    void add(Json item, const std::string& origin) {
        end_texts();
        out->add(std::move(item), origin);
    }
};

Fault messages_text(const Json& block, const std::string& path, MessagesTurn* turn) {
    if (Fault fault = messages_string(block, "text", path)) return fault;
    turn->texts.push(Json::object().set("type", "text").set("text", block["text"]));
    return {};
}

Fault messages_thought(const Json& block, const std::string& path, MessagesTurn* turn) {
    if (Fault fault = messages_string(block, "thinking", path)) return fault;
    if (block["thinking"].as_string().empty()) return {};
    const Json part = Json::object().set("type", "reasoning_text").set("text", block["thinking"]);
    turn->add(Json::object().set("type", "reasoning").set("content", Json::array().push(part)),
              path);
    return {};
}

/// Sealed by another server: there is nothing to be read.
Fault messages_sealed(const Json&, const std::string&, MessagesTurn*) { return {}; }

Fault messages_call(const Json& block, const std::string& path, MessagesTurn* turn) {
    const Json& input = block["input"];
    if (!input.is_null() && !input.is_object())
        return api_wrong_type(path + ".input", "an object", input);
    turn->add(Json::object()
                  .set("type", "function_call")
                  .set("call_id", block["id"])
                  .set("name", block["name"])
                  .set("arguments", input.is_null() ? "{}" : input.write()),
              path);
    return {};
}

Fault messages_result(const Json& block, const std::string& path, MessagesTurn* turn) {
    const Json& content = block["content"];
    const std::string place = path + ".content";
    if (!content.is_null() && !content.is_string() && !content.is_array())
        return api_wrong_type(place, "a string or an array of blocks", content);
    MessagesTurn result{nullptr, {}, {}};
    if (block["is_error"].as_bool())  // there is no other way to tell it
        result.texts.push(Json::object().set("type", "text").set("text", "Error: "));
    if (content.is_string())
        result.texts.push(Json::object().set("type", "text").set("text", content));
    for (size_t i = 0; i < content.size(); ++i) {
        const std::string at = api_index(place, i);
        if (!content[i].is_object()) return api_wrong_type(at, "an object", content[i]);
        if (content[i]["type"].as_string() != "text")
            return api_unsupported("unsupported_value", at + ".type",
                                   content[i]["type"].as_string());
        if (Fault fault = messages_text(content[i], at, &result)) return fault;
    }
    turn->add(Json::object()
                  .set("type", "function_call_output")
                  .set("call_id", block["tool_use_id"])
                  .set("output", std::move(result.texts)),
              path);
    return {};
}

struct MessagesBlock {
    std::string_view type;
    const char* role;  // whose it may be; null: anybody's
    Fault (*read)(const Json& block, const std::string& path, MessagesTurn* turn);
};
constexpr MessagesBlock messages_blocks[] = {
    {"text", nullptr, messages_text},
    {"thinking", "assistant", messages_thought},
    {"redacted_thinking", "assistant", messages_sealed},
    {"tool_use", "assistant", messages_call},
    {"tool_result", "user", messages_result},
};

Fault messages_block(const Json& block, const std::string& path, MessagesTurn* turn) {
    if (!block.is_object()) return api_wrong_type(path, "an object", block);
    if (Fault fault = messages_string(block, "type", path)) return fault;
    const std::string_view type = block["type"].as_string();
    for (const MessagesBlock& row : messages_blocks) {
        if (row.type != type) continue;
        if (!row.role || row.role == turn->role.as_string()) return row.read(block, path, turn);
        return api_error(
            "invalid_value", path + ".type",
            join({"'", path, ".type': \"", type, "\" may stand only in a message of ", row.role}));
    }
    return api_unsupported("unsupported_value", path + ".type", type);
}

constexpr MessagesWord messages_roles[] = {
    {"user", "user"}, {"assistant", "assistant"}, {"system", "system"}};

Fault messages_message(const Json& message, const std::string& path, SurfaceBody* out) {
    if (!message.is_object()) return api_wrong_type(path, "an object", message);
    const Json &role = message["role"], &content = message["content"];
    const char* own = nullptr;
    if (Fault fault = messages_word(role, path + ".role", messages_roles, &own)) return fault;
    const std::string place = path + ".content";
    if (content.is_null()) return api_missing(place);
    if (content.is_string())
        return out->add(Json::object().set("role", role).set("content", content), path), Fault();
    if (!content.is_array())
        return api_wrong_type(place, "a string or an array of blocks", content);
    MessagesTurn turn{out, role, path};
    for (size_t i = 0; i < content.size(); ++i)
        if (Fault fault = messages_block(content[i], api_index(place, i), &turn)) return fault;
    turn.end_texts();
    return {};
}

Fault messages_messages(const Json& value, SurfaceBody* out) {
    if (!value.is_array()) return api_wrong_type("messages", "an array", value);
    if (value.empty())
        return api_error("array_below_min_length", "messages", "'messages' must not be empty");
    out->body.set("input", Json::array());
    for (size_t i = 0; i < value.size(); ++i)
        if (Fault fault = messages_message(value[i], api_index("messages", i), out)) return fault;
    if (value[value.size() - 1]["role"].as_string() != "assistant") return {};
    return api_error("unsupported_value", api_index("messages", value.size() - 1) + ".role",
                     "'messages' must not end with a message of the assistant: an answer that is "
                     "begun cannot be continued");
}

Json doc_messages_block(std::string_view role) {
    const Json text = doc_type("string"), id = doc_text(1);
    const Json words = doc_object(2, {{"type", doc_word("text")}, {"text", text}});
    if (role == "assistant")
        return doc_any(
            {words,
             doc_object(2,
                        {{"type", doc_word("thinking")}, {"thinking", text}, {"signature", text}}),
             doc_object(1, {{"type", doc_word("redacted_thinking")}, {"data", text}}),
             doc_object(4, {{"type", doc_word("tool_use")},
                            {"id", id},
                            {"name", text},
                            {"input", doc_type("object")}})});
    if (role != "user") return words;
    return doc_any({words, doc_object(2, {{"type", doc_word("tool_result")},
                                          {"tool_use_id", id},
                                          {"content", doc_any({text, doc_array(words)})},
                                          {"is_error", doc_type("boolean")}})});
}

Json doc_messages_messages(Dialect) {
    Json all = doc_any({});
    for (const MessagesWord& role : messages_roles) {
        Json content = doc_any({doc_type("string"), doc_array(doc_messages_block(role.name))});
        all.find("anyOf")->push(
            doc_object(2, {{"role", doc_word(role.name)}, {"content", std::move(content)}}));
    }
    return doc_array(std::move(all), 1);
}

/// Claude Code begins with a line of its own, where a stamp of five bytes, "cch=12345;", is another
/// one in each request: the prefix cache would hold nothing behind it.
std::string messages_unstamped(std::string_view text) {
    static constexpr std::string_view begin = "x-anthropic-billing-header:", stamp = "cch=";
    std::string out(text);
    if (!text.starts_with(begin)) return out;
    const size_t line = text.find('\n'), at = text.substr(0, line).find(stamp);
    if (at == text.npos) return out;
    for (size_t i = at + stamp.size(); i < std::min(line, out.size()) && out[i] != ';'; ++i)
        out[i] = '0';
    return out;
}

Fault messages_system(const Json& value, SurfaceBody* out) {
    std::string all;
    if (value.is_string()) all = messages_unstamped(value.as_string());
    else if (!value.is_array()) return api_wrong_type("system", "a string or an array", value);
    for (size_t i = 0; i < value.size(); ++i) {
        const std::string path = api_index("system", i);
        if (!value[i].is_object()) return api_wrong_type(path, "an object", value[i]);
        if (value[i]["type"].as_string() != "text")
            return api_unsupported("unsupported_value", path + ".type",
                                   value[i]["type"].as_string());
        if (Fault fault = messages_string(value[i], "text", path)) return fault;
        all.append(i == 0 ? "" : "\n").append(messages_unstamped(value[i]["text"].as_string()));
    }
    out->body.set("instructions", std::move(all));
    return {};
}

Json doc_messages_system(Dialect) {
    return doc_any({doc_type("string"), doc_array(doc_messages_block("system"))});
}

Fault messages_stream(const Json& value, SurfaceBody* out) {
    if (value.as_bool() && out->dialect != Dialect::openai)
        return api_error("unsupported_value", "stream",
                         "'stream' must be false, but true was received");
    return surface_stream(value, out);
}

Json doc_messages_stream(Dialect dialect) {
    Json stream = doc_surface_stream(dialect);
    return dialect == Dialect::openai ? stream : stream.set("enum", Json::array().push(false));
}

Fault messages_tools(const Json& value, SurfaceBody* out) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    Json tools = Json::array();
    for (size_t i = 0; i < value.size(); ++i) {
        const std::string path = api_index("tools", i);
        const Json& tool = value[i];
        if (!tool.is_object()) return api_wrong_type(path, "an object", tool);
        if (tool["type"].as_string("custom") != "custom")
            return api_unsupported("unsupported_value", path + ".type", tool["type"].as_string());
        tools.push(Json::object()
                       .set("type", "function")
                       .set("name", tool["name"])
                       .set("description", tool["description"])
                       .set("parameters", tool["input_schema"])
                       .set("strict", tool["strict"].is_null() ? Json(false) : tool["strict"]));
    }
    out->body.set("tools", std::move(tools));
    return {};
}

Json doc_messages_tools(Dialect) {
    const Json text = doc_type("string");
    return doc_array(doc_object(1, {{"name", text},
                                    {"type", doc_word("custom")},
                                    {"description", text},
                                    {"input_schema", doc_type("object")},
                                    {"strict", doc_type("boolean")}}));
}

template <size_t N>
Json doc_messages_words(const MessagesWord (&words)[N]) {
    Json all = Json::array();
    for (const MessagesWord& word : words) all.push(word.name);
    return doc_type("string").set("enum", std::move(all));
}

constexpr MessagesWord messages_choices[] = {
    {"auto", "auto"}, {"any", "required"}, {"none", "none"}, {"tool", nullptr}};

Fault messages_tool_choice(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("tool_choice", "an object", value);
    const char* mode = nullptr;
    if (Fault fault = messages_word(value["type"], "tool_choice.type", messages_choices, &mode))
        return fault;
    if (mode) out->body.set("tool_choice", mode);
    else
        out->body.set("tool_choice",
                      Json::object().set("type", "function").set("name", value["name"]));
    const Json& one = value["disable_parallel_tool_use"];
    if (one.is_null()) return {};
    out->body.set("parallel_tool_calls", !one.as_bool());
    return check_bool(one, "tool_choice.disable_parallel_tool_use");
}

/// `needs` has to stand beside the word `with`, and may beside the others.
Json doc_messages_choice(Json words, const char* with, const char* needs, const Json& value) {
    return doc_any({doc_object(2, {{"type", doc_word(with)}, {needs, value}}),
                    doc_object(1, {{"type", words.set("not", doc_word(with))}, {needs, value}})});
}

Json doc_messages_tool_choice(Dialect) {
    Json choice = doc_messages_choice(doc_messages_words(messages_choices), "tool", "name",
                                      doc_type("string"));
    for (Json& one : choice.find("anyOf")->items())
        one.find("properties")->set("disable_parallel_tool_use", doc_or_null(doc_type("boolean")));
    return choice;
}

constexpr int64_t messages_least_budget = 1024;
constexpr MessagesWord messages_modes[] = {
    {"enabled", nullptr},
    {"disabled", "none"},
    {"adaptive", nullptr},
    {"between_tools", nullptr},
};

/// The effort whose tokens are within the budget.
const char* messages_effort(int64_t budget) {
    return budget < 4096 ? "medium" : budget < 16384 ? "high" : "xhigh";
}

Fault messages_thinking(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("thinking", "an object", value);
    const char* effort = nullptr;
    if (Fault fault = messages_word(value["type"], "thinking.type", messages_modes, &effort))
        return fault;
    if (value["type"].as_string() == "enabled") {
        const Json& budget = value["budget_tokens"];
        const std::string path = "thinking.budget_tokens";
        if (budget.is_null()) return api_missing(path);
        if (Fault fault = check_integer(budget, path, messages_least_budget, INT64_MAX))
            return fault;
        effort = messages_effort(budget.as_int());
    }
    if (effort) out->body.set("reasoning", Json::object().set("effort", effort));
    return {};
}

Json doc_messages_thinking(Dialect) {
    return doc_messages_choice(doc_messages_words(messages_modes), "enabled", "budget_tokens",
                               doc_type("integer").set("minimum", messages_least_budget));
}

Fault messages_format(const Json& value, SurfaceBody* out) {
    Json format = value;
    if (value["type"].as_string() == "json_schema")
        format = Json::object()
                     .set("type", "json_schema")
                     .set("name", "answer")
                     .set("schema", value["schema"])
                     .set("strict", true);
    out->body.set("text", Json::object().set("format", std::move(format)));
    return {};
}

Json doc_messages_format(Dialect) {
    return doc_object(2, {{"type", doc_word("json_schema")}, {"schema", doc_type("object")}});
}

constexpr MessagesWord messages_efforts[] = {
    {"low", "low"}, {"medium", "medium"}, {"high", "high"}, {"xhigh", "xhigh"}, {"max", "xhigh"}};

/// What `thinking` says of effort comes first, wherever it stands.
Fault messages_output(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("output_config", "an object", value);
    if (const Json& format = value["format"]; !format.is_null()) {
        out->renamed.emplace_back("text.format", "output_config.format");
        (void)messages_format(format, out);
    }
    const Json& asked = value["effort"];
    if (asked.is_null()) return {};
    const char* effort = nullptr;
    if (Fault fault = messages_word(asked, "output_config.effort", messages_efforts, &effort))
        return fault;
    if (out->body["reasoning"].is_null())
        out->body.set("reasoning", Json::object().set("effort", effort));
    return {};
}

Json doc_messages_output(Dialect dialect) {
    return doc_object(0, {{"effort", doc_messages_words(messages_efforts)},
                          {"format", doc_messages_format(dialect)}});
}

Fault messages_metadata(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("metadata", "an object", value);
    Json metadata = value;
    metadata.erase("user_id");
    out->renamed.emplace_back("user", "metadata.user_id");
    out->body.set("user", value["user_id"]).set("metadata", std::move(metadata));
    return {};
}

Json doc_messages_metadata(Dialect dialect) {
    Json metadata = doc_fields(dialect)["metadata"];
    metadata.find("properties")->set("user_id", doc_or_null(doc_fields(dialect)["user"]));
    return metadata;
}

constexpr MessagesWord messages_tiers[] = {{"auto", "auto"}, {"standard_only", "auto"}};

Fault messages_tier(const Json& value, SurfaceBody*) {
    const char* tier = nullptr;
    return messages_word(value, "service_tier", messages_tiers, &tier);
}

Json doc_messages_tier(Dialect) { return doc_messages_words(messages_tiers); }

constexpr SurfaceField messages_fields[] = {
    // clang-format off
    {"model", "model"},
    {"max_tokens", "max_output_tokens"},
    {"messages", "input", messages_messages, false, doc_messages_messages},
    {"system", "instructions", messages_system, false, doc_messages_system},
    {"temperature", "temperature"},
    {"top_p", "top_p"},
    {"top_k", "top_k"},
    {"stop_sequences", "stop"},
    {"stream", {}, messages_stream, false, doc_messages_stream},
    {"tools", "tools", messages_tools, false, doc_messages_tools},
    {"tool_choice", "tool_choice", messages_tool_choice, false, doc_messages_tool_choice},
    {"thinking", "reasoning", messages_thinking, false, doc_messages_thinking},
    {"output_config", {}, messages_output, false, doc_messages_output},
    {"output_format", "text.format", messages_format, false, doc_messages_format},
    {"metadata", {}, messages_metadata, false, doc_messages_metadata},
    {"service_tier", {}, messages_tier, false, doc_messages_tier},
    {"seed", "seed"},
    {"min_p", "min_p"},
    {"presence_penalty", "presence_penalty"},
    {"frequency_penalty", "frequency_penalty"},
    {"repetition_penalty", "repetition_penalty"},
    {"logit_bias", "logit_bias"},
    {"prompt_cache_key", "prompt_cache_key"},
    // clang-format on
};
constexpr std::string_view messages_refused[] = {"mcp_servers", "container", "thread"};
constexpr std::string_view messages_required[] = {"model", "max_tokens", "messages"};
constexpr std::string_view messages_counted[] = {"model", "messages"};

struct MessagesRest {
    std::string_view of;  // a field, or the type of an item
    std::string_view ours, theirs;
};
constexpr MessagesRest messages_rests[] = {
    {"tools", ".parameters", ".input_schema"},
    {"function_call", ".call_id", ".id"},
    {"function_call_output", ".call_id", ".tool_use_id"},
    {"function_call_output", ".output", ".content"},
};

std::string messages_rest(std::string_view field, const Json& value, const std::string& rest) {
    const std::string_view of = field == "input" ? value["type"].as_string() : field;
    for (const MessagesRest& row : messages_rests)
        if (of == row.of && rest.starts_with(row.ours))
            return join({row.theirs, std::string_view(rest).substr(row.ours.size())});
    return rest;
}

// ---- The answer --------------------------------------------------------------------------------

/// Loops of tools in Anthropic's clients try a thread first, and go on without where they read so.
Json messages_error(const Error& error, Dialect dialect) {
    Json envelope = render_error(error);
    Json& inner = *envelope.find("error");
    if (error.param == "thread")
        inner.set("details", Json::object()
                                 .set("error_code", "thread_unsupported_request")
                                 .set("unsupported", Json::array().push("thread")));
    if (dialect != Dialect::openai) return envelope;
    if (inner["code"].as_string() == "overloaded") inner.set("type", "overloaded_error");
    return Json::object().set("type", "error").set("error", std::move(inner));
}

/// Tokens that the cache had are not among the input's.
Json messages_usage(const Usage& usage) {
    const Json thought = Json::object().set("thinking_tokens", usage.reasoning_tokens);
    return Json::object()
        .set("input_tokens", usage.input_tokens - std::min(usage.input_tokens, usage.cached_tokens))
        .set("cache_creation_input_tokens", 0)
        .set("cache_read_input_tokens", usage.cached_tokens)
        .set("output_tokens", usage.output_tokens)
        .set("output_tokens_details", thought);
}

/// Thoughts are not sealed here; clients give back what stands there.
std::string messages_signature(std::string_view thought) {
    const Hash256 hash = sha256(thought);
    return base64_encode(hash.view());
}

/// A block; `begun`: as it is before its first delta.
Json messages_shown(const Item& item, bool begun = false) {
    const std::string text = begun ? std::string() : item.text();
    if (item.kind == Item::Kind::reasoning)
        return Json::object()
            .set("type", "thinking")
            .set("thinking", text)
            .set("signature", begun ? std::string() : messages_signature(text));
    if (!item.is_call()) return Json::object().set("type", "text").set("text", text);
    auto input = Json::parse(begun ? std::string() : item.arguments);
    return Json::object()
        .set("type", "tool_use")
        .set("id", item.call_id)
        .set("name", item.name)
        .set("input", input && input->is_object() ? std::move(*input) : Json::object());
}

/// Whether there is a block of it: of what says nothing there is none.
bool messages_says(const Item& item) { return item.is_call() || !item.text().empty(); }

/// `stop_reason` and `stop_sequence`, of an answer that has ended.
Json messages_end(const Outcome& outcome, Json out) {
    const auto& items = outcome.items;
    const bool called = std::any_of(items.begin(), items.end(),
                                    [](const Item& item) { return item.is_call(); });
    const bool stopped = !outcome.stopped_by.empty();
    const char* reason = outcome.cut ? "max_tokens"
                         : stopped   ? "stop_sequence"
                         : called    ? "tool_use"
                                     : "end_turn";
    return std::move(out)
        .set("stop_reason", reason)
        .set("stop_sequence", stopped ? Json(outcome.stopped_by) : Json());
}

Json messages_head(std::string_view response_id, std::string_view model, Json content) {
    return Json::object()
        .set("id", derive_id("msg_", response_id))
        .set("type", "message")
        .set("role", "assistant")
        .set("model", model)
        .set("content", std::move(content));
}

Result<std::string> messages_render(const std::string& object, Dialect) {
    auto response = Json::parse(object);
    if (!response) return response.error();
    const Outcome outcome = outcome_of(*response);
    if (outcome.status != Status::completed) return surface_failure(outcome);
    Json content = Json::array();
    for (const Item& item : outcome.items)
        if (messages_says(item)) content.push(messages_shown(item));
    Json head = messages_head((*response)["id"].as_string(), (*response)["model"].as_string(),
                              std::move(content));
    return messages_end(outcome, std::move(head))
        .set("usage", messages_usage(outcome.usage))
        .write();
}

// ---- The stream --------------------------------------------------------------------------------

class MessagesEvents : public EventWriter {
public:
    explicit MessagesEvents(const ResponseRecord& record)
        : head_(messages_head(record.id, record.model, Json::array())) {
        head_.set("stop_reason", nullptr)
            .set("stop_sequence", nullptr)
            .set("usage", messages_usage({.input_tokens = record.input_tokens}));
    }

    void begin(const Json&) override {
        write(Json::object().set("type", "message_start").set("message", head_));
        write(Json::object().set("type", "ping"));
    }
    void add(const Event& event) override;
    void end(const Outcome& outcome, const std::string& object) override;
    void fail(const Error& error, bool = false) override {
        write(messages_error(error, Dialect::openai));
    }

private:
    void write(const Json& event);
    Json block_event(const char* type) const {
        return Json::object().set("type", type).set("index", blocks_);
    }
    void write_delta(const char* type, const char* key, std::string_view text);
    void open(Item item, size_t index);
    void extend(std::string_view text);
    void close();

    Json head_;
    Item item_ = {};                 // of which there is or will be a block, without its text
    std::string thought_;            // of that block
    size_t told_ = 0;                // items so far
    size_t index_ = 0, blocks_ = 0;  // of the item; blocks that are closed
    bool open_ = false;
};

void MessagesEvents::write(const Json& event) {
    text_.append("event: ").append(event["type"].as_string());
    text_.append("\ndata: ").append(event.write()).append("\n\n");
}

void MessagesEvents::write_delta(const char* type, const char* key, std::string_view text) {
    write(block_event("content_block_delta")
              .set("delta", Json::object().set("type", type).set(key, text)));
}

/// The block of a call begins at once, others with what they say.
void MessagesEvents::open(Item item, size_t index) {
    close();
    item_ = std::move(item);
    index_ = index;
    told_ = index + 1;
    if (item_.is_call()) extend({});
}

void MessagesEvents::extend(std::string_view text) {
    if (text.empty() && (open_ || !item_.is_call())) return;
    if (!std::exchange(open_, true))
        write(block_event("content_block_start").set("content_block", messages_shown(item_, true)));
    if (text.empty()) return;
    if (item_.is_call()) return write_delta("input_json_delta", "partial_json", text);
    if (item_.kind != Item::Kind::reasoning) return write_delta("text_delta", "text", text);
    thought_ += text;
    write_delta("thinking_delta", "thinking", text);
}

void MessagesEvents::close() {
    if (!std::exchange(open_, false)) return;
    if (item_.kind == Item::Kind::reasoning)
        write_delta("signature_delta", "signature",
                    messages_signature(std::exchange(thought_, {})));
    write(block_event("content_block_stop"));
    ++blocks_;
}

void MessagesEvents::add(const Event& event) {
    if (event.kind == Event::Kind::item_begun) return open(event.item, event.index);
    const bool delta = event.kind == Event::Kind::text_delta ||
                       event.kind == Event::Kind::reasoning_delta ||
                       event.kind == Event::Kind::arguments_delta;
    if (!delta || event.text.empty()) return;
    if (told_ == 0 || index_ != event.index)  // of a Responder without items
        open(Item::message(Role::assistant, {}), event.index);
    extend(event.text);
}

void MessagesEvents::end(const Outcome& outcome, const std::string&) {
    if (outcome.status != Status::completed) return fail(surface_failure(outcome));
    const std::vector<Item> items = output_items(outcome, outcome.status);
    for (size_t i = told_; i < items.size(); ++i) {
        open(items[i], i);
        extend(items[i].is_call() ? items[i].arguments : items[i].text());
    }
    close();
    write(Json::object()
              .set("type", "message_delta")
              .set("delta", messages_end(outcome, Json::object()))
              .set("usage", messages_usage(outcome.usage)));
    write(Json::object().set("type", "message_stop"));
}

std::unique_ptr<EventWriter> messages_events(const ResponseRecord& record, bool, Dialect) {
    return std::make_unique<MessagesEvents>(record);
}

}  // namespace

const Surface messages_surface = {
    .name = "Message",
    .path = "/v1/messages",
    .fields = messages_fields,
    .refused = messages_refused,
    .required = messages_required,
    .rest = messages_rest,
    .error = messages_error,
    .render = messages_render,
    .events = messages_events,
    .timeout_status = 408,
    .request_id = "request-id",
    .beat = "event: ping\ndata: {\"type\":\"ping\"}\n\n",
};
const Surface messages_count_surface = {
    .name = "MessageCount",
    .path = "/v1/messages/count_tokens",
    .fields = messages_fields,
    .refused = messages_refused,
    .required = messages_counted,
    .rest = messages_rest,
    .error = messages_error,
    .request_id = "request-id",
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

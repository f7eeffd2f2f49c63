// >>api
// Owns: the table of request fields and their checks, the response object, the error envelope.
// Assumes: bodies were parsed by >>json, so they are valid UTF-8 without duplicate keys.
// Promises: the first fault is the one that is reported: missing fields in the order of the table,
//           then the others as the body has them, then rules across fields.
#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
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

}  // namespace

Error api_error(const char* code, std::string param, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, std::move(param));
}

Error api_wrong_type(const std::string& path, const char* expected, const Json& got) {
    return api_error(
        "invalid_type", path,
        "'" + path + "' must be " + expected + ", but " + api_shown(got) + " was received");
}

Error api_missing(const std::string& path) {
    return api_error("missing_required_parameter", path, "'" + path + "' is required");
}

Error api_unsupported(const char* code, const std::string& path, std::string_view what) {
    std::string value;
    if (!what.empty()) value.append(": \"").append(what).append("\"");
    return api_error(code, path, "'" + path + "'" + value + " is not supported");
}

std::string api_index(const std::string& path, size_t i) {
    return path + "[" + std::to_string(i) + "]";
}

Fault check_bool(const Json& value, const std::string& path) {
    if (value.is_bool()) return {};
    return api_wrong_type(path, "true or false", value);
}

namespace {

Error api_wrong_value(const char* code, const std::string& path, const std::string& allowed,
                      const Json& got) {
    return api_error(
        code, path,
        "'" + path + "' must be " + allowed + ", but " + api_shown(got) + " was received");
}

// ---- Checks of one value. Each returns what is wrong, or nothing. ------------------------------

}  // namespace

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

Fault check_choice(const Json& value, const std::string& path,
                   std::span<const std::string_view> choices, const char* code) {
    if (!value.is_string()) return api_wrong_type(path, "a string", value);
    std::string allowed;
    for (const std::string_view choice : choices) {
        if (value.as_string() == choice) return {};
        allowed.append(allowed.empty() ? "\"" : ", \"").append(choice).append("\"");
    }
    return api_wrong_value(code, path, (choices.size() > 1 ? "one of " : "") + allowed, value);
}

namespace {

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

// ---- Items ------------------------------------------------------------------------------------

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
        return api_unsupported("unsupported_parameter", path + ".type", type);
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

}  // namespace

Json doc_content(bool assistant) {
    Json parts = doc_any({});
    for (const PartType& row : part_types)
        if (assistant || !row.replayed)
            parts.find("anyOf")->push(
                doc_object(2, {{"type", doc_word(row.name)}, {row.field, doc_type("string")}}));
    return doc_any({doc_type("string"), doc_array(std::move(parts))});
}

namespace {

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
    const Json& content = json["content"];
    const char* key = content.is_null() || (content.is_array() && content.empty()) ? "summary"
                                                                                   : "content";
    if (json[key].is_null()) return {};
    return read_content(json[key], path + "." + key, true, item);
}

Fault read_call_id(const Json& json, const std::string& path, Item* item) {
    if (Fault fault = read_string_field(json, "call_id", path, &item->call_id)) return fault;
    return check_text(json["call_id"], path + ".call_id", 1, SIZE_MAX);
}

Fault read_call(const Json& json, const std::string& path, Item* item) {
    item->role = Role::assistant;
    const bool custom = item->kind == Item::Kind::custom_tool_call;
    if (Fault fault = read_call_id(json, path, item)) return fault;
    if (Fault fault = read_string_field(json, "name", path, &item->name)) return fault;
    return read_string_field(json, custom ? "input" : "arguments", path, &item->arguments);
}

Fault read_call_output(const Json& json, const std::string& path, Item* item) {
    item->role = Role::tool;
    if (Fault fault = read_call_id(json, path, item)) return fault;
    return read_content(json["output"], path + ".output", false, item);
}

Fault read_any_item(const Json& json, const std::string& path, Item* item) {
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

Json doc_item(const ItemType& row) {
    const Json type = doc_word(row.name), text = doc_type("string"), id = doc_text(1);
    const bool custom = row.kind == Item::Kind::custom_tool_call;
    switch (row.kind) {
        case Item::Kind::message: {
            Json others = Json::array(), assistant = Json::array();
            for (const std::string_view role : kRoleNames)
                (role == role_name(Role::assistant) ? assistant : others).push(role);
            const auto message = [&](Json roles, bool replayed) {
                return doc_object(2, {{"role", Json::object().set("enum", std::move(roles))},
                                      {"content", doc_content(replayed)},
                                      {"type", type}});
            };
            return doc_any(
                {message(std::move(others), false), message(std::move(assistant), true)});
        }
        case Item::Kind::reasoning:
            return doc_object(
                1,
                {{"type", type}, {"content", doc_content(true)}, {"summary", doc_content(true)}});
        case Item::Kind::function_call:
        case Item::Kind::custom_tool_call:
            return doc_object(4, {{"type", type},
                                  {"call_id", id},
                                  {"name", text},
                                  {custom ? "input" : "arguments", text}});
        default:
            return doc_object(3, {{"type", type}, {"call_id", id}, {"output", doc_content(false)}});
    }
}

}  // namespace

Json doc_item() {
    Json all = doc_any({});
    for (const ItemType& row : item_types) all = doc_any({std::move(all), doc_item(row)});
    return all;
}

namespace {

Fault read_items(const Json& array, const std::string& path, Request* request) {
    if (array.empty())
        return api_error("array_below_min_length", path, "'" + path + "' must not be empty");
    request->input.items.resize(array.size());
    for (size_t i = 0; i < array.size(); ++i)
        if (Fault fault = read_any_item(array[i], api_index(path, i), &request->input.items[i]))
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

// ---- The form of an answer ---------------------------------------------------------------------

bool is_name(std::string_view name) {
    return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '_' || c == '-';
    });
}

Json doc_name() { return doc_type("string").set("pattern", "^[a-zA-Z0-9_-]{1,64}$"); }

Fault read_name(const Json& object, const std::string& path, std::string* out) {
    if (Fault fault = read_string_field(object, "name", path, out)) return fault;
    if (is_name(*out)) return {};
    return api_wrong_value("invalid_value", path + ".name", "1 to 64 of a-z, A-Z, 0-9, _ and -",
                           object["name"]);
}

Fault read_description(const Json& object, const std::string& path, std::string* out) {
    *out = object["description"].as_string();
    if (object["description"].is_null()) return {};
    return check_text(object["description"], path + ".description", 0, SIZE_MAX);
}

// A JSON Schema; what it says is looked at where it is compiled.
Fault read_schema(const Json& object, const char* key, const std::string& path, Json* out) {
    *out = object[key];
    if (out->is_null() || out->is_object()) return {};
    return api_wrong_type(path + "." + key, "an object", *out);
}

Fault read_strict(const Json& object, const std::string& path, bool* out) {
    *out = object["strict"].as_bool();
    return object["strict"].is_null() ? Fault() : check_bool(object["strict"], path + ".strict");
}

Fault read_schema_format(const Json& form, const std::string& path, Format* out) {
    if (Fault fault = read_name(form, path, &out->name)) return fault;
    if (Fault fault = read_description(form, path, &out->description)) return fault;
    if (Fault fault = read_schema(form, "schema", path, &out->schema)) return fault;
    if (out->schema.is_null()) out->schema = Json::object();
    return read_strict(form, path, &out->strict);
}

Json doc_schema_format() {
    return doc_object(2, {{"type", doc_word("json_schema")},
                          {"name", doc_name()},
                          {"description", doc_type("string")},
                          {"schema", doc_type("object")},
                          {"strict", doc_type("boolean")}});
}

Fault read_regex_format(const Json& form, const std::string& path, Format* out) {
    if (Fault fault = read_string_field(form, "pattern", path, &out->regex)) return fault;
    return check_text(form["pattern"], path + ".pattern", 1, SIZE_MAX);
}

Json doc_regex_format() {
    return doc_object(2, {{"type", doc_word("regex")}, {"pattern", doc_text(1)}});
}

Fault read_choice_format(const Json& form, const std::string& path, Format* out) {
    const Json& choices = form["choices"];
    const std::string field = path + ".choices";
    if (choices.is_null()) return api_missing(field);
    if (!choices.is_array()) return api_wrong_type(field, "an array of strings", choices);
    if (choices.empty())
        return api_error("array_below_min_length", field, "'" + field + "' must not be empty");
    for (size_t i = 0; i < choices.size(); ++i) {
        if (Fault fault = check_text(choices[i], api_index(field, i), 0, SIZE_MAX)) return fault;
        out->one_of.emplace_back(choices[i].as_string());
    }
    return {};
}

Json doc_choice_format() {
    return doc_object(
        2, {{"type", doc_word("choice")}, {"choices", doc_array(doc_type("string"), 1)}});
}

constexpr std::string_view grammar_syntaxes[] = {"regex", "gbnf"};

Fault read_grammar_format(const Json& form, const std::string& path, Format* out) {
    std::string definition;
    if (form["syntax"].is_null()) return api_missing(path + ".syntax");
    if (Fault fault = check_choice(
            form["syntax"], path + ".syntax", grammar_syntaxes,
            form["syntax"].as_string() == "lark" ? "unsupported_value" : "invalid_value"))
        return fault;
    if (Fault fault = read_string_field(form, "definition", path, &definition)) return fault;
    if (Fault fault = check_text(form["definition"], path + ".definition", 1, SIZE_MAX))
        return fault;
    (form["syntax"].as_string() == "regex" ? out->regex : out->gbnf) = std::move(definition);
    return {};
}

Json doc_grammar_format() {
    return doc_object(3, {{"type", doc_word("grammar")},
                          {"syntax", doc_words(grammar_syntaxes)},
                          {"definition", doc_text(1)}});
}

Fault read_text_format(const Json&, const std::string&, Format*) { return {}; }
Json doc_text_format() { return doc_object(1, {{"type", doc_word("text")}}); }

struct FormatType {
    std::string_view name;
    Fault (*read)(const Json& form, const std::string& path, Format* out);
    bool custom;  // also of a custom tool's input
    Json (*schema)();
};
constexpr FormatType format_types[] = {
    {"text", read_text_format, true, doc_text_format},
    {"json_schema", read_schema_format, false, doc_schema_format},
    {"regex", read_regex_format, false, doc_regex_format},
    {"choice", read_choice_format, false, doc_choice_format},
    {"grammar", read_grammar_format, true, doc_grammar_format},
};

Fault read_format(const Json& form, const std::string& path, bool custom, Format* out) {
    if (form.is_null()) return {};
    if (!form.is_object()) return api_wrong_type(path, "an object", form);
    const Json& type = form["type"];
    if (type.is_null()) return api_missing(path + ".type");
    std::vector<std::string_view> names;
    for (const FormatType& row : format_types) {
        if (custom && !row.custom) continue;
        if (type.as_string() == row.name) return row.read(form, path, out);
        names.push_back(row.name);
    }
    if (!custom && type.as_string() == "json_object")
        return api_error("unsupported_value", path + ".type",
                         "'" + path +
                             ".type': \"json_object\" is not supported: send \"json_schema\" with "
                             "the schema {\"type\": \"object\"}");
    return check_choice(type, path + ".type", names);
}

}  // namespace

Json doc_format(bool custom) {
    Json all = doc_any({});
    for (const FormatType& row : format_types)
        if (row.custom || !custom) all.find("anyOf")->push(row.schema());
    return all;
}

namespace {

Json format_json(const Format& format) {
    if (!format.schema.is_null())
        return Json::object()
            .set("type", "json_schema")
            .set("name", format.name.empty() ? "answer" : format.name)
            .set("description", format.description)
            .set("schema", format.schema)
            .set("strict", format.strict);
    if (!format.one_of.empty()) {
        Json choices = Json::array();
        for (const std::string& choice : format.one_of) choices.push(choice);
        return Json::object().set("type", "choice").set("choices", std::move(choices));
    }
    if (format.empty()) return Json::object().set("type", "text");
    const bool regex = !format.regex.empty();
    return Json::object()
        .set("type", "grammar")
        .set("syntax", regex ? "regex" : "gbnf")
        .set("definition", regex ? format.regex : format.gbnf);
}

Fault field_text(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("text", "an object", value);
    return read_format(value["format"], "text.format", false, &request->format);
}

Json doc_text_field(Dialect) { return doc_object(0, {{"format", doc_ref("TextFormat")}}); }

Json write_text(const Request& request) {
    if (request.format.empty()) return {};
    return Json::object().set("format", format_json(request.format));
}

constexpr std::string_view summary_names[] = {"auto", "concise", "detailed"};

Fault field_reasoning(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("reasoning", "an object", value);
    for (const JsonMember& member : value.members()) {
        const std::string path = "reasoning." + member.key;
        Fault fault;
        if (member.value.is_null()) continue;
        if (member.key == "effort") {
            fault = check_choice(member.value, path, kEffortNames);
            for (size_t i = 0; i < std::size(kEffortNames); ++i)
                if (member.value.as_string() == kEffortNames[i])
                    request->effort = static_cast<Effort>(i);
        } else if (member.key == "summary" || member.key == "generate_summary") {
            fault = check_choice(member.value, path, summary_names);
        }
        if (fault) return fault;
    }
    return {};
}

Json doc_reasoning(Dialect) {
    return doc_object(0, {{"effort", doc_words(kEffortNames)},
                          {"summary", doc_words(summary_names)},
                          {"generate_summary", doc_words(summary_names)}});
}

Json write_reasoning(const Request& request) {
    if (!request.effort) return {};
    return Json::object().set("effort", effort_name(*request.effort));
}

// ---- Tools -------------------------------------------------------------------------------------

// Tools that are known, and none of ours. The openai dialect refuses those that a server would have to
// run, and ignores the others, among them the search that Codex declares unasked.
constexpr std::string_view server_tools[] = {"file_search", "code_interpreter", "image_generation",
                                             "mcp"};
constexpr std::string_view client_tools[] = {"web_search",   "web_search_preview",   "computer",
                                             "computer_use", "computer_use_preview", "local_shell",
                                             "shell",        "apply_patch",          "namespace",
                                             "tool_search"};

bool is_one_of(std::string_view type, std::span<const std::string_view> types) {
    return std::find(types.begin(), types.end(), type) != types.end();
}

bool is_own_tool(const Json& type) {
    return type.as_string() == "function" || type.as_string() == "custom";
}

constexpr std::string_view choice_types[] = {"function", "custom", "allowed_tools"};
constexpr std::span tool_types = std::span(choice_types).first<2>();

// The type of a tool, declared or chosen.
Fault check_tool_type(const Json& type, const std::string& path,
                      std::span<const std::string_view> choices) {
    if (type.is_null()) return api_missing(path);
    return check_choice(
        type, path, choices,
        is_one_of(type.as_string(), server_tools) || is_one_of(type.as_string(), client_tools)
            ? "unsupported_value"
            : "invalid_value");
}

Fault read_tool(const Json& json, const std::string& path, Tool* out) {
    if (!json.is_object()) return api_wrong_type(path, "an object", json);
    if (Fault fault = check_tool_type(json["type"], path + ".type", tool_types)) return fault;
    out->custom = json["type"].as_string() == "custom";
    if (Fault fault = read_name(json, path, &out->name)) return fault;
    if (Fault fault = read_description(json, path, &out->description)) return fault;
    if (out->custom) return read_format(json["format"], path + ".format", true, &out->format);
    if (Fault fault = read_schema(json, "parameters", path, &out->parameters)) return fault;
    return read_strict(json, path, &out->strict);
}

}  // namespace

Json doc_tool() {
    return doc_any({doc_object(2, {{"type", doc_word(tool_types[0])},
                                   {"name", doc_name()},
                                   {"description", doc_type("string")},
                                   {"parameters", doc_type("object")},
                                   {"strict", doc_type("boolean")}}),
                    doc_object(2, {{"type", doc_word(tool_types[1])},
                                   {"name", doc_name()},
                                   {"description", doc_type("string")},
                                   {"format", doc_format(true)}})});
}

namespace {

Fault field_tools(const Json& value, Request* request) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    request->tools.resize(value.size());
    for (size_t i = 0; i < value.size(); ++i)
        if (Fault fault = read_tool(value[i], api_index("tools", i), &request->tools[i]))
            return fault;
    return {};
}

// What is ignored is taken all the same.
Json doc_tools(Dialect dialect) {
    if (dialect != Dialect::openai) return doc_array(doc_ref("Tool"));
    return doc_array(doc_any({doc_ref("Tool"), doc_object(1, {{"type", doc_type("string")}})}));
}

// Clients declare types that are newer than this, or that they run by themselves in a way that a
// model has to be trained for. What a server would have to run is still refused.
Fault openai_tools(const Json& value, Request* request) {
    if (!value.is_array()) return api_wrong_type("tools", "an array", value);
    for (size_t i = 0; i < value.size(); ++i) {
        const Json& type = value[i]["type"];
        if (type.is_string() && !is_own_tool(type) && !is_one_of(type.as_string(), server_tools))
            continue;
        if (Fault fault = read_tool(value[i], api_index("tools", i),
                                    &request->tools.emplace_back()))
            return fault;
    }
    return {};
}

Json write_tools(const Request& request) {
    Json all = Json::array();
    for (const Tool& tool : request.tools) {
        Json one = Json::object()
                       .set("type", tool.custom ? "custom" : "function")
                       .set("name", tool.name)
                       .set("description", tool.description);
        if (tool.custom) one.set("format", format_json(tool.format));
        else one.set("parameters", tool.parameters).set("strict", tool.strict);
        all.push(std::move(one));
    }
    return all.empty() ? Json() : all;
}

using Mode = ToolChoice::Mode;
constexpr std::string_view choice_modes[] = {"auto", "none", "required"};
static_assert(std::size(choice_modes) == static_cast<size_t>(Mode::required) + 1);

Fault read_mode(const Json& value, const std::string& path, Mode* out) {
    for (size_t i = 0; i < std::size(choice_modes); ++i)
        if (value.as_string() == choice_modes[i]) *out = static_cast<Mode>(i);
    return check_choice(value, path, choice_modes);
}

constexpr std::string_view allowed_modes[] = {"auto", "required"};

Fault read_allowed_tools(const Json& value, ToolChoice* out) {
    const Json &mode = value["mode"], &tools = value["tools"];
    if (mode.is_null()) return api_missing("tool_choice.mode");
    if (Fault fault = check_choice(mode, "tool_choice.mode", allowed_modes)) return fault;
    (void)read_mode(mode, {}, &out->mode);
    if (tools.is_null()) return api_missing("tool_choice.tools");
    if (!tools.is_array()) return api_wrong_type("tool_choice.tools", "an array", tools);
    if (tools.empty())
        return api_error("array_below_min_length", "tool_choice.tools",
                         "'tool_choice.tools' must not be empty");
    for (size_t i = 0; i < tools.size(); ++i) {
        const std::string path = api_index("tool_choice.tools", i);
        if (!tools[i].is_object()) return api_wrong_type(path, "an object", tools[i]);
        if (Fault fault = check_tool_type(tools[i]["type"], path + ".type", tool_types))
            return fault;
        if (Fault fault = read_name(tools[i], path, &out->names.emplace_back())) return fault;
    }
    return {};
}

Fault field_tool_choice(const Json& value, Request* request) {
    ToolChoice& choice = request->tool_choice;
    if (value.is_string()) return read_mode(value, "tool_choice", &choice.mode);
    if (!value.is_object()) return api_wrong_type("tool_choice", "a string or an object", value);
    if (Fault fault = check_tool_type(value["type"], "tool_choice.type", choice_types))
        return fault;
    if (value["type"].as_string() == "allowed_tools") return read_allowed_tools(value, &choice);
    choice.mode = Mode::required;
    return read_name(value, "tool_choice", &choice.names.emplace_back());
}

}  // namespace

Json doc_tool_choice() {
    Json named = doc_any({});
    for (const std::string_view type : tool_types)
        named.find("anyOf")->push(doc_object(2, {{"type", doc_word(type)}, {"name", doc_name()}}));
    return doc_any({doc_words(choice_modes), named,
                    doc_object(3, {{"type", doc_word("allowed_tools")},
                                   {"mode", doc_words(allowed_modes)},
                                   {"tools", doc_array(named, 1)}})});
}

namespace {

Json doc_tool_choice_field(Dialect) { return doc_ref("ToolChoice"); }

const Tool* find_tool(const Request& request, std::string_view name) {
    for (const Tool& tool : request.tools)
        if (tool.name == name) return &tool;
    return nullptr;
}

Json write_tool_choice(const Request& request) {
    const ToolChoice& choice = request.tool_choice;
    if (choice.names.empty() || choice.mode == Mode::none)
        return choice.mode == Mode::automatic
                   ? Json()
                   : Json(choice_modes[static_cast<size_t>(choice.mode)]);
    Json tools = Json::array();
    for (const std::string& name : choice.names) {
        const Tool* tool = find_tool(request, name);
        tools.push(Json::object()
                       .set("type", tool && tool->custom ? "custom" : "function")
                       .set("name", name));
    }
    return Json::object()
        .set("type", "allowed_tools")
        .set("mode", choice_modes[static_cast<size_t>(choice.mode)])
        .set("tools", std::move(tools));
}

// A tool is named with the type that it was declared with.
Fault check_chosen(const Json& named, const std::string& path, const Request& request) {
    const std::string name(named["name"].as_string());
    const Tool* tool = find_tool(request, name);
    if (tool && tool->custom == (named["type"].as_string() == "custom")) return {};
    return api_error("invalid_value", path,
                     "'" + path + "': 'tools' declares no " +
                         std::string(named["type"].as_string()) + " tool '" + name + "'");
}

bool names_one_tool(const Json& choice) {
    return choice.is_object() && choice["type"].as_string() != "allowed_tools";
}

Fault check_tool_choice(const Json& choice, const Request& request) {
    if (!choice.is_object()) return {};
    if (names_one_tool(choice)) return check_chosen(choice, "tool_choice.name", request);
    const Json& tools = choice["tools"];
    for (size_t i = 0; i < tools.size(); ++i)
        if (Fault fault = check_chosen(tools[i], api_index("tool_choice.tools", i) + ".name",
                                       request))
            return fault;
    return {};
}

// ---- The fields of a request -------------------------------------------------------------------

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

Json doc_input(Dialect) {
    const Json items = doc_array(doc_ref("InputItem"), 1);
    return doc_any({doc_text(1), items, doc_object(1, {{"messages", items}})});
}

// May be empty where something else says what to answer, which is known once all fields are.
Fault openai_input(const Json& value, Request* request) {
    const bool empty = (value.is_string() && value.as_string().empty()) ||
                       (value.is_array() && value.empty());
    return empty ? Fault() : field_input(value, request);
}

Json write_input(const Request& request) {
    if (request.input.items.empty())
        return request.input.empty() ? Json() : Json(request.input.text);
    Json items = Json::array();
    for (const Item& item : request.input.items) items.push(item_json(item));
    return items;
}

Fault field_seed(const Json& value, Request* request) {
    request->seed = value.as_int();
    return check_integer(value, "seed", INT64_MIN, INT64_MAX);
}

Json doc_seed(Dialect) {
    return doc_type("integer").set("minimum", INT64_MIN).set("maximum", INT64_MAX);
}

Json write_seed(const Request& request) { return request.seed ? Json(*request.seed) : Json(); }

constexpr const char* in_openai_dialect =
    " is not supported in this dialect: start the server with --dialect openai "
    "(in C++ ServerOptions::dialect)";

// A switch that has one legal position here.
Fault fixed_switch(const Json& value, const char* path, bool position, const char* instead) {
    if (Fault fault = check_bool(value, path)) return fault;
    if (value.as_bool() == position) return {};
    return api_error(
        "unsupported_value", path,
        join({"'", path, "': ", position ? "false" : "true", in_openai_dialect, instead}));
}
Json doc_switch(bool position) {
    return doc_type("boolean").set("enum", Json::array().push(position));
}
Fault field_store(const Json& value, Request*) {
    return fixed_switch(value, "store", true, ", or DELETE the response once it is read");
}
Fault openai_store(const Json& value, Request* request) {
    request->store = value.as_bool();
    return check_bool(value, "store");
}
Json doc_store(Dialect dialect) {
    return dialect == Dialect::openai ? doc_type("boolean") : doc_switch(true);
}
Json write_store(const Request& request) { return request.store ? Json() : Json(false); }

constexpr size_t max_id_length = 256;

Fault openai_previous(const Json& value, Request* request) {
    request->previous_response_id = value.as_string();
    return check_text(value, "previous_response_id", 1, max_id_length);
}
Json doc_previous(Dialect dialect) {
    return dialect == Dialect::openai ? doc_text(1, max_id_length) : doc_type("null");
}
Json write_previous(const Request& request) {
    return request.previous_response_id.empty() ? Json() : Json(request.previous_response_id);
}

// An id, or an object that holds it.
Fault openai_conversation(const Json& value, Request* request) {
    const Json& id = value.is_object() ? value["id"] : value;
    const std::string path = value.is_object() ? "conversation.id" : "conversation";
    request->conversation = id.as_string();
    return check_text(id, path, 1, max_id_length);
}
Json doc_conversation(Dialect dialect) {
    const Json id = doc_text(1, max_id_length);
    return dialect == Dialect::openai ? doc_any({id, doc_object(1, {{"id", id}})})
                                      : doc_type("null");
}
Json write_conversation(const Request& request) {
    return request.conversation.empty() ? Json() : Json(request.conversation);
}

Fault field_stream(const Json& value, Request*) {
    return fixed_switch(value, "stream", false,
                        ", or ask with 'background': true and poll GET /v1/responses/{id}; POST "
                        "/v1/chat/completions streams in both");
}
Fault openai_stream(const Json& value, Request* request) {
    request->stream = value.as_bool();
    return check_bool(value, "stream");
}

Json doc_stream(Dialect dialect) {
    return dialect == Dialect::openai ? doc_type("boolean") : doc_switch(false);
}

Fault field_stream_options(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("stream_options", "an object", value);
    const Json& progress = value["prompt_progress"];
    request->prompt_progress = progress.as_bool();
    return progress.is_null() ? Fault() : check_bool(progress, "stream_options.prompt_progress");
}
Json write_stream_options(const Request& request) {
    return request.prompt_progress ? Json::object().set("prompt_progress", true) : Json();
}
Json doc_stream_options(Dialect) {
    return doc_object(0, {{"prompt_progress", doc_type("boolean")}});
}

constexpr std::string_view truncations[] = {"disabled"}, service_tiers[] = {"auto"};

Fault field_truncation(const Json& value, Request*) {
    return check_choice(value, "truncation", truncations, "unsupported_value");
}
Json doc_truncation(Dialect) { return doc_words(truncations); }

Fault field_service_tier(const Json& value, Request*) {
    return check_choice(value, "service_tier", service_tiers, "unsupported_value");
}
Json doc_service_tier(Dialect) { return doc_words(service_tiers); }

constexpr size_t metadata_max_pairs = 256, metadata_max_key = 256, metadata_max_value = 8192;
constexpr size_t metadata_max_token = 512;

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
    if (key == kWindowKey) return check_choice(value, path, kWindowNames);
    if (key != kWebhookTokenKey) return {};
    const std::string_view token = value.as_string();
    const bool plain = std::all_of(token.begin(), token.end(),
                                   [](char c) { return c > ' ' && c < 127; });
    if (token.size() <= metadata_max_token && plain) return {};
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

Json doc_metadata(Dialect) {
    const Json token = doc_text(0, metadata_max_token).set("pattern", "^[!-~]*$");
    return doc_type("object")
        .set("maxProperties", metadata_max_pairs)
        .set("propertyNames", doc_text(0, metadata_max_key))
        .set("properties", Json::object()
                               .set(kWindowKey, doc_words(kWindowNames))
                               .set(kWebhookKey, doc_text(0, metadata_max_value))
                               .set(kWebhookTokenKey, token))
        .set("additionalProperties", doc_text(0, metadata_max_value));
}

Json write_metadata(const Request& request) {
    Json all = Json::object();
    for (const auto& [key, value] : request.metadata) all.set(key, value);
    if (request.window != Window::standard) all.set(kWindowKey, window_name(request.window));
    return all.empty() ? Json() : all;
}

constexpr std::string_view kIncludeLogprobs = "message.output_text.logprobs";

constexpr std::string_view refused_includes[] = {
    "reasoning.encrypted_content", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results"};

// Codex always asks for the first: the openai dialect takes that, for thoughts are in the clear here.
std::span<const std::string_view> refused_in(Dialect dialect) {
    return std::span(refused_includes).subspan(dialect == Dialect::openai ? 1 : 0);
}

Fault read_include(const Json& value, Dialect dialect, Request* request) {
    if (!value.is_array()) return api_wrong_type("include", "an array", value);
    const auto refused = refused_in(dialect);
    for (size_t i = 0; i < value.size(); ++i) {
        const std::string path = api_index("include", i);
        if (!value[i].is_string()) return api_wrong_type(path, "a string", value[i]);
        const std::string_view name = value[i].as_string();
        if (std::find(refused.begin(), refused.end(), name) != refused.end())
            return api_unsupported("unsupported_value", path, name);
        if (name == kIncludeLogprobs) request->logprobs = true;
    }
    return {};
}

Fault field_include(const Json& value, Request* request) {
    return read_include(value, Dialect::valar, request);
}
Fault openai_include(const Json& value, Request* request) {
    return read_include(value, Dialect::openai, request);
}

Json doc_include(Dialect dialect) {
    return doc_array(doc_type("string").set("not", doc_words(refused_in(dialect))));
}

Json write_include(const Request& request) {
    return request.logprobs ? Json::array().push(kIncludeLogprobs) : Json();
}

Fault check_stop(std::string_view stop, const std::string& path) {
    if (!stop.empty() && stop.size() <= kMaxStopBytes && utf8_valid(stop)) return {};
    return api_error("invalid_value", path,
                     format("'%s' has %zu bytes or is not UTF-8; 1..%zu are allowed", path.c_str(),
                            stop.size(), kMaxStopBytes));
}

Fault check_stops(const std::vector<std::string>& stops) {
    if (stops.size() > kMaxStops)
        return api_error(
            "array_above_max_length", "stop",
            format("'stop' has %zu strings; at most %zu are allowed", stops.size(), kMaxStops));
    for (const std::string& stop : stops)
        if (Fault fault = check_stop(stop, "stop")) return fault;
    return {};
}

// One string, or an array of them.
Fault field_stop(const Json& value, Request* request) {
    if (value.is_string()) request->stop.emplace_back(value.as_string());
    else if (!value.is_array()) return api_wrong_type("stop", "a string or an array", value);
    for (size_t i = 0; i < value.size(); ++i) {
        if (!value[i].is_string())
            return api_wrong_type(api_index("stop", i), "a string", value[i]);
        request->stop.emplace_back(value[i].as_string());
    }
    return check_stops(request->stop);
}

Json doc_stop(Dialect) {  // of the bytes, which are at most as many, the check tells
    const Json one = doc_text(1, kMaxStopBytes);
    return doc_any({one, doc_array(one, 0, kMaxStops)});
}

Json write_stop(const Request& request) {
    Json all = Json::array();
    for (const std::string& stop : request.stop) all.push(stop);
    return all.empty() ? Json() : all;
}

// {"token id": bias}, as OpenAI spells it.
Fault field_logit_bias(const Json& value, Request* request) {
    if (!value.is_object()) return api_wrong_type("logit_bias", "an object", value);
    for (const JsonMember& member : value.members()) {
        const std::string path = "logit_bias." + member.key;
        const auto token = Json::parse(member.key);
        if (!token || !token->is_int() || token->as_int() < 0 || token->as_int() > INT32_MAX)
            return api_error("invalid_value", path, "'" + path + "': the key is no token id");
        if (Fault fault = check_number(member.value, path, -kMaxBias, kMaxBias)) return fault;
        request->logit_bias.emplace_back(static_cast<int32_t>(token->as_int()),
                                         member.value.as_double());
    }
    return {};
}

Json doc_logit_bias(Dialect) {
    const Json bias = doc_type("number").set("minimum", -kMaxBias).set("maximum", kMaxBias);
    return doc_type("object")
        .set("propertyNames", Json::object().set("pattern", "^(0|[1-9][0-9]{0,8})$"))
        .set("additionalProperties", bias);
}

Json write_logit_bias(const Request& request) {
    Json all = Json::object();
    for (const auto& [token, bias] : request.logit_bias) all.set(std::to_string(token), bias);
    return all.empty() ? Json() : all;
}

/// A field that is more than a number, a text or a switch; those have tables of their own.
struct RequestField {
    using Read = Fault (*)(const Json& value, Request* request);
    std::string_view name;
    Read read;                                  // null: not supported at all
    Json (*write)(const Request&) = nullptr;    // null where it is as by default
    Json (*schema)(Dialect dialect) = nullptr;  // what `read` takes; null: nothing
    const char* about = "Not supported.";
    Read openai = nullptr;     // where that dialect differs
    const char* instead = "";  // what to send where it is not supported
};
constexpr RequestField request_fields[] = {
    // clang-format off
    {"input", field_input, write_input, doc_input, "What is asked: a text, or what was said so far.", openai_input},
    {"seed", field_seed, write_seed, doc_seed, "The same request and seed give the same bytes. Default: drawn."},
    {"text", field_text, write_text, doc_text_field, "The form of the answer."},
    {"reasoning", field_reasoning, write_reasoning, doc_reasoning, "How much the model thinks first."},
    {"store", field_store, write_store, doc_store, "Whether the response is kept once it is answered.", openai_store},
    {"truncation", field_truncation, nullptr, doc_truncation, "A prompt that does not fit is refused."},
    {"stream", field_stream, nullptr, doc_stream, "Answered in server-sent events.", openai_stream},
    {"stream_options", field_stream_options, write_stream_options, doc_stream_options, "prompt_progress: events that tell how far the prompt is read."},
    {"metadata", field_metadata, write_metadata, doc_metadata, "Kept with the response; completion_window says when it is wanted."},
    {"tools", field_tools, write_tools, doc_tools, "What the model may call.", openai_tools},
    {"tool_choice", field_tool_choice, write_tool_choice, doc_tool_choice_field, "Which tools must or may be called."},
    {"include", field_include, write_include, doc_include, "message.output_text.logprobs: log-probabilities of tokens.", openai_include},
    {"service_tier", field_service_tier, nullptr, doc_service_tier, "There is one."},
    {"stop", field_stop, write_stop, doc_stop, "Ends the answer before the first of these, each of at most 256 bytes."},
    {"logit_bias", field_logit_bias, write_logit_bias, doc_logit_bias, "Added to the logits of tokens, by their ids."},
    {"previous_response_id", nullptr, write_previous, doc_previous, "Its turns come first.", openai_previous, ", or send the earlier turns in 'input'"},
    {"conversation", nullptr, write_conversation, doc_conversation, "Its items come first; what is asked and answered becomes part of it.", openai_conversation, ", or send its items in 'input'"},
    {"prompt", nullptr, nullptr, nullptr, "Not supported.", nullptr, ": send 'instructions' and 'input'"},
    // clang-format on
};
constexpr std::string_view required_fields[] = {"model", "input"};

Fault read_number(const NumberOption& row, const Json& value, Request* request) {
    if (row.open) request->*row.open = value.as_double();
    else request->*row.fixed = value.as_double();
    return check_number(value, row.name, row.least, row.most);
}

Fault read_count(const CountOption& row, const Json& value, Request* request) {
    const auto count = static_cast<uint32_t>(
        std::clamp<int64_t>(value.as_int(), row.least, int64_t{row.most}));
    if (row.open) request->*row.open = count;
    else request->*row.fixed = count;
    return check_integer(value, row.name, row.least,
                         row.most == UINT32_MAX ? INT64_MAX : int64_t{row.most});
}

Fault read_field(const RequestField& row, const Json& value, Dialect dialect, Request* request) {
    const bool differs = dialect == Dialect::openai && row.openai;
    const RequestField::Read read = differs ? row.openai : row.read;
    if (read) return read(value, request);
    return api_error("unsupported_parameter", std::string(row.name),
                     join({"'", row.name, "'", row.openai ? in_openai_dialect : " is not supported",
                           row.instead}));
}

template <class Row, size_t N>
const Row* find_row(const Row (&rows)[N], std::string_view name) {
    for (const Row& row : rows)
        if (row.name == name) return &row;
    return nullptr;
}

// A field of any kind; unknown ones are left alone.
Fault read_member(const JsonMember& member, Dialect dialect, Request* request) {
    const Json& value = member.value;
    if (value.is_null()) return {};
    if (const auto* row = find_row(number_options, member.key))
        return read_number(*row, value, request);
    if (const auto* row = find_row(count_options, member.key))
        return read_count(*row, value, request);
    if (const auto* row = find_row(text_options, member.key)) {
        request->*row->field = value.as_string();
        return check_text(value, row->name, row->least, row->most);
    }
    if (const auto* row = find_row(switch_options, member.key)) {
        request->*row->field = value.as_bool();
        return check_bool(value, row->name);
    }
    if (const auto* row = find_row(request_fields, member.key))
        return read_field(*row, value, dialect, request);
    return {};
}

/// The names of all fields that are read.
std::vector<std::string_view> field_names() {
    std::vector<std::string_view> names;
    const auto add = [&](const auto& rows) {
        for (const auto& row : rows) names.emplace_back(row.name);
    };
    add(text_options);
    add(number_options);
    add(count_options);
    add(switch_options);
    add(request_fields);
    return names;
}

Fault check_background(const Request& request) {
    const bool hooked = std::any_of(request.metadata.begin(), request.metadata.end(),
                                    [](const auto& pair) { return pair.first == kWebhookKey; });
    if (!request.store && (request.background || hooked))
        return api_error("unsupported_value", "store",
                         format("'store' must be true with '%s', but false was received",
                                hooked ? "metadata.completion_webhook" : "background"));
    if (request.background || request.window != Window::flex) return {};
    return api_error("invalid_value", kWindowField,
                     format("'%s' may be \"flex\" only with 'background': true", kWindowField));
}

// ---- Rules that need no model ------------------------------------------------------------------

template <class Row, class Number>
Fault check_range(const Row& row, const std::optional<Number>& value) {
    if (!value || (*value >= row.least && *value <= row.most)) return {};
    const auto shown = [](auto number) { return Json(number).write(); };
    return api_error("invalid_value", row.name,
                     join({row.name, ": ", shown(*value), " is not in ", shown(row.least), "..",
                           shown(row.most)}));
}

Fault check_ranges(const Request& request) {
    for (const NumberOption& row : number_options)
        if (Fault fault = check_range(row, option_value(row, request))) return fault;
    for (const CountOption& row : count_options)
        if (Fault fault = check_range(row, option_value(row, request))) return fault;
    return {};
}

// One form at most.
Fault check_format(const Format& format, const std::string& path) {
    const int forms = !format.schema.is_null() + !format.regex.empty() + !format.one_of.empty() +
                      !format.gbnf.empty();
    if (forms < 2) return {};
    return api_error("invalid_value", path, "'" + path + "' has more than one form");
}

Fault check_tool(const Tool& tool, const std::string& path) {
    if (!is_name(tool.name))
        return api_error("invalid_value", path + ".name",
                         "'" + path + ".name' must be 1 to 64 of a-z, A-Z, 0-9, _ and -");
    if (!tool.parameters.is_null() && !tool.parameters.is_object())
        return api_wrong_type(path + ".parameters", "an object", tool.parameters);
    const bool text = tool.format.schema.is_null() && tool.format.one_of.empty();
    if (!tool.format.empty() && !(tool.custom && text))
        return api_error("invalid_value", path + ".format",
                         "'" + path + ".format' may be a regex or GBNF, of a custom tool");
    return check_format(tool.format, path + ".format");
}

Fault check_tools(const Request& request) {
    std::unordered_set<std::string_view> names;
    for (size_t i = 0; i < request.tools.size(); ++i) {
        const Tool& tool = request.tools[i];
        const std::string path = api_index("tools", i);
        if (Fault fault = check_tool(tool, path)) return fault;
        if (!names.insert(tool.name).second)
            return api_error("invalid_value", path + ".name",
                             "'" + path + ".name': there is a tool '" + tool.name + "' already");
    }
    const ToolChoice& choice = request.tool_choice;
    if (request.tools.empty() && choice.mode == Mode::required)
        return api_error("invalid_value", "tool_choice",
                         "'tool_choice' demands a tool, but 'tools' is empty");
    for (const std::string& name : choice.names)
        if (!names.contains(name))
            return api_error("invalid_value", "tool_choice",
                             "'tool_choice': 'tools' declares no tool '" + name + "'");
    return {};
}

Fault check_rules(const Request& request) {
    if (request.input.empty() && !request.raw)
        return api_error("missing_required_parameter", "input", "input: missing or empty");
    if (request.raw && (!request.format.empty() || !request.tools.empty() || request.effort))
        return api_error("invalid_value", "raw",
                         "raw: a prompt past the template takes no format, tools or effort");
    if (Fault fault = check_ranges(request)) return fault;
    if (Fault fault = check_stops(request.stop)) return fault;
    if (Fault fault = check_format(request.format, "text.format")) return fault;
    if (Fault fault = check_calls(request, "input")) return fault;
    return check_tools(request);
}

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

}  // namespace

Json item_json(const Item& item, const std::string& id, const char* status) {
    const bool custom = item.kind == Item::Kind::custom_tool_call;
    Json out = Json::object();
    if (!id.empty()) out.set("id", id);
    out.set("type", item_type(item.kind).name);
    if (item.kind == Item::Kind::message) out.set("role", role_name(item.role));
    if (status && !custom) out.set("status", status);  // of a custom call it is always whole
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

Result<Item> read_item(const Json& json, const std::string& path) {
    Item item;
    if (Fault fault = read_any_item(json, path, &item)) return std::move(*fault);
    return item;
}

Result<void> check_request(const Request& request) {
    if (Fault fault = check_rules(request)) return std::move(*fault);
    return {};
}

Json request_json(const Request& request) {
    static const Request usual;
    Json out = Json::object();
    for (const TextOption& row : text_options)
        if (!(request.*row.field).empty()) out.set(row.name, request.*row.field);
    for (const NumberOption& row : number_options) {
        const auto value = option_value(row, request);
        if (value && !(row.fixed && *value == usual.*row.fixed)) out.set(row.name, *value);
    }
    for (const CountOption& row : count_options) {
        const auto value = option_value(row, request);
        if (value && !(row.fixed && *value == usual.*row.fixed)) out.set(row.name, *value);
    }
    for (const SwitchOption& row : switch_options)
        if (request.*row.field != usual.*row.field) out.set(row.name, request.*row.field);
    for (const RequestField& row : request_fields)
        if (Json value = row.write ? row.write(request) : Json(); !value.is_null())
            out.set(row.name, std::move(value));
    return out;
}

namespace {

/// A bound that a row has.
template <class Row>
Json doc_range(const char* type, const Row& row) {
    Json schema = doc_type(type).set("minimum", row.least);
    if (row.most != UINT32_MAX) schema.set("maximum", row.most);
    return schema;
}

}  // namespace

Json doc_fields(Dialect dialect) {
    static const Request usual;
    Json fields = Json::object();
    for (const std::string_view name : required_fields) fields.set(name, nullptr);  // come first
    const auto add = [&](std::string_view name, Json schema, const char* about,
                         Json by_default = {}) {
        if (!by_default.is_null()) schema.set("default", std::move(by_default));
        fields.set(name, std::move(schema.set("description", about)));
    };
    const auto default_of = [&](const auto& row) {
        return row.fixed ? Json(usual.*row.fixed) : Json();
    };
    for (const TextOption& row : text_options)
        add(row.name, doc_text(row.least, row.most), row.about);
    for (const NumberOption& row : number_options)
        add(row.name, doc_range("number", row), row.about, default_of(row));
    for (const CountOption& row : count_options)
        add(row.name, doc_range("integer", row), row.about, default_of(row));
    for (const SwitchOption& row : switch_options)
        add(row.name, doc_type("boolean"), row.about, usual.*row.field);
    for (const RequestField& row : request_fields)
        add(row.name, row.schema ? row.schema(dialect) : doc_type("null"), row.about);
    return fields;
}

Json doc_request(Dialect dialect) { return doc_body(doc_fields(dialect), required_fields); }

Result<Request> read_request(const Json& body, Dialect dialect) {
    Request request;
    for (const JsonMember& member : body.members())
        if (Fault fault = read_member(member, dialect, &request)) return std::move(*fault);
    return request;
}

Result<Request> parse_response_request(const Json& body, Dialect dialect) {
    if (!body.is_object()) return api_error("invalid_type", {}, "the body must be a JSON object");
    if (Fault fault = check_names(body, field_names())) return std::move(*fault);
    const bool goes_on = dialect == Dialect::openai && (!body["previous_response_id"].is_null() ||
                                                        !body["conversation"].is_null());
    for (const std::string_view name : required_fields)
        if (body[name].is_null() && !(goes_on && name == "input"))
            return api_missing(std::string(name));
    auto read = read_request(body, dialect);
    if (!read) return read.error();
    const Request& request = *read;
    if (!request.previous_response_id.empty() && !request.conversation.empty())
        return api_error("invalid_value", "conversation",
                         "'conversation' and 'previous_response_id' exclude each other");
    if (request.input.empty() && !goes_on) {
        if (request.max_output_tokens != 1u) return *field_input(body["input"], &*read);
        read->input.items = {Item::message(Role::user, {})};  // a probe whether a model is there
    }
    const char* items = body["input"].is_object() ? "input.messages" : "input";
    const bool whole = !goes_on;  // else calls may stand there
    if (Fault fault = whole ? check_calls(request, items) : Fault()) return std::move(*fault);
    if (Fault fault = check_tool_choice(body["tool_choice"], request)) return std::move(*fault);
    // A tool that is named is called exactly once, as OpenAI has it.
    if (names_one_tool(body["tool_choice"])) read->parallel_tool_calls = false;
    if (Fault fault = check_tools(request)) return std::move(*fault);
    if (Fault fault = check_background(request)) return std::move(*fault);
    return read;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

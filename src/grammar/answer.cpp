#include "prologue.hpp"

#include "base/text.hpp"
#include "grammar/answer.hpp"
#include "json_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr std::string_view kAnswerSpaces = " \t\r\n";
// Of values in a family's own syntax, so that schemas that hold themselves end: what is deeper, or
// comes later, is JSON.
constexpr int kMostNesting = 16, kMostOwnValues = 500;

std::string_view without_answer_spaces(std::string_view text) {
    const size_t first = text.find_first_not_of(kAnswerSpaces);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(kAnswerSpaces) - first + 1);
}

/// A pattern of just this text.
std::string pattern_of(std::string_view text) {
    std::string out;
    for (char c : text) {
        const bool plain = static_cast<uint8_t>(c) >= 0x80 || (c >= '0' && c <= '9') ||
                           (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (plain) out += c;
        else out += format("\\x%02x", static_cast<unsigned>(c));
    }
    return out;
}

/// The same of JSON, with any white space between its tokens.
std::string spaced_pattern(std::string_view json) {
    std::string out;
    bool in_string = false;
    for (size_t i = 0; i < json.size(); ++i) {
        const std::string one = pattern_of(json.substr(i, 1));
        const bool between = !in_string &&
                             std::string_view("{}[]:,").find(json[i]) != std::string_view::npos;
        out += between ? "\\s*" + one + "\\s*" : one;
        if (json[i] == '"') in_string = !in_string;
        if (json[i] == '\\' && ++i < json.size()) out += pattern_of(json.substr(i, 1));
    }
    return out;
}

Error refuse_tool(const Tool& tool, std::string_view why) {
    return make_error(ErrorKind::invalid_request, join({"tool ", printable(tool.name), ": ", why}),
                      "invalid_json_schema");
}

class AnswerCompiler {
public:
    /// `relaxed`: of schemas that are not strict the type alone is kept.
    explicit AnswerCompiler(const AnswerShape& shape, bool relaxed = false)
        : shape_(shape), syntax_(*shape.syntax), calls_(syntax_.calls), relaxed_(relaxed) {
        for (const Tool& tool : shape.tools)
            if (shape.choice.names.empty() ||
                std::find(shape.choice.names.begin(), shape.choice.names.end(), tool.name) !=
                    shape.choice.names.end())
                tools_.push_back(&tool);
        if (shape.choice.mode == ToolChoice::Mode::none) tools_.clear();
    }

    Result<GrammarPtr> run() {
        const bool formatted = shape_.format && !shape_.format->empty();
        if (tools_.empty() && !formatted) return GrammarPtr();
        builder_.space = JsonSpace::optional;
        auto answer = syntax_.channels() ? channel_answer() : body();
        if (answer) answer = with_thought(*answer);
        auto built = answer ? builder_.build(*answer) : Result<GrammarPtr>(answer.error());
        if (built) return built;
        Error error = built.error();
        error.param = place_;  // the schema's own place is in its message
        const bool schema = place_.ends_with("schema") || place_.ends_with("parameters");
        if (!schema) error.code = "invalid_value";
        return error;
    }

private:
    using Style = CallStyle;

    Part bytes(std::string_view text) { return builder_.bytes(text); }
    Part spaces(uint32_t most) {
        return builder_.repeat(builder_.texts({" ", "\t", "\r", "\n"}), 0, most);
    }

    Result<Part> pattern(std::string_view text) {
        auto dfa = pattern_dfa(text, Spelling::raw, false, builder_.budget());
        if (!dfa) return dfa.error();
        return builder_.terminal(std::move(*dfa));
    }

    /// A text of a row: its special tokens by their numbers.
    Result<Part> literal(std::string_view text, std::string_view is_string = {}) {
        std::vector<Part> parts;
        std::string plain;
        const auto flush = [&] { parts.push_back(bytes(std::exchange(plain, {}))); };
        for (size_t i = 0; i < text.size(); ++i) {
            const char c = text[i];
            if (c == kTokenBegin) {
                flush();
                const size_t end = text.find(kTokenEnd, i);
                parts.push_back(builder_.token(token(text.substr(i + 1, end - i - 1))));
                i = end;
            } else if (c == kCallNumber || c == kCallId) {
                flush();
                auto made = pattern(c == kCallNumber ? "[0-9]{1,3}" : "[a-zA-Z0-9]{9}");
                if (!made) return made;
                parts.push_back(*made);
            } else if (c == kIsString) {
                plain += is_string;
            } else {
                plain += c;
            }
        }
        flush();
        return builder_.sequence(std::move(parts));
    }

    Token token(std::string_view spelling) const {
        for (const auto& [text, id] : syntax_.tokens)
            if (text == spelling) return id;
        return Token{-1};
    }

    // ---- texts ----

    /// `text` without those that match a part of `pattern`.
    Result<DfaPtr> without(const Result<DfaPtr>& text, std::string_view pattern) {
        auto holds = pattern_dfa(pattern, Spelling::raw, true, builder_.budget());
        return !text || !holds ? (text ? holds : text) : subtract(*text, *holds, builder_.budget());
    }

    /// Any text but those that hold one of `marks`.
    Result<DfaPtr> text_without(const std::vector<std::string>& marks) {
        Result<DfaPtr> text = any_text_dfa(Spelling::raw);
        for (const std::string& mark : marks)
            if (!mark.empty() && mark.find(kTokenBegin) == std::string::npos)
                text = without(text, pattern_of(mark));
        return text;
    }

    /// A message as the request wants it.
    Result<Part> formatted() {
        const auto& format = *shape_.format;
        place_ = format.schema.is_null() ? "text.format" : "text.format.schema";
        if (!format.schema.is_null() && relaxed_ && !format.strict) return any_json(format.schema);
        if (!format.schema.is_null())
            return add_json_schema(builder_, format.schema, format.strict);
        if (!format.regex.empty()) return add_regex(builder_, format.regex);
        if (!format.gbnf.empty()) return add_gbnf(builder_, format.gbnf);
        return builder_.texts(format.one_of);
    }

    /// What of a schema's type can be held, else any JSON.
    Result<Part> any_json(const Json& schema) {
        Json type = Json::object();
        if (schema.contains("type")) type.set("type", schema["type"]);
        auto made = add_json_schema(builder_, type, false);
        return made ? made : add_json_schema(builder_, Json::object(), false);
    }

    bool is_formatted() const { return shape_.format && !shape_.format->empty(); }

    /// The marks around the answer itself, where they are tokens of their own.
    Result<Part> in_answer_marks(Part message) {
        std::vector<Part> parts[2];
        const auto& marks = syntax_.thought.ignored;
        for (size_t i = 0; i < marks.size() && !syntax_.channels(); ++i) {
            if (marks[i].find(kTokenBegin) == std::string::npos) continue;
            auto made = literal(marks[i]);
            if (!made) return made;
            parts[i % 2].push_back(*made);
        }
        for (auto& list : parts) list.push_back(bytes(""));
        return builder_.sequence({builder_.choice(parts[0]), message, builder_.choice(parts[1])});
    }

    // ---- thoughts ----

    /// A thought from behind its opening mark on, with its end.
    Result<Part> thought_rest() {
        const std::string core(without_answer_spaces(syntax_.thought.close));
        auto text = text_without({core});
        if (!text) return text.error();
        auto close = literal(core);
        if (!close) return close;
        auto next = syntax_.channels() ? literal(calls_.between) : Result<Part>(spaces(4));
        if (!next) return next;
        return builder_.sequence({builder_.terminal(std::move(*text)), *close, *next});
    }

    Result<Part> with_thought(Part answer) {
        if (!syntax_.has_thought() || shape_.thought == ThoughtState::closed) return answer;
        auto rest = thought_rest();
        if (!rest) return rest;
        const Part thinks = builder_.sequence({*rest, answer});
        if (shape_.thought == ThoughtState::open) return thinks;
        if (!shape_.may_think) return answer;
        auto open = literal(without_answer_spaces(syntax_.thought.open));
        if (!open) return open;
        return builder_.choice({answer, builder_.sequence({*open, thinks})});
    }

    // ---- bodies ----

    bool must_call() const { return shape_.choice.mode == ToolChoice::Mode::required; }

    Result<Part> body() {
        if (tools_.empty()) {
            auto message = formatted();
            return message ? in_answer_marks(*message) : message;
        }
        auto called = calls();
        if (!called || must_call()) return called;
        if (is_formatted()) {
            auto message = formatted();
            if (message) message = in_answer_marks(*message);
            if (!message) return message;
            return builder_.choice({*message, *called});
        }
        return automatic(*called);
    }

    /// How a bare call begins, up to the key that tells it. One of `answered` said again is none, as
    /// far as that is cheap to tell.
    Result<DfaPtr> bare_beginning() {
        const std::string open = "^\\s*(```[-A-Za-z0-9_.]*\\s*)?(\\[\\s*)?\\{\\s*";
        auto begins = pattern_dfa(open + "\"(name|tool_name|arguments|parameters)\"", Spelling::raw,
                                  true, builder_.budget());
        Budget spare = {8'000, 400'000, 4u << 20};
        for (const Item& call : shape_.answered) {
            const std::string_view all = call.arguments;
            const auto said = pattern_dfa(
                open + "\"name\"\\s*:\\s*" + pattern_of("\"" + call.name + "\"") +
                    "\\s*,\\s*\"(arguments|parameters)\"\\s*:\\s*" +
                    spaced_pattern(all.substr(0, all.size() - 1)) + "\\s*[,}]",
                Spelling::raw, true, spare);
            if (!begins || !said) continue;
            if (auto rest = subtract(*begins, *said, spare)) begins = std::move(rest);
        }
        return begins;
    }

    Result<Part> automatic(Part called) {
        auto text = text_without(calls_.marks), beginning = bare_beginning();
        if (text) text = beginning ? subtract(*text, *beginning, builder_.budget()) : beginning;
        const std::string open(without_answer_spaces(syntax_.thought.open));
        if (!open.empty() && open.front() != kTokenBegin)
            text = without(text, "^[ \\t\\r\\n]*" + pattern_of(without_token_bytes(open)));
        auto bare = bare_calls();
        if (!text || !bare) return text ? bare : Result<Part>(text.error());
        const bool marked = calls_.begin_with_mark();
        const Part said = builder_.terminal(std::move(*text));
        const Part after = marked ? builder_.optional(called) : bytes("");
        auto message = in_answer_marks(builder_.sequence({said, after}));
        if (!message) return message;
        std::vector<Part> ways = {*message, *bare};
        if (!marked) ways.push_back(called);
        return builder_.choice(std::move(ways));
    }

    /// What models without marks of their own, and those that forget them, begin with: an object, a
    /// list of them, either in a fence.
    Result<Part> bare_calls() {
        std::vector<Part> ways;
        const Part gap = spaces(24);
        for (const Tool* tool : tools_) {
            auto arguments = json_arguments(*tool);
            if (!arguments) return arguments;
            ways.push_back(builder_.sequence({bytes("\"" + tool->name + "\""), gap, bytes(","), gap,
                                              builder_.texts({"\"arguments\"", "\"parameters\""}),
                                              gap, bytes(":"), gap, *arguments}));
        }
        const Part object = builder_.new_rule();
        builder_.define(object,
                        builder_.sequence({bytes("{"), gap, bytes("\"name\""), gap, bytes(":"), gap,
                                           builder_.choice(std::move(ways)), gap, bytes("}")}));
        const Part more = builder_.sequence({gap, bytes(","), gap, object});
        const Part list = builder_.sequence(
            {bytes("["), gap, object, builder_.repeat(more, 0, most_calls() - 1), gap, bytes("]")});
        const Part body = builder_.choice({object, list});
        const Part fenced = builder_.sequence(
            {builder_.texts({"```json\n", "```\n"}), gap, body, gap, bytes("```")});
        // The gap behind it: many a vocabulary has `}}` and the line's end as one token.
        return builder_.sequence({gap, builder_.choice({body, fenced}), gap});
    }

    uint32_t most_calls() const {
        if (!shape_.parallel) return 1;
        return std::min(shape_.max_calls.value_or(128), 128u);
    }

    Result<Part> calls() {
        auto one = call(), open = literal(calls_.open), between = literal(calls_.between),
             close = literal(calls_.close);
        for (const auto* part : {&one, &open, &between, &close})
            if (!*part) return part->error();
        // A model may end its line before it ends: that alone must not oblige it to another call.
        const bool line = calls_.between == "\n" && calls_.close.empty() && most_calls() > 1;
        return builder_.sequence(
            {*open, *one, builder_.repeat(builder_.sequence({*between, *one}), 0, most_calls() - 1),
             *close, line ? builder_.optional(bytes("\n")) : bytes("")});
    }

    Result<Part> call() {
        auto before = literal(calls_.before), name_end = literal(calls_.after_name),
             after = literal(calls_.after);
        for (const auto* part : {&before, &name_end, &after})
            if (!*part) return part->error();
        std::vector<Part> ways;
        for (const Tool* tool : tools_) {
            auto made = arguments(*tool);
            if (!made) return made;
            ways.push_back(builder_.sequence({bytes(tool->name), *name_end, *made}));
        }
        return builder_.sequence({*before, builder_.choice(std::move(ways)), *after});
    }

    Result<Part> channel_answer() {
        std::vector<Part> ways;
        if (!must_call() || tools_.empty()) {
            auto final = shape_.thought == ThoughtState::closed
                             ? Result<Part>(bytes(""))
                             : literal(syntax_.thought.ignored.front());
            auto message = is_formatted()
                               ? formatted()
                               : Result<Part>(builder_.terminal(any_text_dfa(Spelling::raw)));
            if (!final || !message) return final ? message : final;
            ways.push_back(builder_.sequence({*final, *message}));
        }
        if (!tools_.empty() && shape_.thought != ThoughtState::closed) {
            auto one = call(), preamble = literal(calls_.key), end = literal(syntax_.thought.close),
                 next = literal(calls_.between);
            for (const auto* part : {&one, &preamble, &end, &next})
                if (!*part) return part->error();
            ways.push_back(*one);
            if (!must_call() && !is_formatted())
                ways.push_back(
                    builder_.sequence({*preamble, builder_.terminal(any_text_dfa(Spelling::raw)),
                                       *end, *next, *one}));
        }
        return builder_.choice(std::move(ways));
    }

    // ---- arguments ----

    static bool is_object(const Json& type) {
        const auto names = type.items();
        return type.is_null() || type.as_string() == "object" ||
               std::any_of(names.begin(), names.end(),
                           [](const Json& name) { return name.as_string() == "object"; });
    }

    /// Arguments are an object, also where a schema would let them be something else.
    Result<Json> schema_of(const Tool& tool) const {
        const bool known = tool.parameters.is_object() && (tool.strict || !relaxed_);
        Json schema = known ? tool.parameters : Json::object();
        if (!is_object(schema["type"])) {
            if (tool.strict) return refuse_tool(tool, "/type: arguments are an object");
            schema = Json::object();
        }
        schema.set("type", "object");
        return schema;
    }

    Result<Part> arguments(const Tool& tool) {
        const bool json = calls_.style == Style::object || calls_.style == Style::named ||
                          calls_.style == Style::channels;
        if (json) return json_arguments(tool);
        if (tool.custom) return custom_input(tool);
        place_at(tool);
        const auto made = schema_of(tool);
        if (!made) return made.error();
        const Json& root = *made;
        const Json& schema = resolved_schema(root, root);
        if (auto fits = check_root(tool, schema); !fits) return fits.error();
        const bool free = schema["properties"].members().empty() &&
                          schema["additionalProperties"].as_bool(true);
        if (calls_.style == Style::tagged && free) return any_tagged();
        auto all = members(tool, schema, root, 0);
        if (!all || calls_.style != Style::gemma) return all;
        return builder_.sequence({bytes("{"), *all, bytes("}")});
    }

    void place_at(const Tool& tool) {
        place_ = "tools[" + std::to_string(&tool - shape_.tools.data()) +
                 (tool.custom ? "].format" : "].parameters");
    }

    Result<Part> json_arguments(const Tool& tool) {
        place_at(tool);
        if (tool.custom) {
            auto text = custom_json(tool);
            if (!text) return text;
            const std::string key = join({"{\"", kCustomArgument, "\":"});
            return builder_.sequence(
                {bytes(key), builder_.optional(bytes(" ")), *text, bytes("}")});
        }
        const auto schema = schema_of(tool);
        if (!schema) return schema.error();
        auto made = add_json_schema(builder_, *schema, tool.strict);
        if (made || tool.strict) return made;
        return add_json_schema(builder_, Json::object().set("type", "object"), false);
    }

    // ---- the text of a custom tool ----

    /// As a JSON string.
    Result<Part> custom_json(const Tool& tool) {
        auto text = !tool.format.gbnf.empty() ? add_gbnf(builder_, tool.format.gbnf, Spelling::json)
                    : !tool.format.regex.empty()
                        ? add_pattern_part(builder_, tool.format.regex, Spelling::json, false)
                        : Result<Part>(builder_.terminal(any_string_dfa()));
        if (!text) return text;
        return builder_.sequence({bytes("\""), *text, bytes("\"")});
    }

    /// As it is, without `ends`. Of a grammar that is its author's to see to.
    Result<Part> custom_text(const Tool& tool, const std::vector<std::string>& ends) {
        if (!tool.format.gbnf.empty()) return add_gbnf(builder_, tool.format.gbnf);
        auto text = text_without(ends);
        if (!text) return text.error();
        if (tool.format.regex.empty()) return builder_.terminal(std::move(*text));
        auto fits = pattern_dfa(tool.format.regex, Spelling::raw, false, builder_.budget());
        if (!fits) return fits.error();
        auto both = intersect(*text, *fits, builder_.budget());
        if (!both) return both.error();
        return builder_.terminal(std::move(*both));
    }

    Result<Part> custom_input(const Tool& tool) {
        place_at(tool);
        if (calls_.style == Style::python) {
            auto text = custom_json(tool);
            if (!text) return text;
            return builder_.sequence({bytes(join({kCustomArgument, "="})), *text});
        }
        const bool tagged = calls_.style == Style::tagged;
        auto text = custom_text(tool, tagged ? text_ends() : std::vector<std::string>{calls_.key});
        if (!text) return text;
        if (tagged) return tagged_member(bytes(kCustomArgument), *text, "true");
        auto quote = literal(calls_.key);
        if (!quote) return quote;
        return builder_.sequence(
            {bytes(join({"{", kCustomArgument, ":"})), *quote, *text, *quote, bytes("}")});
    }

    /// Members stand by themselves here: what rules all of them together cannot be promised.
    static Result<void> check_root(const Tool& tool, const Json& schema) {
        if (!tool.strict) return {};
        static constexpr std::string_view known[] = {
            "type",        "properties",  "required", "additionalProperties",
            "title",       "description", "$defs",    "$schema",
            "definitions", "$comment",    "$id",      "examples",
            "$ref",        "default",     "strict",   "deprecated"};
        for (const JsonMember& member : schema.members())
            if (std::find(std::begin(known), std::end(known), member.key) == std::end(known))
                return refuse_tool(tool, join({"/", member.key,
                                               ": not supported beside this model's "
                                               "way to write arguments"}));
        for (const Json& key : schema["required"].items())
            if (!schema["properties"].contains(key.as_string()))
                return refuse_tool(tool, "/required: names what /properties does not");
        return {};
    }

    /// Of a tool that takes anything.
    Result<Part> any_tagged() {
        auto key = pattern("[A-Za-z0-9_]{1,64}");
        auto text = text_without({core_of_end()});
        if (!key || !text) return key ? Result<Part>(text.error()) : key;
        auto made = tagged_member(*key, builder_.terminal(std::move(*text)), "true");
        if (!made) return made;
        return builder_.repeat(*made, 0, 1);  // a name must not come twice
    }

    std::string core_of_end() const { return std::string(without_answer_spaces(calls_.value_end)); }

    Result<Part> tagged_member(Part key, Part value, std::string_view is_string) {
        auto begin = literal(calls_.key), middle = literal(calls_.value, is_string),
             end = literal(calls_.value_end);
        for (const auto* part : {&begin, &middle, &end})
            if (!*part) return part->error();
        return builder_.sequence({*begin, key, *middle, value, *end});
    }

    static bool is_required(const Json& schema, std::string_view key) {
        const auto required = schema["required"].items();
        return std::any_of(required.begin(), required.end(),
                           [&](const Json& one) { return one.as_string() == key; });
    }

    /// The members of an object in the order of the schema, each required one among them.
    Result<Part> members(const Tool& tool, const Json& schema, const Json& root, int depth) {
        const auto properties = schema["properties"].members();
        const bool commas = calls_.style != Style::tagged;
        const std::string_view comma = calls_.style == Style::python ? ", " : ",";
        // From the last to the first: what may follow where none, or one, went before.
        Part first = bytes(""), later = bytes("");
        for (size_t i = properties.size(); i-- > 0;) {
            auto one = member(tool, properties[i].key, properties[i].value, root, depth);
            if (!one) return one;
            const bool required = is_required(schema, properties[i].key);
            const Part now = builder_.sequence({*one, later});
            const Part then = commas ? builder_.sequence({bytes(comma), *one, later}) : now;
            first = required ? now : builder_.choice({now, first});
            later = required ? then : builder_.choice({then, later});
        }
        return first;
    }

    Result<Part> member(const Tool& tool, std::string_view key, const Json& schema,
                        const Json& root, int depth) {
        const bool plain = std::all_of(key.begin(), key.end(), [](char c) {
            return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                   c == '_' || c == '-' || c == '.' || c == '$';
        });
        if (!plain || key.empty() || (calls_.style == Style::python && key.find('$') != key.npos))
            return refuse_tool(tool, join({"/properties/", printable(key),
                                           ": this model cannot write that name"}));
        if (calls_.style == Style::tagged) return tagged_argument(tool, key, schema, root);
        auto value = calls_.style == Style::python ? python_value(tool, schema, root)
                                                   : gemma_value(tool, schema, root, depth);
        if (!value) return value;
        return builder_.sequence(
            {bytes(key), bytes(calls_.style == Style::python ? "=" : ":"), *value});
    }

    /// A value as JSON.
    Result<Part> json_value(const Tool& tool, const Json& schema, const Json& root) {
        Json whole = schema.is_object() ? schema : Json::object();
        if (schema.is_bool() && !schema.as_bool()) return no_part;
        for (const char* key : {"$defs", "definitions"})
            if (root.contains(key) && !whole.contains(key)) whole.set(key, root[key]);
        auto made = add_json_schema(builder_, whole, tool.strict);
        if (made || tool.strict) return made;
        return add_json_schema(builder_, Json::object(), false);
    }

    Result<Part> tagged_argument(const Tool& tool, std::string_view key, const Json& schema,
                                 const Json& root) {
        const uint8_t kinds = argument_kinds_of(schema, root);
        const bool says = calls_.value.find(kIsString) != std::string::npos;
        const uint8_t words = kNull | kBoolean;
        std::vector<Part> ways;
        if ((kinds & kString) && (says || !(kinds & ~(kString | words)))) {
            auto text = raw_text(tool, schema, root, text_ends(), 0);
            if (!text) return text;
            auto made = tagged_member(bytes(key), *text, "true");
            if (!made) return made;
            ways.push_back(*made);
        }
        if (kinds != kString) {
            auto value = ways.empty() ? json_value(tool, schema, root)
                                      : json_value(tool, without_strings(schema, root), root);
            if (!value) return value;
            auto made = tagged_member(bytes(key), *value, "false");
            if (!made) return made;
            ways.push_back(*made);
        }
        return builder_.choice(std::move(ways));
    }

    std::vector<std::string> text_ends() const {
        std::vector<std::string> ends = {core_of_end()};
        if (calls_.name == "minicpm5") ends.push_back("<![CDATA[");
        return ends;
    }

    /// What of a schema is no string.
    static Json without_strings(const Json& schema, const Json& root) {
        Json made = Json::object().set("allOf", Json::array().push(resolved_schema(schema, root)));
        Json types = Json::array();
        const uint8_t kinds = argument_kinds_of(schema, root);
        if (kinds & kNull) types.push("null");
        if (kinds & kBoolean) types.push("boolean");
        if (kinds & kNumber) types.push("number");
        if (kinds & kList) types.push("array").push("object");
        return made.set("type", std::move(types));
    }

    /// A string without quotes that holds none of `ends`.
    Result<Part> raw_text(const Tool& tool, const Json& unresolved, const Json& root,
                          const std::vector<std::string>& ends, int depth) {
        const Json& schema = resolved_schema(unresolved, root);
        std::vector<std::string> texts;
        for (const Json& value : schema["enum"].items())
            if (value.is_string()) texts.push_back(std::string(value.as_string()));
        if (schema["const"].is_string()) texts = {std::string(schema["const"].as_string())};
        if (!texts.empty()) {
            std::erase_if(texts, [&](const std::string& text) {
                return std::any_of(ends.begin(), ends.end(), [&](const std::string& end) {
                    return end.front() != kTokenBegin && text.find(end) != text.npos;
                });
            });
            return builder_.texts(std::move(texts));
        }
        for (const char* key : {"anyOf", "oneOf"}) {
            std::vector<Part> ways;
            for (const Json& one : schema[key].items()) {
                if (depth > kMostNesting || !(argument_kinds_of(one, root) & kString)) continue;
                auto made = raw_text(tool, one, root, ends, depth + 1);
                if (!made) return made;
                ways.push_back(*made);
            }
            if (!ways.empty() && (key[0] == 'a' || ways.size() == 1 || !tool.strict))
                return builder_.choice(std::move(ways));
        }
        for (const char* key : {"oneOf", "allOf", "not", "if"})
            if (tool.strict && schema.contains(key) && argument_kinds_of(schema, root) == kString)
                return refuse_tool(tool, join({"/", key,
                                               ": not supported for a string in this "
                                               "model's way to write arguments"}));
        return plain_text(tool, schema, ends);
    }

    Result<Part> plain_text(const Tool& tool, const Json& schema,
                            const std::vector<std::string>& ends) {
        auto text = text_without(ends);
        const auto limit = [&](Result<DfaPtr> by) {
            if (text && by) text = intersect(*text, *by, builder_.budget());
            else if (text && tool.strict) text = by.error();
        };
        if (schema["pattern"].is_string())
            limit(
                pattern_dfa(schema["pattern"].as_string(), Spelling::raw, true, builder_.budget()));
        const std::string_view format = schema["format"].as_string();
        if (is_format(format)) limit(format_dfa(format, Spelling::raw));
        if (!text) return text.error();
        const auto count = [&](const char* key, uint32_t fallback) {
            const uint64_t value = schema[key].as_uint(fallback);
            return static_cast<uint32_t>(std::min<uint64_t>(value, unlimited));
        };
        const uint32_t most = is_format(format) ? most_format_chars(format) : unlimited;
        return builder_.terminal(std::move(*text), count("minLength", 0),
                                 std::min(count("maxLength", unlimited), most));
    }

    Result<Part> python_value(const Tool& tool, const Json& schema, const Json& root) {
        const Json& known = resolved_schema(schema, root);
        if (known["type"].as_string() == "boolean" && !known.contains("enum") &&
            !known.contains("const"))
            return builder_.texts({"True", "False"});
        if (known["type"].as_string() == "null") return bytes("None");
        return json_value(tool, schema, root);
    }

    /// Strings between the family's own marks; what is too entangled stands as JSON.
    Result<Part> gemma_value(const Tool& tool, const Json& unresolved, const Json& root,
                             int depth) {
        const Json& schema = resolved_schema(unresolved, root);
        const uint8_t kinds = argument_kinds_of(schema, root);
        if (++own_values_ > kMostOwnValues || depth > kMostNesting)
            return json_value(tool, schema, root);
        if (kinds == kString) return gemma_text(tool, schema, root);
        if ((kinds & kString) && !(kinds & (kNumber | kList))) {
            auto text = gemma_text(tool, schema, root);
            auto word = json_value(tool, without_strings(schema, root), root);
            if (!text || !word) return text ? word : text;
            return builder_.choice({*text, *word});
        }
        const std::string_view type = schema["type"].as_string();
        if (type == "object" && !schema["properties"].empty() && check_root(tool, schema)) {
            auto made = members(tool, schema, root, depth + 1);
            if (made) return builder_.sequence({bytes("{"), *made, bytes("}")});
        }
        if (type == "array" && is_plain_list(schema)) return gemma_list(tool, schema, root, depth);
        return json_value(tool, schema, root);
    }

    Result<Part> gemma_text(const Tool& tool, const Json& schema, const Json& root) {
        auto quote = literal(calls_.key);
        auto text = raw_text(tool, schema, root, {calls_.key}, 0);
        if (!quote || !text) return quote ? text : quote;
        return builder_.sequence({*quote, *text, *quote});
    }

    static bool is_plain_list(const Json& schema) {
        static constexpr std::string_view known[] = {"type",     "items",       "minItems",
                                                     "maxItems", "description", "title"};
        const auto members = schema.members();
        return schema["items"].is_object() &&
               std::all_of(members.begin(), members.end(), [&](const JsonMember& member) {
                   return std::find(std::begin(known), std::end(known), member.key) !=
                          std::end(known);
               });
    }

    Result<Part> gemma_list(const Tool& tool, const Json& schema, const Json& root, int depth) {
        auto item = gemma_value(tool, schema["items"], root, depth + 1);
        if (!item) return item;
        const auto least = static_cast<uint32_t>(
            std::min<uint64_t>(schema["minItems"].as_uint(0), unlimited - 1));
        const auto most = static_cast<uint32_t>(
            std::min<uint64_t>(schema["maxItems"].as_uint(unlimited), unlimited));
        if (least > most) return no_part;
        const Part none = least == 0 ? bytes("") : no_part;
        if (most == 0) return builder_.sequence({bytes("["), none, bytes("]")});
        const Part more = builder_.repeat(builder_.sequence({bytes(","), *item}),
                                          least > 0 ? least - 1 : 0,
                                          most == unlimited ? unlimited : most - 1);
        return builder_.sequence(
            {bytes("["), builder_.choice({none, builder_.sequence({*item, more})}), bytes("]")});
    }

    const AnswerShape& shape_;
    const AnswerSyntax& syntax_;
    const AnswerSyntax::Calls& calls_;
    std::vector<const Tool*> tools_;
    const bool relaxed_;
    std::string place_;  // in the request, of what is being compiled
    int own_values_ = 0;
    GrammarBuilder builder_;
};

}  // namespace

Result<GrammarPtr> compile_answer(const AnswerShape& shape) {
    auto made = AnswerCompiler(shape).run();
    const auto is_loose = [](const Tool& tool) { return !tool.custom && !tool.strict; };
    const bool loose = (shape.format && !shape.format->strict) ||
                       std::any_of(shape.tools.begin(), shape.tools.end(), is_loose);
    if (made || !loose) return made;
    // What is not strict is held as far as it can be, and is never refused.
    auto relaxed = AnswerCompiler(shape, true).run();
    return relaxed ? relaxed : made;
}

namespace {

// Only what may begin with a text is told from calls that were answered (automatic()).
bool reads_answered(const AnswerShape& shape) {
    const bool formatted = shape.format && !shape.format->empty();
    return !shape.tools.empty() && !formatted && !shape.syntax->channels() &&
           shape.choice.mode == ToolChoice::Mode::automatic;
}

// All that compile_answer reads of a shape.
Hash256 digest_of(const AnswerShape& shape) {
    std::string text;
    const auto number = [&](uint64_t n) {
        text.append(reinterpret_cast<const char*>(&n), sizeof n);
    };
    const auto add = [&](std::string_view part) { number(part.size()), text += part; };
    const auto add_format = [&](const v1::Format& format) {
        add(format.schema.write()), add(format.regex), add(format.gbnf), number(format.strict);
        number(format.one_of.size());
        for (const std::string& one : format.one_of) add(one);
    };
    number(reinterpret_cast<uintptr_t>(shape.syntax)), number(uint64_t(shape.thought));
    number(shape.may_think), number(shape.parallel), number(shape.max_calls.has_value());
    number(shape.max_calls.value_or(0)), number(uint64_t(shape.choice.mode));
    number(shape.choice.names.size());
    for (const std::string& name : shape.choice.names) add(name);
    number(shape.tools.size());
    for (const Tool& tool : shape.tools) {
        add(tool.name), add(tool.parameters.write()), number(tool.strict), number(tool.custom);
        add_format(tool.format);
    }
    number(shape.format != nullptr);
    if (shape.format) add_format(*shape.format);
    if (reads_answered(shape))
        for (const Item& call : shape.answered) add(call.name), add(call.arguments);
    return sha256(text);
}

}  // namespace

Result<GrammarPtr> AnswerCache::compile(const AnswerShape& shape) {
    if (shape.tools.empty() && !shape.format) return compile_answer(shape);
    const Hash256 key = digest_of(shape);
    const auto find = [&] {
        const auto at = std::find_if(entries_.begin(), entries_.end(),
                                     [&](const Entry& entry) { return entry.key == key; });
        if (at != entries_.end()) std::rotate(at, at + 1, entries_.end());
        return at != entries_.end();
    };
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (find()) return entries_.back().grammar;
    }
    auto made = compile_answer(shape);
    if (!made || !*made) return made;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (find()) return entries_.back().grammar;  // another thread was sooner
    entries_.push_back({key, *made, (*made)->bytes()});
    bytes_ += entries_.back().bytes;
    for (; entries_.size() > most_entries || bytes_ > most_bytes; entries_.erase(entries_.begin()))
        bytes_ -= entries_.front().bytes;
    return made;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "api_internal.hpp"
#include "base/internal.hpp"
#include "base/text.hpp"
#include "template/syntax.hpp"

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- The rows ---------------------------------------------------------------------------------

// In the order in which they are looked for: what tells more comes first.
std::span<const CallSyntax> call_syntaxes() {
    // clang-format off
#define VALAR_BAR "\xEF\xBD\x9C"    // the wide bar of DeepSeek's marks
#define VALAR_LOW "\xE2\x96\x81"    // and their low line
#define VALAR_DSML VALAR_BAR "DSML" VALAR_BAR
    using enum CallStyle;
    static constexpr CallSyntax rows[] = {
        {"harmony", {"<|channel|>commentary"}, {"<|channel|>", "<|call|>"}, channels,
         {}, "", "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>",
         "<|call|>", "<|start|>assistant", "", "<|channel|>commentary<|message|>"},
        {"gemma4", {"<|tool_call>call:"}, {"<|tool_call>", "<tool_call|>"}, gemma,
         {"<|tool_call>"}, "", "<|tool_call>call:", "", "<tool_call|>", "", "", "<|\"|>"},
        {"functiongemma", {"<start_function_call>call:"},
         {"<start_function_call>", "<end_function_call>"}, gemma, {"<start_function_call>"},
         "", "<start_function_call>call:", "", "<end_function_call>", "", "", "<escape>"},
        {"qwen3-coder", {"<tool_call>", "<function=", "<parameter="}, {}, tagged, {"<tool_call>"},
         "", "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n", "",
         "<parameter=", ">\n", "\n</parameter>\n"},
        {"seed", {"<seed:tool_call>"}, {"<seed:tool_call>", "</seed:tool_call>"}, tagged,
         {"<seed:tool_call>"}, "", "<seed:tool_call>\n<function=", ">\n",
         "</function>\n</seed:tool_call>", "\n", "", "<parameter=", ">", "</parameter>\n"},
        {"minicpm5", {"<function name=", "<param name="}, {}, tagged, {"<function name="},
         "", "<function name=\"", "\">", "</function>", "\n", "",
         "<param name=\"", "\">", "</param>"},
        {"hy3", {"<arg_key:opensource>", "<tool_sep:opensource>"}, {}, tagged,
         {"<tool_calls:opensource>", "<tool_call:opensource>"}, "<tool_calls:opensource>\n",
         "<tool_call:opensource>", "<tool_sep:opensource>\n", "</tool_call:opensource>", "\n",
         "\n</tool_calls:opensource>", "<arg_key:opensource>",
         "</arg_key:opensource>\n<arg_value:opensource>", "</arg_value:opensource>\n"},
        {"glm", {"</arg_key>\n<arg_value>"}, {}, tagged, {"<tool_call>"}, "", "<tool_call>", "\n",
         "</tool_call>", "\n", "", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"},
        {"glm47", {"<arg_key>"}, {"<arg_key>", "<arg_value>"}, tagged, {"<tool_call>"}, "",
         "<tool_call>", "", "</tool_call>", "", "", "<arg_key>", "</arg_key><arg_value>",
         "</arg_value>"},
        {"deepseek32", {"<" VALAR_DSML "function_calls>"}, {}, tagged,
         {"<" VALAR_DSML "function_calls>"}, "<" VALAR_DSML "function_calls>\n",
         "<" VALAR_DSML "invoke name=\"", "\">\n", "</" VALAR_DSML "invoke>", "\n",
         "\n</" VALAR_DSML "function_calls>", "<" VALAR_DSML "parameter name=\"",
         "\" string=\"\3\">", "</" VALAR_DSML "parameter>\n"},
        {"deepseek4", {"<" VALAR_DSML "tool_calls>"}, {}, tagged,
         {"<" VALAR_DSML "tool_calls>"}, "<" VALAR_DSML "tool_calls>\n",
         "<" VALAR_DSML "invoke name=\"", "\">\n", "</" VALAR_DSML "invoke>", "\n",
         "\n</" VALAR_DSML "tool_calls>", "<" VALAR_DSML "parameter name=\"",
         "\" string=\"\3\">", "</" VALAR_DSML "parameter>\n"},
        {"minimax-m2", {"<minimax:tool_call>", "<parameter name="},
         {"<minimax:tool_call>", "</minimax:tool_call>"}, tagged, {"<minimax:tool_call>"},
         "<minimax:tool_call>\n", "<invoke name=\"", "\">\n", "</invoke>", "\n",
         "\n</minimax:tool_call>", "<parameter name=\"", "\">", "</parameter>\n"},
        {"deepseek3", {"<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">",
                       "```json"}, {}, named,
         {"<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">",
          "<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "begin" VALAR_BAR ">"},
         "<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">",
         "<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "begin" VALAR_BAR ">function"
         "<" VALAR_BAR "tool" VALAR_LOW "sep" VALAR_BAR ">", "\n```json\n",
         "\n```<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "end" VALAR_BAR ">", "\n",
         "<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "end" VALAR_BAR ">"},
        {"deepseek31", {"<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">"}, {},
         named, {"<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">",
                 "<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "begin" VALAR_BAR ">"},
         "<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "begin" VALAR_BAR ">",
         "<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "begin" VALAR_BAR ">",
         "<" VALAR_BAR "tool" VALAR_LOW "sep" VALAR_BAR ">",
         "<" VALAR_BAR "tool" VALAR_LOW "call" VALAR_LOW "end" VALAR_BAR ">", "",
         "<" VALAR_BAR "tool" VALAR_LOW "calls" VALAR_LOW "end" VALAR_BAR ">"},
        {"kimi", {"<|tool_calls_section_begin|>"},
         {"<|tool_calls_section_begin|>", "<|tool_call_begin|>"}, named,
         {"<|tool_calls_section_begin|>", "<|tool_call_begin|>"}, "<|tool_calls_section_begin|>",
         "<|tool_call_begin|>functions.", ":\1<|tool_call_argument_begin|>", "<|tool_call_end|>",
         "", "<|tool_calls_section_end|>"},
        {"solar", {"<|tool_call:begin|>"}, {"<|tool_call:begin|>", "<|tool_call:end|>"}, named,
         {"<|tool_calls|>", "<|tool_call:begin|>"}, "<|tool_calls|>",
         "<|tool_call:begin|>\2<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>", "",
         ""},
        {"mistral-small", {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}, {}, named, {"[TOOL_CALLS]"}, "",
         "[TOOL_CALLS]", "[CALL_ID]\2[ARGS]", "", "", ""},
        {"mistral", {"[TOOL_CALLS]", "[ARGS]"}, {"[TOOL_CALLS]", "[ARGS]"}, named,
         {"[TOOL_CALLS]"}, "", "[TOOL_CALLS]", "[ARGS]", "", "", ""},
        {"mistral-old", {"[TOOL_CALLS]"}, {"[TOOL_CALLS]"}, object, {"[TOOL_CALLS]"},
         "[TOOL_CALLS][", "{\"name\": \"", "\", \"arguments\": ", "}", ", ", "]"},
        {"command-r7b", {"<|START_ACTION|>"}, {"<|START_ACTION|>", "<|END_ACTION|>"}, object,
         {"<|START_ACTION|>"}, "<|START_ACTION|>[\n    ",
         "{\"tool_call_id\": \"\1\", \"tool_name\": \"", "\", \"parameters\": ", "}", ",\n    ",
         "\n]<|END_ACTION|>"},
        {"command-r", {"Action:", "```json", "\"tool_name\""}, {}, object, {"Action:"},
         "Action: ```json\n[\n    ", "{\n        \"tool_name\": \"",
         "\",\n        \"parameters\": ", "\n    }", ",\n    ", "\n]```"},
        {"lfm2", {"<|tool_call_start|>"}, {"<|tool_call_start|>", "<|tool_call_end|>"}, python,
         {"<|tool_call_start|>"}, "<|tool_call_start|>[", "", "(", ")", ", ",
         "]<|tool_call_end|>"},
        {"phi4-mini", {"<|tool|>", "<|/tool|>"}, {"<|tool_call|>", "<|/tool_call|>"}, object,
         {"<|tool_call|>"}, "<|tool_call|>[", "{\"name\": \"", "\", \"arguments\": ", "}", ", ",
         "]<|/tool_call|>"},
        {"granite3", {"<|tool_call|>"}, {"<|tool_call|>"}, object, {"<|tool_call|>"},
         "<|tool_call|>[", "{\"name\": \"", "\", \"arguments\": ", "}", ", ", "]"},
        {"apertus", {"<|tools_prefix|>"}, {"<|tools_prefix|>", "<|tools_suffix|>"}, named,
         {"<|tools_prefix|>"}, "<|tools_prefix|>[", "{\"", "\": ", "}", ", ", "]<|tools_suffix|>"},
        {"nemotron", {"<TOOLCALL>"}, {}, object, {"<TOOLCALL>"}, "<TOOLCALL>[", "{\"name\": \"",
         "\", \"arguments\": ", "}", ", ", "]</TOOLCALL>"},
        {"minimax-m1", {"<tool_calls>\n{"}, {}, object, {"<tool_calls>"}, "<tool_calls>\n",
         "{\"name\": \"", "\", \"arguments\": ", "}", "\n", "\n</tool_calls>"},
        {"tool_calls", {"<tool_calls>"}, {}, object, {"<tool_calls>"}, "<tool_calls>[",
         "{\"name\": \"", "\", \"arguments\": ", "}", ", ", "]</tool_calls>"},
        {"hermes", {"<tool_call>"}, {"<tool_call>", "</tool_call>"}, object, {"<tool_call>"}, "",
         "<tool_call>\n{\"name\": \"", "\", \"arguments\": ", "}\n</tool_call>", "\n", ""},
        {"functionary", {"<function=", "</function>"}, {}, named, {"<function="}, "",
         "<function=", ">", "</function>", "", ""},
        {"gigachat", {"<|function_call|>"}, {"<|function_call|>"}, object, {"<|function_call|>"},
         "", "<|function_call|>{\"name\": \"", "\", \"arguments\": ", "}", "", ""},
        {"llama4", {"<|python_start|>", "\"parameters\""}, {}, object,
         {"<|python_start|>", "<|python_end|>"}, "",
         "{\"name\": \"", "\", \"parameters\": ", "}", "", ""},
        {"llama3", {"\"parameters\"", "<|start_header_id|>"}, {"<|python_tag|>"}, object,
         {"<|python_tag|>"}, "", "{\"name\": \"", "\", \"parameters\": ", "}", "; ", ""},
        {"json", {}, {}, object, {}, "", "{\"name\": \"", "\", \"arguments\": ", "}", "\n",
         ""},
    };
#undef VALAR_BAR
#undef VALAR_LOW
#undef VALAR_DSML
    // clang-format on
    return rows;
}

std::span<const ThoughtSyntax> thought_syntaxes() {
    // clang-format off
    static constexpr ThoughtSyntax rows[] = {
        {"harmony", {"<|channel|>analysis"}, "<|channel|>analysis<|message|>", "<|end|>",
         {"<|channel|>final<|message|>"}},
        {"gemma4", {"<|channel>thought"}, "<|channel>thought\n", "\n<channel|>"},
        {"mistral", {"[THINK]", "[/THINK]"}, "[THINK]", "[/THINK]"},
        {"seed", {"<seed:think>"}, "<seed:think>", "</seed:think>"},
        {"command", {"<|START_THINKING|>"}, "<|START_THINKING|>", "<|END_THINKING|>",
         {"<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"}},
        {"minimax-m3", {"<mm:think>"}, "<mm:think>", "</mm:think>"},
        {"hy3", {"<think:opensource>"}, "<think:opensource>", "</think:opensource>"},
        {"apriel", {"[BEGIN FINAL RESPONSE]"}, "Here are my reasoning steps:\n",
         "\n[BEGIN FINAL RESPONSE]\n"},
        {"apertus", {"<|inner_prefix|>"}, "<|inner_prefix|>", "<|inner_suffix|>"},
        {"solar", {"<|think|>", "<|begin|>"}, "<|think|>", "<|end|><|begin|>assistant",
         {"<|content|>"}},
        {"granite", {"<think></think>", "<response></response>"}, "<think>", "</think>",
         {"<response>", "</response>"}},
        {"exaone-deep", {"<thought>", "</thought>"}, "<thought>\n", "\n</thought>\n"},
        {"think", {"<think>"}, "<think>\n", "\n</think>\n\n"},
        {"think", {"</think>"}, "<think>\n", "\n</think>\n\n"},
    };
    // clang-format on
    return rows;
}

// ---- What an argument may be -------------------------------------------------------------------

const Json& resolved_schema(const Json& schema, const Json& root) {
    const Json* at = &schema;
    for (int step = 0; step < 8; ++step) {
        std::string_view path = (*at)["$ref"].as_string();
        if (!path.starts_with("#/")) break;
        path.remove_prefix(2);
        at = &root;
        while (!path.empty()) {
            const std::string_view key = path.substr(0, path.find('/'));
            at = &(*at)[key];
            path.remove_prefix(std::min(path.size(), key.size() + 1));
        }
    }
    return *at;
}

uint8_t argument_kind(const Json& value) {
    switch (value.kind()) {
        case Json::Kind::null: return kNull;
        case Json::Kind::boolean: return kBoolean;
        case Json::Kind::string: return kString;
        case Json::Kind::array:
        case Json::Kind::object: return kList;
        default: return kNumber;
    }
}

namespace {

uint8_t kind_of_type(std::string_view type) {
    if (type == "string") return kString;
    if (type == "null") return kNull;
    if (type == "boolean") return kBoolean;
    return type == "number" || type == "integer" ? kNumber : kList;
}

uint8_t kinds_of(const Json& unresolved, const Json& root, int depth) {
    const Json& schema = resolved_schema(unresolved, root);
    const Json& type = schema["type"];
    if (type.is_string()) return kind_of_type(type.as_string());
    uint8_t kinds = 0;
    for (const Json& one : type.items()) kinds |= kind_of_type(one.as_string());
    if (kinds != 0) return kinds;
    for (const Json& value : schema["enum"].items()) kinds |= argument_kind(value);
    if (const Json* value = schema.find("const")) kinds |= argument_kind(*value);
    for (const char* key : {"anyOf", "oneOf", "allOf"})
        for (const Json& one : schema[key].items())
            if (depth < 8) kinds |= kinds_of(one, root, depth + 1);
    return kinds ? kinds : uint8_t{kAll};
}

}  // namespace

uint8_t argument_kinds_of(const Json& schema, const Json& root) {
    return kinds_of(schema, root, 0);
}

// ---- Found for one model ----------------------------------------------------------------------

namespace {

Json call_message(bool text_arguments, bool two_calls) {
    Json function = Json::object().set("name", kProbeTool);
    function.set("arguments",
                 text_arguments ? Json(kProbeArguments) : *Json::parse(kProbeArguments));
    Json call = Json::object().set("id", "callprobe").set("type", "function");
    call.set("function", std::move(function));
    Json calls = Json::array().push(call);
    if (two_calls) calls.push(std::move(call));
    return Json::object()
        .set("role", "assistant")
        .set("content", "")
        .set("reasoning_content", "probe-thought")
        .set("tool_calls", std::move(calls));
}

/// The template, and what it makes of a call: some build their marks from pieces.
std::string source_and_probes(const ChatTemplate& chat_template) {
    std::string all = chat_template.source();
    for (int way = 0; way < 4; ++way) {
        TemplateInput input;
        Json messages = Json::array();
        messages.push(Json::object().set("role", "user").set("content", "probe-of-user"));
        messages.push(call_message(way & 1, way & 2));
        input.request.set("messages", std::move(messages)).set("tools", probe_tools());
        input.own.set("add_generation_prompt", true).set("bos_token", "").set("eos_token", "");
        const auto made = chat_template.render(input);
        if (made && made->text.find(kProbeTool) != std::string::npos) return all + made->text;
    }
    return all;
}

template <class Marks, class Has>
bool has_all(const Marks& marks, Has has) {
    return !marks[0].empty() && std::all_of(marks.begin(), marks.end(), [&](std::string_view mark) {
        return mark.empty() || has(mark);
    });
}

const CallSyntax* named_syntax(std::string_view name) {
    for (const CallSyntax& row : call_syntaxes())
        if (row.name == name) return &row;
    return nullptr;
}

const CallSyntax& syntax_of(std::string_view texts, const SpecialTokens& special) {
    const auto stands = [&](std::string_view mark) {
        return texts.find(mark) != std::string_view::npos;
    };
    const auto is_token = [&](std::string_view mark) { return special.has(mark); };
    for (const CallSyntax& row : call_syntaxes())
        if (has_all(row.found_by, stands)) return row;
    for (const CallSyntax& row : call_syntaxes())
        if (has_all(row.found_tokens, is_token)) return row;
    return *named_syntax("hermes");  // what a prompt without another says
}

/// Marks the special tokens in the texts of rows.
class TokenMarker {
public:
    TokenMarker(const SpecialTokens& special, std::vector<std::pair<std::string, Token>>* found)
        : special_(special), found_(*found) {}

    std::string operator()(std::string_view text) {
        std::string out;
        while (!text.empty()) {
            const size_t size = token_size(text);
            if (size == 0) {
                out += text.front();
                text.remove_prefix(1);
                continue;
            }
            const std::string token(text.substr(0, size));
            out += kTokenBegin + token + kTokenEnd;
            const std::pair<std::string, Token> entry(token, special_.token(token));
            if (std::find(found_.begin(), found_.end(), entry) == found_.end())
                found_.push_back(entry);
            text.remove_prefix(size);
        }
        return out;
    }

private:
    /// Of the longest token that the text begins with, or 0.
    size_t token_size(std::string_view text) const {
        if (text.front() != '<' && text.front() != '[') return 0;
        for (size_t size = text.size(); size > 1; --size)
            if ((text[size - 1] == '>' || text[size - 1] == ']') &&
                special_.has(text.substr(0, size)))
                return size;
        return 0;
    }

    const SpecialTokens& special_;
    std::vector<std::pair<std::string, Token>>& found_;
};

Error refuse_tool_format(std::string_view name) {
    std::string message = "tool_format: '" + printable(name, 40) + "' is none of";
    for (const CallSyntax& row : call_syntaxes()) message.append(" ").append(row.name);
    return make_error(ErrorKind::invalid_request, std::move(message), {}, "tool_format");
}

}  // namespace

SpecialTokens::SpecialTokens(const Tokenizer& tokenizer) {
    for (size_t i = 0; i < tokenizer.size(); ++i) {
        const auto token = static_cast<Token>(i);
        const TokenKind kind = tokenizer.kind(token);
        if (kind == TokenKind::control || kind == TokenKind::user_defined)
            tokens_.emplace_back(tokenizer.piece(token), token);
    }
    std::stable_sort(tokens_.begin(), tokens_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
}

void SpecialTokens::add(std::string spelling, Token token) {
    std::pair<std::string, Token> entry(std::move(spelling), token);
    tokens_.insert(std::upper_bound(tokens_.begin(), tokens_.end(), entry), std::move(entry));
}

Token SpecialTokens::token(std::string_view spelling) const {
    const auto found = std::lower_bound(
        tokens_.begin(), tokens_.end(), spelling,
        [](const auto& entry, std::string_view s) { return entry.first < s; });
    return found != tokens_.end() && found->first == spelling ? found->second : Token{-1};
}

bool AnswerSyntax::Calls::begin_with_mark() const {
    const std::string begin = open + before;
    return std::any_of(marks.begin(), marks.end(),
                       [&](const std::string& mark) { return begin.starts_with(mark); });
}

std::string without_token_bytes(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (char c : text)
        if (c != kTokenBegin && c != kTokenEnd) out += c;
    return out;
}

namespace {

AnswerSyntax::Calls calls_of_row(const CallSyntax& row, TokenMarker& marked) {
    AnswerSyntax::Calls calls;
    calls.name = row.name;
    calls.style = row.style;
    for (std::string_view mark : row.marks)
        if (!mark.empty()) calls.marks.push_back(marked(mark));
    const std::pair<std::string*, std::string_view> parts[] = {
        {&calls.open, row.open},   {&calls.before, row.before},
        {&calls.after, row.after}, {&calls.after_name, row.after_name},
        {&calls.key, row.key},     {&calls.between, row.between},
        {&calls.value, row.value}, {&calls.value_end, row.value_end},
        {&calls.close, row.close}};
    for (const auto& [to, from] : parts) *to = marked(from);
    return calls;
}

}  // namespace

Result<AnswerSyntax> find_answer_syntax(const ChatTemplate& chat_template,
                                        const SpecialTokens& special,
                                        std::string_view tool_format) {
    const std::string texts = source_and_probes(chat_template);
    const CallSyntax* row = tool_format.empty() ? &syntax_of(texts, special)
                                                : named_syntax(tool_format);
    if (!row) return refuse_tool_format(tool_format);
    AnswerSyntax made;
    TokenMarker marked(special, &made.tokens);
    made.calls = calls_of_row(*row, marked);
    const auto stands = [&](std::string_view mark) {
        return texts.find(mark) != std::string::npos;
    };
    for (const ThoughtSyntax& thought : thought_syntaxes()) {
        const bool own = thought.name == "harmony";  // of channels, and of nothing else
        if (made.channels() ? !own : own || !has_all(thought.found_by, stands)) continue;
        made.thought.open = marked(thought.open);
        made.thought.close = marked(thought.close);
        for (std::string_view mark : thought.ignored)
            if (!mark.empty()) made.thought.ignored.push_back(marked(mark));
        break;
    }
    return made;
}

// ---- Calls written into a text ----------------------------------------------------------------

namespace {

/// A text of a row for this call.
std::string written(std::string_view text, const WrittenCall& call, bool is_string = false) {
    std::string out;
    for (char c : text) {
        if (c == kCallNumber) out += std::to_string(call.number);
        else if (c == kCallId) out += derive_id({}, call.id).substr(0, 9);
        else if (c == kIsString) out += is_string ? "true" : "false";
        else out += c;
    }
    return out;
}

std::string python_value(const Json& value) {
    if (value.is_null()) return "None";
    if (value.is_bool()) return value.as_bool() ? "True" : "False";
    return value.write(json_python);
}

std::string gemma_value(const Json& value, std::string_view quote) {
    if (value.is_string()) return join({quote, value.as_string(), quote});
    std::string out;
    const auto add = [&](std::string_view key, const Json& one) {
        out.append(out.empty() ? "" : ",").append(key) += gemma_value(one, quote);
    };
    if (value.is_array()) {
        for (const Json& one : value.items()) add("", one);
        return "[" + out + "]";
    }
    if (!value.is_object()) return value.write();
    for (const JsonMember& one : value.members()) add(one.key + ":", one.value);
    return "{" + out + "}";
}

std::string written_arguments(const WrittenCall& call, const AnswerSyntax::Calls& row) {
    if (row.style == CallStyle::gemma) return gemma_value(call.arguments, row.key);
    std::string out;
    for (const JsonMember& one : call.arguments.members()) {
        const bool is_string = one.value.is_string();
        if (row.style == CallStyle::tagged) {
            out += join({row.key, one.key, written(row.value, call, is_string)});
            out += is_string ? std::string(one.value.as_string()) : one.value.write(json_python);
            out += row.value_end;
        } else if (row.style == CallStyle::python) {
            out += join({out.empty() ? "" : ", ", one.key, "=", python_value(one.value)});
        } else {
            return call.arguments.write(json_python);
        }
    }
    const bool object = row.style != CallStyle::tagged && row.style != CallStyle::python;
    return object ? "{}" : out;
}

const AnswerSyntax::Calls& hermes_calls() {
    static const AnswerSyntax::Calls calls = [] {
        const SpecialTokens none;
        std::vector<std::pair<std::string, Token>> found;
        TokenMarker marked(none, &found);
        return calls_of_row(*named_syntax("hermes"), marked);
    }();
    return calls;
}

}  // namespace

std::string written_calls(std::span<const WrittenCall> calls, const AnswerSyntax* syntax) {
    const auto& row = syntax && !syntax->channels() ? syntax->calls : hermes_calls();
    std::string out = row.open;
    for (const WrittenCall& call : calls) {
        if (&call != calls.data()) out += row.between;
        out += written(row.before, call);
        out += call.name;
        out += written(row.after_name, call) + written_arguments(call, row) + row.after;
    }
    return out + row.close;
}

// ---- Where a prompt ends ----------------------------------------------------------------------

namespace {

std::string_view without_spaces(std::string_view text) {
    const char* spaces = " \t\r\n";
    const size_t first = text.find_first_not_of(spaces);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

bool ends_with_mark(std::string_view text, std::string_view mark) {
    const std::string plain = without_token_bytes(without_spaces(mark));
    return !plain.empty() && text.ends_with(plain);
}

}  // namespace

ThoughtState thought_state(const MarkedText& prompt, const AnswerSyntax& syntax) {
    std::string_view tail = prompt.text;
    if (!prompt.from_request.empty()) tail.remove_prefix(prompt.from_request.back().end);
    tail = without_spaces(tail);
    const AnswerSyntax::Thought& thought = syntax.thought;
    if (ends_with_mark(tail, thought.open)) return ThoughtState::open;
    if (ends_with_mark(tail, thought.close)) return ThoughtState::closed;
    for (const std::string& mark : thought.ignored)
        if (ends_with_mark(tail, mark)) return ThoughtState::closed;
    return ThoughtState::free;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>template: what models of each family write is taken apart into items, however it is cut.
#include <doctest/doctest.h>

#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "output_helpers.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

const Json& tools() {
    static const Json made = *Json::parse(R"([
        {"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"},
            "unit": {"type": ["string", "null"]}, "more": {"$ref": "#/$defs/more"}},
            "$defs": {"more": {"type": "object"}}}},
        {"name": "now", "parameters": null},
        {"name": "run", "custom": true}])");
    return made;
}

struct Written {
    std::string text;
    std::string syntax;      // of calls
    std::string templ = "";  // what stands in the template
    std::vector<std::string> tokens = {};
    ThoughtState thought = ThoughtState::free;
    bool constrained = true;
    bool whole = true;
    bool with_tools = true;
    std::vector<std::string> ends = {};
};

AnswerSyntax syntax_of(const Written& written) {
    TokenSet tokens;
    tokens.spellings = written.tokens;
    const auto parsed = ChatTemplate::parse("{{ '" + written.templ + "' }}");
    REQUIRE(parsed);
    const auto syntax = find_answer_syntax(*parsed, tokens.special(), written.syntax);
    REQUIRE(syntax);
    return *syntax;
}

std::string read(const Written& written, size_t step) {
    TokenSet tokens;
    tokens.spellings = written.tokens;
    tokens.ends = written.ends;
    AnswerParserOptions options;
    if (written.with_tools) options.tools = tools_of(tools());
    options.constrained = written.constrained;
    options.thought = written.thought;
    Items items;
    const auto parser = answer_parser(std::make_shared<AnswerSyntax>(syntax_of(written)), options);
    feed(*parser, written.text, tokens, step, items);
    parser->finish(written.whole, items);
    return items.shown();
}

/// The same, however the text is cut and whether or not arguments are held back.
std::string read(Written written) {
    const std::string whole = read(written, written.text.size() + 1);
    for (bool constrained : {written.constrained, false})
        for (size_t step : {size_t{1}, size_t{2}, size_t{3}, size_t{7}}) {
            written.constrained = constrained;
            CHECK(read(written, step) == whole);
        }
    return whole;
}

const char* kTwo = R"(weather({"city":"K\"\n","days":3}) now({}))";

}  // namespace

TEST_CASE("each family's calls") {
    const struct {
        const char* syntax;
        const char* text;
    } cases[] = {
        {"hermes", R"(<tool_call>
{"name": "weather", "arguments": {"city": "K\"\n", "days": 3}}
</tool_call>
<tool_call>
{"name": "now", "arguments": {}}
</tool_call>)"},
        {"qwen3-coder",
         "<tool_call>\n<function=weather>\n<parameter=city>\nK\"\n\n</parameter>\n"
         "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>"
         "\n<function=now>\n</function>\n</tool_call>"},
        {"seed",
         "<seed:tool_call>\n<function=weather>\n<parameter=city>K\"\n</parameter>\n"
         "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>\n<seed:tool_call>\n"
         "<function=now>\n</function>\n</seed:tool_call>"},
        {"minicpm5",
         "<function name=\"weather\"><param name=\"city\"><![CDATA[K\"\n]]></param>"
         "<param name=\"days\">3</param></function>\n<function name=\"now\"></function>"},
        {"glm",
         "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>K\"\n</arg_value>\n"
         "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n"
         "</tool_call>"},
        {"glm47",
         "<tool_call>weather<arg_key>city</arg_key><arg_value>K\"\n</arg_value>"
         "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><tool_call>now"
         "</tool_call>"},
        {"hy3",
         "<tool_calls:opensource>\n<tool_call:opensource>weather<tool_sep:opensource>\n"
         "<arg_key:opensource>city</arg_key:opensource>\n<arg_value:opensource>K\"\n"
         "</arg_value:opensource>\n<arg_key:opensource>days</arg_key:opensource>\n"
         "<arg_value:opensource>3</arg_value:opensource>\n</tool_call:opensource>\n"
         "<tool_call:opensource>now<tool_sep:opensource>\n</tool_call:opensource>\n"
         "</tool_calls:opensource>"},
        {"minimax-m2",
         "<minimax:tool_call>\n<invoke name=\"weather\">\n<parameter name=\"city\">"
         "K\"\n</parameter>\n<parameter name=\"days\">3</parameter>\n</invoke>\n"
         "<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>"},
        {"kimi",
         "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
         "<|tool_call_argument_begin|>{\"city\": \"K\\\"\\n\", \"days\": 3}"
         "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>"
         "{}<|tool_call_end|><|tool_calls_section_end|>"},
        {"solar",
         "<|tool_calls|><|tool_call:begin|>a1<|tool_call:name|>weather<|tool_call:args|>"
         "{\"city\": \"K\\\"\\n\", \"days\": 3}<|tool_call:end|><|tool_call:begin|>a2"
         "<|tool_call:name|>now<|tool_call:args|>{}<|tool_call:end|>"},
        {"mistral",
         "[TOOL_CALLS]weather[ARGS]{\"city\": \"K\\\"\\n\", \"days\": 3}[TOOL_CALLS]now"
         "[ARGS]{}"},
        {"mistral-small",
         "[TOOL_CALLS]weather[CALL_ID]x1[ARGS]{\"city\": \"K\\\"\\n\", \"days\": 3"
         "}[TOOL_CALLS]now[CALL_ID]x2[ARGS]{}"},
        {"mistral-old",
         "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n"
         "\", \"days\": 3}, \"id\": \"a\"}, {\"arguments\": {}, \"name\": \"now\"}]"},
        {"command-r7b",
         "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"weather"
         "\", \"parameters\": {\"city\": \"K\\\"\\n\", \"days\": 3}},\n    {\"tool_"
         "call_id\": \"1\", \"tool_name\": \"now\", \"parameters\": {}}\n]"
         "<|END_ACTION|>"},
        {"command-r",
         "Action: ```json\n[\n    {\n        \"tool_name\": \"weather\",\n        "
         "\"parameters\": {\"city\": \"K\\\"\\n\", \"days\": 3}\n    },\n    {\n"
         "        \"tool_name\": \"now\",\n        \"parameters\": {}\n    }\n]```"},
        {"lfm2", "<|tool_call_start|>[weather(city='K\"\\n', days=3), now()]<|tool_call_end|>"},
        {"gemma4",
         "<|tool_call>call:weather{city:<|\"|>K\"\n<|\"|>,days:3}<tool_call|>"
         "<|tool_call>call:now{}<tool_call|>"},
        {"functiongemma",
         "<start_function_call>call:weather{city:<escape>K\"\n<escape>,days:3}"
         "<end_function_call><start_function_call>call:now{}<end_function_call>"},
        {"phi4-mini",
         "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n\""
         ", \"days\": 3}}, {\"name\": \"now\", \"arguments\": {}}]<|/tool_call|>"},
        {"granite3",
         "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n\","
         " \"days\": 3}}, {\"name\": \"now\", \"arguments\": {}}]"},
        {"apertus",
         "<|tools_prefix|>[{\"weather\": {\"city\": \"K\\\"\\n\", \"days\": 3}}, "
         "{\"now\": {}}]<|tools_suffix|>"},
        {"nemotron",
         "<TOOLCALL>[{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n\", "
         "\"days\": 3}}, {\"name\": \"now\", \"arguments\": {}}]</TOOLCALL>"},
        {"tool_calls",
         "<tool_calls>[\n    {\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\""
         "\\n\", \"days\": 3}},\n    {\"name\": \"now\", \"arguments\": {}}\n]"
         "</tool_calls>"},
        {"minimax-m1",
         "<tool_calls>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n"
         "\", \"days\": 3}}\n{\"name\": \"now\", \"arguments\": {}}\n</tool_calls>"},
        {"functionary",
         "<function=weather>{\"city\": \"K\\\"\\n\", \"days\": 3}</function>"
         "<function=now>{}</function>"},
        {"gigachat",
         "<|function_call|>{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n"
         "\", \"days\": 3}}<|function_call|>{\"name\": \"now\", \"arguments\": {}}"},
        {"llama4",
         "<|python_start|>{\"name\": \"weather\", \"parameters\": {\"city\": \"K\\\"\\n\""
         ", \"days\": 3}}{\"name\": \"now\", \"parameters\": {}}<|python_end|>"},
        {"llama3",
         "{\"name\": \"weather\", \"parameters\": {\"city\": \"K\\\"\\n\", \"days\": 3}};"
         " {\"name\": \"now\", \"parameters\": {}}"},
        {"json",
         "```json\n[{\"name\": \"weather\", \"arguments\": {\"city\": \"K\\\"\\n\", "
         "\"days\": 3}}, {\"name\": \"now\", \"arguments\": {}}]\n```"},
    };
    for (const auto& one : cases) {
        CAPTURE(one.syntax);
        Written written{one.text, one.syntax};
        CHECK(read(written) == kTwo);
        written.text = "Let me see.\n\n" + written.text;
        const std::string_view name = one.syntax;
        if (name != "llama3" && name != "json")
            CHECK(read(written) == "say(Let me see.) " + std::string(kTwo));
    }
}

TEST_CASE("calls written into a text read back as they were") {
    const Json days = *Json::parse(R"({"city": "K\"\n", "days": 3})");
    const WrittenCall calls[] = {{"weather", "call_1", days, 0},
                                 {"now", "call_2", Json::object(), 1}};
    for (const CallSyntax& row : call_syntaxes()) {
        CAPTURE(row.name);
        if (row.style == CallStyle::channels) continue;
        Written written{"", std::string(row.name)};
        const AnswerSyntax syntax = syntax_of(written);
        written.text = written_calls(calls, &syntax);
        CAPTURE(written.text);
        CHECK(read(written) == kTwo);
    }
}

TEST_CASE("a call that is none is text") {
    CHECK(read({"<|tool_call_begin|>fun<|tool_call_begin|>",
                "kimi",
                "",
                {},
                ThoughtState::free,
                false}) == "say(<|tool_call_begin|>fun<|tool_call_begin|>)");
    const char* texts[] = {
        "<tool_call>\n{\"name\": \"nothing\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>",
        "<tool_call>{",
        "a < b",
        "<tool_call>{\"name\": \"weather\"",
        "<tool_call> {\"name\": \"weather\", \"arguments\": 3}</tool_call>",
        "{\"name\": \"weather\"}",
        "```json\n{\"a\": 1}\n```",
        "[{\"b\": 2}]",
        "[1]",
        "```",
        "`",
        "<tool_call>{\"name\": 3}",
        "  x",
        "{}",
        "",
    };
    for (const char* text : texts) {
        CAPTURE(text);
        const std::string want = *text ? "say(" + std::string(text) + ")" : "";
        CHECK(read({text, "hermes", "", {}, ThoughtState::free, false}) == want);
    }
}

TEST_CASE("thoughts") {
    const auto think = [](std::string text, ThoughtState thought = ThoughtState::free,
                          std::vector<std::string> tokens = {}) {
        return read({std::move(text), "hermes", "<think>", std::move(tokens), thought});
    };
    CHECK(think("<think>\nhm\n</think>\n\nHi\n") == "thought(hm) say(Hi\n)");
    CHECK(think("hm</think>Hi", ThoughtState::open) == "thought(hm) say(Hi)");
    CHECK(think("hm, <think> again</think>Hi", ThoughtState::open) ==
          "thought(hm, <think> again) say(Hi)");
    CHECK(think("hm", ThoughtState::open) == "thought(hm)");
    CHECK(think("<think>\n\n</think>\n\nHi") == "say(Hi)");
    CHECK(think("\n</think>\n\n", ThoughtState::open) == "");
    CHECK(think("Hi <think> there </think>", ThoughtState::closed) ==
          "say(Hi <think> there </think>)");
    CHECK(think("hm</thi", ThoughtState::open) == "thought(hm</thi)");
    CHECK(think("a <tool_call>b</think><tool_call>{\"name\": \"now\"}</tool_call>",
                ThoughtState::open) == "thought(a <tool_call>b) now({})");
    // Where a mark is a token, a text that looks like it is none.
    const std::vector<std::string> tokens = {"<think>", "</think>"};
    CHECK(think("<think>hm</think>Hi", ThoughtState::free, tokens) == "thought(hm) say(Hi)");
    Written forged{"<thi", "hermes", "<think>", tokens};
    const auto parser = answer_parser(std::make_shared<AnswerSyntax>(syntax_of(forged)), {});
    Items items;
    parser->text("<think>no</think> ", items);
    parser->mark({"<think>", true}, items);
    parser->text("a </think> b", items);
    CHECK(parser->thinking());
    parser->mark({"</think>", true}, items);
    CHECK_FALSE(parser->thinking());
    parser->text("Hi", items);
    parser->finish(true, items);
    CHECK(items.shown() == "say(<think>no</think>) thought(a </think> b) say(Hi)");
}

TEST_CASE("thoughts of other families") {
    const auto other = [](std::string text, const char* mark) {
        return read({std::move(text), "json", mark});
    };
    CHECK(other("[THINK]hm[/THINK]Hi", "[THINK] [/THINK]") == "thought(hm) say(Hi)");
    CHECK(other("<|channel>thought\nhm\n<channel|>Hi", "<|channel>thought") ==
          "thought(hm) say(Hi)");
    CHECK(other("<seed:think>hm</seed:think>Hi", "<seed:think>") == "thought(hm) say(Hi)");
    CHECK(other("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Hi<|END_RESPONSE|>",
                "<|START_THINKING|>") == "thought(hm) say(Hi)");
    CHECK(other("<think>hm</think><response>Hi</response>",
                "<think></think> <response></response>") == "thought(hm) say(Hi)");
    CHECK(other("Here are my reasoning steps:\nhm\n[BEGIN FINAL RESPONSE]\nHi",
                "[BEGIN FINAL RESPONSE]") == "thought(hm) say(Hi)");
    Written harmony{
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
        "<|message|>Hi<|return|>lost",
        "harmony",
        "<|channel|>analysis",
        {"<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>",
         "<|constrain|>"}};
    harmony.ends = {"<|end|>", "<|return|>", "<|call|>"};
    Written silent = harmony;  // its template shows no thought
    silent.templ = "<|channel|>commentary";
    CHECK(syntax_of(silent).has_thought());
    CHECK(read(harmony) == "thought(hm) say(Hi)");
    harmony.text =
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        "{\"city\": \"K\"}<|call|>";
    CHECK(read(harmony) == "weather({\"city\":\"K\"})");
    harmony.text = " to=functions.now<|channel|>commentary json<|message|>{}<|call|>";
    CHECK(read(harmony) == "now({})");
    harmony.text =
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant to="
        "functions.now<|channel|>commentary json<|message|>{}<|call|>";
    CHECK(read(harmony) == "say(Let me see.) now({})");
    harmony.text = "<|channel|>commentary to=functions.nothing<|message|>{}<|call|>";
    CHECK(read(harmony) == "say({})");
    harmony.text = "No channel at all.";
    CHECK(read(harmony) == "say(No channel at all.)");
}

TEST_CASE("where a prompt leaves a thought") {
    const AnswerSyntax syntax = syntax_of({"", "hermes", "<think>"});
    const auto state = [&](std::string text, size_t from_request) {
        MarkedText prompt{std::move(text), {}};
        if (from_request) prompt.from_request.push_back({0, from_request});
        return thought_state(prompt, syntax);
    };
    CHECK(state("Q<end><think>\n", 1) == ThoughtState::open);
    CHECK(state("Q<end><think>\n\n</think>\n\n", 1) == ThoughtState::closed);
    CHECK(state("Q<end>", 1) == ThoughtState::free);
    CHECK(state("Q<think>\n", 9) == ThoughtState::free);  // a user's
    CHECK(state("</think>", 8) == ThoughtState::free);
}

TEST_CASE("a call that is cut has no end") {
    Written written{"a <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"K", "hermes"};
    written.whole = false;
    CHECK(read(written, 1) == "say(a) weather({\"city\":\"K");
    written.constrained = false;
    CHECK(read(written, 1) == "say(a)");
    written.whole = true;
    CHECK(read(written, 1) == "say(" + written.text + ")");
    written.text = "<tool_call>{\"na";
    written.whole = false;
    CHECK(read(written, 1) == "");
    // Cut in the mark behind a call, or in that of the next one.
    for (const bool constrained : {true, false})
        for (const auto& [family, text, after] :
             {std::array{"hermes",
                         "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"K\"}}",
                         "\n</tool_call>\n<tool_call>"},
              std::array{"qwen3-coder",
                         "<tool_call>\n<function=weather>\n<parameter=city>\nK\n</parameter>\n"
                         "</function>",
                         "\n</tool_call>\n<tool_call>"},
              std::array{"lfm2", "<|tool_call_start|>[weather(city=\"K\")", "]<|tool_call_end|>"}})
            for (size_t size = 0; size <= std::string_view(after).size(); ++size) {
                Written cut{text + std::string(after, size), family};
                cut.whole = false;
                cut.constrained = constrained;
                CAPTURE(cut.text);
                for (const size_t step : {size_t{1}, size_t{100}})
                    CHECK(read(cut, step) == "weather({\"city\":\"K\"})");
            }
}

TEST_CASE("arguments become JSON by their schema") {
    const auto one = [](std::string text) {
        return read({"<tool_call><function=weather><parameter=" + text +
                         "</parameter></function></tool_call>",
                     "qwen3-coder"});
    };
    CHECK(one("city>5") == R"(weather({"city":"5"}))");
    CHECK(one("city>\nnull\n") == R"(weather({"city":"null"}))");
    CHECK(one("unit>\nnull\n") == R"(weather({"unit":null}))");
    CHECK(one("unit>5") == R"(weather({"unit":"5"}))");
    CHECK(one("days>5") == R"(weather({"days":5}))");
    CHECK(one("days>five") == R"(weather({"days":"five"}))");
    CHECK(one("more>{'a': True, 'b': [None, 'x</parameter>']}") ==
          R"(weather({"more":{"a":true,"b":[null,"x</parameter>"]}}))");
    CHECK(one("more>[1") == R"(weather({"more":"[1"}))");
    CHECK(one("other>1.5") == R"(weather({"other":1.5}))");
    CHECK(read({"{\"name\": \"run\", \"arguments\": {\"input\": \"a\\n\\\"b\\\"\"}}", "json"}) ==
          "run(a\n\"b\")");
    CHECK(read({"<|tool_call_start|>[weather(city=\"a\\x41\\u00e9\\d\", days=(1, 2,))]"
                "<|tool_call_end|>",
                "lfm2"}) == "weather({\"city\":\"aA\xc3\xa9\\\\d\",\"days\":[1,2]})");
    CHECK(read({"{\"name\": \"now\", \"arguments\": {\"a\": \"\\ud83d\\ude00\\ud800\"}}",
                "json"}) == "now({\"a\":\"\xf0\x9f\x98\x80\xef\xbf\xbd\"})");
}

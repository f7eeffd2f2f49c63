// >>grammar: whatever an answer's grammar allows reads back as an answer that was asked for.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "grammar/answer.hpp"
#include "grammar/schema_document.hpp"
#include "output_helpers.hpp"
#include "sample.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

std::vector<Tool> tools() {
    const Json list = *Json::parse(R"([
        {"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer", "minimum": 1},
            "unit": {"enum": ["C", "F"]}}, "required": ["city", "days"],
            "additionalProperties": false}},
        {"name": "book", "parameters": {"type": "object", "properties": {
            "note": {"type": ["string", "null"]}, "now": {"type": "boolean"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,3}$"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
            "who": {"$ref": "#/$defs/who"}, "any": {"type": ["string", "number"]}},
            "required": ["note", "who"], "additionalProperties": false,
            "$defs": {"who": {"type": "object", "properties": {"name": {"type": "string",
                "maxLength": 5}, "age": {"type": "integer"}}, "required": ["name"],
                "additionalProperties": false}}}},
        {"name": "now", "parameters": {"type": "object", "properties": {},
            "additionalProperties": false}},
        {"name": "run", "custom": true}])");
    return tools_of(list);
}

/// The words of a row as tokens, and every character that the walks may write.
struct Words {
    std::vector<std::string> pieces;
    std::vector<std::string> marks;  // by token; empty: none
    SpecialTokens special;

    Words(const CallSyntax& row, const ThoughtSyntax& thought, bool with_special) {
        add("", "<end>");
        if (with_special) {
            for (std::string_view token : row.found_tokens) add_mark(token);
            for (std::string_view token : row.marks) add_mark(token);
            for (std::string_view token :
                 {"<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>",
                  "<|call|>", "<|constrain|>", "<|\"|>"})
                add_mark(token);
        }
        for (char c = ' '; c < '\x7f'; ++c) add(std::string(1, c), "");
        for (const char* text : {"\n", "\xc3", "\xa9", "\xef", "\xbd", "\x9c", "\xe2", "\x96",
                                 "\x81", "\xf0\x9f\x98\x80", "\"}", "null"})
            add(text, "");
        for (std::string_view text :
             {row.before, row.after_name, row.after, row.close, row.value_end, row.value, row.key,
              thought.close, thought.open})
            if (!text.empty()) add(std::string(text), "");
    }
    void add(std::string piece, std::string mark) {
        pieces.push_back(std::move(piece));
        marks.push_back(std::move(mark));
    }
    void add_mark(std::string_view mark) {
        if (mark.empty() || special.has(mark)) return;
        special.add(std::string(mark), static_cast<Token>(pieces.size()));
        add("", std::string(mark));
    }
};

struct Walked {
    Items items;
    std::string text;
    bool ended = false;
};

Token draw(MaskMaker& masks, const GrammarState& state, const Words& words, std::mt19937& random) {
    const auto mask = masks.fill(state);
    std::vector<Token> common, rare;  // what closes something comes soon
    for (size_t i = 0; i < words.pieces.size(); ++i)
        if (mask[i / 64] >> (i % 64) & 1)
            (words.pieces[i].size() == 1 ? common : rare).push_back(static_cast<Token>(i));
    REQUIRE(common.size() + rare.size() > 0);
    const bool take_rare = common.empty() || (!rare.empty() && random() % 4 == 0);
    const auto& from = take_rare ? rare : common;
    return from[random() % from.size()];
}

Walked walk(const GrammarPtr& grammar, const Words& words, OutputParser& parser,
            std::mt19937& random) {
    MaskMaker masks(TokenTrie::build(std::span<const std::string>(words.pieces), {0}));
    GrammarState state(grammar);
    Walked made;
    std::string held;
    for (int step = 0; step < 400 && !made.ended; ++step) {
        const Token token = draw(masks, state, words, random);
        made.ended = token == 0;
        if (made.ended) break;
        const std::string& piece = words.pieces[static_cast<size_t>(token)];
        const std::string& mark = words.marks[static_cast<size_t>(token)];
        REQUIRE(state.accept_token(token, piece));
        made.text += mark + piece;
        if (!mark.empty()) {
            parser.text(utf8_repair(held), made.items);
            held.clear();
            made.ended = parser.mark({mark, false, mark == "<|call|>"}, made.items);
            continue;
        }
        held += piece;
        const size_t whole = held.size() - utf8_incomplete_suffix(held);
        parser.text(utf8_repair(std::string_view(held).substr(0, whole)), made.items);
        held.erase(0, whole);
    }
    parser.finish(made.ended, made.items);
    return made;
}

bool accepts(const GrammarPtr& grammar, std::string_view text) {
    GrammarState state(grammar);
    return state.advance(text) && state.may_end();
}

std::shared_ptr<AnswerSyntax> syntax_of_row(const CallSyntax& row, const SpecialTokens& special) {
    const bool harmony = row.style == CallStyle::channels;
    const auto chat = ChatTemplate::parse(harmony ? "{{ '<|channel|>analysis' }}"
                                                  : "{{ '<think>' }}");
    return std::make_shared<AnswerSyntax>(*find_answer_syntax(*chat, special, row.name));
}

bool fits(const Json& schema, const Json& value) {
    Budget budget;
    return SchemaDocument(schema, budget).is_valid(schema, value);
}

}  // namespace

TEST_CASE("what a family's grammar allows reads back as what was asked for") {
    std::mt19937 random(7);
    const auto all = tools();
    Format format;
    format.schema = *Json::parse(
        R"({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
            "additionalProperties": false})");
    size_t walks = 0, ended = 0, calls = 0, thoughts = 0;
    for (const CallSyntax& row : call_syntaxes())
        for (bool special : {false, true}) {
            const bool harmony = row.style == CallStyle::channels;
            if (harmony && !special) continue;
            const ThoughtSyntax* thought = nullptr;
            for (const ThoughtSyntax& one : thought_syntaxes())
                if (one.name == (harmony ? "harmony" : "think")) thought = &one;
            const Words words(row, *thought, special);
            const auto syntax = syntax_of_row(row, words.special);
            for (int way = 0; way < 48; ++way) {
                if (!in_sample()) continue;
                AnswerShape shape;
                shape.syntax = syntax.get();
                const int choice = way / 3 % 4;
                const bool formatted = way / 12 % 2;
                shape.thought = way % 3 == 0               ? ThoughtState::open
                                : way % 3 == 1 && !harmony ? ThoughtState::closed
                                                           : ThoughtState::free;
                shape.tools = all;
                shape.choice.mode = choice == 0   ? ToolChoice::Mode::none
                                    : choice == 1 ? ToolChoice::Mode::automatic
                                                  : ToolChoice::Mode::required;
                if (choice == 3) shape.choice.names = {"book"};
                if (formatted) shape.format = &format;
                shape.parallel = way / 24;
                const auto grammar = compile_answer(shape);
                CAPTURE(row.name);
                CAPTURE(special);
                CAPTURE(way);
                if (!grammar) FAIL(grammar.error().message);
                if (!*grammar) continue;
                AnswerParserOptions options;
                if (choice != 0) options.tools = all;
                options.thought = shape.thought;
                options.bare_calls = !formatted || !syntax->calls.begin_with_mark();
                const auto parser = answer_parser(syntax, options);
                const Walked made = walk(*grammar, words, *parser, random);
                CAPTURE(made.text);
                CAPTURE(made.items.shown());
                size_t own = 0, messages = 0;
                for (const Items::Item& item : made.items.all) {
                    thoughts += item.kind == Item::Kind::reasoning;
                    messages += item.kind == Item::Kind::message;
                    const bool custom = item.kind == Item::Kind::custom_tool_call;
                    if ((!custom && item.kind != Item::Kind::function_call) || !item.ended)
                        continue;
                    ++own;
                    CHECK((choice != 3 || item.name == "book"));
                    if (custom) continue;
                    const auto value = Json::parse(item.text);
                    REQUIRE(value);
                    for (const Tool& tool : all)
                        if (tool.name == item.name) CHECK(fits(tool.parameters, *value));
                }
                ++walks;
                ended += made.ended;
                calls += own;
                if (choice == 0) CHECK(own == 0);
                if (!shape.parallel) CHECK(own <= 1);
                if (!made.ended) continue;
                if (choice >= 2) CHECK((own > 0 && messages == 0));
                if (!formatted || own > 0) continue;
                REQUIRE(messages == 1);
                const auto value = Json::parse(made.items.all.back().text);
                REQUIRE(value);
                CHECK(fits(format.schema, *value));
            }
        }
    MESSAGE(walks << " walks, " << ended << " ended, " << calls << " calls, " << thoughts
                  << " thoughts");
    CHECK(ended > walks / 3);
}

TEST_CASE("the text of a custom tool fits its grammar in each family's syntax") {
    std::mt19937 random(11);
    std::vector<Tool> all(2);
    all[0].name = "calc";
    all[0].format.gbnf =
        "root ::= \"\\\"\" term ([-+*] term){0,3} \"\\n\\\\\"\nterm ::= [a-c\\\"] | "
        "\"(\" root \")\"";
    all[1].name = "trade";
    all[1].format.regex = "(buy|\"sell\")\\n[a-z\\\\]{1,4}";
    for (Tool& tool : all) tool.custom = true;
    const GrammarPtr allowed[] = {*compile_gbnf(all[0].format.gbnf),
                                  *compile_regex(all[1].format.regex)};
    CHECK(accepts(allowed[0], "\"a+b\n\\"));
    size_t fine[2] = {0, 0}, most = 0;
    for (const CallSyntax& row : call_syntaxes())
        for (int way = 0; way < 16; ++way) {
            const bool special = way % 2 || row.style == CallStyle::channels;
            const ThoughtSyntax* thought = &thought_syntaxes().front();
            const Words words(row, *thought, special);
            const auto syntax = syntax_of_row(row, words.special);
            AnswerShape shape;
            shape.syntax = syntax.get();
            shape.tools = all;
            shape.may_think = false;
            shape.choice.mode = way / 8 ? ToolChoice::Mode::automatic : ToolChoice::Mode::required;
            shape.choice.names = {all[static_cast<size_t>(way / 2 % 2)].name};
            if (way % 4 < 2) shape.max_calls = 2;
            const auto grammar = compile_answer(shape);
            CAPTURE(row.name);
            CAPTURE(way);
            if (!grammar) FAIL(grammar.error().message);
            AnswerParserOptions options;
            options.tools = all;
            const auto parser = answer_parser(syntax, options);
            const Walked made = walk(*grammar, words, *parser, random);
            CAPTURE(made.text);
            size_t calls = 0;
            for (const Items::Item& item : made.items.all) {
                calls += item.kind == Item::Kind::custom_tool_call;
                if (item.kind != Item::Kind::custom_tool_call || !item.ended) continue;
                CAPTURE(item.text);
                REQUIRE(item.name == shape.choice.names[0]);
                const size_t which = item.name == "calc" ? 0 : 1;
                CHECK(accepts(allowed[which], item.text));
                ++fine[which];
            }
            if (shape.max_calls) CHECK(calls <= 2);
            most = std::max(most, calls);
        }
    MESSAGE(fine[0] << " by a grammar, " << fine[1] << " by an expression");
    CHECK(most > 2);
    CHECK(fine[0] > call_syntaxes().size());
    CHECK(fine[1] > call_syntaxes().size());
}

TEST_CASE("arguments are an object, and refusals name their place in the request") {
    const auto* row = &call_syntaxes().back();
    const Words words(*row, thought_syntaxes().front(), true);
    const auto compiled = [&](std::string_view name, Tool tool) {
        const auto& rows = call_syntaxes();
        row = &*std::find_if(rows.begin(), rows.end(),
                             [&](const CallSyntax& one) { return one.name == name; });
        const auto syntax = syntax_of_row(*row, words.special);
        tool.name = "f";
        const std::vector<Tool> tools = {{.name = "other"}, tool};
        AnswerShape shape;
        shape.syntax = syntax.get();
        shape.tools = tools;
        shape.may_think = false;
        shape.choice = {ToolChoice::Mode::required, {"f"}};
        return compile_answer(shape);
    };
    const auto takes = [&](const char* schema, bool strict, const char* arguments) {
        const auto grammar = compiled("json",
                                      {.parameters = *Json::parse(schema), .strict = strict});
        REQUIRE(grammar);
        return accepts(*grammar, join({"{\"name\": \"f\", \"arguments\": ", arguments, "}"}));
    };
    for (const bool strict : {true, false}) {
        for (const char* schema : {"{}", R"({"anyOf":[{"type":"string"},{"type":"object"}]})",
                                   R"({"type":["object","array"]})"}) {
            CHECK(takes(schema, strict, "{}"));
            for (const char* other : {"3", "[]", "\"x\"", "null"})
                CHECK_FALSE(takes(schema, strict, other));
        }
        const char* node = R"({"$ref":"#/$defs/n","$defs":{"n":{"type":"object","properties":{
            "next":{"$ref":"#/$defs/n"}},"additionalProperties":false}}})";
        CHECK(takes(node, strict, R"({"next": {"next": {}}})"));
        CHECK_FALSE(takes(node, strict, R"({"next": {"other": {}}})"));
    }
    CHECK(takes(R"({"type":"array"})", false, R"({"a": 1})"));
    CHECK_FALSE(takes(R"({"type":"array"})", false, "[]"));

    // Not strict: what cannot be held is left out, in whatever family.
    const char* const loose[] = {
        R"({"type":"object","properties":{"a":{"type":"strin"}}})",
        R"({"type":"object","properties":{"a b":{"enum":[]}},"required":["a b"]})",
        R"({"type":"object","unevaluatedProperties":false,"$ref":"other.json"})"};
    for (const char* family : {"json", "qwen3-coder", "lfm2", "gemma4", "deepseek31"})
        for (const char* schema : loose) {
            CAPTURE(family);
            CAPTURE(std::string(schema));
            CHECK(compiled(family, {.parameters = *Json::parse(schema), .strict = false}).ok());
            CHECK_FALSE(compiled(family, {.parameters = *Json::parse(schema)}).ok());
        }
    const auto answers = [&](const char* schema, const char* text) {
        const auto syntax = syntax_of_row(call_syntaxes().back(), words.special);
        const Format format{.schema = *Json::parse(schema), .strict = false};
        const auto grammar = compile_answer(
            {.syntax = syntax.get(), .thought = ThoughtState::closed, .format = &format});
        REQUIRE(grammar);
        return accepts(*grammar, text);
    };
    CHECK(answers(R"({"type":"object","properties":{"a":{"enum":[]}},"required":["a"]})", "{}"));
    CHECK_FALSE(
        answers(R"({"type":"object","properties":{"a":{"enum":[]}},"required":["a"]})", "3"));
    CHECK(answers(R"({"type":"strin"})", "3"));
    CHECK(answers(R"({"type":"string","pattern":"(?=a)b"})", "\"x\""));
    CHECK_FALSE(answers(R"({"type":"string","pattern":"(?=a)b"})", "3"));

    for (const char* family : {"json", "qwen3-coder", "lfm2", "gemma4"}) {
        CAPTURE(family);
        const auto refused = [&](Tool tool) {
            const auto grammar = compiled(family, std::move(tool));
            REQUIRE_FALSE(grammar);
            return grammar.error().code + " " + grammar.error().param;
        };
        CHECK(refused({.parameters = *Json::parse(R"({"type":"array"})")}) ==
              "invalid_json_schema tools[1].parameters");
        CHECK(refused({.parameters = *Json::parse(
                           R"({"type":"object","properties":{"a":{"type":"strin"}}})")}) ==
              "invalid_json_schema tools[1].parameters");
        CHECK(refused({.custom = true, .format = {.regex = "(a"}}) ==
              "invalid_value tools[1].format");
        CHECK(refused({.custom = true, .format = {.gbnf = "root ::= x"}}) ==
              "invalid_value tools[1].format");
    }
}

TEST_CASE("bare calls: alone, listed, in a fence; one that was answered is text") {
    const auto all = tools();
    const auto chat = ChatTemplate::parse("{{ '<tool_call>' }}");
    const auto syntax = std::make_shared<AnswerSyntax>(*find_answer_syntax(*chat, {}, "hermes"));
    const auto read = [&](std::string_view text, AnswerShape shape) -> std::string {
        shape.syntax = syntax.get();
        shape.tools = all;
        const auto grammar = compile_answer(shape);
        REQUIRE(grammar);
        GrammarState state(*grammar);
        if (!state.advance(text)) return "refused";
        if (!state.may_end()) return "unfinished";
        Items items;
        const auto parser = answer_parser(
            syntax, {.tools = all, .answered = {shape.answered.begin(), shape.answered.end()}});
        for (char c : text) parser->text(std::string_view(&c, 1), items);
        parser->finish(true, items);
        return items.shown();
    };
    const auto call = [](std::string name, std::string arguments) {
        Item item;
        item.kind = Item::Kind::function_call;
        item.name = std::move(name);
        item.arguments = std::move(arguments);
        return item;
    };
    const std::string now = R"({"name": "now", "arguments": {}})", said = now + "\n{\"hour\": 3}";
    const std::string book =
        R"({"name": "book", "arguments": {"note": null, "who": {"name": "A"}}})";
    const std::string booked = R"(book({"note":null,"who":{"name":"A"}}))";
    CHECK(read(now, {}) == "now({})");
    CHECK(read(now + "\n", {}) == "now({})");
    CHECK(read("```json\n" + now + "\n```\n", {}) == "now({})");
    CHECK(read("[" + now + ", " + book + "]", {}) == "now({}) " + booked);
    CHECK(read("```\n[" + now + ",\n" + book + "]\n```", {}) == "now({}) " + booked);
    CHECK(read("[" + now + ", " + book + "]", {.parallel = false}) == "refused");
    CHECK(read(said, {}) == "refused");
    CHECK(read(R"({"name": "other", "arguments": {}})", {}) == "refused");

    const Item answered[] = {call("now", "{}"),
                             call("weather", R"({"city":"A \"b\", c","days":1})")};
    const auto again = [&](const std::string& text) { return read(text, {.answered = answered}); };
    CHECK(again(now) == "say(" + now + ")");
    CHECK(again(said) == "say(" + said + ")");
    CHECK(again(book) == booked);
    CHECK(again(R"({"name": "no)") == "unfinished");
    CHECK(again(R"({"name": "now", "arguments": {"x": 1}})") == "refused");
    const std::string weather = "{\"name\": \"weather\", \"arguments\": {\"city\": ";
    const std::string same = weather + R"("A \"b\", c", "days" :1)";
    CHECK(again(same + "}}") == "say(" + same + "}})");
    CHECK(again(same + R"(, "unit": "K"}} is hot)") ==
          "say(" + same + R"(, "unit": "K"}} is hot))");
    CHECK(again(weather + R"("A \"b\", c", "days": 12, "unit": "C"}})") ==
          R"(weather({"city":"A \"b\", c","days":12,"unit":"C"}))");
    CHECK(again(weather + R"("B", "days": 1}})") == R"(weather({"city":"B","days":1}))");
    const std::string marked = "<tool_call>\n" + now + "\n</tool_call>";
    CHECK(again(marked) == "now({})");
    CHECK(again("It is:\n" + marked) == "say(It is:) now({})");

    // What is too long to tell apart is a call again, and refuses nothing.
    const std::string long_note(2'000, '"');
    Json arguments = Json::object().set("note", long_note);
    arguments.set("who", Json::object().set("name", "A"));
    const Item longer[] = {call("book", arguments.write()), call("now", "{}")};
    const auto far = [&](const std::string& text) { return read(text, {.answered = longer}); };
    CHECK(far(book) == booked);
    CHECK(far(now) == "say(" + now + ")");

    // Who ends the line after a call may still end.
    const ToolChoice must = {ToolChoice::Mode::required, {}};
    CHECK(read(marked + "\n", {.choice = must}) == "now({})");
    CHECK(read(marked + "\n" + marked, {.choice = must}) == "now({}) now({})");
    CHECK(read(marked + "\n", {.choice = must, .parallel = false}) == "refused");
}

// A shape and what it refers to.
struct Asked {
    std::shared_ptr<const AnswerSyntax> syntax;
    std::vector<Tool> tools = {};
    Format format = {};
    std::vector<Item> answered = {};
    AnswerShape shape = {};
    GrammarPtr from(AnswerCache& cache) {
        shape.syntax = syntax.get();
        shape.tools = tools;
        shape.format = format.empty() ? nullptr : &format;
        shape.answered = answered;
        const auto grammar = cache.compile(shape);
        REQUIRE(grammar.ok());
        REQUIRE(*grammar != nullptr);
        return *grammar;
    }
};

TEST_CASE("what is asked again is compiled once, and nothing else is taken for it") {
    const auto chat = ChatTemplate::parse("{{ '<tool_call>' }}");
    const auto syntax = std::make_shared<const AnswerSyntax>(
        *find_answer_syntax(*chat, {}, "hermes"));
    Asked plain{.syntax = syntax};
    plain.tools = {tools()[0], tools()[3]};
    Item said;
    said.kind = Item::Kind::function_call;
    said.name = "weather", said.arguments = "{}";
    using Change = void (*)(Asked&);
    const std::pair<const char*, Change> with_tools[] = {
        {"syntax", [](Asked& a) { a.syntax = std::make_shared<const AnswerSyntax>(*a.syntax); }},
        {"thought", [](Asked& a) { a.shape.thought = ThoughtState::closed; }},
        {"may think", [](Asked& a) { a.shape.may_think = false; }},
        {"fewer tools", [](Asked& a) { a.tools.pop_back(); }},
        {"name", [](Asked& a) { a.tools[0].name = "climate"; }},
        {"parameters", [](Asked& a) { a.tools[0].parameters.set("required", Json::array()); }},
        {"strict", [](Asked& a) { a.tools[0].strict = false; }},
        {"custom", [](Asked& a) { a.tools[0].custom = true; }},
        {"format of a tool", [](Asked& a) { a.tools[1].format.regex = "[a-z]+"; }},
        {"choice", [](Asked& a) { a.shape.choice.mode = ToolChoice::Mode::required; }},
        {"names", [](Asked& a) { a.shape.choice.names = {"weather"}; }},
        {"parallel", [](Asked& a) { a.shape.parallel = false; }},
        {"most calls", [](Asked& a) { a.shape.max_calls = 1; }},
        {"more calls", [](Asked& a) { a.shape.max_calls = 2; }},
        {"format", [](Asked& a) { a.format.regex = "x"; }},
        {"answered", [](Asked& a) { a.answered[0].arguments = R"({"city":"A"})"; }},
        {"answered name", [](Asked& a) { a.answered[0].name = "run"; }},
        {"answered more", [](Asked& a) { a.answered.push_back(a.answered[0]); }},
    };
    const std::pair<const char*, Change> with_format[] = {
        {"schema", [](Asked& a) { a.format.schema = *Json::parse(R"({"type":"null"})"); }},
        {"strict", [](Asked& a) { a.format.strict = false; }},
        {"regex", [](Asked& a) { a.format = {.regex = "ab|c"}; }},
        {"gbnf", [](Asked& a) { a.format = {.gbnf = R"(root ::= "ab" | "c")"}; }},
        {"texts",
         [](Asked& a) {
             a.format = {.one_of = {"ab", "c"}};
         }},
        {"other texts",
         [](Asked& a) {
             a.format = {.one_of = {"a", "bc"}};
         }},
    };
    plain.answered = {said};
    AnswerCache cache;
    std::vector<GrammarPtr> seen;
    const auto is_new = [&](Asked asked) {
        const GrammarPtr grammar = asked.from(cache);
        CHECK(asked.from(cache) == grammar);
        const bool known = std::find(seen.begin(), seen.end(), grammar) != seen.end();
        seen.push_back(grammar);
        return !known;
    };
    CHECK(is_new(plain));
    CHECK_FALSE(is_new(plain));
    for (const auto& row : with_tools) {
        Asked changed = plain;
        row.second(changed);
        CHECK_MESSAGE(is_new(changed), row.first);
    }
    Asked formatted{.syntax = syntax};
    formatted.format.schema = *Json::parse(R"({"type":"string"})");
    CHECK(is_new(formatted));
    for (const auto& row : with_format) {
        Asked changed = formatted;
        row.second(changed);
        CHECK_MESSAGE(is_new(changed), row.first);
    }
    // Where no text may stand for a call, those that were answered change nothing.
    for (const auto change :
         {+[](Asked& a) { a.format.regex = "x"; },
          +[](Asked& a) { a.shape.choice.mode = ToolChoice::Mode::required; }}) {
        Asked changed = plain;
        changed.answered.clear();
        change(changed);
        CHECK_FALSE(is_new(changed));
    }
}

TEST_CASE("the cache of answers ends at a number and a size") {
    AnswerCache cache;
    Asked asked{.syntax = std::make_shared<const AnswerSyntax>()};
    const auto text = [&](size_t i) {
        asked.format.one_of = {std::to_string(i), "x"};
        return asked.from(cache);
    };
    const GrammarPtr first = text(0);
    for (size_t i = 1; i < AnswerCache::most_entries; ++i) (void)text(i);
    CHECK(text(0) == first);
    (void)text(AnswerCache::most_entries);
    CHECK(text(0) == first);  // used later than 1, which went
    CHECK(first.use_count() == 2);
    for (size_t i = 0; i < AnswerCache::most_entries; ++i) (void)text(1'000 + i);
    CHECK(first.use_count() == 1);

    asked.format = {.regex = "[0-9]{9000}"};
    const GrammarPtr large = asked.from(cache);
    CHECK(large->bytes() > 9'000 * 20);
    for (size_t i = 0; large.use_count() > 1 && i < AnswerCache::most_bytes / large->bytes() + 1;
         ++i) {
        asked.format.regex = "[0-9]{9000}|" + std::to_string(i);
        (void)asked.from(cache);
    }
    CHECK(large.use_count() == 1);
}

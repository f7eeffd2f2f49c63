// >>engine: every family's templates on random weights: thoughts end when their budget is used, and
// what a request wants of calls and format is what comes. VALAR_TEMPLATES: a folder of *.jinja files
// (published ones, by template_check.py --unpack) for the matrix, instead of our own.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/internal.hpp"
#include "engine/engine.hpp"
#include "json_internal.hpp"
#include "template/families.hpp"
#include "template/syntax.hpp"
#include "tiny_model.hpp"
#include "unicode_internal.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

// ---- A random model of a family ---------------------------------------------------------------

/// What may be tokens of a row's texts: <...> and [...] without spaces.
void add_marks(std::string_view text, std::set<std::string>& marks) {
    for (size_t i = 0; i < text.size(); ++i) {
        const char end = text[i] == '<' ? '>' : text[i] == '[' ? ']' : '\0';
        const size_t to = end ? text.find(end, i) : text.npos;
        if (to == text.npos || to == i + 1) continue;
        const std::string_view mark = text.substr(i, to - i + 1);
        if (mark.find_first_of(" \n\"={") == mark.npos) marks.insert(std::string(mark));
    }
}

struct Family {
    std::string name, source;
    AnswerSyntax syntax;               // as its vocabulary has it
    std::vector<std::string> control;  // tokens beyond those of the tiny model
    std::vector<std::byte> bytes;
    std::set<std::string> ends;  // spellings

    Token token(std::string_view spelling) const {
        const auto found = std::find(control.begin(), control.end(), spelling);
        return static_cast<Token>(tiny::vocabulary().size() +
                                  static_cast<size_t>(found - control.begin()));
    }
    std::string thought_end() const { return without_token_bytes(syntax.thought.close); }
};

/// `tokens`: its marks are tokens; else text that ordinary tokens spell.
Family family(std::string name, std::string source, bool tokens) {
    Family made{std::move(name), std::move(source), {}, {}, {}, {}};
    const auto chat = ChatTemplate::open(made.source);
    CAPTURE(made.name);
    REQUIRE(chat);
    std::set<std::string> marks;
    const auto plain = find_answer_syntax(*chat, {});
    REQUIRE(plain);
    const auto& calls = plain->calls;
    for (const std::string& text :
         {calls.open, calls.before, calls.after_name, calls.after, calls.between, calls.close,
          calls.key, calls.value_end, plain->thought.open, plain->thought.close})
        add_marks(text, marks);
    for (const auto* list : {&calls.marks, &plain->thought.ignored})
        for (const std::string& text : *list) add_marks(text, marks);
    if (!tokens) marks.clear();
    for (std::string_view end : family_end_tokens())
        if (made.source.find(end) != std::string::npos) {
            marks.insert(std::string(end));
            made.ends.insert(std::string(end));
        }
    for (const char* own : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) marks.erase(own);
    made.control.assign(marks.begin(), marks.end());
    SpecialTokens special;
    for (const std::string& mark : made.control) special.add(mark, made.token(mark));
    made.syntax = *find_answer_syntax(*chat, special);
    made.bytes = tiny::model({.n_layers = 1,
                              .n_embd = 64,
                              .n_heads = 1,
                              .n_kv_heads = 1,
                              .n_ff = 64,
                              .n_context = 24576,
                              .control = made.control});
    return made;
}

Engine open(const Family& family) {
    EngineOptions options;
    options.model_bytes = family.bytes;
    options.chat_template = family.source;
    options.threads = 0;
    options.context_tokens = 24576;
    auto engine = Engine::open(options);
    INFO((engine ? "" : engine.error().message));
    REQUIRE(engine);
    return std::move(*engine);
}

Outcome answer(Engine& engine, const Request& request) {
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    REQUIRE(reply.finished());
    const Outcome& outcome = reply.outcome();
    INFO((outcome.error ? outcome.error->message : std::string()));
    REQUIRE(outcome.status == Status::completed);
    return outcome;
}

/// All that the model said, marks too, but for tokens that end turns.
std::string said(const Outcome& outcome) {
    std::string text;
    for (const TokenLogprob& token : outcome.logprobs) text += token.bytes;
    return utf8_repair(text);
}

std::string thought_of(const Outcome& outcome) {
    const bool any = !outcome.items.empty() && outcome.items[0].kind == Item::Kind::reasoning;
    return any ? outcome.items[0].text() : std::string();
}

std::string without(std::string text, const std::set<std::string>& parts) {
    for (const std::string& part : parts)
        while (text.find(part) != std::string::npos) text.erase(text.find(part), part.size());
    return text;
}

std::string trimmed(std::string text) {
    text.erase(text.find_last_not_of(" \t\r\n") + 1);
    return text.erase(0, std::min(text.find_first_not_of(" \t\r\n"), text.size()));
}

Json point_schema() {
    return *Json::parse(R"({"type": "object", "additionalProperties": false, "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 999, "description": "how far"},
        "side": {"type": "string", "enum": ["left", "right"], "description": "where"}},
        "required": ["x", "side"]})");
}

bool is_point(const Json& value) {
    const std::string_view side = value["side"].as_string();
    return value.is_object() && value.size() == 2 && value["x"].is_number() &&
           value["x"].as_int() >= 0 && value["x"].as_int() <= 999 &&
           (side == "left" || side == "right");
}

// ---- Thoughts ---------------------------------------------------------------------------------

struct Frame {
    const char* name;
    const char* known_by;  // what its template says somewhere
    const char* opens;     // at the end of its prompts
};

const Frame frames[] = {
    {"qwen3", "<think> </think>", ""},
    {"deepseek-r1", "<think> </think>", "<think>\\n"},
    {"harmony", "<|channel|>analysis <|channel|>commentary <|end|> <|return|> <|call|>", ""},
    {"gemma4", "<|channel>thought <|tool_call>call: <|tool_response>", ""},
    {"mistral", "[THINK] [/THINK] [TOOL_CALLS] [ARGS]", ""},
    {"seed", "<seed:think> <seed:tool_call>", "<seed:think>"},
    {"command-r7b", "<|START_THINKING|> <|START_ACTION|>", "<|START_THINKING|>"},
    {"apriel", "[BEGIN FINAL RESPONSE] <tool_calls>", "Here are my reasoning steps:\\n"},
    {"apertus", "<|inner_prefix|> <|tools_prefix|>", ""},
    {"solar", "<|think|> <|begin|> <|content|> <|tool_call:begin|> <|end|> <|calls|>", ""},
    {"granite", "<think></think> <response></response>", "<think>"},
    {"exaone-deep", "<thought> </thought>", "<thought>\\n"},
    {"minimax-m3", "<mm:think> <minimax:tool_call> <parameter name=", ""},
};

Family family(const Frame& frame, bool tokens) {
    const std::string source =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{# " +
        std::string(frame.known_by) + " #}{{ '<|im_start|>assistant\n" + frame.opens + "' }}";
    return family(frame.name, source, tokens);
}

Request thinking(const Family& family, Effort effort) {
    Request request;
    request.input = "Where?";
    request.effort = effort;
    request.seed = 3;
    request.logprobs = true;
    request.max_output_tokens = 150;
    const auto never = [&](Token token) { request.logit_bias.push_back({token, -100}); };
    for (Token token = 0; token < 3; ++token) never(token);
    for (const std::string& mark : family.control) never(family.token(mark));
    return request;
}

/// The first token of its opening mark.
Token opening(const Family& family) {
    const std::string& open = family.syntax.thought.open;
    if (!open.starts_with(kTokenBegin)) return 3 + Token{open.front()};  // a byte
    return family.token(std::string_view(open).substr(1, open.find(kTokenEnd) - 1));
}

void favour(Request& request, Token token, double bias) {
    std::erase_if(request.logit_bias, [&](const auto& one) { return one.first == token; });
    request.logit_bias.push_back({token, bias});
}

/// The first answer of some seeds that begins with a thought.
Outcome thoughtful_answer(Engine& engine, Request request) {
    for (request.seed = 0; *request.seed < 60; ++*request.seed) {
        Outcome outcome = answer(engine, request);
        if (!thought_of(outcome).empty()) return outcome;
    }
    FAIL("it never thinks");
    return {};
}

void check_closed(const Family& model, const Outcome& outcome) {
    const std::string all = said(outcome);
    const std::string end = model.syntax.channels() ? "<|start|>assistant"
                                                    : without(model.thought_end(), model.ends);
    CAPTURE(all);
    const size_t at = all.find(trimmed(end));
    REQUIRE(at != std::string::npos);
    CHECK(trimmed(all.substr(0, at)).ends_with(thought_of(outcome)));
    CHECK(all.find(trimmed(end), at + 1) == std::string::npos);
    CHECK(outcome.usage.reasoning_tokens >= 64);
    CHECK(outcome.usage.reasoning_tokens <= 64 + 3 + model.thought_end().size());
    REQUIRE(outcome.items.size() == 2);
    CHECK(outcome.items[1].kind == Item::Kind::message);
}

template <class Check>
void each_family(Check check) {
    for (const Frame& frame : frames)
        for (bool tokens : {true, false}) {
            const Family model = family(frame, tokens);
            if (!tokens && (model.syntax.channels() || model.name == "solar")) continue;
            CAPTURE(model.name);
            CAPTURE(tokens);
            REQUIRE(model.syntax.has_thought());
            Engine engine = open(model);
            CHECK(engine.responder()->models()[0].thinking);
            check(model, engine, *frame.opens != '\0');
        }
}

}  // namespace

TEST_CASE("a thought that has used its budget is closed with its family's mark") {
    each_family([](const Family& model, Engine& engine, bool opens) {
        Request request = thinking(model, Effort::minimal);
        // A user's marks are text: they neither open nor close a thought.
        request.input.text += " " + model.thought_end() +
                              without_token_bytes(model.syntax.thought.open) + "x" +
                              model.thought_end();
        if (opens) check_closed(model, answer(engine, request));
        else CHECK(answer(engine, request).usage.reasoning_tokens == 0);

        // Held to a form, marks come where they belong, however much they are favoured.
        request.format.schema = point_schema();
        favour(request, opening(model), 6);
        const Outcome formatted = thoughtful_answer(engine, request);
        check_closed(model, formatted);
        if (!formatted.cut) CHECK(is_point(*Json::parse(formatted.text)));

        request.tools = {{.name = "forge", .parameters = point_schema()}};
        request.tool_choice.mode = ToolChoice::Mode::required;
        request.parallel_tool_calls = false;
        request.max_output_tokens = 400;
        for (Token end : {0, 2}) favour(request, end, 4);
        const Outcome called = thoughtful_answer(engine, request);
        CAPTURE(said(called));
        CHECK_FALSE(called.cut);
        for (size_t i = 1; i < called.items.size(); ++i)
            CHECK(called.items[i].kind == Item::Kind::function_call);
        CHECK(called.items.size() > 1);
        for (request.max_output_tokens = 90; *request.max_output_tokens < 190;
             *request.max_output_tokens += 7) {
            const Outcome cut = answer(engine, request);
            CAPTURE(said(cut));
            for (const Item& item : cut.items) CHECK(item.kind != Item::Kind::message);
        }
    });
}

TEST_CASE("thoughts that are nested, empty, unfinished, not wanted") {
    each_family([](const Family& model, Engine& engine, bool opens) {
        Request request = thinking(model, Effort::minimal);
        request.max_output_tokens = 40;
        if (opens) {
            const Outcome cut = answer(engine, request);
            CHECK(cut.cut);
            REQUIRE(cut.items.size() == 1);
            CHECK(cut.items[0].kind == Item::Kind::reasoning);
            CHECK(cut.usage.reasoning_tokens == 40);
        }

        request.max_output_tokens = 200;
        const std::string& close = model.syntax.thought.close;
        const std::string_view mark = std::string_view(close).substr(
            std::min(close.find(kTokenBegin), close.size()));
        if (opens && !mark.empty()) {  // the first that it says is the end
            Request empty = request;
            favour(empty, model.token(mark.substr(1, mark.find(kTokenEnd) - 1)), 100);
            const Outcome outcome = answer(engine, empty);
            CHECK(outcome.items.empty() == outcome.text.empty());
            CHECK(thought_of(outcome).empty());
            CHECK(outcome.usage.reasoning_tokens == 1);
        }

        // It begins thoughts again and again, in the middle of one too.
        Request nested = request;
        favour(nested, opening(model), 6);
        nested.max_output_tokens = 300;
        const Outcome outcome = answer(engine, nested);
        CAPTURE(said(outcome));
        for (const Item& item : outcome.items)
            CHECK((item.kind == Item::Kind::message || item.kind == Item::Kind::reasoning));
        if (opens) {
            CHECK(outcome.usage.reasoning_tokens >= 64);
            CHECK(outcome.items.back().kind == Item::Kind::message);
        }

        request.effort = Effort::none;
        request.max_output_tokens = 100;
        const Outcome none = answer(engine, request);
        CHECK(none.usage.reasoning_tokens == 0);
        REQUIRE(none.items.size() == 1);
        CHECK(none.items[0].kind == Item::Kind::message);
        CHECK(none.usage.output_tokens == 100);
    });
}

// ---- What a request wants, on every template ---------------------------------------------------

namespace {

enum class Calls : uint8_t { none, automatic, required, named };

Request request_of(Calls calls, bool thinks, bool formatted, int64_t seed, const Family& family) {
    Request request;
    request.input = "Where?";
    request.effort = thinks ? Effort::minimal : Effort::none;
    request.seed = seed;
    request.logprobs = true;
    request.max_output_tokens = 400;
    request.tools = {{.name = "forge", .description = "Makes it", .parameters = point_schema()},
                     {.name = "sell", .description = "Sells it", .parameters = point_schema()}};
    request.tool_choice.mode = calls == Calls::none        ? ToolChoice::Mode::none
                               : calls == Calls::automatic ? ToolChoice::Mode::automatic
                                                           : ToolChoice::Mode::required;
    if (calls == Calls::named) request.tool_choice.names = {"sell"};
    if (formatted) request.format.schema = point_schema();
    // Random weights end texts too rarely, and hardly ever begin a thought or a call.
    if (thinks && family.syntax.has_thought()) favour(request, opening(family), 5);
    for (Token end : {0, 2}) favour(request, end, 3);
    for (const std::string& end : family.ends)
        if (end != "<|im_end|>" && end != "<|endoftext|>") favour(request, family.token(end), 2);
    for (const std::string& mark : family.syntax.calls.marks)
        if (mark.starts_with(kTokenBegin))
            favour(request, family.token(mark.substr(1, mark.find(kTokenEnd) - 1)), 3);
    return request;
}

/// What is wrong with an answer; nothing.
std::string fault_of(const Request& request, const Outcome& outcome, const Family& family) {
    using Mode = ToolChoice::Mode;
    if (outcome.status != Status::completed)
        return outcome.error ? outcome.error->message : "no error";
    if (!outcome.cut && outcome.usage.output_tokens == *request.max_output_tokens)
        return "cut, and not said so";
    size_t thoughts = 0, messages = 0, calls = 0;
    const bool held = !request.format.empty() || request.tool_choice.mode != Mode::none;
    const std::string all = said(outcome);
    for (const Item& item : outcome.items) {
        const bool call = item.is_call(), thought = item.kind == Item::Kind::reasoning;
        if (thought && messages + calls > 0 && held) return "a thought after the answer";
        (call ? calls : thought ? thoughts : messages) += 1;
        if (!call) continue;
        const auto arguments = Json::parse(item.arguments);
        if (!arguments || !is_point(*arguments)) return "arguments " + item.arguments;
        if (item.name != "forge" && item.name != "sell") return "a call of " + item.name;
        if (!request.tool_choice.names.empty() && item.name != request.tool_choice.names[0])
            return "another tool";
    }
    const Mode mode = request.tool_choice.mode;
    const bool formatted = !request.format.empty();
    const std::string begin = trimmed(
        without_token_bytes(family.syntax.calls.open + family.syntax.calls.before));
    if (request.effort == Effort::none && thoughts > 0) return "a thought that was not wanted";
    if (mode == Mode::none && calls > 0) return "a call that was forbidden";
    if (mode == Mode::required && messages > 0) return "a message in place of a call";
    if (mode == Mode::required && calls == 0 && !outcome.cut) return "no call";
    if (mode == Mode::required && calls > 0 &&
        all.find(begin.substr(0, begin.find_first_of("\1\2"))) == all.npos)
        return "a call in a foreign syntax";
    if (formatted && messages > 0 && calls > 0) return "a form and calls";
    if (formatted && messages > 0 && !outcome.cut) {
        const auto value = Json::parse(outcome.text);
        if (!value || !is_point(*value)) return "not the form: " + outcome.text;
    }
    if (messages + calls == 0 && !outcome.cut) return "neither message nor call";
    if (outcome.usage.reasoning_tokens > 64 + 3 + family.thought_end().size() && calls == 0 &&
        formatted)
        return "a thought of " + std::to_string(outcome.usage.reasoning_tokens) + " tokens";
    return {};
}

struct Score {
    size_t refused = 0, answers = 0, wrong = 0, cut = 0, thoughts = 0, calls = 0;
    std::map<std::string, size_t> formats;
};

/// Thinking on and off x four choices of tools x a form or none, all at once.
void run_matrix(const Family& family, Score& score) {
    Engine engine = open(family);
    std::vector<std::pair<Request, Reply>> all;
    int64_t seed = 0;
    for (const bool thinks : {false, true})
        for (const Calls calls : {Calls::none, Calls::automatic, Calls::required, Calls::named})
            for (const bool formatted : {false, true}) {
                Request request = request_of(calls, thinks, formatted, ++seed, family);
                Reply reply = engine.submit(request);
                all.emplace_back(std::move(request), std::move(reply));
            }
    REQUIRE(engine.step());
    // Some want variables of their own, and refuse whatever does not bring them.
    if (std::all_of(all.begin(), all.end(), [](const auto& one) {
            return one.second.outcome().status == Status::failed;
        })) {
        ++score.refused;
        return;
    }
    ++score.formats[std::string(family.syntax.calls.name)];
    for (const auto& one : all) {
        const Request& request = one.first;
        REQUIRE(one.second.finished());
        const Outcome& outcome = one.second.outcome();
        const std::string fault = fault_of(request, outcome, family);
        ++score.answers;
        score.cut += outcome.cut;
        score.thoughts += !thought_of(outcome).empty();
        for (const Item& item : outcome.items) score.calls += item.is_call();
        if (fault.empty()) continue;
        ++score.wrong;
        CAPTURE(family.name);
        CAPTURE(family.control.size());
        CAPTURE(family.syntax.calls.name);
        CAPTURE(static_cast<int>(request.tool_choice.mode));
        CAPTURE(request.effort == Effort::none);
        CAPTURE(request.format.empty());
        CAPTURE(outcome.cut);
        CAPTURE(said(outcome));
        FAIL_CHECK(fault);
    }
}

/// Names and texts: published templates where there are some, else those of this repository.
std::vector<std::pair<std::string, std::string>> templates() {
    const std::string other = environment("VALAR_TEMPLATES");
    const std::string folder = other.empty() ? VALAR_SOURCE_DIR "/tests/data/templates" : other;
    std::vector<std::pair<std::string, std::string>> found;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (entry.path().extension() != ".jinja") continue;
        auto text = read_file(entry.path().string(), 1 << 24);
        REQUIRE(text);
        found.emplace_back(entry.path().stem().string(), std::move(*text));
    }
    std::sort(found.begin(), found.end());
    return found;
}

}  // namespace

TEST_CASE("on every template: thoughts, calls and forms as the request has them") {
    Score score;
    size_t count = 0;
    for (auto& [name, source] : templates()) {
        const bool tokens = ++count % 4 != 0 || source.find("<|channel|>") != source.npos;
        if (!environment("VALAR_TEMPLATES").empty()) std::printf("%s\n", name.c_str());
        run_matrix(family(name, source, tokens), score);
    }
    std::string formats;
    for (const auto& [name, number] : score.formats)
        formats += " " + name + " " + std::to_string(number);
    MESSAGE(count << " templates, " << score.refused << " refuse all, " << score.answers
                  << " answers, " << score.wrong << " wrong, " << score.cut << " cut, "
                  << score.thoughts << " thoughts, " << score.calls << " calls;" << formats);
    CHECK(score.wrong == 0);
    CHECK(score.refused * 20 < count);
    CHECK(score.answers - score.cut > score.answers / 3);
}

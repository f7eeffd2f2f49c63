// Any text as what a model of any family wrote, with and without special tokens: items begin and
// end in order, calls are whole JSON with a known name, and no cut of the text changes anything.
#include "../output_helpers.hpp"

#include <cstdint>

namespace {

using namespace valar::detail;

void require(bool condition) {
    if (!condition) std::abort();
}

const valar::Json& tools() {
    static const valar::Json made = *valar::Json::parse(
        R"([{"name": "f", "parameters": {"type": "object", "properties": {"s": {"type": "string"},
            "n": {"type": "integer"}, "u": {"type": ["string", "null"]}, "l": {"type": "array"},
            "r": {"$ref": "#/properties/r"}}}}, {"name": "g"}, {"name": "c", "custom": true}])");
    return made;
}

TokenSet tokens_of(const CallSyntax& row) {
    TokenSet tokens;
    for (std::string_view text : {"<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>",
                                  "<|start|>", "<|call|>", "<|\"|>"})
        tokens.spellings.push_back(std::string(text));
    for (std::string_view mark : row.marks)
        if (!mark.empty()) tokens.spellings.push_back(std::string(mark));
    for (std::string_view mark : row.found_tokens)
        if (!mark.empty()) tokens.spellings.push_back(std::string(mark));
    tokens.ends = {"<|end|>", "<|call|>"};
    return tokens;
}

void check(const Items& items, bool constrained) {
    for (const Items::Item& item : items.all) {
        const bool call = item.kind == valar::Item::Kind::function_call;
        if (call) require(item.name == "f" || item.name == "g");
        require(item.ended || (constrained && &item == &items.all.back()));
        if (!call || !item.ended) continue;
        const auto arguments = valar::Json::parse(item.text, {200, 1'000'000});
        // What a model wrote twice stands twice.
        require(arguments ? arguments->is_object()
                          : arguments.error().message.find("duplicate") != std::string::npos);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 3) return 0;
    const auto rows = call_syntaxes();
    const CallSyntax& row = rows[data[0] % rows.size()];
    const uint8_t flags = data[1];
    const TokenSet tokens = flags & 1 ? tokens_of(row) : TokenSet{};
    const std::string text = utf8_repair(
        std::string_view(reinterpret_cast<const char*>(data) + 3, size - 3));
    static const auto chat_template = ChatTemplate::parse("{{ '<think>' }}");
    AnswerParserOptions options;
    options.tools = tools_of(tools());
    options.constrained = flags & 2;
    options.bare_calls = flags & 4;
    options.thought = static_cast<ThoughtState>(flags / 8 % 3);
    const auto syntax = std::make_shared<AnswerSyntax>(
        *find_answer_syntax(*chat_template, tokens.special(), row.name));
    std::string shown;
    for (size_t step : {text.size() + 1, size_t{data[2]} % 9 + 1}) {
        Items items;
        const auto parser = answer_parser(syntax, options);
        feed(*parser, text, tokens, step, items);
        parser->finish(flags & 128, items);
        check(items, options.constrained);
        require(shown.empty() || shown == items.shown());
        shown = items.shown();
    }
    return 0;
}

// output_dump CASES: what each answer is taken apart into, a line of JSON each. CASES is an array of
// {"template", "tokens": [special tokens], "prompt", "text", "tools", "constrained", "cut"}: a line
// {"format", "items": [{"kind", "name", "text", "ended"}]}. Used by output_check.py.
#include <algorithm>
#include <cstdio>
#include <string>

#include "base/internal.hpp"
#include "output_helpers.hpp"

int main(int argc, char** argv) {
    using namespace valar;
    using namespace valar::detail;
    if (argc != 2) return std::fputs("usage: output_dump CASES\n", stderr), 2;
    const auto text = detail::read_file(argv[1], uint64_t{1} << 30);
    const auto cases = text ? Json::parse(*text) : Result<Json>(text.error());
    if (!cases) return std::fprintf(stderr, "%s\n", cases.error().message.c_str()), 1;
    for (const Json& c : cases->items()) {
        TokenSet tokens;
        for (const Json& token : c["tokens"].items())
            tokens.spellings.push_back(std::string(token.as_string()));
        const auto parsed = ChatTemplate::parse(std::string(c["template"].as_string()));
        if (!parsed) {
            std::printf("{\"error\":true}\n");
            continue;
        }
        const auto syntax = find_answer_syntax(*parsed, tokens.special(), c["format"].as_string());
        if (!syntax) {
            std::printf("{\"error\":true}\n");
            continue;
        }
        AnswerParserOptions options;
        options.tools = tools_of(c["tools"]);
        options.constrained = c["constrained"].as_bool();
        options.thought = thought_state({std::string(c["prompt"].as_string()), {}}, *syntax);
        Items items;
        const auto parser = answer_parser(std::make_shared<AnswerSyntax>(*syntax), options);
        feed(*parser, c["text"].as_string(), tokens, 7, items);
        parser->finish(!c["cut"].as_bool(), items);
        Json line = Json::object().set("format", syntax->calls.name).set("items", items.json());
        line.set("thinks", syntax->has_thought());
        std::puts(line.write().c_str());
    }
    return 0;
}

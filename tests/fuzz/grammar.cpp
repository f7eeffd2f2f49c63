// Any schema, pattern or grammar compiles or is refused, within its time; from any place that bytes
// lead to, the masks name exactly the tokens that go on, and some text ends. What a strict schema
// accepts is JSON, and so is what a grammar in a string makes. Input: a kind, the source, a zero byte,
// bytes that choose tokens.
#include "grammar/grammar.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

using namespace valar;
using namespace valar::detail;

void require(bool condition) {
    if (!condition) std::abort();
}

const TokenTriePtr& trie() {
    static const TokenTriePtr made = [] {
        std::vector<std::string> pieces;
        for (int b = 0; b < 256; ++b) pieces.emplace_back(1, char(b));
        for (const char* text : {"ab", "the", "\",", "\":", "{\"", "\"}", "12", "e\"", "\\n",
                                 "], [", "true", "aaaa", "\",\""})
            pieces.emplace_back(text);
        pieces.emplace_back();
        return TokenTrie::build(pieces, {Token(pieces.size() - 1)});
    }();
    return made;
}

/// A grammar inside of a JSON string, as the text of a custom tool stands.
Result<GrammarPtr> compile_quoted(const std::string& source) {
    GrammarBuilder builder;
    auto part = add_gbnf(builder, source, Spelling::json);
    if (!part) return std::move(part.error());
    return builder.build(builder.sequence({builder.bytes("\""), *part, builder.bytes("\"")}));
}

Result<GrammarPtr> compile(uint8_t kind, const std::string& source) {
    if (kind % 4 == 0) return compile_regex(source);
    if (kind % 4 == 1) return kind / 4 % 2 ? compile_quoted(source) : compile_gbnf(source);
    auto schema = Json::parse(source);
    if (!schema) return std::move(schema.error());
    return compile_json_schema(*schema, {kind % 4 == 2, JsonSpace(kind / 4 % 3)});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2 || size > 20'000) return 0;
    const uint8_t* const end = data + size;
    const uint8_t kind = *data++;
    const uint8_t* const zero = std::find(data, end, uint8_t(0));
    const std::string source(reinterpret_cast<const char*>(data), size_t(zero - data));
    auto grammar = compile(kind, source);
    if (!grammar) return require(!grammar.error().message.empty()), 0;
    GrammarState state(*grammar);
    std::string text;
    int steps = 0;
    static MaskMaker maker(trie());
    for (const uint8_t* at = zero; at < end && steps < 60; ++at, ++steps) {
        const auto mask = maker.fill(state);
        std::vector<Token> allowed;
        for (Token t = 0; size_t(t) < trie()->vocabulary(); ++t)
            if (mask[size_t(t) / 64] >> (t % 64) & 1 && !trie()->piece(t).empty())
                allowed.push_back(t);
        require(!allowed.empty() || state.may_end());
        if (allowed.empty()) break;
        const Token token = allowed[*at % allowed.size()];
        require(state.accept_token(token, trie()->piece(token)));
        text += trie()->piece(token);
        const bool json = kind % 4 == 2 || kind % 8 == 5;
        if (json && state.may_end()) require(Json::parse(text).ok());
    }
    return 0;
}

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "json_internal.hpp"
#include "template/families.hpp"
#include "tokenizer/internal.hpp"
#include "unicode_internal.hpp"

using namespace valar;
using namespace valar::detail;
using detail::format;

namespace {

// A vocabulary in the making; `open` writes it as GGUF and reads that.
struct Vocab {
    std::string model = "gpt2", pre = "gpt-2", chat_template = {}, architecture = {};
    std::vector<std::string> tokens = {}, merges = {};
    std::vector<int32_t> types = {};
    std::vector<float> scores = {};
    std::map<std::string, uint32_t> ids = {};
    std::map<std::string, bool> flags = {};
    bool no_pre = false;

    Token add(std::string spelling, TokenKind kind = TokenKind::normal, float score = 0) {
        tokens.push_back(std::move(spelling));
        types.push_back(int32_t(kind));
        scores.push_back(score);
        return Token(tokens.size()) - 1;
    }
    Vocab& add_byte_alphabet() {
        for (int byte = 0; byte < 256; ++byte) add(printable(std::string(1, char(byte))));
        return *this;
    }
    // A merge by the bytes of its halves; adds the product if it is new.
    void merge(const std::string& left, const std::string& right) {
        const std::string product = printable(left + right);
        if (std::find(tokens.begin(), tokens.end(), product) == tokens.end()) add(product);
        merges.push_back(printable(left) + " " + printable(right));
    }
    static std::string printable(std::string_view bytes) {
        std::string out;
        for (char c : bytes) {
            const unsigned b = uint8_t(c);
            char32_t shown = b;
            if (b <= 0x20) shown = 0x100 + b;
            else if (b >= 0x7F && b <= 0xA0) shown = 0x121 + b - 0x7F;
            else if (b == 0xAD) shown = 0x143;
            detail::utf8_append(out, shown);
        }
        return out;
    }
    std::vector<std::byte> bytes() const {
        GgufWriter writer;
        writer.set_string("tokenizer.ggml.model", model);
        if (!architecture.empty()) writer.set_string("general.architecture", architecture);
        if (model == "gpt2" && !no_pre) writer.set_string("tokenizer.ggml.pre", pre);
        auto set_strings = [&](const char* key, const std::vector<std::string>& values) {
            writer.set_strings(key, std::vector<std::string_view>(values.begin(), values.end()));
        };
        set_strings("tokenizer.ggml.tokens", tokens);
        writer.set_array<int32_t>("tokenizer.ggml.token_type", types);
        if (model == "gpt2" || model == "gemma4") set_strings("tokenizer.ggml.merges", merges);
        else writer.set_array<float>("tokenizer.ggml.scores", scores);
        for (const auto& [key, id] : ids) writer.set("tokenizer.ggml." + key, id);
        for (const auto& [key, flag] : flags) writer.set("tokenizer.ggml." + key, flag);
        if (!chat_template.empty()) writer.set_string("tokenizer.chat_template", chat_template);
        auto result = writer.to_bytes();
        REQUIRE(result.ok());
        return *result;
    }
    Result<Tokenizer> try_open(std::string_view other_template = {}) const {
        const auto data = bytes();
        auto file = Gguf::from_bytes(data, "test.gguf");
        REQUIRE(file.ok());
        return Tokenizer::open(*file, other_template, detail::family_end_tokens());
    }
    Tokenizer open(std::string_view other_template = {}) const {
        auto tokenizer = try_open(other_template);
        REQUIRE_MESSAGE(tokenizer.ok(), (tokenizer ? std::string() : tokenizer.error().message));
        return *tokenizer;
    }
};

Vocab byte_vocab(std::string pre = "gpt-2") {
    Vocab vocab;
    vocab.pre = std::move(pre);
    return vocab.add_byte_alphabet();
}

using Tokens = std::vector<Token>;

template <class Text>
Tokens ids(const Tokenizer& tokenizer, const Text& text, bool add_bos = false) {
    auto result = tokenizer.encode(text, add_bos);
    REQUIRE(result.ok());
    return *result;
}

std::string decode(const Tokenizer& tokenizer, const Tokens& tokens) {
    Detokenizer detokenizer(tokenizer);
    std::string text;
    for (Token token : tokens) text += detokenizer.push(token);
    return text += detokenizer.flush();
}

std::string raw_bytes(const Tokenizer& tokenizer, const Tokens& tokens) {
    std::string text;
    for (Token token : tokens) text += tokenizer.piece(token);
    return text;
}

// Text with the request's bytes in [brackets].
MarkedText marked(std::string_view pattern) {
    MarkedText text;
    for (char c : pattern) {
        if (c == '[') text.from_request.push_back({text.text.size(), text.text.size()});
        else if (c == ']') text.from_request.back().end = text.text.size();
        else text.text += c;
    }
    return text;
}

// The words that a pre-tokenizer makes: in this vocabulary every substring of the text is a token
// and every way to build it a merge, so that each word becomes one token.
std::vector<std::string> words(const std::string& pre, const std::string& text) {
    Vocab vocab = byte_vocab(pre);
    for (const std::string& form : {text, detail::nfc(text)})
        for (size_t length = 2; length <= form.size(); ++length)
            for (size_t at = 0; at + length <= form.size(); ++at)
                for (size_t cut = 1; cut < length; ++cut)
                    vocab.merge(form.substr(at, cut), form.substr(at + cut, length - cut));
    const Tokenizer tokenizer = vocab.open();
    std::vector<std::string> out;
    for (Token token : ids(tokenizer, text)) out.emplace_back(tokenizer.piece(token));
    return out;
}

using Words = std::vector<std::string>;

std::string joined(const Words& words) {
    std::string all;
    for (const std::string& word : words) all += "|" + word;
    return all;
}

uint32_t next_random(uint64_t& state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
}

}  // namespace

TEST_CASE("byte-level: merges go by rank, then from the left") {
    Vocab vocab = byte_vocab();
    vocab.merge("b", "c");
    vocab.merge("a", "b");
    vocab.merge("a", "a");
    vocab.merge("aa", "a");
    const Tokenizer tokenizer = vocab.open();
    const Token bc = 256, ab = 257, aa = 258;
    CHECK(tokenizer.size() == 260);
    CHECK(ids(tokenizer, "abc") == Tokens{'a', bc});
    CHECK(ids(tokenizer, "ab") == Tokens{ab});
    CHECK(ids(tokenizer, "aaaa") == Tokens{aa, aa});
    CHECK(ids(tokenizer, "aaaaa") == Tokens{aa, 259});
    CHECK(ids(tokenizer, "") == Tokens{});
    CHECK(tokenizer.piece(bc) == "bc");
    CHECK(tokenizer.kind(bc) == TokenKind::normal);
    CHECK(tokenizer.find("aaa") == 259);
    CHECK_FALSE(tokenizer.find("aaaa"));
    CHECK_FALSE(tokenizer.find(""));
}

TEST_CASE("ids out of range name nothing") {
    const Tokenizer tokenizer = byte_vocab().open();
    for (Token token : {Token(-1), Token(256), INT32_MIN, INT32_MAX}) {
        CHECK(tokenizer.piece(token).empty());
        CHECK(tokenizer.kind(token) == TokenKind::unused);
        CHECK_FALSE(tokenizer.is_end(token));
        CHECK(Detokenizer(tokenizer).push(token).empty());
    }
}

TEST_CASE("the words of each pre-tokenizer") {
    struct Row {
        std::string text;
        Words gpt2, smollm, llama, qwen2;
    };
    const Row rows[] = {
        {"a  b", {"a", " ", " b"}, {"a", " ", " b"}, {"a", " ", " b"}, {"a", " ", " b"}},
        {"a  ", {"a", "  "}, {"a", "  "}, {"a", "  "}, {"a", "  "}},
        // clang-format off
        {"it's WE'LL", {"it", "'s", " WE", "'", "LL"}, {"it", "'s", " WE", "'", "LL"},
         {"it", "'s", " WE", "'LL"}, {"it", "'s", " WE", "'LL"}},
        {"'tx'rex", {"'t", "x", "'re", "x"}, {"'t", "x", "'re", "x"}, {"'t", "x", "'re", "x"},
         // clang-format on
         {"'t", "x", "'re", "x"}},
        {"'\xC5\xBFx",
         {"'", "\xC5\xBFx"},
         {"'", "\xC5\xBFx"},
         {"'\xC5\xBF", "x"},
         {"'\xC5\xBF", "x"}},
        {"x 12345",
         {"x", " 12345"},
         {"x", " ", "1", "2", "3", "4", "5"},
         {"x", " ", "123", "45"},
         {"x", " ", "1", "2", "3", "4", "5"}},
        {"x  1", {"x", " ", " 1"}, {"x", "  ", "1"}, {"x", " ", " ", "1"}, {"x", " ", " ", "1"}},
        {"a\n\n  b",
         {"a", "\n\n ", " b"},
         {"a", "\n\n ", " b"},
         {"a", "\n\n", " ", " b"},
         {"a", "\n\n", " ", " b"}},
        {"a \n \tb",
         {"a", " \n ", "\t", "b"},
         {"a", " \n ", "\t", "b"},
         {"a", " \n", " ", "\tb"},
         {"a", " \n", " ", "\tb"}},
        {"(f) .\r\n",
         {"(", "f", ")", " .", "\r\n"},
         {"(", "f", ")", " .", "\r\n"},
         {"(f", ")", " .\r\n"},
         {"(f", ")", " .\r\n"}},
        {"\xC3\xA9\xCC\x81\xD0\x96",
         {"\xC3\xA9", "\xCC\x81", "\xD0\x96"},
         {"\xC3\xA9", "\xCC\x81", "\xD0\x96"},
         {"\xC3\xA9", "\xCC\x81\xD0\x96"},
         {"\xC3\xA9", "\xCC\x81\xD0\x96"}},
        // clang-format off
        {"\xC2\xA0""a\xC2\xBD", {"\xC2\xA0", "a", "\xC2\xBD"}, {"\xC2\xA0", "a", "\xC2\xBD"},
         {"\xC2\xA0""a", "\xC2\xBD"}, {"\xC2\xA0""a", "\xC2\xBD"}},
        // clang-format on
    };
    for (const Row& row : rows) {
        CAPTURE(row.text);
        CHECK(joined(words("gpt-2", row.text)) == joined(row.gpt2));
        CHECK(joined(words("smollm", row.text)) == joined(row.smollm));
        CHECK(joined(words("llama-bpe", row.text)) == joined(row.llama));
        CHECK(joined(words("qwen2", row.text)) == joined(row.qwen2));
    }
}

TEST_CASE("words of other pre-tokenizers, as their models' own tokenizers cut them") {
    struct Row {
        const char* pre;
        std::string text;
        Words words;
    };
    const Row rows[] = {
        // made by PyPI's tokenizers from the steps that the models publish
        // clang-format off
        {"gpt-4o", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It'LL", " e\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"gpt-4o", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"foo", "BAR's", " \xCC\x81" "ABc", "/\r\n"}},
        {"gpt-4o", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"gpt-4o", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A\xCC\x81" "B\xCC\x82", " \x01\x02", "c", "  "}},
        {"default", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " e", "\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"default", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'", "s", " \xCC\x81", "ABc", "/", "\r\n"}},
        {"default", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"default", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81", "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"mpt", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " \xC3\xA9", " x", "1234\xC2\xBD"}},
        {"mpt", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/", "\r\n"}},
        {"mpt", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"mpt", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"\xC3\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"command-r", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " \xC3\xA9", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"command-r", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/", "\r\n"}},
        {"command-r", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"command-r", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"\xC3\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"glm4", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e", "\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"glm4", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/\r\n"}},
        {"glm4", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"glm4", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"minicpm5", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e", "\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"minicpm5", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/\r\n"}},
        {"minicpm5", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"minicpm5", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"stablelm2", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " \xC3\xA9", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"stablelm2", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/\r\n"}},
        {"stablelm2", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"stablelm2", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"\xC3\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"bailingmoe", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e", "\xCC\x81", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"bailingmoe", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/\r\n"}},
        {"bailingmoe", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"bailingmoe", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"qwen35", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " \xC3\xA9", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"qwen35", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81" "ABc", "/\r\n"}},
        {"qwen35", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"qwen35", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"\xC3\x81" "B\xCC\x82", " \x01\x02", "c", "  "}},
        {"seed-coder", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e", "\xCC\x81", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"seed-coder", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81", "ABc", "/", "\r\n"}},
        {"seed-coder", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"seed-coder", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81" "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"minimax-m2", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It'LL", " e\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"minimax-m2", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"foo", "BAR's", " \xCC\x81" "ABc", "/\r\n"}},
        {"minimax-m2", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"minimax-m2", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A\xCC\x81" "B\xCC\x82", " \x01\x02", "c", "  "}},
        {"tekken", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e\xCC\x81", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"tekken", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"foo", "BAR", "'s", " \xCC\x81" "ABc", "/\r\n"}},
        {"tekken", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"tekken", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A\xCC\x81" "B\xCC\x82", " \x01\x02", "c", "  "}},
        {"deepseek-llm", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " e", "\xCC\x81", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"deepseek-llm", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'", "s", " \xCC\x81", "ABc", "/", "\r", "\n"}},
        {"deepseek-llm", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0", "a", " ", "\xE3\x81\x82", "!(", "b", "\xC3\xA9", " c", ".", "\n"}},
        {"deepseek-llm", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81", "B", "\xCC\x82 \x01\x02", "c", "  "}},
        {"deepseek-coder", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " e", "\xCC\x81", " x", "1", "2", "3", "4", "\xC2\xBD"}},
        {"deepseek-coder", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'", "s", " \xCC\x81", "ABc", "/", "\r", "\n"}},
        {"deepseek-coder", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0", "a", " ", "\xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"deepseek-coder", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81", "B", "\xCC\x82 \x01\x02", "c", "  "}},
        {"deepseek-v3", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'LL", " e\xCC\x81", " x", "123", "4\xC2\xBD"}},
        {"deepseek-v3", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'s", " \xCC\x81" "ABc", "/\r\n"}},
        {"deepseek-v3", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4\xBD\xA0", "a", " ", "\xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".\n"}},
        {"deepseek-v3", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A\xCC\x81" "B\xCC\x82", " ", "\x01", "\x02" "c", "  "}},
        {"falcon", "It'LL e\xCC\x81 x1234\xC2\xBD",
         {"It", "'", "LL", " e", "\xCC\x81", " x", "123", "4", "\xC2", "\xBD"}},
        {"falcon", "fooBAR's \xCC\x81" "ABc/\r\n",
         {"fooBAR", "'", "s", " \xCC\x81", "ABc", "/", "\r\n"}},
        {"falcon", "\xE4\xBD\xA0" "a \xE3\x81\x82!(b\xC3\xA9 c.\n",
         {"\xE4", "\xBD", "\xA0" "a", " \xE3\x81\x82", "!(", "b\xC3\xA9", " c", ".", "\n"}},
        {"falcon", "A\xCC\x81" "B\xCC\x82 \x01\x02" "c  ",
         {"A", "\xCC\x81", "B", "\xCC\x82", " \x01\x02", "c", "  "}},
        {"jais-2", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e", "\xCC\x81", " x", "123", "456", "7\xC2\xBD", " ",
          "89"}},
        {"jais-2", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!\n\n",
          " b"}},
        {"jais-2", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "12", ">.", "    ", "  ", "\tc", "\r\n"}},
        {"laguna", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e", "\xCC\x81", " x", "1", "2", "3", "4", "5", "6",
          "7", "\xC2\xBD", " ", "8", "9"}},
        {"laguna", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!",
          "\n\n", " b"}},
        {"laguna", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "1", "2", ">.", "      ", "\tc", "\r", "\n"}},
        {"ufakzeka", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e", "\xCC\x81", " x", "1", "2", "3", "4", "5", "6",
          "7", "\xC2\xBD", " ", "8", "9"}},
        {"ufakzeka", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!\n\n",
          " b"}},
        {"ufakzeka", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "1", "2", ">.", "      ", "\tc", "\r\n"}},
        {"exaone-moe", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e\xCC\x81 x", "1", "2", "3", "4", "5", "6", "7",
          "\xC2\xBD", " ", "8", "9"}},
        {"exaone-moe", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!\n", "\n",
          " b"}},
        {"exaone-moe", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "1", "2", ">.", "      ", "\tc", "\r\n"}},
        {"kimi-k2", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL", " don't", " ", " e\xCC\x81", " x", "123", "456", "7\xC2\xBD", " ", "89"}},
        {"kimi-k2", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87", "a", " \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!\n\n",
          " b"}},
        {"kimi-k2", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "12", ">.", "      ", "\tc", "\r\n"}},
        {"youtu", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL", " don't", " ", " e\xCC\x81", " x", "1", "2", "3", "4", "5", "6", "7",
          "\xC2\xBD", " ", "8", "9"}},
        {"youtu", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87", "a", " ", "\xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80",
          "!\n\n", " b"}},
        {"youtu", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "1", "2", ">.", "      ", "\tc", "\r\n"}},
        {"tiny_aya", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL", " don't", " ", " e\xCC\x81", " x", "123", "456", "7\xC2\xBD", " ", "89"}},
        {"tiny_aya", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81\xEA\xB0\x80", "!\n\n",
          " b"}},
        {"tiny_aya", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "12", ">.", "      ", "\tc", "\r\n"}},
        {"spark2_5", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e\xCC\x81", " x", "1", "2", "3", "4", "5", "6", "7",
          "\xC2\xBD", " ", "8", "9"}},
        {"spark2_5", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87", "a", " ", "\xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80",
          "!", "\n", "\n", " b"}},
        {"spark2_5", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "1", "2", ">.", "      ", "\tc", "\r", "\n"}},
        {"afmoe", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'LL", " don", "'t", " ", " e\xCC\x81", " x", "12", "345", "67\xC2\xBD", " ",
          "89"}},
        {"afmoe", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87", "a", " ", "\xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80",
          "!\n\n", " b"}},
        {"afmoe", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<sentinel", ":", "12", ">.", "      ", "\tc", "\r\n"}},
        {"superbpe", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL don't  e\xCC\x81 x", "1", "234", "567\xC2\xBD", " ", "89"}},
        {"superbpe", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b"}},
        {"superbpe", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ<sentinel:", "12", ">.      \tc\r\n"}},
        {"bloom", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL", " don't", " ", " e\xCC\x81", " x1234567\xC2\xBD", " 89"}},
        {"bloom", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80",
          "!\n\n", " b"}},
        {"bloom", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ<sentinel:12>", ".      \t", "c", "\r\n"}},
        {"viking", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It'LL", " don't", " ", " e\xCC\x81", " x", "1", "2", "3", "4", "5", "6", "7",
          "\xC2\xBD", " ", "8", "9"}},
        {"viking", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80",
          "!\n\n", " b"}},
        {"viking", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ<sentinel:", "1", "2", ">", ".      \t", "c", "\r\n"}},
        {"chameleon", "It'LL don't  e\xCC\x81 x1234567\xC2\xBD 89",
         {"It", "'", "LL", " don", "'", "t", "  ", "e", "\xCC\x81", " x", "1", "2", "3", "4", "5",
          "6", "7", "\xC2\xBD", " ", "8", "9"}},
        {"chameleon", "\xE4\xB8\xAD\xE6\x96\x87" "a \xE3\x81\x82\xE3\x80\x81\xEA\xB0\x80!\n\n b",
         {"\xE4\xB8\xAD\xE6\x96\x87" "a", " \xE3\x81\x82", "\xE3\x80\x81", "\xEA\xB0\x80", "!",
          "\n", "\n", " b"}},
        {"chameleon", "IMGIMGABZ<sentinel:12>.      \tc\r\n",
         {"IMGIMGABZ", "<", "sentinel", ":", "1", "2", ">", ".", "    ", "  ", "\t", "c", "\r",
          "\n"}},
        // clang-format on
    };
    for (const Row& row : rows) {
        CAPTURE(row.pre);
        CAPTURE(row.text);
        CHECK(joined(words(row.pre, row.text)) == joined(row.words));
    }
}

TEST_CASE("every name of a pre-tokenizer is known, none is the default") {
    Vocab vocab = byte_vocab();
    vocab.ids["bos_token_id"] = uint32_t(vocab.add("<s>", TokenKind::control));
    for (const char* pre : {"default",
                            "llama-bpe",
                            "llama3",
                            "llama-v3",
                            "falcon3",
                            "falcon-h1",
                            "lfm2",
                            "pixtral",
                            "midm-2.0",
                            "jina-v5-nano",
                            "qwen2",
                            "deepseek-r1-qwen",
                            "megrez",
                            "kormo",
                            "f2llmv2",
                            "qwen35",
                            "smollm",
                            "gpt-2",
                            "phi-2",
                            "mpt",
                            "olmo",
                            "modern-bert",
                            "exaone4",
                            "jais",
                            "jais-2",
                            "trillion",
                            "granite-docling",
                            "gigachat",
                            "a.x-4.0",
                            "mellum",
                            "mellum2",
                            "roberta-bpe",
                            "jina-es",
                            "jina-de",
                            "jina-v1-en",
                            "jina-v2-es",
                            "jina-v2-de",
                            "jina-v2-code",
                            "gpt-4o",
                            "o200k",
                            "llama4",
                            "kanana2",
                            "talkie",
                            "granite-embed-multi-97m",
                            "tekken",
                            "deepseek-llm",
                            "deepseek-coder",
                            "deepseek-v3",
                            "chatglm-bpe",
                            "glm4",
                            "glm5",
                            "granite",
                            "refact",
                            "starcoder",
                            "codeshell",
                            "minerva-7b",
                            "falcon",
                            "command-r",
                            "exaone",
                            "exaone-moe",
                            "seed-coder",
                            "bailingmoe",
                            "bailingmoe2",
                            "llada-moe",
                            "minimax",
                            "minimax-m2",
                            "hunyuan",
                            "hunyuan-dense",
                            "joyai-llm",
                            "hy_v4",
                            "stablelm2",
                            "smaug-bpe",
                            "dbrx",
                            "minicpm5",
                            "solar-open",
                            "grok-2",
                            "kimi-k2",
                            "youtu",
                            "tiny_aya",
                            "cohere2moe",
                            "spark2_5",
                            "afmoe",
                            "superbpe",
                            "bloom",
                            "poro-chat",
                            "gpt3-finnish",
                            "viking",
                            "chameleon",
                            "laguna",
                            "ufakzeka"}) {
        CAPTURE(pre);
        vocab.pre = pre;
        const Tokenizer tokenizer = vocab.open();
        const std::string text = "A b's  12345 \xC3\xA9\xF0\x9F\x98\x80\r\n\t(x)\xE4\xBD\xA0 \x01";
        CHECK(raw_bytes(tokenizer, ids(tokenizer, text)) == text);
    }
    for (const char* pre : {"", " ", "gpt-2 ", "gpt", "llama", "2", "whitespace"}) {
        vocab.pre = pre;
        CHECK(vocab.try_open().error().kind == ErrorKind::unsupported);
    }
    // files of before there were names
    vocab.pre = "default";
    const Tokens expected = ids(vocab.open(), "x=1");
    vocab.no_pre = true;
    CHECK(ids(vocab.open(), "x=1") == expected);
}

TEST_CASE("llama-bpe takes a word that is a token, qwen2 composes first") {
    Vocab vocab = byte_vocab("llama-bpe");
    const Token word = vocab.add("hello");
    CHECK(ids(vocab.open(), "hello") == Tokens{word});
    CHECK(vocab.open().add_bos());
    vocab.pre = "qwen2";
    CHECK(ids(vocab.open(), "hello").size() == 5);
    CHECK_FALSE(vocab.open().add_bos());
    CHECK(ids(vocab.open(), "e\xCC\x81") == Tokens{0xC3, 0xA9});
    vocab.pre = "gpt-2";
    CHECK(ids(vocab.open(), "e\xCC\x81") == Tokens{'e', 0xCC, 0x81});
}

TEST_CASE("long words merge as the definition says") {
    // against the plain definition, with ranks in no helpful order and scores with many ties
    uint64_t state = 42;
    for (int round = 0; round < 120; ++round) {
        const bool sentences = round % 2 == 1;
        Vocab vocab = sentences ? Vocab{.model = "llama"} : byte_vocab();
        vocab.flags["add_space_prefix"] = false;
        Words pieces = {"a", "b", "c"};
        std::vector<std::pair<std::string, std::string>> merges;
        while (merges.size() < 40) {
            const auto& left = pieces[next_random(state) % pieces.size()];
            const auto& right = pieces[next_random(state) % pieces.size()];
            const std::pair merge(left, right);
            if (left.size() + right.size() > 12) continue;
            if (std::find(merges.begin(), merges.end(), merge) != merges.end()) continue;
            merges.push_back(merge);
            pieces.push_back(left + right);
        }
        for (size_t i = merges.size(); i > 1; --i)
            std::swap(merges[i - 1], merges[next_random(state) % i]);
        std::map<std::string, float> scores;
        for (const std::string& piece : pieces)
            scores.emplace(piece, float(next_random(state) % 4));
        for (const auto& [left, right] : merges) vocab.merge(left, right);
        if (sentences) {
            for (const char* letter : {"a", "b", "c"}) vocab.add(letter);
            for (size_t id = 0; id < vocab.tokens.size(); ++id)
                vocab.scores[id] = scores[vocab.tokens[id]];
        }
        const auto rank = [&](const std::string& left, const std::string& right) -> float {
            if (sentences) return scores.count(left + right) ? -scores[left + right] : INFINITY;
            const auto at = std::find(merges.begin(), merges.end(), std::pair(left, right));
            return at == merges.end() ? INFINITY : float(at - merges.begin());
        };

        std::string text;
        for (const size_t length = 20 + next_random(state) % 300; text.size() < length;) {
            const auto& piece = pieces[next_random(state) % pieces.size()];
            for (uint32_t n = next_random(state) % 4; n--;) text += piece;
        }
        Words expected;
        for (char c : text) expected.emplace_back(1, c);
        for (;;) {
            float best = INFINITY;
            size_t place = 0;
            for (size_t i = 0; i + 1 < expected.size(); ++i)
                if (const float r = rank(expected[i], expected[i + 1]); r < best)
                    best = r, place = i;
            if (best == INFINITY) break;
            expected[place] += expected[place + 1];
            expected.erase(expected.begin() + ptrdiff_t(place) + 1);
        }
        const Tokenizer tokenizer = vocab.open();
        Words made;
        for (Token token : ids(tokenizer, text)) made.emplace_back(tokenizer.piece(token));
        CHECK(joined(made) == joined(expected));
    }
}

TEST_CASE("200 KB in one word") {  // a quadratic loop would not come back
    Vocab vocab = byte_vocab();
    for (const char* unit : {"a", " ", "\xF0\x9F\x98\x80"}) {
        std::string half = unit;
        for (size_t i = 1; i < half.size(); ++i) vocab.merge(half.substr(0, i), half.substr(i, 1));
        for (; half.size() < 64; half += half) vocab.merge(half, half);
    }
    Vocab sentences = vocab;
    sentences.model = "llama";
    sentences.flags["add_space_prefix"] = false;
    for (auto& token : sentences.tokens) {
        const size_t id = size_t(&token - sentences.tokens.data());
        if (id < 256) token = format("<0x%02X>", int(id)), sentences.types[id] = 6;
        sentences.scores[id] = -float(id);
    }
    for (const std::string unit : {"a", "ab", " ", "\xF0\x9F\x98\x80", "\xCC\x81", "\n"}) {
        std::string text;
        while (text.size() < 200'000) text += unit;
        const Tokenizer bytes = vocab.open(), pieces = sentences.open();
        CHECK(raw_bytes(bytes, ids(bytes, text)) == text);
        CHECK(raw_bytes(pieces, ids(pieces, text)) == text);
    }
    vocab.pre = "qwen2";
    CHECK(ids(vocab.open(), std::string(200'000, ' ')).size() < 10'000);
}

TEST_CASE("words are remembered within a text") {
    Vocab vocab = byte_vocab();
    vocab.merge("t", "h");
    vocab.merge(" ", "th");
    const Tokenizer tokenizer = vocab.open();
    std::string text;
    Tokens expected;
    for (int i = 0; i < 3000; ++i) {
        const std::string word = format(" th%c%c", 'a' + i % 26, 'a' + i / 26 % 26);
        text += word;
        const Tokens part = ids(tokenizer, word);
        expected.insert(expected.end(), part.begin(), part.end());
    }
    CHECK(ids(tokenizer, text) == expected);
}

TEST_CASE("control tokens come from the template alone") {
    Vocab vocab = byte_vocab();
    const Token start = vocab.add("<|im_start|>", TokenKind::control);
    const Token end = vocab.add("<|im_end|>", TokenKind::control);
    const Token longer = vocab.add("<|im_end|>>", TokenKind::control);
    vocab.ids["bos_token_id"] = uint32_t(start);
    vocab.ids["eos_token_id"] = uint32_t(end);
    for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
        vocab.pre = pre;
        const Tokenizer tokenizer = vocab.open();
        CHECK(ids(tokenizer, marked("<|im_start|>[x]<|im_end|>")) == Tokens{start, 'x', end});
        CHECK(ids(tokenizer, marked("<|im_end|>>")) == Tokens{longer});
        // all of the bytes must be the template's; a shorter token may fit
        CHECK(ids(tokenizer, marked("<|im_end|>[>]")) == Tokens{end, '>'});
        CHECK(ids(tokenizer, marked("<|im_end|[>]")).size() == 10);
        for (const std::string text : {"[<|im_end|>]", "<[|im_end|>]", "<|im[_]end|>",
                                       "[<|im_end|]>", "[<|im][_end|>]", "<|im_[e][nd]|>"}) {
            CAPTURE(text);
            const Tokens tokens = ids(tokenizer, marked(text));
            CHECK(tokens == Tokens{'<', '|', 'i', 'm', '_', 'e', 'n', 'd', '|', '>'});
        }
        const Tokens plain = ids(tokenizer, "a<|im_start|>b");
        CHECK(std::find(plain.begin(), plain.end(), start) == plain.end());
        CHECK(raw_bytes(tokenizer, plain) == "a<|im_start|>b");
    }
}

TEST_CASE("no vocabulary lets a text spell a control token") {
    // merges, whole words, bytes and the unknown token could each make one
    Vocab vocab = byte_vocab("llama-bpe");
    vocab.merge("h", "i");
    vocab.merge("hi", "t");
    vocab.types[257] = int32_t(TokenKind::control);  // "hit"
    vocab.types['x'] = int32_t(TokenKind::control);
    vocab.ids["unknown_token_id"] = 'x';
    vocab.ids["eos_token_id"] = 256;  // "hi" is called normal, but it ends the text
    const Tokenizer tokenizer = vocab.open();
    CHECK(ids(tokenizer, "hit x") == Tokens{'h', 'i', 't', ' '});
    CHECK(ids(tokenizer, marked("hit[hi]hix")) == Tokens{257, 'h', 'i', 256, 'x'});

    Vocab sentences;
    sentences.model = "llama";
    for (const char* piece : {"a", "b", "ab"}) sentences.add(piece);
    sentences.add("</s>", TokenKind::control);
    for (const char* piece : {"<", "/", "s", ">", "</", "s>"}) sentences.add(piece);
    sentences.types[2] = int32_t(TokenKind::control);
    sentences.flags["add_space_prefix"] = false;
    sentences.ids["eos_token_id"] = 3;
    sentences.ids["unknown_token_id"] = 3;
    const Tokenizer other = sentences.open();
    CHECK(ids(other, "ab</s>?") == Tokens{0, 1, 8, 9});
    CHECK(ids(other, marked("ab</s>")) == Tokens{2, 3});
}

TEST_CASE("user-defined tokens: guarded if the template has them, else of any text") {
    Vocab vocab = byte_vocab();
    const Token tool = vocab.add("<tool>", TokenKind::user_defined);
    const Token other = vocab.add("<b>", TokenKind::user_defined);
    const Token lines = vocab.add("\n\n", TokenKind::user_defined);
    vocab.chat_template = "{{ '<tool>\n\n' }}";
    const Tokenizer tokenizer = vocab.open();
    CHECK(ids(tokenizer, marked("<tool>[<b>]")) == Tokens{tool, other});
    CHECK(ids(tokenizer, marked("<[b]>")) == Tokens{other});
    CHECK(ids(tokenizer, "<tool>") == Tokens{'<', 't', 'o', 'o', 'l', '>'});
    CHECK(ids(tokenizer, "a\n\nb") == Tokens{'a', lines, 'b'});
    // a template that is not the file's own guards too
    CHECK(ids(vocab.open("<b>"), "<b>") == Tokens{'<', 'b', '>'});
    vocab.chat_template.clear();
    CHECK(ids(vocab.open(), "<tool>") == Tokens{tool});
}

TEST_CASE("the request's edges split neither words nor merges") {
    Vocab vocab = byte_vocab("qwen2");
    for (auto [left, right] : {std::pair("h", "e"), {"l", "l"}, {"he", "ll"}, {"hell", "o"}})
        vocab.merge(left, right);
    const Tokenizer tokenizer = vocab.open();
    CHECK(ids(tokenizer, marked("he[l]lo")) == ids(tokenizer, "hello"));
    CHECK(ids(tokenizer, marked("[h][e]llo")).size() == 1);
    CHECK(ids(tokenizer, marked("e[\xCC\x81]")) == Tokens{0xC3, 0xA9});
    MarkedText wrong{"abc", {{2, 1}}};
    CHECK(tokenizer.encode(wrong).error().kind == ErrorKind::internal);
    wrong.from_request = {{0, 4}};
    CHECK_FALSE(tokenizer.encode(wrong).ok());
    wrong.from_request = {{1, 2}, {0, 1}};
    CHECK_FALSE(tokenizer.encode(wrong).ok());
}

TEST_CASE("begin, end and the ends of turns") {
    Vocab vocab = byte_vocab();
    const Token bos = vocab.add("<s>");  // called normal: counts as control all the same
    const Token eos = vocab.add("</s>", TokenKind::control);
    const Token turn = vocab.add("<|im_end|>", TokenKind::control);
    const Token gemma = vocab.add("<end_of_turn>", TokenKind::user_defined);
    const Token plain = vocab.add("<|eot_id|>");
    const Token eot = vocab.add("<turn/>", TokenKind::control);
    CHECK_FALSE(vocab.open().bos());
    CHECK_FALSE(vocab.open().eos());
    vocab.ids = {{"bos_token_id", uint32_t(bos)},
                 {"eos_token_id", uint32_t(eos)},
                 {"eot_token_id", uint32_t(eot)}};
    vocab.flags = {{"add_bos_token", true}, {"add_eos_token", true}};
    const Tokenizer tokenizer = vocab.open();
    CHECK(tokenizer.bos() == bos);
    CHECK(tokenizer.eos() == eos);
    CHECK(tokenizer.add_bos());
    CHECK(tokenizer.add_eos());
    CHECK(tokenizer.kind(bos) == TokenKind::control);
    std::set<Token> ends;
    for (Token token = 0; token < Token(tokenizer.size()); ++token)
        if (tokenizer.is_end(token)) ends.insert(token);
    CHECK(ends == std::set<Token>{eos, turn, gemma, eot});
    CHECK(tokenizer.kind(plain) == TokenKind::normal);
    CHECK(ids(tokenizer, "x", true) == Tokens{bos, 'x'});
    CHECK(ids(tokenizer, "", true) == Tokens{bos});
    CHECK(*tokenizer.encode("x", true, true) == Tokens{bos, 'x', eos});
    CHECK(ids(tokenizer, marked("<s>x"), true) == Tokens{bos, 'x'});
    CHECK(ids(tokenizer, "<s>", true) == Tokens{bos, '<', 's', '>'});
}

TEST_CASE("bytes that no token stands for are left out; invalid UTF-8 is kept") {
    Vocab vocab;
    for (int byte = 0; byte < 256; ++byte)
        if (byte != 'x') vocab.add(Vocab::printable(std::string(1, char(byte))));
    CHECK(raw_bytes(vocab.open(), ids(vocab.open(), "axb")) == "ab");
    vocab.add("<unk>", TokenKind::unknown);
    vocab.ids["unknown_token_id"] = 255;
    CHECK(ids(vocab.open(), "axb") == Tokens{'a', 255, 'b'});
    for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
        vocab.pre = pre;
        const Tokenizer tokenizer = vocab.open();
        const std::string text = "a\xFF\xC3 \xE2\x82\xF0\x9F\x98 1\xED\xA0\x80'\xC5";
        CHECK(raw_bytes(tokenizer, ids(tokenizer, text)) == text);
    }
}

TEST_CASE("sentencepiece: scores, spaces, bytes, unknown and unused pieces") {
    Vocab vocab;
    vocab.model = "llama";
    const Token unknown = vocab.add("<unk>", TokenKind::unknown);
    const Token bos = vocab.add("<s>", TokenKind::control);
    vocab.ids = {{"unknown_token_id", 0}, {"bos_token_id", 1}};
    const Token space = vocab.add("\xE2\x96\x81", TokenKind::normal, -9);
    const Token a = vocab.add("a", TokenKind::normal, -10);
    const Token b = vocab.add("b", TokenKind::normal, -11);
    const Token ab = vocab.add("ab", TokenKind::normal, -2);
    const Token ba = vocab.add("ba", TokenKind::normal, -1);
    const Token space_a = vocab.add(
        "\xE2\x96\x81"
        "a",
        TokenKind::normal, -3);
    const Token user = vocab.add("\xE2\x96\x81\xE2\x96\x81", TokenKind::user_defined);
    const Token step = vocab.add("bab", TokenKind::unused, -0.5f);
    const Token four = vocab.add("babb", TokenKind::normal, -0.7f);

    const Tokenizer tokenizer = vocab.open();
    CHECK(tokenizer.add_bos());
    CHECK(ids(tokenizer, "a", true) == Tokens{bos, space_a});
    CHECK(ids(tokenizer, "") == Tokens{});
    CHECK(ids(tokenizer, "aba") == Tokens{space_a, ba});
    CHECK(ids(tokenizer, "ab") == Tokens{space, ab});
    CHECK(ids(tokenizer, "a?!b\xC3") == Tokens{space_a, unknown, b, unknown});
    CHECK(ids(tokenizer, "bab") == Tokens{space, ba, b});
    CHECK(ids(tokenizer, "babb") == Tokens{space, four});
    CHECK(ids(tokenizer, " a") == Tokens{user, a});  // "__a": the prefix and the space
    CHECK(ids(tokenizer, "b  b") == Tokens{space, b, user, b});
    CHECK(ids(tokenizer,
              "b\xE2\x96\x81"
              "a") == Tokens{space, b, space_a});
    CHECK(ids(tokenizer, marked("<s>a<s>b")) == Tokens{bos, space_a, bos, space, b});
    CHECK(tokenizer.piece(step) == "bab");
    CHECK(tokenizer.piece(space_a) == " a");
    CHECK(decode(tokenizer, ids(tokenizer, "aba b")) == "aba b");
    CHECK(decode(tokenizer, {bos, space_a, bos, space_a}) == "a a");
    CHECK(Detokenizer(tokenizer, false).push(space_a) == " a");

    vocab.flags["add_space_prefix"] = false;
    for (int byte = 0; byte < 256; ++byte) vocab.add(format("<0x%02X>", byte), TokenKind::byte);
    const Tokenizer bytes = vocab.open();
    const Token zero = step + 2;
    CHECK(ids(bytes, "a?\xC3\xA9") == Tokens{a, zero + '?', zero + 0xC3, zero + 0xA9});
    CHECK(ids(bytes, "<0x41>").size() == 6);
    CHECK(raw_bytes(bytes, ids(bytes, "\xFF\xE2\x82 ab\xF0\x9F")) == "\xFF\xE2\x82 ab\xF0\x9F");
    CHECK(bytes.piece(zero + 10) == "\n");
    CHECK(bytes.find("\n") == zero + 10);
    CHECK(bytes.find("a") == a);
}

TEST_CASE("unigram: the pieces with the highest sum; extra spaces go where the file says so") {
    Vocab vocab;
    vocab.model = "t5";
    const std::string mark = "\xE2\x96\x81";
    const Token unknown = vocab.add("<unk>", TokenKind::unknown);
    const Token space = vocab.add(mark, TokenKind::normal, -2),
                a = vocab.add("a", TokenKind::normal, -3);
    const Token b = vocab.add("b", TokenKind::normal, -3),
                ab = vocab.add("ab", TokenKind::normal, -5);
    const Token space_a = vocab.add(mark + "a", TokenKind::normal, -4);
    const Token bab = vocab.add("bab", TokenKind::normal, -8.5f);
    const Token user = vocab.add("b b", TokenKind::user_defined);
    vocab.add("aa", TokenKind::unused, -1);
    const Tokenizer plain = vocab.open();
    CHECK_FALSE(plain.add_bos());
    CHECK(plain.add_eos());
    CHECK(ids(plain, "") == Tokens{});
    CHECK(ids(plain, "a") == Tokens{space_a});
    CHECK(ids(plain, "ab") == Tokens{space, ab});  // -7, as is -4 - 3: the first found stays
    CHECK(ids(plain, "aab") == Tokens{space_a, ab});
    CHECK(ids(plain, "baba") == Tokens{space, b, ab, a});
    CHECK(ids(plain, "aa") == Tokens{space_a, a});
    CHECK(ids(plain, "xyb") == Tokens{space, unknown, b});
    CHECK(ids(plain, "b b") == Tokens{space, user});
    CHECK(ids(plain, " a  a ") == Tokens{space, space_a, space, space_a, space});
    CHECK(plain.piece(bab) == "bab");
    for (const char* model : {"t5", "llama"}) {
        vocab.model = model;
        vocab.flags["remove_extra_whitespaces"] = true;
        const Tokenizer trims = vocab.open();
        CHECK(ids(trims, " a  a ") == Tokens{space_a, space_a});
        CHECK(ids(trims, "   ") == Tokens{});
    }
    vocab.model = "t5";
    vocab.scores[2] = NAN;
    CHECK(vocab.try_open().error().kind == ErrorKind::bad_data);
}

TEST_CASE("gemma4: characters are merged by rank, spaces among them") {
    Vocab vocab;
    vocab.model = "gemma4";
    const Token unknown = vocab.add("<unk>", TokenKind::unknown);
    const Token bos = vocab.add("<bos>", TokenKind::control);
    vocab.ids = {{"unknown_token_id", 0}, {"bos_token_id", 1}};
    vocab.flags["add_bos_token"] = false;
    const std::string mark = "\xE2\x96\x81", e_acute = "\xC3\xA9";
    const Token two = vocab.add(mark + mark, TokenKind::user_defined);
    const Token lines = vocab.add("\n\n", TokenKind::user_defined);
    const Token space = vocab.add(mark), a = vocab.add("a"), line = vocab.add("\n");
    const Token e = vocab.add(e_acute), ae = vocab.add("a" + e_acute),
                space_a = vocab.add(mark + "a");
    const Token three = vocab.add(mark + mark + mark), line_a = vocab.add("\na");
    vocab.merges = {mark + mark + " " + mark, mark + " " + mark, "\n a", mark + " a",
                    "a " + e_acute};
    CHECK(ids(vocab.open(), "x" + e_acute + "yz") == Tokens{unknown, e, unknown});
    for (int byte = 0; byte < 256; ++byte) vocab.add(format("<0x%02X>", byte), TokenKind::byte);
    const Tokenizer tokenizer = vocab.open();
    const Token zero = line_a + 1;
    CHECK(tokenizer.add_bos());  // whatever the file says
    CHECK(ids(tokenizer, " a" + e_acute + "a", true) == Tokens{bos, space_a, e, a});
    CHECK(ids(tokenizer, "a" + e_acute) == Tokens{ae});
    CHECK(ids(tokenizer, "   a") == Tokens{three, a});
    CHECK(ids(tokenizer, mark + "  ") == Tokens{three});
    CHECK(ids(tokenizer, mark + mark + " ") == Tokens{two, space});
    CHECK(ids(tokenizer, "\n\na\na\n") == Tokens{lines, a, line_a, line});
    CHECK(ids(tokenizer, "<0x41>z\xFF") == Tokens{zero + '<', zero + '0', zero + 'x', zero + '4',
                                                  zero + '1', zero + '>', zero + 'z', zero + 0xFF});
    CHECK(decode(tokenizer, ids(tokenizer, " a z")) == " a z");
    CHECK(tokenizer.piece(two) == "  ");
    vocab.model = "gpt2";  // the same by its other name
    vocab.pre = "gemma4";
    CHECK(ids(vocab.open(), "   a") == Tokens{three, a});
}

TEST_CASE("WordPiece: the longest pieces of each word, or one unknown token") {
    Vocab vocab;
    vocab.model = "bert";
    const std::string mark = "\xE2\x96\x81", e_acute = "\xC3\xA9", ideograph = "\xE4\xBD\xA0";
    const Token unknown = vocab.add("[UNK]", TokenKind::control);
    const Token first = vocab.add("[CLS]", TokenKind::control);
    const Token last = vocab.add("[SEP]", TokenKind::control);
    vocab.ids = {{"unknown_token_id", 0}, {"cls_token_id", 1}, {"seperator_token_id", 2}};
    const Token un = vocab.add(mark + "un"), a = vocab.add(mark + "a"), e = vocab.add(mark + "e");
    const Token able = vocab.add("able"), ab = vocab.add("ab"), dot = vocab.add(mark + ".");
    const Token chinese = vocab.add(mark + ideograph), le = vocab.add("le");
    const Tokenizer tokenizer = vocab.open();
    CHECK(ids(tokenizer, "unable") == Tokens{un, able});
    CHECK(ids(tokenizer, "unabab ableab") == Tokens{un, ab, ab, unknown});
    CHECK(ids(tokenizer, "unabe") == Tokens{unknown});
    CHECK(ids(tokenizer,
              "  \t\nA.a\x01"
              "able..") == Tokens{a, dot, a, able, dot, dot});
    CHECK(ids(tokenizer, "E" + e_acute + " " + e_acute) == Tokens{unknown, e});
    CHECK(ids(tokenizer, "un" + ideograph + ideograph + "a") == Tokens{un, chinese, chinese, a});
    CHECK(ids(tokenizer, "a" + std::string(99, 'b')) == Tokens{unknown});
    vocab.add("b");
    CHECK(ids(vocab.open(), "un" + std::string(98, 'b')).size() == 99);
    CHECK(ids(vocab.open(), "un" + std::string(99, 'b')) == Tokens{unknown});
    CHECK(ids(tokenizer, "[SEP]") == Tokens{unknown, unknown, unknown});
    CHECK(ids(tokenizer, MarkedText{"a[SEP]", {{3, 6}}}).size() == 4);
    CHECK(ids(tokenizer, MarkedText{"a[SEP]a", {}}) == Tokens{a, last, a});
    CHECK(tokenizer.add_bos());
    CHECK(tokenizer.add_eos());
    CHECK(*tokenizer.encode("a", true, true) == Tokens{first, a, last});
    CHECK(decode(tokenizer, {first, un, able, le, dot, last}) == "unablele .");
    CHECK(tokenizer.piece(un) == " un");

    vocab.flags["normalizer.lowercase"] = false;
    CHECK(ids(vocab.open(), "A a " + e_acute) == Tokens{unknown, a, unknown});
    vocab.flags["normalizer.strip_accents"] = true;
    CHECK(ids(vocab.open(), "A a " + e_acute) == Tokens{unknown, a, e});
}

TEST_CASE("special tokens that take the white space beside them") {
    Vocab vocab;
    vocab.model = "llama";
    vocab.add("<unk>", TokenKind::unknown);
    const Token bos = vocab.add("<s>", TokenKind::control);
    const Token user = vocab.add("<|user|>", TokenKind::control);
    const Token space = vocab.add("\xE2\x96\x81"), a = vocab.add("a"), line = vocab.add("\n");
    vocab.flags["add_space_prefix"] = false;
    const MarkedText text{"<s>\n<|user|>\n a <|user|>", {}};
    CHECK(ids(vocab.open(), text) == Tokens{bos, line, user, line, space, a, space, user});
    vocab.architecture = "phi3";
    CHECK(ids(vocab.open(), text) == Tokens{bos, line, user, a, space, user});
    CHECK(ids(vocab.open(), marked("<|user|>[\n a]")) == Tokens{user, a});

    Vocab masks = byte_vocab("jina-v2-code");
    const Token mask = masks.add("<mask>", TokenKind::control);
    masks.architecture = "jina-bert-v2";
    CHECK(ids(masks.open(), MarkedText{"a \n<mask> b", {}}) == Tokens{'a', mask, ' ', 'b'});
    CHECK(ids(masks.open(), MarkedText{" <mask>", {}}) == Tokens{mask});
}

TEST_CASE("a million digits fall into threes in one go") {
    const std::string digits(1000001, '7');
    for (const char* pre : {"afmoe", "superbpe", "tiny_aya"}) {
        Vocab vocab = byte_vocab(pre);
        vocab.merge("7", "7");
        vocab.merge("77", "7");
        CHECK(ids(vocab.open(), digits).size() == 333334);
        CHECK(ids(vocab.open(), digits + "a").size() > 300000);
    }
}

TEST_CASE("the detokenizer gives whole characters") {
    Vocab vocab = byte_vocab();
    const Token control = vocab.add("<|im_end|>", TokenKind::control);
    const Token user = vocab.add("<b>", TokenKind::user_defined);
    const Tokenizer tokenizer = vocab.open();
    Detokenizer stream(tokenizer);
    CHECK(stream.push('a') == "a");
    CHECK(stream.push(0xF0) == "");
    CHECK(stream.push(0x9F) == "");
    CHECK(stream.push(control) == "");
    CHECK(stream.push(0x98) == "");
    CHECK(stream.push(0x80) == "\xF0\x9F\x98\x80");
    CHECK(stream.push(0xC3) == "");
    CHECK(stream.push(user) == "\xEF\xBF\xBD<b>");
    CHECK(stream.push(0x80) == "\xEF\xBF\xBD");
    CHECK(stream.push(0xE2) == "");
    CHECK(stream.push(0x82) == "");
    CHECK(stream.flush() == "\xEF\xBF\xBD");
    CHECK(stream.flush() == "");
    CHECK(stream.push('b') == "b");
    CHECK(decode(tokenizer, {0xE2, 0x28, 0xC3, 0xA9}) == "\xEF\xBF\xBD(\xC3\xA9");
}

TEST_CASE("hostile vocabularies are refused by name") {
    auto refused = [](const Vocab& vocab, ErrorKind kind, const char* part) {
        auto tokenizer = vocab.try_open();
        REQUIRE_FALSE(tokenizer.ok());
        CHECK(tokenizer.error().kind == kind);
        CAPTURE(tokenizer.error().message);
        CHECK(tokenizer.error().message.find(part) != std::string::npos);
        CHECK(tokenizer.error().message.find("test.gguf") != std::string::npos);
    };
    const ErrorKind bad = ErrorKind::bad_data, unsupported = ErrorKind::unsupported;
    const auto change = [](auto edit) {
        Vocab vocab = byte_vocab();
        edit(vocab);
        return vocab;
    };
    refused(change([](Vocab& v) { v.model = "rwkv"; }), unsupported, "\"rwkv\"");
    refused(change([](Vocab& v) { v.pre = "deepseek"; }), unsupported, "\"deepseek\"");
    refused(change([](Vocab& v) { v.types.pop_back(); }), bad, "255 types for 256");
    refused(change([](Vocab& v) { v.types[7] = 9; }), bad, "token 7");
    refused(change([](Vocab& v) { v.types[7] = -1; }), bad, "token 7");
    refused(change([](Vocab& v) { v.types[7] = 6; }), bad, "token 7");
    refused(change([](Vocab& v) { v.add(std::string(5000, 'x')); }), bad, "token 256");
    refused(change([](Vocab& v) { v.merges = {"ab"}; }), bad, "merge 0");
    refused(change([](Vocab& v) { v.merges = {" a"}; }), bad, "merge 0");
    refused(change([](Vocab& v) { v.merges = {"a b"}; }), bad, "merge 0");
    refused(change([](Vocab& v) { v.ids["eos_token_id"] = 256; }), bad, "eos_token_id");
    refused(change([](Vocab& v) { v.ids["bos_token_id"] = UINT32_MAX; }), bad, "bos_token_id");
    refused(change([](Vocab& v) { v.ids["add_bos_token"] = 1; }), ErrorKind::bad_data,
            "add_bos_token");
    refused(change([](Vocab& v) { v.tokens.clear(), v.types.clear(); }), bad, "0 tokens");

    Vocab sentences;
    sentences.model = "llama";
    sentences.add("a");
    sentences.scores = {1, 2};
    refused(sentences, bad, "2 scores for 1");
    sentences.scores = {NAN};
    refused(sentences, bad, "token 0");
    sentences.scores = {1};
    CHECK(sentences.try_open().ok());

    // equal pieces are tolerated: the lowest id is made; empty pieces are never made
    Vocab twice = byte_vocab();
    twice.merge("a", "b");
    twice.add("ab");
    twice.add("");
    twice.add("", TokenKind::control);
    CHECK(ids(twice.open(), "abab") == Tokens{256, 256});
    CHECK(ids(twice.open(), marked("abab")) == Tokens{256, 256});
    CHECK(twice.open().piece(257) == "ab");
    twice.types.clear();
    CHECK_FALSE(twice.try_open().ok());
}

TEST_CASE("SmolLM2: the expected ids") {
    const std::string folder = detail::environment("VALAR_MODELS");
    if (folder.empty()) {
        MESSAGE("skipped: VALAR_MODELS is not set");
        return;
    }
    auto file = Gguf::open(folder + "/SmolLM2-135M-Instruct.Q4_1.gguf");
    REQUIRE(file.ok());
    auto tokenizer = Tokenizer::open(*file);
    REQUIRE(tokenizer.ok());
    CHECK(tokenizer->size() == 49152);
    CHECK(tokenizer->is_end(2));
    CHECK_FALSE(tokenizer->add_bos());
    auto data = [](const char* name) {
        auto text = detail::read_file(VALAR_SOURCE_DIR "/tests/data/" + std::string(name), 1 << 24);
        REQUIRE(text.ok());
        return *text;
    };
    auto json = [&](const char* name) {
        auto value = Json::parse(data(name));
        REQUIRE(value.ok());
        return *value;
    };
    auto tokens_of = [](const Json& array) {
        Tokens tokens;
        for (const Json& item : array.items()) tokens.push_back(Token(item.as_int(-1)));
        return tokens;
    };

    const std::string book = data("moby-dick-1-9.txt");
    const Tokens expected = tokens_of(json("smollm2/moby-dick-ids.json"));
    CHECK(expected.size() == 24399);
    CHECK(ids(*tokenizer, book) == expected);
    CHECK(decode(*tokenizer, expected) == book);

    const Json prompts = json("smollm2/prompts.json");
    CHECK(prompts.size() == 24);
    for (const Json& prompt : prompts.items()) {
        CAPTURE(prompt["name"].as_string());
        MarkedText text;
        auto add_request = [&](std::string_view value) {
            const size_t begin = text.text.size();
            text.text += value;
            if (!value.empty()) text.from_request.push_back({begin, text.text.size()});
        };
        if (prompt["messages"][0]["role"].as_string() != "system")
            text.text =
                "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
                "by Hugging Face<|im_end|>\n";
        for (const Json& message : prompt["messages"].items()) {
            text.text += "<|im_start|>";
            add_request(message["role"].as_string());
            text.text += "\n";
            add_request(message["content"].as_string());
            text.text += "<|im_end|>\n";
        }
        text.text += "<|im_start|>assistant\n";
        CHECK(ids(*tokenizer, text) == tokens_of(prompt["ids"]));
        std::string answer = decode(*tokenizer, tokens_of(prompt["greedy"]));
        CHECK(answer == prompt["text"].as_string());
    }
}

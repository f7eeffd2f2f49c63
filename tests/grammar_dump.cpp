// grammar_dump [MODEL]: reads requests as JSON lines, answers each with a line. Of a request `schema`
// (with `strict`, `space`), `regex`, `choices` or `gbnf` is compiled; `texts` are held against it;
// `walks` texts are drawn with `seed`, each token with the same probability, at most `most` of them,
// and then the shortest way out; `timing` texts are read token by token, each token's mask and step
// timed. Used by grammar_check.py and bench/masks.py.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "digest_internal.hpp"
#include "grammar/grammar.hpp"
#include "template/families.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

Result<GrammarPtr> compile(const Json& request) {
    if (const Json* p = request.find("regex")) return compile_regex(p->as_string());
    if (const Json* g = request.find("gbnf")) return compile_gbnf(g->as_string());
    if (const Json* list = request.find("choices")) {
        std::vector<std::string> choices;
        for (const Json& c : list->items()) choices.emplace_back(c.as_string());
        return compile_choices(std::move(choices));
    }
    const JsonSpace spaces[] = {JsonSpace::none, JsonSpace::optional, JsonSpace::one};
    return compile_json_schema(
        request["schema"], {request["strict"].as_bool(true), spaces[request["space"].as_int(1)]});
}

bool accepts(const GrammarPtr& grammar, std::string_view text) {
    GrammarState state(grammar);
    return state.advance(text) && state.may_end();
}

struct Random {
    uint64_t state;
    uint64_t next() {
        state += 0x9E3779B97F4A7C15u;
        uint64_t z = state;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
};

// A text by uniform draws. Past `most` tokens only those are drawn that end a text soon: quotes,
// brackets and the end.
Json walk(MaskMaker& masks, const GrammarPtr& grammar, uint64_t seed, size_t most) {
    const TokenTrie& trie = masks.trie();
    GrammarState state(grammar);
    Random random{seed};
    std::string text;
    std::vector<Token> closers;
    for (size_t i = 0; i < trie.vocabulary(); ++i)
        for (const std::string_view end : {"\"", "}", "]", "null", "\":", "1"})
            if (trie.piece(Token(i)) == end) closers.push_back(Token(i));
    for (size_t tokens = 0;; ++tokens) {
        const auto mask = masks.fill(state);
        const bool may_end = state.may_end();
        if (may_end && (tokens >= most || random.next() % 4 == 0)) break;
        std::vector<Token> allowed;
        for (size_t i = 0; i < trie.vocabulary(); ++i)
            if (mask[i / 64] >> (i % 64) & 1 && !trie.piece(Token(i)).empty())
                allowed.push_back(Token(i));
        if (allowed.empty() && may_end) break;
        if (allowed.empty()) return Json::object().set("stuck", text);
        Token token = allowed[random.next() % allowed.size()];
        if (tokens > most + 2'000) return Json::object().set("endless", text);
        if (tokens > most && random.next() % 8) {
            std::vector<Token> soon;
            for (const Token t : closers)
                if (mask[size_t(t) / 64] >> (t % 64) & 1) soon.push_back(t);
            if (!soon.empty()) token = soon[random.next() % soon.size()];
        }
        const bool ok = state.accept_token(token, trie.piece(token));
        text += trie.piece(token);
        if (!ok) return Json::object().set("refused", text);
    }
    return Json::object().set("text", text);
}

// The mask that a walk over all tokens would give, one by one.
size_t count_faults(const TokenTrie& trie, const GrammarState& state,
                    std::span<const uint64_t> mask) {
    size_t faults = 0;
    for (size_t i = 0; i < trie.vocabulary(); ++i) {
        const std::string_view piece = trie.piece(Token(i));
        if (piece.empty()) continue;
        GrammarState copy = state;
        if (copy.advance(piece) != bool(mask[i / 64] >> (i % 64) & 1)) {
            if (!faults++)
                std::fprintf(stderr, "mask differs at token %zu '%s'\n", i,
                             std::string(piece).c_str());
        }
    }
    return faults;
}

// The vocabulary, or texts as tokens.
Json describe(const Json& request, const Tokenizer& tokenizer, const TokenTrie& trie) {
    Json pieces = Json::array(), ends = Json::array(), tokens = Json::array();
    if (request["vocabulary"].as_bool())
        for (size_t i = 0; i < trie.vocabulary(); ++i) {
            const std::string_view piece = trie.piece(Token(i));
            pieces.push(hex_encode(piece.data(), piece.size()));
        }
    for (const Token end : trie.ends()) ends.push(int64_t(end));
    for (const Json& text : request["encode"].items()) {
        Json list = Json::array();
        if (auto encoded = tokenizer.encode(text.as_string()))
            for (const Token token : *encoded) list.push(int64_t(token));
        tokens.push(std::move(list));
    }
    return Json::object().set("pieces", pieces).set("ends", ends).set("tokens", tokens);
}

Json answer(const Json& request, const Tokenizer* tokenizer, MaskMaker* masks) {
    const TokenTrie* trie = masks ? &masks->trie() : nullptr;
    if (tokenizer && (request.find("vocabulary") || request.find("encode")))
        return describe(request, *tokenizer, *trie);
    const uint64_t begin = thread_cpu_ns();
    auto grammar = compile(request);
    Json out = Json::object()
                   .set("compile_us", double(thread_cpu_ns() - begin) / 1000)
                   .set("ok", grammar.ok());
    if (!grammar)
        return out.set("error", grammar.error().message).set("param", grammar.error().param);
    Json accepted = Json::array();
    for (const Json& text : request["texts"].items())
        accepted.push(accepts(*grammar, text.as_string()));
    out.set("accepts", std::move(accepted));
    if (!trie) return out;
    Json walks = Json::array();
    for (int64_t i = 0; i < request["walks"].as_int(); ++i)
        walks.push(walk(*masks, *grammar, request["seed"].as_uint() * 1000 + uint64_t(i),
                        size_t(request["most"].as_int(60))));
    out.set("walks", std::move(walks));
    Json times = Json::array();
    size_t faults = 0;
    for (const Json& text : request["timing"].items()) {
        GrammarState state(*grammar);
        auto tokens = tokenizer->encode(text.as_string());
        for (const Token token : tokens ? *tokens : std::vector<Token>()) {
            GrammarState next = state;
            const uint64_t start = thread_cpu_ns();
            const auto mask = masks->fill(state);
            const bool taken = masks->accept(next, token);
            times.push(double(thread_cpu_ns() - start) / 1000);
            if (request["verify"].as_bool()) faults += count_faults(*trie, state, mask);
            state = next;
            if (!taken) {
                out.set("refused", trie->piece(token));
                break;
            }
        }
    }
    return out.set("mask_us", std::move(times)).set("faults", uint64_t(faults));
}

}  // namespace

int main(int argc, char** argv) {
    std::optional<MaskMaker> masks;
    std::optional<Tokenizer> tokenizer;
    if (argc > 1) {
        auto file = Gguf::open(argv[1]);
        auto opened = file ? Tokenizer::open(*file, {}, family_end_tokens())
                           : Result<Tokenizer>(file.error());
        if (!opened) return std::fprintf(stderr, "%s\n", opened.error().message.c_str()), 1;
        tokenizer = *opened;
        const uint64_t begin = thread_cpu_ns();
        masks.emplace(TokenTrie::build(*tokenizer));
        std::fprintf(stderr, "%zu tokens, trie in %.1f ms\n", masks->trie().vocabulary(),
                     double(thread_cpu_ns() - begin) / 1e6);
    }
    for (std::string line; std::getline(std::cin, line);) {
        auto request = Json::parse(line);
        Json out = request ? answer(*request, tokenizer ? &*tokenizer : nullptr,
                                    masks ? &*masks : nullptr)
                           : Json::object().set("error", request.error().message);
        std::cout << out.write() << std::endl;
    }
    return 0;
}

// Which tokens may come next.
#pragma once

#include "grammar/state.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// Texts as a tree of their bytes in depth-first order: the children of node n begin at n + 1, the
/// next one of a node c is end[c].
struct PieceTrie {
    std::vector<uint8_t> byte;
    std::vector<uint32_t> end;
    std::vector<uint32_t>
        first;  // of the texts that end at the node or below; own: to first[n + 1]
    std::vector<uint64_t> classes;       // of all that follows the node
    std::vector<uint32_t> deepest;       // bytes that follow it, at most
    std::vector<uint32_t> depth;         // bytes that lead to it
    std::vector<Token> tokens;           // by text
    std::vector<uint32_t> chars, bytes;  // of each token before the text
    struct Text {
        std::string_view text;
        Token token;
        uint32_t chars, bytes;
    };
    void build(std::vector<Text> texts);
};

/// The pieces of one vocabulary. Special tokens are none: grammars name them by number.
/// Threads: any.
class TokenTrie {
public:
    static std::shared_ptr<const TokenTrie> build(const Tokenizer& tokenizer);
    /// For tests: empty pieces are special tokens.
    static std::shared_ptr<const TokenTrie> build(std::span<const std::string> pieces,
                                                  std::vector<Token> ends);
    size_t vocabulary() const { return vocabulary_; }
    size_t words() const { return (vocabulary_ + 63) / 64; }  ///< of a mask
    std::string_view piece(Token token) const;                ///< empty: special
    std::span<const Token> ends() const { return ends_; }

private:
    friend class MaskMaker;
    void finish(std::vector<Token> ends);
    size_t vocabulary_ = 0;
    std::string text_;
    std::vector<uint32_t> begin_;
    std::vector<Token> ends_;
    PieceTrie trie_;
    std::vector<uint32_t> chars_;  // of its tokens, as they begin
};
using TokenTriePtr = std::shared_ptr<const TokenTrie>;

/// Makes masks, and keeps what later ones can use again: at most `most_bytes` of it.
/// Threads: one at a time.
class MaskMaker {
public:
    static constexpr size_t most_bytes = 64u << 20;
    explicit MaskMaker(TokenTriePtr trie);
    const TokenTrie& trie() const { return *trie_; }
    /// A bit for each token that `state` may take next; those of `trie().ends()` where the text may
    /// end. Until the next call.
    std::span<const uint64_t> fill(const GrammarState& state);
    /// Whether the token is one of those; then the state has taken it.
    bool accept(GrammarState& state, Token token);
    /// Whether the state could take all of them, one after the other.
    bool takes_all(const GrammarState& state, std::span<const Token> tokens);
    /// What the state leaves no choice about, at most so many bytes. Until the next call.
    std::string_view forced(const GrammarState& state, size_t most);

private:
    using Set = GrammarWalk::Set;
    using Bytes = std::array<uint64_t, 4>;
    enum class Use : uint8_t { plain, counted, key };
    // Of an automaton in one of its states: the tokens that stay in it, and those that leave it by a
    // byte of `follow`, by what they have from there on. It depends on no stack and no count.
    struct Slice {
        DfaPtr dfa;
        uint32_t state = 0;
        Use use = Use::plain;
        Bytes follow = {};
        std::vector<uint64_t> mask;        // empty: `inside` says it all
        std::vector<Token> inside;         // where they are few, or characters are counted: then by
        std::vector<uint32_t> need_begin;  // how many an end is away behind the token
        std::vector<std::pair<int32_t, PieceTrie>> rests;  // by the label where the automaton ends
        std::vector<Token> tried;                          // those that may end more than one key
        size_t bytes() const;
    };
    // A whole mask, for the next time that the same state comes.
    struct Known {
        std::weak_ptr<const Grammar> grammar;
        std::vector<GrammarConfig> configs;
        std::vector<GrammarCell> cells;
        std::vector<uint64_t> mask;
    };
    void make(const GrammarState& state);
    void allow(Token token);
    bool fill_from_slice(const GrammarConfig& config);
    const Slice& slice(const DfaPtr& dfa, uint32_t state, Use use, const Bytes& follow);
    void make_slice(Slice& out) const;
    void keep_inside(Slice& out, std::span<const std::pair<uint32_t, uint32_t>> taken,
                     std::span<const uint32_t> needs) const;
    void add_inside(const Slice& slice, uint32_t most);
    void walk_all(const PieceTrie& trie, uint32_t node, Set set);
    bool takes_all(const PieceTrie& trie, uint32_t node, Set set) const;
    void take_texts(const PieceTrie& trie, uint32_t from, uint32_t to);

    TokenTriePtr trie_;
    GrammarWalk walk_;
    std::span<uint64_t> mask_;
    std::unordered_map<uint64_t, std::unique_ptr<Slice>> slices_;
    size_t slice_bytes_ = 0;
    std::vector<Known> known_;
    std::vector<GrammarConfig> others_;
    GrammarState tried_;
    std::vector<uint64_t> some_;
    std::string forced_;
    const GrammarConfig* key_ = nullptr;   // the key that the rests being walked end
    uint32_t low_ = 0, high_ = unlimited;  // characters that may stand before the rests
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

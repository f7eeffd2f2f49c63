// Which tokens may come next.
#pragma once

#include "grammar/state.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
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
    std::vector<uint16_t> deepest;       // bytes that follow it, at most
    std::vector<Token> tokens;           // by text
    std::vector<uint16_t> chars, bytes;  // of each token before the text: see TokenTrie::Slice
    struct Text {
        std::string_view text;
        Token token;
        uint16_t chars, bytes;
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
    /// Finds out beforehand what the states of this grammar have in common: some milliseconds once
    /// for a vocabulary, so that no mask pays for it.
    void prepare(const Grammar& grammar) const;

private:
    friend class MaskMaker;
    // Of an automaton's state that loops on some token classes: the tokens that stay in it, and the
    // others by what follows the characters that do.
    struct Slice {
        uint64_t loops = 0;
        std::vector<uint64_t> mask;
        std::vector<Token> by_chars;                     // those of the mask
        std::vector<uint32_t> chars_begin;               // in it, by their number of characters
        std::vector<std::vector<uint64_t>> short_masks;  // of at most so many characters
        PieceTrie rests;
        std::vector<bool> rest_chars;  // which numbers of characters stand before rests
    };
    using SlicePtr = std::shared_ptr<const Slice>;
    void finish(std::vector<Token> ends);
    SlicePtr make_slice(uint64_t loops, bool with_short) const;
    SlicePtr slice(uint64_t loops) const;
    size_t vocabulary_ = 0;
    std::string text_;
    std::vector<uint32_t> begin_;
    std::vector<Token> ends_;
    PieceTrie trie_;
    mutable std::mutex mutex_;
    mutable std::vector<SlicePtr> slices_;
};
using TokenTriePtr = std::shared_ptr<const TokenTrie>;

/// Sets the bits of the tokens that `state` may take next; those of `trie.ends()` where the text may
/// end. `mask`: trie.words() words.
void fill_mask(const TokenTrie& trie, const GrammarState& state, std::span<uint64_t> mask);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// The vocabulary of one model in memory.
#pragma once

#include "tokenizer/normalize.hpp"
#include "tokenizer/split.hpp"
#include "tokenizer/tables.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// How a run of text becomes tokens.
enum class Algorithm : uint8_t {
    byte_bpe,      // words of a pre-tokenizer, bytes merged by rank
    spaced_bpe,    // no words: all characters merged by rank (Gemma 4)
    sentence_bpe,  // no words: characters merged by the score of what they make (SentencePiece)
    unigram,       // SentencePiece: the pieces with the highest sum of scores (Kudo 2018)
    word_piece,    // BERT's words, each from its longest pieces
};

struct Vocabulary {
    Algorithm algorithm = Algorithm::byte_bpe;
    PieceTable pieces;
    std::vector<TokenKind> kinds;
    std::vector<bool> from_text;        // merging and whole words may make it
    std::vector<bool> ends;             // see is_end
    std::vector<uint32_t> ranks;        // sentence_bpe: position of its score, highest first
    std::vector<float> scores;          // unigram
    float unknown_score = 0;            // unigram
    SpellingMatcher lattice;            // unigram, word_piece: what text may become
    PairTable pairs;                    // byte_bpe, spaced_bpe
    std::array<Token, 256> bytes;       // the token of a single byte, or no_token
    SpellingMatcher specials;           // cut out of the text first
    std::list<std::string> spellings;   // what specials borrows and pieces spell otherwise
    SpellingMatcher whole;              // SentencePiece: user-defined tokens of any text
    const PreTokenizer* pre = nullptr;  // byte_bpe
    size_t longest = 0;                 // bytes of the longest piece that from_text marks
    Token bos = no_token, eos = no_token, unknown = no_token;
    bool add_bos = false, add_eos = false;
    SentenceRules sentence;          // sentence_bpe, unigram
    BertRules bert;                  // word_piece
    std::vector<bool> strips_left;   // special tokens that take the white space before them
    std::vector<bool> strips_right;  // and behind them
};

/// Reads tokenizer.ggml.*; see Tokenizer::open.
Result<void> read_vocabulary(const Gguf& file, std::string_view chat_template,
                             std::span<const std::string_view> ends, Vocabulary& vocabulary);

}  // namespace detail
}  // namespace v1
}  // namespace valar

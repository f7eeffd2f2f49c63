// >>tokenizer
// Owns: tokens: byte-level BPE, SentencePiece BPE and unigram, WordPiece, special tokens, the
// detokenizer.
// Assumes: a vocabulary may be hostile; text may be long, one single word, or not UTF-8.
// Promises: no special token from text that a request brought; O(n log n) in the text; the ids of
// Hugging Face tokenizers (byte-level) and of sentencepiece on the same vocabulary.
#pragma once

#include "gguf.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {

/// The index of a token in the model's vocabulary.
using Token = int32_t;

/// What a token is for; the values are those in the file.
enum class TokenKind : uint8_t {
    normal = 1,        ///< a piece of text
    unknown = 2,       ///< stands for text that has no token
    control = 3,       ///< marks structure: turns, roles, the end
    user_defined = 4,  ///< a piece of text that is always taken whole
    unused = 5,        ///< not made from text
    byte = 6,          ///< one byte of text that has no token (SentencePiece)
};

namespace detail {
struct Vocabulary;
struct ByteRange;
struct MarkedText;
}  // namespace detail

/// Text to tokens and back, for the vocabulary of one model.
///
/// Which tokens a text may spell:
///   control tokens         only where every byte came from the chat template;
///   user-defined tokens    the same if their spelling stands in the source of the chat template
///                          (a run of white space excepted), everywhere if it does not;
///   beginning, end of text and of turn, named by the file, count as control tokens.
/// The leftmost is taken, of several the longest. What lies between is one run of text: where the
/// request's bytes begin or end shows in nothing else. `add_space_prefix` puts its space at the
/// start of each run.
///
/// What no token stands for becomes byte tokens, else the unknown token, else nothing (byte-level
/// vocabularies may lack some control characters). Memory while encoding: 24 bytes for each byte
/// of the longest word (byte-level) or run (SentencePiece), beside the result.
///
/// Threads: immutable after `open`; every member from any thread. Copies share the vocabulary.
class VALAR_API Tokenizer {
public:
    static constexpr size_t max_vocabulary = 1 << 22;
    static constexpr size_t max_piece_bytes = 1024;
    static constexpr size_t max_text_bytes = size_t{1} << 30;

    /// Reads tokenizer.ggml.*; nothing of `file` is kept. `chat_template` is the template in use
    /// where it is not the file's own; `ends` are spellings of tokens that end a turn. Errors:
    /// unsupported (model is not gpt2, llama, t5, gemma4, bert, or pre is unknown), bad_data.
    static Result<Tokenizer> open(const Gguf& file, std::string_view chat_template = {},
                                  std::span<const std::string_view> ends = {});

    size_t size() const;                        ///< ids are 0 .. size() - 1
    std::string_view piece(Token token) const;  ///< the bytes it stands for; empty if out of range
    TokenKind kind(Token token) const;          ///< unused if out of range
    /// The token of these bytes, an ordinary one before a special one.
    std::optional<Token> find(std::string_view piece) const;

    std::optional<Token> bos() const;  ///< begin of text
    std::optional<Token> eos() const;  ///< end of text (or of a turn: the file decides)
    bool add_bos() const;              ///< whether the model expects bos before a text
    bool add_eos() const;
    /// Ends an answer: the file's eos, eot and eom, and every control or user-defined token that
    /// is spelled like one of the `ends` of open. The engine gives open those of the known families
    /// of chat templates (<|im_end|>, <|eot_id|>, <end_of_turn> ...).
    bool is_end(Token token) const;

    /// A rendered prompt. `add_bos` puts bos in front unless the text itself begins with it.
    Result<std::vector<Token>> encode(const detail::MarkedText& text, bool add_bos = false) const;
    /// Plain text, all of it as if a request had brought it. `add_eos` puts eos behind it.
    Result<std::vector<Token>> encode(std::string_view text, bool add_bos = false,
                                      bool add_eos = false) const;

private:
    friend class Detokenizer;
    explicit Tokenizer(std::shared_ptr<const detail::Vocabulary> vocabulary);
    Result<std::vector<Token>> encode(std::string_view text,
                                      std::span<const detail::ByteRange> request, bool add_bos,
                                      bool add_eos) const;
    std::shared_ptr<const detail::Vocabulary> vocabulary_;
};

/// Tokens to text as they come, always whole UTF-8: the bytes of an unfinished character are held
/// back, bytes that cannot become one turn into U+FFFD. Control and unknown tokens give nothing.
/// Threads: one at a time.
class VALAR_API Detokenizer {
public:
    /// At the start of a text the space that `add_space_prefix` models put there is taken away.
    explicit Detokenizer(const Tokenizer& tokenizer, bool at_start = true);
    /// The text that became ready; valid until the next call.
    std::string_view push(Token token);
    /// The end: what was held back, as U+FFFD. The next push begins a new text, or goes on with this.
    std::string_view flush(bool ends = true);

private:
    void take_ready(size_t count);
    std::shared_ptr<const detail::Vocabulary> vocabulary_;
    std::string ready_;
    std::string held_;
    bool at_start_;
};

}  // namespace v1
}  // namespace valar

// >>tokenizer
// Owns: the vocabulary in memory, the splitters, the merge loop, the matcher of special tokens.
// Byte-level BPE: special tokens are cut out, the text between them goes through the splitter of
// its pre-tokenizer, and each word is merged pair by pair, lowest rank first (Sennrich 2016).
// SentencePiece BPE: no words; pairs are ranked by the score of the piece that they make.
// WordPiece: words of a normalized text, each from its longest pieces.
// Pieces are kept as the bytes they stand for: neither the printable alphabet of GPT-2 nor the
// U+2581 of SentencePiece gets past `open`.
#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/text.hpp"
#include "tokenizer/internal.hpp"
#include "tokenizer/merge.hpp"
#include "tokenizer/vocabulary.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// One text on its way to tokens.
class TextEncoder {
public:
    TextEncoder(const Vocabulary& vocabulary, size_t text_bytes) : v_(vocabulary) {
        if (v_.pre) cache_.resize(std::bit_ceil(std::clamp<size_t>(text_bytes / 16, 1, 4096)));
        tokens.reserve(text_bytes / 4 + 4);
    }
    std::vector<Token> tokens;

    // `request` says which bytes cannot belong to a template_only token.
    Result<void> encode(std::string_view text, std::span<const ByteRange> request) {
        return cut_out(v_.specials, text, request,
                       [this](std::string_view run) { return encode_run(run); });
    }

private:
    struct CachedWord {  // its tokens stand in `tokens`
        char text[22];
        uint8_t length = 0;
        uint8_t count = 0;
        uint32_t begin = 0;
    };

    // Appends the tokens of the spellings that the matcher finds; `encode_between` does the rest.
    template <class Between>
    Result<void> cut_out(const SpellingMatcher& matcher, std::string_view text,
                         std::span<const ByteRange> request, const Between& encode_between) {
        size_t begin = 0, range = 0;
        for (size_t at = 0; at < text.size();) {
            SpellingMatcher::Match match;
            if (matcher.may_begin(text[at])) {
                while (range < request.size() && request[range].end <= at) ++range;
                match = matcher.longest(
                    text, at, range < request.size() ? request[range].begin : text.size());
            }
            if (match.length == 0) {
                ++at;
                continue;
            }
            std::string_view before = text.substr(begin, at - begin);
            if (strips(v_.strips_left, match.token)) before = without_space_behind(before);
            if (auto result = encode_between(before); !result) return result;
            tokens.push_back(match.token);
            begin = at += match.length;
            if (strips(v_.strips_right, match.token)) begin = at = space_end(text, at);
        }
        return encode_between(text.substr(begin));
    }

    static bool strips(const std::vector<bool>& tokens, Token token) {
        return !tokens.empty() && tokens[size_t(token)];
    }
    static size_t space_end(std::string_view text, size_t at) {
        for (size_t next = at; next < text.size() && is_whitespace(utf8_next(text, &next));)
            at = next;
        return at;
    }
    static std::string_view without_space_behind(std::string_view text) {
        size_t end = 0;
        for (size_t at = 0; at < text.size();)
            if (!is_whitespace(utf8_next(text, &at))) end = at;
        return text.substr(0, end);
    }

    Result<void> encode_run(std::string_view text) {
        if (text.empty()) return {};
        if (v_.algorithm == Algorithm::word_piece) return encode_bert(text);
        if (v_.algorithm == Algorithm::sentence_bpe) return encode_sentences(text);
        if (v_.algorithm == Algorithm::unigram) return encode_unigram(text);
        if (v_.algorithm == Algorithm::spaced_bpe) return merge_characters(with_spaces(text));
        // no character before U+0300 (lead byte CC) is changed by NFC unless one after it is there
        const bool composed = !v_.pre->compose ||
                              std::none_of(text.begin(), text.end(),
                                           [](char c) { return uint8_t(c) >= 0xCC; });
        const SplitStep* steps = v_.pre->steps;
        return composed ? encode_words(text, steps) : encode_words(nfc(text), steps);
    }

    Result<void> encode_words(std::string_view text, const SplitStep* step) {
        for (size_t at = 0; at < text.size();) {
            const size_t end = (*step)(text, at);
            const std::string_view part = text.substr(at, end - at);
            auto result = step[1] ? encode_words(part, step + 1) : encode_word(part);
            if (!result) return result;
            at = end;
        }
        return {};
    }

    Result<void> encode_word(std::string_view word) {
        if (word.size() > sizeof CachedWord::text) return merge_word(word);
        CachedWord& cached = cache_[size_t(hash_piece(word) >> 32) & (cache_.size() - 1)];
        if (std::string_view(cached.text, cached.length) == word) {
            for (uint32_t i = 0; i < cached.count; ++i)
                tokens.push_back(Token(tokens[cached.begin + i]));
            return {};
        }
        const size_t begin = tokens.size();
        auto result = merge_word(word);
        std::memcpy(cached.text, word.data(), word.size());
        cached.length = uint8_t(word.size());
        cached.begin = uint32_t(begin);
        cached.count = uint8_t(tokens.size() - begin);
        return result;
    }

    Result<void> merge_word(std::string_view word) {
        if (v_.pre->whole_words && word.size() <= v_.longest) {
            const Token token = v_.pieces.find(word);
            if (token != no_token && v_.from_text[size_t(token)]) {
                tokens.push_back(token);
                return {};
            }
        }
        auto symbols = symbols_for(word.size());
        if (!symbols) return symbols.error();
        size_t count = 0;
        for (char c : word) {  // a byte without a token is left out, as Hugging Face does
            const Token token = v_.bytes[uint8_t(c)];
            if (token != no_token) (*symbols)[count++].token = token;
            else if (v_.unknown != no_token) (*symbols)[count++].token = v_.unknown;
        }
        merge_by_rank(symbols->first(count));
        return {};
    }

    // Gemma 4: what is no token is spelled in bytes before the merging.
    Result<void> merge_characters(std::string_view text) {
        auto symbols = symbols_for(text.size());
        if (!symbols) return symbols.error();
        size_t count = 0;
        for (size_t at = 0; at < text.size();) {
            const size_t begin = at;
            utf8_next(text, &at);
            const std::string_view character = text.substr(begin, at - begin);
            (*symbols)[count].token = piece_made(character);
            if ((*symbols)[count].token != no_token) {
                ++count;
                continue;
            }
            for (char c : character) {
                const Token byte = v_.bytes[uint8_t(c)];
                const Token token = byte != no_token ? byte : v_.unknown;
                const bool again = byte == no_token && count &&
                                   (*symbols)[count - 1].token == token;
                if (token != no_token && !again) (*symbols)[count++].token = token;
            }
        }
        merge_by_rank(symbols->first(count));
        return {};
    }

    void merge_by_rank(std::span<MergeSymbol> symbols) {
        auto pairs = [this](const MergeSymbol& left, const MergeSymbol& right) {
            return v_.pairs.find(left.token, right.token);
        };
        MergeLoop(symbols, pairs).run();
        for (size_t at = 0; !symbols.empty() && at != no_symbol; at = symbols[at].next)
            tokens.push_back(symbols[at].token);
    }

    Result<std::span<MergeSymbol>> symbols_for(size_t count) {
        if (count <= few_.size()) return std::span(few_).first(count);
        return places_for<MergeSymbol>(count);
    }
    template <class Place>
    Result<std::span<Place>> places_for(size_t count) {
        if (count * sizeof(Place) > many_.size()) {
            auto buffer = Buffer::allocate(uint64_t(count) * sizeof(Place), "tokenizer");
            if (!buffer) return buffer.error();
            many_ = std::move(*buffer);
        }
        return std::span(many_.as<Place>(), count);
    }

    // SentencePiece: the text is normalized, then user-defined tokens are cut out, then the rest is
    // merged.
    Result<void> encode_sentences(std::string_view raw) {
        const std::string text = normalize_sentence(raw, v_.sentence, v_.whole);
        return cut_out(v_.whole, text, {}, [this](std::string_view run) -> Result<void> {
            after_unknown_ = false;
            auto symbols = symbols_for(run.size());
            if (!symbols) return symbols.error();
            merge_sentence(run, *symbols, run.size());
            return {};
        });
    }

    // Merges `text` into pieces of at most `longest` bytes and appends them. `symbols` has room
    // for every byte. Recursion: each level is shorter, from max_piece_bytes on.
    void merge_sentence(std::string_view text, std::span<MergeSymbol> symbols, size_t longest) {
        size_t count = 0;
        for (size_t at = 0; at < text.size(); ++count) {
            symbols[count] = {.begin = uint32_t(at)};
            utf8_next(text, &at);
            symbols[count].token = piece_made(
                text.substr(symbols[count].begin, at - symbols[count].begin));
        }
        symbols = symbols.first(count);
        longest = std::min(longest, v_.longest);
        auto end_of = [&](const MergeSymbol& symbol) {
            return symbol.next == no_symbol ? text.size() : symbols[symbol.next].begin;
        };
        auto pairs = [&](const MergeSymbol& left, const MergeSymbol& right) -> Merge {
            const size_t length = end_of(right) - left.begin;
            if (length > longest) return {};
            const Token token = piece_made(text.substr(left.begin, length));
            return token == no_token ? Merge{} : Merge{v_.ranks[size_t(token)], token};
        };
        MergeLoop(symbols, pairs).run();
        for (uint32_t at = 0; count && at != no_symbol; at = symbols[at].next)
            add_piece(text.substr(symbols[at].begin, end_of(symbols[at]) - symbols[at].begin),
                      symbols[at].token);
    }

    Token piece_made(std::string_view piece) const {
        const Token token = v_.pieces.find(piece);
        return token != no_token && v_.from_text[size_t(token)] ? token : no_token;
    }

    void add_piece(std::string_view piece, Token token) {
        const bool unused = token != no_token && v_.kinds[size_t(token)] == TokenKind::unused;
        size_t first = 0;
        utf8_next(piece, &first);
        if (unused && first < piece.size()) {  // only a step: back to what it was merged from
            std::vector<MergeSymbol> symbols(piece.size());
            return merge_sentence(piece, symbols, piece.size() - 1);
        }
        if (unused || token == no_token) return add_unknown(piece);
        tokens.push_back(token);
        after_unknown_ = false;
    }

    // The best pieces that lead to a place in a text.
    struct Lead {
        double score = 0;
        uint32_t begin = no_symbol;  // of the last one; no_symbol: none leads here
        Token token = no_token;
    };

    Result<void> encode_unigram(std::string_view raw) {
        const std::string text = normalize_sentence(raw, v_.sentence, v_.whole);
        auto leads = places_for<Lead>(text.size() + 1);
        if (!leads) return leads.error();
        for (Lead& lead : *leads) lead = {};
        const auto offer = [&](size_t begin, size_t end, Token token, float score) {
            const double sum = (*leads)[begin].score + double(score);
            Lead& lead = (*leads)[end];
            if (lead.begin == no_symbol || sum > lead.score) lead = {sum, uint32_t(begin), token};
        };
        for (size_t at = 0; at < text.size();) {
            const size_t begin = at;
            utf8_next(text, &at);
            bool known = false;  // whether the character alone is a piece
            v_.lattice.each(text, begin, [&](const auto& entry, size_t length) {
                offer(begin, begin + length, entry.token, v_.scores[size_t(entry.token)]);
                known |= begin + length == at;
            });
            if (!known) offer(begin, at, no_token, v_.unknown_score);
        }
        add_best_pieces(text, *leads);
        return {};
    }

    void add_best_pieces(std::string_view text, std::span<const Lead> leads) {
        std::vector<uint32_t> ends;
        for (size_t at = text.size(); at > 0; at = leads[at].begin) ends.push_back(uint32_t(at));
        after_unknown_ = false;
        for (; !ends.empty(); ends.pop_back()) {
            const Lead& lead = leads[ends.back()];
            if (lead.token == no_token) {
                add_unknown(text.substr(lead.begin, ends.back() - lead.begin));
                continue;
            }
            tokens.push_back(lead.token);
            after_unknown_ = false;
        }
    }

    // Each word begins with a space, and so do the pieces that begin one.
    Result<void> encode_bert(std::string_view raw) {
        const std::string text = normalize_bert(raw, v_.bert);
        for (size_t at = 0; at < text.size();) {
            const size_t end = std::min(text.find(' ', at + 1), text.size());
            encode_bert_word(std::string_view(text).substr(at, end - at));
            at = end;
        }
        return {};
    }
    void encode_bert_word(std::string_view word) {
        constexpr size_t most_characters = 100;
        const size_t begin = tokens.size();
        bool known = utf8_count(word) <= most_characters + 1;
        for (size_t at = 0; known && at < word.size();) {
            const SpellingMatcher::Match piece = v_.lattice.longest(word, at, word.size());
            known = piece.length > 0;
            if (known) tokens.push_back(piece.token);
            at += piece.length;
        }
        if (known) return;
        tokens.resize(begin);
        if (v_.unknown != no_token) tokens.push_back(v_.unknown);
    }

    // A character that is no piece: its bytes, or one unknown token for all that follow each other.
    void add_unknown(std::string_view bytes) {
        for (char c : bytes) {
            const Token byte = v_.bytes[uint8_t(c)];
            if (byte != no_token) tokens.push_back(byte);
            else if (v_.unknown != no_token && !after_unknown_) tokens.push_back(v_.unknown);
            after_unknown_ = byte == no_token;
        }
    }

    const Vocabulary& v_;
    std::vector<CachedWord> cache_;
    std::array<MergeSymbol, 64> few_;
    Buffer many_;
    bool after_unknown_ = false;
};

Result<void> check_ranges(size_t text_bytes, std::span<const ByteRange> ranges) {
    size_t at = 0;
    for (const ByteRange& range : ranges) {
        if (range.begin < at || range.end < range.begin || range.end > text_bytes)
            return make_error(ErrorKind::internal, "a prompt's byte ranges are out of order");
        at = range.end;
    }
    return {};
}

}  // namespace
}  // namespace detail

// ---- Tokenizer ------------------------------------------------------------------------------

Tokenizer::Tokenizer(std::shared_ptr<const detail::Vocabulary> vocabulary)
    : vocabulary_(std::move(vocabulary)) {}

Result<Tokenizer> Tokenizer::open(const Gguf& file, std::string_view chat_template,
                                  std::span<const std::string_view> ends) {
    auto vocabulary = std::make_shared<detail::Vocabulary>();
    if (auto result = detail::read_vocabulary(file, chat_template, ends, *vocabulary); !result)
        return result.error();
    return Tokenizer(std::move(vocabulary));
}

size_t Tokenizer::size() const { return vocabulary_->kinds.size(); }

std::string_view Tokenizer::piece(Token token) const {
    return size_t(token) < size() ? vocabulary_->pieces[size_t(token)] : std::string_view();
}

TokenKind Tokenizer::kind(Token token) const {
    return size_t(token) < size() ? vocabulary_->kinds[size_t(token)] : TokenKind::unused;
}

bool Tokenizer::is_end(Token token) const {
    return size_t(token) < size() && vocabulary_->ends[size_t(token)];
}

bool Tokenizer::add_bos() const { return vocabulary_->add_bos; }
bool Tokenizer::add_eos() const { return vocabulary_->add_eos; }

namespace detail {
namespace {
std::optional<Token> token_or_nothing(Token token) {
    return token == no_token ? std::nullopt : std::optional<Token>(token);
}
}  // namespace
}  // namespace detail

std::optional<Token> Tokenizer::bos() const { return detail::token_or_nothing(vocabulary_->bos); }
std::optional<Token> Tokenizer::eos() const { return detail::token_or_nothing(vocabulary_->eos); }

std::optional<Token> Tokenizer::find(std::string_view piece) const {
    return detail::token_or_nothing(vocabulary_->pieces.find(piece));
}

Result<std::vector<Token>> Tokenizer::encode(const detail::MarkedText& text, bool add_bos) const {
    return encode(text.text, text.from_request, add_bos, false);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text, bool add_bos,
                                             bool add_eos) const {
    const detail::ByteRange everything{0, text.size()};
    return encode(text, {&everything, 1}, add_bos, add_eos);
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text,
                                             std::span<const detail::ByteRange> request,
                                             bool add_bos, bool add_eos) const {
    if (text.size() > max_text_bytes)
        return detail::make_error(ErrorKind::too_large,
                                  detail::format("a text of %zu bytes", text.size()));
    if (auto result = detail::check_ranges(text.size(), request); !result) return result.error();
    detail::TextEncoder encoder(*vocabulary_, text.size());
    if (auto result = encoder.encode(text, request); !result) return result.error();
    std::vector<Token>& tokens = encoder.tokens;
    const auto bos = this->bos();
    if (add_bos && bos && (tokens.empty() || tokens[0] != *bos))
        tokens.insert(tokens.begin(), *bos);
    if (const auto eos = this->eos(); add_eos && eos) tokens.push_back(*eos);
    return std::move(tokens);
}

// ---- Detokenizer ----------------------------------------------------------------------------

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool at_start)
    : vocabulary_(tokenizer.vocabulary_), at_start_(at_start) {}

std::string_view Detokenizer::push(Token token) {
    ready_.clear();
    if (size_t(token) >= vocabulary_->kinds.size()) return ready_;
    const TokenKind kind = vocabulary_->kinds[size_t(token)];
    std::string_view piece = vocabulary_->pieces[size_t(token)];
    if (kind == TokenKind::control || kind == TokenKind::unknown || piece.empty()) return ready_;
    if (at_start_ && vocabulary_->sentence.add_space_prefix && piece[0] == ' ')
        piece.remove_prefix(1);
    at_start_ = false;
    held_ += piece;
    take_ready(held_.size() - detail::utf8_incomplete_suffix(held_));
    return ready_;
}

std::string_view Detokenizer::flush(bool ends) {
    take_ready(held_.size());
    at_start_ = at_start_ || ends;
    return ready_;
}

void Detokenizer::take_ready(size_t count) {
    ready_.assign(held_, 0, count);
    held_.erase(0, count);
    if (!detail::utf8_valid(ready_)) ready_ = detail::utf8_repair(ready_);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// The normalizers: SentencePiece's, as far as model files carry it, and BERT's.
#pragma once

#include "tokenizer/tables.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// A copy of `text` with SentencePiece's spelling of a space, U+2581, as a space.
std::string with_spaces(std::string_view text);

/// Spellings and what they are replaced by: a double array (Aoe 1989; the layout is darts-clone's),
/// then the replacements, each with a zero behind it.
class CharsMap {
public:
    static constexpr size_t max_replacement = 64;  // bytes; the longest of NFKC has 33

    /// tokenizer.ggml.precompiled_charsmap; false: it is none. What leads out of it maps nothing.
    bool read(std::string bytes);
    bool empty() const { return units_ == 0; }
    struct Match {
        size_t length = 0;  // of the longest spelling at the beginning of the text; 0: none
        std::string_view replacement;
    };
    Match longest(std::string_view text) const;

private:
    uint32_t unit(size_t index) const;  // index < units_
    std::string_view replacement(size_t begin) const;
    std::string bytes_;
    size_t units_ = 0;
};

struct SentenceRules {
    CharsMap map;
    bool add_space_prefix = false;
    bool remove_extra_spaces = false;  // those at both ends, and all but one between words
};

/// The text as SentencePiece sees it, spaces as spaces. Tokens of `whole` are left as they are.
std::string normalize_sentence(std::string_view text, const SentenceRules& rules,
                               const SpellingMatcher& whole);

struct BertRules {
    bool lowercase = true;
    bool strip_accents = true;
};

/// The words of a text as BERT sees it, each with a space before it: control characters go, white
/// space, punctuation and Chinese characters part words.
std::string normalize_bert(std::string_view text, const BertRules& rules);

}  // namespace detail
}  // namespace v1
}  // namespace valar

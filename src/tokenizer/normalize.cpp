#include "prologue.hpp"

#include "base/text.hpp"
#include "tokenizer/normalize.hpp"
#include "unicode_internal.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

std::string with_spaces(std::string_view text) {
    std::string spaced;
    spaced.reserve(text.size());
    for (size_t at = 0; at < text.size(); ++at) {
        const bool mark = text.substr(at, 3) == "\xE2\x96\x81";
        spaced += mark ? ' ' : text[at];
        if (mark) at += 2;
    }
    return spaced;
}

bool CharsMap::read(std::string bytes) {
    uint32_t size = 0;
    if (bytes.size() < sizeof size) return false;
    std::memcpy(&size, bytes.data(), sizeof size);
    if (size == 0 || size % 4 != 0 || size >= bytes.size() - sizeof size) return false;
    if (bytes.back() != '\0') return false;
    bytes_ = std::move(bytes);
    units_ = size / 4;
    return true;
}

uint32_t CharsMap::unit(size_t index) const {
    uint32_t unit = 0;
    std::memcpy(&unit, bytes_.data() + 4 + index * 4, sizeof unit);
    return unit;
}

std::string_view CharsMap::replacement(size_t begin) const {
    const std::string_view all = std::string_view(bytes_).substr(4 + units_ * 4);
    if (begin >= all.size()) return {};
    return all.substr(begin, all.find('\0', begin) - begin);
}

CharsMap::Match CharsMap::longest(std::string_view text) const {
    const auto offset = [](uint32_t unit) { return unit >> 10 << ((unit & 1u << 9) >> 6); };
    Match match;
    size_t node = units_ ? offset(unit(0)) : 0;
    for (size_t length = 1; length <= text.size(); ++length) {
        const uint8_t c = uint8_t(text[length - 1]);
        node ^= c;
        if (node >= units_) break;
        const uint32_t here = unit(node);
        if ((here & (1u << 31 | 0xFF)) != c) break;
        node ^= offset(here);
        if (node >= units_) break;
        if (!(here >> 8 & 1)) continue;
        const std::string_view found = replacement(unit(node) & ~(1u << 31));
        if (found.size() <= max_replacement) match = {length, found};
    }
    return match;
}

std::string normalize_sentence(std::string_view text, const SentenceRules& rules,
                               const SpellingMatcher& whole) {
    const bool trims = rules.remove_extra_spaces;
    const std::string_view prefix = rules.add_space_prefix ? " " : "";
    if (rules.map.empty() && !trims) return join({prefix, with_spaces(text)});
    std::string out(trims ? "" : prefix);
    bool begun = !trims, after_space = trims;
    for (size_t at = 0; at < text.size();) {
        size_t next = at;
        utf8_next(text, &next);
        std::string_view piece = text.substr(at, next - at);
        size_t user = whole.may_begin(text[at]) ? whole.longest(text, at, text.size()).length : 0;
        if (text.substr(at, user).find(' ') != std::string_view::npos) user = 0;
        const CharsMap::Match mapped = user ? CharsMap::Match()
                                            : rules.map.longest(text.substr(at));
        if (user) piece = text.substr(at, user);
        at += user ? user : mapped.length ? mapped.length : piece.size();
        if (mapped.length) piece = mapped.replacement;
        if (!begun && piece == " ") continue;
        if (!begun) out = prefix;
        begun = true;
        while (after_space && !piece.empty() && piece[0] == ' ') piece.remove_prefix(1);
        out += piece;
        if (!piece.empty()) after_space = trims && piece.back() == ' ';
    }
    out = with_spaces(out);
    while (trims && !out.empty() && out.back() == ' ') out.pop_back();
    return out;
}

namespace {

bool is_bert_ideograph(char32_t c) {
    static constexpr char32_t ranges[][2] = {
        {0x3400, 0x4DBF},   {0x4E00, 0x9FFF},   {0xF900, 0xFAFF},   {0x20000, 0x2A6DF},
        {0x2A700, 0x2B73F}, {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF}, {0x2F800, 0x2FA1F}};
    for (const auto& range : ranges)
        if (c <= range[1]) return c >= range[0];
    return false;
}

// The text without what BERT does not see, white space as spaces, ideographs apart.
std::string clean_bert(std::string_view text) {
    std::string out;
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(text, &at);
        const bool line = c == '\t' || c == '\n' || c == '\r';
        const bool control = category(c) >= Category::Cc && category(c) < Category::Cn;
        if (line || (is_whitespace(c) && !control)) out += ' ';
        else if (is_bert_ideograph(c)) out += join({" ", text.substr(begin, at - begin), " "});
        else if (!control && c != 0xFFFD && c != bad_utf8) out.append(text, begin, at - begin);
    }
    return out;
}

}  // namespace

std::string normalize_bert(std::string_view text, const BertRules& rules) {
    std::string clean = clean_bert(text), out;
    if (rules.strip_accents) clean = nfd(clean);
    bool inside = false;  // of a word
    for (size_t at = 0; at < clean.size();) {
        const char32_t c = utf8_next(clean, &at);
        if (rules.strip_accents && category(c) == Category::Mn) continue;
        const bool space = c == ' ';
        const bool alone = is_punctuation(c) || (c < 0x80 && is_symbol(c));
        if (!space && (alone || !inside)) out += ' ';
        if (!space) utf8_append(out, rules.lowercase ? to_lower(c) : c);
        if (c == 0x130 && rules.lowercase) out += "\xCC\x87";  // of capital I with a dot
        inside = !space && !alone;
    }
    return out;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

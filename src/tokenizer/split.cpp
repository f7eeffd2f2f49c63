// The pre-tokenizers: a row each, by the names in tokenizer.ggml.pre.
#include "prologue.hpp"

#include "tokenizer/split.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

enum class SplitClass : uint8_t { end, other, letter, number, space, newline };

struct SplitChar {
    SplitClass what;
    size_t next;  // where the next character begins
};

// With marks_join a combining mark is a letter.
template <bool marks_join = false>
SplitClass split_class(char32_t c) {
    if (c == '\r' || c == '\n') return SplitClass::newline;
    const Category kind = category(c);
    if (kind <= (marks_join ? Category::Me : Category::Lo)) return SplitClass::letter;
    if (kind >= Category::Nd && kind <= Category::No) return SplitClass::number;
    return is_whitespace(c) ? SplitClass::space : SplitClass::other;
}

template <bool marks_join = false>
SplitChar split_char(std::string_view text, size_t at) {
    if (at >= text.size()) return {SplitClass::end, at};
    const uint8_t c = uint8_t(text[at]);
    if (c < 0x80) {
        if (unsigned(c | 0x20) - 'a' < 26) return {SplitClass::letter, at + 1};
        if (unsigned(c) - '0' < 10) return {SplitClass::number, at + 1};
        if (c > ' ') return {SplitClass::other, at + 1};
    }
    const char32_t code_point = utf8_next(text, &at);
    return {split_class<marks_join>(code_point), at};
}

template <bool marks_join = false>
size_t run_end(std::string_view text, size_t at, SplitClass what, size_t most = SIZE_MAX) {
    SplitChar c = split_char<marks_join>(text, at);
    for (; c.what == what && most > 0; --most) c = split_char<marks_join>(text, at = c.next);
    return at;
}

// Behind the characters of `set`, all ASCII, that follow each other.
size_t skip_any(std::string_view text, size_t at, std::string_view set) {
    return std::min(text.find_first_not_of(set, at), text.size());
}

// The length of the English contraction at the apostrophe text[0], or 0.
size_t contraction_length(std::string_view text, bool any_case) {
    if (any_case && text.substr(1, 2) == "\xC5\xBF") return 3;  // U+017F folds to s
    auto letter = [&](size_t at) {
        const char c = at < text.size() ? text[at] : '\0';
        return any_case && c >= 'A' && c <= 'Z' ? char(c + 32) : c;
    };
    const char a = letter(1), b = letter(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// A run of white space: where it ends, where its last character begins, where the last line end
// in it ends (0: there is none), and what stands behind it.
struct SpaceRun {
    size_t end, last, line_end;
    SplitClass behind;
};

SpaceRun space_run(std::string_view text, size_t at) {
    SpaceRun run = {at, at, 0, SplitClass::end};
    SplitChar c = split_char(text, at);
    for (; c.what >= SplitClass::space; c = split_char(text, run.end)) {
        run.last = run.end;
        run.end = c.next;
        if (c.what == SplitClass::newline) run.line_end = run.end;
    }
    run.behind = c.what;
    return run;
}

// \s+(?!\S)|\s+ -- up to a word the run leaves its last character to that word.
size_t space_end(const SpaceRun& run, size_t at) {
    const bool whole = run.behind == SplitClass::end || run.last == at;
    return whole ? run.end : run.last;
}

template <class Ranges>
bool is_in(const Ranges& ranges, char32_t c) {  // in ascending order
    for (const auto& range : ranges)
        if (c <= range[1]) return c >= range[0];
    return false;
}

// ---- steps ----------------------------------------------------------------------------------

// What Belongs says yes to, at most `most` characters at a time, and what lies between.
template <bool (*Belongs)(char32_t), size_t most = SIZE_MAX>
size_t cut_out(std::string_view text, size_t at) {
    const bool inside = Belongs(utf8_next(text, &at));
    for (size_t count = 1, next = at; at < text.size(); at = next, ++count) {
        const bool belongs = Belongs(utf8_next(text, &next));
        if (belongs != inside || (inside && count == most)) break;
    }
    return at;
}

template <bool (*Belongs)(char32_t)>
size_t belonging_end(std::string_view text, size_t at) {
    for (size_t next = at; next < text.size() && Belongs(utf8_next(text, &next));) at = next;
    return at;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t gpt2_words(std::string_view text, size_t at) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), false)) return at + length;
    SplitChar c = split_char(text, at);
    if (text[at] == ' ') {
        const SplitChar next = split_char(text, c.next);
        if (next.what != SplitClass::end && next.what < SplitClass::space) {
            at = c.next;
            c = next;
        }
    }
    if (c.what >= SplitClass::space) return space_end(space_run(text, at), at);
    return run_end(text, at, c.what);
}

// \s*[\r\n]+|\s+(?!\S)|\s+
size_t space_words(std::string_view text, size_t at) {
    const SpaceRun run = space_run(text, at);
    return run.line_end ? run.line_end : space_end(run, at);
}

// \s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)| ... |\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}
size_t space_powers(std::string_view text, size_t at) {
    const SpaceRun run = space_run(text, at);
    if (run.line_end) return run.line_end;
    const size_t end = run.behind == SplitClass::end ? run.end : run.last;
    const size_t count = utf8_count(text.substr(at, std::min(end - at, size_t{4 * 512})));
    size_t taken = std::min(std::bit_floor(count), size_t{512});
    for (taken = std::max(taken, size_t{1}); taken > 0; --taken) utf8_next(text, &at);
    return at;
}

struct ModernStyle {
    size_t digits = 1;               // in one word, at most
    bool marks_join = false;         // a word of letters may hold combining marks
    std::string_view tail = "\r\n";  // what joins punctuation before it
    bool contractions = true;
    SplitStep spaces = space_words;
};
inline constexpr ModernStyle digits_apart, digits_in_threes{3}, digits_together{SIZE_MAX},
    marks_join{1, true}, no_tail{1, false, ""}, no_contractions{1, false, "\r\n", false},
    spaces_in_powers{3, false, "\r\n", true, space_powers};

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
// ` ?[^\s\p{L}\p{N}]+[tail]*|\s*[\r\n]+|\s+(?!\S)|\s+`
template <const ModernStyle& style>
size_t modern_words(std::string_view text, size_t at) {
    constexpr bool marks = style.marks_join;
    if (style.contractions && text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), true)) return at + length;
    const SplitChar c = split_char<marks>(text, at), next = split_char<marks>(text, c.next);
    if (c.what == SplitClass::letter) return run_end<marks>(text, at, SplitClass::letter);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, style.digits);
    if (next.what == SplitClass::letter && c.what != SplitClass::newline)
        return run_end<marks>(text, c.next, SplitClass::letter);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other))
        return skip_any(text, run_end<marks>(text, c.next, SplitClass::other), style.tail);
    return style.spaces(text, at);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|
// ` ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+` -- words with a space between are one
size_t phrases(std::string_view text, size_t at) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), true)) return at + length;
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::number) return c.next;
    const bool skips = next.what == SplitClass::letter && c.what != SplitClass::newline;
    if (c.what == SplitClass::letter || skips) {
        size_t end = c.what == SplitClass::letter ? at : c.next;
        for (size_t begin = end; begin < text.size() && is_letter(utf8_next(text, &begin));) {
            end = run_end<true>(text, end, SplitClass::letter);
            begin = end + (end < text.size() && text[end] == ' ');
            if (split_char(text, begin).what == SplitClass::letter) end = begin;
        }
        return end;
    }
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other)) {
        const size_t end = run_end(text, c.next, SplitClass::other);
        return end + (end < text.size() && std::string_view("\r\n/").find(text[end]) < 3);
    }
    return space_words(text, at);
}

bool is_han(char32_t c) {  // the script of Unicode 15
    static constexpr char32_t ranges[][2] = {
        // clang-format off
        {0x2E80, 0x2E99}, {0x2E9B, 0x2EF3}, {0x2F00, 0x2FD5}, {0x3005, 0x3005}, {0x3007, 0x3007},
        {0x3021, 0x3029}, {0x3038, 0x303B}, {0x3400, 0x4DBF}, {0x4E00, 0x9FFF}, {0xF900, 0xFA6D},
        {0xFA70, 0xFAD9}, {0x16FE2, 0x16FE3}, {0x16FF0, 0x16FF1}, {0x20000, 0x2A6DF},
        {0x2A700, 0x2B739}, {0x2B740, 0x2B81D}, {0x2B820, 0x2CEA1}, {0x2CEB0, 0x2EBE0},
        {0x2F800, 0x2FA1D}, {0x30000, 0x3134A}, {0x31350, 0x323AF},
        // clang-format on
    };
    return is_in(ranges, c);
}

struct CasedStyle {
    size_t digits = 3;  // in one word, at most
    bool contractions = true;
    bool han_apart = false;           // Chinese characters are words of their own
    std::string_view tail = "\r\n/";  // what joins punctuation before it
};
inline constexpr CasedStyle o200k_style, tekken_style{1, false}, youtu_style{1},
    kimi_style{3, true, true, "\r\n"};

// [upper]*[lower]+, else [upper]+ -- where both sets hold Lm, Lo and marks, upper Lu and Lt too,
// and lower Ll. `at` itself: there is no such word.
struct CasedWord {
    size_t end;
    bool has_lower;
};

template <const CasedStyle& style>
CasedWord cased_word(std::string_view text, size_t at) {
    const auto next_kind = [&](size_t* next) {
        const char32_t c = utf8_next(text, next);
        return style.han_apart && is_han(c) ? Category::Cn : category(c);
    };
    CasedWord word = {at, false};
    size_t shared_end = 0;  // behind the last of [upper] that is of [lower] too
    for (size_t next = at; word.end < text.size(); word.end = next) {
        const Category kind = next_kind(&next);
        if (kind > Category::Me || kind == Category::Ll) break;
        if (kind >= Category::Lm) shared_end = next;
    }
    const size_t upper_end = word.end;
    for (size_t next = upper_end; word.end < text.size(); word.end = next) {
        const Category kind = next_kind(&next);
        if (kind != Category::Ll && (kind < Category::Lm || kind > Category::Me)) break;
    }
    if (word.end > upper_end) return {word.end, true};
    return shared_end ? CasedWord{shared_end, true} : word;
}

// [^\r\n\p{L}\p{N}]?cased -- a word with a lower letter goes before one without. 0: no match.
template <const CasedStyle& style>
size_t cased_word_end(std::string_view text, size_t at) {
    const SplitChar c = split_char(text, at);
    if (c.what == SplitClass::letter) return cased_word<style>(text, at).end;
    if (c.what == SplitClass::number || c.what == SplitClass::newline) return 0;
    const CasedWord behind = cased_word<style>(text, c.next);
    if (behind.has_lower) return behind.end;
    const CasedWord here = cased_word<style>(text, at);  // it begins with a mark
    if (here.has_lower) return here.end;
    return behind.end > c.next ? behind.end : 0;
}

// \p{Han}+ where those stand apart, else cased_word_end(?i:'s|'t|'re|'ve|'m|'ll|'d)?|
// ` \p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[tail]*|\s*[\r\n]+|\s+(?!\S)|\s+`
template <const CasedStyle& style>
size_t cased_words(std::string_view text, size_t at) {
    if constexpr (style.han_apart)
        if (const size_t end = belonging_end<is_han>(text, at); end > at) return end;
    if (const size_t end = cased_word_end<style>(text, at); end > at) {
        const bool apostrophe = style.contractions && end < text.size() && text[end] == '\'';
        return end + (apostrophe ? contraction_length(text.substr(end), true) : 0);
    }
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, style.digits);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other))
        return skip_any(text, run_end(text, c.next, SplitClass::other), style.tail);
    return space_words(text, at);
}

// ---- steps of DeepSeek ----------------------------------------------------------------------

bool is_newline(char32_t c) { return c == '\r' || c == '\n'; }
bool is_letter_or_mark(char32_t c) { return category(c) <= Category::Me; }
bool is_punctuation_or_symbol(char32_t c) { return is_punctuation(c) || is_symbol(c); }
bool is_east_asian(char32_t c) {
    return (c >= 0x4E00 && c <= 0x9FA5) || (c >= 0x3040 && c <= 0x30FF);
}
bool is_asian(char32_t c) {  // as the first DeepSeek models see it: all from U+0800 on
    return (c >= 0x800 && c <= 0x9FA5) || (c >= 0xAC00 && c <= 0xD7FF);
}

bool is_cased_letter(char32_t c) {
    static constexpr char32_t ranges[][2] = {
        // clang-format off
        {'A', 'Z'}, {'a', 'z'}, {0xB5, 0xB5}, {0xC0, 0xD6}, {0xD8, 0xF6}, {0xF8, 0x1BA},
        {0x1BC, 0x1BF}, {0x1C4, 0x293}, {0x295, 0x2AF}, {0x370, 0x373}, {0x376, 0x377},
        {0x37B, 0x37D}, {0x37F, 0x37F}, {0x386, 0x386}, {0x388, 0x38A}, {0x38C, 0x38C},
        {0x38E, 0x3A1}, {0x3A3, 0x3F5}, {0x3F7, 0x481}, {0x48A, 0x52F}, {0x531, 0x556},
        {0x10A0, 0x10C5}, {0x13A0, 0x13F5}, {0x13F8, 0x13FD}, {0x1C90, 0x1CBA}, {0x1CBD, 0x1CBF},
        {0x1D00, 0x1D2B}, {0x1D6B, 0x1D77}, {0x1D79, 0x1D9A}, {0x1E00, 0x1F15}, {0x1F18, 0x1F1D},
        {0x1F20, 0x1F45}, {0x1F48, 0x1F4D}, {0x1F50, 0x1F57}, {0x1F59, 0x1F59}, {0x1F5B, 0x1F5B},
        {0x1F5D, 0x1F5D}, {0x1F5F, 0x1F7D}, {0x1F80, 0x1FB4}, {0x1FB6, 0x1FBC}, {0x1FBE, 0x1FBE},
        {0x1FC2, 0x1FC4}, {0x1FC6, 0x1FCC}, {0x1FD0, 0x1FD3}, {0x1FD6, 0x1FDB}, {0x1FE0, 0x1FEC},
        {0x1FF2, 0x1FF4}, {0x1FF6, 0x1FFC}, {0x2102, 0x2102}, {0x2107, 0x2107}, {0x210A, 0x2113},
        {0x2115, 0x2115}, {0x2119, 0x211D}, {0x2124, 0x2124}, {0x2126, 0x2126}, {0x2128, 0x2128},
        {0x212A, 0x212D}, {0x212F, 0x2134}, {0x2139, 0x2139}, {0x213C, 0x213F}, {0x2145, 0x2149},
        {0x214E, 0x214E}, {0x2183, 0x2184}, {0x2C00, 0x2C7B}, {0x2C7E, 0x2CE4}, {0x2CEB, 0x2CEE},
        {0x2CF2, 0x2CF3}, {0xA640, 0xA66D}, {0xA680, 0xA69B}, {0xA722, 0xA76F}, {0xA771, 0xA787},
        {0xA78B, 0xA78E}, {0xAB70, 0xABBF}, {0xFB00, 0xFB06}, {0xFB13, 0xFB17}, {0xFF21, 0xFF3A},
        {0xFF41, 0xFF5A}, {0x10400, 0x1044F}, {0x104B0, 0x104D3}, {0x104D8, 0x104FB},
        {0x10C80, 0x10CB2}, {0x10CC0, 0x10CF2}, {0x118A0, 0x118DF}, {0x1E900, 0x1E943},
        // clang-format on
    };
    return is_in(ranges, c);
}

bool is_common_punctuation(char32_t c) {
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '~') || (c >= 0xFF01 && c <= 0xFF0F) ||
           (c >= 0xFF1A && c <= 0xFF5E) || (c >= 0x2018 && c <= 0x201F) ||
           (c >= 0x3000 && c <= 0x3002);
}

// Cuts where Match, which gives 0 for no match, finds something, and what lies between.
template <size_t (*Match)(std::string_view text, size_t at)>
size_t cut_matches(std::string_view text, size_t at) {
    if (const size_t end = Match(text, at)) return end;
    do utf8_next(text, &at);
    while (at < text.size() && Match(text, at) == 0);
    return at;
}

// \s?Belongs+
template <bool (*Belongs)(char32_t)>
size_t spaced_match(std::string_view text, size_t at) {
    size_t first = at;
    const bool spaced = is_whitespace(utf8_next(text, &first));
    for (const size_t begin : {spaced ? first : at, at})
        if (const size_t end = belonging_end<Belongs>(text, begin); end > begin) return end;
    return 0;
}

// \s+$
size_t trailing_space(std::string_view text, size_t at) {
    size_t begin = at;
    for (size_t next = at; next < text.size();)
        if (!is_whitespace(utf8_next(text, &next))) begin = next;
    return begin > at ? begin : text.size();
}

// [ASCII punctuation][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|
// \s*[\r\n]+|\s+(?!\S)|\s+
// With lines_apart punctuation takes no line ends, and one that nothing stands before is alone.
template <bool lines_apart = false>
size_t deepseek3_match(std::string_view text, size_t at) {
    size_t first = at;
    const char32_t c = utf8_next(text, &first);
    const bool symbol = is_punctuation_or_symbol(c);
    if (symbol && c < 0x80) {
        size_t end = first;
        while (end < text.size() && unsigned(uint8_t(text[end]) | 0x20) - 'a' < 26) ++end;
        if (end > first) return end;
    }
    const bool skips = !symbol && !is_newline(c) && !is_letter(c);
    for (const size_t begin : {skips ? first : at, at})
        if (const size_t end = belonging_end<is_letter_or_mark>(text, begin); end > begin)
            return end;
    const size_t begin = c == ' ' ? first : at;
    const size_t end = belonging_end<is_punctuation_or_symbol>(text, begin);
    if (end > begin) return lines_apart ? end : skip_any(text, end, "\r\n");
    if (lines_apart && is_newline(c)) return first;
    if (lines_apart && is_whitespace(c)) return space_end(space_run(text, at), at);
    return is_whitespace(c) ? space_words(text, at) : 0;
}

// ---- steps of others ------------------------------------------------------------------------

// Cuts between characters that Kind calls by different names.
template <int (*Kind)(char32_t)>
size_t cut_kinds(std::string_view text, size_t at) {
    const int kind = Kind(utf8_next(text, &at));
    for (size_t next = at; next < text.size() && Kind(utf8_next(text, &next)) == kind;) at = next;
    return at;
}

int youtu_kind(char32_t c) {
    static constexpr char32_t punctuation[][2] = {
        {0x2014, 0x2014}, {0x2018, 0x2019}, {0x201C, 0x201D}, {0x2026, 0x2026}, {0x3001, 0x303F},
        {0xFE30, 0xFE4F}, {0xFF01, 0xFF01}, {0xFF0C, 0xFF0C}, {0xFF1A, 0xFF1B}};
    if ((c >= 0xAC00 && c <= 0xD7A3) || (c >= 0x3131 && c <= 0x318E)) return 1;
    if (c >= 0x3105 && c <= 0x312F) return 2;
    if (is_east_asian(c)) return 3;
    return is_in(punctuation, c) ? 4 : 0;
}

bool is_line_end(char32_t c) { return c == '\n'; }

// The wide ranges look unintended, but are what llama.cpp has of the model's.
bool is_afmoe_asian(char32_t c) {
    static constexpr char32_t ranges[][2] = {{0xE40, 0xEFF},   {0x1000, 0x109F}, {0x1100, 0x11FF},
                                             {0x1780, 0x17FF}, {0x2F00, 0x2FDF}, {0x3040, 0x30FF},
                                             {0x3400, 0x4DBF}, {0x4E00, 0xFAFF}, {0xFF65, 0xFF9F}};
    return is_in(ranges, c);
}

// What BLOOM's words are made of, by a set that was meant otherwise.
bool is_bloom_letter(char32_t c) {
    constexpr std::u32string_view others = U"(|.,!?)\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C";
    return others.find(c) == others.npos && !is_whitespace(c);
}

// ` ?Letter+`
size_t bloom_match(std::string_view text, size_t at) {
    const size_t begin = at + (text[at] == ' ');
    const size_t end = belonging_end<is_bloom_letter>(text, begin);
    return end > begin ? end : 0;
}

bool is_digit(char32_t c) { return category(c) == Category::Nd; }

template <bool (*Belongs)(char32_t)>
bool is_not(char32_t c) {
    return !Belongs(c);
}

size_t skip_characters(std::string_view text, size_t at, size_t count) {
    for (; count > 0 && at < text.size(); --count) utf8_next(text, &at);
    return at;
}

// (?=(Belongs{3})+(?!Belongs)) -- cuts before each place that a multiple of three digits follow.
// Behind the first cut three digits are one piece without counting those that follow again.
template <bool (*Belongs)(char32_t)>
size_t before_threes(std::string_view text, size_t at) {
    size_t next = at > 0 ? skip_characters(text, at, 3) : at;
    if (at > 0 && belonging_end<Belongs>(text.substr(next, 4), 0) > 0) return next;
    while (next < text.size()) {
        const size_t begin = belonging_end<is_not<Belongs>>(text, next);
        next = belonging_end<Belongs>(text, begin);
        const size_t count = utf8_count(text.substr(begin, next - begin));
        const size_t first = count % 3 > 0 || begin > at ? count % 3 : 3;
        if (count >= 3 && first < count) return skip_characters(text, begin, first);
    }
    return text.size();
}

// Whether \b holds behind a digit. To Oniguruma the numbers of Latin-1 belong to words.
bool ends_word(std::string_view behind) {
    static constexpr char32_t others[][2] = {
        {0xB2, 0xB3},       {0xB9, 0xB9},       {0xBC, 0xBE},      {0x24B6, 0x24E9},
        {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189}};
    size_t at = 0;
    const char32_t c = behind.empty() ? U' ' : utf8_next(behind, &at);
    return category(c) > Category::Nl && category(c) != Category::Pc && !is_in(others, c);
}

// \d{1,3}(?=(?:\d{3})*\b) -- first the digits that end a word, then in threes from the last
size_t ending_digits(std::string_view text, size_t at) {
    for (const size_t start = at; at < text.size();) {
        const size_t end = belonging_end<is_digit>(text, at);
        if (end > at && ends_word(text.substr(end))) return at > start ? at : end;
        at = belonging_end<is_not<is_digit>>(text, end);
    }
    return text.size();
}
size_t threes_of_digits(std::string_view text, size_t at) {
    const bool other = at == 0 && belonging_end<is_digit>(text, 0) < text.size();
    return other ? text.size() : before_threes<is_digit>(text, at);
}

// <sentinel:[0-9]+>
size_t sentinel_match(std::string_view text, size_t at) {
    constexpr std::string_view start = "<sentinel:";
    if (text.substr(at, start.size()) != start) return 0;
    const size_t end = skip_any(text, at + start.size(), "0123456789");
    return end > at + start.size() && end < text.size() && text[end] == '>' ? end + 1 : 0;
}

// IMGIMG[A-I]{1,4}Z
size_t picture_match(std::string_view text, size_t at) {
    constexpr std::string_view start = "IMGIMG";
    if (text.substr(at, start.size()) != start) return 0;
    const size_t end = skip_any(text, at + start.size(), "ABCDEFGHI");
    const size_t letters = end - at - start.size();
    return letters > 0 && letters < 5 && end < text.size() && text[end] == 'Z' ? end + 1 : 0;
}

// [\t\n]|    |  (four spaces, two)
size_t indent_match(std::string_view text, size_t at) {
    if (text[at] == '\t' || text[at] == '\n') return at + 1;
    if (text.substr(at, 4) == "    ") return at + 4;
    return text.substr(at, 2) == "  " ? at + 2 : 0;
}

// ---- steps of Falcon ------------------------------------------------------------------------

bool is_falcon_punctuation(char32_t c) { return is_punctuation(c) || (c < 0x80 && is_symbol(c)); }
bool is_default_punctuation(char32_t c) { return is_falcon_punctuation(c) && c != '`'; }

// What the printable alphabet of GPT-2 shows as numbers, since Falcon looks there: the ASCII digits
// and the bytes that are superscripts and fractions in Latin-1.
bool is_number_byte(char byte) {
    const uint8_t c = uint8_t(byte);
    return (c >= '0' && c <= '9') || c == 0xB2 || c == 0xB3 || c == 0xB9 ||
           (c >= 0xBC && c <= 0xBE);
}

size_t number_bytes(std::string_view text, size_t at) {
    const bool inside = is_number_byte(text[at]);
    while (++at < text.size() && is_number_byte(text[at]) == inside) {}
    return at;
}

// [0-9][0-9][0-9]
size_t digit_triples(std::string_view text, size_t at) {
    const auto triple = [&](size_t begin) {
        size_t end = begin;
        while (end < text.size() && end - begin < 3 && text[end] >= '0' && text[end] <= '9') ++end;
        return end - begin == 3;
    };
    if (triple(at)) return at + 3;
    do ++at;
    while (at < text.size() && !triple(at));
    return at;
}

// ---- rows -----------------------------------------------------------------------------------

constexpr SplitStep each_number = cut_out<is_number, 1>;
constexpr SplitStep each_newline = cut_out<is_newline, 1>;
constexpr SplitStep llama3_words = modern_words<digits_in_threes>;
constexpr SplitStep qwen2_words = modern_words<digits_apart>;
constexpr SplitStep o200k_words = cased_words<o200k_style>;

// What the tokenizers do that the models' makers published: where llama.cpp splits otherwise (marks
// in gpt-4o and tekken, numbers in falcon and deepseek-llm, composition) they are followed. A new
// pre-tokenizer is one more row and, if it splits as none of these does, a step.
constexpr PreTokenizer pre_tokenizers[] = {
    // clang-format off
    // names, {steps}, compose, whole_words, add_bos, add_eos
    {"default", {cut_out<is_default_punctuation>, gpt2_words, cut_out<is_number>, digit_triples},
     false, false, false},
    {"gpt-2 phi-2 exaone4 jais trillion granite-docling gigachat a.x-4.0 mellum "
     "jina-es jina-de jina-v2-es jina-v2-de", {gpt2_words}, false, false, false},
    {"roberta-bpe jina-v1-en jina-v2-code", {gpt2_words}, false, false, true, true},
    {"mpt olmo modern-bert", {gpt2_words}, true, false, false},
    {"smollm starcoder refact granite codeshell exaone minerva-7b mellum2", {each_number, gpt2_words},
     false, false, false},
    {"command-r", {each_number, gpt2_words}, true, false, false},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     {llama3_words}, false, true, true},
    {"smaug-bpe dbrx chatglm-bpe glm4 glm5", {llama3_words}, false, true, false},
    {"minicpm5", {cut_out<is_number, 3>, modern_words<digits_together>}, false, true, false},
    {"qwen2 deepseek-r1-qwen megrez kormo f2llmv2", {qwen2_words}, true, false, false},
    {"stablelm2 hunyuan", {qwen2_words}, true, true, false},
    {"bailingmoe bailingmoe2 llada-moe solar-open grok-2", {qwen2_words}, false, false, false},
    {"jais-2", {modern_words<spaces_in_powers>}, false, false, false},
    {"laguna", {cut_out<is_line_end>, qwen2_words}, false, false, false},
    {"ufakzeka", {modern_words<no_contractions>}, false, false, false},
    {"exaone-moe", {phrases}, false, false, false},
    {"qwen35", {modern_words<marks_join>}, true, false, false},
    {"seed-coder", {modern_words<no_tail>}, false, false, false},
    {"gpt-4o o200k llama4 kanana2 talkie granite-embed-multi-97m", {o200k_words}, false, true, false},
    {"minimax minimax-m2", {o200k_words}, false, false, false},
    {"tekken", {cased_words<tekken_style>}, false, true, true},
    {"kimi-k2", {cased_words<kimi_style>}, false, false, false},
    {"youtu", {cut_kinds<youtu_kind>, cased_words<youtu_style>}, false, true, false},
    {"tiny_aya cohere2moe", {ending_digits, threes_of_digits, o200k_words}, false, false, false},
    {"deepseek-llm", {each_newline, cut_matches<spaced_match<is_cased_letter>>,
     cut_matches<spaced_match<is_common_punctuation>>, trailing_space, cut_out<is_asian>,
     each_number}, false, false, false},
    {"deepseek-coder", {each_newline, cut_matches<spaced_match<is_letter>>,
     cut_matches<spaced_match<is_punctuation>>, cut_out<is_asian>, each_number},
     false, false, false},
    {"deepseek-v3 hunyuan-dense joyai-llm hy_v4", {cut_out<is_number, 3>, cut_out<is_east_asian>,
     cut_matches<deepseek3_match<>>}, false, false, false},
    {"spark2_5", {cut_out<is_number, 3>, cut_out<is_east_asian>,
     cut_matches<deepseek3_match<true>>, each_number}, false, false, false},
    {"afmoe", {cut_out<is_number>, before_threes<is_number>, cut_out<is_afmoe_asian>,
     cut_matches<deepseek3_match<>>}, false, false, false},
    {"superbpe", {cut_out<is_number>, before_threes<is_digit>}, false, false, false},
    {"bloom poro-chat gpt3-finnish", {cut_matches<bloom_match>}, false, false, false},
    {"viking", {cut_matches<bloom_match>, each_number}, false, false, false},
    {"chameleon", {cut_matches<sentinel_match>, cut_matches<picture_match>,
     cut_matches<indent_match>, each_number, cut_out<is_falcon_punctuation, 1>, gpt2_words},
     false, false, true},
    {"falcon", {cut_out<is_falcon_punctuation>, gpt2_words, number_bytes, digit_triples},
     false, false, false},
    // clang-format on
};

}  // namespace

bool has_name(std::string_view names, std::string_view name) {
    for (size_t at = 0; at < names.size();) {
        const size_t end = std::min(names.find(' ', at), names.size());
        if (names.substr(at, end - at) == name) return true;
        at = end + 1;
    }
    return false;
}

const PreTokenizer* find_pre_tokenizer(std::string_view name) {
    for (const PreTokenizer& row : pre_tokenizers)
        if (has_name(row.names, name)) return &row;
    return nullptr;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

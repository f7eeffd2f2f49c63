// The pre-tokenizers: a row each, by the names in tokenizer.ggml.pre.
#include "prologue.hpp"

#include "tokenizer/split.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
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

struct ModernStyle {
    size_t digits = 1;               // in one word, at most
    bool marks_join = false;         // a word of letters may hold combining marks
    std::string_view tail = "\r\n";  // what joins punctuation before it
};
inline constexpr ModernStyle digits_apart, digits_in_threes{3}, digits_together{SIZE_MAX},
    marks_join{1, true}, no_tail{1, false, ""};

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
// ` ?[^\s\p{L}\p{N}]+[tail]*|\s*[\r\n]+|\s+(?!\S)|\s+`
template <const ModernStyle& style>
size_t modern_words(std::string_view text, size_t at) {
    constexpr bool marks = style.marks_join;
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), true)) return at + length;
    const SplitChar c = split_char<marks>(text, at), next = split_char<marks>(text, c.next);
    if (c.what == SplitClass::letter) return run_end<marks>(text, at, SplitClass::letter);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, style.digits);
    if (next.what == SplitClass::letter && c.what != SplitClass::newline)
        return run_end<marks>(text, c.next, SplitClass::letter);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other))
        return skip_any(text, run_end<marks>(text, c.next, SplitClass::other), style.tail);
    return space_words(text, at);
}

// [upper]*[lower]+, else [upper]+ -- where both sets hold Lm, Lo and marks, upper Lu and Lt too,
// and lower Ll. `at` itself: there is no such word.
struct CasedWord {
    size_t end;
    bool has_lower;
};

CasedWord cased_word(std::string_view text, size_t at) {
    CasedWord word = {at, false};
    size_t shared_end = 0;  // behind the last of [upper] that is of [lower] too
    for (size_t next = at; word.end < text.size(); word.end = next) {
        const Category kind = category(utf8_next(text, &next));
        if (kind > Category::Me || kind == Category::Ll) break;
        if (kind >= Category::Lm) shared_end = next;
    }
    const size_t upper_end = word.end;
    for (size_t next = upper_end; word.end < text.size(); word.end = next) {
        const Category kind = category(utf8_next(text, &next));
        if (kind != Category::Ll && (kind < Category::Lm || kind > Category::Me)) break;
    }
    if (word.end > upper_end) return {word.end, true};
    return shared_end ? CasedWord{shared_end, true} : word;
}

// [^\r\n\p{L}\p{N}]?cased -- a word with a lower letter goes before one without. 0: no match.
size_t cased_word_end(std::string_view text, size_t at) {
    const SplitChar c = split_char(text, at);
    if (c.what == SplitClass::letter) return cased_word(text, at).end;
    if (c.what == SplitClass::number || c.what == SplitClass::newline) return 0;
    const CasedWord behind = cased_word(text, c.next);
    if (behind.has_lower) return behind.end;
    const CasedWord here = cased_word(text, at);  // it begins with a mark
    if (here.has_lower) return here.end;
    return behind.end > c.next ? behind.end : 0;
}

// cased_word_end(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|
// ` \s*[\r\n]+|\s+(?!\S)|\s+`
template <size_t digits, bool contractions>
size_t cased_words(std::string_view text, size_t at) {
    if (const size_t end = cased_word_end(text, at)) {
        const bool apostrophe = contractions && end < text.size() && text[end] == '\'';
        return end + (apostrophe ? contraction_length(text.substr(end), true) : 0);
    }
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, digits);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other))
        return skip_any(text, run_end(text, c.next, SplitClass::other), "\r\n/");
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
    static constexpr char16_t ranges[][2] = {
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
        {0xFF41, 0xFF5A},
        // clang-format on
    };
    for (const auto& range : ranges)
        if (c <= range[1]) return c >= range[0];
    return (c >= 0x10400 && c <= 0x1044F) || (c >= 0x104B0 && c <= 0x104D3) ||
           (c >= 0x104D8 && c <= 0x104FB) || (c >= 0x10C80 && c <= 0x10CB2) ||
           (c >= 0x10CC0 && c <= 0x10CF2) || (c >= 0x118A0 && c <= 0x118DF) ||
           (c >= 0x1E900 && c <= 0x1E943);
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

template <bool (*Belongs)(char32_t)>
size_t belonging_end(std::string_view text, size_t at) {
    for (size_t next = at; next < text.size() && Belongs(utf8_next(text, &next));) at = next;
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
    if (end > begin) return skip_any(text, end, "\r\n");
    return is_whitespace(c) ? space_words(text, at) : 0;
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
constexpr SplitStep o200k_words = cased_words<3, true>;

// What the tokenizers do that the models' makers published: where llama.cpp splits otherwise (marks
// in gpt-4o and tekken, numbers in falcon and deepseek-llm, composition) they are followed. A new
// pre-tokenizer is one more row and, if it splits as none of these does, a step.
constexpr PreTokenizer pre_tokenizers[] = {
    // clang-format off
    // names, {steps}, compose, whole_words, add_bos
    {"default", {cut_out<is_default_punctuation>, gpt2_words, cut_out<is_number>, digit_triples},
     false, false, false},
    {"gpt-2 phi-2 exaone4 jais trillion granite-docling gigachat a.x-4.0 mellum roberta-bpe "
     "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code", {gpt2_words},
     false, false, false},
    {"mpt olmo modern-bert", {gpt2_words}, true, false, false},
    {"smollm starcoder refact granite codeshell exaone minerva-7b mellum2", {each_number, gpt2_words},
     false, false, false},
    {"command-r", {each_number, gpt2_words}, true, false, false},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     {llama3_words}, false, true, true},
    {"smaug-bpe dbrx chatglm-bpe glm4", {llama3_words}, false, true, false},
    {"minicpm5", {cut_out<is_number, 3>, modern_words<digits_together>}, false, true, false},
    {"qwen2 deepseek-r1-qwen megrez kormo f2llmv2", {qwen2_words}, true, false, false},
    {"stablelm2 hunyuan", {qwen2_words}, true, true, false},
    {"bailingmoe bailingmoe2 llada-moe solar-open grok-2", {qwen2_words}, false, false, false},
    {"qwen35", {modern_words<marks_join>}, true, false, false},
    {"seed-coder", {modern_words<no_tail>}, false, false, false},
    {"gpt-4o o200k llama4 kanana2 talkie", {o200k_words}, false, true, false},
    {"minimax minimax-m2", {o200k_words}, false, false, false},
    {"tekken", {cased_words<1, false>}, false, true, true},
    {"deepseek-llm", {each_newline, cut_matches<spaced_match<is_cased_letter>>,
     cut_matches<spaced_match<is_common_punctuation>>, trailing_space, cut_out<is_asian>,
     each_number}, false, false, false},
    {"deepseek-coder", {each_newline, cut_matches<spaced_match<is_letter>>,
     cut_matches<spaced_match<is_punctuation>>, cut_out<is_asian>, each_number},
     false, false, false},
    {"deepseek-v3 hunyuan-dense joyai-llm hy_v4", {cut_out<is_number, 3>, cut_out<is_east_asian>,
     cut_matches<deepseek3_match>}, false, false, false},
    {"falcon", {cut_out<is_falcon_punctuation>, gpt2_words, number_bytes, digit_triples},
     false, false, false},
    // clang-format on
};

bool has_name(std::string_view names, std::string_view name) {
    for (size_t at = 0; at < names.size();) {
        const size_t end = std::min(names.find(' ', at), names.size());
        if (names.substr(at, end - at) == name) return true;
        at = end + 1;
    }
    return false;
}

}  // namespace

const PreTokenizer* find_pre_tokenizer(std::string_view name) {
    for (const PreTokenizer& row : pre_tokenizers)
        if (has_name(row.names, name)) return &row;
    return nullptr;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

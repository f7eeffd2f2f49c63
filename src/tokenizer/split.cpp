// The pre-tokenizers: a row each, by the names in tokenizer.ggml.pre.
#include "prologue.hpp"

#include "tokenizer/split.hpp"
#include "unicode_internal.hpp"

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

SplitClass split_class(char32_t c) {
    if (c == '\r' || c == '\n') return SplitClass::newline;
    if (is_letter(c)) return SplitClass::letter;
    if (is_number(c)) return SplitClass::number;
    return is_whitespace(c) ? SplitClass::space : SplitClass::other;
}

SplitChar split_char(std::string_view text, size_t at) {
    if (at >= text.size()) return {SplitClass::end, at};
    const uint8_t c = uint8_t(text[at]);
    if (c < 0x80) {
        if (unsigned(c | 0x20) - 'a' < 26) return {SplitClass::letter, at + 1};
        if (unsigned(c) - '0' < 10) return {SplitClass::number, at + 1};
        if (c > ' ') return {SplitClass::other, at + 1};
    }
    const char32_t code_point = utf8_next(text, &at);
    return {split_class(code_point), at};
}

size_t run_end(std::string_view text, size_t at, SplitClass what, size_t most = SIZE_MAX) {
    SplitChar c = split_char(text, at);
    for (; c.what == what && most > 0; --most) c = split_char(text, at = c.next);
    return at;
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

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
// ` ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
template <size_t digits>
size_t modern_words(std::string_view text, size_t at) {
    if (text[at] == '\'')
        if (const size_t length = contraction_length(text.substr(at), true)) return at + length;
    const SplitChar c = split_char(text, at), next = split_char(text, c.next);
    if (c.what == SplitClass::letter) return run_end(text, at, SplitClass::letter);
    if (c.what == SplitClass::number) return run_end(text, at, SplitClass::number, digits);
    if (next.what == SplitClass::letter && c.what != SplitClass::newline)
        return run_end(text, c.next, SplitClass::letter);
    if (c.what == SplitClass::other || (text[at] == ' ' && next.what == SplitClass::other)) {
        size_t end = run_end(text, c.next, SplitClass::other);
        while (end < text.size() && (text[end] == '\r' || text[end] == '\n')) ++end;
        return end;
    }
    const SpaceRun run = space_run(text, at);
    return run.line_end ? run.line_end : space_end(run, at);
}

// A new pre-tokenizer is one more row and, if it splits as none of these does, a step.
constexpr PreTokenizer pre_tokenizers[] = {
    // clang-format off
    // name       steps                                  compose  whole_words  add_bos
    {"gpt-2",     {gpt2_words},                          false,   false,       false},
    {"smollm",    {cut_out<is_number, 1>, gpt2_words},   false,   false,       false},
    {"llama-bpe", {modern_words<3>},                     false,   true,        true},
    {"qwen2",     {modern_words<1>},                     true,    false,       false},
    // clang-format on
};

}  // namespace

const PreTokenizer* find_pre_tokenizer(std::string_view name) {
    for (const PreTokenizer& row : pre_tokenizers)
        if (row.name == name) return &row;
    return nullptr;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

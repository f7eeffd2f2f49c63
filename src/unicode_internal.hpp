// >>unicode
// Owns: UTF-8, character classes, simple case mapping, canonical composition (NFC).
// Assumes: nothing about its input; malformed bytes are a value (`bad_utf8`), not an error.
// Promises: Unicode 14.0.0, from the generated table in the implementation; no locale.
#pragma once

#include "base/internal.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// What utf8_next gives for bytes that are not UTF-8. No code point has this value.
inline constexpr char32_t bad_utf8 = 0x110000;

/// The code point at text[*at], at < size; moves *at behind it. Malformed: gives bad_utf8 and moves
/// behind the maximal subpart (Unicode 3.9, table 3-8), at least one byte.
char32_t utf8_next(std::string_view text, size_t* at);
void utf8_append(std::string& out, char32_t code_point);  ///< not a scalar value: U+FFFD
bool utf8_valid(std::string_view text);
/// Length of the longest valid prefix; text.size() when all of it is UTF-8.
size_t utf8_valid_prefix(std::string_view text);
/// Bytes at the end that begin a code point and wait for the rest of it: 0 to 3.
size_t utf8_incomplete_suffix(std::string_view text);
/// Code points; a malformed subpart counts as one.
size_t utf8_count(std::string_view text);
std::string utf8_repair(std::string_view text);  ///< each malformed subpart becomes U+FFFD

// Of valid UTF-8, where a byte alone tells whether a code point begins:
inline bool utf8_begins(char c) { return (uint8_t(c) & 0xc0) != 0x80; }
/// Where code point `index` begins; text.size() when there are fewer.
size_t utf8_offset(std::string_view text, size_t index);
/// Where the code point before `at` begins; at > 0.
size_t utf8_previous(std::string_view text, size_t at);

/// General categories, in the order of their groups: the comparisons below rely on it.
enum class Category : uint8_t {
    // clang-format off
    Lu, Ll, Lt, Lm, Lo,          // letters
    Mn, Mc, Me,                  // marks
    Nd, Nl, No,                  // numbers
    Pc, Pd, Ps, Pe, Pi, Pf, Po,  // punctuation
    Sm, Sc, Sk, So,              // symbols
    Zs, Zl, Zp,                  // separators
    Cc, Cf, Cs, Co, Cn,          // others; bad_utf8 and whatever is not assigned: Cn
    // clang-format on
};

Category category(char32_t c);
inline bool is_letter(char32_t c) { return category(c) <= Category::Lo; }
inline bool is_mark(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Mn) < 3; }
inline bool is_number(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Nd) < 3; }
inline bool is_punctuation(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Pc) < 7; }
inline bool is_symbol(char32_t c) { return uint8_t(category(c)) - unsigned(Category::Sm) < 4; }
bool is_whitespace(char32_t c);  ///< the property White_Space

char32_t to_lower(char32_t c);  ///< simple mappings: always one code point
char32_t to_upper(char32_t c);
std::string to_lower(std::string_view text);  ///< malformed bytes are kept as they are
std::string to_upper(std::string_view text);

/// Normalization form C (UAX 15). Malformed bytes are kept as they are.
std::string nfc(std::string_view text);
std::string nfd(std::string_view text);  ///< form D, the canonical decomposition

}  // namespace detail
}  // namespace v1
}  // namespace valar

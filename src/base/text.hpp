// The one copy of each small text helper.
#pragma once

#include "base/base.hpp"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// Without the spaces and tabs at both ends.
std::string_view trim(std::string_view text);
/// A to Z in lower case; all other bytes as they are.
inline char ascii_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }
std::string ascii_lower(std::string_view text);
/// 0 to 15, or -1 for what is no hex digit.
int hex_value(char c);
/// Of what came from outside, for a message or a log line: one word, no control characters, no
/// quotes, at most so many bytes of it and then "...".
std::string printable(std::string_view text, size_t most_bytes = 200);
/// All of them behind one another, with one allocation.
std::string join(std::initializer_list<std::string_view> parts);

/// A moment in the proleptic Gregorian calendar, UTC.
struct CivilTime {
    int64_t year;
    int month, day;  // from 1
    int hour, minute, second;
    int weekday;   // 0: Sunday
    int year_day;  // from 1
};
/// Howard Hinnant's civil_from_days ("chrono-Compatible Low-Level Date Algorithms"); from 1970 on.
CivilTime civil_time(int64_t unix_seconds);

}  // namespace detail
}  // namespace v1
}  // namespace valar

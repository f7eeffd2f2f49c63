#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/text.hpp"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

std::string_view trim(std::string_view text) {
    const auto space = [](char c) { return c == ' ' || c == '\t'; };
    while (!text.empty() && space(text.front())) text.remove_prefix(1);
    while (!text.empty() && space(text.back())) text.remove_suffix(1);
    return text;
}

std::string ascii_lower(std::string_view text) {
    std::string lower(text);
    for (char& c : lower) c = ascii_lower(c);
    return lower;
}

int hex_value(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    const char lower = ascii_lower(c);
    return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

std::string printable(std::string_view text, size_t most_bytes) {
    std::string shown;
    for (const char c : text.substr(0, most_bytes)) {
        const bool plain = c > ' ' && c < 0x7f && c != '"' && c != '\\';
        shown += plain ? std::string(1, c) : format("\\x%02x", static_cast<unsigned char>(c));
    }
    return text.size() > most_bytes ? shown + "..." : shown;
}

std::string join(std::initializer_list<std::string_view> parts) {
    size_t size = 0;
    for (const std::string_view part : parts) size += part.size();
    std::string all;
    all.reserve(size);
    for (const std::string_view part : parts) all += part;
    return all;
}

CivilTime civil_time(int64_t unix_seconds) {
    const int64_t days = unix_seconds / 86400;
    const int second = static_cast<int>(unix_seconds % 86400);
    const int64_t from_march = days + 719468, era = from_march / 146097;
    const int64_t day_of_era = from_march % 146097;
    const int64_t leap_days = day_of_era / 1460 - day_of_era / 36524 + day_of_era / 146096;
    const int64_t year_of_era = (day_of_era - leap_days) / 365;
    const int day_of_year = static_cast<int>(day_of_era - 365 * year_of_era - year_of_era / 4 +
                                             year_of_era / 100);  // from the first of March
    const int month_from_march = (5 * day_of_year + 2) / 153;
    const int month = month_from_march < 10 ? month_from_march + 3 : month_from_march - 9;
    const int day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    const int64_t year = year_of_era + era * 400 + (month <= 2);
    const bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    const int year_day = month > 2 ? day_of_year + 60 + leap : day_of_year - 305;
    const int weekday = static_cast<int>((days + 4) % 7);
    return {year, month, day, second / 3600, second / 60 % 60, second % 60, weekday, year_day};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

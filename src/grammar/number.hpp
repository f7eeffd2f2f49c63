// Numbers between bounds, compared digit by digit.
#pragma once

#include "grammar/dfa.hpp"
#include "json.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// Digits without leading and trailing zeros: 0.50 is "", "5".
struct ExactDecimal {
    bool negative = false;
    std::string whole, fraction;
    static ExactDecimal of(const Json& number);
    bool is_zero() const { return whole.empty() && fraction.empty(); }
    bool is_integer() const { return fraction.empty(); }
    std::string text() const;
};
int compare(const ExactDecimal& a, const ExactDecimal& b);

/// units / 10^digits.
struct Divisor {
    uint32_t units, digits;
    static constexpr uint32_t most_units = 20'000, most_digits = 9;
    static std::optional<Divisor> of(const Json& number);  ///< none: not positive, or too long
    /// Whether quotients of doubles are exact, as other validators compute them.
    bool is_binary() const;
    bool divides(const ExactDecimal& number) const;
    /// The remainder in units after one digit more, `at` places behind the point: `units` for good
    /// where it cannot be a multiple any more.
    uint32_t next(uint32_t remainder, char digit, uint32_t at = 0) const {
        if (remainder == units || at > digits) return digit == '0' ? remainder : units;
        return uint32_t((uint64_t(remainder) * 10 + uint64_t(digit - '0')) % units);
    }
    bool ends(uint32_t remainder, uint32_t at) const;  ///< a multiple, with so many places
};

struct NumberBound {
    ExactDecimal value;
    bool exclusive = false;
};
struct NumberRules {
    bool integers = true, fractions = true;  // 1.0 counts as an integer and is spelled 1
    std::optional<NumberBound> lower, upper;
    std::vector<Divisor> multiples = {};      // of all of these
    std::vector<Divisor> not_multiples = {};  // of none of these
    std::vector<ExactDecimal> excluded = {};
};
/// A number has at most so many characters, so that its value is finite in every reader.
inline constexpr uint32_t most_number_chars = 120;
Result<DfaPtr> number_dfa(const NumberRules& rules, Budget& budget);

}  // namespace detail
}  // namespace v1
}  // namespace valar

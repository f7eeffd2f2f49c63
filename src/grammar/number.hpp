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

struct NumberBound {
    ExactDecimal value;
    bool exclusive = false;
};
struct NumberRules {
    bool integers = true, fractions = true;  // 1.0 counts as an integer and is spelled 1
    std::optional<NumberBound> lower, upper;
    std::vector<uint32_t> multiples = {};      // of all of these
    std::vector<uint32_t> not_multiples = {};  // of none of these
    std::vector<ExactDecimal> excluded = {};
};
/// A number has at most so many characters, so that its value is finite in every reader.
inline constexpr uint32_t most_number_chars = 120;
Result<DfaPtr> number_dfa(const NumberRules& rules, Budget& budget);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>grammar
#include "prologue.hpp"

#include "grammar/number.hpp"

#include "json_internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

int compare_digits(const std::string& a, const std::string& b) {
    const int order = a.compare(b);
    return order < 0 ? -1 : order > 0;
}

int compare_magnitude(const ExactDecimal& a, const ExactDecimal& b) {
    if (a.whole.size() != b.whole.size()) return a.whole.size() < b.whole.size() ? -1 : 1;
    if (const int order = compare_digits(a.whole, b.whole)) return order;
    return compare_digits(a.fraction, b.fraction);
}

enum Order : uint32_t { less, equal, greater };

// How a magnitude, read digit by digit, stands to a constant. Key: digits read (of the whole, then
// of the fraction), order so far.
struct Comparison {
    const ExactDecimal* constant;
    using At = std::array<uint32_t, 2>;
    At whole_digit(At at, char digit) const {
        const uint32_t size = uint32_t(constant->whole.size());
        if (at[0] < size && at[1] == equal && digit != constant->whole[at[0]])
            at[1] = digit < constant->whole[at[0]] ? less : greater;
        if (++at[0] > size) at = {size + 1, greater};
        return at;
    }
    At whole_end(At at) const {
        const uint32_t size = uint32_t(constant->whole.size());
        return {0, at[0] < size ? less : at[0] > size ? greater : at[1]};
    }
    At fraction_digit(At at, char digit) const {
        if (at[1] != equal) return {0, at[1]};
        const std::string& digits = constant->fraction;
        const char other = at[0] < digits.size() ? digits[at[0]] : '0';
        if (digit != other) return {0, digit < other ? less : greater};
        return {std::min(at[0] + 1, uint32_t(digits.size())), equal};
    }
    Order end(At at) const {
        return at[1] == equal && at[0] < constant->fraction.size() ? less : Order(at[1]);
    }
};

// What is divided by a fraction has no more digits than a double keeps, for readers that divide those.
constexpr uint32_t kMostWhole = 12;

// Key: phase, sign (1 negative, 2 and a zero before the point), nonzero fraction, digits (of the
// whole, then of the fraction) as far as divisors ask for them, two comparisons, remainders.
class NumberMachine : public Machine {
public:
    explicit NumberMachine(const NumberRules& rules) : rules_(rules) {
        ByteClasses cuts;
        for (unsigned b = '0'; b <= '9'; ++b) cuts.add(uint8_t(b), uint8_t(b));
        for (const char c : std::string_view("-+.eE")) cuts.add(uint8_t(c), uint8_t(c));
        cuts.set(*this);
        for (const Divisor& d : rules.multiples) divisors_.push_back(d);
        for (const Divisor& d : rules.not_multiples) divisors_.push_back(d);
        for (const Divisor& d : divisors_) most_places_ = std::max(most_places_, d.digits + 1);
        bounded_ = rules.lower || rules.upper || !rules.integers || !divisors_.empty() ||
                   !rules.excluded.empty();
    }
    Key first() override {
        Key key = {begin, 0, 0, 0, 0, equal, 0, equal};
        key.resize(key.size() + divisors_.size());
        return key;
    }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        to = from;
        const char c = char(byte);
        const bool digit = c >= '0' && c <= '9';
        switch (from[phase]) {
            case begin:
                if (c == '-') return to[phase] = minus, to[sign] = 1, true;
                [[fallthrough]];
            case minus:
                if (c == '0') return to[phase] = zero, to[sign] *= 2, true;
                if (!digit) return false;
                to[phase] = whole;
                return take_whole(to, c);
            case whole:
                if (digit) return take_whole(to, c);
                [[fallthrough]];
            case zero:
                if (c == '.' && rules_.fractions) {
                    to[phase] = dot, to[places] = 0;
                    each(to, [&](const Comparison& cmp, Comparison::At at) {
                        return cmp.whole_end(at);
                    });
                    return true;
                }
                return begin_exponent(to, c);
            case dot:
            case fraction:
                if (!digit) return from[phase] == fraction && begin_exponent(to, c);
                to[phase] = fraction;
                to[nonzero] |= uint32_t(c != '0');
                to[places] = std::min(to[places] + 1, most_places_);
                for (size_t i = 0; i < divisors_.size(); ++i) {
                    uint32_t& rest = to[first_remainder + i];
                    rest = divisors_[i].next(rest, c, to[places]);
                }
                each(to, [&](const Comparison& cmp, Comparison::At at) {
                    return cmp.fraction_digit(at, c);
                });
                return true;
            case exponent:
                if (c == '-' || c == '+') return to[phase] = exponent_sign, true;
                [[fallthrough]];
            case exponent_sign: return digit ? (to[phase] = exponent_digit, true) : false;
            case exponent_digit: return digit ? (to[phase] = exponent_end, true) : false;
        }
        return false;
    }
    int32_t label(const Key& key) override {
        const uint32_t p = key[phase];
        if (p == exponent_digit || p == exponent_end) return 0;
        if (p != zero && p != whole && p != fraction) return -1;
        if (!rules_.integers && !key[nonzero]) return -1;
        if (!is_in_bounds(key)) return -1;
        for (size_t i = 0; i < divisors_.size(); ++i) {
            const bool divides = divisors_[i].ends(key[first_remainder + i],
                                                   p == fraction ? key[places] : 0);
            if (divides != (i < rules_.multiples.size())) return -1;
        }
        return 0;
    }

private:
    enum : size_t {
        phase,
        sign,
        nonzero,
        places,
        lower_at,
        upper_at = lower_at + 2,
        first_remainder = upper_at + 2
    };
    enum : uint32_t {
        begin,
        minus,
        zero,
        whole,
        dot,
        fraction,
        exponent,
        exponent_sign,
        exponent_digit,
        exponent_end
    };
    // Of a negative number the magnitude is held against the bounds the other way round.
    template <class Move>
    void each(Key& key, const Move& move) const {
        const auto one = [&](const std::optional<NumberBound>& bound, size_t at) {
            if (!bound || bound->value.negative != bool(key[sign])) return;
            const auto next = move(Comparison{&bound->value}, Comparison::At{key[at], key[at + 1]});
            key[at] = next[0], key[at + 1] = next[1];
        };
        one(rules_.lower, lower_at);
        one(rules_.upper, upper_at);
    }
    bool take_whole(Key& key, char c) const {
        if (most_places_ > 1 && ++key[places] > kMostWhole) return false;
        each(key, [&](const Comparison& cmp, Comparison::At at) { return cmp.whole_digit(at, c); });
        for (size_t i = 0; i < divisors_.size(); ++i) {
            uint32_t& rest = key[first_remainder + i];
            rest = divisors_[i].next(rest, c);
        }
        return true;
    }
    bool begin_exponent(Key& key, char c) const {
        if ((c != 'e' && c != 'E') || bounded_ || !rules_.fractions) return false;
        key.assign(key.size(), 0);
        key[phase] = exponent;
        return true;
    }
    // The number against a bound: by sign, else by magnitude.
    int against(const Key& key, const NumberBound& bound, size_t at) const {
        const bool negative = key[sign];
        if (bound.value.negative != negative) return negative ? -1 : 1;  // zero is never negative
        const Comparison cmp{&bound.value};
        Comparison::At now = {key[at], key[at + 1]};
        if (key[phase] != fraction) now = cmp.whole_end(now);
        const int order = int(cmp.end(now)) - 1;
        return negative ? -order : order;
    }
    bool is_in_bounds(const Key& key) const {
        if (rules_.lower) {
            const int order = against(key, *rules_.lower, lower_at);
            if (order < 0 || (order == 0 && rules_.lower->exclusive)) return false;
        }
        if (rules_.upper) {
            const int order = against(key, *rules_.upper, upper_at);
            if (order > 0 || (order == 0 && rules_.upper->exclusive)) return false;
        }
        return key[sign] != 2 || key[nonzero] ||
               (!bounded_ && rules_.fractions);  // else no negative zero
    }
    const NumberRules& rules_;
    std::vector<Divisor> divisors_;
    uint32_t most_places_ = 0;
    bool bounded_;
};

// The spellings of one number, without exponents.
class ExactNumber : public Machine {
public:
    explicit ExactNumber(const ExactDecimal& value) : text_(value.text()) {
        point_ = text_.find('.');
        ByteClasses cuts;
        for (const char c : text_ + ".0") cuts.add(uint8_t(c), uint8_t(c));
        cuts.set(*this);
    }
    Key first() override { return {0}; }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        to = {from[0] + 1};
        if (from[0] < text_.size()) return uint8_t(text_[from[0]]) == byte;
        if (point_ == text_.npos && from[0] == text_.size()) return byte == '.';
        to = from;
        return byte == '0';
    }
    int32_t label(const Key& key) override { return key[0] >= text_.size() ? 0 : -1; }

private:
    std::string text_;
    size_t point_;
};

}  // namespace

ExactDecimal ExactDecimal::of(const Json& number) {
    const std::string text = number.is_real() ? write_double(number.as_double()) : number.write();
    ExactDecimal out;
    int exponent = 0;
    bool behind = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '-') out.negative = true;
        else if (c == '.') behind = true;
        else if (c == 'e') exponent = std::atoi(text.c_str() + i + 1), i = text.size();
        else (behind ? out.fraction : out.whole) += c;
    }
    for (; exponent > 0; --exponent) {
        out.whole += out.fraction.empty() ? '0' : out.fraction[0];
        if (!out.fraction.empty()) out.fraction.erase(0, 1);
    }
    for (; exponent < 0; ++exponent) {
        out.fraction.insert(out.fraction.begin(), out.whole.empty() ? '0' : out.whole.back());
        if (!out.whole.empty()) out.whole.pop_back();
    }
    out.whole.erase(0, std::min(out.whole.find_first_not_of('0'), out.whole.size()));
    out.fraction.erase(out.fraction.find_last_not_of('0') + 1);
    if (out.is_zero()) out.negative = false;
    return out;
}

std::string ExactDecimal::text() const {
    std::string out = negative ? "-" : "";
    out += whole.empty() ? "0" : whole;
    return fraction.empty() ? out : out + "." + fraction;
}

int compare(const ExactDecimal& a, const ExactDecimal& b) {
    if (a.negative != b.negative) return a.negative ? -1 : 1;
    const int order = compare_magnitude(a, b);
    return a.negative ? -order : order;
}

std::optional<Divisor> Divisor::of(const Json& number) {
    const ExactDecimal value = ExactDecimal::of(number);
    const std::string text = value.whole + value.fraction;
    const size_t zeros = std::min(text.find_first_not_of('0'), text.size());
    const uint32_t size = uint32_t(value.fraction.size());
    if (value.negative || value.is_zero() || size > most_digits || text.size() - zeros > 6)
        return {};
    const Divisor out = {uint32_t(std::strtoul(text.c_str(), nullptr, 10)), size};
    return out.units <= most_units ? std::optional(out) : std::nullopt;
}
bool Divisor::is_binary() const {
    uint32_t twos = 1, tens = 1;
    for (uint32_t i = 0; i < digits; ++i) twos *= 2, tens *= 10;
    return uint64_t(units) * twos % tens == 0;
}
bool Divisor::ends(uint32_t remainder, uint32_t at) const {
    for (; at < digits; ++at) remainder = next(remainder, '0', at + 1);
    return remainder == 0;
}
bool Divisor::divides(const ExactDecimal& number) const {
    uint32_t rest = 0, at = 0;
    for (const char c : number.whole) rest = next(rest, c);
    for (const char c : number.fraction) rest = next(rest, c, ++at);
    return ends(rest, at);
}

Result<DfaPtr> number_dfa(const NumberRules& rules, Budget& budget) {
    NumberMachine machine(rules);
    auto dfa = make_dfa(machine, budget);
    for (size_t i = 0; dfa && i < rules.excluded.size(); ++i) {
        ExactNumber exact(rules.excluded[i]);
        auto one = make_dfa(exact, budget);
        if (!one) return one;
        dfa = subtract(*dfa, *one, budget);
    }
    return dfa;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif

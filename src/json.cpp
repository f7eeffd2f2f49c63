// >>json
// Numbers first: one table of powers of ten serves reading and writing. Then the value, the
// parser, the writer.
#include "prologue.hpp"

#include "digest_internal.hpp"
#include "json_internal.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

struct Wide128 {
    uint64_t high, low;
};

Wide128 multiply_wide(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    __extension__ using Wide = unsigned __int128;
    const Wide product = Wide(a) * b;
    return {uint64_t(product >> 64), uint64_t(product)};
#else
    const uint64_t a0 = uint32_t(a), a1 = a >> 32, b0 = uint32_t(b), b1 = b >> 32;
    const uint64_t mid = a1 * b0 + (a0 * b0 >> 32), mid2 = a0 * b1 + uint32_t(mid);
    return {a1 * b1 + (mid >> 32) + (mid2 >> 32), mid2 << 32 | uint32_t(a0 * b0)};
#endif
}

// The leading 128 bits, cut off, of 10^n = significand * 2^(power_exponent(n) - 127): for reading
// 10^-343 to 10^308, for writing 10^-292 to 10^324.
constexpr int power_min = -343, power_max = 324, power_exact_max = 55;

constexpr int power_exponent(int n) { return n * 1741647 >> 19; }  // floor(log2(10^n)), |n| < 1234

constexpr Wide128 leading_bits(const uint32_t (&words)[32]) {
    int top = 31;
    while (words[top] == 0) --top;
    const int shift = std::countl_zero(words[top]);
    const uint64_t a = uint64_t(words[top]) << 32 | words[top - 1];
    const uint64_t b = uint64_t(words[top - 2]) << 32 | words[top - 3];
    const uint64_t c = uint64_t(words[top - 4]) << 32;
    return {a << shift | b >> 1 >> (63 - shift), b << shift | c >> 1 >> (63 - shift)};
}

constexpr auto powers_of_ten = [] {
    std::array<Wide128, power_max - power_min + 1> table{};
    uint32_t words[32] = {};
    words[4] = 1;  // 5^n * 2^128, exactly
    for (int n = 0; n <= power_max; ++n) {
        table[size_t(n - power_min)] = leading_bits(words);
        uint64_t carry = 0;
        for (uint32_t& word : words) {
            carry += uint64_t(word) * 5;
            word = uint32_t(carry);
            carry >>= 32;
        }
    }
    for (uint32_t& word : words) word = 0;
    words[31] = 1u << 31;  // floor(2^1023 / 5^n): cutting off at each step changes nothing
    for (int n = -1; n >= power_min; --n) {
        uint64_t rest = 0;
        for (int i = 31; i >= 0; --i) {
            rest = rest << 32 | words[i];
            words[i] = uint32_t(rest / 5);
            rest %= 5;
        }
        table[size_t(n - power_min)] = leading_bits(words);
    }
    return table;
}();

// ---- reading numbers ------------------------------------------------------------------------

struct Decimal {
    uint64_t digits = 0;   // the first that fit
    int64_t exponent = 0;  // value = digits * 10^exponent, and more where `dropped` > 0
    uint64_t dropped = 0;  // digits that did not fit
    bool negative = false, integer = true;
    const char* first = nullptr;  // all digits and the point
    const char* last = nullptr;
};

bool is_digit(const char* p, const char* end) { return p < end && uint8_t(*p - '0') < 10; }

// RFC 8259 section 6. Returns where the number ends, or null.
const char* scan_decimal(const char* p, const char* end, Decimal& number) {
    number.negative = p < end && *p == '-';
    p += number.negative;
    number.first = p;
    const auto digit_run = [&](int64_t places) {
        for (; is_digit(p, end); ++p) {
            const uint64_t digit = uint64_t(*p - '0');
            if (number.dropped > 0 || number.digits > (UINT64_MAX - digit) / 10) {
                ++number.dropped;
                ++number.exponent;
            } else {
                number.digits = number.digits * 10 + digit;
            }
            number.exponent -= places;
        }
    };
    if (!is_digit(p, end)) return nullptr;
    if (*p == '0') ++p;
    else digit_run(0);
    if (p < end && *p == '.') {
        number.integer = false;
        if (!is_digit(++p, end)) return nullptr;
        digit_run(1);
    }
    number.last = p;
    if (p < end && (*p == 'e' || *p == 'E')) {
        number.integer = false;
        ++p;
        const bool negative = p < end && *p == '-';
        if (p < end && (*p == '-' || *p == '+')) ++p;
        if (!is_digit(p, end)) return nullptr;
        int64_t exponent = 0;
        for (; is_digit(p, end); ++p)
            if (exponent < INT64_MAX / 100) exponent = exponent * 10 + (*p - '0');
        number.exponent += negative ? -exponent : exponent;
    }
    return p;
}

// An unsigned integer of at most 3200 bits: both sides of the exact comparison below stay under
// 2800, because 801 digits and the shortest exponents bound them.
struct BigNumber {
    uint32_t words[100] = {};
    size_t count = 0;

    void multiply_add(uint32_t factor, uint32_t carry) {
        uint64_t sum = carry;
        for (size_t i = 0; i < count; ++i) {
            sum += uint64_t(words[i]) * factor;
            words[i] = uint32_t(sum);
            sum >>= 32;
        }
        if (sum != 0) words[count++] = uint32_t(sum);
    }
    void multiply_power_of_5(int64_t exponent) {
        for (; exponent >= 13; exponent -= 13) multiply_add(1220703125, 0);  // 5^13
        for (; exponent > 0; --exponent) multiply_add(5, 0);
    }
    void shift_left(int64_t bits) {
        for (; bits >= 32; bits -= 32) {
            for (size_t i = count; i > 0; --i) words[i] = words[i - 1];
            words[0] = 0;
            ++count;
        }
        multiply_add(1u << bits, 0);
    }
    int compare(const BigNumber& other) const {
        if (count != other.count) return count < other.count ? -1 : 1;
        for (size_t i = count; i-- > 0;)
            if (words[i] != other.words[i]) return words[i] < other.words[i] ? -1 : 1;
        return 0;
    }
};

// Sign of number - (2 * mantissa + 1) * 2^(exponent - 1), the middle between two doubles.
int compare_with_middle(const Decimal& number, uint64_t mantissa, int exponent) {
    constexpr int enough = 800;  // digits; no middle has more than 767
    BigNumber left, right;
    int64_t ten = number.exponent - int64_t(number.dropped);
    int taken = 0;
    bool more = false;
    for (const char* p = number.first; p < number.last; ++p) {
        if (*p == '.' || (taken == 0 && *p == '0')) continue;
        if (taken < enough) {
            left.multiply_add(10, uint32_t(*p - '0'));
            ++taken;
        } else {
            more = more || *p != '0';
            ++ten;
        }
    }
    if (more) {  // any digit there says: above
        left.multiply_add(10, 1);
        --ten;
    }
    right.words[0] = uint32_t(2 * mantissa + 1);
    right.words[1] = uint32_t((2 * mantissa + 1) >> 32);
    right.count = right.words[1] != 0 ? 2 : 1;
    left.multiply_power_of_5(ten);
    right.multiply_power_of_5(-ten);
    const int64_t two = ten - (exponent - 1);
    if (two > 0) left.shift_left(two);
    else right.shift_left(-two);
    return left.compare(right);
}

// To the nearest double, ties to even. The 64 leading bits of the digits times 128 of the power
// bound the value from both sides; only when the middle of two doubles lies between the bounds
// are big integers asked. (After Eisel and Lemire; D. Lemire, "Number parsing at a gigabyte per
// second", 2021.)
double nearest_double(const Decimal& number) {
    const double zero = number.negative ? -0.0 : 0.0;
    const double infinity = number.negative ? -HUGE_VAL : HUGE_VAL;
    if (number.digits == 0 || number.exponent < power_min) return zero;
    if (number.exponent > 308) return infinity;
    const int n = int(number.exponent), zeros = std::countl_zero(number.digits);
    const Wide128 power = powers_of_ten[size_t(n - power_min)];
    Wide128 x = multiply_wide(number.digits << zeros, power.high);
    const uint64_t carried = multiply_wide(number.digits << zeros, power.low).high;
    x.low += carried;
    x.high += x.low < carried;
    // value in [x, x + 2) * 2^scale, and where digits were dropped up to 2^(64 + zeros) more
    const int scale = power_exponent(n) - 127 + 64 - zeros;
    const int top = 127 - std::countl_zero(x.high) + scale;  // 2^top <= value < 2^(top + 1)
    if (top > 1023) return infinity;
    const int exponent = std::max(top - 52, -1074);  // of the last bit of the result
    const int cut = exponent - scale - 64;           // bits of x.high that do not fit
    if (cut > 64) return zero;
    uint64_t mantissa = cut == 64 ? 0 : x.high >> cut;
    const uint64_t rest = x.high - (cut == 64 ? 0 : mantissa << cut);
    const uint64_t half = uint64_t(1) << (cut - 1);
    const uint64_t width = number.dropped > 0 ? (1u << zeros) + 1 : 0;  // in units of x.high
    if (rest > half || (rest == half && x.low > 0)) {
        ++mantissa;
    } else if (rest + width >= half || (rest + width + 1 == half && x.low > UINT64_MAX - 2)) {
        const int order = compare_with_middle(number, mantissa, exponent);
        mantissa += order > 0 || (order == 0 && mantissa % 2 == 1);
    }
    // adding lets a mantissa that was rounded up to 2^53 carry into the exponent
    const double value = bit_cast<double>((uint64_t(exponent + 1074) << 52) + mantissa);
    return number.negative ? -value : value;
}

Error json_error(std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), "invalid_json");
}

// ---- writing numbers ------------------------------------------------------------------------

// floor of g * c / 2^128, with the last bit set when anything was cut off
uint64_t multiply_to_odd(Wide128 g, uint64_t c) {
    const uint64_t carried = multiply_wide(g.low, c).high;
    Wide128 x = multiply_wide(g.high, c);
    x.low += carried;
    x.high += x.low < carried;
    return x.high | (x.low > 1);
}

struct ShortDecimal {
    uint64_t digits;
    int exponent;
};

// The shortest decimal inside the interval that reads back as `value` (finite, above 0), the
// nearest of them when there are several. (R. Giulietti, "The Schubfach way to render doubles".)
ShortDecimal shortest_decimal(double value) {
    const uint64_t bits = bit_cast<uint64_t>(value);
    const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
    const int biased = int(bits >> 52);
    const uint64_t c = biased == 0 ? fraction : fraction | uint64_t(1) << 52;
    const int q = std::max(biased, 1) - 1075;
    const bool narrow_below = fraction == 0 && biased > 1;  // the neighbour below is half as far
    const uint64_t odd = c & 1;                             // then the ends read back as neighbours

    const int k = (q * 1262611 - (narrow_below ? 524031 : 0)) >> 22;  // floor(log10(length))
    const int shift = q + power_exponent(-k) + 1;
    Wide128 g = powers_of_ten[size_t(-k - power_min)];
    if (-k < 0 || -k > power_exact_max) {  // rounded up
        ++g.low;
        g.high += g.low == 0;
    }
    // four times the value and the ends of its interval, in units of 10^k
    const uint64_t low = multiply_to_odd(g, (4 * c - 2 + narrow_below) << shift) + odd;
    const uint64_t mid = multiply_to_odd(g, 4 * c << shift);
    const uint64_t high = multiply_to_odd(g, (4 * c + 2) << shift) - odd;

    const uint64_t s = mid / 4, tens = s / 10;
    if (tens > 0) {  // one digit fewer
        const bool below = low <= 40 * tens, above = 40 * tens + 40 <= high;
        if (below != above) return {tens + above, k + 1};
    }
    const bool below = low <= 4 * s, above = 4 * s + 4 <= high;
    if (below != above) return {s + above, k};
    return {s + (mid > 4 * s + 2 || (mid == 4 * s + 2 && s % 2 == 1)), k};
}

void append_unsigned(std::string& out, uint64_t value) {
    char text[20];
    size_t at = sizeof text;
    do text[--at] = char('0' + value % 10);
    while (value /= 10);
    out.append(text + at, sizeof text - at);
}

void append_signed(std::string& out, int64_t value) {
    if (value < 0) out += '-';
    append_unsigned(out, value < 0 ? 0 - uint64_t(value) : uint64_t(value));
}

void append_double(std::string& out, double value) {
    if (!std::isfinite(value)) {
        out += "null";
        return;
    }
    if (std::signbit(value)) out += '-';
    if (value == 0) {
        out += "0.0";
        return;
    }
    ShortDecimal decimal = shortest_decimal(std::fabs(value));
    for (; decimal.digits % 10 == 0; decimal.digits /= 10) ++decimal.exponent;
    const size_t begin = out.size();
    append_unsigned(out, decimal.digits);
    const int count = int(out.size() - begin), point = count + decimal.exponent;
    if (point > 16 || point < -3) {
        if (count > 1) out.insert(begin + 1, ".");
        const int exponent = std::abs(point - 1);
        out += point > 0 ? "e+" : "e-";
        if (exponent < 10) out += '0';
        append_unsigned(out, uint64_t(exponent));
    } else if (point <= 0) {
        out.insert(begin, "0.000", size_t(2 - point));
    } else if (point >= count) {
        out.append(size_t(point - count), '0').append(".0");
    } else {
        out.insert(begin + size_t(point), ".");
    }
}

}  // namespace

std::string write_double(double value) {
    std::string text;
    append_double(text, value);
    return text;
}

Result<double> parse_double(std::string_view text) {
    Decimal number;
    const char* end = text.data() + text.size();
    if (text.empty() || scan_decimal(text.data(), end, number) != end)
        return json_error("not a number");
    const double value = nearest_double(number);
    if (std::isinf(value)) return json_error("the number is too large for a double");
    return value;
}

}  // namespace detail

// ---- the value ------------------------------------------------------------------------------

// Members in their order; from 17 on with a hash table of their places. The hash is keyed, so
// that nobody can choose keys that collide.
struct Json::Object {
    static constexpr size_t none = SIZE_MAX, few = 16;
    std::vector<JsonMember> members;
    std::vector<uint32_t> slots;  // place + 1, 0: free; empty while few
    uint64_t seed = 0;

    size_t find(std::string_view key) const {
        if (!slots.empty()) return size_t(slots[slot_of(key)]) - 1;  // 0 - 1 is none
        for (size_t i = 0; i < members.size(); ++i)
            if (members[i].key == key) return i;
        return none;
    }

    void append(std::string_view key, Json value) {  // a key that is not there
        members.push_back({std::string(key), std::move(value)});
        if (members.size() <= few) return;
        if (slots.size() < 2 * members.size()) index();
        else slots[slot_of(members.back().key)] = uint32_t(members.size());
    }

    // Builds `slots` if needed. Returns the first member whose key came before, or none.
    size_t index() {
        slots.clear();
        if (members.size() <= few) {
            for (size_t i = 1; i < members.size(); ++i)
                if (find(members[i].key) < i) return i;
            return none;
        }
        slots.resize(std::bit_ceil(4 * members.size()));
        if (seed == 0 && !detail::random_bytes(&seed, sizeof seed)) seed = detail::monotonic_ns();
        for (size_t i = 0; i < members.size(); ++i) {
            uint32_t& slot = slots[slot_of(members[i].key)];
            if (slot != 0) return i;
            slot = uint32_t(i + 1);
        }
        return none;
    }

private:
    size_t slot_of(std::string_view key) const {  // where it is, or the free slot where it would be
        size_t i = size_t(hash(key));
        for (;; ++i) {
            i &= slots.size() - 1;
            if (slots[i] == 0 || members[slots[i] - 1].key == key) return i;
        }
    }

    uint64_t hash(std::string_view key) const {
        const auto mix = [](uint64_t a, uint64_t b) {
            const detail::Wide128 product = detail::multiply_wide(a, b);
            return product.high ^ product.low;
        };
        constexpr uint64_t odd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
        uint64_t state = mix(seed ^ key.size(), odd);
        for (size_t i = 0; i < key.size(); i += 8) {
            uint64_t piece = 0;
            std::memcpy(&piece, key.data() + i, std::min(key.size() - i, size_t(8)));
            state = mix(state ^ piece, seed | 1) + odd;
        }
        return mix(state, odd);
    }
};

static_assert(sizeof(Json) == 16);

namespace detail {
namespace {
constinit const Json json_null;  // what `[]` gives for a missing place
}
}  // namespace detail

Json::Json(std::string_view text) { store_text(text); }

Json::Json(std::string text) {
    if (text.size() <= sizeof node_.bytes) {
        store_text(text);
    } else {
        store(Kind::string, new std::string(std::move(text)));
        node_.short_size = long_string;
    }
}

Json::Json(std::vector<Json> items) {
    node_.kind = Kind::array;
    if (!items.empty()) store(Kind::array, new std::vector<Json>(std::move(items)));
}

Json::Json(const Json& other) : node_(other.node_) {
    if (is_string() && is_long()) {
        store(Kind::string, new std::string(*other.load<std::string*>()));
    } else if (is_array() && other.size() > 0) {
        store(Kind::array, new std::vector<Json>(*other.load<std::vector<Json>*>()));
    } else if (is_object() && other.size() > 0) {
        store(Kind::object, new Object(*other.load<Object*>()));
    } else if (is_array() || is_object()) {
        node_ = Json(kind()).node_;
    }
}

void Json::store_text(std::string_view text) {
    if (text.size() <= sizeof node_.bytes) {
        node_.kind = Kind::string;
        node_.short_size = uint8_t(text.size());
        if (!text.empty()) std::memcpy(node_.bytes, text.data(), text.size());
    } else {
        store(Kind::string, new std::string(text));
        node_.short_size = long_string;
    }
}

void Json::destroy() noexcept {
    if (is_array()) delete load<std::vector<Json>*>();
    else if (is_object()) delete load<Object*>();
    else if (is_long()) delete load<std::string*>();
}

bool Json::as_bool(bool fallback) const { return is_bool() ? load<bool>() : fallback; }

int64_t Json::as_int(int64_t fallback) const { return is_int() ? load<int64_t>() : fallback; }

uint64_t Json::as_uint(uint64_t fallback) const {
    if (kind() == Kind::uint64) return load<uint64_t>();
    return is_int() && load<int64_t>() >= 0 ? load<uint64_t>() : fallback;
}

double Json::as_double(double fallback) const {
    if (is_real()) return load<double>();
    if (is_int()) return double(load<int64_t>());
    return kind() == Kind::uint64 ? double(load<uint64_t>()) : fallback;
}

std::string_view Json::as_string(std::string_view fallback) const {
    if (!is_string()) return fallback;
    return is_long() ? std::string_view(*load<std::string*>())
                     : std::string_view(node_.bytes, node_.short_size);
}

std::string Json::take_string() {
    std::string text = is_string() && is_long() ? std::move(*load<std::string*>())
                                                : std::string(as_string());
    *this = nullptr;
    return text;
}

size_t Json::size() const { return is_array() ? items().size() : members().size(); }

std::span<const Json> Json::items() const {
    const auto* items = is_array() ? load<std::vector<Json>*>() : nullptr;
    return items ? std::span<const Json>(*items) : std::span<const Json>();
}

std::span<Json> Json::items() {
    const std::span<const Json> items = std::as_const(*this).items();
    return {const_cast<Json*>(items.data()), items.size()};
}

std::span<const JsonMember> Json::members() const {
    const Object* object = object_or_null();
    return object ? std::span<const JsonMember>(object->members) : std::span<const JsonMember>();
}

const Json& Json::operator[](size_t index) const {
    return index < items().size() ? items()[index] : detail::json_null;
}

const Json& Json::operator[](std::string_view key) const {
    const Json* found = find(key);
    return found ? *found : detail::json_null;
}

const Json* Json::find(std::string_view key) const {
    const Object* object = object_or_null();
    const size_t place = object ? object->find(key) : Object::none;
    return place == Object::none ? nullptr : &object->members[place].value;
}

Json* Json::find(std::string_view key) { return const_cast<Json*>(std::as_const(*this).find(key)); }

Json& Json::push(Json value) & {
    if (!is_array()) *this = array();
    if (load<void*>() == nullptr) store(Kind::array, new std::vector<Json>());
    load<std::vector<Json>*>()->push_back(std::move(value));
    return *this;
}

Json& Json::set(std::string_view key, Json value) & {
    if (!is_object()) *this = object();
    if (Json* found = find(key)) {
        *found = std::move(value);
        return *this;
    }
    if (load<void*>() == nullptr) store(Kind::object, new Object());
    load<Object*>()->append(key, std::move(value));
    return *this;
}

bool Json::erase(std::string_view key) {
    const Json* found = find(key);
    if (found == nullptr) return false;
    Object& object = *load<Object*>();
    object.members.erase(object.members.begin() + std::ptrdiff_t(object.find(key)));
    if (!object.slots.empty()) object.index();
    return true;
}

void Json::reserve(size_t count) {
    if (is_array()) {
        if (load<void*>() == nullptr) store(Kind::array, new std::vector<Json>());
        load<std::vector<Json>*>()->reserve(count);
    } else if (is_object()) {
        if (load<void*>() == nullptr) store(Kind::object, new Object());
        load<Object*>()->members.reserve(count);
    }
}

bool Json::operator==(const Json& other) const {
    if (kind() != other.kind()) return false;
    switch (kind()) {
        case Kind::null: return true;
        case Kind::boolean: return load<bool>() == other.load<bool>();
        case Kind::int64:
        case Kind::uint64: return load<uint64_t>() == other.load<uint64_t>();
        case Kind::real: return load<double>() == other.load<double>();
        case Kind::string: return as_string() == other.as_string();
        case Kind::array: {
            const std::span<const Json> a = items(), b = other.items();
            return std::equal(a.begin(), a.end(), b.begin(), b.end());
        }
        case Kind::object: break;
    }
    if (size() != other.size()) return false;
    for (const JsonMember& member : members()) {
        const Json* found = other.find(member.key);
        if (found == nullptr || !(member.value == *found)) return false;
    }
    return true;
}

// ---- the parser -----------------------------------------------------------------------------

namespace detail {

namespace {
// The first byte at or after p that a string cannot simply copy: a quote, a backslash, a control
// character, or the first of a longer UTF-8 sequence.
const char* skip_plain_text(const char* p, const char* end) {
    constexpr uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
    const auto has_zero = [](uint64_t v) { return (v - ones) & ~v; };
    for (; end - p >= 8; p += 8) {
        uint64_t eight;
        std::memcpy(&eight, p, 8);
        const uint64_t special = has_zero(eight ^ ones * '"') | has_zero(eight ^ ones * '\\') |
                                 (eight - ones * 0x20) | eight;
        if (special & tops) break;
    }
    while (p < end && *p != '"' && *p != '\\' && uint8_t(*p - 0x20) < 0x60) ++p;
    return p;
}
}  // namespace

// Recursive descent, as deep as limits.depth. Finished items and members wait on a stack of their
// own until their array or object ends, which then takes exactly the room it needs.
class JsonParser {
public:
    JsonParser(std::string_view text, JsonLimits limits)
        : begin_(text.data()), p_(text.data()), end_(text.data() + text.size()), limits_(limits) {}

    Result<Json> run() {
        Json value;
        if (parse_value(value)) {
            skip_space();
            if (p_ == end_) return value;
            fail("text after the value");
        }
        return report();
    }

private:
    struct Pending {
        JsonMember member;
        const char* at;  // its key
    };

    // What recurses keeps its frame small: errors, and what is done once for an item, are apart.
    bool fail(std::string_view message) { return fail(p_, message); }
    VALAR_NOINLINE bool fail_limit(const char* before, uint32_t limit, const char* behind) {
        return fail(format("%s%u%s", before, limit, behind));
    }
    VALAR_NOINLINE bool fail(const char* at, std::string_view message) {
        p_ = at;
        message_ = message;
        return false;
    }

    Error report() const {
        const std::string_view before(begin_, size_t(p_ - begin_));
        const size_t line = size_t(std::count(before.begin(), before.end(), '\n')) + 1;
        const size_t newline = before.rfind('\n');  // npos + 1 is 0
        const size_t column = utf8_count(before.substr(newline + 1)) + 1;
        const std::string place = format("invalid JSON at line %zu, column %zu: ", line, column);
        return json_error(place + message_);
    }

    void skip_space() {
        while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
    }

    bool take(char c) {
        skip_space();
        if (p_ == end_ || *p_ != c) return false;
        ++p_;
        return true;
    }

    bool parse_value(Json& out) {
        skip_space();
        if (p_ == end_) return fail("expected a value, found the end");
        if (++values_ > limits_.values) return fail_limit("more than ", limits_.values, " values");
        switch (*p_) {
            case '{': return parse_nested(out, &JsonParser::parse_object);
            case '[': return parse_nested(out, &JsonParser::parse_array);
            case '"': return parse_string() && (out.store_text(text_), true);
            case 't': return parse_word("true", out, true);
            case 'f': return parse_word("false", out, false);
            case 'n': return parse_word("null", out, nullptr);
            default: return parse_number(out);
        }
    }

    bool parse_nested(Json& out, bool (JsonParser::*parse)(Json&)) {
        if (depth_ >= limits_.depth) return fail_limit("nested deeper than ", limits_.depth, "");
        ++depth_;
        ++p_;
        const bool good = (this->*parse)(out);
        --depth_;
        return good;
    }

    VALAR_NOINLINE bool parse_word(std::string_view word, Json& out, Json value) {
        if (std::string_view(p_, size_t(end_ - p_)).substr(0, word.size()) != word)
            return fail("expected a value");
        p_ += word.size();
        out.swap(value);
        return true;
    }

    VALAR_NOINLINE bool parse_number(Json& out) {
        Decimal number;
        const char* end = scan_decimal(p_, end_, number);
        if (end == nullptr)
            return fail(*p_ == '-' || is_digit(p_, end_) ? "malformed number" : "expected a value");
        const uint64_t limit = uint64_t(INT64_MAX) + number.negative;
        if (number.integer && number.dropped == 0 && number.digits <= limit) {
            out.store(Json::Kind::int64,
                      int64_t(number.negative ? 0 - number.digits : number.digits));
        } else if (number.integer && number.dropped == 0 && !number.negative) {
            out.store(Json::Kind::uint64, number.digits);
        } else {
            const double value = nearest_double(number);
            if (std::isinf(value)) return fail("the number is too large for a double");
            out.store(Json::Kind::real, value);
        }
        p_ = end;
        return true;
    }

    bool parse_array(Json& out) {
        out = Json::array();
        if (take(']')) return true;
        const size_t base = items_.size();
        do {
            Json item;
            if (!parse_value(item)) return false;
            keep(item);
        } while (take(','));
        return take(']') ? finish_array(out, base) : fail("expected ',' or ']'");
    }

    VALAR_NOINLINE void keep(Json& item) { items_.push_back(std::move(item)); }

    VALAR_NOINLINE bool finish_array(Json& out, size_t base) {
        const auto first = items_.begin() + std::ptrdiff_t(base);
        out.store(Json::Kind::array, new std::vector<Json>(std::make_move_iterator(first),
                                                           std::make_move_iterator(items_.end())));
        items_.erase(first, items_.end());
        return true;
    }

    bool parse_object(Json& out) {
        out = Json::object();
        if (take('}')) return true;
        const size_t base = pending_.size();
        do {
            const size_t at = pending_.size();
            Json value;
            if (!parse_key() || !parse_value(value)) return false;
            pending_[at].member.value = std::move(value);
        } while (take(','));
        return take('}') ? finish_object(out, base) : fail("expected ',' or '}'");
    }

    VALAR_NOINLINE bool parse_key() {
        skip_space();
        const char* at = p_;
        if (p_ == end_ || *p_ != '"') return fail("expected a key in quotes");
        if (!parse_string()) return false;
        pending_.push_back({{std::string(text_), {}}, at});
        return take(':') || fail("expected ':'");
    }

    VALAR_NOINLINE bool finish_object(Json& out, size_t base) {
        auto* object = new Json::Object();
        out.store(Json::Kind::object, object);
        object->members.reserve(pending_.size() - base);
        for (size_t i = base; i < pending_.size(); ++i)
            object->members.push_back(std::move(pending_[i].member));
        const size_t twice = object->index();
        if (twice != Json::Object::none) {
            std::string message = "duplicate key ";
            write_json_string(message, object->members[twice].key.substr(0, 64));
            return fail(pending_[base + twice].at, message);
        }
        pending_.erase(pending_.begin() + std::ptrdiff_t(base), pending_.end());
        return true;
    }

    // The string at the quote p_ into text_: a piece of the source, or buffer_ if it has escapes.
    bool parse_string() {
        const char* start = ++p_;
        bool copied = false;
        for (;;) {
            p_ = skip_plain_text(p_, end_);
            if (p_ == end_) return fail(start - 1, "the string does not end");
            if (uint8_t(*p_) >= 0x80) {
                size_t length = 0;
                if (utf8_next({p_, size_t(end_ - p_)}, &length) == bad_utf8)
                    return fail("invalid UTF-8");
                p_ += length;
            } else if (*p_ == '\\') {
                if (!copied) buffer_.clear();
                copied = true;
                buffer_.append(start, p_);
                if (!parse_escape()) return false;
                start = p_;
            } else if (*p_ == '"') {
                text_ = {start, size_t(p_ - start)};
                if (copied) text_ = buffer_.append(start, p_);
                ++p_;
                return true;
            } else {
                return fail("control character in a string");
            }
        }
    }

    bool parse_escape() {
        constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        const char* at = p_++;
        const char letter = p_ < end_ ? *p_++ : '\0';
        const size_t which = letters.find(letter);
        if (which != std::string_view::npos) {
            buffer_ += meanings[which];
            return true;
        }
        char32_t unit = 0, second = 0;
        if (letter != 'u' || !parse_hex4(unit)) return fail(at, "malformed escape");
        if (unit >= 0xd800 && unit < 0xe000) {
            const bool pair = unit < 0xdc00 && end_ - p_ >= 2 && p_[0] == '\\' && p_[1] == 'u';
            if (pair) p_ += 2;
            if (!pair || !parse_hex4(second) || second < 0xdc00 || second > 0xdfff)
                return fail(at, "lone surrogate");
            unit = 0x10000 + ((unit - 0xd800) << 10 | (second - 0xdc00));
        }
        utf8_append(buffer_, unit);
        return true;
    }

    bool parse_hex4(char32_t& unit) {
        if (end_ - p_ < 4) return false;
        for (int i = 0; i < 4; ++i) {
            const int digit = hex_value(*p_++);
            if (digit < 0) return false;
            unit = unit << 4 | char32_t(digit);
        }
        return true;
    }

    const char* begin_;
    const char* p_;
    const char* end_;
    JsonLimits limits_;
    uint32_t depth_ = 0, values_ = 0;
    std::string_view text_;  // the last string, until the next
    std::string buffer_;
    std::string message_;
    std::vector<Json> items_;
    std::vector<Pending> pending_;
};

}  // namespace detail

Result<Json> Json::parse(std::string_view text, JsonLimits limits) {
    return detail::JsonParser(text, limits).run();
}

// ---- the writer -----------------------------------------------------------------------------

namespace detail {

namespace {

class JsonWriter {
public:
    JsonWriter(std::string& out, JsonStyle style, bool canonical)
        : out_(out), style_(style), canonical_(canonical) {}

    void write(const Json& value) {
        if (value.is_array()) write_array(value.items());
        else if (value.is_object()) write_object(value.members());
        else write_scalar(value);
    }

private:
    VALAR_NOINLINE void write_scalar(const Json& value) {
        switch (value.kind()) {
            case Json::Kind::null: out_ += "null"; break;
            case Json::Kind::boolean: out_ += value.as_bool() ? "true" : "false"; break;
            case Json::Kind::int64: append_signed(out_, value.as_int()); break;
            case Json::Kind::uint64: append_unsigned(out_, value.as_uint()); break;
            case Json::Kind::real: write_real(value.as_double()); break;
            case Json::Kind::string: write_json_string(out_, value.as_string()); break;
            case Json::Kind::array:
            case Json::Kind::object: break;
        }
    }

    void write_real(double value) {
        constexpr double two63 = 9223372036854775808.0;
        const bool whole = canonical_ && std::trunc(value) == value;
        if (whole && value >= -two63 && value < two63) append_signed(out_, int64_t(value));
        else if (whole && value >= 0 && value < 2 * two63) append_unsigned(out_, uint64_t(value));
        else append_double(out_, value);
    }

    void write_array(std::span<const Json> items) {
        open('[');
        for (const Json& item : items) {
            separate(&item == items.data());
            write(item);
        }
        close(']', items.empty());
    }

    void write_object(std::span<const JsonMember> members) {
        open('{');
        std::vector<const JsonMember*> sorted;
        if (canonical_) sort(members, sorted);
        for (size_t i = 0; i < members.size(); ++i) {
            const JsonMember& member = canonical_ ? *sorted[i] : members[i];
            write_key(member.key, i == 0);
            write(member.value);
        }
        close('}', members.empty());
    }

    VALAR_NOINLINE static void sort(std::span<const JsonMember> members,
                                    std::vector<const JsonMember*>& sorted) {
        for (const JsonMember& member : members) sorted.push_back(&member);
        sort_items(sorted, [](const JsonMember* a, const JsonMember* b) {
            return a->key < b->key;  // bytes of UTF-8 sort as their code points
        });
    }

    VALAR_NOINLINE void write_key(const std::string& key, bool first) {
        separate(first);
        write_json_string(out_, key);
        out_ += style_.spaced || style_.indent >= 0 ? ": " : ":";
    }

    void open(char bracket) {
        out_ += bracket;
        ++depth_;
    }
    void separate(bool first) {
        if (!first) out_ += style_.spaced && style_.indent < 0 ? ", " : ",";
        new_line();
    }
    void close(char bracket, bool empty) {
        --depth_;
        if (!empty) new_line();
        out_ += bracket;
    }
    VALAR_NOINLINE void new_line() {
        if (style_.indent >= 0) out_.append("\n").append(depth_ * size_t(style_.indent), ' ');
    }

    std::string& out_;
    JsonStyle style_;
    bool canonical_;
    size_t depth_ = 0;
};

void write_utf16_escape(std::string& out, char32_t unit) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += "0123456789abcdef"[unit >> shift & 15];
}

void write_json_escape(std::string& out, char32_t c) {
    constexpr std::string_view letters = "\"\\bfnrt", meanings = "\"\\\b\f\n\r\t";
    const size_t which = c < 0x80 ? meanings.find(char(c)) : std::string_view::npos;
    if (which != std::string_view::npos) {
        (out += '\\') += letters[which];
    } else if (c < 0x10000) {
        write_utf16_escape(out, c);
    } else {
        write_utf16_escape(out, 0xd800 + ((c - 0x10000) >> 10));
        write_utf16_escape(out, 0xdc00 + ((c - 0x10000) & 0x3ff));
    }
}

}  // namespace

void write_json_string(std::string& out, std::string_view text) {
    out += '"';
    write_json_escaped(out, text);
    out += '"';
}

void write_json_escaped(std::string& out, std::string_view text, bool ascii) {
    const char *p = text.data(), *const end = p + text.size(), *start = p;
    for (;;) {
        if (!ascii) p = skip_plain_text(p, end);
        if (p == end) break;
        const char* at = p;
        char32_t c = uint8_t(*p++);
        if (c >= 0x80) {
            size_t length = 0;
            c = utf8_next({at, size_t(end - at)}, &length);
            p = at + length;
        }
        if (c >= 0x20 && c != '"' && c != '\\' && c < (ascii ? 0x7f : bad_utf8)) continue;
        out.append(start, at);
        start = p;
        if (c == bad_utf8) c = 0xfffd;
        if (c < 0x80 || ascii) write_json_escape(out, c);
        else utf8_append(out, c);
    }
    out.append(start, end);
}

}  // namespace detail

std::string Json::write(JsonStyle style) const {
    std::string out;
    write_to(out, style);
    return out;
}

void Json::write_to(std::string& out, JsonStyle style) const {
    detail::JsonWriter(out, style, false).write(*this);
}

std::string Json::canonical() const {
    std::string out;
    detail::JsonWriter(out, {}, true).write(*this);
    return out;
}

}  // namespace v1
}  // namespace valar

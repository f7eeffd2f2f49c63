#include <doctest/doctest.h>

#include "json_internal.hpp"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

using namespace valar;
using valar::detail::parse_double;
using valar::detail::write_double;

namespace {

bool accepted(std::string_view text) { return Json::parse(text).ok(); }

std::string message_of(std::string_view text) {
    const auto result = Json::parse(text);
    if (result) return "accepted";
    CHECK(result.error().kind == ErrorKind::invalid_request);
    CHECK(result.error().code == "invalid_json");
    return result.error().message;
}

std::string rewritten(std::string_view text, JsonStyle style = {}) {
    const auto result = Json::parse(text);
    return result ? result->write(style) : result.error().message;
}

double bits_to_double(uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint64_t double_to_bits(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Generator {  // splitmix64: the same numbers everywhere
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
};

// strtod is the reference: the C library here rounds correctly.
void check_as_strtod(const std::string& text) {
    const auto value = parse_double(text);
    const double expected = std::strtod(text.c_str(), nullptr);
    CAPTURE(text);
    if (std::isinf(expected)) {
        CHECK(!value);
    } else {
        REQUIRE(value);
        CHECK(double_to_bits(*value) == double_to_bits(expected));
    }
}

}  // namespace

TEST_CASE("json: texts that are JSON") {
    // clang-format off
    for (const char* text : {
             "null", "true", "false", "0", "-0", "7", "\"\"", "[]", "{}", " [ ] ", "\t\n\r {\n} ",
             "[1,2]", "[[],[[]],{}]", "{\"a\":1}", "{\"\":0}", "{\"a\":{\"a\":{}}}", "1.5",
             "-1.5e9", "1e5", "1E5", "1E+5", "1e-05", "0.0", "0e0", "-0.0",
             "1e-99999999999999999999",
             "0e99999999999999999999", "123456789012345678901234567890", "\"\\u0000\"",
             "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"", "\"\\ud83d\\ude00\"", "\"\\uDBFF\\uDFFF\"",
             "\"\x7f\"", "\"\xc2\x80\"", "\"\xed\x9f\xbf\"", "\"\xee\x80\x80\"",
             "\"\xf4\x8f\xbf\xbf\"", "\"\xef\xbf\xbf\"", "\"\xe2\x80\xa8\"", "[\"\xef\xbb\xbf\"]",
             "{\"a\":1,\"A\":2,\"\\u0062\":3}", "[0.1,1e1,-2]"})
        // clang-format on
        CHECK_MESSAGE(accepted(text), text);
}

TEST_CASE("json: texts that are not") {
    for (const char* text :
         {// nothing, or words that are nearly right
          "", " ", "nul", "nulll", "True", "NULL", "tru", "falsey", "undefined", "NaN", "Infinity",
          "-Infinity", "nan", "'a'", "a",
          // numbers
          "+1", "-", "-a", "01", "-01", "00", "1.", ".5", "-.5", "1.e5", "1e", "1e+", "1e-", "1ee5",
          "1.5.5", "0x10", "1_000", "1,5", "1e5.5", "--1", "1 000", "1e999", "-1e999", "2e308",
          "1\xef\xbc\x91",
          // strings
          "\"", "\"a", "\"\\", "\"\\\"", "\"\\x41\"", "\"\\u12\"", "\"\\u12g4\"", "\"\\U0041\"",
          "\"\\'\"", "\"\n\"", "\"\t\"", "\"\x1f\"", "\"a\\\n\"", "\"\\u\"", "\"\\u+123\"",
          // surrogates
          "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\ud800\"", "\"\\ud800a\"", "\"\\ud800\\n\"",
          "\"\\ud800\\u0041\"", "\"\\udc00\\ud800\"", "\"\\ud83d\\u\"", "\"\\ud83d\\ude0\"",
          // UTF-8
          "\"\x80\"", "\"\xc0\xaf\"", "\"\xc3\"", "\"\xe0\x80\xaf\"", "\"\xed\xa0\x80\"",
          "\"\xf4\x90\x80\x80\"", "\"\xf8\x88\x80\x80\x80\"", "\"\xff\"", "\"\xf0\x9f\x98\"",
          "{\"\xff\":1}", "\xef\xbb\xbf{}", "[\xff]", "\xff\xfe\x31",
          // arrays
          "[", "]", "[1", "[1,", "[1,]", "[,1]", "[,]", "[1 2]", "[1;2]", "[1]]", "[[1]", "[1}",
          "[\"a\" \"b\"]", "[1,,2]", "[a]", "[1 true]",
          // objects
          "{", "}", "{a:1}", "{\"a\"}", "{\"a\":}", "{\"a\" 1}", "{\"a\":1,}", "{,}", "{1:1}",
          "{\"a\":1 \"b\":2}", "{\"a\":1]", "{\"a\",1}", "{\"a\"::1}", "{null:1}", "{\"a\":1",
          "{\"a\":1;}", "{\"a", "{\"a\":1}}",
          // duplicate keys
          "{\"a\":1,\"a\":1}", "{\"a\":1,\"b\":2,\"\\u0061\":3}", "{\"\":1,\"\":1}",
          "[{\"x\":{\"y\":1,\"y\":2}}]",
          // more than one value, comments
          "1 1", "{} {}", "[] ,", "null,", "/**/1", "1//", "[1]#",
          "\x0b"
          "1",
          "\x0c[]", "\xc2\xa0[]"})
        CHECK_MESSAGE(!accepted(text), text);
    CHECK(!accepted(std::string_view("1\0", 2)));
    CHECK(!accepted(std::string_view("\"a\0b\"", 5)));
    CHECK(!accepted(std::string_view("\0", 1)));
}

TEST_CASE("json: every prefix of a text is refused without reading behind it") {
    const std::string text =
        R"({"key":[1,-2.5e+3,true,false,null,"a\u00e9\ud83d\ude00\n",{"x":{}}],"\u00fc":" )"
        "\xf0\x9f\x98\x80\"}";
    REQUIRE(accepted(text));
    for (size_t length = 0; length < text.size(); ++length) {
        const std::vector<char> exact(text.begin(), text.begin() + std::ptrdiff_t(length));
        CHECK(!accepted({exact.data(), exact.size()}));
    }
}

TEST_CASE("json: errors say where and what") {
    CHECK(message_of("") == "invalid JSON at line 1, column 1: expected a value, found the end");
    CHECK(message_of("{\n  \"a\": 1,\n  \"b\": tru\n}") ==
          "invalid JSON at line 3, column 8: expected a value");
    CHECK(message_of("[\"\xf0\x9f\x98\x80\xc3\xa9\", x]") ==
          "invalid JSON at line 1, column 8: expected a value");  // columns count code points
    CHECK(message_of("[\r\n\r\n01]") == "invalid JSON at line 3, column 2: expected ',' or ']'");
    CHECK(message_of("{\"a\" 1}") == "invalid JSON at line 1, column 6: expected ':'");
    CHECK(message_of("{\"a\":1 1}") == "invalid JSON at line 1, column 8: expected ',' or '}'");
    CHECK(message_of("{1") == "invalid JSON at line 1, column 2: expected a key in quotes");
    CHECK(message_of("[1] x") == "invalid JSON at line 1, column 5: text after the value");
    CHECK(message_of("[\"abc") == "invalid JSON at line 1, column 2: the string does not end");
    CHECK(message_of("\"ab\\q\"") == "invalid JSON at line 1, column 4: malformed escape");
    CHECK(message_of("\"a\\ud800\"") == "invalid JSON at line 1, column 3: lone surrogate");
    CHECK(message_of("\"a\xff\"") == "invalid JSON at line 1, column 3: invalid UTF-8");
    CHECK(message_of("\"a\tb\"") ==
          "invalid JSON at line 1, column 3: control character in a string");
    CHECK(message_of("[-]") == "invalid JSON at line 1, column 2: malformed number");
    CHECK(message_of("[1e400]") ==
          "invalid JSON at line 1, column 2: the number is too large for a double");
    CHECK(message_of("{\"a\":1,\n \"b\":2, \"\\u0061\":3}") ==
          "invalid JSON at line 2, column 9: duplicate key \"a\"");
}

TEST_CASE("json: depth and number of values are limited") {
    const auto nested = [](size_t depth) {
        return std::string(depth, '[') + std::string(depth, ']');
    };
    CHECK(accepted(nested(json_depth_limit)));
    CHECK(message_of(nested(json_depth_limit + 1)) ==
          "invalid JSON at line 1, column 129: nested deeper than 128");
    CHECK(!accepted(std::string(1'000'000, '[')));
    std::string objects;
    for (int i = 0; i < 200; ++i) objects += "{\"a\":";
    CHECK(!accepted(objects));
    CHECK(Json::parse(nested(3), {.depth = 3}));
    CHECK(!Json::parse(nested(4), {.depth = 3}));
    CHECK(Json::parse("1", {.depth = 0}));
    CHECK(Json::parse("[1,2,3]", {.values = 4}));
    CHECK(!Json::parse("[1,2,3,4]", {.values = 4}));
}

TEST_CASE("json: big objects find their keys and their duplicates quickly") {
    std::string text = "{";
    constexpr int count = 100'000;
    for (int i = 0; i < count; ++i)
        text += (i ? ",\"k" : "\"k") + std::to_string(i) + "\":" + std::to_string(i);
    const auto whole = Json::parse(text + "}");
    REQUIRE(whole);
    CHECK(whole->size() == count);
    for (int i = 0; i < count; i += 997) {
        CHECK((*whole)["k" + std::to_string(i)].as_int(-1) == i);
        CHECK(whole->members()[size_t(i)].value.as_int() == i);
    }
    CHECK(whole->find("k100000") == nullptr);
    CHECK(message_of(text + ",\n\"k7\":0}") ==
          "invalid JSON at line 2, column 1: duplicate key \"k7\"");
    Json built;
    for (int i = 0; i < count; ++i) built.set("k" + std::to_string(i), i);
    CHECK(built == *whole);
    for (int members = 1; members < 40; ++members) {  // across the change of structure
        std::string small = "{\"m0\":0";
        for (int i = 1; i < members; ++i) small += ",\"m" + std::to_string(i) + "\":0";
        CHECK(accepted(small + "}"));
        for (int twice = 0; twice < members; ++twice)
            CHECK(!accepted(small + ",\"m" + std::to_string(twice) + "\":1}"));
    }
}

TEST_CASE("json: members keep their order through set and erase") {
    Json object = Json::object().set("z", 1).set("a", 2).set("m", 3);
    object.set("a", "two");
    CHECK(object.write() == R"({"z":1,"a":"two","m":3})");
    CHECK(object.erase("z"));
    CHECK(!object.erase("z"));
    object.set("z", nullptr);
    CHECK(object.write() == R"({"a":"two","m":3,"z":null})");
    Json big = Json::object();
    for (int i = 0; i < 50; ++i) big.set(std::to_string(i), i);
    for (int i = 0; i < 50; i += 2) CHECK(big.erase(std::to_string(i)));
    CHECK(big.size() == 25);
    for (int i = 0; i < 50; ++i) CHECK(big.contains(std::to_string(i)) == (i % 2 == 1));
    for (int i = 1; i < 50; i += 2) CHECK(big.erase(std::to_string(i)));
    CHECK(big.empty());
    CHECK(big.write() == "{}");
}

TEST_CASE("json: kinds and accessors, without conversions") {
    const Json values[] = {nullptr,       true,          1, uint64_t(1) << 63, 1.5, "text",
                           Json::array(), Json::object()};
    for (size_t i = 0; i < 8; ++i) {
        const Json& v = values[i];
        CHECK(size_t(v.kind()) == i);
        CHECK(v.is_null() == (i == 0));
        CHECK(v.is_bool() == (i == 1));
        CHECK(v.is_int() == (i == 2));
        CHECK(v.is_integer() == (i == 2 || i == 3));
        CHECK(v.is_number() == (i >= 2 && i <= 4));
        CHECK(v.is_real() == (i == 4));
        CHECK(v.is_string() == (i == 5));
        CHECK(v.is_array() == (i == 6));
        CHECK(v.is_object() == (i == 7));
        CHECK(v.as_bool() == (i == 1));
        CHECK(v.as_int(-9) == (i == 2 ? 1 : -9));
        CHECK(v.as_uint(9) == (i == 2 ? 1 : i == 3 ? uint64_t(1) << 63 : 9));
        CHECK(v.as_double(-9) == (i == 2 ? 1.0 : i == 3 ? 0x1p63 : i == 4 ? 1.5 : -9.0));
        CHECK(v.as_string("none") == (i == 5 ? "text" : "none"));
        CHECK(v.size() == 0);
        CHECK(v.empty());
        CHECK(v[0].is_null());
        CHECK(v["key"].is_null());
        CHECK(v.find("key") == nullptr);
    }
    CHECK(Json(-1).as_uint(5) == 5);
    CHECK(Json(uint8_t(200)).as_int() == 200);
    CHECK(Json('a').is_int());
    CHECK(Json(1.5f).as_double() == 1.5);
    CHECK(Json(1) == Json(1u));
    CHECK(!(Json(1) == Json(1.0)));
    CHECK(Json(std::vector<Json>{}).is_array());
    CHECK(Json(std::vector<Json>{1, "x"})[1].as_string() == "x");
}

TEST_CASE("json: strings around the size that fits the node") {
    for (size_t size = 0; size < 40; ++size) {
        const std::string text(size, 'x');
        Json a = text, b = std::string_view(text), c = text.c_str();
        CHECK(a == b);
        CHECK(b == c);
        Json copy = a, moved = std::move(b);
        CHECK(copy.as_string() == text);
        CHECK(moved.as_string() == text);
        CHECK(b.is_null());
        CHECK(a.take_string() == text);
        CHECK(a.is_null());
        copy = std::move(moved);
        CHECK(copy.as_string() == text);
    }
    CHECK(Json(5).take_string().empty());
}

TEST_CASE("json: values are values") {
    Json a = Json::parse(R"({"list":[1,"a string that is long",{"x":null}],"n":1})").value();
    Json b = a;
    CHECK(a == b);
    b.find("list")->push(5).push(Json::array());
    b.find("list")->items()[0] = "changed";
    CHECK(!(a == b));
    CHECK(a["list"].size() == 3);
    CHECK(b.write() == R"({"list":["changed","a string that is long",{"x":null},5,[]],"n":1})");
    b = Json(b["list"][2]);
    CHECK(b.write() == R"({"x":null})");
    b = std::move(*b.find("x"));
    CHECK(b.is_null());
    b.push(1);
    CHECK(b.write() == "[1]");
    b.set("k", b);
    CHECK(b.write() == R"({"k":[1]})");
    Json reserved = Json::array();
    reserved.reserve(10);
    CHECK(reserved == Json::array());
    Json empty = reserved;
    CHECK(empty.push(1).size() == 1);
    Json object = Json::object();
    object.reserve(4);
    CHECK(object == Json::object());
    CHECK(Json::parse(R"({"a":1,"b":2})").value() == Json::parse(R"({"b":2,"a":1})").value());
    CHECK(!(Json::parse(R"({"a":1})").value() == Json::parse(R"({"b":1})").value()));
    Json().reserve(3);
    // a key that is borrowed from the object that grows
    Json borrowed = Json::object();
    for (int i = 0; i < 100; ++i) {
        borrowed.set(std::to_string(i), "v" + std::to_string(i));
        borrowed.set(borrowed[std::to_string(i)].as_string(), i);
    }
    CHECK(borrowed.size() == 200);
    for (int i = 0; i < 100; ++i) CHECK(borrowed["v" + std::to_string(i)].as_int(-1) == i);
}

TEST_CASE("json: integers are exact to 64 bits") {
    for (const char* text :
         {"0", "-1", "9007199254740993", "9223372036854775807", "-9223372036854775808",
          "9223372036854775808", "18446744073709551615"}) {
        CHECK(rewritten(text) == text);
        CHECK(Json::parse(text)->is_integer());
    }
    CHECK(Json::parse("9223372036854775807")->as_int() == INT64_MAX);
    CHECK(Json::parse("-9223372036854775808")->as_int() == INT64_MIN);
    CHECK(Json::parse("18446744073709551615")->as_uint() == UINT64_MAX);
    CHECK(Json::parse("9223372036854775808")->kind() == Json::Kind::uint64);
    CHECK(rewritten("-0") == "0");
    CHECK(rewritten("18446744073709551616") == "1.8446744073709552e+19");
    CHECK(rewritten("-9223372036854775809") == "-9.223372036854776e+18");
    CHECK(rewritten("1.0") == "1.0");
    CHECK(rewritten("1e2") == "100.0");
}

TEST_CASE("json: doubles are spelled as Python spells them") {
    const std::pair<double, const char*> cases[] = {
        // clang-format off
        {0.0, "0.0"}, {-0.0, "-0.0"}, {1.0, "1.0"}, {-1.5, "-1.5"}, {0.1, "0.1"}, {0.3, "0.3"},
        {0.1 + 0.2, "0.30000000000000004"}, {1e15, "1000000000000000.0"},
        {9999999999999998.0, "9999999999999998.0"}, {1e16, "1e+16"}, {1.5e16, "1.5e+16"},
        {1e22, "1e+22"}, {1e23, "1e+23"}, {1e100, "1e+100"}, {123456789.125, "123456789.125"},
        {0.0001, "0.0001"}, {0.00012345, "0.00012345"}, {0.00001, "1e-05"}, {1.25e-7, "1.25e-07"},
        {1e-100, "1e-100"}, {5e-324, "5e-324"}, {1e-323, "1e-323"},
        // clang-format on
        {2.2250738585072014e-308, "2.2250738585072014e-308"},
        {2.225073858507201e-308, "2.225073858507201e-308"},
        // clang-format off
        {1.7976931348623157e308, "1.7976931348623157e+308"}, {0x1p63, "9.223372036854776e+18"},
        {0x1p-1, "0.5"}, {0x1p53, "9007199254740992.0"}, {9007199254740993.0, "9007199254740992.0"},
        {2e-44, "2e-44"}, {4.35, "4.35"}, {2.0 / 3, "0.6666666666666666"}, {1e21, "1e+21"},
        {9.5367431640625e-07, "9.5367431640625e-07"}, {8.41e21, "8.41e+21"},
        {2.98023223876953125e-8, "2.9802322387695312e-08"}, {5e-320, "5e-320"}};
    // clang-format on
    for (const auto& [value, text] : cases) CHECK(write_double(value) == text);
    CHECK(write_double(HUGE_VAL) == "null");
    CHECK(Json(std::nan("")).write() == "null");
}

TEST_CASE("json: hard doubles are rounded as strtod rounds them") {
    for (const char* text :
         {"9007199254740993", "9007199254740993.0", "9007199254740992.99999999999999999999999",
          "9007199254740993.00000000000000000000001", "9007199254740995", "1.00000005960464477539",
          "1.00000000000000011102230246251565404236316680908203125",
          "1.00000000000000011102230246251565404236316680908203124",
          "1.00000000000000011102230246251565404236316680908203126",
          // clang-format off
          "2.2250738585072011e-308", "2.2250738585072012e-308", "2.2250738585072014e-308",
          "4.9406564584124654e-324", "2.4703282292062327e-324", "2.4703282292062328e-324",
          "2.47032822920623272088284396434110686182e-324", "1e-325", "7e-324", "7.4e-324",
          "7.5e-324", "1e-400", "-1e-400", "1.7976931348623157e308", "1.7976931348623158e308",
          "1.797693134862315807e308", "1.797693134862315808e308", "17976931348623159e292", "1e308",
          "1e309", "0.1e310", "123456789012345678901234567890e-350", "6929495644600919.5",
          "3.7455744005952583e15", "8.442911973260991817129021309e-309",
         "0.000000000000000000000000000000000000000000000000000000000000000000000000000000000001",
          "18446744073709551615e-5", "18446744073709551616e10", "184467440737095516150e-20",
          "1e23", "8.5e22", "9.5e-23", "30078505129381147446200", "1777820000000000000001",
          "0.500000000000000166533453693773481063544750213623046875", "5e-324", "1e00000000001",
          "0.3e-0000000000000000000000000000001", "000"})
        // clang-format on
        if (text[1] != '0' || text[0] != '0') check_as_strtod(text);
    // all halfway cases around powers of two, written out exactly, then a hair more and less
    for (int exponent = -1074; exponent < 1023; exponent += 61) {
        char exact[1200];
        const double low = std::ldexp(1.0, exponent);
        const double step = std::nextafter(low, HUGE_VAL) - low;
        // halfway = low + step / 2; as text: printf is exact for long double only where it has room
        if (step / 2 == 0 || LDBL_MANT_DIG < 64) continue;
        std::snprintf(exact, sizeof exact, "%.1100Lg",
                      static_cast<long double>(low) + static_cast<long double>(step) / 2);
        std::string text = exact;
        check_as_strtod(text);
        if (text.find('e') == std::string::npos && text.find('.') != std::string::npos) {
            check_as_strtod(text + "000000000000000000001");
            check_as_strtod(text + std::string(2000, '0') + "1");
        }
        text = exact;
        const size_t last = text.find_last_of("123456789", text.find('e'));
        --text[last];
        check_as_strtod(text);
    }
    std::string digits = "0." + std::string(5000, '7') + "e10";
    check_as_strtod(digits);
    check_as_strtod(std::string(3000, '9') + "e-2990");
    check_as_strtod("0." + std::string(3000, '0') + "25e3000");
    for (const char* bad : {"", "1 ", " 1", "1x", "+1", "nan", "inf", "0x1p3", "1e309", "-"})
        CHECK(!parse_double(bad));
}

TEST_CASE("json: random doubles survive writing and reading") {
    Generator random{2024};
    size_t wrong = 0, longer = 0;
    constexpr int rounds = 300'000;
    for (int i = 0; i < rounds; ++i) {
        const uint64_t bits = random.next();
        const double value = bits_to_double(i % 4 ? bits : bits & 0x800fffffffffffff);
        if (!std::isfinite(value)) continue;
        const std::string text = write_double(value);
        const auto back = parse_double(text);
        wrong += !back || double_to_bits(*back) != double_to_bits(value);
        if (i % 16) continue;
        wrong += std::strtod(text.c_str(), nullptr) != value;
        // the fewest digits that printf can do it with
        char shortest[40];
        int digits = 1;
        for (; digits < 17; ++digits) {
            std::snprintf(shortest, sizeof shortest, "%.*e", digits - 1, value);
            if (std::strtod(shortest, nullptr) == value) break;
        }
        std::string plain;  // our digits without sign, point and zeros around
        for (const char c : text.substr(0, text.find('e')))
            if (c >= '0' && c <= '9' && (c != '0' || !plain.empty())) plain += c;
        longer += plain.find_last_not_of('0') + 1 > size_t(digits);
    }
    CHECK(wrong == 0);
    CHECK(longer == 0);
}

TEST_CASE("json: random decimals are read as strtod reads them") {
    Generator random{7};
    size_t wrong = 0;
    char text[64];
    for (int i = 0; i < 700'000; ++i) {
        const uint64_t bits = random.next(), more = random.next();
        double value = bits_to_double(bits);
        if (!std::isfinite(value)) value = 1;
        switch (i % 4) {
            case 0: std::snprintf(text, sizeof text, "%.17g", value); break;
            case 1:
                std::snprintf(text, sizeof text, "%llue%d", static_cast<unsigned long long>(bits),
                              int(more % 680) - 350);
                break;
            case 2:
                std::snprintf(text, sizeof text, "%llu%llue%d",
                              static_cast<unsigned long long>(bits),
                              static_cast<unsigned long long>(more), int(more % 640) - 350);
                break;
            default:
                std::snprintf(text, sizeof text, "%u.%u", unsigned(bits) % 100000, unsigned(more));
        }
        const auto read = parse_double(text);
        const double expected = std::strtod(text, nullptr);
        wrong += std::isinf(expected) ? read.ok()
                                      : !read || double_to_bits(*read) != double_to_bits(expected);
    }
    CHECK(wrong == 0);
}

TEST_CASE("json: styles") {
    const char* text = R"({"a":[1,{"b":[]}],"c":{},"d":"x"})";
    CHECK(rewritten(text) == text);
    CHECK(rewritten(text, json_python) == R"({"a": [1, {"b": []}], "c": {}, "d": "x"})");
    const char* pretty = R"({
  "a": [
    1,
    {
      "b": []
    }
  ],
  "c": {},
  "d": "x"
})";
    CHECK(rewritten(text, json_pretty) == pretty);
    CHECK(rewritten(text, {true, 2}) == pretty);
    CHECK(rewritten("[1,[]]", {false, 0}) == "[\n1,\n[]\n]");
    std::string out = "data: ";
    Json(1).write_to(out);
    CHECK(out == "data: 1");
}

TEST_CASE("json: written strings are escaped and always valid UTF-8") {
    const auto written = [](std::string_view text) { return Json(text).write(); };
    CHECK(written("") == "\"\"");
    CHECK(written("a\"b\\c/\b\f\n\r\t") == R"("a\"b\\c/\b\f\n\r\t")");
    CHECK(written(std::string_view("\0\x01\x1f\x7f", 4)) == "\"\\u0000\\u0001\\u001f\x7f\"");
    CHECK(written("\xc3\xa9\xf0\x9f\x98\x80 and more text") ==
          "\"\xc3\xa9\xf0\x9f\x98\x80 and more text\"");
    CHECK(written("a\xff"
                  "b\xed\xa0\x80") ==
          "\"a\xef\xbf\xbd"
          "b\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"");
    CHECK(written("\xe2\x82") == "\"\xef\xbf\xbd\"");
    CHECK(Json::object().set("\xff\n", 1).write() == "{\"\xef\xbf\xbd\\n\":1}");
    std::string all;
    for (int c = 0; c < 256; ++c) all += char(c);
    const auto back = Json::parse(written(all));
    REQUIRE(back);
    CHECK(back->as_string() == detail::utf8_repair(all));
}

TEST_CASE("json: the canonical form") {
    const auto canonical = [](const char* text) { return Json::parse(text).value().canonical(); };
    CHECK(canonical(R"( { "b" : 1 , "a" : [ 1.0 , -0 , -0.0, 2.50, 1e2 ] } )") ==
          R"({"a":[1,0,0,2.5,100],"b":1})");
    CHECK(canonical("1e16") == "10000000000000000");
    CHECK(canonical("9007199254740993") == "9007199254740993");
    CHECK(canonical("9223372036854775808.0") == "9223372036854775808");
    CHECK(canonical("-9223372036854775808.0") == "-9223372036854775808");
    CHECK(canonical("18446744073709551616") == "1.8446744073709552e+19");
    CHECK(canonical("-1e19") == "-1e+19");
    CHECK(canonical("1E-7") == "1e-07");
    // by code point: U+FF61 before U+1F600, which UTF-16 would turn around
    CHECK(canonical("{\"\\ud83d\\ude00\":1,\"\\uff61\":2,\"ab\":3,\"a\":4,\"B\":5}") ==
          "{\"B\":5,\"a\":4,\"ab\":3,\"\xef\xbd\xa1\":2,\"\xf0\x9f\x98\x80\":1}");
    CHECK(canonical(R"({"a":{"y":1,"x":2}})") == R"({"a":{"x":2,"y":1}})");
}

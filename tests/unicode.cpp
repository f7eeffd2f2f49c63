#include <doctest/doctest.h>

#include "digest_internal.hpp"
#include "unicode_internal.hpp"

#include <string>

using namespace valar::detail;

namespace {
std::string utf8(std::u32string_view text) {
    std::string out;
    for (const char32_t c : text) utf8_append(out, c);
    return out;
}
std::string composed(std::u32string_view text) { return nfc(utf8(text)); }
}  // namespace

TEST_CASE("unicode: every scalar value goes through UTF-8 and back") {
    size_t wrong = 0;
    for (char32_t c = 0; c < 0x110000; ++c) {
        std::string text;
        utf8_append(text, c);
        const bool surrogate = c >= 0xd800 && c < 0xe000;
        size_t at = 0;
        wrong += utf8_next(text, &at) != (surrogate ? char32_t(0xfffd) : c) || at != text.size();
    }
    CHECK(wrong == 0);
    std::string text;
    utf8_append(text, 0x110000);
    CHECK(text == "\xef\xbf\xbd");
}

TEST_CASE("unicode: malformed bytes and their maximal subparts") {
    struct Case {
        std::string_view text;
        size_t subparts;  // code points and malformed pieces
    };
    // clang-format off
    for (const Case& c : {Case{"\x80", 1}, {"\xc0\x80", 2}, {"\xc1\xbf", 2}, {"\xc3", 1},
                          {"\xe0\x80\x80", 3}, {"\xe2\x82", 1}, {"\xe2\x82z", 2},
                          {"\xed\xa0\x80", 3}, {"\xf0\x80\x80\x80", 4}, {"\xf0\x9f\x98", 1},
                          {"\xf4\x90\x80\x80", 4}, {"\xf5", 1}, {"\xff\xfe", 2},
                          // clang-format on
                          {"\xf0\x9f\x98\xf0\x9f\x98\x80", 2}}) {
        CAPTURE(hex_encode(c.text.data(), c.text.size()));
        CHECK(!utf8_valid(c.text));
        CHECK(utf8_count(c.text) == c.subparts);
        CHECK(utf8_valid(utf8_repair(c.text)));
        CHECK(utf8_count(utf8_repair(c.text)) == c.subparts);
    }
    CHECK(utf8_valid(""));
    CHECK(utf8_valid("plain ASCII, longer than eight bytes \xf0\x9f\x98\x80"));
    CHECK(utf8_valid_prefix("twelve bytes\xff and more") == 12);
    CHECK(utf8_repair("a\xffz\xe2\x82") == "a\xef\xbf\xbdz\xef\xbf\xbd");
}

TEST_CASE("unicode: places of code points in valid text") {
    const std::string text = "z\xc3\xa9\xf0\x9f\x98\x80.";  // they begin at 0, 1, 3 and 7
    CHECK(utf8_count(text) == 4);
    const size_t begins[] = {0, 1, 3, 7, text.size(), text.size()};
    for (size_t i = 0; i < 6; ++i) CHECK(utf8_offset(text, i) == begins[i]);
    for (size_t i = 1; i < 5; ++i) CHECK(utf8_previous(text, begins[i]) == begins[i - 1]);
    CHECK(utf8_offset("", 0) == 0);
}

TEST_CASE("unicode: the incomplete end of a stream") {
    const std::string text = "z\xf0\x9f\x98\x80";
    CHECK(utf8_incomplete_suffix("") == 0);
    CHECK(utf8_incomplete_suffix(text) == 0);
    for (size_t missing = 1; missing < 4; ++missing)
        CHECK(utf8_incomplete_suffix(text.substr(0, text.size() - missing)) == 4 - missing);
    CHECK(utf8_incomplete_suffix("\xe0\xa0") == 2);
    for (const char* hopeless : {"\xff", "\x80", "\xc0", "\xe0\x80", "\xed\xa0", "\xf4\x90",
                                 "\x80\x80\x80\x80", "\xc3\xa9"})
        CHECK(utf8_incomplete_suffix(hopeless) == 0);
}

TEST_CASE("unicode: categories") {
    CHECK(category('A') == Category::Lu);
    CHECK(category('z') == Category::Ll);
    CHECK(category(0x100) == Category::Lu);  // in a run of alternating case
    CHECK(category(0x101) == Category::Ll);
    CHECK(category(0x1c5) == Category::Lt);
    CHECK(category(0x2b0) == Category::Lm);
    CHECK(category(0x4e00) == Category::Lo);
    CHECK(category(0x301) == Category::Mn);
    CHECK(category(0x20dd) == Category::Me);
    CHECK(category('7') == Category::Nd);
    CHECK(category(0x2160) == Category::Nl);
    CHECK(category(0xbd) == Category::No);
    CHECK(category('_') == Category::Pc);
    CHECK(category(0xab) == Category::Pi);
    CHECK(category('+') == Category::Sm);
    CHECK(category(0x1f600) == Category::So);
    CHECK(category(' ') == Category::Zs);
    CHECK(category('\n') == Category::Cc);
    CHECK(category(0xd800) == Category::Cs);
    CHECK(category(0x378) == Category::Cn);
    CHECK(category(0x10fffd) == Category::Co);
    CHECK(category(0x10ffff) == Category::Cn);
    CHECK(category(bad_utf8) == Category::Cn);
    CHECK(is_letter(0xe9));
    CHECK(!is_letter('1'));
    CHECK(is_mark(0x903));
    CHECK(is_number(0x0664));
    CHECK(!is_number('a'));
    CHECK(is_punctuation('!'));
    CHECK(!is_punctuation('$'));
    CHECK(is_symbol('$'));
    CHECK(!is_symbol('('));
    size_t counts[4] = {};
    for (char32_t c = 0; c < 0x110000; ++c) {
        counts[0] += is_letter(c);
        counts[1] += is_mark(c);
        counts[2] += is_number(c);
        counts[3] += is_whitespace(c);
    }
    CHECK(counts[0] == 131756);  // DerivedGeneralCategory.txt of 14.0.0
    CHECK(counts[1] == 2408);
    CHECK(counts[2] == 1791);
    CHECK(counts[3] == 25);
}

TEST_CASE("unicode: simple case mapping") {
    CHECK(to_lower(U'A') == U'a');
    CHECK(to_upper(U'z') == U'Z');
    CHECK(to_upper(U'\u00df') == U'\u00df');  // its full mapping would be two letters
    CHECK(to_upper(U'\u00ff') == U'\u0178');
    CHECK(to_lower(U'\u0130') == U'i');
    CHECK(to_upper(U'\u0131') == U'I');
    CHECK(to_lower(U'\u0100') == U'\u0101');
    CHECK(to_lower(U'\u0101') == U'\u0101');
    CHECK(to_upper(U'\u01c6') == U'\u01c4');
    CHECK(to_lower(U'\u01c5') == U'\u01c6');
    CHECK(to_upper(U'\u1f80') == U'\u1f88');
    CHECK(to_lower(U'\u1e9e') == U'\u00df');
    CHECK(to_lower(U'\U00010400') == U'\U00010428');
    CHECK(to_lower(bad_utf8) == bad_utf8);
    // clang-format off
    CHECK(to_lower(std::string_view("\xc3\x89T\xff" "A")) == "\xc3\xa9t\xff" "a");
    CHECK(to_upper(std::string_view("stra\xc3\x9f" "e")) == "STRA\xc3\x9f" "E");
    // clang-format on
}

TEST_CASE("unicode: NFC") {
    CHECK(composed(U"e\u0301") == utf8(U"\u00e9"));
    CHECK(composed(U"\u00e9") == utf8(U"\u00e9"));
    CHECK(composed(U"\u212b") == utf8(U"\u00c5"));         // a singleton
    CHECK(composed(U"\u0958") == utf8(U"\u0915\u093c"));   // never composed
    CHECK(composed(U"a\u0323\u0302") == utf8(U"\u1ead"));  // two steps
    CHECK(composed(U"a\u0302\u0323") == utf8(U"\u1ead"));  // and in the other order
    CHECK(composed(U"\u0344") == utf8(U"\u0308\u0301"));
    CHECK(composed(U"o\u0338\u0327\u0301") == utf8(U"\u00f3\u0338\u0327"));
    CHECK(composed(U"\u1100\u1161\u11a8") == utf8(U"\uac01"));  // Hangul
    CHECK(composed(U"\uac00\u11a8") == utf8(U"\uac01"));
    CHECK(composed(U"\uac01\u11a8") == utf8(U"\uac01\u11a8"));
    CHECK(composed(U"\u1100\u0301\u1161") == utf8(U"\u1100\u0301\u1161"));  // blocked
    CHECK(composed(U"\u09c7\u09be") == utf8(U"\u09cb"));                    // two starters
    CHECK(composed(U"\U0001d15e") == utf8(U"\U0001d157\U0001d165"));
    CHECK(composed(U"\u0301a") == utf8(U"\u0301a"));  // a mark with no base
    CHECK(nfc("plain") == "plain");
    CHECK(nfc("e\xff\xcc\x81") == "e\xff\xcc\x81");  // malformed bytes part them
    // a long run of marks is sorted in n log n
    std::u32string marks(20'000, U'\u0301');
    for (size_t i = 0; i < marks.size(); i += 2) marks[i] = U'\u0323';
    const std::string sorted = composed(U"x" + marks);
    CHECK(sorted.substr(0, 3) == "x\xcc\xa3");
    CHECK(sorted.substr(sorted.size() - 2) == "\xcc\x81");
}

TEST_CASE("unicode: NFC leaves its own output alone, for every code point") {
    size_t wrong = 0;
    for (char32_t c = 0; c < 0x110000; ++c) {
        if (c >= 0xd800 && c < 0xe000) continue;
        const std::string once = composed(std::u32string{U'a', c, U'\u0301'});
        wrong += nfc(once) != once;
    }
    CHECK(wrong == 0);
}

#ifdef VALAR_SOURCE_DIR
TEST_CASE("unicode: the generated block is that of tests/generate_unicode.py") {
    const std::string root = VALAR_SOURCE_DIR;
    const auto script = read_file(root + "/tests/generate_unicode.py", 1 << 20);
    const auto header = read_file(root + "/src/unicode_tables.hpp", 1 << 20);
    REQUIRE(script);
    REQUIRE(header);
    const std::string begin = "// BEGIN GENERATED unicode sha256=" + sha256(*script).hex() + "\n";
    CHECK(header->find(begin) != std::string::npos);
}
#endif

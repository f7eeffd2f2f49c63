// >>unicode
// The generated text is decoded while compiling: lookups are binary searches in read-only tables.
#include "prologue.hpp"

#include "unicode_internal.hpp"
#include "unicode_tables.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// Reads the numbers of a generated table; tests/generate_unicode.py says how they are spelled.
struct UnicodeText {
    const char* at;
    constexpr uint32_t digit() {
        const char c = *at++;
        return c == '~' ? '\\' - 35 : c == '}' ? '?' - 35 : uint32_t(c - 35);
    }
    constexpr uint32_t number() {
        uint32_t value = 0, shift = 0, d = 32;
        for (; d >= 32; shift += 5) {
            d = digit();
            value |= (d & 31) << shift;
        }
        return value;
    }
    constexpr uint32_t signed_number() {  // to be added modulo 2^32
        const uint32_t value = number();
        return value & 1 ? ~(value >> 1) : value >> 1;
    }
};

constexpr uint32_t category_alternating = 30;  // a run of Lu, Ll, Lu, Ll ...

// first code point * 32 + category
constexpr auto unicode_categories = [] {
    std::array<uint32_t, unicode_category_count> runs{};
    UnicodeText text{unicode_category_text};
    uint32_t code = 0;
    for (uint32_t& run : runs) {
        const uint32_t kind = text.digit();
        run = code << 5 | (kind & 31);
        code += kind < 32 ? 1 : text.number() + 2;
    }
    return runs;
}();

struct CaseRun {
    uint32_t first, last;  // code points
    uint32_t step;         // 1: all of them; 2: every other
    uint32_t distance;     // modulo 2^32
};

template <size_t Count>
constexpr std::array<CaseRun, Count> decode_case_runs(const char* generated) {
    std::array<CaseRun, Count> runs{};
    UnicodeText text{generated};
    uint32_t code = 0;
    for (CaseRun& run : runs) {
        code += text.number();
        const uint32_t steps = text.number(), step = 1 + (steps & 1);
        run = {code, code + steps / 2 * step, step, text.signed_number()};
    }
    return runs;
}
constexpr auto unicode_lower = decode_case_runs<unicode_lower_count>(unicode_lower_text);
constexpr auto unicode_upper = decode_case_runs<unicode_upper_count>(unicode_upper_text);

struct CombiningRun {
    uint32_t first, last;
    uint32_t order;  // canonical combining class
};
constexpr auto unicode_combining = [] {
    std::array<CombiningRun, unicode_combining_count> runs{};
    UnicodeText text{unicode_combining_text};
    uint32_t code = 0;
    for (CombiningRun& run : runs) {
        code += text.number();
        const uint32_t more = text.number();
        run = {code, code + more, text.number()};
    }
    return runs;
}();

struct Decomposition {
    uint32_t first;  // named alike in all tables: the code point that is searched for
    uint32_t a, b;   // b == 0: a single code point
};
constexpr auto unicode_decomposition = [] {
    std::array<Decomposition, unicode_decomposition_count> all{};
    UnicodeText text{unicode_decomposition_text};
    Decomposition last{};
    for (Decomposition& one : all) {
        last.first += text.number() / 2;
        last.a += text.signed_number();
        last.b += text.signed_number();
        one = last;
    }
    return all;
}();

// Places in unicode_decomposition, ordered by (a, b), of the pairs that compose.
constexpr auto unicode_composition = [] {
    std::array<uint16_t, unicode_composition_count> places{};
    UnicodeText text{unicode_composition_text};
    uint32_t place = 0;
    for (uint16_t& one : places) one = uint16_t(place += text.signed_number());
    return places;
}();

// The last entry whose `first` is not above `code`, or null.
template <class Table>
const typename Table::value_type* unicode_find(const Table& table, char32_t code) {
    const auto above = std::upper_bound(
        table.begin(), table.end(), code,
        [](char32_t c, const typename Table::value_type& entry) { return c < entry.first; });
    return above == table.begin() ? nullptr : &*(above - 1);
}

template <class Table>
char32_t map_case(const Table& table, char32_t c) {
    const CaseRun* run = unicode_find(table, c);
    if (run == nullptr || c > run->last || (c - run->first) % run->step != 0) return c;
    return c + run->distance;
}

uint8_t combining_class(char32_t c) {
    const CombiningRun* run = c < 0x300 ? nullptr : unicode_find(unicode_combining, c);
    return run != nullptr && c <= run->last ? uint8_t(run->order) : uint8_t(0);
}

std::string map_text(std::string_view text, char32_t (*map)(char32_t)) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(text, &at);
        if (c == bad_utf8) out.append(text, begin, at - begin);
        else utf8_append(out, map(c));
    }
    return out;
}

}  // namespace

char32_t utf8_next(std::string_view text, size_t* at) {
    const unsigned lead = uint8_t(text[(*at)++]);
    if (lead < 0x80) return lead;
    if (lead < 0xc2 || lead > 0xf4) return bad_utf8;
    const int more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    char32_t value = lead & (0x3fu >> more);
    // what the first continuation byte must be: no overlong form, surrogate or value over 10FFFF
    unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 0; i < more; ++i) {
        const unsigned byte = *at < text.size() ? uint8_t(text[*at]) : 0u;
        if (byte < low || byte > high) return bad_utf8;
        value = value << 6 | (byte & 0x3f);
        ++*at;
        low = 0x80;
        high = 0xbf;
    }
    return value;
}

void utf8_append(std::string& out, char32_t c) {
    if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) c = 0xfffd;
    if (c < 0x80) {
        out += char(c);
        return;
    }
    const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    out += char((0xff00u >> (more + 1) & 0xff) | c >> (6 * more));
    for (int i = more - 1; i >= 0; --i) out += char(0x80 | (c >> (6 * i) & 0x3f));
}

size_t utf8_valid_prefix(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        uint64_t eight;
        if (text.size() - at >= 8) {
            std::memcpy(&eight, text.data() + at, 8);
            if ((eight & 0x8080808080808080u) == 0) {
                at += 8;
                continue;
            }
        }
        const size_t begin = at;
        if (utf8_next(text, &at) == bad_utf8) return begin;
    }
    return at;
}

bool utf8_valid(std::string_view text) { return utf8_valid_prefix(text) == text.size(); }

size_t utf8_incomplete_suffix(std::string_view text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
        size_t at = text.size() - back;
        const unsigned lead = uint8_t(text[at]);
        if (lead >= 0x80 && lead < 0xc0) continue;
        const bool cut = lead >= 0xc2 && lead <= 0xf4 && utf8_next(text, &at) == bad_utf8;
        return cut && at == text.size() ? back : 0;
    }
    return 0;
}

size_t utf8_count(std::string_view text) {
    size_t at = utf8_valid_prefix(text);
    size_t count = size_t(std::count_if(text.begin(), text.begin() + ptrdiff_t(at), utf8_begins));
    for (; at < text.size(); ++count) utf8_next(text, &at);
    return count;
}

size_t utf8_offset(std::string_view text, size_t index) {
    size_t at = 0;
    for (; at < text.size(); ++at)
        if (utf8_begins(text[at]) && index-- == 0) break;
    return at;
}

size_t utf8_previous(std::string_view text, size_t at) {
    do --at;
    while (at > 0 && !utf8_begins(text[at]));
    return at;
}

std::string utf8_repair(std::string_view text) {
    std::string out;
    while (!text.empty()) {
        size_t at = utf8_valid_prefix(text);
        out.append(text, 0, at);
        if (at == text.size()) break;
        utf8_next(text, &at);
        utf8_append(out, 0xfffd);
        text.remove_prefix(at);
    }
    return out;
}

Category category(char32_t c) {
    if (c >= bad_utf8) return Category::Cn;
    const auto above = std::upper_bound(unicode_categories.begin(), unicode_categories.end(),
                                        uint32_t(c) << 5 | 31);
    const uint32_t run = *(above - 1);  // the first run begins at 0
    if ((run & 31) == category_alternating) return Category((c - (run >> 5)) & 1);
    return Category(run & 31);
}

bool is_whitespace(char32_t c) {
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
           c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

char32_t to_lower(char32_t c) {
    if (c < 0x80) return c - 'A' < 26 ? c + 32 : c;
    return map_case(unicode_lower, c);
}
char32_t to_upper(char32_t c) {
    if (c < 0x80) return c - 'a' < 26 ? c - 32 : c;
    return map_case(unicode_upper, c);
}
std::string to_lower(std::string_view text) { return map_text(text, to_lower); }
std::string to_upper(std::string_view text) { return map_text(text, to_upper); }

// ---- NFC ------------------------------------------------------------------------------------

namespace {

// Hangul syllables are computed (Unicode 3.12): LV = base + (l * 21 + v) * 28, LVT = LV + t.
constexpr char32_t hangul_base = 0xac00, hangul_l = 0x1100, hangul_v = 0x1161, hangul_t = 0x11a7;
constexpr uint32_t hangul_l_count = 19, hangul_v_count = 21, hangul_t_count = 28;
constexpr uint32_t hangul_count = hangul_l_count * hangul_v_count * hangul_t_count;

struct NormalChar {
    char32_t code;
    uint8_t order;
};

void decompose(std::vector<NormalChar>& out, char32_t c) {
    if (c - hangul_base < hangul_count) {
        const uint32_t index = c - hangul_base, t = index % hangul_t_count;
        const uint32_t lv = index / hangul_t_count;
        out.push_back({hangul_l + lv / hangul_v_count, 0});
        out.push_back({hangul_v + lv % hangul_v_count, 0});
        if (t != 0) out.push_back({hangul_t + t, 0});
        return;
    }
    // Only the first half of a pair decomposes again, four deep at most.
    char32_t tail[8];
    size_t tail_count = 0;
    for (;;) {
        const Decomposition* found = unicode_find(unicode_decomposition, c);
        if (found == nullptr || found->first != c) break;
        if (found->b != 0) tail[tail_count++] = found->b;
        c = found->a;
    }
    out.push_back({c, combining_class(c)});
    while (tail_count-- > 0) out.push_back({tail[tail_count], combining_class(tail[tail_count])});
}

char32_t compose_pair(char32_t a, char32_t b) {  // 0: they do not compose
    if (a - hangul_l < hangul_l_count && b - hangul_v < hangul_v_count)
        return hangul_base + ((a - hangul_l) * hangul_v_count + (b - hangul_v)) * hangul_t_count;
    if (a - hangul_base < hangul_count && (a - hangul_base) % hangul_t_count == 0 &&
        b - hangul_t - 1 < hangul_t_count - 1)
        return a + (b - hangul_t);
    const uint64_t pair = uint64_t(a) << 32 | b;
    const auto key = [](uint16_t place) {
        return uint64_t(unicode_decomposition[place].a) << 32 | unicode_decomposition[place].b;
    };
    const auto found = std::lower_bound(unicode_composition.begin(), unicode_composition.end(),
                                        pair,
                                        [&](uint16_t place, uint64_t p) { return key(place) < p; });
    if (found == unicode_composition.end() || key(*found) != pair) return 0;
    return unicode_decomposition[*found].first;
}

// Sorts the marks behind each starter, in place.
void sort_marks(std::vector<NormalChar>& run) {
    for (size_t i = 0; i < run.size();) {
        size_t end = i + 1;
        while (end < run.size() && run[end].order != 0) ++end;
        const auto before = [](NormalChar x, NormalChar y) { return x.order < y.order; };
        sort_items(run, before, run[i].order == 0 ? i + 1 : i, end);
        i = end;
    }
}

// Composes what is sorted (UAX 15, D117), in place.
void compose(std::vector<NormalChar>& run) {
    constexpr size_t none = SIZE_MAX;
    size_t starter = none, kept = 0;  // in place: the first `kept` are done
    for (size_t i = 0; i < run.size(); ++i) {
        const NormalChar c = run[i];
        const bool blocked = starter != none && kept - starter > 1 &&
                             run[kept - 1].order >= c.order;
        const char32_t whole = starter == none || blocked ? 0
                                                          : compose_pair(run[starter].code, c.code);
        if (whole != 0) {
            run[starter].code = whole;
            continue;
        }
        if (c.order == 0) starter = kept;
        run[kept++] = c;
    }
    run.resize(kept);
}

std::string normalize(std::string_view text, bool composed, char32_t first_changed) {
    std::string out;
    out.reserve(text.size());
    std::vector<NormalChar> run;
    const auto flush = [&] {
        sort_marks(run);
        if (composed) compose(run);
        for (const NormalChar& c : run) utf8_append(out, c.code);
        run.clear();
    };
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(text, &at);
        if (c < first_changed || c == bad_utf8) flush();
        if (c == bad_utf8) out.append(text, begin, at - begin);
        else decompose(run, c);
    }
    flush();
    return out;
}

}  // namespace

std::string nfc(std::string_view text) {
    // All below U+0300, whose first byte is 0xCC, is composed and composes only with what follows.
    size_t at = 0;
    while (at < text.size() && uint8_t(text[at]) < 0xcc) ++at;
    if (at == text.size()) return std::string(text);
    return normalize(text, true, 0x300);
}

std::string nfd(std::string_view text) { return normalize(text, false, 0xc0); }

}  // namespace detail
}  // namespace v1
}  // namespace valar

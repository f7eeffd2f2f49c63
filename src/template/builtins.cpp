#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/renderer.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {
namespace {

// ---- filters, tests, methods, functions -----------------------------------------------------
// What a table entry shares with another or needs more than two lines for stands before the tables.

const std::string* chosen_characters(const Value& v) { return is_string(v) ? &chars(v) : nullptr; }

Value strip(Renderer& r, const Value& v, const Value& set, int sides) {
    const Value s = r.to_string(v);
    if (!is_absent(set) && !r.want(set, Kind::string)) return {};
    r.charge_bytes(chars(s).size() / 8);
    return r.piece(s, stripped(chars(s), chosen_characters(set), sides));
}

Value case_mapped(Renderer& r, const Value& v, bool upper) {
    const Value s = r.to_string(v);
    Text out;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        if (!r.failed()) r.append(out, upper ? to_upper(run) : to_lower(run), request);
    });
    return make_text(std::move(out));
}

/// Upper case at the start and after each character for which `separates` holds, else lower case.
Value capitalized(Renderer& r, const Value& v, bool (*separates)(char32_t)) {
    const Value s = r.to_string(v);
    Text out;
    bool start = true;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        std::string mapped;
        r.charge_bytes(run.size());
        for (size_t at = 0; at < run.size() && !r.failed();) {
            const char32_t c = utf8_next(run, &at);
            utf8_append(mapped, start ? to_upper(c) : to_lower(c));
            start = separates(c);
        }
        r.append(out, mapped, request);
    });
    return make_text(std::move(out));
}
bool separates_nothing(char32_t) { return false; }
bool separates_title(char32_t c) {  // of the method
    const Category k = category(c);
    return k > Category::Lt;
}
bool separates_words(char32_t c) {  // of the filter
    return python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
}

/// Where `separator`, or white space when it is null, divides s, at most `limit` times.
std::vector<ByteRange> split_places(Renderer& r, std::string_view s, const std::string* separator,
                                    size_t limit, bool from_right) {
    std::vector<ByteRange> pieces;
    const auto word_at = [&](size_t at) { return at + stripped(s.substr(at), nullptr, 1).begin; };
    const auto more = [&] { return r.charge(1) && (from_right || pieces.size() < limit); };
    size_t begin = separator ? 0 : word_at(0);
    while ((separator || begin < s.size()) && more()) {
        size_t end = begin, next = begin;
        if (separator) {
            end = find_text(s, *separator, begin);
            if (end == std::string_view::npos) break;
            next = end + separator->size();
        } else {
            while (next < s.size() && !python_space(utf8_next(s, &next))) end = next;
            next = word_at(end);
        }
        pieces.push_back({begin, end});
        begin = next;
    }
    // What is left keeps the white space at its end.
    if (separator || begin < s.size()) pieces.push_back({begin, s.size()});
    if (pieces.size() > limit && from_right) {
        pieces.erase(pieces.begin(), pieces.end() - ptrdiff_t(limit) - 1);
        pieces[0].begin = 0;
    }
    return pieces;
}

Value split(Renderer& r, const Value& s, Arguments& a, bool from_right) {
    const Value &separator = a.values[0], &limit = a.values[1];
    if (!is_absent(separator) && !r.want(separator, Kind::string)) return {};
    if (!is_absent(limit) && !r.want(limit, Kind::integer)) return {};
    const std::string* const by = chosen_characters(separator);
    if (by && by->empty()) return r.fail("split: an empty separator");
    if (!r.charge_bytes(chars(s).size() + (by ? by->size() * 4 : 0))) return {};
    List pieces;
    const bool everywhere = is_absent(limit) || limit.integer < 0;
    const size_t most = everywhere ? SIZE_MAX - 1 : size_t(limit.integer);
    for (ByteRange range : split_places(r, chars(s), by, most, from_right)) {
        if (r.failed()) break;
        pieces.push_back(r.piece(s, range));
    }
    return r.list(Kind::list, std::move(pieces));
}

Value split_lines(Renderer& r, const Value& s, const Value& keep_ends) {
    const auto ends_line = [](char32_t c) {
        return (c >= '\n' && c <= '\r') || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
               c == 0x2029;
    };
    const std::string& all = chars(s);
    List lines;
    for (size_t begin = 0; begin < all.size() && !r.failed();) {
        size_t end = begin, next = begin;
        while (next < all.size() && !ends_line(utf8_next(all, &next))) end = next;
        if (end + 1 < all.size() && all[end] == '\r' && all[end + 1] == '\n') next = end + 2;
        lines.push_back(r.piece(s, {begin, truth(keep_ends) ? next : end}));
        begin = next;
    }
    return r.list(Kind::list, std::move(lines));
}

Value replace(Renderer& r, const Value& v, Arguments& a) {
    const Value s = r.to_string(v);
    if (!r.want(a.values[0], Kind::string) || !r.want(a.values[1], Kind::string)) return {};
    if (!is_absent(a.values[2]) && !r.want(a.values[2], Kind::integer)) return {};
    const std::string &all = chars(s), &old = chars(a.values[0]);
    int64_t left = is_absent(a.values[2]) || a.values[2].integer < 0 ? INT64_MAX
                                                                     : a.values[2].integer;
    Text out;
    size_t begin = 0;
    r.charge_bytes(all.size() / 8 + old.size() * 4);
    while (left-- > 0 && r.charge_bytes(16)) {
        // An empty `old` stands before every character and at the end.
        const size_t at = old.empty() ? begin : find_text(all, old, begin);
        if (at == std::string::npos) break;
        size_t next = at + old.size();
        if (old.empty() && at < all.size()) utf8_next(all, &next);
        r.append(out, text_in(s), {begin, at});
        r.append(out, text_in(a.values[1]));
        if (old.empty()) r.append(out, text_in(s), {at, next});
        begin = next;
        if (old.empty() && at == all.size()) break;
    }
    r.append(out, text_in(s), {begin, all.size()});
    return make_text(std::move(out));
}

/// Python's find and rfind: an index in code points, or -1.
Value find_index(Renderer& r, const Value& s, const Value& needle, bool last) {
    if (!r.want(needle, Kind::string)) return {};
    if (!r.charge_bytes(chars(s).size() + chars(needle).size() * 4)) return {};
    const std::string& all = chars(s);
    size_t found = find_text(all, chars(needle));
    for (size_t at = found; last && at != std::string::npos && r.charge_bytes(16);) {
        found = at;
        at = at < all.size() ? find_text(all, chars(needle), at + 1) : std::string::npos;
    }
    if (found == std::string::npos) return make_int(-1);
    return make_int(int64_t(utf8_count(std::string_view(all).substr(0, found))));
}

Value count_text(Renderer& r, const Value& s, const Value& needle) {
    if (!r.want(needle, Kind::string)) return {};
    if (!r.charge_bytes(chars(s).size() + chars(needle).size() * 4)) return {};
    const std::string &all = chars(s), &what = chars(needle);
    if (what.empty()) return make_int(int64_t(utf8_count(all)) + 1);
    int64_t count = 0;
    for (size_t at = 0; (at = find_text(all, what, at)) != std::string::npos; at += what.size())
        ++count;
    return make_int(count);
}

bool affix_is(std::string_view s, std::string_view affix, bool at_end) {
    return s.size() >= affix.size() &&
           s.substr(at_end ? s.size() - affix.size() : 0, affix.size()) == affix;
}

Value has_affix(Renderer& r, const Value& s, const Value& affix, bool at_end) {
    const List options = affix.kind == Kind::tuple ? list_in(affix) : List{affix};
    for (const Value& option : options) {
        if (!r.want(option, Kind::string) || !r.charge_bytes(chars(option).size() / 8)) return {};
        if (affix_is(chars(s), chars(option), at_end)) return make_bool(true);
    }
    return make_bool(false);
}

Value without_affix(Renderer& r, const Value& s, const Value& affix, bool at_end) {
    if (!r.want(affix, Kind::string)) return {};
    const size_t size = chars(s).size(), cut = chars(affix).size();
    if (!affix_is(chars(s), chars(affix), at_end)) return s;
    return r.piece(s, at_end ? ByteRange{0, size - cut} : ByteRange{cut, size});
}

/// Whether s has characters and `holds` for each of them.
Value all_characters(Renderer& r, const Value& s, bool (*holds)(char32_t)) {
    r.charge_bytes(chars(s).size());
    for (size_t at = 0; at < chars(s).size() && !r.failed();)
        if (!holds(utf8_next(chars(s), &at))) return make_bool(false);
    return make_bool(!chars(s).empty());
}

/// islower and isupper: some letter has a case, and it is this one everywhere.
Value has_case(Renderer& r, const Value& v, bool upper) {
    const Value s = r.to_string(v);
    const std::string &all = chars(s), other = upper ? to_upper(all) : to_lower(all);
    r.charge_bytes(all.size());
    return make_bool(all == other && all != (upper ? to_lower(all) : to_upper(all)));
}

Value joined(Renderer& r, const Value& items, Arguments& a) {  // d attribute
    const Value list = r.items_of(items), between = r.to_string(a.values[0]);
    const Value& attribute = a.values[1];
    if (r.failed()) return {};
    Text out;
    bool first = true;
    for (const Value& item : list_in(list)) {
        if (!std::exchange(first, false)) r.append(out, text_in(between));
        r.print(out, is_absent(attribute) ? item : r.path(item, attribute));
        if (r.failed()) return {};
    }
    return make_text(std::move(out));
}

/// The method: all items must be strings.
Value joined_strings(Renderer& r, const Value& separator, const Value& items) {
    const Value list = r.items_of(items);
    if (r.failed()) return {};
    for (const Value& item : list_in(list))
        if (!r.want(item, Kind::string)) return {};
    Arguments as_filter{{separator, {}}, {}};
    return joined(r, list, as_filter);
}

Value indent(Renderer& r, const Value& v, Arguments& a) {
    Text margin;
    if (is_string(a.values[0])) r.append(margin, text_in(a.values[0]));
    const int64_t width = is_absent(a.values[0]) ? 4
                          : is_int(a.values[0])  ? a.values[0].integer
                                                 : 0;
    for (int64_t i = 0; i < width && r.charge(1); ++i) margin.text += ' ';
    Text text;
    r.print(text, v);
    r.append(text, "\n", false);  // as Jinja does: else a last empty line would be lost
    const Value lines = split_lines(r, make_text(std::move(text)), {});
    if (r.failed()) return {};
    Text out;
    for (size_t i = 0; i < list_in(lines).size() && !r.failed(); ++i) {
        const Value& line = list_in(lines)[i];
        if (i > 0) r.append(out, "\n", false);
        if (i == 0 ? truth(a.values[1]) : truth(line) || truth(a.values[2])) r.append(out, margin);
        r.append(out, text_in(line));
    }
    return make_text(std::move(out));
}

Value to_json(Renderer& r, const Value& v,
              Arguments& a) {  // ensure_ascii indent separators sort_keys
    WriteStyle style;
    style.json = true;
    style.ascii = truth(a.values[0]);
    style.sorted = truth(a.values[3]);
    style.lines = !is_absent(a.values[1]);
    if (style.lines) {
        style.comma = ",";
        const bool text = is_string(a.values[1]);
        if (!text && !r.want(a.values[1], Kind::integer)) return {};
        const int64_t width = text ? 0 : std::clamp<int64_t>(a.values[1].integer, 0, 1000);
        style.indent = text ? chars(a.values[1]) : std::string(size_t(width), ' ');
    }
    if (!is_absent(a.values[2])) {
        const Value pair = r.items_of(a.values[2]);
        if (r.failed()) return {};
        if (list_in(pair).size() != 2) return r.fail("tojson: separators must be two strings");
        for (const Value& item : list_in(pair))
            if (!r.want(item, Kind::string)) return {};
        style.comma = chars(list_in(pair)[0]);
        style.colon = chars(list_in(pair)[1]);
    }
    Text out;
    r.write(out, v, style, 0, false);
    return make_text(std::move(out));
}

Value length(Renderer& r, const Value& v) {
    switch (v.kind) {
        case Kind::undefined: return make_int(0);
        case Kind::string:
            r.charge_bytes(chars(v).size() / 8);
            return make_int(int64_t(utf8_count(chars(v))));
        case Kind::list:
        case Kind::tuple: return make_int(int64_t(list_in(v).size()));
        case Kind::dict: return make_int(int64_t(dict_in(v).size()));
        default: return r.fail(join({"'", r.what(v), "' has no length"}));
    }
}

Value to_list(Renderer& r, const Value& v) {
    const Value items = r.items_of(v);
    return r.failed() ? Value{} : r.list(Kind::list, list_in(items));
}

Value end_item(Renderer& r, const Value& v, bool last) {
    const Value items = r.items_of(v);
    if (r.failed() || list_in(items).empty()) return {};
    return last ? list_in(items).back() : list_in(items).front();
}

Value reversed(Renderer& r, const Value& v) {
    if (is_string(v)) return r.slice(v, make_none(), make_none(), make_int(-1));
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    return r.list(Kind::iterator, List(list_in(items).rbegin(), list_in(items).rend()));
}

/// A dict's members as pairs; `part` 0: pairs, 1: keys, 2: values.
Value members(Renderer& r, const Value& v, Kind kind, int part) {
    if (v.kind == Kind::undefined) return r.list(kind, {});
    if (!r.want(v, Kind::dict)) return {};
    List made;
    for (const Entry& e : dict_in(v)) {
        if (!r.charge(1)) return {};
        made.push_back(part == 0   ? make_list(Kind::tuple, {e.key, e.value})
                       : part == 1 ? e.key
                                   : e.value);
    }
    return r.list(kind, std::move(made));
}

/// What filters compare: an attribute, if asked for, and letters without their case.
Value comparison_key(Renderer& r, const Value& item, const Value& attribute, bool case_sensitive) {
    const Value key = is_absent(attribute) ? item : r.path(item, attribute);
    return is_string(key) && !case_sensitive ? case_mapped(r, key, false) : key;
}

Value sorted(Renderer& r, const List& items, const Value& attribute, bool case_sensitive,
             bool reverse) {
    Dict keyed;
    for (const Value& item : items) {
        if (!r.charge(1 + size_t(std::bit_width(items.size())))) return {};
        keyed.push_back({comparison_key(r, item, attribute, case_sensitive), item});
    }
    sort_items(keyed, [&](const Entry& a, const Entry& b) {
        return !r.failed() && (reverse ? r.less(b.key, a.key) : r.less(a.key, b.key));
    });
    List made;
    for (Entry& e : keyed) made.push_back(std::move(e.value));
    return r.list(Kind::list, std::move(made));
}

Value sort(Renderer& r, const Value& v, Arguments& a) {  // reverse case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    return sorted(r, list_in(items), a.values[2], truth(a.values[1]), truth(a.values[0]));
}

Value sort_dict(Renderer& r, const Value& v, Arguments& a) {  // case_sensitive by reverse
    const Value pairs = members(r, v, Kind::list, 0);
    const bool by_value = is_string(a.values[1]) && chars(a.values[1]) == "value";
    if (r.failed()) return {};
    return sorted(r, list_in(pairs), make_int(by_value), truth(a.values[0]), truth(a.values[2]));
}

Value unique(Renderer& r, const Value& v, Arguments& a) {  // case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List keys, made;
    for (const Value& item : list_in(items)) {
        const Value key = comparison_key(r, item, a.values[1], truth(a.values[0]));
        const bool seen = std::any_of(keys.begin(), keys.end(), [&](const Value& k) {
            return !r.failed() && r.equal(k, key);
        });
        if (r.failed()) return {};
        if (seen) continue;
        keys.push_back(key);
        made.push_back(item);
    }
    return r.list(Kind::iterator, std::move(made));
}

Value extreme(Renderer& r, const Value& v, Arguments& a,
              bool largest) {  // case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed() || list_in(items).empty()) return {};
    const Value order = sorted(r, list_in(items), a.values[1], truth(a.values[0]), largest);
    return r.failed() ? Value{} : list_in(order)[0];
}

Value sum(Renderer& r, const Value& v, Arguments& a) {  // attribute start
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    Value total = is_absent(a.values[1]) ? make_int(0) : a.values[1];
    for (const Value& item : list_in(items)) {
        const Value next = is_absent(a.values[0]) ? item : r.path(item, a.values[0]);
        if (!r.failed()) total = r.binary(Op::add, std::move(total), next);
    }
    return total;
}

/// select, reject and, with an attribute first, selectattr, rejectattr.
Value selected_items(Renderer& r, const Value& v, Arguments& a, bool by_attribute, bool wanted) {
    const size_t skip = by_attribute ? 1 : 0;
    const Builtin* test = nullptr;
    if (a.values.size() < skip) return r.fail("the name of an attribute is missing");
    if (a.values.size() > skip) {
        if (!r.want(a.values[skip], Kind::string)) return {};
        test = find_test(chars(a.values[skip]));
        if (!test) return r.fail(join({"no test named '", chars(a.values[skip]), "'"}));
    }
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List kept;
    for (const Value& item : list_in(items)) {
        Value holds = by_attribute ? r.path(item, a.values[0]) : item;
        if (test && r.charge(1)) {
            Arguments rest{List(a.values.begin() + ptrdiff_t(skip) + 1, a.values.end()), a.named};
            holds = r.call(*test, holds, rest);
        }
        if (r.failed()) return {};
        if (truth(holds) == wanted) kept.push_back(item);
    }
    return r.list(Kind::iterator, std::move(kept));
}

/// map("filter", arguments ...), or map(attribute = "a.b", default = x).
Value mapped(Renderer& r, const Value& v, Arguments& a) {
    Value attribute, otherwise;
    for (auto& [name, value] : a.named) {
        if (name == "attribute") attribute = value;
        if (name == "default") otherwise = value;
    }
    const Builtin* filter = nullptr;
    if (is_absent(attribute)) {
        if (a.values.empty()) return r.fail("map: needs a filter or an attribute");
        if (!r.want(a.values[0], Kind::string)) return {};
        filter = find_filter(chars(a.values[0]));
        if (!filter) return r.fail(join({"no filter named '", chars(a.values[0]), "'"}));
    }
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List made;
    for (const Value& item : list_in(items)) {
        if (!r.charge(1)) return {};
        if (filter) {
            Arguments rest{List(a.values.begin() + 1, a.values.end()), a.named};
            made.push_back(r.call(*filter, item, rest));
        } else {
            Value part = r.path(item, attribute);
            made.push_back(part.kind == Kind::undefined ? otherwise : std::move(part));
        }
    }
    return r.list(Kind::iterator, std::move(made));
}

Value to_int(Renderer& r, const Value& v, const Value& otherwise) {
    if (is_int(v)) return make_int(v.integer);
    double d = v.kind == Kind::real ? v.real : std::nan("");
    if (is_string(v)) {
        const ByteRange range = stripped(chars(v), nullptr, 3);
        const std::string text = chars(v).substr(range.begin, range.end - range.begin);
        char* end = nullptr;
        errno = 0;
        const long long value = std::strtoll(text.c_str(), &end, 10);
        if (!text.empty() && *end == '\0' && errno == 0) return make_int(value);
        if (const auto real = parse_double(text)) d = *real;
    }
    if (d > -9.2e18 && d < 9.2e18) return make_int(int64_t(d));
    return otherwise.kind == Kind::undefined && !r.failed() ? make_int(0) : otherwise;
}

Value to_real(Renderer&, const Value& v, const Value& otherwise) {
    if (is_number(v)) return make_real(number_in(v));
    if (is_string(v)) {
        const ByteRange range = stripped(chars(v), nullptr, 3);
        const auto real = parse_double(
            std::string_view(chars(v)).substr(range.begin, range.end - range.begin));
        if (real) return make_real(*real);
    }
    return otherwise.kind == Kind::undefined ? make_real(0) : otherwise;
}

Value range(Renderer& r, const Value&, Arguments& a) {
    if (a.values.empty() || a.values.size() > 3 || !a.named.empty())
        return r.fail("range: needs 1 to 3 integers");
    for (const Value& v : a.values)
        if (!r.want(v, Kind::integer)) return {};
    const bool one = a.values.size() == 1;
    const int64_t from = one ? 0 : a.values[0].integer, to = a.values[one ? 0 : 1].integer;
    const int64_t by = a.values.size() == 3 ? a.values[2].integer : 1;
    constexpr int64_t most = INT64_C(1) << 60;  // so that nothing below overflows
    if (by == 0 || std::max({from, to, by}) > most || std::min({from, to, by}) < -most)
        return r.fail("range: a step of 0, or numbers too large");
    const int64_t count = std::max<int64_t>(0, (to - from + by - (by > 0 ? 1 : -1)) / by);
    if (count > int64_t(ChatTemplate::max_range)) return r.fail("range: over 100,000 numbers");
    List items;
    for (int64_t i = 0; i < count; ++i) items.push_back(make_int(from + i * by));
    return r.list(Kind::list, std::move(items));
}

/// namespace(a = 1), dict(a = 1), and both from a dict.
Dict fields_of(Renderer& r, Arguments& a) {
    Dict fields;
    for (const Value& v : a.values)
        if (r.want(v, Kind::dict))
            fields.insert(fields.end(), dict_in(v).begin(), dict_in(v).end());
    for (auto& [name, value] : a.named)
        if (r.charge_bytes(fields.size() * 4)) set_entry(fields, make_text(name), std::move(value));
    return fields;
}

/// A directive of strftime that prints a number, filled up with zeros.
struct TimeNumber {
    char letter;
    int width;
    int (*value)(const CivilTime& t);
};
const TimeNumber time_numbers[] = {
    {'Y', 4, [](const CivilTime& t) { return int(t.year); }},
    {'y', 2, [](const CivilTime& t) { return int(t.year % 100); }},
    {'m', 2, [](const CivilTime& t) { return t.month; }},
    {'d', 2, [](const CivilTime& t) { return t.day; }},
    {'j', 3, [](const CivilTime& t) { return t.year_day; }},
    {'H', 2, [](const CivilTime& t) { return t.hour; }},
    {'I', 2, [](const CivilTime& t) { return (t.hour + 11) % 12 + 1; }},
    {'M', 2, [](const CivilTime& t) { return t.minute; }},
    {'S', 2, [](const CivilTime& t) { return t.second; }},
};

/// What %letter stands for, or `bare`, without zeros, what %-letter does. English names.
std::string time_directive(const CivilTime& t, char letter, bool bare) {
    static const char* const months[] = {"January",   "February", "March",    "April",
                                         "May",       "June",     "July",     "August",
                                         "September", "October",  "November", "December"};
    static const char* const week[] = {"Sunday",   "Monday", "Tuesday", "Wednesday",
                                       "Thursday", "Friday", "Saturday"};
    for (const TimeNumber& n : time_numbers)
        if (n.letter == letter) return format("%0*d", bare ? 1 : n.width, n.value(t));
    switch (letter) {
        case 'e': return format("%2d", t.day);
        case 'p': return t.hour < 12 ? "AM" : "PM";
        case 'B': return months[t.month - 1];
        case 'b': return std::string(months[t.month - 1], 3);
        case 'A': return week[t.weekday];
        case 'a': return std::string(week[t.weekday], 3);
        case 'F': return format("%04d-%02d-%02d", int(t.year), t.month, t.day);
        case 'T': return format("%02d:%02d:%02d", t.hour, t.minute, t.second);
        case '%': return "%";
        default: return std::string("%") + letter;
    }
}

/// What strftime_now prints: the time in the caller's own zone.
std::string formatted_time(int64_t seconds, std::string_view pattern) {
    seconds = std::clamp<int64_t>(seconds, 0, INT64_C(253402300799));  // 1970 to 9999
    const CivilTime t = civil_time(seconds);
    std::string out;
    for (size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] != '%' || i + 1 == pattern.size()) {
            out += pattern[i];
            continue;
        }
        const bool bare = pattern[i + 1] == '-' && i + 2 < pattern.size();
        i += bare ? 2 : 1;
        out += time_directive(t, pattern[i], bare);
    }
    return out;
}

Value to_text(Renderer& r, const Value& v) { return r.to_string(v); }

Value absolute(Renderer& r, const Value& v) {
    return r.binary(Op::multiply, v, make_int(is_number(v) && number_in(v) < 0 ? -1 : 1));
}

/// A table's entry from a function that takes fewer arguments, or more that the entry fixes.
template <auto function, auto... fixed>
Value on_value(Renderer& r, const Value& v, Arguments&) {
    return function(r, v, fixed...);
}
template <auto function, auto... fixed>
Value with_argument(Renderer& r, const Value& v, Arguments& a) {
    return function(r, v, a.values[0], fixed...);
}
template <auto function, auto... fixed>
Value with_arguments(Renderer& r, const Value& v, Arguments& a) {
    return function(r, v, a, fixed...);
}

Value otherwise(Renderer&, const Value& v, Arguments& a) {  // default_value boolean
    const bool missing = v.kind == Kind::undefined || (truth(a.values[1]) && !truth(v));
    return !missing ? v : a.values[0].kind == Kind::undefined ? make_text("") : a.values[0];
}

const Builtin filters[] = {
    {"abs", "", on_value<absolute>},
    {"capitalize", "", on_value<capitalized, separates_nothing>},
    {"count", "", on_value<length>},
    {"d", "default_value? boolean?", otherwise},
    {"default", "default_value? boolean?", otherwise},
    {"dictsort", "case_sensitive? by? reverse?", sort_dict},
    {"first", "", on_value<end_item, false>},
    {"float", "default?", with_argument<to_real>},
    {"indent", "width? first? blank?", indent},
    {"int", "default?", with_argument<to_int>},
    {"items", "", on_value<members, Kind::iterator, 0>},
    {"join", "d? attribute?", joined},
    {"last", "", on_value<end_item, true>},
    {"length", "", on_value<length>},
    {"list", "", on_value<to_list>},
    {"lower", "", on_value<case_mapped, false>},
    {"map", nullptr, mapped},
    {"max", "case_sensitive? attribute?", with_arguments<extreme, true>},
    {"min", "case_sensitive? attribute?", with_arguments<extreme, false>},
    {"reject", nullptr, with_arguments<selected_items, false, false>},
    {"rejectattr", nullptr, with_arguments<selected_items, true, false>},
    {"replace", "old new count?", replace},
    {"reverse", "", on_value<reversed>},
    {"safe", "", on_value<to_text>},
    {"select", nullptr, with_arguments<selected_items, false, true>},
    {"selectattr", nullptr, with_arguments<selected_items, true, true>},
    {"sort", "reverse? case_sensitive? attribute?", sort},
    {"string", "", on_value<to_text>},
    {"sum", "attribute? start?", sum},
    {"title", "", on_value<capitalized, separates_words>},
    {"tojson", "ensure_ascii? indent? separators? sort_keys?", to_json},
    {"trim", "chars?", with_argument<strip, 3>},
    {"unique", "case_sensitive? attribute?", unique},
    {"upper", "", on_value<case_mapped, true>},
};

Value compared(Renderer& r, const Value& v, const Value& other, Op op) {
    return make_bool(r.compare(op, v, other));
}

Value is_kind(Renderer&, const Value& v, Kind kind) { return make_bool(v.kind == kind); }

Value is_defined(Renderer&, const Value& v) { return make_bool(v.kind != Kind::undefined); }

Value is_numeric(Renderer&, const Value& v) { return make_bool(is_number(v)); }

Value is_callable(Renderer&, const Value& v) {
    return make_bool(v.kind == Kind::undefined || v.kind >= Kind::macro);
}

Value is_iterable(Renderer&, const Value& v, bool sequence) {
    const bool has_items = v.kind >= Kind::string && v.kind <= Kind::dict;
    const bool skipped = sequence && v.kind == Kind::iterator;
    return make_bool(v.kind == Kind::undefined || (has_items && !skipped));
}

Value is_boolean(Renderer&, const Value& v, bool which) {
    return make_bool(v.kind == Kind::boolean && (v.integer != 0) == which);
}

Value is_same(Renderer& r, const Value& v, const Value& other) {
    return make_bool(v.kind == other.kind && r.equal(v, other));
}

Value is_divisible(Renderer& r, const Value& v, const Value& by) {
    const Value rest = r.binary(Op::modulo, v, by);
    return make_bool(is_number(rest) && number_in(rest) == 0);
}

Value is_even(Renderer& r, const Value& v, bool even) {
    return make_bool(truth(is_divisible(r, v, make_int(2))) == even);
}

Value is_known(Renderer&, const Value& v, const Builtin* (*find)(std::string_view)) {
    return make_bool(is_string(v) && find(chars(v)));
}

const Builtin tests[] = {
    {"!=", "other", with_argument<compared, Op::not_equal>},
    {"<", "other", with_argument<compared, Op::less>},
    {"<=", "other", with_argument<compared, Op::less_equal>},
    {"==", "other", with_argument<compared, Op::equal>},
    {">", "other", with_argument<compared, Op::greater>},
    {">=", "other", with_argument<compared, Op::greater_equal>},
    {"boolean", "", on_value<is_kind, Kind::boolean>},
    {"callable", "", on_value<is_callable>},
    {"defined", "", on_value<is_defined>},
    {"divisibleby", "num", with_argument<is_divisible>},
    {"eq", "other", with_argument<compared, Op::equal>},
    {"equalto", "other", with_argument<compared, Op::equal>},
    {"even", "", on_value<is_even, true>},
    {"false", "", on_value<is_boolean, false>},
    {"filter", "", on_value<is_known, find_filter>},
    {"float", "", on_value<is_kind, Kind::real>},
    {"ge", "other", with_argument<compared, Op::greater_equal>},
    {"greaterthan", "other", with_argument<compared, Op::greater>},
    {"gt", "other", with_argument<compared, Op::greater>},
    {"in", "seq", with_argument<compared, Op::in>},
    {"integer", "", on_value<is_kind, Kind::integer>},
    {"iterable", "", on_value<is_iterable, false>},
    {"le", "other", with_argument<compared, Op::less_equal>},
    {"lessthan", "other", with_argument<compared, Op::less>},
    {"lower", "", on_value<has_case, false>},
    {"lt", "other", with_argument<compared, Op::less>},
    {"mapping", "", on_value<is_kind, Kind::dict>},
    {"ne", "other", with_argument<compared, Op::not_equal>},
    {"none", "", on_value<is_kind, Kind::none>},
    {"number", "", on_value<is_numeric>},
    {"odd", "", on_value<is_even, false>},
    {"sameas", "other", with_argument<is_same>},
    {"sequence", "", on_value<is_iterable, true>},
    {"string", "", on_value<is_kind, Kind::string>},
    {"test", "", on_value<is_known, find_test>},
    {"true", "", on_value<is_boolean, true>},
    {"undefined", "", on_value<is_kind, Kind::undefined>},
    {"upper", "", on_value<has_case, true>},
};

bool is_alphanumeric(char32_t c) { return is_letter(c) || detail::is_number(c); }
bool is_decimal(char32_t c) { return category(c) == Category::Nd; }

const Builtin string_methods[] = {
    {"capitalize", "", on_value<capitalized, separates_nothing>},
    {"count", "sub", with_argument<count_text>},
    {"endswith", "suffix", with_argument<has_affix, true>},
    {"find", "sub", with_argument<find_index, false>},
    {"isalnum", "", on_value<all_characters, is_alphanumeric>},
    {"isalpha", "", on_value<all_characters, is_letter>},
    {"isdigit", "", on_value<all_characters, is_decimal>},
    {"islower", "", on_value<has_case, false>},
    {"isspace", "", on_value<all_characters, python_space>},
    {"isupper", "", on_value<has_case, true>},
    {"join", "iterable", with_argument<joined_strings>},
    {"lower", "", on_value<case_mapped, false>},
    {"lstrip", "chars?", with_argument<strip, 1>},
    {"removeprefix", "prefix", with_argument<without_affix, false>},
    {"removesuffix", "suffix", with_argument<without_affix, true>},
    {"replace", "old new count?", replace},
    {"rfind", "sub", with_argument<find_index, true>},
    {"rsplit", "sep? maxsplit?", with_arguments<split, true>},
    {"rstrip", "chars?", with_argument<strip, 2>},
    {"split", "sep? maxsplit?", with_arguments<split, false>},
    {"splitlines", "keepends?", with_argument<split_lines>},
    {"startswith", "prefix", with_argument<has_affix, false>},
    {"strip", "chars?", with_argument<strip, 3>},
    {"title", "", on_value<capitalized, separates_title>},
    {"upper", "", on_value<case_mapped, true>},
};

Value count_item(Renderer& r, const Value& list, const Value& wanted) {
    int64_t count = 0;
    for (const Value& item : list_in(list)) count += r.equal(item, wanted);
    return make_int(count);
}

Value index_of(Renderer& r, const Value& list, const Value& wanted) {
    for (size_t i = 0; i < list_in(list).size(); ++i)
        if (r.equal(list_in(list)[i], wanted)) return make_int(int64_t(i));
    return r.fail("index: the value is not in the list");
}

Value get_member(Renderer& r, const Value& dict, Arguments& a) {  // key default
    r.charge_bytes(dict_in(dict).size() * 4);
    if (const Value* found = find_entry(dict_in(dict), a.values[0])) return *found;
    return a.values[1].kind == Kind::undefined ? make_none() : a.values[1];
}

Value same_dict(Renderer&, const Value& dict) { return dict; }

// Nothing here changes what it belongs to: append, pop, update and their kin do not exist.
const Builtin list_methods[] = {
    {"copy", "", on_value<to_list>},
    {"count", "value", with_argument<count_item>},
    {"index", "value", with_argument<index_of>},
};

const Builtin dict_methods[] = {
    {"copy", "", on_value<same_dict>},
    {"get", "key default?", get_member},
    {"items", "", on_value<members, Kind::list, 0>},
    {"keys", "", on_value<members, Kind::list, 1>},
    {"values", "", on_value<members, Kind::list, 2>},
};

Value cycle(Renderer& r, const Value& loop, Arguments& a) {
    if (a.values.empty()) return r.fail("cycle: needs values");
    return a.values[static_cast<const Loop*>(loop.object.get())->at % a.values.size()];
}

const Builtin loop_methods[] = {{"cycle", nullptr, cycle}};

Value new_dict(Renderer& r, const Value&, Arguments& a) { return r.dict(fields_of(r, a)); }
Value new_space(Renderer& r, const Value&, Arguments& a) { return r.name_space(fields_of(r, a)); }

Value raise_exception(Renderer& r, const Value&, const Value& message) {
    return r.raise(chars(r.to_string(message)));
}

Value strftime_now(Renderer& r, const Value&, const Value& pattern) {
    if (!r.want(pattern, Kind::string) || !r.charge_bytes(chars(pattern).size() * 16)) return {};
    return make_text(formatted_time(r.now_s, chars(pattern)));
}

const Builtin globals[] = {
    {"dict", nullptr, new_dict},
    {"namespace", nullptr, new_space},
    {"raise_exception", "message", with_argument<raise_exception>},
    {"range", nullptr, range},
    {"strftime_now", "format", with_argument<strftime_now>},
};

const Builtin* find_builtin(std::span<const Builtin> table, std::string_view name) {
    for (const Builtin& b : table)
        if (name == b.name) return &b;
    return nullptr;
}

}  // namespace

const Builtin* find_filter(std::string_view name) { return find_builtin(filters, name); }
const Builtin* find_test(std::string_view name) { return find_builtin(tests, name); }
const Builtin* find_global(std::string_view name) { return find_builtin(globals, name); }

const Builtin* find_method(const Value& self, std::string_view name) {
    switch (self.kind) {
        case Kind::string: return find_builtin(string_methods, name);
        case Kind::list: return find_builtin(list_methods, name);
        case Kind::tuple: return find_builtin(std::span(list_methods).subspan(1), name);  // no copy
        case Kind::dict: return find_builtin(dict_methods, name);
        case Kind::loop: return find_builtin(loop_methods, name);
        default: return nullptr;
    }
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

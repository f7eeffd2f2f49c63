#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/formatting.hpp"
#include "template/text_builtins.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
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
    r.write(out, v, style, 0, has_marks(a.values[1]) || has_marks(a.values[2]));
    return r.text_value(std::move(out));
}

Value length(Renderer& r, const Value& v) {
    switch (v.kind) {
        case Kind::undefined: return make_int(0);
        case Kind::string:
            r.charge_bytes(chars(v).size() / 8);
            return make_int(int64_t(utf8_count(chars(v))));
        case Kind::list:
        case Kind::tuple: return make_int(int64_t(list_in(v).size()));
        case Kind::iterator:
            if (is_view(v)) return make_int(int64_t(list_in(v).size()));
            return r.fail("a generator has no length");
        case Kind::dict: return make_int(int64_t(dict_in(v).size()));
        default: return r.fail(join({"'", r.what(v), "' has no length"}));
    }
}

Value to_list(Renderer& r, const Value& v) {
    const Value items = r.items_of(v);
    return r.failed() ? Value{} : r.list(Kind::list, list_in(items));
}

Value end_item(Renderer& r, const Value& v, bool last) {
    const bool generator = v.kind == Kind::iterator && !is_view(v);
    if (generator && last) return r.fail("last: a generator cannot be reversed");
    if (generator) {  // the others stay
        List& left = *static_cast<List*>(v.object.get());
        if (left.empty() || !r.charge_bytes(left.size() * sizeof(Value))) return {};
        Value first = std::move(left.front());
        left.erase(left.begin());
        return first;
    }
    const Value items = r.items_of(v);
    if (r.failed() || list_in(items).empty()) return {};
    return last ? list_in(items).back() : list_in(items).front();
}

Value reversed(Renderer& r, const Value& v) {
    if (is_string(v)) return r.slice(v, make_none(), make_none(), make_int(-1));
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    const bool generator = v.kind == Kind::iterator && !is_view(v);
    return r.list(generator ? Kind::list : Kind::iterator,
                  List(list_in(items).rbegin(), list_in(items).rend()));
}

/// A dict's members, as that view of them or, for a filter, as the generator of their pairs.
Value members(Renderer& r, const Value& v, View view) {
    const View part = view == View::generator ? View::items : view;
    if (v.kind == Kind::undefined) return r.list(Kind::iterator, {});
    if (!r.want(v, Kind::dict)) return {};
    List made;
    for (const Entry& e : dict_in(v)) {
        if (!r.charge(1)) return {};
        made.push_back(part == View::items  ? make_list(Kind::tuple, {e.key, e.value})
                       : part == View::keys ? e.key
                                            : e.value);
    }
    Value all = r.list(Kind::iterator, std::move(made));
    if (!r.failed()) all.integer = int64_t(view);
    return all;
}

/// What filters compare: an attribute, if asked for, and letters without their case.
Value comparison_key(Renderer& r, const Value& item, const Value& attribute, bool case_sensitive) {
    const Value key = is_absent(attribute) ? item : r.path(item, attribute);
    return is_string(key) && !case_sensitive ? case_mapped(r, key, false) : key;
}

/// What sort compares: as above, or a list of such for "a,b".
Value sort_key(Renderer& r, const Value& item, const Value& attributes, bool case_sensitive) {
    if (!is_string(attributes) || chars(attributes).find(',') == std::string::npos)
        return comparison_key(r, item, attributes, case_sensitive);
    List keys;
    const std::string& names = chars(attributes);
    for (size_t begin = 0; begin <= names.size() && !r.failed();) {
        const size_t end = std::min(names.find(',', begin), names.size());
        const Value name = make_text(std::string_view(names).substr(begin, end - begin));
        keys.push_back(comparison_key(r, item, name, case_sensitive));
        begin = end + 1;
    }
    return r.list(Kind::list, std::move(keys));
}

Value sorted(Renderer& r, const List& items, const Value& attribute, bool case_sensitive,
             bool reverse) {
    Dict keyed;
    for (const Value& item : items) {
        if (!r.charge(1 + size_t(std::bit_width(items.size())))) return {};
        keyed.push_back({sort_key(r, item, attribute, case_sensitive), item});
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
    if (!r.want(v, Kind::dict)) return {};
    const Value pairs = members(r, v, View::items);
    const bool by_value = is_string(a.values[1]) && chars(a.values[1]) == "value";
    if (r.failed()) return {};
    if (!by_value && !is_absent(a.values[1]) &&
        !(is_string(a.values[1]) && chars(a.values[1]) == "key"))
        return r.fail("dictsort: by is key or value");
    return sorted(r, list_in(pairs), make_int(by_value), truth(a.values[0]), truth(a.values[2]));
}

/// Tuples of a value of the attribute and the list of what has it, in the order of the values.
Value grouped_by(Renderer& r, const Value& v, Arguments& a) {  // attribute default case_sensitive
    const Value items = r.items_of(v);
    const bool case_sensitive = truth(a.values[2]);
    if (r.failed()) return {};
    List with_key;
    for (const Value& item : list_in(items)) {
        Value key = r.path(item, a.values[0]);
        if (key.kind == Kind::undefined) key = a.values[1];
        with_key.push_back(r.list(Kind::tuple, {std::move(key), item}));
        if (r.failed()) return {};
    }
    const Value order = sorted(r, with_key, make_int(0), case_sensitive, false);
    if (r.failed()) return {};
    List made, group;
    Value key, compared;
    const auto close = [&] {
        if (group.empty()) return;
        Value both = r.list(Kind::tuple, {key, r.list(Kind::list, std::exchange(group, {}))});
        if (!r.failed()) both.integer = 1;
        made.push_back(std::move(both));
    };
    for (const Value& pair : list_in(order)) {
        const Value next = comparison_key(r, pair, make_int(0), case_sensitive);
        if (!group.empty() && !r.equal(next, compared)) close();
        if (r.failed()) return {};
        if (group.empty()) key = list_in(pair)[0];
        compared = next;
        group.push_back(list_in(pair)[1]);
    }
    close();
    return r.list(Kind::list, std::move(made));
}

/// Lists of so many items; the last one filled up.
Value batched(Renderer& r, const Value& v, Arguments& a) {  // linecount fill_with
    if (!r.want(a.values[0], Kind::integer)) return {};
    const Value items = r.items_of(v);
    const int64_t size = a.values[0].integer;
    if (r.failed()) return {};
    List made, row;
    for (const Value& item : list_in(items)) {
        if (!row.empty() && int64_t(row.size()) == size)
            made.push_back(r.list(Kind::list, std::exchange(row, {})));
        row.push_back(item);
        if (!r.charge(1)) return {};
    }
    while (!row.empty() && !is_absent(a.values[1]) && int64_t(row.size()) < size &&
           r.charge_bytes(sizeof(Value)) && r.room(row.size() * 2))
        row.push_back(a.values[1]);
    if (!row.empty()) made.push_back(r.list(Kind::list, std::move(row)));
    return r.list(Kind::iterator, std::move(made));
}

/// So many lists, as equal as can be; the shorter ones filled up.
Value sliced(Renderer& r, const Value& v, Arguments& a) {  // slices fill_with
    if (!r.want(a.values[0], Kind::integer)) return {};
    const Value items = r.items_of(v);
    const int64_t slices = a.values[0].integer;
    if (r.failed()) return {};
    if (slices == 0) return r.fail("slice: division by zero");
    const int64_t size = int64_t(list_in(items).size());
    List made;
    auto at = list_in(items).begin();
    for (int64_t i = 0; i < slices && r.charge(1) && r.room(made.size() * 2); ++i) {
        const auto count = static_cast<ptrdiff_t>(size / slices + (i < size % slices));
        List row(at, at + count);
        at += count;
        if (!is_absent(a.values[1]) && i >= size % slices) row.push_back(a.values[1]);
        made.push_back(r.list(Kind::list, std::move(row)));
    }
    return r.list(Kind::iterator, std::move(made));
}

Value named_attribute(Renderer& r, const Value& v, const Value& name) {
    if (v.kind == Kind::undefined) return r.fail(r.what(v));
    const std::string& called = chars(r.to_string(name));
    if (v.kind == Kind::dict && !find_method(v, called)) return {};  // not its members
    return r.attribute(v, called);
}

Value round_filter(Renderer& r, const Value& v, Arguments& a) {  // precision method
    const std::string method = is_absent(a.values[1]) ? "common" : chars(r.to_string(a.values[1]));
    if (!is_absent(a.values[0]) && !r.want(a.values[0], Kind::integer)) return {};
    const int64_t digits = is_absent(a.values[0])
                               ? 0
                               : std::clamp<int64_t>(a.values[0].integer, -400, 400);
    if (!is_number(v)) return r.fail(join({"round: a number is wanted, not ", r.what(v)}));
    const double d = number_in(v), unit = std::pow(10.0, double(digits));
    Value made;
    if (method == "common") {
        if (is_int(v) && digits >= 0) made = make_int(v.integer);
        else if (is_int(v)) return r.fail("round: of a whole number, decimals only");
        else made = make_real(rounded(d, int(digits)));
    } else if (method == "ceil" || method == "floor") {
        made = make_real((method == "ceil" ? std::ceil(d * unit) : std::floor(d * unit)) / unit);
    } else {
        return r.fail("round: the method must be common, ceil or floor");
    }
    made.request = v.request;
    return made;
}

Value unique(Renderer& r, const Value& v, Arguments& a) {  // case_sensitive attribute
    const Value items = r.items_of(v);
    if (r.failed()) return {};
    List keys, made;
    for (const Value& item : list_in(items)) {
        const Value key = comparison_key(r, item, a.values[1], truth(a.values[0]));
        if (key.kind == Kind::list || key.kind == Kind::dict)
            return r.fail(join({"unhashable type: '", r.what(key), "'"}));
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
        if (r.charge(1)) total = r.binary(Op::add, std::move(total), next);
    }
    return r.failed() ? Value() : total;
}

/// select, reject and, with an attribute first, selectattr, rejectattr.
Value selected_items(Renderer& r, const Value& v, Arguments& a, bool by_attribute, bool wanted) {
    if (!truth(v)) return r.list(Kind::iterator, {});  // None and undefined too
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
    if (!truth(v)) return r.list(Kind::iterator, {});  // None and undefined too
    Value attribute, otherwise;
    if (const Value* given = a.find("attribute")) attribute = *given;
    if (const Value* given = a.find("default")) otherwise = *given;
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
            if (r.failed()) return {};
            made.push_back(part.kind == Kind::undefined ? otherwise : std::move(part));
        }
    }
    return r.list(Kind::iterator, std::move(made));
}

/// An integer as Python's int(text, base) reads it: white space around, _ between digits.
bool read_integer(Renderer& r, std::string_view text, int64_t base, int64_t* value) {
    const bool negative = !text.empty() && text[0] == '-';
    if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
    const char mark = text.size() > 2 && text[0] == '0' ? ascii_lower(text[1]) : '\0';
    const int64_t marked = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
    if (marked && (base == marked || base == 0)) {
        text.remove_prefix(2);
        base = marked;
    }
    if (base == 0) base = 10;
    uint64_t n = 0;
    bool fits = true, digit_before = false;
    for (char c : text) {
        const char low = ascii_lower(c);
        const int digit = is_digit(c) ? c - '0' : low >= 'a' && low <= 'z' ? low - 'a' + 10 : 99;
        if (c == '_' && digit_before) {
            digit_before = false;
            continue;
        }
        if (digit >= base) return false;
        fits = fits && n <= (uint64_t(INT64_MAX) - uint64_t(digit)) / uint64_t(base);
        n = n * uint64_t(base) + uint64_t(digit);
        digit_before = true;
    }
    if (!digit_before) return false;
    if (!fits) r.fail("an integer over 63 bits");
    *value = negative ? -int64_t(n) : int64_t(n);
    return true;
}

Value of_origin(Value made, const Value& v) {
    made.request = has_marks(v);
    return made;
}

std::string_view without_space(const Value& v) {
    const ByteRange range = stripped(chars(v), nullptr, 3);
    return std::string_view(chars(v)).substr(range.begin, range.end - range.begin);
}

Value to_int(Renderer& r, const Value& v, Arguments& a) {  // default base
    if (v.kind == Kind::undefined) return r.fail(r.what(v));
    if (!is_absent(a.values[1]) && !r.want(a.values[1], Kind::integer)) return {};
    const int64_t base = is_absent(a.values[1]) ? 10 : a.values[1].integer;
    if (base < 0 || base == 1 || base > 36) return r.fail("int: the base must be 2 to 36, or 0");
    if (is_int(v)) return of_origin(make_int(v.integer), v);
    double d = v.kind == Kind::real ? v.real : std::nan("");
    if (is_string(v)) {
        r.charge_bytes(chars(v).size());
        int64_t value = 0;
        if (read_integer(r, without_space(v), base, &value)) return of_origin(make_int(value), v);
        if (const auto real = parse_double(without_space(v))) d = *real;
    }
    if (std::isfinite(d) && !(std::fabs(d) < 9.2e18)) return r.fail("an integer over 63 bits");
    if (std::isfinite(d)) return of_origin(make_int(int64_t(d)), v);
    return a.values[0].kind == Kind::undefined ? make_int(0) : a.values[0];
}

Value to_real(Renderer& r, const Value& v, const Value& otherwise) {
    if (v.kind == Kind::undefined) return r.fail(r.what(v));
    if (is_number(v)) return of_origin(make_real(number_in(v)), v);
    if (is_string(v))
        if (const auto real = parse_double(without_space(v))) return of_origin(make_real(*real), v);
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
    if (!r.charge_bytes(uint64_t(count) * 96)) return {};
    for (int64_t i = 0; i < count; ++i) items.push_back(make_int(from + i * by));
    Value made = r.list(Kind::list, std::move(items));
    made.integer = 1;
    return made;
}

void add_pair(Renderer& r, Dict& fields, const Value& v) {
    const Value pair = r.items_of(v);
    if (r.failed() || !r.charge_bytes(fields.size() * 4)) return;
    if (list_in(pair).size() != 2 || list_in(pair)[0].depth > 0)
        return void(r.fail("dict: pairs of a key and a value are wanted"));
    set_entry(fields, list_in(pair)[0], list_in(pair)[1]);
}

/// namespace(a = 1), dict(a = 1), and both from a dict or from pairs.
Dict fields_of(Renderer& r, Arguments& a) {
    Dict fields;
    if (a.values.size() > 1) r.fail("one dict is wanted");
    for (const Value& v : a.values) {
        if (v.kind == Kind::dict) {
            fields = dict_in(v);
            continue;
        }
        const Value pairs = r.items_of(v);
        if (r.failed()) return {};
        for (const Value& pair : list_in(pairs)) add_pair(r, fields, pair);
    }
    for (Entry& e : a.named)
        if (r.charge_bytes(fields.size() * 8))
            set_entry(fields, std::move(e.key), std::move(e.value));
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

constexpr const char* month_names[] = {"January",   "February", "March",    "April",
                                       "May",       "June",     "July",     "August",
                                       "September", "October",  "November", "December"};
constexpr const char* day_names[] = {"Sunday",   "Monday", "Tuesday", "Wednesday",
                                     "Thursday", "Friday", "Saturday"};

/// ISO 8601: weeks begin on Monday, and the first one has the year's first Thursday.
int iso_week(const CivilTime& t, int64_t* year) {
    const auto leap = [](int64_t y) { return y % 4 == 0 && (y % 100 != 0 || y % 400 == 0); };
    const int day = t.weekday == 0 ? 7 : t.weekday;
    *year = t.year;
    int week = (t.year_day - day + 10) / 7;
    if (week < 1) {
        --*year;
        week = (t.year_day + 365 + leap(*year) - day + 10) / 7;
    } else if (week == 53 && t.year_day - day + 4 > 365 + leap(t.year)) {
        ++*year;
        week = 1;
    }
    return week;
}

/// A directive that is made of others.
const struct {
    char letter;
    const char* pattern;
} time_patterns[] = {{'c', "%a %b %e %H:%M:%S %Y"},
                     {'x', "%m/%d/%y"},
                     {'X', "%H:%M:%S"},
                     {'D', "%m/%d/%y"},
                     {'F', "%Y-%m-%d"},
                     {'T', "%H:%M:%S"},
                     {'R', "%H:%M"},
                     {'r', "%I:%M:%S %p"}};

std::string formatted_time(int64_t seconds, std::string_view pattern);

/// What %letter stands for, English names; empty with *known false for what Python does not know.
std::string time_directive(const CivilTime& t, int64_t seconds, char letter, bool* known) {
    int64_t year = 0;
    const int week = iso_week(t, &year);
    for (const TimeNumber& n : time_numbers)
        if (n.letter == letter) return format("%0*d", n.width, n.value(t));
    for (const auto& p : time_patterns)
        if (p.letter == letter) return formatted_time(seconds, p.pattern);
    switch (letter) {
        case 'e': return format("%2d", t.day);
        case 'k': return format("%2d", t.hour);
        case 'l': return format("%2d", (t.hour + 11) % 12 + 1);
        case 'p': return t.hour < 12 ? "AM" : "PM";
        case 'P': return t.hour < 12 ? "am" : "pm";
        case 'B': return month_names[t.month - 1];
        case 'b':
        case 'h': return std::string(month_names[t.month - 1], 3);
        case 'A': return day_names[t.weekday];
        case 'a': return std::string(day_names[t.weekday], 3);
        case 'C': return format("%02d", int(t.year / 100));
        case 'G': return format("%04d", int(year));
        case 'g': return format("%02d", int(year % 100));
        case 'V': return format("%02d", week);
        case 'U': return format("%02d", (t.year_day + 6 - t.weekday) / 7);
        case 'W': return format("%02d", (t.year_day + 6 - (t.weekday + 6) % 7) / 7);
        case 'u': return format("%d", t.weekday == 0 ? 7 : t.weekday);
        case 'w': return format("%d", t.weekday);
        case 's': return format("%lld", static_cast<long long>(seconds));
        case 'f': return "000000";
        case 'n': return "\n";
        case 't': return "\t";
        case 'z':
        case 'Z': return "";  // the time has no zone
        case '%': return "%";
        default: *known = false; return "";
    }
}

/// %-d has no zeros before it, %_d spaces, %0e zeros, %^a capitals.
std::string with_flag(std::string text, char flag) {
    if (flag == '^') return to_upper(text);
    const char wanted = flag == '_' ? ' ' : flag == '0' ? '0' : '\0';
    size_t at = 0;
    if (text.empty() || !(is_digit(text[0]) || text[0] == ' ')) return text;
    for (; at + 1 < text.size() && (text[at] == '0' || text[at] == ' '); ++at)
        if (wanted) text[at] = wanted;
    return flag == '-' ? text.substr(at) : text;
}

/// What strftime_now prints: the time in the caller's own zone.
std::string formatted_time(int64_t seconds, std::string_view pattern) {
    seconds = std::clamp<int64_t>(seconds, 0, INT64_C(253402300799));  // 1970 to 9999
    const CivilTime t = civil_time(seconds);
    std::string out;
    for (size_t i = 0; i < pattern.size(); ++i) {
        const size_t begin = i;
        const bool flagged = i + 2 < pattern.size() && std::strchr("-_0^", pattern[i + 1]);
        const size_t at = i + (flagged ? 2 : 1);
        bool known = pattern[i] == '%' && at < pattern.size();
        std::string text;
        if (known) text = time_directive(t, seconds, pattern[at], &known);
        if (known) i = at;
        out += !known    ? std::string(1, pattern[begin])
               : flagged ? with_flag(std::move(text), pattern[begin + 1])
                         : text;
    }
    return out;
}

Value absolute(Renderer& r, const Value& v) {
    if (!is_number(v)) return r.fail(join({"abs: a number is wanted, not ", r.what(v)}));
    return r.binary(Op::multiply, v, make_int(is_number(v) && number_in(v) < 0 ? -1 : 1));
}

Value otherwise(Renderer&, const Value& v, Arguments& a) {  // default_value boolean
    const bool missing = v.kind == Kind::undefined || (truth(a.values[1]) && !truth(v));
    return !missing ? v : a.values[0].kind == Kind::undefined ? make_text("") : a.values[0];
}

// These keep that a string is markup, as its methods do.

Value kept(const Value& v, Value made) {
    made.markup = is_string(made) && v.markup;
    return made;
}
Value upper_case(Renderer& r, const Value& v) { return kept(v, case_mapped(r, v, true)); }
Value lower_case(Renderer& r, const Value& v) { return kept(v, case_mapped(r, v, false)); }
Value capital_case(Renderer& r, const Value& v) {
    return kept(v, capitalized(r, v, separates_nothing));
}
Value trim(Renderer& r, const Value& v, Arguments& a) {
    return kept(v, strip(r, v, a.values[0], 3));
}

Value escape(Renderer& r, const Value& v) { return r.escaped(v); }
Value force_escape(Renderer& r, const Value& v) {
    Value plain = r.to_string(v);
    plain.markup = false;
    return r.escaped(plain);
}

const Builtin filters[] = {
    {"abs", "", on_value<absolute>},
    {"attr", "name", with_argument<named_attribute>},
    {"batch", "linecount fill_with?", batched},
    {"capitalize", "", on_value<capital_case>},
    {"center", "width?", with_argument<centered>},
    {"count", "", on_value<length>},
    {"d", "default_value? boolean?", otherwise},
    {"default", "default_value? boolean?", otherwise},
    {"dictsort", "case_sensitive? by? reverse?", sort_dict},
    {"e", "", on_value<escape>},
    {"escape", "", on_value<escape>},
    {"first", "", on_value<end_item, false>},
    {"float", "default?", with_argument<to_real>},
    {"forceescape", "", on_value<force_escape>},
    {"format", nullptr, format_filter},
    {"groupby", "attribute default? case_sensitive?", grouped_by},
    {"indent", "width? first? blank?", indented},
    {"int", "default? base?", to_int},
    {"items", "", on_value<members, View::generator>},
    {"join", "d? attribute?", joined},
    {"last", "", on_value<end_item, true>},
    {"length", "", on_value<length>},
    {"list", "", on_value<to_list>},
    {"lower", "", on_value<lower_case>},
    {"map", nullptr, mapped},
    {"max", "case_sensitive? attribute?", with_arguments<extreme, true>},
    {"min", "case_sensitive? attribute?", with_arguments<extreme, false>},
    {"pprint", "", on_value<pretty>},
    {"reject", nullptr, with_arguments<selected_items, false, false>},
    {"rejectattr", nullptr, with_arguments<selected_items, true, false>},
    {"replace", "old new count?", replaced},
    {"reverse", "", on_value<reversed>},
    {"round", "precision? method?", round_filter},
    {"safe", "", on_value<to_markup>},
    {"select", nullptr, with_arguments<selected_items, false, true>},
    {"selectattr", nullptr, with_arguments<selected_items, true, true>},
    {"slice", "slices fill_with?", sliced},
    {"sort", "reverse? case_sensitive? attribute?", sort},
    {"string", "", on_value<to_text>},
    {"sum", "attribute? start?", sum},
    {"title", "", on_value<capitalized, separates_words>},
    {"tojson", "ensure_ascii? indent? separators? sort_keys?", to_json},
    {"trim", "chars?", trim},
    {"truncate", "length? killwords? end? leeway?", truncated},
    {"unique", "case_sensitive? attribute?", unique},
    {"upper", "", on_value<upper_case>},
    {"urlencode", "", on_value<url_encoded>},
    {"wordcount", "", on_value<count_words>},
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

Value is_escaped(Renderer&, const Value& v) { return make_bool(is_string(v) && v.markup); }

Value is_same(Renderer& r, const Value& v, const Value& other) {
    return make_bool(v.kind == other.kind && r.equal(v, other));
}

Value is_divisible(Renderer& r, const Value& v, const Value& by) {
    const Value rest = r.binary(Op::modulo, v, by);
    return make_bool(is_number(rest) && number_in(rest) == 0);
}

Value is_even(Renderer& r, const Value& v, bool even) {
    const Value rest = r.binary(Op::modulo, v, make_int(2));
    return make_bool(is_number(rest) && number_in(rest) == (even ? 0 : 1));
}

Value is_known(Renderer& r, const Value& v, const Builtin* (*find)(std::string_view)) {
    if (v.kind == Kind::list || v.kind == Kind::dict)
        return r.fail(join({"unhashable type: '", r.what(v), "'"}));
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
    {"escaped", "", on_value<is_escaped>},
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
    {"items", "", on_value<members, View::items>},
    {"keys", "", on_value<members, View::keys>},
    {"values", "", on_value<members, View::values>},
};

Value cycle(Renderer& r, const Value& loop, Arguments& a) {
    if (a.values.empty()) return r.fail("cycle: needs values");
    return a.values[static_cast<const Loop*>(loop.object.get())->at % a.values.size()];
}

/// loop.changed(values): whether they are others than the last time.
Value changed(Renderer& r, const Value& loop, Arguments& a) {
    Loop& state = *static_cast<Loop*>(loop.object.get());
    bool same = state.last && state.last->size() == a.values.size();
    for (size_t i = 0; same && i < a.values.size(); ++i)
        same = r.equal((*state.last)[i], a.values[i]);
    state.last = std::move(a.values);
    return make_bool(!same);
}

const Builtin loop_methods[] = {{"changed", nullptr, changed}, {"cycle", nullptr, cycle}};

// cycler(...) and joiner(...): what they remember stands in the fields of a namespace.

Value method_of(const Value& fields, const Builtin& builtin) {
    Value made = make_kind(Kind::function, 0);
    made.object = std::make_shared<Bound>(Bound{fields, &builtin});
    return made;
}

Value turned(Renderer& r, const Value& fields, Arguments&, bool reset) {
    Dict& state = r.fields(fields);
    const List& items = list_in(state[0].value);
    const Value given = state[2].value;
    int64_t& at = state[1].value.integer;
    at = reset ? 0 : (at + 1) % int64_t(items.size());
    state[2].value = items[size_t(at)];
    return reset ? make_none() : given;
}
const Builtin next_turn = {"next", "", with_arguments<turned, false>};
const Builtin first_turn = {"reset", "", with_arguments<turned, true>};

Value new_cycler(Renderer& r, const Value&, Arguments& a) {
    if (a.values.empty() || !a.named.empty()) return r.fail("cycler: needs values");
    const Value first = a.values[0];
    const Value made = r.name_space({});
    r.charge(64);
    r.fields(made) = {{make_text("items"), r.list(Kind::tuple, std::move(a.values))},
                      {make_text("pos"), make_int(0)},
                      {make_text("current"), first},
                      {make_text("next"), method_of(made, next_turn)},
                      {make_text("reset"), method_of(made, first_turn)}};
    return r.failed() ? Value{} : made;
}

Value separator(Renderer& r, const Value& fields, Arguments&) {
    Dict& state = r.fields(fields);
    return std::exchange(state[1].value.integer, 1) ? state[0].value : make_text("");
}
const Builtin next_separator = {"joiner", "", separator};

Value new_joiner(Renderer& r, const Value&, const Value& text) {
    const Value made = r.name_space({{make_text("sep"), is_absent(text) ? make_text(", ") : text},
                                     {make_text("used"), make_bool(false)}});
    return method_of(made, next_separator);
}

Value new_dict(Renderer& r, const Value&, Arguments& a) { return r.dict(fields_of(r, a)); }
Value new_space(Renderer& r, const Value&, Arguments& a) { return r.name_space(fields_of(r, a)); }

Value raise_exception(Renderer& r, const Value&, const Value& message) {
    return r.raise(chars(r.to_string(message)));
}

Value strftime_now(Renderer& r, const Value&, const Value& pattern) {
    if (!r.want(pattern, Kind::string) || !r.charge_bytes(chars(pattern).size() * 512)) return {};
    Text out;
    r.append(out, formatted_time(r.now_s, chars(pattern)), has_marks(pattern));
    return r.text_value(std::move(out));
}

const Builtin globals[] = {
    {"cycler", nullptr, new_cycler},
    {"dict", nullptr, new_dict},
    {"joiner", "sep?", with_argument<new_joiner>},
    {"namespace", nullptr, new_space},
    {"raise_exception", "message", with_argument<raise_exception>},
    {"range", nullptr, range},
    {"strftime_now", "format", with_argument<strftime_now>},
};

}  // namespace

const Builtin* find_filter(std::string_view name) { return find_builtin(filters, name); }
const Builtin* find_test(std::string_view name) { return find_builtin(tests, name); }
const Builtin* find_global(std::string_view name) { return find_builtin(globals, name); }

const Builtin* find_method(const Value& self, std::string_view name) {
    switch (self.kind) {
        case Kind::string: return find_string_method(name);
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

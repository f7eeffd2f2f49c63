#include "prologue.hpp"

#include "base/text.hpp"
#include "template/formatting.hpp"
#include "template/text_builtins.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
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

// ---- what filters and methods do to text ----------------------------------------------------

const std::string* chosen_characters(const Value& v) { return is_string(v) ? &chars(v) : nullptr; }

}  // namespace

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
        if (!r.charge_bytes(run.size() * 24)) return;  // of each character
        std::string made = upper ? to_upper(run) : to_lower(run);
        for (size_t at = 0; upper && (at = made.find("\u00df", at)) != std::string::npos;)
            made.replace(at, 2, "SS");
        r.append(out, made, request);
    });
    return r.text_value(std::move(out));
}

Value capitalized(Renderer& r, const Value& v, bool (*separates)(char32_t)) {
    const Value s = r.to_string(v);
    Text out;
    bool start = true;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        std::string mapped;
        r.charge_bytes(run.size() * 32);
        for (size_t at = 0; at < run.size() && !r.failed();) {
            const char32_t c = utf8_next(run, &at);
            if (start && c == 0xdf) mapped += "Ss";
            else utf8_append(mapped, start ? to_upper(c) : to_lower(c));
            start = separates(c);
        }
        r.append(out, mapped, request);
    });
    return r.text_value(std::move(out));
}
bool separates_nothing(char32_t) { return false; }
namespace {

bool separates_title(char32_t c) {  // of the method
    const Category k = category(c);
    return k > Category::Lt;
}
}  // namespace

bool separates_words(char32_t c) {  // of the filter
    return python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
}

namespace {

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

}  // namespace

Value replaced(Renderer& r, const Value& v, Arguments& a) {
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
    return r.text_value(std::move(out));
}

namespace {

/// Python's find and rfind: an index in code points, or -1.
Value find_index(Renderer& r, const Value& s, const Value& needle, bool last) {
    if (!r.want(needle, Kind::string)) return {};
    if (!r.charge_bytes(chars(s).size() * (chars(needle).size() > 32 ? 4 : 1) +
                        chars(needle).size() * 4))
        return {};
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
    if (!r.charge_bytes(chars(s).size() * (chars(needle).size() > 32 ? 4 : 1) +
                        chars(needle).size() * 4))
        return {};
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
    r.charge_bytes(chars(s).size() * 16);
    for (size_t at = 0; at < chars(s).size() && !r.failed();)
        if (!holds(utf8_next(chars(s), &at))) return make_bool(false);
    return make_bool(!chars(s).empty());
}

}  // namespace

Value has_case(Renderer& r, const Value& v, bool upper) {
    const Value s = r.to_string(v);
    const std::string &all = chars(s), other = upper ? to_upper(all) : to_lower(all);
    r.charge_bytes(all.size() * 16);
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
    return r.text_value(std::move(out));
}

namespace {

/// The method: all items must be strings.
Value joined_strings(Renderer& r, const Value& separator, const Value& items) {
    const Value list = r.items_of(items);
    if (r.failed()) return {};
    List made;
    for (const Value& item : list_in(list)) {
        if (!r.want(item, Kind::string)) return {};
        made.push_back(separator.markup ? r.escaped(item) : item);
    }
    Arguments as_filter{{separator, {}}, {}};
    return joined(r, r.list(Kind::list, std::move(made)), as_filter);
}

}  // namespace

Value indented(Renderer& r, const Value& v, Arguments& a) {
    if (!r.want(v, Kind::string)) return {};
    Text margin;
    if (is_string(a.values[0])) r.append(margin, text_in(a.values[0]));
    const int64_t width = is_absent(a.values[0]) ? 4
                          : is_int(a.values[0])  ? a.values[0].integer
                                                 : 0;
    for (int64_t i = 0; i < width && r.charge(1); ++i) margin.text += ' ';
    Text text;
    r.print(text, v);
    r.append(text, "\n", false);  // as Jinja does: else a last empty line would be lost
    const Value lines = split_lines(r, r.text_value(std::move(text)), {});
    if (r.failed()) return {};
    if (v.markup) margin = text_in(r.escaped(r.text_value(std::move(margin))));
    Text out;
    for (size_t i = 0; i < list_in(lines).size() && !r.failed(); ++i) {
        const Value& line = list_in(lines)[i];
        if (i > 0) r.append(out, "\n", false);
        if (i == 0 ? truth(a.values[1]) : truth(line) || truth(a.values[2])) r.append(out, margin);
        r.append(out, text_in(line));
    }
    Value made = r.text_value(std::move(out));
    made.markup = v.markup;
    return made;
}

Value to_text(Renderer& r, const Value& v) { return r.to_string(v); }

Value to_markup(Renderer& r, const Value& v) {
    Value made = r.to_string(v);
    made.markup = true;
    return made;
}

bool has_marks(const Value& v) {
    if (is_string(v)) return !text_in(v).from_request.empty();
    if (v.request || !is_list(v)) return v.request;
    return std::any_of(list_in(v).begin(), list_in(v).end(), has_marks);
}

Value centered(Renderer& r, const Value& v, const Value& width) {
    const Value s = r.to_string(v);
    if (!is_absent(width) && !r.want(width, Kind::integer)) return {};
    Text out;
    append_padded(r, out, text_in(s), is_absent(width) ? 80 : width.integer, '|', {" ", {}});
    Value made = r.text_value(std::move(out));
    made.markup = s.markup;
    return made;
}

/// Cut at a space, unless `killwords`, where it is over `length` + `leeway` long; `end` behind.
Value truncated(Renderer& r, const Value& v, Arguments& a) {  // length killwords end leeway
    const bool sized = is_list(v) || v.kind == Kind::dict || v.kind == Kind::undefined;
    if (!sized && !r.want(v, Kind::string)) return {};
    const Value s = is_string(v) ? v : make_text("");
    for (size_t i : {size_t{0}, size_t{3}})
        if (!is_absent(a.values[i]) && !r.want(a.values[i], Kind::integer)) return {};
    const Value end = is_absent(a.values[2]) ? make_text("...") : a.values[2];
    if (!r.want(end, Kind::string) || !r.charge_bytes(chars(s).size())) return {};
    const int64_t length = is_absent(a.values[0]) ? 255 : a.values[0].integer;
    const int64_t leeway = is_absent(a.values[3]) ? 5 : a.values[3].integer;
    const int64_t kept = length - int64_t(utf8_count(chars(end)));
    if (kept < 0 || leeway < 0) return r.fail("truncate: the length is too small");
    const size_t size = is_list(v)             ? list_in(v).size()
                        : v.kind == Kind::dict ? dict_in(v).size()
                                               : utf8_count(chars(s));
    if (int64_t(size) <= std::min(length, INT64_MAX - leeway) + leeway) return v;
    if (!is_string(v)) return r.fail(join({"truncate: cannot cut ", r.what(v)}));
    size_t cut = utf8_offset(chars(s), size_t(kept));
    const size_t space = truth(a.values[1]) || cut == 0 ? std::string::npos
                                                        : chars(s).rfind(' ', cut - 1);
    if (space != std::string::npos) cut = space;
    Value piece = r.piece(s, {0, cut});
    piece.markup = s.markup;
    return r.failed() ? Value{} : r.binary(Op::add, std::move(piece), end);
}

namespace {

Value quoted_url(Renderer& r, const Value& v, bool query) {
    const Value s = r.to_string(v);
    Text out;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        std::string made;
        if (!r.charge_bytes(run.size() * 3)) return;
        for (char c : run) {
            const bool plain = (uint8_t(c) < 0x80 && is_name_char(c)) || c == '.' || c == '-' ||
                               c == '~' || (c == '/' && !query);
            if (plain) made += c;
            else if (c == ' ' && query) made += '+';
            else made += format("%%%02X", unsigned(uint8_t(c)));
        }
        r.append(out, made, request);
    });
    return r.text_value(std::move(out));
}

bool is_word_character(char32_t c) { return c == '_' || is_letter(c) || detail::is_number(c); }

}  // namespace

/// A string, or pairs as the query of an URL.
Value url_encoded(Renderer& r, const Value& v) {
    const bool pairs = v.kind == Kind::dict || is_list(v) || v.kind == Kind::iterator;
    if (!pairs) return quoted_url(r, v, false);
    List items;
    if (v.kind == Kind::dict)
        for (const Entry& e : dict_in(v)) items.push_back(make_list(Kind::tuple, {e.key, e.value}));
    else items = list_in(r.items_of(v));
    Text out;
    for (const Value& item : items) {
        const Value pair = r.items_of(item);
        if (r.failed()) return {};
        if (list_in(pair).size() != 2) return r.fail("urlencode: pairs are wanted");
        if (!out.text.empty()) r.append(out, "&", false);
        r.append(out, text_in(quoted_url(r, list_in(pair)[0], true)));
        r.append(out, "=", false);
        r.append(out, text_in(quoted_url(r, list_in(pair)[1], true)));
    }
    return r.text_value(std::move(out));
}

Value count_words(Renderer& r, const Value& v) {
    const Value s = r.to_string(v);
    int64_t count = 0;
    bool inside = false;
    r.charge_bytes(chars(s).size() * 16);
    for (size_t at = 0; at < chars(s).size() && !r.failed();) {
        const bool word = is_word_character(utf8_next(chars(s), &at));
        count += word && !inside;
        inside = word;
    }
    return make_int(count);
}

/// "%s %(name)s"|format(value, name = value)
Value format_filter(Renderer& r, const Value& v, Arguments& a) {
    const Value s = r.to_string(v);
    if (!a.values.empty() && !a.named.empty())
        return r.fail("format: values with names and without");
    const Value values = a.named.empty() ? r.list(Kind::tuple, std::move(a.values))
                                         : r.dict(std::move(a.named));
    return r.failed() ? Value{} : percent_format(r, s, values);
}

Value pretty(Renderer& r, const Value& v) {
    WriteStyle style;
    style.sorted = true;
    Text out;
    if (v.kind != Kind::undefined) r.write(out, v, style, 0, false);
    else r.append(out, "Undefined", false);
    if (utf8_count(out.text) > 80) return r.fail("pprint: over 80 characters are not supported");
    return r.text_value(std::move(out));
}

namespace {

bool is_alphanumeric(char32_t c) { return is_letter(c) || detail::is_number(c); }
bool is_decimal(char32_t c) { return category(c) == Category::Nd; }

bool is_numeric_character(char32_t c) { return detail::is_number(c); }

/// The method: what it puts in is escaped in markup.
Value replace_method(Renderer& r, const Value& s, Arguments& a) {
    if (s.markup && is_string(a.values[1])) a.values[1] = r.escaped(a.values[1]);
    return replaced(r, s, a);
}

/// Each character as `map` appends it.
template <class Map>
Value map_characters(Renderer& r, const Value& v, Map map) {
    Text out;
    each_run(text_in(v), [&](std::string_view run, bool request) {
        std::string made;
        if (!r.charge_bytes(run.size() * 16)) return;
        for (size_t at = 0; at < run.size();) map(made, utf8_next(run, &at));
        r.append(out, made, request);
    });
    return r.text_value(std::move(out));
}

Value case_folded(Renderer& r, const Value& v) {
    return map_characters(r, v, [](std::string& made, char32_t c) {
        if (c == 0xdf || c == 0x1e9e) made += "ss";
        else utf8_append(made, to_lower(c == 0x3c2 ? char32_t(0x3c3) : c));
    });
}

Value case_swapped(Renderer& r, const Value& v) {
    return map_characters(r, v, [](std::string& made, char32_t c) {
        if (c == 0xdf) made += "SS";
        else utf8_append(made, category(c) == Category::Lu ? to_lower(c) : to_upper(c));
    });
}

Value justified(Renderer& r, const Value& s, Arguments& a, char align) {  // width fillchar
    if (!r.want(a.values[0], Kind::integer)) return {};
    Value fill = is_absent(a.values[1]) ? make_text(" ") : a.values[1];
    if (!r.want(fill, Kind::string)) return {};
    if (s.markup) fill = r.escaped(fill);
    if (utf8_count(chars(fill)) != 1) return r.fail("to fill up, one character is wanted");
    Text out;
    append_padded(r, out, text_in(s), a.values[0].integer, align, text_in(fill));
    return r.text_value(std::move(out));
}

/// Zeros behind the sign.
Value zero_filled(Renderer& r, const Value& s, const Value& width) {
    if (!r.want(width, Kind::integer)) return {};
    const size_t sign = !chars(s).empty() && (chars(s)[0] == '-' || chars(s)[0] == '+');
    Text out, rest;
    r.append(out, text_in(s), {0, sign});
    r.append(rest, text_in(s), {sign, chars(s).size()});
    append_padded(r, out, rest, width.integer - int64_t(sign), '>', {"0", {}});
    return r.text_value(std::move(out));
}

/// Spaces up to the next column that is a multiple of `size`, with the origin of their tab.
Value tabs_expanded(Renderer& r, const Value& s, const Value& size) {
    if (!is_absent(size) && !r.want(size, Kind::integer)) return {};
    const int64_t every = is_absent(size) ? 8 : size.integer;
    if (every > 1000) return r.fail("expandtabs: over 1,000 columns");
    Text out;
    int64_t column = 0;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        std::string made;
        for (char c : run) {
            const int64_t spaces = c == '\t' && every > 0 ? every - column % every : 0;
            if (c == '\t') made.append(size_t(spaces), ' ');
            else made += c;
            column = c == '\n' || c == '\r' ? 0 : column + spaces + (c != '\t' && utf8_begins(c));
            if (made.size() > 4096) {
                r.append(out, made, request);
                made.clear();
            }
            if (!r.charge_bytes(uint64_t(spaces) + 1)) return;
        }
        r.append(out, made, request);
    });
    return r.text_value(std::move(out));
}

Value partitioned(Renderer& r, const Value& s, const Value& separator, bool last) {
    if (!r.want(separator, Kind::string)) return {};
    const std::string &all = chars(s), &by = chars(separator);
    if (by.empty()) return r.fail("partition: an empty separator");
    if (!r.charge_bytes(all.size() + by.size() * 4)) return {};
    size_t found = find_text(all, by);
    for (size_t at = found; last && at != std::string::npos && r.charge_bytes(16);) {
        found = at;
        at = find_text(all, by, at + 1);
    }
    const Value none = make_text("");
    if (found == std::string::npos)
        return r.list(Kind::tuple, last ? List{none, none, s} : List{s, none, none});
    return r.list(Kind::tuple,
                  {r.piece(s, {0, found}), separator, r.piece(s, {found + by.size(), all.size()})});
}

using OfPart = Value (*)(Renderer& r, const Value& s, const Value& what);

/// The part of s between two places that count characters; where it begins, in *offset. Undefined:
/// it begins behind the end.
Value part_of(Renderer& r, const Value& s, const Value& begin, const Value& end, int64_t* offset) {
    for (const Value* place : {&begin, &end})
        if (!is_absent(*place) && !r.want(*place, Kind::integer)) return {};
    const int64_t size = int64_t(utf8_count(chars(s)));
    const auto at = [&](const Value& place, int64_t absent) {
        if (is_absent(place)) return absent;
        return std::max<int64_t>(place.integer < 0 ? place.integer + size : place.integer, 0);
    };
    const int64_t from = at(begin, 0), to = std::min(at(end, size), size);
    *offset = from;
    if (from > size || from > to) return {};
    return r.slice(s, make_int(from), make_int(to), make_none());
}

Value in_part(Renderer& r, const Value& s, Arguments& a, OfPart function) {  // what start end
    if (is_absent(a.values[1]) && is_absent(a.values[2])) return function(r, s, a.values[0]);
    int64_t offset = 0;
    const Value part = part_of(r, s, a.values[1], a.values[2], &offset);
    if (r.failed()) return {};
    if (part.kind != Kind::undefined) return function(r, part, a.values[0]);
    return function == &count_text ? make_int(0) : make_bool(false);
}

Value starts_with(Renderer& r, const Value& s, const Value& affix) {
    return has_affix(r, s, affix, false);
}
Value ends_with(Renderer& r, const Value& s, const Value& affix) {
    return has_affix(r, s, affix, true);
}

Value find_in(Renderer& r, const Value& s, Arguments& a, bool last) {  // sub start end
    if (is_absent(a.values[1]) && is_absent(a.values[2]))
        return find_index(r, s, a.values[0], last);
    int64_t offset = 0;
    const Value part = part_of(r, s, a.values[1], a.values[2], &offset);
    if (r.failed() || part.kind == Kind::undefined) return make_int(-1);
    const Value found = find_index(r, part, a.values[0], last);
    return found.integer < 0 ? found : make_int(found.integer + offset);
}

Value index_in(Renderer& r, const Value& s, Arguments& a, bool last) {
    const Value found = find_in(r, s, a, last);
    return found.integer < 0 ? r.fail("index: the text was not found") : found;
}

Value is_ascii(Renderer& r, const Value& s) {
    r.charge_bytes(chars(s).size() / 8);
    return make_bool(
        std::all_of(chars(s).begin(), chars(s).end(), [](char c) { return uint8_t(c) < 0x80; }));
}

Value is_identifier(Renderer& r, const Value& s) {
    r.charge_bytes(chars(s).size() * 16);
    for (size_t at = 0; at < chars(s).size() && !r.failed();) {
        const bool first = at == 0;
        const char32_t c = utf8_next(chars(s), &at);
        const Category k = category(c);
        const bool letter = c == '_' || is_letter(c) || k == Category::Nl;
        const bool later = k == Category::Mn || k == Category::Mc || k == Category::Nd ||
                           k == Category::Pc;
        if (!letter && (first || !later)) return make_bool(false);
    }
    return make_bool(!chars(s).empty());
}

bool is_printable_character(char32_t c) { return c == ' ' || category(c) < Category::Zs; }
Value is_printable(Renderer& r, const Value& s) {
    return chars(s).empty() ? make_bool(true) : all_characters(r, s, is_printable_character);
}

/// Capitals begin words, and only these.
Value is_title(Renderer& r, const Value& s) {
    bool inside = false, some = false;
    r.charge_bytes(chars(s).size() * 16);
    for (size_t at = 0; at < chars(s).size() && !r.failed();) {
        const Category k = category(utf8_next(chars(s), &at));
        const bool cased = k <= Category::Lt;
        if (cased && inside != (k == Category::Ll)) return make_bool(false);
        some = some || cased;
        inside = cased;
    }
    return make_bool(some);
}

Value format_map(Renderer& r, const Value& s, const Value& mapping) {
    if (!r.want(mapping, Kind::dict)) return {};
    Arguments named{{}, dict_in(mapping)};
    for (const Entry& e : named.named)
        if (!r.want(e.key, Kind::string)) return {};
    return brace_format(r, s, named);
}

const Builtin string_methods[] = {
    {"capitalize", "", on_value<capitalized, separates_nothing>},
    {"casefold", "", on_value<case_folded>},
    {"center", "width fillchar?", with_arguments<justified, '|'>},
    {"count", "sub start? end?", with_arguments<in_part, count_text>},
    {"endswith", "suffix start? end?", with_arguments<in_part, ends_with>},
    {"expandtabs", "tabsize?", with_argument<tabs_expanded>},
    {"find", "sub start? end?", with_arguments<find_in, false>},
    {"format", nullptr, brace_format},
    {"format_map", "mapping", with_argument<format_map>},
    {"index", "sub start? end?", with_arguments<index_in, false>},
    {"isalnum", "", on_value<all_characters, is_alphanumeric>},
    {"isalpha", "", on_value<all_characters, is_letter>},
    {"isascii", "", on_value<is_ascii>},
    {"isdecimal", "", on_value<all_characters, is_decimal>},
    {"isdigit", "", on_value<all_characters, is_decimal>},
    {"isidentifier", "", on_value<is_identifier>},
    {"islower", "", on_value<has_case, false>},
    {"isnumeric", "", on_value<all_characters, is_numeric_character>},
    {"isprintable", "", on_value<is_printable>},
    {"isspace", "", on_value<all_characters, python_space>},
    {"istitle", "", on_value<is_title>},
    {"isupper", "", on_value<has_case, true>},
    {"join", "iterable", with_argument<joined_strings>},
    {"ljust", "width fillchar?", with_arguments<justified, '<'>},
    {"lower", "", on_value<case_mapped, false>},
    {"lstrip", "chars?", with_argument<strip, 1>},
    {"partition", "sep", with_argument<partitioned, false>},
    {"removeprefix", "prefix", with_argument<without_affix, false>},
    {"removesuffix", "suffix", with_argument<without_affix, true>},
    {"replace", "old new count?", replace_method},
    {"rfind", "sub start? end?", with_arguments<find_in, true>},
    {"rindex", "sub start? end?", with_arguments<index_in, true>},
    {"rjust", "width fillchar?", with_arguments<justified, '>'>},
    {"rpartition", "sep", with_argument<partitioned, true>},
    {"rsplit", "sep? maxsplit?", with_arguments<split, true>},
    {"rstrip", "chars?", with_argument<strip, 2>},
    {"split", "sep? maxsplit?", with_arguments<split, false>},
    {"splitlines", "keepends?", with_argument<split_lines>},
    {"startswith", "prefix start? end?", with_arguments<in_part, starts_with>},
    {"strip", "chars?", with_argument<strip, 3>},
    {"swapcase", "", on_value<case_swapped>},
    {"title", "", on_value<capitalized, separates_title>},
    {"upper", "", on_value<case_mapped, true>},
    {"zfill", "width", with_argument<zero_filled>},
};

}  // namespace

const Builtin* find_string_method(std::string_view name) {
    return find_builtin(string_methods, name);
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/formatting.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {
namespace {

constexpr int64_t most_width = 1'000'000;
constexpr int64_t most_decimals = 300;

/// What stands behind the colon of a field, or between % and its letter.
struct Spec {
    Text fill = {" ", {}};
    char align = '\0';  // < > ^ =
    char sign = '-';
    bool alternate = false;
    bool zeros = false;
    char grouping = '\0';
    int64_t width = 0;
    int64_t precision = -1;
    char type = '\0';
};

/// The number at *at, or -1 where none is.
int64_t digits_at(std::string_view s, size_t* at) {
    int64_t n = -1;
    for (; *at < s.size() && is_digit(s[*at]); ++*at)
        n = std::min<int64_t>(std::max<int64_t>(n, 0) * 10 + (s[*at] - '0'), most_width + 1);
    return n;
}

/// printf's %e, %f and %g, with a point whatever the locale says.
std::string printed(double value, char type, int64_t precision, bool alternate) {
    if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value < 0 ? "-inf" : "inf";
    const char pattern[] = {'%',
                            alternate ? '#' : '.',
                            alternate ? '.' : '*',
                            alternate ? '*' : type,
                            alternate ? type : '\0',
                            '\0'};
    std::string text = format(pattern, int(std::min(precision, most_decimals)), value), out;
    bool point = false;
    for (char c : text) {
        const bool plain = is_digit(c) || c == '-' || c == '+' || c == 'e' || c == 'E';
        if (plain) out += c;
        else if (!std::exchange(point, true)) out += '.';
    }
    return out;
}

/// As Python writes a float without a type: as %g, but always with a point.
std::string general(double value, int64_t precision) {
    precision = std::max<int64_t>(precision, 1);
    const std::string shape = printed(value, 'e', precision - 1, false);
    const size_t e = shape.find('e');
    if (e == std::string::npos) return shape;
    const int exponent = std::atoi(shape.c_str() + e + 1);
    std::string digits = shape.substr(0, e);
    if (exponent < -4 || exponent >= precision - 1) {
        if (digits.find('.') != std::string::npos)
            while (digits.back() == '0' || digits.back() == '.') {
                const bool point = digits.back() == '.';
                digits.pop_back();
                if (point) break;
            }
        return digits + shape.substr(e);
    }
    const std::string text = printed(value, 'g', precision, false);
    return text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string in_base(uint64_t n, unsigned base) {
    std::string digits;
    do digits += "0123456789abcdef"[n % base];
    while ((n /= base) > 0);
    return {digits.rbegin(), digits.rend()};
}

std::string grouped(std::string_view digits, char separator, size_t every) {
    std::string out;
    for (size_t i = 0; i < digits.size(); ++i) {
        if (i > 0 && (digits.size() - i) % every == 0) out += separator;
        out += digits[i];
    }
    return out;
}

/// A number's text before it is padded.
struct NumberText {
    std::string sign;  // and a prefix: 0x
    std::string digits;
    bool fine = false;
};

NumberText integer_text(const Spec& spec, int64_t value) {
    static const struct {
        char type;
        unsigned base;
        const char* prefix;
    } bases[] = {{'\0', 10, ""}, {'d', 10, ""},   {'n', 10, ""},  {'b', 2, "0b"},
                 {'o', 8, "0o"}, {'x', 16, "0x"}, {'X', 16, "0X"}};
    for (const auto& b : bases) {
        if (b.type != spec.type) continue;
        NumberText made{value < 0 ? "-" : "", "", spec.precision < 0};
        if (spec.alternate) made.sign += b.prefix;
        made.digits = in_base(value < 0 ? 0 - uint64_t(value) : uint64_t(value), b.base);
        if (b.type == 'X') made.digits = to_upper(made.digits);
        if (spec.grouping) made.digits = grouped(made.digits, spec.grouping, b.base == 10 ? 3 : 4);
        made.fine = made.fine && (b.base == 10 || spec.grouping != ',');
        return made;
    }
    return {};
}

NumberText real_text(const Spec& spec, double value) {
    const bool percent = spec.type == '%';
    if (spec.type && std::string_view("eEfFgGn%").find(spec.type) == std::string_view::npos)
        return {};
    const char lower = percent ? 'f' : spec.type == 'n' ? 'g' : ascii_lower(spec.type);
    const int64_t precision = spec.precision < 0 ? 6 : spec.precision;
    std::string text = !spec.type && spec.precision < 0 ? number_text(make_real(value))
                       : !spec.type
                           ? general(value, precision)
                           : printed(percent ? value * 100 : value, lower,
                                     lower == 'g' ? std::max<int64_t>(precision, 1) : precision,
                                     spec.alternate);
    if (spec.type >= 'A' && spec.type <= 'Z') text = to_upper(text);
    if (percent) text += '%';
    NumberText made{"", std::move(text), true};
    if (made.digits[0] == '-') {
        made.sign = "-";
        made.digits.erase(0, 1);
    }
    if (spec.grouping) {
        size_t whole = 0;
        while (whole < made.digits.size() && is_digit(made.digits[whole])) ++whole;
        made.digits = grouped(std::string_view(made.digits).substr(0, whole), spec.grouping, 3) +
                      made.digits.substr(whole);
    }
    return made;
}

void append_number(Renderer& r, Text& out, const Spec& spec, const Value& v) {
    const bool as_real = v.kind == Kind::real ||
                         (spec.type &&
                          std::string_view("eEfFgG%").find(spec.type) != std::string_view::npos);
    // exact digits are long division
    if (as_real && !r.charge(200 + uint64_t(std::max<int64_t>(spec.precision, 0)) * 2)) return;
    NumberText number = as_real ? real_text(spec, number_in(v)) : integer_text(spec, v.integer);
    if (!number.fine || (spec.zeros && spec.grouping))
        return void(r.fail("a number cannot be formatted with this specification"));
    if (number.sign.empty() || number.sign[0] != '-')
        if (spec.sign != '-') number.sign.insert(0, 1, spec.sign);
    Text text;
    const bool inside = spec.align == '=';
    const int64_t width = spec.width - (inside ? int64_t(number.sign.size()) : 0);
    if (inside) r.append(out, number.sign, v.request);
    r.append(text, (inside ? "" : number.sign) + number.digits, v.request);
    append_padded(r, out, text, width, spec.align && !inside ? spec.align : '>', spec.fill);
}

/// %c and {:c}: a character by its number.
void append_character(Renderer& r, Text& out, const Spec& spec, const Value& v) {
    Text text;
    std::string bytes;
    if (!is_int(v) || v.integer < 0 || v.integer > 0x10ffff)
        return void(r.fail("a character's number is wanted"));
    utf8_append(bytes, char32_t(v.integer));
    r.append(text, bytes, v.request);
    append_padded(r, out, text, spec.width, spec.align ? spec.align : '<', spec.fill);
}

void append_cut(Renderer& r, Text& out, const Spec& spec, const Text& text, char align) {
    if (spec.precision < 0) return append_padded(r, out, text, spec.width, align, spec.fill);
    Text cut;
    r.append(cut, text, {0, utf8_offset(text.text, size_t(spec.precision))});
    append_padded(r, out, cut, spec.width, align, spec.fill);
}

// ---- str.format -----------------------------------------------------------------------------

/// [[fill]align][sign][#][0][width][,][.precision][type]
bool read_spec(Renderer& r, const Text& text, Spec* spec) {
    const std::string& s = text.text;
    const auto is_align = [&](size_t i) {
        return i < s.size() && std::string_view("<>^=").find(s[i]) != std::string_view::npos;
    };
    size_t at = 0, second = 0;
    if (!s.empty()) utf8_next(s, &second);
    const bool filled = is_align(second);
    if (filled) {
        spec->fill = {};
        r.append(spec->fill, text, {0, second});
        at = second;
    }
    if (is_align(at)) spec->align = s[at++];
    const auto take = [&](std::string_view any) {
        const bool found = at < s.size() && any.find(s[at]) != std::string_view::npos;
        return found ? s[at++] : '\0';
    };
    if (const char sign = take("+- ")) spec->sign = sign;
    spec->alternate = take("#");
    if (at < s.size() && s[at] == '0' && !spec->align) {
        spec->zeros = true;
        spec->align = '=';
        spec->fill = {"0", {}};
    } else if (at < s.size() && s[at] == '0' && !filled) {
        spec->fill = {"0", {}};
    }
    spec->width = std::max<int64_t>(digits_at(s, &at), 0);
    spec->grouping = take(",_");
    if (take(".") && (spec->precision = digits_at(s, &at)) < 0) at = s.size() + 1;
    spec->type = take("bcdeEfFgGnosxX%");
    const bool fine = at == s.size() && spec->width <= most_width &&
                      (spec->precision <= most_decimals || spec->type == 's' || !spec->type);
    if (!fine) r.fail(join({"'", printable(s, 40), "' is no format that is known"}));
    return fine;
}

void append_formatted(Renderer& r, Text& out, const Value& v, const Text& spec_text) {
    Spec spec;
    if (spec_text.text.empty()) return r.print(out, v);
    if (!read_spec(r, spec_text, &spec)) return;
    if (is_number(v) && spec.type == 'c') return append_character(r, out, spec, v);
    if (is_number(v)) return append_number(r, out, spec, v);
    const bool text = is_string(v) && (!spec.type || spec.type == 's') && spec.sign == '-' &&
                      !spec.alternate && !spec.grouping && (spec.align != '=' || spec.zeros);
    if (!text) return void(r.fail(join({"this format is not for ", r.what(v)})));
    append_cut(r, out, spec, text_in(v), spec.align && !spec.zeros ? spec.align : '<');
}

/// The fields of one format string.
class BraceFormat {
public:
    BraceFormat(Renderer& r, const Value& format, const Arguments& args)
        : r_(r), f_(text_in(format)), markup_(format.markup), args_(args) {}
    void run(Text& out, ByteRange range, int depth);

private:
    void field(Text& out, ByteRange range, int depth);
    Value first(std::string_view name);
    Value named(std::string_view whole);
    size_t end_of_field(size_t at, size_t end) const;

    Renderer& r_;
    const Text& f_;
    const bool markup_;
    const Arguments& args_;
    size_t next_ = 0;  // of fields without a number
    bool numbered_ = false, counted_ = false;
};

/// Behind the brace that closes the one before `at`; 0 where none does.
size_t BraceFormat::end_of_field(size_t at, size_t end) const {
    for (int open = 1; at < end; ++at) {
        open += f_.text[at] == '{' ? 1 : f_.text[at] == '}' ? -1 : 0;
        if (open == 0) return at + 1;
    }
    return 0;
}

void BraceFormat::run(Text& out, ByteRange range, int depth) {
    if (depth > 2) return void(r_.fail("format: nested too deep"));
    for (size_t at = range.begin; at < range.end && !r_.failed();) {
        const size_t brace = std::min(f_.text.find_first_of("{}", at), range.end);
        r_.append(out, f_, {at, brace});
        if (brace == range.end) return;
        if (brace + 1 < range.end && f_.text[brace + 1] == f_.text[brace]) {
            r_.append(out, f_, {brace, brace + 1});
            at = brace + 2;
            continue;
        }
        at = f_.text[brace] == '{' ? end_of_field(brace + 1, range.end) : 0;
        if (at == 0) return void(r_.fail("format: a brace without its other"));
        field(out, {brace + 1, at - 1}, depth);
    }
}

/// name[key].attribute!conversion:specification
void BraceFormat::field(Text& out, ByteRange range, int depth) {
    r_.charge(1);
    size_t at = range.begin;
    for (bool inside = false; at < range.end; ++at) {
        const char c = f_.text[at];
        if (c == '[' || c == ']') inside = c == '[';
        if (!inside && (c == '!' || c == ':')) break;
    }
    Value v = named(std::string_view(f_.text).substr(range.begin, at - range.begin));
    if (r_.failed()) return;
    if (at < range.end && f_.text[at] == '!') {
        const char how = at + 1 < range.end ? f_.text[at + 1] : '\0';
        at += 2;
        Text text;
        if (how == 's') r_.print(text, v);
        else if (how == 'r') r_.write(text, v, {}, 0, false);
        else return void(r_.fail("format: a conversion that is not known"));
        v = r_.text_value(std::move(text));
        if (at < range.end && f_.text[at] != ':')
            return void(r_.fail("format: expected a colon behind the conversion"));
    }
    Text spec, made;
    if (at < range.end) run(spec, {at + 1, range.end}, depth + 1);
    if (r_.failed()) return;
    append_formatted(r_, made, v, spec);
    const bool escape = markup_ && !v.markup && !r_.failed();
    r_.append(out, escape ? text_in(r_.escaped(r_.text_value(std::move(made)))) : made);
}

Value BraceFormat::first(std::string_view name) {
    size_t at = 0;
    int64_t index = digits_at(name, &at);
    if (name.empty()) index = int64_t(next_++);
    (name.empty() ? counted_ : numbered_) |= name.empty() || at == name.size();
    if (numbered_ && counted_) return r_.fail("format: some fields have numbers, some have not");
    if (!name.empty() && at != name.size()) {
        const Value* found = args_.find(name);
        return found ? *found : r_.fail(join({"format: no argument '", printable(name, 40), "'"}));
    }
    if (size_t(index) < args_.values.size()) return args_.values[size_t(index)];
    return r_.fail("format: too few arguments");
}

Value BraceFormat::named(std::string_view whole) {
    size_t at = std::min(whole.find_first_of(".["), whole.size());
    Value v = first(whole.substr(0, at));
    while (at < whole.size() && !r_.failed()) {
        const bool item = whole[at] == '[';
        const size_t end = item ? whole.find(']', at)
                                : std::min(whole.find_first_of(".[", at + 1), whole.size());
        if (end == std::string_view::npos || end == at + 1 || (!item && whole[at] != '.'))
            return r_.fail("format: a malformed name of a field");
        const std::string_view part = whole.substr(at + 1, end - at - 1);
        size_t digits = 0;
        const int64_t index = digits_at(part, &digits);
        v = !item                   ? r_.attribute(v, part)
            : digits == part.size() ? r_.subscript(v, make_int(index))
                                    : r_.subscript(v, make_text(part));
        at = end + item;
    }
    return v;
}

// ---- % --------------------------------------------------------------------------------------

class PercentFormat {
public:
    PercentFormat(Renderer& r, const Value& format, const Value& values)
        : r_(r), f_(text_in(format)), markup_(format.markup), values_(values) {}
    void run(Text& out);

private:
    Value next();
    int64_t width(size_t* at);
    Value chosen(size_t* at);
    void flags(size_t* at, Spec* spec);
    void convert(Text& out, Spec& spec, const Value& v);

    Renderer& r_;
    const Text& f_;
    const bool markup_;
    const Value& values_;
    size_t used_ = 0;
    bool by_name_ = false;
};

Value PercentFormat::next() {
    const bool several = values_.kind == Kind::tuple;
    if (used_ >= (several ? list_in(values_).size() : 1))
        return r_.fail("%: not enough values for the format");
    return several ? list_in(values_)[used_++] : (++used_, values_);
}

int64_t PercentFormat::width(size_t* at) {
    if (*at >= f_.text.size() || f_.text[*at] != '*') return digits_at(f_.text, at);
    ++*at;
    const Value v = next();
    return !r_.failed() && r_.want(v, Kind::integer) ? v.integer : 0;
}

/// The value that "(name)" at *at chooses; undefined where nothing does.
Value PercentFormat::chosen(size_t* at) {
    if (*at >= f_.text.size() || f_.text[*at] != '(') return {};
    const size_t begin = *at + 1, end = f_.text.find(')', begin);
    by_name_ = true;
    if (end == std::string::npos || !r_.want(values_, Kind::dict))
        return r_.fail("%: a name in the format wants a dict");
    *at = end + 1;
    const std::string name = f_.text.substr(begin, end - begin);
    const Value* found = find_entry(dict_in(values_), name);
    return found ? *found : r_.fail(join({"%: no value '", printable(name, 40), "'"}));
}

void PercentFormat::flags(size_t* at, Spec* spec) {
    for (; *at < f_.text.size(); ++*at) {
        const char c = f_.text[*at];
        if (c == '-') spec->align = '<';
        else if (c == '+' || (c == ' ' && spec->sign == '-')) spec->sign = c;
        else if (c == '#') spec->alternate = true;
        else if (c == '0') spec->zeros = true;
        else if (c != ' ') break;
    }
}

void PercentFormat::run(Text& out) {
    const std::string& s = f_.text;
    for (size_t at = 0; at < s.size() && !r_.failed();) {
        const size_t percent = std::min(s.find('%', at), s.size());
        r_.append(out, f_, {at, percent});
        if (percent == s.size()) break;
        at = percent + 1;
        if (at < s.size() && s[at] == '%') {
            r_.append(out, f_, {at, at + 1});
            ++at;
            continue;
        }
        Spec spec;
        Value v = chosen(&at);
        flags(&at, &spec);
        spec.width = std::max<int64_t>(width(&at), 0);
        if (at < s.size() && s[at] == '.') spec.precision = std::max<int64_t>(width(&++at), 0);
        while (at < s.size() && (s[at] == 'h' || s[at] == 'l' || s[at] == 'L')) ++at;
        if (at == s.size()) return void(r_.fail("%: an incomplete format"));
        spec.type = s[at++];
        if (!by_name_ && !r_.failed()) v = next();
        if (spec.width > most_width || spec.precision > most_width) r_.fail("%: too wide");
        if (!r_.failed()) convert(out, spec, v);
    }
    const bool mapping = values_.kind == Kind::dict || values_.kind == Kind::list ||
                         values_.kind == Kind::undefined;
    const size_t given = values_.kind == Kind::tuple ? list_in(values_).size() : 1;
    if (!mapping && used_ < given) r_.fail("%: not all values were used");
}

void PercentFormat::convert(Text& out, Spec& spec, const Value& v) {
    if (spec.type == 's' || spec.type == 'r' || (spec.type == 'c' && is_string(v))) {
        Text text;
        if (spec.type == 'r') r_.write(text, v, {}, 0, false);
        else r_.print(text, v);
        if (spec.type == 'c' && utf8_count(text.text) != 1) r_.fail("%c: one character is wanted");
        if (r_.failed()) return;
        if (markup_) text = text_in(r_.escaped(v.markup ? v : r_.text_value(std::move(text))));
        return append_cut(r_, out, spec, text, spec.align ? spec.align : '>');
    }
    if (spec.type == 'c') return append_character(r_, out, spec, v);
    const bool whole = std::string_view("diuxXo").find(spec.type) != std::string_view::npos;
    if (!is_number(v) ||
        (!whole && std::string_view("eEfFgG").find(spec.type) == std::string_view::npos))
        return void(r_.fail(join({"%: this format is not for ", r_.what(v)})));
    Value number = v;
    if (whole && v.kind == Kind::real) {
        if (std::string_view("diu").find(spec.type) == std::string_view::npos ||
            !(std::fabs(v.real) < 9.2e18))
            return void(r_.fail("%: a whole number is wanted"));
        number = make_int(int64_t(v.real));
        number.request = v.request;
    }
    if (whole && (spec.type == 'i' || spec.type == 'u')) spec.type = 'd';
    if (spec.zeros && !spec.align) {
        spec.align = '=';
        spec.fill = {"0", {}};
    }
    if (whole && spec.precision > 0) return void(r_.fail("%: no precision for a whole number"));
    if (whole) spec.precision = -1;
    append_number(r_, out, spec, number);
}

void append_repeated(Renderer& r, Text& out, const Text& text, int64_t times) {
    constexpr int64_t several = 1024;
    Text many;
    for (int64_t i = 0; i < several && times > several && !r.failed(); ++i) r.append(many, text);
    for (; times > several && !r.failed(); times -= several) r.append(out, many);
    for (; times > 0 && !r.failed(); --times) r.append(out, text);
}

}  // namespace

void append_padded(Renderer& r, Text& out, const Text& text, int64_t width, char align,
                   const Text& fill) {
    r.charge_bytes(text.text.size() / 8);
    const int64_t missing = std::max<int64_t>(width - int64_t(utf8_count(text.text)), 0);
    const int64_t before = align == '>'   ? missing
                           : align == '^' ? missing / 2
                           : align == '|' ? missing / 2 + (missing & width & 1)
                                          : 0;
    append_repeated(r, out, fill, before);
    r.append(out, text);
    append_repeated(r, out, fill, missing - before);
}

double rounded(double value, int decimals) {
    if (!std::isfinite(value) || decimals > 300) return value;
    if (decimals >= 0) {
        const auto nearest = parse_double(printed(value, 'f', decimals, false));
        return nearest ? *nearest : value;
    }
    const double unit = std::pow(10.0, std::min(-decimals, 308));
    return std::nearbyint(value / unit) * unit;
}

Value percent_format(Renderer& r, const Value& format, const Value& values) {
    Text out;
    PercentFormat(r, format, values).run(out);
    Value made = r.text_value(std::move(out));
    made.markup = format.markup;
    return made;
}

Value brace_format(Renderer& r, const Value& format, Arguments& args) {
    Text out;
    BraceFormat(r, format, args).run(out, {0, chars(format).size()}, 1);
    return r.text_value(std::move(out));
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

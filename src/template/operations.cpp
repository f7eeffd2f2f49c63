#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/formatting.hpp"
#include "template/renderer.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// operators

bool Renderer::equal(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer == b.integer : number_in(a) == number_in(b);
    if (a.kind != b.kind) return false;
    switch (a.kind) {
        case Kind::undefined:
        case Kind::none: return true;
        case Kind::string: return charge_bytes(chars(a).size() / 8) && chars(a) == chars(b);
        case Kind::name_space: return a.integer == b.integer;
        case Kind::dict: {
            if (dict_in(a).size() != dict_in(b).size()) return false;
            for (const Entry& e : dict_in(a)) {
                const Value other = subscript(b, e.key);
                if (failed() || other.kind == Kind::undefined || !equal(e.value, other))
                    return false;
            }
            return true;
        }
        case Kind::list:
        case Kind::tuple:
            return list_in(a).size() == list_in(b).size() &&
                   std::equal(list_in(a).begin(), list_in(a).end(), list_in(b).begin(),
                              [&](const Value& x, const Value& y) { return equal(x, y); });
        default: return a.object == b.object;
    }
}

bool Renderer::less(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer < b.integer : number_in(a) < number_in(b);
    if (is_string(a) && is_string(b))  // the order of UTF-8 is that of code points
        return charge_bytes(std::min(chars(a).size(), chars(b).size()) / 8) && chars(a) < chars(b);
    if (is_list(a) && a.kind == b.kind) {
        const List &x = list_in(a), &y = list_in(b);
        for (size_t i = 0; i < std::min(x.size(), y.size()) && !failed(); ++i)
            if (!equal(x[i], y[i])) return less(x[i], y[i]);
        return x.size() < y.size();
    }
    fail(join({"no order between ", what(a), " and ", what(b)}));
    return false;
}

bool Renderer::contains(const Value& container, const Value& v) {
    if (is_string(container)) {
        if (!want(v, Kind::string)) return false;
        if (!charge_bytes(chars(container).size() / 8 + chars(v).size() * 4)) return false;
        return find_text(chars(container), chars(v)) != std::string::npos;
    }
    if (container.kind == Kind::dict)
        return charge_bytes(dict_in(container).size() * 4) && find_entry(dict_in(container), v);
    const Value items = items_of(container);
    if (failed()) return false;
    for (const Value& item : list_in(items))
        if (failed() || equal(item, v)) return !failed();
    return false;
}

/// What is joined with markup is escaped; of markup is what comes of it.
Value Renderer::joined_markup(const Value& a, const Value& b) {
    Text text;
    append(text, text_in(escaped(a))) && append(text, text_in(escaped(b)));
    Value made = text_value(std::move(text));
    made.markup = true;
    return made;
}

Value Renderer::concatenated(Value a, const Value& b) {
    // A string that nobody else holds grows in place: a + b + c copies each of them once.
    if (a.object.use_count() == 1 && a.object != b.object) {
        append(*static_cast<Text*>(a.object.get()), text_in(b));
        return a;
    }
    Text text;
    text.text.reserve(chars(a).size() + chars(b).size());
    append(text, text_in(a)) && append(text, text_in(b));
    return text_value(std::move(text));
}

Value Renderer::binary(Op op, Value a, const Value& b) {
    if (op == Op::concat) {
        const Value right = to_string(b);
        Value left = is_string(a) ? std::move(a) : to_string(a);
        left.markup = false;  // as jinja2 without autoescape
        return failed() ? Value{} : concatenated(std::move(left), right);
    }
    if (is_number(a) && is_number(b)) {
        Value v = arithmetic(op, a, b);
        v.request = a.request || b.request;
        return v;
    }
    if (op == Op::modulo && is_string(a)) return percent_format(*this, a, b);
    if (op == Op::add && is_string(a) && is_string(b))
        return a.markup || b.markup ? joined_markup(a, b) : concatenated(std::move(a), b);
    if (op == Op::add && is_list(a) && a.kind == b.kind) {
        if (!room(list_in(a).size() + list_in(b).size())) return {};
        List items = list_in(a);
        items.insert(items.end(), list_in(b).begin(), list_in(b).end());
        return list(a.kind, std::move(items));
    }
    if (op == Op::multiply && (is_string(a) || is_list(a)) && is_int(b))
        return repeated(a, b.integer);
    if (op == Op::multiply && (is_string(b) || is_list(b)) && is_int(a))
        return repeated(b, a.integer);
    if (a.kind == Kind::undefined || b.kind == Kind::undefined)
        return fail(what(a.kind == Kind::undefined ? a : b));
    return fail(join({"cannot combine ", what(a), " and ", what(b)}));
}

Value Renderer::repeated(const Value& v, int64_t times) {
    List items;
    Text text;
    const uint64_t size = is_string(v) ? 0 : list_in(v).size();
    if (size > 0 && times > 0 && !room(size * std::min(uint64_t(times), uint64_t{1} << 32)))
        return {};
    for (int64_t i = 0; i < times && charge(1); ++i) {
        if (is_string(v)) append(text, text_in(v));
        else if (charge_bytes(list_in(v).size() * sizeof(Value)))
            items.insert(items.end(), list_in(v).begin(), list_in(v).end());
    }
    if (!is_string(v)) return list(v.kind, std::move(items));
    Value made = text_value(std::move(text));
    made.markup = v.markup;
    return made;
}

namespace {

/// a op b for 64-bit integers; false: it does not fit, or is no integer.
bool integer_result(Op op, int64_t a, int64_t b, int64_t* out) {
    const uint64_t x = uint64_t(a), y = uint64_t(b);
    switch (op) {
        case Op::add: *out = int64_t(x + y); return ((a ^ *out) & (b ^ *out)) >= 0;
        case Op::subtract: *out = int64_t(x - y); return ((a ^ b) & (a ^ *out)) >= 0;
        case Op::multiply:
            *out = int64_t(x * y);
            return a == 0 || (*out / a == b && a != INT64_MIN && b != INT64_MIN);
        case Op::floor_divide:
            if (a == INT64_MIN) return false;
            *out = a / b - (a % b != 0 && (a < 0) != (b < 0));
            return true;
        case Op::modulo:
            if (a == INT64_MIN) return false;
            *out = a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
            return true;
        case Op::power: {
            if (b < 0) return false;
            if (a >= -1 && a <= 1) {
                *out = b == 0 || (a == -1 && b % 2 == 0) ? 1 : a;
                return true;
            }
            *out = 1;
            for (int64_t i = 0; i < b; ++i)  // at most 63 times
                if (!integer_result(Op::multiply, *out, a, out)) return false;
            return true;
        }
        default: return false;
    }
}

}  // namespace

Value Renderer::arithmetic(Op op, const Value& a, const Value& b) {
    const bool divides = op == Op::divide || op == Op::floor_divide || op == Op::modulo;
    const double x = number_in(a), y = number_in(b);
    if (divides && y == 0) return fail("division by zero");
    const bool integers = is_int(a) && is_int(b) && op != Op::divide;
    int64_t i = 0;
    if (integers && integer_result(op, a.integer, b.integer, &i)) return make_int(i);
    if (integers && !(op == Op::power && b.integer < 0)) return fail("an integer over 63 bits");
    switch (op) {
        case Op::add: return make_real(x + y);
        case Op::subtract: return make_real(x - y);
        case Op::multiply: return make_real(x * y);
        case Op::divide: return make_real(x / y);
        case Op::floor_divide: return make_real(std::floor(x / y));
        case Op::modulo: return make_real(x - y * std::floor(x / y));
        default: return make_real(std::pow(x, y));
    }
}

// parts of values

Value Renderer::loop_attribute(const Loop& loop, std::string_view name) {
    const List& items = list_in(loop.items);
    const int64_t at = int64_t(loop.at), size = int64_t(items.size());
    if (name == "index") return make_int(at + 1);
    if (name == "index0") return make_int(at);
    if (name == "revindex") return make_int(size - at);
    if (name == "revindex0") return make_int(size - at - 1);
    if (name == "first") return make_bool(at == 0);
    if (name == "last") return make_bool(at + 1 >= size);
    if (name == "length") return make_int(size);
    if (name == "depth") return make_int(int64_t(loop.nesting) + 1);
    if (name == "depth0") return make_int(int64_t(loop.nesting));
    if (name == "previtem" && at > 0) return items[size_t(at) - 1];
    if (name == "nextitem" && at + 1 < size) return items[size_t(at) + 1];
    return {};
}

Value Renderer::macro_attribute(const Place& macro, std::string_view name) {
    const Node& node = p_.nodes[macro.node];
    const auto children = p_.children(node);
    if (name == "name") return make_text(p_.names[node.value]);
    if (name == "catch_kwargs") return make_bool(children[1] & special_kwargs);
    if (name == "catch_varargs") return make_bool(children[1] & special_varargs);
    if (name == "caller") return make_bool(children[1] & special_caller);
    if (name != "arguments") return {};
    List names;
    for (uint32_t id : children.subspan(2))
        names.push_back(make_text(p_.names[p_.nodes[id].value]));
    return list(Kind::tuple, std::move(names));
}

/// v.name: a method first, then a member, as Jinja does.
Value Renderer::attribute(const Value& v, std::string_view name, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (const Builtin* method = find_method(v, name)) {
        Value made = make_kind(Kind::function, 0);
        made.depth = uint16_t(v.depth + 16);  // as a loop
        made.object = std::make_shared<Bound>(Bound{v, method});
        return made;
    }
    Value made;
    if (v.kind == Kind::loop)
        made = loop_attribute(*static_cast<const Loop*>(v.object.get()), name);
    if (v.kind == Kind::macro)
        made = macro_attribute(*static_cast<const Place*>(v.object.get()), name);
    if (v.kind == Kind::tuple && v.integer == 1 && (name == "grouper" || name == "list"))
        made = list_in(v)[name == "list"];
    const Dict* members = v.kind == Kind::dict         ? &dict_in(v)
                          : v.kind == Kind::name_space ? &name_spaces_[size_t(v.integer)]
                                                       : nullptr;
    if (members) charge_bytes(members->size() * 4);
    if (const Value* found = members ? find_entry(*members, name) : nullptr) return *found;
    return made.kind == Kind::undefined ? make_kind(Kind::undefined, node) : made;
}

/// v[key]: a member or an item first, then what v.key is.
Value Renderer::subscript(const Value& v, const Value& key, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (v.kind == Kind::dict) {
        charge_bytes(dict_in(v).size() * 4);
        if (const Value* found = find_entry(dict_in(v), key)) return *found;
    }
    if (is_string(key)) return attribute(v, chars(key), node);
    const Value missing = make_kind(Kind::undefined, node);
    if (!is_int(key) || !(is_list(v) || is_string(v))) return missing;
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : utf8_count(chars(v)));
    const int64_t at = key.integer < 0 ? key.integer + size : key.integer;
    if (at < 0 || at >= size) return missing;
    if (is_list(v)) return list_in(v)[size_t(at)];
    const size_t begin = utf8_offset(chars(v), size_t(at));
    size_t end = begin;
    utf8_next(chars(v), &end);
    Value made = piece(v, {begin, end});
    made.markup = v.markup;
    return made;
}

Value Renderer::path(const Value& v, const Value& dotted) {
    if (!is_string(dotted)) return subscript(v, dotted);
    const std::string_view names = chars(dotted);
    Value at = v;
    for (size_t begin = 0; begin <= names.size() && !failed();) {
        const size_t end = std::min(names.find('.', begin), names.size());
        const std::string_view name = names.substr(begin, end - begin);
        const bool digits = !name.empty() && name.size() < 10 &&
                            std::all_of(name.begin(), name.end(), is_digit);
        charge(2);
        at = subscript(at,
                       digits ? make_int(std::atoi(std::string(name).c_str())) : make_text(name));
        begin = end + 1;
    }
    return at;
}

/// Python's rules: negative places count from the end, and what is outside is cut off.
/// `constant`: what is refused at rendering is undefined for Jinja when it folds constants.
Value Renderer::slice(const Value& v, const Value& begin, const Value& end, const Value& step,
                      bool constant) {
    if (!is_string(v) && !is_list(v))
        return constant
                   ? Value{}
                   : fail(v.kind == Kind::undefined ? what(v)
                                                    : join({"'", what(v), "' cannot be sliced"}));
    for (const Value* bound : {&begin, &end, &step})
        if (bound->kind != Kind::none && !is_int(*bound))
            return constant ? Value{} : fail("the bounds of a slice must be integers");
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : utf8_count(chars(v)));
    const int64_t by = step.kind == Kind::none
                           ? 1
                           : std::clamp<int64_t>(step.integer, -size - 1, size + 1);
    if (by == 0) return fail("a slice with step 0");
    const auto place = [&](const Value& bound, int64_t absent) {
        if (bound.kind == Kind::none) return absent;
        const int64_t at = bound.integer < 0 ? bound.integer + size : bound.integer;
        return std::clamp<int64_t>(at, by > 0 ? 0 : -1, by > 0 ? size : size - 1);
    };
    const int64_t from = place(begin, by > 0 ? 0 : size - 1), to = place(end, by > 0 ? size : -1);
    if (is_string(v) && by == 1) {
        const size_t first = utf8_offset(chars(v), size_t(from));
        const size_t count = size_t(std::max<int64_t>(to - from, 0));
        const size_t last = first + utf8_offset(std::string_view(chars(v)).substr(first), count);
        Value made = piece(v, {first, last});
        made.markup = v.markup;
        return made;
    }
    const Value items = items_of(v);
    List kept;
    Text text;
    for (int64_t i = from; (by > 0 ? i < to : i > to) && !failed(); i += by) {
        const Value& item = list_in(items)[size_t(i)];
        if (is_string(v)) append(text, text_in(item));
        else kept.push_back(item);
    }
    Value made = is_string(v) ? text_value(std::move(text)) : list(v.kind, std::move(kept));
    if (v.kind == Kind::list) made.integer = v.integer;
    made.markup = v.markup;
    return made;
}

// writing

namespace {

/// The inside of Python's repr of a string.
std::string python_escaped(std::string_view s, char quote) {
    std::string out;
    for (size_t at = 0; at < s.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(s, &at);
        const Category k = category(c);
        if (c == char32_t(quote) || c == '\\') (out += '\\') += char(c);
        else if (c == '\n' || c == '\r' || c == '\t')
            out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
        else if (c == ' ' || k < Category::Zs) out += s.substr(begin, at - begin);
        else if (c > 0xffff) out += format("\\U%08x", unsigned(c));
        else out += format(c > 0xff ? "\\u%04x" : "\\x%02x", unsigned(c));
    }
    return out;
}

}  // namespace

void Renderer::write(Text& out, const Value& v, const WriteStyle& style, size_t level,
                     bool request) {
    if (!charge(1)) return;
    request = request || v.request;
    const auto word = [&](const char* json, const char* python) {
        append(out, style.json ? json : python, request);
    };
    switch (v.kind) {
        case Kind::none: return word("null", "None");
        case Kind::boolean: return v.integer ? word("true", "True") : word("false", "False");
        case Kind::integer: return void(append(out, number_text(v), request));
        case Kind::real:
            if (!style.json || std::isfinite(v.real))
                return void(append(out, number_text(v), request));
            return word(std::isnan(v.real) ? "NaN" : v.real > 0 ? "Infinity" : "-Infinity", "");
        case Kind::string: {
            const std::string& s = chars(v);
            const bool apostrophes = s.find('\'') != std::string::npos &&
                                     s.find('"') == std::string::npos;
            const char quote = style.json || apostrophes ? '"' : '\'';
            const bool markup = v.markup && !style.json;
            if (markup) append(out, "Markup(", false);
            append(out, std::string_view(&quote, 1), request);
            each_run(text_in(v), [&](std::string_view run, bool marked) {
                charge_bytes(run.size());
                if (failed()) return;
                std::string escaped;
                if (style.json) write_json_escaped(escaped, run, style.ascii);
                else escaped = python_escaped(run, quote);
                append(out, escaped, request || marked);
            });
            append(out, std::string_view(&quote, 1), request);
            if (markup) append(out, ")", false);
            return;
        }
        case Kind::list:
            if (v.integer == 1) return void(fail("a range cannot be printed"));
            return write_container(out, v, style, level, request);
        case Kind::tuple:
        case Kind::dict: return write_container(out, v, style, level, request);
        default:
            if (style.json) return void(fail(join({"a value of type ", what(v), " has no JSON"})));
            write_object(out, v, level, request);
    }
}

void Renderer::write_object(Text& out, const Value& v, size_t level, bool request) {
    if (is_view(v)) return write_view(out, v, level, request);
    if (v.kind == Kind::macro) {
        const Place& macro = *static_cast<const Place*>(v.object.get());
        const std::string& name = p_.names[p_.nodes[macro.node].value];
        return void(append(out, join({"<Macro '", name, "'>"}), false));
    }
    if (v.kind == Kind::loop) {
        const Loop& loop = *static_cast<const Loop*>(v.object.get());
        const size_t size = list_in(loop.items).size();
        return void(append(out, format("<LoopContext %zu/%zu>", loop.at + 1, size), false));
    }
    if (v.kind != Kind::name_space) return void(fail(join({"a ", what(v), " cannot be printed"})));
    append(out, "<Namespace ", false);
    const Value members = dict(fields(v));
    if (!failed()) write(out, members, {}, level, request);
    append(out, ">", false);
}

void Renderer::write_view(Text& out, const Value& v, size_t level, bool request) {
    static const char* const names[] = {"", "dict_items(", "dict_keys(", "dict_values("};
    append(out, names[v.integer], request);
    Value items = v;
    items.kind = Kind::list;
    items.integer = 0;
    write(out, items, {}, level, request);
    append(out, ")", request);
}

void Renderer::write_container(Text& out, const Value& v, const WriteStyle& style, size_t level,
                               bool request) {
    const bool is_dict = v.kind == Kind::dict;
    const bool round = v.kind == Kind::tuple && !style.json;
    const size_t size = is_dict ? dict_in(v).size() : list_in(v).size();
    const auto new_line = [&](size_t depth) {
        if (!style.lines || size == 0) return;
        append(out, "\n", request);
        for (size_t i = 0; i < depth && !failed(); ++i) append(out, style.indent, request);
    };
    Dict entries;
    if (is_dict && style.sorted) {
        entries = dict_in(v);
        sort_items(entries, [&](const Entry& a, const Entry& b) { return less(a.key, b.key); });
    }
    append(out, is_dict ? "{" : round ? "(" : "[", request);
    for (size_t i = 0; i < size && !failed(); ++i) {
        if (i > 0) append(out, style.comma, request);
        new_line(level + 1);
        if (!is_dict) {
            write(out, list_in(v)[i], style, level + 1, request);
            continue;
        }
        const Entry& e = style.sorted ? entries[i] : dict_in(v)[i];
        const bool quoted = style.json && !is_string(e.key);  // {1: 2} is {"1": 2}
        if (quoted) append(out, "\"", request);
        write(out, e.key, style, level + 1, request);
        if (quoted) append(out, "\"", request);
        append(out, style.colon, request);
        write(out, e.value, style, level + 1, request);
    }
    if (round && size == 1) append(out, ",", request);
    new_line(level);
    append(out, is_dict ? "}" : round ? ")" : "]", request);
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

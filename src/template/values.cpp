#include "prologue.hpp"

#include "template/values.hpp"

#include <cstring>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

Value::Value(const Value&) = default;
Value::Value(Value&&) noexcept = default;
Value& Value::operator=(const Value&) = default;
Value& Value::operator=(Value&&) noexcept = default;

namespace {

/// What else dies with `v`, and nests, comes to `waiting`.
void take_nested(Value& v, List& waiting) {
    const auto take = [&](Value& inner) {
        if (inner.depth > 1) waiting.push_back(std::move(inner));
    };
    const bool is_dict = v.kind == Kind::dict;
    if (v.depth > 2 && v.object.use_count() == 1 &&
        (is_dict || is_list(v) || v.kind == Kind::iterator)) {
        if (is_dict)
            for (Entry& e : *static_cast<Dict*>(v.object.get())) take(e.value);
        else
            for (Value& item : *static_cast<List*>(v.object.get())) take(item);
    }
    v.depth = 0;
}

}  // namespace

/// Lists in lists one after another: destructors in destructors would take as much stack as they nest.
Value::~Value() {
    if (depth < 3) return;
    List waiting;
    take_nested(*this, waiting);
    while (!waiting.empty()) {
        Value last = std::move(waiting.back());
        waiting.pop_back();
        take_nested(last, waiting);
    }
}

Value make_text(Text text) {
    Value v;
    v.kind = Kind::string;
    v.object = std::make_shared<Text>(std::move(text));
    return v;
}

Value make_text(std::string_view text) { return make_text(Text{std::string(text), {}}); }

Value make_list(Kind kind, List items) {
    Value v;
    v.kind = kind;
    for (const Value& item : items) v.depth = std::max(v.depth, item.depth);
    ++v.depth;
    v.object = std::make_shared<List>(std::move(items));
    return v;
}

Value make_dict(Dict entries) {
    Value v;
    v.kind = Kind::dict;
    for (const Entry& e : entries) v.depth = std::max({v.depth, e.key.depth, e.value.depth});
    ++v.depth;
    v.object = std::make_shared<Dict>(std::move(entries));
    return v;
}

bool truth(const Value& v) {
    switch (v.kind) {
        case Kind::undefined:
        case Kind::none: return false;
        case Kind::boolean:
        case Kind::integer: return v.integer != 0;
        case Kind::real: return v.real != 0;
        case Kind::string: return !chars(v).empty();
        case Kind::list:
        case Kind::tuple: return !list_in(v).empty();
        case Kind::dict: return !dict_in(v).empty();
        case Kind::iterator: return !is_view(v) || !list_in(v).empty();
        default: return true;  // as Python's generators
    }
}

const char* kind_name(const Value& v) {
    static const char* const names[] = {"Undefined", "None",        "bool",  "int",       "float",
                                        "str",       "list",        "tuple", "generator", "dict",
                                        "Namespace", "LoopContext", "Macro", "function"};
    return names[size_t(v.kind)];
}

void add_mark(Text& out, size_t begin, size_t end) {
    if (begin == end) return;
    auto& marks = out.from_request;
    if (!marks.empty() && marks.back().end == begin) marks.back().end = end;
    else marks.push_back({begin, end});
}

/// What is left of s after stripping; `set` null: white space. Sides: 1 left, 2 right.
ByteRange stripped(std::string_view s, const std::string* set, int sides) {
    const auto drops = [&](char32_t c, std::string_view bytes) {
        return set ? set->find(bytes) != std::string::npos : python_space(c);
    };
    ByteRange r{0, s.size()};
    while ((sides & 1) && r.begin < r.end) {
        size_t next = r.begin;
        const char32_t c = utf8_next(s, &next);
        if (!drops(c, s.substr(r.begin, next - r.begin))) break;
        r.begin = next;
    }
    while ((sides & 2) && r.begin < r.end) {
        const size_t before = utf8_previous(s, r.end);
        size_t at = before;
        const char32_t c = utf8_next(s, &at);
        if (!drops(c, s.substr(before, r.end - before))) break;
        r.end = before;
    }
    return r;
}

/// Where `needle` begins in `text` at or after `from`, or npos, in linear time: a request may bring
/// both. (Knuth, Morris, Pratt 1977; the library's search is quadratic but fast for short needles.)
size_t find_text(std::string_view text, std::string_view needle, size_t from) {
    if (needle.size() <= 32 || needle.size() > text.size()) return text.find(needle, from);
    std::vector<uint32_t> border(needle.size() + 1, 0);  // of needle's first i bytes
    for (uint32_t i = 1, k = 0; i < needle.size(); ++i) {
        while (k > 0 && needle[i] != needle[k]) k = border[k];
        if (needle[i] == needle[k]) ++k;
        border[i + 1] = k;
    }
    uint32_t k = 0;
    for (size_t i = from; i < text.size(); ++i) {
        while (k > 0 && text[i] != needle[k]) k = border[k];
        if (text[i] == needle[k] && ++k == needle.size()) return i + 1 - k;
    }
    return std::string_view::npos;
}

std::string number_text(const Value& v) {
    if (is_int(v)) return std::to_string(v.integer);
    if (std::isfinite(v.real)) return write_double(v.real);
    return std::isnan(v.real) ? "nan" : v.real > 0 ? "inf" : "-inf";
}

Error template_error(ErrorKind kind, uint32_t line, std::string_view what) {
    constexpr size_t limit = 1000;  // names in it may be of any length
    what = what.substr(0, what.size() > limit ? utf8_valid_prefix(what.substr(0, limit)) : limit);
    return make_error(kind, format("chat template, line %u: ", unsigned(line)) + std::string(what));
}

bool python_space(char32_t c) { return is_whitespace(c) || (c >= 0x1c && c <= 0x1f); }

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

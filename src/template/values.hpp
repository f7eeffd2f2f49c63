#pragma once

#include "json_internal.hpp"
#include "template/internal.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// ---- values ---------------------------------------------------------------------------------
// Immutable and shared. A namespace is the only thing that changes, and lives in the renderer, so
// values form no cycles. Containers know how deep they nest: recursion over them is bounded.

enum class Kind : uint8_t {
    // clang-format off
    undefined, none, boolean, integer, real, string, list, tuple, iterator, dict,
    name_space, loop, macro, function,
    // clang-format on
};

/// What an iterator is: a generator gives its items once, a view of a dict gives them always.
enum class View : uint8_t { generator, items, keys, values };

inline constexpr const char* stack_too_small = "nested too deep for this thread's stack";

struct Value {
    Value() = default;
    Value(const Value& other);  // these are long, and used in a thousand places: never inline
    Value(Value&& other) noexcept;
    Value& operator=(const Value& other);
    Value& operator=(Value&& other) noexcept;
    ~Value();

    Kind kind = Kind::undefined;
    bool request = false;  // it came from the request; of a string its marks say so, not this
    bool markup = false;   // a string that `safe` or `escape` made: what joins it is escaped
    uint16_t depth = 0;    // of a container
    union {
        // boolean, integer; undefined: its node; name_space: its index; iterator: its View;
        // tuple: 1 when groupby made it; list: 1 when range did
        int64_t integer = 0;
        double real;
    };
    std::shared_ptr<void> object = {};
};

struct Entry {
    Value key, value;
};

using Text = MarkedText;
using List = std::vector<Value>;
using Dict = std::vector<Entry>;  // few members, found one after another, in order of insertion

inline const Text& text_in(const Value& v) { return *static_cast<const Text*>(v.object.get()); }
inline const List& list_in(const Value& v) { return *static_cast<const List*>(v.object.get()); }
inline const Dict& dict_in(const Value& v) { return *static_cast<const Dict*>(v.object.get()); }
inline const std::string& chars(const Value& v) { return text_in(v).text; }

inline bool is_list(const Value& v) { return v.kind == Kind::list || v.kind == Kind::tuple; }
inline bool is_int(const Value& v) { return v.kind == Kind::integer || v.kind == Kind::boolean; }
inline bool is_number(const Value& v) { return is_int(v) || v.kind == Kind::real; }
inline bool is_string(const Value& v) { return v.kind == Kind::string; }
inline bool is_view(const Value& v) {
    return v.kind == Kind::iterator && View(v.integer) != View::generator;
}
inline bool is_absent(const Value& v) { return v.kind <= Kind::none; }  // as an optional argument
inline double number_in(const Value& v) { return is_int(v) ? double(v.integer) : v.real; }

inline Value make_kind(Kind kind, int64_t integer) {
    Value v;
    v.kind = kind;
    v.integer = integer;
    return v;
}
inline Value make_none() { return make_kind(Kind::none, 0); }
inline Value make_bool(bool b) { return make_kind(Kind::boolean, b); }
inline Value make_int(int64_t i) { return make_kind(Kind::integer, i); }
inline Value make_real(double d) {
    Value v;
    v.kind = Kind::real;
    v.real = d;
    return v;
}
Value make_text(Text text);
Value make_text(std::string_view text);
Value make_list(Kind kind, List items);
Value make_dict(Dict entries);

bool truth(const Value& v);

const char* kind_name(const Value& v);

void add_mark(Text& out, size_t begin, size_t end);

/// Calls each(piece, from_request) for the stretches of one origin, in order.
template <class Each>
void each_run(const Text& t, Each each) {
    const std::string_view all = t.text;
    size_t at = 0;
    for (const ByteRange& r : t.from_request) {
        if (r.begin > at) each(all.substr(at, r.begin - at), false);
        each(all.substr(r.begin, r.end - r.begin), true);
        at = r.end;
    }
    if (at < all.size()) each(all.substr(at), false);
}

// ---- text without marks ---------------------------------------------------------------------
// All text is valid UTF-8: the source is checked, JSON is, and strings are cut between code points.

bool python_space(char32_t c);

ByteRange stripped(std::string_view s, const std::string* set, int sides);

size_t find_text(std::string_view text, std::string_view needle, size_t from = 0);

std::string number_text(const Value& v);

// ---- program --------------------------------------------------------------------------------

enum class Op : uint8_t {
    // statements; children in comments, those in brackets may be node 0: nothing
    body,        // statements
    text,        // value: index into texts
    print,       // expression
    choice,      // condition, body, condition, body ..., [body of else]: an odd number of children
    loop,        // target, iterable, [condition], body, [body of else]; flag: recursive
    set,         // target, expression
    set_block,   // target, body, filters ...
    macro,       // value: name; body, Special, parameters (keyword) ...
    call_block,  // call, macro
    filter_block,  // body, filters ...
    scope,         // body
    break_loop,
    continue_loop,
    // expressions
    constant,  // value: index into constants
    name,      // value: name
    list,
    tuple,        // expressions
    dict,         // key, value, key, value ...
    conditional,  // condition, then, [else]
    // clang-format off
    any, all,     // expressions: or, and
    negation,     // expression: not
    minus, plus,  // expression
    comparison,   // expression, then equal ... not_in
    chain,        // expression, then what follows here: applied from left to right
    add, subtract, multiply, divide, floor_divide, modulo, power, concat,  // expression
    attribute,    // value: name
    item,         // expression
    slice,        // [begin], [end], [step]; flag: of a constant
    call,         // expressions and keywords
    filter,       // value: name; expressions and keywords
    test,         // value: name; expressions and keywords; flag: negated
    equal, not_equal, less, less_equal, greater, greater_equal, in, not_in,  // expression
    keyword,      // value: name; [expression]
    spread,       // expression: arguments of a call; flag: a dict of keywords
    field,        // a target: value: name of the attribute; name of the namespace
    // clang-format on
};

/// Names that a macro has without saying so; a set of them is a sum of bits.
enum Special : uint32_t { special_caller = 1, special_kwargs = 2, special_varargs = 4 };

struct Node {
    Op op = Op::body;
    bool flag = false;
    uint32_t line = 0;
    uint32_t value = 0;
    uint32_t first = 0;  // of its children in links
    uint32_t count = 0;
};

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {
namespace detail {

struct TemplateProgram {
    std::string source;
    std::vector<jinja::Node> nodes = {jinja::Node{}};
    std::vector<uint32_t> links;
    std::vector<jinja::Value> constants;
    std::vector<std::string> texts;  // outside of tags
    std::vector<std::string> names;
    // Where the template uses them: names that the renderer sets.
    std::optional<uint32_t> loop_name, caller_name, kwargs_name, varargs_name;
    uint32_t root = 0;

    std::span<const uint32_t> children(const jinja::Node& node) const {
        return std::span(links).subspan(node.first, node.count);
    }
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

Error template_error(ErrorKind kind, uint32_t line, std::string_view what);

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
inline bool is_name_char(char c) {
    return is_digit(c) || c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           uint8_t(c) >= 0x80;
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "template/renderer.hpp"

#include <span>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// What the tables of builtins share, and the functions on text that are filters and methods.

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

inline const Builtin* find_builtin(std::span<const Builtin> table, std::string_view name) {
    for (const Builtin& b : table)
        if (name == b.name) return &b;
    return nullptr;
}

const Builtin* find_string_method(std::string_view name);

Value strip(Renderer& r, const Value& v, const Value& set, int sides);
Value case_mapped(Renderer& r, const Value& v, bool upper);
bool separates_nothing(char32_t c);
bool separates_words(char32_t c);  // of the filter
/// Upper case at the start and after each character for which `separates` holds, else lower case.
Value capitalized(Renderer& r, const Value& v, bool (*separates)(char32_t));
Value replaced(Renderer& r, const Value& v, Arguments& a);  // old new count
/// islower and isupper: some letter has a case, and it is this one everywhere.
Value has_case(Renderer& r, const Value& v, bool upper);
Value joined(Renderer& r, const Value& items, Arguments& a);  // d attribute
Value indented(Renderer& r, const Value& v, Arguments& a);    // width first blank
Value truncated(Renderer& r, const Value& v, Arguments& a);   // length killwords end leeway
Value url_encoded(Renderer& r, const Value& v);
Value count_words(Renderer& r, const Value& v);
Value centered(Renderer& r, const Value& v, const Value& width);
Value format_filter(Renderer& r, const Value& v, Arguments& a);
Value to_text(Renderer& r, const Value& v);
Value to_markup(Renderer& r, const Value& v);
/// As it is printed with sorted keys, where that fits into a line of 80.
Value pretty(Renderer& r, const Value& v);
bool has_marks(const Value& v);  // whether something of it is the request's

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar

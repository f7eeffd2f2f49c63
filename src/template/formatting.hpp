#pragma once

#include "template/renderer.hpp"

#include <cstddef>
#include <cstdint>
#include <string>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// Python's ways to format: what they give has the marks of what it is made of.

/// format % values
Value percent_format(Renderer& r, const Value& format, const Value& values);
/// "...".format(values, names = values)
Value brace_format(Renderer& r, const Value& format, Arguments& args);
/// `text` with as much of `fill` before (align `>`), behind (`<`) or around it (`^`; `|`: as
/// str.center, which rounds the other way) as fills `width` characters.
void append_padded(Renderer& r, Text& out, const Text& text, int64_t width, char align,
                   const Text& fill);
/// Rounded to so many decimals as Python does: exactly, ties to even.
double rounded(double value, int decimals);

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "template/values.hpp"

#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

/// Fills `program`, all but its source, from a source with normalized lines.
Result<void> parse(TemplateProgram& program, std::string_view source);

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar

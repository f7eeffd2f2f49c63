#pragma once

#include "json.hpp"
#include "unicode_internal.hpp"

#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// The shortest decimal that reads back as `value`, spelled as Python's repr: "1.0", "1e-07",
/// "1e+16"; not finite: "null".
std::string write_double(double value);
/// A whole JSON number, to the nearest double (ties to even). Refused: any other spelling, and
/// what rounds to infinity. Kind invalid_request, code "invalid_json".
Result<double> parse_double(std::string_view text);
/// Appends `text` as a JSON string with its quotes; bytes that are not UTF-8 become U+FFFD.
void write_json_string(std::string& out, std::string_view text);
/// The same without the quotes. `ascii`: all but printable ASCII becomes \u escapes.
void write_json_escaped(std::string& out, std::string_view text, bool ascii = false);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// Words, ids and errors that several parts of the server say.
#pragma once

#include "base/internal.hpp"
#include "digest_internal.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

std::optional<std::string> server_unescape(std::string_view text);
double server_rounded(double value);
const char* server_error_kind(ErrorKind kind);
std::string server_uuid(uint8_t* bytes);
Error server_not_found(std::string message);
Error server_no_model(std::string_view model);
Error server_overloaded(std::string message);

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Words -----------------------------------------------------------------------------------

/// "%2F" is "/". Nothing when a percent sign is not followed by two hex digits.
std::optional<std::string> server_unescape(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '%') {
            out += text[i];
            continue;
        }
        auto byte = hex_decode(text.substr(i + 1, 2));
        if (!byte || byte->size() != 1) return std::nullopt;
        out += *byte;
        i += 2;
    }
    return out;
}

/// To a tenth, for log lines.
double server_rounded(double value) { return std::round(value * 10) / 10; }

/// For metrics.
const char* server_error_kind(ErrorKind kind) {
    static constexpr const char* names[] = {
        "invalid_request", "bad_data",   "unsupported", "io",       "out_of_memory", "not_found",
        "authentication",  "permission", "too_large",   "conflict", "rate_limit",    "overloaded",
        "timeout",         "cancelled",  "closed",      "internal"};
    static_assert(std::size(names) == static_cast<size_t>(ErrorKind::internal) + 1);
    return names[static_cast<size_t>(kind)];
}

/// A UUID of version 4 (RFC 9562) of 16 random bytes. It only tells requests apart: zeros will do
/// where there is no random source.
std::string server_uuid(uint8_t* bytes) {
    bytes[6] = static_cast<uint8_t>((bytes[6] & 0x0f) | 0x40);
    bytes[8] = static_cast<uint8_t>((bytes[8] & 0x3f) | 0x80);
    std::string hex = hex_encode(bytes, 16);
    for (const size_t at : {20u, 16u, 12u, 8u}) hex.insert(at, 1, '-');
    hex.shrink_to_fit();
    return hex;
}

Error server_not_found(std::string message) {
    return make_error(ErrorKind::not_found, std::move(message), "not_found");
}

Error server_no_model(std::string_view model) {
    const size_t shown = std::min(model.size(), server_shown_bytes);
    return make_error(ErrorKind::not_found,
                      "no model '" + utf8_repair(model.substr(0, shown)) +
                          "' is loaded; GET /v1/models lists those that are",
                      "model_not_found", "model");
}

Error server_overloaded(std::string message) {
    return make_error(ErrorKind::overloaded, std::move(message), "overloaded");
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

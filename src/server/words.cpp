#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Words -----------------------------------------------------------------------------------

std::string server_lower(std::string_view text) {
    std::string out(text);
    for (char& c : out)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 'a' - 'A');
    return out;
}

std::string_view server_trim(std::string_view text) {
    while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
    while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
    return text;
}

/// Of what a client sent, for a log line: one word, no control characters, not endless.
std::string server_printable(std::string_view text) {
    std::string out;
    for (const char c : text.substr(0, server_shown_bytes)) {
        const bool plain = c > ' ' && c < 0x7f && c != '"' && c != '\\';
        out += plain ? std::string(1, c) : format("\\x%02x", static_cast<unsigned char>(c));
    }
    return text.size() > server_shown_bytes ? out + "..." : out;
}

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

/// "resp_" and 24 of [0-9a-z]: 124 bits.
Result<std::string> server_new_id(std::string id) {
    const size_t size = id.size() + 24;
    while (id.size() < size) {
        uint8_t random[32];
        if (auto drawn = random_bytes(random, sizeof random); !drawn) return drawn.error();
        for (const uint8_t byte : random)  // 252 = 7 * 36: no character is likelier than another
            if (byte < 252 && id.size() < size)
                id += "0123456789abcdefghijklmnopqrstuvwxyz"[byte % 36];
    }
    return id;
}

/// A UUID of version 4 (RFC 9562). It only tells requests apart: zeros without a random source.
double server_rounded(double value) { return std::round(value * 10) / 10; }

/// Version 4 of RFC 9562, of 16 random bytes.
std::string server_uuid(uint8_t* bytes) {
    bytes[6] = static_cast<uint8_t>((bytes[6] & 0x0f) | 0x40);
    bytes[8] = static_cast<uint8_t>((bytes[8] & 0x3f) | 0x80);
    std::string hex = hex_encode(bytes, 16);
    for (const size_t at : {20u, 16u, 12u, 8u}) hex.insert(at, 1, '-');
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

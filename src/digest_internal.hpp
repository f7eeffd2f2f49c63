// >>digest
// Owns: SHA-256, HMAC-SHA256, CRC-32C, base64, hex, constant-time compare, the OS random source.
// Assumes: messages shorter than 2^61 bytes.
// Promises: the published test vectors; strict decoders (one spelling per value).
#pragma once

#include "base/internal.hpp"
#include "base/text.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// The 32 bytes of a SHA-256 or HMAC-SHA256.
struct Hash256 {
    uint8_t bytes[32] = {};
    bool operator==(const Hash256&) const = default;
    std::string hex() const;  ///< 64 lower-case digits
    std::string_view view() const { return {reinterpret_cast<const char*>(bytes), 32}; }
};

/// SHA-256 (FIPS 180-4) of bytes that arrive in pieces. `finish` ends it: make a new one after.
class Sha256 {
public:
    Sha256();
    void update(const void* data, size_t size);
    void update(std::string_view text) { update(text.data(), text.size()); }
    Hash256 finish();

private:
    void compress(const uint8_t* block);
    uint32_t state_[8];
    uint64_t length_ = 0;  // bytes taken so far
    uint8_t pending_[64];
};

Hash256 sha256(const void* data, size_t size);
Hash256 sha256(std::string_view text);
/// RFC 2104 with SHA-256; a key of any length.
Hash256 hmac_sha256(std::string_view key, std::string_view message);

/// CRC-32C (Castagnoli). To go on with more bytes pass the value so far; start with 0.
uint32_t crc32c(const void* data, size_t size, uint32_t value = 0);

/// RFC 4648 section 4, padded. The decoder takes exactly what the encoder writes: no white space,
/// no missing padding, no stray bits; kind invalid_request.
std::string base64_encode(const void* data, size_t size);
std::string base64_encode(std::string_view bytes);
Result<std::string> base64_decode(std::string_view text);

std::string hex_encode(const void* data, size_t size);  ///< lower case
Result<std::string> hex_decode(std::string_view text);  ///< either case, even length

/// The time taken depends on the lengths only.
bool constant_time_equal(std::string_view a, std::string_view b);

/// Overwrites a secret, also where the compiler sees nobody read it again.
void wipe(void* data, size_t size);

/// Bytes from the operating system's generator, for ids and secrets.
Result<void> random_bytes(void* data, size_t size);

inline constexpr size_t drawn_characters = 24;
/// `prefix` and so many of [0-9a-z], 124 bits that nobody can guess.
Result<std::string> draw_id(std::string prefix);
/// The same length of the same characters, but always the same of `source`.
std::string derive_id(std::string prefix, std::string_view source);

}  // namespace detail
}  // namespace v1
}  // namespace valar

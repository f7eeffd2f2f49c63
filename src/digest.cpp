// >>digest
// Plain loops: the largest input is a model file, read once, and the disk is slower.
#include "prologue.hpp"

#include "base/system.hpp"
#include "digest_internal.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// The first 32 bits of the fractions of the cube roots of the first 64 primes.
constexpr uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// And of the square roots of the first 8.
constexpr uint32_t sha256_start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

uint32_t load_big_endian32(const uint8_t* p) {
    return uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | p[3];
}

constexpr std::array<uint32_t, 256> crc32c_table = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0x82f63b78u : 0u);
        table[i] = value;
    }
    return table;
}();

constexpr char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

constexpr std::array<int8_t, 256> base64_values = [] {
    std::array<int8_t, 256> values{};
    values.fill(-1);
    for (int i = 0; i < 64; ++i) values[uint8_t(base64_digits[i])] = int8_t(i);
    return values;
}();

}  // namespace

std::string Hash256::hex() const { return hex_encode(bytes, sizeof bytes); }

Sha256::Sha256() { std::memcpy(state_, sha256_start, sizeof state_); }

void Sha256::compress(const uint8_t* block) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = load_big_endian32(block + 4 * i);
    for (int i = 16; i < 64; ++i) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
               (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    uint32_t s[8];
    std::memcpy(s, state_, sizeof s);
    for (int i = 0; i < 64; i += 8) {
        for (int k = 0; k < 8; ++k) {  // instead of moving eight variables, name them anew
            const auto v = [&](int name) -> uint32_t& { return s[(name - k) & 7]; };
            const uint32_t a = v(0), e = v(4);
            const uint32_t t = v(7) + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                               ((e & v(5)) ^ (~e & v(6))) + sha256_constants[i + k] + w[i + k];
            v(3) += t;
            v(7) = t + (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                   ((a & v(1)) ^ (a & v(2)) ^ (v(1) & v(2)));
        }
    }
    for (int i = 0; i < 8; ++i) state_[i] += s[i];
}

void Sha256::update(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    size_t filled = size_t(length_ % 64);
    length_ += size;
    while (size > 0) {
        if (filled == 0 && size >= 64) {  // whole blocks straight from the caller
            compress(bytes);
            bytes += 64;
            size -= 64;
            continue;
        }
        const size_t take = std::min(size, 64 - filled);
        std::memcpy(pending_ + filled, bytes, take);
        bytes += take;
        size -= take;
        filled = (filled + take) % 64;
        if (filled == 0) compress(pending_);
    }
}

Hash256 Sha256::finish() {
    const uint64_t bits = length_ * 8;
    uint8_t tail[72] = {0x80};
    const size_t padding = 64 - size_t((length_ + 8) % 64);  // 1 to 64: the 0x80 and zeros
    for (size_t i = 0; i < 8; ++i) tail[padding + i] = uint8_t(bits >> (56 - 8 * i));
    update(tail, padding + 8);
    Hash256 hash;
    for (size_t i = 0; i < 32; ++i) hash.bytes[i] = uint8_t(state_[i / 4] >> (24 - 8 * (i % 4)));
    return hash;
}

Hash256 sha256(const void* data, size_t size) {
    Sha256 digest;
    digest.update(data, size);
    return digest.finish();
}

Hash256 sha256(std::string_view text) { return sha256(text.data(), text.size()); }

Hash256 hmac_sha256(std::string_view key, std::string_view message) {
    uint8_t pad[64] = {};
    const Hash256 short_key = sha256(key);
    if (key.size() > sizeof pad) key = short_key.view();
    if (!key.empty()) std::memcpy(pad, key.data(), key.size());
    Sha256 inner, outer;
    for (uint8_t& byte : pad) byte ^= 0x36;
    inner.update(pad, sizeof pad);
    inner.update(message);
    for (uint8_t& byte : pad) byte ^= 0x36 ^ 0x5c;
    outer.update(pad, sizeof pad);
    outer.update(inner.finish().view());
    return outer.finish();
}

uint32_t crc32c(const void* data, size_t size, uint32_t value) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    value = ~value;
    for (size_t i = 0; i < size; ++i) value = value >> 8 ^ crc32c_table[(value ^ bytes[i]) & 255];
    return ~value;
}

std::string base64_encode(std::string_view bytes) {
    return base64_encode(bytes.data(), bytes.size());
}

std::string base64_encode(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    std::string text;
    text.reserve((size + 2) / 3 * 4);
    for (size_t i = 0; i < size; i += 3) {
        const size_t count = std::min(size - i, size_t(3));
        uint32_t group = uint32_t(bytes[i]) << 16;
        if (count > 1) group |= uint32_t(bytes[i + 1]) << 8;
        if (count > 2) group |= bytes[i + 2];
        for (size_t k = 0; k < 4; ++k)
            text += k <= count ? base64_digits[group >> (18 - 6 * k) & 63] : '=';
    }
    return text;
}

Result<std::string> base64_decode(std::string_view text) {
    std::string bytes;
    bytes.reserve(text.size() / 4 * 3);
    bool good = text.size() % 4 == 0;
    for (size_t i = 0; good && i < text.size(); i += 4) {
        const bool last = i + 4 == text.size();
        const size_t padding = !last || text[i + 3] != '=' ? 0 : text[i + 2] != '=' ? 1 : 2;
        uint32_t group = 0;
        for (size_t k = 0; k < 4 - padding; ++k) {
            const int value = base64_values[uint8_t(text[i + k])];
            good = good && value >= 0;
            group |= uint32_t(value & 63) << (18 - 6 * k);
        }
        for (size_t k = 0; k < 3 - padding; ++k) bytes += char(group >> (16 - 8 * k) & 255);
        good = good && (group & ((1u << 8 * padding) - 1)) == 0;  // bits beyond the last byte
    }
    if (good) return bytes;
    return make_error(ErrorKind::invalid_request, "not base64 (RFC 4648, padded)");
}

std::string hex_encode(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    std::string text(2 * size, '0');
    for (size_t i = 0; i < 2 * size; ++i)
        text[i] = "0123456789abcdef"[i % 2 ? bytes[i / 2] & 15 : bytes[i / 2] >> 4];
    return text;
}

Result<std::string> hex_decode(std::string_view text) {
    std::string bytes(text.size() / 2, '\0');
    bool good = text.size() % 2 == 0;
    for (size_t i = 0; good && i < bytes.size(); ++i) {
        const int high = hex_value(text[2 * i]), low = hex_value(text[2 * i + 1]);
        good = high >= 0 && low >= 0;
        bytes[i] = char((high & 15) << 4 | (low & 15));
    }
    if (good) return bytes;
    return make_error(ErrorKind::invalid_request, "not hexadecimal");
}

bool constant_time_equal(std::string_view a, std::string_view b) {
    if (a.size() != b.size()) return false;
    volatile unsigned char difference = 0;  // volatile: no early way out for the optimiser
    for (size_t i = 0; i < a.size(); ++i)
        difference = static_cast<unsigned char>(difference | (a[i] ^ b[i]));
    return difference == 0;
}

void wipe(void* data, size_t size) {
    volatile auto* bytes = static_cast<unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) bytes[i] = 0;
}

Result<void> random_bytes(void* data, size_t size) {
    auto* bytes = static_cast<uint8_t*>(data);
#if defined(_WIN32)
    while (size > 0) {
        const ULONG count = ULONG(std::min(size, size_t(1) << 20));
        if (BCryptGenRandom(nullptr, bytes, count, BCRYPT_USE_SYSTEM_PREFERRED_RNG) != 0)
            return make_error(ErrorKind::io, "BCryptGenRandom failed");
        bytes += count;
        size -= count;
    }
#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__NetBSD__)
    arc4random_buf(bytes, size);
#elif defined(__linux__)
    while (size > 0) {
        const ssize_t count = getrandom(bytes, std::min(size, size_t(256)), 0);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return os_error("getrandom");
        bytes += count;
        size -= size_t(count);
    }
#else
    for (; size > 0; bytes += std::min(size, size_t(256)), size -= std::min(size, size_t(256)))
        if (getentropy(bytes, std::min(size, size_t(256))) != 0) return os_error("getentropy");
#endif
    return {};
}

static constexpr char id_characters[] = "0123456789abcdefghijklmnopqrstuvwxyz";

Result<std::string> draw_id(std::string prefix) {
    std::string id = std::move(prefix);
    const size_t size = id.size() + drawn_characters;
    while (id.size() < size) {
        uint8_t random[32];
        if (auto drawn = random_bytes(random, sizeof random); !drawn) return drawn.error();
        for (const uint8_t byte : random)  // 252 = 7 * 36: no character is likelier than another
            if (byte < 252 && id.size() < size) id += id_characters[byte % 36];
    }
    return id;
}

std::string derive_id(std::string prefix, std::string_view source) {
    std::string id = std::move(prefix);
    const size_t size = id.size() + drawn_characters;
    for (const uint8_t byte : sha256(source).bytes)
        if (id.size() < size) id += id_characters[byte % 36];
    return id;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

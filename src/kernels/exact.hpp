#pragma once

#include "kernels/internal.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace valar {
inline namespace v1 {
namespace detail {

#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "valar needs float arithmetic in binary32: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif
static_assert(std::endian::native == std::endian::little, "valar needs a little-endian target");
static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559);

// a * b is exact in double; the sum is rounded to odd (Boldo and Melquiond, "Emulation of FMA and
// correctly rounded sums", 2008), so that rounding to float afterwards sees which side it is on.
inline float emulated_fma(float a, float b, float c) {
    const double product = double(a) * double(b);
    const double sum = product + double(c);
    const double other = sum - product;
    const double error = (product - (sum - other)) + (double(c) - other);
    uint64_t bits = bit_cast<uint64_t>(sum);
    const bool finite = (bits >> 52 & 0x7ff) != 0x7ff;
    if (finite && error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1u : ~uint64_t{0};
    return static_cast<float>(bit_cast<double>(bits));
}

inline float fma_once(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || (defined(__riscv_flen) && __riscv_flen >= 32)
    return __builtin_fmaf(a, b, c);
#else
    return emulated_fma(a, b, c);
#endif
}

// For exact products of two floats below 2^50: fusing product and sum would change nothing.
inline double nearest_integer(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

inline constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
inline constexpr float kExpLeast = -87.0f, kExpMost = 88.0f;
inline constexpr float exp_coefficients[7] = {
    1.0f, 1.0f, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558bp-5f, 0x1.123994p-7f, 0x1.6a4e0cp-10f};

inline float exp_once(float x) {
    if (x < kExpLeast) return 0.0f;
    if (x != x) return x;
    if (x > kExpMost) x = kExpMost;
    const float k = static_cast<float>(nearest_integer(double(x) * double(kLog2e)));
    const float r = fma_once(-k, kLn2Low, fma_once(-k, kLn2High, x));
    float p = exp_coefficients[6];
    for (int i = 5; i >= 0; i--) p = fma_once(p, r, exp_coefficients[i]);
    return p * bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
}

inline float silu_once(float x) { return x / (1.0f + exp_once(-x)); }

// A product in double that no compiler may fuse with the sum it feeds.
inline double rounded(double product) {
    volatile double stored = product;
    return stored;
}

inline double inverse_factorial(int n) {
    double factorial = 1;
    for (int i = 2; i <= n; i++) factorial *= i;
    return 1.0 / factorial;
}

inline double power_of_two(int k) {  // -1022 <= k <= 1023
    return bit_cast<double>(static_cast<uint64_t>(k + 1023) << 52);
}

inline float half_value(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31,
                   fraction = half & 1023u;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent < 31) return bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    return bit_cast<float>(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
}

inline uint16_t half_bits(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) magnitude = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    else if (magnitude >= 0x477ff000u) magnitude = 0x7c00u;  // 65520 and more
    else if (magnitude < 0x38800000u)  // below 2^-14: beside 0.5 the last bit is worth 2^-24
        magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    else magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    return static_cast<uint16_t>(sign | magnitude);
}

inline float bfloat_value(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t load16(const std::byte* at) {
    uint16_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline uint32_t load32(const std::byte* at) {
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline void store16(std::byte* at, uint16_t value) { std::memcpy(at, &value, sizeof value); }
inline void store32(std::byte* at, uint32_t value) { std::memcpy(at, &value, sizeof value); }

}  // namespace detail
}  // namespace v1
}  // namespace valar

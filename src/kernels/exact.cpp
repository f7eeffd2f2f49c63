// >>kernels
// In this order: exact building blocks, packed layouts, the scalar reference, one region per
// instruction set, the floating-point state, the choice of a table, the worker team. Read the
// numeric definition first, then the scalar reference.

#include "prologue.hpp"

#include "kernels/exact.hpp"

#include <cstdint>
#include <limits>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

double exact_log(double x) { return rounded(exact_log2(x) * 0x1.62e42fefa39efp-1); }

}  // namespace detail

float exact_fma(float a, float b, float c) { return detail::fma_once(a, b, c); }
float exact_exp(float x) { return detail::exp_once(x); }

double exact_exp2(double x) {
    if (x < -1022) return 0;
    if (x >= 1023) return std::numeric_limits<double>::infinity();
    if (x != x) return x;
    x = detail::rounded(x);  // inlined, it may be the caller's product
    const double k = detail::nearest_integer(x);
    const double t = detail::rounded((x - k) * 0x1.62e42fefa39efp-1);
    double p = detail::inverse_factorial(13);
    for (int n = 12; n >= 0; n--) p = detail::rounded(p * t) + detail::inverse_factorial(n);
    return p * detail::power_of_two(static_cast<int>(k));
}

double exact_log2(double x) {
    if (x == 0) return -std::numeric_limits<double>::infinity();
    if (!(x > 0)) return std::numeric_limits<double>::quiet_NaN();
    if (x > std::numeric_limits<double>::max()) return x;
    double e = 0;
    if (x < 0x1p-1022) {
        x *= 0x1p54;
        e = -54;
    }
    const uint64_t bits = detail::bit_cast<uint64_t>(x);
    e += static_cast<double>(static_cast<int>(bits >> 52) - 1023);
    double m = detail::bit_cast<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m /= 2;
        e += 1;
    }
    const double u = (m - 1) / (m + 1);
    const double z = detail::rounded(u * u);
    double p = 1.0 / 23;
    for (int n = 21; n >= 1; n -= 2) p = detail::rounded(p * z) + 1.0 / n;
    return e + detail::rounded(detail::rounded(u * p) * 0x1.71547652b82fep+1);
}

void exact_sincos(double x, double* sine, double* cosine) {
    x = detail::rounded(x);  // inlined, it may be the caller's product
    const double k = detail::nearest_integer(detail::rounded(x * 0x1.45f306dc9c883p-1));
    const double r = ((x - detail::rounded(k * 0x1.921fb544p+0)) -
                      detail::rounded(k * 0x1.0b4611a6p-34)) -
                     detail::rounded(k * 0x1.3198a2ep-69);
    const double z = detail::rounded(r * r);
    double s = detail::inverse_factorial(17), c = detail::inverse_factorial(16);
    for (int n = 15; n >= 1; n -= 2) {
        s = detail::rounded(s * z) +
            (n & 2 ? -detail::inverse_factorial(n) : detail::inverse_factorial(n));
        c = detail::rounded(c * z) +
            (n & 2 ? -detail::inverse_factorial(n - 1) : detail::inverse_factorial(n - 1));
    }
    s = detail::rounded(r * s);
    const int64_t quarter = static_cast<int64_t>(k) & 3;
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

float half_to_float(uint16_t bits) { return detail::half_value(bits); }
uint16_t float_to_half(float value) { return detail::half_bits(value); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// k_quants: from 256 values to a block of Q4_K, Q5_K or Q6_K. Include it after valar.hpp.
//
// A block has two half-precision scales, and each of its parts of 32 (Q6_K: 16) values small whole
// numbers that multiply them: the part's scale and, but for Q6_K, its minimum. So rounding has two
// stages. First each part gets the scale and minimum that fit it best, as real numbers; then those
// are rounded, and the codes are made anew for what they became, which mends most of what their
// rounding spoiled. "Best" is the least sum of weighted squares: large weights meet large sums.
#ifndef VALAR_EXAMPLES_K_QUANTS_HPP
#define VALAR_EXAMPLES_K_QUANTS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace example {

inline constexpr size_t kSuperBlock = 256;

/// The nearest whole number from least to most, both below 2^22 in magnitude; NaN counts as least.
inline float nearest(float x, float least, float most) {
    constexpr float whole = 12582912;  // 1.5 * 2^23: a sum with it has no room for a fraction
    const float held = x > least ? (x < most ? x : most) : least;
    return (held + whole) - whole;
}
inline float half_of(const std::byte* at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return valar::half_to_float(bits);
}
/// Stores the value in half precision; what it became.
inline float put_half(float value, std::byte* at) {
    const uint16_t bits = valar::float_to_half(value);
    std::memcpy(at, &bits, sizeof bits);
    return half_of(at);
}

/// Sums of so many lanes, which a compiler may add side by side.
struct Lanes {
    static constexpr size_t count = 8;
    float sums[count] = {};
    float all() const {
        return ((sums[0] + sums[4]) + (sums[1] + sums[5])) +
               ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    }
};

/// Some values as scale * code + offset, with codes least .. most.
template <size_t count>
struct Fit {
    const float* x;
    float weights[count];
    float least, most;

    Fit(const float* values, int least_code, int most_code)
        : x(values), least(static_cast<float>(least_code)), most(static_cast<float>(most_code)) {
        float squares = 0;
        for (size_t i = 0; i < count; ++i) squares += x[i] * x[i];
        const float usual = std::sqrt(squares / static_cast<float>(count));
        for (size_t i = 0; i < count; ++i) weights[i] = usual + std::fabs(x[i]);
    }
    /// Codes for a scale and an offset; their error.
    float round(float scale, float offset, float* codes) const {
        const float inverse = scale != 0 ? 1 / scale : 0.0f;
        Lanes error;
        for (size_t i = 0; i < count; i += Lanes::count)
            for (size_t lane = 0; lane < Lanes::count; ++lane) {
                const float value = x[i + lane];
                const float code = nearest((value - offset) * inverse, least, most);
                const float off = scale * code + offset - value;
                codes[i + lane] = code;
                error.sums[lane] += weights[i + lane] * off * off;
            }
        return error.all();
    }
    /// The scale and offset for these codes, by least squares; with_offset false: the offset is 0.
    void solve(const float* codes, bool with_offset, float& scale, float& offset) const {
        Lanes lw, lc, lcc, lv, lcv;
        for (size_t i = 0; i < count; i += Lanes::count)
            for (size_t lane = 0; lane < Lanes::count; ++lane) {
                const float weight = weights[i + lane], code = codes[i + lane];
                const float value = x[i + lane], weighted = weight * code;
                lw.sums[lane] += weight;
                lc.sums[lane] += weighted;
                lcc.sums[lane] += weighted * code;
                lv.sums[lane] += weight * value;
                lcv.sums[lane] += weighted * value;
            }
        const float w = lw.all(), c = lc.all(), cc = lcc.all(), v = lv.all(), cv = lcv.all();
        const float determinant = w * cc - c * c;
        if (with_offset && determinant > 0) {
            scale = (w * cv - c * v) / determinant;
            offset = (cc * v - c * cv) / determinant;
            if (offset <= 0 && scale > 0) return;
        }
        // a minimum is subtracted, never added
        offset = 0;
        scale = cc > 0 ? cv / cc : 0.0f;
    }
    /// From a first guess a few steps of solving and rounding, as long as they make it better.
    float improve(bool with_offset, float& scale, float& offset) const {
        float codes[count];
        float best = round(scale, offset, codes);
        for (int step = 0; step < 3; ++step) {
            float next_scale, next_offset;
            solve(codes, with_offset, next_scale, next_offset);
            const float error = round(next_scale, next_offset, codes);
            if (!(error < best)) break;
            best = error;
            scale = next_scale;
            offset = next_offset;
        }
        return best;
    }
};

/// Of several first guesses, which spread the codes a little wider or narrower than the values lie,
/// the one that ends best.
template <size_t count>
void fit_with_minimum(const Fit<count>& fit, float& scale, float& offset) {
    const float low = std::min(*std::min_element(fit.x, fit.x + count), 0.0f);
    const float high = *std::max_element(fit.x, fit.x + count);
    scale = 0;
    offset = low;
    if (!(high > low)) return;  // all alike, or no numbers
    float best = -1;
    for (int guess = -4; guess <= 4; ++guess) {
        float own = (high - low) / (fit.most + 0.2f * static_cast<float>(guess));
        float own_offset = low;
        const float error = fit.improve(true, own, own_offset);
        if (best >= 0 && !(error < best)) continue;
        best = error;
        scale = own;
        offset = own_offset;
    }
}

template <size_t count>
float fit_around_zero(const Fit<count>& fit) {
    const float* end = fit.x + count;
    const float largest = *std::max_element(
        fit.x, end, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    if (!(std::fabs(largest) > 0)) return 0;
    float best = -1, scale = 0;
    for (int guess = -4; guess <= 4; ++guess) {
        float own = largest / (fit.least - 0.2f * static_cast<float>(guess));
        float none = 0;
        const float error = fit.improve(false, own, none);
        if (best >= 0 && !(error < best)) continue;
        best = error;
        scale = own;
    }
    return scale;
}

/// Eight scales and eight minima of 6 bits in 12 bytes: the first four of each in the low bits of
/// bytes 0 .. 3 and 4 .. 7; of the others the low four bits in bytes 8 .. 11 and the high two on top
/// of the first.
inline void store_six_bits(const int (&scales)[8], const int (&minima)[8], std::byte* out) {
    for (size_t i = 0; i < 4; ++i) {
        const int high[] = {scales[i + 4], minima[i + 4]};
        out[i] = static_cast<std::byte>(scales[i] | (high[0] >> 4) << 6);
        out[i + 4] = static_cast<std::byte>(minima[i] | (high[1] >> 4) << 6);
        out[i + 8] = static_cast<std::byte>((high[0] & 15) | (high[1] & 15) << 4);
    }
}

/// The scales and minima of the parts of a block, as its two scales and whole numbers up to 63, and
/// the codes: for each part the neighbours of the nearest numbers are tried too.
inline void codes_with_minimum(const float* x, int most, std::byte* out,
                               int (&codes)[kSuperBlock]) {
    float scales[8], offsets[8];
    for (size_t part = 0; part < 8; ++part)
        fit_with_minimum(Fit<32>(x + 32 * part, 0, most), scales[part], offsets[part]);
    const float d = put_half(*std::max_element(scales, scales + 8) / 63, out);
    const float m = put_half(-*std::min_element(offsets, offsets + 8) / 63, out + 2);
    int whole[8], minima[8];
    for (size_t part = 0; part < 8; ++part) {
        const Fit<32> fit(x + 32 * part, 0, most);
        const int scale = static_cast<int>(nearest(d != 0 ? scales[part] / d : 0.0f, 0, 63));
        const int minimum = static_cast<int>(nearest(m != 0 ? -offsets[part] / m : 0.0f, 0, 63));
        float best = -1;
        float tried[32];
        for (int s = std::max(scale - 1, 0); s <= std::min(scale + 1, 63); ++s)
            for (int o = std::max(minimum - 1, 0); o <= std::min(minimum + 1, 63); ++o) {
                const float error = fit.round(d * static_cast<float>(s), -m * static_cast<float>(o),
                                              tried);
                if (best >= 0 && !(error < best)) continue;
                best = error;
                whole[part] = s;
                minima[part] = o;
                for (size_t i = 0; i < 32; ++i) codes[32 * part + i] = static_cast<int>(tried[i]);
            }
    }
    store_six_bits(whole, minima, out + 4);
}

/// Pairs of parts share 32 bytes: the first has the low halves, the second the high ones.
inline void store_pairs(const int (&codes)[kSuperBlock], std::byte* out) {
    for (size_t pair = 0; pair < 4; ++pair)
        for (size_t i = 0; i < 32; ++i)
            out[32 * pair + i] = static_cast<std::byte>((codes[64 * pair + i] & 15) |
                                                        (codes[64 * pair + 32 + i] & 15) << 4);
}

inline void quantize_q4_k(const float* x, size_t, std::byte* out) {
    int codes[kSuperBlock];
    codes_with_minimum(x, 15, out, codes);
    store_pairs(codes, out + 16);
}

/// The fifth bit of value i of part p is bit p of byte i.
inline void quantize_q5_k(const float* x, size_t, std::byte* out) {
    int codes[kSuperBlock];
    codes_with_minimum(x, 31, out, codes);
    for (size_t i = 0; i < 32; ++i) {
        int bits = 0;
        for (size_t part = 0; part < 8; ++part) bits |= codes[32 * part + i] >> 4 << part;
        out[16 + i] = static_cast<std::byte>(bits);
    }
    store_pairs(codes, out + 48);
}

/// In each half of the block, byte i of 64 has the low four bits of the values i and i + 64, and
/// byte i of 32 the high two of the values i, i + 32, i + 64 and i + 96.
inline void store_six_bit_codes(const int (&codes)[kSuperBlock], std::byte* out) {
    for (size_t half = 0; half < 2; ++half) {
        const int* c = codes + 128 * half;
        for (size_t i = 0; i < 64; ++i)
            out[64 * half + i] = static_cast<std::byte>((c[i] & 15) | (c[i + 64] & 15) << 4);
        for (size_t i = 0; i < 32; ++i)
            out[128 + 32 * half + i] = static_cast<std::byte>(
                c[i] >> 4 | c[i + 32] >> 4 << 2 | c[i + 64] >> 4 << 4 | c[i + 96] >> 4 << 6);
    }
}

inline void quantize_q6_k(const float* x, size_t, std::byte* out) {
    float scales[16];
    for (size_t part = 0; part < 16; ++part)
        scales[part] = fit_around_zero(Fit<16>(x + 16 * part, -32, 31));
    const float largest = *std::max_element(
        scales, scales + 16, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
    const float d = put_half(largest / -128, out + 208);
    int codes[kSuperBlock];
    for (size_t part = 0; part < 16; ++part) {
        const Fit<16> fit(x + 16 * part, -32, 31);
        const int scale = static_cast<int>(nearest(d != 0 ? scales[part] / d : 0.0f, -128, 127));
        float best = -1;
        float tried[16];
        for (int s = std::max(scale - 1, -128); s <= std::min(scale + 1, 127); ++s) {
            const float error = fit.round(d * static_cast<float>(s), 0, tried);
            if (best >= 0 && !(error < best)) continue;
            best = error;
            out[192 + part] = static_cast<std::byte>(s);
            for (size_t i = 0; i < 16; ++i) codes[16 * part + i] = static_cast<int>(tried[i]) + 32;
        }
    }
    store_six_bit_codes(codes, out);
}

}  // namespace example

#endif  // VALAR_EXAMPLES_K_QUANTS_HPP

// >>kernels: the building blocks against libm, the scalar reference against the words of the
// numeric definition, every other table against the scalar reference, bit by bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/internal.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

struct Random {
    uint64_t state;
    uint32_t bits() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return static_cast<uint32_t>(z >> 32);
    }
    uint32_t below(uint32_t n) { return bits() % n; }
    float uniform() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }
    // Mostly ordinary; some zeros of both signs, denormals, and magnitudes far apart.
    float value() {
        switch (below(24)) {
            case 0: return 0.0f;
            case 1: return -0.0f;
            case 2: return uniform() * 0x1p-126f;
            case 3: return uniform() * 0x1p-100f;
            case 4: return uniform() * 1e4f;
            default: return uniform() * 4;
        }
    }
    std::vector<float> values(size_t n, bool ordinary = false) {
        std::vector<float> out(n);
        for (float& x : out) x = ordinary ? uniform() : value();
        return out;
    }
};

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// The first index at which two arrays differ in a bit; n where they do not.
size_t first_difference(const float* a, const float* b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (to_bits(a[i]) != to_bits(b[i])) return i;
    return n;
}
bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && first_difference(a.data(), b.data(), a.size()) == a.size();
}

const Kernels& scalar() { return *available_kernels()[0]; }

// Types that read_row reads as the format says.
constexpr TensorType written_types[] = {
    TensorType::q4_0,   TensorType::q4_1,  TensorType::q5_0, TensorType::q5_1, TensorType::q8_0,
    TensorType::iq4_nl, TensorType::mxfp4, TensorType::q2_k, TensorType::q3_k, TensorType::iq4_xs,
    TensorType::tq2_0,  TensorType::q4_k,  TensorType::q5_k, TensorType::q6_k, TensorType::f32,
    TensorType::f16,    TensorType::bf16};
// Those and others; what these mean is compared with PyPI's gguf (weights_check.py, numerics.py).
constexpr TensorType all_types[] = {
    TensorType::q4_0,    TensorType::q4_1,   TensorType::q5_0,   TensorType::q5_1,
    TensorType::q8_0,    TensorType::iq4_nl, TensorType::mxfp4,  TensorType::q2_k,
    TensorType::q3_k,    TensorType::iq4_xs, TensorType::tq2_0,  TensorType::q4_k,
    TensorType::q5_k,    TensorType::q6_k,   TensorType::f32,    TensorType::f16,
    TensorType::bf16,    TensorType::tq1_0,  TensorType::nvfp4,  TensorType::iq3_s,
    TensorType::iq3_xxs, TensorType::iq2_s,  TensorType::iq2_xs, TensorType::iq2_xxs,
    TensorType::iq1_s,   TensorType::iq1_m};

bool is_float(TensorType type) {
    return type == TensorType::f32 || type == TensorType::f16 || type == TensorType::bf16;
}

// ---- GGUF blocks, read as the format says, with nothing shared with the library ----------------

struct WeightBlock {  // 32 columns
    int w[32];
    float dw, m;
    int sc[2], mn[2];  // mn: in units of m, where there are two
    bool minimum, two_minimums;
};

float half_at(const uint8_t* at) {
    const int bits = at[0] | at[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25)
                                 : std::ldexp(fraction, -24);
    return static_cast<float>(bits & 0x8000 ? -size : size);
}

std::vector<WeightBlock> read_row(TensorType type, const uint8_t* at, uint32_t cols) {
    std::vector<WeightBlock> out;
    constexpr int iq4[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                           1,    13,   25,  38,  53,  69,  89,  113};
    constexpr int fp4[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (uint32_t block = 0; block < cols / type_info(type)->block_size; block++) {
        WeightBlock b{};
        b.sc[0] = b.sc[1] = 1;
        if (type == TensorType::iq4_nl || type == TensorType::mxfp4) {
            const bool mx = type == TensorType::mxfp4;
            b.dw = mx ? static_cast<float>(std::ldexp(1.0, at[0] - 128)) : half_at(at);
            at += mx ? 1 : 2;
            for (int i = 0; i < 32; i++) {
                const int code = i < 16 ? at[i] & 15 : at[i - 16] >> 4;
                b.w[i] = mx ? fp4[code] : iq4[code];
            }
            out.push_back(b);
            at += 16;
            continue;
        }
        if (type == TensorType::q2_k) {
            for (int s = 0; s < 8; s++) {
                b.minimum = b.two_minimums = true;
                b.dw = half_at(at + 80);
                b.m = -half_at(at + 82);
                for (int i = 0; i < 2; i++) {
                    b.sc[i] = at[2 * s + i] & 15;
                    b.mn[i] = at[2 * s + i] >> 4;
                }
                for (int i = 0; i < 32; i++) b.w[i] = at[16 + 32 * (s / 4) + i] >> 2 * (s % 4) & 3;
                out.push_back(b);
            }
            at += 84;
            continue;
        }
        if (type == TensorType::q3_k) {
            for (int s = 0; s < 8; s++) {
                b.dw = half_at(at + 108);
                for (int i = 0; i < 2; i++) {
                    const int j = 2 * s + i;
                    b.sc[i] = (at[96 + j % 8] >> 4 * (j / 8) & 15) +
                              (at[104 + j % 4] >> 2 * (j / 4) & 3) * 16 - 32;
                }
                for (int i = 0; i < 32; i++)
                    b.w[i] = (at[32 + 32 * (s / 4) + i] >> 2 * (s % 4) & 3) -
                             (at[i] >> s & 1 ? 0 : 4);
                out.push_back(b);
            }
            at += 110;
            continue;
        }
        if (type == TensorType::iq4_xs) {
            for (int s = 0; s < 8; s++) {
                b.dw = half_at(at);
                b.sc[0] = b.sc[1] = (at[4 + s / 2] >> 4 * (s % 2) & 15) +
                                    ((at[2] | at[3] << 8) >> 2 * s & 3) * 16 - 32;
                for (int i = 0; i < 32; i++)
                    b.w[i] = iq4[at[8 + 16 * s + i % 16] >> (i < 16 ? 0 : 4) & 15];
                out.push_back(b);
            }
            at += 136;
            continue;
        }
        if (type == TensorType::tq2_0) {
            for (int s = 0; s < 8; s++) {
                b.dw = half_at(at + 64);
                for (int i = 0; i < 32; i++) b.w[i] = (at[32 * (s / 4) + i] >> 2 * (s % 4) & 3) - 1;
                out.push_back(b);
            }
            at += 66;
            continue;
        }
        if (type == TensorType::q4_0 || type == TensorType::q4_1 || type == TensorType::q5_0 ||
            type == TensorType::q5_1) {
            const bool five = type == TensorType::q5_0 || type == TensorType::q5_1;
            b.dw = half_at(at);
            b.minimum = type == TensorType::q4_1 || type == TensorType::q5_1;
            const int high = b.minimum ? 4 : 2, header = five ? high + 4 : high;
            if (b.minimum) b.m = half_at(at + 2);
            for (int i = 0; i < 32; i++) {
                int code = i < 16 ? at[header + i] & 15 : at[header + i - 16] >> 4;
                if (five) code += (at[high + i / 8] >> i % 8 & 1) * 16;
                b.w[i] = code - (b.minimum ? 0 : five ? 16 : 8);
            }
            out.push_back(b);
            at += header + 16;
        } else if (type == TensorType::q8_0) {
            b.dw = half_at(at);
            for (int i = 0; i < 32; i++) b.w[i] = static_cast<int8_t>(at[2 + i]);
            out.push_back(b);
            at += 34;
        } else if (type == TensorType::q6_k) {
            for (int s = 0; s < 8; s++) {
                b.dw = half_at(at + 208);
                for (int i = 0; i < 2; i++) b.sc[i] = static_cast<int8_t>(at[192 + 2 * s + i]);
                for (int i = 0; i < 32; i++) {
                    const int low = at[64 * (s / 4) + 32 * (s % 2) + i] >> (s % 4 < 2 ? 0 : 4) & 15;
                    const int high = at[128 + 32 * (s / 4) + i] >> 2 * (s % 4) & 3;
                    b.w[i] = low + 16 * high - 32;
                }
                out.push_back(b);
            }
            at += 210;
        } else {
            const bool five = type == TensorType::q5_k;
            const uint8_t *q = at + 4, *high = at + 16, *low = at + (five ? 48 : 16);
            for (int s = 0; s < 8; s++) {
                const int sc = s < 4 ? q[s] & 63 : (q[s + 4] & 15) + (q[s - 4] >> 6) * 16;
                const int mn = s < 4 ? q[s + 4] & 63 : (q[s + 4] >> 4) + (q[s] >> 6) * 16;
                b.minimum = true;
                b.dw = half_at(at) * static_cast<float>(sc);
                b.m = -(half_at(at + 2) * static_cast<float>(mn));
                for (int i = 0; i < 32; i++) {
                    b.w[i] = low[32 * (s / 2) + i] >> 4 * (s % 2) & 15;
                    if (five) b.w[i] += (high[i] >> s & 1) * 16;
                }
                out.push_back(b);
            }
            at += five ? 176 : 144;
        }
    }
    return out;
}

// Definition, 11.
float dequantized(const WeightBlock& b, int i) {
    const float scale = b.dw * static_cast<float>(b.sc[i / 16]), w = static_cast<float>(b.w[i]);
    if (!b.minimum) return scale * w;
    return std::fmaf(scale, w, b.two_minimums ? b.m * static_cast<float>(b.mn[i / 16]) : b.m);
}

float read_float(TensorType type, const uint8_t* at, size_t i) {
    if (type == TensorType::f16) return half_at(at + 2 * i);
    uint32_t bits = 0;
    if (type == TensorType::bf16) std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, at + 2 * i, 2);
    else std::memcpy(&bits, at + 4 * i, 4);
    return from_bits(bits);
}

size_t row_bytes(TensorType type, uint32_t cols) {
    return size_t{cols} / type_info(type)->block_size * type_info(type)->block_bytes;
}

// Where a block has its binary16 scales.
std::vector<size_t> half_scales(TensorType type) {
    switch (type) {
        case TensorType::q4_0:
        case TensorType::q5_0:
        case TensorType::q8_0: return {0};
        case TensorType::iq4_nl:
        case TensorType::iq4_xs:
        case TensorType::iq3_s:
        case TensorType::iq3_xxs:
        case TensorType::iq2_s:
        case TensorType::iq2_xs:
        case TensorType::iq2_xxs:
        case TensorType::iq1_s: return {0};
        case TensorType::mxfp4:
        case TensorType::nvfp4:
        case TensorType::iq1_m: return {};  // set_other_scale
        case TensorType::q2_k: return {80, 82};
        case TensorType::q3_k: return {108};
        case TensorType::tq1_0: return {52};
        case TensorType::tq2_0: return {64};
        case TensorType::q6_k: return {208};
        default: return {0, 2};
    }
}
// Makes scales of other kinds of moderate size.
void set_other_scale(TensorType type, uint8_t* block) {
    if (type == TensorType::mxfp4) block[0] = static_cast<uint8_t>(96 + block[0] % 48);
    if (type == TensorType::iq1_m)
        block[55] = static_cast<uint8_t>((block[55] & 0x8f) | 0x20);  // of binary16, the upper bits
}
bool in_scale(TensorType type, size_t at) {
    if (type == TensorType::mxfp4) return at == 0;
    if (type == TensorType::nvfp4) return at < 4;
    if (type == TensorType::iq1_m) return at == 55 || at == 53;
    const auto scales = half_scales(type);
    return std::any_of(scales.begin(), scales.end(),
                       [at](size_t scale) { return at == scale || at == scale + 1; });
}

// Random codes under finite scales (some zero, negative or denormal).
std::vector<uint8_t> random_matrix(TensorType type, uint32_t rows, uint32_t cols, Random& random) {
    std::vector<uint8_t> bytes(rows * row_bytes(type, cols));
    if (is_float(type)) {
        const size_t size = type == TensorType::f32 ? 4 : 2;
        for (size_t i = 0; i < bytes.size(); i += size) {
            const float value = random.below(8) ? random.uniform() : random.uniform() * 0x1p-15f;
            const uint32_t bits = to_bits(value);
            const uint16_t half = float_to_half(value);
            if (type == TensorType::f16) std::memcpy(&bytes[i], &half, 2);
            else std::memcpy(&bytes[i], reinterpret_cast<const uint8_t*>(&bits) + (4 - size), size);
        }
        return bytes;
    }
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.bits());
    const size_t block = type_info(type)->block_bytes;
    for (size_t i = 0; i < bytes.size(); i += block) {
        set_other_scale(type, &bytes[i]);
        for (const size_t at : half_scales(type)) {
            uint8_t& top = bytes[i + at + 1];
            top = static_cast<uint8_t>((top & 0x83) |
                                       (random.below(12) ? 0x20 + 4 * random.below(5) : 0));
        }
    }
    // Extremes of codes and scales in the first row.
    for (size_t i = 0; i < row_bytes(type, cols); i++)
        if (!in_scale(type, i % block)) bytes[i] = i / block % 2 ? 0xff : 0x80;
    return bytes;
}

PackedMatrix pack(TensorType type, uint32_t rows, uint32_t cols, const std::vector<uint8_t>& source,
                  Buffer& buffer) {
    PackedMatrix matrix{type, rows, cols, nullptr};
    buffer = *Buffer::allocate(matrix.tiles() * packed_tile_bytes(type, cols), "test");
    std::memset(buffer.data(), 0xaa, buffer.size());  // packing must not rely on zeros
    const uint32_t split = matrix.tiles() / 2;        // and may go in pieces
    const size_t tile = packed_tile_bytes(type, cols);
    const auto* bytes = reinterpret_cast<const std::byte*>(source.data());
    pack_tiles(type, rows, cols, bytes, 0, split, buffer.data());
    pack_tiles(type, rows, cols, bytes + split * 16 * row_bytes(type, cols), split, matrix.tiles(),
               buffer.data() + split * tile);
    matrix.data = buffer.data();
    return matrix;
}

// The first `columns` of x (any, n), a group of planes at a time.
std::vector<ActivationBlock> quantized(const Kernels& k, const std::vector<float>& x, size_t n,
                                       uint32_t columns, uint32_t planes) {
    const ActivationLayout layout{columns * planes, n / 32};
    std::vector<ActivationBlock> out(layout.size());
    const uint32_t group = ActivationLayout::kGroup / planes;
    for (uint32_t c = 0; c < columns; c += group)
        k.quantize({&x[c * n], n, std::min(group, columns - c), planes, n, layout.step(),
                    &out[layout.at(c * planes)]});
    return out;
}

std::vector<uint32_t> column_counts(TensorType type) {
    return is_float(type) ? std::vector<uint32_t>{24, 96}
           : row_bytes(type, 64) == 0 || type_info(type)->block_size == 256
               ? std::vector<uint32_t>{256, 1536}
           : type_info(type)->block_size == 64 ? std::vector<uint32_t>{64, 576, 896}
                                               : std::vector<uint32_t>{32, 64, 576, 896};
}

}  // namespace

TEST_CASE("kernels: fma is rounded once") {
    Random random{1};
    const float hard[] = {0.0f,
                          -0.0f,
                          1.0f,
                          -1.0f,
                          0x1p-149f,
                          -0x1p-149f,
                          0x1p-126f,
                          0x1.fffffep-127f,
                          0x1.fffffep127f,
                          -0x1.fffffep127f,
                          0x1.000002p0f,
                          0x1.fffffep-1f,
                          0x1p-75f,
                          0x1.8p-75f,
                          0x1p24f,
                          0x1.000002p24f,
                          0x1p-24f,
                          -0x1p-25f,
                          0x1.000001p-25f,
                          std::numeric_limits<float>::infinity()};
    for (float a : hard)
        for (float b : hard)
            for (float c : hard) {
                const float expected = std::fmaf(a, b, c), got = exact_fma(a, b, c);
                CHECK((to_bits(expected) == to_bits(got) || (expected != expected && got != got)));
            }
    int wrong = 0;
    for (int i = 0; i < 300000; i++) {
        float a = from_bits(random.bits()), b = from_bits(random.bits()),
              c = from_bits(random.bits());
        if (i % 4 == 1) c = -a * b * (1 + random.uniform() * 0x1p-20f);  // cancellation
        if (i % 4 == 2)
            a = random.uniform() * 0x1p-70f, b = random.uniform() * 0x1p-70f,
            c = random.uniform() * 0x1p-130f;
        if (i % 4 == 3) {  // near the middle of two floats
            a = from_bits(0x3f800000u | (random.bits() & 0x7ff000u));
            b = from_bits(0x3f800000u | (random.bits() & 0xfffu));
            c = random.uniform() * 0x1p-50f;
        }
        const float expected = std::fmaf(a, b, c), got = exact_fma(a, b, c);
        wrong += to_bits(expected) != to_bits(got) && (expected == expected || got == got);
    }
    CHECK(wrong == 0);
}

TEST_CASE("kernels: half conversions, all 65,536 and every midpoint") {
    int wrong = 0;
    for (uint32_t h = 0; h < 0x10000; h++) {
        const float value = half_to_float(static_cast<uint16_t>(h));
        const uint8_t bytes[2] = {static_cast<uint8_t>(h), static_cast<uint8_t>(h >> 8)};
        if ((h & 0x7c00) == 0x7c00) {
            wrong += (h & 0x3ff) ? value == value : value != (h & 0x8000 ? -INFINITY : INFINITY);
            wrong += (h & 0x3ff) ? (float_to_half(value) & 0x7e00) != 0x7e00
                                 : float_to_half(value) != h;
            continue;
        }
        wrong += to_bits(value) != to_bits(half_at(bytes)) || float_to_half(value) != h;
        const double next = (h & 0x7fff) == 0x7bff
                                ? std::copysign(65536.0, value)
                                : double(half_to_float(static_cast<uint16_t>(h + 1)));
        const float middle = static_cast<float>((value + next) / 2);
        const float away = std::copysign(INFINITY, value), zero = std::copysign(0.0f, value);
        wrong += float_to_half(middle) != h + (h & 1);
        wrong += float_to_half(std::nextafter(middle, zero)) != h;
        wrong += float_to_half(std::nextafter(middle, away)) != h + 1;
    }
    CHECK(wrong == 0);
    CHECK(float_to_half(1e30f) == 0x7c00);
    CHECK(float_to_half(-0x1p-149f) == 0x8000);
}

TEST_CASE("kernels: exp") {
    CHECK(exact_exp(0.0f) == 1.0f);
    CHECK(exact_exp(-0.0f) == 1.0f);
    CHECK(exact_exp(-87.5f) == 0.0f);
    CHECK(exact_exp(-INFINITY) == 0.0f);
    CHECK(exact_exp(INFINITY) == exact_exp(88.0f));
    CHECK(exact_exp(NAN) != exact_exp(NAN));
    CHECK(exact_exp(-87.0f) > 0x1p-126f);
    double worst = 0;
    for (double x = -87; x <= 88; x += 0.000913) {
        const float rounded = static_cast<float>(x);
        const double expected = std::exp(double(rounded));
        worst = std::max(worst, std::fabs(exact_exp(rounded) / expected - 1));
    }
    MESSAGE("exp, largest relative error " << worst);
    CHECK(worst < 1.2e-7);
}

TEST_CASE("kernels: double functions") {
    double worst = 0;
    for (double x = -40; x < 40; x += 0.0137)
        worst = std::max(worst, std::fabs(exact_exp2(x) / std::exp2(x) - 1));
    CHECK(worst < 1e-15);
    CHECK(exact_exp2(-1022) == 0x1p-1022);
    CHECK(exact_exp2(-1023) == 0);
    CHECK(exact_exp2(1023) == std::numeric_limits<double>::infinity());
    worst = 0;
    for (double x = 1e-300; x < 1e300; x *= 1.37) {
        worst = std::max(worst, std::fabs(exact_log2(x) / std::log2(x) - 1));
        worst = std::max(worst, std::fabs(exact_log(x) / std::log(x) - 1));
    }
    CHECK(worst < 1e-15);
    CHECK(exact_log2(1.0) == 0);
    CHECK(exact_log2(8.0) == 3);
    CHECK(exact_log2(0x1p-1074) == -1074);
    CHECK(exact_log2(0) == -std::numeric_limits<double>::infinity());
    CHECK(exact_log2(-1) != exact_log2(-1));
    worst = 0;
    Random random{2};
    for (int i = 0; i < 100000; i++) {
        const double x = i < 1000 ? i * 0x1.921fb54442d18p-1
                                  : random.uniform() * std::exp2(random.below(21));
        double s, c;
        exact_sincos(x, &s, &c);
        worst = std::max({worst, std::fabs(s - std::sin(x)), std::fabs(c - std::cos(x))});
    }
    MESSAGE("sin and cos, largest error " << worst);
    CHECK(worst < 1e-15);
}

TEST_CASE("kernels: quantize follows the words") {
    Random random{3};
    for (int round = 0; round < 200; round++) {
        std::vector<float> x = random.values(32, round % 2 == 0);
        if (round == 1) x.assign(32, 0.0f);
        if (round == 2) x.assign(32, 0x1p-101f);
        if (round == 3) x.assign(32, 0x1p-100f);
        if (round == 4) x[7] = std::numeric_limits<float>::max();
        if (round == 5)
            for (int i = 0; i < 32; i++)
                x[static_cast<size_t>(i)] = static_cast<float>(i - 16) + 0.5f;  // ties
        ActivationBlock planes[2];
        scalar().quantize({x.data(), 32, 1, 2, 32, 2, planes});
        float amax = 0;
        for (float v : x) amax = std::max(amax, std::fabs(v));
        const bool zero = amax < 0x1p-100f;
        float d = zero ? 0.0f : amax / 127.0f, inverse = zero ? 0.0f : 127.0f / amax;
        std::vector<float> rest = x;
        for (const ActivationBlock& plane : planes) {
            CHECK(to_bits(plane.d) == to_bits(d));
            int sums[2] = {};
            for (size_t i = 0; i < 32; i++) {
                const double nearest = std::nearbyint(double(rest[i]) * double(inverse));
                const int h = static_cast<int>(std::fmin(127, std::fmax(-127, nearest)));
                REQUIRE(plane.q[i] == h);
                sums[i / 16] += h;
                rest[i] = std::fmaf(-d, static_cast<float>(h), rest[i]);
            }
            CHECK(plane.sum[0] == sums[0]);
            CHECK(plane.sum[1] == sums[1]);
            CHECK(to_bits(plane.s) == to_bits(d * static_cast<float>(sums[0] + sums[1])));
            d = d / 254.0f;
            inverse = inverse * 254.0f;
        }
    }
    std::vector<float> bad(64, 1.0f);
    bad[3] = NAN;
    bad[40] = -INFINITY;
    for (const Kernels* k : available_kernels())
        for (const ActivationBlock& block : quantized(*k, bad, 64, 1, 2)) CHECK(block.d != block.d);
}

TEST_CASE("kernels: packing and embedding rows") {
    Random random{4};
    for (TensorType type : written_types)
        for (uint32_t cols : column_counts(type)) {
            CAPTURE(type_info(type)->name);
            CHECK(packed_tile_bytes(type, cols) % 64 == 0);
            const uint32_t rows = 37;
            const auto source = random_matrix(type, rows, cols, random);
            Buffer buffer;
            const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
            std::vector<float> got(cols);
            for (uint32_t r = 0; r < rows; r++) {
                const uint8_t* row = &source[r * row_bytes(type, cols)];
                dequantize_row(matrix, r, got.data());
                std::vector<float> expected;
                if (is_float(type))
                    for (uint32_t c = 0; c < cols; c++)
                        expected.push_back(read_float(type, row, c));
                else
                    for (const WeightBlock& b : read_row(type, row, cols))
                        for (int i = 0; i < 32; i++) expected.push_back(dequantized(b, i));
                REQUIRE(same(expected, got));
            }
        }
    CHECK_FALSE(kernel_type_supported(TensorType::q1_0));
    CHECK(packed_tile_bytes(TensorType::q1_0, 256) == 0);
    CHECK(packed_tile_bytes(TensorType::q4_0, 64) == 2 * 288);
    CHECK(packed_tile_bytes(TensorType::q4_1, 32) == 320);
    CHECK(packed_tile_bytes(TensorType::q5_0, 64) == 2 * 352);
    CHECK(packed_tile_bytes(TensorType::q8_0, 64) == 2 * 544);
    CHECK(packed_tile_bytes(TensorType::q4_k, 256) == 64 + 8 * 288);
    CHECK(packed_tile_bytes(TensorType::q5_k, 256) == 64 + 8 * 352);
    CHECK(packed_tile_bytes(TensorType::q6_k, 512) == 2 * (32 + 8 * 416));
}

TEST_CASE("kernels: packing and dequantizing for programs that write files") {
    Random random{5};
    for (TensorType type : all_types)
        for (uint32_t cols : column_counts(type)) {
            CAPTURE(type_info(type)->name);
            const uint32_t rows = 37;
            const auto source = random_matrix(type, rows, cols, random);
            const auto file = std::as_bytes(std::span(source));
            Buffer buffer;
            const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
            CHECK(can_compute(type));
            CHECK(packed_bytes(type, rows, cols) == buffer.size());
            std::vector<std::byte> packed(buffer.size(), std::byte{0xaa});
            CHECK(pack_rows(type, cols, file, packed));
            CHECK(std::memcmp(packed.data(), buffer.data(), packed.size()) == 0);
            std::vector<float> values(size_t{rows} * cols), row(cols);
            CHECK(dequantize(type, file, values));
            for (uint32_t r = 0; r < rows; r++) {
                dequantize_row(matrix, r, row.data());
                CHECK(std::memcmp(&values[r * cols], row.data(), cols * sizeof(float)) == 0);
            }
            CHECK_FALSE(pack_rows(type, cols, file.first(file.size() - 1), packed));
            CHECK_FALSE(pack_rows(type, cols, file, std::span(packed).first(packed.size() - 1)));
            CHECK_FALSE(dequantize(type, file.first(file.size() - 1), values));
        }
    CHECK_FALSE(can_compute(TensorType::q1_0));
    CHECK(packed_bytes(TensorType::q1_0, 16, 256) == 0);
    std::vector<std::byte> block(36), out(36);
    std::vector<float> values(256);
    CHECK_FALSE(pack_rows(TensorType::q1_0, 256, block, out));
    CHECK_FALSE(dequantize(TensorType::q1_0, block, values));
    CHECK(kv_bytes_per_token(KvType::f16, 3, 64) == 2 * 3 * 64 * 2);
    CHECK(kv_bytes_per_token(KvType::q8_0, 3, 64) == 2 * 3 * (64 + 2 * 2));
}

TEST_CASE("kernels: scalar matmul follows the words") {
    Random random{5};
    for (TensorType type : written_types)
        for (uint32_t cols : column_counts(type)) {
            CAPTURE(type_info(type)->name);
            const uint32_t rows = 19, columns = 3;
            const auto source = random_matrix(type, rows, cols, random);
            Buffer buffer;
            const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
            const std::vector<float> x = random.values(columns * cols);
            for (uint32_t planes = 1; planes <= 2; planes++) {
                const auto blocks = is_float(type) ? std::vector<ActivationBlock>{}
                                                   : quantized(scalar(), x, cols, columns, planes);
                std::vector<float> y(columns * rows), expected(columns * rows);
                scalar().matmul({&matrix, 0, 2, columns, planes, blocks.data(), x.data(), cols,
                                 y.data(), rows});
                for (uint32_t r = 0; r < rows; r++) {
                    const uint8_t* row = &source[r * row_bytes(type, cols)];
                    const auto weights = is_float(type) ? std::vector<WeightBlock>{}
                                                        : read_row(type, row, cols);
                    for (uint32_t c = 0; c < columns; c++) {
                        float total = 0;
                        if (is_float(type)) {
                            for (uint32_t i = 0; i < cols; i++)
                                total = std::fmaf(read_float(type, row, i), x[c * cols + i], total);
                            expected[c * rows + r] = total;
                            continue;
                        }
                        for (uint32_t plane = 0; plane < planes; plane++) {
                            float acc = 0;
                            for (size_t b = 0; b < weights.size(); b++) {
                                const WeightBlock& w = weights[b];
                                const ActivationBlock& a =  // few planes: one group
                                    blocks[b * columns * planes + c * planes + plane];
                                int64_t sum = 0;
                                for (int i = 0; i < 32; i++)
                                    sum += int64_t{w.sc[i / 16]} * w.w[i] * a.q[i];
                                acc = std::fmaf(static_cast<float>(sum), w.dw * a.d, acc);
                                if (w.two_minimums)
                                    acc = std::fmaf(
                                        static_cast<float>(w.mn[0] * a.sum[0] + w.mn[1] * a.sum[1]),
                                        w.m * a.d, acc);
                                else if (w.minimum) acc = std::fmaf(w.m, a.s, acc);
                            }
                            total = plane ? total + acc : acc;
                        }
                        expected[c * rows + r] = total;
                    }
                }
                REQUIRE(same(expected, y));
            }
        }
}

// One shape: every table against the scalar one, some column counts, the tiles in two calls.
static void compare_products(TensorType type, uint32_t rows, uint32_t cols,
                             const std::vector<uint32_t>& column_choices, Random& random) {
    const auto source = random_matrix(type, rows, cols, random);
    Buffer buffer;
    const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
    const uint32_t most = *std::max_element(column_choices.begin(), column_choices.end());
    const std::vector<float> x = random.values(most * cols, rows % 2 == 0);
    const size_t stride = rows + 3;
    for (uint32_t planes = 1; planes <= 2; planes++) {
        const auto blocks_of = [&](uint32_t columns) {
            return is_float(type) ? std::vector<ActivationBlock>{}
                                  : quantized(scalar(), x, cols, columns, planes);
        };
        const auto all = blocks_of(most);
        std::vector<float> expected(most * stride, 7.0f);
        scalar().matmul({&matrix, 0, matrix.tiles(), most, planes, all.data(), x.data(), cols,
                         expected.data(), stride});
        for (uint32_t columns : column_choices) {
            const auto blocks = blocks_of(columns);
            for (const Kernels* k : available_kernels().subspan(1)) {
                const uint32_t split = random.below(matrix.tiles() + 1);
                std::vector<float> y(most * stride, 7.0f), wanted = expected;
                k->matmul({&matrix, 0, split, columns, planes, blocks.data(), x.data(), cols,
                           y.data(), stride});
                k->matmul({&matrix, split, matrix.tiles(), columns, planes, blocks.data(), x.data(),
                           cols, y.data(), stride});
                std::fill(wanted.begin() + static_cast<ptrdiff_t>(columns * stride), wanted.end(),
                          7.0f);
                CAPTURE(k->name);
                CAPTURE(type_info(type)->name);
                CAPTURE(rows);
                CAPTURE(cols);
                CAPTURE(columns);
                CAPTURE(planes);
                CAPTURE(split);
                REQUIRE(first_difference(wanted.data(), y.data(), y.size()) == y.size());
            }
        }
    }
}

// A seeded sample of the shapes; all of them where the environment has VALAR_TEST_ALL.
TEST_CASE("kernels: every table's matmul is the scalar one") {
    const bool all = !environment("VALAR_TEST_ALL").empty();
    std::vector<uint32_t> every{33, 64, 75, 150};
    for (uint32_t columns = 1; columns <= 17; columns++) every.push_back(columns);
    Random random{6};
    for (TensorType type : all_types) {
        auto lengths = column_counts(type);
        lengths.push_back(type_info(type)->block_size == 256 ? 2048 : 1536);
        for (uint32_t cols : lengths)
            for (uint32_t rows : {1u, 15u, 16u, 17u, 33u, 100u}) {
                if (!all && (random.below(3) || cols > 1024)) continue;
                std::vector<uint32_t> some = every;
                for (int i = 0; !all && i < 15; i++)
                    some.erase(some.begin() + random.below(static_cast<uint32_t>(some.size())));
                compare_products(type, rows, cols, some, random);
            }
    }
    for (TensorType type : all_types)  // what sampling must not leave out: each kernel by itself
        compare_products(type, 49, type_info(type)->block_size == 32 || is_float(type) ? 96 : 256,
                         {1, 2, 4, 6}, random);
}

// A product of each row and column, by a task of its own without anything after it.
static std::vector<float> plain_product(const PackedMatrix& matrix, const std::vector<float>& x,
                                        uint32_t columns, uint32_t planes) {
    const auto blocks = is_float(matrix.type)
                            ? std::vector<ActivationBlock>{}
                            : quantized(scalar(), x, matrix.cols, columns, planes);
    std::vector<float> y(columns * matrix.rows);
    scalar().matmul({&matrix, 0, matrix.tiles(), columns, planes, blocks.data(), x.data(),
                     matrix.cols, y.data(), matrix.rows});
    return y;
}

TEST_CASE("kernels: what follows a product, by every table") {
    Random random{15};
    constexpr TensorType pairs[][2] = {
        {TensorType::q4_0, TensorType::q4_0}, {TensorType::q4_k, TensorType::q6_k},
        {TensorType::q5_0, TensorType::q8_0}, {TensorType::f16, TensorType::bf16},
        {TensorType::f16, TensorType::q4_0},  {TensorType::q8_0, TensorType::f32},
        {TensorType::f32, TensorType::f32}};
    for (const auto& types : pairs)
        for (uint32_t rows : {96u, 80u, 17u})
            for (uint32_t columns : {1u, 2u, 3u, 6u, 7u, 9u, 40u, 77u})
                for (uint32_t planes = 1; planes <= 2; planes++) {
                    const uint32_t cols = 256;
                    const auto gate_bytes = random_matrix(types[0], rows, cols, random),
                               up_bytes = random_matrix(types[1], rows, cols, random);
                    Buffer gate_buffer, up_buffer;
                    const PackedMatrix gate = pack(types[0], rows, cols, gate_bytes, gate_buffer),
                                       up = pack(types[1], rows, cols, up_bytes, up_buffer);
                    const auto x = random.values(columns * cols),
                               old = random.values(columns * rows);
                    const auto a = plain_product(gate, x, columns, planes),
                               b = plain_product(up, x, columns, planes);
                    std::vector<float> sum(old), h(a);
                    for (size_t i = 0; i < a.size(); i++) {
                        sum[i] = old[i] + a[i];
                        h[i] = a[i] / (1.0f + exact_exp(-a[i])) * b[i];
                    }
                    const auto blocks = quantized(scalar(), x, cols, columns, planes);
                    const MatmulTask plain{&gate,         0,        gate.tiles(), columns, planes,
                                           blocks.data(), x.data(), cols,         nullptr, rows};
                    for (const Kernels* k : available_kernels()) {
                        CAPTURE(k->name);
                        CAPTURE(type_info(types[0])->name);
                        CAPTURE(rows);
                        CAPTURE(columns);
                        CAPTURE(planes);
                        const uint32_t split = random.below(gate.tiles() / 2 + 1) * 2;
                        const auto run = [&](MatmulTask task) {
                            task.last_tile = split;
                            k->matmul(task);
                            task.first_tile = split;
                            task.last_tile = gate.tiles();
                            k->matmul(task);
                        };
                        std::vector<float> y(old);
                        MatmulTask task = plain;
                        task.y = y.data();
                        task.add = true;
                        task.ahead = 0;
                        run(task);
                        CHECK(same(sum, y));
                        task.ahead = 64;
                        task.add = false;
                        task.up = &up;
                        run(task);
                        CHECK(same(h, y));
                        if (rows % 32 != 0) continue;
                        const auto expected = quantized(scalar(), h, rows, columns, planes);
                        std::vector<ActivationBlock> got(expected.size());
                        task.y = nullptr;
                        task.out = got.data();
                        task.out_blocks = rows / 32;
                        run(task);
                        CHECK(std::memcmp(expected.data(), got.data(),
                                          got.size() * sizeof got[0]) == 0);
                    }
                }
}

TEST_CASE("kernels: the largest codes and activations do not saturate") {
    Random random{14};
    const uint32_t rows = 33, cols = 256, columns = 7;
    std::vector<float> x(columns * cols);
    for (size_t i = 0; i < x.size(); i++)  // all 127, all -127, and signs that change in step
        x[i] = i / cols == 0 || (i / cols > 1 && i >> (i / cols - 2) & 1) ? 1.0f : -1.0f;
    const auto blocks = quantized(scalar(), x, cols, columns, 2);
    for (TensorType type : all_types) {
        if (is_float(type)) continue;
        const size_t block = type_info(type)->block_bytes;
        for (int code : {0x00, 0x7f, 0x80, 0x81, 0xff}) {
            auto source = random_matrix(type, rows, cols, random);
            for (size_t i = 0; i < source.size(); i++)  // all but the binary16 scales
                if (!in_scale(type, i % block)) source[i] = static_cast<uint8_t>(code);
            Buffer buffer;
            const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
            std::vector<float> expected(columns * rows), y(columns * rows);
            scalar().matmul(
                {&matrix, 0, 3, columns, 2, blocks.data(), nullptr, 0, expected.data(), rows});
            for (const Kernels* k : available_kernels().subspan(1)) {
                k->matmul({&matrix, 0, 3, columns, 2, blocks.data(), nullptr, 0, y.data(), rows});
                CAPTURE(k->name);
                CAPTURE(type_info(type)->name);
                CAPTURE(code);
                CHECK(same(expected, y));
            }
        }
    }
}

TEST_CASE("kernels: many columns, long rows, extreme codes") {
    Random random{7};
    for (TensorType type : all_types) {
        if (is_float(type)) continue;
        const uint32_t rows = 16, cols = 1536,
                       columns = 70;  // beyond one pass of columns and blocks
        const auto source = random_matrix(type, rows, cols, random);
        Buffer buffer;
        const PackedMatrix matrix = pack(type, rows, cols, source, buffer);
        std::vector<float> x = random.values(columns * cols);
        for (size_t i = 0; i < cols; i++)
            x[i] = 1.0f, x[cols + i] = -1.0f;  // all 127, all -127: saturation
        const auto blocks = quantized(scalar(), x, cols, columns, 2);
        std::vector<float> expected(columns * rows), y(columns * rows);
        scalar().matmul(
            {&matrix, 0, 1, columns, 2, blocks.data(), nullptr, 0, expected.data(), rows});
        for (const Kernels* k : available_kernels().subspan(1)) {
            k->matmul({&matrix, 0, 1, columns, 2, blocks.data(), nullptr, 0, y.data(), rows});
            CAPTURE(k->name);
            CAPTURE(type_info(type)->name);
            CHECK(same(expected, y));
        }
    }
}

TEST_CASE("kernels: vectors") {
    Random random{8};
    for (size_t n = 1; n < 80; n++) {
        const auto x = random.values(n, n % 2 == 0), w = random.values(n);
        float lanes[16] = {};
        for (size_t i = 0; i < n; i++) lanes[i % 16] = std::fmaf(x[i], x[i], lanes[i % 16]);
        float eight[8], four[4];
        for (int j = 0; j < 8; j++) eight[j] = lanes[j] + lanes[j + 8];
        for (int j = 0; j < 4; j++) four[j] = eight[j] + eight[j + 4];
        const float sum = (four[0] + four[2]) + (four[1] + four[3]);
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + 1e-6f);
        std::vector<float> norm(n), silu(n), scaled(n), added(n), mixed(n), exped(n);
        for (size_t i = 0; i < n; i++) {
            norm[i] = (x[i] * scale) * w[i];
            silu[i] = x[i] / (1.0f + exact_exp(-x[i])) * w[i];
            scaled[i] = x[i] * 0.3f;
            added[i] = x[i] + w[i];
            mixed[i] = std::fmaf(0.3f, w[i], x[i]);
            exped[i] = exact_exp(x[i]);
        }
        for (const Kernels* k : available_kernels()) {
            CAPTURE(k->name);
            CAPTURE(n);
            std::vector<float> y(n), z = x;
            k->rms_norm(x.data(), w.data(), 1e-6f, n, y.data());
            CHECK(same(norm, y));
            k->rms_norm(z.data(), w.data(), 1e-6f, n, z.data());  // in place
            CHECK(same(norm, z));
            y = x;
            k->silu_mul(y.data(), w.data(), n);
            CHECK(same(silu, y));
            y = x;
            k->scale(y.data(), 0.3f, n);
            CHECK(same(scaled, y));
            y = x;
            k->add(y.data(), w.data(), n);
            CHECK(same(added, y));
            y = x;
            k->add_scaled(y.data(), 0.3f, w.data(), n);
            CHECK(same(mixed, y));
            y = x;
            k->exp(y.data(), n);
            CHECK(same(exped, y));
        }
    }
}

TEST_CASE("kernels: quantize, exp and silu of every table") {
    Random random{9};
    auto x = random.values(13 * 96);
    std::fill(x.begin() + 96, x.begin() + 128, 0.0f);  // zero and not finite beside usual ones
    x[5 * 96 + 40] = NAN;
    x[10 * 96 + 90] = INFINITY;
    for (uint32_t planes = 1; planes <= 2; planes++)
        for (uint32_t columns : {1u, 3u, 4u, 8u, 13u}) {
            const auto expected = quantized(scalar(), x, 96, columns, planes);
            for (const Kernels* k : available_kernels()) {
                const auto got = quantized(*k, x, 96, columns, planes);
                CHECK(std::memcmp(expected.data(), got.data(), got.size() * sizeof got[0]) == 0);
            }
        }
    std::vector<float> gate, up(32768, 1.0f);
    for (uint32_t i = 0; i < 32768; i++)
        gate.push_back(from_bits(i * 0x20000u));  // across all magnitudes
    for (float& g : gate)
        if (!(std::fabs(g) <= 3e38f)) g = 87.0f;
    std::vector<float> expected = gate;
    scalar().silu_mul(expected.data(), up.data(), gate.size());
    for (const Kernels* k : available_kernels()) {
        std::vector<float> y = gate;
        k->silu_mul(y.data(), up.data(), y.size());
        CHECK(same(expected, y));
    }
}

TEST_CASE("kernels: rope") {
    Random random{10};
    for (uint32_t n_rot : {2u, 6u, 16u, 30u, 64u})
        for (bool neox : {false, true}) {
            const uint32_t heads = 3, head_dim = n_rot + 4;
            const auto x = random.values(heads * head_dim), turn = random.values(n_rot, true);
            std::vector<float> expected = x;
            for (uint32_t h = 0; h < heads; h++)
                for (uint32_t i = 0; i < n_rot / 2; i++) {
                    const size_t ia = h * head_dim + (neox ? i : 2 * i),
                                 ib = h * head_dim + (neox ? i + n_rot / 2 : 2 * i + 1);
                    const float a = x[ia], b = x[ib], c = turn[2 * i], s = turn[2 * i + 1];
                    volatile float t = b * s;
                    expected[ia] = std::fmaf(a, c, -t);
                    t = b * c;
                    expected[ib] = std::fmaf(a, s, t);
                }
            for (const Kernels* k : available_kernels()) {
                std::vector<float> y = x;
                k->rope(y.data(), heads, head_dim, n_rot, neox, turn.data());
                CAPTURE(k->name);
                CAPTURE(n_rot);
                CHECK(same(expected, y));
            }
        }
}

namespace {

struct Segment {
    std::vector<std::vector<uint8_t>> keys, values;
    const void *key_groups[16] = {}, *value_groups[16] = {};
    std::vector<float> k, v;  // what was stored, as floats (256, head_dim)
};

Segment make_segment(const Kernels& kernels, KvType type, uint32_t head_dim, uint32_t filled,
                     Random& random) {
    Segment s;
    const size_t bytes = kv_group_bytes(type, head_dim);
    s.keys.assign(16, std::vector<uint8_t>(bytes, 0xff));  // not numbers where nothing was stored
    s.values = s.keys;
    for (uint32_t j = 0; j < filled; j++) {
        const auto k = random.values(head_dim), v = random.values(head_dim);
        kernels.store_kv(type, k.data(), v.data(), head_dim, j % 16, s.keys[j / 16].data(),
                         s.values[j / 16].data());
        s.key_groups[j / 16] = s.keys[j / 16].data();
        s.value_groups[j / 16] = s.values[j / 16].data();
        for (uint32_t e = 0; e < head_dim; e++) {
            s.k.push_back(type == KvType::f16 ? half_to_float(float_to_half(k[e])) : k[e]);
            s.v.push_back(type == KvType::f16 ? half_to_float(float_to_half(v[e])) : v[e]);
        }
    }
    return s;
}

}  // namespace

TEST_CASE("kernels: exponentials, and the activations made of them") {
    Random random{5};
    std::vector<float> x = random.values(301, true), up = random.values(301, true);
    const float edges[] = {0.0f, -0.0f, 88.0f, 89.0f, -87.0f, -87.5f, INFINITY, -INFINITY, 1e-30f};
    std::copy(std::begin(edges), std::end(edges), x.begin() + 100);
    const ActivationSpec spec{0.3f, 0.7f, 0.5f, -1e-6f};
    for (const Kernels* k : available_kernels())
        for (size_t n : {1u, 7u, 64u, 65u, 301u}) {
            CAPTURE(k->name);
            CAPTURE(n);
            std::vector<float> got(x.data(), x.data() + n), want = got;
            k->exp(got.data(), n);
            for (float& value : want) value = exact_exp(value);
            CHECK(same(want, got));
            for (int each = 0; each <= static_cast<int>(Activation::xielu); each++) {
                CAPTURE(each);
                std::vector<float> mine(x.data(), x.data() + n), theirs = mine;
                activate(*k, Activation(each), spec, mine.data(), up.data(), n);
                activate(scalar(), Activation(each), spec, theirs.data(), up.data(), n);
                const auto both_none = [](float a, float b) { return a != a && b != b; };
                for (size_t i = 0; i < n; i++)
                    if (both_none(mine[i], theirs[i])) mine[i] = theirs[i] = 0;
                CHECK(same(theirs, mine));
                if (Activation(each) != Activation::silu) continue;
                theirs.assign(x.data(), x.data() + n);
                k->silu_mul(theirs.data(), up.data(), n);
                for (size_t i = 0; i < n; i++)
                    if (theirs[i] != theirs[i]) theirs[i] = 0;
                CHECK(same(theirs, mine));
            }
        }
}

TEST_CASE("kernels: attention") {
    for (KvType type : {KvType::f16, KvType::f32})
        for (uint32_t head_dim : {4u, 16u, 24u, 64u, 66u, 128u})
            for (uint32_t filled : {1u, 16u, 37u, 255u, 256u}) {
                Random random{head_dim * 1000 + filled};
                Random again = random;
                const Segment s = make_segment(scalar(), type, head_dim, filled, random);
                constexpr uint32_t queries = 11;
                const size_t stride = head_dim + 5;
                const float cap = head_dim == 64 || head_dim == 66 ? 3.0f : 0.0f;
                std::vector<float> q = random.values(queries * stride, true);
                for (float& x : q) x *= 0.5f;
                uint16_t begin[queries], end[queries];
                for (uint32_t i = 0; i < queries; i++) {  // whole, causal, windows, apart, nothing
                    begin[i] = static_cast<uint16_t>(i < 3    ? 0
                                                     : i < 6  ? random.below(filled)
                                                     : i == 6 ? 5
                                                              : filled - 1);
                    end[i] = static_cast<uint16_t>(i == 0  ? filled
                                                   : i < 6 ? begin[i] +
                                                                 random.below(filled - begin[i] + 1)
                                                   : i == 6 ? 5
                                                            : filled);
                }
                std::vector<float> max(queries, 3.0f), sum(queries, 3.0f),
                    out(queries * stride, 3.0f);
                std::vector<float> want_max = max, want_sum = sum, want = out;
                for (uint32_t i = 0; i < queries; i++) {  // the words
                    if (begin[i] == end[i]) continue;
                    std::vector<float> p(256);
                    float m = -INFINITY, lanes[16] = {};
                    for (uint32_t j = begin[i]; j < end[i]; j++) {
                        for (uint32_t e = 0; e < head_dim; e++)
                            p[j] = std::fmaf(q[i * stride + e], s.k[j * head_dim + e], p[j]);
                        const float u = p[j] / 3.0f;
                        if (cap != 0) p[j] = 3.0f * (1.0f - 2.0f / (exact_exp(u + u) + 1.0f));
                        m = std::max(m, p[j]);
                    }
                    if (m == 0) m = 0;
                    for (uint32_t j = begin[i]; j < end[i]; j++)
                        lanes[j % 16] += p[j] = exact_exp(p[j] - m);
                    for (int half = 8; half; half /= 2)
                        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
                    want_max[i] = m;
                    want_sum[i] = lanes[0];
                    for (uint32_t e = 0; e < head_dim; e++) {
                        float o = 0;
                        for (uint32_t j = begin[i]; j < end[i]; j++)
                            o = std::fmaf(p[j], s.v[j * head_dim + e], o);
                        want[i * stride + e] = o;
                    }
                }
                for (const Kernels* k : available_kernels()) {
                    Random same_random = again;
                    const Segment mine = make_segment(*k, type, head_dim, filled, same_random);
                    REQUIRE(mine.keys == s.keys);
                    REQUIRE(mine.values == s.values);
                    std::vector<float> m = max, l = sum, o = out;
                    k->attention({type, head_dim, queries, q.data(), stride, begin, end,
                                  s.key_groups, s.value_groups, m.data(), l.data(), o.data(),
                                  stride, cap});
                    CAPTURE(k->name);
                    CAPTURE(head_dim);
                    CAPTURE(filled);
                    CHECK(same(want_max, m));
                    CHECK(same(want_sum, l));
                    CHECK(same(want, o));
                }
            }
}

TEST_CASE("kernels: keys and values in q8_0") {
    for (const uint32_t head_dim : {32u, 64u, 96u, 256u})
        for (const Kernels* kernels : available_kernels()) {
            CAPTURE(kernels->name);
            CAPTURE(head_dim);
            REQUIRE(kv_group_bytes(KvType::q8_0, head_dim) == 17 * head_dim);
            Random random{head_dim};
            std::vector<uint8_t> keys(17 * head_dim), values = keys;
            std::vector<float> k[16], v[16], wide_keys(16 * head_dim), wide_values = wide_keys;
            for (uint32_t slot = 0; slot < 16; slot++) {
                k[slot] = random.values(head_dim, true);
                v[slot] = random.values(head_dim, true);
                if (slot == 3) std::fill(v[slot].begin(), v[slot].end(), 0.0f);
                if (slot == 5) k[slot][1] = 60000 * 127.0f;
                kernels->store_kv(KvType::q8_0, k[slot].data(), v[slot].data(), head_dim, slot,
                                  keys.data(), values.data());
            }
            kernels->expand_kv(keys.data(), values.data(), head_dim, wide_keys.data(),
                               wide_values.data());
            const auto stored = [](const std::vector<float>& x, size_t e) {  // the words
                ActivationBlock block;
                scalar().quantize({x.data() + e / 32 * 32, 32, 1, 1, 32, 1, &block});
                return half_to_float(float_to_half(block.d)) * static_cast<float>(block.q[e % 32]);
            };
            size_t wrong = 0;
            for (size_t slot = 0; slot < 16; slot++)
                for (size_t e = 0; e < head_dim; e++)
                    wrong += wide_keys[e * 16 + slot] != stored(k[slot], e) ||
                             wide_values[slot * head_dim + e] != stored(v[slot], e);
            CHECK(wrong == 0);
        }
}

TEST_CASE("kernels: attention over groups that nobody holds") {
    Random random{11};
    Segment s = make_segment(scalar(), KvType::f16, 32, 256, random);
    for (int g = 2; g < 14; g++) s.key_groups[g] = s.value_groups[g] = nullptr;
    const auto q = random.values(2 * 32, true);
    const uint16_t begin[2] = {0, 230}, end[2] = {20, 256};
    std::vector<float> expected(2 * 34);
    scalar().attention({KvType::f16, 32, 2, q.data(), 32, begin, end, s.key_groups, s.value_groups,
                        expected.data(), expected.data() + 2, expected.data() + 4, 32});
    for (const Kernels* k : available_kernels()) {
        std::vector<float> got(2 * 34);
        k->attention({KvType::f16, 32, 2, q.data(), 32, begin, end, s.key_groups, s.value_groups,
                      got.data(), got.data() + 2, got.data() + 4, 32});
        CHECK(same(expected, got));
    }
}

TEST_CASE("kernels: merging segments") {
    Random random{12};
    for (size_t n : {1u, 8u, 13u, 64u})
        for (float step : {-100.0f, -1.5f, 0.0f, 0.25f, 200.0f}) {
            const auto o = random.values(n), old = random.values(n);
            const float m = 1.0f + step, most = std::max(1.0f, m), a = exact_exp(1.0f - most),
                        b = exact_exp(m - most);
            std::vector<float> expected(n);
            for (size_t e = 0; e < n; e++) {
                volatile float kept = old[e] * a;
                expected[e] = std::fmaf(o[e], b, kept);
            }
            for (const Kernels* k : available_kernels()) {
                std::vector<float> got = old;
                float max = 1.0f, sum = 2.0f;
                k->attention_merge(&max, &sum, got.data(), m, 3.0f, o.data(), n);
                volatile float kept = 2.0f * a;
                CHECK(max == most);
                CHECK(to_bits(sum) == to_bits(std::fmaf(3.0f, b, kept)));
                CHECK(same(expected, got));
            }
        }
}

// ---- Floating-point state, choice of a table, team --------------------------------------------

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
constexpr uint64_t flush_to_zero = 0x9fc0 | 0x6000;  // FTZ, DAZ, toward zero
constexpr uint64_t happened = 0x3f;                  // what computing leaves there
uint64_t get_state() { return __builtin_ia32_stmxcsr(); }
void set_state(uint64_t state) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(state)); }
#define TEST_FLOAT_STATE 1
#elif defined(__arm__) && defined(__ARM_FP)
constexpr uint64_t flush_to_zero = 1u << 24 | 3u << 22;
constexpr uint64_t happened = 0xf800009f;
uint64_t get_state() {
    uint32_t state;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(state));
    return state;
}
void set_state(uint64_t state) {
    __asm__ volatile("vmsr fpscr, %0" : : "r"(static_cast<uint32_t>(state)));
}
#define TEST_FLOAT_STATE 1
#elif defined(__aarch64__)
constexpr uint64_t flush_to_zero = 1u << 24 | 3u << 22;
constexpr uint64_t happened = 0;
uint64_t get_state() {
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return state;
}
void set_state(uint64_t state) { __asm__ volatile("msr fpcr, %0" : : "r"(state)); }
#define TEST_FLOAT_STATE 1
#endif

}  // namespace

#ifdef TEST_FLOAT_STATE
TEST_CASE("kernels: the caller's flush-to-zero and rounding do not matter") {
    Random random{13};
    const std::vector<float> x = [&] {
        auto values = random.values(64, true);
        for (float& v : values) v *= 0x1p-120f;  // results are denormal
        return values;
    }();
    const std::vector<float> w = random.values(64, true);
    const uint64_t before = get_state();
    for (const Kernels* k : available_kernels()) {
        std::vector<float> expected = x, got = x;
        k->silu_mul(expected.data(), w.data(), 64);
        k->scale(expected.data(), 0x1p-12f, 64);
        set_state(flush_to_zero);
        {
            FloatState state;
            k->silu_mul(got.data(), w.data(), 64);
            k->scale(got.data(), 0x1p-12f, 64);
        }
        const uint64_t after = get_state();
        set_state(before);
        CHECK((after & ~happened) == (flush_to_zero & ~happened));
        CHECK(same(expected, got));
    }
    // A team's jobs: on the caller and on helpers, which start while the state is set.
    struct Job {
        uint64_t found[3];
    } job{};
    set_state(flush_to_zero);
    {
        auto team = Team::create(2);
        (*team)->run([](void* context, uint32_t part,
                        uint32_t) { static_cast<Job*>(context)->found[part] = get_state(); },
                     &job);
    }
    const uint64_t after = get_state();
    set_state(before);
    CHECK((after & ~happened) == (flush_to_zero & ~happened));
    for (uint64_t found : job.found) CHECK((found & ~happened) == (before & ~happened));
}
#endif

TEST_CASE("kernels: choosing a table") {
    const auto tables = available_kernels();
    REQUIRE(tables.size() >= 1);
    CHECK(std::string(tables[0]->name) == "scalar");
    REQUIRE(kernel_names().size() == tables.size());
    for (size_t i = 0; i < tables.size(); ++i)
        CHECK(std::string(kernel_names()[i]) == tables[i]->name);
#if !defined(_WIN32)
    const std::string kept = environment("VALAR_ISA");
    for (const Kernels* table : tables) {
        setenv("VALAR_ISA", table->name, 1);
        const auto chosen = choose_kernels();
        REQUIRE(chosen.ok());
        CHECK(*chosen == table);
        CHECK(std::string(*kernels_in_use()) == table->name);
    }
    setenv("VALAR_ISA", "abacus", 1);
    const auto refused = choose_kernels();
    REQUIRE_FALSE(refused.ok());
    CHECK(refused.error().kind == ErrorKind::unsupported);
    CHECK(kernels_in_use().error().message == refused.error().message);
    CHECK(refused.error().message.find("abacus") != std::string::npos);
    unsetenv("VALAR_ISA");
    CHECK(*choose_kernels() == tables.back());
    if (!kept.empty()) setenv("VALAR_ISA", kept.c_str(), 1);
#endif
}

namespace {
struct Count {
    std::atomic<uint32_t> calls{0};
    uint64_t sums[8] = {};  // one a part, no lock
};
void count_job(void* context, uint32_t part, uint32_t parts) {
    Count& count = *static_cast<Count*>(context);
    count.calls.fetch_add(1, std::memory_order_relaxed);
    count.sums[part] += parts;
}
}  // namespace

TEST_CASE("kernels: the team") {
    for (int helpers : {0, 1, 3}) {
        auto team = Team::create(helpers);
        REQUIRE(team.ok());
        const uint32_t parts = static_cast<uint32_t>(helpers) + 1;
        CHECK((*team)->parts() == parts);
        Count count;
        uint32_t runs = 0;
        for (int round = 0; round < 20; round++) {
            (*team)->begin();
            (*team)->begin();  // harmless
            for (int i = 0; i < 50; i++, runs++) (*team)->run(count_job, &count);
            (*team)->end();
            (*team)->run(count_job, &count);  // also works outside, from sleep
            runs++;
        }
        CHECK(count.calls == runs * parts);
        for (uint32_t part = 0; part < parts; part++)
            CHECK(count.sums[part] == uint64_t{runs} * parts);
        // fewer, then all again
        for (uint32_t round = 0; round < 40; round++) {
            const uint32_t few = 1 + round % parts;
            Count part_of_them;
            (*team)->begin(few);
            for (int i = 0; i < 20; i++) (*team)->run(count_job, &part_of_them);
            (*team)->end();
            CHECK(part_of_them.calls == 20 * few);
            for (uint32_t part = 0; part < parts; part++)
                CHECK(part_of_them.sums[part] == (part < few ? 20 * few : 0));
        }
    }
    struct Host {
        uint32_t jobs = 0;
    } host;
    const auto parallel_for = [](void* context, uint32_t n, void (*job)(void*, uint32_t),
                                 void* argument) {
        for (uint32_t i = n; i-- > 0;) {  // any order
            static_cast<Host*>(context)->jobs++;
            job(argument, i);
        }
    };
    auto team = Team::create(3, {parallel_for, &host});
    Count count;
    (*team)->run(count_job, &count);
    CHECK(host.jobs == 4);
    CHECK(count.calls == 4);
    CHECK_FALSE(Team::create(-1).ok());
}

#pragma once

#include "kernels/products.hpp"
#include "kernels/targets.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if (VALAR_NEON_KERNELS || VALAR_WASM_KERNELS) && !defined(VALAR_NO_INFERENCE)
// ---- Vectors of 128 bits: NEON, WASM SIMD128 -------------------------------------------------
//
// Four rows, or four elements, a vector. What the instruction sets differ in comes first; the
// kernels after it are written once. For integer products an instruction set brings a class
// with Operands<C> (a block of C planes as its instructions want it), multiply (part += products of
// four rows with C planes), dot_tile (dot_blocks, compiled for that instruction set) and Narrow
// (the class for one and two columns).

namespace valar {
inline namespace v1 {
namespace detail {

namespace lanes4 {

// clang-format off
#if VALAR_NEON_KERNELS
using F4 = float32x4_t;
using I4 = int32x4_t;
using B16 = int8x16_t;

VALAR_FORCE_INLINE F4 load(const float* at) { return vld1q_f32(at); }
VALAR_FORCE_INLINE void store(float* at, F4 x) { vst1q_f32(at, x); }
VALAR_FORCE_INLINE F4 splat(float x) { return vdupq_n_f32(x); }
VALAR_FORCE_INLINE F4 add(F4 a, F4 b) { return vaddq_f32(a, b); }
VALAR_FORCE_INLINE F4 sub(F4 a, F4 b) { return vsubq_f32(a, b); }
VALAR_FORCE_INLINE F4 mul(F4 a, F4 b) { return vmulq_f32(a, b); }
VALAR_FORCE_INLINE F4 div(F4 a, F4 b) { return vdivq_f32(a, b); }
VALAR_FORCE_INLINE F4 fma(F4 a, F4 b, F4 c) { return vfmaq_f32(c, a, b); }
VALAR_FORCE_INLINE F4 negate(F4 x) { return vnegq_f32(x); }
VALAR_FORCE_INLINE F4 greater_of(F4 a, F4 b) { return vmaxnmq_f32(a, b); }  // a number, if any
VALAR_FORCE_INLINE F4 at_most(F4 x, F4 limit) { return vminq_f32(x, limit); }  // keeps no-numbers
VALAR_FORCE_INLINE F4 zero_where_less(F4 x, F4 a, F4 b) {  // x, but 0 where a < b
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(a, b)));
}
VALAR_FORCE_INLINE F4 even_lanes(F4 a, F4 b) { return vuzp1q_f32(a, b); }
VALAR_FORCE_INLINE F4 odd_lanes(F4 a, F4 b) { return vuzp2q_f32(a, b); }
VALAR_FORCE_INLINE F4 zip_low(F4 a, F4 b) { return vzip1q_f32(a, b); }
VALAR_FORCE_INLINE F4 zip_high(F4 a, F4 b) { return vzip2q_f32(a, b); }

VALAR_FORCE_INLINE I4 int_splat(int32_t x) { return vdupq_n_s32(x); }
VALAR_FORCE_INLINE I4 int_add(I4 a, I4 b) { return vaddq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_mul(I4 a, I4 b) { return vmulq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_min(I4 a, I4 b) { return vminq_s32(a, b); }
VALAR_FORCE_INLINE I4 int_max(I4 a, I4 b) { return vmaxq_s32(a, b); }
VALAR_FORCE_INLINE F4 to_float(I4 x) { return vcvtq_f32_s32(x); }
VALAR_FORCE_INLINE I4 magnitude_bits(F4 x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
VALAR_FORCE_INLINE F4 power_of_two(I4 k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
}
// Nearest integers of exact products below 2^22.
VALAR_FORCE_INLINE I4 nearest_product(F4 a, F4 b) {
    const F4 magic = vdupq_n_f32(0x1.8p23f);
    return vsubq_s32(vreinterpretq_s32_f32(vfmaq_f32(magic, a, b)), vreinterpretq_s32_f32(magic));
}
VALAR_FORCE_INLINE F4 load_halves(const void* at) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(at))));
}
VALAR_FORCE_INLINE void store_halves(uint16_t* at, F4 x) {
    vst1_u16(at, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
VALAR_FORCE_INLINE F4 load_bfloats(const void* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(at)), 16));
}
VALAR_FORCE_INLINE I4 load_signed_bytes(const void* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

VALAR_FORCE_INLINE B16 load_bytes(const void* at) {
    return vld1q_s8(static_cast<const int8_t*>(at));
}
VALAR_FORCE_INLINE void store_bytes(void* at, B16 x) { vst1q_s8(static_cast<int8_t*>(at), x); }
VALAR_FORCE_INLINE B16 byte_splat(int x) { return vdupq_n_s8(static_cast<int8_t>(x)); }
VALAR_FORCE_INLINE B16 byte_sub(B16 a, B16 b) { return vsubq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_and(B16 a, B16 b) { return vandq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_or(B16 a, B16 b) { return vorrq_s8(a, b); }
VALAR_FORCE_INLINE B16 bit_xor(B16 a, B16 b) { return veorq_s8(a, b); }
template <int kShift>  // to the left, or right where negative, without sign
VALAR_FORCE_INLINE B16 byte_shift(B16 x) {
    const uint8x16_t bits = vreinterpretq_u8_s8(x);
    if constexpr (kShift > 0) return vreinterpretq_s8_u8(vshlq_n_u8(bits, kShift));
    else if constexpr (kShift < 0) return vreinterpretq_s8_u8(vshrq_n_u8(bits, -kShift));
    else return x;
}
VALAR_FORCE_INLINE B16 look_up(B16 values, B16 codes) {
    return vqtbl1q_s8(values, vreinterpretq_u8_s8(codes));
}
#endif  // VALAR_NEON_KERNELS

#if VALAR_WASM_KERNELS
using F4 = v128_t;
using I4 = v128_t;
using B16 = v128_t;

VALAR_FORCE_INLINE F4 load(const float* at) { return wasm_v128_load(at); }
VALAR_FORCE_INLINE void store(float* at, F4 x) { wasm_v128_store(at, x); }
VALAR_FORCE_INLINE F4 splat(float x) { return wasm_f32x4_splat(x); }
VALAR_FORCE_INLINE F4 add(F4 a, F4 b) { return wasm_f32x4_add(a, b); }
VALAR_FORCE_INLINE F4 sub(F4 a, F4 b) { return wasm_f32x4_sub(a, b); }
VALAR_FORCE_INLINE F4 mul(F4 a, F4 b) { return wasm_f32x4_mul(a, b); }
VALAR_FORCE_INLINE F4 div(F4 a, F4 b) { return wasm_f32x4_div(a, b); }
VALAR_FORCE_INLINE F4 negate(F4 x) { return wasm_f32x4_neg(x); }
VALAR_FORCE_INLINE F4 greater_of(F4 a, F4 b) { return wasm_f32x4_pmax(a, b); }
VALAR_FORCE_INLINE F4 at_most(F4 x, F4 limit) { return wasm_f32x4_pmin(x, limit); }
VALAR_FORCE_INLINE F4 zero_where_less(F4 x, F4 a, F4 b) {
    return wasm_v128_andnot(x, wasm_f32x4_lt(a, b));
}
VALAR_FORCE_INLINE F4 even_lanes(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 0, 2, 4, 6); }
VALAR_FORCE_INLINE F4 odd_lanes(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 1, 3, 5, 7); }
VALAR_FORCE_INLINE F4 zip_low(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 0, 4, 1, 5); }
VALAR_FORCE_INLINE F4 zip_high(F4 a, F4 b) { return wasm_i32x4_shuffle(a, b, 2, 6, 3, 7); }

VALAR_FORCE_INLINE v128_t low_doubles(F4 x) { return wasm_f64x2_promote_low_f32x4(x); }
VALAR_FORCE_INLINE v128_t high_doubles(F4 x) {
    return wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(x, x, 2, 3, 2, 3));
}
inline __attribute__((noinline)) F4 fma_by_lane(F4 a, F4 b, F4 c) {
    float x[4], y[4], z[4];
    store(x, a);
    store(y, b);
    store(z, c);
    for (int i = 0; i < 4; i++) z[i] = emulated_fma(x[i], y[i], z[i]);
    return load(z);
}
// There is no fma. Products are exact in double, and a sum rounded to double rounds to the same
// float as the exact one does, unless it lies midway between two floats or where floats are
// denormal.
VALAR_FORCE_INLINE v128_t rounds_twice(v128_t sum) {
    const v128_t middle = wasm_i64x2_eq(wasm_v128_and(sum, wasm_i64x2_splat(0x1fffffff)),
                                        wasm_i64x2_splat(0x10000000));
    const v128_t tiny = wasm_f64x2_lt(wasm_f64x2_abs(sum), wasm_f64x2_splat(0x1p-126));
    return wasm_v128_or(middle, wasm_v128_and(tiny, wasm_f64x2_ne(sum, wasm_f64x2_splat(0))));
}
VALAR_FORCE_INLINE F4 fma(F4 a, F4 b, F4 c) {
    const v128_t low =
        wasm_f64x2_add(wasm_f64x2_mul(low_doubles(a), low_doubles(b)), low_doubles(c));
    const v128_t high =
        wasm_f64x2_add(wasm_f64x2_mul(high_doubles(a), high_doubles(b)), high_doubles(c));
    if (wasm_v128_any_true(wasm_v128_or(rounds_twice(low), rounds_twice(high))))
        return fma_by_lane(a, b, c);
    return wasm_i32x4_shuffle(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high),
                              0, 1, 4, 5);
}

VALAR_FORCE_INLINE I4 int_splat(int32_t x) { return wasm_i32x4_splat(x); }
VALAR_FORCE_INLINE I4 int_add(I4 a, I4 b) { return wasm_i32x4_add(a, b); }
VALAR_FORCE_INLINE I4 int_mul(I4 a, I4 b) { return wasm_i32x4_mul(a, b); }
VALAR_FORCE_INLINE I4 int_min(I4 a, I4 b) { return wasm_i32x4_min(a, b); }
VALAR_FORCE_INLINE I4 int_max(I4 a, I4 b) { return wasm_i32x4_max(a, b); }
VALAR_FORCE_INLINE F4 to_float(I4 x) { return wasm_f32x4_convert_i32x4(x); }
VALAR_FORCE_INLINE I4 magnitude_bits(F4 x) { return wasm_f32x4_abs(x); }
VALAR_FORCE_INLINE F4 power_of_two(I4 k) {
    return wasm_i32x4_shl(wasm_i32x4_add(k, wasm_i32x4_splat(127)), 23);
}
VALAR_FORCE_INLINE I4 nearest_product(F4 a, F4 b) {
    const v128_t magic = wasm_f64x2_splat(0x1.8p52);
    return wasm_i32x4_shuffle(
        wasm_f64x2_add(wasm_f64x2_mul(low_doubles(a), low_doubles(b)), magic),
        wasm_f64x2_add(wasm_f64x2_mul(high_doubles(a), high_doubles(b)), magic), 0, 2, 4, 6);
}
VALAR_FORCE_INLINE F4 load_halves(const void* at) {
    const v128_t half = wasm_u32x4_load16x4(at);
    const v128_t size = wasm_v128_and(half, wasm_i32x4_splat(0x7fff));
    const v128_t sign = wasm_i32x4_shl(wasm_v128_xor(half, size), 16);
    const v128_t value = wasm_f32x4_mul(wasm_i32x4_shl(size, 13), wasm_f32x4_splat(0x1p112f));
    const v128_t large = wasm_v128_and(wasm_i32x4_gt(size, wasm_i32x4_splat(0x7bff)),
                                       wasm_i32x4_splat(0x7f800000));
    return wasm_v128_or(wasm_v128_or(value, large), sign);
}
VALAR_FORCE_INLINE void store_halves(uint16_t* at, F4 x) {
    float lanes[4];
    store(lanes, x);
    for (int i = 0; i < 4; i++) at[i] = half_bits(lanes[i]);
}
VALAR_FORCE_INLINE F4 load_bfloats(const void* at) {
    return wasm_i32x4_shl(wasm_u32x4_load16x4(at), 16);
}
VALAR_FORCE_INLINE I4 load_signed_bytes(const void* at) {
    return wasm_i32x4_extend_low_i16x8(wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(at)));
}

VALAR_FORCE_INLINE B16 load_bytes(const void* at) { return wasm_v128_load(at); }
VALAR_FORCE_INLINE void store_bytes(void* at, B16 x) { wasm_v128_store(at, x); }
VALAR_FORCE_INLINE B16 byte_splat(int x) { return wasm_i8x16_splat(static_cast<int8_t>(x)); }
VALAR_FORCE_INLINE B16 byte_sub(B16 a, B16 b) { return wasm_i8x16_sub(a, b); }
VALAR_FORCE_INLINE B16 bit_and(B16 a, B16 b) { return wasm_v128_and(a, b); }
VALAR_FORCE_INLINE B16 bit_or(B16 a, B16 b) { return wasm_v128_or(a, b); }
VALAR_FORCE_INLINE B16 bit_xor(B16 a, B16 b) { return wasm_v128_xor(a, b); }
template <int kShift>
VALAR_FORCE_INLINE B16 byte_shift(B16 x) {
    if constexpr (kShift > 0) return wasm_i8x16_shl(x, kShift);
    else if constexpr (kShift < 0) return wasm_u8x16_shr(x, -kShift);
    else return x;
}
VALAR_FORCE_INLINE B16 look_up(B16 values, B16 codes) {
    return wasm_i8x16_swizzle(values, codes);
}
#endif  // VALAR_WASM_KERNELS
// clang-format on

// Scales of four rows (definition, 2).
struct Scales {
    F4 dw, m;
    I4 sub[2], low[2];  // of the halves of a block
};

template <Scale kFormat>
VALAR_FORCE_INLINE F4 load_scale(const std::byte* scales, size_t v) {
    if constexpr (kFormat == Scale::half) return load_halves(scales + 8 * v);
    else if constexpr (kFormat == Scale::bfloat) return load_bfloats(scales + 8 * v);
    else return load(reinterpret_cast<const float*>(scales) + 4 * v);
}

template <class T>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* header, const std::byte* at, size_t v) {
    constexpr PackedLayout L = T::layout;
    const std::byte* scales = L.sub_scales ? header : at;
    Scales out{};
    out.dw = load_scale<L.scale>(scales, v);
    if constexpr (L.second_scale()) out.m = load_scale<L.scale>(scales + 16 * L.scale_width(), v);
    if constexpr (L.sub_scales == 2) {  // minimums have a few bits: signed or not
        for (size_t i = 0; i < 2; i++) out.sub[i] = load_signed_bytes(at + 16 * i + 4 * v);
        for (size_t i = 0; L.minimum && i < 2; i++)
            out.low[i] = load_signed_bytes(at + 32 + 16 * i + 4 * v);
    } else if constexpr (L.sub_scales == 1) {  // six bits: signed or not
        out.dw = mul(out.dw, to_float(load_signed_bytes(at + 4 * v)));
        out.m = mul(out.m, to_float(load_signed_bytes(at + 16 + 4 * v)));
    }
    if constexpr (L.sub_scales != 0 && L.minimum) out.m = negate(out.m);
    return out;
}

// Where codes lie, and the values that they stand for where the type has a table of them.
struct Codes {
    const std::byte* at;
    B16 values;
};

// Codes of quad G of four rows as signed bytes; those of 8 bits without their bias.
template <class T, int G>
VALAR_FORCE_INLINE B16 load_codes4(const Codes& codes) {
    constexpr int bits = T::layout.bits, high = bits - 4;
    if constexpr (bits == 8) return bit_xor(load_bytes(codes.at + 64 * G), byte_splat(-128));
    else if constexpr (bits == 2)
        return bit_and(byte_shift<-(G % 4) * 2>(load_bytes(codes.at + G / 4 * 64)), byte_splat(3));
    else if constexpr (bits == 3) {
        const B16 low = bit_and(byte_shift<-(G % 4) * 2>(load_bytes(codes.at + G / 4 * 64)),
                                byte_splat(3)),
                  third = bit_and(byte_shift<2 - G>(load_bytes(codes.at + 128)), byte_splat(4));
        return look_up(codes.values, bit_or(low, third));
    } else {
        const B16 pair = load_bytes(codes.at + G / 2 * 64);
        const B16 low = G % 2 ? byte_shift<-4>(pair) : bit_and(pair, byte_splat(15));
        if constexpr (T::layout.coded) return look_up(codes.values, low);
        else if constexpr (high == 0) return low;
        else {
            const B16 rest = byte_shift<4 - G * high % 8>(
                load_bytes(codes.at + 256 + G * high / 8 * 64));
            return bit_or(low, bit_and(rest, byte_splat(high == 1 ? 16 : 48)));
        }
    }
}

// What is taken from a signed byte of load_codes4.
template <class T>
inline constexpr int signed_bias = T::layout.byte_bits() == 8 ? 0 : T::layout.bias;

// A tile whose blocks were unpacked for many columns: 512 weights (bias taken out), a byte each in
// the order of 8-bit codes; 16 dw; 16 m; 16 + 16 sub-scales, as many of the minimum, as integers.
inline constexpr size_t kPanelBytes = 896;
inline constexpr size_t kPanelBlocks = 24;

template <class T, int G = 0>
VALAR_FORCE_INLINE void fill_codes(const Codes& codes, std::byte* panel) {
    store_bytes(panel + 64 * G, byte_sub(load_codes4<T, G>(codes), byte_splat(signed_bias<T>)));
    if constexpr (G < 7) fill_codes<T, G + 1>(codes, panel);
}

VALAR_FORCE_INLINE B16 load_table(const int8_t* values) {
    return values ? load_bytes(values) : byte_splat(0);
}

template <class T>
void fill_panel(const std::byte* tile, const int8_t* values, size_t blocks, std::byte* panel) {
    constexpr PackedLayout L = T::layout;
    const B16 table = load_table(values);
    const std::byte *header = tile, *at = tile;
    for (size_t b = 0; b < blocks; b++, at += L.block_bytes(), panel += kPanelBytes) {
        if (b % L.blocks == 0) {
            header = at;
            at += L.header_bytes();
        }
        for (size_t v = 0; v < 4; v++) {
            fill_codes<T>({at + L.scale_bytes() + 16 * v, table}, panel + 16 * v);
            const Scales s = load_scales<T>(header, at, v);
            store(reinterpret_cast<float*>(panel + 512 + 16 * v), s.dw);
            if constexpr (L.second_scale())
                store(reinterpret_cast<float*>(panel + 576 + 16 * v), s.m);
            for (size_t i = 0; L.sub_scales == 2 && i < 2; i++) {
                std::memcpy(panel + 640 + 64 * i + 16 * v, &s.sub[i], 16);
                if constexpr (L.minimum) std::memcpy(panel + 768 + 64 * i + 16 * v, &s.low[i], 16);
            }
        }
    }
}

template <class T>
VALAR_FORCE_INLINE Scales panel_scales(const std::byte* at, size_t v) {
    constexpr PackedLayout L = T::layout;
    Scales out{};
    out.dw = load(reinterpret_cast<const float*>(at + 512 + 16 * v));
    if constexpr (L.second_scale()) out.m = load(reinterpret_cast<const float*>(at + 576 + 16 * v));
    for (size_t i = 0; L.sub_scales == 2 && i < 2; i++) {
        std::memcpy(&out.sub[i], at + 640 + 64 * i + 16 * v, 16);
        if constexpr (L.minimum) std::memcpy(&out.low[i], at + 768 + 64 * i + 16 * v, 16);
    }
    return out;
}

// Signed weights or codes of quad G, from a panel or the packed tile.
template <class T, bool P, int G>
VALAR_FORCE_INLINE B16 load_quad(const Codes& codes) {
    if constexpr (P) return load_bytes(codes.at + 64 * G);
    else return load_codes4<T, G>(codes);
}

// sums (C, 16) += tile (16 rows) x C planes, block after block. P: the tile is a panel. K: the
// products; `part` has the sums of columns 0..15 and 16..31 apart where a type or latency asks.
template <class T, int C>
inline constexpr int sum_parts = T::layout.two_sums() || C <= 4 ? 2 : 1;

template <class K, class T, bool P, int C>
VALAR_FORCE_INLINE void dot_blocks(const std::byte* tile, const int8_t* values, size_t blocks,
                                   const ActivationBlock* const* planes, size_t step, float* sums) {
    constexpr PackedLayout L = T::layout;
    constexpr int bias = P ? 0 : signed_bias<T>, parts = sum_parts<T, C>;
    const B16 table = load_table(values);
    const std::byte *header = tile, *at = tile;
    for (size_t b = 0; b < blocks; b++, at += P ? kPanelBytes : L.block_bytes()) {
        if (!P && b % L.blocks == 0) {
            header = at;
            at += L.header_bytes();
        }
        const ActivationBlock* a[C];
        VALAR_UNROLL for (int c = 0; c < C; c++) a[c] = planes[c] + b * step;
        const typename K::template Operands<C> x(a);
        for (size_t v = 0; v < 4; v++) {
            I4 part[parts][C];  // starts as what the codes' bias adds, negated
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                VALAR_UNROLL for (int p = 0; p < parts; p++) part[p][c] = int_splat(
                    -bias * (parts == 2 ? a[c]->sum[p] : a[c]->sum[0] + a[c]->sum[1]));
            }
            K::template multiply<T, P, C>(x, {at + (P ? 0 : L.scale_bytes()) + 16 * v, table},
                                          part);
            Scales s;
            if constexpr (P) s = panel_scales<T>(at, v);
            else s = load_scales<T>(header, at, v);
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                float* sum = sums + 2 * kTileRows * c + 4 * v;
                if constexpr (L.two_scales) {
                    const F4 both = fma(to_float(part[0][c]), s.dw,
                                        mul(to_float(part[parts - 1][c]), s.m));
                    store(sum, fma(both, splat(a[c]->d), load(sum)));
                    continue;
                }
                I4 exact = part[0][c];
                if constexpr (L.sub_scales == 2)
                    exact = int_add(int_mul(exact, s.sub[0]), int_mul(part[1][c], s.sub[1]));
                else if constexpr (parts == 2) exact = int_add(exact, part[1][c]);
                F4 acc = fma(to_float(exact), mul(s.dw, splat(a[c]->d)), load(sum));
                if constexpr (L.minimum && L.sub_scales == 2) {
                    const I4 low = int_add(int_mul(s.low[0], int_splat(a[c]->sum[0])),
                                           int_mul(s.low[1], int_splat(a[c]->sum[1])));
                    acc = fma(to_float(low), mul(s.m, splat(a[c]->d)), acc);
                } else if constexpr (L.minimum) acc = fma(s.m, splat(a[c]->s), acc);
                store(sum, acc);
            }
        }
    }
}

using TileDot = void (*)(const std::byte* tile, const int8_t* values, size_t blocks,
                         const ActivationBlock* const* planes, size_t step, float* sums);
struct QuantKernels {
    TileDot dot1, dot2;  // from the packed tile
    void (*fill)(const std::byte* tile, const int8_t* values, size_t blocks, std::byte* panel);
    TileDot dot4, dot8;  // from the panel that `fill` made
};

// Of one tile: the sums of a column lie 32 floats behind those of the one before.
inline void multiply_quantized(const PackedLayout& layout, size_t blocks, const std::byte* tile,
                               const QuantKernels& k, const ColumnBatch& batch, float* sums) {
    alignas(16) std::byte panel[kPanelBlocks * kPanelBytes];
    const uint32_t count = batch.count;
    const size_t step = batch.step();
    const ActivationBlock* planes[8] = {batch.plane(0), batch.plane(1)};
    if (count <= 2)
        return (count == 1 ? k.dot1 : k.dot2)(tile, layout.values, blocks, planes, step, sums);
    for (size_t b = 0; b < blocks; b += kPanelBlocks) {
        const size_t n = blocks - b < kPanelBlocks ? blocks - b : kPanelBlocks;
        k.fill(tile + b / layout.blocks * layout.super_bytes(), layout.values, n, panel);
        for (uint32_t v = 0; v < count; v += 8) {
            for (uint32_t c = 0; c < 8; c++)  // the last one again to the end
                planes[c] = batch.plane(v + c < count ? v + c : count - 1) + b * step;
            (count - v > 4 ? k.dot8 : k.dot4)(panel, nullptr, n, planes, step,
                                              sums + 2 * kTileRows * v);
        }
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE F4 load_values(const std::byte* at, size_t index) {
    if constexpr (kType == TensorType::f32) return load(reinterpret_cast<const float*>(at) + index);
    else if constexpr (kType == TensorType::f16) return load_halves(at + 2 * index);
    else return load_bfloats(at + 2 * index);
}

template <TensorType kType, int C>
void dot_values(const std::byte* tile, size_t cols, const float* const* x, float* sums) {
    F4 acc[C][4];
    VALAR_UNROLL for (int i = 0; i < 4 * C; i++) acc[i / 4][i % 4] = splat(0);
    for (size_t k = 0; k < cols; k++) {
        F4 w[4];
        VALAR_UNROLL for (size_t v = 0; v < 4; v++) w[v] = load_values<kType>(tile, 16 * k + 4 * v);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const F4 one = splat(x[c][k]);
            VALAR_UNROLL for (int v = 0; v < 4; v++) acc[c][v] = fma(w[v], one, acc[c][v]);
        }
    }
    VALAR_UNROLL for (int i = 0; i < 4 * C; i++)
        store(sums + 2 * kTileRows * (i / 4) + i % 4 * 4, acc[i / 4][i % 4]);
}

template <TensorType kType>
void multiply_values(size_t cols, const std::byte* tile, const ColumnBatch& batch, float* sums) {
    for (uint32_t v = 0; v < batch.count; v += 4, sums += 4 * 2 * kTileRows) {
        const float* x[4];
        for (uint32_t c = v; c < v + 4; c++)
            x[c - v] = reinterpret_cast<const float*>(
                batch.column(c < batch.count ? c : batch.count - 1));
        (batch.count - v == 1 ? dot_values<kType, 1> : dot_values<kType, 4>)(tile, cols, x, sums);
    }
}

// Nearest integers of x * inverse and their sums; x becomes what is left, x - d * h.
VALAR_FORCE_INLINE void quantize_plane(F4 (&x)[8], float d, float inverse, ActivationBlock& out) {
    alignas(16) int32_t h[kActivationBlock];
    out.d = d;
    VALAR_UNROLL for (int half = 0; half < 2; half++) {
        I4 sum = int_splat(0);
        VALAR_UNROLL for (int i = 4 * half; i < 4 * half + 4; i++) {
            const I4 nearest = int_max(
                int_min(nearest_product(x[i], splat(inverse)), int_splat(127)), int_splat(-127));
            sum = int_add(sum, nearest);
            x[i] = fma(splat(-d), to_float(nearest), x[i]);
            std::memcpy(h + 4 * i, &nearest, sizeof nearest);
        }
        int32_t lanes[4];
        std::memcpy(lanes, &sum, sizeof lanes);
        out.sum[half] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
    for (uint32_t i = 0; i < kActivationBlock; i++) out.q[i] = static_cast<int8_t>(h[i]);
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

inline void quantize_column(const float* x, size_t n, uint32_t planes, size_t step,
                            ActivationBlock* out) {
    for (size_t b = 0; b < n / kActivationBlock; b++, x += kActivationBlock, out += step) {
        F4 v[8];
        I4 largest = int_splat(0);
        VALAR_UNROLL for (int i = 0; i < 8; i++) {
            v[i] = load(x + 4 * i);
            largest = int_max(largest, magnitude_bits(v[i]));
        }
        int32_t lanes[4], top = 0;
        std::memcpy(lanes, &largest, sizeof lanes);
        for (int32_t lane : lanes) top = lane > top ? lane : top;
        const float amax = bit_cast<float>(top);
        if (!(amax >= 0x1p-100f && amax <= 0x1.fffffep127f)) {  // zero, or not finite: rare
            scalar::quantize_block(x, planes, out);
            continue;
        }
        const float d = amax / 127.0f, inverse = 127.0f / amax;
        quantize_plane(v, d, inverse, out[0]);
        if (planes > 1) quantize_plane(v, d / 254.0f, inverse * 254.0f, out[1]);
    }
}

inline void quantize(const QuantizeTask& task) {
    for (uint32_t c = 0; c < task.columns; c++)
        quantize_column(task.x + c * task.x_stride, task.n, task.planes, task.step,
                        task.out + c * task.planes);
}

VALAR_FORCE_INLINE float sum_of_lanes(const F4 (&lanes)[4]) {
    float four[4];
    store(four, add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3])));
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    F4 lanes[4] = {splat(0), splat(0), splat(0), splat(0)};
    alignas(16) float rest[16] = {};  // 0 * 0 adds nothing
    for (size_t i = n / 16 * 16; i < n; i++) rest[i % 16] = x[i];
    for (size_t i = 0; i < n; i += 16) {
        const float* at = i + 16 <= n ? x + i : rest;
        VALAR_UNROLL for (int j = 0; j < 4; j++) {
            const F4 v = load(at + 4 * j);
            lanes[j] = fma(v, v, lanes[j]);
        }
    }
    const float factor = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(y + i, mul(mul(load(x + i), splat(factor)), load(weight + i)));
    for (; i < n; i++) y[i] = (x[i] * factor) * weight[i];
}

inline void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
                 const float* cos_sin) {
    const uint32_t pairs = n_rot / 2;
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim) {
        uint32_t i = 0;
        for (; i + 4 <= pairs; i += 4) {
            float *low = neox ? x + i : x + 2 * i, *high = neox ? x + pairs + i : low + 4;
            const F4 u = load(low), v = load(high), turn = load(cos_sin + 2 * i),
                     next = load(cos_sin + 2 * i + 4);
            const F4 a = neox ? u : even_lanes(u, v), b = neox ? v : odd_lanes(u, v);
            const F4 c = even_lanes(turn, next), s = odd_lanes(turn, next);
            const F4 first = fma(a, c, negate(mul(b, s))), second = fma(a, s, mul(b, c));
            store(low, neox ? first : zip_low(first, second));
            store(high, neox ? second : zip_high(first, second));
        }
        for (; i < pairs; i++)
            scalar::rotate(x[neox ? i : 2 * i], x[neox ? i + pairs : 2 * i + 1], cos_sin[2 * i],
                           cos_sin[2 * i + 1]);
    }
}

inline void scale(float* x, float factor, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, mul(load(x + i), splat(factor)));
    for (; i < n; i++) x[i] *= factor;
}

inline void add_to(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, add(load(x + i), load(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

inline void add_scaled(float* x, float factor, const float* y, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, fma(splat(factor), load(y + i), load(x + i)));
    for (; i < n; i++) x[i] = fma_once(factor, y[i], x[i]);
}

VALAR_FORCE_INLINE F4 exp4(F4 x) {
    const F4 v = at_most(x, splat(kExpMost));
    const I4 k = nearest_product(v, splat(kLog2e));
    const F4 minus_k = negate(to_float(k));
    const F4 r = fma(minus_k, splat(kLn2Low), fma(minus_k, splat(kLn2High), v));
    F4 p = splat(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--) p = fma(p, r, splat(exp_coefficients[i]));
    return zero_where_less(mul(p, power_of_two(k)), x, splat(kExpLeast));
}

inline void silu_mul(float* gate, const float* up, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const F4 x = load(gate + i);
        const F4 silu = div(x, add(splat(1.0f), exp4(negate(x))));
        store(gate + i, mul(silu, load(up + i)));
    }
    for (; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

inline void exp_all(float* x, size_t n) {
    size_t i = 0;
    for (; i + 4 <= n; i += 4) store(x + i, exp4(load(x + i)));
    for (; i < n; i++) x[i] = exp_once(x[i]);
}

inline void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
                     void* key_group, void* value_group) {
    const size_t whole = head_dim / 4 * 4;
    if (type != KvType::f16 || whole != head_dim)
        return scalar::store_kv(type, k, v, head_dim, slot, key_group, value_group);
    uint16_t* keys = static_cast<uint16_t*>(key_group) + slot;
    uint16_t* values = static_cast<uint16_t*>(value_group) + slot * whole;
    for (size_t e = 0; e < whole; e += 4) {
        uint16_t halves[4];
        store_halves(halves, load(k + e));
        for (size_t i = 0; i < 4; i++) keys[(e + i) * kKeyGroup] = halves[i];
        store_halves(values + e, load(v + e));
    }
}

template <KvType kType>
VALAR_FORCE_INLINE F4 load_kv(const void* group, size_t index) {
    if constexpr (kType == KvType::f16)
        return load_halves(static_cast<const uint16_t*>(group) + index);
    else return load(static_cast<const float*>(group) + index);
}

// Turns the scores of one query into weights and gives their maximum and sum. Scores are there for
// whole key groups: those of positions that are not visible become -infinity, so their weight is 0.
inline void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    const uint32_t first = begin / 16 * 16, last = (end + 15) / 16 * 16;
    for (uint32_t j = first; j < begin; j++) p[j] = hidden;
    for (uint32_t j = end; j < last; j++) p[j] = hidden;
    F4 top = splat(hidden);
    for (uint32_t j = first; j < last; j += 4) top = greater_of(top, load(p + j));
    float four[4];
    store(four, top);
    *max = hidden;
    for (float lane : four) *max = lane > *max ? lane : *max;
    *max += 0.0f;
    F4 lanes[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (uint32_t j = first; j < last; j += 16) {
        VALAR_UNROLL for (uint32_t i = 0; i < 4; i++) {
            const F4 weight = exp4(sub(load(p + j + 4 * i), splat(*max)));
            lanes[i] = add(lanes[i], weight);
            store(p + j + 4 * i, weight);
        }
    }
    *sum = sum_of_lanes(lanes);
}

// Q queries from `query` on that see the same positions.
template <KvType kType, uint32_t Q>
void attend(const AttentionTask& task, uint32_t query) {
    const uint32_t begin = task.begin[query], end = task.end[query];
    const float* q = task.q + query * task.q_stride;
    float* out = task.out + query * task.out_stride;
    alignas(16) float p[Q][kSegment];
    for (uint32_t group = begin / 16; group * 16 < end; group++) {
        F4 acc[Q][4];
        VALAR_UNROLL for (uint32_t i = 0; i < 4 * Q; i++) acc[i / 4][i % 4] = splat(0);
        for (size_t e = 0; e < task.head_dim; e++) {
            F4 key[4];
            VALAR_UNROLL for (size_t v = 0; v < 4; v++)
                key[v] = load_kv<kType>(task.keys[group], 16 * e + 4 * v);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const F4 one = splat(q[i * task.q_stride + e]);
                VALAR_UNROLL for (size_t v = 0; v < 4; v++) acc[i][v] = fma(one, key[v], acc[i][v]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < 4 * Q; i++)
            store(p[i / 4] + 16 * group + i % 4 * 4, acc[i / 4][i % 4]);
    }
    for (uint32_t i = 0; i < Q; i++) {
        apply_soft_cap(p[i] + begin, task.soft_cap, end - begin);
        weigh(p[i], begin, end, task.max + query + i, task.sum + query + i);
    }
    size_t e = 0;
    constexpr uint32_t W = 4;  // vectors of values at a time
    for (; e + 4 * W <= task.head_dim; e += 4 * W) {
        F4 acc[Q][W];
        VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) acc[i / W][i % W] = splat(0);
        for (uint32_t j = begin; j < end; j++) {
            F4 value[W];
            VALAR_UNROLL for (size_t v = 0; v < W; v++)
                value[v] = load_kv<kType>(task.values[j / 16], j % 16 * task.head_dim + e + 4 * v);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const F4 one = splat(p[i][j]);
                VALAR_UNROLL for (size_t v = 0; v < W; v++)
                    acc[i][v] = fma(one, value[v], acc[i][v]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++)
            store(out + i / W * task.out_stride + e + i % W * 4, acc[i / W][i % W]);
    }
    for (; e < task.head_dim; e++) {
        for (uint32_t i = 0; i < Q; i++) {
            float acc = 0;
            for (uint32_t j = begin; j < end; j++)
                acc = fma_once(
                    p[i][j],
                    scalar::read_kv(kType, task.values[j / 16], j % 16 * task.head_dim + e), acc);
            out[i * task.out_stride + e] = acc;
        }
    }
}

inline void attention(const AttentionTask& task) {
    using Attend = void (*)(const AttentionTask&, uint32_t);
    constexpr Attend together[2][4] = {{attend<KvType::f16, 1>, attend<KvType::f16, 2>,
                                        attend<KvType::f16, 3>, attend<KvType::f16, 4>},
                                       {attend<KvType::f32, 1>, attend<KvType::f32, 2>,
                                        attend<KvType::f32, 3>, attend<KvType::f32, 4>}};
    for (uint32_t query = 0, count; query < task.queries; query += count) {
        for (count = 1; count < 4 && query + count < task.queries; count++)
            if (task.begin[query + count] != task.begin[query] ||
                task.end[query + count] != task.end[query])
                break;
        if (task.begin[query] < task.end[query])
            together[task.kv_type == KvType::f32][count - 1](task, query);
    }
}

inline void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                            size_t n) {
    const float most = m > *max ? m : *max;
    const float a = exp_once(*max - most), b = exp_once(m - most);
    *max = most;
    *sum = fma_once(l, b, *sum * a);
    size_t e = 0;
    for (; e + 4 <= n; e += 4)
        store(out + e, fma(load(o + e), splat(b), mul(load(out + e), splat(a))));
    for (; e < n; e++) out[e] = fma_once(o[e], b, out[e] * a);
}

// A panel holds signed weights whatever the width of their codes was. The kernels that read panels
// need to know only whether products of two weights fit 16 bits, whether there are two sub-scales
// and whether there is a minimum: types that agree in all three share the kernels of one of them.
constexpr bool share_panels(const PackedLayout& a, const PackedLayout& b) {
    return a.float_bytes == b.float_bytes && (a.byte_bits() == 8) == (b.byte_bits() == 8) &&
           a.two_scales == b.two_scales && (a.sub_scales == 2) == (b.sub_scales == 2) &&
           a.minimum == b.minimum;
}
template <class T>
using PanelsOf = typename FirstAlike<T, share_panels>::type;

template <class K, class T>
inline constexpr QuantKernels quant_kernels = {
    K::Narrow::template dot_tile<TilesOf<T>, false, 1>,
    K::Narrow::template dot_tile<TilesOf<T>, false, 2>, fill_panel<TilesOf<T>>,
    K::template dot_tile<PanelsOf<T>, true, 4>, K::template dot_tile<PanelsOf<T>, true, 8>};

using MultiplyTile = void (*)(const TilePair& pair, const std::byte* tile, const ColumnBatch& batch,
                              float* sums);
template <class K, class T>
void multiply_tile(const TilePair& pair, const std::byte* tile, const ColumnBatch& batch,
                   float* sums) {
    if constexpr (T::layout.float_bytes != 0)
        multiply_values<T::layout.type>(pair.cols, tile, batch, sums);
    else
        multiply_quantized(T::layout, pair.cols / kActivationBlock, tile, quant_kernels<K, T>,
                           batch, sums);
}
template <class K>
struct With {
    template <class T>
    struct MultiplyOf {
        static constexpr MultiplyTile value = multiply_tile<K, T>;
    };
};

template <class K>
void product(const TilePair& pair, const ColumnBatch& batch, PairSums sums) {
    const MultiplyTile multiply =
        TableOf<MultiplyTile, With<K>::template MultiplyOf>::rows[pair.layout - packed_layouts];
    std::memset(sums, 0, (batch.count + kSpareColumns) * sizeof *sums);
    for (uint32_t t = 0; t < (pair.tiles[0] == pair.tiles[1] ? 1u : 2u); t++)
        multiply(pair, pair.tiles[t], batch, sums[0][t]);
}
template <class K>
void matmul(const MatmulTask& task) {
    multiply_tiles(
        task, {.product = product<K>, .quantize = quantize, .add = add_to, .silu_mul = silu_mul});
}

template <class K>
constexpr Kernels kernels_with(const char* name) {
    return {
        .name = name,
        .quantize = quantize,
        .matmul = matmul<K>,
        .rms_norm = rms_norm,
        .rope = rope,
        .scale = scale,
        .add = add_to,
        .add_scaled = add_scaled,
        .exp = exp_all,
        .silu_mul = silu_mul,
        .store_kv = store_kv,
        .expand_kv = scalar::expand_kv,
        .attention = attention,
        .attention_merge = attention_merge,
    };
}

}  // namespace lanes4

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NEON_KERNELS || VALAR_WASM_KERNELS

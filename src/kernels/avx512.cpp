#include "prologue.hpp"

#include "kernels/x86.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if VALAR_X86_KERNELS && !defined(VALAR_NO_INFERENCE)
// ---- AVX-512 with VNNI: sixteen rows a vector; unsigned code times signed activation ----------

VALAR_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace valar {
inline namespace v1 {
namespace detail {

namespace avx512 {

VALAR_FORCE_INLINE __m512i load_bytes(const void* at) { return _mm512_loadu_si512(at); }
VALAR_FORCE_INLINE __m512 load_halves(const void* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
VALAR_FORCE_INLINE void prefetch(const std::byte* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}
VALAR_FORCE_INLINE __m128i load_scale_bytes(const void* at) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
}
VALAR_FORCE_INLINE __m512 load_small_ints(const void* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_scale_bytes(at)));
}
VALAR_FORCE_INLINE __m512i broadcast4(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm512_set1_epi32(four);
}

struct Scales {
    __m512 dw, m;
    __m512 sub[2], low[2];  // of the halves of a block
};

template <Scale kFormat>
VALAR_FORCE_INLINE __m512 load_scale(const std::byte* scales) {
    if constexpr (kFormat == Scale::half) return load_halves(scales);
    if constexpr (kFormat == Scale::single) return _mm512_loadu_ps(scales);
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales))), 16));
}

template <class T>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* header, const std::byte* at) {
    constexpr PackedLayout L = T::layout;
    Scales out{};
    const std::byte* scales = L.sub_scales ? header : at;
    out.dw = load_scale<L.scale>(scales);
    if constexpr (L.second_scale()) out.m = load_scale<L.scale>(scales + 16 * L.scale_width());
    if constexpr (L.sub_scales == 2) {
        for (int i = 0; i < 2; i++)
            out.sub[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_scale_bytes(at + 16 * i)));
        for (int i = 0; L.minimum && i < 2; i++) out.low[i] = load_small_ints(at + 32 + 16 * i);
    } else if constexpr (L.sub_scales == 1) {
        out.dw = _mm512_mul_ps(out.dw, load_small_ints(at));
        out.m = _mm512_mul_ps(out.m, load_small_ints(at + 16));
    }
    if constexpr (L.sub_scales != 0 && L.minimum)
        out.m = _mm512_xor_ps(out.m, _mm512_set1_ps(-0.0f));
    return out;
}

// A table of values, made unsigned, for each quarter of a register.
VALAR_FORCE_INLINE __m512i load_values(const int8_t* values) {
    const __m128i bytes = _mm_xor_si128(load_scale_bytes(values), _mm_set1_epi8(-128));
    return _mm512_maskz_broadcast_i32x4(0xffff, bytes);
}

// Unsigned codes, or values, of quad g.
template <class T>
VALAR_FORCE_INLINE __m512i load_quad(const std::byte* codes, int g, __m512i values) {
    constexpr int bits = T::layout.bits, high = bits - 4;
    if constexpr (bits == 8) return load_bytes(codes + 64 * g);
    if constexpr (bits == 2)
        return _mm512_and_si512(
            _mm512_srli_epi16(load_bytes(codes + g / 4 * 64), static_cast<unsigned>(g) % 4 * 2),
            _mm512_set1_epi8(3));
    if constexpr (bits == 3) {
        const unsigned at = static_cast<unsigned>(g);
        const __m512i two = load_bytes(codes + g / 4 * 64), one = load_bytes(codes + 128);
        const __m512i moved = at < 2 ? _mm512_slli_epi16(one, (2 - at) & 7)
                                     : _mm512_srli_epi16(one, (at - 2) & 7);
        const __m512i low = _mm512_and_si512(_mm512_srli_epi16(two, at % 4 * 2),
                                             _mm512_set1_epi8(3));
        return _mm512_maskz_shuffle_epi8(
            ~__mmask64{0}, values,
            _mm512_ternarylogic_epi32(low, moved, _mm512_set1_epi8(4), 0xf8));
    }
    const __m512i pair = load_bytes(codes + g / 2 * 64);
    const __m512i low = _mm512_and_si512(g % 2 ? _mm512_srli_epi16(pair, 4) : pair,
                                         _mm512_set1_epi8(15));
    if constexpr (T::layout.coded) return _mm512_maskz_shuffle_epi8(~__mmask64{0}, values, low);
    if constexpr (high <= 0) return low;
    const __m512i rest = load_bytes(codes + 256 + g * high / 8 * 64);
    const int at = g * high % 8;
    const __m512i moved = at < 4 ? _mm512_slli_epi16(rest, static_cast<unsigned>(4 - at) & 7)
                                 : _mm512_srli_epi16(rest, static_cast<unsigned>(at - 4) & 7);
    // low | (moved & mask)
    return _mm512_ternarylogic_epi32(low, moved, _mm512_set1_epi8(high == 1 ? 16 : 48), 0xf8);
}

// The sums of a plane's two halves times the minimums of theirs: exact, being below 2^24.
VALAR_FORCE_INLINE __m512 weighted_sums(const __m512 (&low)[2], const ActivationBlock& a) {
    const __m512 first = _mm512_set1_ps(static_cast<float>(a.sum[0])),
                 last = _mm512_set1_ps(static_cast<float>(a.sum[1]));
    return _mm512_fmadd_ps(low[0], first, _mm512_mul_ps(low[1], last));
}

// sums += two tiles times C planes.
template <class T, int C>
void dot_tiles(const TileStep& step) {
    constexpr PackedLayout L = T::layout;
    constexpr int kParts = L.two_sums() ? 2 : 1;  // sums of 16 codes that have a scale each
    constexpr size_t kLines = (L.block_bytes() + 63) / 64;
    const __m512i values = L.coded ? load_values(step.values) : _mm512_setzero_si512();
    const ActivationBlock* a[C];
    __m512 acc[C][2];
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        a[c] = reinterpret_cast<const ActivationBlock*>(step.columns[c]);
        VALAR_UNROLL for (int t = 0; t < 2; t++)
            acc[c][t] = step.fresh ? _mm512_setzero_ps() : _mm512_load_ps(step.sums[c][t]);
    }
    const size_t stride = step.block_stride / sizeof(ActivationBlock);
    const ptrdiff_t apart = step.tiles[1] - step.tiles[0];
    const std::byte *at = step.tiles[0], *header = at, *next = step.next;
    size_t wait = step.every ? 0 : SIZE_MAX;
    for (size_t b = 0; b < step.count; b++) {
        if constexpr (L.header_bytes() != 0) {
            if (b % L.blocks == 0) {
                header = at;
                at += L.header_bytes();
            }
        }
        if (wait-- == 0) {
            wait = step.every - 1;
            VALAR_UNROLL for (size_t i = 0; i < 2 * kLines; i++)
                prefetch(next + (i % 2 ? apart : 0) + i / 2 * 64);
            next += L.super_bytes() / L.blocks;
        }
        __m512i total[kParts][C][2];  // starts as what the codes' bias adds, negated
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const int32_t* sum = a[c]->sum;
            VALAR_UNROLL for (int p = 0; p < kParts; p++)
                total[p][c][0] = total[p][c][1] = _mm512_set1_epi32(
                    -L.byte_bias() * (kParts == 2 ? sum[p] : sum[0] + sum[1]));
        }
        VALAR_UNROLL for (int g = 0; g < 8; g++) {
            __m512i w[2];
            VALAR_UNROLL for (int t = 0; t < 2; t++)
                w[t] = load_quad<T>(at + (t ? apart : 0) + L.scale_bytes(), g, values);
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                const __m512i x = broadcast4(a[c]->q + 4 * g);
                VALAR_UNROLL for (int t = 0; t < 2; t++) {
                    __m512i& sum = total[g / 4 * (kParts - 1)][c][t];
                    sum = _mm512_dpbusd_epi32(sum, w[t], x);
                }
            }
        }
        VALAR_UNROLL for (int t = 0; t < 2; t++) {
            const Scales scales = load_scales<T>(header + (t ? apart : 0), at + (t ? apart : 0));
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                __m512 sum = _mm512_cvtepi32_ps(total[0][c][t]);
                const __m512 d = _mm512_set1_ps(a[c]->d),
                             factor = L.two_scales ? d : _mm512_mul_ps(scales.dw, d);
                if constexpr (L.two_scales)
                    sum = _mm512_fmadd_ps(
                        sum, scales.dw,
                        _mm512_mul_ps(_mm512_cvtepi32_ps(total[1][c][t]), scales.m));
                else if constexpr (L.sub_scales == 2)  // exact, being below 2^24
                    sum = _mm512_fmadd_ps(
                        sum, scales.sub[0],
                        _mm512_mul_ps(_mm512_cvtepi32_ps(total[1][c][t]), scales.sub[1]));
                acc[c][t] = _mm512_fmadd_ps(sum, factor, acc[c][t]);
                if constexpr (L.minimum && L.sub_scales == 2)
                    acc[c][t] = _mm512_fmadd_ps(weighted_sums(scales.low, *a[c]),
                                                _mm512_mul_ps(scales.m, d), acc[c][t]);
                else if constexpr (L.minimum)
                    acc[c][t] = _mm512_fmadd_ps(scales.m, _mm512_set1_ps(a[c]->s), acc[c][t]);
            }
        }
        at += L.block_bytes();
        VALAR_UNROLL for (int c = 0; c < C; c++) a[c] += stride;
    }
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        VALAR_UNROLL for (int t = 0; t < 2; t++) _mm512_store_ps(step.sums[c][t], acc[c][t]);
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE __m512 load_floats(const std::byte* tile, size_t index) {
    if constexpr (kType == TensorType::f32) return _mm512_loadu_ps(tile + 4 * index);
    if constexpr (kType == TensorType::f16) return load_halves(tile + 2 * index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 2 * index))),
        16));
}

template <TensorType kType, int C>
void dot_floats(const TileStep& step) {
    const float* x[C];
    __m512 acc[C][2];
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        x[c] = reinterpret_cast<const float*>(step.columns[c]);
        VALAR_UNROLL for (int t = 0; t < 2; t++)
            acc[c][t] = step.fresh ? _mm512_setzero_ps() : _mm512_load_ps(step.sums[c][t]);
    }
    const std::byte *low = step.tiles[0], *high = step.tiles[1];
    for (size_t k = 0; k < step.count; k++) {
        const __m512 w[2] = {load_floats<kType>(low, 16 * k), load_floats<kType>(high, 16 * k)};
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const __m512 v = _mm512_set1_ps(x[c][k]);
            VALAR_UNROLL for (int t = 0; t < 2; t++)
                acc[c][t] = _mm512_fmadd_ps(w[t], v, acc[c][t]);
        }
    }
    VALAR_UNROLL for (int c = 0; c < C; c++) {
        VALAR_UNROLL for (int t = 0; t < 2; t++) _mm512_store_ps(step.sums[c][t], acc[c][t]);
    }
}

template <class T, int kMost = T::layout.two_sums() ? 4 : 6>  // as registers allow
constexpr TileKernels quantized = {{{1, dot_tiles<T, 1>},
                                    {2, dot_tiles<T, 2>},
                                    {4, dot_tiles<T, 4>},
                                    {kMost, dot_tiles<T, kMost>}}};
template <TensorType kType>
constexpr TileKernels floats = {{{1, dot_floats<kType, 1>},
                                 {2, dot_floats<kType, 2>},
                                 {4, dot_floats<kType, 4>},
                                 {6, dot_floats<kType, 6>}}};
template <class T>
constexpr TileKernels kernels_for() {
    if constexpr (T::layout.float_bytes != 0) return floats<T::layout.type>;
    else return quantized<TilesOf<T>>;
}
template <class T>
struct KernelsOf {
    static constexpr TileKernels value = kernels_for<T>();
};
constexpr auto& tile_kernels = TableOf<TileKernels, KernelsOf>::rows;

// ---- Attention: lanes are keys for scores, elements of a head for values ----------------------

template <bool kHalf>
VALAR_FORCE_INLINE __m512 load_kv(const void* group, size_t index) {
    if constexpr (kHalf) return load_halves(static_cast<const uint16_t*>(group) + index);
    return _mm512_loadu_ps(static_cast<const float*>(group) + index);
}
template <bool kHalf>
VALAR_FORCE_INLINE __m512 load_some_kv(__mmask16 some, const void* group, size_t index) {
    if constexpr (kHalf)
        return _mm512_cvtph_ps(
            _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(group) + index));
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(group) + index);
}

// Several key groups at once: a sum is a chain of dependent operations, and one chain leaves the
// multiplier idle. Where a key group is missing at the edge of the range, another one stands in, and
// its scores are never read.
template <bool kHalf, uint32_t Q>
void score_tile(const AttentionTask& task, const QueryTile& tile, uint32_t first, uint32_t last) {
    constexpr uint32_t G = Q > 4 ? 2 : 4;
    for (uint32_t group = first / 16 / G * G; group * 16 < last; group += G) {
        const void *keys[G], *any = nullptr;
        for (uint32_t g = 0; g < G; g++) {
            const uint32_t at = (group + g) * 16;
            keys[g] = at + 16 > first && at < last ? task.keys[group + g] : nullptr;
            if (keys[g]) any = keys[g];
        }
        if (!any) continue;  // no query of the tile looks here
        for (uint32_t g = 0; g < G; g++)
            if (!keys[g]) keys[g] = any;
        __m512 acc[Q][G];
        VALAR_UNROLL for (uint32_t i = 0; i < Q * G; i++) acc[i / G][i % G] = _mm512_setzero_ps();
        for (size_t e = 0; e < task.head_dim; e++) {
            __m512 k[G];
            VALAR_UNROLL for (uint32_t g = 0; g < G; g++) k[g] = load_kv<kHalf>(keys[g], 16 * e);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const __m512 q = _mm512_set1_ps(tile.q[i][e]);
                VALAR_UNROLL for (uint32_t g = 0; g < G; g++)
                    acc[i][g] = _mm512_fmadd_ps(q, k[g], acc[i][g]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q * G; i++)
            _mm512_store_ps(tile.p[i / G] + 16 * (group + i % G), acc[i / G][i % G]);
    }
}

VALAR_FORCE_INLINE __m512 exp16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);
    const __m512 v = _mm512_min_ps(_mm512_set1_ps(kExpMost), x);  // gives x where it is no number
    const __m512 k = _mm512_sub_ps(_mm512_fmadd_ps(v, _mm512_set1_ps(kLog2e), magic), magic);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2High), v);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2Low), r);
    __m512 p = _mm512_set1_ps(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--)
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exp_coefficients[i]));
    const __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpLeast), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(visible, p, k);
}

// GCC 12 warns of its own header where a lower half is taken by a cast.
template <int kHalf>
VALAR_FORCE_INLINE __m256 half_of(__m512 v) {
    return _mm512_maskz_extractf32x8_ps(0xff, v, kHalf);
}

void silu_mul(float* gate, const float* up, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m512 x = _mm512_loadu_ps(gate + i);
        const __m512 e = exp16(_mm512_xor_ps(x, _mm512_set1_ps(-0.0f)));
        const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
        _mm512_storeu_ps(gate + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
    }
    for (; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void exp_all(float* x, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(x + i, exp16(_mm512_loadu_ps(x + i)));
    for (; i < n; i++) x[i] = exp_once(x[i]);
}

// A plane of four columns' blocks; x becomes what is left, x - d * h.
VALAR_FORCE_INLINE void quantize_plane(__m512 (&x)[4][2], __m128 d, __m128 inverse, uint32_t planes,
                                       ActivationBlock* out) {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);
    alignas(16) float scales[4], steps[4];
    _mm_store_ps(scales, inverse);
    _mm_store_ps(steps, d);
    __m256i fours[4];
    VALAR_UNROLL for (uint32_t c = 0; c < 4; c++) {
        const __m512 scale = _mm512_set1_ps(scales[c]), step = _mm512_set1_ps(steps[c]);
        __m128i bytes[2];
        VALAR_UNROLL for (int i = 0; i < 2; i++) {
            const __m512 shifted = _mm512_fmadd_ps(x[c][i], scale, magic);
            __m512i h = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(magic));
            h = _mm512_min_epi32(h, _mm512_set1_epi32(127));
            h = _mm512_max_epi32(h, _mm512_set1_epi32(-127));
            if (planes > 1) x[c][i] = _mm512_fnmadd_ps(step, _mm512_cvtepi32_ps(h), x[c][i]);
            bytes[i] = _mm512_maskz_cvtepi32_epi8(0xffff, h);
        }
        const __m256i all = _mm256_set_m128i(bytes[1], bytes[0]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[c * planes].q), all);
        fours[c] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), all);
    }
    const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(fours[0], fours[1]),
                                           _mm256_hadd_epi32(fours[2], fours[3]));
    const __m128i low = _mm256_castsi256_si128(sums), high = _mm256_extracti128_si256(sums, 1);
    const __m128 s = _mm_mul_ps(d, _mm_cvtepi32_ps(_mm_add_epi32(low, high)));
    const __m128 ds[2] = {_mm_unpacklo_ps(d, s), _mm_unpackhi_ps(d, s)},
                 lh[2] = {_mm_castsi128_ps(_mm_unpacklo_epi32(low, high)),
                          _mm_castsi128_ps(_mm_unpackhi_epi32(low, high))};
    VALAR_UNROLL for (uint32_t i = 0; i < 2; i++) {
        _mm_storeu_ps(&out[2 * i * planes].d, _mm_movelh_ps(ds[i], lh[i]));
        _mm_storeu_ps(&out[(2 * i + 1) * planes].d, _mm_movehl_ps(lh[i], ds[i]));
    }
}

// One block of four columns.
void quantize_four(const float* x, size_t x_stride, uint32_t planes, ActivationBlock* out) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512 v[4][2];
    __m256i eight[4];  // largest magnitudes, which order like their bits
    VALAR_UNROLL for (size_t c = 0; c < 4; c++) {
        VALAR_UNROLL for (size_t i = 0; i < 2; i++)
            v[c][i] = _mm512_loadu_ps(x + c * x_stride + 16 * i);
        const __m512 largest = _mm512_castsi512_ps(
            _mm512_maskz_max_epi32(  // GCC 12 warns of its own header where there is no mask
                0xffff, _mm512_and_si512(_mm512_castps_si512(v[c][0]), magnitude),
                _mm512_and_si512(_mm512_castps_si512(v[c][1]), magnitude)));
        eight[c] = _mm256_max_epi32(_mm256_castps_si256(half_of<0>(largest)),
                                    _mm256_castps_si256(half_of<1>(largest)));
    }
    __m256i pairs[2];
    VALAR_UNROLL for (int i = 0; i < 2; i++)
        pairs[i] = _mm256_max_epi32(_mm256_unpacklo_epi32(eight[2 * i], eight[2 * i + 1]),
                                    _mm256_unpackhi_epi32(eight[2 * i], eight[2 * i + 1]));
    const __m256i all = _mm256_max_epi32(_mm256_unpacklo_epi64(pairs[0], pairs[1]),
                                         _mm256_unpackhi_epi64(pairs[0], pairs[1]));
    const __m128 amax = _mm_castsi128_ps(
        _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    const __mmask8 usual = _mm_cmp_ps_mask(amax, _mm_set1_ps(0x1p-100f), _CMP_GE_OQ) &
                           _mm_cmp_ps_mask(amax, _mm_set1_ps(0x1.fffffep127f), _CMP_LE_OQ);
    if (usual != 15) {  // one is zero, or not finite: rare
        for (uint32_t c = 0; c < 4; c++)
            scalar::quantize_block(x + c * x_stride, planes, out + c * planes);
        return;
    }
    const __m128 d = _mm_div_ps(amax, _mm_set1_ps(127)),
                 inverse = _mm_div_ps(_mm_set1_ps(127), amax);
    quantize_plane(v, d, inverse, planes, out);
    if (planes > 1)
        quantize_plane(v, _mm_div_ps(d, _mm_set1_ps(254)), _mm_mul_ps(inverse, _mm_set1_ps(254)),
                       planes, out + 1);
}

void quantize(const QuantizeTask& task) {
    uint32_t c = 0;
    for (; c + 4 <= task.columns; c += 4)
        for (size_t b = 0; b < task.n / kActivationBlock; b++)
            quantize_four(task.x + c * task.x_stride + b * kActivationBlock, task.x_stride,
                          task.planes, task.out + b * task.step + c * task.planes);
    for (; c < task.columns; c++)
        avx2::quantize_column(task.x + c * task.x_stride, task.n, task.planes, task.step,
                              task.out + c * task.planes);
}

// A mask of those of the 16 positions from `at` on that lie in begin .. end - 1; at least one does.
VALAR_FORCE_INLINE __mmask16 visible_lanes(uint32_t at, uint32_t begin, uint32_t end) {
    const uint32_t from = begin > at ? begin - at : 0, count = end - at < 16 ? end - at : 16;
    return static_cast<__mmask16>((0xffffu << from) & (0xffffu >> (16 - count)));
}

// Turns the scores of one query into weights and gives their maximum and sum. Scores are there for
// whole key groups: positions that are not visible get weight 0.
void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    const uint32_t first = begin / 16 * 16;
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (uint32_t j = first; j < end; j += 16)  // the second operand where one is no number
        top = _mm512_mask_max_ps(top, visible_lanes(j, begin, end), _mm512_load_ps(p + j), top);
    const __m256 eight = _mm256_max_ps(half_of<0>(top), half_of<1>(top));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    *max = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1))) + 0.0f;
    const __m512 most = _mm512_set1_ps(*max);
    __m512 lanes = _mm512_setzero_ps();
    for (uint32_t j = first; j < end; j += 16) {
        const __m512 weight = _mm512_maskz_mov_ps(
            visible_lanes(j, begin, end), exp16(_mm512_sub_ps(_mm512_load_ps(p + j), most)));
        lanes = _mm512_add_ps(lanes, weight);
        _mm512_store_ps(p + j, weight);
    }
    *sum = avx2::sum_of_lanes(half_of<0>(lanes), half_of<1>(lanes));
}

// out_e += p_j * v_j,e for W vectors from e0 on, first <= j < last, of Q queries from `query` on;
// of a single vector only `some`.
template <bool kHalf, uint32_t Q, uint32_t W>
VALAR_FORCE_INLINE void add_values(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                                   size_t e0, __mmask16 some, uint32_t first, uint32_t last) {
    __m512 acc[Q][W];
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) {
        const float* out = tile.out[query + i / W] + e0 + 16 * (i % W);
        acc[i / W][i % W] = W > 1 ? _mm512_loadu_ps(out) : _mm512_maskz_loadu_ps(some, out);
    }
    for (uint32_t j = first; j < last; j++) {
        const void* group = task.values[j / 16];
        const size_t at = j % 16 * size_t{task.head_dim} + e0;
        __m512 v[W];
        VALAR_UNROLL for (uint32_t w = 0; w < W; w++)
            v[w] = W > 1 ? load_kv<kHalf>(group, at + 16 * w)
                         : load_some_kv<kHalf>(some, group, at);
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            const __m512 p = _mm512_set1_ps(tile.p[query + i][j]);
            VALAR_UNROLL for (uint32_t w = 0; w < W; w++)
                acc[i][w] = _mm512_fmadd_ps(p, v[w], acc[i][w]);
        }
    }
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++) {
        float* out = tile.out[query + i / W] + e0 + 16 * (i % W);
        _mm512_mask_storeu_ps(out, W > 1 ? __mmask16{0xffff} : some, acc[i / W][i % W]);
    }
}

template <bool kHalf, uint32_t Q>
void add_value_range(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                     uint32_t first, uint32_t last) {
    if (first >= last) return;
    constexpr uint32_t W = Q > 4 ? 2 : 4;
    uint32_t e = 0;
    for (; e + 16 * W <= task.head_dim; e += 16 * W)
        add_values<kHalf, Q, W>(task, tile, query, e, 0xffff, first, last);
    for (; e < task.head_dim; e += 16)
        add_values<kHalf, Q, 1>(task, tile, query, e, visible_lanes(e, 0, task.head_dim), first,
                                last);
}

#define VALAR_EACH_TILE(part, half)                                                               \
    {                                                                                             \
        part<half, 1>, part<half, 2>, part<half, 3>, part<half, 4>, part<half, 5>, part<half, 6>, \
            part<half, 7>, part<half, 8>                                                          \
    }
constexpr AttentionParts attention_parts = {
    .queries = kTileQueries,
    .score = {VALAR_EACH_TILE(score_tile, true), VALAR_EACH_TILE(score_tile, false)},
    .weigh = weigh,
    .add_values = {VALAR_EACH_TILE(add_value_range, true),
                   VALAR_EACH_TILE(add_value_range, false)}};
#undef VALAR_EACH_TILE

void attention(const AttentionTask& task) { attend(attention_parts, task); }

void product(const TilePair& pair, const ColumnBatch& batch, PairSums sums) {
    multiply_pair(tile_kernels[pair.layout - packed_layouts], pair, batch, sums);
}
void matmul(const MatmulTask& task) {
    multiply_tiles(
        task, {.product = product, .quantize = quantize, .add = avx2::add, .silu_mul = silu_mul});
}

constexpr Kernels kernels = {
    .name = "avx512",
    .quantize = quantize,
    .matmul = matmul,
    .rms_norm = avx2::rms_norm,
    .rope = avx2::rope,
    .scale = avx2::scale,
    .add = avx2::add,
    .add_scaled = avx2::add_scaled,
    .exp = exp_all,
    .silu_mul = silu_mul,
    .store_kv = avx2::store_kv,
    .expand_kv = avx2::expand_kv,
    .attention = attention,
    .attention_merge = avx2::attention_merge,
    .prefetches = true,
};

}  // namespace avx512

}  // namespace detail
}  // namespace v1
}  // namespace valar

VALAR_TARGET_END
#endif  // VALAR_X86_KERNELS

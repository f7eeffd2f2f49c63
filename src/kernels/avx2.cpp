#include "prologue.hpp"

#include "kernels/x86.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if VALAR_X86_KERNELS && !defined(VALAR_NO_INFERENCE)
// ---- AVX2, FMA, F16C: eight rows, or eight elements, a vector --------------------------------

VALAR_TARGET_BEGIN("avx2,fma,f16c")

namespace valar {
inline namespace v1 {
namespace detail {

namespace avx2 {

VALAR_FORCE_INLINE __m256i load_bytes(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
VALAR_FORCE_INLINE __m256 load_halves(const void* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
VALAR_FORCE_INLINE __m256 load_small_ints(const void* at) {  // uint8
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
}
VALAR_FORCE_INLINE __m256i broadcast4(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

VALAR_FORCE_INLINE void prefetch(const std::byte* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

// acc += u * s of four unsigned and signed bytes each: one instruction of AVX-VNNI, or of AVX-512,
// whose encoding differs. A function has one target and these kernels serve three: so it is written
// by hand.
enum class Vnni { none, vex, evex };
template <Vnni kVnni>
VALAR_FORCE_INLINE __m256i dot4(__m256i acc, __m256i u, __m256i s) {
#if defined(__GNUC__) || defined(__clang__)
    if constexpr (kVnni == Vnni::vex)
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    else __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    return acc;
#else
    return kVnni == Vnni::vex ? _mm256_dpbusd_avx_epi32(acc, u, s) : _mm256_dpbusd_epi32(acc, u, s);
#endif
}

struct Scales {  // of eight rows
    __m256 dw, m;
    __m256 sub[2], low[2];  // of the halves of a block
};

template <Scale kFormat>
VALAR_FORCE_INLINE __m256 load_scale(const std::byte* scales, int half) {
    if constexpr (kFormat == Scale::half) return load_halves(scales + 16 * half);
    if constexpr (kFormat == Scale::single)
        return _mm256_loadu_ps(reinterpret_cast<const float*>(scales + 32 * half));
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * half))),
        16));
}

template <class T>
VALAR_FORCE_INLINE Scales load_scales(const std::byte* header, const std::byte* at, int half) {
    constexpr PackedLayout L = T::layout;
    Scales out{};
    const std::byte* scales = L.sub_scales ? header : at;
    constexpr size_t width = L.scale_width();
    out.dw = load_scale<L.scale>(scales, half);
    if constexpr (L.second_scale()) out.m = load_scale<L.scale>(scales + 16 * width, half);
    if constexpr (L.sub_scales == 2) {
        for (int i = 0; i < 2; i++)
            out.sub[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 16 * i + 8 * half))));
        for (int i = 0; L.minimum && i < 2; i++)
            out.low[i] = load_small_ints(at + 32 + 16 * i + 8 * half);
    } else if constexpr (L.sub_scales == 1) {
        out.dw = _mm256_mul_ps(out.dw, load_small_ints(at + 8 * half));
        out.m = _mm256_mul_ps(out.m, load_small_ints(at + 16 + 8 * half));
    }
    if constexpr (L.sub_scales != 0 && L.minimum)
        out.m = _mm256_xor_ps(out.m, _mm256_set1_ps(-0.0f));
    return out;
}

// A table of values, made unsigned, for both halves of a register.
VALAR_FORCE_INLINE __m256i load_values(const int8_t* values) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_broadcastsi128_si256(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}

// Unsigned codes, or values, of quad g of eight rows.
template <class T>
VALAR_FORCE_INLINE __m256i load_quad(const std::byte* codes, int g, __m256i values) {
    constexpr int bits = T::layout.bits, high = bits - 4;
    if constexpr (bits == 8) return load_bytes(codes + 64 * g);
    if constexpr (bits == 2)
        return _mm256_and_si256(_mm256_srli_epi16(load_bytes(codes + g / 4 * 64), g % 4 * 2),
                                _mm256_set1_epi8(3));
    if constexpr (bits == 3) {
        const __m256i two = load_bytes(codes + g / 4 * 64), one = load_bytes(codes + 128);
        const __m256i moved = g < 2 ? _mm256_slli_epi16(one, 2 - g) : _mm256_srli_epi16(one, g - 2);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(two, g % 4 * 2),
                                             _mm256_set1_epi8(3));
        return _mm256_shuffle_epi8(
            values, _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(4))));
    }
    const __m256i pair = load_bytes(codes + g / 2 * 64);
    const __m256i low = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(pair, 4) : pair,
                                         _mm256_set1_epi8(15));
    if constexpr (T::layout.coded) return _mm256_shuffle_epi8(values, low);
    if constexpr (high <= 0 || bits == 8) return low;
    const __m256i rest = load_bytes(codes + 256 + g * high / 8 * 64);
    const int at = g * high % 8;
    return _mm256_or_si256(low, _mm256_and_si256(at < 4 ? _mm256_slli_epi16(rest, 4 - at)
                                                        : _mm256_srli_epi16(rest, at - 4),
                                                 _mm256_set1_epi8(high == 1 ? 16 : 48)));
}

// total (of each plane and eight rows) += codes of quad g times activations. Without VNNI products
// are added in 16 bits as long as they cannot overflow, in `part`: 8 quads of 4-bit codes, 4 of 5
// bits, 2 of 6 bits; not beyond a half that has sums of its own. 8-bit codes are two of 4 bits.
template <Vnni kVnni, int kBits, int kParts>
VALAR_FORCE_INLINE void add_products(__m256i& total, __m256i (&part)[2], __m256i codes, __m256i x,
                                     int g) {
    if constexpr (kVnni != Vnni::none) {
        total = dot4<kVnni>(total, codes, x);
        return;
    }
    constexpr int kRun = kBits == 6 ? 2 : kBits == 5 || kParts == 2 ? 4 : 8;
    const __m256i low = _mm256_set1_epi8(15);
    VALAR_UNROLL for (int i = 0; i < (kBits == 8 ? 2 : 1); i++) {
        const __m256i four = i ? _mm256_srli_epi16(codes, 4) : codes;
        const __m256i p = _mm256_maddubs_epi16(kBits == 8 ? _mm256_and_si256(four, low) : codes, x);
        part[i] = g % kRun ? _mm256_add_epi16(part[i], p) : p;
        VALAR_IN_ORDER(part[i]);
        if (g % kRun != kRun - 1) continue;
        total = _mm256_add_epi32(total, _mm256_madd_epi16(part[i], _mm256_set1_epi16(i ? 16 : 1)));
        VALAR_IN_ORDER(total);
    }
}

// The sums of a plane's two halves times the minimums of theirs: exact, being below 2^24.
VALAR_FORCE_INLINE __m256 weighted_sums(const __m256 (&low)[2], const ActivationBlock& a) {
    const __m256 first = _mm256_set1_ps(static_cast<float>(a.sum[0])),
                 last = _mm256_set1_ps(static_cast<float>(a.sum[1]));
    return _mm256_fmadd_ps(low[0], first, _mm256_mul_ps(low[1], last));
}

// sums += two tiles times C planes, H times eight rows at a time: registers decide.
template <class T, Vnni kVnni, int C>
void dot_tiles(const TileStep& step) {
    constexpr PackedLayout L = T::layout;
    constexpr int kParts = L.two_sums() ? 2 : 1;  // sums of 16 codes that have a scale each
    constexpr int H = (L.byte_bits() <= 4 && !L.two_sums()) ||
                              (!L.two_sums() && kVnni != Vnni::none)
                          ? 2
                          : 1;
    constexpr size_t kLines = (L.block_bytes() + 63) / 64;
    const __m256i values = L.coded ? load_values(step.values) : _mm256_setzero_si256();
    const ActivationBlock* a[C];
    VALAR_UNROLL for (int c = 0; c < C; c++)
        a[c] = reinterpret_cast<const ActivationBlock*>(step.columns[c]);
    const size_t stride = step.block_stride / sizeof(ActivationBlock);
    if (step.fresh) std::memset(step.sums, 0, C * sizeof *step.sums);
    const std::byte* next = step.next;
    size_t header = 0, at = 0, wait = step.every ? 0 : SIZE_MAX;
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
                prefetch(next + (i % 2 ? step.tiles[1] - step.tiles[0] : 0) + i / 2 * 64);
            next += L.super_bytes() / L.blocks;
        }
        for (int v = 0; v < 4; v += H) {  // of the tiles' 32 rows
            const std::byte* tile = step.tiles[v / 2];
            __m256i total[kParts][C][H], part[C][H][2];
            VALAR_UNROLL for (int c = 0; c < C; c++) {  // what the codes' bias adds, negated
                const int32_t* sum = a[c]->sum;
                VALAR_UNROLL for (int p = 0; p < kParts; p++) {
                    VALAR_UNROLL for (int h = 0; h < H; h++) total[p][c][h] = _mm256_set1_epi32(
                        -L.byte_bias() * (kParts == 2 ? sum[p] : sum[0] + sum[1]));
                }
            }
            VALAR_UNROLL for (int g = 0; g < 8; g++) {
                __m256i codes[H];
                VALAR_UNROLL for (int h = 0; h < H; h++) codes[h] = load_quad<T>(
                    tile + at + L.scale_bytes() + 32 * (v % 2 + h), g, values);
                VALAR_UNROLL for (int c = 0; c < C; c++) {
                    const __m256i x = broadcast4(a[c]->q + 4 * g);
                    VALAR_UNROLL for (int h = 0; h < H; h++)
                        add_products<kVnni, L.byte_bits(), kParts>(
                            total[g / 4 * (kParts - 1)][c][h], part[c][h], codes[h], x, g);
                }
            }
            VALAR_UNROLL for (int h = 0; h < H; h++) {
                const Scales scales = load_scales<T>(tile + header, tile + at, v % 2 + h);
                VALAR_UNROLL for (int c = 0; c < C; c++) {
                    __m256 sum = _mm256_cvtepi32_ps(total[0][c][h]);
                    if constexpr (L.two_scales)
                        sum = _mm256_fmadd_ps(
                            sum, scales.dw,
                            _mm256_mul_ps(_mm256_cvtepi32_ps(total[1][c][h]), scales.m));
                    else if constexpr (L.sub_scales == 2)  // exact, being below 2^24
                        sum = _mm256_fmadd_ps(
                            sum, scales.sub[0],
                            _mm256_mul_ps(_mm256_cvtepi32_ps(total[1][c][h]), scales.sub[1]));
                    const __m256 d = _mm256_set1_ps(a[c]->d),
                                 factor = L.two_scales ? d : _mm256_mul_ps(scales.dw, d);
                    float* acc = &step.sums[c][(v + h) / 2][(v + h) % 2 * 8];
                    sum = _mm256_fmadd_ps(sum, factor, _mm256_load_ps(acc));
                    if constexpr (L.minimum && L.sub_scales == 2)
                        sum = _mm256_fmadd_ps(weighted_sums(scales.low, *a[c]),
                                              _mm256_mul_ps(scales.m, d), sum);
                    else if constexpr (L.minimum)
                        sum = _mm256_fmadd_ps(scales.m, _mm256_set1_ps(a[c]->s), sum);
                    _mm256_store_ps(acc, sum);
                }
            }
        }
        at += L.block_bytes();
        VALAR_UNROLL for (int c = 0; c < C; c++) a[c] += stride;
    }
}

template <TensorType kType>
VALAR_FORCE_INLINE __m256 load_floats(const std::byte* tile, size_t index) {
    if constexpr (kType == TensorType::f32)
        return _mm256_loadu_ps(reinterpret_cast<const float*>(tile) + index);
    if constexpr (kType == TensorType::f16) return load_halves(tile + 2 * index);
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * index))),
        16));
}

template <TensorType kType, int C>
void dot_floats(const TileStep& step) {
    constexpr int H = C > 2 ? 2 : 4;
    const float* x[C];
    VALAR_UNROLL for (int c = 0; c < C; c++) x[c] = reinterpret_cast<const float*>(step.columns[c]);
    for (int v = 0; v < 4; v += H) {
        __m256 acc[C][H];
        VALAR_UNROLL for (int i = 0; i < C * H; i++)
            acc[i / H][i % H] = step.fresh
                                    ? _mm256_setzero_ps()
                                    : _mm256_load_ps(
                                          &step.sums[i / H][(v + i % H) / 2][(v + i % H) % 2 * 8]);
        const std::byte *low = step.tiles[v / 2], *high = step.tiles[1];
        for (size_t k = 0; k < step.count; k++) {
            __m256 w[H];
            VALAR_UNROLL for (int h = 0; h < H; h++)
                w[h] = load_floats<kType>(h < 2 ? low : high, 16 * k + (h % 2 ? 8 : 0));
            VALAR_UNROLL for (int c = 0; c < C; c++) {
                const __m256 at_k = _mm256_broadcast_ss(x[c] + k);
                VALAR_UNROLL for (int h = 0; h < H; h++)
                    acc[c][h] = _mm256_fmadd_ps(w[h], at_k, acc[c][h]);
            }
        }
        VALAR_UNROLL for (int i = 0; i < C * H; i++) _mm256_store_ps(
            &step.sums[i / H][(v + i % H) / 2][(v + i % H) % 2 * 8], acc[i / H][i % H]);
    }
}

template <class T, Vnni kVnni, int kLeast = (kVnni != Vnni::none) && T::layout.rare() ? 2 : 1,
          int kMost = kVnni == Vnni::none || (T::layout.rare() && T::layout.two_sums()) ? 4 : 6>
constexpr TileKernels quantized = {{{kLeast, dot_tiles<T, kVnni, kLeast>},
                                    {2, dot_tiles<T, kVnni, 2>},
                                    {4, dot_tiles<T, kVnni, 4>},
                                    {kMost, dot_tiles<T, kVnni, kMost>}}};
template <TensorType kType>
constexpr TileKernels floats = {{{1, dot_floats<kType, 1>},
                                 {2, dot_floats<kType, 2>},
                                 {4, dot_floats<kType, 4>},
                                 {6, dot_floats<kType, 6>}}};
template <Vnni kVnni>
struct With {
    template <class T>
    static constexpr TileKernels choose() {
        if constexpr (T::layout.float_bytes != 0) return floats<T::layout.type>;
        else return quantized<TilesOf<T>, kVnni>;
    }
    template <class T>
    struct KernelsOf {
        static constexpr TileKernels value = choose<T>();
    };
    static constexpr auto& tile_kernels = TableOf<TileKernels, KernelsOf>::rows;
};

// Nearest integers of x * factor as 32 bytes, their sums, and optionally what is left: x - d * h.
VALAR_FORCE_INLINE void quantize_plane(__m256 (&x)[4], float d, float inverse,
                                       ActivationBlock& out) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f), scale = _mm256_set1_ps(inverse),
                 step = _mm256_set1_ps(d);
    __m256i h[4], sum[2];
    VALAR_UNROLL for (int i = 0; i < 4; i++) {
        const __m256 shifted = _mm256_fmadd_ps(x[i], scale, magic);
        h[i] = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
        h[i] = _mm256_max_epi32(_mm256_min_epi32(h[i], _mm256_set1_epi32(127)),
                                _mm256_set1_epi32(-127));
        x[i] = _mm256_fnmadd_ps(step, _mm256_cvtepi32_ps(h[i]), x[i]);
    }
    VALAR_UNROLL for (int i = 0; i < 2; i++) sum[i] = _mm256_add_epi32(h[2 * i], h[2 * i + 1]);
    const __m256i pairs = _mm256_hadd_epi32(sum[0], sum[1]),
                  quads = _mm256_hadd_epi32(pairs, pairs);
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(quads),
                                       _mm256_extracti128_si256(quads, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out.sum), sums);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(h[0], h[1]),
                                             _mm256_packs_epi32(h[2], h[3]));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out.q),
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    out.d = d;
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

// The largest of eight magnitudes. They order like their bits; what is not a number is the largest.
VALAR_FORCE_INLINE float largest_lane(__m256i bits) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

void quantize_column(const float* x, size_t n, uint32_t planes, size_t step, ActivationBlock* out) {
    for (size_t b = 0; b < n / kActivationBlock; b++, x += kActivationBlock, out += step) {
        __m256 v[4];
        __m256i largest = _mm256_setzero_si256();
        VALAR_UNROLL for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]),
                                                                 _mm256_set1_epi32(0x7fffffff)));
        }
        const float amax = largest_lane(largest);
        if (!(amax >= 0x1p-100f && amax <= 0x1.fffffep127f)) {  // zero, or not finite: rare
            scalar::quantize_block(x, planes, out);
            continue;
        }
        const float d = amax / 127.0f, inverse = 127.0f / amax;
        quantize_plane(v, d, inverse, out[0]);
        if (planes > 1) quantize_plane(v, d / 254.0f, inverse * 254.0f, out[1]);
    }
}

void quantize(const QuantizeTask& task) {
    for (uint32_t c = 0; c < task.columns; c++)
        quantize_column(task.x + c * task.x_stride, task.n, task.planes, task.step,
                        task.out + c * task.planes);
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    __m256 low = _mm256_setzero_ps(), high = low;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    alignas(32) float rest[16] = {};  // 0 * 0 adds nothing
    for (size_t j = i; j < n; j++) rest[j - i] = x[j];
    low = _mm256_fmadd_ps(_mm256_load_ps(rest), _mm256_load_ps(rest), low);
    high = _mm256_fmadd_ps(_mm256_load_ps(rest + 8), _mm256_load_ps(rest + 8), high);
    const __m128 mean = _mm_set_ss(sum_of_lanes(low, high) / static_cast<float>(n) + eps);
    const float factor = 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean));
    const __m256 scale = _mm256_set1_ps(factor);
    for (i = 0; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale),
                                              _mm256_loadu_ps(weight + i)));
    for (; i < n; i++) y[i] = (x[i] * factor) * weight[i];
}

void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin) {
    const uint32_t pairs = n_rot / 2;
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim) {
        uint32_t i = 0;
        for (; !neox && i + 4 <= pairs; i += 4) {  // lanes a, b, a, b ..; a * c - t and a * s + t
            const __m256 v = _mm256_loadu_ps(x + 2 * i), turn = _mm256_loadu_ps(cos_sin + 2 * i);
            const __m256 t = _mm256_mul_ps(_mm256_movehdup_ps(v), _mm256_permute_ps(turn, 0xb1));
            _mm256_storeu_ps(x + 2 * i, _mm256_fmaddsub_ps(_mm256_moveldup_ps(v), turn, t));
        }
        for (; neox && i + 8 <= pairs; i += 8) {
            const __m256 first = _mm256_loadu_ps(cos_sin + 2 * i),
                         second = _mm256_loadu_ps(cos_sin + 2 * i + 8);
            const __m256 low = _mm256_permute2f128_ps(first, second, 0x20),
                         high = _mm256_permute2f128_ps(first, second, 0x31);
            const __m256 c = _mm256_shuffle_ps(low, high, 0x88),
                         s = _mm256_shuffle_ps(low, high, 0xdd);
            const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + pairs + i);
            _mm256_storeu_ps(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
            _mm256_storeu_ps(x + pairs + i, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)));
        }
        for (; i < pairs; i++)
            scalar::rotate(x[neox ? i : 2 * i], x[neox ? i + pairs : 2 * i + 1], cos_sin[2 * i],
                           cos_sin[2 * i + 1]);
    }
}

void scale(float* x, float factor, size_t n) {
    const __m256 f = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), f));
    for (; i < n; i++) x[i] *= factor;
}

void add(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

void add_scaled(float* x, float factor, const float* y, size_t n) {
    const __m256 f = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_fmadd_ps(f, _mm256_loadu_ps(y + i), _mm256_loadu_ps(x + i)));
    for (; i < n; i++) x[i] = fma_once(factor, y[i], x[i]);
}

VALAR_FORCE_INLINE __m256 exp8(__m256 x) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);
    const __m256 v = _mm256_min_ps(_mm256_set1_ps(kExpMost), x);  // gives x where it is no number
    const __m256 shifted = _mm256_fmadd_ps(v, _mm256_set1_ps(kLog2e), magic);
    const __m256 k = _mm256_sub_ps(shifted, magic);
    __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2High), v);
    r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Low), r);
    __m256 p = _mm256_set1_ps(exp_coefficients[6]);
    VALAR_UNROLL for (int i = 5; i >= 0; i--)
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(exp_coefficients[i]));
    const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(kExpLeast), _CMP_LT_OQ), p);
}

void silu_mul(float* gate, const float* up, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_loadu_ps(gate + i);
        const __m256 e = exp8(_mm256_xor_ps(x, _mm256_set1_ps(-0.0f)));
        const __m256 silu = _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
    for (; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void exp_all(float* x, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(x + i, exp8(_mm256_loadu_ps(x + i)));
    for (; i < n; i++) x[i] = exp_once(x[i]);
}

template <Vnni kVnni>
void product(const TilePair& pair, const ColumnBatch& batch, PairSums sums) {
    multiply_pair(With<kVnni>::tile_kernels[pair.layout - packed_layouts], pair, batch, sums);
}
template <Vnni kVnni>
void matmul(const MatmulTask& task) {
    multiply_tiles(
        task, {.product = product<kVnni>, .quantize = quantize, .add = add, .silu_mul = silu_mul});
}

void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group) {
    if (type != KvType::f16)
        return scalar::store_kv(type, k, v, head_dim, slot, key_group, value_group);
    uint16_t* keys = static_cast<uint16_t*>(key_group) + slot;
    uint16_t* values = static_cast<uint16_t*>(value_group) + size_t{slot} * head_dim;
    size_t e = 0;
    for (; e + 8 <= head_dim; e += 8) {
        uint16_t halves[8];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves),
                         _mm256_cvtps_ph(_mm256_loadu_ps(k + e), 0));
        for (size_t i = 0; i < 8; i++) keys[(e + i) * kKeyGroup] = halves[i];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + e),
                         _mm256_cvtps_ph(_mm256_loadu_ps(v + e), 0));
    }
    for (; e < head_dim; e++) {
        keys[e * kKeyGroup] = half_bits(k[e]);
        values[e] = half_bits(v[e]);
    }
}

VALAR_FORCE_INLINE __m256 load_codes8(const void* at) {  // int8
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
}

void expand_kv(const void* key_group, const void* value_group, uint32_t head_dim, float* keys,
               float* values) {
    const size_t codes = head_dim * kKeyGroup;
    const std::byte *const k = static_cast<const std::byte*>(key_group),
                           *const v = static_cast<const std::byte*>(value_group);
    for (size_t i = 0; i < codes; i += kKeyGroup) {
        const size_t block = i / kKeyGroup / kActivationBlock;
        for (size_t j = 0; j < kKeyGroup; j += 8)
            _mm256_storeu_ps(keys + i + j,
                             _mm256_mul_ps(load_halves(k + codes + 2 * (block * kKeyGroup + j)),
                                           load_codes8(k + i + j)));
    }
    for (size_t i = 0; i < codes; i += 8) {
        const float scale = half_value(load16(v + codes + i / kActivationBlock * 2));
        _mm256_storeu_ps(values + i, _mm256_mul_ps(_mm256_set1_ps(scale), load_codes8(v + i)));
    }
}

template <bool kHalf>
VALAR_FORCE_INLINE __m256 load_kv(const void* group, size_t index) {
    if constexpr (kHalf) return load_halves(static_cast<const uint16_t*>(group) + index);
    return _mm256_loadu_ps(static_cast<const float*>(group) + index);
}

template <bool kHalf, uint32_t Q>
void score_tile(const AttentionTask& task, const QueryTile& tile, uint32_t first, uint32_t last) {
    for (uint32_t group = first / 16; group * 16 < last; group++) {
        const void* keys = task.keys[group];
        if (!keys) continue;  // no query of the tile looks here
        __m256 acc[Q][2];
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        for (size_t e = 0; e < task.head_dim; e++) {
            const __m256 low = load_kv<kHalf>(keys, 16 * e),
                         high = load_kv<kHalf>(keys, 16 * e + 8);
            VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
                const __m256 q = _mm256_broadcast_ss(tile.q[i] + e);
                acc[i][0] = _mm256_fmadd_ps(q, low, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(q, high, acc[i][1]);
            }
        }
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            _mm256_store_ps(tile.p[i] + 16 * group, acc[i][0]);
            _mm256_store_ps(tile.p[i] + 16 * group + 8, acc[i][1]);
        }
    }
}

// Turns the scores of one query into weights and gives their maximum and sum. Scores are there for
// whole key groups: those of positions that are not visible become -infinity, so their weight is 0.
void weigh(float* p, uint32_t begin, uint32_t end, float* max, float* sum) {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    const uint32_t first = begin / 16 * 16, last = (end + 15) / 16 * 16;
    for (uint32_t j = first; j < begin; j++) p[j] = hidden;
    for (uint32_t j = end; j < last; j++) p[j] = hidden;
    __m256 top = _mm256_load_ps(p + first);
    for (uint32_t j = first + 8; j < last; j += 8) top = _mm256_max_ps(top, _mm256_load_ps(p + j));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    *max = _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1))) + 0.0f;
    const __m256 most = _mm256_set1_ps(*max);
    __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (uint32_t j = first; j < last; j += 16) {
        VALAR_UNROLL for (int i = 0; i < 2; i++) {
            const __m256 weight = exp8(_mm256_sub_ps(_mm256_load_ps(p + j + 8 * i), most));
            lanes[i] = _mm256_add_ps(lanes[i], weight);
            _mm256_store_ps(p + j + 8 * i, weight);
        }
    }
    *sum = sum_of_lanes(lanes[0], lanes[1]);
}

// out_e += p_j * v_j,e for e0 <= e < e0 + 8 W, first <= j < last, of Q queries from `query` on.
template <bool kHalf, uint32_t Q, uint32_t W>
VALAR_FORCE_INLINE void add_values(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                                   size_t e0, uint32_t first, uint32_t last) {
    __m256 acc[Q][W];
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++)
        acc[i / W][i % W] = _mm256_loadu_ps(tile.out[query + i / W] + e0 + 8 * (i % W));
    for (uint32_t j = first; j < last; j++) {
        __m256 v[W];
        VALAR_UNROLL for (uint32_t w = 0; w < W; w++)
            v[w] = load_kv<kHalf>(task.values[j / 16], j % 16 * task.head_dim + e0 + 8 * w);
        VALAR_UNROLL for (uint32_t i = 0; i < Q; i++) {
            const __m256 p = _mm256_broadcast_ss(tile.p[query + i] + j);
            VALAR_UNROLL for (uint32_t w = 0; w < W; w++)
                acc[i][w] = _mm256_fmadd_ps(p, v[w], acc[i][w]);
        }
    }
    VALAR_UNROLL for (uint32_t i = 0; i < Q * W; i++)
        _mm256_storeu_ps(tile.out[query + i / W] + e0 + 8 * (i % W), acc[i / W][i % W]);
}

template <bool kHalf, uint32_t Q>
void add_value_range(const AttentionTask& task, const QueryTile& tile, uint32_t query,
                     uint32_t first, uint32_t last) {
    if (first >= last) return;
    constexpr uint32_t W = Q > 2 ? 2 : 4;
    size_t e = 0;
    for (; e + 8 * W <= task.head_dim; e += 8 * W)
        add_values<kHalf, Q, W>(task, tile, query, e, first, last);
    for (; e + 8 <= task.head_dim; e += 8)
        add_values<kHalf, Q, 1>(task, tile, query, e, first, last);
    for (; e < task.head_dim; e++)
        for (uint32_t i = query; i < query + Q; i++)
            for (uint32_t j = first; j < last; j++)
                tile.out[i][e] = fma_once(
                    tile.p[i][j],
                    scalar::read_kv(task.kv_type, task.values[j / 16], j % 16 * task.head_dim + e),
                    tile.out[i][e]);
}

constexpr AttentionParts attention_parts = {
    .queries = 4,
    .score = {{score_tile<true, 1>, score_tile<true, 2>, score_tile<true, 3>, score_tile<true, 4>},
              {score_tile<false, 1>, score_tile<false, 2>, score_tile<false, 3>,
               score_tile<false, 4>}},
    .weigh = weigh,
    .add_values = {{add_value_range<true, 1>, add_value_range<true, 2>, add_value_range<true, 3>,
                    add_value_range<true, 4>},
                   {add_value_range<false, 1>, add_value_range<false, 2>, add_value_range<false, 3>,
                    add_value_range<false, 4>}}};

void attention(const AttentionTask& task) { attend(attention_parts, task); }

void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n) {
    const float most = m > *max ? m : *max;
    const __m256 weights = exp8(_mm256_setr_ps(*max - most, m - most, 0, 0, 0, 0, 0, 0));
    const __m256 old_weight = _mm256_broadcastss_ps(_mm256_castps256_ps128(weights)),
                 new_weight = _mm256_permute_ps(_mm256_permute2f128_ps(weights, weights, 0), 0x55);
    *max = most;
    _mm_store_ss(sum, _mm_fmadd_ss(_mm_set_ss(l), _mm256_castps256_ps128(new_weight),
                                   _mm_set_ss(*sum * _mm256_cvtss_f32(old_weight))));
    size_t e = 0;
    for (; e + 8 <= n; e += 8)
        _mm256_storeu_ps(out + e,
                         _mm256_fmadd_ps(_mm256_loadu_ps(o + e), new_weight,
                                         _mm256_mul_ps(_mm256_loadu_ps(out + e), old_weight)));
    for (; e < n; e++)
        out[e] = fma_once(o[e], _mm256_cvtss_f32(new_weight),
                          out[e] * _mm256_cvtss_f32(old_weight));
}

constexpr Kernels kernels_with(const char* name, void (*matmul)(const MatmulTask&)) {
    return {
        .name = name,
        .quantize = quantize,
        .matmul = matmul,
        .rms_norm = rms_norm,
        .rope = rope,
        .scale = scale,
        .add = add,
        .add_scaled = add_scaled,
        .exp = exp_all,
        .silu_mul = silu_mul,
        .store_kv = store_kv,
        .expand_kv = expand_kv,
        .attention = attention,
        .attention_merge = attention_merge,
        .prefetches = true,
    };
}
constexpr Kernels kernels = kernels_with("avx2", matmul<Vnni::none>);
constexpr Kernels vnni_kernels = kernels_with("avxvnni", matmul<Vnni::vex>);
#if defined(VALAR_EVEX_VNNI)  // for tests: the same on a CPU that knows only AVX-512's encoding
constexpr Kernels evex_kernels = kernels_with("avxvnni", matmul<Vnni::evex>);
#endif

}  // namespace avx2

}  // namespace detail
}  // namespace v1
}  // namespace valar

VALAR_TARGET_END
#endif  // VALAR_X86_KERNELS

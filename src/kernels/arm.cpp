#include "prologue.hpp"

#include "kernels/lanes4.hpp"

#include <cstddef>

#if VALAR_NEON_KERNELS && !defined(VALAR_NO_INFERENCE)
// ---- NEON: widening products -----------------------------------------------------------------

namespace valar {
inline namespace v1 {
namespace detail {

namespace neon {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        const ActivationBlock* const* a;
        explicit Operands(const ActivationBlock* const* blocks) : a(blocks) {}
    };

    static VALAR_FORCE_INLINE void add_products(int16x8_t& low, int16x8_t& high, B16 w, B16 x) {
        low = vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
        high = vmlal_high_s8(high, w, x);
    }

    // Sixteen bits hold four products of codes of up to 6 bits (63 * 127 * 4), or two of 8 bits.
    template <class T, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& x, const Codes& codes,
                                                 I4 (&part)[N][C]) {
        const B16 w[4] = {load_quad<T, P, 4 * H>(codes), load_quad<T, P, 4 * H + 1>(codes),
                          load_quad<T, P, 4 * H + 2>(codes), load_quad<T, P, 4 * H + 3>(codes)};
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const int32x4_t four = vreinterpretq_s32_s8(load_bytes(x.a[c]->q + 16 * H));
            const B16 x0 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 0)),
                      x1 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 1)),
                      x2 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 2)),
                      x3 = vreinterpretq_s8_s32(vdupq_laneq_s32(four, 3));
            int16x8_t low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x0)),
                      high = vmull_high_s8(w[0], x0);
            add_products(low, high, w[1], x1);
            I4 low_sums, high_sums;
            if constexpr (T::layout.byte_bits() == 8) {
                low_sums = vpaddlq_s16(low);
                high_sums = vpaddlq_s16(high);
                low = vmull_s8(vget_low_s8(w[2]), vget_low_s8(x2));
                high = vmull_high_s8(w[2], x2);
                add_products(low, high, w[3], x3);
                low_sums = vpadalq_s16(low_sums, low);
                high_sums = vpadalq_s16(high_sums, high);
            } else {
                add_products(low, high, w[2], x2);
                add_products(low, high, w[3], x3);
                low_sums = vpaddlq_s16(low);
                high_sums = vpaddlq_s16(high);
            }
            I4& sum = part[N == 2 ? H : 0][c];
            sum = vaddq_s32(sum, vpaddq_s32(low_sums, high_sums));
        }
    }

    template <class T, bool P, int C, int N>
    static VALAR_FORCE_INLINE void multiply(const Operands<C>& x, const Codes& codes,
                                            I4 (&part)[N][C]) {
        multiply_half<T, P, 0>(x, codes, part);
        multiply_half<T, P, 1>(x, codes, part);
    }

    template <class T, bool P, int C>
    static void dot_tile(const std::byte* tile, const int8_t* values, size_t blocks,
                         const ActivationBlock* const* planes, size_t step, float* sums) {
        dot_blocks<Products, T, P, C>(tile, values, blocks, planes, step, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("neon");

}  // namespace neon

}  // namespace detail
}  // namespace v1
}  // namespace valar

// ---- NEON dotprod: four products and their sum in each lane ----------------------------------
//
// GNU compilers get the two instructions by name: clang before 16 has no intrinsics for them where
// the whole build does not have the feature.

#if !defined(__GNUC__)
#define VALAR_FLATTEN
#define VALAR_ARM_TARGET_DOTPROD ""
#define VALAR_ARM_TARGET_I8MM ""
#define VALAR_SDOT(sum, w, x, lane) sum = vdotq_laneq_s32(sum, w, x, lane)
#define VALAR_SMMLA(sum, w, x) sum = vmmlaq_s32(sum, w, x)
#else
// dot_blocks has the build's own instructions, so `multiply` cannot be inlined before dot_blocks is.
#define VALAR_FLATTEN __attribute__((flatten))
#if defined(__clang__)
#define VALAR_ARM_TARGET_DOTPROD "dotprod"
#define VALAR_ARM_TARGET_I8MM "dotprod,i8mm"
#else
#define VALAR_ARM_TARGET_DOTPROD "arch=armv8.2-a+dotprod"
#define VALAR_ARM_TARGET_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif
#define VALAR_SDOT(sum, w, x, lane) \
    __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(sum) : "w"(w), "w"(x))
#define VALAR_SMMLA(sum, w, x) __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x))
#endif

VALAR_TARGET_BEGIN(VALAR_ARM_TARGET_DOTPROD)

namespace valar {
inline namespace v1 {
namespace detail {

namespace dotprod {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        const ActivationBlock* const* a;
        explicit Operands(const ActivationBlock* const* blocks) : a(blocks) {}
    };

    template <class T, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& operands, const Codes& codes,
                                                 I4 (&part)[N][C]) {
        B16 x[C];
        VALAR_UNROLL for (int c = 0; c < C; c++) x[c] = load_bytes(operands.a[c]->q + 16 * H);
        I4(&sum)[C] = part[N == 2 ? H : 0];
        B16 w = load_quad<T, P, 4 * H>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 0);
        w = load_quad<T, P, 4 * H + 1>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 1);
        w = load_quad<T, P, 4 * H + 2>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 2);
        w = load_quad<T, P, 4 * H + 3>(codes);
        VALAR_UNROLL for (int c = 0; c < C; c++) VALAR_SDOT(sum[c], w, x[c], 3);
    }

    template <class T, bool P, int C, int N>
    static inline void multiply(const Operands<C>& x, const Codes& codes, I4 (&part)[N][C]) {
        multiply_half<T, P, 0>(x, codes, part);
        multiply_half<T, P, 1>(x, codes, part);
    }

    template <class T, bool P, int C>
    VALAR_FLATTEN static void dot_tile(const std::byte* tile, const int8_t* values, size_t blocks,
                                       const ActivationBlock* const* planes, size_t step,
                                       float* sums) {
        dot_blocks<Products, T, P, C>(tile, values, blocks, planes, step, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("dotprod");

}  // namespace dotprod

}  // namespace detail
}  // namespace v1
}  // namespace valar

VALAR_TARGET_END

// ---- NEON i8mm: two rows times two columns, eight products each, an instruction --------------

VALAR_TARGET_BEGIN(VALAR_ARM_TARGET_I8MM)

namespace valar {
inline namespace v1 {
namespace detail {

namespace i8mm {

using namespace lanes4;

struct Products {
    using Narrow = dotprod::Products;  // two instructions are needed to pair rows
    template <int C>
    struct Operands {  // eight values of column 2i, then of column 2i + 1
        B16 x[C / 2][4];
        explicit Operands(const ActivationBlock* const* a) {
            VALAR_UNROLL for (int i = 0; i < C; i++) {
                const int64x2_t even = vreinterpretq_s64_s8(load_bytes(a[i & ~1]->q + i % 2 * 16)),
                                odd = vreinterpretq_s64_s8(load_bytes(a[i | 1]->q + i % 2 * 16));
                x[i / 2][i % 2 * 2] = vreinterpretq_s8_s64(vzip1q_s64(even, odd));
                x[i / 2][i % 2 * 2 + 1] = vreinterpretq_s8_s64(vzip2q_s64(even, odd));
            }
        }
    };

    // Columns 8 J to 8 J + 7 of four rows. A sum is (row 0, row 1) x (column 2i, column 2i + 1).
    template <class T, bool P, int J, int C>
    static VALAR_FORCE_INLINE void multiply_step(const Operands<C>& operands, const Codes& codes,
                                                 I4 (&sum)[C / 2][2]) {
        const I4 first = vreinterpretq_s32_s8(load_quad<T, P, 2 * J>(codes)),
                 second = vreinterpretq_s32_s8(load_quad<T, P, 2 * J + 1>(codes));
        const B16 low = vreinterpretq_s8_s32(vzip1q_s32(first, second)),
                  high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
        VALAR_UNROLL for (int i = 0; i < C / 2; i++) {
            VALAR_SMMLA(sum[i][0], low, operands.x[i][J]);
            VALAR_SMMLA(sum[i][1], high, operands.x[i][J]);
        }
    }

    template <class T, bool P, int C, int N>
    static inline void multiply(const Operands<C>& x, const Codes& codes, I4 (&part)[N][C]) {
        I4 sum[C / 2][2];
        VALAR_UNROLL for (int i = 0; i < C; i++) sum[i / 2][i % 2] = int_splat(0);
        multiply_step<T, P, 0>(x, codes, sum);
        multiply_step<T, P, 1>(x, codes, sum);
        if constexpr (N == 2) take<0>(sum, part);
        multiply_step<T, P, 2>(x, codes, sum);
        multiply_step<T, P, 3>(x, codes, sum);
        take<N - 1>(sum, part);
    }

    template <int kPart, int C, int N>
    static VALAR_FORCE_INLINE void take(I4 (&sum)[C / 2][2], I4 (&part)[N][C]) {
        VALAR_UNROLL for (int i = 0; i < C / 2; i++) {
            I4 *even = &part[kPart][2 * i], *odd = even + 1;
            *even = int_add(*even, vuzp1q_s32(sum[i][0], sum[i][1]));
            *odd = int_add(*odd, vuzp2q_s32(sum[i][0], sum[i][1]));
            sum[i][0] = sum[i][1] = int_splat(0);
        }
    }

    template <class T, bool P, int C>
    VALAR_FLATTEN static void dot_tile(const std::byte* tile, const int8_t* values, size_t blocks,
                                       const ActivationBlock* const* planes, size_t step,
                                       float* sums) {
        dot_blocks<Products, T, P, C>(tile, values, blocks, planes, step, sums);
    }
};

constexpr Kernels kernels = kernels_with<Products>("i8mm");

}  // namespace i8mm

}  // namespace detail
}  // namespace v1
}  // namespace valar

VALAR_TARGET_END
#endif  // VALAR_NEON_KERNELS

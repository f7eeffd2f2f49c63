#include "prologue.hpp"

#include "kernels/lanes4.hpp"

#include <cstddef>
#include <cstdint>

#if VALAR_WASM_KERNELS && !defined(VALAR_NO_INFERENCE)
// ---- WASM SIMD128: products of 16 bits, added in pairs ---------------------------------------

namespace valar {
inline namespace v1 {
namespace detail {

namespace wasm {

using namespace lanes4;

struct Products {
    using Narrow = Products;
    template <int C>
    struct Operands {
        alignas(16) int16_t x[C][kActivationBlock];
        explicit Operands(const ActivationBlock* const* a) {
            VALAR_UNROLL for (int i = 0; i < 4 * C; i++)
                wasm_v128_store(x[i / 4] + i % 4 * 8, wasm_i16x8_load8x8(a[i / 4]->q + i % 4 * 8));
        }
    };

    template <class T, bool P, int G, int C>
    static VALAR_FORCE_INLINE void multiply_quad(const Operands<C>& operands, const Codes& codes,
                                                 I4 (&sum)[C][2]) {
        const B16 w = load_quad<T, P, G>(codes);
        const v128_t low = wasm_i16x8_extend_low_i8x16(w), high = wasm_i16x8_extend_high_i8x16(w);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            const v128_t x = wasm_v128_load64_splat(operands.x[c] + 4 * G);
            sum[c][0] = int_add(sum[c][0], wasm_i32x4_dot_i16x8(low, x));
            sum[c][1] = int_add(sum[c][1], wasm_i32x4_dot_i16x8(high, x));
        }
    }

    template <class T, bool P, int H, int C, int N>
    static VALAR_FORCE_INLINE void multiply_half(const Operands<C>& x, const Codes& codes,
                                                 I4 (&part)[N][C]) {
        I4 sum[C][2];
        VALAR_UNROLL for (int i = 0; i < 2 * C; i++) sum[i / 2][i % 2] = int_splat(0);
        multiply_quad<T, P, 4 * H>(x, codes, sum);
        multiply_quad<T, P, 4 * H + 1>(x, codes, sum);
        multiply_quad<T, P, 4 * H + 2>(x, codes, sum);
        multiply_quad<T, P, 4 * H + 3>(x, codes, sum);
        VALAR_UNROLL for (int c = 0; c < C; c++) {
            I4& all = part[N == 2 ? H : 0][c];
            all = int_add(
                all, int_add(even_lanes(sum[c][0], sum[c][1]), odd_lanes(sum[c][0], sum[c][1])));
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

constexpr Kernels kernels = kernels_with<Products>("wasm");

}  // namespace wasm

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_WASM_KERNELS

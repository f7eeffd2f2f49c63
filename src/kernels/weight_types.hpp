#pragma once

#include "gguf.hpp"

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Weight types ----------------------------------------------------------------------------
//
// A weight type is a struct: how its tiles are laid out, and how a block is taken out of a row as a
// file has it. A new one is such a struct and an entry in WeightTypes: every table, of layouts, of
// packing, of kernels, is expanded from that list.

enum class Scale : uint8_t { half, bfloat, single };  // as D, d and m are stored

struct PackedLayout {
    TensorType type;
    uint8_t bits;                    // of a code; of a value where float_bytes is set
    uint8_t bias = 0;                // weight = code - bias, or
    bool coded = false;              // weight = values[code], of 3 or 4 bits
    const int8_t* values = nullptr;  // (16), where codes have 3 bits the first 8 count
    bool minimum = false;            // m of the definition
    uint8_t sub_scales = 0;          // of a block: bytes under a super-block's scale
    bool two_scales = false;         // d of the first 16 values of a block, and of the last
    Scale scale = Scale::half;       // of D, d, m
    uint8_t float_bytes = 0;         // 0: quantized
    uint8_t blocks = 1;              // of a super-block

    // A second scale a row is stored where the minimum's is; two sums a block are kept apart.
    constexpr bool second_scale() const { return minimum || two_scales; }
    constexpr bool two_sums() const { return sub_scales == 2 || two_scales; }
    // Rare types have fewer kernels for AVX-VNNI, or compiling would take much longer.
    constexpr bool rare() const { return bits <= 3 || (coded && two_sums()); }
    // Unsigned bytes, as instructions want them: the code, or a value and what makes it unsigned.
    constexpr int byte_bits() const { return coded ? 8 : bits; }
    constexpr int byte_bias() const { return coded ? 128 : bias; }
    constexpr size_t scale_width() const { return scale == Scale::single ? 4 : 2; }
    constexpr size_t scales() const {  // D and Dmin, or d and m
        return float_bytes ? 0 : size_t{packed_rows} * scale_width() * (second_scale() ? 2 : 1);
    }
    constexpr size_t header_bytes() const { return sub_scales ? scales() : 0; }
    constexpr size_t scale_bytes() const {  // before a block's codes
        return sub_scales ? size_t{16} * sub_scales * (minimum ? 2 : 1) : scales();
    }
    constexpr size_t block_bytes() const { return scale_bytes() + size_t{bits} * 64; }
    constexpr size_t super_bytes() const { return header_bytes() + blocks * block_bytes(); }
};

// One block of a row as the GGUF file has it, decoded as far as all types are alike.
struct SourceBlock {
    uint32_t words[8];  // codes, four a word
    uint32_t d, m;      // d, m or D, Dmin, as the layout stores them
    uint8_t sub[4];     // sub-scales, behind them as many of the minimum
};

// The values of 4-bit codes, where a type has a table of them. Those of the grids are what a value
// of a code book means; the upper half has the other sign (IQ1: the other sign of the eighth that
// is added to each).
inline constexpr int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr int8_t fp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
inline constexpr int8_t q3_k_values[16] = {-4, -3, -2, -1, 0, 1, 2, 3};
inline constexpr int8_t iq1_values[16] = {-7, 1, 9, 0, -9, -1, 7};
inline constexpr int8_t iq2_values[16] = {8, 25, 43, 0, -8, -25, -43};
inline constexpr int8_t iq3_xxs_values[16] = {4,  12,  20,  28,  36,  44,  52,  62,
                                              -4, -12, -20, -28, -36, -44, -52, -62};
inline constexpr int8_t iq3_s_values[16] = {1,  3,  5,  7,  9,  11,  13,  15,
                                            -1, -3, -5, -7, -9, -11, -13, -15};

// Codes with a table of values under two sub-scales a block: many types fit, so that one set of
// kernels for each number of bits serves them all.
constexpr PackedLayout table_layout(TensorType type, uint8_t bits, const int8_t* values) {
    return {.type = type,
            .bits = bits,
            .coded = true,
            .values = values,
            .sub_scales = 2,
            .scale = Scale::single,
            .blocks = 8};
}

// clang-format off
struct Q4_0 {
    static constexpr PackedLayout layout{.type = TensorType::q4_0, .bits = 4, .bias = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q4_1 {
    static constexpr PackedLayout layout{.type = TensorType::q4_1, .bits = 4, .minimum = true};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q5_0 {
    static constexpr PackedLayout layout{.type = TensorType::q5_0, .bits = 5, .bias = 16};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q5_1 {
    static constexpr PackedLayout layout{.type = TensorType::q5_1, .bits = 5, .minimum = true};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q8_0 {
    static constexpr PackedLayout layout{.type = TensorType::q8_0, .bits = 8, .bias = 128};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q4_K {
    static constexpr PackedLayout layout{
        .type = TensorType::q4_k, .bits = 4, .minimum = true, .sub_scales = 1, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q5_K {
    static constexpr PackedLayout layout{
        .type = TensorType::q5_k, .bits = 5, .minimum = true, .sub_scales = 1, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q6_K {
    static constexpr PackedLayout layout{
        .type = TensorType::q6_k, .bits = 6, .bias = 32, .sub_scales = 2, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ4_NL {
    static constexpr PackedLayout layout{
        .type = TensorType::iq4_nl, .bits = 4, .coded = true, .values = iq4_values};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct MXFP4 {
    static constexpr PackedLayout layout{
        .type = TensorType::mxfp4, .bits = 4, .coded = true, .values = fp4_values,
        .scale = Scale::bfloat};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct NVFP4 {
    static constexpr PackedLayout layout{
        .type = TensorType::nvfp4, .bits = 4, .coded = true, .values = fp4_values,
        .two_scales = true, .blocks = 2};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q2_K {
    static constexpr PackedLayout layout{
        .type = TensorType::q2_k, .bits = 2, .minimum = true, .sub_scales = 2, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct Q3_K {
    static constexpr PackedLayout layout = table_layout(TensorType::q3_k, 3, q3_k_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ4_XS {
    static constexpr PackedLayout layout = table_layout(TensorType::iq4_xs, 4, iq4_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ3_S {
    static constexpr PackedLayout layout = table_layout(TensorType::iq3_s, 4, iq3_s_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ3_XXS {
    static constexpr PackedLayout layout = table_layout(TensorType::iq3_xxs, 4, iq3_xxs_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ2_S {
    static constexpr PackedLayout layout = table_layout(TensorType::iq2_s, 3, iq2_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ2_XS {
    static constexpr PackedLayout layout = table_layout(TensorType::iq2_xs, 3, iq2_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ2_XXS {
    static constexpr PackedLayout layout = table_layout(TensorType::iq2_xxs, 3, iq2_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ1_S {
    static constexpr PackedLayout layout = table_layout(TensorType::iq1_s, 3, iq1_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct IQ1_M {
    static constexpr PackedLayout layout = table_layout(TensorType::iq1_m, 3, iq1_values);
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct TQ1_0 {
    static constexpr PackedLayout layout{
        .type = TensorType::tq1_0, .bits = 2, .bias = 1, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct TQ2_0 {
    static constexpr PackedLayout layout{
        .type = TensorType::tq2_0, .bits = 2, .bias = 1, .blocks = 8};
    static void unpack(const std::byte* row, size_t block, SourceBlock& out);
};
struct F32 {
    static constexpr PackedLayout layout{.type = TensorType::f32, .bits = 32, .float_bytes = 4};
};
struct F16 {
    static constexpr PackedLayout layout{.type = TensorType::f16, .bits = 16, .float_bytes = 2};
};
struct BF16 {
    static constexpr PackedLayout layout{.type = TensorType::bf16, .bits = 16, .float_bytes = 2};
};
// clang-format on

template <class... T>
struct Types {};
using WeightTypes =
    Types<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, NVFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS,
          IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S, IQ1_M, TQ1_0, TQ2_0, F32, F16, BF16>;

// A table with one row a weight type: Row<T>::value.
template <class Value, template <class> class Row, class List = WeightTypes>
struct TableOf;
template <class Value, template <class> class Row, class... T>
struct TableOf<Value, Row, Types<T...>> {
    static constexpr Value rows[] = {Row<T>::value...};
};

// The first weight type that `alike` says T may stand for: types whose kernels would be the same
// share those of one.
using Alike = bool (*)(const PackedLayout&, const PackedLayout&);
template <class T, Alike alike, class List = WeightTypes>
struct FirstAlike;
template <class T, Alike alike, class First, class... Rest>
struct FirstAlike<T, alike, Types<First, Rest...>>
    : std::conditional_t<alike(First::layout, T::layout), std::type_identity<First>,
                         FirstAlike<T, alike, Types<Rest...>>> {};

// Types of one tile layout: which values a table has matters to no kernel.
constexpr bool same_tiles(const PackedLayout& a, const PackedLayout& b) {
    if (a.float_bytes || b.float_bytes) return a.type == b.type;
    return a.bits == b.bits && a.byte_bias() == b.byte_bias() && a.coded == b.coded &&
           a.minimum == b.minimum && a.two_scales == b.two_scales && a.sub_scales == b.sub_scales &&
           a.scale == b.scale;
}
template <class T>
using TilesOf = typename FirstAlike<T, same_tiles>::type;

template <class T>
struct LayoutOf {
    static constexpr PackedLayout value = T::layout;
};
inline constexpr auto& packed_layouts = TableOf<PackedLayout, LayoutOf>::rows;

}  // namespace detail
}  // namespace v1
}  // namespace valar

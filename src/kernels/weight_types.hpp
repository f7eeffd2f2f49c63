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

struct PackedLayout {
    TensorType type;
    uint8_t bits;             // of a code; of a value where float_bytes is set
    uint8_t bias = 0;         // weight = code - bias
    bool minimum = false;     // m of the definition
    uint8_t sub_scales = 0;   // of a block: bytes under a super-block's scale
    uint8_t float_bytes = 0;  // 0: quantized
    uint8_t blocks = 1;       // of a super-block

    constexpr size_t scales() const {  // D and Dmin, or d and m
        return float_bytes ? 0 : size_t{32} * (minimum ? 2 : 1);
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
    uint16_t d, m;      // binary16: d, m or D, Dmin
    uint8_t sub[4];     // sub-scales, behind them as many of the minimum
};

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
using WeightTypes = Types<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, F32, F16, BF16>;

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

template <class T>
struct LayoutOf {
    static constexpr PackedLayout value = T::layout;
};
inline constexpr auto& packed_layouts = TableOf<PackedLayout, LayoutOf>::rows;

}  // namespace detail
}  // namespace v1
}  // namespace valar

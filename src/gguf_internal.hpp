// >>gguf
// What the file says of packed tensors. How they are laid out is the business of >>kernels, which
// asserts that its layouts have the sizes below.
#pragma once

#include "gguf.hpp"

#include <cstddef>
#include <cstdint>

namespace valar {
inline namespace v1 {
namespace detail {

/// Version of the packed layouts: the value of the key `valar.packed` of a file with such tensors.
inline constexpr uint32_t packed_version = 1;
/// Set in the type of a packed tensor, so that no other program takes it for what it is not.
inline constexpr uint32_t packed_type_bit = 1u << 16;

/// Bytes of a tile's part that holds one block of each of its packed_rows rows.
struct PackedType {
    TensorType type;
    uint32_t tile_block_bytes;
};
// clang-format off
inline constexpr PackedType packed_types[] = {
    {TensorType::f32, 64},    {TensorType::f16, 32},    {TensorType::bf16, 32},
    {TensorType::q4_0, 288},  {TensorType::q4_1, 320},  {TensorType::q5_0, 352},
    {TensorType::q5_1, 384},  {TensorType::q8_0, 544},  {TensorType::q4_k, 2368},
    {TensorType::q5_k, 2880}, {TensorType::q6_k, 3360},
    {TensorType::iq4_nl, 288}, {TensorType::mxfp4, 288}, {TensorType::nvfp4, 640},
    {TensorType::q2_k, 1600}, {TensorType::q3_k, 1856}, {TensorType::iq4_xs, 2368},
    {TensorType::iq3_s, 2368}, {TensorType::iq3_xxs, 2368}, {TensorType::iq2_s, 1856},
    {TensorType::iq2_xs, 1856}, {TensorType::iq2_xxs, 1856}, {TensorType::iq1_s, 1856},
    {TensorType::iq1_m, 1856}, {TensorType::tq1_0, 1280}, {TensorType::tq2_0, 1280},
};
// clang-format on

/// The types of the tensors that a model's matrices may have.
struct MatrixTypes {
    TensorType types[sizeof packed_types / sizeof packed_types[0]] = {};
    constexpr MatrixTypes() {
        for (size_t i = 0; const PackedType& packed : packed_types) types[i++] = packed.type;
    }
};
inline constexpr MatrixTypes matrix_types;

constexpr uint32_t tile_block_bytes(TensorType type) {  // 0: never packed
    for (const PackedType& packed : packed_types)
        if (packed.type == type) return packed.tile_block_bytes;
    return 0;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "kernels/exact.hpp"
#include "kernels/weight_types.hpp"

#include <cstddef>
#include <cstdint>
#include <iterator>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Packed layouts --------------------------------------------------------------------------
//
// A weight is a code of `bits` bits; w = code - bias, or what the code stands for in a table of
// values. A block is 32 columns of 16 rows, in 8 quads of 4 columns. Word r (4 bytes) of a 64-byte vector holds one quad of row r, one byte a column:
//     scales   of Q4_0 Q5_0 Q8_0: d[16], Q4_1 Q5_1: d[16] m[16], binary16
//              of Q4_K Q5_K: sc[16] mn[16], Q6_K: sc0[16] sc1[16], a byte each
//              of IQ4_NL: d[16], NVFP4: d0[16] d1[16], binary16, MXFP4: d[16], bfloat16
//              of TQ1_0 TQ2_0: d[16], binary16, the same in all of a super-block
//              of IQ4_XS Q3_K and the grids (IQ1 to IQ3): sc0[16] sc1[16]
//              of Q2_K: sc0[16] sc1[16] mn0[16] mn1[16]
//     codes    8 bits: 8 vectors, quad by quad; 2 and 3 bits: 2 vectors of 4 quads, two bits each,
//              lowest first; else 4 vectors: vector j holds the low four bits of quad 2j in the low halves of its
//              bytes and of quad 2j+1 in the high halves
//     high     3 and 5 bits: 1 vector, bit g of a byte belongs to quad g; 6 bits: 2 vectors, quads 0..3
//              and 4..7, two bits each, lowest first
// Types with super-blocks write before each 8 blocks a header: D[16], Q2_K, Q4_K and Q5_K also
// Dmin[16], binary16; of those whose codes stand for values of a table, D is binary32. Tiles are
// padded to 64 bytes. Unsigned codes suit every integer instruction: the bias is taken out afterwards
// through ActivationBlock::sum.

inline const PackedLayout* find_layout(TensorType type) {
    for (const PackedLayout& layout : packed_layouts)
        if (layout.type == type) return &layout;
    return nullptr;
}

// Every layout has the size that a model file states for it (>>gguf).
constexpr bool layouts_have_stated_sizes() {
    for (const PackedLayout& layout : packed_layouts) {
        const size_t bytes = layout.float_bytes ? size_t{layout.float_bytes} * kTileRows
                                                : layout.super_bytes();
        if (tile_block_bytes(layout.type) != bytes) return false;
    }
    return std::size(packed_layouts) == std::size(packed_types);
}
static_assert(layouts_have_stated_sizes());

inline const std::byte* packed_tile(const PackedMatrix& matrix, size_t tile) {
    return matrix.data + tile * packed_tile_bytes(matrix.type, matrix.cols);
}

// The codes of one row of a block, four a word.
inline void load_codes(const PackedLayout& layout, const std::byte* codes, uint32_t row,
                       uint32_t words[8]) {
    codes += 4 * row;
    if (layout.bits == 8) {
        for (uint32_t g = 0; g < 8; g++) words[g] = load32(codes + 64 * g);
        return;
    }
    if (layout.bits == 2) {
        for (uint32_t g = 0; g < 8; g++)
            words[g] = load32(codes + g / 4 * 64) >> g % 4 * 2 & 0x03030303u;
        return;
    }
    if (layout.bits == 3) {
        for (uint32_t g = 0; g < 8; g++)
            words[g] = (load32(codes + g / 4 * 64) >> g % 4 * 2 & 0x03030303u) |
                       (load32(codes + 128) >> g & 0x01010101u) << 2;
        return;
    }
    for (uint32_t g = 0; g < 8; g++)
        words[g] = load32(codes + g / 2 * 64) >> g % 2 * 4 & 0x0f0f0f0fu;
    const uint32_t high = layout.bits - 4u, mask = high == 1 ? 0x01010101u : 0x03030303u;
    for (uint32_t g = 0; high && g < 8; g++)
        words[g] |= (load32(codes + 256 + g * high / 8 * 64) >> g * high % 8 & mask) << 4;
}

inline float scale_value(Scale format, const std::byte* scales, uint32_t index) {
    if (format == Scale::single) return bit_cast<float>(load32(scales + 4 * index));
    const uint16_t bits = load16(scales + 2 * index);
    return format == Scale::half ? half_value(bits) : bfloat_value(bits);
}

inline float packed_float(TensorType type, const std::byte* tile, size_t index) {
    if (type == TensorType::f32) return bit_cast<float>(load32(tile + 4 * index));
    const uint16_t bits = load16(tile + 2 * index);
    return type == TensorType::f16 ? half_value(bits) : bfloat_value(bits);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "kernels/grids.hpp"
#include "kernels/layout.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

inline void store_codes(const PackedLayout& layout, std::byte* codes, uint32_t row,
                        const uint32_t words[8]) {
    codes += 4 * row;
    if (layout.bits == 8) {
        for (uint32_t g = 0; g < 8; g++) store32(codes + 64 * g, words[g]);
        return;
    }
    if (layout.bits <= 3) {
        uint32_t low[2] = {}, high = 0;
        for (uint32_t g = 0; g < 8; g++) {
            low[g / 4] |= (words[g] & 0x03030303u) << g % 4 * 2;
            high |= (words[g] >> 2 & 0x01010101u) << g;
        }
        for (uint32_t j = 0; j < 2; j++) store32(codes + 64 * j, low[j]);
        if (layout.bits == 3) store32(codes + 128, high);
        return;
    }
    for (uint32_t j = 0; j < 4; j++)
        store32(codes + 64 * j, (words[2 * j] & 0x0f0f0f0fu) | (words[2 * j + 1] & 0x0f0f0f0fu)
                                                                   << 4);
    const uint32_t high = layout.bits - 4u;
    uint32_t bits[2] = {};
    for (uint32_t g = 0; high && g < 8; g++)
        bits[g * high / 8] |= (words[g] >> 4 & 0x03030303u) << g * high % 8;
    for (uint32_t i = 0; i < high; i++) store32(codes + 256 + 64 * i, bits[i]);
}

// The k-quants' eight 6-bit scales and minimums in 12 bytes.
inline void read_k_scales(const uint8_t* q, size_t s, SourceBlock& out) {
    if (s < 4) {
        out.sub[0] = q[s] & 63;
        out.sub[1] = q[s + 4] & 63;
    } else {
        out.sub[0] = static_cast<uint8_t>((q[s + 4] & 15) | (q[s - 4] >> 6) << 4);
        out.sub[1] = static_cast<uint8_t>(q[s + 4] >> 4 | (q[s] >> 6) << 4);
    }
}

inline void store_scale(const PackedLayout& layout, std::byte* at, uint32_t bits) {
    if (layout.scale == Scale::single) store32(at, bits);
    else store16(at, static_cast<uint16_t>(bits));
}

inline void read_nibbles(const std::byte* at, SourceBlock& out) {  // 16 bytes: columns i and i + 16
    for (uint32_t g = 0; g < 4; g++) {
        const uint32_t word = load32(at + 4 * g);
        out.words[g] = word & 0x0f0f0f0fu;
        out.words[g + 4] = word >> 4 & 0x0f0f0f0fu;
    }
}

inline void add_fifth_bits(uint32_t bits, SourceBlock& out) {
    for (uint32_t g = 0; g < 8; g++)  // spreads four bits over four bytes
        out.words[g] |= ((bits >> 4 * g & 15) * 0x204081u & 0x01010101u) << 4;
}

inline uint32_t byte_at(const std::byte* at) { return static_cast<uint32_t>(*at); }

// A binary16 scale times a power of two, exactly, as the bits of a binary32 number.
inline uint32_t bits_of_half(uint16_t half, float unit) {
    return bit_cast<uint32_t>(half_value(half) * unit);
}

inline uint32_t half_of_e4m3(uint32_t byte) {
    const uint32_t exponent = byte >> 3 & 15, fraction = byte & 7;
    if (byte == 127) return 0;
    const float value = exponent ? static_cast<float>(8 + fraction) *
                                       static_cast<float>(1u << exponent) * 0x1p-11f
                                 : static_cast<float>(fraction) * 0x1p-10f;
    return half_bits(value);
}

// What the grid types write as s means 2 s + 1 units.
inline void set_odd_scales(uint32_t s, SourceBlock& out) {
    out.sub[0] = out.sub[1] = static_cast<uint8_t>(2 * s + 1);
}
inline void set_pair_of_scales(uint32_t both, SourceBlock& out) {
    out.sub[0] = static_cast<uint8_t>(2 * (both & 15) + 1);
    out.sub[1] = static_cast<uint8_t>(2 * (both >> 4) + 1);
}

inline void set_code(SourceBlock& out, size_t column, uint32_t code) {
    const uint32_t shift = static_cast<uint32_t>(column % 4 * 8);
    out.words[column / 4] = (shift ? out.words[column / 4] : 0) | code << shift;
}

// Seven signs, and an eighth that makes their number even.
inline uint32_t eight_signs(uint32_t seven) {
    seven &= 127;
    return seven | static_cast<uint32_t>(std::popcount(seven) & 1) << 7;
}

// An entry of a code book, the i-th of the block, with signs: a code's highest bit.
inline void set_eight(uint32_t entry, uint32_t signs, size_t i, SourceBlock& out) {
    for (uint32_t j = 0; j < 8; j++)
        set_code(out, 8 * i + j, (entry >> 2 * j & 3) | (signs >> j & 1) << 2);
}
inline void set_four(uint32_t entry, uint32_t signs, size_t i, SourceBlock& out) {
    for (uint32_t j = 0; j < 4; j++)
        set_code(out, 4 * i + j, (entry >> 4 * j & 7) | (signs >> j & 1) << 3);
}

// Scales, minimums and low four bits of block s of a super-block of Q4_K or Q5_K; these four bits
// begin at `codes`.
inline void read_k_block(const std::byte* at, size_t codes, size_t s, SourceBlock& out) {
    out.d = load16(at);
    out.m = load16(at + 2);
    read_k_scales(reinterpret_cast<const uint8_t*>(at) + 4, s, out);
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] = load32(at + codes + s / 2 * 32 + 4 * g) >> s % 2 * 4 & 0x0f0f0f0fu;
}

}  // namespace

void Q4_0::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 18;
    out.d = load16(at);
    read_nibbles(at + 2, out);
}

void Q4_1::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 20;
    out.d = load16(at);
    out.m = load16(at + 2);
    read_nibbles(at + 4, out);
}

void Q5_0::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 22;
    out.d = load16(at);
    read_nibbles(at + 6, out);
    add_fifth_bits(load32(at + 2), out);
}

void Q5_1::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 24;
    out.d = load16(at);
    out.m = load16(at + 2);
    read_nibbles(at + 8, out);
    add_fifth_bits(load32(at + 4), out);
}

void Q8_0::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 34;
    out.d = load16(at);
    for (uint32_t g = 0; g < 8; g++) out.words[g] = load32(at + 2 + 4 * g) ^ 0x80808080u;
}

void Q4_K::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    read_k_block(row + block / 8 * 144, 16, block % 8, out);
}

void Q5_K::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 176;
    read_k_block(at, 48, block % 8, out);
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] |= (load32(at + 16 + 4 * g) >> block % 8 & 0x01010101u) << 4;
}

void Q6_K::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 210;
    const size_t s = block % 8;
    out.d = load16(at + 208);
    for (size_t i = 0; i < 2; i++) out.sub[i] = static_cast<uint8_t>(at[192 + 2 * s + i]);
    const std::byte* low = at + s / 4 * 64 + s % 2 * 32;
    const std::byte* high = at + 128 + s / 4 * 32;
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] = (load32(low + 4 * g) >> s % 4 / 2 * 4 & 0x0f0f0f0fu) |
                       (load32(high + 4 * g) >> s % 4 * 2 & 0x03030303u) << 4;
}

void IQ4_NL::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 18;
    out.d = load16(at);
    read_nibbles(at + 2, out);
}

// The byte e means 2^(e - 128): half of what E8M0 means, as the values are doubled.
void MXFP4::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block * 17;
    const uint32_t e = byte_at(at);
    out.d = e < 2 ? 0x20u << e : (e - 1) << 7;  // bfloat16
    read_nibbles(at + 1, out);
}

// The scale's byte is E4M3 without a sign, halved as the values are doubled; 127 counts as zero. A
// block of the file has four parts of 16 values, each with a scale of its own.
void NVFP4::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 2 * 36;
    for (size_t i = 0; i < 2; i++) {
        const size_t part = block % 2 * 2 + i;
        (i ? out.m : out.d) = half_of_e4m3(byte_at(at + part));
        for (size_t g = 0; g < 2; g++) {
            const uint32_t word = load32(at + 4 + 8 * part + 4 * g);
            out.words[4 * i + g] = word & 0x0f0f0f0fu;
            out.words[4 * i + 2 + g] = word >> 4 & 0x0f0f0f0fu;
        }
    }
}

void Q2_K::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 84;
    const size_t s = block % 8;
    out.d = load16(at + 80);
    out.m = load16(at + 82);
    for (size_t i = 0; i < 2; i++) {
        const uint32_t both = byte_at(at + 2 * s + i);
        out.sub[i] = static_cast<uint8_t>(both & 15);
        out.sub[2 + i] = static_cast<uint8_t>(both >> 4);
    }
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] = load32(at + 16 + s / 4 * 32 + 4 * g) >> s % 4 * 2 & 0x03030303u;
}

// Sixteen scales of 6 bits: the low four in 8 bytes, the high two in 4.
void Q3_K::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte *at = row + block / 8 * 110, *scales = at + 96;
    const size_t s = block % 8;
    out.d = bits_of_half(load16(at + 108), 1.0f);
    for (size_t i = 0; i < 2; i++) {
        const size_t j = 2 * s + i;
        const uint32_t low = byte_at(scales + j % 8) >> j / 8 * 4 & 15,
                       high = byte_at(scales + 8 + j % 4) >> j / 4 * 2 & 3;
        out.sub[i] = static_cast<uint8_t>((low | high << 4) - 32);
    }
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] = (load32(at + 32 + s / 4 * 32 + 4 * g) >> s % 4 * 2 & 0x03030303u) |
                       (load32(at + 4 * g) >> s & 0x01010101u) << 2;
}

void IQ4_XS::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 136;
    const size_t s = block % 8;
    const uint32_t low = byte_at(at + 4 + s / 2) >> s % 2 * 4 & 15,
                   high = uint32_t{load16(at + 2)} >> 2 * s & 3;
    out.d = bits_of_half(load16(at), 1.0f);
    out.sub[0] = out.sub[1] = static_cast<uint8_t>((low | high << 4) - 32);
    read_nibbles(at + 8 + 16 * s, out);
}

void IQ3_S::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 110;
    const size_t s = block % 8;
    out.d = bits_of_half(load16(at), 1.0f);
    set_odd_scales(byte_at(at + 106 + s / 2) >> s % 2 * 4 & 15, out);
    for (size_t i = 0; i < 8; i++) {
        const uint32_t entry = byte_at(at + 2 + 8 * s + i) | (byte_at(at + 66 + s) >> i & 1) << 8;
        set_four(iq3_s_grid[entry], byte_at(at + 74 + 4 * s + i / 2) >> i % 2 * 4, i, out);
    }
}

void IQ3_XXS::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 98;
    const size_t s = block % 8;
    const uint32_t rest = load32(at + 66 + 4 * s);
    out.d = bits_of_half(load16(at), 0.25f);
    set_odd_scales(rest >> 28, out);
    for (size_t i = 0; i < 8; i++)
        set_four(iq3_xxs_grid[byte_at(at + 2 + 8 * s + i)],
                 eight_signs(rest >> i / 2 * 7) >> i % 2 * 4, i, out);
}

void IQ2_S::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 82;
    const size_t s = block % 8;
    out.d = bits_of_half(load16(at), 0.125f);
    set_pair_of_scales(byte_at(at + 74 + s), out);
    for (size_t i = 0; i < 4; i++) {
        const uint32_t entry = byte_at(at + 2 + 4 * s + i) | (byte_at(at + 66 + s) >> 2 * i & 3)
                                                                 << 8;
        set_eight(iq2_s_grid[entry], byte_at(at + 34 + 4 * s + i), i, out);
    }
}

void IQ2_XS::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 74;
    const size_t s = block % 8;
    out.d = bits_of_half(load16(at), 0.125f);
    set_pair_of_scales(byte_at(at + 66 + s), out);
    for (size_t i = 0; i < 4; i++) {
        const uint32_t entry = load16(at + 2 + 8 * s + 2 * i);
        set_eight(iq2_xs_grid[entry & 511], eight_signs(entry >> 9), i, out);
    }
}

void IQ2_XXS::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte *at = row + block / 8 * 66, *entries = at + 2 + block % 8 * 8;
    const uint32_t rest = load32(entries + 4);
    out.d = bits_of_half(load16(at), 0.125f);
    set_odd_scales(rest >> 28, out);
    for (size_t i = 0; i < 4; i++)
        set_eight(iq2_xxs_grid[byte_at(entries + i)], eight_signs(rest >> 7 * i), i, out);
}

void IQ1_S::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 50;
    const size_t s = block % 8;
    const uint32_t rest = load16(at + 34 + 2 * s);
    out.d = bits_of_half(load16(at), 0.125f);
    set_odd_scales(rest >> 12 & 7, out);
    for (size_t i = 0; i < 4; i++) {
        const uint32_t entry = byte_at(at + 2 + 4 * s + i) | (rest >> 3 * i & 7) << 8;
        set_eight(iq1_grid[entry], rest >> 15 ? 255 : 0, i, out);
    }
}

// The binary16 scale lies in the upper halves of the last bytes of four pairs.
void IQ1_M::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte *at = row + block / 8 * 56, *scales = at + 48;
    const size_t s = block % 8;
    uint32_t half = 0;
    for (size_t i = 0; i < 4; i++) half |= uint32_t{load16(scales + 2 * i)} >> 12 << 4 * i;
    out.d = bits_of_half(static_cast<uint16_t>(half), 0.125f);
    const uint32_t both = uint32_t{load16(scales + s / 2 * 2)} >> s % 2 * 6;
    for (size_t i = 0; i < 2; i++) out.sub[i] = static_cast<uint8_t>(2 * (both >> 3 * i & 7) + 1);
    for (size_t i = 0; i < 4; i++) {
        const uint32_t high = byte_at(at + 32 + 2 * s + i / 2) >> i % 2 * 4;
        const uint32_t entry = byte_at(at + 4 * s + i) | (high & 7) << 8;
        set_eight(iq1_grid[entry], high & 8 ? 255 : 0, i, out);
    }
}

// Five digits of base 3 a byte, as a fraction of 256: times 3^n, the next digit is what would carry
// over. 32 bytes have the digits of the first 160 values, 16 of the next 80, 4 of the last 16.
void TQ1_0::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    constexpr uint32_t powers[] = {1, 3, 9, 27, 81};
    const std::byte* at = row + block / 8 * 54;
    const size_t s = block % 8;
    out.d = load16(at + 52);
    for (size_t i = 0; i < kActivationBlock; i++) {
        const size_t value = 32 * s + i;
        const size_t digit = value < 160 ? s : value < 240 ? (value - 160) / 16 : (value - 240) / 4;
        const size_t byte = value < 160 ? i : value < 240 ? 32 + value % 16 : 48 + value % 4;
        const uint32_t fraction = byte_at(at + byte) * powers[digit] & 255;
        set_code(out, i, fraction * 3 >> 8);
    }
}

void TQ2_0::unpack(const std::byte* row, size_t block, SourceBlock& out) {
    const std::byte* at = row + block / 8 * 66;
    const size_t s = block % 8;
    out.d = load16(at + 64);
    for (uint32_t g = 0; g < 8; g++)
        out.words[g] = load32(at + s / 4 * 32 + 4 * g) >> s % 4 * 2 & 0x03030303u;
}

namespace {

// One function a type: with the layout a constant, the loops below have no branches left.
template <class T>
void pack_tile(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
               std::byte* out) {
    constexpr const PackedLayout& layout = T::layout;
    constexpr size_t width = layout.scale_width();
    constexpr uint32_t sub_bytes = layout.sub_scales * (layout.minimum ? 2u : 1u);
    for (size_t b = 0; b < cols / kActivationBlock; b++) {
        std::byte* header = out;
        if (b % layout.blocks == 0) out += layout.header_bytes();
        else header = nullptr;
        for (uint32_t r = 0; r < rows; r++) {
            SourceBlock block;
            T::unpack(source + r * row_bytes, b, block);
            store_codes(layout, out + layout.scale_bytes(), r, block.words);
            std::byte* scales = layout.header_bytes() ? header : out;
            if (scales) store_scale(layout, scales + width * r, block.d);
            if (scales && layout.second_scale())
                store_scale(layout, scales + width * (kTileRows + r), block.m);
            for (uint32_t i = 0; i < sub_bytes; i++) out[16 * i + r] = std::byte{block.sub[i]};
        }
        out += layout.block_bytes();
    }
}

// A few columns of every row at a time: rows that lie a power of two apart share few cache lines.
template <size_t bytes>
void pack_float_tile(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
                     std::byte* out) {
    constexpr size_t piece = 32;
    for (size_t first = 0; first < cols; first += piece)
        for (uint32_t r = 0; r < rows; r++)
            for (size_t c = first; c < std::min(cols, first + piece); c++)
                std::memcpy(out + (c * kTileRows + r) * bytes, source + r * row_bytes + c * bytes,
                            bytes);
}

using PackTile = void (*)(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
                          std::byte* out);
template <class T>
constexpr PackTile pack_function() {
    if constexpr (T::layout.float_bytes != 0) return pack_float_tile<T::layout.float_bytes>;
    else return pack_tile<T>;
}
template <class T>
struct PackTileOf {
    static constexpr PackTile value = pack_function<T>();
};

size_t used_tile_bytes(const PackedLayout& layout, uint32_t cols) {  // without the padding
    if (layout.float_bytes) return size_t{cols} * layout.float_bytes * kTileRows;
    return size_t{cols} / (layout.blocks * kActivationBlock) * layout.super_bytes();
}

}  // namespace

bool kernel_type_supported(TensorType type) { return find_layout(type) != nullptr; }

uint64_t packed_tile_bytes(TensorType type, uint32_t cols) {
    const PackedLayout* layout = find_layout(type);
    if (!layout) return 0;
    const uint64_t used = used_tile_bytes(*layout, cols);
    return (used + packed_alignment - 1) / packed_alignment * packed_alignment;
}

void pack_tiles(TensorType type, uint32_t rows, uint32_t cols, const std::byte* source,
                uint32_t first_tile, uint32_t last_tile, std::byte* out) {
    const PackedLayout& layout = *find_layout(type);
    const size_t tile_bytes = static_cast<size_t>(packed_tile_bytes(type, cols));
    const TypeInfo& info = *type_info(type);
    const size_t row_bytes = size_t{cols} / info.block_size * info.block_bytes;
    const size_t used = used_tile_bytes(layout, cols);
    for (uint32_t tile = first_tile; tile < last_tile; tile++) {
        const uint32_t count = std::min(kTileRows, rows - tile * kTileRows);
        if (count < kTileRows) std::memset(out, 0, tile_bytes);
        else std::memset(out + used, 0, tile_bytes - used);
        TableOf<PackTile, PackTileOf>::rows[&layout - packed_layouts](source, row_bytes, count,
                                                                      cols, out);
        source += row_bytes * kTileRows;
        out += tile_bytes;
    }
}

namespace {

// Whether `values` values of a type take so many bytes in a file.
bool fits(TensorType type, uint64_t values, uint64_t bytes) {
    if (!find_layout(type)) return false;
    const TypeInfo& info = *type_info(type);
    return values % info.block_size == 0 && bytes == values / info.block_size * info.block_bytes;
}

constexpr size_t largest_super_bytes() {
    size_t most = 0;
    for (const PackedLayout& layout : packed_layouts) most = std::max(most, layout.super_bytes());
    return (most + packed_alignment - 1) / packed_alignment * packed_alignment;
}

}  // namespace

}  // namespace detail

bool can_compute(TensorType type) { return detail::kernel_type_supported(type); }

uint64_t packed_bytes(TensorType type, uint64_t rows, uint32_t cols) {
    return (rows + packed_rows - 1) / packed_rows * detail::packed_tile_bytes(type, cols);
}

Result<void> pack_rows(TensorType type, uint32_t cols, std::span<const std::byte> source,
                       std::span<std::byte> out) {
    const TypeInfo* info = type_info(type);
    const uint64_t row_bytes = info ? uint64_t{cols} / info->block_size * info->block_bytes : 0;
    const uint64_t rows = row_bytes ? source.size() / row_bytes : 0;
    if (!detail::fits(type, rows * cols, source.size()) || rows > UINT32_MAX ||
        cols % info->block_size != 0 || out.size() != packed_bytes(type, rows, cols))
        return detail::make_error(ErrorKind::invalid_request,
                                  "pack_rows: type, columns and sizes do not fit together");
    const uint32_t count = static_cast<uint32_t>(rows);
    detail::pack_tiles(type, count, cols, source.data(), 0,
                       detail::PackedMatrix{type, count, cols}.tiles(), out.data());
    return {};
}

Result<void> dequantize(TensorType type, std::span<const std::byte> blocks,
                        std::span<float> values) {
    using namespace detail;
    if (!fits(type, values.size(), blocks.size()))
        return make_error(ErrorKind::invalid_request,
                          "dequantize: type and sizes do not fit together");
    // One implementation for both orders: a few columns are packed, as the first row of a tile.
    const TypeInfo& info = *type_info(type);
    const size_t most = find_layout(type)->blocks * kActivationBlock;
    alignas(packed_alignment) std::byte tile[largest_super_bytes()];
    for (size_t first = 0; first < values.size(); first += most) {
        const uint32_t cols = static_cast<uint32_t>(std::min(most, values.size() - first));
        pack_tiles(type, 1, cols, blocks.data() + first / info.block_size * info.block_bytes, 0, 1,
                   tile);
        dequantize_row({type, 1, cols, tile}, 0, values.data() + first);
    }
    return {};
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

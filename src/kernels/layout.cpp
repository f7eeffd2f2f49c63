#include "prologue.hpp"

#include "kernels/layout.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
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
    for (uint32_t j = 0; j < 4; j++)
        store32(codes + 64 * j, (words[2 * j] & 0x0f0f0f0fu) | (words[2 * j + 1] & 0x0f0f0f0fu)
                                                                   << 4);
    const uint32_t high = layout.bits - 4u;
    uint32_t bits[2] = {};
    for (uint32_t g = 0; high && g < 8; g++)
        bits[g * high / 8] |= (words[g] >> 4 & 0x03030303u) << g * high % 8;
    for (uint32_t i = 0; i < high; i++) store32(codes + 256 + 64 * i, bits[i]);
}

// One block of a row as the GGUF file has it, decoded as far as all types are alike.
struct SourceBlock {
    uint32_t words[8];  // unsigned codes, four a word
    uint16_t d, m;      // binary16: d, m or D, Dmin
    uint8_t s0, s1;     // sc, mn or sc0, sc1
};

// The k-quants' eight 6-bit scales and minimums in 12 bytes.
inline void read_k_scales(const uint8_t* q, size_t s, SourceBlock& out) {
    if (s < 4) {
        out.s0 = q[s] & 63;
        out.s1 = q[s + 4] & 63;
    } else {
        out.s0 = static_cast<uint8_t>((q[s + 4] & 15) | (q[s - 4] >> 6) << 4);
        out.s1 = static_cast<uint8_t>(q[s + 4] >> 4 | (q[s] >> 6) << 4);
    }
}

inline void read_nibbles(const std::byte* at, SourceBlock& out) {  // 16 bytes: columns i and i + 16
    for (uint32_t g = 0; g < 4; g++) {
        const uint32_t word = load32(at + 4 * g);
        out.words[g] = word & 0x0f0f0f0fu;
        out.words[g + 4] = word >> 4 & 0x0f0f0f0fu;
    }
}

inline void read_source_block(TensorType type, const std::byte* row, size_t block,
                              SourceBlock& out) {
    const std::byte* at = row;
    const size_t s = block % 8;
    const uint32_t shift = s & 1 ? 4 : 0;
    switch (type) {
        case TensorType::q4_0:
            at += block * 18;
            out.d = load16(at);
            return read_nibbles(at + 2, out);
        case TensorType::q4_1:
            at += block * 20;
            out.d = load16(at);
            out.m = load16(at + 2);
            return read_nibbles(at + 4, out);
        case TensorType::q5_0:
            at += block * 22;
            out.d = load16(at);
            read_nibbles(at + 6, out);
            for (uint32_t g = 0; g < 8; g++)  // spreads four bits over four bytes
                out.words[g] |= ((load32(at + 2) >> 4 * g & 15) * 0x204081u & 0x01010101u) << 4;
            return;
        case TensorType::q8_0:
            at += block * 34;
            out.d = load16(at);
            for (uint32_t g = 0; g < 8; g++) out.words[g] = load32(at + 2 + 4 * g) ^ 0x80808080u;
            return;
        case TensorType::q4_k:
        case TensorType::q5_k: {
            at += block / 8 * (type == TensorType::q4_k ? 144 : 176);
            out.d = load16(at);
            out.m = load16(at + 2);
            read_k_scales(reinterpret_cast<const uint8_t*>(at) + 4, s, out);
            const std::byte* low = at + (type == TensorType::q4_k ? 16 : 48) + s / 2 * 32;
            for (uint32_t g = 0; g < 8; g++) {
                out.words[g] = load32(low + 4 * g) >> shift & 0x0f0f0f0fu;
                if (type == TensorType::q5_k)
                    out.words[g] |= (load32(at + 16 + 4 * g) >> s & 0x01010101u) << 4;
            }
            return;
        }
        default: {  // q6_k
            at += block / 8 * 210;
            out.d = load16(at + 208);
            out.s0 = static_cast<uint8_t>(at[192 + 2 * s]);
            out.s1 = static_cast<uint8_t>(at[192 + 2 * s + 1]);
            const std::byte* low = at + s / 4 * 64 + s % 2 * 32;
            const std::byte* high = at + 128 + s / 4 * 32;
            for (uint32_t g = 0; g < 8; g++)
                out.words[g] = (load32(low + 4 * g) >> s % 4 / 2 * 4 & 0x0f0f0f0fu) |
                               (load32(high + 4 * g) >> s % 4 * 2 & 0x03030303u) << 4;
            return;
        }
    }
}

// One function a type: with the layout a constant, the loops below have no branches left.
template <size_t layout_index>
void pack_tile(const std::byte* source, size_t row_bytes, uint32_t rows, size_t cols,
               std::byte* out) {
    constexpr const PackedLayout& layout = packed_layouts[layout_index];
    for (size_t b = 0; b < cols / kActivationBlock; b++) {
        std::byte* header = out;
        if (b % layout.blocks == 0) out += layout.header_bytes;
        else header = nullptr;
        for (uint32_t r = 0; r < rows; r++) {
            SourceBlock block;
            read_source_block(layout.type, source + r * row_bytes, b, block);
            store_codes(layout, out + layout.scale_bytes, r, block.words);
            std::byte* halves = layout.header_bytes ? header : out;
            if (halves) store16(halves + 2 * r, block.d);
            if (halves && layout.minimum) store16(halves + 32 + 2 * r, block.m);
            if (layout.header_bytes) out[r] = std::byte{block.s0};
            if (layout.header_bytes) out[16 + r] = std::byte{block.s1};
        }
        out += packed_block_bytes(layout);
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
template <size_t layout_index>
constexpr PackTile pack_function() {
    constexpr size_t float_bytes = packed_layouts[layout_index].float_bytes;
    if constexpr (float_bytes != 0) return pack_float_tile<float_bytes>;
    else return pack_tile<layout_index>;
}
constexpr PackTile pack_functions[] = {
    pack_function<0>(), pack_function<1>(), pack_function<2>(), pack_function<3>(),
    pack_function<4>(), pack_function<5>(), pack_function<6>(), pack_function<7>(),
    pack_function<8>(), pack_function<9>(),
};
static_assert(std::size(pack_functions) == std::size(packed_layouts));

size_t used_tile_bytes(const PackedLayout& layout, uint32_t cols) {  // without the padding
    if (layout.float_bytes) return size_t{cols} * layout.float_bytes * kTileRows;
    return size_t{cols} / (layout.blocks * kActivationBlock) * packed_super_bytes(layout);
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
        pack_functions[&layout - packed_layouts](source, row_bytes, count, cols, out);
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
    for (const PackedLayout& layout : packed_layouts)
        most = std::max(most, packed_super_bytes(layout));
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

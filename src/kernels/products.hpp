#pragma once

#include "kernels/layout.hpp"
#include "kernels/tables.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Matrix products: two tiles and some columns at a time ------------------------------------

inline constexpr uint32_t kBatchColumns = 72;  // whose sums a pair of tiles keeps
inline constexpr uint32_t kSpareColumns = 7;   // a kernel may write so many more
inline constexpr uint32_t kFewColumns = 6;     // so many meet weights as they come from memory

using PairSums = float (*)[2][kTileRows];  // (columns, tiles, rows)

// Two tiles of matrices of one type and length; the second may be the first again.
struct TilePair {
    const PackedLayout* layout;
    size_t cols;
    const std::byte* tiles[2];
    size_t next;  // bytes from each tile to the one that comes after it
};

// Columns (planes) that meet a pair of tiles, and where their data lies.
struct ColumnBatch {
    const std::byte* data;
    size_t group_stride;   // bytes from a plane group (of floats: eight columns) to the next
    size_t column_stride;  // within it, from a column to the next
    size_t block_stride;   // from a block, or a float, of a column to the next
    uint32_t count;
    size_t ahead = 0;  // MatmulTask::ahead
    const std::byte* column(uint32_t v) const {
        return data + v / ActivationLayout::kGroup * group_stride +
               v % ActivationLayout::kGroup * column_stride;
    }
    const ActivationBlock* plane(uint32_t v) const {
        return reinterpret_cast<const ActivationBlock*>(column(v));
    }
    size_t step() const { return block_stride / sizeof(ActivationBlock); }
};

// What an instruction set brings: the product of a pair with columns, and what may follow it.
struct ProductParts {
    void (*product)(const TilePair& pair, const ColumnBatch& batch, PairSums sums);
    void (*quantize)(const QuantizeTask&);
    void (*add)(float*, const float*, size_t);
    void (*silu_mul)(float*, const float*, size_t);
};

// The columns of a task from its first one on.
inline ColumnBatch float_columns(const MatmulTask& task) {
    const size_t stride = task.x_stride * sizeof(float);
    return {.data = reinterpret_cast<const std::byte*>(task.x),
            .group_stride = ActivationLayout::kGroup * stride,
            .column_stride = stride,
            .block_stride = sizeof(float),
            .count = task.columns};
}
inline ColumnBatch quantized_columns(const MatmulTask& task, uint32_t cols) {
    constexpr size_t block = sizeof(ActivationBlock);
    const ActivationLayout layout{task.columns * task.planes, cols / kActivationBlock};
    return {.data = reinterpret_cast<const std::byte*>(task.blocks),
            .group_stride = ActivationLayout::kGroup * layout.blocks * block,
            .column_stride = block,
            .block_stride = layout.step() * block,
            .count = layout.count};
}

// A matrix and the columns that meet it, `columns` from `first` on. Floats meet a column itself;
// quantized weights meet each of its planes, which then has sums of its own.
struct MatrixBatch {
    const PackedMatrix* matrix;
    uint32_t planes;  // of a column; 1 for floats
    ColumnBatch batch;

    MatrixBatch(const PackedMatrix* of, const MatmulTask& task, uint32_t first, uint32_t columns)
        : matrix(of) {
        const bool floats = find_layout(of->type)->float_bytes != 0;
        planes = floats ? 1 : task.planes;
        batch = floats ? float_columns(task) : quantized_columns(task, of->cols);
        batch.data = batch.column(first * planes);
        batch.count = columns * planes;
        batch.ahead = task.ahead;
    }
    TilePair pair(uint32_t tile, const PackedMatrix& other, uint32_t other_tile,
                  uint32_t step) const {
        const size_t bytes = static_cast<size_t>(packed_tile_bytes(matrix->type, matrix->cols));
        return {find_layout(matrix->type),
                matrix->cols,
                {matrix->data + tile * bytes, other.data + other_tile * bytes},
                step * bytes};
    }
};

// Copies the sums of one column and one or two neighbouring tiles to where the task wants them, or
// adds them there.
inline void write_sums(const MatmulTask& task, const ProductParts& parts, uint32_t tile,
                       uint32_t tiles, uint32_t column, const float* sums) {
    const uint32_t row = tile * kTileRows, left = task.weights->rows - row;
    const uint32_t rows = std::min(left, tiles * kTileRows);
    float* y = task.y + column * task.y_stride + row;
    if (task.add) parts.add(y, sums, rows);
    else if (rows == 2 * kTileRows) std::memcpy(y, sums, 2 * kTileRows * sizeof(float));
    else std::memcpy(y, sums, rows * sizeof(float));
}

// Multiplies a pair of tiles with all columns. Where a column has two planes, the sums of the second
// are added to those of the first.
inline void multiply_pair_of(const ProductParts& parts, const MatrixBatch& factor,
                             const TilePair& pair, PairSums sums) {
    parts.product(pair, factor.batch, sums);
    for (uint32_t v = 0; factor.planes == 2 && v < factor.batch.count; v += 2)
        parts.add(sums[v][0], sums[v + 1][0], 2 * kTileRows);
}

// y = weights * x. With few columns the product waits for memory, and two streams from places far
// apart are faster than one: a tile of the first half of the range is paired with one of the second.
// With many columns neighbouring tiles are paired, so that their sums go to neighbouring lines.
inline void multiply_plain(const MatmulTask& task, const ProductParts& parts, uint32_t first,
                           uint32_t columns, PairSums sums) {
    const PackedMatrix& w = *task.weights;
    const MatrixBatch factor(&w, task, first, columns);
    const uint32_t pairs = (task.last_tile - task.first_tile + 1) / 2;
    const bool few = factor.batch.count <= kFewColumns;
    for (uint32_t i = 0; i < pairs; i++) {
        const uint32_t low = task.first_tile + (few ? i : 2 * i), high = low + (few ? pairs : 1);
        const bool both = high < task.last_tile;
        multiply_pair_of(parts, factor, factor.pair(low, w, both ? high : low, few ? 1 : 2), sums);
        for (uint32_t c = 0; c < columns; c++) {
            const float* const sum = sums[c * factor.planes][0];
            write_sums(task, parts, low, both && !few ? 2 : 1, first + c, sum);
            if (both && few) write_sums(task, parts, high, 1, first + c, sum + kTileRows);
        }
    }
}

// Computes h = silu(gate) * up of `tiles` tiles (one or two) from `tile` on, into sums[0], where the
// products of gate were. With few columns a tile of gate is paired with its tile of up, two streams
// from memory; that needs one type for both. Else two tiles of gate are a pair, then two of up.
inline void multiply_gated_pair(const ProductParts& parts, const MatrixBatch& gate,
                                const MatrixBatch& up, uint32_t tile, uint32_t tiles,
                                uint32_t columns, PairSums (&sums)[2]) {
    if (gate.batch.count > kFewColumns || gate.matrix->type != up.matrix->type) {
        const uint32_t next = tile + tiles - 1;
        multiply_pair_of(parts, gate, gate.pair(tile, *gate.matrix, next, 2), sums[0]);
        multiply_pair_of(parts, up, up.pair(tile, *up.matrix, next, 2), sums[1]);
        for (uint32_t c = 0; c < columns; c++)
            parts.silu_mul(sums[0][c * gate.planes][0], sums[1][c * up.planes][0], 2 * kTileRows);
        return;
    }
    for (uint32_t t = 0; t < tiles; t++) {
        multiply_pair_of(parts, gate, gate.pair(tile + t, *up.matrix, tile + t, 1), sums[t]);
        for (uint32_t v = 0; v < gate.batch.count; v += gate.planes) {
            parts.silu_mul(sums[t][v][0], sums[t][v][1], kTileRows);
            if (t) std::memcpy(sums[0][v][1], sums[t][v][0], kTileRows * sizeof(float));
        }
    }
}

inline void multiply_gated(const MatmulTask& task, const ProductParts& parts, uint32_t first,
                           uint32_t columns, PairSums (&sums)[2]) {
    const MatrixBatch gate(task.weights, task, first, columns), up(task.up, task, first, columns);
    const ActivationLayout out{task.columns * task.planes, task.out_blocks};
    const uint32_t group = ActivationLayout::kGroup / std::max(task.planes, 1u);
    for (uint32_t tile = task.first_tile; tile < task.last_tile; tile += 2) {
        const uint32_t tiles = std::min(task.last_tile - tile, 2u);
        multiply_gated_pair(parts, gate, up, tile, tiles, columns, sums);
        for (uint32_t c = 0; !task.out && c < columns; c++)
            write_sums(task, parts, tile, tiles, first + c, sums[0][c * gate.planes][0]);
        for (uint32_t c = 0; task.out && c < columns; c += group)
            parts.quantize({sums[0][c * gate.planes][0], size_t{gate.planes} * 2 * kTileRows,
                            std::min(columns - c, group), task.planes, kActivationBlock, out.step(),
                            task.out + out.at((first + c) * task.planes) + tile / 2 * out.step()});
    }
}

inline void multiply_tiles(const MatmulTask& task, const ProductParts& parts) {
    alignas(64) float memory[2][kBatchColumns + kSpareColumns][2][kTileRows];
    PairSums sums[2] = {memory[0], memory[1]};
    const uint32_t most = kBatchColumns / std::max(task.planes, 1u);
    for (uint32_t first = 0; first < task.columns; first += most) {
        const uint32_t columns = std::min(task.columns - first, most);
        if (task.up) multiply_gated(task, parts, first, columns, sums);
        else multiply_plain(task, parts, first, columns, sums[0]);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

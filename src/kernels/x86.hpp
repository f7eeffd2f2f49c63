#pragma once

#include "kernels/products.hpp"
#include "kernels/targets.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if VALAR_X86_KERNELS && !defined(VALAR_NO_INFERENCE)
namespace valar {
inline namespace v1 {
namespace detail {

// ---- What the x86 regions share: a matrix product as tile kernels and the loops around them ---

// A tile kernel adds to `sums` the products of two tiles and C columns, in ascending order of k.
struct TileStep {
    const std::byte* const* tiles;    // (2) where each goes on: at the header of a super-block
    const std::byte* const* columns;  // (C) ActivationBlocks, `block_stride` bytes apart, or floats
    size_t block_stride;
    size_t count;          // of blocks, or floats
    float (*sums)[2][16];  // (C)
    bool fresh;            // the sums start at 0
    const int8_t* values;  // of the codes, where the type has a table of them
    // To prefetch: at every `every`th block one block of each tile, from `next` of the first on;
    // 0: nothing.
    const std::byte* next;
    size_t every;
};
struct TileKernels {
    struct Shape {
        uint32_t columns;
        void (*dot)(const TileStep& step);
    } shapes[4];  // few columns to many
};

inline constexpr size_t kChunk = 32;  // blocks that stay in a near cache for all columns
inline constexpr size_t kChunkFloats = 512;
// The best prefetch distance measured for as many columns as one call takes, in bytes. For one or
// two the task says it.
inline constexpr size_t kAheadFew = 8192;

// The kernel for the first of the columns that are left: 7 are better served as 4 and 3 than as 6
// and 1.
inline const TileKernels::Shape& next_shape(const TileKernels& k, uint32_t left) {
    for (const TileKernels::Shape& shape : k.shapes)
        if (left <= shape.columns) return shape;
    return k.shapes[left <= 2 * k.shapes[2].columns ? 2 : 3];
}

// How k, the direction along the rows, is divided for a pair of tiles. It counts blocks, of float
// types values.
struct Chunks {
    size_t total;        // of k
    size_t chunk;        // of k in a chunk; the last chunk may have fewer
    size_t chunk_bytes;  // of a tile
};

// One chunk where one kernel call takes all columns. Else as few chunks as may be, of one size and
// of whole super-blocks, so that each stays in a near cache until all columns have met it.
inline Chunks divide(const PackedLayout& layout, size_t cols, bool one_call) {
    const size_t total = layout.float_bytes ? cols : cols / kActivationBlock;
    const size_t most = one_call ? total : layout.float_bytes ? kChunkFloats : kChunk;
    const size_t count = (total + most - 1) / most;
    const size_t even = (total + count - 1) / count;
    const size_t supers = (even + layout.blocks - 1) / layout.blocks;
    if (layout.float_bytes) return {total, even, even * layout.float_bytes * kTileRows};
    return {total, one_call ? total : supers * layout.blocks, supers * layout.super_bytes()};
}

// A pair of tiles times all columns of the batch, chunk after chunk. While the columns meet a chunk,
// each kernel call prefetches its share of what comes next: the next chunk, or after the last one
// the beginning of the next tiles.
inline void multiply_pair(const TileKernels& k, const TilePair& pair, const ColumnBatch& batch,
                          PairSums sums) {
    const size_t most = k.shapes[3].columns, calls = (batch.count + most - 1) / most;
    const Chunks chunks = divide(*pair.layout, pair.cols, calls == 1);
    size_t done = 0;  // bytes of a tile
    for (size_t at_k = 0; at_k < chunks.total; at_k += chunks.chunk, done += chunks.chunk_bytes) {
        const std::byte* const tiles[2] = {pair.tiles[0] + done, pair.tiles[1] + done};
        const std::byte* columns[8];
        const size_t left = chunks.total - at_k;
        const bool last = left <= chunks.chunk;
        size_t ahead = last ? pair.next - done : chunks.chunk_bytes;
        if (calls == 1) ahead = batch.count > 2 ? kAheadFew : batch.ahead;
        TileStep step{.tiles = tiles,
                      .columns = columns,
                      .block_stride = batch.block_stride,
                      .count = last ? left : chunks.chunk,
                      .sums = sums,
                      .fresh = at_k == 0,
                      .values = pair.layout->values,
                      .next = tiles[0] + ahead,
                      .every = ahead ? calls : 0};
        for (uint32_t v = 0; v < batch.count; step.next += chunks.chunk_bytes / calls) {
            const TileKernels::Shape& shape = next_shape(k, batch.count - v);
            for (uint32_t c = 0; c < shape.columns; c++) {  // the last again where they run out
                const uint32_t column = v + c < batch.count ? v + c : batch.count - 1;
                columns[c] = batch.column(column) + at_k * batch.block_stride;
            }
            step.sums = sums + v;
            shape.dot(step);
            v += shape.columns;
        }
    }
}

// ---- Attention of the vector paths -----------------------------------------------------------

// Queries of an attention task that look at the same segment together.
inline constexpr uint32_t kTileQueries = 8;
struct QueryTile {
    const float* q[kTileQueries];
    uint32_t begin[kTileQueries], end[kTileQueries];
    float* p[kTileQueries];  // (256) scores, then weights
    float* out[kTileQueries];
};

// What an instruction set brings for 1, 2, .. `queries` queries at once: [f32][how many - 1].
struct AttentionParts {
    using Range = void(const AttentionTask&, const QueryTile&, uint32_t first, uint32_t last);
    using RangeOfSome = void(const AttentionTask&, const QueryTile&, uint32_t query, uint32_t first,
                             uint32_t last);
    uint32_t queries;
    Range* score[2][kTileQueries];  // p = keys first .. last - 1, and some beside them
    void (*weigh)(float* p, uint32_t begin, uint32_t end, float* max, float* sum);
    RangeOfSome* add_values[2][kTileQueries];  // out += p * values, of queries from `query` on
};

// One segment for `count` queries. From all_begin to all_end every query sees every position, so a
// value is loaded once for all of them; before and after, each query goes through its own positions
// alone.
inline void attend_tile(const AttentionParts& parts, const AttentionTask& task,
                        const QueryTile& tile, const uint32_t* query, uint32_t count) {
    uint32_t first = kSegment, last = 0, all_begin = 0, all_end = kSegment;
    for (uint32_t i = 0; i < count; i++) {
        first = std::min(first, tile.begin[i]);
        last = std::max(last, tile.end[i]);
        all_begin = std::max(all_begin, tile.begin[i]);
        all_end = std::min(all_end, tile.end[i]);
    }
    if (all_end < all_begin) all_begin = all_end = last;  // nothing is seen by all: each goes alone
    const bool f32 = task.kv_type == KvType::f32;
    parts.score[f32][count - 1](task, tile, first, last);
    for (uint32_t i = 0; i < count; i++) {
        apply_soft_cap(tile.p[i] + tile.begin[i], task.soft_cap, tile.end[i] - tile.begin[i]);
        parts.weigh(tile.p[i], tile.begin[i], tile.end[i], task.max + query[i],
                    task.sum + query[i]);
        std::memset(tile.out[i], 0, task.head_dim * sizeof(float));
    }
    const auto add_alone = parts.add_values[f32][0];
    for (uint32_t i = 0; i < count; i++)
        add_alone(task, tile, i, tile.begin[i], std::min(all_begin, tile.end[i]));
    parts.add_values[f32][count - 1](task, tile, 0, all_begin, all_end);
    for (uint32_t i = 0; i < count; i++) add_alone(task, tile, i, all_end, tile.end[i]);
}

inline void attend(const AttentionParts& parts, const AttentionTask& task) {
    alignas(64) float p[kTileQueries][kSegment];
    for (uint32_t next = 0; next < task.queries;) {
        QueryTile tile;
        uint32_t count = 0, query[kTileQueries];
        for (; next < task.queries && count < parts.queries; next++) {
            if (task.begin[next] >= task.end[next]) continue;
            tile.q[count] = task.q + next * task.q_stride;
            tile.begin[count] = task.begin[next];
            tile.end[count] = task.end[next];
            tile.p[count] = p[count];
            tile.out[count] = task.out + next * task.out_stride;
            query[count++] = next;
        }
        if (count) attend_tile(parts, task, tile, query, count);
    }
}

VALAR_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
VALAR_FORCE_INLINE float sum_of_lanes(__m256 low, __m256 high) {
    const __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
}  // namespace avx2
VALAR_TARGET_END

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_X86_KERNELS

#pragma once

#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

constexpr uint32_t kQueryRows = 16;  // rows of a sequence that attend together
constexpr uint32_t kUnitTiles = 2;   // tiles of a matrix that kernels take at a time

// Cuts a buffer into arrays, each on its own cache line. With base 0 it only counts, so that what a
// plan says is what is taken.
struct Carver {
    uintptr_t base = 0;
    uint64_t used = 0;

    template <class T>
    T* take(uint64_t count) {
        const uint64_t at = used;
        used += (count * sizeof(T) + 63) / 64 * 64;  // operands are limited by check_cpu_options
        return reinterpret_cast<T*>(base + static_cast<uintptr_t>(at));
    }
};

// A part of a tensor of the file and where it goes: rows to be packed, or bytes as they are.
struct LoadItem {
    const TensorInfo* tensor;
    std::byte* out;
    uint64_t offset, bytes;  // in the file's tensor
    uint32_t rows;           // to be packed; 0: as they are
    bool pack() const { return rows != 0; }
    uint64_t row_bytes() const { return bytes / rows; }
};

// Packed, here or in the file; where `data` is null, in the file's rows.
struct CpuMatrix : PackedMatrix {
    const TensorInfo* tensor = nullptr;
    uint64_t first_row = 0;  // of the tensor
    uint64_t row_bytes() const {
        return tensor->bytes / (tensor->dims[1] * tensor->dims[2] * tensor->dims[3]);
    }
    uint64_t first_packed_byte() const {
        return first_row / kTileRows * packed_tile_bytes(type, cols);
    }
    uint32_t units() const { return (tiles() + kUnitTiles - 1) / kUnitTiles; }
    uint64_t unit_bytes() const { return kUnitTiles * packed_tile_bytes(type, cols); }
    bool quantized() const { return type_info(type)->block_size > 1; }
};

// By role.
struct CpuTensors {
    CpuMatrix matrices[kRoles] = {};
    const float* vectors[kRoles] = {};
    const CpuMatrix& matrix(TensorRole role) const { return matrices[static_cast<size_t>(role)]; }
    const float* vector(TensorRole role) const { return vectors[static_cast<size_t>(role)]; }
};

struct CpuLayer {
    const LayerSpec* spec;
    uint32_t rope;  // index of its RopeTable
    CpuTensors tensors;
    std::vector<CpuMatrix> gates, ups, downs;  // of each expert
    const CpuMatrix& matrix(TensorRole role) const { return tensors.matrix(role); }
    const float* vector(TensorRole role) const { return tensors.vector(role); }
    // Whether one kernel multiplies by gate and up, gates, and quantizes.
    bool gates_in_kernel() const {
        return spec->gated && spec->activation == Activation::silu && !spec->ffn_bias &&
               !spec->experts.shared_gate;
    }
    bool gates_experts_in_kernel() const {
        return spec->activation == Activation::silu && !spec->experts.bias;
    }
    bool adds_attention_later(const ModelSpec& of) const {
        return spec->parallel || spec->post_attn_norm || of.residual_scale != 1;
    }
    bool adds_ffn_later(const ModelSpec& of) const {
        return spec->post_ffn_norm || of.residual_scale != 1;
    }
    bool has_experts() const { return spec->experts.count != 0; }
    bool adds_later(const ModelSpec& of) const {
        return adds_attention_later(of) || adds_ffn_later(of);
    }
    uint32_t first_page, last_page;  // its own
    uint64_t kv_offset;              // of its pages in the memory of all
    size_t kv_head_bytes;  // one kv head of one page: groups of keys, then groups of values
    size_t kv_page_bytes() const { return kv_head_bytes * spec->n_kv_heads; }
    bool has_page(uint32_t page) const { return page >= first_page && page <= last_page; }
    uint32_t first_seen(uint32_t position) const {
        return spec->window && position >= spec->window ? position - spec->window + 1 : 0;
    }
};

struct CpuWeights {
    const Gguf* gguf;
    bool mapped;
    uint64_t mapped_bytes = 0;
    uint64_t mapped_units = 0;  // packed, the most that are needed at a time
    CpuTensors model;
    std::vector<CpuLayer> layers;
    std::vector<LoadItem> items;  // in the order in which they are loaded

    CpuMatrix matrix(Carver& carver, const TensorRows& rows);
    const std::byte* packed_in_place(const CpuMatrix& matrix) const;
    const float* vector(Carver& carver, const TensorRows& elements);
    void place_all(Carver& carver, const RoleTensors& from, CpuTensors& to);
    void place_experts(Carver& carver, const RoleTensors& from, CpuLayer& to);
    void place(Carver& carver, const ModelSpec& spec, const ModelTensors& tensors);
};

// Rotation angles a position, per pair; layers with the same RopeSpec share a table. The second list
// is for rows with long_rope.
struct RopeTable {
    const RopeSpec* spec;
    std::vector<double> frequencies[2];  // (dims / 2)
};

// Attention of `rows` neighbours of one sequence to segments first .. last - 1, one kv head a time.
struct AttentionUnit {
    uint32_t row, rows, first_segment, last_segment;
};

// The rows that picked an expert: first .. first + rows - 1 of all picks, ordered by expert.
struct ExpertGroup {
    uint32_t expert, first, rows;
};

// What a thread needs for one AttentionUnit: one segment's result and the state so far.
struct QueryScratch {
    float *max, *sum, *total_max, *total_sum;  // (kQueryRows * heads of a group)
    float* out;                                // (the same, head_dim)
    float* expanded;                           // q8_0: a segment's keys, then its values
    uint16_t *begin, *end;
};

// The largest numbers that occur in any layer.
struct CpuSizes {
    uint64_t rows, logit_rows, planes, parts, segments;
    uint64_t split_rows;  // batches of so many rows are split over segments too
    uint64_t q = 0, kv = 0, group = 0, group_values = 0, heads = 0;
    uint64_t ff_quantized = 0, ff_values = 0,
             ff_up = 0;                              // of h and up, for quantized ffn_down or not
    uint64_t added_later = 0;                        // rows of z
    uint64_t experts = 0, picks = 0, expert_ff = 0;  // of a layer; rows times experts used
    uint64_t rope_values = 0;                        // of all tables, for a position
    uint64_t expanded = 0;                           // of q8_0 keys and values: a segment's
    uint64_t staging = 0;                            // a tile of each thread, as the file has it
    uint64_t mapped_units;                           // bytes of a thread
};

struct CpuScratch {
    float *x, *y;                 // (rows, n_embd) the residual stream; normed
    float *q, *k, *v;             // (rows, heads * head_dim) as they come from the weights
    float* turned;                // (kv heads, rows, heads of a group, head_dim) rotated q
    float* h;                     // (rows, n_ff), in the place of q, k, v, turned; and
    float* up;                    // (rows, n_ff), where the gate is no kernel's; or
    ActivationBlock* h_blocks;    // {rows * planes, n_ff / 32}, there too
    float* routes;                // (rows, experts) the router's numbers, then weights
    uint32_t *picked, *place_of;  // (rows, used) experts by rank; where a pick lies among all picks
    float* weights;               // (rows, used)
    uint32_t* picked_by;          // (picks) rows
    uint32_t* group_ends;         // (experts)
    ExpertGroup* groups;          // (experts)
    float* inputs;                // (picks, n_embd) y of the rows, then what their experts give
    float *gates, *ups;           // (picks, expert_ff)
    ActivationBlock* input_blocks;  // of inputs, then of gates, a group after the other
    float* z;         // (rows, n_embd) what is added to x later, after a norm or scale
    float* attended;  // (rows, n_heads * head_dim)
    float* cos_sin;   // (rows, rope_values)
    float *part_max, *part_sum, *part_out;  // (split_rows, segments, n_heads, 1 or head_dim)
    float* logits;                          // (logit_rows, n_vocab)
    ActivationBlock* blocks;                // {rows * planes, n_embd or n_heads * head_dim / 32}
    AttentionUnit* units;
    uint32_t* wanted;         // (logit_rows) rows that want logits
    BatchRow* kept;           // (logit_rows) these
    QueryScratch* queries;    // (parts)
    std::byte* mapped_units;  // (parts, mapped_units)

    void place(Carver& carver, const CpuSizes& n, uint64_t n_embd, uint64_t n_vocab);
};

// Of a page, of all its layers; of one for layers with windows alone.
using PageBytes = std::array<uint64_t, 2>;

// Everything about memory, computed the same way for a plan and for the real thing.
struct CpuLayout {
    CpuWeights weights;
    std::vector<RopeTable> ropes;
    CpuSizes sizes{};
    MemoryPlan plan;
    PageBytes page_bytes{};
};

// Positions that one sequence may have.
uint64_t cpu_positions(const BackendOptions& options);
// Where everything lies. With `weights_base` 0 it only counts. Errors: an option out of range.
Result<CpuLayout> lay_out_cpu(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, uintptr_t weights_base);

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

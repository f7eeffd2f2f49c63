// >>backend
// Attention: how it is cut into units, and what a unit does.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// Rows that are neighbours in their sequence attend together. A batch of few rows is cut by
// segments too, so that all threads have something to do; merge_and_quantize() merges the parts.
void CpuDecoder::plan_attention() {
    unit_count_ = 0;
    for (uint32_t row = row_count(), rows; row > 0; row -= rows) {  // the longest first
        const BatchRow& last = rows_[row - 1];
        const uint32_t segments = last.position / kSegment + 1;
        rows = 1;
        if (split_over_segments()) {
            for (uint32_t i = 0; i < segments; ++i)
                scratch_.units[unit_count_++] = {row - 1, 1, i, i + 1};
            continue;
        }
        while (rows < row && rows < kQueryRows && rows_[row - 1 - rows].pages == last.pages &&
               rows_[row - 1 - rows].position + rows == last.position)
            ++rows;
        scratch_.units[unit_count_++] = {row - rows, rows, 0, segments};
    }
}

uint64_t CpuDecoder::work_attention() const {
    const AttentionUnit& unit = scratch_.units[0];
    const LayerSpec& spec = *layer().spec;
    const uint32_t seen = layer().first_seen(rows_[unit.row].position) / kSegment;
    const uint32_t segments = split_over_segments()
                                  ? 1
                                  : unit.last_segment - std::max(unit.first_segment, seen);
    return uint64_t{2 * kSegment} * unit.rows * segments * (spec.n_heads / spec.n_kv_heads) *
           spec.head_dim;
}

void CpuDecoder::attend(uint32_t first, uint32_t last, uint32_t part) {
    const uint32_t kv_heads = layer().spec->n_kv_heads;
    for (uint32_t i = first; i < last; ++i)
        attend_unit(scratch_.units[i / kv_heads], i % kv_heads, scratch_.queries[part]);
}

void CpuDecoder::attend_unit(const AttentionUnit& unit, uint32_t kv_head, QueryScratch& scratch) {
    const LayerSpec& spec = *layer().spec;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const uint32_t page_tokens = options_.page_tokens,
                   newest = rows_[unit.row + unit.rows - 1].position,
                   oldest = layer().first_seen(rows_[unit.row].position);
    const size_t half = layer().kv_head_bytes / 2, group_bytes = half * kKeyGroup / page_tokens;
    const void *keys[kSegment / kKeyGroup], *values[kSegment / kKeyGroup];
    AttentionTask task{};
    task.kv_type = options_.kv_type == KvType::q8_0 ? KvType::f32 : options_.kv_type;
    task.head_dim = dim;
    task.queries = unit.rows * group;
    task.q = scratch_.turned + (kv_head * rows_.size() + unit.row) * group * dim;
    task.q_stride = task.out_stride = dim;
    task.begin = scratch.begin;
    task.end = scratch.end;
    task.keys = keys;
    task.values = values;
    task.max = scratch.max;
    task.sum = scratch.sum;
    task.out = scratch.out;
    for (uint32_t segment = std::max(unit.first_segment, oldest / kSegment);
         segment < unit.last_segment; ++segment) {
        const uint32_t start = segment * kSegment;
        const auto within = [start](uint32_t position) {
            return static_cast<uint16_t>(std::clamp(position, start, start + kSegment) - start);
        };
        for (uint32_t i = 0; i < kSegment / kKeyGroup; ++i) {
            const uint32_t position = start + i * kKeyGroup;
            keys[i] = values[i] = nullptr;
            if (position > newest || position + kKeyGroup <= oldest) continue;
            const uint32_t page = rows_[unit.row].pages[position / page_tokens];
            const std::byte* at = kv_page(layer(), page) + kv_head * layer().kv_head_bytes +
                                  position % page_tokens / kKeyGroup * group_bytes;
            keys[i] = at;
            values[i] = at + half;
            if (options_.kv_type != KvType::q8_0) continue;
            float* const expanded = scratch.expanded + i * kKeyGroup * dim;
            kernels_->expand_kv(at, at + half, dim, expanded, expanded + kSegment * dim);
            keys[i] = expanded;
            values[i] = expanded + kSegment * dim;
        }
        for (uint32_t i = 0; i < task.queries; ++i) {
            const uint32_t position = rows_[unit.row + i / group].position;
            scratch.begin[i] = within(layer().first_seen(position));
            scratch.end[i] = within(position + 1);
        }
        if (split_over_segments()) {
            const size_t at = (unit.row * sizes_.segments + segment) * spec.n_heads +
                              kv_head * group;
            task.max = scratch_.part_max + at;
            task.sum = scratch_.part_sum + at;
            task.out = scratch_.part_out + at * dim;
        }
        kernels_->attention(task);
        if (split_over_segments()) continue;
        for (uint32_t i = 0; i < task.queries; ++i)
            if (scratch.begin[i] < scratch.end[i])
                merge_segment(
                    rows_[unit.row + i / group].position, segment,
                    {scratch.max[i], scratch.sum[i], task.out + size_t{i} * dim},
                    {scratch.total_max + i, scratch.total_sum + i, query_output(unit, kv_head, i)});
    }
    if (split_over_segments()) return;
    for (uint32_t i = 0; i < task.queries; ++i)
        kernels_->scale(query_output(unit, kv_head, i), 1 / scratch.total_sum[i], dim);
}

float* CpuDecoder::query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const {
    const LayerSpec& spec = *layer().spec;
    const uint32_t group = spec.n_heads / spec.n_kv_heads;
    const size_t row = unit.row + query / group, head = kv_head * group + query % group;
    return scratch_.attended + (row * spec.n_heads + head) * spec.head_dim;
}

void CpuDecoder::merge_segment(uint32_t position, uint32_t segment, const SegmentResult& from,
                               const AttentionState& to) {
    const size_t dim = layer().spec->head_dim;
    if (segment != layer().first_seen(position) / kSegment)
        return kernels_->attention_merge(to.max, to.sum, to.out, from.max, from.sum, from.out, dim);
    *to.max = from.max;
    *to.sum = from.sum;
    std::memcpy(to.out, from.out, dim * sizeof(float));
}

void CpuDecoder::merge_parts(uint32_t row) {
    const LayerSpec& spec = *layer().spec;
    const size_t dim = spec.head_dim;
    for (uint32_t head = 0; head < spec.n_heads; ++head) {
        float max = 0, sum = 0,
              *out = scratch_.attended + (size_t{row} * spec.n_heads + head) * dim;
        const uint32_t position = rows_[row].position;
        for (uint32_t segment = layer().first_seen(position) / kSegment;
             segment <= position / kSegment; ++segment) {
            const size_t at = (row * sizes_.segments + segment) * spec.n_heads + head;
            merge_segment(
                position, segment,
                {scratch_.part_max[at], scratch_.part_sum[at], scratch_.part_out + at * dim},
                {&max, &sum, out});
        }
        kernels_->scale(out, 1 / sum, dim);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

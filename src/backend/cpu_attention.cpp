// >>backend
// Attention, in two schedules. Whole rows: neighbouring rows of a sequence attend together, to all
// that they see, and one thread merges their segments as it goes. Split rows: in a batch of few rows
// each segment of each row is a unit of its own, so that all threads have something to do, and
// merge_and_quantize merges the segments. Both merge the same segments in the same order, so they
// give the same bits. Segments are merged by online softmax (Milakov and Gimelshein 2018,
// https://arxiv.org/abs/1805.02867); the query heads that share a key head (grouped queries, Ainslie
// et al. 2023, https://arxiv.org/abs/2305.13245) attend together.
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

// ---- What both schedules need ----------------------------------------------------------------

void CpuDecoder::plan_attention() {
    unit_count_ = 0;
    if (splits_rows()) plan_split_rows();
    else plan_whole_rows();
}

uint64_t CpuDecoder::work_attention() const {
    const AttentionUnit& unit = scratch_.units[0];
    const LayerSpec& spec = *layer().spec;
    const uint32_t seen = layer().first_seen(rows_[unit.row].position) / kSegment;
    const uint32_t segments = splits_rows()
                                  ? 1
                                  : unit.last_segment - std::max(unit.first_segment, seen);
    return uint64_t{2 * kSegment} * unit.rows * segments * (spec.n_heads / spec.n_kv_heads) *
           spec.head_dim;
}

void CpuDecoder::attend(uint32_t first, uint32_t last, uint32_t part) {
    const uint32_t kv_heads = layer().spec->n_kv_heads;
    for (uint32_t i = first; i < last; ++i) {
        VALAR_ASSERT(i / kv_heads < unit_count_);
        const AttentionUnit& unit = scratch_.units[i / kv_heads];
        if (splits_rows()) attend_split_row(unit, i % kv_heads, scratch_.queries[part]);
        else attend_whole_rows(unit, i % kv_heads, scratch_.queries[part]);
    }
}

AttentionTask CpuDecoder::attention_task(const AttentionUnit& unit, uint32_t kv_head,
                                         const QueryScratch& scratch,
                                         const SegmentKeys& found) const {
    const LayerSpec& spec = *layer().spec;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    AttentionTask task{};
    task.kv_type = options_.kv_type == KvType::q8_0 ? KvType::f32 : options_.kv_type;
    task.head_dim = dim;
    task.queries = unit.rows * group;
    task.q = scratch_.turned + (kv_head * rows_.size() + unit.row) * group * dim;
    task.q_stride = task.out_stride = dim;
    task.begin = scratch.begin;
    task.end = scratch.end;
    task.keys = found.keys;
    task.values = found.values;
    task.soft_cap = spec.soft_cap;
    task.max = scratch.max;
    task.sum = scratch.sum;
    task.out = scratch.out;
    return task;
}

// Where a segment's keys and values are, in groups of kKeyGroup positions: in the pages, or, of
// q8_0, expanded in the scratch memory; null where no row of the unit sees any of a group.
void CpuDecoder::find_keys(const AttentionUnit& unit, uint32_t kv_head, uint32_t segment,
                           const QueryScratch& scratch, SegmentKeys& found) const {
    const uint32_t dim = layer().spec->head_dim, page_tokens = options_.page_tokens,
                   newest = rows_[unit.row + unit.rows - 1].position,
                   oldest = layer().first_seen(rows_[unit.row].position);
    const size_t half = layer().kv_head_bytes / 2, group_bytes = half * kKeyGroup / page_tokens;
    for (uint32_t i = 0; i < kSegment / kKeyGroup; ++i) {
        const uint32_t position = segment * kSegment + i * kKeyGroup;
        found.keys[i] = found.values[i] = nullptr;
        if (position > newest || position + kKeyGroup <= oldest) continue;
        const uint32_t page = pages(rows_[unit.row])[position / page_tokens];
        const std::byte* at = kv_page(layer(), page) + kv_head * layer().kv_head_bytes +
                              position % page_tokens / kKeyGroup * group_bytes;
        found.keys[i] = at;
        found.values[i] = at + half;
        if (options_.kv_type != KvType::q8_0) continue;
        float* const expanded = scratch.expanded + i * kKeyGroup * dim;
        kernels_->expand_kv(at, at + half, dim, expanded, expanded + kSegment * dim);
        found.keys[i] = expanded;
        found.values[i] = expanded + kSegment * dim;
    }
}

// Which positions of a segment each query of a unit sees.
void CpuDecoder::find_visible(const AttentionUnit& unit, uint32_t segment,
                              const QueryScratch& scratch) const {
    const uint32_t group = layer().spec->n_heads / layer().spec->n_kv_heads;
    const uint32_t start = segment * kSegment;
    const auto within = [start](uint32_t position) {
        return static_cast<uint16_t>(std::clamp(position, start, start + kSegment) - start);
    };
    for (uint32_t i = 0; i < unit.rows * group; ++i) {
        const uint32_t position = rows_[unit.row + i / group].position;
        scratch.begin[i] = within(layer().first_seen(position));
        scratch.end[i] = within(position + 1);
    }
}

void CpuDecoder::merge_segment(uint32_t position, uint32_t segment, const SegmentResult& from,
                               const AttentionState& to) const {
    const size_t dim = layer().spec->head_dim;
    if (segment != layer().first_seen(position) / kSegment)
        return kernels_->attention_merge(to.max, to.sum, to.out, from.max, from.sum, from.out, dim);
    *to.max = from.max;
    *to.sum = from.sum;
    std::memcpy(to.out, from.out, dim * sizeof(float));
}

void CpuDecoder::finish_query(uint32_t head, float max, float sum, float* out) const {
    const size_t dim = layer().spec->head_dim;
    if (const float* sinks = layer().vector(TensorRole::sinks))
        add_sink(&max, &sum, out, sinks[head], dim);
    kernels_->scale(out, 1 / sum, dim);
}

// ---- Whole rows ------------------------------------------------------------------------------

// Neighbours in their sequence become a unit. The longest rows come first.
void CpuDecoder::plan_whole_rows() {
    for (uint32_t row = row_count(), rows; row > 0; row -= rows) {
        const BatchRow& last = rows_[row - 1];
        rows = 1;
        while (rows < row && rows < kQueryRows && rows_[row - 1 - rows].pages == last.pages &&
               rows_[row - 1 - rows].position + rows == last.position)
            ++rows;
        scratch_.units[unit_count_++] = {row - rows, rows, 0, last.position / kSegment + 1};
    }
}

void CpuDecoder::attend_whole_rows(const AttentionUnit& unit, uint32_t kv_head,
                                   const QueryScratch& scratch) {
    const LayerSpec& spec = *layer().spec;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const uint32_t oldest = layer().first_seen(rows_[unit.row].position);
    SegmentKeys found;
    const AttentionTask task = attention_task(unit, kv_head, scratch, found);
    for (uint32_t segment = oldest / kSegment; segment < unit.last_segment; ++segment) {
        find_keys(unit, kv_head, segment, scratch, found);
        find_visible(unit, segment, scratch);
        kernels_->attention(task);
        for (uint32_t i = 0; i < task.queries; ++i)
            if (scratch.begin[i] < scratch.end[i])
                merge_segment(
                    rows_[unit.row + i / group].position, segment,
                    {scratch.max[i], scratch.sum[i], task.out + size_t{i} * dim},
                    {scratch.total_max + i, scratch.total_sum + i, query_output(unit, kv_head, i)});
    }
    for (uint32_t i = 0; i < task.queries; ++i)
        finish_query(kv_head * group + i % group, scratch.total_max[i], scratch.total_sum[i],
                     query_output(unit, kv_head, i));
}

float* CpuDecoder::query_output(const AttentionUnit& unit, uint32_t kv_head, uint32_t query) const {
    const LayerSpec& spec = *layer().spec;
    const uint32_t group = spec.n_heads / spec.n_kv_heads;
    const size_t row = unit.row + query / group, head = kv_head * group + query % group;
    return scratch_.attended + (row * spec.n_heads + head) * spec.head_dim;
}

// ---- Split rows ------------------------------------------------------------------------------

void CpuDecoder::plan_split_rows() {
    for (uint32_t row = row_count(); row > 0; --row) {
        const uint32_t segments = rows_[row - 1].position / kSegment + 1;
        for (uint32_t i = 0; i < segments; ++i)
            scratch_.units[unit_count_++] = {row - 1, 1, i, i + 1};
    }
}

void CpuDecoder::attend_split_row(const AttentionUnit& unit, uint32_t kv_head,
                                  const QueryScratch& scratch) {
    const LayerSpec& spec = *layer().spec;
    const uint32_t segment = unit.first_segment;
    if (segment < layer().first_seen(rows_[unit.row].position) / kSegment) return;
    SegmentKeys found;
    AttentionTask task = attention_task(unit, kv_head, scratch, found);
    find_keys(unit, kv_head, segment, scratch, found);
    find_visible(unit, segment, scratch);
    const size_t at = static_cast<size_t>((unit.row * sizes_.segments + segment) * spec.n_heads +
                                          kv_head * (spec.n_heads / spec.n_kv_heads));
    task.max = scratch_.part_max + at;
    task.sum = scratch_.part_sum + at;
    task.out = scratch_.part_out + at * spec.head_dim;
    kernels_->attention(task);
}

void CpuDecoder::merge_split_row(uint32_t row) {
    const LayerSpec& spec = *layer().spec;
    const size_t dim = spec.head_dim;
    for (uint32_t head = 0; head < spec.n_heads; ++head) {
        float max = 0, sum = 0,
              *out = scratch_.attended + (size_t{row} * spec.n_heads + head) * dim;
        const uint32_t position = rows_[row].position;
        for (uint32_t segment = layer().first_seen(position) / kSegment;
             segment <= position / kSegment; ++segment) {
            const size_t at = static_cast<size_t>((row * sizes_.segments + segment) * spec.n_heads +
                                                  head);
            merge_segment(
                position, segment,
                {scratch_.part_max[at], scratch_.part_sum[at], scratch_.part_out + at * dim},
                {&max, &sum, out});
        }
        finish_query(head, max, sum, out);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

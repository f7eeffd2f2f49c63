// >>backend
// The stages of the forward pass, in the order in which they run, and what they have in common:
// products with packed or mapped weights and the quantization of activations. The stages of
// attention between rotate_scale_store and merge_and_quantize are in cpu_attention.cpp; the formulas
// are in >>kernels.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "base/internal.hpp"
#include "kernels/exact.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- What stages have in common --------------------------------------------------------------

// The planes of a few neighbouring rows lie side by side. Returns where the group of rows ends that
// `row` belongs to.
uint32_t CpuDecoder::group_end(uint32_t row, uint32_t last, uint64_t planes) const {
    const uint32_t rows = ActivationLayout::kGroup / static_cast<uint32_t>(planes);
    return std::min(last, (row / rows + 1) * rows);
}

// Quantizes x, the rows first .. last - 1 of one group, (last - first, n), to `out`, which holds all
// rows.
void CpuDecoder::quantize_group(const float* x, uint32_t n, uint64_t planes, uint32_t first,
                                uint32_t last, ActivationBlock* out) const {
    if (n % kActivationBlock != 0) return;  // no matrix that meets x is quantized
    const uint32_t count = static_cast<uint32_t>(planes);
    const ActivationLayout layout{row_count() * count, n / kActivationBlock};
    kernels_->quantize(
        {x, n, last - first, count, n, layout.step(), out + layout.at(first * count)});
}

// Packs the tiles first .. last - 1 of a matrix from the file's bytes.
PackedMatrix CpuDecoder::pack_mapped(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                                     std::byte* packed) {
    const size_t row_bytes = static_cast<size_t>(matrix.row_bytes());
    const std::byte* source = gguf_->tensor_bytes(*matrix.tensor)->data() +
                              matrix.first_row * row_bytes;
    const uint32_t row = first * kTileRows;
    pack_tiles(matrix.type, matrix.rows, matrix.cols, source + row * row_bytes, first, last,
               packed);
    return {matrix.type, std::min(last * kTileRows, matrix.rows) - row, matrix.cols, packed};
}

// The task y (rows, matrix.rows) = units first .. last - 1 of a matrix times every row of x.
MatmulTask CpuDecoder::product_of(const CpuMatrix& matrix, uint32_t first, uint32_t last,
                                  const float* x, float* y) const {
    return {&matrix,
            first * kUnitTiles,
            std::min(last * kUnitTiles, matrix.tiles()),
            row_count(),
            static_cast<uint32_t>(sizes_.planes),
            scratch_.blocks,
            x,
            matrix.cols,
            y,
            matrix.rows};
}

// Does a task, gated by `up` where there is one. A mapped matrix is packed unit by unit.
void CpuDecoder::multiply(const CpuMatrix& matrix, MatmulTask task, uint32_t part,
                          const CpuMatrix* up) {
    task.up = up;
    if (matrix.data && (!up || up->data)) return multiply_packed(task, part);
    const uint32_t end = task.last_tile;
    const MatmulTask whole = task;
    for (uint32_t tile = task.first_tile; tile < end; tile += kUnitTiles) {
        const uint32_t count = std::min(kUnitTiles, end - tile);
        const auto piece = [&](const CpuMatrix& of, std::byte* packed) {
            if (!of.data) return pack_mapped(of, tile, tile + count, packed);
            return PackedMatrix{of.type, std::min(count * kTileRows, of.rows - tile * kTileRows),
                                of.cols, of.data + tile * packed_tile_bytes(of.type, of.cols)};
        };
        const PackedMatrix weights = piece(matrix, mapped_units(part)),
                           gated_by = up ? piece(*up, mapped_units(part) + matrix.unit_bytes())
                                         : weights;
        task.weights = &weights;
        if (up) task.up = &gated_by;
        task.first_tile = 0;
        task.last_tile = count;
        if (whole.y) task.y = whole.y + tile * kTileRows;
        if (whole.out)
            task.out = whole.out +
                       tile / kUnitTiles *
                           ActivationLayout{task.columns * task.planes, task.out_blocks}.step();
        kernels_->matmul(task);
    }
}

// While prefetch distances are on trial, products are timed by the type of their weights.
void CpuDecoder::multiply_packed(MatmulTask task, uint32_t part) {
    const auto type = static_cast<uint32_t>(find_layout(task.weights->type) - packed_layouts);
    task.ahead = ahead_[type];
    if (!times_types_) return kernels_->matmul(task);
    const uint64_t start = monotonic_ns();
    kernels_->matmul(task);
    ProductTime& time = product_times_[part * kWeightTypes + type];
    time.ns += monotonic_ns() - start;
    time.work += uint64_t{task.last_tile - task.first_tile} * task.weights->cols;
}

// ---- The stages ------------------------------------------------------------------------------

void CpuDecoder::embed_and_find_angles(uint32_t first, uint32_t last, uint32_t part) {
    for (uint32_t row = first; row < last; ++row) {
        embed_row(rows_[row], scratch_.x + row * size_t{spec_->n_embd}, part);
        find_angles(rows_[row], scratch_.cos_sin + row * sizes_.rope_values);
    }
}

void CpuDecoder::embed_row(const BatchRow& row, float* x, uint32_t part) {
    const size_t n = spec_->n_embd;
    if (row.embedding) {
        std::memcpy(x, row.embedding, n * sizeof(float));
    } else {
        read_row(weights_.model.matrix(TensorRole::token_embd), static_cast<uint32_t>(row.token), x,
                 part);
        if (spec_->embedding_scale != 1) kernels_->scale(x, spec_->embedding_scale, n);
    }
    if (!spec_->position_embd) return;
    float* const place = scratch_.y + (x - scratch_.x);
    read_row(weights_.model.matrix(TensorRole::position_embd), row.position, place, part);
    kernels_->add(x, place, n);
}

void CpuDecoder::read_row(const CpuMatrix& from, uint32_t number, float* out, uint32_t part) {
    PackedMatrix packed = from;
    if (!packed.data) {
        const uint32_t tile = number / kTileRows;
        packed = pack_mapped(from, tile, tile + 1, mapped_units(part));
        number %= kTileRows;
    }
    dequantize_row(packed, number, out);
}

// Cosine and sine of each pair's rotation at a position, for each of the tables.
void CpuDecoder::find_angles(const BatchRow& row, float* cos_sin) const {
    for (const RopeTable& rope : ropes_)
        for (const double frequency :
             rope.frequencies[row.long_rope && !spec_->rope_long_factors.empty()]) {
            double sine, cosine;
            exact_sincos(static_cast<double>(row.position) * frequency, &sine, &cosine);
            const double magnitude = static_cast<double>(rope.spec->magnitude);
            *cos_sin++ = static_cast<float>(cosine * magnitude);
            *cos_sin++ = static_cast<float>(sine * magnitude);
        }
}

void CpuDecoder::norm(const float* x, const float* weight, const float* bias, float* y) const {
    const size_t n = spec_->n_embd;
    if (!weight) std::memcpy(y, x, n * sizeof(float));
    else if (spec_->norm == NormKind::layer) layer_norm(x, weight, bias, spec_->norm_eps, n, y);
    else kernels_->rms_norm(x, weight, spec_->norm_eps, n, y);
}

void CpuDecoder::norm_and_quantize(uint32_t first, uint32_t last, const CpuTensors& in,
                                   TensorRole weight, TensorRole bias, uint64_t planes) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first, end; row < last; row = end) {
        end = group_end(row, last, planes);
        for (uint32_t i = row; i < end; ++i)
            norm(scratch_.x + i * n, in.vector(weight), in.vector(bias), scratch_.y + i * n);
        quantize_group(scratch_.y + row * n, spec_->n_embd, planes, row, end, scratch_.blocks);
    }
}

void CpuDecoder::norm_and_quantize_for_attention(uint32_t first, uint32_t last, uint32_t) {
    norm_and_quantize(first, last, layer().tensors, TensorRole::attn_norm,
                      TensorRole::attn_norm_bias, sizes_.planes);
}

// Adds a bias to the rows of a task that is done.
void CpuDecoder::add_bias(const MatmulTask& task, const float* bias) const {
    if (!bias) return;
    const size_t begin = size_t{task.first_tile} * kTileRows,
                 end = std::min<size_t>(size_t{task.last_tile} * kTileRows, task.weights->rows);
    for (size_t row = 0; row < task.columns; ++row)
        kernels_->add(task.y + row * task.y_stride + begin, bias + begin, end - begin);
}

// Products of several matrices with y, whose units are numbered one matrix after the other.
void CpuDecoder::multiply_several(std::span<const Product> products, uint32_t first, uint32_t last,
                                  uint32_t part) {
    uint32_t base = 0;
    for (const auto& [matrix, bias, y] : products) {
        const uint32_t end = base + matrix->units();
        const uint32_t from = std::max(first, base), to = std::min(last, end);
        if (from < to) {
            const MatmulTask task = product_of(*matrix, from - base, to - base, scratch_.y, y);
            multiply(*matrix, task, part);
            add_bias(task, bias);
        }
        base = end;
    }
}

void CpuDecoder::multiply_qkv_and_bias(uint32_t first, uint32_t last, uint32_t part) {
    const Product products[] = {
        {&matrix(TensorRole::q), layer().vector(TensorRole::q_bias), scratch_.q},
        {&matrix(TensorRole::k), layer().vector(TensorRole::k_bias), scratch_.k},
        {&matrix(TensorRole::v), layer().vector(TensorRole::v_bias), scratch_.v},
    };
    multiply_several(products, first, last, part);
}

// Each head by itself, or all of a row.
void CpuDecoder::norm_heads(float* q, float* k) const {
    const LayerSpec& spec = *layer().spec;
    const struct {
        float* x;
        size_t heads;
        const float* weight;
    } both[] = {{q, spec.n_heads, layer().vector(TensorRole::q_norm)},
                {k, spec.n_kv_heads, layer().vector(TensorRole::k_norm)}};
    for (const auto& [x, heads, weight] : both) {
        const size_t n = spec.qk_norm == QkNorm::row ? heads * spec.head_dim : spec.head_dim;
        for (size_t at = 0; at < heads * spec.head_dim; at += n)
            if (spec.qk_norm == QkNorm::own)
                layer_norm(x + at, weight + at, nullptr, spec_->norm_eps, n, x + at);
            else kernels_->rms_norm(x + at, weight, spec_->norm_eps, n, x + at);
    }
}

float CpuDecoder::query_scale(uint32_t position) const {
    const LayerSpec& spec = *layer().spec;
    if (spec.temperature == 0) return spec.attention_scale;
    const double times = exact_log(1.0 + position / spec.temperature_length);
    const double warmer = 1 + rounded(static_cast<double>(spec.temperature) * times);
    return static_cast<float>(rounded(static_cast<double>(spec.attention_scale) * warmer));
}

void CpuDecoder::rotate_scale_store(uint32_t first, uint32_t last, uint32_t) {
    const LayerSpec& spec = *layer().spec;
    const RopeSpec& rope = spec.rope;
    const bool neox = rope.kind == RopeKind::neox;
    const uint32_t dim = spec.head_dim, group = spec.n_heads / spec.n_kv_heads;
    const size_t n_q = size_t{spec.n_heads} * dim, n_kv = size_t{spec.n_kv_heads} * dim;
    size_t table = 0;
    for (uint32_t i = 0; i < layer().rope; ++i) table += ropes_[i].spec->dims;
    for (uint32_t row = first; row < last; ++row) {
        const float* cos_sin = scratch_.cos_sin + row * sizes_.rope_values + table;
        float *q = scratch_.q + row * n_q, *k = scratch_.k + row * n_kv;
        if (spec.qk_norm != QkNorm::none && !spec.qk_norm_after_rope) norm_heads(q, k);
        if (rope.dims > 0) {
            kernels_->rope(q, spec.n_heads, dim, rope.dims, neox, cos_sin);
            kernels_->rope(k, spec.n_kv_heads, dim, rope.dims, neox, cos_sin);
        }
        if (spec.qk_norm != QkNorm::none && spec.qk_norm_after_rope) norm_heads(q, k);
        kernels_->scale(q, query_scale(rows_[row].position), n_q);
        const uint32_t position = rows_[row].position, in_page = position % options_.page_tokens;
        std::byte* page = kv_page(layer(), pages(rows_[row])[position / options_.page_tokens]);
        const size_t half = layer().kv_head_bytes / 2;
        const size_t group_at = in_page / kKeyGroup * (half * kKeyGroup / options_.page_tokens);
        for (uint32_t head = 0; head < spec.n_kv_heads; ++head) {
            std::memcpy(scratch_.turned + (size_t{head} * rows_.size() + row) * group * dim,
                        q + size_t{head} * group * dim, group * dim * sizeof(float));
            std::byte* keys = page + head * layer().kv_head_bytes + group_at;
            kernels_->store_kv(options_.kv_type, k + size_t{head} * dim,
                               scratch_.v + row * n_kv + size_t{head} * dim, dim,
                               in_page % kKeyGroup, keys, keys + half);
        }
    }
}

void CpuDecoder::merge_and_quantize(uint32_t first, uint32_t last, uint32_t) {
    const uint32_t n = layer().spec->n_heads * layer().spec->head_dim;
    for (uint32_t row = first, end; row < last; row = end) {
        end = group_end(row, last, sizes_.planes);
        for (uint32_t i = row; i < end && splits_rows(); ++i) merge_split_row(i);
        quantize_group(scratch_.attended + size_t{row} * n, n, sizes_.planes, row, end,
                       scratch_.blocks);
    }
}

// Some units of a matrix times activations: added to x, or put into z.
void CpuDecoder::project(TensorRole weights, TensorRole bias, const ActivationBlock* blocks,
                         const float* x, float* to, uint32_t first, uint32_t last, uint32_t part) {
    MatmulTask task = product_of(matrix(weights), first, last, x, to);
    task.blocks = blocks;
    task.add = to == scratch_.x || (weights == TensorRole::down && layer().has_experts());
    multiply(matrix(weights), task, part);
    add_bias(task, layer().vector(bias));
}

void CpuDecoder::project_attention_and_add(uint32_t first, uint32_t last, uint32_t part) {
    project(TensorRole::attn_output, TensorRole::attn_output_bias, scratch_.blocks,
            scratch_.attended, scratch_.x, first, last, part);
}

void CpuDecoder::project_attention(uint32_t first, uint32_t last, uint32_t part) {
    project(TensorRole::attn_output, TensorRole::attn_output_bias, scratch_.blocks,
            scratch_.attended, scratch_.z, first, last, part);
}

void CpuDecoder::norm_and_add(uint32_t first, uint32_t last, TensorRole weight) {
    const size_t n = spec_->n_embd;
    for (uint32_t row = first; row < last; ++row) {
        float *const x = scratch_.x + row * n, *const z = scratch_.z + row * n;
        if (layer().vector(weight)) norm(z, layer().vector(weight), nullptr, z);
        if (spec_->residual_scale != 1) kernels_->scale(z, spec_->residual_scale, n);
        kernels_->add(x, z, n);
    }
}

void CpuDecoder::norm_and_add_attention(uint32_t first, uint32_t last, uint32_t) {
    norm_and_add(first, last, TensorRole::post_attn_norm);
}

void CpuDecoder::norm_and_quantize_for_ffn(uint32_t first, uint32_t last, uint32_t) {
    const bool shares_norm = layer().spec->parallel && !layer().spec->ffn_norm;
    norm_and_quantize(
        first, last, layer().tensors, shares_norm ? TensorRole::attn_norm : TensorRole::ffn_norm,
        shares_norm ? TensorRole::attn_norm_bias : TensorRole::ffn_norm_bias, sizes_.planes);
}

void CpuDecoder::gate_up_and_quantize(uint32_t first, uint32_t last, uint32_t part) {
    const CpuMatrix& down = matrix(TensorRole::down);
    MatmulTask task = product_of(matrix(TensorRole::gate), first, last, scratch_.y, scratch_.h);
    if (down.quantized()) task.out = scratch_.h_blocks;
    task.out_blocks = down.cols / kActivationBlock;
    multiply(matrix(TensorRole::gate), task, part, &matrix(TensorRole::up));
}

void CpuDecoder::multiply_gate_and_up(uint32_t first, uint32_t last, uint32_t part) {
    const Product products[] = {
        {&matrix(TensorRole::gate), layer().vector(TensorRole::gate_bias), scratch_.h},
        {&matrix(TensorRole::up), layer().vector(TensorRole::up_bias), scratch_.up},
    };
    multiply_several(products, first, last, part);
}

void CpuDecoder::multiply_up(uint32_t first, uint32_t last, uint32_t part) {
    const Product product = {&matrix(TensorRole::up), layer().vector(TensorRole::up_bias),
                             scratch_.h};
    multiply_several({&product, 1}, first, last, part);
}

void CpuDecoder::activate_and_quantize(uint32_t first, uint32_t last, uint32_t) {
    const LayerSpec& spec = *layer().spec;
    const size_t n = spec.n_ff;
    for (uint32_t row = first, end; row < last; row = end) {
        end = group_end(row, last, sizes_.planes);
        for (uint32_t i = row; i < end; ++i) {
            float* const h = scratch_.h + i * n;
            activate(*kernels_, spec.activation, spec.bend, h,
                     spec.gated ? scratch_.up + i * n : nullptr, n);
            weigh_shared(i, h);
        }
        if (matrix(TensorRole::down).quantized())
            quantize_group(scratch_.h + row * n, spec.n_ff, sizes_.planes, row, end,
                           scratch_.h_blocks);
    }
}

void CpuDecoder::project_ffn_and_add(uint32_t first, uint32_t last, uint32_t part) {
    project(TensorRole::down, TensorRole::down_bias, scratch_.h_blocks, scratch_.h, scratch_.x,
            first, last, part);
}

void CpuDecoder::project_ffn(uint32_t first, uint32_t last, uint32_t part) {
    project(TensorRole::down, TensorRole::down_bias, scratch_.h_blocks, scratch_.h, scratch_.z,
            first, last, part);
}

void CpuDecoder::norm_and_add_ffn(uint32_t first, uint32_t last, uint32_t) {
    norm_and_add(first, last, TensorRole::post_ffn_norm);
}

// The output matrix always meets activations of two planes.
void CpuDecoder::norm_and_quantize_wanted(uint32_t first, uint32_t last, uint32_t) {
    norm_and_quantize(first, last, weights_.model, TensorRole::output_norm,
                      TensorRole::output_norm_bias, 2);
}

void CpuDecoder::multiply_logits_and_check(uint32_t first, uint32_t last, uint32_t part) {
    const CpuMatrix& output = weights_.model.matrix(TensorRole::output);
    MatmulTask task = product_of(output, first, last, scratch_.y, scratch_.logits);
    task.planes = 2;
    multiply(output, task, part);
    add_bias(task, weights_.model.vector(TensorRole::output_bias));
    const size_t begin = size_t{task.first_tile} * kTileRows,
                 end = std::min<size_t>(size_t{task.last_tile} * kTileRows, output.rows);
    for (uint32_t i = 0; i < row_count(); ++i) {
        float* logits = scratch_.logits + size_t{i} * output.rows;
        if (spec_->logit_scale != 1)
            kernels_->scale(logits + begin, spec_->logit_scale, end - begin);
        apply_soft_cap(logits + begin, spec_->soft_cap, end - begin);
        if (!all_finite(logits + begin, end - begin))
            bad_rows_[i].store(true, std::memory_order_relaxed);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

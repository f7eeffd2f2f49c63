#include "prologue.hpp"

#include "kernels/products.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Scalar reference ------------------------------------------------------------------------
//
// Each kernel as the numeric definition says it, in plain loops: the place to begin reading. First
// the dot product (dot_block), then quantization of activations, norm, rope, feed-forward, and the
// cache and attention at the end. Every other table computes the same bits in another way.

namespace scalar {

// A block of one row, ready for the definition's formulas.
struct RowBlock {
    int32_t w[kActivationBlock];
    float scale;     // dw
    float minimum;   // m; of two scales, the second
    int32_t sub[2];  // scales of the two halves, else 1
    int32_t low[2];  // Q2_K's minimums of the two halves, in units of `minimum`
};

// Definition, 2: one block of a row of weights times one block of a plane.
int32_t dot_integers(const int32_t* w, const int8_t* h) {
    int32_t sum = 0;
    for (uint32_t i = 0; i < kActivationBlock / 2; i++) sum += w[i] * h[i];
    return sum;
}

float dot_block(const PackedLayout& layout, const RowBlock& row, const ActivationBlock& a,
                float acc) {
    if (layout.two_scales) {
        const float first = static_cast<float>(dot_integers(row.w, a.q)),
                    last = static_cast<float>(dot_integers(row.w + 16, a.q + 16));
        return fma_once(fma_once(first, row.scale, last * row.minimum), a.d, acc);
    }
    const int32_t sum = row.sub[0] * dot_integers(row.w, a.q) +
                        row.sub[1] * dot_integers(row.w + 16, a.q + 16);
    acc = fma_once(static_cast<float>(sum), row.scale * a.d, acc);
    if (!layout.minimum) return acc;
    if (layout.sub_scales < 2) return fma_once(row.minimum, a.s, acc);
    const int32_t low = row.low[0] * a.sum[0] + row.low[1] * a.sum[1];
    return fma_once(static_cast<float>(low), row.minimum * a.d, acc);
}

// Takes one row of a block out of a packed tile: packed layouts.
void read_block(const PackedLayout& layout, const std::byte* tile, size_t block, uint32_t row,
                RowBlock& out) {
    const std::byte* header = tile + block / layout.blocks * layout.super_bytes();
    const std::byte* at = header + layout.header_bytes() +
                          block % layout.blocks * layout.block_bytes();
    uint32_t words[8];
    load_codes(layout, at + layout.scale_bytes(), row, words);
    for (uint32_t i = 0; i < kActivationBlock; i++) {
        const uint32_t code = words[i / 4] >> i % 4 * 8 & 255;
        out.w[i] = layout.values ? layout.values[code] : static_cast<int32_t>(code) - layout.bias;
    }
    const std::byte* scales = layout.header_bytes() ? header : at;
    const auto sub = [&](uint32_t i) { return static_cast<int32_t>(at[16 * i + row]); };
    out.scale = scale_value(layout.scale, scales, row);
    out.minimum = layout.second_scale() ? scale_value(layout.scale, scales, kTileRows + row) : 0.0f;
    out.sub[0] = out.sub[1] = 1;
    out.low[0] = out.low[1] = 1;
    for (uint32_t i = 0; layout.sub_scales == 2 && i < 2; i++) {
        out.sub[i] = static_cast<int8_t>(sub(i));
        if (layout.minimum) out.low[i] = sub(2 + i);
    }
    if (layout.sub_scales == 1) {
        out.scale *= static_cast<float>(sub(0));
        out.minimum *= static_cast<float>(sub(1));
    }
    if (layout.sub_scales && layout.minimum) out.minimum = -out.minimum;
}

// One row against all planes of the batch.
void dot_row(const PackedLayout& layout, const std::byte* tile, uint32_t row, size_t blocks,
             const ColumnBatch& batch, float* acc) {
    for (uint32_t p = 0; p < batch.count; p++) acc[p] = 0;
    for (size_t b = 0; b < blocks; b++) {
        RowBlock block;
        read_block(layout, tile, b, row, block);
        for (uint32_t p = 0; p < batch.count; p++)
            acc[p] = dot_block(layout, block, batch.plane(p)[b * batch.step()], acc[p]);
    }
}

float dot_float_row(TensorType type, const std::byte* tile, uint32_t row, size_t cols,
                    const float* x) {
    float acc = 0;
    for (size_t k = 0; k < cols; k++)
        acc = fma_once(packed_float(type, tile, k * kTileRows + row), x[k], acc);
    return acc;
}

void product(const TilePair& pair, const ColumnBatch& batch, PairSums sums) {
    const PackedLayout& layout = *pair.layout;
    for (uint32_t r = 0; r < 2 * kTileRows; r++) {
        const std::byte* tile = pair.tiles[r / kTileRows];
        const uint32_t row = r % kTileRows;
        float acc[kBatchColumns];
        if (!layout.float_bytes)
            dot_row(layout, tile, row, pair.cols / kActivationBlock, batch, acc);
        for (uint32_t c = 0; c < batch.count; c++)
            sums[c][r / kTileRows][row] = !layout.float_bytes
                                              ? acc[c]
                                              : dot_float_row(layout.type, tile, row, pair.cols,
                                                              reinterpret_cast<const float*>(
                                                                  batch.column(c)));
    }
}

void quantize_plane(const float* x, float d, float inverse, ActivationBlock& out) {
    out = {d, 0, {0, 0}, {}};
    for (uint32_t i = 0; d > 0 && i < kActivationBlock; i++) {
        const double nearest = nearest_integer(double(x[i]) * double(inverse));
        out.q[i] = static_cast<int8_t>(std::min(127.0, std::max(-127.0, nearest)));
        out.sum[i / 16] += out.q[i];
    }
    out.s = d * static_cast<float>(out.sum[0] + out.sum[1]);
}

void quantize_block(const float* x, uint32_t planes, ActivationBlock* out) {
    uint32_t largest = 0;  // magnitudes order like their bits
    for (uint32_t i = 0; i < kActivationBlock; i++)
        largest = std::max(largest, bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    const float amax = bit_cast<float>(largest);
    const bool finite = largest < 0x7f800000u, zero = amax < 0x1p-100f;
    const float d = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : amax / 127.0f;
    const float inverse = finite && !zero ? 127.0f / amax : 0.0f;
    quantize_plane(x, d, inverse, out[0]);
    if (planes < 2) return;
    float rest[kActivationBlock];
    for (uint32_t i = 0; i < kActivationBlock; i++)
        rest[i] = fma_once(-d, static_cast<float>(out[0].q[i]), x[i]);
    quantize_plane(rest, d / 254.0f, inverse * 254.0f, out[1]);
}

void quantize(const QuantizeTask& task) {
    for (uint32_t c = 0; c < task.columns; c++)
        for (size_t b = 0; b < task.n / kActivationBlock; b++)
            quantize_block(task.x + c * task.x_stride + b * kActivationBlock, task.planes,
                           task.out + b * task.step + c * task.planes);
}

float sum_of_lanes(float lanes[16]) {
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
    float lanes[16] = {};
    for (size_t i = 0; i < n; i++) lanes[i % 16] = fma_once(x[i], x[i], lanes[i % 16]);
    const float scale = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    for (size_t i = 0; i < n; i++) y[i] = (x[i] * scale) * weight[i];
}

void rotate(float& a, float& b, float c, float s) {
    const float bs = b * s, bc = b * c;
    const float turned = fma_once(a, c, -bs);
    b = fma_once(a, s, bc);
    a = turned;
}

void rope(float* x, uint32_t n_heads, uint32_t head_dim, uint32_t n_rot, bool neox,
          const float* cos_sin) {
    for (uint32_t head = 0; head < n_heads; head++, x += head_dim)
        for (uint32_t i = 0; i < n_rot / 2; i++)
            rotate(x[neox ? i : 2 * i], x[neox ? i + n_rot / 2 : 2 * i + 1], cos_sin[2 * i],
                   cos_sin[2 * i + 1]);
}

void scale(float* x, float factor, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

void add(float* x, const float* y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

void add_scaled(float* x, float factor, const float* y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = fma_once(factor, y[i], x[i]);
}

void silu_mul(float* gate, const float* up, size_t n) {
    for (size_t i = 0; i < n; i++) gate[i] = silu_once(gate[i]) * up[i];
}

void matmul(const MatmulTask& task) {
    multiply_tiles(task,
                   {.product = product, .quantize = quantize, .add = add, .silu_mul = silu_mul});
}

void store_q8_0(const float* k, const float* v, uint32_t head_dim, uint32_t slot, void* key_group,
                void* value_group) {
    const size_t codes = head_dim * kKeyGroup, blocks = head_dim / kActivationBlock;
    std::byte *const keys = static_cast<std::byte*>(key_group), *const values =
                                                                    static_cast<std::byte*>(
                                                                        value_group);
    for (size_t b = 0; b < blocks; b++) {
        ActivationBlock key, value;
        quantize_block(k + b * kActivationBlock, 1, &key);
        quantize_block(v + b * kActivationBlock, 1, &value);
        for (size_t i = 0; i < kActivationBlock; i++)
            keys[(b * kActivationBlock + i) * kKeyGroup + slot] = static_cast<std::byte>(key.q[i]);
        std::memcpy(values + slot * head_dim + b * kActivationBlock, value.q, sizeof value.q);
        store16(keys + codes + 2 * (b * kKeyGroup + slot), half_bits(key.d));
        store16(values + codes + 2 * (slot * blocks + b), half_bits(value.d));
    }
}

void expand_kv(const void* key_group, const void* value_group, uint32_t head_dim, float* keys,
               float* values) {
    const size_t codes = head_dim * kKeyGroup;
    const int8_t *k = static_cast<const int8_t*>(key_group),
                 *v = static_cast<const int8_t*>(value_group);
    const std::byte *const k_scales = static_cast<const std::byte*>(key_group) + codes,
                           *const v_scales = static_cast<const std::byte*>(value_group) + codes;
    for (size_t b = 0; b < head_dim / kActivationBlock; b++) {
        float scales[kKeyGroup];
        for (size_t j = 0; j < kKeyGroup; j++)
            scales[j] = half_value(load16(k_scales + 2 * (b * kKeyGroup + j)));
        for (size_t i = 0; i < kActivationBlock; i++, k += kKeyGroup, keys += kKeyGroup)
            for (size_t j = 0; j < kKeyGroup; j++) keys[j] = scales[j] * static_cast<float>(k[j]);
    }
    for (size_t b = 0; b < codes / kActivationBlock; b++) {
        const float scale = half_value(load16(v_scales + 2 * b));
        for (size_t i = 0; i < kActivationBlock; i++) *values++ = scale * static_cast<float>(*v++);
    }
}

void store_kv(KvType type, const float* k, const float* v, uint32_t head_dim, uint32_t slot,
              void* key_group, void* value_group) {
    if (type == KvType::q8_0) return store_q8_0(k, v, head_dim, slot, key_group, value_group);
    for (size_t e = 0; e < head_dim; e++) {
        const size_t key = e * kKeyGroup + slot, value = size_t{slot} * head_dim + e;
        if (type == KvType::f32) {
            static_cast<float*>(key_group)[key] = k[e];
            static_cast<float*>(value_group)[value] = v[e];
        } else {
            static_cast<uint16_t*>(key_group)[key] = half_bits(k[e]);
            static_cast<uint16_t*>(value_group)[value] = half_bits(v[e]);
        }
    }
}

float read_kv(KvType type, const void* group, size_t index) {
    return type == KvType::f32 ? static_cast<const float*>(group)[index]
                               : half_value(static_cast<const uint16_t*>(group)[index]);
}

float capped(float x, float cap) {
    const float u = x / cap;
    return cap * (1.0f - 2.0f / (exp_once(u + u) + 1.0f));
}

// Activations in three parts (definition, 8 and 16): what is raised to a power of e, that, and what is
// made of x and it. The middle is a kernel of its own.
struct Silu {
    static float exponent(float x, const ActivationSpec&) { return -x; }
    static float value(float x, float e, const ActivationSpec&) { return x / (1.0f + e); }
};

struct GeluTanh {
    static float exponent(float x, const ActivationSpec&) {
        constexpr float linear = 0x1.988454p+0f,
                        cubic = 0x1.2444f2p-4f;  // 2 sqrt(2 / pi), * 0.044715
        return -(x * fma_once(x * x, cubic, linear));
    }
    static float value(float x, float e, const ActivationSpec&) { return x / (1.0f + e); }
};

struct Gelu {
    static float scaled(float x) { return std::fabs(x) * 0x1.6a09e6p-1f; }
    static float exponent(float x, const ActivationSpec&) { return -(scaled(x) * scaled(x)); }
    static float value(float x, float e, const ActivationSpec&) {
        constexpr float coefficients[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f,
                                          0.254829592f};
        const float t = 1.0f / fma_once(0.3275911f, scaled(x), 1.0f);
        float p = 0;
        for (const float c : coefficients) p = fma_once(p, t, c);
        const float tail = ((t * p) * e) * 0.5f;
        return x * (x < 0 ? tail : 1.0f - tail);
    }
};

struct SiluClamped {  // without its u + 1
    static float bounded(float gate) { return gate < 7.0f ? gate : 7.0f; }
    static float exponent(float gate, const ActivationSpec&) { return -(bounded(gate) * 1.702f); }
    static float value(float gate, float e, const ActivationSpec&) {
        return bounded(gate) / (1.0f + e);
    }
};

struct Xielu {
    static float exponent(float x, const ActivationSpec& spec) {
        return x < spec.most ? x : spec.most;
    }
    static float value(float x, float e, const ActivationSpec& spec) {
        const float straight = spec.linear * x;
        const float bent = x > 0 ? (spec.positive * x) * x : ((e - 1.0f) - x) * spec.negative;
        return bent + straight;
    }
};

template <class Act>
void bend(const Kernels& table, const ActivationSpec& spec, float* x, size_t n) {
    float e[64];
    for (size_t count; n > 0; n -= count, x += count) {
        count = std::min(n, std::size(e));
        for (size_t i = 0; i < count; i++) e[i] = Act::exponent(x[i], spec);
        table.exp(e, count);
        for (size_t i = 0; i < count; i++) x[i] = Act::value(x[i], e[i], spec);
    }
}

void relu_squared(const Kernels&, const ActivationSpec&, float* x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const float r = x[i] > 0 ? x[i] : 0;
        x[i] = r * r;
    }
}

void exp_all(float* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = exp_once(x[i]);
}

void attend(const AttentionTask& task, uint32_t query) {
    const uint32_t begin = task.begin[query], end = task.end[query];
    const float* q = task.q + query * task.q_stride;
    float p[kSegment], most = -std::numeric_limits<float>::infinity();
    for (uint32_t j = begin; j < end; j++) {
        p[j] = 0;
        for (size_t e = 0; e < task.head_dim; e++)
            p[j] = fma_once(q[e], read_kv(task.kv_type, task.keys[j / 16], e * kKeyGroup + j % 16),
                            p[j]);
        if (task.soft_cap != 0) p[j] = capped(p[j], task.soft_cap);
        if (p[j] > most) most = p[j];
    }
    most += 0.0f;
    float lanes[16] = {};
    for (uint32_t j = begin; j < end; j++) {
        p[j] = exp_once(p[j] - most);
        lanes[j % 16] += p[j];
    }
    task.max[query] = most;
    task.sum[query] = sum_of_lanes(lanes);
    float* out = task.out + query * task.out_stride;
    for (size_t e = 0; e < task.head_dim; e++) {
        out[e] = 0;
        for (uint32_t j = begin; j < end; j++)
            out[e] = fma_once(
                p[j], read_kv(task.kv_type, task.values[j / 16], j % 16 * task.head_dim + e),
                out[e]);
    }
}

void attention(const AttentionTask& task) {
    for (uint32_t query = 0; query < task.queries; query++)
        if (task.begin[query] < task.end[query]) attend(task, query);
}

void attention_merge(float* max, float* sum, float* out, float m, float l, const float* o,
                     size_t n) {
    const float most = m > *max ? m : *max;
    const float a = exp_once(*max - most), b = exp_once(m - most);
    *max = most;
    *sum = fma_once(l, b, *sum * a);
    for (size_t e = 0; e < n; e++) out[e] = fma_once(o[e], b, out[e] * a);
}

constexpr Kernels kernels = {
    .name = "scalar",
    .quantize = quantize,
    .matmul = matmul,
    .rms_norm = rms_norm,
    .rope = rope,
    .scale = scale,
    .add = add,
    .add_scaled = add_scaled,
    .exp = exp_all,
    .silu_mul = silu_mul,
    .store_kv = store_kv,
    .expand_kv = expand_kv,
    .attention = attention,
    .attention_merge = attention_merge,
};

}  // namespace scalar

void layer_norm(const float* x, const float* weight, const float* bias, float eps, size_t n,
                float* y) {
    float sums[16] = {}, squares[16] = {};
    for (size_t i = 0; i < n; i++) sums[i % 16] += x[i];
    const float mean = scalar::sum_of_lanes(sums) / static_cast<float>(n);
    for (size_t i = 0; i < n; i++)
        squares[i % 16] = fma_once(x[i] - mean, x[i] - mean, squares[i % 16]);
    const float scale = 1.0f /
                        std::sqrt(scalar::sum_of_lanes(squares) / static_cast<float>(n) + eps);
    for (size_t i = 0; i < n; i++) {
        y[i] = ((x[i] - mean) * scale) * weight[i];
        if (bias) y[i] += bias[i];
    }
}

void activate(const Kernels& kernels, Activation activation, const ActivationSpec& spec, float* x,
              const float* up, size_t n) {
    if (activation == Activation::silu && up) return kernels.silu_mul(x, up, n);
    using Bend = void (*)(const Kernels&, const ActivationSpec&, float*, size_t);
    static constexpr Bend bends[] = {
        scalar::bend<scalar::Silu>,        scalar::bend<scalar::Gelu>,
        scalar::bend<scalar::GeluTanh>,    scalar::relu_squared,
        scalar::bend<scalar::SiluClamped>, scalar::bend<scalar::Xielu>};
    bends[static_cast<size_t>(activation)](kernels, spec, x, n);
    const auto other = [&](float u) {
        if (activation != Activation::silu_clamped) return u;
        return (u < -7.0f ? -7.0f : u > 7.0f ? 7.0f : u) + 1.0f;
    };
    for (size_t i = 0; up && i < n; i++) x[i] *= other(up[i]);
}

void apply_soft_cap(float* x, float cap, size_t n) {
    for (size_t i = 0; cap != 0 && i < n; i++) x[i] = scalar::capped(x[i], cap);
}

void add_sink(float* max, float* sum, float* out, float score, size_t n) {
    const float most = score > *max ? score : *max;
    const float a = exp_once(*max - most), b = exp_once(score - most);
    *max = most;
    *sum = fma_once(1.0f, b, *sum * a);
    for (size_t e = 0; e < n; e++) out[e] *= a;
}

size_t kv_group_bytes(KvType type, uint32_t head_dim) {
    const size_t values = size_t{head_dim} * kKeyGroup;
    if (type == KvType::q8_0) return values + values / kActivationBlock * 2;
    return values * (type == KvType::f32 ? 4 : 2);
}

void dequantize_row(const PackedMatrix& matrix, uint32_t row, float* out) {
    const PackedLayout& layout = *find_layout(matrix.type);
    const std::byte* tile = packed_tile(matrix, row / kTileRows);
    const uint32_t lane = row % kTileRows;
    if (layout.float_bytes) {
        for (size_t k = 0; k < matrix.cols; k++)
            out[k] = packed_float(matrix.type, tile, k * kTileRows + lane);
        return;
    }
    for (size_t b = 0; b < matrix.cols / kActivationBlock; b++) {
        scalar::RowBlock block;
        scalar::read_block(layout, tile, b, lane, block);
        for (uint32_t i = 0; i < kActivationBlock; i++) {
            const float w = static_cast<float>(block.w[i]);
            const float d = layout.two_scales && i >= 16 ? block.minimum : block.scale,
                        scale = d * static_cast<float>(block.sub[i / 16]),
                        low = block.minimum * static_cast<float>(block.low[i / 16]);
            *out++ = layout.minimum ? fma_once(scale, w, low) : scale * w;
        }
    }
}

}  // namespace detail

uint64_t kv_bytes_per_token(KvType type, uint32_t n_kv_heads, uint32_t head_dim) {
    return uint64_t{n_kv_heads} * 2 * detail::kv_group_bytes(type, head_dim) / detail::kKeyGroup;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

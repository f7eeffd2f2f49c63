// >>backend
// Where the weights, the keys and values and the scratch arrays of the CPU backend lie. A plan and
// the real thing are computed by the same code, so that a plan is right to the byte.
#include "prologue.hpp"

#include "backend/cpu_layout.hpp"
#include "backend/internal.hpp"
#include "base/internal.hpp"
#include "kernels/exact.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

CpuMatrix CpuWeights::matrix(Carver& carver, const TensorRows& rows) {
    const TensorInfo& tensor = *rows.tensor;
    CpuMatrix out{
        {tensor.type, static_cast<uint32_t>(rows.count), static_cast<uint32_t>(tensor.dims[0])},
        &tensor,
        rows.first};
    out.data = packed_in_place(out);
    const uint64_t row_bytes = out.row_bytes(),
                   packed_bytes = out.tiles() * packed_tile_bytes(out.type, out.cols);
    if (out.data || (mapped && !tensor.packed)) {
        mapped_bytes += row_bytes * rows.count;
        if (!out.data) mapped_units = std::max(mapped_units, out.unit_bytes());
        return out;
    }
    std::byte* data = carver.take<std::byte>(packed_bytes);
    out.data = data;
    if (tensor.packed) items.push_back({&tensor, data, out.first_packed_byte(), packed_bytes, 0});
    else items.push_back({&tensor, data, rows.first * row_bytes, rows.count * row_bytes, out.rows});
    return out;
}

const std::byte* CpuWeights::packed_in_place(const CpuMatrix& matrix) const {
    const auto there = gguf->tensor_bytes(*matrix.tensor);
    if (!matrix.tensor->packed || !there || reinterpret_cast<uintptr_t>(there->data()) % 64)
        return nullptr;
    return there->data() + matrix.first_packed_byte();
}

const float* CpuWeights::vector(Carver& carver, const TensorRows& elements) {
    float* data = carver.take<float>(elements.count);
    items.push_back({elements.tensor, reinterpret_cast<std::byte*>(data),
                     elements.first * sizeof(float), elements.count * sizeof(float), 0});
    return data;
}

// In the order of the roles, which is about that of their use.
void CpuWeights::place_all(Carver& carver, const RoleTensors& from, CpuTensors& to) {
    for (size_t i = 0; i < kRoles; ++i) {
        const TensorRows& rows = from[static_cast<TensorRole>(i)];
        if (!rows || i >= static_cast<size_t>(TensorRole::expert_gate)) continue;
        if (rows.matrix) to.matrices[i] = matrix(carver, rows);
        else to.vectors[i] = vector(carver, rows);
    }
}

void CpuWeights::place_experts(Carver& carver, const RoleTensors& from, CpuLayer& to) {
    const struct {
        TensorRole role;
        std::vector<CpuMatrix>* matrices;
    } three[] = {{TensorRole::expert_gate, &to.gates},
                 {TensorRole::expert_up, &to.ups},
                 {TensorRole::expert_down, &to.downs}};
    for (const auto& [role, matrices] : three)
        for (uint32_t i = 0; i < to.spec->experts.count; ++i) {
            TensorRows rows = from[role];
            rows.first = i * rows.count;
            matrices->push_back(matrix(carver, rows));
        }
}

void CpuWeights::place(Carver& carver, const ModelSpec& spec, const ModelTensors& tensors) {
    RoleTensors others = tensors.model;
    const bool tied = others[TensorRole::output].tensor == others[TensorRole::token_embd].tensor;
    if (tied) others[TensorRole::output] = {};
    place_all(carver, others, model);
    if (tied)
        model.matrices[static_cast<size_t>(TensorRole::output)] = model.matrix(
            TensorRole::token_embd);
    for (size_t i = 0; i < spec.layers.size(); ++i) {
        CpuLayer& layer = layers.emplace_back();
        layer.spec = &spec.layers[i];
        place_all(carver, tensors.layers[i], layer.tensors);
        place_experts(carver, tensors.layers[i], layer);
        const CpuMatrix &gate = layer.matrix(TensorRole::gate), &up = layer.matrix(TensorRole::up);
        if (gate.tensor && (!gate.data || !up.data))
            mapped_units = std::max(mapped_units, gate.unit_bytes() + up.unit_bytes());
        for (size_t j = 0; j < layer.gates.size(); ++j)
            if (!layer.gates[j].data || !layer.ups[j].data)
                mapped_units = std::max(mapped_units,
                                        layer.gates[j].unit_bytes() + layer.ups[j].unit_bytes());
    }
}

uint64_t cpu_positions(const BackendOptions& options) {
    return std::min(options.max_positions ? options.max_positions
                                          : uint64_t{options.kv_pages} * options.page_tokens,
                    ModelSpec::max_context);
}

void CpuScratch::place(Carver& carver, const CpuSizes& n, uint64_t n_embd, uint64_t n_vocab) {
    const uint64_t start = carver.used;
    x = carver.take<float>(n.rows * n_embd);
    y = carver.take<float>(n.rows * n_embd);
    z = carver.take<float>(n.added_later * n_embd);
    routes = carver.take<float>(n.rows * n.experts);
    picked = carver.take<uint32_t>(n.picks);
    place_of = carver.take<uint32_t>(n.picks);
    weights = carver.take<float>(n.picks);
    picked_by = carver.take<uint32_t>(n.picks);
    group_ends = carver.take<uint32_t>(n.experts);
    groups = carver.take<ExpertGroup>(n.experts);
    inputs = carver.take<float>(n.picks * n_embd);
    gates = carver.take<float>(n.picks * n.expert_ff);
    ups = carver.take<float>(n.picks * n.expert_ff);
    const uint64_t pick_planes = n.picks ? n.picks * n.planes + n.experts * ActivationLayout::kGroup
                                         : 0;
    input_blocks = carver.take<ActivationBlock>(pick_planes * std::max(n_embd, n.expert_ff) /
                                                kActivationBlock);
    attended = carver.take<float>(n.rows * n.q);
    cos_sin = carver.take<float>(n.rows * n.rope_values);
    part_max = carver.take<float>(n.split_rows * n.segments * n.heads);
    part_sum = carver.take<float>(n.split_rows * n.segments * n.heads);
    part_out = carver.take<float>(n.split_rows * n.segments * n.q);
    logits = carver.take<float>(n.logit_rows * n_vocab);
    const auto blocks_of = [](uint64_t planes, uint64_t values) {
        const size_t each = static_cast<size_t>(values / kActivationBlock);
        return ActivationLayout{static_cast<uint32_t>(planes), each}.size();
    };
    blocks = carver.take<ActivationBlock>(std::max(
        blocks_of(n.rows * n.planes, std::max(n.q, n_embd)), blocks_of(n.logit_rows * 2, n_embd)));
    units = carver.take<AttentionUnit>(std::max(n.rows, n.split_rows * n.segments));
    wanted = carver.take<uint32_t>(n.logit_rows);
    kept = carver.take<BatchRow>(n.logit_rows);
    mapped_units = carver.take<std::byte>(n.parts * n.mapped_units);
    queries = carver.take<QueryScratch>(n.parts);
    for (uint64_t part = 0; part < n.parts; ++part) {
        QueryScratch one;
        for (float** array : {&one.max, &one.sum, &one.total_max, &one.total_sum})
            *array = carver.take<float>(kQueryRows * n.group);
        one.out = carver.take<float>(kQueryRows * n.group_values);
        one.expanded = carver.take<float>(n.expanded);
        one.begin = carver.take<uint16_t>(kQueryRows * n.group);
        one.end = carver.take<uint16_t>(kQueryRows * n.group);
        if (carver.base) queries[part] = one;
    }
    Carver other = carver;
    q = carver.take<float>(n.rows * n.q);
    k = carver.take<float>(n.rows * n.kv);
    v = carver.take<float>(n.rows * n.kv);
    turned = carver.take<float>(n.rows * n.q);
    h = other.take<float>(n.rows * n.ff_values);
    up = other.take<float>(n.rows * n.ff_up);
    h_blocks = other.take<ActivationBlock>(blocks_of(n.rows * n.planes, n.ff_quantized));
    carver.used = std::max({carver.used, other.used, start + n.parts * n.staging});
}

namespace {

constexpr uint32_t kMaxBatchRows = 65536;
constexpr uint32_t kMaxPageTokens = 4096;

double scale_by_yarn(double frequency, uint32_t pair, const RopeSpec& rope) {
    const double begin = static_cast<double>(rope.ramp_begin),
                 end = static_cast<double>(rope.ramp_end);
    const double share = std::clamp((pair - begin) / (end - begin), 0.0, 1.0);
    const double scaled = rounded(frequency * static_cast<double>(rope.scale)) * share;
    return rounded(scaled) + rounded(frequency * (1 - share));
}

std::vector<double> rope_frequencies(const RopeSpec& rope, const std::vector<float>& factors) {
    std::vector<double> out(rope.dims / 2);
    const double log2_base = exact_log2(static_cast<double>(rope.base));
    for (uint32_t i = 0; i < rope.dims / 2; ++i) {
        double f = exact_exp2(-(2.0 * i / rope.dims) * log2_base);
        if (rope.yarn) f = scale_by_yarn(f, i, rope);
        else if (rope.scale != 1) f *= static_cast<double>(rope.scale);
        if (!factors.empty()) f /= static_cast<double>(factors[i]);
        out[i] = f;
    }
    return out;
}

bool same_rope(const RopeSpec& a, const RopeSpec& b) {
    return a.kind == b.kind && a.dims == b.dims && a.base == b.base && a.scale == b.scale &&
           a.yarn == b.yarn && a.ramp_begin == b.ramp_begin && a.ramp_end == b.ramp_end &&
           a.magnitude == b.magnitude;
}

Result<void> check_cpu_options(const ModelTensors& tensors, const BackendOptions& options) {
    const auto refuse = [](const char* field, unsigned long long value, const char* wanted) {
        return make_error(ErrorKind::invalid_request,
                          format("%s: %llu is not %s", field, value, wanted), {}, field);
    };
    if (options.page_tokens == 0 || options.page_tokens % kKeyGroup ||
        options.page_tokens > kMaxPageTokens)
        return refuse("page_tokens", options.page_tokens, "a multiple of 16 up to 4096");
    if (options.kv_pages == 0) return refuse("kv_pages", 0, "positive");
    if (options.window_pages > UINT32_MAX - options.kv_pages)
        return refuse("window_pages", options.window_pages, "what kv_pages leave of 32 bits");
    if (options.max_batch_rows == 0 || options.max_batch_rows > kMaxBatchRows)
        return refuse("max_batch_rows", options.max_batch_rows, "in 1..65536");
    if (options.max_logit_rows == 0 || options.max_logit_rows > options.max_batch_rows)
        return refuse("max_logit_rows", options.max_logit_rows, "in 1..max_batch_rows");
    if (options.threads < -1 || options.threads > 1023)
        return make_error(ErrorKind::invalid_request,
                          format("threads: %d is not in -1..1023", options.threads), {}, "threads");
    for (const TensorRole role : {TensorRole::token_embd, TensorRole::output})
        if (const TensorInfo* tensor = tensors.model[role].tensor;
            !kernel_type_supported(tensor->type))
            return make_error(ErrorKind::unsupported, "tensor '" + std::string(tensor->name) +
                                                          "' has a type that no kernel reads");
    return {};
}

uint32_t cpu_parts(const BackendOptions& options) {
    const int helpers = options.threads < 0 ? physical_cores() - 1 : options.threads;
    return static_cast<uint32_t>(helpers) + 1;
}

CpuSizes measure_cpu(const ModelSpec& spec, const BackendOptions& options,
                     const CpuWeights& weights, const std::vector<RopeTable>& ropes) {
    CpuSizes n{};
    n.rows = options.max_batch_rows;
    n.logit_rows = options.max_logit_rows;
    n.planes = options.precision == Precision::fine ? 2 : 1;
    n.parts = cpu_parts(options);
    n.segments = (cpu_positions(options) + kSegment - 1) / kSegment;
    uint64_t fewest_kv_heads = UINT64_MAX;
    for (const LayerSpec& layer : spec.layers) {
        const uint64_t dim = layer.head_dim, group = layer.n_heads / layer.n_kv_heads;
        n.heads = std::max(n.heads, uint64_t{layer.n_heads});
        n.q = std::max(n.q, layer.n_heads * dim);
        n.kv = std::max(n.kv, layer.n_kv_heads * dim);
        n.group = std::max(n.group, group);
        n.group_values = std::max(n.group_values, group * dim);
        if (options.kv_type == KvType::q8_0) n.expanded = std::max(n.expanded, 2 * kSegment * dim);
        fewest_kv_heads = std::min(fewest_kv_heads, uint64_t{layer.n_kv_heads});
    }
    for (const CpuLayer& layer : weights.layers) {
        const CpuMatrix& down = layer.matrix(TensorRole::down);
        const ExpertSpec& experts = layer.spec->experts;
        n.experts = std::max(n.experts, uint64_t{experts.count});
        n.picks = std::max(n.picks, n.rows * experts.used);
        n.expert_ff = std::max(n.expert_ff, uint64_t{experts.n_ff});
        const uint64_t ff = down.cols;  // 0: experts alone
        if (down.tensor && down.quantized()) n.ff_quantized = std::max(n.ff_quantized, ff);
        if (down.tensor && !(down.quantized() && layer.gates_in_kernel()))
            n.ff_values = std::max(n.ff_values, ff);
        if (layer.spec->gated && !layer.gates_in_kernel()) n.ff_up = std::max(n.ff_up, ff);
        if (layer.adds_later(spec)) n.added_later = n.rows;
    }
    n.split_rows = std::min(n.rows, 2 * n.parts / fewest_kv_heads + 1);
    for (const RopeTable& rope : ropes) n.rope_values += rope.spec->dims;
    n.mapped_units = weights.mapped_units;
    for (const LoadItem& item : weights.items)
        if (item.pack()) n.staging = std::max(n.staging, item.row_bytes() * kTileRows);
    return n;
}

}  // namespace

Result<CpuLayout> lay_out_cpu(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, uintptr_t weights_base) {
    auto good = check_cpu_options(tensors, options);
    if (!good) return good.error();
    CpuLayout out;
    Carver weights{weights_base}, scratch;
    out.weights.gguf = &gguf;
    out.weights.mapped = options.weights == Weights::mapped;
    out.weights.place(weights, spec, tensors);
    out.plan.weights = weights.used;
    out.plan.mapped = out.weights.mapped_bytes;
    for (CpuLayer& layer : out.weights.layers) {
        const uint32_t head_dim = layer.spec->head_dim;
        if (options.kv_type == KvType::q8_0 && head_dim % kActivationBlock != 0)
            return make_error(ErrorKind::invalid_request,
                              format("kv_type: q8_0 wants heads of a multiple of 32 values; this "
                                     "model's have %u",
                                     head_dim),
                              {}, "kv_type");
        layer.kv_head_bytes = 2 * kv_group_bytes(options.kv_type, head_dim) *
                              (options.page_tokens / kKeyGroup);
        const bool own = options.window_pages && layer.spec->window;
        layer.first_page = own ? options.kv_pages : 0;
        layer.last_page = layer.first_page + (own ? options.window_pages : options.kv_pages) - 1;
        layer.kv_offset = out.page_bytes[own];  // times the pages, below
        out.page_bytes[own] += layer.kv_page_bytes();
        const RopeSpec& rope = layer.spec->rope;
        while (layer.rope < out.ropes.size() && !same_rope(*out.ropes[layer.rope].spec, rope))
            ++layer.rope;
        if (layer.rope == out.ropes.size())
            out.ropes.push_back({&rope,
                                 {rope_frequencies(rope, spec.rope_factors),
                                  rope_frequencies(rope, spec.rope_long_factors)}});
    }
    uint64_t others, own;
    if (mul_overflows(out.page_bytes[0], options.kv_pages, &others) ||
        mul_overflows(out.page_bytes[1], options.window_pages, &own) ||
        add_overflows(others, own, &out.plan.kv))
        return make_error(ErrorKind::out_of_memory,
                          format("out of memory: %u pages of keys and values",
                                 options.kv_pages + options.window_pages));
    for (CpuLayer& layer : out.weights.layers)
        layer.kv_offset = layer.first_page ? others + layer.kv_offset * options.window_pages
                                           : layer.kv_offset * options.kv_pages;
    out.sizes = measure_cpu(spec, options, out.weights, out.ropes);
    CpuScratch().place(scratch, out.sizes, spec.n_embd, spec.n_vocab);
    out.plan.scratch = scratch.used;
    return out;
}

Result<MemoryPlan> plan_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                    const ModelTensors& tensors, const BackendOptions& options) {
    auto layout = lay_out_cpu(gguf, spec, tensors, options, 0);
    if (!layout) return layout.error();
    return layout->plan;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

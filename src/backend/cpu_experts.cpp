// >>backend
// The stages of layers with experts: each row picks some, the rows that picked an expert meet its
// matrices together, and each row adds what its experts gave, in order of rank.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "kernels/exact.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

// In place: the router's numbers become weights.
void weigh(const Kernels& kernels, std::span<float> numbers, bool sigmoid) {
    const float most = sigmoid ? 0 : *std::max_element(numbers.begin(), numbers.end());
    for (float& x : numbers) x = sigmoid ? -x : x - most;
    kernels.exp(numbers.data(), numbers.size());
    if (sigmoid) {
        for (float& x : numbers) x = 1.0f / (1.0f + x);
        return;
    }
    float lanes[16] = {};
    for (size_t i = 0; i < numbers.size(); ++i) lanes[i % 16] += numbers[i];
    for (size_t half = 8; half > 0; half /= 2)
        for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    for (float& x : numbers) x /= lanes[0];
}

// What the experts of a row are compared by.
struct ExpertScores {
    const ExpertSpec& spec;
    const float *weights, *bias;

    float of(uint32_t expert) const {
        return bias ? weights[expert] + bias[expert] : weights[expert];
    }
    uint32_t group_size() const { return spec.count / spec.groups; }
    // The two best of a group, together.
    float of_group(uint32_t group) const {
        float best = -INFINITY, second = -INFINITY;
        for (uint32_t i = group * group_size(); i < (group + 1) * group_size(); ++i) {
            const float score = of(i);
            second = std::max(second, std::min(best, score));
            best = std::max(best, score);
        }
        return group_size() > 1 ? best + second : best;
    }
    // Whether fewer than groups_used others are better.
    bool is_open(uint32_t group) const {
        if (spec.groups_used == spec.groups) return true;
        const float own = of_group(group);
        uint32_t better = 0;
        for (uint32_t i = 0; i < spec.groups; ++i) {
            const float other = of_group(i);
            better += other > own || (other == own && i < group);
        }
        return better < spec.groups_used;
    }
};

}  // namespace

void CpuDecoder::route(uint32_t first, uint32_t last, uint32_t part) {
    const Product product = {&matrix(TensorRole::router), layer().vector(TensorRole::router_bias),
                             scratch_.routes};
    multiply_several({&product, 1}, first, last, part);
}

void CpuDecoder::pick_experts(uint32_t first, uint32_t last, uint32_t) {
    for (uint32_t row = first; row < last; ++row) pick(row);
}

// Of equal experts the one with the lower number comes first; one that is no number comes last.
void CpuDecoder::pick(uint32_t row) {
    const ExpertSpec& spec = layer().spec->experts;
    float* const numbers = scratch_.routes + size_t{row} * spec.count;
    weigh(*kernels_, {numbers, spec.count}, spec.sigmoid);
    const ExpertScores scores{spec, numbers, layer().vector(TensorRole::choice_bias)};
    uint32_t* const picked = scratch_.picked + size_t{row} * spec.used;
    float* const weights = scratch_.weights + size_t{row} * spec.used;
    uint32_t count = 0;
    for (uint32_t i = 0; i < spec.count; ++i) {
        if (i % scores.group_size() == 0 && !scores.is_open(i / scores.group_size())) {
            i += scores.group_size() - 1;
            continue;
        }
        uint32_t rank = count;  // where it belongs among the best so far
        while (rank > 0 && scores.of(i) > scores.of(picked[rank - 1])) --rank;
        if (rank == spec.used) continue;
        count = std::min(count + 1, spec.used);
        for (uint32_t j = count - 1; j > rank; --j) picked[j] = picked[j - 1];
        picked[rank] = i;
    }
    float sum = 0;
    for (uint32_t rank = 0; rank < spec.used; ++rank) sum += numbers[picked[rank]];
    for (uint32_t rank = 0; rank < spec.used; ++rank) {
        weights[rank] = spec.normalized ? numbers[picked[rank]] / sum : numbers[picked[rank]];
        if (spec.scale != 1) weights[rank] *= spec.scale;
    }
}

// Orders all picks by expert, and by row for an expert.
void CpuDecoder::group_picks() {
    const ExpertSpec& spec = layer().spec->experts;
    const uint32_t count = row_count() * spec.used;
    uint32_t* const ends = scratch_.group_ends;
    std::fill(ends, ends + spec.count, 0u);
    for (uint32_t i = 0; i < count; ++i) ++ends[scratch_.picked[i]];
    uint32_t first = 0;
    group_count_ = 0;
    for (uint32_t expert = 0; expert < spec.count; ++expert) {
        if (ends[expert]) scratch_.groups[group_count_++] = {expert, first, ends[expert]};
        first += std::exchange(ends[expert], first);
    }
    for (uint32_t i = 0; i < count; ++i) {
        scratch_.place_of[i] = ends[scratch_.picked[i]]++;
        scratch_.picked_by[scratch_.place_of[i]] = i / spec.used;
    }
}

// Each group's blocks begin where those before it, each rounded up to whole plane groups, end.
ActivationBlock* CpuDecoder::group_blocks(const ExpertGroup& group, size_t columns) const {
    const size_t number = static_cast<size_t>(&group - scratch_.groups);
    const size_t planes = static_cast<size_t>(group.first * sizes_.planes +
                                              number * ActivationLayout::kGroup);
    return scratch_.input_blocks + planes * (columns / kActivationBlock);
}

void CpuDecoder::quantize_expert(const ExpertGroup& group, const float* x, size_t columns) {
    if (columns % kActivationBlock != 0) return;  // no matrix that meets x is quantized
    const uint32_t planes = static_cast<uint32_t>(sizes_.planes);
    const ActivationLayout layout{group.rows * planes, columns / kActivationBlock};
    for (uint32_t row = 0, end; row < group.rows; row = end) {
        end = group_end(row, group.rows, planes);
        kernels_->quantize({x + row * columns, columns, end - row, planes, columns, layout.step(),
                            group_blocks(group, columns) + layout.at(row * planes)});
    }
}

void CpuDecoder::gather_and_quantize(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = spec_->n_embd;
    for (uint32_t i = first; i < last; ++i) {
        const ExpertGroup& group = scratch_.groups[i];
        float* const to = scratch_.inputs + group.first * n;
        for (uint32_t row = 0; row < group.rows; ++row)
            std::memcpy(to + row * n, scratch_.y + scratch_.picked_by[group.first + row] * n,
                        n * sizeof(float));
        quantize_expert(group, to, n);
    }
}

// Units first .. last - 1 of an expert's matrix, or of its gate and up together, times its rows.
void CpuDecoder::multiply_expert(const ExpertProduct& product, uint32_t first, uint32_t last,
                                 uint32_t part) {
    const auto& [group, weights, up, bias, x, y] = product;
    MatmulTask task = product_of(weights, first, last, x + size_t{group.first} * weights.cols,
                                 y + size_t{group.first} * weights.rows);
    task.columns = group.rows;
    task.blocks = group_blocks(group, weights.cols);
    multiply(weights, task, part, up);
    if (bias) add_bias(task, bias + size_t{group.expert} * weights.rows);
}

// Gates and ups are numbered one after the other, unless one kernel does both.
void CpuDecoder::multiply_expert_ff(uint32_t first, uint32_t last, uint32_t part) {
    const CpuLayer& in = layer();
    const uint32_t units = in.gates[0].units(), kinds = in.gates_experts_in_kernel() ? 1 : 2;
    for (uint32_t i = first, end; i < last; i = end) {
        end = std::min(last, (i / units + 1) * units);
        const ExpertGroup& group = scratch_.groups[i / (kinds * units)];
        const bool is_up = i / units % kinds == 1;
        multiply_expert(
            {group, (is_up ? in.ups : in.gates)[group.expert],
             kinds == 1 ? &in.ups[group.expert] : nullptr,
             in.vector(is_up ? TensorRole::expert_up_bias : TensorRole::expert_gate_bias),
             scratch_.inputs, is_up ? scratch_.ups : scratch_.gates},
            i % units, i % units + (end - i), part);
    }
}

void CpuDecoder::activate_experts(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = layer().spec->experts.n_ff;
    for (uint32_t i = first; i < last; ++i) {
        const ExpertGroup& group = scratch_.groups[i];
        float* const h = scratch_.gates + group.first * n;
        if (!layer().gates_experts_in_kernel())
            activate(*kernels_, layer().spec->activation, layer().spec->bend, h,
                     scratch_.ups + group.first * n, group.rows * n);
        quantize_expert(group, h, n);
    }
}

void CpuDecoder::project_experts(uint32_t first, uint32_t last, uint32_t part) {
    const uint32_t units = layer().downs[0].units();
    for (uint32_t i = first, end; i < last; i = end) {
        end = std::min(last, (i / units + 1) * units);
        const ExpertGroup& group = scratch_.groups[i / units];
        multiply_expert(
            {group, layer().downs[group.expert], nullptr,
             layer().vector(TensorRole::expert_down_bias), scratch_.gates, scratch_.inputs},
            i % units, i % units + (end - i), part);
    }
}

void CpuDecoder::add_picked(uint32_t first, uint32_t last, uint32_t) {
    const size_t n = spec_->n_embd, used = layer().spec->experts.used;
    for (uint32_t row = first; row < last; ++row) {
        const uint32_t* const place = scratch_.place_of + row * used;
        const float* const weights = scratch_.weights + row * used;
        float* const sum = scratch_.inputs + place[0] * n;
        kernels_->scale(sum, weights[0], n);
        for (size_t rank = 1; rank < used; ++rank)
            kernels_->add_scaled(sum, weights[rank], scratch_.inputs + place[rank] * n, n);
        if (layer().adds_ffn_later(*spec_))
            std::memcpy(scratch_.z + row * n, sum, n * sizeof(float));
        else kernels_->add(scratch_.x + row * n, sum, n);
    }
}

// The rows of h, each times a weight of its own: sigmoid(gate . y).
void CpuDecoder::weigh_shared(uint32_t row, float* h) const {
    const float* const gate = layer().vector(TensorRole::shared_gate);
    if (!gate) return;
    const float* const y = scratch_.y + row * size_t{spec_->n_embd};
    float sum = 0;
    for (size_t i = 0; i < spec_->n_embd; ++i) sum = fma_once(gate[i], y[i], sum);
    kernels_->scale(h, 1.0f / (1.0f + exp_once(-sum)), layer().spec->n_ff);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

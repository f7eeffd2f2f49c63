#pragma once

#include "model.hpp"

#include <array>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// What a tensor of a model is for.
enum class TensorRole : uint8_t {
    none,
    // of the model
    token_embd,
    position_embd,
    output_norm,
    output_norm_bias,
    output,
    output_bias,
    // of a layer
    attn_norm,
    attn_norm_bias,
    q,
    k,
    v,
    q_bias,
    k_bias,
    v_bias,
    q_norm,
    k_norm,
    sinks,
    attn_output,
    attn_output_bias,
    post_attn_norm,
    ffn_norm,
    ffn_norm_bias,
    gate,
    up,
    down,
    gate_bias,
    up_bias,
    down_bias,
    post_ffn_norm,
    router,
    router_bias,
    choice_bias,
    shared_gate,
    expert_gate_bias,
    expert_up_bias,
    expert_down_bias,
    expert_gate,
    expert_up,
    expert_down,
};
inline constexpr size_t kRoles = static_cast<size_t>(TensorRole::expert_down) + 1;

/// Rows of a tensor, or elements of a vector; all of it, or one of several that share a tensor.
struct TensorRows {
    const TensorInfo* tensor = nullptr;  // null: there is none
    uint64_t first = 0, count = 0;
    bool matrix = false;
    explicit operator bool() const { return tensor != nullptr; }
};

/// By role. Matrices are (rows, columns); a row is contiguous.
class RoleTensors {
public:
    TensorRows& operator[](TensorRole role) { return rows_[static_cast<size_t>(role)]; }
    const TensorRows& operator[](TensorRole role) const { return rows_[static_cast<size_t>(role)]; }

private:
    std::array<TensorRows, kRoles> rows_ = {};
};

/// All tensors, pointing into Gguf::tensors(): valid while that Gguf lives, moved or not.
struct ModelTensors {
    RoleTensors model;  // `output` equals `token_embd` where it is tied
    std::vector<RoleTensors> layers;
};

/// Tokens of a sequence up to which rope_factors turn it; from then on rope_long_factors do.
inline uint32_t short_rope_tokens(const ModelSpec& spec) {
    return spec.rope_long_factors.empty() ? UINT32_MAX : spec.n_rope_context;
}

/// Finds every tensor that the spec needs and checks shape and type. Matrices are of a type that
/// kernels read, vectors F32.
Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec);

}  // namespace detail
}  // namespace v1
}  // namespace valar

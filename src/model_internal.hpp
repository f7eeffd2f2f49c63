#pragma once

#include "model.hpp"

#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// Tensors of one layer, shapes as (rows, columns); a row is contiguous. Never null but the
/// biases, which are null where the layer has none. Norms and biases are F32.
struct LayerTensors {
    const TensorInfo* attn_norm = nullptr;    // (n_embd)
    const TensorInfo* q = nullptr;            // (n_heads * head_dim, n_embd)
    const TensorInfo* k = nullptr;            // (n_kv_heads * head_dim, n_embd)
    const TensorInfo* v = nullptr;            // (n_kv_heads * head_dim, n_embd)
    const TensorInfo* q_bias = nullptr;       // (n_heads * head_dim)
    const TensorInfo* k_bias = nullptr;       // (n_kv_heads * head_dim)
    const TensorInfo* v_bias = nullptr;       // (n_kv_heads * head_dim)
    const TensorInfo* attn_output = nullptr;  // (n_embd, n_heads * head_dim)
    const TensorInfo* ffn_norm = nullptr;     // (n_embd)
    const TensorInfo* gate = nullptr;         // (n_ff, n_embd)
    const TensorInfo* up = nullptr;           // (n_ff, n_embd)
    const TensorInfo* down = nullptr;         // (n_embd, n_ff)
};

/// All tensors, pointing into Gguf::tensors(): valid while that Gguf lives, moved or not.
struct ModelTensors {
    const TensorInfo* token_embd = nullptr;   // (n_vocab, n_embd)
    const TensorInfo* output_norm = nullptr;  // (n_embd)
    const TensorInfo* output = nullptr;       // (n_vocab, n_embd); equals token_embd when tied
    std::vector<LayerTensors> layers;
};

/// Finds every tensor that the spec needs and checks shape and type. Matrices are F32, F16, BF16,
/// Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K or Q6_K.
Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// >>model
// Owns: ModelSpec, which says as data what a decoder is, and the binding of a file's tensors to it.
// Assumes: a Gguf that outlives the binding.
// Promises: a spec that was read has sane sizes (limits below) and only options that a backend
// implements; a tensor that is missing, mis-shaped, unused or of an unsupported type is an error
// that names it.
#pragma once

#include "gguf.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace valar {
inline namespace v1 {

/// Which values of a head are rotated as a pair (RoPE, https://arxiv.org/abs/2104.09864).
enum class RopeKind : uint8_t {
    norm,  ///< neighbours: 2i and 2i + 1
    neox,  ///< halves: i and i + dims / 2
};

/// Pair i at position p turns by p * scale * base^(-2i / dims) / factor_i radians, where factor_i
/// is ModelSpec::rope_factors[i], or 1 where that is empty.
struct RopeSpec {
    RopeKind kind = RopeKind::norm;
    uint32_t dims = 0;  // the first `dims` values of a head turn, the rest stay; even
    float base = 10000;
    float scale = 1;  // linear scaling: 1 / factor
};

/// One layer: x += attention(rms_norm(x)); x += down(silu(gate(y)) * up(y)), y = rms_norm(x).
struct LayerSpec {
    uint32_t n_heads = 0;  // query heads; n_heads / n_kv_heads of them share a key head
    uint32_t n_kv_heads = 0;
    uint32_t head_dim = 0;  // of queries, keys and values
    uint32_t n_ff = 0;      // rows of gate and up
    bool qkv_bias = false;
    float attention_scale = 0;  // of query . key; 1 / sqrt(head_dim) unless the file says so
    uint32_t window = 0;        // a position sees itself and window - 1 before it; 0: all
    RopeSpec rope;
};

/// What the network is. The embedding is multiplied by embedding_scale, the logits by logit_scale.
struct ModelSpec {
    static constexpr uint64_t max_layers = 1024;
    static constexpr uint64_t max_width = 1 << 20;  // n_embd, n_ff, n_heads * head_dim
    static constexpr uint64_t max_vocab = 1 << 24;
    static constexpr uint64_t max_context = 1 << 24;  // positions are exact in float up to here

    std::string architecture;
    std::string name;  // for people, may be empty
    uint32_t n_vocab = 0;
    uint32_t n_embd = 0;     // width of the residual stream
    uint32_t n_context = 0;  // positions it was trained for
    float norm_eps = 0;      // of every RMS norm
    float embedding_scale = 1;
    float logit_scale = 1;
    std::vector<float> rope_factors;  // (dims / 2), positive, the same for all layers; or empty
    bool tied_output = false;         // the output matrix is the token embedding
    std::vector<LayerSpec> layers;
};

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

/// Reads what the file's architecture is: `llama` or `qwen2`.
VALAR_API Result<ModelSpec> read_model_spec(const Gguf& gguf);
/// Finds every tensor that the spec needs and checks shape and type. Matrices are F32, F16, BF16,
/// Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K or Q6_K.
VALAR_API Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec);

}  // namespace v1
}  // namespace valar

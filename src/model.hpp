// >>model
// Owns: ModelSpec, which says as data what a decoder is.
// Promises: a spec that was read has sane sizes (limits below) and only options that a backend
// implements; a key that is missing or out of its limits is an error that names it.
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
/// The norm is RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), the gated
/// network is SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), and query heads share key
/// heads in groups (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
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

/// Reads what the file's architecture is: `llama` or `qwen2`.
VALAR_API Result<ModelSpec> read_model_spec(const Gguf& gguf);

}  // namespace v1
}  // namespace valar

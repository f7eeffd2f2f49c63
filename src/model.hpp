// >>model
// Owns: ModelSpec, which says as data what a decoder is.
// Promises: a spec that was read has sane sizes (limits below) and only options that a backend
// implements; a key that is missing or out of its limits is an error that names it.
#pragma once

#include "gguf.hpp"
#include "kernels/kernels.hpp"

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
/// is ModelSpec::rope_factors[i], or 1 where that is empty. YaRN (https://arxiv.org/abs/2309.00071):
/// pairs before ramp_begin are not scaled, those from ramp_end on are, between them in part.
struct RopeSpec {
    RopeKind kind = RopeKind::norm;
    uint32_t dims = 0;  // the first `dims` values of a head turn, the rest stay; even; 0: none does
    float base = 10000;
    float scale = 1;  // 1 / factor, of linear scaling and of YaRN
    bool yarn = false;
    float ramp_begin = 0, ramp_end = 0;
    float magnitude = 1;  // times sine and cosine
};

enum class NormKind : uint8_t {
    rms,    ///< RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)
    layer,  ///< LayerNorm (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450)
};
enum class QkNorm : uint8_t {
    none,
    head,  ///< each head of queries and keys by itself, with one weight for all
    row,   ///< all heads together
    own,   ///< LayerNorm of each head by itself, with a weight of its own
};

/// Experts (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538): networks of which a router picks
/// some for each token; what they give is added, by the router's weights.
struct ExpertSpec {
    uint32_t count = 0;                    // 0: none, a layer has one network for all tokens
    uint32_t used = 0;                     // by a token
    uint32_t n_ff = 0;                     // rows of an expert's gate and up
    uint32_t groups = 1, groups_used = 1;  // only experts of the best groups may be picked
    bool sigmoid = false;                  // of the router's numbers; else softmax over them
    bool normalized = true;                // weights of those picked sum to 1, before their scale
    float scale = 1;
    bool choice_bias = false;  // added to weights where they are compared, nowhere else
    bool router_bias = false, bias = false;
    bool shared_gate = false;  // the shared network's output times sigmoid(gate . y)
};

/// One layer: x += attention(norm(x)); x += down(act(gate(y)) * up(y)), y = norm(x). With silu that
/// is SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202); not gated it is down(act(up(y))).
/// Query heads share key heads in groups (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
struct LayerSpec {
    uint32_t n_heads = 0;  // query heads; n_heads / n_kv_heads of them share a key head
    uint32_t n_kv_heads = 0;
    uint32_t head_dim = 0;  // of queries, keys and values
    uint32_t n_ff = 0;  // rows of gate and up; beside experts: of the network that all share, or 0
    bool qkv_bias = false, output_bias = false, ffn_bias = false;
    bool attn_norm = true, ffn_norm = true;              // of what is read; norm(x) is x without
    bool post_attn_norm = false, post_ffn_norm = false;  // of what is added
    bool parallel = false;  // both read the layer's input; y = attention's without ffn_norm
    bool gated = true;
    Activation activation = Activation::silu;
    QkNorm qk_norm = QkNorm::none;
    bool qk_norm_after_rope = false;
    bool sinks = false;         // each head has a score that takes weight and gives nothing
    float attention_scale = 0;  // of query . key; 1 / sqrt(head_dim) unless the file says so
    float soft_cap = 0;         // scores are soft_cap * tanh(score / soft_cap); 0: as they are
    uint32_t window = 0;        // a position sees itself and window - 1 before it; 0: all
    RopeSpec rope;
    // Queries at position p are scaled by 1 + temperature * ln(1 + floor(p / temperature_length)).
    float temperature = 0;
    uint32_t temperature_length = 1;
    ActivationSpec bend;  // of Activation::xielu
    ExpertSpec experts;
};

/// What the network is. The embedding is multiplied by embedding_scale, what layers add by
/// residual_scale, the logits by logit_scale.
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
    NormKind norm = NormKind::rms;
    bool norm_bias = false;  // LayerNorm's
    float norm_eps = 0;      // of every norm
    float embedding_scale = 1, residual_scale = 1, logit_scale = 1;
    float soft_cap = 0;               // of logits, as LayerSpec::soft_cap
    bool position_embd = false;       // learned positions, added to the embedding
    std::vector<float> rope_factors;  // (dims / 2), positive, the same for all layers; or empty
    std::vector<float> rope_long_factors;  // instead, for all of a sequence that is longer than
    uint32_t n_rope_context = 0;  // n_rope_context tokens (https://arxiv.org/abs/2402.13753)
    bool tied_output = false;     // the output matrix is the token embedding
    bool output_bias = false;
    std::vector<LayerSpec> layers;
};

/// Reads what the file's architecture is. Error (unsupported): an unknown one; the known are listed.
VALAR_API Result<ModelSpec> read_model_spec(const Gguf& gguf);

}  // namespace v1
}  // namespace valar

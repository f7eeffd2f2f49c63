// >>model
// Owns: ModelSpec, which says as data what a decoder is, and the binding of a file's tensors to it.
// Assumes: a Gguf that outlives the binding.
// Promises: a spec that was read has sane sizes and only options that a backend implements; a
// tensor that is missing, mis-shaped, unused or of an unsupported type is an error that names it.
#include "prologue.hpp"

#include "base/text.hpp"
#include "kernels/internal.hpp"
#include "model.hpp"
#include "model_internal.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

/// What a family does differently from `llama`.
enum Trait : uint32_t {
    norms_by_layer = 1,          // LayerNorm instead of RMSNorm
    ungated = 2,                 // down(act(up(y)))
    parallel_layer = 4,          // attention and feed-forward side by side
    learned_places = 8,          // positions are embedded, not rotated
    divides_logits = 16,         // logit_scale is a divisor
    full_unrotated = 32,         // layers that see all do not rotate
    norms_row = 64,              // q and k are normed over all heads
    norms_rotated = 128,         // q and k are normed after they were rotated
    post_is_ffn = 256,           // post_attention_norm is the feed-forward's own norm
    gates_apart = 512,           // the router's numbers become weights by sigmoid, each by itself
    weights_as_they_are = 1024,  // of experts: they do not sum to 1
};

struct SpecReader;

/// A new family is one more row; `more` is for what a row cannot say.
struct Architecture {
    const char* name;  // also the prefix of its keys
    RopeKind rope;
    uint32_t traits = 0;
    Activation activation = Activation::silu;
    uint32_t full_every = 0;  // of its windowed layers, where the file does not say so
    bool yarn_is_rounded = true;
    void (*more)(SpecReader&, ModelSpec&) = nullptr;
};

/// Keys of an architecture that may stand in a file unread: either way the network computes the same.
struct HarmlessKey {
    const char* name;
    double only = -1;  // with this number (true: 1); -1: whatever it says
};
constexpr HarmlessKey harmless_keys[] = {
    // token_embd.weight has as many rows
    {"vocab_size"},
    // how q and k were permuted, which is the same in all files of an architecture
    {"tensor_data_layout"},
    // the layers with tensors of experts have experts; a shared network is as wide as its tensors
    {"leading_dense_block_count"},
    {"interleave_moe_layer_step"},
    {"expert_shared_count"},
    {"expert_shared_feed_forward_length"},
    // read where there are experts
    {"expert_used_count"},
    {"expert_feed_forward_length"},
    {"expert_group_count"},
    {"expert_group_used_count"},
    {"expert_gating_func"},
    {"expert_weights_norm"},
    {"expert_weights_scale"},
    // of the other kind of norm
    {"attention.layer_norm_epsilon"},
    {"attention.layer_norm_rms_epsilon"},
    // every decoder is
    {"attention.causal", 1},
    // nothing is clamped, no score gets a bias
    {"attention.clamp_kqv", 0},
    {"attention.max_alibi_bias", 0},
    // read where positions are rotated, where layers have windows
    {"rope.dimension_count"},
    {"rope.freq_base_swa"},
    // an older name of rope.scaling.factor, read where that is missing
    {"rope.scale_linear"},
    // how the model was trained; what rope.freq_base holds already
    {"rope.scaling.finetuned"},
    {"rope.scaling.alpha"},
    // read where the file asks for the scaling that they belong to
    {"rope.scaling.factor"},
    {"rope.scaling.yarn_attn_factor"},
    {"rope.scaling.yarn_beta_fast"},
    {"rope.scaling.yarn_beta_slow"},
    {"rope.scaling.yarn_log_multiplier"},
    // YaRN as it is defined
    {"rope.scaling.yarn_ext_factor", 1},
    // of layers with a state, whose tensors nothing reads: some Granite files have no such layer
    {"ssm.conv_kernel"},
    {"ssm.state_size"},
    {"ssm.group_count"},
    {"ssm.inner_size"},
    {"ssm.time_step_rank"},
    // how embeddings are made of what the last layer leaves
    {"pooling_type"},
    // of images
    {"deepstack_mapping"},
    {"n_deepstack_layers"},
};

constexpr TensorType vector_types[] = {TensorType::f32};

/// Reads keys into a spec. After the first failure `error` is set and what is returned is of no
/// use, so that a reader can go on to its end and look once.
struct SpecReader {
    const Gguf& gguf;
    const Architecture* row = nullptr;
    std::string prefix = {};
    std::optional<Error> error = {};
    std::vector<bool> was_read = std::vector<bool>(gguf.keys().size());

    void fail(ErrorKind kind, std::string_view what) {
        if (!error) error = make_error(kind, join({gguf.name(), ": ", what}));
    }
    void fail_key(ErrorKind kind, const char* key, const char* what) {
        fail(kind, format("key '%s%s' %s", prefix.c_str(), key, what));
    }
    template <class T>
    T value(Result<T> result) {
        if (result) return *result;
        if (!error) error = result.error();
        return T{};
    }
    /// The whole name of a key, which from here on counts as read.
    std::string read(const char* key) {
        const std::string name = prefix + key;
        if (const GgufKey* found = gguf.find(name))
            was_read[static_cast<size_t>(found - gguf.keys().data())] = true;
        return name;
    }
    const GgufKey* find(const char* key) { return gguf.find(read(key)); }
    bool has_tensor(size_t layer, const char* name) const {
        return gguf.find_tensor(format("blk.%zu.", layer) + name) != nullptr;
    }

    uint32_t in_limits(const char* key, uint64_t number, uint64_t limit) {
        if (number < 1 || number > limit)
            fail_key(ErrorKind::bad_data, key,
                     format("is %llu, not from 1 to %llu", static_cast<unsigned long long>(number),
                            static_cast<unsigned long long>(limit))
                         .c_str());
        return error ? 1 : static_cast<uint32_t>(number);
    }
    uint32_t size(const char* key, uint64_t limit) {
        return in_limits(key, value(gguf.get_uint(read(key))), limit);
    }
    uint32_t size(const char* key, uint64_t limit, uint32_t fallback) {
        return find(key) ? size(key, limit) : fallback;
    }
    /// One number for all layers, or an array with one for each.
    uint32_t layer_size(const char* key, size_t layer, uint64_t limit) {
        const GgufKey* found = find(key);
        if (!found || !found->is_array) return size(key, limit);
        auto numbers = value(gguf.get_ints(read(key)));
        if (layer >= numbers.size())
            fail_key(ErrorKind::bad_data, key, "is too short for the layers");
        return error ? 1 : in_limits(key, static_cast<uint64_t>(numbers[layer]), limit);
    }
    /// With the fallback 0: a number that may be missing, or 0 for nothing.
    float number_or_none(const char* key) {
        const GgufKey* found = find(key);
        return found && value(gguf.get_float(read(key), 0.0)) != 0 ? positive(key, 1) : 0;
    }
    float positive(const char* key, float fallback) {
        const float number = static_cast<float>(
            value(gguf.get_float(read(key), static_cast<double>(fallback))));
        if (!(number > 0 && std::isfinite(number)))
            fail_key(ErrorKind::bad_data, key, "must be a positive number");
        return number;
    }
};

bool is_harmless(const SpecReader& in, const GgufKey& key) {
    for (const HarmlessKey& row : harmless_keys) {
        if (key.name.substr(in.prefix.size()) != row.name) continue;
        const auto whole = in.gguf.get_uint(key.name);
        const auto real = in.gguf.get_float(key.name);
        const auto truth = in.gguf.get_bool(key.name);
        return row.only < 0 || (whole && static_cast<double>(*whole) == row.only) ||
               (real && *real == row.only) || (truth && *truth == (row.only == 1));
    }
    return false;
}

/// What nobody read may ask for what is not computed here.
void refuse_unread_keys(SpecReader& in) {
    for (const GgufKey& key : in.gguf.keys())
        if (const bool was_read = in.was_read[static_cast<size_t>(&key - in.gguf.keys().data())];
            !was_read && key.name.starts_with(in.prefix) && !is_harmless(in, key))
            in.fail(
                ErrorKind::unsupported,
                join({"key '", key.name, "' is not used: what it asks for is not implemented"}));
}

// ---- Rope ------------------------------------------------------------------------------------

/// YaRN: which pairs turn so often in the original context that they are left alone, and which so
/// seldom that they are scaled in full.
void read_yarn(SpecReader& in, RopeSpec& rope, uint32_t n_context) {
    const double factor = 1.0 / static_cast<double>(rope.scale);
    const double context = in.size("rope.scaling.original_context_length", ModelSpec::max_context,
                                   n_context);
    const double fast = static_cast<double>(in.positive("rope.scaling.yarn_beta_fast", 32.0f));
    const double slow = static_cast<double>(in.positive("rope.scaling.yarn_beta_slow", 1.0f));
    const double dims = rope.dims;
    const auto pair_of = [&](double turns) {
        constexpr double two_pi = 6.283185307179586;
        return dims * exact_log(context / (turns * two_pi)) /
               (2 * exact_log(static_cast<double>(rope.base)));
    };
    const bool whole = in.row->yarn_is_rounded;
    const double begin = whole ? std::floor(pair_of(fast)) : pair_of(fast);
    const double end = whole ? std::ceil(pair_of(slow)) : pair_of(slow);
    if (!std::isfinite(begin) || !std::isfinite(end))
        in.fail_key(ErrorKind::bad_data, "rope.freq_base", "makes no ramp of YaRN");
    if (in.error) return;
    rope.yarn = true;
    rope.ramp_begin = static_cast<float>(std::max(begin, 0.0));
    rope.ramp_end = static_cast<float>(std::min(end, dims - 1));
    if (rope.ramp_begin == rope.ramp_end) rope.ramp_end += 0.001f;
    const double usual = factor > 1 ? 0.1 * exact_log(factor) + 1 : 1;
    // the multiplier says that the usual magnitude is taken back
    if (in.number_or_none("rope.scaling.yarn_log_multiplier") != 0) return;
    if (in.find("rope.scaling.yarn_attn_factor")) {
        rope.magnitude = in.positive("rope.scaling.yarn_attn_factor", 1);
        return;
    }
    rope.magnitude = static_cast<float>(static_cast<double>(rope.magnitude) * usual);
}

/// (llama3's scaling and longrope need no key but the magnitude: their factors are tensors.)
void read_rope_scaling(SpecReader& in, RopeSpec& rope, uint32_t n_context) {
    const auto type = in.value(in.gguf.get_string(in.read("rope.scaling.type"), "linear"));
    rope.magnitude = in.positive("rope.scaling.attn_factor", 1.0f);
    if (type == "none" || type == "longrope") return;
    if (type != "linear" && type != "yarn" && type != "longrope")
        in.fail_key(ErrorKind::unsupported, "rope.scaling.type",
                    "is none of 'none', 'linear', 'yarn', 'longrope'");
    const char* key = in.find("rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
    rope.scale = 1.0f / in.positive(key, 1.0f);
    if (type == "yarn" && rope.dims > 0 && !in.error) read_yarn(in, rope, n_context);
}

std::vector<float> read_rope_factors(SpecReader& in, const char* name, uint32_t rope_dims) {
    const TensorInfo* tensor = in.gguf.find_tensor(name);
    if (!tensor || in.error) return {};
    const auto refuse = [&](const char* what) {
        in.fail(ErrorKind::bad_data, format("tensor '%s' %s", name, what));
        return std::vector<float>();
    };
    if (tensor->type != TensorType::f32 || tensor->n_dims != 1 || tensor->dims[0] != rope_dims / 2)
        return refuse("is not F32 of half the rope dims");
    std::vector<float> factors(rope_dims / 2);
    const auto bytes = std::as_writable_bytes(std::span<float>(factors));
    if (auto done = in.gguf.read_tensor(*tensor, 0, bytes); !done) in.error = done.error();
    for (float factor : factors)
        if (!(factor > 0 && std::isfinite(factor))) return refuse("has a factor not positive");
    return factors;
}

void read_all_rope_factors(SpecReader& in, ModelSpec& spec) {
    const uint32_t dims = spec.layers[0].rope.dims;
    spec.rope_factors = read_rope_factors(in, "rope_freqs.weight", dims);
    if (spec.rope_factors.empty())
        spec.rope_factors = read_rope_factors(in, "rope_factors_short.weight", dims);
    spec.rope_long_factors = read_rope_factors(in, "rope_factors_long.weight", dims);
    spec.n_rope_context = in.size("rope.scaling.original_context_length", ModelSpec::max_context,
                                  spec.n_context);
}

/// All layers have the head size of the first, also where their numbers of heads differ.
uint32_t read_head_dim(SpecReader& in, uint32_t n_embd) {
    if (in.find("attention.key_length"))
        return in.size("attention.key_length", ModelSpec::max_width);
    const uint32_t n_heads = in.layer_size("attention.head_count", 0, ModelSpec::max_width);
    if (n_embd % n_heads != 0)
        in.fail_key(ErrorKind::bad_data, "attention.head_count",
                    "does not divide embedding_length");
    return in.error ? 1 : n_embd / n_heads;
}

RopeSpec read_rope(SpecReader& in, uint32_t head_dim, uint32_t n_context) {
    RopeSpec rope;
    rope.kind = in.row->rope;
    rope.base = in.positive("rope.freq_base", 10000.0f);
    if (in.row->traits & learned_places) return rope;
    rope.dims = in.size("rope.dimension_count", head_dim, head_dim);
    if (rope.dims % 2 != 0) in.fail_key(ErrorKind::bad_data, "rope.dimension_count", "is odd");
    read_rope_scaling(in, rope, n_context);
    return rope;
}

// ---- Layers ----------------------------------------------------------------------------------

/// What a layer has by the tensors that the file gives it.
void read_layer_tensors(SpecReader& in, LayerSpec& layer, size_t index) {
    const auto has = [&](const char* name) { return in.has_tensor(index, name); };
    const bool second_is_ffn = in.row->traits & post_is_ffn;
    layer.qkv_bias = has("attn_q.bias") || has("attn_qkv.bias");
    layer.output_bias = has("attn_output.bias");
    layer.ffn_bias = has("ffn_down.bias");
    layer.post_attn_norm = has("post_attention_norm.weight") && !second_is_ffn;
    layer.post_ffn_norm = has("post_ffw_norm.weight");
    layer.attn_norm = has("attn_norm.weight") || !layer.post_attn_norm;
    layer.ffn_norm = has("ffn_norm.weight") || has("attn_norm_2.weight") ||
                     !(layer.post_ffn_norm || layer.parallel);
    layer.sinks = has("attn_sinks.weight");
    if (has("attn_q_norm.weight"))
        layer.qk_norm = in.row->traits & norms_row        ? QkNorm::row
                        : in.row->traits & norms_by_layer ? QkNorm::own
                                                          : QkNorm::head;
}

/// Of all layers that have a router.
ExpertSpec read_experts(SpecReader& in) {
    ExpertSpec out;
    constexpr uint64_t most = 65536;
    if (!in.find("expert_count") || in.value(in.gguf.get_uint(in.read("expert_count"))) == 0)
        return out;
    out.count = in.size("expert_count", most);
    out.used = in.size("expert_used_count", out.count);
    out.n_ff = in.find("expert_feed_forward_length")
                   ? in.size("expert_feed_forward_length", ModelSpec::max_width)
                   : in.layer_size("feed_forward_length", 0, ModelSpec::max_width);
    out.groups = in.size("expert_group_count", out.count, 1);
    out.groups_used = in.size("expert_group_used_count", out.groups, 1);
    if (out.count % out.groups != 0)
        in.fail_key(ErrorKind::bad_data, "expert_group_count", "does not divide expert_count");
    if (uint64_t{out.groups_used} * (out.count / out.groups) < out.used)
        in.fail_key(ErrorKind::bad_data, "expert_used_count", "is more than the groups have");
    // 1: softmax, 2: sigmoid, 3: softmax over those that are picked
    const uint64_t function = in.size("expert_gating_func", 3,
                                      in.row->traits & gates_apart ? 2 : 1);
    out.sigmoid = function == 2;
    const bool sums_to_1 = !(in.row->traits & weights_as_they_are);
    out.normalized = function == 3 ||
                     in.value(in.gguf.get_bool(in.read("expert_weights_norm"), sums_to_1));
    out.scale = in.positive("expert_weights_scale", 1.0f);
    return out;
}

/// In a layer with experts: theirs, and the width of the network that all tokens share.
void read_layer_experts(SpecReader& in, LayerSpec& layer, size_t index) {
    if (!in.has_tensor(index, "ffn_gate_inp.weight")) {
        layer.experts = {};
        return;
    }
    ExpertSpec& experts = layer.experts;
    if (experts.count == 0) in.fail_key(ErrorKind::bad_data, "expert_count", "is missing");
    const auto has = [&](const char* name) { return in.has_tensor(index, name); };
    experts.router_bias = has("ffn_gate_inp.bias");
    experts.choice_bias = has("exp_probs_b.bias");
    experts.bias = has("ffn_gate_exps.bias");
    experts.shared_gate = has("ffn_gate_inp_shexp.weight");
    layer.n_ff = 0;
    if (const TensorInfo* shared = in.gguf.find_tensor(
            format("blk.%zu.ffn_up_shexp.weight", index)))
        layer.n_ff = static_cast<uint32_t>(std::min(shared->dims[1], ModelSpec::max_width));
}

/// What is the same in all layers is in `layer` already.
LayerSpec read_layer(SpecReader& in, LayerSpec layer, size_t index) {
    layer.n_heads = in.layer_size("attention.head_count", index, ModelSpec::max_width);
    layer.n_kv_heads = layer.n_heads;
    if (in.find("attention.head_count_kv"))
        layer.n_kv_heads = in.layer_size("attention.head_count_kv", index, ModelSpec::max_width);
    layer.n_ff = in.layer_size("feed_forward_length", index, ModelSpec::max_width);
    if (layer.n_heads % layer.n_kv_heads != 0)
        in.fail_key(ErrorKind::bad_data, "attention.head_count_kv", "does not divide head_count");
    if (uint64_t{layer.n_heads} * layer.head_dim > ModelSpec::max_width)
        in.fail_key(ErrorKind::bad_data, "attention.head_count", "times head size is too large");
    read_layer_tensors(in, layer, index);
    read_layer_experts(in, layer, index);
    return layer;
}

uint32_t guessing_blocks(SpecReader& in, uint32_t blocks) {
    const uint64_t count = in.value(in.gguf.get_uint(in.read("nextn_predict_layers"), 0));
    if (count >= blocks)
        in.fail_key(ErrorKind::bad_data, "nextn_predict_layers", "leaves no layers");
    return in.error ? 0 : static_cast<uint32_t>(count);
}

std::vector<LayerSpec> read_layers(SpecReader& in, const ModelSpec& spec) {
    LayerSpec common;
    common.head_dim = read_head_dim(in, spec.n_embd);
    if (in.size("attention.value_length", ModelSpec::max_width, common.head_dim) != common.head_dim)
        in.fail_key(ErrorKind::unsupported, "attention.value_length", "differs from key_length");
    common.activation = in.row->activation;
    common.gated = !(in.row->traits & ungated);
    common.parallel = in.row->traits & parallel_layer;
    if (in.find("use_parallel_residual"))
        common.parallel = in.value(in.gguf.get_bool(in.read("use_parallel_residual"), false));
    common.qk_norm_after_rope = in.row->traits & norms_rotated;
    common.attention_scale = in.positive("attention.scale",
                                         1.0f / std::sqrt(static_cast<float>(common.head_dim)));
    common.soft_cap = in.number_or_none("attn_logit_softcapping");
    common.rope = read_rope(in, common.head_dim, spec.n_context);
    common.experts = read_experts(in);
    // the last blocks of some files guess the tokens after the next
    const uint32_t blocks = in.size("block_count", ModelSpec::max_layers),
                   others = guessing_blocks(in, blocks);
    std::vector<LayerSpec> layers(blocks - others);
    for (size_t i = 0; i < layers.size() && !in.error; ++i) layers[i] = read_layer(in, common, i);
    return layers;
}

/// Which layers have the file's sliding window: all; all but every n-th; or those that an array
/// names, an entry a layer. A window that spans the context is none.
void read_windows(SpecReader& in, ModelSpec& spec) {
    constexpr const char* pattern = "attention.sliding_window_pattern";
    const uint64_t window = in.value(in.gguf.get_uint(in.read("attention.sliding_window"), 0));
    const GgufKey* key = in.find(pattern);
    GgufNumbers<int64_t> named;
    uint64_t period = in.row->full_every;
    if (key && key->is_array) named = in.value(in.gguf.get_ints(in.read(pattern)));
    else if (key) period = in.value(in.gguf.get_uint(in.read(pattern)));
    if (key && key->is_array && named.size() < spec.layers.size())
        in.fail_key(ErrorKind::bad_data, pattern, "is too short for the layers");
    if (in.error || window == 0 || window >= spec.n_context) return;
    for (size_t i = 0; i < spec.layers.size(); ++i)
        if (named.size() ? named[i] != 0 : period == 0 || (i + 1) % period != 0)
            spec.layers[i].window = static_cast<uint32_t>(window);
    if (in.find("rope.freq_base_swa"))
        for (LayerSpec& layer : spec.layers)
            if (layer.window) layer.rope.base = in.positive("rope.freq_base_swa", 1);
}

// ---- What a row of the table cannot say ------------------------------------------------------

float inverse_root(uint32_t n) { return 1.0f / std::sqrt(static_cast<float>(n)); }

void read_gemma(SpecReader&, ModelSpec& spec) {
    spec.embedding_scale = std::sqrt(static_cast<float>(spec.n_embd));
}

/// The largest of each generation scales queries by the width of a head as if heads filled the row.
void scale_gemma_queries(SpecReader& in, ModelSpec& spec, size_t layers_of_27b) {
    read_gemma(in, spec);
    if (spec.layers.size() != layers_of_27b) return;
    for (LayerSpec& layer : spec.layers)
        layer.attention_scale = inverse_root(spec.n_embd / layer.n_heads);
}

void read_gemma2(SpecReader& in, ModelSpec& spec) { scale_gemma_queries(in, spec, 46); }

/// Layers with a window have a base of their own, also where the file does not say it, and no scaling.
void read_gemma3(SpecReader& in, ModelSpec& spec) {
    scale_gemma_queries(in, spec, 62);
    for (LayerSpec& layer : spec.layers) {
        if (layer.window == 0) continue;
        layer.rope.base = in.positive("rope.freq_base_swa", 10000.0f);
        layer.rope.scale = 1;
    }
}

/// Granite's files say by a key of another name whether it rotates.
void read_granite(SpecReader& in, ModelSpec& spec) {
    if (in.value(in.gguf.get_bool(in.read("rope.scaling.finetuned"), true))) return;
    for (LayerSpec& layer : spec.layers) layer.rope.dims = 0;
}

/// Every fourth layer does not rotate.
void read_smollm3(SpecReader&, ModelSpec& spec) {
    for (size_t i = 3; i < spec.layers.size(); i += 4) spec.layers[i].rope.dims = 0;
}

/// The long context's scaling is that of the layers that see all.
void read_olmo2(SpecReader&, ModelSpec& spec) {
    for (LayerSpec& layer : spec.layers)
        if (layer.window) layer.rope = {layer.rope.kind, layer.rope.dims, layer.rope.base};
}

double softplus(double x) { return exact_log(1 + exact_exp2(x * 1.4426950408889634)); }

/// Each layer's activation has numbers of its own.
void read_apertus(SpecReader& in, ModelSpec& spec) {
    const auto numbers = [&](const char* key) {
        auto found = in.value(in.gguf.get_floats(key));
        if (!in.error && found.size() < spec.layers.size())
            in.fail(ErrorKind::bad_data, format("key '%s' is too short for the layers", key));
        return found;
    };
    const auto negative = numbers("xielu.alpha_n"), positive = numbers("xielu.alpha_p"),
               linear = numbers("xielu.beta"), most = numbers("xielu.eps");
    for (size_t i = 0; i < spec.layers.size() && !in.error; ++i) {
        ActivationSpec& bend = spec.layers[i].bend;
        bend.negative = static_cast<float>(linear[i] + softplus(negative[i]));
        bend.positive = static_cast<float>(softplus(positive[i]));
        bend.linear = static_cast<float>(linear[i]);
        bend.most = static_cast<float>(most[i]);
    }
}

void read_mistral3(SpecReader& in, ModelSpec& spec) {
    const float scale = in.number_or_none("attention.temperature_scale");
    for (LayerSpec& layer : spec.layers) {
        layer.temperature = scale;
        layer.temperature_length = spec.n_rope_context;
    }
}

void read_minicpm(SpecReader& in, ModelSpec& spec) {
    const float layers = static_cast<float>(spec.layers.size());
    spec.embedding_scale = in.positive("embedding_scale", 12.0f);
    spec.residual_scale = in.positive("residual_scale", 1.4f / std::sqrt(layers));
    if (!in.find("logit_scale")) spec.logit_scale = 256.0f / static_cast<float>(spec.n_embd);
}

constexpr Architecture architectures[] = {
    // clang-format off
    {"llama",         RopeKind::norm},
    {"qwen2",         RopeKind::neox},
    {"qwen3",         RopeKind::neox},
    {"gemma",         RopeKind::neox, 0, Activation::gelu_tanh, 0, true, read_gemma},
    {"gemma2",        RopeKind::neox, 0, Activation::gelu_tanh, 2, true, read_gemma2},
    {"gemma3",        RopeKind::neox, 0, Activation::gelu_tanh, 6, true, read_gemma3},
    {"phi2",          RopeKind::neox, norms_by_layer | ungated | parallel_layer, Activation::gelu_tanh},
    {"phi3",          RopeKind::neox},
    {"smollm3",       RopeKind::norm, 0, Activation::silu, 0, true, read_smollm3},
    {"olmo2",         RopeKind::neox, norms_row, Activation::silu, 4, true, read_olmo2},
    {"granite",       RopeKind::norm, divides_logits, Activation::silu, 0, true, read_granite},
    {"glm4",          RopeKind::norm},
    {"exaone4",       RopeKind::neox, full_unrotated, Activation::silu, 4},
    {"cohere2",       RopeKind::norm, norms_by_layer | parallel_layer | full_unrotated, Activation::silu, 4},
    {"command-r",     RopeKind::norm, norms_by_layer | parallel_layer},
    {"ernie4_5",      RopeKind::norm},
    {"hunyuan-dense", RopeKind::neox, norms_rotated},
    {"seed_oss",      RopeKind::neox, post_is_ffn},
    {"qwen2moe",      RopeKind::neox, weights_as_they_are},
    {"qwen3moe",      RopeKind::neox},
    {"gpt-oss",       RopeKind::neox, post_is_ffn, Activation::silu_clamped, 2, false},
    {"granitemoe",    RopeKind::norm, divides_logits, Activation::silu, 0, true, read_granite},
    {"olmoe",         RopeKind::neox, norms_row | weights_as_they_are},
    {"glm4moe",       RopeKind::neox, post_is_ffn | gates_apart},
    {"ernie4_5-moe",  RopeKind::norm},
    {"bailingmoe2",   RopeKind::neox, gates_apart},
    {"minimax-m2",    RopeKind::neox, norms_row | gates_apart},
    {"minicpm",       RopeKind::norm, divides_logits, Activation::silu, 0, true, read_minicpm},
    {"internlm2",     RopeKind::norm},
    {"stablelm",      RopeKind::neox, norms_by_layer},
    {"starcoder2",    RopeKind::neox, norms_by_layer | ungated, Activation::gelu_tanh},
    {"nemotron",      RopeKind::neox, norms_by_layer | ungated, Activation::relu_squared},
    {"gpt2",          RopeKind::neox, norms_by_layer | ungated | learned_places, Activation::gelu_tanh},
    {"gptneox",       RopeKind::neox, norms_by_layer | ungated, Activation::gelu},
    {"mistral3",      RopeKind::norm, 0, Activation::silu, 0, true, read_mistral3},
    {"apertus",       RopeKind::neox, ungated, Activation::xielu, 0, true, read_apertus},
    {"falcon",        RopeKind::neox, norms_by_layer | ungated | parallel_layer, Activation::gelu},
    // clang-format on
};

const Architecture* find_architecture(std::string_view name) {
    for (const Architecture& row : architectures)
        if (name == row.name) return &row;
    return nullptr;
}

std::string known_architectures() {
    std::string all;
    for (const Architecture& row : architectures)
        all += (all.empty() ? "" : ", ") + std::string(row.name);
    return all;
}

bool has_windows(const ModelSpec& spec) {
    return std::any_of(spec.layers.begin(), spec.layers.end(),
                       [](const LayerSpec& layer) { return layer.window != 0; });
}

void read_norm(SpecReader& in, ModelSpec& spec) {
    spec.norm = in.row->traits & norms_by_layer ? NormKind::layer : NormKind::rms;
    spec.norm_bias = spec.norm == NormKind::layer && in.gguf.find_tensor("output_norm.bias");
    spec.norm_eps = in.positive(spec.norm == NormKind::layer ? "attention.layer_norm_epsilon"
                                                             : "attention.layer_norm_rms_epsilon",
                                0.0f);
}

/// Rows of the embedding are the vocabulary: the file's own counts of it must agree.
uint32_t read_vocab_size(SpecReader& in) {
    const TensorInfo* embedding = in.gguf.find_tensor("token_embd.weight");
    if (!embedding) {
        in.fail(ErrorKind::bad_data, "tensor 'token_embd.weight' is missing");
        return 1;
    }
    const uint64_t rows = embedding->dims[1];
    const GgufKey* tokens = in.gguf.find("tokenizer.ggml.tokens");
    if (rows > ModelSpec::max_vocab)
        in.fail(ErrorKind::bad_data, "tensor 'token_embd.weight' has too many rows");
    if (tokens && tokens->count != rows)
        in.fail(ErrorKind::bad_data,
                format("key 'tokenizer.ggml.tokens' has %zu entries, 'token_embd.weight' %llu rows",
                       tokens->count, static_cast<unsigned long long>(rows)));
    return in.error ? 1 : static_cast<uint32_t>(rows);
}

// ---- Tensors: a row each ---------------------------------------------------------------------

/// How long a row or a column is.
enum class Length : uint8_t {
    one,
    single,
    vocab,
    embd,
    context,
    q,
    kv,
    ff,
    head,
    heads,
    kv_heads,
    experts,
    expert_ff,
};

using LayerHas = bool (*)(const LayerSpec& layer);
using ModelHas = bool (*)(const ModelSpec& spec);

struct TensorRow {
    TensorRole role;
    const char* name;
    Length rows, columns;  // rows `one`: a vector
    LayerHas when = nullptr;
    ModelHas where = nullptr;
    // Several that stand below one another in the table may lie below one another in a tensor of this
    // name instead.
    const char* fused = nullptr;
};

// clang-format off
constexpr LayerHas has_attn_norm  = [](const LayerSpec& of) { return of.attn_norm; };
constexpr LayerHas has_ffn_norm   = [](const LayerSpec& of) { return of.ffn_norm; };
constexpr LayerHas has_post_attn  = [](const LayerSpec& of) { return of.post_attn_norm; };
constexpr LayerHas has_post_ffn   = [](const LayerSpec& of) { return of.post_ffn_norm; };
constexpr LayerHas has_qkv_bias   = [](const LayerSpec& of) { return of.qkv_bias; };
constexpr LayerHas has_out_bias   = [](const LayerSpec& of) { return of.output_bias; };
constexpr LayerHas has_ffn_bias   = [](const LayerSpec& of) { return of.ffn_bias; };
constexpr LayerHas has_one_ffn    = [](const LayerSpec& of) { return of.experts.count == 0; };
constexpr LayerHas has_gate       = [](const LayerSpec& of) { return of.gated && of.experts.count == 0; };
constexpr LayerHas has_shared     = [](const LayerSpec& of) { return of.experts.count && of.n_ff; };
constexpr LayerHas has_experts    = [](const LayerSpec& of) { return of.experts.count != 0; };
constexpr LayerHas has_exp_bias   = [](const LayerSpec& of) { return of.experts.bias; };
constexpr LayerHas has_route_bias = [](const LayerSpec& of) { return of.experts.router_bias; };
constexpr LayerHas has_choice     = [](const LayerSpec& of) { return of.experts.choice_bias; };
constexpr LayerHas has_share_gate = [](const LayerSpec& of) { return of.experts.shared_gate; };
constexpr LayerHas has_gate_bias  = [](const LayerSpec& of) { return of.gated && of.ffn_bias; };
constexpr LayerHas has_head_norm  = [](const LayerSpec& of) { return of.qk_norm == QkNorm::head; };
constexpr LayerHas has_row_norm   = [](const LayerSpec& of) { return of.qk_norm == QkNorm::row; };
constexpr LayerHas has_own_norms  = [](const LayerSpec& of) { return of.qk_norm == QkNorm::own; };
constexpr LayerHas has_sinks      = [](const LayerSpec& of) { return of.sinks; };
constexpr ModelHas has_norm_bias  = [](const ModelSpec& of) { return of.norm_bias; };
constexpr ModelHas has_output     = [](const ModelSpec& of) { return !of.tied_output; };
constexpr ModelHas has_logit_bias = [](const ModelSpec& of) { return of.output_bias; };
constexpr ModelHas has_places     = [](const ModelSpec& of) { return of.position_embd; };

constexpr TensorRow model_tensors[] = {
    {TensorRole::token_embd,       "token_embd.weight",    Length::vocab,   Length::embd},
    {TensorRole::position_embd,    "position_embd.weight", Length::context, Length::embd,  nullptr, has_places},
    {TensorRole::output_norm,      "output_norm.weight",   Length::one,     Length::embd},
    {TensorRole::output_norm_bias, "output_norm.bias",     Length::one,     Length::embd,  nullptr, has_norm_bias},
    {TensorRole::output,           "output.weight",        Length::vocab,   Length::embd,  nullptr, has_output},
    {TensorRole::output_bias,      "output.bias",          Length::one,     Length::vocab, nullptr, has_logit_bias},
};

constexpr const char* qkv_rows = "attn_qkv.weight";
constexpr const char* qkv_biases = "attn_qkv.bias";
constexpr const char* gate_and_up_rows = "ffn_up.weight";

constexpr TensorRow layer_tensors[] = {
    {TensorRole::attn_norm,        "attn_norm.weight",           Length::one,  Length::embd, has_attn_norm},
    {TensorRole::attn_norm_bias,   "attn_norm.bias",             Length::one,  Length::embd, has_attn_norm, has_norm_bias},
    {TensorRole::q,                "attn_q.weight",              Length::q,    Length::embd, nullptr, nullptr, qkv_rows},
    {TensorRole::k,                "attn_k.weight",              Length::kv,   Length::embd, nullptr, nullptr, qkv_rows},
    {TensorRole::v,                "attn_v.weight",              Length::kv,   Length::embd, nullptr, nullptr, qkv_rows},
    {TensorRole::q_bias,           "attn_q.bias",                Length::one,  Length::q,    has_qkv_bias, nullptr, qkv_biases},
    {TensorRole::k_bias,           "attn_k.bias",                Length::one,  Length::kv,   has_qkv_bias, nullptr, qkv_biases},
    {TensorRole::v_bias,           "attn_v.bias",                Length::one,  Length::kv,   has_qkv_bias, nullptr, qkv_biases},
    {TensorRole::q_norm,           "attn_q_norm.weight",         Length::one,  Length::head, has_head_norm},
    {TensorRole::k_norm,           "attn_k_norm.weight",         Length::one,  Length::head, has_head_norm},
    {TensorRole::q_norm,           "attn_q_norm.weight",         Length::one,  Length::q,    has_row_norm},
    {TensorRole::k_norm,           "attn_k_norm.weight",         Length::one,  Length::kv,   has_row_norm},
    {TensorRole::q_norm,           "attn_q_norm.weight",         Length::heads, Length::head, has_own_norms},
    {TensorRole::k_norm,           "attn_k_norm.weight",         Length::kv_heads, Length::head, has_own_norms},
    {TensorRole::sinks,            "attn_sinks.weight",          Length::one,  Length::heads, has_sinks},
    {TensorRole::attn_output,      "attn_output.weight",         Length::embd, Length::q},
    {TensorRole::attn_output_bias, "attn_output.bias",           Length::one,  Length::embd, has_out_bias},
    {TensorRole::post_attn_norm,   "post_attention_norm.weight", Length::one,  Length::embd, has_post_attn},
    {TensorRole::ffn_norm,         "ffn_norm.weight",            Length::one,  Length::embd, has_ffn_norm},
    {TensorRole::ffn_norm_bias,    "ffn_norm.bias",              Length::one,  Length::embd, has_ffn_norm, has_norm_bias},
    {TensorRole::gate,             "ffn_gate.weight",            Length::ff,   Length::embd, has_gate, nullptr, gate_and_up_rows},
    {TensorRole::up,               "ffn_up.weight",              Length::ff,   Length::embd, has_one_ffn, nullptr, gate_and_up_rows},
    {TensorRole::down,             "ffn_down.weight",            Length::embd, Length::ff, has_one_ffn},
    {TensorRole::gate_bias,        "ffn_gate.bias",              Length::one,  Length::ff,   has_gate_bias},
    {TensorRole::up_bias,          "ffn_up.bias",                Length::one,  Length::ff,   has_ffn_bias},
    {TensorRole::down_bias,        "ffn_down.bias",              Length::one,  Length::embd, has_ffn_bias},
    {TensorRole::post_ffn_norm,    "post_ffw_norm.weight",       Length::one,  Length::embd, has_post_ffn},
    {TensorRole::router,           "ffn_gate_inp.weight",        Length::experts, Length::embd, has_experts},
    {TensorRole::router_bias,      "ffn_gate_inp.bias",          Length::one,  Length::experts, has_route_bias},
    {TensorRole::choice_bias,      "exp_probs_b.bias",           Length::one,  Length::experts, has_choice},
    {TensorRole::expert_gate,      "ffn_gate_exps.weight",       Length::expert_ff, Length::embd, has_experts},
    {TensorRole::expert_up,        "ffn_up_exps.weight",         Length::expert_ff, Length::embd, has_experts},
    {TensorRole::expert_down,      "ffn_down_exps.weight",       Length::embd, Length::expert_ff, has_experts},
    {TensorRole::expert_gate_bias, "ffn_gate_exps.bias",         Length::experts, Length::expert_ff, has_exp_bias},
    {TensorRole::expert_up_bias,   "ffn_up_exps.bias",           Length::experts, Length::expert_ff, has_exp_bias},
    {TensorRole::expert_down_bias, "ffn_down_exps.bias",         Length::experts, Length::embd, has_exp_bias},
    {TensorRole::shared_gate,      "ffn_gate_inp_shexp.weight",  Length::single, Length::embd, has_share_gate},
    {TensorRole::gate,             "ffn_gate_shexp.weight",      Length::ff,   Length::embd, has_shared},
    {TensorRole::up,               "ffn_up_shexp.weight",        Length::ff,   Length::embd, has_shared},
    {TensorRole::down,             "ffn_down_shexp.weight",      Length::embd, Length::ff, has_shared},
};

// Tensors that files have and nothing needs: rope angles that older converters wrote down.
constexpr std::string_view harmless_tensors[] = {"rope_freqs.weight", "attn_rot_embd.weight",
                                                 "rotary_emb.inv_freq"};
// clang-format on

/// Takes tensors of a file by name, checks them, and remembers which were taken.
struct TensorBinder {
    const Gguf& gguf;
    const ModelSpec& spec;
    std::string prefix = {};  // of the names that are asked for
    std::vector<bool> taken = std::vector<bool>(gguf.tensors().size());
    std::optional<Error> error = {};

    void fail(ErrorKind kind, std::string_view name, std::string_view what) {
        if (!error) error = make_error(kind, join({gguf.name(), ": tensor '", name, "' ", what}));
    }

    /// `rows` 0: a vector.
    const TensorInfo* take(const char* suffix, std::span<const TensorType> types, uint64_t rows,
                           uint64_t columns, uint64_t matrices = 1) {
        const std::string name = prefix + suffix;
        const TensorInfo* tensor = gguf.find_tensor(name);
        if (!tensor) {
            fail(ErrorKind::bad_data, name, "is missing");
            return nullptr;
        }
        taken[static_cast<size_t>(tensor - gguf.tensors().data())] = true;
        if (tensor->dims[3] != 1 || tensor->dims[2] != matrices || tensor->dims[0] != columns ||
            tensor->dims[1] != std::max<uint64_t>(rows, 1))
            fail(ErrorKind::bad_data, name,
                 format("has the shape %llu x %llu x %llu x %llu; %llu x %llu was expected",
                        ull(tensor->dims[0]), ull(tensor->dims[1]), ull(tensor->dims[2]),
                        ull(tensor->dims[3]), ull(columns), ull(std::max<uint64_t>(rows, 1))));
        if (std::find(types.begin(), types.end(), tensor->type) == types.end())
            fail(ErrorKind::unsupported, name,
                 format("has type %s, which is not supported here", type_info(tensor->type)->name));
        return tensor;
    }

    uint64_t length(Length of, const LayerSpec& layer) const {
        switch (of) {
            case Length::one: return 1;
            case Length::vocab: return spec.n_vocab;
            case Length::embd: return spec.n_embd;
            case Length::context: return spec.n_context;
            case Length::q: return uint64_t{layer.n_heads} * layer.head_dim;
            case Length::kv: return uint64_t{layer.n_kv_heads} * layer.head_dim;
            case Length::ff: return layer.n_ff;
            case Length::head: return layer.head_dim;
            case Length::heads: return layer.n_heads;
            case Length::kv_heads: return layer.n_kv_heads;
            case Length::single: return 1;
            case Length::experts: return layer.experts.count;
            case Length::expert_ff: return layer.experts.n_ff;
        }
        return 0;
    }
    bool wants(const TensorRow& row, const LayerSpec& layer) const {
        return (!row.when || row.when(layer)) && (!row.where || row.where(spec));
    }

    /// Those that share a tensor with the row at `first`.
    void bind_fused(std::span<const TensorRow> rows, const LayerSpec& layer, RoleTensors& out) {
        uint64_t sum = 0;
        const bool matrix = rows[0].rows != Length::one;
        const auto own = [&](const TensorRow& row) {
            return length(matrix ? row.rows : row.columns, layer);
        };
        for (const TensorRow& row : rows) sum += own(row);
        const TensorInfo* tensor = matrix ? take(rows[0].fused, matrix_types.types, sum,
                                                 length(rows[0].columns, layer))
                                          : take(rows[0].fused, vector_types, 0, sum);
        if (tensor && tensor->packed && matrix)
            for (const TensorRow& row : rows)
                if (own(row) % packed_rows != 0)
                    fail(ErrorKind::unsupported, tensor->name, "is packed and cannot be parted");
        uint64_t first = 0;
        for (const TensorRow& row : rows) {
            out[row.role] = {tensor, first, own(row), matrix};
            first += own(row);
        }
    }

    void bind(std::span<const TensorRow> table, const LayerSpec& layer, RoleTensors& out) {
        for (size_t i = 0, end; i < table.size(); i = end) {
            const TensorRow& row = table[i];
            end = i + 1;
            if (!wants(row, layer)) continue;
            while (row.fused && end < table.size() && table[end].fused == row.fused) ++end;
            if (row.fused && !gguf.find_tensor(prefix + row.name) &&
                gguf.find_tensor(prefix + row.fused)) {
                bind_fused(table.subspan(i, end - i), layer, out);
                continue;
            }
            end = i + 1;
            const bool matrix = is_matrix(row);
            const uint64_t matrices = is_expert(row) ? layer.experts.count : 1;
            const std::span<const TensorType> types =
                matrix ? std::span<const TensorType>(matrix_types.types)
                       : std::span<const TensorType>(vector_types);
            const uint64_t rows = row.rows == Length::one ? 0 : length(row.rows, layer),
                           columns = length(row.columns, layer);
            out[row.role] = {take(name_of(row), types, rows, columns, matrices), 0,
                             matrix ? rows : std::max<uint64_t>(rows, 1) * columns, matrix};
        }
    }
    static bool is_expert(const TensorRow& row) { return row.role >= TensorRole::expert_gate; }
    /// What is no product is a vector, though files may have it in two dimensions.
    static bool is_matrix(const TensorRow& row) {
        const bool bias = row.role >= TensorRole::expert_gate_bias && !is_expert(row);
        return row.rows != Length::one && row.rows != Length::single &&
               row.columns != Length::head && !bias;
    }
    /// Some files call a tensor of a role otherwise; where they do, another tensor says so.
    const char* name_of(const TensorRow& row) const {
        static constexpr struct {
            TensorRole role;
            const char *name, *sign;
        } others[] = {
            {TensorRole::attn_norm, "attn_norm_2.weight", "attn_norm_2.weight"},
            {TensorRole::attn_norm_bias, "attn_norm_2.bias", "attn_norm_2.weight"},
            {TensorRole::ffn_norm, "attn_norm.weight", "attn_norm_2.weight"},
            {TensorRole::ffn_norm_bias, "attn_norm.bias", "attn_norm_2.weight"},
            {TensorRole::ffn_norm, "post_attention_norm.weight", "post_attention_norm.weight"},
        };
        for (const auto& [role, name, sign] : others)
            if (row.role == role && gguf.find_tensor(prefix + sign) &&
                (role != TensorRole::ffn_norm || !gguf.find_tensor(prefix + row.name)))
                return name;
        return row.name;
    }
    void bind_factors(const std::vector<float>& factors, std::initializer_list<const char*> names) {
        for (const char* name : names)
            if (!factors.empty() && gguf.find_tensor(name))
                take(name, vector_types, 0, factors.size());
    }
    /// Whether a tensor belongs to the blocks behind the layers, which guess further tokens.
    bool guesses(std::string_view name) const {
        const auto blocks = gguf.get_uint(spec.architecture + ".nextn_predict_layers", 0);
        for (uint64_t i = 0; blocks && i < *blocks; ++i)
            if (name.starts_with(format("blk.%zu.", size_t(spec.layers.size() + i)))) return true;
        return false;
    }
    static unsigned long long ull(uint64_t n) { return n; }
};

bool is_harmless(std::string_view tensor) {
    return std::any_of(std::begin(harmless_tensors), std::end(harmless_tensors),
                       [&](std::string_view end) { return tensor.ends_with(end); });
}

}  // namespace

Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec) {
    TensorBinder in{gguf, spec};
    ModelTensors out;
    in.bind(model_tensors, {}, out.model);
    if (spec.tied_output) out.model[TensorRole::output] = out.model[TensorRole::token_embd];
    in.bind_factors(spec.rope_factors, {"rope_freqs.weight", "rope_factors_short.weight"});
    in.bind_factors(spec.rope_long_factors, {"rope_factors_long.weight"});
    for (size_t i = 0; i < spec.layers.size() && !in.error; ++i) {
        in.prefix = format("blk.%zu.", i);
        in.bind(layer_tensors, spec.layers[i], out.layers.emplace_back());
    }
    for (size_t i = 0; i < in.taken.size(); ++i)
        if (!in.taken[i] && !is_harmless(gguf.tensors()[i].name) &&
            !in.guesses(gguf.tensors()[i].name))
            in.fail(ErrorKind::bad_data, gguf.tensors()[i].name, "is not used");
    if (in.error) return *in.error;
    return out;
}

}  // namespace detail

Result<ModelSpec> read_model_spec(const Gguf& gguf) {
    detail::SpecReader in{gguf};
    ModelSpec spec;
    spec.architecture = in.value(gguf.get_string("general.architecture"));
    if (in.error) return *in.error;
    in.row = detail::find_architecture(spec.architecture);
    if (!in.row)
        return detail::make_error(
            ErrorKind::unsupported,
            detail::join({gguf.name(), ": architecture '", detail::printable(spec.architecture, 64),
                          "' is not supported; these are: ", detail::known_architectures()}));
    in.prefix = spec.architecture + ".";
    spec.name = in.value(gguf.get_string("general.name", ""));
    spec.n_embd = in.size("embedding_length", ModelSpec::max_width);
    spec.n_context = in.size("context_length", ModelSpec::max_context);
    detail::read_norm(in, spec);
    spec.embedding_scale = in.positive("embedding_scale", 1.0f);
    spec.residual_scale = in.positive("residual_scale", 1.0f);
    spec.logit_scale = in.positive("logit_scale", 1.0f);
    if (in.row->traits & detail::divides_logits) spec.logit_scale = 1 / spec.logit_scale;
    spec.soft_cap = in.number_or_none("final_logit_softcapping");
    spec.tied_output = !gguf.find_tensor("output.weight");
    spec.output_bias = gguf.find_tensor("output.bias");
    spec.position_embd = in.row->traits & detail::learned_places;
    spec.n_vocab = detail::read_vocab_size(in);
    spec.layers = detail::read_layers(in, spec);
    detail::read_windows(in, spec);
    detail::read_all_rope_factors(in, spec);
    for (LayerSpec& layer : spec.layers)
        if (in.row->traits & detail::full_unrotated && detail::has_windows(spec) && !layer.window)
            layer.rope.dims = 0;
    if (in.row->more && !in.error) in.row->more(in, spec);
    if (!in.error) detail::refuse_unread_keys(in);
    if (in.error) return *in.error;
    return spec;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

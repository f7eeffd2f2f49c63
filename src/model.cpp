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

/// A new family that differs only in these is one more row.
struct Architecture {
    const char* name;  // also the prefix of its keys
    RopeKind rope;
    bool qkv_bias;
};
constexpr Architecture architectures[] = {
    {"llama", RopeKind::norm, false},
    {"qwen2", RopeKind::neox, true},
};

/// Keys that change what the network computes in a way that no backend here does.
constexpr const char* refused_model_keys[] = {
    "expert_count",   "attn_logit_softcapping", "final_logit_softcapping",
    "residual_scale", "attention.clamp_kqv",
};

constexpr TensorType matrix_types[] = {
    TensorType::f32,  TensorType::f16,  TensorType::bf16, TensorType::q4_0, TensorType::q4_1,
    TensorType::q5_0, TensorType::q8_0, TensorType::q4_k, TensorType::q5_k, TensorType::q6_k,
};
constexpr TensorType vector_types[] = {TensorType::f32};

/// Reads keys into a spec. After the first failure `error` is set and what is returned is of no
/// use, so that a reader can go on to its end and look once.
struct SpecReader {
    const Gguf& gguf;
    std::string prefix = {};
    std::optional<Error> error = {};

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
    const GgufKey* find(const char* key) const { return gguf.find(prefix + key); }

    uint32_t in_limits(const char* key, uint64_t number, uint64_t limit) {
        if (number < 1 || number > limit)
            fail_key(ErrorKind::bad_data, key,
                     format("is %llu, not from 1 to %llu", static_cast<unsigned long long>(number),
                            static_cast<unsigned long long>(limit))
                         .c_str());
        return error ? 1 : static_cast<uint32_t>(number);
    }
    uint32_t size(const char* key, uint64_t limit) {
        return in_limits(key, value(gguf.get_uint(prefix + key)), limit);
    }
    uint32_t size(const char* key, uint64_t limit, uint32_t fallback) {
        return find(key) ? size(key, limit) : fallback;
    }
    /// One number for all layers, or an array with one for each.
    uint32_t layer_size(const char* key, size_t layer, uint64_t limit) {
        const GgufKey* found = find(key);
        if (!found || !found->is_array) return size(key, limit);
        auto numbers = value(gguf.get_ints(prefix + key));
        if (layer >= numbers.size())
            fail_key(ErrorKind::bad_data, key, "is too short for the layers");
        return error ? 1 : in_limits(key, static_cast<uint64_t>(numbers[layer]), limit);
    }
    float positive(const char* key, float fallback) {
        const float number = static_cast<float>(
            value(gguf.get_float(prefix + key, static_cast<double>(fallback))));
        if (!(number > 0 && std::isfinite(number)))
            fail_key(ErrorKind::bad_data, key, "must be a positive number");
        return number;
    }
};

const Architecture* find_architecture(std::string_view name) {
    for (const Architecture& row : architectures)
        if (name == row.name) return &row;
    return nullptr;
}

void refuse_unknown_options(SpecReader& in) {
    for (const char* key : refused_model_keys) {
        const GgufKey* found = in.find(key);
        const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
        if (found && !std::all_of(found->data.begin(), found->data.end(), is_zero))
            in.fail_key(ErrorKind::unsupported, key, "asks for what is not implemented");
    }
}

/// 1 / factor of linear scaling. (llama3 scaling needs no key: its factors are a tensor.)
float read_rope_scale(SpecReader& in) {
    const auto type = in.value(in.gguf.get_string(in.prefix + "rope.scaling.type", "linear"));
    if (type == "none") return 1;
    if (type != "linear")
        in.fail_key(ErrorKind::unsupported, "rope.scaling.type", "is neither 'none' nor 'linear'");
    const char* key = in.find("rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
    return 1.0f / in.positive(key, 1.0f);
}

std::vector<float> read_rope_factors(SpecReader& in, uint32_t rope_dims) {
    const TensorInfo* tensor = in.gguf.find_tensor("rope_freqs.weight");
    if (!tensor || in.error) return {};
    if (tensor->type != TensorType::f32 || tensor->n_dims != 1 ||
        tensor->dims[0] != rope_dims / 2) {
        in.fail(ErrorKind::bad_data, "tensor 'rope_freqs.weight' is not F32 of half the rope dims");
        return {};
    }
    std::vector<float> factors(rope_dims / 2);
    const auto bytes = std::as_writable_bytes(std::span<float>(factors));
    if (auto done = in.gguf.read_tensor(*tensor, 0, bytes); !done) in.error = done.error();
    for (float factor : factors)
        if (!(factor > 0 && std::isfinite(factor)))
            in.fail(ErrorKind::bad_data, "tensor 'rope_freqs.weight' has a factor not positive");
    return factors;
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

RopeSpec read_rope(SpecReader& in, const Architecture& row, uint32_t head_dim) {
    RopeSpec rope;
    rope.kind = row.rope;
    rope.dims = in.size("rope.dimension_count", head_dim, head_dim);
    if (rope.dims % 2 != 0) in.fail_key(ErrorKind::bad_data, "rope.dimension_count", "is odd");
    rope.base = in.positive("rope.freq_base", 10000.0f);
    rope.scale = read_rope_scale(in);
    return rope;
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
    return layer;
}

std::vector<LayerSpec> read_layers(SpecReader& in, const Architecture& row, uint32_t n_embd) {
    LayerSpec common;
    common.head_dim = read_head_dim(in, n_embd);
    if (in.size("attention.value_length", ModelSpec::max_width, common.head_dim) != common.head_dim)
        in.fail_key(ErrorKind::unsupported, "attention.value_length", "differs from key_length");
    common.qkv_bias = row.qkv_bias;
    common.attention_scale = in.positive("attention.scale",
                                         1.0f / std::sqrt(static_cast<float>(common.head_dim)));
    common.rope = read_rope(in, row, common.head_dim);
    std::vector<LayerSpec> layers(in.size("block_count", ModelSpec::max_layers));
    for (size_t i = 0; i < layers.size() && !in.error; ++i) layers[i] = read_layer(in, common, i);
    return layers;
}

/// Which layers have the file's sliding window: all; all but every n-th; or those that an array
/// names, an entry a layer. A window that spans the context is none.
void read_windows(SpecReader& in, ModelSpec& spec) {
    constexpr const char* pattern = "attention.sliding_window_pattern";
    const uint64_t window = in.value(in.gguf.get_uint(in.prefix + "attention.sliding_window", 0));
    const GgufKey* key = in.find(pattern);
    GgufNumbers<int64_t> named;
    uint64_t period = 0;
    if (key && key->is_array) named = in.value(in.gguf.get_ints(in.prefix + pattern));
    else if (key) period = in.value(in.gguf.get_uint(in.prefix + pattern));
    if (key && key->is_array && named.size() < spec.layers.size())
        in.fail_key(ErrorKind::bad_data, pattern, "is too short for the layers");
    if (in.error || window == 0 || window >= spec.n_context) return;
    for (size_t i = 0; i < spec.layers.size(); ++i)
        if (named.size() ? named[i] != 0 : period == 0 || (i + 1) % period != 0)
            spec.layers[i].window = static_cast<uint32_t>(window);
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

/// Takes tensors of a file by name, checks them, and remembers which were taken.
struct TensorBinder {
    const Gguf& gguf;
    std::string prefix = {};  // of the names that are asked for
    std::vector<bool> taken = std::vector<bool>(gguf.tensors().size());
    std::optional<Error> error = {};

    void fail(ErrorKind kind, std::string_view name, std::string_view what) {
        if (!error) error = make_error(kind, join({gguf.name(), ": tensor '", name, "' ", what}));
    }

    const TensorInfo* take(const char* suffix, std::span<const TensorType> types, uint32_t n_dims,
                           uint64_t rows, uint64_t columns) {
        const std::string name = prefix + suffix;
        const TensorInfo* tensor = gguf.find_tensor(name);
        if (!tensor) {
            fail(ErrorKind::bad_data, name, "is missing");
            return nullptr;
        }
        taken[static_cast<size_t>(tensor - gguf.tensors().data())] = true;
        if (tensor->n_dims != n_dims || tensor->dims[0] != columns || tensor->dims[1] != rows)
            fail(ErrorKind::bad_data, name,
                 format("has the shape %llu x %llu x %llu x %llu; %llu x %llu was expected",
                        ull(tensor->dims[0]), ull(tensor->dims[1]), ull(tensor->dims[2]),
                        ull(tensor->dims[3]), ull(columns), ull(rows)));
        if (std::find(types.begin(), types.end(), tensor->type) == types.end())
            fail(ErrorKind::unsupported, name,
                 format("has type %s, which is not supported here", type_info(tensor->type)->name));
        return tensor;
    }
    const TensorInfo* matrix(const char* name, uint64_t rows, uint64_t columns) {
        return take(name, matrix_types, 2, rows, columns);
    }
    const TensorInfo* vector(const char* name, uint64_t length) {
        return take(name, vector_types, 1, 1, length);
    }
    static unsigned long long ull(uint64_t n) { return n; }
};

LayerTensors bind_layer(TensorBinder& in, const LayerSpec& spec, uint64_t n_embd, size_t index) {
    in.prefix = format("blk.%u.", static_cast<unsigned>(index));
    const uint64_t n_q = uint64_t{spec.n_heads} * spec.head_dim;
    const uint64_t n_kv = uint64_t{spec.n_kv_heads} * spec.head_dim;
    LayerTensors out;
    out.attn_norm = in.vector("attn_norm.weight", n_embd);
    out.q = in.matrix("attn_q.weight", n_q, n_embd);
    out.k = in.matrix("attn_k.weight", n_kv, n_embd);
    out.v = in.matrix("attn_v.weight", n_kv, n_embd);
    if (spec.qkv_bias) {
        out.q_bias = in.vector("attn_q.bias", n_q);
        out.k_bias = in.vector("attn_k.bias", n_kv);
        out.v_bias = in.vector("attn_v.bias", n_kv);
    }
    out.attn_output = in.matrix("attn_output.weight", n_embd, n_q);
    out.ffn_norm = in.vector("ffn_norm.weight", n_embd);
    out.gate = in.matrix("ffn_gate.weight", spec.n_ff, n_embd);
    out.up = in.matrix("ffn_up.weight", spec.n_ff, n_embd);
    out.down = in.matrix("ffn_down.weight", n_embd, spec.n_ff);
    return out;
}

}  // namespace

Result<ModelTensors> bind_model_tensors(const Gguf& gguf, const ModelSpec& spec) {
    TensorBinder in{gguf};
    ModelTensors out;
    out.token_embd = in.matrix("token_embd.weight", spec.n_vocab, spec.n_embd);
    out.output_norm = in.vector("output_norm.weight", spec.n_embd);
    out.output = spec.tied_output ? out.token_embd
                                  : in.matrix("output.weight", spec.n_vocab, spec.n_embd);
    if (!spec.rope_factors.empty()) in.vector("rope_freqs.weight", spec.rope_factors.size());
    for (size_t i = 0; i < spec.layers.size() && !in.error; ++i)
        out.layers.push_back(bind_layer(in, spec.layers[i], spec.n_embd, i));
    for (size_t i = 0; i < in.taken.size(); ++i)
        if (!in.taken[i]) in.fail(ErrorKind::bad_data, gguf.tensors()[i].name, "is not used");
    if (in.error) return *in.error;
    return out;
}

}  // namespace detail

Result<ModelSpec> read_model_spec(const Gguf& gguf) {
    detail::SpecReader in{gguf};
    ModelSpec spec;
    spec.architecture = in.value(gguf.get_string("general.architecture"));
    if (in.error) return *in.error;
    const auto* row = detail::find_architecture(spec.architecture);
    if (!row)
        return detail::make_error(
            ErrorKind::unsupported,
            detail::join({gguf.name(), ": architecture '", detail::printable(spec.architecture, 64),
                          "' is not supported"}));
    in.prefix = spec.architecture + ".";
    spec.name = in.value(gguf.get_string("general.name", ""));
    detail::refuse_unknown_options(in);
    spec.n_embd = in.size("embedding_length", ModelSpec::max_width);
    spec.n_context = in.size("context_length", ModelSpec::max_context);
    spec.norm_eps = in.positive("attention.layer_norm_rms_epsilon", 0.0f);
    spec.embedding_scale = in.positive("embedding_scale", 1.0f);
    spec.logit_scale = in.positive("logit_scale", 1.0f);
    spec.tied_output = !gguf.find_tensor("output.weight");
    spec.n_vocab = detail::read_vocab_size(in);
    spec.layers = detail::read_layers(in, *row, spec.n_embd);
    detail::read_windows(in, spec);
    spec.rope_factors = detail::read_rope_factors(in, spec.layers[0].rope.dims);
    if (in.error) return *in.error;
    return spec;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

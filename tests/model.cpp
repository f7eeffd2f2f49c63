#include <doctest/doctest.h>

#include "base/internal.hpp"
#include "model_internal.hpp"
#include "tiny_model.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <set>

using namespace valar;

namespace {

using Bytes = std::vector<std::byte>;

/// The file again, without some keys and tensors and with what `add` puts in.
Bytes edit(
    const Bytes& bytes, const std::set<std::string_view>& without,
    const std::function<void(GgufWriter&)>& add = [](GgufWriter&) {}) {
    auto gguf = Gguf::from_bytes(bytes);
    REQUIRE(gguf);
    GgufWriter writer;
    for (const GgufKey& key : gguf->keys())
        if (!without.count(key.name)) writer.set(key);
    for (const TensorInfo& tensor : gguf->tensors())
        if (!without.count(tensor.name))
            writer.add_tensor(tensor.name, tensor.type, std::span(tensor.dims, tensor.n_dims),
                              *gguf->tensor_bytes(tensor));
    add(writer);
    auto out = writer.to_bytes();
    REQUIRE_MESSAGE(out, out.error().message);
    return *out;
}

/// Reads the spec and binds it; what fails first, or "fine".
std::string verdict(const Bytes& bytes) {
    auto gguf = Gguf::from_bytes(bytes, "m.gguf");
    REQUIRE(gguf);
    auto spec = read_model_spec(*gguf);
    if (!spec) return spec.error().message;
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    return tensors ? "fine" : tensors.error().message;
}

void check_says(const Bytes& bytes, std::string_view fragment) {
    const std::string message = verdict(bytes);
    CHECK_MESSAGE(message.find(fragment) != std::string::npos, message, " / wanted: ", fragment);
    CHECK(message.find("m.gguf: ") == 0);
}

const tiny::Options small_options = {.n_embd = 32, .n_heads = 4, .n_kv_heads = 2, .n_ff = 48};
const Bytes& small_model() {
    static const Bytes bytes = tiny::model(small_options);
    return bytes;
}

/// The small model with a key of another value.
template <class T>
Bytes with_key(std::string_view key, T value) {
    return edit(small_model(), {key}, [&](GgufWriter& writer) { writer.set(key, value); });
}

Result<ModelSpec> spec_of(const Bytes& bytes) {
    auto gguf = Gguf::from_bytes(bytes);
    REQUIRE(gguf);
    return read_model_spec(*gguf);
}

/// The small model with one tensor replaced by zeros of another type or shape.
Bytes with_tensor(std::string_view name, TensorType type, std::vector<uint64_t> dims) {
    uint64_t values = 1;
    for (uint64_t dim : dims) values *= dim;
    const TypeInfo& info = *type_info(type);
    const Bytes zeros(values / info.block_size * info.block_bytes);
    return edit(small_model(), {name},
                [&](GgufWriter& writer) { writer.add_tensor(name, type, dims, zeros); });
}

}  // namespace

TEST_CASE("model: a llama file as a spec") {
    auto spec = spec_of(small_model());
    REQUIRE_MESSAGE(spec, spec.error().message);
    CHECK(spec->architecture == "llama");
    CHECK(spec->name == "Tiny");
    CHECK(spec->n_vocab == tiny::vocabulary().size());
    CHECK(spec->n_embd == 32);
    CHECK(spec->n_context == 512);
    CHECK(spec->norm_eps == 1e-5f);
    CHECK(spec->embedding_scale == 1);
    CHECK(spec->logit_scale == 1);
    CHECK(spec->tied_output);
    CHECK(spec->rope_factors.empty());
    REQUIRE(spec->layers.size() == 2);
    const LayerSpec& layer = spec->layers[1];
    CHECK(layer.n_heads == 4);
    CHECK(layer.n_kv_heads == 2);
    CHECK(layer.head_dim == 8);
    CHECK(layer.n_ff == 48);
    CHECK(!layer.qkv_bias);
    CHECK(layer.attention_scale == 1 / std::sqrt(8.0f));
    CHECK(layer.rope.kind == RopeKind::norm);
    CHECK(layer.rope.dims == 8);
    CHECK(layer.rope.base == 10000);
    CHECK(layer.rope.scale == 1);
}

TEST_CASE("model: all tensors of a layer are bound") {
    auto gguf = Gguf::from_bytes(small_model());
    REQUIRE(gguf);
    auto spec = read_model_spec(*gguf);
    REQUIRE(spec);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    REQUIRE_MESSAGE(tensors, tensors.error().message);
    const detail::RoleTensors& layer = tensors->layers.at(1);
    using detail::TensorRole;
    CHECK(layer[TensorRole::attn_norm].tensor->name == "blk.1.attn_norm.weight");
    CHECK(layer[TensorRole::q].tensor->name == "blk.1.attn_q.weight");
    CHECK(layer[TensorRole::k].tensor->name == "blk.1.attn_k.weight");
    CHECK(layer[TensorRole::v].tensor->name == "blk.1.attn_v.weight");
    CHECK(layer[TensorRole::attn_output].tensor->name == "blk.1.attn_output.weight");
    CHECK(layer[TensorRole::ffn_norm].tensor->name == "blk.1.ffn_norm.weight");
    CHECK(layer[TensorRole::gate].tensor->name == "blk.1.ffn_gate.weight");
    CHECK(layer[TensorRole::up].tensor->name == "blk.1.ffn_up.weight");
    CHECK(layer[TensorRole::down].tensor->name == "blk.1.ffn_down.weight");
    CHECK(!layer[TensorRole::q_bias]);
    CHECK(tensors->model[TensorRole::output].tensor ==
          tensors->model[TensorRole::token_embd].tensor);
    const Gguf moved = std::move(*gguf);  // what is bound stays where it is
    CHECK(moved.find_tensor("blk.1.attn_q.weight") == layer[TensorRole::q].tensor);
}

TEST_CASE("model: qwen2 has biases and rotates halves") {
    auto bytes = tiny::model({.architecture = "qwen2", .tied = false});
    auto gguf = Gguf::from_bytes(bytes);
    REQUIRE(gguf);
    auto spec = read_model_spec(*gguf);
    REQUIRE(spec);
    CHECK(spec->layers[0].qkv_bias);
    CHECK(spec->layers[0].rope.kind == RopeKind::neox);
    CHECK(!spec->tied_output);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    REQUIRE(tensors);
    CHECK(tensors->layers[0][detail::TensorRole::k_bias].tensor->name == "blk.0.attn_k.bias");
    CHECK(tensors->model[detail::TensorRole::output].tensor->name == "output.weight");
    check_says(edit(bytes, {"blk.0.attn_k.bias"}), "tensor 'blk.0.attn_k.bias' is missing");
}

TEST_CASE("model: every supported type binds") {
    CHECK(verdict(tiny::model({.types = tiny::all_types(), .tied = false})) == "fine");
    for (TensorType type : tiny::all_types())
        CHECK(verdict(tiny::model({.types = {type}})) == "fine");
}

TEST_CASE("model: optional keys") {
    const auto fine = [](const Bytes& bytes) {
        auto spec = spec_of(bytes);
        REQUIRE_MESSAGE(spec, spec.error().message);
        return *spec;
    };
    CHECK(fine(with_key("llama.embedding_scale", 12.0f)).embedding_scale == 12);
    CHECK(fine(with_key("llama.logit_scale", 0.25f)).logit_scale == 0.25f);
    CHECK(fine(with_key("llama.attention.scale", 0.5f)).layers[0].attention_scale == 0.5f);
    CHECK(fine(with_key("llama.attention.value_length", 8u)).layers[0].head_dim == 8);
    CHECK(fine(with_key("llama.rope.dimension_count", 6u)).layers[0].rope.dims == 6);
    CHECK(fine(with_key("llama.rope.scaling.factor", 4.0f)).layers[0].rope.scale == 0.25f);
    CHECK(fine(with_key("llama.rope.scale_linear", 2.0f)).layers[0].rope.scale == 0.5f);
    CHECK(fine(with_key("llama.expert_count", 0u)).layers.size() == 2);
    CHECK(fine(edit(small_model(), {"general.name"})).name.empty());
    CHECK(fine(edit(small_model(), {"llama.rope.dimension_count", "llama.rope.freq_base"}))
              .layers[0]
              .rope.dims == 8);
    CHECK(fine(edit(small_model(), {"llama.attention.head_count_kv"})).layers[0].n_kv_heads == 4);
    CHECK(fine(with_key("llama.vocab_size", 96u)).n_vocab == 299);
    CHECK(fine(with_key("llama.attention.causal", true)).n_embd == 32);
    CHECK(fine(with_key("llama.attention.clamp_kqv", 0.0f)).n_embd == 32);
    CHECK(fine(with_key("llama.attention.max_alibi_bias", 0.0f)).n_embd == 32);
    CHECK(fine(with_key("llama.rope.scaling.yarn_ext_factor", 1.0f)).n_embd == 32);
    CHECK(fine(with_key("llama2.of_another", 1u)).n_embd == 32);
    const Bytes unscaled = edit(small_model(), {}, [](GgufWriter& writer) {
        writer.set_string("llama.rope.scaling.type", "none");
        writer.set("llama.rope.scaling.factor", 4.0f);
    });
    CHECK(fine(unscaled).layers[0].rope.scale == 1);
}

TEST_CASE("model: heads of another size than the width says") {
    // 4 heads of 16 in a width of 32: the projections are not square.
    const Bytes bytes = with_key("llama.attention.key_length", 16u);
    auto spec = spec_of(bytes);
    REQUIRE(spec);
    CHECK(spec->layers[0].head_dim == 16);
    check_says(bytes, "tensor 'blk.0.attn_q.weight' has the shape 32 x 32 x 1 x 1; 32 x 64");
}

TEST_CASE("model: sizes that differ from layer to layer") {
    const auto arrays = [](std::vector<int32_t> heads, std::vector<int32_t> widths) {
        return edit(small_model(), {"llama.attention.head_count_kv", "llama.feed_forward_length"},
                    [&](GgufWriter& writer) {
                        writer.set_array<int32_t>("llama.attention.head_count_kv", heads);
                        writer.set_array<int32_t>("llama.feed_forward_length", widths);
                    });
    };
    auto spec = spec_of(arrays({4, 2}, {48, 64}));
    REQUIRE_MESSAGE(spec, spec.error().message);
    CHECK(spec->layers[0].n_kv_heads == 4);
    CHECK(spec->layers[1].n_kv_heads == 2);
    CHECK(spec->layers[1].n_ff == 64);
    CHECK(verdict(arrays({2, 2}, {48, 48})) == "fine");
    check_says(arrays({2}, {48, 48}), "'llama.attention.head_count_kv' is too short");
    check_says(arrays({2, -2}, {48, 48}), "head_count_kv' is 18446744073709551614");
}

TEST_CASE("model: Granite's key that says whether it rotates") {
    const auto file = detail::read_file(VALAR_SOURCE_DIR "/tests/data/references/granite.gguf",
                                        1 << 20);
    REQUIRE(file);
    const auto* data = reinterpret_cast<const std::byte*>(file->data());
    for (const bool rotates : {true, false}) {
        auto spec = spec_of(edit(Bytes(data, data + file->size()), {}, [&](GgufWriter& writer) {
            writer.set("granite.rope.scaling.finetuned", rotates);
            writer.set("granite.ssm.conv_kernel", 4u);
        }));
        REQUIRE_MESSAGE(spec, spec.error().message);
        CHECK((spec->layers[0].rope.dims != 0) == rotates);
    }
}

TEST_CASE("model: what is not implemented is refused by name") {
    check_says(edit(small_model(), {"general.architecture"}), "'general.architecture' is missing");
    const auto named = [](std::string_view architecture) {
        return edit(small_model(), {"general.architecture"}, [&](GgufWriter& writer) {
            writer.set_string("general.architecture", architecture);
        });
    };
    check_says(named("gemma33"),
               "architecture 'gemma33' is not supported; these are: llama, qwen2");
    check_says(named("a\nb"), "architecture 'a\\x0ab' is not supported");
    check_says(named(std::string(10000, 'x')), "architecture 'xxx");
    check_says(with_key("llama.expert_count", 8u), "key 'llama.expert_used_count' is");
    check_says(with_key("llama.attention.clamp_kqv", 30.0f), "attention.clamp_kqv");
    check_says(with_key("llama.router_logit_softcapping", 30.0f),
               "key 'llama.router_logit_softcapping' is not used");
    check_says(with_key("llama.attention.causal", false), "attention.causal");
    check_says(with_key("llama.rope.scaling.yarn_ext_factor", 0.5f), "yarn_ext_factor");
    // of another architecture's, which this one's row does not read
    check_says(with_key("llama.attention.temperature_scale", 0.1f), "temperature_scale");
    check_says(with_key("llama.final_logit_softcapping", -1.0f), "final_logit_softcapping");
    check_says(with_key("llama.attention.value_length", 4u), "differs from key_length");
    const auto scaled = [](const char* type, float base) {
        return edit(small_model(), {"llama.rope.freq_base"}, [&](GgufWriter& writer) {
            writer.set_string("llama.rope.scaling.type", type);
            writer.set("llama.rope.freq_base", base);
        });
    };
    check_says(scaled("twisted", 1e4f),
               "key 'llama.rope.scaling.type' is none of 'none', 'linear'");
    check_says(scaled("yarn", 1), "key 'llama.rope.freq_base' makes no ramp of YaRN");
}

TEST_CASE("model: a sliding window, of all layers or of some") {
    const std::string key = "llama.attention.sliding_window", pattern = key + "_pattern";
    const auto windows = [](const Bytes& bytes) {
        auto spec = spec_of(bytes);
        REQUIRE_MESSAGE(spec, spec.error().message);
        std::vector<uint32_t> out;
        for (const LayerSpec& layer : spec->layers) out.push_back(layer.window);
        return out;
    };
    using List = std::vector<uint32_t>;
    const auto with = [&](auto set_pattern) {
        return edit(tiny::model({.n_layers = 3}), {}, [&](GgufWriter& writer) {
            writer.set(key, 100u);
            set_pattern(writer);
        });
    };
    const auto period = [&](uint32_t n) {
        return windows(with([&](GgufWriter& writer) { writer.set(pattern, n); }));
    };
    const auto named = [&](std::vector<int32_t> layers) {
        return with([&](GgufWriter& writer) { writer.set_array<int32_t>(pattern, layers); });
    };
    CHECK(windows(with([](GgufWriter&) {})) == List{100, 100, 100});
    CHECK(windows(with_key(key, 512u)) == List{0, 0});  // the whole context
    auto bases = spec_of(with([&](GgufWriter& writer) {
        writer.set(pattern, 2u);
        writer.set("llama.rope.freq_base_swa", 500.0f);
    }));
    REQUIRE_MESSAGE(bases, bases.error().message);
    CHECK(bases->layers[0].rope.base == 500);
    CHECK(bases->layers[1].rope.base == 10000);
    CHECK(windows(with_key(key, 511u)) == List{511, 511});
    CHECK(period(0) == List{100, 100, 100});
    CHECK(period(2) == List{100, 0, 100});
    CHECK(period(1) == List{0, 0, 0});
    CHECK(windows(named({0, 1, 1})) == List{0, 100, 100});
    check_says(named({0, 1}), "sliding_window_pattern' is too short for the layers");
    check_says(with_key(pattern, 1.0f), "sliding_window_pattern' is not an integer");
    check_says(with_key(key, -1), "sliding_window' is negative");
    check_says(with_key(key, 1.0f), "sliding_window' is not an integer");
}

TEST_CASE("model: sizes are within limits and fit each other") {
    const uint32_t huge = std::numeric_limits<uint32_t>::max();
    for (std::string_view key :
         {"llama.block_count", "llama.context_length", "llama.embedding_length",
          "llama.feed_forward_length", "llama.attention.head_count",
          "llama.attention.head_count_kv", "llama.attention.key_length",
          "llama.attention.value_length", "llama.rope.dimension_count"}) {
        check_says(with_key(key, 0u), std::string(key) + "' is 0, not from 1 to");
        check_says(with_key(key, huge), std::string(key) + "' is 4294967295, not from 1 to");
        check_says(with_key(key, uint64_t{1} << 63), std::string(key) + "' is 9223372036854775808");
        check_says(with_key(key, -1), std::string(key) + "' is negative");
        check_says(with_key(key, 1.0f), std::string(key) + "' is not an integer");
    }
    check_says(with_key("llama.attention.head_count", 5u), "does not divide embedding_length");
    check_says(with_key("llama.attention.head_count", 64u), "does not divide embedding_length");
    check_says(with_key("llama.attention.head_count_kv", 3u), "does not divide head_count");
    check_says(with_key("llama.attention.head_count_kv", 8u), "does not divide head_count");
    check_says(with_key("llama.rope.dimension_count", 7u), "'llama.rope.dimension_count' is odd");
    check_says(with_key("llama.rope.dimension_count", 10u), "not from 1 to 8");
    check_says(with_key("llama.attention.key_length", 1u << 19), "times head size is too large");
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (float bad : {0.0f, -1.0f, nan, std::numeric_limits<float>::infinity()})
        for (std::string_view key :
             {"llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
              "llama.rope.scaling.factor", "llama.logit_scale"})
            check_says(with_key(key, bad), std::string(key) + "' must be a positive number");
    check_says(edit(small_model(), {"llama.block_count"}), "key 'llama.block_count' is missing");
    check_says(edit(small_model(), {"llama.attention.layer_norm_rms_epsilon"}), "rms_epsilon");
}

TEST_CASE("model: a tensor that is missing, mis-shaped, unused or of another type") {
    check_says(edit(small_model(), {"token_embd.weight"}), "'token_embd.weight' is missing");
    check_says(edit(small_model(), {"output_norm.weight"}), "'output_norm.weight' is missing");
    check_says(edit(small_model(), {"blk.1.ffn_up.weight"}), "'blk.1.ffn_up.weight' is missing");
    check_says(with_key("llama.block_count", 3u), "'blk.2.attn_norm.weight' is missing");
    check_says(with_key("llama.block_count", 1u), "tensor 'blk.1.attn_norm.weight' is not used");
    check_says(with_tensor("blk.0.attn_q.bias", TensorType::f32, {32}), "attn_k.bias' is missing");
    check_says(with_tensor("blk.0.attn_q.other", TensorType::f32, {32}),
               "attn_q.other' is not used");
    check_says(with_tensor("blk.0.ffn_up.weight", TensorType::f32, {48, 32}),
               "'blk.0.ffn_up.weight' has the shape 48 x 32 x 1 x 1; 32 x 48 was expected");
    check_says(with_tensor("blk.0.ffn_up.weight", TensorType::f32, {32, 48, 2}), "has the shape");
    check_says(with_tensor("output_norm.weight", TensorType::f32, {16, 2}), "has the shape");
    check_says(with_tensor("output_norm.weight", TensorType::f16, {32}),
               "tensor 'output_norm.weight' has type F16, which is not supported here");
    check_says(with_tensor("blk.0.ffn_up.weight", TensorType::i16, {32, 48}), "has type I16");
    check_says(with_tensor("blk.0.ffn_up.weight", TensorType::i32, {32, 48}), "has type I32");
    check_says(with_tensor("output.weight", TensorType::f32, {32, 7}), "'output.weight' has");
    check_says(with_tensor("token_embd.weight", TensorType::f32, {32, 7}),
               "key 'tokenizer.ggml.tokens' has 299 entries, 'token_embd.weight' 7 rows");
    check_says(with_tensor("token_embd.weight", TensorType::i8, {1, (1 << 24) + 1}),
               "'token_embd.weight' has too many rows");
}

TEST_CASE("model: rope factors of llama3") {
    auto bytes = tiny::model({.rope_factors = true});
    auto spec = spec_of(bytes);
    REQUIRE(spec);
    CHECK(spec->rope_factors.size() == 32);
    CHECK(*std::min_element(spec->rope_factors.begin(), spec->rope_factors.end()) >= 1);
    CHECK(verdict(bytes) == "fine");
    check_says(with_tensor("rope_freqs.weight", TensorType::f32, {4}), "a factor not positive");
    check_says(with_tensor("rope_freqs.weight", TensorType::f32, {5}), "is not F32 of half");
    check_says(with_tensor("rope_freqs.weight", TensorType::f16, {4}), "is not F32 of half");
    // A reader may fail here too.
    auto failing = [](void* context, uint64_t offset, void* dst, size_t size) {
        const auto& file = *static_cast<const Bytes*>(context);
        if (offset != 0) return false;
        std::memcpy(dst, file.data(), size);
        return true;
    };
    auto gguf = Gguf::from_reader({failing, &bytes, bytes.size(), "archive"});
    REQUIRE(gguf);
    CHECK(read_model_spec(*gguf).error().kind == ErrorKind::io);
}

TEST_CASE("model: the real one") {
    const std::string folder = detail::environment("VALAR_MODELS");
    if (folder.empty()) {
        MESSAGE("skipped: VALAR_MODELS is not set");
        return;
    }
    auto gguf = Gguf::open(folder + "/SmolLM2-135M-Instruct.Q4_1.gguf");
    REQUIRE_MESSAGE(gguf, gguf.error().message);
    auto spec = read_model_spec(*gguf);
    REQUIRE_MESSAGE(spec, spec.error().message);
    CHECK(spec->layers.size() == 30);
    CHECK(spec->n_vocab == 49152);
    CHECK(spec->n_context == 8192);
    CHECK(spec->layers[7].head_dim == 64);
    CHECK(spec->layers[7].n_kv_heads == 3);
    CHECK(spec->layers[7].rope.base == 100000);
    auto tensors = detail::bind_model_tensors(*gguf, *spec);
    REQUIRE_MESSAGE(tensors, tensors.error().message);
    CHECK(tensors->layers[29][detail::TensorRole::down].tensor->type == TensorType::q4_1);
}

// A tiny model file, made in memory: a transformer with random weights and a real tokenizer.
//
//     auto bytes = tiny::model();                                  // llama, 2 layers, F32
//     auto bytes = tiny::model({.types = {valar::TensorType::q4_k}});
//     auto bytes = tiny::model({.architecture = "qwen2", .types = tiny::all_types()});
//     auto gguf  = valar::Gguf::from_bytes(bytes);                 // borrows: keep `bytes`
//
// The same options give the same bytes on every machine and compiler: each weight depends only
// on the seed, the tensor's name and its place in it, and no expression here can be contracted.
// Quantized tensors are random valid blocks, not roundings of the F32 ones. Values are scaled so
// that logits stay small and finite. Vocabulary: ids 0 to 2 are <|endoftext|>, <|im_start|> and
// <|im_end|> (control tokens), 3 + b is byte b, then one token a merge (`merges` below).
#ifndef VALAR_TESTS_TINY_MODEL_HPP
#define VALAR_TESTS_TINY_MODEL_HPP

#include "gguf.hpp"
#include "kernels/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace tiny {

using valar::TensorType;

struct Options {
    std::string_view architecture = "llama";  // or "qwen2": halves in rope, biases on q, k and v
    // One type for every matrix, or several, dealt out in turn: first the embedding, then q, k, v,
    // attn_output, gate, up, down of each layer, then the output. K-quants need 256 columns.
    std::vector<TensorType> types = {TensorType::f32};
    uint32_t n_layers = 2;
    uint32_t n_embd = 256;
    uint32_t n_heads = 4;
    uint32_t n_kv_heads = 2;
    uint32_t n_ff = 256;
    uint32_t n_context = 512;
    uint32_t window = 0;        // positions that a layer sees; 0: all
    uint32_t full_every = 0;    // every so manieth layer sees all nevertheless; 0: none
    bool tied = true;           // no output matrix of its own
    bool rope_factors = false;  // a rope_freqs.weight tensor, as llama3 has it
    uint32_t short_rope = 0;  // tokens up to which the first of two lists of factors holds; 0: none
    uint64_t seed = 1;
    std::vector<std::string> control = {};  // further control tokens, after all others
};

inline std::vector<TensorType> all_types() {
    return {TensorType::q8_0, TensorType::q4_k, TensorType::q6_k, TensorType::q4_1,
            TensorType::q5_k, TensorType::q4_0, TensorType::q5_0, TensorType::f16,
            TensorType::bf16, TensorType::f32};
}

/// Types that came after the digests of all_types: each has a digest of its own (backend.cpp).
inline std::vector<TensorType> later_types() {
    return {TensorType::q5_1,    TensorType::iq4_nl, TensorType::mxfp4,  TensorType::nvfp4,
            TensorType::q2_k,    TensorType::q3_k,   TensorType::iq4_xs, TensorType::iq3_s,
            TensorType::iq3_xxs, TensorType::iq2_s,  TensorType::iq2_xs, TensorType::iq2_xxs,
            TensorType::iq1_s,   TensorType::iq1_m,  TensorType::tq1_0,  TensorType::tq2_0};
}

inline constexpr std::string_view merges[] = {
    "\u0120 t",     "h e",      "i n",        "r e",           "o n",        "\u0120 a",
    "\u0120t he",   "e r",      "a t",        "\u0120 s",      "o u",        "l l",
    "he ll",        "hell o",   "\u0120 w",   "o r",           "\u0120w or", "l d",
    "\u0120wor ld", "in g",     "a n",        "\u0120a n",     "\u0120an d", "s t",
    "e n",          "\u0120 c", "i s",        "u s",           "us er",      "s y",
    "sy st",        "syst e",   "syste m",    "a s",           "as s",       "ass is",
    "assis t",      "an t",     "assist ant", "\u010a \u010a",
};

inline constexpr std::string_view chat_template =
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// GPT-2 spells each byte as one printable character: itself, or the next unused one from U+0100.
inline std::string spell_byte(int byte) {
    const auto printable = [](int b) {
        return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    };
    int code = byte;
    if (!printable(byte)) {
        code = 0x100;
        for (int b = 0; b < byte; ++b) code += !printable(b);
    }
    if (code < 0x80) return std::string(1, static_cast<char>(code));
    return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
}

inline std::vector<std::string> vocabulary() {
    std::vector<std::string> tokens = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    for (int byte = 0; byte < 256; ++byte) tokens.push_back(spell_byte(byte));
    for (std::string_view merge : merges) {
        std::string token(merge);
        token.erase(token.find(' '), 1);
        tokens.push_back(token);
    }
    return tokens;
}

/// A linear congruential generator (Knuth's MMIX constants); only its upper bits are used.
class Random {
public:
    Random(uint64_t seed, std::string_view name) : state_(seed) {
        for (char c : name) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
        next();
    }
    uint32_t next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 32);
    }
    uint8_t byte() { return static_cast<uint8_t>(next() >> 24); }
    /// A multiple of 2^-23 from -1 to 1.
    float unit() {
        return static_cast<float>(static_cast<int32_t>(next() >> 8) - 0x800000) / 0x800000;
    }

private:
    uint64_t state_;
};

/// Upper bits of a float as IEEE half precision, rounded toward zero; |value| < 65536.
inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
    const uint32_t fraction = bits & 0x7fffff;
    if (exponent >= 1)
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | fraction >> 13);
    if (exponent < -10) return static_cast<uint16_t>(sign);
    return static_cast<uint16_t>(sign | (fraction | 0x800000) >> (14 - exponent));
}

class Block {
public:
    explicit Block(std::byte* at) : at_(at) {}
    void half(float value) {
        const uint16_t bits = to_half(value);
        std::memcpy(at_, &bits, 2);
        at_ += 2;
    }
    void random(Random& random, int count) {
        for (int i = 0; i < count; ++i) *at_++ = std::byte{random.byte()};
    }
    void byte(int value) { *at_++ = static_cast<std::byte>(value); }

private:
    std::byte* at_;
};

/// One block whose values have a standard deviation of about `size`. The divisors are the spread
/// of the stored integers (for K-quants times that of the 6-bit scales), the factors of the
/// minimum their mean.
inline void fill_block(TensorType type, Random& random, float size, std::byte* at) {
    Block block(at);
    size *= static_cast<float>(128 + random.byte()) / 256;
    switch (type) {
        case TensorType::f32: {
            const float value = random.unit() * size;
            std::memcpy(at, &value, 4);
            break;
        }
        case TensorType::f16: block.half(random.unit() * size); break;
        case TensorType::bf16: {
            const float value = random.unit() * size;
            std::memcpy(at, reinterpret_cast<const char*>(&value) + 2, 2);
            break;
        }
        case TensorType::q4_0:
            block.half(size / 5);
            block.random(random, 16);
            break;
        case TensorType::q4_1:
            block.half(size / 5);
            block.half(size * -1.5f);
            block.random(random, 16);
            break;
        case TensorType::q5_1:
            block.half(size / 9);
            block.half(size * (-15.5f / 9));
            block.random(random, 20);
            break;
        case TensorType::iq4_nl:
            block.half(size / 69);
            block.random(random, 16);
            break;
        case TensorType::mxfp4: {  // a power of two near size / 6
            uint32_t bits;
            std::memcpy(&bits, &size, 4);
            block.byte(static_cast<int>(bits >> 23 & 0xff) - 1);
            block.random(random, 16);
            break;
        }
        case TensorType::nvfp4: {  // E4M3: a power of two near size / 3, and a fraction
            uint32_t bits;
            std::memcpy(&bits, &size, 4);
            const int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 5;
            for (int i = 0; i < 4; ++i)
                block.byte((exponent > 1 ? exponent : 1) << 3 | (random.byte() & 7));
            block.random(random, 32);
            break;
        }
        case TensorType::q2_k:
            block.random(random, 80);
            block.half(size / 8);
            block.half(size * (1.5f / 8));
            break;
        case TensorType::q3_k:
            block.random(random, 108);
            block.half(size / 40);
            break;
        case TensorType::iq4_xs:
            block.half(size / 1200);
            block.random(random, 134);
            break;
        case TensorType::iq3_s:
        case TensorType::iq3_xxs:
        case TensorType::iq2_s:
        case TensorType::iq2_xs:
        case TensorType::iq2_xxs:
        case TensorType::iq1_s:
            block.half(size / (type == TensorType::iq3_s   ? 150
                               : type == TensorType::iq1_s ? 6
                                                           : 90));
            block.random(random, static_cast<int>(valar::type_info(type)->block_bytes) - 2);
            break;
        case TensorType::iq1_m: {  // the scale lies in the upper halves of the last bytes
            const uint16_t bits = to_half(size / 6);
            block.random(random, 48);
            for (int i = 0; i < 4; ++i) {
                block.random(random, 1);
                block.byte((bits >> 4 * i & 15) << 4 | (random.byte() & 15));
            }
            break;
        }
        case TensorType::tq1_0:
            block.random(random, 52);
            block.half(size);
            break;
        case TensorType::tq2_0:
            block.random(random, 64);
            block.half(size);
            break;
        // clang-format off
        case TensorType::q5_0: block.half(size / 9); block.random(random, 20); break;
        case TensorType::q8_0: block.half(size / 74); block.random(random, 32); break;
        // clang-format on
        case TensorType::q4_k:
            block.half(size / 256);
            block.half(size * (7.5f / 256));
            block.random(random, 140);
            break;
        case TensorType::q5_k:
            block.half(size / 512);
            block.half(size * (15.5f / 512));
            block.random(random, 172);
            break;
        case TensorType::q6_k:
            block.random(random, 192);
            for (int i = 0; i < 16; ++i) block.byte(random.byte() % 63 - 31);
            block.half(size / 333);
            break;
        default: std::abort();
    }
}

/// Collects tensors; the writer borrows their bytes, so they stay here until it has written.
class Tensors {
public:
    Tensors(valar::GgufWriter& writer, uint64_t seed) : writer_(writer), seed_(seed) {}

    void matrix(const std::string& name, TensorType type, uint64_t rows, uint64_t columns) {
        const valar::TypeInfo& info = *valar::type_info(type);
        auto& data = data_.emplace_back(rows * (columns / info.block_size) * info.block_bytes);
        const float size = 1 / std::sqrt(static_cast<float>(columns));
        Random random(seed_, name);
        for (size_t at = 0; at < data.size(); at += info.block_bytes)
            fill_block(type, random, size, data.data() + at);
        const uint64_t dims[] = {columns, rows};
        writer_.add_tensor(name, type, dims, data);
    }
    /// Values from `from` to `from + span`, all multiples of span / 256.
    void vector(const std::string& name, uint64_t length, float from, float span) {
        auto& data = data_.emplace_back(length * 4);
        Random random(seed_, name);
        for (uint64_t i = 0; i < length; ++i) {
            const float step = span * static_cast<float>(random.byte()) / 256;  // exact
            const float value = from + step;
            std::memcpy(data.data() + 4 * i, &value, 4);
        }
        const uint64_t dims[] = {length};
        writer_.add_tensor(name, TensorType::f32, dims, data);
    }

private:
    valar::GgufWriter& writer_;
    uint64_t seed_;
    std::deque<std::vector<std::byte>> data_;
};

inline void set_tokenizer(valar::GgufWriter& writer, bool qwen2,
                          const std::vector<std::string>& control) {
    std::vector<std::string> tokens = vocabulary();
    tokens.insert(tokens.end(), control.begin(), control.end());
    const std::vector<std::string_view> views(tokens.begin(), tokens.end());
    std::vector<int32_t> kinds(tokens.size(), 1);     // normal
    for (size_t id = 0; id < 3; ++id) kinds[id] = 3;  // control
    std::fill(kinds.end() - static_cast<ptrdiff_t>(control.size()), kinds.end(), 3);
    writer.set_string("tokenizer.ggml.model", "gpt2");
    writer.set_string("tokenizer.ggml.pre", qwen2 ? "qwen2" : "smollm");
    writer.set_strings("tokenizer.ggml.tokens", views);
    writer.set_array<int32_t>("tokenizer.ggml.token_type", kinds);
    writer.set_strings("tokenizer.ggml.merges", merges);
    writer.set<uint32_t>("tokenizer.ggml.bos_token_id", 1);
    writer.set<uint32_t>("tokenizer.ggml.eos_token_id", 2);
    writer.set("tokenizer.ggml.add_bos_token", false);
    writer.set_string("tokenizer.chat_template", chat_template);
}

/// Metadata and tensors, put into `writer`, which is used up before `tensors` goes.
inline void fill(valar::GgufWriter& writer, Tensors& tensors, const Options& options) {
    const std::string prefix = std::string(options.architecture) + ".";
    const bool qwen2 = options.architecture == "qwen2";
    const uint32_t head_dim = options.n_embd / options.n_heads;
    const uint32_t n_kv = options.n_kv_heads * head_dim;
    const auto n_vocab = static_cast<uint32_t>(vocabulary().size() + options.control.size());
    writer.set_string("general.architecture", options.architecture);
    writer.set_string("general.name", "Tiny");
    writer.set(prefix + "block_count", options.n_layers);
    writer.set(prefix + "context_length", options.n_context);
    writer.set(prefix + "embedding_length", options.n_embd);
    writer.set(prefix + "feed_forward_length", options.n_ff);
    writer.set(prefix + "attention.head_count", options.n_heads);
    writer.set(prefix + "attention.head_count_kv", options.n_kv_heads);
    writer.set(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
    if (options.window) writer.set(prefix + "attention.sliding_window", options.window);
    if (options.full_every)
        writer.set(prefix + "attention.sliding_window_pattern", options.full_every);
    writer.set(prefix + "rope.freq_base", 10000.0f);
    writer.set(prefix + "rope.dimension_count", head_dim);
    if (options.short_rope)
        writer.set(prefix + "rope.scaling.original_context_length", options.short_rope);
    set_tokenizer(writer, qwen2, options.control);

    size_t dealt = 0;
    const auto matrix = [&](const std::string& name, uint64_t rows, uint64_t columns) {
        tensors.matrix(name, options.types[dealt++ % options.types.size()], rows, columns);
    };
    matrix("token_embd.weight", n_vocab, options.n_embd);
    tensors.vector("output_norm.weight", options.n_embd, 0.5f, 1.0f);
    if (options.rope_factors) tensors.vector("rope_freqs.weight", head_dim / 2, 1.0f, 8.0f);
    if (options.short_rope) {
        tensors.vector("rope_factors_short.weight", head_dim / 2, 1.0f, 2.0f);
        tensors.vector("rope_factors_long.weight", head_dim / 2, 1.0f, 20.0f);
    }
    for (uint32_t i = 0; i < options.n_layers; ++i) {
        const std::string layer = "blk." + std::to_string(i) + ".";
        tensors.vector(layer + "attn_norm.weight", options.n_embd, 0.5f, 1.0f);
        matrix(layer + "attn_q.weight", options.n_embd, options.n_embd);
        matrix(layer + "attn_k.weight", n_kv, options.n_embd);
        matrix(layer + "attn_v.weight", n_kv, options.n_embd);
        if (qwen2) {
            tensors.vector(layer + "attn_q.bias", options.n_embd, -0.5f, 1.0f);
            tensors.vector(layer + "attn_k.bias", n_kv, -0.5f, 1.0f);
            tensors.vector(layer + "attn_v.bias", n_kv, -0.5f, 1.0f);
        }
        matrix(layer + "attn_output.weight", options.n_embd, options.n_embd);
        tensors.vector(layer + "ffn_norm.weight", options.n_embd, 0.5f, 1.0f);
        matrix(layer + "ffn_gate.weight", options.n_ff, options.n_embd);
        matrix(layer + "ffn_up.weight", options.n_ff, options.n_embd);
        matrix(layer + "ffn_down.weight", options.n_embd, options.n_ff);
    }
    if (!options.tied) matrix("output.weight", n_vocab, options.n_embd);
}

/// The whole file. Options that make no valid file end the program: they are the test's mistake.
inline std::vector<std::byte> model(const Options& options = {}) {
    valar::GgufWriter writer;
    Tensors tensors(writer, options.seed);
    fill(writer, tensors, options);
    auto bytes = writer.to_bytes();
    if (bytes) return std::move(*bytes);
    std::fprintf(stderr, "tiny::model: %s\n", bytes.error().message.c_str());
    std::abort();
}

/// The same model as examples/quantize.cpp --packed writes it.
inline std::vector<std::byte> packed_copy(const std::vector<std::byte>& bytes) {
    auto gguf = valar::Gguf::from_bytes(bytes);
    valar::GgufWriter writer(valar::packed_alignment);
    for (const valar::GgufKey& key : gguf->keys()) writer.set(key);
    const auto fill = [](void* context, const valar::TensorInfo& to, uint64_t offset,
                         std::span<std::byte> out) -> valar::Result<void> {
        const valar::Gguf& from = *static_cast<const valar::Gguf*>(context);
        const valar::TensorInfo& tensor = *from.find_tensor(to.name);
        if (!to.packed) return from.read_tensor(tensor, offset, out);
        const uint64_t rows = to.dims[1], row_bytes = tensor.bytes / rows;
        const uint32_t cols = static_cast<uint32_t>(to.dims[0]);
        const uint64_t tile = valar::packed_bytes(to.type, valar::packed_rows, cols);
        const uint64_t first = offset / tile * valar::packed_rows;
        const uint64_t count = std::min(rows - first, out.size() / tile * valar::packed_rows);
        return valar::pack_rows(
            to.type, cols,
            from.tensor_bytes(tensor)->subspan(static_cast<size_t>(first * row_bytes),
                                               static_cast<size_t>(count * row_bytes)),
            out);
    };
    for (const valar::TensorInfo& tensor : gguf->tensors()) {
        valar::TensorInfo to = tensor;
        to.packed = tensor.n_dims == 2;
        writer.add_tensor(to, {fill, &*gguf});
    }
    auto packed = writer.to_bytes();
    if (packed) return std::move(*packed);
    std::fprintf(stderr, "tiny::packed_copy: %s\n", packed.error().message.c_str());
    std::abort();
}

}  // namespace tiny

#endif  // VALAR_TESTS_TINY_MODEL_HPP

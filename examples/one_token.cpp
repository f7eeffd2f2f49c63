// one_token: a transformer's whole forward pass in plain loops, to be read from top to bottom.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/one_token.cpp -o one_token
//     ./one_token --model F32.gguf --tokens 1,2,3
//
// It takes the ids of a text and says which five tokens are the likeliest to come next. It is slow
// and it reads F32 weights only; its logits are those of the Engine with KvType::f32, bit for bit,
// because it does the same operations in the same order: those of the numeric definition ("The
// numeric definition" in valar.hpp, whose numbers stand in brackets here).
//
// Shapes are written (rows, columns), a row's values being neighbours in memory.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <cmath>
#include <numeric>

namespace {

using valar::exact_exp;
using valar::exact_fma;

constexpr size_t kSegment = 256;  // positions that attention takes at a time

struct Layer {
    valar::LayerSpec spec;
    const float* attn_norm;     // (n_embd)
    const float* q;             // (n_heads * head_dim, n_embd)
    const float* k;             // (n_kv_heads * head_dim, n_embd)
    const float* v;             // (n_kv_heads * head_dim, n_embd)
    const float* q_bias;        // (n_heads * head_dim), or null
    const float* k_bias;        // (n_kv_heads * head_dim), or null
    const float* v_bias;        // (n_kv_heads * head_dim), or null
    const float* attn_output;   // (n_embd, n_heads * head_dim)
    const float* ffn_norm;      // (n_embd)
    const float* gate;          // (n_ff, n_embd)
    const float* up;            // (n_ff, n_embd)
    const float* down;          // (n_embd, n_ff)
    std::vector<float> keys;    // (positions so far, n_kv_heads * head_dim)
    std::vector<float> values;  // (positions so far, n_kv_heads * head_dim)
};

struct Model {
    valar::ModelSpec spec;
    const float* token_embd;   // (n_vocab, n_embd)
    const float* output_norm;  // (n_embd)
    const float* output;       // (n_vocab, n_embd)
    std::vector<Layer> layers;
};

// y (rows) = matrix (rows, x.size()) * x + bias (rows) [3, 4].
std::vector<float> multiply(const float* matrix, size_t rows, const std::vector<float>& x,
                            const float* bias = nullptr) {
    std::vector<float> y(rows);
    for (size_t row = 0; row < rows; ++row, matrix += x.size()) {
        float sum = 0;
        for (size_t i = 0; i < x.size(); ++i) sum = exact_fma(matrix[i], x[i], sum);
        y[row] = bias ? sum + bias[row] : sum;
    }
    return y;
}

// A long sum has sixteen running sums, added pair by pair at the end, so that machines with vectors
// of 4, 8 or 16 numbers can all do it in the same order [5].
float sum_of_lanes(float* lanes) {  // (16)
    for (size_t half = 8; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// RMSNorm (https://arxiv.org/abs/1910.07467): y_i = x_i / sqrt(mean of x^2 + eps) * weight_i [6].
std::vector<float> rms_norm(const std::vector<float>& x, const float* weight, float eps) {
    const size_t n = x.size();
    float lanes[16] = {};
    for (size_t i = 0; i < n; ++i) lanes[i % 16] = exact_fma(x[i], x[i], lanes[i % 16]);
    const float scale = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    std::vector<float> y(n);
    for (size_t i = 0; i < n; ++i) y[i] = (x[i] * scale) * weight[i];
    return y;
}

// RoPE (https://arxiv.org/abs/2104.09864) says where a token stands: pair i of every head's values
// is turned by the angle position * base^(-2i / dims), so that the product of a query and a key
// depends on their distance only. `factors` and `scale` stretch the angles for texts longer than
// those that the model was trained on first [9].
void rope(float* x, size_t n_heads, const valar::LayerSpec& spec, const std::vector<float>& factors,
          size_t position) {  // x (n_heads, head_dim)
    const valar::RopeSpec& how = spec.rope;
    const bool neox = how.kind == valar::RopeKind::neox;
    const double log2_base = valar::exact_log2(static_cast<double>(how.base));
    for (size_t i = 0; i < how.dims / 2; ++i) {
        double frequency = valar::exact_exp2(-(2.0 * static_cast<double>(i) / how.dims) *
                                             log2_base);
        frequency *= static_cast<double>(how.scale);
        if (!factors.empty()) frequency /= static_cast<double>(factors[i]);
        double sine, cosine;
        valar::exact_sincos(static_cast<double>(position) * frequency, &sine, &cosine);
        const float s = static_cast<float>(sine), c = static_cast<float>(cosine);
        for (size_t head = 0; head < n_heads; ++head) {
            float* first = x + head * spec.head_dim + (neox ? i : 2 * i);
            float* second = neox ? first + how.dims / 2 : first + 1;
            const float a = *first, b = *second;
            *first = exact_fma(a, c, -(b * s));
            *second = exact_fma(a, s, b * c);
        }
    }
}

// What a head gathered from some positions: exp(score - max) weighs a position's values, `sum` is
// the sum of the weights, out (head_dim) the weighted sum of the values.
struct Gathered {
    float max = 0, sum = 0;
    std::vector<float> out;
};

// Attention to positions begin .. end - 1 of one segment; q (head_dim), keys and values of one head
// of all positions, `stride` apart [10].
Gathered attend(const float* q, const float* keys, const float* values, size_t stride,
                size_t head_dim, size_t begin, size_t end) {
    std::vector<float> weights(end - begin);  // of the positions; scores at first
    for (size_t j = begin; j < end; ++j)
        for (size_t e = 0; e < head_dim; ++e)
            weights[j - begin] = exact_fma(q[e], keys[j * stride + e], weights[j - begin]);
    Gathered all;
    all.max = *std::max_element(weights.begin(), weights.end()) + 0.0f;  // -0 becomes 0
    float lanes[16] = {};
    for (size_t j = begin; j < end; ++j) {
        weights[j - begin] = exact_exp(weights[j - begin] - all.max);
        lanes[j % 16] += weights[j - begin];
    }
    all.sum = sum_of_lanes(lanes);
    all.out.resize(head_dim);
    for (size_t j = begin; j < end; ++j)
        for (size_t e = 0; e < head_dim; ++e)
            all.out[e] = exact_fma(weights[j - begin], values[j * stride + e], all.out[e]);
    return all;
}

// Two parts become one by scaling both to the larger of their maxima: the online softmax
// (https://arxiv.org/abs/1805.02867) that FlashAttention (https://arxiv.org/abs/2205.14135) uses.
void merge(Gathered& all, const Gathered& next) {
    const float max = std::max(all.max, next.max);
    const float a = exact_exp(all.max - max), b = exact_exp(next.max - max);
    all.max = max;
    all.sum = exact_fma(next.sum, b, all.sum * a);
    for (size_t e = 0; e < all.out.size(); ++e)
        all.out[e] = exact_fma(next.out[e], b, all.out[e] * a);
}

// Attention (https://arxiv.org/abs/1706.03762): out = softmax(q . keys) * values, for each query
// head; n_heads / n_kv_heads neighbours share a key head (https://arxiv.org/abs/2305.13245). A layer
// with a window sees the last positions only (https://arxiv.org/abs/2004.05150).
std::vector<float> attention(std::vector<float>& q, const Layer& layer, size_t position) {
    const valar::LayerSpec& spec = layer.spec;
    const size_t dim = spec.head_dim, stride = spec.n_kv_heads * dim;
    const size_t first = spec.window && position >= spec.window ? position - spec.window + 1 : 0;
    for (float& value : q) value *= spec.attention_scale;
    std::vector<float> out;  // (n_heads, head_dim)
    for (size_t head = 0; head < spec.n_heads; ++head) {
        const size_t kv_head = head / (spec.n_heads / spec.n_kv_heads);
        Gathered all;
        for (size_t begin = first, end; begin <= position; begin = end) {
            end = std::min((begin / kSegment + 1) * kSegment, position + 1);
            const Gathered next = attend(&q[head * dim], &layer.keys[kv_head * dim],
                                         &layer.values[kv_head * dim], stride, dim, begin, end);
            if (begin == first) all = next;
            else merge(all, next);
        }
        for (const float value : all.out) out.push_back(value * (1 / all.sum));
    }
    return out;
}

// The token at `position`, after those before it: what the last layer leaves (n_embd). All that
// tokens learn of each other goes through the layers' keys and values [13].
std::vector<float> forward(Model& model, valar::Token token, size_t position) {
    const valar::ModelSpec& spec = model.spec;
    const float* row = model.token_embd + static_cast<size_t>(token) * spec.n_embd;
    std::vector<float> x(row, row + spec.n_embd);  // (n_embd) the residual stream
    for (float& value : x) value *= spec.embedding_scale;

    for (Layer& layer : model.layers) {
        const valar::LayerSpec& of = layer.spec;
        const size_t n_q = size_t{of.n_heads} * of.head_dim;
        const size_t n_kv = size_t{of.n_kv_heads} * of.head_dim;
        std::vector<float> y = rms_norm(x, layer.attn_norm, spec.norm_eps);     // (n_embd)
        std::vector<float> q = multiply(layer.q, n_q, y, layer.q_bias);         // (n_q)
        std::vector<float> k = multiply(layer.k, n_kv, y, layer.k_bias);        // (n_kv)
        const std::vector<float> v = multiply(layer.v, n_kv, y, layer.v_bias);  // (n_kv)
        rope(q.data(), of.n_heads, of, spec.rope_factors, position);
        rope(k.data(), of.n_kv_heads, of, spec.rope_factors, position);
        layer.keys.insert(layer.keys.end(), k.begin(), k.end());
        layer.values.insert(layer.values.end(), v.begin(), v.end());
        y = multiply(layer.attn_output, spec.n_embd, attention(q, layer, position));
        for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];

        // SwiGLU (https://arxiv.org/abs/2002.05202): down * (silu(gate * y) * (up * y)), with
        // silu(g) = g / (1 + exp(-g)) [8].
        y = rms_norm(x, layer.ffn_norm, spec.norm_eps);
        std::vector<float> h = multiply(layer.gate, of.n_ff, y);       // (n_ff)
        const std::vector<float> up = multiply(layer.up, of.n_ff, y);  // (n_ff)
        for (size_t i = 0; i < h.size(); ++i) h[i] = h[i] / (1.0f + exact_exp(-h[i])) * up[i];
        y = multiply(layer.down, spec.n_embd, h);
        for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    }
    return x;
}

// How well each token of the vocabulary fits next: logits (n_vocab).
std::vector<float> logits_of(const Model& model, const std::vector<float>& x) {
    const std::vector<float> y = rms_norm(x, model.output_norm, model.spec.norm_eps);
    std::vector<float> logits = multiply(model.output, model.spec.n_vocab, y);
    for (float& logit : logits) logit *= model.spec.logit_scale;
    return logits;
}

// Whether the model is one of the plain ones that are computed here: LLaMA and its kin.
bool is_plain(const valar::ModelSpec& spec) {
    const auto plain = [](const valar::LayerSpec& of) {
        return of.attn_norm && of.ffn_norm && !of.post_attn_norm && !of.post_ffn_norm &&
               !of.parallel && of.gated && of.activation == valar::Activation::silu &&
               of.qk_norm == valar::QkNorm::none && !of.output_bias && !of.ffn_bias && !of.sinks &&
               of.soft_cap == 0 && of.temperature == 0 && of.experts.count == 0 &&
               of.rope.dims > 0 && !of.rope.yarn && of.rope.magnitude == 1;
    };
    return spec.norm == valar::NormKind::rms && spec.residual_scale == 1 && spec.soft_cap == 0 &&
           !spec.position_embd && !spec.output_bias && spec.rope_long_factors.empty() &&
           std::all_of(spec.layers.begin(), spec.layers.end(), plain);
}

// The tensors lie in the mapped file; nothing is copied.
valar::Result<Model> open_model(const valar::Gguf& file) {
    auto spec = valar::read_model_spec(file);
    if (!spec) return spec.error();
    if (!is_plain(*spec))
        return valar::Error{
            valar::ErrorKind::unsupported,
            "'" + spec->architecture + "' has operations that this example leaves out"};
    // Each tensor by its name in the file; the first that is missing or no F32 of that size is told.
    std::string fault;
    const auto data = [&](const std::string& name, uint64_t values) -> const float* {
        const valar::TensorInfo* tensor = file.find_tensor(name);
        const bool fits = tensor && tensor->type == valar::TensorType::f32 && !tensor->packed &&
                          tensor->bytes == values * sizeof(float);
        const auto bytes = fits ? file.tensor_bytes(*tensor)
                                : valar::Result<std::span<const std::byte>>(valar::Error{});
        if (!bytes && fault.empty()) fault = name;
        return bytes ? reinterpret_cast<const float*>(bytes->data()) : nullptr;
    };
    const uint64_t n_embd = spec->n_embd, n_vocab = spec->n_vocab;
    Model model{};
    model.token_embd = data("token_embd.weight", n_vocab * n_embd);
    model.output_norm = data("output_norm.weight", n_embd);
    model.output = spec->tied_output ? model.token_embd : data("output.weight", n_vocab * n_embd);
    model.spec = std::move(*spec);
    for (const valar::LayerSpec& layer : model.spec.layers) {
        const std::string blk = "blk." + std::to_string(model.layers.size()) + ".";
        const uint64_t q = uint64_t{layer.n_heads} * layer.head_dim,
                       kv = uint64_t{layer.n_kv_heads} * layer.head_dim, ff = layer.n_ff;
        const bool bias = layer.qkv_bias;
        model.layers.push_back({layer,
                                data(blk + "attn_norm.weight", n_embd),
                                data(blk + "attn_q.weight", q * n_embd),
                                data(blk + "attn_k.weight", kv * n_embd),
                                data(blk + "attn_v.weight", kv * n_embd),
                                bias ? data(blk + "attn_q.bias", q) : nullptr,
                                bias ? data(blk + "attn_k.bias", kv) : nullptr,
                                bias ? data(blk + "attn_v.bias", kv) : nullptr,
                                data(blk + "attn_output.weight", n_embd * q),
                                data(blk + "ffn_norm.weight", n_embd),
                                data(blk + "ffn_gate.weight", ff * n_embd),
                                data(blk + "ffn_up.weight", ff * n_embd),
                                data(blk + "ffn_down.weight", n_embd * ff),
                                {},
                                {}});
    }
    if (!fault.empty())
        return valar::Error{valar::ErrorKind::unsupported,
                            "tensor '" + fault + "' is missing, or not F32 of the right size"};
    return model;
}

void print_likeliest(const std::vector<float>& logits, const valar::Tokenizer& tokenizer) {
    std::vector<valar::Token> best(logits.size());
    std::iota(best.begin(), best.end(), 0);
    const size_t count = std::min<size_t>(5, best.size());
    const auto logit = [&logits](valar::Token token) { return logits[static_cast<size_t>(token)]; };
    std::partial_sort(best.begin(), best.begin() + static_cast<std::ptrdiff_t>(count), best.end(),
                      [&](valar::Token a, valar::Token b) { return logit(a) > logit(b); });
    for (size_t i = 0; i < count; ++i) {
        const std::string text(tokenizer.piece(best[i]));
        std::printf("%9.4f  %6d  '%s'\n", static_cast<double>(logit(best[i])), best[i],
                    text.c_str());
    }
}

bool write_logits(const std::string& path, const std::vector<float>& logits) {
    std::FILE* out = std::fopen(path.c_str(), "wb");
    if (!out) return false;
    const bool written = std::fwrite(logits.data(), 4, logits.size(), out) == logits.size();
    return std::fclose(out) == 0 && written;
}

}  // namespace

int main(int argc, char** argv) {
    std::string path, list, logits_path;
    example::Flags flags("one_token", "The forward pass in plain loops: likely next tokens.");
    flags.add("model", "FILE", &path, "a GGUF file of F32 weights");
    flags.add("tokens", "ID,ID,...", &list, "the text so far");
    flags.add("logits", "FILE", &logits_path, "where all logits go, raw binary32");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto file = valar::Gguf::open(path);
    if (!file) return example::fail(file.error().message);
    auto tokenizer = valar::Tokenizer::open(*file);
    if (!tokenizer) return example::fail(tokenizer.error().message);
    auto model = open_model(*file);
    if (!model) return example::fail(path + ": " + model.error().message);

    std::vector<float> x;  // (n_embd)
    size_t position = 0;
    for (size_t at = 0; at < list.size(); ++position) {
        const size_t end = std::min(list.find(',', at), list.size());
        uint32_t token = 0;
        if (!example::read_value(list.substr(at, end - at), &token) || token >= model->spec.n_vocab)
            return example::fail("--tokens: '" + list.substr(at, end - at) + "' is no token");
        x = forward(*model, static_cast<valar::Token>(token), position);
        at = end + 1;
    }
    if (x.empty()) return example::fail("no text: pass --tokens ID,ID,...");
    const std::vector<float> logits = logits_of(*model, x);
    print_likeliest(logits, *tokenizer);
    if (!logits_path.empty() && !write_logits(logits_path, logits))
        return example::fail(logits_path + ": cannot be written");
    return 0;
}

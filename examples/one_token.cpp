// one_token: a transformer's whole forward pass in plain loops, to be read from top to bottom.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/one_token.cpp -o one_token
//     ./one_token --model F32.gguf --tokens 1,2,3
//
// It takes the ids of a text and says which five tokens are the likeliest to come next. It is slow
// and it reads weights of F32, F16 and BF16 only; its logits are those of the Engine with
// KvType::f32, bit for bit, because it does the same operations in the same order: those of the
// numeric definition ("The numeric definition" in valar.hpp, whose numbers stand in brackets here).
//
// It runs every architecture that valar runs. To read it for the first time, follow LLaMA's way
// through it: multiply, rms_norm, rope, attention, hidden, feed_forward, forward, logits_of. The
// rest is what other families do differently; LayerSpec (>>model) says which layer does what.
//
// Shapes are written (rows, columns), a row's values being neighbours in memory.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

using valar::exact_exp;
using valar::exact_fma;
using Values = std::vector<float>;  // empty where a model has no such thing

constexpr size_t kSegment = 256;  // positions that attention takes at a time

struct Norm {
    Values weight, bias;  // (values of what is normed)
};

// A network of two layers between which the activation stands.
struct Network {
    Values gate, up;            // (n_ff, n_embd)
    Values gate_bias, up_bias;  // (n_ff)
    Values down;                // (n_embd, n_ff)
    Values down_bias;           // (n_embd)
};

struct Layer {
    valar::LayerSpec spec;
    Norm attn_norm;                   // (n_embd)
    Values q;                         // (n_heads * head_dim, n_embd)
    Values k, v;                      // (n_kv_heads * head_dim, n_embd)
    Values q_bias, k_bias, v_bias;    // (their rows)
    Values q_norm, k_norm;            // (head_dim), or (rows of q, of k)
    std::vector<double> frequencies;  // (rope.dims / 2) of the pairs of a head
    Values sinks;                     // (n_heads)
    Values attn_output;               // (n_embd, n_heads * head_dim)
    Values attn_output_bias;          // (n_embd)
    Norm post_attn_norm;              // (n_embd)
    Norm ffn_norm;                    // (n_embd)
    Network network;                  // all tokens take it
    Values shared_gate;               // (n_embd) how much of it, in some models with experts
    Values router;                    // (experts, n_embd)
    Values router_bias;               // (experts)
    Values choice_bias;               // (experts)
    std::vector<Network> experts;     // each token takes some of these
    Norm post_ffn_norm;               // (n_embd)
    Values keys, values;              // (positions so far, n_kv_heads * head_dim)
};

struct Model {
    valar::ModelSpec spec;
    Values token_embd;     // (n_vocab, n_embd)
    Values position_embd;  // (n_context, n_embd)
    std::vector<Layer> layers;
    Norm output_norm;    // (n_embd)
    Values output;       // (n_vocab, n_embd), or empty: token_embd
    Values output_bias;  // (n_vocab)
};

// ---- Sums and products -----------------------------------------------------------------------

// A product that is rounded before it meets a sum: compilers may not fuse the two.
template <class Real>
Real product(Real a, Real b) {
    volatile Real rounded = a * b;
    return rounded;
}

// sum += values; a sum that is empty becomes them, values that are empty add nothing.
void add(Values& sum, const Values& values) {
    if (sum.empty()) sum = values;
    else
        for (size_t i = 0; i < values.size(); ++i) sum[i] += values[i];
}

void scale(Values& x, float factor) {
    for (float& value : x) value *= factor;
}

// y (rows) = matrix (rows, x.size()) * x + bias (rows) [3, 4].
Values multiply(const Values& matrix, const Values& x, const Values& bias = {}) {
    Values y(matrix.size() / x.size());
    const float* weight = matrix.data();
    for (float& sum : y)
        for (const float value : x) sum = exact_fma(*weight++, value, sum);
    add(y, bias);
    return y;
}

// A long sum has sixteen running sums, added pair by pair at the end, so that machines with vectors
// of 4, 8 or 16 numbers can all do it in the same order [5].
float sum_of_lanes(float* lanes) {  // (16)
    for (size_t half = 8; half > 0; half /= 2)
        for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// ---- Norms -----------------------------------------------------------------------------------

// RMSNorm (https://arxiv.org/abs/1910.07467): x_i = x_i / sqrt(mean of x^2 + eps) * weight_i [6].
void rms_norm(float* x, size_t n, const float* weight, float eps) {
    float lanes[16] = {};
    for (size_t i = 0; i < n; ++i) lanes[i % 16] = exact_fma(x[i], x[i], lanes[i % 16]);
    const float factor = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    for (size_t i = 0; i < n; ++i) x[i] = (x[i] * factor) * weight[i];
}

// LayerNorm (https://arxiv.org/abs/1607.06450): x_i = (x_i - mean of x) / sqrt(variance of x + eps)
// * weight_i [14].
void layer_norm(float* x, size_t n, const float* weight, float eps) {
    float lanes[16] = {};
    for (size_t i = 0; i < n; ++i) lanes[i % 16] += x[i];
    const float mean = sum_of_lanes(lanes) / static_cast<float>(n);
    std::fill(lanes, lanes + 16, 0.0f);
    for (size_t i = 0; i < n; ++i) x[i] -= mean;
    for (size_t i = 0; i < n; ++i) lanes[i % 16] = exact_fma(x[i], x[i], lanes[i % 16]);
    const float factor = 1.0f / std::sqrt(sum_of_lanes(lanes) / static_cast<float>(n) + eps);
    for (size_t i = 0; i < n; ++i) x[i] = (x[i] * factor) * weight[i];
}

// The model's kind of norm. A place without one leaves x as it is.
Values normed(Values x, const Norm& norm, const valar::ModelSpec& spec) {
    if (norm.weight.empty()) return x;
    const bool by_layer = spec.norm == valar::NormKind::layer;
    (by_layer ? layer_norm : rms_norm)(x.data(), x.size(), norm.weight.data(), spec.norm_eps);
    add(x, norm.bias);
    return x;
}

// Norms of queries and keys keep their products in bounds (https://arxiv.org/abs/2010.04245): of
// each head by itself, or of all heads of a token together [17].
void norm_heads(Values& x, const Values& weight, const valar::LayerSpec& of, float eps) {
    const size_t n = of.qk_norm == valar::QkNorm::row ? x.size() : of.head_dim;
    for (size_t at = 0; at < x.size(); at += n)
        if (of.qk_norm == valar::QkNorm::own) layer_norm(&x[at], n, &weight[at], eps);
        else rms_norm(&x[at], n, weight.data(), eps);
}

// ---- Positions -------------------------------------------------------------------------------

// How far each pair turns from one position to the next. For texts longer than those that a model was
// trained on first the angles are stretched: all alike, each by a factor of its own, or, YaRN
// (https://arxiv.org/abs/2309.00071), the slow ones in full, the fast ones not at all [9, 17].
std::vector<double> rope_frequencies(const valar::RopeSpec& how, const Values& factors) {
    const double log2_base = valar::exact_log2(static_cast<double>(how.base));
    const double stretch = static_cast<double>(how.scale);
    std::vector<double> out(how.dims / 2);
    for (size_t i = 0; i < out.size(); ++i) {
        const double pair = static_cast<double>(i);
        double& frequency = out[i] = valar::exact_exp2(-(2.0 * pair / how.dims) * log2_base);
        if (how.yarn) {
            const double begin = static_cast<double>(how.ramp_begin),
                         end = static_cast<double>(how.ramp_end);
            const double share = std::clamp((pair - begin) / (end - begin), 0.0, 1.0);
            frequency = product(frequency * stretch, share) + product(frequency, 1 - share);
        } else {
            frequency *= stretch;
        }
        if (!factors.empty()) frequency /= static_cast<double>(factors[i]);
    }
    return out;
}

// RoPE (https://arxiv.org/abs/2104.09864) says where a token stands: pair i of every head's values
// is turned by the angle position * base^(-2i / dims), so that the product of a query and a key
// depends on their distance only [9].
void rope(Values& x, const Layer& layer, size_t position) {  // x (heads, head_dim)
    const valar::RopeSpec& how = layer.spec.rope;
    const bool neox = how.kind == valar::RopeKind::neox;
    const double magnitude = static_cast<double>(how.magnitude);
    for (size_t i = 0; i < how.dims / 2; ++i) {
        double sine, cosine;
        valar::exact_sincos(static_cast<double>(position) * layer.frequencies[i], &sine, &cosine);
        const float s = static_cast<float>(sine * magnitude),
                    c = static_cast<float>(cosine * magnitude);
        for (size_t head = 0; head < x.size(); head += layer.spec.head_dim) {
            float* first = &x[head + (neox ? i : 2 * i)];
            float* second = neox ? first + how.dims / 2 : first + 1;
            const float a = *first, b = *second;
            *first = exact_fma(a, c, -(b * s));
            *second = exact_fma(a, s, b * c);
        }
    }
}

// What scores are multiplied by. A temperature that grows with the position keeps attention to a
// long text from spreading too thin (https://arxiv.org/abs/2501.19399) [17].
float attention_scale(const valar::LayerSpec& of, size_t position) {
    if (of.temperature == 0) return of.attention_scale;
    const double times = static_cast<double>(1 + position / of.temperature_length);
    const double log = product(valar::exact_log2(times), 0x1.62e42fefa39efp-1);  // [12]
    const double warmer = 1 + product(static_cast<double>(of.temperature), log);
    return static_cast<float>(static_cast<double>(of.attention_scale) * warmer);
}

// ---- Attention -------------------------------------------------------------------------------

// cap * tanh(x / cap), so that no number is larger than the cap (https://arxiv.org/abs/2408.00118)
// [15].
float soft_cap(float x, float cap) {
    if (cap == 0) return x;
    const float u = x / cap;
    return cap * (1.0f - 2.0f / (exact_exp(u + u) + 1.0f));
}

// What a head gathered from some positions: exp(score - max) weighs a position's values, `sum` is
// the sum of the weights, out (head_dim) the weighted sum of the values.
struct Gathered {
    float max = 0, sum = 0;
    Values out;
};

// Attention to positions begin .. end - 1 of one segment; q (head_dim), keys and values of one head
// of all positions, `stride` apart [10].
Gathered attend(const float* q, const float* keys, const float* values, size_t stride,
                const valar::LayerSpec& of, size_t begin, size_t end) {
    Values weights(end - begin);  // of the positions; scores at first
    for (size_t j = begin; j < end; ++j) {
        float& score = weights[j - begin];
        for (size_t e = 0; e < of.head_dim; ++e)
            score = exact_fma(q[e], keys[j * stride + e], score);
        score = soft_cap(score, of.soft_cap);
    }
    Gathered all;
    all.max = *std::max_element(weights.begin(), weights.end()) + 0.0f;  // -0 becomes 0
    float lanes[16] = {};
    for (size_t j = begin; j < end; ++j) {
        weights[j - begin] = exact_exp(weights[j - begin] - all.max);
        lanes[j % 16] += weights[j - begin];
    }
    all.sum = sum_of_lanes(lanes);
    all.out.resize(of.head_dim);
    for (size_t j = begin; j < end; ++j)
        for (size_t e = 0; e < of.head_dim; ++e)
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
// with a window sees the last positions only (https://arxiv.org/abs/2004.05150). A sink is one more
// score, which takes weight and gives nothing (https://arxiv.org/abs/2309.17453) [17].
Values attention(const Values& q, const Layer& layer, size_t position) {
    const valar::LayerSpec& of = layer.spec;
    const size_t dim = of.head_dim, stride = of.n_kv_heads * dim;
    const size_t first = of.window && position >= of.window ? position - of.window + 1 : 0;
    Values out;  // (n_heads, head_dim)
    for (size_t head = 0; head < of.n_heads; ++head) {
        const size_t kv_head = head / (of.n_heads / of.n_kv_heads);
        Gathered all;
        for (size_t begin = first, end; begin <= position; begin = end) {
            end = std::min((begin / kSegment + 1) * kSegment, position + 1);
            const Gathered next = attend(&q[head * dim], &layer.keys[kv_head * dim],
                                         &layer.values[kv_head * dim], stride, of, begin, end);
            if (begin == first) all = next;
            else merge(all, next);
        }
        if (of.sinks) merge(all, {layer.sinks[head], 1, Values(dim)});
        for (const float value : all.out) out.push_back(value * (1 / all.sum));
    }
    return out;
}

// The query, key and value of y (n_embd), which the token at `position` left; the key and value stay
// for the tokens to come. All that tokens learn of each other goes through these [13].
Values attend_from(Layer& layer, const Values& y, float eps, size_t position) {
    const valar::LayerSpec& of = layer.spec;
    Values q = multiply(layer.q, y, layer.q_bias);        // (n_heads * head_dim)
    Values k = multiply(layer.k, y, layer.k_bias);        // (n_kv_heads * head_dim)
    const Values v = multiply(layer.v, y, layer.v_bias);  // (n_kv_heads * head_dim)
    const auto norm_both = [&] {
        norm_heads(q, layer.q_norm, of, eps);
        norm_heads(k, layer.k_norm, of, eps);
    };
    const bool norms = of.qk_norm != valar::QkNorm::none;
    if (norms && !of.qk_norm_after_rope) norm_both();
    rope(q, layer, position);
    rope(k, layer, position);
    if (norms && of.qk_norm_after_rope) norm_both();
    scale(q, attention_scale(of, position));
    layer.keys.insert(layer.keys.end(), k.begin(), k.end());
    layer.values.insert(layer.values.end(), v.begin(), v.end());
    return attention(q, layer, position);
}

// ---- Feed-forward networks -------------------------------------------------------------------

float sigmoid(float x) { return 1.0f / (1.0f + exact_exp(-x)); }

// The activations, which make a network more than a matrix [8, 16].
float silu(float x) { return x / (1.0f + exact_exp(-x)); }  // https://arxiv.org/abs/1702.03118

// GELU (https://arxiv.org/abs/1606.08415): x times the share of the normal distribution below x; by
// tanh, whose (1 + tanh(z)) / 2 is a sigmoid; and by Abramowitz and Stegun's formula 7.1.26.
float gelu_tanh(float x) {
    return x / (1.0f + exact_exp(-(x * exact_fma(x * x, 0x1.2444f2p-4f, 0x1.988454p+0f))));
}
float gelu(float x) {
    const float a = std::fabs(x) * 0x1.6a09e6p-1f, t = 1.0f / exact_fma(0.3275911f, a, 1.0f);
    float p = 0;
    for (const float c : {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        p = exact_fma(p, t, c);
    const float tail = product((t * p) * exact_exp(-(a * a)), 0.5f);
    return x * (x < 0 ? tail : 1.0f - tail);
}
float relu_squared(float x) {  // https://arxiv.org/abs/2109.08668
    return x > 0 ? x * x : 0;
}
float xielu(float x, const valar::ActivationSpec& of) {  // https://arxiv.org/abs/2411.13010
    const float bent = x > 0 ? product(of.positive * x, x)
                             : product(exact_exp(std::min(x, of.most)) - 1.0f - x, of.negative);
    return bent + product(of.linear, x);
}

float activate(float x, const valar::LayerSpec& of) {
    switch (of.activation) {
        case valar::Activation::gelu: return gelu(x);
        case valar::Activation::gelu_tanh: return gelu_tanh(x);
        case valar::Activation::relu_squared: return relu_squared(x);
        case valar::Activation::xielu: return xielu(x, of.bend);
        default: return silu(x);
    }
}

// Of gpt-oss (https://arxiv.org/abs/2508.10925): SwiGLU whose numbers are kept in bounds.
float clamped_swiglu(float gate, float up) {
    const float g = std::min(gate, 7.0f), u = std::clamp(up, -7.0f, 7.0f);
    return (u + 1.0f) * (g / (1.0f + exact_exp(-(g * 1.702f))));
}

// The values between a network's layers, h (n_ff) = act(gate * y) * (up * y); with silu that is
// SwiGLU (https://arxiv.org/abs/2002.05202). Without a gate, act(up * y).
Values hidden(const Network& of, const valar::LayerSpec& spec, const Values& y) {
    const Values up = multiply(of.up, y, of.up_bias);
    if (!spec.gated) {
        Values h = up;
        for (float& value : h) value = activate(value, spec);
        return h;
    }
    Values h = multiply(of.gate, y, of.gate_bias);
    for (size_t i = 0; i < h.size(); ++i)
        h[i] = spec.activation == valar::Activation::silu_clamped ? clamped_swiglu(h[i], up[i])
                                                                  : activate(h[i], spec) * up[i];
    return h;
}

// The `count` numbers of `among` with the largest scores, best first, the lower of equal ones.
std::vector<size_t> best_of(const Values& scores, std::vector<size_t> among, size_t count) {
    std::stable_sort(among.begin(), among.end(),
                     [&](size_t a, size_t b) { return scores[a] > scores[b]; });
    among.resize(count);
    return among;
}

void softmax(Values& x) {
    const float most = *std::max_element(x.begin(), x.end());
    float lanes[16] = {};
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = exact_exp(x[i] - most);
        lanes[i % 16] += x[i];
    }
    const float sum = sum_of_lanes(lanes);
    for (float& value : x) value /= sum;
}

// Experts that may be picked: some models first choose groups, by the two best of each
// (https://arxiv.org/abs/2412.19437) [18].
std::vector<size_t> open_experts(const valar::ExpertSpec& of, const Values& scores) {
    const size_t size = of.count / of.groups;
    Values sums;
    std::vector<size_t> groups(of.groups), own(size), experts;
    std::iota(groups.begin(), groups.end(), size_t{0});
    for (const size_t group : groups) {
        std::iota(own.begin(), own.end(), group * size);
        float& sum = sums.emplace_back(0.0f);
        for (const size_t expert : best_of(scores, own, std::min<size_t>(size, 2)))
            sum += scores[expert];
    }
    groups = best_of(sums, groups, of.groups_used);
    std::sort(groups.begin(), groups.end());
    for (const size_t group : groups)
        for (size_t i = 0; i < size; ++i) experts.push_back(group * size + i);
    return experts;
}

// A mixture of experts (https://arxiv.org/abs/1701.06538): the router gives each expert a weight, and
// the outputs of the best ones are added by their weights, best first. A bias of the choice keeps all
// experts in use and is in no weight (https://arxiv.org/abs/2408.15664) [18].
Values mixture(const Layer& layer, const Values& y) {
    const valar::ExpertSpec& of = layer.spec.experts;
    Values weights = multiply(layer.router, y, layer.router_bias);  // (experts)
    if (of.sigmoid)
        for (float& weight : weights) weight = sigmoid(weight);
    else softmax(weights);
    Values scores = weights;
    add(scores, layer.choice_bias);
    const std::vector<size_t> picked = best_of(scores, open_experts(of, scores), of.used);
    float total = 0;
    for (const size_t expert : picked) total += weights[expert];
    Values sum;  // (n_embd)
    for (const size_t expert : picked) {
        const Network& network = layer.experts[expert];
        const Values out = multiply(network.down, hidden(network, layer.spec, y),
                                    network.down_bias);
        float weight = of.normalized ? weights[expert] / total : weights[expert];
        weight *= of.scale;
        if (sum.empty())
            for (const float value : out) sum.push_back(weight * value);
        else
            for (size_t i = 0; i < sum.size(); ++i) sum[i] = exact_fma(weight, out[i], sum[i]);
    }
    return sum;
}

// ---- The model -------------------------------------------------------------------------------

// Where what is added to x has a norm or scale of its own, it is gathered apart and added here.
void add_normed(const valar::ModelSpec& spec, Values& x, const Values& apart, const Norm& norm) {
    Values z = normed(apart, norm, spec);
    scale(z, spec.residual_scale);
    add(x, z);
}

// x += the network of norm(x), or the experts' sum, or both.
void feed_forward(const valar::ModelSpec& spec, const Layer& layer, Values& x) {
    const valar::LayerSpec& of = layer.spec;
    const bool is_apart = of.post_ffn_norm || spec.residual_scale != 1;
    const Values y = normed(x, layer.ffn_norm, spec);
    Values apart;
    Values& sum = is_apart ? apart : x;
    if (of.experts.count) add(sum, mixture(layer, y));
    if (!layer.network.down.empty()) {
        Values h = hidden(layer.network, of, y);
        if (of.experts.shared_gate) scale(h, sigmoid(multiply(layer.shared_gate, y)[0]));
        add(sum, multiply(layer.network.down, h));
        add(sum, layer.network.down_bias);
    }
    if (is_apart) add_normed(spec, x, apart, layer.post_ffn_norm);
}

// The token at `position`, after those before it: what the last layer leaves (n_embd) [13].
Values forward(Model& model, valar::Token token, size_t position) {
    const valar::ModelSpec& spec = model.spec;
    const auto row = [&](const Values& matrix, size_t number) {
        const float* values = matrix.data() + number * spec.n_embd;
        return Values(values, values + spec.n_embd);
    };
    Values x = row(model.token_embd, static_cast<size_t>(token));  // (n_embd) the residual stream
    scale(x, spec.embedding_scale);
    if (spec.position_embd) add(x, row(model.position_embd, position));

    for (Layer& layer : model.layers) {
        const valar::LayerSpec& of = layer.spec;
        // In a parallel layer (GPT-J's) attention and network read the same x.
        const bool is_apart = of.parallel || of.post_attn_norm || spec.residual_scale != 1;
        const Values attended = attend_from(layer, normed(x, layer.attn_norm, spec), spec.norm_eps,
                                            position);  // (n_heads * head_dim)
        Values apart;
        Values& sum = is_apart ? apart : x;
        add(sum, multiply(layer.attn_output, attended));
        add(sum, layer.attn_output_bias);
        if (is_apart && !of.parallel) add_normed(spec, x, apart, layer.post_attn_norm);
        feed_forward(spec, layer, x);
        if (of.parallel) add_normed(spec, x, apart, layer.post_attn_norm);
    }
    return x;
}

// How well each token of the vocabulary fits next: logits (n_vocab).
Values logits_of(const Model& model, const Values& x) {
    const Values& output = model.spec.tied_output ? model.token_embd : model.output;
    Values logits = multiply(output, normed(x, model.output_norm, model.spec), model.output_bias);
    scale(logits, model.spec.logit_scale);
    for (float& logit : logits) logit = soft_cap(logit, model.spec.soft_cap);
    return logits;
}

// ---- Reading the file ------------------------------------------------------------------------

// Takes tensors by name. The first that is missing, or not of its size and of F32, F16 or BF16, is
// kept in `fault`.
struct Tensors {
    const valar::Gguf& file;
    std::string prefix = {};  // of the names that are asked for
    std::string fault = {};

    bool has(const std::string& name) const { return file.find_tensor(prefix + name); }

    // `count` values from the value `first` on, of a tensor that has `size` values.
    Values part(const std::string& name, uint64_t first, uint64_t count, uint64_t size) {
        const valar::TensorInfo* tensor = file.find_tensor(prefix + name);
        const uint64_t width = tensor && tensor->type == valar::TensorType::f32 ? 4 : 2;
        const bool fits = tensor && valar::type_info(tensor->type)->block_size == 1 &&
                          valar::can_compute(tensor->type) && !tensor->packed &&
                          tensor->bytes == size * width;
        const auto bytes = fits ? file.tensor_bytes(*tensor)
                                : valar::Result<std::span<const std::byte>>(valar::Error{});
        if (!bytes) {
            if (fault.empty()) fault = prefix + name;
            return {};
        }
        Values values(count);
        if (!valar::dequantize(tensor->type, bytes->subspan(first * width, count * width), values))
            fault = prefix + name;
        return values;
    }
    Values all(const std::string& name, uint64_t count) { return part(name, 0, count, count); }
    Values all_if(bool wanted, const std::string& name, uint64_t count) {
        return wanted ? all(name, count) : Values();
    }
    Norm norm(const std::string& name, const valar::ModelSpec& spec) {
        return {all(name + ".weight", spec.n_embd),
                all_if(spec.norm_bias, name + ".bias", spec.n_embd)};
    }
    // Some files have queries, keys and values below one another in one tensor.
    void read_qkv(const std::string& kind, uint64_t q, uint64_t kv, Values& q_out, Values& k_out,
                  Values& v_out) {
        if (has("attn_q." + kind)) {
            q_out = all("attn_q." + kind, q);
            k_out = all("attn_k." + kind, kv);
            v_out = all("attn_v." + kind, kv);
        } else {
            q_out = part("attn_qkv." + kind, 0, q, q + 2 * kv);
            k_out = part("attn_qkv." + kind, q, kv, q + 2 * kv);
            v_out = part("attn_qkv." + kind, q + kv, kv, q + 2 * kv);
        }
    }
};

void read_norms(Tensors& in, const valar::ModelSpec& spec, Layer& layer) {
    const valar::LayerSpec& of = layer.spec;
    // Falcon's first norm is the network's where it has two.
    const bool two = in.has("attn_norm_2.weight");
    if (of.attn_norm) layer.attn_norm = in.norm(two ? "attn_norm_2" : "attn_norm", spec);
    if (of.ffn_norm)
        layer.ffn_norm = in.norm(two                         ? "attn_norm"
                                 : in.has("ffn_norm.weight") ? "ffn_norm"
                                                             : "post_attention_norm",
                                 spec);
    else if (of.parallel) layer.ffn_norm = layer.attn_norm;
    if (of.post_attn_norm)
        layer.post_attn_norm.weight = in.all("post_attention_norm.weight", spec.n_embd);
    if (of.post_ffn_norm) layer.post_ffn_norm.weight = in.all("post_ffw_norm.weight", spec.n_embd);
}

void read_attention(Tensors& in, uint64_t n_embd, Layer& layer) {
    const valar::LayerSpec& of = layer.spec;
    const uint64_t q = uint64_t{of.n_heads} * of.head_dim,
                   kv = uint64_t{of.n_kv_heads} * of.head_dim;
    const bool norms = of.qk_norm != valar::QkNorm::none,
               shared = of.qk_norm == valar::QkNorm::head;  // by all heads
    in.read_qkv("weight", q * n_embd, kv * n_embd, layer.q, layer.k, layer.v);
    if (of.qkv_bias) in.read_qkv("bias", q, kv, layer.q_bias, layer.k_bias, layer.v_bias);
    layer.q_norm = in.all_if(norms, "attn_q_norm.weight", shared ? of.head_dim : q);
    layer.k_norm = in.all_if(norms, "attn_k_norm.weight", shared ? of.head_dim : kv);
    layer.sinks = in.all_if(of.sinks, "attn_sinks.weight", of.n_heads);
    layer.attn_output = in.all("attn_output.weight", n_embd * q);
    layer.attn_output_bias = in.all_if(of.output_bias, "attn_output.bias", n_embd);
}

void read_network(Tensors& in, uint64_t n_embd, Layer& layer) {
    const valar::LayerSpec& of = layer.spec;
    const uint64_t ff = of.n_ff, size = ff * n_embd;
    const std::string kind = of.experts.count ? "_shexp.weight" : ".weight";
    Network& out = layer.network;
    if (of.gated && !in.has("ffn_gate" + kind)) {  // above up, in its tensor
        out.gate = in.part("ffn_up" + kind, 0, size, 2 * size);
        out.up = in.part("ffn_up" + kind, size, size, 2 * size);
    } else {
        out.gate = in.all_if(of.gated, "ffn_gate" + kind, size);
        out.up = in.all("ffn_up" + kind, size);
    }
    out.down = in.all("ffn_down" + kind, size);
    out.gate_bias = in.all_if(of.ffn_bias && of.gated, "ffn_gate.bias", ff);
    out.up_bias = in.all_if(of.ffn_bias, "ffn_up.bias", ff);
    out.down_bias = in.all_if(of.ffn_bias, "ffn_down.bias", n_embd);
}

void read_experts(Tensors& in, uint64_t n_embd, Layer& layer) {
    const valar::ExpertSpec& of = layer.spec.experts;
    const uint64_t count = of.count, ff = of.n_ff, size = ff * n_embd;
    layer.router = in.all("ffn_gate_inp.weight", count * n_embd);
    layer.router_bias = in.all_if(of.router_bias, "ffn_gate_inp.bias", count);
    layer.choice_bias = in.all_if(of.choice_bias, "exp_probs_b.bias", count);
    layer.shared_gate = in.all_if(of.shared_gate, "ffn_gate_inp_shexp.weight", n_embd);
    for (uint64_t i = 0; i < count && in.fault.empty(); ++i) {
        Network& out = layer.experts.emplace_back();
        out.gate = in.part("ffn_gate_exps.weight", i * size, size, count * size);
        out.up = in.part("ffn_up_exps.weight", i * size, size, count * size);
        out.down = in.part("ffn_down_exps.weight", i * size, size, count * size);
        if (!of.bias) continue;
        out.gate_bias = in.part("ffn_gate_exps.bias", i * ff, ff, count * ff);
        out.up_bias = in.part("ffn_up_exps.bias", i * ff, ff, count * ff);
        out.down_bias = in.part("ffn_down_exps.bias", i * n_embd, n_embd, count * n_embd);
    }
}

// The whole model, as binary32, for a text of so many tokens.
valar::Result<Model> open_model(const valar::Gguf& file, size_t n_tokens) {
    auto spec = valar::read_model_spec(file);
    if (!spec) return spec.error();
    const uint64_t n_embd = spec->n_embd, n_vocab = spec->n_vocab, n_context = spec->n_context;
    if (spec->position_embd && n_tokens > n_context)
        return valar::Error{valar::ErrorKind::unsupported, "the text is longer than its context"};
    Tensors in{file};
    Model model{};
    model.token_embd = in.all("token_embd.weight", n_vocab * n_embd);
    model.position_embd = in.all_if(spec->position_embd, "position_embd.weight",
                                    n_context * n_embd);
    model.output_norm = in.norm("output_norm", *spec);
    model.output = in.all_if(!spec->tied_output, "output.weight", n_vocab * n_embd);
    model.output_bias = in.all_if(spec->output_bias, "output.bias", n_vocab);
    // LongRoPE (https://arxiv.org/abs/2402.13753) has other factors for long texts.
    const bool is_long = n_tokens > spec->n_rope_context && !spec->rope_long_factors.empty();
    const Values& factors = is_long ? spec->rope_long_factors : spec->rope_factors;
    for (const valar::LayerSpec& of : spec->layers) {
        in.prefix = "blk." + std::to_string(model.layers.size()) + ".";
        Layer& layer = model.layers.emplace_back();
        layer.spec = of;
        layer.frequencies = rope_frequencies(of.rope, factors);
        read_norms(in, *spec, layer);
        read_attention(in, n_embd, layer);
        if (of.experts.count) read_experts(in, n_embd, layer);
        if (of.n_ff) read_network(in, n_embd, layer);
    }
    model.spec = std::move(*spec);
    if (!in.fault.empty())
        return valar::Error{
            valar::ErrorKind::unsupported,
            "tensor '" + in.fault + "' is missing, or not F32, F16 or BF16 of the right size"};
    return model;
}

void print_likeliest(const Values& logits, const valar::Tokenizer& tokenizer) {
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

bool write_logits(const std::string& path, const Values& logits) {
    std::FILE* out = std::fopen(path.c_str(), "wb");
    if (!out) return false;
    const bool written = std::fwrite(logits.data(), 4, logits.size(), out) == logits.size();
    return std::fclose(out) == 0 && written;
}

}  // namespace

int main(int argc, char** argv) {
    std::string path, list, logits_path;
    example::Flags flags("one_token", "The forward pass in plain loops: likely next tokens.");
    flags.add("model", "FILE", &path, "a GGUF file of F32, F16 or BF16 weights");
    flags.add("tokens", "ID,ID,...", &list, "the text so far");
    flags.add("logits", "FILE", &logits_path, "where all logits go, raw binary32");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto file = valar::Gguf::open(path);
    if (!file) return example::fail(file.error().message);
    auto tokenizer = valar::Tokenizer::open(*file);
    if (!tokenizer) return example::fail(tokenizer.error().message);
    auto model = open_model(*file,
                            1 + static_cast<size_t>(std::count(list.begin(), list.end(), ',')));
    if (!model) return example::fail(path + ": " + model.error().message);

    Values x;  // (n_embd)
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
    const Values logits = logits_of(*model, x);
    print_likeliest(logits, *tokenizer);
    if (!logits_path.empty() && !write_logits(logits_path, logits))
        return example::fail(logits_path + ": cannot be written");
    return 0;
}

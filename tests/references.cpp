// Tiny models of every architecture against the class of PyPI's transformers: data/references,
// made by make_references.py. Nothing here or there was written by who wrote the library's layers.
#include <doctest/doctest.h>

#include "base/internal.hpp"
#include "run_model.hpp"

#include <cmath>
#include <cstring>
#include <functional>
#include <string>

using namespace run_model;

namespace {

using Bytes = std::vector<std::byte>;

constexpr size_t kPositions = 64;

constexpr const char* references[] = {
    "apertus",        "bailingmoe2",  "cohere2",     "command-r",     "command-r-plus",
    "ernie4_5",       "ernie4_5-moe", "exaone4",     "exaone4-full",  "falcon",
    "falcon-40b",     "gemma",        "gemma2",      "gemma2-27b",    "gemma3",
    "glm4",           "glm4moe",      "gpt-oss",     "gpt2",          "gptneox",
    "gptneox-serial", "granite",      "granitemoe",  "hunyuan-dense", "internlm2",
    "llama",          "llama-linear", "llama-rope3", "llama-yarn",    "minicpm",
    "minimax-m2",     "mistral",      "mistral3",    "mixtral",       "nemotron",
    "olmo2",          "olmo3",        "olmoe",       "phi2",          "phi3",
    "phi3-short",     "phi4-mini",    "qwen2",       "qwen2moe",      "qwen3",
    "qwen3moe",       "seed_oss",     "smollm3",     "stablelm",      "stablelm-parallel",
    "starcoder2",
};

std::string path_of(const std::string& name, const char* suffix) {
    return VALAR_SOURCE_DIR "/tests/data/references/" + name + suffix;
}

std::vector<float> expected_logits(const std::string& name) {
    auto bytes = detail::read_file(path_of(name, ".logits"), 1 << 24);
    REQUIRE_MESSAGE(bytes, bytes.error().message);
    std::vector<float> out(bytes->size() / sizeof(float));
    std::memcpy(out.data(), bytes->data(), out.size() * sizeof(float));
    return out;
}

float half_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25)
                                : std::ldexp(float(fraction), -24);
    return half >> 15 ? -size : size;
}

/// The same file with F32 matrices: their values are exact in both.
Bytes widened(const std::string& name) {
    auto gguf = Gguf::open(path_of(name, ".gguf"));
    REQUIRE_MESSAGE(gguf, gguf.error().message);
    GgufWriter writer;
    std::vector<std::vector<float>> kept;  // the writer borrows them
    for (const GgufKey& key : gguf->keys()) writer.set(key);
    for (const TensorInfo& tensor : gguf->tensors()) {
        const std::span<const uint64_t> dims(tensor.dims, tensor.n_dims);
        const auto bytes = *gguf->tensor_bytes(tensor);
        if (tensor.type != TensorType::f16) {
            writer.add_tensor(tensor.name, tensor.type, dims, bytes);
            continue;
        }
        auto& values = kept.emplace_back(bytes.size() / 2);
        for (size_t i = 0; i < values.size(); ++i) {
            uint16_t half;
            std::memcpy(&half, bytes.data() + 2 * i, 2);
            values[i] = half_to_float(half);
        }
        writer.add_tensor(tensor.name, TensorType::f32, dims, std::as_bytes(std::span(values)));
    }
    auto out = writer.to_bytes();
    REQUIRE_MESSAGE(out, out.error().message);
    return *out;
}

/// `apart`: pages of their own for layers with windows.
Result<Model> open(Result<Gguf> file, bool apart) {
    BackendOptions options;
    options.kv_type = KvType::f32;
    options.kv_pages = kPositions / 16;
    options.window_pages = apart ? kPositions / 16 : 0;
    options.max_logit_rows = options.max_batch_rows;
    options.threads = 0;
    return Model::open(std::move(file), options);
}

/// Logits of the positions from `first` on, of a text of `count`; the ids in batches of `piece`.
std::vector<float> logits_from(Model& model, size_t first, size_t count, size_t piece) {
    std::vector<Token> ids(count);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = Token((i * 37 + 11) % model.spec->n_vocab);
    const auto pages = page_list(0, kPositions / 16, true);
    auto window_pages = page_list(kPositions / 16, kPositions / 16);
    uint32_t widest = 0;
    for (const LayerSpec& layer : model.spec->layers) widest = std::max(widest, layer.window);
    std::vector<float> out;
    for (size_t at = 0; at < ids.size(); at += piece) {
        const auto part = std::span(ids).subspan(at, std::min(piece, ids.size() - at));
        for (size_t i = 0; (i + 1) * 16 + widest <= at + 1; ++i) window_pages[i] = UINT32_MAX;
        auto rows = make_rows(part, uint32_t(at), pages, true);
        for (BatchRow& row : rows) {
            row.window_pages = window_pages.data();
            row.long_rope = count > model.spec->n_rope_context;
        }
        auto ran = model.run(rows);
        REQUIRE_MESSAGE(ran, ran.error().message);
        for (uint32_t row = 0; row < rows.size(); ++row) {
            const auto logits = model.logits(row);
            if (at + row >= first) out.insert(out.end(), logits.begin(), logits.end());
        }
    }
    return out;
}

/// Of all positions, each as the last of its text: a short one has rope factors of its own.
std::vector<float> all_logits(Model& model, size_t piece) {
    const size_t shorter = std::min<size_t>(kPositions, detail::short_rope_tokens(*model.spec));
    auto out = logits_from(model, 0, shorter, piece);
    if (shorter == kPositions) return out;
    const auto rest = logits_from(model, shorter, kPositions, piece);
    out.insert(out.end(), rest.begin(), rest.end());
    return out;
}

/// Within 1e-4 of the largest logit; the best token the same where the second is 1e-3 away.
void compare(const std::vector<float>& ours, const std::vector<float>& expected) {
    CHECK(ours.size() == expected.size());  // not where some are not finite
    if (ours.size() != expected.size()) return;
    const size_t n_vocab = expected.size() / kPositions;
    float largest = 0, difference = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        largest = std::max(largest, std::abs(expected[i]));
        difference = std::max(difference, std::abs(ours[i] - expected[i]));
    }
    CHECK(difference <= 1e-4f * largest);
    for (size_t i = 0; i < kPositions; ++i) {
        const auto row = std::span(expected).subspan(i * n_vocab, n_vocab);
        const auto own = std::span(ours).subspan(i * n_vocab, n_vocab);
        const auto best = std::max_element(row.begin(), row.end()) - row.begin();
        std::vector<float> sorted(row.begin(), row.end());
        std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<>());
        if (sorted[0] - sorted[1] > 1e-3f)
            CHECK(std::max_element(own.begin(), own.end()) - own.begin() == best);
    }
}

}  // namespace

TEST_CASE("references: the logits of another implementation") {
    for (const std::string name : references) {
        CAPTURE(name);
        auto half = open(Gguf::open(path_of(name, ".gguf")), true);
        REQUIRE_MESSAGE(half, half.error().message);
        const auto expected = expected_logits(name);
        const Bytes bytes = widened(name);  // borrowed
        auto full = open(Gguf::from_bytes(bytes), false);
        CHECK_MESSAGE(full, full.error().message);
        if (full) compare(all_logits(*full, kPositions), expected);
        compare(all_logits(*half, 7),
                expected);  // F16 as it lies there, in pieces; windows are kept
    }
}

TEST_CASE("references: learned positions end with the context") {
    BackendOptions options;
    options.kv_pages = 16;
    options.threads = 0;
    auto model = Model::open(Gguf::open(path_of("gpt2", ".gguf")), options);
    REQUIRE_MESSAGE(model, model.error().message);
    const auto pages = page_list(0, 16);
    const std::vector<Token> one = {1};
    const uint32_t end = model->spec->n_context;
    REQUIRE(end < 256);
    CHECK(model->run(make_rows(one, end - 1, pages, true)));
    CHECK(model->run(make_rows(one, end, pages, true)).error().kind == ErrorKind::internal);
}

// How close real weights come to an independent float32 forward pass (data/smollm2 and data/gemma3,
// made without this library), in figures. Needs VALAR_MODELS, a folder with files that
// examples/fetch_model.py fetches and SmolLM2-135M-Instruct.F32.gguf, made by make_f32.py.
#include <doctest/doctest.h>

#include "digest_internal.hpp"
#include "engine/engine.hpp"
#include "json_internal.hpp"
#include "run_model.hpp"
#include "sampler_internal.hpp"
#include "template/internal.hpp"

#include <cmath>
#include <cstdlib>
#include <string>

using namespace run_model;

namespace {

constexpr uint32_t kWindow = 512;
constexpr size_t kWindows = 40;

// What is expected of a model: its folder in tests/data.
struct Expected {
    std::string folder;
    std::optional<Token> bos;  // stands before each window of text, which is a token shorter
    size_t steps;
    double perplexity;
};
const Expected smollm2 = {"smollm2", std::nullopt, 1149, 55.7777};
const Expected gemma3 = {"gemma3", 2, 384, 54.9036};

Json read_json(const Expected& from, const char* name) {
    auto text = detail::read_file(
        std::string(VALAR_SOURCE_DIR "/tests/data/") + from.folder + "/" + name, 1 << 24);
    REQUIRE(text);
    auto json = Json::parse(*text);
    REQUIRE(json);
    return std::move(*json);
}

template <class T>
std::vector<T> numbers(const Json& array) {
    std::vector<T> out;
    for (const Json& item : array.items()) out.push_back(static_cast<T>(item.as_double()));
    return out;
}

// The model of a file in VALAR_MODELS; none where there is none, which is said.
std::optional<Model> open_model(const char* name, Precision precision, KvType kv_type,
                                const detail::Kernels* kernels = nullptr, int threads = -1) {
    const std::string folder = detail::environment("VALAR_MODELS");
    if (folder.empty()) {
        MESSAGE("skipped: VALAR_MODELS is not set");
        return std::nullopt;
    }
    auto file = Gguf::open(folder + "/" + name);
    if (!file && file.error().kind == ErrorKind::not_found) {
        MESSAGE("skipped: " << file.error().message);
        return std::nullopt;
    }
    BackendOptions options;
    options.precision = precision;
    options.kv_type = kv_type;
    options.kv_pages = 64;
    options.max_batch_rows = 1024;
    options.max_logit_rows = kWindow;
    options.threads = threads;
    auto model = Model::open(std::move(file), options, kernels);
    INFO((model ? "" : model.error().message));
    REQUIRE(model);
    return std::move(*model);
}

struct Greedy {
    const Expected& expected;
    size_t steps = 0, same = 0;
    double largest_gap = 0;  // of a step where another id was the highest
};

// Feeds each conversation's expected ids and asks at every step which id is the highest.
Greedy run_prompts(Model& model, const Expected& expected = smollm2) {
    Greedy result{.expected = expected};
    const Json prompts = read_json(expected, "prompts.json");
    const auto pages = page_list(0, 64);
    for (const Json& prompt : prompts.items()) {
        std::vector<Token> ids = numbers<Token>(prompt["ids"]);
        const auto greedy = numbers<Token>(prompt["greedy"]);
        const auto gaps = numbers<double>(prompt["gap"]);
        const size_t first = ids.size() - 1;
        ids.insert(ids.end(), greedy.begin(), greedy.end() - 1);
        auto rows = make_rows(ids, 0, pages, false);
        for (size_t i = first; i < rows.size(); ++i) rows[i].logits = true;
        REQUIRE(model.run(rows));
        detail::Sampler sampler({.temperature = 0});
        for (size_t i = 0; i < greedy.size(); ++i) {
            const Token top = sampler.sample(model.logits(static_cast<uint32_t>(i)), 0);
            if (top == greedy[i]) ++result.same;
            else result.largest_gap = std::max(result.largest_gap, gaps[i]);
            ++result.steps;
        }
    }
    return result;
}

struct Text {
    const Expected& by;
    double perplexity = 0;
    double expected = 0;  // perplexity
    double rms = 0;       // of the differences, nats
};

Text run_text(Model& model, const Expected& by = smollm2) {
    const auto ids = numbers<Token>(read_json(by, "moby-dick-ids.json"));
    const auto expected = numbers<double>(read_json(by, "nll.json"));
    const auto pages = page_list(0, 64);
    const size_t each = kWindow - (by.bos ? 1 : 0);
    double sum = 0, expected_sum = 0, squares = 0;
    size_t scored = 0;
    for (size_t window = 0; window < kWindows; ++window) {
        std::vector<Token> part;
        if (by.bos) part.push_back(*by.bos);
        const auto first = ids.begin() + static_cast<ptrdiff_t>(window * each);
        part.insert(part.end(), first, first + static_cast<ptrdiff_t>(each));
        REQUIRE(model.run(make_rows(part, 0, pages, true)));
        for (uint32_t i = 0; i + 1 < kWindow; ++i, ++scored) {
            const double nll = -static_cast<double>(
                detail::logprob_of(model.logits(i), part[i + 1], 0, nullptr));
            sum += nll;
            expected_sum += expected[scored];
            squares += (nll - expected[scored]) * (nll - expected[scored]);
        }
    }
    REQUIRE(scored == expected.size());
    const double n = static_cast<double>(scored);
    return {by, std::exp(sum / n), std::exp(expected_sum / n), std::sqrt(squares / n)};
}

void report(const Greedy& greedy) {
    MESSAGE(greedy.same << " of " << greedy.steps << " steps, largest gap lost "
                        << greedy.largest_gap);
    CHECK(greedy.steps == greedy.expected.steps);
}

void report(const Text& text) {
    MESSAGE("perplexity " << text.perplexity << " (" << text.expected << " expected), nll within "
                          << text.rms);
    CHECK(std::abs(text.expected - text.by.perplexity) < 1e-3);
}

constexpr const char* kFile = "SmolLM2-135M-Instruct.Q4_1.gguf";
constexpr const char* kGemma = "gemma-3-270m-q4_k_m.gguf";
constexpr const char* kF32 = "SmolLM2-135M-Instruct.F32.gguf";

}  // namespace

TEST_CASE("SmolLM2, F32 copy: greedy ids") {
    auto model = open_model(kF32, Precision::fast, KvType::f32);
    if (!model) return;
    const Greedy greedy = run_prompts(*model);
    report(greedy);
    CHECK(greedy.largest_gap < 0.005);
}

TEST_CASE("SmolLM2, F32 copy: log-probabilities") {
    auto model = open_model(kF32, Precision::fast, KvType::f32);
    if (!model) return;
    const Text text = run_text(*model);
    report(text);
    CHECK(std::abs(text.perplexity / text.expected - 1) < 1e-4);
    CHECK(text.rms < 0.002);
}

TEST_CASE("SmolLM2, the file as it is: greedy ids") {
    auto model = open_model(kFile, Precision::fast, KvType::f16);
    if (!model) return;
    const Greedy greedy = run_prompts(*model);
    report(greedy);
    CHECK(static_cast<double>(greedy.same) >= 0.965 * static_cast<double>(greedy.steps));
    CHECK(greedy.largest_gap < 0.75);
}

TEST_CASE("SmolLM2, the file as it is: log-probabilities") {
    auto model = open_model(kFile, Precision::fast, KvType::f16);
    if (!model) return;
    const Text text = run_text(*model);
    report(text);
    CHECK(text.perplexity <= 55.96);
    CHECK(text.rms <= 0.085);
}

TEST_CASE("SmolLM2, precision fine: greedy ids") {
    auto model = open_model(kFile, Precision::fine, KvType::f32);
    if (!model) return;
    const Greedy greedy = run_prompts(*model);
    report(greedy);
    CHECK(greedy.largest_gap < 0.02);
}

TEST_CASE("SmolLM2, precision fine: log-probabilities") {
    auto model = open_model(kFile, Precision::fine, KvType::f32);
    if (!model) return;
    const Text text = run_text(*model);
    report(text);
    CHECK(std::abs(text.perplexity / text.expected - 1) < 1e-4);
    CHECK(text.rms <= 0.002);
}

TEST_CASE("Gemma 3, the file as it is: greedy ids") {
    auto model = open_model(kGemma, Precision::fast, KvType::f16);
    if (!model) return;
    const Greedy greedy = run_prompts(*model, gemma3);
    report(greedy);
    CHECK(static_cast<double>(greedy.same) >= 0.965 * static_cast<double>(greedy.steps));
}

TEST_CASE("Gemma 3, the file as it is: log-probabilities") {
    auto model = open_model(kGemma, Precision::fast, KvType::f16);
    if (!model) return;
    const Text text = run_text(*model, gemma3);
    report(text);
    CHECK(text.perplexity <= 55.21);
    CHECK(text.rms <= 0.112);
}

TEST_CASE("Gemma 3, precision fine: greedy ids") {
    auto model = open_model(kGemma, Precision::fine, KvType::f32);
    if (!model) return;
    const Greedy greedy = run_prompts(*model, gemma3);
    report(greedy);
    CHECK(greedy.largest_gap < 0.02);
}

TEST_CASE("SmolLM2: scalar kernels once, the others in pieces and with threads, are equal") {
    const auto ids = numbers<Token>(read_json(smollm2, "moby-dick-ids.json"));
    const std::span<const Token> text(ids.data(), 10);
    const auto pages = page_list(0, 1);
    std::string expected;
    for (const detail::Kernels* kernels : detail::available_kernels())
        for (const int threads : {0, 1}) {
            auto model = open_model(kFile, Precision::fast, KvType::f16, kernels, threads);
            if (!model) return;
            for (const size_t piece : {10u, 1u, 3u}) {
                if (!expected.empty() && kernels == detail::available_kernels()[0]) continue;
                for (size_t i = 0; i < text.size(); i += piece)
                    REQUIRE(model->run(make_rows(text.subspan(i, std::min(piece, text.size() - i)),
                                                 static_cast<uint32_t>(i), pages, true)));
                const size_t left = text.size() % piece ? text.size() % piece : piece;
                const auto logits = model->logits(static_cast<uint32_t>(left - 1));
                const std::string hash = detail::sha256(logits.data(), logits.size_bytes()).hex();
                if (expected.empty()) expected = hash;
                CHECK(hash == expected);
            }
        }
}

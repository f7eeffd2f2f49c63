// The sampler: against plain formulas, and its own promises.
#include <doctest/doctest.h>

#include "digest_internal.hpp"
#include "sampler_internal.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

using namespace valar;
using detail::Sampler;
using detail::Sampling;

namespace {

// Logits like a model's: a few likely tokens, a long tail, some ties.
std::vector<float> make_logits(size_t count, uint64_t seed, float spread = 3.0f) {
    std::vector<float> out(count);
    for (size_t i = 0; i < count; ++i) {
        float sum = 0;
        for (uint64_t k = 0; k < 4; ++k)
            sum += static_cast<float>(
                       std::floor(detail::uniform_at(static_cast<int64_t>(seed), 4 * i + k) * 64)) /
                   64;
        out[i] = (sum - 2) * spread * 1.7f;
    }
    return out;
}

std::vector<size_t> sorted_ids(const std::vector<float>& logits) {
    std::vector<size_t> ids(logits.size());
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = i;
    std::stable_sort(ids.begin(), ids.end(),
                     [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    return ids;
}

// The probabilities that the options ask for, from the words of Sampling.
std::vector<double> expected_distribution(const std::vector<float>& logits,
                                          const Sampling& options) {
    const auto ids = sorted_ids(logits);
    std::vector<double> weights(logits.size());
    size_t keep = options.top_k ? std::min<size_t>(options.top_k, ids.size()) : ids.size();
    double total = 0;
    for (size_t i = 0; i < keep; ++i) {
        weights[ids[i]] = std::exp(
            (static_cast<double>(logits[ids[i]]) - static_cast<double>(logits[ids[0]])) /
            options.temperature);
        total += weights[ids[i]];
    }
    double sum = 0;
    size_t kept = 0;
    while (kept < keep &&
           (kept == 0 || (sum < options.top_p * total && weights[ids[kept]] >= options.min_p)))
        sum += weights[ids[kept++]];
    for (size_t i = kept; i < ids.size(); ++i) weights[ids[i]] = 0;
    for (double& weight : weights) weight /= sum;
    return weights;
}

void check_distribution(const std::vector<float>& logits, Sampling options) {
    CAPTURE(options.temperature);
    CAPTURE(options.top_k);
    CAPTURE(options.top_p);
    CAPTURE(options.min_p);
    const auto expected = expected_distribution(logits, options);
    std::vector<int> drawn(logits.size());
    Sampler sampler(options);
    constexpr int draws = 5000;
    for (int i = 0; i < draws; ++i)
        ++drawn[static_cast<size_t>(sampler.sample(logits, static_cast<uint64_t>(i)))];
    double chi = 0;
    int cells = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
        if (expected[i] == 0) CHECK(drawn[i] == 0);
        if (expected[i] * draws < 5) continue;
        const double mean = expected[i] * draws;
        chi += (drawn[i] - mean) * (drawn[i] - mean) / mean;
        ++cells;
    }
    CHECK(chi < cells + 5 * std::sqrt(2.0 * cells) + 5);
}

}  // namespace

TEST_CASE("uniform_at: fixed numbers, in range, even") {
    CHECK(detail::uniform_at(0, 0) == 0x1.4e0dba5e9a32fp-1);
    CHECK(detail::uniform_at(-1, 7) == 0x1.729d8d409af68p-1);
    CHECK(detail::uniform_at(1234567890123, 1u << 31) == 0x1.fda7df0b79574p-2);
    double sum = 0;
    std::set<double> seen;
    for (int64_t seed = 0; seed < 100; ++seed)
        for (uint64_t position = 0; position < 100; ++position) {
            const double u = detail::uniform_at(seed, position);
            CHECK((u >= 0 && u < 1));
            sum += u;
            seen.insert(u);
        }
    CHECK(seen.size() == 10000);
    CHECK(std::abs(sum / 10000 - 0.5) < 0.01);
}

TEST_CASE("greedy: the highest, of equals the lowest id") {
    for (const double temperature : {0.0, -1.0}) {
        Sampler greedy({.temperature = temperature});
        CHECK(greedy.sample(std::vector<float>{1, 3, 2, 3}, 0) == 1);
        CHECK(greedy.sample(std::vector<float>{-5}, 0) == 0);
        CHECK(greedy.sample(std::vector<float>{-5, -4, -4.5f}, 0) == 1);
    }
    for (size_t count : {1u, 15u, 16u, 17u, 1000u}) {
        const auto logits = make_logits(count, count);
        CHECK(Sampler({.temperature = 0}).sample(logits, 0) ==
              static_cast<Token>(sorted_ids(logits)[0]));
        CHECK(Sampler({.top_k = 1}).sample(logits, 3) == static_cast<Token>(sorted_ids(logits)[0]));
        CHECK(Sampler({.top_p = 0}).sample(logits, 3) == static_cast<Token>(sorted_ids(logits)[0]));
        CHECK(Sampler({.min_p = 1, .top_k = 1}).sample(logits, 3) ==
              static_cast<Token>(sorted_ids(logits)[0]));
    }
}

TEST_CASE("distributions") {
    const auto logits = make_logits(1500, 5);
    check_distribution(logits, {});
    check_distribution(logits, {.temperature = 0.5});
    check_distribution(logits, {.temperature = 2});
    check_distribution(logits, {.top_k = 5});
    check_distribution(logits, {.temperature = 0.7, .top_k = 40});
    check_distribution(logits, {.top_k = 5000});
    check_distribution(logits, {.top_p = 0.3});
    check_distribution(logits, {.top_p = 0.9});
    check_distribution(logits, {.top_p = 0.9999999});
    check_distribution(logits, {.temperature = 0.3, .top_p = 0.5});
    check_distribution(logits, {.min_p = 0.1});
    check_distribution(logits, {.temperature = 2, .min_p = 0.001});
    check_distribution(logits, {.temperature = 1.3, .top_p = 0.8, .min_p = 0.05, .top_k = 100});
    check_distribution(std::vector<float>(50, 1.0f), {});              // all the same
    check_distribution(std::vector<float>(50, 1.0f), {.top_p = 0.5});  // the lower ids stay
    check_distribution({0, -1e30f, 1, -1e30f}, {});
}

TEST_CASE("the least likely tokens are looked at when they are needed") {
    std::vector<float> logits(100, 0.0f);
    logits[50] = 30;  // all the others are 30 below: beyond the first look
    Sampler sampler({.top_p = 1.0 - 1e-12});
    for (uint64_t i = 0; i < 1000; ++i) CHECK(sampler.sample(logits, i) == 50);
    check_distribution(make_logits(500, 9, 40.0f), {.temperature = 0.01, .min_p = 1e-300});
}

TEST_CASE("the same bytes: fixed draws") {
    const auto logits = make_logits(5000, 1);
    const Sampling options[] = {
        {.seed = 1},
        {.temperature = 0.8, .seed = 2},
        {.top_p = 0.9, .seed = 3},
        {.min_p = 0.02, .seed = 4},
        {.top_k = 40, .seed = 5},
        {.temperature = 1e-300, .seed = 6},
        {.temperature = 1.5, .top_p = 0.95, .min_p = 0.01, .top_k = 200, .seed = -7},
    };
    std::string drawn;
    for (const Sampling& option : options) {
        Sampler sampler(option), again(option);
        for (uint64_t position = 0; position < 200; ++position) {
            const Token token = sampler.sample(logits, position);
            drawn += std::to_string(token) + " ";
        }
        CHECK(again.sample(logits, 199) ==
              Sampler(option).sample(logits, 199));  // no state between draws
    }
    CHECK(detail::sha256(drawn).hex() ==
          std::string_view("3a2e90d02e8770da4f851bf0a588f96a384fbe4a1ddc4f2d95acc6a08056dd82"));
}

TEST_CASE("penalties and bias: what is seen, how often, where") {
    const std::vector<Token> prompt = {3, 1, 3};
    const std::vector<float> logits = {0.5f, 2, -1, 4, 1, 1.5f};
    const auto check = [&](Sampling options, const std::vector<Token>& drawn,
                           const std::vector<float>& adjusted) {
        for (const double temperature : {0.0, 1.0}) {
            options.temperature = temperature;
            Sampler sampler(options), plain({.temperature = temperature});
            sampler.see_prompt(prompt, 10);
            for (const Token token : drawn) sampler.see(token);
            for (uint64_t position = 0; position < 100; ++position)
                CHECK(sampler.sample(logits, position) == plain.sample(adjusted, position));
        }
    };
    check({}, {3, 3}, {0.5f, 2, -1, 4, 1, 1.5f});
    check({.repetition_penalty = 2}, {2, 2}, {0.5f, 1, -2, 2, 1, 1.5f});
    check({.presence_penalty = 0.5}, {2, 2, 0}, {0, 2, -1.5f, 4, 1, 1.5f});
    check({.frequency_penalty = 0.5}, {2, 2, 0}, {0, 2, -2, 4, 1, 1.5f});
    check({.presence_penalty = -1, .frequency_penalty = 1, .repetition_penalty = 2}, {5, 1, 5, 5},
          {0.5f, 1, -1, 2, 1, -1.25f});
    check({.logit_bias = {{3, -100.0f}, {2, 7.0f}, {2, 0.5f}}}, {}, {0.5f, 2, 6.5f, -96, 1, 1.5f});
}

TEST_CASE("log-probabilities") {
    const auto logits = make_logits(2000, 77);
    double total = 0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit));
    const auto ids = sorted_ids(logits);
    std::vector<std::pair<Token, float>> top(20);
    for (const Token token : {0, 500, 1999, static_cast<Token>(ids[0])}) {
        const float got = detail::logprob_of(logits, token, 20, top.data());
        const double expected = static_cast<double>(logits[static_cast<size_t>(token)]) -
                                std::log(total);
        CHECK(static_cast<double>(got) == doctest::Approx(expected).epsilon(1e-6));
        CHECK(got == detail::logprob_of(logits, token, 0, nullptr));
    }
    for (size_t i = 0; i < top.size(); ++i) {
        CHECK(top[i].first == static_cast<Token>(ids[i]));
        CHECK(static_cast<double>(top[i].second) ==
              doctest::Approx(static_cast<double>(logits[ids[i]]) - std::log(total)).epsilon(1e-6));
    }
    std::pair<Token, float> few[3];
    CHECK(detail::logprob_of(std::vector<float>{2, 2}, 1, 2, few) ==
          doctest::Approx(-std::log(2.0)));
    CHECK(few[0].first == 0);
    CHECK(few[1].first == 1);
}

TEST_CASE("masks: as if the other tokens were not there") {
    const auto logits = make_logits(1000, 5);
    std::vector<uint64_t> allowed(16);
    std::vector<float> left;
    std::vector<Token> ids;
    for (size_t i = 0; i < logits.size(); i += 1 + i % 7) {
        allowed[i / 64] |= uint64_t{1} << i % 64;
        left.push_back(logits[i]);
        ids.push_back(static_cast<Token>(i));
    }
    const Sampling kinds[] = {{.temperature = 0},
                              {.top_k = 5},
                              {.top_p = 0.7},
                              {.min_p = 0.1},
                              {.top_p = 0.999999999999, .min_p = 1e-9}};
    for (const Sampling& options : kinds)
        for (uint64_t at = 0; at < 200; ++at)
            CHECK(Sampler(options).sample(logits, at, allowed) ==
                  ids[static_cast<size_t>(Sampler(options).sample(left, at))]);
    // Of all the sums differ in their order, so only the rule holds.
    Sampler all({.temperature = 2});
    for (uint64_t at = 0; at < 2000; ++at) {
        const Token token = all.sample(logits, at, allowed);
        CHECK((allowed[static_cast<size_t>(token) / 64] >> token % 64 & 1) == 1);
    }
    // One alone is drawn whatever the rest says, and soon.
    std::vector<uint64_t> one(16);
    one[15] = uint64_t{1} << 39;
    for (const Sampling& options : kinds) CHECK(Sampler(options).sample(logits, 1, one) == 999);
}

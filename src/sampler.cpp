// >>sampler
// A token's weight is exp((logit - highest) / temperature), in double, from tables: up to 7e-7 too
// large, exactly 1 for the highest, and without a product that feeds a sum, so that no compiler can
// fuse any. Weights are added token by token in blocks of 1,024 ids, the blocks in order; of sorted
// candidates one after the other.
#include "prologue.hpp"

#include "sampler_internal.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr size_t kWeightBlock = 1024;
constexpr double kWeightless = 694;  // 1000 ln 2: that many temperatures below, weights are 0

// 2^-(n / 2^20) for integers n is coarse[high 10 bits of the fraction] * fine[low 10 bits].
struct WeightTables {
    double coarse[1024], fine[1024];
    WeightTables() {
        for (int i = 0; i < 1024; ++i) {
            coarse[i] = exact_exp2(-i / 1024.0);
            fine[i] = exact_exp2(-i / 1048576.0);
        }
    }
};

const WeightTables& weight_tables() {
    static const WeightTables tables;
    return tables;
}

// 2^20 / ln 2 a unit of temperature; finite, for 0 times it must be 0.
double weight_scale(double temperature) {
    return std::min(0x1.71547652b82fep+20 / temperature, 1e300);
}

double weight_of(const WeightTables& tables, float logit, float highest, double scale) {
    const double steps = (static_cast<double>(highest) - static_cast<double>(logit)) * scale;
    if (!(steps < 1000.0 * 1048576)) return 0;
    const uint64_t n = static_cast<uint64_t>(steps);
    const double fraction = tables.coarse[n >> 10 & 1023] * tables.fine[n & 1023];
    return fraction * bit_cast<double>((1023 - (n >> 20)) << 52);
}

double weigh_block(std::span<const float> logits, size_t block, float highest, double scale) {
    const WeightTables& tables = weight_tables();
    double sum = 0;
    for (const float logit : logits.subspan(block, std::min(kWeightBlock, logits.size() - block)))
        sum += weight_of(tables, logit, highest, scale);
    return sum;
}

size_t most_likely(std::span<const float> logits) {
    size_t best = 0;
    for (size_t i = 0; i < logits.size(); i += 16) {  // a vectorisable question before a search
        const std::span<const float> some = logits.subspan(i,
                                                           std::min<size_t>(16, logits.size() - i));
        bool above = false;
        for (const float logit : some) above |= logit > logits[best];
        if (!above) continue;
        for (size_t j = 0; j < some.size(); ++j)
            if (some[j] > logits[best]) best = i + j;
    }
    return best;
}

// Infinitely far below they have no weight and are never the most likely, as long as one is allowed.
void keep_allowed(std::span<float> logits, std::span<const uint64_t> allowed) {
    constexpr float never = -std::numeric_limits<float>::infinity();
    for (size_t word = 0; word * 64 < logits.size(); ++word) {
        const std::span<float> some = logits.subspan(
            word * 64, std::min<size_t>(64, logits.size() - word * 64));
        if (allowed[word] == 0) {
            std::fill(some.begin(), some.end(), never);
            continue;
        }
        for (uint64_t out = ~allowed[word]; out; out &= out - 1)
            if (const size_t i = static_cast<size_t>(std::countr_zero(out)); i < some.size())
                some[i] = never;
    }
}

uint64_t mix_bits(uint64_t x) {  // the finalizer of splitmix64 (Steele, Lea, Flood, 2014)
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

}  // namespace

struct CandidateOrder {
    bool operator()(const Sampler::Candidate& a, const Sampler::Candidate& b) const {
        return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    }
};

double uniform_at(int64_t seed, uint64_t position) {
    constexpr uint64_t step = 0x9e3779b97f4a7c15u;
    const uint64_t bits = mix_bits(mix_bits(static_cast<uint64_t>(seed) + step) +
                                   (position + 1) * step);
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

Sampler::Sampler(const Sampling& options)
    : options_(options),
      scale_(weight_scale(options.temperature)),
      penalised_(options.presence_penalty != 0 || options.frequency_penalty != 0 ||
                 options.repetition_penalty != 1) {}

void Sampler::see_prompt(std::span<const Token> tokens, size_t most_drawn) {
    if (!penalised_) return;
    const auto by_token = [](const Seen& a, const Seen& b) { return a.token < b.token; };
    seen_.reserve(tokens.size() + most_drawn);
    for (const Token token : tokens) seen_.push_back({token, 0});
    std::sort(seen_.begin(), seen_.end(), by_token);
    const auto same = [](const Seen& a, const Seen& b) { return a.token == b.token; };
    seen_.erase(std::unique(seen_.begin(), seen_.end(), same), seen_.end());
}

void Sampler::see(Token token) {
    if (!penalised_) return;
    auto at = std::lower_bound(seen_.begin(), seen_.end(), token,
                               [](const Seen& one, Token id) { return one.token < id; });
    if (at == seen_.end() || at->token != token) at = seen_.insert(at, {token, 0});
    ++at->drawn;
}

// The logits with penalties and bias; those of tokens that are not allowed lie below all others.
std::span<const float> Sampler::adjust(std::span<const float> logits,
                                       std::span<const uint64_t> allowed) {
    if (!penalised_ && options_.logit_bias.empty() && allowed.empty()) return logits;
    adjusted_.assign(logits.begin(), logits.end());
    for (const Seen& one : seen_) {
        float& logit = adjusted_[static_cast<size_t>(one.token)];
        double x = static_cast<double>(logit);
        x = x > 0 ? x / options_.repetition_penalty : x * options_.repetition_penalty;
        if (one.drawn) x -= options_.presence_penalty;
        x -= options_.frequency_penalty * one.drawn;
        logit = static_cast<float>(x);
    }
    for (const auto& [token, bias] : options_.logit_bias)
        adjusted_[static_cast<size_t>(token)] += bias;
    if (!allowed.empty()) keep_allowed(adjusted_, allowed);
    return adjusted_;
}

Token Sampler::sample(std::span<const float> raw_logits, uint64_t position,
                      std::span<const uint64_t> allowed) {
    const FloatState float_state;
    const std::span<const float> logits = adjust(raw_logits, allowed);
    const size_t best = most_likely(logits);
    if (takes_best()) return static_cast<Token>(best);
    highest_ = logits[best];
    const double uniform = uniform_at(options_.seed, position);
    const bool all = options_.top_k == 0 && options_.top_p >= 1 && options_.min_p <= 0;
    return all ? draw_from_all(logits, uniform) : draw_from_best(logits, uniform);
}

double Sampler::add_blocks(std::span<const float> logits) {
    double total = 0;
    sums_.clear();
    for (size_t block = 0; block < logits.size(); block += kWeightBlock) {
        sums_.push_back(weigh_block(logits, block, highest_, scale_));
        total += sums_.back();
    }
    return total;
}

// Walks to the first token whose running sum passes the drawn part of the total.
Token Sampler::draw_from_all(std::span<const float> logits, double uniform) {
    const double target = uniform * add_blocks(logits);
    double before = 0;
    size_t block = 0;
    while (block + 1 < sums_.size() && before + sums_[block] <= target) before += sums_[block++];
    const WeightTables& tables = weight_tables();
    Token last = 0;
    double inside = 0;
    const size_t end = std::min((block + 1) * kWeightBlock, logits.size());
    for (size_t i = block * kWeightBlock; i < end; ++i) {
        const double weight = weight_of(tables, logits[i], highest_, scale_);
        if (weight > 0) last = static_cast<Token>(i);
        inside += weight;
        if (before + inside > target) break;
    }
    return last;
}

// The top_k best of all logits, sorted: a heap whose top is the worst one kept.
void Sampler::keep_top(std::span<const float> logits) {
    const CandidateOrder better;
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i) {
        const Candidate one{logits[i], static_cast<Token>(i)};
        if (candidates_.size() == options_.top_k) {
            if (!better(one, candidates_.front())) continue;
            std::pop_heap(candidates_.begin(), candidates_.end(), better);
            candidates_.back() = one;
        } else {
            candidates_.push_back(one);
        }
        std::push_heap(candidates_.begin(), candidates_.end(), better);
    }
    std::sort_heap(candidates_.begin(), candidates_.end(), better);
}

// All whose logit is at most `below` under the highest, sorted.
void Sampler::keep_within(std::span<const float> logits, double below) {
    const double limit = static_cast<double>(highest_) - below;
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i)
        if (static_cast<double>(logits[i]) >= limit)
            candidates_.push_back({logits[i], static_cast<Token>(i)});
    std::sort(candidates_.begin(), candidates_.end(), CandidateOrder());
}

// How many are looked at never shows in the result: a walk that ends for want of candidates is
// repeated with more of them.
Token Sampler::draw_from_best(std::span<const float> logits, double uniform) {
    const WeightTables& tables = weight_tables();
    double total = 0;
    if (options_.top_k) {
        keep_top(logits);
        for (const Candidate& one : candidates_)
            total += weight_of(tables, one.logit, highest_, scale_);
    } else if (options_.top_p < 1) {
        total = add_blocks(logits);
    }
    const double enough = options_.top_p < 1 ? options_.top_p * total
                                             : std::numeric_limits<double>::infinity();
    size_t kept = 0;
    double sum = 0;
    for (double below = 8 * options_.temperature;; below *= 2) {
        if (!options_.top_k) keep_within(logits, below);
        bool ended = false;
        for (kept = 0, sum = 0; kept < candidates_.size() && !ended; ++kept) {
            const double weight = weight_of(tables, candidates_[kept].logit, highest_, scale_);
            if (kept > 0 && weight < options_.min_p) break;
            sum += weight;
            ended = sum >= enough;
        }
        if (ended || kept < candidates_.size() || options_.top_k ||
            candidates_.size() == logits.size() || below > kWeightless * options_.temperature)
            break;
    }
    const double target = uniform * sum;
    double so_far = 0;
    for (size_t i = 0; i < kept; ++i) {
        so_far += weight_of(tables, candidates_[i].logit, highest_, scale_);
        if (so_far > target) return candidates_[i].token;
    }
    return candidates_[0].token;
}

float logprob_of(std::span<const float> logits, Token token, uint32_t count,
                 std::pair<Token, float>* top) {
    const FloatState float_state;
    const float highest = logits[most_likely(logits)];
    double total = 0;
    for (size_t block = 0; block < logits.size(); block += kWeightBlock)
        total += weigh_block(logits, block, highest, weight_scale(1));
    const double log_total = exact_log(total);
    const auto logprob = [&](float logit) {
        return static_cast<float>((static_cast<double>(logit) - static_cast<double>(highest)) -
                                  log_total);
    };
    uint32_t found = 0;  // an insertion sort: count is small
    for (size_t i = 0; i < logits.size(); ++i) {
        if (found == count && (count == 0 || logits[i] <= top[count - 1].second)) continue;
        uint32_t at = found < count ? found++ : count - 1;
        for (; at > 0 && top[at - 1].second < logits[i]; --at) top[at] = top[at - 1];
        top[at] = {static_cast<Token>(i), logits[i]};
    }
    for (uint32_t i = 0; i < found; ++i) top[i].second = logprob(top[i].second);
    return logprob(logits[static_cast<size_t>(token)]);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

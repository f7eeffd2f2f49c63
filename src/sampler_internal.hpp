// >>sampler
// Owns: logits to token: penalties, bias, masks, greedy, temperature, top_k, top_p, min_p, seed;
//       log-probabilities.
// Assumes: finite logits.
// Promises: the same bytes everywhere: a function of (logits, options, position, tokens before)
//           alone; ties go to the lower token id; no allocation after the first calls.
#pragma once

#include "kernels/internal.hpp"
#include "tokenizer/tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// In this order, as Hugging Face has it: penalties and bias; the tokens that are allowed; logits /
/// temperature; the top_k most likely; of those the fewest that together reach top_p; of those the ones at least min_p times as
/// likely as the first.
struct SamplerOptions {
    double temperature = 1;  ///< 0: greedy
    double top_p = 1;
    double min_p = 0;
    uint32_t top_k = 0;  ///< 0: no limit
    int64_t seed = 0;
    double presence_penalty = 0;  ///< as in Request
    double frequency_penalty = 0;
    double repetition_penalty = 1;
    std::vector<std::pair<Token, float>> logit_bias = {};
};

/// Draws tokens for one sequence. Threads: one at a time.
class Sampler {
public:
    explicit Sampler(const SamplerOptions& options);
    /// The tokens of the prompt, before the first draw; makes room for `most_drawn` more.
    void see_prompt(std::span<const Token> tokens, size_t most_drawn);
    /// A token that was drawn and taken.
    void see(Token token);
    /// The token at `position` (of the token that is drawn). Of `allowed`, a bit a token, at least
    /// one is set; empty: all are.
    Token sample(std::span<const float> logits, uint64_t position,
                 std::span<const uint64_t> allowed = {});

private:
    struct Candidate {
        float logit;
        Token token;
    };
    struct Seen {
        Token token;
        uint32_t drawn;  // times; 0: in the prompt only
    };
    friend struct CandidateOrder;
    std::span<const float> adjust(std::span<const float> logits, std::span<const uint64_t> allowed);
    void keep_top(std::span<const float> logits);
    void keep_within(std::span<const float> logits, double below);
    Token draw_from_all(std::span<const float> logits, double uniform);
    Token draw_from_best(std::span<const float> logits, double uniform);
    double add_blocks(std::span<const float> logits);

    SamplerOptions options_;
    double scale_;  // of a logit's distance to the highest
    float highest_ = 0;
    std::vector<Candidate> candidates_;  // most likely first
    std::vector<double> sums_;           // of weights, a block of the vocabulary each
    bool penalised_;
    std::vector<Seen> seen_;  // by token
    std::vector<float> adjusted_;
};

/// A number in [0, 1) that depends on (seed, position) alone, 53 bits.
double uniform_at(int64_t seed, uint64_t position);
/// Natural log of the model's own distribution (before temperature and top_p): of `token`, and of
/// the `count` most likely ones, most likely first. `top` may be null when count is 0.
float logprob_of(std::span<const float> logits, Token token, uint32_t count,
                 std::pair<Token, float>* top);

}  // namespace detail
}  // namespace v1
}  // namespace valar

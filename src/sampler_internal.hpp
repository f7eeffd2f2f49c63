// >>sampler
// Owns: logits to token: penalties, bias, masks, greedy, temperature, top_k, top_p, min_p, seed;
//       log-probabilities.
// Assumes: finite logits.
// Promises: the same bytes everywhere: a function of (logits, options, position, tokens before)
//           alone; ties go to the lower token id; no allocation after the first calls.
#pragma once

#include "api_internal.hpp"
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

/// Draws tokens for one sequence. Threads: one at a time.
class Sampler {
public:
    explicit Sampler(const Sampling& options);
    /// The tokens of the prompt, before the first draw; makes room for `most_drawn` more.
    void see_prompt(std::span<const Token> tokens, size_t most_drawn);
    /// A token that was drawn and taken.
    void see(Token token);
    /// No draw: the most likely one it is.
    bool takes_best() const { return options_.temperature <= 0 || options_.top_k == 1; }
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

    Sampling options_;
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

#pragma once

#include "engine/limits.hpp"
#include "tokenizer/tokenizer.hpp"

#include <cstdint>
#include <span>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Guesses of what comes next --------------------------------------------------------------

// The guesses of one sequence. One that is right saves a batch, one that is wrong wastes a row: so
// only credit that right ones earned is spent on them.
struct Drafts {
    Token tokens[kMaxDraft];
    uint32_t count = 0;           // of tokens; they are the last of the sequence's rows
    uint32_t most = kFirstDraft;  // follows what is accepted
    uint32_t credit = 0;          // for wasted rows, in 1 / kDraftCredit

    /// Guesses what follows `text`, at most `room` tokens.
    void guess(std::span<const Token> text, uint32_t room);
    /// Takes these as the guess, at most `room`.
    void take(std::span<const Token> sure, uint32_t room);
    /// So many of the last guesses were right.
    void settle(uint32_t drafted, uint32_t accepted);
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

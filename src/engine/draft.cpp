#include "prologue.hpp"

#include "engine/draft.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// What may come next: what followed the last tokens where they stood before, at the longest match,
// of several the latest (prompt lookup decoding, Saxena 2023). Text that repeats itself up to its
// end goes on repeating. Returns how many of `most` it put into `out`.
uint32_t find_draft(std::span<const Token> tokens, uint32_t most, Token* out) {
    const size_t last = tokens.size() - 1;
    size_t next = 0;
    uint32_t longest = kMinMatch - 1;
    for (size_t at = last; at-- > longest && longest < kMaxMatch;) {
        if (tokens[at] != tokens[last]) continue;
        uint32_t match = 1;
        while (match < kMaxMatch && match <= at && tokens[at - match] == tokens[last - match])
            ++match;
        if (match <= longest) continue;
        longest = match;
        next = at + 1;
    }
    if (next == 0) return 0;
    for (size_t i = 0; i < most; ++i)
        out[i] = next + i <= last ? tokens[next + i] : out[next + i - last - 1];
    return most;
}

}  // namespace

// There are no more guesses than the credit pays for if all of them are wrong.
void Drafts::guess(std::span<const Token> text, uint32_t room) {
    const uint32_t length = static_cast<uint32_t>(text.size());
    const uint32_t affordable = std::min({most, credit / kDraftCredit, room, length});
    VALAR_ASSERT(affordable <= kMaxDraft);
    count = affordable == 0 ? 0 : find_draft(text, affordable, tokens);
}

void Drafts::take(std::span<const Token> sure, uint32_t room) {
    count = std::min({static_cast<uint32_t>(sure.size()), room, kMaxDraft});
    std::copy_n(sure.begin(), count, tokens);
}

// A guess that is accepted earns credit, and so does, a little, every token.
void Drafts::settle(uint32_t drafted, uint32_t accepted) {
    VALAR_ASSERT(accepted <= drafted && drafted <= kMaxDraft);
    credit = std::min(credit + 1 + accepted * kDraftCredit, 2 * kMaxDraft * kDraftCredit);
    if (drafted == 0) return;
    credit -= std::min(credit, (drafted - accepted) * kDraftCredit);
    most = accepted == drafted ? std::min(2 * most, kMaxDraft) : std::max(accepted, kLeastDraft);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

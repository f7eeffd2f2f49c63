#pragma once

#include "engine/draft.hpp"
#include "engine/limits.hpp"
#include "engine/mailbox.hpp"
#include "engine/prompt.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- A request being answered ----------------------------------------------------------------

// Organisations take turns: the one served longest ago is next.
struct Turn {
    uint64_t served = 0;
    uint32_t members = 0;  // requests that wait or run
};

// The pages that a sequence has of one kind.
struct PageList {
    std::vector<uint32_t> pages;
    uint32_t passed = 0;  // of them, given back: no window reaches there any more
};

struct Sequence {
    MailboxPtr reply;
    PromptPtr prompt;
    std::vector<Token> tokens;  // the prompt and what was drawn
    uint32_t computed = 0;      // positions whose keys and values are there
    uint32_t reached = 0;       // the most that `computed` ever was: what is beyond counts as
                                // cached when the cache has it
    uint32_t rows = 0;          // in the batch under way
    int32_t logits = -1;        // the first of the batch's that are for it, if any
    Drafts drafts;
    PageList lists[kPageKinds];
    std::vector<Hash256> page_keys;  // of the pages that its tokens fill, when needed
    uint32_t kept = 0;               // pages that the cache knows
    bool over = false;               // its reply has the end; its pages are still taken
    std::unordered_map<std::string, Turn>::value_type* turn = nullptr;
    uint64_t ticket = 0;  // order of arrival
    uint32_t rank = 0;    // 0 is the most urgent; see rank_of
    Sampler sampler;
    GrammarState grammar;  // where the answer stands in what it is held to, if anything
    size_t closing;        // of prompt->thought_end, those that came; all: none is being closed
    Detokenizer detokenizer;
    std::string held;        // text that may begin a stop string
    bool item_open = false;  // the last of outcome.items is under way
    Outcome outcome;
    Usage counted;  // of outcome.usage, what the statistics have
    uint32_t drafted = 0, accepted = 0, constrained = 0, masks = 0;  // what they do not have yet
    uint64_t queued_ns = monotonic_ns(), started_ns = 0, first_token_ns = 0;
    uint64_t waiting_ns = queued_ns, waited_ns = 0;  // since when it waits; how long before

    Sequence(MailboxPtr answer_to, PromptPtr from, const Tokenizer& tokenizer)
        : reply(std::move(answer_to)),
          prompt(std::move(from)),
          tokens(std::move(prompt->tokens)),
          page_keys(std::move(prompt->page_keys)),
          sampler(prompt->sampling),
          grammar(prompt->grammar ? GrammarState(prompt->grammar) : GrammarState()),
          closing(prompt->thought_end.size()),
          detokenizer(tokenizer) {
        outcome.usage.input_tokens = drafts.credit = length();
    }
    uint32_t length() const { return static_cast<uint32_t>(tokens.size()); }
    uint32_t left() const {
        VALAR_ASSERT(computed <= length());
        return length() - computed;
    }
};
using SequencePtr = std::unique_ptr<Sequence>;

}  // namespace detail
}  // namespace v1
}  // namespace valar

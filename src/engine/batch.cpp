#include "prologue.hpp"

#include "engine/scheduler.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- The next batch --------------------------------------------------------------------------

// Sequences that decode get a row each and some for guesses; the rest is for prompts.
void Scheduler::build_batch(uint64_t budget_ns) {
    VALAR_ASSERT(batch_.empty() && untaken_ == 0 && running_.size() <= max_logit_rows_);
    bool answers = false;
    uint32_t spare = max_logit_rows_ - static_cast<uint32_t>(running_.size());
    for (const SequencePtr& sequence : running_) {
        cache_.join(*sequence);
        cache_.drop_passed(*sequence);
        sequence->rows = 0;
        if (sequence->left() > 1) continue;
        answers = true;
        draft(*sequence, &spare);
        sequence->rows = 1 + sequence->drafts.count;
    }
    share_prompt_rows(prompt_cost(answers, budget_ns));
    for (size_t i = 0; i < running_.size(); ++i) reserve_pages(i);
    uint32_t logit_rows = 0;
    for (const SequencePtr& sequence : running_) add_rows(*sequence, &logit_rows);
    VALAR_ASSERT(logit_rows <= max_logit_rows_);
    batch_ns_ = batch_cost_ = 0;
    for (const BatchRow& row : batch_) batch_cost_ += row_cost_(row.position);
    // A batch that the backend refuses is our own mistake; advance() will fail as well.
    auto begun = backend_->begin(batch_);
    if (!begun) options_.log(LogLevel::error, begun.error().message);
}

// What the next batch's prompt tokens may cost: less where they would take longer than the caller's
// budget, hold up answers, or let those wait who come meanwhile.
uint64_t Scheduler::prompt_cost(bool answers, uint64_t budget_ns) const {
    const uint64_t wait_ns = uint64_t{options_.max_wait_step_ms} * 1'000'000;
    const uint64_t target = std::min(
        {budget_ns, answers ? kMixedNs : kNoLimit, wait_ns ? wait_ns : kNoLimit});
    if (target == kNoLimit) return kNoLimit;
    return cost_ns_ > 0 ? static_cast<uint64_t>(static_cast<double>(target) / cost_ns_) : 0;
}

// A quarter goes to the first of the prompts, so that the long ones are read too. By cost, not by rows:
// far into a long text its quarter of the rows would take most of the time.
void Scheduler::share_prompt_rows(uint64_t cost) {
    uint32_t rows = step_tokens_, least = std::min(kMinPromptRows, step_tokens_);
    const auto give = [&](Sequence& prompt, uint32_t fewest, uint32_t most, uint64_t* budget) {
        VALAR_ASSERT(prompt.rows <= prompt.left());
        const uint32_t given = row_cost_.take(prompt.computed + prompt.rows, fewest,
                                              std::min(most, prompt.left() - prompt.rows), budget);
        prompt.rows += given;
        rows -= given;
        least -= std::min(least, given);
        return given > 0;
    };
    const auto first = std::find_if(
        running_.begin(), running_.end(),
        [](const SequencePtr& sequence) { return sequence->rows == 0; });
    if (first != running_.end()) {
        uint64_t quarter = cost / 4;
        cost -= quarter;
        give(**first, 1, std::max(rows / 4, 1u), &quarter);
        cost += quarter;
    }
    while (rows > 0) {
        Sequence* next = next_prompt();
        if (!next || !give(*next, least, rows, &cost)) break;
    }
}

// The prompt that gets rows next: of the best rank the one that needs least, so that few wait for
// one that is long.
Sequence* Scheduler::next_prompt() const {
    Sequence* best = nullptr;
    const auto order = [](const Sequence& prompt) {
        return std::tuple(prompt.rank, prompt.left() - prompt.rows);
    };
    for (const SequencePtr& prompt : running_)
        if (prompt->rows < prompt->left() && (!best || order(*prompt) < order(*best)) &&
            (prompt->rows || !computes_the_same(*prompt)))
            best = prompt.get();
    return best;
}

// Whether another prompt of this batch computes what this one needs next: then it is in the cache
// for the next batch.
bool Scheduler::computes_the_same(const Sequence& prompt) const {
    const size_t index = prompt.computed / options_.page_tokens;
    if (!options_.prefix_cache || prompt.computed % options_.page_tokens ||
        index >= prompt.page_keys.size())
        return false;
    for (const SequencePtr& other : running_)
        if (other->rows && other->computed == prompt.computed && index < other->page_keys.size() &&
            other->page_keys[index] == prompt.page_keys[index])
            return true;
    return false;
}

// What the grammar leaves no choice about, as the model would write it: only a guess, for the same
// text has other tokens too.
void Scheduler::take_forced(Sequence& sequence, uint32_t room) {
    if (!sequence.grammar.active()) return;
    const std::string_view text = sequence.prompt->masks->forced(sequence.grammar, kMaxForcedBytes);
    if (text.size() < kLeastForcedBytes) return;
    if (const auto tokens = model_.tokenizer().encode(text)) sequence.drafts.take(*tokens, room);
}

namespace {

bool ends_in_a_character(const Sequence& sequence, const Tokenizer& tokenizer) {
    std::string tail;
    for (size_t i = sequence.tokens.size(); i > 0 && tail.size() < 4; --i)
        tail.insert(0, tokenizer.piece(sequence.tokens[i - 1]));
    return utf8_incomplete_suffix(tail) == 0;
}

// Of the tokens that close a thought which has used its budget, those that come next; or none. What
// a grammar holds is valid UTF-8 and gets to the end of a character; what is free need not.
std::span<const Token> rest_of_thought(const Sequence& sequence, const Tokenizer& tokenizer) {
    const PreparedPrompt& prompt = *sequence.prompt;
    const std::span<const Token> end = prompt.thought_end;
    if (sequence.closing < end.size()) return end.subspan(sequence.closing);
    const uint64_t used = sequence.outcome.usage.reasoning_tokens;
    if (used < prompt.thought_budget || !prompt.parser->thinking()) return {};
    const bool fits = sequence.grammar.active()
                          ? prompt.masks->takes_all(sequence.grammar, end)
                          : used >= uint64_t{prompt.thought_budget} + kMostHalves ||
                                ends_in_a_character(sequence, tokenizer);
    return fits ? end : std::span<const Token>();
}

}  // namespace

void Scheduler::draft(Sequence& sequence, uint32_t* spare) {
    sequence.drafts.count = 0;
    if (!options_.speculation) return;
    const uint32_t left = sequence.prompt->max_output - sequence.outcome.usage.output_tokens;
    VALAR_ASSERT(left > 0);
    const uint32_t turned_alike = sequence.prompt->long_rope
                                      ? UINT32_MAX
                                      : short_rope_tokens_ - sequence.length();
    const uint32_t room = std::min({*spare, left - 1, turned_alike});
    if (room == 0) return;
    sequence.drafts.take(rest_of_thought(sequence, model_.tokenizer()), room);
    if (sequence.drafts.count == 0) take_forced(sequence, room);
    if (sequence.drafts.count == 0) sequence.drafts.guess(sequence.tokens, room);
    *spare -= sequence.drafts.count;
}

// Pages for the rows of the index-th that runs; those after it give way. What does not fit even so
// waits for a later batch.
void Scheduler::reserve_pages(size_t index) {
    Sequence& sequence = *running_[index];
    const auto is_short = [&] { return !cache_.has_pages(sequence); };
    if (sequence.rows == 0) return;
    if (is_short()) sequence.rows -= std::exchange(sequence.drafts.count, 0);
    while (is_short() && running_.size() > index + 1) preempt_last();
    while (sequence.rows && is_short()) --sequence.rows;
    if (sequence.rows) cache_.take_pages(sequence);
}

void Scheduler::add_rows(Sequence& sequence, uint32_t* logit_rows) {
    const uint32_t end = sequence.computed + sequence.rows, length = sequence.length();
    VALAR_ASSERT(end <= length + sequence.drafts.count);
    sequence.logits = end < length ? -1 : static_cast<int32_t>(*logit_rows);
    for (uint32_t position = sequence.computed; position < end; ++position) {
        const Token token = position < length ? sequence.tokens[position]
                                              : sequence.drafts.tokens[position - length];
        const bool logits = position + 1 >= length;
        batch_.push_back({token, nullptr, position, sequence.lists[0].pages.data(), logits,
                          sequence.prompt->long_rope, sequence.lists[1].pages.data()});
        *logit_rows += logits;
    }
}

// ---- Its results -----------------------------------------------------------------------------

// Draws a token, and more as long as they are what was guessed.
void Scheduler::take_results(Sequence& sequence) {
    if (sequence.over || sequence.rows == 0) return;
    const uint32_t drafted = std::exchange(sequence.drafts.count, 0);
    sequence.computed += std::exchange(sequence.rows, 0) - drafted;
    if (sequence.first_token_ns == 0) answers_.tell_progress(sequence);
    if (sequence.logits >= 0) {
        const uint32_t row = static_cast<uint32_t>(sequence.logits);
        uint32_t accepted = 0;
        sequence.drafted += drafted;
        for (;; ++accepted, ++sequence.accepted) {
            const auto token = draw_token(sequence, row + accepted);
            if (sequence.over || accepted == drafted || token != sequence.drafts.tokens[accepted])
                break;
        }
        sequence.computed += accepted;
        sequence.drafts.settle(drafted, accepted);
    }
    sequence.reached = std::max(sequence.reached, sequence.computed);
    cache_.keep(sequence);
    change_rope(sequence);
}

// A sequence that has become longer than the short rope factors reach begins again with the long ones,
// as the model's own class does: keys that were turned by either do not go together.
void Scheduler::change_rope(Sequence& sequence) {
    if (sequence.prompt->long_rope || sequence.over || sequence.length() <= short_rope_tokens_)
        return;
    cache_.release(sequence);
    sequence.page_keys.clear();
    sequence.prompt->root = long_rope_key(sequence.prompt->root);
    sequence.prompt->long_rope = true;
}

// Nothing where the logits are not finite: then the sequence is over.
std::optional<Token> Scheduler::draw_token(Sequence& sequence, uint32_t logits_row) {
    const auto chosen = choose_token(sequence, logits_row);
    if (!chosen) {
        answers_.end(sequence, Status::failed, chosen.error());
        return std::nullopt;
    }
    const Token token = *chosen;
    if (sequence.first_token_ns == 0) sequence.first_token_ns = monotonic_ns();
    sequence.tokens.push_back(token);
    sequence.sampler.see(token);
    ++sequence.outcome.usage.output_tokens;
    answers_.add_token(sequence, token, *backend_->logits(logits_row));
    return token;
}

// The token that comes next, among those that the grammar has there.
Result<Token> Scheduler::choose_token(Sequence& sequence, uint32_t logits_row) {
    const auto logits = backend_->logits(logits_row);
    if (!logits) return logits.error();
    if (const auto rest = rest_of_thought(sequence, model_.tokenizer()); !rest.empty()) {
        sequence.closing = sequence.prompt->thought_end.size() - rest.size() + 1;
        if (sequence.grammar.active()) sequence.prompt->masks->accept(sequence.grammar, rest[0]);
        return rest[0];
    }
    if (!sequence.grammar.active()) return sequence.sampler.sample(*logits, sequence.length());
    MaskMaker& masks = *sequence.prompt->masks;
    ++sequence.constrained;
    // The best of all tokens is the best of the allowed ones if it is one of them.
    if (sequence.sampler.takes_best()) {
        const Token best = sequence.sampler.sample(*logits, sequence.length());
        if (masks.accept(sequence.grammar, best)) return best;
    }
    ++sequence.masks;
    const auto allowed = masks.fill(sequence.grammar);
    if (std::all_of(allowed.begin(), allowed.end(), [](uint64_t word) { return word == 0; }))
        return make_error(ErrorKind::internal, "no token of this vocabulary goes on as it must");
    const Token token = sequence.sampler.sample(*logits, sequence.length(), allowed);
    masks.accept(sequence.grammar, token);
    return token;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

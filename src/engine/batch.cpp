#include "prologue.hpp"

#include "engine/state.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {

// ---- The batch -------------------------------------------------------------------------------

// Prompt tokens for the next batch: less where it would take longer than the caller's budget or
// hold up answers.
uint32_t Engine::State::prompt_rows(bool answers, uint64_t budget_ns) const {
    const uint64_t target = answers ? std::min(budget_ns, detail::kMixedNs) : budget_ns;
    const uint32_t most = step_tokens;
    if (target == detail::kNoLimit) return most;
    const uint64_t fit = row_ns ? target / row_ns : 0;
    return static_cast<uint32_t>(
        std::clamp<uint64_t>(fit, std::min(detail::kMinPromptRows, most), most));
}

// Whether another prompt of this batch computes what this one needs next: then it is in the cache
// for the next batch.
bool Engine::State::computes_the_same(const detail::Sequence& prompt) const {
    const size_t index = prompt.computed / options.page_tokens;
    if (!options.prefix_cache || prompt.computed % options.page_tokens ||
        index >= prompt.page_keys.size())
        return false;
    for (const SequencePtr& other : running)
        if (other->rows && other->computed == prompt.computed && index < other->page_keys.size() &&
            other->page_keys[index] == prompt.page_keys[index])
            return true;
    return false;
}

// The prompt that gets rows next: of the best rank the one that needs least, so that few wait for
// one that is long.
detail::Sequence* Engine::State::next_prompt() const {
    detail::Sequence* best = nullptr;
    const auto order = [](const detail::Sequence& one) {
        return std::tuple(one.rank, one.left() - one.rows);
    };
    for (const SequencePtr& one : running)
        if (one->rows < one->left() && (!best || order(*one) < order(*best)) &&
            (one->rows || !computes_the_same(*one)))
            best = one.get();
    return best;
}

// A quarter goes to the first of the prompts, so that the long ones are read too.
void Engine::State::share_prompt_rows(uint32_t budget) {
    const auto give = [&](detail::Sequence& to, uint32_t most) {
        const uint32_t rows = std::min(to.left() - to.rows, most);
        to.rows += rows;
        budget -= rows;
    };
    const auto first = std::find_if(running.begin(), running.end(),
                                    [](const SequencePtr& one) { return one->rows == 0; });
    if (first != running.end()) give(**first, std::max(budget / 4, 1u));
    while (budget > 0) {
        detail::Sequence* next = next_prompt();
        if (!next) break;
        give(*next, budget);
    }
}

// Pages for the rows of the index-th that runs; those after it give way. What does not fit even so
// waits for a later batch.
void Engine::State::reserve_pages(size_t index) {
    detail::Sequence& sequence = *running[index];
    const uint32_t page_tokens = options.page_tokens, begun = sequence.computed / page_tokens;
    if (sequence.rows == 0) return;
    bool copy = begun < sequence.pages.size() && !pool.writable(sequence.pages[begun]);
    const auto lacking = [&] {
        const uint32_t needed = pages_for(sequence.computed + sequence.rows) + copy,
                       there = static_cast<uint32_t>(sequence.pages.size());
        return needed - std::min(needed, there);
    };
    if (pool.unused() < lacking()) sequence.rows -= std::exchange(sequence.drafted, 0);
    while (pool.unused() < lacking() && running.size() > index + 1) preempt_last();
    while (sequence.rows && pool.unused() < lacking()) --sequence.rows;
    if (sequence.rows == 0) return;
    if (copy) {
        const uint32_t from = std::exchange(sequence.pages[begun], pool.take());
        backend->copy_page(from, sequence.pages[begun]);
        pool.drop(from);
        sequence.kept = begun;
        copy = false;
    }
    while (lacking() > 0) sequence.pages.push_back(pool.take());
}

// Sequences that decode get a row each and some for guesses; the rest is for prompts.
void Engine::State::build_batch(uint64_t budget_ns) {
    bool answers = false;
    uint32_t spare = max_logit_rows - static_cast<uint32_t>(running.size());
    for (const SequencePtr& sequence : running) {
        join_cached(*sequence);
        drop_passed(*sequence);
        sequence->rows = 0;
        if (sequence->left() > 1) continue;
        answers = true;
        draft(*sequence, &spare);
        sequence->rows = 1 + sequence->drafted;
    }
    share_prompt_rows(prompt_rows(answers, budget_ns));
    for (size_t i = 0; i < running.size(); ++i) reserve_pages(i);
    uint32_t wanted = 0;
    for (const SequencePtr& sequence : running) add_rows(*sequence, &wanted);
    batch_ns = 0;
    auto begun = backend->begin(
        batch);  // a batch that it refuses is our mistake: advance() fails too
    if (!begun) options.log(LogLevel::error, begun.error().message);
}

// No more than its credit says would be wasted if all of them were wrong.
void Engine::State::draft(detail::Sequence& sequence, uint32_t* spare) {
    const uint32_t left = sequence.prompt->max_output - sequence.outcome.usage.output_tokens;
    const uint32_t most = std::min({sequence.draft_most, sequence.credit / detail::kDraftCredit,
                                    *spare, left - 1, sequence.length()});
    sequence.drafted = 0;
    if (!options.speculation || most == 0) return;
    sequence.drafted = detail::find_draft(sequence.tokens, most, sequence.draft);
    *spare -= sequence.drafted;
}

// What is accepted earns credit, and so does, a little, every token.
void Engine::State::count_drafts(detail::Sequence& sequence, uint32_t drafted, uint32_t accepted) {
    constexpr uint32_t unit = detail::kDraftCredit;
    const uint32_t credit = sequence.credit + 1 + accepted * unit;
    sequence.credit = std::min(credit, 2 * detail::kMaxDraft * unit);
    if (drafted == 0) return;
    sequence.credit -= std::min(sequence.credit, (drafted - accepted) * unit);
    sequence.draft_most = accepted == drafted ? std::min(2 * sequence.draft_most, detail::kMaxDraft)
                                              : std::max(accepted, detail::kLeastDraft);
    const std::lock_guard<std::mutex> lock(mutex);
    counts.drafted_tokens += drafted;
    counts.accepted_tokens += accepted;
}

void Engine::State::add_rows(detail::Sequence& sequence, uint32_t* wanted) {
    const uint32_t end = sequence.computed + sequence.rows, length = sequence.length();
    sequence.logits = end < length ? -1 : static_cast<int32_t>(*wanted);
    for (uint32_t position = sequence.computed; position < end; ++position) {
        const Token token = position < length ? sequence.tokens[position]
                                              : sequence.draft[position - length];
        const bool logits = position + 1 >= length;
        batch.push_back({token, nullptr, position, sequence.pages.data(), logits});
        *wanted += logits;
    }
}

// Draws a token, and more as long as they are what was guessed.
void Engine::State::take_results(detail::Sequence& sequence) {
    if (sequence.over || sequence.rows == 0) return;
    const uint32_t drafted = std::exchange(sequence.drafted, 0);
    sequence.computed += std::exchange(sequence.rows, 0) - drafted;
    if (sequence.logits >= 0) {
        const uint32_t row = static_cast<uint32_t>(sequence.logits);
        uint32_t accepted = 0;
        for (;; ++accepted) {
            const Token token = take_token(sequence, row + accepted);
            if (sequence.over || accepted == drafted || token != sequence.draft[accepted]) break;
        }
        sequence.computed += accepted;
        count_drafts(sequence, drafted, accepted);
    }
    sequence.reached = std::max(sequence.reached, sequence.computed);
    keep_pages(sequence);
}

// Draws a token. The end, a stop string or the limit finishes the sequence.
Token Engine::State::take_token(detail::Sequence& sequence, uint32_t logits_row) {
    const auto finite = backend->logits(logits_row);
    if (!finite) {
        finish(sequence, Status::failed, finite.error());
        return -1;
    }
    const std::span<const float> logits = *finite;
    const Token token = sequence.sampler.sample(logits, sequence.length());
    if (sequence.first_token_ns == 0) sequence.first_token_ns = detail::monotonic_ns();
    sequence.tokens.push_back(token);
    sequence.sampler.see(token);
    ++sequence.outcome.usage.output_tokens;
    if (tokenizer->is_end(token)) {
        finish(sequence, Status::completed);
        return token;
    }
    if (sequence.prompt->logprobs) add_logprob(sequence, logits, token);
    const bool stopped = pass_text(sequence, sequence.detokenizer.push(token));
    const bool full = sequence.outcome.usage.output_tokens == sequence.prompt->max_output;
    sequence.outcome.cut = full && !stopped;
    if (full || stopped) finish(sequence, Status::completed);
    return token;
}

// Lets text out up to the first stop string (then true), or to where one may begin.
bool Engine::State::pass_text(detail::Sequence& sequence, std::string_view text) {
    const auto& stops = sequence.prompt->stop;
    std::string& held = sequence.held;
    if (stops.empty()) {
        emit_text(sequence, text);
        return false;
    }
    held += text;
    size_t found = held.size(), begins = held.size();
    for (const std::string& stop : stops) {
        const size_t at = held.find(stop);
        if (at < found) {
            found = at;
            sequence.outcome.stopped_by = stop;
        }
        for (size_t i = held.size() - std::min(held.size(), stop.size() - 1); i < begins; ++i)
            if (stop.starts_with(std::string_view(held).substr(i))) begins = i;
    }
    const bool stopped = found < held.size();
    emit_text(sequence, std::string_view(held).substr(0, std::min(found, begins)));
    held.erase(0, stopped ? held.size() : begins);
    return stopped;
}

void Engine::State::emit_text(detail::Sequence& sequence, std::string_view text) {
    if (text.empty()) return;
    sequence.outcome.text += text;
    if (sequence.reply->put_text(text)) announce(*sequence.reply);
}

void Engine::State::add_logprob(detail::Sequence& sequence, std::span<const float> logits,
                                Token token) {
    TokenLogprob one;
    const uint32_t count = std::min(sequence.prompt->top_logprobs, spec.n_vocab);
    one.logprob = detail::logprob_of(logits, token, count, top);
    one.bytes = tokenizer->piece(token);
    for (uint32_t i = 0; i < count; ++i)
        one.top.push_back({std::string(tokenizer->piece(top[i].first)), top[i].second});
    if (sequence.reply->put_logprob(one)) announce(*sequence.reply);
    sequence.outcome.logprobs.push_back(std::move(one));
}

// The reply learns the end; sweep() takes the sequence away when no batch uses its pages.
void Engine::State::finish(detail::Sequence& sequence, Status status, std::optional<Error> error) {
    if (sequence.outcome.stopped_by.empty() && !pass_text(sequence, sequence.detokenizer.flush()))
        emit_text(sequence, sequence.held);
    sequence.over = true;
    Outcome& outcome = sequence.outcome;
    outcome.status = status;
    outcome.error = std::move(error);
    const uint64_t now = detail::monotonic_ns();
    const uint64_t started = sequence.started_ns ? sequence.started_ns : now;
    const uint64_t first = sequence.first_token_ns ? sequence.first_token_ns : now;
    outcome.timings.queue_us = (started - sequence.queued_ns) / 1000;
    outcome.timings.prefill_us = (first - started) / 1000;
    outcome.timings.decode_us = (now - first) / 1000;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ++(status == Status::completed ? counts.completed
           : status == Status::failed  ? counts.failed
                                       : counts.cancelled);
        counts.input_tokens += sequence.started_ns ? outcome.usage.input_tokens : 0;
        counts.output_tokens += outcome.usage.output_tokens;
        counts.cached_tokens += outcome.usage.cached_tokens;
        counts.queue_us += outcome.timings.queue_us;
        counts.prefill_us += outcome.timings.prefill_us;
        counts.decode_us += outcome.timings.decode_us;
        if (sequence.waiting_ns == 0) --counts.running;
    }
    if (sequence.reply->put_outcome(std::move(outcome))) announce(*sequence.reply);
}

// The end of everything: nothing is taken from now on.
void Engine::State::fail_all(const Error& error) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        closed = true;
    }
    take_arrivals();
    if (!batch.empty()) backend->abandon();
    batch.clear();
    untaken = 0;
    for (auto* list : {&running, &waiting}) {
        for (const SequencePtr& sequence : *list)
            if (!sequence->over) finish(*sequence, Status::failed, error);
        list->clear();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = 0;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "engine/answer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

void add_outcome(const Sequence& sequence, ResponderStats* counts) {
    const Outcome& outcome = sequence.outcome;
    ++(outcome.status == Status::completed ? counts->completed
       : outcome.status == Status::failed  ? counts->failed
                                           : counts->cancelled);
    counts->input_tokens += sequence.started_ns ? outcome.usage.input_tokens : 0;
    counts->output_tokens += outcome.usage.output_tokens;
    counts->cached_tokens += outcome.usage.cached_tokens;
    counts->queue_us += outcome.timings.queue_us;
    counts->prefill_us += outcome.timings.prefill_us;
    counts->decode_us += outcome.timings.decode_us;
    if (sequence.waiting_ns == 0) --counts->running;
}

}  // namespace

// All that grows later gets its room here: nothing is allocated for a token.
void AnswerWriter::begin(Sequence& sequence) {
    const uint32_t most = sequence.prompt->max_output;
    const size_t most_text = size_t{most} * 4;
    sequence.tokens.reserve(sequence.length() + most);
    sequence.outcome.text.reserve(most_text);
    sequence.held.reserve(2 * kMaxStopBytes);
    sequence.sampler.see_prompt(sequence.tokens, most);
    if (sequence.prompt->logprobs) sequence.outcome.logprobs.reserve(most);
    if (sequence.reply->put_start(most_text)) desk_.announce(*sequence.reply);
}

void AnswerWriter::add_token(Sequence& sequence, Token token, std::span<const float> logits) {
    VALAR_ASSERT(!sequence.over);
    if (model_.tokenizer().is_end(token)) return end(sequence, Status::completed);
    if (sequence.prompt->logprobs) add_logprob(sequence, logits, token);
    const bool stopped = pass_text(sequence, sequence.detokenizer.push(token));
    const bool full = sequence.outcome.usage.output_tokens == sequence.prompt->max_output;
    sequence.outcome.cut = full && !stopped;
    if (full || stopped) end(sequence, Status::completed);
}

// Lets text out up to the first stop string (then true), or to where one may begin.
bool AnswerWriter::pass_text(Sequence& sequence, std::string_view text) {
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

void AnswerWriter::emit_text(Sequence& sequence, std::string_view text) {
    if (text.empty()) return;
    sequence.outcome.text += text;
    if (sequence.reply->put_text(text)) desk_.announce(*sequence.reply);
}

void AnswerWriter::add_logprob(Sequence& sequence, std::span<const float> logits, Token token) {
    const Tokenizer& tokenizer = model_.tokenizer();
    TokenLogprob entry;
    const uint32_t count = std::min(sequence.prompt->top_logprobs, model_.spec().n_vocab);
    VALAR_ASSERT(count <= kMaxLogprobs);
    entry.logprob = logprob_of(logits, token, count, top_);
    entry.bytes = tokenizer.piece(token);
    for (uint32_t i = 0; i < count; ++i)
        entry.top.push_back({std::string(tokenizer.piece(top_[i].first)), top_[i].second});
    if (sequence.reply->put_logprob(entry)) desk_.announce(*sequence.reply);
    sequence.outcome.logprobs.push_back(std::move(entry));
}

void AnswerWriter::end(Sequence& sequence, Status status, std::optional<Error> error) {
    VALAR_ASSERT(!sequence.over && is_terminal(status));
    if (sequence.outcome.stopped_by.empty() && !pass_text(sequence, sequence.detokenizer.flush()))
        emit_text(sequence, sequence.held);
    sequence.over = true;
    Outcome& outcome = sequence.outcome;
    outcome.status = status;
    outcome.error = std::move(error);
    const uint64_t now = monotonic_ns();
    const uint64_t started = sequence.started_ns ? sequence.started_ns : now;
    const uint64_t first = sequence.first_token_ns ? sequence.first_token_ns : now;
    outcome.timings.queue_us = (started - sequence.queued_ns) / 1000;
    outcome.timings.prefill_us = (first - started) / 1000;
    outcome.timings.decode_us = (now - first) / 1000;
    desk_.count([&](ResponderStats& counts) { add_outcome(sequence, &counts); });
    if (sequence.reply->put_outcome(std::move(outcome))) desk_.announce(*sequence.reply);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

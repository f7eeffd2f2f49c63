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

void add_outcome(Sequence& sequence, ResponderStats* counts) {
    const Outcome& outcome = sequence.outcome;
    AnswerWriter::count(sequence, counts);
    ++(outcome.status == Status::completed ? counts->completed
       : outcome.status == Status::failed  ? counts->failed
                                           : counts->cancelled);
    counts->queue_us += outcome.timings.queue_us;
    counts->prefill_us += outcome.timings.prefill_us;
    counts->decode_us += outcome.timings.decode_us;
    if (sequence.waiting_ns == 0) --counts->running;
}

// What an answer may come to.
size_t text_room(const Sequence& sequence) {
    return (size_t{sequence.prompt->max_output - sequence.outcome.usage.output_tokens} + 1) * 4;
}

std::string& text_of(Item& item) {
    return item.is_call() ? item.arguments : item.content.front().text;
}

}  // namespace

void AnswerWriter::count(Sequence& sequence, ResponderStats* counts) {
    const Usage& now = sequence.outcome.usage;
    Usage& before = sequence.counted;
    const auto add = [](uint64_t* sum, uint32_t value, uint32_t* known) {
        *sum += value - std::exchange(*known, value);
    };
    const uint32_t read = std::max(sequence.reached, sequence.computed);
    add(&counts->input_tokens, std::min(read, now.input_tokens), &before.input_tokens);
    add(&counts->cached_tokens, now.cached_tokens, &before.cached_tokens);
    add(&counts->output_tokens, now.output_tokens, &before.output_tokens);
    counts->drafted_tokens += std::exchange(sequence.drafted, 0);
    counts->accepted_tokens += std::exchange(sequence.accepted, 0);
    counts->constrained_tokens += std::exchange(sequence.constrained, 0);
    counts->masks += std::exchange(sequence.masks, 0);
}

// All that grows later gets its room here: nothing is allocated for a token.
void AnswerWriter::begin(Sequence& sequence) {
    const uint32_t most = sequence.prompt->max_output;
    sequence.tokens.reserve(sequence.length() + most);
    sequence.held.reserve(2 * kMaxStopBytes);
    sequence.sampler.see_prompt(sequence.tokens, most);
    if (sequence.prompt->logprobs) sequence.outcome.logprobs.reserve(most);
    if (sequence.reply->put_start(text_room(sequence))) desk_.announce(*sequence.reply);
}

void AnswerWriter::tell_progress(const Sequence& sequence) {
    if (!sequence.prompt->progress) return;
    const Usage& usage = sequence.outcome.usage;
    const uint32_t read = std::max(sequence.reached, sequence.computed);
    if (sequence.reply->put_progress({usage.input_tokens, read, usage.cached_tokens}))
        desk_.announce(*sequence.reply);
}

void AnswerWriter::add_token(Sequence& sequence, Token token, std::span<const float> logits) {
    VALAR_ASSERT(!sequence.over);
    Outcome& outcome = sequence.outcome;
    const OutputParser& parser = *sequence.prompt->parser;
    if (sequence.prompt->logprobs && !model_.tokenizer().is_end(token))
        add_logprob(sequence, logits, token);
    const bool thought = parser.thinking();
    const bool ended = parse(sequence, token);
    outcome.usage.reasoning_tokens += thought || parser.thinking();
    const bool stopped = ended || !outcome.stopped_by.empty();
    const bool full = outcome.usage.output_tokens == sequence.prompt->max_output;
    outcome.cut = full && !stopped;
    if (full || stopped) end(sequence, Status::completed);
}

// True: the answer ends with this token.
bool AnswerWriter::parse(Sequence& sequence, Token token) {
    const Tokenizer& tokenizer = model_.tokenizer();
    const TokenKind kind = tokenizer.kind(token);
    OutputParser& parser = *sequence.prompt->parser;
    sequence_ = &sequence;
    const OutputMark mark{tokenizer.piece(token), kind == TokenKind::user_defined,
                          tokenizer.is_end(token)};
    if (mark.ends || kind == TokenKind::control) {
        parser.text(sequence.detokenizer.flush(false), *this);
        return parser.mark(mark, *this);
    }
    std::string_view text = sequence.detokenizer.push(token);
    if (!mark.is_text || !text.ends_with(mark.spelling)) {
        parser.text(text, *this);
        return false;
    }
    text.remove_suffix(mark.spelling.size());
    parser.text(text, *this);
    return parser.mark(mark, *this);
}

void AnswerWriter::begin_item(Item::Kind kind, std::string_view name) {
    Sequence& sequence = *sequence_;
    if (!sequence.outcome.stopped_by.empty()) return;
    VALAR_ASSERT(!sequence.item_open);
    const auto index = static_cast<uint32_t>(sequence.outcome.items.size());
    Item item;
    item.kind = kind;
    item.role = Role::assistant;
    item.name = name;
    if (item.is_call())
        item.call_id = derive_id("call_", sequence.reply->id + "/" + std::to_string(index));
    if (sequence.reply->put_item(Event::Kind::item_begun, index, item))
        desk_.announce(*sequence.reply);
    if (!item.is_call()) item.content.push_back({ContentPart::Kind::output_text, {}});
    text_of(item).reserve(text_room(sequence));
    sequence.outcome.items.push_back(std::move(item));
    sequence.item_open = true;
}

void AnswerWriter::extend_item(std::string_view text) {
    Sequence& sequence = *sequence_;
    if (!sequence.outcome.stopped_by.empty()) return;
    VALAR_ASSERT(sequence.item_open);
    const bool message = sequence.outcome.items.back().kind == Item::Kind::message;
    if (message && pass_text(sequence, text)) end_item();
    else if (!message) emit_text(sequence, text);
}

void AnswerWriter::end_item() {
    Sequence& sequence = *sequence_;
    if (!std::exchange(sequence.item_open, false)) return;
    emit_text(sequence, sequence.held);
    sequence.held.clear();
    const auto& items = sequence.outcome.items;
    const auto index = static_cast<uint32_t>(items.size() - 1);
    if (sequence.reply->put_item(Event::Kind::item_ended, index, items.back()))
        desk_.announce(*sequence.reply);
}

// Lets text of a message out up to the first stop string (then true), or to where one may begin.
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
    Item& item = sequence.outcome.items.back();
    text_of(item) += text;
    const auto index = static_cast<uint32_t>(sequence.outcome.items.size() - 1);
    const Event::Kind kind = item.is_call()                       ? Event::Kind::arguments_delta
                             : item.kind == Item::Kind::reasoning ? Event::Kind::reasoning_delta
                                                                  : Event::Kind::text_delta;
    if (sequence.reply->put_text(kind, index, text)) desk_.announce(*sequence.reply);
}

// An answer that came to its end has a message or a call: an empty message if it said nothing.
void AnswerWriter::finish_items(Sequence& sequence, bool whole) {
    sequence_ = &sequence;
    OutputParser& parser = *sequence.prompt->parser;
    auto& items = sequence.outcome.items;
    if (sequence.outcome.stopped_by.empty()) {
        parser.text(sequence.detokenizer.flush(), *this);
        parser.finish(whole, *this);
    }
    if (sequence.item_open && items.back().is_call()) {  // cut
        items.pop_back();
        sequence.item_open = false;
        whole = false;
    }
    const bool thought_alone = std::all_of(items.begin(), items.end(), [](const Item& item) {
        return item.kind == Item::Kind::reasoning;
    });
    if (whole && thought_alone) {
        end_item();
        begin_item(Item::Kind::message, {});
    }
    end_item();
    for (const Item& item : items)
        if (item.kind == Item::Kind::message) sequence.outcome.text += item.text();
}

void AnswerWriter::add_logprob(Sequence& sequence, std::span<const float> logits, Token token) {
    const Tokenizer& tokenizer = model_.tokenizer();
    TokenLogprob entry;
    const uint32_t count = std::min(sequence.prompt->top_logprobs, model_.spec().n_vocab);
    VALAR_ASSERT(count <= kMaxLogprobs);
    entry.logprob = logprob_of(logits, token, count, top_);
    entry.bytes = tokenizer.piece(token);
    entry.item = static_cast<uint32_t>(sequence.outcome.items.size() - sequence.item_open);
    for (uint32_t i = 0; i < count; ++i)
        entry.top.push_back({std::string(tokenizer.piece(top_[i].first)), top_[i].second});
    if (sequence.reply->put_logprob(entry)) desk_.announce(*sequence.reply);
    sequence.outcome.logprobs.push_back(std::move(entry));
}

void AnswerWriter::end(Sequence& sequence, Status status, std::optional<Error> error) {
    VALAR_ASSERT(!sequence.over && is_terminal(status));
    Outcome& outcome = sequence.outcome;
    finish_items(sequence, status == Status::completed && !outcome.cut);
    sequence.over = true;
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

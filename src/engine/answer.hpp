#pragma once

#include "engine/desk.hpp"

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- From tokens to the events of a reply ----------------------------------------------------

// Items, text up to a stop string, log-probabilities, the end. Threads: only the one that steps.
class AnswerWriter final : OutputSink {
public:
    AnswerWriter(const LoadedModel& model, Desk& desk) : model_(model), desk_(desk) {}

    /// Makes room for all that comes, and tells the reply that it is under way.
    void begin(Sequence& sequence);
    /// How far its prompt is read, if it asked for that.
    void tell_progress(const Sequence& sequence);
    /// A token drawn from these logits. The end, a stop string or the limit ends the answer.
    void add_token(Sequence& sequence, Token token, std::span<const float> logits);
    /// The reply learns the end; the sequence is `over`.
    void end(Sequence& sequence, Status status, std::optional<Error> error = {});
    /// What came since the last time goes to the statistics, so that they grow while tokens are made.
    static void count(Sequence& sequence, ResponderStats* counts);

private:
    void begin_item(Item::Kind kind, std::string_view name) override;
    void extend_item(std::string_view text) override;
    void end_item() override;
    bool parse(Sequence& sequence, Token token);
    void finish_items(Sequence& sequence, bool whole);
    bool pass_text(Sequence& sequence, std::string_view text);
    void emit_text(Sequence& sequence, std::string_view text);
    void add_logprob(Sequence& sequence, std::span<const float> logits, Token token);

    const LoadedModel& model_;
    Desk& desk_;
    Sequence* sequence_ = nullptr;  // whose parser tells of items
    std::pair<Token, float> top_[kMaxLogprobs];
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

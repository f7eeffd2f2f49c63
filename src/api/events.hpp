// A response as the events of a stream.
#pragma once

#include "api_internal.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// Writes the events of POST /v1/responses with `stream`, as OpenAI has them: what happened to one
/// response goes in, in order, and text/event-stream (WHATWG, 9.2.6) comes out; LF only, each event
/// whole. Objects are passed as text: they are rendered once, and not here.
/// Threads: one at a time.
class ResponseEvents {
public:
    ResponseEvents(std::string id, std::string message_id, const DialectWords& words)
        : id_(std::move(id)), message_id_(std::move(message_id)), words_(words) {}

    /// It is accepted: the object as it is now, and as it will be once it is begun.
    void begin(const std::string& pending, std::string running);
    /// Anything but `finished`.
    void add(const Event& event);
    /// The rest of the items, and the event that ends the stream. What was not streamed (a replay, a
    /// Responder that tells only the end) comes in one piece.
    void end(const Outcome& outcome, const std::string& object);

    /// Ends the stream of one that cannot be answered.
    void fail(const Error& error);
    /// Leaves out the events up to this one, but never the last.
    void skip_to(uint64_t sequence_number) { skipped_ = sequence_number + 1; }
    size_t size() const { return text_.size(); }
    std::string take() { return std::exchange(text_, {}); }

private:
    struct Kind;
    static const Kind kinds[];
    const Kind& kind() const;
    Json event(std::string_view type);
    Json item_event(std::string_view type);
    void emit(const Json& event, std::string_view object = {});
    Json item(const char* status = nullptr) const;
    void start();
    void open(Item item, size_t index);
    void extend(std::string_view text, const std::vector<TokenLogprob>& logprobs);
    void close(const char* status);

    std::string id_, message_id_, running_, text_;
    const DialectWords& words_;
    uint64_t sequence_number_ = 0, skipped_ = 0;
    Item item_ = {};  // open, with its text so far
    std::string item_id_;
    std::vector<TokenLogprob> logprobs_;  // of that item
    size_t index_ = 0, begun_ = 0;        // of the open item; items so far
    bool open_ = false, first_message_ = true;
};

/// All events of a response that has ended, from its object, but those up to `after` (UINT64_MAX:
/// none): as many as there would have been had it come in one piece.
std::string replay_events(const std::string& object, Dialect dialect, uint64_t after);

}  // namespace detail
}  // namespace v1
}  // namespace valar

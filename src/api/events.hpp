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

/// Writes what happened to one response, which goes in in order, as the events of a surface
/// (text/event-stream, WHATWG HTML 9.2.6): LF only, each event whole.
/// Threads: one at a time.
class EventWriter {
public:
    virtual ~EventWriter() = default;
    /// It is accepted: the response object as it is now.
    virtual void begin(const Json& object) = 0;
    /// Anything but `finished`.
    virtual void add(const Event& event) = 0;
    /// The rest of the items, and what ends the stream. What was not streamed (a replay, a Responder
    /// that tells only the end) comes in one piece. `object`: of the response, rendered.
    virtual void end(const Outcome& outcome, const std::string& object) = 0;
    /// Ends the stream of one that cannot be answered, or, where it `goes_on`, not in this stream.
    virtual void fail(const Error& error, bool goes_on = false) = 0;
    /// Leaves out the events up to this one, but never the last.
    virtual void skip_to(uint64_t /*sequence_number*/) {}

    void set_echo(std::string text) { echo_ = std::move(text); }
    size_t size() const { return text_.size(); }
    std::string take() { return std::exchange(text_, {}); }

protected:
    /// Tokens may come before the item that they are of, or with another's text.
    void keep_tokens(const std::vector<TokenLogprob>& tokens) {
        waiting_.insert(waiting_.end(), tokens.begin(), tokens.end());
    }
    /// Those of an item, taken.
    std::vector<TokenLogprob> tokens_of(size_t item);

    std::string text_, echo_;

private:
    std::vector<TokenLogprob> waiting_;
};

/// The events of POST /v1/responses with `stream`, as OpenAI has them.
class ResponseEvents : public EventWriter {
public:
    ResponseEvents(std::string id, std::string message_id, const DialectWords& words)
        : id_(std::move(id)), message_id_(std::move(message_id)), words_(words) {}

    void begin(const Json& object) override;
    void add(const Event& event) override;
    void end(const Outcome& outcome, const std::string& object) override;
    void fail(const Error& error, bool goes_on = false) override;
    void skip_to(uint64_t sequence_number) override { skipped_ = sequence_number + 1; }

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

    std::string id_, message_id_, running_;
    const DialectWords& words_;
    uint64_t sequence_number_ = 0, skipped_ = 0;
    Item item_ = {};  // open, with its text so far
    std::string item_id_;
    std::vector<TokenLogprob> logprobs_;  // of that item
    size_t index_ = 0, begun_ = 0;        // of the open item; items so far
    bool open_ = false, first_message_ = true, started_ = false;
};

/// By the names that llama.cpp's server gives them.
Json render_progress(const PromptProgress& progress);

/// What became of a response that has ended, from its object.
Outcome outcome_of(const Json& object);

}  // namespace detail
}  // namespace v1
}  // namespace valar

// What is asked of another server, and its answer as events.
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

/// What a request becomes.
struct UpstreamCall {
    std::string target = {}, body = {};  ///< the target below /v1
    std::vector<std::string> stop = {};
    uint32_t max_calls = UINT32_MAX;
};
/// For a server whose models are owned by `owner`, which tells what it understands.
/// Errors: what it has no words for.
Result<UpstreamCall> upstream_call(const Request& request, std::string_view owner);

Error upstream_error(std::string_view why);
/// What it says of an error, as far as it is shown: a line.
std::string upstream_said(const Json& message);

/// Reads the chunks of one answer. Threads: one at a time.
class UpstreamAnswer {
public:
    explicit UpstreamAnswer(const UpstreamCall& call) : call_(call) {}
    /// What happened with this chunk. Errors: upstream_error.
    Result<void> add(const Json& chunk, std::vector<Event>* events);
    /// It said why it ended: what comes now is the end.
    bool is_over() const { return over_; }
    /// The rest of the items, and all of it, completed.
    Outcome finish(std::vector<Event>* events);
    /// As far as it came.
    Outcome broken(Status status, Error error);

private:
    Result<void> add_calls(const Json& calls, std::vector<Event>* events);
    void add_text(Item::Kind kind, std::string_view text, std::vector<TokenLogprob> tokens,
                  std::vector<Event>* events);
    void open(Item item, std::vector<Event>* events);
    void close(std::vector<Event>* events);
    std::vector<TokenLogprob> read_tokens(const Json& logprobs) const;

    const UpstreamCall& call_;
    Outcome outcome_ = {};
    bool open_ = false, over_ = false, skips_ = false;
    int64_t call_index_ = -1;  // of the call that is open
    uint32_t calls_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

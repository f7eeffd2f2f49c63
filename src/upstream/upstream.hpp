// >>upstream
// Owns: a Responder that has its answers from other servers, which speak OpenAI's Chat Completions:
//       vLLM, SGLang, llama-server, another valar.
// Assumes: servers that stream; a valar speaks the openai dialect.
// Promises: a request goes to the least busy server that has its model, and to another one only as
//           long as nothing was answered; what a server sends may be anything.
#pragma once

#include "api.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace valar {
inline namespace v1 {

/// Which servers answer. What a caller types first stands first.
struct UpstreamOptions {
    std::vector<std::string> urls = {};     ///< "http://host:8000", or with /v1; "unix:/path"
    std::string key = {};                   ///< of all of them, sent as Authorization: Bearer
    uint32_t max_running = 256;             ///< at one server at once; what is beyond waits
    uint32_t max_queued = 1000;             ///< of those that wait; then `overloaded`
    uint32_t refresh_ms = 10'000;           ///< between two lists of a server's models
    uint32_t retry_ms = 1'000;              ///< the same, of one that does not answer
    uint32_t silence_timeout_ms = 300'000;  ///< without a byte of an answer; then it has failed
    LogSink log = {};                       ///< which server comes, goes or fails
};

/// Asks other servers. Models are listed that any of them had; one is ready while a server that has
/// it answers: a request in the background waits for that, others fail with upstream_error.
/// Movable handle. Threads: any.
class VALAR_API Upstream {
public:
    /// Asks each server for its models; waits until all have answered, or 5 seconds.
    /// Errors: invalid_request names the option; io. Servers that are down are none.
    static Result<Upstream> open(const UpstreamOptions& options);
    Upstream(Upstream&& other) noexcept;
    Upstream& operator=(Upstream&& other) noexcept;
    ~Upstream();  ///< closes what is open

    Responder* responder();  ///< as long as this lives

private:
    struct State;
    explicit Upstream(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

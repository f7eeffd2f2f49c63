// Calls to other servers, from an event loop.
#pragma once

#include "http/internal.hpp"
#include "http/url.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint64_t http_client_tag = uint64_t{1} << 63;  // of its sockets in the poller
inline constexpr uint64_t http_no_deadline = UINT64_MAX;
inline constexpr uint32_t http_connect_ms = 10'000;  // for one address; then the next is tried

/// Calls that are in progress, on the poller and in the thread of who has it. A name is resolved on
/// a thread of its own, each of its addresses is judged, and one that was is dialled; of several the
/// next where one does not answer. No redirect is followed, no proxy is asked. The connection is
/// plain: TLS would come between Exchange and its Socket, in read(), write() and connected().
/// Threads: one at a time. The caller of each call must outlive it, or the client.
class HttpClient {
public:
    explicit HttpClient(Poller* poller, HttpResolve resolve = net_resolve);
    ~HttpClient();  ///< what is in progress is dropped; waits for a name that is being resolved
    HttpClient(const HttpClient&) = delete;

    /// Begins a call; on_reply tells how it went, in a later step() or on_event().
    uint64_t start(HttpErrand errand, HttpCaller* caller);
    void on_event(const PollEvent& event);  ///< whose tag holds http_client_tag
    void step(uint64_t now_ms);             ///< once a turn, after all events
    uint64_t deadline() const;              ///< when step() has to be called again at the latest

private:
    struct Exchange;
    struct Resolver;
    void take_addresses();
    void dial(Exchange& exchange);
    void watch(Exchange& exchange);
    void finish(Exchange& exchange, Result<HttpReply> reply);

    Poller* poller_;
    HttpResolve resolve_;
    std::unique_ptr<Resolver> resolver_;  // from the first name on
    std::vector<std::unique_ptr<Exchange>> exchanges_;
    uint64_t serial_ = 0;
    uint64_t now_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

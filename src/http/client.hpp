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
inline constexpr uint32_t http_unused_ms = 4'000;    // of a connection left open: servers wait 5 s
inline constexpr size_t http_most_unused = 256;      // of those; then the oldest is closed

/// Calls that are in progress, on the poller and in the thread of who has it. A name is resolved on
/// a thread of its own, each of its addresses is judged, and one that was is dialled; of several the
/// next where one does not answer. No redirect is followed, no proxy is asked. Connections are left
/// open where an errand says so. They are plain: TLS would come between Exchange and its Socket, in
/// read(), write() and connected().
/// Threads: one at a time. The caller of each call must outlive it, or the client.
class HttpClient {
public:
    explicit HttpClient(Poller* poller, HttpResolve resolve = net_resolve);
    ~HttpClient();  ///< what is in progress is dropped; waits for a name that is being resolved
    HttpClient(const HttpClient&) = delete;

    /// Begins a call; on_reply tells how it went, in a later step() or on_event().
    uint64_t start(HttpErrand errand, HttpCaller* caller);
    void cancel(uint64_t call);             ///< nothing is told of it any more; closes with step()
    void on_event(const PollEvent& event);  ///< whose tag holds http_client_tag
    void step(uint64_t now_ms);             ///< once a turn, after all events
    uint64_t deadline() const;              ///< when step() has to be called again at the latest

private:
    struct Exchange;
    struct Resolver;
    struct Unused;
    Exchange* find(uint64_t number) const;
    void begin(Exchange& exchange);
    Result<void> locate(Exchange& exchange);
    void take_addresses();
    template <class Which>
    void close_unused(const Which& which);
    bool take_unused(Exchange& exchange);
    void leave_open(Exchange& exchange);
    void dial(Exchange& exchange);
    void watch(Exchange& exchange);
    void lose(Exchange& exchange);
    void finish(Exchange& exchange, Result<HttpReply> reply);

    Poller* poller_;
    HttpResolve resolve_;
    std::unique_ptr<Resolver> resolver_;                // from the first name on
    std::vector<std::unique_ptr<Exchange>> exchanges_;  // by number
    std::vector<Unused> unused_;                        // connections left open, the oldest first
    uint64_t serial_ = 0;
    uint64_t now_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

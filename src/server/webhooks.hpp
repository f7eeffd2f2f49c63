// What a server tells others of its own accord: that a response has ended.
#pragma once

#include "api.hpp"
#include "http/client.hpp"
#include "store/store.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

struct ServerLoop;

inline constexpr uint32_t webhook_retry_s[] = {1, 5, 25};  // after a try that failed
inline constexpr uint32_t webhook_tries = 4;
inline constexpr double webhook_jitter = 0.2;  // of that time, more or less
inline constexpr int webhook_timeout_ms = 30'000;
inline constexpr uint64_t webhook_reply_bytes = 64 << 10;  // that are read, and dropped
inline constexpr size_t webhook_most_active = 16, webhook_most_per_host = 2;
inline constexpr size_t webhook_most_queued = 10'000;  // of an organisation
inline constexpr std::string_view webhook_prefix = "hook_";

/// The header fields of a delivery, signed at that time where there is a token.
HttpHeaders webhook_headers(const std::string& response_id, std::string_view token,
                            std::string_view body, int64_t unix_s);

/// The deliveries. Each has a record of its own that is kept, "hook_" and the response's id, from
/// before the response's own record on until it was delivered or given up: with URL and token, which
/// stand nowhere else in the store. It is due once its response is terminal in the store, whose
/// object is the body. Where that is deleted meanwhile the body becomes the delivery's own object.
/// Threads: the loop's; read() is for workers.
class Webhooks : HttpCaller {
public:
    explicit Webhooks(ServerLoop* loop) : loop_(loop) {}
    void open();  ///< once the server listens

    /// What is to be kept for a request's webhook; empty: it has none. Errors: invalid_request or
    /// permission: its URL cannot be used.
    Result<std::string> read(const Request& request) const;
    /// `what`: a response, or a batch with so many of them.
    void refuse(const char* what, const std::string& id, const Error& why, size_t count = 1);
    void keep(const std::string& id, const std::string& organisation, std::string head);
    void forget(const std::string& id, const std::string& organisation);
    /// The response's end is in the store.
    void begin(const std::string& id, const std::string& organisation);
    bool has(const std::string& id) const { return deliveries_.count(id) != 0; }
    /// Its response is about to be deleted.
    void keep_body(const std::string& id, std::shared_ptr<const std::string> body);
    void recover(StoredResponse stored);  ///< a delivery's record that the last process left
    void recover_all();                   ///< after all of them, and the responses
    void on_tick(uint64_t now_ns);

    // for metrics
    size_t queued() const { return deliveries_.size(); }
    const std::map<std::string, uint64_t>& ended() const { return ended_; }
    uint64_t tried() const { return tried_; }

private:
    struct Delivery {
        std::string organisation = {}, host = {};
        uint32_t tries = 0;
        uint64_t began_ns = 0;
        int status = 0;  // of the last try; 0: none came
    };
    struct Host {
        size_t active = 0;
        bool ready = false;                    // is in ready_
        std::deque<std::string> waiting = {};  // ids
    };
    struct HookJob;

    void send(const std::string& id, const Delivery& delivery, bool tries);
    Result<void> load(HookJob& job) const;
    void loaded(HookJob& job);
    void begin_again(const std::string& id, const StoredResponse& stored);
    void queue(const std::string& id, const Delivery& delivery);
    void offer(const std::string& name, Host& host);
    void run();
    void on_reply(uint64_t call, Result<HttpReply> reply) override;
    void end_try(const std::string& id, Result<HttpReply> reply);
    void retry(const std::string& id, const Delivery& delivery);
    void end(const std::string& id, const char* outcome, const std::string& error = {});

    ServerLoop* loop_;
    NetPolicy policy_;
    std::unordered_map<std::string, Delivery> deliveries_;  // by the id of the response
    std::map<std::string, size_t> counts_;                  // of those, by organisation
    std::map<std::string, Host> hosts_;
    std::deque<std::string> ready_;  // hosts that may get one more
    size_t active_ = 0;
    std::multimap<uint64_t, std::string> later_;       // tries again, by when
    std::unordered_map<uint64_t, std::string> calls_;  // in progress
    std::vector<StoredResponse> left_;                 // of before a restart
    std::map<std::string, uint64_t> ended_;            // by outcome
    uint64_t tried_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

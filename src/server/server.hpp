// >>server
// Owns: the routes of the Responses API: who may ask, what is asked, what is answered. Joins http,
//       a Store and any Responder; knows no engine.
// Assumes: Responders that outlive it, and a thread that calls run() or step().
// Promises: one order of checks (ServerLoop::on_head, accept); an envelope and an X-Request-ID on
//           every reply; the loop never waits (two workers parse, validate, prepare and render);
//           a terminal object is rendered once; no body, prompt or key is ever logged.
#pragma once

#include "api.hpp"
#include "store/store.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace valar {
inline namespace v1 {

/// Which addresses webhooks may call; the server's own only under `any`. automatic: loopback_only
/// without keys on a loopback address, else public_only (what IANA has as global unicast).
enum class WebhookPolicy : uint8_t { automatic, any, loopback_only, public_only };

struct ApiKey {                            ///< who may use a server
    std::string id = {};                   ///< for people: names the key, not secret
    std::string organisation = "default";  ///< whose records these are
    std::string secret = {};               ///< 16 visible ASCII characters or more; not kept
    std::string secret_sha256 = {};        ///< in place of the secret: 64 hex digits
    uint32_t requests_per_minute = 0;      ///< then 429 with Retry-After; 0: no limit
};

/// Reads a file of keys: a line each, `id organisation sha256 [requests-per-minute]`; empty lines
/// and those that begin with # are skipped. Errors: bad_data: a line, or no key; io, not_found;
/// permission: others may read or write it (its group: write it), unless `insecure`.
VALAR_API Result<std::vector<ApiKey>> read_key_file(const std::string& path, bool insecure = false);
/// Puts secret_sha256 in the place of the secret, which is overwritten. Errors: invalid_request.
VALAR_API Result<void> hash_secret(ApiKey* key);

/// What a server is made of. What a caller types first stands first.
struct ServerOptions {
    uint16_t port = 8080;            ///< 0: any free one
    std::string host = "127.0.0.1";  ///< a numeric address, "localhost" or "unix:/path" (0660)
    std::vector<ApiKey> keys = {};   ///< none: anybody on this machine, organisation "default"
    bool allow_open = false;  ///< listen beyond loopback addresses although there are no keys
    /// Without keys the Host must be localhost, 127.0.0.1, [::1] or one of these ("name[:port]").
    std::vector<std::string> allowed_hosts = {};
    /// Web pages of these origins ("https://example.org") may call. All others may not.
    std::vector<std::string> cors_origins = {};
    Dialect dialect = Dialect::valar;
    uint32_t sync_timeout_ms = 600'000;            ///< then 504, and the work goes on; 0: never
    uint32_t drain_timeout_ms = 10'000;            ///< after stop(), for what runs: Server::stop
    uint64_t max_body_bytes = uint64_t{32} << 20;  ///< 413
    uint32_t max_connections = 10'000;             ///< an idle one makes room, else 503
    uint64_t max_inflight_body_bytes = uint64_t{512} << 20;  ///< 503
    /// A line a request: ids, client, path, status, times, tokens, why not. It must not wait.
    LogSink log = {};
    /// Must outlive the server; null: a MemoryStore of its own. What it holds unfinished runs again
    /// with the same seed if it is in the background or has an idempotency key, or else has failed.
    Store* store = nullptr;
    MemoryStoreOptions memory_store = {};  ///< of that one
    uint32_t max_queued = 1000;            ///< requests accepted but not begun; then 503
    bool log_json = false;                 ///< each of the server's lines is a JSON object
    bool require_keys = false;             ///< `keys` must not be empty: where a setting names them
    bool log_health = false;               ///< lines for GET /health and /metrics, too
    uint64_t (*log_lost)(void* context) = nullptr;  ///< lines that `log` lost, for /metrics
    /// Requests come by a proxy, which says in X-Forwarded-For (or Forwarded) whose they are. Else
    /// one without keys refuses what a proxy passed on: all the world would be on this machine.
    bool trust_proxy = false;
    uint32_t keep_alive_ms = 75'000;  ///< of a connection without a request; then closed
    uint32_t orphans_ms = 3'600'000;  ///< that work left for a missing model waits; then it fails
    WebhookPolicy webhook_policy = WebhookPolicy::automatic;
};

/// Serves Responders over HTTP. Movable handle over an object with a stable address.
/// Threads: any for stop(), port() and replace_keys(), else one at a time. Stack: 29 KiB.
class VALAR_API Server {
public:
    /// Listens. Errors: invalid_request names the option; io.
    static Result<Server> open(Responder* responder, const ServerOptions& options = {});
    /// A request goes to the first Responder that has its model.
    static Result<Server> open(std::span<Responder* const> responders,
                               const ServerOptions& options = {});
    Server(Server&& other) noexcept;
    Server& operator=(Server&& other) noexcept;
    ~Server();  ///< closes what is open and cancels what runs

    /// Serves until stop() and what that lets finish. Errors: none yet.
    Result<void> run();
    /// Serves what is ready, waiting at most timeout_ms for it (-1: until something happens). False
    /// once stopped and drained. Errors: none yet.
    Result<bool> step(int timeout_ms);
    /// Answers new requests with 503 and lets what runs finish for drain_timeout_ms (at_once: no
    /// more). Then who waits gets 503, and what runs ends; in the background, or with an
    /// idempotency key, it goes on with the next start on the same store.
    void stop(bool at_once = false);
    uint16_t port() const;  ///< 0: a Unix socket
    /// In place of all keys so far, at least one. Whoever has none of them is refused from the next
    /// request on; what he began goes on, in the background too. A key that stays has used up what
    /// it had of its minute. Errors: invalid_request, and nothing changes. Threads: any.
    Result<void> replace_keys(const std::vector<ApiKey>& keys);

private:
    struct State;
    explicit Server(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

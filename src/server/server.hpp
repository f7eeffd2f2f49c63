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

struct ApiKey {                            ///< who may use a server
    std::string id = {};                   ///< for people: names the key, not secret
    std::string organisation = "default";  ///< whose records these are
    std::string secret = {};               ///< 16 visible ASCII characters or more; not kept
    std::string secret_sha256 = {};        ///< in place of the secret: 64 hex digits
    uint32_t requests_per_minute = 0;      ///< then 429 with Retry-After; 0: no limit
};

/// Reads a file of keys: a line each, `id organisation sha256 [requests-per-minute]`; empty lines
/// and those that begin with # are skipped. Errors: bad_data: a line, or no key; io, not_found.
VALAR_API Result<std::vector<ApiKey>> read_key_file(const std::string& path);

/// What a server is made of. What a caller types first stands first.
struct ServerOptions {
    uint16_t port = 8080;            ///< 0: any free one
    std::string host = "127.0.0.1";  ///< a numeric address or "localhost"
    std::vector<ApiKey> keys = {};   ///< none: anybody on this machine, organisation "default"
    bool allow_open = false;  ///< listen beyond loopback addresses although there are no keys
    /// Without keys the Host must be localhost, 127.0.0.1, [::1] or one of these ("name[:port]").
    std::vector<std::string> allowed_hosts = {};
    /// Web pages of these origins ("https://example.org") may call. All others may not.
    std::vector<std::string> cors_origins = {};
    Dialect dialect = Dialect::valar;
    uint32_t sync_timeout_ms = 600'000;  ///< then 504, and the work goes on
    uint32_t drain_timeout_ms = 10'000;  ///< after stop(); then what still runs is cancelled
    uint64_t max_body_bytes = uint64_t{32} << 20;            ///< 413
    uint32_t max_connections = 10'000;                       ///< an idle one makes room, else 503
    uint64_t max_inflight_body_bytes = uint64_t{512} << 20;  ///< 503
    LogSink log = {};  ///< a line a request: id, method, path, status, times, tokens
    /// Must outlive the server; null: a MemoryStore of its own. What it holds unfinished runs again
    /// with the same seed if it is in the background or has an idempotency key, or else has failed.
    Store* store = nullptr;
    MemoryStoreOptions memory_store = {};  ///< of that one
    uint32_t max_queued = 1000;            ///< requests accepted but not begun; then 503
    bool log_json = false;                 ///< the lines of requests are JSON objects
    bool require_keys = false;             ///< `keys` must not be empty: where a setting names them
};

/// Serves Responders over HTTP. Movable handle over an object with a stable address.
/// Threads: stop() and port() from any; step(), run() and the destructor from one at a time.
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

    /// Serves until stop(), then lets what runs finish (drain_timeout_ms). Errors: none yet.
    Result<void> run();
    /// Serves what is ready, waiting at most timeout_ms for it (-1: until something happens). False
    /// once stopped and drained. Errors: none yet.
    Result<bool> step(int timeout_ms);
    void stop();
    uint16_t port() const;

private:
    struct State;
    explicit Server(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar

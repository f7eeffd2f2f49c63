// >>http
// Owns: HTTP/1.1 (RFC 9110, RFC 9112): the message parser, the event loop of a server, and a small
//       client, blocking or in that loop.
// Assumes: a handler that never blocks; what bodies mean is the handler's business, error bodies
//          included: http hands over status, code and message.
// Promises: framing that is ambiguous is refused, never guessed; every byte, second and connection
//           is bounded by a named limit; an idle connection costs less than 1 KB.
#pragma once

#include "base/base.hpp"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {

/// Header fields in order of arrival.
using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

/// A reply, sent or received. The server adds Date, Content-Length and Connection by itself.
struct HttpReply {
    int status = 200;
    HttpHeaders headers;
    std::string body;
    bool close = false;  ///< end the connection after this reply
};

/// One request of the blocking client.
struct HttpCall {
    std::string host = "127.0.0.1";  ///< a numeric address, "localhost" or "unix:/path"
    uint16_t port = 80;
    std::string method = "GET";
    std::string target = "/";
    HttpHeaders headers = {};
    std::string body = {};
    int timeout_ms = 600'000;  ///< for the whole call
    uint64_t max_reply_bytes = uint64_t{64} << 20;
};

/// Sends one request on a connection of its own and waits for the whole reply, whatever its status.
/// Errors: invalid_request (the call itself), io, timeout, bad_data (not HTTP), too_large.
/// Threads: any. Stack: 24 KiB.
VALAR_API Result<HttpReply> http_call(const HttpCall& call);

}  // namespace v1
}  // namespace valar

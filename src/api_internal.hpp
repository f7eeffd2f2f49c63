#pragma once

#include "api.hpp"
#include "digest_internal.hpp"
#include "json_internal.hpp"

#include <cstddef>
#include <iterator>
#include <optional>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// A response as GET /v1/responses/{id} shows it: the request's echo and what became of it.
struct ResponseRecord {
    std::string id;  ///< "resp_" + 24 of [0-9a-z]
    std::string organisation;
    std::string message_id;    ///< "msg_" + 24 of [0-9a-z]
    int64_t created_at = 0;    ///< unix seconds
    int64_t completed_at = 0;  ///< 0 until terminal
    Status status = Status::pending;
    std::string model;       ///< as the request spelled it
    Json request = {};       ///< the body as received, for the echoed fields
    double temperature = 1;  ///< effective
    double top_p = 1;
    int64_t seed = 0;
    std::shared_ptr<const Outcome> outcome = {};  ///< once terminal
};

/// A body of POST /v1/responses, checked in a fixed order: missing required fields in table
/// order, other fields in document order, rules across fields. Errors: invalid_request with code
/// and param; the message says what is wrong, what was received and what is allowed.
Result<Request> parse_response_request(const Json& body, Dialect dialect = Dialect::valar);
/// The response object, all its keys in their order.
Json render_response(const ResponseRecord& record, Dialect dialect = Dialect::valar);
/// The items of a request's input as GET /v1/responses/{id}/input_items lists them, oldest first:
/// in their long form, those without an id with one made of `response_id` and their place.
std::vector<Json> render_input_items(const Json& request, const std::string& response_id);
/// {"error":{message,type,param,code}}. A message that was not written for clients, which is one
/// without a code, and that of our own fault (500) stay here: they may name a file.
Json render_error(const Error& error);
/// The HTTP status of an error: its kind's, but for two codes (the tables in api.cpp).
int http_status(const Error& error);

struct DialectWords {
    const char *pending, *running;
    const char* cut;       // the status of an answer that was cut
    const char* cut_item;  // and of its message
    bool echo;             // `input` and `user`
    bool usage_extras;
    const char* failure;  // the code of a failed response; null: the error's own
};

const DialectWords& words_of(Dialect dialect);
const char* status_name(Status status, bool cut, const DialectWords& words);

/// The words of a Role on the wire, which are those of chat templates too.
inline constexpr std::string_view kRoleNames[] = {"system",    "developer", "user",
                                                  "assistant", "tool",      "function"};
static_assert(std::size(kRoleNames) == static_cast<size_t>(Role::function) + 1);
constexpr std::string_view role_name(Role role) { return kRoleNames[static_cast<size_t>(role)]; }
constexpr std::optional<Role> role_named(std::string_view name) {
    for (size_t i = 0; i < std::size(kRoleNames); ++i)
        if (kRoleNames[i] == name) return static_cast<Role>(i);
    return std::nullopt;
}

/// The words of a Window on the wire, and the field that holds them.
inline constexpr std::string_view kWindowNames[] = {"asap", "standard", "flex"};
static_assert(std::size(kWindowNames) == static_cast<size_t>(Window::flex) + 1);
inline constexpr std::string_view kWindowKey = "completion_window";  // in a request's metadata
inline constexpr const char* kWindowField = "metadata.completion_window";
constexpr std::string_view window_name(Window window) {
    return kWindowNames[static_cast<size_t>(window)];
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

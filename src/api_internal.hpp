#pragma once

#include "api.hpp"
#include "digest_internal.hpp"
#include "json_internal.hpp"

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// A response as GET /v1/responses/{id} shows it: the request's echo and what became of it.
struct ResponseRecord {
    std::string id;  ///< "resp_" + 24 of [0-9a-z]
    std::string organisation;
    std::string message_id;    ///< of the first one, see first_message_id
    int64_t created_at = 0;    ///< unix seconds
    int64_t completed_at = 0;  ///< 0 until terminal
    Status status = Status::pending;
    std::string model;       ///< as the request spelled it
    Json request = {};       ///< the body as received, for the echoed fields
    double temperature = 1;  ///< effective
    double top_p = 1;
    int64_t seed = 0;
    uint32_t input_tokens = 0;                    ///< of the prompt; not kept
    std::string key = {};                         ///< id of the API key that asked
    Json raw = {};                                ///< of a prompt past the template
    std::string conversation_last = {};           ///< the item of it before the request's own
    std::shared_ptr<const Outcome> outcome = {};  ///< once terminal
};

// ---- The options of a request, each a row: read, validated, kept, saved and documented from it --

/// How tokens are drawn, with all that a request left open filled in. In this order, as Hugging
/// Face has it: penalties and bias; the tokens that are allowed; logits / temperature; the top_k
/// most likely; of those the fewest that together reach top_p; of those the ones at least min_p
/// times as likely as the first.
struct Sampling {
    double temperature = 1;  ///< 0: greedy
    double top_p = 1;
    double min_p = 0;
    uint32_t top_k = 0;  ///< 0: no limit
    int64_t seed = 0;
    double presence_penalty = 0;  ///< as in Request
    double frequency_penalty = 0;
    double repetition_penalty = 1;
    std::vector<std::pair<int32_t, float>> logit_bias = {};
};

/// An option that is a number. `open`: what is not set is the model's own.
struct NumberOption {
    const char* name;
    double least, most;
    std::optional<double> Request::*open;
    double Request::*fixed;
    double Sampling::*resolved;
    const char* about;
};
inline constexpr NumberOption number_options[] = {
    // clang-format off
    {"temperature", 0, 2, &Request::temperature, nullptr, &Sampling::temperature,
     "How freely tokens are drawn; 0 is greedy. Default: the model's own, else 1."},
    {"top_p", 0, 1, &Request::top_p, nullptr, &Sampling::top_p,
     "Draws from the likeliest tokens that reach this together. Default: the model's own, else 1."},
    {"min_p", 0, 1, &Request::min_p, nullptr, &Sampling::min_p,
     "Leaves out tokens less likely than this part of the likeliest."},
    {"presence_penalty", -2, 2, nullptr, &Request::presence_penalty, &Sampling::presence_penalty,
     "Off the logit of every token that the answer has."},
    {"frequency_penalty", -2, 2, nullptr, &Request::frequency_penalty, &Sampling::frequency_penalty,
     "The same, times how often it has it."},
    {"repetition_penalty", 0.1, 10, nullptr, &Request::repetition_penalty, &Sampling::repetition_penalty,
     "Divides logits above 0, multiplies those below, of every token so far."},
    // clang-format on
};

/// An option that is a count; one without a limit of its own is cut to what it can hold.
struct CountOption {
    const char* name;
    uint32_t least, most;
    std::optional<uint32_t> Request::*open;
    uint32_t Request::*fixed;
    const char* about;
};
inline constexpr uint32_t kMaxLogprobs = 20;
inline constexpr CountOption count_options[] = {
    {"max_output_tokens", 1, UINT32_MAX, &Request::max_output_tokens, nullptr,
     "Of the answer, thoughts included. Default: until the context is full."},
    {"max_tool_calls", 1, UINT32_MAX, &Request::max_tool_calls, nullptr, "Of the answer, at most."},
    {"top_k", 0, UINT32_MAX, &Request::top_k, nullptr,
     "Draws from so many of the likeliest tokens; 0: no limit."},
    {"top_logprobs", 0, kMaxLogprobs, nullptr, &Request::top_logprobs,
     "Alternatives that are told of each token."},
};

/// Its value; nothing where it is the model's own.
template <class Row>
auto option_value(const Row& row, const Request& request) {
    return row.open ? request.*row.open : std::optional(request.*row.fixed);
}

/// An option that is a text of so many characters, and one that is a switch.
struct TextOption {
    const char* name;
    size_t least, most;
    std::string Request::*field;
    const char* about;
};
inline constexpr TextOption text_options[] = {
    {"model", 1, SIZE_MAX, &Request::model, "Id or alias of a model that is served."},
    {"instructions", 0, SIZE_MAX, &Request::instructions, "Becomes the first system message."},
    {"prompt_cache_key", 0, SIZE_MAX, &Request::prompt_cache_key,
     "Prefixes of requests with one key are kept together."},
    {"user", 0, 256, &Request::user, "Whom it is for; kept with the response."},
};
struct SwitchOption {
    const char* name;
    bool Request::*field;
    const char* about;
};
inline constexpr SwitchOption switch_options[] = {
    {"background", &Request::background, "Answered at once with 202; GET shows how far it is."},
    {"parallel_tool_calls", &Request::parallel_tool_calls, "False: at most one call."},
};

inline constexpr size_t kMaxStops = 16;  // stop strings of a request, and their bytes
inline constexpr size_t kMaxStopBytes = 256;
inline constexpr double kMaxBias = 100;

/// Of ErrorKind::closed: another server, which was to answer, failed.
inline constexpr const char* upstream_error_code = "upstream_error";
/// What is wrong with a field, or nothing.
using Fault = std::optional<Error>;
Error api_error(const char* code, std::string path, std::string message);
Error api_wrong_type(const std::string& path, const char* expected, const Json& got);
Error api_missing(const std::string& path);
/// `what` of it; empty: the field itself.
Error api_unsupported(const char* code, const std::string& path, std::string_view what = {});
std::string api_index(const std::string& path, size_t i);
Fault check_bool(const Json& value, const std::string& path);
Fault check_text(const Json& value, const std::string& path, size_t least, size_t most);
Fault check_integer(const Json& value, const std::string& path, int64_t least, int64_t most);
Fault check_choice(const Json& value, const std::string& path,
                   std::span<const std::string_view> choices, const char* code = "invalid_value");

/// What a request must be like that needs no model to be known; the wire has checked it already,
/// a C++ caller's comes straight here. Errors: invalid_request with code and param.
Result<void> check_request(const Request& request);
/// A request as a body of POST /v1/responses, and back: what is as by default is left out.
/// Fields of the server's alone (organisation) are not part of it.
Json request_json(const Request& request);
Result<Request> read_request(const Json& body, Dialect dialect);

/// The kinds of items, in the order of Item::Kind.
struct ItemType {
    std::string_view name;
    Item::Kind kind;
    const char* prefix;  // of the id of one that came without
};
inline constexpr ItemType item_types[] = {
    {"message", Item::Kind::message, "msg_"},
    {"reasoning", Item::Kind::reasoning, "rs_"},
    {"function_call", Item::Kind::function_call, "fc_"},
    {"function_call_output", Item::Kind::function_call_output, "fco_"},
    {"custom_tool_call", Item::Kind::custom_tool_call, "ctc_"},
    {"custom_tool_call_output", Item::Kind::custom_tool_call_output, "ctco_"},
};
static_assert(std::size(item_types) == size_t(Item::Kind::custom_tool_call_output) + 1);
constexpr const ItemType& item_type(Item::Kind kind) {
    return item_types[static_cast<size_t>(kind)];
}
/// An item as it stands in `input` and `output`; without an id or a status these are left out.
Json item_json(const Item& item, const std::string& id = {}, const char* status = nullptr);
/// Back. The message of an Error names the place by `path`.
Result<Item> read_item(const Json& json, const std::string& path);

struct DialectWords {
    const char *pending, *running;
    const char* cut;       // the status of an answer that was cut
    const char* cut_item;  // and of its message
    bool echo;             // `input` and `user`
    bool usage_extras;
    const char* failure;  // the code of a failed response that is not told; null: the error's own
};

const DialectWords& words_of(Dialect dialect);
const char* status_name(Status status, bool cut, const DialectWords& words);

/// Refuses the first field whose name is of another surface or a slip of the hand, near to one of
/// `ours`. Other strange names are newer than this, and left alone.
Fault check_names(const Json& body, std::span<const std::string_view> ours);
/// A body of POST /v1/responses, checked in a fixed order: missing required fields in table
/// order, other fields in document order, rules across fields. Errors: invalid_request with code
/// and param; the message says what is wrong, what was received and what is allowed.
Result<Request> parse_response_request(const Json& body, Dialect dialect = Dialect::valar);
/// The response object, all its keys in their order.
Json render_response(const ResponseRecord& record, Dialect dialect = Dialect::valar);
/// The items of an answer's `output`: one for the text of a Responder that has no items; the id of
/// each but the first message, which says what response it is of; its status.
std::vector<Item> output_items(const Outcome& outcome, Status status);
std::string first_message_id(const std::string& response_id);
std::string output_item_id(const std::string& response_id, Item::Kind kind, size_t index);
std::string item_response_id(std::string_view item_id);
const char* output_item_status(bool last, Status status, bool cut, const DialectWords& words);
std::vector<TokenLogprob> logprobs_of(const Outcome& outcome, size_t index);
Json render_logprobs(const std::vector<TokenLogprob>& tokens);
Json render_usage(const Usage& usage, const DialectWords& words);
/// `error` of a failed response: {code,message}, or null.
Json render_failure(const Outcome& outcome, const DialectWords& words);
bool failure_is_told(std::string_view code);
/// The items of a request's input as GET /v1/responses/{id}/input_items lists them, oldest first:
/// in their long form, those without an id with one made of `response_id` and their place.
std::vector<Json> render_input_items(const Json& request, const std::string& response_id);
/// {"error":{message,type,param,code}}. A message that was not written for clients, which is one
/// without a code, and that of our own fault (500) stay here: they may name a file.
Json render_error(const Error& error);
/// The HTTP status of an error: its kind's, but for two codes (the tables in api.cpp).
int http_status(const Error& error);

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

/// The words of an Effort on the wire and in chat templates.
inline constexpr std::string_view kEffortNames[] = {"none",   "minimal", "low",
                                                    "medium", "high",    "xhigh"};
static_assert(std::size(kEffortNames) == static_cast<size_t>(Effort::xhigh) + 1);
constexpr std::string_view effort_name(Effort effort) {
    return kEffortNames[static_cast<size_t>(effort)];
}

/// The words of a Window on the wire, and the field that holds them.
inline constexpr std::string_view kWindowNames[] = {"asap", "standard", "flex"};
static_assert(std::size(kWindowNames) == static_cast<size_t>(Window::flex) + 1);
inline constexpr std::string_view kWindowKey = "completion_window";  // in a request's metadata
inline constexpr std::string_view kWebhookKey = "completion_webhook";
inline constexpr std::string_view kWebhookTokenKey = "webhook_token";
inline constexpr const char* kWindowField = "metadata.completion_window";
constexpr std::string_view window_name(Window window) {
    return kWindowNames[static_cast<size_t>(window)];
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

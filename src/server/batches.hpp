// What a batch is made of: its body, the ids of its responses, and how its items are kept.
#pragma once

#include "api_internal.hpp"

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr size_t server_most_requests = 100'000;  // of a batch
inline constexpr size_t server_batch_scale = 8;   // a batch's body to max_body_bytes: 256 MiB
inline constexpr size_t server_batch_part = 64;   // items that are kept in one record
inline constexpr size_t server_batch_live = 128;  // items of all batches in work, about
inline constexpr size_t server_batch_drawn = 20;  // characters of its id
/// How far an item is: waits, is a response in work, has ended.
inline constexpr char server_batch_waits = 'P', server_batch_begun = 'R';

inline constexpr size_t server_most_label = 256;  // characters

/// The body of POST /v1/batches, without a tree of all of it.
struct BatchBody {
    Json rest;                               // with "requests": []
    std::vector<std::string_view> requests;  // texts of the body, not checked yet
};
/// Where `requests` is no array it stays in `rest`. Errors: of what is no JSON around its items; it
/// has more than it may.
Result<BatchBody> batch_split(std::string_view body);

/// The id of an item's response, and back: a batch's id and the item's place.
std::string batch_response_id(const std::string& batch, size_t place);
std::optional<std::pair<std::string, size_t>> batch_of(const std::string& response_id);
std::string batch_part_id(const std::string& batch, size_t part);

/// Parts hold three lines an item: what is kept for its webhook, what acceptance resolved, and its
/// request.
struct BatchItem {
    std::string_view hook, head, request;
    size_t size() const { return hook.size() + head.size() + request.size() + 3; }
};
std::optional<BatchItem> batch_item(std::string_view part, size_t place);

}  // namespace detail
}  // namespace v1
}  // namespace valar

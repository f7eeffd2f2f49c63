// A body of POST /v1/batches, split without a tree: what is whole JSON gives the same items as its
// tree does, and what gives good items is whole JSON. Texts of kept items and ids of responses are
// read, whatever they are.
#include "server/batches.hpp"

#include <cstdlib>

using namespace valar;
using namespace valar::detail;

namespace {

/// The tree that the parts make; null: one of them is none.
std::optional<Json> join_parts(BatchBody split) {
    Json items = Json::array();
    for (const std::string_view text : split.requests) {
        auto item = Json::parse(text, {.depth = json_depth_limit - 2});
        if (!item) return std::nullopt;
        items.push(std::move(*item));
    }
    if (!items.empty()) *split.rest.find("requests") = std::move(items);
    return std::move(split.rest);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto whole = Json::parse(text);
    auto split = batch_split(text);
    if (whole && !split) std::abort();
    if (split) {
        const auto joined = join_parts(std::move(*split));
        if (whole.ok() != joined.has_value()) std::abort();
        if (whole && !(*joined == *whole)) std::abort();
    }
    for (size_t place = 0; place < 3; ++place)
        if (const auto item = batch_item(text, place); item && item->size() > size) std::abort();
    if (const auto of = batch_of(std::string(text)))
        if (batch_response_id(of->first, of->second) != text) std::abort();
    return 0;
}

#pragma once

#include "api.hpp"
#include "digest_internal.hpp"
#include "json_internal.hpp"

#include <cstddef>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

struct DialectWords {
    const char* status[5];
    const char* cut;       // the status of an answer that was cut
    const char* cut_item;  // and of its message
    bool echo;             // `input` and `user`
    bool usage_extras;
    const char* failure;  // the code of a failed response; null: the error's own
};

const DialectWords& words_of(Dialect dialect);
const char* status_name(Status status, bool cut, const DialectWords& words);

/// The words of a Window on the wire, and the field that holds them.
inline constexpr const char* kWindowNames[] = {"asap", "standard", "flex"};
inline constexpr const char* kWindowField = "metadata.completion_window";
constexpr std::string_view window_name(Window window) {
    return kWindowNames[static_cast<size_t>(window)];
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

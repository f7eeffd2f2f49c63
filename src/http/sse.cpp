#include "prologue.hpp"

#include "http/sse.hpp"

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Server-sent events ------------------------------------------------------------------------

SseReader::Found SseReader::feed(std::string_view bytes, size_t* used) {
    *used = 0;
    if (std::exchange(told_, false)) {
        type_.clear();
        data_.clear();
        any_data_ = false;
    }
    while (!fault_ && *used < bytes.size()) {
        if (std::exchange(after_cr_, false) && bytes[*used] == '\n') {
            ++*used;
            continue;
        }
        const std::string_view rest = bytes.substr(*used);
        const size_t end = std::min(rest.find_first_of("\r\n"), rest.size());
        fault_ = end > most_bytes_ - std::min(most_bytes_, line_.size() + data_.size());
        if (fault_) break;
        line_.append(rest.substr(0, end));
        *used += end;
        if (end == rest.size()) break;
        after_cr_ = rest[end] == '\r';
        ++*used;
        if (end_line()) return Found::event;
    }
    return fault_ ? Found::fault : Found::more;
}

/// Whether an event ends with it. One without data is none.
bool SseReader::end_line() {
    std::string_view line = line_;
    if (std::exchange(first_line_, false) && line.starts_with("\xEF\xBB\xBF"))
        line.remove_prefix(3);
    if (line.empty()) {
        told_ = any_data_;
        if (!any_data_) type_.clear();
        line_.clear();
        return told_;
    }
    const size_t colon = std::min(line.find(':'), line.size());
    std::string_view value = line.substr(std::min(colon + 1, line.size()));
    if (value.starts_with(' ')) value.remove_prefix(1);
    const std::string_view name = line.substr(0, colon);
    if (name == "event") type_ = value;
    if (name == "data") {
        if (std::exchange(any_data_, true)) data_ += '\n';
        data_ += value;
    }
    line_.clear();
    return false;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

// Server-sent events as a client reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// An incremental reader of text/event-stream (WHATWG HTML, 9.2.6): fed bytes, does no I/O. What it
/// finds does not depend on how the bytes are cut into pieces. Ids, retry times and comments are
/// skipped. Threads: one at a time.
class SseReader {
public:
    enum class Found : uint8_t {
        more,   ///< all bytes used
        event,  ///< type() and data() hold it, until the next feed
        fault,  ///< an event of more bytes than allowed; it stays so
    };
    explicit SseReader(size_t most_bytes) : most_bytes_(most_bytes) {}
    /// Goes on to the next event. The bytes after `*used` come after it.
    Found feed(std::string_view bytes, size_t* used);

    std::string_view type() const { return type_; }  ///< empty: "message"
    std::string_view data() const { return data_; }  ///< lines are joined by LF

private:
    bool end_line();

    size_t most_bytes_;
    std::string line_, type_, data_;
    bool after_cr_ = false;   // an LF that follows is of the same end of line
    bool any_data_ = false;   // of the event in the making
    bool told_ = false;       // that one was found already
    bool first_line_ = true;  // may begin with a byte order mark
    bool fault_ = false;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

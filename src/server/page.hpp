// The text of the page at GET /, as assemble.py makes it from page.html.
#pragma once

#include <span>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr const char* server_page_mark = "{{dialect}}";  // stands where its name is to

struct ServerPageText {
    std::span<const char* const> pieces;
    const char* version;         // of the text
    const char *script, *style;  // hashes, as Content-Security-Policy takes them
};
extern const ServerPageText server_page_text;

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "server/loop.hpp"
#include "server/page.hpp"

#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- The page ------------------------------------------------------------------------------------

/// Nothing from elsewhere, no script but its own, in no frame; it speaks with this server alone.
void ServerLoop::get_page(Exchange& exchange, HttpRequest& request) {
    const std::string_view dialect = options.dialect == Dialect::openai ? "openai" : "valar";
    const std::string tag = join({"\"", server_page_text.version, "-", dialect, "\""});
    const std::string policy = join(
        {"default-src 'none'; connect-src 'self'; img-src data:; script-src '",
         server_page_text.script, "'; style-src '", server_page_text.style,
         "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
         "require-trusted-types-for 'script'"});
    HttpHeaders headers = {{"ETag", tag},
                           {"Cache-Control", "no-cache"},
                           {"Content-Security-Policy", policy},
                           {"X-Content-Type-Options", "nosniff"},
                           {"Referrer-Policy", "no-referrer"}};
    const std::string* known = request.header("If-None-Match");
    if (known && known->find(tag) != known->npos)
        return answer(exchange, make_reply(exchange, 304, {}, std::move(headers)));
    headers.emplace_back("Content-Type", "text/html; charset=utf-8");
    std::string text;
    for (const char* piece : server_page_text.pieces) text += piece;
    text.replace(text.find(server_page_mark), std::string_view(server_page_mark).size(), dialect);
    answer(exchange, make_reply(exchange, 200, std::move(text), std::move(headers)));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

// URLs and addresses: what the parser takes is taken again as it would be written, names the same
// place, and a numeric host that the policy lets through is none of this machine or its networks.
#include <cstdlib>
#include <string>

#include "http/url.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace valar::detail;
    const auto url = http_parse_url({reinterpret_cast<const char*>(data), size});
    if (!url) return 0;
    const std::string text = (url->tls ? "https://" : "http://") + url->authority() + url->target;
    const auto again = http_parse_url(text);
    if (!again || again->host != url->host || again->port != url->port ||
        again->target != url->target || again->tls != url->tls)
        std::abort();
    for (const char c : text)
        if (c <= ' ' || c >= 0x7F || c == '\\') std::abort();
    if (url->authority().find('@') != std::string::npos) std::abort();
    if (!url->address) return 0;
    if (url->address->port != url->port) std::abort();
    const NetPolicy policy{NetPolicy::Reach::global, {}};
    if (policy.allows(*url->address) && url->address->is_loopback()) std::abort();
    return 0;
}

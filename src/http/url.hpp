// Where the server itself may call: one parser of URLs and one judge of addresses, for the check
// and for the dial.
#pragma once

#include "base/sockets.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// An http or https URL, in the one spelling that is dialled.
struct HttpUrl {
    bool tls = false;
    std::string host = {};  ///< in lower case: a name, "192.0.2.1" or "[2001:db8::1]"
    uint16_t port = 80;
    std::string target = "/";                ///< path and query; the fragment is dropped
    std::optional<NetAddress> address = {};  ///< of a host that is no name
    std::string authority() const;           ///< for the header Host
};

/// Narrower than RFC 3986, so that no two readers can differ: visible ASCII without backslash, no
/// userinfo, IPv4 as four decimal numbers and in no other spelling, names of letters, digits, - and _.
/// Errors: invalid_request, which says what is wrong and shows nothing of the URL.
Result<HttpUrl> http_parse_url(std::string_view text);

/// Which addresses may be called.
struct NetPolicy {
    enum class Reach : uint8_t { any, loopback, global };
    Reach reach = Reach::any;
    NetAddress own =
        {};  ///< where this server listens, which is not called either; port 0: nowhere
    bool allows(const NetAddress& address) const;
};

/// Whether IANA's registries have it as an address of the Internet, for one host. One that embeds an
/// IPv4 address (mapped, NAT64, 6to4, Teredo) is judged by that.
bool net_is_global(const NetAddress& address);

}  // namespace detail
}  // namespace v1
}  // namespace valar

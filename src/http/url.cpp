#include "prologue.hpp"

#include "http/text.hpp"
#include "http/url.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- URLs (RFC 3986, and what the URL standard of the WHATWG reads differently) ---------------

namespace {

constexpr size_t http_longest_url = 8192;
constexpr size_t http_longest_name = 253, http_longest_label = 63;  // RFC 1035

Error http_bad_url(const char* what) {
    return make_error(ErrorKind::invalid_request, std::string("the URL ") + what);
}

bool is_decimal(std::string_view text) {
    return !text.empty() &&
           std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// Whether some reader would take it as a number, and so the whole host as IPv4.
bool is_numeric_label(std::string_view label) {
    return is_decimal(label) || label.starts_with("0x");
}

Result<void> read_name(std::string_view name) {
    if (name.size() > http_longest_name) return http_bad_url("has a host that is too long");
    std::string_view label;
    for (std::string_view rest = name;;) {
        label = rest.substr(0, rest.find('.'));
        if (label.empty() || label.size() > http_longest_label || !http_all(label, http_name))
            return http_bad_url("has a host that is neither a name nor an address");
        if (label.size() == rest.size()) break;
        rest.remove_prefix(label.size() + 1);
    }
    if (is_numeric_label(label))
        return http_bad_url("has an IPv4 address that is not four decimal numbers");
    return {};
}

/// Only the one spelling of IPv4 that every reader takes for the same address.
Result<void> read_host(std::string_view host, HttpUrl* url) {
    url->host = ascii_lower(host);
    auto address = url->host == "localhost" ? Result<NetAddress>(http_bad_url("names a host"))
                                            : NetAddress::parse(url->host, url->port);
    if (!address) return read_name(url->host);
    const bool v6 = url->host[0] == '[';
    if (v6 ? address->v4 : !address->v4 || address->host() != url->host)
        return http_bad_url("has an address in an unusual spelling");
    if (v6) url->host = "[" + address->host() + "]";
    url->address = *address;
    return {};
}

}  // namespace

std::string HttpUrl::authority() const {
    return port == (tls ? 443 : 80) ? host : host + ":" + std::to_string(port);
}

Result<HttpUrl> http_parse_url(std::string_view text) {
    if (text.size() > http_longest_url) return http_bad_url("is too long");
    if (!http_all(text, http_visible) || text.find('\\') != text.npos)
        return http_bad_url("holds characters that must be escaped");
    HttpUrl url;
    const size_t colon = text.find("://");
    const std::string_view scheme = text.substr(0, colon);
    url.tls = http_same(scheme, "https");
    if (colon == text.npos || !(url.tls || http_same(scheme, "http")))
        return http_bad_url("does not begin with http:// or https://");
    text.remove_prefix(colon + 3);
    const size_t end = std::min(text.find_first_of("/?#"), text.size());
    const std::string_view authority = text.substr(0, end);
    if (authority.find('@') != authority.npos) return http_bad_url("holds a user name or password");
    const size_t bracket = authority.rfind(']');
    const size_t port_at = authority.find(':', bracket == authority.npos ? 0 : bracket);
    url.port = url.tls ? 443 : 80;
    if (port_at != authority.npos) {
        const std::string_view digits = authority.substr(port_at + 1);
        uint64_t port = 0;
        if (digits.size() > 5 || !http_decimal(digits, &port) || port == 0 || port > 65535)
            return http_bad_url("has a port that is not 1 to 65535");
        url.port = static_cast<uint16_t>(port);
    }
    if (auto read = read_host(authority.substr(0, port_at), &url); !read) return read.error();
    const std::string_view path = text.substr(end, text.find('#') - end);
    url.target = path.starts_with('/') ? std::string(path) : "/" + std::string(path);
    return url;
}

// ---- Addresses -------------------------------------------------------------------------------

namespace {

/// What IANA's registries say of the addresses that begin with these bits.
struct NetBlock {
    enum Kind : uint8_t { refused, global, embeds };
    const char* prefix;
    int bits;  // of IPv6; an IPv4 prefix has 96 more
    Kind kind;
    uint8_t at = 0;       // of an embedded IPv4 address
    uint8_t flipped = 0;  // its bytes are XORed with that
};

// The special-purpose address registries (RFC 6890 and what was added since), and, of the address
// spaces, what is multicast or not given out for unicast. The first that fits decides. Anycast
// addresses of protocols (AS112, AMT, PCP) name no host that could have asked to be called.
constexpr NetBlock net_blocks[] = {
    // clang-format off
    {"0.0.0.0",          96 + 8,  NetBlock::refused},       // this network
    {"10.0.0.0",         96 + 8,  NetBlock::refused},       // private
    {"100.64.0.0",       96 + 10, NetBlock::refused},       // shared by customers of a provider
    {"127.0.0.0",        96 + 8,  NetBlock::refused},       // loopback
    {"169.254.0.0",      96 + 16, NetBlock::refused},       // link-local: metadata of clouds
    {"172.16.0.0",       96 + 12, NetBlock::refused},       // private
    {"192.0.0.0",        96 + 24, NetBlock::refused},       // protocol assignments
    {"192.0.2.0",        96 + 24, NetBlock::refused},       // documentation
    {"192.31.196.0",     96 + 24, NetBlock::refused},       // AS112
    {"192.52.193.0",     96 + 24, NetBlock::refused},       // AMT
    {"192.88.99.0",      96 + 24, NetBlock::refused},       // 6to4 relays
    {"192.168.0.0",      96 + 16, NetBlock::refused},       // private
    {"192.175.48.0",     96 + 24, NetBlock::refused},       // AS112
    {"198.18.0.0",       96 + 15, NetBlock::refused},       // benchmarks
    {"198.51.100.0",     96 + 24, NetBlock::refused},       // documentation
    {"203.0.113.0",      96 + 24, NetBlock::refused},       // documentation
    {"224.0.0.0",        96 + 4,  NetBlock::refused},       // multicast
    {"240.0.0.0",        96 + 4,  NetBlock::refused},       // reserved, broadcast
    {"::ffff:0:0",       96,      NetBlock::global},        // the rest of IPv4, mapped or not
    {"64:ff9b::",        96,      NetBlock::embeds, 12},    // NAT64
    {"2001::",           32,      NetBlock::embeds, 12, 0xFF},  // Teredo
    {"2001::",           23,      NetBlock::refused},       // protocol assignments
    {"2001:db8::",       32,      NetBlock::refused},       // documentation
    {"2002::",           16,      NetBlock::embeds, 2},     // 6to4
    {"2620:4f:8000::",   48,      NetBlock::refused},       // AS112
    {"3fff::",           20,      NetBlock::refused},       // documentation
    {"2000::",           3,       NetBlock::global},        // all that is given out for unicast
    {"::",               0,       NetBlock::refused},
    // clang-format on
};

bool begins_with(const NetAddress& address, const NetAddress& prefix, int bits) {
    const size_t whole = static_cast<size_t>(bits) / 8;
    if (std::memcmp(address.ip, prefix.ip, whole) != 0) return false;
    const int rest = bits % 8;
    return rest == 0 || (address.ip[whole] ^ prefix.ip[whole]) >> (8 - rest) == 0;
}

const NetBlock& block_of(const NetAddress& address) {
    for (const NetBlock& block : net_blocks) {
        const auto prefix = NetAddress::parse(block.prefix, 0);
        if (prefix && begins_with(address, *prefix, block.bits)) return block;
    }
    return *(std::end(net_blocks) - 1);
}

/// The IPv4 address in it.
NetAddress embedded_in(const NetAddress& address, const NetBlock& block) {
    auto found = NetAddress::parse("0.0.0.0", address.port);
    for (size_t i = 0; i < 4; ++i)
        found->ip[12 + i] = static_cast<uint8_t>(address.ip[block.at + i] ^ block.flipped);
    return *found;
}

}  // namespace

bool net_is_global(const NetAddress& address) {
    if (address.local) return false;
    const NetBlock& block = block_of(address);
    if (block.kind != NetBlock::embeds) return block.kind == NetBlock::global;
    return net_is_global(embedded_in(address, block));  // which is IPv4, and embeds none
}

bool NetPolicy::allows(const NetAddress& address) const {
    if (reach == Reach::any) return true;
    const bool there = reach == Reach::loopback ? address.is_loopback() : net_is_global(address);
    return there && !net_reaches(address, own);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

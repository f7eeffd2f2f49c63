#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Options ---------------------------------------------------------------------------------

Error server_option(const char* name, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), "invalid_value", name);
}

bool server_visible(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

Result<Hash256> server_secret_hash(const ApiKey& key) {
    const auto refused = [&](const char* what) {
        return server_option("keys", "key '" + key.id + "': " + what);
    };
    if (key.secret_sha256.empty()) {
        if (key.secret.size() >= server_min_secret && server_visible(key.secret))
            return server_secret_hash(key.secret);
        return refused("the secret must be 16 visible ASCII characters or more");
    }
    auto bytes = hex_decode(key.secret_sha256);
    Hash256 hash;
    if (!bytes || bytes->size() != sizeof hash.bytes || !key.secret.empty())
        return refused("secret_sha256 must be 64 hex digits, and there is no secret beside it");
    std::memcpy(hash.bytes, bytes->data(), sizeof hash.bytes);
    return hash;
}

/// Sorted by hash.
Result<std::vector<ServerKey>> server_keys(const std::vector<ApiKey>& given) {
    std::vector<ServerKey> keys;
    for (const ApiKey& key : given) {
        if (!server_visible(key.id))
            return server_option("keys", "the id of a key must be visible ASCII characters");
        if (key.organisation.empty())
            return server_option("keys", "key '" + key.id + "': the organisation is empty");
        auto hash = server_secret_hash(key);
        if (!hash) return hash.error();
        keys.push_back({*hash,
                        key.id,
                        key.organisation,
                        key.requests_per_minute,
                        {static_cast<double>(key.requests_per_minute), monotonic_ns()}});
    }
    const auto before = [](const ServerKey& a, const ServerKey& b) {
        return a.hash.view() < b.hash.view();
    };
    sort_items(keys, before);
    for (size_t i = 1; i < keys.size(); ++i)
        if (keys[i].hash == keys[i - 1].hash)
            return server_option("keys", "keys '" + keys[i - 1].id + "' and '" + keys[i].id +
                                             "' have the same secret");
    return keys;
}

Result<void> server_check_options(const ServerOptions& options) {
    NetAddress local;
    local.local = true;
    auto address = unix_path(options.host) ? Result<NetAddress>(local)
                                           : NetAddress::parse(options.host, options.port);
    if (!address) return server_option("host", address.error().message);
    if (options.require_keys && options.keys.empty())
        return server_option("keys", "there is no key, and require_keys asks for one");
    const struct {
        const char* field;
        uint64_t value;
    } not_zero[] = {
        {"keep_alive_ms", options.keep_alive_ms},
        {"max_body_bytes", options.max_body_bytes},
        {"max_inflight_body_bytes", options.max_inflight_body_bytes},
    };
    for (const auto& [field, value] : not_zero)
        if (value == 0) return server_option(field, std::string(field) + ": must not be 0");
    if (options.keys.empty() && !options.allow_open && !address->is_loopback())
        return server_option(
            "host", "without keys a server only listens on a loopback address, and '" +
                        options.host + "' is none: pass keys, or allow_open to let anybody in");
    for (const std::string& host : options.allowed_hosts)
        if (host.empty() || !server_visible(host) || host.find('/') != host.npos)
            return server_option("allowed_hosts",
                                 "'" + host + "' is not a Host (\"name\" or \"name:port\")");
    for (const std::string& origin : options.cors_origins) {
        const size_t host = origin.find("://");
        if (host == origin.npos || host == 0 || host + 3 == origin.size() ||
            !server_visible(origin) || origin.find('/', host + 3) != origin.npos)
            return server_option("cors_origins",
                                 "'" + origin + "' is not an origin (\"https://example.org\")");
    }
    return {};
}

HttpOptions server_http_options(const ServerOptions& options) {
    HttpOptions http;
    http.host = options.host;
    http.port = options.port;
    http.limits.max_body_bytes = options.max_body_bytes;
    http.max_connections = options.max_connections;
    http.max_inflight_body_bytes = options.max_inflight_body_bytes;
    http.idle_timeout_ms = options.keep_alive_ms;
    http.drain_timeout_ms = options.drain_timeout_ms;
    http.tick_ms = server_tick_ms;
    return http;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- The file of keys ------------------------------------------------------------------------

Result<void> hash_secret(ApiKey* key) {
    auto hash = detail::server_secret_hash(*key);
    if (!hash) return hash.error();
    detail::wipe(key->secret.data(), key->secret.size());
    key->secret.clear();
    key->secret_sha256 = hash->hex();
    return {};
}

Result<std::vector<ApiKey>> read_key_file(const std::string& path, bool insecure) {
    using namespace detail;
    auto text = read_file(path, server_max_key_file, !insecure);
    if (!text) return text.error();
    std::vector<ApiKey> keys;
    std::unordered_set<std::string> ids;
    std::string_view rest = *text;
    if (rest.substr(0, 3) == "\xEF\xBB\xBF") rest.remove_prefix(3);  // an editor's mark of UTF-8
    for (int line = 1; !rest.empty(); ++line) {
        std::string_view words = rest.substr(0, rest.find('\n'));
        rest.remove_prefix(std::min(words.size() + 1, rest.size()));
        std::vector<std::string> fields;
        for (;;) {
            const size_t from = words.find_first_not_of(" \t\r");
            if (from == words.npos) break;
            words.remove_prefix(from);
            fields.emplace_back(words.substr(0, words.find_first_of(" \t\r")));
            words.remove_prefix(fields.back().size());
        }
        if (fields.empty() || fields[0][0] == '#') continue;
        const auto refused = [&](const char* what) {
            return make_error(ErrorKind::bad_data, path + format(", line %d: ", line) + what);
        };
        if (fields.size() != 3 && fields.size() != 4)
            return refused("expected `id organisation sha256 [requests-per-minute]`");
        ApiKey key;
        key.id = fields[0], key.organisation = fields[1], key.secret_sha256 = fields[2];
        if (auto hash = server_secret_hash(key); !hash) return refused("not a SHA-256");
        if (fields.size() == 4) {
            const auto number = Json::parse(fields[3]);
            if (!number || number->as_int() < 1 || number->as_int() > INT32_MAX)
                return refused("requests-per-minute is not a positive number");
            key.requests_per_minute = static_cast<uint32_t>(number->as_int());
        }
        if (!ids.insert(key.id).second) return refused("this id stands in an earlier line, too");
        keys.push_back(std::move(key));
    }
    if (keys.empty())  // not "anybody may come in": a file of keys was asked for
        return make_error(ErrorKind::bad_data, "'" + path + "' holds no key");
    return keys;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

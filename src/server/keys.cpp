#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Keys and guesses ----------------------------------------------------------------------------

/// Leaves nothing of the secret behind.
Hash256 server_secret_hash(std::string_view secret) {
    Sha256 state;
    state.update(secret);
    const Hash256 hash = state.finish();
    wipe(&state, sizeof state);
    return hash;
}

uint32_t ServerBucket::take(uint32_t per_minute, uint64_t now_ns) {
    const double a_second = per_minute / 60.0;
    const double passed_s = static_cast<double>(now_ns - filled_ns) / 1e9;
    left = std::min<double>(per_minute, left + passed_s * a_second);
    filled_ns = now_ns;
    if (left < 1) return static_cast<uint32_t>(std::ceil((1 - left) / a_second));
    --left;
    return 0;
}

uint32_t ServerGuesses::take(std::string_view client, uint64_t now_ns) {
    const auto parsed = NetAddress::parse(client, 0);
    if (parsed) {
        const bool v4 = std::count(parsed->ip, parsed->ip + 8, 0) == 8;  // or it is ::1
        client = {reinterpret_cast<const char*>(parsed->ip), v4 ? 16u : 8u};
    }
    const Hash256 digest = sha256(client);
    uint64_t address = 0;
    std::memcpy(&address, digest.bytes, sizeof address);
    if (entries_.empty()) entries_.resize(rows * places);
    Entry* const row = &entries_[address % rows * places];
    Entry* found = row;
    for (Entry* one = row; one < row + places; ++one) {
        if (one->address == address) {
            found = one;
            break;
        }
        if (one->bucket.filled_ns < found->bucket.filled_ns) found = one;
    }
    if (found->address != address) *found = {address, {server_guesses_a_minute, now_ns}};
    return found->bucket.take(server_guesses_a_minute, now_ns);
}

/// From any thread. The loop takes them up before it looks at another request.
void ServerLoop::set_keys(std::vector<ServerKey> next) {
    {
        const std::lock_guard<std::mutex> lock(keys_mutex);
        next_keys = std::move(next);
        keys_changed = true;
    }
    http->post([](void* self) { static_cast<ServerLoop*>(self)->take_keys(); }, this);
}

/// Both lists are in the order of their hashes.
void ServerLoop::take_keys() {
    if (!keys_changed) return;
    std::vector<ServerKey> before = std::move(keys);
    {
        const std::lock_guard<std::mutex> lock(keys_mutex);
        keys = std::exchange(next_keys, {});
        keys_changed = false;
    }
    size_t stay = 0;
    auto old = before.begin();
    for (ServerKey& key : keys) {
        while (old != before.end() && old->hash.view() < key.hash.view()) ++old;
        if (old == before.end() || old->hash != key.hash) continue;
        ++stay;
        if (old->per_minute) key.bucket = old->bucket;
    }
    has_keys = true;
    say(LogLevel::info,
        Json::object().set("message",
                           format("keys: %zu, %zu of them new; %zu are gone", keys.size(),
                                  keys.size() - stay, before.size() - stay)));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

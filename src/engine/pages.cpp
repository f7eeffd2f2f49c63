#include "prologue.hpp"

#include "engine/pages.hpp"
#include "kernels/internal.hpp"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// Adds the keys of the pages that `tokens` fill, up to `count` of them.
void extend_page_keys(std::vector<Hash256>& keys, const Hash256& root,
                      std::span<const Token> tokens, uint32_t page_tokens, size_t count) {
    while (keys.size() < count) {
        Sha256 hash;
        hash.update((keys.empty() ? root : keys.back()).view());
        hash.update(tokens.data() + keys.size() * page_tokens, page_tokens * sizeof(Token));
        keys.push_back(hash.finish());
    }
}

uint64_t group_of(const Hash256& root, const std::string& prompt_cache_key) {
    if (prompt_cache_key.empty()) return 0;
    const Hash256 hash = hmac_sha256(root.view(), prompt_cache_key);
    uint64_t group;
    std::memcpy(&group, hash.bytes, sizeof group);
    return group | 1;
}

// The key that stands before that of a first page: all that may part prefixes which begin alike.
// `salt` is empty, or stands for pages that others must not find.
Hash256 root_key(const EngineOptions& options, const std::string& organisation,
                 std::string_view salt) {
    const uint32_t numbers[] = {kNumerics, static_cast<uint32_t>(options.precision),
                                static_cast<uint32_t>(options.kv_type), options.page_tokens};
    Sha256 hash;
    hash.update(numbers, sizeof numbers);
    if (!options.share_prefixes) hash.update(organisation);
    if (!salt.empty()) hash.update(sha256(salt.data(), salt.size()).view());
    return hash.finish();
}

Hash256 long_rope_key(const Hash256& root) {
    Sha256 hash;
    hash.update(root.view());
    hash.update(std::string_view("long rope"));
    return hash.finish();
}

void PagePool::open(uint32_t first, uint32_t pages) {
    first_ = first;
    unused_ = cached_ = shared_ = 0;
    pages_.assign(size_t{pages} + 1, {});
    at(ends()).older = at(ends()).newer = ends();
    buckets_.assign(std::bit_ceil(pages), none);
    for (uint32_t page = first; page < ends(); ++page) link_before(page, ends());
}

void PagePool::link_before(uint32_t page, uint32_t newer) {
    const uint32_t older = at(newer).older;
    at(page).older = older;
    at(page).newer = newer;
    at(older).newer = at(newer).older = page;
    ++unused_;
    cached_ += at(page).keyed;
}

void PagePool::unlink(uint32_t page) {
    const Page& from = at(page);
    at(from.older).newer = from.newer;
    at(from.newer).older = from.older;
    --unused_;
    cached_ -= from.keyed;
}

void PagePool::forget_key(uint32_t page) {
    uint32_t* link = &bucket(at(page).key);
    while (*link != page) link = &at(*link).next;
    *link = at(page).next;
    at(page).keyed = false;
}

uint32_t PagePool::take() {
    VALAR_ASSERT(unused_ > 0);
    const uint32_t page = at(ends()).newer;
    unlink(page);
    if (at(page).keyed) forget_key(page);
    at(page).users = 1;
    return page;
}

void PagePool::share(uint32_t page) {
    if (at(page).users == 0) unlink(page);
    shared_ += ++at(page).users == 2;
}

// What cannot be found again is the first to be taken.
void PagePool::drop(uint32_t page) {
    VALAR_ASSERT(at(page).users > 0);
    shared_ -= --at(page).users == 1;
    if (at(page).users) return;
    link_before(page, at(page).keyed ? ends() : at(ends()).newer);
}

uint32_t PagePool::find(const Hash256& key) const {
    uint32_t page = const_cast<PagePool*>(this)->bucket(key);
    while (page != none && !(at(page).key == key)) page = at(page).next;
    return page;
}

void PagePool::set_key(uint32_t page, const Hash256& key, uint64_t group) {
    VALAR_ASSERT(at(page).users > 0 && !at(page).keyed);
    uint32_t& first = bucket(key);
    Page& named = at(page);
    named.key = key;
    named.group = group;
    named.keyed = true;
    named.next = std::exchange(first, page);
}

void PagePool::refresh(uint64_t group) {
    uint32_t page = at(ends()).newer;
    for (uint32_t left = unused_; left > 0; --left) {
        const uint32_t newer = at(page).newer;
        if (at(page).keyed && at(page).group == group) {
            unlink(page);
            link_before(page, ends());
        }
        page = newer;
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

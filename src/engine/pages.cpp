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

void PagePool::open(uint32_t pages) {
    pages_.assign(size_t{pages} + 1, {});
    pages_[pages].older = pages_[pages].newer = pages;
    buckets_.assign(std::bit_ceil(pages), none);
    for (uint32_t page = 0; page < pages; ++page) link_before(page, pages);
}

void PagePool::link_before(uint32_t page, uint32_t newer) {
    const uint32_t older = pages_[newer].older;
    pages_[page].older = older;
    pages_[page].newer = newer;
    pages_[older].newer = pages_[newer].older = page;
    ++unused_;
    cached_ += pages_[page].keyed;
}

void PagePool::unlink(uint32_t page) {
    const Page& at = pages_[page];
    pages_[at.older].newer = at.newer;
    pages_[at.newer].older = at.older;
    --unused_;
    cached_ -= at.keyed;
}

void PagePool::forget_key(uint32_t page) {
    uint32_t* at = &bucket(pages_[page].key);
    while (*at != page) at = &pages_[*at].next;
    *at = pages_[page].next;
    pages_[page].keyed = false;
}

uint32_t PagePool::take() {
    VALAR_ASSERT(unused_ > 0);
    const uint32_t page = pages_[pages()].newer;
    unlink(page);
    if (pages_[page].keyed) forget_key(page);
    pages_[page].users = 1;
    return page;
}

void PagePool::share(uint32_t page) {
    VALAR_ASSERT(page < pages());
    if (pages_[page].users == 0) unlink(page);
    shared_ += ++pages_[page].users == 2;
}

// What cannot be found again is the first to be taken.
void PagePool::drop(uint32_t page) {
    VALAR_ASSERT(page < pages() && pages_[page].users > 0);
    shared_ -= --pages_[page].users == 1;
    if (pages_[page].users) return;
    link_before(page, pages_[page].keyed ? pages() : pages_[pages()].newer);
}

uint32_t PagePool::find(const Hash256& key) const {
    uint32_t page = const_cast<PagePool*>(this)->bucket(key);
    while (page != none && !(pages_[page].key == key)) page = pages_[page].next;
    return page;
}

void PagePool::set_key(uint32_t page, const Hash256& key, uint64_t group) {
    VALAR_ASSERT(page < pages() && pages_[page].users > 0 && !pages_[page].keyed);
    uint32_t& first = bucket(key);
    Page& named = pages_[page];
    named.key = key;
    named.group = group;
    named.keyed = true;
    named.next = std::exchange(first, page);
}

void PagePool::refresh(uint64_t group) {
    uint32_t page = pages_[pages()].newer;
    for (uint32_t left = unused_; left > 0; --left) {
        const uint32_t newer = pages_[page].newer;
        if (pages_[page].keyed && pages_[page].group == group) {
            unlink(page);
            link_before(page, pages());
        }
        page = newer;
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

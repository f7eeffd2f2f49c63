#pragma once

#include "digest_internal.hpp"
#include "engine/engine.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Keys of pages ---------------------------------------------------------------------------

Hash256 root_key(const EngineOptions& options, const std::string& organisation,
                 std::string_view salt);
/// The same of a text that is turned by the long rope factors: other keys and values.
Hash256 long_rope_key(const Hash256& root);
uint64_t group_of(const Hash256& root, const std::string& prompt_cache_key);
void extend_page_keys(std::vector<Hash256>& keys, const Hash256& root,
                      std::span<const Token> tokens, uint32_t page_tokens, size_t count);

// ---- Pages -----------------------------------------------------------------------------------

// The pages of keys and values: how many use each, and what the full ones hold. A page that nobody
// uses any more can be found by its key until it is taken for something else; of those, the one
// used longest ago goes first. Nothing is allocated after open().
class PagePool {
public:
    static constexpr uint32_t none = UINT32_MAX;

    /// They are numbered from `first` on; what was known of them before is forgotten.
    void open(uint32_t first, uint32_t pages);
    uint32_t pages() const { return static_cast<uint32_t>(pages_.size()) - 1; }
    uint32_t first() const { return first_; }
    uint32_t unused() const { return unused_; }  // what take() can be called for
    uint32_t cached() const { return cached_; }  // of those, with a key
    uint32_t shared() const { return shared_; }  // with several users
    uint32_t take();
    void share(uint32_t page);  // a user more, a user less
    void drop(uint32_t page);
    bool in_use(uint32_t page) const { return at(page).users > 0; }
    /// Whether its only user may change it.
    bool writable(uint32_t page) const { return at(page).users == 1 && !at(page).keyed; }
    uint32_t find(const Hash256& key) const;
    void set_key(uint32_t page, const Hash256& key, uint64_t group);  // of a page without one
    void refresh(uint64_t group);  // as if its pages had been used just now

private:
    struct Page {
        Hash256 key;
        uint64_t group = 0;
        uint32_t users = 0;
        uint32_t next = none;           // in its bucket
        uint32_t older = 0, newer = 0;  // among the unused
        bool keyed = false;
    };
    Page& at(uint32_t page) {
        VALAR_ASSERT(page - first_ < pages_.size());
        return pages_[page - first_];
    }
    const Page& at(uint32_t page) const { return const_cast<PagePool*>(this)->at(page); }
    uint32_t ends() const { return first_ + pages(); }  // of the list of unused ones, both
    uint32_t& bucket(const Hash256& key) {
        uint32_t bits;
        std::memcpy(&bits, key.bytes, sizeof bits);
        return buckets_[bits & (buckets_.size() - 1)];
    }
    void link_before(uint32_t page, uint32_t newer);  // into the unused
    void unlink(uint32_t page);
    void forget_key(uint32_t page);

    std::vector<Page> pages_;  // and ends()
    uint32_t first_ = 0;
    std::vector<uint32_t> buckets_;
    uint32_t unused_ = 0, cached_ = 0, shared_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

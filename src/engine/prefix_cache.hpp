#pragma once

#include "backend/internal.hpp"
#include "engine/pages.hpp"
#include "engine/sequence.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- The prefix cache ------------------------------------------------------------------------

// Which pages of keys and values each sequence has, and which of those that nobody uses any more
// hold the beginning of another prompt. Threads: only the one that steps.
class PrefixCache {
public:
    PrefixCache(const EngineOptions& options, const BackendOptions& sizes, const ModelSpec& spec,
                Backend& backend);

    uint32_t unused() const { return pool_.unused(); }  // pages that can be taken
    uint32_t pages_for(uint32_t positions) const;
    /// Pages to take until a sequence that waits has read all its tokens and one more; of one that
    /// runs.
    uint64_t needed_to_start(const Sequence& sequence) const;
    uint64_t needed_to_go_on(const Sequence& sequence) const;

    /// Takes over what the cache has of the tokens that come next.
    void join(Sequence& sequence);
    /// Pages to take before the sequence's rows can be computed; takes them.
    uint32_t lacking(const Sequence& sequence) const;
    void take_pages(Sequence& sequence);
    /// Makes the pages that are full now known to the cache.
    void keep(Sequence& sequence);
    /// Gives back the pages that no window reaches from the next row; gives back all.
    void drop_passed(Sequence& sequence);
    void release(Sequence& sequence);
    /// As if the pages of this group of requests had been used just now.
    void refresh(uint64_t group) { pool_.refresh(group); }

    /// Of these keys the pages that the cache has and that a text which goes on there needs.
    std::span<const Hash256> find_end(std::span<const Hash256> keys) const;
    /// The bytes of such pages; and makes the cache know pages, as many as there is room for.
    void export_pages(std::span<const Hash256> keys, std::byte* out) const;
    void import_pages(std::span<const Hash256> keys, std::span<const std::byte> bytes);
    size_t page_bytes() const { return backend_.page_bytes(); }

    void report(ResponderStats* counts) const;

private:
    size_t count_cached(std::span<const Hash256> keys, size_t computed, size_t held) const;
    uint32_t held_for(uint32_t positions) const;
    bool copies_first(const Sequence& sequence) const;
    void extend_keys(Sequence& sequence, size_t count) const;
    void share_cached(Sequence& sequence);

    Backend& backend_;
    PagePool pool_;
    uint32_t page_tokens_, step_tokens_;
    uint32_t window_pages_;  // full pages that a row may see; UINT32_MAX: all
    bool enabled_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

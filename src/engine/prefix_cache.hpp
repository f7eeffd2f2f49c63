#pragma once

#include "backend/internal.hpp"
#include "engine/pages.hpp"
#include "engine/sequence.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- The prefix cache ------------------------------------------------------------------------

// Which pages of keys and values each sequence has, and which of those that nobody uses any more
// hold the beginning of another prompt. Where only some layers have windows a position has two pages,
// one for the layers without, one for those with, which is given back when it is out of sight; a
// prompt is found as far as the former are all there, the latter where it goes on. Threads: only the
// one that steps.
class PrefixCache {
public:
    PrefixCache(const EngineOptions& options, const BackendOptions& sizes, const ModelSpec& spec,
                const std::unique_ptr<Backend>& backend);
    /// All of it, while no sequence has a page: the backend's are new.
    void forget();

    /// Before a sequence starts: its lists will not grow in memory while it runs.
    void reserve_lists(Sequence& sequence) const;
    /// Whether there are pages for the next one and those that run to read all their tokens and one
    /// more.
    bool has_room(const Sequence& next, std::span<const SequencePtr> running) const;

    /// Takes over what the cache has of the tokens that come next.
    void join(Sequence& sequence);
    /// Whether there are pages for the sequence's rows; takes them.
    bool has_pages(const Sequence& sequence) const;
    void take_pages(Sequence& sequence);
    /// Makes the pages that are full now known to the cache.
    void keep(Sequence& sequence);
    /// Gives back the pages that no window reaches from the next row; gives back all.
    void drop_passed(Sequence& sequence);
    void release(Sequence& sequence);
    /// As if the pages of this group of requests had been used just now.
    void refresh(uint64_t group);

    /// Of these keys, how far the cache has what a text that goes on there needs.
    size_t find_end(std::span<const Hash256> keys) const;
    /// What that takes as bytes, of a text of so many pages; and the bytes.
    Result<uint64_t> count_bytes(size_t end) const;
    void export_pages(std::span<const Hash256> keys, std::byte* out) const;
    /// Makes the cache know such pages of a text of `end`, as far as there are keys and room.
    void import_pages(std::span<const Hash256> keys, size_t end, const std::byte* bytes);
    size_t page_bytes() const;  // of a position's

    void report(ResponderStats* counts) const;

private:
    // Of the pages of one kind.
    struct Kind {
        PagePool pool;
        uint32_t window_pages;  // full ones that a row may see; UINT32_MAX: all
        size_t page_bytes;
        // Of a text of `end` pages, the first that what goes on there needs.
        size_t first_needed(size_t end) const { return end - std::min<size_t>(end, window_pages); }
    };
    uint32_t pages_for(uint32_t positions) const;
    uint64_t needed(const Kind& kind, const Sequence& sequence) const;
    uint64_t needed_to_start(size_t kind, const Sequence& sequence) const;
    uint64_t needed_to_go_on(size_t kind, const Sequence& sequence) const;
    size_t count_cached(std::span<const Hash256> keys, const Sequence* from) const;
    bool copies_first(size_t kind, const Sequence& sequence) const;
    uint32_t lacking(size_t kind, const Sequence& sequence) const;
    void extend_keys(Sequence& sequence, size_t count) const;
    void share_cached(Sequence& sequence);

    const std::unique_ptr<Backend>& backend_;
    std::vector<Kind> kinds_;  // in the order of a sequence's lists
    uint32_t page_tokens_, step_tokens_;
    bool enabled_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

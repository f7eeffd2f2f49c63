#include "prologue.hpp"

#include "base/internal.hpp"
#include "engine/plan.hpp"
#include "engine/prefix_cache.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

PrefixCache::PrefixCache(const EngineOptions& options, const BackendOptions& sizes,
                         const ModelSpec& spec, const std::unique_ptr<Backend>& backend)
    : backend_(backend),
      page_tokens_(options.page_tokens),
      step_tokens_(sizes.max_batch_rows - sizes.max_logit_rows),
      enabled_(options.prefix_cache) {
    uint32_t first = 0, pages = sizes.kv_pages;
    for (const uint32_t window_pages : count_window_pages(spec, options.page_tokens)) {
        kinds_.push_back({{}, window_pages, backend->page_bytes(first)});
        kinds_.back().pool.open(std::exchange(first, pages), pages);
        pages = sizes.window_pages;
    }
    VALAR_ASSERT(kinds_.size() <= kPageKinds);
}

void PrefixCache::forget() {
    for (Kind& kind : kinds_) kind.pool.open(kind.pool.first(), kind.pool.pages());
}

uint32_t PrefixCache::pages_for(uint32_t positions) const {
    return (positions + page_tokens_ - 1) / page_tokens_;
}

void PrefixCache::reserve_lists(Sequence& sequence) const {
    const uint32_t pages = pages_for(sequence.length() + sequence.prompt->max_output);
    for (size_t kind = 0; kind < kinds_.size(); ++kind) sequence.lists[kind].pages.reserve(pages);
    if (enabled_) sequence.page_keys.reserve(pages);
}

// ---- Room ------------------------------------------------------------------------------------

bool PrefixCache::has_room(const Sequence& next, std::span<const SequencePtr> running) const {
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        uint64_t pages = needed_to_start(kind, next);
        for (const SequencePtr& other : running) pages += needed_to_go_on(kind, *other);
        if (pages > kinds_[kind].pool.unused()) return false;
    }
    return true;
}

// The most that it holds at a time until it has read its tokens and one more.
uint64_t PrefixCache::needed(const Kind& kind, const Sequence& sequence) const {
    return count_held_pages(sequence.length() + 1, kind.window_pages,
                            std::min(step_tokens_, sequence.left() + 1), page_tokens_);
}

// What others use already is not taken again.
uint64_t PrefixCache::needed_to_start(size_t kind, const Sequence& sequence) const {
    const PagePool& pool = kinds_[kind].pool;
    uint64_t pages = needed(kinds_[kind], sequence);
    for (const Hash256& key : sequence.page_keys) {
        const uint32_t page = pool.find(key);
        if (pages == 0 || page == PagePool::none || !pool.in_use(page)) break;
        --pages;
    }
    return pages;
}

uint64_t PrefixCache::needed_to_go_on(size_t kind, const Sequence& sequence) const {
    const PageList& list = sequence.lists[kind];
    VALAR_ASSERT(list.passed <= list.pages.size());
    const uint64_t pages = needed(kinds_[kind], sequence);
    return pages - std::min<uint64_t>(pages, list.pages.size() - list.passed);
}

// ---- What is there already -------------------------------------------------------------------

// How many of the first pages with these keys need not be computed: the largest number for which
// the cache has every page that a window still reaches. That is so for those that `from` has computed.
size_t PrefixCache::count_cached(std::span<const Hash256> keys, const Sequence* from) const {
    const size_t computed = from ? from->computed / page_tokens_ : 0;
    size_t held[kPageKinds] = {};  // that are there right before the next
    for (size_t kind = 0; from && kind < kinds_.size(); ++kind)
        held[kind] = computed - from->lists[kind].passed;
    size_t found = computed;
    for (size_t i = computed; i < keys.size(); ++i) {
        bool all = true;
        for (size_t kind = 0; kind < kinds_.size(); ++kind) {
            const bool cached = kinds_[kind].pool.find(keys[i]) != PagePool::none;
            held[kind] = cached ? held[kind] + 1 : 0;
            all &= held[kind] >= std::min<size_t>(i + 1, kinds_[kind].window_pages);
        }
        if (all) found = i + 1;
        else if (kinds_[0].window_pages == UINT32_MAX && held[0] <= i) break;
    }
    return found;
}

// The last token is left to compute (and sees no page that the one after it would not).
void PrefixCache::join(Sequence& sequence) {
    if (!enabled_) return;
    if (sequence.computed % page_tokens_ == 0 && sequence.left() >= page_tokens_)
        share_cached(sequence);
    if (sequence.left() == 0) --sequence.computed;
    const uint32_t found = std::min(sequence.computed, sequence.outcome.usage.input_tokens);
    if (found > sequence.reached) {
        sequence.outcome.usage.cached_tokens += found - sequence.reached;
        sequence.reached = found;
    }
}

void PrefixCache::share_cached(Sequence& sequence) {
    const size_t begin = sequence.computed / page_tokens_;
    extend_keys(sequence, sequence.length() / page_tokens_);
    const size_t end = count_cached(sequence.page_keys, &sequence);
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        PagePool& pool = kinds_[kind].pool;
        std::vector<uint32_t>& pages = sequence.lists[kind].pages;
        const size_t first = kinds_[kind].first_needed(end);
        for (size_t i = begin; i < end; ++i) {
            const uint32_t page = i < first ? PagePool::none : pool.find(sequence.page_keys[i]);
            if (page != PagePool::none) pool.share(page);
            if (i < pages.size()) pool.drop(std::exchange(pages[i], page));
            else pages.push_back(page);
        }
    }
    if (end > begin) sequence.kept = static_cast<uint32_t>(end);
    sequence.computed = static_cast<uint32_t>(end * page_tokens_);
    drop_passed(sequence);
}

// ---- Pages of a sequence ---------------------------------------------------------------------

// Whether the page that the next row goes to is known to the cache or used by others.
bool PrefixCache::copies_first(size_t kind, const Sequence& sequence) const {
    const std::vector<uint32_t>& pages = sequence.lists[kind].pages;
    const size_t begun = sequence.computed / page_tokens_;
    return begun < pages.size() && !kinds_[kind].pool.writable(pages[begun]);
}

uint32_t PrefixCache::lacking(size_t kind, const Sequence& sequence) const {
    const uint32_t held = static_cast<uint32_t>(sequence.lists[kind].pages.size());
    const uint32_t all = pages_for(sequence.computed + sequence.rows) +
                         copies_first(kind, sequence);
    return all - std::min(all, held);
}

bool PrefixCache::has_pages(const Sequence& sequence) const {
    for (size_t kind = 0; kind < kinds_.size(); ++kind)
        if (lacking(kind, sequence) > kinds_[kind].pool.unused()) return false;
    return true;
}

void PrefixCache::take_pages(Sequence& sequence) {
    VALAR_ASSERT(has_pages(sequence));
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        PagePool& pool = kinds_[kind].pool;
        std::vector<uint32_t>& pages = sequence.lists[kind].pages;
        if (copies_first(kind, sequence)) {
            const uint32_t begun = sequence.computed / page_tokens_;
            const uint32_t shared = std::exchange(pages[begun], pool.take());
            backend_->copy_page(shared, pages[begun]);
            pool.drop(shared);
            sequence.kept = begun;
        }
        while (lacking(kind, sequence) > 0) pages.push_back(pool.take());
    }
}

// Of two pages with the same content one is kept.
void PrefixCache::keep(Sequence& sequence) {
    const uint32_t full = sequence.computed / page_tokens_;
    if (!enabled_) return;
    extend_keys(sequence, full);
    for (; sequence.kept < full; ++sequence.kept)
        for (size_t kind = 0; kind < kinds_.size(); ++kind) {
            PagePool& pool = kinds_[kind].pool;
            VALAR_ASSERT(sequence.kept < sequence.lists[kind].pages.size());
            uint32_t& page = sequence.lists[kind].pages[sequence.kept];
            const Hash256& key = sequence.page_keys[sequence.kept];
            const uint32_t known = pool.find(key);
            if (known == PagePool::none) {
                pool.set_key(page, key, sequence.prompt->group);
            } else {
                pool.share(known);
                pool.drop(std::exchange(page, known));
            }
        }
}

void PrefixCache::drop_passed(Sequence& sequence) {
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        PageList& list = sequence.lists[kind];
        const size_t first = kinds_[kind].first_needed(sequence.computed / page_tokens_);
        for (; list.passed < first; ++list.passed) {
            VALAR_ASSERT(list.passed < list.pages.size());
            uint32_t& page = list.pages[list.passed];
            if (page != PagePool::none) kinds_[kind].pool.drop(page);
            page = PagePool::none;
        }
    }
}

// From the last to the first: what begins a prefix is to outlive what ends it.
void PrefixCache::release(Sequence& sequence) {
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        auto& [pages, passed] = sequence.lists[kind];
        for (; pages.size() > passed; pages.pop_back()) kinds_[kind].pool.drop(pages.back());
        pages.clear();
        passed = 0;
    }
    sequence.computed = sequence.rows = sequence.kept = 0;
}

void PrefixCache::refresh(uint64_t group) {
    for (Kind& kind : kinds_) kind.pool.refresh(group);
}

void PrefixCache::extend_keys(Sequence& sequence, size_t count) const {
    extend_page_keys(sequence.page_keys, sequence.prompt->root, sequence.tokens, page_tokens_,
                     count);
}

// ---- Pages as bytes --------------------------------------------------------------------------

size_t PrefixCache::find_end(std::span<const Hash256> keys) const {
    return count_cached(keys, nullptr);
}

size_t PrefixCache::page_bytes() const {
    size_t bytes = 0;
    for (const Kind& kind : kinds_) bytes += kind.page_bytes;
    return bytes;
}

Result<uint64_t> PrefixCache::count_bytes(size_t end) const {
    uint64_t all = 0;
    for (const Kind& kind : kinds_) {
        uint64_t bytes;
        if (mul_overflows(end - kind.first_needed(end), kind.page_bytes, &bytes) ||
            add_overflows(all, bytes, &all))
            return make_error(ErrorKind::too_large, "too many pages");
    }
    return all;
}

void PrefixCache::export_pages(std::span<const Hash256> keys, std::byte* out) const {
    for (const Kind& kind : kinds_)
        for (size_t i = kind.first_needed(keys.size()); i < keys.size(); ++i) {
            const uint32_t page = kind.pool.find(keys[i]);
            VALAR_ASSERT(page != PagePool::none);
            backend_->export_page(page, out);
            out += kind.page_bytes;
        }
}

void PrefixCache::import_pages(std::span<const Hash256> keys, size_t end, const std::byte* bytes) {
    for (Kind& kind : kinds_) {
        const size_t first = kind.first_needed(end);
        std::vector<uint32_t> pages;
        for (size_t i = first; i < std::min(end, keys.size()); ++i) {
            uint32_t page = kind.pool.find(keys[i]);
            if (page != PagePool::none) {
                kind.pool.share(page);
            } else {
                if (kind.pool.unused() == 0) break;
                page = kind.pool.take();
                backend_->import_page(page, bytes + (i - first) * kind.page_bytes);
                kind.pool.set_key(page, keys[i], 0);
            }
            pages.push_back(page);
        }
        for (; !pages.empty(); pages.pop_back()) kind.pool.drop(pages.back());
        bytes += (end - first) * kind.page_bytes;
    }
}

void PrefixCache::report(ResponderStats* counts) const {
    counts->pages = counts->pages_used = counts->pages_cached = counts->pages_shared = 0;
    for (const Kind& kind : kinds_) {
        counts->pages += kind.pool.pages();
        counts->pages_used += kind.pool.pages() - kind.pool.unused();
        counts->pages_cached += kind.pool.cached();
        counts->pages_shared += kind.pool.shared();
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "engine/plan.hpp"
#include "engine/prefix_cache.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

PrefixCache::PrefixCache(const EngineOptions& options, const BackendOptions& sizes,
                         const ModelSpec& spec, Backend& backend)
    : backend_(backend),
      page_tokens_(options.page_tokens),
      step_tokens_(sizes.max_batch_rows - sizes.max_logit_rows),
      window_pages_(count_window_pages(spec, options.page_tokens)),
      enabled_(options.prefix_cache) {
    pool_.open(sizes.kv_pages);
}

uint32_t PrefixCache::pages_for(uint32_t positions) const {
    return (positions + page_tokens_ - 1) / page_tokens_;
}

uint32_t PrefixCache::held_for(uint32_t positions) const {
    return count_held_pages(positions, window_pages_, step_tokens_, page_tokens_);
}

// What others use already is not taken again.
uint64_t PrefixCache::needed_to_start(const Sequence& sequence) const {
    uint64_t needed = held_for(sequence.length() + 1);
    for (const Hash256& key : sequence.page_keys) {
        const uint32_t page = pool_.find(key);
        if (needed == 0 || page == PagePool::none || !pool_.in_use(page)) break;
        --needed;
    }
    return needed;
}

uint64_t PrefixCache::needed_to_go_on(const Sequence& sequence) const {
    VALAR_ASSERT(sequence.passed <= sequence.pages.size());
    const size_t needed = held_for(sequence.length() + 1),
                 held = sequence.pages.size() - sequence.passed;
    return needed - std::min(needed, held);
}

// How many of the first pages with these keys need not be computed: the largest number for which
// the cache has every page that a window still reaches. That is so for `computed`; `held` counts
// the pages that are there right before it.
size_t PrefixCache::count_cached(std::span<const Hash256> keys, size_t computed,
                                 size_t held) const {
    size_t found = computed;
    for (size_t i = computed; i < keys.size(); ++i) {
        const bool cached = pool_.find(keys[i]) != PagePool::none;
        held = cached ? held + 1 : 0;
        if (held >= std::min<size_t>(i + 1, window_pages_)) found = i + 1;
        else if (window_pages_ == UINT32_MAX) break;
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
    const size_t end = count_cached(sequence.page_keys, begin, begin - sequence.passed);
    for (size_t i = begin; i < end; ++i) {
        const uint32_t page = window_pages_ < end - i ? PagePool::none
                                                      : pool_.find(sequence.page_keys[i]);
        if (page != PagePool::none) pool_.share(page);
        if (i < sequence.pages.size()) pool_.drop(std::exchange(sequence.pages[i], page));
        else sequence.pages.push_back(page);
    }
    if (end > begin) sequence.kept = static_cast<uint32_t>(end);
    sequence.computed = static_cast<uint32_t>(end * page_tokens_);
    drop_passed(sequence);
}

// Whether the page that the next row goes to is known to the cache or used by others.
bool PrefixCache::copies_first(const Sequence& sequence) const {
    const size_t begun = sequence.computed / page_tokens_;
    return begun < sequence.pages.size() && !pool_.writable(sequence.pages[begun]);
}

uint32_t PrefixCache::lacking(const Sequence& sequence) const {
    const uint32_t held = static_cast<uint32_t>(sequence.pages.size());
    const uint32_t needed = pages_for(sequence.computed + sequence.rows) + copies_first(sequence);
    return needed - std::min(needed, held);
}

void PrefixCache::take_pages(Sequence& sequence) {
    VALAR_ASSERT(lacking(sequence) <= pool_.unused());
    if (copies_first(sequence)) {
        const uint32_t begun = sequence.computed / page_tokens_;
        const uint32_t shared = std::exchange(sequence.pages[begun], pool_.take());
        backend_.copy_page(shared, sequence.pages[begun]);
        pool_.drop(shared);
        sequence.kept = begun;
    }
    while (lacking(sequence) > 0) sequence.pages.push_back(pool_.take());
}

// Of two pages with the same content one is kept.
void PrefixCache::keep(Sequence& sequence) {
    const uint32_t full = sequence.computed / page_tokens_;
    if (!enabled_) return;
    extend_keys(sequence, full);
    for (; sequence.kept < full; ++sequence.kept) {
        VALAR_ASSERT(sequence.kept < sequence.pages.size());
        uint32_t& page = sequence.pages[sequence.kept];
        const Hash256& key = sequence.page_keys[sequence.kept];
        const uint32_t known = pool_.find(key);
        if (known == PagePool::none) {
            pool_.set_key(page, key, sequence.prompt->group);
        } else {
            pool_.share(known);
            pool_.drop(std::exchange(page, known));
        }
    }
}

void PrefixCache::drop_passed(Sequence& sequence) {
    const uint32_t full = sequence.computed / page_tokens_;
    for (; full > window_pages_ && sequence.passed < full - window_pages_; ++sequence.passed) {
        VALAR_ASSERT(sequence.passed < sequence.pages.size());
        uint32_t& page = sequence.pages[sequence.passed];
        if (page != PagePool::none) pool_.drop(page);
        page = PagePool::none;
    }
}

// From the last to the first: what begins a prefix is to outlive what ends it.
void PrefixCache::release(Sequence& sequence) {
    for (; sequence.pages.size() > sequence.passed; sequence.pages.pop_back())
        pool_.drop(sequence.pages.back());
    sequence.pages.clear();
    sequence.computed = sequence.rows = sequence.kept = sequence.passed = 0;
}

void PrefixCache::extend_keys(Sequence& sequence, size_t count) const {
    extend_page_keys(sequence.page_keys, sequence.prompt->root, sequence.tokens, page_tokens_,
                     count);
}

std::span<const Hash256> PrefixCache::find_end(std::span<const Hash256> keys) const {
    const size_t end = count_cached(keys, 0, 0);
    const size_t first = end - std::min<size_t>(end, window_pages_);
    return keys.subspan(first, end - first);
}

void PrefixCache::export_pages(std::span<const Hash256> keys, std::byte* out) const {
    for (const Hash256& key : keys) {
        const uint32_t page = pool_.find(key);
        VALAR_ASSERT(page != PagePool::none);
        backend_.export_page(page, out);
        out += page_bytes();
    }
}

void PrefixCache::import_pages(std::span<const Hash256> keys, std::span<const std::byte> bytes) {
    const size_t size = page_bytes(), count = std::min(keys.size(), bytes.size() / size);
    std::vector<uint32_t> pages;
    for (size_t i = 0; i < count; ++i) {
        uint32_t page = pool_.find(keys[i]);
        if (page != PagePool::none) {
            pool_.share(page);
        } else {
            if (pool_.unused() == 0) break;
            page = pool_.take();
            backend_.import_page(page, bytes.data() + i * size);
            pool_.set_key(page, keys[i], 0);
        }
        pages.push_back(page);
    }
    for (; !pages.empty(); pages.pop_back()) pool_.drop(pages.back());
}

void PrefixCache::report(ResponderStats* counts) const {
    counts->pages = pool_.pages();
    counts->pages_used = pool_.pages() - pool_.unused();
    counts->pages_cached = pool_.cached();
    counts->pages_shared = pool_.shared();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

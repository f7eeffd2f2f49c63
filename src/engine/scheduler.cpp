#include "prologue.hpp"

#include "engine/state.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {}  // namespace

// How urgent, 0 before 1 before 2. Only waiting makes a request more urgent: one that runs for long
// still gives way.
uint32_t rank_of(const Sequence& sequence, const EngineOptions& options, uint64_t now) {
    constexpr uint64_t ms = 1'000'000;
    uint64_t waited = sequence.waited_ns + (sequence.waiting_ns ? now - sequence.waiting_ns : 0);
    uint32_t rank = static_cast<uint32_t>(sequence.prompt->window);
    if (rank == 2 && waited >= options.flex_target_ms * ms) {
        rank = 1;
        waited -= options.flex_target_ms * ms;
    }
    if (rank == 1 && waited >= options.standard_target_ms * ms) rank = 0;
    return rank;
}

// What may come next: what followed the last tokens where they stood before, at the longest match,
// of several the latest (prompt lookup decoding, Saxena 2023). Text that repeats itself up to its
// end goes on repeating. Returns how many of `most` it put into `out`.
uint32_t find_draft(std::span<const Token> tokens, uint32_t most, Token* out) {
    const size_t last = tokens.size() - 1;
    size_t next = 0;
    uint32_t longest = kMinMatch - 1;
    for (size_t at = last; at-- > longest && longest < kMaxMatch;) {
        if (tokens[at] != tokens[last]) continue;
        uint32_t match = 1;
        while (match < kMaxMatch && match <= at && tokens[at - match] == tokens[last - match])
            ++match;
        if (match <= longest) continue;
        longest = match;
        next = at + 1;
    }
    if (next == 0) return 0;
    for (size_t i = 0; i < most; ++i)
        out[i] = next + i <= last ? tokens[next + i] : out[next + i - last - 1];
    return most;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- The queue, and Responder (any thread) ---------------------------------------------------

Result<void> Engine::State::enqueue(std::unique_ptr<detail::PreparedPrompt> prompt,
                                    const MailboxPtr& reply, bool known) {
    auto sequence = std::make_unique<detail::Sequence>(reply, std::move(prompt), *tokenizer);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (closed) return detail::engine_closed_error();
        const size_t queued = arrivals.size() + waiting_count;
        if (queued >= options.max_queued) {
            Error error = detail::make_error(
                ErrorKind::overloaded, detail::format("%zu requests are waiting already", queued),
                "overloaded");
            error.retry_after_s = retry_after_s();
            return error;
        }
        if (known && !by_id.emplace(reply->id, reply).second)
            return detail::make_error(ErrorKind::internal, "the id " + reply->id + " is in use");
        arrivals.push_back(std::move(sequence));
    }
    doorbell->ring();
    return {};
}

// When half of the queue will have gone, as fast as requests were answered so far.
uint32_t Engine::State::retry_after_s() const {
    const uint64_t done = std::max<uint64_t>(counts.completed, 1);
    const uint64_t one_us = (counts.prefill_us + counts.decode_us) / done;
    const uint64_t queued = arrivals.size() + waiting_count;
    const uint64_t seconds = one_us * queued / 2 / options.max_running / 1'000'000;
    return static_cast<uint32_t>(std::clamp<uint64_t>(seconds, 1, 60));
}

Result<void> Engine::State::submit(std::unique_ptr<Prepared> prepared, std::string id) {
    auto reply = std::make_shared<detail::Mailbox>();
    reply->id = std::move(id);
    reply->doorbell = doorbell;
    std::unique_ptr<detail::PreparedPrompt> prompt(
        static_cast<detail::PreparedPrompt*>(prepared.release()));
    return enqueue(std::move(prompt), reply, true);
}

Engine::State::MailboxPtr Engine::State::find(const std::string& id) const {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = by_id.find(id);
    return found == by_id.end() ? nullptr : found->second;
}

std::optional<Event> Engine::State::poll(const std::string& id) {
    const MailboxPtr reply = find(id);
    if (!reply) return std::nullopt;
    auto event = reply->take();
    if (event && event->kind == Event::Kind::finished) {
        const std::lock_guard<std::mutex> lock(mutex);
        by_id.erase(id);
    }
    return event;
}

void Engine::State::cancel(const std::string& id) {
    if (const MailboxPtr reply = find(id)) reply->cancel();
}

ResponderStats Engine::State::stats() const {
    const std::lock_guard<std::mutex> lock(mutex);
    ResponderStats out = counts;
    out.queued = static_cast<uint32_t>(arrivals.size()) + waiting_count;
    return out;
}

void Engine::State::on_ready(void (*ready)(void* context, const std::string& id), void* to) {
    std::unique_lock<std::mutex> lock(listener_mutex);
    listener = ready;
    listener_context = to;
    listener_idle.wait(lock, [&] { return listener_calls == 0; });
}

void Engine::State::announce(const detail::Mailbox& reply) {
    std::unique_lock<std::mutex> lock(listener_mutex);
    if (!listener) return;
    const auto call = listener;
    void* to = listener_context;
    ++listener_calls;
    lock.unlock();
    call(to, reply.id);
    lock.lock();
    if (--listener_calls == 0) listener_idle.notify_all();
}

// ---- The step (one thread at a time) ---------------------------------------------------------

// Works until the deadline or until nothing is left; true while something is. `budget_ns` is what a
// step may take: batches are made so that they do not take many steps.
Result<bool> Engine::State::work(uint64_t deadline_ns, uint64_t budget_ns) {
    if (failure) return *failure;
    while (!loaded.load(std::memory_order_relaxed)) {
        auto done = load(std::min(deadline_ns, detail::monotonic_ns() + detail::kLookNs));
        if (!done) {
            failure = done.error();
            options.log(LogLevel::error, failure->message);
            fail_all(*failure);
            return *failure;
        }
        if (!*done && time_is_up(deadline_ns)) return true;
    }
    while (work_on_batch(deadline_ns, budget_ns))
        if (time_is_up(deadline_ns)) return true;
    return false;
}

Result<bool> Engine::State::load(uint64_t deadline_ns) {
    const uint64_t now = detail::monotonic_ns();
    float part = 0;
    auto done = backend->load(deadline_ns > now ? (deadline_ns - now) / 1000 : 0, &part);
    if (!done) return done;
    progress.store(part, std::memory_order_relaxed);
    if (*done) {
        options.log(LogLevel::info, "loaded " + gguf.name());
        loaded.store(true, std::memory_order_release);
    }
    return done;
}

// One piece of work: a sequence's results, a part of a batch or the next batch. False: there is
// nothing to do.
bool Engine::State::work_on_batch(uint64_t deadline_ns, uint64_t budget_ns) {
    if (doorbell->cancels.exchange(false, std::memory_order_acquire)) drop_cancelled();
    if (untaken > 0) {
        take_results(*running[running.size() - untaken]);
        --untaken;
    } else if (!batch.empty()) {
        compute(deadline_ns);
    } else {
        sweep();
        admit();
        if (running.empty()) return false;
        build_batch(budget_ns);
    }
    return true;
}

void Engine::State::compute(uint64_t deadline_ns) {
    const uint64_t start = detail::monotonic_ns();
    auto done = backend->advance(std::min(deadline_ns, start + detail::kLookNs));
    batch_ns += detail::monotonic_ns() - start;
    if (done && !*done) return;
    if (done) {
        if (batch.size() >= detail::kMinPromptRows) row_ns = batch_ns / batch.size();
        untaken = running.size();
        const std::lock_guard<std::mutex> lock(mutex);
        ++counts.batches;
        counts.batch_rows += batch.size();
    } else {
        for (const SequencePtr& sequence : running)
            if (sequence->rows && !sequence->over) finish(*sequence, Status::failed, done.error());
    }
    batch.clear();
}

// Replies learn at once; pages that a batch is using go when it is done.
void Engine::State::drop_cancelled() {
    const auto end = [&](const SequencePtr& sequence) {
        if (!sequence->over && sequence->reply->cancelled.load(std::memory_order_acquire))
            finish(*sequence, Status::cancelled,
                   detail::make_error(ErrorKind::cancelled, "cancelled", "cancelled"));
        return sequence->over;
    };
    take_arrivals();
    for (SequencePtr& sequence : waiting)
        if (end(sequence)) {
            leave(*sequence);
            sequence.reset();
        }
    std::erase(waiting, nullptr);
    bool any_left = false;
    for (const SequencePtr& sequence : running) any_left |= !end(sequence) && sequence->rows;
    if (!batch.empty() && !any_left) {
        backend->abandon();
        batch.clear();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
}

// ---- Who runs --------------------------------------------------------------------------------

void Engine::State::take_arrivals() {
    const size_t before = waiting.size();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        for (SequencePtr& sequence : arrivals) waiting.push_back(std::move(sequence));
        arrivals.clear();
        waiting_count = static_cast<uint32_t>(waiting.size());
    }
    for (size_t i = before; i < waiting.size(); ++i) {
        detail::Sequence& sequence = *waiting[i];
        sequence.ticket = ++ticket_clock;
        sequence.turn = &*turns.try_emplace(sequence.prompt->organisation).first;
        ++sequence.turn->second.members;
    }
}

void Engine::State::leave(detail::Sequence& sequence) {
    if (--sequence.turn->second.members == 0) turns.erase(std::string(sequence.turn->first));
}

// The one to start next, or null: by rank, then the organisation served longest ago, then first
// come.
Engine::State::SequencePtr* Engine::State::next_waiting() {
    SequencePtr* best = nullptr;
    const uint64_t now = detail::monotonic_ns();
    const auto order = [](const detail::Sequence& sequence) {
        return std::tuple(sequence.rank, sequence.turn->second.served, sequence.ticket);
    };
    for (SequencePtr& sequence : waiting) {
        sequence->rank = detail::rank_of(*sequence, options, now);
        if (!best || order(*sequence) < order(**best)) best = &sequence;
    }
    return best;
}

// Starts what there is room for. Who does not fit is waited for: it would never be its turn else.
void Engine::State::admit() {
    take_arrivals();
    while (SequencePtr* next = next_waiting()) {
        const uint64_t ticket = (*next)->ticket;
        if (!make_place(**next)) break;
        next = std::find_if(waiting.data(), waiting.data() + waiting.size(),
                            [&](const SequencePtr& one) { return one->ticket == ticket; });
        SequencePtr sequence = std::move(*next);
        waiting.erase(waiting.begin() + (next - waiting.data()));
        start_sequence(std::move(sequence));
    }
    std::sort(running.begin(), running.end(), [](const SequencePtr& a, const SequencePtr& b) {
        return std::tuple(a->rank, a->ticket) < std::tuple(b->rank, b->ticket);
    });
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
    counts.running = static_cast<uint32_t>(running.size());
    counts.pages_used = pool.pages() - pool.unused();
    counts.pages_cached = pool.cached();
    counts.pages_shared = pool.shared();
}

// Lower ranks give way.
bool Engine::State::make_place(const detail::Sequence& next) {
    while (running.size() == options.max_running || !fits(next)) {
        const auto last = std::max_element(
            running.begin(), running.end(), [](const SequencePtr& a, const SequencePtr& b) {
                return std::tuple(a->rank, a->ticket) < std::tuple(b->rank, b->ticket);
            });
        if ((*last)->rank <= next.rank) return false;
        std::swap(*last, running.back());
        preempt_last();
    }
    return true;
}

uint32_t Engine::State::pages_for(uint32_t positions) const {
    return (positions + options.page_tokens - 1) / options.page_tokens;
}

uint32_t Engine::State::held_for(uint32_t positions) const {
    return detail::count_held_pages(positions, window_pages, step_tokens, options.page_tokens);
}

// Whether there are pages for it and for what the others still have to read.
bool Engine::State::fits(const detail::Sequence& next) const {
    uint64_t wanted = held_for(next.length() + 1);
    for (const detail::Hash256& key : next.page_keys) {
        const uint32_t page = pool.find(key);
        if (wanted == 0 || page == detail::PagePool::none || !pool.in_use(page)) break;
        --wanted;
    }
    for (const SequencePtr& other : running) {
        const size_t needed = held_for(other->length() + 1),
                     there = other->pages.size() - other->passed;
        wanted += needed - std::min(needed, there);
    }
    return running.empty() || wanted <= pool.unused();
}

// All that grows later gets its room here.
void Engine::State::start_sequence(SequencePtr sequence) {
    const uint64_t now = detail::monotonic_ns();
    sequence->waited_ns += now - std::exchange(sequence->waiting_ns, 0);
    sequence->turn->second.served = ++serve_clock;
    if (sequence->prompt->group) pool.refresh(sequence->prompt->group);
    if (sequence->started_ns == 0) {
        sequence->started_ns = now;
        const uint32_t most = sequence->length() + sequence->prompt->max_output;
        const size_t most_text = size_t{sequence->prompt->max_output} * 4;
        sequence->tokens.reserve(most);
        sequence->pages.reserve(pages_for(most));
        if (options.prefix_cache) sequence->page_keys.reserve(pages_for(most));
        sequence->outcome.text.reserve(most_text);
        sequence->held.reserve(2 * detail::kMaxStopBytes);
        sequence->sampler.see_prompt(sequence->tokens, sequence->prompt->max_output);
        if (sequence->prompt->logprobs)
            sequence->outcome.logprobs.reserve(sequence->prompt->max_output);
        if (sequence->reply->put_start(most_text)) announce(*sequence->reply);
    }
    running.push_back(std::move(sequence));
}

// The last of those that run gives way: it goes on later with what the cache still has of it, and
// computes the rest again. Nothing that was drawn changes.
void Engine::State::preempt_last() {
    SequencePtr sequence = std::move(running.back());
    running.pop_back();
    release_pages(*sequence);
    sequence->drafted = 0;
    sequence->waiting_ns = detail::monotonic_ns();
    waiting.push_back(std::move(sequence));
    const std::lock_guard<std::mutex> lock(mutex);
    waiting_count = static_cast<uint32_t>(waiting.size());
    ++counts.preempted;
}

// From the last to the first: what begins a prefix is to outlive what ends it.
void Engine::State::release_pages(detail::Sequence& sequence) {
    for (; sequence.pages.size() > sequence.passed; sequence.pages.pop_back())
        pool.drop(sequence.pages.back());
    sequence.pages.clear();
    sequence.computed = sequence.rows = sequence.kept = sequence.passed = 0;
}

void Engine::State::sweep() {
    for (SequencePtr& sequence : running)
        if (sequence->over) {
            release_pages(*sequence);
            leave(*sequence);
            sequence.reset();
        }
    std::erase(running, nullptr);
}

// ---- The prefix cache ------------------------------------------------------------------------

// The most pages with these keys, at least `computed` (of which the last `held` are there), that
// need not be computed: the cache has those of them that a window still reaches.
size_t Engine::State::count_cached(std::span<const detail::Hash256> keys, size_t computed,
                                   size_t held) const {
    size_t found = computed;
    for (size_t i = computed; i < keys.size(); ++i) {
        const bool there = pool.find(keys[i]) != detail::PagePool::none;
        held = there ? held + 1 : 0;
        if (held >= std::min<size_t>(i + 1, window_pages)) found = i + 1;
        else if (window_pages == UINT32_MAX) break;
    }
    return found;
}

// Takes over what the cache has of the tokens that come next; the last one is left to compute (and
// sees no page that the one after it would not).
void Engine::State::join_cached(detail::Sequence& sequence) {
    const uint32_t page_tokens = options.page_tokens;
    if (!options.prefix_cache) return;
    if (sequence.computed % page_tokens == 0 && sequence.left() >= page_tokens) {
        const size_t from = sequence.computed / page_tokens;
        extend_keys(sequence, sequence.length() / page_tokens);
        const size_t to = count_cached(sequence.page_keys, from, from - sequence.passed);
        for (size_t i = from; i < to; ++i) {
            const uint32_t page = window_pages < to - i ? detail::PagePool::none
                                                        : pool.find(sequence.page_keys[i]);
            if (page != detail::PagePool::none) pool.share(page);
            if (i < sequence.pages.size()) pool.drop(std::exchange(sequence.pages[i], page));
            else sequence.pages.push_back(page);
        }
        if (to > from) sequence.kept = static_cast<uint32_t>(to);
        sequence.computed = static_cast<uint32_t>(to * page_tokens);
        drop_passed(sequence);
    }
    if (sequence.left() == 0) --sequence.computed;
    const uint32_t found = std::min(sequence.computed, sequence.outcome.usage.input_tokens);
    if (found > sequence.reached) {
        sequence.outcome.usage.cached_tokens += found - sequence.reached;
        sequence.reached = found;
    }
}

// Makes the pages that are full now known to the cache; of two with the same content one is kept.
void Engine::State::keep_pages(detail::Sequence& sequence) {
    const uint32_t full = sequence.computed / options.page_tokens;
    if (!options.prefix_cache) return;
    extend_keys(sequence, full);
    for (; sequence.kept < full; ++sequence.kept) {
        uint32_t& page = sequence.pages[sequence.kept];
        const detail::Hash256& key = sequence.page_keys[sequence.kept];
        const uint32_t known = pool.find(key);
        if (known == detail::PagePool::none) {
            pool.set_key(page, key, sequence.prompt->group);
        } else {
            pool.share(known);
            pool.drop(std::exchange(page, known));
        }
    }
}

// Gives back what no window reaches from the next row.
void Engine::State::drop_passed(detail::Sequence& sequence) {
    const uint32_t full = sequence.computed / options.page_tokens;
    for (; full > window_pages && sequence.passed < full - window_pages; ++sequence.passed) {
        uint32_t& page = sequence.pages[sequence.passed];
        if (page != detail::PagePool::none) pool.drop(page);
        page = detail::PagePool::none;
    }
}

void Engine::State::extend_keys(detail::Sequence& sequence, size_t count) const {
    detail::extend_page_keys(sequence.page_keys, sequence.prompt->root, sequence.tokens,
                             options.page_tokens, count);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "engine/scheduler.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

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

bool runs_before(const SequencePtr& a, const SequencePtr& b) {
    return std::tuple(a->rank, a->ticket) < std::tuple(b->rank, b->ticket);
}

}  // namespace

Scheduler::Scheduler(const EngineOptions& options, const BackendOptions& sizes,
                     const LoadedModel& model, const std::unique_ptr<Backend>& backend,
                     PrefixCache& cache, Desk& desk)
    : options_(options),
      model_(model),
      backend_(backend),
      cache_(cache),
      desk_(desk),
      answers_(model, desk),
      step_tokens_(sizes.max_batch_rows - sizes.max_logit_rows),
      max_logit_rows_(sizes.max_logit_rows),
      short_rope_tokens_(short_rope_tokens(model.spec())),
      row_cost_(model.spec()) {
    batch_.reserve(sizes.max_batch_rows);
    running_.reserve(options.max_running);
    desk_.count([&](ResponderStats& counts) { cache_.report(&counts); });
}

// ---- The step --------------------------------------------------------------------------------

bool Scheduler::work(uint64_t deadline_ns, uint64_t budget_ns) {
    take_cancels();
    if (untaken_ > 0) {
        VALAR_ASSERT(untaken_ <= running_.size());
        take_results(*running_[running_.size() - untaken_]);
        --untaken_;
    } else if (!batch_.empty()) {
        compute(deadline_ns);
    } else {
        sweep();
        admit();
        if (running_.empty()) return false;
        build_batch(budget_ns);
    }
    return true;
}

void Scheduler::take_cancels() {
    if (desk_.take_cancels()) drop_cancelled();
}

void Scheduler::pause() {
    while (untaken_ > 0 || !batch_.empty()) work(kNoLimit, kNoLimit);
    sweep();
    while (!running_.empty()) preempt_last();
    count_running();
}

void Scheduler::compute(uint64_t deadline_ns) {
    const uint64_t start = monotonic_ns();
    auto done = backend_->advance(std::min(deadline_ns, start + kLookNs));
    batch_ns_ += monotonic_ns() - start;
    if (done && !*done) return;
    if (done) {
        end_batch();
    } else {
        for (const SequencePtr& sequence : running_)
            if (sequence->rows && !sequence->over)
                answers_.end(*sequence, Status::failed, done.error());
    }
    batch_.clear();
}

void Scheduler::end_batch() {
    if (batch_.size() >= kMinPromptRows)
        cost_ns_ = static_cast<double>(batch_ns_) / static_cast<double>(batch_cost_);
    untaken_ = running_.size();
    desk_.count([&](ResponderStats& counts) {
        ++counts.batches;
        counts.batch_rows += batch_.size();
    });
}

// Replies learn at once; pages that a batch is using go when it is done.
void Scheduler::drop_cancelled() {
    const auto end = [&](const SequencePtr& sequence) {
        if (!sequence->over && sequence->reply->cancelled.load(std::memory_order_acquire))
            answers_.end(*sequence, Status::cancelled,
                         make_error(ErrorKind::cancelled, "cancelled", "cancelled"));
        return sequence->over;
    };
    take_arrivals();
    for (SequencePtr& sequence : waiting_)
        if (end(sequence)) {
            leave(*sequence);
            sequence.reset();
        }
    std::erase(waiting_, nullptr);
    bool any_left = false;
    for (const SequencePtr& sequence : running_) any_left |= !end(sequence) && sequence->rows;
    if (!batch_.empty() && !any_left) {
        backend_->abandon();
        batch_.clear();
    }
    desk_.count(
        [&](ResponderStats& counts) { counts.queued = static_cast<uint32_t>(waiting_.size()); });
}

void Scheduler::fail_all(const Error& error) {
    take_arrivals();
    if (!batch_.empty()) backend_->abandon();
    batch_.clear();
    untaken_ = 0;
    for (auto* list : {&running_, &waiting_}) {
        for (const SequencePtr& sequence : *list)
            if (!sequence->over) answers_.end(*sequence, Status::failed, error);
        list->clear();
    }
    desk_.count([](ResponderStats& counts) { counts.queued = 0; });
}

// ---- Admission and preemption ----------------------------------------------------------------

void Scheduler::take_arrivals() {
    const size_t before = waiting_.size();
    desk_.take_arrivals(&waiting_);
    for (size_t i = before; i < waiting_.size(); ++i) {
        Sequence& sequence = *waiting_[i];
        sequence.ticket = ++ticket_clock_;
        sequence.turn = &*turns_.try_emplace(sequence.prompt->organisation).first;
        ++sequence.turn->second.members;
    }
}

void Scheduler::leave(Sequence& sequence) {
    VALAR_ASSERT(sequence.turn && sequence.turn->second.members > 0);
    if (--sequence.turn->second.members == 0) turns_.erase(std::string(sequence.turn->first));
}

// The one to start next, or null: by rank, then the organisation served longest ago, then first
// come.
SequencePtr* Scheduler::next_waiting() {
    SequencePtr* best = nullptr;
    const uint64_t now = monotonic_ns();
    const auto order = [](const Sequence& sequence) {
        return std::tuple(sequence.rank, sequence.turn->second.served, sequence.ticket);
    };
    for (SequencePtr& sequence : waiting_) {
        sequence->rank = rank_of(*sequence, options_, now);
        if (!best || order(*sequence) < order(**best)) best = &sequence;
    }
    return best;
}

// Starts requests while there is room for them. If the next one does not fit, none after it is
// started: smaller ones would pass it again and again, and it would never run.
void Scheduler::admit() {
    take_arrivals();
    while (SequencePtr* next = next_waiting()) {
        const uint64_t ticket = (*next)->ticket;
        if (!make_place(**next)) break;
        // Whoever gave way waits too: the vector may have moved.
        next = std::find_if(waiting_.data(), waiting_.data() + waiting_.size(),
                            [&](const SequencePtr& other) { return other->ticket == ticket; });
        SequencePtr sequence = std::move(*next);
        waiting_.erase(waiting_.begin() + (next - waiting_.data()));
        start(std::move(sequence));
    }
    std::sort(running_.begin(), running_.end(), runs_before);
    count_running();
}

void Scheduler::count_running() {
    desk_.count([&](ResponderStats& counts) {
        counts.queued = static_cast<uint32_t>(waiting_.size());
        counts.running = static_cast<uint32_t>(running_.size());
        for (const SequencePtr& sequence : running_) AnswerWriter::count(*sequence, &counts);
        cache_.report(&counts);
    });
}

// Sequences of lower rank give way until the next one fits; false if it still does not.
bool Scheduler::make_place(const Sequence& next) {
    while (running_.size() == options_.max_running ||
           !(running_.empty() || cache_.has_room(next, running_))) {
        const auto last = std::max_element(running_.begin(), running_.end(), runs_before);
        if ((*last)->rank <= next.rank) return false;
        std::swap(*last, running_.back());
        preempt_last();
    }
    return true;
}

void Scheduler::start(SequencePtr sequence) {
    const uint64_t now = monotonic_ns();
    sequence->waited_ns += now - std::exchange(sequence->waiting_ns, 0);
    sequence->turn->second.served = ++serve_clock_;
    if (sequence->prompt->group) cache_.refresh(sequence->prompt->group);
    if (sequence->started_ns == 0) {
        sequence->started_ns = now;
        cache_.reserve_lists(*sequence);
        answers_.begin(*sequence);
    }
    running_.push_back(std::move(sequence));
}

// The last of those that run gives way: it goes on later with what the cache still has of it, and
// computes the rest again. Nothing that was drawn changes.
void Scheduler::preempt_last() {
    VALAR_ASSERT(!running_.empty() && untaken_ == 0 && batch_.empty());
    SequencePtr sequence = std::move(running_.back());
    running_.pop_back();
    cache_.release(*sequence);
    sequence->drafts.count = 0;
    sequence->waiting_ns = monotonic_ns();
    waiting_.push_back(std::move(sequence));
    desk_.count([&](ResponderStats& counts) {
        counts.queued = static_cast<uint32_t>(waiting_.size());
        ++counts.preempted;
    });
}

// Takes away the sequences that are over, now that no batch uses their pages.
void Scheduler::sweep() {
    for (SequencePtr& sequence : running_)
        if (sequence->over) {
            cache_.release(*sequence);
            leave(*sequence);
            sequence.reset();
        }
    std::erase(running_, nullptr);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

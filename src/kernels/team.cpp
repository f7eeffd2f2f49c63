#include "prologue.hpp"

#include "kernels/internal.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- The worker team -------------------------------------------------------------------------

namespace {
constexpr uint64_t kSpinNs = 100'000;         // a stage of decode takes tens of microseconds
constexpr uint64_t kSleepNs = 1'000'000'000;  // sleepers are woken; this only bounds a lost wake

// Spins until done() or kSpinNs have passed; returns done().
template <class Done>
bool spin_until(Done done) {
    const uint64_t start = monotonic_ns();
    for (uint32_t i = 1; !done(); i++) {
        if (i % 256 == 0 && monotonic_ns() - start > kSpinNs) return false;
        pause();
    }
    return true;
}
}  // namespace

// `ticket` changes whenever helpers should look: odd means that a job was published with it. Helper
// i takes part i + 1; a caller who is done with its own part takes those that nobody has begun, so
// a helper that sleeps or lost its CPU holds nobody up. A part is claimed by moving `open` from the
// job's ticket to the next number, which a helper that comes late cannot do for any other job.
struct Team::State {
    struct alignas(64) Helper {
        State* state = nullptr;
        uint32_t part = 0;
        std::atomic<uint32_t> open{0};
        Thread thread;
    };
    ParallelFor parallel_for;
    uint32_t most = 1;
    std::atomic<uint32_t> parts{1};  // of the next runs; helpers past it sleep until it changes
    void (*job)(void*, uint32_t, uint32_t) = nullptr;
    void* context = nullptr;
    alignas(64) std::atomic<uint32_t> ticket{0};
    std::atomic<uint32_t> sleepers{0};
    std::atomic<bool> hot{false}, quit{false};
    alignas(64) std::atomic<uint32_t> running{0};  // parts of helpers that are not done
    std::atomic<uint32_t> caller_sleeps{0};
    std::vector<Helper> helpers;
    uint32_t n_helpers = 0;

    uint32_t next_ticket_to_publish(bool with_job) const {
        return ((ticket.load(std::memory_order_relaxed) + 2) & ~1u) | (with_job ? 1u : 0u);
    }

    void publish(uint32_t next) {
        ticket.store(next, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) wake(&ticket);
    }

    uint32_t wait_for_ticket(uint32_t part, uint32_t seen) {
        auto changed = [&] { return ticket.load(std::memory_order_acquire) != seen; };
        for (uint32_t now; (now = parts.load(std::memory_order_acquire)) <= part;)
            wait_on(&parts, now, kSleepNs);
        while (!changed()) {
            if (hot.load(std::memory_order_relaxed) && spin_until(changed)) break;
            sleepers.fetch_add(1, std::memory_order_seq_cst);
            if (ticket.load(std::memory_order_seq_cst) == seen) wait_on(&ticket, seen, kSleepNs);
            sleepers.fetch_sub(1, std::memory_order_seq_cst);
        }
        return ticket.load(std::memory_order_acquire);
    }

    void take_part(Helper& helper, uint32_t of_ticket) {
        if (!helper.open.compare_exchange_strong(
                of_ticket, of_ticket + 1, std::memory_order_acquire, std::memory_order_relaxed))
            return;
        job(context, helper.part, parts.load(std::memory_order_relaxed));
        if (running.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
            caller_sleeps.load(std::memory_order_seq_cst))
            wake(&running);
    }

    static void help(void* context_of_helper) {
        Helper& helper = *static_cast<Helper*>(context_of_helper);
        State& state = *helper.state;
        FloatState float_state;
        for (uint32_t seen = 0; !state.quit.load(std::memory_order_acquire);) {
            seen = state.wait_for_ticket(helper.part, seen);
            if (seen & 1) state.take_part(helper, seen);
        }
    }

    void wait_for_helpers() {
        auto done = [&] { return running.load(std::memory_order_acquire) == 0; };
        while (!spin_until(done)) {
            caller_sleeps.store(1, std::memory_order_seq_cst);
            const uint32_t left = running.load(std::memory_order_seq_cst);
            if (left) wait_on(&running, left, kSleepNs);
            caller_sleeps.store(0, std::memory_order_relaxed);
        }
    }

    void run_with_helpers() {
        const uint32_t now = next_ticket_to_publish(true),
                       count = parts.load(std::memory_order_relaxed);
        running.store(count - 1, std::memory_order_relaxed);
        for (uint32_t i = 0; i + 1 < count; i++)
            helpers[i].open.store(now, std::memory_order_release);
        publish(now);
        job(context, 0, count);
        for (uint32_t i = 0; i + 1 < count; i++) take_part(helpers[i], now);
        wait_for_helpers();
    }

    static void host_job(void* team, uint32_t part) {
        const State& state = *static_cast<const State*>(team);
        FloatState float_state;
        state.job(state.context, part, state.parts.load(std::memory_order_relaxed));
    }
};

Team::Team(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<Team>> Team::create(int helpers, const ParallelFor& parallel_for) {
    if (helpers < 0 || helpers > 1023)
        return make_error(ErrorKind::invalid_request,
                          format("threads: %d is not in 0..1023", helpers), {}, "threads");
    std::unique_ptr<Team> team(new Team(std::make_unique<State>()));
    State& state = *team->state_;
    state.parts = state.most = static_cast<uint32_t>(helpers) + 1;
    state.parallel_for = parallel_for;
    if (parallel_for.run) return team;
    state.helpers = std::vector<State::Helper>(static_cast<size_t>(helpers));
    for (uint32_t i = 0; i < static_cast<uint32_t>(helpers); i++) {
        State::Helper& helper = state.helpers[i];
        helper.state = &state;
        helper.part = i + 1;
        auto thread = Thread::start(State::help, &helper, "valar-worker");
        if (!thread) return thread.error();
        helper.thread = std::move(*thread);
        state.n_helpers++;
    }
    return team;
}

Team::~Team() {
    state_->quit.store(true, std::memory_order_release);
    state_->parts.store(UINT32_MAX, std::memory_order_release);
    wake(&state_->parts);
    state_->publish(state_->next_ticket_to_publish(false));
    for (uint32_t i = 0; i < state_->n_helpers; i++) state_->helpers[i].thread.join();
}

uint32_t Team::parts() const { return state_->most; }
void Team::begin() { begin(state_->most); }

void Team::begin(uint32_t parts) {
    if (state_->parts.exchange(parts, std::memory_order_release) != parts) wake(&state_->parts);
    if (parts == 1) return;
    state_->hot.store(true, std::memory_order_relaxed);
    if (state_->sleepers.load(std::memory_order_seq_cst))
        state_->publish(state_->next_ticket_to_publish(false));
}

void Team::end() { state_->hot.store(false, std::memory_order_relaxed); }

void Team::run(void (*job)(void* context, uint32_t part, uint32_t parts), void* context) {
    State& state = *state_;
    state.job = job;
    state.context = context;
    if (const ParallelFor& host = state.parallel_for; host.run)
        return host.run(host.context, state.parts.load(std::memory_order_relaxed), State::host_job,
                        &state);
    FloatState float_state;
    state.run_with_helpers();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

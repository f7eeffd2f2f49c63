#pragma once

#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// How many threads are fastest for a batch of few rows is found by trying: a few use up the
// memory's bandwidth, and where a model is small, or others want the cores, they wait for each
// other longer than they work. All of them at first; now and then half or twice as many are tried,
// which must be faster twice to be taken: a busy moment decides nothing. No bit depends on it.
class ThreadTrials {
public:
    void open(uint32_t parts) { most_ = fastest_ = parts; }
    uint32_t parts() const { return phase_ == Phase::other ? other() : fastest_; }
    /// A batch of one row took so long.
    void add(uint64_t ns) {
        if (most_ == 1) return;
        shortest_ns_ = count_++ ? std::min(shortest_ns_, ns) : ns;
        const bool hopeless = phase_ == Phase::other && ns > fastest_ns_ + fastest_ns_ / 4;
        if (count_ < (phase_ == Phase::rest ? pause_ : kBatches) && !hopeless) return;
        count_ = 0;
        if (phase_ == Phase::fastest) fastest_ns_ = shortest_ns_;
        if (phase_ == Phase::other) judge(shortest_ns_ + shortest_ns_ / 32 < fastest_ns_);
        else phase_ = phase_ == Phase::rest ? Phase::fastest : Phase::other;
    }

private:
    static constexpr uint32_t kBatches = 4, kShortPause = 8, kLongPause = 1024;
    enum class Phase { rest, fastest, other };

    uint32_t other() const {
        return fewer_ ? std::max(fastest_ / 2, 1u) : std::min(fastest_ * 2, most_);
    }
    void judge(bool faster) {
        if (faster && won_) fastest_ = other();
        pause_ = faster ? kShortPause : std::min(pause_ * 2, kLongPause);
        won_ = faster && !won_;
        if (!faster) fewer_ = !fewer_;
        if (other() == fastest_) fewer_ = !fewer_;
        phase_ = Phase::rest;
    }

    uint32_t most_ = 1, fastest_ = 1, count_ = 0, pause_ = kShortPause;
    uint64_t shortest_ns_ = 0, fastest_ns_ = 0;
    Phase phase_ = Phase::rest;
    bool fewer_ = true, won_ = false;
};

// How the units of a step come to the threads.
enum class CpuClaims : uint8_t {
    shares,     // each thread does an equal share
    few_units,  // a thread claims a few neighbouring units at a time
    one_unit,   // a thread claims one unit at a time: units differ much in their work
};

// A step of a computation, cut into units that may run at the same time in any order.
struct CpuStep {
    uint64_t units;
    uint64_t work;  // products of a unit, about
    uint32_t kind;  // steps of one kind take about the same time for the same work
    CpuClaims claims;
    void (*job)(void* context, uint32_t first, uint32_t last, uint32_t part);
    void* context;  // first .. last - 1 are units; `part` is the thread
};

// Runs steps on a team of threads and stops near a deadline. It knows steps and units only, nothing
// of what is computed.
class CpuMachine {
public:
    Result<void> open(uint32_t parts, uint32_t kinds, const ParallelFor& parallel_for);
    Team& team() { return *team_; }

    // A batch is done in turns. `tries_threads`: so few rows that the number of threads is tried.
    void begin_batch(bool tries_threads);
    void begin_turn(uint64_t deadline_ns);
    bool turn_is_over() const { return deadline_ns_ && monotonic_ns() >= deadline_ns_; }
    void forget_deadline() { deadline_ns_ = 0; }
    void end_turn();
    // The batch's time counts for the choice of the number of threads.
    void count_batch() { trials_.add(batch_ns_); }

    // Does units of the step from `first` on: all, or, where there is a deadline, about kSliceNs of
    // them. Returns the first that is not done.
    uint32_t run(const CpuStep& step, uint32_t first);

private:
    struct Slice {
        CpuMachine* self;
        const CpuStep* step;
        uint32_t first, last;
        uint32_t claim_units;                                  // 0: each thread does its share
        uint32_t share(uint64_t part, uint32_t parts) const {  // where it begins
            return first + static_cast<uint32_t>((last - first) * part / parts);
        }
    };
    // How far a thread's share is claimed: by itself, a few neighbouring units at a time (what it
    // reads next it has prefetched), and, once they are done with theirs, by the others.
    struct alignas(64) Claim {
        std::atomic<uint32_t> next;
    };

    uint32_t slice_end(const CpuStep& step, uint32_t first) const;
    uint32_t claim_units(const CpuStep& step, uint64_t count) const;
    void share_out(const Slice& slice);
    static void run_part(void* context, uint32_t part, uint32_t parts);

    std::unique_ptr<Team> team_;
    ThreadTrials trials_;
    std::vector<Claim> claims_;        // (parts)
    std::vector<double> ns_per_work_;  // (kinds) measured, of a product
    uint32_t parts_ = 1;               // threads that compute the batch
    uint64_t batch_ns_ = 0;            // spent on it, and when the turn began
    uint64_t turn_start_ns_ = 0;
    uint64_t deadline_ns_ = 0;  // 0: none
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

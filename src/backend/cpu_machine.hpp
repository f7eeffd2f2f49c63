#pragma once

#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

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

    // A batch is done in turns, by so many threads.
    void begin_batch(uint32_t parts);
    void begin_turn(uint64_t deadline_ns);
    bool turn_is_over() const { return deadline_ns_ && monotonic_ns() >= deadline_ns_; }
    void forget_deadline() { deadline_ns_ = 0; }
    void end_turn();
    uint64_t batch_ns() const { return batch_ns_; }  // spent on it so far

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

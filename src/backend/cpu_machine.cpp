// >>backend
// Steps on threads: how units are shared out and claimed, and how long a slice of a step may be. No
// bit of any result depends on what is decided here.
#include "prologue.hpp"

#include "backend/cpu_machine.hpp"
#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint64_t kJoinWork = 1 << 16;   // products that are not worth a fork-join
constexpr uint64_t kClaimUnits = 4;       // at most: units that share a read of the columns
constexpr uint64_t kClaimsOfAThread = 4;  // even out what the threads are held up by
constexpr uint64_t kSliceNs = 200'000;    // between two looks at the deadline
constexpr double kSlowestWorkNs = 0.2;    // a product, before it was measured

}  // namespace

Result<void> CpuMachine::open(uint32_t parts, uint32_t kinds, const ParallelFor& parallel_for) {
    auto team = Team::create(static_cast<int>(parts) - 1, parallel_for);
    if (!team) return team.error();
    team_ = std::move(*team);
    claims_ = std::vector<Claim>(parts);
    ns_per_work_.assign(kinds, kSlowestWorkNs);
    return {};
}

void CpuMachine::begin_batch(uint32_t parts) {
    parts_ = parts;
    batch_ns_ = 0;
}

void CpuMachine::begin_turn(uint64_t deadline_ns) {
    turn_start_ns_ = monotonic_ns();
    deadline_ns_ = deadline_ns;
    team_->begin(parts_);
}

void CpuMachine::end_turn() {
    team_->end();
    batch_ns_ += monotonic_ns() - turn_start_ns_;
}

uint32_t CpuMachine::run(const CpuStep& step, uint32_t first) {
    VALAR_ASSERT(first <= step.units && step.kind < ns_per_work_.size());
    const uint32_t last = slice_end(step, first);
    const uint64_t count = last - first;
    const bool is_measured = deadline_ns_ && count * step.work >= kJoinWork;
    const uint64_t start = is_measured ? monotonic_ns() : 0;
    if (parts_ == 1 || count == 1 || count * step.work < kJoinWork)
        step.job(step.context, first, last, 0);
    else share_out({this, &step, first, last, claim_units(step, count)});
    if (is_measured)
        ns_per_work_[step.kind] = static_cast<double>(monotonic_ns() - start + 1) /
                                  static_cast<double>(count * step.work);
    return last;
}

uint32_t CpuMachine::slice_end(const CpuStep& step, uint32_t first) const {
    if (!deadline_ns_) return static_cast<uint32_t>(step.units);
    const double unit_ns = ns_per_work_[step.kind] * static_cast<double>((step.work + 1) * parts_);
    const uint64_t rounds = 1 + static_cast<uint64_t>(static_cast<double>(kSliceNs) / unit_ns);
    return static_cast<uint32_t>(std::min(step.units, first + parts_ * rounds));
}

uint32_t CpuMachine::claim_units(const CpuStep& step, uint64_t count) const {
    if (step.claims == CpuClaims::shares) return 0;
    if (step.claims == CpuClaims::one_unit) return 1;
    return static_cast<uint32_t>(
        std::clamp<uint64_t>(count / (kClaimsOfAThread * parts_), 1, kClaimUnits));
}

void CpuMachine::share_out(const Slice& slice) {
    for (uint32_t part = 0; part < parts_; ++part)
        claims_[part].next.store(slice.share(part, parts_), std::memory_order_relaxed);
    Slice shared = slice;
    team_->run(run_part, &shared);
}

void CpuMachine::run_part(void* context, uint32_t part, uint32_t parts) {
    const Slice& slice = *static_cast<const Slice*>(context);
    const CpuStep& step = *slice.step;
    const uint32_t n = slice.claim_units;
    if (n == 0) {
        const uint32_t first = slice.share(part, parts), last = slice.share(part + 1, parts);
        if (first < last) step.job(step.context, first, last, part);
        return;
    }
    for (uint32_t i = 0; i < parts; ++i) {
        const uint32_t of = (part + i) % parts, last = slice.share(of + 1, parts);
        std::atomic<uint32_t>& next = slice.self->claims_[of].next;
        for (uint32_t unit; (unit = next.fetch_add(n, std::memory_order_relaxed)) < last;)
            step.job(step.context, unit, std::min(unit + n, last), part);
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

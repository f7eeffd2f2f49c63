#pragma once

#include "kernels/layout.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// What may vary without changing a bit of any result is set to what is fastest on this machine now,
// found by trying: how many threads compute a batch of few rows (a few use up the memory's bandwidth;
// where a model is small, or others want the cores, they wait for each other longer than they work),
// and how far ahead weights of each type are prefetched (some CPUs are a quarter slower with it).

// One thing that varies, in steps of two: 1, 2, 4 .. most. Half or twice as much must be faster
// twice to be taken: a busy moment decides nothing.
class Trial {
public:
    void open(uint32_t most) { most_ = fastest_ = most; }
    bool varies() const { return most_ > 1; }
    uint32_t fastest() const { return fastest_; }
    uint32_t other() const {
        return fewer_ ? std::max(fastest_ / 2, 1u) : std::min(fastest_ * 2, most_);
    }
    // A batch cost so much, with the fastest or the other; nothing where it was not measured. False
    // where the other is not worth another batch.
    bool add(bool is_other, double cost) {
        double& least = least_[is_other];
        if (cost > 0) least = least > 0 ? std::min(least, cost) : cost;
        return !is_other || cost <= least_[0] * 1.25;
    }
    // Whether the other was faster.
    bool judge() {
        const bool faster = least_[1] > 0 && least_[1] * (1 + 1.0 / 32) < least_[0];
        if (faster && won_) fastest_ = other();
        won_ = faster && !won_;
        if (!faster) fewer_ = !fewer_;
        if (other() == fastest_) fewer_ = !fewer_;
        least_[0] = least_[1] = 0;
        return faster;
    }

private:
    uint32_t most_ = 1, fastest_ = 1;
    bool fewer_ = true, won_ = false;
    double least_[2] = {};  // cost of a batch with the fastest and with the other
};

// Trials made side by side, each judged by a cost of its own: a few batches with what was fastest, a
// few with the other, then a rest, which is short after a success and longer after each failure.
class TrialGroup {
public:
    static constexpr uint32_t kShortPause = 8, kLongPause = 128;  // batches

    // `count` trials; the first begins after a rest of `pause` batches.
    void open(uint32_t count, uint32_t most, uint32_t batches, uint32_t pause) {
        trials_.assign(count, {});
        for (Trial& trial : trials_) trial.open(most);
        batches_ = batches;
        pause_ = pause;
    }
    bool rests() const { return phase_ == Phase::rest; }
    uint32_t value(uint32_t i) const {
        return phase_ == Phase::other ? trials_[i].other() : trials_[i].fastest();
    }
    // A batch went by at rest. True: it is time for the next trial, which has begun.
    bool rest() {
        if (trials_.empty() || !trials_[0].varies() || ++count_ < pause_) return false;
        next_phase(Phase::fastest);
        return true;
    }
    void forget_failures() { pause_ = std::min(pause_, kShortPause); }
    void add(std::span<const double> costs) {
        bool worth_it = false;
        for (size_t i = 0; i < trials_.size(); ++i)
            worth_it |= trials_[i].add(phase_ == Phase::other, costs[i]) && costs[i] > 0;
        if (++count_ < batches_ && worth_it) return;
        if (phase_ == Phase::fastest) return next_phase(Phase::other);
        bool faster = false;
        for (Trial& trial : trials_) faster |= trial.judge();
        pause_ = faster ? kShortPause : std::clamp(pause_ * 2, kShortPause, kLongPause);
        next_phase(Phase::rest);
    }

private:
    enum class Phase : uint8_t { rest, fastest, other };
    void next_phase(Phase phase) {
        phase_ = phase;
        count_ = 0;
    }

    std::vector<Trial> trials_;
    uint32_t batches_ = 1, count_ = 0, pause_ = kShortPause;
    Phase phase_ = Phase::rest;
};

inline constexpr uint32_t kWeightTypes = std::size(packed_layouts);

// What a batch of one row cost.
struct BatchCost {
    uint64_t ns = 0;
    double type_ns[kWeightTypes] = {};  // of a product with weights of a type; 0: not measured
};

// All trials of a backend. One group is on trial at a time, so that none disturbs another.
class CpuTrials {
public:
    // `ahead`: the prefetch distance of all types, in bytes; below 0: it is found by trying.
    void open(uint32_t parts, int64_t ahead) {
        ahead_ = ahead;
        groups_[kPrefetch].open(kWeightTypes, ahead < 0 ? 2 : 1, kPrefetchBatches, 1);
        groups_[kThreads].open(1, parts, kThreadBatches, TrialGroup::kShortPause);
    }
    uint32_t parts() const { return groups_[kThreads].value(0); }
    size_t ahead(uint32_t type) const {
        if (ahead_ >= 0) return static_cast<size_t>(ahead_);
        return groups_[kPrefetch].value(type) == 1 ? 0 : kPrefetchAhead;
    }
    bool times_types() const { return !groups_[kPrefetch].rests(); }
    // A batch of one row was computed.
    void add(const BatchCost& cost) {
        const double ns[] = {static_cast<double>(cost.ns)};
        if (times_types()) return groups_[kPrefetch].add(cost.type_ns);
        if (!groups_[kThreads].rests()) return groups_[kThreads].add(ns);
        const bool changed = speed_changed(cost.ns);
        for (TrialGroup& group : groups_) {
            if (changed) group.forget_failures();
            if (group.rest()) return;
        }
    }

private:
    enum : uint32_t { kPrefetch, kThreads };
    // A wrong distance costs every batch, and a model of seconds a token shall not wait long. Threads
    // that come back take a batch to wake up.
    static constexpr uint32_t kPrefetchBatches = 2, kThreadBatches = 4;
    static constexpr uint32_t kWindow = 16;  // batches

    // Whether the last batches at rest took half as long again as those before, or the other way
    // round: somebody takes or gives back the cores, and what was found out no longer holds.
    bool speed_changed(uint64_t ns) {
        window_ns_ += ns;
        if (++window_count_ < kWindow) return false;
        const uint64_t before = last_window_ns_, now = window_ns_;
        last_window_ns_ = now;
        window_ns_ = 0;
        window_count_ = 0;
        return before && (now > before + before / 2 || before > now + now / 2);
    }

    TrialGroup groups_[2];
    int64_t ahead_ = -1;
    uint64_t window_ns_ = 0, last_window_ns_ = 0;
    uint32_t window_count_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

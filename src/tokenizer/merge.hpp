// The merge loop of both kinds of BPE.
#pragma once

#include "tokenizer/tables.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint32_t no_symbol = UINT32_MAX;

// A stretch of text that is one piece so far; those alive form a list. The pair that begins here
// has `rank` (no_rank: cannot merge) and would become `merged`.
struct MergeSymbol {
    uint32_t begin = 0;  // of its bytes
    uint32_t previous = no_symbol;
    uint32_t next = no_symbol;
    Token token = no_token;
    uint32_t rank = no_rank;
    Token merged = no_token;
};

struct LaterPlace {
    bool operator()(uint32_t a, uint32_t b) const { return a > b; }
};

// Pending merges: lowest rank first, then leftmost. The places of one rank nearly always come in
// ascending order, so a rank's list is read from front to back, and turns into a heap only when
// a place comes too early: ten million equal letters cost little more than copying them.
class MergeQueue {
public:
    void push(uint32_t rank, uint32_t place) {
        if (!list_ || rank != list_rank_) list_ = &lists_[list_rank_ = rank];
        std::vector<uint32_t>& places = list_->places;
        if (list_->empty()) add_rank(rank);
        else if (!list_->is_heap && place < places.back()) list_->make_heap();
        places.push_back(place);
        if (list_->is_heap) std::push_heap(places.begin(), places.end(), LaterPlace());
    }
    bool pop(uint32_t* rank, uint32_t* place) {
        if (ranks_.empty()) return false;
        *rank = ranks_.front();
        if (!list_ || *rank != list_rank_) list_ = &lists_[list_rank_ = *rank];
        *place = list_->take_first();
        if (list_->empty()) drop_lowest_rank();
        return true;
    }

private:
    struct List {
        std::vector<uint32_t> places;
        size_t first = 0;
        bool is_heap = false;
        bool empty() const { return first == places.size(); }
        void make_heap() {  // what is sorted is a heap already
            places.erase(places.begin(), places.begin() + ptrdiff_t(first));
            first = 0;
            is_heap = true;
        }
        uint32_t take_first() {
            if (!is_heap) return places[first++];
            std::pop_heap(places.begin(), places.end(), LaterPlace());
            const uint32_t place = places.back();
            places.pop_back();
            return place;
        }
    };
    void add_rank(uint32_t rank) {
        ranks_.push_back(rank);
        std::push_heap(ranks_.begin(), ranks_.end(), LaterPlace());
    }
    void drop_lowest_rank() {
        std::pop_heap(ranks_.begin(), ranks_.end(), LaterPlace());
        ranks_.pop_back();
        list_->places.clear();
        list_->first = 0;
        list_->is_heap = false;
    }
    std::unordered_map<uint32_t, List> lists_;
    std::vector<uint32_t> ranks_;  // a heap of those whose lists are not empty
    List* list_ = nullptr;         // of list_rank_, the last one used
    uint32_t list_rank_ = 0;
};

// Merges neighbours until no pair can merge. `pairs(symbols, left, right)` gives a pair's Merge.
template <class Pairs>
class MergeLoop {
public:
    MergeLoop(std::span<MergeSymbol> symbols, const Pairs& pairs)
        : symbols_(symbols), pairs_(pairs) {}
    void run() {
        if (symbols_.empty()) return;
        for (uint32_t at = 0; at < symbols_.size(); ++at) {
            symbols_[at].previous = at - 1;  // of the first: no_symbol
            symbols_[at].next = at + 1 < symbols_.size() ? at + 1 : no_symbol;
        }
        if (symbols_.size() <= short_word) run_short();
        else run_long();
    }

private:
    static constexpr size_t short_word = 32;  // up to here looking at every pair is faster
    void run_short() {
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        for (;;) {
            uint32_t best = 0;
            for (uint32_t at = 0; at != no_symbol; at = symbols_[at].next)
                if (symbols_[at].rank < symbols_[best].rank) best = at;
            if (symbols_[best].rank == no_rank) return;
            merge(best);
        }
    }
    void run_long() {
        queue_.emplace();
        for (uint32_t at = 0; at < symbols_.size(); ++at) rate(at);
        uint32_t rank = 0, at = 0;
        while (queue_->pop(&rank, &at))
            if (symbols_[at].rank == rank) merge(at);  // else it was overtaken
    }
    void merge(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        MergeSymbol& right = symbols_[left.next];
        left.token = left.merged;
        left.next = right.next;
        right.rank = no_rank;
        if (left.next != no_symbol) symbols_[left.next].previous = at;
        if (left.previous != no_symbol) rate(left.previous);
        rate(at);
    }
    void rate(uint32_t at) {
        MergeSymbol& left = symbols_[at];
        Merge merge;
        if (left.next != no_symbol) merge = pairs_(left, symbols_[left.next]);
        left.rank = merge.rank;
        left.merged = merge.token;
        if (queue_ && merge.rank != no_rank) queue_->push(merge.rank, at);
    }
    std::span<MergeSymbol> symbols_;
    const Pairs& pairs_;
    std::optional<MergeQueue> queue_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

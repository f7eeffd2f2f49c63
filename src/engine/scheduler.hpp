#pragma once

#include "engine/answer.hpp"
#include "engine/plan.hpp"
#include "engine/prefix_cache.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- The scheduler ---------------------------------------------------------------------------

// Which requests run, what the next batch computes, and what becomes of its results. Threads: only
// the one that steps. What it is made of is borrowed.
class Scheduler {
public:
    Scheduler(const EngineOptions& options, const BackendOptions& sizes, const LoadedModel& model,
              const std::unique_ptr<Backend>& backend, PrefixCache& cache, Desk& desk);

    /// One piece of work: a sequence's results, a part of a batch or the next batch, which is made
    /// to take about `budget_ns`. False: there is nothing to do.
    bool work(uint64_t deadline_ns, uint64_t budget_ns);
    /// Those whose replies were cancelled end; work() looks, too.
    void take_cancels();
    /// All that run give way, and go on when work() is called again: nobody has pages until then.
    void pause();
    /// Every request ends with this error.
    void fail_all(const Error& error);

private:
    void compute(uint64_t deadline_ns);
    void end_batch();
    void drop_cancelled();

    void take_arrivals();
    void admit();
    void count_running();
    SequencePtr* next_waiting();
    bool make_place(const Sequence& next);
    void start(SequencePtr sequence);
    void preempt_last();
    void leave(Sequence& sequence);
    void sweep();

    void build_batch(uint64_t budget_ns);
    uint64_t prompt_cost(bool answers, uint64_t budget_ns) const;
    void share_prompt_rows(uint64_t cost);
    Sequence* next_prompt() const;
    bool computes_the_same(const Sequence& prompt) const;
    void draft(Sequence& sequence, uint32_t* spare);
    void take_forced(Sequence& sequence, uint32_t room);
    void reserve_pages(size_t index);
    void add_rows(Sequence& sequence, uint32_t* logit_rows);

    void take_results(Sequence& sequence);
    void change_rope(Sequence& sequence);
    std::optional<Token> draw_token(Sequence& sequence, uint32_t logits_row);
    Result<Token> choose_token(Sequence& sequence, uint32_t logits_row);

    const EngineOptions& options_;
    const LoadedModel& model_;
    const std::unique_ptr<Backend>& backend_;
    PrefixCache& cache_;
    Desk& desk_;
    AnswerWriter answers_;
    const uint32_t step_tokens_, max_logit_rows_, short_rope_tokens_;

    std::vector<SequencePtr> waiting_, running_;
    std::vector<BatchRow> batch_;                  // under way unless empty
    size_t untaken_ = 0;                           // last of running, with logits of a done batch
    std::unordered_map<std::string, Turn> turns_;  // of those that wait or run
    uint64_t serve_clock_ = 0, ticket_clock_ = 0;
    const RowCost row_cost_;
    uint64_t batch_ns_ = 0, batch_cost_ = 0;  // spent on the batch; of its rows
    double cost_ns_ = 0;                      // about what a unit of the cost takes
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "backend/internal.hpp"
#include "base/internal.hpp"
#include "engine/loaded_model.hpp"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Sizes that follow from options and model ------------------------------------------------

/// Positions that a request may use. Where the options do not say it, the model's own, but no more
/// than memory_limit, or `memory`, what the system has for this process, has room for: weights and
/// scratch all of it, keys and values of one context what these leave; without a limit half of that.
uint32_t choose_context(const EngineOptions& options, const ModelFile& file,
                        uint64_t memory = usable_memory());
/// One line for people: this context, and why.
std::string explain_context(const EngineOptions& options, const ModelSpec& spec, uint32_t context,
                            uint64_t memory = usable_memory());
/// As many pages as the same leaves room for: at least what one context needs.
Result<BackendOptions> choose_backend_options(const EngineOptions& options, const ModelFile& file,
                                              uint64_t memory = usable_memory());
/// Full pages before a position that some layer may see from there; UINT32_MAX: all. Where only some
/// layers have windows there are two kinds of pages: for the layers without, then for those with.
std::vector<uint32_t> count_window_pages(const ModelSpec& spec, uint32_t page_tokens);
/// Pages of a kind that a sequence holds at once, with so many positions: where all its layers have
/// windows, those that they reach from a batch's first row, and the batch's.
uint32_t count_held_pages(uint32_t positions, uint32_t window_pages, uint32_t batch_rows,
                          uint32_t page_tokens);

/// About what a row of a batch takes, in multiplications: its products with the weights, and its
/// attention to the keys it sees. Far into a long text that is several times what it is at its start.
class RowCost {
public:
    explicit RowCost(const ModelSpec& spec);
    uint64_t operator()(uint32_t position) const;
    /// How many rows, from a position on, a budget has room for: at most `most`, and `fewest` of them
    /// even where it has not. It loses what they cost.
    uint32_t take(uint32_t from, uint32_t fewest, uint32_t most, uint64_t* budget) const;

private:
    uint64_t products_ = 0;
    std::vector<std::pair<uint32_t, uint64_t>> keys_;  // what a key takes in the layers of a window
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "base/internal.hpp"
#include "engine/limits.hpp"
#include "engine/plan.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// Where no limit is asked for, the system's: an eighth is left for all that a plan does not count.
constexpr uint64_t kSpareMemory = 8;
constexpr uint32_t kContextStep = 512;  // a default that is not the model's own is a multiple
constexpr uint64_t kKeyCost = 2;  // of a multiplication with a key or value, in those with weights

Result<void> check_engine_options(const EngineOptions& options, const ModelSpec& spec,
                                  uint32_t context) {
    const struct {
        const char* field;
        uint32_t value, most;
    } ranges[] = {
        {"context_tokens", context, spec.n_context},
        {"step_tokens", options.step_tokens, kMaxStepTokens},
        {"max_running", options.max_running, kMaxRunning},
    };
    for (const auto& [field, value, most] : ranges)
        if (value == 0 || value > most)
            return make_error(ErrorKind::invalid_request,
                              format("%s: %u is not in 1..%u", field, value, most), {}, field);
    return {};
}

// What the options are for the backend, with keys and values of one context, and windows of so many
// requests: of all side by side, however much of the other pages they take, where there is room.
BackendOptions options_for_context(const EngineOptions& options, const ModelSpec& spec,
                                   uint32_t context, uint64_t windowed) {
    BackendOptions out;
    out.precision = options.precision;
    out.kv_type = options.kv_type;
    out.weights = options.weights;
    out.page_tokens = options.page_tokens;
    const std::vector<uint32_t> windows = count_window_pages(spec, options.page_tokens);
    const auto held = [&](uint32_t window) {
        return count_held_pages(context, window, std::min(options.step_tokens, context),
                                options.page_tokens);
    };
    out.kv_pages = held(windows[0]);
    if (windows.size() > 1)
        out.window_pages = static_cast<uint32_t>(std::min<uint64_t>(
            out.kv_pages, held(windows[1]) + (uint64_t{windows[1]} + 2) * (windowed - 1)));
    out.max_positions = context;
    out.max_logit_rows = std::max(options.max_running, options.speculation ? kMaxDraft + 1 : 1);
    out.max_batch_rows = std::min(options.step_tokens, context) + out.max_logit_rows;
    out.threads = options.threads;
    out.parallel_for = options.parallel_for;
    out.allocator = options.allocator;
    return out;
}

// Bytes for keys and values beside the rest of a plan. Without a limit from the caller half of what is
// left stays free for the programs beside, and weights read in place want to stay in memory too.
uint64_t room_for_kv(const MemoryPlan& plan, uint64_t limit, uint64_t memory) {
    const uint64_t most = limit ? limit : memory - memory / kSpareMemory,
                   rest = plan.weights + plan.scratch + (limit ? 0 : plan.mapped),
                   left = most - std::min(most, rest);
    return limit ? left : left / 2;
}

// 131072 as 131,072
std::string grouped(uint32_t number) {
    std::string out = format("%u", number);
    for (size_t at = out.size(); at > 3;) out.insert(at -= 3, 1, ',');
    return out;
}

}  // namespace

uint32_t choose_context(const EngineOptions& options, const ModelFile& file, uint64_t memory) {
    if (options.context_tokens) return options.context_tokens;
    const auto fits = [&](uint32_t context) {
        const auto plan = plan_cpu_backend(
            file.gguf, file.spec, file.tensors,
            options_for_context(options, file.spec, context, options.max_running));
        return plan && plan->kv <= room_for_kv(*plan, options.memory_limit, memory);
    };
    const uint32_t own = file.spec.n_context;
    if (own <= kContextStep || fits(own)) return own;
    uint32_t steps = 1;  // as if it fitted: if not, opening says what it takes
    for (uint32_t most = (own - 1) / kContextStep; steps < most;) {
        const uint32_t middle = steps + (most - steps + 1) / 2;
        if (fits(middle * kContextStep)) steps = middle;
        else most = middle - 1;
    }
    return steps * kContextStep;
}

std::string explain_context(const EngineOptions& options, const ModelSpec& spec, uint32_t context,
                            uint64_t memory) {
    if (context == spec.n_context) return "context " + grouped(context) + ", the model's own";
    std::string out = "context " + grouped(context) + " of the model's " + grouped(spec.n_context);
    if (options.context_tokens) return out + ", as asked for";
    const double mib = static_cast<double>(options.memory_limit ? options.memory_limit : memory) /
                       (1 << 20);
    return out + ": that is what " +
           (mib < 1024 ? format("%.0f MiB", mib) : format("%.1f GiB", mib / 1024)) +
           " have room for";
}

Result<BackendOptions> choose_backend_options(const EngineOptions& options, const ModelFile& file,
                                              uint64_t memory) {
    const ModelSpec& spec = file.spec;
    const uint32_t context = choose_context(options, file, memory);
    auto good = check_engine_options(options, spec, context);
    if (!good) return good.error();
    BackendOptions out = options_for_context(options, spec, context, 1);
    const uint64_t least = out.kv_pages;
    auto plan = plan_cpu_backend(file.gguf, spec, file.tensors, out);
    if (!plan) return plan.error();
    const uint64_t limit = options.memory_limit;
    if (limit && plan->total() > limit)
        return make_error(
            ErrorKind::out_of_memory,
            format("memory_limit: %llu bytes; this model takes %llu with a context of "
                   "%u tokens",
                   static_cast<unsigned long long>(limit),
                   static_cast<unsigned long long>(plan->total()), context),
            {}, "memory_limit");
    const uint64_t contexts = limit ? options.max_running : std::min(options.max_running, 2u),
                   room = room_for_kv(*plan, limit, memory);
    uint64_t spare = room - std::min(room, plan->kv), page_bytes[kPageKinds] = {};
    for (const LayerSpec& layer : spec.layers)
        page_bytes[out.window_pages && layer.window] += kv_bytes_per_token(options.kv_type,
                                                                           layer.n_kv_heads,
                                                                           layer.head_dim) *
                                                        options.page_tokens;
    if (out.window_pages) {
        const uint32_t most =
            options_for_context(options, spec, context, options.max_running).window_pages;
        const uint64_t more = std::min<uint64_t>(most - out.window_pages, spare / page_bytes[1]);
        out.window_pages += static_cast<uint32_t>(more);
        spare -= more * page_bytes[1];
    }
    out.kv_pages = static_cast<uint32_t>(
        std::min({least * contexts, least + spare / page_bytes[0], uint64_t{UINT32_MAX} - 1}));
    return out;
}

uint32_t count_held_pages(uint32_t positions, uint32_t window_pages, uint32_t batch_rows,
                          uint32_t page_tokens) {
    const uint64_t page = std::max(page_tokens, 1u), all = (positions + page - 1) / page;
    return static_cast<uint32_t>(std::min(all, window_pages + batch_rows / page + 2));
}

std::vector<uint32_t> count_window_pages(const ModelSpec& spec, uint32_t page_tokens) {
    uint32_t widest = 0, without = 0;
    for (const LayerSpec& layer : spec.layers) {
        widest = std::max(widest, layer.window);
        without += layer.window == 0;
    }
    std::vector<uint32_t> out;
    if (without) out.push_back(UINT32_MAX);
    if (widest) out.push_back((widest - 1) / std::max(page_tokens, 1u) + 1);
    return out;
}

RowCost::RowCost(const ModelSpec& spec) {
    for (const LayerSpec& layer : spec.layers) {
        const uint64_t heads = uint64_t{layer.n_heads} + layer.n_kv_heads,
                       ffn = layer.n_ff + uint64_t{layer.experts.used} * layer.experts.n_ff;
        products_ += spec.n_embd * (2 * heads * layer.head_dim + (layer.gated ? 3 : 2) * ffn);
        const uint32_t window = layer.window ? layer.window : UINT32_MAX;
        auto found = std::find_if(keys_.begin(), keys_.end(),
                                  [&](const auto& keys) { return keys.first == window; });
        if (found == keys_.end()) found = keys_.insert(found, {window, 0});
        found->second += kKeyCost * 2 * layer.n_heads * layer.head_dim;
    }
}

uint64_t RowCost::operator()(uint32_t position) const {
    uint64_t out = products_;
    for (const auto& [window, key] : keys_) out += std::min(position, window) * key;
    return out;
}

uint32_t RowCost::take(uint32_t from, uint32_t fewest, uint32_t most, uint64_t* budget) const {
    for (uint32_t rows = 0; rows < most; ++rows) {
        const uint64_t row = (*this)(from + rows);
        if (rows >= fewest && row > *budget) return rows;
        *budget -= std::min(*budget, row);
    }
    return most;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

#include "prologue.hpp"

#include "base/internal.hpp"
#include "engine/limits.hpp"
#include "engine/plan.hpp"

#include <algorithm>
#include <cstdint>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// Where no limit is asked for, the system's: an eighth is left for all that a plan does not count.
constexpr uint64_t kSpareMemory = 8;
constexpr uint32_t kLeastDefaultContext = 512;

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

// What the options are for the backend, with keys and values of one context.
BackendOptions options_for_context(const EngineOptions& options, const ModelSpec& spec,
                                   uint32_t context) {
    BackendOptions out;
    out.precision = options.precision;
    out.kv_type = options.kv_type;
    out.weights = options.weights;
    out.page_tokens = options.page_tokens;
    const uint64_t least = count_held_pages(context, count_window_pages(spec, options.page_tokens),
                                            std::min(options.step_tokens, context),
                                            options.page_tokens);
    out.kv_pages = static_cast<uint32_t>(least);
    out.max_positions = context;
    out.max_logit_rows = std::max(options.max_running, options.speculation ? kMaxDraft + 1 : 1);
    out.max_batch_rows = std::min(options.step_tokens, context) + out.max_logit_rows;
    out.threads = options.threads;
    out.parallel_for = options.parallel_for;
    out.allocator = options.allocator;
    return out;
}

}  // namespace

uint32_t choose_context(const EngineOptions& options, const ModelFile& file, uint64_t memory) {
    if (options.context_tokens) return options.context_tokens;
    uint32_t context = std::min(file.spec.n_context, kDefaultContext);
    if (options.memory_limit) return context;
    for (; context > kLeastDefaultContext; context = std::max(context / 2, kLeastDefaultContext)) {
        const auto plan = plan_cpu_backend(file.gguf, file.spec, file.tensors,
                                           options_for_context(options, file.spec, context));
        if (!plan || plan->total() <= memory - memory / kSpareMemory) break;
    }
    return context;
}

Result<BackendOptions> choose_backend_options(const EngineOptions& options, const ModelFile& file,
                                              uint64_t memory) {
    const ModelSpec& spec = file.spec;
    const uint32_t context = choose_context(options, file, memory);
    auto good = check_engine_options(options, spec, context);
    if (!good) return good.error();
    BackendOptions out = options_for_context(options, spec, context);
    const uint64_t least = out.kv_pages;
    auto plan = plan_cpu_backend(file.gguf, spec, file.tensors, out);
    if (!plan) return plan.error();
    const uint64_t limit = options.memory_limit,
                   most = limit ? limit : memory - memory / kSpareMemory,
                   page = std::max<uint64_t>(plan->kv / least, 1);
    if (limit && plan->total() > limit)
        return make_error(
            ErrorKind::out_of_memory,
            format("memory_limit: %llu bytes; this model takes %llu with a context of "
                   "%u tokens",
                   static_cast<unsigned long long>(limit),
                   static_cast<unsigned long long>(plan->total()), context),
            {}, "memory_limit");
    const uint64_t contexts = limit ? options.max_running : std::min(options.max_running, 2u),
                   more = most > plan->total() ? (most - plan->total()) / page : 0;
    out.kv_pages = static_cast<uint32_t>(
        std::min({least * contexts, least + more, uint64_t{UINT32_MAX} - 1}));
    return out;
}

uint32_t count_held_pages(uint32_t positions, uint32_t window_pages, uint32_t batch_rows,
                          uint32_t page_tokens) {
    const uint64_t page = std::max(page_tokens, 1u), all = (positions + page - 1) / page;
    return static_cast<uint32_t>(std::min(all, window_pages + batch_rows / page + 2));
}

uint32_t count_window_pages(const ModelSpec& spec, uint32_t page_tokens) {
    uint32_t most = 0;
    for (const LayerSpec& layer : spec.layers) most = std::max(most, layer.window - 1);
    return most == UINT32_MAX ? most : most / std::max(page_tokens, 1u) + 1;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

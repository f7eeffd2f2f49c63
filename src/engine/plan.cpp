#include "prologue.hpp"

#include "engine/limits.hpp"
#include "engine/plan.hpp"

#include <algorithm>
#include <cstdint>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

Result<void> check_engine_options(const EngineOptions& options, const ModelSpec& spec) {
    const struct {
        const char* field;
        uint32_t value, most;
    } ranges[] = {
        {"context_tokens", choose_context(options, spec), spec.n_context},
        {"step_tokens", options.step_tokens, kMaxStepTokens},
        {"max_running", options.max_running, kMaxRunning},
    };
    for (const auto& [field, value, most] : ranges)
        if (value == 0 || value > most)
            return make_error(ErrorKind::invalid_request,
                              format("%s: %u is not in 1..%u", field, value, most), {}, field);
    return {};
}

}  // namespace

uint32_t choose_context(const EngineOptions& options, const ModelSpec& spec) {
    return options.context_tokens ? options.context_tokens
                                  : std::min(spec.n_context, kDefaultContext);
}

Result<BackendOptions> choose_backend_options(const EngineOptions& options, const ModelFile& file) {
    const ModelSpec& spec = file.spec;
    auto good = check_engine_options(options, spec);
    if (!good) return good.error();
    const uint32_t context = choose_context(options, spec);
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
    auto plan = plan_cpu_backend(file.gguf, spec, file.tensors, out);
    if (!plan) return plan.error();
    uint64_t pages = least * std::min(options.max_running, 2u);
    if (const uint64_t limit = options.memory_limit) {
        if (plan->total() > limit)
            return make_error(ErrorKind::out_of_memory,
                              format("memory_limit: %llu bytes; this model takes %llu with a "
                                     "context of %u tokens",
                                     static_cast<unsigned long long>(limit),
                                     static_cast<unsigned long long>(plan->total()), context),
                              {}, "memory_limit");
        pages = std::min(least * options.max_running,
                         least + (limit - plan->total()) / std::max<uint64_t>(plan->kv / least, 1));
    }
    out.kv_pages = static_cast<uint32_t>(std::min<uint64_t>(pages, UINT32_MAX - 1));
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

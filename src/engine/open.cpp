// >>engine
// In this order: the mailbox of a reply; pages; a sequence; opening; from a request to tokens; the
// queue; the step: who runs, the batch, tokens and text; the handles. Locks are held briefly and
// never while something is called.
#include "prologue.hpp"

#include "engine/state.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// The file's own recommendation, as far as it is there.
Result<SamplerOptions> read_sampling(const Gguf& gguf) {
    SamplerOptions out;
    const struct {
        const char* key;
        double* value;
        double high;
    } keys[] = {
        {"general.sampling.temp", &out.temperature, 2},
        {"general.sampling.top_p", &out.top_p, 1},
        {"general.sampling.min_p", &out.min_p, 1},
    };
    for (const auto& [key, value, high] : keys) {
        auto found = gguf.get_float(key, *value);
        if (!found) return found.error();
        if (!(*found >= 0 && *found <= high))
            return make_error(
                ErrorKind::bad_data,
                gguf.name() + format(": key '%s' is %g, not in 0..%g", key, *found, high));
        *value = *found;
    }
    auto top_k = gguf.get_uint("general.sampling.top_k", 0);
    if (!top_k) return top_k.error();
    out.top_k = static_cast<uint32_t>(std::min<uint64_t>(*top_k, UINT32_MAX));
    return out;
}

std::string choose_model_id(const EngineOptions& options, const ModelSpec& spec) {
    if (!options.model_id.empty()) return options.model_id;
    if (!spec.name.empty() && utf8_valid(spec.name)) return spec.name;
    std::string name = options.model_path.substr(options.model_path.find_last_of("/\\") + 1);
    if (name.ends_with(".gguf")) name.resize(name.size() - 5);
    return name.empty() ? "model" : name;
}

uint32_t choose_context(const EngineOptions& options, const ModelSpec& spec) {
    return options.context_tokens ? options.context_tokens
                                  : std::min(spec.n_context, kDefaultContext);
}

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

// What parts models that are alike in shape: their directory, and the first row of every tensor as
// numbers: a model is the same however its file holds it.
Result<Hash256> fingerprint(const Gguf& gguf) {
    Sha256 hash;
    for (const TensorInfo& tensor : gguf.tensors()) {
        const uint32_t cols = static_cast<uint32_t>(tensor.dims[0]);
        const uint32_t rows = static_cast<uint32_t>(std::min<uint64_t>(tensor.dims[1], kTileRows));
        const uint64_t tile_bytes = packed_tile_bytes(tensor.type, cols);
        auto tile = Buffer::allocate(tile_bytes, "a fingerprint");
        if (!tile) return tile.error();
        std::vector<std::byte> source(
            static_cast<size_t>(tensor.packed ? tile_bytes : tensor.bytes / tensor.dims[1] * rows));
        if (auto read = gguf.read_tensor(tensor, 0, source); !read) return read.error();
        if (tensor.packed) std::memcpy(tile->data(), source.data(), source.size());
        else pack_tiles(tensor.type, rows, cols, source.data(), 0, 1, tile->data());
        std::vector<float> row(cols);
        dequantize_row({tensor.type, rows, cols, tile->data()}, 0, row.data());
        hash.update(tensor.name);
        hash.update(&tensor.type, sizeof tensor.type);
        hash.update(tensor.dims, sizeof tensor.dims);
        hash.update(row.data(), row.size() * sizeof(float));
    }
    return hash.finish();
}

// As many pages as memory_limit leaves room for: at least what one context needs.
Result<BackendOptions> choose_backend_options(const EngineOptions& options, const Gguf& gguf,
                                              const ModelSpec& spec, const ModelTensors& tensors) {
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
    out.parallel_for_host = options.parallel_for_host;
    auto plan = plan_cpu(gguf, spec, tensors, out);
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

// Pages that a sequence holds at once, with so many positions: where all layers have windows, those
// that they reach from a batch's first row, and the batch's.
uint32_t count_held_pages(uint32_t positions, uint32_t window_pages, uint32_t batch_rows,
                          uint32_t page_tokens) {
    const uint64_t page = std::max(page_tokens, 1u), all = (positions + page - 1) / page;
    return static_cast<uint32_t>(std::min(all, window_pages + batch_rows / page + 2));
}

// Full pages before a position that some layer may see from there; UINT32_MAX: all.
uint32_t count_window_pages(const ModelSpec& spec, uint32_t page_tokens) {
    uint32_t most = 0;
    for (const LayerSpec& layer : spec.layers) most = std::max(most, layer.window - 1);
    return most == UINT32_MAX ? most : most / std::max(page_tokens, 1u) + 1;
}

Result<Gguf> open_model_file(const EngineOptions& options) {
    if (!options.model_bytes.empty()) return Gguf::from_bytes(options.model_bytes);
    if (options.model_reader.read) return Gguf::from_reader(options.model_reader);
    if (options.model_path.empty())
        return make_error(ErrorKind::invalid_request, "model_path: missing", {}, "model_path");
    return Gguf::open(options.model_path);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- Opening ---------------------------------------------------------------------------------

Result<void> Engine::State::open(const EngineOptions& from) {
    options = from;
    auto file = detail::open_model_file(options);
    if (!file) return file.error();
    gguf = std::move(*file);
    auto read = read_model_spec(gguf);
    if (!read) return read.error();
    spec = std::move(*read);
    auto bound = detail::bind_model_tensors(gguf, spec);
    if (!bound) return bound.error();
    tensors = std::move(*bound);
    auto source = gguf.get_string("tokenizer.chat_template", "");
    if (!source) return source.error();
    const std::string text = options.chat_template.empty() ? std::string(*source)
                                                           : options.chat_template;
    auto words = Tokenizer::open(gguf, text);
    if (!words) return words.error();
    tokenizer = std::move(*words);
    const bool has_chatml = tokenizer->find("<|im_start|>") && tokenizer->find("<|im_end|>");
    auto parsed = ChatTemplate::open(text, has_chatml);
    if (!parsed) return parsed.error();
    chat_template = std::move(*parsed);
    auto defaults = detail::read_sampling(gguf);
    if (!defaults) return defaults.error();
    sampling = *defaults;
    auto chosen = detail::choose_backend_options(options, gguf, spec, tensors);
    if (!chosen) return chosen.error();
    auto opened = detail::open_cpu_backend(gguf, spec, tensors, *chosen);
    if (!opened) return opened.error();
    backend = std::move(*opened);
    context = chosen->max_positions;
    max_logit_rows = chosen->max_logit_rows;
    step_tokens = chosen->max_batch_rows - max_logit_rows;
    window_pages = detail::count_window_pages(spec, options.page_tokens);
    batch.reserve(chosen->max_batch_rows);
    running.reserve(options.max_running);
    pool.open(chosen->kv_pages);
    counts.pages = chosen->kv_pages;
    info.id = detail::choose_model_id(options, spec);
    info.aliases = options.aliases;
    info.created = detail::unix_time_ms() / 1000;
    info.context_tokens = context;
    info.windows.clear();
    for (const Window window : options.windows)
        info.windows.push_back(detail::kWindowNames[static_cast<size_t>(window)]);
    return {};
}

Engine::State::~State() {
    stop_asked.store(true, std::memory_order_release);
    doorbell->ring();
    thread.join();
    fail_all(detail::engine_closed_error());
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

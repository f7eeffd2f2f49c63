// A model file with its CPU backend, for tests: ids in, logits out, no engine.
#ifndef VALAR_TESTS_RUN_MODEL_HPP
#define VALAR_TESTS_RUN_MODEL_HPP

#include "backend/internal.hpp"

#include <algorithm>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

namespace run_model {

using namespace valar;

/// One sequence's pages: those from `first` on, in order or backwards.
inline std::vector<uint32_t> page_list(uint32_t first, uint32_t count, bool backwards = false) {
    std::vector<uint32_t> pages(count);
    std::iota(pages.begin(), pages.end(), first);
    if (backwards) std::reverse(pages.begin(), pages.end());
    return pages;
}

/// Rows for ids at positions start, start + 1, ...
inline std::vector<BatchRow> make_rows(std::span<const Token> ids, uint32_t start,
                                       const std::vector<uint32_t>& pages, bool logits) {
    std::vector<BatchRow> rows;
    for (const Token id : ids) rows.push_back({id, nullptr, start++, pages.data(), logits});
    return rows;
}

struct Model {
    std::unique_ptr<Gguf> gguf;  // stays put
    std::unique_ptr<ModelSpec> spec;
    detail::ModelTensors tensors;
    std::unique_ptr<Backend> backend;

    static Result<Model> open(Result<Gguf> file, const BackendOptions& options,
                              const detail::Kernels* kernels = nullptr) {
        if (!file) return file.error();
        Model model;
        model.gguf = std::make_unique<Gguf>(std::move(*file));
        auto spec = read_model_spec(*model.gguf);
        if (!spec) return spec.error();
        model.spec = std::make_unique<ModelSpec>(std::move(*spec));
        auto tensors = detail::bind_model_tensors(*model.gguf, *model.spec);
        if (!tensors) return tensors.error();
        model.tensors = std::move(*tensors);
        auto backend = detail::open_cpu_backend(*model.gguf, *model.spec, model.tensors, options,
                                                kernels);
        if (!backend) return backend.error();
        model.backend = std::move(*backend);
        for (;;) {
            auto done = model.backend->load(UINT64_MAX, nullptr);
            if (!done) return done.error();
            if (*done) return model;
        }
    }

    /// Runs one batch; `pause_ns` 0: at a stretch, else advance() is called with such deadlines.
    Result<void> run(std::span<const BatchRow> rows, uint64_t pause_ns = 0) {
        if (auto begun = backend->begin(rows); !begun) return begun;
        for (;;) {
            auto done = backend->advance(pause_ns ? detail::monotonic_ns() + pause_ns : 0);
            if (!done) return done.error();
            if (*done) return {};
        }
    }
    /// Of the i-th row that wanted them; none where they are not finite.
    std::span<const float> logits(uint32_t i) const {
        auto values = backend->logits(i);
        return values ? *values : std::span<const float>();
    }
};

}  // namespace run_model

#endif  // VALAR_TESTS_RUN_MODEL_HPP

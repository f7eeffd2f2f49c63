// >>backend
// The CPU backend: a decoder, which knows what is computed, on a machine, which knows threads and
// time. Read cpu_decoder.cpp for the forward pass.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "backend/cpu_machine.hpp"
#include "backend/cpu_trials.hpp"
#include "backend/internal.hpp"
#include "base/internal.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

class CpuBackend final : public Backend {
public:
    bool exact() const override { return true; }
    Result<bool> load(uint64_t budget_us, float* progress) override;
    Result<void> begin(std::span<const BatchRow> rows) override;
    Result<bool> advance(uint64_t deadline_ns) override;
    void abandon() override { decoder_.abandon(); }
    Result<std::span<const float>> logits(uint32_t i) const override { return decoder_.logits(i); }
    void copy_page(uint32_t from, uint32_t to) override;
    size_t page_bytes(uint32_t page) const override { return decoder_.page_bytes(page); }
    void export_page(uint32_t page, std::byte* out) const override;
    void import_page(uint32_t page, const std::byte* in) override;

    Result<void> open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                      const BackendOptions& options, const Kernels* kernels);

private:
    CpuMachine machine_;
    CpuDecoder decoder_;
    CpuLoader loader_;
    CpuTrials trials_;
};

Result<void> CpuBackend::open(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                              const BackendOptions& options, const Kernels* kernels) {
    if (!kernels) {
        auto chosen = choose_kernels();
        if (!chosen) return chosen.error();
        kernels = *chosen;
    }
    auto ahead = forced_prefetch();
    if (!ahead) return ahead.error();
    if (auto done = decoder_.open(gguf, spec, tensors, options, *kernels); !done) return done;
    trials_.open(decoder_.parts(), kernels->prefetches || *ahead >= 0 ? *ahead : 0);
    loader_.open(gguf, decoder_.weights(), decoder_.staging(), decoder_.parts());
    return machine_.open(decoder_.parts(), CpuDecoder::step_kinds(), options.parallel_for);
}

Result<bool> CpuBackend::load(uint64_t budget_us, float* progress) {
    if (auto good = loader_.load(budget_us, machine_.team()); !good) return good.error();
    if (progress) *progress = loader_.progress();
    return loader_.done();
}

Result<void> CpuBackend::begin(std::span<const BatchRow> rows) {
    if (!loader_.done())
        return make_error(ErrorKind::internal, "batch: the model is not loaded yet");
    if (auto begun = decoder_.begin(rows); !begun) return begun;
    decoder_.set_prefetch(trials_);
    machine_.begin_batch(decoder_.has_few_rows() ? trials_.parts() : machine_.team().parts());
    return {};
}

Result<bool> CpuBackend::advance(uint64_t deadline_ns) {
    if (decoder_.batch().empty()) return make_error(ErrorKind::internal, "batch: none was begun");
    const FloatState float_state;
    machine_.begin_turn(deadline_ns);
    do decoder_.run_slice(machine_);
    while (!decoder_.done() && !machine_.turn_is_over());
    const bool done = decoder_.done();
    if (done) decoder_.check_logits(machine_);
    machine_.end_turn();
    if (done && decoder_.batch().size() == 1)
        trials_.add(decoder_.add_times({.ns = machine_.batch_ns()}));
    if (done) abandon();
    return done;
}

void CpuBackend::copy_page(uint32_t from, uint32_t to) {
    for (const CpuLayer& in : decoder_.weights().layers)
        if (in.has_page(from))
            std::memcpy(decoder_.kv_page(in, to), decoder_.kv_page(in, from), in.kv_page_bytes());
}

void CpuBackend::export_page(uint32_t page, std::byte* out) const {
    for (const CpuLayer& in : decoder_.weights().layers) {
        if (!in.has_page(page)) continue;
        std::memcpy(out, decoder_.kv_page(in, page), in.kv_page_bytes());
        out += in.kv_page_bytes();
    }
}

void CpuBackend::import_page(uint32_t page, const std::byte* bytes) {
    for (const CpuLayer& in : decoder_.weights().layers) {
        if (!in.has_page(page)) continue;
        std::memcpy(decoder_.kv_page(in, page), bytes, in.kv_page_bytes());
        bytes += in.kv_page_bytes();
    }
}

}  // namespace

Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const ModelTensors& tensors,
                                                  const BackendOptions& options,
                                                  const Kernels* kernels) {
    auto backend = std::make_unique<CpuBackend>();
    auto opened = backend->open(gguf, spec, tensors, options, kernels);
    if (!opened) return opened.error();
    return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace detail

Result<MemoryPlan> plan_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                    const BackendOptions& options) {
    const auto tensors = detail::bind_model_tensors(gguf, spec);
    if (!tensors) return tensors.error();
    return detail::plan_cpu_backend(gguf, spec, *tensors, options);
}

Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const BackendOptions& options) {
    const auto tensors = detail::bind_model_tensors(gguf, spec);
    if (!tensors) return tensors.error();
    return detail::open_cpu_backend(gguf, spec, *tensors, options);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

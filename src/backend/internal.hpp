#pragma once

#include "backend/backend.hpp"
#include "digest_internal.hpp"
#include "kernels/internal.hpp"
#include "model_internal.hpp"

#include <memory>

namespace valar {
inline namespace v1 {
namespace detail {

/// What the CPU backend would take, to the byte; takes nothing. Errors: an option out of range.
Result<MemoryPlan> plan_cpu(const Gguf& gguf, const ModelSpec& spec, const ModelTensors& tensors,
                            const BackendOptions& options);
/// The CPU backend, with its worker team. Nothing is loaded yet: call load() until it says true.
/// `gguf`, `spec` and `tensors` are borrowed for its life. Kernels: choose_kernels() unless given.
Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                  const ModelTensors& tensors,
                                                  const BackendOptions& options,
                                                  const Kernels* kernels = nullptr);

/// What parts models that are alike in shape: their directory, and the first row of every tensor as
/// numbers: a model is the same however its file holds it.
Result<Hash256> model_fingerprint(const Gguf& gguf);

}  // namespace detail
}  // namespace v1
}  // namespace valar

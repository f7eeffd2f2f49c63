#pragma once

#include "backend/backend.hpp"
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

}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "backend/backend.hpp"
#include "digest_internal.hpp"
#include "kernels/internal.hpp"
#include "model_internal.hpp"

#include <memory>

namespace valar {
inline namespace v1 {
namespace detail {

/// The public functions of these names, for tensors that are bound already: they are looked at by
/// the call only. Kernels: choose_kernels() unless given.
Result<MemoryPlan> plan_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                    const ModelTensors& tensors, const BackendOptions& options);
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

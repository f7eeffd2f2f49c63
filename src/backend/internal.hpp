#pragma once

#include "backend/backend.hpp"
#include "digest_internal.hpp"
#include "kernels/internal.hpp"
#include "tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace valar {
inline namespace v1 {
namespace detail {

/// One row of a batch: a token at a position of a sequence. `pages` lists the sequence's pages, in
/// order of position; the page of `position` is already there. A row sees the positions 0 ..
/// position of its sequence: those of earlier batches and those of earlier rows of this batch.
/// Pages that lie before the windows of all layers are not looked at.
struct BatchRow {
    Token token = 0;
    const float* embedding = nullptr;  ///< (n_embd) instead of the token's, or null
    uint32_t position = 0;
    const uint32_t* pages = nullptr;  ///< borrowed until the batch is done
    bool logits = false;              ///< wanted for this row
};

/// A device that runs a ModelSpec. Threads: one at a time.
class Backend {
public:
    virtual ~Backend() = default;
    /// Whether the numeric promise holds here.
    virtual bool exact() const = 0;
    /// Loads the next slice of weights; true when all is there. `progress` (0..1) may be null.
    virtual Result<bool> load(uint64_t budget_us, float* progress) = 0;
    /// Takes a batch; the rows of one sequence in ascending order of position. Rows are borrowed
    /// until advance() says done.
    virtual Result<void> begin(std::span<const BatchRow> rows) = 0;
    /// Computes on until done (true), or until the first boundary past the deadline (false; 0: no
    /// deadline). Error: nothing was begun.
    virtual Result<bool> advance(uint64_t deadline_ns) = 0;
    /// Gives up a batch that was begun: its positions count as not computed.
    virtual void abandon() = 0;
    /// The logits (n_vocab) of the i-th row that wanted them; valid until the next begin(). Error: some
    /// are not finite; it names the layer. Other rows are none the worse for it.
    virtual Result<std::span<const float>> logits(uint32_t i) const = 0;
    /// Copies whole pages inside the pool; bytes of one page out and in (position-free layout).
    virtual void copy_page(uint32_t from, uint32_t to) = 0;
    virtual size_t page_bytes() const = 0;
    virtual void export_page(uint32_t page, std::byte* out) const = 0;
    virtual void import_page(uint32_t page, const std::byte* in) = 0;
};

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

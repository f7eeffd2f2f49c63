// >>backend
// Owns: the interface that a device implements, and the CPU backend.
// Assumes: a ModelSpec whose tensors were bound; token ids below n_vocab.
// Promises: logits are a pure function of the file, the tokens before and the options that say so
//           (numeric definition): not of batch, chunks, pages, threads or kernels.
#pragma once

#include "kernels/kernels.hpp"
#include "model.hpp"
#include "tokenizer/tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace valar {
inline namespace v1 {

/// packed: a private copy of the weights as the kernels want them; fastest. mapped: none, a few rows
/// are packed each time they are used, from the file's pages or model_bytes (a GgufReader is refused);
/// the same bits, several times slower. Weights that the file holds packed (quantize --packed) are
/// read in place with either; copied if from a GgufReader, or off a multiple of 64 in model_bytes.
enum class Weights : uint8_t { packed, mapped };

/// How a model is held and computed. No option changes bits but `kv_type` and `precision`.
struct BackendOptions {
    Precision precision = Precision::fast;
    KvType kv_type = KvType::f16;
    uint32_t kv_pages = 0;          ///< pages in the pool
    uint32_t page_tokens = 16;      ///< positions a page, a multiple of 16
    uint32_t max_batch_rows = 512;  ///< rows of one batch at most
    uint32_t max_logit_rows = 1;    ///< rows of one batch that may want logits
    uint32_t max_positions = 0;     ///< of a sequence; 0: as all pages hold (windows allow more)
    int threads = -1;               ///< helpers beside the caller; -1: physical cores - 1
    ParallelFor parallel_for = {};  ///< the host's job system instead of own threads
    Weights weights = Weights::packed;
    Allocator allocator = {};   ///< of weights, keys and values, and scratch
    uint32_t window_pages = 0;  ///< more, numbered behind those: layers with windows; 0: all share
};

/// Bytes that a loaded model takes.
struct MemoryPlan {
    uint64_t weights = 0;  ///< a private copy
    uint64_t kv = 0;
    uint64_t scratch = 0;
    /// Of the file, read in place; not part of total(). Of address space also `packed` takes as much
    /// as the file is long, as long as the model is open: its pages are given back as they are read.
    uint64_t mapped = 0;
    uint64_t total() const { return weights + kv + scratch; }
};

/// A token at a position of a sequence: it sees itself and the positions before it, as earlier
/// batches and earlier rows of this batch compute them. Rows of one sequence share a list of pages.
struct BatchRow {
    Token token = 0;                   ///< from 0 to n_vocab - 1; not read where `embedding` is set
    const float* embedding = nullptr;  ///< (n_embd) instead of the token's, or null; borrowed
    uint32_t position = 0;             ///< in its sequence, from 0
    /// Numbers of pages in the pool: position p of the sequence lies in pages[p / page_tokens],
    /// and that of `position` is there already. Pages before all layers' windows are not looked at.
    const uint32_t* pages = nullptr;
    bool logits = false;     ///< whether logits are wanted for this row
    bool long_rope = false;  ///< turned by rope_long_factors, like all rows before it
    const uint32_t* window_pages = nullptr;  ///< the same, where layers with windows have their own
};

/// A device that holds a model and computes batches of rows. It keeps kv_pages pages of keys and
/// values; whose they are is the caller's affair. Threads: calls one at a time, from any thread.
class VALAR_API Backend {
public:
    virtual ~Backend() = default;
    /// Whether logits here equal those of the numeric definition, bit for bit.
    virtual bool exact() const = 0;
    /// Loads weights for about `budget_us` microseconds; true when all are there. `progress` (0 to
    /// 1) may be null. Errors: io or bad_data where the file cannot be read.
    virtual Result<bool> load(uint64_t budget_us, float* progress) = 0;
    /// Takes a batch of 1 to max_batch_rows rows, at most max_logit_rows of which want logits; rows
    /// of one sequence stand in ascending order of position. The rows and what they point to are
    /// borrowed until advance() returns true or abandon() is called. Error (internal): the model is
    /// not loaded, or a row or a count is out of range; then nothing was begun.
    virtual Result<void> begin(std::span<const BatchRow> rows) = 0;
    /// Computes on and returns true when the batch is done, false at the first boundary after
    /// `deadline_ns` on the monotonic clock (0: no deadline). Error (internal): nothing was begun.
    virtual Result<bool> advance(uint64_t deadline_ns) = 0;
    /// Gives up the batch that was begun, if any: its positions count as not computed.
    virtual void abandon() = 0;
    /// The logits (n_vocab) of the i-th row that wanted them, until the next begin(). Error
    /// (bad_data): some are not finite; names the layer where that began; other rows are unharmed.
    virtual Result<std::span<const float>> logits(uint32_t i) const = 0;
    /// Copies one page of all its layers over another of its kind.
    virtual void copy_page(uint32_t from, uint32_t to) = 0;
    /// Bytes of a page of all its layers, as export_page writes and import_page takes them.
    virtual size_t page_bytes(uint32_t page) const = 0;
    virtual void export_page(uint32_t page, std::byte* out) const = 0;
    virtual void import_page(uint32_t page, const std::byte* in) = 0;
};

/// What the CPU backend would take, to the byte, for read_model_spec(gguf). Any thread may ask.
/// Errors: an option is out of range, or a tensor is missing or not shaped as `spec` says.
VALAR_API Result<MemoryPlan> plan_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                              const BackendOptions& options);
/// The CPU backend, not loaded yet. Borrows `gguf` and `spec`, which stay where they are. Any
/// thread. Errors: as plan_cpu_backend and kernels_in_use; out_of_memory; io: no thread starts.
VALAR_API Result<std::unique_ptr<Backend>> open_cpu_backend(const Gguf& gguf, const ModelSpec& spec,
                                                            const BackendOptions& options);

}  // namespace v1
}  // namespace valar

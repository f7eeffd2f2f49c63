// >>backend
// Owns: the interface that a device implements, and the CPU backend.
// Assumes: a ModelSpec whose tensors were bound; token ids below n_vocab.
// Promises: logits are a pure function of the file, the tokens before and the options that say so
//           (numeric definition): not of batch, chunks, pages, threads or kernels.
#pragma once

#include "kernels/kernels.hpp"
#include "model.hpp"

#include <cstdint>

namespace valar {
inline namespace v1 {

/// packed: a private copy of the weights as the kernels want them; fastest. mapped: none, a few rows
/// are packed each time they are used, from the file's pages or model_bytes (a GgufReader is refused);
/// the same bits, several times slower: for hosts that count megabytes. Weights that the file holds
/// packed (examples/quantize.cpp --packed) are read in place with either, at full speed; copied only
/// where they come from a GgufReader or lie in model_bytes off a multiple of 64.
enum class Weights : uint8_t { packed, mapped };

/// How a model is held and computed. `kv_type` and `precision` are the options that may change
/// bits.
struct BackendOptions {
    Precision precision = Precision::fast;
    KvType kv_type = KvType::f16;
    uint32_t kv_pages = 0;          ///< pages in the pool
    uint32_t page_tokens = 16;      ///< positions a page, a multiple of 16
    uint32_t max_batch_rows = 512;  ///< rows of one batch at most
    uint32_t max_logit_rows = 1;    ///< rows of one batch that may want logits
    uint32_t max_positions = 0;     ///< of one sequence; 0: as many as all pages hold (more is of
                                    ///< use where all layers have windows)
    int threads = -1;               ///< helpers beside the caller; -1: physical cores - 1
    ParallelFor parallel_for = nullptr;  ///< the host's job system instead of own threads
    void* parallel_for_host = nullptr;
    Weights weights = Weights::packed;
    Allocator allocator = {};  ///< of weights, keys and values, and scratch
};

/// Bytes that a loaded model takes.
struct MemoryPlan {
    uint64_t weights = 0;  ///< a private copy
    uint64_t kv = 0;
    uint64_t scratch = 0;
    uint64_t mapped = 0;  ///< of the file, read in place; not part of total()
    uint64_t total() const { return weights + kv + scratch; }
};

}  // namespace v1
}  // namespace valar

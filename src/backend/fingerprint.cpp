#include "prologue.hpp"

#include "backend/internal.hpp"
#include "kernels/layout.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

// The first row of a tensor, as numbers.
Result<std::vector<float>> read_first_row(const Gguf& gguf, const TensorInfo& tensor) {
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
    return row;
}

}  // namespace

Result<Hash256> model_fingerprint(const Gguf& gguf) {
    Sha256 hash;
    for (const TensorInfo& tensor : gguf.tensors()) {
        auto row = read_first_row(gguf, tensor);
        if (!row) return row.error();
        hash.update(tensor.name);
        hash.update(&tensor.type, sizeof tensor.type);
        hash.update(tensor.dims, sizeof tensor.dims);
        hash.update(row->data(), row->size() * sizeof(float));
    }
    return hash.finish();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

// >>backend
// Loading: weights go from the file into memory, packed where the kernels want it.
#include "prologue.hpp"

#include "backend/cpu_decoder.hpp"
#include "base/internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

constexpr uint64_t kLoadBytes = 1 << 20;  // of the file, a thread, between two looks at the clock

}  // namespace

void CpuLoader::open(const Gguf& gguf, const CpuWeights& weights, std::span<std::byte> staging,
                     uint32_t parts) {
    gguf_ = &gguf;
    weights_ = &weights;
    staging_ = staging;
    parts_ = parts;
    for (const LoadItem& item : weights.items) bytes_to_load_ += item.bytes;
}

Result<void> CpuLoader::load(uint64_t budget_us, Team& team) {
    const uint64_t start = monotonic_ns();
    team.begin();
    Result<void> good;
    while (good && !done()) {
        good = load_item_slice(team);
        if ((monotonic_ns() - start) / 1000 >= budget_us) break;
    }
    team.end();
    return good;
}

// Loads as many tiles as the threads take at a time, or about as many bytes, and releases at once
// what was read of the file.
Result<void> CpuLoader::load_item_slice(Team& team) {
    const LoadItem& item = weights_->items[item_];
    const TensorInfo& tensor = *item.tensor;
    const uint64_t tile_bytes = item.pack() ? item.row_bytes() * kTileRows : kLoadBytes;
    const uint32_t tiles = static_cast<uint32_t>((item.bytes + tile_bytes - 1) / tile_bytes);
    const uint64_t step = parts_ * std::max<uint64_t>(1, kLoadBytes / tile_bytes);
    uint32_t last = static_cast<uint32_t>(std::min<uint64_t>(tiles, tile_ + step));
    const uint64_t done = tile_ * tile_bytes, offset = item.offset + done;
    auto there = gguf_->tensor_bytes(tensor);
    const bool staged = item.pack() && !there;  // a reader: by way of the scratch memory
    if (staged)
        last = static_cast<uint32_t>(
            std::min<uint64_t>(last, tile_ + staging_.size() / tile_bytes));
    const size_t bytes = static_cast<size_t>(std::min(item.bytes, last * tile_bytes) - done);
    std::byte* const to = item.pack() ? staging_.data() : item.out + done;
    if (staged || !item.pack())
        if (auto read = gguf_->read_tensor(tensor, offset, {to, bytes}); !read) return read;
    if (item.pack()) {
        PackJob job{&item, staged ? to : there->data() + offset, tile_, last};
        team.run(pack_part, &job);
    }
    gguf_->release(tensor, offset, bytes);
    loaded_bytes_ += bytes;
    tile_ = last;
    if (last == tiles) {
        ++item_;
        tile_ = 0;
    }
    return {};
}

void CpuLoader::pack_part(void* context, uint32_t part, uint32_t parts) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const TensorInfo& tensor = *job.item->tensor;
    const uint32_t rows = job.item->rows, cols = static_cast<uint32_t>(tensor.dims[0]);
    const uint64_t count = job.last - job.first, row_bytes = job.item->row_bytes();
    const uint32_t first = job.first + static_cast<uint32_t>(count * part / parts);
    const uint32_t last = job.first + static_cast<uint32_t>(count * (part + 1) / parts);
    if (first == last) return;
    pack_tiles(tensor.type, rows, cols, job.source + (first - job.first) * row_bytes * kTileRows,
               first, last, job.item->out + first * packed_tile_bytes(tensor.type, cols));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

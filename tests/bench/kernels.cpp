// Micro benchmark of the kernels: GB/s of packed weights with one column, GOP/s with several, for
// every weight type, one thread; then attention and the vector kernels. Arguments: a table's name
// (default: the best), the smallest number of MB to stream (default 256).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define VALAR_IMPLEMENTATION
#include "valar.hpp"

using namespace valar;
using namespace valar::detail;

static uint32_t seed = 1;
static uint32_t next() { return seed = seed * 1664525u + 1013904223u; }
static float uniform() { return static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f; }

template <class Work>
static double seconds(Work work) {  // best of several runs
    double best = 1e9;
    const uint64_t begin = monotonic_ns();
    for (int i = 0; i < 3 || (i < 50 && monotonic_ns() - begin < 300'000'000); i++) {
        const uint64_t start = monotonic_ns();
        work();
        best = std::min(best, static_cast<double>(monotonic_ns() - start) * 1e-9);
    }
    return best;
}

static void bench_type(const Kernels& k, TensorType type, uint32_t cols, size_t bytes) {
    const uint64_t tile = packed_tile_bytes(type, cols);
    const uint32_t tiles = static_cast<uint32_t>(bytes / tile), rows = tiles * 16;
    auto buffer = *Buffer::allocate(tiles * tile, "weights");
    const TypeInfo& info = *type_info(type);
    std::vector<std::byte> source(size_t{16} * cols / info.block_size * info.block_bytes);
    for (std::byte& b : source) b = std::byte(next() >> 24 & 0x3f);
    double pack_seconds =
        seconds([&] { pack_tiles(type, 16, cols, source.data(), 0, 1, buffer.data()); });
    for (uint32_t t = 1; t < tiles; t++) std::memcpy(buffer.data() + t * tile, buffer.data(), tile);
    constexpr uint32_t most = 128;
    std::vector<float> x(most * cols), y(most * size_t{rows});
    for (float& v : x) v = uniform();
    std::vector<ActivationBlock> blocks(most * (cols / 32));
    for (uint32_t c = 0; c < most; c++) k.quantize(&x[c * cols], cols, 1, &blocks[c * (cols / 32)]);
    std::printf("%-5s %5u cols  pack %5.2f GB/s |", info.name, cols,
                static_cast<double>(source.size()) / pack_seconds * 1e-9);
    for (uint32_t columns : {1u, 2u, 4u, 8u, 16u, 64u, 128u}) {
        // One column streams from memory; many columns meet a matrix of a usual size.
        const uint32_t used = columns == 1 ? tiles : std::min(tiles, 128u);
        const PackedMatrix part{type, used * 16, cols, buffer.data()};
        const double s = seconds([&] {
            k.matmul(
                {&part, 0, used, columns, 1, blocks.data(), x.data(), cols, y.data(), used * 16});
        });
        if (columns == 1) std::printf(" %6.1f GB/s", static_cast<double>(used * tile) / s * 1e-9);
        else std::printf(" %u: %4.0f", columns, 2.0 * columns * used * 16 * cols / s * 1e-9);
    }
    std::printf(" GOP/s\n");
}

static void bench_attention(const Kernels& k, KvType type) {
    constexpr uint32_t head_dim = 64, queries = 64;
    std::vector<float> kv(head_dim), q(queries * head_dim), out(queries * head_dim), m(queries),
        l(queries);
    std::vector<std::vector<uint8_t>> keys(16, std::vector<uint8_t>(16 * head_dim * 4)),
        values = keys;
    const void *key_groups[16], *value_groups[16];
    for (uint32_t j = 0; j < 256; j++) {
        for (float& v : kv) v = uniform();
        k.store_kv(type, kv.data(), kv.data(), head_dim, j % 16, keys[j / 16].data(),
                   values[j / 16].data());
        key_groups[j / 16] = keys[j / 16].data();
        value_groups[j / 16] = values[j / 16].data();
    }
    for (float& v : q) v = uniform();
    std::vector<uint16_t> begin(queries, 0), end(queries, 256);
    std::printf("attention %s", type == KvType::f16 ? "f16" : "f32");
    for (uint32_t n : {1u, 3u, 7u, 64u}) {
        const double s = seconds([&] {
            k.attention({type, head_dim, n, q.data(), head_dim, begin.data(), end.data(),
                         key_groups, value_groups, m.data(), l.data(), out.data(), head_dim});
        });
        std::printf("  %u: %.2f us a query, %.0f GFLOP/s", n, s / n * 1e6,
                    4.0 * n * 256 * head_dim / s * 1e-9);
    }
    std::printf("\n");
}

int main(int argc, char** argv) {
    const Kernels* k = available_kernels().back();
    for (const Kernels* table : available_kernels())
        if (argc > 1 && !std::strcmp(argv[1], table->name)) k = table;
    const size_t bytes = size_t{argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 256u} << 20;
    FloatState state;
    auto buffer = *Buffer::allocate(bytes, "reader");
    std::memset(buffer.data(), 1, bytes);
    uint64_t total = 0;
    const double read = seconds([&] {
        uint64_t sums[8] = {};
        for (size_t i = 0; i < bytes; i += 64)
            for (size_t j = 0; j < 8; j++)
                sums[j] += *reinterpret_cast<const uint64_t*>(buffer.data() + i + 8 * j);
        for (uint64_t s : sums) total += s;
    });
    std::printf("table %s; plain reader %.1f GB/s (%u)\n", k->name,
                static_cast<double>(bytes) / read * 1e-9, static_cast<unsigned>(total & 1));
    buffer = {};
    for (TensorType type : {TensorType::q4_0, TensorType::q4_1, TensorType::q5_0, TensorType::q8_0,
                            TensorType::f16, TensorType::bf16, TensorType::f32})
        bench_type(*k, type, 576, bytes);
    bench_type(*k, TensorType::q4_1, 1536, bytes);
    for (TensorType type :
         {TensorType::q4_k, TensorType::q5_k, TensorType::q6_k, TensorType::q4_0, TensorType::q8_0})
        bench_type(*k, type, 2048, bytes);
    bench_attention(*k, KvType::f16);
    bench_attention(*k, KvType::f32);
    std::vector<float> x(1536), ones(1536, 1.0f), y(1536);
    for (float& v : x) v = uniform();
    std::vector<ActivationBlock> blocks(2 * 48);
    const auto cycle = [&](auto work) {
        return seconds([&] {
                   for (int i = 0; i < 1000; i++) work();
               }) *
               1e6;
    };
    std::printf("1536 values, ns: quantize 1 plane %.0f",
                cycle([&] { k->quantize(x.data(), 1536, 1, blocks.data()); }));
    std::printf(", 2 planes %.0f", cycle([&] { k->quantize(x.data(), 1536, 2, blocks.data()); }));
    std::printf(", rms_norm %.0f",
                cycle([&] { k->rms_norm(x.data(), ones.data(), 1e-5f, 1536, y.data()); }));
    std::printf(", silu_mul (and a copy) %.0f\n", cycle([&] {
                    y = x;
                    k->silu_mul(y.data(), ones.data(), 1536);
                }));
}

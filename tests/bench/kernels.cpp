// Micro benchmark of the kernels. Prints the machine's limits (best of several read loops, peak of
// integer and float products in registers), then for every weight type and row length the share of
// them that the matrix product reaches: of bandwidth with one column (and its two planes), of the
// peak with several; then attention and the vector kernels.
//
//   bench_kernels [--table NAME] [--type NAME] [--cols K] [--columns N] [--threads N] [--mb N]
//                 [--no-vectors]
//
// One column streams N MB (default 128) of weights from memory, as do up to 16; more columns meet
// a matrix of a usual size. Shares are of the limits of the same run and the same threads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define VALAR_IMPLEMENTATION
#define VALAR_EVEX_VNNI
#include "valar.hpp"

using namespace valar;
using namespace valar::detail;

static uint32_t seed = 1;
static uint32_t next() { return seed = seed * 1664525u + 1013904223u; }
static float uniform() { return static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f; }

struct Options {
    std::string table, type;
    uint32_t cols = 0, columns = 0, threads = 1, mb = 128;
    bool vectors = true;
};

template <class Work>
static double seconds(Work work) {  // best of several runs
    double best = 1e9;
    const uint64_t begin = monotonic_ns();
    for (int i = 0; i < 3 || (i < 50 && monotonic_ns() - begin < 200'000'000); i++) {
        const uint64_t start = monotonic_ns();
        work();
        best = std::min(best, static_cast<double>(monotonic_ns() - start) * 1e-9);
    }
    return best;
}

// Runs work(part, parts) on every thread of the team.
template <class Work>
static void on_all(Team& team, Work& work) {
    team.run([](void* w, uint32_t part, uint32_t parts) { (*static_cast<Work*>(w))(part, parts); },
             &work);
}

// ---- Limits ----------------------------------------------------------------------------------

static volatile uint64_t sink;

static void read_plain(const std::byte* at, size_t bytes) {
    uint64_t sums[8] = {}, total = 0;
    for (size_t i = 0; i + 64 <= bytes; i += 64)
        for (size_t j = 0; j < 8; j++)
            sums[j] += *reinterpret_cast<const uint64_t*>(at + i + 8 * j);
    for (uint64_t s : sums) total += s;
    sink = total;
}

struct Peak {
    const char* name;
    double (*operations)(uint64_t rounds);  // does them, returns how many
};

#if VALAR_X86_KERNELS
constexpr int kChains = 14;  // more than latency times throughput of any machine so far

VALAR_TARGET_BEGIN("avx2,fma,f16c")
template <int kStreams, size_t kAhead>
static void read_streams(const std::byte* at, size_t bytes) {
    const size_t each = bytes / kStreams / 256 * 256;
    __m256i sums[4] = {};
    for (size_t i = 0; i < each; i += 256) {
        VALAR_UNROLL for (int s = 0; s < kStreams; s++) {
            const std::byte* from = at + each * static_cast<size_t>(s) + i;
            VALAR_UNROLL for (int j = 0; j < 4; j++) {
                if (kAhead)
                    _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead + 64 * j,
                                 _MM_HINT_T0);
                sums[j] = _mm256_xor_si256(sums[j], avx2::load_bytes(from + 64 * j));
                sums[j] = _mm256_xor_si256(sums[j], avx2::load_bytes(from + 64 * j + 32));
            }
        }
    }
    sums[0] = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]),
                               _mm256_xor_si256(sums[2], sums[3]));
    sink = static_cast<uint64_t>(_mm256_extract_epi64(sums[0], 0));
}

// Products of unsigned and signed bytes as AVX2 has them, added in 16 bits: what four-bit codes
// may.
static double maddubs_256(uint64_t rounds) {
    __m256i acc[kChains], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(1);
    VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm256_set1_epi32(i);
    for (uint64_t r = 0; r < rounds; r++) VALAR_UNROLL for (int i = 0; i < kChains - 2; i++) {
            __asm__("" : "+x"(x));  // else one product would do for all
            acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(w, x));
        }
    VALAR_UNROLL for (int i = 1; i < kChains - 2; i++) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
    sink = static_cast<uint64_t>(_mm256_extract_epi64(acc[0], 0));
    return static_cast<double>(rounds) * (kChains - 2) * 64;
}

static double fma_256(uint64_t rounds) {
    __m256 acc[kChains], w = _mm256_set1_ps(0.5f), x = _mm256_set1_ps(1);
    VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm256_set1_ps(static_cast<float>(i));
    for (uint64_t r = 0; r < rounds; r++)
        VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm256_fmadd_ps(acc[i], w, x);
    VALAR_UNROLL for (int i = 1; i < kChains; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    sink = static_cast<uint64_t>(_mm256_cvtss_f32(acc[0]));
    return static_cast<double>(rounds) * kChains * 16;
}
VALAR_TARGET_END

VALAR_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
static double dpbusd_512(uint64_t rounds) {
    __m512i acc[kChains], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(1);
    VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm512_set1_epi32(i);
    for (uint64_t r = 0; r < rounds; r++)
        VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], w, x);
    VALAR_UNROLL for (int i = 1; i < kChains; i++) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
    sink = static_cast<uint64_t>(_mm512_cvtsi512_si32(acc[0]));
    return static_cast<double>(rounds) * kChains * 128;
}

static double dpbusd_256(uint64_t rounds) {  // stands for AVX-VNNI
    __m256i acc[kChains], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(1);
    VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm256_set1_epi32(i);
    for (uint64_t r = 0; r < rounds; r++)
        VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm256_dpbusd_epi32(acc[i], w, x);
    VALAR_UNROLL for (int i = 1; i < kChains; i++) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
    sink = static_cast<uint64_t>(_mm256_extract_epi64(acc[0], 0));
    return static_cast<double>(rounds) * kChains * 64;
}

static double fma_512(uint64_t rounds) {
    __m512 acc[kChains], w = _mm512_set1_ps(0.5f), x = _mm512_set1_ps(1);
    VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm512_set1_ps(static_cast<float>(i));
    for (uint64_t r = 0; r < rounds; r++)
        VALAR_UNROLL for (int i = 0; i < kChains; i++) acc[i] = _mm512_fmadd_ps(acc[i], w, x);
    VALAR_UNROLL for (int i = 1; i < kChains; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    sink = static_cast<uint64_t>(_mm512_cvtss_f32(acc[0]));
    return static_cast<double>(rounds) * kChains * 32;
}
VALAR_TARGET_END
#endif

struct Limits {
    double bytes = 0, integers = 0, floats = 0;  // a second: read, products and sums
};

static double measure_peak(Team& team, double (*operations)(uint64_t)) {
    double each = 0;
    auto work = [&](uint32_t part, uint32_t) {
        const double done = operations(200'000);
        if (part == 0) each = done;
    };
    const double s = seconds([&] { on_all(team, work); });
    return each * team.parts() / s;
}

static Limits measure_limits(Team& team, const Kernels& k, size_t bytes) {
    Limits limits;
    auto buffer = *Buffer::allocate(bytes, "reader", true);
    std::memset(buffer.data(), 1, bytes);
    using Reader = void (*)(const std::byte*, size_t);
    const struct {
        const char* name;
        Reader read;
    } readers[] = {
        {"plain", read_plain},
#if VALAR_X86_KERNELS
        {"1 stream", read_streams<1, 0>},
        {"1 stream, prefetch 4 KiB", read_streams<1, 4096>},
        {"4 streams, prefetch 1 KiB", read_streams<4, 1024>},
        {"4 streams, prefetch 2 KiB", read_streams<4, 2048>},
#endif
    };
    std::printf("table %s, %u threads. Read, GB/s:", k.name, team.parts());
    for (const auto& reader : readers) {
        auto work = [&](uint32_t part, uint32_t parts) {
            const size_t each = bytes / parts / 4096 * 4096;
            reader.read(buffer.data() + part * each, each);
        };
        const double rate = static_cast<double>(bytes) / seconds([&] { on_all(team, work); });
        limits.bytes = std::max(limits.bytes, rate);
        std::printf(" %s %.1f;", reader.name, rate * 1e-9);
    }
#if VALAR_X86_KERNELS
    const std::string name = k.name;
    const X86Features cpu = x86_features();
    if (cpu.avx2) limits.floats = measure_peak(team, fma_256);
    if (cpu.avx2) limits.integers = measure_peak(team, maddubs_256);
    if (name == "avxvnni" && cpu.avx512) limits.integers = measure_peak(team, dpbusd_256);
    if (name == "avx512") limits.integers = measure_peak(team, dpbusd_512);
    if (name == "avx512") limits.floats = measure_peak(team, fma_512);
#endif
    std::printf(" peak %.0f GOP/s, %.0f GFLOP/s\n", limits.integers * 1e-9, limits.floats * 1e-9);
    return limits;
}

// ---- Matrix products -------------------------------------------------------------------------

struct PackedWeights {
    TensorType type;
    uint32_t cols, tiles;
    uint64_t tile_bytes;
    Buffer data;
    double pack_rate;  // source bytes a second
};

static PackedWeights make_weights(TensorType type, uint32_t cols, size_t bytes) {
    PackedWeights out{type, cols, 0, packed_tile_bytes(type, cols), {}, 0};
    out.tiles = static_cast<uint32_t>(bytes / out.tile_bytes);
    out.data = *Buffer::allocate(out.tiles * out.tile_bytes, "weights", true);
    const TypeInfo& info = *type_info(type);
    std::vector<std::byte> source(size_t{16} * cols / info.block_size * info.block_bytes);
    for (std::byte& b : source) b = std::byte(next() >> 24 & 0x3f);
    out.pack_rate = static_cast<double>(source.size()) / seconds([&] {
                        pack_tiles(type, 16, cols, source.data(), 0, 1, out.data.data());
                    });
    for (uint32_t t = 1; t < out.tiles; t++)
        std::memcpy(out.data.data() + t * out.tile_bytes, out.data.data(), out.tile_bytes);
    return out;
}

// Seconds of a product, the tiles dealt out as the backend does.
static double product_seconds(Team& team, const Kernels& k, const PackedWeights& w, uint32_t tiles,
                              uint32_t columns, uint32_t planes) {
    static std::vector<float> x, y;
    static std::vector<ActivationBlock> blocks;
    x.resize(size_t{columns} * w.cols);
    y.resize(size_t{columns} * tiles * 16);
    const ActivationLayout layout{columns * planes, w.cols / 32};
    blocks.resize(layout.size());
    for (float& v : x) v = uniform();
    for (uint32_t c = 0; c < columns; c++)
        k.quantize({&x[c * w.cols], w.cols, 1, planes, w.cols, layout.step(),
                    &blocks[layout.at(c * planes)]});
    const PackedMatrix matrix{w.type, tiles * 16, w.cols, w.data.data()};
    auto work = [&](uint32_t part, uint32_t parts) {
        const uint32_t last = tiles * (part + 1) / parts;
        for (uint32_t tile = tiles * part / parts; tile < last;) {
            const uint32_t step = columns >= 8 ? std::min(last - tile, 8u) : last - tile;
            k.matmul({&matrix, tile, tile + step, columns, planes, blocks.data(), x.data(), w.cols,
                      y.data(), tiles * 16});
            tile += step;
        }
    };
    return seconds([&] { on_all(team, work); });
}

static void bench_type(Team& team, const Kernels& k, const Limits& limits, const Options& options,
                       TensorType type, uint32_t cols) {
    const PackedWeights w = make_weights(type, cols, size_t{options.mb} << 20);
    const bool floats = type == TensorType::f32 || type == TensorType::f16 ||
                        type == TensorType::bf16;
    std::printf("%-5s %5u  pack %4.1f |", type_info(type)->name, cols, w.pack_rate * 1e-9);
    for (uint32_t planes = 1; planes <= (floats ? 1u : 2u) && options.columns < 2; planes++) {
        const double s = product_seconds(team, k, w, w.tiles, 1, planes);
        const double rate = static_cast<double>(w.tiles * w.tile_bytes) / s;
        std::printf(" %ux1: %5.1f GB/s %3.0f%%", planes, rate * 1e-9, 100 * rate / limits.bytes);
    }
    std::printf(" |");
    for (uint32_t columns : {2u, 4u, 8u, 16u, 64u, 512u}) {
        if (options.columns && options.columns != columns) continue;
        const uint32_t tiles = columns <= 16 ? w.tiles : std::min(w.tiles, 128u);
        const double s = product_seconds(team, k, w, tiles, columns, 1);
        const double rate = 2.0 * columns * tiles * 16 * cols / s;
        std::printf(" %u: %4.0f %2.0f%%", columns, rate * 1e-9,
                    100 * rate / (floats ? limits.floats : limits.integers));
        if (columns <= 16)
            std::printf(" (%2.0f%%)",
                        100 * static_cast<double>(tiles * w.tile_bytes) / s / limits.bytes);
    }
    std::printf("\n");
    std::fflush(stdout);
}

// ---- Attention and vectors -------------------------------------------------------------------

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

static void bench_vectors(const Kernels& k) {
    bench_attention(k, KvType::f16);
    bench_attention(k, KvType::f32);
    std::vector<float> x(1536), ones(1536, 1.0f), y(1536);
    for (float& v : x) v = uniform();
    std::vector<ActivationBlock> blocks(8 * 48);
    const auto cycle = [&](auto work) {
        return seconds([&] {
                   for (int i = 0; i < 1000; i++) work();
               }) *
               1e6;
    };
    std::printf("1536 values, ns: quantize");
    for (uint32_t columns : {1u, 4u})
        for (uint32_t planes : {1u, 2u})
            std::printf(" %ux%u: %.0f,", columns, planes,
                        cycle([&] {
                            k.quantize({x.data(), 0, columns, planes, 1536, columns * planes,
                                        blocks.data()});
                        }) / columns);
    std::printf(" rms_norm %.0f",
                cycle([&] { k.rms_norm(x.data(), ones.data(), 1e-5f, 1536, y.data()); }));
    std::printf(", silu_mul (and a copy) %.0f\n", cycle([&] {
                    y = x;
                    k.silu_mul(y.data(), ones.data(), 1536);
                }));
}

static Options parse(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (name == "--no-vectors") {
            options.vectors = false;
            continue;
        }
        const char* value = i + 1 < argc ? argv[++i] : "";
        const uint32_t number = static_cast<uint32_t>(std::atoi(value));
        if (name == "--table") options.table = value;
        else if (name == "--type") options.type = value;
        else if (name == "--cols") options.cols = number;
        else if (name == "--columns") options.columns = number;
        else if (name == "--threads") options.threads = number;
        else if (name == "--mb") options.mb = number;
        else {
            std::fprintf(stderr, "unknown option %s\n", argv[i]);
            std::exit(2);
        }
    }
    return options;
}

int main(int argc, char** argv) {
    const Options options = parse(argc, argv);
    const Kernels* k = available_kernels().back();
    for (const Kernels* table : available_kernels())
        if (options.table == table->name) k = table;
    auto team = *Team::create(static_cast<int>(options.threads) - 1, {});
    team->begin();
    FloatState state;
    const Limits limits = measure_limits(*team, *k, size_t{options.mb} << 20);
    for (const PackedLayout& layout : packed_layouts) {
        const TypeInfo& info = *type_info(layout.type);
        if (!options.type.empty() && options.type != info.name) continue;
        for (uint32_t cols : {576u, 896u, 1536u, 2048u, 4864u, 8192u})
            if (cols % info.block_size == 0 && (!options.cols || cols == options.cols))
                bench_type(*team, *k, limits, options, layout.type, cols);
    }
    if (options.vectors) bench_vectors(*k);
    team->end();
}

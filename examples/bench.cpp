// bench: how fast a model runs here, and how much of what the machine can do that is.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/bench.cpp -o bench && ./bench --model FILE
//
// A token cannot be computed faster than the weights are read from memory once, nor faster than the
// CPU multiplies small integers. Both limits are measured in every round, before and after the
// model, by loops that do nothing else; a result's share is limit time / measured time, for the
// limit that is reached first. Bytes are those of the file's tensors plus the keys and values of
// the depth; operations are two (multiply, add) a weight and plane; attention's are not counted.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#define VALAR_NO_SERVER
#define VALAR_NO_STORE
#endif
#include "valar.hpp"

#include "common.hpp"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(_WIN32)
#include <psapi.h>
#else
#include <sys/mman.h>
#include <sys/resource.h>
#endif

#if defined(__GNUC__)
#define BENCH_TARGET(features) __attribute__((target(features)))
#define BENCH_UNROLL _Pragma("GCC unroll 16")
#define BENCH_INLINE inline __attribute__((always_inline))
#else
#define BENCH_TARGET(features)
#define BENCH_UNROLL
#define BENCH_INLINE __forceinline
#endif

namespace {

using valar::Json;
using valar::Result;
using Clock = std::chrono::steady_clock;

// ---- What the machine can do -----------------------------------------------------------------

// One integer instruction, over and over on registers: 12 chains hide its latency. They start from
// different values, or the compiler would find them equal and keep one.
constexpr int kChains = 12;

struct Multiplier {
    const char* table;  // the kernel table that uses it
    const char* instruction;
    int operations;                   // of one instruction
    int32_t (*run)(uint64_t rounds);  // kChains instructions a round
};

#if defined(__x86_64__) || defined(_M_X64)
BENCH_TARGET("avx512f,avx512vnni") int32_t run_dpbusd_zmm(uint64_t rounds) {
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
    __m512i sums[kChains];
    BENCH_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(i);
    for (; rounds; --rounds) {
        BENCH_UNROLL
        for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    }
    __m512i total = _mm512_setzero_si512();
    BENCH_UNROLL
    for (__m512i sum : sums) total = _mm512_xor_si512(total, sum);
    int32_t lanes[16];
    _mm512_storeu_si512(lanes, total);
    return lanes[0];
}
BENCH_TARGET("avx2,avxvnni") int32_t run_dpbusd_ymm(uint64_t rounds) {
    const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
    __m256i sums[kChains];
    BENCH_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_epi32(i);
    for (; rounds; --rounds) {
        BENCH_UNROLL
        for (__m256i& sum : sums) sum = _mm256_dpbusd_avx_epi32(sum, a, b);
    }
    __m256i total = _mm256_setzero_si256();
    BENCH_UNROLL
    for (__m256i sum : sums) total = _mm256_xor_si256(total, sum);
    return _mm_cvtsi128_si32(_mm256_castsi256_si128(total));
}
BENCH_TARGET("avx2") int32_t run_maddubs(uint64_t rounds) {
    // The sum is an operand and `a` changes, or a product would be computed once and kept.
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2), sums[kChains];
    BENCH_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_epi32(i);
    for (; rounds; --rounds) {
        BENCH_UNROLL
        for (__m256i& sum : sums) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, sum));
        a = _mm256_xor_si256(a, b);
    }
    __m256i total = _mm256_setzero_si256();
    BENCH_UNROLL
    for (__m256i sum : sums) total = _mm256_xor_si256(total, sum);
    return _mm_cvtsi128_si32(_mm256_castsi256_si128(total));
}
#elif defined(__aarch64__)
// By name, since compilers differ in how they enable an extension for one function.
#define BENCH_NEON(function, text)                                                            \
    int32_t function(uint64_t rounds) {                                                       \
        const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);                                \
        int32x4_t sums[kChains] = {};                                                         \
        for (; rounds; --rounds) {                                                            \
            BENCH_UNROLL                                                                      \
            for (int32x4_t & sum : sums) __asm__ volatile(text : "+w"(sum) : "w"(a), "w"(b)); \
        }                                                                                     \
        int32x4_t total = vdupq_n_s32(0);                                                     \
        BENCH_UNROLL                                                                          \
        for (int32x4_t sum : sums) total = veorq_s32(total, sum);                             \
        return vgetq_lane_s32(total, 0);                                                      \
    }
BENCH_NEON(run_smlal, "smlal %0.8h, %1.8b, %2.8b")
BENCH_NEON(run_sdot, ".arch_extension dotprod\n\tsdot %0.4s, %1.16b, %2.16b")
BENCH_NEON(run_smmla, ".arch_extension i8mm\n\tsmmla %0.4s, %1.16b, %2.16b")
#endif

int32_t run_scalar(uint64_t rounds) {
    uint32_t sums[kChains], a = static_cast<uint32_t>(rounds) | 3;
    for (uint32_t i = 0; i < kChains; ++i) sums[i] = i;
    for (; rounds; --rounds) {
        BENCH_UNROLL
        for (uint32_t& sum : sums) sum += a * (sum ^ 5);
    }
    uint32_t total = 0;
    for (uint32_t sum : sums) total ^= sum;
    return static_cast<int32_t>(total);
}

const Multiplier multipliers[] = {
    {"scalar", "integer multiply", 2, run_scalar},
#if defined(__x86_64__) || defined(_M_X64)
    {"avx2", "vpmaddubsw ymm", 64, run_maddubs},
    {"avxvnni", "vpdpbusd ymm", 64, run_dpbusd_ymm},
    {"avx512", "vpdpbusd zmm", 128, run_dpbusd_zmm},
#elif defined(__aarch64__)
    {"neon", "smlal", 16, run_smlal},
    {"dotprod", "sdot", 32, run_sdot},
    {"i8mm", "smmla", 64, run_smmla},
#endif
};

// Reads bytes as the kernels do, in one stream or in several at once, with or without prefetch.
#if defined(__GNUC__)
typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));
BENCH_INLINE void fetch(const std::byte* at) { __builtin_prefetch(at); }
#else
struct Line {
    uint64_t v[8];
    void operator|=(const Line& other) {
        for (int i = 0; i < 8; ++i) v[i] |= other.v[i];
    }
    uint64_t operator[](int i) const { return v[i]; }
};
inline void fetch(const std::byte*) {}
#endif

constexpr size_t kReadStep = 256;  // bytes of a stream at a time: four lines

template <size_t streams, size_t ahead>
BENCH_INLINE uint64_t read_streams(const std::byte* data, size_t bytes) {
    const size_t stripe = bytes / streams / kReadStep * kReadStep;
    Line seen[4] = {};
    for (size_t i = 0; i < stripe; i += kReadStep)
        for (size_t s = 0; s < streams; ++s) {
            const std::byte* at = data + s * stripe + i;
            BENCH_UNROLL
            for (int j = 0; j < 4; ++j) {
                if (ahead) fetch(at + ahead + 64 * j);
                seen[j] |= reinterpret_cast<const Line*>(at)[j];
            }
        }
    seen[0] |= seen[1];
    seen[0] |= seen[2];
    seen[0] |= seen[3];
    return seen[0][0] | seen[0][3] | seen[0][5];
}

struct Reader {
    const char* table;
    const char* name;
    uint64_t (*run)(const std::byte* data, size_t bytes);
};

#define BENCH_READERS(suffix, target)                                            \
    target uint64_t read_1_##suffix(const std::byte* data, size_t bytes) {       \
        return read_streams<1, 0>(data, bytes);                                  \
    }                                                                            \
    target uint64_t read_1_ahead_##suffix(const std::byte* data, size_t bytes) { \
        return read_streams<1, 4096>(data, bytes);                               \
    }                                                                            \
    target uint64_t read_4_##suffix(const std::byte* data, size_t bytes) {       \
        return read_streams<4, 0>(data, bytes);                                  \
    }                                                                            \
    target uint64_t read_4_ahead_##suffix(const std::byte* data, size_t bytes) { \
        return read_streams<4, 1024>(data, bytes);                               \
    }
#define BENCH_READER_ROWS(table, suffix)                                                        \
    {table, "1 stream", read_1_##suffix}, {table, "1 stream, prefetch", read_1_ahead_##suffix}, \
        {table, "4 streams", read_4_##suffix}, {                                                \
        table, "4 streams, prefetch", read_4_ahead_##suffix                                     \
    }

BENCH_READERS(plain, )
#if defined(__x86_64__)
BENCH_READERS(avx2, BENCH_TARGET("avx2"))
BENCH_READERS(avx512, BENCH_TARGET("avx512f"))
#endif
const Reader readers[] = {
    BENCH_READER_ROWS("scalar", plain),
#if defined(__x86_64__)
    BENCH_READER_ROWS("avx2", avx2),
    BENCH_READER_ROWS("avx512", avx512),
#endif
};

bool has_table(const char* name) {
    for (const char* each : valar::kernel_names())
        if (!std::strcmp(each, name)) return true;
    return false;
}

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Threads that do a pass together, the caller among them. A pass may take less than a millisecond,
/// so helpers spin for the next one; they live no longer than a measurement, or they would hold up
/// the model. Nobody waits for a helper that lost its core: who is done takes its part.
class Crew {
public:
    explicit Crew(uint32_t threads) : parts_(threads), next_(threads) {
        while (helpers_.size() + 1 < threads) helpers_.emplace_back([this] { help(); });
    }
    ~Crew() {
        quit_.store(true, std::memory_order_relaxed);
        for (std::thread& helper : helpers_) helper.join();
    }
    uint32_t size() const { return parts_; }

    /// Seconds of work(part) for every part, on all threads at once.
    template <class Work>
    double seconds_of(Work& work) {
        context_ = &work;
        work_ = [](void* context, uint32_t part) { (*static_cast<Work*>(context))(part); };
        done_.store(0, std::memory_order_relaxed);
        const Clock::time_point start = Clock::now();
        next_.store(0, std::memory_order_release);
        take_parts();
        spin_until([&] { return done_.load(std::memory_order_acquire) == parts_; });
        return seconds_since(start);
    }

private:
    // A while; then others may have the core: there may be more threads than cores.
    template <class Done>
    static void spin_until(Done done) {
        for (uint32_t polls = 0; !done(); ++polls)
            if (polls > 100'000) std::this_thread::yield();
    }
    bool has_parts() const { return next_.load(std::memory_order_relaxed) < parts_; }
    void take_parts() {
        while (has_parts()) {
            const uint32_t part = next_.fetch_add(1, std::memory_order_acquire);
            if (part >= parts_) return;
            work_(context_, part);
            done_.fetch_add(1, std::memory_order_release);
        }
    }
    void help() {
        while (!quit_.load(std::memory_order_relaxed)) {
            spin_until([&] { return has_parts() || quit_.load(std::memory_order_relaxed); });
            take_parts();
        }
    }

    const uint32_t parts_;
    void (*work_)(void* context, uint32_t part) = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> quit_{false};
    alignas(64) std::atomic<uint32_t> next_;     // the part that nobody has begun
    alignas(64) std::atomic<uint32_t> done_{0};  // parts of the pass
    std::vector<std::thread> helpers_;
};

/// Memory larger than any cache, in huge pages where there are any.
class Stream {
public:
    Result<void> open(uint64_t bytes) {
        memory_.reset(static_cast<std::byte*>(
            ::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow)));
        if (!memory_)
            return valar::Error{valar::ErrorKind::out_of_memory,
                                "out of memory: the buffer that measures bandwidth"};
        size_ = static_cast<size_t>(bytes);
#if defined(MADV_HUGEPAGE)
        madvise(memory_.get(), size_, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
        std::memset(memory_.get(), 1, size_);
        return {};
    }
    const std::byte* data() const { return memory_.get(); }
    size_t size() const { return size_; }

private:
    static constexpr std::align_val_t kAlignment{2 << 20};  // of a huge page
    struct Free {
        void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
    };
    std::unique_ptr<std::byte, Free> memory_;
    size_t size_ = 0;
};

struct Limit {
    double best = 0;  // bytes or operations a second
    const char* by = "";
    void take(double value, const char* name) {
        if (value > best) *this = {value, name};
    }
};

struct Limits {
    Limit bandwidth, integers;
};

/// Measures both limits, on all threads and on one.
class Machine {
public:
    Result<void> open(uint32_t threads, uint64_t stream_bytes) {
        threads_ = threads;
        return stream_.open(stream_bytes);
    }
    bool is_open() const { return stream_.size() > 0; }
    /// Raises the limits to what is measured now.
    void measure(Limits& all, Limits& one) {
        measure(threads_, all);
        measure(1, one);
    }

private:
    void measure(uint32_t threads, Limits& limits) {
        Crew crew(threads);
        for (int again = 0; again < kPasses; ++again) {
            for (const Reader& reader : readers)
                if (has_table(reader.table)) measure_reader(crew, reader, limits.bandwidth);
            for (const Multiplier& multiplier : multipliers)
                if (has_table(multiplier.table))
                    measure_multiplier(crew, multiplier, limits.integers);
        }
    }
    // A window of the stream after the other.
    void measure_reader(Crew& crew, const Reader& reader, Limit& limit) {
        constexpr size_t unit = 4 * kReadStep;
        const size_t bytes = stream_.size() / kWindows / crew.size() / unit * unit;
        const std::byte* begin = stream_.data() + window_ * crew.size() * bytes;
        window_ = (window_ + 1) % kWindows;
        auto work = [&](uint32_t part) { sink_.fetch_or(reader.run(begin + part * bytes, bytes)); };
        limit.take(double(bytes) * crew.size() / crew.seconds_of(work), reader.name);
    }
    void measure_multiplier(Crew& crew, const Multiplier& multiplier, Limit& limit) {
        constexpr uint64_t rounds = 200'000;
        auto work = [&](uint32_t) {
            sink_.fetch_or(static_cast<uint32_t>(multiplier.run(rounds)));
        };
        const double operations = double(rounds) * kChains * multiplier.operations;
        limit.take(operations * crew.size() / crew.seconds_of(work), multiplier.instruction);
    }

    // Short passes, of which the best counts: any of them may be disturbed.
    static constexpr int kPasses = 4;
    static constexpr size_t kWindows = 5;

    uint32_t threads_ = 1;
    Stream stream_;
    size_t window_ = 0;
    std::atomic<uint64_t> sink_{0};  // what is computed must seem to be wanted
};

uint64_t peak_memory_bytes() {
#if defined(_WIN32)
    PROCESS_MEMORY_COUNTERS counters;
    if (!K32GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters)) return 0;
    return counters.PeakWorkingSetSize;
#else
    rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
    return static_cast<uint64_t>(usage.ru_maxrss);
#else
    return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
#endif
#endif
}

std::string cpu_name() {
    std::string name, text;
    if (FILE* file = std::fopen("/proc/cpuinfo", "r")) {
        char line[512];
        while (std::fgets(line, sizeof line, file) && *line != '\n') text += line;
        std::fclose(file);
    }
    for (const char* key : {"model name\t: ", "cpu family\t: ", "model\t\t: "}) {
        const size_t at = text.find(key);
        if (at == std::string::npos) continue;
        const size_t begin = at + std::strlen(key);
        const std::string word(key, std::strcspn(key, "\t"));
        name += name.empty() ? "" : ", " + word + " ";
        name += text.substr(begin, text.find('\n', begin) - begin);
    }
    return name.empty() ? "unknown" : name;
}

// ---- The model -------------------------------------------------------------------------------

struct Numbers {
    std::vector<uint32_t> values;
};
bool read_value(const std::string& text, Numbers* out) {
    out->values.clear();
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        if (!example::read_value(text.substr(at, end - at), &out->values.emplace_back()))
            return false;
        at = end + 1;
    }
    return true;
}

struct Settings {
    std::string model;
    uint32_t threads = static_cast<uint32_t>(valar::physical_cores());
    uint32_t prompt = 512;
    uint32_t decode = 64;
    Numbers depths = {{0}};
    uint32_t columns = 16;
    valar::Precision precision = valar::Precision::fast;
    valar::KvType kv_type = valar::KvType::f16;
    uint32_t repeat = 5;
    uint32_t stream_mib = 1024;
    bool json = false;
    bool csv = false;
    bool turns = false;
};

constexpr uint32_t kStartTokens = 100;  // the prompt of "time to first token"
constexpr uint32_t kPage = 16;

struct Cost {
    double bytes = 0, operations = 0;
};

/// The matrices of a layer; a model has some of them.
struct LayerMatrix {
    const char* name;
    bool for_others = false;  // later positions need what comes of it in every layer
    bool of_experts = false;
};
constexpr LayerMatrix layer_matrices[] = {{"attn_k", true},
                                          {"attn_v", true},
                                          {"attn_qkv", true},
                                          {"attn_q"},
                                          {"attn_output"},
                                          {"ffn_gate"},
                                          {"ffn_up"},
                                          {"ffn_down"},
                                          {"ffn_gate_inp"},
                                          {"ffn_gate_exps", false, true},
                                          {"ffn_up_exps", false, true},
                                          {"ffn_down_exps", false, true},
                                          {"ffn_gate_shexp"},
                                          {"ffn_up_shexp"},
                                          {"ffn_down_shexp"}};

/// A loaded model and its sequences, each of which has pages of its own.
class Model {
public:
    Result<void> open(const Settings& settings) {
        auto gguf = valar::Gguf::open(settings.model);
        if (!gguf) return gguf.error();
        gguf_ = std::make_unique<valar::Gguf>(std::move(*gguf));
        auto spec = valar::read_model_spec(*gguf_);
        if (!spec) return spec.error();
        spec_ = std::make_unique<valar::ModelSpec>(std::move(*spec));
        auto tokenizer = valar::Tokenizer::open(*gguf_);  // part of what a start takes
        if (!tokenizer) return tokenizer.error();

        uint32_t longest = std::max(settings.prompt, kStartTokens);
        for (uint32_t depth : settings.depths.values)
            longest = std::max(longest, depth + settings.decode);
        first_pages_ = (longest + kPage - 1) / kPage;
        other_pages_ = (settings.decode + kPage - 1) / kPage;
        options_.precision = settings.precision;
        options_.kv_type = settings.kv_type;
        options_.page_tokens = kPage;
        options_.kv_pages = first_pages_ + (settings.columns - 1) * other_pages_;
        options_.max_batch_rows = std::max(options_.max_batch_rows, settings.columns);
        options_.max_logit_rows = settings.columns;
        options_.threads = static_cast<int>(settings.threads) - 1;
        auto plan = valar::plan_cpu_backend(*gguf_, *spec_, options_);
        if (!plan) return plan.error();
        plan_ = *plan;
        auto backend = valar::open_cpu_backend(*gguf_, *spec_, options_);
        if (!backend) return backend.error();
        backend_ = std::move(*backend);
        for (;;) {
            auto done = backend_->load(UINT64_MAX, nullptr);
            if (!done) return done.error();
            if (*done) break;
        }
        pages_.resize(options_.kv_pages);
        for (uint32_t i = 0; i < options_.kv_pages; ++i) pages_[i] = i;
        return {};
    }

    /// The first sequence's positions first .. first + count - 1; logits of the last.
    Result<void> run_prompt(uint32_t first, uint32_t count) {
        const uint32_t end = first + count;
        for (; first < end; first += options_.max_batch_rows) {
            rows_.clear();
            for (uint32_t i = first; i < std::min(end, first + options_.max_batch_rows); ++i)
                add_row(0, i, i + 1 == end);
            if (auto ran = run(); !ran) return ran;
        }
        return {};
    }
    /// One position of so many sequences.
    Result<void> run_columns(uint32_t position, uint32_t columns) {
        rows_.clear();
        for (uint32_t i = 0; i < columns; ++i) add_row(i, position, true);
        return run();
    }
    /// What so many rows in one batch, the last of them at `position`, have to read and to compute.
    Cost cost(uint32_t rows, uint32_t logit_rows, double positions_read) const {
        const valar::TensorInfo& output = *gguf_->find_tensor(
            spec_->tied_output ? "token_embd.weight" : "output.weight");
        double products = 0, bytes = double(output.bytes), kv_bytes = 0;
        for (size_t layer = 0; layer < spec_->layers.size(); ++layer)
            for (const LayerMatrix& each : layer_matrices) {
                const valar::TensorInfo* matrix = gguf_->find_tensor(
                    "blk." + std::to_string(layer) + "." + each.name + ".weight");
                if (!matrix) continue;
                // the last layer owes the others its keys and values only
                const bool all = layer + 1 < spec_->layers.size() || each.for_others;
                const double many = all ? rows : logit_rows;
                const valar::ExpertSpec& experts = spec_->layers[layer].experts;
                const double share = each.of_experts ? double(experts.used) / experts.count : 1;
                products += values(*matrix) * share * many;
                // as if each row picked its experts by chance
                bytes += double(matrix->bytes) *
                         (each.of_experts ? 1 - std::pow(1 - share, many) : 1);
            }
        for (const valar::LayerSpec& layer : spec_->layers)
            kv_bytes += double(
                valar::kv_bytes_per_token(options_.kv_type, layer.n_kv_heads, layer.head_dim));
        const double planes = options_.precision == valar::Precision::fine ? 2 : 1;
        return {bytes + positions_read * kv_bytes,
                2 * (planes * products + 2 * values(output) * logit_rows)};
    }
    const valar::MemoryPlan& plan() const { return plan_; }
    /// The likeliest token of a batch whose last row alone wanted logits.
    Result<valar::Token> next_token() const {
        const auto logits = backend_->logits(0);
        if (!logits) return logits.error();
        return valar::Token(std::max_element(logits->begin(), logits->end()) - logits->begin());
    }

private:
    static double values(const valar::TensorInfo& matrix) {
        return double(matrix.dims[0]) * double(matrix.dims[1]) * double(matrix.dims[2]);
    }
    void add_row(uint32_t sequence, uint32_t position, bool logits) {
        valar::BatchRow row;
        row.token = valar::Token((uint64_t{position} * 37 + sequence * 101 + 11) % spec_->n_vocab);
        row.position = position;
        row.pages = pages_.data() + (sequence ? first_pages_ + (sequence - 1) * other_pages_ : 0);
        row.logits = logits;
        rows_.push_back(row);
    }
    Result<void> run() {
        if (auto begun = backend_->begin(rows_); !begun) return begun;
        for (;;) {
            auto done = backend_->advance(0);
            if (!done) return done.error();
            if (*done) return {};
        }
    }

    std::unique_ptr<valar::Gguf> gguf_;  // these two stay put
    std::unique_ptr<valar::ModelSpec> spec_;
    valar::BackendOptions options_;
    valar::MemoryPlan plan_;
    std::unique_ptr<valar::Backend> backend_;
    uint32_t first_pages_ = 0, other_pages_ = 0;
    std::vector<uint32_t> pages_;
    std::vector<valar::BatchRow> rows_;
};

// ---- Measurements ----------------------------------------------------------------------------

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/// One line of the results: a test, its seconds and its share of the limit in each round.
struct Measurement {
    const char* test;
    uint32_t tokens, depth, columns;
    Cost cost;  // of one run
    std::vector<double> seconds = {}, shares = {};
    const char* limited_by = nullptr;

    double count() const { return double(tokens) * columns; }
    double speed(double of_seconds) const { return count() / of_seconds; }
    void compare(const Limits& limits) {
        const double reading = cost.bytes / limits.bandwidth.best;
        const double computing = cost.operations / limits.integers.best;
        limited_by = reading > computing ? "bandwidth" : "integer peak";
        shares.push_back(std::max(reading, computing) / seconds.back());
    }
};

class Bench {
public:
    Bench(const Settings& settings, Clock::time_point start) : settings_(settings), start_(start) {}

    /// Loads and computes the first short prompt, as a program that was just started would.
    Result<void> start() {
        auto kernels = valar::kernels_in_use();
        if (!kernels) return kernels.error();
        kernels_ = *kernels;
        if (auto opened = model_.open(settings_); !opened) return opened;
        load_s_ = seconds_since(start_);
        plan("prefill", kStartTokens, 0, 1);
        if (auto ran = measure(measurements_[0]); !ran) return ran;
        auto token = model_.next_token();
        if (!token) return token.error();
        first_token_ = *token;
        first_token_s_ = seconds_since(start_);

        uint32_t deepest = 0;
        if (settings_.prompt) plan("prefill", settings_.prompt, 0, 1);
        for (uint32_t depth : settings_.depths.values) {
            if (settings_.decode) plan("decode", settings_.decode, depth, 1);
            deepest = std::max(deepest, depth);
        }
        for (uint32_t columns = 2; settings_.decode && columns < 2 * settings_.columns;
             columns *= 2)
            plan("decode", settings_.decode, 0, std::min(columns, settings_.columns));
        return model_.run_prompt(0, settings_.decode ? deepest : 0);
    }
    /// Every test once, then the limits.
    Result<void> round() {
        // Bandwidth changes within seconds where a host is shared: the better of before and after.
        Limits all, one;
        if (machine_.is_open()) machine_.measure(all, one);
        for (size_t i = 1; i < measurements_.size(); ++i)
            if (auto ran = measure(measurements_[i]); !ran) return ran;
        if (!peak_memory_) peak_memory_ = peak_memory_bytes();  // before the buffer of the limits
        if (!settings_.stream_mib) return {};
        if (!machine_.is_open()) {
            const uint64_t bytes = uint64_t{settings_.stream_mib} << 20;
            if (auto opened = machine_.open(settings_.threads, bytes); !opened) return opened;
        }
        machine_.measure(all, one);
        limits_.push_back(all);
        limits_1_.push_back(one);
        for (Measurement& each : measurements_)
            if (each.shares.size() < each.seconds.size()) each.compare(all);
        return {};
    }
    /// Forgets the rounds so far, not the start.
    void clear() {
        for (size_t i = 1; i < measurements_.size(); ++i) {
            measurements_[i].seconds.clear();
            measurements_[i].shares.clear();
        }
        limits_.clear();
        limits_1_.clear();
    }

    Json report() const {
        Json results = Json::array(), limits = Json::object();
        for (const Measurement& each : measurements_) results.push(row(each));
        if (!limits_.empty())
            limits.set("bandwidth_gb_s", middle(limits_, &Limits::bandwidth))
                .set("integer_gop_s", middle(limits_, &Limits::integers))
                .set("bandwidth_gb_s_1_thread", middle(limits_1_, &Limits::bandwidth))
                .set("integer_gop_s_1_thread", middle(limits_1_, &Limits::integers))
                .set("reader", limits_.back().bandwidth.by)
                .set("instruction", limits_.back().integers.by);
        return Json::object()
            .set("machine", Json::object()
                                .set("cpu", cpu_name())
                                .set("cores", valar::physical_cores())
                                .set("kernels", kernels_)
                                .set("compiler", compiler())
                                .set("valar", VALAR_VERSION))
            .set("limits", std::move(limits))
            .set("results", std::move(results));
    }

private:
    void plan(const char* test, uint32_t tokens, uint32_t depth, uint32_t columns) {
        const bool prefill = *test == 'p';
        Cost cost;
        if (prefill) cost = model_.cost(tokens, 1, tokens);
        else cost = model_.cost(columns, columns, columns * (depth + (tokens + 1) * 0.5));
        const double runs = prefill ? 1 : tokens;
        measurements_.push_back(
            {test, tokens, depth, columns, {cost.bytes * runs, cost.operations * runs}});
    }
    Result<void> measure(Measurement& each) {
        const Clock::time_point start = Clock::now();
        if (*each.test == 'p') {
            if (auto ran = model_.run_prompt(0, each.tokens); !ran) return ran;
        } else {
            for (uint32_t i = 0; i < each.tokens; ++i)
                if (auto ran = model_.run_columns(each.depth + i, each.columns); !ran) return ran;
        }
        each.seconds.push_back(seconds_since(start));
        return {};
    }
    static double rounded(double value) {
        const double unit = value >= 100 ? 10 : 1000;
        return std::floor(value * unit + 0.5) / unit;
    }
    static double middle(const std::vector<Limits>& all, Limit Limits::*which) {
        std::vector<double> values;
        for (const Limits& limits : all) values.push_back((limits.*which).best * 1e-9);
        return rounded(median(values));
    }
    static std::string compiler() {
#if defined(__clang__)
        return "clang " __clang_version__;
#elif defined(__GNUC__)
        return "gcc " __VERSION__;
#else
        return "msvc " + std::to_string(_MSC_VER);
#endif
    }
    Json row(const Measurement& each) const {
        const auto [least, most] = std::minmax_element(each.seconds.begin(), each.seconds.end());
        const auto text = [](auto value, auto yes, const char* a, const char* b) {
            return Json(value == yes ? a : b);
        };
        return Json::object()
            .set("test", each.test)
            .set("tokens", each.tokens)
            .set("depth", each.depth)
            .set("columns", each.columns)
            .set("tokens_per_second", rounded(each.speed(median(each.seconds))))
            .set("min", rounded(each.speed(*most)))
            .set("max", rounded(each.speed(*least)))
            .set("share", each.shares.empty() ? Json() : Json(rounded(median(each.shares))))
            .set("limited_by", each.limited_by ? Json(each.limited_by) : Json())
            .set("bytes_per_token", std::floor(each.cost.bytes / each.count()))
            .set("operations_per_token", std::floor(each.cost.operations / each.count()))
            .set("rounds", each.seconds.size())
            .set("model", settings_.model.substr(settings_.model.find_last_of("/\\") + 1))
            .set("threads", settings_.threads)
            .set("precision", text(settings_.precision, valar::Precision::fine, "fine", "fast"))
            .set("kv", example::kv_type_names[static_cast<size_t>(settings_.kv_type)])
            .set("load_ms", rounded(load_s_ * 1e3))
            .set("first_token_ms", rounded(first_token_s_ * 1e3))
            .set("peak_memory_mib", rounded(double(peak_memory_) / (1 << 20)))
            .set("planned_memory_mib", rounded(double(model_.plan().total()) / (1 << 20)));
    }

    const Settings& settings_;
    Clock::time_point start_;
    Model model_;
    Machine machine_;
    const char* kernels_ = "";
    double load_s_ = 0, first_token_s_ = 0;
    valar::Token first_token_ = 0;
    uint64_t peak_memory_ = 0;
    std::vector<Measurement> measurements_;  // the first one is the start's own prompt
    std::vector<Limits> limits_, limits_1_;
};

// ---- What is printed -------------------------------------------------------------------------

void print_csv(const Json& report) {
    const auto results = report["results"].items();
    for (size_t i = 0; i <= results.size(); ++i) {
        std::string line;
        for (const valar::JsonMember& member : results[i ? i - 1 : 0].members()) {
            line += line.empty() ? "" : ",";
            line += i ? member.value.write() : member.key;
        }
        example::print(line + "\n");
    }
}

void print_table(const Json& report) {
    const Json &machine = report["machine"], &limits = report["limits"];
    const Json& first = report["results"][0];
    const auto word = [](const Json& value) { return std::string(value.as_string()); };
    std::printf("%s on %lld threads of %lld, kernels %s, precision %s, kv %s\n",
                word(first["model"]).c_str(), (long long)first["threads"].as_int(),
                (long long)machine["cores"].as_int(), word(machine["kernels"]).c_str(),
                word(first["precision"]).c_str(), word(first["kv"]).c_str());
    std::printf(
        "loaded after %.0f ms, first token (prompt of %u) after %.0f ms; peak memory %.0f "
        "MiB, planned %.0f\n",
        first["load_ms"].as_double(), kStartTokens, first["first_token_ms"].as_double(),
        first["peak_memory_mib"].as_double(), first["planned_memory_mib"].as_double());
    if (!limits.empty())
        std::printf("limits: %.1f GB/s (%s), %.0f GOP/s (%s); 1 thread: %.1f GB/s, %.0f GOP/s\n",
                    limits["bandwidth_gb_s"].as_double(), word(limits["reader"]).c_str(),
                    limits["integer_gop_s"].as_double(), word(limits["instruction"]).c_str(),
                    limits["bandwidth_gb_s_1_thread"].as_double(),
                    limits["integer_gop_s_1_thread"].as_double());
    std::printf("\ntest     tokens   depth columns      tok/s       min       max   share  of\n");
    for (const Json& each : report["results"].items())
        std::printf("%-8s %6lld %7lld %7lld %10.1f %9.1f %9.1f %5.0f %%  %s\n",
                    word(each["test"]).c_str(), (long long)each["tokens"].as_int(),
                    (long long)each["depth"].as_int(), (long long)each["columns"].as_int(),
                    each["tokens_per_second"].as_double(), each["min"].as_double(),
                    each["max"].as_double(), each["share"].as_double() * 100,
                    word(each["limited_by"]).c_str());
}

int take_turns(Bench& bench) {
    for (int c; (c = std::getchar()) != EOF;) {
        if (c != '\n') continue;
        bench.clear();
        if (auto ran = bench.round(); !ran) return example::fail(ran.error().message);
        example::print(bench.report().write() + "\n");
    }
    return 0;
}

constexpr uint32_t most_tokens = 1'000'000;

const char* wrong_setting(const Settings& settings) {
    for (uint32_t depth : settings.depths.values)
        if (depth > most_tokens) return "--depth: at most 1000000";
    return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    const Clock::time_point start = Clock::now();
    Settings settings;
    example::Flags flags("bench",
                         "Measures a model: prefill, decode, start, memory; and what the machine "
                         "could do.\nWith --prompt 0 --decode 0 only the start.");
    flags.add("model", "FILE", &settings.model,
              "a GGUF file (default: what fetch_model.py brought)");
    flags.add("threads", "N", &settings.threads, "in all (default: physical cores)")
        .within(1, example::most_threads)
        .shows([] { return std::to_string(valar::physical_cores()); });
    flags.add("prompt", "P", &settings.prompt, "prefill so many tokens (default: 512)")
        .within(0, most_tokens);
    flags.add("decode", "N", &settings.decode, "decode so many, one by one (default: 64)")
        .within(0, most_tokens);
    flags.add("depth", "D[,D...]", &settings.depths,
              "after so many tokens, each in turn (default: 0)");
    flags
        .add("columns", "N", &settings.columns,
             "decode 2, 4, 8 ... N sequences at once, too (default: 16)")
        .within(1, 512);
    flags.add("precision", "fast|fine", &settings.precision, "default: fast");
    flags.add("kv", "f16|f32|q8_0", &settings.kv_type,
              "how keys and values are kept (default: f16)");
    flags.add("repeat", "R", &settings.repeat, "rounds; medians are shown (default: 5)")
        .within(1, UINT32_MAX);
    flags.add("stream-mib", "M", &settings.stream_mib,
              "measure bandwidth over so much memory; 0: no limits (default: 1024)");
    flags.add("json", &settings.json, "print {machine, limits, results: [...]}");
    flags.add("csv", &settings.csv, "print a line a result");
    flags.add("turns", &settings.turns,
              "a round for each line on stdin, answered in JSON: to take turns with others");
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (const char* wrong = wrong_setting(settings)) return example::fail(wrong);
    if (settings.model.empty()) settings.model = example::cached_model();

    Bench bench(settings, start);
    auto ran = bench.start();
    if (settings.turns) return ran ? take_turns(bench) : example::fail(ran.error().message);
    for (uint32_t i = 0; ran && i < settings.repeat; ++i) ran = bench.round();
    if (!ran) return example::fail(ran.error().message);
    const Json report = bench.report();
    if (settings.json) example::print(report.write() + "\n");
    else if (settings.csv) print_csv(report);
    else print_table(report);
    return 0;
}

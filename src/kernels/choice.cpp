#include "prologue.hpp"

#include "base/system.hpp"
#include "kernels/products.hpp"
#include "kernels/targets.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Floating-point state --------------------------------------------------------------------

// Denormals are kept, nearest even, all exceptions masked: the reset state of each control
// register.
#if defined(__x86_64__) || defined(_M_X64) || defined(__SSE__)
FloatState::FloatState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatState::~FloatState() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatState::FloatState() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
}
FloatState::~FloatState() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#elif defined(__arm__) && defined(__ARM_FP)
FloatState::FloatState() {
    uint32_t mode;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(mode));
    __asm__ volatile("vmsr fpscr, %0" : : "r"(0) : "memory");
    saved_ = mode;
}
FloatState::~FloatState() {
    __asm__ volatile("vmsr fpscr, %0" : : "r"(static_cast<uint32_t>(saved_)) : "memory");
}
#elif defined(_M_ARM64)
FloatState::FloatState() : saved_(static_cast<uint64_t>(_ReadStatusReg(ARM64_FPCR))) {
    _WriteStatusReg(ARM64_FPCR, 0);
}
FloatState::~FloatState() { _WriteStatusReg(ARM64_FPCR, static_cast<int64_t>(saved_)); }
#elif defined(__riscv_flen)
FloatState::FloatState() {
    unsigned long mode;
    __asm__ volatile("fsrm %0, zero" : "=r"(mode) : : "memory");
    saved_ = mode;
}
FloatState::~FloatState() {
    __asm__ volatile("fsrm %0" : : "r"(static_cast<unsigned long>(saved_)) : "memory");
}
#else
FloatState::FloatState() : saved_(0) {}
FloatState::~FloatState() = default;
#endif

namespace {

#if VALAR_X86_KERNELS
struct X86Features {
    bool avx2 = false;     // with FMA and F16C
    bool avxvnni = false;  // besides
    bool avx512 = false;   // F, BW, DQ, VL and VNNI, besides AVX2
};

inline void cpuid(uint32_t leaf, uint32_t out[4], uint32_t subleaf = 0) {
#if !defined(__GNUC__)
    __cpuidex(reinterpret_cast<int*>(out), static_cast<int>(leaf), static_cast<int>(subleaf));
#else
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
#endif
}

inline uint32_t enabled_registers() {  // XCR0: what the system saves
#if defined(_MSC_VER) && !defined(__clang__)
    return static_cast<uint32_t>(_xgetbv(0));
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

inline X86Features x86_features() {
    X86Features found;
    uint32_t top[4], one[4], seven[4];
    cpuid(0, top);
    cpuid(1, one);
    constexpr uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;  // FMA OSXSAVE AVX F16C
    if (top[0] < 7 || (one[2] & needed) != needed) return found;
    const uint32_t registers = enabled_registers();
    cpuid(7, seven);
    found.avx2 = (registers & 0x6) == 0x6 && (seven[1] & 1u << 5);
    constexpr uint32_t wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    found.avx512 = found.avx2 && (registers & 0xe6) == 0xe6 && (seven[1] & wide) == wide &&
                   (seven[2] & 1u << 11);
    if (seven[0] >= 1) {
        cpuid(7, seven, 1);
        found.avxvnni = found.avx2 && (seven[0] & 1u << 4);
    }
    return found;
}
#endif  // VALAR_X86_KERNELS

#if VALAR_NEON_KERNELS
struct ArmFeatures {
    bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)
inline bool apple_feature(const char* name) {
    int present = 0;
    size_t size = sizeof present;
    return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present;
}
#endif

inline ArmFeatures arm_features() {
#if defined(__linux__)
    return {(getauxval(AT_HWCAP) & 1u << 20) != 0, (getauxval(AT_HWCAP2) & 1u << 13) != 0};
#elif defined(__APPLE__)
    return {apple_feature("hw.optional.arm.FEAT_DotProd"),
            apple_feature("hw.optional.arm.FEAT_I8MM")};
#elif defined(_WIN32)  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, PF_ARM_V82_I8MM_...
    return {IsProcessorFeaturePresent(43) != 0, IsProcessorFeaturePresent(66) != 0};
#else
    ArmFeatures built;
#if defined(__ARM_FEATURE_DOTPROD)
    built.dotprod = true;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    built.i8mm = true;
#endif
    return built;
#endif
}
#endif  // VALAR_NEON_KERNELS

}  // namespace

// ---- The choice of a table -------------------------------------------------------------------

namespace {

struct KernelList {
    const Kernels* tables[5] = {&scalar::kernels};
    const char* names[5];
    size_t count = 1;
    KernelList() {
#if VALAR_X86_KERNELS
        const X86Features cpu = x86_features();
        if (cpu.avx2) tables[count++] = &avx2::kernels;
        if (cpu.avxvnni) tables[count++] = &avx2::vnni_kernels;
#if defined(VALAR_EVEX_VNNI)
        else if (cpu.avx512) tables[count++] = &avx2::evex_kernels;
#endif
        if (cpu.avx512) tables[count++] = &avx512::kernels;
#elif VALAR_NEON_KERNELS
        const ArmFeatures cpu = arm_features();
        tables[count++] = &neon::kernels;
        if (cpu.dotprod) tables[count++] = &dotprod::kernels;
        if (cpu.dotprod && cpu.i8mm) tables[count++] = &i8mm::kernels;
#elif VALAR_WASM_KERNELS
        tables[count++] = &wasm::kernels;
#endif
        for (size_t i = 0; i < count; i++) names[i] = tables[i]->name;
    }
};

const KernelList& kernel_list() {
    static const KernelList list;
    return list;
}

uint64_t fingerprint_bytes(const void* data, size_t size, uint64_t hash) {  // FNV-1a
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
    return hash;
}

// Some results of every kind of arithmetic. A compiler that was told to reassociate or approximate
// (clang does not say so in a macro) gives another number.
uint64_t kernel_fingerprint(const Kernels& k) {
    constexpr uint32_t n = 64, rows = 16;
    FloatState state;
    uint32_t seed = 1;
    auto next = [&] { return seed = seed * 1664525u + 1013904223u; };
    auto fill = [&](float* x, size_t count) {
        for (size_t i = 0; i < count; i++)
            x[i] = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-30f;
    };
    alignas(64) float x[n], y[3 * n], state_out[n + 2], kv[2][16 * 16];
    alignas(64) std::byte source[rows * n / 32 * 20], packed[2 * 320];
    ActivationBlock planes[2 * n / 32];
    uint64_t hash = 0xcbf29ce484222325u;
    fill(x, n);
    for (std::byte& b : source) b = std::byte(next() >> 24);
    for (uint32_t i = 0; i < rows * n / 32; i++)
        source[20 * i + 1] = source[20 * i + 3] = std::byte{0x21};
    pack_tiles(TensorType::q4_1, rows, n, source, 0, 1, packed);
    const PackedMatrix matrix{TensorType::q4_1, rows, n, packed};
    k.quantize({x, n, 1, 2, n, 2, planes});
    k.matmul({&matrix, 0, 1, 1, 2, planes, nullptr, 0, y, rows});
    hash = fingerprint_bytes(y, rows * sizeof(float), hash);
    fill(y, 3 * n);
    k.rms_norm(x, y, 1e-5f, n, y + n);
    k.silu_mul(y + n, x, n);
    k.rope(y + n, 1, n, n, true, y + 2 * n);
    hash = fingerprint_bytes(y + n, n * sizeof(float), hash);
    for (uint32_t slot = 0; slot < 16; slot++) {
        fill(y, n);
        k.store_kv(KvType::f32, y, y + 16, 16, slot, kv[0], kv[1]);
    }
    const void *keys[16] = {kv[0]}, *values[16] = {kv[1]};
    const uint16_t begin = 1, end = 15;
    k.attention({KvType::f32, 16, 1, x, n, &begin, &end, keys, values, y, y + 1, y + 2, n});
    std::memcpy(state_out, x, sizeof x);
    state_out[n] = 0.5f;
    state_out[n + 1] = 2.0f;
    k.attention_merge(state_out + n, state_out + n + 1, state_out, y[0], y[1], y + 2, 16);
    hash = fingerprint_bytes(state_out, sizeof state_out, hash);
    double d[4] = {exact_log2(3.7), exact_exp2(-3.3)};
    exact_sincos(12345.678, d + 2, d + 3);
    return fingerprint_bytes(d, sizeof d, hash);
}

constexpr uint64_t kKernelFingerprint = 0x3f6e8bd4e70d35fb;

}  // namespace

std::span<const Kernels* const> available_kernels() {
    return {kernel_list().tables, kernel_list().count};
}

Result<const Kernels*> choose_kernels() {
    const auto tables = available_kernels();
    const std::string wanted = environment("VALAR_ISA");
    const Kernels* chosen = wanted.empty() ? tables.back() : nullptr;
    std::string names;
    for (const Kernels* table : tables) {
        if (wanted == table->name) chosen = table;
        names += names.empty() ? table->name : std::string(", ") + table->name;
    }
    if (!chosen)
        return make_error(ErrorKind::unsupported,
                          "VALAR_ISA=" + wanted + ": this build on this CPU has " + names);
    const uint64_t found = kernel_fingerprint(*chosen);
    if (found != kKernelFingerprint)
        return make_error(ErrorKind::internal,
                          format("kernels \"%s\" do not compute the bits of the definition "
                                 "(%016llx): was this compiled with unsafe floating-point options?",
                                 chosen->name, static_cast<unsigned long long>(found)));
    return chosen;
}

Result<int64_t> forced_prefetch() {
    constexpr int64_t most = 1 << 20;
    const std::string wanted = environment("VALAR_PREFETCH");
    int64_t bytes = 0;
    for (const char c : wanted) {
        bytes = c >= '0' && c <= '9' ? bytes * 10 + (c - '0') : most + 1;
        if (bytes > most)
            return make_error(
                ErrorKind::unsupported,
                "VALAR_PREFETCH=" + wanted + ": is not a number of bytes, 0 to 1048576");
    }
    return wanted.empty() ? int64_t{-1} : bytes;
}

namespace {
// Why there is no table but the scalar one.
#if defined(VALAR_NO_SIMD)
constexpr const char* kWhyScalar = "compiled with VALAR_NO_SIMD";
#elif VALAR_MISALIGNED_SPILLS && defined(__x86_64__)
constexpr const char* kWhyScalar =
    "compiled by GCC for Windows without VALAR_UNALIGNED_MOVES and "
    "-Wa,-muse-unaligned-vector-move";
#elif VALAR_X86_KERNELS
constexpr const char* kWhyScalar = "this CPU or its system lacks AVX2, FMA or F16C";
#elif defined(__wasm__)
constexpr const char* kWhyScalar = "compiled without -msimd128";
#elif defined(__arm__) && !defined(__ARM_FEATURE_FMA)
constexpr const char* kWhyScalar =
    "there are none for 32-bit ARM; where the CPU has VFPv4, "
    "-mfpu=neon-vfpv4 is faster";
#elif defined(__i386__) || defined(_M_IX86)
constexpr const char* kWhyScalar = "there are none for 32-bit x86, but for 64-bit";
#else
constexpr const char* kWhyScalar = "there are none for this architecture";
#endif
}  // namespace

std::string why_slow(const Kernels& table) {
    const Kernels* best = available_kernels().back();
    if (&table != best)
        return format("kernels \"%s\" compute, this machine has \"%s\": VALAR_ISA is set",
                      table.name, best->name);
    if (&table != &scalar::kernels) return {};
    return std::string("scalar kernels compute, many times slower than vector instructions: ") +
           kWhyScalar;
}

}  // namespace detail

std::span<const char* const> kernel_names() {
    return {detail::kernel_list().names, detail::kernel_list().count};
}

Result<const char*> kernels_in_use() {
    const auto chosen = detail::choose_kernels();
    if (!chosen) return chosen.error();
    return (*chosen)->name;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

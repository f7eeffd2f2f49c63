// >>kernels
// Owns: the numeric definition, the kernels of every instruction set, the worker team.
// Assumes: little-endian IEEE 754 binary32 and binary64, round to nearest even, denormals kept.
// Promises: every kernel of every table gives the bits of its scalar twin.
#pragma once

#include "base/base.hpp"
#include "gguf.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace valar {
inline namespace v1 {

/// How exactly activations meet quantized weights: one int8 plane (fast) or two (fine).
enum class Precision : uint8_t { fast, fine };
/// How keys and values are stored; q8_0, about half of f16, wants heads of a multiple of 32 values.
enum class KvType : uint8_t { f16, f32, q8_0 };

/// The host's job system: `run` calls job(argument, i) for every i in 0 .. count-1, on any threads,
/// in any order, and returns when all have returned. No job waits for another.
struct ParallelFor {
    void (*run)(void* context, uint32_t count, void (*job)(void* argument, uint32_t index),
                void* argument) = nullptr;
    void* context = nullptr;
};

/// The kernel tables that this build has for this CPU, by name, slowest first; and the one that
/// computes: the last, or what the environment's VALAR_ISA says (Error: no such table).
VALAR_API std::span<const char* const> kernel_names();
VALAR_API Result<const char*> kernels_in_use();

// ---- For programs that write model files: examples/quantize.cpp. Any thread may call these. A
// Result is an Error (invalid_request) where type and sizes do not fit together.

/// Whether kernels compute with matrices of this type; only these can be packed and dequantized.
VALAR_API bool can_compute(TensorType type);
/// Bytes of a packed matrix, or of some of its rows from a multiple of packed_rows on: whole tiles.
/// 0 where the type is none that can_compute.
VALAR_API uint64_t packed_bytes(TensorType type, uint64_t rows, uint32_t cols);
/// Packs rows of `cols` values, of which `source` has some as a file has them, from a row on whose
/// number is a multiple of packed_rows. `out` takes packed_bytes of so many rows.
VALAR_API Result<void> pack_rows(TensorType type, uint32_t cols, std::span<const std::byte> source,
                                 std::span<std::byte> out);
/// The values of whole blocks as a file has them, one row or many (numeric definition, 11).
VALAR_API Result<void> dequantize(TensorType type, std::span<const std::byte> blocks,
                                  std::span<float> values);
VALAR_API float half_to_float(uint16_t bits);   // binary16
VALAR_API uint16_t float_to_half(float value);  // to nearest even; too large is infinity
/// Memory of the keys and values of one token in one layer.
VALAR_API uint64_t kv_bytes_per_token(KvType type, uint32_t n_kv_heads, uint32_t head_dim);

/// What a feed-forward network bends its values with: x / (1 + e^-x); x times the normal distribution
/// (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415), or its approximation by tanh; the
/// square of what is positive; gpt-oss's gate; xIELU (Huang and Schlag 2024,
/// https://arxiv.org/abs/2411.13010), which has parameters.
enum class Activation : uint8_t { silu, gelu, gelu_tanh, relu_squared, silu_clamped, xielu };
struct ActivationSpec {
    float negative = 0, positive = 0, linear = 0, most = 0;
};

/// What the numeric definition is made of beside + - * / and square roots: the same bits with every
/// compiler and on every machine. examples/one_token.cpp is a forward pass of these.
VALAR_API float exact_fma(float a, float b, float c);  ///< a * b + c, rounded once
VALAR_API float exact_exp(float x);                    ///< e^x (definition, 7)
VALAR_API double exact_exp2(double x);                 ///< 2^x (definition, 12)
VALAR_API double exact_log2(double x);
VALAR_API void exact_sincos(double x, double* sine, double* cosine);  ///< |x| < 2^30

}  // namespace v1
}  // namespace valar

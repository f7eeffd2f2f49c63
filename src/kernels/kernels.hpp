// >>kernels
// Owns: the numeric definition below, the scalar reference of every kernel, one region per
//       instruction set, the table of kernels chosen once, the worker team.
// Assumes: little-endian IEEE 754 binary32 and binary64, round to nearest even, denormals kept.
// Promises: every kernel of every table gives the bits of its scalar twin.
//
#pragma once

#include "base/base.hpp"

#include <cstdint>

namespace valar {
inline namespace v1 {

/// How exactly activations meet quantized weights: one int8 plane (fast) or two (fine).
enum class Precision : uint8_t { fast, fine };
/// How keys and values are stored: q8_0 takes about half of f16's memory and wants heads of a
/// multiple of 32 values.
enum class KvType : uint8_t { f16, f32, q8_0 };

/// The host's job system: calls job(context, i) for every i in 0 .. count-1, on any threads, in any
/// order, and returns when all have returned. No job waits for another.
using ParallelFor = void (*)(void* host, uint32_t count, void (*job)(void* context, uint32_t index),
                             void* context);

/// What the numeric definition is made of beside + - * / and square roots: the same bits with every
/// compiler and on every machine. examples/one_token.cpp is a forward pass of these.
VALAR_API float exact_fma(float a, float b, float c);  ///< a * b + c, rounded once
VALAR_API float exact_exp(float x);                    ///< e^x (definition, 7)
VALAR_API double exact_exp2(double x);                 ///< 2^x (definition, 12)
VALAR_API double exact_log2(double x);
VALAR_API void exact_sincos(double x, double* sine, double* cosine);  ///< |x| < 2^30

}  // namespace v1
}  // namespace valar

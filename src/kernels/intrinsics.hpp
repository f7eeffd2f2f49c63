// The intrinsics of the instruction sets, and what tells which of them the CPU has.
#pragma once

#if defined(_MSC_VER)
#include <intrin.h>
#endif
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD)
#include <immintrin.h>
#elif defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif
#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(VALAR_NO_SIMD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#elif defined(__wasm_simd128__) && !defined(VALAR_NO_SIMD)
#include <wasm_simd128.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

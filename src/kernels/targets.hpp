#pragma once

#include "kernels/intrinsics.hpp"

// ---- Instruction sets ------------------------------------------------------------------------
//
// A region compiles its functions for more than the build's baseline; nothing in it runs unless the
// CPU has it. Inside: no includes, no std templates (they might be emitted for the region and
// shared with everyone), pointers and sizes in. Register-tile loops carry an unroll pragma: gcc -O2
// would leave the array in memory.

#define VALAR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define VALAR_TARGET_BEGIN(features) \
    VALAR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define VALAR_TARGET_END VALAR_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define VALAR_TARGET_BEGIN(features) \
    VALAR_PRAGMA(GCC push_options) VALAR_PRAGMA(GCC target(features))
#define VALAR_TARGET_END VALAR_PRAGMA(GCC pop_options)
#else
#define VALAR_TARGET_BEGIN(features)
#define VALAR_TARGET_END
#endif
#if defined(__GNUC__)
#define VALAR_UNROLL VALAR_PRAGMA(GCC unroll 16)
#define VALAR_FORCE_INLINE inline __attribute__((always_inline))
// Keeps gcc from turning a chain of integer sums into a tree, which spills every product.
#define VALAR_IN_ORDER(vector) __asm__("" : "+x"(vector))
#else
#define VALAR_UNROLL
#define VALAR_FORCE_INLINE __forceinline
#define VALAR_IN_ORDER(vector) ((void)0)
#endif

// GCC for Windows does not align spilled 32-byte registers (its bug 54412): no AVX there.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD) && \
    !(defined(__MINGW32__) && !defined(__clang__))
#define VALAR_X86_KERNELS 1
#else
#define VALAR_X86_KERNELS 0
#endif

#if (defined(__aarch64__) || defined(_M_ARM64)) && !defined(VALAR_NO_SIMD)
#define VALAR_NEON_KERNELS 1
#else
#define VALAR_NEON_KERNELS 0
#endif
#if defined(__wasm_simd128__) && !defined(VALAR_NO_SIMD)
#define VALAR_WASM_KERNELS 1
#else
#define VALAR_WASM_KERNELS 0
#endif

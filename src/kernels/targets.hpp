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

// GCC for Windows does not align what it spills of registers wider than 16 bytes (its bug 54412), and
// moves it as if it did. The assembler can write every aligned move as an unaligned one, which is no
// slower; VALAR_UNALIGNED_MOVES says that it was told to.
#if defined(__GNUC__) && !defined(__clang__) && (defined(_WIN32) || defined(__CYGWIN__)) && \
    !defined(VALAR_UNALIGNED_MOVES)
#define VALAR_MISALIGNED_SPILLS 1
#else
#define VALAR_MISALIGNED_SPILLS 0
#endif
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(VALAR_NO_SIMD)
#define VALAR_X86_KERNELS (!VALAR_MISALIGNED_SPILLS)
#if VALAR_MISALIGNED_SPILLS
#pragma message(                                \
    "valar: slow scalar kernels; compile with " \
    "-Wa,-muse-unaligned-vector-move -DVALAR_UNALIGNED_MOVES")
#endif
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

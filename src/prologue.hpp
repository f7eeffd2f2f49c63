// What stands before every implementation part: the promise of exact arithmetic, kept by force.
#pragma once

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "valar promises exact results: compile this file without -ffast-math and its parts"
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // false alarms of GCC 12 inside its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wrestrict"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

// In valar.hpp all system headers stand here: one that was included inside a target region would
// leak that region's instructions into shared functions.
// (system headers)

// No compiler may fuse a product and a sum that the numeric definition keeps apart.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

// What nothing waits for token by token (COLD in assemble.py): GCC takes a fifth less time for all of
// valar.hpp when it optimises these sections less, and makes less code of them.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define VALAR_COLD_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"O1\")")
#define VALAR_COLD_END _Pragma("GCC pop_options")
#else
#define VALAR_COLD_BEGIN
#define VALAR_COLD_END
#endif

// Before functions whose locals would make those that recurse take more stack.
#if defined(_MSC_VER) && !defined(__clang__)
#define VALAR_NOINLINE __declspec(noinline)
#else
#define VALAR_NOINLINE __attribute__((noinline))
#endif

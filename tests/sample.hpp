// Fewer rounds of what is nearly the same each time, for tests.
#ifndef VALAR_TESTS_SAMPLE_HPP
#define VALAR_TESTS_SAMPLE_HPP

#include "base/internal.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>

/// With VALAR_TEST_SAMPLE=N in the environment true for one of N rounds, the first one too: for
/// machines that are emulated, and programs that are watched.
inline bool in_sample() {
    static const uint32_t one_of = [] {
        const int number = std::atoi(valar::detail::environment("VALAR_TEST_SAMPLE").c_str());
        return static_cast<uint32_t>(std::max(1, number));
    }();
    static uint32_t round = 0;
    return round++ % one_of == 0;
}

#endif

// The header without its simd part, as VALAR_NO_SIMD leaves it.
#define VALAR_NO_SIMD
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

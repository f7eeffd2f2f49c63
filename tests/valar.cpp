// The one translation unit of the tests that holds the implementation.
#define VALAR_IMPLEMENTATION
#define VALAR_EVEX_VNNI  // tests the table "avxvnni" where the CPU has AVX-512 only
#include "valar.hpp"

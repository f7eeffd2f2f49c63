// The one translation unit of the tests that holds the implementation.
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

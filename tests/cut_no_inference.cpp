// The header without its inference part, as VALAR_NO_INFERENCE leaves it.
#define VALAR_NO_INFERENCE
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

// The header without its store part, as VALAR_NO_STORE leaves it.
#define VALAR_NO_STORE
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

// The header without its server part, as VALAR_NO_SERVER leaves it.
#define VALAR_NO_SERVER
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

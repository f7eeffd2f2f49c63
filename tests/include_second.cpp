// See include.cpp. windows.h and standard headers come before valar.hpp here.
#if defined(_WIN32)
#include <windows.h>
#endif
#include <algorithm>
#include <string>
#include <thread>
#define HOST_FUNCTIONS
// clang-format off
#include "host_macros.hpp"
#include "valar.hpp"
#include "host_macros_kept.hpp"
// clang-format on

const char* version_seen_by_the_second_file();
const char* version_seen_by_the_second_file() { return VALAR_VERSION; }

// See include.cpp. windows.h comes after the header here.
#include "valar.hpp"
#if defined(_WIN32)
#include <windows.h>
#endif

const char* version_seen_by_the_second_file();
const char* version_seen_by_the_second_file() { return VALAR_VERSION; }

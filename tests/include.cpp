// The header in awkward company: after windows.h, with min and max as macros, twice, and beside
// another file that includes it (include_second.cpp).
#if defined(_WIN32)
#include <windows.h>
#endif
#include <algorithm>
#include <cstdio>

#ifndef min
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#endif

#include "valar.hpp"

#if !defined(min) || !defined(max)
#error "the header lost the host's macros"
#endif

const char* version_seen_by_the_second_file();

int main() {
    const int one = min(1, 2);
    if (std::strcmp(VALAR_VERSION, version_seen_by_the_second_file()) != 0) return 1;
    auto json = valar::Json::parse("{\"a\":[1,2]}");
    if (!json || (*json)["a"].size() != 2) return 2;
    std::printf("valar %s, %d\n", VALAR_VERSION, one);
    return 0;
}

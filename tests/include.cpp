// The header in awkward company: before any other, with every macro of src/host_macros.txt defined
// (as objects here, as functions where HOST_FUNCTIONS is defined), twice, and beside another file that
// includes it (include_second.cpp). The second header fails where a macro was lost, and ends them all.
// clang-format off
#include "host_macros.hpp"
#include "valar.hpp"
#include "valar.hpp"
#include "host_macros_kept.hpp"
// clang-format on

#include <cstdio>
#if defined(_WIN32)
#include <windows.h>
#if !defined(IN) || !defined(TEXT) || !defined(CONST)
#error "the header took macros of windows.h away"
#endif
#endif

const char* version_seen_by_the_second_file();

int main() {
    if (std::strcmp(VALAR_VERSION, version_seen_by_the_second_file()) != 0) return 1;
    auto json = valar::Json::parse("{\"a\":[1,2]}");
    if (!json || (*json)["a"].size() != 2) return 2;
    std::printf("valar %s\n", VALAR_VERSION);
    return 0;
}

// Answers by itself, then by each plugin, loaded and unloaded twice: it says the same, leaves no thread
// behind, and is gone from the process. Usage: server MODEL PLUGIN...
#include <dirent.h>
#include <dlfcn.h>

#include <cstdio>

#include "plugin.hpp"

namespace {

int threads() {
    DIR* folder = opendir("/proc/self/task");
    if (!folder) return -1;
    int count = 0;
    while (readdir(folder)) ++count;
    closedir(folder);
    return count;
}

bool try_plugin(const char* path, const char* model, int expected) {
    const int before = threads();
    void* plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!plugin) {
        std::fprintf(stderr, "%s\n", dlerror());
        return false;
    }
    const auto call = reinterpret_cast<decltype(&answer)>(dlsym(plugin, "answer"));
    const int bytes = call ? call(model) : -1;
    dlclose(plugin);
    const bool stays = dlopen(path, RTLD_NOW | RTLD_NOLOAD) != nullptr;
    std::printf("%s: %d bytes, %d threads more%s\n", path, bytes, threads() - before,
                stays ? ", still loaded" : "");
    return bytes == expected && threads() == before && !stays;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return 2;
    const int bytes = answer(argv[1]);
    std::printf("by itself: %d bytes\n", bytes);
    bool good = bytes > 0;
    for (int i = 2; i < argc; ++i)
        for (int time = 0; time < 2; ++time) good = try_plugin(argv[i], argv[1], bytes) && good;
    return good ? 0 : 1;
}

// A plain main for the fuzz targets: runs every file, and every file in every folder, that it is
// given through the target once. libFuzzer brings its own main instead.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

int run_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    if (!file) return std::fprintf(stderr, "cannot read %s\n", path.string().c_str()), 1;
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    int failures = 0, files = 0;
    for (int i = 1; i < argc; ++i) {
        if (!std::filesystem::is_directory(argv[i])) {
            failures += run_file(argv[i]), ++files;
            continue;
        }
        for (const auto& entry : std::filesystem::directory_iterator(argv[i]))
            failures += run_file(entry.path()), ++files;
    }
    std::printf("%d inputs, %d unreadable\n", files, failures);
    return failures || files == 0;
}

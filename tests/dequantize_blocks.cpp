// dequantize_blocks [TYPE]: blocks of that type from the standard input as binary32 to the standard
// output, for weights_check.py. Without a type: the names of those that can be dequantized.
#include "gguf.hpp"
#include "kernels/kernels.hpp"

#include <cstdio>
#include <string_view>
#include <vector>

int main(int argc, char** argv) {
    std::vector<std::byte> blocks(1 << 20);
    for (uint32_t number = 0; number < 64; ++number) {
        const auto type = static_cast<valar::TensorType>(number);
        const valar::TypeInfo* info = valar::type_info(type);
        if (!info || !valar::can_compute(type)) continue;
        if (argc < 2) std::printf("%s\n", info->name);
        if (argc < 2 || std::string_view(argv[1]) != info->name) continue;
        blocks.resize(std::fread(blocks.data(), 1, blocks.size(), stdin));
        std::vector<float> values(blocks.size() / info->block_bytes * info->block_size);
        return !valar::dequantize(type, blocks, values) ||
               std::fwrite(values.data(), 4, values.size(), stdout) != values.size();
    }
    return argc > 1;
}

// write_tiny_model PATH [llama|qwen2] [TYPE|mixed] [WINDOW [FULL_EVERY]]: writes the tiny model of
// tiny_model.hpp, every matrix of the type named (F32, Q4_K, ...; default F32), or all types in turn.
#include "tiny_model.hpp"

int main(int argc, char** argv) {
    if (argc < 2 || argc > 6) {
        std::fprintf(stderr, "usage: %s PATH [llama|qwen2] [TYPE|mixed] [WINDOW [FULL_EVERY]]\n",
                     argv[0]);
        return 2;
    }
    tiny::Options options;
    if (argc > 2) options.architecture = argv[2];
    const std::string type = argc > 3 ? argv[3] : "F32";
    if (argc > 4) options.window = static_cast<uint32_t>(std::atoi(argv[4]));
    if (argc > 5) options.full_every = static_cast<uint32_t>(std::atoi(argv[5]));
    options.types.clear();
    for (tiny::TensorType each : tiny::all_types())
        if (type == "mixed" || type == valar::type_info(each)->name) options.types.push_back(each);
    if (options.types.empty()) {
        std::fprintf(stderr, "no such type: %s\n", type.c_str());
        return 2;
    }
    const auto bytes = tiny::model(options);
    std::FILE* file = std::fopen(argv[1], "wb");
    const bool written = file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    if (!file || std::fclose(file) != 0 || !written) {
        std::fprintf(stderr, "%s: cannot be written\n", argv[1]);
        return 1;
    }
    return 0;
}

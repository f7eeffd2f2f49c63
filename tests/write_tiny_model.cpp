// write_tiny_model PATH [llama|qwen2] [TYPE|mixed] [WINDOW [FULL_EVERY]]: writes the tiny model of
// tiny_model.hpp, every matrix of the type named (F32, Q4_K, ...; default F32), or all types in turn.
// As first words: --untied gives it an output matrix, --factors a rope_freqs.weight, --scales a scale
// wherever a model may have one.
#include "tiny_model.hpp"

namespace {

// The same file with scales that are not 1.
std::vector<std::byte> with_scales(const std::vector<std::byte>& bytes) {
    auto from = valar::Gguf::from_bytes(bytes);
    valar::GgufWriter writer;
    for (const valar::GgufKey& key : from->keys()) writer.set(key);
    const std::string prefix = std::string(*from->get_string("general.architecture")) + ".";
    writer.set(prefix + "embedding_scale", 3.7f);
    writer.set(prefix + "logit_scale", 0.3f);
    writer.set(prefix + "attention.scale", 0.11f);
    writer.set(prefix + "rope.scaling.factor", 3.0f);
    writer.set_string(prefix + "rope.scaling.type", "linear");
    for (const valar::TensorInfo& tensor : from->tensors())
        writer.add_tensor(tensor.name, tensor.type, {tensor.dims, tensor.n_dims},
                          *from->tensor_bytes(tensor));
    return *writer.to_bytes();
}

}  // namespace

int main(int argc, char** argv) {
    tiny::Options options;
    bool scales = false;
    for (; argc > 1 && argv[1][0] == '-'; ++argv, --argc) {
        const std::string_view flag = argv[1];
        if (flag == "--untied") options.tied = false;
        else if (flag == "--factors") options.rope_factors = true;
        else if (flag == "--scales") scales = true;
        else break;
    }
    if (argc < 2 || argc > 6 || argv[1][0] == '-') {
        std::fprintf(stderr,
                     "usage: write_tiny_model [--untied] [--factors] [--scales] PATH [llama|qwen2] "
                     "[TYPE|mixed] [WINDOW [FULL_EVERY]]\n");
        return 2;
    }
    if (argc > 2) options.architecture = argv[2];
    const std::string type = argc > 3 ? argv[3] : "F32";
    if (argc > 4) options.window = static_cast<uint32_t>(std::atoi(argv[4]));
    if (argc > 5) options.full_every = static_cast<uint32_t>(std::atoi(argv[5]));
    options.types.clear();
    for (tiny::TensorType each : tiny::later_types())
        if (type == valar::type_info(each)->name) options.types.push_back(each);
    for (tiny::TensorType each : tiny::all_types())
        if (type == "mixed" || type == valar::type_info(each)->name) options.types.push_back(each);
    if (options.types.empty()) {
        std::fprintf(stderr, "no such type: %s\n", type.c_str());
        return 2;
    }
    auto bytes = tiny::model(options);
    if (scales) bytes = with_scales(bytes);
    std::FILE* file = std::fopen(argv[1], "wb");
    const bool written = file && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
    if (!file || std::fclose(file) != 0 || !written) {
        std::fprintf(stderr, "%s: cannot be written\n", argv[1]);
        return 1;
    }
    return 0;
}

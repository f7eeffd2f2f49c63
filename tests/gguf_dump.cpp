// gguf_dump PATH: prints all that a model file holds, one key or tensor a line, for gguf_check.py.
#include "digest_internal.hpp"
#include "gguf.hpp"
#include "kernels/internal.hpp"

#include <cstdio>

using namespace valar;

namespace {

constexpr const char* type_names[] = {"u8",      "i8",     "u16",   "i16", "u32", "i32", "f32",
                                      "boolean", "string", "array", "u64", "i64", "f64"};

void print_float(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    std::printf(" %016llx", static_cast<unsigned long long>(bits));
}

void print_text(std::string_view text) {
    std::printf(" '%s'", detail::hex_encode(text.data(), text.size()).c_str());
}

void print_integer(const GgufKey& key, size_t i) {
    if (key.type == GgufType::u64)
        std::printf(" %llu", static_cast<unsigned long long>(
                                 GgufNumbers<uint64_t>(key.data.data(), key.count, key.type)[i]));
    else
        std::printf(" %lld", static_cast<long long>(
                                 GgufNumbers<int64_t>(key.data.data(), key.count, key.type)[i]));
}

void print_key(const Gguf& gguf, const GgufKey& key) {
    const bool is_float = key.type == GgufType::f32 || key.type == GgufType::f64;
    std::printf("key %.*s %s", static_cast<int>(key.name.size()), key.name.data(),
                type_names[static_cast<uint32_t>(key.type)]);
    if (key.is_array) std::printf(" [%zu]", key.count);
    if (key.type == GgufType::string && key.is_array) {
        const GgufStrings texts = *gguf.get_strings(key.name);
        for (std::string_view text : texts) print_text(text);
    } else if (key.type == GgufType::string) print_text(*gguf.get_string(key.name));
    else if (is_float && !key.is_array) print_float(*gguf.get_float(key.name));
    else
        for (size_t i = 0; i < key.count; ++i) {
            if (is_float) print_float((*gguf.get_floats(key.name))[i]);
            else print_integer(key, i);
        }
    std::printf("\n");
}

void print_tensor(const Gguf& gguf, const TensorInfo& tensor) {
    auto bytes = gguf.tensor_bytes(tensor);
    std::printf("tensor %.*s %s", static_cast<int>(tensor.name.size()), tensor.name.data(),
                type_info(tensor.type)->name);
    for (uint32_t i = 0; i < tensor.n_dims; ++i)
        std::printf(" %llu", static_cast<unsigned long long>(tensor.dims[i]));
    std::printf(" %s\n", detail::sha256(bytes->data(), bytes->size()).hex().c_str());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s PATH\n", argv[0]);
        return 2;
    }
    auto gguf = Gguf::open(argv[1]);
    if (!gguf) {
        std::fprintf(stderr, "%s\n", gguf.error().message.c_str());
        return 1;
    }
    for (const GgufKey& key : gguf->keys()) print_key(*gguf, key);
    for (const TensorInfo& tensor : gguf->tensors()) print_tensor(*gguf, tensor);
}

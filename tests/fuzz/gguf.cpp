// A model file of any bytes: parsed from memory and through a reader, all keys and tensors
// touched, the spec read and bound.
#include "gguf.hpp"
#include "model_internal.hpp"

#include <cstdlib>

using namespace valar;

namespace {

volatile uint64_t sink;  // so that reads are not optimised away

uint64_t last(std::string_view text) {
    return text.empty() ? 0 : static_cast<unsigned char>(text.back());
}

void touch(const Gguf& gguf) {
    uint64_t sum = 0;
    for (const GgufKey& key : gguf.keys()) {
        if (gguf.find(key.name) != &key) std::abort();
        if (auto v = gguf.get_uint(key.name)) sum += *v;
        if (auto v = gguf.get_float(key.name)) sum += *v > 0;
        if (auto v = gguf.get_bool(key.name)) sum += *v;
        if (auto v = gguf.get_string(key.name)) sum += last(*v);
        if (auto v = gguf.get_strings(key.name))
            for (std::string_view text : *v) sum += last(text);
        if (auto v = gguf.get_ints(key.name))
            for (size_t i = 0; i < v->size(); ++i) sum += static_cast<uint64_t>((*v)[i]);
        if (auto v = gguf.get_floats(key.name))
            for (size_t i = 0; i < v->size(); ++i) sum += (*v)[i] > 0;
    }
    for (const TensorInfo& tensor : gguf.tensors()) {
        if (gguf.find_tensor(tensor.name) != &tensor) std::abort();
        std::byte ends[2];
        if (!gguf.read_tensor(tensor, 0, std::span(ends, 1))) std::abort();
        if (!gguf.read_tensor(tensor, tensor.bytes - 1, std::span(ends + 1, 1))) std::abort();
        if (gguf.read_tensor(tensor, tensor.bytes, std::span(ends, 1))) std::abort();
        if (auto bytes = gguf.tensor_bytes(tensor); bytes && bytes->back() != ends[1]) std::abort();
        gguf.release(tensor);
    }
    sink = sum;
}

Result<void> copy(void* gguf, const TensorInfo& to, uint64_t offset, std::span<std::byte> out) {
    const Gguf& from = *static_cast<const Gguf*>(gguf);
    return from.read_tensor(*from.find_tensor(to.name), offset, out);
}

/// The same file written again reads as the same, and so does what is added to it.
void rewrite(const Gguf& gguf) {
    GgufWriter writer;
    bool packed = false;
    for (const TensorInfo& tensor : gguf.tensors()) {
        packed |= tensor.packed;
        if (tensor.n_dims == 2) writer.add_tensor(tensor, {copy, const_cast<Gguf*>(&gguf)});
        else
            writer.add_tensor(tensor.name, tensor.type, std::span(tensor.dims, tensor.n_dims),
                              *gguf.tensor_bytes(tensor));
    }
    for (const GgufKey& key : gguf.keys())
        if (!packed || key.name != "valar.packed") writer.set(key);  // the writer's own key
    if (gguf.find("general.alignment")) return;                      // the writer's own key
    if (gguf.find("number") || gguf.find("text") || gguf.find("texts")) return;
    const std::string_view texts[] = {"one", "two"};
    writer.set("number", gguf.version());
    writer.set_string("text", texts[0]);
    writer.set_strings("texts", texts);
    auto bytes = writer.to_bytes();
    if (!bytes) std::abort();
    auto again = Gguf::from_bytes(*bytes);
    if (!again || again->keys().size() != gguf.keys().size() + 3) std::abort();
    if (again->get_strings("texts")->size() != 2 || *again->get_bool("absent", false)) std::abort();
}

void bind(const Gguf& gguf) {
    auto spec = read_model_spec(gguf);
    if (!spec) return;
    if (spec->layers.empty() || spec->n_embd == 0 || spec->n_vocab == 0) std::abort();
    auto tensors = detail::bind_model_tensors(gguf, *spec);
    if (tensors && tensors->layers.size() != spec->layers.size()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    GgufReader reader;
    reader.read = [](void* context, uint64_t offset, void* dst, size_t n) {
        std::memcpy(dst, static_cast<const std::byte*>(context) + offset, n);
        return true;
    };
    reader.context = const_cast<uint8_t*>(data);
    reader.size = size;
    auto borrowed = Gguf::from_bytes(bytes);
    auto fetched = Gguf::from_reader(reader);
    if (borrowed.ok() != fetched.ok()) std::abort();
    if (!borrowed) return 0;
    touch(*borrowed);
    touch(*fetched);
    rewrite(*borrowed);
    bind(*borrowed);
    bind(*fetched);
    return 0;
}

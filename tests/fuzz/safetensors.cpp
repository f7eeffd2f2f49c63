// Any folder of the hub becomes a GGUF file or an error. Input: the files one after another, each
// behind a line "=== NAME"; of safetensors the header alone, whose length and bytes are added here
// (of those whose name has an 'x' in front, all).
#include "valar.hpp"

#include "../../examples/hub_model.hpp"

#include <cstdlib>

namespace {

using namespace valar;

struct Folder {
    std::map<std::string, std::string> files;

    static bool read(void* context, uint64_t offset, void* to, size_t size) {
        const std::string& bytes = *static_cast<const std::string*>(context);
        if (offset > bytes.size() || size > bytes.size() - offset) std::abort();
        std::memcpy(to, bytes.data() + offset, size);
        return true;
    }
    static Result<GgufReader> open(void* context, const std::string& name) {
        auto& files = static_cast<Folder*>(context)->files;
        const auto found = files.find(name);
        if (found == files.end()) return Error{ErrorKind::not_found, name + ": is not there"};
        return GgufReader{read, &found->second, found->second.size(), name};
    }
};

std::string whole_file(std::string_view header) {
    const uint64_t length = header.size();
    std::string out(reinterpret_cast<const char*>(&length), 8);
    out += header;
    for (uint32_t i = 0; i < 40000; ++i) out += static_cast<char>(i * 2654435761u >> 24);
    return out;
}

Folder read_folder(std::string_view text) {
    Folder folder;
    while (text.starts_with("=== ")) {
        const size_t line = std::min(text.find('\n'), text.size());
        std::string name(text.substr(4, line - 4));
        text.remove_prefix(std::min(line + 1, text.size()));
        const size_t end = text.find("\n=== ");
        const std::string_view body = text.substr(0, end);
        const bool raw = name.starts_with("x");
        if (raw) name.erase(0, 1);
        folder.files[name] = name.ends_with(".safetensors") && !raw ? whole_file(body)
                                                                    : std::string(body);
        text.remove_prefix(end == text.npos ? text.size() : end + 1);
    }
    return folder;
}

struct Source {
    const example::HubModel* model;
    size_t index;
};

Result<void> fill(void* context, const TensorInfo& tensor, uint64_t offset,
                  std::span<std::byte> out) {
    const Source& source = *static_cast<const Source*>(context);
    std::vector<float> values(out.size() / 4);
    auto done = source.model->read_rows(source.index, offset / (tensor.dims[0] * 4), values);
    if (done) std::memcpy(out.data(), values.data(), out.size());
    return done;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Folder folder = read_folder({reinterpret_cast<const char*>(data), size});
    GgufWriter writer;
    auto model = example::HubModel::open({Folder::open, &folder}, "", writer);
    if (!model) {
        if (model.error().message.empty()) std::abort();
        return 0;
    }
    uint64_t values = 0;
    std::vector<Source> sources;
    for (size_t i = 0; i < model->tensors().size(); ++i) sources.push_back({&*model, i});
    for (Source& source : sources) {
        TensorInfo info = model->info(source.index);
        info.type = TensorType::f32;
        values += info.dims[0] * info.dims[1] * info.dims[2] * info.dims[3];
        writer.add_tensor(info, {fill, &source});
    }
    if (values > 1 << 20) return 0;
    auto bytes = writer.to_bytes();
    if (!bytes) return 0;
    auto gguf = Gguf::from_bytes(*bytes);
    if (!gguf || gguf->tensors().size() != sources.size()) std::abort();
    (void)read_model_spec(*gguf).ok();
    return 0;
}

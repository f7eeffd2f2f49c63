// safetensors: the files in which the hub has models. Include it after valar.hpp.
//
// A file is eight bytes with the length of a header, the header (JSON: of each tensor its dtype,
// shape and where its bytes begin and end behind the header) and the bytes. A model lies in
// model.safetensors or in several files that model.safetensors.index.json names. Nothing is taken
// on trust: each shape, its product, and each offset is checked before any byte is read.
#ifndef VALAR_EXAMPLES_SAFETENSORS_HPP
#define VALAR_EXAMPLES_SAFETENSORS_HPP

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common.hpp"

namespace example {

using valar::ErrorKind;
using valar::Json;
using valar::Result;

inline valar::Error bad_file(const std::string& file, const std::string& what) {
    return valar::Error{ErrorKind::bad_data, file + ": " + what};
}
/// What a file says, fit for a message.
inline std::string shown(std::string_view text) {
    std::string out;
    for (char c : text.substr(0, 100)) out += c >= 0x20 && c < 0x7F && c != '\'' ? c : '?';
    return "'" + out + (text.size() > 100 ? "..." : "") + "'";
}

// ---- The files of a folder, or of a test -----------------------------------------------------

inline constexpr uint64_t kMostTextBytes = 1 << 28;  // of config.json, tokenizer.json and their kin

/// Opens a file by its name; not_found where there is none. What is returned lives as long as the
/// folder.
struct Files {
    Result<valar::GgufReader> (*open)(void* context, const std::string& name) = nullptr;
    void* context = nullptr;

    /// A whole file. `wanted` false: one that is absent is empty.
    Result<std::string> text(const std::string& name, bool wanted = true) const {
        auto file = open(context, name);
        if (!file && !wanted && file.error().kind == ErrorKind::not_found) return std::string();
        if (!file) return file.error();
        if (file->size > kMostTextBytes) return bad_file(file->name, "is too large");
        std::string text(static_cast<size_t>(file->size), '\0');
        if (!file->read(file->context, 0, text.data(), text.size()))
            return valar::Error{ErrorKind::io, file->name + ": cannot be read"};
        return text;
    }
    Result<Json> json(const std::string& name, bool wanted = true) const {
        auto source = text(name, wanted);
        if (!source) return source.error();
        if (source->empty() && !wanted) return Json();
        auto value = Json::parse(*source, {.values = 32'000'000});
        if (!value) return bad_file(name, value.error().message);
        if (!value->is_object()) return bad_file(name, "is no JSON object");
        return value;
    }
};

inline std::filesystem::path native(const std::string& path) {
    return std::filesystem::path(std::u8string(path.begin(), path.end()));
}
inline bool is_folder(const std::string& path) {
    std::error_code none;
    return std::filesystem::is_directory(native(path), none);
}

class DiskFolder {
public:
    explicit DiskFolder(std::string path) : path_(std::move(path)) {}
    Files files() { return {open, this}; }

private:
    struct Close {
        void operator()(std::FILE* file) const { std::fclose(file); }
    };
    using File = std::unique_ptr<std::FILE, Close>;

    static Result<valar::GgufReader> open(void* context, const std::string& name) {
        DiskFolder& self = *static_cast<DiskFolder*>(context);
        const std::string path = self.path_ + "/" + name;
        std::error_code failed;
        if (!std::filesystem::is_regular_file(native(path), failed))
            return valar::Error{ErrorKind::not_found, path + ": there is no such file"};
        const uint64_t size = std::filesystem::file_size(native(path), failed);
#if defined(_WIN32)
        File file(_wfopen(native(path).c_str(), L"rb"));
#else
        File file(std::fopen(path.c_str(), "rb"));
#endif
        if (!file || failed) return valar::Error{ErrorKind::io, path + ": cannot be opened"};
        std::setvbuf(file.get(), nullptr, _IONBF, 0);
        self.open_.push_back(std::move(file));
        return valar::GgufReader{read, self.open_.back().get(), size, path};
    }
    static bool read(void* context, uint64_t offset, void* to, size_t size) {
        std::FILE* file = static_cast<std::FILE*>(context);
#if defined(_WIN32)
        if (_fseeki64(file, static_cast<int64_t>(offset), SEEK_SET) != 0) return false;
#else
        if (fseeko(file, static_cast<off_t>(offset), SEEK_SET) != 0) return false;
#endif
        return std::fread(to, 1, size, file) == size;
    }

    std::string path_;
    std::vector<File> open_;
};

// ---- Tensors ---------------------------------------------------------------------------------

enum class Dtype : uint8_t { other, f32, f16, bf16, f8, u8 };
struct DtypeInfo {
    const char* name;
    Dtype dtype;
    uint32_t bytes;
};
/// Those without a Dtype may lie in a file, but nothing here reads them.
inline constexpr DtypeInfo dtypes[] = {
    {"F32", Dtype::f32, 4},       {"F16", Dtype::f16, 2},   {"BF16", Dtype::bf16, 2},
    {"F8_E4M3", Dtype::f8, 1},    {"U8", Dtype::u8, 1},     {"I8", Dtype::other, 1},
    {"BOOL", Dtype::other, 1},    {"I16", Dtype::other, 2}, {"U16", Dtype::other, 2},
    {"I32", Dtype::other, 4},     {"U32", Dtype::other, 4}, {"I64", Dtype::other, 8},
    {"U64", Dtype::other, 8},     {"F64", Dtype::other, 8}, {"F8_E5M2", Dtype::other, 1},
    {"F8_E8M0", Dtype::other, 1},
};

struct SafeTensor {
    std::string name;
    const DtypeInfo* type = nullptr;
    std::vector<uint64_t> shape;
    uint64_t count = 1;  // of values
    uint64_t begin = 0;  // in its file
    uint32_t file = 0;
};

/// Sign, four bits of exponent from 2^-6 on, three of fraction; all ones are no number.
inline float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    if ((bits & 127) == 127) return std::nanf("");
    const float size = exponent ? std::ldexp(static_cast<float>(8 + fraction), exponent - 10)
                                : std::ldexp(static_cast<float>(fraction), -9);
    return bits >> 7 ? -size : size;
}

/// `count` values of a dtype, which may lie unaligned.
inline void widen(Dtype dtype, const std::byte* from, size_t count, float* out) {
    const auto bits16 = [&](size_t i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, sizeof bits);
        return bits;
    };
    if (dtype == Dtype::f32) std::memcpy(out, from, count * sizeof(float));
    for (size_t i = 0; dtype == Dtype::f16 && i < count; ++i)
        out[i] = valar::half_to_float(bits16(i));
    for (size_t i = 0; dtype == Dtype::bf16 && i < count; ++i)
        out[i] = std::bit_cast<float>(static_cast<uint32_t>(bits16(i)) << 16);
    for (size_t i = 0; dtype == Dtype::f8 && i < count; ++i)
        out[i] = e4m3_to_float(static_cast<uint8_t>(from[i]));
    for (size_t i = 0; dtype == Dtype::u8 && i < count; ++i) out[i] = static_cast<float>(from[i]);
}

/// All tensors of a model, by name.
class Safetensors {
public:
    static constexpr uint64_t max_header_bytes = 100'000'000;  // the format's own limit
    static constexpr size_t max_tensors = 1 << 20, max_files = 4096;

    static Result<Safetensors> open(Files files) {
        Safetensors out;
        auto index = files.json("model.safetensors.index.json", false);
        if (!index) return index.error();
        if (index->is_null()) {
            if (auto done = out.add_file(files, "model.safetensors"); !done) return done.error();
            return out;
        }
        const std::string name = "model.safetensors.index.json";
        const Json& map = (*index)["weight_map"];
        if (map.members().empty()) return bad_file(name, "'weight_map' names no tensors");
        std::map<std::string, uint32_t> shards;
        for (const auto& [tensor, file] : map.members()) {
            const std::string shard(file.as_string());
            if (!is_plain_name(shard))
                return bad_file(name, "the file of tensor " + shown(tensor) + " is no file name");
            if (!shards.emplace(shard, shards.size()).second) continue;
            if (shards.size() > max_files) return bad_file(name, "names too many files");
            if (auto done = out.add_file(files, shard); !done) return done.error();
        }
        for (const auto& [tensor, file] : map.members())
            if (!out.find(tensor))
                return bad_file(name, "tensor " + shown(tensor) + " is in no file");
        return out;
    }

    const std::map<std::string, SafeTensor, std::less<>>& tensors() const { return tensors_; }
    const SafeTensor* find(std::string_view name) const {
        const auto found = tensors_.find(name);
        return found == tensors_.end() ? nullptr : &found->second;
    }
    const std::string& file_of(const SafeTensor& tensor) const { return files_[tensor.file].name; }
    valar::Error bad(const SafeTensor& tensor, const std::string& what) const {
        return bad_file(file_of(tensor), "tensor " + shown(tensor.name) + " " + what);
    }
    /// out.size() values from `first` on, as the file has them.
    Result<void> read(const SafeTensor& tensor, uint64_t first, std::span<float> out) const {
        if (tensor.type->dtype == Dtype::other)
            return bad(tensor, std::string("has the type ") + tensor.type->name +
                                   ", which holds no weights");
        if (first > tensor.count || out.size() > tensor.count - first)
            return bad(tensor, "is too small");
        if (tensor.type->dtype == Dtype::f32 && !out.empty())
            return read_bytes(tensor, first * 4, std::as_writable_bytes(out));
        std::vector<std::byte> bytes(out.size() * tensor.type->bytes);
        if (auto done = read_bytes(tensor, first * tensor.type->bytes, bytes); !done) return done;
        widen(tensor.type->dtype, bytes.data(), out.size(), out.data());
        return {};
    }

private:
    static bool is_plain_name(const std::string& name) {
        return name.size() < 256 && name.ends_with(".safetensors") && name[0] != '.' &&
               name.find_first_of("/\\:") == name.npos && name.find('\0') == name.npos;
    }
    Result<void> read_bytes(const SafeTensor& tensor, uint64_t offset,
                            std::span<std::byte> out) const {
        const valar::GgufReader& file = files_[tensor.file];
        if (!file.read(file.context, tensor.begin + offset, out.data(), out.size()))
            return valar::Error{ErrorKind::io, file.name + ": cannot be read"};
        return {};
    }

    Result<void> add_file(Files files, const std::string& name) {
        auto file = files.open(files.context, name);
        if (!file) return file.error();
        uint64_t length = 0;
        if (file->size < 8 || !file->read(file->context, 0, &length, 8))
            return bad_file(file->name, "is too short for a header");
        if (length > max_header_bytes || length > file->size - 8)
            return bad_file(file->name, "says that its header is " + std::to_string(length) +
                                            " bytes long, which it cannot be");
        std::string text(static_cast<size_t>(length), '\0');
        if (!file->read(file->context, 8, text.data(), text.size()))
            return valar::Error{ErrorKind::io, file->name + ": cannot be read"};
        auto header = Json::parse(text, {.values = 16'000'000});
        if (!header) return bad_file(file->name, "header: " + header.error().message);
        files_.push_back(*file);
        for (const auto& [tensor, entry] : header->members())
            if (tensor != "__metadata__")
                if (auto done = add_tensor(tensor, entry, 8 + length); !done) return done;
        return {};
    }

    Result<void> add_tensor(const std::string& name, const Json& entry, uint64_t data) {
        const valar::GgufReader& file = files_.back();
        SafeTensor tensor;
        tensor.name = name;
        tensor.file = static_cast<uint32_t>(files_.size() - 1);
        const auto refuse = [&](const char* what) {
            return bad_file(file.name, "tensor " + shown(name) + " " + what);
        };
        for (const DtypeInfo& row : dtypes)
            if (entry["dtype"].as_string() == row.name) tensor.type = &row;
        if (!tensor.type) return refuse("has an unknown dtype");
        const Json &shape = entry["shape"], &offsets = entry["data_offsets"];
        if (!shape.is_array() || shape.size() > 8) return refuse("has no shape of up to 8 numbers");
        for (const Json& length : shape.items()) {
            const uint64_t n = length.as_uint(UINT64_MAX);
            // no more values than a file has bytes
            if (n > file.size || (n != 0 && tensor.count > file.size / n))
                return refuse("has a shape that its file has no room for");
            tensor.shape.push_back(n);
            tensor.count *= n;
        }
        const uint64_t begin = offsets[0].as_uint(UINT64_MAX), end = offsets[1].as_uint(UINT64_MAX);
        if (offsets.size() != 2 || begin > end || end > file.size - data)
            return refuse("has data_offsets outside of its file");
        if (end - begin != tensor.count * tensor.type->bytes)
            return refuse("has as many bytes as its shape does not");
        tensor.begin = data + begin;
        if (tensors_.size() >= max_tensors) return refuse("is one too many");
        if (!tensors_.emplace(name, std::move(tensor)).second) return refuse("is there twice");
        return {};
    }

    std::vector<valar::GgufReader> files_;
    std::map<std::string, SafeTensor, std::less<>> tensors_;
};

}  // namespace example

#endif  // VALAR_EXAMPLES_SAFETENSORS_HPP

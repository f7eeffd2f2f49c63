// >>gguf
// Owns: the model file: metadata, tensor directory, table of tensor types; the writer.
// Assumes: little-endian GGUF v2 or v3, in one file or in split files name-00001-of-0000N.gguf.
// Promises: every count, length, offset and product from the file is checked before it is used;
// errors name the file and the key or tensor.
// The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#include "prologue.hpp"

#include "base/internal.hpp"
#include "gguf.hpp"
#include "gguf_internal.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t gguf_magic = 0x46554747;  // "GGUF"
constexpr uint32_t gguf_default_alignment = 32;
constexpr uint64_t gguf_reader_chunk = 1 << 20;  // first guess of a header's size
constexpr uint64_t gguf_write_piece = 4 << 20;   // bytes of a tensor made at a time
constexpr uint32_t gguf_value_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // by GgufType

constexpr uint32_t gguf_bit(GgufType type) { return 1u << static_cast<uint32_t>(type); }
constexpr uint32_t gguf_integers = gguf_bit(GgufType::u8) | gguf_bit(GgufType::i8) |
                                   gguf_bit(GgufType::u16) | gguf_bit(GgufType::i16) |
                                   gguf_bit(GgufType::u32) | gguf_bit(GgufType::i32) |
                                   gguf_bit(GgufType::u64) | gguf_bit(GgufType::i64);
constexpr uint32_t gguf_floats = gguf_bit(GgufType::f32) | gguf_bit(GgufType::f64);

struct TypeRow {
    TensorType type;
    TypeInfo info;
};
constexpr TypeRow type_rows[] = {
    // clang-format off
    {TensorType::f32, {"F32", 1, 4}},             {TensorType::f16, {"F16", 1, 2}},
    {TensorType::q4_0, {"Q4_0", 32, 18}},         {TensorType::q4_1, {"Q4_1", 32, 20}},
    {TensorType::q5_0, {"Q5_0", 32, 22}},         {TensorType::q5_1, {"Q5_1", 32, 24}},
    {TensorType::q8_0, {"Q8_0", 32, 34}},         {TensorType::q2_k, {"Q2_K", 256, 84}},
    {TensorType::q3_k, {"Q3_K", 256, 110}},       {TensorType::bf16, {"BF16", 1, 2}},
    {TensorType::q4_k, {"Q4_K", 256, 144}},       {TensorType::q5_k, {"Q5_K", 256, 176}},
    {TensorType::q6_k, {"Q6_K", 256, 210}},       {TensorType::tq1_0, {"TQ1_0", 256, 54}},
    {TensorType::iq2_xxs, {"IQ2_XXS", 256, 66}},  {TensorType::iq2_xs, {"IQ2_XS", 256, 74}},
    {TensorType::iq3_xxs, {"IQ3_XXS", 256, 98}},  {TensorType::iq1_s, {"IQ1_S", 256, 50}},
    {TensorType::iq4_nl, {"IQ4_NL", 32, 18}},     {TensorType::iq3_s, {"IQ3_S", 256, 110}},
    {TensorType::iq2_s, {"IQ2_S", 256, 82}},      {TensorType::iq4_xs, {"IQ4_XS", 256, 136}},
    {TensorType::i8, {"I8", 1, 1}},               {TensorType::i16, {"I16", 1, 2}},
    {TensorType::i32, {"I32", 1, 4}},             {TensorType::i64, {"I64", 1, 8}},
    {TensorType::f64, {"F64", 1, 8}},             {TensorType::iq1_m, {"IQ1_M", 256, 56}},
    {TensorType::tq2_0, {"TQ2_0", 256, 66}},      {TensorType::mxfp4, {"MXFP4", 32, 17}},
    {TensorType::nvfp4, {"NVFP4", 64, 36}},       {TensorType::q1_0, {"Q1_0", 128, 18}},
    // clang-format on
};

/// Sets tensor.bytes from type and dims; returns what is wrong, or null.
const char* size_tensor(TensorInfo& tensor) {
    const TypeInfo* type = type_info(tensor.type);
    if (!type) return "has a type that is not known";
    uint64_t values = 1;
    for (uint64_t dim : tensor.dims) {
        if (dim == 0) return "has an empty dimension";
        if (mul_overflows(values, dim, &values)) return "has too many values";
    }
    if (tensor.dims[0] % type->block_size != 0) return "has rows that are not whole blocks";
    uint64_t pieces = values / type->block_size, piece_bytes = type->block_bytes;
    if (tensor.packed) {
        const uint32_t block_bytes = tile_block_bytes(tensor.type);
        if (tensor.n_dims != 2 || !block_bytes) return "is of a kind that is never packed";
        pieces = tensor.dims[1] / packed_rows + (tensor.dims[1] % packed_rows != 0);
        if (mul_overflows(tensor.dims[0] / type->block_size, block_bytes, &piece_bytes) ||
            add_overflows(piece_bytes, packed_alignment - 1, &piece_bytes))
            return "has too many bytes";
        piece_bytes = piece_bytes / packed_alignment * packed_alignment;
    }
    return mul_overflows(pieces, piece_bytes, &tensor.bytes) ? "has too many bytes" : nullptr;
}

/// Indices of `items` by name; the second of two with one name is returned through `twice`.
template <class T>
std::vector<uint32_t> sort_by_name(const std::vector<T>& items, const T** twice) {
    const auto less = [](const void* context, uint32_t a, uint32_t b) {
        const auto& all = *static_cast<const std::vector<T>*>(context);
        return all[a].name < all[b].name;
    };
    const std::vector<uint32_t> order = sorted_order(items.size(), less, &items);
    for (size_t i = 1; i < order.size(); ++i)
        if (items[order[i]].name == items[order[i - 1]].name) *twice = &items[order[i]];
    return order;
}

template <class T>
const T* find_by_name(const std::vector<T>& items, const std::vector<uint32_t>& order,
                      std::string_view name) {
    auto at = std::lower_bound(order.begin(), order.end(), name,
                               [&](uint32_t i, std::string_view n) { return items[i].name < n; });
    return at != order.end() && items[*at].name == name ? &items[*at] : nullptr;
}

/// The value of a key that is one integer and not negative.
std::optional<uint64_t> gguf_uint(const GgufKey& key) {
    if (key.is_array || !(gguf_integers & gguf_bit(key.type))) return std::nullopt;
    if (key.type == GgufType::u64) return GgufNumbers<uint64_t>(key.data.data(), 1, key.type)[0];
    const int64_t value = GgufNumbers<int64_t>(key.data.data(), 1, key.type)[0];
    if (value < 0) return std::nullopt;
    return static_cast<uint64_t>(value);
}

/// Reads one file's header from front to back. Once something is wrong, `error` is set and every
/// function returns false; `short_of_bytes` says that a longer piece of the file would help.
struct GgufParser {
    const std::string& file;
    std::span<const std::byte> bytes;
    uint64_t file_size;
    uint64_t at = 0;
    uint32_t version = 0;
    uint64_t alignment = gguf_default_alignment;
    std::vector<GgufKey> keys = {};
    std::vector<uint32_t> keys_by_name = {};
    std::vector<TensorInfo> tensors = {};
    bool short_of_bytes = false;
    std::optional<Error> error = {};

    bool fail(const char* what, ErrorKind kind = ErrorKind::bad_data) {
        error = make_error(kind, format("%s: %s (at byte %llu)", file.c_str(), what,
                                        static_cast<unsigned long long>(at)));
        return false;
    }
    bool fail(const char* noun, std::string_view name, const char* what) {
        return fail(
            format("%s '%.*s' %s", noun, static_cast<int>(name.size()), name.data(), what).c_str());
    }
    bool has(uint64_t n) {
        if (n <= bytes.size() - at) return true;
        if (n > file_size - at) return fail("the file ends inside its header");
        if (n > Gguf::max_header_bytes - std::min(at, Gguf::max_header_bytes))
            return fail("the header is too long");
        short_of_bytes = true;
        return false;
    }
    template <class T>
    bool number(T& value) {
        if (!has(sizeof value)) return false;
        std::memcpy(&value, bytes.data() + at, sizeof value);
        at += sizeof value;
        return true;
    }
    bool string(std::string_view& value) {
        uint64_t length = 0;
        if (!number(length) || !has(length)) return false;
        value = {reinterpret_cast<const char*>(bytes.data() + at), static_cast<size_t>(length)};
        at += length;
        return true;
    }
    /// Names go into messages, so they are short and printable.
    bool name(std::string_view& value) {
        if (!string(value)) return false;
        if (value.empty() || value.size() > Gguf::max_name_bytes)
            return fail("a key or tensor name is empty or too long");
        for (char c : value)
            if (c < ' ' || c > '~') return fail("a key or tensor name is not printable ASCII");
        return true;
    }

    bool parse() {
        uint64_t n_tensors = 0, n_keys = 0;
        if (!preamble() || !number(n_tensors) || !number(n_keys)) return false;
        if (n_tensors > Gguf::max_tensors) return fail("too many tensors");
        if (n_keys > Gguf::max_keys) return fail("too many keys");
        while (keys.size() < n_keys)
            if (!key(keys.emplace_back())) return false;
        const GgufKey* twice = nullptr;
        keys_by_name = sort_by_name(keys, &twice);
        if (twice) return fail("key", twice->name, "occurs twice");
        if (!set_alignment()) return false;
        while (tensors.size() < n_tensors)
            if (!tensor(tensors.emplace_back())) return false;
        at = (at + alignment - 1) / alignment * alignment;
        return std::all_of(tensors.begin(), tensors.end(),
                           [this](TensorInfo& t) { return place(t); });
    }
    bool preamble() {
        uint32_t magic = 0;
        if (!number(magic)) return false;
        if (magic != gguf_magic) return fail("not a GGUF file");
        if (!number(version)) return false;
        if (version == 2 || version == 3) return true;
        if (version != 0 && (version & 0xffff) == 0)
            return fail("a big-endian GGUF file; only little-endian is read",
                        ErrorKind::unsupported);
        return fail(format("GGUF version %u; only 2 and 3 are read", version).c_str(),
                    ErrorKind::unsupported);
    }
    bool key(GgufKey& key) {
        uint32_t type = 0;
        if (!name(key.name) || !number(type)) return false;
        key.is_array = type == static_cast<uint32_t>(GgufType::array);
        uint64_t count = 1;
        if (key.is_array && (!number(type) || !number(count))) return false;
        if (type > static_cast<uint32_t>(GgufType::f64))
            return fail("key", key.name, "has an unknown type");
        key.type = static_cast<GgufType>(type);
        if (key.type == GgufType::array)
            return fail("key", key.name, "is an array of arrays, which is not read");
        return value(key, count);
    }
    bool value(GgufKey& key, uint64_t count) {
        const uint64_t begin = at;
        const bool strings = key.type == GgufType::string;
        uint64_t least = 0;  // a string takes at least its length field
        const uint32_t each = strings ? 8 : gguf_value_bytes[static_cast<uint32_t>(key.type)];
        if (mul_overflows(count, each, &least)) return fail("key", key.name, "has too many values");
        if (!has(least)) return false;
        if (!strings) at += least;
        std::string_view text;
        for (uint64_t i = 0; strings && i < count; ++i)
            if (!string(text)) return false;
        key.count = static_cast<size_t>(count);
        key.data = bytes.subspan(static_cast<size_t>(begin), static_cast<size_t>(at - begin));
        if (key.type == GgufType::boolean)
            for (std::byte b : key.data)
                if (b > std::byte{1}) return fail("key", key.name, "has a bool that is not 0 or 1");
        return true;
    }
    std::optional<uint64_t> uint_key(std::string_view wanted) const {
        const GgufKey* key = find_by_name(keys, keys_by_name, wanted);
        return key ? gguf_uint(*key) : std::nullopt;
    }
    bool set_alignment() {
        constexpr std::string_view key = "general.alignment";
        if (!find_by_name(keys, keys_by_name, key)) return true;
        alignment = uint_key(key).value_or(0);
        if (std::has_single_bit(alignment) && alignment >= 8 && alignment <= Gguf::max_alignment)
            return true;
        return fail("key", key, "is not a power of two from 8 to 1048576");
    }
    bool tensor(TensorInfo& tensor) {
        uint32_t type = 0;
        if (!name(tensor.name) || !number(tensor.n_dims)) return false;
        if (tensor.n_dims < 1 || tensor.n_dims > 4)
            return fail("tensor", tensor.name, "does not have 1 to 4 dimensions");
        for (uint32_t i = 0; i < tensor.n_dims; ++i)
            if (!number(tensor.dims[i])) return false;
        if (!number(type) || !number(tensor.offset)) return false;
        tensor.packed = (type & packed_type_bit) != 0;
        tensor.type = static_cast<TensorType>(type & ~packed_type_bit);
        if (const char* wrong = size_tensor(tensor)) return fail("tensor", tensor.name, wrong);
        if (tensor.packed && uint_key("valar.packed") != packed_version)
            return fail(
                format("tensor '%.*s' is packed, but not in version %u of the layout: make "
                       "the file again from the original",
                       static_cast<int>(tensor.name.size()), tensor.name.data(), packed_version)
                    .c_str(),
                ErrorKind::unsupported);
        if (tensor.offset % alignment != 0)
            return fail("tensor", tensor.name, "has an offset that is not aligned");
        return true;
    }
    /// Makes the offset count from the start of the file; `at` is where tensor data begins.
    bool place(TensorInfo& tensor) {
        uint64_t end = 0;
        if (add_overflows(tensor.offset, at, &tensor.offset) ||
            add_overflows(tensor.offset, tensor.bytes, &end) || end > file_size)
            return fail("tensor", tensor.name, "lies outside the file");
        return true;
    }
};

std::string_view as_chars(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void append_gguf_number(std::string& out, uint64_t value, size_t width) {
    out.append(reinterpret_cast<const char*>(&value), width);  // little-endian, as all targets
}

void append_gguf_string(std::string& out, std::string_view text) {
    append_gguf_number(out, text.size(), 8);
    out += text;
}

}  // namespace
}  // namespace detail

const TypeInfo* type_info(TensorType type) {
    for (const auto& row : detail::type_rows)
        if (row.type == type) return &row.info;
    return nullptr;
}

/// All that an opened Gguf holds. Its address stays when the Gguf is moved.
struct Gguf::State {
    struct File {
        std::string name;
        uint64_t size = 0;
        std::span<const std::byte> bytes;  // the whole file; for a reader, its header
        detail::MappedFile map;
        detail::Buffer header;  // owns `bytes` for a reader
        GgufReader reader;
    };
    static Result<Gguf> open(File file, const std::string& path);
    static Result<File> map_file(const std::string& path);
    Result<void> parse_file(File file);
    static Result<void> fetch_header(File& file, uint64_t length);
    Result<void> open_splits(const std::string& path);
    Result<void> index_tensors();
    Error fail(ErrorKind kind, std::string_view key, const char* what) const;
    Error fail(ErrorKind kind, const TensorInfo& tensor, const char* what) const;
    Result<const GgufKey*> typed(std::string_view key, bool is_array, uint32_t types,
                                 const char* wanted) const;
    const GgufKey* find(std::string_view key) const;
    Result<uint64_t> get_uint(std::string_view key) const;
    Result<uint64_t> get_uint(std::string_view key, uint64_t fallback) const;

    std::vector<File> files;
    std::vector<GgufKey> keys;
    std::vector<uint32_t> keys_by_name;
    std::vector<TensorInfo> tensors;
    std::vector<uint32_t> tensors_by_name;
    uint32_t version = 0;
};

Gguf::Gguf() : state_(std::make_unique<State>()) {}
Gguf::Gguf(Gguf&&) noexcept = default;
Gguf& Gguf::operator=(Gguf&&) noexcept = default;
Gguf::~Gguf() = default;

const std::string& Gguf::name() const { return state_->files[0].name; }
uint32_t Gguf::version() const { return state_->version; }
const std::vector<GgufKey>& Gguf::keys() const { return state_->keys; }
const std::vector<TensorInfo>& Gguf::tensors() const { return state_->tensors; }

Result<Gguf::State::File> Gguf::State::map_file(const std::string& path) {
    auto map = detail::MappedFile::open(path);
    if (!map) return map.error();
    File file;
    file.name = path;
    file.map = std::move(*map);
    file.bytes = file.map.bytes();
    file.size = file.bytes.size();
    return file;
}

Result<Gguf> Gguf::open(const std::string& path) {
    auto file = State::map_file(path);
    if (!file) return file.error();
    return State::open(std::move(*file), path);
}

Result<Gguf> Gguf::from_bytes(std::span<const std::byte> bytes, std::string name) {
    State::File file;
    file.name = std::move(name);
    file.bytes = bytes;
    file.size = bytes.size();
    return State::open(std::move(file), {});
}

Result<Gguf> Gguf::from_reader(GgufReader reader) {
    if (!reader.read)
        return detail::make_error(ErrorKind::invalid_request, reader.name + ": no read function");
    State::File file;
    file.name = reader.name;
    file.size = reader.size;
    file.reader = std::move(reader);
    return State::open(std::move(file), {});
}

Result<Gguf> Gguf::State::open(File file, const std::string& path) {
    Gguf gguf;
    if (auto done = gguf.state_->parse_file(std::move(file)); !done) return done.error();
    if (auto done = gguf.state_->open_splits(path); !done) return done.error();
    if (auto done = gguf.state_->index_tensors(); !done) return done.error();
    return gguf;
}

/// Appends the tensors of one more file. Its keys are kept if it is the first: split files share
/// none but `split.*`.
Result<void> Gguf::State::parse_file(File file) {
    // How long a header is shows only once it is parsed: a reader gives longer and longer pieces.
    for (uint64_t length = detail::gguf_reader_chunk;; length *= 4) {
        if (file.reader.read)
            if (auto done = fetch_header(file, length); !done) return done;
        detail::GgufParser parser{file.name, file.bytes, file.size};
        if (!parser.parse()) {
            if (parser.short_of_bytes) continue;
            return *parser.error;
        }
        const uint32_t index = static_cast<uint32_t>(files.size());
        if (index == 0) {
            version = parser.version;
            keys = std::move(parser.keys);
            keys_by_name = std::move(parser.keys_by_name);
        } else if (parser.uint_key("split.no") != index ||
                   parser.uint_key("split.count") != get_uint("split.count").value()) {
            return detail::make_error(ErrorKind::bad_data,
                                      file.name +
                                          ": keys 'split.no' and 'split.count' say that "
                                          "it is another part");
        }
        for (TensorInfo& tensor : parser.tensors) tensor.file = index;
        tensors.insert(tensors.end(), parser.tensors.begin(), parser.tensors.end());
        files.push_back(std::move(file));
        return {};
    }
}

Result<void> Gguf::State::fetch_header(File& file, uint64_t length) {
    if (file.size == 0) return {};
    auto header = detail::Buffer::allocate(std::min({length, file.size, max_header_bytes}),
                                           "GGUF header");
    if (!header) return header.error();
    if (!file.reader.read(file.reader.context, 0, header->data(), header->size()))
        return detail::make_error(ErrorKind::io, file.name + ": the reader failed at byte 0");
    file.header = std::move(*header);
    file.bytes = {file.header.data(), file.header.size()};
    return {};
}

Result<void> Gguf::State::open_splits(const std::string& path) {
    auto count = get_uint("split.count", 1);
    auto number = get_uint("split.no", 0);
    if (!count) return count.error();
    if (!number) return number.error();
    if (*count <= 1) return {};
    if (*count > max_split_files) return fail(ErrorKind::bad_data, "split.count", "is too large");
    if (path.empty())
        return fail(ErrorKind::unsupported, "split.count", "needs split files opened by path");
    if (*number != 0)
        return fail(ErrorKind::invalid_request, "split.no", "is not 0: open the first split file");
    const auto ending = [&](uint64_t part) {
        return detail::format("-%05u-of-%05u.gguf", static_cast<unsigned>(part),
                              static_cast<unsigned>(*count));
    };
    const std::string first = ending(1);
    if (!std::string_view(path).ends_with(first))
        return fail(ErrorKind::bad_data, "split.count", ("needs a name with " + first).c_str());
    for (uint64_t part = 2; part <= *count; ++part) {
        auto file = map_file(path.substr(0, path.size() - first.size()) + ending(part));
        if (!file) return file.error();
        if (auto done = parse_file(std::move(*file)); !done) return done;
    }
    auto total = get_uint("split.tensors.count", tensors.size());
    if (!total) return total.error();
    if (*total != tensors.size())
        return fail(ErrorKind::bad_data, "split.tensors.count", "is not the number of tensors");
    return {};
}

Result<void> Gguf::State::index_tensors() {
    if (tensors.size() > max_tensors)
        return detail::make_error(ErrorKind::bad_data,
                                  files[0].name + ": too many tensors in all parts");
    const TensorInfo* twice = nullptr;
    tensors_by_name = detail::sort_by_name(tensors, &twice);
    if (twice) return fail(ErrorKind::bad_data, *twice, "occurs twice");
    std::vector<const TensorInfo*> placed;
    for (const TensorInfo& tensor : tensors) placed.push_back(&tensor);
    detail::sort_items(placed, [](const TensorInfo* a, const TensorInfo* b) {
        return a->file != b->file ? a->file < b->file : a->offset < b->offset;
    });
    for (size_t i = 1; i < placed.size(); ++i) {
        const TensorInfo& before = *placed[i - 1];
        if (before.file == placed[i]->file && before.offset + before.bytes > placed[i]->offset)
            return fail(ErrorKind::bad_data, *placed[i], "overlaps another tensor");
    }
    return {};
}

Error Gguf::State::fail(ErrorKind kind, std::string_view key, const char* what) const {
    return detail::make_error(kind, detail::format("%s: key '%.*s' %s", files[0].name.c_str(),
                                                   static_cast<int>(key.size()), key.data(), what));
}

Error Gguf::State::fail(ErrorKind kind, const TensorInfo& tensor, const char* what) const {
    return detail::make_error(
        kind, detail::format("%s: tensor '%.*s' %s", files[tensor.file].name.c_str(),
                             static_cast<int>(tensor.name.size()), tensor.name.data(), what));
}

const GgufKey* Gguf::State::find(std::string_view key) const {
    return detail::find_by_name(keys, keys_by_name, key);
}

Result<const GgufKey*> Gguf::State::typed(std::string_view name, bool is_array, uint32_t types,
                                          const char* wanted) const {
    const GgufKey* key = find(name);
    if (!key) return fail(ErrorKind::not_found, name, "is missing");
    if (key->is_array != is_array || !(types & detail::gguf_bit(key->type)))
        return fail(ErrorKind::bad_data, name, (std::string("is not ") + wanted).c_str());
    return key;
}

Result<uint64_t> Gguf::State::get_uint(std::string_view name) const {
    auto key = typed(name, false, detail::gguf_integers, "an integer");
    if (!key) return key.error();
    auto value = detail::gguf_uint(**key);
    if (!value) return fail(ErrorKind::bad_data, name, "is negative");
    return *value;
}

Result<uint64_t> Gguf::State::get_uint(std::string_view key, uint64_t fallback) const {
    return find(key) ? get_uint(key) : fallback;
}

const GgufKey* Gguf::find(std::string_view key) const { return state_->find(key); }

Result<uint64_t> Gguf::get_uint(std::string_view key) const { return state_->get_uint(key); }

Result<uint64_t> Gguf::get_uint(std::string_view key, uint64_t fallback) const {
    return state_->get_uint(key, fallback);
}

Result<double> Gguf::get_float(std::string_view name) const {
    auto key = state_->typed(name, false, detail::gguf_floats, "a float");
    if (!key) return key.error();
    return GgufNumbers<double>((*key)->data.data(), 1, (*key)->type)[0];
}

Result<bool> Gguf::get_bool(std::string_view name) const {
    auto key = state_->typed(name, false, detail::gguf_bit(GgufType::boolean), "a bool");
    if (!key) return key.error();
    return (*key)->data[0] != std::byte{0};
}

Result<std::string_view> Gguf::get_string(std::string_view name) const {
    auto key = state_->typed(name, false, detail::gguf_bit(GgufType::string), "a string");
    if (!key) return key.error();
    return detail::as_chars((*key)->data).substr(8);
}

Result<double> Gguf::get_float(std::string_view key, double fallback) const {
    return find(key) ? get_float(key) : fallback;
}

Result<bool> Gguf::get_bool(std::string_view key, bool fallback) const {
    return find(key) ? get_bool(key) : fallback;
}

Result<std::string_view> Gguf::get_string(std::string_view key, std::string_view fallback) const {
    return find(key) ? get_string(key) : fallback;
}

Result<GgufStrings> Gguf::get_strings(std::string_view name) const {
    auto key = state_->typed(name, true, detail::gguf_bit(GgufType::string), "an array of strings");
    if (!key) return key.error();
    const auto data = (*key)->data;
    return GgufStrings(data.data(), data.data() + data.size(), (*key)->count);
}

Result<GgufNumbers<int64_t>> Gguf::get_ints(std::string_view name) const {
    constexpr uint32_t types = (detail::gguf_integers & ~detail::gguf_bit(GgufType::u64)) |
                               detail::gguf_bit(GgufType::boolean);
    auto key = state_->typed(name, true, types, "an array of integers");
    if (!key) return key.error();
    return GgufNumbers<int64_t>((*key)->data.data(), (*key)->count, (*key)->type);
}

Result<GgufNumbers<double>> Gguf::get_floats(std::string_view name) const {
    auto key = state_->typed(name, true, detail::gguf_floats, "an array of floats");
    if (!key) return key.error();
    return GgufNumbers<double>((*key)->data.data(), (*key)->count, (*key)->type);
}

const TensorInfo* Gguf::find_tensor(std::string_view name) const {
    return detail::find_by_name(state_->tensors, state_->tensors_by_name, name);
}

Result<std::span<const std::byte>> Gguf::tensor_bytes(const TensorInfo& tensor) const {
    const State::File& file = state_->files[tensor.file];
    if (file.reader.read)
        return detail::make_error(ErrorKind::unsupported,
                                  file.name + ": a reader's tensors are not in memory");
    return file.bytes.subspan(static_cast<size_t>(tensor.offset),
                              static_cast<size_t>(tensor.bytes));
}

Result<void> Gguf::read_tensor(const TensorInfo& tensor, uint64_t offset,
                               std::span<std::byte> dst) const {
    const State::File& file = state_->files[tensor.file];
    if (offset > tensor.bytes || dst.size() > tensor.bytes - offset)
        return state_->fail(ErrorKind::invalid_request, tensor,
                            "is shorter than what is read of it");
    if (dst.empty()) return {};
    offset += tensor.offset;
    if (!file.reader.read)
        std::memcpy(dst.data(), file.bytes.data() + static_cast<size_t>(offset), dst.size());
    else if (!file.reader.read(file.reader.context, offset, dst.data(), dst.size()))
        return state_->fail(ErrorKind::io, tensor, "could not be read");
    return {};
}

void Gguf::release(const TensorInfo& tensor, uint64_t offset, uint64_t length) const {
    const State::File& file = state_->files[tensor.file];
    if (file.map.bytes().empty() || offset >= tensor.bytes) return;
    file.map.release(static_cast<size_t>(tensor.offset + offset),
                     static_cast<size_t>(std::min(length, tensor.bytes - offset)));
}

GgufWriter::GgufWriter(uint32_t alignment) : alignment_(alignment) {
    if (alignment != detail::gguf_default_alignment) set("general.alignment", alignment);
}

void GgufWriter::put(std::string_view key, GgufType type, bool is_array, uint64_t count,
                     std::string_view data) {
    detail::append_gguf_string(keys_, key);
    if (is_array) detail::append_gguf_number(keys_, static_cast<uint32_t>(GgufType::array), 4);
    detail::append_gguf_number(keys_, static_cast<uint32_t>(type), 4);
    if (is_array) detail::append_gguf_number(keys_, count, 8);
    keys_ += data;
    ++n_keys_;
}

void GgufWriter::set(const GgufKey& key) {
    put(key.name, key.type, key.is_array, key.count, detail::as_chars(key.data));
}

void GgufWriter::set_string(std::string_view key, std::string_view value) {
    std::string data;
    detail::append_gguf_string(data, value);
    put(key, GgufType::string, false, 1, data);
}

void GgufWriter::set_strings(std::string_view key, std::span<const std::string_view> values) {
    std::string data;
    for (std::string_view value : values) detail::append_gguf_string(data, value);
    put(key, GgufType::string, true, values.size(), data);
}

void GgufWriter::add_tensor(std::string_view name, TensorType type, std::span<const uint64_t> dims,
                            std::span<const std::byte> bytes) {
    TensorInfo info;
    info.type = type;
    info.n_dims = static_cast<uint32_t>(dims.size());  // more than 4 are refused when it is read
    std::copy_n(dims.begin(), std::min<size_t>(dims.size(), 4), info.dims);
    tensors_.push_back({std::string(name), info, bytes, {}});
}

void GgufWriter::add_tensor(const TensorInfo& tensor, GgufFill fill) {
    if (tensor.packed && !packed_) set("valar.packed", detail::packed_version);
    packed_ |= tensor.packed;
    tensors_.push_back({std::string(tensor.name), tensor, {}, fill});
    tensors_.back().info.name = {};
    detail::size_tensor(tensors_.back().info);  // what is wrong is said by check()
}

/// All that stands before the first tensor's bytes, padded.
Result<std::string> GgufWriter::header(uint64_t* file_bytes) const {
    if (alignment_ == 0)
        return detail::make_error(ErrorKind::invalid_request, "general.alignment is 0");
    std::string out;
    detail::append_gguf_number(out, detail::gguf_magic, 4);
    detail::append_gguf_number(out, 3, 4);
    detail::append_gguf_number(out, tensors_.size(), 8);
    detail::append_gguf_number(out, n_keys_, 8);
    out += keys_;
    uint64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
        const TensorInfo& info = tensor.info;
        detail::append_gguf_string(out, tensor.name);
        detail::append_gguf_number(out, info.n_dims, 4);
        for (uint32_t i = 0; i < std::min(info.n_dims, 4u); ++i)
            detail::append_gguf_number(out, info.dims[i], 8);
        const uint32_t packed = info.packed ? detail::packed_type_bit : 0;
        detail::append_gguf_number(out, static_cast<uint32_t>(info.type) | packed, 4);
        detail::append_gguf_number(out, offset, 8);
        offset = padded(offset + (tensor.fill.fill ? info.bytes : tensor.bytes.size()));
    }
    out.resize(static_cast<size_t>(padded(out.size())));
    *file_bytes = out.size() + offset;
    if (auto sound = check(out, *file_bytes); !sound) return sound.error();
    return out;
}

/// What Gguf refuses is not written; only whether the other split files exist is not asked.
Result<void> GgufWriter::check(std::string_view header, uint64_t file_bytes) const {
    Gguf::State gguf;
    Gguf::State::File file;
    file.name = "written model";
    file.bytes = std::as_bytes(std::span(header.data(), header.size()));
    file.size = file_bytes;
    if (auto done = gguf.parse_file(std::move(file)); !done) return done;
    for (size_t i = 0; i < tensors_.size(); ++i)
        if (!tensors_[i].fill.fill && gguf.tensors[i].bytes != tensors_[i].bytes.size())
            return detail::make_error(
                ErrorKind::invalid_request,
                "tensor '" + tensors_[i].name + "' has another size than its shape and type say");
    return gguf.index_tensors();
}

Result<void> GgufWriter::write_to(Sink sink, std::string_view header) const {
    auto done = sink.append(sink.context, std::as_bytes(std::span(header.data(), header.size())));
    for (size_t i = 0; done && i < tensors_.size(); ++i) done = write_tensor(sink, tensors_[i]);
    return done;
}

Result<void> GgufWriter::write_tensor(Sink sink, const Tensor& tensor) const {
    TensorInfo info = tensor.info;
    info.name = tensor.name;
    uint64_t bytes = tensor.bytes.size();
    Result<void> done;
    if (!tensor.fill.fill) {
        done = sink.append(sink.context, tensor.bytes);
    } else {
        bytes = info.bytes;
        const uint64_t rows = info.dims[1] * info.dims[2] * info.dims[3];
        const uint64_t tiles = (rows + packed_rows - 1) / packed_rows;
        const uint64_t each = info.packed ? bytes / tiles : bytes / rows * packed_rows;
        const uint64_t most = each * std::max<uint64_t>(1, detail::gguf_write_piece / each);
        auto buffer = detail::Buffer::allocate(std::min(bytes, most), "a piece of a tensor");
        if (!buffer) return buffer.error();
        for (uint64_t at = 0; done && at < bytes; at += most) {
            const std::span piece(buffer->data(), static_cast<size_t>(std::min(most, bytes - at)));
            done = tensor.fill.fill(tensor.fill.context, info, at, piece);
            if (done) done = sink.append(sink.context, piece);
        }
    }
    const std::vector<std::byte> padding(static_cast<size_t>(padded(bytes) - bytes));
    return done ? sink.append(sink.context, padding) : std::move(done);
}

Result<std::vector<std::byte>> GgufWriter::to_bytes() const {
    uint64_t file_bytes = 0;
    auto head = header(&file_bytes);
    if (!head) return head.error();
    std::vector<std::byte> out;
    out.reserve(static_cast<size_t>(file_bytes));
    const auto append = [](void* to, std::span<const std::byte> bytes) {
        auto& all = *static_cast<std::vector<std::byte>*>(to);
        all.insert(all.end(), bytes.begin(), bytes.end());
        return Result<void>();
    };
    if (auto done = write_to({append, &out}, *head); !done) return done.error();
    return out;
}

Result<void> GgufWriter::write(const std::string& path) const {
    uint64_t file_bytes = 0;
    auto head = header(&file_bytes);
    if (!head) return head.error();
    auto file = detail::NewFile::create(path);
    if (!file) return file.error();
    const auto append = [](void* to, std::span<const std::byte> bytes) {
        return static_cast<detail::NewFile*>(to)->append(bytes);
    };
    if (auto done = write_to({append, &*file}, *head); !done) return done;
    return file->commit();
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

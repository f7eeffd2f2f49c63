// >>gguf
// Owns: the model file: metadata, tensor directory, table of tensor types; the writer.
// Assumes: little-endian GGUF v2 or v3, in one file or in split files name-00001-of-0000N.gguf.
// Promises: every count, length, offset and product from the file is checked before it is used;
// errors name the file and the key or tensor. Nothing is copied: keys, strings and tensor names
// are views into the mapped file (or the caller's bytes), valid as long as the Gguf lives, and
// they stay valid when it is moved.
#pragma once

#include "base/base.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace valar {
inline namespace v1 {

/// How a tensor's numbers are stored; the values are those in the file. All of these are known, so
/// that any file opens; can_compute (>>kernels) says with which a model runs.
enum class TensorType : uint32_t {
    // clang-format off
    f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11,
    q4_k = 12, q5_k = 13, q6_k = 14, iq2_xxs = 16, iq2_xs = 17, iq3_xxs = 18, iq1_s = 19,
    iq4_nl = 20, iq3_s = 21, iq2_s = 22, iq4_xs = 23, i8 = 24, i16 = 25, i32 = 26, i64 = 27,
    f64 = 28, iq1_m = 29, bf16 = 30, tq1_0 = 34, tq2_0 = 35, mxfp4 = 39, nvfp4 = 40, q1_0 = 41,
    // clang-format on
};

/// A row is stored in blocks of `block_size` values, `block_bytes` each.
struct TypeInfo {
    const char* name;  // as people write it: "Q4_K"
    uint32_t block_size;
    uint32_t block_bytes;
};

/// A packed tensor is a matrix in the order in which the kernels read it: tiles of so many rows (the
/// last one filled up), each tile padded to this alignment. packed_bytes, pack_rows: >>kernels.
inline constexpr uint32_t packed_rows = 16;
inline constexpr uint32_t packed_alignment = 64;

/// Null for a type that is not known. Being known does not mean that kernels can compute with it.
VALAR_API const TypeInfo* type_info(TensorType type);

/// One entry of the directory. `dims[0]` is the length of a row, the fastest index in memory:
/// a matrix of `dims[1]` output rows by `dims[0]` input columns.
struct TensorInfo {
    std::string_view name;
    TensorType type = TensorType::f32;
    uint32_t n_dims = 0;  // 1 to 4; the rest of dims is 1
    uint64_t dims[4] = {1, 1, 1, 1};
    uint64_t offset = 0;  // from the start of its file
    uint64_t bytes = 0;
    uint32_t file = 0;    // index of the split file, 0 first
    bool packed = false;  // a matrix in tiles of packed_rows rows
};

/// Kinds of metadata values; the values are those in the file.
enum class GgufType : uint32_t {
    // clang-format off
    u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, boolean = 7, string = 8,
    array = 9, u64 = 10, i64 = 11, f64 = 12,
    // clang-format on
};

/// The strings of an array, in order; each is a view: for (std::string_view text : strings).
class GgufStrings {
public:
    class Iterator {
    public:
        explicit Iterator(const std::byte* at) : at_(at) {}
        std::string_view operator*() const {
            return {reinterpret_cast<const char*>(at_) + 8, length()};
        }
        Iterator& operator++() {
            at_ += 8 + length();
            return *this;
        }
        bool operator==(const Iterator& other) const { return at_ == other.at_; }

    private:
        size_t length() const {
            uint64_t n;
            std::memcpy(&n, at_, 8);
            return static_cast<size_t>(n);
        }
        const std::byte* at_;
    };
    GgufStrings() = default;
    GgufStrings(const std::byte* begin, const std::byte* end, size_t count)
        : begin_(begin), end_(end), count_(count) {}
    size_t size() const { return count_; }
    Iterator begin() const { return Iterator(begin_); }
    Iterator end() const { return Iterator(end_); }

private:
    const std::byte* begin_ = nullptr;
    const std::byte* end_ = nullptr;
    size_t count_ = 0;
};

/// The numbers of an array, of whatever width the file has; [i] needs i < size().
template <class T>
class GgufNumbers {
public:
    GgufNumbers() = default;
    GgufNumbers(const std::byte* data, size_t count, GgufType type)
        : data_(data), count_(count), type_(type) {}
    size_t size() const { return count_; }
    T operator[](size_t i) const {
        VALAR_ASSERT(i < count_);
        switch (type_) {
            case GgufType::u8:
            case GgufType::boolean: return load<uint8_t>(i);
            case GgufType::i8: return load<int8_t>(i);
            case GgufType::u16: return load<uint16_t>(i);
            case GgufType::i16: return load<int16_t>(i);
            case GgufType::u32: return load<uint32_t>(i);
            case GgufType::i32: return load<int32_t>(i);
            case GgufType::f32: return load<float>(i);
            case GgufType::u64: return load<uint64_t>(i);
            case GgufType::i64: return load<int64_t>(i);
            default: return load<double>(i);
        }
    }

private:
    template <class Stored>
    T load(size_t i) const {
        Stored value;
        std::memcpy(&value, data_ + i * sizeof value, sizeof value);  // the file does not align
        return static_cast<T>(value);
    }
    const std::byte* data_ = nullptr;
    size_t count_ = 0;
    GgufType type_ = GgufType::u8;
};

/// One metadata entry. For an array `type` is that of its elements.
struct GgufKey {
    std::string_view name;
    GgufType type = GgufType::u8;
    bool is_array = false;
    size_t count = 1;                      // elements
    std::span<const std::byte> data = {};  // as in the file; each string with its length before it
};

/// Bytes fetched on demand, for a model inside an archive. `read` fills `dst` with `size` bytes
/// from `offset` and returns whether it could; it is called from any thread that reads tensors.
struct GgufReader {
    bool (*read)(void* context, uint64_t offset, void* dst, size_t size) = nullptr;
    void* context = nullptr;
    uint64_t size = 0;           // of the whole file
    std::string name = "model";  // for messages
};

/// A model file, opened: metadata and directory parsed, tensor bytes within reach.
/// Threads: const members from any thread at a time.
class VALAR_API Gguf {
public:
    static constexpr uint64_t max_keys = 65536;
    static constexpr uint64_t max_tensors = 262144;
    static constexpr uint64_t max_name_bytes = 255;  // of a key or a tensor
    static constexpr uint64_t max_alignment = 1 << 20;
    static constexpr uint64_t max_split_files = 1024;
    static constexpr uint64_t max_header_bytes = 1 << 28;  // metadata and directory of a file

    Gguf();  // no file: only good to have one assigned
    Gguf(Gguf&&) noexcept;
    Gguf& operator=(Gguf&&) noexcept;
    ~Gguf();

    /// Maps the file; of split files, name the first and all are opened.
    static Result<Gguf> open(const std::string& path);
    /// Borrows `bytes` for its lifetime. `name` is for messages.
    static Result<Gguf> from_bytes(std::span<const std::byte> bytes, std::string name = "model");
    static Result<Gguf> from_reader(GgufReader reader);

    const std::string& name() const;
    uint32_t version() const;

    // Metadata of the first file. `find` gives null for a key that is absent. A getter without
    // `fallback` fails (not_found) where the key is absent; every getter fails where it has
    // another type, or a sign or size that does not fit.
    const std::vector<GgufKey>& keys() const;  // in the order of the file
    const GgufKey* find(std::string_view key) const;
    Result<uint64_t> get_uint(std::string_view key) const;  // any integer type, not negative
    Result<uint64_t> get_uint(std::string_view key, uint64_t fallback) const;
    Result<double> get_float(std::string_view key) const;  // f32 or f64
    Result<double> get_float(std::string_view key, double fallback) const;
    Result<bool> get_bool(std::string_view key) const;
    Result<bool> get_bool(std::string_view key, bool fallback) const;
    Result<std::string_view> get_string(std::string_view key) const;  // any bytes, maybe not UTF-8
    Result<std::string_view> get_string(std::string_view key, std::string_view fallback) const;
    Result<GgufStrings> get_strings(std::string_view key) const;
    Result<GgufNumbers<int64_t>> get_ints(std::string_view key) const;   // integers but u64, bools
    Result<GgufNumbers<double>> get_floats(std::string_view key) const;  // f32 or f64

    const std::vector<TensorInfo>& tensors() const;  // in the order of files
    const TensorInfo* find_tensor(std::string_view name) const;
    /// The bytes where they lie; `unsupported` for a reader. A mapped file keeps the alignment
    /// that the file states (32 by default); borrowed bytes only as far as the caller's span does.
    Result<std::span<const std::byte>> tensor_bytes(const TensorInfo& tensor) const;
    /// Copies dst.size() bytes from `offset` on within the tensor; every source can.
    Result<void> read_tensor(const TensorInfo& tensor, uint64_t offset,
                             std::span<std::byte> dst) const;
    /// These bytes of the tensor will not be read again soon (a hint; mapped files only).
    void release(const TensorInfo& tensor, uint64_t offset = 0, uint64_t length = UINT64_MAX) const;

private:
    friend class GgufWriter;
    struct State;
    std::unique_ptr<State> state_;
};

/// Makes the bytes of a tensor piece by piece, in order: those from `offset` on into all of `out`.
/// A piece begins at a row whose number is a multiple of packed_rows and, but for the last piece,
/// has a multiple of packed_rows rows. `tensor` is as it was added; an error ends the writing.
struct GgufFill {
    Result<void> (*fill)(void* context, const TensorInfo& tensor, uint64_t offset,
                         std::span<std::byte> out) = nullptr;
    void* context = nullptr;
};

/// Collects keys and tensors, then writes one GGUF v3 file. Whatever Gguf would refuse (a key or
/// tensor given twice, a size that does not match its shape) is reported by to_bytes and write.
/// Packed tensors want an alignment of packed_alignment, and bring their key.
class VALAR_API GgufWriter {
public:
    explicit GgufWriter(uint32_t alignment = 32);  // a power of two from 8 on

    void set_string(std::string_view key, std::string_view value);
    void set_strings(std::string_view key, std::span<const std::string_view> values);
    /// T is bool, float, double or an integer of 8 to 64 bits, and chooses the type in the file.
    template <class T>
    void set(std::string_view key, T value) {
        put(key, type_of<T>(), false, 1, {reinterpret_cast<const char*>(&value), sizeof value});
    }
    template <class T>
    void set_array(std::string_view key, std::span<const T> values) {
        put(key, type_of<T>(), true, values.size(),
            {reinterpret_cast<const char*>(values.data()), values.size_bytes()});
    }
    void set(const GgufKey& key);  // as another file has it
    /// `bytes` is borrowed until the file is written; dims[0] is the row length, as in TensorInfo.
    void add_tensor(std::string_view name, TensorType type, std::span<const uint64_t> dims,
                    std::span<const std::byte> bytes);
    /// Name, type, shape and whether it is packed are those of `tensor`; its bytes are made when the
    /// file is written, piece after piece.
    void add_tensor(const TensorInfo& tensor, GgufFill fill);

    Result<std::vector<std::byte>> to_bytes() const;
    /// Holds no more than a few MiB at a time. The file is whole or as it was before.
    Result<void> write(const std::string& path) const;

private:
    struct Tensor {
        std::string name;
        TensorInfo info;  // its name is empty: the string above may move
        std::span<const std::byte> bytes;
        GgufFill fill;  // instead of bytes
    };
    struct Sink {
        Result<void> (*append)(void* context, std::span<const std::byte> bytes);
        void* context;
    };
    template <class T>
    static constexpr GgufType type_of() {
        static_assert(std::is_integral_v<T> || std::is_same_v<T, float> ||
                      std::is_same_v<T, double>);
        if constexpr (std::is_same_v<T, bool>) return GgufType::boolean;
        else if constexpr (std::is_same_v<T, float>) return GgufType::f32;
        else if constexpr (std::is_same_v<T, double>) return GgufType::f64;
        else if constexpr (sizeof(T) == 8) return T(-1) < T(0) ? GgufType::i64 : GgufType::u64;
        else if constexpr (sizeof(T) == 4) return T(-1) < T(0) ? GgufType::i32 : GgufType::u32;
        else if constexpr (sizeof(T) == 2) return T(-1) < T(0) ? GgufType::i16 : GgufType::u16;
        else return T(-1) < T(0) ? GgufType::i8 : GgufType::u8;
    }
    void put(std::string_view key, GgufType type, bool is_array, uint64_t count,
             std::string_view data);
    Result<std::string> header(uint64_t* file_bytes) const;
    Result<void> check(std::string_view header, uint64_t file_bytes) const;
    Result<void> write_to(Sink sink, std::string_view header) const;
    Result<void> write_tensor(Sink sink, const Tensor& tensor) const;
    uint64_t padded(uint64_t n) const { return (n + alignment_ - 1) / alignment_ * alignment_; }

    std::string keys_;  // encoded as in the file
    uint64_t n_keys_ = 0;
    std::vector<Tensor> tensors_;
    uint32_t alignment_;
    bool packed_ = false;
};

}  // namespace v1
}  // namespace valar

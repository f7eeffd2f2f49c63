// >>json
// Owns: the Json value, its parser, its writer, its canonical form; numbers to and from text.
// Assumes: nothing about text. RFC 8259, strictly: what it leaves open is refused (duplicate keys,
// lone surrogates, invalid UTF-8, a byte order mark).
// Promises: integers exact to 64 bits, doubles correctly rounded both ways and printed as short as
// they read back the same, members in their order; no locale; output is always valid UTF-8.
#pragma once

#include "base/base.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {

/// How deep arrays and objects nest, and how many values a text holds, before it is refused.
inline constexpr uint32_t json_depth_limit = 128;
inline constexpr uint32_t json_value_limit = 2'000'000;

struct JsonLimits {
    uint32_t depth = json_depth_limit;
    uint32_t values = json_value_limit;
};

/// How a Json is written. Default: compact, {"a":[1,2]}. All keep non-ASCII characters.
struct JsonStyle {
    bool spaced = false;  ///< ", " and ": " as Python's json.dumps
    int indent = -1;      ///< 0 and more: one item a line, so many spaces a level, and ": "
};
inline constexpr JsonStyle json_pretty{false, 2};
inline constexpr JsonStyle json_python{true, -1};  ///< json.dumps(x, ensure_ascii=False)

struct JsonMember;
namespace detail {
class JsonParser;
}

/// A JSON value of 16 bytes. Objects keep the order of their members. Nothing converts silently:
/// an `as_` accessor of another kind gives its fallback, `[]` of a missing place gives null.
/// Copies are deep; copy, compare, write and destroy recurse as deep as the value nests.
/// Threads: const use from any number; otherwise one at a time. Stack: a quarter KiB a level.
class VALAR_API Json {
public:
    enum class Kind : uint8_t { null, boolean, int64, uint64, real, string, array, object };

    Json() noexcept = default;
    Json(std::nullptr_t) noexcept {}
    template <class T>
    requires std::is_arithmetic_v<T> Json(T value)
    noexcept {
        if constexpr (std::is_same_v<T, bool>) store(Kind::boolean, value);
        else if constexpr (std::is_floating_point_v<T>) store(Kind::real, double(value));
        else if constexpr (std::is_signed_v<T>) store(Kind::int64, int64_t(value));
        else if (uint64_t(value) > uint64_t(INT64_MAX)) store(Kind::uint64, uint64_t(value));
        else store(Kind::int64, int64_t(value));
    }
    Json(std::string_view text);
    Json(const char* text) : Json(std::string_view(text)) {}
    Json(std::string text);
    Json(std::vector<Json> items);
    Json(const void*) = delete;  // a pointer is not a boolean
    Json(Json&& other) noexcept : node_(std::exchange(other.node_, Node{})) {}
    Json(const Json& other);
    Json& operator=(Json other) noexcept {
        swap(other);
        return *this;
    }
    ~Json() {
        if (kind() >= Kind::string) destroy();
    }

    static Json array() { return Json(Kind::array); }
    static Json object() { return Json(Kind::object); }
    /// All of `text` as one value. Errors: invalid_request, code "invalid_json", line and column
    /// (both from 1; columns count code points).
    static Result<Json> parse(std::string_view text, JsonLimits limits = {});

    Kind kind() const { return node_.kind; }
    bool is_null() const { return node_.kind == Kind::null; }
    bool is_bool() const { return node_.kind == Kind::boolean; }
    bool is_int() const { return node_.kind == Kind::int64; }  ///< within int64_t
    bool is_integer() const { return node_.kind == Kind::int64 || node_.kind == Kind::uint64; }
    bool is_real() const { return node_.kind == Kind::real; }  ///< point, exponent, or huge
    bool is_number() const { return node_.kind >= Kind::int64 && node_.kind <= Kind::real; }
    bool is_string() const { return node_.kind == Kind::string; }
    bool is_array() const { return node_.kind == Kind::array; }
    bool is_object() const { return node_.kind == Kind::object; }

    bool as_bool(bool fallback = false) const;
    int64_t as_int(int64_t fallback = 0) const;     ///< an integer within int64_t
    uint64_t as_uint(uint64_t fallback = 0) const;  ///< an integer that is not negative
    double as_double(double fallback = 0) const;    ///< any number, to the nearest double
    /// Borrowed until this value is changed, moved or destroyed.
    std::string_view as_string(std::string_view fallback = {}) const;
    std::string take_string();  ///< moves a string out and leaves null; not a string: empty

    size_t size() const;  ///< items of an array, members of an object, else 0
    bool empty() const { return size() == 0; }
    std::span<const Json> items() const;  ///< of an array, else none
    std::span<Json> items();
    std::span<const JsonMember> members() const;  ///< of an object, in order, else none
    const Json& operator[](size_t index) const;   ///< null when there is no such item
    const Json& operator[](int index) const { return (*this)[size_t(index)]; }
    const Json& operator[](std::string_view key) const;  ///< null when there is no such member
    const Json& operator[](const char* key) const { return (*this)[std::string_view(key)]; }
    const Json* find(std::string_view key) const;  ///< nullptr when there is no such member
    Json* find(std::string_view key);
    bool contains(std::string_view key) const { return find(key) != nullptr; }

    /// Adds an item; null becomes an array first; any other kind is replaced by one.
    Json& push(Json value) &;
    Json push(Json value) && {
        push(std::move(value));
        return std::move(*this);
    }
    /// Adds or, in its place, replaces a member; null becomes an object first; any other kind is
    /// replaced by one. Returns *this: Json::object().set("a", 1).set("b", Json::array()).
    Json& set(std::string_view key, Json value) &;
    Json set(std::string_view key, Json value) && {
        set(key, std::move(value));
        return std::move(*this);
    }
    bool erase(std::string_view key);  ///< keeps the order of the others
    void reserve(size_t count);        ///< room for so many items or members

    std::string write(JsonStyle style = {}) const;
    void write_to(std::string& out, JsonStyle style = {}) const;  ///< appends
    /// One text per value, for fingerprints: keys sorted by code point, no white space, numbers
    /// that are whole and fit 64 bits as integers (1.0 = 1, -0 = 0), others as the shortest double.
    std::string canonical() const;

    void swap(Json& other) noexcept { std::swap(node_, other.node_); }
    /// Same kind and value; 1 and 1.0 differ. The order of members does not matter.
    bool operator==(const Json& other) const;

private:
    struct Object;
    struct Node {
        alignas(8) char bytes[14] = {};  // a scalar, a pointer, or a string of up to 14 bytes
        uint8_t short_size = 0;          // of that string; long_string: the bytes hold a pointer
        Kind kind = Kind::null;
    };
    static constexpr uint8_t long_string = 255;
    explicit Json(Kind kind) noexcept { node_.kind = kind; }  // an empty array or object
    template <class T>
    T load() const {
        T v;
        std::memcpy(&v, node_.bytes, sizeof v);
        return v;
    }
    template <class T>
    void store(Kind kind, T v) {
        node_.kind = kind;
        std::memcpy(node_.bytes, &v, sizeof v);
    }
    bool is_long() const { return node_.short_size == long_string; }
    const Object* object_or_null() const { return is_object() ? load<Object*>() : nullptr; }
    void store_text(std::string_view text);
    void destroy() noexcept;
    friend class detail::JsonParser;

    Node node_;
};

struct JsonMember {
    std::string key;
    Json value;
};

}  // namespace v1
}  // namespace valar

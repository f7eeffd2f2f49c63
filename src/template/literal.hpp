// Values as models write them, to JSON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// Reads one value byte by byte and writes it as JSON without white space: strings as soon as they
/// come, numbers and words when they end. What it has written is a prefix of valid JSON.
class LiteralReader {
public:
    enum class Style : uint8_t {
        json,
        python,  // 'a' or "a", True, None, (1, 2)
        gemma,   // keys without quotes, strings between marks of their own
    };
    enum class Status : uint8_t {
        more,
        done,   // with this byte
        ended,  // before this byte, which is not part of it
        wrong,
    };
    static constexpr size_t max_depth = 100;
    static constexpr size_t max_word = 400;

    explicit LiteralReader(Style style = Style::json, std::string_view quote = {})
        : style_(style), quote_(quote) {}
    Status push(char c, std::string& out);
    /// As push of a byte that is part of no value.
    Status finish(std::string& out) { return push('\0', out); }
    bool fresh() const { return fresh_; }  ///< nothing of the value has come
    /// In a list, an object or a string, which end with a byte of their own.
    bool inside() const { return !nest_.empty() || (in_ != In::structure && in_ != In::word); }

private:
    enum class Wants : uint8_t { value, value_or_end, key_or_end, key, colon, comma_or_end };
    enum class In : uint8_t { structure, word, opening, string, escape, hex };

    Status structure(char c, std::string& out);
    Status begin_value(char c, std::string& out);
    Status open(char c, std::string& out);
    Status close(char c, std::string& out);
    Status begin_string(char c, std::string& out);
    Status value_ended();
    Status end_word(std::string& out);
    Status string_byte(char c, std::string& out);
    Status quote_byte(char c, std::string& out);
    Status escape_byte(char c, std::string& out);
    Status hex_byte(char c, std::string& out);
    Status end_string(std::string& out);
    void put_code(uint32_t code, std::string& out);
    void put_byte(char c, std::string& out);
    void put_comma(std::string& out);

    Style style_;
    std::string quote_;  // gemma's
    In in_ = In::structure;
    Wants wants_ = Wants::value;
    std::string nest_;  // a '{', '[' or '(' a level
    std::string word_;
    char end_quote_ = 0;  // of the string; 0: quote_
    size_t matched_ = 0;  // bytes of quote_
    uint32_t code_ = 0;   // of an escape
    int hex_left_ = 0;
    uint32_t high_ = 0;   // the first half of a pair of surrogates
    bool comma_ = false;  // not yet written
    bool is_key_ = false;
    bool fresh_ = true;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/literal.hpp"
#include "template/syntax.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

bool is_word_byte(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '+' || c == '.' || c == '_' || c == '$';
}

bool is_value_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

/// As JSON has it, or nothing.
std::string_view json_word(std::string_view word, bool json_only) {
    for (std::string_view known : {"true", "false", "null"})
        if (word == known) return known;
    if (json_only) return {};
    const std::pair<std::string_view, std::string_view> words[] = {
        {"True", "true"}, {"False", "false"}, {"None", "null"}};
    for (const auto& [theirs, ours] : words)
        if (word == theirs) return ours;
    return {};
}

}  // namespace

LiteralReader::Status LiteralReader::push(char c, std::string& out) {
    switch (in_) {
        case In::structure: return structure(c, out);
        case In::opening: return quote_byte(c, out);
        case In::string: return string_byte(c, out);
        case In::escape: return escape_byte(c, out);
        case In::hex: return hex_byte(c, out);
        case In::word: break;
    }
    if (is_word_byte(c)) {
        if (word_.size() == max_word) return Status::wrong;
        word_ += c;
        return Status::more;
    }
    const Status ended = end_word(out);
    if (ended == Status::done) return Status::ended;
    return ended == Status::more ? structure(c, out) : ended;
}

LiteralReader::Status LiteralReader::structure(char c, std::string& out) {
    if (is_value_space(c)) return Status::more;
    fresh_ = false;
    switch (wants_) {
        case Wants::colon:
            if (c != ':') return Status::wrong;
            out += ':';
            wants_ = Wants::value;
            return Status::more;
        case Wants::comma_or_end:
            if (c != ',') return close(c, out);
            comma_ = true;
            wants_ = nest_.back() == '{' ? Wants::key : Wants::value;
            return Status::more;
        case Wants::key:
        case Wants::key_or_end:
            if (c == '}' && (wants_ == Wants::key_or_end || style_ != Style::json))
                return close(c, out);
            is_key_ = true;
            if (style_ == Style::gemma && is_word_byte(c)) {
                put_comma(out);
                word_ = c;
                in_ = In::word;
                return Status::more;
            }
            return begin_string(c, out);
        case Wants::value:
        case Wants::value_or_end: break;
    }
    const bool end = c == ']' || c == ')';
    if (end && (wants_ == Wants::value_or_end || (comma_ && style_ != Style::json)))
        return close(c, out);
    is_key_ = false;
    return begin_value(c, out);
}

LiteralReader::Status LiteralReader::begin_value(char c, std::string& out) {
    if (c == '{' || c == '[' || (c == '(' && style_ == Style::python)) return open(c, out);
    if (!is_word_byte(c)) return begin_string(c, out);
    put_comma(out);
    word_ = c;
    in_ = In::word;
    return Status::more;
}

LiteralReader::Status LiteralReader::open(char c, std::string& out) {
    if (nest_.size() == max_depth) return Status::wrong;
    put_comma(out);
    nest_ += c;
    out += c == '{' ? '{' : '[';
    wants_ = c == '{' ? Wants::key_or_end : Wants::value_or_end;
    return Status::more;
}

LiteralReader::Status LiteralReader::close(char c, std::string& out) {
    const char opened = nest_.empty() ? '\0' : nest_.back();
    const char closes = opened == '{' ? '}' : opened == '[' ? ']' : ')';
    if (opened == '\0' || c != closes) return Status::wrong;
    nest_.pop_back();
    comma_ = false;
    out += opened == '{' ? '}' : ']';
    return value_ended();
}

LiteralReader::Status LiteralReader::value_ended() {
    in_ = In::structure;
    wants_ = Wants::comma_or_end;
    return nest_.empty() ? Status::done : Status::more;
}

void LiteralReader::put_comma(std::string& out) {
    if (std::exchange(comma_, false)) out += ',';
}

LiteralReader::Status LiteralReader::end_word(std::string& out) {
    const std::string word = std::exchange(word_, {});
    if (is_key_) {
        out += '"';
        write_json_escaped(out, word);
        out += '"';
        in_ = In::structure;
        wants_ = Wants::colon;
        return Status::more;
    }
    std::string_view json = json_word(word, style_ == Style::json);
    if (json.empty()) {
        const auto number = Json::parse(word);
        if (!number || !number->is_number()) return Status::wrong;
        json = word;
    }
    out += json;
    return value_ended();
}

// ---- strings ----------------------------------------------------------------------------------

LiteralReader::Status LiteralReader::begin_string(char c, std::string& out) {
    const bool marked = style_ == Style::gemma && !quote_.empty() && c == quote_.front();
    if (!marked && c != '"' && !(c == '\'' && style_ == Style::python)) return Status::wrong;
    put_comma(out);
    end_quote_ = marked ? '\0' : c;
    matched_ = 1;
    in_ = marked ? In::opening : In::string;
    if (!marked) {
        out += '"';
        matched_ = 0;
    }
    return Status::more;
}

LiteralReader::Status LiteralReader::quote_byte(char c, std::string& out) {
    if (c != quote_[matched_]) return Status::wrong;
    if (++matched_ < quote_.size()) return Status::more;
    out += '"';
    matched_ = 0;
    in_ = In::string;
    return Status::more;
}

LiteralReader::Status LiteralReader::string_byte(char c, std::string& out) {
    if (end_quote_ == '\0') {
        if (c == quote_[matched_]) {
            if (++matched_ < quote_.size()) return Status::more;
            return end_string(out);
        }
        for (size_t i = 0; i < matched_; ++i) put_byte(quote_[i], out);
        matched_ = c == quote_.front() ? 1 : 0;
        if (matched_ == 0) put_byte(c, out);
        return Status::more;
    }
    if (c == end_quote_) return end_string(out);
    if (c == '\\') in_ = In::escape;
    else if (c == '\0') return Status::wrong;
    else put_byte(c, out);
    return Status::more;
}

LiteralReader::Status LiteralReader::end_string(std::string& out) {
    if (std::exchange(high_, 0)) out += "\xEF\xBF\xBD";
    out += '"';
    matched_ = 0;
    if (!is_key_) return value_ended();
    in_ = In::structure;
    wants_ = Wants::colon;
    return Status::more;
}

LiteralReader::Status LiteralReader::escape_byte(char c, std::string& out) {
    static constexpr std::string_view from = "ntrbf\"\\/'", to = "\n\t\r\b\f\"\\/'";
    const bool python = style_ == Style::python;
    in_ = In::string;
    if (c == 'u' || (python && (c == 'x' || c == 'U'))) {
        hex_left_ = c == 'u' ? 4 : c == 'x' ? 2 : 8;
        code_ = 0;
        in_ = In::hex;
        return Status::more;
    }
    const size_t at = from.find(c);
    if (at != std::string_view::npos && (python || c != '\'')) put_byte(to[at], out);
    else if (!python || c == '\0') return Status::wrong;
    else if (c != '\n') {  // as Python: the backslash stays
        put_byte('\\', out);
        put_byte(c, out);
    }
    return Status::more;
}

LiteralReader::Status LiteralReader::hex_byte(char c, std::string& out) {
    const int digit = hex_value(c);
    if (digit < 0 || code_ > 0x10FFFF) return Status::wrong;
    code_ = code_ * 16 + static_cast<uint32_t>(digit);
    if (--hex_left_ > 0) return Status::more;
    in_ = In::string;
    put_code(code_, out);
    return Status::more;
}

/// Two escapes may stand for one character; half of one alone is none.
void LiteralReader::put_code(uint32_t code, std::string& out) {
    const uint32_t high = std::exchange(high_, 0);
    const bool low = code >= 0xDC00 && code < 0xE000;
    if (high != 0 && low) code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00);
    else if (high != 0) out += "\xEF\xBF\xBD";
    if (code >= 0xD800 && code < 0xDC00) {
        high_ = code;
        return;
    }
    std::string made;
    utf8_append(made, (code >= 0xDC00 && code < 0xE000) || code > 0x10FFFF ? 0xFFFD : code);
    write_json_escaped(out, made);
}

/// Bytes of a longer character come one by one.
void LiteralReader::put_byte(char c, std::string& out) {
    if (c == kTokenBegin || c == kTokenEnd) return;
    if (std::exchange(high_, 0)) out += "\xEF\xBF\xBD";
    if (static_cast<uint8_t>(c) >= 0x80) out += c;
    else write_json_escaped(out, std::string_view(&c, 1));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

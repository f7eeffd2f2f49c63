#include "prologue.hpp"

#include "http/text.hpp"

#include <array>
#include <string>
#include <string_view>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Characters (RFC 9110, section 5.6.2; RFC 3986, section 3.2.2) ---------------------------

namespace {
constexpr auto http_classes = [] {
    std::array<uint8_t, 256> classes = {};
    const auto mark = [&](std::string_view characters, int bits) {
        for (const char c : characters) {
            uint8_t& entry = classes[static_cast<uint8_t>(c)];
            entry = static_cast<uint8_t>(entry | bits);
        }
    };
    for (size_t c = 0x21; c < 0x7F; ++c) classes[c] = http_visible;
    for (size_t c = 0; c < 0x20; ++c) classes[c] = c == '\t' ? 0 : http_control;
    classes[0x7F] = http_control;
    mark("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", http_token | http_name);
    mark("0123456789-._", http_token | http_name);
    mark("!#$%&'*+^`|~", http_token);
    return classes;
}();
}  // namespace

bool http_is(char c, int bits) { return (http_classes[static_cast<uint8_t>(c)] & bits) != 0; }

bool http_all(std::string_view text, int bits) {
    for (const char c : text)
        if (!http_is(c, bits)) return false;
    return !text.empty();
}

bool http_same(std::string_view a, std::string_view b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i)
        if (ascii_lower(a[i]) != ascii_lower(b[i])) return false;
    return true;
}

/// The last element of a comma-separated list, which is cut from it.
std::string_view http_pop(std::string_view* list) {
    const size_t comma = list->rfind(',');
    const std::string_view last = comma == list->npos ? *list : list->substr(comma + 1);
    *list = comma == list->npos ? std::string_view() : list->substr(0, comma);
    return trim(last);
}

bool http_listed(const HttpHeaders& headers, std::string_view name, std::string_view token) {
    for (const auto& [key, value] : headers) {
        if (!http_same(key, name)) continue;
        for (std::string_view list = value; !list.empty();)
            if (http_same(http_pop(&list), token)) return true;
    }
    return false;
}

/// Decimal digits and nothing else, no wrap.
bool http_decimal(std::string_view text, uint64_t* value) {
    *value = 0;
    for (const char c : text) {
        const auto digit = static_cast<uint64_t>(c - '0');
        if (c < '0' || c > '9' || *value > (UINT64_MAX - digit) / 10) return false;
        *value = *value * 10 + digit;
    }
    return !text.empty();
}

/// "name", "name:port" or "[v6]:port" in lower case, an empty port dropped; empty if invalid.
/// Narrower than RFC 3986, whose names may hold sub-delims and escapes: no DNS name does.
std::string http_host(std::string_view text) {
    const size_t bracket = text.rfind(']');
    const size_t colon = text.find(':', bracket == text.npos ? 0 : bracket);
    const std::string_view name = text.substr(0, colon);
    const std::string_view port = colon == text.npos ? "" : text.substr(colon + 1);
    uint64_t number = 0;
    if (!port.empty() && (port.size() > 5 || !http_decimal(port, &number) || number > 65535))
        return {};
    const bool v6 = !name.empty() && name.front() == '[' && name.back() == ']';
    if (v6 ? !NetAddress::parse(name, 0) : !http_all(name, http_name)) return {};
    std::string host(port.empty() ? name : text);
    for (char& c : host) c = ascii_lower(c);
    return host;
}

const std::string* find_header(const HttpHeaders& headers, std::string_view name) {
    for (const auto& [key, value] : headers)
        if (http_same(key, name)) return &value;
    return nullptr;
}

size_t count_headers(const HttpHeaders& headers, std::string_view name) {
    size_t count = 0;
    for (const auto& header : headers) count += http_same(header.first, name);
    return count;
}

// ---- Writing ---------------------------------------------------------------------------------

const char* http_phrase(int status) {
    static constexpr struct {
        int status;
        const char* phrase;
        // clang-format off
    } phrases[] = {
        {200, "OK"}, {202, "Accepted"}, {204, "No Content"}, {304, "Not Modified"},
        {400, "Bad Request"}, {401, "Unauthorized"}, {403, "Forbidden"}, {404, "Not Found"},
        {405, "Method Not Allowed"}, {408, "Request Timeout"}, {409, "Conflict"},
        {411, "Length Required"}, {413, "Content Too Large"}, {414, "URI Too Long"},
        {415, "Unsupported Media Type"}, {417, "Expectation Failed"}, {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"},
        {501, "Not Implemented"}, {502, "Bad Gateway"}, {503, "Service Unavailable"},
        {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"}};
    // clang-format on
    for (const auto& row : phrases)
        if (row.status == status) return row.phrase;
    return "";
}

std::string http_date(int64_t unix_seconds) {
    const CivilTime t = civil_time(unix_seconds);
    return format("%.3s, %02d %.3s %04d %02d:%02d:%02d GMT",
                  &"SunMonTueWedThuFriSat"[t.weekday * 3], t.day,
                  &"JanFebMarAprMayJunJulAugSepOctNovDec"[(t.month - 1) * 3],
                  static_cast<int>(t.year), t.hour, t.minute, t.second);
}

bool http_field_ok(const std::pair<std::string, std::string>& field) {
    for (const char c : field.second)
        if (http_is(c, http_control)) return false;
    return http_all(field.first, http_token);
}

/// What the framing itself writes; a handler's own would make two of them.
bool http_own_field(std::string_view name) {
    for (const char* own : {"Date", "Connection", "Content-Length", "Transfer-Encoding"})
        if (http_same(name, own)) return true;
    return false;
}

void http_append(std::string* out, std::initializer_list<std::string_view> parts) {
    for (const std::string_view part : parts) out->append(part);
}

/// The caller's fields; one that could break out of its line is left out.
void http_append_fields(std::string* out, const HttpHeaders& headers) {
    for (const auto& field : headers)
        if (http_field_ok(field) && !http_own_field(field.first))
            http_append(out, {field.first, ": ", field.second, "\r\n"});
}

uint64_t http_now_ms() { return monotonic_ns() / 1'000'000; }

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

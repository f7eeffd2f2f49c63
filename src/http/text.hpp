// Characters and lists of HTTP, and what a message is written with.
#pragma once

#include "base/text.hpp"
#include "http/internal.hpp"

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

enum HttpClass : uint8_t { http_token = 1, http_visible = 2, http_control = 4, http_name = 8 };

bool http_is(char c, int bits);
bool http_all(std::string_view text, int bits);
bool http_same(std::string_view a, std::string_view b);
std::string_view http_pop(std::string_view* list);
bool http_listed(const HttpHeaders& headers, std::string_view name, std::string_view token);
bool http_decimal(std::string_view text, uint64_t* value);
std::string http_host(std::string_view text);
const char* http_phrase(int status);
std::string http_date(int64_t unix_seconds);
bool http_field_ok(const std::pair<std::string, std::string>& field);
bool http_own_field(std::string_view name);
void http_append(std::string* out, std::initializer_list<std::string_view> parts);
void http_append_fields(std::string* out, const HttpHeaders& headers);
uint64_t http_now_ms();

}  // namespace detail
}  // namespace v1
}  // namespace valar

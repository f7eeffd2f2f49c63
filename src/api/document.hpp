// JSON Schemas (2020-12) of requests and answers, for GET /openapi.json. Those of requests are made by
// the tables that check requests; those of answers are learnt from what is rendered for samples.
#pragma once

#include "api/surface.hpp"

#include <cstddef>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Schemas of values ---------------------------------------------------------------------------

using DocFields = std::initializer_list<std::pair<std::string_view, Json>>;
Json doc_type(std::string_view type);
Json doc_text(size_t least = 0, size_t most = SIZE_MAX);  ///< in characters
Json doc_word(std::string_view word);                     ///< this and no other
Json doc_words(std::span<const std::string_view> words);
Json doc_array(Json items, size_t least = 0, size_t most = SIZE_MAX);
Json doc_any(std::initializer_list<Json> choices);  ///< one of them; an anyOf is spread out
Json doc_or_null(Json schema);
Json doc_ref(std::string_view name);  ///< to one of components/schemas
/// The first `required` of the fields must be there; null is as if the others were not.
Json doc_object(size_t required, DocFields fields);
/// {type: T, ...} as Chat Completions write it: {type: T, T: {...}}.
Json doc_nested(const Json& flat);

// ---- Schemas of requests (api.cpp, surface.cpp) --------------------------------------------------

/// Of the fields of a body of POST /v1/responses. One that is refused may only be null.
Json doc_fields(Dialect dialect);
Json doc_request(Dialect dialect);
Json doc_request(const Surface& surface, Dialect dialect);
/// Null is as if one that is not required were not there.
Json doc_body(Json fields, std::span<const std::string_view> required);
Json doc_content(bool assistant);  ///< a string, or an array of parts
Json doc_item();
Json doc_format(bool custom);  ///< of an answer, or of a custom tool's input
Json doc_tool();
Json doc_tool_choice();

Json doc_error();  ///< the body of every refusal (response.cpp)

// ---- Schemas of answers --------------------------------------------------------------------------

/// Widens a schema, so that the value fits too. Objects that name their `type` are told apart by it.
void doc_learn(Json* schema, const Json& value);
/// How a surface's schemas are called (null: /v1/responses): NAME, NAMERequest, NAMEEvent and, with
/// what is around its JSON, NAMESentEvent.
std::string doc_name_of(const Surface* surface);
/// Adds them, those of events where the surface streams in this dialect.
void doc_add_surface(Json* schemas, const Surface* surface, Dialect dialect);
/// Adds those that all surfaces refer to.
void doc_add_shared(Json* schemas);

// ---- What a request has beyond it ----------------------------------------------------------------

/// The fields of a body that nothing here reads, without the places in arrays: "a, b.c", printable,
/// at most 512 bytes. Threads: any.
std::string ignored_fields(const Json& body, const Surface* surface, Dialect dialect);

}  // namespace detail
}  // namespace v1
}  // namespace valar

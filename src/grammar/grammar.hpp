// >>grammar
// Owns: what the model must say: JSON Schema, regular expressions, choices, GBNF and compositions of
//       them as one automaton over bytes with a stack; which tokens may come next.
// Assumes: schemas, patterns and grammars may be hostile.
// Promises: every text that is accepted is valid (strict); some spelling of whatever is valid is
//           accepted; no state from which no text ends; bounds are counted, never unrolled.
#pragma once

#include "grammar/mask.hpp"
#include "grammar/regex.hpp"
#include "json.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// strict: what cannot be promised is an error. Otherwise such keywords are left out, where leaving
/// them out only allows more, and refused where the rest would be wrong without them.
struct SchemaOptions {
    bool strict = true;
    JsonSpace space = JsonSpace::optional;
};

/// Errors of all: invalid_request, code invalid_json_schema; the message names the JSON pointer and
/// the keyword, and `param` is the pointer.
Result<GrammarPtr> compile_json_schema(const Json& schema, const SchemaOptions& options = {});
/// The whole text matches the pattern.
Result<GrammarPtr> compile_regex(std::string_view pattern);
Result<GrammarPtr> compile_choices(std::vector<std::string> choices);
/// llama.cpp's grammars; the text is what `root` stands for.
Result<GrammarPtr> compile_gbnf(std::string_view text);

/// The same as parts of a larger grammar. The builder's `space` is the schema's.
Result<Part> add_json_schema(GrammarBuilder& builder, const Json& schema, bool strict);
Result<Part> add_regex(GrammarBuilder& builder, std::string_view pattern);
/// `search`: the pattern may stand anywhere. Repeats that are too many for an automaton are counted.
Result<Part> add_pattern_part(GrammarBuilder& builder, std::string_view pattern, Spelling spelling,
                              bool search);
Result<Part> add_gbnf(GrammarBuilder& builder, std::string_view text,
                      Spelling spelling = Spelling::raw);

}  // namespace detail
}  // namespace v1
}  // namespace valar

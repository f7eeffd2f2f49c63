// Regular expressions (what of ECMA-262 is regular) and the formats of JSON Schema as automata.
#pragma once

#include "grammar/dfa.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr size_t most_pattern_bytes = 2048;
inline constexpr uint32_t most_repeats = 100'000;

/// How characters are spelled: as UTF-8, or as in a JSON string, where escapes stand for quotes,
/// backslashes and controls, each in one spelling only.
enum class Spelling : uint8_t { raw, json };

struct CodeRange {
    uint32_t low, high;
};

/// The tree of an expression.
struct Regex {
    enum class Kind : uint8_t { empty, set, sequence, choice, repeat, begin, end };
    struct Node {
        Kind kind = Kind::empty;
        uint32_t least = 0, most = 0;  // repeat
        std::vector<uint32_t> parts = {};
        std::vector<CodeRange> set = {};  // ascending, apart
    };
    std::vector<Node> nodes;
    uint32_t root = 0;
    uint32_t add(Node node) {
        nodes.push_back(std::move(node));
        return uint32_t(nodes.size() - 1);
    }
};
/// Digits at `*at`, at most one above the limit of repeats; false: there are none.
bool take_count(std::string_view text, size_t* at, uint32_t* value);
/// Errors: invalid_request, code invalid_json_schema; the message names what is refused and where.
Result<Regex> parse_regex(std::string_view pattern);
/// `search`: the expression may stand anywhere in the text. Errors: `too_large` among them where
/// repeats would have to be unrolled too often.
Result<DfaPtr> regex_dfa(const Regex& regex, uint32_t root, Spelling spelling, bool search,
                         Budget& budget);
bool is_too_large(const Error& error);
Result<DfaPtr> pattern_dfa(std::string_view pattern, Spelling spelling, bool search,
                           Budget& budget);

/// Any text; made once. As a JSON string between its quotes: with every escape that JSON has, a
/// surrogate pair being one character, or in `Spelling::json`.
const DfaPtr& any_string_dfa();
const DfaPtr& any_text_dfa(Spelling spelling);
bool is_format(std::string_view name);
uint32_t most_format_chars(std::string_view name);  ///< counted, not in the automaton; 0: no format
Result<DfaPtr> format_dfa(std::string_view name, Spelling spelling);
}  // namespace detail
}  // namespace v1
}  // namespace valar

// A schema as a document: references, places, and whether a value is valid.
#pragma once

#include "grammar/regex.hpp"
#include "json.hpp"

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr const char* reference_keywords[] = {"$ref", "$dynamicRef", "$recursiveRef"};

/// Threads: one at a time.
class SchemaDocument {
public:
    SchemaDocument(const Json& root, Budget& budget) : root_(root), budget_(budget) {}
    /// The limits of the contract, and that every keyword has a value of its kind.
    Result<void> check();
    /// Whether there is no room to recurse, also through the document's own values.
    bool stack_is_low() const { return stack_.is_low(values_nesting_ * 400); }
    /// What a schema's keyword refers to; null: not in this document.
    const Json* resolve(const Json& schema, const char* keyword);
    std::string pointer(const Json& schema) const;
    bool refs_hide_siblings() const;  ///< draft 7 and before
    Error refuse(const Json& schema, std::string_view keyword, std::string_view why) const;
    /// By every keyword that a schema may be compiled with. `depth` ends references that go round.
    bool is_valid(const Json& schema, const Json& value, int depth = 0);
    Result<DfaPtr> pattern(const std::string& pattern, Spelling spelling);
    bool matches(const std::string& pattern, std::string_view text);

    /// Schemas that no document holds: made here, kept as long as this.
    const Json* make(Json schema) {
        made_.push_back(std::move(schema));
        return &made_.back();
    }
    const Json& anything() const { return anything_; }  ///< the schema true

private:
    bool is_valid_object(const Json& schema, const Json& value, int depth);
    bool is_valid_array(const Json& schema, const Json& value, int depth);
    bool is_valid_number(const Json& schema, const Json& value);
    bool is_valid_string(const Json& schema, std::string_view text);
    bool may_keep(std::string_view uri);
    void index(const Json& at, const std::string* base, int depth, bool named = false);
    const Json& root_;
    Budget& budget_;
    const StackLimit stack_ = {};
    size_t values_nesting_ = 0;                  // of what enum and const hold
    std::map<std::string, const Json*> by_uri_;  // resources, and their anchors behind a #
    std::deque<std::string> uris_;               // bases, each once; the first is the empty one
    std::unordered_map<const Json*, const std::string*> bases_;  // empty ones are left out
    std::map<std::string, int, std::less<>> dynamic_;  // how often each dynamic anchor is there
    std::deque<Json> made_;
    const Json anything_ = Json(true);
    std::map<std::pair<std::string, Spelling>, DfaPtr> patterns_;
    friend class SchemaCompiler;
};

/// 1 and 1.0 are equal, in arrays and objects too.
bool same_json(const Json& a, const Json& b);
bool is_whole_number(const Json& value);

}  // namespace detail
}  // namespace v1
}  // namespace valar

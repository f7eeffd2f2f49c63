// Names of fields that are none of ours.
#include "prologue.hpp"

#include "api_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

namespace {

/// Fields of other surfaces, and what stands for them here.
struct ForeignField {
    std::string_view name;
    const char* here;
};
constexpr ForeignField foreign_fields[] = {
    {"messages", "'input'"},
    {"contents", "'input'"},
    {"system", "'instructions'"},
    {"system_prompt", "'instructions'"},
    {"max_tokens", "'max_output_tokens'"},
    {"max_completion_tokens", "'max_output_tokens'"},
    {"max_new_tokens", "'max_output_tokens'"},
    {"n_predict", "'max_output_tokens'"},
    {"num_predict", "'max_output_tokens'"},
    {"response_format", "'text.format'"},
    {"format", "'text.format'"},
    {"json_schema", "'text.format'"},
    {"grammar", "'text.format'"},
    {"guided_json", "'text.format'"},
    {"guided_regex", "'text.format'"},
    {"guided_choice", "'text.format'"},
    {"guided_grammar", "'text.format'"},
    {"output_config", "'text.format'"},
    {"reasoning_effort", "'reasoning.effort'"},
    {"thinking", "'reasoning.effort'"},
    {"functions", "'tools'"},
    {"function_call", "'tool_choice'"},
    {"stop_sequences", "'stop'"},
    {"repeat_penalty", "'repetition_penalty'"},
    {"logprobs", "'include': [\"message.output_text.logprobs\"]"},
    {"n", "a request for each answer"},
    {"best_of", "a request for each answer"},
};
constexpr size_t most_edits = 2, most_strange_names = 64;

/// Letters to change, add or take away; more than most_edits where the lengths say so.
size_t count_edits(std::string_view a, std::string_view b) {
    if (std::max(a.size(), b.size()) - std::min(a.size(), b.size()) > most_edits)
        return most_edits + 1;
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 0; i < a.size(); ++i) {
        size_t corner = std::exchange(row[0], i + 1);
        for (size_t j = 0; j < b.size(); ++j) {
            const size_t change = corner + (a[i] != b[j]);
            corner = row[j + 1];
            row[j + 1] = std::min({change, row[j + 1] + 1, row[j] + 1});
        }
    }
    return row[b.size()];
}

Fault check_strange_name(const std::string& name, std::span<const std::string_view> ours) {
    for (const ForeignField& row : foreign_fields)
        if (row.name == name)
            return api_error("unknown_parameter", name,
                             join({"'", name, "' is of another surface: here it is ", row.here}));
    for (const std::string_view own : ours)
        if (count_edits(name, own) <= most_edits)
            return api_error("unknown_parameter", name,
                             join({"there is no '", name, "': did you mean '", own, "'?"}));
    return {};
}

}  // namespace

Fault check_names(const Json& body, std::span<const std::string_view> ours) {
    size_t strange = 0;
    for (const JsonMember& member : body.members()) {
        if (std::find(ours.begin(), ours.end(), member.key) != ours.end()) continue;
        if (++strange > most_strange_names) break;
        if (Fault fault = check_strange_name(member.key, ours)) return fault;
    }
    return {};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

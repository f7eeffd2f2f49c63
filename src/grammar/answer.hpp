// What an answer must look like in the syntax of a model's family: thought, text, calls.
#pragma once

#include "digest_internal.hpp"
#include "grammar/grammar.hpp"
#include "template/syntax.hpp"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

struct AnswerShape {
    const AnswerSyntax* syntax = nullptr;
    ThoughtState thought = ThoughtState::free;
    bool may_think = true;             ///< where the thought is free: whether one may begin
    std::span<const Tool> tools = {};  ///< those of `choice` alone may be called
    ToolChoice choice = {};
    bool parallel = true;                    ///< else one call at most
    std::optional<uint32_t> max_calls = {};  ///< 1 or more
    const v1::Format* format = nullptr;      ///< of the message; null: any text
    /// Calls whose results the model has before it: as it says one again without the family's
    /// marks, with these arguments (JSON, written as Json::write does) and maybe more, that is text.
    std::span<const Item> answered = {};
};

/// [thought] then a message, calls, or with `automatic` a text and calls after it; null where any
/// text will do. A call's arguments stand in the family's own way and read back (answer_parser) as
/// JSON that fits the tool's schema, or, of a tool that is not strict, as a JSON object.
/// Errors: as compile_json_schema; also for schemas of strict tools that the family's way to write
/// arguments cannot hold.
Result<GrammarPtr> compile_answer(const AnswerShape& shape);

/// Compiled answers, at most so many and `most_bytes` of them, the latest used: requests with the
/// same tools and format share one. Threads: any.
class AnswerCache {
public:
    static constexpr size_t most_entries = 256, most_bytes = 32u << 20;
    Result<GrammarPtr> compile(const AnswerShape& shape);

private:
    struct Entry {
        Hash256 key;
        GrammarPtr grammar;
        size_t bytes;
    };
    std::mutex mutex_;
    std::vector<Entry> entries_;  // the latest used last
    size_t bytes_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

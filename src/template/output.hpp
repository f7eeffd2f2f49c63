// What a model writes, taken apart: messages, thoughts, calls of tools.
#pragma once

#include "api.hpp"

#include <memory>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

/// Who learns of an answer's items, one after the other: each is begun, extended, ended.
class OutputSink {
public:
    virtual ~OutputSink() = default;
    /// A message, a thought, or a call of the tool `name`. The item before it was ended.
    virtual void begin_item(Item::Kind kind, std::string_view name = {}) = 0;
    /// More text of the item under way (of a function call: of its arguments as JSON, whatever the
    /// model's own syntax is; of a custom tool's: of its input). Whole characters.
    virtual void extend_item(std::string_view text) = 0;
    virtual void end_item() = 0;
};

/// A token that is not a piece of text alone.
struct OutputMark {
    std::string_view spelling;
    bool is_text = false;  ///< a user-defined token: text that is always taken whole
    bool ends = false;     ///< one that ends a turn: Tokenizer::is_end()
};

/// Knows the marks of a family in what a model writes; made for one answer. It is total: what
/// cannot be a thought or a call is text of a message, and nothing that a model writes is an error.
/// What it has begun it cannot take back, so it holds back what may still become something else;
/// a call is begun once it is certain to be one.
/// Threads: one at a time.
class OutputParser {
public:
    virtual ~OutputParser() = default;
    /// The text of ordinary tokens, as much as became ready: whole characters, cut anywhere else.
    virtual void text(std::string_view more, OutputSink& out) = 0;
    /// A control or user-defined token; the text before it has come. True: the answer ends here.
    virtual bool mark(const OutputMark& mark, OutputSink& out) = 0;
    /// Nothing more comes: what is held back goes out. `whole`: the model ended it by itself; else
    /// it was cut. A call that is not complete then stays without an end, and its reader drops it.
    virtual void finish(bool whole, OutputSink& out) = 0;
    /// Whether what comes next belongs to a thought: such tokens are counted.
    virtual bool thinking() const { return false; }
};

/// Of a model without marks: all text is one message.
std::unique_ptr<OutputParser> plain_output();
/// Likewise of a prompt that no template made: control tokens end the answer.
std::unique_ptr<OutputParser> raw_output();

}  // namespace detail
}  // namespace v1
}  // namespace valar

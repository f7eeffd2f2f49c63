// How the families of models write thoughts and calls of tools: a row each.
#pragma once

#include "template/internal.hpp"
#include "template/output.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// How a call and its arguments are written.
enum class CallStyle : uint8_t {
    object,    // {"name": "f", "arguments": {"k": 1}}
    named,     // a mark, the name, {"k": 1}
    tagged,    // the name, then each argument between marks; strings as they are
    python,    // f(k=1)
    gemma,     // call:f{k:1}, strings between marks of their own
    channels,  // harmony: to=functions.f in the head of a message of its own
};

/// In a row's texts: a number (of the call, from 0), an identifier, and `true` before a string
/// argument, `false` before another.
inline constexpr char kCallNumber = '\1', kCallId = '\2', kIsString = '\3';

/// Calls of one family: `open`, then per call `before` NAME `after_name` ARGUMENTS `after`, with
/// `between` two calls, then `close`. A model may write other white space where these have some.
struct CallSyntax {
    std::string_view name;                         // as --tool-format has it
    std::array<std::string_view, 3> found_by;      // all stand in the template or what it renders
    std::array<std::string_view, 2> found_tokens;  // or all are special tokens of the vocabulary
    CallStyle style;
    std::array<std::string_view, 2> marks;  // with one of these calls begin
    std::string_view open, before, after_name, after, between, close;
    // tagged: around each argument; gemma, `key`: around a string
    std::string_view key = {}, value = {}, value_end = {};
};
std::span<const CallSyntax> call_syntaxes();

/// Thoughts of one family. Texts of several marks have white space that a model may vary.
struct ThoughtSyntax {
    std::string_view name;
    std::array<std::string_view, 2> found_by;  // as above
    std::string_view open, close;
    std::array<std::string_view, 4> ignored = {};  // marks around the answer itself
};
std::span<const ThoughtSyntax> thought_syntaxes();

/// The rows of one model, their special tokens marked as such.
struct AnswerSyntax {
    struct Calls {
        std::string_view name;
        CallStyle style = CallStyle::object;
        std::vector<std::string> marks;
        std::string open, before, after_name, after, between, close, key, value, value_end;
        bool begin_with_mark() const;  // so that they may stand after a text
    };
    struct Thought {
        std::string open, close;  // empty: none
        std::vector<std::string> ignored;
    };
    Calls calls;
    Thought thought;
    std::vector<std::pair<std::string, Token>> tokens;  // special ones that occur in them
    bool has_thought() const { return !thought.open.empty(); }
    bool channels() const { return calls.style == CallStyle::channels; }
};

/// A call in a text, as the family writes it; where that is no text (channels), as hermes does.
struct WrittenCall {
    std::string_view name, id;
    Json arguments;  // an object
    size_t number;   // among the conversation's calls
};
std::string written_calls(std::span<const WrittenCall> calls, const AnswerSyntax* syntax);

/// The control and user-defined tokens of a vocabulary.
class SpecialTokens {
public:
    SpecialTokens() = default;
    explicit SpecialTokens(const Tokenizer& tokenizer);
    void add(std::string spelling, Token token);
    bool has(std::string_view spelling) const { return token(spelling) >= 0; }
    Token token(std::string_view spelling) const;  ///< -1: none

private:
    std::vector<std::pair<std::string, Token>> tokens_;  // sorted
};

/// What `chat_template` and the vocabulary tell of a model. `tool_format`: the name of a row of
/// call_syntaxes(); empty: found. Errors: invalid_request for an unknown name.
Result<AnswerSyntax> find_answer_syntax(const ChatTemplate& chat_template,
                                        const SpecialTokens& special,
                                        std::string_view tool_format = {});

/// Where a rendered prompt leaves the model: what it writes next.
enum class ThoughtState : uint8_t {
    free,    // a thought or the answer
    open,    // in a thought that the template has begun
    closed,  // the answer: the template wrote an empty thought, or its end
};
/// Only bytes of the template count: marks in a request's text are text.
ThoughtState thought_state(const MarkedText& prompt, const AnswerSyntax& syntax);

/// Kinds of JSON values, as bits.
enum : uint8_t { kString = 1, kNull = 2, kBoolean = 4, kNumber = 8, kList = 16, kAll = 31 };

uint8_t argument_kind(const Json& value);
/// What a schema allows as far as its types, constants and unions say it.
uint8_t argument_kinds_of(const Json& schema, const Json& root);
/// What a reference into `root` names; any other schema itself.
const Json& resolved_schema(const Json& schema, const Json& root);

struct AnswerParserOptions {
    std::vector<Tool> tools = {};  ///< a custom one is called with {"input": text}
    ThoughtState thought = ThoughtState::free;
    /// A JSON object with a tool's name is a call even without the family's marks, where an answer
    /// begins with it, be it in a fence.
    bool bare_calls = true;
    std::vector<Item> answered = {};  ///< of which such an object, said again, is none
    /// Decoding is held to the syntax: arguments go out as they come. Else a call goes out when it
    /// is whole, so that what proves to be none is still text.
    bool constrained = true;
    bool must_call = false;  ///< decoding is held to calls: there is no text
};
std::unique_ptr<OutputParser> answer_parser(std::shared_ptr<const AnswerSyntax> syntax,
                                            AnswerParserOptions options);

}  // namespace detail
}  // namespace v1
}  // namespace valar

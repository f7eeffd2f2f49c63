// The items of an answer on their way from a parser to its sink.
#pragma once

#include "template/syntax.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr std::string_view kSpaces = " \t\r\n";

/// Begins and ends items as their texts come. White space around a thought, before a call and
/// after either is no text; a call goes out when it is certain, or when it is whole.
class ItemWriter {
public:
    explicit ItemWriter(AnswerParserOptions& options)
        : tools_(std::move(options.tools)),
          streams_(options.constrained),
          says_(!options.must_call) {}

    void to(OutputSink& sink) { sink_ = &sink; }
    bool has_tools() const { return !tools_.empty(); }
    bool said() const { return kind_ == Kind::message; }  ///< a message is under way
    bool silent() const { return !any_; }                 ///< nothing went out yet

    void say(std::string_view text) {
        if (says_) extend(Kind::message, text);  // else it is what a cut left of a mark
    }
    void think(std::string_view text) { extend(Kind::thought, text); }
    /// Ends the message or thought under way; the white space after it belongs to none.
    void end_text();
    void end_thought() {
        end_text();
        trims_ = true;
    }

    /// The tool of that name, or null.
    const Tool* find(std::string_view name) const;
    /// What comes as arguments belongs to a call of this tool, which may have to go out in one.
    void call(const Tool& tool, bool whole = false);
    bool calling() const { return tool_ != nullptr; }
    bool committed() const { return tool_ && streams_ && !whole_; }  ///< it went out
    const Tool& tool() const { return *tool_; }
    std::string& arguments() { return arguments_; }  ///< JSON to be sent
    const std::string& arguments() const { return arguments_; }
    void send_arguments();
    void end_call();
    void drop_call();  ///< it was none

    /// The end of all: what is open is ended, but for a call.
    void finish();

private:
    enum class Kind : uint8_t { none, message, thought };
    void extend(Kind kind, std::string_view text);

    std::vector<Tool> tools_;
    bool streams_, says_;
    bool whole_ = false;  // of the call under way: it goes out in one
    OutputSink* sink_ = nullptr;
    Kind kind_ = Kind::none;
    bool any_ = false;
    bool trims_ = false;  // white space at the start of the next text
    std::string gap_;     // white space that may be the text's end
    const Tool* tool_ = nullptr;
    std::string arguments_;
};

std::unique_ptr<OutputParser> channel_parser(AnswerParserOptions options);
std::unique_ptr<OutputParser> mark_parser(std::shared_ptr<const AnswerSyntax> syntax,
                                          AnswerParserOptions options);

}  // namespace detail
}  // namespace v1
}  // namespace valar

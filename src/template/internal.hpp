// >>template
// Owns: the chat-template interpreter (Jinja as Hugging Face runs it: sandboxed and immutable,
//       trim_blocks, lstrip_blocks, break and continue) and the way from a request to a prompt.
// Assumes: nothing about the template (it comes from a model file), nothing about the request.
// Promises: every byte of the prompt that a request brought is marked as such, whatever the
//           template did to it; bounded steps, memory, depth and output; the same text for the same input.
#pragma once

#include "api.hpp"
#include "template/output.hpp"
#include "tokenizer/internal.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace valar {
inline namespace v1 {
namespace detail {

struct TemplateProgram;
struct AnswerSyntax;

/// Special tokens inside of texts: a byte that no UTF-8 text has stands before and after each, so
/// that a token and a text that only looks like one differ.
inline constexpr char kTokenBegin = '\xFF', kTokenEnd = '\xFE';
/// Without those bytes.
std::string without_token_bytes(std::string_view text);

/// What a template sees: one variable for each member of the two objects; of a name that stands in
/// both, the one of `own`. The strings, keys included, numbers and punctuation of `request` are
/// text of the request wherever they or pieces of them are printed; `own` is as trusted as the
/// template. One exception: the `role` of a message that is one of the six roles of Role is the
/// template's, for there are templates that build a control token around it ('<|' + role + '|>').
/// And of a message's content what stands between kTokenBegin and kTokenEnd.
struct TemplateInput {
    Json request = Json::object();  ///< messages, tools
    Json own = Json::object();      ///< bos_token, eos_token, add_generation_prompt ...
    int64_t now_s = 0;              ///< what strftime_now shows: unix time + the zone's offset
};

/// What a template takes of a conversation; `chat_input` brings it into that shape.
struct TemplateShape {
    bool system = true;        ///< a system message; else its text goes before the next user text
    bool late_system = true;   ///< also one that is not the first message
    bool developer = false;    ///< a role of its own; else it is a system message
    bool parts = false;        ///< content is a list of parts; a string would be lost
    bool empty_tools = false;  ///< `tools` is an empty list where there are none, not null
    bool joins = false;        ///< it refuses neighbours of one role: they are joined
    bool tools = false;        ///< it shows `tools`; else they stand in the system message
    bool calls = false;        ///< it takes `tool_calls`; else they are text of the message
    bool results = false;      ///< it takes messages of the role tool; else they are a user's
    bool parallel = true;      ///< several calls in one message; else one after the other
    bool text_arguments = false;  ///< arguments are JSON in a string; else an object
    bool null_content = false;    ///< of a message of calls alone; else an empty string
    /// Ids of calls: as they are, of nine letters and digits, or functions.NAME:NUMBER.
    enum class Ids : uint8_t { any, nine, named };
    Ids ids = Ids::any;
    const char* tools_name = "tools";           ///< the variable
    const char* thought = "reasoning_content";  ///< the field of thoughts
    /// Of each Effort, the word that it takes for it.
    const char* efforts[6] = {"low", "low", "low", "medium", "high", "high"};
    bool thought_or_text = false;  ///< before calls not both: the text goes behind the thought
};

/// A custom tool is to a model a function with this argument.
inline constexpr std::string_view kCustomArgument = "input";
/// How results stand in a text, where the template knows of none.
inline constexpr std::string_view kResultBegin = "<tool_response>\n",
                                  kResultEnd = "\n</tool_response>";

/// A chat template, parsed. What it does not know of Jinja it refuses by name and line: a statement
/// when it is parsed, a filter, test or method when it is used.
/// Threads: immutable after `parse`; every member from any thread. Copies share the program.
class ChatTemplate {
public:
    static constexpr size_t max_source_bytes = size_t{1} << 20;
    static constexpr uint32_t max_nesting = 100;      ///< of blocks and brackets in the source
    static constexpr uint32_t max_calls = 100;        ///< macros that call macros
    static constexpr uint32_t max_levels = 600;       ///< of evaluation: 256 KiB of stack suffice
    static constexpr uint32_t max_value_depth = 256;  ///< lists in lists
    static constexpr uint32_t max_range = 100'000;    ///< of range(), as in Jinja's sandbox
    static constexpr size_t max_live_bytes = size_t{10}
                                             << 20;  ///< of values, beside what a request needs
    static constexpr size_t max_output_bytes = size_t{16} << 20;  ///< of any one string
    /// A step is one operation or `bytes_per_step` bytes of text or list made or searched: steps
    /// bound time and memory at once.
    static constexpr uint64_t max_steps = 800'000;
    static constexpr uint64_t bytes_per_step = 128;

    /// Errors: bad_data, with the line.
    static Result<ChatTemplate> parse(std::string source);
    /// As `parse`, and finds its shape: it renders a few short conversations.
    static Result<ChatTemplate> open(std::string source);

    /// Errors: invalid_request, with the line; what the template itself raises: its words alone;
    /// too_large: a text of over max_output_bytes.
    Result<MarkedText> render(const TemplateInput& input) const;

    const TemplateShape& shape() const { return shape_; }
    const std::string& source() const;
    /// Whether a string literal of the template holds `word`: how one sees what it knows of.
    bool mentions(std::string_view word) const;
    bool has_word(std::string_view word) const;  ///< one of its string literals is just this

private:
    explicit ChatTemplate(std::shared_ptr<const TemplateProgram> program);
    std::shared_ptr<const TemplateProgram> program_;
    TemplateShape shape_ = {};
};

/// A tool of one argument, to see what templates make of it and of calls.
inline constexpr const char* kProbeTool = "probe_of_tool";
inline constexpr const char* kProbeArguments = R"({"probe_key": "probe-of-value"})";
Json probe_tools();

/// Tokens that a thought may have by the wire contract.
constexpr uint32_t thought_budget(Effort effort) {
    constexpr uint32_t budgets[] = {0, 64, 256, 1024, 4096, 16384};
    return budgets[static_cast<size_t>(effort)];
}

/// The variables for `request`: messages (instructions first, as a system message; parts of text
/// joined; thoughts and calls of tools with the message that they stand before or behind; all as the
/// template's shape wants it), tools as OpenAI has them, add_generation_prompt, bos_token, eos_token,
/// documents as null; with an effort the switches that templates have for it. With
/// `show_schema` the system message says which schema the answer has to fit. What the template does
/// not know of calls stands in the text, as `syntax` has it; null: hermes.
TemplateInput chat_input(const Request& request, const ChatTemplate& chat_template,
                         std::string_view bos, std::string_view eos, int64_t now_s,
                         bool show_schema = true, const AnswerSyntax* syntax = nullptr);

}  // namespace detail
}  // namespace v1
}  // namespace valar

#pragma once

#include "engine/loaded_model.hpp"
#include "grammar/answer.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- From a request to a prompt --------------------------------------------------------------

// What prepare() found out; becomes a Sequence.
struct PreparedPrompt final : Prepared {
    const void* maker = nullptr;  // the PromptMaker
    std::vector<Token> tokens;
    std::vector<Hash256> page_keys;  // of the prompt's full pages
    Hash256 root;                    // the key that stands before the first page's
    bool long_rope = false;          // longer than the model's short rope factors reach
    uint64_t group = 0;              // of prompt_cache_key; 0: none
    std::string organisation;
    Window window = Window::standard;
    Sampling sampling;
    uint32_t max_output = 0;
    bool logprobs = false;
    uint32_t top_logprobs = 0;
    bool progress = false;  // is told while the prompt is read
    std::vector<std::string> stop;
    uint32_t thought_budget = UINT32_MAX;  // tokens
    std::vector<Token> thought_end;        // what closes a thought that has used them
    std::unique_ptr<OutputParser> parser;  // of the answer
    GrammarPtr grammar;                    // of its text; null: any
    std::shared_ptr<MaskMaker> masks;      // for it

    const void* owner() const override { return maker; }
};
using PromptPtr = std::unique_ptr<PreparedPrompt>;

// Checks requests and makes tokens of them. Threads: any. Options and model are borrowed.
class PromptMaker {
public:
    PromptMaker(const LoadedModel& model, const EngineOptions& options, uint32_t context)
        : model_(model), options_(options), context_(context) {}

    /// `salt` parts the pages of this prompt from those of others; see root_key().
    Result<PromptPtr> prepare(const Request& request, std::string_view salt = {}) const;
    Result<std::vector<Token>> tokenize(const Request& request) const;
    /// Of the pages that this request's prompt fills; none without a prefix cache.
    Result<std::vector<Hash256>> page_keys(const Request& request, std::string_view salt) const;
    /// The prompt that prepare() gave away as a Prepared. Error: this was made by another.
    Result<PromptPtr> take_back(std::unique_ptr<Prepared> prepared) const;
    uint32_t context() const { return context_; }

private:
    Result<void> check(const Request& request) const;
    Result<void> check_length(size_t tokens) const;
    std::string refused_window() const;
    void resolve_sampling(const Request& request, Sampling* out) const;
    void find_pages(const Request& request, std::string_view salt, PreparedPrompt* out) const;
    Result<MarkedText> render(const Request& request) const;
    Result<std::vector<Token>> encode(const MarkedText& text) const;
    Result<std::vector<Token>> encode_raw(const Request& request) const;
    Result<std::vector<Token>> encode_gap(std::string_view prefix, std::string_view suffix) const;
    void skip_thought(const Request& request, MarkedText* text) const;
    Result<void> limit_thought(const Request& request, PreparedPrompt* out) const;
    Result<void> hold_answer(const Request& request, ThoughtState thought,
                             PreparedPrompt* out) const;
    bool takes_long_rope(size_t tokens) const { return tokens > short_rope_tokens(model_.spec()); }

    const LoadedModel& model_;
    const EngineOptions& options_;
    uint32_t context_;
    mutable AnswerCache grammars_;
};

Error refuse_field(const char* param, std::string message, const char* code = "invalid_value");

}  // namespace detail
}  // namespace v1
}  // namespace valar

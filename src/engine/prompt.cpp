#include "prologue.hpp"

#include "api_internal.hpp"
#include "engine/limits.hpp"
#include "engine/pages.hpp"
#include "engine/prompt.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

Result<void> check_bias(const Request& request, uint32_t n_vocab) {
    for (const auto& [token, bias] : request.logit_bias) {
        if (token < 0 || static_cast<uint32_t>(token) >= n_vocab)
            return refuse_field("logit_bias", format("logit_bias: there is no token %d", token));
        if (!(bias >= -kMaxBias && bias <= kMaxBias))
            return refuse_field(
                "logit_bias", format("logit_bias: %g is not in %g..%g", bias, -kMaxBias, kMaxBias));
    }
    return {};
}

/// The last calls that have results. A model that forgets its family's marks says such a call once
/// more before it answers: as text that is an answer, as calls it had no end.
std::vector<Item> answered_calls(const std::vector<Item>& items, const AnswerSyntax& syntax) {
    constexpr size_t most = 4, most_bytes = 300;  // of what the grammar has to tell apart
    std::vector<Item> calls;
    if (items.empty() || items.back().is_call() || !syntax.calls.begin_with_mark()) return calls;
    for (auto item = items.rbegin(); item != items.rend() && calls.size() < most; ++item) {
        if (item->kind == Item::Kind::message || item->kind == Item::Kind::reasoning) break;
        const auto arguments = Json::parse(item->arguments);
        if (item->kind != Item::Kind::function_call || !arguments || !arguments->is_object())
            continue;
        calls.push_back(*item);
        calls.back().arguments = arguments->write();
        if (calls.back().arguments.size() > most_bytes) calls.pop_back();
    }
    return calls;
}

bool may_call(const Request& request) {
    return !request.tools.empty() && request.tool_choice.mode != ToolChoice::Mode::none;
}

Result<int64_t> draw_seed() {
    uint64_t drawn = 0;
    if (auto random = random_bytes(&drawn, sizeof drawn); !random) return random.error();
    return static_cast<int64_t>(drawn >> 11);  // 53 bits: exact in every JSON reader
}

}  // namespace

Error refuse_field(const char* param, std::string message, const char* code) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, param);
}

Result<PromptPtr> PromptMaker::prepare(const Request& request, std::string_view salt) const {
    if (auto checked = check(request); !checked) return checked.error();
    auto text = request.raw ? Result(MarkedText()) : render(request);
    if (!text) return text.error();
    auto tokens = request.raw ? encode_raw(request) : encode(*text);
    if (!tokens) return tokens.error();
    if (auto checked = check_length(tokens->size()); !checked) return checked.error();
    auto seed = request.seed ? Result<int64_t>(*request.seed) : draw_seed();
    if (!seed) return seed.error();
    auto out = std::make_unique<PreparedPrompt>();
    out->maker = this;
    out->tokens = std::move(*tokens);
    out->model = model_.info().id;
    out->input_tokens = static_cast<uint32_t>(out->tokens.size());
    const uint32_t room = context_ - out->input_tokens;
    out->max_output = std::min(request.max_output_tokens.value_or(room), room);
    out->logprobs = request.logprobs;
    out->top_logprobs = request.top_logprobs;
    out->progress = request.prompt_progress;
    out->stop = request.stop;
    if (request.raw) {
        out->parser = raw_output();
    } else {
        const ThoughtState thought = thought_state(*text, *model_.answer_syntax());
        if (auto limited = limit_thought(request, out.get()); !limited) return limited.error();
        if (auto held = hold_answer(request, thought, out.get()); !held) return held.error();
    }
    out->organisation = request.organisation;
    out->window = request.window;
    resolve_sampling(request, &out->sampling);
    out->sampling.seed = out->seed = *seed;
    out->temperature = out->sampling.temperature;
    out->top_p = out->sampling.top_p;
    find_pages(request, salt, out.get());
    return out;
}

Result<void> PromptMaker::check(const Request& request) const {
    if (!request.model.empty() && !model_.is_called(request.model))
        return make_error(ErrorKind::not_found, "the model '" + request.model + "' does not exist",
                          "model_not_found", "model");
    if (auto checked = check_request(request); !checked) return checked;
    const auto& windows = options_.windows;
    if (std::find(windows.begin(), windows.end(), request.window) == windows.end())
        return refuse_field(kWindowField, refused_window());
    return check_bias(request, model_.spec().n_vocab);
}

Result<void> PromptMaker::check_length(size_t tokens) const {
    if (tokens < context_) return {};
    return refuse_field(
        "input",
        format("the prompt has %zu tokens; the context of this model is %u tokens for prompt and "
               "answer",
               tokens, context_),
        "context_length_exceeded");
}

std::string PromptMaker::refused_window() const {
    const ModelInfo& info = model_.info();
    std::string message = std::string(kWindowField) + ": the model '" + info.id + "' serves";
    for (const Window window : info.windows) message.append(" ").append(window_name(window));
    return message;
}

// What the request leaves open is the model's own default.
void PromptMaker::resolve_sampling(const Request& request, Sampling* out) const {
    *out = model_.sampling();
    for (const NumberOption& row : number_options) {
        const auto value = option_value(row, request);
        if (value) out->*row.resolved = *value;
    }
    out->top_k = request.top_k.value_or(out->top_k);
    for (const auto& [token, bias] : request.logit_bias)
        out->logit_bias.emplace_back(token, static_cast<float>(bias));
}

void PromptMaker::find_pages(const Request& request, std::string_view salt,
                             PreparedPrompt* out) const {
    out->root = root_key(options_, request.organisation, salt);
    out->group = group_of(out->root, request.prompt_cache_key);
    out->long_rope = takes_long_rope(out->tokens.size());
    if (out->long_rope) out->root = long_rope_key(out->root);
    if (options_.prefix_cache)
        extend_page_keys(out->page_keys, out->root, out->tokens, options_.page_tokens,
                         out->tokens.size() / options_.page_tokens);
}

Result<std::vector<Hash256>> PromptMaker::page_keys(const Request& request,
                                                    std::string_view salt) const {
    std::vector<Hash256> keys;
    if (!options_.prefix_cache) return keys;
    auto tokens = tokenize(request);
    if (!tokens) return tokens.error();
    const Hash256 root = root_key(options_, request.organisation, salt);
    extend_page_keys(keys, takes_long_rope(tokens->size()) ? long_rope_key(root) : root, *tokens,
                     options_.page_tokens, tokens->size() / options_.page_tokens);
    return keys;
}

// A request without effort gets the prompt of one whose thought is over, where the template has no
// switch for that. Where the model may begin one by itself the budget of 0 ends it.
void PromptMaker::skip_thought(const Request& request, MarkedText* text) const {
    if (request.effort != Effort::none) return;
    const AnswerSyntax& syntax = *model_.answer_syntax();
    const ThoughtState state = thought_state(*text, syntax);
    if (state == ThoughtState::open) {
        text->text += without_token_bytes(syntax.thought.close);
    } else if (state == ThoughtState::free && syntax.channels() && !may_call(request)) {
        text->text += without_token_bytes(syntax.thought.ignored.front());
    }
}

Result<void> PromptMaker::limit_thought(const Request& request, PreparedPrompt* out) const {
    const AnswerSyntax& syntax = *model_.answer_syntax();
    if (!request.effort || !syntax.has_thought()) return {};
    std::string end = syntax.thought.close;
    if (syntax.channels()) {  // the next message begins; which one is open where it may be a call
        end += syntax.calls.between;
        if (!may_call(request)) end += syntax.thought.ignored.front();
    }
    auto tokens = model_.tokenizer().encode(MarkedText{without_token_bytes(end), {}});
    if (!tokens) return tokens.error();
    out->thought_end = std::move(*tokens);
    out->thought_budget = thought_budget(*request.effort);
    return {};
}

// How the answer is read, and what it is held to.
Result<void> PromptMaker::hold_answer(const Request& request, ThoughtState thought,
                                      PreparedPrompt* out) const {
    const auto& syntax = model_.answer_syntax();
    const auto answered = answered_calls(request.input.items, *syntax);
    auto grammar = grammars_.compile({.syntax = syntax.get(),
                                      .thought = thought,
                                      .may_think = request.effort != Effort::none,
                                      .tools = request.tools,
                                      .choice = request.tool_choice,
                                      .parallel = request.parallel_tool_calls,
                                      .max_calls = request.max_tool_calls,
                                      .format = request.format.empty() ? nullptr : &request.format,
                                      .answered = answered});
    if (!grammar) return grammar.error();
    const bool calls = may_call(request);
    // A format's object is no call where calls have marks of their own.
    const bool bare = request.format.empty() || !syntax->calls.begin_with_mark();
    out->parser = answer_parser(
        syntax, {.tools = calls ? request.tools : std::vector<Tool>(),
                 .thought = thought,
                 .bare_calls = bare,
                 .answered = answered,
                 .constrained = *grammar != nullptr,
                 .must_call = request.tool_choice.mode == ToolChoice::Mode::required});
    out->grammar = std::move(*grammar);
    if (out->grammar) out->masks = model_.masks();
    return {};
}

// There is no RTTI to ask, and fields could have been copied; a virtual function tells the truth.
Result<PromptPtr> PromptMaker::take_back(std::unique_ptr<Prepared> prepared) const {
    if (!prepared || prepared->owner() != this)
        return make_error(ErrorKind::invalid_request,
                          "submit(): the request was not prepared by this engine");
    return PromptPtr(static_cast<PreparedPrompt*>(prepared.release()));
}

Result<std::vector<Token>> PromptMaker::tokenize(const Request& request) const {
    if (request.raw) return encode_raw(request);
    auto text = render(request);
    if (!text) return text.error();
    return encode(*text);
}

Result<MarkedText> PromptMaker::render(const Request& request) const {
    const Tokenizer& tokenizer = model_.tokenizer();
    const auto spelling = [&](std::optional<Token> token) {
        return token ? tokenizer.piece(*token) : std::string_view();
    };
    const TemplateInput input = chat_input(
        request, model_.chat_template(), spelling(tokenizer.bos()), spelling(tokenizer.eos()),
        unix_time_ms() / 1000, options_.show_schema, model_.answer_syntax().get());
    auto text = model_.chat_template().render(input);
    if (!text && text.error().kind == ErrorKind::too_large)
        return refuse_field("input", "the prompt has more than 16 MiB of text",
                            "context_length_exceeded");
    if (text) skip_thought(request, &*text);
    return text;
}

namespace {

/// How families mark a gap to be filled in: prefix, suffix, then what comes between them.
struct GapMarks {
    std::string_view prefix, suffix, middle;
};
constexpr GapMarks gap_marks[] = {
    {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"},           // Qwen2.5-Coder, CodeGemma
    {"<fim_prefix>", "<fim_suffix>", "<fim_middle>"},                 // StarCoder, Granite
    {"<fim-prefix>", "<fim-suffix>", "<fim-middle>"},                 // SantaCoder, Refact
    {"<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"},        // GLM
    {"\xe2\x96\x81<PRE>", "\xe2\x96\x81<SUF>", "\xe2\x96\x81<MID>"},  // CodeLlama
    {"<\xef\xbd\x9c"
     "fim\xe2\x96\x81"
     "begin\xef\xbd\x9c>",
     "<\xef\xbd\x9c"
     "fim\xe2\x96\x81hole\xef\xbd\x9c>",
     "<\xef\xbd\x9c"
     "fim\xe2\x96\x81"
     "end\xef\xbd\x9c>"},  // DeepSeek-Coder
};

}  // namespace

// The prompt of a request that has no use for a template. It is wholly its sender's, and may spell
// the model's marks; but what stands around a gap is any text.
Result<std::vector<Token>> PromptMaker::encode_raw(const Request& request) const {
    const RawPrompt& raw = *request.raw;
    const Tokenizer& tokenizer = model_.tokenizer();
    std::vector<Token> tokens = raw.tokens;
    for (const Token token : tokens)
        if (token < 0 || static_cast<uint32_t>(token) >= model_.spec().n_vocab)
            return refuse_field("prompt", format("prompt: there is no token %d", token));
    std::string text = request.input.text;
    for (const Item& item : request.input.items) text += item.text();
    if (tokens.empty() && !raw.suffix.empty()) return encode_gap(text, raw.suffix);
    if (!raw.suffix.empty())
        return refuse_field("suffix", "suffix: not together with a prompt of tokens");
    if (!tokens.empty()) return tokens;
    auto read = tokenizer.encode(MarkedText{std::move(text), {}}, tokenizer.add_bos());
    if (read && read->empty()) {
        if (!tokenizer.bos()) return refuse_field("input", "the prompt is empty");
        read->push_back(*tokenizer.bos());
    }
    return read;
}

Result<std::vector<Token>> PromptMaker::encode_gap(std::string_view prefix,
                                                   std::string_view suffix) const {
    const Tokenizer& tokenizer = model_.tokenizer();
    const auto mark = [&](std::string_view spelling) -> std::optional<Token> {
        const auto token = tokenizer.find(spelling);
        const bool special = token && tokenizer.kind(*token) != TokenKind::normal;
        return special ? token : std::nullopt;
    };
    for (const GapMarks& row : gap_marks) {
        const auto first = mark(row.prefix), second = mark(row.suffix), third = mark(row.middle);
        if (!first || !second || !third) continue;
        auto before = tokenizer.encode(prefix), after = tokenizer.encode(suffix);
        if (!before || !after) return before ? after.error() : before.error();
        std::vector<Token> tokens;
        if (tokenizer.add_bos() && tokenizer.bos()) tokens.push_back(*tokenizer.bos());
        tokens.push_back(*first);
        tokens.insert(tokens.end(), before->begin(), before->end());
        tokens.push_back(*second);
        tokens.insert(tokens.end(), after->begin(), after->end());
        tokens.push_back(*third);
        return tokens;
    }
    return refuse_field("suffix",
                        "suffix: the model '" + model_.info().id + "' has no marks to fill in",
                        "unsupported_value");
}

Result<std::vector<Token>> PromptMaker::encode(const MarkedText& text) const {
    auto tokens = model_.tokenizer().encode(text, model_.tokenizer().add_bos());
    if (!tokens) return tokens.error();
    if (tokens->empty())
        return refuse_field("input", "input: the chat template made an empty prompt of it");
    return tokens;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

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

Result<void> check_range(const char* field, std::optional<double> value, double low, double high) {
    if (!value || (*value >= low && *value <= high)) return {};
    return refuse_field(field, format("%s: %g is not in %g..%g", field, *value, low, high));
}

// What the wire has checked already; a C++ caller's request comes straight here.
Result<void> check_request(const Request& request) {
    if (request.input.empty())
        return refuse_field("input", "input: missing or empty", "missing_required_parameter");
    if (request.max_output_tokens == 0u)
        return refuse_field("max_output_tokens", "max_output_tokens: 0 is not positive");
    if (request.top_logprobs > kMaxLogprobs)
        return refuse_field("top_logprobs", format("top_logprobs: %u is more than %u",
                                                   request.top_logprobs, kMaxLogprobs));
    const struct {
        const char* field;
        std::optional<double> value;
        double low, high;
    } ranges[] = {
        {"temperature", request.temperature, 0, 2},
        {"top_p", request.top_p, 0, 1},
        {"min_p", request.min_p, 0, 1},
        {"presence_penalty", request.presence_penalty, -2, 2},
        {"frequency_penalty", request.frequency_penalty, -2, 2},
        {"repetition_penalty", request.repetition_penalty, 0.1, 10},
    };
    for (const auto& [field, value, low, high] : ranges)
        if (auto checked = check_range(field, value, low, high); !checked) return checked;
    if (request.stop.size() > kMaxStops)
        return refuse_field(
            "stop", format("stop: %zu strings are more than %zu", request.stop.size(), kMaxStops));
    for (const std::string& stop : request.stop)
        if (stop.empty() || stop.size() > kMaxStopBytes || !utf8_valid(stop))
            return refuse_field("stop", format("stop: a string has %zu bytes or is not UTF-8; "
                                               "1..%zu are allowed",
                                               stop.size(), kMaxStopBytes));
    return {};
}

Result<void> check_bias(const Request& request, uint32_t n_vocab) {
    for (const auto& [token, bias] : request.logit_bias) {
        if (token < 0 || static_cast<uint32_t>(token) >= n_vocab)
            return refuse_field("logit_bias", format("logit_bias: there is no token %d", token));
        if (auto checked = check_range("logit_bias", bias, -100, 100); !checked) return checked;
    }
    return {};
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
    auto tokens = tokenize(request);
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
    out->stop = request.stop;
    out->parser = plain_output();
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
void PromptMaker::resolve_sampling(const Request& request, SamplerOptions* out) const {
    const SamplerOptions& defaults = model_.sampling();
    *out = defaults;
    out->temperature = request.temperature.value_or(defaults.temperature);
    out->top_p = request.top_p.value_or(defaults.top_p);
    out->top_k = request.top_k.value_or(defaults.top_k);
    out->min_p = request.min_p.value_or(defaults.min_p);
    out->presence_penalty = request.presence_penalty;
    out->frequency_penalty = request.frequency_penalty;
    out->repetition_penalty = request.repetition_penalty;
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

// There is no RTTI to ask, and fields could have been copied; a virtual function tells the truth.
Result<PromptPtr> PromptMaker::take_back(std::unique_ptr<Prepared> prepared) const {
    if (!prepared || prepared->owner() != this)
        return make_error(ErrorKind::invalid_request,
                          "submit(): the request was not prepared by this engine");
    return PromptPtr(static_cast<PreparedPrompt*>(prepared.release()));
}

Result<std::vector<Token>> PromptMaker::tokenize(const Request& request) const {
    const Tokenizer& tokenizer = model_.tokenizer();
    const auto spelling = [&](std::optional<Token> token) {
        return token ? tokenizer.piece(*token) : std::string_view();
    };
    auto input = chat_input(request, model_.chat_template(), spelling(tokenizer.bos()),
                            spelling(tokenizer.eos()), unix_time_ms() / 1000);
    if (!input) return input.error();
    auto text = model_.chat_template().render(*input);
    if (!text && text.error().kind == ErrorKind::too_large)
        return refuse_field("input", "the prompt has more than 16 MiB of text",
                            "context_length_exceeded");
    if (!text) return text.error();
    auto tokens = tokenizer.encode(*text, tokenizer.add_bos());
    if (!tokens) return tokens.error();
    if (tokens->empty())
        return refuse_field("input", "input: the chat template made an empty prompt of it");
    return tokens;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

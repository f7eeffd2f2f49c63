#include "prologue.hpp"

#include "engine/state.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
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
        if (auto good = check_range(field, value, low, high); !good) return good;
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
        if (auto good = check_range("logit_bias", bias, -100, 100); !good) return good;
    }
    return {};
}

}  // namespace

// Adds the keys of the pages that `tokens` fill, up to `count` of them.
void extend_page_keys(std::vector<Hash256>& keys, const Hash256& root,
                      std::span<const Token> tokens, uint32_t page_tokens, size_t count) {
    while (keys.size() < count) {
        Sha256 hash;
        hash.update((keys.empty() ? root : keys.back()).view());
        hash.update(tokens.data() + keys.size() * page_tokens, page_tokens * sizeof(Token));
        keys.push_back(hash.finish());
    }
}

uint64_t group_of(const Hash256& root, const std::string& prompt_cache_key) {
    if (prompt_cache_key.empty()) return 0;
    const Hash256 hash = hmac_sha256(root.view(), prompt_cache_key);
    uint64_t group;
    std::memcpy(&group, hash.bytes, sizeof group);
    return group | 1;
}

// The key that stands before that of a first page: all that may part prefixes which begin alike.
// `salt` is empty, or stands for pages that others must not find.
Hash256 root_key(const EngineOptions& options, const std::string& organisation,
                 std::string_view salt) {
    const uint32_t numbers[] = {kNumerics, static_cast<uint32_t>(options.precision),
                                static_cast<uint32_t>(options.kv_type), options.page_tokens};
    Sha256 hash;
    hash.update(numbers, sizeof numbers);
    if (!options.share_prefixes) hash.update(organisation);
    if (!salt.empty()) hash.update(sha256(salt.data(), salt.size()).view());
    return hash.finish();
}

Error refuse_field(const char* param, std::string message, const char* code) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, param);
}

Error engine_closed_error() {
    return make_error(ErrorKind::closed, "the engine was closed", "engine_closed");
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- From a request to a prompt (any thread) -------------------------------------------------

Result<std::unique_ptr<Prepared>> Engine::State::prepare(const Request& request) {
    auto prompt = prepare_prompt(request);
    if (!prompt) return prompt.error();
    return std::unique_ptr<Prepared>(std::move(*prompt));
}

Result<std::unique_ptr<detail::PreparedPrompt>> Engine::State::prepare_prompt(
    const Request& request, std::string_view salt) {
    const auto& names = info.aliases;
    if (!request.model.empty() && request.model != info.id &&
        std::find(names.begin(), names.end(), request.model) == names.end())
        return detail::make_error(ErrorKind::not_found,
                                  "the model '" + request.model + "' does not exist",
                                  "model_not_found", "model");
    if (auto good = detail::check_request(request); !good) return good.error();
    const auto& windows = options.windows;
    if (std::find(windows.begin(), windows.end(), request.window) == windows.end())
        return detail::refuse_field("metadata.completion_window", refused_window());
    if (auto good = detail::check_bias(request, spec.n_vocab); !good) return good.error();
    auto tokens = make_prompt(request);
    if (!tokens) return tokens.error();
    const size_t count = tokens->size();
    if (count >= context)
        return detail::refuse_field(
            "input",
            detail::format("the prompt has %zu tokens; the context of this model is %u tokens for "
                           "prompt and answer",
                           count, context),
            "context_length_exceeded");
    auto out = std::make_unique<detail::PreparedPrompt>();
    out->sampling = sampling;
    out->sampling.temperature = request.temperature.value_or(sampling.temperature);
    out->sampling.top_p = request.top_p.value_or(sampling.top_p);
    out->sampling.top_k = request.top_k.value_or(sampling.top_k);
    out->sampling.min_p = request.min_p.value_or(sampling.min_p);
    uint64_t drawn = 0;  // 53 bits: exact in every JSON reader
    if (auto random = detail::random_bytes(&drawn, sizeof drawn); !random) return random.error();
    out->sampling.seed = request.seed.value_or(static_cast<int64_t>(drawn >> 11));
    const uint32_t room = context - static_cast<uint32_t>(count);
    out->max_output = std::min(request.max_output_tokens.value_or(room), room);
    out->sampling.presence_penalty = request.presence_penalty;
    out->sampling.frequency_penalty = request.frequency_penalty;
    out->sampling.repetition_penalty = request.repetition_penalty;
    for (const auto& [token, bias] : request.logit_bias)
        out->sampling.logit_bias.emplace_back(token, static_cast<float>(bias));
    out->logprobs = request.logprobs;
    out->top_logprobs = request.top_logprobs;
    out->stop = request.stop;
    out->organisation = request.organisation;
    out->window = request.window;
    out->root = detail::root_key(options, request.organisation, salt);
    out->group = detail::group_of(out->root, request.prompt_cache_key);
    if (options.prefix_cache)
        detail::extend_page_keys(out->page_keys, out->root, *tokens, options.page_tokens,
                                 count / options.page_tokens);
    out->tokens = std::move(*tokens);
    out->model = info.id;
    out->input_tokens = static_cast<uint32_t>(count);
    out->temperature = out->sampling.temperature;
    out->top_p = out->sampling.top_p;
    out->seed = out->sampling.seed;
    return out;
}

std::string Engine::State::refused_window() const {
    std::string message = "metadata.completion_window: the model '" + info.id + "' serves";
    for (const std::string& window : info.windows) message += " " + window;
    return message;
}

Result<std::vector<Token>> Engine::State::make_prompt(const Request& request) const {
    const auto spelling = [&](std::optional<Token> token) {
        return token ? tokenizer->piece(*token) : std::string_view();
    };
    auto input = chat_input(request, *chat_template, spelling(tokenizer->bos()),
                            spelling(tokenizer->eos()), detail::unix_time_ms() / 1000);
    if (!input) return input.error();
    auto text = chat_template->render(*input);
    if (!text) return text.error();
    auto tokens = tokenizer->encode(*text, tokenizer->add_bos());
    if (!tokens) return tokens.error();
    if (tokens->empty())
        return detail::refuse_field("input", "input: the chat template made an empty prompt of it");
    return tokens;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE

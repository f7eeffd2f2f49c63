// Legacy completions: a prompt goes past the chat template, what follows comes back. Editors use it.
#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
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

// ---- The request -------------------------------------------------------------------------------

RawPrompt raw_prompt(const Json& raw) {
    RawPrompt prompt;
    for (const Json& token : raw["tokens"].items())
        prompt.tokens.push_back(static_cast<int32_t>(token.as_int()));
    prompt.suffix = raw["suffix"].as_string();
    return prompt;
}

namespace {

Json& raw_of(SurfaceBody* out) {
    if (out->raw.is_null()) out->raw = Json::object();
    return out->raw;
}

Fault completion_tokens(const Json& value, SurfaceBody* out) {
    for (size_t i = 0; i < value.size(); ++i)
        if (!value[i].is_int() || value[i].as_int() < 0 || value[i].as_int() > INT32_MAX)
            return api_wrong_type(api_index("prompt", i), "a token id", value[i]);
    raw_of(out).set("tokens", value);
    return {};
}

/// A text; tokens; or an array of one of these. It stands in the response as a user's message.
Fault completion_prompt(const Json& value, SurfaceBody* out) {
    const bool nested = value.is_array() && value.size() > 0 && !value[0].is_number();
    if (nested && value.size() > 1)
        return api_error("unsupported_value", "prompt",
                         "'prompt' has more than one prompt: one a request");
    const Json& one = nested ? value[0] : value;
    const bool tokens = one.is_array() && !one.empty();
    if (!one.is_string() && !tokens)
        return api_wrong_type("prompt", "a string or an array of token ids", one);
    raw_of(out);
    if (Fault fault = tokens ? completion_tokens(one, out) : Fault()) return fault;
    const Json message =
        Json::object().set("role", "user").set("content", tokens ? Json(one.write()) : one);
    out->body.set("input", Json::array().push(message));
    out->origins = {"prompt"};
    return {};
}

Json doc_completion_prompt(Dialect) {
    const Json text = doc_type("string"),
               tokens = doc_array(doc_type("integer").set("minimum", 0).set("maximum", INT32_MAX),
                                  1);
    return doc_any({text, tokens, doc_array(text, 1, 1), doc_array(tokens, 1, 1)});
}

Fault completion_suffix(const Json& value, SurfaceBody* out) {
    if (!value.is_string()) return api_wrong_type("suffix", "a string", value);
    raw_of(out).set("suffix", value);
    return {};
}

Fault completion_one(const Json& value, SurfaceBody*) {
    if (value.is_int() && value.as_int() == 1) return {};
    return api_error("unsupported_value", "n", "'n' and 'best_of' must be 1: one choice a request");
}

Json doc_completion_text(Dialect) { return doc_type("string"); }
Json doc_completion_one(Dialect) { return doc_type("integer").set("minimum", 1).set("maximum", 1); }
Json doc_completion_echo(Dialect) { return doc_type("boolean"); }

Fault completion_echo(const Json& value, SurfaceBody* out) {
    out->echoes = value.as_bool();
    return check_bool(value, "echo");
}

Fault completion_logprobs(const Json& value, SurfaceBody* out) {
    out->body.set("include", Json::array().push("message.output_text.logprobs"));
    out->body.set("top_logprobs", value);
    return {};
}

/// The limit where a request names none, as OpenAI has it; and what the fields are not together.
Fault completion_check(SurfaceBody* out) {
    if (out->body["max_output_tokens"].is_null()) out->body.set("max_output_tokens", 16);
    if (!out->echoes) return {};
    const bool text = out->raw["tokens"].is_null();
    if (!text || !out->body["include"].is_null() || !out->raw["suffix"].is_null())
        return api_error("unsupported_value", "echo",
                         "'echo' is supported for a text alone: without tokens, suffix, logprobs");
    out->echo = out->body["input"][0]["content"].as_string();
    return {};
}

constexpr SurfaceField completion_fields[] = {
    // clang-format off
    {"model", "model"},
    {"prompt", "input", completion_prompt, false, doc_completion_prompt},
    {"suffix", {}, completion_suffix, false, doc_completion_text},
    {"max_tokens", "max_output_tokens"},
    {"temperature", "temperature"},
    {"top_p", "top_p"},
    {"n", {}, completion_one, false, doc_completion_one},
    {"best_of", {}, completion_one, false, doc_completion_one},
    {"echo", {}, completion_echo, false, doc_completion_echo},
    {"stream", {}, surface_stream, false, doc_surface_stream},
    {"stream_options", {}, surface_stream_options, false, doc_surface_stream_options},
    {"logprobs", "top_logprobs", completion_logprobs},
    {"stop", "stop", surface_stop},
    {"seed", "seed"},
    {"presence_penalty", "presence_penalty"},
    {"frequency_penalty", "frequency_penalty"},
    {"repetition_penalty", "repetition_penalty"},
    {"logit_bias", "logit_bias"},
    {"top_k", "top_k"},
    {"min_p", "min_p"},
    {"user", "user"},
    {"store", "store"},
    {"metadata", "metadata"},
    {"prompt_cache_key", "prompt_cache_key"},
    // clang-format on
};
constexpr std::string_view completion_required[] = {"model", "prompt"};

/// A prompt is one field here.
std::string completion_rest(std::string_view field, const Json&, const std::string& rest) {
    return field == "input" ? std::string() : rest;
}

// ---- The answer --------------------------------------------------------------------------------

Json completion_head(const Json& id, const Json& created, const Json& model) {
    return Json::object()
        .set("id", derive_id("cmpl_", std::string(id.as_string())))
        .set("object", "text_completion")
        .set("created", created)
        .set("model", model);
}

Json completion_choice(std::string_view text, Json logprobs, Json finish_reason) {
    return Json::array().push(Json::object()
                                  .set("text", text)
                                  .set("index", 0)
                                  .set("logprobs", std::move(logprobs))
                                  .set("finish_reason", std::move(finish_reason)));
}

const char* completion_finish(const Outcome& outcome) { return outcome.cut ? "length" : "stop"; }

/// Of tokens as /v1/responses has them. `offset`: code points before the first; it is moved on.
Json legacy_logprobs(const Json& given, size_t* offset) {
    Json tokens = Json::array(), logprobs = Json::array(), top = Json::array(),
         offsets = Json::array();
    for (const Json& one : given.items()) {
        Json others = Json::object();
        for (const Json& other : one["top_logprobs"].items())
            others.set(other["token"].as_string(), other["logprob"]);
        tokens.push(one["token"]);
        logprobs.push(one["logprob"]);
        top.push(std::move(others));
        offsets.push(static_cast<int64_t>(*offset));
        *offset += utf8_count(one["token"].as_string());
    }
    return Json::object()
        .set("text_offset", std::move(offsets))
        .set("token_logprobs", std::move(logprobs))
        .set("tokens", std::move(tokens))
        .set("top_logprobs", std::move(top));
}

Json completion_usage(const Usage& usage) {
    return Json::object()
        .set("prompt_tokens", usage.input_tokens)
        .set("completion_tokens", usage.output_tokens)
        .set("total_tokens", usage.input_tokens + usage.output_tokens)
        .set("prompt_tokens_details", Json::object().set("cached_tokens", usage.cached_tokens));
}

Result<std::string> completion_render(const std::string& object, Dialect) {
    auto parsed = Json::parse(object);
    if (!parsed) return parsed.error();
    const Json& response = *parsed;
    const Outcome outcome = outcome_of(response);
    if (outcome.status != Status::completed) return surface_failure(outcome);
    std::string text;
    for (const Item& item : outcome.items) text += item.text();
    size_t offset = 0;
    const Json& tokens = response["output"][0]["content"][0]["logprobs"];
    Json logprobs = tokens.is_null() ? Json() : legacy_logprobs(tokens, &offset);
    return completion_head(response["id"], response["created_at"], response["model"])
        .set("choices", completion_choice(text, std::move(logprobs), completion_finish(outcome)))
        .set("usage", completion_usage(outcome.usage))
        .write();
}

class CompletionEvents : public EventWriter {
public:
    CompletionEvents(const ResponseRecord& record, bool include_usage)
        : head_(completion_head(record.id, record.created_at, record.model)),
          include_usage_(include_usage) {}

    void begin(const Json&) override {
        if (!echo_.empty()) add_text(echo_, {});
    }
    void add(const Event& event) override;
    void end(const Outcome& outcome, const std::string& object) override;
    void fail(const Error& error, bool = false) override { write(render_error(error)); }

private:
    void write(const Json& chunk) { text_.append("data: ").append(chunk.write()).append("\n\n"); }
    void write_chunk(const char* key, Json value) {
        Json chunk = head_;
        if (std::string_view(key) != "choices") chunk.set("choices", Json::array());
        chunk.set(key, std::move(value));
        if (include_usage_ && !chunk.contains("usage")) chunk.set("usage", nullptr);
        write(chunk);
    }
    void add_text(std::string_view text, const std::vector<TokenLogprob>& tokens) {
        if (text.empty() && tokens.empty()) return;
        Json logprobs = tokens.empty() ? Json()
                                       : legacy_logprobs(render_logprobs(tokens), &offset_);
        write_chunk("choices", completion_choice(text, std::move(logprobs), nullptr));
    }

    Json head_;
    bool include_usage_;
    size_t told_ = 0, offset_ = 0;  // bytes of the answer; code points of its tokens
};

void CompletionEvents::add(const Event& event) {
    if (event.kind == Event::Kind::prompt_progress)
        return write_chunk("prompt_progress", render_progress(event.progress));
    keep_tokens(event.logprobs);
    if (event.kind != Event::Kind::text_delta) return;
    told_ += event.text.size();
    add_text(event.text, tokens_of(event.index));
}

void CompletionEvents::end(const Outcome& outcome, const std::string&) {
    if (outcome.status != Status::completed) return fail(surface_failure(outcome));
    std::string text;
    for (const Item& item : output_items(outcome, outcome.status)) text += item.text();
    const bool told = told_ > 0;
    text.erase(0, std::min(told_, text.size()));
    add_text(text, told ? tokens_of(0) : logprobs_of(outcome, 0));
    write_chunk("choices", completion_choice("", nullptr, completion_finish(outcome)));
    if (include_usage_) write_chunk("usage", completion_usage(outcome.usage));
    text_ += "data: [DONE]\n\n";
}

std::unique_ptr<EventWriter> completion_events(const ResponseRecord& record, bool include_usage,
                                               Dialect) {
    return std::make_unique<CompletionEvents>(record, include_usage);
}

}  // namespace

const Surface completions_surface = {.name = "Completion",
                                     .path = "/v1/completions",
                                     .fields = completion_fields,
                                     .required = completion_required,
                                     .check = completion_check,
                                     .rest = completion_rest,
                                     .render = completion_render,
                                     .events = completion_events,
                                     .timeout_status = 408};

}  // namespace detail
}  // namespace v1
}  // namespace valar

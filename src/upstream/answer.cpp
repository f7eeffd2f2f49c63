#include "prologue.hpp"

#include "base/text.hpp"
#include "unicode_internal.hpp"
#include "upstream/answer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- What is answered --------------------------------------------------------------------------

Error upstream_error(std::string_view why) {
    return make_error(ErrorKind::closed, join({"the model's server failed: ", why}),
                      upstream_error_code);
}

std::string upstream_said(const Json& message) {
    constexpr size_t most_bytes = 500;
    const std::string_view all = message.as_string("it reports an error").substr(0, most_bytes);
    std::string said(all.substr(0, utf8_valid_prefix(all)));
    for (char& c : said)
        if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = ' ';
    return said;
}

namespace {

uint32_t count_of(const Json& number) {
    return static_cast<uint32_t>(std::min<uint64_t>(number.as_uint(), UINT32_MAX));
}

Usage usage_of(const Json& usage) {
    return {count_of(usage["prompt_tokens"]),
            count_of(usage["prompt_tokens_details"]["cached_tokens"]),
            count_of(usage["completion_tokens"]),
            count_of(usage["completion_tokens_details"]["reasoning_tokens"])};
}

/// Of a token: its own, since it may be a part of a character, else its text's.
std::string bytes_of(const Json& token) {
    std::string bytes;
    for (const Json& byte : token["bytes"].items())
        bytes += static_cast<char>(std::min<uint64_t>(byte.as_uint(), 255));
    return token["bytes"].is_array() ? bytes : std::string(token["token"].as_string());
}

float logprob_of(const Json& number) { return static_cast<float>(number.as_double()); }

}  // namespace

Result<void> UpstreamAnswer::add(const Json& chunk, std::vector<Event>* events) {
    if (const Json& error = chunk["error"]; !error.is_null())
        return upstream_error(upstream_said(error["message"]));
    if (chunk["usage"].is_object()) outcome_.usage = usage_of(chunk["usage"]);
    if (const Json& progress = chunk["prompt_progress"]; progress.is_object()) {
        Event event{Event::Kind::prompt_progress};
        event.progress = {count_of(progress["total"]), count_of(progress["processed"]),
                          count_of(progress["cache"])};
        events->push_back(std::move(event));
    }
    const Json &choice = chunk["choices"][0], &delta = choice["delta"];
    const Json& thought =
        delta[delta["reasoning_content"].is_string() ? "reasoning_content" : "reasoning"];
    add_text(Item::Kind::reasoning, thought.as_string(), {}, events);
    const Json& text = choice["text"].is_string() ? choice["text"] : delta["content"];
    add_text(Item::Kind::message, text.as_string(), read_tokens(choice["logprobs"]), events);
    add_text(Item::Kind::message, delta["refusal"].as_string(), {}, events);
    if (auto added = add_calls(delta["tool_calls"], events); !added) return added;
    const Json& reason = choice["finish_reason"];
    if (!reason.is_string()) return {};
    if (reason.as_string() == "error") return upstream_error("it reports an error");
    over_ = true;
    outcome_.cut = reason.as_string() == "length";
    for (const char* name : {"stop_reason", "matched_stop"}) {
        const std::string word(choice[name].as_string());
        if (std::find(call_.stop.begin(), call_.stop.end(), word) != call_.stop.end())
            outcome_.stopped_by = word;
    }
    return {};
}

/// Of Chat Completions, or of Completions.
std::vector<TokenLogprob> UpstreamAnswer::read_tokens(const Json& logprobs) const {
    std::vector<TokenLogprob> tokens;
    for (const Json& token : logprobs["content"].items()) {
        tokens.push_back({bytes_of(token), logprob_of(token["logprob"])});
        for (const Json& other : token["top_logprobs"].items())
            tokens.back().top.push_back({bytes_of(other), logprob_of(other["logprob"])});
    }
    for (size_t i = 0; i < logprobs["tokens"].size(); ++i) {
        tokens.push_back({std::string(logprobs["tokens"][i].as_string()),
                          logprob_of(logprobs["token_logprobs"][i])});
        for (const JsonMember& other : logprobs["top_logprobs"][i].members())
            tokens.back().top.push_back({other.key, logprob_of(other.value)});
        std::stable_sort(tokens.back().top.begin(), tokens.back().top.end(),
                         [](const auto& a, const auto& b) { return a.logprob > b.logprob; });
    }
    return tokens;
}

void UpstreamAnswer::add_text(Item::Kind kind, std::string_view text,
                              std::vector<TokenLogprob> tokens, std::vector<Event>* events) {
    if (text.empty() && tokens.empty()) return;
    auto& items = outcome_.items;
    if (!open_ || items.back().kind != kind) {
        Item item;
        item.kind = kind;
        item.role = Role::assistant;
        item.content = {{ContentPart::Kind::output_text, {}}};
        open(std::move(item), events);
    }
    items.back().content.front().text += text;
    const bool message = kind == Item::Kind::message;
    Event event{message ? Event::Kind::text_delta : Event::Kind::reasoning_delta};
    event.text = text;
    event.index = static_cast<uint32_t>(items.size() - 1);
    for (TokenLogprob& token : tokens) token.item = event.index;
    outcome_.logprobs.insert(outcome_.logprobs.end(), tokens.begin(), tokens.end());
    event.logprobs = std::move(tokens);
    events->push_back(std::move(event));
}

/// One after the other: a new index, or a new id where a server counts none, begins a call.
Result<void> UpstreamAnswer::add_calls(const Json& calls, std::vector<Event>* events) {
    for (const Json& call : calls.items()) {
        const bool custom = call["custom"].is_object();
        const Json& called = call[custom ? "custom" : "function"];
        const int64_t index = call["index"].as_int(static_cast<int64_t>(calls_));
        const std::string_view name = called["name"].as_string();
        const bool calling = call_index_ == index && (skips_ || open_);
        if (!calling) {
            if (index < call_index_ || name.empty())
                return upstream_error("it sent a part of a call that was not begun");
            close(events);
            call_index_ = index;
            skips_ = calls_ == call_.max_calls;
            if (!skips_) {
                ++calls_;
                Item item;
                item.kind = custom ? Item::Kind::custom_tool_call : Item::Kind::function_call;
                item.role = Role::assistant;
                item.call_id = call["id"].as_string();
                if (item.call_id.empty()) item.call_id = format("call_%u", calls_);
                item.name = name;
                open(std::move(item), events);
            }
        }
        const std::string_view more = called[custom ? "input" : "arguments"].as_string();
        if (skips_ || more.empty()) continue;
        outcome_.items.back().arguments += more;
        Event event{Event::Kind::arguments_delta};
        event.text = more;
        event.index = static_cast<uint32_t>(outcome_.items.size() - 1);
        events->push_back(std::move(event));
    }
    return {};
}

void UpstreamAnswer::open(Item item, std::vector<Event>* events) {
    close(events);
    open_ = true;
    Event event{Event::Kind::item_begun};
    event.index = static_cast<uint32_t>(outcome_.items.size());
    event.item = item;
    event.item.content.clear();
    events->push_back(std::move(event));
    outcome_.items.push_back(std::move(item));
}

void UpstreamAnswer::close(std::vector<Event>* events) {
    if (!std::exchange(open_, false)) return;
    Event event{Event::Kind::item_ended};
    event.index = static_cast<uint32_t>(outcome_.items.size() - 1);
    event.item = outcome_.items.back();
    events->push_back(std::move(event));
}

/// An answer that came to its end has a message or a call; a call that was cut is not part of it.
Outcome UpstreamAnswer::finish(std::vector<Event>* events) {
    auto& items = outcome_.items;
    if (outcome_.cut && open_ && items.back().is_call()) {
        items.pop_back();
        open_ = false;
    }
    const bool thought_alone = std::all_of(items.begin(), items.end(), [](const Item& item) {
        return item.kind == Item::Kind::reasoning;
    });
    if (thought_alone && !outcome_.cut) {
        Item item = Item::message(Role::assistant, {});
        item.content.front().kind = ContentPart::Kind::output_text;
        open(std::move(item), events);
    }
    close(events);
    for (const Item& item : items)
        if (item.kind == Item::Kind::message) outcome_.text += item.text();
    return std::move(outcome_);
}

Outcome UpstreamAnswer::broken(Status status, Error error) {
    Outcome outcome = std::move(outcome_);
    if (open_ && outcome.items.back().is_call()) outcome.items.pop_back();
    for (const Item& item : outcome.items)
        if (item.kind == Item::Kind::message) outcome.text += item.text();
    outcome.status = status;
    outcome.error = std::move(error);
    return outcome;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

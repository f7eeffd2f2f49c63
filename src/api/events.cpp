#include "prologue.hpp"

#include "api/surface.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// How an item of a kind is streamed.
struct ResponseEvents::Kind {
    Item::Kind kind;
    const char *delta, *done;  // types of events
    const char* field;         // of the second, with the whole text
    bool in_part;              // of the item's content; else in the item itself
};
const ResponseEvents::Kind ResponseEvents::kinds[] = {
    {Item::Kind::message, "response.output_text.delta", "response.output_text.done", "text", true},
    {Item::Kind::reasoning, "response.reasoning_text.delta", "response.reasoning_text.done", "text",
     true},
    {Item::Kind::function_call, "response.function_call_arguments.delta",
     "response.function_call_arguments.done", "arguments", false},
    {Item::Kind::custom_tool_call, "response.custom_tool_call_input.delta",
     "response.custom_tool_call_input.done", "input", false},
};

const ResponseEvents::Kind& ResponseEvents::kind() const {
    for (const Kind& row : kinds)
        if (row.kind == item_.kind) return row;
    return kinds[0];
}

Json ResponseEvents::event(std::string_view type) {
    return Json::object().set("type", type).set("sequence_number", sequence_number_++);
}

/// One of the open item.
Json ResponseEvents::item_event(std::string_view type) {
    Json one = event(type).set("item_id", item_id_).set("output_index", index_);
    if (kind().in_part) one.set("content_index", 0);
    return one;
}

/// `object`: of a response, and text already.
void ResponseEvents::emit(const Json& event, std::string_view object) {
    if (sequence_number_ <= skipped_) return;
    text_.append("event: ").append(event["type"].as_string());
    text_.append("\ndata: ").append(event.write());
    if (!object.empty()) {
        text_.pop_back();
        text_.append(",\"response\":").append(object).append("}");
    }
    text_.append("\n\n");
}

/// The open item as it stands in an answer.
Json ResponseEvents::item(const char* status) const {
    Json item = item_json(item_, item_id_, status);
    if (!logprobs_.empty())
        item.find("content")->items().front().set("logprobs", render_logprobs(logprobs_));
    return item;
}

void ResponseEvents::begin(const Json& object) {
    emit(event("response.created"), object.write());
    Json running = object;
    running_ = running.set("status", words_.running).write();
    running_.shrink_to_fit();  // it may wait for long
}

void ResponseEvents::start() {
    if (!std::exchange(started_, true)) emit(event("response.in_progress"), running_);
}

void ResponseEvents::add(const Event& event) {
    start();
    keep_tokens(event.logprobs);
    if (event.kind == Event::Kind::item_begun) return open(event.item, event.index);
    if (event.kind == Event::Kind::prompt_progress)
        return emit(this->event("response.prompt_progress")
                        .set("prompt_progress", render_progress(event.progress)));
    const bool delta = event.kind == Event::Kind::text_delta ||
                       event.kind == Event::Kind::reasoning_delta ||
                       event.kind == Event::Kind::arguments_delta;
    if (!delta) return;  // an item that ended is closed once it is known what follows
    if (!open_ || index_ != event.index) {
        if (event.text.empty()) return;  // tokens of an item that is not begun
        open(Item::message(Role::assistant, {}), event.index);
    }
    extend(event.text, tokens_of(index_));
}

void ResponseEvents::open(Item item, size_t index) {
    if (open_) close("completed");
    open_ = true;
    item_ = std::move(item);
    item_.role = Role::assistant;
    item_.content.clear();
    item_.arguments.clear();
    index_ = index;
    begun_ = index + 1;
    const bool first = item_.kind == Item::Kind::message && std::exchange(first_message_, false);
    item_id_ = first ? message_id_ : output_item_id(id_, item_.kind, index);
    emit(event("response.output_item.added")
             .set("output_index", index_)
             .set("item", this->item("in_progress")));
    if (!kind().in_part) return;
    item_.content.push_back({ContentPart::Kind::output_text, {}});
    emit(item_event("response.content_part.added").set("part", this->item()["content"].items()[0]));
}

void ResponseEvents::extend(std::string_view text, const std::vector<TokenLogprob>& logprobs) {
    const bool message = item_.kind == Item::Kind::message;
    if (text.empty() && (!message || logprobs.empty())) return;
    (kind().in_part ? item_.content.front().text : item_.arguments) += text;
    Json delta = item_event(kind().delta).set("delta", text);
    if (message) {
        delta.set("logprobs", render_logprobs(logprobs));
        logprobs_.insert(logprobs_.end(), logprobs.begin(), logprobs.end());
    }
    emit(delta);
}

void ResponseEvents::close(const char* status) {
    extend({}, tokens_of(index_));
    Json done =
        item_event(kind().done).set(kind().field, kind().in_part ? item_.text() : item_.arguments);
    if (item_.kind == Item::Kind::message) done.set("logprobs", render_logprobs(logprobs_));
    if (item_.kind == Item::Kind::function_call) done.set("name", item_.name);
    emit(done);
    if (kind().in_part)
        emit(item_event("response.content_part.done").set("part", item()["content"].items()[0]));
    emit(event("response.output_item.done").set("output_index", index_).set("item", item(status)));
    logprobs_.clear();
    open_ = false;
}

void ResponseEvents::end(const Outcome& outcome, const std::string& object) {
    start();
    const std::vector<Item> items = output_items(outcome, outcome.status);
    for (size_t i = open_ ? index_ : begun_; i < items.size(); ++i) {
        const Item& item = items[i];
        std::string text;
        if (!open_) {
            open(item, i);
            text = item.is_call() ? item.arguments : item.text();
        }
        std::vector<TokenLogprob> tokens = logprobs_of(outcome, i);
        const auto told = static_cast<ptrdiff_t>(std::min(tokens.size(), logprobs_.size()));
        tokens.erase(tokens.begin(), tokens.begin() + told);
        extend(text, tokens);
        close(output_item_status(i + 1 == items.size(), outcome.status, outcome.cut, words_));
    }
    if (open_) close("incomplete");  // a call that was cut: it is not part of the answer
    sequence_number_ = std::max(sequence_number_, skipped_);
    const std::string_view status = status_name(outcome.status, outcome.cut, words_);
    const bool failed = outcome.status != Status::completed;
    emit(event("response." + std::string(failed ? "failed" : status)), object);
    const Json error = render_failure(outcome, words_);
    if (outcome.status != Status::failed || error.is_null()) return;
    emit(event("error")
             .set("code", error["code"])
             .set("message", error["message"])
             .set("param", nullptr));
}

void ResponseEvents::fail(const Error& error, bool goes_on) {
    if (open_ && !goes_on) close("incomplete");
    sequence_number_ = std::max(sequence_number_, skipped_);
    const Json shown = render_error(error)["error"];
    auto object = goes_on ? Json() : Json::parse(running_);
    if (object && object->is_object()) {
        object->set("status", "failed");
        object->set("error",
                    Json::object().set("code", shown["code"]).set("message", shown["message"]));
        emit(event("response.failed"), object->write());
    }
    emit(event("error")
             .set("code", shown["code"])
             .set("message", shown["message"])
             .set("param", shown["param"]));
}

Json render_progress(const PromptProgress& progress) {
    return Json::object()
        .set("total", progress.total)
        .set("cache", progress.cached)
        .set("processed", progress.processed);
}

std::vector<TokenLogprob> EventWriter::tokens_of(size_t item) {
    const auto own = std::stable_partition(waiting_.begin(), waiting_.end(),
                                           [&](const auto& token) { return token.item != item; });
    std::vector<TokenLogprob> tokens(std::make_move_iterator(own),
                                     std::make_move_iterator(waiting_.end()));
    waiting_.erase(own, waiting_.end());
    return tokens;
}

Outcome outcome_of(const Json& object) {
    Outcome outcome;
    const std::string_view status = object["status"].as_string();
    outcome.status = status == "failed"      ? Status::failed
                     : status == "cancelled" ? Status::cancelled
                                             : Status::completed;
    outcome.cut = !object["incomplete_details"].is_null();
    outcome.stopped_by = object["stopped_by"].as_string();
    const Json& usage = object["usage"];
    const auto count = [](const Json& number) {
        return static_cast<uint32_t>(std::clamp<int64_t>(number.as_int(), 0, UINT32_MAX));
    };
    outcome.usage = {
        count(usage["input_tokens"]), count(usage["input_tokens_details"]["cached_tokens"]),
        count(usage["output_tokens"]), count(usage["output_tokens_details"]["reasoning_tokens"])};
    if (const Json& error = object["error"]; error.is_object()) {
        const std::string_view code = error["code"].as_string();
        outcome.error = make_error(
            code == upstream_error_code ? ErrorKind::closed : ErrorKind::unsupported,
            error["message"].as_string(), code);
    }
    for (const Json& item : object["output"].items())
        if (auto read = read_item(item, "output")) outcome.items.push_back(std::move(*read));
    return outcome;
}

std::unique_ptr<EventWriter> event_writer(const AnswerForm& form, const ResponseRecord& record,
                                          Dialect dialect) {
    if (form.surface) {
        auto events = form.surface->events(record, form.include_usage, dialect);
        events->set_echo(form.echo);
        return events;
    }
    return std::make_unique<ResponseEvents>(record.id, record.message_id, words_of(dialect));
}

namespace {

Result<std::string> render_whole(const AnswerForm& form, const std::string& object,
                                 Dialect dialect) {
    if (!form.surface) return object;
    auto text = form.surface->render(object, dialect);
    if (!text || form.echo.empty()) return text;
    auto answer = Json::parse(*text);
    if (!answer) return answer.error();
    Json& choice = answer->find("choices")->items().front();
    choice.set("text", form.echo + std::string(choice["text"].as_string()));
    return answer->write();
}

}  // namespace

Result<std::string> render_answer(const AnswerForm& form, const std::string& object,
                                  Dialect dialect) {
    if (!form.stream) return render_whole(form, object, dialect);
    auto parsed = Json::parse(object);
    if (!parsed) return parsed.error();
    Json& shown = *parsed;
    const Outcome outcome = outcome_of(shown);
    ResponseRecord record;
    record.id = shown["id"].as_string();
    record.model = shown["model"].as_string();
    record.created_at = shown["created_at"].as_int();
    record.input_tokens = outcome.usage.input_tokens;
    for (const Json& item : shown["output"].items())
        if (record.message_id.empty() && item["type"].as_string() == "message")
            record.message_id = item["id"].as_string();
    const auto events = event_writer(form, record, dialect);
    if (form.after != UINT64_MAX) events->skip_to(form.after);
    const DialectWords& words = words_of(dialect);
    for (const char* unknown : {"completed_at", "error", "incomplete_details"})
        shown.set(unknown, nullptr);
    shown.set("output", Json::array()).set("usage", render_usage({}, words));
    events->begin(shown.set("status", words.pending));
    events->end(outcome, object);
    return events->take();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

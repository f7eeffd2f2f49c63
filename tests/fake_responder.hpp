// A Responder that plays a script instead of running a model: it echoes the input, or does what the
// test set up. Until it sees a result it calls the tools that it may, each once; the first alone where
// calls must not be parallel. The server's tests and serve_fake.cpp use it.
#ifndef VALAR_TESTS_FAKE_RESPONDER_HPP
#define VALAR_TESTS_FAKE_RESPONDER_HPP

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "api.hpp"
#include "base/internal.hpp"

class FakeResponder : public valar::Responder {
public:
    explicit FakeResponder(std::string id = "fake", std::vector<std::string> aliases = {}) {
        info.id = std::move(id);
        info.aliases = std::move(aliases);
        info.created = 1'700'000'000;
        info.context_tokens = 100;
    }

    // the script; set it before the requests
    valar::ModelInfo info;
    std::atomic<bool> ready = true;
    std::atomic<bool> hold = false;         ///< answer only when finish() says so
    std::atomic<bool> silent = false;       ///< tells of nothing before the end
    std::atomic<bool> full = false;         ///< submit() has no room
    std::atomic<bool> tells_items = false;  ///< as they are made, a word at a time
    std::atomic<bool> drips = false;        ///< one answer at a time, an event when drip() says so
    std::optional<valar::Error> failure;    ///< of every response
    std::optional<valar::Error> prepare_error;  ///< of every request
    valar::ResponderStats counts;               ///< what stats() says
    valar::Timings timings;                     ///< of every response

    std::vector<valar::ModelInfo> models() const override {
        valar::ModelInfo shown = info;
        shown.ready = ready;
        return {shown};
    }

    valar::Result<std::unique_ptr<valar::Prepared>> prepare(
        const valar::Request& request) override {
        if (prepare_error) return *prepare_error;
        auto prepared = std::make_unique<Task>();
        prepared->words = text_of(request);
        prepared->logprobs = request.logprobs ? static_cast<int>(request.top_logprobs) : -1;
        prepared->model = info.id;
        prepared->calls = calls_of(request);
        prepared->progress = request.prompt_progress;
        prepared->input_tokens = static_cast<uint32_t>(1 + prepared->words.size() / 4);
        if (prepared->input_tokens > info.context_tokens && prepared->words.size() < 10'000)
            return valar::detail::make_error(valar::ErrorKind::invalid_request,
                                             "the prompt has too many tokens",
                                             "context_length_exceeded", "input");
        const char* const names[] = {"asap", "standard", "flex"};
        const std::string window = names[static_cast<size_t>(request.window)];
        if (std::find(info.windows.begin(), info.windows.end(), request.window) ==
            info.windows.end())
            return valar::detail::make_error(valar::ErrorKind::invalid_request,
                                             "this model has no window " + window, "invalid_value",
                                             "metadata.completion_window");
        prepared->max_output = request.max_output_tokens.value_or(UINT32_MAX);
        prepared->stop = request.stop;
        prepared->temperature = request.temperature.value_or(0.7);
        prepared->top_p = request.top_p.value_or(0.9);
        prepared->seed = request.seed.value_or(42);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            organisations_.push_back(request.organisation);
        }
        return std::unique_ptr<valar::Prepared>(std::move(prepared));
    }

    valar::Result<void> submit(std::unique_ptr<valar::Prepared> prepared, std::string id) override {
        if (full)
            return valar::detail::make_error(valar::ErrorKind::overloaded, "the queue is full");
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            Answer& answer = answers_[id];
            answer.task = std::move(static_cast<Task&>(*prepared));
            answer.number = ++submitted_;
            if (!silent) answer.events.push_back({valar::Event::Kind::started, {}, nullptr});
            if (answer.task.progress) add_progress(&answer);
        }
        if (hold) notify(id);
        else finish(id);
        return {};
    }

    std::optional<valar::Event> poll(const std::string& id) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = answers_.find(id);
        if (found == answers_.end() || found->second.events.empty()) return std::nullopt;
        valar::Event event = std::move(found->second.events.front());
        found->second.events.pop_front();
        if (event.kind == valar::Event::Kind::finished) answers_.erase(found);
        return event;
    }

    void cancel(const std::string& id) override {
        ++cancels;
        end(id, valar::Status::cancelled);
    }

    valar::ResponderStats stats() const override { return counts; }

    void on_ready(const valar::ReadyListener& listener) override {
        const std::lock_guard<std::recursive_mutex> lock(listener_mutex_);
        listener_ = listener;
    }

    // what a test does while requests are held
    void finish(const std::string& id) {
        end(id, failure ? valar::Status::failed : valar::Status::completed);
    }
    void drip() {
        std::string id;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            Answer* first = nullptr;
            for (auto& [name, answer] : answers_) {
                if (answer.later.empty() || (first && first->number < answer.number)) continue;
                first = &answer;
                id = name;
            }
            if (!first) return;
            first->events.push_back(std::move(first->later.front()));
            first->later.pop_front();
        }
        notify(id);
    }
    /// Of a request that is held, so many events more of its answer, but not its end. False: that
    /// was all.
    bool tell(const std::string& id, size_t count = 1) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto found = answers_.find(id);
            if (found == answers_.end() || found->second.ended) return false;
            Answer& answer = found->second;
            Answer whole;
            add_items(&whole, outcome_of(answer.task, valar::Status::completed));
            count = std::min(count, whole.events.size() - 1 - answer.told);  // `started` was told
            if (count == 0) return false;
            const auto from = whole.events.begin() + 1 + static_cast<ptrdiff_t>(answer.told);
            answer.events.insert(answer.events.end(), from, from + static_cast<ptrdiff_t>(count));
            answer.told += count;
        }
        notify(id);
        return true;
    }
    std::vector<std::string> waiting() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::vector<std::string> ids;
        for (const auto& [id, answer] : answers_)
            if (!answer.ended) ids.push_back(id);
        return ids;
    }
    size_t events_left() const {  ///< that nobody polled
        const std::lock_guard<std::mutex> lock(mutex_);
        size_t left = 0;
        for (const auto& [id, answer] : answers_) left += answer.events.size();
        return left;
    }
    std::vector<std::string> organisations() const {  ///< of the requests so far
        const std::lock_guard<std::mutex> lock(mutex_);
        return organisations_;
    }
    std::atomic<int> cancels = 0;

private:
    struct Task : valar::Prepared {
        std::string words;
        int logprobs = -1;  // alternatives; -1: none asked for
        bool progress = false;
        std::vector<valar::Item> calls;
        uint32_t max_output = UINT32_MAX;
        std::vector<std::string> stop;
    };
    struct Answer {
        Task task;
        uint64_t number = 0;  // in the order of submission
        bool ended = false;
        size_t told = 0;  // of what comes after `started`, by tell()
        std::deque<valar::Event> events, later;
    };

    static std::string text_of(const valar::Request& request) {
        std::string words = request.input.text;
        for (const valar::Item& item : request.input.items) words += item.text();
        if (!request.raw || request.raw->tokens.empty()) return words;
        words += "raw ";
        for (const int32_t token : request.raw->tokens) words += std::to_string(token) + " ";
        return words + request.raw->suffix;
    }

    static std::vector<valar::Item> calls_of(const valar::Request& request) {
        using Kind = valar::Item::Kind;
        const valar::ToolChoice& choice = request.tool_choice;
        std::vector<valar::Item> calls;
        if (choice.mode == valar::ToolChoice::Mode::none) return calls;
        for (const valar::Item& item : request.input.items)
            if (item.kind == Kind::function_call_output ||
                item.kind == Kind::custom_tool_call_output)
                return calls;
        for (const valar::Tool& tool : request.tools) {
            const auto& names = choice.names;
            const bool may = names.empty() ||
                             std::find(names.begin(), names.end(), tool.name) != names.end();
            if (!may || (!request.parallel_tool_calls && !calls.empty())) continue;
            valar::Item call;
            call.kind = tool.custom ? Kind::custom_tool_call : Kind::function_call;
            call.role = valar::Role::assistant;
            call.call_id = "call_fake" + std::to_string(calls.size());
            call.name = tool.name;
            call.arguments = tool.custom ? "text" : R"({"city": "Oslo"})";
            calls.push_back(std::move(call));
        }
        return calls;
    }

    /// "echo: " and the input, a word a token.
    valar::Outcome outcome_of(const Task& task, valar::Status status) const {
        valar::Outcome outcome;
        outcome.status = status;
        outcome.usage.input_tokens = task.input_tokens;
        outcome.timings = timings;
        if (status == valar::Status::failed) outcome.error = failure;
        if (status == valar::Status::cancelled)
            outcome.error = valar::detail::make_error(valar::ErrorKind::cancelled, "cancelled");
        if (status != valar::Status::completed) return outcome;
        if (!task.calls.empty()) {
            valar::Item thought;
            thought.kind = valar::Item::Kind::reasoning;
            thought.role = valar::Role::assistant;
            thought.content = {{valar::ContentPart::Kind::output_text, "hm"}};
            outcome.items = {thought};
            outcome.items.insert(outcome.items.end(), task.calls.begin(), task.calls.end());
            return outcome;
        }
        std::string all = "echo: " + task.words;
        for (const std::string& stop : task.stop)
            if (const size_t at = all.find(stop); at != all.npos) {
                all.resize(at);
                outcome.stopped_by = stop;
            }
        for (size_t at = 0; at < all.size();) {
            if (outcome.usage.output_tokens == task.max_output) {
                outcome.cut = true;
                break;
            }
            const size_t end = std::min(all.find(' ', at), all.size() - 1) + 1;
            valar::TokenLogprob token{all.substr(at, end - at), -0.5f, {}};
            for (int i = 0; i < task.logprobs; ++i)
                token.top.push_back({token.bytes, -0.5f - static_cast<float>(i)});
            if (task.logprobs >= 0) outcome.logprobs.push_back(token);
            outcome.text += token.bytes;
            ++outcome.usage.output_tokens;
            at = end;
        }
        return outcome;
    }

    /// Read in two pieces, the first of which was in the cache.
    static void add_progress(Answer* answer) {
        valar::Event event{valar::Event::Kind::prompt_progress};
        for (const uint32_t read : {1u, answer->task.input_tokens}) {
            event.progress = {answer->task.input_tokens, read, 1};
            answer->events.push_back(event);
        }
    }

    static void add_items(Answer* answer, const valar::Outcome& outcome) {
        using Kind = valar::Event::Kind;
        answer->events.clear();
        answer->events.push_back({Kind::started, {}, nullptr});
        if (answer->task.progress) add_progress(answer);
        std::vector<valar::Item> items = outcome.items;
        if (items.empty() && !outcome.text.empty())
            items.push_back(valar::Item::message(valar::Role::assistant, outcome.text));
        size_t token = 0;
        for (uint32_t i = 0; i < items.size(); ++i) {
            valar::Event begun{Kind::item_begun, {}, nullptr, {}, i, items[i]};
            begun.item.content.clear();
            begun.item.arguments.clear();
            answer->events.push_back(begun);
            const bool call = items[i].is_call();
            const std::string all = call ? items[i].arguments : items[i].text();
            for (size_t at = 0; at < all.size();) {
                const size_t stop = std::min(all.find(' ', at), all.size() - 1) + 1;
                const Kind kind = call ? Kind::arguments_delta
                                  : items[i].kind == valar::Item::Kind::message
                                      ? Kind::text_delta
                                      : Kind::reasoning_delta;
                valar::Event delta{kind, all.substr(at, stop - at), nullptr, {}, i, {}};
                if (kind == Kind::text_delta && token < outcome.logprobs.size())
                    delta.logprobs = {outcome.logprobs[token++]};
                answer->events.push_back(delta);
                at = stop;
            }
            answer->events.push_back({Kind::item_ended, {}, nullptr, {}, i, items[i]});
        }
    }

    void end(const std::string& id, valar::Status status) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto found = answers_.find(id);
            if (found == answers_.end()) return;
            Answer& answer = found->second;
            const bool broken_off = status == valar::Status::cancelled && !answer.later.empty();
            if (answer.ended && !broken_off) return;
            answer.later.clear();
            answer.ended = true;
            auto outcome = std::make_shared<valar::Outcome>(outcome_of(answer.task, status));
            if (!outcome->text.empty() && answer.told == 0)
                answer.events.push_back(
                    {valar::Event::Kind::text_delta, outcome->text, nullptr, outcome->logprobs});
            if (tells_items && answer.told == 0) add_items(&answer, *outcome);
            answer.events.push_back({valar::Event::Kind::finished, {}, outcome});
            if (drips && !broken_off) answer.later.swap(answer.events);
        }
        notify(id);
    }

    void notify(const std::string& id) {
        const std::lock_guard<std::recursive_mutex> lock(listener_mutex_);
        if (listener_.call) listener_.call(listener_.context, id);
    }

    mutable std::mutex mutex_;
    std::map<std::string, Answer> answers_;
    uint64_t submitted_ = 0;
    std::vector<std::string> organisations_;
    std::recursive_mutex listener_mutex_;  // held during calls, so that taking it away waits
    valar::ReadyListener listener_;
};

#endif

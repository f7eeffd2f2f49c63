#include "prologue.hpp"

#include "api/announcer.hpp"
#include "base/text.hpp"
#include "digest_internal.hpp"
#include "http/client.hpp"
#include "http/sse.hpp"
#include "http/text.hpp"
#include "upstream/answer.hpp"
#include "upstream/upstream.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

constexpr uint64_t upstream_open_ns = 5'000'000'000;           // for the first lists of models
constexpr int upstream_list_ms = 5'000;                        // for one of them
constexpr uint64_t upstream_list_bytes = 4 << 20;              // of it
constexpr size_t upstream_most_models = 1000;                  // in it
constexpr size_t upstream_most_id = 256;                       // of a model's name
constexpr size_t upstream_event_bytes = 8 << 20;               // of an answer, one chunk
constexpr uint64_t upstream_reply_bytes = 256 << 20;           // all of it
constexpr int upstream_reply_ms = 24 * 3600 * 1000;            // likewise
constexpr size_t upstream_refusal_bytes = 64 << 10;            // of what else it says
constexpr uint64_t upstream_wait_ms[] = {0, 60'000, 300'000};  // behind asap: standard, flex
static_assert(std::size(upstream_wait_ms) == std::size(kWindowNames));

}  // namespace

/// A server that is asked.
struct UpstreamServer {
    std::string host, path;  // of the URL; the path without /v1
    uint16_t port = 0;
    std::string name;  // in the log
    std::vector<ModelInfo> models = {};
    bool up = false, asked = false;
    uint32_t running = 0;
    uint64_t look_at_ms = 0;                      // when its models are asked for next
    std::optional<uint64_t> look = std::nullopt;  // the call that asks

    const ModelInfo* model(std::string_view id) const {
        for (const ModelInfo& one : models)
            if (one.id == id) return &one;
        return nullptr;
    }
};

struct UpstreamPrepared : Prepared {
    const void* whose = nullptr;
    UpstreamCall call;
    std::string owned_by;
    Window window = Window::standard;
    bool patient = false;  // nobody is kept waiting by it
    const void* owner() const override { return whose; }
};

/// A request on its way.
struct UpstreamTask {
    std::string id;
    std::unique_ptr<UpstreamPrepared> prepared;
    // Guarded by the mutex of all:
    std::deque<Event> events = {};  // not polled yet
    bool hungry = true;             // poll found nothing: the next event is announced
    bool cancelled = false;
    // Of the thread that asks:
    uint64_t queued_ns = 0, sent_ns = 0, first_ns = 0;
    std::vector<bool> tried = {};  // servers
    size_t server = 0;
    uint64_t call = 0;  // 0: it waits
    bool begun = false, over = false;
    std::optional<UpstreamAnswer> answer = {};
    std::optional<SseReader> reader = {};
    std::string refusal = {};         // the body of what is no answer
    std::optional<Error> fault = {};  // found in the answer
};
using UpstreamTaskPtr = std::shared_ptr<UpstreamTask>;

namespace {

/// Of a URL its parts; "/v1" at its end is left out, the API is below it anyway.
Result<UpstreamServer> read_upstream(const std::string& text) {
    UpstreamServer server;
    server.name = text;
    if (unix_path(text)) {
        server.host = text;
        return server;
    }
    auto url = http_parse_url(text);
    if (!url) return make_error(ErrorKind::invalid_request, url.error().message, {}, "urls");
    if (url->tls || url->target.find('?') != std::string::npos)
        return make_error(ErrorKind::invalid_request,
                          url->tls ? "https is not spoken to upstream servers: put a proxy between"
                                   : "the URL of an upstream server has no query",
                          {}, "urls");
    server.host = url->host;
    server.port = url->port;
    std::string_view path = url->target;
    while (path.ends_with('/')) path.remove_suffix(1);
    if (path.ends_with("/v1")) path.remove_suffix(3);
    server.path = path;
    return server;
}

/// Of GET /v1/models. What is no model is left out.
std::vector<ModelInfo> read_models(const Json& list) {
    std::vector<ModelInfo> models;
    for (const Json& one : list["data"].items()) {
        const std::string_view id = one["id"].as_string();
        if (id.empty() || id.size() > upstream_most_id || models.size() == upstream_most_models)
            continue;
        ModelInfo model;
        model.id = id;
        model.created = one["created"].as_int();
        model.owned_by = one["owned_by"].as_string("upstream").substr(0, upstream_most_id);
        const uint64_t context = one["max_model_len"].as_uint(one["meta"]["n_ctx"].as_uint());
        model.context_tokens = static_cast<uint32_t>(std::min<uint64_t>(context, UINT32_MAX));
        model.tools = model.thinking = true;
        models.push_back(std::move(model));
    }
    return models;
}

/// Only the server knows; what it says comes with the end of its answer.
uint32_t estimate_tokens(const Request& request) {
    size_t bytes = request.instructions.size() + request.input.text.size();
    for (const Item& item : request.input.items)
        bytes += item.text().size() + item.arguments.size();
    return static_cast<uint32_t>(std::min<size_t>(1 + bytes / 4, UINT32_MAX));
}

/// What clients are told: no addresses.
const char* upstream_trouble(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::timeout: return "it did not answer in time";
        case ErrorKind::too_large: return "its answer was too long";
        case ErrorKind::bad_data: return "it broke off, or sent what is no HTTP";
        default: return "it cannot be reached";
    }
}

/// Statuses that say something of the request, which other servers would say as well.
bool upstream_blames_request(int status) { return status == 400 || status == 413 || status == 422; }

}  // namespace

struct UpstreamLoop : Responder, HttpCaller {
    explicit UpstreamLoop(const UpstreamOptions& given, Poller made)
        : options(given), poller(std::move(made)), client(&poller) {}
    Result<void> start();
    void stop();

    std::vector<ModelInfo> models() const override;
    Result<std::unique_ptr<Prepared>> prepare(const Request& request) override;
    Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) override;
    std::optional<Event> poll(const std::string& id) override;
    void cancel(const std::string& id) override;
    ResponderStats stats() const override;
    void on_ready(const ReadyListener& listener) override { announcer.set(listener); }

    // In the thread that asks.
    void run();
    void take_arrivals();
    void send_waiting();
    enum class Choice : uint8_t { chosen, all_busy, none };
    Choice choose(UpstreamTask& task) const;
    void send(const UpstreamTaskPtr& task);
    void look_at(UpstreamServer& server);
    void looked(UpstreamServer& server, const Result<HttpReply>& reply);
    void set_up(UpstreamServer& server, bool up, std::string_view why);
    HttpErrand errand_to(const UpstreamServer& server, const char* method,
                         std::string target) const;
    void on_piece(uint64_t call, int status, std::string_view bytes) override;
    void read_chunk(UpstreamTask& task, std::string_view data);
    void on_reply(uint64_t call, Result<HttpReply> reply) override;
    void answered(const UpstreamTaskPtr& task, const Result<HttpReply>& reply);
    void try_another(const UpstreamTaskPtr& task, Error error);
    void push(UpstreamTask& task, std::vector<Event> events);
    void end(const UpstreamTaskPtr& task, Outcome outcome, std::vector<Event> events = {});
    void end(const UpstreamTaskPtr& task, Status status, Error error);

    const Process process;
    const UpstreamOptions options;
    Poller poller;
    HttpClient client;
    Announcer announcer;
    std::atomic<uint32_t> unasked{0};  // servers; open() sleeps on it
    std::atomic<bool> ending{false};
    Thread thread;

    std::unordered_map<uint64_t, UpstreamTaskPtr> calls;
    std::multimap<uint64_t, UpstreamTaskPtr> waiting;  // by when they should be sent
    std::vector<std::string> awaited;                  // ids with events, told before the next wait

    mutable std::mutex mutex;             // guards what follows
    std::vector<UpstreamServer> servers;  // changed by the thread that asks alone
    std::unordered_map<std::string, UpstreamTaskPtr> tasks;
    std::vector<UpstreamTaskPtr> arrivals;  // and those that were cancelled
    ResponderStats counts;
};

// ---- The Responder -----------------------------------------------------------------------------

std::vector<ModelInfo> UpstreamLoop::models() const {
    std::vector<ModelInfo> all;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const UpstreamServer& server : servers)
        for (const ModelInfo& model : server.models) {
            const auto same = std::find_if(
                all.begin(), all.end(), [&](const ModelInfo& one) { return one.id == model.id; });
            if (same != all.end()) {
                same->ready |= server.up;
                continue;
            }
            all.push_back(model);
            all.back().ready = server.up;
        }
    return all;
}

Result<std::unique_ptr<Prepared>> UpstreamLoop::prepare(const Request& given) {
    if (auto checked = check_request(given); !checked) return checked.error();
    Request request = given;
    const std::vector<ModelInfo> all = models();
    const auto model = std::find_if(all.begin(), all.end(), [&](const ModelInfo& one) {
        return request.model.empty() || one.id == request.model;
    });
    if (model == all.end())
        return make_error(ErrorKind::not_found, "the model '" + request.model + "' does not exist",
                          "model_not_found", "model");
    if (!model->ready && !request.background)
        return upstream_error(upstream_trouble(ErrorKind::io));
    request.model = model->id;
    if (!request.seed) {  // so that it is the same one when it has to be sent again
        uint64_t drawn = 0;
        if (auto random = random_bytes(&drawn, sizeof drawn); !random) return random.error();
        request.seed = static_cast<int64_t>(drawn >> 33);  // 31 bits: all servers take it
    }
    auto call = upstream_call(request, model->owned_by);
    if (!call) return call.error();
    auto out = std::make_unique<UpstreamPrepared>();
    out->whose = this;
    out->call = std::move(*call);
    out->owned_by = model->owned_by;
    out->window = request.window;
    out->patient = request.background;
    out->model = model->id;
    out->input_tokens = estimate_tokens(request);
    out->temperature = request.temperature.value_or(1);
    out->top_p = request.top_p.value_or(1);
    out->seed = *request.seed;
    return std::unique_ptr<Prepared>(std::move(out));
}

Result<void> UpstreamLoop::submit(std::unique_ptr<Prepared> prepared, std::string id) {
    if (!prepared || prepared->owner() != this)
        return make_error(ErrorKind::invalid_request,
                          "submit(): the request was not prepared by this upstream");
    auto task = std::make_shared<UpstreamTask>();
    task->id = std::move(id);
    task->prepared.reset(static_cast<UpstreamPrepared*>(prepared.release()));
    task->queued_ns = monotonic_ns();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (counts.queued >= options.max_queued)
            return make_error(ErrorKind::overloaded,
                              format("%u requests are waiting already", counts.queued),
                              "overloaded");
        if (!tasks.emplace(task->id, task).second)
            return make_error(ErrorKind::internal, "the id " + task->id + " is in use");
        ++counts.queued;
        arrivals.push_back(std::move(task));
    }
    poller.wake();
    return {};
}

std::optional<Event> UpstreamLoop::poll(const std::string& id) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = tasks.find(id);
    if (found == tasks.end()) return std::nullopt;
    UpstreamTask& task = *found->second;
    task.hungry = task.events.empty();
    if (task.hungry) return std::nullopt;
    Event event = std::move(task.events.front());
    task.events.pop_front();
    if (event.kind == Event::Kind::finished) tasks.erase(found);
    return event;
}

void UpstreamLoop::cancel(const std::string& id) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto found = tasks.find(id);
        if (found == tasks.end() || std::exchange(found->second->cancelled, true)) return;
        arrivals.push_back(found->second);
    }
    poller.wake();
}

ResponderStats UpstreamLoop::stats() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return counts;
}

// ---- The thread that asks ----------------------------------------------------------------------

Result<void> UpstreamLoop::start() {
    unasked = static_cast<uint32_t>(servers.size());
    auto started = Thread::start([](void* self) { static_cast<UpstreamLoop*>(self)->run(); }, this,
                                 "valar upstream");
    if (!started) return started.error();
    thread = std::move(*started);
    const uint64_t until = monotonic_ns() + upstream_open_ns;
    for (uint64_t now = monotonic_ns(); now < until; now = monotonic_ns())
        if (const uint32_t left = unasked) wait_on(&unasked, left, until - now);
        else break;
    return {};
}

/// Before the destructor of any class: the thread calls virtual functions.
void UpstreamLoop::stop() {
    ending = true;
    poller.wake();
    if (thread.joinable()) thread.join();
}

void UpstreamLoop::run() {
    std::vector<PollEvent> events;
    while (!ending) {
        const uint64_t now = http_now_ms();
        take_arrivals();
        uint64_t next = http_no_deadline;
        for (UpstreamServer& server : servers) {
            if (!server.look && server.look_at_ms <= now) look_at(server);
            if (!server.look) next = std::min(next, server.look_at_ms);
        }
        send_waiting();
        client.step(http_now_ms());
        next = std::min(next, client.deadline());
        // All at once: who listens wakes once for the tokens of a server's step.
        for (const std::string& id : awaited) announcer.call(id);
        awaited.clear();
        const uint64_t left = next - std::min(next, http_now_ms());
        // Without a poller nothing can be heard; the calls end by their times.
        if (auto waited = poller.wait(static_cast<int>(std::min<uint64_t>(left, 60'000)), &events);
            !waited)
            events.clear();
        for (const PollEvent& event : events) client.on_event(event);
    }
}

/// New ones wait, and those that were cancelled end.
void UpstreamLoop::take_arrivals() {
    std::vector<UpstreamTaskPtr> news, ended;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        for (UpstreamTaskPtr& task : arrivals)
            (task->cancelled ? ended : news).push_back(std::move(task));
        arrivals.clear();
    }
    for (const UpstreamTaskPtr& task : news) {
        const auto window = static_cast<size_t>(task->prepared->window);
        task->tried.resize(servers.size());
        waiting.emplace(task->queued_ns / 1'000'000 + upstream_wait_ms[window], task);
    }
    for (const UpstreamTaskPtr& task : ended) {
        if (task->over) continue;
        if (task->call) client.cancel(task->call);
        else std::erase_if(waiting, [&](const auto& one) { return one.second == task; });
        end(task, Status::cancelled, make_error(ErrorKind::cancelled, "cancelled"));
    }
}

/// The least busy of the servers that have the model, are up, and were not asked for it yet.
UpstreamLoop::Choice UpstreamLoop::choose(UpstreamTask& task) const {
    const UpstreamPrepared& wanted = *task.prepared;
    Choice choice = Choice::none;
    for (size_t i = 0; i < servers.size(); ++i) {
        const UpstreamServer& server = servers[i];
        const ModelInfo* model = server.model(wanted.model);
        if (!server.up || task.tried[i] || !model || model->owned_by != wanted.owned_by) continue;
        if (server.running >= options.max_running) {
            if (choice == Choice::none) choice = Choice::all_busy;
        } else if (choice != Choice::chosen || server.running < servers[task.server].running) {
            choice = Choice::chosen;
            task.server = i;
        }
    }
    return choice;
}

void UpstreamLoop::send_waiting() {
    size_t up = 0, busy = 0;
    for (const UpstreamServer& server : servers) {
        up += server.up;
        busy += server.up && server.running >= options.max_running;
    }
    if (up > 0 && busy == up) return;
    for (auto at = waiting.begin(); at != waiting.end();) {
        const UpstreamTaskPtr task = at->second;
        const Choice choice = choose(*task);
        const bool waits = task->prepared->patient &&
                           !task->fault;  // as long as nobody failed at it
        if (choice == Choice::all_busy || (choice == Choice::none && waits)) {
            ++at;
            continue;
        }
        at = waiting.erase(at);
        if (choice == Choice::chosen) send(task);
        else
            end(task, Status::failed,
                task->fault.value_or(upstream_error(upstream_trouble(ErrorKind::io))));
    }
}

HttpErrand UpstreamLoop::errand_to(const UpstreamServer& server, const char* method,
                                   std::string target) const {
    HttpErrand errand;
    errand.call.host = server.host;
    errand.call.port = server.port;
    errand.call.method = method;
    errand.call.target = server.path + "/v1" + std::move(target);
    if (!options.key.empty()) errand.call.headers = {{"Authorization", "Bearer " + options.key}};
    errand.keeps_alive = true;
    return errand;
}

void UpstreamLoop::send(const UpstreamTaskPtr& task) {
    UpstreamServer& server = servers[task->server];
    const UpstreamCall& call = task->prepared->call;
    HttpErrand errand = errand_to(server, "POST", call.target);
    errand.call.headers.push_back({"Content-Type", "application/json"});
    errand.call.body = call.body;
    errand.call.timeout_ms = upstream_reply_ms;
    errand.call.max_reply_bytes = upstream_reply_bytes;
    errand.silence_timeout_ms = options.silence_timeout_ms;
    errand.streams = true;
    task->tried[task->server] = true;
    task->answer.emplace(call);
    task->reader.emplace(upstream_event_bytes);
    task->refusal.clear();
    task->fault.reset();
    task->sent_ns = monotonic_ns();
    ++server.running;
    task->call = client.start(std::move(errand), this);
    calls.emplace(task->call, task);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --counts.queued;
        ++counts.running;
    }
    if (!std::exchange(task->begun, true)) push(*task, {Event{Event::Kind::started}});
}

// ---- Which servers there are -------------------------------------------------------------------

void UpstreamLoop::look_at(UpstreamServer& server) {
    HttpErrand errand = errand_to(server, "GET", "/models");
    errand.call.timeout_ms = upstream_list_ms;
    errand.call.max_reply_bytes = upstream_list_bytes;
    server.look = client.start(std::move(errand), this);
}

void UpstreamLoop::looked(UpstreamServer& server, const Result<HttpReply>& reply) {
    server.look.reset();
    std::string why = reply ? format("its list of models has status %d", reply->status)
                            : reply.error().message;
    bool up = false;
    if (reply && reply->status == 200) {
        const auto list = Json::parse(reply->body);
        up = list && (*list)["data"].is_array();
        why = "its list of models is none";
        if (up) {
            std::vector<ModelInfo> found = read_models(*list);
            const std::lock_guard<std::mutex> lock(mutex);
            server.models = std::move(found);
        }
    }
    set_up(server, up, why);
    server.look_at_ms = http_now_ms() + (up ? options.refresh_ms : options.retry_ms);
    if (std::exchange(server.asked, true)) return;
    --unasked;
    wake(&unasked);
}

void UpstreamLoop::set_up(UpstreamServer& server, bool up, std::string_view why) {
    if (server.up == up && server.asked) return;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        server.up = up;
    }
    options.log(up ? LogLevel::info : LogLevel::warning,
                join({"upstream ", server.name,
                      up ? " answers" : " is down: ", up ? std::string_view() : why}));
}

// ---- Answers -----------------------------------------------------------------------------------

void UpstreamLoop::on_piece(uint64_t call, int status, std::string_view bytes) {
    const auto found = calls.find(call);
    if (found == calls.end()) return;
    UpstreamTask& task = *found->second;
    if (status != 200) {
        const size_t room = upstream_refusal_bytes - task.refusal.size();
        task.refusal.append(bytes.substr(0, room));
        return;
    }
    for (size_t used = 0; !bytes.empty() && !task.fault; bytes.remove_prefix(used)) {
        const SseReader::Found next = task.reader->feed(bytes, &used);
        if (next == SseReader::Found::fault) task.fault = upstream_error("an event was too long");
        if (next == SseReader::Found::event) read_chunk(task, task.reader->data());
    }
    if (!task.fault) return;
    // What it said is no answer: it is not heard to its end.
    client.cancel(call);
    const UpstreamTaskPtr kept = found->second;
    answered(kept, HttpReply{200, {}, {}});
}

void UpstreamLoop::read_chunk(UpstreamTask& task, std::string_view data) {
    if (data == "[DONE]") return;
    const auto chunk = Json::parse(data);
    if (!chunk) {
        task.fault = upstream_error("it sent what is no JSON");
        return;
    }
    std::vector<Event> events;
    if (auto read = task.answer->add(*chunk, &events); !read) task.fault = read.error();
    if (events.empty()) return;
    if (task.first_ns == 0) task.first_ns = monotonic_ns();
    push(task, std::move(events));
}

void UpstreamLoop::on_reply(uint64_t call, Result<HttpReply> reply) {
    for (UpstreamServer& server : servers)
        if (server.look == call) return looked(server, reply);
    if (const auto found = calls.find(call); found != calls.end()) {
        const UpstreamTaskPtr task = found->second;
        answered(task, reply);
    }
}

/// The call is over: with the answer, with a refusal, or in the middle.
void UpstreamLoop::answered(const UpstreamTaskPtr& task, const Result<HttpReply>& reply) {
    UpstreamServer& server = servers[task->server];
    if (!reply && !task->answer->is_over()) {
        options.log(LogLevel::warning,
                    join({"upstream ", server.name, ", ", task->id, ": ", reply.error().message}));
        server.look_at_ms = 0;
        set_up(server, false, reply.error().message);
        return try_another(task, upstream_error(upstream_trouble(reply.error().kind)));
    }
    if (task->fault) {
        options.log(LogLevel::warning,
                    join({"upstream ", server.name, ", ", task->id, ": ", task->fault->message}));
        return try_another(task, *task->fault);
    }
    if (!reply || reply->status == 200) {
        if (!task->answer->is_over())
            return try_another(task, upstream_error("its answer ended in the middle"));
        std::vector<Event> events;
        Outcome outcome = task->answer->finish(&events);
        return end(task, std::move(outcome), std::move(events));
    }
    const auto body = Json::parse(task->refusal);
    const Json said = body ? ((*body)["error"].is_object() ? (*body)["error"] : *body) : Json();
    const std::string message = upstream_said(said["message"]);
    options.log(LogLevel::warning, join({"upstream ", server.name, ", ", task->id, ": status ",
                                         std::to_string(reply->status), " ", message}));
    if (!upstream_blames_request(reply->status)) {
        if (reply->status == 404) server.look_at_ms = 0;  // its models may be others by now
        return try_another(
            task, upstream_error("it answered with status " + std::to_string(reply->status)));
    }
    const bool length = said["code"].as_string() == "context_length_exceeded" ||
                        message.find("context length") != message.npos;
    end(task, Status::failed,
        make_error(ErrorKind::invalid_request, message,
                   length ? "context_length_exceeded" : "invalid_value"));
}

/// As long as nobody saw anything of an answer; else it has failed.
void UpstreamLoop::try_another(const UpstreamTaskPtr& task, Error error) {
    if (task->first_ns != 0) return end(task, Status::failed, std::move(error));
    --servers[task->server].running;
    calls.erase(std::exchange(task->call, 0));
    task->fault = std::move(error);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --counts.running;
        ++counts.queued;
    }
    waiting.emplace(0, task);
    poller.wake();
}

/// Text that is not polled yet is joined.
void UpstreamLoop::push(UpstreamTask& task, std::vector<Event> events) {
    bool announce = false;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        for (Event& event : events) {
            Event* last = task.events.empty() ? nullptr : &task.events.back();
            const bool delta = !event.text.empty() || !event.logprobs.empty();
            if (delta && last && last->kind == event.kind && last->index == event.index) {
                last->text += event.text;
                last->logprobs.insert(last->logprobs.end(), event.logprobs.begin(),
                                      event.logprobs.end());
            } else {
                task.events.push_back(std::move(event));
            }
        }
        announce = std::exchange(task.hungry, false);
    }
    if (announce) awaited.push_back(task.id);
}

void UpstreamLoop::end(const UpstreamTaskPtr& task, Status status, Error error) {
    Outcome outcome;
    if (task->answer) outcome = task->answer->broken(status, error);
    outcome.status = status;
    outcome.error = std::move(error);
    end(task, std::move(outcome), {});
}

void UpstreamLoop::end(const UpstreamTaskPtr& task, Outcome outcome, std::vector<Event> events) {
    const uint64_t now = monotonic_ns();
    const uint64_t sent = task->sent_ns ? task->sent_ns : now;
    const uint64_t first = task->first_ns ? task->first_ns : now;
    outcome.timings = {(sent - task->queued_ns) / 1000, (first - sent) / 1000,
                       (now - first) / 1000};
    task->over = true;
    if (task->call) --servers[task->server].running;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --(task->call ? counts.running : counts.queued);
        ++(outcome.status == Status::completed   ? counts.completed
           : outcome.status == Status::cancelled ? counts.cancelled
                                                 : counts.failed);
        counts.input_tokens += outcome.usage.input_tokens;
        counts.output_tokens += outcome.usage.output_tokens;
        counts.cached_tokens += outcome.usage.cached_tokens;
        counts.queue_us += outcome.timings.queue_us;
        counts.prefill_us += outcome.timings.prefill_us;
        counts.decode_us += outcome.timings.decode_us;
    }
    if (task->call) calls.erase(task->call);
    Event last{Event::Kind::finished};
    last.outcome = std::make_shared<const Outcome>(std::move(outcome));
    events.push_back(std::move(last));
    push(*task, std::move(events));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

struct Upstream::State final : detail::UpstreamLoop {
    using UpstreamLoop::UpstreamLoop;
    ~State() override { stop(); }
};

Result<Upstream> Upstream::open(const UpstreamOptions& options) {
    const auto refuse = [](const char* option, const char* message) {
        return detail::make_error(ErrorKind::invalid_request, message, {}, option);
    };
    if (options.urls.empty()) return refuse("urls", "there is no upstream server");
    if (options.max_running == 0) return refuse("max_running", "0 lets no request through");
    if (options.refresh_ms == 0) return refuse("refresh_ms", "0 would ask without end");
    if (options.retry_ms == 0) return refuse("retry_ms", "0 would ask without end");
    if (!detail::http_field_ok({"Authorization", options.key}))
        return refuse("key", "the key holds invalid characters");
    auto poller = detail::Poller::open();
    if (!poller) return poller.error();
    auto state = std::make_unique<State>(options, std::move(*poller));
    for (const std::string& url : options.urls) {
        auto server = detail::read_upstream(url);
        if (!server) return server.error();
        state->servers.push_back(std::move(*server));
    }
    if (auto started = state->start(); !started) return started.error();
    return Upstream(std::move(state));
}

Upstream::Upstream(std::unique_ptr<State> state) : state_(std::move(state)) {}
Upstream::Upstream(Upstream&& other) noexcept = default;
Upstream& Upstream::operator=(Upstream&& other) noexcept = default;
Upstream::~Upstream() { detail::leave_to_parent(state_); }

Responder* Upstream::responder() { return state_.get(); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

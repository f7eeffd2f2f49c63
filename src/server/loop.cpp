// >>server
// The loop thread owns exchanges and live responses; a job carries work to a worker or a change to
// the store, and the result back. A request: on_head (who, where) -> accept (a worker: parse,
// validate, prepare; the loop: is there room; the store: keep it) -> submit -> events -> finish (a
// worker renders, the store keeps it) -> reply. All who want one response wait for the same record.
#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

ServerLoop::~ServerLoop() {
    if (listening)
        for (Responder* responder : responders) responder->on_ready({});
    {
        const std::lock_guard<std::mutex> lock(jobs_mutex);
        ending = true;
    }
    jobs_waiting.notify_all();
    for (Thread& worker : workers) worker.join();
    for (auto& [id, entry] : live) {
        park(id, entry);
        while (entry.responder && entry.responder->poll(id)) {}
    }
    look_after_batches();
    save_usage();
    while (const uint32_t left = storing) wait_on(&storing, left, 1'000'000);
}

Result<void> ServerLoop::start() {
    auto opened = HttpServer::open(server_http_options(options), this);
    if (!opened && unix_path(options.host)) opened.error().param = "host";
    if (!opened) return opened.error();
    started_s = static_cast<double>(unix_time_ms()) / 1e3;
    http.emplace(std::move(*opened));
    for (Thread& worker : workers) {
        const auto run = [](void* self) { static_cast<ServerLoop*>(self)->run_jobs(); };
        auto started = Thread::start(run, this, "valar worker");
        if (!started) return started.error();
        worker = std::move(*started);
    }
    for (Responder* responder : responders) responder->on_ready({&ServerLoop::on_ready, this});
    listening = true;
    webhooks.open();
    std::string names;
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            names.append(names.empty() ? "" : ",").append(model.id);
    say(LogLevel::info, Json::object()
                            .set("event", "start")
                            .set("version", VALAR_VERSION)
                            .set("address", http->address().text())
                            .set("models", names));
    recover_all();
    hand_over();
    return {};
}

bool ServerLoop::step(int timeout_ms) {
    const bool more = http->step(timeout_ms);
    hand_over();
    if (stopping && !std::exchange(drain_begun, true)) begin_drain();
    if (!more && finishing == 0 && !std::exchange(end_told, true))
        say(LogLevel::info, Json::object().set("event", "stop").set("unfinished", live.size()));
    if (more || finishing == 0) return more;
    // http is done and takes no more calls; what has an outcome is still to be kept.
    const uint32_t seen = inbox_count;
    take_inbox();
    hand_over();
    if (finishing > 0) wait_on(&inbox_count, seen, 10'000'000);
    return true;
}

// ---- Replies ---------------------------------------------------------------------------------

HttpReply ServerLoop::make_reply(const Exchange& exchange, int status, std::string body,
                                 HttpHeaders headers) {
    HttpReply reply;
    reply.status = status;
    reply.headers = std::move(headers);
    reply.headers.emplace_back("X-Request-ID", exchange.request_id);
    const ExchangeExtra& extra = exchange.extra();
    if (!extra.client_request_id.empty())
        reply.headers.emplace_back("X-Client-Request-Id", extra.client_request_id);
    if (!body.empty() && !find_header(reply.headers, "Content-Type"))
        reply.headers.emplace_back("Content-Type", "application/json");
    const bool names = exchange.route && exchange.route->surface && !exchange.response_id.empty();
    if (names && !find_header(reply.headers, "X-Valar-Response-Id"))
        reply.headers.emplace_back("X-Valar-Response-Id", exchange.response_id);
    if (!extra.ignored.empty()) reply.headers.emplace_back("X-Ignored-Fields", extra.ignored);
    if (exchange.replayed) reply.headers.emplace_back("Idempotent-Replayed", "true");
    if (!extra.cors_origin.empty()) {
        reply.headers.emplace_back("Access-Control-Allow-Origin", extra.cors_origin);
        reply.headers.emplace_back("Access-Control-Expose-Headers",
                                   "X-Request-ID, X-Client-Request-Id, X-Valar-Response-Id, "
                                   "X-Ignored-Fields, Retry-After, Idempotent-Replayed");
    }
    const Surface* surface = exchange.route ? exchange.route->surface : nullptr;
    if (surface && surface->request_id)
        reply.headers.emplace_back(surface->request_id, exchange.request_id);
    if (!options.cors_origins.empty()) reply.headers.emplace_back("Vary", "Origin");
    reply.body = std::move(body);
    return reply;
}

/// In the form of the surface that was asked.
Json ServerLoop::make_error_body(const Exchange& exchange, const Error& error) const {
    const Surface* surface = exchange.route ? exchange.route->surface : nullptr;
    if (!surface || !surface->error) return render_error(error);
    Json body = surface->error(error, options.dialect);
    if (options.dialect == Dialect::openai) body.set("request_id", exchange.request_id);
    return body;
}

HttpReply ServerLoop::make_error_reply(Exchange& exchange, const Error& error,
                                       HttpHeaders headers) {
    note_error(exchange, error);
    const int status = http_status(error);
    if (status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
    if (status == 405) headers.emplace_back("Allow", exchange.route->allowed());
    if (status == 503 || status == 429) {
        const uint32_t seconds = error.retry_after_s ? error.retry_after_s : retry_after_s();
        headers.emplace_back("Retry-After", std::to_string(seconds));
    }
    if (status >= 500 && error.code.empty())  // what has a code was written for clients
        note_trouble("request", error, exchange.request_id);
    return make_reply(exchange, status, make_error_body(exchange, error).write(),
                      std::move(headers));
}

HttpReply ServerLoop::make_preflight_reply(const Exchange& exchange, const HttpRequest& request) {
    const std::string* asked = request.header("Access-Control-Request-Headers");
    return make_reply(exchange, 204, {},
                      {{"Access-Control-Allow-Methods", "GET, HEAD, POST, DELETE"},
                       {"Access-Control-Allow-Headers",
                        asked ? *asked : "Authorization, Content-Type, Idempotency-Key"},
                       {"Access-Control-Max-Age", "600"}});
}

/// Ends the exchange.
void ServerLoop::answer(Exchange& exchange, HttpReply reply) {
    const uint64_t number = exchange.number;
    log_exchange(exchange, reply.status);
    http->reply(number, std::move(reply));
    exchanges.erase(number);
}

void ServerLoop::answer(Exchange& exchange, int status, std::string body) {
    answer(exchange, make_reply(exchange, status, std::move(body)));
}

void ServerLoop::refuse(Exchange& exchange, const Error& error, HttpHeaders headers) {
    if (exchange.begun) {
        note_error(exchange, error);
        const auto events = event_writer(exchange.form, {}, options.dialect);
        if (exchange.form.after != UINT64_MAX) events->skip_to(exchange.form.after);
        events->fail(error);
        return end_stream(exchange, events->take());
    }
    answer(exchange, make_error_reply(exchange, error, std::move(headers)));
}

/// When the queue will have moved on, as far as the pace of late tells.
uint32_t ServerLoop::retry_after_s() const {
    const double wait_s = std::ceil(static_cast<double>(waiting()) * finish_gap_s);
    return static_cast<uint32_t>(std::clamp<double>(wait_s, 1, server_max_retry_s));
}

/// What clients are not told goes to the log, once a minute for each cause, and is counted.
void ServerLoop::note_trouble(const char* from, const Error& error, const std::string& of) {
    const uint64_t now_ns = monotonic_ns();
    std::string line = std::string(from) + (of.empty() ? "" : " " + of) + ": " + error.message;
    {
        const std::lock_guard<std::mutex> lock(trouble_mutex);
        Trouble& trouble = troubles[{from, error.kind}];
        if (trouble.count++ != 0 && now_ns - trouble.told_ns < server_trouble_ns) {
            ++trouble.untold;
            return;
        }
        trouble.told_ns = now_ns;
        if (const uint64_t untold = std::exchange(trouble.untold, 0))
            line += format(" (and %llu more of this kind since the last line)",
                           static_cast<unsigned long long>(untold));
    }
    for (char& c : line)
        if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = ' ';  // one line
    say(LogLevel::error, Json::object().set("message", line));
}

/// What a client is told of the store's error: the rules of the contract as they are, else only
/// whether another try is worth it.
Error ServerLoop::store_error(const Error& error) {
    if (error.kind == ErrorKind::conflict || error.kind == ErrorKind::not_found) return error;
    note_trouble("store", error);
    if (error.kind == ErrorKind::overloaded || error.kind == ErrorKind::out_of_memory) {
        Error full = server_overloaded("the store has no room for another response now");
        full.retry_after_s = store_retry_s;
        return full;
    }
    return make_error(ErrorKind::internal, "the store failed", "internal_error");
}

/// Framing that failed, and limits of http: the request may not even have a path.
HttpReply ServerLoop::on_error(const HttpRequest& request, int status, std::string_view code,
                               std::string_view message) {
    Exchange exchange;
    exchange.request_id = make_request_id();
    exchange.method = request.method.empty() ? "-" : request.method;
    const bool path = !request.target.empty() && request.target[0] == '/';
    exchange.path = path ? request.target.substr(0, request.target.find('?')) : "-";
    exchange.client = server_client(request, options.trust_proxy);
    exchange.started_ns = monotonic_ns();
    const ErrorKind kind = status == 503 ? ErrorKind::overloaded : ErrorKind::invalid_request;
    HttpReply reply = make_error_reply(exchange,
                                       make_error(kind, std::string(message), std::string(code)));
    reply.status = status;
    log_exchange(exchange, status);
    return reply;
}

/// A line for each of them could be many.
HttpReply ServerLoop::on_full(bool no_descriptor) {
    Exchange exchange;
    exchange.request_id = make_request_id();
    ++answered[{"none", 503}];
    const std::string why = no_descriptor
                                ? "the process has no descriptor left (ulimit -n)"
                                : format("%u are open (max_connections)", options.max_connections);
    note_trouble("connection", make_error(no_descriptor ? ErrorKind::io : ErrorKind::overloaded,
                                          "refused with 503: " + why));
    return make_error_reply(exchange, server_overloaded("too many connections"));
}

// ---- Exchanges -------------------------------------------------------------------------------

void ServerLoop::on_request(HttpRequest&& request) {
    const auto found = exchanges.find(request.exchange);
    if (found == exchanges.end()) return;
    Exchange& exchange = found->second;
    if (request.chunked)  // only now is it known that its size is allowed
        if (auto checked = check_type(request, exchange); !checked)
            return refuse(exchange, checked.error());
    (this->*exchange.operation->handle)(exchange, request);
}

ServerLoop::Exchange* ServerLoop::find_exchange(uint64_t number) {
    const auto found = exchanges.find(number);
    return found == exchanges.end() ? nullptr : &found->second;
}

/// A client that leaves cancels what only it can ask for again.
void ServerLoop::on_closed(uint64_t number) {
    const auto found = exchanges.find(number);
    if (found == exchanges.end()) return;
    const std::string id = found->second.response_id;
    const bool streamed = found->second.begun;
    const auto entry = live.find(id);
    const bool tells = entry != live.end() && entry->second.owner == number &&
                       (entry->second.state == Live::State::working ||
                        entry->second.state == Live::State::finishing);
    found->second.add_extra().ended_ns = monotonic_ns();
    if (tells) entry->second.left = std::make_unique<Exchange>(std::move(found->second));
    else log_exchange(found->second, server_client_left);
    if (entry != live.end()) {
        std::erase(entry->second.waiters, number);
        if (entry->second.owner == number) cancel(entry->first, entry->second);
    }
    exchanges.erase(found);
    if (streamed) take_events(id);  // others may have waited for this one
}

void ServerLoop::on_tick() {
    const uint64_t now_ns = monotonic_ns();
    while (!timeouts.empty() && timeouts.front().first <= now_ns) {
        Exchange* exchange = find_exchange(timeouts.front().second);
        timeouts.pop_front();
        if (!exchange) continue;
        const std::string id = exchange->response_id;
        const auto entry = live.find(id);
        if (entry == live.end()) continue;  // its end is on the way
        std::erase(entry->second.waiters, exchange->number);
        HttpHeaders headers = {{"X-Valar-Response-Id", id}};
        if (!exchange->keyed) headers.emplace_back("x-should-retry", "false");
        HttpReply reply = make_error_reply(
            *exchange,
            make_error(ErrorKind::timeout,
                       "the response was not finished in time; it goes on: GET /v1/responses/" + id,
                       "timeout"),
            std::move(headers));
        if (exchange->form.surface) reply.status = exchange->form.surface->timeout_status;
        answer(*exchange, std::move(reply));
    }
    beat(now_ns);
    recover_some();
    feed_batches();
    save_unsaved();
    webhooks.on_tick(now_ns);
    if (now_ns >= next_look_ns) {
        next_look_ns = now_ns + server_look_ns;
        look_after_orphans(now_ns);
        look_after_store(now_ns);
        look_after_batches();
        save_usage();
    }
    if (now_ns < next_expiry_ns) return;
    next_expiry_ns = now_ns + server_expire_every_ns;
    store->expire(store->now_ms());
    expire_batches();
    expire_usage();
}

Json server_model_json(const ModelInfo& model, const std::string& id) {
    return Json::object()
        .set("id", id)
        .set("object", "model")
        .set("created", model.created)
        .set("owned_by", model.owned_by);
}

Json server_model_list(Json data) {
    const Json same = data;  // by the name under which some clients look for it
    return Json::object().set("object", "list").set("data", std::move(data)).set("models", same);
}

bool server_answers_to(const ModelInfo& model, const std::string& id) {
    return model.id == id ||
           std::find(model.aliases.begin(), model.aliases.end(), id) != model.aliases.end();
}

void ServerLoop::get_models(Exchange& exchange, HttpRequest&) {
    Json data = Json::array();
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models()) {
            data.push(server_model_json(model, model.id));
            for (const std::string& alias : model.aliases)
                data.push(server_model_json(model, alias));
        }
    answer(exchange, 200, server_model_list(std::move(data)).write());
}

void ServerLoop::get_model(Exchange& exchange, HttpRequest&) {
    const std::string id = exchange.argument;
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (server_answers_to(model, id))
                return answer(exchange, 200, server_model_json(model, id).write());
    refuse(exchange, server_no_model(id));
}

// ---- Jobs ------------------------------------------------------------------------------------

/// One wake for all of a turn: waking a worker for each request would cost more than the request.
void ServerLoop::hand_over() {
    if (outgoing.empty()) return;
    const bool one = outgoing.size() == 1;
    {
        const std::lock_guard<std::mutex> lock(jobs_mutex);
        std::move(outgoing.begin(), outgoing.end(), std::back_inserter(jobs));
    }
    outgoing.clear();
    one ? jobs_waiting.notify_one() : jobs_waiting.notify_all();
}

void ServerLoop::run_jobs() {
    for (;;) {
        JobPtr<Job> job;
        {
            std::unique_lock<std::mutex> lock(jobs_mutex);
            jobs_waiting.wait(lock, [&] { return ending || !jobs.empty(); });
            if (ending) return;
            job = std::move(jobs.front());
            jobs.pop_front();
        }
        job->work(*this, *job);
        send_to_loop([&] { inbox_jobs.push_back(std::move(job)); });
    }
}

/// The store calls from a thread of its own; a job without a next step ends in the loop.
StoreDone ServerLoop::when_kept(JobPtr<Job> job) {
    job->loop = this;
    ++storing;
    const auto call = [](void* context, Result<void> result) {
        JobPtr<Job> kept(static_cast<Job*>(context));
        ServerLoop* self = kept->loop;
        if (!result) kept->error = self->store_error(result.error());
        self->send_to_loop([&] { self->inbox_jobs.push_back(std::move(kept)); });
        --self->storing;  // the last touch: the destructor waits for it
    };
    return {call, job.release()};
}

/// From any thread. One call into the loop serves all that gathers until it comes.
template <class Add>
void ServerLoop::send_to_loop(Add add) {
    bool first = false;
    {
        const std::lock_guard<std::mutex> lock(inbox_mutex);
        first = inbox_jobs.empty() && inbox_ready.empty();
        add();
        ++inbox_count;
    }
    if (stopping) wake(&inbox_count);
    if (first) http->post([](void* self) { static_cast<ServerLoop*>(self)->take_inbox(); }, this);
}

void ServerLoop::on_ready(void* context, const std::string& id) {
    auto* self = static_cast<ServerLoop*>(context);
    self->send_to_loop([&] { self->inbox_ready.push_back(id); });
}

void ServerLoop::take_inbox() {
    std::vector<JobPtr<Job>> done;
    std::vector<std::string> ready;
    {
        const std::lock_guard<std::mutex> lock(inbox_mutex);
        done.swap(inbox_jobs);
        ready.swap(inbox_ready);
    }
    for (JobPtr<Job>& job : done) {
        const auto next = job->next;
        if (next) next(*this, std::move(job));
    }
    for (const std::string& id : ready) take_events(id);
}

void ServerLoop::answer_job(JobPtr<AnswerJob> job) {
    Exchange* exchange = find_exchange(job->exchange);
    if (!exchange) return;
    if (job->error) return refuse(*exchange, *job->error);
    if (exchange->begun) return end_stream(*exchange, std::move(job->text));
    if (exchange->form.stream)
        return answer(*exchange,
                      make_reply(*exchange, 200, std::move(job->text), stream_headers(*exchange)));
    answer(*exchange, job->status, std::move(job->text));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

struct Server::State : detail::ServerLoop {};

Result<Server> Server::open(Responder* responder, const ServerOptions& options) {
    return open(std::span<Responder* const>(&responder, 1), options);
}

Result<Server> Server::open(std::span<Responder* const> responders, const ServerOptions& options) {
    if (responders.empty() ||
        std::find(responders.begin(), responders.end(), nullptr) != responders.end())
        return detail::server_option("responders", "a server needs a Responder");
    if (auto checked = detail::server_check_options(options); !checked) return checked.error();
    auto keys = detail::server_keys(options.keys);  // which keeps no secret
    if (!keys) return keys.error();
    auto state = std::make_unique<State>();
    state->options = options;
    for (ApiKey& key : state->options.keys) detail::wipe(key.secret.data(), key.secret.size());
    state->options.keys.clear();
    state->keys = std::move(*keys);
    state->has_keys = !state->keys.empty();
    state->store = options.store;
    if (!state->store) {
#ifdef VALAR_NO_STORE
        return detail::server_option("store", "VALAR_NO_STORE cuts MemoryStore: pass a Store");
#else
        state->own_store = std::make_unique<MemoryStore>(options.memory_store);
        state->store = state->own_store.get();
#endif
    }
    state->responders.assign(responders.begin(), responders.end());
    if (auto started = state->start(); !started) return started.error();
    return Server(std::move(state));
}

Server::Server(std::unique_ptr<State> state) : state_(std::move(state)) {}
Server::Server(Server&& other) noexcept = default;
Server& Server::operator=(Server&& other) noexcept = default;
Server::~Server() { detail::leave_to_parent(state_); }

Result<void> Server::run() {
    while (state_->step(-1)) {}
    return {};
}

Result<bool> Server::step(int timeout_ms) { return state_->step(timeout_ms); }

void Server::stop(bool at_once) {
    state_->stopping = true;
    state_->http->stop(at_once);
}

Result<void> Server::replace_keys(const std::vector<ApiKey>& keys) {
    if (keys.empty())
        return detail::server_option("keys", "there is no key, and a server does not become open");
    auto next = detail::server_keys(keys);
    if (!next) return next.error();
    state_->set_keys(std::move(*next));
    return {};
}

uint16_t Server::port() const { return state_->http->port(); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER

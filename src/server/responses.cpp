#include "prologue.hpp"

#include "api/document.hpp"
#include "server/loop.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Accepting a request -----------------------------------------------------------------------

/// What acceptance resolved; a response is rendered from it and the request.
std::string server_head(const ResponseRecord& record) {
    Json head = Json::object();
    if (!record.conversation_last.empty()) head.set("conversation_last", record.conversation_last);
    if (!record.raw.is_null()) head.set("raw", record.raw);
    if (!record.key.empty()) head.set("key", record.key);
    return head.set("message_id", record.message_id)
        .set("created_at", record.created_at)
        .set("model", record.model)
        .set("temperature", record.temperature)
        .set("top_p", record.top_p)
        .set("seed", record.seed)
        .write();
}

std::shared_ptr<const std::string> server_shared(std::string text) {
    text.shrink_to_fit();  // it stays
    return std::make_shared<const std::string>(std::move(text));
}

ResponseRecord server_record(const StoredResponse& stored, Status status) {
    ResponseRecord record;
    const auto head = Json::parse(stored.head ? *stored.head : "");
    auto request = Json::parse(stored.request ? *stored.request : "");
    const Json& known = head ? *head : Json();
    record.id = stored.id;
    record.organisation = stored.organisation;
    record.message_id = known["message_id"].as_string();
    record.created_at = known["created_at"].as_int();
    record.model = known["model"].as_string();
    record.temperature = known["temperature"].as_double();
    record.top_p = known["top_p"].as_double();
    record.seed = known["seed"].as_int();
    record.conversation_last = known["conversation_last"].as_string();
    record.raw = known["raw"];
    record.key = known["key"].as_string();
    record.status = status;
    if (request) record.request = std::move(*request);
    return record;
}

/// The token of a webhook is kept beside, until it was used for the last time.
Result<void> server_hide_token(std::string* body, const Request& request) {
    const auto is_token = [](const auto& pair) { return pair.first == kWebhookTokenKey; };
    if (std::none_of(request.metadata.begin(), request.metadata.end(), is_token)) return {};
    auto shown = Json::parse(*body);
    if (!shown) return shown.error();
    if (Json* metadata = shown->find("metadata")) metadata->set(kWebhookTokenKey, "***");
    wipe(body->data(), body->size());
    *body = shown->write();
    return {};
}

Error server_field(const char* code, const char* param, std::string message) {
    return make_error(ErrorKind::invalid_request, std::move(message), code, param);
}

Error server_no_response(std::string_view id) {
    return server_not_found("no response '" + printable(id) + "'");
}

/// How many idempotency keys came, and the last of them.
std::pair<int, std::string> server_key_headers(const HttpRequest& request) {
    std::pair<int, std::string> found;
    for (const char* name : {"Idempotency-Key", "Anthropic-Idempotency-Key"}) {
        found.first += static_cast<int>(request.count(name));
        if (const std::string* key = request.header(name)) found.second = *key;
    }
    return found;
}

void ServerLoop::post_response(Exchange& exchange, HttpRequest& request) {
    auto job = std::make_unique<AcceptJob>();
    job->exchange = exchange.number;
    job->key_id = exchange.key_id;
    job->form.surface = exchange.route->surface;
    job->stored.organisation = exchange.organisation;
    job->body = std::move(request.body);
    std::tie(job->keys, job->key) = server_key_headers(request);
    exchange.keyed = job->keys > 0;
    send_job<&ServerLoop::accept_work, &ServerLoop::accept_admit>(std::move(job));
}

/// A response, or a conversation: neither is found by a path of the other's.
std::optional<StoredResponse> ServerLoop::find_record(const std::string& organisation,
                                                      const std::string& id,
                                                      bool conversation) const {
    auto stored = store->find(organisation, id);
    if (stored && (stored->kept || stored->conversation != conversation)) stored.reset();
    if (!stored && !conversation) stored = find_waiting(organisation, id);
    return stored;
}

Responder* ServerLoop::find_responder(const std::string& wanted) const {
    for (Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (server_answers_to(model, wanted)) return responder;
    return nullptr;
}

/// The name that an idempotency key reserves.
Result<std::string> ServerLoop::reservation_of(int keys, std::string_view given,
                                               const std::string& key_id) {
    const std::string_view key = trim(given);
    const auto refused = [](const char* code, const char* message) {
        return server_field(code, "Idempotency-Key", message);
    };
    if (keys > 1) return refused("invalid_value", "more than one header of an idempotency key");
    if (key.empty())
        return refused("string_below_min_length", "the header Idempotency-Key is empty");
    if (utf8_count(key) > server_max_key_length)
        return refused("string_above_max_length",
                       "the header Idempotency-Key has more than 255 characters");
    const auto control = [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 0x7f; };
    if (std::any_of(key.begin(), key.end(), control))
        return refused("invalid_value", "the header Idempotency-Key holds control characters");
    return key_id + "\n" + std::string(key);
}

/// The idempotency key and the fingerprint of the request under it: a hash of the route and of the
/// body in canonical form, so that a body that is only written differently is the same request.
Result<void> ServerLoop::read_key(AcceptJob& job, const Json& body, const Request& request) const {
    if (job.keys == 0) return {};
    auto reservation = reservation_of(job.keys, job.key, job.key_id);
    if (!reservation) return reservation.error();
    if (!request.store)
        return server_field("unsupported_value", "store",
                            "'store' must be true with an idempotency key, but false was received");
    job.stored.reservation = std::move(*reservation);
    const std::string_view route = job.form.surface ? job.form.surface->path : "/v1/responses";
    const Hash256 hash = sha256(join({route, "\n", body.canonical()}));
    job.stored.fingerprint = hash.view();
    return {};
}

/// Items of earlier answers take the places where the input of /v1/responses refers to them (openai
/// dialect), and empty messages those of items that nobody knows, which the error then names. `sent`:
/// the body as it was, where it is changed.
Result<void> ServerLoop::put_references(const std::string& organisation, const Surface* surface,
                                        Json* body, Json* sent) const {
    if (surface || options.dialect != Dialect::openai) return {};
    Json* input = body->find("input");
    uint64_t bytes = 0;  // of the answers that were read
    Result<void> put;
    for (size_t i = 0; input && input->is_array() && i < input->size(); ++i) {
        Json& item = input->items()[i];
        if (item["type"].as_string() != "item_reference") continue;
        if (sent->is_null()) *sent = *body;
        const std::string id(item["id"].as_string());
        item = Json::object().set("role", "assistant").set("content", "");
        const auto record = find_record(organisation, item_response_id(id));
        auto object = record && record->terminal &&
                              (bytes += record->object->size()) <= options.max_body_bytes
                          ? Json::parse(*record->object)
                          : Result<Json>(Json());
        if (!object) return object.error();
        const auto& output = (*object)["output"].items();
        const auto found = std::find_if(output.begin(), output.end(), [&](const Json& one) {
            return one["id"].as_string() == id;
        });
        if (found != output.end()) item = *found;
        else if (put)
            put = server_field("invalid_value", ("input[" + std::to_string(i) + "].id").c_str(),
                               "no item '" + printable(id) + "' in a finished response");
    }
    return put;
}

/// Puts the turns of a chain of earlier responses, or of a conversation, before the request's own
/// (openai dialect). `last`: of a conversation the last that counts, once it is known.
Result<void> ServerLoop::add_previous(const std::string& organisation, Request* request, Json body,
                                      std::string* last) const {
    if (!request->conversation.empty()) {
        if (auto added = add_conversation(organisation, &body, last); !added) return added;
        auto whole = parse_response_request(body, options.dialect);
        if (whole) *request = std::move(*whole);
        return whole ? Result<void>() : whole.error();
    }
    std::vector<StoredResponse> turns;  // newest first
    const auto refused = [](const std::string& message) {
        return server_field("previous_response_not_found", "previous_response_id", message);
    };
    std::string id = request->previous_response_id;
    for (uint64_t bytes = 0; !id.empty();) {
        auto turn = find_record(organisation, id);
        if (!turn) return refused("no previous response '" + printable(id) + "'");
        if (!turn->terminal)
            return refused("the previous response '" + id + "' is not finished yet");
        bytes += turn->request->size() + turn->object->size();
        if (turns.size() == server_max_turns || bytes > options.max_body_bytes)
            return refused("the chain of previous responses is too long");
        auto asked = Json::parse(*turn->request);
        if (!asked) return asked.error();
        id = (*asked)["previous_response_id"].as_string();
        turns.push_back(std::move(*turn));
    }
    Json items = Json::array();
    for (auto turn = turns.rbegin(); turn != turns.rend(); ++turn) {
        auto asked = Json::parse(*turn->request), object = Json::parse(*turn->object);
        if (!asked || !object) return asked ? object.error() : asked.error();
        for (Json& item : render_input_items(*asked, turn->id)) items.push(std::move(item));
        for (const Json& item : (*object)["output"].items()) items.push(item);
    }
    for (Json& item : render_input_items(body, "")) items.push(std::move(item));
    body.set("input", std::move(items)).erase("previous_response_id");
    auto whole = parse_response_request(body, options.dialect);
    if (!whole) return whole.error();
    *request = std::move(*whole);
    return {};
}

/// The body of a surface of its own becomes one of /v1/responses.
Result<Request> ServerLoop::read_request(const Json& body, AnswerForm* form,
                                         SurfaceBody* read) const {
    if (!form->surface) {
        auto request = parse_response_request(body, options.dialect);
        if (request) form->stream = request->stream;
        return request;
    }
    auto given = read_surface(*form->surface, body, options.dialect);
    if (!given) return given.error();
    *read = std::move(*given);
    form->stream = read->stream;
    form->include_usage = read->include_usage;
    form->echo = read->echo;
    auto request = parse_response_request(read->body, options.dialect);
    if (!request) return surface_error(*form->surface, request.error(), *read);
    if (!read->raw.is_null()) request->raw = raw_prompt(read->raw);
    return request;
}

/// All that needs the model; `responder` is who has it.
Result<std::unique_ptr<Prepared>> ServerLoop::prepare(const std::string& organisation, Json body,
                                                      Request* request, Responder** responder,
                                                      std::string* last) const {
    *responder = find_responder(request->model);
    if (!*responder) return server_no_model(request->model);
    if (!request->previous_response_id.empty() || !request->conversation.empty())
        if (auto added = add_previous(organisation, request, std::move(body), last); !added)
            return added.error();
    request->organisation = organisation;
    return (*responder)->prepare(*request);
}

/// A body becomes a prepared request and a record, or an error: whichever check fails first.
Result<void> ServerLoop::accept(AcceptJob& job) {
    auto body = Json::parse(job.body);
    if (!body) return body.error();
    SurfaceBody read;
    Json sent;
    auto put = put_references(job.stored.organisation, job.form.surface, &*body, &sent);
    auto request = read_request(*body, &job.form, &read);
    if (!request) return request.error();
    job.ignored = ignored_fields(*body, job.form.surface, options.dialect);
    if (auto keyed = read_key(job, sent.is_null() ? *body : sent, *request); !keyed)
        return keyed.error();
    StoredResponse& stored = job.stored;
    if (!stored.reservation.empty()) {  // what was accepted once is not checked against the model
        job.replay = store->reserved(stored.organisation, stored.reservation);
        if (job.replay && job.replay->fingerprint == stored.fingerprint) return {};
    }
    if (!put) return put.error();
    const Surface* surface = job.form.surface;
    if (!sent.is_null()) job.body = body->write();
    auto prepared = prepare(stored.organisation, std::move(*body), &*request, &job.responder,
                            &job.conversation_last);
    if (!prepared)
        return surface ? surface_error(*surface, prepared.error(), read) : prepared.error();
    job.prepared = std::move(*prepared);
    job.raw = read.raw;
    if (surface) job.body = read.body.write();
    return make_record(job, *request);
}

/// How many tokens the prompt of a request has, which leaves no record.
void ServerLoop::post_count(Exchange& exchange, HttpRequest& request) {
    auto job = std::make_unique<CountJob>();
    job->exchange = exchange.number;
    job->form.surface = exchange.route->surface;
    job->organisation = exchange.organisation;
    job->body = std::move(request.body);
    send_job<&ServerLoop::count_work, &ServerLoop::answer_job>(std::move(job));
}

Json server_count(const Surface* surface, uint32_t tokens) {
    Json count = Json::object();
    if (!surface) count.set("object", "response.input_tokens");
    return std::move(count).set("input_tokens", tokens);
}

void ServerLoop::count_work(CountJob& job) {
    SurfaceBody read;
    std::string last;
    Responder* responder = nullptr;
    const Surface* surface = job.form.surface;
    const auto prepared = [&]() -> Result<std::unique_ptr<Prepared>> {
        auto body = Json::parse(job.body);
        if (!body) return body.error();
        Json sent;
        auto put = put_references(job.organisation, surface, &*body, &sent);
        auto request = read_request(*body, &job.form, &read);
        if (!request || !put) return request ? put.error() : request.error();
        auto made = prepare(job.organisation, std::move(*body), &*request, &responder, &last);
        if (!made && surface) return surface_error(*surface, made.error(), read);
        return made;
    }();
    if (!prepared) {
        job.error = prepared.error();
        return;
    }
    job.text = server_count(surface, (*prepared)->input_tokens).write();
}

Result<void> ServerLoop::make_record(AcceptJob& job, const Request& request) {
    auto id = draw_id("resp_");
    if (!id) return id.error();
    StoredResponse& stored = job.stored;
    ResponseRecord record;
    record.id = *id;
    record.message_id = first_message_id(*id);
    record.model = request.model;
    record.temperature = job.prepared->temperature;
    record.top_p = job.prepared->top_p;
    record.seed = job.prepared->seed;
    record.input_tokens = job.prepared->input_tokens;
    record.conversation_last = job.conversation_last;
    record.raw = job.raw;
    record.key = job.key_id;
    stored.created_at_ms = store->now_ms();
    record.created_at = unix_time_ms() / 1000;
    stored.id = *id;
    stored.background = request.background;
    stored.attempts = 1;
    stored.head = server_shared(server_head(record));
    job.hook = webhooks.read(request);
    if (auto hidden = server_hide_token(&job.body, request); !hidden) return hidden;
    stored.request = server_shared(std::move(job.body));
    job.store = request.store;
    if (stored.background && !job.form.stream) job.text = render_live(stored, false);
    if (!job.form.stream) return {};
    if (!job.form.surface) record = server_record(stored, Status::pending);
    job.text = begin_events(job.form, record)->take();
    record.request.erase("input");  // which no event shows
    std::string asked = record.request.write();
    asked.shrink_to_fit();
    const bool kept = stored.background || !stored.reservation.empty();
    job.stream = std::make_unique<Stream>(Stream{
        stored.head, std::move(asked), job.prepared->input_tokens, job.form.include_usage, kept});
    return {};
}

void ServerLoop::accept_work(AcceptJob& job) {
    if (auto accepted = accept(job); !accepted) job.error = std::move(accepted.error());
}

/// The last refusals; from here on the record exists.
void ServerLoop::accept_admit(JobPtr<AcceptJob> job) {
    Exchange* exchange = find_exchange(job->exchange);
    if (!exchange) return;
    if (!job->ignored.empty()) exchange->add_extra().ignored = std::move(job->ignored);
    if (!job->error && job->prepared && stopping)
        job->error = server_overloaded("the server is shutting down");
    if (!job->error && job->prepared && waiting() >= options.max_queued)
        job->error = server_overloaded("too many requests are waiting");
    if (job->error) return refuse(*exchange, *job->error);
    exchange->form = job->form;
    if (!job->prepared) return replay(*exchange, *job->replay);

    const StoredResponse& stored = job->stored;
    Live& entry = live[stored.id];
    entry.organisation = stored.organisation;
    entry.background = stored.background;
    entry.resumable = stored.background || !stored.reservation.empty();
    entry.responder = job->responder;
    entry.surface = job->form.surface;
    entry.echo = job->form.echo;
    if (!entry.resumable) entry.owner = exchange->number;
    ++queued;
    exchange->response_id = stored.id;
    if (!job->store) {
        entry.unkept = std::make_unique<StoredResponse>(stored);
        return accept_done(std::move(job));
    }
    StoredResponse record = stored;
    if (!job->hook) webhooks.refuse("response", record.id, job->hook.error());
    entry.webhook = job->hook && !job->hook->empty();
    if (entry.webhook) webhooks.keep(record.id, record.organisation, std::move(*job->hook));
    store->add(std::move(record), on_kept<&ServerLoop::accept_done>(std::move(job)));
}

/// The record is kept, or the reservation was taken meanwhile, or the store had no room.
void ServerLoop::accept_done(JobPtr<AcceptJob> job) {
    const std::string id = job->stored.id;
    Exchange* exchange = find_exchange(job->exchange);
    Live& entry = live.find(id)->second;
    if (!job->error && entry.state == Live::State::parked) return;  // stopping: for the next start
    if (!job->error) {
        if (!exchange && entry.owner)
            return take_back(id, job->exchange, make_error(ErrorKind::cancelled, "client left"));
        entry.state = Live::State::waiting;
        return begin(std::move(job));
    }
    --queued;
    if (entry.webhook) webhooks.forget(id, entry.organisation);
    live.erase(id);
    if (!exchange) return;
    if (job->error->kind == ErrorKind::conflict) {
        const auto holder = store->reserved(job->stored.organisation, job->stored.reservation);
        if (holder && holder->fingerprint == job->stored.fingerprint)
            return replay(*exchange, *holder);
        job->error = make_error(ErrorKind::conflict,
                                "this idempotency key was used for another request",
                                "idempotency_key_reused");
    }
    refuse(*exchange, *job->error);
}

/// Hands it to its Responder. A caller that asked for the background is answered, others wait.
void ServerLoop::begin(JobPtr<AcceptJob> job) {
    const std::string id = job->stored.id;
    Live& entry = live.find(id)->second;
    auto submitted = entry.responder->submit(std::move(job->prepared), id);
    if (!submitted) return take_back(id, job->exchange, std::move(submitted.error()));
    entry.state = Live::State::working;
    entry.stream = std::move(job->stream);
    if (Exchange* exchange = find_exchange(job->exchange)) {
        if (entry.stream) join_stream(*exchange, id, entry, &job->text);
        else if (entry.background) answer(*exchange, 202, std::move(job->text));
        else wait_for(*exchange, id, entry);
    }
    take_events(id);
}

/// Undoes an acceptance: nothing ran, and an idempotency key is free again.
void ServerLoop::take_back(const std::string& id, uint64_t exchange_number, Error error) {
    Live& entry = live.find(id)->second;
    std::vector<uint64_t> waiters = std::move(entry.waiters);
    waiters.push_back(exchange_number);
    const bool kept = !entry.unkept;
    const std::string organisation = entry.organisation;
    --queued;
    if (entry.webhook) webhooks.forget(id, organisation);
    live.erase(id);
    for (const uint64_t number : waiters)
        if (Exchange* exchange = find_exchange(number)) refuse(*exchange, error);
    if (kept)
        store->erase(organisation, id, false, store->now_ms(), when_kept(std::make_unique<Job>()));
}

void ServerLoop::wait_for(Exchange& exchange, const std::string& id, Live& entry) {
    exchange.response_id = id;
    entry.waiters.push_back(exchange.number);
    if (options.sync_timeout_ms == 0) return;
    const uint64_t wait_ns = uint64_t{options.sync_timeout_ms} * 1'000'000;
    timeouts.emplace_back(monotonic_ns() + wait_ns, exchange.number);
}

/// A repeat of a request: it never runs again, it is answered from the record.
void ServerLoop::replay(Exchange& exchange, const Reservation& reservation) {
    if (reservation.deleted) return refuse(exchange, server_no_response(reservation.id));
    exchange.replayed = true;
    ++replayed;
    const auto found = live.find(reservation.id);
    if (found != live.end() && exchange.form.stream)
        return join_stream(exchange, reservation.id, found->second);
    if (found != live.end() && !found->second.background)
        return wait_for(exchange, reservation.id, found->second);
    show(exchange, reservation.id, 202);
}

// ---- Working and finishing ---------------------------------------------------------------------

void ServerLoop::take_events(const std::string& id) {
    const auto found = live.find(id);
    if (found == live.end()) return;
    Live& entry = found->second;
    std::shared_ptr<const Outcome> outcome;
    while (!outcome && !is_behind(entry)) {
        auto event = entry.responder ? entry.responder->poll(id) : std::nullopt;
        if (!event) break;
        if (entry.state == Live::State::parked) continue;
        outcome = std::move(event->outcome);
        if (entry.stream) events_of(id, entry).add(*event);
        if (entry.stream && entry.stream->events->size() >= server_most_unsent / 4)
            send_events(entry);
        if (!outcome) leave_queue(entry);
    }
    if (entry.stream) send_events(entry);
    if (outcome) finish(id, entry, std::move(outcome));
}

void ServerLoop::leave_queue(Live& entry) {
    if (std::exchange(entry.running, true)) return;
    --queued;
    items_queued -= entry.item;
}

void ServerLoop::cancel(const std::string& id, Live& entry) {
    if (entry.state == Live::State::working) return entry.responder->cancel(id);
    if (entry.state != Live::State::waiting) return;
    auto outcome = std::make_shared<Outcome>();
    outcome->status = Status::cancelled;
    finish(id, entry, std::move(outcome));
}

/// Leaves it unfinished for the next start, as if it had not been begun this time.
void ServerLoop::park(const std::string& id, Live& entry) {
    log_left(entry, nullptr);
    if (entry.state >= Live::State::finishing) return;
    if (std::exchange(entry.state, Live::State::parked) == Live::State::working)
        entry.responder->cancel(id);
    if (!entry.begun || entry.unkept || !entry.resumable) return;
    store->begin(id, entry.attempts - 1, when_kept(std::make_unique<Job>()));
}

void ServerLoop::finish(const std::string& id, Live& entry,
                        std::shared_ptr<const Outcome> outcome) {
    leave_queue(entry);
    entry.state = Live::State::finishing;
    orphans.erase(id);
    ++finishing;
    const uint64_t now_ns = monotonic_ns();
    const double gap_s = static_cast<double>(now_ns - last_finish_ns) / 1e9;
    if (std::exchange(last_finish_ns, now_ns) != 0)
        finish_gap_s += (std::min(gap_s, 60.0) - finish_gap_s) / 8;
    figures.add(*outcome);
    auto job = std::make_unique<FinishJob>();
    job->stored.id = id;
    job->stored.organisation = entry.organisation;
    if (entry.unkept) job->stored = *entry.unkept;
    job->store = !entry.unkept;
    job->form.surface = entry.surface;
    job->form.echo = entry.echo;
    if (outcome->status == Status::failed)
        note_trouble("response",
                     outcome->error.value_or(make_error(ErrorKind::internal, "no reason given")),
                     id);
    job->outcome = std::move(outcome);
    send_job<&ServerLoop::finish_work, &ServerLoop::finish_keep>(std::move(job));
}

/// Renders the terminal object, once. What is large is freed here, not on the loop.
void ServerLoop::finish_work(FinishJob& job) {
    if (job.store) {
        auto stored = store->find(job.stored.organisation, job.stored.id);
        if (!stored) {
            job.error = server_no_response(job.stored.id);
            return;
        }
        job.stored = std::move(*stored);
    }
    const Outcome& outcome = *job.outcome;
    ResponseRecord record = server_record(
        job.stored, is_terminal(outcome.status) ? outcome.status : Status::failed);
    record.completed_at = std::max(unix_time_ms() / 1000, record.created_at);
    record.outcome = job.outcome;
    job.used = usage_key(record);
    job.stored.object = server_shared(render_response(record, options.dialect).write());
    job.stored.head = job.stored.request = nullptr;
    if (const Json& in = record.request["conversation"];
        !in.is_null() && record.status == Status::completed) {
        job.conversation = (in.is_object() ? in["id"] : in).as_string();
        job.said = render_input_items(record.request, record.id);
        if (const auto object = Json::parse(*job.stored.object))
            for (const Json& item : (*object)["output"].items()) job.said.push_back(item);
    }
    if (job.form.surface) job.answer = render_answer(job.form, *job.stored.object, options.dialect);
}

void ServerLoop::finish_keep(JobPtr<FinishJob> job) {
    if (!job->error && !job->conversation.empty()) return extend_conversation(std::move(job));
    if (job->error || !job->store) return finish_done(std::move(job));
    const std::string id = job->stored.id;
    auto object = job->stored.object;
    store->finish(id, std::move(object), store->now_ms(),
                  on_kept<&ServerLoop::finish_done>(std::move(job)));
}

/// The terminal object is kept: all that wait for it get the same bytes.
void ServerLoop::finish_done(JobPtr<FinishJob> job) {
    const auto found = live.find(job->stored.id);
    if (found == live.end()) return;
    const std::vector<uint64_t> waiters = std::exchange(found->second.waiters, {});
    const bool again = !drain_begun && job->error && job->error->kind == ErrorKind::overloaded;
    const Outcome& outcome = *job->outcome;
    std::string events;  // the last, for those who have the others
    if (found->second.stream) {
        EventWriter& writer = events_of(found->first, found->second);
        if (job->error) writer.fail(*job->error);
        else writer.end(outcome, *job->stored.object);
        events = writer.take();
        found->second.stream.reset();
    }
    const bool told = found->second.left || !waiters.empty() || job->error;
    log_left(found->second, &outcome);
    if (!job->error) count_usage(*job);
    if (!again) {
        const bool item = found->second.item, hooked = found->second.webhook;
        live.erase(found);
        --finishing;
        if (hooked && !job->error) webhooks.begin(job->stored.id, job->stored.organisation);
        if (item) item_ended(job->stored.id, outcome.status);
    }
    if (!told && options.log.write)  // no exchange's line will tell
        log_line(
            LogLevel::info,
            Json::object()
                .set("response", job->stored.id)
                .set("ended", status_name(outcome.status, outcome.cut, words_of(options.dialect))),
            outcome.usage, outcome.timings);
    for (const uint64_t number : waiters) {
        Exchange* exchange = find_exchange(number);
        if (!exchange) continue;
        exchange->add_extra().usage = outcome.usage;
        exchange->add_extra().timings = outcome.timings;
        if (exchange->follows) end_stream(*exchange, events);
        else if (job->error) refuse(*exchange, *job->error);
        else if (exchange->removes) remove(*exchange, job->stored.id);
        else if (exchange->form.stream || exchange->form.surface != job->form.surface)
            show(*exchange, job->stored.id, 200);  // from the record, not here
        else if (!job->form.surface) answer(*exchange, 200, *job->stored.object);
        else if (!job->answer) refuse(*exchange, job->answer.error());
        else answer(*exchange, 200, *job->answer);
    }
    if (!again) return;
    job->error.reset();  // a full disk: the outcome is kept here until there is room
    unsaved.push_back(std::move(job));
}

void ServerLoop::save_unsaved() {
    for (JobPtr<FinishJob>& job : std::exchange(unsaved, {})) finish_keep(std::move(job));
}

// ---- Removing and cancelling -------------------------------------------------------------------

void ServerLoop::delete_response(Exchange& exchange, HttpRequest&) {
    const auto found = live.find(exchange.argument);
    if (found == live.end() || found->second.organisation != exchange.organisation ||
        found->second.unkept)
        return end_waiting(exchange) ? void() : remove(exchange, exchange.argument);
    exchange.removes = true;
    wait_for(exchange, found->first, found->second);
    cancel(found->first, found->second);
}

void ServerLoop::remove(Exchange& exchange, const std::string& id) {
    if (!id.starts_with("resp_")) return refuse(exchange, server_no_response(id));
    auto job = std::make_unique<RemoveJob>();
    job->exchange = exchange.number;
    job->id = id;
    job->organisation = exchange.organisation;
    if (!webhooks.has(id)) return remove_keep(std::move(job));
    send_job<&ServerLoop::remove_work, &ServerLoop::remove_keep>(std::move(job));
}

void ServerLoop::remove_work(RemoveJob& job) {
    if (auto stored = store->find(job.organisation, job.id)) job.undelivered = stored->object;
}

void ServerLoop::remove_keep(JobPtr<RemoveJob> job) {
    const std::string id = job->id, organisation = job->organisation;
    if (job->undelivered) webhooks.keep_body(id, std::move(job->undelivered));
    store->erase(organisation, id, true, store->now_ms(),
                 on_kept<&ServerLoop::remove_done>(std::move(job)));
}

Json server_deleted(const std::string& id) {
    return Json::object().set("id", id).set("object", "response").set("deleted", true);
}

void ServerLoop::remove_done(JobPtr<RemoveJob> job) {
    const std::string& id = job->id;
    if (job->error && job->error->kind == ErrorKind::not_found) job->error = server_no_response(id);
    job->text = server_deleted(id).write();
    answer_job(std::move(job));
}

void ServerLoop::post_compact(Exchange& exchange, HttpRequest&) {
    refuse(exchange, server_field("unsupported_value", "",
                                  "POST /v1/responses/compact is not supported; a chain of "
                                  "previous_response_id, or a conversation, is kept whole"));
}

Error server_not_background() {
    return server_field("invalid_value", "response_id",
                        "only responses with 'background': true can be cancelled");
}

void ServerLoop::post_cancel(Exchange& exchange, HttpRequest&) {
    const auto found = live.find(exchange.argument);
    if (found == live.end() || found->second.organisation != exchange.organisation)
        return end_waiting(exchange) ? void() : show(exchange, exchange.argument, 200, true);
    if (!found->second.background) return refuse(exchange, server_not_background());
    wait_for(exchange, found->first, found->second);
    cancel(found->first, found->second);
}

// ---- After a restart ---------------------------------------------------------------------------

/// Whatever the last process left unfinished is live again before the first request comes.
void ServerLoop::recover_all() {
    std::vector<StoredResponse> left = store->unfinished();
    sort_items(left, [](const StoredResponse& a, const StoredResponse& b) {
        return a.created_at_ms < b.created_at_ms;
    });
    recover_kept(&left);
    for (const StoredResponse& stored : left) {
        if (stored.conversation) {  // was not told of yet
            store->erase(stored.organisation, stored.id, false, store->now_ms(),
                         when_kept(std::make_unique<Job>()));
            continue;
        }
        Live& entry = live[stored.id];
        entry.state = Live::State::waiting;
        entry.organisation = stored.organisation;
        entry.background = stored.background;
        entry.resumable = stored.background || !stored.reservation.empty();
        entry.attempts = stored.attempts;
        entry.begun = false;
        ++queued;
        size_t place = 0;
        if (Batch* batch = batch_of_item(stored.id, &place)) {
            entry.item = true;
            ++items_queued;
            ++batch->live;
            batch->states[place] = server_batch_begun;
        }
        if (entry.resumable && entry.attempts < server_max_attempts) {
            recoverable.push_back(stored.id);
            continue;
        }
        auto outcome = std::make_shared<Outcome>();
        outcome->status = Status::failed;
        outcome->error = make_error(ErrorKind::closed, "the server was restarted",
                                    "server_restarted");
        finish(stored.id, entry, std::move(outcome));
    }
    webhooks.recover_all();
    if (!live.empty())
        say(LogLevel::info, Json::object()
                                .set("event", "unfinished")
                                .set("resumed", recoverable.size())
                                .set("failed", live.size() - recoverable.size()));
    recover_some();
    feed_batches();
}

void ServerLoop::recover_some() {
    while (!stopping && recovering < server_recovering && !recoverable.empty()) {
        auto job = std::make_unique<RecoverJob>();
        job->id = recoverable.front();
        recoverable.pop_front();
        const auto found = live.find(job->id);
        if (found == live.end() || found->second.state != Live::State::waiting) continue;
        job->organisation = found->second.organisation;
        ++recovering;
        send_job<&ServerLoop::recover_work, &ServerLoop::recover_keep>(std::move(job));
    }
}

/// The same request with the seed that was drawn for it.
void ServerLoop::recover_work(RecoverJob& job) {
    const auto prepare = [&]() -> Result<void> {
        auto stored = store->find(job.organisation, job.id);
        if (!stored) return server_no_response(job.id);
        ResponseRecord record = server_record(*stored, Status::pending);
        record.request.set("seed", record.seed);
        auto request = parse_response_request(record.request, options.dialect);
        if (!request) return request.error();
        job.model = request->model;
        if (!record.raw.is_null()) request->raw = raw_prompt(record.raw);
        auto prepared = this->prepare(record.organisation, std::move(record.request), &*request,
                                      &job.responder, &record.conversation_last);
        if (!prepared) return prepared.error();
        job.prepared = std::move(*prepared);
        return {};
    };
    if (auto prepared = prepare(); !prepared) job.error = std::move(prepared.error());
}

void ServerLoop::recover_keep(JobPtr<RecoverJob> job) {
    const std::string id = job->id;
    const auto found = live.find(id);
    if (found == live.end()) return recover_done(std::move(job));  // cancelled, and gone
    Live& entry = found->second;
    const bool on = entry.state == Live::State::waiting && !job->error;
    if (!on || std::exchange(entry.begun, true)) return recover_done(std::move(job));
    store->begin(id, ++entry.attempts, on_kept<&ServerLoop::recover_done>(std::move(job)));
}

void ServerLoop::recover_done(JobPtr<RecoverJob> job) {
    --recovering;
    const std::string id = job->id;
    const auto found = live.find(id);
    if (found == live.end() || found->second.state != Live::State::waiting) return;  // cancelled
    Live& entry = found->second;
    if (!job->error) {
        entry.responder = job->responder;
        auto submitted = entry.responder->submit(std::move(job->prepared), id);
        if (submitted) {
            entry.state = Live::State::working;
            if (entry.attempts > 1 || !entry.item)
                say(LogLevel::info, Json::object()
                                        .set("event", "resumed")
                                        .set("response", id)
                                        .set("attempt", entry.attempts));
            take_events(id);
            return recover_some();
        }
        job->error = std::move(submitted.error());
    }
    if (job->error->kind == ErrorKind::overloaded) {  // no room yet: again with the next tick
        recoverable.push_back(id);
        return;
    }
    if (job->error->code == "model_not_found" && options.orphans_ms > 0) {
        add_orphan(id, job->model);
        return recover_some();
    }
    auto outcome = std::make_shared<Outcome>();
    outcome->status = Status::failed;
    outcome->error = std::move(job->error);
    finish(id, entry, std::move(outcome));
    recover_some();
}

/// It keeps its place: who started the server without an alias may do so again, with it.
void ServerLoop::add_orphan(const std::string& id, const std::string& model) {
    const bool first = std::none_of(orphans.begin(), orphans.end(),
                                    [&](const auto& one) { return one.second.model == model; });
    orphans[id] = {model, monotonic_ns() + uint64_t{options.orphans_ms} * 1'000'000};
    if (!first) return;
    const std::string shown = printable(std::string_view(model).substr(0, server_shown_bytes));
    std::string message = "responses of before the restart wait for the model '" + shown +
                          format("', which none here answers to; after %u s they fail",
                                 unsigned{options.orphans_ms / 1000});
    say(LogLevel::warning, Json::object().set("message", std::move(message)));
}

void ServerLoop::look_after_orphans(uint64_t now_ns) {
    for (auto next = orphans.begin(); next != orphans.end();) {
        const auto at = next++;
        const bool known = find_responder(at->second.model) != nullptr;
        if (!known && now_ns < at->second.until_ns) continue;
        const auto [id, orphan] = *at;
        orphans.erase(at);
        if (known) {
            recoverable.push_back(id);
            continue;
        }
        auto outcome = std::make_shared<Outcome>();
        outcome->status = Status::failed;
        outcome->error = server_no_model(orphan.model);
        finish(id, live.find(id)->second, std::move(outcome));
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
